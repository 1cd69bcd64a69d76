"""Quantised models that the tests of `sites/` share."""

import copy
from collections.abc import Callable

import bitsandbytes as bnb
import torch
from torch import Tensor, nn

from oftfx import sites
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
    return layer.to(device)


def linear8bit(linear: nn.Linear, device: str = "cpu") -> nn.Module:
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


def noise_of(make: Callable[[nn.Linear], nn.Module]) -> float:
    """What a format's rounding does to Gaussian weights, relative: it does no more to rotated ones.

    From 256 × 256 numbers, so known to better than 1 %.
    """
    torch.manual_seed(0)
    linear = nn.Linear(256, 256, bias=False)
    nn.init.normal_(linear.weight)
    layer = make(copy.deepcopy(linear))
    quantiser = sites.quantiser_of(layer)
    assert quantiser is not None
    error = quantiser.dequantise(layer) - linear.weight.detach()
    return float(error.norm() / linear.weight.norm())


def assert_rounded_at_random(report, exact: nn.Module, before: nn.Module, noise: float) -> None:
    """That requantising did to each site's folded weight what rounding does, and nothing more.

    Let F be the folded weight, W the one before and E = V − F what rounding did. Where F − W is
    wide against the steps between numbers, E does not know of it, but that rounding pulls F towards
    W's norm by some ‖E‖²/‖F‖². So with N numbers ``survived = 1 + ⟨E, F − W⟩/‖F − W‖²`` has a
    standard deviation of ‖E‖/(√N·‖F − W‖); five of them are allowed.

    Args:
        report: Of merging with ``requantize=True``.
        exact: The same model, folded to floats.
        before: The base, dequantised.
        noise: The format's, as `noise_of` gives it.
    """
    for site in report.sites:
        folded, was = (m.get_submodule(site.fqn).weight.double() for m in (exact, before))
        # A weight of a few thousand numbers strays from the noise of many by some percent.
        assert site.rounding_error < 1.15 * noise, site
        assert site.output_error < 1.5 * noise, site
        change = float((folded - was).norm() / folded.norm())
        deviation = site.rounding_error / (change * folded.numel() ** 0.5)
        assert abs(site.survived - 1) < 5 * deviation + site.rounding_error**2, (site, deviation)
