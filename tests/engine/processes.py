"""What `test_trainer_processes` launches, on one CPU process or two: small trainings whose batches differ between processes.

torchrun --nproc-per-node N processes.py FOLDER
"""

import json
import sys
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from torch import nn

torch.set_num_threads(1)
state = PartialState(cpu=True)

import limbeck as lb  # noqa: E402
from limbeck.methods.base import Losses, Method  # noqa: E402

folder = Path(sys.argv[1])


class Points(torch.utils.data.Dataset):
    """labelled: one of so many has a label."""

    def __init__(self, labelled: int = 1) -> None:
        self.x = torch.randn(48, 6, generator=torch.Generator().manual_seed(0))
        self.labels = self.x[:, :3].argmax(1).where(torch.arange(48) % labelled == 0, -100)

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self.x[index], self.labels[index]


class Lacking(Method):
    """A term that some batches lack, as those without a picture lack Switch-KD's."""

    def __init__(self, student: nn.Module) -> None:
        super().__init__()
        self.student = student

    def forward(self, batch):
        logits = self.student(batch["pixel_values"])
        terms = {"ce": nn.functional.cross_entropy(logits, batch["labels"])}
        if (batch["pixel_values"][:, 0] > 1).any():
            terms = {"large": (logits**2).mean(), **terms}
        return Losses(terms)


class Watched:
    """Remembers what each process is asked to measure."""

    def __init__(self) -> None:
        self.seen: list[float] = []

    def __call__(self, method: Method, accelerator) -> dict[str, float]:
        self.seen.append(sum(value.double().sum().item() for value in method.student.state_dict().values()))
        return {"accuracy": 0.5}


def net(*, norm: bool = False, width: int = 8) -> nn.Module:
    torch.manual_seed(width)
    return nn.Sequential(nn.Linear(6, width), nn.BatchNorm1d(width) if norm else nn.ReLU(), nn.Linear(width, 3))


options = {"batch_size": 8, "steps": 6, "lr": 1e-2, "log_every": 1, "quiet": True}
lacking = lb.distill(Lacking(net()), Points(), out=folder / "lacking", **options)
among = lb.distill(lb.compose(net(width=16), net(), ["ce", "kd"]), Points(3), out=folder / "among", **options)
measured = Watched()
lb.distill(
    lb.compose(None, net(norm=True), ["ce"]),
    Points(),
    out=folder / "norm",
    evaluate=measured,
    ema=0.7,
    evaluate_every=2,
    **options,
)
seen = gather_object([measured.seen])
if state.is_main_process:
    weights = {name: value.tolist() for name, value in among.student.state_dict().items()}
    (folder / "told.json").write_text(json.dumps({"measured": seen, "weights": weights}))
state.wait_for_everyone()  # what ends first must not end what others yet read
state.destroy_process_group()
