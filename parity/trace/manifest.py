"""manifest.json: what a trace holds, and where it comes from.

It is written first, as incomplete, and last, as complete: what was killed between says so. Every file of a trace is
written beside its name, flushed to the disk and renamed, so a name stands for a whole file or for none."""

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from exactmoe.kernels.errors import InvalidInput, require
from exactmoe.model.stages import Key

NAME = "manifest.json"
FORMAT = 1


@dataclass(frozen=True)
class TensorRecord:
    """One stage of one layer, as it lies on disk."""

    stage: str
    layer: int  # -1 for the whole model
    file: str  # path below the trace's folder, with /
    dtype: str  # numpy's name
    shape: tuple[int, ...]
    sha256: str  # of the values' bytes, little-endian, C order
    nbytes: int  # of the values

    @property
    def key(self) -> Key:
        """Stage and layer."""
        return self.stage, self.layer


@dataclass(frozen=True)
class Manifest:
    """A trace's own account of itself."""

    complete: bool
    model: str  # file name
    model_sha256: str
    numerics: str  # id and version of the contract
    activations: str  # profile
    backend: str  # reference or triton; aprt for a folder of another engine
    device: str
    versions: Mapping[str, str]
    tokens: tuple[int, ...]
    n_layers: int
    positions: tuple[int, ...]  # of the rows that were kept
    plan: Mapping[str, Any]
    seconds: float = 0.0  # of the traced pass
    tensors: tuple[TensorRecord, ...] = ()
    format: int = FORMAT

    def to_json(self) -> str:
        """As the file holds it."""
        return json.dumps(asdict(self), indent=1) + "\n"

    def written(self, tensors: tuple[TensorRecord, ...]) -> "Manifest":
        """The same with all its tensors, complete."""
        return replace(self, complete=True, tensors=tensors)


def read_manifest(folder: Path) -> Manifest:
    """The manifest in `folder`; raises InvalidInput that names the file and what is wrong with it."""
    path = folder / NAME
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InvalidInput(f"{path}: cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise InvalidInput(f"{path}: is not JSON: {error}") from error
    require(isinstance(found, dict), f"{path}: is no JSON object")
    require(found.get("format") == FORMAT, f"{path}: format {found.get('format')!r}, this version reads {FORMAT}")
    _require_fields(path, found, Manifest)
    require(isinstance(found["tensors"], list), f"{path}: tensors is no list")
    tensors = []
    for i, record in enumerate(found["tensors"]):
        where = f"{path}: tensor {i}"
        require(isinstance(record, dict), f"{where} is no JSON object")
        _require_fields(where, record, TensorRecord)
        tensors.append(TensorRecord(**{**record, "shape": tuple(record["shape"])}))
    return Manifest(
        **{
            **found,
            "tensors": tuple(tensors),
            "tokens": tuple(found["tokens"]),
            "positions": tuple(found["positions"]),
        }
    )


def _require_fields(where: object, found: dict[str, Any], form: type) -> None:
    names = {field.name for field in fields(form)}
    for word, wrong in (("lacks", names - found.keys()), ("has an unknown", found.keys() - names)):
        require(not wrong, f"{where} {word} {', '.join(sorted(wrong))}")


def write_whole(path: Path, content: bytes) -> None:
    """Write a file so that its name stands for all of `content` or for what was there before, through a power cut."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with open(partial, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
