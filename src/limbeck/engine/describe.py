"""Where a model can be tapped: ``limbeck taps source:name``."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from PIL import Image
from torch import nn

from limbeck import taps
from limbeck.data.records import VQARecord
from limbeck.data.vlm import ConversationEncoder
from limbeck.engine.recipe import ModelSpec
from limbeck.engine.task import load_model
from limbeck.errors import BadInput
from limbeck.models.vlm import VLM
from limbeck.settings import validated

MARKS = {"vision": "vision", "projector": "projector (visual switch)", "language": "language"}
BLANK_SIZE = 224  # pixels a side, where the configuration names no size


def tap_points(model: str, shape: Sequence[int] = (1, 3, 224, 224)) -> list[dict[str, str]]:
    """Every submodule that runs in one dry forward, in the order in which they first finish.

    model: ``source:name`` as in a recipe (``transformers:org/model``, ``python:pkg.mod:factory``, ``tiny:digit-vlm-student``). shape: of
    the zeros that a plain module is given; a vision-language model is asked a short question about a blank picture, by its own
    processor. transformers models get random weights: names and shapes do not depend on them, and none are downloaded.

    Returns ``{"name", "class", "shape", "mark"}``: the shape of the first tensor returned ("-": none), and which part of a
    vision-language model this is: "vision", "projector (visual switch)", "language" or "head", else "". Raises `BadInput` for
    what cannot be loaded, or does not take such an input.
    """
    source, colon, name = model.partition(":")
    if not (source and colon and name):
        raise BadInput(f"{model!r} names no model: write source:name, as in tiny:digit-vlm-student or transformers:org/model")
    spec: ModelSpec = validated(ModelSpec, {"source": source, "name": name, "random_init": source == "transformers"}, model)
    loaded = load_model(spec, seed=0)
    if isinstance(loaded, VLM):
        return _rows(loaded.model, _question(loaded, model), _marks(loaded))
    return _rows(loaded, _zeros(loaded, shape), {})


def _rows(module: nn.Module, run: Callable[[], object], marks: dict[str, str]) -> list[dict[str, str]]:
    return [
        {
            "name": point.name,
            "class": point.kind,
            "shape": "-" if point.shape is None else str(list(point.shape)),
            "mark": marks.get(point.name, ""),
        }
        for point in taps.describe(module, run)
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


def _zeros(module: nn.Module, shape: Sequence[int]) -> Callable[[], object]:
    def run() -> object:
        try:
            return module(torch.zeros(*shape))
        except (RuntimeError, ValueError, TypeError) as error:
            reason = str(error).splitlines()[0]
            raise BadInput(
                f"{type(module).__name__} does not take zeros of shape {list(shape)} ({reason}): state --shape"
            ) from error

    return run
