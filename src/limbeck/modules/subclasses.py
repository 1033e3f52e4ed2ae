"""Pseudo-subclasses along linear directions of a teacher's embedding (LELP, arXiv 2409.20449): fitted once, then fixed."""

from __future__ import annotations

import warnings
from typing import Literal

import torch
from torch import Tensor, nn

from limbeck.errors import BadInput
from limbeck.losses._common import upcast

Directions = Literal["pca", "random"]
Rotation = Literal["per-class", "shared", "none"]

ROUNDING = 1e-10
"""The share of a class's variance below which a direction carries none: embeddings are rounded to float32 at best."""


class ClassMoments:
    """Count, sum and outer products of each class's embeddings, gathered batch by batch on the CPU in float64.

    classes: C; width: D of an embedding. They take C D^2 numbers, however many samples there are.
    """

    def __init__(self, classes: int, width: int) -> None:
        self.count = torch.zeros(classes, dtype=torch.float64)
        self.total = torch.zeros(classes, width, dtype=torch.float64)
        self.square = torch.zeros(classes, width, width, dtype=torch.float64)

    def add(self, embeddings: Tensor, labels: Tensor) -> None:
        """Take in embeddings [B, D] of classes [B]."""
        embeddings, labels = embeddings.detach().to("cpu", torch.float64), labels.cpu()
        for label in labels.unique().tolist():
            rows = embeddings[labels == label]
            self.count[label] += len(rows)
            self.total[label] += rows.sum(0)
            self.square[label] += rows.T @ rows

    def statistics(self) -> tuple[Tensor, Tensor]:
        """Means [C, D] and covariances [C, D, D] of the classes.

        A class of fewer than two samples has the covariance of all samples, and one of none their mean; a warning names it. Raises
        `BadInput` over fewer than two samples in all.
        """
        everything = self.count.sum()
        if everything < 2:
            raise BadInput(f"directions are fitted to {int(everything)} samples; expected at least 2")
        mean, covariance = _statistics(everything, self.total.sum(0), self.square.sum(0))
        rare = self.count < 2
        if rare.any():
            which = ", ".join(map(str, rare.nonzero().flatten().tolist()))
            warnings.warn(f"fewer than 2 samples of class {which}: its directions are those of all samples", stacklevel=3)
        each = [_statistics(*moments) for moments in zip(self.count.clamp_min(1), self.total, self.square, strict=True)]
        means = torch.where(self.count[:, None] < 1, mean, torch.stack([own for own, _ in each]))
        return means, torch.where(rare[:, None, None], covariance, torch.stack([own for _, own in each]))


def _statistics(count: Tensor, total: Tensor, square: Tensor) -> tuple[Tensor, Tensor]:
    mean = total / count
    return mean, square / count - torch.outer(mean, mean)


def null_space(weight: Tensor) -> Tensor:
    """An orthonormal basis of what no row of ``weight`` reads: [C, D] -> [D, D - rank], in float64."""
    _, values, rows = torch.linalg.svd(weight.detach().double())
    tolerance = max(weight.shape) * torch.finfo(torch.float32).eps * values.max()
    return rows[int((values > tolerance).sum()) :].T


def principal_directions(covariance: Tensor, basis: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The ``count`` directions of most variance within a subspace: orthonormal [D, count], and their variances, largest first.

    covariance: [D, D]; basis: orthonormal [D, R], R >= count. Each direction's largest entry is positive, so that signs do not depend on
    the machine.
    """
    variances, vectors = torch.linalg.eigh(basis.T @ covariance @ basis)
    directions = basis @ vectors[:, -count:].flip(1)
    largest = directions.gather(0, directions.abs().argmax(0, keepdim=True))
    return directions * torch.where(largest < 0, -1.0, 1.0), variances[-count:].flip(0).clamp_min(0)


def random_directions(basis: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """``count`` directions of a subspace, uniformly: orthonormal [D, count]. basis: orthonormal [D, R], R >= count."""
    drawn, _ = torch.linalg.qr(torch.randn(basis.shape[1], count, generator=generator, dtype=basis.dtype))
    return basis @ drawn


def random_rotation(size: int, generator: torch.Generator) -> Tensor:
    """An orthonormal [size, size] matrix, uniformly (Haar), in float64."""
    rotation, triangle = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))
    return rotation * triangle.diagonal().sign()


class SubclassDirections(nn.Module):
    """Where an embedding lies along each class's directions: buffers, fitted once (`fit`), and kept with the method.

    classes: C; width: D of an embedding; subclasses: S of each class.
    Until they are fitted the buffers are NaN, so that a loss before it cannot pass for one.
    """

    means: Tensor
    directions: Tensor
    scale: Tensor

    def __init__(self, classes: int, width: int, subclasses: int) -> None:
        super().__init__()
        self.register_buffer("means", torch.full((classes, width), torch.nan))
        self.register_buffer("directions", torch.full((classes, width, subclasses), torch.nan))  # orthonormal columns
        self.register_buffer("scale", torch.full((classes,), torch.nan))

    def fit(
        self,
        moments: ClassMoments,
        basis: Tensor,
        *,
        directions: Directions = "pca",
        rotation: Rotation = "per-class",
        unit_variance: bool = True,
        generator: torch.Generator,
    ) -> None:
        """Fit every class's mean, directions and scale.

        moments: of the embeddings. basis: orthonormal [D, R] of the subspace that directions lie in, R >= S.
        directions: those of most variance, or random ones. rotation: turns each class's directions among themselves, so that their
        variances are equal in expectation. unit_variance: scale a class's coordinates so that their mean variance is 1.
        generator: of the CPU. A class whose embeddings span fewer than S directions gets others that carry no variance; a warning names it.
        """
        classes, _, subclasses = self.directions.shape
        means, covariances = moments.statistics()
        shared = random_rotation(subclasses, generator) if rotation == "shared" else torch.eye(subclasses, dtype=torch.float64)
        for label in range(classes):
            covariance = covariances[label]
            chosen, variances = principal_directions(covariance, basis, subclasses)
            nothing = ROUNDING * covariance.diagonal().sum()
            spanned = int((variances > nothing).sum())
            if directions == "pca" and spanned < subclasses:
                warnings.warn(
                    f"class {label} varies in {spanned} directions only: {subclasses} subclasses share them", stacklevel=2
                )
            if directions == "random":
                chosen = random_directions(basis, subclasses, generator)
            chosen = chosen @ (random_rotation(subclasses, generator) if rotation == "per-class" else shared)
            variance = (chosen * (covariance @ chosen)).sum() / subclasses
            self.means[label] = means[label]
            self.directions[label] = chosen
            self.scale[label] = variance.rsqrt() if unit_variance and variance > nothing else 1.0

    def forward(self, embeddings: Tensor) -> Tensor:
        """Embeddings [B, D] -> coordinates along every class's directions [B, C, S], in float32."""
        with torch.autocast(embeddings.device.type, enabled=False):
            along = torch.einsum("bd,cds->bcs", embeddings.float(), self.directions)
            origin = torch.einsum("cd,cds->cs", self.means, self.directions)
            return (along - origin) * self.scale[:, None]


def subclass_targets(teacher_logits: Tensor, subclass_logits: Tensor, *, tau: float = 1.0, beta: float = 1.0) -> Tensor:
    """Log-probabilities of the subclasses: softmax(z / tau)_c softmax(s_c / beta)_k (arXiv 2409.20449, section 3).

    teacher_logits: z, [B, C]; subclass_logits: s, [B, C, S]. tau, beta: > 0. Any float dtype; the result is float32 (float64 where given).
    Returns [B, C * S], class by class.
    """
    classes = (upcast(teacher_logits) / tau).log_softmax(-1)
    within = (upcast(subclass_logits) / beta).log_softmax(-1)
    return (classes[..., None] + within).flatten(1)
