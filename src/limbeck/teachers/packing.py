"""Top-k distributions as rows of bytes: 190 bytes for 64 of 151,936 ids.

A row holds the ids in ascending order, Elias-Fano coded (the lower bits as they are, the upper bits as a unary bit-vector: Elias, 1974;
Fano, 1971); their log-probabilities in that order, each as its distance below the largest one, 10 bits of a square-root scale, finest
where the mass is; and two float16: the largest distance and the logarithm of the mass outside the k. The largest log-probability is
not kept: all masses add up to one. All rows of a (k, vocabulary) have one width, so that row i is found without an index.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

from limbeck.losses.top_k import TopK

Bytes = NDArray[np.uint8]

BITS = 10  # of a log-probability
STEPS = 2**BITS - 1
FARTHEST = 64.0  # nats below the likeliest id; what is less likely (below 1e-27 of it) is kept as that
NOTHING = -6e4  # the logarithm of no mass, as float16 holds it
WINDOW = 4  # bytes that hold any field of up to 25 bits, wherever in a byte it starts


@dataclass(frozen=True)
class Packing:
    """Rows of ``k`` of ``vocabulary`` ids, 1 <= k <= vocabulary < 2^25 k, at one softmax temperature."""

    k: int
    vocabulary: int
    temperature: float

    @property
    def low_bits(self) -> int:
        """Bits of an id that are kept as they are: floor(log2(V / k))."""
        return (self.vocabulary // self.k).bit_length() - 1

    @property
    def sections(self) -> tuple[int, int, int]:
        """Bytes of the lower bits, the upper bits and the log-probabilities."""
        upper = self.k + ((self.vocabulary - 1) >> self.low_bits)
        return _bytes(self.k * self.low_bits), _bytes(upper), _bytes(self.k * BITS)

    @property
    def width(self) -> int:
        """Bytes of a row."""
        return sum(self.sections) + 4

    def pack(self, top: TopK) -> Bytes:
        """[M, width] of entries [M, k]; the worst error of a log-probability is 2 sqrt(distance x farthest) / 2046 and float16's of the
        farthest."""
        ids = top.ids.cpu().numpy()
        order = np.argsort(ids, axis=1)
        ids = np.take_along_axis(ids, order, axis=1)  # [M, k]
        distance = np.take_along_axis(top.log_probs.cpu().double().numpy(), order, axis=1)
        distance = distance.max(axis=1, keepdims=True) - distance
        farthest = distance.max(axis=1, keepdims=True).clip(0, FARTHEST).astype(np.float16)
        scale = np.maximum(farthest.astype(np.float64), np.finfo(np.float16).tiny)
        codes = np.rint(STEPS * np.sqrt((distance / scale).clip(0, 1))).astype(np.int64)
        rest = top.log_rest.cpu().double().numpy()[:, None].clip(NOTHING, -6e-8).astype(np.float16)

        upper = np.zeros((len(ids), 8 * self.sections[1]), dtype=np.uint8)
        np.put_along_axis(upper, (ids >> self.low_bits) + np.arange(self.k), 1, axis=1)
        halves = np.concatenate([farthest, rest], axis=1).astype("<f2").view(np.uint8)
        return np.concatenate([_fields(ids, self.low_bits), _packed(upper), _fields(codes, BITS), halves], axis=1)

    def unpack(self, rows: Bytes) -> TopK:
        """Undo `pack`: entries [M, k], the likeliest first. Raises ValueError for bytes that `pack` cannot have written."""
        if rows.ndim != 2 or rows.shape[1] != self.width:
            raise ValueError(f"rows are {list(rows.shape)}; {self.k} of {self.vocabulary} ids take {self.width} bytes")
        low, upper, codes, halves = np.split(rows, np.cumsum(self.sections), axis=1)
        bits = np.unpackbits(upper, axis=1, bitorder="little")
        if (bits.sum(axis=1) != self.k).any():
            raise ValueError("the ids are damaged")
        high = np.flatnonzero(bits).reshape(len(rows), self.k) - np.arange(len(rows))[:, None] * bits.shape[1] - np.arange(self.k)
        ids = (high << self.low_bits) | _field(low, self.k, self.low_bits)  # [M, k], ascending
        farthest, rest = halves.copy().view("<f2").astype(np.float32).T  # [M] each
        possible = (farthest >= 0) & (rest < 0) & np.isfinite(farthest + rest)
        if (ids >= self.vocabulary).any() or (np.diff(ids) <= 0).any() or not possible.all():
            raise ValueError("the ids or their masses are out of range")
        order = np.sort((_field(codes, self.k, BITS) << 32) | ids, axis=1)  # by distance; much faster than argsort
        distance = farthest[:, None] * ((order >> 32) / np.float32(STEPS)).astype(np.float32) ** 2
        largest = np.log(-np.expm1(rest)) - np.log(np.exp(-distance).sum(axis=1))
        return TopK(
            torch.from_numpy(order & 0xFFFFFFFF),
            torch.from_numpy(largest[:, None] - distance),
            torch.from_numpy(rest.copy()),
            self.temperature,
            self.vocabulary,
        )

    def covered(self, rows: Bytes) -> NDArray[np.float64]:
        """[M]: the probability mass of the k ids, without unpacking."""
        rest = np.ascontiguousarray(rows[:, -2:]).view("<f2")[:, 0].astype(np.float64)
        return -np.expm1(rest)


def _bytes(bits: int) -> int:
    return -(-bits // 8)


def _packed(bits: NDArray[Any]) -> Bytes:
    return np.packbits(bits.astype(np.uint8), axis=1, bitorder="little")


def _fields(values: NDArray[np.int64], bits: int) -> Bytes:
    """[M, k] numbers below 2^bits, one after the other."""
    return _packed(((values[:, :, None] >> np.arange(bits)) & 1).reshape(len(values), values.shape[1] * bits))


def _field(packed: Bytes, count: int, bits: int) -> NDArray[np.int64]:
    """Undo `_fields`."""
    if bits == 0:
        return np.zeros((len(packed), count), dtype=np.int64)
    start = np.arange(count) * bits
    padded = np.pad(packed, ((0, 0), (0, WINDOW)))
    windows = np.ascontiguousarray(sliding_window_view(padded, WINDOW, axis=1)[:, start // 8])  # [M, k, WINDOW]
    return ((windows.view("<u4")[:, :, 0] >> (start % 8).astype(np.uint32)) & np.uint32((1 << bits) - 1)).astype(np.int64)
