"""One view of every model that looks at a picture and names a class, whatever library it is from.

A `Classifier` takes pictures in [0, 1] and shows them to its model as that model was trained to see them: its own normalisation, its own
size. So teacher and student share a batch, and neither is fed the other's statistics. Where its features, its pooled feature and its
head are is found by one dry forward, not by a table of architectures.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from limbeck import taps
from limbeck.errors import BadInput


class Seen(NamedTuple):
    """What a classifier makes of a batch of pictures.

    features: the last map [B, C, H, W], or the last tokens [B, N, D], before pooling. pooled: [B, D], what its head reads. logits: [B, K].
    """

    features: Tensor
    pooled: Tensor
    logits: Tensor


class Anatomy(NamedTuple):
    """Where things are in a model, by submodule name.

    features: gives the last map or tokens. head: the linear layer (or 1x1 convolution) that gives the logits. stages: the last submodule at
    each resolution of a CNN, or the blocks at each quarter of a transformer's depth: the usual points to tap.
    channels_last: whether maps are [B, H, W, C], as in Swin.
    """

    features: str
    head: str
    stages: tuple[str, ...]
    channels_last: bool = False


class Classifier(nn.Module):
    """A model that classifies pictures, and what it wants to see.

    model: called with [B, C, H, W]; returns logits [B, K], or an object with ``logits``. mean, std: what it normalises by, a value a
    channel; None: nothing. size: pixels a side that it is shown; None: whatever comes. channels: colour channels that it takes; a grey
    picture is repeated for a model that takes 3. classes: names of the outputs, where they are known. spec: how to build it again.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        model: nn.Module,
        *,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        size: int | None = None,
        channels: int | None = None,
        classes: Sequence[str] = (),
        spec: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        self.size, self.channels, self.classes, self.spec = size, channels, tuple(classes), dict(spec or {})
        self.normalises = mean is not None
        self.register_buffer("mean", torch.tensor(mean or [0.0]).view(-1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std or [1.0]).view(-1, 1, 1), persistent=False)
        self._anatomy: Anatomy | None = None
        self._places: taps.Places | None = None

    @classmethod
    def of(cls, model: nn.Module) -> Classifier:
        """The view itself, or one that shows a plain module what comes, unchanged."""
        return model if isinstance(model, Classifier) else cls(model)

    def prepared(self, pixel_values: Tensor) -> Tensor:
        """Pictures [B, C, H, W] in [0, 1] -> what the model is shown: its size, channels, normalisation and dtype."""
        if self.channels == 3 and pixel_values.shape[1] == 1:
            pixel_values = pixel_values.expand(-1, 3, -1, -1)
        if self.size is not None and pixel_values.shape[-2:] != (self.size, self.size):
            pixel_values = F.interpolate(pixel_values, (self.size, self.size), mode="bilinear", antialias=True)
        if self.normalises:
            pixel_values = (pixel_values - self.mean) / self.std
        dtype = next((p.dtype for p in self.model.parameters() if p.is_floating_point()), pixel_values.dtype)
        return pixel_values if torch.is_autocast_enabled(pixel_values.device.type) else pixel_values.to(dtype)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Pictures [B, C, H, W] in [0, 1] -> logits [B, K]."""
        return logits_of(self.model(self.prepared(pixel_values)))

    def read(self, pixel_values: Tensor) -> Seen:
        """Pictures [B, C, H, W] in [0, 1] -> features, pooled feature and logits of one forward, with gradient.

        Raises `BadInput` where the model has no linear head.
        """
        anatomy = self.anatomy(pixel_values)
        places = self._places = self._places or taps.Places({"features": anatomy.features, "pooled": (anatomy.head, "input")})
        with places.open(self.model) as seen:
            logits = self(pixel_values)
        features = seen["features"]
        if anatomy.channels_last:
            features = features.permute(0, 3, 1, 2)
        return Seen(features, seen["pooled"].flatten(1), logits)

    def anatomy(self, pixel_values: Tensor | None = None) -> Anatomy:
        """Where features, head and usual points are; pixel_values: what to find it with, the first time."""
        if self._anatomy is None:
            if pixel_values is None:
                raise BadInput("the model has not seen a picture yet: call anatomy(pixel_values) first")
            self._anatomy = anatomy(self.model, self.prepared(pixel_values[:2]))
        return self._anatomy

    @property
    def head(self) -> nn.Module:
        """The layer that gives the logits; known after a first `read` or `anatomy`."""
        return self.model.get_submodule(self.anatomy().head)

    @property
    def width(self) -> int:
        """Width D of the pooled feature that the head reads."""
        head: Any = self.head
        return head.in_features if isinstance(head, nn.Linear) else head.in_channels

    def replace_head(self, head: nn.Module) -> None:
        """Put another module where the head is."""
        parent, _, name = self.anatomy().head.rpartition(".")
        setattr(self.model.get_submodule(parent), name, head)

    def new_head(self, outputs: int) -> None:
        """A fresh head with that many outputs, on the old one's device and in its dtype."""
        old: Any = self.head
        like = {"device": old.weight.device, "dtype": old.weight.dtype}
        if isinstance(old, nn.Linear):
            self.replace_head(nn.Linear(old.in_features, outputs, bias=old.bias is not None, **like))
        else:
            self.replace_head(nn.Conv2d(old.in_channels, outputs, kernel_size=1, bias=old.bias is not None, **like))

    def extra_repr(self) -> str:
        return f"size={self.size}, normalises={self.normalises}"


def logits_of(output: Any) -> Tensor:
    """A model's logits: its output, or the ``logits`` in it."""
    if isinstance(output, Tensor):
        return output
    logits = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", None)
    if not isinstance(logits, Tensor):
        raise BadInput(f"a model returned {type(output).__name__} without logits; return a tensor, or an object with .logits")
    return logits


@dataclass
class _Call:
    """One submodule's part in a dry forward."""

    name: str
    module: nn.Module
    output: Tensor


def anatomy(model: nn.Module, shown: Tensor) -> Anatomy:
    """Find features, head and usual points of a model by one dry forward. shown: [B, C, H, W], as the model wants it.

    Raises `BadInput` where its logits are not the output of a linear layer or a 1x1 convolution.
    """
    calls: list[_Call] = []

    def note(name: str) -> Any:
        def keep(module: nn.Module, _args: Any, output: Any) -> None:
            if isinstance(output, Tensor):
                calls.append(_Call(name, module, output))

        return keep

    handles = [module.register_forward_hook(note(name)) for name, module in model.named_modules() if name]
    try:
        with taps.undisturbed(model, shown.device):
            logits = logits_of(model(shown))
    finally:
        for handle in handles:
            handle.remove()
    flat = logits.flatten(1)
    at = next((i for i in reversed(range(len(calls))) if _gives(calls[i], flat)), None)
    if at is None:
        raise BadInput(
            f"{type(model).__name__}: its logits {list(logits.shape)} are not what a linear layer returns, so that its head cannot be "
            "found; let the last layer be an nn.Linear"
        )
    head, before = calls[at], _outermost(calls[:at])
    before = [call for call in before if len(call.output) == len(logits)]
    spatial = [call for call in before if call.output.dim() in (3, 4) and _positions(call.output) > 1]
    spatial = spatial or [call for call in before if call.output.dim() == 4]
    if not spatial:
        return Anatomy(before[-1].name if before else head.name, head.name, ())
    last = spatial[-1]
    layer: Any = head.module
    width = layer.in_features if isinstance(layer, nn.Linear) else layer.in_channels
    shape = last.output.shape
    channels_last = len(shape) == 4 and shape[-1] == width and shape[1] != width
    return Anatomy(last.name, head.name, _stages(spatial, shown.shape[3] / shown.shape[2], channels_last), channels_last)


def _gives(call: _Call, logits: Tensor) -> bool:
    pointwise = isinstance(call.module, nn.Conv2d) and call.module.kernel_size == (1, 1)
    if not (pointwise or isinstance(call.module, nn.Linear)):
        return False
    return call.output.flatten(1).shape == logits.shape and torch.equal(call.output.flatten(1), logits)


def _positions(output: Tensor) -> int:
    return output.shape[1] if output.dim() == 3 else output.shape[2] * output.shape[3]


def _outermost(calls: Sequence[_Call]) -> list[_Call]:
    """Of submodules that return one and the same tensor, the one that finishes last."""
    kept: dict[int, _Call] = {}
    for call in calls:
        kept.pop(id(call.output), None)
        kept[id(call.output)] = call
    return list(kept.values())


def _stages(spatial: Sequence[_Call], aspect: float, channels_last: bool) -> tuple[str, ...]:
    """The last block at each resolution; where there is one resolution only, at each quarter of the blocks' number.

    aspect: width over height of the picture.
    """
    by_size: dict[tuple[int, int], list[_Call]] = {}
    for call in spatial:
        if call.output.dim() == 4 and spatial[-1].output.dim() == 4:
            height, width = call.output.shape[1:3] if channels_last else call.output.shape[2:]
            if 0.5 < height / width * aspect < 2:  # else no map of the picture: attention, or channels among the sides
                by_size.setdefault((height, width), []).append(call)
    blocks = [call.name for call in spatial if call.output.dim() == 3 and call.name.rpartition(".")[2].isdigit()]
    depth = min((name.count(".") for name in blocks), default=0)
    blocks = [name for name in blocks if name.count(".") == depth]
    if len(by_size) < 2 <= len(blocks):
        return tuple(dict.fromkeys(blocks[max(0, round(len(blocks) * quarter / 4) - 1)] for quarter in range(1, 5)))
    return tuple(_last_block(calls) for calls in by_size.values())


def _last_block(calls: Sequence[_Call]) -> str:
    """Of submodules that run one after another, the last of those that are nested least and hold layers; else the last."""
    holders = [call for call in calls if any(next(child.parameters(), None) is not None for child in call.module.children())]
    depth = min((call.name.count(".") for call in holders), default=0)
    return [call.name for call in holders if call.name.count(".") == depth][-1] if holders else calls[-1].name
