"""Constrained sampling: restrict each next token so that a completion is JSON that fits a schema, matches a
regular expression, or calls a tool. Grammars are written in llguidance's dialect of Lark.

llguidance comes with the extra `serve` and is imported where a grammar is compiled.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from jaxft.data.chat.tool_calls import ToolFormat, call_format

# Whitespace between the parts of JSON: a space, or a new line with its indentation. Small models would fill a
# response with it if it had no limit.
WHITESPACE = r" |\n[ \t]{0,24}"
ANY_OBJECT: Mapping[str, Any] = {"type": "object"}


@dataclass(frozen=True)
class Grammar:
    """A compiled grammar over the tokens of a tokenizer. start: llguidance's matcher before any token."""

    start: Any

    def begin(self) -> "Constraint":
        """Return the constraint of a new, empty completion."""
        return Constraint(self.start.deep_copy())


class Constraint:
    """The tokens that may come next in one completion, which must match a grammar."""

    def __init__(self, matcher: Any):
        self._matcher = matcher

    def allowed(self) -> np.ndarray:
        """Return a bit mask of tokens: bit i % 32 of word i // 32 is set if token i may come next. Stop
        tokens are allowed where the completion may end.
        """
        return np.frombuffer(self._matcher.compute_bitmask(), np.uint32)

    def accept(self, tokens: Sequence[int]) -> str:
        """Append sampled tokens to the completion. Return an error message, for example if the grammar is
        too complex; "" if there is no error.
        """
        self._matcher.consume_tokens(list(tokens))
        return f"the grammar failed: {_line(self._matcher.get_error())}" if self._matcher.is_error() else ""


def json_rule(schema: Mapping[str, Any]) -> str:
    """Return the Lark expression of JSON text that fits a schema."""
    options = {"whitespace_pattern": WHITESPACE}
    return f"%json {json.dumps({**schema, 'x-guidance': options})}"


def json_grammar(schema: Mapping[str, Any] = ANY_OBJECT) -> str:
    """Return the grammar of JSON text that fits a schema, by default any object."""
    return f"start: {json_rule(schema)}"


def regex_grammar(pattern: str) -> str:
    """Return the grammar of text that matches a regular expression as a whole.

    Example:
        compile_grammar(regex_grammar("yes|no"), tokenizer, stop)
    """
    return _llguidance().LLMatcher.grammar_from_regex(pattern)


def call_grammar(
    format: ToolFormat, tools: Sequence[Mapping[str, Any]], tokenizer: Any, is_single: bool = False
) -> str:
    """Return the grammar of one or more tool calls in a format such as "hermes", whose arguments fit the
    schema of the called tool. Raises ValueError if the format is "none".

    tools: {"name": ..., "parameters": JSON schema}. is_single: whether only one call may be made; in the
    format "llama3" there is never more than one.
    """
    known = call_format(format)
    if known is None:
        raise ValueError(
            "required tool calls, and tools with a response_format, need a known format of tool calls, which "
            "this model's chat template lacks; omit them, or start the server with --tool-format"
        )
    added = {token.content: number for number, token in tokenizer.added_tokens_decoder.items()}

    def mark(text: str) -> str:
        return f"<[{added[text]}]>" if text in added else json.dumps(text)

    def call(tool: Mapping[str, Any], key: str) -> str:
        head = json.dumps({"name": tool["name"], key: 0}, ensure_ascii=False).removesuffix("0}")
        return f'{json.dumps(head)} {json_rule(tool["parameters"])} "}}"'

    def alternatives(key: str) -> str:
        return " | ".join(call(tool, key) for tool in tools)

    many = "" if is_single else '("\\n" one)*'
    if format == "hermes":
        opens, closes = mark("<tool_call>"), mark("</tool_call>")
        return f'start: one {many}\none: {opens} "\\n" call "\\n" {closes}\ncall: {alternatives("arguments")}'
    if format == "llama3":
        return f"start: {alternatives('parameters')}"
    opens = mark("[TOOL_CALLS]")
    if "[ARGS]" in added:
        named = " | ".join(
            f"{json.dumps(tool['name'])} {mark('[ARGS]')} {json_rule(tool['parameters'])}" for tool in tools
        )
        return f"start: one {'' if is_single else 'one*'}\none: {opens} call\ncall: {named}"
    many = "" if is_single else '(", " call)*'
    return f'start: {opens} "[" call {many} "]"\ncall: {alternatives("arguments")}'


def either(first: str, second: str) -> str:
    """Return the Lark grammar of texts that match `first` or `second`. second: a grammar of a single rule."""
    renamed = re.sub(r"^start:", "first:", first)
    return f"{renamed}\nsecond: {second.removeprefix('start: ')}\nstart: first | second"


def compile_grammar(grammar: str, tokenizer: Any, stop: Sequence[int]) -> Grammar:
    """Compile a grammar over the tokens of a tokenizer. stop: token ids that end a completion.

    Raises ValueError if `stop` is empty and for a grammar that is wrong or that llguidance does not support,
    for example because of a keyword in a JSON schema. Raises ImportError if llguidance is not installed.
    """
    if not stop:
        raise ValueError(
            "constrained sampling needs a stop token, and the model has none; serve a model whose tokenizer "
            "has an EOS token"
        )
    matcher = _llguidance().LLMatcher(_vocabulary(tokenizer, tuple(stop)), grammar, log_level=0)
    if matcher.is_error():
        raise ValueError(_line(matcher.get_error()))
    return Grammar(matcher)


@lru_cache(maxsize=32)
def _vocabulary(tokenizer: Any, stop: tuple[int, ...]) -> Any:
    """Return llguidance's table of the bytes of all tokens, which takes 0.3 s for 49,152 tokens."""
    _llguidance()
    from llguidance.hf import from_tokenizer

    return from_tokenizer(tokenizer, eos_token=list(stop))


def _llguidance() -> Any:
    try:
        import llguidance
    except ImportError as error:
        raise ImportError(
            f"{error}; JSON mode, schemas, regular expressions and a required tool call need llguidance: pip "
            "install 'jaxft[serve]'"
        ) from error
    return llguidance


def _line(text: str) -> str:
    """Return an error of llguidance as one line, without the excerpt and the position in the grammar."""
    problem = re.split(r"\n *\d+ \|", text)[0]
    return " ".join(re.sub(r"^at \d+\(\d+\): ", "", problem).split())[:300]
