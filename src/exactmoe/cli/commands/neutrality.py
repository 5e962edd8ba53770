"""`exactmoe neutrality`: tracing leaves the numbers and the launched kernels alone."""

import argparse
import json
import sys

from exactmoe.cli import options, progress

HELP = "show that tracing changes no bit and no kernel of production"
EXAMPLES = """examples:
  exactmoe neutrality
  exactmoe neutrality model.gguf --tokens 1,2,3 --steps 16 --activations q16_k --json report.json

Production and traced run the same prompt: logits, KV cache and chosen ids must be equal bit for bit. Then production
runs here, and in a process in which tracing cannot be imported: the same kernels, in the same order, of the same
binaries.

exit status: 0 neutral, 1 something differs, 2 the file, tokens or arguments are refused, 3 no CUDA device where one was
demanded
"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument(
        "model", metavar="MODEL", nargs="?", default=options.SHIPPED_MODEL, help="GGUF file (default: the shipped one)"
    )
    options.add_prompt(parser)
    parser.add_argument(
        "--steps", type=options.positive, default=4, metavar="N", help="decode steps after the prompt (default: 4)"
    )
    options.add_activations(parser)
    options.add_device(parser)
    parser.add_argument("--json", metavar="FILE", help="write the result as JSON too; - is stdout")


def run(args: argparse.Namespace) -> int:
    """Compare and report; 0 if neutral, else 1."""
    if args.json not in (None, "-"):
        options.require_writable(args.json)
    from exactmoe.kernels.launch import resolve_device

    resolve_device(args.device)
    file, config = options.open_model(args.model)
    tokens = options.prompt(args, file)
    options.require_prompt(tokens, args.steps, config)
    from exactmoe.parity.neutrality import check_neutrality

    with progress.status():
        found = check_neutrality(file, tokens, args.steps, args.activations, args.device)
    stream = sys.stderr if args.json == "-" else sys.stdout
    if args.json is not None:
        text = json.dumps(found.to_dict(), indent=2) + "\n"
        if args.json == "-":
            sys.stdout.write(text)
        else:
            with options.whole_file(args.json) as out:
                out.write(text.encode())
    for comparison in found.comparisons:
        print(f"{comparison.name:24}{comparison}", file=stream)
    apart = found.first_launch_apart
    launches = found.here.launches
    same = "the same" if apart is None else f"apart at launch {apart}"
    kernels, binaries = (len({getattr(x, name) for x in launches}) for name in ("kernel", "binary"))
    print(f"launches                {len(launches)} of {kernels} kernels, {binaries} binaries: {same}", file=stream)
    if apart is not None:
        for name, side in (("tracing loaded", found.here), ("cannot trace", found.alone)):
            print(f"  {name:20}{side.launches[apart] if apart < len(side.launches) else 'no such launch'}", file=stream)
    print(f"digest                  {found.here.digest}", file=stream)
    print(f"                        {found.alone.digest} in a process that cannot trace", file=stream)
    print(f"NEUTRALITY: {'neutral' if found.neutral else 'NOT NEUTRAL'}", file=stream)
    return 0 if found.neutral else 1
