"""Experts that a layer will probably choose, on their way to the L2 cache before it does.

A layer adds little to the residual stream, so the next layer's router already names most of its experts when it is
given this layer's row. A layer's router kernel makes that guess for the next one; a kernel between them, which waits
with nothing to load, asks for those experts' weights. A wrong guess costs bandwidth, never a bit."""

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from exactmoe.kernels.errors import require
from exactmoe.kernels.launch import interpreting
from exactmoe.kernels.numerics import ordered
from exactmoe.kernels.packed import PackedMatrix
from exactmoe.kernels.prefetch import prefetch
from exactmoe.kernels.router import expert_of_rank
from exactmoe.kernels.tensors import require_f32

_INTERPRETED = tl.constexpr(interpreting())
_PLANES = tl.constexpr(12)  # of three matrices


class Guess(NamedTuple):
    """The `top_k` experts with the largest of `logits` are likely to be read from `matrices`, in their order."""

    logits: Tensor  # [E] f32
    matrices: tuple[PackedMatrix, ...]  # at most three
    top_k: int


def guess_arguments(guess: Guess | None) -> tuple[tuple[Tensor | None, ...], dict[str, object]]:
    """What a kernel that calls `fetch_guess` is given: its pointers, and its constants by name."""
    if guess is None:
        return (None,) * (1 + _PLANES.value), {"LATER": (0,) * _PLANES.value, "E": 0, "E2": 0, "A": 0}
    require_f32(guess.logits, "guess", None)
    E = guess.logits.shape[0]
    for w in guess.matrices:
        require(w.experts == E, f"a guess of {E} experts, and a matrix of {w.experts}")
    require(1 <= guess.top_k <= E, f"top_k must be 1 to the {E} experts, got {guess.top_k}")
    planes = [plane for w in guess.matrices for plane in w.planes]
    sizes = [size for w in guess.matrices for size in w.plane_bytes]
    none = _PLANES.value - len(planes)
    require(none >= 0, f"a guess of at most three matrices, got {len(guess.matrices)}")
    return (guess.logits, *planes, *(None,) * none), {
        "LATER": (*sizes, *(0,) * none), "E": E, "E2": triton.next_power_of_2(E), "A": guess.top_k,
    }  # fmt: skip


@triton.jit
def fetch_guess(
    pid, pointers, BYTES: tl.constexpr, E: tl.constexpr, E2: tl.constexpr, A: tl.constexpr,
    PROGRAMS: tl.constexpr, WARPS: tl.constexpr,
):  # fmt: skip
    """Ask for the share of program `pid` of PROGRAMS: a part of one expert's planes, of BYTES each.

    `pointers` and the constants are those of `guess_arguments`."""
    parts: tl.constexpr = PROGRAMS // A
    if not _INTERPRETED and parts > 0:  # noqa: SIM102 - Triton decides the outer test when it compiles
        if pid < parts * A:
            e = tl.broadcast_to(tl.arange(0, E2)[None, :], [WARPS, E2])  # a row for every warp, as in experts_up
            logit = tl.load(pointers[0] + e, e < E, float("-inf"))
            key = tl.where(e < E, (ordered(logit) >> 1) + 0x40000000, -1)  # not negative, and good enough for a guess
            expert = tl.max(expert_of_rank(key, pid % A)).to(tl.int64)
            for plane in tl.static_range(_PLANES):
                if BYTES[plane] > 0:
                    byte_ptr = pointers[1 + plane].to(tl.pointer_type(tl.int8), bitcast=True) + expert * BYTES[plane]
                    prefetch(byte_ptr, BYTES[plane], pid // A, parts, 32 * WARPS)
