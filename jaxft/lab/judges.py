"""Judges of answers: functions, reward models, and models that are asked, on this machine or a server."""

import concurrent.futures
import hashlib
import json
import os
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import jax

from jaxft.data.rows.conversation import prompt_of
from jaxft.data.rows.dataset_rows import Row
from jaxft.data.rows.remote import without_secrets
from jaxft.distributed import sharding
from jaxft.lab.judging import Judge, Match, Verdicts, in_both_orders, values_of, values_of_scores
from jaxft.rl.reward_models import is_classifier, load_reward_model, make_text_scorer
from jaxft.runs.loaded_weights import named_weights
from jaxft.runs.settings.setting_values import load_callable
from jaxft.runs.terminal import printable_line
from jaxft.train.evaluate.scored_completions import score_texts
from jaxft.train.python_api import load_model, source_options
from jaxft.weights.peft.peft_config import read_adapter_config
from jaxft.weights.peft.peft_read import SEQ_CLS

KEY = "OPENAI_API_KEY"  # the variable with the key of a server
REPLY_RETRIES = 5
PAUSE = 1.0  # seconds before the first retry; doubled for each further one
REPLY_SECONDS = 120.0  # seconds for a reply


class Replies(NamedTuple):
    """How a judge that writes text is asked. max_new: tokens of a reply. budget: the most requests to a
    server that are not in the cache, None for any number. workers: requests at the same time.
    """

    max_new: int = 512
    budget: int | None = None
    workers: int = 8
    cache: Path | None = None


@dataclass(frozen=True)
class FunctionJudge:
    """A function of (prompt, completion, row), as for rewards; the higher score wins."""

    name: str
    function: Callable[..., float]

    def compare(self, matches: Sequence[Match]) -> Verdicts:
        """Return the values of each match. A score that is missing gives no verdict."""
        prompts, rows = [m.prompt for m in matches], [(m.name, m.columns) for m in matches]
        one, other = (
            score_texts([self.function], prompts, texts, rows, 1)[0].values[:, 0]
            for texts in ([m.one for m in matches], [m.other for m in matches])
        )
        return values_of_scores(one, other)


@dataclass(frozen=True)
class RewardJudge:
    """A reward model: a classifier with one label, or an adapter with a head; the higher reward wins."""

    name: str
    ref: str
    adapter: Path | None = None
    max_length: int = 2048

    def compare(self, matches: Sequence[Match]) -> Verdicts:
        """Return the values of each match. Texts above max_length have no verdict."""
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
        """Return the values of each match. Raises ValueError if most replies name no answer."""
        questions = in_both_orders(matches)
        replies = load_model(self.ref).generate(questions, max_new=self.replies.max_new)
        return values_of(replies, self.name)


@dataclass(frozen=True)
class ServerJudge:
    """A model behind an OpenAI-compatible server, asked in both orders at temperature 0.

    url: up to and including /v1. Replies are stored in a file, so that a judgement that was interrupted
    continues, and a repeated one costs nothing. The key is read from OPENAI_API_KEY and stored nowhere.
    """

    url: str
    model: str
    replies: Replies = Replies()
    pause: float = PAUSE

    @property
    def name(self) -> str:
        """The model's name."""
        return self.model

    def compare(self, matches: Sequence[Match]) -> Verdicts:
        """Return the values of each match.

        Raises ValueError if the server refuses a request and, before anything is asked, if more requests are
        needed than the budget allows.
        """
        requests = [self._body(messages) for messages in in_both_orders(matches)]
        cache = ReplyCache(self.replies.cache)
        new = {key: body for body in requests if (key := request_key(self.url, body)) not in cache.replies}
        budget = self.replies.budget
        if budget is not None and len(new) > budget:
            raise ValueError(
                f"--budget {budget}: {len(new)} requests to {self.model} are needed "
                f"({len(requests) - len(new)} are in the cache); raise it, or use fewer prompts"
            )
        with concurrent.futures.ThreadPoolExecutor(self.replies.workers) as pool:
            waiting = {pool.submit(self._reply, body): key for key, body in new.items()}
            try:
                for done in concurrent.futures.as_completed(waiting):
                    cache.add(waiting[done], done.result())
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
        return values_of([cache.replies[request_key(self.url, body)] for body in requests], self.model)

    def _body(self, messages: list[dict[str, str]]) -> dict[str, Any]:
        return {
            "model": self.model,
            "messages": messages,
            "temperature": 0,
            "max_tokens": self.replies.max_new,
        }

    def _reply(self, body: dict[str, Any]) -> str:
        """Ask once, and again after errors that may pass: 429, 5xx and failed connections."""
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
                    raise ValueError(f"{without_secrets(url)}: error {error.code}: {text}") from error
            except (OSError, json.JSONDecodeError) as error:
                if attempt == REPLY_RETRIES:
                    raise ValueError(f"{without_secrets(url)}: {printable_line(str(error))}") from error
            time.sleep(self.pause * 2**attempt)
        raise AssertionError("the last attempt returns or raises")


def _text_of(response: Any, url: str) -> str:
    """Return the text of a response. Raises ValueError if it has none in the documented place."""
    try:
        return str(response["choices"][0]["message"]["content"] or "")
    except (KeyError, IndexError, TypeError) as error:
        raise ValueError(
            f"{without_secrets(url)}: the response has no choices[0].message.content: "
            f"{printable_line(json.dumps(response))[:200]}"
        ) from error


def request_key(url: str, body: dict[str, Any]) -> str:
    """Return the hash of a request, which names its reply in the cache."""
    return hashlib.sha256(json.dumps([url.rstrip("/"), body], sort_keys=True).encode()).hexdigest()


@dataclass
class ReplyCache:
    """Replies by the hash of their request, in a file of JSON lines. A half-written last line is ignored."""

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
    """Return the judge that `--by` names.

    text: http(s)://HOST/v1#MODEL for a server; the short name of a function or file.py:name; the run or
    folder of a reward model; or a model that is asked. Raises ValueError for one that is none of these.
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
            raise ValueError(f"--by {text}: not a function (prompt, completion, row) -> float; name one")
        return FunctionJudge(text, function)
    named = named_weights(**source_options(text))
    name = Path(text).name
    adapter = named.adapter
    if is_classifier(named.ref) if adapter is None else read_adapter_config(adapter)["task_type"] == SEQ_CLS:
        return RewardJudge(name, named.ref, adapter)
    return ModelJudge(name, text, replies)
