"""Training rows that repeat one another, and held-out rows that are also training rows."""

from dataclasses import dataclass, field

import numpy as np

from jaxft.data.rows.mixture import SplitRows


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


def find_overlaps(split: SplitRows, most: int) -> Overlaps:
    """Compare the first `most` training rows, and held-out rows, with the training rows before them."""
    found, known, prompts = Overlaps(), dict[int, int](), dict[int, int]()
    rows = split.rows
    content, documents = rows.content_hashes().tolist(), rows.documents.tolist()
    first, has_prompt = np.asarray(rows.hashes)[:, 0].tolist(), rows.counts[:, 0] > 0
    for side, same, similar in (
        (split.train, found.duplicates, found.repeated_prompts),
        (split.held, found.leaked, found.leaked_prompts),
    ):
        for i in side[rows.begins_row[side]][:most].tolist():
            whole, prompt = content[documents[i]], first[i] if has_prompt[i] else None
            if whole in known:
                same.add(rows.names[i], rows.names[known[whole]])
            elif prompt in prompts:
                similar.add(rows.names[i], rows.names[prompts[prompt]])
            if side is split.train:
                known.setdefault(whole, i)
                if prompt is not None:
                    prompts.setdefault(prompt, i)
    return found


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
