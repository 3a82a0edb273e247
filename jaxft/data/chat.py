"""Tokenise examples with an exact loss mask.

Conversations and instruction rows are rendered by the tokenizer's chat template and tokenised without adding
special tokens again, so there is one BOS. Plain prompts, completions and texts get the special tokens that
the tokenizer adds, and EOS. The loss mask is computed on the rendered text, as ranges of characters, and
mapped to tokens by their offsets: a token is a target if it contains any character of a response. An
assistant turn is what the template's {% generation %} markers enclose or, without markers, everything after
the prompt that generation would start from. It includes the end-of-turn token, from which the model learns to
stop, and must show all of the turn (see template_check.py). Every token of a text row is a target.

Without a chat template, instruction rows use FALLBACK; conversations need a template.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from os.path import commonprefix
from typing import Any, NamedTuple

import numpy as np

from jaxft.data.example import Chat, Completion, Example, Message, Text
from jaxft.data.invalid import InvalidRow, attempt
from jaxft.data.loss_weights import target_weights
from jaxft.data.rejections import rejection
from jaxft.data.template import (
    REJECTIONS,
    Span,
    Template,
    UnusableTemplate,
    render_messages,
    template_of,
)
from jaxft.data.template_check import HiddenPart
from jaxft.data.template_settings import DEFAULT_TEMPLATE_SETTINGS, TemplateSettings
from jaxft.data.turns import is_closed, render_turns

FALLBACK = "### Instruction:\n{}\n\n### Response:\n"
MaskedTokens = tuple[np.ndarray, np.ndarray]  # token ids, loss mask
LOSS_ON = ("completion", "assistant", "all")
NOTHING = "nothing"  # a text that is only read, such as by a reward model: a template may hide parts of it


class WeightedTokens(NamedTuple):
    """Token ids, the loss mask, and the weight of each token as a target; None if all weights are 1."""

    ids: np.ndarray
    learned: np.ndarray
    weights: np.ndarray | None


@dataclass(frozen=True)
class Rendered:
    """A rendered example.

    learned: the character ranges that are targets. begin, end: whether to add BOS and EOS. learns_end:
    whether that EOS is a target. weights: of ranges whose targets have another weight than 1.
    """

    name: str
    text: str
    learned: tuple[Span, ...]
    begin: bool
    end: bool
    learns_end: bool = True
    weights: tuple[tuple[Span, float], ...] = ()

    def __post_init__(self) -> None:
        try:
            self.text.encode()
        except UnicodeEncodeError as error:
            problem = f"its text has an unpaired surrogate ({error.reason}); fix the text"
            raise InvalidRow(self.name, "unpaired surrogate", problem) from error


def render(example: Example, template: Template | None, loss_on: str = "completion") -> Rendered:
    """Render an example and mark the parts of it that are targets. Raises ValueError that names the row."""
    match example:
        case Text(name, text):
            return Rendered(name, text, ((0, len(text)),), begin=True, end=True)
        case Completion(name, prompt, completion):
            text = prompt + completion
            return Rendered(
                name, text, ((0 if loss_on == "all" else len(prompt), len(text)),), begin=True, end=True
            )
        case Chat() if template is not None:
            with _named(example):
                return _render_chat(example, template.of_chat(example), loss_on)
        case Chat(name, messages, response, plain=True):
            prompt = fallback_prompt(messages[:response])
            rendered = render(Completion(name, prompt, messages[response]["content"]), None, loss_on)
            weight = 1.0 if loss_on == NOTHING else target_weights(example, loss_on).get(response, 0.0)
            if weight == 1:
                return rendered
            if not weight:  # with loss_on=all
                return replace(rendered, learned=((0, len(prompt)),), learns_end=False)
            return replace(rendered, weights=(((len(prompt), len(rendered.text)), weight),))
        case _:
            raise _no_template(example)


@contextmanager
def _named(example: Chat) -> Iterator[None]:
    """Name the row at which the template turned out to be of no use."""
    try:
        yield
    except UnusableTemplate as error:
        raise UnusableTemplate(f"{example.name}: {error}") from error


def _no_template(example: Example) -> ValueError:
    return ValueError(
        f"{example.name}: a conversation needs a chat template and the tokenizer has none; use an instruct "
        "model's tokenizer, put chat_template.jinja into the model's folder, or use strings as prompt and "
        "completion with data.format=plain"
    )


def tokenise_examples(
    examples: Iterable[Example | InvalidRow],
    tokenizer: Any,
    loss_on: str = "completion",
    settings: TemplateSettings = DEFAULT_TEMPLATE_SETTINGS,
) -> Iterator[MaskedTokens | InvalidRow]:
    """Yield (token ids, loss mask) of each example in order, untruncated, or what is wrong with it."""
    for outcome in tokenise_weighted(examples, tokenizer, loss_on, settings):
        yield outcome if isinstance(outcome, InvalidRow) else (outcome.ids, outcome.learned)


def tokenise_weighted(
    examples: Iterable[Example | InvalidRow],
    tokenizer: Any,
    loss_on: str = "completion",
    settings: TemplateSettings = DEFAULT_TEMPLATE_SETTINGS,
) -> Iterator[WeightedTokens | InvalidRow]:
    """Yield the tokens, the loss mask and the weights of each example in order, as `tokenise_examples`."""
    if not tokenizer.is_fast:
        raise ValueError(
            "loss masks need character offsets, which a slow tokenizer does not have; use a fast one "
            "(tokenizer.json)"
        )
    template = template_of(tokenizer, settings)

    def render_valid(outcome: Example | InvalidRow) -> Rendered:
        if isinstance(outcome, InvalidRow):
            raise outcome
        return render(outcome, template, loss_on)

    def begins(r: Rendered) -> bool:
        return r.begin and not _has_bos(r.text, tokenizer)

    examples = list(examples)
    for at in range(0, len(examples), 1024):
        rendered = [attempt(render_valid, example) for example in examples[at : at + 1024]]
        texts = [r for r in rendered if isinstance(r, Rendered)]
        encoded = {
            flag: _encode([r.text for r in texts if begins(r) is flag], tokenizer, flag)
            for flag in (True, False)
        }
        for r in rendered:
            if isinstance(r, InvalidRow):
                yield r
            else:
                yield _mask(r, *next(encoded[begins(r)]), tokenizer.eos_token_id)


def tools_warnings(
    examples: Iterable[Example | InvalidRow],
    tokenizer: Any,
    settings: TemplateSettings = DEFAULT_TEMPLATE_SETTINGS,
) -> tuple[str, ...]:
    """Return a warning if the tools of the first example that has some don't change the rendered prompt."""
    chat = next((e for e in examples if isinstance(e, Chat) and e.tools), None)
    template = template_of(tokenizer, settings) if chat else None
    if template is None or chat is None:
        return ()
    prompt = chat.messages[: chat.response] or chat.messages
    template = template.of_chat(chat)
    try:
        same = render_messages(template, prompt, chat.tools) == render_messages(template, prompt)
    except REJECTIONS:
        return ()
    lost = f"{chat.name}: {template.name} renders the prompt without the row's tools, so the model does not "
    return (f"warning: {lost}see them; use a tokenizer whose template has tools",) if same else ()


def content_warnings(
    examples: Iterable[Example | InvalidRow],
    tokenizer: Any,
    settings: TemplateSettings = DEFAULT_TEMPLATE_SETTINGS,
) -> tuple[str, ...]:
    """Return a warning for each role but the assistant's of which a prompt lacks the content of a message:
    about the first such.
    """
    template, found = template_of(tokenizer, settings), dict[str, str]()
    if template is None:
        return ()
    for chat in examples:
        if not isinstance(chat, Chat):
            continue
        own = template.of_chat(chat)
        prompt = chat.messages[: chat.response] or chat.messages
        for index, message in enumerate(prompt):
            role = message["role"]
            if role == "assistant" or role in found or _shows(own, chat, prompt, index):
                continue
            remedy = "use a tokenizer whose template does"
            if index == 0 and role == "system" and _shows(replace(own, merges=True), chat, prompt, index):
                remedy = "set data.system=merge"
            found[role] = (
                f"warning: {chat.name}: {own.name} does not show the content of message {index}, a {role} "
                f"message, so the model does not see it; {remedy}"
            )
    return tuple(found.values())


def _shows(template: Template, chat: Chat, prompt: Sequence[Message], index: int) -> bool:
    """Whether a prompt shows a word in the place of a message's content, or is rejected with it."""
    word = "Qx7wZk9y"
    message = {**prompt[index], "content": word}
    if not (prompt[index]["content"] or "").strip():
        return True
    try:
        text = render_messages(template, [*prompt[:index], message, *prompt[index + 1 :]], chat.tools)
    except REJECTIONS:
        return True
    return word.lower() in text.lower()


def prompt_warnings(
    examples: Iterable[Example | InvalidRow],
    tokenizer: Any,
    settings: TemplateSettings = DEFAULT_TEMPLATE_SETTINGS,
) -> tuple[str, ...]:
    """Return a warning if a conversation renders otherwise than the prompt that generation gets, about the
    first such.
    """
    template = template_of(tokenizer, settings)
    if template is None:
        return ()
    for chat in examples:
        if not (isinstance(chat, Chat) and 0 < chat.response < len(chat.messages)):
            continue
        own = template.of_chat(chat)
        lost = _prompt_that_is_not_trained(own, chat)
        if lost:
            merges = replace(own, merges=True)
            remedy = "use another chat template"
            if chat.messages[0]["role"] == "system" and not _prompt_that_is_not_trained(merges, chat):
                remedy = "set data.system=merge: this template moves or drops the system message"
            return (
                f"warning: {chat.name}: {own.name} ends a prompt with {lost!r}, which is not in front of the "
                f"row's response: completions begin where the model is not trained; {remedy}",
            )
    return ()


def _prompt_that_is_not_trained(template: Template, chat: Chat) -> str:
    """Return what of the prompt for the response is not in front of it in training; "" for a rejected row."""
    try:
        prompt = render_messages(template, chat.messages[: chat.response], chat.tools, generation=True)
        text = render_messages(template, chat.messages, chat.tools)
    except REJECTIONS:
        return ""
    return prompt[len(commonprefix([prompt, text])) :]


def example_prompt_ids(
    examples: Sequence[Completion | Chat],
    tokenizer: Any,
    settings: TemplateSettings = DEFAULT_TEMPLATE_SETTINGS,
) -> Iterator[list[int] | InvalidRow]:
    """Yield the token ids from which the response of each example is generated, or what is wrong with it.

    All prompts come from here: of preferences, rollouts and generation. In SFT they precede the response.
    """
    template = template_of(tokenizer, settings)

    def prompt_of(example: Completion | Chat) -> list[int]:
        if isinstance(example, Completion):
            return _plain_ids(example.prompt, tokenizer)
        messages = example.messages[: example.response]
        if template is None:
            if not example.plain:
                raise _no_template(example)
            return _plain_ids(fallback_prompt(messages), tokenizer)
        own = template.of_chat(example)
        with _named(example):
            try:
                text = render_messages(own, messages, example.tools, generation=True)
            except REJECTIONS as error:
                problem = rejection(own, messages, example.tools, error, "prompt without a response")
                raise InvalidRow(example.name, "row that the chat template rejects", problem) from error
        return tokenizer(text, add_special_tokens=False).input_ids

    return (attempt(prompt_of, example) for example in examples)


def _plain_ids(prompt: str, tokenizer: Any) -> list[int]:
    begin = not _has_bos(prompt, tokenizer)
    ids = tokenizer(prompt, add_special_tokens=begin).input_ids
    return ids[:-1] if begin and ids and ids[-1] == tokenizer.eos_token_id else ids


def fallback_prompt(messages: Sequence[Message]) -> str:
    """Return an instruction as plain text for a tokenizer without a chat template, the system message in
    front.
    """
    *system, user = [m["content"] for m in messages]
    return "".join(f"{text}\n\n" for text in system) + FALLBACK.format(user)


def _has_bos(text: str, tokenizer: Any) -> bool:
    return bool(tokenizer.bos_token) and text.startswith(tokenizer.bos_token)


def _encode(texts: list[str], tokenizer: Any, special: bool) -> Iterator[tuple[list, list]]:
    if not texts:
        return iter(())
    out = tokenizer(
        texts, add_special_tokens=special, return_offsets_mapping=True, return_attention_mask=False,
        truncation=False, padding=False, verbose=False,
    )  # fmt: skip
    return zip(out["input_ids"], out["offset_mapping"], strict=True)


def _mask(r: Rendered, ids: list[int], offsets: list[Span], eos: int | None) -> WeightedTokens:
    first, last = np.asarray(offsets, np.int64).reshape(len(ids), 2).T
    # Byte-level tokenizers exclude a leading space from a token's offsets: it starts where the previous one
    # ends. Pieces of one character share its offsets, so the earlier of the two is used.
    first = np.minimum(first, np.concatenate([[0], last])[:-1])
    learned = np.zeros(len(ids), bool)
    for start, end in r.learned:
        learned |= (last > start) & (first < end)
    weights = np.ones(len(ids), np.float32) if r.weights else None
    if weights is not None:
        for (start, end), weight in r.weights:
            weights[(last > start) & (first < end)] = weight
    if r.learned == ((0, len(r.text)),):
        learned[:] = True
    if r.end:
        if eos is None:
            raise ValueError(
                f"{r.name}: plain text must end with EOS and the tokenizer has none; set its eos_token"
            )
        if not (
            r.begin and ids and ids[-1] == eos and offsets[-1][1] == 0
        ):  # some tokenizers add EOS themselves
            ids, learned = [*ids, eos], np.append(learned, True)
            weights = weights if weights is None else np.append(weights, weights[-1])
        learned[-1] = r.learns_end
    return WeightedTokens(np.asarray(ids, np.int32), learned, weights)


def _render_chat(chat: Chat, template: Template, loss_on: str) -> Rendered:
    targets = {} if loss_on == NOTHING else target_weights(chat, loss_on)
    weighted: tuple[tuple[Span, float], ...] = ()
    try:
        text, learned = (
            (render_messages(template, chat.messages, chat.tools), [])
            if loss_on == NOTHING
            else render_turns(template, chat, list(targets))
        )
        for weight in sorted({weight for weight in targets.values() if weight != 1}):
            spans = render_turns(template, chat, [i for i in targets if targets[i] == weight])[1]
            weighted += tuple((span, weight) for span in spans)
        unlearned = [i for i, weight in chat.weights.items() if loss_on == "all" and not weight]
        hidden = render_turns(template, chat, unlearned)[1] if unlearned else []
    except HiddenPart as error:
        remedy = "use a tokenizer whose template does, fix or remove the row"
        if targets and min(targets) < chat.response:
            remedy += ", or set data.loss_on=completion if that turn is not part of the last response"
        problem = f"{template.name} hides what is learned: {error}; {remedy}"
        raise InvalidRow(chat.name, "turn that the chat template hides", problem) from error
    except REJECTIONS as error:
        problem = rejection(template, chat.messages, chat.tools, error, "row")
        raise InvalidRow(chat.name, "row that the chat template rejects", problem) from error
    ended = is_closed(template, text[: learned[-1][1]] if learned else text) or is_closed(template, text)
    last = len(chat.messages) - 1
    unfinished = chat.messages[last]["role"] == "assistant" and not ended
    if loss_on == "all":
        learned = _outside(hidden, len(text))
    learns_end = loss_on == NOTHING or last in targets
    return Rendered(chat.name, text, tuple(learned), False, unfinished, learns_end, weighted)


def _outside(spans: Sequence[Span], length: int) -> list[Span]:
    """Return the ranges of a text of this length that are in none of the spans, which are in order."""
    starts, ends = [0, *(end for _, end in spans)], [*(start for start, _ in spans), length]
    return [(start, end) for start, end in zip(starts, ends, strict=True) if start < end]
