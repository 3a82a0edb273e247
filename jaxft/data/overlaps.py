"""Training rows that repeat one another, and held-out rows that are also training rows."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import xxhash
from jaxtyping import Int


class Content(NamedTuple):
    """A row's name, and the token ids of its prompt and of the rest, which may be empty."""

    name: str
    prompt: Int[np.ndarray, " prompt"]
    rest: Int[np.ndarray, " rest"]


@dataclass
class Overlap:
    """Rows that equal a training row, and the first of them: its name and the other's."""

    count: int = 0
    first: tuple[str, str] | None = None

    def add(self, name: str, other: str) -> None:
        """Count a row that equals the training row `other`."""
        self.count += 1
        self.first = self.first or (name, other)


@dataclass(frozen=True)
class Overlaps:
    """Rows of a dataset that share all tokens, or a prompt, with an earlier training row.

    duplicates: training rows that repeat another. repeated_prompts: those with a prompt of another and a
    different rest. leaked: held-out rows that are training rows. leaked_prompts: those with a training row's
    prompt and a different rest.
    """

    duplicates: Overlap = field(default_factory=Overlap)
    repeated_prompts: Overlap = field(default_factory=Overlap)
    leaked: Overlap = field(default_factory=Overlap)
    leaked_prompts: Overlap = field(default_factory=Overlap)


def find_overlaps(train: Iterable[Content], held_out: Iterable[Content]) -> Overlaps:
    """Compare every row with the training rows by 128-bit hashes of their tokens."""
    found, rows, prompts = Overlaps(), dict[bytes, str](), dict[bytes, str]()
    for content in train:
        row, prompt = _hashes(content)
        if row in rows:
            found.duplicates.add(content.name, rows[row])
        elif prompt in prompts:
            found.repeated_prompts.add(content.name, prompts[prompt])
        rows.setdefault(row, content.name)
        if prompt is not None:
            prompts.setdefault(prompt, content.name)
    for content in held_out:
        row, prompt = _hashes(content)
        if row in rows:
            found.leaked.add(content.name, rows[row])
        elif prompt in prompts:
            found.leaked_prompts.add(content.name, prompts[prompt])
    return found


def _hashes(content: Content) -> tuple[bytes, bytes | None]:
    """Return the hashes of a row and of its prompt, None without one."""
    prompt, rest = (np.ascontiguousarray(ids, np.int32).tobytes() for ids in content[1:])
    whole = len(prompt).to_bytes(8, "little") + prompt + rest
    return xxhash.xxh3_128_digest(whole), xxhash.xxh3_128_digest(prompt) if prompt else None


def has_duplicates(found: Overlaps) -> bool:
    """Whether data.drop=duplicates would leave rows out."""
    return bool(found.duplicates.count or found.leaked.count)


def overlap_lines(found: Overlaps) -> list[str]:
    """Return a line for each kind of overlap, or a single line that there is none."""
    texts = {
        "duplicates": "training rows that repeat another one: {n}; the first is {a}, equal to {b}",
        "repeated_prompts": "training rows with the prompt of another one: {n}; the first is {a}, as in {b}",
        "leaked": "held-out rows that are also training rows, so that their loss is too low: {n}; the first "
        "is {a}, equal to {b}",
        "leaked_prompts": "held-out rows with the prompt of a training row: {n}; the first is {a}, as in {b}",
    }
    overlaps = [(vars(found)[name], text) for name, text in texts.items()]
    lines = [text.format(n=o.count, a=o.first[0], b=o.first[1]) for o, text in overlaps if o.first]
    return lines or ["no row repeats another one, and no held-out row is a training row"]
