"""Append keys and values to a layer's cache as integers.      k [T, G, C] f32, v [T, G*C] f32 -> the cache
Promised order: each (token, kv head) on its own: a key by its largest magnitude, a value by a power of two."""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from exactmoe.kernels import tiles
from exactmoe.kernels.errors import require
from exactmoe.kernels.launch import FAITHFUL
from exactmoe.kernels.numerics import quantize_15, quantize_pow2
from exactmoe.kernels.tensors import require_f32


class KVLayer(NamedTuple):
    """One layer's cache: 15-bit keys, 14-bit values, one scale a (token, kv head)."""

    k: Tensor  # [P, G, C] i16
    k_scale: Tensor  # [P, G] f32
    v: Tensor  # [P, G, C] i16
    v_scale: Tensor  # [P, G] f32, powers of two


def append(k: Tensor, v: Tensor, kv: KVLayer, start: int) -> None:
    """Write the keys and values of tokens start..start+T-1; bit-equal to parity.reference.kv_cache.append."""
    require_f32(k, "k", None, None, None)
    T, G, C = k.shape
    require_f32(v, "v", T, G * C)
    require_kv(kv, G, C)
    require(
        0 <= start and start + T <= kv.k.shape[0],
        f"positions {start}..{start + T - 1} lie outside the cache of {kv.k.shape[0]}",
    )
    rows = T * G
    if rows:
        M = tiles.heads(rows)
        _append_kernel[(triton.cdiv(rows, M),)](
            k, v, *kv, start, rows, G=G, C=C, C2=triton.next_power_of_2(C), M=M, num_warps=4, **FAITHFUL
        )


def require_kv(kv: KVLayer, n_kv_heads: int, head_dim: int) -> None:
    """Refuse a cache layer whose parts do not belong together or do not fit the heads."""
    P = kv.k.shape[0]
    for name, part in (("k", kv.k), ("v", kv.v)):
        require(part.dtype == torch.int16, f"cache {name} must be i16, got {part.dtype}")
        require(
            part.shape == (P, n_kv_heads, head_dim),
            f"cache {name} must be {[P, n_kv_heads, head_dim]}, got {list(part.shape)}",
        )
        require(part.is_contiguous(), f"cache {name} must be contiguous")
    require_f32(kv.k_scale, "cache k_scale", P, n_kv_heads)
    require_f32(kv.v_scale, "cache v_scale", P, n_kv_heads)


@triton.jit(do_not_specialize=["start", "rows"])
def _append_kernel(
    k_ptr, v_ptr, ck_ptr, cks_ptr, cv_ptr, cvs_ptr, start, rows,
    G: tl.constexpr, C: tl.constexpr, C2: tl.constexpr, M: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * M + tl.arange(0, M)
    live = row < rows
    j = tl.arange(0, C2)
    mask = live[:, None] & (j < C)[None, :]
    source = row.to(tl.int64)[:, None] * C + j[None, :]
    slot = row.to(tl.int64) + start.to(tl.int64) * G
    target = slot[:, None] * C + j[None, :]
    k, k_scale = quantize_15(tl.load(k_ptr + source, mask, 0.0))
    tl.store(ck_ptr + target, k.to(tl.int16), mask)
    tl.store(cks_ptr + slot, k_scale, live)
    v, v_scale = quantize_pow2(tl.load(v_ptr + source, mask, 0.0))
    tl.store(cv_ptr + target, v.to(tl.int16), mask)
    tl.store(cvs_ptr + slot, v_scale, live)
