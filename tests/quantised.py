"""Quantised models that the tests of `sites/` share."""

import copy
from collections.abc import Callable

import bitsandbytes as bnb
import torch
from torch import Tensor, nn

from oftfx import MergeReport, sites
from oftfx.ops.packed import scales
from oftfx.sites.bitsandbytes import packed_of
from tests.small import llama


def linear4bit(
    linear: nn.Linear,
    quant_type: str = "nf4",
    double: bool = True,
    block_size: int = 64,
    compute: torch.dtype | None = None,
    storage: torch.dtype = torch.uint8,
    device: str = "cpu",
) -> nn.Module:
    layer = bnb.nn.Linear4bit(
        linear.in_features,
        linear.out_features,
        bias=linear.bias is not None,
        compute_dtype=compute,
        compress_statistics=double,
        quant_type=quant_type,
        quant_storage=storage,
    )
    layer.weight = bnb.nn.Params4bit(
        linear.weight.detach().clone(),
        blocksize=block_size,
        compress_statistics=double,
        quant_type=quant_type,
        quant_storage=storage,
        module=layer,
    )
    layer.bias = linear.bias
    # In evaluation on a CPU with bfloat16 instructions it rounds, and adapted it does not
    # (`Linear4bit.pin`): what is promised of all others would fail there alone.
    layer.support_avx512bf16_for_cpu = False
    return layer.to(device)


def linear8bit(linear: nn.Linear, device: str = "cpu") -> nn.Module:
    """Quantised on the device: bitsandbytes does not move rows that are quantised already."""
    layer = bnb.nn.Linear8bitLt(
        linear.in_features,
        linear.out_features,
        bias=linear.bias is not None,
        has_fp16_weights=False,
    )
    layer.weight.data = linear.weight.detach().clone()
    layer.bias = linear.bias
    return layer.to(device)


def quantised(
    model: nn.Module, make: Callable[[nn.Linear], nn.Module], keep: tuple[str, ...] = ("lm_head",)
) -> nn.Module:
    """The model with every Linear replaced but those to keep."""
    for name, module in list(model.named_modules()):
        if type(module) is nn.Linear and name not in keep:
            model.set_submodule(name, make(module), strict=True)
    return model.train(model.training)


def float_llama(dtype: torch.dtype = torch.float32) -> nn.Module:
    """Its widths are multiples of 64; 4-bit blocks that span rows are misread on CPUs."""
    return llama(dtype, intermediate=128)


def quantised_llama(
    make: Callable[[nn.Linear], nn.Module], dtype: torch.dtype = torch.float32
) -> nn.Module:
    return quantised(float_llama(dtype), make)


def dequantised(model: nn.Module) -> nn.Module:
    """The same model with every quantised layer replaced by an ordinary one of its floats."""
    model = copy.deepcopy(model)
    for name, module in list(model.named_modules()):
        if (quantiser := sites.quantiser_of(module)) is not None:
            weight = quantiser.dequantise(module)
            linear = nn.Linear(weight.shape[1], weight.shape[0], bias=module.bias is not None)
            linear.weight.data = weight
            if module.bias is not None:
                linear.bias.data = module.bias.detach().clone()
            model.set_submodule(name, linear)
    return model.train(model.training)


def stored(model: nn.Module) -> dict[str, Tensor]:
    """A copy of everything that the base is made of, quant state included."""
    held = {key: value for key, value in model.state_dict().items() if ".oft." not in key}
    return {key: value.clone() for key, value in held.items() if isinstance(value, Tensor)}


def assert_unchanged(model: nn.Module, before: dict[str, Tensor]) -> None:
    """That not one byte of the base differs from what `stored` gave before."""
    after = stored(model)
    assert after.keys() == before.keys()
    for key, value in before.items():
        # As bytes: packed numbers may be stored as floats, NaN among them.
        one, other = (t.reshape(-1).view(torch.uint8) for t in (value, after[key]))
        assert torch.equal(one, other), key


def as_linear(weight: Tensor) -> nn.Linear:
    """A float layer of this weight."""
    linear = nn.Linear(*weight.shape[::-1], bias=False, device=weight.device)
    linear.weight.data = weight.clone()
    return linear


def floats(layer: nn.Module) -> Tensor:
    """What a quantised layer's weight stands for, float32."""
    quantiser = sites.quantiser_of(layer)
    assert quantiser is not None
    return quantiser.dequantise(layer).detach()


def assert_rounded(
    report: MergeReport,
    after: nn.Module,
    folded: nn.Module,
    before: nn.Module,
    make: Callable[[nn.Linear], nn.Module],
) -> None:
    """That requantising stored what quantising the folded weight anew does, and reports it.

    Let F be the folded weight, W the one before, V the stored one and E = V − F what rounding did.
    The errors are by definition, so equal to those found here but for float32's digits: E's norm is
    that of the difference of two float32 weights, and has the fewest.

    The output's error is ‖x·Eᵀ‖/‖x·Fᵀ‖ for 16 normal x, and so the weight's on average; five
    standard deviations, as `spread` gives them, are allowed above and below the line.

    What survived is 1 + ⟨E, F − W⟩/‖F − W‖². Where F − W is wide against the steps between numbers,
    E does not know of it, but that rounding pulls F towards W's norm by some ‖E‖²/‖F‖². The
    product of N numbers that do not know of each other has a standard deviation of
    ‖E‖·‖F − W‖/√N; five of them are allowed.

    Args:
        report: Of merging with ``requantize=True``.
        after: The model that gave.
        folded: The same model, folded to float32.
        before: The base, dequantised.
        make: Quantises a layer, as the base's were.
    """
    for site in report.sites:
        exact, was = (m.get_submodule(site.fqn).weight.detach() for m in (folded, before))
        layer = after.get_submodule(site.fqn)
        stored, state = floats(layer), getattr(layer, "quant_state", None)
        given = exact if state is None else exact.to(state.dtype)
        assert torch.equal(stored, floats(make(as_linear(given.cpu())))), site
        rounding, change = stored - exact, exact - was
        relative = float(rounding.norm() / exact.norm())
        assert abs(site.rounding_error - relative) < 1e-3 * relative, site
        above, below = 5 * spread(rounding), 5 * spread(exact)
        assert (1 - above) / (1 + below) < (site.output_error / relative) ** 2, site
        assert (site.output_error / relative) ** 2 < (1 + above) / (1 - below), site
        deviation = float(rounding.norm() / change.norm()) / exact.numel() ** 0.5
        assert abs(site.survived - 1) < 5 * deviation + relative**2, (site, deviation)


def spread(weight: Tensor) -> float:
    """Relative standard deviation of ‖x·Wᵀ‖² for 16 normal x: terms of variance 2‖WᵀW‖²."""
    return float((weight.mT @ weight).norm() / weight.square().sum()) * (2 / 16) ** 0.5


DIGITS = 0.0 if hasattr(torch.ops.bitsandbytes, "gemm_4bit") else 5e-5
"""bitsandbytes 0.49 finds FP4's nearest level, on a CPU, by a table of four digits."""


def most_rounding(layer: nn.Module, exact: Tensor) -> Tensor:
    """How far a number may be from the one that was quantised, at most; (out, in).

    4 bits: a number is a level, in [−1, 1], of its block's largest absolute value s. The nearest
    level is half the widest gap between levels away at most, and what s lost when it was quantised
    itself counts once at most. 8 bits: levels are 1/127 of the row's largest absolute value apart;
    the numbers, and with them the row's largest, come in float16.
    """
    if isinstance(layer, bnb.nn.Linear8bitLt):
        largest = exact.abs().amax(1, keepdim=True)
        return (largest * (1 / 254 + 2 * 2**-11)).expand_as(exact)
    packed = packed_of(layer.weight.data, layer.weight.quant_state)
    largest = exact.reshape(-1, packed.block_size).abs().amax(1)
    lost = (scales(packed) - largest).abs()
    if packed.nested_absmax is not None:
        width = packed.nested_block_size
        steps = packed.nested_absmax.repeat_interleave(width)[: len(lost)]
        assert (lost <= widest_gap(packed.nested_code) / 2 * steps * (1 + 1e-5)).all()
    most = (widest_gap(packed.code) / 2 + DIGITS) * largest + lost
    return most.repeat_interleave(packed.block_size).view(exact.shape)


def widest_gap(levels: Tensor) -> float:
    return float(levels.sort().values.diff().max())
