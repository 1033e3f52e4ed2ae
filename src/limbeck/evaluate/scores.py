"""Numbers made of measured ones: what distillation recovered, and how base and new classes balance."""

from __future__ import annotations


def recovered_fraction(distilled: float, alone: float, teacher: float) -> float | None:
    """How much of the way from the student alone to its teacher distillation went: (distilled - alone) / (teacher - alone).

    One metric of each: 0 is the student alone, 1 the teacher, below 0 worse than without a teacher. None where student alone and teacher
    are equal, so that there is nothing to recover.
    """
    return None if teacher == alone else (distilled - alone) / (teacher - alone)


def harmonic_mean(base: float, new: float) -> float:
    """2 b n / (b + n) of the accuracies on the classes that were trained on and on the others: H of base-to-new generalisation
    (CoCoOp, arXiv 2203.05557, section 4.1). 0 where either is 0."""
    return 2 * base * new / (base + new) if base and new else 0.0
