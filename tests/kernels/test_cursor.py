"""Where a decode step begins."""

import numpy as np
import pytest
import torch

from exactmoe.kernels.cursor import place
from exactmoe.parity.bits import compare
from exactmoe.parity.reference.cursor import place as reference


@pytest.mark.parametrize("given", [None, -1, 0, 7, 2**31 - 1])
@pytest.mark.parametrize("at", [0, 1, 4096, 2**31 - 1])
def test_a_step_is_placed_as_by_the_reference(at: int, given: int | None, device: torch.device) -> None:
    one = None if given is None else np.array([given], np.int32)
    token, position = (torch.tensor([i], dtype=torch.int32, device=device) for i in (9, 41))
    expected = reference(token.cpu().numpy().copy(), at, one)
    place(token, position, at, None if one is None else torch.tensor(one, device=device))
    for name, found, want in zip(("token", "position"), (token, position), expected, strict=True):
        verdict = compare(name, want, found.cpu().numpy())
        assert verdict.equal, str(verdict)


def test_the_reference_refuses_what_the_kernel_refuses() -> None:
    for at in (-1, 2**31):
        with pytest.raises(ValueError, match=f"position must lie in i32, got {at}"):
            reference(np.array([9], np.int32), at)
