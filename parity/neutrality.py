"""Tracing changes nothing: production beside a traced run, and production in a process that cannot trace.

    check_neutrality(file, tokens, steps) -> Neutrality

The same prompt and greedy steps run in production and traced: logits, KV cache and chosen ids must be equal bit for
bit. Then production runs again, here, after tracing, and in a fresh process in which importing any tracing module
fails: both must launch the same kernels in the same order, with the same grids and constants, of the same binaries, and
give the same bits. In the interpreter there are no binaries; a kernel's source text stands for its binary there, and
kernels/ptx_lock holds what the compiler makes of it."""

import hashlib
import inspect
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import TYPE_CHECKING, Any, NamedTuple

from exactmoe.kernels.errors import MissingEnvironment, require
from exactmoe.parity.bits import Array, Comparison, compare, digest

if TYPE_CHECKING:
    from exactmoe.model.gguf.reader import GGUFFile
    from exactmoe.model.weights import Model

TRACING = ("exactmoe.model.traced", "exactmoe.model.plan", "exactmoe.parity.trace", "exactmoe.parity.steps")
"""Modules of which production must know nothing, with all below them."""


class Launch(NamedTuple):
    """One kernel launch."""

    kernel: str
    grid: tuple[int, ...]
    constants: str  # constexprs and options
    binary: str  # SHA-256 of the cubin; of the source text in the interpreter

    def __str__(self) -> str:
        return f"{self.kernel}{list(self.grid)} {self.binary[:12]} {self.constants}"


class Production(NamedTuple):
    """A production run: what it launched, and what came out."""

    launches: tuple[Launch, ...]
    tokens: tuple[int, ...]  # chosen
    digest: str  # of the logits and the cache


@dataclass(frozen=True)
class Neutrality:
    """What was compared; `neutral` is the verdict."""

    comparisons: tuple[Comparison, ...]  # production and traced: logits, cache, ids
    here: Production  # with tracing loaded and used
    alone: Production  # in a process that cannot trace

    @property
    def first_launch_apart(self) -> int | None:
        """Index of the first launch that is not the same in both processes."""
        a, b = self.here.launches, self.alone.launches
        apart = next((i for i, pair in enumerate(zip(a, b, strict=False)) if pair[0] != pair[1]), None)
        return apart if apart is not None or len(a) == len(b) else min(len(a), len(b))

    @property
    def neutral(self) -> bool:
        """Everything was compared, and nothing differs."""
        return (
            bool(self.comparisons)
            and all(c.equal for c in self.comparisons)
            and len(self.here.launches) > 0
            and self.first_launch_apart is None
            and (self.here.tokens, self.here.digest) == (self.alone.tokens, self.alone.digest)
        )

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        return {
            "neutral": self.neutral,
            "comparisons": [{"name": c.name, "equal": c.equal, "text": str(c)} for c in self.comparisons],
            "launches": len(self.here.launches),
            "kernels": sorted({launch.kernel for launch in self.here.launches}),
            "binaries": len({launch.binary for launch in self.here.launches}),
            "first_launch_apart": self.first_launch_apart,
            "tokens": list(self.here.tokens),
            "digests": [self.here.digest, self.alone.digest],
        }


def check_neutrality(
    file: "GGUFFile", tokens: Sequence[int], steps: int = 4, profile: str = "q8_k", device: str = "auto"
) -> Neutrality:
    """Run and compare. Raises InvalidInput for tokens the model cannot take, MissingEnvironment without `device`."""
    from exactmoe.kernels.launch import resolve_device

    place = resolve_device(device)
    require(len(tokens) > 0, "the prompt is empty: nothing would be compared")
    from exactmoe.model.weights import load_model

    model = load_model(file, place, profile)
    comparisons = _against_traced(model, tokens, steps)
    here = run_production(model, tokens, steps)
    return Neutrality(tuple(comparisons), here, _in_a_process_that_cannot_trace(file, tokens, steps, profile, device))


def run_production(model: "Model", tokens: Sequence[int], steps: int) -> Production:
    """Prompt and greedy steps through the production path, every launch recorded."""
    launches: list[Launch] = []
    with recorded(launches):
        logits, chosen, cache = _production(model, tokens, steps)
    parts = [(f"logits {i}", values) for i, values in enumerate(logits)]
    return Production(tuple(launches), tuple(chosen), digest([*parts, *_cache_parts(cache)]))


def _production(model: "Model", tokens: Sequence[int], steps: int) -> tuple[list[Array], list[int], Any]:
    from exactmoe.kernels.argmax import argmax
    from exactmoe.model.cache import KVCache
    from exactmoe.model.forward import forward

    cache = KVCache.allocate(model, len(tokens) + steps)
    logits, chosen, part = [], [], list(tokens)
    for _ in range(steps + 1):
        row = forward(model, cache, part)
        part = [int(argmax(row[None])[0])]
        logits.append(row.cpu().numpy())
        chosen += part
    return logits, chosen, cache


def _against_traced(model: "Model", tokens: Sequence[int], steps: int) -> Iterator[Comparison]:
    import numpy as np

    from exactmoe.kernels.argmax import argmax
    from exactmoe.model.cache import KVCache
    from exactmoe.model.traced import forward_traced

    logits, chosen, cache = _production(model, tokens, steps)
    traced = KVCache.allocate(model, len(tokens) + steps)
    part, ids = list(tokens), []
    for i, row in enumerate(logits):
        found = forward_traced(model, traced, part).logits[-1]
        yield compare("logits, prompt" if i == 0 else f"logits, step {i}", row, found.cpu().numpy())
        part = [int(argmax(found[None].contiguous())[0])]
        ids += part
    yield compare("chosen ids", np.array(chosen, np.int32), np.array(ids, np.int32))
    for (name, left), (_, right) in zip(_cache_parts(cache), _cache_parts(traced), strict=True):
        yield compare(name, left, right)


def _cache_parts(cache: Any) -> Iterator[tuple[str, Array]]:
    for name in ("k", "k_scale", "v", "v_scale"):
        yield f"cache {name}", getattr(cache, name)[:, : cache.length].cpu().numpy()


@contextmanager
def recorded(launches: list[Launch]) -> Iterator[None]:
    """Append every kernel launch of this process to `launches`."""
    from exactmoe.kernels.launch import interpreting

    owner, name, wrap = _interpreter_hook() if interpreting() else _compiler_hook()
    original = getattr(owner, name)
    setattr(owner, name, wrap(original, launches))
    try:
        yield
    finally:
        setattr(owner, name, original)


def _interpreter_hook() -> tuple[Any, str, Any]:
    from triton.runtime.interpreter import GridExecutor

    def wrap(original: Any, launches: list[Launch]) -> Any:
        def call(self: Any, *args: Any, **kwargs: Any) -> Any:
            names = set(inspect.signature(self.fn).parameters)
            grid = tuple(self.grid) if not callable(self.grid) else ()
            source = hashlib.sha256(inspect.getsource(self.fn).encode()).hexdigest()
            constants = {k: v for k, v in kwargs.items() if k in names or k == "num_warps"}
            launches.append(Launch(self.fn.__name__, grid, _text(constants), source))
            return original(self, *args, **kwargs)

        return call

    return GridExecutor, "__call__", wrap


def _compiler_hook() -> tuple[Any, str, Any]:
    from triton.runtime.jit import JITFunction

    def wrap(original: Any, launches: list[Launch]) -> Any:
        def run(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
            kernel = original(self, *args, grid=grid, warmup=warmup, **options)
            binary = hashlib.sha256(kernel.asm["cubin"]).hexdigest()
            launches.append(Launch(self.__name__, tuple(grid), _text(options), binary))
            return kernel

        return run

    return JITFunction, "run", wrap


def _text(constants: dict[str, Any]) -> str:
    return " ".join(f"{name}={value}" for name, value in sorted(constants.items()))


class _NoTracing(MetaPathFinder):
    """Makes importing a tracing module an error."""

    def find_spec(self, name: str, path: Any = None, target: ModuleType | None = None) -> ModuleSpec | None:  # noqa: ARG002
        if any(name == module or name.startswith(f"{module}.") for module in TRACING):
            raise ImportError(f"{name} was imported in a process that must not trace")
        return None


def _in_a_process_that_cannot_trace(
    file: "GGUFFile", tokens: Sequence[int], steps: int, profile: str, device: str
) -> Production:
    asked = {"model": os.path.abspath(file.path), "tokens": list(tokens), "steps": steps, "profile": profile,
             "device": device}  # fmt: skip
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    done = subprocess.run(
        [sys.executable, "-m", "exactmoe.parity.neutrality"], input=json.dumps(asked), env=env, text=True,
        capture_output=True, check=False,
    )  # fmt: skip
    if done.returncode:
        raise MissingEnvironment(f"the process without tracing failed: {done.stderr.strip()[-600:]}")
    found = json.loads(done.stdout.splitlines()[-1])
    launches = tuple(Launch(k, tuple(g), c, b) for k, g, c, b in found["launches"])
    return Production(launches, tuple(found["tokens"]), found["digest"])


def main() -> None:
    """The process that cannot trace: reads what to run from stdin, prints what it launched."""
    sys.meta_path.insert(0, _NoTracing())
    asked = json.load(sys.stdin)
    from exactmoe.kernels.launch import resolve_device

    place = resolve_device(asked["device"])
    from exactmoe.model.weights import load_model

    model = load_model(asked["model"], place, asked["profile"])
    found = run_production(model, asked["tokens"], asked["steps"])
    print(json.dumps(found._asdict()))


if __name__ == "__main__":
    main()
