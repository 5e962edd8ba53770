"""Run benchmarks: judge what is timed first, time it, and put down under which circumstances.

No speed is given for a call whose bits are not the reference's."""

import datetime as dt
import json
import subprocess
from collections.abc import Callable, Iterable, Iterator, Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from exactmoe.bench.cases import Bench
from exactmoe.bench.clock import (
    METHOD,
    ROTATED,
    Sampler,
    Times,
    copy_bandwidth,
    keep_busy,
    matmul_rate,
    sample,
    time_graph,
)
from exactmoe.bench.peers.rows import PeerRow
from exactmoe.kernels.errors import MissingEnvironment, require
from exactmoe.parity.bits import compare, digest
from exactmoe.parity.cases import Case, kernel, kernel_output, reference_output
from exactmoe.parity.provenance import numerics_version, versions

_COPIES = 1024  # at most


Judged = tuple[bool, str]  # whether the bits are right, and the digest of what came out


class Roofs(NamedTuple):
    """What this device did in this run where nothing but the memory, or nothing but the multiplier, is at work."""

    copy_gb_s: float
    matmul_tflop_s: float

    @staticmethod
    def of(device: torch.device) -> "Roofs":
        """Measure them."""
        return Roofs(copy_bandwidth(device), matmul_rate(device))


@dataclass(frozen=True)
class Row:
    """What one benchmark gave."""

    name: str
    case: str
    tokens: int
    equal: bool  # to what it was judged by, bit for bit
    digest: str  # of the output
    cold: Times | None = None  # us a call, weights from memory; None where the bits are wrong
    warm: Times | None = None  # the same work again and again
    gb_s: float | None = None  # of the weights, keys and values that a call has to read
    tflop_s: float | None = None
    roof: float | None = None  # share of the nearer roof that was measured in the same run
    gib: float | None = None  # of the rows that measure memory, not time

    @staticmethod
    def of(
        name: str, case: str, tokens: int, judged: Judged, cold: Times | None, roofs: Roofs, size: float,
        flops: int = 0, warm: Times | None = None,
    ) -> "Row":  # fmt: skip
        """A row of a call that reads `size` bytes and takes `cold`; without rates where there is no time."""
        row = Row(name, case, tokens, *judged)
        if cold is None:
            return row
        gb_s, tflop_s = size / cold.median / 1000, flops / cold.median / 1e6
        roof = max(gb_s / roofs.copy_gb_s, tflop_s / roofs.matmul_tflop_s)
        return replace(row, cold=cold, warm=warm, gb_s=gb_s, tflop_s=tflop_s or None, roof=roof)


@dataclass(frozen=True)
class Run:
    """One run: where and of what it was, and its rows."""

    date: str
    commit: str
    device: str
    clocks: str  # SM and memory of the busy device, MHz
    versions: dict[str, str]
    numerics: str
    activations: str
    model: str  # name and bytes; empty for kernels
    copy_gb_s: float
    matmul_tflop_s: float
    rows: tuple[Row, ...]
    method: int = METHOD  # of timing
    peers: tuple[PeerRow, ...] = ()  # what was timed beside them

    def to_dict(self) -> dict[str, Any]:
        """As a line of the history has it."""
        return asdict(self) | {"peers": [row.to_dict() for row in self.peers]}


def judge(case: Case, device: torch.device) -> Judged:
    """Whether the kernel gives the reference's bits for a case, and the digest of what it gave."""
    found, expected = kernel_output(case, device), reference_output(case)
    same = found.keys() == expected.keys() and all(compare(n, found[n], expected[n]).equal for n in expected)
    return same, digest(list(found.items()))


def measure(bench: Bench, device: torch.device, roofs: Roofs, sampler: Sampler = sample) -> Row:
    """Judge a benchmark, and time it where it is right: cold by `sampler`."""
    judged = judge(bench.case, device)
    cold, warm = None, None
    if judged[0]:
        calls = list(calls_of(bench, bench.case.on(device)))
        cold, warm = time_graph(calls, sampler=sampler), time_graph(calls[:1])
    return Row.of(bench.name, str(bench.case), bench.tokens, judged, cold, roofs, bench.weight_bytes, bench.flops, warm)


def calls_of(bench: Bench, args: Sequence[Any]) -> Iterator[Callable[[], object]]:
    """The call on as many copies of its arguments as hold `ROTATED` bytes, and at least two."""
    op = kernel(bench.case)
    copies = max(2, min(_COPIES, -(-ROTATED // max(bench.weight_bytes, 1))))
    for _ in range(copies):
        own = deepcopy(args)
        yield lambda own=own: op(*own)  # type: ignore[misc]


def run(
    chosen: Iterable[Bench], device: torch.device, profile: str, progress: Callable[[Row], None] | None = None
) -> Run:
    """Run benchmarks on a CUDA device. Raises MissingEnvironment on another: the interpreter has no speed."""
    if device.type != "cuda":
        raise MissingEnvironment("a benchmark needs a CUDA device: what the interpreter takes says nothing")
    roofs = Roofs.of(device)
    rows = []
    for bench in chosen:
        rows.append(measure(bench, device, roofs))
        if progress:
            progress(rows[-1])
    return describe(device, profile, roofs, rows)


def describe(device: torch.device, profile: str, roofs: Roofs, rows: Sequence[Row], model: str = "") -> Run:
    """Rows with the circumstances of now."""
    require(bool(rows), "no benchmark was chosen")
    return Run(
        dt.datetime.now(dt.UTC).isoformat(timespec="seconds"), _commit(), torch.cuda.get_device_name(device),
        _clocks(device),
        versions(), numerics_version(), profile, model, *roofs, tuple(rows),
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
    git = ("git", "-C", str(Path(__file__).parent))
    head = _ask(*git, "rev-parse", "HEAD")
    changed = _ask(
        *git, "status", "--porcelain", "--", ":(top)", ":(top,exclude)bench/results"
    )  # a record is no change
    return head if changed in ("", "unknown") else f"{head}+"


def _clocks(device: torch.device) -> str:
    """SM and memory clock of this device, whichever of the machine's it is, while it is busy: at rest they are low."""
    card = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
    keep_busy(device)
    asked = _ask("nvidia-smi", f"--id={card}", "--query-gpu=clocks.sm,clocks.mem", "--format=csv,noheader,nounits")
    return asked.replace(", ", "/")
