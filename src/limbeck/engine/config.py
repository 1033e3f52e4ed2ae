"""How to train: one pydantic model, the ``train:`` part of a recipe and the keywords of `limbeck.distill`."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from limbeck.settings import Strict

Positive = Annotated[int, Field(gt=0)]
Above = Annotated[float, Field(gt=0, allow_inf_nan=False)]
AtLeastZero = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, lt=1)]


class StageConfig(Strict):
    """A stage of the recipe: what differs from ``train`` and from the method's stage of that name."""

    name: str
    trainable: tuple[str, ...] | None = None
    weights: dict[str, Annotated[float, Field(allow_inf_nan=False)]] = {}
    epochs: Above | None = None
    steps: Positive | None = None
    lr: Above | None = None
    batch_size: Positive | None = None
    data: dict[str, Any] | None = None


class Select(Strict):
    """Which validation metric chooses the checkpoint that is kept as the student."""

    metric: str = "accuracy"
    mode: Literal["max", "min"] = "max"


class TrainConfig(Strict):
    """How to train.

    epochs, steps: length of a stage (steps wins). batch_size: samples an optimiser step sees over all processes; it is split into
    micro-batches of ``micro_batch_size`` a process, so that one recipe trains the same on any number of devices.
    lr: peak learning rate. warmup: share of a stage's steps (< 1) or a number of steps. clip: largest gradient norm, null = none.
    precision: fp32 | bf16 | fp16 (autocast; weights stay float32). evaluate_every, checkpoint_every, log_every: optimiser steps;
    evaluate_every null = once an epoch, 0 = never. keep: checkpoints kept beside the best. ema: decay of an exponential moving average
    of the student, which is then evaluated and saved. diagnose_every: steps between two measurements of each term's share of the
    gradient (0 = never). workers: processes that load data, for each that trains; null = none beside a CPU, up to 8 beside a GPU.
    group_by_length: batches of samples of like length. compile: whose repeated blocks go through ``torch.compile``.
    overlap_teacher: on a GPU, the teacher's forward runs on a stream of its own beside the student's. channels_last: convolutions of
    student, teachers and adapters keep their weights in that order, which many kernels are faster in.
    """

    epochs: Above = 1.0
    steps: Positive | None = None
    batch_size: Positive = 32
    micro_batch_size: Positive | None = None
    lr: Above = 1e-4
    optimizer: Literal["adamw", "sgd"] = "adamw"
    weight_decay: AtLeastZero = 0.0
    betas: tuple[Share, Share] = (0.9, 0.999)
    momentum: Share = 0.9
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup: AtLeastZero = 0.03
    clip: Above | None = 1.0
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    workers: Annotated[int, Field(ge=0)] | None = None
    group_by_length: bool = False
    compile: Literal["none", "student", "teacher", "both"] = "none"
    overlap_teacher: bool = False
    channels_last: bool = False
    evaluate_every: Annotated[int, Field(ge=0)] | None = None
    checkpoint_every: Annotated[int, Field(ge=0)] = 500
    log_every: Positive = 10
    diagnose_every: Annotated[int, Field(ge=0)] = 0
    keep: Positive = 2
    ema: Annotated[float, Field(gt=0, lt=1)] | None = None
    gradient_checkpointing: bool = False
    select: Select = Select()
    trackers: tuple[Literal["tensorboard", "wandb", "mlflow"], ...] = ()
    stages: tuple[StageConfig, ...] = ()

    @model_validator(mode="after")
    def _micro_batch_divides(self) -> TrainConfig:
        if self.micro_batch_size and self.batch_size % self.micro_batch_size:
            raise ValueError(f"batch_size {self.batch_size} is not a multiple of micro_batch_size {self.micro_batch_size}")
        return self
