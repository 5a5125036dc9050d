# SPDX-License-Identifier: Apache-2.0
"""Trains a small GPT on two ranks with a checkpoint every step, kills it with SIGKILL in the middle, starts it again,
and compares every loss and the final state, bit for bit, with a run that was left alone and wrote no checkpoints.

Exit code: 0 all equal; 1 something differs or failed; 2 wrong usage; 130 interrupted.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import random
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from layerwise_dist.supervision.processes import descendants, kill_all

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "examples" / "train_gpt.py"
RANKS = 2
WARM_UP = 3  # steps at the start of each process that are not timed
FREE_SPACE = 2 << 30  # bytes: four checkpoints of 120 MB, logs, and room for the machine
SILENCE = 180.0  # seconds without a new step after which a run counts as stuck

console = Console(highlight=False)


class DemoFailed(Exception):
    """Something is not as promised; the message says what."""


# -- processes ------------------------------------------------------------------------------------------------------


def adopt_orphans() -> None:
    """Makes orphans among the descendants children of this process, so that none can be left over."""
    pr_set_child_subreaper = 36
    ctypes.CDLL(None, use_errno=True).prctl(pr_set_child_subreaper, 1, 0, 0, 0)


def kill_everything() -> int:
    """SIGKILL to all processes below this one until none is left; returns how many there were."""
    try:
        return kill_all(lambda: descendants(os.getpid()))
    except RuntimeError as error:
        raise DemoFailed(str(error)) from None


# -- one run --------------------------------------------------------------------------------------------------------


@dataclass
class Run:
    """One start of the training script, and what is known of it so far."""

    name: str
    result: Path
    journal: Path
    output: Path
    process: subprocess.Popen[bytes]
    start: int | None = None
    parameters: int = 0
    losses: dict[int, str] = field(default_factory=dict)
    seconds: list[float] = field(default_factory=list)
    last_loss: float = float("nan")
    _read: int = 0

    @property
    def step(self) -> int:
        return max(self.losses, default=self.start or 0)

    def update(self) -> bool:
        """Reads what the script wrote since the last call; True if there was a new line."""
        try:
            with open(self.journal, "rb") as file:
                file.seek(self._read)
                data = file.read()
        except FileNotFoundError:
            return False
        whole = data[: data.rfind(b"\n") + 1]
        self._read += len(whole)
        for line in whole.splitlines():
            record = json.loads(line)
            if "start" in record:
                self.start, self.parameters = record["start"], record["parameters"]
            else:
                self.losses[record["step"]] = record["hex"]
                self.seconds.append(record["seconds"])
                self.last_loss = record["loss"]
        return bool(whole)

    def end(self) -> list[dict[str, Any]]:
        """Hashes and counters by rank, which a run that came to its end has written."""
        return json.loads(self.result.read_text(encoding="utf-8"))["ranks"]

    def tail(self) -> str:
        lines = self.output.read_text(encoding="utf-8", errors="replace").splitlines()
        return "\n".join(["  " + line for line in lines[-25:]])


class Demo:
    def __init__(self, args: argparse.Namespace, folder: Path) -> None:
        self.args, self.folder = args, folder
        self.checkpoints = folder / "checkpoints"
        self.deadline = time.monotonic() + args.timeout
        self._attempts: dict[str, int] = {}

    def start(self, name: str, result_name: str, *options: str) -> Run:
        result = self.folder / f"{result_name}.json"
        attempt = self._attempts.get(result_name, 0)
        self._attempts[result_name] = attempt + 1
        output = self.folder / f"{result_name}.{attempt}.log"
        command = [
            sys.executable, "-m", "torch.distributed.run", "--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0",
            "--local-addr", "127.0.0.1", "--nproc-per-node", str(RANKS), str(SCRIPT),
            "--steps", str(self.args.steps), "--result", str(result), *options,
        ]  # fmt: skip
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "PYTHONUNBUFFERED": "1"}
        with open(output, "wb") as log:
            log.write(f"$ {shlex.join(command)}\n".encode())
            log.flush()
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, env=environment,
                cwd=self.folder, start_new_session=True,
            )  # fmt: skip
        return Run(name, result, Path(f"{result}.{attempt}.jsonl"), output, process)

    def follow(self, run: Run, until: Callable[[], bool] | None = None) -> None:
        """Shows the run's progress until it ends, or until `until` says so. Raises DemoFailed."""
        heard = time.monotonic()
        with progress_bar(run.name, self.args.steps) as show:
            while True:
                ended = run.process.poll() is not None
                if run.update():
                    heard = time.monotonic()
                    show(run)
                if until is not None and until():
                    return
                if ended:
                    break
                now = time.monotonic()
                if now > self.deadline:
                    raise DemoFailed(f"{run.name}: not done within --timeout {self.args.timeout:.0f} s\n{run.tail()}")
                if now - heard > SILENCE:
                    raise DemoFailed(f"{run.name}: no new step for {SILENCE:.0f} s\n{run.tail()}")
                time.sleep(0.02)
        if run.process.returncode != 0:
            raise DemoFailed(f"{run.name}: exit code {run.process.returncode}; the end of {run.output}:\n{run.tail()}")
        if until is not None:
            raise DemoFailed(f"{run.name}: came to its end before it could be killed")
        left = kill_everything()
        if left:
            raise DemoFailed(f"{run.name}: left {left} processes behind (killed now)")

    def kill_at(self, run: Run, step: int, fraction: float) -> int:
        """SIGKILL to all, `fraction` of a step's time after `step` was done; returns the last step done."""
        moment: float | None = None

        def due() -> bool:
            nonlocal moment
            if moment is None and run.step >= step:
                moment = time.monotonic() + fraction * statistics.median(run.seconds)
            return moment is not None and time.monotonic() >= moment

        self.follow(run, until=due)
        killed = kill_everything()
        run.process.wait(timeout=30)
        run.update()
        if killed < 1 + RANKS:
            raise DemoFailed(f"{run.name}: only {killed} processes were there to be killed")
        console.print(f"  killed: {killed} processes, SIGKILL, {run.step} of {self.args.steps} steps done")
        return run.step


@contextmanager
def progress_bar(name: str, steps: int) -> Iterator[Callable[[Run], None]]:
    """A function that shows a run's progress: a live bar on a terminal, else a line now and then."""
    if not console.is_terminal:

        def line(run: Run) -> None:
            if run.losses and (run.step % 10 == 0 or run.step == steps or len(run.losses) == 1):
                console.print(f"  {name}: step {run.step} of {steps}, loss {run.last_loss:.4f}")

        yield line
        return
    columns = (
        TextColumn("  {task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[note]}"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console) as progress:
        task = progress.add_task(name, total=steps, note="starting")

        def bar(run: Run) -> None:
            note = f"loss {run.last_loss:.4f}  {run.seconds[-1]:.2f} s/step" if run.losses else f"from step {run.start}"
            progress.update(task, completed=run.step, note=note)

        yield bar


# -- comparing ------------------------------------------------------------------------------------------------------


def differences(alone: Run, killed: Run, resumed: Run, steps: int) -> list[str]:
    """What is not as in the run that was left alone; empty if all is equal."""
    found = []
    missing = sorted(set(range(1, steps + 1)) - alone.losses.keys())
    missing += sorted(set(range(1, steps + 1)) - killed.losses.keys() - resumed.losses.keys())
    if missing:
        found.append(f"no loss is known of steps {missing}")
    for run in (killed, resumed):
        for step, loss in sorted(run.losses.items()):
            expected = alone.losses.get(step)
            if loss != expected:
                found.append(f"{run.name}: the loss of step {step} is {loss}, left alone it is {expected}")
    ours, expected_ranks = resumed.end(), alone.end()
    if [rank["rank"] for rank in ours] != list(range(RANKS)) or len(expected_ranks) != RANKS:
        found.append(f"hashes of {len(expected_ranks)} and {len(ours)} ranks, expected {RANKS}")
    for rank, expected_rank in zip(ours, expected_ranks, strict=False):
        for what, value in expected_rank["hashes"].items():
            if rank["hashes"].get(what) != value:
                found.append(
                    f"rank {rank['rank']}: the final {what} hash to {rank['hashes'].get(what)}, left alone to {value}"
                )
    return found


def report(demo: Demo, alone: Run, killed: Run, resumed: Run, kill_step: int) -> None:
    counters = [rank["stats"] for rank in resumed.end()]
    without = statistics.median(alone.seconds[WARM_UP:])
    with_ = statistics.median(killed.seconds[WARM_UP:] + resumed.seconds[WARM_UP:])
    committed = counters[0]["checkpoints_committed"]
    written = sum(counter["bytes_written"] for counter in counters)
    p50, p99 = (max(counter[f"stall_ms_{name}"] for counter in counters) for name in ("p50", "p99"))
    training = sum(resumed.seconds)
    each = written / max(1, counters[0]["captures"])

    table = Table(
        title="All losses and the final state are equal, bit for bit", title_style="bold green", show_header=False
    )
    table.add_column(style="cyan")
    table.add_column()
    table.add_row("model", f"GPT, {alone.parameters / 1e6:.1f}M parameters, FSDP2 on {RANKS} ranks")
    table.add_row("steps", f"{demo.args.steps}, a checkpoint every step ({each / 1e6:.0f} MB each)")
    table.add_row("killed, resumed", f"killed after step {kill_step}, resumed from step {resumed.start}")
    table.add_row(
        "seconds a step", f"{without:.3f} without checkpoints, {with_:.3f} with ({with_ / without:.2f} times)"
    )
    table.add_row("stall a checkpoint", f"{p50:.1f} ms (median), {p99:.1f} ms (99th percentile), slower rank")
    table.add_row(
        "to disk", f"{written / training / 1e6:.0f} MB/s, {written / 1e9:.2f} GB in the resumed run's {training:.0f} s"
    )
    table.add_row(
        "checkpoints", f"{committed} committed, {counters[0]['checkpoints_aborted']} aborted in the resumed run"
    )
    console.print(table)

    tool = shorter(Path(sys.executable).parent / "layerwise")
    where = shorter(demo.checkpoints)
    plain(f"The checkpoints are in {where}; look at them with")
    for command in ("ls", "show", "verify"):
        plain(f"  {shlex.join([tool, command, where])}")
    plain(f"Remove all that this run wrote with: {shlex.join(['rm', '-r', shorter(demo.folder)])}")


def shorter(path: Path) -> str:
    """The path as seen from the current directory where that is below or near it."""
    relative = os.path.relpath(path)
    return relative if not relative.startswith(os.path.join("..", "..", "..")) else str(path)


def plain(text: str) -> None:
    """Without wrapping, so that commands can be copied."""
    console.print(text, soft_wrap=True, markup=False)


# -- the command ----------------------------------------------------------------------------------------------------


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="demo.sh", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--steps", type=int, default=30, help="steps of each run, 12 or more (default: %(default)s)")
    parser.add_argument(
        "--seed", type=int, help="chooses the moment of the kill (default: a new one, which is printed)"
    )
    parser.add_argument(
        "--dir", type=Path, help="new or empty folder for checkpoints and logs (default: a new one in build/demo)"
    )
    parser.add_argument("--timeout", type=float, default=1200.0, help="seconds for all of it (default: %(default).0f)")
    args = parser.parse_args()
    if args.steps < 12:
        parser.error("--steps must be 12 or more: some of them to warm up, before and after the kill")
    if args.seed is None:
        args.seed = random.SystemRandom().randrange(10**6)
    if args.dir is not None and args.dir.exists() and (not args.dir.is_dir() or any(args.dir.iterdir())):
        parser.error(f"--dir {args.dir} is not an empty folder")
    return args


class WrongUsage(Exception):
    """The demonstration cannot start as it was called."""


def make_folder(wanted: Path | None) -> Path:
    folder = wanted or ROOT / "build" / "demo" / f"{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}"
    try:
        folder.mkdir(parents=True, exist_ok=wanted is not None)
    except OSError as error:
        raise WrongUsage(f"cannot make {folder}: {error.strerror}") from None
    free = shutil.disk_usage(folder).free
    if free < FREE_SPACE:
        raise WrongUsage(
            f"{free / 1e9:.1f} GB are free in {folder}, {FREE_SPACE / 1e9:.1f} GB are needed; choose another --dir"
        )
    return folder.resolve()


def run_demo(args: argparse.Namespace) -> None:
    began = time.monotonic()
    demo = Demo(args, make_folder(args.dir))
    chance = random.Random(args.seed)
    kill_step = chance.randint(args.steps // 3, 2 * args.steps // 3)
    fraction = chance.random()
    plain(f"Kill after step {kill_step} and {fraction:.2f} of the next (--seed {args.seed})")
    plain(f"Logs in {shorter(demo.folder)}")

    checkpoints = ("--dir", str(demo.checkpoints), "--every", "1")
    console.print("[bold]1. Left alone, without checkpoints")
    alone = demo.start("left alone", "alone", "--no-checkpoints")
    demo.follow(alone)
    console.print("[bold]2. A checkpoint every step, and SIGKILL in the middle")
    killed = demo.start("killed", "resumed", *checkpoints)
    killed_at = demo.kill_at(killed, kill_step, fraction)
    console.print("[bold]3. The same command again")
    resumed = demo.start("resumed", "resumed", *checkpoints)
    demo.follow(resumed)

    if not resumed.start:
        raise DemoFailed(f"killed after step {killed_at}, and no checkpoint was found: it started again from 0")
    if resumed.start > killed_at + 1:
        raise DemoFailed(f"killed after step {killed_at}, and resumed from step {resumed.start}, which cannot be")
    console.print(f"  resumed from step {resumed.start}")
    unequal = differences(alone, killed, resumed, args.steps)
    if unequal:
        more = [f"and {len(unequal) - 20} more"] if len(unequal) > 20 else []
        raise DemoFailed("not equal to the run that was left alone:\n  " + "\n  ".join(unequal[:20] + more))
    report(demo, alone, killed, resumed, killed_at)
    plain(f"The demonstration took {time.monotonic() - began:.0f} s.")


def main() -> int:
    args = arguments()

    def on_terminate(*_: object) -> None:
        raise SystemExit(143)

    signal.signal(signal.SIGTERM, on_terminate)
    adopt_orphans()
    try:
        run_demo(args)
        return 0
    except DemoFailed as error:
        console.print(f"[bold red]FAILED[/] (--seed {args.seed})")
        plain(str(error))
        return 1
    except WrongUsage as error:
        print(f"demo: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        console.print("interrupted")
        return 130
    finally:
        # A second Ctrl-C must not leave trainers behind.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        kill_everything()


if __name__ == "__main__":
    sys.exit(main())
