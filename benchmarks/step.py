r"""One training step, forward and backward, beside the frozen model's and PEFT's.

    python benchmarks/step.py --model smollm2-135m --tokens 512 --out benchmarks/results/cpu.json
    python benchmarks/step.py --model qwen2.5-7b --quant nf4 --dtype bfloat16 --device cuda \
        --batch 4 --tokens 1024

All rows run in one process on the same random weights and the same random tokens: on a CPU turn by
turn, so that a slow moment of the machine hits every row; on a GPU one after the other, so that
each row's peak memory is its own, or with `--turns` as on a CPU and without peaks. On a CPU the
peak is counted: what the model holds, and the most that one more step allocates. The base's
gradient reaches the embeddings, as in the adapted models, so that a row's ratio is the cost of its
adapter alone. Run it in `make env`'s environment.
"""

import argparse
import gc
import importlib.metadata
import itertools
import json
import platform
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from measure import Launched, compiled, launched
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, PretrainedConfig, Qwen2Config

import oftfx
from oftfx.sites.pretrained import quantise
from oftfx.table import table

CONFIGS: dict[str, Callable[[], PretrainedConfig]] = {
    "smollm2-135m": lambda: LlamaConfig(
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        vocab_size=49152,
        tie_word_embeddings=True,
    ),
    "qwen2.5-7b": lambda: Qwen2Config(
        hidden_size=3584,
        intermediate_size=18944,
        num_hidden_layers=28,
        num_attention_heads=28,
        num_key_value_heads=4,
        vocab_size=32000,
    ),
}


WARM = 6
"""Steps that are not measured, on a GPU: CUDA graphs are recorded in the first of them."""


def frozen(model: nn.Module) -> nn.Module:
    model.requires_grad_(False)
    # Without this the base would skip its backward altogether.
    embeddings = model.get_input_embeddings()
    embeddings.register_forward_hook(lambda module, args, out: out.requires_grad_(True))
    return model


def peft_lora(model: nn.Module) -> nn.Module:
    return peft.get_peft_model(model, peft.LoraConfig(r=16, target_modules="all-linear"))


def in_bf16(adapted: nn.Module) -> nn.Module:
    """With what is trained in 16 bits: PEFT's faster mode, which it has to be asked for."""
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.bfloat16()
    return adapted


def known_rows(
    blocks: Sequence[int], with_bf16: bool
) -> dict[str, Callable[[nn.Module], nn.Module]]:
    """How each row's model is adapted; the first is what the others are compared with."""

    def oft(b: int, **fields: Any) -> Callable[[nn.Module], nn.Module]:
        return lambda model: oftfx.adapt(model, oftfx.OFT(block_size=b, **fields))

    def peft_oft(b: int) -> Callable[[nn.Module], nn.Module]:
        config = peft.OFTConfig(oft_block_size=b, r=0, target_modules="all-linear")
        return lambda model: peft.get_peft_model(model, config)

    rows: dict[str, Callable[[nn.Module], nn.Module]] = {"frozen base": frozen}
    for b in blocks:
        rows[f"oftfx OFT b{b}"] = oft(b)
        rows[f"oftfx OFT b{b}, shared"] = oft(b, share_inputs=True)
    theirs = {f"PEFT OFT b{b}": peft_oft(b) for b in blocks} | {"PEFT LoRA r16": peft_lora}
    rows |= theirs
    if with_bf16:
        for name, adapt in theirs.items():
            rows[f"{name}, bf16 adapters"] = lambda model, adapt=adapt: in_bf16(adapt(model))
    return rows


def main() -> None:
    args = _arguments()
    transformers.utils.logging.disable_progress_bar()
    config = CONFIGS[args.model]()
    if args.layers:
        config.num_hidden_layers = args.layers
    device, dtype = torch.device(args.device), getattr(torch, args.dtype)
    if args.threads:
        torch.set_num_threads(args.threads)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(config.vocab_size, (args.batch, args.tokens), generator=generator)
    tokens = tokens.to(device)

    known = known_rows(args.block_size, with_bf16=dtype is torch.bfloat16)
    names = args.rows or list(known)
    if unknown := set(names) - known.keys():
        sys.exit(f"no such rows: {sorted(unknown)}; there are {list(known)}")

    def build(name: str) -> nn.Module:
        torch.manual_seed(0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with device:
                model = AutoModelForCausalLM.from_config(config, dtype=dtype)
            if args.quant:
                model = quantise(model, double=args.quant == "nf4-double")
            with device:
                model = known[name](model).train()
        return compiled(model, args.compile, args.mode) if args.compile else model

    def bare(model: nn.Module) -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=args.autocast):
            model(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()

    def step(model: nn.Module) -> tuple[float, float]:
        """Seconds of one step, and the norm of its gradients."""
        model.zero_grad()
        _wait(device)
        start = time.perf_counter()
        bare(model)
        _wait(device)
        seconds = time.perf_counter() - start
        norms = [p.grad.norm() for p in model.parameters() if p.grad is not None]
        return seconds, float(torch.stack(norms).norm()) if norms else 0.0

    seconds: dict[str, list[float]] = {name: [] for name in names}
    norms: dict[str, float] = {}
    first: dict[str, float] = {}
    peaks: dict[str, float] = {}
    launches: dict[str, Launched] = {}
    if device.type == "cuda" and not args.turns:  # one model at a time: its peak is its own
        for name in names:
            start = time.perf_counter()
            model = build(name)
            print(f"{name}: built in {time.perf_counter() - start:.1f} s", file=sys.stderr)
            first[name], _ = step(model)
            for _ in range(WARM):
                step(model)
            torch.cuda.reset_peak_memory_stats()
            for _ in range(args.steps):
                took, norms[name] = step(model)
                seconds[name].append(took)
            peaks[name] = torch.cuda.max_memory_allocated() / 2**30
            model.zero_grad()
            launches[name] = launched(lambda model=model: bare(model))  # type: ignore[misc]
            took = statistics.median(seconds[name])
            print(f"{name}: {took * 1000:.1f} ms, {peaks[name]:.1f} GiB", file=sys.stderr)
            del model
            gc.collect()
            torch.cuda.empty_cache()
    else:
        models = {name: build(name) for name in names}
        warm = WARM if device.type == "cuda" else 0
        for turn in range(-warm, args.steps + 1):
            for name, model in models.items():
                took, norms[name] = step(model)
                first.setdefault(name, took)
                if turn > 0:
                    seconds[name].append(took)
            print(f"turn {turn} of {args.steps}", file=sys.stderr)
        if device.type == "cuda":
            for name, model in models.items():
                model.zero_grad()
                launches[name] = launched(lambda model=model: bare(model))  # type: ignore[misc]
        else:
            peaks = {name: _peak(model, step) for name, model in models.items()}

    medians = {name: statistics.median(values) for name, values in seconds.items()}
    base = medians[names[0]]
    rows = [
        (
            name,
            f"{medians[name] * 1000:.1f}",
            f"{min(seconds[name]) * 1000:.1f}",
            f"{medians[name] / base:.3f}",
            f"{peaks[name]:.2f}" if name in peaks else "",
            *_beside(launches.get(name), launches.get(names[0])),
            f"{first[name]:.1f}",
            f"{norms[name]:.2e}",
        )
        for name in names
    ]
    header = ("model", "ms", "fastest", "× base", "peak GiB", "kernels", "device ms", "× base")
    header = (*header, "first s", "gradient norm")
    print(table(header, rows, right=" ".join(header)))
    result: dict[str, Any] = {
        "setting": {
            **{key: value for key, value in vars(args).items() if key not in ("out", "rows")},
            "threads": torch.get_num_threads(),
            "machine": _machine(device),
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "peft": peft.__version__,
            "bitsandbytes": importlib.metadata.version("bitsandbytes"),
            "oftfx": oftfx.__version__,
        },
        "seconds": seconds,
        "first_seconds": first,
        "peak_gib": peaks,
        "kernels": {name: each.kernels for name, each in launches.items()},
        "device_ms": {name: each.milliseconds for name, each in launches.items()},
        "gradient_norm": norms,
    }
    if args.out:
        args.out.write_text(json.dumps(result, indent=1) + "\n")


def _peak(model: nn.Module, step: Callable[[nn.Module], object]) -> float:
    """GiB that a model holds and a step adds at most, by what PyTorch allocates on the CPU."""
    model.zero_grad()
    tensors = (value for value in model.state_dict().values() if isinstance(value, torch.Tensor))
    storages = {tensor.untyped_storage() for tensor in tensors}
    held = sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())
    cpu = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=cpu, profile_memory=True) as profile:
        step(model)
    events = profile.profiler.kineto_results.events()
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    return (held + max(itertools.accumulate(change for _, change in changes))) / 2**30


def _beside(own: Launched | None, base: Launched | None) -> tuple[str, str, str]:
    """Kernels more than the base's, and the device's time of a bare forward and backward."""
    if own is None or base is None:
        return "", "", ""
    ratio = own.milliseconds / base.milliseconds
    return f"{own.kernels - base.kernels:+}", f"{own.milliseconds:.1f}", f"{ratio:.3f}"


def _machine(device: torch.device) -> str:
    return torch.cuda.get_device_name() if device.type == "cuda" else platform.machine()


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--model", choices=CONFIGS, default="smollm2-135m")
    parser.add_argument("--layers", type=int, default=0, help="fewer layers than the real model")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=512, help="tokens per sequence")
    parser.add_argument("--dtype", default="float32", help="of the weights")
    parser.add_argument("--quant", choices=("nf4", "nf4-double"), help="quantise the linear layers")
    parser.add_argument("--autocast", action="store_true", help="bf16 autocast")
    parser.add_argument(
        "--compile",
        nargs="?",
        const="layers",
        choices=("layers", "whole"),
        help="oftfx's rows by its backend, layer by layer (or the model as a whole)",
    )
    parser.add_argument("--mode", help="of the compiler, such as reduce-overhead")
    parser.add_argument("--block-size", type=int, nargs="+", default=[32])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--turns", action="store_true", help="rows turn by turn, on a GPU too")
    parser.add_argument("--rows", nargs="*", help="else all that apply")
    parser.add_argument("--out", type=Path, help="JSON with every measurement and the setting")
    return parser.parse_args()


if __name__ == "__main__":
    main()
