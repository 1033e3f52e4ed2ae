"""One view over any transformers image-text-to-text model: see -> project -> embed -> speak -> head.

``V`` (the vision part) turns pixels into visual features, ``P`` (the projector) carries these into the language model's space,
``L`` (the language part) reads them among the embedded words. A family is not known by its class but by what it has: a
projector at one of a few well-known places, a vision module before it, a language module after it. Everything goes through the
family's own forward, read and redirected by `limbeck.taps`, so that tiling, newline packing, dropped padding images, position
ids and masks are the family's own.

Tested on LLaVA, LLaVA-NeXT, LLaVA-OneVision, Qwen2-VL, Qwen2.5-VL, Qwen3-VL, SmolVLM, Idefics3, InternVL, Gemma 3, PaliGemma,
FastVLM and LFM2-VL.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from limbeck import taps
from limbeck.errors import BadInput
from limbeck.losses.linear import Head, LinearLogits, Logits

if TYPE_CHECKING:
    from limbeck.teachers.cached import CachedTeacher

Visual = tuple[Tensor, ...]
"""The inputs of the projector's modules, one tensor for each, [..., width]: one for most families, several where the language
model is fed at several depths (Qwen3-VL: the merger's, then the deepstack mergers' in order). Where the family calls a module
several times in a pass (LFM2-VL: once an image), its inputs are joined to one [tokens, width]."""

Inputs = Mapping[str, Any]
"""What the family's processor gives: ``input_ids``, ``attention_mask``, ``pixel_values``; ``labels``, ``ids``
and ``predicting`` are ignored."""

NOT_INPUTS = ("labels", "ids", "predicting")
VISION = ("vision_tower", "visual", "vision_model", "vision_encoder")
PROJECTOR = ("multi_modal_projector", "connector", "aligner", "projector", "mm_projector", "visual.merger", "merger")
DEEPSTACK = ("visual.deepstack_merger_list", "visual.merger_list")
LANGUAGE = ("language_model", "text_model")


@dataclass(frozen=True)
class Replay:
    """What the vision part gave for one batch, so that it need not run again.

    outputs: of every call of the vision module; none where the projector stands inside of it.
    visual: what the projector was given.
    """

    outputs: tuple[Any, ...]
    visual: Visual


@dataclass
class Reading:
    """One pass of a vision-language model up to its head.

    hidden: [B, T, D] last hidden states, what the head takes. visual: what the projector was given; None where the batch holds
    no image. replay: hand it to another `VLM.read` of the same inputs, and the vision part does not run again.
    """

    hidden: Tensor
    visual: Visual | None
    replay: Replay | None


class VisionLanguageModel(Protocol):
    """What a method asks of a vision-language model; `VLM` gives it for transformers models."""

    model: nn.Module
    processor: Any
    family: str
    vocab_size: int
    visual_widths: tuple[int, ...]

    def parts(self) -> dict[str, list[str]]: ...
    def read(self, inputs: Inputs, *, visual: Visual | None = None, replay: Replay | None = None) -> Reading: ...
    def see(self, inputs: Inputs) -> Visual: ...
    def project(self, visual: Visual, inputs: Inputs, replay: Replay | None = None) -> Tensor: ...
    def embed(self, input_ids: Tensor) -> Tensor: ...
    def speak(self, inputs: Inputs, visual: Visual, replay: Replay | None = None) -> Tensor: ...
    def head(self, hidden: Tensor) -> Tensor: ...
    def head_spec(self) -> Head: ...
    def logits(self, hidden: Tensor) -> Logits: ...


class VLM:
    """A transformers image-text-to-text model, seen as vision part, projector, language part and head.

    A view: it holds no weights of its own and leaves ``model`` as it is (mode, gradients, hooks). Gradient flows wherever the
    caller allows it, also through frozen weights to a given ``visual``.

    model: e.g. from ``AutoModelForImageTextToText``. processor: the family's own, or None.
    family: the config's ``model_type``. vocab_size: rows of the head. visual_widths: the channel width that each module of the
    projector takes; from the config, and as measured after the first pass.
    Raises `BadInput` for a model without a vision part, a projector, a language part or a head, naming the family.
    """

    def __init__(self, model: nn.Module, processor: Any = None) -> None:
        self.model: Any = model  # a transformers.PreTrainedModel: an nn.Module with a few more methods
        self.processor = processor
        config: Any = getattr(model, "config", None)
        self.family: str = getattr(config, "model_type", type(model).__name__)
        core = getattr(model, "model", None)
        names = dict(core.named_modules()) if isinstance(core, nn.Module) else {}
        vision, projector, language = (_first(names, table) for table in (VISION, PROJECTOR, LANGUAGE))
        head = getattr(model, "get_output_embeddings", lambda: None)()
        if getattr(config, "is_encoder_decoder", False):
            language = None
        found = {"vision module": vision, "projector": projector, "decoder-only language model": language, "head": head}
        missing = [part for part, module in found.items() if module is None]
        if vision is None or projector is None or language is None or head is None:
            raise BadInput(
                f"{self.family} ({type(model).__name__}) cannot be read as a vision-language model: it has no"
                f" {' and no '.join(missing)}; take one that AutoModelForImageTextToText builds and whose projector is a module"
            )
        self._core: Any = core
        self._vision, self._language = vision, language
        self._projectors = [projector, *(name for name in names if name.rpartition(".")[0] in DEEPSTACK)]
        self._inside = projector.startswith(f"{vision}.")  # then what the vision module returns is projected already
        self._blocks = _blocks(names, vision, self._projectors) if self._inside else []
        self.vocab_size = head.weight.shape[0]
        self.visual_widths = (_visual_width(self.family, config),) * len(self._projectors)

    def __repr__(self) -> str:
        return f"VLM({self.family}, projector {', '.join(self._projectors)}, vocabulary {self.vocab_size:,})"

    def parts(self) -> dict[str, list[str]]:
        """Prefixes of parameter names under "vision", "projector" and "language"; each parameter stands under exactly one.

        A prefix is a whole module or parameter name. The head belongs to the language part; what stands in none of the three
        modules (LLaVA-NeXT's ``image_newline``) belongs to the projector.
        """
        prefixes: dict[str, list[str]] = {"vision": [], "projector": [], "language": []}
        for part, prefix in self._cover(self.model, ""):
            prefixes[part].append(prefix)
        return prefixes

    def part_of(self, parameter: str) -> str:
        """The part that a parameter of ``model``, given by name, belongs to: "vision", "projector" or "language"."""
        for part, names in (("projector", self._projectors), ("vision", [self._vision]), ("language", [self._language])):
            if any(parameter.startswith(f"model.{name}.") for name in names):
                return part
        return "projector" if parameter.startswith("model.") else "language"

    def read(self, inputs: Inputs, *, visual: Visual | None = None, replay: Replay | None = None) -> Reading:
        """One pass up to the head.

        visual: stands in for what the projector would be given (the visual switch), in its dtype; keeps its graph. replay: of an
        earlier reading of the same inputs: nothing before the projector runs again.
        Raises `BadInput` where ``visual`` has another number of tensors, another width or another token count.
        """
        if visual is None and replay is not None:
            visual = replay.visual
        feeds = {} if visual is None else self._feeds(visual)
        targets: dict[str, Any] = {name: (name, "input") for name in self._projectors}
        if not self._inside:
            targets[self._vision] = self._vision
        with ExitStack() as open_taps:
            open_taps.enter_context(taps.replace(self._core, feeds, at="input"))
            if replay is not None:
                open_taps.enter_context(self._skip_vision(replay))
            seen = open_taps.enter_context(taps.record(self._core, targets))
            hidden = self._core(**{key: inputs[key] for key in inputs if key not in NOT_INPUTS}, use_cache=False)[0]
        for feed in feeds.values():
            feed.check_used()
        if not seen.calls(self._projectors[0]):
            return Reading(hidden, None, None)
        reached = tuple(_joined(seen.calls(name)) for name in self._projectors)
        self.visual_widths = tuple(level.shape[-1] for level in reached)
        outputs = () if self._inside else tuple(seen.calls(self._vision))
        return Reading(hidden, reached, Replay(outputs, reached))

    def see(self, inputs: Inputs) -> Visual:
        """V(x): what the projector is given. The language model does not run. Raises `BadInput` where there is no image."""
        with taps.bypass(self._core, {self._language: _decoded}):
            visual = self.read(inputs).visual
        if visual is None:
            raise BadInput(f"there is nothing to see: no image among the inputs {', '.join(sorted(inputs))}")
        return visual

    def project(self, visual: Visual, inputs: Inputs, replay: Replay | None = None) -> Tensor:
        """P(v): [N, D], the features at the N image placeholders as the language model gets them, sample after sample.

        Features that enter the language model at deeper layers (Qwen3-VL's deepstack) are not among them.
        """
        with taps.bypass(self._core, {self._language: _decoded}):
            embedded = self.read(inputs, visual=visual, replay=replay).hidden  # [B, T, D]
        return embedded[inputs["input_ids"] == self._image_token]

    def embed(self, input_ids: Tensor) -> Tensor:
        """[B, T] -> [B, T, D], as the language model takes them; image placeholders get a meaningless embedding."""
        words = self.model.get_input_embeddings()
        if self._image_token >= words.num_embeddings:  # as the families do it
            input_ids = input_ids.masked_fill(input_ids == self._image_token, 0)
        return words(input_ids)

    def speak(self, inputs: Inputs, visual: Visual, replay: Replay | None = None) -> Tensor:
        """L(P(v), x): [B, T, D], the last hidden states with ``visual`` in the place of the image."""
        return self.read(inputs, visual=visual, replay=replay).hidden

    def head(self, hidden: Tensor) -> Tensor:
        """[..., D] -> [..., V], by the family's own code: with its scale and softcap, where it has any."""
        rows = hidden.reshape(1, -1, hidden.shape[-1])  # [1, N, D]
        with taps.bypass(self.model, {"model": _Decoded(rows)}):
            logits = self.model(use_cache=False).logits
        return logits.view(*hidden.shape[:-1], logits.shape[-1])

    def logits(self, hidden: Tensor) -> Logits:
        """What losses take in the place of `head`: [..., D] hidden states with the head in numbers, so that [..., V] never exists whole;
        its logits where the head is more than a linear layer with plain weights (an adapter, hooks, sharding)."""
        linear = self.model.get_output_embeddings()
        touched = linear._forward_hooks or linear._forward_pre_hooks or "forward" in vars(linear)
        plain = type(linear) is nn.Linear and type(linear.weight) is nn.Parameter and not touched
        if not plain or linear.weight.is_meta or self._bend is None:
            return self.head(hidden)
        return LinearLogits(hidden, Head(linear.weight, linear.bias, *self._bend))

    def head_spec(self) -> Head:
        """The head in numbers. Configs name scales and softcaps that the family's code does not apply, so each candidate is, once,
        compared with `head` on random hidden states.

        Raises `BadInput` where none agrees, or where the weights are on the meta device.
        """
        linear = self.model.get_output_embeddings()
        if linear.weight.is_meta:
            raise BadInput(f"the head of {self.family} cannot be measured on the meta device: load its weights first")
        if self._bend is None:
            raise BadInput(f"the head of {self.family} is not linear, scaled and softcapped: use its full logits (`VLM.head`)")
        return Head(linear.weight, getattr(linear, "bias", None), *self._bend)

    @cached_property
    @torch.no_grad()
    def _bend(self) -> tuple[float, float | None] | None:
        """The head's scale and softcap, as measured; None where it is something else."""
        linear = self.model.get_output_embeddings()
        weight, bias = linear.weight, getattr(linear, "bias", None)
        text = self.model.config.get_text_config()
        scales = [1.0, *_numbers(text, "logit_scale", "output_multiplier"), *(1 / d for d in _numbers(text, "logits_scaling"))]
        softcaps = [None, *_numbers(text, "final_logit_softcapping")]
        probe = torch.randn(2, weight.shape[1], generator=torch.Generator().manual_seed(0)).to(weight)
        reach = 2 * max([cap for cap in softcaps if cap is not None], default=1.0) / min(scales)  # far enough to bend
        probe = probe * (reach / nn.functional.linear(probe, weight).abs().max())
        logits = self.head(probe).float()
        for scale, softcap in product(scales, softcaps):
            found = _logits(probe, Head(weight, bias, scale, softcap))
            if torch.allclose(found, logits, rtol=2e-2, atol=2e-2 * float(logits.abs().max())):
                return scale, softcap
        return None

    def recompute_language(self) -> None:
        """From now on the backward pass recomputes the language part layer by layer, also in eval mode, where transformers would not:
        only the flag of the layers themselves is set, so that dropout inside them stays off."""
        from transformers.modeling_layers import GradientCheckpointingLayer

        self.model.gradient_checkpointing_enable({"use_reentrant": False})
        for layer in self._core.get_submodule(self._language).modules():
            if isinstance(layer, GradientCheckpointingLayer):
                layer.training = True

    @property
    def _image_token(self) -> int:
        config = self.model.config
        return config.image_token_id if hasattr(config, "image_token_id") else config.image_token_index

    def _feeds(self, visual: Visual) -> dict[str, _Feed]:
        if len(visual) != len(self._projectors):
            raise BadInput(
                f"the projector of {self.family} takes {len(self._projectors)} tensor(s) ({', '.join(self._projectors)}), given"
                f" {len(visual)}: bridge the student's levels to the teacher's (`bridge: linear`)"
            )
        return {name: _Feed(self.family, name, level) for name, level in zip(self._projectors, visual, strict=True)}

    def _skip_vision(self, replay: Replay) -> ExitStack:
        if self._inside:  # the blocks' output is of no use, only its shape: the projector's input is replaced
            return taps.bypass(self._core, dict.fromkeys(self._blocks, _first_argument))
        outputs = iter(replay.outputs)
        return taps.bypass(self._core, {self._vision: lambda *_args, **_kwargs: copy.copy(next(outputs))})

    def _cover(self, module: nn.Module, path: str) -> Iterator[tuple[str, str]]:
        """The fewest (part, prefix) that cover the parameters below a module."""
        below = {self.part_of(f"{path}{name}") for name, _ in module.named_parameters()}
        if path and len(below) == 1:
            yield below.pop(), path.removesuffix(".")
            return
        for name, _ in module.named_parameters(recurse=False):
            yield self.part_of(f"{path}{name}"), f"{path}{name}"
        for name, child in module.named_children():
            if any(True for _ in child.parameters()):
                yield from self._cover(child, f"{path}{name}.")


def check_vocabulary(student: VLM, teacher: VLM | CachedTeacher) -> int:
    """How many token ids two models share: logits are comparable over ``[:, :, :shared]``.

    Heads of one size share it all, heads that differ only by padding the smaller size. Tokenizers are compared where both models
    have one, and must be known where the sizes differ.
    Raises `BadInput` where the tokenizers map strings to different ids or the sizes cannot be reconciled, naming both sizes.
    """
    sizes = f"student {student.family} has {student.vocab_size:,} token ids, teacher {teacher.family} {teacher.vocab_size:,}"
    way_out = "use models of one tokenizer, or a method that aligns text rather than token ids"
    tokenizers = [_tokenizer(side.processor) for side in (student, teacher)]
    if None in tokenizers:
        if student.vocab_size == teacher.vocab_size:
            return student.vocab_size
        raise BadInput(f"{sizes}: without both tokenizers it cannot be told whether only padding differs; {way_out}")
    ours, theirs = (tokenizer.get_vocab() for tokenizer in tokenizers)
    if ours != theirs:
        token = min(token for token in ours.keys() | theirs.keys() if ours.get(token) != theirs.get(token))
        raise BadInput(f"{sizes}, and token {token!r} is {ours.get(token)} in one, {theirs.get(token)} in the other; {way_out}")
    shared = min(student.vocab_size, teacher.vocab_size)
    if student.vocab_size != teacher.vocab_size and len(tokenizers[0]) > shared:
        raise BadInput(f"{sizes}, but their tokenizer uses {len(tokenizers[0]):,}: more than padding differs; {way_out}")
    return shared


def check_visual(student: VLM, teacher: VLM) -> None:
    """Whether the student's visual features can stand in for the teacher's, as far as can be told without data.

    Raises `BadInput` where the projectors take another number of tensors or other widths, naming both.
    """
    ours, theirs = student.visual_widths, teacher.visual_widths
    if len(ours) != len(theirs):
        raise BadInput(
            f"student {student.family} feeds its projector at {len(ours)} level(s), teacher {teacher.family} at {len(theirs)}:"
            " take a teacher of the student's kind"
        )
    if ours != theirs:
        raise BadInput(
            f"visual widths differ: student {student.family} {list(ours)}, teacher {teacher.family} {list(theirs)};"
            " set `bridge: linear` to learn the map between them"
        )


class _Decoded(dict[str, Tensor]):
    """What a language model returns, reduced to its last hidden states; every other field is None.

    Families take transformers' outputs apart by attribute, by index and by ``**``.
    """

    def __init__(self, hidden: Tensor) -> None:
        super().__init__(last_hidden_state=hidden)

    def __getitem__(self, key: str | int) -> Tensor:
        return super().__getitem__("last_hidden_state" if key == 0 else str(key))

    def __getattr__(self, name: str) -> Tensor | None:
        if name.startswith("__"):
            raise AttributeError(name)
        return self.get(name)


class _Feed:
    """Gives one tensor to a module of the projector in the place of its own input, in slices where it is called repeatedly."""

    def __init__(self, family: str, projector: str, given: Tensor) -> None:
        self.place = f"{projector} of {family}"
        self.given = given
        self.taken: list[torch.Size] = []  # the shapes that were asked for
        self.used = 0

    def __call__(self, own: Tensor) -> Tensor:
        self.taken.append(own.shape)
        if own.shape == self.given.shape:
            self.used = own.shape[:-1].numel()
            return self.given.to(own)
        start, self.used = self.used, self.used + own.shape[:-1].numel()
        if self.given.dim() != 2 or self.given.shape[-1] != own.shape[-1] or self.used > len(self.given):
            raise self._misfit()
        return self.given[start : self.used].view(own.shape).to(own)

    def check_used(self) -> None:
        if self.used != self.given.shape[:-1].numel():
            raise self._misfit()

    def _misfit(self) -> BadInput:
        taken = " + ".join(str(list(shape)) for shape in self.taken) or "nothing, for the batch holds no image"
        given = list(self.given.shape)
        return BadInput(f"{self.place} takes {taken}, the visual given is {given}: use a bridge (`bridge: linear`)")


def _first(names: Mapping[str, nn.Module], table: tuple[str, ...]) -> str | None:
    return next((name for name in table if name in names), None)


def _blocks(names: Mapping[str, nn.Module], vision: str, projectors: list[str]) -> list[str]:
    """The names of the vision module's blocks: the largest list of modules in it that is no projector."""
    lists = {
        name: sum(parameter.numel() for parameter in module.parameters())
        for name, module in names.items()
        if isinstance(module, nn.ModuleList) and name.startswith(f"{vision}.") and name not in DEEPSTACK
    }
    biggest = max(lists, key=lists.__getitem__)
    return [f"{biggest}.{index}" for index, _ in names[biggest].named_children()]


def _visual_width(family: str, config: Any) -> int:
    vision = getattr(config, "vision_config", None)
    names = ("embed_dim", "hidden_size")  # in this order: Qwen2-VL's hidden_size is that of its text model
    width = next((value for name in names if isinstance(value := getattr(vision, name, None), int)), None)
    if width is None:
        raise BadInput(f"the vision_config of {family} names no width of the vision part: {' nor '.join(names)} is a number")
    layers = getattr(config, "vision_feature_layer", getattr(config, "vision_feature_layers", -1))
    levels = len(layers) if isinstance(layers, list | tuple) else 1  # LLaVA joins the features of several layers
    return width * levels * round(1 / getattr(config, "downsample_ratio", 1.0)) ** 2  # InternVL folds neighbours into channels


def _joined(calls: list[Tensor]) -> Tensor:
    return calls[0] if len(calls) == 1 else torch.cat([call.flatten(0, -2) for call in calls])


def _decoded(*_args: Any, inputs_embeds: Tensor, **_kwargs: Any) -> _Decoded:
    return _Decoded(inputs_embeds)


def _first_argument(value: Tensor, *_args: Any, **_kwargs: Any) -> Tensor:
    return value


def _numbers(config: Any, *names: str) -> list[float]:
    return [float(value) for name in names if (value := getattr(config, name, None))]


def _logits(hidden: Tensor, head: Head) -> Tensor:
    logits = head.scale * nn.functional.linear(hidden, head.weight, head.bias).float()
    return logits if head.softcap is None else head.softcap * torch.tanh(logits / head.softcap)


def _tokenizer(processor: Any) -> Any:
    tokenizer = getattr(processor, "tokenizer", processor)
    return tokenizer if hasattr(tokenizer, "get_vocab") else None
