"""Two traces, stage by stage.      left, right -> DiffReport

Stages are taken in the order they happen, so the first difference is where to look. What is on one side only is
missing, and a report in which nothing was compared is not equal."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, Protocol

import numpy as np

from exactmoe.kernels.errors import InvalidInput, require
from exactmoe.model import stages
from exactmoe.model.stages import Key
from exactmoe.parity.bits import Array
from exactmoe.parity.diff.diff import diff_arrays, form
from exactmoe.parity.diff.metrics import Tolerance
from exactmoe.parity.diff.router import RouterDiff, diff_router
from exactmoe.parity.diff.verdict import INDEX_STAGES, StageDiff, Verdict

FOREIGN = "aprt"
"""Backend of a trace of another engine: flat f32 vectors, and no word about the run they come from."""

EXPERT_STAGES = ("moe_expert_gate", "moe_expert_up", "moe_expert_swigl", "moe_expert_out")

# What the axes after the position are, for the coordinates of a difference.
_AXES = {
    "q_post_rope": ("head", "channel"),
    "k_post_rope": ("head", "channel"),
    "attn_scores": ("head", "key"),
    "attn_softmax": ("head", "key"),
    "moe_router_logits": ("expert",),
    "moe_router": ("rank",),
    "moe_router_indices": ("rank",),
    "lm_head": ("token id",),
    **dict.fromkeys(EXPERT_STAGES, ("rank", "column")),
}


class Provenance(Protocol):
    """What a trace says of its run."""

    @property
    def model(self) -> str: ...
    @property
    def model_sha256(self) -> str: ...
    @property
    def numerics(self) -> str: ...
    @property
    def activations(self) -> str: ...
    @property
    def backend(self) -> str: ...
    @property
    def device(self) -> str: ...
    @property
    def versions(self) -> Mapping[str, str]: ...
    @property
    def tokens(self) -> tuple[int, ...]: ...
    @property
    def n_layers(self) -> int: ...


class TraceLike(Protocol):
    """A trace as the comparison needs it; `exactmoe.parity.trace.folder.Trace` is one."""

    @property
    def manifest(self) -> Provenance: ...
    @property
    def positions(self) -> Array: ...

    def keys(self) -> Sequence[Key]:
        """The (stage, layer) that it holds."""
        ...

    def read(self, stage: str, layer: int) -> Array:
        """One of them, bit for bit; axis 0 is the position."""
        ...

    def rows(self, stage: str, layer: int) -> Array | None:
        """(position, rank, expert) i32 [N, 3] of the rows of a stage of which some experts were kept; else None."""
        ...

    def margin_ulp(self, layer: int) -> Array | None:
        """ULPs between the k-th and k+1-th router logit i64 [T], where the capture recorded them."""
        ...


class Fact(NamedTuple):
    """One thing that both runs state of themselves."""

    name: str
    left: str
    right: str

    @property
    def agree(self) -> bool:
        """Whether both state the same."""
        return self.left == self.right


@dataclass(frozen=True)
class DiffReport:
    """Every stage of two runs. `equal` is the verdict."""

    title: str
    left: str  # what the sides are called: paths of the traces
    right: str
    rule: str
    rows: tuple[StageDiff, ...]  # in canonical order
    router: tuple[RouterDiff, ...] = ()
    facts: tuple[Fact, ...] = ()
    tokens: tuple[int, ...] = ()
    notes: tuple[str, ...] = ()  # what a reader must know to trust the verdict
    what: str = "stages"  # that the rows are

    @property
    def equal(self) -> bool:
        """At least one stage was compared and every one passes."""
        return bool(self.rows) and all(row.passed for row in self.rows)

    @property
    def failed(self) -> tuple[StageDiff, ...]:
        """The stages that do not pass, in canonical order."""
        return tuple(row for row in self.rows if not row.passed)

    @property
    def first(self) -> StageDiff | None:
        """The first stage that was found different; failing that, the first that was not compared."""
        found = [row for row in self.failed if row.verdict is not Verdict.MISSING]
        return next(iter(found or self.failed), None)

    @property
    def compared(self) -> int:
        """Stages of which at least one element was compared."""
        return sum(row.count > 0 for row in self.rows)

    @property
    def elements(self) -> int:
        """Elements compared."""
        return sum(row.count for row in self.rows)

    @property
    def differing(self) -> int:
        """Elements of which the bits differ."""
        return sum(row.differing for row in self.rows)

    @property
    def verdict(self) -> str:
        """The closing line."""
        counts = f"{self.compared} of {len(self.rows)} {self.what} compared, {self.elements:,} elements"
        if self.equal:
            return f"equal ({self.rule}): {counts}, {self.differing:,} differ in bits"
        if not self.elements:
            return f"NOT EQUAL ({self.rule}): nothing was compared"
        failed = (
            f"{len(self.failed)} of them not passed"
            if self.compared == len(self.rows)
            else f"{len(self.failed)} not passed"
        )
        return f"NOT EQUAL ({self.rule}): {counts}, {self.differing:,} differ in bits; {failed}, first {self.first}"


def diff_traces(
    left: TraceLike,
    right: TraceLike,
    tolerance: Tolerance | None = None,
    *,
    force: bool = False,
    names: tuple[str, str] = ("left", "right"),
) -> DiffReport:
    """Compare every stage that either trace holds; `right` is judged against `left`.

    Refuses (InvalidInput) traces of different tokens, which have nothing in common to compare. Traces of different
    models, numerics or activation profiles are refused too, unless `force`: then the report says so. A foreign trace
    states none of these, which the report says as well. One array of each side is held at a time, and the router's."""
    notes = _require_comparable(left.manifest, right.manifest, force)
    sides = _Sides(left, right, tolerance)
    n_layers = max(left.manifest.n_layers, right.manifest.n_layers)
    rows = []
    for stage, layer in canonical({*left.keys(), *right.keys()}, n_layers):
        if sides.none_kept(stage, layer):
            notes.append(f"{stage}, layer {layer}: neither side has a row of the experts that were kept")
        else:
            rows.append(sides.stage(stage, layer))
    return DiffReport(
        title="diff of two traces",
        left=names[0],
        right=names[1],
        rule=f"within {tolerance}" if tolerance else "bit for bit",
        rows=tuple(rows),
        router=tuple(sides.routers(n_layers)),
        facts=tuple(_facts(left.manifest, right.manifest)),
        tokens=left.manifest.tokens or right.manifest.tokens,
        notes=tuple(notes),
    )


def canonical(keys: set[Key], n_layers: int) -> list[Key]:
    """`keys` in the order the stages happen; names of another engine that we do not know come last, by name."""
    n_layers = max([n_layers, *(layer + 1 for _, layer in keys)])
    known = [key for key in stages.keys(n_layers) if key in keys]
    return known + sorted(keys - set(known), key=lambda key: (key[1], key[0]))


def _require_comparable(left: Provenance, right: Provenance, force: bool) -> list[str]:
    """Refuse runs that cannot be compared; what the reader must be told of those that can."""
    notes = []
    foreign = [name for name, run in (("left", left), ("right", right)) if run.backend == FOREIGN]
    if foreign:
        notes.append(
            f"foreign trace on the {' and '.join(foreign)}: flat f32, compared element by element where counts agree"
        )
    if left.tokens and right.tokens:
        require(left.tokens == right.tokens, f"the traces are of different tokens: {_apart(left.tokens, right.tokens)}")
    else:
        notes.append("not every trace states its tokens: that both ran the same is not known")
    for name in ("model_sha256", "numerics", "activations"):
        pair = str(getattr(left, name)), str(getattr(right, name))
        if pair[0] == pair[1]:
            continue
        text = f"{_WORDS[name]}: {pair[0] or 'not stated'} and {pair[1] or 'not stated'}"
        if foreign and "" in pair:
            continue  # the facts show it, and the note on foreign traces says why
        if not force:
            raise InvalidInput(f"the traces differ in {text}; --force compares them all the same")
        notes.append(f"compared by force, though they differ in {text}")
    return notes


_WORDS = {"model_sha256": "model digest", "numerics": "numerics version", "activations": "activation profile"}


def _apart(left: tuple[int, ...], right: tuple[int, ...]) -> str:
    for i, (a, b) in enumerate(zip(left, right, strict=False)):
        if a != b:
            return f"position {i} is {a} and {b}"
    return f"{len(left)} and {len(right)} tokens"


def _facts(left: Provenance, right: Provenance) -> Iterator[Fact]:
    for name in ("model", "model_sha256", "numerics", "activations", "backend", "device"):
        yield Fact(_WORDS.get(name, name), *(str(getattr(run, name)) or "not stated" for run in (left, right)))
    for name in dict.fromkeys([*left.versions, *right.versions]):
        yield Fact(name, left.versions.get(name, "not stated"), right.versions.get(name, "not stated"))
    yield Fact("tokens", str(len(left.tokens)), str(len(right.tokens)))


class _Sides:
    """Both traces, and what is read of them more than once."""

    def __init__(self, left: TraceLike, right: TraceLike, tolerance: Tolerance | None) -> None:
        self.left, self.right, self.tolerance = left, right, tolerance
        self.keys = set(left.keys()), set(right.keys())
        self.foreign = FOREIGN in (left.manifest.backend, right.manifest.backend)

    def none_kept(self, stage: str, layer: int) -> bool:
        """Whether both sides kept some experts of a stage, and no position goes to one of these."""
        if any((stage, layer) not in keys for keys in self.keys):
            return False
        rows = [side.rows(stage, layer) for side in (self.left, self.right)]
        return all(kept is not None and not len(kept) for kept in rows)

    def stage(self, stage: str, layer: int) -> StageDiff:
        key = stage, layer
        a = self.left.read(stage, layer) if key in self.keys[0] else None
        b = self.right.read(stage, layer) if key in self.keys[1] else None
        if a is None or b is None:
            return diff_arrays(stage, a, b, layer=layer)
        if self.foreign or 1 in (a.ndim, b.ndim):
            return self._flat(stage, layer, a, b)
        coordinates = self._coordinates(stage, layer, a, b)
        if isinstance(coordinates, str):
            return StageDiff(stage, layer, Verdict.SHAPE, coordinates, form(a), form(b))
        found = diff_arrays(stage, a, b[coordinates.order], layer=layer, tolerance=self.tolerance)
        if found.first is None or not found.first.at:
            return found
        return replace(found, first=replace(found.first, where=self._where(stage, layer, found.first.at, coordinates)))

    def _flat(self, stage: str, layer: int, a: Array, b: Array) -> StageDiff:
        """A stage of which one side is a flat vector: APRT files have no shape."""
        if not self.foreign and not np.array_equal(self.left.positions, self.right.positions):
            text = f"{form(a)} != {form(b)}: a flat vector of other positions, or of the same in another order"
            return StageDiff(stage, layer, Verdict.SHAPE, text, form(a), form(b))
        note = ""
        if a.shape != b.shape and a.size == b.size and stage not in INDEX_STAGES:
            note = f"compared flat: {form(a)} and {form(b)}"
            shape = a.shape if a.ndim >= b.ndim else b.shape
            a, b = a.reshape(shape), b.reshape(shape)
        return diff_arrays(stage, a, b, layer=layer, tolerance=self.tolerance, note=note)

    def _coordinates(self, stage: str, layer: int, a: Array, b: Array) -> "_Coordinates | str":
        """Who the rows of axis 0 are; a sentence where the two sides hold different ones."""
        left, right = self.left.rows(stage, layer), self.right.rows(stage, layer)
        if (left is None) != (right is None):
            return f"{form(a)} != {form(b)}: one side keeps the rows of some experts only"
        what = "(position, rank, expert) rows"
        if left is None or right is None:
            what, left, right = "positions", self.left.positions[:, None], self.right.positions[:, None]
        if a.shape[:1] != left.shape[:1] or b.shape[:1] != right.shape[:1]:
            return f"{form(a)} with {len(left)} {what} != {form(b)} with {len(right)}"
        return _align(what, left, right)

    def _where(self, stage: str, layer: int, at: tuple[int, ...], coordinates: "_Coordinates") -> str:
        row = [int(i) for i in coordinates.rows[at[0]]]
        words = [f"position {row[0]}"]
        if len(row) == 3:
            words += [f"rank {row[1]}", f"expert {row[2]}", *(f"column {i}" for i in at[1:])]
            return ", ".join(words)
        axes = _AXES.get(stage, ("column",))
        words += [f"{name} {i}" for name, i in zip(axes, at[1:], strict=False)]
        if stage in EXPERT_STAGES and ("moe_router_indices", layer) in self.keys[0]:
            words.append(f"expert {int(self.left.read('moe_router_indices', layer)[at[0], at[1]])}")
        return ", ".join(words)

    def routers(self, n_layers: int) -> Iterator[RouterDiff]:
        both = self.keys[0] & self.keys[1]
        for layer in range(n_layers):
            if ("moe_router_indices", layer) not in both:
                continue
            ids = self._pair("moe_router_indices", layer)
            if ids is None or ids[0].ndim != 2 or ids[0].shape != ids[1].shape:
                continue  # its row in the table says what is wrong with it
            T = len(ids[0])
            logits = self._pair("moe_router_logits", layer) if ("moe_router_logits", layer) in both else None
            if logits is not None and (logits[0].size != logits[1].size or not T or logits[0].size % T):
                logits = None
            yield diff_router(
                layer,
                *ids,
                left_logits=None if logits is None else logits[0].reshape(T, -1),
                right_logits=None if logits is None else logits[1].reshape(T, -1),
                margin_ulp=_of_length(T, self.left.margin_ulp(layer)),
                positions=_of_length(T, self.left.positions),
            )

    def _pair(self, stage: str, layer: int) -> tuple[Array, Array] | None:
        """Both sides of a router stage, rows aligned; None where they cannot be."""
        a, b = self.left.read(stage, layer), self.right.read(stage, layer)
        if self.foreign or 1 in (a.ndim, b.ndim):
            shape = a.shape if a.ndim >= b.ndim else b.shape
            return (a.reshape(shape), b.reshape(shape)) if a.size == b.size else None
        coordinates = self._coordinates(stage, layer, a, b)
        return None if isinstance(coordinates, str) else (a, b[coordinates.order])


class _Coordinates(NamedTuple):
    rows: Array  # of the left, [N, 1] positions or [N, 3] position, rank, expert
    order: Array  # rows of the right that stand beside them


def _of_length(n: int, column: Array | None) -> Array | None:
    """A column of what a trace says of its tokens; None where it says nothing of these (a foreign trace)."""
    return column if column is not None and column.shape == (n,) else None


def _align(what: str, left: Array, right: Array) -> _Coordinates | str:
    places = {tuple(int(i) for i in row): n for n, row in enumerate(right)}
    wanted = [tuple(int(i) for i in row) for row in left]
    if set(wanted) != set(places) or len(wanted) != len(right):
        return f"other {what}: {_listed(wanted, places)} and {_listed(list(places), set(wanted))}"
    return _Coordinates(left, np.array([places[row] for row in wanted], np.int64))


def _listed(rows: Sequence[tuple[int, ...]], others: "Mapping[tuple[int, ...], int] | set[tuple[int, ...]]") -> str:
    """The rows that the other side lacks, at most five; or how many there are."""
    alone = [row for row in rows if row not in others]
    if not alone:
        return f"{len(rows)}, all of them on the other side too"
    shown = ", ".join(str(row[0] if len(row) == 1 else row) for row in alone[:5])
    return f"{len(rows)}, of which only here {shown}" + (f" and {len(alone) - 5} more" if len(alone) > 5 else "")
