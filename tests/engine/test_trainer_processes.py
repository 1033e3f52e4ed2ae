"""Processes whose batches differ train, log and measure as one would."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch


def launched(folder: Path, processes: int) -> Path:
    rendezvous = ["--nproc-per-node", str(processes), "--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"]
    finished = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", *rendezvous, str(Path(__file__).with_name("processes.py")), str(folder)],
        env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert finished.returncode == 0, finished.stderr[-4000:]
    return folder


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return launched(tmp_path_factory.mktemp("one"), 1)


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return launched(tmp_path_factory.mktemp("two"), 2)


def terms(folder: Path) -> list[dict[str, float]]:
    rows = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [{name: term["weighted"] for name, term in row["terms"].items()} for row in rows if "terms" in row]


def test_a_term_that_the_batches_of_one_process_lack_is_summed_by_name(alone: Path, together: Path) -> None:
    one, two = terms(alone / "lacking"), terms(together / "lacking")
    assert len(two) == 6
    assert {"large" in row for row in one} == {True, False}
    assert [row.keys() for row in two] == [row.keys() for row in one]
    assert two[0]["ce"] == pytest.approx(one[0]["ce"], rel=1e-5)


def test_labels_weigh_the_same_however_they_are_spread(alone: Path, together: Path) -> None:
    assert [row["ce"] for row in terms(together / "among")] == pytest.approx(
        [row["ce"] for row in terms(alone / "among")], rel=1e-4
    )
    one, two = (json.loads((folder / "told.json").read_text())["weights"] for folder in (alone, together))
    for name, value in one.items():
        torch.testing.assert_close(torch.tensor(two[name]), torch.tensor(value), rtol=0, atol=1e-4)


def test_every_process_measures_the_same_model(together: Path) -> None:
    first, second = json.loads((together / "told.json").read_text())["measured"]
    assert len(first) == 4  # three validations, and the student that was kept
    assert first == second
