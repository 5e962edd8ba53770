"""Time the peers that were asked for, on a CUDA device."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from exactmoe.bench.peers.rows import Asked, PeerRow, collect
from exactmoe.kernels.errors import MissingEnvironment, require

if TYPE_CHECKING:
    from exactmoe.bench.peers.hf_model import Logits
    from exactmoe.model.config import Config
    from exactmoe.model.gguf.reader import GGUFFile
    from exactmoe.model.weights import Model

_LAYER = "moe-layer-"


def chunks_of(names: Sequence[str]) -> list[int]:
    """The tokens of the MoE layers among the benchmarks `names`. Raises InvalidInput where there are none."""
    chunks = [int(name.removeprefix(_LAYER)) for name in names if name.startswith(_LAYER)]
    require(bool(chunks), f"--peer is beside the MoE layer or a --model: none of {', '.join(names)} is a {_LAYER}N")
    return chunks


def layer_peers(asked: Sequence[Asked], device: torch.device, chunks: Sequence[int]) -> Iterator[PeerRow]:
    """The MoE layer of each peer, of so many tokens each."""
    from exactmoe.bench.peers import hf_transformers, torch_grouped_mm

    sources = {"torch-grouped-mm": torch_grouped_mm.rows, "transformers": hf_transformers.layer_rows}
    for peer in asked:
        yield from collect(peer.peer, lambda peer=peer: sources[peer.peer](device, chunks))  # type: ignore[misc]


def judge_of(asked: Sequence[Asked], model: "Model") -> "Logits | None":
    """What our model says, where a peer that was asked for is judged by it; llama-bench says nothing to judge."""
    from exactmoe.bench.peers.hf_model import Logits

    return Logits.of(model) if any(peer.program is None for peer in asked) else None


def model_peers(
    asked: Sequence[Asked], file: "GGUFFile", config: "Config", device: torch.device, contexts: Sequence[int],
    ours: "Logits | None",
) -> Iterator[PeerRow]:  # fmt: skip
    """Decoding of the file by each peer, after each context; one that gives logits is judged by `ours`."""
    from exactmoe.bench.peers import hf_model, llama_cpp

    path = Path(file.path)
    for peer in asked:
        if peer.program is None:
            assert ours is not None
            yield from collect(peer.peer, lambda: hf_model.rows(file, config, device, contexts, ours))
            continue
        for context in contexts:
            yield from collect(peer.peer, lambda p=peer.program, c=context: llama_cpp.rows(p, path, c))  # type: ignore[misc]


def require_some(rows: Sequence[PeerRow]) -> None:
    """Raise MissingEnvironment where every peer that was asked for is absent: nothing was compared."""
    if rows and all(row.absent for row in rows):
        raise MissingEnvironment("none of the peers that were asked for is here: nothing was compared with")
