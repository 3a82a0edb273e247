"""Examples to token ids and an exact loss mask.

Conversations and instruction rows go through the tokenizer's chat template and are tokenised without adding special tokens
again, so there is one BOS. Plain prompt and completion, and text, get the special tokens that the tokenizer adds, and EOS.
The mask is found on the rendered text, as ranges of characters, and carried to tokens by their offsets: a token is learned
if it shows any character of an answer. An assistant turn is what the template's {% generation %} markers enclose or, where it
has none, everything after the prompt that generation would start from; its end-of-turn token belongs to it, because that
is how the model learns to stop. Text rows have no prompt and are learned whole.

A tokenizer without a template gets FALLBACK for instruction rows; conversations need a template.
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

DATE = "26 Jul 2024"  # Llama 3's own default; a template that prints today's date would change tokens at midnight
FALLBACK = "### Instruction:\n{}\n\n### Response:\n"
LOSS_ON = ("completion", "assistant", "all")
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
_STRFTIME = re.compile(r"strftime_now\(\s*(['\"])(.*?)\1\s*\)")

Span = tuple[int, int]


@dataclass(frozen=True)
class Template:
    """A tokenizer's chat template, its date pinned. `opening` starts an answer; `closing` matches an end-of-turn token."""

    tokenizer: Any
    source: str
    date: str
    marked: bool
    opening: str
    closing: re.Pattern | None


@dataclass(frozen=True)
class Rendered:
    """Text as the model will see it, the character ranges that are learned, and which special tokens are to be added."""

    name: str
    text: str
    learned: tuple[Span, ...]
    begin: bool
    end: bool


def template_of(tokenizer: Any, date: str = DATE) -> Template | None:
    """The tokenizer's template with today's date replaced by `date` ("26 Jul 2024"); None if it has none."""
    if not getattr(tokenizer, "chat_template", None):
        return None
    try:
        day = datetime.strptime(date, "%d %b %Y")
    except ValueError as error:
        raise ValueError(f"data.date={date!r}; wanted a day like {DATE!r}") from error
    source = _STRFTIME.sub(lambda m: json.dumps(day.strftime(m[2])), tokenizer.get_chat_template())
    bare = Template(tokenizer, source, date, bool(_GENERATION.search(source)), "", None)
    special = {str(t) for t in tokenizer.added_tokens_decoder.values() if t.special} | set(
        tokenizer.all_special_tokens
    )
    try:
        opening = _opening(bare)
        ends = special - _openers(bare, special, opening)
    except (jinja2.TemplateError, TypeError, LookupError):  # it refuses or hides so plain a conversation
        opening, ends = "", special
    closing = re.compile(rf"\s*(?:{_any_of(ends)})+") if ends else None
    return Template(tokenizer, source, date, bare.marked, opening, closing)


def _any_of(tokens: set[str]) -> str:
    return "|".join(map(re.escape, sorted(tokens, key=len, reverse=True)))


def _opening(bare: Template) -> str:
    """The generation prompt, empty if the template has none."""
    user = [{"role": "user", "content": "x"}]
    without, opened = _render(bare, user), _render(bare, user, generation=True)
    return opened[len(commonprefix([without, opened])) :]


def _openers(bare: Template, special: set[str], opening: str) -> set[str]:
    """Special tokens that open a turn: those of the generation prompt, and those between an answer and the next question
    that don't stand behind a last answer too."""
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
    """The text of an example and the parts of it that are learned; raises ValueError naming the row."""
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
        case Chat(name, messages, answer, plain=True):
            prompt = fallback_prompt(messages[:answer])
            return render(Completion(name, prompt, messages[answer]["content"]), None, loss_on)
        case _:
            raise ValueError(
                f"{example.name}: a conversation needs a chat template and the tokenizer has none; take an instruct model's "
                "tokenizer, put chat_template.jinja into the model's folder, or give prompt and completion as plain strings"
            )


def tokenise(
    examples: Sequence[Example], tokenizer: Any, loss_on: str = "completion", date: str = DATE
) -> Iterator[tuple[Int[np.ndarray, " n"], Bool[np.ndarray, " n"]]]:
    """(token ids, learned?) of each example in order, untruncated."""
    if not getattr(tokenizer, "is_fast", False):
        raise ValueError(
            "loss masks need character offsets: found a slow tokenizer, wanted a fast one (tokenizer.json)"
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
    """Token ids to generate from, exactly as training saw them: messages through the template, a string as plain text."""
    if isinstance(prompt, str):
        return _plain_ids(prompt, tokenizer)
    return _chat_ids(prompt, None, tokenizer, template_of(tokenizer, date))


def prompts(examples: Sequence[Completion | Chat], tokenizer: Any, date: str = DATE) -> Iterator[list[int]]:
    """Token ids that generation of each example's answer would start from; raises ValueError naming the row."""
    template = template_of(tokenizer, date)
    for example in examples:
        if isinstance(example, Completion):
            yield _plain_ids(example.prompt, tokenizer)
            continue
        try:
            yield _chat_ids(example.messages[: example.answer], example.tools, tokenizer, template)
        except (jinja2.TemplateError, TypeError) as error:
            reason = str(error).splitlines()[0]
            raise ValueError(
                f"{example.name}: the chat template refuses the prompt without an answer: {reason}"
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
    """The plain prompt of an instruction for a tokenizer without a template; a system text goes in front."""
    *system, user = [m["content"] for m in messages]
    return "".join(f"{text}\n\n" for text in system) + FALLBACK.format(user)


def _has_bos(text: str, tokenizer: Any) -> bool:
    return bool(tokenizer.bos_token) and text.startswith(tokenizer.bos_token)


def _encode(texts: list[str], tokenizer: Any, special: bool) -> Iterator[tuple[list, list]]:
    if not texts:
        return iter(())
    out = tokenizer(
        texts, add_special_tokens=special, return_offsets_mapping=True, return_attention_mask=False, truncation=False,
        padding=False, verbose=False,
    )  # fmt: skip
    return zip(out["input_ids"], out["offset_mapping"], strict=True)


def _mask(r: Rendered, ids: list[int], offsets: list[Span], eos: int | None) -> tuple[np.ndarray, np.ndarray]:
    first, last = np.asarray(offsets, np.int64).reshape(len(ids), 2).T
    # Byte-level tokenizers leave a leading space out of a token's offsets: the token starts where the one before it ends.
    # Pieces of one character share its offsets, so the earlier of the two counts.
    first = np.minimum(first, np.concatenate([[0], last])[:-1])
    learned = np.zeros(len(ids), bool)
    for start, end in r.learned:
        learned |= (last > start) & (first < end)
    if r.learned == ((0, len(r.text)),):
        learned[:] = True
    if r.end:
        if eos is None:
            raise ValueError(
                f"{r.name}: plain text ends with EOS and the tokenizer has none; set its eos_token"
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
        list(messages), tools=tools, chat_template=template.source, tokenize=False, add_generation_prompt=generation,
        date_string=template.date,
    )  # fmt: skip


def _render_chat(chat: Chat, template: Template, loss_on: str) -> Rendered:
    turns = [i for i, m in enumerate(chat.messages) if m["role"] == "assistant"]
    wanted = [i for i in turns if loss_on != "completion" or i >= chat.answer]
    if not wanted and loss_on != "all":
        raise ValueError(
            f"{chat.name}: empty loss mask, no assistant turn to learn; add one, remove the row or set data.loss_on=all"
        )
    try:
        if loss_on == "all":
            text = _render(template, chat.messages, chat.tools)
            learned = [(0, len(text))]
        elif template.marked:
            text, spans = _render_marked(template, chat)
            others = _exchanged(template, chat, wanted[0]) if loss_on == "completion" else [""]
            at = min(len(commonprefix([text, other])) for other in others)
            learned = [(start, _extended(template, text, start, end)) for start, end in spans if end > at]
        else:
            text = _render(template, chat.messages, chat.tools)
            learned = [_turn(template, chat, text, i) for i in wanted]
    except (jinja2.TemplateError, TypeError) as error:
        raise ValueError(
            f"{chat.name}: the chat template refuses the row: {str(error).splitlines()[0]}"
        ) from error
    bare = [
        template.closing.sub("", text[start:end]) if template.closing else text[start:end]
        for start, end in learned
    ]
    if not any(map(str.strip, bare)):
        raise ValueError(
            f"{chat.name}: empty loss mask, the chat template shows nothing of the answer; use another model's tokenizer"
        )
    unfinished = bool(turns) and turns[-1] == len(chat.messages) - 1 and not _closed(template, text)
    return Rendered(chat.name, text, tuple(learned), begin=False, end=unfinished)


def _render_marked(template: Template, chat: Chat) -> tuple[str, list[Span]]:
    from transformers.utils.chat_template_utils import render_jinja_template

    rendered: Any = render_jinja_template(  # (texts, ranges enclosed by the markers)
        conversations=[list(chat.messages)], tools=chat.tools, chat_template=template.source, return_assistant_tokens_mask=True,
        date_string=template.date, **template.tokenizer.special_tokens_map,
    )  # fmt: skip
    return rendered[0][0], rendered[1][0]


def _turn(template: Template, chat: Chat, text: str, index: int) -> Span:
    """Where assistant turn `index` stands in the rendered conversation, its end-of-turn token included.

    The content is looked for after the messages before it; where the template rewrites earlier turns or the answer itself, its
    place shows when it is exchanged for another.
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
    """Where generation would begin: after the messages before the turn and, if the template has one, its generation prompt."""
    if index == 0:
        return None
    prefix = _render(template, chat.messages[:index], chat.tools, generation=True)
    if not text.startswith(prefix):
        return None
    content = chat.messages[index]["content"].strip()
    if template.opening or (content and text.startswith(content, len(prefix) + _space(text, len(prefix)))):
        return len(prefix)
    return None  # what stands between is a header, which is not learned


def _exchange(template: Template, chat: Chat, text: str, index: int) -> Span:
    others = _exchanged(template, chat, index)
    first = min(len(commonprefix([text, other])) for other in others)
    last = len(text) - min(len(commonprefix([text[::-1], other[::-1]])) for other in others)
    if first >= last:
        raise TypeError(f"it does not show message {index}, an assistant turn")
    return first, last


def _exchanged(template: Template, chat: Chat, index: int) -> list[str]:
    """The conversation with another answer in turn `index`; the two share no first or last character."""
    before, after = chat.messages[:index], chat.messages[index + 1 :]
    answers = [{"role": "assistant", "content": content} for content in ("Qx7w", "Zk9y")]
    return [_render(template, [*before, answer, *after], chat.tools) for answer in answers]


def _extended(template: Template, text: str, start: int, end: int) -> int:
    """The end of a marked turn: markers that leave out the end-of-turn token would teach the model never to stop."""
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
