"""`exactmoe parity`: the Triton forward pass against the numpy reference, bit for bit."""

import argparse
import contextlib
import json
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from exactmoe.cli import options, reports
from exactmoe.kernels.errors import require

if TYPE_CHECKING:
    from exactmoe.model.gguf.reader import GGUFFile

HELP = "compare the Triton kernels with the numpy reference, every stage of every layer, bit for bit"
EXAMPLES = """examples:
  exactmoe parity
  exactmoe parity model.gguf --text main.py --positions 256 --steps 16 --activations q16_k
  exactmoe parity model.gguf --tokens 1,2,3 --device cuda --json report.json
  exactmoe parity --html report.html --junit report.xml

exit status: 0 every bit is equal, 1 something differs or was not compared, 2 the file, tokens or arguments are refused,
3 no CUDA device where one was demanded
"""

DEFAULT_POSITIONS = 64


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument(
        "model", metavar="MODEL", nargs="?", default=options.SHIPPED_MODEL, help="GGUF file (default: the shipped one)"
    )
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--tokens", type=options.token_ids, metavar="1,2,3", help="the prompt, as token ids")
    source.add_argument("--text", metavar="FILE", help="the prompt, as text (default: the shipped code)")
    parser.add_argument(
        "--positions",
        type=options.positive,
        metavar="N",
        help=f"cut the text to its first N tokens (default: {DEFAULT_POSITIONS}, or all of a shorter text)",
    )
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
    require(
        args.tokens is None or args.positions is None,
        f"--positions {args.positions} cuts a text; with --tokens the prompt is what is given",
    )
    if args.json not in (None, "-"):
        options.require_writable(args.json)
    reports.require_writable(args)
    from exactmoe.kernels.launch import resolve_device

    resolve_device(args.device)
    file, _ = options.open_model(args.model)
    tokens = _prompt(args, file)
    from exactmoe.parity.report import as_json, describe_setting, print_report
    from exactmoe.parity.run import run_parity

    setting = describe_setting(file, args.activations, args.device)
    with _progress() as tell:
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


def _prompt(args: argparse.Namespace, file: "GGUFFile") -> list[int]:
    if args.tokens is not None:
        tokens: list[int] = args.tokens
        return tokens
    source = args.text or options.SHIPPED_TEXT
    tokens = options.encode(file, options.read_text(source))
    require(len(tokens) > 0, f"{source}: the text is empty: no token to run")
    wanted = args.positions or min(DEFAULT_POSITIONS, len(tokens))
    require(len(tokens) >= wanted, f"{source}: the text has {len(tokens)} tokens, --positions asks for {wanted}")
    return tokens[:wanted]


@contextlib.contextmanager
def _progress() -> Iterator[Callable[[str], None] | None]:
    """What is running now, on stderr; None where stderr is not a terminal."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console

    with Console(stderr=True).status("starting") as status:
        yield status.update
