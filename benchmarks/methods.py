"""Every method beside PEFT's: how much of a task it learns, and what it forgets for that.

    python benchmarks/methods.py prepare --model MODEL --data TEXT --unrelated TEXT --out blocks.pt
    python benchmarks/methods.py run --model MODEL --blocks blocks.pt --results results.jsonl
    python benchmarks/methods.py report results.jsonl --out docs/images

`prepare` cuts the texts into blocks of tokens, so that the machine that trains needs neither
tokenizer nor `datasets`. `run` trains every job of `arms.py` from the same base and writes one JSON
line for each: it can be interrupted, and goes on with the jobs that have no line yet. Several
processes share a GPU, because a small model leaves it idle while Python launches the next kernel;
the cost of a step is therefore measured by one process that has the first GPU to itself before the
others come. `report` draws the curves and prints the tables.
"""

import argparse
import copy
import functools
import gc
import json
import math
import multiprocessing
import os
import platform
import statistics
import time
import traceback
from dataclasses import asdict, dataclass
from multiprocessing.context import SpawnProcess
from multiprocessing.synchronize import Event, Lock
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from arms import ARMS, Arm, Job, Key, jobs, reflections_at_once
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import oftfx
from oftfx.train import data, measure
from oftfx.train.measure import Change, Losses

BASE = "frozen base"
WARM_UP, TIMED = 5, 20
EVALUATED = 16  # blocks in a forward that measures


@dataclass(frozen=True)
class Setting:
    """What all jobs have in common."""

    model: Path
    blocks: Path
    results: Path
    steps: int
    batch: int
    eval_blocks: int
    per_device: int
    deadline: float


class Bench:
    """A base model on a device, its losses, and the texts."""

    def __init__(self, setting: Setting, device: str) -> None:
        self.setting = setting
        self.device = torch.device(device)
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        texts = {name: blocks.long() for name, blocks in torch.load(setting.blocks).items()}
        self.train = texts["train"].to(self.device)
        self.calibration = [data.collate([{"input_ids": ids}]) for ids in _spread(self.train, 4)]
        count = setting.eval_blocks
        self.held_out = _spread(texts["held_out"], count)
        self.unrelated = _spread(texts["unrelated"], count)
        base = AutoModelForCausalLM.from_pretrained(setting.model, dtype=torch.float32)
        self.base = base.to(self.device).train()

    @functools.cached_property
    def before(self) -> tuple[Losses, Losses]:
        return self.losses(self.base)

    def losses(self, model: Any) -> tuple[Losses, Losses]:
        """Of the held-out and of the unrelated blocks."""
        with self.autocast():
            held_out, unrelated = (
                measure.losses(model, [{"input_ids": ids} for ids in blocks], EVALUATED)
                for blocks in (self.held_out, self.unrelated)
            )
        return held_out, unrelated

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16)

    def adapted(self, arm: Arm, seed: int) -> nn.Module:
        """A copy of the base with an adapter; what earlier ones held is free again."""
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        return arm.adapt(copy.deepcopy(self.base), seed, self.calibration)

    def order(self, seed: int) -> Tensor:
        """The blocks of every step, (steps, batch), epoch by epoch."""
        wanted = self.setting.steps * self.setting.batch
        generator = torch.Generator().manual_seed(seed)
        epochs = -(-wanted // len(self.train))
        order = [torch.randperm(len(self.train), generator=generator) for _ in range(epochs)]
        return torch.cat(order)[:wanted].view(self.setting.steps, self.setting.batch)


class Training:
    """AdamW without decay, gradients clipped to norm 1, a warm-up over a tenth, then a cosine.

    These are the choices of `oftfx finetune`.
    """

    def __init__(self, bench: Bench, arm: Arm, model: nn.Module, rate: float) -> None:
        self.bench, self.arm, self.model = bench, arm, model
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        fused = bench.device.type == "cuda"
        self.optimizer = torch.optim.AdamW(self.parameters, lr=rate, weight_decay=0.0, fused=fused)
        steps = bench.setting.steps
        self.schedule = transformers.get_cosine_schedule_with_warmup(
            self.optimizer, steps // 10, steps
        )
        ours = isinstance(arm.make, oftfx.Spec)
        self.penalised = ours and oftfx.penalty(model).requires_grad

    def step(self, ids: Tensor) -> Tensor:
        """The loss of a batch, (batch, seq), before its step is taken."""
        with self.bench.autocast():
            loss: Tensor = self.model(input_ids=ids, labels=ids, use_cache=False).loss
        (loss + oftfx.penalty(self.model) if self.penalised else loss).backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.schedule.step()
        self.optimizer.zero_grad()
        if self.arm.constrained:
            oftfx.project(self.model)
        return loss.detach()


def train(bench: Bench, job: Job) -> dict[str, Any] | None:
    """Trains and measures; None when time ran out."""
    start = time.monotonic()
    model = bench.adapted(job.arm, job.seed)
    training = Training(bench, job.arm, model, job.rate)
    losses = []
    ready = time.monotonic()
    with reflections_at_once():
        for rows in bench.order(job.seed):
            losses.append(training.step(bench.train[rows.to(bench.device)]))
            if time.time() > bench.setting.deadline:
                return None
    curve = torch.stack(losses).tolist()
    trained = time.monotonic()
    task, unrelated = map(Change.between, bench.before, bench.losses(model))
    return {
        "kind": "training",
        **_about(job),
        "parameters": sum(p.numel() for p in training.parameters),
        "gain": -task.change.mean,
        "forgetting": unrelated.change.mean,
        "task": asdict(task),
        "unrelated": asdict(unrelated),
        "norm": _norm(job.arm, model),
        "seconds": round(time.monotonic() - start, 1),
        "training_seconds": round(trained - ready, 1),
        "losses": [round(loss, 4) for loss in curve],
    }


def _norm(arm: Arm, model: nn.Module) -> float | None:
    """The largest ‖Q‖₂ of oftfx's rotations."""
    ours = isinstance(arm.make, oftfx.Spec)
    return oftfx.health(model).norm.max().item() if ours else None


def cost(bench: Bench, name: str) -> dict[str, Any]:
    """Time and memory of a step, by a process that has its device to itself."""
    start = time.monotonic()
    if name == BASE:
        model = copy.deepcopy(bench.base).requires_grad_(False)
        # The gradient runs down to the embeddings, as it does when adapters are trained.
        embeddings = model.get_input_embeddings()
        embeddings.register_forward_hook(lambda module, args, out: out.requires_grad_(True))
        return _cost(bench, name, lambda ids: _frozen(bench, model, ids), start, 0)
    arm = next(arm for arm in ARMS if arm.name == name)
    training = Training(bench, arm, bench.adapted(arm, 0), rate=1e-6)
    count = sum(p.numel() for p in training.parameters)
    return _cost(bench, name, training.step, start, count)


def _frozen(bench: Bench, model: nn.Module, ids: Tensor) -> None:
    with bench.autocast():
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    loss.backward()


def _cost(bench: Bench, name: str, step: Any, start: float, parameters: int) -> dict[str, Any]:
    prepared = time.monotonic() - start
    cuda = bench.device.type == "cuda"
    seconds = []
    for index, rows in enumerate(bench.order(0)[: WARM_UP + TIMED]):
        ids = bench.train[rows.to(bench.device)]
        if cuda:
            if index == WARM_UP:
                torch.cuda.reset_peak_memory_stats()
            torch.cuda.synchronize()
        begun = time.perf_counter()
        step(ids)
        if cuda:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - begun)
    return {
        "kind": "cost",
        "arm": name,
        "parameters": parameters,
        "prepare_seconds": round(prepared, 2),
        "step_seconds": statistics.median(seconds[WARM_UP:] or seconds),
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30 if cuda else None,
    }


def work(setting: Setting, device: str, chosen: list[str], lock: Lock, timed: Event) -> None:
    """Takes jobs until none is left that can end in time. A broken process is replaced."""
    torch.set_num_threads(1)
    bench = Bench(setting, device)
    if not timed.is_set() and device == devices()[0]:
        done = [row["arm"] for row in read(setting.results) if row.get("of", row["kind"]) == "cost"]
        for name in (BASE, *chosen):
            if name not in done and time.time() < setting.deadline:
                _guarded(setting, {"of": "cost", "arm": name}, cost, bench, name)
        timed.set()
    while True:
        with lock:
            job = _next(setting, chosen)
            if job is None:
                return
            write(setting.results, {"kind": "taken", **_about(job)})
        _guarded(setting, {"of": "training", **_about(job)}, train, bench, job)


def _next(setting: Setting, chosen: list[str]) -> Job | None:
    """The first job that nobody has taken and that can end in time."""
    rows = read(setting.results)
    done = [row for row in rows if row["kind"] == "training"]
    gains = {key(row): row["gain"] for row in done}
    latest = max(index for index, row in enumerate(rows) if row["kind"] == "setting")
    taken = {key(row) for row in rows[latest:] if row["kind"] == "taken"}
    for job in jobs(gains):
        if job.arm.name not in chosen or job.key in taken or job.key in gains:
            continue
        same = [row["seconds"] for row in done if row["arm"] == job.arm.name]
        if time.time() + max(same, default=0) < setting.deadline:
            return job
    return None


def key(row: dict[str, Any]) -> Key:
    """Which job a line is about."""
    return row["arm"], row["rate"], row["seed"]


def _about(job: Job) -> dict[str, Any]:
    return {"arm": job.arm.name, "rate": job.rate, "seed": job.seed}


def _guarded(setting: Setting, about: dict[str, Any], do: Any, *args: Any) -> None:
    """Writes what `do` returns. An error is written as such and ends the process."""
    try:
        row = do(*args)
    except Exception as error:
        write(setting.results, about | {"kind": "error", "error": traceback.format_exc()})
        raise SystemExit(1) from error
    if row:
        write(setting.results, row)


def run(setting: Setting, names: list[str]) -> None:
    """Shares the jobs among processes, several on each device."""
    chosen = names or [arm.name for arm in ARMS]
    write(setting.results, _described(setting))
    spawn = multiprocessing.get_context("spawn")
    lock, timed = spawn.Lock(), spawn.Event()
    if any(row["kind"] == "cost" for row in read(setting.results)):
        timed.set()
    workers: dict[SpawnProcess, str] = {}
    waiting: list[str] = []

    def start(device: str) -> None:
        worker = spawn.Process(target=work, args=(setting, device, chosen, lock, timed))
        worker.start()
        workers[worker] = device

    for index, device in enumerate(devices()):
        alone = index == 0 and not timed.is_set()
        start(device)
        for _ in range(setting.per_device - 1):
            waiting.append(device) if alone else start(device)
    while workers:
        time.sleep(0.2)
        if timed.is_set():
            while waiting:
                start(waiting.pop())
        for worker, device in list(workers.items()):
            if worker.is_alive():
                continue
            del workers[worker]
            if worker.exitcode and time.time() < setting.deadline:
                start(device)


def devices() -> list[str]:
    """All GPUs, or the CPU."""
    return [f"cuda:{index}" for index in range(torch.cuda.device_count())] or ["cpu"]


def write(results: Path, row: dict[str, Any]) -> None:
    """Appends one line, in one piece: several processes write."""
    with results.open("ab", buffering=0) as file:
        file.write(json.dumps(row).encode() + b"\n")


def read(results: Path) -> list[dict[str, Any]]:
    """All lines so far."""
    if not results.is_file():
        return []
    return [json.loads(line) for line in results.read_text().splitlines()]


def prepare(args: argparse.Namespace) -> None:
    """Writes the blocks of both texts; the task's last tenth is held out."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(args.model)
    task, unrelated = (
        data.pack(data.read(str(source)), tokenizer, args.tokens)
        for source in (args.data, args.unrelated)
    )
    kept, held_out = data.split(task, 0.1)
    blocks = {"train": kept, "held_out": held_out, "unrelated": unrelated}
    torch.save({name: rows[:]["input_ids"].int() for name, rows in blocks.items()}, args.out)
    print({name: len(rows) for name, rows in blocks.items()})


def _spread(blocks: Tensor, count: int) -> Tensor:
    """At most `count` blocks, evenly spaced."""
    if len(blocks) <= count:
        return blocks
    return blocks[[index * len(blocks) // count for index in range(count)]]


def _described(setting: Setting) -> dict[str, Any]:
    return {
        "kind": "setting",
        **{key: getattr(setting, key) for key in ("steps", "batch", "eval_blocks", "per_device")},
        "devices": len(devices()),
        "machine": torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "peft": peft.__version__,
        "oftfx": oftfx.__version__,
    }


def main() -> None:
    args = _arguments()
    if args.command == "prepare":
        prepare(args)
    elif args.command == "run":
        setting = Setting(
            **{key: getattr(args, key) for key in ("model", "blocks", "results", "steps", "batch")},
            **{key: getattr(args, key) for key in ("eval_blocks", "per_device")},
            deadline=time.time() + args.seconds,
        )
        run(setting, args.arms)
    else:
        from curves import report

        report(read(args.results), args.out)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("prepare", help="texts to blocks of tokens")
    command.add_argument("--model", type=Path, required=True, help="directory with the tokenizer")
    command.add_argument("--data", type=Path, required=True, help="text of the task")
    command.add_argument("--unrelated", type=Path, required=True, help="text of another kind")
    command.add_argument("--tokens", type=int, default=256, help="in a block")
    command.add_argument("--out", type=Path, required=True)
    command = commands.add_parser("run", help="train and measure")
    command.add_argument("--model", type=Path, required=True, help="directory of the model")
    command.add_argument("--blocks", type=Path, required=True, help="what prepare wrote")
    command.add_argument("--results", type=Path, required=True, help="JSON lines; added to")
    command.add_argument("--steps", type=int, default=200)
    command.add_argument("--batch", type=int, default=8, help="blocks in a step")
    command.add_argument("--eval-blocks", type=int, default=64, help="of each text, at most")
    command.add_argument("--per-device", type=int, default=4, help="processes on each device")
    command.add_argument("--seconds", type=float, default=math.inf, help="then no more jobs")
    command.add_argument("--arms", nargs="*", choices=[arm.name for arm in ARMS])
    command = commands.add_parser("report", help="curves and tables")
    command.add_argument("results", type=Path)
    command.add_argument("--out", type=Path, required=True, help="directory of the pictures")
    return parser.parse_args()


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    main()
