"""What many tests need: a small teacher on disk and a recipe that trains from it in a second."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch

from limbeck.models.loading import ensure_torchvision

ensure_torchvision()
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def teacher_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained tiny teacher, saved as transformers saves it."""
    from limbeck.models.tiny import digit_vlm

    folder = tmp_path_factory.mktemp("models") / "teacher"
    model, processor = digit_vlm.build("digit-vlm-teacher", seed=5)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture
def recipe(teacher_folder: Path) -> dict[str, Any]:
    """Switch-KD on 48 scenes for 12 steps, validated every 5, a checkpoint every 3."""
    return {
        "method": {"name": "switch-kd"},
        "teacher": {"source": "transformers", "name": str(teacher_folder)},
        "student": {"source": "tiny", "name": "digit-vlm-student"},
        "data": {"source": "digit-scenes", "scenes": 48, "questions": 2, "val": 40, "test": 40},
        "train": {"steps": 12, "batch_size": 16, "lr": 3e-3, "evaluate_every": 5, "checkpoint_every": 3, "log_every": 1},
        "evaluate": ["vqa-accuracy", "switch-route"],
        "arms": ["sft", "kd"],
    }
