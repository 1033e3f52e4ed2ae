"""``hidden-digits``: a large body that all pictures share, and a small real digit somewhere on it, which alone is the class.

What fine-grained recognition is about, in 24x24 pixels: of a picture's area, eight ninths are the same whatever its class. The
digits are those of `sklearn.datasets.load_digits` (8x8 pixels, UCI, CC BY 4.0), divided as ``digits`` divides them.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

SIDE, DIGIT = 24, 8  # pixels
PLACE_SEED = 21  # of places and noise; changing it changes what every published number was measured on
_SHADE = 0.3  # brightness of the body


def body() -> NDArray[np.float64]:
    """A disc of one shade, so that what is next to the digit does not tell where it is: [24, 24] in 0..1."""
    across = np.arange(SIDE) - (SIDE - 1) / 2
    return np.where(np.hypot(across[:, None], across[None, :]) <= SIDE / 2, _SHADE, 0.0)


def hidden(
    ink: NDArray[np.float64], draw: np.random.Generator, *, noise: float = 0.05, contrast: float = 1.0
) -> NDArray[np.uint8]:
    """A digit [8, 8] in 0..1 drawn at a random place on the body: [24, 24]."""
    canvas = body()
    top, left = draw.integers(0, SIDE - DIGIT + 1, size=2)
    patch = canvas[top : top + DIGIT, left : left + DIGIT]
    patch += contrast * (ink - patch)
    canvas += noise * draw.standard_normal(canvas.shape)
    return np.rint(255 * canvas.clip(0, 1)).astype(np.uint8)
