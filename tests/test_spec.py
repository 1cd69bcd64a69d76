"""Specs: validated when they are made, frozen, hashable, and the same again from JSON."""

import dataclasses
import json
import math
import re

import pytest
import torch

from oftfx import BOFT, COFT, GOFT, HRA, OFT, QGOFT, OftfxError, Spec, SpecError
from oftfx.spec import matches
from oftfx.spec.rules import exactly

# field, value, what the message must hold besides the field's name
INVALID = [
    ("block_size", 1, "≥ 2"),
    ("block_size", 0, "≥ 2"),
    ("block_size", -32, "≥ 2"),
    ("block_size", 32.0, "integer"),
    ("block_size", "32", "integer"),
    ("block_size", True, "integer"),
    ("block_size", None, "integer"),
    ("order", 0, "≥ 1"),
    ("order", -1, "≥ 1"),
    ("order", 2.5, "integer"),
    ("order", False, "integer"),
    ("exact", 1, "bool"),
    ("exact", "yes", "bool"),
    ("guard", "clip", "'rescale' or 'exact'"),
    ("guard", True, "'rescale' or 'exact'"),
    ("share_inputs", 1, "bool"),
    ("dtype", torch.int32, "floating"),
    ("dtype", torch.complex64, "floating"),
    ("dtype", torch.bool, "floating"),
    ("dtype", torch.float8_e4m3fn, "16 bits"),
    ("dtype", "float32", "floating"),
    ("dtype", None, "floating"),
    ("seed", -1, "≥ 0"),
    ("seed", 1.5, "integer"),
    ("seed", True, "integer"),
    ("init_std", -0.1, "≥ 0"),
    ("init_std", math.nan, "finite"),
    ("init_std", math.inf, "finite"),
    ("init_std", "0.1", "number"),
    ("init_std", True, "number"),
    ("targets", (), "empty"),
    ("targets", [], "empty"),
    ("targets", None, "name"),
    ("targets", 3, "name"),
    ("targets", ["q_proj", 3], "3"),
    ("targets", ["q_proj", "("], "regex"),
    ("targets", {"q_proj"}, "sequence"),
    ("exclude", 3, "name"),
    ("exclude", ["("], "regex"),
    ("exclude", [None], "None"),
    ("overrides", [("q_proj", {})], "mapping"),
    ("overrides", {"q_proj": 8}, "mapping"),
    ("overrides", {"(": {"order": 2}}, "regex"),
    ("overrides", {3: {"order": 2}}, "3"),
    ("overrides", {("q_proj", "k_proj"): {"order": 2}}, "q_proj"),
]


@pytest.mark.parametrize(("field", "value", "told"), INVALID)
def test_an_invalid_value_names_its_field_and_the_range(field, value, told):
    with pytest.raises(SpecError) as caught:
        OFT(**{field: value})
    assert field in str(caught.value)
    assert told in str(caught.value)
    assert isinstance(caught.value, (OftfxError, ValueError))


@pytest.mark.parametrize(
    "kwargs",
    [
        {"block_size": 2},
        {"order": 1},
        {"order": 9, "exact": True},
        {"guard": "rescale"},
        {"guard": "exact"},
        {"dtype": torch.bfloat16},
        {"dtype": torch.float64},
        {"seed": 2**40, "init_std": 1},
        {"targets": "q_proj"},
        {"targets": re.compile(r".*attn.*")},
        {"targets": ["q_proj", re.compile("k_proj")], "exclude": "layers.0.*"},
        {"targets": lambda site: True},
        {"overrides": {"q_proj": {}}},
    ],
)
def test_the_edges_of_the_ranges_are_valid(kwargs):
    OFT(**kwargs)


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"block_size": 1}, "block_size"),
        ({"order": 0}, "order"),
        ({"exact": "no"}, "exact"),
        ({"guard": "clip"}, "guard"),
        ({"dtype": torch.int8}, "dtype"),
        ({"init_std": -1.0}, "init_std"),
        ({"targets": "q_proj"}, "targets"),
        ({"share_inputs": True}, "share_inputs"),
        ({"seed": 3}, "seed"),
        ({"overrides": {}}, "overrides"),
        ({"block": 4}, "did you mean 'block_size'"),
        ({"blok_size": 4}, "block_size"),
    ],
)
def test_overrides_are_checked_when_the_spec_is_made(fields, told):
    with pytest.raises(SpecError, match=re.escape(told)):
        OFT(overrides={"q_proj": fields})


def test_unknown_fields_are_refused():
    with pytest.raises(TypeError):
        OFT(blocks=3)
    with pytest.raises(TypeError):
        OFT(32)  # keyword only: nothing hides behind a position


def test_is_frozen_and_does_not_follow_what_it_was_made_from():
    targets, overrides = ["q_proj"], {"q_proj": {"order": 2}}
    spec = OFT(targets=targets, overrides=overrides)
    targets.append("k_proj")
    overrides["q_proj"]["order"] = 0
    overrides["k_proj"] = {}
    assert spec.targets == ("q_proj",)
    assert spec.overrides == {"q_proj": {"order": 2}}
    with pytest.raises(dataclasses.FrozenInstanceError):
        spec.order = 3


def test_equal_specs_hash_alike():
    def make(order: int = 2) -> OFT:
        rules = ["q_proj", re.compile("k")]
        return OFT(targets=rules, exclude=["o"], overrides={"q_proj": {"order": order}})

    assert make() == make()
    assert hash(make()) == hash(make())
    assert make() != make(3)
    assert len({make(), make(), OFT()}) == 2


@pytest.mark.parametrize(
    "spec",
    [
        OFT(),
        OFT(block_size=8, order=3, exact=True, guard="exact", seed=7, init_std=0.5),
        OFT(targets="q_proj", exclude=("a", "b"), share_inputs=True),
        OFT(targets=["q_proj", re.compile(r".*\.k_proj")], exclude=re.compile("layers.0.*")),
        OFT(targets=re.compile("Q_PROJ", re.IGNORECASE)),
        OFT(dtype=torch.bfloat16),
        OFT(overrides={"q_proj": {"dtype": torch.float64, "order": 2}, r".*\.v": {"guard": None}}),
    ],
    ids=str,
)
def test_json_round_trip(spec):
    text = json.dumps(spec.to_json())
    again = Spec.from_json(json.loads(text))
    assert again == spec
    assert hash(again) == hash(spec)
    assert json.dumps(again.to_json()) == text


def test_a_regex_used_as_a_key_of_overrides_is_refused_or_survives_json():
    """Keys are names or regex texts; a compiled one has no place in a JSON object."""
    try:
        spec = OFT(overrides={re.compile("q_.*"): {"order": 2}})
    except SpecError:
        return
    assert Spec.from_json(json.loads(json.dumps(spec.to_json()))) == spec


def test_json_holds_only_what_differs_from_the_defaults():
    assert OFT().to_json() == {"method": "OFT"}
    assert OFT(block_size=8).to_json() == {"method": "OFT", "block_size": 8}


def test_reading_json_leaves_it_alone():
    data = OFT(overrides={"q": {"dtype": torch.float64}}, dtype=torch.bfloat16).to_json()
    before = json.dumps(data)
    Spec.from_json(data)
    assert json.dumps(data) == before


def test_a_callable_cannot_be_written():
    with pytest.raises(SpecError, match="callable"):
        OFT(targets=lambda site: True).to_json()


@pytest.mark.parametrize(
    ("data", "told"),
    [
        ({"method": "ROFT"}, "ROFT"),
        ({"method": []}, "unknown method"),
        ({"method": "OFT", 3: 4}, "no field 3"),
        ({}, "unknown method"),
        ({"method": "OFT", "block_sizes": 4}, "block_size"),
        ({"method": "OFT", "block_size": -4}, "block_size"),
        ({"method": "OFT", "dtype": "float33"}, "dtype"),
        ({"method": "OFT", "dtype": "int8"}, "dtype"),
        ({"method": "OFT", "dtype": "nn"}, "dtype"),
        ({"method": "OFT", "targets": [{"regex": "("}]}, "targets"),
        ({"method": "OFT", "targets": 3}, "targets"),
        ({"method": "OFT", "targets": [{"rex": "a"}]}, "targets"),
        ({"method": "OFT", "overrides": [1]}, "overrides"),
        ({"method": "OFT", "overrides": {"a": 1}}, "overrides"),
    ],
)
def test_damaged_json_is_a_spec_error(data, told):
    with pytest.raises(SpecError, match=told):
        Spec.from_json(data)


def test_a_single_name_in_json_is_one_name():
    """Whoever writes the JSON by hand may leave the brackets out."""
    assert Spec.from_json({"method": "OFT", "targets": "q_proj"}).targets == ("q_proj",)
    assert Spec.from_json({"method": "OFT", "targets": "all-linear"}) == OFT()
    assert Spec.from_json({"method": "OFT", "exclude": "q_proj"}).exclude == ("q_proj",)


@pytest.mark.parametrize(
    ("rule", "fqn", "expected"),
    [
        ("q_proj", "model.layers.0.q_proj", True),
        ("layers.0.q_proj", "model.layers.0.q_proj", True),
        ("model.layers.0.q_proj", "model.layers.0.q_proj", True),
        ("q_proj", "q_proj", True),
        ("q_proj", "model.bq_proj", False),
        ("proj", "model.q_proj", False),
        ("layers.0", "model.layers.0.q_proj", False),
        (r".*\.[qk]_proj", "model.k_proj", True),
        (r"[qk]_proj", "model.k_proj", False),
        (r"model\.layers\.[0-3]\..*", "model.layers.2.q_proj", True),
        (r"model\.layers\.[0-3]\..*", "model.layers.12.q_proj", False),
        (re.compile("q_proj"), "model.q_proj", False),
        (re.compile(".*q_proj"), "model.q_proj", True),
        (re.compile(".*Q_PROJ", re.IGNORECASE), "model.q_proj", True),
        ("", "model", False),
    ],
)
def test_matches(rule, fqn, expected):
    assert matches(rule, fqn) is expected


def test_the_rule_for_one_name_matches_no_other():
    assert matches(exactly("a.fc"), "a.fc")
    assert matches(exactly("fc"), "fc")
    assert not matches(exactly("fc"), "a.fc")
    assert not matches(exactly("a.fc"), "axfc")


def test_overrides_apply_in_order_and_to_their_layers_alone():
    spec = OFT(
        block_size=8,
        overrides={r".*\.q": {"order": 2, "block_size": 4}, r"a\..*": {"order": 6}},
    )
    assert spec.at("a.q").order == 6
    assert spec.at("a.q").block_size == 4
    assert spec.at("b.q").order == 2
    assert spec.at("b.k") is spec


def test_fields_that_may_differ_per_layer():
    own = {"block_size", "order", "exact", "guard", "share_blocks", "dropout"}
    own |= {"magnitude", "unit_rate", "doubled"}
    assert OFT.method_fields() == own | {"dtype", "init_std"}


METHOD_INVALID = [
    (OFT, "share_blocks", 1, "bool"),
    (OFT, "magnitude", 1, "bool"),
    (OFT, "unit_rate", 1, "bool"),
    (OFT, "doubled", 1, "bool"),
    (OFT, "dropout", 1.0, "< 1"),
    (OFT, "dropout", -0.1, "≥ 0"),
    (OFT, "dropout", True, "number"),
    (COFT, "eps", -1.0, "≥ 0"),
    (COFT, "eps", math.inf, "finite"),
    (COFT, "order", 0, "≥ 1"),
    (BOFT, "factors", 0, "≥ 1"),
    (BOFT, "factors", 2.0, "integer"),
    (BOFT, "block_size", 5, "even"),
    (GOFT, "scale", 1, "bool"),
    (QGOFT, "weight", -0.1, "≥ 0"),
    (QGOFT, "weight", "0.1", "number"),
    (HRA, "rank", 3, "even"),
    (HRA, "rank", 0, "≥ 2"),
    (HRA, "weight", math.nan, "finite"),
]


@pytest.mark.parametrize(("method", "field", "value", "why"), METHOD_INVALID)
def test_a_methods_field_out_of_range_is_an_error(method, field, value, why):
    with pytest.raises(SpecError, match=field) as caught:
        method(**{field: value})
    assert why in str(caught.value)


@pytest.mark.parametrize(
    "spec",
    [
        COFT(eps=0.3, dropout=0.1),
        BOFT(factors=3, block_size=8, share_blocks=True),
        GOFT(scale=True),
        QGOFT(weight=0.2),
        HRA(rank=6, weight=0.1, overrides={"q": {"rank": 2}}),
    ],
)
def test_every_method_survives_json(spec):
    assert Spec.from_json(json.loads(json.dumps(spec.to_json()))) == spec


def test_one_factor_may_have_odd_blocks():
    assert BOFT(factors=1, block_size=5).block_size == 5


def test_what_is_no_rule_no_field_and_no_method_is_said_to_be_none():
    with pytest.raises(SpecError, match=r"targets holds .*: every rule must be a name or a regex"):
        OFT(targets=re.compile(b"q"))
    with pytest.raises(SpecError, match="sets 5, which is not a field of OFT"):
        OFT(overrides={"q": {5: 4}})
    with pytest.raises(SpecError, match=r"Spec is of no method: use one of \['BOFT', "):
        Spec()
    with pytest.raises(SpecError, match="None is no spec: it must be a mapping"):
        Spec.from_json(None)
