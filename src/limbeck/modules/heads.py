"""What stands at the end of a student and is shipped with it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from limbeck.errors import BadInput
from limbeck.losses._common import upcast


class SumSubclasses(nn.Module):
    """Class logits from subclass logits: the logarithm of the summed exponentials, so that softmax sums the probabilities.

    subclasses: S of each class. [..., C * S], class by class -> [..., C].
    """

    def __init__(self, subclasses: int) -> None:
        super().__init__()
        self.subclasses = subclasses

    def forward(self, logits: Tensor) -> Tensor:
        return logits.unflatten(-1, (-1, self.subclasses)).logsumexp(-1)

    def extra_repr(self) -> str:
        return f"{self.subclasses}"


class DualHead(nn.Module):
    """Two heads on one pooled feature, answering together (DHO, arXiv 2505.07675).

    ``forward`` gives [B, C], the logarithm of the mixture p = alpha softmax(a) + (1 - alpha) softmax(k / beta) of the logits of both; its
    softmax is p.

    ce: the head a that learns from labels; a linear layer or a 1x1 convolution. kd: the head k that learns from a teacher; a linear layer
    as wide as ``ce``. scale: k = scale (W norm(z) + b) on the normalised feature; None: k = W z + b.
    alpha, beta: persistent buffers; alpha in [0, 1], beta > 0.
    Raises `BadInput` where the two heads do not read one feature or do not have the same classes.
    """

    alpha: Tensor
    beta: Tensor

    def __init__(
        self, ce: nn.Module, kd: nn.Linear, *, alpha: float = 0.5, beta: float = 0.5, scale: float | None = None
    ) -> None:
        super().__init__()
        self.ce, self.kd, self.scale = ce, kd, scale
        classes, width = ce.get_parameter("weight").shape[:2]
        if (width, classes) != (kd.in_features, kd.out_features):
            raise BadInput(
                f"two heads on one feature must be of one size; one maps {width} to {classes}, the other {kd.in_features} to "
                f"{kd.out_features}"
            )
        self.register_buffer("alpha", torch.empty(()))
        self.register_buffer("beta", torch.empty(()))
        self.mix(alpha, beta)

    def mix(self, alpha: float, beta: float) -> None:
        """Choose the mixture. Raises `BadInput` where alpha is outside [0, 1] or beta not above 0."""
        if not (0 <= alpha <= 1 and beta > 0):
            raise BadInput(f"a mixture of two heads takes alpha in [0, 1] and beta > 0, given {alpha} and {beta}")
        self.alpha.fill_(alpha)
        self.beta.fill_(beta)

    def both(self, pooled: Tensor) -> tuple[Tensor, Tensor]:
        """The logits a and k, each [B, C], of a pooled feature [B, D], or [B, D, 1, 1] where ``ce`` is a convolution."""
        if pooled.dim() == 2 and isinstance(self.ce, nn.Conv2d):
            pooled = pooled[..., None, None]
        flat = pooled.flatten(1)
        k = self.kd(flat) if self.scale is None else self.scale * self.kd(F.normalize(flat, dim=1))
        return self.ce(pooled).flatten(1), k

    def forward(self, pooled: Tensor) -> Tensor:
        """[B, D] -> [B, C], log-probabilities."""
        a, k = self.both(pooled)
        return log_mixture(a, k, self.alpha, self.beta)

    @property
    def in_channels(self) -> int:
        """Width of the feature, under the name that `Classifier.width` looks for in what is no linear layer."""
        return self.kd.in_features

    def extra_repr(self) -> str:
        return f"alpha={self.alpha.item():.2f}, beta={self.beta.item():.2f}, scale={self.scale}"


def log_mixture(ce_logits: Tensor, kd_logits: Tensor, alpha: Tensor, beta: Tensor) -> Tensor:
    """log(alpha softmax(a) + (1 - alpha) softmax(k / beta)) over the last dimension, at least in float32; alpha, beta: broadcast.

    With alpha 1 or 0 exactly one head's log-probabilities.
    """
    of_ce, of_kd = upcast(ce_logits).log_softmax(-1), (upcast(kd_logits) / beta).log_softmax(-1)
    return torch.logaddexp(of_ce + alpha.log(), of_kd + (1 - alpha).log())
