"""Train the tiny Qwen3-MoE on Python sources found on the machine.

    python -m exactmoe.model.tiny.train --minutes 5 --out DIR

Writes to DIR: weights-N.safetensors (bf16, GGUF tensor names), tokenizer.json, heldout.npy (u16 windows never trained
on) and train.json (data, loss curve, held-out loss, versions). The f32 weights are rounded to bf16 once, at the end.
Not reproducible bit for bit: the length of training is a wall time and the GPU's sums have no fixed order."""

import argparse
import json
import math
import platform
import random
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn import functional

from exactmoe.model.tiny import corpus
from exactmoe.model.tiny.network import Dims, Network, Pass, next_token_loss

SHARD_BYTES = 14 << 20
SAMPLE_PROMPT = 'def read_lines(path):\n    """Return the lines of a text file."""\n'
Step = Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]  # tokens to loss, balance loss, weight of the last expert


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    args = _arguments(argv)
    began = time.monotonic()
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(args.seed)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dims = Dims(hidden=256, n_layers=2, n_experts=4, n_active=2) if args.smoke else Dims()

    texts = corpus.gather(args.max_bytes, args.package_bytes)
    _say(began, f"{len(texts.train)} files to train on, {len(texts.held_out)} held out")
    tokenizer, stream, held_out = _tokens(texts, dims.vocab, args)
    tokenizer.save(str(out / "tokenizer.json"))
    np.save(out / "heldout.npy", held_out)
    _say(began, f"{len(stream)} training tokens")

    data = torch.from_numpy(stream.view(np.int16)).to(device)  # ids stay below 2^15
    windows = torch.from_numpy(held_out.astype(np.int64)).to(device)
    noise = torch.zeros((), device=device)
    network = Network(dims, torch.bfloat16, noise=noise)
    network.initialise(args.seed)
    network.to(device)
    step, how = _pick_step(network, data, args, began)
    log = _train(network, step, noise, data, windows, args, began)

    rounded = {name: value.to(torch.bfloat16) for name, value in network.state_dict().items()}
    _save_shards({name: value.cpu().contiguous() for name, value in rounded.items()}, out)
    exact = Network(dims).to(device)
    exact.load_state_dict(network.state_dict())
    loss_f32 = _measure(exact, windows)
    exact.load_state_dict({name: value.float() for name, value in rounded.items()})
    loss_bf16 = _measure(exact, windows)
    load = _expert_load(exact, windows)
    log |= {
        "dims": dims.to_dict(),
        "parameters": sum(p.numel() for p in network.parameters()),
        "execution": how,
        "arguments": {k: v for k, v in vars(args).items() if k != "out"},
        "held_out_loss": {"f32": loss_f32, "bf16": loss_bf16, "windows": list(held_out.shape), "unit": "nats a token"},
        "expert_load": load,
        "data": texts.record,
        "dropped_near_copies": texts.dropped_near_copies,
        "held_out_files": [s.path for s in texts.held_out],
        "tokens_in_corpus": len(stream),
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__},
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "sample": _sample(exact, tokenizer, device),
        "seconds_in_all": time.monotonic() - began,
    }
    (out / "train.json").write_text(json.dumps(log, indent=1) + "\n")
    _say(began, f"held-out loss {loss_f32:.4f} f32, {loss_bf16:.4f} bf16; lowest and highest load of an expert "
         f"{min(map(min, load)):.3f}, {max(map(max, load)):.3f}")  # fmt: skip
    print(log["sample"], file=sys.stderr)
    return 0


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m exactmoe.model.tiny.train", description="Train the tiny model.")
    parser.add_argument("--out", required=True, help="folder for weights, tokenizer, held-out tokens and log")
    parser.add_argument("--minutes", type=float, default=5.0, help="wall time of the training loop")
    parser.add_argument("--batch", type=int, default=64, help="windows a step")
    parser.add_argument("--span", type=int, default=1024, help="tokens a window")
    parser.add_argument("--windows", type=int, default=64, help="held-out windows of 512 tokens")
    parser.add_argument("--lr", type=float, default=1.5e-3, help="peak learning rate")
    parser.add_argument("--noise", type=float, default=1.5, help="final width of activation noise, in 8-bit steps")
    parser.add_argument("--balance", type=float, default=0.1, help="weight of the router's load-balancing loss")
    parser.add_argument("--tail", type=float, default=0.2, help="final penalty on the weight of the last expert")
    parser.add_argument("--max-bytes", type=int, default=180_000_000, help="most bytes of text to read")
    parser.add_argument("--package-bytes", type=int, default=12_000_000, help="most bytes of one package")
    parser.add_argument("--tokenizer-bytes", type=int, default=40_000_000, help="text that the tokenizer is trained on")
    parser.add_argument("--seed", type=int, default=20)
    parser.add_argument("--no-compile", action="store_true", help="do not try torch.compile")
    parser.add_argument("--smoke", action="store_true", help="a two-layer model, to try the script on a CPU")
    return parser.parse_args(argv)


def _tokens(texts: corpus.Corpus, vocab: int, args: argparse.Namespace) -> tuple[Tokenizer, np.ndarray, np.ndarray]:
    shuffled = list(texts.train)
    random.Random(args.seed).shuffle(shuffled)
    # The standard library, what is held out from, counts half of the tokenizer's text and is seen twice a pass.
    library = [s.text for s in shuffled if s.origin == "stdlib"]
    sample, size = [], 0
    for text in library + [s.text for s in shuffled if s.origin != "stdlib"]:
        size += len(text)
        if size > args.tokenizer_bytes:
            break
        sample.append(text)
    tokenizer = corpus.train_tokenizer(sample, vocab)
    everything = [s.text for s in shuffled] + library
    random.Random(args.seed + 1).shuffle(everything)
    held_out = corpus.encode(tokenizer, [s.text for s in texts.held_out])
    return tokenizer, corpus.encode(tokenizer, everything), corpus.held_out_windows(held_out, args.windows, 512)


def _batch(data: Tensor, args: argparse.Namespace) -> Tensor:
    start = torch.randint(0, len(data) - args.span - 1, (args.batch, 1), device=data.device)
    return data[start + torch.arange(args.span + 1, device=data.device)].long()


def _pick_step(network: Network, data: Tensor, args: argparse.Namespace, began: float) -> tuple[Step, str]:
    """The fastest way of running a step among those that work here and agree on the loss of one batch."""

    def make(module: Callable[[Tensor], Pass]) -> Step:
        def step(tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            logits, balance, _, ranked = module(tokens[:, :-1])
            last = ranked[..., network.dims.n_active - 1].mean()
            return functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()), balance, last

        return step

    tokens = _batch(data, args)
    found: list[tuple[float, float, str, str, Step]] = []
    plans = [("grouped", False), ("dense", False)]
    if data.is_cuda and not args.no_compile:
        plans += [("grouped", True)]
    for experts, compiled in plans:
        name = f"{experts} experts, {'torch.compile' if compiled else 'eager'}"
        try:
            network.set_experts(experts)
            step = make(torch.compile(network) if compiled else network)
            seconds, loss = math.inf, 0.0
            for trial in range(4):
                _wait(data)
                start = time.monotonic()
                value, balance, last = step(tokens)
                (value + args.balance * balance + args.tail * last).backward()
                network.zero_grad(set_to_none=True)
                loss = value.item()
                if trial:
                    seconds = min(seconds, time.monotonic() - start)
            found.append((seconds, loss, name, experts, step))
            _say(began, f"{name}: {1e3 * seconds:.1f} ms a step without the optimiser, loss {loss:.5f}")
        except Exception as error:  # any failure of a fast path only removes it from the choice
            network.zero_grad(set_to_none=True)
            _say(began, f"{name}: not usable: {type(error).__name__}: {str(error)[:300]}")
    agreed = [f for f in found if abs(f[1] - found[0][1]) < 0.02]
    _, _, name, experts, fastest = min(agreed, key=lambda f: f[0])
    network.set_experts(experts)
    return fastest, name


def _train(
    network: Network, step: Step, noise: Tensor, data: Tensor, windows: Tensor, args: argparse.Namespace, began: float
) -> dict[str, Any]:
    matrices = [p for p in network.parameters() if p.ndim > 1]
    vectors = [p for p in network.parameters() if p.ndim == 1]
    optimiser = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}],
        lr=args.lr, betas=(0.9, 0.95), eps=1e-8, fused=data.is_cuda,
    )  # fmt: skip
    budget = 60 * args.minutes
    curve: list[dict[str, float]] = []
    start = time.monotonic()
    steps, every, told = 0, 50, 0.0
    seen = torch.zeros(4, device=data.device)  # loss, balance and last weight of good steps, and how many were good
    while (elapsed := time.monotonic() - start) < budget:
        rate = args.lr * _schedule(steps, elapsed / budget)
        for group in optimiser.param_groups:
            group["lr"] = rate
        # Noise comes in as the rate goes down: at full rate it makes training diverge.
        ramp = min(1.0, max(0.0, (elapsed / budget - 0.25) / 0.4))
        noise.fill_(args.noise * ramp)
        loss, balance, last = step(_batch(data, args))
        (loss + args.balance * balance + args.tail * ramp * last).backward()
        good = torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0).isfinite()
        for p in network.parameters():
            if p.grad is not None:  # a step whose gradient is not finite does nothing
                p.grad.copy_(torch.where(good, p.grad, 0.0))
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        seen += torch.where(
            good, torch.stack((loss.detach(), balance.detach(), last.detach(), torch.ones_like(balance))), 0.0
        )
        steps += 1
        if steps % every == 0:
            mean = (seen / seen[3]).tolist()  # the only wait for the GPU, so the clock stays honest
            seen.zero_()
            if not math.isfinite(mean[0]):
                raise FloatingPointError(f"training loss is {mean[0]} at step {steps}")
            tokens = steps * args.batch * args.span
            curve.append({"step": steps, "seconds": round(time.monotonic() - start, 1), "loss": round(mean[0], 4),
                          "balance": round(mean[1], 4), "last": round(mean[2], 4), "lr": rate})  # fmt: skip
            if elapsed - told > 15:
                told = elapsed
                _say(
                    began,
                    f"step {steps}, {tokens / 1e6:.0f} M tokens, loss {mean[0]:.4f}, balance {mean[1]:.4f}, "
                    f"last weight {mean[2]:.4f}",
                )
    _wait(data)
    seconds = time.monotonic() - start
    thin = max(1, len(curve) // 100)
    return {
        "steps": steps,
        "tokens_seen": steps * args.batch * args.span,
        "training_seconds": seconds,
        "curve": curve[::thin] + curve[-1:],
        "held_out_loss_in_training_arithmetic": _measure(network, windows),
    }


def _schedule(steps: int, progress: float) -> float:
    """Linear warm-up over 200 steps, flat to 40% of the time, then a cosine down to 1%."""
    decay = max(0.0, min(1.0, (progress - 0.4) / 0.6))
    return min(1.0, (steps + 1) / 200) * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * decay)))


@torch.no_grad()
def _measure(network: Network, windows: Tensor) -> float:
    return float(np.mean([next_token_loss(network, part).item() for part in _parts(windows)]))


def _parts(windows: Tensor) -> tuple[Tensor, ...]:
    return torch.split(windows, 8)


@torch.no_grad()
def _expert_load(network: Network, windows: Tensor) -> list[list[float]]:
    load = torch.stack([network(part)[2] for part in _parts(windows)]).mean(0)
    return [[round(v, 4) for v in row] for row in load.tolist()]


@torch.no_grad()
def _sample(network: Network, tokenizer: Tokenizer, device: torch.device) -> str:
    ids = tokenizer.encode(SAMPLE_PROMPT, add_special_tokens=False).ids
    for _ in range(120):
        ids.append(int(network(torch.tensor([ids], device=device))[0][0, -1].argmax()))
    return tokenizer.decode(ids, skip_special_tokens=False)


def _save_shards(state: dict[str, Tensor], out: Path) -> None:
    shards: list[dict[str, Tensor]] = [{}]
    size = 0
    for name, value in state.items():
        length = value.numel() * value.element_size()
        if size + length > SHARD_BYTES:
            shards.append({})
            size = 0
        shards[-1][name] = value
        size += length
    for i, shard in enumerate(shards):
        save_file(shard, str(out / f"weights-{i}.safetensors"))


def _wait(data: Tensor) -> None:
    if data.is_cuda:
        torch.cuda.synchronize()


def _say(began: float, text: str) -> None:
    print(f"[{time.monotonic() - began:6.1f} s] {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    raise SystemExit(main())
