"""The commands of `layerwise`, and their exit codes: 0 good, 1 looked and it is bad, 2 wrong usage."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Annotated, Any, TypeVar

import typer

from layerwise_dist._version import __version__
from layerwise_dist.cli import bench, console, doctoring, listing, selftesting, showing, verifying
from layerwise_dist.cli.catalogue import Catalogue, WrongUsage
from layerwise_dist.errors import ConfigError, LayerwiseError, shown

T = TypeVar("T")

Dir = Annotated[str, typer.Argument(metavar="DIR", help="A checkpoint directory: the `dir` of the configuration.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of tables.")]
Step = Annotated[int | None, typer.Option("--step", metavar="N", min=0, help="The checkpoint of this step.")]

app = typer.Typer(add_completion=False, no_args_is_help=True, rich_markup_mode=None, pretty_exceptions_enable=False)
app.add_typer(bench.app, name="bench")


@app.callback(invoke_without_command=True)
def layerwise(
    context: typer.Context, version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False
) -> None:
    """Looks at checkpoint directories of layerwise_dist, and at machines.

    Exit code: 0 all is well, 1 looked and it is bad (something is damaged, a disk is unfit), 2 wrong usage.
    """
    if version:
        print(__version__)
        raise typer.Exit


@app.command("ls")
def ls(directory: Dir, json: Json = False) -> None:
    """Lists the checkpoints, newest first, and which of them restore chooses from."""
    _finish(lambda catalogue: listing.ls(catalogue), directory, json)


@app.command("show")
def show(
    directory: Dir,
    step: Step = None,
    everything: Annotated[bool, typer.Option("--all", help="List every tensor and every shard.")] = False,
    json: Json = False,
) -> None:
    """Shows one checkpoint: its manifest, its shards and its tensors. Without --step, the one restore would choose."""
    _finish(lambda catalogue: showing.show(catalogue, step, everything), directory, json)


@app.command("verify")
def verify(directory: Dir, step: Step = None, json: Json = False) -> None:
    """Reads every block of every checkpoint, or of one step's, and names the file, tensor and block of each damage."""
    _finish(lambda catalogue: verifying.verify(catalogue, step), directory, json)


@app.command("import")
def import_(
    source: Annotated[str, typer.Argument(metavar="SOURCE", help="A file or a folder that another tool has written.")],
    directory: Annotated[str, typer.Argument(metavar="DIR", help="A new directory, or one without checkpoints.")],
    allow_pickle: Annotated[
        bool, typer.Option("--allow-pickle", help="Read pickles, by an unpickler that runs nothing.")
    ] = False,
    step: Annotated[
        int | None, typer.Option("--step", metavar="N", min=0, help="What the checkpoint is called; else as it says.")
    ] = None,
    tag: Annotated[str | None, typer.Option("--tag", metavar="NAME", help="A name for the checkpoint.")] = None,
    source_tag: Annotated[
        str | None, typer.Option("--source-tag", metavar="TAG", help="Which of DeepSpeed's; else its latest.")
    ] = None,
    optimizer: Annotated[
        str | None, typer.Option("--optimizer", metavar="CLASS", help="Its class, where the source does not say.")
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
    """Makes another tool's checkpoint the first one of DIR: restore() goes on from it, with optimizer state.

    SOURCE is a folder of torch.distributed.checkpoint, safetensors (a file, or a folder as transformers has it), a file
    of torch.save, or DeepSpeed's own checkpoint (ZeRO 1 to 3, any number of ranks; DeepSpeed need not be installed).
    What cannot be carried over is listed. Nothing is ever overwritten, and what fails leaves no checkpoint.

    All but safetensors are pickles. With --allow-pickle they are read by an unpickler that runs nothing: it takes
    tensors, plain values, and a fixed list of names, of which it makes nothing; any other name is an error.

    layerwise import ds_checkpoints run --allow-pickle --optimizer AdamW
    """
    from layerwise_dist.cli import importing

    def look() -> console.Answer:
        return importing.import_checkpoint(
            source, directory, names=names, allow_pickle=allow_pickle, step=step, tag=tag, source_tag=source_tag,
            optimizer=optimizer, buffers=tuple(buffer or ()), drop=tuple(drop or ()),
        )  # fmt: skip

    _answer(look, json)


@app.command("doctor")
def doctor(
    directory: Annotated[str, typer.Argument(metavar="DIR", help="Where checkpoints are, or will be.")],
    config: Annotated[
        str | None, typer.Option("--config", metavar="FILE", help="The job's configuration; DIR goes before its dir.")
    ] = None,
    state_bytes: Annotated[
        str | None, typer.Option("--state-bytes", metavar="SIZE", help="Bytes of one checkpoint of all ranks: 1.2G.")
    ] = None,
    params: Annotated[
        str | None, typer.Option("--params", metavar="N", help="The same by parameters, float32 with AdamW: 98M.")
    ] = None,
    nbytes: Annotated[
        str | None, typer.Option("--bytes", metavar="SIZE", help="Data of one measurement; without it, 268 MB.")
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Little data and few rounds: a rough look.")] = False,
    json: Json = False,
) -> None:
    """Looks whether a directory is fit for checkpoints: file system, space, flushes, speed; says what to change.

    Measures in a folder of its own below DIR, and removes it.
    """

    def look() -> console.Answer:
        return doctoring.doctor(
            directory, config=config, state_bytes=state_bytes, params=params, nbytes=nbytes, quick=quick
        )

    _answer(look, json)


@app.command("selftest")
def selftest(
    directory: Annotated[str, typer.Argument(metavar="[DIR]", help="On the disk that checkpoints go to.")] = ".",
    seed: Annotated[int | None, typer.Option("--seed", help="Of the step at which the job is killed.")] = None,
    json: Json = False,
) -> None:
    """Does it work on this machine? Trains on two ranks, kills the job, resumes it, and compares every bit.

    Takes under a minute, in a folder of its own below DIR, which is removed.
    """
    _answer(lambda: selftesting.selftest(directory, seed=seed), json)


def _finish(command: Callable[[Catalogue], console.Answer], directory: str, json: bool) -> None:
    _answer(lambda: command(Catalogue(directory)), json)


def _answer(command: Callable[[], console.Answer], json: bool) -> None:
    try:
        answer = command()
    except (WrongUsage, ConfigError) as error:
        raise _failed(str(error), 2, json) from None
    except LayerwiseError as error:
        raise _failed(str(error), 1, json) from None
    except OSError as error:
        raise _failed(f"cannot read: {error}", 2, json) from None
    console.put(answer, json)
    raise typer.Exit(0 if answer.good else 1)


def _failed(message: str, code: int, json: bool) -> typer.Exit:
    if json:
        console.put_json({"error": message})
    else:
        print(f"layerwise: {shown(message)}", file=sys.stderr)
    return typer.Exit(code)


def main() -> Any:
    """The console script."""
    try:
        app()
    except BrokenPipeError:
        # The reader (head, less) has seen enough; nothing may be flushed to it at exit.
        sys.stdout = None
        raise SystemExit(0) from None
