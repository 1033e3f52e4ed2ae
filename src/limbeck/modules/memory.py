"""Memories of a whole training set's embeddings, for contrast with more negatives than a batch holds."""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from limbeck.errors import BadInput
from limbeck.losses._common import upcast
from limbeck.losses.contrastive import crd
from limbeck.losses.logits import IGNORE

Positive = Literal["exact", "relax"]


class ContrastiveMemory(nn.Module):
    """The last embeddings of every training sample, by student and by teacher (CRD, arXiv 1910.10699, with its public code).

    n_data: samples of the training set; an index names one of them. width: of an embedding. momentum: the share of a row that
    an `update` keeps. labels: int [n_data], the class of every sample, from which negatives are chosen; None makes every sample a
    class of its own, -100 that one.
    Banks and normalisers are buffers, and resumed with the method: 2 n_data x width numbers. Raises `BadInput` where labels do not
    fit or hold one class only.
    """

    student_bank: Tensor
    teacher_bank: Tensor
    log_z: Tensor
    classes: Tensor
    members: Tensor
    rank: Tensor
    start: Tensor
    size: Tensor

    def __init__(self, n_data: int, width: int = 128, *, labels: Tensor | None = None, momentum: float = 0.5) -> None:
        super().__init__()
        if not 0 <= momentum <= 1:
            raise BadInput(f"momentum is {momentum}; expected a number from 0 to 1")
        if labels is not None and labels.shape != (n_data,):
            raise BadInput(
                f"labels {list(labels.shape)} do not fit {n_data} samples; pass one label for each, in the data's order"
            )
        self.n_data, self.momentum = n_data, momentum
        bound = math.sqrt(3 / width)
        self.register_buffer("student_bank", torch.empty(n_data, width).uniform_(-bound, bound))
        self.register_buffer("teacher_bank", torch.empty(n_data, width).uniform_(-bound, bound))
        self.register_buffer("log_z", torch.full((2,), -math.inf))  # Z is 0 until the first batch

        classes = torch.arange(n_data)
        if labels is not None:
            classes = labels.where(labels != IGNORE, classes + labels.max() + 1).unique(return_inverse=True)[1]
        size = classes.bincount()
        if len(size) < 2:
            raise BadInput("all samples are of one class; negatives are drawn from other classes: leave the labels out")
        start = size.cumsum(0) - size
        members = classes.argsort(stable=True)
        self.register_buffer("classes", classes, persistent=False)  # [n_data]
        self.register_buffer("members", members, persistent=False)  # [n_data], class by class
        self.register_buffer("rank", torch.arange(n_data) - start[classes[members]], persistent=False)  # of each within its class
        self.register_buffer("start", start, persistent=False)  # [classes], of each class within ``members``
        self.register_buffer("size", size, persistent=False)  # [classes]

    def sample_negatives(self, index: Tensor, count: int) -> Tensor:
        """Samples of other classes, uniformly: index [B] -> [B, count].

        None comes twice where there are ``count`` of them. Where there are fewer, each comes equally often, give or take one: the
        mean of drawing with replacement, with less noise.
        """
        own, n = self.classes[index].unsqueeze(1), self.n_data
        # All samples stand in a random line; each row takes, from a random place on, the next ``count`` that are not of its class.
        line = torch.randperm(n, device=index.device)
        places = torch.empty_like(line).scatter_(0, line, torch.arange(n, device=line.device))
        others = n - self.size[own]
        first = torch.randint(2**62, own.shape, device=index.device)
        wanted = (first % others + torch.arange(count, device=index.device)) % others  # [B, count], numbered without own class
        # Class by class, how many others stand before each member: it comes before those others that have a larger number.
        before = (self.classes * n + places).sort().values - self.rank
        passed = torch.searchsorted(before, own * n + wanted, right=True) - self.start[own]
        return line[wanted + passed]

    def sample_positives(self, index: Tensor) -> Tensor:
        """A sample of the same class, perhaps the sample itself, uniformly: index [B] -> [B]."""
        own = self.classes[index]
        return self.members[self.start[own] + torch.randint(2**62, own.shape, device=index.device) % self.size[own]]

    def log_scores(
        self, student_embeddings: Tensor, teacher_embeddings: Tensor, contrast: Tensor, *, temperature: float
    ) -> tuple[Tensor, Tensor]:
        """log(exp(v . m / temperature) / Z) of each side's embeddings v with the *other* side's remembered rows m, for `losses.crd`.

        student_embeddings, teacher_embeddings: [B, width], of unit norm. contrast: int64 [B, 1 + K], positive first.
        Z = n_data * mean(exp(.)) over the first batch seen in training mode (of all processes), and that ever after.
        Returns two of [B, 1 + K]. Memory gets no gradient.
        """
        with torch.autocast(student_embeddings.device.type, enabled=False):
            student = similarities(student_embeddings, self.teacher_bank, contrast) / temperature
            teacher = similarities(teacher_embeddings, self.student_bank, contrast) / temperature
        with torch.no_grad():
            log_sums = torch.stack([scores.logsumexp((0, 1)) for scores in (student, teacher)])
            fresh = log_sums + math.log(self.n_data / contrast.numel())
            if self.training:
                every = gathered(fresh.unsqueeze(0))  # [processes, 2]
                fresh = every.logsumexp(0) - math.log(len(every))
            # A choice without a branch: nothing waits for the device, and restoring the buffers forgets the batch.
            log_z = torch.where(self.log_z.isinf(), fresh.to(self.log_z.dtype), self.log_z)
            if self.training:
                self.log_z.copy_(log_z)
        return student - log_z[0], teacher - log_z[1]

    @torch.no_grad()
    def update(self, index: Tensor, student_embeddings: Tensor, teacher_embeddings: Tensor) -> None:
        """Rows ``index`` become momentum * row + (1 - momentum) * embedding, L2-normalised; the others stay.

        Every process remembers what all of them saw, so that memories stay equal; each must bring equally many rows. Of an index that
        occurs twice, the first embedding counts, on every device alike.
        """
        index, student, teacher = (gathered(rows) for rows in (index, student_embeddings, teacher_embeddings))
        first = (index == index.unsqueeze(1)).int().argmax(1)
        for bank, embeddings in ((self.student_bank, student), (self.teacher_bank, teacher)):
            moved = embeddings[first].to(bank.dtype).lerp(bank[index], self.momentum)
            bank.index_copy_(0, index, F.normalize(moved, dim=1))


class CRDHead(nn.Module):
    """Contrastive representation distillation (Tian et al., arXiv 1910.10699): embeddings, memory and loss, both directions.

    student_dim, teacher_dim: widths of the features; one linear layer each brings them to ``width``, both trained. n_data, labels,
    momentum: as for `ContrastiveMemory`. negatives: K. mode: the positive is the sample itself ("exact") or any of its class
    ("relax"), as in the official code; negatives are of other classes in both.
    """

    def __init__(
        self,
        student_dim: int,
        teacher_dim: int,
        n_data: int,
        labels: Tensor | None = None,
        negatives: int = 16384,
        temperature: float = 0.07,
        momentum: float = 0.5,
        width: int = 128,
        mode: Positive = "exact",
    ) -> None:
        super().__init__()
        if negatives < 1:
            raise BadInput(f"negatives is {negatives}; expected at least 1")
        if not temperature > 0:
            raise BadInput(f"temperature is {temperature}; expected a number > 0")
        if mode not in ("exact", "relax"):
            raise BadInput(f"mode is {mode!r}; expected 'exact' or 'relax'")
        self.negatives, self.temperature, self.mode = negatives, temperature, mode
        self.student_embed = nn.Linear(student_dim, width)
        self.teacher_embed = nn.Linear(teacher_dim, width)
        self.memory = ContrastiveMemory(n_data, width, labels=labels, momentum=momentum)

    def forward(
        self, student_features: Tensor, teacher_features: Tensor, index: Tensor, contrast: Tensor | None = None
    ) -> Tensor:
        """The loss of a batch, a scalar; in training mode the batch is then remembered.

        student_features: [B, student_dim], teacher_features: [B, teacher_dim] (detached), any float dtype. index: int64 [B], which
        training samples these are. contrast: int64 [B, 1 + K], the rows compared, positive first; None draws them.
        """
        student = embed(self.student_embed, student_features)
        teacher = embed(self.teacher_embed, teacher_features.detach())
        log_scores = self.memory.log_scores(
            student, teacher, self._contrast(index) if contrast is None else contrast, temperature=self.temperature
        )
        by_student, by_teacher = (crd(side, n_data=self.memory.n_data) for side in log_scores)
        if self.training:
            self.memory.update(index, student, teacher)
        return by_student + by_teacher

    def _contrast(self, index: Tensor) -> Tensor:
        positives = index if self.mode == "exact" else self.memory.sample_positives(index)
        return torch.cat([positives.unsqueeze(1), self.memory.sample_negatives(index, self.negatives)], dim=1)


def embed(layer: nn.Linear, features: Tensor) -> Tensor:
    """Embeddings of unit norm, at least float32: [B, D] -> [B, width]."""
    if features.dim() != 2 or features.shape[1] != layer.in_features:
        raise BadInput(
            f"features are {list(features.shape)}; expected [B, {layer.in_features}]: pool them, or set the head's width"
        )
    return F.normalize(upcast(layer(features.to(layer.weight.dtype))), dim=1)


def similarities(embeddings: Tensor, bank: Tensor, contrast: Tensor) -> Tensor:
    """Dot products of each embedding [B, W] with its rows contrast [B, 1 + K] of a bank [n_data, W]: [B, 1 + K]."""
    batch, width = embeddings.shape
    if len(bank) * (batch + width) > contrast.numel() * width:  # which way takes less memory
        return torch.einsum("bw,bkw->bk", embeddings, bank[contrast].to(embeddings.dtype))
    # A copy, since the bank is written before the backward pass reads it.
    return (embeddings @ bank.to(embeddings.dtype, copy=True).T).gather(1, contrast)


def gathered(rows: Tensor) -> Tensor:
    """The rows of all processes, in their order; without gradient."""
    if not (dist.is_available() and dist.is_initialized()):
        return rows
    parts = [torch.empty_like(rows) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, rows.contiguous())
    return torch.cat(parts)
