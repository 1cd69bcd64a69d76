"""An adapted program that runs without oftfx: its rotations as constants and PyTorch's own ops.

    before                                   after
    theta                                    core
    core = oftfx.cayley(theta, b, k)         y = baddbmm(view(x), view(x), core)
    y = oftfx.rotate(x, core)

Nothing is computed from parameters any more, so a token costs no Cayley transform, and nothing can
be trained.
"""

from torch import fx, nn
from torch.export import ExportedProgram

from oftfx.host import host_of
from oftfx.insert import erase_operands
from oftfx.inserted import inserted, values_of
from oftfx.ops.factor import SCALE
from oftfx.ops.givens import GIVENS
from oftfx.ops.givens import of_aten as givens
from oftfx.ops.int8_linear import INT8_LINEAR
from oftfx.ops.int8_linear import of_bitsandbytes as int8_linear
from oftfx.ops.rotate import ROTATE
from oftfx.ops.rotate import of_aten as rotate
from oftfx.ops.scale import of_aten as scale
from oftfx.ops.subspace import SUBSPACE
from oftfx.ops.subspace import of_aten as subspace


def lower(program: ExportedProgram) -> ExportedProgram:
    """The program of PyTorch's own ops alone, as far as oftfx is concerned.

    Args:
        program: Exported from an adapted model in evaluation mode; any other comes back as it is.

    Raises:
        PlanError: It was traced in training mode and drops blocks at random.
    """
    host = host_of(program, edit=True)
    factors = inserted(host)
    if not factors:
        return program
    constants: dict[fx.Node, fx.Node] = {}
    for found in factors:
        for operand in found.operands:
            if operand not in constants and operand.op != "placeholder":
                value = values_of(host, operand, found.site)
                name = f"{found.parameters[0]}_core{len(constants)}"
                constants[operand] = host.add(name, nn.Parameter(value, requires_grad=False))
            found.node.replace_input_with(operand, constants.get(operand, operand))
    for found in factors:
        erase_operands(host, found)
    lowered: ExportedProgram = host.finish()
    for node in lowered.graph.nodes:
        node.target = ATEN.get(node.target, node.target)
    return lowered.run_decompositions({})  # runs the functions, and writes down what they run


ATEN = {
    GIVENS: givens,
    INT8_LINEAR: int8_linear,
    ROTATE: rotate,
    SUBSPACE: subspace,
    SCALE: scale,
}
"""Each op that maps x, or outputs, and the function of others' ops that it stands for."""
