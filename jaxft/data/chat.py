"""Tokenise examples with an exact loss mask.

Conversations and instruction rows are rendered by the tokenizer's chat template and tokenised without adding
special tokens again, so there is one BOS. Plain prompts, completions and texts get the special tokens that
the tokenizer adds, and EOS. The loss mask is computed on the rendered text, as ranges of characters, and
mapped to tokens by their offsets: a token is a target if it contains any character of a response. An
assistant turn is what the template's {% generation %} markers enclose or, without markers, everything after
the prompt that generation would start from. It includes the end-of-turn token, from which the model learns to
stop. Every token of a text row is a target.

Without a chat template, instruction rows use FALLBACK; conversations need a template.
"""

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from os.path import commonprefix
from typing import Any

import jinja2
import numpy as np
from jaxtyping import Bool, Int

from jaxft.data.formats import Chat, Completion, Example, Message, Text

DATE = "26 Jul 2024"  # Llama 3's default; a template that prints today's date would change tokens at midnight
FALLBACK = "### Instruction:\n{}\n\n### Response:\n"
LOSS_ON = ("completion", "assistant", "all")
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
_STRFTIME = re.compile(r"strftime_now\(\s*(['\"])(.*?)\1\s*\)")

Span = tuple[int, int]


@dataclass(frozen=True)
class Template:
    """A tokenizer's chat template with a pinned date.

    marked: it has {% generation %} markers. opening: the generation prompt. closing: matches an end-of-turn
    token.
    """

    tokenizer: Any
    source: str
    date: str
    marked: bool
    opening: str
    closing: re.Pattern | None


@dataclass(frozen=True)
class Rendered:
    """A rendered example.

    learned: the character ranges that are targets. begin, end: whether to add BOS and EOS.
    """

    name: str
    text: str
    learned: tuple[Span, ...]
    begin: bool
    end: bool


def template_of(tokenizer: Any, date: str = DATE) -> Template | None:
    """Return the tokenizer's template with today's date replaced by `date` ("26 Jul 2024"), None if it has
    none.
    """
    if not tokenizer.chat_template:
        return None
    try:
        day = datetime.strptime(date, "%d %b %Y")
    except ValueError as error:
        raise ValueError(f"data.date={date!r}; use a day like {DATE!r}") from error
    source = _STRFTIME.sub(lambda m: json.dumps(day.strftime(m[2])), tokenizer.get_chat_template())
    bare = Template(tokenizer, source, date, bool(_GENERATION.search(source)), "", None)
    special = {str(t) for t in tokenizer.added_tokens_decoder.values() if t.special} | set(
        tokenizer.all_special_tokens
    )
    try:
        opening = _opening(bare)
        ends = special - _openers(bare, special, opening)
    except (
        jinja2.TemplateError,
        TypeError,
        LookupError,
    ):  # the template rejects or omits parts of a plain conversation
        opening, ends = "", special
    closing = re.compile(rf"\s*(?:{_any_of(ends)})+") if ends else None
    return Template(tokenizer, source, date, bare.marked, opening, closing)


def _any_of(tokens: set[str]) -> str:
    return "|".join(map(re.escape, sorted(tokens, key=len, reverse=True)))


def _opening(bare: Template) -> str:
    """Return the generation prompt, "" if the template has none."""
    user = [{"role": "user", "content": "x"}]
    without, opened = _render(bare, user), _render(bare, user, generation=True)
    return opened[len(commonprefix([without, opened])) :]


def _openers(bare: Template, special: set[str], opening: str) -> set[str]:
    """Return the special tokens that open a turn.

    These are the tokens of the generation prompt, and those between a response and the next question that do
    not follow a last response as well.
    """
    turns = [
        {"role": role, "content": text}
        for role, text in (("user", "Qx7w"), ("assistant", "Zk9y"), ("user", "Jv5u"))
    ]
    find = re.compile(_any_of(special)).findall
    behind = find(_render(bare, turns[:2]).split("Zk9y")[1])
    between = find(_render(bare, turns).split("Zk9y")[1].split("Jv5u")[0])
    closers = len(behind) if between[: len(behind)] == behind else 1
    return set(find(opening)) | set(between[closers:])


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
            return _render_chat(example, template, loss_on)
        case Chat(name, messages, response, plain=True):
            prompt = fallback_prompt(messages[:response])
            return render(Completion(name, prompt, messages[response]["content"]), None, loss_on)
        case _:
            raise ValueError(
                f"{example.name}: a conversation needs a chat template and the tokenizer has none; use an "
                "instruct model's tokenizer, put chat_template.jinja into the model's folder, or use plain "
                "strings as prompt and completion"
            )


def tokenise_examples(
    examples: Sequence[Example], tokenizer: Any, loss_on: str = "completion", date: str = DATE
) -> Iterator[tuple[Int[np.ndarray, " n"], Bool[np.ndarray, " n"]]]:
    """Yield (token ids, loss mask) of each example in order, untruncated."""
    if not tokenizer.is_fast:
        raise ValueError(
            "loss masks need character offsets, which a slow tokenizer does not have; use a fast one "
            "(tokenizer.json)"
        )
    template = template_of(tokenizer, date)
    for at in range(0, len(examples), 1024):
        rendered = [render(example, template, loss_on) for example in examples[at : at + 1024]]
        begins = [r.begin and not _has_bos(r.text, tokenizer) for r in rendered]
        encoded = {
            flag: _encode(
                [r.text for r, begin in zip(rendered, begins, strict=True) if begin is flag], tokenizer, flag
            )
            for flag in (True, False)
        }
        for r, begin in zip(rendered, begins, strict=True):
            yield _mask(r, *next(encoded[begin]), tokenizer.eos_token_id)


def prompt_ids(prompt: str | Sequence[Message], tokenizer: Any, date: str = DATE) -> list[int]:
    """Return the token ids that generation starts from, the same as in training. A string is plain text."""
    if isinstance(prompt, str):
        return _plain_ids(prompt, tokenizer)
    return _chat_ids(prompt, None, tokenizer, template_of(tokenizer, date))


def example_prompt_ids(
    examples: Sequence[Completion | Chat], tokenizer: Any, date: str = DATE
) -> Iterator[list[int]]:
    """Yield the token ids that generation of each example's response starts from.

    Raises ValueError that names the row.
    """
    template = template_of(tokenizer, date)
    for example in examples:
        if isinstance(example, Completion):
            yield _plain_ids(example.prompt, tokenizer)
            continue
        try:
            yield _chat_ids(example.messages[: example.response], example.tools, tokenizer, template)
        except (jinja2.TemplateError, TypeError) as error:
            reason = str(error).splitlines()[0]
            raise ValueError(
                f"{example.name}: the chat template rejects the prompt without a response: {reason}; fix the "
                "row or set data.format=plain"
            ) from error


def _plain_ids(prompt: str, tokenizer: Any) -> list[int]:
    begin = not _has_bos(prompt, tokenizer)
    ids = tokenizer(prompt, add_special_tokens=begin).input_ids
    return ids[:-1] if begin and ids and ids[-1] == tokenizer.eos_token_id else ids


def _chat_ids(
    messages: Sequence[Message], tools: list | None, tokenizer: Any, template: Template | None
) -> list[int]:
    if template is None:
        return _plain_ids(fallback_prompt(messages), tokenizer)
    return tokenizer(_render(template, messages, tools, generation=True), add_special_tokens=False).input_ids


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


def _mask(r: Rendered, ids: list[int], offsets: list[Span], eos: int | None) -> tuple[np.ndarray, np.ndarray]:
    first, last = np.asarray(offsets, np.int64).reshape(len(ids), 2).T
    # Byte-level tokenizers exclude a leading space from a token's offsets: it starts where the previous one
    # ends. Pieces of one character share its offsets, so the earlier of the two is used.
    first = np.minimum(first, np.concatenate([[0], last])[:-1])
    learned = np.zeros(len(ids), bool)
    for start, end in r.learned:
        learned |= (last > start) & (first < end)
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
        learned[-1] = True
    return np.asarray(ids, np.int32), learned


def _render(
    template: Template, messages: Sequence[Message], tools: list | None = None, generation: bool = False
) -> str:
    return template.tokenizer.apply_chat_template(
        list(messages), tools=tools, chat_template=template.source, tokenize=False,
        add_generation_prompt=generation, date_string=template.date,
    )  # fmt: skip


def _render_chat(chat: Chat, template: Template, loss_on: str) -> Rendered:
    turns = [i for i, m in enumerate(chat.messages) if m["role"] == "assistant"]
    targets = [i for i in turns if loss_on != "completion" or i >= chat.response]
    if not targets and loss_on != "all":
        raise ValueError(
            f"{chat.name}: the loss mask is empty because there is no assistant turn; add one, remove the "
            "row or set data.loss_on=all"
        )
    try:
        if loss_on == "all":
            text = _render(template, chat.messages, chat.tools)
            learned = [(0, len(text))]
        elif template.marked:
            text, spans = _render_marked(template, chat)
            others = _exchanged(template, chat, targets[0]) if loss_on == "completion" else [""]
            at = min(len(commonprefix([text, other])) for other in others)
            learned = [(start, _extended(template, text, start, end)) for start, end in spans if end > at]
        else:
            text = _render(template, chat.messages, chat.tools)
            learned = [_turn(template, chat, text, i) for i in targets]
    except (jinja2.TemplateError, TypeError) as error:
        raise ValueError(
            f"{chat.name}: the chat template rejects the row: {str(error).splitlines()[0]}; fix or remove "
            "the row"
        ) from error
    bare = [
        template.closing.sub("", text[start:end]) if template.closing else text[start:end]
        for start, end in learned
    ]
    if not any(map(str.strip, bare)):
        raise ValueError(
            f"{chat.name}: the loss mask is empty because the chat template omits the response; use another "
            "tokenizer or chat template"
        )
    unfinished = bool(turns) and turns[-1] == len(chat.messages) - 1 and not _closed(template, text)
    return Rendered(chat.name, text, tuple(learned), begin=False, end=unfinished)


def _render_marked(template: Template, chat: Chat) -> tuple[str, list[Span]]:
    from transformers.utils.chat_template_utils import render_jinja_template

    rendered: Any = render_jinja_template(  # (texts, ranges enclosed by the markers)
        conversations=[list(chat.messages)], tools=chat.tools, chat_template=template.source,
        return_assistant_tokens_mask=True, date_string=template.date, **template.tokenizer.special_tokens_map,
    )  # fmt: skip
    return rendered[0][0], rendered[1][0]


def _turn(template: Template, chat: Chat, text: str, index: int) -> Span:
    """Return the range of assistant turn `index` in the rendered conversation, including its end-of-turn
    token.

    The content is searched after the rendered messages before it. If the template rewrites earlier turns or
    the response itself, the range is found by rendering the conversation with another response in its place.
    """
    message = chat.messages[index]
    start = _start(template, chat, text, index)
    if start is not None and "tool_calls" not in message:
        for content, at in (
            (message["content"], start),
            (message["content"].strip(), start + _space(text, start)),
        ):
            end = _close(template, text, at + len(content)) if text.startswith(content, at) else None
            if end is not None:
                return start, end
    if start is not None:
        through = _render(template, chat.messages[: index + 1], chat.tools)
        if text.startswith(through) and len(through) > start:
            return start, _last_close(template, text, start, len(through))
    first, last = _exchange(template, chat, text, index)
    return first if start is None else start, _close(template, text, last) or last


def _start(template: Template, chat: Chat, text: str, index: int) -> int | None:
    """Return where generation would start: after the previous messages and the generation prompt, if there is
    one.
    """
    if index == 0:
        return None
    prefix = _render(template, chat.messages[:index], chat.tools, generation=True)
    if not text.startswith(prefix):
        return None
    content = chat.messages[index]["content"].strip()
    if template.opening or (content and text.startswith(content, len(prefix) + _space(text, len(prefix)))):
        return len(prefix)
    return None  # the text between is a header, which is no target


def _exchange(template: Template, chat: Chat, text: str, index: int) -> Span:
    others = _exchanged(template, chat, index)
    first = min(len(commonprefix([text, other])) for other in others)
    last = len(text) - min(len(commonprefix([text[::-1], other[::-1]])) for other in others)
    if first >= last:
        raise TypeError(f"it omits message {index}, an assistant turn")
    return first, last


def _exchanged(template: Template, chat: Chat, index: int) -> list[str]:
    """Render the conversation with two other responses in turn `index` without a common first or last
    character.
    """
    before, after = chat.messages[:index], chat.messages[index + 1 :]
    others = [{"role": "assistant", "content": content} for content in ("Qx7w", "Zk9y")]
    return [_render(template, [*before, other, *after], chat.tools) for other in others]


def _extended(template: Template, text: str, start: int, end: int) -> int:
    """Return the end of a marked turn including its end-of-turn token: without it the model would not learn
    to stop.
    """
    return end if _closed(template, text[start:end]) else _close(template, text, end) or end


def _space(text: str, at: int) -> int:
    rest = text[at : at + 100]
    return len(rest) - len(rest.lstrip())


def _close(template: Template, text: str, at: int) -> int | None:
    match = template.closing.match(text, at) if template.closing else None
    return match.end() if match else None


def _last_close(template: Template, text: str, start: int, end: int) -> int:
    ends = [m.end() for m in template.closing.finditer(text, start, end)] if template.closing else []
    return ends[-1] if ends and not text[ends[-1] : end].strip() else end


def _closed(template: Template, text: str) -> bool:
    end = len(text.rstrip())
    return template.closing is not None and any(m.end() == end for m in template.closing.finditer(text))
