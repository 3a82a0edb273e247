"""Load the models of the server and the chat: one base with any number of adapters, each under a name.

A request to one of them becomes token ids, as in training, and its tokens become text.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any

import jax
from jax.sharding import Mesh

from jaxft.annotations import PositiveInt, QuantKind, check_bounds
from jaxft.data.chat.loss_mask import TOO_MANY, example_prompt_ids
from jaxft.data.chat.template import template_of
from jaxft.data.chat.tool_calls import ToolFormat, template_tool_format
from jaxft.data.decisions import DecisionPrompts, answer_tokens
from jaxft.data.row_settings import DEFAULT_TEMPLATE_SETTINGS, TemplateSettings
from jaxft.data.rows.columns import messages_of
from jaxft.data.rows.conversation import PLAIN
from jaxft.data.rows.example import Chat, Completion, Decision
from jaxft.data.rows.format_choice import prompt_of
from jaxft.data.rows.invalid_rows import InvalidRow, valid
from jaxft.data.rows.row_files import Row
from jaxft.distributed import sharding
from jaxft.engine.programs import Engine
from jaxft.engine.scheduler import ServeSizes, compile_server
from jaxft.models.adapted import adapted, adapted_by_row
from jaxft.models.model import Model
from jaxft.nn.adapters.lora_rows import BASE, not_stackable, stack_by_row, stored_stack
from jaxft.nn.attention.kv_cache import CacheFormat
from jaxft.nn.tree import Params
from jaxft.runs.loaded_weights import (
    NamedWeights,
    load_shared_base,
    prompt_settings,
    read_adapters,
    template_settings,
)
from jaxft.weights import pretrained
from jaxft.weights.hf.hf_read import stop_tokens
from jaxft.weights.peft import adapter_folders

ONE_INSTRUCTION = (["user"], ["system", "user"])


@dataclass(frozen=True)
class ServedModel:
    """A model that the server offers under a name.

    stop: token ids that end a completion. vocab: number of embeddings; token ids are below it. adapter: its
    adapter's index in the stack of adapters; BASE without one, or if the only adapter cannot be stacked.
    plain: whether it was trained on plain text (data.format=plain) and takes no conversations. tools: the
    format of its tool calls. decision: labels and question of a model that was trained on decisions.
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

    messages, tools: as in OpenAI's API. arguments: variables of the chat template, such as enable_thinking.

    Raises ValueError for messages that are wrong or that the model's chat template rejects, for tools that
    the template does not render, for a model of plain text, and for more than `most` tokens.
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
    """Return the token ids of a conversation without its tools, None if the template rejects it then."""
    try:
        return _prompt(model, replace(chat, tools=None), None)
    except (InvalidRow, ValueError):
        return None


def decision_prompt(
    model: ServedModel, decision: Decision, most: int | None = None
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return (token ids of a decision's prompt, as in training; token id of each choice). The token after the
    prompt is the model's decision. Raises ValueError as chat_prompt does.
    """
    _require_chats(model)
    try:
        before, tokens = answer_tokens(model.tokenizer, decision.prefix, decision.answers)
    except InvalidRow as error:
        raise ValueError(error.problem) from error
    try:
        return (*_prompt(model, decision.prompt(model.template.arguments), most), *before), tuple(tokens)
    except InvalidRow as error:
        raise ValueError(f"{decision.name}: {error.problem}") from error
    except ValueError as error:
        raise ValueError(f"{decision.name}: {error}") from error


def text_prompt(model: ServedModel, text: str, most: int | None = None) -> tuple[int, ...]:
    """Return the token ids of plain text to continue. Raises ValueError for 0 or more than `most` tokens."""
    return _prompt(model, Completion("prompt", text, ""), most)


def _prompt(model: ServedModel, example: Chat | Completion, most: int | None) -> tuple[int, ...]:
    (ids,) = example_prompt_ids([example], model.tokenizer, model.template, most)
    if isinstance(ids, InvalidRow) and ids.reason == TOO_MANY:
        raise ValueError(
            f"the prompt is longer than the {most} tokens of this server; shorten it, or start the server "
            "with a larger --max-prompt"
        )
    return token_prompt(model, valid(ids))


def token_prompt(model: ServedModel, ids: Sequence[int]) -> tuple[int, ...]:
    """Return `ids` as a tuple. Raises ValueError if there are none, or if one is outside the vocabulary."""
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


@dataclass(frozen=True)
class ServeFlags:
    """Options of the command line; with None, the model decides.

    prompt, new: the most tokens of a prompt (--max-prompt) and of a completion (--max-new). tools: the format
    of tool calls (--tool-format).
    """

    dtype: str | None = None
    quant: QuantKind | None = None
    kv_cache: CacheFormat = "compute"
    prompt: Annotated[PositiveInt | None, "--max-prompt"] = None
    new: Annotated[PositiveInt | None, "--max-new"] = None
    tools: ToolFormat | None = None

    def __post_init__(self):
        check_bounds(self)


@dataclass(frozen=True)
class Served:
    """Loaded models with their compiled programs. models: by name, the default one first."""

    engine: Engine
    sizes: ServeSizes
    params: Params
    models: dict[str, ServedModel]


def load_served(
    named: dict[str, NamedWeights], flags: ServeFlags, rows: int, continues: bool = False
) -> Served:
    """Load the base and all adapters, and compile the programs for `rows` requests at the same time.

    named: models by name, the default one first. continues: whether a prompt that begins with an earlier
    conversation reuses its cached keys and values.

    Raises ValueError for adapters that cannot share a program, and for more tokens than the model has
    positions.
    """
    mesh = sharding.make_mesh(sharding.MeshShape(), jax.devices()[:1])
    with jax.set_mesh(mesh):
        model, base = load_shared_base(named, mesh, flags.dtype, flags.quant)
        whole, added, numbers = _with_adapters(model, base, named, mesh)
        models = _served_models(model, named, numbers, flags.tools)
        sizes = _sizes(model, flags, rows, max(len(m.stop) for m in models.values()))
        sizes, params = replace(sizes, continues=continues), {"base": base, **added}
        return Served(compile_server(whole, sizes, params, mesh, flags.kv_cache), sizes, params, models)


def _with_adapters(
    model: Model, base: Params, named: dict[str, NamedWeights], mesh: Mesh
) -> tuple[Model, Params, dict[str, int]]:
    """Return (the model with its adapters, parameters of the adapters, name -> index of its adapter).

    named: models by name. base: parameters of the base. An adapter that trains a tensor in full cannot be
    stacked: it must be the only one. Its index is BASE, as that of a model without an adapter.
    """
    if all(n.adapter is None for n in named.values()):
        return adapted(model, None), {}, dict.fromkeys(named, BASE)
    folders = {name: n.adapter for name, n in named.items() if n.adapter is not None}
    ref = next(iter(named.values())).ref
    loaded = read_adapters(folders, ref, model, base)
    if any(map(not_stackable, loaded.values())):
        ((name, folder),) = folders.items()
        params, settings = adapter_folders.load_adapter(folder, model, mesh, ref)
        return adapted(model, settings), {"adapter": params}, {name: BASE}
    stack = stored_stack(stack_by_row(list(loaded.values())), model.dtype)
    stack = adapter_folders.on_every_device(stack, None, mesh)
    numbers = {name: number for number, name in enumerate(loaded, 1)}
    return adapted_by_row(model), {"stack": stack}, {name: numbers.get(name, BASE) for name in named}


def _served_models(
    model: Model, named: dict[str, NamedWeights], numbers: dict[str, int], tools: ToolFormat | None
) -> dict[str, ServedModel]:
    tokenizers: dict[str, Any] = {}
    served_by_name = {}
    for name, number in numbers.items():
        weights = named[name]
        if weights.tokenizer not in tokenizers:
            tokenizers[weights.tokenizer] = pretrained.load_tokenizer(weights.tokenizer)
        tokenizer = tokenizers[weights.tokenizer]
        data = weights.record["data"] if weights.record else {}
        chat_template = template_of(tokenizer)
        of_tools = chat_template and (chat_template.tool_use or chat_template)
        native = template_tool_format(of_tools.source) if of_tools and tools is None else "none"
        served_by_name[name] = ServedModel(
            name, tokenizer, stop_tokens(weights.ref, model, tokenizer), model.config.vocab, number,
            template_settings(prompt_settings(weights.record)), data.get("format") == PLAIN, tools or native,
            weights.decision,
        )  # fmt: skip
    return served_by_name


def _sizes(model: Model, flags: ServeFlags, rows: int, stops: int) -> ServeSizes:
    limit = model.config.max_positions
    new = flags.new or min(512, max(limit // 2, 1), max(1, limit - (flags.prompt or 0)))
    prompt = flags.prompt or min(1024, limit - new)
    if prompt >= 1 and prompt + new <= limit:
        return ServeSizes(rows, prompt, new, max(stops, 1))
    if flags.prompt and flags.new:
        raise ValueError(
            f"--max-prompt {prompt} plus --max-new {new} exceeds the model's {limit} positions; lower one"
        )
    name, value, other = ("prompt", prompt, "completion") if flags.prompt else ("new", new, "prompt")
    raise ValueError(
        f"--max-{name} {value} leaves no room for a {other} in the model's {limit} positions; use at most "
        f"{limit - 1}"
    )
