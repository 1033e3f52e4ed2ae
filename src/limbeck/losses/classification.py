"""Losses on the logits of a classifier beyond plain `kd`: decoupled, correlated, standardised, mutual and ensembled.

Where a paper and its released code differ, the value is the code's.
"""

from __future__ import annotations

import math

from torch import Tensor

from limbeck.losses._common import LOG_ZERO, Reduction, check_mask, check_same_shape, reduce, select, upcast
from limbeck.losses.logits import check_divergence, divergence_of_log_probs, kd, log_probabilities
from limbeck.losses.top_k import bucketed

STANDARD_EPS = 1e-7
CORRELATION_EPS = 1e-8
MUTUAL_EPS = 1e-8
ENSEMBLE_EPS = 1e-7


def dkd(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor,
    *,
    alpha: float = 1.0,
    beta: float = 8.0,
    temperature: float = 4.0,
    mask: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    """Decoupled knowledge distillation (arXiv 2203.08679, eq. 7): alpha TCKD + beta NCKD, see `dkd_parts`.

    alpha, beta: the paper's 1 and 8 are for CIFAR-100; beta is lower where the teacher is less sure (0.5 with temperature 1 on
    ImageNet). Other arguments, result and errors as `dkd_parts`.
    """
    target, others = dkd_parts(student_logits, teacher_logits, labels, temperature=temperature, mask=mask, reduction=reduction)
    return alpha * target + beta * others


def dkd_parts(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor,
    *,
    temperature: float = 4.0,
    mask: Tensor | None = None,
    reduction: Reduction = "mean",
) -> tuple[Tensor, Tensor]:
    """The two parts of `kd` (arXiv 2203.08679), each times T^2: TCKD and NCKD.

    TCKD is the KL of (p_y, 1 - p_y), label or not; NCKD the KL of the distribution over the other classes, given that it is one of
    them. For each sample kd = TCKD + (1 - p_y) NCKD with the teacher's p_y. With two classes NCKD is 0.

    student_logits, teacher_logits: [..., C], any float dtype; the arithmetic is float32 (float64 where given). The teacher is
    detached.
    labels: int64 [...], in [0, C); a sample without a label must be left out by the mask.
    mask: [...] bool, True where a sample counts; an all-False mask gives 0, not NaN.
    Returns two scalars, or two [...] with reduction="none". Raises ValueError on a shape mismatch or a temperature <= 0.
    """
    check_same_shape(student_logits, teacher_logits)
    check_divergence(temperature, "forward", 0.5)
    check_mask(student_logits, mask)
    if labels.shape != student_logits.shape[:-1]:
        raise ValueError(f"labels {list(labels.shape)} do not match the positions of logits {list(student_logits.shape)}")
    log_q = log_probabilities(select(student_logits, mask), temperature)
    log_p = log_probabilities(select(teacher_logits.detach(), mask), temperature)
    target = select(labels, mask).unsqueeze(-1)

    def kl(log_q: Tensor, log_p: Tensor) -> Tensor:
        return divergence_of_log_probs(
            log_q, log_p, kind="forward", beta=0.5, scale=temperature**2, mask=mask, reduction=reduction
        )

    return kl(bucketed(log_q, target), bucketed(log_p, target)), kl(_without(log_q, target), _without(log_p, target))


def dist(student_logits: Tensor, teacher_logits: Tensor, *, beta: float = 1.0, gamma: float = 1.0, tau: float = 1.0) -> Tensor:
    """Knowledge distillation from a stronger teacher (DIST, arXiv 2205.10536): beta inter + gamma intra, see `dist_parts`.

    tau: 1 on ImageNet, 4 on CIFAR-100. Other arguments, result and errors as `dist_parts`.
    """
    inter, intra = dist_parts(student_logits, teacher_logits, tau=tau)
    return beta * inter + gamma * intra


def dist_parts(student_logits: Tensor, teacher_logits: Tensor, *, tau: float = 1.0) -> tuple[Tensor, Tensor]:
    """One minus the mean Pearson correlation of the probabilities softmax(z / tau), times tau^2 (arXiv 2205.10536).

    inter correlates the classes within each sample, intra the samples of the batch within each class, so that no sample can be left
    out without changing the others. A row or column without spread has correlation 0: over a single sample intra is tau^2, without
    gradient.

    student_logits, teacher_logits: [B, C], any float dtype; the arithmetic is float32 (float64 where given). The teacher is
    detached. For dense predictions the pixels are the samples.
    Returns two scalars; 0 over no sample at all. Raises ValueError on a shape mismatch or a tau <= 0.
    """
    check_same_shape(student_logits, teacher_logits)
    if student_logits.dim() != 2:
        raise ValueError(f"logits are {list(student_logits.shape)}; expected [B, C], with pixels or tokens as samples")
    if not tau > 0:
        raise ValueError(f"tau is {tau}; expected a number > 0")
    if not student_logits.numel():
        nothing = upcast(student_logits).sum()
        return nothing, nothing
    student = log_probabilities(student_logits, tau).exp()
    teacher = log_probabilities(teacher_logits.detach(), tau).exp()
    inter, intra = (1 - _correlation(student, teacher, dim).mean() for dim in (1, 0))
    return tau**2 * inter, tau**2 * intra


def standardise(logits: Tensor) -> Tensor:
    """(z - mean) / (std + 1e-7) over the classes, with the unbiased std (arXiv 2403.01427); gradient flows through both.

    logits: [..., C], C >= 2, any float dtype; the result is float32 (float64 where given). Equal logits become 0, with a gradient
    that is finite but 1e7 times the incoming one: start the student's head from random weights rather than zeros.
    Raises ValueError where C < 2.
    """
    if logits.shape[-1] < 2:
        raise ValueError(f"logits {list(logits.shape)} have {logits.shape[-1]} classes; expected 2 or more to standardise over")
    logits = upcast(logits)
    centred = logits - logits.mean(-1, keepdim=True)
    std = centred.norm(dim=-1, keepdim=True) / math.sqrt(logits.shape[-1] - 1)
    return centred / (std + STANDARD_EPS)


def logit_standardised_kd(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    temperature: float = 2.0,
    mask: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    """`kd` on standardised logits (arXiv 2403.01427): the student need not match the teacher's mean and scale of logits.

    temperature: the paper's base temperature, on logits whose std is 1. Other arguments, result and errors as `kd`; C >= 2.
    """
    check_same_shape(student_logits, teacher_logits)
    check_mask(student_logits, mask)
    student, teacher = select(student_logits, mask), select(teacher_logits.detach(), mask)
    values = kd(standardise(student), standardise(teacher), temperature=temperature, reduction=reduction)
    return reduce(values, mask, "none") if reduction == "none" else values


def takd(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    temperature: float = 4.0,
    mask: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    """`kd` as teacher-assistant distillation released it (arXiv 1902.03393): averaged over samples and classes.

    This is Hinton's value divided by the number of classes, so that its weight means less the more classes there are. The method
    itself is a chain of distillations, from the teacher to an assistant of middle size and from there to the student; each link may
    use `kd` as well. Arguments, result and errors as `kd`.
    """
    hinton = kd(student_logits, teacher_logits, temperature=temperature, mask=mask, reduction=reduction)
    return hinton / student_logits.shape[-1]


def dml(student_logits: Tensor, peer_logits: Tensor, *, mask: Tensor | None = None, reduction: Reduction = "mean") -> Tensor:
    """Deep mutual learning (arXiv 1706.00384), one direction: KL(p_peer || p_student) at temperature 1.

    The peer is detached; call once for each ordered pair of networks. As released, the logarithm is
    log(1e-8 + p_peer / (p_student + 1e-8)), so that the gradient vanishes where the student's probability does, and the value is 0
    at equality only up to 1e-8 a class.

    student_logits, peer_logits: [..., C], any float dtype; the arithmetic is float32 (float64 where given).
    mask: [...] bool, True where a sample counts; an all-False mask gives 0, not NaN.
    Returns a scalar, or [...] with reduction="none". Raises ValueError on a shape mismatch.
    """
    check_same_shape(student_logits, peer_logits)
    check_mask(student_logits, mask)
    student = log_probabilities(select(student_logits, mask), 1.0).exp()
    peer = log_probabilities(select(peer_logits.detach(), mask), 1.0).exp()
    values = (peer * (MUTUAL_EPS + peer / (student + MUTUAL_EPS)).log()).sum(-1)
    return reduce(values, mask, reduction)


def ensemble(branch_logits: Tensor, gate: Tensor) -> Tensor:
    """The gated sum of the branches' logits (ONE, arXiv 1806.04606), the on-the-fly teacher. Nothing is detached.

    branch_logits: [..., M, C]; gate: [..., M], the weight of each branch, rows summing to 1.
    Returns [..., C], float32 (float64 where given). Raises ValueError on a shape mismatch.
    """
    if gate.shape != branch_logits.shape[:-1]:
        raise ValueError(f"gate {list(gate.shape)} does not match the branches of logits {list(branch_logits.shape)}")
    return (upcast(gate).unsqueeze(-1) * upcast(branch_logits)).sum(-2)


def one_kd(
    branch_logits: Tensor,
    ensemble_logits: Tensor,
    *,
    temperature: float = 3.0,
    mask: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    """On-the-fly native ensemble (ONE, arXiv 1806.04606): T^2 times the branches' KL from the ensemble, summed over branches.

    As released, 1e-7 is added to the ensemble's probabilities, so that they sum to a little more than 1, and no logit may be
    -inf. The ensemble is detached: it learns from the labels alone.

    branch_logits: [..., M, C]; ensemble_logits: [..., C]; any float dtype; the arithmetic is float32 (float64 where given).
    mask: [...] bool, True where a sample counts; an all-False mask gives 0, not NaN.
    Returns a scalar, or [...] with reduction="none". Raises ValueError on a shape mismatch or a temperature <= 0.
    """
    if branch_logits.shape[:-2] + branch_logits.shape[-1:] != ensemble_logits.shape:
        raise ValueError(
            f"branches {list(branch_logits.shape)} do not match the ensemble {list(ensemble_logits.shape)}; "
            "expected [..., M, C] and [..., C]"
        )
    check_divergence(temperature, "forward", 0.5)
    check_mask(ensemble_logits, mask)
    log_q = log_probabilities(select(branch_logits, mask), temperature)
    log_p = log_probabilities(select(ensemble_logits.detach(), mask), temperature)
    target = (log_p.exp() + ENSEMBLE_EPS).unsqueeze(-2)
    values = (target * (target.log() - log_q)).sum((-2, -1))
    return temperature**2 * reduce(values, mask, reduction)


def ramp_up(epoch: float, epochs: float = 80) -> float:
    """exp(-5 (1 - epoch / epochs)^2): a weight that grows from exp(-5) to 1 over the first ``epochs``, and stays (arXiv 1610.02242).

    ONE multiplies its distillation term by it. epoch: counted from 0. epochs=0 is no ramp: 1 from the start.
    """
    if epochs < 0:
        raise ValueError(f"epochs is {epochs}; expected a number >= 0")
    left = 1 - min(max(epoch / epochs, 0.0), 1.0) if epochs else 0.0
    return math.exp(-5 * left**2)


def _without(log_probs: Tensor, target: Tensor) -> Tensor:
    """Log-probabilities [..., C] given that the class is not ``target`` [..., 1]."""
    return log_probs.scatter(-1, target, LOG_ZERO).log_softmax(-1).clamp_min(LOG_ZERO)


def _correlation(a: Tensor, b: Tensor, dim: int) -> Tensor:
    """Pearson's correlation along ``dim``; 0, with a finite gradient, where either has no spread."""
    a, b = a - a.mean(dim, keepdim=True), b - b.mean(dim, keepdim=True)
    return (a * b).sum(dim) / (a.norm(dim=dim) * b.norm(dim=dim) + CORRELATION_EPS)
