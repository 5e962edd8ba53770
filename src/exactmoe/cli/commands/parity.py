"""`exactmoe parity`: the Triton forward pass against the numpy reference, bit for bit."""

import argparse
import json
import sys

from exactmoe.cli import options, progress, reports

HELP = "compare the Triton kernels with the numpy reference, every stage of every layer, bit for bit"
EXAMPLES = """examples:
  exactmoe parity
  exactmoe parity model.gguf --text main.py --positions 256 --steps 16 --activations q16_k
  exactmoe parity model.gguf --tokens 1,2,3 --device cuda --json report.json
  exactmoe parity --html report.html --junit report.xml

exit status: 0 every bit is equal, 1 something differs or was not compared, 2 the file, tokens or arguments are refused,
3 no CUDA device where one was demanded
"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument(
        "model", metavar="MODEL", nargs="?", default=options.SHIPPED_MODEL, help="GGUF file (default: the shipped one)"
    )
    options.add_prompt(parser, "--positions")
    parser.add_argument(
        "--steps", type=options.positive, default=4, metavar="N", help="decode steps after the prompt (default: 4)"
    )
    options.add_activations(parser)
    options.add_device(parser)
    parser.add_argument(
        "--json", metavar="FILE", help="write the result as JSON too; - is stdout, the report moves to stderr"
    )
    reports.add_reports(parser)


def run(args: argparse.Namespace) -> int:
    """Compare and report; 0 if everything was compared and is equal, else 1."""
    if args.json not in (None, "-"):
        options.require_writable(args.json)
    reports.require_writable(args)
    from exactmoe.kernels.launch import resolve_device

    resolve_device(args.device)
    file, _ = options.open_model(args.model)
    tokens = options.prompt(args, file)
    from exactmoe.parity.report import as_json, describe_setting, print_report
    from exactmoe.parity.run import run_parity

    setting = describe_setting(file, args.activations, args.device)
    with progress.status() as tell:
        result = run_parity(file, tokens, args.steps, args.activations, args.device, tell)
    if args.json is not None:
        text = json.dumps(as_json(result, setting), indent=2) + "\n"
        if args.json == "-":
            sys.stdout.write(text)
        else:
            with options.whole_file(args.json) as out:
                out.write(text.encode())
    if args.html is not None or args.junit is not None:
        from exactmoe.parity.diff.from_parity import report_of

        reports.write_reports(args, report_of(result, setting))
    print_report(result, setting, sys.stderr if args.json == "-" else sys.stdout)
    return 0 if result.equal else 1
