"""Cores built together are those that each layer would build, wherever a layer is called."""

import contextlib
import copy

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import oftfx
from oftfx import LOFT, OFT, PSOFT, bank, ops, testing
from oftfx.modules import rotations
from tests.small import llama, rows, small, tokens
from tests.test_modules import Count, ran

SPEC = OFT(block_size=4, init_std=0.2)


@pytest.fixture
def model():
    return oftfx.adapt(llama(torch.float64), SPEC)


def alone(model):
    """The same model, whose layers build their own cores."""
    twin = copy.deepcopy(model)
    vars(twin)["_oftfx_bank"].remove()
    return twin


@pytest.mark.parametrize(
    "spec",
    [
        SPEC,
        OFT(block_size=4, init_std=0.2, share_inputs=True),
        OFT(block_size=4, init_std=0.5, guard="rescale"),
        OFT(block_size=4, init_std=0.5, guard="exact"),
        OFT(block_size=4, init_std=0.2, overrides={"q_proj": {"block_size": 8, "order": 3}}),
        OFT(block_size=4, init_std=0.2, overrides={"up_proj": {"dtype": torch.bfloat16}}),
        PSOFT(rank=4, init_std=0.2),
        LOFT(rank=4, init_std=0.2, support="random", core="free"),
    ],
    ids=lambda spec: str(spec.to_json()),
)
def test_gives_what_each_layer_would_build(spec):
    model = oftfx.adapt(llama(torch.float64), spec)
    testing.assert_same_function(model, alone(model), tokens())


def test_builds_one_core_for_every_width(model):
    assert ran(model, tokens()["input_ids"]) == (2, 14)  # of 14 layers, two read 96 features
    assert ran(alone(model), tokens()["input_ids"]) == (14, 14)


def test_builds_one_core_for_every_rank():
    model = oftfx.adapt(llama(torch.float64), PSOFT(rank=4, init_std=0.2))
    ids = tokens()["input_ids"]
    assert ran(model, ids)[0] == 1  # the widths of the supports do not matter
    assert ran(alone(model), ids)[0] == 14


def test_without_a_gradient_many_are_built_at_once(model):
    found = dict(rotations(model))
    with torch.no_grad(), Count() as count:
        bank.build(found.values())
        assert count.cayley == 2
        kept = {fqn: rotation.cores() for fqn, rotation in found.items()}
        assert count.cayley == 2
        oftfx.scale(model, 0.5)
        halves = {fqn: rotation.cores() for fqn, rotation in found.items()}
        assert count.cayley == 2 + len(found)  # those that were kept are of another angle
    for fqn, rotation in found.items():
        own = ops.cayley(rotation.theta.detach(), 4, SPEC.order)
        assert torch.equal(kept[fqn][0], own)
        assert not torch.equal(halves[fqn][0], own)


def test_no_more_are_built_at_once_than_is_said(model, monkeypatch):
    found = dict(rotations(model)).values()
    monkeypatch.setattr(bank, "AT_ONCE", 2 * 64 * 4)  # two rotations of 64 features, one of 96
    with torch.no_grad(), Count() as count:
        bank.build(found)
    assert count.cayley == 12 // 2 + 2
    with torch.no_grad(), Count() as count:
        assert [rotation.cores() for rotation in found]
    assert count.cayley == 0


def test_a_layer_called_by_itself_builds_its_own(model):
    layer = model.model.layers[0].mlp
    x = torch.randn(3, 64, dtype=torch.float64)
    for _ in range(2):  # also after a forward of the model, whose graph is gone
        assert ran(layer, x) == (3, 3)
        layer(x).sum().backward()
        model(**tokens()).logits.sum().backward()


@pytest.mark.parametrize("reentrant", [False, True])
def test_regions_that_run_again(reentrant):
    model = oftfx.adapt(small("attention"), SPEC, example_inputs=rows())

    class Twice(torch.nn.Module):
        """A region that is recomputed, between two calls of the model that are not."""

        def __init__(self):
            super().__init__()
            self.inner = model

        def forward(self, x):
            x = self.inner(x)
            return self.inner(checkpoint(self.inner, x, use_reentrant=reentrant))

    outer = oftfx.adapt(Twice(), SPEC, "outer", rows())
    plain = copy.deepcopy(outer)
    plain.forward = lambda x: plain.inner(plain.inner(plain.inner(x)))
    testing.assert_same_function(outer, plain, rows())


def test_every_checkpointed_layer_in_either_way(model):
    for reentrant in (False, True):
        twin = copy.deepcopy(model).train()
        kwargs = {"use_reentrant": reentrant}
        twin.gradient_checkpointing_enable(gradient_checkpointing_kwargs=kwargs)
        twin.enable_input_require_grads()
        testing.assert_same_function(twin, model, tokens())
        testing.assert_same_function(twin, model, tokens())


@pytest.mark.parametrize("between", ["no_grad", "inference_mode", "disabled", "generate"])
def test_other_forwards_may_run_before_a_checkpointed_one_goes_back(model, between):
    given = tokens()
    expected = torch.autograd.grad(model(**given).logits.sin().sum(), oftfx.parameters(model))
    model.train()
    kwargs = {"use_reentrant": False}
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=kwargs)
    model.enable_input_require_grads()
    loss = model(**given).logits.sin().sum()
    modes = {"no_grad": torch.no_grad, "inference_mode": torch.inference_mode}
    with modes.get(between, contextlib.nullcontext)():
        if between == "disabled":
            with oftfx.disabled(model):
                model(**given)
        elif between == "generate":
            model.generate(given["input_ids"], max_new_tokens=2)
        else:
            model(**given)
    found = torch.autograd.grad(loss, oftfx.parameters(model))
    for ours, theirs in zip(found, expected, strict=True):
        testing.assert_close(ours, theirs, "gradient")


def test_two_forwards_before_one_backward(model):
    a, b = tokens(seed=1), tokens(seed=2)
    both = {}
    for twin in (model, alone(model)):
        loss = twin(**a).logits.sin().sum() + twin(**b).logits.cos().sum()
        both[twin] = torch.autograd.grad(loss, oftfx.parameters(twin))
    for ours, theirs in zip(*both.values(), strict=True):
        testing.assert_close(ours, theirs, "gradient")


def test_a_disabled_or_frozen_adapter_builds_nothing(model):
    ids = tokens()["input_ids"].requires_grad_(False)
    with oftfx.disabled(model):
        assert ran(model, ids) == (0, 0)
    for _, rotation in rotations(model):
        rotation.theta.requires_grad_(False)
    ran(model, ids)
    assert ran(model, ids) == (0, 14)


def test_parameters_replaced_for_one_call_are_those_that_count(model):
    values = {name: value.detach() * 2 for name, value in testing.thetas(model).items()}
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for value in oftfx.parameters(twin):
            value.mul_(2)
    called = torch.func.functional_call(model, values, (), tokens()).logits
    testing.assert_close(called.detach(), twin(**tokens()).logits.detach(), "output")


def test_a_change_between_two_layers_is_seen(model):
    def double(module, args):
        with torch.no_grad():
            for _, rotation in rotations(model.model.layers[1]):
                rotation.theta.mul_(2)

    hook = model.model.layers[1].register_forward_pre_hook(double)
    out = model(**tokens()).logits.detach()
    hook.remove()
    testing.assert_close(out, model(**tokens()).logits.detach(), "output")


def test_gives_up_where_no_layer_takes_a_core(model, fresh_compiler):
    for layer in model.model.layers:
        layer.compile(backend="eager")
    ids = tokens()["input_ids"]
    model(ids).logits.sum().backward()
    assert not vars(model)["_oftfx_bank"].useful
    assert ran(model, ids)[0] == 14


def test_leaves_with_the_adapter(model):
    oftfx.adapt(model, SPEC, "second")
    assert len(vars(model)["_oftfx_bank"].rotations) == 28
    assert len(model._forward_pre_hooks) == len(model._forward_hooks) == 1
    oftfx.remove(model)
    assert not model._forward_pre_hooks
    assert not model._forward_hooks
    assert "_oftfx_bank" not in vars(model)
