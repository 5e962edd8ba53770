"""The decode step of a model after a context: its tokens and its speed.

prepare(model, context)             a sequence whose cache holds `context` positions of made-up keys and values
follow(sequence)                    the tokens it goes on with, and the logits behind each
time_run(sequence)                  microseconds a token, of one run of its steps one after another
time_steps(sequence)                the same of some runs"""

from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from exactmoe.bench.clock import Sampler, sample
from exactmoe.kernels.errors import MissingEnvironment

if TYPE_CHECKING:
    from exactmoe.model.cache import KVCache
    from exactmoe.model.decode import Decoder
    from exactmoe.model.weights import Model

TOKENS = 128  # of a run, greedy
RUNS = 5
FIRST = 1  # the token that follows the context


class Sequence(NamedTuple):
    """A sequence that is `steps` tokens short of its end."""

    decoder: "Decoder"
    cache: "KVCache"
    context: int
    steps: int


def prepare(model: "Model", context: int, steps: int = TOKENS) -> Sequence:
    """A sequence after `context` positions, with room for `steps` more, which hold poison."""
    from exactmoe.model.forward import decoder_of

    cache = poisoned(model, context + steps)
    n = context * cache.k[0, 0].numel()
    index = torch.arange(n, device=model.device)
    for i in range(model.config.n_layers if context else 0):
        mixed = (index + 2 * i * n) * 2654435761 >> 7  # integers alone, so that every machine makes the same
        cache.k[i, :context] = (mixed % 32513 - 16256).view_as(cache.k[i, :context])
        mixed = (index + (2 * i + 1) * n) * 2654435761 >> 7
        cache.v[i, :context] = (mixed % 16385 - 8192).view_as(cache.v[i, :context])
    at = torch.arange(context, device=model.device)[None, :, None]
    cache.k_scale[:, :context] = (8 + at % 8) / (8 * 16256)
    cache.v_scale[:, :context] = torch.exp2(-13.0 - at % 3)
    cache.length = context
    return Sequence(decoder_of(model, cache), cache, context, steps)


def poisoned(model: "Model", positions: int) -> "KVCache":
    """An empty cache, in which reading what was not written shows."""
    from exactmoe.model.cache import KVCache

    cache = KVCache.allocate(model, positions)
    poison(cache, 0)
    return cache


def poison(cache: "KVCache", length: int) -> None:
    """Cut a cache to `length` positions; reading one behind them shows."""
    for part in (cache.k, cache.v):
        part[:, length:] = -1
    for part in (cache.k_scale, cache.v_scale):
        part[:, length:] = float("nan")
    cache.length = length


def follow(sequence: Sequence) -> tuple[Tensor, Tensor]:
    """Tokens [steps + 1] i32, FIRST and those chosen, on the device, and logits [steps, V] on the host."""
    _rewind(sequence)
    decoder = sequence.decoder
    tokens, logits = [decoder.token.clone()], []
    for _ in range(sequence.steps):
        decoder.step()
        tokens.append(decoder.token.clone())
        logits.append(decoder.logits.cpu().clone())
    return torch.cat(tokens), torch.stack(logits)


def time_run(sequence: Sequence) -> float:
    """Microseconds a token of one run; the first one may capture graphs. Raises MissingEnvironment without a CUDA
    device."""
    return _time(sequence, 1, 0, sample)[0]


def time_steps(sequence: Sequence, runs: int = RUNS, sampler: Sampler = sample) -> list[float]:
    """Microseconds a token of `runs` runs behind a first. Raises as `time_run`."""
    return _time(sequence, runs, 1, sampler)


def _time(sequence: Sequence, runs: int, warmup: int, sampler: Sampler) -> list[float]:
    require_cuda(sequence.cache.k.device)
    return sampler(partial(_rewind, sequence), partial(_run, sequence), runs, warmup, sequence.steps)


def _run(sequence: Sequence) -> None:
    for _ in range(sequence.steps):
        sequence.decoder.step()


def _rewind(sequence: Sequence) -> None:
    sequence.cache.length = sequence.context
    sequence.decoder.token.fill_(FIRST)


def require_cuda(device: torch.device) -> None:
    """Raise MissingEnvironment on any other device."""
    if device.type != "cuda":
        raise MissingEnvironment("a model is timed on a CUDA device: what the interpreter takes says nothing")
