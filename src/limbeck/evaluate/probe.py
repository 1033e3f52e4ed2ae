"""The visual switch as a diagnosis: do a student's errors come from seeing or from speaking?

Each vision tower in {teacher, student} is spoken for by each language part in {teacher, student}: four accuracies. Where the teacher's
language part does as well on the student's vision as on its own, the student sees enough and its errors are its language part's; where
it does not, they are its eyes'.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from accelerate.utils import send_to_device
from torch import Tensor

from limbeck.batch import Batch, supervised, teacher_side
from limbeck.errors import BadInput
from limbeck.evaluate.protocols import Means, exact_match
from limbeck.models.vlm import VLM, Replay, Visual, check_visual


@dataclass(frozen=True)
class ProbeResult:
    """accuracy[vision][language], each of "teacher" and "student"; None where that hybrid is not legal, with the reason."""

    accuracy: dict[str, dict[str, float | None]]
    answers: int
    refused: dict[str, str]

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "reading": self.reading()}

    def reading(self) -> str:
        """What the table says, in words."""
        own, best = self.accuracy["student"]["student"], self.accuracy["teacher"]["teacher"]
        eyes = self.accuracy["student"]["teacher"]
        assert own is not None and best is not None
        gap = best - own
        if gap <= 0:
            return f"the student ({own:.1%}) answers as well as its teacher ({best:.1%}): nothing to explain"
        if eyes is None:
            return "the teacher cannot read the student's vision, so the student's gap cannot be split"
        seeing = best - eyes
        cause = "seeing" if seeing > 0.6 * gap else "speaking" if seeing < 0.4 * gap else "seeing and speaking alike"
        return (
            f"the student is {gap * 100:.1f} points behind its teacher; with the student's vision the teacher itself loses "
            f"{seeing * 100:.1f}: the errors come mostly from {cause}"
        )


@torch.no_grad()
def probe(
    batches: Iterable[Batch],
    student: VLM,
    teacher: VLM,
    *,
    switched: Callable[[Visual], Visual] = lambda visual: visual,
    device: torch.device | str = "cpu",
) -> ProbeResult:
    """Measure the four hybrids. switched: student vision -> teacher projector (a bridge, or identity); the reverse has no bridge."""
    refused: dict[str, str] = {}
    try:
        check_visual(teacher, student)
    except BadInput as error:
        refused["teacher vision, student language"] = str(error)
    means, answers = Means(), 0
    for batch in batches:
        batch = send_to_device(batch, device)
        mine, theirs = batch["student"], teacher_side(batch)
        own, best = student.read(mine), teacher.read(theirs)
        if own.visual is None or best.visual is None:
            raise BadInput(f"a probe needs pictures: {batch['ids'][0]} has none")
        hybrids: dict[tuple[str, str], Callable[[], Tensor]] = {
            ("teacher", "teacher"): partial(getattr, best, "hidden"),
            ("student", "student"): partial(getattr, own, "hidden"),
            ("student", "teacher"): partial(speak_switched, teacher, theirs, own.visual, best.replay, switched),
            ("teacher", "student"): partial(student.speak, mine, best.visual, own.replay),
        }
        for (vision, language), hidden in hybrids.items():
            name = f"{vision} vision, {language} language"
            if name in refused:
                continue
            view, inputs = (teacher, theirs) if language == "teacher" else (student, mine)
            positions, _ = supervised(inputs)
            try:
                logits = view.head(hidden()[positions])
            except BadInput as error:
                refused[name] = str(error)
                continue
            right, _ = exact_match(logits, inputs["labels"])
            means.add(name, right)
        answers += len(right)
    measured = means.compute()
    table: dict[str, dict[str, float | None]] = {
        vision: {language: measured.get(f"{vision} vision, {language} language") for language in ("teacher", "student")}
        for vision in ("teacher", "student")
    }
    return ProbeResult(table, answers, refused)


def speak_switched(
    teacher: VLM, inputs: dict[str, Any], visual: Visual, replay: Replay | None, switched: Callable[[Visual], Visual]
) -> Tensor:
    """The teacher's hidden states for the student's vision, through the bridge where there is one."""
    return teacher.speak(inputs, switched(visual), replay)
