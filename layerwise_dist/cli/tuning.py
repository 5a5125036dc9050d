# SPDX-License-Identifier: Apache-2.0
"""`layerwise tune`: predicts what `every_n_steps: auto` would choose on this disk, before there is a job."""

from __future__ import annotations

import mmap
import time
from typing import Annotated, Any

import typer

from layerwise_dist import _native
from layerwise_dist.cli.catalogue import WrongUsage
from layerwise_dist.cli.console import Answer, row, table
from layerwise_dist.cli.doctoring import BYTES_A_PARAMETER, QUICK, watched
from layerwise_dist.cli.running import Json, give
from layerwise_dist.config import load_config
from layerwise_dist.doctor import Questions, Report, examine
from layerwise_dist.interval import Costs, Limits, choose, loss_s, overhead, seconds
from layerwise_dist.units import parse_count, parse_number, parse_seconds, size

_MEMORY = 64 << 20  # that is copied and hashed to time it


def command(
    directory: Annotated[str, typer.Argument(metavar="DIR", help="Where checkpoints will be.")],
    step_s: Annotated[str, typer.Option("--step-s", metavar="TIME", help="Of a step without checkpoints: 3, 250ms.")],
    params: Annotated[
        str | None, typer.Option("--params", metavar="N", help="Trained parameters, float32 with AdamW: 7B, 98M.")
    ] = None,
    state_bytes: Annotated[
        str | None, typer.Option("--state-bytes", metavar="SIZE", help="Instead: bytes of one checkpoint of all ranks.")
    ] = None,
    ranks: Annotated[int, typer.Option("--ranks", metavar="N", min=1, help="Ranks that share the checkpoint.")] = 1,
    disks: Annotated[
        int, typer.Option("--disks", metavar="N", min=1, help="How many such disks the ranks write to.")
    ] = 1,
    mtbf: Annotated[
        str | None, typer.Option("--mtbf", metavar="TIME", help="Mean time between failures of the job: 90min, 3h, 2d.")
    ] = None,
    cost_s: Annotated[
        str | None,
        typer.Option("--cost-s", metavar="TIME", help="What a checkpoint adds to training, if you measured it."),
    ] = None,
    config: Annotated[
        str | None, typer.Option("--config", metavar="FILE", help="A job's configuration; its `interval` applies.")
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Little data and few rounds: a rough look.")] = False,
    json: Json = False,
) -> None:
    """Predicts what `"every_n_steps": "auto"` would choose: measures the disk, prints interval, overhead and loss.

    Without --cost-s, the cost of a checkpoint is the time to copy and hash a rank's part here.

    Example: layerwise tune checkpoints --params 7B --ranks 64 --step-s 3 --mtbf 3h
    """

    def look() -> Answer:
        return tune(
            directory, config=config, params=params, state_bytes=state_bytes, ranks=ranks, disks=disks, step_s=step_s,
            mtbf=mtbf, cost_s=cost_s, quick=quick,
        )  # fmt: skip

    give(look, json, "measure")


def tune(
    directory: str, *, config: str | None, params: str | None, state_bytes: str | None, ranks: int, disks: int,
    step_s: str, mtbf: str | None, cost_s: str | None, quick: bool,
) -> Answer:  # fmt: skip
    """Bad when the directory can't be measured. Raises WrongUsage, or ConfigError for a bad configuration file."""
    settings = load_config(config, dir=directory)
    if (params is None) == (state_bytes is None):
        raise WrongUsage("give --params or --state-bytes, and not both")
    try:
        state = parse_number(state_bytes) if state_bytes is not None else BYTES_A_PARAMETER * parse_count(params or "")
    except ValueError as error:
        raise WrongUsage(str(error)) from None
    if state < 1:
        raise WrongUsage("--params and --state-bytes must be more than 0")
    step = duration("--step-s", step_s)
    failure = settings.interval.mtbf_s if mtbf is None else duration("--mtbf", mtbf)
    limits = Limits(settings.interval.max_overhead, failure, settings.interval.min_steps, settings.interval.max_steps)
    with watched() as progress:
        try:
            report = examine(directory, Questions(settings, state, **(QUICK if quick else {})), progress)
        except NotADirectoryError as error:
            raise WrongUsage(f"{error.filename}: not a directory") from None
    measured = {finding.name: finding for finding in report.findings}
    if "writer" not in measured:
        return _unmeasured(report)
    figures = measured["writer"].figures
    rate = figures["rate"] or figures["first_use"]
    pass_s = state / ranks * _memory_s_a_byte()
    write_s = state / (rate * disks)
    costs = Costs(step, duration("--cost-s", cost_s) if cost_s is not None else pass_s, write_s, write_s)
    choice = choose(costs, limits)
    data: dict[str, Any] = {
        "dir": report.directory, "state_bytes": state, "bytes_a_rank": -(-state // ranks), "rate": rate, "disks": disks,
        "step_s": costs.step_s, "checkpoint_s": costs.checkpoint_s, "checkpoint_s_is_given": cost_s is not None,
        "write_s": costs.write_s, "every_n_steps": choice.steps, "why": choice.why,
        "interval_s": choice.steps * costs.step_s, "overhead": overhead(choice.steps, costs),
        "loss_s": loss_s(choice.steps, costs), "mtbf_s": failure,
        "lost_share": None if failure is None else min(1.0, loss_s(choice.steps, costs) / failure),
    }  # fmt: skip
    return Answer(data, [_table(data), choice.why])


def duration(option: str, text: str) -> float:
    """``3``, ``250ms``, ``90min``, ``3h``, ``2d`` in seconds. Raises WrongUsage."""
    try:
        return parse_seconds(text)
    except ValueError as error:
        raise WrongUsage(f"{option}: {error}") from None


def _unmeasured(report: Report) -> Answer:
    said = [finding.text for finding in report.findings if finding.verdict == "bad"]
    return Answer({"dir": report.directory, "problems": said}, ["The disk could not be measured.", *said], good=False)


def _table(data: dict[str, Any]) -> Any:
    shown = table("", "what", "predicted")
    given = "given" if data["checkpoint_s_is_given"] else "a rank's part copied and hashed once, at this machine's rate"
    disks = "one such disk" if data["disks"] == 1 else f"{data['disks']} such disks"
    row(shown, "", "a checkpoint", f"{size(data['state_bytes'])}, {size(data['bytes_a_rank'])} a rank")
    row(shown, "", "until it is committed", f"{seconds(data['write_s'])}, at {size(data['rate'])}/s to {disks}")
    row(shown, "", "what it costs training", f"{seconds(data['checkpoint_s'])} ({given})")
    row(shown, "", "every_n_steps", f"{data['every_n_steps']}, that is every {seconds(data['interval_s'])}")
    row(shown, "", "overhead", f"{data['overhead']:.2%}")
    row(shown, "", "a failure loses", seconds(data["loss_s"]))
    if data["mtbf_s"] is not None:
        row(shown, "", "lost by failures", f"{data['lost_share']:.2%}, with one every {seconds(data['mtbf_s'])}")
    return shown


def _memory_s_a_byte() -> float:
    """Seconds to copy a byte and hash it, the best of three."""
    one, other = mmap.mmap(-1, _MEMORY), bytearray(_MEMORY)
    one.write(bytes(_MEMORY))
    best = float("inf")
    for _ in range(3):
        began = time.perf_counter()
        other[:] = memoryview(one)
        _native.xxh3_64(other)
        best = min(best, time.perf_counter() - began)
    one.close()
    return best / _MEMORY
