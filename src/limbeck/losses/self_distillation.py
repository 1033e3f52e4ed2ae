"""Losses between crops of one picture, told apart by prototypes that nobody named: DINO, EsViT, CMD."""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from limbeck.losses._common import Reduction, check_choice, check_same_shape, reduce, upcast

Aggregation = Literal["mean", "attention"]


def centred(teacher_logits: Tensor, center: Tensor, temperature: float) -> Tensor:
    """The teacher's distribution softmax((z - c) / temperature) (DINO, arXiv 2104.14294, eq. 1 and 4), [..., K], detached.

    teacher_logits: [..., K], any float dtype; center: [K]. Raises ValueError where widths differ or temperature is not above 0.
    """
    if center.shape != teacher_logits.shape[-1:]:
        raise ValueError(
            f"center {list(center.shape)} does not fit logits {list(teacher_logits.shape)}; expected one value an output"
        )
    _check_temperature(temperature)
    logits = upcast(teacher_logits.detach())
    return ((logits - center.detach().to(logits.dtype)) / temperature).softmax(-1)


def self_cross_entropy(
    student_logits: Tensor, teacher_probabilities: Tensor, *, temperature: float = 0.1, reduction: Reduction = "mean"
) -> Tensor:
    """-sum_k a_k log softmax(z / temperature)_k, a the teacher's distribution (DINO, arXiv 2104.14294, eq. 2).

    student_logits, teacher_probabilities: [..., K], any float dtype; the teacher is detached. At its least, the teacher's
    entropy, where the student's distribution is the teacher's.
    Returns the mean over positions, or [...] with reduction="none". Raises ValueError on a shape mismatch.
    """
    check_same_shape(student_logits, teacher_probabilities)
    _check_temperature(temperature)
    log_q = (upcast(student_logits) / temperature).log_softmax(-1)
    return reduce(-(upcast(teacher_probabilities.detach()) * log_q).sum(-1), None, reduction)


def best_match(student_features: Tensor, teacher_features: Tensor) -> Tensor:
    """Which teacher region is most like each student region, by cosine (EsViT, arXiv 2106.09785, eq. 3). No gradient.

    student_features: [B, N, D]; teacher_features: [B, M, D]. Returns int64 [B, N], of equal ones the first. Raises ValueError
    where batch or width differ, or there is no teacher region.
    """
    student, teacher = student_features.shape, teacher_features.shape
    if len(student) != 3 or len(teacher) != 3 or (student[0], student[2]) != (teacher[0], teacher[2]) or not teacher[1]:
        raise ValueError(f"regions {list(student)} and {list(teacher)} cannot be matched; expected [B, N, D] and [B, M, D]")
    own, other = (F.normalize(upcast(features.detach()), dim=-1) for features in (student_features, teacher_features))
    return (own @ other.mT).argmax(-1)


def region_loss(
    student_logits: Tensor,
    teacher_probabilities: Tensor,
    match: Tensor,
    *,
    temperature: float = 0.1,
    reduction: Reduction = "mean",
) -> Tensor:
    """Cross-entropy of each student region with the teacher region that it matches (EsViT, arXiv 2106.09785, eq. 3).

    student_logits: [B, N, K]; teacher_probabilities: [B, M, K], detached; match: [B, N], of `best_match`. Mean over regions and
    batch, or [B, N] with reduction="none".
    """
    if match.shape != student_logits.shape[:-1]:
        raise ValueError(
            f"match {list(match.shape)} does not fit student regions {list(student_logits.shape)}; expected one a region"
        )
    matched = teacher_probabilities.gather(1, match.unsqueeze(-1).expand(-1, -1, teacher_probabilities.shape[-1]))
    return self_cross_entropy(student_logits, matched, temperature=temperature, reduction=reduction)


def importance(image_probabilities: Tensor, region_logits: Tensor, *, temperature: float = 0.1) -> Tensor:
    """How much each region says what the picture says: softmax over regions of sum_k a_k log R_k. Detached.

    image_probabilities: [B, K]; region_logits: [B, N, K]. Returns [B, N]; rows sum to 1.
    """
    log_regions = (upcast(region_logits.detach()) / temperature).log_softmax(-1)
    likelihood = (upcast(image_probabilities.detach()).unsqueeze(1) * log_regions).sum(-1)
    return likelihood.softmax(-1)


def log_bag(region_logits: Tensor, weights: Tensor | None = None, *, temperature: float = 0.1) -> Tensor:
    """The logarithm of a bag's distribution, the weighted mean of its regions' softmax(z / temperature) (CMD, arXiv 2401.08860).

    region_logits: [B, N, K]; weights: [B, N], rows sum to 1; None weighs all alike. Returns [B, K]. Finite for all finite logits.
    """
    _check_temperature(temperature)
    log_regions = (upcast(region_logits) / temperature).log_softmax(-1)
    if weights is None:
        return log_regions.logsumexp(1) - math.log(region_logits.shape[1])
    smallest = torch.finfo(log_regions.dtype).tiny  # a region that does not count has weight 0, whose logarithm is not finite
    return (log_regions + weights.to(log_regions.dtype).clamp_min(smallest).log().unsqueeze(-1)).logsumexp(1)


def inter_level_loss(
    region_logits: Tensor,
    image_probabilities: Tensor,
    *,
    temperature: float = 0.1,
    aggregation: Aggregation = "mean",
    reduction: Reduction = "mean",
) -> Tensor:
    """KL(a || m) from a crop's distribution a to that of the bag of its regions, m (CMD, arXiv 2401.08860, as far as it is
    known).

    region_logits: [B, N, K], the student's; image_probabilities: [B, K], detached. aggregation: "mean" weighs all regions alike,
    "attention" by `importance`. At least 0; 0 where every region's distribution is the crop's; finite for all finite logits.
    Returns the mean over the batch, or [B] with reduction="none". Raises ValueError where shapes do not fit.
    """
    check_choice("aggregation", aggregation, ("mean", "attention"))
    if region_logits.dim() != 3 or image_probabilities.shape != (len(region_logits), region_logits.shape[-1]):
        raise ValueError(
            f"regions {list(region_logits.shape)} and picture {list(image_probabilities.shape)}; expected [B, N, K] and [B, K]"
        )
    weights = importance(image_probabilities, region_logits, temperature=temperature) if aggregation == "attention" else None
    log_m = log_bag(region_logits, weights, temperature=temperature)
    a = upcast(image_probabilities.detach()).to(log_m.dtype)
    return reduce((torch.xlogy(a, a) - a * log_m).sum(-1), None, reduction)


def crop_pairs(teacher_crops: int, student_crops: int) -> list[tuple[int, int]]:
    """Which crops are compared: (teacher's, student's) for all but a crop with itself; the teacher's are the student's first."""
    return [(q, v) for q in range(teacher_crops) for v in range(student_crops) if v != q]


def teacher_temperature(epoch: int, *, start: float = 0.04, end: float = 0.07, warmup_epochs: int = 30) -> float:
    """The teacher's temperature in an epoch, from 0: linear ``start`` to ``end``, reached in the last warm-up epoch."""
    if warmup_epochs <= 1:
        return end if epoch >= warmup_epochs else start
    return start + (end - start) * min(epoch / (warmup_epochs - 1), 1.0)


def _check_temperature(temperature: float) -> None:
    if not temperature > 0:
        raise ValueError(f"temperature is {temperature}; expected a number > 0")
