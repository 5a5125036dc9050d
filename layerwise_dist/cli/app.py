# SPDX-License-Identifier: Apache-2.0
"""The commands of `layerwise`. Exit codes: 0 good, 1 something is bad, 2 wrong usage."""

from __future__ import annotations

import sys
from typing import Annotated, Any

import typer

from layerwise_dist._version import __version__
from layerwise_dist.cli import (
    bench,
    console,
    copying,
    doctoring,
    exporting,
    listing,
    observing,
    pinning,
    pruning,
    rehearsal,
    selftesting,
    showing,
    tuning,
    verifying,
)
from layerwise_dist.cli import tensors as listed
from layerwise_dist.cli.catalogue import Catalogue, WrongUsage
from layerwise_dist.cli.running import Dir, Json, Step, Tag, finish, give
from layerwise_dist.errors import LayerwiseError

app = typer.Typer(add_completion=False, no_args_is_help=True, rich_markup_mode=None, pretty_exceptions_enable=False)
app.add_typer(bench.app, name="bench")
app.command("watch")(observing.watch)
app.command("report")(observing.report)


@app.callback(invoke_without_command=True)
def layerwise(
    context: typer.Context, version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False
) -> None:
    """Inspect and maintain checkpoint directories of layerwise_dist; check machines.

    Exit code: 0 all is well, 1 something is damaged or unfit, 2 wrong usage.
    """
    if version:
        print(__version__)
        raise typer.Exit


@app.command("ls")
def ls(directory: Dir, json: Json = False) -> None:
    """List the checkpoints, newest first.

    Marks those that restore may choose.
    """
    finish(lambda catalogue: listing.ls(catalogue), directory, json)


@app.command("show")
def show(
    directory: Dir,
    step: Step = None,
    tag: Tag = None,
    tensors: Annotated[
        bool, typer.Option("--tensors", help="List only tensors, all or those matching PATTERN, and where they are.")
    ] = False,
    pattern: Annotated[
        str | None,
        typer.Argument(
            metavar="[PATTERN]", help="With --tensors: names, with * and ?, such as 'exp_avg/*' or '*.bias'."
        ),
    ] = None,
    values: Annotated[bool, typer.Option("--values", help="With --tensors: read them, and count NaN and Inf.")] = False,
    everything: Annotated[bool, typer.Option("--all", help="List every tensor and every shard.")] = False,
    json: Json = False,
) -> None:
    """Show one checkpoint: manifest, shards, tensors.

    Without --step or --tag, the one that restore would choose.

    Example: layerwise show checkpoints --tensors 'exp_avg/*' --values
    """

    def run(catalogue: Catalogue) -> console.Answer:
        if tensors:
            return listed.tensors(catalogue, step, tag, pattern, values)
        if pattern is not None or values:
            raise WrongUsage("PATTERN and --values need --tensors")
        return showing.show(catalogue, step, everything, tag)

    finish(run, directory, json)


@app.command("verify")
def verify(directory: Dir, step: Step = None, tag: Tag = None, json: Json = False) -> None:
    """Read every byte and name what is damaged.

    Of every checkpoint, or of one. Damage is named by file, tensor and block.
    """
    finish(lambda catalogue: verifying.verify(catalogue, step, tag), directory, json)


@app.command("diff")
def diff(
    one: Annotated[str, typer.Argument(metavar="A", help="A checkpoint directory, or a file of weights.")],
    other: Annotated[
        str | None, typer.Argument(metavar="[B]", help="What to compare it with; default: A again.")
    ] = None,
    step: Annotated[
        list[int] | None, typer.Option("--step", metavar="N", min=0, help="Step of A; given twice, of A and of B.")
    ] = None,
    tag: Annotated[
        list[str] | None, typer.Option("--tag", metavar="TAG", help="The same by tag; steps count first.")
    ] = None,
    everything: Annotated[bool, typer.Option("--all", help="List every tensor that differs.")] = False,
    allow_pickle: Annotated[
        bool,
        typer.Option(
            "--allow-pickle", help="Read DCP's and DeepSpeed's own folders, with an unpickler that runs nothing."
        ),
    ] = False,
    json: Json = False,
) -> None:
    """Compare two checkpoints, tensor by tensor.

    Says which tensors differ, in how many elements and how far, whatever number of ranks wrote each side. The distance
    is given in the values' own unit, and in ULPs: 1 means neighboring floating-point numbers. A or B may be a
    .safetensors or torch.save file (read without running code), or a Hugging Face, DCP or DeepSpeed folder: then
    tensors are compared by state_dict name. Exit code: 0 equal, 1 different or damaged, 2 wrong usage.

    Example: layerwise diff checkpoints --step 100 --step 200
    """

    def run() -> console.Answer:
        from layerwise_dist.cli.diffing import diff  # torch comes along

        return diff(one, other, step or [], tag or [], everything, allow_pickle)

    give(run, json)


@app.command("pin")
def pin(directory: Dir, step: Step = None, tag: Tag = None, json: Json = False) -> None:
    """Keep one checkpoint, whatever retention would do.

    A running job heeds it, and so does layerwise prune. A pinned checkpoint has a file `pinned` in its folder, and
    layerwise ls shows it.

    Example: layerwise pin checkpoints --step 12000
    """
    finish(lambda catalogue: pinning.pin(catalogue, step, tag, keep=True), directory, json, "pin")


@app.command("unpin")
def unpin(directory: Dir, step: Step = None, tag: Tag = None, json: Json = False) -> None:
    """Take a pin back.

    From now on retention may remove the checkpoint.

    Example: layerwise unpin checkpoints --step 12000
    """
    finish(lambda catalogue: pinning.pin(catalogue, step, tag, keep=False), directory, json, "unpin")


@app.command("prune")
def prune(
    directory: Dir,
    keep_last: Annotated[
        int | None, typer.Option("--keep-last", metavar="N", min=1, help="Keep this many of the newest checkpoints "
        "of the lineage.")
    ] = None,
    keep_every: Annotated[
        int | None, typer.Option("--keep-every", metavar="N", min=1, help="Also keep multiples of this step.")
    ] = None,
    tags: Annotated[
        int | None,
        typer.Option(
            "--tags", metavar="N", min=1,
            help="Of tags that differ only in their digits, such as DeepSpeed's global_step100, keep the newest N. "
            "Default: the newest checkpoint under each tag.",
        ),
    ] = None,
    config: Annotated[
        str | None, typer.Option("--config", metavar="FILE", help="Take these from a job's configuration file.")
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", help="Remove them. Without it, only list them.")] = False,
    json: Json = False,
) -> None:  # fmt: skip
    """Remove old checkpoints where no job runs.

    Applies the rules of a job's own retention. Lists what would be removed, and removes nothing without --yes. What
    always stays: the lineage's newest, pinned and open checkpoints, other lineages, everything older than a damaged
    checkpoint, and frozen parameters that a checkpoint refers to. Refused while a job writes here; a job that starts
    meanwhile waits.

    Example: layerwise prune checkpoints --keep-last 3 --keep-every 1000 --yes
    """

    def run(catalogue: Catalogue) -> console.Answer:
        return pruning.prune(catalogue, pruning.kept(config, keep_last, keep_every, tags, certain=yes), yes=yes)

    finish(run, directory, json, "prune")


@app.command("cp")
def cp(
    directory: Dir,
    out: Annotated[str, typer.Argument(metavar="OUT", help="The new directory; it must not exist yet.")],
    step: Step = None,
    tag: Tag = None,
    json: Json = False,
) -> None:
    """Copy one checkpoint into a new directory.

    With all that it needs, so that restore() can continue from the copy. Without --step or --tag, the one that restore
    would choose. Everything is flushed, read back and compared before the copy counts as a checkpoint; a failed or
    interrupted copy leaves nothing. A pin is not copied. A job may run in DIR meanwhile.

    Example: layerwise cp checkpoints /archive/best --tag best
    """
    finish(lambda catalogue: copying.copy(catalogue, out, step, tag), directory, json, "copy")


@app.command("import")
def import_(
    source: Annotated[str, typer.Argument(metavar="SOURCE", help="A file or folder written by another tool.")],
    directory: Annotated[str, typer.Argument(metavar="DIR", help="A new directory, or one without checkpoints.")],
    allow_pickle: Annotated[
        bool, typer.Option("--allow-pickle", help="Read pickles, with an unpickler that runs nothing.")
    ] = False,
    step: Annotated[
        int | None,
        typer.Option("--step", metavar="N", min=0, help="Step of the new checkpoint; default: the source's."),
    ] = None,
    tag: Annotated[str | None, typer.Option("--tag", metavar="NAME", help="A name for the checkpoint.")] = None,
    source_tag: Annotated[
        str | None, typer.Option("--source-tag", metavar="TAG", help="DeepSpeed tag to read; default: its latest.")
    ] = None,
    optimizer: Annotated[
        str | None,
        typer.Option("--optimizer", metavar="CLASS", help="The optimizer's class, if the source does not say."),
    ] = None,
    names: Annotated[
        str | None, typer.Option("--names", metavar="FILE", help="Parameters in the optimizer's order, one a line.")
    ] = None,
    buffer: Annotated[
        list[str] | None, typer.Option("--buffer", metavar="PATTERN", help="Names of the model that are buffers.")
    ] = None,
    drop: Annotated[
        list[str] | None, typer.Option("--drop", metavar="NAME", help="Leave this object of the source out.")
    ] = None,
    json: Json = False,
) -> None:
    """Turn another tool's checkpoint into one of ours.

    It becomes the first checkpoint of DIR, and restore() continues from it, with optimizer state. SOURCE is a
    torch.distributed.checkpoint folder, safetensors (a file, or a folder as transformers has it), a torch.save file, or
    DeepSpeed's own checkpoint (ZeRO 1 to 3, any number of ranks; DeepSpeed need not be installed). What cannot be
    carried over is listed. Nothing is overwritten, and a failed import leaves no checkpoint.

    All but safetensors are pickles. With --allow-pickle they are read with an unpickler that runs nothing: it accepts
    tensors, plain values, and a fixed list of other names, which stay inert; any other name is an error.

    Example: layerwise import ds_checkpoints run --allow-pickle --optimizer AdamW
    """
    from layerwise_dist.cli import importing

    def look() -> console.Answer:
        return importing.import_checkpoint(
            source, directory, names=names, allow_pickle=allow_pickle, step=step, tag=tag, source_tag=source_tag,
            optimizer=optimizer, buffers=tuple(buffer or ()), drop=tuple(drop or ()),
        )  # fmt: skip

    give(look, json, "import", bad=LayerwiseError)


@app.command("export")
def export(
    directory: Dir,
    out: Annotated[
        str, typer.Argument(metavar="OUT", help="A folder, or a file with --format torch; it must not exist yet.")
    ],
    step: Step = None,
    tag: Tag = None,
    model: Annotated[str | None, typer.Option("--model", metavar="NAME", help="Which of several models.")] = None,
    kind: Annotated[str, typer.Option("--format", metavar="hf|dcp|torch", help="See above.")] = "hf",
    dtype: Annotated[
        str | None, typer.Option("--dtype", metavar="fp32|bf16|fp16", help="Round the model's floats to this type.")
    ] = None,
    rename: Annotated[
        list[str] | None, typer.Option("--rename", metavar="OLD=NEW", help="Rename a prefix of names; repeatable.")
    ] = None,
    max_shard_size: Annotated[
        str, typer.Option("--max-shard-size", metavar="SIZE", help="Largest size of a file, with --format hf.")
    ] = "5GB",
    like: Annotated[
        str | None, typer.Option("--like", metavar="MODEL_DIR", help="Copy configuration and tokenizer from there.")
    ] = None,
    weights_only: Annotated[bool, typer.Option("--weights-only", help="Leave the optimizer out.")] = False,
    json: Json = False,
) -> None:
    """Write a checkpoint for other tools.

    Without --step or --tag, the newest.

    hf: safetensors with an index, for from_pretrained() and vLLM; weights only.

    dcp: torch.distributed.checkpoint, named as get_state_dict() does: dcp.load() reads model and optimizer into any
    layout.

    torch: one file for torch.load(): {"model": ..., "optimizer": ...}, both for load_state_dict(). It is built in
    memory; the others need little memory, however large the model is.

    A ZeRO run gives its fp32 weights. OUT is flushed and read back before it gets its name, and never overwritten; an
    interrupted command leaves nothing. A running job keeps the checkpoint meanwhile.
    """
    give(
        lambda: exporting.export(
            directory, out, step=step, tag=tag, model=model, kind=kind, dtype=dtype, rename=rename or [],
            max_shard_size=max_shard_size, like=like, weights_only=weights_only,
        ),
        json, "export",
    )  # fmt: skip


@app.command("doctor")
def doctor(
    directory: Annotated[str, typer.Argument(metavar="DIR", help="Where checkpoints are, or will be.")],
    config: Annotated[
        str | None, typer.Option("--config", metavar="FILE", help="The job's configuration; DIR overrides its dir.")
    ] = None,
    state_bytes: Annotated[
        str | None,
        typer.Option("--state-bytes", metavar="SIZE", help="Size of one checkpoint, all ranks together, such as 1.2G."),
    ] = None,
    params: Annotated[
        str | None,
        typer.Option(
            "--params", metavar="N", help="The same from a number of parameters (float32, AdamW), such as 98M."
        ),
    ] = None,
    nbytes: Annotated[
        str | None, typer.Option("--bytes", metavar="SIZE", help="Data per measurement; default: 268 MB.")
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Little data and few rounds: rough figures.")] = False,
    json: Json = False,
) -> None:
    """Check whether a directory is fit for checkpoints.

    Examines file system, space, flushes and speed, and says what to change. Measures in a folder of its own below DIR,
    and removes it.
    """

    def look() -> console.Answer:
        return doctoring.doctor(
            directory, config=config, state_bytes=state_bytes, params=params, nbytes=nbytes, quick=quick
        )

    give(look, json)


app.command("tune")(tuning.command)


@app.command("selftest")
def selftest(
    directory: Annotated[str, typer.Argument(metavar="[DIR]", help="A directory on the disk for checkpoints.")] = ".",
    seed: Annotated[int | None, typer.Option("--seed", help="Of the step at which the job is killed.")] = None,
    json: Json = False,
) -> None:
    """Check that it works on this machine.

    Trains on two ranks, kills the job, resumes it, and compares every bit. Takes under a minute, in a folder of its own
    below DIR, which is removed.
    """
    give(lambda: selftesting.selftest(directory, seed=seed), json)


app.command("rehearse")(rehearsal.rehearse)


def main() -> Any:
    """The console script."""
    try:
        app()
    except BrokenPipeError:
        # The reader (head, less) has seen enough; nothing may be flushed to it at exit.
        sys.stdout = None
        raise SystemExit(0) from None
