"""What every protocol is, and how it keeps what it saw: as means, or sample by sample, over all processes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import torch
from torch import Tensor

from limbeck.batch import Batch
from limbeck.errors import BadInput
from limbeck.models.loading import ensure_torchvision

if TYPE_CHECKING:
    from torchmetrics import Metric

Value = TypeVar("Value")


class Measure(Protocol):
    """One protocol while it runs.

    Its class may say ``needs_teacher = True`` (it compares with the teacher) and ``needs_reference = True`` (it learns from training
    data: ``refer(batches)`` is called once, before the first `update`, by every process with all of the data).
    """

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
        parts = gathered({name: metric.device.type for name, metric in self.metrics.items()})
        kinds = {name: kind for part in parts for name, kind in part.items()}
        for name in kinds.keys() - self.metrics.keys():  # no batch was fed here: a kind alone means this process's device of it
            self.metrics[name] = mean_metric(kinds[name])
        return {name: self.metrics[name].compute().item() for name in sorted(kinds)}


class Columns:
    """What is kept of every sample, by name, and joined over processes; a process may have seen no sample."""

    def __init__(self) -> None:
        self.parts: dict[str, list[Tensor]] = {}

    def add(self, **columns: Tensor) -> None:
        """columns: [B, ...] each."""
        for name, values in columns.items():
            self.parts.setdefault(name, []).append(values)

    def compute(self) -> dict[str, Tensor]:
        """Every column, [N, ...], the processes one after another, on this process's device."""
        mine = {name: torch.cat(parts) for name, parts in self.parts.items()}
        if not distributed():
            return mine
        device = next((values.device for values in mine.values()), None)
        everyone = gathered({name: values.cpu() for name, values in mine.items()})
        names = dict.fromkeys(name for part in everyone for name in part)
        return {name: torch.cat([part[name] for part in everyone if name in part]).to(device) for name in names}


def distributed() -> bool:
    """Whether several processes measure together."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def gathered(value: Value) -> list[Value]:
    """The value of every process."""
    if not distributed():
        return [value]
    values: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(values, value)
    return values


def mean_metric(device: torch.device | str) -> Metric:
    """torchmetrics' mean; it imports torchvision, which must be made importable first."""
    ensure_torchvision()
    from torchmetrics import MeanMetric

    return MeanMetric().to(device)


def required(teacher: Any, protocol: str) -> Any:
    """The teacher; `BadInput` where there is none."""
    if teacher is None:
        raise BadInput(f"evaluate: {protocol} needs a teacher: add `teacher:` to the recipe")
    return teacher
