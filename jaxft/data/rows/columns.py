"""Find the columns of a row by their names, and read them as text, messages and tools.

Formats of public datasets are accepted: messages, tools or arguments of a tool call as a JSON string,
ShareGPT's "from" and "value", LLaMA-Factory's "function_call" and "observation" turns. A column that cannot
be read raises InvalidRow, which names the row.
"""

import difflib
import inspect
import json
import re
import shlex
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import lru_cache
from typing import Any

from jaxft.data.rows.example import Message, message_weight
from jaxft.data.rows.invalid_rows import json_type
from jaxft.data.rows.row_files import Row

KNOWN_ROLES = ("user", "assistant", "system", "developer", "tool")
ROLES = {  # other accepted names; upper and lower case are the same
    **dict.fromkeys(("human", "prompter"), "user"),
    **dict.fromkeys(
        ("gpt", "model", "bot", "chatbot", "chatgpt", "bing", "bard", "function_call"), "assistant"
    ),
    **dict.fromkeys(("observation", "function", "function_response", "ipython", "environment"), "tool"),
}
SET_BY_JAXFT = (
    "conversation", "conversations", "messages", "tools", "chat_template", "tokenize",
    "add_generation_prompt", "continue_final_message", "return_assistant_tokens_mask", "return_dict",
    "return_tensors", "padding", "truncation", "max_length", "tokenizer_kwargs", "processor_kwargs",
    "generation_indices", "raise_exception", "strftime_now", "namespace", "range", "dict", "lipsum", "cycler",
    "joiner", "loop", "self",
)  # fmt: skip
# Other names of columns in public datasets, which are read where a row lacks the format's column.
COLUMN_SYNONYMS = {
    "prompt": ("question", "query", "problem", "input"),
    "instruction": ("question", "query", "problem"),  # of rows with an input, see format_choice
    "completion": ("answer", "response", "output", "solution"),
    "response": ("answer", "completion", "solution"),
    "system": ("system_prompt",),
    "input": ("context",),
    "text": ("sentence",),
    "question": ("question_stem",),
    "choices": ("options",),
    "answer": ("answerkey",),
    "document": ("passage",),
}
MEDIA = ("images", "image", "videos", "video", "audios", "audio")
FURTHER = ("system", "input")  # columns with synonyms that a row may lack
# Names that errors propose: they are not read, as only a convention says which response is the better one.
PROPOSED_SYNONYMS = {
    "chosen": ("response_j", "chosen_response", "better", "preferred", "accepted", "good", "winner"),
    "rejected": ("response_k", "rejected_response", "worse", "dispreferred", "bad", "loser"),
}
# Columns for which errors propose only a name that means the same: other columns would be misread.
PROPOSED_BY_NAME = ("query", "document", "choices", "answer", "completions", "labels")
LABEL_NAMES = ("label", "labels", "task", "category", "premise", "hypothesis")  # that are never proposed
_SPEAKERS = {"Human": "user", "Assistant": "assistant"}
NEARER = 0.85  # similarity of names in PROPOSED_BY_NAME
NEAR = 0.75  # similarity of names that may be a misspelling of one another
_TURN = re.compile(r"\n\n(Human|Assistant):")


def is_set_by_jaxft(argument: str) -> bool:
    """Whether jaxft, the tokenizer or Jinja sets this variable of a chat template, such as bos_token."""
    return argument in SET_BY_JAXFT or argument.endswith(("_token", "_tokens"))


# ---- names


@lru_cache(maxsize=1024)
def respelled(names: tuple[str, ...], known: frozenset[str]) -> dict[str, str]:
    """Return {known column: the row's column}, where these differ in case or outer spaces: {"text": "Text "}.

    names: the row's columns. Known columns that the row has exactly, or in two spellings, are left out.
    """
    spellings: dict[str, list[str]] = {}
    for name in names:
        ours = str(name).strip().lower()
        if name not in known and ours in known and ours not in names:
            spellings.setdefault(ours, []).append(name)
    return {ours: theirs[0] for ours, theirs in spellings.items() if len(theirs) == 1}


def column_of(fields: Mapping[str, Any], name: str) -> str:
    """Return the row's column for a name in a setting: an exact match, else the only one that differs in case
    or surrounding spaces, else the name itself.
    """
    if name in fields:
        return name
    alike = [column for column in fields if str(column).strip().lower() == name.strip().lower()]
    return alike[0] if len(alike) == 1 else name


def other_name(fields: Mapping[str, Any], ours: str) -> str | None:
    """Return the row's only non-null column that is a synonym of `ours` (COLUMN_SYNONYMS), or None."""
    names = COLUMN_SYNONYMS.get(ours, ())
    matches = [name for name, x in fields.items() if x is not None and str(name).strip().lower() in names]
    return matches[0] if len(matches) == 1 else None


def further_columns(fields: Mapping[str, Any], optional: Iterable[str]) -> dict[str, str]:
    """Return the row's synonyms of the columns system and input that it lacks, such as {"input": "context"}.
    optional: the optional columns of its format; a column that is not among them is not looked for.
    """
    missing = [ours for ours in FURTHER if ours in optional and fields.get(ours) is None]
    others = {ours: other_name(fields, ours) for ours in missing}
    return {ours: theirs for ours, theirs in others.items() if theirs is not None}


def misspelled(names: Sequence[str], known: Iterable[str]) -> dict[str, str]:
    """Map known columns to the row's names that nearly spell them: {"prompt": "promt"}."""
    known = [column for column in known if column not in names]
    nearest: dict[str, str] = {}
    for name in names:
        near = difflib.get_close_matches(str(name).strip().lower(), known, 1, NEAR)
        if near:
            nearest.setdefault(near[0], name)
    return nearest


def meant_columns(names: Sequence[str], ours: Iterable[str]) -> dict[str, str]:
    """Map columns of jaxft to a row's names that seem to mean them, by near spelling or as synonyms."""
    meant = misspelled(names, ours)
    for cutoff in (1.0, NEAR):
        for column in [column for column in ours if column not in meant and column not in names]:
            words = (*COLUMN_SYNONYMS.get(column, ()), *PROPOSED_SYNONYMS.get(column, ()))
            others = [str(name).strip().lower() for name in names if name not in meant.values()]
            near = {n for word in words for n in difflib.get_close_matches(word, others, len(names), cutoff)}
            theirs = [name for name in names if str(name).strip().lower() in near]
            if theirs:
                meant[column] = theirs[0]
    return meant


def suggested_columns(names: Sequence[str], ours: Sequence[str]) -> str:
    """Return the setting that an error message suggests, such as
    "data.columns=prompt=question,completion=answer".

    A column of `ours` gets the row's name that seems to mean it, else the next unused name as an example.
    Names of labels and tasks are never examples, and columns of PROPOSED_BY_NAME have no example but "...".
    """
    meant = meant_columns([name for name in names if name not in LABEL_NAMES], ours)
    meant = {column: name for column, name in meant.items() if _is_proposed(column, str(name))}
    no_text = (*meant.values(), *LABEL_NAMES)
    left = [x for x in names if x not in no_text and not str(x).lower().endswith(("id", "idx", "index"))]

    def proposed(column: str) -> str:
        if column in meant:
            return meant[column]
        return left.pop(0) if left and column not in PROPOSED_BY_NAME else "..."

    items = [f"{column}={proposed(column)}" for column in ours]
    return shlex.quote(f"data.columns={','.join(items)}")


def _is_proposed(column: str, name: str) -> bool:
    """Whether an error may propose a name; in PROPOSED_BY_NAME only a synonym or nearly the same name."""
    is_near = difflib.SequenceMatcher(None, column, name.strip().lower()).ratio() >= NEARER
    is_synonym = name.strip().lower() in COLUMN_SYNONYMS.get(column, ())
    return column not in PROPOSED_BY_NAME or is_near or is_synonym


# ---- text


def text_of(row: Row, column: str, empty: bool = False) -> str:
    """Return the column's text. empty: whether blank text is accepted.

    Raises InvalidRow if it is not a string, or blank, or not valid Unicode.
    """
    value = row.fields[column]
    if value is None:
        problem = f"column {column!r} is null; fill it or remove the row"
        raise row.invalid(f"null in column {column!r}", problem)
    if not isinstance(value, str):
        problem = f"column {column!r} must be a string, got {type(value).__name__}"
        raise row.invalid(f"column {column!r} of a wrong type", problem)
    _encodable(row, column, value)
    if not empty and not value.strip():
        problem = f"column {column!r} is empty; fill it or remove the row"
        raise row.invalid(f"empty column {column!r}", problem)
    return value


def _encodable(row: Row, column: str, text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        problem = f"column {column!r} is not valid Unicode: it has an unpaired surrogate; fix the text"
        raise row.invalid("unpaired surrogate", problem) from error


def json_of(row: Row, column: str) -> Any:
    """Return the column's value; a JSON string of a list of messages is parsed. Other JSON, such as a list of
    function calls, is returned as text.
    """
    value = row.fields[column]
    if not (isinstance(value, str) and value.lstrip()[:1] == "["):
        return value
    parsed = _parsed(value)
    return parsed if isinstance(parsed, list) and parsed and all(map(_is_message, parsed)) else value


def list_of(row: Row, column: str) -> list[Any]:
    """Return the list in a column, which may be its JSON string. Raises InvalidRow for anything else."""
    value = row.fields[column]
    value = _parsed(value) if isinstance(value, str) and value.lstrip()[:1] == "[" else value
    if not isinstance(value, list | tuple):
        problem = f"column {column!r} is {json_type(value)}; use a list"
        raise row.invalid(f"column {column!r} of a wrong type", problem)
    return [*value]


def _is_message(item: Any) -> bool:
    """Whether an object is a message, with a known role and with content or tool calls."""
    if not isinstance(item, dict):
        return False
    others: tuple[str, ...] = ("content", "tool_calls", "function_call") if "role" in item else ("value",)
    role = item.get("role", item.get("from"))
    return isinstance(role, str) and _role(role) is not None and any(key in item for key in others)


def _role(name: str) -> str | None:
    """Return the role for one of its names, such as "user" for "human"; None for an unknown name."""
    name = name.strip().lower()
    name = ROLES.get(name, name)
    return name if name in KNOWN_ROLES else None


def _parsed(text: str) -> Any:
    """Return the value of a JSON string, or the string itself if it is not JSON."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def require_text_alone(row: Row) -> None:
    """Raise InvalidRow for a row with images, videos or audio: lists of these, or a file's path and bytes."""
    for column in MEDIA:
        value = row.fields.get(column)
        is_file = isinstance(value, Mapping) and {"path", "bytes"} & {*value}
        if value and (is_file or column.endswith("s")):
            raise row.invalid(
                "content that is no text",
                f"column {column!r} is not empty, and jaxft reads only text; remove the row, or remove the "
                "column and its placeholders in the text, such as <image>",
            )


# ---- messages


def messages_of(row: Row, column: str) -> list[Message]:
    """Return the column's messages with roles in KNOWN_ROLES.

    A message in the row has "role" and "content", or ShareGPT's "from" and "value". Raises InvalidRow, which
    names the message.
    """
    value = row.fields[column]
    value = _parsed(value) if isinstance(value, str) and value.lstrip()[:1] == "[" else value
    first = value[0] if isinstance(value, list | tuple) and value else None
    keys = first if isinstance(first, dict) else {}
    sharegpt = "from" in keys or (column == "conversations" and "role" not in keys)
    role, content = ("from", "value") if sharegpt else ("role", "content")
    if not isinstance(value, list | tuple) or not value:
        what = "null" if value is None else f"of type {type(value).__name__}"
        what = "an empty list" if isinstance(value, list | tuple) else what
        text = "" if column in ("messages", "conversations") else "a string or "
        raise row.invalid(
            f"null in column {column!r}" if value is None else "column without messages",
            f"column {column!r} is {what}; use {text}a list of {{{role!r}, {content!r}}} objects",
        )
    return [_message(row, f"{column}[{index}]", item, (role, content)) for index, item in enumerate(value)]


def _message(row: Row, where: str, item: Any, keys: tuple[str, str]) -> Message:
    """Return a message with a role in KNOWN_ROLES, parsed tool calls, and its weight if it has one.

    where: the message in errors, such as "messages[2]". keys: its keys of the role and the content.
    """
    role, content = keys
    calls = isinstance(item, dict) and (item.get("tool_calls") or item.get("function_call"))
    if not isinstance(item, dict) or not isinstance(item.get(role), str) or not (content in item or calls):
        problem = f"is {json_type(item)}"
        if isinstance(item, dict):
            problem = f"has the keys {', '.join(map(str, item))}" if item else "is empty"
        problem = f"{where} {problem}; a message needs {role!r}, a string, and {content!r}"
        raise row.invalid("message without role or content", problem)
    weight = message_weight(row, where, item)
    name = _role(item[role])
    if name is None:
        raise row.invalid(
            "message of an unknown role",
            f"{where} has {role} {item[role][:40]!r}; use {', '.join(KNOWN_ROLES)} or one of their "
            "other names (python scripts/help.py rows-for-sft)",
        )
    read = (role, content, "function_call", "weight", "train")
    rest = {k: v for k, v in item.items() if k not in read and v is not None}
    rest |= {} if weight is None else {"weight": weight}
    text = _content(row, where, item.get(content))
    if item[role].strip().lower() == "function_call":
        rest["tool_calls"], text = _calls_of_text(row, where, text), None
    elif calls:
        rest["tool_calls"] = _tool_calls(row, where, calls)
    else:
        rest.pop("tool_calls", None)
    if text is None and "tool_calls" not in rest:
        problem = f"{where} has neither content nor tool calls; add one"
        raise row.invalid("message without role or content", problem)
    if name == "assistant" and not (text or "").strip() and "tool_calls" not in rest:
        problem = f"{where}, an assistant turn, is empty; fill it or remove the row"
        raise row.invalid("empty assistant turn", problem)
    return {"role": name, "content": text, **rest}


def _content(row: Row, where: str, content: Any) -> str | None:
    if isinstance(content, list) and all(isinstance(p, dict) for p in content):
        use = 'use {"type": "text", "text": ...}'
        for part in content:
            kind = part.get("type")
            if kind != "text":
                of = f"without a type; {use}"
                if kind is not None:
                    of = f"of type {str(kind)[:40]!r}; only text is supported: remove it"
                raise row.invalid("content that is no text", f"{where} has a content part {of}")
            if not isinstance(part.get("text"), str):
                problem = f"{where} has a content part whose text is no string; {use}"
                raise row.invalid("content of a wrong type", problem)
        content = "".join(p["text"] for p in content)
    if content is not None and not isinstance(content, str):
        problem = f"{where} has content of type {type(content).__name__}; use a string"
        raise row.invalid("content of a wrong type", problem)
    if content:
        _encodable(row, where, content)
    return content


def _calls_of_text(row: Row, where: str, text: str | None) -> list[dict[str, Any]]:
    """Return the tool calls of a "function_call" turn, whose text is the JSON of a call or of a list."""
    calls = _parsed(text or "")
    calls = [calls] if isinstance(calls, dict) else calls
    if not (isinstance(calls, list) and calls and all(isinstance(c, dict) and "name" in c for c in calls)):
        raise row.invalid(
            "function call that is no JSON",
            f"{where} is a function_call whose text is not the JSON of a call; use "
            '{"name": ..., "arguments": {...}} or a list of these',
        )
    return _tool_calls(row, where, [{"type": "function", "function": call} for call in calls])


def _tool_calls(row: Row, where: str, calls: Any) -> list[dict[str, Any]]:
    """Return tool calls as chat templates expect them, with arguments as an object and not as its JSON."""
    calls = _parsed(calls) if isinstance(calls, str) else calls
    if isinstance(calls, dict):  # OpenAI's older key function_call
        calls = [{"type": "function", "function": calls}]
    if not isinstance(calls, list | tuple) or not all(isinstance(call, dict) for call in calls):
        raise row.invalid(
            "tool calls of a wrong type",
            f"{where} has tool_calls that are not a list of objects; use "
            '[{"type": "function", "function": {"name": ..., "arguments": {...}}}]',
        )
    return [_tool_call(row, where, call) for call in calls]


def _tool_call(row: Row, where: str, call: dict[str, Any]) -> dict[str, Any]:
    if isinstance(call.get("function"), dict):
        return {**call, "function": _tool_call(row, where, call["function"])}
    if not (isinstance(call.get("name"), str) and call["name"].strip()):
        problem = f"{where} calls a tool without a name; fix or remove the row"
        raise row.invalid("tool call without a name", problem)
    arguments = call.get("arguments")
    if not isinstance(arguments, str):
        return call
    parsed = _parsed(arguments) if arguments.strip() else {}
    if not isinstance(parsed, dict):
        raise row.invalid(
            "arguments that are no JSON object",
            f"{where} calls a tool with arguments {arguments[:40]!r}, which is not a JSON object; fix or "
            "remove the row",
        )
    return {**call, "arguments": parsed}


def dialogue_of(row: Row, column: str, text: str) -> list[Message]:
    """Parse "\\n\\nHuman: ...\\n\\nAssistant: ..." (hh-rlhf) into turns. row, column: for errors. Raises
    InvalidRow for another text.
    """
    before, *parts = _TURN.split("\n\n" + text.lstrip())
    if before.strip() or not parts or parts[0] != "Human":
        raise row.invalid(
            "string that is no dialogue",
            f"column {column!r} is a string that does not begin with 'Human:'; without a column 'prompt' use "
            "a list of messages or a dialogue '\\n\\nHuman: ...\\n\\nAssistant: ...'",
        )
    return [
        {"role": _SPEAKERS[who], "content": said.strip()}
        for who, said in zip(parts[::2], parts[1::2], strict=True)
    ]


def is_dialogue(text: str) -> bool:
    """Whether a string is a dialogue of hh-rlhf."""
    return text.lstrip().startswith("Human:")


def is_open_dialogue(text: str) -> bool:
    """Whether a string is a dialogue of hh-rlhf that ends where an assistant turn begins."""
    return is_dialogue(text) and text.rstrip().endswith("\n\nAssistant:")


# ---- further columns of conversations


def with_system(row: Row, turns: list[Message]) -> list[Message]:
    """Return the turns, with the row's column `system` in front unless they begin with the same system
    message. Raises InvalidRow if they begin with another one.
    """
    if not row.fields.get("system"):
        return turns
    system = {"role": "system", "content": text_of(row, "system")}
    if not turns or turns[0]["role"] != "system":
        return [system, *turns]
    if turns[0]["content"].strip() != system["content"].strip():
        problem = "column 'system' differs from the first message, a system message too; remove one of them"
        raise row.invalid("two system messages", problem)
    return turns


def instruction_of(row: Row) -> list[Message]:
    """Return the columns `instruction`, `input`, `history` and `system` (Alpaca) as messages.

    history: earlier turns as [question, answer] pairs.
    """
    user = text_of(row, "instruction")
    if row.fields.get("input"):
        if not isinstance(row.fields["input"], str):
            raise row.invalid(
                "column 'input' of a wrong type",
                f"column 'input' must be a string, got {type(row.fields['input']).__name__}; fix it, or "
                "name other columns, for example with data.columns=prompt=question,completion=answer",
            )
        user = f"{user}\n\n{text_of(row, 'input')}"
    earlier: list[Message] = []
    history = row.fields.get("history") or []
    history = _parsed(history) if isinstance(history, str) else history
    for pair in history if isinstance(history, list | tuple) else [None]:
        if not (isinstance(pair, list | tuple) and len(pair) == 2 and all(isinstance(x, str) for x in pair)):
            raise row.invalid(
                "column 'history' of a wrong type",
                "column 'history' must be a list of [question, answer] pairs of strings; fix or remove it",
            )
        earlier += [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}]
    return with_system(row, [*earlier, {"role": "user", "content": user}])


def tools_of(row: Row) -> list | None:
    """Return the column `tools`, a list of JSON schemas or its JSON string; None without any."""
    tools = row.fields.get("tools")
    if isinstance(tools, str):
        tools = _parsed(tools) if tools.strip() else None
    if isinstance(tools, list | tuple):
        tools = [_parsed(tool) if isinstance(tool, str) else tool for tool in tools]
    if not tools:
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise row.invalid(
            "tools of a wrong type",
            "column 'tools' must be a list of JSON schemas or its JSON string, got "
            f"{row.fields['tools']!r:.60}",
        )
    return tools


def template_arguments_of(row: Row) -> dict[str, Any]:
    """Return the column `chat_template_kwargs`, further arguments of the chat template; {} without any."""
    arguments = row.fields.get("chat_template_kwargs") or {}
    arguments = _parsed(arguments) if isinstance(arguments, str) else arguments
    if not isinstance(arguments, dict):
        raise row.invalid(
            "column 'chat_template_kwargs' of a wrong type",
            "column 'chat_template_kwargs' must be an object with names and values of template arguments, "
            f"got {arguments!r:.60}",
        )
    taken = sorted(filter(is_set_by_jaxft, arguments))
    if taken:
        raise row.invalid(
            "template arguments that are set by jaxft",
            f"column 'chat_template_kwargs' has {', '.join(taken)}, which jaxft or the tokenizer "
            "sets; remove it",
        )
    return arguments


def tool_schema(function: Callable[..., Any]) -> dict[str, Any]:
    """Return the JSON schema of a function in the form of a row's tools, from its signature and docstring.

    Raises ValueError if these lack types or descriptions, or if an argument cannot be passed by its name.
    Example: tool_schema(add) is {"type": "function", "function": {"name": "add", "description": ...}}.
    """
    from transformers.utils import get_json_schema

    name = getattr(function, "__name__", repr(function))
    if inspect.isgeneratorfunction(function) or inspect.isasyncgenfunction(function):
        raise ValueError(f"tool {name}: it is a generator. Return its values, such as in a list.")
    try:
        schema: dict[str, Any] = get_json_schema(function)
    except Exception as error:  # DocstringParsingException, TypeHintParsingException, NameError of a hint
        reason = " ".join(str(error).split())
        raise ValueError(
            f"tool {name}: {reason}. Give each argument a type, and describe it in the docstring's Args "
            "section."
        ) from error
    parameters = inspect.signature(function).parameters.values()
    unnamed = [p.name for p in parameters if p.kind not in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    if unnamed:
        raise ValueError(
            f"tool {name}: a call gives each argument by its name, which parameter {unnamed[0]} does not "
            "take. Use parameters without * and /."
        )
    return schema
