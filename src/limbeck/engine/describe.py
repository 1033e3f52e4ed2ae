"""Where a model can be tapped: ``limbeck taps source:name``."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from limbeck import taps
from limbeck.data.records import VQARecord
from limbeck.data.vlm import ConversationEncoder
from limbeck.errors import BadInput
from limbeck.models.classifier import Classifier
from limbeck.models.loading import kind_of, load
from limbeck.models.vlm import VLM

CLASSES = 10  # of a model that has to be told: only the head's shape depends on it

MARKS = {"vision": "vision", "projector": "projector (visual switch)", "language": "language"}
BLANK_SIZE = 224  # pixels a side, where the configuration names no size


def tap_points(model: str, shape: Sequence[int] | None = None) -> list[dict[str, str]]:
    """Every submodule that runs in one dry forward, in the order in which they first finish.

    model: ``source:name`` as in a recipe (``transformers:org/model``, ``timm:resnet18``, ``python:pkg.mod:factory``,
    ``tiny:digit-vlm-student``). shape: of the zeros that a classifier or a plain module is given; None: a classifier's own size, or
    1, 3, 224, 224. A vision-language model is asked a short question about a blank picture, by its own processor. Models have random
    weights: names and shapes do not depend on them, and none are downloaded.

    Returns ``{"name", "class", "shape", "mark"}``: the shape of the first tensor returned ("-": none), and what this is: of a
    vision-language model "vision", "projector (visual switch)", "language" or "head"; of a classifier "stage 1" to "stage n",
    "features" or "head", joined by a comma where it is several; else "". Raises `BadInput` for what cannot be loaded, or does not take
    such an input.
    """
    source, colon, name = model.partition(":")
    if not (source and colon and name):
        raise BadInput(f"{model!r} names no model: write source:name, as in tiny:digit-vlm-student or transformers:org/model")
    torch.manual_seed(0)
    loaded = load(_spec(source, name))
    if isinstance(loaded, VLM):
        return _rows(taps.describe(loaded.model, _question(loaded, model)), _marks(loaded))
    view = Classifier.of(loaded)
    side = view.size or BLANK_SIZE
    zeros = torch.zeros(*(shape or (1, view.channels or 3, side, side)))
    points = taps.describe(view.model, lambda: _shown(view, zeros))
    return _rows(points, _usual_points(view, zeros))


def _spec(source: str, name: str) -> dict[str, Any]:
    spec: dict[str, Any] = {"source": source, "name": name}
    if source == "transformers":
        spec["random_init"] = True
    if source in ("tiny", "open_clip") and kind_of(spec) == "classifier":
        spec["classes"] = CLASSES
    return spec


def _rows(points: Sequence[taps.Submodule], marks: Mapping[str, str]) -> list[dict[str, str]]:
    return [
        {
            "name": point.name,
            "class": point.kind,
            "shape": "-" if point.shape is None else str(list(point.shape)),
            "mark": marks.get(point.name, ""),
        }
        for point in points
    ]


def _question(view: VLM, model: str) -> Callable[[], object]:
    if view.processor is None:
        raise BadInput(f"{model} has no processor: nothing can be shown to it")
    size = getattr(view.model.config.vision_config, "image_size", None)
    side = size if isinstance(size, int) else BLANK_SIZE
    record = VQARecord("blank", (), (("What is this?", ""),))
    inputs = ConversationEncoder(view.processor).prompt(record, [Image.new("RGB", (side, side))])
    return lambda: view.head(view.read(inputs).hidden[:, -1])


def _marks(view: VLM) -> dict[str, str]:
    marks = {prefix: MARKS[part] for part, prefixes in view.parts().items() for prefix in prefixes}
    head = view.model.get_output_embeddings()
    return marks | {name: "head" for name, module in view.model.named_modules() if module is head}


def _shown(view: Classifier, zeros: Tensor) -> object:
    try:
        return view.model(view.prepared(zeros))
    except (RuntimeError, ValueError, TypeError, AssertionError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise BadInput(
            f"{type(view.model).__name__} does not take zeros of shape {list(zeros.shape)} ({reason}): state --shape"
        ) from error


def _usual_points(view: Classifier, zeros: Tensor) -> dict[str, str]:
    """Marks of a classifier; none of a module that returns no logits, or has no linear head."""
    try:
        found = view.anatomy(zeros)
    except BadInput:
        return {}
    marks: dict[str, list[str]] = {}
    for number, stage in enumerate(found.stages, start=1):
        marks.setdefault(stage, []).append(f"stage {number}")
    for mark, name in (("features", found.features), ("head", found.head)):
        marks.setdefault(name, []).append(mark)
    return {name: ", ".join(each) for name, each in marks.items()}
