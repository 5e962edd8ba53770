"""What a decode step does, counted without a GPU: its launches, and the bytes that their arguments make it read.

    python -m exactmoe.bench.proxies             the counts, kernel by kernel
    python -m exactmoe.bench.proxies --check     compare with bench/proxies.lock.json
    python -m exactmoe.bench.proxies --update    write it anew, after a change that was meant

The step is that of Qwen3-30B-A3B, 48 layers of the Q4_K_M mix, at empty context. Every kernel is launched as production
launches it, on memory that is never touched. Each distinct byte of an argument counts once a launch: of an expert's
weights those of the chosen experts, of the embedding one row, of the cache the positions so far."""

import argparse
import json
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from triton.runtime.jit import JITFunction

from exactmoe.kernels.errors import InvalidInput, MissingEnvironment, require
from exactmoe.kernels.formats import EXECUTABLE
from exactmoe.kernels.launch import interpreting
from exactmoe.kernels.matvec import Norm
from exactmoe.kernels.packed import PackedMatrix, pack
from exactmoe.kernels.router import RouterWeight
from exactmoe.kernels.tensors import QuantMatrix, quant_matrix
from exactmoe.model.cache import KVCache
from exactmoe.model.config import Config, expected_tensors
from exactmoe.model.decode import Decoder
from exactmoe.model.packed import PackedLayer, PackedWeights
from exactmoe.model.synth import LIKES
from exactmoe.model.type_mix import q4_k_m
from exactmoe.model.weights import Model

PATH = Path(__file__).with_name("proxies.lock.json")
LIKE = "qwen3-coder-30b-a3b"
_CHOSEN = ("_experts_up_kernel", "_experts_down_kernel")
POSITIONS = 256  # of the cache: more than one tile of keys
_AT_A_POSITION = ("_decode_scores_kernel", "_decode_values_kernel")


class Step(NamedTuple):
    """A decode step, counted."""

    launches: dict[str, int]  # by kernel
    launches_a_layer: float
    bytes_read: dict[str, int]  # by kernel: weights, cache and activations that its arguments hold
    weight_minimum: int  # bytes of weights that any decode step of this model reads

    @property
    def share(self) -> float:
        """The minimum as a share of what is read; 1 would be a step that reads nothing but weights, each once."""
        return self.weight_minimum / sum(self.bytes_read.values())


def count_step(profile: str = "q8_k") -> Step:
    """Count a step. Raises MissingEnvironment in the interpreter, whose launches are not those of a GPU."""
    if interpreting():
        raise MissingEnvironment("TRITON_INTERPRET=1 is set: production launches other tiles there; unset it to count")
    config = LIKES[LIKE].config
    model = _model(config, profile)
    decoder = Decoder(model, KVCache.allocate(model, POSITIONS))
    launches: Counter[str] = Counter()
    read: Counter[str] = Counter()

    def run(self: JITFunction[Any], *args: Any, **_options: Any) -> None:
        launches[self.__name__] += 1
        # What is only fetched ahead is counted where it is read.
        own = (a for name, a in zip(self.arg_names, args, strict=False) if not name.startswith("later"))
        distinct = {a.data_ptr(): a for a in own if isinstance(a, torch.Tensor)}
        read[self.__name__] += _bytes(self.__name__, list(distinct.values()), config)

    with _replaced(run):
        decoder._run(POSITIONS)  # noqa: SLF001 - what a GPU replays as a graph
    outside = sum(launches.values()) - config.n_layers * (sum(launches.values()) // config.n_layers)
    return Step(
        dict(sorted(launches.items())), (sum(launches.values()) - outside) / config.n_layers,
        dict(sorted(read.items())), _minimum(config),
    )  # fmt: skip


def _bytes(kernel: str, tensors: list[torch.Tensor], config: Config) -> int:
    """Bytes that a launch's arguments make it touch."""
    total = 0
    for tensor in tensors:
        size = tensor.numel() * tensor.element_size()
        if kernel in _CHOSEN and size > 2**20:  # experts' weights; activations are far smaller
            size = size // config.n_experts * config.n_active
        elif kernel == "_embed_kernel" and size > 2**20:
            size //= config.vocab
        elif kernel in _AT_A_POSITION and tensor.ndim > 1 and tensor.shape[0] == POSITIONS:
            size //= POSITIONS  # one position of the cache and of the rope table
        total += size
    return total


def _minimum(config: Config) -> int:
    total = 0
    for want in expected_tensors(config):
        type_name = q4_k_m(want.name, config.n_layers)
        count = 1
        for dim in want.shape:
            count *= dim
        size = 4 * count if type_name == "F32" else count // 256 * EXECUTABLE[type_name].block_bytes
        if want.name.endswith("_exps.weight"):
            size = size // config.n_experts * config.n_active
        total += size // config.vocab if want.name == "token_embd.weight" else size
    return total


def _model(c: Config, profile: str) -> Model:
    """The model on memory that is reserved and never touched."""

    def matrix(name: str, k: int, *rows: int) -> QuantMatrix:
        fmt = EXECUTABLE[q4_k_m(name, c.n_layers)]
        if fmt.head_bytes:  # as `quant_matrix`, which would touch every byte
            sizes = fmt.data_bytes, fmt.head_bytes
            codes, heads = (torch.empty(*rows, k // 256 * size, dtype=torch.uint8) for size in sizes)
            return QuantMatrix(codes, fmt, rows[-1], k, heads)
        return quant_matrix(torch.empty(*rows, k // 256 * fmt.block_bytes, dtype=torch.uint8), fmt, name)

    def planes(weight: QuantMatrix) -> PackedMatrix:
        """As `pack`, which would touch every byte of a Q6_K matrix."""
        if weight.heads is not None:
            return pack(weight)
        rows, blocks = weight.data.numel() // weight.data.shape[-1], weight.k // 256
        words, high, scales = (torch.empty(rows, blocks * n, dtype=torch.int32) for n in (32, 16, 4))
        d = torch.empty(rows, blocks, dtype=torch.float16)
        return PackedMatrix(words, high, scales, d, weight.format, weight.n, weight.k, rows // weight.n)

    def norm(width: int) -> Norm:
        return Norm(torch.empty(width), float(c.eps))

    D, C, E, F = c.hidden, c.head_dim, c.n_experts, c.expert_width

    def layer(i: int) -> PackedLayer:
        b = f"blk.{i}."
        qk, v = (c.n_heads + c.n_kv_heads) * C, c.n_kv_heads * C
        together = q4_k_m(b + "attn_v.weight", c.n_layers) == "Q4_K"
        names = [("attn_q.weight", qk + v)] if together else [("attn_q.weight", qk), ("attn_v.weight", v)]
        return PackedLayer(
            norm(D), tuple(planes(matrix(b + name, D, n)) for name, n in names), norm(C), norm(C),
            planes(matrix(b + "attn_output.weight", c.n_heads * C, D)), norm(D),
            RouterWeight(torch.empty(E, D, dtype=torch.int32), torch.empty(E)),
            planes(matrix(b + "ffn_gate_exps.weight", D, E, F)), planes(matrix(b + "ffn_up_exps.weight", D, E, F)),
            planes(matrix(b + "ffn_down_exps.weight", F, E, D)),
        )  # fmt: skip

    output = matrix("output.weight", D, c.vocab)
    packed = PackedWeights(tuple(layer(i) for i in range(c.n_layers)), norm(D), planes(output))
    return Model(
        c, profile, torch.device("cpu"), matrix("token_embd.weight", D, c.vocab), (), torch.empty(D), output, packed
    )


@contextmanager
def _replaced(run: Any) -> Iterator[None]:
    original = JITFunction.run
    JITFunction.run = run
    try:
        yield
    finally:
        JITFunction.run = original


def differences(locked: dict[str, Any], found: dict[str, Any]) -> list[str]:
    """A line for each count that is not as locked."""
    lines = []
    for name in sorted(locked.keys() | found.keys()):
        before, after = locked.get(name), found.get(name)
        if isinstance(before, dict) and isinstance(after, dict):
            lines += [f"{name} {line}" for line in differences(before, after)]
        elif before != after:
            lines.append(f"{name}: {before} -> {after}")
    return lines


def read_lock(path: Path = PATH) -> dict[str, Any]:
    """The counts in the repository; raises InvalidInput where they are missing or none."""
    try:
        held = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InvalidInput(f"{path}: no counts can be read: {error}; --update writes them") from error
    require(isinstance(held, dict) and bool(held.get("launches")), f"{path}: holds no counts")
    return dict(held)


def main(argv: list[str] | None = None) -> int:
    """Exit status: 0 as locked or printed, 1 not as locked, 2 no lock, 3 nothing can be counted here."""
    parser = argparse.ArgumentParser(prog="python -m exactmoe.bench.proxies", description=__doc__.split("\n")[0])
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--check", action="store_true", help="compare with the lock")
    what.add_argument("--update", action="store_true", help="write the lock anew")
    args = parser.parse_args(argv)
    try:
        locked = read_lock() if args.check else None
        step = count_step()
    except InvalidInput as error:
        print(f"proxies: error: {error}", file=sys.stderr)
        return 2
    except MissingEnvironment as error:
        print(f"proxies: error: {error}", file=sys.stderr)
        return 3
    if locked is not None:
        lines = differences(locked, step._asdict())
        print("\n".join([*lines, f"{len(lines)} counts not as locked"]))
        return 1 if lines else 0
    if args.update:
        PATH.write_text(json.dumps(step._asdict(), indent=1) + "\n", encoding="utf-8")
    for kernel, count in step.launches.items():
        print(f"{kernel:28} {count:5} launches {step.bytes_read[kernel]:15,} bytes")
    print(f"{step.launches_a_layer:.0f} launches a layer, {sum(step.launches.values())} a step")
    print(f"{sum(step.bytes_read.values()):,} bytes, of which {step.weight_minimum:,} must be: {step.share:.1%}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
