"""Distil any module into any other: a list of objectives over labels, logits and tapped features.

No paper: the sum of classical terms, each with its source in its own docstring. A model is called as ``model(pixel_values)``
and returns logits [..., C], or an object or mapping with ``logits``; features are read by forward hooks, and no model is edited.
What a feature objective needs to compare two shapes is inferred from one dry forward (`Compose.prepare`)::

    method = compose(teacher, student, [CE(), KD(temperature=4), Hint("layer3", "layer3", weight=0.5)])
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from limbeck import losses, taps
from limbeck.batch import Batch
from limbeck.errors import BadInput, LimbeckError
from limbeck.losses.top_k import TopK, top_k_divergence
from limbeck.losses.top_k import top_k as top_k_of
from limbeck.methods.base import Losses, Method
from limbeck.models.classifier import logits_of
from limbeck.modules.projectors import infer_adapter
from limbeck.naming import nearest
from limbeck.teachers.cached import CachedTeacher, Rows
from limbeck.teachers.frozen import FrozenTeacher


class Objective:
    """One term of the loss, on logits. A subclass is a dataclass; one that sets ``name`` can be named in a recipe.

    weight: factor of the term in the total, finite and >= 0.
    """

    known: ClassVar[dict[str, type[Objective]]] = {}
    name: ClassVar[str]
    needs_teacher: ClassVar[bool] = True
    needs_labels: ClassVar[bool] = False

    weight: float

    def __init_subclass__(cls) -> None:
        if "name" in vars(cls):
            Objective.known[cls.name] = cls

    def __post_init__(self) -> None:
        if not (math.isfinite(self.weight) and self.weight >= 0):
            raise BadInput(f"weight is {self.weight}; expected a number >= 0")

    def check(self, student: Tensor, teacher: Tensor, labels: Tensor) -> None:
        """Look at one batch before training; raises `BadInput` where its tensors do not fit."""

    def loss(self, student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
        """The raw term, a scalar. teacher is None unless ``needs_teacher``; labels may be None unless ``needs_labels``."""
        raise NotImplementedError(f"{type(self).__name__} must define loss(student, teacher, labels)")


@dataclass(frozen=True)
class CE(Objective):
    """Cross-entropy with the labels; a label of -100 is ignored. label_smoothing: in [0, 1]."""

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
        if labels.is_floating_point() or labels.shape != student.shape[:-1]:
            raise BadInput(
                f"labels are {labels.dtype} {list(labels.shape)} beside student logits {list(student.shape)}; "
                f"expected integers {list(student.shape[:-1])}"
            )
        classes = student.shape[-1]
        outside = labels[(labels != -100) & ((labels < 0) | (labels >= classes))]
        if outside.numel():
            raise BadInput(f"the student has {classes} classes, and a label is {outside[0].item()}; expected 0 to {classes - 1}")

    def loss(self, student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
        return losses.cross_entropy(student, labels, label_smoothing=self.label_smoothing)


@dataclass(frozen=True)
class KD(Objective):
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
        if not (math.isfinite(self.temperature) and self.temperature > 0):
            raise BadInput(f"temperature is {self.temperature}; expected a number > 0")
        if not 0 <= self.beta <= 1:
            raise BadInput(f"beta is {self.beta}; expected a number from 0 to 1")

    def check(self, student: Tensor, teacher: Tensor, labels: Tensor) -> None:
        if student.shape[-1] != teacher.shape[-1]:
            raise BadInput(
                f"'kd' compares classes one by one: the student has {student.shape[-1]}, the teacher {teacher.shape[-1]}; "
                "give both the same classes, or distil features"
            )
        if student.shape != teacher.shape:
            raise BadInput(f"student logits {list(student.shape)} and teacher logits {list(teacher.shape)} differ in shape")

    def loss(self, student: Tensor, teacher: Tensor | TopK, labels: Tensor) -> Tensor:
        if isinstance(teacher, TopK):
            return top_k_divergence(student, teacher, kind=self.kind, beta=self.beta)
        return losses.kl_divergence(student, teacher, temperature=self.temperature, kind=self.kind, beta=self.beta)


@dataclass(frozen=True)
class FeatureObjective(Objective):
    """A term on features: the outputs of the submodules ``student`` and ``teacher``, compared through an inferred adapter."""

    student: str
    teacher: str
    weight: float = 1.0


@dataclass(frozen=True)
class Hint(FeatureObjective):
    """Mean squared error between features (FitNets, arXiv 1412.6550)."""

    name = "hint"

    def loss(self, student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
        return losses.hint(student, teacher)


@dataclass(frozen=True)
class Cosine(FeatureObjective):
    """One minus the cosine between features, along their channels."""

    name = "cosine"

    def loss(self, student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
        return losses.cosine(student, teacher)


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


@dataclass(frozen=True)
class ComposeConfig:
    """objectives: names, or {name: {key: value}}; weights and temperatures sit in them."""

    objectives: Sequence[Any] = ("ce", "kd")

    def __post_init__(self) -> None:
        named(self.objectives)


@dataclass(frozen=True)
class PlanRow:
    """One term of the resolved plan. Shapes are without the batch; teacher and its shape are None where no teacher is read."""

    term: str
    weight: float
    student: str
    student_shape: tuple[int, ...]
    teacher: str | None
    teacher_shape: tuple[int, ...] | None
    adapter: str
    parameters: int


class Compose(Method):
    """The weighted sum of objectives on any two modules.

    student, teacher: called as ``model(pixel_values)``; teacher may be None where no objective needs one.
    objectives: `Objective`, or what `objective` accepts.
    Batches are {"pixel_values", "labels"}, or (pixel_values, labels). Call `prepare` on one before the optimiser is made: it
    creates the adapters. Raises `BadInput` where a needed teacher is missing, or the two models share parameters.
    """

    name = "compose"
    Config = ComposeConfig

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module | FrozenTeacher | CachedTeacher | None = None,
        objectives: Sequence[Objective | str | Mapping[str, Any]] = ("ce", "kd"),
    ) -> None:
        super().__init__()
        self.objectives = named(objectives)
        self.weights = {name: term.weight for name, term in self.objectives.items()}
        features = {name: term for name, term in self.objectives.items() if isinstance(term, FeatureObjective)}
        self.student_taps = taps.Places({name: term.student for name, term in features.items()})
        self.teacher_taps = taps.Places({name: term.teacher for name, term in features.items()})
        self.student = student
        self.adapters = nn.ModuleDict()
        self.rows: list[PlanRow] = []
        if teacher is None:
            needing = [name for name, term in self.objectives.items() if term.needs_teacher]
            if needing:
                raise BadInput(f"no teacher is given, and {', '.join(needing)} needs one: give a teacher, or only 'ce'")
            return
        if isinstance(teacher, CachedTeacher):
            return
        module = teacher.module if isinstance(teacher, FrozenTeacher) else teacher
        if not {id(p) for p in module.parameters()}.isdisjoint(id(p) for p in student.parameters()):
            raise BadInput("teacher and student share parameters, and a teacher's are frozen: give each its own (copy.deepcopy)")
        self.teacher = FrozenTeacher.of(teacher)
        self.teacher_dtype = self.teacher.dtype

    def prepare(self, batch: Batch | Sequence[Tensor]) -> None:
        """One dry forward of both models: check that batch and models fit the objectives, and create the adapters.

        Runs in eval mode and without gradient: BatchNorm statistics, training modes and the models' random numbers stay as they
        were. Raises `BadInput` naming both sizes where classes, labels or features do not fit.
        """
        pixel_values, labels, taught = _inputs(batch)
        if labels is None and (needing := [name for name, term in self.objectives.items() if term.needs_labels]):
            raise BadInput(f"the batch has no labels, and {', '.join(needing)} needs them")
        with taps.undisturbed(self.student, pixel_values.device):
            pairs = self._observe(pixel_values, taught, self.objectives)
        like = next((p for p in self.student.parameters() if p.is_floating_point()), pixel_values)
        self.adapters, self.rows = nn.ModuleDict(), []
        for name, term in self.objectives.items():
            student, teacher = pairs[name]
            if isinstance(term, FeatureObjective):
                adapter = _adapter(name, term, student, teacher).to(like.device, like.dtype)
                self.adapters[name] = adapter
                self.rows.append(_plan_row(name, term.weight, (term.student, student), (term.teacher, teacher), adapter))
            else:
                term.check(student, teacher, labels)
                self.rows.append(_plan_row(name, term.weight, ("logits", student), ("logits", teacher), None))

    def plan(self) -> list[PlanRow]:
        """What is tapped, compared and adapted, one row a term; known after `prepare`."""
        if not self.rows:
            raise LimbeckError("the plan is not known yet: call method.prepare(batch) first")
        return self.rows

    def forward(self, batch: Batch | Sequence[Tensor]) -> Losses:
        """The weighted terms of {"pixel_values": [B, ...], "labels": [B]}; terms of weight 0 are not computed."""
        if not self.rows:
            raise LimbeckError("the adapters do not exist yet: call method.prepare(batch) before the first step")
        modules: dict[str, Any] = self._modules  # nn.Module looks up an attribute slowly
        weights, adapters, terms = self.weights, modules["adapters"]._modules, {}
        pixel_values, labels, taught = _inputs(batch)
        active = {name: term for name, term in self.objectives.items() if weights.get(name) != 0}
        for name, (student, teacher) in self._observe(pixel_values, taught, active).items():
            adapter = adapters.get(name)
            terms[name] = active[name].loss(student if adapter is None else adapter(student), teacher, labels)
        return self.weigh(**terms)

    def recorded(self) -> dict[str, Any]:
        return {
            name: {"temperature": term.temperature}
            if isinstance(term, KD)
            else {"teacher": self.teacher_taps.targets.get(name, "logits")}
            for name, term in self.objectives.items()
            if term.needs_teacher
        }

    def record(self, batch: Batch | Sequence[Tensor], top_k: int) -> dict[str, Rows]:
        """A row a sample: of ``kd`` the likeliest classes, of other terms on logits all of them, of features the teacher's layer."""
        entries = {}
        pixel_values, _, _ = _inputs(batch)
        for name, told in self._ask(pixel_values, self.objectives).items():
            term, samples = self.objectives[name], len(pixel_values)
            if not isinstance(told, Tensor) or len(told) != samples or (isinstance(term, KD) and told.dim() != 2):
                shape = list(told.shape) if isinstance(told, Tensor) else type(told).__name__
                raise BadInput(f"{name}: the teacher gives {shape} for {samples} samples: a cache keeps one row of each")
            counts = torch.ones(samples, dtype=torch.int32)
            entries[name] = Rows(top_k_of(told, top_k, temperature=term.temperature) if isinstance(term, KD) else told, counts)
        return entries

    def _observe(
        self, pixel_values: Tensor, taught: Mapping[str, Any] | None, terms: Mapping[str, Objective]
    ) -> dict[str, tuple[Any, Any]]:
        """What each term compares, the student's side and the teacher's: logits or tapped features. Each model runs at most once.

        taught: what a cache says for the teacher; None asks it.
        """
        modules: dict[str, Any] = self._modules
        student, teacher = modules["student"], self.teacher
        if taught is None:
            with nullcontext() if teacher is None else teacher.aside():
                taught = self._ask(pixel_values, terms)
        with self.student_taps.open(student) as features:
            output = student(pixel_values)
        if teacher is not None:
            teacher.join()
        layers, pairs = self.student_taps.targets, {}
        for name, term in terms.items():
            seen = features[name] if name in layers else logits_of(output)
            pairs[name] = seen, taught[name] if term.needs_teacher else None
        return pairs

    def _ask(self, pixel_values: Tensor, terms: Mapping[str, Objective]) -> dict[str, Any]:
        """What the teacher says to each term that needs one: its logits, or a tapped feature."""
        needing = [name for name, term in terms.items() if term.needs_teacher]
        if not needing:
            return {}
        teacher = self.teacher
        assert teacher is not None
        if pixel_values.dtype != self.teacher_dtype and pixel_values.is_floating_point():
            pixel_values = pixel_values.to(self.teacher_dtype)
        with self.teacher_taps.open(teacher.module) as features:
            output = teacher(pixel_values)
        layers, told = self.teacher_taps.targets, {}
        for name in needing:
            told[name] = features[name] if name in layers else logits_of(output)
        return told


def compose(
    teacher: nn.Module | FrozenTeacher | None,
    student: nn.Module,
    objectives: Sequence[Objective | str | Mapping[str, Any]] = ("ce", "kd"),
) -> Compose:
    """Distil ``teacher`` into ``student`` by a list of objectives: ``compose(teacher, student, [CE(), KD(temperature=4)])``."""
    return Compose(student, teacher, objectives)


def _inputs(batch: Batch | Sequence[Tensor]) -> tuple[Tensor, Any, Any]:
    """pixel_values, and labels and what a cache says for the teacher, or None."""
    if isinstance(batch, Mapping):
        if "pixel_values" not in batch:
            raise BadInput(f"the batch has no 'pixel_values'; it has {', '.join(map(str, batch)) or 'nothing'}")
        return batch["pixel_values"], batch.get("labels"), batch.get("taught")
    if len(batch) != 2:
        raise BadInput(f"the batch has {len(batch)} entries; expected (pixel_values, labels) or a mapping with these keys")
    return batch[0], batch[1], None


def _adapter(name: str, term: FeatureObjective, student: Any, teacher: Any) -> nn.Module:
    """The adapter between two tapped features; `BadInput` names the term and its layers."""
    for side, layer, feature in (("student", term.student, student), ("teacher", term.teacher, teacher)):
        if not isinstance(feature, Tensor):
            raise BadInput(f"{name}: the {side}'s {layer!r} returns a {type(feature).__name__}; tap one that returns a tensor")
    try:
        return infer_adapter(student.shape, teacher.shape)
    except BadInput as error:
        raise BadInput(f"{name} ({term.student} -> {term.teacher}): {error}") from error


def _plan_row(
    name: str, weight: float, student: tuple[str, Tensor], teacher: tuple[str, Tensor | None], adapter: nn.Module | None
) -> PlanRow:
    (student_tap, seen), (teacher_tap, target) = student, teacher
    return PlanRow(
        term=name,
        weight=weight,
        student=student_tap,
        student_shape=tuple(seen.shape[1:]),
        teacher=None if target is None else teacher_tap,
        teacher_shape=None if target is None else tuple(target.shape[1:]),
        adapter=repr(adapter) if adapter else "",
        parameters=sum(p.numel() for p in adapter.parameters()) if adapter else 0,
    )
