"""Pictures made worse, the same way each time: what a deployed camera does to them.

Five of the corruptions of ImageNet-C (Hendrycks and Dietterich, arXiv 1903.12261), by the same formulas but for brightness, which is
added to every channel; at three strengths between those of CIFAR-10-C and ImageNet-C. Blur is measured in the picture's own size. They
compare students with each other; they are not the published benchmark.
"""

from __future__ import annotations

import io
import math
import zlib
from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from limbeck.errors import BadInput
from limbeck.naming import nearest

LEVELS: dict[str, tuple[float, ...]] = {
    "gaussian-noise": (0.05, 0.1, 0.2),  # standard deviation
    "blur": (0.01, 0.02, 0.04),  # standard deviation of the Gaussian, of the shorter side
    "brightness": (0.1, 0.2, 0.3),  # added
    "contrast": (0.6, 0.4, 0.2),  # factor of the distance to the picture's mean
    "jpeg": (50, 25, 10),  # quality
}
"""Corruption -> what strengths 1, 2 and 3 are."""


def corrupt(pictures: Tensor, name: str, strength: int, ids: Sequence[str]) -> Tensor:
    """Pictures [B, C, H, W] in [0, 1] -> corrupted ones, again in [0, 1], float32.

    name: of `LEVELS`. strength: 1, 2 or 3. ids: [B]; a picture's noise depends on its id alone, so that it is the same in every run, batch
    and process. Raises `BadInput` for an unknown corruption or strength, and for pictures outside [0, 1].
    """
    if name not in LEVELS:
        raise BadInput(f"unknown corruption {name!r}; {nearest(name, LEVELS)}")
    if not 1 <= strength <= len(LEVELS[name]):
        raise BadInput(f"{name} has strengths 1 to {len(LEVELS[name])}; {strength} was asked for")
    low, high = (value.item() for value in pictures.aminmax())
    if low < -1e-3 or high > 1 + 1e-3:
        raise BadInput(f"corruptions need pictures in [0, 1]; these span [{low:.3g}, {high:.3g}]: normalise inside the model")
    with torch.autocast(pictures.device.type, enabled=False):
        return CORRUPTIONS[name](pictures.float(), LEVELS[name][strength - 1], ids).clamp(0, 1)


def gaussian_noise(pictures: Tensor, deviation: float, ids: Sequence[str]) -> Tensor:
    """x + deviation * n; one n a picture for all strengths."""
    generators = (torch.Generator().manual_seed(zlib.crc32(name.encode())) for name in ids)
    noise = torch.stack([torch.randn(pictures.shape[1:], generator=generator) for generator in generators])
    return pictures + deviation * noise.to(pictures.device)


def blur(pictures: Tensor, deviation: float, ids: Sequence[str]) -> Tensor:
    """Convolution with a Gaussian, the border repeated."""
    channels, sigma = pictures.shape[1], deviation * min(pictures.shape[-2:])
    radius = math.ceil(3 * sigma)
    offsets = torch.arange(-radius, radius + 1, device=pictures.device)
    kernel = (-0.5 * (offsets / sigma).square()).softmax(0).expand(channels, 1, -1)
    padded = F.pad(pictures, (radius,) * 4, mode="replicate")
    return F.conv2d(F.conv2d(padded, kernel[..., None], groups=channels), kernel[:, :, None], groups=channels)


def brightness(pictures: Tensor, amount: float, ids: Sequence[str]) -> Tensor:
    """x + amount."""
    return pictures + amount


def contrast(pictures: Tensor, factor: float, ids: Sequence[str]) -> Tensor:
    """m + factor * (x - m), m the mean of each channel of the picture."""
    mean = pictures.mean((-2, -1), keepdim=True)
    return mean + factor * (pictures - mean)


def jpeg(pictures: Tensor, quality: float, ids: Sequence[str]) -> Tensor:
    """Written and read as a JPEG, channel by channel where there are not three of them."""
    shape = pictures.shape
    planes = pictures if shape[1] == 3 else pictures.flatten(0, 1)[:, None]
    levels = (255 * planes).round().clamp(0, 255).byte().permute(0, 2, 3, 1).cpu().numpy()
    read = np.stack([_compressed(level, int(quality)) for level in levels])
    return torch.from_numpy(read).permute(0, 3, 1, 2).reshape(shape).to(pictures) / 255


def _compressed(level: np.ndarray, quality: int) -> np.ndarray:
    """A picture [H, W, 1 or 3] of bytes through JPEG."""
    file = io.BytesIO()
    Image.fromarray(level.squeeze(-1) if level.shape[-1] == 1 else level).save(file, "JPEG", quality=quality)
    return np.asarray(Image.open(file)).reshape(level.shape)


CORRUPTIONS: dict[str, Callable[[Tensor, float, Sequence[str]], Tensor]] = {
    "gaussian-noise": gaussian_noise,
    "blur": blur,
    "brightness": brightness,
    "contrast": contrast,
    "jpeg": jpeg,
}
