"""A trace on disk: DIR/manifest.json, DIR/layer-N/<stage>.safetensors, stages of the whole model at the top.

In a safetensors file the stage's tensor has the stage's name. Beside it may stand `rows`, (position, rank, expert) i32
[N, 3] of the rows of a stage of which only some experts were kept, and `margin_ulp` i64 [T] beside moe_router: how many
f32 numbers lie between the k-th and the k+1-th router logit. A folder of .aprt files, with the same names or flat, is
read as a trace of another engine."""

import hashlib
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from exactmoe.kernels.errors import InvalidInput, require
from exactmoe.model.stages import WHOLE_MODEL, Key, keys
from exactmoe.parity.bits import Array
from exactmoe.parity.trace import aprt
from exactmoe.parity.trace.manifest import NAME, Manifest, TensorRecord, read_manifest, write_whole

FORMATS = ("safetensors", "aprt")


class Saved(NamedTuple):
    """One stage to write: its values, and what goes beside them."""

    key: Key
    values: Array
    rows: Array | None = None
    margin_ulp: Array | None = None


class Trace:
    """An opened trace. Tensors are read when they are asked for, and checked against the manifest."""

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self.path, self.manifest = path, manifest
        self._records = {record.key: record for record in manifest.tensors}

    @property
    def positions(self) -> Array:
        """Token positions of axis 0 of every stage, i64."""
        return np.array(self.manifest.positions, np.int64)

    def keys(self) -> list[Key]:
        """The (stage, layer) pairs it holds, in canonical order."""
        known = [key for key in keys(self.manifest.n_layers) if key in self._records]
        return known + sorted(self._records.keys() - set(known), key=lambda key: (key[1], key[0]))

    def read(self, stage: str, layer: int) -> Array:
        """One stage, bit for bit as it was saved. Raises InvalidInput for one it does not hold, or that was altered."""
        record = self._record(stage, layer)
        values = self._part(record, stage)
        found = f"{values.dtype.name} {list(values.shape)}"
        require(
            values.dtype.name == record.dtype and values.shape == record.shape,
            f"{self.path / record.file}: holds {found}, the manifest says {record.dtype} {list(record.shape)}",
        )
        require(
            _sha256(values) == record.sha256, f"{self.path / record.file}: its values are not those of the manifest"
        )
        return values

    def rows(self, stage: str, layer: int) -> Array | None:
        """(position, rank, expert) i32 [N, 3] of the rows of a stage of which some experts were kept; else None."""
        return self._extra(self._record(stage, layer), "rows")

    def margin_ulp(self, layer: int) -> Array | None:
        """ULP between the k-th and k+1-th router logit of each position, i64 [T]; None where moe_router is not held."""
        record = self._records.get(("moe_router", layer))
        return None if record is None else self._extra(record, "margin_ulp")

    def verify(self) -> int:
        """Read every tensor; how many there are. Raises InvalidInput for the first that is not as the manifest says."""
        for key in self.keys():
            self.read(*key)
        return len(self._records)

    def _record(self, stage: str, layer: int) -> TensorRecord:
        record = self._records.get((stage, layer))
        at = "" if layer == WHOLE_MODEL else f" of layer {layer}"
        if record is None:
            raise InvalidInput(f"{self.path}: holds no {stage}{at}")
        return record

    def _part(self, record: TensorRecord, name: str) -> Array:
        path = self.path / record.file
        if path.suffix == ".aprt":
            return _read_aprt(path).values
        found = _load(path).get(name)
        if found is None:
            raise InvalidInput(f"{path}: holds no tensor {name}")
        return found

    def _extra(self, record: TensorRecord, name: str) -> Array | None:
        path = self.path / record.file
        return None if path.suffix == ".aprt" else _load(path).get(name)


def open_trace(path: str | Path, *, allow_incomplete: bool = False) -> Trace:
    """Open the trace in a folder. Raises InvalidInput for one that is missing, incomplete or without a tensor."""
    folder = Path(path)
    require(folder.is_dir(), f"{folder}: there is no such folder")
    if not (folder / NAME).exists():
        return _open_aprt(folder)
    manifest = read_manifest(folder)
    require(manifest.complete or allow_incomplete, f"{folder}: the trace is incomplete: its run was stopped or goes on")
    require(len(manifest.tensors) > 0 or allow_incomplete, f"{folder}: the trace holds no tensor")
    names = [record.key for record in manifest.tensors]
    require(len(set(names)) == len(names), f"{folder / NAME}: a stage is listed twice")
    for record in manifest.tensors:
        inside = (folder / record.file).resolve().is_relative_to(folder.resolve())
        require(inside, f"{folder / NAME}: {record.file} lies outside the trace")
        require((folder / record.file).is_file(), f"{folder / record.file}: is missing")
    return Trace(folder, manifest)


def write_trace(
    folder: Path,
    manifest: Manifest,
    items: Iterable[Saved],
    file_format: str = "safetensors",
    *,
    overwrite: bool = False,
) -> Trace:
    """Write a trace, one tensor at a time, and open it. `manifest` is what will stand in it, but for its tensors.

    Raises InvalidInput for a folder that holds anything, unless it is a trace and `overwrite`; and for no tensor."""
    require(file_format in FORMATS, f"format {file_format!r} is not one of {', '.join(FORMATS)}")
    prepare_folder(folder, overwrite=overwrite)
    incomplete = Manifest(**{**manifest.__dict__, "complete": False, "tensors": ()})
    write_whole(folder / NAME, incomplete.to_json().encode())
    records = [_write(folder, item, file_format) for item in items]
    require(len(records) > 0, f"{folder}: there was no tensor to write")
    write_whole(folder / NAME, manifest.written(tuple(records)).to_json().encode())
    return open_trace(folder)


def prepare_folder(folder: Path, *, overwrite: bool = False) -> None:
    """Make `folder`, or empty it where it is a trace and `overwrite`; raises InvalidInput where it holds anything."""
    require(not folder.exists() or folder.is_dir(), f"{folder}: is no folder")
    if folder.is_dir() and any(folder.iterdir()):
        ours = (folder / NAME).is_file()
        require(ours, f"{folder}: is not empty, and no trace")
        require(overwrite, f"{folder}: holds a trace already; --overwrite replaces it")
        read_manifest(folder)  # a manifest of something else is left alone
        (folder / NAME).unlink()
        for layer in folder.glob("layer-*"):
            shutil.rmtree(layer)
        for file in [*folder.glob("*.safetensors"), *folder.glob("*.aprt"), *folder.glob(".*.partial")]:
            file.unlink()
    folder.mkdir(parents=True, exist_ok=True)


def _write(folder: Path, item: Saved, file_format: str) -> TensorRecord:
    stage, layer = item.key
    values = np.ascontiguousarray(item.values).reshape(item.values.shape)
    file = f"{stage}.{file_format}" if layer == WHOLE_MODEL else f"layer-{layer}/{stage}.{file_format}"
    path = folder / file
    path.parent.mkdir(exist_ok=True)
    if file_format == "aprt":
        require(item.rows is None, f"{stage}: APRT has no place for the rows of a selection of experts")
        content = aprt.encode(layer, values, stage)
        values = aprt.decode(content, stage).values
    else:
        from safetensors.numpy import save

        parts = {stage: values, "rows": item.rows, "margin_ulp": item.margin_ulp}
        content = save({name: np.ascontiguousarray(part) for name, part in parts.items() if part is not None})
    write_whole(path, content)
    return TensorRecord(stage, layer, file, values.dtype.name, values.shape, _sha256(values), values.nbytes)


def _sha256(values: Array) -> str:
    little = values.astype(values.dtype.newbyteorder("<"), copy=False)
    return hashlib.sha256(little.tobytes()).hexdigest()


def _load(path: Path) -> dict[str, Array]:
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        found: dict[str, Array] = load_file(path)
    except OSError as error:
        raise InvalidInput(f"{path}: cannot be read: {error.strerror or error}") from error
    except SafetensorError as error:
        raise InvalidInput(f"{path}: is no safetensors file: {error}") from error
    return found


def _read_aprt(path: Path) -> aprt.AprtTensor:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise InvalidInput(f"{path}: cannot be read: {error.strerror}") from error
    return aprt.decode(content, str(path))


def _open_aprt(folder: Path) -> Trace:
    """A folder of APRT files without a manifest: the layer is what each header says."""
    files = sorted(folder.rglob("*.aprt"))
    require(len(files) > 0, f"{folder}: holds neither {NAME} nor an .aprt file")
    records: dict[Key, TensorRecord] = {}
    for path in files:
        found = _read_aprt(path)
        key = path.stem, found.layer
        file = path.relative_to(folder).as_posix()
        require(
            key not in records, f"{path}: holds {key[0]} of the same layer as {records.get(key) and records[key].file}"
        )
        shape = found.values.shape
        records[key] = TensorRecord(*key, file, "float32", shape, _sha256(found.values), found.values.nbytes)
    layers = [layer for _, layer in records]
    return Trace(folder, _foreign(tuple(records.values()), max(layers) + 1))


def _foreign(records: Sequence[TensorRecord], n_layers: int) -> Manifest:
    return Manifest(
        complete=True,
        model="",
        model_sha256="",
        numerics="",
        activations="",
        backend="aprt",
        device="",
        versions={},
        tokens=(),
        n_layers=n_layers,
        positions=(),
        plan={},
        tensors=tuple(records),
    )
