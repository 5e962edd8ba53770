"""What `--suspect SPEC` can name, and how each is run.

    triton                    the Triton kernels of the traced pass, as they are
    decode                    production's decode step: the last token, after all others as its prompt
    fault:NAME[@LAYER]        a planted fault of parity.faults: the reference with one mistake, no GPU needed
    OP=FILE.py:FUNCTION       the Triton forward pass with one op replaced by a function of a file
    OP=package.module:NAME    the same, from an installed module

A function that replaces an op takes and gives what the op of that name in kernels/ does."""

import importlib
import importlib.util
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from exactmoe.kernels.errors import InvalidInput, require
from exactmoe.parity import decode_steps
from exactmoe.parity.decode_steps import decode_sides
from exactmoe.parity.graph import OPS

if TYPE_CHECKING:
    import torch

    from exactmoe.model.gguf.reader import GGUFFile
    from exactmoe.parity.steps import Steps

GRAMMAR = "triton | decode | fault:NAME[@LAYER] | OP=FILE.py:FUNCTION | OP=package.module:FUNCTION"


@contextmanager
def sides(
    spec: str, file: "GGUFFile", tokens: Sequence[int], profile: str, device: "torch.device | None"
) -> Iterator[tuple["Steps", "Steps"]]:
    """The reference and the suspect that `spec` names, ready to run inside the block; `device` is where kernels run.

    Raises InvalidInput for a spec that names nothing."""
    from exactmoe.parity.load import reference_weights
    from exactmoe.parity.steps import ReferenceSteps, TritonSteps, replaced

    if spec.startswith("fault:"):
        from exactmoe.parity.faults.catalogue_model import find, prepared

        name, at, layer = spec.removeprefix("fault:").partition("@")
        require(not at or (layer.isascii() and layer.isdigit()), f"suspect {spec!r}: {layer!r} is not a layer")
        with prepared(find(name), file, tokens, profile, layer=int(layer) if at else None) as pair:
            yield pair.reference, pair.suspect
        return
    function = None if spec in ("triton", "decode") else user_op(spec)
    require(device is not None, "kernels need a device to run on")
    if is_decode(spec):
        with decode_sides(file, profile, device, function) as pair:
            yield pair
        return
    reference = ReferenceSteps(reference_weights(file), profile)
    from exactmoe.model.weights import load_model

    assert device is not None
    suspect = TritonSteps(load_model(file, device, profile))
    if function is None:
        yield reference, suspect
        return
    with replaced(suspect.ops, *function):
        yield reference, suspect


def is_decode(spec: str) -> bool:
    """Whether a spec suspects the decode step, or an op that only it has."""
    return spec == "decode" or spec.partition("=")[0] in set(decode_steps.OPS) - set(OPS)


def user_op(spec: str) -> tuple[str, Any]:
    """The op that `OP=WHERE:FUNCTION` replaces, and the function. Raises InvalidInput that says what is wrong."""
    op, equals, where = spec.partition("=")
    source, colon, name = where.rpartition(":")
    require(bool(equals and colon and source and name), f"suspect {spec!r} is none of: {GRAMMAR}")
    known = dict.fromkeys([*OPS, *decode_steps.OPS])
    require(op in known, f"there is no op {op!r}; ops: {', '.join(known)}")
    module = _from_file(Path(source)) if source.endswith(".py") else _from_module(source)
    function = getattr(module, name, None)
    require(function is not None, f"{source} has no {name!r}")
    require(callable(function), f"{name!r} of {source} cannot be called")
    return op, function


def _from_file(path: Path) -> Any:
    require(path.is_file(), f"{path}: no such file")
    name = f"exactmoe_suspect_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # Triton reads the source of a kernel through its module
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise InvalidInput(f"{path}: cannot be imported: {type(error).__name__}: {error}") from error
    return module


def _from_module(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise InvalidInput(f"module {name!r} cannot be imported: {error}") from error
