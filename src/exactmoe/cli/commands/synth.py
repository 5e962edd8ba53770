"""`exactmoe synth`: write a file of random but valid weights."""

import argparse

from exactmoe.cli import progress

HELP = "write a Qwen3-MoE GGUF of random but valid weights, at any size"
EXAMPLES = """examples:
  exactmoe synth tiny.gguf --like tiny
  exactmoe synth big.gguf --like qwen3-coder-30b-a3b --layers 4
"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("out", metavar="OUT.gguf", help="file to write")
    parser.add_argument("--like", required=True, metavar="MODEL", help="dims to take: tiny or qwen3-coder-30b-a3b")
    parser.add_argument("--layers", type=int, metavar="N", help="number of layers (default: the model's own)")
    parser.add_argument(
        "--seed", type=int, default=0, metavar="S", help="the same seed gives the same file (default: 0)"
    )
    parser.add_argument("--force", action="store_true", help="replace OUT.gguf if it exists")


def run(args: argparse.Namespace) -> int:
    """Write the file; 0 when it is there."""
    from exactmoe.model.synth import synthesise

    with progress.transfer("writing") as tell:
        nbytes = synthesise(args.out, args.like, args.layers, args.seed, overwrite=args.force, progress=tell)
    print(f"{args.out}: {nbytes:,} bytes of tensors")
    return 0
