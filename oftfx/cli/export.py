"""``oftfx export``."""

from typing import Annotated, Literal

import typer

from oftfx.cli.console import console
from oftfx.cli.options import Dtype, Force, Out, ShardSize
from oftfx.cli.saved import Adapter, Base, opened, tell_cost
from oftfx.errors import SpecError

PROGRAM = "model.pt2"
"""The file of ``--format pt2`` and ``--format aoti``, beside the tokenizer's."""


def export(
    base: Base,
    adapter: Adapter,
    out: Out,
    format: Annotated[
        Literal["hf", "peft", "lora", "pt2", "aoti"],
        typer.Option(
            help="The merged model as a directory (hf), the adapter for HF PEFT (peft) or as LoRA "
            "(lora), or the model as a torch.export program (pt2) or compiled for this CPU (aoti)."
        ),
    ],
    rank: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="lora: of its factors. The method's own unless given; oft, coft, boft and goft "
            "have none.",
            show_default=False,
        ),
    ] = None,
    adapted: Annotated[
        bool,
        typer.Option(
            "--adapted",
            help="pt2, aoti: keep the rotations apart from the weights, which are then not rounded "
            "again.",
        ),
    ] = False,
    cache: Annotated[
        int | None,
        typer.Option(
            min=2,
            help="pt2, aoti: one step of generation instead, with a static key-value cache of this "
            "many positions inside.",
            show_default=False,
        ),
    ] = None,
    shard_size: ShardSize = None,
    dtype: Dtype = "auto",
    force: Force = False,
) -> None:
    """Write a saved adapter and its base in the form that something else loads.

    **Examples**

    `oftfx export ./my-model tuned/adapter --out merged --format hf`

    `oftfx export ./my-model tuned/adapter --out as-lora --format lora --rank 32`

    `oftfx export ./my-model tuned/adapter --out program --format pt2`

    `oftfx export ./my-model tuned/adapter --out package --format aoti --cache 2048`
    """
    for option, given, formats in (
        ("--rank", rank, ("lora",)),
        ("--adapted", adapted, ("pt2", "aoti")),
        ("--cache", cache, ("pt2", "aoti")),
        ("--shard-size", shard_size, ("hf",)),
    ):
        if given and format not in formats:
            raise SpecError(f"{option} is no option of --format {format}.")
    screen = console()
    import oftfx
    from oftfx.train.progress import stage
    from oftfx.train.publish import publish

    folded = lora = None
    with opened(base, adapter, out, dtype, force, screen) as (loaded, fresh):
        model, tokenizer = loaded
        if format == "hf":
            with stage(screen, "Folding"):
                folded = publish(model, tokenizer, fresh, dtype, shard_size)
        elif format == "peft" or format == "lora":
            with stage(screen, "Converting"):
                lora = oftfx.save(model, fresh, format=format, rank=rank)
        else:
            if not adapted:
                with stage(screen, "Folding"):
                    model, folded = oftfx.merge(model, report=True)
            with stage(screen, "Exporting" if format == "pt2" else "Compiling"):
                oftfx.export(model, fresh / PROGRAM, format=format, cache=cache)
                tokenizer.save_pretrained(fresh)
    if folded:
        tell_cost(folded, screen)
    if lora:
        worst = max(lora.sites, key=lambda site: site.error)
        screen.print(
            f"LoRA of {len(lora.sites)} layers; lost at most {worst.error:.1%} of a "
            f"layer's change ({worst.fqn})"
        )
    screen.print(f"{format} written  {out}")
