"""Adapting a module in place: what changes, what must not, and what is refused."""

import copy
import dataclasses
import io
import pickle
import re

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import oftfx
from oftfx import OFT, PlanError, testing
from oftfx.modules import Adapted, rotations
from tests.small import SMALL, Attention, Conv, Functional, llama, rows, small, tokens

SPEC = OFT(block_size=4)
TURNED = OFT(block_size=4, init_std=0.2)


def photograph(model: nn.Module) -> dict:
    """Everything about a module that adapting might disturb."""
    return {
        "classes": {name: type(module) for name, module in model.named_modules()},
        "attributes": {name: set(vars(module)) for name, module in model.named_modules()},
        "names": list(model.state_dict()),
        "objects": {n: id(p) for n, p in model.named_parameters(remove_duplicate=False)},
        "values": {name: value.numpy().tobytes() for name, value in model.state_dict().items()},
        "flags": {name: p.requires_grad for name, p in model.named_parameters()},
    }


# what adapting does


@pytest.mark.parametrize("name", SMALL)
def test_adapting_keeps_the_object_its_names_and_its_values(name):
    base = small(name)
    before = photograph(base)
    model = oftfx.adapt(base, SPEC, example_inputs=rows())
    assert model is base
    state = {key: value for key, value in model.state_dict().items() if ".oft." not in f".{key}"}
    assert list(state) == before["names"]
    assert {key: value.numpy().tobytes() for key, value in state.items()} == before["values"]
    for key, parameter in model.named_parameters(remove_duplicate=False):
        ours = ".oft." in f".{key}"
        assert ours or id(parameter) == before["objects"][key]
        assert parameter.requires_grad == ours
    for key, cls in before["classes"].items():
        assert isinstance(model.get_submodule(key), cls)


def test_one_class_for_each_base_class():
    model = oftfx.adapt(Attention(), SPEC, example_inputs=rows(torch.float32))
    assert type(model.q) is type(model.k) is type(model.out)
    assert type(model.q) is not nn.Linear
    assert isinstance(model.q, nn.Linear)
    assert type(model.q).__name__ == "OFT[Linear]"
    other = oftfx.adapt(nn.Sequential(nn.Linear(8, 8)), SPEC, example_inputs=rows(torch.float32))
    assert type(other[0]) is type(model.q)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", SMALL)
def test_at_the_start_not_one_bit_changes(name, dtype):
    testing.assert_identity_at_init(small(name, dtype), SPEC, rows(dtype))


@pytest.mark.parametrize(
    "fields", [{"exact": True}, {"order": 1}, {"guard": "rescale"}, {"guard": "exact"}]
)
def test_at_the_start_not_one_bit_changes_whatever_the_method(fields):
    testing.assert_identity_at_init(small("attention"), OFT(block_size=4, **fields), rows())


@pytest.mark.parametrize("name", SMALL)
def test_at_the_start_not_one_bit_changes_under_autocast(name):
    x = rows(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        testing.assert_identity_at_init(small(name, torch.float32), SPEC, x)


def test_a_model_that_is_one_layer(tmp_path):
    model = oftfx.adapt(nn.Linear(8, 5), TURNED, example_inputs=rows(torch.float32))
    testing.assert_folds(model, rows(torch.float32))
    oftfx.save(model, tmp_path)
    assert [fqn for fqn, _ in rotations(model)] == ["weight"]
    assert type(oftfx.remove(model)) is nn.Linear


def test_attention_of_torch_itself_is_skipped_with_a_reason():
    class SelfAttention(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
            self.fc = nn.Linear(8, 8)

        def forward(self, x):
            return self.fc(self.attention(x, x, x, need_weights=False)[0])

    torch.manual_seed(0)
    model, x = SelfAttention().eval(), rows(torch.float32)
    plan = oftfx.plan(model, SPEC, x)
    assert [site.fqn for site in plan.sites] == ["fc"]
    reasons = {skip.name: skip.reason for skip in plan.skipped}
    for name in ("attention.in_proj_weight", "attention.out_proj"):
        assert "multi_head_attention_forward" in reasons[name]
    testing.assert_identity_at_init(model, SPEC, x)


def test_gpt2_whose_layers_are_conv1d():
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(vocab_size=96, n_embd=32, n_layer=2, n_head=4, n_positions=32)
    model = GPT2LMHeadModel(config).eval()
    testing.assert_identity_at_init(model, OFT(block_size=8), tokens())
    oftfx.adapt(model, OFT(block_size=8, init_std=0.1))
    assert len(list(rotations(model))) == 8
    testing.assert_folds(model, tokens())


# starts


def test_starts_depend_on_the_seed_and_the_site_alone():
    def start(spec, *more, model=None):
        model = oftfx.adapt(model or small("attention"), spec, *more, example_inputs=rows())
        return {fqn: rotation.theta.detach() for fqn, rotation in rotations(model)}

    whole = start(TURNED)
    assert len({values.numpy().tobytes() for values in whole.values()}) == 4
    assert torch.equal(start(dataclasses.replace(TURNED, targets="k"))["k"], whole["k"])
    assert torch.equal(start(dataclasses.replace(TURNED, targets=["v", "k"]))["v"], whole["v"])
    torch.manual_seed(99)
    assert torch.equal(start(TURNED, "another")["q"], whole["q"])
    assert not torch.equal(start(dataclasses.replace(TURNED, seed=1))["q"], whole["q"])
    halved = start(dataclasses.replace(TURNED, dtype=torch.bfloat16))["q"]
    assert torch.equal(halved, whole["q"].bfloat16())
    assert 0.1 < torch.cat([values.flatten() for values in whole.values()]).std() < 0.3


def test_adapting_leaves_the_random_state_alone():
    torch.manual_seed(5)
    expected = torch.rand(1)
    model = small("attention")
    torch.manual_seed(5)
    oftfx.adapt(model, TURNED, example_inputs=rows())
    assert torch.equal(torch.rand(1), expected)


# rules


@pytest.mark.parametrize(
    ("rules", "expected"),
    [
        ({"targets": "q"}, {"q"}),
        ({"targets": ["q", "out"]}, {"q", "out"}),
        ({"targets": r"[qk]"}, {"q", "k"}),
        ({"targets": re.compile("(q|v)")}, {"q", "v"}),
        ({"targets": lambda site: site.fqn > "o"}, {"q", "v", "out"}),
        ({"exclude": "out"}, {"q", "k", "v"}),
        ({"targets": ["q", "k"], "exclude": re.compile("q")}, {"k"}),
    ],
)
def test_targets_and_exclude(rules, expected):
    model = oftfx.adapt(small("attention"), OFT(block_size=4, **rules), example_inputs=rows())
    assert {fqn for fqn, _ in rotations(model)} == expected
    assert {n for n, m in model.named_modules() if isinstance(m, Adapted)} == expected


def test_overrides_and_dtype():
    spec = OFT(
        block_size=4,
        dtype=torch.bfloat16,
        overrides={"q": {"block_size": 8, "dtype": torch.float64}, "[qv]": {"order": 2}},
    )
    model = oftfx.adapt(small("attention"), spec, example_inputs=rows())
    held = dict(rotations(model))
    assert held["q"].theta.shape == (1, 28)
    assert held["k"].theta.shape == (2, 6)
    assert {fqn: r.theta.dtype for fqn, r in held.items()} == {
        "q": torch.float64,
        "k": torch.bfloat16,
        "v": torch.bfloat16,
        "out": torch.bfloat16,
    }
    assert {fqn: r.spec.order for fqn, r in held.items()} == {"q": 2, "v": 2, "k": 4, "out": 4}


def test_shared_inputs_share_one_parameter():
    spec = OFT(block_size=8, share_inputs=True, init_std=0.1)
    model = oftfx.adapt(llama(), spec)
    layer = model.model.layers[0]
    assert len(oftfx.parameters(model)) == 2 * 4  # q/k/v, o, gate/up, down
    assert "model.layers.0.self_attn.k_proj.oft.default.theta" not in model.state_dict()
    assert layer.self_attn.k_proj.oft.default.rotation is layer.self_attn.q_proj.oft.default
    assert layer.mlp.up_proj.oft.default.rotation is layer.mlp.gate_proj.oft.default
    assert layer.self_attn.o_proj.oft.default is not layer.self_attn.q_proj.oft.default


@pytest.mark.parametrize("name", ["attention", "functional"])
def test_a_plan_in_place_of_a_spec(name):
    plan = oftfx.plan(small(name), TURNED, rows())
    again = oftfx.Plan.from_json(plan.to_json())
    a = oftfx.adapt(small(name), TURNED, example_inputs=rows())
    b = oftfx.adapt(small(name), again)
    testing.assert_same_function(a, b, rows(), within=0)


def test_from_the_module_tree():
    a = oftfx.adapt(small("attention"), TURNED, capture="modules")
    b = oftfx.adapt(small("attention"), TURNED, example_inputs=rows())
    testing.assert_same_function(a, b, rows())


# several adapters


def test_adapters_compose_in_the_order_they_came():
    x = rows()
    base = small("mlp")
    model = oftfx.adapt(copy.deepcopy(base), TURNED, "first", example_inputs=x)
    oftfx.adapt(model, OFT(block_size=8, init_std=0.2, seed=1), "second", example_inputs=x)
    layer = model[0]
    by_hand = layer.oft.second(layer.oft.first(x)) @ base[0].weight.T + base[0].bias
    testing.assert_close(layer(x).detach(), by_hand.detach(), "x·R1·R2·Wᵀ")


def test_parameters_of_one_adapter():
    model = oftfx.adapt(small("attention"), SPEC, "a", example_inputs=rows())
    oftfx.adapt(model, OFT(block_size=4, targets="q"), "b", example_inputs=rows())
    assert len(oftfx.parameters(model)) == 5
    assert oftfx.parameters(model, "b") == [model.q.oft.b.theta]
    with pytest.raises(PlanError, match="no adapter 'c'"):
        oftfx.parameters(model, "c")


@pytest.mark.parametrize("order", [("a", "b"), ("b", "a"), (None,)])
@pytest.mark.parametrize("name", SMALL)
def test_removing_gives_the_base_back(name, order):
    base = small(name)
    next(base.parameters()).requires_grad_(False)
    before = photograph(base)
    expected = testing.run(base, rows())[0]
    model = oftfx.adapt(base, TURNED, "a", example_inputs=rows())
    with_a = testing.run(model, rows())[0]
    oftfx.adapt(model, OFT(block_size=2, init_std=0.3), "b", example_inputs=rows())
    for i, adapter in enumerate(order):
        assert oftfx.remove(model, adapter) is model
        if adapter == "b" and i == 0:
            assert torch.equal(testing.run(model, rows())[0], with_a)
    assert photograph(model) == before
    assert torch.equal(testing.run(model, rows())[0], expected)


def test_removing_what_is_not_there():
    model = small("mlp")
    with pytest.raises(PlanError, match="has no adapter"):
        oftfx.remove(model)
    oftfx.adapt(model, SPEC, example_inputs=rows())
    with pytest.raises(PlanError, match=r"no adapter 'x'; it has \['default'\]"):
        oftfx.remove(model, "x")


@pytest.mark.parametrize("name", SMALL)
def test_disabled_is_the_base_and_only_for_a_while(name):
    expected = testing.run(small(name), rows())[0]
    model = oftfx.adapt(small(name), TURNED, "a", example_inputs=rows())
    one = testing.run(model, rows())[0]
    oftfx.adapt(model, OFT(block_size=2, init_std=0.3), "b", example_inputs=rows())
    both = testing.run(model, rows())[0]
    with oftfx.disabled(model):
        assert torch.equal(testing.run(model, rows())[0], expected)
        with oftfx.disabled(model, "a"):
            assert torch.equal(testing.run(model, rows())[0], expected)
        assert torch.equal(testing.run(model, rows())[0], expected)
    with oftfx.disabled(model, "b"):
        assert torch.equal(testing.run(model, rows())[0], one)
    with pytest.raises(ZeroDivisionError), oftfx.disabled(model):
        1 / 0  # noqa: B018
    assert torch.equal(testing.run(model, rows())[0], both)


def test_gradient_flags_of_tied_weights_come_back():
    model = oftfx.adapt(llama(), OFT(block_size=8))
    oftfx.remove(model)
    assert all(parameter.requires_grad for parameter in model.parameters())


# copies


@pytest.mark.parametrize("name", SMALL)
def test_pickle_deepcopy_and_torch_save_of_a_whole_model(name):
    model = oftfx.adapt(small(name), TURNED, example_inputs=rows())
    testing.run(model, rows())  # leaves its caches behind
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    for twin in (
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),
        torch.load(buffer, weights_only=False),
    ):
        testing.assert_same_function(twin, model, rows(), within=0)
        assert [type(m) for m in twin.modules()] == [type(m) for m in model.modules()]
        testing.randomize(twin, 3)
        assert not torch.equal(testing.run(twin, rows())[0], testing.run(model, rows())[0])
        oftfx.remove(twin)
        testing.assert_same_function(twin, small(name), rows(), within=0, grad=False)


# refusals, each of which leaves the model as it was


class Named(nn.Module):
    def __init__(self):
        super().__init__()
        self.keys = nn.Parameter(torch.randn(8, 8).double())
        self.fc = nn.Linear(8, 8).double()

    def forward(self, x):
        return F.linear(self.fc(x), self.keys)


class Own(nn.Linear):
    oft = "mine"


def refused(model, message, spec=SPEC, name="default", **options):
    before = photograph(model)
    with pytest.raises(PlanError, match=message):
        oftfx.adapt(model, spec, name, **{"example_inputs": rows(), **options})
    assert photograph(model) == before


def test_the_same_name_twice_is_refused():
    model = oftfx.adapt(small("attention"), TURNED, example_inputs=rows())
    refused(model, "adapter 'default' already")
    whole = nn.Sequential(model, nn.Linear(8, 8).double())
    refused(whole, "part of the model has an adapter 'default' already")
    oftfx.adapt(whole, SPEC, "outer", example_inputs=rows())
    assert whole[0].q.oft.keys() == {"default", "outer"}


@pytest.mark.parametrize(
    "name", ["", "a.b", "1a", "a b", "keys", "forward", "training", "_modules"]
)
def test_a_name_that_is_no_plain_identifier_is_refused(name):
    refused(small("mlp"), "plain identifier", name=name)


@pytest.mark.parametrize(
    "spec", [OFT(block_size=3), OFT(targets="nothing"), OFT(block_size=4, exclude=r".*")]
)
def test_a_spec_that_does_not_fit_is_refused(spec):
    refused(small("attention"), "", spec)


def test_a_plan_of_another_model_is_refused():
    refused(
        small("mlp"), "not a parameter of this model", oftfx.plan(small("attention"), SPEC, rows())
    )
    wider = oftfx.plan(Attention(16), SPEC, rows(torch.float32, 16))
    refused(small("attention"), "made for another model", wider)


def test_an_attribute_called_oft_is_refused():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)).double()
    model[1].oft = torch.zeros(1)
    refused(model, "'oft' of its own")


def test_a_parameter_that_no_module_dict_can_hold_is_refused():
    refused(Named(), "'keys'")
    oftfx.adapt(Named(), OFT(block_size=4, exclude="keys"), example_inputs=rows())


def test_a_forward_on_the_instance_is_refused():
    model = small("mlp")
    model[2].forward = lambda x: x * 2
    refused(model, "forward of its own", capture="modules")
    oftfx.adapt(model, OFT(block_size=4, exclude="2"), capture="modules")


# accelerate


def hooked_models():
    from accelerate import cpu_offload
    from accelerate.hooks import ModelHook, add_hook_to_module

    def each(model):
        for module in model.modules():
            add_hook_to_module(module, ModelHook())

    def offload(model):
        cpu_offload(model, torch.device("cpu"))

    return {"hooks": each, "cpu_offload": offload}


@pytest.mark.parametrize("how", ["hooks", "cpu_offload"])
@pytest.mark.parametrize("name", ["attention", "mlp", "functional"])
def test_a_model_with_accelerates_hooks_rotates_too(how, name):
    expected = oftfx.adapt(small(name), TURNED, example_inputs=rows())
    model = small(name)
    hooked_models()[how](model)
    oftfx.adapt(model, TURNED, example_inputs=rows())
    with torch.no_grad():
        assert torch.equal(model(rows()), expected(rows()))
    assert not any(theta.is_meta for theta in oftfx.parameters(model))
    oftfx.remove(model)
    with torch.no_grad():
        assert torch.equal(model(rows()), small(name)(rows()))


def test_a_dispatched_language_model_rotates_and_generates():
    from accelerate import dispatch_model

    spec = OFT(block_size=8, init_std=0.1)
    expected = oftfx.adapt(llama(), spec)
    model = llama()
    places = {"model": "cpu", "lm_head": "cpu"}
    model = dispatch_model(model, places, main_device="cpu", force_hooks=True)
    oftfx.adapt(model, spec)
    testing.assert_same_function(model, expected, tokens())
    with torch.no_grad():
        merged = oftfx.merge(model)(**tokens()).logits
        testing.assert_close(merged, expected(**tokens()).logits, "merged")


def test_hooks_may_come_and_go_in_any_order():
    from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module

    def hook(model):
        for module in model.modules():
            add_hook_to_module(module, ModelHook())

    def unhook(model):
        remove_hook_from_module(model, recurse=True)

    def adapt(model):
        oftfx.adapt(model, TURNED, example_inputs=rows())

    for steps in (
        (hook, unhook, adapt, oftfx.remove),
        (hook, adapt, unhook, oftfx.remove),
        (hook, adapt, oftfx.remove, unhook),
        (adapt, hook, unhook, oftfx.remove),
        (adapt, hook, oftfx.remove, unhook),
    ):
        model = small("attention")
        base = model(rows())
        turned = oftfx.adapt(small("attention"), TURNED, example_inputs=rows())(rows())
        for i, step in enumerate(steps):
            step(model)
            is_adapted = adapt in steps[: i + 1] and oftfx.remove not in steps[: i + 1]
            assert torch.equal(model(rows()), turned if is_adapted else base), (steps, step)


def test_the_models_used_here_have_what_they_test():
    assert {type(m).__name__ for m in Conv().modules()} == {"Conv", "Conv1D"}
    kinds = oftfx.plan(Functional(), SPEC, rows(torch.float32)).sites
    assert [site.kind for site in kinds] == ["functional"] * 3


@pytest.mark.parametrize(
    "spec",
    [
        OFT(block_size=4, init_std=0.1),
        oftfx.HRA(rank=2),
        oftfx.LOFT(rank=2, support="random"),
        oftfx.LOFT(rank=2, support="coordinate"),
        oftfx.PSOFT(rank=2),
    ],
    ids=lambda spec: f"{type(spec).__name__} {getattr(spec, 'support', '')}",
)
def test_the_default_device_does_not_matter(spec):
    """Models are made within `torch.device("cuda")`, and adapted there."""
    plain, inside = nn.Sequential(nn.Linear(8, 8)), nn.Sequential(nn.Linear(8, 8))
    inside.load_state_dict(plain.state_dict())
    oftfx.adapt(plain, spec, capture="modules")
    with torch.device("meta"):  # wherever there is no GPU
        oftfx.adapt(inside, spec, capture="modules")
    pairs = zip(plain.state_dict().items(), inside.state_dict().items(), strict=True)
    for (name, value), (other, beside) in pairs:
        assert name == other
        assert torch.equal(value, beside), name
