"""What is measured on a trained student: protocols over batches, by name.

A protocol sees every batch once and returns named numbers; means are kept by torchmetrics, which sums over processes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import torch
from accelerate.utils import send_to_device
from torch import Tensor

from limbeck.batch import Batch, answer_spans, supervised, teacher_side
from limbeck.errors import BadInput
from limbeck.models.loading import ensure_torchvision
from limbeck.models.vlm import VLM, Visual
from limbeck.naming import nearest

if TYPE_CHECKING:
    from torchmetrics import Metric


class Measure(Protocol):
    """One protocol while it runs."""

    def update(self, batch: Batch) -> None:
        """Look at a batch."""

    def compute(self) -> dict[str, float]:
        """The metrics, over all processes."""


class Means:
    """Means by name, on the device where they are fed, synchronised over processes."""

    def __init__(self) -> None:
        self.metrics: dict[str, Metric] = {}

    def add(self, name: str, values: Tensor) -> None:
        """values: any shape; each entry counts once."""
        if name not in self.metrics:
            self.metrics[name] = mean_metric(values.device)
        self.metrics[name].update(values.float())

    def compute(self) -> dict[str, float]:
        names = sorted(self.metrics)
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            gathered: list[Any] = [None] * torch.distributed.get_world_size()
            torch.distributed.all_gather_object(gathered, names)
            names = sorted({name for part in gathered for name in part})
            device = next(iter(self.metrics.values())).device if self.metrics else "cpu"
            for name in names:
                self.metrics.setdefault(name, mean_metric(device))
        return {name: self.metrics[name].compute().item() for name in names}


def mean_metric(device: torch.device | str) -> Metric:
    """torchmetrics' mean; it imports torchvision, which must be made importable first."""
    ensure_torchvision()
    from torchmetrics import MeanMetric

    return MeanMetric().to(device)


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
        self.teacher = required(teacher, "switch-route")
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


class Classification:
    """``accuracy``: top-1 of the student's logits against ``labels``."""

    def __init__(self, method: Any, teacher: Any) -> None:
        self.student, self.means = method.deployable(), Means()

    def update(self, batch: Batch) -> None:
        output = self.student(batch["pixel_values"])
        logits = getattr(output, "logits", output)
        self.means.add("accuracy", logits.argmax(-1) == batch["labels"])

    def compute(self) -> dict[str, float]:
        return self.means.compute()


PROTOCOLS: dict[str, Callable[[Any, Any], Measure]] = {
    "vqa-accuracy": VQAAccuracy,
    "switch-route": SwitchRoute,
    "teacher-agreement": TeacherAgreement,
    "classification": Classification,
}


def find(name: str) -> Callable[[Any, Any], Measure]:
    """The protocol of that name; `BadInput` names the nearest."""
    if name not in PROTOCOLS:
        raise BadInput(f"evaluate: unknown protocol {name!r}; {nearest(name, PROTOCOLS)}")
    return PROTOCOLS[name]


def needs_teacher(name: str) -> bool:
    """Whether the protocol of that name compares with the teacher (its class says ``needs_teacher = True``)."""
    return getattr(find(name), "needs_teacher", False)


def default_for(method: Any) -> tuple[str, ...]:
    """What is measured where nothing is asked for."""
    return ("vqa-accuracy",) if isinstance(getattr(method, "view", None), VLM) else ("classification",)


def required(teacher: VLM | None, protocol: str) -> VLM:
    """The teacher; `BadInput` where there is none."""
    if teacher is None:
        raise BadInput(f"evaluate: {protocol} needs a teacher: add `teacher:` to the recipe")
    return teacher


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
    names: Sequence[str], batches: Iterable[Batch], method: Any, teacher: Any = None, *, device: torch.device | str = "cpu"
) -> dict[str, float]:
    """Run protocols over batches.

    method: a `Method`, in eval mode. teacher: what the protocols compare with, also for a method that trained without one.
    """
    measures = [find(name)(method, teacher) for name in names]
    for batch in batches:
        batch = send_to_device(batch, device)
        for measure in measures:
            measure.update(batch)
    return {name: value for measure in measures for name, value in measure.compute().items()}
