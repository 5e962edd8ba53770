"""What kernels refuse, with a sentence, before anything is allocated or launched."""

from collections.abc import Callable

import pytest
import torch

from exactmoe.kernels.argmax import argmax
from exactmoe.kernels.attention import attend, attention_scores, attention_softmax
from exactmoe.kernels.combine import combine
from exactmoe.kernels.cursor import place
from exactmoe.kernels.dispatch import Dispatch, dispatch
from exactmoe.kernels.embedding import embed
from exactmoe.kernels.errors import InvalidInput
from exactmoe.kernels.formats import Q4_K, Q6_K, QuantFormat
from exactmoe.kernels.kv_cache import KVLayer, append
from exactmoe.kernels.matmul import grouped_matmul, matmul
from exactmoe.kernels.norm import rms_norm, rms_norm_quantize
from exactmoe.kernels.quantize import quantize
from exactmoe.kernels.residual import add
from exactmoe.kernels.rope import RopeTable, qk_norm_rope, rope_table
from exactmoe.kernels.router import RouterWeight, prepare_router, route, router_logits
from exactmoe.kernels.swiglu import swiglu, swiglu_quantize
from exactmoe.kernels.tensors import Activations, QuantMatrix, quant_matrix


def f32(*shape: int) -> torch.Tensor:
    return torch.zeros(shape)


def ints(*shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype)


def weights(*shape: int, fmt: QuantFormat = Q4_K) -> QuantMatrix:
    return quant_matrix(ints(*shape[:-1], shape[-1] // 256 * fmt.block_bytes, dtype=torch.uint8), fmt, "w")


def acts(t: int, k: int, s: int = 1) -> Activations:
    return Activations(ints(s, t, k, dtype=torch.int8), f32(t, k // 256), ints(s, t, k // 16, dtype=torch.int16))


def kv(p: int, g: int, c: int) -> KVLayer:
    return KVLayer(ints(p, g, c, dtype=torch.int16), f32(p, g), ints(p, g, c, dtype=torch.int16), f32(p, g))


def table(p: int, c: int) -> RopeTable:
    return RopeTable(f32(p, c // 2), f32(p, c // 2))


F64 = torch.float64
UNKNOWN = QuantFormat("Q5_K", 13, 176)

REFUSALS: dict[str, tuple[Callable[[], object], str]] = {
    "quantize f64": (lambda: quantize(f32(2, 256).to(F64), "q8_k"), "x must be f32, got torch.float64"),
    "quantize width": (lambda: quantize(f32(2, 300), "q8_k"), "multiple of 256, got 300"),
    "quantize profile": (lambda: quantize(f32(2, 256), "q4"), "profile must be one of q8_k, q16_k, got 'q4'"),
    "quantize strided": (lambda: quantize(f32(256, 256).T, "q8_k"), "x must be contiguous"),
    "quantize vector": (lambda: quantize(f32(256), "q8_k"), r"x must have shape .*, got \[256\]"),
    "norm f16": (lambda: rms_norm(f32(2, 256).half(), f32(256), 1e-6), "must be f32, got torch.float16"),
    "norm weight": (lambda: rms_norm(f32(2, 256), f32(255), 1e-6), r"norm weight must have shape \[256\], got \[255\]"),
    "norm wide": (lambda: rms_norm(f32(1, 16385), f32(16385), 1e-6), "16385"),
    "norm quantize": (lambda: rms_norm_quantize(f32(1, 100), f32(100), 1e-6, "q8_k"), "multiple of 256, got 100"),
    "norm profile": (lambda: rms_norm_quantize(f32(1, 256), f32(256), 1e-6, "q2_k"), "got 'q2_k'"),
    "embed tokens": (lambda: embed(weights(7, 256), ints(3, dtype=torch.int64)), "tokens must be i32, got torch.int64"),
    "embed shape": (lambda: embed(weights(7, 256), ints(3, 1)), r"tokens must have shape \[any\], got \[3, 1\]"),
    "embed format": (lambda: embed(weights(7, 256)._replace(format=UNKNOWN), ints(1)), "type Q5_K cannot be executed"),
    "weights dtype": (lambda: quant_matrix(ints(2, 144), Q4_K, "blk.0.w"), "blk.0.w: .* must be u8, got torch.int32"),
    "weights bytes": (
        lambda: quant_matrix(ints(2, 145, dtype=torch.uint8), Q4_K, "blk.0.w"), "blk.0.w: a row of 145 bytes is not",
    ),
    "weights strided": (
        lambda: quant_matrix(ints(144, 288, dtype=torch.uint8).T, Q4_K, "blk.0.w"), "blk.0.w: .* contiguous",
    ),
    "matmul width": (lambda: matmul(weights(5, 512), acts(2, 256)), "width 256 meet weights of width 512"),
    "matmul slices": (lambda: matmul(weights(5, 256), acts(2, 256, s=3)), "1 or 2 slices, got 3"),
    "matmul dtype": (
        lambda: matmul(weights(5, 256), acts(2, 256)._replace(q=ints(1, 2, 256))), "q must be i8 .* got torch.int32",
    ),
    "matmul scale": (lambda: matmul(weights(5, 512), acts(2, 512)._replace(scale=f32(2, 1))), r"got \[2, 1\]"),
    "matmul experts": (lambda: matmul(weights(3, 5, 256), acts(2, 256)), "weight must have shape"),
    "matmul format": (lambda: matmul(weights(5, 256)._replace(format=UNKNOWN), acts(2, 256)), "type Q5_K cannot"),
    "grouped dense": (
        lambda: grouped_matmul(weights(5, 256), acts(2, 256), Dispatch(ints(4), ints(4)), 2), "grouped weights must be",
    ),
    "grouped experts": (
        lambda: grouped_matmul(weights(3, 5, 256), acts(2, 256), Dispatch(ints(4), ints(5)), 2), "4 experts, weights 3",
    ),
    "grouped rows": (
        lambda: grouped_matmul(weights(3, 5, 256, fmt=Q6_K), acts(2, 256), Dispatch(ints(5), ints(4)), 2),
        "2 activation rows times 2 are not 5 routed rows",
    ),
    "rope start": (lambda: qk_norm_rope(f32(3, 64), f32(64), 1e-6, table(4, 64), 2), "positions 2..4 lie outside"),
    "rope negative": (lambda: qk_norm_rope(f32(1, 64), f32(64), 1e-6, table(4, 64), -1), "lie outside the rope table"),
    "rope heads": (lambda: qk_norm_rope(f32(1, 100), f32(64), 1e-6, table(4, 64), 0), "100 are not whole heads"),
    "rope table": (lambda: qk_norm_rope(f32(1, 64), f32(64), 1e-6, table(4, 32), 0), "heads of 32, not 64"),
    "rope odd": (lambda: rope_table(4, 63, 1e4, torch.device("cpu")), "head width must be even, got 63"),
    "append dtype": (lambda: append(f32(1, 2, 64).to(F64), f32(1, 128), kv(4, 2, 64), 0), "k must be f32"),
    "append value": (lambda: append(f32(1, 2, 64), f32(1, 64), kv(4, 2, 64), 0), r"v must have shape \[1, 128\]"),
    "append full": (lambda: append(f32(2, 2, 64), f32(2, 128), kv(4, 2, 64), 3), "3..4 lie outside the cache of 4"),
    "append heads": (lambda: append(f32(1, 2, 64), f32(1, 128), kv(4, 3, 64), 0), "cache k must"),
    "attend full": (lambda: attend(f32(2, 4, 64), kv(4, 2, 64), 3), "positions 3..4 lie outside the cache of 4"),
    "attend heads": (lambda: attend(f32(1, 5, 64), kv(4, 2, 64), 0), "5 query heads are not a multiple of 2 kv heads"),
    "attend width": (lambda: attend(f32(1, 4, 32), kv(4, 2, 64), 0), "cache k must"),
    "scores f64": (lambda: attention_scores(f32(1, 4, 64).to(F64), kv(4, 2, 64), 0), "q must be f32"),
    "softmax flat": (lambda: attention_softmax(f32(1, 256), kv(4, 2, 64), 0), "q must have shape"),
    "attend scale": (lambda: attend(f32(1, 4, 64), kv(4, 2, 64)._replace(v_scale=f32(4, 1)), 0), "v_scale must"),
    "router f16": (lambda: prepare_router(f32(4, 256).half()), "router weight must be f32, got torch.float16"),
    "router width": (lambda: prepare_router(f32(1, 16385)), "16385"),
    "logits width": (
        lambda: router_logits(f32(2, 256), RouterWeight(ints(4, 512), f32(4))), r"x must have shape \[any, 512\]",
    ),
    "logits weight": (lambda: router_logits(f32(2, 256), RouterWeight(f32(4, 256), f32(4))), "router must be i32"),
    "route more": (lambda: route(f32(2, 4), 5), "top_k must be 1 to the 4 experts, got 5"),
    "route none": (lambda: route(f32(2, 4), 0), "top_k must be 1 to the 4 experts, got 0"),
    "route many": (lambda: route(f32(1, 1025), 2), "at most 1024 experts, got 1025"),
    "dispatch i64": (lambda: dispatch(ints(2, 2, dtype=torch.int64), 4), "expert ids must be i32, got torch.int64"),
    "dispatch flat": (lambda: dispatch(ints(4), 4), "expert ids must have shape"),
    "dispatch none": (lambda: dispatch(ints(1, 1), 0), "at least one expert, got 0"),
    "swiglu shapes": (lambda: swiglu(f32(2, 4), f32(2, 5)), r"up must have shape \[2, 4\], got \[2, 5\]"),
    "swiglu width": (lambda: swiglu_quantize(f32(2, 100), f32(2, 100), "q8_k"), "multiple of 256, got 100"),
    "combine rows": (lambda: combine(f32(5, 8), f32(2, 3)), r"expert_out must have shape \[6, any\], got \[5, 8\]"),
    "combine ranks": (lambda: combine(f32(0, 8), f32(2, 0)), "at least one rank"),
    "add shapes": (lambda: add(f32(2, 4), f32(2, 5)), r"b must have shape \[2, 4\], got \[2, 5\]"),
    "argmax nothing": (lambda: argmax(f32(2, 0)), "at least one column"),
    "argmax i32": (lambda: argmax(ints(2, 3)), "logits must be f32, got torch.int32"),
    "place two": (lambda: place(ints(2), ints(1), 0), "^token must be one i32"),
    "place f32": (lambda: place(ints(1), f32(1), 0), "^position must be one i32"),
    "place i64": (lambda: place(ints(1), ints(1), 0, ints(1, dtype=torch.int64)), "given token must be one i32"),
    "place below": (lambda: place(ints(1), ints(1), -1), "position must lie in i32, got -1"),
    "place beyond": (lambda: place(ints(1), ints(1), 1 << 31), "position must lie in i32, got 2147483648"),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSALS)
def test_bad_input_is_refused_with_what_was_found(what: str) -> None:
    call, message = REFUSALS[what]
    with pytest.raises(InvalidInput, match=message):
        call()
