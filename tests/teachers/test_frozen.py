"""A teacher's own stream: what is queued where, and who waits for whom, on a stand-in for CUDA's streams. Its weights' dtype."""

import contextlib

import pytest
import torch
from torch import nn

from limbeck.teachers.frozen import FrozenTeacher


class Streams:
    """Records the order of events; the caller's stream is "main"."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.current, self.events = "main", []
        streams = self

        class Stream:
            def __init__(self, name: object) -> None:
                self.name = name if isinstance(name, str) else "side"

            def wait_stream(self, other: "Stream") -> None:
                streams.events.append(f"{self.name} waits for {other.name}")

        @contextlib.contextmanager
        def entered(stream: Stream):
            before, streams.current = streams.current, stream.name
            yield
            streams.current = before

        monkeypatch.setattr(torch.cuda, "Stream", Stream)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda _device: Stream(streams.current))
        monkeypatch.setattr(torch.cuda, "stream", entered)
        monkeypatch.setattr(FrozenTeacher, "device", torch.device("cuda"))


def pass_through(teacher: FrozenTeacher, streams: Streams) -> None:
    with teacher.aside():
        streams.events.append(f"teacher on {streams.current}")
    streams.events.append(f"student on {streams.current}")
    teacher.join()
    streams.events.append("loss")


def test_the_teacher_runs_aside_after_what_was_queued_and_before_the_loss(monkeypatch):
    streams, teacher = Streams(monkeypatch), FrozenTeacher(nn.Linear(2, 2))
    teacher.overlap = True
    step = ["side waits for main", "teacher on side", "student on main", "main waits for side", "loss"]
    pass_through(teacher, streams)
    pass_through(teacher, streams)
    assert streams.events == step * 2


@pytest.mark.parametrize("overlap", [False, True])
def test_off_a_gpu_and_by_default_nothing_is_moved(monkeypatch, overlap):
    streams, teacher = Streams(monkeypatch), FrozenTeacher(nn.Linear(2, 2))
    teacher.overlap = overlap
    if overlap:
        monkeypatch.setattr(FrozenTeacher, "device", torch.device("cpu"))
    pass_through(teacher, streams)
    assert streams.events == ["teacher on main", "student on main", "loss"]


class Words(nn.Module):
    """With rotary positions, as transformers keep them, and statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.rotary, self.norm, self.body = nn.Module(), nn.BatchNorm1d(4), nn.Linear(4, 4)
        self.rotary.register_buffer("inv_freq", 1e6 ** -torch.linspace(0, 1, 32), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.body(self.norm(x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_are_cast_and_the_frequencies_of_positions_are_not(dtype):
    words = Words()
    exact = words.rotary.inv_freq.clone()
    teacher = FrozenTeacher(words, dtype=dtype)
    assert teacher.dtype == dtype
    assert torch.equal(words.rotary.inv_freq, exact)
    assert list(words.rotary.state_dict()) == []  # still not persistent
    assert teacher(torch.randn(2, 4, dtype=dtype)).dtype == dtype
    assert words.rotary.to("meta").inv_freq.device.type == "meta"  # still a buffer
