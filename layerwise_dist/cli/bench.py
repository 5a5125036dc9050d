# SPDX-License-Identifier: Apache-2.0
"""`layerwise bench`: the package's benchmarks. Progress goes to standard error, the answer to standard output."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from layerwise_dist.cli import lists
from layerwise_dist.cli.measuring import (
    BlockKb,
    Depth,
    Dir,
    Json,
    Markdown,
    Params,
    Quick,
    Rounds,
    finish,
    model_of,
    one_of,
)
from layerwise_dist.units import parse_seconds

if TYPE_CHECKING:
    from layerwise_dist.bench.figures import Findings

app = typer.Typer(no_args_is_help=True, rich_markup_mode=None)


@app.callback()
def bench() -> None:
    """Measure what checkpoints cost on this machine.

    Each figure is a ratio of things done in turn within one run. Exit code: 0 measured, 1 something failed while
    measuring, 2 wrong usage (too little space included).
    """


@app.command("writer")
def writer(
    directory: Dir,
    sizes: Annotated[str, typer.Option("--sizes", "-s", help="Sizes of a shard.")] = "64M,512M,2G",
    tensors: Annotated[str, typer.Option("--tensors", "-t", help="Numbers of tensors in it.")] = "100,10000",
    backend: Annotated[str, typer.Option("--backend", "-b", help="all, or names as in `writer.backend`.")] = "all",
    rounds: Rounds = 5,
    depth: Depth = 4,
    block_kb: BlockKb = 1024,
    quick: Quick = False,
    json: Json = False,
    markdown: Markdown = False,
) -> None:
    """Durable write throughput of each backend against raw direct writes."""

    def run(command: str) -> Findings:
        from layerwise_dist.bench.writer import WriterBench, run

        asked = WriterBench(
            sizes=lists.sizes(sizes), tensors=lists.numbers(tensors, "--tensors"), backends=lists.words(backend),
            rounds=rounds, depth=depth, block_bytes=block_kb << 10,
        )  # fmt: skip
        if quick:
            asked = WriterBench([4_000_000], [10, 200], asked.backends, 2, depth, 256 << 10)
        return run(asked, directory, command)

    finish(run, json, markdown)


@app.command("train")
def train(
    directory: Dir,
    params: Params = "34M",
    optimizer: Annotated[str, typer.Option("--optimizer", "-o", help="foreach or fused (AdamW).")] = "foreach",
    every: Annotated[
        str | None,
        typer.Option("--every", "-e", help="A checkpoint every so many steps.", show_default="1,10; 1 with --blocks"),
    ] = None,
    ranks: Annotated[
        int | None,
        typer.Option("--ranks", "-r", min=1, help="More than 1: FSDP2 under torchrun. DeepSpeed, --ddp: 2."),
    ] = None,
    deepspeed: Annotated[
        int | None, typer.Option("--deepspeed", metavar="STAGE", help="Train under DeepSpeed, ZeRO stage 2 or 3.")
    ] = None,
    ddp: Annotated[bool, typer.Option("--ddp", help="DDP in place of FSDP2; 2 ranks unless --ranks.")] = False,
    steps: Annotated[
        int | None,
        typer.Option("--steps", "-n", min=1, help="Measured steps a block.", show_default="10; 4 with --blocks"),
    ] = None,
    rounds: Rounds = 5,
    blocks: Annotated[
        int | None,
        typer.Option(
            "--blocks",
            metavar="N",
            min=8,
            help="Tell differences of a hundredth: in place of rounds, N blocks (40, say) of a few steps. Each way to "
            "train is a process of its own; they take turns in a drawn order and rest in between. Ratios of steps "
            "within one block, their median, and its 95 % interval.",
        ),
    ] = None,
    against: Annotated[
        str | None,
        typer.Option(
            "--against",
            metavar="PYTHON",
            help="With --blocks: the interpreter of another installation of this package, to measure beside this one.",
        ),
    ] = None,
    modes: Annotated[
        str | None,
        typer.Option(
            "--modes",
            "-m",
            help="all, or names with commas between them.",
            show_default="all; layerwise with --blocks",
        ),
    ] = None,
    batch: Annotated[int | None, typer.Option("--batch", min=1, help="Windows a step, all ranks together.")] = None,
    context: Annotated[int | None, typer.Option("--context", min=1, help="Bytes in a window.")] = None,
    disk_bound: Annotated[
        bool, typer.Option("--disk-bound", help="Steps much shorter than writing: batch 1 of 16 bytes.")
    ] = False,
    quick: Quick = False,
    json: Json = False,
    markdown: Markdown = False,
) -> None:
    """Step time, stall, memory and time to commit under this engine, torch.save, DCP and others, or DeepSpeed's own."""

    def run(command: str) -> Findings:
        from layerwise_dist.bench.train import TrainBench, run
        from layerwise_dist.bench.train_worker import modes_of

        shape = model_of(params, quick=quick)
        one_of("--optimizer", optimizer, ("foreach", "fused"))
        if deepspeed not in (None, 2, 3):
            raise ValueError(f"--deepspeed {deepspeed}: expected 2 or 3")
        processes = ranks or (2 if ddp or deepspeed is not None else 1)
        if ddp and (deepspeed is not None or processes == 1):
            raise ValueError("--ddp: several ranks, without --deepspeed")
        if disk_bound:
            shape = replace(shape, batch=processes, context=16)
        shape = replace(shape, batch=batch or shape.batch, context=context or shape.context)
        if blocks is not None:
            from layerwise_dist.bench.paired import PairedBench
            from layerwise_dist.bench.paired import run as run_pairs

            (interval, *more), named = lists.numbers(every or "1", "--every"), modes or "layerwise"
            if processes > 1 or deepspeed is not None:
                raise ValueError("--blocks trains in one process each: leave out --ranks and --deepspeed")
            if more or named == "all":
                raise ValueError("--blocks takes one interval (--every 1) and names (--modes layerwise,dcp-async)")
            pairs = PairedBench(
                shape=shape, optimizer=optimizer, every=interval, steps=2 if quick else steps or 4,
                blocks=2 if quick else blocks, modes=lists.words(named), quick=quick, against=against,
            )  # fmt: skip
            return run_pairs(pairs, directory, command)
        if against is not None:
            raise ValueError("--against goes with --blocks")
        chosen = list(modes_of(deepspeed)) if modes is None or modes == "all" else lists.words(modes)
        intervals = lists.numbers(every or "1,10", "--every")
        asked = TrainBench(
            shape=shape, optimizer=optimizer, every=intervals, ranks=processes, modes=chosen,
            steps=2 if quick else steps or 10, rounds=1 if quick else rounds, quick=quick, deepspeed=deepspeed, ddp=ddp,
        )  # fmt: skip
        return run(asked, directory, command)

    finish(run, json, markdown)


@app.command("goodput")
def goodput(
    directory: Dir,
    trace: Annotated[
        str | None, typer.Option("--trace", "-t", help="poisson:TIME (mean distance of kills), or a file of moments.")
    ] = None,
    seconds: Annotated[str, typer.Option("--seconds", metavar="TIME", help="Of each job, restarts included.")] = "5min",
    scale: Annotated[float, typer.Option("--scale", help="Multiplies the moments of a file.")] = 1.0,
    seed: Annotated[int, typer.Option("--seed", help="Of the Poisson process.")] = 0,
    contenders: Annotated[str, typer.Option("--contenders", "-c", help="all, or names with commas.")] = "all",
    params: Params = "34M",
    ranks: Annotated[int, typer.Option("--ranks", "-r", min=1, help="More than 1: FSDP2.")] = 2,
    rounds: Rounds = 3,
    quick: Quick = False,
    json: Json = False,
    markdown: Markdown = False,
) -> None:
    """Useful steps of a job that is killed again and again, over those of one that nothing disturbs.

    All ranks get SIGKILL at the trace's moments and torchrun starts them again: for this engine at every step and at
    `auto`, for DCP async and torch.save each at its best interval (Daly's rule, from costs measured first).

    Example: layerwise bench goodput checkpoints --trace poisson:30s --seconds 5min
    """

    def run(command: str) -> Findings:
        from layerwise_dist.bench.contenders import CONTENDERS
        from layerwise_dist.bench.goodput import GoodputBench, run
        from layerwise_dist.bench.kill_trace import parse

        length = 2.0 if quick and trace is None else parse_seconds(seconds)
        kills = parse(trace or f"poisson:{0.5 if quick else 25}s", seconds=length, scale=scale, seed=seed)
        chosen = list(CONTENDERS) if contenders == "all" else lists.words(contenders)
        asked = GoodputBench(model_of(params, quick=quick), ranks, kills, 1 if quick else rounds, chosen, quick)
        return run(asked, directory, command)

    finish(run, json, markdown)


@app.command("restore")
def restore(
    directory: Dir,
    params: Params = "34M",
    rounds: Rounds = 5,
    depth: Depth = 4,
    block_kb: BlockKb = 1024,
    reshard: Annotated[
        str | None, typer.Option("--reshard", metavar="A:B", help="Saved by A ranks under FSDP2, restored by B.")
    ] = None,
    ranks: Annotated[
        str | None, typer.Option("--ranks", "-r", metavar="N,M", help="attach() and restore() of so many, under FSDP2.")
    ] = None,
    quick: Quick = False,
    json: Json = False,
    markdown: Markdown = False,
) -> None:
    """Restore, cold and warm, against raw reads, torch.load and dcp.load."""

    def run(command: str) -> Findings:
        from layerwise_dist.bench.restore import RestoreBench, run

        shape = model_of(params, quick=quick)
        if reshard is not None and ranks is not None:
            raise ValueError("--reshard and --ranks are two benchmarks: give one of them")
        if reshard is not None:
            from layerwise_dist.bench.reshard import ReshardBench
            from layerwise_dist.bench.reshard import run as run_reshard

            saved, restored = lists.ranks(reshard)
            cut = ReshardBench(shape, rounds=2 if quick else rounds, saved=saved, ranks=restored)
            return run_reshard(cut, directory, command)
        if ranks is not None:
            from layerwise_dist.bench.starts import StartsBench
            from layerwise_dist.bench.starts import run as run_starts

            counts = tuple(dict.fromkeys(lists.numbers(ranks, "--ranks")))
            starts = StartsBench(
                shape, rounds=2 if quick else rounds, ranks=counts, depth=depth, block_bytes=block_kb << 10
            )
            return run_starts(starts, directory, command)
        asked = RestoreBench(shape, rounds=2 if quick else rounds, depth=depth, block_bytes=block_kb << 10)
        return run(asked, directory, command)

    finish(run, json, markdown)


@app.command("export")
def export(
    directory: Dir,
    params: Params = "34M",
    rounds: Rounds = 5,
    quick: Quick = False,
    json: Json = False,
    markdown: Markdown = False,
) -> None:
    """`layerwise export` against dcp_to_torch_save, save_pretrained and zero_to_fp32."""

    def run(command: str) -> Findings:
        from layerwise_dist.bench.export import ExportBench, run

        asked = ExportBench(model_of(params, quick=quick), rounds=2 if quick else rounds)
        return run(asked, directory, command)

    finish(run, json, markdown)


@app.command("loops")
def loops(
    directory: Dir,
    params: Params = "34M",
    which: Annotated[str, typer.Option("--loops", "-l", help="all, or transformers, accelerate, lightning.")] = "all",
    steps: Annotated[int, typer.Option("--steps", "-n", min=1, help="Measured steps a block.")] = 10,
    rounds: Rounds = 5,
    quick: Quick = False,
    json: Json = False,
    markdown: Markdown = False,
) -> None:
    """A checkpoint every step in other packages' loops, against attach() in a loop of one's own.

    About seven minutes a loop on two cores. `--loops accelerate --rounds 3` takes five.
    """

    def run(command: str) -> Findings:
        from layerwise_dist.bench.loops import LoopsBench, installed, run
        from layerwise_dist.bench.loops_worker import LOOPS

        shape = model_of(params, quick=quick)
        chosen = installed(list(LOOPS) if which == "all" else lists.words(which))
        asked = LoopsBench(shape, chosen, steps=2 if quick else steps, rounds=1 if quick else rounds)
        return run(asked, directory, command)

    finish(run, json, markdown)


@app.command("commit")
def commit(
    directory: Dir,
    ranks: Annotated[str, typer.Option("--ranks", "-r", help="Simulated ranks; 0: none.")] = "8,64,512,4096,16384",
    processes: Annotated[str, typer.Option("--processes", "-p", help="Real ranks; 0: none.")] = "2,8,64",
    on_node: Annotated[int, typer.Option("--on-node", min=1, help="Ranks of a node.")] = 8,
    commits: Annotated[int, typer.Option("--commits", "-n", min=1, help="Measured commits a round.")] = 20,
    rounds: Rounds = 5,
    quick: Quick = False,
    json: Json = False,
    markdown: Markdown = False,
) -> None:
    """Time and messages of a commit as the number of ranks grows."""

    def run(command: str) -> Findings:
        from layerwise_dist.bench.commit import CommitBench, run

        simulated = [] if ranks == "0" else lists.numbers(ranks, "--ranks")
        real = [] if processes == "0" else lists.numbers(processes, "--processes")
        if not simulated and not real or min([*simulated, *real]) < 2:
            raise ValueError(
                "--ranks and --processes: expected numbers above 1, such as 8,64; 0 for none of one of them"
            )
        asked = CommitBench(simulated, real, on_node, commits, rounds)
        if quick:
            asked = CommitBench([8, 64], [4], 4, 3, 1)
        return run(asked, directory, command)

    finish(run, json, markdown)


@app.command("layers")
def layers(rounds: Rounds = 9, quick: Quick = False, json: Json = False, markdown: Markdown = False) -> None:
    """Time an optimizer's step as it is, and one layer at a time; writes nothing."""

    def run(command: str) -> Findings:
        from layerwise_dist.bench.layers import LayersBench, Model, run

        return run(LayersBench((Model(4, 8),), 1, 2) if quick else LayersBench(rounds=rounds), command)

    finish(run, json, markdown)


@app.command("trace")
def trace(
    directory: Dir,
    update: Annotated[
        str, typer.Option("--update", "-u", help="whole, pipelined_step or in_backward.")
    ] = "in_backward",
    params: Params = "34M",
    optimizer: Annotated[str, typer.Option("--optimizer", "-o", help="foreach or fused (AdamW).")] = "foreach",
    out: Annotated[str, typer.Option("--out", metavar="FILE", help="Where the trace goes.")] = "trace.json",
    picture: Annotated[
        str | None, typer.Option("--picture", metavar="FILE", help="Draw it too: .png, .svg or .pdf.")
    ] = None,
    quick: Quick = False,
    json: Json = False,
    markdown: Markdown = False,
) -> None:
    """What happens to each layer in one checkpointed step, and when: JSON that Perfetto opens."""

    def run(command: str) -> Findings:
        from layerwise_dist.bench.trace import TraceBench, run

        shape = model_of(params, quick=quick)
        one_of("--optimizer", optimizer, ("foreach", "fused"))
        one_of("--update", update, ("whole", "pipelined_step", "in_backward"))
        asked = TraceBench(shape, update, optimizer, Path(out), Path(picture) if picture else None)
        return run(asked, directory, command)

    finish(run, json, markdown)
