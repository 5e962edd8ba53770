"""Try other block sizes for the kernels of a decode step: the candidates that are right, fastest first.

    python -m exactmoe.bench.tune [NAME ...] [--activations q16_k] [--jobs N]

It changes no file: a line that wins here, and then in whole steps, goes into kernels/tiles.py by hand, with its run in
bench/NOTES.md. Every candidate is judged before it is timed, as every benchmark is. Compiling is what takes long, so N
processes do it first.

exit status: 0 every candidate that compiles is right, 1 one is wrong, 2 no such benchmark, 3 no CUDA device"""

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from itertools import product
from multiprocessing import get_context
from typing import Any, NamedTuple

import torch

from exactmoe.bench.cases import Bench, benches
from exactmoe.bench.clock import Times, copy_bandwidth, time_graph
from exactmoe.bench.run import calls_of
from exactmoe.kernels import tiles
from exactmoe.kernels.errors import InvalidInput, MissingEnvironment
from exactmoe.kernels.launch import resolve_device
from exactmoe.kernels.tensors import PROFILES
from exactmoe.kernels.tiles import DecodeAttentionTile, MatvecTile
from exactmoe.parity.bits import compare
from exactmoe.parity.cases import kernel_output, reference_output


def _matvec(
    rows: Sequence[int], tiles: Sequence[int], warps: Sequence[int], ahead: Sequence[int],
    programs: Sequence[int] = (1 << 20,),
) -> list[Any]:  # fmt: skip
    return [MatvecTile(*sizes) for sizes in product(rows, tiles, warps, ahead, programs)]


CANDIDATES: dict[str, tuple[str, list[Any]]] = {
    "qkv": ("matvec", _matvec((4, 8, 16), (3, 5), (4, 8), (8, 16))),
    "attn-output": ("matvec", _matvec((4, 8, 16), (1, 2), (4, 8, 16), (8, 16))),
    "lm-head": ("matvec", _matvec((4, 8), (2, 4, 8), (4, 8), (8,), (264, 396, 528))),
    "router": ("decode_router", [(e, w) for e in (1, 2) for w in (2, 4, 8, 16)]),
    "experts-up": ("experts_up", _matvec((4, 8, 16), (3, 6), (4, 8, 16), (8, 12))),
    "experts-down-q4_k": ("experts_down", _matvec((4, 8), (2, 4), (4, 8, 16), (6, 12))),
    "experts-down-q6_k": ("experts_down", _matvec((4, 8), (2, 4), (4, 8, 16), (6, 12))),
    "attention-64": ("decode_attention", [DecodeAttentionTile(64, 1, h, w) for h in (4, 8) for w in (4, 8)]),
    "attention-4096": (
        "decode_attention",
        [
            DecodeAttentionTile(k, p, h, w)
            for k, p, h, w in product((64, 128), (16, 32, 64), (4, 8), (4, 8))
            if k * p <= 4096
        ],
    ),
}
"""Of a benchmark: the function of kernels.tiles that its op asks, and what to answer."""


class Tried(NamedTuple):
    """What became of a candidate."""

    tile: Any
    equal: bool
    cold: Times | None = None
    why: str = ""


@contextmanager
def answering(function: str, tile: Any) -> Iterator[None]:
    """`kernels.tiles.<function>` gives `tile` whatever it is asked."""
    before = getattr(tiles, function)
    setattr(tiles, function, lambda *_: tile)
    try:
        yield
    finally:
        setattr(tiles, function, before)


def tune(bench: Bench, device: torch.device, function: str, candidates: Sequence[Any]) -> Iterator[Tried]:
    """Judge every candidate and time those that are right."""
    expected = reference_output(bench.case)
    calls: list[Callable[[], object]] = []
    for tile in candidates:
        with answering(function, tile):
            try:
                found = kernel_output(bench.case, device)
                equal = found.keys() == expected.keys() and all(compare(n, found[n], expected[n]).equal for n in found)
                calls = calls or list(calls_of(bench, bench.case.on(device)))
                yield Tried(tile, equal, time_graph(calls) if equal else None)
            except Exception as error:  # one that asks for too much of the device is no candidate
                yield Tried(tile, equal=True, why=f"{type(error).__name__}: {str(error).splitlines()[0][:90]}")


def _compile(task: tuple[str, str, str, Any]) -> None:
    """Have a candidate in the compiler's cache; whatever is wrong with it shows when it is tried."""
    name, profile, function, tile = task
    bench = benches(profile)[name]
    with answering(function, tile):
        try:
            next(iter(calls_of(bench, bench.case.on(resolve_device("cuda")))))()
        except Exception:
            return


def main(argv: list[str] | None = None) -> int:
    """Print a table a benchmark."""
    parser = argparse.ArgumentParser(prog="python -m exactmoe.bench.tune", description=__doc__.split("\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(CANDIDATES)} (default: all)")
    parser.add_argument("--activations", default="q8_k", choices=PROFILES, help="profile (default: q8_k)")
    parser.add_argument("--jobs", type=int, default=8, metavar="N", help="processes that compile (default: 8)")
    args = parser.parse_args(argv)
    try:
        unknown = [name for name in args.names if name not in CANDIDATES]
        if unknown:
            raise InvalidInput(f"nothing to tune in {', '.join(unknown)}; there is {', '.join(CANDIDATES)}")
        device = resolve_device("cuda")
    except InvalidInput as error:
        print(f"tune: error: {error}", file=sys.stderr)
        return 2
    except MissingEnvironment as error:
        print(f"tune: error: {error}", file=sys.stderr)
        return 3
    names = args.names or list(CANDIDATES)
    tasks = [(name, args.activations, *_pair(name, tile)) for name in names for tile in CANDIDATES[name][1]]
    with ProcessPoolExecutor(args.jobs, get_context("spawn")) as pool:
        list(pool.map(_compile, tasks))
    roof = copy_bandwidth(device)
    wrong = 0
    for name in names:
        bench = benches(args.activations)[name]
        tried = list(tune(bench, device, *CANDIDATES[name]))
        wrong += sum(not t.equal for t in tried)
        print("\n".join(table(bench, tried, roof)), flush=True)
    return 1 if wrong else 0


def _pair(name: str, tile: Any) -> tuple[str, Any]:
    return CANDIDATES[name][0], tile


def table(bench: Bench, tried: Sequence[Tried], copy_gb_s: float) -> Iterator[str]:
    """Lines on the candidates of a benchmark: the right ones by time, then those that are none."""
    yield f"{bench.name}: {sum(t.cold is not None for t in tried)} of {len(tried)} timed"
    for t in sorted((t for t in tried if t.cold is not None), key=lambda t: t.cold.median if t.cold else 0.0):
        assert t.cold is not None
        gb_s = bench.weight_bytes / t.cold.median / 1000
        yield f"  {t.cold.median:9.2f} us {t.cold.p10:9.2f} {t.cold.p90:9.2f} {100 * gb_s / copy_gb_s:6.1f}%  {t.tile}"
    for t in tried:
        if t.cold is None:
            yield f"  {'WRONG: not the bits of the reference' if not t.equal else t.why}  {t.tile}"


if __name__ == "__main__":
    sys.exit(main())
