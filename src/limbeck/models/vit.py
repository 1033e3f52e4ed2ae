"""One view of plain vision transformers, of timm and of transformers, that runs their parts one by one.

What masks patches, or stops early, needs the tokens before the first block and after any other, which a model's own forward does not give.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, cast

import torch
from torch import Tensor, nn

from limbeck.errors import BadInput
from limbeck.models.classifier import Classifier

TIMM = "timm.models.vision_transformer.VisionTransformer"
TRANSFORMERS = ("transformers.models.vit.modeling_vit.ViTModel", "transformers.models.vit_mae.modeling_vit_mae.ViTMAEModel")


@dataclass(frozen=True)
class VitView:
    """A vision transformer with absolute positions and at most a class token before its patches.

    embed: pictures [N, C, H, W], as the model is shown them -> tokens with positions [N, prefix + L, D], before the first block.
    blocks: [N, T, D] -> [N, T, D] each, on any number of tokens. norm: what stands after the last one.
    positions: the position embedding, [1, prefix + L, D] or [1, L, D]. prefix: 1 with a class token, else 0. grid: patches down and
    across, L together. patch: rows and columns of pixels. channels: C. width: D.
    """

    embed: Callable[[Tensor], Tensor]
    blocks: Sequence[nn.Module]
    norm: nn.Module
    positions: nn.Parameter
    prefix: int
    grid: tuple[int, int]
    patch: tuple[int, int]
    channels: int
    width: int

    @classmethod
    def of(cls, model: nn.Module) -> VitView:
        """The view of a timm ``VisionTransformer``, a transformers ``ViT...`` or ``ViTMAE...`` model, or a `Classifier` around one.

        Raises `BadInput` for any other model, and for one with registers or another token than a class token before its patches.
        """
        model = model.model if isinstance(model, Classifier) else model
        if TIMM in _ancestry(model):
            return _of_timm(cls, model)
        base = getattr(model, getattr(model, "base_model_prefix", ""), model)
        if _ancestry(base).intersection(TRANSFORMERS):
            return _of_transformers(cls, base)
        raise BadInput(
            f"{type(model).__name__} is no plain vision transformer; expected a VisionTransformer of timm, or a ViT or ViTMAE model of "
            "transformers"
        )

    @property
    def patches(self) -> int:
        """L, the number of patches of a picture."""
        return self.grid[0] * self.grid[1]

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the pictures that it takes, in pixels."""
        return self.grid[0] * self.patch[0], self.grid[1] * self.patch[1]

    def run(self, tokens: Tensor, last: int | None = None) -> list[Tensor]:
        """The tokens [N, T, D] after each block from 0 to ``last`` (None: all of them); later blocks do not run."""
        maps: list[Tensor] = []
        for block in islice(self.blocks, None if last is None else last + 1):
            tokens = block(tokens)
            maps.append(tokens)
        return maps

    def encode(self, pixel_values: Tensor) -> Tensor:
        """Pictures [N, C, H, W], as the model is shown them -> normalised tokens [N, prefix + L, D]: all patches, all blocks."""
        return self.norm(self.run(self.embed(pixel_values))[-1])

    def check(self, shown: Tensor, owner: str) -> None:
        """Raise `BadInput` where pictures [N, C, H, W] are not of the model's size and channels. owner: whom the message names."""
        if tuple(shown.shape[1:]) != (self.channels, *self.size):
            given, expected = ("x".join(map(str, shape)) for shape in (shown.shape[1:], (self.channels, *self.size)))
            raise BadInput(
                f"the {owner} takes pictures of {expected} (channels, height, width) and is shown {given}; set data.size, or size and "
                f"channels of the {owner}"
            )

    @torch.no_grad()
    def fix_positions(self, patches: Tensor) -> None:
        """Put a fixed embedding [L, D] where the positions are, 0 for the class token, and freeze it."""
        self.positions.zero_()
        self.positions[:, self.positions.shape[1] - self.patches :] = patches.to(self.positions)
        self.positions.requires_grad_(False)


def _ancestry(model: object) -> set[str]:
    """The full names of a model's class and its bases: they are compared by name, so that no library is imported to look."""
    return {f"{base.__module__}.{base.__qualname__}" for base in type(model).__mro__}


def _of_timm(view: type[VitView], model: Any) -> VitView:
    cut, name = model.patch_embed, type(model).__name__
    if model.num_prefix_tokens > 1 or model.num_prefix_tokens != int(model.cls_token is not None):
        raise BadInput(
            f"{name} has {model.num_prefix_tokens} tokens before its patches (registers, distillation); expected a class token or none"
        )
    if model.pos_embed is None:
        raise BadInput(f"{name} has no position embedding, without which the places of visible patches are unknown")
    if not isinstance(getattr(cut, "proj", None), nn.Conv2d) or hasattr(cut, "backbone"):
        raise BadInput(f"{name} cuts its patches by {type(cut).__name__}; expected one convolution")

    def embed(pixel_values: Tensor) -> Tensor:
        return model.norm_pre(model._pos_embed(cut(pixel_values)))

    norm = model.fc_norm if isinstance(model.norm, nn.Identity) else model.norm
    grid, patch, channels = tuple(cut.grid_size), tuple(cut.patch_size), cut.proj.in_channels
    return view(embed, model.blocks, norm, model.pos_embed, model.num_prefix_tokens, grid, patch, channels, model.embed_dim)


def _of_transformers(view: type[VitView], model: Any) -> VitView:
    embeddings = model.embeddings
    cut = embeddings.patch_embeddings

    def embed(pixel_values: Tensor) -> Tensor:
        # ViTMAE's own embeddings mask by themselves, so that the steps are taken here.
        tokens = torch.cat([embeddings.cls_token.expand(len(pixel_values), -1, -1), cut(pixel_values)], dim=1)
        tokens = tokens + embeddings.position_embeddings
        return embeddings.dropout(tokens) if hasattr(embeddings, "dropout") else tokens

    size, patch = _pair(cut.image_size), _pair(cut.patch_size)
    grid = (size[0] // patch[0], size[1] // patch[1])
    blocks = cast(Sequence[nn.Module], model.layers)
    return view(
        embed,
        blocks,
        model.layernorm,
        embeddings.position_embeddings,
        1,
        grid,
        patch,
        cut.num_channels,
        model.config.hidden_size,
    )


def _pair(sides: Any) -> tuple[int, int]:
    return (sides, sides) if isinstance(sides, int) else (sides[0], sides[1])
