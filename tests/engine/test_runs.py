"""Folders of runs, and what is left of a run that cannot be measured."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import limbeck as lb
from limbeck.engine import run as running
from limbeck.engine.bench import T95, paired
from limbeck.engine.recipe import load_recipe
from limbeck.engine.run import claimed, evaluate_run, resume, run
from limbeck.engine.task import build_task
from limbeck.errors import BadInput

HERE = __name__


class Tied(nn.Module):
    """Two layers that share their weights."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(16, 16), nn.Linear(16, 16)
        self.second.weight = self.first.weight
        self.head = nn.Linear(16, 2)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return self.head(self.second(self.first(pixel_values.flatten(1)).relu()).relu())


def tied() -> nn.Module:
    return Tied()


class Pairs(torch.utils.data.Dataset[Any]):
    """Pictures of which those of a split have the given labels, as an array like that of torchvision's SVHN."""

    def __init__(self, labels: list[int]) -> None:
        self.labels = np.array(labels)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return torch.full((1, 4, 4), float(index)), int(self.labels[index])


def pairs(split: str, val: list[int] | None = None, test: list[int] | None = None) -> Pairs | None:
    labels = {"train": [0, 1] * 8, "val": val, "test": test}[split]
    return None if labels is None else Pairs(labels)


def recipe(**data: Any) -> dict[str, Any]:
    return {
        "method": {"name": "compose", "objectives": ["ce"]},
        "student": {"source": "python", "name": f"{HERE}:tied"},
        "data": {"source": "python", "name": f"{HERE}:pairs", **data},
        "train": {"steps": 2, "batch_size": 4, "lr": 1e-3, "evaluate_every": 0, "checkpoint_every": 0},
        "evaluate": ["classification"],
    }


def test_held_out_data_of_one_class(tmp_path):
    """Always saying that class is always right, which is no remark about a teacher that is not there."""
    assert run(recipe(val=[1, 1, 1]), out=tmp_path / "run", quiet=True).validation["accuracy"] in (0, 1)


def test_a_student_outlives_test_data_that_cannot_be_measured(tmp_path):
    with pytest.raises(BadInput, match="no labelled sample"):
        run(recipe(val=[0, 1, 1], test=[-100, -100]), out=tmp_path / "run", quiet=True)
    assert (tmp_path / "run" / "student" / "model.safetensors").exists()


def test_tied_weights_come_back(tmp_path):
    finished = run(recipe(val=[0, 1, 1]), out=tmp_path / "run", quiet=True)
    assert "second.weight" not in load_file(tmp_path / "run" / "student" / "model.safetensors")
    assert evaluate_run(tmp_path / "run", split="val") == finished.validation


def test_runs_of_one_second_have_a_folder_each(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(running.time, "strftime", lambda form: "20260101-000000")
    folders = [run(recipe(), quiet=True).path for _ in range(2)]
    assert folders == [Path("runs/compose-20260101-000000"), Path("runs/compose-20260101-000000-2")]
    assert all((folder / "student").is_dir() and not (folder / ".claim").exists() for folder in folders)


def test_a_folder_is_one_runs_from_the_moment_that_it_is_set_up(tmp_path):
    """Another is refused though nothing is written yet; what fails to be set up leaves nothing."""
    said: list[str] = []

    def other() -> None:
        with pytest.raises(BadInput) as error, claimed(tmp_path / "run", "compose"):
            pass
        said.append(str(error.value))

    with claimed(tmp_path / "run", "compose"):
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
    assert len(said) == 1 and "another run is just being set up" in said[0]
    assert not (tmp_path / "run").exists()
    with pytest.raises(BadInput, match="nonsense"):
        run({**recipe(), "evaluate": ["nonsense"]}, out=tmp_path / "run", quiet=True)
    assert not (tmp_path / "run").exists()
    (tmp_path / "mine").mkdir()
    with pytest.raises(BadInput, match="nonsense"):
        run({**recipe(), "evaluate": ["nonsense"]}, out=tmp_path / "mine", quiet=True)
    assert list((tmp_path / "mine").iterdir()) == []


@pytest.mark.filterwarnings("ignore:the visual switch goes through a trained linear map")
def test_what_a_method_draws_depends_on_the_seed_alone():
    """However teacher and student were come by."""
    values = {
        **recipe(),
        "method": {"name": "switch-kd", "bridge": "linear"},
        "teacher": {"source": "tiny", "name": "digit-vlm-teacher"},
        "student": {"source": "tiny", "name": "digit-vlm-student", "options": {"patch_size": 8, "vision_width": 40}},
        "data": {"source": "digit-scenes", "scenes": 4, "questions": 1, "val": 2, "test": 2},
        "evaluate": ["vqa-accuracy"],
    }
    drawn = []
    for seed in (0, 1):
        values["train"]["seed"] = seed
        loaded = build_task(load_recipe(values))
        given = build_task(load_recipe(values), teacher=loaded.teacher)
        first, second = (torch.cat([p.flatten() for p in task.method.bridge.parameters()]) for task in (loaded, given))
        assert torch.equal(first, second)
        drawn.append(first)
    assert not torch.equal(*drawn)


def test_intervals_beyond_the_table_go_on_as_it_ends():
    """Student's t at 31 degrees of freedom is 2.0395."""
    values, zeros = [float(number) for number in range(32)], [0.0] * 32
    interval = paired(values, zeros)
    half = 2.0395 * float(np.std(values, ddof=1)) / 32**0.5
    assert interval["high"] - interval["mean"] == pytest.approx(half, rel=2e-3)
    assert len(T95) == 30


def test_resume_of_a_folder_without_a_run_is_refused(tmp_path):
    with pytest.raises(BadInput, match="is not a run folder"):
        resume(tmp_path)
    assert lb.load_recipe is load_recipe
