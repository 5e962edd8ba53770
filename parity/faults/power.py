"""What the metrics in common use would have said of a fault.      right, wrong -> {metric: detected}

Each rule is a metric with the threshold it is usually given; a value that is not a number counts as detected."""

import numpy as np

from exactmoe.kernels.errors import require
from exactmoe.parity.bits import Array, compare
from exactmoe.parity.diff.metrics import distance

F64 = np.float64


METRICS = (
    "cosine 0.99",
    "cosine 0.999",
    "max rel 1e-3",  # |a - b| / |a|
    "NMSE 1e-2",  # sum (a - b)^2 / sum a^2
    "numpy.allclose",  # its defaults: rtol 1e-5, atol 1e-8
    "torch.assert_close",  # its defaults for f32: rtol 1.3e-6, atol 1e-5
    "4 ULP",
    "bits",
)


def detected(right: Array, wrong: Array) -> dict[str, bool]:
    """Whether each metric tells `wrong` from `right`; ids are taken as numbers, as tools without a rule for them do."""
    require(right.shape == wrong.shape and right.size > 0, f"shapes {right.shape} and {wrong.shape} cannot be judged")
    a, b = right.astype(F64).ravel(), wrong.astype(F64).ravel()
    same = a == b  # keeps -inf against -inf out of the differences
    with np.errstate(all="ignore"):
        finite = np.isfinite(a) & np.isfinite(b) | ~same
        x, y = a[finite], b[finite]
        cosine = float(x @ y / np.sqrt((x @ x) * (y @ y)))
        error = np.where(same, 0.0, np.abs(a - b))
        relative = float(np.max(np.where(same, 0.0, error / np.abs(a))))
        nmse = float(((x - y) @ (x - y)) / (x @ x))
        found = {
            "cosine 0.99": not cosine >= 0.99,
            "cosine 0.999": not cosine >= 0.999,
            "max rel 1e-3": not relative <= 1e-3,
            "NMSE 1e-2": not nmse <= 1e-2,
            "numpy.allclose": not bool(np.all(same | (error <= 1e-8 + 1e-5 * np.abs(a)))),
            "torch.assert_close": not bool(np.all(same | (error <= 1e-5 + 1.3e-6 * np.abs(a)))),
            "4 ULP": _beyond(right, wrong, 4),
            "bits": not compare("stage", right, wrong).equal,
        }
    assert found.keys() == set(METRICS)
    return found


def _beyond(right: Array, wrong: Array, ulp: int) -> bool:
    """Whether some element is further away than `ulp` numbers, or is NaN on one side only."""
    nan = np.isnan(right) != np.isnan(wrong)
    both = ~(np.isnan(right) | np.isnan(wrong))
    return bool(nan.any() or (distance(right[both], wrong[both]) > ulp).any())
