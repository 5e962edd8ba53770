"""PTX lint: what the compiler made of every shipped kernel.      python -m exactmoe.kernels.ptx_lint [--arch 80,90,100]
Promised: each launch the ops make is compiled for each architecture, without a GPU, and every instruction is judged.

Bit-exactness dies in the compiler: a contracted multiply-add, an approximate division, a flushed subnormal. So float
instructions pass by an allow-list of those that round once, to nearest even; anything else needs an entry in REVIEWED,
and an entry that nothing needs is an error too. The ops run on unwritten CPU tensors with Triton's launch replaced by
compile-only, so what is judged is what is launched: same constexprs, same options, same inlined helpers."""

import argparse
import ast
import hashlib
import importlib
import json
import os
import pkgutil
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from functools import partial
from itertools import repeat
from multiprocessing import get_context
from typing import Any, NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from exactmoe import kernels
from exactmoe.kernels.errors import InvalidInput, MissingEnvironment
from exactmoe.kernels.formats import EXECUTABLE
from exactmoe.kernels.launch import interpreting

ARCHS = (80, 90, 100)
NOTHING = "no kernel was compiled: nothing was judged"


class Review(NamedTuple):
    """An instruction that is allowed in one kernel although the allow-list does not have it."""

    kernel: str  # regular expression for the whole function name
    instruction: str  # and for the whole opcode
    reason: str


REVIEWED: tuple[Review, ...] = (
    Review(
        "_matmul_kernel",
        r"mma\.sync\.aligned\.m16n8k16\.row\.col\.f32\.f16\.f16\.f32"
        r"|wgmma\.mma_async\.sync\.aligned\.m64n\d+k16\.f32\.f16\.f16"
        r"|tcgen05\.mma\.cta_group::1\.kind::f16",
        "f16 carries integers below 2^11 and a chain of 256 stays below 2^24: every partial sum is exact in f32",
    ),
    Review(
        "_logits_kernel",
        r"fma\.rn\.f64|mma\.sync\.aligned\.m(8n8k4|16n8k\d+)\.row\.col\.f64\.f64\.f64\.f64",
        "integers with D * 2^bx * 2^bw <= 2^52: every product and partial sum is exact in f64",
    ),
    Review(
        "_maxima_kernel|_emit_kernel",
        r"fma\.rn\.f64|mma\.sync\.aligned\.m(8n8k4|16n8k\d+)\.row\.col\.f64\.f64\.f64\.f64",
        "15-bit q times 15-bit k over at most 256 channels stays below 2^37: exact in f64",
    ),
    Review(
        "_decode_(scores|values)_kernel",
        r"mma\.sync\.aligned\.m16n8k16\.row\.col\.f32\.f16\.f16\.f32",
        "f16 carries slices of at most 1024 and 128, and a chain of 128 stays at or below 2^24: exact in f32",
    ),
    Review(
        "_decode_(scores|values)_kernel",
        r"(add|sub)\.(rn\.)?f16(x2)?",
        "takes 1280 or 1024 from an integer in 1024..1344: exact in f16",
    ),
    Review(
        "_join_kernel",
        r"add\.rn\.f64",
        "adds up the integer sums of the parts, at or below 2^51 together: exact in f64",
    ),
    Review(
        "_sums_kernel",
        r"fma\.rn\.f64|mma\.sync\.aligned\.m(8n8k4|16n8k\d+)\.row\.col\.f64\.f64\.f64\.f64",
        "scores as above; 21-bit weights times 14-bit v over at most 2^18 keys stay at or below 2^51: exact in f64",
    ),
)


class Found(NamedTuple):
    """One compiled kernel and what is in it."""

    kernel: str
    variant: str  # its constexprs
    arch: int
    instructions: dict[str, int]  # float and matrix instructions, with counts
    reviewed: dict[str, str]  # those that pass by review, with the reason
    faults: dict[str, str]  # those that do not pass, with the reason
    registers: int | None  # a thread, from ptxas; None where not asked for
    stack: int | None  # bytes a thread, spills included
    ptx: str = ""  # SHA-256 of the PTX without comments; "" where it did not compile
    warps: int = 0
    shared: int = 0  # bytes of shared memory a program
    size: int = 0  # PTX instructions
    barriers: int = 0  # of them, those at which the warps of a program wait for each other


class Report(NamedTuple):
    """The lint of a set of launches."""

    found: list[Found]
    complaints: list[str]  # what is wrong besides instructions

    @property
    def clean(self) -> bool:
        """Whether kernels were judged and none was refused."""
        return bool(self.found) and not self.complaints and not any(f.faults for f in self.found)


_FLOAT = re.compile(r"(bf16|f16|f32|f64|tf32|e4m3|e5m2|e2m1|e2m3|e3m2|ue8m0)(x[24])?")
_MATRIX = ("mma", "wgmma", "tcgen05")
_MOVES = {
    "ld",
    "ldu",
    "st",
    "mov",
    "selp",
    "shfl",
    "redux",
    "setp",
    "set",
    "min",
    "max",
    "abs",
    "neg",
    "testp",
    "copysign",
}
_ONE_ROUNDING = {"add", "sub", "mul", "div", "sqrt"}
_INTEGER_MATRIX = re.compile(r"\.s32(\.[su](8|4)){2}|\.kind::i8\b")
_INEXACT_PARTS = {"approx": "approximate", "full": "not correctly rounded", "ftz": "flushes subnormals to zero"}
_INEXACT_BASES = {"ex2", "lg2", "sin", "cos", "tanh", "rcp", "rsqrt"}
_MATRIX_COMPUTES = re.compile(r"(wgmma\.mma_async|tcgen05\.mma|w?mma)\.")


def opcodes(ptx: str) -> Counter[str]:
    """Opcodes of a PTX module, inline assembly included, with how often each stands in the text."""
    found: Counter[str] = Counter()
    for statement in re.split(r"[;{}\n]", _without_comments(ptx)):
        match = re.match(r"\s*(?:\$?[\w$]+:\s*)*(?:@!?%?\w+\s+)?([a-z][a-z0-9_]*(?:[.:]+[\w]+)*)(?:\s|$)", statement)
        if match:
            found[match[1]] += 1
    return found


def _without_comments(ptx: str) -> str:
    return re.sub(r"//[^\n]*|/\*.*?\*/", "", ptx, flags=re.DOTALL)


def is_numeric(opcode: str) -> bool:
    """Whether an opcode touches floats, multiplies matrices or approximates: the ones a report lists."""
    parts = opcode.split(".")
    return (
        any(_FLOAT.fullmatch(p) for p in parts)
        or bool(_MATRIX_COMPUTES.match(opcode))
        or parts[0] in _INEXACT_BASES
        or any(p in _INEXACT_PARTS for p in parts)
    )


def judge(opcode: str) -> str | None:
    """Why an opcode is not allowed in a kernel, or None where it is."""
    base, *parts = opcode.split(".")
    if not is_numeric(opcode):
        return None
    for part, why in _INEXACT_PARTS.items():
        if part in parts:
            return why
    if base in _INEXACT_BASES:
        return "approximate"
    if base in ("fma", "mad"):
        return "contracts a multiplication and an addition into one rounding"
    if base in ("atom", "red", "multimem"):
        return "float reduction in no promised order"
    if _MATRIX_COMPUTES.match(opcode):
        return (
            None if _INTEGER_MATRIX.search(opcode) else "float matrix product: its order and roundings are the device's"
        )
    if base in _MOVES:
        return None
    types = {p for p in parts if _FLOAT.fullmatch(p)}
    if base in _ONE_ROUNDING and "rn" in parts and types <= {"f32", "f32x2"}:
        return None
    if base in _ONE_ROUNDING and types == {"f64"}:
        return "binary64 arithmetic: the contract has it for integers only"
    if base == "cvt":
        return _judge_conversion(parts)
    return "not on the list of float instructions that round once, to nearest even"


def _judge_conversion(parts: list[str]) -> str | None:
    to, source = parts[-2:]
    widths = {"f16": 16, "f32": 32, "f64": 64}
    if to in widths and source in widths and widths[to] >= widths[source]:
        return None
    if to in widths and (source in widths or source[0] in "su"):
        return None if "rn" in parts else "conversion that does not round to nearest even"
    if source in widths and to[0] in "su":
        return None if {"rni", "rzi", "rmi", "rpi"} & set(parts) else "conversion without a stated rounding"
    return "conversion to or from a type the contract does not use"


class Launch(NamedTuple):
    """One launch as an op made it, tensors unwritten."""

    fn: JITFunction[Any]
    args: tuple[Any, ...]
    options: dict[str, Any]  # keyword arguments: constexprs and launch options

    @property
    def variant(self) -> str:
        """Its constexprs, as text."""
        named = {k: v for k, v in self.options.items() if k in self.fn.arg_names}
        return " ".join(f"{k}={v}" for k, v in named.items())

    @property
    def key(self) -> tuple[object, ...]:
        """What Triton specialises on: equal keys compile to the same code."""
        kinds = (
            a.dtype if isinstance(a, torch.Tensor) else (a == 1, a % 16 == 0) if type(a) is int else type(a)
            for a in self.args
        )
        return self.fn, tuple(sorted(self.options.items())), tuple(kinds)


class _CompileOnly:
    """A driver for a device that is not there: enough for Triton to compile, nothing to launch on."""

    def __init__(self) -> None:
        self.arch = ARCHS[0]

    def get_current_device(self) -> int:
        return self.arch  # Triton caches compiled kernels by device

    def get_current_stream(self, _device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)


def _without_assembler(_backend: Any = None, stages: Any = None, *_rest: Any) -> tuple[str, str] | None:
    """Triton's hook on its pipeline: called bare for a cache key, and with the stages to change them."""
    if stages is None:
        return "without assembler", "1"
    stages["cubin"] = lambda _ptx, _metadata: b""
    return None


@contextmanager
def _launch_replaced(run: Callable[..., Any]) -> Iterator[None]:
    original = JITFunction.run
    JITFunction.run = run
    try:
        yield
    finally:
        JITFunction.run = original


def record(ops: Iterable[Callable[[], object]]) -> list[Launch]:
    """Call `ops` and return the distinct launches they make, none of which reaches a device."""
    if interpreting():
        raise MissingEnvironment("TRITON_INTERPRET=1 is set: the interpreter compiles nothing; unset it to lint")
    launches: dict[tuple[object, ...], Launch] = {}

    def run(self: JITFunction[Any], *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        launch = Launch(self, args, options)
        launches.setdefault(launch.key, launch)

    with _launch_replaced(run):
        for op in ops:
            op()
    return list(launches.values())


def lint(launches: list[Launch], archs: tuple[int, ...] = ARCHS, resources: tuple[int, ...] = ()) -> Report:
    """Compile each launch for each architecture and judge what came out. Leaves a process that can only compile."""
    target = _CompileOnly()
    driver.set_active(target)
    triton.knobs.compilation.disable_line_info = True  # line numbers and paths would be part of the PTX
    found: dict[tuple[str, int, str], Found] = {}
    for launch in launches:
        for arch in archs:
            target.arch = arch
            # Assembling takes a third of the time and tells only the resources.
            triton.knobs.runtime.add_stages_inspection_hook = None if arch in resources else _without_assembler
            name = launch.fn.__name__
            try:
                compiled = launch.fn.run(*launch.args, grid=(1,), warmup=True, **launch.options)
            except Exception as error:  # whatever the compiler raises is a verdict on this kernel, the others go on
                why = f"{type(error).__name__}: {error}"
                found[name, arch, launch.variant] = Found(
                    name, launch.variant, arch, {}, {}, {"compile": why}, None, None
                )
                continue
            if (name, arch, compiled.hash) not in found:
                found[name, arch, compiled.hash] = _judge_kernel(launch, arch, compiled, arch in resources)
    return Report(list(found.values()), [] if found else [NOTHING])


def lint_shipped(archs: tuple[int, ...] = ARCHS, resources: tuple[int, ...] = ()) -> Report:
    """Lint every kernel of this package; a kernel no launch reaches, and a review nothing needs, are complaints.

    Registers and stack are found for the architectures in `resources`."""
    launches = record(shipped_ops())
    shares = os.cpu_count() or 1
    with ProcessPoolExecutor(shares, get_context("spawn")) as pool:
        parts = pool.map(_lint_share, range(shares), repeat(shares), repeat(archs), repeat(resources))
        merged = {(f.kernel, f.variant, f.arch, f.ptx): f for part in parts for f in part}
    report = Report([merged[key] for key in sorted(merged)], [] if merged else [NOTHING])
    for name in sorted(_jit_functions() - _reached(launch.fn for launch in launches)):
        report.complaints.append(f"{name}: no launch reaches it, so it was not judged")
    if set(archs) == set(ARCHS):
        for review in REVIEWED:
            if not any(_matches(review, f.kernel, op) for f in report.found for op in f.instructions):
                report.complaints.append(f"review of {review.kernel} {review.instruction}: matches nothing, remove it")
    return report


def _lint_share(share: int, shares: int, archs: tuple[int, ...], resources: tuple[int, ...]) -> list[Found]:
    return lint(record(shipped_ops())[share::shares], archs, resources).found


def _judge_kernel(launch: Launch, arch: int, compiled: Any, resources: bool) -> Found:
    name = launch.fn.__name__
    instructions = {op: n for op, n in sorted(opcodes(compiled.asm["ptx"]).items()) if is_numeric(op)}
    reviewed, faults = {}, {}
    for op in instructions:
        why = judge(op)
        review = next((r for r in REVIEWED if _matches(r, name, op)), None)
        if why and review:
            reviewed[op] = review.reason
        elif why:
            faults[op] = why
    if compiled.metadata.enable_fp_fusion:
        faults["enable_fp_fusion"] = "launched without enable_fp_fusion=False: the assembler may contract"
    registers, stack = _resources(compiled.asm["cubin"]) if resources else (None, None)
    ptx, metadata = _without_comments(compiled.asm["ptx"]), compiled.metadata
    counts = opcodes(ptx)
    barriers = sum(n for op, n in counts.items() if op.split(".")[0] in ("bar", "barrier"))
    return Found(
        name, launch.variant, arch, instructions, reviewed, faults, registers, stack,
        hashlib.sha256(ptx.encode()).hexdigest(), metadata.num_warps, metadata.shared, counts.total(), barriers,
    )  # fmt: skip


def _matches(review: Review, kernel: str, opcode: str) -> bool:
    return bool(re.fullmatch(review.kernel, kernel) and re.fullmatch(review.instruction, opcode))


def _resources(cubin: bytes) -> tuple[int, int]:
    """Registers and stack bytes a thread, as ptxas recorded them in the cubin."""
    tool = triton.knobs.nvidia.cuobjdump.path
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([tool, "-res-usage", file.name], check=True, capture_output=True, text=True).stdout
    match = re.search(r"REG:(\d+) STACK:(\d+)", text)
    if not match:
        raise MissingEnvironment(f"{tool} prints no resource usage: {text.strip()!r}")
    return int(match[1]), int(match[2])


def _modules() -> list[Any]:
    names = [m.name for m in pkgutil.iter_modules(kernels.__path__) if m.name not in ("ptx_lint", "ptx_lock")]
    return [importlib.import_module(f"exactmoe.kernels.{name}") for name in names]


def _jit_functions() -> set[str]:
    values = [v for module in _modules() for v in vars(module).values()]
    return {_name(v) for v in values if isinstance(v, JITFunction) and v.__module__.startswith("exactmoe.kernels.")}


def _reached(roots: Iterable[JITFunction[Any]]) -> set[str]:
    """Names of the given kernels and of every jit function they call, directly or not."""
    reached: dict[str, JITFunction[Any]] = {}
    waiting = list(roots)
    while waiting:
        fn = waiting.pop()
        if _name(fn) in reached:
            continue
        reached[_name(fn)] = fn
        for node in ast.walk(fn.parse()):
            value: Any = None
            if isinstance(node, ast.Name):
                value = fn.__globals__.get(node.id)
            elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                value = getattr(fn.__globals__.get(node.value.id), node.attr, None)
            if isinstance(value, JITFunction):
                waiting.append(value)
    return set(reached)


def _name(fn: JITFunction[Any]) -> str:
    return f"{fn.__module__.rpartition('.')[2]}.{fn.__name__}"


def shipped_ops() -> Iterator[Callable[[], object]]:
    """Every public op, at the shapes of Qwen3-30B-A3B: one token and a chunk of 512, each format, each profile."""
    from exactmoe.kernels.argmax import argmax
    from exactmoe.kernels.attention import attend, attention_scores, attention_softmax
    from exactmoe.kernels.combine import combine
    from exactmoe.kernels.dispatch import Dispatch, dispatch
    from exactmoe.kernels.embedding import embed
    from exactmoe.kernels.kv_cache import KVLayer, append
    from exactmoe.kernels.matmul import grouped_matmul, matmul
    from exactmoe.kernels.norm import rms_norm, rms_norm_quantize
    from exactmoe.kernels.quantize import empty_activations, quantize
    from exactmoe.kernels.residual import add
    from exactmoe.kernels.rope import RopeTable, qk_norm_rope
    from exactmoe.kernels.router import RouterWeight, prepare_router, route, router_logits
    from exactmoe.kernels.stage_digest import stage_digest
    from exactmoe.kernels.swiglu import swiglu, swiglu_quantize
    from exactmoe.kernels.tensors import PROFILES, quant_matrix

    D, H, G, C, E, A, F, V, P = 2048, 32, 4, 128, 128, 8, 768, 4096, 4096  # V, P: any large number
    cpu = torch.device("cpu")

    def f32(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.float32)

    def ints(*shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype)

    yield partial(prepare_router, f32(E, D))
    kv = KVLayer(ints(P, G, C, dtype=torch.int16), f32(P, G), ints(P, G, C, dtype=torch.int16), f32(P, G))
    rope = RopeTable(f32(P, C // 2), f32(P, C // 2))
    for T in (1, 512):
        yield partial(rms_norm, f32(T, D), f32(D), 1e-6)
        yield partial(qk_norm_rope, f32(T, H * C), f32(C), 1e-6, rope, P - T)
        yield partial(append, f32(T, G, C), f32(T, G * C), kv, P - T)
        for attention in (attend, attention_scores, attention_softmax):
            yield partial(attention, f32(T, H, C), kv, P - T)
        yield partial(router_logits, f32(T, D), RouterWeight(ints(E, D), f32(E)))
        yield partial(route, f32(T, E), A)
        yield partial(dispatch, ints(T, A), E)
        yield partial(swiglu, f32(T * A, F), f32(T * A, F))
        yield partial(combine, f32(T * A, D), f32(T, A))
        yield partial(add, f32(T, D), f32(T, D))
        yield partial(argmax, f32(T, V))
        yield partial(stage_digest, f32(T, D))
        yield partial(stage_digest, ints(T, A))
        for profile in PROFILES:
            yield partial(quantize, f32(T, D), profile)
            yield partial(rms_norm_quantize, f32(T, D), f32(D), 1e-6, profile)
            yield partial(swiglu_quantize, f32(T * A, F), f32(T * A, F), profile)
        for fmt in EXECUTABLE.values():
            row = fmt.block_bytes * D // 256
            dense = quant_matrix(ints(V, row, dtype=torch.uint8), fmt, "dense")
            gate = quant_matrix(ints(E, F, row, dtype=torch.uint8), fmt, "gate")
            down = quant_matrix(ints(E, D, fmt.block_bytes * F // 256, dtype=torch.uint8), fmt, "down")
            rows = Dispatch(ints(T * A), ints(E + 1))
            yield partial(embed, dense, ints(T))
            for profile in PROFILES:
                x, h = empty_activations(T, D, profile, cpu), empty_activations(T * A, F, profile, cpu)
                yield partial(matmul, dense, x)
                yield partial(grouped_matmul, gate, x, rows, A)
                if T == 1:
                    yield partial(grouped_matmul, down, h, rows, 1)
    yield from _decode_ops(D, H, G, C, E, A, F, V, P)


def _decode_ops(
    D: int, H: int, G: int, C: int, E: int, A: int, F: int, V: int, P: int
) -> Iterator[Callable[[], object]]:
    """The ops of a decode step."""
    from exactmoe.kernels.argmax import choose
    from exactmoe.kernels.cursor import place
    from exactmoe.kernels.decode_attention import decode_attention
    from exactmoe.kernels.decode_experts import Activated, experts_down, experts_up
    from exactmoe.kernels.decode_router import NextLayer, Routed, decode_router
    from exactmoe.kernels.guess import Guess
    from exactmoe.kernels.kv_cache import KVLayer
    from exactmoe.kernels.matvec import Norm, matvec
    from exactmoe.kernels.packed import PackedMatrix, operand_words, pack
    from exactmoe.kernels.prefetch import Past
    from exactmoe.kernels.rope import RopeTable
    from exactmoe.kernels.router import RouterWeight
    from exactmoe.kernels.tensors import PROFILES, quant_matrix, slices

    f32, one = torch.empty, torch.zeros(1, dtype=torch.int32)

    def packed(type_name: str, k: int, *rows: int) -> PackedMatrix:
        fmt = EXECUTABLE[type_name]
        data = torch.empty(*rows, fmt.block_bytes * k // 256, dtype=torch.uint8)
        return pack(quant_matrix(data, fmt, "weight"))

    norm, head_norm = Norm(f32(D), 1e-6), Norm(f32(C), 1e-6)
    k, v = (torch.empty(P, G, C, dtype=torch.int16) for _ in range(2))
    kv, rope = KVLayer(k, f32(P, G), v, f32(P, G)), RopeTable(f32(P, C // 2), f32(P, C // 2))
    dense = packed("Q4_K", H * C, D)
    router = RouterWeight(torch.empty(E, D, dtype=torch.int32), f32(E))
    later = (*dense.tensors, router.q)
    yield partial(choose, f32(37 * V), one, one)  # in parts
    yield partial(place, one, one, 1)
    yield partial(place, one, one, 1, one)
    gate = packed("Q4_K", D, E, F)
    for profile in PROFILES:
        for qkv in ([packed("Q4_K", D, (H + 2 * G) * C)], [packed("Q4_K", D, (H + G) * C), packed("Q6_K", D, G * C)]):
            yield partial(matvec, qkv, f32(D), profile, norm)
            yield partial(matvec, qkv, f32(D), profile, norm, later=[part[:128] for part in kv])
            yield partial(matvec, qkv, f32(D), profile, norm, past=Past(k, one, P))
        read = f32((H + 2 * G) * C), head_norm, head_norm, rope, kv, one, profile, later
        yield partial(decode_attention, *read)
        yield partial(decode_attention, *read, 128)
        for x in (f32(H * C), torch.empty(operand_words(H * C, slices(profile)), dtype=torch.int32)):
            yield partial(matvec, [dense], x, profile, None, f32(D))
        yield partial(matvec, [dense], x, profile, None, f32(D), Guess(f32(E), (gate, gate, gate), A))
        yield partial(matvec, [packed("Q6_K", D, 37 * V)], f32(D), profile, norm)
        yield partial(decode_router, f32(D), norm, router, profile)
        yield partial(decode_router, f32(D), norm, router, profile, NextLayer(norm, router))
        activated = Activated(f32(A, F), f32(E))
        routed = Routed(f32(E), torch.empty(operand_words(D, slices(profile)), dtype=torch.int32))
        for type_name in EXECUTABLE:
            down = packed(type_name, F, E, D)
            yield partial(experts_up, routed, gate, gate, A)
            yield partial(experts_down, activated, down, f32(D), profile)


def main(argv: list[str] | None = None) -> int:
    """Print a line a kernel, variant and architecture; 0 clean, 1 not, 2 bad usage, 3 cannot compile here."""
    parser = argparse.ArgumentParser(prog="python -m exactmoe.kernels.ptx_lint", description=__doc__.split("\n\n")[1])
    parser.add_argument(
        "--arch", default="80,90,100", help="compute capabilities, comma-separated (default %(default)s)"
    )
    parser.add_argument("--json", action="store_true", help="print the whole report as JSON")
    parser.add_argument(
        "--resources", nargs="?", const="all", metavar="ARCHS",
        help="assemble for these too (default: all of --arch), for registers and stack bytes a thread",
    )  # fmt: skip
    args = parser.parse_args(argv)
    try:
        archs = _parse_archs(args.arch)
        resources = () if args.resources is None else archs if args.resources == "all" else _parse_archs(args.resources)
        report = lint_shipped(archs, resources)
    except InvalidInput as error:
        print(f"ptx_lint: error: {error}", file=sys.stderr)
        return 2
    except MissingEnvironment as error:
        print(f"ptx_lint: error: {error}", file=sys.stderr)
        return 3
    if args.json:
        found = [f._asdict() for f in report.found]
        print(json.dumps({"clean": report.clean, "found": found, "complaints": report.complaints}, indent=1))
    else:
        _print(report)
    return 0 if report.clean else 1


def _parse_archs(text: str) -> tuple[int, ...]:
    archs = tuple(int(part) for part in text.split(",") if part.isdigit())
    if not archs or len(archs) != len(text.split(",")) or not set(archs) <= set(ARCHS):
        raise InvalidInput(f"--arch takes some of {', '.join(map(str, ARCHS))}, got {text!r}")
    return archs


def _print(report: Report) -> None:
    for f in report.found:
        verdict = "REFUSED" if f.faults else "reviewed" if f.reviewed else "clean"
        use = f"  {f.registers} registers, {f.stack} B stack" if f.registers is not None else ""
        use += f"  {f.size} instructions, {f.barriers} barriers"
        found = (
            ", ".join(f"{n} {op}" for op, n in f.instructions.items() if op.split(".")[0] not in _MOVES) or "no float"
        )
        print(f"{verdict:8}  sm_{f.arch:<3}  {f.kernel}  [{f.variant}]{use}\n{'':10}{found}")
        for op, why in f.faults.items():
            print(f"{'':10}REFUSED {op}: {why}")
    for review in REVIEWED:
        print(f"reviewed: {review.kernel}: {review.reason}")
    for complaint in report.complaints:
        print(f"REFUSED {complaint}")
    refused = sum(bool(f.faults) for f in report.found)
    verdict = "clean" if report.clean else "NOT CLEAN"
    print(f"{len(report.found)} compilations, {refused} refused, {len(report.complaints)} complaints: {verdict}")


if __name__ == "__main__":
    sys.exit(main())
