"""Losses on one pair of maps [B, C, H, W]; over several layers, sum them. The trained parts are in ``modules/regressors.py``."""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from limbeck.losses._common import check_choice, check_same_shape, reduce, upcast
from limbeck.losses.features import hint
from limbeck.losses.logits import kl_divergence

VARIANCE_FLOOR = 1e-5
"""What `variational` adds to every variance."""


def attention_transfer(student_map: Tensor, teacher_map: Tensor, *, p: float = 2.0) -> Tensor:
    """Attention transfer (Zagoruyko & Komodakis, arXiv 1612.03928, eq. 2): where a map is strong, whatever its channels.

    The attention is the mean of |f|^p over the channels, as one vector of unit length a sample; the loss is the mean squared
    difference of its elements, blind to a positive scale of either map. The number of channels may differ, and the larger map is
    first averaged to the size of the smaller. A map of zeros has attention 0 everywhere, and a finite gradient.
    student_map, teacher_map: [B, C, H, W], any float dtype; the arithmetic is float32 (float64 where given). The teacher is
    detached.
    p: at least 1; the larger, the more the strongest positions count.
    Returns a scalar. Raises ValueError where these are not maps of one batch.
    """
    if not p >= 1:
        raise ValueError(f"p is {p}; expected a number >= 1")
    student, teacher = pool_to_smaller(student_map, teacher_map)
    return reduce((_attention(student, p) - _attention(teacher, p)).square(), None, "mean")


def nst(student_map: Tensor, teacher_map: Tensor) -> Tensor:
    """Neuron selectivity transfer (Huang & Wang, arXiv 1707.01219): squared MMD with the kernel (x . y)^2.

    The samples of the two distributions are the channels: vectors of H x W, each of unit length, so that the loss is blind to a
    positive scale of any channel. The number of channels may differ. The kernel among the teacher's channels counts in the value
    (0 between equal maps) and has no gradient.
    Arguments, sizes, precision and errors as `attention_transfer`.
    """
    student, teacher = (F.normalize(features.flatten(2), dim=2) for features in pool_to_smaller(student_map, teacher_map))
    return _kernel(teacher, teacher) + _kernel(student, student) - 2 * _kernel(student, teacher)


def cwd(
    student_map: Tensor, teacher_map: Tensor, *, temperature: float = 4.0, over: Literal["channels", "spatial"] = "channels"
) -> Tensor:
    """Channel-wise distillation (Shu et al., arXiv 2011.13256): T^2 KL(teacher || student), each channel a distribution.

    student_map, teacher_map: one shape [B, C, H, W], features or logits, any float dtype; the arithmetic is float32 (float64
    where given). The teacher is detached.
    over: what the mean runs over. "channels" makes a distribution of each channel, by a softmax over its positions; "spatial" one
        of each position, by a softmax over its channels.
    Returns a scalar. Raises ValueError on a shape mismatch or a value out of range.
    """
    check_choice("over", over, ("channels", "spatial"))
    _check_maps(student_map, teacher_map)
    check_same_shape(student_map, teacher_map)
    student, teacher = student_map.flatten(2), teacher_map.flatten(2)  # [B, C, HW]
    if over == "spatial":
        student, teacher = student.mT, teacher.mT
    return kl_divergence(student, teacher, temperature=temperature)


def fsp(student_first: Tensor, student_last: Tensor, teacher_first: Tensor, teacher_last: Tensor) -> Tensor:
    """Flow of the solution procedure (Yim et al., CVPR 2017, eq. 1 and 2): how the channels of two layers go together.

    The flow between two maps of a model is their Gram matrix [B, C_first, C_last], the mean over positions of the products of
    channels; the loss is the mean squared difference between the student's and the teacher's. The larger of the two maps is first
    averaged to the size of the smaller; student and teacher may differ in size, not in channels.
    Each map: [B, C, H, W], any float dtype; the arithmetic is float32 (float64 where given). The teacher is detached.
    Returns a scalar. Raises ValueError where these are not maps of one batch, or channels differ.
    """
    for student, teacher in ((student_first, teacher_first), (student_last, teacher_last)):
        _check_maps(student, teacher)
        if student.shape[1] != teacher.shape[1]:
            raise ValueError(
                f"student {list(student.shape)} and teacher {list(teacher.shape)} differ in channels; align them first"
            )
    return hint(_flow(student_first, student_last), _flow(teacher_first.detach(), teacher_last.detach()))


def hcl(student_map: Tensor, teacher_map: Tensor) -> Tensor:
    """Hierarchical context loss (ReviewKD, Chen et al., arXiv 2104.09044): squared errors at several resolutions.

    The weighted mean of the mean squared errors at full size (weight 1) and averaged to 4 x 4, 2 x 2 and 1 x 1, where that is
    less than the map's height; each resolution that is used weighs half of the one before.
    student_map, teacher_map: one shape [B, C, H, W], any float dtype; the arithmetic is float32 (float64 where given). The
    teacher is detached.
    Returns a scalar. Raises ValueError on a shape mismatch.
    """
    _check_maps(student_map, teacher_map)
    check_same_shape(student_map, teacher_map)
    student, teacher = upcast(student_map), upcast(teacher_map.detach())
    loss, weight, total = hint(student, teacher), 1.0, 1.0
    for side in (4, 2, 1):
        if side < student.shape[2]:
            weight /= 2
            total += weight
            loss = loss + weight * hint(F.adaptive_avg_pool2d(student, side), F.adaptive_avg_pool2d(teacher, side))
    return loss / total


def variational(predicted_mean: Tensor, teacher_map: Tensor, log_scale: Tensor) -> Tensor:
    """Variational information distillation (Ahn et al., arXiv 1904.05835): the Gaussian negative log-likelihood of
    the teacher's map, 0.5 ((f - mean)^2 / var + log var), averaged over elements and without its constant.

    predicted_mean: [B, C, H, W], from the student (`VIDRegressor`), any float dtype; the arithmetic is float32 (float64 where
        given).
    teacher_map: [B, C, H', W'], averaged to the size of ``predicted_mean`` where larger; detached.
    log_scale: [C], trained; the variance of a channel is softplus(log_scale) + 1e-5.
    Returns a scalar, which may be negative. Raises ValueError on a shape mismatch.
    """
    mean, teacher = pool_to_smaller(predicted_mean, teacher_map)
    check_same_shape(mean, teacher)
    if log_scale.shape != mean.shape[1:2]:
        raise ValueError(f"log_scale {list(log_scale.shape)} does not match the {mean.shape[1]} channels of the maps")
    variance = F.softplus(upcast(log_scale))[:, None, None] + VARIANCE_FLOOR
    return reduce(0.5 * ((mean - teacher).square() / variance + variance.log()), None, "mean")


def ofd(
    student_map: Tensor, teacher_map: Tensor, margin: Tensor, *, reduction: Literal["batchmean", "sum"] = "batchmean"
) -> Tensor:
    """Overhaul of feature distillation (Heo et al., arXiv 1904.01866): partial L2 between maps before their ReLU.

    The target is max(teacher, margin). A student below a target that is not positive is right as it is: no loss, no gradient.
    student_map, teacher_map: one shape [B, C, H, W], before the ReLU, any float dtype; the arithmetic is float32 (float64 where
    given). The teacher is detached.
    margin: [C], negative: see `margin_from_batch_norm`.
    reduction: "sum" over all elements, or "batchmean", that sum divided by B.
    Returns a scalar. Raises ValueError on a shape mismatch.
    """
    check_choice("reduction", reduction, ("batchmean", "sum"))
    _check_maps(student_map, teacher_map)
    check_same_shape(student_map, teacher_map)
    if margin.shape != teacher_map.shape[1:2]:
        raise ValueError(f"margin {list(margin.shape)} does not match the {teacher_map.shape[1]} channels of the maps")
    student, teacher = upcast(student_map), upcast(teacher_map.detach())
    target = teacher.maximum(margin.detach().to(teacher)[:, None, None])
    counts = (student > target) | (target > 0)
    total = (student - target).where(counts, 0).square().sum()
    return total / max(len(student), 1) if reduction == "batchmean" else total


def margin_from_batch_norm(gamma: Tensor, beta: Tensor) -> Tensor:
    """OFD's margin: what a channel is on average where its ReLU is silent, E[x | x < 0] (arXiv 1904.01866).

    x is Gaussian with the mean ``beta`` and the standard deviation |gamma| of the BatchNorm before the ReLU. Where x is negative
    less often than once in a thousand, the margin is -3 |gamma|.
    gamma, beta: [C]. Returns [C] in their dtype, without a graph.
    """
    mean, deviation = beta.detach().double(), gamma.detach().double().abs()
    silent = torch.special.ndtr(-mean / deviation)  # P(x < 0)
    density = (-(mean / deviation).square() / 2).exp() / math.sqrt(2 * math.pi)
    return torch.where(silent > 0.001, mean - deviation * density / silent, -3 * deviation).to(beta.dtype)


def masked_generation(generated_map: Tensor, teacher_map: Tensor, *, alpha: float = 2e-5) -> Tensor:
    """Masked generative distillation (Yang et al., arXiv 2205.01529): alpha times the squared error, summed, over B.

    generated_map: [B, C, H, W], the teacher's map as `Generation` restores it from the student's, any float dtype; the arithmetic
        is float32 (float64 where given).
    teacher_map: of the same shape; detached.
    alpha: 2e-5 for detection and segmentation, 7e-5 for classification in the authors' code.
    Returns a scalar. Raises ValueError on a shape mismatch.
    """
    _check_maps(generated_map, teacher_map)
    check_same_shape(generated_map, teacher_map)
    return alpha * F.mse_loss(upcast(generated_map), upcast(teacher_map.detach()), reduction="sum") / max(len(teacher_map), 1)


def pool_to_smaller(student_map: Tensor, teacher_map: Tensor) -> tuple[Tensor, Tensor]:
    """Both maps [B, C, H, W] at the lesser height and width of the two, the larger averaged (adaptive pooling).

    In full precision, the teacher detached. Raises ValueError where these are not maps of one batch.
    """
    _check_maps(student_map, teacher_map)
    student, teacher = upcast(student_map), upcast(teacher_map.detach())
    size = _lesser(student, teacher)
    return _averaged(student, size), _averaged(teacher, size)


def _check_maps(student: Tensor, teacher: Tensor) -> None:
    """Raise ValueError unless both are maps, of as many samples."""
    if student.dim() != 4 or teacher.dim() != 4 or len(student) != len(teacher):
        raise ValueError(
            f"student {list(student.shape)} and teacher {list(teacher.shape)}; expected maps [B, C, H, W] of one batch"
        )


def _lesser(a: Tensor, b: Tensor) -> tuple[int, int]:
    """The lesser height and the lesser width of two maps."""
    return min(a.shape[2], b.shape[2]), min(a.shape[3], b.shape[3])


def _averaged(features: Tensor, size: tuple[int, int]) -> Tensor:
    """The map at another height and width; as it is where it has them."""
    return features if features.shape[2:] == size else F.adaptive_avg_pool2d(features, size)


def _attention(features: Tensor, p: float) -> Tensor:
    """[B, C, H, W] -> [B, HW], of unit length."""
    return F.normalize(features.abs().pow(p).mean(1).flatten(1), dim=1)


def _kernel(a: Tensor, b: Tensor) -> Tensor:
    """The mean of (x . y)^2 over the samples and their pairs of channels x of [B, I, HW] and y of [B, J, HW]."""
    return reduce(_products(a, b).square(), None, "mean")


def _flow(first: Tensor, last: Tensor) -> Tensor:
    """The Gram matrix [B, I, J] between the channels of two maps of a model, divided by the number of positions."""
    size = _lesser(first, last)
    first, last = (_averaged(upcast(features), size).flatten(2) for features in (first, last))
    return _products(first, last) / first.shape[2]


def _products(a: Tensor, b: Tensor) -> Tensor:
    """The products [B, I, J] between the rows of [B, I, N] and of [B, J, N], in full precision also under autocast."""
    with torch.autocast(a.device.type, enabled=False):
        return a.bmm(b.mT)
