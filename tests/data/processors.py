"""Real processors of several families over one small vocabulary, built without any download."""

from __future__ import annotations

from limbeck.models.loading import ensure_torchvision
from limbeck.models.tiny.digit_vlm import WORDS

ensure_torchvision()

import tokenizers  # noqa: E402
import transformers  # noqa: E402

SPECIAL = (
    *("<user>", "<assistant>", "<image>", "<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>"),
    *("<fake_token_around_image>", "<global-img>", "<end_of_utterance>"),
    *(f"<row_{row}_col_{column}>" for row in (1, 2) for column in (1, 2)),
)
VOCABULARY = ("<pad>", "<unk>", "<end>", "<bos>", *SPECIAL, *WORDS)
TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{% for p in m['content'] %}"
    "{% if p['type'] == 'image' %}IMAGE{% else %}{{ p['text'] }}{% endif %}{% endfor %}"
    "{% if m['role'] == 'assistant' %}<end>\n{% endif %}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)


def tokenizer(image_token: str = "<image>") -> transformers.PreTrainedTokenizerFast:
    """A word-level tokenizer over `VOCABULARY`."""
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({word: k for k, word in enumerate(VOCABULARY)}, "<unk>"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    named = {f"special_{k}": token for k, token in enumerate(SPECIAL)}
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=words,
        **{"pad_token": "<pad>", "unk_token": "<unk>", "eos_token": "<end>", "bos_token": "<bos>"},
        extra_special_tokens={**named, "image_token": image_token, "video_token": "<|video_pad|>"},
    )


def llava_next() -> transformers.LlavaNextProcessor:
    """A small picture and one to four crops of 16x16 in 4x4 patches."""
    return transformers.LlavaNextProcessor(
        transformers.LlavaNextImageProcessorPil(
            size={"shortest_edge": 16},
            crop_size={"height": 16, "width": 16},
            image_grid_pinpoints=[[16, 32], [32, 16], [32, 32]],
        ),
        tokenizer(),
        patch_size=4,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=TEMPLATE.replace("IMAGE", "<image>"),
    )


def idefics3() -> transformers.Idefics3Processor:
    """Up to four crops of 16x16 and the whole picture, four tokens each."""
    return transformers.Idefics3Processor(
        transformers.Idefics3ImageProcessorPil(size={"longest_edge": 32}, max_image_size={"longest_edge": 16}),
        tokenizer(),
        image_seq_len=4,
        chat_template=TEMPLATE.replace("IMAGE", "<image>"),
    )


def paligemma() -> transformers.PaliGemmaProcessor:
    """Four tokens a picture and no chat template."""
    image_processor = transformers.SiglipImageProcessorPil(size={"height": 16, "width": 16})
    image_processor.image_seq_length = 4
    return transformers.PaliGemmaProcessor(image_processor, tokenizer())


def qwen2_vl() -> transformers.Qwen2VLProcessor:
    """Pictures of any size, 4x4 patches merged by 2x2: one image token for 8x8 pixels."""
    return transformers.Qwen2VLProcessor(
        image_processor=transformers.Qwen2VLImageProcessorPil(min_pixels=64, max_pixels=4096, patch_size=4, merge_size=2),
        video_processor=transformers.Qwen2VLVideoProcessor(patch_size=4, merge_size=2),
        tokenizer=tokenizer("<|image_pad|>"),
        chat_template=TEMPLATE.replace("IMAGE", "<|vision_start|><|image_pad|><|vision_end|>"),
    )


def qwen2_vl_model(processor: transformers.Qwen2VLProcessor) -> transformers.Qwen2VLForConditionalGeneration:
    """A model of a few thousand random weights that reads what `qwen2_vl` gives."""
    ids = processor.tokenizer.get_vocab()
    config = transformers.Qwen2VLConfig(
        text_config={
            **{"vocab_size": len(ids), "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1},
            **{"num_attention_heads": 2, "num_key_value_heads": 2, "tie_word_embeddings": False},
            "rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10000.0},
        },
        vision_config={"depth": 1, "embed_dim": 16, "num_heads": 2, "patch_size": 4, "hidden_size": 32, "mlp_ratio": 2},
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
    )
    return transformers.Qwen2VLForConditionalGeneration(config).eval()
