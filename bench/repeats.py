"""One decode step again and again: every repeat must leave the same bits.

A race, or memory that is read before it is written, may show only once in a while. So what lies behind the context is
poisoned before every repeat, and what a step leaves is hashed: its logits, the token it chooses, and what it appends
to the cache in every layer."""

from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

from exactmoe.bench.step import FIRST, poison, prepare
from exactmoe.kernels.errors import require
from exactmoe.model.weights import Model
from exactmoe.parity.bits import digest


def repeats(
    model: Model, context: int, times: int, progress: Callable[[Iterable[int]], Iterable[int]] | None = None
) -> Counter[str]:
    """Digests of `times` steps after the same `context` made-up positions, and how often each came.

    `progress` is given the numbers of the repeats, and gives them on."""
    require(times > 1, f"one step is no repeat: at least 2, got {times}")
    require(context >= 0, f"a context has 0 positions or more, got {context}")
    sequence = prepare(model, context, 1)
    decoder, cache = sequence.decoder, sequence.cache
    seen: Counter[str] = Counter()
    for _ in progress(range(times)) if progress else range(times):
        poison(cache, context)
        decoder.token.fill_(FIRST)
        decoder.step()
        left = {
            "logits": decoder.logits, "token": decoder.token,
            "k": cache.k[:, context], "k_scale": cache.k_scale[:, context],
            "v": cache.v[:, context], "v_scale": cache.v_scale[:, context],
        }  # fmt: skip
        seen[digest([(name, part.cpu().numpy()) for name, part in left.items()])] += 1
    return seen


def to_dict(seen: Counter[str], context: int, profile: str) -> dict[str, Any]:
    """As JSON has it."""
    digests = dict(seen.most_common())
    return {"context": context, "activations": profile, "repeats": seen.total(), "digests": digests}
