"""What a model costs to ship: parameters and latency."""

from __future__ import annotations

import statistics
import time

import torch
from torch import Tensor, nn

from limbeck.models.vlm import VLM


def parameters(model: nn.Module) -> int:
    """Parameters, tied ones counted once."""
    return sum(parameter.numel() for parameter in model.parameters())


@torch.no_grad()
def latency(view: VLM, inputs: dict[str, Tensor], *, repeats: int = 20, warmup: int = 3) -> float:
    """Milliseconds of one forward over ``inputs`` (picture and prompt, up to the answer's first token); median of ``repeats``."""
    device = next(view.model.parameters()).device
    times = []
    for repeat in range(warmup + repeats):
        start = time.perf_counter()
        view.head(view.read(inputs).hidden[:, -1])
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        if repeat >= warmup:
            times.append(time.perf_counter() - start)
    return 1e3 * statistics.median(times)
