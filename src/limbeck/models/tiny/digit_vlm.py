"""``digit-vlm-teacher`` and ``digit-vlm-student``: real LLaVA models, small enough to train on a CPU within a minute.

Nothing here is a mock: transformers' own CLIP vision tower, LLaVA projector, Qwen2 language model, tokenizer and processor, built
small from their configurations. They save, load, generate and distil exactly like the large ones.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from limbeck.errors import BadInput
from limbeck.models.loading import ensure_torchvision
from limbeck.models.tiny.classifiers import whole
from limbeck.naming import nearest

if TYPE_CHECKING:
    from transformers import LlavaForConditionalGeneration, LlavaProcessor, PreTrainedTokenizerFast

IMAGE_SIZE = 16
CONTEXT = 512
PIXEL_MEAN, PIXEL_STD = 0.18, 0.29  # of digit-scenes pictures at the defaults

SIZES: dict[str, dict[str, int]] = {
    "digit-vlm-teacher": {
        "vision_width": 48,
        "vision_layers": 2,
        "text_width": 64,
        "text_layers": 2,
        "heads": 4,
        "patch_size": 4,
    },
    "digit-vlm-student": {
        "vision_width": 48,
        "vision_layers": 1,
        "text_width": 48,
        "text_layers": 2,
        "heads": 4,
        "patch_size": 4,
    },
}
"""What each name stands for. The vision width is shared, so that one model's projector can read the other's vision tower."""

STANDARD_TOKENS = {"pad_token": "<pad>", "unk_token": "<unk>", "eos_token": "<end>"}
EXTRA_TOKENS = {"image_token": "<image>", "user_token": "<user>", "assistant_token": "<assistant>"}
# Every number that is asked for or answered (sums of two digits reach 18) is one word: an answer is one token and the end.
WORDS = (
    *("which", "what", "digit", "digits", "is", "top", "bottom", "left", "right", "the", "largest", "sum", "of", "row", "column"),
    *("how", "many", "are", "there", "a", "yes", "no", "?"),
    *(str(number) for number in range(19)),
)
CHAT_TEMPLATE = (
    "{% for message in messages %}<{{ message['role'] }}>"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}<image>{% else %}{{ part['text'] }}{% endif %}{% endfor %}"
    "{% if message['role'] == 'assistant' %}<end>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def build(name: str, seed: int = 0, **sizes: int) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """A freshly initialised model and its processor.

    name: a key of `SIZES`; ``sizes`` override its entries. Both models have one vocabulary; a picture becomes
        (16 / patch_size)^2 tokens. The global random state is left as it was.

    Raises `BadInput` for an unknown name or size, for a size that is no number above 0, or where one does not divide.
    """
    if name not in SIZES:
        raise BadInput(f"unknown tiny model {name!r}: {nearest(name, SIZES)}")
    for key in sizes.keys() - SIZES[name].keys():
        raise BadInput(f"{name} has no size {key!r}: {nearest(key, SIZES[name])}")
    size = SIZES[name] | sizes
    for key, value in size.items():
        if not whole(value):
            raise BadInput(f"{name}: {key} is {value!r}; expected a whole number above 0")
    for key, divisor in (("vision_width", 2 * size["heads"]), ("text_width", 2 * size["heads"])):
        if size[key] % divisor:
            raise BadInput(f"{name}: {key}={size[key]} must be a multiple of {divisor} (heads={size['heads']}, even head width)")
    if IMAGE_SIZE % size["patch_size"]:
        raise BadInput(f"{name}: patch_size={size['patch_size']} must divide the picture's {IMAGE_SIZE} pixels")

    ensure_torchvision()
    from transformers import LlavaForConditionalGeneration

    processor = build_processor(size["patch_size"])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlavaForConditionalGeneration(_config(size, processor.tokenizer))
    return model, processor


def build_processor(patch_size: int = 4) -> LlavaProcessor:
    """The processor of both models: pictures stay 16x16 and are normalised, words become tokens."""
    ensure_torchvision()
    from transformers import CLIPImageProcessorPil, LlavaProcessor

    image_processor = CLIPImageProcessorPil(
        do_resize=False,
        do_center_crop=False,
        size={"height": IMAGE_SIZE, "width": IMAGE_SIZE},
        crop_size={"height": IMAGE_SIZE, "width": IMAGE_SIZE},
        image_mean=[PIXEL_MEAN] * 3,
        image_std=[PIXEL_STD] * 3,
    )
    return LlavaProcessor(
        image_processor=image_processor,
        tokenizer=_tokenizer(),
        patch_size=patch_size,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,  # CLIP's class token, which the strategy "default" drops again
        chat_template=CHAT_TEMPLATE,
    )


def _tokenizer() -> PreTrainedTokenizerFast:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = (*STANDARD_TOKENS.values(), *EXTRA_TOKENS.values(), *WORDS)
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(vocabulary)}, STANDARD_TOKENS["unk_token"]))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=CONTEXT,
        padding_side="right",
        extra_special_tokens=EXTRA_TOKENS,
        **STANDARD_TOKENS,
    )


def _config(size: dict[str, int], tokenizer: PreTrainedTokenizerFast) -> Any:
    from transformers import CLIPVisionConfig, LlavaConfig, Qwen2Config

    vision = CLIPVisionConfig(
        hidden_size=size["vision_width"],
        intermediate_size=2 * size["vision_width"],
        num_hidden_layers=size["vision_layers"],
        num_attention_heads=size["heads"],
        image_size=IMAGE_SIZE,
        patch_size=size["patch_size"],
        projection_dim=size["vision_width"],
    )
    text = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=size["text_width"],
        intermediate_size=3 * size["text_width"],
        num_hidden_layers=size["text_layers"],
        num_attention_heads=size["heads"],
        num_key_value_heads=size["heads"],
        max_position_embeddings=CONTEXT,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
        tie_word_embeddings=False,
    )
    return LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=tokenizer.get_vocab()[EXTRA_TOKENS["image_token"]],
        vision_feature_select_strategy="default",
        vision_feature_layer=-1,
        image_seq_length=(IMAGE_SIZE // size["patch_size"]) ** 2,
        tie_word_embeddings=False,
    )
