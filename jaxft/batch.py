"""The batch types that sources build and objectives read.

Legend of array suffixes used all over jaxft: B batch rows, T time, S source time, D width, H query heads, K kv heads,
G = H/K, E head dim, F mlp, V vocab, R rank, L layers, M read positions of a row.
"""

from typing import Any

from jaxtyping import Float, Int

from jaxft.tree import struct


@struct
class Tokens:
    """Rows of tokens and the positions that have a loss.

    In a train step the arrays carry a leading microbatch axis and are sharded over rows; an objective sees one microbatch.
    They are NumPy arrays where a source makes them, jax arrays in a program, ShapeDtypeStructs where only shapes matter.
    The shift by one lives here: `read[b, m]` is where the model is read, `targets[b, m]` the token that should follow.
    `token_weights` sums to 1 over the whole optimizer batch (0 marks padding), so an objective adds and never averages.
    """

    ids: Int[Any, "B T"]
    segments: Int[Any, "B T"]  # 0 is padding; 1, 2, ... the examples packed into the row
    positions: Int[Any, "B T"]  # for rope; starts at 0 in each segment
    read: Int[Any, "B M"]
    targets: Int[Any, "B M"]
    token_weights: Float[Any, "B M"]
    branches: Int[Any, "B T"] | None = None  # 0 a shared prompt, 1, 2, ... answers that don't see one another
