"""What DINO adds to a backbone: a head that scores prototypes, and the centre of a teacher's scores."""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from limbeck.errors import BadInput


class DINOHead(nn.Module):
    """MLP with GELU, L2 normalisation, and the cosine with each of ``outputs`` directions (DINO, arXiv 2104.14294, appendix C).

    width: of what it reads. layers: of the MLP, >= 1, ``hidden`` wide, the last ``bottleneck``. Scores [..., outputs] lie in [-1,
    1]: the directions have unit norm, as DINO's weight-normalised last layer with its gain fixed at 1.
    """

    def __init__(self, width: int, outputs: int, *, hidden: int = 2048, bottleneck: int = 256, layers: int = 3) -> None:
        super().__init__()
        if layers < 1:
            raise BadInput(f"layers is {layers}; expected at least 1")
        sizes = [width, *[hidden] * (layers - 1), bottleneck]
        mlp: list[nn.Module] = []
        for before, after in pairwise(sizes):
            mlp += [nn.Linear(before, after), nn.GELU()]
        self.mlp = nn.Sequential(*mlp[:-1])
        for module in self.mlp:
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=module.in_features**-0.5)  # DINO's 0.02 at its width of 2048
                nn.init.zeros_(module.bias)
        self.directions = nn.Parameter(torch.randn(outputs, bottleneck))

    def forward(self, features: Tensor, *, frozen: bool = False) -> Tensor:
        """[..., width] -> [..., outputs]. frozen: the directions get no gradient, as in DINO's first epoch."""
        directions = self.directions.detach() if frozen else self.directions
        return F.linear(F.normalize(self.mlp(features), dim=-1), F.normalize(directions, dim=-1))


class Centre(nn.Module):
    """The running mean of a teacher's scores, which keeps one output from winning everywhere (DINO, arXiv 2104.14294, eq. 4).

    c <- momentum c + (1 - momentum) mean, the mean over all that was seen since the last `update`, on all processes.
    """

    center: Tensor
    total: Tensor
    count: Tensor

    def __init__(self, outputs: int, momentum: float = 0.9) -> None:
        super().__init__()
        if not 0 <= momentum <= 1:
            raise BadInput(f"momentum is {momentum}; expected a number from 0 to 1")
        self.momentum = momentum
        self.register_buffer("center", torch.zeros(outputs))
        self.register_buffer("total", torch.zeros(outputs), persistent=False)  # both 0 between steps
        self.register_buffer("count", torch.zeros(()), persistent=False)

    @torch.no_grad()
    def see(self, scores: Tensor) -> None:
        """Remember scores [..., outputs] for the next update."""
        rows = scores.float().flatten(0, -2)
        self.total += rows.sum(0)
        self.count += len(rows)

    @torch.no_grad()
    def update(self) -> None:
        """Move towards the mean of what was seen, if anything was, and forget it."""
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            for part in (self.total, self.count):
                torch.distributed.all_reduce(part)
        mean = self.total / self.count.clamp_min(1)
        share = (1 - self.momentum) * (self.count > 0)
        self.center.lerp_(mean, share.to(mean.dtype))
        self.total.zero_()
        self.count.zero_()
