"""`exactmoe logits`: the logits of a prompt, as a .npy file."""

import argparse
from typing import TYPE_CHECKING

from exactmoe.cli import options, progress

if TYPE_CHECKING:
    from exactmoe.model.gguf.reader import GGUFFile
    from exactmoe.parity.bits import Array

HELP = "write the logits of a prompt to a .npy file"
EXAMPLES = """examples:
  exactmoe logits model.gguf --tokens 1,2,3 --backend triton -o last.npy
  exactmoe logits model.gguf --tokens 1,2,3 --backend reference --all-positions -o all.npy

exit status: 0 written, 2 the file, tokens or arguments are refused, 3 no CUDA device where one was demanded
"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("model", metavar="MODEL", help="GGUF file")
    parser.add_argument("--tokens", type=options.token_ids, required=True, metavar="1,2,3", help="the prompt, as ids")
    options.add_backend(parser, required=True)
    parser.add_argument(
        "--all-positions", action="store_true", help="logits of every position [T, V], not of the last only [V]"
    )
    options.add_activations(parser)
    parser.add_argument("-o", "--output", required=True, metavar="OUT.npy", help="f32 array to write")


def run(args: argparse.Namespace) -> int:
    """Write the file; 0 when it is there."""
    options.require_backend(args)
    options.require_writable(args.output)
    if args.backend == "triton":
        from exactmoe.kernels.launch import resolve_device

        resolve_device(args.device)
    file, config = options.open_model(args.model)
    options.require_prompt(args.tokens, 0, config)
    compute = _triton if args.backend == "triton" else _reference
    logits = compute(args, file)
    import numpy as np

    with options.whole_file(args.output) as out:
        np.save(out, logits, allow_pickle=False)
    print(f"{args.output}: {logits.dtype} {list(logits.shape)}")
    return 0


def _triton(args: argparse.Namespace, file: "GGUFFile") -> "Array":
    from exactmoe.kernels.launch import resolve_device

    device = resolve_device(args.device)
    from exactmoe.model.cache import KVCache
    from exactmoe.model.forward import prefill
    from exactmoe.model.weights import load_model

    with progress.transfer("loading") as tell:
        model = load_model(file, device, args.activations, len(args.tokens), tell)
    cache = KVCache.allocate(model, len(args.tokens))
    array: Array = prefill(model, cache, args.tokens, all_positions=args.all_positions).cpu().numpy()
    return array


def _reference(args: argparse.Namespace, file: "GGUFFile") -> "Array":
    from exactmoe.parity.load import reference_weights
    from exactmoe.parity.reference.forward import forward
    from exactmoe.parity.reference.kv_cache import KVCache

    weights = reference_weights(file)
    cache = KVCache.allocate(weights.dims, len(args.tokens))
    logits: Array = forward(weights, cache, args.tokens, args.activations, args.all_positions)
    return logits
