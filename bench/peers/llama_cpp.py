"""llama.cpp on the same file, by its own llama-bench."""

import json
import subprocess
from pathlib import Path
from typing import Any

from exactmoe.bench.clock import Times
from exactmoe.bench.peers.rows import Absent, PeerRow

PEER = "llama.cpp"
TOKENS, RUNS = 128, 5


def rows(program: Path, model: Path, context: int) -> list[PeerRow]:
    """Decoding `model` after `context` positions. Raises Absent where llama-bench fails or answers in another form."""
    command = [
        str(program), "-m", str(model), "-p", "0", "-n", str(TOKENS), "-d", str(context), "-fa", "1", "-ngl", "99",
        "-r", str(RUNS), "-o", "json",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise Absent(
            f"{program.name} ended with {done.returncode}: {(done.stderr.strip().splitlines() or ['no word'])[-1]}"
        )
    return [_row(test, context) for test in _tests(done.stdout, program, context)]


def _tests(text: str, program: Path, context: int) -> list[dict[str, Any]]:
    try:
        found = json.loads(text)
    except ValueError as error:
        raise Absent(f"{program.name} printed no JSON: {error}") from error
    wanted = {"n_prompt": 0, "n_gen": TOKENS, "n_depth": context}
    if not isinstance(found, list) or not found:
        raise Absent(f"{program.name} printed no list of tests")
    for test in found:
        missing = [
            key
            for key in (*wanted, "samples_ts", "build_number", "build_commit")
            if not isinstance(test, dict) or key not in test
        ]
        if missing:
            raise Absent(f"{program.name} gives no {', '.join(missing)}: it is of another version than is known here")
    tests = [test for test in found if all(test[key] == value for key, value in wanted.items())]
    if not tests:
        raise Absent(f"{program.name} ran no test of {TOKENS} tokens after {context}")
    return tests


def _row(test: dict[str, Any], context: int) -> PeerRow:
    samples = [1e6 / float(rate) for rate in test["samples_ts"]]
    version = f"b{test['build_number']} {test['build_commit']}"
    return PeerRow(PEER, f"decode-{context}", "the file's types", Times.of(samples), version=version)
