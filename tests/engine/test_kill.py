"""A run that is killed with SIGKILL and resumed ends with the weights of the run that was not."""

import os
import random
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

# Runs the command line in a process that kills itself at the named point. Nothing in Limbeck knows of it.
ASSASSIN = textwrap.dedent(
    """
    import os, signal, sys
    point = sys.argv.pop(1)
    die = lambda: os.kill(os.getpid(), signal.SIGKILL)
    from limbeck.engine import checkpoint, trainer

    def at_call(module, name, number, before=True):
        own, calls = getattr(module, name), []
        def wrapped(*args, **kwargs):
            calls.append(None)
            if before and len(calls) == number: die()
            value = own(*args, **kwargs)
            if not before and len(calls) == number: die()
            return value
        setattr(module, name, wrapped)

    if point == "inside-a-write":  # the method's tensors are on disk, the optimiser's are not
        at_call(trainer, "save_tensors", 3 * 3 + 2, before=False)
    elif point == "before-the-rename":
        at_call(checkpoint.os, "replace", 5)
    elif point == "mid-epoch":
        at_call(trainer, "schedule", 8)
    from limbeck.cli.main import main
    main()
    """
)


def command(arguments: list[str], point: str = "") -> list[str]:
    return [sys.executable, "-c", ASSASSIN, point, *arguments]


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1"}


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "student" / "model.safetensors")


@pytest.fixture(scope="module")
def files(tmp_path_factory, teacher_folder) -> tuple[Path, Path]:
    """A recipe file and the finished run that was not interrupted."""
    folder = tmp_path_factory.mktemp("kill")
    recipe = {
        "method": {"name": "switch-kd"},
        "teacher": {"source": "transformers", "name": str(teacher_folder)},
        "student": {"source": "tiny", "name": "digit-vlm-student"},
        "data": {"source": "digit-scenes", "scenes": 48, "questions": 2, "val": 20, "test": 20},
        "train": {"steps": 14, "batch_size": 16, "lr": 3e-3, "evaluate_every": 6, "checkpoint_every": 3, "log_every": 1},
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    subprocess.run(command(["run", str(folder / "recipe.yaml"), "--out", str(folder / "whole")]), check=True, env=environment())
    return folder / "recipe.yaml", folder / "whole"


def assert_same(run: Path, whole: Path) -> None:
    ours, theirs = weights(run), weights(whole)
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert torch.equal(ours[name], tensor), name

    def untimed(path: Path) -> list[str]:
        return [line.split(', "samples_per_second"')[0] for line in (path / "metrics.jsonl").read_text().splitlines()]

    assert untimed(run) == untimed(whole)


@pytest.mark.parametrize("point", ["mid-epoch", "inside-a-write", "before-the-rename"])
def test_a_killed_run_resumes_to_the_same_bits(files, tmp_path, point):
    recipe, whole = files
    run = tmp_path / "run"
    killed = subprocess.run(command(["run", str(recipe), "--out", str(run)], point), env=environment(), capture_output=True)
    assert killed.returncode == -signal.SIGKILL
    assert not (run / "student").exists()
    resumed = subprocess.run(command(["resume", str(run)]), env=environment(), capture_output=True, text=True)
    assert resumed.returncode == 0, resumed.stderr
    assert "resuming at step" in resumed.stderr
    assert_same(run, whole)
    assert not list((run / "checkpoints").glob("writing-*"))


def test_a_run_killed_at_a_random_moment_resumes_to_the_same_bits(files, tmp_path):
    recipe, whole = files
    run, wait_for = tmp_path / "run", random.randint(1, 12)
    process = subprocess.Popen(command(["run", str(recipe), "--out", str(run)]), env=environment(), stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        if (run / "metrics.jsonl").exists() and (run / "metrics.jsonl").read_text().count("\n") >= wait_for:
            break
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.wait()
    if not (run / "result.json").exists():
        subprocess.run(command(["resume", str(run)]), env=environment(), check=True)
    assert_same(run, whole)


def test_a_finished_run_has_nothing_to_resume(files):
    _, whole = files
    again = subprocess.run(command(["resume", str(whole)]), env=environment(), capture_output=True, text=True)
    assert again.returncode == 2
    assert "is complete: nothing to resume" in again.stderr
