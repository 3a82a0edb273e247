"""Checks that weights, adapters and scales are finite when they are read and when they are written."""

import contextlib
from collections.abc import Iterator
from typing import Any

import ml_dtypes
import numpy as np

from jaxft.nn.quant import QTensor

# Bits of a 16-bit float without its sign, from which on it is infinite or NaN. NumPy's own isfinite is slow
# for float16 and unknown to it for bfloat16.
INFINITE_BITS = {np.dtype(np.float16): 0x7C00, np.dtype(ml_dtypes.bfloat16): 0x7F80}
ADVICE = "repair the file, or download it again"


def is_finite(x: np.ndarray) -> bool:
    """Whether no value of an array is infinite or NaN. True for integers."""
    if x.dtype in INFINITE_BITS:
        positive, negative = x.view(np.int16).max(initial=0), x.view(np.uint16).max(initial=0)
        return int(positive) < INFINITE_BITS[x.dtype] and int(negative) < 0x8000 + INFINITE_BITS[x.dtype]
    if x.dtype in (np.float32, np.float64):
        return bool(np.isfinite(x).all())
    if np.issubdtype(x.dtype, np.integer) or x.dtype == bool:
        return True
    return bool(np.isfinite(x.astype(np.float32)).all())  # 8-bit floats


def require_finite(x: np.ndarray, advice: str = ADVICE) -> np.ndarray:
    """Return the array. Raises ValueError with the number and the place of values that are not finite."""
    if not is_finite(x):
        bad = ~np.isfinite(x.astype(np.float32))
        first = ", ".join(str(int(i)) for i in np.argwhere(bad)[0])
        raise ValueError(
            f"{int(bad.sum())} of {x.size} values are NaN or infinite, the first at [{first}]; {advice}"
        )
    return x


def require_finite_scales(x: Any) -> Any:
    """Return a QTensor of NumPy arrays. Raises ValueError that names a scale that is not finite."""
    if isinstance(x, QTensor):
        for name in ("scale", "offset", "outer", "mean"):
            array = getattr(x, name)
            if array is not None and not is_finite(np.asarray(array)):
                raise ValueError(f"its quantisation array {name!r} has NaN or infinite values; {ADVICE}")
    return x


def cast_finite(x: np.ndarray, dtype: Any) -> np.ndarray:
    """Cast finite floats. Raises ValueError where a value is too large for `dtype`."""
    with np.errstate(over="ignore"):
        out = x.astype(dtype, copy=False)
    narrower = float(ml_dtypes.finfo(out.dtype).max) < float(ml_dtypes.finfo(x.dtype).max)
    if narrower and not is_finite(out):
        raise ValueError(f"some values are too large for {out.dtype}; use dtype=float32, or another model")
    return out


@contextlib.contextmanager
def errors_name(where: str) -> Iterator[None]:
    """Put the file and the tensor in front of the message of a ValueError."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
