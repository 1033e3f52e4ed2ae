"""TRG: a graph over patch tokens of the whole batch moves from the teacher into the student.

Knowledge Distillation via Token-level Relationship Graph, 2023, arXiv 2306.12442. Both networks' last maps are cut into the same patches;
patches drawn across the batch are nodes of a nearest-neighbour graph. The student's graph is matched to the teacher's locally (its edges),
globally (each patch is told from all others, InfoNCE) and within each picture (which patch looks at which), beside labels and logits.

Differences: there is no public code, and the equations are known from the abstract and readers' reports alone. These state no weight,
number of neighbours or tokens, bandwidth, projection or schedule: each is an option here, and its default a choice of ours. Sums over
tokens are means, so that weights do not depend on the batch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from limbeck import losses
from limbeck.batch import Batch
from limbeck.errors import BadInput
from limbeck.losses.contrastive import info_nce
from limbeck.losses.graph import check_bandwidth, inner_graph, local_graph
from limbeck.methods.base import Losses
from limbeck.methods.recognition.base import Recognition
from limbeck.teachers.frozen import FrozenTeacher

MOST_PREFIX_TOKENS = 8
"""Class, distillation and register tokens before the patches; more means that these are no square grid."""


@dataclass(frozen=True)
class TRGConfig:
    """ce, kd, inner, local, contrast: weights of the terms (contrast: the paper's global one). temperature: of kd, > 0.

    tokens: patches drawn from each picture, >= 1 (all of them where there are fewer). k: neighbours of a patch, >= 1.
    sigma: bandwidth of the graph, > 0 in squared units of the features, or a statistic of the squared distances. edge_temperature: of
    the softmax over edges, > 0. divergence: reverse = KL(student || teacher).
    grid: patches a side; None: the smaller of both networks' grids. projection: width that both sides' tokens are projected to for
    contrast; None: the student's alone, to the teacher's.
    tau_start, tau_end: temperature of contrast at the first and the last step, tau_start >= tau_end > 0; schedule: between them.
    """

    ce: float = 1.0
    kd: float = 1.0
    inner: float = 1.0
    local: float = 1.0
    contrast: float = 1.0
    temperature: float = 4.0
    tokens: int = 8
    k: int = 8
    sigma: float | Literal["median", "mean"] = "median"
    edge_temperature: float = 1.0
    divergence: Literal["forward", "reverse"] = "reverse"
    grid: int | None = None
    projection: int | None = None
    tau_start: float = 0.5
    tau_end: float = 0.07
    schedule: Literal["cosine", "linear"] = "cosine"

    def __post_init__(self) -> None:
        for name in ("tokens", "k", "grid", "projection"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise BadInput(f"{name} must be at least 1, got {value}")
        for name in ("temperature", "edge_temperature"):
            if not getattr(self, name) > 0:
                raise BadInput(f"{name} must be positive, got {getattr(self, name)}")
        check_bandwidth(self.sigma)
        if not self.tau_start >= self.tau_end > 0:
            raise BadInput(f"tau falls from tau_start to tau_end > 0, got {self.tau_start} and {self.tau_end}")


class TRG(Recognition):
    """L = ce * L_CE + kd * T^2 KL + inner * L_inner + local * L_local + contrast * L_global."""

    name = "trg"
    Config = TRGConfig

    def __init__(self, student: nn.Module, teacher: nn.Module | FrozenTeacher, **hyper: Any) -> None:
        super().__init__(student, teacher)
        self.config = config = TRGConfig(**hyper)
        self.weights = {name: getattr(config, name) for name in ("ce", "kd", "inner", "local", "contrast")}
        self.grid: tuple[int, ...] = (0, 0)
        self.project_student: nn.Module = nn.Identity()
        self.project_teacher: nn.Module = nn.Identity()

    def prepare(self, batch: Batch) -> None:
        """Find the common grid, and make the projections of the contrast."""
        self.check_classes(batch)
        pictures = batch["pixel_values"][:2]
        student, teacher = patch_map(self.student.read(pictures).features), patch_map(self.taught(pictures).features)
        side = self.config.grid
        self.grid = (side, side) if side else tuple(map(min, student.shape[2:], teacher.shape[2:]))
        for owner, patches in (("student", student), ("teacher", teacher)):
            if patches.shape[2] < self.grid[0] or patches.shape[3] < self.grid[1]:
                raise BadInput(
                    f"grid is {side}, and the {owner}'s last map is {patches.shape[2]} x {patches.shape[3]}; give a grid no larger than "
                    "that, or none"
                )
        if not self.needs("contrast"):
            return
        width, like = self.config.projection or teacher.shape[1], next(self.student.parameters())
        self.project_student = nn.Linear(student.shape[1], width).to(like)
        if self.config.projection:
            self.project_teacher = nn.Linear(teacher.shape[1], width).to(like)

    def forward(self, batch: Batch) -> Losses:
        config, pictures = self.config, batch["pixel_values"]
        student, teacher = self.student.read(pictures), self.taught(pictures)
        terms = {
            "ce": losses.cross_entropy(student.logits, batch["labels"]),
            "kd": losses.kd(student.logits, teacher.logits, temperature=config.temperature),
        }
        student_tokens, teacher_tokens = (tokens_on(self.grid, seen.features) for seen in (student, teacher))  # [B, P, D]
        if self.needs("inner"):
            terms["inner"] = inner_graph(student_tokens, teacher_tokens)
        positions = draw_positions(student_tokens, config.tokens)
        nodes, teacher_nodes = take(student_tokens, positions), take(teacher_tokens, positions)  # [B M, D]
        if self.needs("local"):
            terms["local"] = local_graph(
                nodes,
                teacher_nodes,
                k=config.k,
                sigma=config.sigma,
                temperature=config.edge_temperature,
                kind=config.divergence,
            )
        if self.needs("contrast"):
            projected = self.project_student(nodes), self.project_teacher(teacher_nodes.to(nodes.dtype))
            terms["contrast"] = info_nce(*projected, temperature=self.tau())
        return self.weigh(**terms)

    def tau(self) -> float:
        """The temperature of the contrast at this step; where the number of steps is not known, the last."""
        if self.total_steps is None:
            return self.config.tau_end
        progress = min(self.steps_done / max(self.total_steps - 1, 1), 1.0)
        return falling(self.config.tau_start, self.config.tau_end, progress, self.config.schedule)


def falling(start: float, end: float, progress: float, schedule: Literal["cosine", "linear"]) -> float:
    """From ``start`` at progress 0 to ``end`` at progress 1."""
    left = (1 + math.cos(math.pi * progress)) / 2 if schedule == "cosine" else 1 - progress
    return start * left + end * (1 - left)


def patch_map(features: Tensor) -> Tensor:
    """The last map, [B, D, H, W], of a CNN's [B, D, H, W] or a ViT's [B, N, D], whose class token and registers are left out.

    Raises `BadInput` where there are no patches, or these are no square grid.
    """
    if features.dim() == 4:
        return features
    if features.dim() != 3:
        raise BadInput(f"features {list(features.shape)} have no patches; 'trg' needs networks with a last map or with tokens")
    side = math.isqrt(features.shape[1])
    prefix = features.shape[1] - side**2
    if prefix > MOST_PREFIX_TOKENS:
        raise BadInput(
            f"features {list(features.shape)}: {features.shape[1]} tokens are no square grid, with or without a class token"
        )
    return features[:, prefix:].mT.unflatten(2, (side, side))


def tokens_on(grid: tuple[int, ...], features: Tensor) -> Tensor:
    """The patches of a common grid [B, P, D]: each the mean over its part of the last map."""
    patches = patch_map(features)
    pooled = patches if patches.shape[2:] == grid else F.adaptive_avg_pool2d(patches, (grid[0], grid[1]))
    return pooled.flatten(2).mT


def draw_positions(tokens: Tensor, count: int, *, generator: torch.Generator | None = None) -> Tensor:
    """``count`` different patches of each picture in tokens [B, P, D], uniformly: int64 [B, M]; all of them where there are no more."""
    return torch.rand(tokens.shape[:2], device=tokens.device, generator=generator).argsort(1)[:, :count]


def take(tokens: Tensor, positions: Tensor) -> Tensor:
    """The tokens [B, P, D] at positions [B, M], in one list [B M, D]."""
    return tokens.gather(1, positions.unsqueeze(-1).expand(-1, -1, tokens.shape[-1])).flatten(0, 1)
