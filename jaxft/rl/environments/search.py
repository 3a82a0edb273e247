"""Search over a small corpus, by words (BM25), and questions that need one or two searches.

BM25: Robertson and Zaragoza 2009, The Probabilistic Relevance Framework, equation 3.15 with k1 = 1.5 and
b = 0.75: score(d) = sum over words w of the query of idf(w) tf (k1 + 1) / (tf + k1 (1 - b + b |d| / mean)).
"""

import functools
import math
import random
import re
from collections import Counter

from jaxft.rl.environments.environment import RowColumns

Passages = tuple[str, ...]
K1, B = 1.5, 0.75


class Search:
    """The reward is 1 if the final turn contains the row's answer. Rows: `search_rows`, on the invented
    villages of `villages`. A subclass may search another corpus:

        class Manual(Search):
            corpus = tuple(open("manual.txt").read().split("\\n\\n"))
    """

    corpus: Passages = ()
    results = 2

    def reset(self, row: RowColumns) -> None:
        """Begin with the row's own prompt."""
        self.words = _words(str(row["answer"]))
        if not self.words:
            raise ValueError(f"column 'answer' has no words: {row['answer']!r:.80}")

    def step(self, state: None, text: str) -> tuple[None, float, bool, None]:
        """End the episode with the first turn that searches nothing."""
        said, answer = (f" {' '.join(words)} " for words in (_words(text), self.words))
        return None, float(answer in said), True, None

    def search(self, query: str) -> str:
        """Search the library and return the passages that match best.

        Args:
            query: A few words.
        """
        found = best_passages(self.corpus or villages(), query, self.results)
        return "\n\n".join(found) or "Nothing matches."


def best_passages(corpus: Passages, query: str, count: int) -> list[str]:
    """Return the passages that match best by BM25, only those that share a word with the query."""
    counts, frequency, mean = _index(corpus)
    total = dict[int, float]()
    for word in set(_words(query)):
        idf = math.log(1 + (len(corpus) - frequency[word] + 0.5) / (frequency[word] + 0.5))
        for number, of_passage in enumerate(counts):
            if tf := of_passage[word]:
                norm = K1 * (1 - B + B * of_passage.total() / mean)
                total[number] = total.get(number, 0.0) + idf * tf * (K1 + 1) / (tf + norm)
    best = sorted(total, key=lambda number: (-total[number], number))
    return [corpus[number] for number in best[:count]]


@functools.cache
def _index(corpus: Passages) -> tuple[list[Counter[str]], Counter[str], float]:
    """Return the words of each passage, in how many passages each word is, and the mean length."""
    counts = [Counter(_words(passage)) for passage in corpus]
    frequency = Counter(word for of_passage in counts for word in of_passage)
    return counts, frequency, max(1.0, sum(c.total() for c in counts) / max(1, len(counts)))


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.casefold())


# ---- an invented corpus, which no model has read


@functools.cache
def villages() -> Passages:
    """Return passages about invented villages and painters."""
    passages = list[str]()
    for village, river, year, painter in _facts():
        passages.append(f"{village} is a village on the river {river}. It was founded in {year}.")
        passages.append(f"The painter {painter} was born in {village}.")
    return tuple(passages)


def search_rows(count: int, seed: int, two_searches: float = 0.5) -> list[RowColumns]:
    """Return questions about the villages. two_searches: the fraction that needs the village first."""
    rng, rows = random.Random(seed), list[RowColumns]()
    for _ in range(count):
        village, river, year, painter = rng.choice(_facts())
        place = f"the village where the painter {painter} was born"
        place = place if rng.random() < two_searches else village
        question, answer = rng.choice(
            ((f"In which year was {place} founded?", year), (f"On which river is {place}?", river))
        )
        rows.append({"prompt": question, "answer": str(answer)})
    return rows


@functools.cache
def _facts() -> tuple[tuple[str, str, int, str], ...]:
    """Return (village, river, year, painter), of which no name occurs twice."""
    rng = random.Random(7)

    def joined(first: str, second: str, between: str = "") -> list[str]:
        found = [a + between + b for a in first.split() for b in second.split()]
        rng.shuffle(found)
        return found

    names = joined("Bar Cor Dal Fen Gar Hol Kel Mor Nar Ost", "by den ford holm mouth")
    rivers = joined("Ad Be Ili Lu Or Sa Ta Ve Wi Zu", "le ra sk ne va")
    first = "Ada Bruno Clara Emil Frida Hugo Ida Jonas Lena Otto"
    painters = joined(first, "Anders Brandt Falk Holt Krone", " ")
    years = rng.sample(range(1100, 1800), len(names))
    return tuple(zip(names, rivers, years, painters, strict=True))
