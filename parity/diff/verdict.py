"""Verdicts on one stage, and the record that holds one with what was measured."""

from dataclasses import dataclass
from enum import StrEnum

from exactmoe.model.stages import WHOLE_MODEL
from exactmoe.parity.diff.metrics import Metrics


class Verdict(StrEnum):
    """What the comparison of one stage came to. MATCH alone passes."""

    MATCH = "match"  # the same bits, or within the tolerance that the text names
    DIFFER = "differ"
    NAN_LEFT = "nan-left"  # the first NaN that stands on one side only is on the left
    NAN_RIGHT = "nan-right"
    NAN_BOTH = "nan-both"  # the same bits, but NaN among them: no forward pass should hold one
    MISSING = "missing"  # not on both sides, or without elements: nothing was compared
    SHAPE = "shape"  # another shape, dtype, or set of rows: nothing was compared
    INDEX_REORDERED = "index-reordered"  # expert ids: every token has the same set, some in another order
    INDEX_SET = "index-set"  # expert ids: some token has another set


INDEX_STAGES = frozenset({"moe_router_indices"})
"""Stages that hold ids, which are equal or not and have no distance."""


@dataclass(frozen=True, slots=True)
class First:
    """The first element that fails, in C order: where it is, and both values, in decimal and as bits."""

    at: tuple[int, ...]
    left: str
    left_bits: str  # hex, as stored: a NaN keeps its payload
    right: str
    right_bits: str
    where: str = ""  # the coordinates in words, where the trace knows them: position 5, expert 7

    def __str__(self) -> str:
        place = f"{self.at} ({self.where})" if self.where else f"{self.at}"
        return f"{place}: {self.left} {self.left_bits} != {self.right} {self.right_bits}"


@dataclass(frozen=True, slots=True)
class StageDiff:
    """One stage of one layer on two sides."""

    stage: str
    layer: int  # WHOLE_MODEL outside layers
    verdict: Verdict
    text: str  # the verdict in a sentence, with the rule it was judged by where that is a tolerance
    left: str  # dtype and shape, or "missing"
    right: str
    metrics: Metrics | None = None  # None where nothing could be measured, and for ids
    first: First | None = None
    count: int = 0  # elements compared
    differing: int = 0  # of these, with other bits (or, of ids, another id)

    @property
    def passed(self) -> bool:
        """Whether this stage was compared and passes."""
        return self.verdict is Verdict.MATCH and self.count > 0

    @property
    def name(self) -> str:
        """Stage and layer, as they are written everywhere."""
        return self.stage if self.layer == WHOLE_MODEL else f"{self.stage}, layer {self.layer}"

    def __str__(self) -> str:
        return f"{self.name}: {self.text}" + (f"; first {self.first}" if self.first else "")
