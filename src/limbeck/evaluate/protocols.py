"""What is measured on a trained student: protocols over batches, by name.

A protocol sees every batch once and returns named numbers over all processes. Those of vision-language models are here, those of image
classifiers in `limbeck.evaluate.recognition`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from accelerate.utils import send_to_device
from torch import Tensor

from limbeck.batch import Batch, answer_spans, supervised, teacher_side
from limbeck.errors import BadInput
from limbeck.evaluate.measure import Means, Measure, required
from limbeck.evaluate.recognition import KNN, Agreement, Classification, Corruptions, LinearProbe, Retrieval
from limbeck.models.vlm import VLM, Visual
from limbeck.naming import nearest


def exact_match(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Whether each answer is predicted token for token, its end included.

    logits: [K, V] at the positions that predict the supervised labels; labels: [B, T]. Given the question, this is whether greedy
    decoding writes exactly the answer, measured in one forward: as long as every token so far is right, greedy decoding has seen the
    same prefix. Returns float [A] and each answer's row [A].
    """
    _, targets = supervised({"labels": labels})
    answer, row = answer_spans(labels)
    right = (logits.argmax(-1) == targets).float()
    return torch.ones(len(row), device=logits.device).scatter_reduce(0, answer, right, "amin"), row


class VQAAccuracy:
    """``accuracy``: share of answers that greedy decoding writes exactly; ``accuracy/<kind>`` by kind of question."""

    def __init__(self, method: Any, teacher: VLM | None) -> None:
        self.student, self.means = method.view, Means()

    def update(self, batch: Batch) -> None:
        inputs = batch["student"]
        hidden = self.student.read(inputs).hidden[supervised(inputs)[0]]
        add_accuracy(self.means, "accuracy", self.student.head(hidden), inputs["labels"], batch)

    def compute(self) -> dict[str, float]:
        return self.means.compute()


class SwitchRoute:
    """``switch_route_accuracy``: exact answers of L_T(P_T(V_S(x))), the student's eyes with the teacher's voice (Switch-KD)."""

    needs_teacher = True

    def __init__(self, method: Any, teacher: VLM | None) -> None:
        self.teacher: VLM = required(teacher, "switch-route")
        self.student, self.switched, self.means = method.view, switch_of(method), Means()
        if getattr(method, "bridge", None) is None and self.student.visual_widths != self.teacher.visual_widths:
            raise BadInput(
                f"evaluate: switch-route needs vision that the teacher's projector takes; student {list(self.student.visual_widths)}, "
                f"teacher {list(self.teacher.visual_widths)}, and method {method.name!r} has no bridge: leave it out of `evaluate`"
            )

    def update(self, batch: Batch) -> None:
        inputs = teacher_side(batch)
        visual = self.switched(self.student.see(batch["student"]))
        hidden = self.teacher.speak(inputs, visual)[supervised(inputs)[0]]
        add_accuracy(self.means, "switch_route_accuracy", self.teacher.head(hidden), inputs["labels"], batch)

    def compute(self) -> dict[str, float]:
        return self.means.compute()


class TeacherAgreement:
    """``teacher_agreement``: share of answer tokens where student and teacher put the same token first;
    ``teacher_accuracy``: the teacher's own exact answers."""

    needs_teacher = True

    def __init__(self, method: Any, teacher: VLM | None) -> None:
        self.student, self.teacher, self.means = method.view, required(teacher, "teacher-agreement"), Means()

    def update(self, batch: Batch) -> None:
        inputs, others = batch["student"], teacher_side(batch)
        student = self.student.head(self.student.read(inputs).hidden[supervised(inputs)[0]])
        teacher = self.teacher.head(self.teacher.read(others).hidden[supervised(others)[0]])
        self.means.add("teacher_agreement", student.argmax(-1) == teacher.argmax(-1))
        self.means.add("teacher_accuracy", exact_match(teacher, others["labels"])[0])

    def compute(self) -> dict[str, float]:
        return self.means.compute()


PROTOCOLS: dict[str, Callable[[Any, Any], Measure]] = {
    "vqa-accuracy": VQAAccuracy,
    "switch-route": SwitchRoute,
    "teacher-agreement": TeacherAgreement,
    "classification": Classification,
    "agreement": Agreement,
    "linear-probe": LinearProbe,
    "knn": KNN,
    "retrieval": Retrieval,
    "corruptions": Corruptions,
}


def find(name: str) -> Callable[[Any, Any], Measure]:
    """The protocol of that name; `BadInput` names the nearest."""
    if name not in PROTOCOLS:
        raise BadInput(f"evaluate: unknown protocol {name!r}; {nearest(name, PROTOCOLS)}")
    return PROTOCOLS[name]


def needs_teacher(name: str) -> bool:
    """Whether the protocol of that name compares with the teacher (its class says ``needs_teacher = True``)."""
    return getattr(find(name), "needs_teacher", False)


def needs_reference(name: str) -> bool:
    """Whether the protocol of that name learns from training data (its class says ``needs_reference = True``)."""
    return getattr(find(name), "needs_reference", False)


def default_for(method: Any) -> tuple[str, ...]:
    """What is measured where nothing is asked for."""
    return ("vqa-accuracy",) if isinstance(getattr(method, "view", None), VLM) else ("classification",)


def switch_of(method: Any) -> Callable[[Visual], Visual]:
    """How a method hands the student's vision to the teacher's projector: through its bridge, or as it is."""
    return getattr(method, "switched", lambda visual: visual)


def add_accuracy(means: Means, name: str, logits: Tensor, labels: Tensor, batch: Batch) -> None:
    """Add exact matches under ``name`` and, where samples have kinds, under ``name/<kind>``."""
    right, row = exact_match(logits, labels)
    means.add(name, right)
    kinds = batch.get("kinds")
    if kinds is None:
        return
    of_answer = [kinds[index] for index in row.tolist()]
    for kind in sorted(set(of_answer) - {""}):
        chosen = torch.tensor([item == kind for item in of_answer], device=right.device)
        means.add(f"{name}/{kind}", right[chosen])


@torch.no_grad()
def evaluate(
    names: Sequence[str],
    batches: Iterable[Batch],
    method: Any,
    teacher: Any = None,
    *,
    device: torch.device | str = "cpu",
    reference: Callable[[], Iterable[Batch]] | None = None,
) -> dict[str, float]:
    """Run protocols over batches.

    method: a `Method`, in eval mode. teacher: what the protocols compare with, also for a method that trained without one.
    reference: gives the batches of the training data, unaugmented and all of them in every process, each time that it is called.
    Raises `BadInput` for an unknown protocol, and where one needs a teacher or a reference and there is none.
    """
    measures = [find(name)(method, teacher) for name in names]
    learners: list[Any] = [measure for name, measure in zip(names, measures, strict=True) if needs_reference(name)]
    if learners and reference is None:
        needing = ", ".join(filter(needs_reference, names))
        raise BadInput(
            f"evaluate: {needing} learns from training data, and there is none here: pass `reference`, or leave it out"
        )
    for learner in learners:
        assert reference is not None
        learner.refer(send_to_device(batch, device) for batch in reference())
    for batch in batches:
        batch = send_to_device(batch, device)
        for measure in measures:
            measure.update(batch)
    return {name: value for measure in measures for name, value in measure.compute().items()}
