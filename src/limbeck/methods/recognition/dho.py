"""DHO: a small classifier with one head for the few labels and one for the teacher, mixed after training.

Simple (yet Effective) Semi-supervised Knowledge Distillation from Vision-Language Models via Dual-Head Optimization, 2025, arXiv
2505.07675. The class distribution of a frozen teacher (in the paper a zero-shot CLIP) moves, on labelled and unlabelled pictures, into a
head of its own on the student's backbone; labels train the other head. So teacher and labels, where they disagree, do not pull at one
head, and their gradients on the backbone conflict less (`DHO.conflict`). What the student ships is a mixture of both heads.

Differences. The authors' few-shot scripts weigh both losses by 0.5 (lambda = 0.5), which is the default here, those for ImageNet with 1 %
and 10 % of the labels by 1. The head of the latter reads the normalised feature and is scaled by 100, its bias too (``scale: 100``), and
both heads start from one (``init: copy``). The teacher's loss is the sum of two means, one over labelled and one over unlabelled pictures,
as in the code. The authors' ImageNet few-shot script searches (alpha, beta) on the test data; here, as in their scripts for smaller sets,
it is validation data. ``search: false`` keeps alpha = beta = 0.5, as their low-shot script does.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from limbeck import losses
from limbeck.batch import Batch
from limbeck.errors import BadInput
from limbeck.losses.logits import IGNORE
from limbeck.methods.base import Losses
from limbeck.methods.recognition.base import Recognition
from limbeck.models.classifier import Classifier
from limbeck.models.loading import load_module
from limbeck.modules.heads import DualHead, log_mixture
from limbeck.teachers.frozen import FrozenTeacher

ALPHAS = tuple(step / 20 for step in range(21))
BETAS = (0.5, 0.75, 1.0, 1.25, 1.5, 2.0, 4.0)


@dataclass(frozen=True)
class DHOConfig:
    """temperature: T > 0 of the teacher's loss. ce, kd: weights, lambda and 1 - lambda. heads: dual, or single, the baseline where one head
    learns from both. search: choose alpha and beta on validation data. alpha: the part of the label head in the mixture, in [0, 1], and
    beta: the divisor > 0 of the other's logits, both until a search chooses others. scale: the teacher's head is scale (W norm(z) + b);
    null: W z + b. init: of the teacher's head, fresh or a copy of the student's own. stacked: labelled and unlabelled pictures pass the
    student in one forward and share its BatchNorm statistics."""

    temperature: float = 2.0
    ce: float = 0.5
    kd: float = 0.5
    heads: Literal["dual", "single"] = "dual"
    search: bool = True
    alpha: float = 0.5
    beta: float = 0.5
    scale: float | None = None
    init: Literal["fresh", "copy"] = "fresh"
    stacked: bool = True

    def __post_init__(self) -> None:
        for name in ("temperature", "beta", "scale"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name} is {value}; expected a number > 0")
        if self.ce < 0 or self.kd < 0:
            raise ValueError(f"the weights ce and kd are {self.ce} and {self.kd}; expected numbers >= 0")
        if not 0 <= self.alpha <= 1:
            raise ValueError(f"alpha is {self.alpha}; expected a number from 0 to 1")


class DHO(Recognition):
    """L = ce * CE(a_l, y) + kd * (KD(k_l, t_l) + KD(k_u, t_u)), KD = T^2 KL(teacher || student).

    Batches may hold beside what `Recognition` reads ``unlabelled`` [U, C, H, W], pictures of the labelled ones' shape.
    """

    name = "dho"
    Config = DHOConfig
    unlabelled_beside = True
    uncached = "a cache keeps nothing of the unlabelled pictures"

    def __init__(self, student: nn.Module, teacher: nn.Module | FrozenTeacher | None = None, **hyper: Any) -> None:
        super().__init__(student, teacher)
        self.config = DHOConfig(**hyper)
        self.weights = {"ce": self.config.ce, "kd": self.config.kd}

    def prepare(self, batch: Batch) -> None:
        """Put the second head beside the student's own. Raises `BadInput` where classes differ or pictures cannot be stacked."""
        _, classes = self.check_classes(batch)
        shapes = [tuple(batch[key].shape[1:]) for key in ("pixel_values", "unlabelled") if key in batch]
        if self.config.stacked and len(set(shapes)) > 1:
            raise BadInput(
                f"labelled pictures {list(shapes[0])} and unlabelled {list(shapes[1])} differ in shape: set `data.size`, or "
                "`stacked: false`"
            )
        if self.config.heads == "single" or isinstance(self.student.head, DualHead):
            return
        own: Any = self.student.head
        head = nn.Linear(self.student.width, classes, device=own.weight.device, dtype=own.weight.dtype)
        if self.config.init == "copy":
            head.weight.data.copy_(own.weight.flatten(1))
            head.bias.data.copy_(torch.zeros_like(head.bias) if own.bias is None else own.bias)
        config = self.config
        dual = DualHead(own, head, alpha=config.alpha, beta=config.beta, scale=config.scale)
        self.student.replace_head(dual.to(own.weight.device))

    def forward(self, batch: Batch) -> Losses:
        labelled, labels, unlabelled = batch["pixel_values"], batch["labels"], batch.get("unlabelled")
        groups = [labelled] if unlabelled is None or not self.needs("kd") else [labelled, unlabelled]
        a, k = self.both(groups)
        ce = losses.cross_entropy(a[0], labels)
        if not self.needs("kd"):
            return self.weigh(ce=ce)
        kd = [
            losses.kd(ours, self.taught(pictures).logits, temperature=self.config.temperature)
            for ours, pictures in zip(k, groups, strict=True)
        ]
        return self.weigh(ce=ce, kd=torch.stack(kd).sum())

    def both(self, groups: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """The logits of both heads, [B, C] for each group of pictures [B, C, H, W]; one and the same with a single head."""
        if self.config.stacked and len(groups) > 1:
            sizes = [len(group) for group in groups]
            a, k = self.both([torch.cat(groups)])
            return list(a[0].split(sizes)), list(k[0].split(sizes))
        seen = [self.student.read(group) for group in groups]
        head = self.student.head
        pairs = [head.both(one.pooled) if isinstance(head, DualHead) else (one.logits, one.logits) for one in seen]
        return [a for a, _ in pairs], [k for _, k in pairs]

    def calibrate(self, batches: Iterable[Batch]) -> None:
        """Choose (alpha, beta) of the mixture by accuracy on validation data, and keep them in the student."""
        head = self.student.head
        if not (isinstance(head, DualHead) and self.config.search):
            return
        device = head.alpha.device
        right = torch.zeros(len(BETAS), len(ALPHAS), dtype=torch.int64, device=device)
        labelled = torch.zeros((), dtype=torch.int64, device=device)
        for batch in batches:
            known = batch["labels"] != IGNORE
            a, k = head.both(self.student.read(batch["pixel_values"]).pooled)
            right += count_right(a[known], k[known], batch["labels"][known])
            labelled += known.sum()
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            for count in (right, labelled):
                torch.distributed.all_reduce(count)  # each process may have seen a part
        if labelled:
            _, alpha, beta = best_mixture(right)
            head.mix(alpha, beta)

    def deployable(self) -> Classifier:
        """The student with both heads, whose logits are the log-probabilities of their mixture."""
        if self.config.heads == "single":
            return self.student
        view = self.student.around(self.student.model)
        view.spec = {}
        if "source" in self.student.spec:
            options = {"student": self.student.spec, "head": self.student.anatomy().head, "scale": self.config.scale}
            view.spec = {"source": "python", "name": f"{__name__}:{with_two_heads.__name__}", "options": options}
        return view

    @torch.enable_grad()
    def conflict(self, batch: Batch) -> float:
        """The cosine between the gradients of the two losses on the backbone, the part that both heads share; the paper's diagnostic.

        ``train.diagnose_every`` logs the cosine over the whole student: its sign is the same with two heads, since a head's own weights are
        moved by one loss only.
        """
        terms = self(batch)
        heads = {id(parameter) for parameter in self.student.head.parameters()}
        backbone = [p for p in self.student.parameters() if p.requires_grad and id(p) not in heads]
        gradients = [torch.autograd.grad(term, backbone, retain_graph=True) for term in (terms["ce"], terms["kd"])]
        ce, kd = (torch.cat([part.flatten().float() for part in parts]) for parts in gradients)
        return F.cosine_similarity(ce, kd, dim=0).item()


def with_two_heads(student: Mapping[str, Any], head: str, scale: float | None) -> Classifier:
    """What `DHO.deployable` gives, built again from the spec of its student: how a saved one is loaded. head: the submodule's name."""
    view = Classifier.of(load_module(student))
    parent, _, name = head.rpartition(".")
    own: Any = view.model.get_submodule(head)
    classes, width = own.weight.shape[:2]
    setattr(view.model.get_submodule(parent), name, DualHead(own, nn.Linear(width, classes), scale=scale))
    return view


def count_right(ce_logits: Tensor, kd_logits: Tensor, labels: Tensor) -> Tensor:
    """How many of [B, C] every mixture gets right: [betas, alphas] over the authors' grid."""
    alphas = torch.tensor(ALPHAS, device=ce_logits.device)[:, None, None]
    mixed = (log_mixture(ce_logits, kd_logits, alphas, alphas.new_tensor(beta)) for beta in BETAS)
    return torch.stack([(one.argmax(-1) == labels).sum(1) for one in mixed])


def best_mixture(right: Tensor) -> tuple[float, float, float]:
    """(best, alpha, beta) of a score for every mixture, [betas, alphas]: beta in the outer loop, alpha in the inner one, the first that is
    strictly better counts. Starts from (0, 0, 1)."""
    best = (0.0, 0.0, 1.0)
    for beta, row in zip(BETAS, right.tolist(), strict=True):
        for alpha, score in zip(ALPHAS, row, strict=True):
            if score > best[0]:
                best = (score, alpha, beta)
    return best
