# SPDX-License-Identifier: Apache-2.0
"""`layerwise doctor`: what it says of directories good and bad, and that it leaves nothing behind."""

from __future__ import annotations

import json
import mmap
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import layerwise_native_testing as testing
import pytest
from kit.cli import call as command_line
from kit.seccomp import FORBID_URING
from typer.testing import CliRunner

from layerwise_dist import _native
from layerwise_dist.cli.app import app
from layerwise_dist.config import LayerwiseConfig, load_config
from layerwise_dist.doctor import examination, findings, kernel, place, speed
from layerwise_dist.doctor.findings import Used
from layerwise_dist.doctor.place import Device, Space
from layerwise_dist.doctor.speed import Flushes, Manner, Rates, Shape, Shards
from layerwise_dist.storage import mounts, network
from layerwise_dist.storage.adapter import PCCheckAdapter
from layerwise_dist.storage.mounts import Mount
from layerwise_dist.units import parse_number, size

MB = 10**6
NOBODY = 65534
CONFIG = load_config(None)
HASHED = Manner("posix", hash=True, recycle="auto")
DISK = Device("sda", rotational=False, virtual=False, volatile_cache=True)
SCRIPT = "import sys; from layerwise_dist.cli import main\ntry: main()\nfinally: assert 'torch' not in sys.modules"


def call(*args: object) -> tuple[int, str]:
    return command_line("doctor", *args)


def call_json(*args: object) -> tuple[int, dict[str, Any]]:
    code, output = call(*args, "--quick", "--json")
    return code, json.loads(output)


def by_name(answer: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {finding["name"]: finding for finding in answer["findings"]}


@pytest.fixture(scope="module")
def looked(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """One look at a directory on the disk."""
    root = tmp_path_factory.mktemp("doctor")
    code, answer = call_json(root)
    assert not os.listdir(root)
    assert code == (0 if answer["good"] else 1)
    return answer


@pytest.fixture
def tiny(tmp_path: Path) -> Iterator[Path]:
    """A file system of one megabyte, full."""
    root = tmp_path / "tiny"
    root.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", str(root)], capture_output=True, text=True)
    if done.returncode != 0:
        pytest.skip(f"cannot mount a tmpfs: {done.stderr.strip()}")
    try:
        (root / "filler").write_bytes(bytes(1 << 20))
        yield root
    finally:
        subprocess.run(["umount", str(root)], check=True)  # fails if a file there was left open


# -- the command ----------------------------------------------------------------------------------------------------


def test_the_json_has_every_finding_with_its_figures(looked: dict[str, Any]) -> None:
    assert set(looked) == {"dir", "looked_at", "good", "findings"}
    for finding in looked["findings"]:
        assert set(finding) == {"name", "verdict", "text", "advice", "figures"}
        assert finding["verdict"] in ("ok", "warn", "bad") and finding["text"].endswith(".")
    found = by_name(looked)
    figures = {
        "file_system": {"type", "where", "mount_point", "source", "options", "device"},
        "space": {"free", "total", "files_free", "held", "staying", "checkpoint", "needed", "peak"},
        "direct_io": {"memory_align", "offset_align"},
        "io_uring": {"available", "backend"},
        "locked_memory": {"limit", "needed"},
        "dax": {"available"},
        "flush": {"p50", "p99", "commit_p50", "count"},
        "bandwidth": {
            "bytes",
            "queue_depth",
            "block",
            "raw",
            "raw_rounds",
            "raw_first_use",
            "raw_first_use_rounds",
            "deeper",
            "larger",
        },
        "reads": {"direct", "direct_rounds", "read_ahead", "read_ahead_rounds"},
        "writer": {
            "backend",
            "hash",
            "recycles",
            "rate",
            "rounds",
            "of_raw",
            "first_use",
            "first_use_rounds",
            "of_raw_first_use",
            "seconds_per_checkpoint",
        },
    }
    for name, keys in figures.items():
        assert set(found[name]["figures"]) == keys
    assert found["bandwidth"]["figures"]["raw"] > 0 and found["writer"]["figures"]["first_use"] > 0
    assert found["flush"]["figures"]["p50"] > 0


def test_it_always_says_that_a_device_may_lie_about_flushes(looked: dict[str, Any]) -> None:
    assert findings.LYING in by_name(looked)["flush"]["text"]


def test_what_it_says_of_this_kernel_and_directory_is_what_the_native_core_finds(tmp_path: Path) -> None:
    found = by_name(call_json(tmp_path)[1])
    aligns = _native.PosixEnv().direct_io(tmp_path)
    figures = found["direct_io"]["figures"]
    assert (figures["memory_align"], figures["offset_align"]) == (aligns or (None, None))
    told = subprocess.run(["df", "--output=fstype", str(tmp_path)], capture_output=True, text=True, check=True).stdout
    assert found["file_system"]["figures"]["type"] == told.split()[-1]


def test_memory_is_no_place_for_checkpoints() -> None:
    if (mount := mounts.mount_of("/dev/shm")) is None or mount.kind != "tmpfs":
        pytest.skip("/dev/shm is no tmpfs here")
    before = set(os.listdir("/dev/shm"))
    code, answer = call_json("/dev/shm")
    assert code == 1 and not answer["good"]
    assert by_name(answer)["file_system"]["verdict"] == "bad"
    assert "memory" in by_name(answer)["file_system"]["text"]
    assert not [name for name in set(os.listdir("/dev/shm")) - before if name.startswith(examination.SCRATCH)]


def test_a_directory_that_does_not_exist_yet_is_judged_by_its_parent_and_not_made(tmp_path: Path) -> None:
    _, answer = call_json(tmp_path / "not" / "yet")
    assert answer["looked_at"] == str(tmp_path) and answer["dir"] == str(tmp_path / "not" / "yet")
    assert "does not exist yet" in by_name(answer)["directory"]["text"]
    assert "writer" in by_name(answer)
    assert not os.listdir(tmp_path)


def test_a_full_disk_is_bad_and_says_what_the_look_would_take(tiny: Path) -> None:
    code, answer = call_json(tiny)
    assert code == 1
    measured = by_name(answer)["measured"]
    assert measured["verdict"] == "bad" and "free" in measured["text"] and "--bytes" in measured["advice"]
    assert os.listdir(tiny) == ["filler"]


def test_a_disk_that_fills_up_under_the_look_is_a_finding_and_is_cleaned(tmp_path: Path, tiny: Path) -> None:
    (tiny / "filler").unlink()
    plan = examination.Questions(CONFIG, nbytes=4 << 20, flushes=3, rounds=1)
    # As when another process takes the space after it was checked.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(place, "space_of", lambda directory: Space(10**9, 10**9, None))
        report = examination.examine(str(tiny), plan)
    assert report.findings[-1].name == "measured" and report.findings[-1].verdict == "bad"
    assert "No space left" in report.findings[-1].text and not report.good
    assert not os.listdir(tiny)


def test_a_directory_that_may_not_be_written_is_bad_and_the_rest_is_still_told() -> None:
    if os.geteuid() != 0:
        pytest.skip("needs root to become somebody else")
    # Become somebody else only once all is imported: the interpreter itself may be root's.
    script = (
        "import os, sys; from layerwise_dist.cli import main; from layerwise_dist import _native\n"
        f"os.chdir('/'); os.setgroups([]); os.setegid({NOBODY}); os.seteuid({NOBODY}); main()"
    )
    with tempfile.TemporaryDirectory() as parent:
        os.chmod(parent, 0o755)
        done = subprocess.run(
            [sys.executable, "-c", script, "doctor", parent, "--quick", "--json"],
            capture_output=True, text=True, timeout=60,
        )  # fmt: skip
    assert done.returncode == 1, done.stderr
    found = by_name(json.loads(done.stdout))
    assert "Permission denied" in found["measured"]["text"] and "chown" in found["measured"]["advice"]
    assert "space" in found and "io_uring" in found


def test_wrong_usage_is_exit_code_2_and_says_what(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "config.json").write_text('{"keep_lost": 3}')
    cases = [
        ([tmp_path / "file"], "not a directory"),
        ([tmp_path / "file" / "below"], "ot a directory"),
        ([tmp_path, "--bytes", "much"], "--bytes: 'much' is not a number"),
        ([tmp_path, "--bytes", "4k"], "too little"),
        ([tmp_path, "--state-bytes", "1G", "--params", "98M"], "not both"),
        ([tmp_path, "--config", tmp_path / "none.json"], "none.json"),
        ([tmp_path, "--config", tmp_path / "config.json"], "keep_lost"),
    ]
    for args, words in cases:
        code, text = call(*args, "--quick")
        assert code == 2 and words in text, (args, text)
        code, found = call_json(*args)
        assert code == 2 and words in found["error"]
    assert call()[0] == 2


def test_the_state_s_size_is_taken_from_the_newest_checkpoint_and_what_is_there_counts_as_room(tmp_path: Path) -> None:
    import torch

    import layerwise_dist as lwd

    model = torch.nn.Linear(64, 64)
    optimizer = torch.optim.AdamW(model.parameters())
    with lwd.attach(model, optimizer, dir=str(tmp_path)) as ckpt:
        ckpt.restore()
        for _ in ckpt.steps(3):
            model(torch.randn(2, 64)).sum().backward()
            optimizer.step()
        assert by_name(call_json(tmp_path)[1])["directory"]["figures"]["job_running"]
    before = sorted(os.listdir(tmp_path))
    found = by_name(call_json(tmp_path)[1])
    manifest = json.loads(CliRunner().invoke(app, ["show", str(tmp_path), "--json"]).output)["manifest"]
    assert found["space"]["figures"]["checkpoint"] == sum(shard["nbytes"] for shard in manifest["shards"])
    assert found["space"]["figures"]["needed"] == 5 * found["space"]["figures"]["checkpoint"]
    assert found["space"]["figures"]["held"] >= 2 * found["space"]["figures"]["checkpoint"]
    assert not found["directory"]["figures"]["job_running"]
    config = tmp_path.parent / "forever.json"
    config.write_text('{"keep_every_n_steps": 3}')
    kept = by_name(call_json(tmp_path, "--config", config)[1])["space"]["figures"]
    assert found["space"]["figures"]["staying"] == 0 < kept["staying"], "the checkpoint of step 3 is never removed"
    assert kept["held"] == found["space"]["figures"]["held"]
    assert kept["needed"] == found["space"]["figures"]["needed"] + kept["staying"]
    assert sorted(os.listdir(tmp_path)) == before
    with lwd.attach(model, optimizer, dir=str(tmp_path), keep_last=1, every_n_steps=None) as ckpt:
        ckpt.restore()
        for step in range(7):
            model(torch.randn(2, 64)).sum().backward()
            optimizer.step()
            ckpt.save("first" if step == 0 else "second" if step == 3 else "last")
    tagged = by_name(call_json(tmp_path)[1])["space"]["figures"]
    sizes = [sum(file.stat().st_blocks * 512 for file in folder.iterdir()) for folder in tmp_path.glob("step_*")]
    assert len(sizes) == 3 and tagged["held"] == tagged["staying"] == sum(sizes), "three tags, whatever went between"
    assert tagged["needed"] == found["space"]["figures"]["needed"] + tagged["staying"]


def test_the_options_and_the_configuration_reach_the_writer_and_the_findings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[dict[str, Any]] = []

    class Recorded(PCCheckAdapter):
        def __init__(self, env: Any, root: str, **options: Any) -> None:
            made.append(options)
            super().__init__(env, root, **options)

    monkeypatch.setattr(speed, "PCCheckAdapter", Recorded)
    config = tmp_path / "layerwise.json"
    writer = {"queue_depth": 2, "block_kb": 512, "direct_io": "off", "backend": "posix", "recycle": False}
    block = {"keep_last": 9, "dir": "elsewhere", "hash": False, "writer": writer}
    config.write_text(json.dumps({"train_batch_size": 8, "layerwise_checkpoint": block}))
    root = tmp_path / "root"
    root.mkdir()
    _, answer = call_json(root, "--params", "1M", "--bytes", "2MiB", "--config", config)
    found = by_name(answer)
    assert found["space"]["figures"]["needed"] == (9 + 2 + 1) * 12 * MB
    bandwidth = found["bandwidth"]["figures"]
    assert (bandwidth["bytes"], bandwidth["queue_depth"], bandwidth["block"]) == (2 << 20, 2, 512 << 10)
    if found["direct_io"]["figures"]["memory_align"]:
        assert found["direct_io"]["verdict"] == "warn" and "writer.direct_io" in found["direct_io"]["advice"]
    measured = found["writer"]["figures"]
    assert (measured["backend"], measured["hash"], measured["recycles"]) == ("posix", False, False)
    assert made == [
        {
            "rank": 0, "world_size": 1, "backend": "posix", "queue_depth": 2, "block_bytes": 512 << 10,
            "direct_io": False, "hash": False, "spares": 0,
        }
    ]  # fmt: skip
    assert measured["rate"] is None and measured["seconds_per_checkpoint"] == 12 * MB / measured["first_use"]
    assert "posix, without hashes" in found["writer"]["text"] and "not reused" in found["writer"]["text"]
    code, text = call(root, "--quick", "--state-bytes", "9000T")
    assert code == 1 and "retention needs" in text and "Free" in text


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_leaves_nothing_behind(tmp_path: Path, number: signal.Signals) -> None:
    command = [sys.executable, "-c", SCRIPT, "doctor", str(tmp_path), "--bytes", "64M"]
    # An interrupt that is ignored in the background must not be inherited.
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )  # fmt: skip
    try:
        deadline = time.monotonic() + 60
        while not list(tmp_path.glob(f"{examination.SCRATCH}*/raw")):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.002)
        process.send_signal(number)
        output, _ = process.communicate(timeout=60)
    finally:
        process.kill()
        process.wait()
    assert process.returncode != 0, output
    assert not os.listdir(tmp_path)


def test_what_a_killed_look_leaves_is_no_concern_of_the_engine_s(tmp_path: Path) -> None:
    import torch

    import layerwise_dist as lwd

    process = subprocess.Popen([sys.executable, "-c", SCRIPT, "doctor", str(tmp_path), "--bytes", "64M"])
    try:
        deadline = time.monotonic() + 60
        while not list(tmp_path.glob(f"{examination.SCRATCH}*/shards/step_*")):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.002)
    finally:
        process.kill()
        process.wait()
    (left,) = os.listdir(tmp_path)
    assert left.startswith(examination.SCRATCH)
    before = {str(path) for path in tmp_path.rglob("*")}
    assert str(tmp_path / left / "shards") in before

    def job(steps: int) -> tuple[int, torch.Tensor]:
        torch.manual_seed(steps)
        model = torch.nn.Linear(64, 64)
        optimizer = torch.optim.AdamW(model.parameters())
        with lwd.attach(model, optimizer, dir=str(tmp_path)) as ckpt:
            found = ckpt.restore()
            for _ in ckpt.steps(steps):
                model(torch.randn(2, 64)).sum().backward()
                optimizer.step()
        return found, model.weight.detach().clone()

    assert job(3)[0] == 0
    step, weight = job(5)
    assert step == 3
    step, again = job(5)
    assert step == 5 and torch.equal(weight, again)
    assert before <= {str(path) for path in tmp_path.rglob("*")}, "the engine removes only what it named itself"


# -- what is found --------------------------------------------------------------------------------------------------

TABLE = r"""22 27 0:21 / /proc rw,relatime - proc proc rw
30 27 254:1 / /mnt/with\040space rw,noatime shared:1 master:2 - xfs /dev/sda1 rw,attr2
31 30 0:44 / /mnt/with\040space ro,relatime - nfs4 server:/export rw,vers=4.2
"""


def test_a_mount_is_found_by_its_id_with_spaces_and_optional_fields() -> None:
    assert mounts.find_mount(TABLE, 30) == Mount(
        "/mnt/with space", "xfs", "/dev/sda1", ("rw", "noatime", "attr2"), (254, 1)
    )
    over = mounts.find_mount(TABLE, 31)
    assert over is not None and over.where == "network" and "ro" in over.options and over.source == "server:/export"
    assert mounts.find_mount(TABLE, 99) is None


def test_where_the_kernel_does_not_tell_there_is_no_mount(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Hidden:
        def __init__(self, path: str) -> None:
            self.path = path

        def read_text(self, **_: Any) -> str:
            raise PermissionError(13, "Permission denied", self.path)

    assert mounts.mount_of(str(tmp_path)) is not None and mounts.mount_of(str(tmp_path / "none")) is None
    monkeypatch.setattr(mounts, "Path", Hidden)
    assert mounts.mount_of(str(tmp_path)) is None


def test_the_device_is_the_disk_below_partition_and_device_mapper(tmp_path: Path) -> None:
    disk = tmp_path / "devices/pci/nvme0n1"
    (disk / "queue").mkdir(parents=True)
    (disk / "queue/rotational").write_text("0\n")
    (disk / "queue/write_cache").write_text("write through\n")
    (disk / "nvme0n1p2").mkdir()
    (disk / "nvme0n1p2/partition").write_text("2\n")
    mapped = tmp_path / "devices/virtual/block/dm-0"
    (mapped / "slaves").mkdir(parents=True)
    (mapped / "slaves/nvme0n1p2").symlink_to(disk / "nvme0n1p2")
    (tmp_path / "dev/block").mkdir(parents=True)
    (tmp_path / "dev/block/253:0").symlink_to(mapped)
    mount = Mount("/", "xfs", "/dev/mapper/x", ("rw",), (253, 0))
    assert place.device_of(mount, str(tmp_path)) == Device("nvme0n1", False, False, False)
    assert place.device_of(Mount("/", "zfs", "tank/data", ("rw",), (0, 50)), str(tmp_path)) is None


def backend(name: str) -> LayerwiseConfig:
    return load_config({"writer": {"backend": name}})


def mounted(kind: str, *options: str) -> Mount:
    return Mount("/data", kind, "/dev/sda1", ("rw", *options), (8, 1))


@pytest.mark.parametrize(
    ("mount", "verdict", "words"),
    [
        (mounted("ext4"), "ok", "local"),
        (mounted("xfs", "noatime"), "ok", "local"),
        (Mount("/data", "ext4", "/dev/sda1", ("ro",), (8, 1)), "bad", "read-only"),
        (mounted("ext4", "nobarrier"), "bad", "nobarrier"),
        (mounted("overlay", "volatile"), "bad", "volatile"),
        (mounted("overlay"), "warn", "container"),
        (mounted("ext4", "data=journal"), "warn", "data=journal"),
        (mounted("nfs4"), "warn", "network"),
        (mounted("fuse.sshfs"), "warn", "network"),
        (mounted("lustre"), "warn", "network"),
        (mounted("ramfs"), "bad", "memory"),
        (mounted("vfat"), "warn", "ext4"),
    ],
)
def test_file_systems_are_told_apart(mount: Mount, verdict: str, words: str) -> None:
    (found,) = findings.of_file_system(mount, DISK, None)
    assert found.verdict == verdict and words in f"{found.text} {found.advice}"


def test_a_disk_in_memory_is_no_disk() -> None:
    (found,) = findings.of_file_system(mounted("ext4"), Device("zram0", False, False, None), None)
    assert found.verdict == "bad" and "memory" in found.text


def test_a_library_that_swallows_flushes_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LD_PRELOAD", "/usr/lib/libother.so:/usr/lib/libeatmydata.so")
    found = findings.of_file_system(mounted("ext4"), DISK, kernel.flushes_are_hooked())
    assert found[1].verdict == "bad" and "libeatmydata" in found[1].text


def test_a_disk_too_small_for_retention_is_bad_and_says_which_keep_last_fits() -> None:
    config = load_config(None, keep_last=10)
    found = findings.of_space(Space(400 * MB, 10**9, 10**6), Used(200 * MB, 0), 100 * MB, "as given", config)
    assert found.verdict == "bad" and found.figures["needed"] == 1300 * MB
    assert found.advice == "Free 700 MB, set keep_last to 3, or use a larger disk."
    assert findings.of_space(Space(1100 * MB, 10**10, 10**6), Used(200 * MB, 0), 100 * MB, "", config).verdict == "warn"
    assert findings.of_space(Space(9000 * MB, 10**10, 10**6), Used(0, 0), 100 * MB, "", config).verdict == "ok"
    found = findings.of_space(Space(50 * MB, 10**9, 10**6), Used(0, 0), 100 * MB, "", config)
    assert found.verdict == "bad" and "keep_last to" not in (found.advice or "")
    assert findings.of_space(Space(9000 * MB, 10**10, 12), Used(0, 0), 100 * MB, "", config).verdict == "warn"
    assert findings.of_space(Space(50 * MB, 10**10, 12), Used(0, 0), 100 * MB, "", config).verdict == "bad"
    config = load_config(None, keep_every_n_steps=100)
    found = findings.of_space(Space(10_500 * MB, 10**12, 10**6), Used(0, 0), 1000 * MB, "", config)
    assert found.verdict == "warn" and "full after 5" in (found.advice or "")


def test_what_retention_needs_is_exactly_what_makes_it_bad() -> None:
    for free, verdict in ((499, "bad"), (500, "warn"), (699, "warn"), (778, "ok")):
        assert findings.of_space(Space(free, 1000, None), Used(0, 0), 100, "", CONFIG).verdict == verdict


def test_files_that_wait_to_be_written_over_need_room_too() -> None:
    for recycle, verdict in (("auto", "warn"), (True, "warn"), (False, "ok")):
        config = load_config(None, writer={"recycle": recycle})
        found = findings.of_space(Space(650, 1000, None), Used(0, 0), 100, "", config)
        assert found.verdict == verdict and (found.figures["peak"] == 700) == (verdict == "warn")


@pytest.mark.parametrize(
    ("device", "flush", "verdict", "words"),
    [
        (Device("vda", False, True, True), 5e-6, "warn", "host"),
        (Device("sda", True, False, True), 5e-6, "warn", "rotating"),
        (None, 5e-6, "warn", "suspiciously"),
        (DISK, 5e-6, "ok", "survives power loss"),
        (DISK, 1e-3, "ok", ""),
        (Device("vda", False, True, True), 1e-3, "ok", ""),
        (Device("sda", False, False, False), 1e-3, "ok", "no volatile cache"),
        (DISK, 0.5, "warn", "Slow"),
    ],
)
def test_a_flush_too_quick_to_be_true_is_said(device: Device | None, flush: float, verdict: str, words: str) -> None:
    found = findings.of_flushes(Flushes([flush] * 50, [flush] * 12), mounted("ext4"), device)
    assert found.verdict == verdict and words in (found.advice or "") and findings.LYING in found.text


def test_no_io_uring_says_what_forbids_it_and_what_to_change() -> None:
    found = findings.of_uring("the sysctl kernel.io_uring_disabled is 2", CONFIG)
    assert found.verdict == "warn" and "kernel.io_uring_disabled=0" in (found.advice or "")
    assert "seccomp" in (findings.of_uring("the seccomp profile of this container forbids it", CONFIG).advice or "")
    assert findings.of_uring(None, CONFIG).verdict == "ok"


def test_no_io_uring_is_bad_only_where_it_is_asked_for_by_name() -> None:
    found = findings.of_uring("a security module of the kernel forbids it", backend("uring"))
    assert found.verdict == "bad" and "ConfigError" in found.text and "writer.backend to auto" in (found.advice or "")
    assert findings.of_uring("a security module of the kernel forbids it", backend("posix")).verdict == "ok"
    assert findings.of_uring(None, backend("uring")).verdict == "ok"


def test_no_dax_is_bad_only_for_the_backend_that_needs_it() -> None:
    assert findings.of_dax(False, CONFIG).verdict == "ok"
    found = findings.of_dax(False, backend("nvm"))
    assert found.verdict == "bad" and "-o dax" in (found.advice or "")
    assert findings.of_dax(True, backend("nvm")).verdict == "ok"


def test_too_little_lockable_memory_names_the_limit_to_raise() -> None:
    found = findings.of_lockable(64 << 10, Shape(4, 1 << 20), "uring")
    assert found.verdict == "warn" and "ulimit -l" in (found.advice or "") and "4096" in (found.advice or "")
    assert findings.of_lockable(None, Shape(64, 64 << 20), "uring").verdict == "ok"
    assert findings.of_lockable(64 << 10, Shape(4, 1 << 20), "posix").verdict == "ok"


def test_no_direct_io_says_why_where_it_can_be_known() -> None:
    assert "data=journal" in (findings.of_direct_io(None, mounted("ext4", "data=journal"), CONFIG).advice or "")
    assert "compression" in (findings.of_direct_io(None, mounted("btrfs", "compress=zstd:3"), CONFIG).advice or "")
    assert findings.of_direct_io((512, 512), mounted("ext4"), CONFIG).verdict == "ok"


def test_a_deeper_queue_is_advised_only_if_it_was_faster_in_every_round() -> None:
    shape = Shape(4, 1 << 20)
    rates = Rates([1e9], [1.0e9, 1.1e9], deeper=[2.0e9, 2.1e9], larger=[1.0e9, 1.1e9], writer_first=[9e8, 9e8])
    found = findings.of_bandwidth(rates, shape, 1 << 28)
    assert found.verdict == "warn" and "writer.queue_depth to 16" in (found.advice or "")
    rates.deeper = [1.05e9, 3.0e9]
    assert findings.of_bandwidth(rates, shape, 1 << 28).verdict == "ok"
    rates.larger = [4e9, 4e9]
    assert "writer.block_kb to 4096" in (findings.of_bandwidth(rates, shape, 1 << 28).advice or "")


def test_another_way_to_read_is_advised_only_if_it_was_faster_in_every_round() -> None:
    rates = Rates(read=[1.0e9, 1.1e9], read_ahead=[2.0e9, 1.4e9])
    found = findings.of_reads(rates, CONFIG)
    assert found.verdict == "warn" and "reader.direct_io to off" in (found.advice or "")
    off = load_config({"reader": {"direct_io": "off"}})
    assert findings.of_reads(rates, off).verdict == "ok"
    rates.read, rates.read_ahead = rates.read_ahead, rates.read
    assert findings.of_reads(rates, CONFIG).verdict == "ok"
    assert "reader.direct_io to auto" in (findings.of_reads(rates, off).advice or "")
    rates.read[1] = 1.05e9
    assert findings.of_reads(rates, off).verdict == "ok"
    assert findings.of_reads(Rates(), CONFIG).verdict == "ok"


def test_a_writer_far_below_the_disk_is_said() -> None:
    rates = Rates([1e9], [2e9], writer_first=[9e8], writer=[1e9])
    found = findings.of_writer(rates, HASHED, 10**9, CONFIG)
    assert found.verdict == "warn" and found.figures["seconds_per_checkpoint"] == 1.0
    assert found.figures["of_raw"] == 0.5 and found.figures["of_raw_first_use"] == 0.9
    rates.writer = [1.8e9]
    assert findings.of_writer(rates, HASHED, None, CONFIG).verdict == "ok"
    rates.writer_first = [5e8]
    assert findings.of_writer(rates, HASHED, None, CONFIG).verdict == "warn"


def test_a_writer_that_reuses_no_files_is_judged_by_new_ones() -> None:
    rates = Rates([1e9], [2e9], writer_first=[8e8])
    found = findings.of_writer(rates, HASHED, 8 * 10**8, CONFIG)
    assert found.verdict == "ok" and found.figures["seconds_per_checkpoint"] == 1.0
    assert found.figures["of_raw"] is None and not found.figures["recycles"]


# -- how it is found ------------------------------------------------------------------------------------------------


def test_the_raw_loop_writes_every_byte_of_an_amount_that_no_block_divides(tmp_path: Path) -> None:
    memory = bytearray(os.urandom(1 << 20))
    with speed.RawFile(str(tmp_path / "raw"), memory, (1 << 20) - 4096, direct=False) as raw:  # type: ignore[arg-type]
        assert raw.write(Shape(3, 96 << 10)) > 0
        assert raw.read(Shape(3, 96 << 10), direct=False) > 0
        assert (tmp_path / "raw").read_bytes() == memory[:-4096]
    assert not os.listdir(tmp_path)


def rates_in(folder: Path, manner: Manner | None) -> Rates:
    return speed.write_rates(
        str(folder), nbytes=3 << 20, shape=Shape(2, 1 << 20), direct=False, manner=manner, rounds=2,
        progress=lambda text: None,
    )  # fmt: skip


def test_shards_are_written_by_the_engine_s_own_writer_and_removed(tmp_path: Path) -> None:
    rates = rates_in(tmp_path, HASHED)
    assert {len(r) for r in (rates.first, rates.raw, rates.writer_first, rates.deeper, rates.larger)} == {2}
    assert os.listdir(tmp_path / "shards") == [] and os.listdir(tmp_path) == ["shards"]


def test_without_a_backend_only_the_raw_loop_is_measured(tmp_path: Path) -> None:
    rates = rates_in(tmp_path, None)
    assert len(rates.raw) == 2 and not rates.writer_first and not rates.writer and not os.listdir(tmp_path)


class OnNfs(testing.FaultEnv):
    def file_system(self, path: Any) -> int:
        return 0x6969


@pytest.mark.parametrize(
    ("make", "recycle", "over"),
    [
        (testing.FaultEnv, "auto", 2), (testing.FaultEnv, False, 0),
        (OnNfs, "auto", 0), (OnNfs, True, 2),
    ],
)  # fmt: skip
def test_the_steady_state_is_over_retired_files_where_the_engine_reuses_them(
    tmp_path: Path, make: Callable[[Any], Any], recycle: Any, over: int
) -> None:
    (tmp_path / "probed").write_bytes(bytes(4096))
    try:
        _native.PosixEnv().reuse(tmp_path / "probed", tmp_path / "taken").close()
    except OSError as error:
        pytest.skip(f"files cannot be reused here: {error}")
    env = make(_native.PosixEnv())
    with mmap.mmap(-1, 1 << 20) as memory:
        shards = Shards(
            env, str(tmp_path / "shards"), memory, 1 << 20, Shape(2, 256 << 10), direct=False,
            manner=Manner("posix", hash=True, recycle=recycle),
        )  # fmt: skip
        with shards:
            rates = [rate for _ in range(2) for rate in (shards.write_new(), shards.write_over())]
        del shards
    assert len([rate for rate in rates[1::2] if rate is not None]) == over and None not in rates[::2]
    trace = env.trace()
    # Out of the retired folder, then under the next shard's name.
    assert len([line for line in trace if line.startswith("reuse")]) == 2 * over, trace
    assert len([line for line in trace if line.startswith("create") and ".partial" in line]) == 2
    assert os.listdir(tmp_path / "shards") == []


def test_each_name_of_a_shared_file_system_is_known_by_number_and_by_type() -> None:
    for magic, kind in ((0x6969, "nfs4"), (0x65735546, "fuse.sshfs"), (0x0BD00BD0, "lustre"), (0x01021997, "9p")):
        assert network.name_by_magic(magic) == network.name_by_type(kind) is not None
    for kind in ("ext4", "xfs", "fuseblk", "fusectl", "tmpfs", ""):
        assert network.name_by_type(kind) is None
    assert network.name_by_magic(0xEF53) is None and network.name_by_magic(0) is None


def looked_without_uring(folder: Path, *args: object) -> tuple[int, dict[str, Any]]:
    """The command in a process that a container's rules keep from io_uring."""
    command = [sys.executable, "-c", FORBID_URING + SCRIPT, "doctor", str(folder), "--quick", "--json"]
    done = subprocess.run([*command, *map(str, args)], capture_output=True, text=True, timeout=120)
    assert not done.stderr, done.stderr
    return done.returncode, by_name(json.loads(done.stdout))


def test_a_container_s_rules_against_io_uring_are_named_and_threads_are_measured(tmp_path: Path) -> None:
    before = kernel.uring_refusal()
    _, found = looked_without_uring(tmp_path)
    if before is not None:
        pytest.skip(f"no io_uring here even without such rules: {before}")
    assert found["io_uring"]["verdict"] == "warn" and "seccomp profile" in found["io_uring"]["text"]
    assert found["writer"]["figures"]["backend"] == "posix"


def test_a_backend_that_the_engine_would_refuse_is_bad_and_no_writer_is_measured(tmp_path: Path) -> None:
    root, config = tmp_path / "root", tmp_path / "layerwise.json"
    root.mkdir()
    config.write_text('{"writer": {"backend": "uring"}}')
    code, found = looked_without_uring(root, "--config", config)
    assert code == 1 and found["io_uring"]["verdict"] == "bad"
    assert "bandwidth" in found and "writer" not in found
    config.write_text('{"writer": {"backend": "nvm"}}')
    code, answer = call_json(root, "--config", config)
    found = by_name(answer)
    if kernel.has_dax(str(root)):
        assert found["dax"]["verdict"] == "ok" and found["writer"]["figures"]["backend"] == "nvm"
    else:
        assert code == 1 and found["dax"]["verdict"] == "bad"
        assert "bandwidth" in found and "writer" not in found
    assert not os.listdir(root)


def test_the_limit_on_locked_memory_is_the_one_of_a_user_without_privileges() -> None:
    if os.geteuid() != 0:
        pytest.skip("needs root to become somebody else")
    script = (
        "import os, resource; from layerwise_dist.doctor import kernel\n"
        "resource.setrlimit(resource.RLIMIT_MEMLOCK, (65536, 65536)); print(kernel.lockable_bytes())\n"
        f"os.seteuid({NOBODY}); print(kernel.lockable_bytes())"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert done.stdout.split()[-1:] == ["65536"], done.stderr


def test_a_lock_of_a_live_job_is_seen_without_taking_it(tmp_path: Path) -> None:
    path = tmp_path / "owner"
    assert not kernel.is_locked(str(path))
    lock = _native.PosixEnv().lock(path)
    assert kernel.is_locked(str(path))
    lock.release()
    assert not kernel.is_locked(str(path))
    _native.PosixEnv().lock(path).release()


def test_dax_is_refused_where_there_is_none() -> None:
    if not os.path.isdir("/dev/shm"):
        pytest.skip("no /dev/shm")
    _, answer = call_json("/dev/shm")
    assert by_name(answer)["dax"]["figures"] == {"available": False}


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1000", 1000),
        ("1.2G", 1_200_000_000),
        ("512MiB", 512 << 20),
        ("98M", 98 * MB),
        ("3 kB", 3000),
        ("2T", 2 * 10**12),
    ],
)
def test_sizes_are_read_in_decimal_units_unless_binary_is_said(text: str, value: int) -> None:
    assert parse_number(text) == value


@pytest.mark.parametrize("text", ["", "G", "-1", "1e9", "1iB", "1.2.3G", "nan"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="not a number"):
        parse_number(text)


def test_sizes_are_said_in_three_digits() -> None:
    assert [size(n) for n in (0, 999, 1234, 120 * MB, 5 * 10**15)] == ["0 B", "999 B", "1.23 kB", "120 MB", "5000 TB"]
