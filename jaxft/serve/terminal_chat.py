"""In the terminal: a conversation with models and its commands, and episodes of an environment that a person
plays in place of the policy.
"""

import json
import queue
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from jaxft.annotations import Seed, check_values
from jaxft.data.chat.tool_calls import CallFormat
from jaxft.data.rows.example import Message
from jaxft.engine.sampling import Sampling
from jaxft.engine.scheduler import NewTokens, Scheduler
from jaxft.engine.session import Finish, Sampled
from jaxft.nn.adapters.lora_rows import BASE
from jaxft.rl.trajectory import Trajectory
from jaxft.serve.generation import choice_texts, token_requests
from jaxft.serve.openai_api import ApiError, ChoiceSettings, Piece
from jaxft.serve.served_models import ServedModel, chat_prompt, text_prompt

CALL = "/call"  # of a tool, in a turn that a person types
HELP = """\
/use NAME          chat with this model ("base" is the one without adapter); two names respond side by side
/models            list the models
/system [TEXT]     set the system prompt; without a text, remove it
/set NAME=VALUE    temperature, top_k, top_p, min_p, max_new or seed (none for a random one)
/retry             respond to the last message again
/undo              remove the last message and its responses
/reset             begin again with the same system prompt
/history           show the conversation
/save FILE         append it to a .jsonl file as rows for training, or write a .md file
/exit              leave (also Ctrl-D); Ctrl-C stops a response"""


@dataclass
class Turn:
    """A user's message and the responses to it, by model name."""

    user: str
    responses: dict[str, str] = field(default_factory=dict)

    def response(self, name: str) -> str:
        """Return the response of a model, given by its name; the first response if that model has none."""
        return self.responses.get(name) or next(iter(self.responses.values()), "")


@dataclass
class Conversation:
    """The state of a chat. models: by name. active: the names of the one or two models that respond.
    choice: settings of sampling. most_new: the largest value that /set max_new accepts. system: the system
    message, "" for none. done: whether the user has left.
    """

    models: dict[str, ServedModel]
    active: tuple[str, ...]
    choice: ChoiceSettings
    most_new: int
    system: str = ""
    turns: list[Turn] = field(default_factory=list)
    done: bool = False

    def messages(self, name: str) -> list[Message]:
        """Return the conversation as a model receives it. Messages without a response are left out, except
        the last one, because many templates reject two user messages in a row.
        """
        messages: list[Message] = [{"role": "system", "content": self.system}] if self.system else []
        for turn in self.turns:
            if turn.responses or turn is self.turns[-1]:
                messages.append({"role": "user", "content": turn.user})
            if turn.responses:
                messages.append({"role": "assistant", "content": turn.response(name)})
        return messages

    def prompt(self, name: str) -> tuple[int, ...]:
        """Return the token ids that a model continues: all messages up to the last one of the user; for a
        model of plain text, only this message.
        """
        model = self.models[name]
        if model.plain:
            return text_prompt(model, self.turns[-1].user)
        asked = replace(self, turns=[*self.turns[:-1], Turn(self.turns[-1].user)])
        return chat_prompt(model, asked.messages(name))


@dataclass(frozen=True)
class CommandResult:
    """The terminal's action after a command. text: text to print. again: whether the models must respond to
    the last message.
    """

    text: str = ""
    again: bool = False


def run_command(chat: Conversation, line: str) -> CommandResult:
    """Run a command such as "/set top_k=5". Raises ValueError if it is wrong, OSError if /save fails."""
    name, _, rest = line.strip().partition(" ")
    rest = rest.strip()
    if name in ("/exit", "/quit"):
        chat.done = True
        return CommandResult()
    if name == "/help":
        return CommandResult(HELP)
    if name == "/models":
        lines = (f"{'*' if model in chat.active else ' '} {model}" for model in chat.models)
        return CommandResult("\n".join(lines))
    if name == "/use":
        chat.active = chosen_models(chat, rest.replace(",", " ").split())
        return CommandResult(f"responding: {' and '.join(chat.active)}")
    if name == "/system":
        chat.system = rest
        return CommandResult(f"system prompt: {rest}" if rest else "no system prompt")
    if name == "/set":
        chat.choice = changed_choice(chat, rest)
        return CommandResult(shown_choice(chat.choice))
    if name == "/reset":
        chat.turns.clear()
        return CommandResult("a new conversation")
    if name in ("/retry", "/undo") and not chat.turns:
        raise ValueError(f"{name}: there is no message yet; type one first")
    if name == "/undo":
        return CommandResult(f"removed: {chat.turns.pop().user}")
    if name == "/retry":
        return CommandResult(again=True)
    if name == "/history":
        return CommandResult(as_markdown(chat))
    if name == "/save":
        return CommandResult(f"saved to {save(chat, rest)}")
    raise ValueError(f"{name[:40]} is not a command; /help lists the commands")


def chosen_models(chat: Conversation, names: Sequence[str]) -> tuple[str, ...]:
    """Return the keys of chat.models that `names` stand for; "base" is the model without an adapter. Raises
    ValueError for another name, and unless there are one or two names.
    """
    if not 1 <= len(names) <= 2:
        raise ValueError(f"/use takes one or two names of {', '.join(chat.models)}, got {len(names)}")
    base = next((name for name, model in chat.models.items() if model.adapter == BASE), None)
    known = {**({"base": base} if base else {}), **{name: name for name in chat.models}}
    for name in names:
        if name not in known:
            raise ValueError(f"no model {name[:80]!r}; use one of {', '.join(chat.models)}")
    return tuple(dict.fromkeys(known[name] for name in names))


def changed_choice(chat: Conversation, text: str) -> ChoiceSettings:
    """Return chat.choice with one setting changed. text: NAME=VALUE. Raises ValueError if it is wrong."""
    name, equals, value = (part.strip() for part in text.partition("="))
    old = chat.choice
    values: dict[str, Any] = {**vars(old.sampling), "seed": old.seed}
    kinds = {"temperature": float, "top_p": float, "min_p": float, "top_k": int, "max_new": int, "seed": int}
    if not equals or name not in kinds:
        raise ValueError(f"/set takes NAME=VALUE with a name of {', '.join(kinds)}, got {text!r:.40}")
    is_none = value.lower() == "none" and name in ("top_p", "min_p", "top_k", "seed")
    try:
        values[name] = None if is_none else kinds[name](value)
    except ValueError as error:
        wrong = "number; use one such as 0.7" if kinds[name] is float else "whole number; use one such as 40"
        raise ValueError(f"{name}={value[:40]} is not a {wrong}") from error
    if values["max_new"] > chat.most_new:
        raise ValueError(f"max_new={value} is above {chat.most_new}; start chat with a larger --max-new")
    seed = values.pop("seed")
    check_values({"seed": Seed | None}, {"seed": seed})
    return old._replace(sampling=Sampling(**values), seed=seed)


def shown_choice(choice: ChoiceSettings) -> str:
    """Return the settings as a line to print."""
    shown = {**vars(choice.sampling), "seed": choice.seed}
    return ", ".join(f"{name}={'none' if value is None else value}" for name, value in shown.items())


def as_markdown(chat: Conversation) -> str:
    """Return the conversation as Markdown."""
    parts = [f"**system**: {chat.system}"] if chat.system else []
    for turn in chat.turns:
        parts.append(f"**user**: {turn.user}")
        parts += [f"**{name}**: {text}" for name, text in turn.responses.items()]
    return "\n\n".join(parts) or "no messages yet"


def save(chat: Conversation, name: str) -> Path:
    """Write the conversation to the file `name`; return its path. A .jsonl file gets one more row per active
    model. Raises ValueError for a name without .jsonl or .md, FileExistsError for an .md file that exists.
    """
    path = Path(name).expanduser()
    if path.suffix not in (".jsonl", ".md"):
        raise ValueError(f"/save takes a .jsonl file (rows for training) or an .md file, got {name!r:.40}")
    if not any(turn.responses for turn in chat.turns):
        raise ValueError("/save: there is no response yet; send a message first")
    if path.suffix == ".md":
        with path.open("x", encoding="utf-8") as file:
            file.write(as_markdown(chat) + "\n")
        return path
    completed = replace(chat, turns=[turn for turn in chat.turns if turn.responses])
    rows = [{"messages": completed.messages(name), "model": name} for name in chat.active]
    with path.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    return path


def respond(scheduler: Scheduler, chat: Conversation) -> Generator[tuple[str, Piece], None, None]:
    """Yield (model, piece) while the active models respond to the last message at the same time. Their
    responses are stored in the conversation and replace earlier ones.

    Raises ValueError for a prompt that is too long, and ApiError if the device fails; earlier responses are
    then kept. If the iteration is ended early, the beginning of a response is stored.
    """
    turn, texts, names = chat.turns[-1], [], chat.active
    arrived: queue.SimpleQueue[tuple[int, NewTokens]] = queue.SimpleQueue()
    submitted = []
    for index, name in enumerate(names):
        model = chat.models[name]
        (request,) = token_requests(model, chat.choice, [_short_enough(chat.prompt(name), scheduler, model)])
        texts += choice_texts(model, chat.choice, 1)
        submitted.append((request, lambda progress, index=index: arrived.put((index, progress))))
    tickets, failed = scheduler.submit(submitted), False
    try:
        while not all(text.ended for text in texts):
            index, progress = arrived.get()
            if not texts[index].ended:
                yield names[index], texts[index].piece(progress)
    except ApiError:
        failed = True
        raise
    finally:
        for ticket in tickets:
            ticket.cancel()
        found_texts = {name: text.stream.text for name, text in zip(names, texts, strict=True)}
        new = {name: text for name, text in found_texts.items() if text.strip()}
        if new and not (failed and turn.responses):
            turn.responses = new


def _short_enough(prompt: tuple[int, ...], scheduler: Scheduler, model: ServedModel) -> tuple[int, ...]:
    """Return the prompt. Raises ValueError, which says what to do in a chat, if it is too long."""
    limit = scheduler.sizes.prompt
    if len(prompt) > limit:
        what = "message" if model.plain else "conversation"
        remedy = "shorten it" if model.plain else "begin again with /reset"
        raise ValueError(
            f"the {what} has {len(prompt)} tokens, more than the {limit} of this chat; {remedy}, or start "
            "chat with a larger --max-prompt"
        )
    return prompt


@dataclass
class TypedTurns:
    """A sampler of an environment's turns (TurnSession in rl/episodes.py) that asks a person for each turn.

    read(): returns a typed turn. show(text): prints prompts and observations. stop: token id that ends a
    turn. format: a turn "/call NAME {...}" becomes a tool call in this format; None leaves it as text.
    """

    read: Callable[[], str]
    show: Callable[[str], None]
    tokenizer: Any
    stop: int
    format: CallFormat | None
    asked: dict[int, int] = field(default_factory=dict)  # episode that waits for a turn -> its most tokens

    def start(self, prompt: Sequence[int], episodes: Sequence[int], number: int, max_new: int) -> None:
        """Show a prompt, and expect a turn of at most `max_new` tokens for each of these episode numbers."""
        self.asked |= dict.fromkeys(episodes, max_new)
        self.show(self.tokenizer.decode(prompt))

    def extend(self, episode: int, tokens: Sequence[int], max_new: int) -> None:
        """Show tokens that follow an episode's turn, such as a tool's result, and expect another turn."""
        self.asked[episode] = max_new
        self.show(self.tokenizer.decode(tokens))

    def drop(self, episode: int) -> None:
        """Expect no more turns of an episode."""
        self.asked.pop(episode, None)

    def wait(self) -> list[Sampled]:
        """Read a turn for the first episode that waits for one, and return it; [] if none waits."""
        if not self.asked:
            return []
        episode, most = next(iter(self.asked.items()))
        del self.asked[episode]
        text = written_call(self.read(), self.format)
        ids = [*self.tokenizer(text, add_special_tokens=False).input_ids, self.stop]
        finish: Finish = "stop" if len(ids) <= most else "length"
        tokens = np.array(ids[:most], np.int32)
        return [Sampled(episode, tokens, np.zeros(len(tokens), np.float32), finish)]


def written_call(text: str, format: CallFormat | None) -> str:
    """Return a typed turn as the policy would write it. Text that is no valid /call is returned unchanged.

    Example: written_call('/call add {"a": 1, "b": 2}', call_format("hermes")) is
    '<tool_call>\\n{"name": "add", "arguments": {"a": 1, "b": 2}}\\n</tool_call>'.
    """
    name, _, arguments = text.removeprefix(CALL).strip().partition(" ")
    if format is None or not text.startswith(f"{CALL} "):
        return text
    try:
        call = json.dumps({"name": name, "arguments": json.loads(arguments or "{}")}, ensure_ascii=False)
    except ValueError:
        return text
    return f"{format.opens}\n{call}\n{format.closes or ''}".strip()


def result_line(episode: Trajectory) -> str:
    """Return one line about how an episode ended, its score and its faults."""
    ended = "fault" if episode.fault else "ended" if episode.ended else "limit"
    faults = "".join(f"; {fault.kind}: {fault.text}" for fault in episode.faults)
    return f"[{ended}; score {episode.score:g}{faults}]"
