"""The pairs from which PiSSA and OLoRA start: of the largest singular values of a weight, and of its QR
decomposition.
"""

import numpy as np
from jaxtyping import Float

SMALLEST_VALUE = 1e-30  # of a singular value that is divided by

_Weight = Float[np.ndarray, "I O"]
FirstPair = tuple[Float[np.ndarray, "I R"], Float[np.ndarray, "R O"]]


def principal_pair(weight: _Weight, rank: int, scale: float) -> FirstPair:
    """Return a [in, R], b [R, out] so that `scale a b` has the R largest singular values of a weight.

    Their roots are in both. The vectors are eigenvectors of the smaller Gram matrix, computed in float64.
    """
    import scipy.linalg  # not at the top: most runs do not need it

    wide = weight.astype(np.float64)
    if wide.shape[0] > wide.shape[1]:
        b, a = principal_pair(weight.T, rank, scale)
        return a.T, b.T
    size = wide.shape[0]
    _, vectors = scipy.linalg.eigh(wide @ wide.T, subset_by_index=[size - rank, size - 1])
    left = vectors[:, ::-1]
    right = left.T @ wide  # rows have the singular values as norms
    values = np.sqrt(np.sum(right**2, 1))
    root = np.sqrt(values / abs(scale))
    b = right * (np.copysign(root, scale) / np.maximum(values, SMALLEST_VALUE))[:, None]
    return (left * root).astype(np.float32), b.astype(np.float32)


def qr_pair(weight: _Weight, rank: int, scale: float) -> FirstPair:
    """Return a [in, R], b [R, out]: the first R columns and rows of the QR decomposition of `weight.T`, as in
    peft, whatever the scale.
    """
    q, r = np.linalg.qr(weight.T)
    return np.ascontiguousarray(r[:rank].T), np.ascontiguousarray(q[:, :rank].T)


FIRST_PAIRS = {"pissa": principal_pair, "olora": qr_pair}  # by the name of the initialisation
