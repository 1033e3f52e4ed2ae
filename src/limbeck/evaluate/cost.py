"""What a model costs to ship: parameters and latency."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from limbeck.models.vlm import VLM


def parameters(model: nn.Module) -> int:
    """Parameters, tied ones counted once."""
    return sum(parameter.numel() for parameter in model.parameters())


@torch.no_grad()
def latencies(
    models: Mapping[str, tuple[VLM, Mapping[str, Tensor]]], *, repeats: int = 30, warmup: int = 3, seconds: float = 20.0
) -> dict[str, float]:
    """Milliseconds of one forward of each model over its inputs (picture and prompt, up to the answer's first token).

    The models take turns, so that whatever else the machine does meets all of them; the median of ``repeats`` turns, or of as many as
    fit into ``seconds``.
    """
    times: dict[str, list[float]] = {name: [] for name in models}
    started = time.perf_counter()
    for turn in range(warmup + repeats):
        for name, (view, inputs) in models.items():
            device = next(view.model.parameters()).device
            begun = time.perf_counter()
            view.head(view.read(inputs).hidden[:, -1])
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            times[name].append(time.perf_counter() - begun)
        if turn >= warmup and time.perf_counter() - started > seconds:
            break
    return {name: 1e3 * statistics.median(measured[warmup:]) for name, measured in times.items()}
