"""/v1/decisions: typed questions about an input, answered by the probabilities of their choices; /v1/rerank:
documents ordered by their relevance to a query.

The contract is OpenAI's Decisions API as vLLM serves it (docs/serving/online_serving/decisions.md of vLLM),
for text. A question becomes the prompt of a decision row (data/decisions.py), and its probabilities are read
from the scores of one next token.

    {"model": "base", "input": "The parcel arrived broken.", "questions": [
        {"type": "predicate", "instructions": "Is an item damaged?"},
        {"type": "choice", "name": "team", "instructions": "Who handles it?", "choices": [
            {"value": "returns"}, {"value": "billing", "description": "Charges and payments"}]},
        {"type": "score", "instructions": "How severe is it?", "levels": [{"label": "cosmetic"},
            {"label": "broken"}]}]}
"""

import math
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from jaxft.data.decisions import LABEL_QUESTION, DecisionPrompts, decide, relevance, user_messages
from jaxft.data.rows.example import Decision, DecisionChoice
from jaxft.data.rows.invalid_rows import InvalidRow, json_type, similar_names
from jaxft.engine.sampling import Sampling
from jaxft.engine.scheduler import SampledToken, TokenRequest
from jaxft.engine.session import RequestSettings
from jaxft.engine.state import WORD
from jaxft.serve.openai_api import ApiError
from jaxft.serve.served_models import ServedModel, decision_prompt

MOST_QUESTIONS, MOST_LEVELS, MOST_DOCUMENTS = 64, 10, 1000
RERANK_FIELDS = ("model", "query", "documents", "instruction", "top_n", "return_documents")
BODY_FIELDS = ("model", "input", "questions", "safety_identifier")
# Type of a question -> (field that lists its options, field that names an option); None: yes or no.
QUESTION_OPTIONS = {"predicate": None, "choice": ("choices", "value"), "score": ("levels", "label")}
YES_NO = (DecisionChoice("yes"), DecisionChoice("no"))


@dataclass(frozen=True)
class Question:
    """A question of a request. type: predicate, choice or score. name: the question's name in the request,
    which the response repeats; None without a name. decision: the question's prompt and choices.
    """

    type: str
    name: str | None
    decision: Decision


def parse_decisions(body: Mapping[str, Any], known: DecisionPrompts) -> tuple[Question, ...]:
    """Return the questions of a request of /v1/decisions. Raises ApiError.

    known: the served model's labels and question. If it has labels, a question of type choice that has
    neither choices nor instructions gets them.
    """
    _check_fields(body, BODY_FIELDS, "")
    items = body.get("questions")
    if not isinstance(items, list) or not 1 <= len(items) <= MOST_QUESTIONS:
        shown = f"questions must be a list of 1 to {MOST_QUESTIONS} questions, got {items!r:.40}"
        raise ApiError(400, shown, "questions")
    text = _input(body.get("input"))
    choices = [{"value": label} for label in known.labels]
    default = {"choices": choices, "instructions": known.question or LABEL_QUESTION}
    questions = []
    for number, item in enumerate(items):
        is_choice = isinstance(item, dict) and item.get("type") == "choice"
        is_own = known.labels and is_choice and item.keys() <= {"type", "name"}
        questions.append(_question(text, number, {**item, **default} if is_own else item))
    return tuple(questions)


def _check_fields(item: Mapping[str, Any], names: Sequence[str], where: str) -> None:
    wrong = next((name for name in item if name not in names), None)
    if wrong is not None:
        near = ", ".join(similar_names(wrong, list(names)))
        place = f"{where}: " if where else ""
        raise ApiError(400, f"{place}unknown field {wrong!r:.60}; near: {near}", where or wrong[:60])


def _input(value: Any) -> str:
    """Return the text of an input: a string, or user messages of strings or input_text parts."""
    if isinstance(value, str):
        return value
    if not isinstance(value, list) or not value:
        raise ApiError(400, f"input must be a string or a list of user messages, got {value!r:.40}", "input")
    texts = list[str]()
    for item in value:
        if not isinstance(item, dict) or item.get("role") != "user":
            raise ApiError(400, f"input: every message must have the role user, got {item!r:.40}", "input")
        content = item.get("content")
        parts = [{"type": "input_text", "text": content}] if isinstance(content, str) else content
        if not isinstance(parts, list) or not all(
            isinstance(x, dict) and x.get("type") == "input_text" and isinstance(x.get("text"), str)
            for x in parts
        ):
            shown = f"input: content must be a string or parts of type input_text, got {parts!r:.60}"
            raise ApiError(400, shown, "input")
        texts += [part["text"] for part in parts]
    return "\n\n".join(texts)


def _question(text: str, number: int, item: Any) -> Question:
    where = f"questions[{number}]"
    if not isinstance(item, dict):
        raise ApiError(400, f"{where} must be an object, got {item!r:.40}", "questions")
    kind = item.get("type")
    if not isinstance(kind, str) or kind not in QUESTION_OPTIONS:
        wrong = f"type={kind!r:.40} is not possible" if "type" in item else "type is missing"
        raise ApiError(400, f"{where}: {wrong}; use {', '.join(QUESTION_OPTIONS)}", "questions")
    options = QUESTION_OPTIONS[kind]
    _check_fields(item, ("type", "name", "instructions", *(options[:1] if options else ())), where)
    instructions, name = item.get("instructions"), item.get("name")
    if not isinstance(instructions, str) or not instructions.strip():
        raise ApiError(400, f"{where}: instructions must be text, got {instructions!r:.40}", "questions")
    if not isinstance(name, str | None):
        raise ApiError(400, f"{where}: name must be a string, got {json_type(name)}", "questions")
    choices = YES_NO if options is None else _options(where, item.get(options[0]), *options)
    if kind == "score" and len(choices) > MOST_LEVELS:
        raise ApiError(400, f"{where}: {len(choices)} levels; use at most {MOST_LEVELS} levels", "questions")
    messages = user_messages(f"{text}\n\n{instructions}" if text.strip() else instructions)
    try:
        return Question(kind, name, decide(where, messages, choices))
    except InvalidRow as error:
        raise ApiError(400, str(error), "questions") from error


def _options(where: str, items: Any, field: str, key: str) -> tuple[DecisionChoice, ...]:
    """Return the choices of a question (`items` of the field "choices", key "value") or its levels ("levels",
    "label"). where: the question, such as questions[0], for errors.
    """
    if not isinstance(items, list):
        raise ApiError(400, f"{where}: {field} must be a list, not {json_type(items)}", "questions")
    options, types = [], (str, bool) if key == "value" else str
    for number, item in enumerate(items):
        place = f"{where}.{field}[{number}]"
        if not isinstance(item, dict) or not isinstance(item.get(key), types) or not str(item[key]).strip():
            raise ApiError(400, f"{place}: {key} must be a string with text, got {item!r:.40}", "questions")
        _check_fields(item, (key, "description"), place)
        description = item.get("description") or ""
        if not isinstance(description, str):
            raise ApiError(400, f"{place}: description must be text, got {description!r:.40}", "questions")
        options.append(DecisionChoice(item[key], description))
    return tuple(options)


# ---- /v1/rerank


@dataclass(frozen=True)
class RerankBody:
    """A request of /v1/rerank. decisions: for each document, the question whether it is relevant. most: the
    most results in the response. with_texts: whether a result repeats its document's text.
    """

    documents: tuple[str, ...]
    decisions: tuple[Decision, ...]
    most: int
    with_texts: bool = True


def parse_rerank(body: Mapping[str, Any], known: DecisionPrompts) -> RerankBody:
    """Check a request of /v1/rerank. known.question replaces a missing `instruction`. Raises ApiError."""
    _check_fields(body, RERANK_FIELDS, "")
    query, items = body.get("query"), body.get("documents")
    if not isinstance(query, str) or not query.strip():
        raise ApiError(400, f"query must be a string with text, got {query!r:.40}", "query")
    texts = [x.get("text") if isinstance(x, dict) else x for x in items] if isinstance(items, list) else []
    if not 1 <= len(texts) <= MOST_DOCUMENTS or not all(isinstance(x, str) and x.strip() for x in texts):
        shown = f"documents must be a list of 1 to {MOST_DOCUMENTS} strings with text"
        raise ApiError(400, shown, "documents")
    most, with_texts = body.get("top_n"), body.get("return_documents")
    most, with_texts = len(texts) if most is None else most, True if with_texts is None else with_texts
    if isinstance(most, bool) or not isinstance(most, int) or most < 1:
        raise ApiError(400, f"top_n must be a whole number of at least 1, got {most!r:.40}", "top_n")
    if not isinstance(with_texts, bool):
        raise ApiError(400, f"return_documents={with_texts!r:.40}; use true or false", "return_documents")
    instruction = body.get("instruction")
    if not isinstance(instruction, str | None):
        raise ApiError(400, f"instruction must be a string, got {json_type(instruction)}", "instruction")
    documents, instruction = tuple(map(str, texts)), instruction or known.question
    asked = (relevance(f"documents[{n}]", query, text, instruction) for n, text in enumerate(documents))
    return RerankBody(documents, tuple(asked), most, with_texts)


def ranked(model: str, body: RerankBody, scores: Sequence[float], tokens: int) -> dict[str, Any]:
    """Return the response to a request of /v1/rerank, whose results begin with the most relevant document.
    scores: the probability of each document that it is relevant. tokens: tokens of all prompts together.
    """
    order = sorted(range(len(scores)), key=lambda number: -scores[number])[: body.most]
    texts = {i: {"document": {"text": body.documents[i]}} if body.with_texts else {} for i in order}
    results = [{"index": i, **texts[i], "relevance_score": scores[i]} for i in order]
    usage = {"prompt_tokens": tokens, "total_tokens": tokens}
    return {"id": f"rerank-{secrets.token_hex(12)}", "model": model, "usage": usage, "results": results}


# ---- reading the probabilities


@dataclass(frozen=True)
class OneOf:
    """Constrains a completion to one token, which must be one of `tokens`. It has the methods of both
    constraint.Grammar and constraint.Constraint, because it has no state.
    """

    tokens: tuple[int, ...]
    vocab: int

    def begin(self) -> "OneOf":
        """Return itself, which serves any number of completions."""
        return self

    def allowed(self) -> np.ndarray:
        """Return a bit mask of tokens: bit i % 32 of word i // 32 is set if token i is in `tokens`."""
        words = np.zeros(-(-self.vocab // WORD), np.uint32)
        for token in self.tokens:
            words[token // WORD] |= np.uint32(1) << np.uint32(token % WORD)
        return words

    def accept(self, tokens: Sequence[int]) -> str:
        """Return "", since no token leads to an error."""
        return ""


@dataclass(frozen=True)
class Read:
    """A decision as a request for one token, whose log-probs answer it. tokens: token id of each choice."""

    request: TokenRequest
    tokens: tuple[int, ...]


def read_of(model: ServedModel, decision: Decision, most: int) -> Read:
    """Return a decision as a request for one token. Raises ValueError as decision_prompt does."""
    prompt, tokens = decision_prompt(model, decision, most)
    grammar = OneOf(tokens, model.vocab)
    settings = RequestSettings(Sampling(1, 0.0), (), model.adapter, True, grammar, among_allowed=True)
    return Read(TokenRequest(prompt, settings), tokens)


def probabilities_of(read: Read, sampled: SampledToken) -> tuple[list[float], float]:
    """Return (probabilities of the choices, which sum to 1; confidence). The confidence is the model's
    probability of the likeliest choice, among all tokens of the vocabulary. sampled: the token that
    `read.request` returned.
    """
    logps = dict(sampled.top)
    chosen = np.array([logps[token] for token in read.tokens])
    p = np.exp(chosen - chosen.max())
    return (p / p.sum()).tolist(), math.exp(chosen.max())


def answer(question: Question, p: Sequence[float], confidence: float) -> dict[str, Any]:
    """Return an entry of `answers` of a response. p, confidence: the result of probabilities_of."""
    common: dict[str, Any] = {"type": question.type, "name": question.name}
    choices = question.decision.choices
    if question.type == "predicate":
        return {**common, "probability": p[0]}
    if question.type == "choice":
        named = {"choice": choices[int(np.argmax(p))].value}
        listed = [{"value": c.value, "probability": x} for c, x in zip(choices, p, strict=True)]
    else:
        named = {"score": sum(number * x for number, x in enumerate(p))}
        listed = [
            {"value": number, "label": choice.value, "probability": x}
            for number, (choice, x) in enumerate(zip(choices, p, strict=True))
        ]
    return {**common, **named, "probabilities": listed, "confidence": confidence}


def response(model: str, answers: list[dict[str, Any]], prompt_tokens: int) -> dict[str, Any]:
    """Return the response to /v1/decisions. prompt_tokens: tokens of all questions' prompts together."""
    return {
        "model": model,
        "answers": answers,
        "usage": {
            "input_tokens": prompt_tokens,
            "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
            "output_tokens": len(answers),
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": prompt_tokens + len(answers),
        },
    }
