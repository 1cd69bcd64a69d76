"""The finetuning job: measure, adapt, train, measure again, fold, and check from outside."""

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from rich.console import Console
from torch import Tensor

import oftfx
from oftfx.errors import SpecError
from oftfx.train import data, measure, models, plot, publish
from oftfx.train.errors import DataError, ModelError
from oftfx.train.measure import Change, Losses
from oftfx.train.output import MARKER, staged
from oftfx.train.progress import stage
from oftfx.train.report import Reload, Report, Samples, SiteHealth
from oftfx.train.resume import Checkpoints, checkpoints
from oftfx.train.trainer import check_finite, train

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

PROBE_TOKENS = 64
CALIBRATION_BLOCKS = 4  # as many batches as LOFT's authors use


@dataclass(frozen=True, kw_only=True)
class Job:
    """What to finetune, on what, and how.

    Attributes:
        model: A model directory, a Hub id or a ``.gguf`` file.
        data: Training text: a text file, a ``.jsonl`` file or the id of a dataset on the Hub.
        out: The directory to write; it appears when the job succeeds.
        spec: The rotations.
        held_out: Text that is measured and never trained on: a source like ``data``, or the
            fraction of ``data`` to split off its end.
        unrelated: Text of another kind; its loss tells what the model forgot.
        steps: Optimizer steps.
        batch_size: Blocks of ``seq_len`` tokens in a step.
        seq_len: Tokens in a block.
        lr: Peak learning rate; warmed up over a tenth of the steps, then a cosine to zero.
        eval_tokens: How many tokens of each text a loss is measured on, at most.
        prompt: What to continue before and after training; ``None`` draws no samples.
        merge: Whether to fold the rotations into an ordinary model directory.
        dtype: Of the base model's weights; ``"auto"`` keeps the stored one.
        quant: ``"nf4"`` trains on a base in 4 bits; the merged model is a float one, in bfloat16
            unless ``dtype`` says otherwise.
        seed: Seeds the order of the blocks and the samples.
        force: Replace an earlier result at ``out``, and an earlier run's checkpoints.
        checkpoint_every: After how many steps to write a checkpoint, into ``{out}.checkpoints``;
            None for never. They go when the job is done.
        resume: Go on from the newest of them, as if the job had never been stopped.

    Raises:
        SpecError: A number is outside its range.
    """

    model: str
    data: str
    out: Path
    spec: oftfx.Spec = field(default_factory=oftfx.OFT)
    held_out: str | float = 0.1
    unrelated: str | None = None
    steps: int = 60
    batch_size: int = 1
    seq_len: int = 512
    lr: float = 3e-4
    eval_tokens: int = 8192
    prompt: str | None = None
    merge: bool = True
    dtype: str = "auto"
    quant: str = "none"
    seed: int = 0
    force: bool = False
    checkpoint_every: int | None = None
    resume: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "out", Path(self.out))
        least = {"steps": 1, "batch_size": 1, "seq_len": 2, "eval_tokens": 1, "seed": 0}
        if self.checkpoint_every is not None:
            least["checkpoint_every"] = 1
        for name, minimum in least.items():
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
                raise SpecError(f"{name}={value!r}: must be an integer ≥ {minimum}.")
        if not 0 < self.lr < math.inf:
            raise SpecError(f"lr={self.lr}: must be a positive number.")
        if self.seed >= 2**32:
            raise SpecError(f"seed={self.seed}: must be an integer from 0 to 2³² − 1.")
        if not isinstance(self.held_out, str) and not 0 < self.held_out < 1:
            raise SpecError(f"held_out={self.held_out}: a fraction must lie between 0 and 1.")


class _Texts(NamedTuple):
    """Packed blocks: to train on, and to measure on."""

    train: "Dataset"
    held_out: "Dataset"
    unrelated: "Dataset | None"


@dataclass(frozen=True)
class _Reading:
    """What one state of the model scores and says."""

    held_out: Losses
    unrelated: Losses | None
    sample: str


def run(job: Job, console: Console | None = None) -> Report:
    """Runs a job and writes its directory: adapter, merged model, report and picture.

    Args:
        job: What to do.
        console: Where progress is shown; the terminal by default.

    Raises:
        OftfxError: Bad input, found before anything is trained, or a step that failed.
            ``job.out`` is then as it was.
    """
    screen = console or Console()
    with staged(job.out, job.force) as out:
        with stage(screen, "Reading the text"):
            documents = _read(job)  # bad text is cheaper to find than a model is to load
        kept = checkpoints(job)
        report = _run(job, documents, kept, out, screen)
        report.save(out / MARKER)
    if kept is not None:
        kept.remove()
    return report


def _calibration(spec: oftfx.Spec, blocks: "Dataset") -> list[dict[str, Tensor]] | None:
    """Training text for the methods whose directions follow the loss, one block at a time."""
    if not (isinstance(spec, oftfx.LOFT) and spec.calibrated):
        return None
    few = data.spread(blocks, CALIBRATION_BLOCKS)
    return [data.collate([few[i]]) for i in range(len(few))]


def _run(
    job: Job,
    documents: dict[str, "Dataset"],
    kept: Checkpoints | None,
    out: Path,
    console: Console,
) -> Report:
    with stage(console, "Loading the model"):
        model, tokenizer = models.load(job.model, job.dtype, job.quant)
        device = torch.accelerator.current_accelerator(check_available=True)
        model.to(device or torch.device("cpu"))
        texts = _pack(job, documents, tokenizer)
        _check_vocabulary(job, model, tokenizer, texts)
    parameters = model.num_parameters()

    with stage(console, "Planning and adapting"):
        oftfx.adapt(model, job.spec, calibration=_calibration(job.spec, texts.train))
        trainable = sum(parameter.numel() for parameter in oftfx.parameters(model))
    # Not before adapting: in evaluation, quantised layers may rewrite themselves until they are.
    with oftfx.disabled(model):
        before = _take(model, tokenizer, texts, job, "Measuring before", console)
    if kept is not None:
        kept.begin()
    with stage(console, "Training", job.steps) as line:
        curves, tokens, seconds = train(model, texts.train, texts.held_out, job, kept, line)
    after = _take(model, tokenizer, texts, job, "Measuring after", console)
    check_finite(after.held_out.mean, "after training", job.lr)
    curves.held_out.insert(0, (0, before.held_out.mean))
    curves.held_out.append((job.steps, after.held_out.mean))

    with stage(console, "Saving the adapter"):
        oftfx.save(model, out / "adapter")
        sites = _health(model)
    reload = (
        _fold(model, tokenizer, texts, job.dtype, out / "merged", console) if job.merge else None
    )
    report = Report(
        version=oftfx.__version__,
        job={**vars(job), "out": str(job.out), "spec": job.spec.to_json()},
        parameters=parameters,
        trainable=trainable,
        tokens=tokens,
        seconds=seconds,
        task=Change.between(before.held_out, after.held_out),
        unrelated=(
            None
            if before.unrelated is None or after.unrelated is None
            else Change.between(before.unrelated, after.unrelated)
        ),
        samples=Samples(job.prompt, before.sample, after.sample) if job.prompt else None,
        sites=sites,
        reload=reload,
        curves=curves,
    )
    with stage(console, "Drawing"):
        plot.draw(report, out / "training.png")
    return report


def _read(job: Job) -> dict[str, "Dataset"]:
    sources = [job.data, job.unrelated, job.held_out]
    return {source: data.read(source) for source in sources if isinstance(source, str)}


def _pack(
    job: Job, documents: dict[str, "Dataset"], tokenizer: "PreTrainedTokenizerBase"
) -> _Texts:
    """Packs the texts, splits off the held-out one, and thins those to measure on."""

    def packed(source: str, least: int) -> "Dataset":
        blocks = data.pack(documents[source], tokenizer, job.seq_len)
        if len(blocks) < least:
            raise DataError(
                f"{source} makes {len(blocks)} of the {least} blocks of {job.seq_len} tokens that "
                "are needed: give more text or a smaller seq_len."
            )
        return blocks

    if isinstance(job.held_out, str):
        train_blocks, held_out = packed(job.data, 1), packed(job.held_out, 1)
    else:
        train_blocks, held_out = data.split(packed(job.data, 2), job.held_out)
    count = max(1, job.eval_tokens // job.seq_len)
    return _Texts(
        train=train_blocks,
        held_out=data.spread(held_out, count),
        unrelated=data.spread(packed(job.unrelated, 1), count) if job.unrelated else None,
    )


def _check_vocabulary(
    job: Job,
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    texts: _Texts,
) -> None:
    """That the model has an embedding for every token of the texts and the prompt."""
    rows = model.get_input_embeddings().weight.shape[0]
    if len(tokenizer) <= rows:
        return
    prompt = tokenizer(job.prompt or "", add_special_tokens=False)["input_ids"]
    found = [int(row["input_ids"].max()) for blocks in texts for row in blocks or ()]
    largest = max([*found, *prompt])
    if largest >= rows:
        raise ModelError(
            f"{job.model} has embeddings for {rows} tokens, and its tokenizer makes token {largest}"
            f" ({tokenizer.decode([largest])!r}) of the text: give it the tokenizer that it was "
            "trained with, or resize its embeddings and save it."
        )


def _take(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    texts: _Texts,
    job: Job,
    title: str,
    console: Console,
) -> _Reading:
    total = len(texts.held_out) + len(texts.unrelated or ())
    with stage(console, title, total) as line:
        held_out = measure.losses(model, texts.held_out, job.batch_size, line.advance)
        line.note(f"loss {held_out.mean:.3f}")
        unrelated = None
        if texts.unrelated:
            unrelated = measure.losses(model, texts.unrelated, job.batch_size, line.advance)
        sample = measure.sample(model, tokenizer, job.prompt, job.seed) if job.prompt else ""
    return _Reading(held_out, unrelated, sample)


def _health(model: "PreTrainedModel") -> list[SiteHealth]:
    health = oftfx.health(model)
    return [
        SiteHealth(*row)
        for row in zip(
            health.fqns,
            health.norm.tolist(),
            health.angle.tolist(),
            health.orthogonality_error.tolist(),
            strict=True,
        )
    ]


def _fold(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    texts: _Texts,
    dtype: str,
    out: Path,
    console: Console,
) -> Reload:
    ids = texts.held_out[0]["input_ids"][None, :PROBE_TOKENS]
    with stage(console, "Folding"):
        expected, computed = measure.logits(model, ids), model.dtype
        publish.publish(model, tokenizer, out, dtype)
    with stage(console, "Reloading without oftfx"):
        return publish.reload(out, ids, expected, model.dtype, computed, str(model.device))
