"""A traced run as a tree of hashes: two machines compare kilobytes, and fetch tensors only below a node that differs.

    root = H(header, layers)   layer = H(its stages)   stage = H(name, dtype, shape, its tokens)   token: stage_digest

H is SHA-256 of its parts as JSON; the hash of a token's row is computed where the stage lies, by kernels.stage_digest
or its twin. The header holds what must agree for two runs to be comparable: model, numerics, activations and tokens."""

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from exactmoe.kernels.errors import InvalidInput, require
from exactmoe.model.stages import WHOLE_MODEL, Key, keys
from exactmoe.parity.bits import Array
from exactmoe.parity.provenance import device_name, numerics_version, versions
from exactmoe.parity.steps import load_steps

if TYPE_CHECKING:
    from exactmoe.model.gguf.reader import GGUFFile
    from exactmoe.model.plan import SaveTensorPlan

FORMAT = 1
COMPARABLE = ("model_sha256", "numerics", "activations", "tokens")
"""Fields of a header that must agree."""


class Node(NamedTuple):
    """One stage of one layer."""

    stage: str
    layer: int
    dtype: str
    shape: tuple[int, ...]
    tokens: tuple[str, ...]  # a hash of 16 hex digits each

    @property
    def hash(self) -> str:
        """Of the whole stage."""
        return _hash([self.stage, self.layer, self.dtype, list(self.shape), list(self.tokens)])


class Leaf(NamedTuple):
    """A token's row of a stage that differs; position None where the stage differs as a whole."""

    stage: str
    layer: int
    position: int | None


class Differences(NamedTuple):
    """What a comparison of two trees found."""

    leaves: tuple[Leaf, ...]  # in canonical order
    looked_at: int  # hashes compared
    stages: int  # stages that stand in both trees

    @property
    def equal(self) -> bool:
        """Nothing differs, and something was compared."""
        return not self.leaves and self.stages > 0


@dataclass(frozen=True)
class DigestTree:
    """The hashes of a run."""

    header: dict[str, Any]
    nodes: tuple[Node, ...]  # in canonical order

    @property
    def layers(self) -> dict[int, str]:
        """Hash of each layer, WHOLE_MODEL among them."""
        grouped: dict[int, list[str]] = {}
        for node in self.nodes:
            grouped.setdefault(node.layer, []).append(node.hash)
        return {layer: _hash(hashes) for layer, hashes in grouped.items()}

    @property
    def root(self) -> str:
        """Hash of everything but where it was run."""
        header = [self.header[name] for name in COMPARABLE]
        return _hash([header, sorted(self.layers.items())])

    def to_json(self) -> str:
        """The file: header, root, a hash a layer and stage, and those of the tokens."""
        held = {
            "format": FORMAT,
            "root": self.root,
            **self.header,
            "layers": {str(layer): value for layer, value in self.layers.items()},
            "stages": [
                {"stage": n.stage, "layer": n.layer, "dtype": n.dtype, "shape": n.shape, "hash": n.hash,
                 "tokens_hashes": n.tokens}
                for n in self.nodes
            ],
        }  # fmt: skip
        return json.dumps(held, indent=1) + "\n"

    @staticmethod
    def from_json(text: str, name: str) -> "DigestTree":
        """Read such a file; raises InvalidInput naming `name` where a hash is not that of what stands below it."""
        try:
            held = json.loads(text)
            require(held["format"] == FORMAT, f"{name}: format {held['format']!r}, this version reads {FORMAT}")
            nodes = tuple(
                Node(s["stage"], s["layer"], s["dtype"], tuple(s["shape"]), tuple(s["tokens_hashes"]))
                for s in held["stages"]
            )
            known = {"format", "root", "layers", "stages"}
            tree = DigestTree({field: value for field, value in held.items() if field not in known}, nodes)
            for node, stated in zip(nodes, held["stages"], strict=True):
                require(node.hash == stated["hash"], f"{name}: the hash of {node.stage} of layer {node.layer} is wrong")
            layers = {str(layer): value for layer, value in tree.layers.items()}
            require(layers == held["layers"], f"{name}: the hash of a layer is wrong")
            require(tree.root == held["root"], f"{name}: the root is wrong")
        except (ValueError, KeyError, TypeError) as error:
            if isinstance(error, InvalidInput):
                raise
            raise InvalidInput(f"{name}: is no digest file: {type(error).__name__}: {error}") from error
        return tree


def read_digest(path: str | Path) -> DigestTree:
    """The tree in a file of `exactmoe trace --digest`."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise InvalidInput(f"{path}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise InvalidInput(f"{path}: is no digest file: {error}") from error
    return DigestTree.from_json(text, str(path))


def compare(left: DigestTree, right: DigestTree) -> Differences:
    """What differs, looking only below nodes that do. Raises InvalidInput for runs that have nothing in common."""
    for field in COMPARABLE:
        a, b = left.header.get(field), right.header.get(field)
        require(a == b, f"the runs differ in {field.replace('_', ' ')}: {_short(a)} and {_short(b)}")
    a_nodes = {(n.stage, n.layer): n for n in left.nodes}
    b_nodes = {(n.stage, n.layer): n for n in right.nodes}
    both = a_nodes.keys() & b_nodes.keys()
    looked = 1
    if left.root == right.root:
        return Differences((), looked, len(both))
    a_layers, b_layers = left.layers, right.layers
    leaves = []
    apart = set()
    for layer in sorted(a_layers.keys() | b_layers.keys()):
        looked += 1
        if a_layers.get(layer) != b_layers.get(layer):
            apart.add(layer)
    n_layers = max([layer for _, layer in a_nodes.keys() | b_nodes.keys()], default=WHOLE_MODEL) + 1
    for key in keys(n_layers):
        if key[1] not in apart or (key not in a_nodes and key not in b_nodes):
            continue
        looked += 1
        a, b = a_nodes.get(key), b_nodes.get(key)
        if a is None or b is None or (a.dtype, a.shape) != (b.dtype, b.shape):
            leaves.append(Leaf(*key, None))
        elif a.hash != b.hash:
            looked += len(a.tokens)
            leaves += [
                Leaf(*key, t) for t, pair in enumerate(zip(a.tokens, b.tokens, strict=True)) if pair[0] != pair[1]
            ]
    return Differences(tuple(leaves), looked, len(both))


def digest_run(
    file: "GGUFFile",
    tokens: Sequence[int],
    plan: "SaveTensorPlan",
    backend: str = "triton",
    profile: str = "q8_k",
    device: str = "auto",
    progress: Callable[[str], None] | None = None,
) -> DigestTree:
    """Run `tokens` traced and hash the stages that `plan` wants; its positions and experts are not looked at.

    Raises InvalidInput for a stage that the traced pass did not keep."""
    tell = progress or (lambda _: None)
    tell("loading")
    steps = load_steps(file, backend, profile, device)
    tell("traced")
    hashed = steps.digests((), tokens, plan)
    missing = next((key for key in plan.selected() if key not in hashed), None)
    require(missing is None, f"stage {missing} was asked for, and the traced pass did not keep it")
    header = {
        "model": Path(file.path).name,
        "model_sha256": file.sha256(),
        "numerics": numerics_version(),
        "activations": profile,
        "tokens": [int(t) for t in tokens],
        "backend": backend,
        "device": "numpy on the CPU" if backend == "reference" else device_name(device),
        "versions": versions(),
    }
    return DigestTree(header, tuple(_node(key, *hashed[key]) for key in plan.selected()))


def tree_of(header: dict[str, Any], stages: Iterable[tuple[Key, Array]]) -> DigestTree:
    """The tree of stages held in memory, hashed by the reference's twin."""
    from exactmoe.parity.reference.stage_digest import stage_digest

    return DigestTree(header, tuple(_node(key, v.dtype.name, v.shape, stage_digest(v)) for key, v in stages))


def _node(key: Key, dtype: str, shape: Sequence[int], tokens: Array) -> Node:
    hashes = tuple(f"{value:016x}" for value in tokens.astype(np.int64).view(np.uint64).tolist())
    return Node(*key, dtype, tuple(shape), hashes)


def _hash(parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts, separators=(",", ":")).encode()).hexdigest()


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
