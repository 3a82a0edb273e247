"""The batch types that sources build and objectives read.

Legend of array suffixes used all over jaxft: B batch rows, T time, S source time, D width, H query heads, K kv heads,
G = H/K, E head dim, F mlp, V vocab, R rank, L layers, M read positions of a row.
"""

from jaxtyping import Array, Float, Int

from jaxft.tree import struct


@struct
class Tokens:
    """Rows of tokens and the positions that have a loss.

    In a train step the arrays carry a leading microbatch axis and are sharded over rows; an objective sees one microbatch.
    The shift by one lives here: `read[b, m]` is where the model is read, `targets[b, m]` the token that should follow.
    `token_weights` sums to 1 over the whole optimizer batch (0 marks padding), so an objective adds and never averages.
    """

    ids: Int[Array, "B T"]
    segments: Int[Array, "B T"]  # 0 is padding; 1, 2, ... the examples packed into the row
    positions: Int[Array, "B T"]  # for rope; starts at 0 in each segment
    read: Int[Array, "B M"]
    targets: Int[Array, "B M"]
    token_weights: Float[Array, "B M"]
    branches: Int[Array, "B T"] | None = None  # 0 a shared prompt, 1, 2, ... answers that don't see one another
