"""The interpreter as the kernels run in it: integers that leave their type are refused, in every process."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

# A process of its own: this one may run kernels on a GPU, and a process is in one mode for life.
PROGRAM = """
import sys

from exactmoe.kernels.launch import resolve_device

resolve_device("interpret")

import torch
import triton
import triton.language as tl

from exactmoe.kernels.interpreter import quicken

quicken()  # again: it must not matter


@triton.jit
def inside(x, y, OP: tl.constexpr):
    if OP == "add":
        z = x + y
    elif OP == "sub":
        z = x - y
    else:
        z = x * y
    return z


@triton.jit
def kernel(x_ptr, y_ptr, z_ptr, OP: tl.constexpr):
    i = tl.arange(0, 4)
    tl.store(z_ptr + i, inside(tl.load(x_ptr + i), tl.load(y_ptr + i), OP))


for line in sys.stdin:
    op, dtype, x, y = line.split()
    x, y = (torch.tensor([0, 1, int(n), 1], dtype=getattr(torch, dtype)) for n in (x, y))
    z = torch.empty_like(x)
    try:
        kernel[(1,)](x, y, z, op)
        print(z[2].item())
    except triton.runtime.errors.InterpreterError as e:
        print(e)
"""
FITS = {
    "add int32 2147483000 647": 2**31 - 1,
    "add int32 -2147483000 -648": -(2**31),
    "sub int32 -2147483000 648": -(2**31),
    "mul int32 65536 -32768": -(2**31),
    "mul int32 46340 46340": 2147395600,
    "add int8 100 27": 127,
    "sub int8 -100 28": -128,
    "add int16 32767 0": 32767,
    "mul int16 256 -128": -32768,
    "add uint8 200 55": 255,
    "sub uint8 1 1": 0,
    "mul uint16 255 257": 65535,
    "sub uint16 1 1": 0,
    "sub uint32 1 1": 0,
    "add uint32 4294967000 295": 2**32 - 1,
    "add int64 9223372036854775807 1": -(2**63),  # nothing is wider, so nothing is asked
}
LEAVES = {
    "add int32 2147483000 648": "add leaves int32: 0 to 2147483648",
    "add int32 -2147483000 -649": "add leaves int32: -2147483649 to 2",
    "sub int32 -2147483000 649": "sub leaves int32: -2147483649 to 0",
    "mul int32 65536 32768": "mul leaves int32: 0 to 2147483648",
    "mul int32 46341 46341": "mul leaves int32: 0 to 2147488281",
    "add int8 100 28": "add leaves int8: 0 to 128",
    "sub int8 -100 29": "sub leaves int8: -129 to 0",
    "add int16 32767 1": "add leaves int16: 0 to 32768",
    "add uint8 200 56": "add leaves uint8: 0 to 256",
    "sub uint8 1 2": "sub leaves uint8: -1 to 0",
    "mul uint16 256 256": "mul leaves uint16: 0 to 65536",
    "sub uint16 1 2": "sub leaves uint16: -1 to 0",
    "add uint32 4294967000 296": "add leaves uint32: 0 to 4294967296",
    "add int16 -32768 -1": "add leaves int16: -32769 to 2",
    "sub uint32 1 2": "sub leaves uint32: -1 to 0",
}


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What a kernel makes of each line, by the line."""
    file = tmp_path_factory.mktemp("interpreter") / "program.py"
    file.write_text(PROGRAM)
    lines = [*FITS, *LEAVES]
    path = os.pathsep.join([str(Path(__file__).parents[2] / "src"), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, file], input="\n".join(lines), capture_output=True, text=True, check=True,
        env={**os.environ, "PYTHONPATH": path},
    )  # fmt: skip
    return dict(zip(lines, done.stdout.splitlines(), strict=True))


@pytest.mark.parametrize("line", FITS)
def test_what_fits_is_computed(said: dict[str, str], line: str) -> None:
    assert said[line] == str(FITS[line])


@pytest.mark.parametrize("line", LEAVES)
def test_what_does_not_fit_is_refused_by_name(said: dict[str, str], line: str) -> None:
    assert LEAVES[line] in said[line]
