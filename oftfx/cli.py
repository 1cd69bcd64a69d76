"""The ``oftfx`` command."""

import dataclasses
import signal
import sys
from json import dumps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from oftfx.errors import OftfxError

if TYPE_CHECKING:
    from rich.console import Console

    import oftfx

try:
    import typer
except ModuleNotFoundError:  # the core does not need it
    sys.exit("The oftfx command needs the train extra: pip install 'oftfx[train]'")

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

ROTATIONS, TRAINING, MEASURING, OUTPUT = "Rotations", "Training", "Measuring", "Output"

Method = Annotated[
    Literal["oft", "coft", "boft", "goft", "qgoft", "hra", "psoft", "loft"],
    typer.Option(
        help="How inputs are rotated: in blocks (oft), in blocks that stay near the identity "
        "(coft) or reach ever farther (boft), in a tree of pairs (goft; qgoft with free pairs), by "
        "reflections (hra), or among a few directions of the input: the weight's main ones (psoft) "
        "or those that matter most to the loss (loft).",
        rich_help_panel=ROTATIONS,
    ),
]
BlockSize = Annotated[
    int | None,
    typer.Option(
        help="oft, coft, boft: width of a rotation block; must divide every adapted layer's input "
        "width. Larger turns more, and trains more parameters. 32 unless given.",
        rich_help_panel=ROTATIONS,
        show_default=False,
    ),
]
Order = Annotated[
    int | None,
    typer.Option(
        help="All but goft, qgoft and hra: order k of the Cayley–Neumann series; even orders stay "
        "closer to orthogonal. 4 unless given.",
        rich_help_panel=ROTATIONS,
        show_default=False,
    ),
]
Exact = Annotated[
    bool,
    typer.Option(
        "--exact",
        help="All but goft, qgoft and hra: the exact Cayley transform instead of the series: "
        "slower, always orthogonal.",
        rich_help_panel=ROTATIONS,
    ),
]
Guard = Annotated[
    Literal["none", "rescale", "exact"],
    typer.Option(
        help="All but goft, qgoft and hra: what happens as ‖Q‖ nears 1, beyond which the series "
        "means nothing: only warn, or from 0.9 on shrink Q back, or use the exact transform there.",
        rich_help_panel=ROTATIONS,
    ),
]
ShareBlocks = Annotated[
    bool,
    typer.Option(
        "--share-blocks",
        help="oft, coft, boft: one block's parameters for all blocks of a layer.",
        rich_help_panel=ROTATIONS,
    ),
]
Dropout = Annotated[
    float | None,
    typer.Option(
        help="oft, coft, boft: how likely a block rests in a training step. 0 unless given.",
        rich_help_panel=ROTATIONS,
        show_default=False,
    ),
]
Eps = Annotated[
    float | None,
    typer.Option(
        help="coft: ‖Q‖ that a layer may reach. 1 unless given.",
        rich_help_panel=ROTATIONS,
        show_default=False,
    ),
]
Factors = Annotated[
    int | None,
    typer.Option(
        help="boft: how many block rotations are multiplied. 2 unless given.",
        rich_help_panel=ROTATIONS,
        show_default=False,
    ),
]
Scale = Annotated[
    bool,
    typer.Option(
        "--scale",
        help="goft, qgoft: a factor for each coordinate besides.",
        rich_help_panel=ROTATIONS,
    ),
]
Rank = Annotated[
    int | None,
    typer.Option(
        help="hra: how many reflections, an even number; 8 unless given. psoft, loft: how many "
        "directions; 64 unless given.",
        rich_help_panel=ROTATIONS,
        show_default=False,
    ),
]
Weight = Annotated[
    float | None,
    typer.Option(
        help="qgoft, hra: weight of the regulariser in the loss. 0.01 and 0 unless given.",
        rich_help_panel=ROTATIONS,
        show_default=False,
    ),
]
Support = Annotated[
    Literal["skew", "gradient", "principal", "random", "coordinate"] | None,
    typer.Option(
        help="loft: which directions. The first two follow the loss's gradient on a few blocks of "
        "the training text. skew unless given.",
        rich_help_panel=ROTATIONS,
        show_default=False,
    ),
]
Core = Annotated[
    Literal["orthogonal", "free"] | None,
    typer.Option(
        help="loft: whether the directions are rotated or mapped freely. orthogonal unless given.",
        rich_help_panel=ROTATIONS,
        show_default=False,
    ),
]
Strict = Annotated[
    bool,
    typer.Option(
        "--strict",
        help="psoft: rotations alone, without the two vectors of scales.",
        rich_help_panel=ROTATIONS,
    ),
]
Targets = Annotated[
    list[str] | None,
    typer.Option(
        help="A layer name such as q_proj, or a regex over the whole name; repeat it for more. "
        "Without it, every linear layer but the output head.",
        rich_help_panel=ROTATIONS,
        show_default=False,
    ),
]
ShareInputs = Annotated[
    bool,
    typer.Option(
        "--share-inputs",
        help="One rotation for all layers that read the same tensor, as q, k and v do.",
        rich_help_panel=ROTATIONS,
    ),
]
Out = Annotated[
    Path,
    typer.Option(
        help="Directory to write. It appears when everything succeeded.", rich_help_panel=OUTPUT
    ),
]
Force = Annotated[
    bool,
    typer.Option(
        "--force", help="Replace an earlier result of oftfx at --out.", rich_help_panel=OUTPUT
    ),
]


@app.callback()
def root() -> None:
    """Orthogonal finetuning (OFT) for any PyTorch model.

    Train small rotations of a frozen model's layer inputs, then fold them into the weights.

    **oftfx finetune** trains, measures, folds and checks · **oftfx plan** shows what would be
    trained · **oftfx merge** folds a saved adapter.

    Exit codes: 0 done · 1 the merged model disagrees with the trained one · 2 bad input, with
    nothing written.
    """


@app.command()
def finetune(
    model: Annotated[
        str,
        typer.Option(help="A model directory, a Hub id or a .gguf file.", show_default=False),
    ],
    data: Annotated[
        str,
        typer.Option(
            help="A text file, a .jsonl file with a text field, or a Hub dataset id.",
            show_default=False,
        ),
    ],
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
        float,
        typer.Option(
            help="Peak learning rate. Higher learns more of the task and forgets more of the rest.",
            rich_help_panel=TRAINING,
        ),
    ] = 3e-4,
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16", "float16"],
        typer.Option(
            help="Of the frozen weights; auto keeps the stored one.", rich_help_panel=TRAINING
        ),
    ] = "auto",
    seed: Annotated[
        int, typer.Option(help="Of the block order and the samples.", rich_help_panel=TRAINING)
    ] = 0,
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
        typer.Option(help="Tokens of each text to measure on, at most.", rich_help_panel=MEASURING),
    ] = 8192,
    prompt: Annotated[
        str | None,
        typer.Option(
            help="What to continue before and after training.",
            rich_help_panel=MEASURING,
            show_default=False,
        ),
    ] = None,
    method: Method = "oft",
    block_size: BlockSize = None,
    order: Order = None,
    exact: Exact = False,
    guard: Guard = "none",
    share_blocks: ShareBlocks = False,
    dropout: Dropout = None,
    eps: Eps = None,
    factors: Factors = None,
    scale: Scale = False,
    rank: Rank = None,
    weight: Weight = None,
    support: Support = None,
    core: Core = None,
    strict: Strict = False,
    targets: Targets = None,
    share_inputs: ShareInputs = False,
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
    """
    from oftfx.train import Job, run, show

    console = _console()
    job = Job(
        model=model,
        data=data,
        out=out,
        spec=_spec(
            method,
            block_size=block_size,
            order=order,
            exact=exact,
            guard=guard,
            share_blocks=share_blocks,
            dropout=dropout,
            eps=eps,
            factors=factors,
            scale=scale,
            rank=rank,
            weight=weight,
            support=support,
            core=core,
            strict=strict,
            targets=targets,
            share_inputs=share_inputs,
        ),
        held_out=_fraction_or_source(held_out),
        unrelated=unrelated,
        steps=steps,
        batch_size=batch_size,
        seq_len=seq_len,
        lr=lr,
        eval_tokens=eval_tokens,
        prompt=prompt,
        merge=merge,
        dtype=dtype,
        seed=seed,
        force=force,
    )
    report = run(job, console)
    show(report, out, console)
    if report.reload and not report.reload.agrees:
        raise typer.Exit(1)


@app.command()
def plan(
    model: Annotated[str, typer.Argument(help="A model directory, a Hub id or a .gguf file.")],
    json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
    method: Method = "oft",
    block_size: BlockSize = None,
    order: Order = None,
    exact: Exact = False,
    guard: Guard = "none",
    share_blocks: ShareBlocks = False,
    dropout: Dropout = None,
    eps: Eps = None,
    factors: Factors = None,
    scale: Scale = False,
    rank: Rank = None,
    weight: Weight = None,
    support: Support = None,
    core: Core = None,
    strict: Strict = False,
    targets: Targets = None,
    share_inputs: ShareInputs = False,
) -> None:
    """Show what would be adapted: layers, parameters, and what is skipped and why.

    Reads the model's configuration only, so a 7B model takes no memory and no download of weights.

    **Examples**

    `oftfx plan ./my-model`

    `oftfx plan org/name --block-size 64 --targets q_proj --targets v_proj --json`
    """
    import oftfx
    from oftfx.train import models
    from oftfx.train.progress import stage

    spec = _spec(
        method,
        block_size=block_size,
        order=order,
        exact=exact,
        guard=guard,
        share_blocks=share_blocks,
        dropout=dropout,
        eps=eps,
        factors=factors,
        scale=scale,
        rank=rank,
        weight=weight,
        support=support,
        core=core,
        strict=strict,
        targets=targets,
        share_inputs=share_inputs,
    )
    with stage(_console(stderr=True), "Planning"):
        found = oftfx.plan(models.load_skeleton(model), spec)
    print(found.to_json() if json else found)


@app.command()
def merge(
    base: Annotated[
        str,
        typer.Argument(help="The model the adapter was trained on: a directory, Hub id or .gguf."),
    ],
    adapter: Annotated[Path, typer.Argument(help="An adapter directory.")],
    out: Out,
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16", "float16"],
        typer.Option(help="Of the model; auto keeps the stored one.", rich_help_panel=OUTPUT),
    ] = "auto",
    force: Force = False,
) -> None:
    """Fold a saved adapter into its base: an ordinary model directory that needs no oftfx.

    **Example**

    `oftfx merge ./my-model tuned/adapter --out merged`
    """
    import oftfx
    from oftfx.train import models, publish
    from oftfx.train.output import MARKER, staged
    from oftfx.train.progress import stage

    console = _console()
    with staged(out, force) as fresh:
        with stage(console, "Loading the model"):
            model, tokenizer = models.load(base, dtype)
            oftfx.load(model, adapter)
        with stage(console, "Folding"):
            report = publish.publish(model, tokenizer, fresh)
            record = {"version": oftfx.__version__, "base": base, "adapter": str(adapter)}
            (fresh / MARKER).write_text(dumps(record, indent=1) + "\n")
    worst = max(report.sites, key=lambda site: site.output_error)
    console.print(
        f"{len(report.sites)} rotations folded; a layer's output changed by at most "
        f"{worst.output_error:.1e} of itself ({worst.fqn})"
    )
    console.print(f"merged model  {out}")


def main() -> None:
    """Runs the command; errors raised on purpose become one message and exit code 2."""
    # A job that is told to stop cleans up as it does when interrupted from the keyboard.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        app()
    except OftfxError as error:
        from rich.text import Text

        message = Text.assemble(("error: ", "bold red"), str(error))
        _console(stderr=True).print(message, soft_wrap=True)
        sys.exit(2)


def _console(stderr: bool = False) -> "Console":
    """A console, with the libraries underneath asked not to draw bars of their own."""
    import datasets
    from rich.console import Console
    from transformers.utils import logging

    datasets.disable_progress_bars()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    return Console(stderr=stderr, highlight=False)


_OPPOSITES = {"strict": "relaxed"}
"""Flags that switch a field off."""


def _spec(method: str, **given: Any) -> "oftfx.Spec":
    """The spec of a method from the options; None, False and "none" are those not given.

    Raises:
        SpecError: An option belongs to another method, or its value is out of range.
    """
    from oftfx.errors import SpecError
    from oftfx.spec import METHODS

    cls = METHODS[method.upper()]
    known = {field.name for field in dataclasses.fields(cls)}
    fields = {
        key: value
        for key, value in given.items()
        if not (value is None or value is False or value == "none")
    }
    for key in fields:
        if _OPPOSITES.get(key, key) not in known:
            option = key.replace("_", "-")
            raise SpecError(f"--{option} is no option of --method {method}.")
    for option in fields.keys() & _OPPOSITES.keys():
        fields[_OPPOSITES[option]] = not fields.pop(option)
    return cls(**fields)


def _fraction_or_source(value: str) -> float | str:
    try:
        return float(value)
    except ValueError:
        return value


if __name__ == "__main__":
    main()
