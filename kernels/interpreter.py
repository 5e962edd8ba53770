"""Triton's interpreter, made quick enough to run a whole model, and strict about integers.

The interpreter rewires `triton.language` at every launch, and again at every call of a device function inside it, which
costs more than the arithmetic. Inside a launch the second rewiring changes nothing: `quicken` leaves it out.

Every tensor that it makes has a type of its own, and both describe their shape anew, which costs a third of the rest.
Here a shape is described once.

It also does all arithmetic of integers a second time, in i64, to see whether they leave their type, and then says so
only where it debugs: half of a launch was spent on that. Here it takes two comparisons, and says so always."""

import inspect
import operator
from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np


def quicken() -> None:
    """Patch the interpreter of this process once."""
    from triton.runtime import interpreter

    original, executor = interpreter._patch_lang, interpreter.GridExecutor  # noqa: SLF001 - the hook has no public name
    if getattr(executor, "_exactmoe_quickened", False):
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

    _describe_shapes_once(interpreter.tl.core)
    _refuse_overflow(interpreter.TritonSemantic, interpreter.InterpreterBuilder)
    interpreter._get_np_dtype = _by_name(interpreter._get_np_dtype)  # noqa: SLF001 - nor has this
    interpreter._patch_lang = patch_lang  # noqa: SLF001 - the hook has no public name
    executor.__call__ = call
    executor._exactmoe_quickened = True  # noqa: SLF001 - our own mark


def _describe_shapes_once(core: ModuleType) -> None:
    """Have types of blocks, and tensors, of one shape share what describes it."""
    make_type, make_tensor = core.block_type.__init__, core.tensor.__init__
    of_types: dict[tuple[int, ...], tuple[Any, int, str]] = {}
    of_tensors: dict[tuple[int, ...], tuple[Any, Any]] = {}

    def block_type(self: Any, element_ty: Any, shape: Any) -> None:
        sizes = tuple(size.value if isinstance(size, core.constexpr) else size for size in shape)
        known = of_types.get(sizes)
        if known is None:
            make_type(self, element_ty, shape)
            if vars(self).keys() == {"element_ty", "shape", "numel", "name"}:
                of_types[sizes] = self.shape, self.numel, str(self.shape)
            return
        self.element_ty = element_ty
        self.shape, self.numel, text = known
        self.name = f"<{text}, {element_ty}>"

    def tensor(self: Any, handle: Any, type: Any) -> None:  # noqa: A002 - as Triton has it
        sizes = tuple(type.shape) if type.is_block() else ()
        known = of_tensors.get(sizes)
        if known is None:
            make_tensor(self, handle, type)
            if vars(self).keys() == {"handle", "shape", "numel", "type", "dtype"}:
                of_tensors[sizes] = self.shape, self.numel
            return
        self.handle, self.type, self.dtype = handle, type, type.scalar
        self.shape, self.numel = known

    core.block_type.__init__ = block_type
    core.tensor.__init__ = tensor


def _refuse_overflow(semantic: Any, builder: type) -> None:
    """Have integers that leave their type refused where `builder` runs a kernel."""
    compiled = semantic.binary_op_sanitize_overflow_impl

    def refuse_overflow(self: Any, lhs: Any, rhs: Any, op: Callable[..., Any]) -> None:
        if isinstance(self.builder, builder):
            _require_range(lhs, rhs, op)
        else:  # what is compiled in this process, for its instructions
            compiled(self, lhs, rhs, op)

    semantic.binary_op_sanitize_overflow_impl = refuse_overflow


def _by_name(find: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """`find` of a scalar or block type, asked once for each name of a scalar."""
    known: dict[str, Any] = {}

    def found(kind: Any) -> Any:
        scalar = kind.scalar
        if scalar.is_ptr():
            return find(kind)
        if scalar.name not in known:
            known[scalar.name] = find(scalar)
        return known[scalar.name]

    return found


def _require_range(lhs: Any, rhs: Any, op: Callable[..., Any]) -> None:
    """Raise OverflowError if the sum, difference or product of integers of at most 32 bits leaves their type.

    Triton makes the same comparison, tensor by tensor, and throws its result away unless it debugs."""
    kind = lhs.type.scalar
    if kind.int_bitwidth >= 64 or not lhs.handle.data.size:
        return
    a, b = lhs.handle.data, rhs.handle.data
    ends = [(int(x.min()), int(x.max())) for x in (a, b)]
    least, most = kind.get_int_min_value(), kind.get_int_max_value()
    reach = [_EXACT[op.__name__](x, y) for x in ends[0] for y in ends[1]]
    if min(reach) >= least and max(reach) <= most:
        return
    exact = _EXACT[op.__name__](a.astype(np.int64), b.astype(np.int64))
    if exact.min() < least or exact.max() > most:
        raise OverflowError(f"{op.__name__} leaves {kind}: {exact.min()} to {exact.max()}")


_EXACT: dict[str, Callable[[Any, Any], Any]] = {"add": operator.add, "sub": operator.sub, "mul": operator.mul}


def _is_language(value: object) -> bool:
    return inspect.ismodule(value) and isinstance(value, ModuleType) and value.__name__ in _LANGUAGES


_LANGUAGES = ("triton.language", "triton.language.core")


class _NothingToRestore:
    def restore(self) -> None:
        """The launch restores what it rewired."""
