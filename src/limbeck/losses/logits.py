"""Losses on logits: cross-entropy with labels, and divergences from a teacher."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from limbeck.losses._common import (
    LOG_ZERO,
    Reduction,
    check_choice,
    check_mask,
    check_same_shape,
    detached,
    reduce,
    select,
    upcast,
)

Divergence = Literal["forward", "reverse", "jeffreys", "jsd"]

IGNORE = -100
"""The label of a position without supervision, as in PyTorch and transformers."""
MEAN = 1  # at::Reduction::Mean


def cross_entropy(
    logits: Tensor,
    labels: Tensor,
    *,
    label_smoothing: float = 0.0,
    mask: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    """Cross-entropy with integer labels, averaged over the supervised positions.

    logits: [..., V], any float dtype; the arithmetic is float32 (float64 where given).
    labels: int64 [...], -100 where a position is ignored; over no position at all the loss is 0, not NaN.
    label_smoothing: the share of the target that is spread evenly over V, in [0, 1].
    mask: [...] bool, True where a position counts, besides the -100.
    Returns a scalar, or [...] with reduction="none". Raises ValueError on a shape mismatch.
    """
    check_choice("reduction", reduction, ("mean", "sum", "none"))
    if labels.shape != logits.shape[:-1]:
        raise ValueError(f"labels {list(labels.shape)} do not match the positions of logits {list(logits.shape)}")
    check_mask(logits, mask)
    if mask is not None:
        labels = labels.masked_fill(~mask, IGNORE)
    rows, classes = (logits, labels) if logits.dim() == 2 else (logits.reshape(-1, logits.shape[-1]), labels.reshape(-1))
    if reduction == "mean" and not label_smoothing:
        mean, count = torch.ops.aten.nll_loss_forward.default(upcast(rows).log_softmax(-1), classes, None, MEAN, IGNORE)
        mean.detach().masked_fill_(count.logical_not(), 0)  # over nothing it is 0 / 0, and its gradient 0 already
        return mean
    values = F.cross_entropy(
        upcast(rows),
        classes,
        label_smoothing=label_smoothing,
        ignore_index=IGNORE,
        reduction="none" if reduction == "none" else "sum",
    )
    if reduction == "none":
        return values.view(labels.shape)
    return values / (labels != IGNORE).sum().clamp_min(1) if reduction == "mean" else values


def kl_divergence(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    temperature: float = 1.0,
    kind: Divergence = "forward",
    beta: float = 0.5,
    scale_by_t2: bool = True,
    mask: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    """A divergence between softmax(z / T) of the teacher, p, and of the student, q.

    student_logits, teacher_logits: [..., V], any float dtype; the arithmetic is float32 (float64 where given). The teacher is
    detached. An id that is -inf on both sides (vocabulary masked out) contributes 0 and gets no gradient.
    kind: "forward" is KL(p || q), "reverse" KL(q || p), "jeffreys" their sum, "jsd" the generalised Jensen-Shannon divergence of
        GKD (arXiv 2306.13649, eq. 1), beta KL(p || m) + (1 - beta) KL(q || m) with m = beta p + (1 - beta) q.
    beta: for "jsd", in [0, 1]. 0 and 1 mean the forward and the reverse KL, as in TRL: the limits of the divergence divided by
        beta and by 1 - beta, while the divergence itself would vanish there.
    scale_by_t2: multiply by T^2, so that the gradient does not shrink with the temperature (Hinton et al., arXiv 1503.02531).
    mask: [...] bool, True where a position counts; an all-False mask gives 0, not NaN.
    Returns a scalar, or [...] with reduction="none". Raises ValueError on a shape mismatch or a value out of range.
    """
    check_same_shape(student_logits, teacher_logits)
    check_divergence(temperature, kind, beta)

    student, teacher = student_logits, detached(teacher_logits)
    if mask is not None:
        check_mask(student, mask)
        student, teacher = select(student, mask), select(teacher, mask)
    scale = temperature**2 if scale_by_t2 else 1.0
    if reduction in ("mean", "sum") and (kind == "forward" or (kind == "jsd" and beta == 0)):
        return _ForwardKL.apply(student, teacher, temperature, scale / _positions(student) if reduction == "mean" else scale)
    log_q, log_p = log_probabilities(student, temperature), log_probabilities(teacher, temperature)
    return divergence_of_log_probs(log_q, log_p, kind=kind, beta=beta, scale=scale, mask=mask, reduction=reduction)


def check_divergence(temperature: float, kind: str, beta: float) -> None:
    """Raise ValueError where a value is out of range."""
    check_choice("kind", kind, ("forward", "reverse", "jeffreys", "jsd"))
    if not temperature > 0:
        raise ValueError(f"temperature is {temperature}; expected a number > 0")
    if not 0 <= beta <= 1:
        raise ValueError(f"beta is {beta}; expected a number from 0 to 1")


def divergence_of_log_probs(
    log_q: Tensor, log_p: Tensor, *, kind: Divergence, beta: float, scale: float, mask: Tensor | None, reduction: Reduction
) -> Tensor:
    """`kl_divergence` times ``scale`` from the log-probabilities of the student and the teacher at the positions that count."""
    check_choice("reduction", reduction, ("mean", "sum", "none"))
    if reduction == "mean":
        scale /= _positions(log_q)
    summed: Literal["sum", "none"] = "none" if reduction == "none" else "sum"
    if kind == "forward" or (kind == "jsd" and beta == 0):
        values = _kl(log_p, log_q, summed)
    elif kind == "reverse" or (kind == "jsd" and beta == 1):
        values = _kl(log_q, log_p, summed)
    elif kind == "jeffreys":
        values = _kl(log_p, log_q, summed) + _kl(log_q, log_p, summed)
    else:
        log_m = torch.logaddexp(log_p + math.log(beta), log_q + math.log1p(-beta))
        values = beta * _kl(log_p, log_m, summed) + (1 - beta) * _kl(log_q, log_m, summed)
    return (reduce(values.sum(-1), mask, "none") if reduction == "none" else values) * scale


def kd(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    temperature: float = 4.0,
    mask: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    """Knowledge distillation (Hinton et al., arXiv 1503.02531): T^2 KL(softmax(z_t / T) || softmax(z_s / T)).

    The forward `kl_divergence` with the temperature that the classification literature uses; arguments and errors as there.
    """
    return kl_divergence(student_logits, teacher_logits, temperature=temperature, mask=mask, reduction=reduction)


class _ForwardKL(torch.autograd.Function):
    """scale times the sum of KL(p || q) over the positions, from logits [..., V].

    Its gradient, scale / T (q - p), is taken in the forward pass: half the kernels of autograd's, and one [..., V] kept, not five.
    """

    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor, temperature: float, scale: float) -> Tensor:
        log_q, log_p = (_log_softmax(logits, temperature).clamp_min_(LOG_ZERO) for logits in (student, teacher))
        p = log_p.exp()
        loss = log_p.sub_(log_q).mul_(p).sum() * scale
        if ctx.needs_input_grad[0]:
            ctx.save_for_backward(log_q.exp_().sub_(p).mul_(scale / temperature))
        return loss

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None, None]:
        gradient = _saved_once(ctx, upstream) if torch.is_grad_enabled() else ctx.saved_tensors[0] * upstream
        return gradient, None, None, None


@once_differentiable
def _saved_once(ctx: Any, upstream: Tensor) -> Tensor:
    """The saved gradient times the one from upstream, where a graph of the backward is asked for: differentiating it again raises."""
    return ctx.saved_tensors[0] * upstream


def log_probabilities(logits: Tensor, temperature: float) -> Tensor:
    """Log-probabilities [..., V]; those of ids at -inf are finite, so that 0 * log 0 is 0 and not NaN."""
    return _log_softmax(logits, temperature).clamp_min(LOG_ZERO)


def _log_softmax(logits: Tensor, temperature: float) -> Tensor:
    logits = upcast(logits)
    return (logits / temperature if temperature != 1 else logits).log_softmax(-1)


def _kl(log_p: Tensor, log_q: Tensor, reduction: Literal["sum", "none"]) -> Tensor:
    """KL(p || q) from log-probabilities [..., V]: its terms [..., V], or their sum over everything."""
    return F.kl_div(log_q, log_p, reduction=reduction, log_target=True)


def _positions(logits: Tensor) -> int:
    """Over how many positions a mean is taken; at least 1, so that the mean over none is 0."""
    return max(logits.numel() // max(logits.shape[-1], 1), 1)
