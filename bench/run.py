"""Run benchmarks: judge what is timed first, time it, and put down under which circumstances.

No speed is given for a call whose bits are not the reference's."""

import datetime as dt
import json
import subprocess
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from exactmoe.bench.cases import Bench
from exactmoe.bench.clock import Times, copy_bandwidth, matmul_rate, time_graph
from exactmoe.kernels.errors import MissingEnvironment, require
from exactmoe.parity.bits import compare, digest
from exactmoe.parity.cases import Case, kernel, kernel_output, reference_output
from exactmoe.parity.provenance import numerics_version, versions

_CACHE_BYTES = 50 * 2**20  # the L2 of an H100
_COPIES = 64  # at most


@dataclass(frozen=True)
class Row:
    """What one benchmark gave."""

    name: str
    case: str
    tokens: int
    equal: bool  # to the reference, bit for bit
    digest: str  # of the output
    cold: Times | None = None  # us a call, weights from memory; None where the bits are wrong
    warm: Times | None = None  # the same work again and again
    gb_s: float | None = None  # of the weights, keys and values that a call has to read
    tflop_s: float | None = None
    roof: float | None = None  # share of the nearer roof that was measured in the same run


@dataclass(frozen=True)
class Run:
    """One run: where and of what it was, and its rows."""

    date: str
    commit: str
    device: str
    clocks: str  # SM and memory, MHz
    versions: dict[str, str]
    numerics: str
    activations: str
    copy_gb_s: float
    matmul_tflop_s: float
    rows: tuple[Row, ...]

    def to_dict(self) -> dict[str, Any]:
        """As a line of the history has it."""
        return asdict(self)


def judge(case: Case, device: torch.device) -> tuple[bool, str]:
    """Whether the kernel gives the reference's bits for a case, and the digest of what it gave."""
    found, expected = kernel_output(case, device), reference_output(case)
    same = found.keys() == expected.keys() and all(compare(n, found[n], expected[n]).equal for n in expected)
    return same, digest(list(found.items()))


def measure(bench: Bench, device: torch.device, copy_gb_s: float, matmul_tflop_s: float) -> Row:
    """Judge a benchmark, and time it where it is right."""
    equal, found = judge(bench.case, device)
    row = Row(bench.name, str(bench.case), bench.tokens, equal, found)
    if not equal:
        return row
    calls = list(calls_of(bench, device))
    cold, warm = time_graph(calls), time_graph(calls[:1])
    gb_s, tflop_s = bench.weight_bytes / cold.median / 1000, bench.flops / cold.median / 1e6
    roof = max(gb_s / copy_gb_s, tflop_s / matmul_tflop_s)
    return Row(
        bench.name, str(bench.case), bench.tokens, equal, found, cold, warm, gb_s, tflop_s or None, roof
    )  # fmt: skip


def calls_of(bench: Bench, device: torch.device) -> Iterator[Callable[[], object]]:
    """The call on as many copies of its arguments as the cache takes four times, and at least two."""
    op = kernel(bench.case)
    copies = max(2, min(_COPIES, -(-4 * _CACHE_BYTES // max(bench.weight_bytes, 1))))
    for _ in range(copies):
        args = bench.case.on(device)
        yield lambda args=args: op(*args)  # type: ignore[misc]


def run(
    chosen: Iterable[Bench], device: torch.device, profile: str, progress: Callable[[Row], None] | None = None
) -> Run:
    """Run benchmarks on a CUDA device. Raises MissingEnvironment on another: the interpreter has no speed."""
    if device.type != "cuda":
        raise MissingEnvironment("a benchmark needs a CUDA device: what the interpreter takes says nothing")
    copy_gb_s, matmul_tflop_s = copy_bandwidth(device), matmul_rate(device)
    rows = []
    for bench in chosen:
        rows.append(measure(bench, device, copy_gb_s, matmul_tflop_s))
        if progress:
            progress(rows[-1])
    require(bool(rows), "no benchmark was chosen")
    return Run(
        dt.datetime.now(dt.UTC).isoformat(timespec="seconds"), _commit(), torch.cuda.get_device_name(device), _clocks(),
        versions(), numerics_version(), profile, copy_gb_s, matmul_tflop_s, tuple(rows),
    )  # fmt: skip


def append(found: Run, folder: Path) -> Path:
    """Add a run to the history of its device, a line of JSON in `folder`; returns the file."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{found.device.lower().replace(' ', '-')}.jsonl"
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(found.to_dict()) + "\n")
    return path


def _ask(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:
        return "unknown"
    return done.stdout.strip() if done.returncode == 0 else "unknown"


def _commit() -> str:
    head = _ask("git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD")
    changed = _ask("git", "-C", str(Path(__file__).parent), "status", "--porcelain")
    return head if changed in ("", "unknown") else f"{head}+"


def _clocks() -> str:
    return _ask("nvidia-smi", "--query-gpu=clocks.sm,clocks.mem", "--format=csv,noheader,nounits").replace(", ", "/")
