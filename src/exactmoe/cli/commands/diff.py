"""`exactmoe diff`: two traces, or two digest files, stage by stage."""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from exactmoe.cli import options, reports
from exactmoe.kernels.errors import InvalidInput, require

HELP = "compare two traces, every stage of every layer, or the digest files of two runs"
EXAMPLES = """examples:
  exactmoe diff traces/reference traces/h100
  exactmoe diff traces/reference traces/h100 --html report.html --junit report.xml --json report.json
  exactmoe diff traces/reference traces/their-engine --rtol 1e-3 --atol 1e-5
  exactmoe diff here.json there.json

A and B are two folders of `exactmoe trace`, or two files of `exactmoe trace --digest`. B is judged against A.
The rule is bit for bit; --atol and --rtol are for the traces of another engine, and the verdict names them.

exit status: 0 every stage was compared and is equal, 1 something differs or was not compared, 2 the traces are refused:
not readable, of different tokens, or (without --force) of different models, numerics or activation profiles
"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("left", metavar="A", help="trace folder or digest file to compare with")
    parser.add_argument("right", metavar="B", help="trace folder or digest file to judge")
    parser.add_argument("--atol", type=_bound, metavar="X", help="allow |a - b| <= X (+ rtol part)")
    parser.add_argument("--rtol", type=_bound, metavar="X", help="allow |a - b| <= X * max(|a|, |b|) (+ atol part)")
    parser.add_argument(
        "--force", action="store_true", help="compare traces of different models, numerics or activation profiles"
    )
    parser.add_argument(
        "--json",
        metavar="FILE",
        nargs="?",
        const="-",
        help="write the result as JSON too; without FILE, or as -, to stdout, and the table moves to stderr",
    )
    reports.add_reports(parser)


def run(args: argparse.Namespace) -> int:
    """Compare and report; 0 if everything was compared and is equal, else 1."""
    if args.json not in (None, "-"):
        options.require_writable(args.json)
    reports.require_writable(args)
    kinds = [_kind(path) for path in (args.left, args.right)]
    require(
        kinds[0] == kinds[1],
        f"{args.left} is a {kinds[0]} and {args.right} a {kinds[1]}: two traces or two digest files are compared",
    )
    return _digests(args) if kinds[0] == "digest file" else _traces(args)


def _bound(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number") from None


def _kind(path: str) -> str:
    if Path(path).is_dir():
        return "trace folder"
    if Path(path).is_file():
        return "digest file"
    raise InvalidInput(f"{path}: there is no such file or folder")


def _traces(args: argparse.Namespace) -> int:
    from exactmoe.parity.diff.metrics import Tolerance
    from exactmoe.parity.diff.report import as_json, print_report
    from exactmoe.parity.diff.traces import diff_traces
    from exactmoe.parity.trace.folder import open_trace

    tolerance = None
    if args.atol is not None or args.rtol is not None:
        tolerance = Tolerance(args.atol or 0.0, args.rtol or 0.0)
    left, right = open_trace(args.left), open_trace(args.right)
    report = diff_traces(left, right, tolerance, force=args.force, names=(args.left, args.right))
    reports.write_reports(args, report)
    _write_json(args, as_json(report))
    print_report(report, _text_stream(args))
    return 0 if report.equal else 1


def _digests(args: argparse.Namespace) -> int:
    """Two trees of hashes: which rows of which stages differ. There are no values to report."""
    for option in ("atol", "rtol", "html", "junit"):
        require(getattr(args, option) is None, f"--{option} is for traces; digest files hold no values")
    require(not args.force, "--force is for traces; digest files of other runs have no hash in common")
    from exactmoe.parity.run import label
    from exactmoe.parity.trace.digest import compare, read_digest

    left, right = read_digest(args.left), read_digest(args.right)
    found = compare(left, right)
    rows: dict[tuple[str, int], list[int | None]] = {}
    for leaf in found.leaves:
        rows.setdefault((leaf.stage, leaf.layer), []).append(leaf.position)
    stream = _text_stream(args)
    for (stage, layer), positions in rows.items():
        known = [p for p in positions if p is not None]
        what = f"positions {', '.join(map(str, known))}" if known else "the stage as a whole: form, or on one side only"
        print(f"{label(stage, layer)}: {what}", file=stream)
    equal = "equal" if found.equal else "NOT EQUAL"
    counts = f"{found.stages} stages on both sides, {len(rows)} differ, {found.looked_at} hashes compared"
    print(f"root       {left.root}\n           {right.root}", file=stream)
    print(f"DIFF: {equal}: {counts}", file=stream)
    report = {
        "equal": found.equal,
        "roots": [left.root, right.root],
        "stages": found.stages,
        "hashes_compared": found.looked_at,
        "differing": [
            {"stage": stage, "layer": layer, "positions": positions} for (stage, layer), positions in rows.items()
        ],
    }
    _write_json(args, report)
    return 0 if found.equal else 1


def _text_stream(args: argparse.Namespace) -> Any:
    return sys.stderr if args.json == "-" else sys.stdout


def _write_json(args: argparse.Namespace, found: dict[str, Any]) -> None:
    if args.json is None:
        return
    text = json.dumps(found, indent=2, allow_nan=False) + "\n"
    if args.json == "-":
        sys.stdout.write(text)
        return
    with options.whole_file(args.json) as out:
        out.write(text.encode())
