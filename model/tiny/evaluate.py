"""Held-out loss of the tiny model, from a GGUF file or from trained weights.

    python -m exactmoe.model.tiny.evaluate [MODEL.gguf | WEIGHTS_DIR] [--heldout FILE.npy] [--windows N]

The weights are dequantised by gguf-py and run in float32 by `network.Network`, a plain torch forward that shares
nothing with the kernels or the reference. The loss is the mean cross-entropy, in nats, of every token but the first of
each window."""

import argparse
import sys
from pathlib import Path

import numpy as np
import torch

from exactmoe.kernels.errors import InvalidInput, MissingEnvironment, require
from exactmoe.model.config import Config, check_model
from exactmoe.model.gguf.reader import open_gguf
from exactmoe.model.tiny import build
from exactmoe.model.tiny.network import Dims, Network, next_token_loss

FOLDER = Path(__file__).parent
MODEL = FOLDER / "qwen3-moe-tiny.gguf"
HELD_OUT = FOLDER / "heldout.npy"


def network_from_gguf(path: Path) -> Network:
    """The model at `path` with every tensor dequantised to f32 by gguf-py."""
    try:
        from gguf import GGMLQuantizationType
        from gguf.quants import dequantize
    except ImportError as error:
        raise MissingEnvironment("evaluating a GGUF file needs the gguf package: pip install gguf") from error
    file = open_gguf(path)
    config = Config.from_gguf(file)
    check_model(file, config)
    dims = Dims(
        hidden=config.hidden,
        n_layers=config.n_layers,
        n_heads=config.n_heads,
        n_kv_heads=config.n_kv_heads,
        head_dim=config.head_dim,
        n_experts=config.n_experts,
        n_active=config.n_active,
        expert_width=config.expert_width,
        vocab=config.vocab,
        context_length=config.context_length,
        eps=float(config.eps),
        rope_base=config.rope_base,
    )
    state = {}
    for name, info in file.tensors.items():
        value = dequantize(file.tensor(name), GGMLQuantizationType[info.type_name])
        state[name] = torch.from_numpy(np.array(value, np.float32))
    network = Network(dims)
    network.load_state_dict(state)
    return network


def network_from_weights(folder: Path) -> Network:
    """The trained model in `folder`, before quantisation."""
    network = Network(Dims(**build.read_json(folder / "train.json")["dims"]))
    network.load_state_dict({name: torch.from_numpy(value) for name, value in build.load_state(folder).items()})
    return network


@torch.no_grad()
def held_out_loss(network: Network, windows: np.ndarray) -> float:
    """Nats a token over windows [N, S] of token ids."""
    vocab = network.dims.vocab
    require(windows.ndim == 2 and windows.size > 0, f"held-out windows have shape {windows.shape}, not [N, S]")
    require(int(windows.max()) < vocab, f"held-out token {int(windows.max())} is beyond the vocabulary of {vocab}")
    tokens = torch.from_numpy(windows.astype(np.int64))
    return float(np.mean([next_token_loss(network, row[None]).item() for row in tokens]))


@torch.no_grad()
def expert_load(network: Network, windows: np.ndarray) -> list[list[float]]:
    """Each expert's share of the routed rows over windows [N, S] of token ids, by layer."""
    tokens = torch.from_numpy(windows.astype(np.int64))
    load: list[list[float]] = torch.stack([network(row[None]).load for row in tokens]).mean(0).tolist()
    return load


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m exactmoe.model.tiny.evaluate", description="Held-out loss.")
    parser.add_argument("model", nargs="?", type=Path, default=MODEL, help="a GGUF file or a folder of trained weights")
    parser.add_argument("--heldout", type=Path, default=HELD_OUT, help="token windows, u16 [N, S] .npy")
    parser.add_argument("--windows", type=int, help="only the first N windows")
    args = parser.parse_args(argv)
    network = network_from_weights(args.model) if args.model.is_dir() else network_from_gguf(args.model)
    try:
        windows = np.load(args.heldout)[: args.windows]
    except (OSError, ValueError) as error:
        raise InvalidInput(f"{args.heldout}: {error}") from error
    loss = held_out_loss(network, windows)
    print(f"{loss:.4f} nats a token over {windows.shape[0]} windows of {windows.shape[1]}: {args.model}")
    return 0


if __name__ == "__main__":
    try:
        raise SystemExit(main())
    except InvalidInput as error:
        print(f"evaluate: error: {error}", file=sys.stderr)
        raise SystemExit(2) from error
    except MissingEnvironment as error:
        print(f"evaluate: error: {error}", file=sys.stderr)
        raise SystemExit(3) from error
