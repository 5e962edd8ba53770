"""--html and --junit, for the commands that compare."""

import argparse
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from exactmoe.cli import options

if TYPE_CHECKING:
    from exactmoe.parity.diff.traces import DiffReport


def add_reports(parser: argparse.ArgumentParser) -> None:
    """Declare --html and --junit."""
    parser.add_argument("--html", metavar="FILE", help="write a report to read in a browser: one file, no script")
    parser.add_argument("--junit", metavar="FILE", help="write JUnit XML for CI: one test case a stage and layer")


def require_writable(args: argparse.Namespace) -> None:
    """Refuse a report's path before the work."""
    for path in (args.html, args.junit):
        if path is not None:
            options.require_writable(path)


def write_reports(args: argparse.Namespace, report: "DiffReport", evidence: Mapping[str, Any] | None = None) -> None:
    """Write what was asked for; `evidence` of a bisection goes into the page."""
    if args.html is not None:
        from exactmoe.parity.html.page import render_report

        with options.whole_file(args.html) as out:
            out.write(render_report(report, evidence).encode())
    if args.junit is not None:
        from exactmoe.parity.junit import junit

        with options.whole_file(args.junit) as out:
            out.write(junit(report).encode())
