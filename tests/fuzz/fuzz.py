# SPDX-License-Identifier: Apache-2.0
"""python tests/fuzz/fuzz.py [TARGET...] [--seconds N] [--seed N] [--keep] [--atheris]

Fuzzes the readers of Python for so long each. `--keep` adds inputs that reach new lines to tests/fuzz/corpus, with
which every run begins. A crash is printed, kept as tests/fuzz/crash-TARGET, and ends the run with 1.
"""

from __future__ import annotations

import argparse
import resource
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

MEMORY_BYTES = 1 << 30  # of address space, beside what torch takes


def limit_memory() -> None:
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + MEMORY_BYTES, size + MEMORY_BYTES))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("targets", nargs="*")
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", action="store_true")
    parser.add_argument("--atheris", action="store_true")
    asked = parser.parse_args()
    if asked.atheris:
        return under_atheris(asked.targets[0], asked.seconds)
    from fuzz.engine import Fuzzer
    from fuzz.targets import TARGETS

    limit_memory()
    bad = 0
    for name in asked.targets or TARGETS:
        fuzzer = Fuzzer(TARGETS[name], HERE / "corpus" / name, seed=asked.seed, keep=asked.keep)
        fuzzer.load()
        begun = len(fuzzer.seen)
        fuzzer.run(asked.seconds)
        print(f"{name}: {fuzzer.runs} inputs, {begun} steps from line to line at first, {len(fuzzer.seen)} at the end")
        for data, problem in fuzzer.crashes:
            bad = 1
            (HERE / f"crash-{name}").write_bytes(data)
            print(f"{name}: crash-{name}, {len(data)} bytes: {ascii(data[:300])}\n{problem}")
    return bad


def under_atheris(name: str, seconds: float) -> int:
    import atheris  # type: ignore[import-not-found]

    rooms = ["layerwise_dist.storage", "layerwise_dist.commit", "layerwise_dist.restore"]
    with atheris.instrument_imports(include=rooms):
        from fuzz.engine import Fuzzer
        from fuzz.targets import TARGETS
    target = TARGETS[name]
    changing = Fuzzer(target, HERE / "corpus" / name, seed=0)
    changing.inputs = target.seeds()

    def mutate(data: bytes, longest: int, seed: int) -> bytes:
        changing.draw.seed(seed)
        return changing.mutated(data)[:longest]

    corpus = HERE / "corpus" / name
    corpus.mkdir(parents=True, exist_ok=True)
    for number, data in enumerate(target.seeds()):
        (corpus / f"seed_{number}").write_bytes(data)
    limits = [f"-max_total_time={seconds:.0f}", f"-artifact_prefix={HERE}/crash-{name}-", "-rss_limit_mb=4000"]
    atheris.Setup([sys.argv[0], str(corpus), *limits], target.run, custom_mutator=mutate)
    atheris.Fuzz()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
