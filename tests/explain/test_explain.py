"""`oftfx.explain(model)`: how each site is run."""

import json
import math

import pytest
import torch

import oftfx
from oftfx import HRA, OFT, PlanError
from oftfx.ops.cost import fold_from
from tests.small import Attention, Functional, llama, rows, small, tokens

SPEC = OFT(block_size=4, init_std=0.2)
CPU = torch.device("cpu")


def explained(model, spec=SPEC, inputs=None):
    inputs = rows(torch.float32) if inputs is None else inputs
    return oftfx.explain(oftfx.adapt(model, spec, example_inputs=inputs))


def lowerings(explanation):
    return {site.fqn: site.lowering for site in explanation.sites}


def test_readers_of_one_tensor_are_grouped():
    expected = {"q": "grouped", "k": "grouped", "v": "grouped", "out": "rotate"}
    assert lowerings(explained(Attention())) == expected


def test_a_shared_rotation_is_held_once():
    found = explained(Attention(), OFT(block_size=4, init_std=0.2, share_inputs=True))
    assert [site.lowering for site in found.sites].count("shared") == 2
    holder, *others = found.sites[:3]
    for site in others:
        assert (site.norm, site.orthogonality_error) == (holder.norm, holder.orthogonality_error)
        assert (site.num_trainable, site.bytes) == (0, 0)


def test_methods_of_other_maps_rotate_each_for_itself():
    assert set(lowerings(explained(Attention(), HRA(rank=2))).values()) == {"rotate"}


def test_weights_used_without_a_layer_are_folded_on_the_fly():
    assert set(lowerings(explained(Functional())).values()) == {"folded on the fly"}


def test_it_says_from_how_many_rows_on_a_weight_is_folded():
    """The readers of one tensor together; blocks too narrow for the kernels never."""
    found = explained(Attention(32), OFT(block_size=16), rows(torch.float32, 32))
    rule = {site.fqn: site.fold_from for site in found.sites}
    one, three = (fold_from(outs, 16, torch.float32, CPU) for outs in ((32,), (32,) * 3))
    assert rule == {"q": three, "k": three, "v": three, "out": one}
    assert one is None or f"rotate, {one} rows fold" in str(found)
    assert {site.fold_from for site in explained(Attention()).sites} == {None}
    other = OFT(block_size=16, overrides={"k": {"share_blocks": True}})
    found = explained(Attention(32), other, rows(torch.float32, 32))
    beside = {site.fqn: site.fold_from for site in found.sites}
    assert beside == {"q": None, "k": None, "v": None, "out": one}  # its readers turn x together


def test_norms_and_errors_are_those_of_its_health():
    model = oftfx.adapt(Attention(), SPEC, example_inputs=rows(torch.float32))
    health, found = oftfx.health(model), oftfx.explain(model)
    assert tuple(site.fqn for site in found.sites) == health.fqns
    assert [site.norm for site in found.sites] == health.norm.tolist()
    errors = [site.orthogonality_error for site in found.sites]
    assert errors == health.orthogonality_error.tolist()


def test_every_kind_of_model_is_explained_alike():
    x = rows(torch.float32)
    program = torch.export.export(small("mlp", torch.float32), (x,))
    graph = torch.fx.symbolic_trace(small("mlp", torch.float32))
    module = small("mlp", torch.float32)
    found = [explained(model) for model in (program, graph, module)]
    rows_of = [[(s.fqn, s.norm, s.num_trainable, s.bytes) for s in f.sites] for f in found]
    assert rows_of[0] == rows_of[1] == rows_of[2]


def test_the_table_shows_equal_layers_once_and_the_worst_of_them():
    found = explained(llama(), SPEC, tokens())
    text = str(found)
    queries = [site for site in found.sites if site.fqn.endswith("q_proj")]
    assert "model.layers.{0…1}.self_attn.q_proj" in text
    assert f"{max(site.norm for site in queries):.4f}" in text
    assert f"{min(site.norm for site in queries):.4f}" not in text
    assert f"{len(found.sites)} sites" in text


def test_json_holds_all_of_it():
    model = oftfx.adapt(Attention(), SPEC, example_inputs=rows(torch.float32))
    oftfx.adapt(model, HRA(rank=2), "second", example_inputs=rows(torch.float32))
    data = json.loads(oftfx.explain(model).to_json())
    assert {site["adapter"] for site in data["sites"]} == {"default", "second"}
    assert "HRA 2" in str(oftfx.explain(model))
    only = oftfx.explain(model, "second")
    assert {site.method for site in only.sites} == {"HRA 2"}


def test_json_has_null_for_what_is_no_number():
    model = oftfx.adapt(Attention(), SPEC, example_inputs=rows(torch.float32))
    with torch.no_grad():
        oftfx.parameters(model)[0].fill_(math.nan)
    data = json.loads(oftfx.explain(model).to_json(), parse_constant=pytest.fail)
    assert data["sites"][0]["norm"] is None


@pytest.mark.usefixtures("fresh_compiler")
def test_a_compiled_model_shows_what_the_passes_did():
    x = rows(torch.float32)
    model = oftfx.adapt(Attention(), SPEC, example_inputs=x)
    assert oftfx.explain(model).compiled == 0
    with torch.no_grad():
        oftfx.compile(model)(x)
    found = oftfx.explain(model)
    assert found.compiled == 1
    assert found.counts["rotations"] == 4
    assert found.counts["group"] == 2
    assert "1 part compiled; so far, 1 graph, 4 rotations, 4 cores" in str(found)
    assert "group 2" in str(found)


def test_what_is_not_adapted_is_not_explained():
    with pytest.raises(PlanError, match="no adapter"):
        oftfx.explain(Attention())
    model = oftfx.adapt(Attention(), SPEC, example_inputs=rows(torch.float32))
    with pytest.raises(PlanError, match="second"):
        oftfx.explain(model, "second")


def test_the_mean_angle_is_that_of_random_inputs():
    model = oftfx.adapt(small("mlp", torch.float32), SPEC, example_inputs=rows(torch.float32))
    (site, _), x = oftfx.explain(model).sites, torch.randn(4096, 8)
    y = model[0].oft.default(x)
    angles = torch.arccos(torch.cosine_similarity(x, y, dim=-1).clamp(-1, 1))
    assert site.mean_angle == pytest.approx(angles.mean().item(), rel=0.2)
    assert 0 < site.mean_angle < site.angle


def test_nothing_has_turned_at_the_start():
    found = explained(Attention(), OFT(block_size=4))
    assert {(site.mean_angle, site.angle, site.diverged) for site in found.sites} == {(0, 0, False)}
