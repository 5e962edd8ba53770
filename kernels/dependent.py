"""Kernels that start while the one before them still runs (programmatic dependent launch, sm_90).

A kernel launched with `DEPENDENT` may fetch weights at once, and calls `finish_wait` before it touches what the kernel
before it wrote. Every program calls `release_next` after it: so when the next kernel starts, all kernels but the one
before it have ended, and what those wrote may be read without waiting.

One kernel calls it first, attention's last, so that the weights of the next one are on their way while it waits: what
runs behind it reads nothing else before its own wait."""

import torch
import triton
import triton.language as tl

from exactmoe.kernels.launch import interpreting

_INTERPRETED = tl.constexpr(interpreting())


def _capable() -> bool:
    """Whether kernels may overlap here; where there is no device, they are compiled as if they may."""
    return not interpreting() and (not torch.cuda.is_available() or torch.cuda.get_device_capability() >= (9, 0))


DEPENDENT: dict[str, bool] = {"launch_pdl": True} if _capable() else {}


@triton.jit
def finish_wait():
    """Wait until the kernel before this one has ended and its writes are seen."""
    if not _INTERPRETED:  # noqa: SIM102 - only a test on its own is decided when the kernel is compiled
        if tl.target_info.cuda_capability_geq(9, 0):
            tl.extra.cuda.gdc_wait()


@triton.jit
def release_next():
    """Let the next kernel start."""
    if not _INTERPRETED:  # noqa: SIM102 - only a test on its own is decided when the kernel is compiled
        if tl.target_info.cuda_capability_geq(9, 0):
            tl.extra.cuda.gdc_launch_dependents()
