"""Judges of models' answers: functions, reward models, language models and servers; and readers of files of
jaxft, AlpacaEval, Arena-Hard and RewardBench 2.
"""

import concurrent.futures
import hashlib
import json
import os
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import jax
import numpy as np

from jaxft.data.rows.dataset_rows import read_rows
from jaxft.data.rows.format_choice import prompt_of
from jaxft.data.rows.remote_files import without_secrets
from jaxft.data.rows.row_files import Row
from jaxft.distributed import sharding
from jaxft.lab.judging import Judge, Match, Verdicts, in_both_orders, values_of, values_of_scores
from jaxft.rl.reward_models import is_classifier, load_reward_model, make_text_scorer
from jaxft.runs.loaded_weights import named_weights, source_options
from jaxft.runs.settings.setting_values import load_callable
from jaxft.runs.terminal import printable_line
from jaxft.train.evaluate.scored_completions import score_texts
from jaxft.train.python_api import load_model
from jaxft.weights.peft.peft_config import read_adapter_config
from jaxft.weights.peft.peft_read import SEQ_CLS

KEY = "OPENAI_API_KEY"  # the environment variable with the key of a server
REPLY_RETRIES = 5
PAUSE = 1.0  # seconds before the first retry; doubled before each further one
REPLY_SECONDS = 120.0  # seconds for a reply


class Replies(NamedTuple):
    """Settings of a judge that writes text.

    max_new: the most tokens of a reply. The rest is for servers. budget: the most requests, without those in
    the cache; None for no limit. workers: requests at the same time. cache: file of replies, None for none.
    """

    max_new: int = 512
    budget: int | None = None
    workers: int = 8
    cache: Path | None = None


@dataclass(frozen=True)
class FunctionJudge:
    """A function (prompt, completion, row) -> score, as for rewards; the higher score wins."""

    name: str
    function: Callable[..., float]

    def compare(self, matches: Sequence[Match]) -> Verdicts:
        """Return the verdicts on matches, NaN where a score is missing. Raises ValueError if the function
        returns no score for any of the first model's answers.
        """
        prompts, rows = [m.prompt for m in matches], [(m.name, m.columns) for m in matches]
        one, other = (
            score_texts([self.function], prompts, texts, rows, 1)[0]
            for texts in ([m.one for m in matches], [m.other for m in matches])
        )
        if np.isnan(one.values).all():
            raise ValueError(f"judge {self.name} returns no score: {one.fault}; correct the function")
        return values_of_scores(one.values[:, 0], other.values[:, 0])


@dataclass(frozen=True)
class RewardJudge:
    """A reward model; the higher reward wins. ref: a classifier with one label or, with `adapter`, the base
    of this adapter, which has a head. max_length: the most tokens of a prompt with its answer.
    """

    name: str
    ref: str
    adapter: Path | None = None
    max_length: int = 2048

    def compare(self, matches: Sequence[Match]) -> Verdicts:
        """Return the verdicts on matches, NaN for texts of more than max_length tokens."""
        mesh = sharding.make_mesh(sharding.MeshShape())
        with jax.set_mesh(mesh):
            loaded = load_reward_model(self.ref, mesh, self.adapter)
            score = make_text_scorer(loaded, mesh, self.ref, self.adapter, self.max_length)
            prompts = [prompt_of(Row(m.name, {"prompt": m.prompt}), "auto") for m in matches]
            return values_of_scores(
                score(prompts, [m.one for m in matches]), score(prompts, [m.other for m in matches])
            )


@dataclass(frozen=True)
class ModelJudge:
    """A language model on this machine, asked in both orders with greedy replies."""

    name: str
    ref: str
    replies: Replies = Replies()

    def compare(self, matches: Sequence[Match]) -> Verdicts:
        """Return the verdicts on matches. Raises ValueError if most replies have none."""
        questions = in_both_orders(matches)
        replies = load_model(self.ref).generate(questions, max_new=self.replies.max_new)
        return values_of(replies, self.name)


@dataclass(frozen=True)
class ServerJudge:
    """A model behind an OpenAI-compatible server, asked in both orders at temperature 0.

    url: up to and including /v1. name: the model's. pause: seconds before the first retry of a failed
    request. Replies are stored in replies.cache, so that no request is sent twice, also after an
    interruption. The key is read from the environment variable OPENAI_API_KEY and stored nowhere.
    """

    url: str
    name: str
    replies: Replies = Replies()
    pause: float = PAUSE

    def compare(self, matches: Sequence[Match]) -> Verdicts:
        """Return the verdicts on matches.

        Raises ValueError if more requests than the budget are needed, before any is sent; if a request fails;
        and if most replies have no verdict.
        """
        shared = {"model": self.name, "temperature": 0, "max_tokens": self.replies.max_new}
        requests = [{**shared, "messages": messages} for messages in in_both_orders(matches)]
        cache = ReplyCache(self.replies.cache)
        new = {key: body for body in requests if (key := request_key(self.url, body)) not in cache.replies}
        budget = self.replies.budget
        if budget is not None and len(new) > budget:
            raise ValueError(
                f"--budget {budget}: {len(new)} requests to {self.name} are needed "
                f"({len(requests) - len(new)} are in the cache); raise --budget, or use fewer prompts"
            )
        with concurrent.futures.ThreadPoolExecutor(self.replies.workers) as pool:
            waiting = {pool.submit(self._reply, body): key for key, body in new.items()}
            try:
                for done in concurrent.futures.as_completed(waiting):
                    cache.add(waiting[done], done.result())
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
        return values_of([cache.replies[request_key(self.url, body)] for body in requests], self.name)

    def _reply(self, body: dict[str, Any]) -> str:
        """Send a request and return the reply's text. Retry after HTTP errors 429 and 5xx, failed connections
        and invalid JSON; raise ValueError for other errors, and after REPLY_RETRIES retries.
        """
        url = self.url.rstrip("/") + "/chat/completions"
        headers = {"Content-Type": "application/json"}
        if os.environ.get(KEY):
            headers["Authorization"] = f"Bearer {os.environ[KEY]}"
        for attempt in range(REPLY_RETRIES + 1):
            try:
                request = urllib.request.Request(url, json.dumps(body).encode(), headers)
                with urllib.request.urlopen(request, timeout=REPLY_SECONDS) as response:
                    return _text_of(json.load(response), url)
            except urllib.error.HTTPError as error:
                text = printable_line(error.read(400).decode("utf-8", "replace"))
                if attempt == REPLY_RETRIES or (error.code != 429 and error.code < 500):
                    text = f"error {error.code}: {text}; check the URL, the model and OPENAI_API_KEY"
                    raise ValueError(f"{without_secrets(url)}: {text}") from error
            except (OSError, json.JSONDecodeError) as error:
                if attempt == REPLY_RETRIES:
                    text = f"{printable_line(str(error))}; check the URL, and that the server is running"
                    raise ValueError(f"{without_secrets(url)}: {text}") from error
            time.sleep(self.pause * 2**attempt)
        raise AssertionError("the last attempt returns or raises")


def _text_of(response: Any, url: str) -> str:
    """Return the text of a response. Raises ValueError if it has no choices[0].message.content."""
    try:
        return str(response["choices"][0]["message"]["content"] or "")
    except (KeyError, IndexError, TypeError) as error:
        raise ValueError(
            f"{without_secrets(url)}: the response has no choices[0].message.content; check the URL and the "
            f"model: {printable_line(json.dumps(response))[:200]}"
        ) from error


def request_key(url: str, body: dict[str, Any]) -> str:
    """Return the hash of a request, the key of its reply in the cache."""
    return hashlib.sha256(json.dumps([url.rstrip("/"), body], sort_keys=True).encode()).hexdigest()


@dataclass
class ReplyCache:
    """Replies by request_key, in memory and, with a path, in a file of JSON lines. Invalid lines, such as a
    half-written one, are ignored.
    """

    path: Path | None
    replies: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.path is None or not self.path.is_file():
            return
        for line in self.path.read_text(encoding="utf-8").splitlines():
            try:
                entry = json.loads(line)
                self.replies[entry["request"]] = entry["reply"]
            except (ValueError, KeyError, TypeError):
                continue

    def add(self, key: str, reply: str) -> None:
        """Store a reply, on disk at once."""
        self.replies[key] = reply
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"request": key, "reply": reply}) + "\n")


def find_judge(text: str, functions: dict[str, str], replies: Replies) -> Judge:
    """Return the judge that a value of `--by` names.

    text: http(s)://HOST/v1#MODEL for a server; a name in `functions`, or file.py:name, for a function; a run,
    folder or model, which is a RewardJudge if it has a classifier's head, else a ModelJudge. A server's
    replies are stored in $JAXFT_CACHE/judge, by default ~/.cache/jaxft/judge. functions: short name ->
    file.py:name. Raises ValueError or FileNotFoundError for other texts.
    """
    if text.startswith(("http://", "https://")):
        url, _, model = text.partition("#")
        if not model or not urlsplit(url).hostname:
            raise ValueError(f"--by {without_secrets(text)}: expected http(s)://HOST/v1#MODEL")
        folder = Path(os.environ.get("JAXFT_CACHE") or "~/.cache/jaxft").expanduser() / "judge"
        name = hashlib.sha256(f"{url.rstrip('/')}#{model}".encode()).hexdigest()[:16]
        return ServerJudge(url, model, replies._replace(cache=folder / f"{name}.jsonl"))
    if text in functions or (":" in text and ".py" in text):
        function = load_callable(functions.get(text, text))
        if not callable(function):
            raise ValueError(
                f"--by {text}: got a {type(function).__name__}; name a function (prompt, completion, row) -> "
                "float"
            )
        return FunctionJudge(text, function)
    named = named_weights(**source_options(text))
    name = Path(text).name
    adapter = named.adapter
    if is_classifier(named.ref) if adapter is None else read_adapter_config(adapter)["task_type"] == SEQ_CLS:
        return RewardJudge(name, named.ref, adapter)
    return ModelJudge(name, text, replies)


ANSWER_FILES = (".jsonl", ".json", ".csv", ".tsv", ".parquet")
TIES_SUBSET = "Ties"  # the subset of RewardBench 2 whose rows have several right answers
QUESTION_COLUMNS = ("prompt", "instruction", "question")
TEXT_COLUMNS = ("completion", "response", "output", "answer")
NAME_COLUMNS = ("uid", "question_id", "id")  # columns that name a prompt


class ModelAnswers(NamedTuple):
    """A model's answers in the order of the file. texts: name of the prompt -> answer. named: whether a
    column has the names; else they are file:line. prompts: name -> prompt, None if a row lacks its prompt.
    """

    texts: dict[str, str]
    named: bool
    prompts: dict[str, Any] | None = None


class JudgedPrompts(NamedTuple):
    """Prompts in the order of a file. texts: name -> prompt, a string or a list of messages. columns: name ->
    columns of the row. named: whether a column has the names; else they are file:line.
    """

    texts: dict[str, Any]
    columns: dict[str, dict[str, Any]]
    named: bool


class BenchmarkRow(NamedTuple):
    """A row of a reward benchmark: every chosen answer should win against every rejected one. subset: the
    part of the benchmark that it belongs to.
    """

    name: str
    subset: str
    prompt: Any
    chosen: list[str]
    rejected: list[str]


def read_judged_prompts(ref: str) -> JudgedPrompts:
    """Read prompts from the columns `prompt`, `instruction`, `question`, `messages` (without a last
    assistant's turn) or Arena-Hard's `turns`.

    Raises ValueError, which names the file and row, for a row without any of them and for a repeated name.
    """
    rows = read_rows(ref)
    names, named = _names(rows)
    return JudgedPrompts(
        {name: _prompt(row) for name, row in zip(names, rows, strict=True)},
        {name: dict(row.fields) for name, row in zip(names, rows, strict=True)},
        named,
    )


def read_answers(ref: str) -> ModelAnswers:
    """Read answers from the columns `completion`, `response`, `output` or `answer`, the last turn of
    `messages`, or Arena-Hard's `choices`.

    Raises ValueError, which names the file and row, for a row without any of them and for a repeated name.
    """
    rows = read_rows(ref)
    names, named = _names(rows)
    prompts = {name: _prompt(row) for name, row in zip(names, rows, strict=True) if _has_prompt(row)}
    texts = {name: _answer(row) for name, row in zip(names, rows, strict=True)}
    return ModelAnswers(texts, named, prompts if len(prompts) == len(texts) else None)


def answers_of(ref: str, prompts: JudgedPrompts, max_new: int) -> ModelAnswers:
    """Return a model's answers. ref: a file of answers, or a run or model that completes the prompts greedily
    with at most max_new tokens.
    """
    if Path(ref).suffix in ANSWER_FILES:
        return read_answers(ref)
    texts = load_model(ref).generate(list(prompts.texts.values()), max_new=max_new)
    return ModelAnswers(dict(zip(prompts.texts, texts, strict=True)), True)


def matches_of(
    prompts: JudgedPrompts, one: ModelAnswers, other: ModelAnswers, files: Sequence[str]
) -> list[Match]:
    """Return a match for each prompt. Answers are matched to prompts by name if both files have names, else
    by the prompts in the answers' rows or, if rows have none, by position.

    files: names of `one` and `other` for errors. Raises ValueError if an answer is missing or ambiguous.
    """
    by_name = []
    for answers, file in zip((one, other), files, strict=True):
        if answers.named and prompts.named:
            missing = [name for name in prompts.texts if name not in answers.texts]
            if missing:
                count = f"{len(missing)} of {len(prompts.texts)} prompts"
                raise ValueError(
                    f"{file}: {count} have no answer, such as {missing[0]}; add an answer for every prompt"
                )
            by_name.append(answers.texts)
        elif len(answers.texts) != len(prompts.texts):
            raise ValueError(
                f"{file} has {len(answers.texts)} answers for {len(prompts.texts)} prompts; give one per "
                f"prompt, or add a column {' or '.join(NAME_COLUMNS)} to both files"
            )
        else:
            by_name.append(_in_order_of_prompts(prompts.texts, answers, file))
    first, second = by_name
    return [
        Match(name, prompt, first[name], second[name], prompts.columns[name])
        for name, prompt in prompts.texts.items()
    ]


def _in_order_of_prompts(prompts: Mapping[str, Any], answers: ModelAnswers, file: str) -> dict[str, str]:
    """Return prompt name -> answer, matched by the prompts in the answers' rows or, if rows have none, by
    position. There are as many answers as prompts.
    """
    in_order = dict(zip(prompts, answers.texts.values(), strict=True))
    if answers.prompts is None:
        return in_order
    expected, given = ([_text(prompt) for prompt in x.values()] for x in (prompts, answers.prompts))
    if expected == given:
        return in_order
    by_text = dict(zip(given, answers.texts.values(), strict=True))
    missing = [name for name, text in zip(prompts, expected, strict=True) if text not in by_text]
    if missing or len(by_text) < len(given):
        reason = f"no answer has the prompt of {missing[0]}" if missing else "some of them occur twice"
        raise ValueError(
            f"{file}: its prompts are not in the order of the judged prompts, and {reason}; use answers to "
            f"the same prompts, or add a column {' or '.join(NAME_COLUMNS)} to both files"
        )
    return {name: by_text[text] for name, text in zip(prompts, expected, strict=True)}


def _text(prompt: Any) -> str:
    """Return a prompt as text to compare: a string or the text of a single message, stripped; else JSON."""
    if isinstance(prompt, list) and len(prompt) == 1:
        prompt = prompt[0].get("content")
    return prompt.strip() if isinstance(prompt, str) else json.dumps(prompt, sort_keys=True)


def read_preferences(ref: str) -> list[BenchmarkRow]:
    """Read rows like RewardBench 2's: `prompt`; `chosen` and `rejected`, a text or a list of texts each;
    `subset`, by default "all".

    Raises ValueError, which names the file and row, for a row that lacks one of the first three.
    """
    rows = []
    for row in read_rows(ref):
        chosen, rejected = (_texts(row, column) for column in ("chosen", "rejected"))
        rows.append(
            BenchmarkRow(row.name, str(row.fields.get("subset", "all")), _prompt(row), chosen, rejected)
        )
    return rows


def preference_matches(rows: Sequence[BenchmarkRow]) -> list[Match]:
    """Return a match of each chosen with each rejected answer of each row, in the order of the rows."""
    return [
        Match(row.name, row.prompt, chosen, rejected, {})
        for row in rows
        for chosen in row.chosen
        for rejected in row.rejected
    ]


def accuracy_by_subset(rows: Sequence[BenchmarkRow], values: Sequence[float]) -> dict[str, tuple[int, int]]:
    """Return subset -> (rows in which every chosen answer wins against every rejected one, all rows).

    values: of each match in preference_matches(rows). A tie or a missing verdict counts as lost; RewardBench
    2 counts 1 / n if n answers have the highest score. RewardBench 2 also scores margins in its subset Ties;
    this function does not.
    """
    counts: dict[str, tuple[int, int]] = {}
    at = 0
    for row in rows:
        count = len(row.chosen) * len(row.rejected)
        right = all(value > 0.5 for value in values[at : at + count])
        at += count
        before = counts.get(row.subset, (0, 0))
        counts[row.subset] = before[0] + right, before[1] + 1
    return counts


def _names(rows: Sequence[Row]) -> tuple[list[str], bool]:
    """Return (names of rows, whether they are from a column in NAME_COLUMNS, which all rows must have).
    Raises ValueError for two equal names.
    """
    column = next((c for c in NAME_COLUMNS if all(c in row.fields for row in rows)), None)
    if column is None:
        return [row.name for row in rows], False
    names = [str(row.fields[column]) for row in rows]
    seen: dict[str, str] = {}
    for row, name in zip(rows, names, strict=True):
        if name in seen:
            raise ValueError(f"{row.name}: has the same {column} {name!r} as {seen[name]}; remove one")
        seen[name] = row.name
    return names, True


def _has_prompt(row: Row) -> bool:
    try:
        return bool(_prompt(row))
    except ValueError:
        return False


def _prompt(row: Row) -> Any:
    fields = row.fields
    if column := next((c for c in QUESTION_COLUMNS if isinstance(fields.get(c), str | list)), None):
        return fields[column]
    turns = fields.get("turns")
    if isinstance(turns, list) and turns and isinstance(turns[0], Mapping):
        return str(turns[0].get("content", ""))
    if isinstance(messages := fields.get("messages"), list) and messages:
        return messages[:-1] if messages[-1].get("role") == "assistant" else messages
    columns = ", ".join(QUESTION_COLUMNS)
    raise ValueError(f"{row.name}: no prompt in the columns {columns}, messages or turns; add one")


def _answer(row: Row) -> str:
    fields = row.fields
    if column := next((c for c in TEXT_COLUMNS if isinstance(fields.get(c), str)), None):
        return fields[column]
    for outer, inner in (("messages", None), ("choices", "turns")):  # Arena-Hard's releases: 2, then 1
        turns = fields.get(outer)
        if inner and isinstance(turns, list) and turns and isinstance(turns[0], Mapping):
            turns = turns[0].get(inner)
        if isinstance(turns, list) and turns and isinstance(turns[-1], Mapping):
            content = turns[-1].get("content")
            content = content.get("answer") if isinstance(content, Mapping) else content
            if isinstance(content, str):
                return content
    columns = ", ".join(TEXT_COLUMNS)
    raise ValueError(f"{row.name}: no text in the columns {columns}, messages or choices; add one")


def _texts(row: Row, column: str) -> list[str]:
    value = row.fields.get(column)
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or not texts or not all(isinstance(text, str) for text in texts):
        raise ValueError(
            f"{row.name}: {column} is {value!r:.60}; expected a text or a non-empty list of texts"
        )
    return texts
