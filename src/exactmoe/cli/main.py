"""The command `exactmoe`: finds the subcommand, and turns refusals into messages and exit statuses."""

import argparse
import os
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import Protocol, cast

from exactmoe import __version__
from exactmoe.kernels.errors import InvalidInput, MissingEnvironment

COMMANDS = (
    "parity",
    "logits",
    "generate",
    "inspect",
    "synth",
    "trace",
    "diff",
    "bisect",
    "neutrality",
    "bench",
    "contracts",
)
"""Every command; the module of each is `exactmoe.cli.commands.<name>`."""

REFUSED = 2
NO_ENVIRONMENT = 3
INTERRUPTED = 130  # as shells report SIGINT
BROKEN_PIPE = 141  # as shells report SIGPIPE

_DESCRIPTION = "Qwen3-MoE from quantised GGUF: Triton kernels, bit-exact against a numpy reference."
_EPILOG = """exit status, for every command:
  0  yes: equal, valid, done
  1  no: something differs
  2  wrong usage, or an input that is refused
  3  the machine lacks what was asked for: a GPU, a package

`exactmoe COMMAND --help` has examples.
"""


class Command(Protocol):
    """What a module under `exactmoe.cli.commands` exports."""

    HELP: str
    EXAMPLES: str

    def configure(self, parser: argparse.ArgumentParser) -> None:
        """Declare the arguments."""

    def run(self, args: argparse.Namespace) -> int:
        """Do it; 0 is yes, 1 is no. Raises `InvalidInput` and `MissingEnvironment`."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command, by default the one of `sys.argv`; the exit status. Wrong usage raises SystemExit(2)."""
    argv = sys.argv[1:] if argv is None else list(argv)
    try:
        try:
            args = _parser(argv).parse_args(argv)
            status = cast("Command", args.command).run(args)
        finally:
            sys.stdout.flush()  # a closed pipe must be found here, not at interpreter shutdown
    except InvalidInput as error:
        return _fail(error, REFUSED)
    except MissingEnvironment as error:
        return _fail(error, NO_ENVIRONMENT)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] == "exactmoe":
            raise
        return _fail(f"this command needs the package {error.name!r}, which is not installed", NO_ENVIRONMENT)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the flush at shutdown must not fail again
        return BROKEN_PIPE
    except OSError as error:
        if error.filename is None:
            raise
        return _fail(f"{error.filename}: {error.strerror}", REFUSED)
    except KeyboardInterrupt:
        return _fail("interrupted", INTERRUPTED)
    return status


def _parser(argv: Sequence[str]) -> argparse.ArgumentParser:
    """The parser of the command that `argv` begins with; of all commands where it begins with none."""
    parser = argparse.ArgumentParser("exactmoe", description=_DESCRIPTION, epilog=_EPILOG, formatter_class=_RawText)
    parser.add_argument("--version", action="version", version=f"exactmoe {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True, title="commands")
    for name in argv[:1] if argv and argv[0] in COMMANDS else COMMANDS:
        command = cast("Command", import_module(f"exactmoe.cli.commands.{name}"))
        sub = commands.add_parser(
            name, help=command.HELP, description=command.HELP, epilog=command.EXAMPLES, formatter_class=_RawText
        )
        command.configure(sub)
        sub.set_defaults(command=command)
    return parser


_RawText = argparse.RawDescriptionHelpFormatter


def _fail(message: object, status: int) -> int:
    print(f"exactmoe: error: {message}", file=sys.stderr)
    return status
