"""Losses that tell a pair from all other pairs."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from limbeck.losses._common import Reduction, check_mask, check_same_shape, reduce, select, unit, upcast

EPSILON = 1e-7
"""What the official CRD adds to its denominators."""


def crd(log_scores: Tensor, *, n_data: int, reduction: Reduction = "mean") -> Tensor:
    """One side of contrastive representation distillation (Tian et al., arXiv 1910.10699): noise-contrastive estimation.

    With o = exp(log_scores), K negatives and noise mass c = K / n_data,
    L = -log(o_0 / (o_0 + c + 1e-7)) - sum_k log(c / (o_k + c + 1e-7)), as in the official code; in logarithms, so that no score
    overflows.
    log_scores: [..., 1 + K], the positive first: similarity / temperature - log Z; any float dtype; the arithmetic is float32
        (float64 where given).
    n_data: samples of the training set, over which noise is uniform.
    Returns the mean over rows, or [...] with reduction="none"; over no row 0. Raises ValueError without negatives or data.
    """
    negatives = log_scores.shape[-1] - 1
    if negatives < 1:
        raise ValueError(f"log_scores {list(log_scores.shape)} has no negatives; expected [..., 1 + K] with the positive first")
    if n_data < 1:
        raise ValueError(f"n_data is {n_data}; expected the number of training samples, at least 1")
    noise = negatives / n_data
    positive, negative = upcast(log_scores).split([1, negatives], dim=-1)
    log_mass = math.log(noise + EPSILON)
    found = F.softplus(log_mass - positive).squeeze(-1)
    rejected = (log_mass - math.log(noise) + F.softplus(negative - log_mass)).sum(-1)
    return reduce(found + rejected, None, reduction)


def info_nce(
    queries: Tensor,
    keys: Tensor,
    *,
    temperature: float | Tensor = 0.07,
    mask: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    """InfoNCE (van den Oord et al., arXiv 1807.03748): cross-entropy of finding each query's own key among all keys, by cosine.

    queries, keys: [N, D], pairs row by row, any float dtype; the arithmetic is float32 (float64 where given), also under autocast.
        Rows are L2-normalised here, which leaves normalised ones as they are; a zero row stays zero, without gradient. Gradient
        reaches both, since both may be trained (two modalities of one student): a teacher's keys come from a frozen teacher, or detached.
    temperature: > 0; a tensor where it is learnt.
    mask: [N] bool, True where a pair counts, as a query and as a key; an all-False mask gives 0, not NaN.
    Returns a scalar, or [N] with reduction="none": 0 for a single pair. Raises ValueError on a shape mismatch.
    """
    check_same_shape(queries, keys)
    if queries.dim() != 2:
        raise ValueError(f"queries and keys are {list(queries.shape)}; expected [N, D], a pair a row")
    if not isinstance(temperature, Tensor) and not temperature > 0:
        raise ValueError(f"temperature is {temperature}; expected a number > 0")
    check_mask(queries, mask)
    with torch.autocast(queries.device.type, enabled=False):
        queries, keys = (unit(upcast(select(rows, mask))) for rows in (queries, keys))
        logits = queries @ keys.T / temperature  # [N, N]
    return reduce(torch.logsumexp(logits, -1) - logits.diagonal(), mask, reduction)
