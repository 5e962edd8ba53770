"""Triton's interpreter, made quick enough to run a whole model.

The interpreter rewires `triton.language` at every launch, and again at every call of a device function inside it, which
costs more than the arithmetic. Inside a launch the second rewiring changes nothing: `quicken` leaves it out."""

import inspect
from collections.abc import Callable
from types import ModuleType
from typing import Any


def quicken() -> None:
    """Patch the interpreter of this process once. Triton versions without these hooks are left as they are."""
    from triton.runtime import interpreter

    original: Callable[[Any], Any] | None = getattr(interpreter, "_patch_lang", None)
    executor = getattr(interpreter, "GridExecutor", None)
    if original is None or executor is None or getattr(executor, "_exactmoe_quickened", False):
        return
    launch = executor.__call__
    rewired: set[int] = set()
    languages: dict[int, frozenset[int]] = {}

    def patch_lang(fn: Any) -> Any:
        key = id(fn.__globals__)
        if key not in languages:
            languages[key] = frozenset(id(m) for m in fn.__globals__.values() if _is_language(m))
        if languages[key] <= rewired:
            return _NothingToRestore()
        rewired.update(languages[key])
        return original(fn)

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            return launch(self, *args, **kwargs)
        finally:
            rewired.clear()

    interpreter._patch_lang = patch_lang  # noqa: SLF001 - the hook has no public name
    executor.__call__ = call
    executor._exactmoe_quickened = True  # noqa: SLF001 - our own mark


def _is_language(value: object) -> bool:
    return inspect.ismodule(value) and isinstance(value, ModuleType) and value.__name__ in _LANGUAGES


_LANGUAGES = ("triton.language", "triton.language.core")


class _NothingToRestore:
    def restore(self) -> None:
        """The launch restores what it rewired."""
