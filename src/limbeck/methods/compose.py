"""Distil any module into any other: a list of objectives over labels, logits and tapped features.

No paper: the sum of classical terms (`limbeck.methods.objectives`), each with its source in its own docstring. A model is called as
``model(pixel_values)`` and returns logits [..., C], or an object or mapping with ``logits``; features are read by forward hooks, and no
model is edited. What a term needs to compare two shapes is inferred from one dry forward (`Compose.prepare`)::

    method = compose(teacher, student, [CE(), KD(temperature=4), Hint("layer3", "layer3", weight=0.5)])
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn

from limbeck import taps
from limbeck.batch import Batch
from limbeck.errors import BadInput, LimbeckError
from limbeck.losses.top_k import top_k as top_k_of
from limbeck.methods.base import Losses, Method
from limbeck.methods.objectives import KD, Given, Objective, Sides, Tap, Targets, named, unwrapped
from limbeck.models.classifier import Anatomy, Classifier, anatomy, in_dtype_of, logits_of
from limbeck.teachers.cached import CachedTeacher, Rows
from limbeck.teachers.frozen import FrozenTeacher


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
    Batches are {"pixel_values", "labels"}, or (pixel_values, labels); pictures under "unlabelled" pass both models in one batch with these
    and count in the terms that need a teacher and no labels (`Objective.reads_unlabelled`). Of mixtures of two pictures, "mixed_labels" and
    "mixed_share" (the other picture's label, and its share) say what `CE` takes them for. Call `prepare` on one before the optimiser is
    made: it creates the adapters. Raises `BadInput` where a needed teacher is missing, or the two models share parameters.
    """

    name = "compose"
    Config = ComposeConfig
    unlabelled_beside = True
    reads_mixtures = True

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module | FrozenTeacher | CachedTeacher | None = None,
        objectives: Sequence[Objective | str | Mapping[str, Any]] = ("ce", "kd"),
    ) -> None:
        super().__init__()
        self.objectives = named(objectives)
        self.weights = {name: term.weight for name, term in self.objectives.items()}
        self.student = student
        self.adapters = nn.ModuleDict()
        self.rows: list[PlanRow] = []
        self.student_reads: dict[str, dict[str, Tap]] = {}
        self.teacher_reads: dict[str, dict[str, Tap]] = {}
        if teacher is None:
            needing = [name for name, term in self.objectives.items() if term.needs_teacher]
            if needing:
                raise BadInput(f"no teacher is given, and {', '.join(needing)} needs one: give a teacher, or only 'ce'")
            return
        if isinstance(teacher, CachedTeacher):
            self.recorded({"objectives": objectives})
            return
        module = teacher.module if isinstance(teacher, FrozenTeacher) else teacher
        if not {id(p) for p in module.parameters()}.isdisjoint(id(p) for p in student.parameters()):
            raise BadInput("teacher and student share parameters, and a teacher's are frozen: give each its own (copy.deepcopy)")
        self.teacher = FrozenTeacher.of(teacher)
        self.teacher_dtype = self.teacher.dtype

    @classmethod
    def learns_from_teacher(cls, hyper: Mapping[str, Any]) -> bool:
        return any(term.needs_teacher for term in named(hyper["objectives"]).values())

    def prepare(self, batch: Batch | Sequence[Tensor]) -> None:
        """One dry forward of both models: check that batch and models fit the objectives, and create the adapters.

        Runs in eval mode and without gradient: BatchNorm statistics, training modes and the models' random numbers stay as they
        were. Raises `BadInput` naming both sizes where classes, labels or features do not fit.
        """
        inputs = _inputs(batch)
        pixel_values: Tensor = inputs["pixel_values"]
        labels: Any = inputs.get("labels")
        if labels is None and (needing := [name for name, term in self.objectives.items() if term.needs_labels]):
            raise BadInput(f"the batch has no labels, and {', '.join(needing)} needs them")
        single = [name for name, term in self.objectives.items() if not term.reads_mixtures]
        if "mixed_share" in inputs and single:
            raise BadInput(f"data.augment mixes two pictures, and {', '.join(single)} needs one: leave out mixup and cutmix")
        unlabelled = inputs.get("unlabelled")
        if unlabelled is not None and unlabelled.shape[1:] != pixel_values.shape[1:]:
            raise BadInput(
                f"labelled pictures {list(pixel_values.shape[1:])} and unlabelled {list(unlabelled.shape[1:])} differ in shape: they pass "
                "the models in one batch"
            )
        self._place_taps(pixel_values, inputs.get("taught"))
        with taps.undisturbed(self.student, pixel_values.device):
            seen, logits = self._observe(inputs, self.objectives)
            like = next((p for p in self.student.parameters() if p.is_floating_point()), pixel_values)
            self.adapters, self.rows = nn.ModuleDict(), []
            for name, term in self.objectives.items():
                student, teacher = seen[name]
                self._check_tensors(name, student, teacher)
                try:
                    term.check(student, teacher, labels)
                    part = term.part(student, teacher, self._sides(name, pixel_values, logits))
                except BadInput as error:
                    raise BadInput(self._located(name, error)) from error
                if part is not None:
                    self.adapters[name] = part.to(like.device, like.dtype)
                self._add_rows(name, student, teacher, part)
        # Banks are equal on all processes already, and large: DDP need not send them at every step.
        self._ddp_params_and_buffers_to_ignore = [name for name, _ in self.named_buffers() if name.endswith("_bank")]

    def plan(self) -> list[PlanRow]:
        """What is tapped, compared and adapted, a row for each pair of layers of a term; known after `prepare`."""
        if not self.rows:
            raise LimbeckError("the plan is not known yet: call method.prepare(batch) first")
        return self.rows

    def forward(self, batch: Batch | Sequence[Tensor]) -> Losses:
        """The weighted terms of {"pixel_values": [B, ...], "labels": [B]}; terms of weight 0 are not computed."""
        if not self.rows:
            raise LimbeckError("the adapters do not exist yet: call method.prepare(batch) before the first step")
        inputs, modules = _inputs(batch), self._modules  # nn.Module looks up an attribute slowly
        parts: dict[str, Any] = modules["adapters"]._modules  # type: ignore[union-attr]
        weights, terms, active = self.weights, {}, self.objectives
        if 0 in weights.values():
            active = {name: term for name, term in active.items() if weights.get(name) != 0}
        labels, per_epoch = inputs.get("labels"), self.steps_per_epoch
        epoch = math.inf if per_epoch is None else self.steps_done / (per_epoch or 1)
        seen, logits = self._observe(inputs, active)
        for name, (student, teacher) in seen.items():
            terms[name] = active[name].compute(Given(student, teacher, labels, parts.get(name), inputs, logits, epoch))
        return self.weigh(**terms)

    def deployable(self) -> nn.Module:
        student, parts = self.student, dict(self.adapters.items())
        for name, term in self.objectives.items():
            student = term.shipped(student, parts.get(name))
        return student

    @classmethod
    def recorded(cls, hyper: Mapping[str, Any]) -> dict[str, Any]:
        taught = {name: term for name, term in named(hyper["objectives"]).items() if term.needs_teacher}
        for name, term in taught.items():
            if term.uncached:
                raise BadInput(f"{name!r} {term.uncached} and needs the teacher itself: leave the cache out")
        return {
            name: {"temperature": term.temperature} if isinstance(term, KD) else {"teacher": getattr(term, "teacher", "logits")}
            for name, term in taught.items()
        }

    def record(self, batch: Batch | Sequence[Tensor], top_k: int) -> dict[str, Rows]:
        """A row a sample: of ``kd`` the likeliest classes, of other terms on logits all of them, of features the teacher's layers."""
        entries = {}
        pixel_values = _inputs(batch)["pixel_values"]
        if not self.teacher_reads:
            self._place_taps(pixel_values, None, to_fit=False)  # another student may have more stages
        for label, told in self._ask(pixel_values, self.objectives).items():
            term, samples = self.objectives[label.partition("@")[0]], len(pixel_values)
            if not isinstance(told, Tensor) or len(told) != samples or (isinstance(term, KD) and told.dim() != 2):
                shape = list(told.shape) if isinstance(told, Tensor) else type(told).__name__
                raise BadInput(f"{label}: the teacher gives {shape} for {samples} samples: a cache keeps one row of each")
            counts = torch.ones(samples, dtype=torch.int32)
            entries[label] = Rows(top_k_of(told, top_k, temperature=term.temperature) if isinstance(term, KD) else told, counts)
        return entries

    def _place_taps(self, pixel_values: Tensor, taught: Mapping[str, Any] | None, *, to_fit: bool = True) -> None:
        """Find out what each term reads of each model, and where its usual points are if it asks for those. to_fit: of several layers, no
        more of one model than the other has."""
        teacher: Any = None if self.teacher is None else self.teacher.module
        of_student, of_teacher = (cache(partial(_anatomy, model, pixel_values)) for model in (self.student, teacher))
        for name, term in self.objectives.items():
            ours = _labelled(name, term.targets("student", self.student, of_student))
            theirs: dict[str, Tap] = {}
            if term.needs_teacher and teacher is not None:
                theirs = _labelled(name, term.targets("teacher", teacher, of_teacher))
            elif term.needs_teacher and taught is not None:
                theirs = {label: Tap(label) for label in taught if label.startswith(f"{name}@")}
            if theirs and name not in ours | theirs:
                fitting = _deepest(name, term, ours, theirs)
                ours, theirs = fitting if to_fit else (ours, theirs)
            self.student_reads[name], self.teacher_reads[name] = ours, theirs
        self.student_taps, self.student_turned = _places(self.student_reads)
        self.teacher_taps, self.teacher_turned = _places(self.teacher_reads)

    def _observe(self, batch: Mapping[str, Any], terms: Mapping[str, Objective]) -> tuple[dict[str, tuple[Any, Any]], Tensor]:
        """What each term compares, the student's side and the teacher's: logits or tapped features; and the student's logits of the
        labelled pictures. Each model runs at most once."""
        modules: dict[str, Any] = self._modules  # nn.Module looks up an attribute slowly
        student, teacher, pixel_values, taught = modules["student"], self.teacher, batch["pixel_values"], batch.get("taught")
        labelled = None
        if "unlabelled" in batch and any(term.reads_unlabelled for term in terms.values()):
            labelled, pixel_values = len(pixel_values), torch.cat([pixel_values, batch["unlabelled"]])
        if taught is None:
            with nullcontext() if teacher is None else teacher.aside():
                taught = self._ask(pixel_values, terms)
        with self.student_taps.open(unwrapped(student)) as features:
            logits = logits_of(student(pixel_values))
        if teacher is not None:
            teacher.join()
        found = _turned(features, self.student_turned) if self.student_turned else features
        seen, ours, theirs = {}, self.student_reads, self.teacher_reads
        for name, term in terms.items():
            seen[name] = (
                _read(name, ours[name], found) if ours[name] else logits,
                (_read(name, theirs[name], taught) if theirs[name] else taught[name]) if term.needs_teacher else None,
            )
            if labelled is not None and not term.reads_unlabelled:
                seen[name] = (_first(labelled, seen[name][0]), _first(labelled, seen[name][1]))
        return seen, logits if labelled is None else logits[:labelled]

    def _ask(self, pixel_values: Tensor, terms: Mapping[str, Objective]) -> dict[str, Any]:
        """What the teacher says to each term that needs one: its logits by the term's name, or tapped features by their labels."""
        needing = [name for name, term in terms.items() if term.needs_teacher]
        if not needing:
            return {}
        teacher = self.teacher
        assert teacher is not None
        if pixel_values.dtype != self.teacher_dtype and pixel_values.is_floating_point():
            pixel_values = pixel_values.to(self.teacher_dtype)
        with self.teacher_taps.open(unwrapped(teacher.module)) as features:
            output = teacher(pixel_values)
        found = _turned(features, self.teacher_turned) if self.teacher_turned else features
        told = {}
        for name in needing:
            reads = self.teacher_reads[name]
            if reads:
                for label in reads:
                    told[label] = found[label]
            else:
                told[name] = logits_of(output)
        return told

    def _sides(self, name: str, pixel_values: Tensor, logits: Tensor) -> Sides:
        teacher = None if self.teacher is None else self.teacher.module
        ours, theirs = (tuple(reads[name].values()) for reads in (self.student_reads, self.teacher_reads))
        return Sides(self.student, teacher, ours, theirs, pixel_values, logits, self.train_size, self.train_labels)

    def _check_tensors(self, name: str, student: Any, teacher: Any) -> None:
        for side, reads, given in (
            ("student", self.student_reads[name], student),
            ("teacher", self.teacher_reads[name], teacher),
        ):
            for layer, feature in _tensors(name, reads, given):
                if reads and not isinstance(feature, Tensor):
                    raise BadInput(
                        f"{name}: the {side}'s {layer!r} returns a {type(feature).__name__}; tap one that returns a tensor"
                    )

    def _located(self, name: str, error: BadInput) -> str:
        """The error with the term and its layers."""
        ours, theirs = (", ".join(tap.name for tap in r[name].values()) for r in (self.student_reads, self.teacher_reads))
        if not ours:
            return str(error)
        return f"{name} ({ours} -> {theirs}): {error}" if theirs else f"{name} ({ours}): {error}"

    def _add_rows(self, name: str, student: Any, teacher: Any, part: nn.Module | None) -> None:
        """One row of the plan for each pair of layers; the trained part stands in the first."""
        ours = _tensors(name, self.student_reads[name], student)
        theirs = _tensors(name, self.teacher_reads[name], teacher)
        for number, (place, feature) in enumerate(ours):
            told = theirs[number] if number < len(theirs) else (None, None)
            first = part if number == 0 else None
            self.rows.append(
                PlanRow(
                    term=name,
                    weight=self.objectives[name].weight,
                    student=place,
                    student_shape=tuple(feature.shape[1:]),
                    teacher=told[0],
                    teacher_shape=None if told[1] is None else tuple(told[1].shape[1:]),
                    adapter="" if first is None else " ".join(repr(first).split()),
                    parameters=0 if first is None else sum(p.numel() for p in first.parameters()),
                )
            )


def compose(
    teacher: nn.Module | FrozenTeacher | None,
    student: nn.Module,
    objectives: Sequence[Objective | str | Mapping[str, Any]] = ("ce", "kd"),
) -> Compose:
    """Distil ``teacher`` into ``student`` by a list of objectives: ``compose(teacher, student, [CE(), KD(temperature=4)])``."""
    return Compose(student, teacher, objectives)


def _inputs(batch: Batch | Sequence[Tensor]) -> Mapping[str, Any]:
    """The batch as a mapping with "pixel_values"."""
    if isinstance(batch, (dict, Mapping)):  # an abstract class is slow to tell
        if "pixel_values" not in batch:
            raise BadInput(f"the batch has no 'pixel_values'; it has {', '.join(map(str, batch)) or 'nothing'}")
        return batch
    if len(batch) != 2:
        raise BadInput(f"the batch has {len(batch)} entries; expected (pixel_values, labels) or a mapping with these keys")
    return {"pixel_values": batch[0], "labels": batch[1]}


def _anatomy(model: nn.Module, pixel_values: Tensor) -> Anatomy:
    return model.anatomy(pixel_values) if isinstance(model, Classifier) else anatomy(model, in_dtype_of(model, pixel_values[:2]))


def _labelled(name: str, targets: Targets) -> dict[str, Tap]:
    """What a term reads, by label: its name for one layer, name@0, name@1, ... for several; nothing where it reads logits."""
    if targets is None:
        return {}
    if isinstance(targets[0], tuple):
        return {f"{name}@{number}": Tap(*place) for number, place in enumerate(targets)}
    return {name: Tap(*targets)}


def _places(reads: Mapping[str, Mapping[str, Tap]]) -> tuple[taps.Places, frozenset[str]]:
    """Where a model is tapped for all terms; and which of the labels stand for maps [B, H, W, C]."""
    found = {label: tap for each in reads.values() for label, tap in each.items()}
    places = taps.Places({label: (tap.name, tap.where) for label, tap in found.items()})
    return places, frozenset(label for label, tap in found.items() if tap.channels_last)


def _turned(features: Mapping[str, Any], turned: frozenset[str]) -> dict[str, Any]:
    """Tapped features, those under the labels ``turned`` as [B, C, H, W]."""
    return {label: value.permute(0, 3, 1, 2) if label in turned else value for label, value in features.items()}


def _deepest(
    name: str, term: Objective, ours: Mapping[str, Tap], theirs: Mapping[str, Tap]
) -> tuple[dict[str, Tap], dict[str, Tap]]:
    """As many layers of each model, the deepest, where "@stages" left it open how many; `BadInput` where the user's lists differ."""
    if len(ours) != len(theirs) and "@stages" not in (getattr(term, "student", ""), getattr(term, "teacher", "")):
        raise BadInput(f"{name}: {len(ours)} layers of the student and {len(theirs)} of the teacher; name as many of each")
    count = min(len(ours), len(theirs))
    if not count:
        raise BadInput(f"{name}: no usual points were found in these models: name layers (`limbeck taps` lists them)")
    return dict(list(ours.items())[-count:]), dict(list(theirs.items())[-count:])


def _read(name: str, reads: Mapping[str, Any], features: Mapping[str, Any]) -> Any:
    """A term's feature, or its features."""
    return features[name] if name in reads else tuple(features[label] for label in reads)


def _first(count: int, given: Any) -> Any:
    """The first so many samples of a tensor, or of each of several; None of None."""
    if given is None:
        return None
    return given[:count] if isinstance(given, Tensor) else tuple(feature[:count] for feature in given)


def _tensors(name: str, reads: Mapping[str, Tap], given: Any) -> list[tuple[str, Tensor]]:
    """(layer, tensor) pairs of what a term reads of one model."""
    if given is None:
        return []
    if not reads:
        return [("logits", given)]
    layers = [tap.name if tap.where == "output" else f"input of {tap.name}" for tap in reads.values()]
    return list(zip(layers, (given,) if name in reads else given, strict=True))
