"""`exactmoe contracts`: what the contracts promise, whether they are well formed, and what has been shown."""

import argparse
import datetime as dt
import json
import sys
from pathlib import Path

from exactmoe.kernels.errors import InvalidInput, require

HELP = "validate the contracts, show what changed and which version that needs, how they depend, and start new ones"
EXAMPLES = """examples:
  exactmoe contracts validate contracts
  exactmoe contracts validate contracts/moe-router-v1.yaml --json
  exactmoe contracts diff old.yaml new.yaml
  exactmoe contracts diff --rev HEAD~1 contracts
  exactmoe contracts status
  exactmoe contracts status --evidence build/evidence.json --json contracts/moe-router-v1.yaml
  exactmoe contracts graph --mermaid contracts
  exactmoe contracts new sampling-v1

exit status: 0 no error, 1 errors, 2 there is nothing to look at
"""


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
        choices=("auto", "house", "pv"),
        default="auto",
        help="house: every rule; pv: a file of provable-contracts, by its own rules; auto: by what the file cites",
    )
    validate.add_argument("--strict", action="store_true", help="warnings fail too")
    validate.add_argument("--json", action="store_true", help="print the report as JSON")
    validate.set_defaults(subcommand=_validate)

    diff = _command(commands, "diff", "what changed, which version bump that needs, and whether the file made it")
    diff.add_argument("paths", nargs="+", type=Path, metavar="PATH", help="OLD NEW; with --rev, contracts or folders")
    diff.add_argument("--rev", metavar="REV", help="compare each contract with what it was in this git revision")
    diff.add_argument(
        "--if-any", action="store_true", help="where there is no such revision (first commit, shallow clone), say so: 0"
    )
    diff.add_argument("--json", action="store_true", help="print the differences as JSON")
    diff.set_defaults(subcommand=_diff)

    status = _command(commands, "status", "what has been shown of each contract, from recorded test runs")
    status.add_argument("paths", nargs="*", type=Path, metavar="PATH", help="contracts or folders (default: contracts)")
    status.add_argument(
        "--evidence", action="append", default=[], type=Path, metavar="FILE",
        help="a record beside those in contracts/evidence; written by pytest --record-evidence",
    )  # fmt: skip
    forms = status.add_mutually_exclusive_group()
    forms.add_argument("--json", action="store_true", help="print the statuses as JSON")
    forms.add_argument("--markdown", action="store_true", help="print the table of the README")
    status.add_argument("--readme", type=Path, metavar="FILE", help="1 where FILE does not hold that table")
    status.set_defaults(subcommand=_status)

    graph = _command(commands, "graph", "which contract depends on which")
    graph.add_argument("paths", nargs="+", type=Path, metavar="PATH", help="a contract, or a folder of them")
    graph.add_argument("--mermaid", action="store_true", help="print a Mermaid flowchart")
    graph.set_defaults(subcommand=_graph)

    new = _command(commands, "new", "write a skeleton that validates")
    new.add_argument("id", metavar="ID", help="its name: lower-case words with dashes and a version, sampling-v1")
    new.add_argument("--folder", type=Path, default=Path("contracts"), help="where to write it (default: contracts)")
    new.set_defaults(subcommand=_new)


def run(args: argparse.Namespace) -> int:
    """Run the subcommand; 0 all well, 1 an error."""
    return int(args.subcommand(args))


def _command(
    commands: "argparse._SubParsersAction[argparse.ArgumentParser]", name: str, said: str
) -> argparse.ArgumentParser:
    return commands.add_parser(name, help=said, description=said)


def _validate(args: argparse.Namespace) -> int:
    from exactmoe.contracts.validate import validate

    report = validate(args.paths, root=args.root, dialect=args.dialect)
    require(bool(report.loaded), f"{_joined(args.paths)}: no contract (*.yaml): nothing was validated")
    print(json.dumps(report.as_json(), indent=2) if args.json else "\n".join(report.lines()))
    return 1 if report.errors or (args.strict and report.warnings) else 0


def _diff(args: argparse.Namespace) -> int:
    from exactmoe.contracts.diff import NoRevision, Unreadable, compare, since
    from exactmoe.contracts.document import read

    try:
        if args.rev is None:
            require(len(args.paths) == 2, f"OLD and NEW are compared, or --rev is given; got {_joined(args.paths)}")
            differences = [compare(read(args.paths[0]), read(args.paths[1]))]
        else:
            differences = since(args.paths, args.rev)
    except Unreadable as error:
        raise InvalidInput(str(error)) from error
    except NoRevision as error:
        if not args.if_any:
            raise InvalidInput(str(error)) from error
        print(f"nothing was compared: {error}")
        return 0
    require(bool(differences), f"{_joined(args.paths)}: no contract (*.yaml): nothing was compared")
    errors = sum(len(difference.findings) for difference in differences)
    if args.json:
        print(json.dumps([difference.as_json() for difference in differences], indent=2))
    else:
        print("\n".join(line for difference in differences for line in difference.lines()))
        print(f"{errors} error(s) in {len(differences)} contract(s) compared")
    return 1 if errors else 0


def _status(args: argparse.Namespace) -> int:
    from exactmoe.contracts.record import Unusable
    from exactmoe.contracts.status import markdown, statuses, table

    paths = args.paths or [Path("contracts")]
    try:
        found = statuses(paths, args.evidence)
    except Unusable as error:
        raise InvalidInput(str(error)) from error
    require(bool(found), f"{_joined(paths)}: no contract (*.yaml): there is no status")
    if args.json:
        print(json.dumps([one.as_json() for one in found], indent=2))
    else:
        print(markdown(found) if args.markdown else "\n".join(table(found)))
    stale = args.readme is not None and markdown(found) not in args.readme.read_text(encoding="utf-8")
    if stale:
        print(f"{args.readme}: its table of contracts is not what status says", file=sys.stderr)
    return 1 if stale or any(one.findings for one in found) else 0


def _graph(args: argparse.Namespace) -> int:
    from exactmoe.contracts import graph
    from exactmoe.contracts.validate import dependencies, files

    found = dependencies(files(args.paths))
    require(bool(found), f"{_joined(args.paths)}: no contract (*.yaml): there is no graph")
    print(graph.mermaid(found) if args.mermaid else graph.text(found))
    return 0


def _new(args: argparse.Namespace) -> int:
    from exactmoe.contracts.skeleton import skeleton
    from exactmoe.contracts.validate import root_of

    path: Path = args.folder / f"{args.id}.yaml"
    require(args.folder.is_dir(), f"{args.folder} is not a folder")
    try:
        text = skeleton(args.id, args.folder, root_of(path), dt.datetime.now(dt.UTC).date().isoformat())
        with path.open("x", encoding="utf-8") as file:
            file.write(text)
    except ValueError as error:
        raise InvalidInput(str(error)) from error
    print(path)
    return 0


def _joined(paths: list[Path]) -> str:
    return " ".join(map(str, paths))
