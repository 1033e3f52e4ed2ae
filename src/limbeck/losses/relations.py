"""Losses on the relations between the samples of a batch: which are close, which alike, at what angle.

A relation is a number for each pair or triple of samples, whatever the width: student and teacher features may differ in every
dimension but the first. A sample's relations depend on the whole batch, so that there is no mask: pass the samples that count.

Features are [B, ...], flattened to [B, D]; any float dtype; the arithmetic is float32 (float64 where given), also under autocast.
The teacher is detached. Each loss returns a scalar, 0 over no sample at all, and raises ValueError unless both hold B samples.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from limbeck.losses._common import check_choice, unit, upcast

Kernel = Literal["gaussian", "product"]

FLOOR = 1e-6
"""The smallest distance between two samples."""
CONDITIONAL_EPS = 1e-7
COSINES = 2**24
"""How many angles `rkd_angle` holds at once: all those of 256 samples."""


def rkd(
    student_features: Tensor,
    teacher_features: Tensor,
    *,
    distance_weight: float = 25.0,
    angle_weight: float = 50.0,
    squared: bool = False,
) -> Tensor:
    """Relational knowledge distillation (arXiv 1904.05068): `rkd_distance` and `rkd_angle`, in the weights used for classification.

    Blind to translating, rotating and scaling the features. squared: see `rkd_distance`.
    """
    distance = rkd_distance(student_features, teacher_features, squared=squared)
    return distance_weight * distance + angle_weight * rkd_angle(student_features, teacher_features)


def rkd_distance(student_features: Tensor, teacher_features: Tensor, *, squared: bool = False) -> Tensor:
    """Smooth L1 between the Euclidean distances of all pairs, each side in units of its own mean (arXiv 1904.05068).

    Averaged over the B x B pairs, as released: the B zeros of the diagonal count. Distances below 1e-6 count as 1e-6, without
    gradient. squared: compare squared distances.
    """
    student, teacher = _samples(student_features, teacher_features)
    total = F.smooth_l1_loss(_relative_distances(student, squared), _relative_distances(teacher, squared), reduction="sum")
    return total / max(len(student) ** 2, 1)


def rkd_angle(student_features: Tensor, teacher_features: Tensor) -> Tensor:
    """Smooth L1 between the cosines of the angles that every two samples span at every third (arXiv 1904.05068).

    Averaged over B x B x B triples, as released: those with a sample twice count. The cosine at a sample that coincides with another
    is 0, without gradient. B^3 cosines; beyond 256 samples they are computed in parts, and again in the backward pass.
    """
    student, teacher = _samples(student_features, teacher_features)
    count = len(student)

    def gap(anchors: slice) -> Tensor:
        return F.smooth_l1_loss(_cosines_at(student, anchors), _cosines_at(teacher, anchors), reduction="sum")

    at_once = max(COSINES // max(count**2, 1), 1)
    if count <= at_once:
        return gap(slice(None)) / max(count**3, 1)
    starts = range(0, count, at_once)
    gaps = [checkpoint(gap, slice(i, i + at_once), use_reentrant=False, preserve_rng_state=False) for i in starts]
    return torch.stack(gaps).sum() / count**3


def sp(student_features: Tensor, teacher_features: Tensor) -> Tensor:
    """Similarity-preserving distillation (arXiv 1907.09682): mean squared difference of the Gram matrices, rows of norm 1.

    Blind to rotating and scaling the features, not to translating them. A sample whose features are all 0 is like no other.
    """
    student, teacher = _samples(student_features, teacher_features)
    return _mean_square(_similarities(student) - _similarities(teacher))


def pkt(student_features: Tensor, teacher_features: Tensor) -> Tensor:
    """Probabilistic knowledge transfer (arXiv 1803.10837): KL from the teacher's to the student's distribution over a sample's peers.

    Given sample j, sample i != j has the probability K_ij / sum_{k != j} K_kj with the kernel K = (1 + cosine) / 2. The KL is averaged
    over j, where the paper sums. The released code counts each sample as its own peer as well, and averages over B x B: its weights are
    B times too large here. 1e-7 is added to the probabilities in the logarithm, as released.
    """
    student, teacher = _samples(student_features, teacher_features)
    q, p = _peers(student), _peers(teacher)
    total = (p * ((p + CONDITIONAL_EPS) / (q + CONDITIONAL_EPS)).log()).sum()
    return total / max(len(student), 1)


def cc(
    student_features: Tensor,
    teacher_features: Tensor,
    *,
    kernel: Kernel = "gaussian",
    gamma: float = 0.4,
    order: int = 2,
) -> Tensor:
    """Correlation congruence (arXiv 1904.01802): mean squared difference of the samples' B x B correlations.

    Features are scaled to norm 1 first. kernel: "gaussian" is exp(-gamma ||x - y||^2), expanded in powers of the product x . y up to
    ``order`` >= 1; "product" is x . y itself, and takes neither gamma nor order.
    """
    check_choice("kernel", kernel, ("gaussian", "product"))
    if order < 1:
        raise ValueError(f"order is {order}; expected 1 or more terms beyond the constant")
    student, teacher = (_products(unit(x), unit(x)) for x in _samples(student_features, teacher_features))
    if kernel == "gaussian":
        student, teacher = _gaussian(student, gamma, order), _gaussian(teacher, gamma, order)
    return _mean_square(student - teacher)


def _samples(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Both features as [B, D] in full precision, the teacher detached."""
    if min(student.dim(), teacher.dim()) < 2 or len(student) != len(teacher):
        raise ValueError(
            f"student {list(student.shape)} and teacher {list(teacher.shape)}; expected [B, ...] of the same B samples"
        )
    return upcast(student).flatten(1), upcast(teacher.detach()).flatten(1)


def _products(a: Tensor, b: Tensor) -> Tensor:
    """a b^T of [..., B, D], in the precision of its arguments: autocast would take half."""
    with torch.autocast(a.device.type, enabled=False):
        return a @ b.mT


def _mean_square(difference: Tensor) -> Tensor:
    return difference.square().sum() / max(difference.numel(), 1)


def _relative_distances(x: Tensor, squared: bool) -> Tensor:
    """[B, B]: distances over the mean distance of two different samples; 0 on the diagonal."""
    count = len(x)
    # not by way of products, which would leave noise for the distance of equal samples
    distances = torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist").clamp_min(FLOOR)
    if squared:
        distances = distances.square()
    distances = distances.masked_fill(torch.eye(count, dtype=torch.bool, device=x.device), 0)
    if count < 2:
        return distances
    return distances * (count * (count - 1) / distances.sum())


def _cosines_at(x: Tensor, anchors: slice) -> Tensor:
    """[A, B, B]: at each anchor, the cosine of the angle between every two samples."""
    directions = unit(x - x[anchors].unsqueeze(1))  # [A, B, D]
    return _products(directions, directions)


def _similarities(x: Tensor) -> Tensor:
    """[B, B]: products of samples, each row of norm 1. A row's own sample drops out of its scale, so it may have norm 1 already."""
    return unit(_products(unit(x), x))


def _peers(x: Tensor) -> Tensor:
    """[B, B]: in each row, the probabilities of the other samples given this one."""
    kernel = (1 + _products(unit(x), unit(x))).clamp_min(0) / 2
    kernel = kernel.masked_fill(torch.eye(len(x), dtype=torch.bool, device=x.device), 0)
    return kernel / kernel.sum(-1, keepdim=True).clamp_min(CONDITIONAL_EPS)


def _gaussian(products: Tensor, gamma: float, order: int) -> Tensor:
    """exp(-gamma ||x - y||^2) = exp(-2 gamma) exp(2 gamma x . y) of unit vectors, the latter up to (x . y)^order."""
    terms = (((2 * gamma) ** p / math.factorial(p)) * products**p for p in range(1, order + 1))
    return math.exp(-2 * gamma) * (1 + torch.stack(list(terms)).sum(0))
