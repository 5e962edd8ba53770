"""What two arrays of one shape and dtype differ by.      left, right -> Metrics

Bits decide; the other numbers say how far apart. All sums are float64, taken over 2^20 elements at a time, so that
memory stays small beside the arrays. numpy only, and pure."""

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from exactmoe.kernels.errors import require
from exactmoe.parity.bits import Array, canonical_bits

U64 = npt.NDArray[np.uint64]
Mask = npt.NDArray[np.bool_]

CHUNK = 2**20  # elements at a time


@dataclass(frozen=True, slots=True)
class Tolerance:
    """How far apart two numbers may be, for traces of another engine: |a - b| <= atol + rtol * max(|a|, |b|).

    A NaN is never within it, an infinity only of the same infinity; -0 is within it of +0. Raises InvalidInput for
    bounds that are negative or not finite."""

    atol: float = 0.0
    rtol: float = 0.0

    def __post_init__(self) -> None:
        for name, bound in (("atol", self.atol), ("rtol", self.rtol)):
            require(math.isfinite(bound) and bound >= 0, f"{name} must be a finite number of at least 0, got {bound}")

    def __str__(self) -> str:
        return f"atol={self.atol:g}, rtol={self.rtol:g}"


@dataclass(frozen=True, slots=True)
class Metrics:
    """Counts are of elements. A pair is finite where both of its numbers are."""

    count: int
    differing: int  # bits differ; every NaN is one pattern
    outside: int  # of these, outside the tolerance; all of them where there is none
    ulp: tuple[int, ...]  # finite pairs by distance: [0] is 0 (same bits), [i] is 2^(i-1) .. 2^i - 1
    worst_ulp: int | None  # of the finite pairs; None where there is none
    max_abs: float | None  # |a - b|; inf where an infinity stands against another number; None without any number pair
    max_rel: float | None  # |a - b| / max(|a|, |b|), 0 for two zeros; as above
    rms: float | None  # sqrt(mean((a - b)^2)) of the finite pairs; None where there is none
    cosine: float | None  # of the finite pairs: 1 for two zero vectors, 0 for one; None where NaN or infinity differ
    zero_sign: int  # -0 against +0
    infinite: int  # an infinity against another number
    nan_left: int  # NaN on the left only
    nan_right: int
    nan_both: int
    first: int | None  # C-order index of the first element outside
    first_nan: str | None  # "left" or "right": the side of the first NaN that stands on one side only


def measure(left: Array, right: Array, tolerance: Tolerance | None = None) -> Metrics:
    """Compare two arrays of one shape and dtype (float, integer or bool).

    Raises InvalidInput where shape or dtype differ, or the dtype has no bits to compare."""
    require(
        left.shape == right.shape and left.dtype == right.dtype,
        f"arrays of one form are compared, got {left.dtype} {list(left.shape)} and {right.dtype} {list(right.shape)}",
    )
    total = _Totals()
    flat = np.ascontiguousarray(left).reshape(-1), np.ascontiguousarray(right).reshape(-1)
    chunks = [slice(start, start + CHUNK) for start in range(0, left.size, CHUNK)]
    same = all(flat[0][chunk].tobytes() == flat[1][chunk].tobytes() for chunk in chunks)
    with np.errstate(all="ignore"):
        for chunk in chunks:
            if same:  # the usual case, and most of the elements of a trace
                total.add_same(flat[0][chunk])
            else:
                total.add(chunk.start, flat[0][chunk], flat[1][chunk], tolerance)
    return total.metrics()


def distance(left: Array, right: Array) -> U64:
    """Bit patterns between two numbers of one dtype, counted along the number line: -0 and +0 are neighbours.

    So only equal bits are at distance 0. For integers it is the absolute difference. NaN has no place on the line."""
    a, b = _place(left), _place(right)
    return np.maximum(a, b) - np.minimum(a, b)


def bucket_label(index: int) -> str:
    """The distances that the bucket of `Metrics.ulp` at `index` holds: `0`, `1`, `2-3`, `4-7`, `2^10-2^11-1`, ..."""
    if index < 2:
        return str(index)
    if index <= 10:
        return f"{2 ** (index - 1)}-{2**index - 1}"
    return f"2^{index - 1} to 2^{index}-1"


class _Totals:
    """Running sums over chunks."""

    def __init__(self) -> None:
        self.count = self.differing = self.outside = 0
        self.zero_sign = self.infinite = self.nan_left = self.nan_right = self.nan_both = 0
        self.ulp = np.zeros(65, np.int64)
        self.worst = 0
        self.max_abs = self.max_rel = 0.0
        self.squares = self.dot = self.left_norm = self.right_norm = 0.0
        self.first: int | None = None
        self.first_nan: tuple[int, str] | None = None

    def add(self, start: int, left: Array, right: Array, tolerance: Tolerance | None) -> None:
        unequal = canonical_bits("left", left) != canonical_bits("right", right)
        finite, either_nan = self._classes(start, left, right)
        a, b = left.astype(np.float64), right.astype(np.float64)
        step = np.abs(a - b)
        scale = np.maximum(np.abs(a), np.abs(b))
        n_unequal = int(np.count_nonzero(unequal))
        self.count += left.size
        self.differing += n_unequal
        self.zero_sign += int(np.count_nonzero(unequal & (a == 0) & (b == 0)))
        self.infinite += int(np.count_nonzero(unequal & ~finite & ~either_nan))
        if n_unequal:
            within = np.zeros(left.shape, np.bool_)
            if tolerance is not None:
                within = finite & (step <= tolerance.atol + tolerance.rtol * scale)
            outside = unequal & ~within
            self.outside += int(np.count_nonzero(outside))
            if self.first is None and outside.any():
                self.first = start + int(np.argmax(outside))
        self._distances(left[finite], right[finite])
        changed = unequal & ~either_nan
        if changed.any():
            steps, scales = step[changed], scale[changed]
            self.max_abs = max(self.max_abs, float(steps.max()))
            relative = np.where(np.isinf(steps), np.inf, steps / np.where(scales > 0, scales, 1))
            self.max_rel = max(self.max_rel, float(relative.max()))
        a, b = a[finite], b[finite]
        self.squares += float(np.sum((a - b) ** 2))
        self.dot += float(np.sum(a * b))
        self.left_norm += float(np.sum(a * a))
        self.right_norm += float(np.sum(b * b))

    def add_same(self, values: Array) -> None:
        """A chunk of an array whose other side has the same bytes throughout: only its classes are to be counted."""
        self.count += values.size
        finite = values.size
        if values.dtype.kind == "f":
            finite = int(np.count_nonzero(np.isfinite(values)))
            self.nan_both += int(np.count_nonzero(np.isnan(values))) if finite < values.size else 0
        self.ulp[0] += finite

    def _classes(self, start: int, left: Array, right: Array) -> tuple[Mask, Mask]:
        """Where both are finite, and where one is NaN."""
        if left.dtype.kind != "f":
            return np.ones(left.shape, np.bool_), np.zeros(left.shape, np.bool_)
        nan = np.isnan(left), np.isnan(right)
        self.nan_both += int(np.count_nonzero(nan[0] & nan[1]))
        self.nan_left += int(np.count_nonzero(nan[0] & ~nan[1]))
        self.nan_right += int(np.count_nonzero(nan[1] & ~nan[0]))
        alone = nan[0] ^ nan[1]
        if self.first_nan is None and alone.any():
            at = int(np.argmax(alone))
            self.first_nan = start + at, "left" if nan[0][at] else "right"
        return np.isfinite(left) & np.isfinite(right), nan[0] | nan[1]

    def _distances(self, left: Array, right: Array) -> None:
        if not left.size:
            return
        apart = distance(left, right)
        self.ulp += np.bincount(_bit_length(apart), minlength=65)
        self.worst = max(self.worst, int(apart.max()))

    def metrics(self) -> Metrics:
        finite = int(self.ulp.sum())
        numbers = self.count - self.nan_left - self.nan_right - self.nan_both
        used = np.flatnonzero(self.ulp)
        return Metrics(
            count=self.count,
            differing=self.differing,
            outside=self.outside,
            ulp=tuple(int(n) for n in self.ulp[: used[-1] + 1]) if used.size else (),
            worst_ulp=self.worst if finite else None,
            max_abs=self.max_abs if numbers else None,
            max_rel=self.max_rel if numbers else None,
            rms=math.sqrt(self.squares / finite) if finite else None,
            cosine=self._cosine() if finite and not (self.infinite or self.nan_left or self.nan_right) else None,
            zero_sign=self.zero_sign,
            infinite=self.infinite,
            nan_left=self.nan_left,
            nan_right=self.nan_right,
            nan_both=self.nan_both,
            first=self.first,
            first_nan=self.first_nan and self.first_nan[1],
        )

    def _cosine(self) -> float:
        if self.squares == 0:
            return 1.0  # the same numbers, so also two zero vectors
        if self.left_norm == 0 or self.right_norm == 0:
            return 0.0
        return max(-1.0, min(1.0, self.dot / (math.sqrt(self.left_norm) * math.sqrt(self.right_norm))))


def _place(array: Array) -> U64:
    """The rank of each number among those of its dtype, as u64: order-preserving in the bits."""
    bits = canonical_bits("array", array)
    width = 8 * array.dtype.itemsize
    sign = bits.dtype.type(1 << (width - 1))
    if array.dtype.kind == "f":
        bits = np.where(bits & sign, ~bits, bits | sign)
    elif array.dtype.kind == "i":
        bits = bits ^ sign
    return bits.astype(np.uint64)


def _bit_length(values: U64) -> npt.NDArray[np.int64]:
    """Number of bits that each value needs; 0 for 0."""
    rest, length = values.copy(), np.zeros(values.shape, np.int64)
    for step in (32, 16, 8, 4, 2, 1):
        large = rest >= np.uint64(1 << step)
        length += np.where(large, step, 0)
        rest = np.where(large, rest >> np.uint64(step), rest)
    return length + (rest > 0)
