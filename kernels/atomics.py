"""The only atomics: additions of integers, which give one sum in any order. Nowhere else is one allowed."""

import triton
import triton.language as tl


@triton.jit
def add_integers(ptr, value, live):
    """Add i64 `value` to what lies at `ptr`, where `live`."""
    tl.static_assert(value.dtype == tl.int64, "only integers have one sum in any order")
    tl.atomic_add(ptr, value, live, sem="relaxed")


@triton.jit
def arrive(count_ptr):
    """How many programs have arrived before this one. To the last, all that the others wrote or added is visible."""
    tl.debug_barrier()  # all threads of this program have written
    before = tl.atomic_add(count_ptr, 1, sem="acq_rel")
    tl.debug_barrier()
    return before
