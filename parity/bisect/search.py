"""Find the first wrong stage of a suspect forward pass, then the expert, rows and weight block inside it.

    bisect(reference, suspect, file, tokens) -> Evidence

A probe runs the suspect's traced pass and keeps the stages of the half-open range (lo, mid] of those not yet judged;
all up to lo are known to be equal. If one differs, the first of them is the first wrong stage of all: nothing was
skipped, so no error can hide behind a stage in which it vanishes. If none differs, lo moves to mid. So at most
ceil(log2 N) + 1 passes are run for N stages, and every stage before the answer has been compared.

The stage found is then made again, alone, from the reference's inputs: wrong again is *made here*. Right again means
that something not among its inputs is wrong: the cache, scratch memory, or a race."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from exactmoe.kernels.errors import InvalidInput, require
from exactmoe.kernels.formats import BLOCK, executable_format
from exactmoe.model.stages import Key
from exactmoe.parity.bits import Array, Comparison, canonical_bits, compare
from exactmoe.parity.graph import NODES, TRACED, Graph, tensor_name
from exactmoe.parity.run import label

if TYPE_CHECKING:
    from exactmoe.model.gguf.reader import GGUFFile
    from exactmoe.parity.steps import Steps

Progress = Callable[[str], None]

MADE_HERE = "made here"
INHERITED = "inherited"
BOTH = "made here and inherited"
HIDDEN = "not from its inputs: cache, scratch memory or a race"
CLEAN = "clean"


@dataclass(frozen=True)
class Place:
    """Where in a stage the fault lies, as far as it can be told; None is what does not apply or could not be told."""

    count: int  # elements of the stage
    differing: int
    first: tuple[int, ...]  # coordinates of the first of them
    reference: str  # value and bits there
    suspect: str
    positions: tuple[int, ...]  # token positions with a wrong element
    experts: tuple[int, ...] | None = None  # experts with a wrong row, where the stage has rows of experts
    feature: tuple[int, int] | None = None  # first and last wrong index of the last axis
    tensor: str | None = None  # weights of the stage
    quant_type: str | None = None
    row: int | None = None  # of the tensor (of the expert's matrix), whose product with the input is wrong
    block: int | None = None  # of 256 weights in that row; the first that makes a difference
    alone: bool | None = None  # whether that block is wrong by itself; if not, the blocks' fold is
    bytes: tuple[int, int] | None = None  # [first, end) of that block in the file
    resident: str | None = None  # the first byte of the weights in memory that is not the file's


@dataclass(frozen=True)
class Origin:
    """What became of the stage when each side made it from each side's inputs; True is equal to the reference's."""

    suspect_on_reference: bool  # the suspect's op, the reference's inputs
    reference_on_suspect: bool  # the reference's op, the suspect's inputs
    inputs_equal: bool  # the two sides' inputs
    verdict: str


@dataclass(frozen=True)
class Evidence:
    """What a bisection found; `clean` means every stage was compared and is equal."""

    suspect: str
    stage: str | None
    layer: int | None
    place: Place | None
    origin: Origin | None
    stages: int  # (stage, layer) pairs there are
    compared: int  # of them, until the answer
    passes: int  # forward passes of the suspect
    most_passes: int  # ceil(log2 stages) + 1
    steps: int  # single stages made besides
    probes: tuple[tuple[str, str, bool], ...] = field(default=())  # first and last stage of each probe, and equal?

    @property
    def clean(self) -> bool:
        """Nothing differs, and everything was compared."""
        return self.stage is None and self.compared == self.stages > 0

    @property
    def sentence(self) -> str:
        """The answer, in one line."""
        if self.stage is None or self.layer is None or self.place is None or self.origin is None:
            return f"{self.suspect}: clean, {self.compared} of {self.stages} asked for were compared, all equal"
        p = self.place
        what = "stage" if self.stages == 1 else "first wrong stage"
        parts = [f"{what} {label(self.stage, self.layer)}", self.origin.verdict]
        if p.experts is not None:
            parts.append(
                f"experts {', '.join(map(str, p.experts))}" if len(p.experts) > 1 else f"expert {p.experts[0]}"
            )
        if p.row is not None:
            parts.append(f"row {p.row}")
        if p.block is not None:
            parts.append(f"block {p.block}" + ("" if p.alone else " (right by itself: the fold of the blocks)"))
        return f"{self.suspect}: " + ", ".join(parts)

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        return {**asdict(self), "clean": self.clean, "sentence": self.sentence}


def bisect(
    reference: "Steps",
    suspect: "Steps",
    file: "GGUFFile",
    tokens: Sequence[int],
    *,
    past: Sequence[int] = (),
    name: str = "suspect",
    stage: Key | None = None,
    progress: Progress | None = None,
    graph: Graph = TRACED,
) -> Evidence:
    """Compare the pass over `tokens`, after `past`, of two implementations; `stage` asks about that one instead.

    Raises InvalidInput for no token, and where one side keeps a stage of another form than the other."""
    require(len(tokens) > 0, "no token to run: nothing would be compared")
    return _Search(reference, suspect, file, tokens, past, name, progress or (lambda _: None), graph).run(stage)


class _Range:
    """A plan that keeps some stages."""

    def __init__(self, kept: Sequence[Key]) -> None:
        self._kept = frozenset(kept)

    def wants(self, stage: str, layer: int) -> bool:
        """Whether it is one of them."""
        return (stage, layer) in self._kept


class _Search:
    def __init__(
        self,
        reference: "Steps",
        suspect: "Steps",
        file: "GGUFFile",
        tokens: Sequence[int],
        past: Sequence[int],
        name: str,
        progress: Progress,
        graph: Graph,
    ) -> None:
        self.graph = graph
        self.reference, self.suspect, self.file, self.name = reference, suspect, file, name
        self.tokens, self.past, self.progress = tuple(tokens), tuple(past), progress
        self.order = graph.order(reference.n_layers)
        self.passes = self.steps = 0
        self.probes: list[tuple[str, str, bool]] = []
        progress("reference")
        experts = [("moe_router_indices", layer) for layer in range(reference.n_layers)]  # tell whose a row is
        self.truth = reference.trace(self.past, self.tokens, _Range([*self.order, *experts]))
        missing = [key for key in self.order if key not in self.truth]
        require(not missing, f"the reference kept no {label(*missing[0])}" if missing else "")

    def run(self, asked: Key | None) -> Evidence:
        if asked:
            found = self.kept([asked])[asked]
            key: Key | None = None if self.compare(asked, found).equal else asked
            wrong: Array | None = found
            compared = 1
        else:
            key, wrong, compared = self.first_wrong()
        origin = place = None
        if key is not None and wrong is not None:
            origin = self.origin(key, asked is not None)
            place = self.place(key, wrong, origin)
        return Evidence(
            suspect=self.name,
            stage=key[0] if key else None,
            layer=key[1] if key else None,
            place=place,
            origin=origin,
            stages=1 if asked else len(self.order),
            compared=compared,
            passes=self.passes,
            most_passes=2 if asked else math.ceil(math.log2(len(self.order))) + 1,
            steps=self.steps,
            probes=tuple(self.probes),
        )

    def first_wrong(self) -> tuple[Key | None, Array | None, int]:
        """The first stage that differs, what the suspect has there, and how many were compared until then."""
        lo, n = 0, len(self.order)
        while lo < n:
            mid = lo + math.ceil((n - lo) / 2)
            part = self.order[lo:mid]
            kept = self.kept(part)
            at = next((i for i, key in enumerate(part) if not self.compare(key, kept[key]).equal), None)
            self.probes.append((label(*part[0]), label(*part[-1]), at is None))
            if at is not None:
                return part[at], kept[part[at]], lo + at + 1
            lo = mid
        return None, None, n

    def kept(self, part: Sequence[Key]) -> dict[Key, Array]:
        """Those stages of a pass of the suspect."""
        self.passes += 1
        self.progress(f"pass {self.passes}: {label(*part[0])} to {label(*part[-1])}")
        kept = self.suspect.trace(self.past, self.tokens, _Range(part))
        missing = [key for key in part if key not in kept]
        if missing:
            raise InvalidInput(f"{self.name} kept no {label(*missing[0])}")
        return kept

    def compare(self, key: Key, found: Array) -> Comparison:
        return compare(label(*key), self.truth[key], found)

    def make(self, steps: "Steps", key: Key, read: Mapping[Key, Array], tokens: Sequence[int] | None = None) -> Array:
        """A stage made alone."""
        self.steps += 1
        return steps.step(key, read, self.past, tokens or self.tokens)

    def origin(self, key: Key, asked: bool) -> Origin:
        """Who is to blame, by exchanging the inputs. A stage that was searched for reads none that differs."""
        self.progress(f"{label(*key)} from exchanged inputs")
        reads = list(dict.fromkeys(self.graph.inputs(*key, self.reference.n_layers)))
        theirs = self.kept(reads) if asked and reads else {k: self.truth[k] for k in reads}
        equal = all(self.compare(k, theirs[k]).equal for k in reads)
        here = not self.compare(key, self.make(self.suspect, key, self.truth)).equal
        there = not self.compare(key, self.make(self.reference, key, theirs)).equal
        verdicts = {(True, False): MADE_HERE, (True, True): BOTH, (False, True): INHERITED, (False, False): HIDDEN}
        return Origin(not here, not there, equal, verdicts[here, there])

    def place(self, key: Key, wrong: Array, origin: Origin) -> Place:
        """Where inside the stage."""
        stage, layer = key
        truth = self.truth[key]
        found = self.compare(key, wrong)
        if not found.same_form or found.first is None:
            return Place(found.count, found.differing, (), found.left, found.right, ())
        unequal = canonical_bits(stage, truth) != canonical_bits(stage, wrong)
        where = np.argwhere(unequal)
        positions = tuple(int(t) + len(self.past) for t in np.unique(where[:, 0]))
        experts = None
        if stage.startswith("moe_expert_"):
            ids = self.truth["moe_router_indices", layer]
            rows = np.unique(where[:, :2], axis=0)
            experts = tuple(int(e) for e in np.unique(ids[rows[:, 0], rows[:, 1]]))
        feature = (int(where[:, -1].min()), int(where[:, -1].max())) if unequal.ndim > 1 else None
        common = Place(
            found.count, found.differing, found.first, found.left, found.right, positions, experts, feature,
            tensor=tensor_name(stage, layer),
        )  # fmt: skip
        if (
            not self.graph.blocks
            or NODES[stage].quantised is None
            or common.tensor is None
            or origin.suspect_on_reference
        ):
            return common
        return self.block(key, common)

    def block(self, key: Key, place: Place) -> Place:
        """Which block of 256 of the first wrong element's weights."""
        stage, layer = key
        assert place.tensor
        info = self.file.tensors[place.tensor]
        t, *_, row = place.first
        size = executable_format(info.type_name, place.tensor).block_bytes
        blocks = info.shape[-1] // BLOCK if info.shape[-1] % BLOCK == 0 else 0
        expert = None
        if stage.startswith("moe_expert_"):
            expert = int(self.truth["moe_router_indices", layer][t, place.first[1]])
        resident, corrupt = self.resident(place.tensor, size)
        fixed = {k: self.truth[k][t : t + 1] for k in self.graph.inputs(*key, self.reference.n_layers)}
        source = (NODES[stage].quantised or "", layer)
        at = (0, *place.first[1:])

        def differs(first: int, end: int) -> bool:
            """Whether the element is wrong when only blocks [first, end) of its input are not zero."""
            x = np.zeros_like(fixed[source])
            lanes = slice(first * BLOCK, end * BLOCK)
            x[..., lanes] = fixed[source][..., lanes]
            read = {**fixed, source: x}
            pair = [self.make(side, key, read, self.tokens[:1]) for side in (self.reference, self.suspect)]
            return not compare(stage, pair[0][at].reshape(1), pair[1][at].reshape(1)).equal

        block, alone = None, None
        if corrupt is not None and corrupt[1] == row and corrupt[0] in (None, expert):
            block, alone = corrupt[2], True  # a NaN in a block shows whatever the input is: memory itself tells
        elif not differs(0, 0) and differs(0, blocks):
            lo, hi = 0, blocks  # wrong with [0, hi), right with [0, lo)
            while hi - lo > 1:
                mid = (lo + hi) // 2
                lo, hi = (lo, mid) if differs(0, mid) else (mid, hi)
            block, alone = lo, differs(lo, lo + 1)
        span = None
        if block is not None:
            begin = info.offset + (((expert or 0) * info.shape[-2] + row) * blocks + block) * size
            span = (begin, begin + size)
        return replace(
            place, quant_type=info.type_name, row=row, block=block, alone=alone, bytes=span, resident=resident
        )

    def resident(self, tensor: str, size: int) -> tuple[str | None, tuple[int | None, int, int] | None]:
        """The first byte of the suspect's weights that is not the file's, in words and as (expert, row, block)."""
        held, whole = self.suspect.resident(tensor), self.file.tensor(tensor)
        if held is None:
            return None, None
        if held.shape != whole.shape:
            return f"shape {list(held.shape)} in memory, {list(whole.shape)} in the file", None
        unequal = held != whole
        if not unequal.any():
            return None, None
        *expert, row, byte = (int(i) for i in np.unravel_index(int(np.argmax(unequal)), held.shape))
        e = expert[0] if expert else None
        at = "" if e is None else f"expert {e}, "
        bytes_of = [f"0x{array[(*expert, row, byte)]:02x}" for array in (held, whole)]
        text = f"{at}row {row}, block {byte // size}, byte {byte % size}: {bytes_of[0]}, {bytes_of[1]} in the file"
        return text, (e, row, byte // size)
