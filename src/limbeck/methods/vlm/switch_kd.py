"""Switch-KD: visual-switch knowledge distillation for vision-language models.

Switch-KD: Visual-Switch Knowledge Distillation for Vision-Language Models, 2026, arXiv 2604.14629. The student's visual features are
spoken by the teacher's own frozen projector and language model; what that hybrid says must match what the teacher says. Gradient
returns through the frozen teacher into the student's vision encoder: visual knowledge is supervised in the space of words.

Differences (the authors released no training code; what their paper leaves open is a named option here):
- whether Kneedle chooses k a position, over which window and with which bounds: per position, over the ``window`` largest logits,
  k in [``k_min``, window]; k_min below 3 carries no gradient.
- Kneedle on logits (the paper's figure) or on probabilities (a reader's version): ``knee_on``.
- softmax over the flattened pairs (as BiLD's code) or a row at a time: ``pairs``.
- no tau^2 factor: ``tau_squared``.
- which positions count: those of the cross-entropy.
- pre-training is plain cross-entropy on the projector and then everything is distilled ("pretrain-dft"), or everything from the start
  ("dft", the default): ``schedule``.
- the paper needs V_S(x) to be a legal input of P_T. ``bridge="linear"`` trains a linear map where it is not; the paper has none.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from limbeck.batch import supervised, teacher_side
from limbeck.errors import BadInput
from limbeck.losses.linear import CrossEntropy, DBiLD, Logits, Term
from limbeck.methods.base import Batch, Losses, Stage
from limbeck.methods.vlm.base import VLMMethod
from limbeck.models.vlm import VLM, Replay, Visual, check_visual
from limbeck.modules.bridge import VisualBridge
from limbeck.teachers.frozen import FrozenTeacher


@dataclass(frozen=True)
class SwitchKDConfig:
    """Defaults are the paper's (eq. 1, Table 4) where it gives them.

    tau: temperature of the pair softmax, > 0. align, switch: lambda_1 and lambda_2. ce: weight of the labels.
    window: candidates a position, >= k_min. k_min: >= 3. bridge: none | linear.
    checkpoint_switch: recompute the teacher's language layers one by one in the backward pass of the switch route, to save memory.
    """

    tau: float = 3.0
    ce: float = 1.0
    align: float = 1.0
    switch: float = 1.0
    window: int = 100
    k_min: int = 3
    divergence: Literal["reverse", "forward"] = "reverse"
    pairs: Literal["flat", "rows"] = "flat"
    knee_on: Literal["logits", "probabilities"] = "logits"
    tau_squared: bool = False
    branches: tuple[Literal["teacher", "student"], ...] = ("teacher", "student")
    bridge: Literal["none", "linear"] = "none"
    schedule: Literal["dft", "pretrain-dft"] = "dft"
    checkpoint_switch: bool = False

    def __post_init__(self) -> None:
        if self.tau <= 0:
            raise ValueError(f"tau must be positive, got {self.tau}")
        if self.k_min < 3:
            raise ValueError(f"k_min must be at least 3 (fewer carry no gradient), got {self.k_min}")
        if self.window < self.k_min:
            raise ValueError(f"window must be at least k_min={self.k_min}, got {self.window}")
        if not self.branches:
            raise ValueError("branches must name teacher, student or both")


class SwitchKD(VLMMethod):
    """L = L_CE + lambda_1 DBiLD(z_T, z_S) + lambda_2 DBiLD(z_T, z_switch)  (eq. 1, 4, 6).

    z_T = L_T(P_T(V_T(x))) without gradient; z_S = L_S(P_S(V_S(x))); z_switch = L_T(P_T(V_S(x))) with the graph kept through the
    frozen P_T and L_T, on the same V_S(x) as z_S (eq. 5). The teacher's vision tower runs once a step.
    """

    name = "switch-kd"
    Config = SwitchKDConfig
    needs_teacher = True
    uncached = "its switch route runs through the teacher's language model at every step"
    teacher_view: VLM

    def __init__(self, student: VLM | nn.Module, teacher: VLM | nn.Module | FrozenTeacher, **hyper: Any) -> None:
        super().__init__(student, teacher, **hyper)
        config = self.config
        self.weights = {"ce": config.ce, "align": config.align, "switch": config.switch}
        if config.bridge == "none":
            check_visual(self.view, self.teacher_view)
        if config.checkpoint_switch:
            self.teacher_view.recompute_language()
        self.bridge = (
            VisualBridge(self.view.visual_widths, self.teacher_view.visual_widths) if config.bridge == "linear" else None
        )

    def stages(self) -> Sequence[Stage]:
        everything = Stage("dft")
        if self.config.schedule == "dft":
            return (everything,)
        projector = tuple(f"student.{prefix}*" for prefix in self.view.parts()["projector"])
        return (Stage("pretrain", projector, {"align": 0.0, "switch": 0.0}), everything)

    def prepare(self, batch: Batch) -> None:
        """One dry switch: a token count or width that P_T cannot take is refused here, with both sizes."""
        if self.bridge is not None:
            self.bridge.fit(self.view.see(batch["student"]), self.teacher_view.see(teacher_side(batch)))
        self.switch_logits(batch, self.view.see(batch["student"]), None)

    def switched(self, visual: Visual) -> Visual:
        """V_S(x) as P_T takes it: itself, or through the bridge."""
        return visual if self.bridge is None else self.bridge(visual)

    def switch_logits(self, batch: Batch, visual: Visual, replay: Replay | None) -> Logits:
        """z_switch at the answer positions, [K, V], not computed yet."""
        inputs = teacher_side(batch)
        positions = supervised(inputs)[0]
        hidden = self.teacher_view.speak(inputs, self.switched(visual), replay)[positions]
        return self.teacher_view.logits(hidden)

    def forward(self, batch: Batch) -> Losses:
        if not (self.needs("align") or self.needs("switch")):
            student, labels = self.student_route(batch)
            return self.terms(ce=CrossEntropy(student.logits, labels))
        student, labels, teacher = self.both_routes(batch)
        terms: dict[str, Term] = {"ce": CrossEntropy(student.logits, labels)}
        if self.needs("align"):
            terms["align"] = self.difference(student.logits, teacher.logits)
        visual = student.reading.visual
        if self.needs("switch") and visual is not None:
            if not any(level.requires_grad for level in visual):
                raise BadInput(
                    "the switch term trains the student's vision, whose output carries no gradient here: "
                    "train model.vision in this stage, call forward with gradient enabled, or set method.switch: 0"
                )
            switch = self.switch_logits(batch, visual, teacher.reading.replay)
            terms["switch"] = self.difference(switch, teacher.logits)
        losses = self.terms(**terms)
        if self.needs("switch") and visual is None:  # z_switch is z_T; and every process is to have the same terms
            losses["switch"] = losses["ce"].new_zeros(())
        return losses

    def difference(self, logits: Logits, teacher_logits: Logits) -> DBiLD:
        """DBiLD with this method's options (eq. 7-15)."""
        config = self.config
        return DBiLD(
            logits,
            teacher_logits,
            tau=config.tau,
            window=config.window,
            k_min=config.k_min,
            divergence=config.divergence,
            pairs=config.pairs,
            knee_on=config.knee_on,
            tau_squared=config.tau_squared,
            branches=config.branches,
            vocabulary=self.vocabulary,
        )
