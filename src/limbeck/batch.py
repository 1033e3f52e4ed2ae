"""The words of a batch: what is supervised, and whose inputs are whose."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

Batch = dict[str, Any]
"""One collated batch. Tensors stand under transformers' key names (``pixel_values``, ``input_ids``, ``labels``); ``ids``
holds the sample ids. Vision-language batches hold one such dict a side, ``batch["student"]`` and, where the teacher's
processor differs, ``batch["teacher"]``."""


def teacher_side(batch: Batch) -> dict[str, Tensor]:
    """The teacher's inputs: its own where its processor differs, else the student's."""
    return batch["teacher"] if "teacher" in batch else batch["student"]


def supervised(labels: Tensor) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """Where the next token is supervised.

    labels: [B, T], -100 = ignore. Returns the index (rows, columns), each [K], of the positions that *predict* a label, in reading
    order, and those labels [K]. Teacher and student are paired k-th to k-th, so their sequences may differ in everything else.
    """
    rows, columns = torch.nonzero(labels[:, 1:] != -100, as_tuple=True)
    return (rows, columns), labels[rows, columns + 1]


def answer_spans(labels: Tensor) -> tuple[Tensor, Tensor]:
    """Which answer each supervised token belongs to.

    labels: [B, T]. An answer is a run of supervised tokens. Returns the answer's number [K] for each supervised token in reading order,
    and each answer's row [A].
    """
    mask = labels[:, 1:] != -100
    starts = mask.clone()
    starts[:, 1:] &= ~mask[:, :-1]
    answer = starts.flatten().cumsum(0).view_as(mask)[mask] - 1
    return answer, torch.nonzero(starts, as_tuple=True)[0]
