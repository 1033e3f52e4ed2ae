"""What a model costs to ship: parameters, bytes, operations and latency."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from limbeck import taps
from limbeck.models.vlm import VLM


def parameters(model: nn.Module) -> int:
    """Parameters, tied ones counted once."""
    return sum(parameter.numel() for parameter in model.parameters())


def size_bytes(model: nn.Module) -> int:
    """Bytes of the state dict: parameters and persistent buffers in their dtypes, tied ones counted once."""
    tensors = {id(tensor): tensor for tensor in model.state_dict(keep_vars=True).values() if isinstance(tensor, Tensor)}
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def flops(model: nn.Module, *inputs: Tensor) -> int:
    """Floating-point operations of one forward over ``inputs``, in eval mode: those of matrix products, convolutions and attention; a
    multiply-add counts as two. Papers that count multiply-adds (often also called FLOPs) report half of it.
    """
    counter = FlopCounterMode(display=False)
    device = inputs[0].device if inputs else None
    with taps.undisturbed(model, device), _countable_attention(), counter:
        model(*inputs)
    return counter.get_total_flops()


@contextmanager
def _countable_attention() -> Iterator[None]:
    """Attention as matrix products: the counter does not know the fused kernels of every device."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


def first_token(view: VLM, inputs: Mapping[str, Tensor]) -> Tensor:
    """One forward of a vision-language model over picture and prompt, up to the logits [B, V] of the answer's first token."""
    return view.head(view.read(inputs).hidden[:, -1])


@torch.no_grad()
def latencies(
    calls: Mapping[str, Callable[[], object]],
    *,
    device: torch.device | str = "cpu",
    repeats: int = 30,
    warmup: int = 3,
    seconds: float = 20.0,
) -> dict[str, float]:
    """Milliseconds of each call, e.g. ``partial(student, pixel_values)``; a GPU is waited for.

    calls: without arguments; models in eval mode. device: where they run. The calls take turns, so that whatever else the machine does
    meets all of them; the median of ``repeats`` turns, or of as many as fit into ``seconds``.
    """
    device = torch.device(device)
    times: dict[str, list[float]] = {name: [] for name in calls}
    started = time.perf_counter()
    for turn in range(warmup + repeats):
        for name, call in calls.items():
            begun = time.perf_counter()
            call()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            times[name].append(time.perf_counter() - begun)
        if turn >= warmup and time.perf_counter() - started > seconds:
            break
    return {name: 1e3 * statistics.median(measured[warmup:]) for name, measured in times.items()}
