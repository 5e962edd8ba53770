"""Case tables: the inputs every op is judged on, shared by kernel tests, fault tests and bench.

A case is a frozen set of sizes and a kind of data; its string is its test id and the seed of its data. Tables keep the
awkward sizes (empty, one, off every tile), and each kind of data exists because something breaks on it. Cases marked
`gpu` are too large for the interpreter, which pays per program."""

import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from importlib import import_module
from itertools import product
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from exactmoe.parity.reference.decode_experts import Activated
from exactmoe.parity.reference.decode_router import NextLayer, Routed
from exactmoe.parity.reference.dispatch import Dispatch
from exactmoe.parity.reference.kv_cache import KVLayer
from exactmoe.parity.reference.matvec import Norm
from exactmoe.parity.reference.packed import operand
from exactmoe.parity.reference.quantize import Activations, quantize
from exactmoe.parity.reference.rope import RopeTable
from exactmoe.parity.reference.router import RouterWeight
from exactmoe.parity.reference.weights import QuantMatrix

if TYPE_CHECKING:
    import torch

F32 = NDArray[np.float32]
Generator = np.random.Generator

EPS = float(np.float32(1e-6))
BLOCK_BYTES = {"Q4_K": 144, "Q6_K": 210}
PROFILES = ("q8_k", "q16_k")
CACHE_SLACK = 3  # cache rows beyond the last key, poisoned: reading one shows


@dataclass(frozen=True)
class Case(ABC):
    """Sizes and a kind of data; `arguments` are the op's, in numpy. Equal cases give equal bytes."""

    op: ClassVar[str]  # the op's function name, the same in kernels/ and parity/reference/
    module: ClassVar[str]  # the file it lives in
    package: ClassVar[str] = "kernels"  # the folder; model for a chain of kernels as production calls it
    writes: ClassVar[int | None] = None  # the argument that the op writes to
    packed: ClassVar[bool] = False  # whether its kernel takes weights packed

    @abstractmethod
    def arguments(self) -> tuple[Any, ...]:
        """Positional arguments of the op, as the reference takes them."""

    def on(self, device: "torch.device", arguments: tuple[Any, ...] | None = None) -> tuple[Any, ...]:
        """The arguments, or `arguments` in their place, as the kernel takes them."""
        return tensors(self.arguments() if arguments is None else arguments, device, self.packed)

    @property
    def gpu(self) -> bool:
        """Whether the case is too large for the interpreter."""
        return self.cost > 2**26

    @property
    def cost(self) -> int:
        """Rough number of element operations."""
        return 0

    @property
    def rows(self) -> int:
        """Rows of input; 0 makes every output empty."""
        return int(getattr(self, "T", getattr(self, "R", 1)))

    def rng(self) -> Generator:
        """The case's own generator, seeded by its name."""
        return np.random.default_rng(zlib.crc32(f"{self.op} {self}".encode()))

    def __str__(self) -> str:
        parts = ((f.name, getattr(self, f.name)) for f in fields(self) if getattr(self, f.name) != "normal")
        return "-".join(v if isinstance(v, str) else f"{name}{v}" for name, v in parts)


def floats(rng: Generator, shape: tuple[int, ...], data: str) -> F32:
    """Rows of f32 of one kind; `shape` ends in the row length."""
    x = rng.standard_normal(shape).astype(np.float32)
    rows = x.reshape(-1, shape[-1]) if x.size else x.reshape(0, shape[-1])
    match data:
        case "normal":
            pass
        case "outlier":  # one channel dwarfs the rest: everything else quantises to little or nothing
            x[..., shape[-1] // 3] *= np.float32(3000)
        case "small":  # the mean of squares is of the order of eps
            x *= np.float32(1e-3)
        case "zero":  # every other row zero, the first of them negative zeros
            rows[::2] = 0
            rows[::4] = -0.0
        case "tiny":  # around the threshold 2^-100 below which a block is zero, and down into the subnormals
            exponents = rng.choice(np.array([-149, -140, -126, -102, -101, -100, -99, -98]), len(rows))
            rows[:] = np.ldexp(np.clip(rows, -1, 1), exponents[:, None])
            rows[::3, 0] = np.float32(2.0**-100)
        case "halves":  # scale is exactly -1: ties to round, of both signs
            rows[:] = rng.integers(-126, 126, rows.shape) + np.float32(0.5)
            rows[:, ::256] = 127
        case "twins":  # the largest magnitude occurs with both signs; the first one decides
            rows[:] = np.clip(rows, -2, 2)
            rows[:, 5::64] = -3
            rows[:, 3::256] = 3
            rows[::2] *= -1
        case "huge":  # squares overflow f32
            x *= np.float32(2.0**120)
        case "wide":  # 80 binades within a row
            x *= np.exp2(rng.integers(-60, 20, shape)).astype(np.float32)
        case "nonfinite":  # one NaN, one infinity, in rows of their own; the other rows stay finite
            rows[1::3, shape[-1] // 2] = np.nan
            rows[2::3, -1] = -np.inf
        case _:
            raise ValueError(f"no data of kind {data!r}")
    return x


def one_row(rng: Generator, width: int, kind: str) -> F32:
    """A row f32 [width] of the kinds of `floats`; with "nonfinite", the one that has a NaN."""
    row: F32 = floats(rng, (2 if kind == "nonfinite" else 1, width), kind)[-1]
    return row


def blocks(rng: Generator, rows: tuple[int, ...], k: int, fmt: str, data: str) -> QuantMatrix:
    """Quantised weights [*rows, k]: every bit of codes and scales in use, the f16 factors of one kind."""
    shape = (*rows, k // 256)
    raw = rng.integers(0, 256, (*shape, BLOCK_BYTES[fmt]), dtype=np.uint8)
    factors = 2 if fmt == "Q4_K" else 1
    d = (rng.standard_normal((*shape, factors)) * 0.01).astype(np.float16)
    match data:
        case "normal":
            pass
        case "worst":  # the largest sums: q=15, sc=mn=63; or sc=-128, q=0
            raw[:] = 0xFF
            if fmt == "Q6_K":
                raw[..., :192], raw[..., 192:208] = 0, 0x80
        case "heavy":  # near the largest sums, and odd: beyond 2^24 the one rounding of a sum shows
            if fmt == "Q4_K":
                raw[..., 4:16], raw[..., 16:] = 0xFF, raw[..., 16:] | 0xCC
            else:
                raw[..., :128], raw[..., 128:192] = raw[..., :128] & 0x77, 0
                raw[..., 192:208] = 0x80 | (raw[..., 192:208] & 0x1F)
        case "zero":  # blocks with d = 0, and blocks with d = -0 or no codes
            d[..., 0][rng.random(shape) < 0.5] = 0
            d[..., 0][rng.random(shape) < 0.2] = -0.0
            raw[rng.random(shape) < 0.3] = 0
        case "subnormal":  # f16 subnormals of both signs: flushing them is visible
            d = (
                (rng.integers(1, 1024, d.shape) | (rng.integers(0, 2, d.shape) << 15))
                .astype(np.uint16)
                .view(np.float16)
            )
        case _:
            raise ValueError(f"no blocks of kind {data!r}")
    if fmt == "Q4_K":
        raw[..., :4] = d.view(np.uint8)
    else:
        raw[..., 208:] = d.view(np.uint8)
    return QuantMatrix(raw.reshape(*rows, -1), fmt)


def activations(rng: Generator, t: int, k: int, profile: str, data: str) -> Activations:
    """Quantised rows; `worst` puts every slice at its bound, `nonfinite` gives some blocks the NaN scale."""
    slices = PROFILES.index(profile) + 1
    top = 127 if slices == 1 else 16256
    v = rng.integers(-top, top + 1, (t, k))
    if data == "worst":
        v = np.where(v < 0, -top, top)  # one row of mixed signs, the others without cancellation
        v[1:] = np.array([top, -top, top - 64])[np.arange(1, t) % 3][:, None]
    if data == "heavy":
        v = np.abs(v) // 8 + 7 * top // 8
    if slices == 1:
        q = v[None]
    else:
        hi = (v + 64) >> 7
        q = np.stack([hi, v - 128 * hi])
    scale = np.exp2(rng.uniform(-12, 0, (t, k // 256))).astype(np.float32)
    if data == "zero":
        empty = rng.random(scale.shape) < 0.5
        scale[empty] = 0
        q = np.where(np.repeat(empty, 256, axis=1), 0, q)
    if data == "nonfinite":
        bad = rng.random(scale.shape) < 0.3
        scale[bad] = np.nan
        q = np.where(np.repeat(bad, 256, axis=1), 0, q)
    return Activations(np.ascontiguousarray(q, dtype=np.int8), scale)


def assignments(rng: Generator, t: int, a: int, e: int, load: str) -> NDArray[np.int32]:
    """Distinct experts [T, A] of each token, under one kind of load."""
    popularity: NDArray[Any] = np.zeros(e)
    match load:
        case "even":
            pass
        case "one":  # all tokens to the same experts, the last ones
            popularity = np.arange(e) * 100.0
        case "ragged":  # a few experts take nearly all
            popularity = -0.7 * np.arange(e)
        case "odd":  # every even expert stays empty, the first among them
            popularity = np.where(np.arange(e) % 2, 0.0, -1e9)
        case _:
            raise ValueError(f"no load of kind {load!r}")
    order = np.argsort(-(popularity + rng.gumbel(size=(t, e))), axis=1)
    return np.ascontiguousarray(order[:, :a], dtype=np.int32)


def grouped(expert: NDArray[np.int32], e: int) -> Dispatch:
    """The dispatch of `expert` [T, A]: a stable sort."""
    flat = expert.reshape(-1)
    offset = np.concatenate([[0], np.cumsum(np.bincount(flat, minlength=e))])
    return Dispatch(np.argsort(flat, kind="stable").astype(np.int32), offset.astype(np.int32))


def cache(rng: Generator, keys: int, g: int, c: int, data: str) -> KVLayer:
    """A filled cache layer of `keys` positions and poison behind them."""
    capacity = keys + CACHE_SLACK
    k = rng.integers(-16256, 16257, (capacity, g, c)).astype(np.int16)
    v = rng.integers(-8192, 8193, (capacity, g, c)).astype(np.int16)
    k_scale = (rng.uniform(0.5, 1.5, (capacity, g)) / 16256).astype(np.float32)
    v_scale = np.exp2(rng.integers(-14, -9, (capacity, g))).astype(np.float32)
    match data:
        case "worst":  # the largest sums, no cancellation
            k[:], v[:], v_scale[:] = 16256, -8192, 2.0**-12
        case "wide":
            v_scale = np.exp2(rng.integers(-90, 20, (capacity, g))).astype(np.float32)
        case "early":  # the largest values by far lie in the first of many tiles
            v_scale[:1] *= np.float32(2.0**6)
        case "late":  # the same, in the last tile, before the key that a decode step appends
            v_scale[max(keys - 2, 0) : keys - 1] *= np.float32(2.0**6)
        case "zero":  # a kv head whose values are all zero
            v_scale[:, 0], v[:, 0] = 0, 0
        case "nonfinite":  # a bad key for kv head 0, a bad value for the last: only later queries see them
            k_scale[keys // 2 : keys // 2 + 1, 0] = np.nan
            v_scale[max(keys - 1, 0) : keys, -1] = np.nan
        case "overflow":
            k_scale *= np.float32(2.0**125)
        case _:
            pass
    k[keys:], v[keys:], k_scale[keys:], v_scale[keys:] = -1, -1, np.nan, np.nan
    return KVLayer(k, k_scale, v, v_scale)


@dataclass(frozen=True)
class Quantize(Case):
    op, module = "quantize", "quantize"
    T: int
    K: int
    profile: str
    data: str = "normal"

    @property
    def cost(self) -> int:
        return self.T * self.K * 32

    def arguments(self) -> tuple[Any, ...]:
        return floats(self.rng(), (self.T, self.K), self.data), self.profile


@dataclass(frozen=True)
class RmsNorm(Case):
    op, module = "rms_norm", "norm"
    T: int
    K: int
    data: str = "normal"

    @property
    def cost(self) -> int:
        return self.T * self.K * 64

    def arguments(self) -> tuple[Any, ...]:
        rng = self.rng()
        return floats(rng, (self.T, self.K), self.data), floats(rng, (self.K,), "normal"), EPS


@dataclass(frozen=True)
class RmsNormQuantize(Case):
    op, module = "rms_norm_quantize", "norm"
    T: int
    K: int
    profile: str
    data: str = "normal"

    @property
    def cost(self) -> int:
        return self.T * self.K * 64

    def arguments(self) -> tuple[Any, ...]:
        rng = self.rng()
        return floats(rng, (self.T, self.K), self.data), floats(rng, (self.K,), "normal"), EPS, self.profile


@dataclass(frozen=True)
class Embed(Case):
    op, module = "embed", "embedding"
    T: int
    V: int
    D: int
    format: str
    data: str = "normal"

    @property
    def cost(self) -> int:
        return self.T * self.D * 64

    def arguments(self) -> tuple[Any, ...]:
        rng = self.rng()
        table = blocks(rng, (self.V,), self.D, self.format, self.data)
        tokens = rng.integers(0, self.V, self.T).astype(np.int32)
        tokens[: min(2, self.T)] = np.array([self.V - 1, 0])[: min(2, self.T)]
        return table, tokens


@dataclass(frozen=True)
class Matmul(Case):
    op, module = "matmul", "matmul"
    T: int
    N: int
    K: int
    format: str
    profile: str
    data: str = "normal"

    @property
    def cost(self) -> int:
        return self.T * self.N * self.K

    def arguments(self) -> tuple[Any, ...]:
        rng = self.rng()
        weight = blocks(rng, (self.N,), self.K, self.format, "normal" if self.data == "nonfinite" else self.data)
        return weight, activations(rng, self.T, self.K, self.profile, self.data)


@dataclass(frozen=True)
class GroupedMatmul(Case):
    op, module = "grouped_matmul", "matmul"
    T: int
    E: int
    A: int
    N: int
    K: int
    format: str
    profile: str
    load: str = "even"
    side: str = "up"  # up: the A rows of a token share its activation row; down: each routed row has its own

    @property
    def cost(self) -> int:
        return self.T * self.A * self.N * self.K

    def arguments(self) -> tuple[Any, ...]:
        rng = self.rng()
        weight = blocks(rng, (self.E, self.N), self.K, self.format, "normal")
        per = self.A if self.side == "up" else 1
        x = activations(rng, self.T * self.A // per, self.K, self.profile, "normal")
        return weight, x, grouped(assignments(rng, self.T, self.A, self.E, self.load), self.E), per


@dataclass(frozen=True)
class QkNormRope(Case):
    op, module = "qk_norm_rope", "rope"
    T: int
    n: int
    C: int
    start: int
    data: str = "normal"

    @property
    def cost(self) -> int:
        return self.T * self.n * self.C * 64

    def arguments(self) -> tuple[Any, ...]:
        rng = self.rng()
        x = floats(rng, (self.T * self.n, self.C), self.data).reshape(self.T, self.n * self.C)
        angle = rng.uniform(-np.pi, np.pi, (self.start + self.T + 1, self.C // 2))
        table = RopeTable(np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32))
        return x, floats(rng, (self.C,), "normal"), EPS, table, self.start


@dataclass(frozen=True)
class Append(Case):
    op, module = "append", "kv_cache"
    writes = 2
    T: int
    G: int
    C: int
    start: int
    data: str = "normal"

    @property
    def cost(self) -> int:
        return self.T * self.G * self.C * 64

    def arguments(self) -> tuple[Any, ...]:
        rng = self.rng()
        k = floats(rng, (self.T, self.G, self.C), self.data)
        v = floats(rng, (self.T * self.G, self.C), self.data).reshape(self.T, self.G * self.C)
        return k, v, cache(rng, self.start + self.T, self.G, self.C, "normal"), self.start


@dataclass(frozen=True)
class Attend(Case):
    op, module = "attend", "attention"
    T: int
    H: int
    G: int
    C: int
    start: int
    data: str = "normal"

    @property
    def cost(self) -> int:
        return self.T * self.H * self.C * (self.start + self.T) * 2

    def arguments(self) -> tuple[Any, ...]:
        rng = self.rng()
        q = floats(rng, (self.T, self.H, self.C), "normal")
        match self.data:
            case "peaked":  # one key takes all: probabilities that underflow to zero
                q *= np.float32(300)
            case "flat":  # equal scores everywhere
                q[:] = 0
            case "worst":
                q[:] = 1
            case "nonfinite":
                q[1:2, 0, 0] = np.nan
            case "overflow":
                q *= np.float32(2.0**20)
            case _:
                pass
        return q, cache(rng, self.start + self.T, self.G, self.C, self.data), self.start


@dataclass(frozen=True)
class AttentionScores(Attend):
    op = "attention_scores"


@dataclass(frozen=True)
class AttentionSoftmax(Attend):
    op = "attention_softmax"


@dataclass(frozen=True)
class PrepareRouter(Case):
    op, module = "prepare_router", "router"
    E: int
    D: int
    data: str = "normal"

    @property
    def cost(self) -> int:
        return self.E * self.D * 16

    def arguments(self) -> tuple[Any, ...]:
        return (floats(self.rng(), (self.E, self.D), self.data),)


@dataclass(frozen=True)
class RouterLogits(Case):
    op, module = "router_logits", "router"
    T: int
    E: int
    D: int
    data: str = "normal"

    @property
    def cost(self) -> int:
        return self.T * self.E * self.D

    def arguments(self) -> tuple[Any, ...]:
        rng = self.rng()
        lg = (self.D - 1).bit_length()
        bits = min(20, (52 - lg) // 2)
        q = rng.integers(-(2**bits), 2**bits + 1, (self.E, self.D)).astype(np.int32)
        if self.data == "worst":
            q[:] = 2**bits
        scale = np.exp2(rng.integers(-24, -16, self.E)).astype(np.float32)
        x = floats(rng, (self.T, self.D), "normal" if self.data == "worst" else self.data)
        if self.data == "worst":
            x[:] = np.nextafter(np.float32(2), np.float32(0))
        return x, RouterWeight(q, scale)


@dataclass(frozen=True)
class Route(Case):
    op, module = "route", "router"
    T: int
    E: int
    A: int
    data: str = "normal"

    @property
    def cost(self) -> int:
        return self.T * self.E * self.E * 16

    def arguments(self) -> tuple[Any, ...]:
        rng = self.rng()
        if self.data == "nonfinite":
            return floats(rng, (self.T, self.E), "nonfinite"), self.A
        logits = rng.standard_normal((self.T, self.E)).astype(np.float32)
        match self.data:
            case "normal":
                logits *= np.float32(2)
            case "equal":  # one tie over all experts, of both zeros
                logits[:] = np.where(rng.random(logits.shape) < 0.5, 0.0, -0.0)
            case "ties":  # few distinct values: ties within the chosen and across their edge
                logits[:] = rng.integers(0, 3, logits.shape)
            case "peaked":  # probabilities that are zero in fixed point, and some below exp's clamp
                logits *= np.float32(60)
            case "near":  # one ulp apart: softmax makes ties of some
                logits[:] = 1 + rng.integers(0, 4, logits.shape) * np.float32(2.0**-23)
            case _:
                raise ValueError(f"no logits of kind {self.data!r}")
        return logits, self.A


@dataclass(frozen=True)
class Group(Case):
    op, module = "dispatch", "dispatch"
    T: int
    A: int
    E: int
    load: str = "even"

    @property
    def cost(self) -> int:
        return self.T * self.A * self.E * 64

    def arguments(self) -> tuple[Any, ...]:
        return assignments(self.rng(), self.T, self.A, self.E, self.load), self.E


@dataclass(frozen=True)
class Swiglu(Case):
    op, module = "swiglu", "swiglu"
    R: int
    F: int
    data: str = "normal"

    @property
    def cost(self) -> int:
        return self.R * self.F * 64

    def arguments(self) -> tuple[Any, ...]:
        rng = self.rng()
        gate = floats(rng, (self.R, self.F), self.data)
        if self.data == "wide":  # beyond both clamps of exp
            gate = (rng.uniform(-120, 120, gate.shape)).astype(np.float32)
        return gate, floats(rng, (self.R, self.F), "normal")


@dataclass(frozen=True)
class SwigluQuantize(Case):
    op, module = "swiglu_quantize", "swiglu"
    R: int
    F: int
    profile: str
    data: str = "normal"

    @property
    def cost(self) -> int:
        return self.R * self.F * 64

    def arguments(self) -> tuple[Any, ...]:
        rng = self.rng()
        return floats(rng, (self.R, self.F), self.data), floats(rng, (self.R, self.F), "normal"), self.profile


@dataclass(frozen=True)
class Combine(Case):
    op, module = "combine", "combine"
    T: int
    A: int
    D: int
    data: str = "normal"

    @property
    def cost(self) -> int:
        return self.T * self.A * self.D * 8

    def arguments(self) -> tuple[Any, ...]:
        rng = self.rng()
        out = floats(rng, (self.T * self.A, self.D), self.data)
        weight = rng.random((self.T, self.A)).astype(np.float32) + np.float32(0.01)
        weight = -np.sort(-weight / weight.sum(1, keepdims=True, dtype=np.float32), axis=1)
        return out, np.ascontiguousarray(weight)


@dataclass(frozen=True)
class Add(Case):
    op, module = "add", "residual"
    T: int
    D: int
    data: str = "normal"

    @property
    def cost(self) -> int:
        return self.T * self.D

    def arguments(self) -> tuple[Any, ...]:
        rng = self.rng()
        return floats(rng, (self.T, self.D), self.data), floats(rng, (self.T, self.D), self.data)


@dataclass(frozen=True)
class StageDigest(Case):
    op, module = "stage_digest", "stage_digest"
    T: int
    W: int
    data: str = "normal"

    @property
    def cost(self) -> int:
        return self.T * self.W * 16

    def arguments(self) -> tuple[Any, ...]:
        rng = self.rng()
        shape = (self.T, self.W)
        match self.data:
            case "ids":
                return (rng.integers(-(2**31), 2**31, shape).astype(np.int32),)
            case "zeros":  # of both signs
                return (np.where(rng.random(shape) < 0.5, np.float32(0.0), np.float32(-0.0)),)
            case "nan":  # of any payload and sign, among infinities
                bits = rng.integers(0, 2**23, shape) | np.where(rng.random(shape) < 0.5, 0x7F800000, 0xFF800000)
                bits = np.where(rng.random(shape) < 0.2, bits & 0xFF800000, bits)
                return (bits.astype(np.uint32).view(np.float32),)
            case "equal":  # rows that are permutations of one another, and hold each value twice
                row = np.repeat(floats(rng, (self.W // 2 + 1,), "normal"), 2)[: self.W]
                return (
                    np.stack([rng.permutation(row) for _ in range(self.T)]) if self.T else np.zeros(shape, np.float32),
                )
            case kind:
                return (floats(rng, shape, kind),)


@dataclass(frozen=True)
class Argmax(Case):
    op, module = "argmax", "argmax"
    T: int
    V: int
    data: str = "normal"

    @property
    def cost(self) -> int:
        return self.T * self.V * 16

    def arguments(self) -> tuple[Any, ...]:
        rng = self.rng()
        match self.data:
            case "ties":
                logits = rng.integers(-3, 1, (self.T, self.V)) * np.float32(0.5)
            case "zeros":  # the two zeros are equal
                logits = np.where(rng.random((self.T, self.V)) < 0.5, 0.0, -0.0)
            case "nan":  # rows of NaN only, rows with some, a row of -inf and NaN
                logits = rng.standard_normal((self.T, self.V))
                logits[rng.random(logits.shape) < 0.5] = np.nan
                logits[::3] = np.nan
                logits[1::3, -1:] = -np.inf
                logits[1::3, :-1] = np.nan
            case kind:
                logits = floats(rng, (self.T, self.V), kind)
        return (logits.astype(np.float32),)


@dataclass(frozen=True)
class Matvec(Case):
    op, module = "matvec", "matvec"
    packed = True
    N: int
    K: int
    format: str
    profile: str
    second: str = ""  # format of a second matrix, of 7 rows
    around: str = "plain"  # norm before, residual after, or the row as an operand, then residual after
    data: str = "normal"

    @property
    def cost(self) -> int:
        return self.N * self.K

    def arguments(self) -> tuple[Any, ...]:
        rng = self.rng()
        kind = self.data if self.data in ("worst", "heavy", "zero", "subnormal") else "normal"
        weights = [blocks(rng, (self.N,), self.K, self.format, kind)]
        if self.second:
            weights.append(blocks(rng, (7,), self.K, self.second, kind))
        x: Any = one_row(rng, self.K, "normal" if kind == self.data else self.data)
        if self.data == "worst":
            x[:] = 1  # every code at its bound
        norm = Norm(floats(rng, (self.K,), "normal"), np.float32(EPS)) if self.around == "norm" else None
        rows = self.N + 7 * bool(self.second)
        residual = floats(rng, (rows,), "normal") if self.around in ("residual", "operand") else None
        if self.around == "operand":
            x = operand(quantize(x[None], self.profile))
        return weights, x, self.profile, norm, residual


@dataclass(frozen=True)
class DecodeRouter(Case):
    op, module = "decode_router", "decode_router"
    E: int
    D: int
    profile: str
    data: str = "normal"
    guess: bool = False  # of what the next layer's router would say

    @property
    def cost(self) -> int:
        return self.E * self.D * 16 * (2 if self.guess else 1)

    def arguments(self) -> tuple[Any, ...]:
        rng = self.rng()
        _, weight = RouterLogits(1, self.E, self.D).arguments()
        x = one_row(rng, self.D, self.data)
        norm, norm2 = (Norm(floats(rng, (self.D,), "normal"), np.float32(EPS)) for _ in range(2))
        then = NextLayer(norm2, RouterWeight(weight.q[::-1].copy(), weight.scale[::-1].copy()))
        return x, norm, weight, self.profile, then if self.guess else None


def one_token(e: int, data: str) -> F32:
    """Logits of `e` experts for one token, of the kinds of `Route`; with "nonfinite", a token that has a NaN."""
    logits, _ = Route(2 if data == "nonfinite" else 1, e, 1, data).arguments()
    row: F32 = logits[-1]
    return row


def routed(rng: Generator, e: int, d: int, profile: str, data: str) -> Routed:
    """Logits of `e` experts, and the operand of a row of `d`."""
    return Routed(one_token(e, data), operand(activations(rng, 1, d, profile, "normal")))


@dataclass(frozen=True)
class ExpertsUp(Case):
    op, module = "experts_up", "decode_experts"
    packed = True
    E: int
    A: int
    F: int
    D: int
    format: str
    second: str  # of the up matrix
    profile: str
    data: str = "normal"

    @property
    def cost(self) -> int:
        return self.A * self.F * self.D * 2

    def arguments(self) -> tuple[Any, ...]:
        rng = self.rng()
        gate, up = (blocks(rng, (self.E, self.F), self.D, fmt, "normal") for fmt in (self.format, self.second))
        return routed(rng, self.E, self.D, self.profile, self.data), gate, up, self.A


@dataclass(frozen=True)
class ExpertsDown(Case):
    op, module = "experts_down", "decode_experts"
    packed = True
    E: int
    A: int
    F: int
    D: int
    format: str
    profile: str
    data: str = "normal"

    @property
    def cost(self) -> int:
        return self.A * self.F * self.D

    def arguments(self) -> tuple[Any, ...]:
        rng = self.rng()
        down = blocks(rng, (self.E, self.D), self.F, self.format, "normal")
        h = floats(rng, (self.A, self.F), "normal")
        x = floats(rng, (self.D,), "normal")
        return Activated(h, one_token(self.E, self.data)), down, x, self.profile


@dataclass(frozen=True)
class DecodeAttention(Case):
    op, module = "decode_attention", "decode_attention"
    writes = 4
    H: int
    G: int
    C: int
    position: int
    profile: str
    data: str = "normal"

    @property
    def cost(self) -> int:
        return self.H * self.C * (self.position + 1) * 8

    def arguments(self) -> tuple[Any, ...]:
        rng = self.rng()
        kind = self.data if self.data in ("huge", "tiny") else "normal"
        qkv = floats(rng, (self.H + 2 * self.G, self.C), kind).reshape(-1)
        if self.data == "new":  # the new key and value are not finite
            qkv[self.H * self.C], qkv[-1] = np.nan, np.inf
        q_norm, k_norm = (Norm(floats(rng, (self.C,), "normal"), np.float32(EPS)) for _ in range(2))
        if self.data == "peaked":
            q_norm.weight[:] *= np.float32(60)
        angle = rng.uniform(-np.pi, np.pi, (self.position + 1 + CACHE_SLACK, self.C // 2))
        table = RopeTable(np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32))
        kv = cache(rng, self.position + 1, self.G, self.C, self.data)
        return qkv, q_norm, k_norm, table, kv, np.array([self.position], np.int32), self.profile


_ROWS = (0, 1, 2, 7, 17, 64, 65, 130)
_KINDS = ("outlier", "zero", "tiny", "halves", "twins", "huge", "wide", "nonfinite")


def _quantise_cases() -> Iterator[Case]:
    for profile in PROFILES:
        for T, K in [*product(_ROWS, (256,)), (3, 512), (7, 1024), (5, 2048), (4096, 2048)]:
            yield Quantize(T, K, profile)
        yield from (Quantize(17, 512, profile, data) for data in _KINDS)


def _norm_cases() -> Iterator[Case]:
    for T, K in [*product(_ROWS, (256,)), (3, 1), (7, 100), (5, 257), (3, 768), (5, 2048), (2, 16384), (512, 2048)]:
        yield RmsNorm(T, K)
    yield from (RmsNorm(17, 512, data) for data in ("small", *_KINDS))
    yield RmsNorm(2, 16384, "halves")
    for profile in PROFILES:
        for T, K in [(0, 256), (1, 256), (7, 768), (17, 2048), (3, 1280), (512, 2048)]:
            yield RmsNormQuantize(T, K, profile)
        yield from (RmsNormQuantize(7, 768, profile, data) for data in ("small", *_KINDS))


def _embed_cases() -> Iterator[Case]:
    for fmt in BLOCK_BYTES:
        for T, V, D in [(0, 7, 256), (1, 1, 256), (2, 48, 512), (17, 257, 768), (65, 100, 2048), (4096, 2048, 2048)]:
            yield Embed(T, V, D, fmt)
        yield from (Embed(7, 48, 512, fmt, data) for data in ("worst", "zero", "subnormal"))


def _matmul_cases() -> Iterator[Case]:
    for fmt, profile in product(BLOCK_BYTES, PROFILES):
        for T in _ROWS:
            yield Matmul(T, 48, 256, fmt, profile)
        yield Matmul(4096, 1, 256, fmt, profile)
        for N, K in [(1, 512), (100, 1024), (257, 512), (768, 256), (48, 2048)]:
            yield Matmul(3, N, K, fmt, profile)
        for data in ("worst", "heavy", "zero", "subnormal", "nonfinite"):
            yield Matmul(7, 48, 512, fmt, profile, data)
        yield Matmul(4096, 257, 2048, fmt, profile)
        yield Matmul(512, 4096, 2048, fmt, profile, "worst")
    for fmt, profile in product(BLOCK_BYTES, PROFILES):
        for T, E, A in [(0, 4, 2), (1, 12, 3), (1, 128, 8), (7, 5, 5), (17, 12, 4), (65, 16, 1)]:
            yield GroupedMatmul(T, E, A, 48, 256, fmt, profile)
        for load in ("one", "ragged", "odd"):
            yield GroupedMatmul(33, 12, 3, 100, 512, fmt, profile, load)
        yield GroupedMatmul(17, 12, 4, 257, 256, fmt, profile, "ragged", "down")
        yield GroupedMatmul(1, 12, 3, 48, 768, fmt, profile, "one", "down")
        yield GroupedMatmul(512, 128, 8, 768, 2048, fmt, profile, "ragged")
        yield GroupedMatmul(512, 128, 8, 2048, 768, fmt, profile, "even", "down")


def _rope_cases() -> Iterator[Case]:
    for T, n, C, start in [
        (0, 2, 64, 5),
        (1, 1, 64, 0),
        (1, 4, 128, 300),
        (2, 3, 2, 1),
        (7, 8, 128, 0),
        (17, 2, 96, 255),
    ]:
        yield QkNormRope(T, n, C, start)
    yield QkNormRope(130, 2, 64, 1)
    yield QkNormRope(512, 32, 128, 3000)
    yield from (QkNormRope(7, 3, 128, 1, data) for data in ("small", "zero", "tiny", "huge", "wide", "nonfinite"))


def _cache_cases() -> Iterator[Case]:
    for T, G, C, start in [
        (0, 2, 64, 3),
        (1, 1, 64, 0),
        (1, 4, 128, 300),
        (2, 3, 96, 255),
        (17, 2, 128, 1),
        (65, 2, 256, 0),
    ]:
        yield Append(T, G, C, start)
    yield Append(512, 4, 128, 3000)
    yield from (Append(7, 3, 128, 1, data) for data in _KINDS)


def _attention_cases() -> Iterator[Case]:
    for start in (0, 1, 255, 300):
        for T in (1, 7):
            yield Attend(T, 8, 2, 64, start)
    for T, H, G, C, start in [
        (0, 4, 2, 64, 3),
        (2, 4, 4, 128, 5),
        (17, 6, 2, 96, 1),
        (65, 4, 1, 64, 0),
        (3, 16, 2, 256, 30),
    ]:
        yield Attend(T, H, G, C, start)
    yield Attend(130, 2, 1, 128, 255)
    for data in ("peaked", "flat", "worst", "wide", "zero", "nonfinite", "overflow"):
        yield Attend(7, 8, 2, 128, 20, data)
    yield Attend(512, 32, 4, 128, 513)
    yield Attend(1, 32, 4, 128, 16383)
    for kind in (AttentionScores, AttentionSoftmax):
        for T, H, G, C, start in [(0, 4, 2, 64, 3), (1, 8, 2, 128, 0), (7, 8, 2, 64, 255), (17, 6, 2, 96, 1)]:
            yield kind(T, H, G, C, start)
        yield from (kind(7, 8, 2, 128, 20, data) for data in ("peaked", "flat", "nonfinite"))


def _router_cases() -> Iterator[Case]:
    for E, D in [(1, 256), (12, 300), (128, 2048), (16, 16384)]:
        yield PrepareRouter(E, D)
    yield from (PrepareRouter(12, 512, data) for data in ("outlier", "zero", "tiny", "halves", "wide"))
    for T, E, D in [
        (0, 4, 256),
        (1, 1, 256),
        (2, 12, 300),
        (7, 128, 2048),
        (17, 16, 512),
        (65, 100, 256),
        (3, 5, 16384),
    ]:
        yield RouterLogits(T, E, D)
    yield from (
        RouterLogits(7, 12, 512, data) for data in ("worst", "outlier", "zero", "tiny", "huge", "wide", "nonfinite")
    )
    yield RouterLogits(2, 3, 16384, "worst")
    yield RouterLogits(512, 128, 2048)
    for T, E, A in [
        (0, 4, 2),
        (1, 1, 1),
        (2, 12, 12),
        (7, 128, 8),
        (17, 100, 3),
        (130, 16, 4),
        (2, 1024, 10),
        (512, 128, 8),
    ]:
        yield Route(T, E, A)
    for data in ("equal", "ties", "peaked", "near", "nonfinite"):
        yield Route(17, 12, 3, data)
        yield Route(17, 128, 8, data)
    for T, A, E in [(0, 2, 4), (1, 1, 1), (1, 8, 128), (7, 3, 12), (17, 4, 5), (130, 8, 128), (1000, 8, 16)]:
        yield Group(T, A, E)
    yield from (Group(65, 3, 12, load) for load in ("one", "ragged", "odd"))


def _rest_cases() -> Iterator[Case]:
    for R, F in [(0, 256), (1, 1), (7, 100), (17, 768), (130, 257), (4096, 768)]:
        yield Swiglu(R, F)
    yield from (Swiglu(17, 257, data) for data in ("wide", "zero", "tiny", "huge", "nonfinite"))
    for profile in PROFILES:
        for R, F in [(0, 256), (1, 256), (7, 768), (65, 512), (4096, 768)]:
            yield SwigluQuantize(R, F, profile)
        yield from (SwigluQuantize(7, 512, profile, data) for data in ("outlier", "zero", "tiny", "nonfinite"))
    for T, A, D in [(0, 2, 256), (1, 1, 1), (1, 8, 2048), (7, 3, 100), (17, 4, 257), (130, 2, 256), (512, 8, 2048)]:
        yield Combine(T, A, D)
    yield from (Combine(7, 4, 257, data) for data in ("zero", "tiny", "huge", "wide", "nonfinite"))
    for T, D in [(0, 256), (1, 1), (7, 100), (17, 2048), (130, 257), (4096, 2048)]:
        yield Add(T, D)
    yield from (Add(7, 257, data) for data in ("zero", "tiny", "huge", "nonfinite"))
    for T, V in [(0, 5), (1, 1), (2, 100), (7, 8193), (17, 257), (2, 151936)]:
        yield Argmax(T, V)
    yield from (Argmax(17, 100, data) for data in ("ties", "zeros", "nan", "nonfinite", "tiny"))
    for T, W in ((0, 4), (1, 0), (1, 1), (3, 1), (7, 33), (5, 1024), (2, 1025), (65, 40), (1, 151936)):
        yield StageDigest(T, W)
    yield from (StageDigest(17, 100, data) for data in ("ids", "zeros", "nan", "equal", "nonfinite", "tiny"))


def _decode_cases() -> Iterator[Case]:
    for fmt, profile in product(BLOCK_BYTES, PROFILES):
        for N, K in [(1, 256), (16, 512), (33, 768), (130, 256), (48, 2048), (17, 4096)]:
            yield Matvec(N, K, fmt, profile)
        for data in ("worst", "heavy", "zero", "subnormal", "outlier", "tiny", "nonfinite"):
            yield Matvec(23, 512, fmt, profile, data=data)
        for second, around in product(("", *BLOCK_BYTES), ("norm", "residual", "operand")):
            if around == "norm" or not second:
                yield Matvec(23, 768, fmt, profile, second, around)
        yield Matvec(23, 512, fmt, profile, around="norm", data="nonfinite")
        yield Matvec(151936, 2048, fmt, profile, around="norm")
        yield Matvec(4608, 2048, fmt, profile, "Q6_K", "norm")
    for profile in PROFILES:
        for E, D in [(1, 256), (12, 768), (128, 2048), (5, 4096)]:
            yield DecodeRouter(E, D, profile)
            yield DecodeRouter(E, D, profile, guess=True)
        for data in ("outlier", "zero", "tiny", "huge", "nonfinite"):
            yield DecodeRouter(12, 512, profile, data, guess=data in ("huge", "nonfinite"))
        for E, A, F, D in [(1, 1, 256, 256), (12, 3, 256, 512), (7, 7, 512, 256), (128, 8, 256, 256)]:
            for fmt, second in (("Q4_K", "Q4_K"), ("Q4_K", "Q6_K"), ("Q6_K", "Q4_K")):
                yield ExpertsUp(E, A, F, D, fmt, second, profile)
            for fmt in BLOCK_BYTES:
                yield ExpertsDown(E, A, F, D + 7, fmt, profile)
        for data in ("equal", "ties", "peaked", "nonfinite"):
            yield ExpertsUp(12, 3, 256, 256, "Q4_K", "Q4_K", profile, data)
            yield ExpertsDown(12, 3, 256, 256, "Q6_K", profile, data)
        yield ExpertsUp(128, 8, 768, 2048, "Q4_K", "Q4_K", profile)
        yield from (ExpertsDown(128, 8, 768, 2048, fmt, profile) for fmt in BLOCK_BYTES)
    for profile in PROFILES:
        # Queries of a kv head in whole blocks of 256, and not; keys in one tile, in several, in several of a program.
        for H, G, C, position in [
            (1, 1, 32, 0), (8, 2, 64, 1), (6, 2, 100, 17), (8, 1, 128, 127), (8, 2, 64, 128), (4, 4, 64, 128),
            (6, 1, 128, 300), (2, 1, 64, 700), (32, 4, 128, 4095),
        ]:  # fmt: skip
            yield DecodeAttention(H, G, C, position, profile)
        for data in ("worst", "wide", "zero", "nonfinite", "overflow", "peaked", "huge", "tiny", "new"):
            yield DecodeAttention(8, 2, 64, 37, profile, data)
            yield DecodeAttention(4, 2, 64, 150, profile, data)
        # More queries of a kv head than a program takes, in one launch and in two.
        for H, G, C, position in [(8, 1, 128, 40), (6, 1, 64, 20), (16, 1, 32, 140), (24, 2, 32, 140)]:
            yield DecodeAttention(H, G, C, position, profile)
        for data in ("early", "late", "peaked", "nonfinite"):
            yield DecodeAttention(2, 1, 64, 900, profile, data)


def _table() -> dict[str, tuple[Case, ...]]:
    groups = (
        _embed_cases(), _norm_cases(), _quantise_cases(), _matmul_cases(), _rope_cases(), _cache_cases(),
        _attention_cases(), _router_cases(), _rest_cases(), _decode_cases(),
    )  # fmt: skip
    table: dict[str, list[Case]] = {}
    for group in groups:
        for case in group:
            table.setdefault(case.op, []).append(case)
    return {op: tuple(cases) for op, cases in table.items()}


CASES: dict[str, tuple[Case, ...]] = _table()
"""Cases by op."""


def cheap(op: str) -> tuple[Case, ...]:
    """The cases of `op` that the interpreter can afford."""
    return tuple(case for case in CASES[op] if not case.gpu)


def reference_output(case: Case) -> dict[str, NDArray[Any]]:
    """What the reference makes of a case, by name."""
    args = case.arguments()
    run = getattr(import_module(f"exactmoe.parity.reference.{case.module}"), case.op)
    with np.errstate(all="ignore"):
        result = run(*args)
    return _outputs(case, result, args)


def kernel_output(
    case: Case, device: "torch.device", arguments: tuple[Any, ...] | None = None, **options: Any
) -> dict[str, NDArray[Any]]:
    """What the kernel makes of a case (or of `arguments` in its place) on `device`; `options` go to the op."""
    args = case.on(device, arguments)
    with np.errstate(all="ignore"):  # the interpreter computes in numpy
        result = kernel(case)(*args, **options)
    return _outputs(case, result, args)


def kernel(case: Case) -> Callable[..., Any]:
    """The op of a case as production calls it."""
    run: Callable[..., Any] = getattr(import_module(f"exactmoe.{case.package}.{case.module}"), case.op)
    return run


def _outputs(case: Case, result: Any, args: tuple[Any, ...]) -> dict[str, NDArray[Any]]:
    """What an op returned and what it wrote, by name."""
    returned = {} if result is None else _named(result)
    return returned | ({} if case.writes is None else _named(args[case.writes]))


def tensors(args: tuple[Any, ...], device: "torch.device", packed: bool = False) -> tuple[Any, ...]:
    """A case's arguments as the kernels take them, weights `packed` where its kernel wants them so."""
    return tuple(_tensors(arg, device, packed) for arg in args)


_KERNEL_HOME = {
    "Activated": "decode_experts", "Dispatch": "dispatch", "KVLayer": "kv_cache", "Norm": "matvec", "RopeTable": "rope",
    "NextLayer": "decode_router", "Routed": "decode_router", "RouterWeight": "router",
}  # fmt: skip


def _tensors(arg: Any, device: "torch.device", packed: bool) -> Any:
    import torch

    from exactmoe.kernels import tensors as kernel_tensors
    from exactmoe.kernels.formats import EXECUTABLE

    if isinstance(arg, QuantMatrix):
        data = torch.from_numpy(np.ascontiguousarray(arg.data)).to(device)
        weight = kernel_tensors.quant_matrix(data, EXECUTABLE[arg.type_name], "weight")
        return import_module("exactmoe.kernels.packed").pack(weight) if packed else weight
    if isinstance(arg, Activations):
        parts = (arg.q, arg.scale, group_sums(arg.q))
        return kernel_tensors.Activations(*(torch.from_numpy(part).to(device) for part in parts))
    if isinstance(arg, tuple):
        kind = getattr(import_module(f"exactmoe.kernels.{_KERNEL_HOME[type(arg).__name__]}"), type(arg).__name__)
        return kind(*(_tensors(part, device, packed) for part in arg))
    if isinstance(arg, list):
        return [_tensors(part, device, packed) for part in arg]
    if isinstance(arg, np.ndarray):
        return torch.from_numpy(arg).to(device)
    if isinstance(arg, np.float32):
        return float(arg)
    return arg


def group_sums(q: NDArray[np.int8]) -> NDArray[np.int16]:
    """Sums of q over groups of 16: what kernels keep beside quantised activations."""
    return np.asarray(q.reshape(*q.shape[:-1], q.shape[-1] // 16, 16).sum(axis=-1, dtype=np.int16))


def _named(value: Any, name: str = "out") -> dict[str, NDArray[Any]]:
    if value is None:  # an output that this shape does not have; the other side must not have it either
        return {}
    if not isinstance(value, tuple):
        return {name: value if isinstance(value, np.ndarray) else value.cpu().numpy()}
    named = {}
    for field, part in value._asdict().items():  # type: ignore[attr-defined]
        named.update(_named(part, field))
    if isinstance(value, Activations):
        named.setdefault("group_sum", group_sums(value.q))
    return named
