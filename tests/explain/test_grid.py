"""Names of sites fall into the rows and columns that a reader expects."""

import pytest

from oftfx.explain.grid import Cell, grid, leaves

PLACES = {
    "model.layers.3.mlp.up_proj": Cell("model.layers.3", "mlp.up_proj"),
    "transformer.h.0.attn.c_attn": Cell("transformer.h.0", "attn.c_attn"),
    "encoder.0.1": Cell("encoder.0", "1"),
    "2": Cell("", "2"),
    "classifier": Cell("", "classifier"),
}


@pytest.mark.parametrize("name", PLACES)
def test_a_name_is_cut_after_its_layer(name):
    assert grid([name])[name] == PLACES[name]


def test_of_two_numbers_the_one_that_makes_the_smaller_table_counts():
    experts = [f"layers.{i}.experts.{e}.up" for i in range(2) for e in range(8)]
    towers = [f"down.{i}.blocks.{b}.{s}" for i in range(3) for b in range(4) for s in "qkvo"]
    assert grid(experts)[experts[0]] == Cell("layers.0.experts.0", "up")
    assert grid(towers)[towers[0]] == Cell("down.0.blocks.0", "q")
    mixed = [f"layers.{i}.{s}" for i in range(9) for s in ("q", "experts.0.up", "experts.1.up")]
    assert grid(mixed)[mixed[1]] == Cell("layers.0", "experts.0.up")


def test_columns_are_called_by_their_last_part_where_that_tells_them_apart():
    columns = ["self_attn.q_proj", "cross_attn.q_proj", "mlp.up_proj"]
    assert [*leaves(columns).values()] == ["self_attn.q_proj", "cross_attn.q_proj", "up_proj"]
