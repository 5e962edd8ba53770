"""Where a decode step begins.      position [1] i32, and where one is given token [1] i32, both on the device
Promised order: none, integers are stored.

A launch of its own, for a graph of kernels that may overlap runs slower behind ones that may not, such as torch's
`fill_` and `copy_`, and stays so until one is launched that may; measured, see bench/NOTES.md."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from exactmoe.kernels.dependent import DEPENDENT, finish_wait, release_next
from exactmoe.kernels.errors import require
from exactmoe.kernels.launch import FAITHFUL


def place(token: Tensor, position: Tensor, at: int, given: Tensor | None = None) -> None:
    """Write `at` to `position` [1] i32, and the `given` token [1] i32, if there is one, to `token` [1] i32."""
    for name, value in (("token", token), ("position", position), ("given token", given)):
        if value is not None:
            require(value.dtype == torch.int32 and value.numel() == 1, f"{name} must be one i32")
    require(0 <= at < 1 << 31, f"position must lie in i32, got {at}")
    _place_kernel[(1,)](token, position, given, at, num_warps=1, **DEPENDENT, **FAITHFUL)


@triton.jit(do_not_specialize=["at"])
def _place_kernel(token_ptr, position_ptr, given_ptr, at):
    finish_wait()  # what ran before may still read them
    release_next()
    tl.store(position_ptr, at)
    if given_ptr is not None:
        tl.store(token_ptr, tl.load(given_ptr))
