"""The loss on a teacher's answers to yes/no questions about a picture."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from limbeck.losses._common import Reduction, check_mask, check_same_shape, reduce, select, upcast


def aspect_bce(
    student_logits: Tensor, teacher_answers: Tensor, *, mask: Tensor | None = None, reduction: Reduction = "mean"
) -> Tensor:
    """Binary cross-entropy with soft answers, a mean over samples and questions (MaKD, arXiv 2501.13341).

    -q log sigma(a) - (1 - q) log(1 - sigma(a)), by log-sum-exp: finite for every finite a. At sigma(a) = q it is the entropy of q, with
    no gradient.

    student_logits: a [..., Q], one a question, any float dtype; the arithmetic is float32 (float64 where given).
    teacher_answers: q [..., Q], the probability of yes, in [0, 1]; detached.
    mask: [...] bool, True where a sample counts; an all-False mask gives 0, not NaN.
    Returns a scalar, or the mean over questions [...] with reduction="none". Raises ValueError on a shape mismatch, and for an answer
    outside [0, 1] where it is on the CPU: a GPU is not waited for.
    """
    check_same_shape(student_logits, teacher_answers)
    check_mask(student_logits, mask)
    if teacher_answers.device.type == "cpu" and not bool(((teacher_answers >= 0) & (teacher_answers <= 1)).all()):
        raise ValueError("a teacher's answer is outside [0, 1]; expected the probability of yes")
    student = upcast(select(student_logits, mask))
    answers = select(teacher_answers, mask).detach().to(student.dtype)
    values = F.binary_cross_entropy_with_logits(student, answers, reduction="none").mean(-1)
    return reduce(values, mask, reduction)
