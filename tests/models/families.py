"""Vision-language families as real transformers classes, small enough to run in milliseconds on one core.

``build(name)`` gives a model of random weights in eval mode and one batch for it, as its processor would make it: image
placeholders in the right number, padding, masks, grids and labels.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from limbeck.models.loading import ensure_torchvision

ensure_torchvision()

import transformers  # noqa: E402

IMAGE, PAD, VOCABULARY = 95, 0, 100
Sizes = dict[str, Any]
Built = tuple[nn.Module, dict[str, Tensor]]

DEFAULTS: Sizes = {
    "vision_width": 32,
    "vision_layers": 2,
    "text_width": 32,
    "text_layers": 2,
    "vocabulary": VOCABULARY,
    "image": 16,
    "patch": 4,
}


def build(name: str, seed: int = 0, **sizes: Any) -> Built:
    """(model, inputs) of a family in `FAMILIES`.

    seed: of the weights; the inputs depend on the sizes alone. sizes: overrides of `DEFAULTS`, and of fields of the family's own
    configuration (e.g. ``text={"final_logit_softcapping": 5.0}``).
    """
    sizes = {**DEFAULTS, **sizes}
    torch.manual_seed(seed)
    config, inputs = BUILDERS[name](sizes)
    model = transformers.AutoModelForImageTextToText.from_config(config).float().eval()
    with torch.no_grad():
        for parameter in model.parameters():  # the tiny initial weights would hide differences below any tolerance
            if parameter.dim() > 1:
                parameter.normal_(std=parameter[0].numel() ** -0.5)
    return model, inputs


def _text(sizes: Sizes, kind: str = "qwen2", **more: Any) -> dict[str, Any]:
    width = sizes["text_width"]
    return {
        "model_type": kind,
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "num_hidden_layers": sizes["text_layers"],
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": sizes["vocabulary"],
        "max_position_embeddings": 256,
        "pad_token_id": PAD,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "tie_word_embeddings": False,
        **more,
        **sizes.get("text", {}),
    }


def _vit(sizes: Sizes, kind: str, **more: Any) -> dict[str, Any]:
    width = sizes["vision_width"]
    return {
        "model_type": kind,
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "num_hidden_layers": sizes["vision_layers"],
        "num_attention_heads": 4,
        "image_size": sizes["image"],
        "patch_size": sizes["patch"],
        **more,
    }


def _words(placeholders: list[int], *, left: bool = False, around: tuple[int, int] = (1, 6)) -> dict[str, Tensor]:
    """A batch of one prompt a sample, ``placeholders[i]`` image tokens in sample i; the last sample has two words less."""
    before, after = around
    rows = []
    for index, count in enumerate(placeholders):
        draw = torch.Generator().manual_seed(index)
        words = torch.randint(3, 90, (before + after - 2 * (index == len(placeholders) - 1),), generator=draw).tolist()
        rows.append(words[:before] + [IMAGE] * count + words[before:])
    length = max(map(len, rows))
    pads = [[PAD] * (length - len(row)) for row in rows]
    ids = torch.tensor([pad + row if left else row + pad for row, pad in zip(rows, pads, strict=True)])
    mask = torch.tensor(
        [
            [0] * len(pad) + [1] * len(row) if left else [1] * len(row) + [0] * len(pad)
            for row, pad in zip(rows, pads, strict=True)
        ]
    )
    labels = ids.masked_fill((ids == IMAGE) | (mask == 0), -100)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def _pixels(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(7))


def _patches(sizes: Sizes) -> int:
    return (sizes["image"] // sizes["patch"]) ** 2


def _llava(sizes: Sizes) -> tuple[Any, dict[str, Tensor]]:
    config = transformers.LlavaConfig(
        vision_config=_vit(sizes, "clip_vision_model"), text_config=_text(sizes), image_token_index=IMAGE, vision_feature_layer=-2
    )
    return config, {**_words([_patches(sizes)] * 2), "pixel_values": _pixels(2, 3, sizes["image"], sizes["image"])}


def _tiled(config_class: Callable[..., Any], vision: dict[str, Any], sizes: Sizes, **more: Any) -> tuple[Any, dict[str, Tensor]]:
    """Two images of two by one tiles beside the overview; the packing appends a newline to every row of tiles' patches."""
    side, image = sizes["image"] // sizes["patch"], sizes["image"]
    config = config_class(
        vision_config=vision,
        text_config=_text(sizes),
        image_token_index=IMAGE,
        image_grid_pinpoints=[[image, 2 * image], [2 * image, image]],
        **more,
    )
    placeholders = side * side + 2 * side * (side + 1)  # the overview; 2 * side rows, each with a newline
    return config, {
        **_words([placeholders] * 2, left=True),
        "pixel_values": _pixels(2, 3, 3, image, image),
        "image_sizes": torch.tensor([[2 * image, image]] * 2),
    }


def _llava_next(sizes: Sizes) -> tuple[Any, dict[str, Tensor]]:
    return _tiled(transformers.LlavaNextConfig, _vit(sizes, "clip_vision_model"), sizes, vision_feature_layer=-2)


def _llava_onevision(sizes: Sizes) -> tuple[Any, dict[str, Tensor]]:
    vision = _vit(sizes, "siglip_vision_model", vision_use_head=False)
    return _tiled(transformers.LlavaOnevisionConfig, vision, sizes, video_token_index=IMAGE + 1)


def _qwen(config_class: Callable[..., Any], vision: dict[str, Any], sizes: Sizes, **text: Any) -> tuple[Any, dict[str, Tensor]]:
    """Two images of 4 x 4 and 4 x 8 patches, merged two by two."""
    grids = torch.tensor([[1, 4, 4], [1, 4, 8]])
    config = config_class(
        vision_config={"patch_size": 4, "spatial_merge_size": 2, "temporal_patch_size": 2, "in_channels": 3, **vision},
        text_config={key: value for key, value in _text(sizes, **text).items() if key != "model_type"},
        image_token_id=IMAGE,
        video_token_id=IMAGE + 1,
        vision_start_token_id=IMAGE + 2,
        vision_end_token_id=IMAGE + 3,
    )
    words = _words((grids.prod(-1) // 4).tolist(), left=True)
    return config, {
        **words,
        "pixel_values": _pixels(int(grids.prod(-1).sum()), 3 * 2 * 4 * 4),
        "image_grid_thw": grids,
        "mm_token_type_ids": (words["input_ids"] == IMAGE).int(),
    }


def _qwen2_vl(sizes: Sizes) -> tuple[Any, dict[str, Tensor]]:
    vision = {
        "depth": sizes["vision_layers"],
        "embed_dim": sizes["vision_width"],
        "hidden_size": sizes["text_width"],
        "num_heads": 4,
    }
    return _qwen(transformers.Qwen2VLConfig, vision, sizes, rope_parameters=_MROPE)


def _qwen2_5_vl(sizes: Sizes) -> tuple[Any, dict[str, Tensor]]:
    vision = {
        "depth": sizes["vision_layers"],
        "hidden_size": sizes["vision_width"],
        "intermediate_size": 2 * sizes["vision_width"],
        "out_hidden_size": sizes["text_width"],
        "num_heads": 4,
        "window_size": 16,
        "fullatt_block_indexes": [1],
    }
    return _qwen(transformers.Qwen2_5_VLConfig, vision, sizes, rope_parameters=_MROPE)


def _qwen3_vl(sizes: Sizes) -> tuple[Any, dict[str, Tensor]]:
    vision = {
        "depth": sizes["vision_layers"],
        "hidden_size": sizes["vision_width"],
        "intermediate_size": 2 * sizes["vision_width"],
        "out_hidden_size": sizes["text_width"],
        "num_heads": 4,
        "num_position_embeddings": 16,
        "deepstack_visual_indexes": [0],
    }
    return _qwen(transformers.Qwen3VLConfig, vision, sizes, head_dim=8, rope_parameters=_MROPE)


def _shuffled(config_class: Callable[..., Any], kind: str, sizes: Sizes) -> tuple[Any, dict[str, Tensor]]:
    """Sample 0 has two images, sample 1 one and a padding image of zeros, which the family drops; patches merge two by two."""
    text = _text(sizes, "llama")
    config = config_class(vision_config=_vit(sizes, kind), text_config=text, image_token_id=IMAGE, scale_factor=2)
    image = sizes["image"]
    pixels = _pixels(2, 2, 3, image, image)
    pixels[1, 1] = 0
    seen = torch.ones(2, 2, image, image, dtype=torch.bool)
    seen[1, 1] = False
    count = _patches(sizes) // 4
    return config, {**_words([2 * count, count]), "pixel_values": pixels, "pixel_attention_mask": seen}


def _smolvlm(sizes: Sizes) -> tuple[Any, dict[str, Tensor]]:
    return _shuffled(transformers.SmolVLMConfig, "smolvlm_vision", sizes)


def _idefics3(sizes: Sizes) -> tuple[Any, dict[str, Tensor]]:
    return _shuffled(transformers.Idefics3Config, "idefics3_vision", sizes)


def _internvl(sizes: Sizes) -> tuple[Any, dict[str, Tensor]]:
    config = transformers.InternVLConfig(
        vision_config=_vit(sizes, "internvl_vision"), text_config=_text(sizes), image_token_id=IMAGE, tie_word_embeddings=False
    )
    return config, {**_words([_patches(sizes) // 4] * 2), "pixel_values": _pixels(2, 3, sizes["image"], sizes["image"])}


def _gemma3(sizes: Sizes) -> tuple[Any, dict[str, Tensor]]:
    text = _text(sizes, "gemma3_text", head_dim=8, query_pre_attn_scalar=8, sliding_window=4)
    vision = _vit(sizes, "siglip_vision_model", vision_use_head=False)
    config = transformers.Gemma3Config(
        vision_config=vision,
        text_config=text,
        image_token_index=IMAGE,
        mm_tokens_per_image=_patches(sizes) // 4,
        boi_token_index=96,
        eoi_token_index=97,
    )
    words = _words([_patches(sizes) // 4] * 2, left=True)
    pixels = _pixels(2, 3, sizes["image"], sizes["image"])
    return config, {**words, "pixel_values": pixels, "token_type_ids": (words["input_ids"] == IMAGE).long()}


def _paligemma(sizes: Sizes) -> tuple[Any, dict[str, Tensor]]:
    text = _text(sizes, "gemma2", head_dim=8, query_pre_attn_scalar=8, final_logit_softcapping=3.0)
    vision = _vit(sizes, "siglip_vision_model", vision_use_head=False)
    config = transformers.PaliGemmaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=IMAGE,
        projection_dim=sizes["text_width"],
        hidden_size=sizes["text_width"],
        vocab_size=sizes["vocabulary"],
    )
    words = _words([_patches(sizes)] * 2, around=(0, 7))
    suffix = torch.arange(words["input_ids"].shape[1]) >= _patches(sizes) + 3
    pixels = _pixels(2, 3, sizes["image"], sizes["image"])
    return config, {**words, "pixel_values": pixels, "token_type_ids": suffix.long().expand(2, -1).contiguous()}


def _fast_vlm(sizes: Sizes) -> tuple[Any, dict[str, Tensor]]:
    """FastViT as its transformers config names it, with one block a stage; 64 pixels give 2 x 2 tokens."""
    pytest.importorskip("timm", reason="FastVLM sees through timm")
    width = sizes["vision_width"]
    fastvit = {"layers": [1, 1, 1, 1], "embed_dims": [width // 8, width // 8, width // 4, width // 2], "inference_mode": True}
    vision = {
        "model_type": "timm_wrapper",
        "architecture": "fastvit_t8",
        "do_pooling": True,
        "global_pool": "avg",
        "hidden_size": width,
    }
    config = transformers.FastVlmConfig(
        vision_config={**vision, "model_args": fastvit}, text_config=_text(sizes), image_token_index=IMAGE
    )
    return config, {**_words([4] * 2), "pixel_values": _pixels(2, 3, 64, 64)}


def _lfm2_vl(sizes: Sizes) -> tuple[Any, dict[str, Tensor]]:
    """Two images of 2 x 2 and 4 x 2 patches, padded to 8, so that the projector is called once an image."""
    text = _text(sizes, "lfm2", layer_types=["conv", "full_attention"], block_auto_adjust_ff_dim=False)
    vision = {
        key: value
        for key, value in _vit(sizes, "siglip2_vision_model", vision_use_head=False, num_patches=16).items()
        if key != "image_size"
    }
    config = transformers.Lfm2VlConfig(
        vision_config=vision, text_config=text, image_token_id=IMAGE, projector_hidden_size=24, tie_word_embeddings=False
    )
    shapes = torch.tensor([[2, 2], [4, 2]])
    return config, {
        **_words([1, 2]),
        "pixel_values": _pixels(2, 8, 3 * sizes["patch"] ** 2),
        "spatial_shapes": shapes,
        "pixel_attention_mask": (torch.arange(8) < shapes.prod(-1, keepdim=True)).long(),
    }


_MROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}

BUILDERS: dict[str, Callable[[Sizes], tuple[Any, dict[str, Tensor]]]] = {
    "llava": _llava,
    "llava_next": _llava_next,
    "llava_onevision": _llava_onevision,
    "qwen2_vl": _qwen2_vl,
    "qwen2_5_vl": _qwen2_5_vl,
    "qwen3_vl": _qwen3_vl,
    "smolvlm": _smolvlm,
    "idefics3": _idefics3,
    "internvl": _internvl,
    "gemma3": _gemma3,
    "paligemma": _paligemma,
    "fast_vlm": _fast_vlm,
    "lfm2_vl": _lfm2_vl,
}

FAMILIES = list(BUILDERS)
