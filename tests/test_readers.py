"""Layers that read one tensor rotate it together, with rotations of their own or a shared one."""

import contextlib
import copy
import gc
import weakref

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import oftfx
from oftfx import OFT, testing
from oftfx.modules import rotations
from tests.small import llama, rows, small, tokens

SPEC = OFT(block_size=4, init_std=0.2)


class Ops(TorchDispatchMode):
    """The names of oftfx's ops that ran."""

    def __init__(self) -> None:
        super().__init__()
        self.ran: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "oftfx" and "cayley" not in func.name():
            self.ran.append(func.name().removeprefix("oftfx::"))
        return func(*args, **(kwargs or {}))


def ran(model, x) -> list[str]:
    with Ops() as ops:
        model(x)
    return ops.ran


def apart(model):
    """The same model, whose layers know nothing of each other."""
    twin = copy.deepcopy(model)
    for _, rotation in rotations(twin):
        rotation.readers = None
    return twin


def test_q_k_and_v_are_one_op_and_so_is_their_gradient():
    model = oftfx.adapt(small("attention"), SPEC, example_inputs=rows())
    with Ops() as ops:
        model(rows()).sum().backward()
    assert ops.ran == ["rotate_group", "rotate", "rotate_grad", "rotate_group_grad"]


@pytest.mark.parametrize(
    "spec",
    [
        SPEC,
        OFT(block_size=4, init_std=0.2, overrides={"k_proj": {"block_size": 8}}),
        OFT(block_size=4, init_std=0.2, overrides={"k_proj": {"dtype": torch.bfloat16}}),
        OFT(block_size=4, init_std=0.2, exclude=["k_proj"]),
    ],
    ids=lambda spec: str(spec.to_json()),
)
@pytest.mark.parametrize("reentrant", [None, False, True])
def test_computes_what_each_layer_would(spec, reentrant):
    model = oftfx.adapt(llama(torch.float64), spec)
    twin = apart(model)
    if reentrant is not None:
        model.train()
        kwargs = {"use_reentrant": reentrant}
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=kwargs)
        model.enable_input_require_grads()
    for _ in range(2):
        testing.assert_same_function(model, twin, tokens())


def read(layer, x, context):
    return x + torch.tanh(layer["k"](context)) * layer["v"](context)


class Across(nn.Module):
    """Layers that read one context, each in a checkpointed region of its own, as decoders do."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(
            nn.ModuleDict({"k": nn.Linear(8, 8), "v": nn.Linear(8, 8)}) for _ in range(3)
        )
        self.checkpoints = False

    def forward(self, x):
        context = torch.tanh(x)
        for layer in self.layers:
            given = (layer, x, context)
            x = checkpoint(read, *given, use_reentrant=False) if self.checkpoints else read(*given)
        return x


@pytest.mark.parametrize("share", [False, True])
def test_a_region_that_is_run_again_finds_what_it_computed_though_others_read_that_too(share):
    spec = OFT(block_size=4, init_std=0.2, share_inputs=share)
    x = rows(torch.float32).requires_grad_()
    model = oftfx.adapt(Across(), spec, example_inputs=x.detach())
    assert {site.group for site in oftfx.plan(Across(), spec, x.detach()).sites} == {0}
    twin = copy.deepcopy(model)
    twin.checkpoints = True
    for _ in range(2):
        testing.assert_same_function(twin, model, x)


def test_under_autocast():
    model = oftfx.adapt(small("attention").float(), SPEC, example_inputs=rows(torch.float32))
    x = rows(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        assert ran(model, x) == ["rotate_group", "rotate"]
        assert torch.equal(model(x), apart(model)(x))


class Chooses(nn.Module):
    """Reads its input with all of its layers, or with some."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(8, 8).double() for _ in range(3))
        self.use = "abc"

    def forward(self, x):
        return sum(getattr(self, name)(x) for name in self.use)


def test_gives_up_where_the_others_do_not_come_and_stays_right():
    model = oftfx.adapt(Chooses(), SPEC, example_inputs=rows())
    twin = apart(model)
    assert ran(model, rows()) == ["rotate_group"]
    for use in ("a", "ab", "abc", "ca"):
        model.use = twin.use = use
        testing.assert_same_function(model, twin, rows())
        testing.assert_same_function(model, twin, rows())
    assert ran(model, rows()) == ["rotate"] * 2


def test_a_second_adapter_rotates_what_the_first_left_apart():
    model = oftfx.adapt(small("attention"), SPEC, example_inputs=rows())
    oftfx.adapt(model, SPEC, "second", example_inputs=rows())
    testing.assert_same_function(model, apart(model), rows())
    assert ran(model, rows()) == ["rotate_group"] + ["rotate"] * 5


def test_a_tensor_written_to_between_two_readers_is_rotated_anew():
    class Writes(Chooses):
        def forward(self, x):
            first = self.a(x)
            x.mul_(2)
            return first + self.b(x) + self.c(x)

    plan = oftfx.plan(Chooses(), SPEC, rows())
    model = oftfx.adapt(Writes(), plan)
    with torch.no_grad():
        testing.assert_close(model(rows()), apart(model)(rows()), "output")


def test_one_that_is_disabled_leaves_the_others():
    model = oftfx.adapt(Chooses(), SPEC, example_inputs=rows())
    model.b.oft.default.enabled = False
    assert ran(model, rows()) == ["rotate"] * 2
    testing.assert_same_function(model, apart(model), rows())


def test_nothing_is_kept_after_a_forward():
    model = oftfx.adapt(small("attention"), SPEC, example_inputs=rows())
    model(rows())
    assert all(r.readers is None or r.readers._kept is None for _, r in rotations(model))


@pytest.mark.parametrize("share", [False, True])
def test_of_forwards_that_each_read_a_part_every_one_has_a_graph_of_its_own(share):
    spec = OFT(block_size=4, init_std=0.2, share_inputs=share)
    model, x = oftfx.adapt(Chooses(), spec, example_inputs=rows()), rows()
    for use in ("a", "b", "ac"):
        model.use = use
        model(x).sum().backward()
    for layer in (model.a, model.b, model.c):  # and outside of the model's forward
        layer(x).sum().backward()


def test_what_one_forward_left_is_nothing_to_the_next():
    model, x = oftfx.adapt(Chooses(), SPEC, example_inputs=rows()), rows()
    with torch.no_grad():
        model.use = "a"
        model(x)
        oftfx.scale(model, 0.0)
        model.use = "b"
        off = model(x)
        with oftfx.disabled(model):
            assert torch.equal(model(x), off)
    model.use = "a"
    model(x)
    x.requires_grad_()
    model.use = "b"
    model(x).sum().backward()
    assert x.grad is not None


def test_outside_of_a_forward_what_changed_is_seen():
    model, x = oftfx.adapt(Chooses(), SPEC, example_inputs=rows()), rows()
    with torch.no_grad():
        model.a(x)
        oftfx.scale(model, 0.0)
        off = model.b(x)
        with oftfx.disabled(model):
            assert torch.equal(model.b(x), off)
    oftfx.scale(model, 1.0)
    model.b.requires_grad_(False)
    model.a(x)
    model.b.oft.requires_grad_(True)
    model.b(x).sum().backward()
    assert model.b.oft.default.theta.grad.any()


@pytest.mark.parametrize("fails", [False, True])
def test_what_a_forward_read_goes_with_it(fails):
    class Fails(Chooses):
        def forward(self, x):
            y = super().forward(x)
            if fails:
                raise ValueError("on the way")
            return y

    plan = oftfx.plan(Chooses(), SPEC, rows())
    model = oftfx.adapt(Fails(), plan)
    model.use, h = "a", rows().requires_grad_() * 1
    seen = weakref.ref(h)
    with pytest.raises(ValueError, match="on the way") if fails else contextlib.nullcontext():
        model(h)
    assert all(rotation.readers._kept is None for _, rotation in rotations(model))
    assert all(rotation.readers.useful is fails for _, rotation in rotations(model))
    del h
    gc.collect()
    assert seen() is None


def test_a_region_of_which_a_part_is_read_is_run_again_as_it_was():
    model = oftfx.adapt(Chooses(), SPEC, example_inputs=rows())
    twin = apart(model)
    model.use = twin.use = "a"
    found = []
    for each in (model, twin):
        h = rows().requires_grad_() * 1
        y = checkpoint(each, h, use_reentrant=False) + checkpoint(each, 2 * h, use_reentrant=False)
        found.append(torch.autograd.grad(y.sin().sum(), each.a.oft.default.theta))
    testing.assert_close(*[grad for (grad,) in found], "gradient")


def test_a_replica_of_a_reader_rotates_alone():
    """nn.DataParallel copies modules shallowly and gives the copies plain tensors."""
    model = oftfx.adapt(small("attention"), SPEC, example_inputs=rows())
    rotation = model.q.oft.default
    replica = rotation._replicate_for_data_parallel()
    replica.theta = rotation.theta.detach() * 2
    rotation.readers.clear()
    x = rows()
    with torch.no_grad():
        turned = replica(x)
        rotation.theta.mul_(2)
        assert torch.equal(turned, rotation(x))
