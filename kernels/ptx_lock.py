"""The lock of what the compiler makes of every shipped kernel for sm_90: a hash of its PTX, and what it takes.

    python -m exactmoe.kernels.ptx_lock --check     compile, compare with kernels/ptx.lock.json, name what changed
    python -m exactmoe.kernels.ptx_lock --update    write it anew, after a change of a kernel that was meant

A change outside kernels/ cannot change it: nothing there is imported by a kernel. PTX depends on the compiler, so the
lock names the version of Triton it was made with; under another one nothing can be compared, and that is no pass."""

import argparse
import json
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import triton

from exactmoe.kernels.errors import InvalidInput, MissingEnvironment, require
from exactmoe.kernels.ptx_lint import Found, lint_shipped

PATH = Path(__file__).with_name("ptx.lock.json")
ARCH = 90


class Lock(NamedTuple):
    """The hashes, and what they depend on besides the kernels."""

    triton: str
    arch: int
    kernels: dict[str, list[dict[str, Any]]]  # kernel and constants -> what each compilation takes


def lock_of(found: Iterable[Found]) -> Lock:
    """The lock of a lint's findings; raises InvalidInput where a kernel did not compile, or none was compiled."""
    kernels: dict[str, list[dict[str, Any]]] = {}
    for f in found:
        if f.arch == ARCH:
            require(f.ptx != "", f"{f.kernel} [{f.variant}] does not compile: {f.faults.get('compile')}")
            require(f.registers is not None, f"{f.kernel} [{f.variant}] was not assembled: its registers are unknown")
            kernels.setdefault(f"{f.kernel} {f.variant}".strip(), []).append(
                {
                    "ptx": f.ptx,
                    "instructions": f.size,
                    "barriers": f.barriers,
                    "warps": f.warps,
                    "registers": f.registers,
                    "stack": f.stack,
                    "shared": f.shared,
                }
            )
    require(bool(kernels), f"no kernel was compiled for sm_{ARCH}")
    for entries in kernels.values():
        entries.sort(key=lambda entry: entry["ptx"])
    return Lock(triton.__version__, ARCH, dict(sorted(kernels.items())))


def read_lock(path: Path = PATH) -> Lock:
    """The lock in the repository; raises InvalidInput where it is missing or no lock."""
    try:
        held = json.loads(path.read_text(encoding="utf-8"))
        return Lock(held["triton"], held["arch"], held["kernels"])
    except OSError as error:
        raise InvalidInput(f"{path}: cannot be read: {error.strerror}; --update writes it") from error
    except (ValueError, KeyError, TypeError) as error:
        raise InvalidInput(f"{path}: is no lock: {error}") from error


def differences(locked: Lock, found: Lock) -> list[str]:
    """A line for each kernel that is new, gone or compiled to other PTX.

    Raises MissingEnvironment where another Triton compiled."""
    if (locked.triton, locked.arch) != (found.triton, found.arch):
        raise MissingEnvironment(
            f"the lock is of Triton {locked.triton} for sm_{locked.arch}, this is {found.triton} for sm_{found.arch}: "
            "not comparable"
        )
    lines = []
    for name in sorted(locked.kernels.keys() | found.kernels.keys()):
        before, after = locked.kernels.get(name), found.kernels.get(name)
        if before == after:
            continue
        if before is None:
            lines.append(f"new      {name}")
        elif after is None:
            lines.append(f"gone     {name}")
        else:
            lines.append(f"changed  {name}: {_entries(before)} -> {_entries(after)}")
    return lines


def _entries(entries: Iterable[Mapping[str, Any]]) -> str:
    return ", ".join(
        f"{e['ptx'][:12]} {e['instructions']} instructions, {e['barriers']} barriers, {e['warps']} warps of "
        f"{e['registers']} registers, {e['stack']} B stack, {e['shared']} B shared"
        for e in entries
    )


def main(argv: list[str] | None = None) -> int:
    """Exit status: 0 as locked, 1 not, 2 no lock, 3 cannot compile or compare here."""
    parser = argparse.ArgumentParser(prog="python -m exactmoe.kernels.ptx_lock", description=__doc__.split("\n")[0])
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--check", action="store_true", help="compare with the lock")
    what.add_argument("--update", action="store_true", help="write the lock anew")
    args = parser.parse_args(argv)
    try:
        before = read_lock() if args.check else None
        found = lock_of(lint_shipped((ARCH,), (ARCH,)).found)
        if before is not None:
            lines = differences(before, found)
            print("\n".join([*lines, f"{len(found.kernels)} kernels, {len(lines)} not as locked"]))
            return 1 if lines else 0
        PATH.write_text(json.dumps(found._asdict(), indent=1) + "\n", encoding="utf-8")
        print(f"{PATH}: {len(found.kernels)} kernels")
    except InvalidInput as error:
        print(f"ptx_lock: error: {error}", file=sys.stderr)
        return 2
    except MissingEnvironment as error:
        print(f"ptx_lock: error: {error}", file=sys.stderr)
        return 3
    return 0


if __name__ == "__main__":
    sys.exit(main())
