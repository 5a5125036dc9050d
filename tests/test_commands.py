# SPDX-License-Identifier: Apache-2.0
"""Every command that README, docs, docstrings and scripts tell people to type is run by a test, or here is why not.

A command that is new, or another one than it was, fails here until somebody has said who runs it.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import typer
from kit.commands import ROOT, commands, functions_in
from kit.runners import Running, Warm

from layerwise_dist.cli.app import app

HERE = "test_commands.py::"
# Why no test runs what it says, word by word.
_INSTALLS = "changes the system or the environment that the tests run in; launch/setup.sh does as much before them"
_MINUTES = "takes minutes; the tests run the same with --quick"
_RELEASE = "downloads gigabytes: run by hand before a release; docs/tables/versions.md has what was tried"
_MACHINES = "takes minutes to an hour in virtual machines: run by hand; docs/tables/ has what came out"
_PLACE = "names a command without all of its arguments: it is one of the others here"

# What is typed (a regular expression for all of it), and the tests that run it, or a reason that none does. What the
# tests run has a smaller model, fewer steps or another directory.
TABLE: list[tuple[str, str]] = [
    (r"bash launch/demo\.sh", HERE + "test_the_demo_finds_every_bit_equal"),
    (r"bash launch/setup\.sh", "tests/run.sh runs it before these tests"),
    (r"bash tests/run\.sh( --long( -k soak)?)?", "it is what runs these tests"),
    (
        r"bash tests/coverage\.sh( .*)?",
        "builds the core anew and takes longer than all tests, which it runs; test_coverage.py tries its tables",
    ),
    (
        r"bash tests/run\.sh --soak .*",
        "test_soak.py::test_a_trial_that_is_killed_and_goes_on_with_another_number_of_ranks",
    ),
    (r"bash tests/(run\.sh --powercut|vm/(powercut|filesystems)\.sh)( .*)?", _MACHINES),
    (r"bash tests/quick\.sh( .*)?", "tests/run.sh runs each of its steps"),
    (r"torchrun --nnodes=1:4 --max-restarts=3", "test_elastic.py::test_a_job_goes_on_with_fewer_ranks_and_with_more"),
    (r"bash tests/(versions|chroot)\.sh( .*)?", _RELEASE),
    (
        r"bash launch/wheel\.sh( .*)?",
        "test_wheel.py::test_the_wheel_trains_is_killed_and_resumes_in_an_empty_environment",
    ),
    (r"bash tests/(native|vm/run)\.sh( plain)?", "tests/run.sh runs it beside these tests"),
    (
        r"bash tests/gpu\.sh( .*)?",
        "test_gpu_kit.py::test_every_section_passes_on_the_stand_in_or_says_what_it_needs",
    ),
    (r"(sudo )?apt-get install .*|python3 -m venv \.venv|(\.venv/bin/)?pip install .*", _INSTALLS),
    (r"layerwise (ls|verify) checkpoints/gpt", "test_cli.py::test_verify_of_sound_checkpoints_reads_all_of_them"),
    (r"layerwise ls( DIR)?", "test_cli.py::test_ls_tells_the_newest_the_lineage_and_what_was_abandoned"),
    (
        r"layerwise show( DIR)?( \[--step N \| --tag TAG\])?",
        "test_cli.py::test_show_chooses_the_lineage_s_commit_of_a_step",
    ),
    (r"layerwise show --json", "test_cli.py::test_show_gives_every_tensor_with_its_place"),
    (
        r"layerwise verify( DIR)?( \[--step N \| --tag TAG\])?",
        "test_cli.py::test_verify_of_sound_checkpoints_reads_all_of_them",
    ),
    (
        r"layerwise show (DIR )?--tensors.*",
        "test_diff.py::test_show_lists_the_tensors_that_fit_where_they_lie_and_what_is_no_number",
    ),
    (r"layerwise diff( DIR --step N --step M)?", "test_diff.py::test_two_steps_of_one_directory"),
    (r"layerwise diff A B", "test_diff.py::test_it_finds_which_tensors_differ_in_how_many_elements_and_how_far"),
    (
        r"layerwise (un)?pin( DIR --step N)?",
        "test_housekeeping.py::test_a_running_job_keeps_what_is_pinned_and_lets_it_go_once_it_is_not",
    ),
    (
        r"layerwise prune( DIR --keep-last N( --keep-every M --yes)?)?",
        "test_housekeeping.py::test_prune_lists_what_would_go_and_removes_it_only_if_told",
    ),
    (
        r"layerwise cp( DIR OUT( --step N| \[--step N \| --tag TAG\])?)?",
        "test_housekeeping.py::test_a_copy_restores_by_itself",
    ),
    (r"layerwise import( .*)?", "test_import.py::test_a_file_of_torch_save_goes_on_with_its_optimizer"),
    (
        r"layerwise export( DIR OUT \[--format hf\|dcp\|torch\])?",
        "test_exporting.py::test_torch_reads_a_file_that_both_load_state_dicts_take_and_trains_on",
    ),
    (
        r"layerwise watch( (DIR|checkpoints))?( --once)?",
        "test_watching.py::test_it_tells_of_a_job_and_changes_nothing",
    ),
    (
        r"layerwise report( (DIR|checkpoints))?( -o report\.html)?",
        "test_report.py::test_the_command_makes_a_page_of_a_job_and_replaces_nothing_unasked",
    ),
    (r"layerwise selftest( \[DIR\])?", "test_selftest.py::test_it_kills_resumes_compares_and_leaves_nothing"),
    (
        r"layerwise rehearse( -- .*)?",
        "test_rehearse.py::test_a_script_that_resumes_exactly_passes_and_its_own_directory_stays_as_it_is",
    ),
    (
        r"layerwise doctor.*",
        "test_doctor.py::test_the_options_and_the_configuration_reach_the_writer_and_the_findings",
    ),
    (r"layerwise tune.*", "test_paced.py::test_tune_predicts_from_the_disk"),
    (r"layerwise bench", _PLACE),
    (r"layerwise bench layers", "test_bench.py::test_steps_by_layers_are_measured_against_the_optimizers_own"),
    (r"layerwise bench trace( DIR .*)?", "test_bench.py::test_a_step_is_traced_and_drawn"),
    (
        r"layerwise bench restore DIR --ranks 1,2,8",
        "test_bench.py::test_attach_and_restore_are_measured_beside_the_reading",
    ),
    (
        r"layerwise bench restore( DIR)? --reshard( 4:2)?",
        "test_bench.py::test_a_restore_into_another_cut_is_measured_beside_the_same_cut_and_dcp",
    ),
    (
        r"layerwise bench export( DIR.*)?",
        "test_bench.py::test_exports_are_measured_beside_each_tools_own_converter",
    ),
    (
        r"layerwise bench loops( DIR.*)?",
        "test_bench.py::test_checkpoints_in_other_packages_loops_are_measured_beside_a_loop_of_ones_own",
    ),
    (
        r"layerwise bench goodput( (DIR|checkpoints) .*)?",
        "test_goodput.py::test_a_job_is_killed_by_the_trace_comes_back_and_its_time_is_accounted_for",
    ),
    (r"layerwise bench (writer|restore|commit|train) DIR.*", _MINUTES),
    (r"python -c .*", HERE + "test_the_schema_is_printed_as_the_guide_says"),
    (r"python -X faulthandler", _PLACE),
    (r"python -m", _PLACE),
    (r"python examples/read_checkpoint\.py DIR", "test_frozen.py::test_the_short_reader_reads_bases_too"),
    (r"\.venv/bin/python -m pytest( tests/test_kill\.py)?", "these are the tests"),
    (r"\.venv/bin/python -m pytest -q --long tests/test_crash_states\.py", "these are the tests"),
    (
        r"\.venv/bin/python -m pytest -s --long tests/test_many_headers\.py",
        "test_many_headers.py::test_the_headers_of_512_shards_of_1800_tensors_are_planned_in_bounded_memory",
    ),
    (
        r"\.venv/bin/python tests/exactness_table\.py > docs/tables/exactness\.md",
        "test_exactness.py::test_the_table_in_the_docs_is_whole_and_what_is_tried_again_is_as_it_says",
    ),
    (
        r"\.venv/bin/python tests/matrix\.py --out docs/tables/restore-matrix\.md",
        "test_matrix.py::test_drawn_pairs_of_wrappers_and_numbers_of_ranks_restore_to_the_bit",
    ),
    (
        r"\.venv/bin/python tests/configuration_page\.py > docs/configuration\.md",
        "test_made_pages.py::test_the_page_of_the_configuration_is_what_the_model_says",
    ),
    (r"python tests/attacks", "test_attacks.py::test_every_crafted_directory_is_a_named_error_or_an_older_commit"),
    (r"python tests/fuzz/fuzz\.py", "test_fuzz.py::test_no_reader_raises_anything_but_a_damage_error"),
    (r"bash tests/fuzz/native\.sh", "builds the core with sanitizers for minutes: it is for hours, not for each run"),
    (
        r"python tests/foreign/deepspeed\.py SOURCE_TREE",
        "test_foreign.py::test_the_runner_of_deepspeeds_tests_tells_what_passes_what_fails_what_hangs_and_leaves_nothing",
    ),
    (
        r"python tests/foreign/dcp\.py SOURCE_TREE",
        "test_foreign.py::test_the_runner_of_pytorchs_tests_tells_what_passes_and_what_does_not",
    ),
    (
        r"python tests/contrast_deepspeed\.py",
        "test_deepspeed_kill.py::"
        "test_deepspeeds_own_save_names_a_checkpoint_without_the_killed_ranks_part_and_this_one_does_not",
    ),
    (
        r"python -m layerwise_dist\.bench\.(commit|train|paired|reshard|export|loops|goodput)_worker .*",
        "`layerwise bench` starts it, in test_bench.py",
    ),
    (r"python -m layerwise_dist\.monitor SOCKET MEMORY PID", "a training process starts it, in test_monitor.py"),
    (r"python -m torch\.distributed\.run \.\.\. -m layerwise_dist\.selftest\.job .*", "`layerwise selftest` starts it"),
    (
        r"mpirun -n 4 python train\.py",
        "test_mpi.py::test_a_job_under_mpirun_that_loses_a_rank_ends_and_resumes_bit_for_bit",
    ),
    (
        r"torchrun .*examples/train_gpt\.py .*",
        HERE + "test_the_gpt_trains_under_torchrun",
    ),
    (
        r"(torchrun|deepspeed) .*train\.py --deepspeed_config .*",
        "test_deepspeed_kill.py::test_the_example_starts_and_starts_again_under_each_launcher",
    ),
    (
        r"bash launch/torchrun\.sh .*",
        "test_deepspeed_kill.py::test_each_launchers_script_starts_all_ranks_again_when_one_dies",
    ),
    (
        r"bash launch/(deepspeed|mpirun)\.sh .*|sbatch .*launch/slurm\.sbatch.*",
        "test_deepspeed_kill.py::test_the_example_starts_and_starts_again_under_each_launcher",
    ),
    (
        r"python examples/digits_hf\.py .*",
        "test_hf.py::test_the_example_goes_on_within_an_epoch_and_logs_what_it_would_have",
    ),
    (
        r"torchrun .*examples/digits_hf\.py .*",
        "test_hf.py::test_the_example_trains_one_replica_a_rank_under_torchrun",
    ),
    (
        r"(python|torchrun .*) examples/torchtitan_way\.py .*",
        "test_loops.py::test_torchtitans_way_goes_on_as_if_it_had_not_been_killed",
    ),
    (
        r"python examples/digits_cnn\.py .*",
        "test_examples.py::test_the_cnn_goes_on_within_an_epoch_and_ends_as_if_it_had_not_been_killed",
    ),
    (
        r"torchrun .*examples/digits_cnn\.py .*",
        "test_examples.py::test_the_cnn_trains_one_replica_a_rank_under_torchrun",
    ),
    (
        r"(python|torchrun .*) ?examples/digits_(accelerate|lightning)\.py .*",
        "test_examples.py::test_the_loops_of_accelerate_and_lightning_go_on_within_an_epoch",
    ),
    (
        r"python examples/lora\.py .*",
        "test_examples.py::test_frozen_weights_are_written_once_and_again_when_the_adapters_are_merged",
    ),
    (
        r"python examples/mnist_mlp\.py",
        "test_examples.py::test_the_smallest_script_goes_on_where_it_was_killed",
    ),
]  # fmt: skip

# Files that a reader makes.
_THEIRS = {"train.py", "layerwise.json"}


def rows_of(command: str) -> list[tuple[str, str]]:
    return [row for row in TABLE if re.fullmatch(row[0], command)]


def test_every_command_is_run_by_a_test_or_has_a_reason() -> None:
    told = commands()
    assert len(told) > 60, "the search for them finds them"
    unknown = {command: files for command, files in told.items() if not rows_of(command)}
    assert not unknown, f"nobody has said who runs these: {unknown}"
    stale = [pattern for pattern, _ in TABLE if not any(re.fullmatch(pattern, command) for command in told)]
    assert not stale, f"nobody tells these any more: {stale}"


def test_the_tests_in_the_table_exist() -> None:
    for _, who in TABLE:
        if "::" in who:
            file, _, name = who.partition("::")
            assert name in functions_in(file), who


def test_mutation_a_new_command_is_noticed(tmp_path: Path) -> None:
    text = "Prose, `layerwise ls DIR --colour`, and:\n\n    python examples/other.py --dir x  # new\n"
    (tmp_path / "README.md").write_text(text)
    found = commands(tmp_path)
    assert [*found] == ["python examples/other.py --dir x", "layerwise ls DIR --colour"]
    assert not any(map(rows_of, found))


LAYERWISE = [command for command in commands() if command.startswith("layerwise ") and "|" not in command]
OTHERS = [command for command in commands() if not command.startswith(("layerwise ", "pip ", "sudo "))]


@pytest.mark.parametrize("command", LAYERWISE)
def test_the_command_line_knows_every_option_that_is_told(tmp_path: Path, command: str) -> None:
    (tmp_path / "layerwise.json").write_text("{}")
    text = command.replace("[--step N]", "--step 3").replace("[DIR]", "")
    given = {**dict.fromkeys(("DIR", "A", "checkpoints", "checkpoints/gpt"), str(tmp_path)), "N": "3", "M": "4"}
    words = [given.get(word, word) for word in shlex.split(text)[1:]]
    words = [str(tmp_path / word) if word == "layerwise.json" else word for word in words]
    at: Any = typer.main.get_command(app)
    while words and hasattr(at, "commands"):
        assert words[0] in at.commands, f"there is no {words[0]!r}"
        at, words = at.commands[words[0]], words[1:]
    needed = [p.name for p in getattr(at, "params", []) if p.param_type_name == "argument" and p.required]
    if needed and not any(word == str(tmp_path) for word in words):
        words = [str(tmp_path)] * len(needed) + words  # told without its directories
    for option in getattr(at, "params", []):
        if option.param_type_name == "option" and option.required and not set(option.opts) & set(words):
            words += [option.opts[0], "1"]  # told without what it needs
    if not hasattr(at, "commands"):
        at.make_context("layerwise", words)


@pytest.mark.parametrize("command", OTHERS)
def test_the_files_and_the_scripts_options_that_are_told_exist(command: str) -> None:
    folders = [ROOT, *((ROOT / file).parent for file in commands()[command])]
    script: Path | None = None
    for word in command.replace("=", " ").split():
        if re.fullmatch(r"[\w./-]+\.(py|sh|sbatch|json)", word) and word not in _THEIRS:
            found = next((folder / word for folder in folders if (folder / word).exists()), None)
            assert found is not None, f"there is no {word}"
            script = script or (found if found.suffix == ".py" else None)
        elif word in _THEIRS:
            here = [folder / word for folder in folders if (folder / word).exists()]
            script = script or (here[0] if here and word.endswith(".py") else None)
        elif script is not None and word.startswith("--") and word != "--deepspeed_config":  # which DeepSpeed adds
            assert f'"{word}"' in script.read_text(), f"{script.name} has no {word}"


# -- what no other test runs ------------------------------------------------------------------------------------------


def test_the_schema_is_printed_as_the_guide_says() -> None:
    (command,) = [each for each in commands() if each.startswith("python -c ")]
    words = shlex.split(command)
    done = subprocess.run([sys.executable, *words[1:]], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and "every_n_steps" in json.loads(done.stdout)["properties"], done.stderr


@pytest.mark.parametrize(
    ("arguments", "gigabytes", "code", "says"),
    [
        (["2.9.1"], "1000000", 1, "GB free, and a version takes up to 1000000 GB"),
        (["2.9.1", "../2.9.1"], "0", 2, "not a version: ../2.9.1"),
        (["2.9.1"], "12 GB", 2, "not a number: 12 GB"),
        (["--help"], "0", 0, ""),
    ],
)
def test_no_version_of_torch_is_downloaded_that_has_no_room_or_no_name(
    arguments: list[str], gigabytes: str, code: int, says: str
) -> None:
    environment = {**os.environ, "LAYERWISE_VERSIONS_GB": gigabytes}
    done = subprocess.run(
        ["bash", str(ROOT / "tests" / "versions.sh"), *arguments],
        env=environment, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == code and says in done.stderr, done.stderr


def test_the_gpt_trains_under_torchrun(warm: Warm, tmp_path: Path) -> None:
    """As it is told, of a smaller size. That it goes on where it was killed is what launch/demo.py shows."""
    shape = ["--dim", "32", "--layers", "2", "--heads", "2", "--context", "16", "--batch", "2"]
    arguments = ["--steps", "5", "--dir", tmp_path / "gpt", *shape]
    done = warm.run(ROOT / "examples" / "train_gpt.py", 2, *arguments, max_restarts=3, timeout=120)
    assert re.search(r"step\s+5\b", done.output), done.output[-6000:]


def test_the_demo_finds_every_bit_equal(start: Callable[..., Running], tmp_path: Path, long: bool) -> None:
    if not long:
        pytest.skip("--long")
    environment = {"LAYERWISE_VENV": sys.prefix, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    demo = str(ROOT / "launch" / "demo.sh")
    done = start(["bash", demo, "--steps", "12", "--dir", str(tmp_path / "demo")], environment).wait(900)
    assert done.returncode == 0, done.output[-6000:]
