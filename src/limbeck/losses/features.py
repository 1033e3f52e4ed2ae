"""Losses on features of one shape; the adapters that bring them to one shape are in ``modules/projectors.py``."""

from __future__ import annotations

import torch
from torch import Tensor

from limbeck.losses._common import Reduction, check_mask, check_same_shape, detached, reduce, unit, upcast


def hint(
    student_features: Tensor,
    teacher_features: Tensor,
    *,
    channel_dim: int | None = None,
    mask: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    """Mean squared error between features (FitNets, arXiv 1412.6550, eq. 3, averaged over elements as in current practice).

    student_features, teacher_features: one shape, any float dtype; the arithmetic is float32 (float64 where given). The teacher
    is detached.
    channel_dim: the dimension averaged at each position; None takes 1 for maps [B, C, H, W] and the last otherwise.
    mask: bool, the features' shape without the channels, True where a position counts; an all-False mask gives 0, not NaN.
    Returns a scalar, or one value a position with reduction="none". Raises ValueError on a shape mismatch.
    """
    if mask is None and reduction == "mean" and student_features.numel():
        check_same_shape(student_features, teacher_features)
        student, teacher = upcast(student_features), upcast(detached(teacher_features))
        return torch.ops.aten.mse_loss(student, teacher)  # the same mean, in one kernel
    student, teacher, dim = _positions(student_features, teacher_features, channel_dim, mask)
    return reduce((student - teacher).square().mean(dim), mask, reduction)


def cosine(
    student_features: Tensor,
    teacher_features: Tensor,
    *,
    channel_dim: int | None = None,
    mask: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    """One minus the cosine between the channel vectors of each position: 0 where they point one way, 2 where opposite.

    Blind to a positive scale of either side. A zero vector has cosine 0 with everything, and no gradient.
    Arguments, precision and errors as `hint`.
    """
    student, teacher, dim = _positions(student_features, teacher_features, channel_dim, mask)
    return reduce(1 - (unit(student, dim) * unit(teacher, dim)).sum(dim), mask, reduction)


def _positions(student: Tensor, teacher: Tensor, channel_dim: int | None, mask: Tensor | None) -> tuple[Tensor, Tensor, int]:
    """Both features in full precision, the teacher detached, and their channel dimension; under a mask [M, C], what it keeps.

    Without a mask the layout stays: a transposed gradient would slow down the convolutions before it.
    """
    check_same_shape(student, teacher)
    student, teacher = upcast(student), upcast(detached(teacher))
    dim = channel_dim if channel_dim is not None else 1 if student.dim() == 4 else -1
    if mask is None:
        return student, teacher, dim
    student, teacher = student.movedim(dim, -1), teacher.movedim(dim, -1)
    check_mask(student, mask)
    return student[mask], teacher[mask], -1
