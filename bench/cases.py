"""The table of benchmarks: which op, at which sizes, and how many bytes the weights and inputs of a call hold.

A benchmark is a case, of `parity.cases` or of `bench.layers`, so what is timed is judged on the same inputs by the same
reference. To add one, add a line to `_decode` or `_prefill`; `exactmoe bench` and `pytest bench/` then have it."""

from collections.abc import Iterator
from typing import NamedTuple

from exactmoe.bench.layers import MoeChunk, MoeStep
from exactmoe.parity.cases import (
    BLOCK_BYTES,
    Attend,
    Case,
    DecodeAttention,
    DecodeRouter,
    ExpertsDown,
    ExpertsUp,
    GroupedMatmul,
    Matmul,
    Matvec,
    RmsNormQuantize,
    Route,
    RouterLogits,
    SwigluQuantize,
)

PREFILL = (8, 64, 512, 4096)  # tokens of a chunk
D, H, G, C, E, A, F, V = 2048, 32, 4, 128, 128, 8, 768, 151936  # Qwen3-30B-A3B


class Bench(NamedTuple):
    """One row of the results."""

    name: str
    case: Case
    tokens: int
    weight_bytes: int  # that a call has to read at least, of weights, keys and values
    flops: int = 0  # two for each multiplication with a weight; 0 where memory is the only roof


def _matrix(n: int, k: int, fmt: str) -> int:
    return n * k // 256 * BLOCK_BYTES[fmt]


_EXPERT = 2 * _matrix(F, D, "Q4_K") + _matrix(D, F, "Q6_K")  # bytes of one


def _decode(p: str) -> Iterator[Bench]:
    """The kernels of a decode step."""
    qkv = (H + 2 * G) * C
    yield Bench("qkv", Matvec(qkv, D, "Q4_K", p, "", "norm"), 1, _matrix(qkv, D, "Q4_K"))
    yield Bench("attn-output", Matvec(D, H * C, "Q4_K", p, "", "operand"), 1, _matrix(D, H * C, "Q4_K"))
    yield Bench("router", DecodeRouter(E, D, p), 1, 4 * E * D)
    yield Bench("experts-up", ExpertsUp(E, A, F, D, "Q4_K", "Q4_K", p), 1, 2 * A * _matrix(F, D, "Q4_K"))
    for fmt in BLOCK_BYTES:
        name = f"experts-down-{fmt.lower()}"
        yield Bench(name, ExpertsDown(E, A, F, D, fmt, p), 1, A * _matrix(D, F, fmt))
    yield Bench("moe-layer-1", MoeStep(1, E, A, F, D, "Q4_K", "Q6_K", p), 1, 4 * E * D + A * _EXPERT)
    yield Bench("lm-head", Matvec(V, D, "Q6_K", p, "", "norm"), 1, _matrix(V, D, "Q6_K"))
    for keys in (64, 4096):  # in one launch and in two
        yield Bench(f"attention-{keys}", DecodeAttention(H, G, C, keys - 1, p), 1, keys * G * 2 * (2 * C + 4))


def _prefill(p: str) -> Iterator[Bench]:
    """The kernels of a chunk of a prompt."""
    for T in PREFILL:
        rows, touched = T * A, round(E * (1 - (1 - A / E) ** T))  # experts that even routing reaches, on average
        yield Bench(f"matmul-{T}", Matmul(T, H * C, D, "Q4_K", p), T, _matrix(H * C, D, "Q4_K"), 2 * T * H * C * D)
        up = GroupedMatmul(T, E, A, F, D, "Q4_K", p)
        yield Bench(f"grouped-up-{T}", up, T, touched * _matrix(F, D, "Q4_K"), 2 * rows * F * D)
        down = GroupedMatmul(T, E, A, D, F, "Q6_K", p, "even", "down")
        yield Bench(f"grouped-down-{T}", down, T, touched * _matrix(D, F, "Q6_K"), 2 * rows * F * D)
        yield Bench(f"attend-{T}", Attend(T, H, G, C, 0), T, T * G * 2 * (2 * C + 4), 4 * T * T * H * C // 2)
        yield Bench(f"norm-{T}", RmsNormQuantize(T, D, p), T, 4 * T * D)
        yield Bench(f"logits-{T}", RouterLogits(T, E, D), T, 4 * E * D, 2 * T * E * D)
        yield Bench(f"route-{T}", Route(T, E, A), T, 4 * T * E)
        layer, flops = MoeChunk(T, E, A, F, D, "Q4_K", "Q6_K", p), 2 * T * E * D + 6 * rows * F * D
        yield Bench(f"moe-layer-{T}", layer, T, 4 * E * D + touched * _EXPERT, flops)
        yield Bench(f"swiglu-{T}", SwigluQuantize(rows, F, p), T, 8 * rows * F)


def benches(profile: str = "q8_k") -> dict[str, Bench]:
    """The table in an activation profile, by name."""
    table = [*_decode(profile), *_prefill(profile)]
    return {bench.name: bench for bench in table}
