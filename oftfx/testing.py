"""The equivalences oftfx promises, as assertions for your own models and specs.

    from oftfx import OFT, testing

    testing.assert_identity_at_init(model, OFT(block_size=32), inputs)
    testing.assert_same_function(adapted, exported, inputs)
    testing.assert_folds(adapted, inputs)

All take an nn.Module, GraphModule or ExportedProgram, and inputs as a tensor, a tuple of positional
or a dict of keyword arguments. Nothing given is changed; a failure is an AssertionError that names
what differs and by how much.
"""

import copy
import re
import warnings
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import optree
import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram

from oftfx.adapter import adapt, named_parameters, parameters
from oftfx.capture import Model, arguments, unwrap
from oftfx.fold import merge
from oftfx.modules import CHILD
from oftfx.spec import Spec

M = TypeVar("M", nn.Module, ExportedProgram)


def tolerance(dtype: torch.dtype) -> float:
    """Relative error (2-norm) within which two roads to one number agree in this dtype."""
    roundings = {torch.float64: 4096, torch.float32: 256}.get(dtype, 8)
    return roundings * torch.finfo(dtype).eps


def randomize(model: M, seed: int = 0, std: float = 0.1, name: str | None = None) -> M:
    """Turns every rotation away from the identity, in place; the same values for every kind.

    Args:
        model: An adapted model.
        seed: Seeds the values; each parameter's depend on it and its place among them alone.
        std: Their standard deviation.
        name: One adapter; None for all.
    """
    generator = torch.Generator().manual_seed(seed)
    named = thetas(model)
    chosen = {id(parameter) for parameter in parameters(model, name)}
    with torch.no_grad():
        for parameter in (value for _, value in sorted(named.items()) if id(value) in chosen):
            values = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.copy_(values * std)
    return model


def thetas(model: Model) -> dict[str, nn.Parameter]:
    """The trainable parameters of a model's adapters, under names that are the same for every kind.

    They are the parameters' own, but that `oft.NAME.weight.theta` reads `oft.NAME.theta`: whether a
    weight called "weight" belongs to a layer or is used as it is, not every tracer can tell.
    """
    own = re.compile(rf"({CHILD}\.\w+)\.weight(\.\w+)$")
    return {own.sub(r"\1\2", name): value for name, value in named_parameters(model).items()}


def run(model: Model, inputs: Any) -> list[Tensor]:
    """Calls a model of any kind; the floating tensors of its output, in order."""
    args, kwargs = arguments(inputs)
    return _floats(callable_of(model)(*args, **kwargs))


def callable_of(model: Model) -> Callable[..., Any]:
    """What to call to run a model of any kind; a program's shares the program's parameters."""
    if not isinstance(model, ExportedProgram):
        return model
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a program says nothing of train and eval
        return model.module()


def gradients(model: Model, inputs: Any, seed: int = 0) -> dict[str, Tensor]:
    """Gradients of one scalar of the outputs, by name: of each rotation, and of each float input.

    The scalar weighs every output element with a random number, so that no error cancels.
    """
    args, kwargs = arguments(inputs)
    leaves, tree = optree.tree_flatten((args, kwargs))
    called: Any = callable_of(model)  # a program's module holds parameters of its own
    named: dict[str, Tensor] = dict(thetas(called)) if _has_adapter(called) else {}
    for i, leaf in enumerate(leaves):
        if isinstance(leaf, Tensor) and leaf.is_floating_point():
            leaves[i] = named[f"input {i}"] = leaf.detach().clone().requires_grad_()
    args, kwargs = optree.tree_unflatten(tree, leaves)
    generator = torch.Generator().manual_seed(seed)
    with torch.enable_grad():
        total = torch.zeros((), dtype=torch.float64)
        for out in _floats(called(*args, **kwargs)):
            weights = torch.randn(out.shape, generator=generator, dtype=torch.float64)
            total = total + (out.double() * weights.to(out.device)).sum()
    # `backward`, not `autograd.grad`: reentrant checkpointing supports nothing else.
    kept = {name: value.grad for name, value in named.items()}
    try:
        for value in named.values():
            value.grad = None
        total.backward()
        return {name: value.grad for name, value in named.items() if value.grad is not None}
    finally:
        for name, value in named.items():
            value.grad = kept[name]


def assert_close(actual: Tensor, expected: Tensor, what: str, within: float | None = None) -> None:
    """That two tensors agree to a relative error in the 2-norm.

    Raises:
        AssertionError: They differ by more, in shape, or in dtype.
    """
    assert actual.shape == expected.shape, f"{what}: {actual.shape} against {expected.shape}"
    assert actual.dtype == expected.dtype, f"{what}: {actual.dtype} against {expected.dtype}"
    bound = tolerance(expected.dtype) if within is None else within
    size = expected.double().norm()
    error = (actual.double() - expected.double()).norm()
    assert error <= bound * size, (
        f"{what} differs by {float(error / size.clamp_min(1e-300)):.2e} relative, "
        f"more than {bound:.2e}"
    )


def assert_same_function(
    model_a: Model,
    model_b: Model,
    inputs: Any,
    within: float | None = None,
    grad: bool = True,
) -> None:
    """That two models give the same outputs and the same gradients of rotations and inputs.

    Args:
        model_a: One model.
        model_b: The other, of the same kind or another.
        inputs: What to call them with.
        within: Relative error; 0 asks for equal bits, None for what the dtype allows.
        grad: Also compare gradients. Those of rotations are compared where both have them.

    Raises:
        AssertionError: They differ; says where and by how much.
    """
    with torch.no_grad():
        outs_a, outs_b = run(model_a, inputs), run(model_b, inputs)
    assert len(outs_a) == len(outs_b), f"{len(outs_a)} outputs against {len(outs_b)}"
    for i, (a, b) in enumerate(zip(outs_a, outs_b, strict=True)):
        assert_close(a, b, f"output {i}", within)
    if not grad:
        return
    grads_a, grads_b = gradients(model_a, inputs), gradients(model_b, inputs)
    if _has_adapter(model_a) and _has_adapter(model_b):
        assert grads_a.keys() == grads_b.keys(), f"gradients of {grads_a.keys() ^ grads_b.keys()}"
    for name in grads_a.keys() & grads_b.keys():
        assert_close(grads_a[name], grads_b[name], f"gradient of {name}", within)


def assert_identity_at_init(model: Model, spec: Spec, inputs: Any) -> None:
    """That adapting does not change one bit of the output.

    Raises:
        AssertionError: It does.
    """
    example = None if isinstance(model, (fx.GraphModule, ExportedProgram)) else inputs
    given: Any = model if isinstance(model, ExportedProgram) else copy.deepcopy(model)
    adapted: Any = adapt(given, spec, example_inputs=example)
    assert_same_function(adapted, model, inputs, within=0, grad=False)


def assert_folds(model: Model, inputs: Any, within: float | None = None) -> None:
    """That merging an adapted model keeps its function and leaves nothing of oftfx behind.

    Raises:
        AssertionError: It does not.
    """
    given = model if isinstance(model, ExportedProgram) else copy.deepcopy(unwrap(model))
    merged = merge(given)
    assert_same_function(merged, model, inputs, within, grad=False)
    held = merged.state_dict if isinstance(merged, ExportedProgram) else merged.state_dict()
    left = [name for name in held if CHILD in name.split(".")]
    assert not left, f"merging left {left}"


def _has_adapter(model: Model) -> bool:
    return bool(named_parameters(model))


def _floats(out: Any) -> list[Tensor]:
    # A transformers output is a dict of a class that optree does not open.
    leaves = optree.tree_leaves(dict(out) if isinstance(out, Mapping) else out)
    return [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_floating_point()]
