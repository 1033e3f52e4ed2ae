"""Prototypes: a few vectors that stand for local parts, learned from one network's tokens and read by another's."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from limbeck.errors import BadInput
from limbeck.losses._common import upcast
from limbeck.modules.projectors import Layout, as_map


class Aggregate(NamedTuple):
    """What prototypes make of tokens. vector: [B, K * C], of unit norm. assignment: [B, N, K], rows sum to 1."""

    vector: Tensor
    assignment: Tensor


def residuals(tokens: Tensor, assignment: Tensor, prototypes: Tensor) -> Tensor:
    """What is left of tokens at each prototype: V_k = sum_n a_nk (x_n - P_k) (NetVLAD, arXiv 1511.07247, eq. 1).

    tokens: [B, N, C]; assignment: [B, N, K]; prototypes: [K, C]. Returns [B, K, C].
    """
    return assignment.mT @ tokens - assignment.sum(1).unsqueeze(-1) * prototypes


class VLAD(nn.Module):
    """Tokens assigned softly to prototypes, and what each prototype does not explain of them, as one vector (NetVLAD).

    width: C of tokens and prototypes; prototypes: their number K. A token counts by its direction only: it is L2-normalised
    first. The residuals of each prototype are L2-normalised, and so is the whole.
    """

    def __init__(self, width: int, prototypes: int, *, bias: bool = False) -> None:
        super().__init__()
        self.assign = nn.Linear(width, prototypes, bias=bias)

    def forward(self, tokens: Tensor, prototypes: Tensor) -> Aggregate:
        """tokens: [B, N, C]; prototypes: [K, C]. Raises `BadInput` where their widths differ."""
        check_width(tokens, self.assign.in_features)
        directions = F.normalize(upcast(tokens), dim=-1)
        assignment = upcast(self.assign(directions)).softmax(-1)
        with torch.autocast(tokens.device.type, enabled=False):
            left = F.normalize(residuals(directions, assignment, prototypes.to(directions.dtype)), dim=-1)
        return Aggregate(F.normalize(left.flatten(1), dim=-1), assignment)


class PrototypeLearning(nn.Module):
    """Several blocks' tokens, merged, with what prototypes say of them all put beside each (ProC-KD, arXiv 2212.13180).

    X = ReLU(W_c [T_1; T_2; ...]); v = W_v VLAD(X); Y = ReLU(W_2 ReLU(W_1 [X; v])), v beside every token.

    widths: of the blocks' tokens; width: C of what comes out; prototypes: their number K. bias: of the assignment and of W_1,
    W_2, in the paper 1x1 convolutions; W_c and W_v always have one.
    """

    def __init__(self, widths: Sequence[int], width: int, prototypes: int, *, bias: bool = False) -> None:
        super().__init__()
        self.merge = nn.Linear(sum(widths), width)
        self.vlad = VLAD(width, prototypes, bias=bias)
        self.compress = nn.Linear(prototypes * width, width)
        self.transform = two_layers(width, bias)

    def merged(self, tokens: Tensor) -> Tensor:
        """X: all blocks' tokens [B, N, sum of widths] -> [B, N, C], >= 0. Raises `BadInput` for another width."""
        check_width(tokens, self.merge.in_features)
        return self.merge(tokens).relu()

    def forward(self, tokens: Tensor, prototypes: Tensor) -> Tensor:
        """Y: all blocks' tokens [B, N, sum of widths], prototypes [K, C] -> [B, N, C], >= 0."""
        merged = self.merged(tokens)
        whole = self.compress(self.vlad(merged, prototypes).vector.to(merged.dtype))
        return self.transform(torch.cat([merged, whole.unsqueeze(1).expand_as(merged)], dim=-1))


class PrototypeAttention(nn.Module):
    """Tokens that look at prototypes, and are augmented by what they find (ProC-KD, arXiv 2212.13180).

    s_nk = softmax_k <E P_k, E z_n>, not scaled; r_n = sum_k s_nk E P_k; out = ReLU(ReLU(A_2 ReLU(A_1 [E z; r])) + z).

    It owns the prototypes [K, C], which start as directions drawn at random, none of their entries negative, as tokens after a
    ReLU are. Neither the number of tokens nor where they stand matters. bias: of E, A_1 and A_2.
    """

    def __init__(self, width: int, prototypes: int, *, bias: bool = False) -> None:
        super().__init__()
        self.prototypes = nn.Parameter(F.normalize(torch.rand(prototypes, width), dim=-1))
        self.encode = nn.Linear(width, width, bias=bias)
        self.augment = two_layers(width, bias)

    def attend(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Queries q [B, N, C] and scores s [B, N, K] of tokens [B, N, C]. Raises `BadInput` for another width."""
        check_width(tokens, self.encode.in_features)
        queries, keys = self.encode(tokens), self.encode(self.prototypes)
        return queries, upcast(queries @ keys.mT).softmax(-1)

    def forward(self, tokens: Tensor) -> Tensor:
        """[B, N, C] -> [B, N, C], >= 0."""
        queries, scores = self.attend(tokens)
        found = scores.to(queries.dtype) @ self.encode(self.prototypes)
        return (self.augment(torch.cat([queries, found], dim=-1)) + tokens).relu()


def as_tokens(features: Tensor) -> Tensor:
    """A map [B, C, H, W] as tokens [B, H * W, C]; tokens as they are."""
    return features.flatten(2).mT if features.dim() == 4 else features


def joined(features: Sequence[Tensor]) -> Tensor:
    """Several blocks' tokens [B, N, C_i] or maps [B, C_i, H, W] as one: [B, 1 + N, sum of C_i], the class token first.

    Where there is none the mean token stands for it. Maps of different size are averaged to the least height and width. Raises
    `BadInput` where that is needed and tokens have no grid.
    """
    if all(one.dim() == 3 for one in features) and len({one.shape[1] for one in features}) == 1:
        tokens = torch.cat(list(features), dim=-1)
        return tokens if _has_class_token(tokens) else torch.cat([tokens.mean(1, keepdim=True), tokens], dim=1)
    grids = [as_map(one) for one in features]
    size = (min(grid.shape[2] for grid in grids), min(grid.shape[3] for grid in grids))
    patches = torch.cat([F.adaptive_avg_pool2d(grid, size) for grid in grids], dim=1)
    first = [
        one[:, 0] if one.dim() == 3 and _has_class_token(one) else grid.mean((2, 3))
        for one, grid in zip(features, grids, strict=True)
    ]
    return torch.cat([torch.cat(first, dim=-1).unsqueeze(1), patches.flatten(2).mT], dim=1)


def _has_class_token(tokens: Tensor) -> bool:
    """Tokens whose number is a square are patches alone; of any other number, the first is a class token."""
    layout = Layout.of(tokens.shape)
    return layout.class_token or layout.is_sequence


def two_layers(width: int, bias: bool) -> nn.Sequential:
    """[..., 2 C] -> [..., C]: two linear layers, a ReLU after each."""
    return nn.Sequential(nn.Linear(2 * width, width, bias=bias), nn.ReLU(), nn.Linear(width, width, bias=bias), nn.ReLU())


def check_width(tokens: Tensor, width: int) -> None:
    """Raise `BadInput` unless these are tokens [B, N, width]."""
    if tokens.dim() != 3 or tokens.shape[-1] != width:
        raise BadInput(
            f"tokens are {list(tokens.shape)}; expected [B, N, {width}]: prototypes are as wide as the tokens that they explain"
        )


def usage(assignment: Tensor) -> Tensor:
    """How evenly prototypes are used: the entropy of the mean assignment over log K, 1 if all alike, 0 if only one. [B, N, K] ->
    scalar.

    A single prototype is always used: 1.
    """
    count = assignment.shape[-1]
    mean = upcast(assignment).flatten(0, -2).mean(0)
    entropy = torch.special.entr(mean).sum()
    return entropy / math.log(count) if count > 1 else torch.ones_like(entropy)
