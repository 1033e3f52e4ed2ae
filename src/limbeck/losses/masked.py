"""Losses of masked-image pre-training: the pixels of removed patches, and tokens of two networks that saw the same patches."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from limbeck.losses._common import Reduction, check_choice, check_mask, check_same_shape, reduce, select, unit, upcast

PIXEL_EPS = 1e-6


def masked_pixels(
    prediction: Tensor, pixels: Tensor, mask: Tensor, *, normalise: bool = False, reduction: Reduction = "mean"
) -> Tensor:
    """Mean squared error of the pixels of removed patches (MAE, arXiv 2111.06377, section 3).

    prediction, pixels: [..., P], a patch's P values in the last dimension, any float dtype; the arithmetic is float32 (float64 where
    given). The pixels are detached. mask: [...] bool, True where a patch was removed and counts; over none the loss is 0, not NaN.
    normalise: the targets are `standard_patches` (the paper's "normalized pixels").
    Returns a scalar, or [...] with reduction="none". Raises ValueError on a shape mismatch or an unknown reduction.
    """
    check_same_shape(prediction, pixels)
    check_mask(prediction, mask)
    check_choice("reduction", reduction, ("mean", "sum", "none"))
    target = standard_patches(pixels.detach()) if normalise else upcast(pixels.detach())
    # Filled rather than selected: how many patches are selected is known to the device alone, and asking would wait for it.
    difference = (upcast(prediction) - target).masked_fill(~mask.unsqueeze(-1), 0)
    values = difference.square().mean(-1)
    if reduction == "mean":
        return values.sum() / mask.sum().clamp_min(1)
    return values.sum() if reduction == "sum" else values


def standard_patches(pixels: Tensor) -> Tensor:
    """Each patch's values minus their mean, over the root of their unbiased variance plus 1e-6; a patch of one value gives 0.

    pixels: [..., P], any float dtype -> at least float32.
    """
    pixels = upcast(pixels)
    centred = pixels - pixels.mean(-1, keepdim=True)
    variance = centred.square().sum(-1, keepdim=True) / max(pixels.shape[-1] - 1, 1)
    return centred / (variance + PIXEL_EPS).sqrt()


def token_distance(
    student_tokens: Tensor,
    teacher_tokens: Tensor,
    *,
    distance: Literal["l1", "l2"] = "l1",
    normalise: bool = True,
    mask: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    """Mean absolute ("l1") or squared ("l2") difference between tokens of length 1 (DMAE, arXiv 2208.12256, section 3.2).

    With ``normalise`` blind to a positive scale of any token on either side, and at most 2 / sqrt(D) with "l1".

    student_tokens, teacher_tokens: [..., D], any float dtype; the arithmetic is float32 (float64 where given). The teacher is detached.
    normalise: divide each token by its L2 norm; a zero token stays zero, without gradient. mask: [...] bool, True where a token counts;
    an all-False mask gives 0, not NaN.
    Returns a scalar, or [...] with reduction="none": means over D. Raises ValueError on a shape mismatch or an unknown distance.
    """
    check_same_shape(student_tokens, teacher_tokens)
    check_mask(student_tokens, mask)
    check_choice("distance", distance, ("l1", "l2"))
    student, teacher = select(upcast(student_tokens), mask), select(upcast(teacher_tokens.detach()), mask)
    if normalise:
        student, teacher = unit(student), unit(teacher)
    difference = student - teacher
    return reduce((torch.abs(difference) if distance == "l1" else difference.square()).mean(-1), mask, reduction)
