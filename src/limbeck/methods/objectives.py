"""The terms that `compose` adds up: dataclasses over the functions of ``losses/`` and the trainable parts of ``modules/``.

Each names its source in its docstring. Where it reads features, ``student`` and ``teacher`` name submodules, or one of three words that a
dry forward resolves: "@features" (the last map or tokens), "@pooled" (what the head reads), "@stages" (the last block at each
resolution, a stem's too; as many of the deepest as both models have). What they give is read as [B, C, H, W], also of a model that keeps
maps as [B, H, W, C]. Weights default to those of the papers' or the comparisons' CIFAR-100 experiments.
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn

from limbeck import losses, taps
from limbeck.errors import BadInput
from limbeck.losses import classification, maps, relations
from limbeck.losses.top_k import TopK, top_k_divergence
from limbeck.models.classifier import Anatomy, Classifier, in_dtype_of, logits_of
from limbeck.modules.memory import CRDHead
from limbeck.modules.projectors import ConvReg, as_map, infer_adapter
from limbeck.modules.regressors import Generation, OFDConnector, ReviewFusion, SimKDProjector, VIDRegressor
from limbeck.naming import nearest

WORDS = ("@features", "@pooled", "@stages")

Layers = str | tuple[str, ...]


class Tap(NamedTuple):
    """Where a term reads a model: a submodule's name, and which side of it. channels_last: its maps are [B, H, W, C], and are turned."""

    name: str
    where: taps.Where = "output"
    channels_last: bool = False


Targets = Tap | tuple[Tap, ...] | None


class Given(NamedTuple):
    """What a term is computed from.

    student, teacher: logits, a feature, or a tuple of features where the term names several layers; teacher is None where it reads none.
    labels: [B], or None. part: what `Objective.part` made. batch: as the engine gives it. logits: the student's, [B, C]. epoch: epochs
    trained so far; inf where their length is not known, so that what warms up is through.
    """

    student: Any
    teacher: Any
    labels: Any
    part: nn.Module | None
    batch: Mapping[str, Any]
    logits: Tensor
    epoch: float


class Sides(NamedTuple):
    """What a term's trained part may need to know.

    student, teacher: the models; teacher is None where a cache stands for it. student_taps, teacher_taps: where the term reads them.
    pixel_values, logits: of the dry forward; logits are the student's. samples, labels: number and labels [n] of the training
    data, None where unknown.
    """

    student: nn.Module
    teacher: nn.Module | None
    student_taps: tuple[Tap, ...]
    teacher_taps: tuple[Tap, ...]
    pixel_values: Tensor
    logits: Tensor
    samples: int | None
    labels: Tensor | None


class Objective:
    """One term of the loss, on logits. A subclass is a dataclass; one that sets ``name`` can be named in a recipe.

    uncached: why a teacher's kept answers will not do, where they will not. weight: factor of the term in the total, finite and >= 0.
    """

    known: ClassVar[dict[str, type[Objective]]] = {}
    name: ClassVar[str]
    needs_teacher: ClassVar[bool] = True
    needs_labels: ClassVar[bool] = False
    uncached: ClassVar[str] = ""

    weight: float

    def __init_subclass__(cls) -> None:
        if "name" in vars(cls):
            Objective.known[cls.name] = cls

    def __post_init__(self) -> None:
        if not (math.isfinite(self.weight) and self.weight >= 0):
            raise BadInput(f"weight is {self.weight}; expected a number >= 0")
        for key in ("temperature", "tau"):
            value = getattr(self, key, 1.0)
            if not (math.isfinite(value) and value > 0):
                raise BadInput(f"{key} is {value}; expected a number > 0")
        if getattr(self, "warmup_epochs", 0) < 0:
            raise BadInput(f"warmup_epochs is {self.warmup_epochs}; expected a number >= 0")  # type: ignore[attr-defined]

    @property
    def reads_unlabelled(self) -> bool:
        """Whether pictures that stand beside the labelled ones count in it."""
        return self.needs_teacher and not self.needs_labels

    @property
    def reads_mixtures(self) -> bool:
        """Whether it knows what to make of a picture that is mixed of two."""
        return not self.needs_labels

    def targets(self, side: Literal["student", "teacher"], model: nn.Module, anatomy: Callable[[], Anatomy]) -> Targets:
        """What it reads of a model: None for the logits, a tap, or several. anatomy: finds the model's usual points."""
        layers: Layers | None = getattr(self, side, None)
        if layers is None:
            return None
        if isinstance(layers, str):
            return resolved(layers, model, anatomy)
        return tuple(_one(resolved(layer, model, anatomy)) for layer in layers)

    def check(self, student: Any, teacher: Any, labels: Tensor) -> None:
        """Look at one batch before training; raises `BadInput` where its tensors do not fit."""

    def part(self, student: Any, teacher: Any, sides: Sides) -> nn.Module | None:
        """What is trained beside the student for this term, and dropped afterwards: an adapter, a memory, a peer."""
        return None

    def compute(self, given: Given) -> Tensor:
        """The raw term, a scalar. A term that needs no more than logits or adapted features defines `loss` instead."""
        return self.loss(given.student if given.part is None else given.part(given.student), given.teacher, given.labels)

    def loss(self, student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
        """The raw term, a scalar. teacher is None unless ``needs_teacher``; labels may be None unless ``needs_labels``."""
        raise NotImplementedError(f"{type(self).__name__} must define loss(student, teacher, labels)")

    def shipped(self, student: nn.Module, part: nn.Module | None) -> nn.Module:
        """The student as it is deployed, where this term changes that."""
        return student


# -- labels and logits -----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class CE(Objective):
    """Cross-entropy with the labels; a label of -100 is ignored. label_smoothing: in [0, 1].

    Of a mixture of two pictures: with both labels, by their shares (mixup, arXiv 1710.09412).
    """

    name = "ce"
    needs_teacher = False
    needs_labels = True

    weight: float = 1.0
    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.label_smoothing <= 1:
            raise BadInput(f"label_smoothing is {self.label_smoothing}; expected a number from 0 to 1")

    def check(self, student: Tensor, teacher: Tensor, labels: Tensor) -> None:
        check_labels(student, labels)

    @property
    def reads_mixtures(self) -> bool:
        return True

    def compute(self, given: Given) -> Tensor:
        if "mixed_share" not in given.batch:
            return losses.cross_entropy(given.student, given.labels, label_smoothing=self.label_smoothing)
        own, other = (
            losses.cross_entropy(given.student, labels, label_smoothing=self.label_smoothing, reduction="none")
            for labels in (given.labels, given.batch["mixed_labels"])
        )
        return own.lerp(other, given.batch["mixed_share"].to(own.dtype)).sum() / (given.labels != -100).sum().clamp_min(1)


class LogitObjective(Objective):
    """A term that compares classes one by one."""

    def check(self, student: Tensor, teacher: Tensor, labels: Tensor) -> None:
        if student.shape[-1] != teacher.shape[-1]:
            raise BadInput(
                f"{self.name!r} compares classes one by one: the student has {student.shape[-1]}, the teacher {teacher.shape[-1]}; "
                "give both the same classes, or distil features"
            )
        if student.shape != teacher.shape:
            raise BadInput(f"student logits {list(student.shape)} and teacher logits {list(teacher.shape)} differ in shape")


@dataclass(frozen=True)
class KD(LogitObjective):
    """Divergence from the teacher's softened logits, times temperature^2 (Hinton et al., arXiv 1503.02531).

    Unlabelled samples count. kind, beta: see `limbeck.losses.kl_divergence`; the default is Hinton's.
    """

    name = "kd"

    temperature: float = 4.0
    weight: float = 1.0
    kind: Literal["forward", "reverse", "jeffreys", "jsd"] = "forward"
    beta: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.beta <= 1:
            raise BadInput(f"beta is {self.beta}; expected a number from 0 to 1")

    def loss(self, student: Tensor, teacher: Tensor | TopK, labels: Tensor) -> Tensor:
        if isinstance(teacher, TopK):
            return top_k_divergence(student, teacher, kind=self.kind, beta=self.beta)
        return losses.kl_divergence(student, teacher, temperature=self.temperature, kind=self.kind, beta=self.beta)


@dataclass(frozen=True)
class StandardisedKD(LogitObjective):
    """KD between logits standardised over the classes, so that only their relations count (logit standardisation, arXiv 2403.01427)."""

    name = "logit-std"

    temperature: float = 2.0
    weight: float = 9.0

    def loss(self, student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
        return classification.logit_standardised_kd(student, teacher, temperature=self.temperature)


@dataclass(frozen=True)
class DKD(LogitObjective):
    """KD in two terms of their own weights: the target class against the others, and among the others (DKD, arXiv 2203.08679).

    warmup_epochs: over which the term grows linearly to its weight. Unlabelled samples do not count.
    """

    name = "dkd"
    needs_labels = True

    alpha: float = 1.0
    beta: float = 8.0
    temperature: float = 4.0
    weight: float = 1.0
    warmup_epochs: float = 20.0

    def check(self, student: Tensor, teacher: Tensor, labels: Tensor) -> None:
        super().check(student, teacher, labels)
        check_labels(student, labels)

    def compute(self, given: Given) -> Tensor:
        labels = given.labels
        known = None if labels.min() >= 0 else labels >= 0
        term = classification.dkd(
            given.student, given.teacher, labels.clamp_min(0), alpha=self.alpha, beta=self.beta, temperature=self.temperature,
            mask=known,
        )  # fmt: skip
        return warmed_up(term, given.epoch, self.warmup_epochs)


@dataclass(frozen=True)
class DIST(LogitObjective):
    """One minus the correlation of probabilities, within a sample (beta) and within a class over the batch (gamma) (DIST, arXiv
    2205.10536)."""

    name = "dist"

    beta: float = 1.0
    gamma: float = 1.0
    tau: float = 1.0
    weight: float = 2.0

    def loss(self, student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
        return classification.dist(student, teacher, beta=self.beta, gamma=self.gamma, tau=self.tau)


@dataclass(frozen=True)
class TAKD(LogitObjective):
    """KD as the teacher-assistant authors released it: averaged over the classes too, C times smaller than ``kd`` (arXiv 1902.03393).

    The assistant itself is a chain of recipes: ``teacher: {source: recipe, name: assistant.yaml}``, whose teacher is the large one.
    """

    name = "takd"

    temperature: float = 4.0
    weight: float = 1.0

    def loss(self, student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
        return classification.takd(student, teacher, temperature=self.temperature)


@dataclass(frozen=True)
class DML(Objective):
    """Deep mutual learning: a peer of the student's architecture, drawn anew, learns beside it; each learns from the other's predictions
    and the peer from the labels too (arXiv 1706.00384). No teacher. The peer is dropped."""

    name = "dml"
    needs_teacher = False
    needs_labels = True

    weight: float = 1.0

    def check(self, student: Tensor, teacher: Any, labels: Tensor) -> None:
        check_labels(student, labels)

    def part(self, student: Tensor, teacher: Any, sides: Sides) -> nn.Module:
        return drawn_anew(sides.student)

    def compute(self, given: Given) -> Tensor:
        assert given.part is not None
        peer = logits_of(given.part(given.batch["pixel_values"]))
        taught = classification.dml(given.student, peer)
        return taught + losses.cross_entropy(peer, given.labels) + classification.dml(peer, given.student)


@dataclass(frozen=True)
class ONE(Objective):
    """On-the-fly ensemble: branches that copy the student's last stage and head, drawn anew, and a gate make an ensemble, which teaches
    every branch (arXiv 1806.04606). No teacher; only the student's own branch is kept.

    branches: of the ensemble, the student's included. ramp_epochs: over which the ensemble's lesson grows to its full weight. stage: the
    submodule that is copied; null: the last of the usual points.
    Raises `BadInput` where the student is not: last stage, average pooling, linear head.
    """

    name = "one"
    needs_teacher = False
    needs_labels = True

    branches: int = 3
    temperature: float = 3.0
    weight: float = 1.0
    ramp_epochs: float = 80.0
    stage: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.branches < 2:
            raise BadInput(f"branches is {self.branches}; expected at least 2")

    def targets(self, side: Literal["student", "teacher"], model: nn.Module, anatomy: Callable[[], Anatomy]) -> Targets:
        if side == "teacher":
            return None
        if self.stage is None and not anatomy().stages:
            raise BadInput(f"'one' copies a stage, and {type(model).__name__} has none to find: name it (stage)")
        return Tap(self.stage or anatomy().stages[-1], "input")

    def part(self, student: Tensor, teacher: Any, sides: Sides) -> nn.Module:
        bare, name = unwrapped(sides.student), sides.student_taps[0].name
        stage = bare.get_submodule(name)
        head = head_on_mean(sides.student, stage(student), sides.pixel_values)
        if head is None:
            raise BadInput(
                f"'one' branches {type(bare).__name__} at {name!r}, and what follows is more than average pooling and a linear head: "
                "name a later `stage`"
            )
        return Branches(stage, head, student, self.branches)

    def compute(self, given: Given) -> Tensor:
        assert given.part is not None
        others, gate = given.part(given.student)
        logits = torch.stack([given.logits, *others], dim=1)  # [B, M, C]
        together = classification.ensemble(logits, gate)
        hard = summed(losses.cross_entropy(z, given.labels) for z in (together, *others))
        soft = classification.one_kd(logits, together, temperature=self.temperature)
        return hard + classification.ramp_up(given.epoch, self.ramp_epochs) * soft


# -- features --------------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class FeatureObjective(Objective):
    """A term on features: the outputs of the submodules ``student`` and ``teacher``, compared through an inferred adapter."""

    student: str
    teacher: str
    weight: float = 1.0

    def part(self, student: Tensor, teacher: Tensor, sides: Sides) -> nn.Module | None:
        return infer_adapter(student.shape, teacher.shape)


@dataclass(frozen=True)
class Hint(FeatureObjective):
    """Mean squared error between features (FitNets, arXiv 1412.6550).

    regressor: "inferred" from the two shapes, linear; "fitnet": convolution, BatchNorm, ReLU, as commonly released (weight 100 there).
    """

    name = "hint"

    student: str = "@features"
    teacher: str = "@features"
    regressor: Literal["inferred", "fitnet"] = "inferred"

    def part(self, student: Tensor, teacher: Tensor, sides: Sides) -> nn.Module | None:
        return ConvReg(student.shape, teacher.shape) if self.regressor == "fitnet" else super().part(student, teacher, sides)

    def loss(self, student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
        return losses.hint(student, teacher)


@dataclass(frozen=True)
class Cosine(FeatureObjective):
    """One minus the cosine between features, along their channels."""

    name = "cosine"

    student: str = "@features"
    teacher: str = "@features"

    def loss(self, student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
        return losses.cosine(student, teacher)


@dataclass(frozen=True)
class CWD(FeatureObjective):
    """KL between each channel's softmax over the positions, or each position's over the channels (CWD, arXiv 2011.13256)."""

    name = "cwd"

    student: str = "@features"
    teacher: str = "@features"
    weight: float = 50.0
    temperature: float = 4.0
    over: Literal["channels", "spatial"] = "channels"

    def loss(self, student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
        return maps.cwd(as_map(student), as_map(teacher), temperature=self.temperature, over=self.over)


@dataclass(frozen=True)
class MGD(Objective):
    """The teacher's map restored from a masked one of the student (MGD, arXiv 2205.01529).

    task: what is masked and how much, and alpha, as the authors' code has it: channels for classification, pixels for detection and
    segmentation. Raises `BadInput` where the maps differ in size.
    """

    name = "mgd"
    tasks: ClassVar[dict[str, tuple[Literal["channel", "pixel"], float, float]]] = {
        "classification": ("channel", 0.15, 7e-5),
        "detection": ("pixel", 0.65, 2e-5),
        "segmentation": ("pixel", 0.75, 2e-5),
    }

    student: str = "@features"
    teacher: str = "@features"
    weight: float = 1.0
    task: Literal["classification", "detection", "segmentation"] = "classification"

    def part(self, student: Tensor, teacher: Tensor, sides: Sides) -> nn.Module:
        mask, drop, _ = self.tasks[self.task]
        return Generation(as_map(student).shape, as_map(teacher).shape, mask=mask, drop=drop)

    def compute(self, given: Given) -> Tensor:
        assert given.part is not None
        return maps.masked_generation(given.part(as_map(given.student)), as_map(given.teacher), alpha=self.tasks[self.task][2])


@dataclass(frozen=True)
class SimKD(Objective):
    """The student's last map is projected to the teacher's, and the teacher's own classifier reads it (SimKD, arXiv 2203.14001).

    The shipped student is trunk, projector and the teacher's head. The paper trains with this term alone. Raises `BadInput` where the
    head is not a linear layer on the mean of the map (a class token, a hidden layer): ``teacher: "@pooled"`` is what such a head reads.
    """

    name = "simkd"
    uncached = "ships the teacher's classifier"

    student: str = "@features"
    teacher: str = "@features"
    weight: float = 1.0
    factor: int = 2

    def targets(self, side: Literal["student", "teacher"], model: nn.Module, anatomy: Callable[[], Anatomy]) -> Targets:
        found = super().targets(side, model, anatomy)
        if side == "student" and isinstance(found, Tap) and found.where == "input":
            raise BadInput(
                "'simkd' ships the student up to the layer that it reads: name one by its output, not '@pooled' (student)"
            )
        return found

    def part(self, student: Tensor, teacher: Tensor, sides: Sides) -> nn.Module:
        assert sides.teacher is not None
        (place, _, turned), (place_of, *_) = sides.student_taps[0], sides.teacher_taps[0]
        head = head_on_mean(sides.teacher, teacher, sides.pixel_values)
        if head is None:
            raise BadInput(
                f"'simkd' ships the teacher's head behind the mean of {place_of!r}, and {type(unwrapped(sides.teacher)).__name__} has no "
                "linear head that reads this mean: name what it reads (teacher: '@pooled')"
            )
        projector = SimKDProjector(as_map(student).shape, as_map(teacher).shape, factor=self.factor)
        return Reheaded(place, projector, copy.deepcopy(head), channels_last=turned)

    def compute(self, given: Given) -> Tensor:
        part: Any = given.part
        student, teacher = maps.pool_to_smaller(part.projector(as_map(given.student)), as_map(given.teacher))
        return losses.hint(student, teacher)

    def shipped(self, student: nn.Module, part: nn.Module | None) -> nn.Module:
        assert isinstance(part, Reheaded)
        model = Spliced(unwrapped(student), part)
        if not isinstance(student, Classifier):
            return model
        view = student.around(model)
        view.spec = {}  # no library builds it
        return view


@dataclass(frozen=True)
class PooledObjective(Objective):
    """A term on relations between the batch's samples: widths may differ, and nothing is adapted."""

    student: str = "@pooled"
    teacher: str = "@pooled"
    weight: float = 1.0


@dataclass(frozen=True)
class RKD(PooledObjective):
    """Distances between samples and angles in triples of them (RKD, arXiv 1904.05068)."""

    name = "rkd"

    distance: float = 25.0
    angle: float = 50.0

    def loss(self, student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
        return relations.rkd(student, teacher, distance_weight=self.distance, angle_weight=self.angle)


@dataclass(frozen=True)
class SP(PooledObjective):
    """Similarities of the samples' last maps, row by row (SP, arXiv 1907.09682)."""

    name = "sp"

    student: str = "@features"
    teacher: str = "@features"
    weight: float = 3000.0

    def loss(self, student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
        return relations.sp(student, teacher)


@dataclass(frozen=True)
class PKT(PooledObjective):
    """KL between the probabilities that samples are neighbours (PKT, arXiv 1803.10837).

    weight: the 30,000 of the usual comparison, where the mean is over pairs, at its batch of 64.
    """

    name = "pkt"

    weight: float = 470.0

    def loss(self, student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
        return relations.pkt(student, teacher)


@dataclass(frozen=True)
class CC(PooledObjective):
    """Correlations between samples under a kernel (correlation congruence, arXiv 1904.01802)."""

    name = "cc"

    weight: float = 0.02
    kernel: relations.Kernel = "gaussian"
    gamma: float = 0.4
    order: int = 2

    def loss(self, student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
        return relations.cc(student, teacher, kernel=self.kernel, gamma=self.gamma, order=self.order)


@dataclass(frozen=True)
class CRD(PooledObjective):
    """Contrast with samples remembered from the whole training set (CRD, arXiv 1910.10699).

    negatives: a sample, of other classes. width: of the embeddings. mode: "exact": the positive is the sample itself; "relax": any of its
    class. Needs the number of training samples, and their labels to tell other classes: the engine says both where the data does.
    """

    name = "crd"
    reads_unlabelled = False  # those beside the labelled ones have no place in its memory

    weight: float = 0.8
    negatives: int = 16384
    temperature: float = 0.07
    momentum: float = 0.5
    width: int = 128
    mode: Literal["exact", "relax"] = "exact"

    @property
    def reads_mixtures(self) -> bool:
        return False  # its memory knows whole pictures

    def part(self, student: Tensor, teacher: Tensor, sides: Sides) -> nn.Module:
        if sides.samples is None:
            raise BadInput("'crd' remembers every training sample and must know how many there are: train with limbeck.distill")
        if student.dim() != 2 or teacher.dim() != 2:
            raise BadInput(
                f"'crd' embeds vectors [B, D]: the student's feature is {list(student.shape)}, the teacher's {list(teacher.shape)}; name "
                "layers that give one vector a picture"
            )
        return CRDHead(
            student.shape[1], teacher.shape[1], sides.samples, sides.labels, self.negatives, self.temperature, self.momentum,
            self.width, self.mode,
        )  # fmt: skip

    def compute(self, given: Given) -> Tensor:
        assert given.part is not None
        return given.part(given.student, given.teacher, sample_index(given.batch, given.student.device))


# -- several layers --------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LayersObjective(Objective):
    """A term on pairs of layers: lists of submodule names, or "@stages"."""

    student: Layers = "@stages"
    teacher: Layers = "@stages"
    weight: float = 1.0


@dataclass(frozen=True)
class AT(LayersObjective):
    """Where a map is large: its squared values averaged over the channels (attention transfer, arXiv 1612.03928)."""

    name = "at"

    weight: float = 1000.0
    p: float = 2.0

    def compute(self, given: Given) -> Tensor:
        return summed(maps.attention_transfer(s, t, p=self.p) for s, t in as_maps(given))


@dataclass(frozen=True)
class NST(LayersObjective):
    """Maximum mean discrepancy between the channels' activation patterns, polynomial kernel (NST, arXiv 1707.01219)."""

    name = "nst"

    weight: float = 50.0

    def compute(self, given: Given) -> Tensor:
        return summed(maps.nst(s, t) for s, t in as_maps(given))


@dataclass(frozen=True)
class VID(LayersObjective):
    """A Gaussian whose mean is predicted from the student's map, with a variance a channel (VID, arXiv 1904.05835)."""

    name = "vid"

    def part(self, student: Sequence[Tensor], teacher: Sequence[Tensor], sides: Sides) -> nn.Module:
        pairs = zip(student, teacher, strict=True)
        return nn.ModuleList(VIDRegressor(as_map(s).shape, as_map(t).shape) for s, t in pairs)

    def compute(self, given: Given) -> Tensor:
        regressors: Any = given.part
        terms = []
        for regressor, (student, teacher) in zip(regressors, as_maps(given), strict=True):
            predicted, teacher = maps.pool_to_smaller(regressor(student), teacher)
            terms.append(maps.variational(predicted, teacher, regressor.log_scale))
        return summed(terms)


@dataclass(frozen=True)
class ReviewKD(LayersObjective):
    """Each layer of the student, fused with those deeper than it, against the teacher's, at several scales (ReviewKD, arXiv 2104.09044).

    warmup_epochs: over which the term grows linearly to its weight.
    """

    name = "reviewkd"

    weight: float = 5.0
    warmup_epochs: float = 20.0

    def part(self, student: Sequence[Tensor], teacher: Sequence[Tensor], sides: Sides) -> nn.Module:
        return ReviewFusion([as_map(s).shape for s in student], [as_map(t).shape for t in teacher])

    def compute(self, given: Given) -> Tensor:
        assert given.part is not None
        fused = given.part([as_map(s) for s in given.student])
        term = summed(maps.hcl(s, as_map(t)) for s, t in zip(fused, given.teacher, strict=True))
        return warmed_up(term, given.epoch, self.warmup_epochs)


@dataclass(frozen=True)
class FSP(LayersObjective):
    """The flow from one layer to a deeper one: the Gram matrix of their channels (FSP, CVPR 2017). Each layer with the next."""

    name = "fsp"

    weight: float = 50.0

    def check(self, student: Sequence[Tensor], teacher: Sequence[Tensor], labels: Tensor) -> None:
        widths = [tuple(as_map(t).shape[1] for t in side) for side in (student, teacher)]
        if len(widths[0]) < 2:
            raise BadInput("'fsp' compares how one layer becomes another: name at least two layers")
        if widths[0] != widths[1]:
            raise BadInput(
                f"'fsp' compares Gram matrices of one size: the student's layers have {list(widths[0])} channels, the teacher's "
                f"{list(widths[1])}; name layers of the same widths"
            )

    def compute(self, given: Given) -> Tensor:
        pairs = list(as_maps(given))
        steps = itertools.pairwise(pairs)
        return summed(maps.fsp(before[0], after[0], before[1], after[1]) for before, after in steps)


@dataclass(frozen=True)
class OFD(LayersObjective):
    """Maps before the ReLU, where the teacher says something: its positive values, or the student's above a margin (OFD, arXiv
    1904.01866).

    teacher: the BatchNorm layers before its ReLUs, from which the margins follow; "@stages" takes the last BatchNorm of each stage that
    holds one. student: layers of the same sizes, before their ReLUs. A level counts half as much as the next deeper one.
    Raises `BadInput` where an activation layer overwrites what such a layer gives.
    """

    name = "ofd"
    uncached = "reads the teacher's BatchNorm layers"

    weight: float = 1e-3

    def targets(self, side: Literal["student", "teacher"], model: nn.Module, anatomy: Callable[[], Anatomy]) -> Targets:
        if getattr(self, side) != "@stages":
            return super().targets(side, model, anatomy)
        bare, stages = unwrapped(model), anatomy().stages
        norms = [norm for norm in (last_norm(bare, stage) for stage in stages) if norm is not None]
        if not norms:
            raise BadInput(f"'ofd': no stage of {type(bare).__name__} holds a BatchNorm: name the layers before its ReLUs")
        return tuple(map(Tap, norms))

    def part(self, student: Sequence[Tensor], teacher: Sequence[Tensor], sides: Sides) -> nn.Module:
        assert sides.teacher is not None
        check_kept("student", sides.student, sides.student_taps, sides.pixel_values)
        check_kept("teacher", sides.teacher, sides.teacher_taps, sides.pixel_values)
        connectors = nn.ModuleList(OFDConnector(s.shape, t.shape) for s, t in zip(student, teacher, strict=True))
        for number, (name, *_) in enumerate(sides.teacher_taps):
            layer: Any = unwrapped(sides.teacher).get_submodule(name)
            if getattr(layer, "weight", None) is None or getattr(layer, "running_mean", None) is None:
                raise BadInput(
                    f"'ofd': the teacher's {name!r} is a {type(layer).__name__}; name BatchNorm layers before its ReLUs"
                )
            margin = maps.margin_from_batch_norm(layer.weight.detach(), layer.bias.detach())
            connectors.register_buffer(f"margin{number}", margin, persistent=False)
        return connectors

    def compute(self, given: Given) -> Tensor:
        connectors: Any = given.part
        deepest = len(connectors) - 1
        terms = []
        for number, (student, teacher) in enumerate(zip(given.student, given.teacher, strict=True)):
            margin = getattr(connectors, f"margin{number}")
            terms.append(maps.ofd(connectors[number](student), teacher, margin) / 2 ** (deepest - number))
        return summed(terms)


# -- pieces ----------------------------------------------------------------------------------------------------------------------------


class Branches(nn.Module):
    """Copies of a model's last stage and head, drawn anew, and a gate over all branches, the model's own first (ONE).

    stage, head: of the model. shared: what the stage reads, [B, C, H, W].
    """

    def __init__(self, stage: nn.Module, head: nn.Module, shared: Tensor, branches: int) -> None:
        super().__init__()
        self.stages = nn.ModuleList(drawn_anew(stage) for _ in range(branches - 1))
        self.heads = nn.ModuleList(drawn_anew(head) for _ in range(branches - 1))
        self.gate = nn.Sequential(nn.Linear(shared.shape[1], branches), nn.BatchNorm1d(branches), nn.ReLU(), nn.Softmax(dim=1))

    def forward(self, shared: Tensor) -> tuple[list[Tensor], Tensor]:
        """[B, C, H, W] -> the logits of the other branches, M - 1 times [B, K], and the gate of all [B, M]."""
        logits = [head(as_map(stage(shared)).mean((2, 3))) for stage, head in zip(self.stages, self.heads, strict=True)]
        return logits, self.gate(as_map(shared).mean((2, 3)))


class Reheaded(nn.Module):
    """What stands behind a student's last map: a projector, and a frozen copy of the teacher's head on the mean over positions (SimKD).

    features: the submodule that gives the map. channels_last: as [B, H, W, C].
    """

    def __init__(self, features: str, projector: nn.Module, head: nn.Module, *, channels_last: bool = False) -> None:
        super().__init__()
        self.features, self.projector, self.head = features, projector, head.requires_grad_(False)
        self.channels_last = channels_last

    def forward(self, features: Tensor) -> Tensor:
        """[B, C, H, W] or [B, N, D] -> logits [B, K]."""
        turned = features.permute(0, 3, 1, 2) if self.channels_last else features
        return self.head(self.projector(as_map(turned)).mean((2, 3)))


class Spliced(nn.Module):
    """A model whose head gives way to another one behind its last map."""

    def __init__(self, trunk: nn.Module, head: Reheaded) -> None:
        super().__init__()
        self.trunk, self.head = trunk, head

    def forward(self, pixel_values: Tensor) -> Tensor:
        """[B, C, H, W] -> logits [B, K]."""
        with taps.record(self.trunk, {"features": self.head.features}) as seen:
            self.trunk(pixel_values)
        return self.head(seen["features"])


def head_on_mean(model: nn.Module, features: Tensor, pixel_values: Tensor) -> nn.Module | None:
    """A model's head, where it is a linear layer and reads the mean over positions of these features of pictures [B, C, H, W]; or None."""
    view = Classifier.of(model)
    pooled = view.read(in_dtype_of(model, pixel_values)).pooled
    mean = as_map(features)[: len(pooled)].mean((2, 3))  # pictures beside the labelled ones come after these
    return view.head if isinstance(view.head, nn.Linear) and _close(mean, pooled) else None


def check_labels(logits: Tensor, labels: Tensor) -> None:
    """Raise `BadInput` unless labels are classes of the logits [..., C], or -100."""
    if labels.dtype != torch.int64 or labels.shape != logits.shape[:-1]:
        raise BadInput(
            f"labels are {labels.dtype} {list(labels.shape)} beside student logits {list(logits.shape)}; "
            f"expected torch.int64 {list(logits.shape[:-1])}"
        )
    classes = logits.shape[-1]
    outside = labels[(labels != -100) & ((labels < 0) | (labels >= classes))]
    if outside.numel():
        raise BadInput(f"the student has {classes} classes, and a label is {outside[0].item()}; expected 0 to {classes - 1}")


def resolved(layer: str, model: nn.Module, anatomy: Callable[[], Anatomy]) -> Tap | tuple[Tap, ...]:
    """Where a layer is: a submodule of that name, or what a word stands for."""
    if layer not in WORDS:
        if layer.startswith("@"):
            raise BadInput(f"{layer!r} is no usual point; {nearest(layer, WORDS)}")
        return Tap(layer)
    found = anatomy()
    if layer == "@pooled":
        return Tap(found.head, "input")
    if layer == "@features":
        return Tap(found.features, channels_last=found.features in found.channels_last)
    return tuple(Tap(name, channels_last=name in found.channels_last) for name in found.stages)


def _one(found: Tap | tuple[Tap, ...]) -> Tap:
    if not isinstance(found, Tap):
        raise BadInput("'stages' stands for several layers: write it alone, not in a list")
    return found


def unwrapped(model: nn.Module) -> nn.Module:
    """The model behind a view; its submodules are what layers are named by."""
    return model.model if isinstance(model, Classifier) else model


def _close(ours: Tensor, theirs: Tensor) -> bool:
    """Whether two ways give one result, up to rounding."""
    if ours.shape != theirs.shape:
        return False
    slack = max(1e-3, *(4 * torch.finfo(each.dtype).eps for each in (ours, theirs)))
    return bool((ours.float() - theirs.float()).abs().max() <= slack * theirs.float().abs().max())


def last_norm(model: nn.Module, stage: str) -> str | None:
    """The last BatchNorm inside a stage; None where there is none."""
    norms = [name for name, module in model.get_submodule(stage).named_modules() if isinstance(module, nn.BatchNorm2d)]
    return next((f"{stage}.{name}" if name else stage for name in reversed(norms)), None)


def check_kept(side: str, model: nn.Module, places: Sequence[Tap], pixel_values: Tensor) -> None:
    """Raise `BadInput` where what is read of layers has been written over by an activation layer behind them. What is added in place (a
    shortcut) is read with the sum, as in OFD's own code."""
    bare = unwrapped(model)
    names = [place.name for place in places]
    writers = [name for name, module in bare.named_modules() if getattr(module, "inplace", False) and name not in names]
    with taps.record(bare, {name: name for name in (*writers, *names)}) as seen:
        model(in_dtype_of(model, pixel_values))
    for name, writer in itertools.product(names, writers):
        if any(written is seen[name] for written in seen.calls(writer)):
            raise BadInput(
                f"the {side}'s {writer!r} writes over what {name!r} gives, so that no map before it is left: set its `inplace` to False"
            )


def drawn_anew(module: nn.Module) -> nn.Module:
    """A copy in training mode with fresh random weights, by each layer's own initialisation; what no layer initialises (position
    embeddings) is the module's."""
    fresh = copy.deepcopy(module)
    seed = int(torch.randint(2**62, ()))
    with torch.random.fork_rng({p.device for p in module.parameters() if p.device.type == "cuda"}):
        torch.manual_seed(seed)  # the module may come from this very seed: going on from there would draw it again
        for layer in reversed(list(fresh.modules())):  # what holds layers has the last word
            reset = getattr(layer, "reset_parameters", None) or getattr(layer, "_reset_parameters", None)
            if callable(reset):
                reset()
    return fresh.requires_grad_(True).train()


def warmed_up(term: Tensor, epoch: float, epochs: float) -> Tensor:
    """The term times min((epoch + 1) / epochs, 1): whole epochs count from 1, as in the authors' code."""
    return term * min((math.floor(min(epoch, epochs)) + 1) / epochs, 1.0) if epochs else term


def as_maps(given: Given) -> list[tuple[Tensor, Tensor]]:
    """Pairs of maps [B, C, H, W] of student and teacher; tokens stand on their grid."""
    return [(as_map(s), as_map(t)) for s, t in zip(given.student, given.teacher, strict=True)]


def summed(terms: Any) -> Tensor:
    """The sum over layers."""
    return torch.stack(list(terms)).sum()


def sample_index(batch: Mapping[str, Any], device: torch.device) -> Tensor:
    """Positions [B] of a batch's samples in the training data."""
    if "index" in batch:
        return batch["index"].to(device)
    return torch.tensor([int(name) for name in batch["ids"]], device=device)


def objective(spec: Objective | str | Mapping[str, Any]) -> Objective:
    """An objective from what a recipe holds: ``"ce"``, or ``{"kd": {"temperature": 4}}``; an `Objective` is returned as it is.

    Raises `BadInput` naming the nearest known name or key, or what is wrong with a value.
    """
    if isinstance(spec, Objective):
        return spec
    if isinstance(spec, Mapping) and len(spec) == 1:
        (name, values), *_ = spec.items()
    elif isinstance(spec, str):
        name, values = spec, None
    else:
        raise BadInput(f"{spec!r} is no objective: expected a name or {{name: {{key: value}}}}, of {', '.join(Objective.known)}")
    if name not in Objective.known:
        raise BadInput(f"unknown objective {name!r}; {nearest(str(name), Objective.known)}")
    kind: Any = Objective.known[name]
    values = {} if values is None else values
    if not isinstance(values, Mapping):
        raise BadInput(f"objective {name!r} takes {{key: value}}, not {values!r}")
    keys = [field.name for field in dataclasses.fields(kind)]
    for key in values:
        if key not in keys:
            raise BadInput(f"objective {name!r} has no {key!r}; {nearest(str(key), keys)}")
    from pydantic import TypeAdapter, ValidationError  # not needed by who writes objectives in Python

    try:
        return TypeAdapter(kind).validate_python(dict(values))
    except ValidationError as error:
        first = error.errors()[0]
        where = "".join(f".{part}" for part in first["loc"])
        raise BadInput(f"objective {name}{where}: {first['msg'].removeprefix('Value error, ')}") from error


def named(objectives: Sequence[Objective | str | Mapping[str, Any]]) -> dict[str, Objective]:
    """The objectives by name; a repeated one gets a number: ``hint``, ``hint_2``. Raises `BadInput` where there are none."""
    if isinstance(objectives, str | Mapping | Objective) or not objectives:
        raise BadInput(f"objectives is {objectives!r}; expected a list of at least one, such as [ce, kd]")
    terms: dict[str, Objective] = {}
    for term in map(objective, objectives):
        before = sum(other.name == term.name for other in terms.values())
        terms[f"{term.name}_{before + 1}" if before else term.name] = term
    return terms
