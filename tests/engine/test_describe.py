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


class PairOfMaps(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)

    def forward(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.conv(pixel_values), pixel_values


def pair_of_maps() -> nn.Module:
    return PairOfMaps()


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
    assert [(point["class"], point["shape"], point["mark"]) for point in points] == [
        ("Conv2d", "[2, 4, 2, 2]", "stage 1, features"),
        ("Flatten", "[2, 16]", ""),
        ("Linear", "[2, 5]", "head"),
    ]


def test_a_module_without_logits_has_no_marks() -> None:
    points = tap_points("python:tests.engine.test_describe:pair_of_maps", (1, 3, 4, 4))
    assert [(point["name"], point["mark"]) for point in points] == [("conv", "")]


@pytest.mark.parametrize(
    ("model", "shape", "marked"),
    [
        (
            "timm:test_vit",  # at its own size: 10 x 10 patches and the class token
            None,
            [
                *((f"blocks.{block}", "[1, 101, 64]", f"stage {number}") for number, block in enumerate((1, 2, 3, 5), start=1)),
                ("norm", "[1, 101, 64]", "features"),
                ("head", "[1, 1000]", "head"),
            ],
        ),
        (
            "torchvision:resnet18",
            (1, 3, 64, 64),
            [
                ("relu", "[1, 64, 32, 32]", "stage 1"),
                ("layer1", "[1, 64, 16, 16]", "stage 2"),
                ("layer2", "[1, 128, 8, 8]", "stage 3"),
                ("layer3", "[1, 256, 4, 4]", "stage 4"),
                ("layer4", "[1, 512, 2, 2]", "stage 5, features"),
                ("fc", "[1, 1000]", "head"),
            ],
        ),
        (
            "tiny:cnn",
            (1, 1, 8, 8),
            [
                ("stages.0", "[1, 16, 8, 8]", "stage 1"),
                ("stages.1", "[1, 32, 4, 4]", "stage 2"),
                ("stages.2", "[1, 64, 2, 2]", "stage 3"),
                ("stages", "[1, 64, 2, 2]", "features"),
                ("head", "[1, 10]", "head"),
            ],
        ),
    ],
)
def test_the_usual_points_of_a_classifier_are_marked(
    model: str, shape: tuple[int, ...] | None, marked: list[tuple[str, str, str]]
) -> None:
    points = tap_points(model, shape)
    assert [(point["name"], point["shape"], point["mark"]) for point in points if point["mark"]] == marked


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("tiny", "write source:name"),
        ("tiny:digit-vlm-studnet", "digit-vlm-student"),
        ("timy:digit-vlm-student", "did you mean 'tiny'"),
        ("python:no.such.module:factory", "cannot import"),
        ("python:torch.nn:Liner", "did you mean 'Linear'"),
        ("transformers:/no/such/folder", "no folder"),
        ("timm:resnet81", "did you mean 'resnet"),
    ],
)
def test_bad_input_is_named(model: str, message: str) -> None:
    with pytest.raises(BadInput, match=message):
        tap_points(model)


def test_a_shape_that_does_not_fit_names_the_option() -> None:
    with pytest.raises(BadInput, match=r"\[1, 3, 8, 8\].*--shape"):
        tap_points("python:tests.engine.test_describe:pyramid", (1, 3, 8, 8))
    assert torch.is_grad_enabled()
