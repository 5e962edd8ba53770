"""What a later kernel reads, on its way to the L2 cache, asked for by one that leaves the memory idle.

Nothing is computed and nothing waits: bits cannot depend on it."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from exactmoe.kernels.errors import require
from exactmoe.kernels.launch import interpreting

_INTERPRETED = tl.constexpr(interpreting())
_LINE = tl.constexpr(128)


def spans(later: Sequence[Tensor], most: int) -> tuple[tuple[Tensor | None, ...], tuple[int, ...]]:
    """Up to `most` contiguous tensors as a kernel takes them: `most` of them, and their bytes."""
    require(len(later) <= most, f"at most {most} tensors are fetched ahead, got {len(later)}")
    for tensor in later:
        require(tensor.is_contiguous(), "what is fetched ahead must be contiguous")
    none = most - len(later)
    return (*later, *(None,) * none), (*(tensor.nbytes for tensor in later), *(0,) * none)


@triton.jit
def prefetch(ptr, BYTES: tl.constexpr, part, PARTS: tl.constexpr, THREADS: tl.constexpr):
    """Ask for share `part`, of PARTS, of the BYTES bytes at `ptr`; a no-op where there are none."""
    if not _INTERPRETED and BYTES > 0:
        lines: tl.constexpr = (BYTES + _LINE - 1) // _LINE
        share: tl.constexpr = (lines + PARTS - 1) // PARTS
        for i in tl.static_range(0, share, THREADS):
            own = i + tl.arange(0, THREADS)
            line = part * share + own
            byte_ptr = ptr.to(tl.pointer_type(tl.int8), bitcast=True)
            _ask(byte_ptr + line.to(tl.int64) * _LINE, (own < share) & (line < lines))


class Past(NamedTuple):
    """Rows before a position that only the device knows."""

    rows: Tensor  # [P, ...]
    position: Tensor  # [1] i32
    most: int  # rows that are asked for, from the first on


def past_arguments(past: Past | None) -> tuple[tuple[Tensor | None, Tensor | None], dict[str, int]]:
    """What a kernel that calls `prefetch_past` is given: its pointers, and its constants by name."""
    if past is None:
        return (None, None), {"PAST_ROW": 0, "PAST_MOST": 0}
    require(past.rows.is_contiguous(), "what is fetched ahead must be contiguous")
    require(past.position.dtype == torch.int32 and past.position.numel() == 1, "position must be one i32")
    P = past.rows.shape[0]
    require(0 < past.most, f"at least one row is fetched ahead, got {past.most}")
    return (past.position, past.rows), {"PAST_ROW": past.rows.nbytes // P, "PAST_MOST": min(past.most, P)}


@triton.jit
def past_lines(past, ROW: tl.constexpr, MOST: tl.constexpr):
    """Lines that `prefetch_past` asks for. It loads the position, so it is called before a wait."""
    if _INTERPRETED or ROW == 0:
        return 0
    else:
        return (tl.minimum(tl.load(past[0]), MOST) * ROW + _LINE - 1) // _LINE


@triton.jit
def prefetch_past(
    past, lines, ROW: tl.constexpr, MOST: tl.constexpr, part, PARTS: tl.constexpr, THREADS: tl.constexpr,
):  # fmt: skip
    """Ask for share `part`, of PARTS, of the first `lines` lines of rows of ROW bytes, at most MOST of them.

    A thread asks for a line at a time, and all programs together for lines side by side. `past` and the constants are
    those of `past_arguments`."""
    if not _INTERPRETED and ROW > 0:
        byte_ptr = past[1].to(tl.pointer_type(tl.int8), bitcast=True)
        for start in tl.static_range(0, (MOST * ROW + _LINE - 1) // _LINE, PARTS * THREADS):
            line = start + part * THREADS + tl.arange(0, THREADS)
            _ask(byte_ptr + line.to(tl.int64) * _LINE, line < lines)


@triton.jit
def prefetch_rows(ptr, s, last, g, G: tl.constexpr, C: tl.constexpr):
    """Ask for those of rows `s` that are not behind row `last`, of head `g` of G, of C elements of two bytes."""
    if not _INTERPRETED:
        row_ptr = ptr + (s.to(tl.int64) * G + g) * C
        for at in tl.static_range(0, C, _LINE // 2):
            _ask(row_ptr + at, s <= last)


@triton.jit
def _ask(ptr, live):
    """Ask for the lines at `ptr`, where `live`."""
    tl.inline_asm_elementwise(
        "{ .reg .pred p; setp.ne.b32 p, $2, 0; @p prefetch.global.L2 [$1]; } // dummy $0", "=r,l,r",
        [ptr.to(tl.int64), live.to(tl.int32)], dtype=tl.int32, is_pure=False, pack=1,
    )  # fmt: skip
