"""A kernel under test: the inputs of a case, what the reference makes of them, and the comparison of an output."""

import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from exactmoe.kernels.errors import InvalidInput
from exactmoe.parity.bits import Array
from exactmoe.parity.cases import Case, reference_output, tensors
from exactmoe.parity.diff.diff import diff_arrays, form
from exactmoe.parity.diff.metrics import Tolerance
from exactmoe.parity.diff.report import as_json
from exactmoe.parity.diff.traces import DiffReport, Fact
from exactmoe.parity.diff.verdict import StageDiff, Verdict

if TYPE_CHECKING:
    import torch

Record = Callable[[StageDiff], None]


class ParityCase:
    """One case of an op, for a test of another implementation of it."""

    def __init__(self, case: Case, record: Record) -> None:
        self.case = case
        self.op = case.op
        self._record = record

    @cached_property
    def device(self) -> "torch.device":
        """Where kernels run in this process: CUDA where there is one, else the CPU, in Triton's interpreter."""
        from exactmoe.kernels.launch import resolve_device

        return resolve_device("auto")

    @cached_property
    def arrays(self) -> dict[str, Any]:
        """The inputs in numpy, by the names of the op's arguments. The same at every access."""
        twin = getattr(import_module(f"exactmoe.parity.reference.{self.case.module}"), self.case.op)
        return dict(zip(inspect.signature(twin).parameters, self.case.arguments(), strict=True))

    @cached_property
    def inputs(self) -> dict[str, Any]:
        """The inputs as the kernels take them: tensors on `device`, quantised weights and activations as ours."""
        return dict(zip(self.arrays, tensors(tuple(self.arrays.values()), self.device, self.case.packed), strict=True))

    @cached_property
    def reference(self) -> dict[str, Array]:
        """What the reference makes of the inputs, by name; one output is `out`."""
        return reference_output(self.case)

    def check(self, output: Any, *, atol: float = 0.0, rtol: float = 0.0) -> None:
        """Compare `output` with the reference, bit for bit, or within a tolerance that the report then names.

        `output` is a tensor or array; or a dict, named tuple or sequence of them where the op has several outputs, by
        the names, or in the order, of `reference`. What an op writes into one of its inputs, as `append` into the
        cache, is compared where it was written; `output` is then what it returned, or None. Raises AssertionError where
        anything differs."""
        __tracebackhide__ = True
        if self.case.writes is not None:
            written = named(list(self.inputs.values())[self.case.writes], ())
            output = ({} if output is None else dict(named(output, ("out",)))) | dict(written)
        check(f"{self.op} {self.case}", self.reference, output, self._record, atol=atol, rtol=rtol)

    def __str__(self) -> str:
        return f"{self.op} {self.case}"


def check(name: str, expected: Any, output: Any, record: Record, *, atol: float = 0.0, rtol: float = 0.0) -> None:
    """Compare `output` with `expected` under `name` and `record` it; raise AssertionError if anything fails.

    NaN at the same place on both sides matches: what ops do with NaN is part of their promise."""
    __tracebackhide__ = True
    wanted = named(expected, [f"out{i}" for i in range(len(expected))] if isinstance(expected, tuple | list) else ())
    found = named(output, tuple(wanted))
    tolerance = Tolerance(atol, rtol) if atol or rtol else None
    rows = []
    for part in dict.fromkeys([*wanted, *found]):
        title = name if part == "out" else f"{name} {part}"
        rows.append(_compare(title, wanted.get(part), found.get(part), tolerance))
    for row in rows:
        record(row)
    wrong = [row for row in rows if not (row.passed or _empty(row))]
    if wrong:
        raise AssertionError("not what the reference gives:\n" + "\n".join(f"  {row}" for row in wrong))


def named(value: Any, names: Sequence[str]) -> dict[str, Array]:
    """Arrays of an output by name: a mapping's keys, a named tuple's fields, else `names` in order, or `out`."""
    if isinstance(value, Mapping):
        items = list(value.items())
    elif hasattr(value, "_asdict"):
        # None is an output that this shape does not have; where the reference has it, it is missing.
        items = [(name, part) for name, part in value._asdict().items() if part is not None]
    elif isinstance(value, tuple | list):
        if len(value) != len(names):
            raise AssertionError(f"{len(value)} outputs where the reference has {len(names)}: {', '.join(names)}")
        items = list(zip(names, value, strict=True))
    else:
        return {names[0] if len(names) == 1 else "out": _array(value)}
    flat: dict[str, Array] = {}
    for name, part in items:
        if isinstance(part, Mapping) or hasattr(part, "_asdict"):
            flat.update(named(part, ()))
        else:
            flat[str(name)] = _array(part)
    return flat


def not_compared(name: str) -> StageDiff:
    """What the report holds of a test that ended before it compared anything."""
    return diff_arrays(name, None, None, note="the test ended before it compared anything")


def write_report(path: Path, rows: Sequence[StageDiff]) -> None:
    """Write what was compared, as HTML, JUnit XML or JSON by the ending of `path`."""
    report = kernel_report(rows)
    if path.suffix == ".html":
        from exactmoe.parity.html.page import render_report

        text = render_report(report)
    elif path.suffix == ".xml":
        from exactmoe.parity.junit import junit

        text = junit(report)
    else:
        text = json.dumps(as_json(report), indent=2, allow_nan=False) + "\n"
    path.write_text(text, encoding="utf-8")


def kernel_report(rows: Sequence[StageDiff]) -> DiffReport:
    """The comparisons of a test run as a report. Outputs without elements are counted in a note, not among the rows."""
    full = tuple(row for row in rows if not _empty(row))
    notes = (
        [f"{len(rows) - len(full)} outputs have no element: their form was compared"] if len(full) < len(rows) else []
    )
    rules = dict.fromkeys(row.text.split(":")[0] for row in full if row.passed and row.text.startswith("match within"))
    notes += [f"some outputs were judged with a tolerance: {rule}" for rule in rules]
    versions = [Fact(m, v, v) for m, v in _versions().items()]
    return DiffReport(
        title="kernels under test against the reference",
        left="reference",
        right="under test",
        rule="bit for bit" if not rules else "bit for bit, but for the tolerances noted",
        rows=full,
        facts=tuple(versions),
        notes=tuple(notes),
        what="outputs",
    )


def _compare(title: str, wanted: Array | None, found: Array | None, tolerance: Tolerance | None) -> StageDiff:
    if wanted is not None and found is not None and form(wanted) == form(found) and not wanted.size:
        return StageDiff(title, -1, Verdict.MATCH, "no element: the form agrees", form(wanted), form(found))
    return diff_arrays(title, wanted, found, tolerance=tolerance, nan_equal=True)


def _empty(row: StageDiff) -> bool:
    """Whether the reference gives no element here and neither does the kernel, in the same form."""
    return row.verdict is Verdict.MATCH and row.count == 0


def _array(value: Any) -> Array:
    if hasattr(value, "detach"):
        value = value.detach().cpu()
        if str(value.dtype) == "torch.bfloat16":
            raise InvalidInput("an output is bfloat16, which numpy lacks; the reference's outputs have none")
        return np.asarray(value.numpy())
    if isinstance(value, np.ndarray):
        return value
    raise AssertionError(f"an output must be a tensor or an array, got {type(value).__name__}")


def _versions() -> dict[str, str]:
    from importlib.metadata import PackageNotFoundError, version

    found = {}
    for name in ("exactmoe", "numpy", "torch", "triton"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found
