"""One module a command, named in `exactmoe.cli.main.COMMANDS`.

Each has `HELP` (one line), `EXAMPLES` (shown under its --help), `configure(parser)` and `run(args) -> exit status`, and
imports nothing heavy before `run`."""
