"""`exactmoe generate`: continue a text, greedily."""

import argparse
import sys
import time
from collections.abc import Collection, Iterator, Sequence
from typing import TYPE_CHECKING

from exactmoe.cli import options, progress

if TYPE_CHECKING:
    from exactmoe.model.gguf.reader import GGUFFile

HELP = "continue a text, the likeliest token each time"
EXAMPLES = """examples:
  exactmoe generate model.gguf -p 'def main():'
  exactmoe generate model.gguf -p 'import ' -n 16 --backend reference

The prompt goes to the model as it is: no chat template is applied.
exit status: 0 done, 2 the file, prompt or arguments are refused, 3 no CUDA device where one was demanded
"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("model", metavar="MODEL", help="GGUF file")
    parser.add_argument("-p", "--prompt", required=True, metavar="TEXT", help="the text to continue")
    parser.add_argument(
        "-n", type=options.positive, default=64, metavar="N", dest="max_new", help="at most N tokens (default: 64)"
    )
    options.add_backend(parser)
    options.add_activations(parser)


def run(args: argparse.Namespace) -> int:
    """Print the continuation as it comes, then the speed on stderr."""
    options.require_backend(args)
    if args.backend == "triton":
        from exactmoe.kernels.launch import resolve_device

        resolve_device(args.device)
    file, config = options.open_model(args.model)
    from exactmoe.model.generate import text_pieces
    from exactmoe.model.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(file)
    tokens = tokenizer.encode(args.prompt, add_special_tokens=False).ids
    options.require_prompt(tokens, args.max_new, config)
    eos = file.metadata.get("tokenizer.ggml.eos_token_id")
    stop = {eos} if isinstance(eos, int) else set()
    start = _triton if args.backend == "triton" else _reference
    ids = start(args, file, tokens, stop)

    def decode(some: list[int]) -> str:
        text: str = tokenizer.decode(some, skip_special_tokens=False)
        return text

    moments = [time.perf_counter()]
    for piece in text_pieces(decode, _timed(ids, moments)):
        print(piece, end="", flush=True)
    print(flush=True)
    print(_speed(len(tokens), moments[: args.max_new + 1]), file=sys.stderr)
    return 0


def _timed(ids: Iterator[int], moments: list[float]) -> Iterator[int]:
    """The same ids; notes when each came, and when it was known that none follows."""
    for i in ids:
        moments.append(time.perf_counter())
        yield i
    moments.append(time.perf_counter())


def _speed(n_prompt: int, moments: list[float]) -> str:
    """Tokens per second from the moments of the start, of the end of prefill, and of the end of each decode step."""
    seconds = moments[1] - moments[0]
    text = f"prefill: {n_prompt} tokens in {seconds:.2f} s, {n_prompt / seconds:.1f} tokens/s (first use included)"
    steps, seconds = len(moments) - 2, moments[-1] - moments[1]
    return f"{text}; decode: {steps} tokens in {seconds:.2f} s, {steps / seconds:.1f} tokens/s" if steps else text


def _triton(args: argparse.Namespace, file: "GGUFFile", tokens: Sequence[int], stop: Collection[int]) -> Iterator[int]:
    from exactmoe.kernels.launch import resolve_device

    device = resolve_device(args.device)
    from exactmoe.model.generate import generate
    from exactmoe.model.weights import load_model

    with progress.transfer("loading") as tell:
        model = load_model(file, device, args.activations, len(tokens) + args.max_new, tell)
    return generate(model, tokens, args.max_new, stop)


def _reference(
    args: argparse.Namespace, file: "GGUFFile", tokens: Sequence[int], stop: Collection[int]
) -> Iterator[int]:
    from exactmoe.model.generate import greedy
    from exactmoe.parity.load import reference_weights
    from exactmoe.parity.reference.argmax import argmax
    from exactmoe.parity.reference.forward import forward
    from exactmoe.parity.reference.kv_cache import KVCache

    weights = reference_weights(file)
    cache = KVCache.allocate(weights.dims, len(tokens) + args.max_new)

    def next_token(chunk: Sequence[int]) -> int:
        return int(argmax(forward(weights, cache, chunk, args.activations)[None])[0])

    return greedy(next_token, tokens, args.max_new, stop)
