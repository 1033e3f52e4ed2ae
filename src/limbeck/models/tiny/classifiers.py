"""``cnn`` and ``mlp``: plain classifiers of any width, small enough to train on a CPU within seconds."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from limbeck.errors import BadInput
from limbeck.models.classifier import Classifier
from limbeck.naming import nearest

NAMES = ("cnn", "mlp")
OPTIONS = ("widths", "channels", "hidden", "pixels")


class Cnn(nn.Module):
    """Blocks of 3x3 convolution, BatchNorm, ReLU, the first at full size and each other at half its predecessor's; mean; linear head.

    widths: channels of the blocks. [B, channels, H, W] -> [B, classes].
    """

    def __init__(self, classes: int, widths: Sequence[int] = (16, 32, 64), channels: int = 1) -> None:
        super().__init__()
        blocks, before = [], channels
        for number, width in enumerate(widths):
            convolution = nn.Conv2d(before, width, kernel_size=3, padding=1, stride=2 if number else 1, bias=False)
            blocks.append(nn.Sequential(convolution, nn.BatchNorm2d(width), nn.ReLU()))
            before = width
        self.stages = nn.Sequential(*blocks)
        self.head = nn.Linear(before, classes)

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.head(self.stages(pixel_values).mean((2, 3)))


class Mlp(nn.Sequential):
    """Linear layers with ReLU between them on the flattened picture. pixels: of a picture, over all channels."""

    def __init__(self, classes: int, hidden: Sequence[int] = (64,), pixels: int = 64) -> None:
        layers: list[tuple[str, nn.Module]] = [("flatten", nn.Flatten())]
        before = pixels
        for number, width in enumerate(hidden):
            layers += [(f"hidden{number}", nn.Linear(before, width)), (f"relu{number}", nn.ReLU())]
            before = width
        super().__init__(OrderedDict([*layers, ("head", nn.Linear(before, classes))]))


def build(
    name: str,
    classes: int,
    seed: int = 0,
    *,
    widths: Sequence[int] = (16, 32, 64),
    channels: int = 1,
    hidden: Sequence[int] = (64,),
    pixels: int = 64,
) -> Classifier:
    """A freshly initialised ``cnn`` (widths, channels) or ``mlp`` (hidden, pixels). Raises `BadInput` for another name, and for what is no
    number above 0."""
    if name not in NAMES:
        raise BadInput(f"there is no tiny classifier {name!r}: {nearest(name, NAMES)}")
    for key, count in {"channels": channels, "pixels": pixels}.items():
        if not whole(count):
            raise BadInput(f"tiny {name!r}: options.{key} is {count!r}; expected a whole number above 0")
    for key, counts in {"widths": widths, "hidden": hidden}.items():
        if not isinstance(counts, list | tuple) or not all(map(whole, counts)):
            raise BadInput(f"tiny {name!r}: options.{key} is {counts!r}; expected a list of whole numbers above 0, as [16, 32]")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Cnn(classes, widths, channels) if name == "cnn" else Mlp(classes, hidden, pixels)
    return Classifier(model, channels=channels if name == "cnn" else None)


def whole(value: object) -> bool:
    """Whether a size is a whole number above 0."""
    return isinstance(value, int) and value > 0
