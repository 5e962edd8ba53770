"""torch's own grouped product in bf16, and the MoE layer around it."""

from collections.abc import Iterable, Sequence
from importlib.metadata import version

import torch
from torch import Tensor

from exactmoe.bench.cases import A
from exactmoe.bench.peers.layer import GroupedMM, rows_of, run_layer
from exactmoe.bench.peers.rows import Absent, PeerRow


def grouped_mm() -> GroupedMM:
    """torch's function. Raises Absent where this torch has none."""
    public = getattr(torch.nn.functional, "grouped_mm", None)
    found = public or getattr(torch, "_grouped_mm", None)
    if found is None:
        raise Absent(f"torch {torch.__version__} has no grouped_mm")

    def call(rows: Tensor, weights: Tensor, ends: Tensor) -> Tensor:
        result: Tensor = found(rows, weights, offs=ends)
        return result

    return call


def rows(device: torch.device, chunks: Sequence[int]) -> Iterable[PeerRow]:
    """Its layer of so many tokens each."""
    product = grouped_mm()
    return rows_of(
        "torch-grouped-mm", f"torch {version('torch')}", "bf16", device,
        lambda layer: lambda x: run_layer(layer, x, A, product), chunks,
    )  # fmt: skip
