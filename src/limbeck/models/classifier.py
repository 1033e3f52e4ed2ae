"""One view of every model that looks at a picture and names a class, whatever library it is from.

A `Classifier` takes pictures in [0, 1] and shows them to its model as that model was trained to see them: its own normalisation, its own
size. So teacher and student share a batch, and neither is fed the other's statistics. Where its features, its pooled feature and its
head are is found by one dry forward, not by a table of architectures.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from safetensors.torch import save_model
from torch import Tensor, nn

from limbeck import taps
from limbeck.errors import BadInput

VIEW_FILE = "limbeck.json"
WEIGHTS_FILE = "model.safetensors"

POOLING = (nn.AdaptiveAvgPool1d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.MaxPool2d, nn.AdaptiveMaxPool2d)


class Seen(NamedTuple):
    """What a classifier makes of a batch of pictures.

    features: the last map [B, C, H, W], or the last tokens [B, N, D], before pooling. pooled: [B, D], what its head reads. logits: [B, K].
    """

    features: Tensor
    pooled: Tensor
    logits: Tensor


class Anatomy(NamedTuple):
    """Where things are in a model, by submodule name.

    features: gives the last map or tokens; the head itself where nothing runs before it. head: the linear layer (or 1x1 convolution) that
    gives the logits. stages: the last submodule at each resolution of a CNN, or the blocks at each quarter of a transformer's depth: the
    usual points to tap. Submodules that return tuples are not named. channels_last: those of them whose maps are [B, H, W, C], as Swin's.
    """

    features: str
    head: str
    stages: tuple[str, ...]
    channels_last: tuple[str, ...] = ()


class Classifier(nn.Module):
    """A model that classifies pictures, and what it wants to see.

    model: called with [B, C, H, W]; returns logits [B, K], or an object with ``logits``. mean, std: what it normalises by, a value a
    channel; None: nothing. size: pixels a side that it is shown; None: whatever comes. channels: colour channels that it takes; a grey
    picture is repeated for a model that takes more. classes: names of the outputs, where they are known. spec: how to build it again
    (`limbeck.models.loading.load`). write: puts the model into a folder as its library wants it (`limbeck.models.vision`).
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
        write: Callable[[Classifier, Path], None] | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        self.size, self.channels, self.classes, self.spec = size, channels, tuple(classes), dict(spec or {})
        self.write = write
        self.normalises = mean is not None
        device = next((parameter.device for parameter in model.parameters()), None)
        self.register_buffer("mean", torch.tensor(mean or [0.0], device=device).view(-1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std or [1.0], device=device).view(-1, 1, 1), persistent=False)
        self._anatomy: Anatomy | None = None
        self._places: taps.Places | None = None

    @classmethod
    def of(cls, model: nn.Module) -> Classifier:
        """The view itself, or one that shows a plain module what comes, unchanged."""
        return model if isinstance(model, Classifier) else cls(model)

    def around(self, model: nn.Module) -> Classifier:
        """Another model behind this view: shown the same, its outputs named the same."""
        view = Classifier(model, size=self.size, channels=self.channels, classes=self.classes, spec=self.spec)
        view.mean, view.std, view.normalises = self.mean, self.std, self.normalises
        return view

    def prepared(self, pixel_values: Tensor) -> Tensor:
        """Pictures [B, C, H, W] in [0, 1] -> what the model is shown: its size, channels, normalisation and dtype.

        Raises `BadInput` for pictures of other channels than its own, unless they are grey.
        """
        if self.channels is not None and pixel_values.shape[1] != self.channels:
            if pixel_values.shape[1] != 1:
                raise BadInput(
                    f"{type(self.model).__name__} takes {self.channels} channel(s), the pictures have {pixel_values.shape[1]}: set its "
                    "`channels`, or make the pictures grey"
                )
            pixel_values = pixel_values.expand(-1, self.channels, -1, -1)
        if self.size is not None and pixel_values.shape[-2:] != (self.size, self.size):
            pixel_values = F.interpolate(pixel_values, (self.size, self.size), mode="bilinear", antialias=True)
        if self.normalises:
            pixel_values = (pixel_values - self.mean) / self.std
        return pixel_values if torch.is_autocast_enabled(pixel_values.device.type) else in_dtype_of(self.model, pixel_values)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Pictures [B, C, H, W] in [0, 1] -> logits [B, K]."""
        return logits_of(self.model(self.prepared(pixel_values)))

    def read(self, pixel_values: Tensor) -> Seen:
        """Pictures [B, C, H, W] in [0, 1] -> features, pooled feature and logits of one forward, with gradient.

        Raises `BadInput` where the model has no linear head.
        """
        anatomy = self.anatomy(pixel_values)
        if self._places is None:
            headless = anatomy.features == anatomy.head
            at: tuple[str, taps.Where] = (anatomy.features, "input" if headless else "output")
            self._places = taps.Places({"features": at, "pooled": (anatomy.head, "input")})
        with self._places.open(self.model) as seen:
            logits = self(pixel_values)
        features, pooled = seen["features"], seen["pooled"]
        if anatomy.features in anatomy.channels_last:
            features = features.permute(0, 3, 1, 2)
        return Seen(features, pooled.mean((2, 3)) if pooled.dim() == 4 else pooled.flatten(1), logits)

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
        """A fresh head with that many outputs, on the old one's device and in its dtype; names of classes are forgotten."""
        old: Any = self.head
        like = {"device": old.weight.device, "dtype": old.weight.dtype}
        if isinstance(old, nn.Linear):
            self.replace_head(nn.Linear(old.in_features, outputs, bias=old.bias is not None, **like))
        else:
            self.replace_head(nn.Conv2d(old.in_channels, outputs, kernel_size=1, bias=old.bias is not None, **like))
        self.classes, self.spec["classes"] = (), outputs

    def save(self, folder: str | Path) -> None:
        """Write ``model.safetensors``, what the model's own library needs beside it to load the folder, and ``limbeck.json`` with what
        `limbeck.models.vision.load_classifier` needs."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        if self.write is None:
            save_model(self.model, str(folder / WEIGHTS_FILE))
        else:
            self.write(self, folder)
        record = {
            "spec": self.spec,
            "mean": self.mean.flatten().tolist() if self.normalises else None,
            "std": self.std.flatten().tolist() if self.normalises else None,
            "size": self.size,
            "channels": self.channels,
            "classes": self.classes,
        }
        (folder / VIEW_FILE).write_text(json.dumps(record, indent=2, default=str), encoding="utf-8")

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


def in_dtype_of(model: nn.Module, pixel_values: Tensor) -> Tensor:
    """Pictures in the dtype of a model's first floating-point parameter; as they are where it has none."""
    return pixel_values.to(next((p.dtype for p in model.parameters() if p.is_floating_point()), pixel_values.dtype))


@dataclass
class _Call:
    """One submodule's part in a dry forward. version: torch's count of what was written into the output in place, by then."""

    name: str
    module: nn.Module
    output: Tensor
    version: int

    @property
    def parent(self) -> str:
        return self.name.rpartition(".")[0]

    @property
    def depth(self) -> int:
        return self.name.count(".")


def anatomy(model: nn.Module, shown: Tensor) -> Anatomy:
    """Find features, head and usual points of a model by one dry forward. shown: [B, C, H, W], as the model wants it.

    Raises `BadInput` where its logits are not the output of a linear layer or a 1x1 convolution.
    """
    calls, logits = _dry_forward(model, shown)
    at = next((i for i in reversed(range(len(calls))) if _gives(calls[i], logits)), None)
    if at is None:
        raise BadInput(
            f"{type(model).__name__}: its logits {list(logits.shape)} are not what one linear layer returns, so that its head cannot be "
            "found; let the last layer be an nn.Linear"
        )
    head = calls[at].name
    times = Counter(call.name for call in calls)
    before = [call for call in calls[:at] if times[call.name] == 1 and call.output.dim() > 1 and len(call.output) == len(logits)]
    maps = [call for call in before if call.output.dim() in (3, 4) and not isinstance(call.module, POOLING)]
    aspect = shown.shape[3] / shown.shape[2]
    stages = _stages(maps, aspect)
    last = _last_map(before, maps, stages, aspect)
    if last is None:
        return Anatomy(before[-1].name if before else head, head, ())
    turned = [call.name for call in (*stages, last) if call.output.dim() == 4 and _channels_last(call.output, aspect)]
    return Anatomy(last.name, head, tuple(call.name for call in stages), tuple(dict.fromkeys(turned)))


def _dry_forward(model: nn.Module, shown: Tensor) -> tuple[list[_Call], Tensor]:
    """Submodules that return a tensor, in the order in which they finish, without those that return it as they got it; and the logits."""
    calls: list[_Call] = []
    latest: dict[int, _Call] = {}

    def note(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def keep(module: nn.Module, _args: Any, output: Any) -> None:
            if not isinstance(output, Tensor):
                return
            same = latest.get(id(output))
            passed_on = same is not None and same.version == output._version and not same.name.startswith(f"{name}.")
            if not passed_on:
                latest[id(output)] = _Call(name, module, output, output._version)
                calls.append(latest[id(output)])

        return keep

    handles = [module.register_forward_hook(note(name)) for name, module in model.named_modules() if name]
    try:
        with taps.undisturbed(model, shown.device):
            return calls, logits_of(model(shown))
    finally:
        for handle in handles:
            handle.remove()


def _gives(call: _Call, logits: Tensor) -> bool:
    """Whether a call is that of the head; SqueezeNet's is a convolution whose map is averaged."""
    pointwise = isinstance(call.module, nn.Conv2d) and call.module.kernel_size == (1, 1)
    output = call.output
    if not (pointwise or isinstance(call.module, nn.Linear)) or output.shape[:2] != logits.shape[:2]:
        return False
    if output.numel() == logits.numel():
        return torch.equal(output.flatten(), logits.flatten().to(output.dtype))
    if not pointwise or logits.numel() != output.shape[:2].numel():
        return False
    return any(torch.allclose(each.mean((2, 3)).flatten(), logits.flatten().to(each.dtype)) for each in (output, output.relu()))


def _last_map(before: Sequence[_Call], maps: Sequence[_Call], stages: Sequence[_Call], aspect: float) -> _Call | None:
    """The last map or tokens before they are pooled. What is inside a module that returns no map belongs to the pooling."""
    flat = [f"{call.name}." for call in before if call.output.dim() == 2 or _positions(call.output, aspect) == 1]
    spatial = [call for call in maps if _positions(call.output, aspect) > 1]
    spatial = [call for call in spatial if not call.name.startswith(tuple(flat))] or spatial
    order = [id(call) for call in before]
    if stages and _positions(stages[-1].output, aspect) == 1:  # a picture so small that the last stage is one position
        spatial = [call for call in spatial if order.index(id(call)) > order.index(id(stages[-1]))] or [stages[-1]]
    return spatial[-1] if spatial else None


def _stages(maps: Sequence[_Call], aspect: float) -> list[_Call]:
    """The last block at each resolution; where there are few, at each quarter of the number of equal blocks.

    They are siblings; those of several resolutions hold most of the parameters that maps go through, unlike a stem. aspect: width over
    height of the picture.
    """
    wide = [call for call in maps if _positions(call.output, aspect) > 1]
    own = {call.name: sum(p.numel() for p in call.module.parameters(recurse=False)) for call in wide}

    def most(parent: str) -> bool:
        return 2 * sum(n for name, n in own.items() if not parent or name.startswith(f"{parent}.")) >= sum(own.values())

    siblings: dict[str, list[_Call]] = {}
    equal: dict[tuple[Any, ...], list[_Call]] = {}
    for call in maps:
        siblings.setdefault(call.parent, []).append(call)
        if _holds_layers(call.module):
            equal.setdefault((call.parent, type(call.module), call.output.shape), []).append(call)
    by_resolution = _longest(_falling(calls, aspect) for parent, calls in siblings.items() if most(parent))
    blocks = _longest(equal.values())
    if len(by_resolution) > 2 or len(blocks) < 2:
        return by_resolution
    quarters = [blocks[max(0, round(len(blocks) * quarter / 4) - 1)] for quarter in range(1, 5)]
    return list({call.name: call for call in quarters}.values())


def _longest(lists: Iterable[list[_Call]]) -> list[_Call]:
    """Of several lists of siblings the longest; of equally long ones that which is nested least."""
    return max(lists, key=lambda calls: (len(calls), -calls[0].depth), default=[])


def _falling(siblings: Sequence[_Call], aspect: float) -> list[_Call]:
    """Of modules that run one after another the last at each resolution, preferably one that holds layers."""
    steps: list[list[_Call]] = []
    finest = 0
    for call in siblings:
        positions = _positions(call.output, aspect)
        if not steps or 1.5 * positions <= finest:
            steps.append([])
            finest = positions
        if 1.5 * positions > finest >= positions / 1.5:
            steps[-1].append(call)
    return [([call for call in step if _holds_layers(call.module)] or step)[-1] for step in steps]


def _holds_layers(module: nn.Module) -> bool:
    return any(next(child.parameters(), None) is not None for child in module.children())


def _positions(output: Tensor, aspect: float) -> int:
    """Places in a map or tokens in a sequence."""
    if output.dim() == 3:
        return output.shape[1]
    return output.shape[1:3].numel() if _channels_last(output, aspect) else output.shape[2:].numel()


def _channels_last(output: Tensor, aspect: float) -> bool:
    """Whether a map is [B, H, W, C]: which two sizes are shaped more like the picture."""
    _, first, second, third = output.shape
    return abs(math.log(second / first / aspect)) < abs(math.log(third / second / aspect))
