"""What an adapted layer does with its rotation: when it is built, kept, shared and let go."""

import gc
import weakref

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import oftfx
from oftfx import OFT, testing
from oftfx.modules import Adapted, folding, rotating, rotations
from tests.small import Attention, Functional, TwiceUsed, rows, small

OPS = torch.ops.oftfx
SPEC = OFT(block_size=4, init_std=0.2)
SHARED = OFT(block_size=4, init_std=0.2, share_inputs=True)


class Count(TorchDispatchMode):
    """How often each of oftfx's ops runs."""

    def __init__(self) -> None:
        super().__init__()
        self.cayley = self.rotate = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.cayley += func in (OPS.cayley.default, OPS.cayley_each.default)
        self.rotate += func is OPS.rotate.default
        self.rotate += len(args[1]) if func is OPS.rotate_group.default else 0
        return func(*args, **(kwargs or {}))


def ran(model, *inputs, times=1) -> tuple[int, int]:
    """How many cores were built and how many tensors rotated."""
    with Count() as count:
        for _ in range(times):
            model(*(inputs or (rows(),)))
    return count.cayley, count.rotate


@pytest.fixture
def attention():
    return oftfx.adapt(small("attention"), SPEC, example_inputs=rows())


# cores


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients_a_core_is_built_once(attention, mode):
    with mode():
        assert ran(attention, times=3) == (4, 12)
        assert ran(attention, times=3) == (0, 12)


def test_with_gradients_all_cores_are_built_at_once_in_every_forward(attention):
    assert ran(attention) == (1, 4)
    assert ran(attention, times=3) == (3, 12)


def test_a_frozen_adapter_keeps_its_cores_though_gradients_are_on(attention):
    for theta in oftfx.parameters(attention):
        theta.requires_grad_(False)
    assert ran(attention, rows().requires_grad_(), times=3) == (4, 12)


def optimizer_step(model):
    optimizer = torch.optim.AdamW(oftfx.parameters(model), lr=0.1)
    for theta in oftfx.parameters(model):
        theta.grad = torch.ones_like(theta)
    optimizer.step()


def fused_step(model):
    """PyTorch's fused steps leave no trace in a parameter's version."""
    optimizer = torch.optim.AdamW(oftfx.parameters(model), lr=0.1, fused=True)
    for theta in oftfx.parameters(model):
        theta.grad = torch.ones_like(theta)
    optimizer.step()


def swap(model):
    """As averaged weights often are, without a trace, before they are evaluated."""
    for theta in oftfx.parameters(model):
        theta.data.mul_(2)
    model.eval()


def load(model):
    twin = oftfx.adapt(small("attention"), OFT(block_size=4, init_std=0.3), example_inputs=rows())
    model.load_state_dict(twin.state_dict())


def assign(model):
    twin = oftfx.adapt(small("attention"), OFT(block_size=4, init_std=0.3), example_inputs=rows())
    model.load_state_dict(twin.state_dict(), assign=True)


def replace_data(model):
    for theta in oftfx.parameters(model):
        theta.data = theta.data * 2


def replace_parameter(model):
    for _, rotation in rotations(model):
        rotation.theta = nn.Parameter(rotation.theta.detach() * 2)


def cast(model):
    for _, rotation in rotations(model):
        rotation.half()


def write_data_before_a_training_forward(model):
    for theta in oftfx.parameters(model):
        theta.data.mul_(2)
    model(rows()).sum().backward()


@pytest.mark.parametrize("share", [False, True], ids=["each", "shared"])
@pytest.mark.parametrize(
    "change",
    [
        optimizer_step,
        fused_step,
        swap,
        load,
        assign,
        replace_data,
        replace_parameter,
        cast,
        testing.randomize,
        write_data_before_a_training_forward,
    ],
)
def test_a_kept_core_never_outlives_its_parameters(change, share):
    if share and change in (load, assign):
        pytest.skip("their twin is not shared")
    model = oftfx.adapt(small("attention"), SHARED if share else SPEC, example_inputs=rows())
    with torch.no_grad():
        before = model(rows())
    change(model)
    with torch.no_grad():
        after = model(rows())
    assert not torch.equal(after, before)
    assert torch.equal(after, fresh(model)(rows()))


def fresh(model):
    """The same model without anything kept."""
    for _, rotation in rotations(model):
        rotation._cached = None
        if rotation.readers is not None:
            rotation.readers.clear()
    return model


def test_inference_mode_does_not_spoil_later_training(attention):
    with torch.inference_mode():
        attention(rows())
    with torch.no_grad():
        attention(rows())
    attention(rows()).sum().backward()
    assert all(theta.grad is not None for theta in oftfx.parameters(attention))


def test_a_model_made_in_inference_mode_computes():
    with torch.inference_mode():
        model = oftfx.adapt(small("attention"), SHARED, example_inputs=rows())
        outside = oftfx.adapt(small("attention"), SHARED, example_inputs=rows())
        assert torch.equal(model(rows()), outside(rows()))


# sharing


def test_shared_inputs_are_rotated_once_a_forward():
    model = oftfx.adapt(small("attention"), SHARED, example_inputs=rows())
    assert ran(model) == (1, 2)  # one for q, k and v, one for out
    assert ran(model, times=3) == (3, 6)
    with torch.no_grad():
        assert ran(model, times=3) == (2, 6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_shared_inputs_are_rotated_once_under_autocast(dtype):
    x = rows(torch.float32)
    model = oftfx.adapt(Attention(), SHARED, example_inputs=x)
    with torch.autocast("cpu", dtype):
        assert ran(model, x) == (1, 2)


def test_a_shared_rotation_keeps_nothing_once_all_have_read_it():
    model = oftfx.adapt(small("attention"), SHARED, example_inputs=rows())
    x = rows().requires_grad_()
    alive = weakref.ref(x)
    model(x).sum().backward()
    del x
    gc.collect()
    assert alive() is None
    assert model.q.oft.default.readers._kept is None


class Sometimes(nn.Module):
    """Reads its input with two layers, or with one of them."""

    def __init__(self):
        super().__init__()
        self.a = nn.Linear(8, 8).double()
        self.b = nn.Linear(8, 8).double()
        self.use = "ab"

    def forward(self, x):
        return sum(getattr(self, name)(x) for name in self.use)


@pytest.mark.parametrize(
    "uses", [("a", "a"), ("b", "b"), ("a", "ab"), ("ab", "a", "ab"), ("aab", "ab")]
)
def test_a_sharer_that_is_skipped_or_called_twice_disturbs_nobody(uses):
    x = rows()
    model = oftfx.adapt(Sometimes(), SHARED, example_inputs=x)
    assert len(oftfx.parameters(model)) == 1
    merged = oftfx.merge(oftfx.adapt(copy_of(model), SHARED, example_inputs=x))
    for use in uses:  # each backward frees its graph; a kept tensor would still hold the old one
        model.use = merged.use = use
        out = model(x)
        testing.assert_close(out.detach(), merged(x).detach(), use, within=1e-6)
        out.sum().backward()


def copy_of(model):
    base = Sometimes()
    base.load_state_dict({k: v for k, v in model.state_dict().items() if ".oft." not in k})
    return base


def test_a_tensor_written_to_between_two_sharers_is_rotated_anew():
    class Writes(Sometimes):
        def forward(self, x):
            first = self.a(x)
            x.mul_(2)
            return first + self.b(x)

    model = oftfx.adapt(
        Writes(), OFT(block_size=4, targets="[ab]", init_std=0.2), capture="modules"
    )
    layer = Writes()
    layer.load_state_dict({k: v for k, v in model.state_dict().items() if ".oft." not in k})
    plan = oftfx.plan(Sometimes(), SHARED, rows())
    shared = oftfx.adapt(layer, plan)
    x = rows()
    with torch.no_grad():
        (core,) = shared.a.oft.default.cores()
        turned = [OPS.rotate(x * scale, core) for scale in (1, 2)]
        base = [
            nn.functional.linear(t, m.weight, m.bias)
            for t, m in zip(turned, (layer.a, layer.b), strict=True)
        ]
        testing.assert_close(shared(x.clone()), base[0] + base[1], "written between")


def test_a_layer_called_twice_is_rotated_twice_by_one_core():
    model = oftfx.adapt(TwiceUsed().double(), SPEC, example_inputs=rows())
    assert ran(model) == (1, 2)


# classes


def test_classes_are_made_once_and_named_after_their_base():
    assert rotating(nn.Linear) is rotating(nn.Linear)
    assert rotating(nn.Linear).__name__ == "OFT[Linear]"
    assert rotating(nn.Linear).__doc__ == nn.Linear.__doc__
    assert folding(Functional, (("up", "out_in"),)) is folding(Functional, (("up", "out_in"),))
    assert issubclass(rotating(nn.Linear), (Adapted, nn.Linear))


def test_a_folding_module_reads_its_weight_folded_and_stores_it_plain():
    base = small("functional")
    weight = base.up.detach().clone()
    model = oftfx.adapt(base, SPEC, example_inputs=rows())
    assert torch.equal(model._parameters["up"], weight)
    assert torch.equal(model.state_dict()["up"], weight)
    assert not torch.allclose(model.up, weight, atol=1e-3)
    assert model.up.dtype == weight.dtype


def test_a_fold_that_fails_says_so_instead_of_giving_the_raw_weight(monkeypatch):
    model = oftfx.adapt(small("functional"), SPEC, example_inputs=rows())
    monkeypatch.setattr(type(model.oft.default.up), "fold", lambda *args: args.no_such_attribute)
    with pytest.raises(RuntimeError, match="folding up failed"):
        model(rows())


def test_a_print_shows_the_rotation_and_its_spec():
    model = oftfx.adapt(small("mlp"), OFT(block_size=4, exact=True), example_inputs=rows())
    assert "OFT[Linear]" in repr(model)
    assert "Rotation(width=8, block_size=4, exact=True)" in repr(model)


def test_a_shared_rotation_lets_go_of_its_input_when_some_readers_fold_on_the_fly():
    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.q, self.k = nn.Linear(8, 8), nn.Linear(8, 8)
            self.w = nn.Parameter(torch.randn(8, 8))

        def forward(self, x):
            return self.q(x) + self.k(x) + nn.functional.linear(x, self.w)

    x = torch.randn(3, 8)
    model = oftfx.adapt(Mixed(), OFT(block_size=4, share_inputs=True), example_inputs=x)
    model(x)
    ((_, rotation),) = rotations(model)
    assert rotation.readers is None or rotation.readers._kept is None
