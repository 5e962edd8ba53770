"""Sharpen the routers of a quantised model: near ties between experts then decide over little, so rounding moves less.

    python -m exactmoe.model.tiny.sharpen IN.gguf OUT.gguf --scale 1.4 --tail 4000 --seconds 260

Scales every router, then trains routers and norms, the tensors that stay F32 in the file, on the standard library's
sources (held-out files left out) with activation noise and a penalty on the weight the next expert would have had: at a
near tie, that is what goes to another expert. Its fourth power, so that the worst tokens count.
Quantised tensors keep their bytes. Runs on a CPU; how far it gets depends on the clock."""

import argparse
import os
import sys
import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from exactmoe.kernels.errors import InvalidInput, MissingEnvironment, require
from exactmoe.model.gguf.reader import open_gguf
from exactmoe.model.tiny import corpus, evaluate
from exactmoe.model.tiny.network import Network
from exactmoe.model.tokenizer import load_tokenizer

_NOISE = 4.0  # rounding steps; more than in training, where it would make one expert win always
_BALANCE = 0.1  # weight of the load-balancing loss, as in training
_SPAN, _BATCH = 256, 4


def sharpen(source: Path, out: Path, scale: float, tail: float, seconds: float) -> int:
    """Write `out` and return the number of training steps. Raises `InvalidInput` for a file that is not accepted."""
    require(scale > 0 and tail >= 0 and seconds > 0, f"scale {scale}, tail {tail} and seconds {seconds}: not positive")
    torch.manual_seed(0)
    file = open_gguf(source)
    network = evaluate.network_from_gguf(source)
    texts = [s.text for s in corpus.gather(12_000_000, 0).train]
    data = torch.from_numpy(corpus.encode(load_tokenizer(file), texts).astype(np.int64))
    trained = _prepare(network, scale)
    steps = _train(network, trained, data, tail, seconds)
    content = bytearray(source.read_bytes())
    for name, value in trained.items():
        at = file.tensors[name]
        content[at.offset : at.offset + at.nbytes] = value.detach().numpy().astype("<f4").tobytes()
    partial = out.with_name(out.name + ".partial")
    partial.write_bytes(content)
    os.replace(partial, out)
    return steps


def _prepare(network: Network, scale: float) -> dict[str, torch.nn.Parameter]:
    """Scale the routers, switch the noise on, and leave only what stays F32 in a file to be trained."""
    network.noise = torch.tensor(_NOISE)
    trained = {}
    for name, value in network.named_parameters():
        if "ffn_gate_inp" in name:
            value.data.mul_(scale)
        value.requires_grad_(value.ndim == 1 or "ffn_gate_inp" in name)
        if value.requires_grad:
            trained[name] = value
    for block in network.blk:
        block.noise = network.noise
    return trained


def _train(network: Network, trained: dict[str, torch.nn.Parameter], data: Tensor, tail: float, seconds: float) -> int:
    vectors = [p for p in trained.values() if p.ndim == 1]
    matrices = [p for p in trained.values() if p.ndim > 1]
    rates = (5e-4, 2e-3)
    optimiser = torch.optim.Adam([{"params": vectors}, {"params": matrices}], lr=rates[0])
    steps, start = 0, time.monotonic()
    while (elapsed := time.monotonic() - start) < seconds:
        for group, rate in zip(optimiser.param_groups, rates, strict=True):
            group["lr"] = rate * min(1.0, (steps + 1) / 20) * max(0.02, 1 - elapsed / seconds)
        first = torch.randint(0, len(data) - _SPAN - 1, (_BATCH, 1))
        tokens = data[first + torch.arange(_SPAN + 1)]
        logits, balance, _, ranked = network(tokens[:, :-1])
        tied = ranked[..., network.dims.n_active].pow(4).mean()
        loss = functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        torch.autograd.backward(loss + _BALANCE * balance + tail * tied)
        optimiser.step()
        optimiser.zero_grad()
        steps += 1
        if steps % 20 == 1:
            what = f"balance {balance.item():.3f}, runner-up {tied.item() ** 0.25:.4f}"
            print(f"[{elapsed:5.0f} s] loss {loss.item():.3f}, {what}", file=sys.stderr)
    return steps


def main(argv: list[str] | None = None) -> int:
    """The command; exit status 0, 2 for refused input, 3 for a package that is missing."""
    parser = argparse.ArgumentParser(prog="python -m exactmoe.model.tiny.sharpen", description=__doc__.split("\n")[0])
    parser.add_argument("source", type=Path, metavar="IN.gguf")
    parser.add_argument("out", type=Path, metavar="OUT.gguf")
    parser.add_argument("--scale", type=float, default=1.4, help="factor on every router before training")
    parser.add_argument("--tail", type=float, default=4000.0, help="weight of the penalty on near ties")
    parser.add_argument("--seconds", type=float, default=260.0, help="wall time of the training loop")
    args = parser.parse_args(argv)
    try:
        steps = sharpen(args.source, args.out, args.scale, args.tail, args.seconds)
    except (InvalidInput, MissingEnvironment) as error:
        print(f"sharpen: error: {error}", file=sys.stderr)
        return 2 if isinstance(error, InvalidInput) else 3
    print(f"{args.out}: {steps} steps")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
