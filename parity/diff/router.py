"""What two routers chose, token by token.      ids [T, A] and logits [T, E] of both sides -> a verdict per token

A flip is another set of experts. It is explained where the logits moved enough to make it: the margin between the k-th
and the k+1-th logit of the left side is at most the logit error of that token. The logit error is the largest change of
a difference between two of its logits, since only differences choose: a shift of all logits explains nothing."""

from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple

import numpy as np

from exactmoe.kernels.errors import require
from exactmoe.parity.bits import Array
from exactmoe.parity.diff.metrics import distance


class RouterVerdict(StrEnum):
    """What became of one token's experts."""

    SAME = "same"
    REORDERED = "reordered"
    EXPLAINED = "explained flip"
    UNEXPLAINED = "unexplained flip"


class RouterToken(NamedTuple):
    """The experts of one token on both sides, best first."""

    position: int
    verdict: RouterVerdict
    left: tuple[int, ...]
    right: tuple[int, ...]
    margin: float | None  # k-th less k+1-th logit of the left; None without its logits, or if all experts are chosen
    margin_ulp: int | None  # the same as a distance of bit patterns
    error: float | None  # logit error; None unless both sides have finite logits


@dataclass(frozen=True, slots=True)
class RouterDiff:
    """The router of one layer over all positions compared."""

    layer: int
    tokens: tuple[RouterToken, ...]

    def count(self, verdict: RouterVerdict) -> int:
        """Tokens with this verdict."""
        return sum(token.verdict is verdict for token in self.tokens)

    @property
    def changed(self) -> tuple[RouterToken, ...]:
        """Tokens whose experts are not the same in the same order."""
        return tuple(token for token in self.tokens if token.verdict is not RouterVerdict.SAME)

    def __str__(self) -> str:
        counts = ", ".join(f"{n:,} {verdict}" for verdict in RouterVerdict if (n := self.count(verdict)))
        return f"router, layer {self.layer}: {counts or 'no token'}"


def diff_router(
    layer: int,
    left: Array,
    right: Array,
    *,
    left_logits: Array | None = None,
    right_logits: Array | None = None,
    margin_ulp: Array | None = None,
    positions: Array | None = None,
) -> RouterDiff:
    """Judge expert ids [T, A] of `right` against `left`.

    Logits [T, E] of both sides explain flips; without them every flip is unexplained. `margin_ulp` i64 [T] is what the
    left side recorded at capture (else it is taken from its logits), `positions` [T] names the tokens (default 0..T-1).
    Raises InvalidInput where shapes do not fit."""
    require(
        left.ndim == 2 and left.shape == right.shape,
        f"router ids must be [T, A] on both sides, got {list(left.shape)} and {list(right.shape)}",
    )
    T = len(left)
    for name, logits in (("left", left_logits), ("right", right_logits)):
        fits = logits is None or (logits.ndim == 2 and len(logits) == T)
        require(fits, f"{name} router logits must be [{T}, E], got {None if logits is None else list(logits.shape)}")
    for name, column in (("margin_ulp", margin_ulp), ("positions", positions)):
        fits = column is None or column.shape == (T,)
        require(fits, f"{name} must be [{T}], got {None if column is None else list(column.shape)}")
    tokens = []
    for t in range(T):
        a, b = tuple(int(i) for i in left[t]), tuple(int(i) for i in right[t])
        margin, ulp = (None, None) if left_logits is None else _margin(left_logits[t], a)
        if margin_ulp is not None:  # recorded as negative for NaN, as 2^32 where no expert is left out
            ulp = int(margin_ulp[t]) if 0 <= margin_ulp[t] < 2**32 else None
        error = None
        if left_logits is not None and right_logits is not None and left_logits.shape == right_logits.shape:
            error = _error(left_logits[t], right_logits[t])
        position = t if positions is None else int(positions[t])
        tokens.append(RouterToken(position, _judge(a, b, margin, error), a, b, margin, ulp, error))
    return RouterDiff(layer, tuple(tokens))


def _judge(left: tuple[int, ...], right: tuple[int, ...], margin: float | None, error: float | None) -> RouterVerdict:
    if left == right:
        return RouterVerdict.SAME
    if sorted(left) == sorted(right):
        return RouterVerdict.REORDERED
    # Without any error even a tie must break the same way.
    explained = margin is not None and error is not None and error > 0 and 0 <= margin <= error
    return RouterVerdict.EXPLAINED if explained else RouterVerdict.UNEXPLAINED


def _margin(logits: Array, chosen: tuple[int, ...]) -> tuple[float | None, int | None]:
    """Lowest chosen logit less the highest of the others, and their distance in bit patterns."""
    E = len(logits)
    inside = np.zeros(E, np.bool_)
    inside[[i for i in chosen if 0 <= i < E]] = True
    if not inside.any() or inside.all() or not np.isfinite(logits).all():
        return None, None
    last, following = logits[inside].min(), logits[~inside].max()
    return float(last) - float(following), int(distance(np.asarray(last), np.asarray(following)))


def _error(left: Array, right: Array) -> float | None:
    if not (np.isfinite(left).all() and np.isfinite(right).all()):
        return None
    change = right.astype(np.float64) - left.astype(np.float64)
    return float(change.max() - change.min())
