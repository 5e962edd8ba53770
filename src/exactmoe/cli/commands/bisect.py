"""`exactmoe bisect`: the first wrong stage of a suspect forward pass, and where in it."""

import argparse
import json
import sys
from typing import TYPE_CHECKING, Any

from exactmoe.cli import options, progress, reports
from exactmoe.kernels.errors import require

if TYPE_CHECKING:
    from exactmoe.parity.bisect.search import Evidence

HELP = "find the first wrong stage, expert and weight block, and whether it was made there"
EXAMPLES = """examples:
  exactmoe bisect
  exactmoe bisect model.gguf --suspect route=my_router.py:my_route --first 32 --html report.html
  exactmoe bisect --suspect decode
  exactmoe bisect --suspect fault:one-wrong-sub-scale -o evidence.json
  exactmoe bisect --suspect fault:approximate-exp@2 --stage moe_ffn_out@3

The suspect is one of:
  triton                   the Triton kernels, as they are
  fault:NAME[@LAYER]       a planted fault: the reference with one mistake (--list-faults names them)
  OP=FILE.py:FUNCTION      the Triton forward pass with one op replaced by a function of yours, with the op's arguments
  OP=package.module:NAME   the same, from an installed module (an entry point's value)

exit status: 0 every stage was compared and is equal, 1 a wrong stage was found, 2 the file, tokens or suspect are
refused, 3 no CUDA device where one was demanded
"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument(
        "model", metavar="MODEL", nargs="?", default=options.SHIPPED_MODEL, help="GGUF file (default: the shipped one)"
    )
    parser.add_argument("--suspect", default="triton", metavar="SPEC", help="what is suspected (default: triton)")
    parser.add_argument("--stage", metavar="STAGE@LAYER", help="ask about this stage instead of searching the first")
    options.add_prompt(parser)
    parser.add_argument(
        "--past", type=int, default=0, metavar="N", help="run the first N tokens before, so that the pass has a cache"
    )
    options.add_activations(parser)
    options.add_device(parser)
    parser.add_argument("--list-faults", action="store_true", help="name the planted faults there are, and stop")
    parser.add_argument("-o", "--output", metavar="FILE", help="write the evidence as JSON; - is stdout")
    reports.add_reports(parser)


def run(args: argparse.Namespace) -> int:
    """Search and report; 0 if all is equal, else 1."""
    if args.list_faults:
        from exactmoe.parity.faults.catalogue_model import MODEL_FAULTS

        for fault in MODEL_FAULTS:
            print(f"{fault.name:34}{fault.stage}, {fault.where}")
        return 0
    if args.output not in (None, "-"):
        options.require_writable(args.output)
    reports.require_writable(args)
    device: Any = None
    if not args.suspect.startswith("fault:"):
        from exactmoe.kernels.launch import resolve_device

        device = resolve_device(args.device)
    file, config = options.open_model(args.model)
    tokens = options.prompt(args, file)
    options.require_prompt(tokens, 0, config)
    require(0 <= args.past < len(tokens), f"--past {args.past} leaves none of {len(tokens)} tokens to compare")
    from exactmoe.parity import decode_steps
    from exactmoe.parity.bisect.evidence import evidence_of
    from exactmoe.parity.bisect.search import bisect
    from exactmoe.parity.bisect.suspects import is_decode, sides
    from exactmoe.parity.graph import TRACED, parse_stage

    first, graph = args.past, TRACED
    if is_decode(args.suspect):
        first, graph = len(tokens) - 1, decode_steps.GRAPH
        require(args.past in (0, first), f"--past {args.past}: a decode step has all tokens but the last before it")
    past, tokens = tokens[:first], tokens[first:]
    stage = parse_stage(args.stage, config.n_layers) if args.stage is not None else None
    if stage is not None:
        known = dict.fromkeys(name for name, _ in graph.order(config.n_layers))
        require(stage[0] in known, f"{args.suspect} gives no stage {stage[0]}, but {', '.join(known)}")
    with progress.status() as tell, sides(args.suspect, file, tokens, args.activations, device) as (right, suspect):
        found = bisect(
            right, suspect, file, tokens, past=past, name=args.suspect, stage=stage, progress=tell, graph=graph
        )
        evidence = evidence_of(found, file, past, tokens, args.activations, device, graph)
        if args.html is not None or args.junit is not None:
            from exactmoe.parity.bisect.report import report_of

            reports.write_reports(args, report_of(right, suspect, evidence, past, tokens, graph), evidence)
    if args.output is not None:
        text = json.dumps(evidence, indent=2) + "\n"
        if args.output == "-":
            sys.stdout.write(text)
        else:
            with options.whole_file(args.output) as out:
                out.write(text.encode())
    _print(found, evidence["next"], sys.stderr if args.output == "-" else sys.stdout)
    return 0 if found.clean else 1


def _print(found: "Evidence", following: str, stream: Any) -> None:
    place, origin = found.place, found.origin
    for first, last, equal in found.probes:
        print(f"{first} to {last}: {'equal' if equal else 'not equal'}", file=stream)
    if place is not None and origin is not None:
        print(f"elements   {place.differing:,} of {place.count:,} differ", file=stream)
        print(f"first      {list(place.first)}: reference {place.reference}, suspect {place.suspect}", file=stream)
        print(f"positions  {_some(place.positions)}", file=stream)
        if place.experts is not None:
            print(f"experts    {_some(place.experts)}", file=stream)
        if place.feature is not None:
            print(f"columns    {place.feature[0]} to {place.feature[1]}", file=stream)
        if place.tensor is not None:
            print(f"weights    {place.tensor} {place.quant_type or ''}", file=stream)
        if place.block is not None and place.bytes is not None:
            alone = "" if place.alone else ", right by itself: the fold of the blocks is wrong"
            span = f"bytes {place.bytes[0]} to {place.bytes[1] - 1} of the file"
            print(f"block      {place.block} of row {place.row}: {span}{alone}", file=stream)
        if place.resident is not None:
            print(f"in memory  {place.resident}", file=stream)
        print(f"origin     {origin.verdict}", file=stream)
        for who, equal in (
            ("suspect's op on the reference's input", origin.suspect_on_reference),
            ("reference's op on the suspect's input", origin.reference_on_suspect),
        ):
            print(f"           {who}: {'equal' if equal else 'differs'}", file=stream)
    print(
        f"runs       {found.passes} passes of the suspect (at most {found.most_passes} for {found.stages} stages), "
        f"{found.steps} single stages; {found.compared} stages compared",
        file=stream,
    )
    print(f"next       {following}", file=stream)
    print(f"BISECT: {found.sentence}", file=stream)


def _some(numbers: tuple[int, ...]) -> str:
    shown = ", ".join(map(str, numbers[:12]))
    return shown if len(numbers) <= 12 else f"{shown}, ... ({len(numbers)} in all)"
