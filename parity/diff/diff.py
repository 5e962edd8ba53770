"""Two arrays of a stage.      stage, left, right -> StageDiff"""

from typing import Any

import numpy as np

from exactmoe.model.stages import WHOLE_MODEL
from exactmoe.parity.bits import Array, canonical_bits
from exactmoe.parity.diff.metrics import Metrics, Tolerance, measure
from exactmoe.parity.diff.verdict import INDEX_STAGES, First, StageDiff, Verdict


def diff_arrays(
    stage: str,
    left: Array | None,
    right: Array | None,
    *,
    layer: int = WHOLE_MODEL,
    tolerance: Tolerance | None = None,
    nan_equal: bool = False,
    note: str = "",
) -> StageDiff:
    """Judge `right` against `left`, arrays of any one shape and dtype; None is an array that is not there.

    The rule is bitwise. With `tolerance`, numbers are judged by it and the text of the verdict says so; ids never are.
    NaN at the same places on both sides is its own verdict and does not pass, since no forward pass should hold one;
    `nan_equal` lets it match, for an op whose promise includes NaN. `note` ends the text of the verdict.
    Raises InvalidInput for a dtype without bits to compare (object, text, complex)."""
    forms = form(left), form(right)
    after = f" ({note})" if note else ""
    if left is None or right is None:
        sides = " and ".join(side for side, array in (("left", left), ("right", right)) if array is None)
        return StageDiff(stage, layer, Verdict.MISSING, f"missing on the {sides}{after}", *forms)
    for side, array in (("left", left), ("right", right)):
        canonical_bits(f"{stage}, {side}", array[:0] if array.ndim else array)
    if stage in INDEX_STAGES:
        return _ids(stage, layer, left, right, after)
    if left.shape != right.shape or left.dtype != right.dtype:
        return StageDiff(stage, layer, Verdict.SHAPE, f"{forms[0]} != {forms[1]}{after}", *forms)
    if not left.size:
        return StageDiff(stage, layer, Verdict.MISSING, f"no element on either side{after}", *forms)
    found = measure(left, right, tolerance)
    verdict = _judge(found, nan_equal=nan_equal)
    text = _sentence(verdict, found, tolerance) + after
    first = None if found.first is None else first_at(left, right, found.first)
    return StageDiff(stage, layer, verdict, text, *forms, found, first, found.count, found.differing)


def form(array: Array | None) -> str:
    """Dtype and shape, as messages write them."""
    return "missing" if array is None else f"{array.dtype.name} {list(array.shape)}"


def first_at(left: Array, right: Array, index: int) -> First:
    """Both values at C-order `index` of two arrays of one shape."""
    at = tuple(int(i) for i in np.unravel_index(index, left.shape))
    return First(at, *_value(left[at]), *_value(right[at]))


def _judge(found: Metrics, *, nan_equal: bool) -> Verdict:
    if found.first_nan:
        return Verdict.NAN_LEFT if found.first_nan == "left" else Verdict.NAN_RIGHT
    if found.outside:
        return Verdict.DIFFER
    return Verdict.NAN_BOTH if found.nan_both and not nan_equal else Verdict.MATCH


def _sentence(verdict: Verdict, found: Metrics, tolerance: Tolerance | None) -> str:
    rule = f" within {tolerance}" if tolerance else ""
    apart = f"{found.differing:,} of {found.count:,} bits differ" if tolerance else ""
    match verdict:
        case Verdict.MATCH:
            nan = f", {found.nan_both:,} of them NaN on both sides" if found.nan_both else ""
            return f"match{rule}: {apart}{nan}" if tolerance else f"match: {found.count:,} elements, same bits{nan}"
        case Verdict.NAN_BOTH:
            same = f"no other element beyond {tolerance}: {apart}" if tolerance else "bits equal"
            return f"{found.nan_both:,} of {found.count:,} are NaN on both sides, {same}; a NaN is not a match"
        case Verdict.DIFFER:
            text = f"{found.outside:,} of {found.count:,} differ" + (f" beyond {tolerance}" if tolerance else "")
            return text + (f", {found.worst_ulp:,} ULP at worst" if found.worst_ulp else "")
        case _:
            alone = f"NaN on one side only: {found.nan_left:,} left, {found.nan_right:,} right"
            return f"{found.outside:,} of {found.count:,} differ{rule and f' beyond {tolerance}'}; {alone}"


def _value(value: Any) -> tuple[str, str]:
    """Shortest decimal of the dtype, and the bits as stored."""
    bits = value.astype(value.dtype.newbyteorder("<")).tobytes()[::-1].hex()
    return str(value), f"0x{bits}"


def _ids(stage: str, layer: int, left: Array, right: Array, after: str) -> StageDiff:
    """Expert ids: [T, A] in rank order. A trace that keeps numbers only may hold them as floats, or flat."""
    forms = form(left), form(right)
    if left.size == right.size and left.ndim != right.ndim and 2 in (left.ndim, right.ndim):
        shape = left.shape if left.ndim == 2 else right.shape
        left, right = left.reshape(shape), right.reshape(shape)
    a, b = _as_ids(left), _as_ids(right)
    if left.shape != right.shape or a is None or b is None:
        wrong = "" if left.shape != right.shape else ": not whole numbers, so not ids"
        return StageDiff(stage, layer, Verdict.SHAPE, f"{forms[0]} != {forms[1]}{wrong}{after}", *forms)
    if not a.size:
        return StageDiff(stage, layer, Verdict.MISSING, f"no id on either side{after}", *forms)
    unequal = a != b
    differing = int(np.count_nonzero(unequal))
    if not differing:
        text = f"match: {a.size:,} ids, all equal{after}"
        return StageDiff(stage, layer, Verdict.MATCH, text, *forms, None, None, a.size, 0)
    first = first_at(left, right, int(np.argmax(unequal)))
    if a.ndim != 2:
        text = f"{differing:,} of {a.size:,} ids differ; a flat trace does not say whose they are{after}"
        return StageDiff(stage, layer, Verdict.INDEX_SET, text, *forms, None, first, a.size, differing)
    changed = unequal.any(1)
    other_set = (np.sort(a, 1) != np.sort(b, 1)).any(1)
    sets, orders = int(other_set.sum()), int((changed & ~other_set).sum())
    verdict = Verdict.INDEX_SET if sets else Verdict.INDEX_REORDERED
    text = f"of {len(a):,} tokens {sets:,} have another set of experts, {orders:,} the same set in another order{after}"
    return StageDiff(stage, layer, verdict, text, *forms, None, first, a.size, differing)


def _as_ids(array: Array) -> Array | None:
    """The array as i64; None where it holds anything but whole numbers."""
    if array.dtype.kind in "iu":
        return array.astype(np.int64)
    if array.dtype.kind == "f" and bool((np.isfinite(array) & (np.trunc(array) == array)).all()):
        return array.astype(np.int64)
    return None
