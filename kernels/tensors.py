"""The two quantised operands every matmul takes, and the checks all ops share."""

from typing import NamedTuple

import torch
from torch import Tensor

from exactmoe.kernels.errors import require
from exactmoe.kernels.formats import BLOCK, QuantFormat

PROFILES = ("q8_k", "q16_k")
"""Activation profiles: 8 bits as one int8 slice, or 15 bits as two."""


class QuantMatrix(NamedTuple):
    """Quantised weights, never expanded: rows of blocks as the file holds them, but Q4_K in two planes.

    A Q4_K block is 16 bytes of scales, its head, before 128 of codes. Apart, codes are whole lines of memory, and a
    load of them touches no line that another one needs."""

    data: Tensor  # [..., N, K / 256 * block_bytes] u8; of Q4_K the codes, [..., N, K / 256 * 128]
    format: QuantFormat
    n: int  # output features
    k: int  # input features
    heads: Tensor | None = None  # of Q4_K, [..., N, K / 256 * 16] u8, behind the codes in memory

    def rows(self, first: int, count: int) -> "QuantMatrix":
        """`count` rows of a matrix from `first` on, where they lie."""
        heads = None if self.heads is None else self.heads[first : first + count]
        return self._replace(data=self.data[first : first + count], n=count, heads=heads)

    def as_in_file(self) -> Tensor:
        """The rows as the file has them, u8 [..., N, K / 256 * block_bytes]: a copy of Q4_K, else `data` itself."""
        if self.heads is None:
            return self.data
        blocks = self.k // BLOCK
        parts = (part.unflatten(-1, (blocks, -1)) for part in (self.heads, self.data))
        return torch.cat([*parts], dim=-1).flatten(-2)


class Activations(NamedTuple):
    """Quantised activation rows. x = scale * q (q8_k), or scale * (128*q[0] + q[1]) (q16_k)."""

    q: Tensor  # [S, T, K] i8, S slices: 1 for q8_k, 2 for q16_k
    scale: Tensor  # [T, K / 256] f32
    group_sum: Tensor  # [S, T, K / 16] i16, exact sums of q over groups of 16


def slices(profile: str) -> int:
    """Number of int8 slices of an activation profile; raises InvalidInput for an unknown one."""
    require(profile in PROFILES, f"activation profile must be one of {', '.join(PROFILES)}, got {profile!r}")
    return PROFILES.index(profile) + 1


def quant_matrix(data: Tensor, fmt: QuantFormat, name: str) -> QuantMatrix:
    """The matrix whose rows the file holds as u8 `data` [..., N, row_bytes]: a copy of Q4_K, else around `data`.

    Raises InvalidInput naming `name` when the bytes do not fit the format."""
    require(data.dtype == torch.uint8, f"{name}: quantised weights must be u8, got {data.dtype}")
    require(data.ndim >= 2, f"{name}: quantised weights need at least 2 dimensions, got {data.ndim}")
    require(data.is_contiguous(), f"{name}: quantised weights must be contiguous")
    row = data.shape[-1]
    require(
        row > 0 and row % fmt.block_bytes == 0,
        f"{name}: a row of {row} bytes is not a whole number of {fmt.name} blocks of {fmt.block_bytes} bytes",
    )
    n, blocks = data.shape[-2], row // fmt.block_bytes
    if not fmt.head_bytes:
        return QuantMatrix(data, fmt, n, blocks * BLOCK)
    count = data.numel() // fmt.block_bytes
    codes, heads = torch.empty_like(data.view(-1)).split([count * fmt.data_bytes, count * fmt.head_bytes])
    head, code = data.view(count, -1).split([fmt.head_bytes, fmt.data_bytes], dim=1)
    for plane, part in ((heads, head), (codes, code)):
        plane.view(count, -1).copy_(part)
    rows = data.shape[:-1]
    return QuantMatrix(codes.view(*rows, -1), fmt, n, blocks * BLOCK, heads.view(*rows, -1))


def require_f32(x: Tensor, name: str, *shape: int | None) -> None:
    """Refuse `x` unless it is a contiguous f32 tensor of `shape` (None matches any extent)."""
    require(x.dtype == torch.float32, f"{name} must be f32, got {x.dtype}")
    require_shape(x, name, *shape)


def require_shape(x: Tensor, name: str, *shape: int | None) -> None:
    """Refuse `x` unless it is contiguous and of `shape` (None matches any extent)."""
    fits = x.ndim == len(shape) and all(want is None or got == want for got, want in zip(x.shape, shape, strict=True))
    wanted = ", ".join("any" if s is None else str(s) for s in shape)
    require(fits, f"{name} must have shape [{wanted}], got {list(x.shape)}")
    require(x.is_contiguous(), f"{name} must be contiguous")


def require_activations(x: Activations, k: int, name: str) -> None:
    """Refuse activations whose width is not `k` or whose parts do not belong together."""
    require(
        x.q.ndim == 3 and x.q.dtype == torch.int8, f"{name}: q must be i8 [S, T, K], got {x.q.dtype} {list(x.q.shape)}"
    )
    require(x.q.shape[0] in (1, 2), f"{name}: 1 or 2 slices, got {x.q.shape[0]}")
    require(x.q.shape[2] == k, f"{name}: activations of width {x.q.shape[2]} meet weights of width {k}")
    require_f32(x.scale, f"{name}: scale", x.q.shape[1], k // BLOCK)
    require_shape(x.group_sum, f"{name}: group_sum", x.q.shape[0], x.q.shape[1], k // 16)
