"""Rows that data.drop leaves out after they are tokenised: duplicates, and placeholders as responses."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, UInt64

from jaxft.data.rows.example import Chat, Completion, Example, Solution, Text

DUPLICATES, PLACEHOLDERS = DROPPED = ("duplicates", "placeholders")
# Texts that spreadsheets, pandas and annotators write where there is no response; in lower case.
_NOTHING = frozenset((
    "n/a", "na", "n.a.", "#n/a", "<na>", "nan", "null", "none", "nil", "undefined", "tbd", "tba", "todo", "-",
    "--", "---", "...", "…", "???", "[deleted]", "[removed]", "[empty]", "(empty)", "(none)", "(blank)",
    "#ref!", "#value!", "#name?", "#null!",
))  # fmt: skip


def is_placeholder(text: str) -> bool:
    """Whether a text stands for a missing one, such as "N/A" or "nan"."""
    return text.strip().lower() in _NOTHING


def has_placeholder(example: Example) -> bool:
    """Whether the response of an example, its text, or the end of a prompt without a response, is a
    placeholder.
    """
    match example:
        case Chat(messages=messages, response=response):
            turns = messages[response:] or messages[-1:]
            return any(not turn.get("tool_calls") and is_placeholder(turn["content"] or "") for turn in turns)
        case Completion(prompt=prompt, completion=""):
            return is_placeholder(prompt)
        case Completion(completion=text):
            return is_placeholder(text)
        case Solution(steps=steps):
            return all(map(is_placeholder, steps))
        case Text(text=text):
            return is_placeholder(text)
        case _:
            return False


def left_out_rows(
    drop: Sequence[str],
    hashes: UInt64[np.ndarray, " rows"],
    placeholders: Bool[np.ndarray, " rows"],
    fixed: Bool[np.ndarray, " rows"],
) -> tuple[Bool[np.ndarray, " rows"], str]:
    """Return the mask of the rows to leave out, and a clause that counts them, "" for none.

    hashes: of each row's content; of equal rows the first is kept. fixed: rows of a held-out file, none of
    which is a duplicate, while training rows that equal one of them are.
    """
    empty = placeholders if PLACEHOLDERS in drop else np.zeros(len(hashes), bool)
    twice = np.zeros(len(hashes), bool)
    if DUPLICATES in drop:
        order = np.concatenate([np.flatnonzero(fixed & ~empty), np.flatnonzero(~fixed & ~empty)])
        _, first = np.unique(hashes[order], return_index=True)
        twice[order] = True
        twice[order[first]] = False
        twice &= ~fixed
    counts = {"duplicates": int(twice.sum()), "placeholders as responses": int(empty.sum())}
    named = " and ".join(f"{count} {what}" for what, count in counts.items() if count)
    return empty | twice, f"; left out by data.drop: {named}" if named else ""
