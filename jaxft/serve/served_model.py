"""Models by the names that requests use: prompts as token ids, as in training, and text of tokens."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from jaxft.data.chat.loss_mask import TOO_MANY, example_prompt_ids
from jaxft.data.chat.tool_calls import ToolFormat
from jaxft.data.decisions import DecisionPrompts, answer_tokens
from jaxft.data.row_settings import DEFAULT_TEMPLATE_SETTINGS, TemplateSettings
from jaxft.data.rows.columns import messages_of
from jaxft.data.rows.conversation import prompt_of
from jaxft.data.rows.dataset_rows import Row
from jaxft.data.rows.example import Chat, Completion, Decision
from jaxft.data.rows.invalid import InvalidRow, valid
from jaxft.nn.adapters.lora_rows import BASE

ONE_INSTRUCTION = (["user"], ["system", "user"])


@dataclass(frozen=True)
class ServedModel:
    """A model by its name.

    adapter: its number in the stack. stop: token ids that end a completion. plain: it continues plain text
    and has no conversations (data.format=plain). vocab: its embeddings. tools: the format of its tool calls.
    decision: the labels and the question of a decision model.
    """

    name: str
    tokenizer: Any
    stop: tuple[int, ...]
    vocab: int
    adapter: int = BASE
    template: TemplateSettings = DEFAULT_TEMPLATE_SETTINGS
    plain: bool = False
    tools: ToolFormat = "none"
    decision: DecisionPrompts = DecisionPrompts()


def chat_prompt(
    model: ServedModel,
    messages: Sequence[Any],
    tools: Any = None,
    arguments: Mapping[str, Any] | None = None,
    most: int | None = None,
) -> tuple[int, ...]:
    """Return the token ids of a conversation that ends before an assistant turn.

    Raises ValueError for messages that are wrong, or that the model's chat template rejects, for tools that
    it does not render, and for a text of more tokens than `most`, of which only the beginning is tokenised.
    """
    _require_chats(model)
    fields: dict[str, Any] = {"messages": list(messages)}
    fields |= {"tools": tools} if tools else {}
    fields |= {"chat_template_kwargs": dict(arguments)} if arguments else {}
    row = Row("messages", fields)
    try:
        roles = [turn["role"] for turn in messages_of(row, "messages")]
        if roles[-1] == "assistant":
            raise ValueError("the last message is an assistant message; end with a user or tool message")
        chat = prompt_of(row, "messages")
        assert isinstance(chat, Chat)
        chat = replace(chat, plain=roles in ONE_INSTRUCTION)
        ids = _prompt(model, chat, most)
    except InvalidRow as error:
        raise ValueError(error.problem) from error
    if chat.tools and ids == _without_tools(model, chat):
        raise ValueError(
            f"the chat template of {model.name} drops tools, so the model would not see them; omit tools, or "
            "train and serve a run with a template that renders them, such as chat_template=qwen"
        )
    return ids


def _require_chats(model: ServedModel) -> None:
    if model.plain:
        raise ValueError(
            f"{model.name} was trained on plain text (data.format=plain) and has no chat template; use "
            "/v1/completions"
        )


def _without_tools(model: ServedModel, chat: Chat) -> tuple[int, ...] | None:
    """Return the token ids of a conversation without its tools, None if the template rejects that."""
    try:
        return _prompt(model, replace(chat, tools=None), None)
    except (InvalidRow, ValueError):
        return None


def decision_prompt(
    model: ServedModel, decision: Decision, most: int | None = None
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the token ids after which the answer to a decision is read, those of its row in training, and
    the token of each choice. Raises ValueError as chat_prompt does.
    """
    _require_chats(model)
    try:
        before, tokens = answer_tokens(model.tokenizer, decision.prefix, decision.answers)
        return (*_prompt(model, decision.prompt(model.template.arguments), most), *before), tuple(tokens)
    except InvalidRow as error:
        raise ValueError(error.problem) from error


def text_prompt(model: ServedModel, text: str, most: int | None = None) -> tuple[int, ...]:
    """Return the token ids of plain text that is continued. Raises ValueError if it has none, and as
    chat_prompt does.
    """
    return _prompt(model, Completion("prompt", text, ""), most)


def _prompt(model: ServedModel, example: Chat | Completion, most: int | None) -> tuple[int, ...]:
    (ids,) = example_prompt_ids([example], model.tokenizer, model.template, most)
    if isinstance(ids, InvalidRow) and ids.reason == TOO_MANY:
        raise ValueError(
            f"the prompt is longer than the {most} tokens of this server; shorten it, or start the server "
            "with a larger --max-prompt"
        )
    return _checked(model, valid(ids))


def token_prompt(model: ServedModel, ids: Sequence[int]) -> tuple[int, ...]:
    """Return token ids that are continued. Raises ValueError for ids that the model does not have."""
    return _checked(model, ids)


def _checked(model: ServedModel, ids: Sequence[int]) -> tuple[int, ...]:
    if not ids:
        raise ValueError("the prompt is empty; give at least one token")
    if not 0 <= min(ids) <= max(ids) < model.vocab:
        wrong = min(ids) if min(ids) < 0 else max(ids)
        raise ValueError(
            f"token id {wrong} is not one of the model's 0 to {model.vocab - 1}; use the tokenizer that "
            "belongs to the model"
        )
    return tuple(ids)


def token_text(model: ServedModel, token: int) -> str:
    """Return the text of one token, special or not."""
    return model.tokenizer.decode([token])
