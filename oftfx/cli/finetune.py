"""``oftfx finetune``."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from oftfx.cli.console import console
from oftfx.cli.options import MEASURING, OUTPUT, TRAINING, Dtype, Force, Out, takes_spec
from oftfx.spec import Spec


@takes_spec
def finetune(
    model: Annotated[
        str,
        typer.Option(help="A model directory, a Hub id or a .gguf file.", show_default=False),
    ],
    data: Annotated[
        str,
        typer.Option(
            help="A text file, a .jsonl file, or a Hub dataset id. Rows hold text, messages, or "
            "prompt and completion, of which only the completion is learned.",
            show_default=False,
        ),
    ],
    spec: Spec,
    out: Out = Path("oftfx-out"),
    force: Force = False,
    merge: Annotated[
        bool,
        typer.Option(
            help="Fold the rotations and write a model directory that needs no oftfx.",
            rich_help_panel=OUTPUT,
        ),
    ] = True,
    steps: Annotated[int, typer.Option(help="Optimizer steps.", rich_help_panel=TRAINING)] = 60,
    batch_size: Annotated[
        int, typer.Option(help="Blocks of text in a step.", rich_help_panel=TRAINING)
    ] = 1,
    seq_len: Annotated[
        int, typer.Option(help="Tokens in a block.", rich_help_panel=TRAINING)
    ] = 512,
    lr: Annotated[
        float | None,
        typer.Option(
            help="Peak learning rate. Higher learns more of the task and forgets more of the rest. "
            "3e-4 unless given (hra and loft 2e-4, goft 8e-3, qgoft 7e-3); with --unit-rate 0.02, "
            "which is the same for blocks of 32.",
            rich_help_panel=TRAINING,
            show_default=False,
        ),
    ] = None,
    dtype: Dtype = "auto",
    quant: Annotated[
        Literal["none", "nf4"],
        typer.Option(
            help="Train on a base in 4 bits (QOFT); the merged model is bfloat16. Needs "
            "bitsandbytes.",
            rich_help_panel=TRAINING,
        ),
    ] = "none",
    seed: Annotated[
        int, typer.Option(help="Of the block order and the samples.", rich_help_panel=TRAINING)
    ] = 0,
    checkpoint_every: Annotated[
        int | None,
        typer.Option(
            help="Steps between checkpoints, from which --resume goes on. They are kept in "
            "OUT.checkpoints, and go when the job is done.",
            rich_help_panel=TRAINING,
            show_default=False,
        ),
    ] = None,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume",
            help="Go on with the same command that was stopped, from its newest checkpoint.",
            rich_help_panel=TRAINING,
        ),
    ] = False,
    held_out: Annotated[
        str,
        typer.Option(
            help="Text to measure on: a source like --data, or the fraction of --data to split "
            "off its end.",
            rich_help_panel=MEASURING,
        ),
    ] = "0.1",
    unrelated: Annotated[
        str | None,
        typer.Option(
            help="Text of another kind; its loss shows what was forgotten.",
            rich_help_panel=MEASURING,
            show_default=False,
        ),
    ] = None,
    eval_tokens: Annotated[
        int,
        typer.Option(
            help="Tokens of each text to measure on, at most; one block at least.",
            rich_help_panel=MEASURING,
        ),
    ] = 8192,
    prompt: Annotated[
        str | None,
        typer.Option(
            help="What to continue before and after training.",
            rich_help_panel=MEASURING,
            show_default=False,
        ),
    ] = None,
) -> None:
    """Finetune a language model on text, fold the result, and check it.

    Measures the loss before and after on text that was not trained on, draws the loss curve and
    the rotation angles, writes the adapter and the folded model, and loads the folded model back
    in a process without oftfx to compare.

    **Examples**

    `oftfx finetune --model ./my-model --data book.txt --out tuned`

    `oftfx finetune --model model.gguf --data chats.jsonl --unrelated wiki.txt --prompt "Once"`

    `oftfx finetune --model org/name --data org/dataset --steps 500 --batch-size 8 --dtype bfloat16`

    `oftfx finetune --model ./my-model --data book.txt --method boft --block-size 8 --factors 3`

    `oftfx finetune --model org/name --data book.txt --quant nf4`

    `oftfx finetune --model org/name --data chats.jsonl --steps 2000 --checkpoint-every 200`
    """
    screen = console()
    from oftfx.train import Job, run, show
    from oftfx.train.resume import directory_beside

    job = Job(
        model=model,
        data=data,
        out=out,
        spec=spec,
        held_out=_fraction_or_source(held_out),
        unrelated=unrelated,
        steps=steps,
        batch_size=batch_size,
        seq_len=seq_len,
        lr=_default_lr(spec) if lr is None else lr,
        eval_tokens=eval_tokens,
        prompt=prompt,
        merge=merge,
        dtype=dtype,
        quant=quant,
        seed=seed,
        force=force,
        checkpoint_every=checkpoint_every,
        resume=resume,
    )
    try:
        report = run(job, screen)
    except KeyboardInterrupt:
        kept = (checkpoint_every is not None or resume) and directory_beside(out).exists()
        screen.print("Stopped. " + ("Add --resume to go on." if kept else "Nothing was written."))
        raise
    show(report, out, screen)
    if report.reload and not report.reload.agrees:
        raise typer.Exit(1)


LEARNING_RATES = {"GOFT": 8e-3, "QGOFT": 7e-3, "HRA": 2e-4, "LOFT": 2e-4}
"""Those that are not OFT's: by the rates at which methods gained the same (docs/methods)."""


def _default_lr(spec: Spec) -> float:
    if getattr(spec, "unit_rate", False):
        return 0.02
    return LEARNING_RATES.get(type(spec).__name__, 3e-4)


def _fraction_or_source(value: str) -> float | str:
    try:
        return float(value)
    except ValueError:
        return value
