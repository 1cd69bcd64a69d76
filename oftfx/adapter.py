"""The verbs on a model of any kind: adapt, remove, disable, and what is trainable."""

import copy
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from torch import fx, nn
from torch.export import ExportedProgram

from oftfx import copied, fixed, insert, modules
from oftfx.attach import attach, detach
from oftfx.capture import Model, unwrap
from oftfx.errors import PlanError
from oftfx.fixed import Fixed
from oftfx.host import host_of, parameters_of
from oftfx.inserted import inserted
from oftfx.plan import Plan, plan
from oftfx.regions import check_differentiable
from oftfx.rotations import is_fixed
from oftfx.spec import Spec
from oftfx.spread import check_alone

if TYPE_CHECKING:
    from oftfx.calibrate import Calibration, Loss

M = TypeVar("M", nn.Module, ExportedProgram)


def adapt(
    model: M,
    spec: Spec | Plan,
    name: str = "default",
    example_inputs: Any = None,
    capture: Literal["graph", "modules"] = "graph",
    calibration: "Calibration | Iterable[Any] | None" = None,
    loss: "Loss | None" = None,
) -> M:
    """Puts trainable rotations before a model's matmuls and freezes everything else.

    At the identity start the model's output is bit for bit the base's.

    Args:
        model: An nn.Module or GraphModule, adapted in place; or an ExportedProgram, of which an
            adapted copy is returned that shares the base's tensors.
        spec: What to adapt and how, or a plan made before, perhaps of the same model in another
            form.
        name: Names the adapter. A second one is added behind those in use, and composes with them;
            [`use`][oftfx.use] chooses among several.
        example_inputs: As for [`plan`][oftfx.plan].
        capture: As for [`plan`][oftfx.plan].
        calibration: For methods whose directions depend on the loss (LOFT's "skew" and
            "gradient"): the batches to run, or what [`calibrate`][oftfx.calibrate] gave.
        loss: As for [`calibrate`][oftfx.calibrate], with batches.

    Returns:
        The adapted model: the same object, but for an ExportedProgram.

    Raises:
        CaptureError: The model cannot be traced.
        PlanError: Nothing matches, a site cannot be adapted, ``name`` is taken, or the model is
            wrapped for several processes already. The model is untouched.
        SpecError: ``spec`` is no spec.
        ValueError: ``capture`` is neither.
    """
    check_alone(model)
    inner = unwrap(model)
    found = spec if isinstance(spec, Plan) else plan(inner, spec, example_inputs, capture)
    return put(model, found, name, partial(fixed.values, inner, found, calibration, loss))


def put(model: M, plan: Plan, name: str, fixed: Fixed) -> M:
    """Adapts a model by a plan, as [`adapt`][oftfx.adapt] does.

    Args:
        model: Of any kind.
        plan: What to adapt.
        name: Of the adapter.
        fixed: The tensors that are never trained; called when nothing else can fail.
    """
    if not (isinstance(name, str) and name.isidentifier()) or hasattr(nn.ModuleDict(), name):
        raise PlanError(f"name={name!r}: an adapter's name must be a plain identifier.")
    inner = unwrap(model)
    if isinstance(inner, (fx.GraphModule, ExportedProgram)):
        if plan.copied:
            raise PlanError(
                "also_train: a graph has no place to keep the base's own tensors in: adapt the "
                "nn.Module, and trace that."
            )
        adapted = insert.insert(inner, plan, name, fixed)
        return adapted if isinstance(model, ExportedProgram) else model  # type: ignore[return-value]
    attach(inner, plan, name, fixed)
    return model


def remove(model: M, name: str | None = None) -> M:
    """Takes an adapter off (all for None); the base is back bit for bit, gradient flags included.

    Raises:
        PlanError: There is no such adapter.
    """
    inner = unwrap(model)
    if isinstance(inner, (fx.GraphModule, ExportedProgram)):
        bare = insert.remove(inner, name)
        return bare if isinstance(model, ExportedProgram) else model  # type: ignore[return-value]
    detach(inner, name)
    return model


@contextmanager
def disabled(model: nn.Module, name: str | None = None) -> Iterator[None]:
    """Within it, the model computes what its base computes, bit for bit.

    Args:
        model: An adapted nn.Module or GraphModule.
        name: One adapter; None for all.

    Raises:
        PlanError: The model has no adapter of this name; or it is an ExportedProgram, which has no
            state to switch.
    """
    inner = unwrap(model)
    if isinstance(inner, ExportedProgram):
        raise PlanError("an ExportedProgram cannot be switched: keep the base, or oftfx.remove.")
    if not isinstance(inner, fx.GraphModule):
        if name is not None and name not in modules.in_order(inner):
            raise modules.absent(inner, name)
        with modules.kept(inner):
            for _, rotation in modules.rotations(inner, name):
                rotation.enabled = False
            copied.settle(inner, modules.in_use(inner))
            yield
        return
    adapted = inner.graph
    inner.graph = copy.deepcopy(adapted)  # its calling convention included
    for found in inserted(host_of(inner)):
        if name in (None, found.adapter):
            insert.bypass(found)
    inner.recompile()
    try:
        yield
    finally:
        inner.graph = adapted
        inner.recompile()


def parameters(model: Model, name: str | None = None) -> list[nn.Parameter]:
    """The trainable parameters of a model's adapters: what an optimizer needs.

    Args:
        model: An adapted model.
        name: One adapter, in use or not; None for those in use.

    Raises:
        PlanError: The model has no adapter (or none of this name, or none in use), or is an
            exported one whose quantised layers let no gradient through.
    """
    found = named_parameters(model, name)
    if isinstance(inner := unwrap(model), (fx.GraphModule, ExportedProgram)):
        check_differentiable(inner)
    elif name is None:
        used = (named_parameters(inner, each) for each in modules.in_use(inner))
        found = {key: parameter for each in used for key, parameter in each.items()}
    if not found:
        raise modules.absent(inner, name)
    return list(found.values())


def named_parameters(model: Model, name: str | None = None) -> dict[str, nn.Parameter]:
    """The trainable parameters of a model's adapters, each under the first of its names."""
    found: dict[int, tuple[str, nn.Parameter]] = {}
    inner = unwrap(model)
    for key, parameter in parameters_of(inner).items():
        if modules.is_rotation(inner, key, name) and not is_fixed(key):
            found.setdefault(id(parameter), (key, parameter))
    if isinstance(inner, nn.Module):
        for part, _, copies in copied.of(inner, name):
            for key, parameter in copies.parameters(part).items():
                found.setdefault(id(parameter), (key, parameter))
    return dict(found.values())
