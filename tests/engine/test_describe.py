"""`tap_points` names what can be tapped, and where a vision-language model is switched."""

from pathlib import Path

import pytest
import torch
from torch import nn

from limbeck import taps
from limbeck.engine.describe import tap_points
from limbeck.errors import BadInput
from limbeck.models.tiny import digit_vlm


def pyramid() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 2, stride=2), nn.Flatten(), nn.Linear(16, 5))


def test_a_vision_language_model_is_marked_where_it_is_switched() -> None:
    marked = {point["mark"]: point for point in tap_points("tiny:digit-vlm-student") if point["mark"]}
    assert {mark: point["name"] for mark, point in marked.items()} == {
        "vision": "model.vision_tower",
        "projector (visual switch)": "model.multi_modal_projector",
        "language": "model.language_model",
        "head": "lm_head",
    }
    assert marked["projector (visual switch)"]["shape"] == "[1, 16, 48]"


def test_every_point_can_be_tapped_under_its_name() -> None:
    model, _ = digit_vlm.build("digit-vlm-student")
    for point in tap_points("tiny:digit-vlm-student"):
        taps.record(model, {"here": point["name"]}).close()


def test_a_folder_is_described_without_its_weights(tmp_path: Path) -> None:
    model, processor = digit_vlm.build("digit-vlm-student")
    model.config.save_pretrained(tmp_path)
    with pytest.raises(BadInput, match="no processor"):
        tap_points(f"transformers:{tmp_path}")
    processor.save_pretrained(tmp_path)
    assert tap_points(f"transformers:{tmp_path}") == tap_points("tiny:digit-vlm-student")


def test_a_plain_module_is_shown_zeros() -> None:
    points = tap_points("python:tests.engine.test_describe:pyramid", (2, 3, 4, 4))
    assert [(point["class"], point["shape"]) for point in points] == [
        ("Conv2d", "[2, 4, 2, 2]"),
        ("Flatten", "[2, 16]"),
        ("Linear", "[2, 5]"),
    ]


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("tiny", "write source:name"),
        ("tiny:digit-vlm-studnet", "digit-vlm-student"),
        ("timy:digit-vlm-student", "did you mean 'tiny'"),
        ("python:no.such.module:factory", "cannot import"),
        ("python:torch.nn:Liner", "did you mean 'Linear'"),
        ("transformers:/no/such/folder", "no folder"),
    ],
)
def test_bad_input_is_named(model: str, message: str) -> None:
    with pytest.raises(BadInput, match=message):
        tap_points(model)


def test_a_shape_that_does_not_fit_names_the_option() -> None:
    with pytest.raises(BadInput, match=r"\[1, 3, 8, 8\].*--shape"):
        tap_points("python:tests.engine.test_describe:pyramid", (1, 3, 8, 8))
    assert torch.is_grad_enabled()
