"""``hidden-digits``: a large body that all pictures share, and a small real digit somewhere on it, which alone is the class.

What fine-grained recognition is about, in 24x24 pixels: of a picture's area, eight ninths are the same whatever its class. The
digits are those of `sklearn.datasets.load_digits` (8x8 pixels, UCI, CC BY 4.0), divided as ``digits`` divides them.
"""

from __future__ import annotations

from typing import Annotated

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from pydantic import Field

from limbeck.data.embedded.digit_scenes import Split
from limbeck.data.images import Embedded, ImageRecord, LabelledImages, load_digits, register_image_source

SIDE, DIGIT = 24, 8  # pixels
_PLACE_SEED = 21  # of places and noise; changing it changes what every published number was measured on
_SHADE = 0.3  # brightness of the body


class HiddenDigits(Embedded):
    """copies: pictures of each training digit, each at another place; held-out digits have one. noise: standard deviation of the
    pixels' noise, as a share of the range from black to white. contrast: of the digit against the body that it covers, in (0,
    1]."""

    copies: Annotated[int, Field(ge=1)] = 1
    noise: Annotated[float, Field(ge=0)] = 0.05
    contrast: Annotated[float, Field(gt=0, le=1)] = 1.0


def body() -> NDArray[np.float64]:
    """A disc of one shade, so that what is next to the digit does not tell where it is: [24, 24] in 0..1."""
    across = np.arange(SIDE) - (SIDE - 1) / 2
    return np.where(np.hypot(across[:, None], across[None, :]) <= SIDE / 2, _SHADE, 0.0)


def load_hidden_digits(chosen: HiddenDigits, split: Split) -> LabelledImages:
    """One split of the pictures, the same on every machine. Ids are ``hidden-digits/<digit>-<copy>``."""
    digits = load_digits(chosen, split)
    records = []
    for record in digits.records:
        assert isinstance(record.image, Image.Image)
        number = int(record.id.rpartition("/")[2])
        ink = np.asarray(record.image) / 255
        for copy in range(chosen.copies if split == "train" else 1):
            picture = hidden(
                ink, np.random.default_rng([_PLACE_SEED, number, copy]), noise=chosen.noise, contrast=chosen.contrast
            )
            records.append(ImageRecord(f"hidden-digits/{number}-{copy}", Image.fromarray(picture), record.label))
    return LabelledImages(records, digits.classes)


def hidden(
    ink: NDArray[np.float64], draw: np.random.Generator, *, noise: float = 0.05, contrast: float = 1.0
) -> NDArray[np.uint8]:
    """A digit [8, 8] in 0..1 drawn at a random place on the body: [24, 24]."""
    canvas = body()
    top, left = draw.integers(0, SIDE - DIGIT + 1, size=2)
    patch = canvas[top : top + DIGIT, left : left + DIGIT]
    patch[:] = np.maximum(patch, contrast * ink)
    canvas += noise * draw.standard_normal(canvas.shape)
    return np.rint(255 * canvas.clip(0, 1)).astype(np.uint8)


register_image_source("hidden-digits", HiddenDigits, load_hidden_digits)
