"""What features are worth: classifiers on top of a frozen model's features, fitted to a reference set."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

STRENGTHS = (10.0, 1.0, 0.1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6)
"""The grid of L2 strengths. A strength is scikit-learn's 1 / (C n)."""

ITERATIONS = 1000  # at most, as CLIP's linear probes


@dataclass(frozen=True)
class Linear:
    """A fitted linear probe: features [N, D] -> logits [N, K], after standardising them. strength: the L2 strength that was chosen."""

    mean: Tensor
    scale: Tensor
    weight: Tensor
    bias: Tensor
    strength: float

    def __call__(self, features: Tensor) -> Tensor:
        standard = (features.to(self.mean) - self.mean) / self.scale
        return standard @ self.weight.T + self.bias


def fit_linear_probe(features: Tensor, labels: Tensor, strengths: Sequence[float] = STRENGTHS) -> Linear:
    """Multinomial logistic regression by L-BFGS (CLIP, arXiv 2103.00020, appendix A.3), in float64.

    features: [N, D], standardised here by their own mean and standard deviation. labels: [N]. The L2 strength (bias excepted) is the one
    with the highest accuracy on every third sample of each class, of equal ones that with the lowest loss; then all samples are fitted.
    """
    labels = labels.to(exact(features).device)
    features, classes = exact(features), int(labels.max()) + 1
    held_out = torch.zeros_like(labels, dtype=torch.bool)
    held_out[labels.argsort(stable=True)[2::3]] = True
    if not held_out.any():
        return _fit(features, labels, classes, strengths[len(strengths) // 2])

    def quality(strength: float) -> tuple[float, float]:
        logits = _fit(features[~held_out], labels[~held_out], classes, strength)(features[held_out])
        right = logits.argmax(-1) == labels[held_out]
        return right.double().mean().item(), -F.cross_entropy(logits, labels[held_out]).item()

    return _fit(features, labels, classes, max(strengths, key=quality))


def _fit(features: Tensor, labels: Tensor, classes: int, strength: float) -> Linear:
    mean, scale = features.mean(0), features.std(0, correction=0)
    scale = torch.where(scale > 0, scale, 1.0)
    standard = (features - mean) / scale
    weight = standard.new_zeros(classes, standard.shape[1], requires_grad=True)
    bias = standard.new_zeros(classes, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [weight, bias], max_iter=ITERATIONS, tolerance_grad=1e-5, tolerance_change=1e-12, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(standard @ weight.T + bias, labels) + strength / 2 * weight.square().sum()
        loss.backward()
        return loss

    with torch.enable_grad():
        optimizer.step(closure)
    return Linear(mean, scale, weight.detach(), bias.detach(), strength)


def exact(features: Tensor) -> Tensor:
    """In float64, which autocast leaves alone; on the CPU where the device has none."""
    return features.cpu().double() if features.device.type == "mps" else features.double()


def nearest_neighbours(features: Tensor, reference: Tensor, labels: Tensor, *, k: int = 20, temperature: float = 0.07) -> Tensor:
    """The class [N] that the k nearest of the reference vote for, each with weight exp(cosine / temperature) (DINO, arXiv 2104.14294).

    features: [N, D]; reference: [M, D] with labels [M]; k is at most M.
    """
    with torch.autocast(features.device.type, enabled=False):
        cosine = F.normalize(features.float(), dim=-1) @ F.normalize(reference.float(), dim=-1).T
    similarity, index = cosine.topk(min(k, len(reference)))
    votes = cosine.new_zeros(len(features), int(labels.max()) + 1)
    return votes.scatter_add(1, labels[index], (similarity / temperature).exp()).argmax(-1)
