"""Parts of a masked autoencoder (MAE, arXiv 2111.06377): which patches are hidden, and who paints them.

The encoder is a vision transformer of any library, over the patches that are left (`limbeck.models.vit`); it is no part of this file.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from limbeck.errors import BadInput

WAVELENGTH = 10_000.0
TOKEN_STD = 0.02


class Masking(NamedTuple):
    """Which patches of each picture are visible.

    keep: [N, V] int64, the positions of the visible patches in the order in which they are shown. restore: [N, L] int64, where each
    patch stands once the removed ones follow the visible ones. mask: [N, L] bool, True where a patch is removed.
    """

    keep: Tensor
    restore: Tensor
    mask: Tensor


def visible_count(patches: int, ratio: float) -> int:
    """V = floor(L (1 - ratio)) of L patches.

    Raises `BadInput` where the ratio is outside [0, 1), or leaves no patch.
    """
    if not 0 <= ratio < 1:
        raise BadInput(f"mask_ratio is {ratio}; expected a share of the patches, from 0 to below 1")
    count = int(patches * (1 - ratio) + 1e-9)  # 100 * (1 - 0.9) is 9.999999999999998 in floating point
    if not count:
        raise BadInput(f"mask_ratio {ratio} leaves none of {patches} patches visible; give {1 - 1 / patches:.4g} or less")
    return count


def random_masking(
    pictures: int,
    patches: int,
    ratio: float,
    *,
    device: torch.device | str | None = None,
    generator: torch.Generator | None = None,
) -> Masking:
    """Remove a share of each picture's patches, every choice being equally likely (MAE, section 3).

    Raises `BadInput` as `visible_count`.
    """
    count = visible_count(patches, ratio)
    order = torch.rand(pictures, patches, device=device, generator=generator).argsort(1)
    restore = order.argsort(1)
    return Masking(order[:, :count], restore, restore >= count)


def visible(tokens: Tensor, keep: Tensor, prefix: int = 0) -> Tensor:
    """The tokens that stay: [N, prefix + L, D] at positions keep [N, V] -> [N, prefix + V, D]. prefix: tokens before the patches."""
    patches = tokens[:, prefix:]
    shown = patches.gather(1, keep.unsqueeze(-1).expand(-1, -1, patches.shape[2]))
    return torch.cat([tokens[:, :prefix], shown], dim=1) if prefix else shown


def in_place(shown: Tensor, filler: Tensor, restore: Tensor) -> Tensor:
    """Visible tokens [N, V, D] at their old places, the filler [1, 1, D] at all others: [N, L, D]."""
    removed = filler.to(shown.dtype).expand(len(shown), restore.shape[1] - shown.shape[1], -1)
    return torch.cat([shown, removed], dim=1).gather(1, restore.unsqueeze(-1).expand(-1, -1, shown.shape[2]))


def patchify(pictures: Tensor, patch: tuple[int, int]) -> Tensor:
    """[N, C, H, W] -> [N, L, p q C]: patches of p rows and q columns, row by row; inside one the channel is fastest.

    Raises `BadInput` where patches do not fill the picture.
    """
    (height, width), (rows, columns) = pictures.shape[2:], patch
    if height % rows or width % columns:
        raise BadInput(f"pictures of {height}x{width} are not filled by patches of {rows}x{columns}")
    cut = pictures.unflatten(3, (-1, columns)).unflatten(2, (-1, rows))  # [N, C, h, p, w, q]
    return cut.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)


def unpatchify(patches: Tensor, patch: tuple[int, int], grid: tuple[int, int]) -> Tensor:
    """The inverse of `patchify`: [N, L, p q C] -> [N, C, H, W]. grid: patches down and across."""
    (rows, columns), (down, across) = patch, grid
    cut = patches.unflatten(2, (rows, columns, -1)).unflatten(1, (down, across))  # [N, h, w, p, q, C]
    return cut.permute(0, 5, 1, 3, 2, 4).flatten(4).flatten(2, 3)


def sincos_positions(width: int, grid: tuple[int, int]) -> Tensor:
    """Fixed position embedding [L, D]: sines and cosines of the column, then of the row, as in MAE's code.

    width: D, a multiple of 4; `BadInput` otherwise.
    """
    if width % 4:
        raise BadInput(f"sine-cosine positions need a width that is a multiple of 4, got {width}")
    frequencies = WAVELENGTH ** -(torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    row, column = torch.meshgrid(*(torch.arange(side, dtype=torch.float64) for side in grid), indexing="ij")
    angles = [axis.reshape(-1, 1) * frequencies for axis in (column, row)]
    return torch.cat([part for angle in angles for part in (angle.sin(), angle.cos())], dim=1).float()


class MaskedDecoder(nn.Module):
    """Pixels of every patch from the tokens of the visible ones (MAE, section 3); pre-trained with an encoder, and thrown away.

    tokens: width D of the encoder's. grid: patches down and across. values: P of a patch. prefix: class tokens before the patches, seen and
    not painted. width, depth, heads: of the decoder's own blocks.
    Raises `BadInput` where the width is no multiple of 4, or not of heads.
    """

    positions: Tensor

    def __init__(
        self,
        tokens: int,
        grid: tuple[int, int],
        values: int,
        *,
        prefix: int = 1,
        width: int = 512,
        depth: int = 8,
        heads: int = 16,
    ) -> None:
        super().__init__()
        if width % heads:
            raise BadInput(f"a decoder of width {width} cannot have {heads} heads: the width must be a multiple of them")
        self.prefix = prefix
        self.embed = nn.Linear(tokens, width)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
        self.register_buffer("positions", sincos_positions(width, grid), persistent=False)
        self.blocks = nn.Sequential(
            *(
                nn.TransformerEncoderLayer(width, heads, 4 * width, 0.0, "gelu", batch_first=True, norm_first=True)
                for _ in range(depth)
            )
        )
        self.norm = nn.LayerNorm(width)
        self.paint = nn.Linear(width, values)
        self.apply(_draw)
        nn.init.normal_(self.mask_token, std=TOKEN_STD)

    def forward(self, tokens: Tensor, restore: Tensor) -> Tensor:
        """Tokens [N, prefix + V, D] of the visible patches, and `Masking.restore` [N, L] -> values [N, L, P] of all patches."""
        embedded = self.embed(tokens)
        patches = in_place(embedded[:, self.prefix :], self.mask_token, restore) + self.positions
        seen = self.blocks(torch.cat([embedded[:, : self.prefix], patches], dim=1))
        return self.paint(self.norm(seen[:, self.prefix :]))


def _draw(module: nn.Module) -> None:
    """MAE's initialisation: Xavier for weights, 0 for biases."""
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        nn.init.zeros_(module.bias)
