"""`exactmoe contracts`: what the contracts promise, whether they are well formed, and what has been shown."""

import argparse
import json
from pathlib import Path

from exactmoe.kernels.errors import InvalidInput

HELP = "validate the contracts, show what is proven, what changed, and how they depend on each other"
EXAMPLES = """examples:
  exactmoe contracts validate contracts
  exactmoe contracts validate contracts/moe-router-v1.yaml --json

exit status: 0 no error, 1 errors, 2 there is nothing to look at
`exactmoe contracts COMMAND --help` has more.
"""
_DIALECTS = ("auto", "house", "pv")


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the subcommands."""
    commands = parser.add_subparsers(metavar="COMMAND", required=True, title="commands")
    validate = _command(commands, "validate", "strict YAML, the shape, the rules, and whether every cited test exists")
    validate.add_argument("paths", nargs="+", type=Path, metavar="PATH", help="a contract, or a folder of them")
    validate.add_argument(
        "--root", type=Path, help="the folder that holds tests/ (default: the nearest above the file)"
    )
    validate.add_argument(
        "--dialect",
        choices=_DIALECTS,
        default="auto",
        help="house: every rule; pv: a file of provable-contracts, by its own rules; auto: by what the file cites",
    )
    validate.add_argument("--strict", action="store_true", help="warnings fail too")
    validate.add_argument("--json", action="store_true", help="print the report as JSON")
    validate.set_defaults(contracts=_validate)


def run(args: argparse.Namespace) -> int:
    """Run the subcommand; 0 all well, 1 an error."""
    return int(args.contracts(args))


def _command(
    commands: "argparse._SubParsersAction[argparse.ArgumentParser]", name: str, help_: str
) -> argparse.ArgumentParser:
    return commands.add_parser(
        name, help=help_, description=help_, formatter_class=argparse.RawDescriptionHelpFormatter
    )


def _validate(args: argparse.Namespace) -> int:
    from exactmoe.contracts.validate import validate

    report = validate(args.paths, root=args.root, dialect=args.dialect)
    if not report.loaded:
        raise InvalidInput(f"{' '.join(map(str, args.paths))}: no contract (*.yaml): nothing was validated")
    print(json.dumps(report.as_json(), indent=2) if args.json else "\n".join(report.lines()))
    return 1 if report.errors or (args.strict and report.warnings) else 0
