"""Long arrays in several parts, such as the memory-mapped record batches of a cache file, and sequences that
compute an item when it is read.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import numpy as np

Item = TypeVar("Item")


class Flat:
    """Arrays that are read as if concatenated along their first axis; indexing copies only the chosen values.

    releases: functions that are called after each copy. That of a mapped file unmaps the pages that were
    read, which would otherwise count as memory of the process until it ends; the system still caches them.
    """

    def __init__(self, parts: Sequence[np.ndarray], releases: Sequence[Callable[[], object]] = ()):
        self.parts = tuple(part for part in parts if len(part)) or tuple(parts[:1])
        self.releases = tuple(dict.fromkeys(releases))
        self.starts = np.cumsum([0, *map(len, self.parts)])

    def __len__(self) -> int:
        return int(self.starts[-1])

    def __getitem__(self, index: Any) -> np.ndarray:
        """Return the values at a slice, an index or an array of indices, all at least 0."""
        if isinstance(index, slice):
            return self._slice(*index.indices(len(self)))
        found = self._gather(np.asarray(index))
        self._release()
        return found

    def _release(self) -> None:
        for release in self.releases:
            release()

    def _gather(self, index: np.ndarray) -> np.ndarray:
        if len(self.parts) == 1:
            return self.parts[0][index]
        of = np.searchsorted(self.starts, index, "right") - 1
        found = np.empty((*index.shape, *self.parts[0].shape[1:]), self.parts[0].dtype)
        for number in np.unique(of):
            here = of == number
            found[here] = self.parts[number][index[here] - self.starts[number]]
        return found

    def _slice(self, start: int, stop: int, step: int) -> np.ndarray:
        if step != 1:
            raise ValueError(f"a step of {step} between the values of a Flat; use an array of indices")
        if stop <= start:
            return self.parts[0][:0]
        first, last = np.searchsorted(self.starts, (start, stop - 1), "right") - 1
        pieces = [
            self.parts[i][max(0, start - self.starts[i]) : stop - self.starts[i]]
            for i in range(first, last + 1)
        ]
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        whole = self.parts[0] if len(self.parts) == 1 else np.concatenate(self.parts)
        self._release()
        return whole if dtype is None else whole.astype(dtype)

    def concatenate(self, other: "Flat") -> "Flat":
        """Return the values of both, the other's last."""
        return Flat((*self.parts, *other.parts), (*self.releases, *other.releases))


class Made(Sequence[Item]):
    """A sequence of `size` items; reading item i calls make(i)."""

    def __init__(self, size: int, make: Callable[[int], Item]):
        self.size, self.make = size, make

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self.make(i) for i in range(*index.indices(self.size))]
        index = int(index) + (self.size if index < 0 else 0)
        if not 0 <= index < self.size:
            raise IndexError(f"item {index} of {self.size}")
        return self.make(index)

    def __iter__(self) -> Iterator[Item]:
        return map(self.make, range(self.size))


class RowNames(Made[str]):
    """The names of rows, FILE:LINE.

    labels: names of files. sources: index of each row's file in `labels`. numbers: its line.
    """

    def __init__(self, labels: Sequence[str], sources: Flat, numbers: Flat):
        super().__init__(len(numbers), self._name)
        self.labels, self.sources, self.numbers = tuple(labels), sources, numbers

    def _name(self, index: int) -> str:
        return f"{self.labels[int(self.sources[index])]}:{int(self.numbers[index])}"

    def concatenate(self, other: "RowNames") -> "RowNames":
        """Return the names of both, the other's last."""
        sources = Flat([part + len(self.labels) for part in other.sources.parts])
        return RowNames(
            (*self.labels, *other.labels),
            self.sources.concatenate(sources),
            self.numbers.concatenate(other.numbers),
        )
