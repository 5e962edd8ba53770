"""Is this revision faster than another? Both run at once on one machine, and are asked in turn: A B, B A, A B, ...

Each pair of times gives a ratio, so that what the machine does meanwhile falls on both; two pairs, A B and B A, give
the mean of their logarithms, so that being asked first falls on both too. That the device has to turn to another
process is not in a time: see bench/clock.py.

The run is cut into `STRETCHES`. Before each, both sides let go of their memory, and take other; who takes first
alternates: where its memory lies makes a kernel of some microseconds 0.1% slower or faster. A model stays where it is.

The ratio is the median of all. Its interval is Student's, with the standard error of a bootstrap of whole stretches,
drawn separately from those in which one side took memory first and from the others: slower or faster where it leaves
out 1 and the ratio is further from 1 than `SAME`; else the same. Neighbouring times are alike on a real machine, and a
bootstrap of single pairs takes them for independent: with 40 pairs and noise of 2% whose neighbours correlate by 0.8 it
cried at three in ten equal sides. tests/bench/test_compare.py counts both kinds of error."""

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from exactmoe.bench.worker import RENEW
from exactmoe.kernels.errors import InvalidInput, MissingEnvironment, require

PAIRS = 480
PAIRS_OF_STEPS = 40  # a run of 128 steps takes as long as hundreds of kernels, and varies less
_LONG = 0.1  # seconds of an answer, from which on so few pairs are taken of kernels too
STRETCHES = 20
SAME = 0.005  # a ratio closer to 1 is no difference, however sure
_STUDENT = 3.250  # 99% of a t of STRETCHES / 2 - 1 degrees of freedom lies within
_RESAMPLES = 200

Ask = Callable[[str], dict[str, Any]]
Track = Callable[[Iterable[int], str], Iterable[int]]  # given the stretches of a benchmark, gives them on


@dataclass(frozen=True)
class Verdict:
    """What became of one benchmark from the other revision to this one."""

    name: str
    verdict: str  # faster, slower, same, wrong, missing
    ratio: float | None = None  # of this one's times to the other's
    interval: tuple[float, float] | None = None
    us: tuple[float, float] | None = None  # median times, the other's and this one's
    numbers_changed: bool = False  # the outputs' digests differ
    why: str = ""
    planted: float | None = None  # share by which this one was slowed down on purpose

    @property
    def passed(self) -> bool:
        """Not slower, and compared."""
        return self.verdict in ("faster", "same")

    def __str__(self) -> str:
        if self.ratio is None or self.interval is None or self.us is None:
            return f"{self.name:20} {self.verdict:8} {self.why}"
        low, high = (100 * (end - 1) for end in self.interval)
        change = f"{100 * (self.ratio - 1):+6.2f}% ({low:+.2f} to {high:+.2f})"
        note = "  numbers changed" if self.numbers_changed else ""
        note += "" if self.planted is None else f"  planted {100 * self.planted:+.2f}%"
        return f"{self.name:20} {self.verdict:8} {change:28} {self.us[0]:9.2f} -> {self.us[1]:9.2f} us{note}"

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        return asdict(self)


def compare(
    names: Sequence[str], other: Ask, this: Ask, pairs: int = PAIRS, progress: Track = lambda stretches, _: stretches
) -> Iterator[Verdict]:
    """Judge each benchmark by `pairs` pairs of times, as many in each stretch, and an even number; by the least such
    number where an answer takes long."""
    require(pairs > 0 and pairs % (2 * STRETCHES) == 0, f"pairs must be a multiple of {2 * STRETCHES}, got {pairs}")
    for name in names:
        yield _compare(name, other, this, pairs, progress)


def _compare(name: str, other: Ask, this: Ask, pairs: int, progress: Track) -> Verdict:
    times: tuple[list[float], list[float]] = ([], [])
    digests: list[str] = []
    methods: set[int | None] = set()
    planted: list[float] = []
    each = pairs // STRETCHES
    for stretch in progress(range(STRETCHES), name):
        renewed = [ask(RENEW).get("renewed") for ask in (other, this)]  # steps of an older one know none
        warm = stretch == 0 or any(renewed)
        i = -2 if warm else 0  # two pairs warm up
        while i < each:
            for side in (0, 1) if (stretch + i) % 2 == 0 else (1, 0):
                started = time.perf_counter()
                answer = (other, this)[side](name)
                if (stretch, i) == (0, -1) and time.perf_counter() - started > _LONG:
                    each = 2
                if refused := _refused(name, ("the other revision", "this revision")[side], answer):
                    return refused
                if i < 0:
                    methods.add(answer.get("method"))
                    digests.append(answer["digest"])
                    planted += [answer["planted"]] if "planted" in answer else []
                else:
                    times[side].append(answer["us"])
            i += 1
            if len(methods) > 1:
                raise InvalidInput("the other revision's clock measures something else: no ratio would be of the code")
    found = judge(name, times[0], times[1], len(set(digests)) > 1)
    return replace(found, planted=float(np.median(planted)) if planted else None)


def _refused(name: str, where: str, answer: dict[str, Any]) -> Verdict | None:
    """The verdict on an answer that has no speed."""
    if "error" in answer:
        return Verdict(name, "missing", why=f"{where}: {answer['error']}")
    if not answer["equal"]:
        return Verdict(name, "wrong", why=f"{where}: not the reference's bits, so it has no speed")
    return None


def judge(name: str, before: Sequence[float], after: Sequence[float], numbers_changed: bool) -> Verdict:
    """The verdict on pairs of times, asked in turn, as many in each stretch, and an even number."""
    each, rest = divmod(len(before), 2 * STRETCHES)
    require(each > 0 and rest == 0, f"{len(before)} pairs are not an even number in each of {STRETCHES} stretches")
    logs = np.log(np.array(after) / np.array(before)).reshape(STRETCHES, each, 2).mean(axis=2)
    rng = np.random.default_rng(0)  # so that the same times give the same verdict
    drawn = 2 * rng.integers(0, STRETCHES // 2, (_RESAMPLES, STRETCHES)) + np.arange(STRETCHES) % 2
    spread = np.median(logs[drawn].reshape(_RESAMPLES, -1), axis=1).std(ddof=1)
    middle, half = float(np.median(logs)), _STUDENT * float(spread)
    low, ratio, high = (float(np.exp(x)) for x in (middle - half, middle, middle + half))
    sure = not low <= 1 <= high and abs(ratio - 1) > SAME
    verdict = "same" if not sure else "slower" if ratio > 1 else "faster"
    times = float(np.median(before)), float(np.median(after))
    return Verdict(name, verdict, ratio, (low, high), times, numbers_changed)


@contextmanager
def revisions(
    rev: str, profile: str, plant: float | None = None, model: str | None = None
) -> Iterator[tuple[Ask, Ask]]:
    """The workers of revision `rev`, in a worktree that is removed afterwards, and of the tree as it is.

    The latter is slowed down by the share `plant` where there is one. With a `model` both time its decode steps.

    Raises InvalidInput for a revision that git does not have."""
    root = Path(__file__).resolve().parent.parent
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "tree"
        done = _git(root, "worktree", "add", "--detach", str(folder), rev)
        if done.returncode:
            raise InvalidInput(f"{rev}: no such revision can be checked out: {done.stderr.strip()}")
        stack.callback(_git, root, "worktree", "remove", "--force", str(folder))
        whole = () if model is None else ("--model", str(Path(model).absolute()))
        options = () if plant is None else (str(plant),)
        other, this = worker(folder, (profile, *whole)), worker(root, (profile, *whole, *options))
        yield stack.enter_context(other), stack.enter_context(this)


@contextmanager
def worker(tree: Path, options: Sequence[str], module: str = "exactmoe.bench.worker") -> Iterator[Ask]:
    """A worker on the sources in `tree`."""
    import os

    env = {**os.environ, "PYTHONPATH": str(tree / "src")}
    env.pop("TRITON_INTERPRET", None)
    process = subprocess.Popen(
        [sys.executable, "-m", module, *options], cwd=tree, env=env, text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip

    def ask(name: str) -> dict[str, Any]:
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            process.stdin.write(name + "\n")
            process.stdin.flush()
            line = process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            said = process.stderr.read().strip()[-600:] if process.stderr else ""
            raise MissingEnvironment(f"the worker in {tree} ended: {said}")
        return dict(json.loads(line))

    try:
        yield ask
    finally:
        process.kill()
        process.communicate()


def _git(root: Path, *args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["git", "-C", str(root), *args], capture_output=True, text=True, check=False)
