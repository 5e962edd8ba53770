"""Plant a plausible mistake in the reference: one line changed, everything else as it is.

A check that has never failed proves nothing. Each fault is a textual change to one file of parity/reference: a wrong
version differs from the right one by what its line says and nothing else, and a fault whose line is gone is an error.
While planted, the changed file's functions stand in for the original's in every reference module, so a whole forward
pass carries the fault as well as a single op."""

import inspect
import pkgutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from importlib import import_module
from types import ModuleType
from typing import Any

import numpy as np

from exactmoe.kernels.errors import require
from exactmoe.parity import reference

_REFERENCE = "exactmoe.parity.reference"
_LAYER: ContextVar[int] = ContextVar("layer", default=-1)  # that runs now; -1 outside layers


@dataclass(frozen=True)
class Fault:
    """A wrong version of one op."""

    name: str
    op: str  # the op whose cases must catch it
    file: str  # the file of parity/reference that is changed
    right: str  # text that stands there exactly once
    wrong: str  # text that takes its place
    reason: str  # how one comes to write it

    def __str__(self) -> str:
        return self.name

    def control(self) -> "Fault":
        """The same planting without the mistake."""
        return replace(self, wrong=self.right)


@contextmanager
def planted(fault: Fault, layer: int | None = None) -> Iterator[None]:
    """Run the reference with `fault` in it: everywhere, or in `layer` alone, where -1 is what belongs to no layer.

    A layer is known in the traced forward pass and under `in_layer`. Raises InvalidInput unless the fault's text stands
    in its file exactly once."""
    modules = [import_module(f"{_REFERENCE}.{info.name}") for info in pkgutil.iter_modules(reference.__path__)]
    original = import_module(f"{_REFERENCE}.{fault.file}")
    stand_ins = _stand_ins(original, _changed(original, fault))
    undo = _watch_layers() if layer is not None else []
    for module in modules:
        for name, value in list(vars(module).items()):
            if id(value) in stand_ins:
                wrong = stand_ins[id(value)]
                undo.append((module, name, value))
                setattr(module, name, wrong if layer is None else _only_in(layer, wrong, value))
    try:
        yield
    finally:
        for module, name, value in reversed(undo):
            setattr(module, name, value)


@contextmanager
def in_layer(layer: int) -> Iterator[None]:
    """Say which layer runs inside the block, for faults planted in one."""
    token = _LAYER.set(layer)
    try:
        yield
    finally:
        _LAYER.reset(token)


def _only_in(layer: int, wrong: Any, right: Any) -> Callable[..., Any]:
    """`wrong` while `layer` runs, else `right`."""

    def choose(*args: Any, **kwargs: Any) -> Any:
        return (wrong if _LAYER.get() == layer else right)(*args, **kwargs)

    return choose


def _watch_layers() -> list[tuple[ModuleType, str, object]]:
    """Let the two halves of a layer of the traced forward pass say which layer runs; what to put back."""
    traced = import_module(f"{_REFERENCE}.traced")
    halves: list[tuple[ModuleType, str, object]] = [(traced, n, getattr(traced, n)) for n in ("_attention", "_moe")]

    def watched(half: Any) -> Callable[..., Any]:
        def run(weights: Any, layer: Any, *args: Any) -> Any:
            number = next(i for i, known in enumerate(weights.layers) if known is layer)
            with in_layer(number):
                return half(weights, layer, *args)

        return run

    for module, name, half in halves:
        setattr(module, name, watched(half))
    return halves


def _changed(original: ModuleType, fault: Fault) -> ModuleType:
    """The module again, from its changed text; its classes stay the original's."""
    text = inspect.getsource(original)
    count = text.count(fault.right)
    require(count == 1, f"fault {fault.name}: its text stands {count} times in {fault.file}.py: {fault.right!r}")
    twin = ModuleType(original.__name__)
    vars(twin)["np"] = np  # a change may need it where the file does not
    exec(compile(text.replace(fault.right, fault.wrong), f"<{fault.name}>", "exec"), vars(twin))
    for name, value in vars(original).items():
        if isinstance(value, type):
            setattr(twin, name, value)
    return twin


def _stand_ins(original: ModuleType, twin: ModuleType) -> dict[int, object]:
    """The twin's function for each of the original's own, by identity."""
    own = {
        name: value
        for name, value in vars(original).items()
        if callable(value) and not isinstance(value, type) and value.__module__ == original.__name__
    }
    return {id(value): vars(twin)[name] for name, value in own.items()}
