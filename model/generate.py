"""Greedy decoding: the prompt once, then one token at a time, each the argmax of the logits before it.

The loop knows nothing of backends: it asks a `NextToken` for the token that follows what it is given. Kernels are
imported when `generate` is called, so that the loop serves the reference too, without them."""

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Protocol

from exactmoe.kernels.errors import require

if TYPE_CHECKING:
    from exactmoe.model.weights import Model

_UNFINISHED = "\ufffd"  # what decoders write for bytes that are not, or not yet, a character


class NextToken(Protocol):
    """Runs tokens after all those it ran before, and returns the id the model chooses next."""

    def __call__(self, tokens: Sequence[int], /) -> int: ...


def generate(model: "Model", tokens: Sequence[int], max_new: int, stop: Collection[int] = ()) -> Iterator[int]:
    """Ids that follow `tokens` under `model`, at most `max_new`; ends before an id in `stop`.

    Raises InvalidInput, when called, for a prompt `require_prompt` refuses."""
    from exactmoe.kernels.argmax import argmax
    from exactmoe.model.cache import KVCache
    from exactmoe.model.forward import decoder_of, prefill

    require(max_new > 0, f"the number of new tokens must be positive, got {max_new}")
    require_prompt(tokens, max_new, model.config.vocab, model.config.context_length)
    cache = KVCache.allocate(model, len(tokens) + max_new)
    decoder = decoder_of(model, cache)

    def next_token(chunk: Sequence[int]) -> int:
        if len(chunk) == 1 and cache.length:
            decoder.step()  # the token that it, or the prompt's end, has put on the device
        else:
            decoder.token.copy_(argmax(prefill(model, cache, chunk)[None]))
        return int(decoder.token[0])

    return greedy(next_token, tokens, max_new, stop)


def greedy(next_token: NextToken, tokens: Sequence[int], max_new: int, stop: Collection[int] = ()) -> Iterator[int]:
    """The loop: yields an id as soon as it is chosen, and runs it only when the one after it is asked for."""
    chunk = tokens
    for _ in range(max_new):
        chosen = next_token(chunk)
        if chosen in stop:
            return
        yield chosen
        chunk = [chosen]


def require_prompt(tokens: Sequence[int], more: int, vocab: int, context: int) -> None:
    """Refuse an empty prompt, an id outside 0..vocab-1, and one that with `more` tokens exceeds `context` positions."""
    require(len(tokens) > 0, "the prompt is empty: no token to run")
    bad = next((t for t in tokens if not 0 <= t < vocab), None)
    require(bad is None, f"token id {bad} is outside the vocabulary of {vocab}")
    needed = len(tokens) + more
    after = f" and {more} after it" if more else ""
    require(needed <= context, f"a prompt of {len(tokens)} tokens{after} exceeds the context of {context} positions")


def text_pieces(decode: Callable[[list[int]], str], ids: Iterable[int]) -> Iterator[str]:
    """The text of `ids`, as soon as it is certain: a character whose bytes lie in several tokens waits for the last."""
    pending: list[int] = []
    sent = 0  # characters of the pending ids' text that are out already
    for i in ids:
        pending.append(i)
        text = decode(pending)
        certain = text.removesuffix(_UNFINISHED)  # an unfinished character decodes to one of these, at the end
        if len(certain) > sent:
            yield certain[sent:]
            sent = len(certain)
        if certain == text:
            pending, sent = [], 0
    if pending:
        yield decode(pending)[sent:]
