"""What a training step of a vision-language model costs, from its sizes alone: floating-point operations and memory.

Every number here is an estimate by the formula that its docstring states; what the formulas leave out is said there too.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Any

from limbeck.losses.linear import workspace_bytes
from limbeck.models.vlm import VLM

PARTS = ("vision", "projector", "language")


@dataclass(frozen=True)
class Tower:
    """A stack of transformer blocks. parameters: of the blocks and what stands beside them; width, inner: channels of the residual
    stream and of the MLP."""

    parameters: int
    layers: int
    width: int
    inner: int


@dataclass(frozen=True)
class Sizes:
    """A vision-language model in numbers.

    language: without the embedding. embedding: its entries, those of an untied head included. vocabulary: rows of the head.
    weight_bytes: of all weights, in the dtype that they are loaded in. merge: vision patches that become one image token.
    """

    vision: Tower
    projector: int
    language: Tower
    embedding: int
    vocabulary: int
    weight_bytes: int
    merge: int

    @property
    def parameters(self) -> dict[str, int]:
        """By part; the language part holds embedding and head."""
        return {
            "vision": self.vision.parameters,
            "projector": self.projector,
            "language": self.language.parameters + self.embedding,
        }

    @property
    def total(self) -> int:
        return sum(self.parameters.values())


@dataclass(frozen=True)
class Tokens:
    """Of one sample, on average. text: question and answer; answer: those that are supervised."""

    image: float
    text: float
    answer: float

    @property
    def all(self) -> float:
        return self.image + self.text


@dataclass(frozen=True)
class Work:
    """What one stage does with each sample. trained: parts of the student; teacher, switch: whether these routes run."""

    trained: Collection[str]
    teacher: bool
    switch: bool
    checkpointed: bool
    recomputed_switch: bool = False


def sizes_of(view: VLM) -> Sizes:
    """Read off a model's parameters (tied ones once) and configuration; weights on the meta device will do."""
    counts = dict.fromkeys(PARTS, 0)
    for name, parameter in view.model.named_parameters():
        counts[view.part_of(name)] += parameter.numel()
    words, head = view.model.get_input_embeddings().weight, view.model.get_output_embeddings().weight
    embedding = words.numel() + (0 if head is words else head.numel())
    text = view.model.config.get_text_config()
    seen = view.model.config.vision_config
    width = _number(seen, "embed_dim", "hidden_size")
    inner = _number(seen, "intermediate_size") or round(width * (getattr(seen, "mlp_ratio", None) or 4))
    folded = _number(seen, "spatial_merge_size") or round(1 / getattr(view.model.config, "downsample_ratio", 1.0))
    return Sizes(
        vision=Tower(counts["vision"], _number(seen, "num_hidden_layers", "depth"), width, inner),
        projector=counts["projector"],
        language=Tower(
            counts["language"] - embedding,
            text.num_hidden_layers,
            text.hidden_size,
            _number(text, "intermediate_size") or 4 * text.hidden_size,
        ),
        embedding=embedding,
        vocabulary=view.vocab_size,
        weight_bytes=sum(parameter.numel() * parameter.element_size() for parameter in view.model.parameters()),
        merge=max(1, folded) ** 2,
    )


def image_tokens(view: VLM) -> int | None:
    """Tokens that a picture becomes, by the configuration; None where it depends on the picture."""
    config, vision = view.model.config, view.model.config.vision_config
    stated = _number(config, "image_seq_length", "mm_tokens_per_image")
    size, patch = (getattr(vision, name, None) for name in ("image_size", "patch_size"))
    if stated or not (isinstance(size, int) and isinstance(patch, int)):
        return stated or None
    return (size // patch) ** 2 // sizes_of(view).merge


def flops(
    student: Sizes, tokens: Tokens, work: Work, teacher: Sizes | None = None, teacher_tokens: Tokens | None = None
) -> dict[str, float]:
    """Floating-point operations a sample: {"student", "teacher", "switch"}.

    For N parameters that D tokens pass: 2ND forward, 2ND for the gradient of the inputs, 2ND for that of the weights. So a trained part
    costs 6ND, a frozen one behind a trained one 4ND, a frozen one before any trained one 2ND, the teacher's forward 2ND, and the switch
    route 4ND of its projector and language part (its vision does not run again). Checkpointing adds a forward of what is recomputed. The
    head counts at supervised tokens only. Left out: attention scores (about a tenth more at 0.5B and 900 tokens) and the losses.
    """
    total = 0.0
    reached = False  # by the gradient: some part up to here is trained
    for part, forward in _forward(student, tokens).items():
        reached = reached or part in work.trained
        total += forward * (1 + reached + (part in work.trained) + (reached and work.checkpointed))
    cost = {"student": total, "teacher": 0.0, "switch": 0.0}
    if teacher is not None and work.teacher:
        theirs = _forward(teacher, teacher_tokens or tokens)
        cost["teacher"] = sum(theirs.values())
        if work.switch:
            cost["switch"] = (theirs["projector"] + theirs["language"]) * (3 if work.recomputed_switch else 2)
    return cost


def memory(
    student: Sizes,
    tokens: Tokens,
    work: Work,
    *,
    micro: int,
    devices: int,
    sharded: bool,
    mixed: bool,
    states: int,
    averaged: bool = False,
    teacher: Sizes | None = None,
    teacher_tokens: Tokens | None = None,
) -> dict[str, float]:
    """Bytes on each device at the peak of a step, by what they hold.

    Weights, gradients and ``states`` optimiser states (Adam 2, SGD with momentum 1) are in the dtype of the student's weights. Under
    DDP each process holds all of them, and gradients a second time in DDP's buckets; under FSDP2 (``sharded``) each holds 1/devices
    of them and, gathered in 2 bytes, the embedding and two blocks. ``mixed``: autocast keeps a 2-byte copy of the trained weights
    (DDP). The teacher is whole on every device either way. ``averaged``: an EMA of the student.
    Activations: `activation_bytes` of the ``micro`` samples in flight. Logits: `linear.workspace_bytes` of the supervised tokens, one head
    a route. Left out: the allocator's fragmentation, NCCL: keep a tenth of the device free.
    """
    size = student.weight_bytes / student.total
    trained = sum(student.parameters[part] for part in work.trained)
    share = devices if sharded else 1
    block = student.language.parameters / student.language.layers
    held = {
        "weights": student.weight_bytes / share,
        "gradients": trained * size / share,
        "optimizer": states * trained * size / share,
        "buckets": 0.0 if sharded or devices == 1 else trained * size,
        "gathered": 2 * (student.embedding + 2 * block) if sharded else (2.0 * trained if mixed else 0.0),
        "average": student.weight_bytes if averaged else 0.0,
        "teacher": 0.0,
        "activations": micro * activation_bytes(student, tokens, work, mixed=mixed),
        "logits": 0.0,
    }
    heads = [student.vocabulary]
    if teacher is not None:
        held["teacher"] = teacher.weight_bytes
    if teacher is not None and work.teacher:
        theirs = teacher_tokens or tokens
        heads += [teacher.vocabulary] * (2 if work.switch else 1)
        if work.switch:
            half = teacher.weight_bytes < 4 * teacher.total
            whole, layers = frozen_block_bytes(teacher.language, half=half), teacher.language.layers
            kept = whole + (2 if half else 4) * teacher.language.width * layers if work.recomputed_switch else whole * layers
            held["activations"] += micro * theirs.all * kept
    held["logits"] = float(workspace_bytes(round(micro * tokens.answer), heads))
    return held


def activation_bytes(student: Sizes, tokens: Tokens, work: Work, *, mixed: bool) -> float:
    """Bytes that one sample leaves for the backward pass: every block from the first trained part on, or, checkpointed,
    4 bytes x width a token and block, and one whole block. `trained_block_bytes` a token."""
    vision = replace(student.vision, layers=student.vision.layers if "vision" in work.trained else 0)
    towers = ((vision, tokens.image * student.merge, False), (student.language, tokens.all, True))
    if not work.checkpointed:
        return sum(trained_block_bytes(tower, gated=gated, mixed=mixed) * tower.layers * count for tower, count, gated in towers)
    whole = max(trained_block_bytes(tower, gated=gated, mixed=mixed) * count for tower, count, gated in towers if tower.layers)
    return whole + sum(4 * tower.width * tower.layers * count for tower, count, _ in towers)


def trained_block_bytes(tower: Tower, *, gated: bool, mixed: bool) -> float:
    """Bytes that a trained block with a fused attention keeps a token.

    Counted on what autograd saves in transformers' Qwen2 (gated MLP) and SigLIP blocks with float32 weights: 32 width + 8 inner and
    24 width + 4 inner under bf16 autocast (``mixed``; the residual stream stays float32), twice the part of ``inner`` without.
    A frozen language part before which something is trained keeps less; it is counted as trained.
    """
    width, inner = (32, 8) if gated else (24, 4)
    return width * tower.width + (1 if mixed else 2) * inner * tower.inner


def frozen_block_bytes(tower: Tower, *, half: bool) -> float:
    """Bytes that a frozen block with a gated MLP keeps a token so that gradient can pass: 12 width + 6 inner with 2-byte
    weights (``half``; counted as in `trained_block_bytes`), twice that in float32."""
    return (1 if half else 2) * (12 * tower.width + 6 * tower.inner)


def _forward(sizes: Sizes, tokens: Tokens) -> dict[str, float]:
    head = sizes.vocabulary * sizes.language.width
    return {
        "vision": 2 * sizes.vision.parameters * tokens.image * sizes.merge,
        "projector": 2 * sizes.projector * tokens.image,
        "language": 2 * sizes.language.parameters * tokens.all + 2 * head * tokens.answer,
    }


def _number(config: Any, *names: str) -> int:
    """The first of these that the configuration gives as a number, else 0."""
    return next((value for name in names if isinstance(value := getattr(config, name, None), int)), 0)
