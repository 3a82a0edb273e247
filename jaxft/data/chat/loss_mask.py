"""Tokenise examples (rows of a dataset that have been parsed, see example.py) with an exact loss mask.

Conversations and instruction rows are rendered by the tokenizer's chat template and tokenised without adding
special tokens again, so there is one BOS. Plain prompts with completions, and documents, get the special
tokens that the tokenizer adds, and EOS. A plain prompt is tokenised alone, as for generation, even where one
token could contain its last and the next characters. Loss masks follow from ranges of characters of the
rendered text: a token is a target if it contains a character of such a range. The range of an assistant turn
is the text that the template's {% generation %} markers enclose or, without markers, the text after the
generation prompt. It includes the end-of-turn token, from which the model learns to stop, and must show all
of the turn (see turns.py). Every token of a document is a target.

Without a chat template, instruction rows are written as in FALLBACK; conversations need a template.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from os.path import commonprefix
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int

from jaxft.data.chat.template import (
    LONGEST_TEXT,
    REJECTIONS,
    Span,
    Template,
    UnusableTemplate,
    rejection,
    render_messages,
    template_of,
)
from jaxft.data.chat.turns import MARKER, HiddenPart, is_closed, render_turns
from jaxft.data.row_settings import DEFAULT_TEMPLATE_SETTINGS, TemplateSettings
from jaxft.data.rows.example import Chat, Completion, Example, Message, Text, target_weights
from jaxft.data.rows.invalid_rows import InvalidRow, Value, attempt

FALLBACK = "### Instruction:\n{}\n\n### Response:\n"
LOSS_ON = ("completion", "assistant", "all")
EXAMPLES_AT_ONCE = 1024  # that are rendered and tokenised together
ANCHORS = ("\n", ":", "a")  # texts after which a completion may be tokenised alone
TEXT_PIECE = 1 << 18  # characters of a long text that are tokenised together
OVERLAP = 1 << 10  # characters that one piece shares with the next
TOO_LONG = "text that is too long to tokenise"
TOO_MANY = "more tokens than are allowed"
SPARE_TOKENS = 64  # the last tokens of a truncated text, which may be others in the full text
HIDDEN_CALLS = "tool calls that the chat template hides"
SHOW_TOOLS = "set chat_template=qwen, which shows tools and calls, or use a tokenizer whose template does"
NOTHING = "nothing"  # loss_on of texts without targets, such as a reward model's: turns may lack parts


class WeightedTokens(NamedTuple):
    """A tokenised example: three arrays of shape [tokens].

    ids: token ids, untruncated. learned: True where a token is a target. weights: each token's factor in the
    loss; None if all are 1.
    """

    ids: np.ndarray
    learned: np.ndarray
    weights: np.ndarray | None


@dataclass(frozen=True)
class Rendered:
    """An example as text, with the ranges of its characters that are targets.

    name: the row's FILE:LINE, for errors. learned: the ranges that are targets. begin, end: whether to add
    BOS and EOS. learns_end: whether the added EOS is a target. weights: (range, factor of the loss) where the
    factor is not 1. prompt: how many characters at the start are a plain prompt, which is tokenised alone; 0
    without one.
    """

    name: str
    text: str
    learned: tuple[Span, ...]
    begin: bool
    end: bool
    learns_end: bool = True
    weights: tuple[tuple[Span, float], ...] = ()
    prompt: int = 0


def _require_short(name: str, text: str) -> None:
    """Raise InvalidRow if a text has more than LONGEST_TEXT characters. name: the row's FILE:LINE."""
    if len(text) > LONGEST_TEXT:
        problem = f"its text has {len(text)} characters, more than {LONGEST_TEXT}; shorten or split it"
        raise InvalidRow(name, TOO_LONG, problem)


def render(example: Example, template: Template | None, loss_on: str = "completion") -> Rendered:
    """Return the example as text, with the ranges of its characters that are targets.

    template: None if the tokenizer has none. loss_on: the turns that are targets, as in data.loss_on; NOTHING
    for none, where the template may leave out parts of turns. Raises InvalidRow; ValueError for a
    conversation without a template; UnusableTemplate if the template fails for every row.
    """
    match example:
        case Text(name, text):
            return Rendered(name, text, ((0, len(text)),), begin=True, end=True)
        case Completion(name, prompt, completion):
            text = prompt + completion
            _require_short(name, text)
            learned = ((0 if loss_on == "all" else len(prompt), len(text)),)
            return Rendered(name, text, learned, begin=True, end=True, prompt=len(prompt))
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
    """Put the row's name in front of the message of an UnusableTemplate that the `with` block raises."""
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
    examples: Iterable[Example],
    tokenizer: Any,
    loss_on: str = "completion",
    settings: TemplateSettings = DEFAULT_TEMPLATE_SETTINGS,
) -> Iterator[WeightedTokens | InvalidRow]:
    """Yield the tokens of each example in order, untruncated, or an InvalidRow with its error.

    loss_on: as in data.loss_on. Raises ValueError for a slow tokenizer, for plain text if it has no EOS, and
    for conversations if it has no chat template.
    """
    if not tokenizer.is_fast:
        raise ValueError(
            f"the tokenizer {tokenizer.name_or_path!r} is slow (written in Python): it has no character "
            "offsets, from which loss masks are computed; use a model with a tokenizer.json"
        )
    template = template_of(tokenizer, settings)

    def begins(r: Rendered) -> bool:
        return r.begin and not _has_bos(r.text, tokenizer)

    rendering = partial(render, template=template, loss_on=loss_on)

    def is_long(r: Rendered) -> bool:
        return len(r.text) > LONGEST_TEXT  # of a Text; others are refused

    for _, rendered in _in_chunks(rendering, examples):
        texts = [r for r in rendered if isinstance(r, Rendered) and not is_long(r)]
        prompts = _plain_ids([r.text[: r.prompt] for r in texts if r.prompt], tokenizer)
        encoded = {
            flag: _encode([r.text for r in texts if begins(r) is flag], tokenizer, flag)
            for flag in (True, False)
        }
        for r in rendered:
            if isinstance(r, InvalidRow):
                yield r
            elif is_long(r):
                yield attempt(_mask_of_text, r, tokenizer)
            else:
                ids, offsets = next(encoded[begins(r)])
                if r.prompt:
                    ids, offsets = _from_prompt(r, next(prompts), ids, offsets, tokenizer)
                yield _mask(r, ids, offsets, tokenizer.eos_token_id)


def _in_chunks(
    function: Callable[[Any], Value], examples: Iterable[Any]
) -> Iterator[tuple[list[Any], list[Value | InvalidRow]]]:
    """Yield (examples, results) in lists of up to EXAMPLES_AT_ONCE; a result may be an InvalidRow."""
    examples = list(examples)
    for at in range(0, len(examples), EXAMPLES_AT_ONCE):
        chunk = examples[at : at + EXAMPLES_AT_ONCE]
        yield chunk, [attempt(function, x) for x in chunk]


def tools_warnings(chats: Sequence[Chat], template: Template) -> tuple[str, ...]:
    """Return a warning if the chat template drops the tools of the first chat that has any: its prompt is
    rendered the same without them. Else return ().
    """
    chat = next((chat for chat in chats if chat.tools), None)
    if chat is None:
        return ()
    prompt = chat.messages[: chat.response] or chat.messages
    template = template.of_chat(chat)
    try:
        same = render_messages(template, prompt, chat.tools) == render_messages(template, prompt)
    except REJECTIONS:
        return ()
    lost = f"{chat.name}: {template.name} renders the prompt without the row's tools, so the model does not "
    return (f"warning: {lost}see them; {SHOW_TOOLS}",) if same else ()


def content_warnings(chats: Sequence[Chat], template: Template) -> tuple[str, ...]:
    """Return warnings about messages of prompts, except assistant turns, whose content the chat template
    drops: one for each role, which names the first such message.
    """
    warnings = dict[str, str]()
    for chat in chats:
        used = template.of_chat(chat)
        prompt = chat.messages[: chat.response] or chat.messages
        for index in _perhaps_hidden(used, chat, prompt):
            role = prompt[index]["role"]
            if role in warnings or _shows(used, chat, prompt, index):
                continue
            remedy = "use a tokenizer whose template shows it"
            if index == 0 and role == "system" and _shows(replace(used, merges=True), chat, prompt, index):
                remedy = "set data.system=merge"
            warnings[role] = (
                f"warning: {chat.name}: {used.name} does not show the content of message {index}, a {role} "
                f"message, so the model does not see it; {remedy}"
            )
    return tuple(warnings.values())


def _perhaps_hidden(template: Template, chat: Chat, prompt: Sequence[Message]) -> list[int]:
    """Return the indices of at most 100 messages but assistant turns whose content may be dropped."""
    asked = [i for i, m in enumerate(prompt) if m["role"] != "assistant" and (m["content"] or "").strip()]
    words = {i: {**prompt[i], "content": f"Qx7w{i}Zk"} for i in asked}
    try:
        text = render_messages(template, [words.get(i, m) for i, m in enumerate(prompt)], chat.tools)
        shown = set(MARKER.findall(text.lower()))
    except REJECTIONS:
        shown = set()
    return [i for i in asked if f"qx7w{i}zk" not in shown][:100]


def _shows(template: Template, chat: Chat, prompt: Sequence[Message], index: int) -> bool:
    """Whether the template shows the content of message `index`: a unique word in its place is in the
    rendered prompt. True also if the template rejects the prompt with this word.
    """
    word = "Qx7wZk9y"
    message = {**prompt[index], "content": word}
    try:
        text = render_messages(template, [*prompt[:index], message, *prompt[index + 1 :]], chat.tools)
    except REJECTIONS:
        return True
    return word.lower() in text.lower()


def prompt_warnings(chats: Sequence[Chat], template: Template) -> tuple[str, ...]:
    """Return a warning for the first conversation whose rendered text does not begin with its rendered
    prompt, () without any: the model then learns responses after a text that it doesn't generate them after.
    """
    for chat in chats:
        if not 0 < chat.response < len(chat.messages):
            continue
        used = template.of_chat(chat)
        lost = _prompt_that_is_not_trained(used, chat)
        if lost:
            merges = replace(used, merges=True)
            remedy = "use another chat template"
            if chat.messages[0]["role"] == "system" and not _prompt_that_is_not_trained(merges, chat):
                remedy = "set data.system=merge: this template moves or drops the system message"
            return (
                f"warning: {chat.name}: {used.name} ends a prompt with {lost!r}, which is not in front of "
                f"the row's response: completions begin where the model is not trained; {remedy}",
            )
    return ()


def _prompt_that_is_not_trained(template: Template, chat: Chat) -> str:
    """Return the end of the rendered prompt that the rendered row lacks; "" if the row begins with it."""
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
    most: int | None = None,
) -> Iterator[list[int] | InvalidRow]:
    """Yield the token ids of each example's prompt, which ends where a model generates the response, or an
    InvalidRow with its error.

    most: a prompt that has far more tokens than this is an InvalidRow, and is not tokenised as a whole; None
    for no limit. In SFT, the ids of a plain prompt are the same; in a conversation, a token may span the end
    of the prompt.
    """
    template = template_of(tokenizer, settings)

    def is_plain(example: Completion | Chat) -> bool:
        return template is None or isinstance(example, Completion)

    for chunk, texts in _in_chunks(partial(_prompt_text, template=template), examples):
        if most is not None:
            texts = [x if isinstance(x, InvalidRow) else attempt(_short, x, most, tokenizer) for x in texts]
        by_kind: dict[bool, list[str]] = {True: [], False: []}
        for example, text in zip(chunk, texts, strict=True):
            if isinstance(text, str):
                by_kind[is_plain(example)].append(text)
        plain, chats = _plain_ids(by_kind[True], tokenizer), _ids_of(by_kind[False], tokenizer, False)
        for example, text in zip(chunk, texts, strict=True):
            yield text if isinstance(text, InvalidRow) else next(plain if is_plain(example) else chats)


def _prompt_text(example: Completion | Chat, template: Template | None) -> str:
    """Return an example's prompt as text. Raises what `render` raises, and InvalidRow above LONGEST_TEXT."""
    if isinstance(example, Completion):
        text = example.prompt
    elif template is not None:
        messages, used = example.messages[: example.response], template.of_chat(example)
        with _named(example):
            try:
                text = render_messages(used, messages, example.tools, generation=True)
            except REJECTIONS as error:
                problem = rejection(used, messages, example.tools, error, "prompt without a response")
                raise InvalidRow(example.name, "row that the chat template rejects", problem) from error
    elif example.plain:
        text = fallback_prompt(example.messages[: example.response])
    else:
        raise _no_template(example)
    _require_short(example.name, text)
    return text


def _short(text: str, most: int, tokenizer: Any) -> str:
    """Return the text unchanged. Raises InvalidRow with the reason TOO_MANY if a beginning of it already has
    more than `most` + SPARE_TOKENS tokens: a much too long text is not tokenised as a whole.
    """
    size = 4 * (most + SPARE_TOKENS)
    while size < len(text):
        (ids,) = _ids_of([text[:size]], tokenizer, False)
        if len(ids) > most + SPARE_TOKENS:
            raise InvalidRow("prompt", TOO_MANY, f"the prompt has more than {most} tokens; shorten it")
        size *= 4
    return text


def _plain_ids(prompts: Sequence[str], tokenizer: Any) -> Iterator[list[int]]:
    """Yield the token ids of each plain prompt, with BOS if the tokenizer adds it, without EOS."""
    begins = [not _has_bos(prompt, tokenizer) for prompt in prompts]
    encoded = {
        flag: _ids_of([p for p, begin in zip(prompts, begins, strict=True) if begin is flag], tokenizer, flag)
        for flag in (True, False)
    }
    for begin in begins:
        ids = next(encoded[begin])
        yield ids[:-1] if begin and ids and ids[-1] == tokenizer.eos_token_id else ids


def rendered_ids(text: str, tokenizer: Any) -> list[int]:
    """Return the token ids of a text that a chat template has rendered. BOS and EOS are not added."""
    return next(_ids_of([text], tokenizer, False))


def _ids_of(texts: list[str], tokenizer: Any, special: bool) -> Iterator[list[int]]:
    return iter(tokenizer(texts, add_special_tokens=special, verbose=False).input_ids if texts else ())


def _from_prompt(
    r: Rendered, prompt: list[int], ids: list[int], offsets: list[Span], tokenizer: Any
) -> tuple[list[int], list[Span]]:
    """Return token ids of a text that begin with the ids of its prompt, and each token's range of characters.
    ids, offsets: of the whole text, kept if they begin with `prompt`. Else the rest is tokenised with one of
    ANCHORS in front: a tokenizer may add a space to a text's first word.
    """
    if ids[: len(prompt)] == prompt:
        return ids, offsets
    rest = r.text[r.prompt :]
    for anchor in ANCHORS:
        (alone, _), (joined, places) = _encode([anchor, anchor + rest], tokenizer, False)
        if joined[: len(alone)] == alone and (not rest or places[len(alone)][0] >= len(anchor)):
            break
    else:
        ((joined, places),), alone, anchor = _encode([rest], tokenizer, False), [], ""
    shift = r.prompt - len(anchor)
    after = [(start + shift, end + shift) for start, end in places[len(alone) :]]
    return [*prompt, *joined[len(alone) :]], [*([(0, r.prompt)] * len(prompt)), *after]


def fallback_prompt(messages: Sequence[Message]) -> str:
    """Return the prompt if there is no chat template: system messages, then a user turn as in FALLBACK."""
    *system, user = [m["content"] for m in messages]
    return "".join(f"{text}\n\n" for text in system) + FALLBACK.format(user)


def _mask_of_text(r: Rendered, tokenizer: Any) -> WeightedTokens:
    """Tokenise a long document in pieces, to save memory; every token is a target. Pieces overlap and are
    joined where both have a token that begins at the same character: the ids equal those of the whole text if
    a token depends on fewer than OVERLAP / 2 characters. Raises InvalidRow without such a character.
    """
    begins = r.begin and not _has_bos(r.text, tokenizer)
    with_special, (plain,) = next(_ids_of(["a"], tokenizer, begins)), _ids_of(["a"], tokenizer, False)
    at = next(i for i in range(len(with_special)) if with_special[i : i + len(plain)] == plain)
    first, last = with_special[:at], with_special[at + len(plain) :]
    eos = _eos(r, tokenizer.eos_token_id)
    last = last if last[-1:] == [eos] else [*last, eos]
    ids = np.concatenate([np.asarray(first, np.int32), *_pieces(r, tokenizer), np.asarray(last, np.int32)])
    return WeightedTokens(ids, np.ones(len(ids), bool), None)


def _pieces(r: Rendered, tokenizer: Any) -> Iterator[np.ndarray]:
    """Yield the token ids of a long text in consecutive parts, without special tokens. Raises InvalidRow."""
    (here, ids), skipped = _encoded(r.text[: TEXT_PIECE + OVERLAP], tokenizer), 0
    for at in range(TEXT_PIECE, len(r.text) - OVERLAP, TEXT_PIECE):
        following, next_ids = _encoded(r.text[at : at + TEXT_PIECE + OVERLAP], tokenizer)
        middle = OVERLAP // 2
        for place in sorted(range(OVERLAP), key=lambda i: abs(i - middle)):
            end, start = _token_at(here, TEXT_PIECE + place), _token_at(following, place)
            if end is not None and start is not None:
                break
        else:
            problem = f"no token begins near character {at + middle}, where it must be divided; split the row"
            raise InvalidRow(r.name, TOO_LONG, problem)
        yield ids[skipped:end]
        here, ids, skipped = following, next_ids, start
    yield ids[skipped:]


def _encoded(text: str, tokenizer: Any) -> tuple[Any, np.ndarray]:
    """Return (tokenizers.Encoding of a text, which maps characters to tokens; its token ids)."""
    out = tokenizer([text], add_special_tokens=False, return_attention_mask=False, verbose=False)
    return out.encodings[0], np.asarray(out.input_ids[0], np.int32)


def _token_at(encoding: Any, place: int) -> int | None:
    """Return the index of the token that begins at character `place`, None if no token begins there."""
    index = encoding.char_to_token(place)
    return index if index is not None and encoding.token_to_chars(index)[0] == place else None


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


def _span_of_each(
    spans: Sequence[Span], first: Int[np.ndarray, " tokens"], last: Int[np.ndarray, " tokens"]
) -> Int[np.ndarray, " tokens"]:
    """Return the index of the last span that contains a character of each token, -1 for none. spans:
    disjoint, ascending. first, last: the characters at which each token begins and ends (exclusive).
    """
    starts, ends = np.asarray(spans, np.int64).reshape(len(spans), 2).T
    index = np.searchsorted(starts, last) - 1  # the last span that begins before the token ends
    return np.where((index >= 0) & (np.append(ends, 0)[index] > first), index, -1)


def _eos(r: Rendered, eos: int | None) -> int:
    if eos is None:
        raise ValueError(
            f"{r.name}: plain text must end with EOS and the tokenizer has none; set eos_token in its "
            "tokenizer_config.json"
        )
    return eos


def _mask(r: Rendered, ids: list[int], offsets: list[Span], eos: int | None) -> WeightedTokens:
    first, last = np.asarray(offsets, np.int64).reshape(len(ids), 2).T
    # Byte-level tokenizers exclude a leading space from a token's offsets: it starts where the previous one
    # ends. Pieces of one character share its offsets, so the earlier of the two is used.
    first = np.minimum(first, np.concatenate([[0], last])[:-1])
    learned = _span_of_each(r.learned, first, last) >= 0
    weights = None
    if r.weights:
        ordered = sorted(r.weights)
        values = np.array([*(weight for _, weight in ordered), 1], np.float32)  # 1 for no span, -1
        weights = values[_span_of_each([span for span, _ in ordered], first, last)]
    if r.learned == ((0, len(r.text)),):
        learned[:] = True
    if r.end:
        eos = _eos(r, eos)
        is_added = r.begin and ids and ids[-1] == eos and offsets[-1][1] == 0  # by the tokenizer
        if not is_added:
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
        has_calls = "tool call" in str(error)
        remedy = SHOW_TOOLS if has_calls else "use a tokenizer with another chat template"
        remedy += ", fix or remove the row"
        if targets and min(targets) < chat.response:
            remedy += ", or set data.loss_on=completion if that turn is not part of the last response"
        problem = f"{template.name} misrenders a turn that is trained on: {error}; {remedy}"
        reason = HIDDEN_CALLS if has_calls else "turn that the chat template hides"
        raise InvalidRow(chat.name, reason, problem) from error
    except REJECTIONS as error:
        problem = rejection(template, chat.messages, chat.tools, error, "row")
        raise InvalidRow(chat.name, "row that the chat template rejects", problem) from error
    learned_text = text[: learned[-1][1]] if learned else text
    ended = is_closed(template, learned_text) or is_closed(template, text)
    ended |= learned_text.endswith(template.variables.get("eos_token", "\0"))
    last = len(chat.messages) - 1
    unfinished = chat.messages[last]["role"] == "assistant" and not ended
    if loss_on == "all":
        starts, ends = [0, *(end for _, end in hidden)], [*(start for start, _ in hidden), len(text)]
        learned = [(start, end) for start, end in zip(starts, ends, strict=True) if start < end]
    learns_end = loss_on == NOTHING or last in targets
    return Rendered(chat.name, text, tuple(learned), False, unfinished, learns_end, weighted)
