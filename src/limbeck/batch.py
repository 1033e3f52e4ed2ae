"""The words of a batch: what is supervised, and whose inputs are whose."""

from __future__ import annotations

from collections.abc import Mapping
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


def supervised(inputs: Mapping[str, Tensor]) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """Where the next token is supervised.

    inputs: of one side, with ``labels`` [B, T], -100 = ignore. Returns the index (rows, columns), each [K], of the positions that
    *predict* a label, in reading order, and those labels [K]. Teacher and student are paired k-th to k-th, so their sequences may differ
    in everything else. Where a collator left the ``predicting`` positions in the inputs, a GPU need not be waited for.
    """
    labels = inputs["labels"]
    rows, columns = inputs["predicting"] if "predicting" in inputs else predicting(labels)
    return (rows, columns), labels[rows, columns + 1]


def predicting(labels: Tensor) -> Tensor:
    """[2, K]: rows and columns of the positions that predict a label of [B, T], in reading order."""
    return torch.nonzero(labels[:, 1:] != -100).t()


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
