"""Distributions that are known only by their largest entries: what a teacher cache or an API gives.

The ids outside the k form one bucket, on both sides: the divergence is that of two distributions over k + 1 outcomes, a lower bound
of the full one (data processing inequality) that ties the student's mass outside the k to the teacher's, and no id outside it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from limbeck.losses._common import LOG_ZERO, Reduction, check_mask, select
from limbeck.losses.logits import Divergence, divergence_of_log_probs, log_probabilities


@dataclass(frozen=True)
class TopK:
    """The k likeliest of ``vocabulary`` ids at each position, and what is left.

    ids: int64 [..., k], distinct within a position, in no particular order. log_probs: float [..., k], of softmax(z / temperature) over
    all ids. log_rest: float [...], the logarithm of the mass outside the k; finite also where nothing is left.
    """

    ids: Tensor
    log_probs: Tensor
    log_rest: Tensor
    temperature: float
    vocabulary: int

    @property
    def covered(self) -> Tensor:
        """[...]: the probability mass of the k ids."""
        return -torch.expm1(self.log_rest)

    @classmethod
    def joined(cls, parts: Sequence[TopK]) -> TopK:
        """Positions [N, k] one after the other; of one temperature and vocabulary."""
        ids, log_probs, log_rest = (torch.cat([getattr(p, name) for p in parts]) for name in ("ids", "log_probs", "log_rest"))
        return cls(ids, log_probs, log_rest, parts[0].temperature, parts[0].vocabulary)

    @property
    def shape(self) -> torch.Size:
        """[..., V]: of the logits that it stands for."""
        return torch.Size((*self.log_rest.shape, self.vocabulary))

    def to(self, device: torch.device | str, non_blocking: bool = False) -> TopK:
        """The same on another device."""
        return self._each(lambda part: part.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> TopK:
        """The same in page-locked memory."""
        return self._each(Tensor.pin_memory)

    def _each(self, change: Callable[[Tensor], Tensor]) -> TopK:
        return TopK(change(self.ids), change(self.log_probs), change(self.log_rest), self.temperature, self.vocabulary)


def top_k(logits: Tensor, k: int, *, temperature: float = 1.0) -> TopK:
    """The k likeliest ids of softmax(z / temperature), largest first; k is capped by V. logits: [..., V]. Without gradient."""
    logits = logits.detach()
    vocabulary = logits.shape[-1]
    log_probs = log_probabilities(logits, temperature)
    top = log_probs.topk(min(k, vocabulary))
    rest = bucketed(log_probs, top.indices)[..., -1]
    return TopK(top.indices, top.values, rest, temperature, vocabulary)


def top_k_divergence(
    student_logits: Tensor,
    teacher: TopK,
    *,
    kind: Divergence = "forward",
    beta: float = 0.5,
    scale_by_t2: bool = True,
    mask: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    """`kl_divergence` from a teacher that is known by its k likeliest ids and the mass of the rest.

    student_logits: [..., V], any float dtype, V = teacher.vocabulary; the arithmetic is float32 (float64 where given). The temperature
    is the teacher's, which was fixed when its entries were written. kind, beta, scale_by_t2, mask, reduction: see `kl_divergence`.
    Raises ValueError on a shape mismatch.
    """
    check_mask(student_logits, mask)
    if student_logits.shape[-1] != teacher.vocabulary:
        raise ValueError(f"student logits are over {student_logits.shape[-1]} ids, the teacher's over {teacher.vocabulary}")
    if student_logits.shape[:-1] != teacher.ids.shape[:-1]:
        raise ValueError(
            f"student {list(student_logits.shape)} and teacher entries {list(teacher.ids.shape)} differ in positions"
        )
    student = log_probabilities(select(student_logits, mask), teacher.temperature)
    log_q = bucketed(student, select(teacher.ids, mask))
    return divergence_of_log_probs(
        log_q,
        teacher_buckets(teacher, mask).to(log_q.dtype),
        kind=kind,
        beta=beta,
        scale=teacher.temperature**2 if scale_by_t2 else 1.0,
        mask=mask,
        reduction=reduction,
    )


def teacher_buckets(teacher: TopK, mask: Tensor | None = None) -> Tensor:
    """[M, k + 1]: the log-probabilities of the k ids and, last, of the rest."""
    rest = teacher.log_rest if mask is None else teacher.log_rest[mask]
    return torch.cat([select(teacher.log_probs, mask), rest.unsqueeze(-1)], dim=-1).detach()


def bucketed(log_probs: Tensor, ids: Tensor) -> Tensor:
    """[..., k + 1]: the entries of log_probs [..., V] at ids [..., k], and the logarithm of the sum of all others."""
    rest = log_probs.scatter(-1, ids, LOG_ZERO).logsumexp(-1, keepdim=True)
    return torch.cat([log_probs.gather(-1, ids), rest], dim=-1).clamp_min(LOG_ZERO)
