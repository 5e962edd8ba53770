"""The parity harness: one prompt and some decode steps through four paths, and every stage of every layer compared.

The paths are reference and Triton, each in production and traced. The prompt goes through in one chunk, then each step
feeds the token the reference chose to all four. After the prompt and after each step, the two traces are compared
stage by stage, production logits with traced ones, and the four next tokens; at the end, the four caches. Then Triton
production runs the prompt under other schedules, which must change no bit. What is not compared is not a pass: a stage
that is not emitted, or of which nothing was compared, fails.

One trace of each side is held at a time. The digest covers Triton's side of the main run only, so that it is the same
on every device."""

import hashlib
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from exactmoe.kernels.errors import require
from exactmoe.model import stages
from exactmoe.model.stages import Key
from exactmoe.parity.bits import Array, Comparison, absorb, compare, digest
from exactmoe.parity.sides import KV_ARRAYS, ReferenceSide, Side, Trace, TritonSide

if TYPE_CHECKING:
    from exactmoe.model.gguf.reader import GGUFFile

PREFILL = "prefill"
CHUNK = 7  # of the chunked schedule: divides no power of two, so chunks never fall on tile borders

# What the schedules cover in the interpreter, where a token alone costs seconds; on a GPU they cover everything.
_BOUNDED_CHUNKED = 10
_BOUNDED_SINGLE = 3

Progress = Callable[[str], None]


class Difference(NamedTuple):
    """Where two paths first part."""

    name: str
    layer: int
    when: str
    comparison: Comparison

    def __str__(self) -> str:
        return f"{label(self.name, self.layer)}, {self.when}: {self.comparison}"


@dataclass
class Tally:
    """Comparisons of one thing (a stage of a layer, a cache array, a pair of paths), added up over the run."""

    name: str
    layer: int = stages.WHOLE_MODEL
    compared: int = 0  # elements
    differing: int = 0  # elements
    failed: int = 0  # comparisons that were not equal
    first: Difference | None = None

    @property
    def equal(self) -> bool:
        """Something was compared, and all of it was equal."""
        return self.compared > 0 and self.failed == 0

    def add(self, when: str, found: Comparison) -> None:
        """Count one comparison."""
        self.compared += found.count
        self.differing += found.differing
        if not found.equal:
            self.failed += 1
            self.first = self.first or Difference(self.name, self.layer, when, found)


class Schedule(NamedTuple):
    """Another way to run the prompt, or a part of it, through Triton production."""

    name: str
    chunk: int
    positions: int  # of the prompt, from its start
    steps: int = 0  # decode steps after it
    all_positions: bool = True  # logits of every position, not of the last only


class ScheduleResult(NamedTuple):
    """What a schedule gave, against the main run."""

    schedule: Schedule
    tally: Tally
    digest: str | None  # of the whole production run, where the schedule is that same run again


class Coverage(NamedTuple):
    """How much of what was asked for was compared. Counts are of (stage, layer), over the whole run."""

    requested: int
    emitted_reference: int
    emitted_triton: int
    compared: int
    missing: tuple[str, ...]  # requested, not emitted: who, what, when
    unexpected: tuple[str, ...]  # emitted, not requested

    @property
    def complete(self) -> bool:
        """Every stage that was requested, and no other, came from both sides and was compared."""
        return 0 < self.requested == self.compared and not self.missing and not self.unexpected


@dataclass(frozen=True)
class ParityResult:
    """All that a run found; `equal` is the verdict."""

    tokens: tuple[int, ...]  # the prompt
    steps: int
    chosen: tuple[int, ...]  # next token after the prompt and after each step, as the reference chose
    stages: tuple[Tally, ...]
    caches: tuple[Tally, ...]
    paths: tuple[Tally, ...]
    schedules: tuple[ScheduleResult, ...]
    coverage: Coverage
    first: Difference | None  # the earliest in the run
    digest: str  # of all that Triton emitted in the main run
    run_digest: str  # of its production run alone: logits, tokens, cache
    rope_digest: str
    nan_logits: int
    seconds: dict[str, float]

    @property
    def equal(self) -> bool:
        """Every comparison was made, and none found a difference."""
        tallies = (*self.stages, *self.caches, *self.paths, *(s.tally for s in self.schedules))
        again = [s.digest for s in self.schedules if s.digest is not None]
        return (
            self.coverage.complete
            and bool(self.caches and self.paths and self.schedules)
            and all(t.equal for t in tallies)
            and all(d == self.run_digest for d in again)
        )


def run_parity(
    file: "GGUFFile",
    tokens: Sequence[int],
    steps: int = 4,
    profile: str = "q8_k",
    device: str = "auto",
    progress: Progress | None = None,
) -> ParityResult:
    """Load `file` on both sides and compare them over the prompt `tokens` and `steps` decode steps.

    Raises InvalidInput for tokens the model cannot take, MissingEnvironment where `device` is not there."""
    from exactmoe.kernels.launch import interpreting, resolve_device

    place = resolve_device(device)
    from exactmoe.model.config import Config
    from exactmoe.model.generate import require_prompt
    from exactmoe.model.weights import load_model

    config = Config.from_gguf(file)
    require_prompt(tokens, steps, config.vocab, config.context_length)
    tell = progress or _silent
    tell("loading")
    began = time.perf_counter()
    reference, triton = ReferenceSide(file, profile), TritonSide(load_model(file, place, profile))
    loading = time.perf_counter() - began
    plan = plan_schedules(len(tokens), steps, bounded=interpreting())
    result = compare_sides(reference, triton, config.n_layers, tokens, steps, plan, tell)
    result.seconds["loading"] = loading
    return result


def plan_schedules(n_tokens: int, steps: int, *, bounded: bool) -> tuple[Schedule, ...]:
    """The schedules of a run; `bounded` cuts them to a first part of the prompt."""
    chunked = min(n_tokens, _BOUNDED_CHUNKED) if bounded else n_tokens
    single = min(n_tokens, _BOUNDED_SINGLE) if bounded else n_tokens
    again = Schedule("the same run again", n_tokens, n_tokens, steps, all_positions=False)
    if bounded:
        again = Schedule("one chunk again", chunked, chunked, all_positions=False)
    return again, Schedule(f"chunks of {CHUNK}", CHUNK, chunked), Schedule("token by token", 1, single)


def compare_sides(
    reference: Side,
    triton: Side,
    n_layers: int,
    tokens: Sequence[int],
    steps: int,
    plan: Sequence[Schedule],
    progress: Progress | None = None,
) -> ParityResult:
    """Run and compare two loaded sides; `run_parity` after loading."""
    require(len(tokens) > 0, "the prompt is empty: no token to compare")
    require(steps > 0, f"decode steps must be positive, got {steps}")
    return _Run(reference, triton, n_layers, tokens, steps, progress or _silent).result(plan)


def label(name: str, layer: int) -> str:
    """How a (stage, layer) is written."""
    return name if layer == stages.WHOLE_MODEL else f"{name}, layer {layer}"


def _silent(_: str) -> None:
    pass


@dataclass
class _Production:
    """A production run of Triton as the schedules are held against it."""

    cache: Any
    logits: list[Array] = field(default_factory=list)  # [V] after the prompt and after each step


class _Run:
    """The main run's state: four paths, their caches, and the tallies."""

    def __init__(
        self, reference: Side, triton: Side, n_layers: int, tokens: Sequence[int], steps: int, progress: Progress
    ) -> None:
        self.reference, self.triton = reference, triton
        self.n_layers, self.tokens, self.steps = n_layers, tuple(tokens), steps
        self.progress = progress
        self.seconds: dict[str, float] = {}
        self.keys: list[Key] = stages.keys(n_layers)
        self.stages = {key: Tally(*key) for key in self.keys}
        self.caches = {(n, i): Tally(f"cache {n}", i) for i in range(n_layers) for n in KV_ARRAYS}
        self.logits = {side.name: Tally(f"{side.name}: production = traced") for side in (reference, triton)}
        self.next_token = Tally("next token of the four paths")
        self.rope = Tally("rope table")
        self.emitted: dict[str, dict[Key, int]] = {reference.name: {}, triton.name: {}}
        self.unexpected: dict[str, None] = {}
        self.missing: list[str] = []
        self.first: Difference | None = None
        self.hasher = hashlib.sha256()
        self.nan_logits = 0

    def result(self, plan: Sequence[Schedule]) -> ParityResult:
        capacity = len(self.tokens) + self.steps
        production = _Production(self.triton.cache(capacity))
        caches: dict[str, tuple[Side, Any]] = {
            "reference": (self.reference, self.reference.cache(capacity)),
            "reference traced": (self.reference, self.reference.cache(capacity)),
            "triton": (self.triton, production.cache),
            "triton traced": (self.triton, self.triton.cache(capacity)),
        }
        rope_digest = self.compare_rope(capacity)
        chosen: list[int] = []
        position_logits = self.advance(PREFILL, self.tokens, caches, production, chosen)
        for step in range(1, self.steps + 1):
            self.advance(f"step {step}", [chosen[-1]], caches, production, chosen)
        with self.timed("comparison"):
            self.compare_caches(caches)
        run_digest = self.production_digest(production, chosen)
        outcomes = tuple(self.schedule(s, production, position_logits, chosen) for s in plan)
        return ParityResult(
            tokens=self.tokens,
            steps=self.steps,
            chosen=tuple(chosen),
            stages=tuple(self.stages.values()),
            caches=tuple(self.caches.values()),
            paths=(*self.logits.values(), self.next_token, self.rope),
            schedules=outcomes,
            coverage=self.coverage(),
            first=self.first,
            digest=self.hasher.hexdigest(),
            run_digest=run_digest,
            rope_digest=rope_digest,
            nan_logits=self.nan_logits,
            seconds=self.seconds,
        )

    def advance(
        self,
        when: str,
        tokens: Sequence[int],
        caches: dict[str, tuple[Side, Any]],
        production: _Production,
        chosen: list[int],
    ) -> Array:
        """One chunk through the four paths, compared; appends the next token, returns Triton's logits [T, V]."""
        logits: dict[str, Array] = {}
        traces: dict[str, Trace] = {}
        for path, (side, cache) in caches.items():
            self.progress(f"{when}, {path}")
            with self.timed(path):
                if path.endswith("traced"):
                    traces[path] = side.trace(cache, tokens)
                    logits[path] = traces[path].logits[-1]
                else:
                    logits[path] = side.run(cache, tokens, len(tokens), False)
        self.progress(f"{when}, comparison")
        with self.timed("comparison"):
            position_logits = traces["triton traced"].logits
            self.compare_stages(when, len(tokens), traces["reference traced"], traces["triton traced"])
            for side in (self.reference, self.triton):
                traced = traces[f"{side.name} traced"].logits[-1]
                self.count(self.logits[side.name], when, compare("logits", logits[side.name], traced))
            ids = {path: side.argmax(logits[path][None]) for path, (side, _) in caches.items()}
            for path in list(caches)[1:]:
                found = compare("next token", ids["reference"], ids[path])
                self.count(self.next_token, f"{when}, reference and {path}", found)
            absorb(self.hasher, f"{when}: logits", logits["triton"])
            absorb(self.hasher, f"{when}: next token", ids["triton"])
            self.nan_logits += int(np.isnan(position_logits).sum())
        production.logits.append(logits["triton"])
        chosen.append(int(ids["reference"][0]))
        return position_logits

    def compare_stages(self, when: str, rows: int, left: Trace, right: Trace) -> None:
        for side, trace in ((self.reference, left), (self.triton, right)):
            for key in trace.stages:
                counts = self.emitted[side.name]
                counts[key] = counts.get(key, 0) + 1
                if key not in self.stages:
                    self.unexpected[f"{side.name}: {label(*key)}"] = None
            self.missing += [f"{side.name}: {label(*key)}, {when}" for key in self.keys if key not in trace.stages]
        for key in self.keys:
            if key in left.stages and key in right.stages:
                name = label(*key)
                pair = self.reference.array(left.stages[key]), self.triton.array(right.stages[key])
                found = compare(name, *pair)
                if found.same_form and pair[0].shape[:1] != (rows,):
                    form = f"{pair[0].dtype.name} {list(pair[0].shape)} on both sides"
                    found = Comparison(name, 0, 0, None, form, f"{rows} rows wanted")
                self.count(self.stages[key], when, found)
                absorb(self.hasher, f"{when}: {name}", pair[1])

    def compare_caches(self, caches: dict[str, tuple[Side, Any]]) -> None:
        (first_path, (first_side, first_cache)), *others = caches.items()
        for (name, layer), tally in self.caches.items():
            left = first_side.kv(first_cache, name, layer)
            for path, (side, cache) in others:
                right = side.kv(cache, name, layer)
                self.count(tally, f"{first_path} and {path}", compare(name, left, right))
                if path == "triton":
                    absorb(self.hasher, label(f"cache {name}", layer), right)

    def compare_rope(self, n_positions: int) -> str:
        pairs = list(zip(("cos", "sin"), self.reference.rope(n_positions), self.triton.rope(n_positions), strict=True))
        for name, left, right in pairs:
            self.count(self.rope, name, compare(name, left, right))
        return digest((name, right) for name, _, right in pairs)

    def production_digest(self, run: _Production, chosen: Sequence[int]) -> str:
        """Over a production run of Triton: its logits, the tokens fed, and its cache."""

        def parts() -> Iterator[tuple[str, Array]]:
            for i, logits in enumerate(run.logits):
                yield f"logits {i}", logits
            yield "tokens", np.array([*self.tokens, *chosen[: len(run.logits) - 1]], np.int32)
            for name, layer in self.caches:
                yield label(f"cache {name}", layer), self.triton.kv(run.cache, name, layer)

        return digest(parts())

    def schedule(
        self, plan: Schedule, main: _Production, position_logits: Array, chosen: Sequence[int]
    ) -> ScheduleResult:
        """Run Triton production under `plan`, and compare logits and cache with the main run's."""
        self.progress(plan.name)
        tally = Tally(plan.name)
        again = _Production(self.triton.cache(plan.positions + plan.steps))
        with self.timed("schedules"):
            logits = self.triton.run(again.cache, self.tokens[: plan.positions], plan.chunk, plan.all_positions)
            again.logits.append(logits[-1] if plan.all_positions else logits)
            wanted = position_logits[: plan.positions] if plan.all_positions else position_logits[plan.positions - 1]
            self.count(tally, "logits", compare("logits", wanted, logits))
            for step in range(1, plan.steps + 1):
                again.logits.append(self.triton.run(again.cache, [chosen[step - 1]], 1, False))
                self.count(tally, f"logits, step {step}", compare("logits", main.logits[step], again.logits[step]))
            length = plan.positions + plan.steps
            for name, layer in self.caches:
                left = self.triton.kv(main.cache, name, layer)[:length]
                right = self.triton.kv(again.cache, name, layer)
                self.count(tally, label(f"cache {name}", layer), compare(name, left, right))
        same = plan.positions == len(self.tokens) and plan.steps == self.steps and not plan.all_positions
        return ScheduleResult(plan, tally, self.production_digest(again, chosen) if same else None)

    def coverage(self) -> Coverage:
        times = self.steps + 1

        def whole(side: Side) -> int:
            return sum(self.emitted[side.name].get(key) == times for key in self.keys)

        compared = sum(self.stages[key].compared > 0 for key in self.keys)
        return Coverage(
            len(self.keys),
            whole(self.reference),
            whole(self.triton),
            compared,
            tuple(self.missing),
            tuple(self.unexpected),
        )

    def count(self, tally: Tally, when: str, found: Comparison) -> None:
        tally.add(when, found)
        if self.first is None and tally.first is not None:
            self.first = tally.first

    @contextmanager
    def timed(self, phase: str) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self.seconds[phase] = self.seconds.get(phase, 0.0) + time.perf_counter() - began
