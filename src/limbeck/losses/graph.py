"""Losses on graphs over tokens: which patches of a batch are near which, across pictures and within each.

Only N x N matrices are compared, so that student and teacher may differ in width. Tokens are of any float dtype; the arithmetic is
float32 (float64 where given), also under autocast.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from limbeck.losses._common import Reduction, check_choice, reduce, upcast
from limbeck.losses.logits import kl_divergence

SMALLEST_BANDWIDTH = 1e-6
FLAT = 0.01
"""The least median bandwidth, in units of the mean: where most pairs are of one flat background, their median distance is 0."""


def knn_graph(tokens: Tensor, *, k: int, sigma: float | Literal["median", "mean"] = "median") -> Tensor:
    """The directed nearest-neighbour graph of tokens (TRG, arXiv 2306.12442): A_ij = exp(-||t_i - t_j||^2 / (2 sigma)), or 0.

    A_ij is kept where t_i is among the k nearest neighbours of t_j, itself excluded: k entries in (0, 1] a column. Gradient flows
    through the values that are kept; which they are is a choice without one.
    tokens: [N, D]. k: >= 1; with N - 1 tokens or fewer, all are neighbours.
    sigma: > 0, in squared units of the tokens; or that statistic of the squared distances of all pairs, at least 1 % of their mean: the
        graph is then blind to the tokens' scale.
    Returns [N, N]. Raises ValueError on a wrong shape or a value out of range.
    """
    if tokens.dim() != 2:
        raise ValueError(f"tokens are {list(tokens.shape)}; expected [N, D], those of all pictures in one list")
    if k < 1:
        raise ValueError(f"k is {k}; expected 1 neighbour or more")
    check_bandwidth(sigma)
    count = len(tokens)
    with torch.autocast(tokens.device.type, enabled=False):
        distances = _squared_distances(upcast(tokens))
        if count < 2:
            return distances * 0
        bandwidth = sigma if isinstance(sigma, float | int) else _bandwidth(distances, sigma)
        kernel = torch.exp(-distances / (2 * bandwidth))
    itself = torch.eye(count, dtype=torch.bool, device=tokens.device)
    near = distances.detach().masked_fill(itself, torch.inf).topk(min(k, count - 1), dim=0, largest=False).indices  # [k, N]
    kept = torch.zeros_like(itself).scatter_(0, near, True)
    return torch.where(kept, kernel, 0.0)


def check_bandwidth(sigma: float | str) -> None:
    """Raise ValueError where ``sigma`` is neither a number > 0 nor a statistic."""
    if isinstance(sigma, str):
        check_choice("sigma", sigma, ("median", "mean"))
    elif not sigma > 0:
        raise ValueError(f"sigma is {sigma}; expected a number > 0, 'median' or 'mean'")


def local_graph(
    student_tokens: Tensor,
    teacher_tokens: Tensor,
    *,
    k: int = 8,
    sigma: float | Literal["median", "mean"] = "median",
    temperature: float = 1.0,
    kind: Literal["forward", "reverse"] = "reverse",
    reduction: Reduction = "mean",
) -> Tensor:
    """TRG's local loss (arXiv 2306.12442): a KL between the two `knn_graph`, of the softmax over each token's row of edges.

    An absent edge counts as a logit of 0, so that the softmax is over all N tokens. The mean over tokens; the paper sums.
    student_tokens [N, D], teacher_tokens [N, D']: the same N patches; the teacher is detached.
    temperature: of the softmax over edges; the paper has none (1), and since edges lie in [0, 1] its distributions are nearly uniform.
    kind: "reverse" is KL(student || teacher), as reported of the paper; "forward" KL(teacher || student).
    Returns a scalar, 0 over no token; or [N] with reduction="none". Raises ValueError on a shape mismatch or a value out of range.
    """
    if len(student_tokens) != len(teacher_tokens):
        raise ValueError(
            f"student tokens {list(student_tokens.shape)} and teacher tokens {list(teacher_tokens.shape)}; expected as many of both: the "
            "same patches"
        )
    student = knn_graph(student_tokens, k=k, sigma=sigma)
    teacher = knn_graph(teacher_tokens.detach(), k=k, sigma=sigma).to(student.dtype)
    return kl_divergence(student, teacher, temperature=temperature, kind=kind, scale_by_t2=False, reduction=reduction)


def token_attention(tokens: Tensor) -> Tensor:
    """How much each token of a picture looks at each other (arXiv 2306.12442): softmax over rows of F F^T / sqrt(D).

    tokens: F, [B, P, D]. Returns [B, P, P]; rows sum to 1.
    """
    with torch.autocast(tokens.device.type, enabled=False):
        tokens = upcast(tokens)
        return (tokens @ tokens.mT / tokens.shape[-1] ** 0.5).softmax(-1)


def inner_graph(student_tokens: Tensor, teacher_tokens: Tensor, *, reduction: Reduction = "mean") -> Tensor:
    """TRG's contextual loss (arXiv 2306.12442): mean squared difference of the two `token_attention`, over P x P.

    student_tokens [B, P, D], teacher_tokens [B, P, D']: the same P patches; the teacher is detached.
    Returns a scalar, 0 over no picture; or [B] with reduction="none". Raises ValueError on a shape mismatch.
    """
    if student_tokens.dim() != 3 or teacher_tokens.dim() != 3 or student_tokens.shape[:2] != teacher_tokens.shape[:2]:
        raise ValueError(
            f"student tokens {list(student_tokens.shape)} and teacher tokens {list(teacher_tokens.shape)}; expected [B, P, D] with the "
            "same pictures B and patches P: pool them to one grid"
        )
    difference = token_attention(student_tokens) - token_attention(teacher_tokens.detach())
    return reduce(difference.square().mean((1, 2)), None, reduction)


def _squared_distances(tokens: Tensor) -> Tensor:
    """[N, D] -> [N, N], >= 0. Centred first, so that tokens far from the origin do not cancel."""
    centred = tokens - tokens.mean(0) if len(tokens) else tokens
    products = centred @ centred.T
    squares = products.diagonal()
    return (squares[:, None] + squares - 2 * products).clamp_min(0)


def _bandwidth(distances: Tensor, statistic: str) -> Tensor:
    """A statistic of the off-diagonal entries of [N, N], N > 1; with gradient, so that the loss's gradient is that of its value."""
    count = len(distances)
    pairs = distances.flatten()[1:].view(count - 1, count + 1)[:, :-1]  # all but the diagonal
    mean = pairs.mean()
    chosen = mean if statistic == "mean" else torch.maximum(pairs.median(), FLAT * mean)
    return chosen.clamp_min(SMALLEST_BANDWIDTH)
