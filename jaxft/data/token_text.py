"""Token ids as text, token by token, next to their loss weights."""

from collections.abc import Iterator
from typing import Any

import numpy as np

CONTEXT = 16  # pieces of text that are decoded before a token's own


def token_pieces(tokenizer: Any, ids: np.ndarray, weight: np.ndarray) -> Iterator[tuple[str, float]]:
    """Yield (text, weight) of each token. Tokens that form one character together are yielded as one.

    The texts together are the text of all ids. The cost is linear in their number.
    """
    shown, begin, ends = "", 0, [0]  # tokens are decoded behind some before them, as a tokenizer may need
    for end in range(1, len(ids) + 1):
        text = tokenizer.decode(ids[begin:end].tolist(), skip_special_tokens=False)
        if text.endswith("\ufffd") and end < len(ids):
            continue
        yield text[len(shown) :], float(weight[ends[-1] : end].max())
        ends.append(end)
        if len(ends) > 2 * CONTEXT:
            ends = ends[-CONTEXT:]
            begin = ends[0]
            text = tokenizer.decode(ids[begin:end].tolist(), skip_special_tokens=False)
        shown = text
