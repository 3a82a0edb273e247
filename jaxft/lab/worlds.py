"""Worlds: synthetic preference rows on the shipped prompts whose true reward is known.

A World makes completions for the prompts of a file: right ones, and ones with wrong or missing facts, in the
wrong format, or longer. Its rows are pairs for any preference recipe (prompt, chosen, rejected), with the
truth in further columns. Settings add flaws of real preference data: flipped labels, annotators who like
longer responses, circular preferences, near duplicates.

    world = World(noise=0.2)                            # 20 % of the labels are flipped
    rows = world.rows()
    jaxft.train("dpo", rows, held_out=world.held_out_rows(), score=WorldScore(world, true_reward))
    World(noise=0.2).write("world")                     # and data=world/train.jsonl on the command line
    true_reward("", completion, rows[0])                # completion: any text for that row's prompt

`true_reward` and `proxy_reward`, which adds the annotators' bias for length, are functions for score= and
rewards=. With such a bias, a policy that is trained too far gains proxy_reward while true_reward falls. The
same settings, `seed` among them, give the same rows.
"""

import json
import math
import random
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, NamedTuple

from jaxft.annotations import BELOW_ONE, FiniteFloat, Seed, at_least, between, check_bounds
from jaxft.data.rows.dataset_rows import find_data, read_rows
from jaxft.data.rows.shipped import ROOT

TRUTH = "truth"  # the column that the rewards read: the right completion and the world's tastes, as JSON
SENTENCES = ("Here it is: ", "The answer is ")
TRIES = 10_000  # pairs of completions that are sampled until their rewards differ enough
NOTE = " Please note that this is what the message says, and nothing was added to it."


@dataclass(frozen=True)
class Taste:
    """Weights of the true reward, see Features. facts: for the fraction of right facts. format: for a bare
    object or answer. length: per 100 characters by which a completion is longer than the right one.
    """

    facts: float = 4.0
    format: float = 2.0
    length: float = -0.5


@dataclass(frozen=True)
class World:
    """Settings of a world; see the file's docstring.

    source: rows with a prompt and its right completion, a JSON object or a short answer. pairs: number of
    pairs of the training rows. held_out: pairs of the held-out rows, of other prompts, with the true labels.
    gap: the least difference of the true rewards of a pair. temperature: 0: annotators choose the completion
    of the higher reward, theirs with length_bias and circle; above 0: with probability sigmoid(difference /
    temperature). noise: fraction of the labels that are flipped, at most 0.5. length_bias: reward that
    annotators add per 100 characters. circle: reward that they add to a completion in a sentence against a
    bare one, with a note against one in a sentence, and bare against one with a note. duplicates: fraction of
    the rows that repeat another one, with a slightly reworded prompt.
    """

    source: str = "configs/data/extraction.jsonl"
    taste: Taste = Taste()
    pairs: Annotated[int, between(2, 100_000)] = 200
    held_out: Annotated[int, at_least(0)] = 60
    gap: Annotated[float, between(0.0, 10.0)] = 0.5
    temperature: Annotated[float, at_least(0)] = 0.0
    noise: Annotated[float, between(0.0, 0.5)] = 0.0
    length_bias: FiniteFloat = 0.0
    circle: FiniteFloat = 0.0
    duplicates: Annotated[float, BELOW_ONE] = 0.0
    seed: Seed = 0

    def __post_init__(self) -> None:
        check_bounds(self, "world")

    def rows(self) -> list[dict[str, Any]]:
        """Return the training rows: prompt, chosen, rejected, truth (see TRUTH), true_margin (true reward of
        chosen minus that of rejected), flipped (1 if noise flipped the label, else 0), and duplicate_of (the
        index of the row that it repeats, -1 for none).
        """
        return self._pairs(self._prompts()[self.held_out :], self.pairs, "train")

    def held_out_rows(self) -> list[dict[str, Any]]:
        """Return pairs of other prompts than rows(), labelled by their true rewards. Their column TRUTH has
        the world's length_bias, for proxy_reward.
        """
        clean = replace(self, noise=0.0, length_bias=0.0, circle=0.0, duplicates=0.0, temperature=0.0)
        rows = clean._pairs(self._prompts()[: self.held_out], self.held_out, "held out")
        return [{**row, TRUTH: self._truth_of(_truth(row)["right"])} for row in rows]

    def _truth_of(self, right: str) -> str:
        """Return a row's value of the column TRUTH. right: the right completion."""
        truth = {"right": right, **asdict(self.taste), "length_bias": self.length_bias}
        return json.dumps(truth, ensure_ascii=False)

    def write(self, folder: Path | str) -> tuple[Path, Path]:
        """Write train.jsonl, held_out.jsonl and world.json (the settings); return the paths of the rows."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        paths = folder / "train.jsonl", folder / "held_out.jsonl"
        for path, rows in zip(paths, (self.rows(), self.held_out_rows()), strict=True):
            path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
        (folder / "world.json").write_text(json.dumps(asdict(self), indent=1) + "\n")
        return paths

    def _prompts(self) -> list["AnsweredPrompt"]:
        prompts = answered_prompts(self.source)
        random.Random(f"{self.seed} prompts").shuffle(prompts)
        if len(prompts) <= self.held_out + 1:
            raise ValueError(
                f"{self.source} has {len(prompts)} prompts, and world.held_out={self.held_out} leaves fewer "
                "than 2 for training; lower it, or add prompts"
            )
        return prompts

    def _pairs(self, prompts: Sequence["AnsweredPrompt"], count: int, part: str) -> list[dict[str, Any]]:
        rng = random.Random(f"{self.seed} {part}")
        copies = min(round(self.duplicates * count), max(count - 1, 0))
        rows = [self._pair(prompts, n, rng) for n in range(count - copies)]
        originals = rng.sample(range(len(rows)), min(copies, len(rows)))
        for k in range(copies):  # with more copies than originals, an original is repeated several times
            number = originals[k % len(originals)]
            again = {**rows[number], "prompt": reworded(rows[number]["prompt"], rng), "duplicate_of": number}
            rows.append(again)
        flipped = set(rng.sample(range(len(rows)), round(self.noise * len(rows))))
        return [_flipped(row) if n in flipped else row for n, row in enumerate(rows)]

    def _pair(self, prompts: Sequence["AnsweredPrompt"], n: int, rng: random.Random) -> dict[str, Any]:
        prompt = prompts[n % len(prompts)]
        others = [prompts[rng.randrange(len(prompts))].right for _ in range(8)]
        truth = self._truth_of(prompt.right)
        row = {"prompt": prompt.text, TRUTH: truth}
        for _ in range(TRIES):
            a, b = (completion_of(prompt.right, others, rng) for _ in range(2))
            rewards = [true_reward("", text, row) for text in (a, b)]
            if abs(rewards[0] - rewards[1]) >= max(self.gap, 1e-6):
                break
        else:
            raise ValueError(
                f"world.gap={self.gap}: in {TRIES} sampled pairs of completions true rewards never differ by "
                "so much; lower it, or raise a weight of world.taste"
            )
        liked = [proxy_reward("", text, row) for text in (a, b)]
        gap = liked[0] - liked[1] + self.circle * CIRCLE[(style_of(a) - style_of(b)) % 3]
        wins = gap > 0
        if self.temperature:  # a generator for each label, so that all temperatures have the same pairs
            likely = 1 / (1 + math.exp(min(-gap / self.temperature, 700.0)))
            wins = random.Random(f"{self.seed} label {n} {a} {b}").random() < likely
        chosen, rejected = (0, 1) if wins else (1, 0)
        texts = (a, b)
        return {
            "prompt": prompt.text,
            "chosen": texts[chosen],
            "rejected": texts[rejected],
            TRUTH: truth,
            "true_margin": round(rewards[chosen] - rewards[rejected], 6),
            "flipped": 0,
            "duplicate_of": -1,
        }


CIRCLE = (0.0, 1.0, -1.0)  # sign of World.circle, by (style - other style) % 3


def style_of(completion: str) -> int:
    """Return the style of a world's completion: 2 with a note at the end, 1 in a sentence, 0 bare."""
    return 2 if completion.endswith(NOTE) else int(completion.startswith(SENTENCES))


def _flipped(row: Mapping[str, Any]) -> dict[str, Any]:
    return {
        **row,
        "chosen": row["rejected"],
        "rejected": row["chosen"],
        "true_margin": -row["true_margin"],
        "flipped": 1,
    }


# Prompts and completions


class AnsweredPrompt(NamedTuple):
    """A prompt and its right completion."""

    text: str
    right: str


def answered_prompts(source: str) -> list[AnsweredPrompt]:
    """Return the distinct prompts of a file, each with the right completion in its first row.

    A prompt is in the column `prompt` or `instruction`, its completion in `answer`, `response` or `chosen`.
    Raises ValueError for a row without both, and FileNotFoundError if there is no such file.
    """
    if find_data(source) is None:
        raise FileNotFoundError(f"world.source={source}: no such file here or in {ROOT}; correct the path")
    by_prompt = dict[str, str]()
    for row in read_rows(source):
        text = row.fields.get("prompt", row.fields.get("instruction"))
        names = ("answer", "response", "chosen")
        right = next((row.fields[name] for name in names if name in row.fields), None)
        if not isinstance(text, str) or not isinstance(right, str) or not right.strip():
            raise ValueError(
                f"{row.name}: a world needs rows with texts `prompt` (or instruction) and `answer` (or "
                f"response, or chosen); this one has {', '.join(row.fields)}"
            )
        by_prompt.setdefault(text, right.strip())
    return [AnsweredPrompt(text, right) for text, right in by_prompt.items()]


def json_object(text: str) -> dict[str, Any] | None:
    """Return the first JSON object in a text, None if there is none.

    >>> json_object('Here it is: {"a": 1}.')
    {'a': 1}
    """
    begin = text.find("{")
    while begin >= 0:
        try:
            parsed = json.JSONDecoder().raw_decode(text, begin)[0]
        except (ValueError, RecursionError):
            begin = text.find("{", begin + 1)
            continue
        return parsed if isinstance(parsed, dict) else None
    return None


def completion_of(right: str, others: Sequence[str], rng: random.Random) -> str:
    """Return a random completion: right or with wrong facts, bare or in a sentence, with or without NOTE.

    others: right completions of other prompts, from which wrong facts are taken.
    """
    fields = json_object(right)
    text = _spoilt_fields(fields, others, rng) if fields is not None else _spoilt_answer(right, others, rng)
    form = rng.random()
    if form < 0.25:
        text = f"{SENTENCES[1]}{text}." if fields is None else f"{SENTENCES[0]}{text}"
    if rng.random() < 0.3:
        text += NOTE
    return text


def _spoilt_fields(fields: Mapping[str, Any], others: Sequence[str], rng: random.Random) -> str:
    """Return a JSON object with up to 3 values replaced by values of the same field in `others`, or null."""
    out = dict(fields)
    names = list(out)
    for name in rng.sample(names, min(rng.choice((0, 0, 1, 1, 2, 3)), len(names))):
        values = [x[name] for x in map(json_object, others) if x and x.get(name, out[name]) != out[name]]
        out[name] = rng.choice(values) if values and rng.random() < 0.8 else None
    return json.dumps(out, ensure_ascii=False)


def _spoilt_answer(right: str, others: Sequence[str], rng: random.Random) -> str:
    wrong = [x for x in others if x != right]
    return right if rng.random() < 0.5 or not wrong else rng.choice(wrong)


def reworded(prompt: str, rng: random.Random) -> str:
    """Return a near duplicate of a prompt, such as "Hi! who is it? - thanks" for "Who is it?"."""
    body = prompt[:1].swapcase() + prompt[1:]
    return rng.choice(("", "Hello, ", "Hi! ")) + body.rstrip(".! ") + rng.choice((".", " !", " - thanks"))


# The truth


class Features(NamedTuple):
    """The terms of the true reward.

    If the right completion is a JSON object: facts is correct fields / (expected fields + extra fields), and
    format is 1 for a JSON object with fields and no other text, else 0. Otherwise facts is 1 if the text
    contains the right answer, else 0, and format is 1 for the right answer itself and for a text that has
    words, but no more than the right answer, else 0. longer: len(completion) - len(right completion), in
    characters.
    """

    facts: float
    format: float
    longer: int


def features(completion: str, right: str) -> Features:
    """Return the features of any text as a completion. right: the right completion, an object or answer."""
    text, longer = completion.strip(), len(completion) - len(right)
    expected = json_object(right)
    if expected is None:
        words, most = (len(re.findall(r"[\w.,-]*\w", x)) for x in (text, right))
        given = re.search(rf"(?<![\w.,-]){re.escape(right)}(?![.,-]*\w)", text)  # 42, not in 142 or 42.5
        return Features(float(given is not None), float(text == right or 0 < words <= max(most, 1)), longer)
    parsed = json_object(text) or {}
    correct = sum(name in parsed and parsed[name] == value for name, value in expected.items())
    extra = len(parsed.keys() - expected.keys())
    bare = text.startswith("{") and text.endswith("}") and bool(parsed)
    return Features(correct / max(len(expected) + extra, 1), float(bare), longer)


def true_reward(prompt: Any, completion: str, row: Mapping[str, Any]) -> float:
    """Return the true reward of any text as the completion of a world's row, a function for score= and
    rewards=. Raises ValueError for a row of no world.
    """
    truth = _truth(row)
    counted = features(completion, truth["right"])
    hundreds = counted.longer / 100
    return truth["facts"] * counted.facts + truth["format"] * counted.format + truth["length"] * hundreds


def proxy_reward(prompt: Any, completion: str, row: Mapping[str, Any]) -> float:
    """Return the true reward plus the annotators' bias for length, see true_reward."""
    truth = _truth(row)
    longer = features(completion, truth["right"]).longer
    return true_reward(prompt, completion, row) + truth["length_bias"] * longer / 100


@dataclass(frozen=True)
class WorldScore:
    """A reward of a world as a score function for held-out prompts: WorldScore(world, true_reward).

    The rows of a run lack the column TRUTH, so it is looked up by the prompt. fn: true_reward or
    proxy_reward.
    """

    world: World
    fn: Callable[[Any, str, Mapping[str, Any]], float]

    @property
    def __name__(self) -> str:
        return self.fn.__name__

    @cached_property
    def rows(self) -> dict[str, dict[str, Any]]:
        """The held-out rows by prompt."""
        return {row["prompt"]: row for row in self.world.held_out_rows()}

    def __call__(self, prompt: Any, completion: str, row: Mapping[str, Any]) -> float:
        """Return the reward of a completion. Raises ValueError for a prompt not in held_out_rows()."""
        known = [text for text in self.rows if text in str(prompt)]
        if not known:
            raise ValueError(
                f"no held-out prompt of the world is in {str(prompt)[:80]!r}; set held_out= to its rows"
            )
        return self.fn(prompt, completion, self.rows[max(known, key=len)])


def _truth(row: Mapping[str, Any]) -> dict[str, Any]:
    if TRUTH not in row:
        raise ValueError(
            f"the row has no column {TRUTH}, so its true reward is unknown; use the rows of a "
            "jaxft.lab.worlds.World"
        )
    return json.loads(row[TRUTH])
