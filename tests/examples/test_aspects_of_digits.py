"""examples/aspects_of_digits.py: what ships beside recipes/makd.yaml is what it writes, and most of it is right."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np

from limbeck.data.images import load_images

ROOT = Path(__file__).resolve().parents[2]
SHIPPED = ROOT / "recipes" / "digits-aspects.json"


def test_the_shipped_answers_are_what_the_script_writes(tmp_path):
    out = tmp_path / "answers.json"
    subprocess.run([sys.executable, ROOT / "examples" / "aspects_of_digits.py", "--out", out], check=True, capture_output=True)
    assert out.read_text() == SHIPPED.read_text()


def test_one_answer_in_ten_is_wrong():
    images = load_images({"source": "digits", "answers": str(SHIPPED)}, "train")
    values = np.array([record.label for record in images.records])
    answers = np.array([images.answers.probabilities[record.id] for record in images.records])
    assert len(images.answers.questions) == answers.shape[1] == 10
    for column, holds in ((7, values % 2 == 0), (8, values > 4), (9, values % 3 == 0)):
        assert abs(((answers[:, column] > 0.5) == holds).mean() - 0.9) < 0.03
    loop, two = answers[:, 0] > 0.5, answers[:, 1] > 0.5
    assert loop[values == 0].mean() > 0.7 > 0.4 > loop[values == 3].mean()
    assert two[values == 8].mean() > 0.2 > two[values == 5].mean()
