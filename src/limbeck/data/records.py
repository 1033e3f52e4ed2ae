"""What every data source yields: a visual question-answering record whose images are opened only when they are needed."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

ImageSource = str | Path | bytes | Image.Image | Callable[[], Any]
"""Where a picture is: a file, its encoded bytes, an opened picture, or a function that fetches any of these."""


@dataclass(frozen=True)
class VQARecord:
    """One conversation about some images (or none).

    turns: (question, answer) pairs in order; all images stand before the first question.
    kind: the kind of question, for accuracy by kind; "" where the source does not say.
    """

    id: str
    images: tuple[ImageSource, ...]
    turns: tuple[tuple[str, str], ...]
    kind: str = ""


@dataclass(frozen=True)
class LoadedRecords:
    """The usable records of one split, and the rows that were left out: dicts with ``row``, ``id`` and ``reason``."""

    records: list[VQARecord]
    skipped: list[dict[str, str | int]] = field(default_factory=list)


def open_image(source: ImageSource) -> Image.Image:
    """Open and decode a picture, turned upright by its EXIF orientation, as RGB.

    Raises whatever the decoder raises (mostly ``OSError``) where the source is missing, truncated or no image, and ``ValueError`` where
    its pixels are wider than 16 bits of grey or floats in 0..1.
    """
    if callable(source):
        return open_image(source())
    if isinstance(source, Image.Image):
        return source if source.mode == "RGB" else _rgb(source)
    with read_header(source) as image:
        return _rgb(ImageOps.exif_transpose(image))


def _rgb(image: Image.Image) -> Image.Image:
    """As RGB; 16 bits of grey and floats in 0..1 are scaled to 8 bits, where Pillow would cut off all above 255."""
    if image.mode == "F" or image.mode.startswith("I"):  # "I" is how Pillow opens 16 bits of PGM, too
        values, top = np.asarray(image), 1 if image.mode == "F" else 65535
        if not (values.min() >= 0 and values.max() <= top):  # nan is neither
            raise ValueError(
                f"pixels from {values.min():g} to {values.max():g}, expected 0 to {top}: save it with 8 bits a pixel"
            )
        scaled = np.rint(values * 255) if image.mode == "F" else values // 257
        image = Image.fromarray(scaled.astype(np.uint8))
    return image.convert("RGB")


def read_header(source: ImageSource) -> Image.Image:
    """Open a picture without decoding its pixels. Raises whatever the decoder raises where it is missing or no image."""
    if callable(source):
        return read_header(source())
    if isinstance(source, Image.Image):
        return source
    return Image.open(io.BytesIO(source) if isinstance(source, bytes) else source)
