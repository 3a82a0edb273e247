"""Models for the server and the chat: one base with any number of adapters, from anywhere."""

from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jaxft.data.chat.template import template_of
from jaxft.data.chat.tool_calls import ToolFormat, template_tool_format
from jaxft.data.row_settings import DATE, TURN, TemplateSettings
from jaxft.data.rows.conversation import PLAIN
from jaxft.distributed import sharding
from jaxft.engine.programs import Engine
from jaxft.engine.scheduler import ServeSizes, compile_server
from jaxft.models.adapted import adapted, adapted_by_row
from jaxft.models.model import Model
from jaxft.nn.adapters.lora_rows import (
    BASE,
    not_stackable,
    stack_by_row,
    stored_stack,
)
from jaxft.nn.attention.cache import CacheFormat
from jaxft.nn.quant import QuantKind
from jaxft.runs.loaded_weights import common_dtype, common_quant, common_residual, read_adapters
from jaxft.runs.named_weights import NamedWeights
from jaxft.serve.served_model import ServedModel
from jaxft.tree import Params
from jaxft.weights import pretrained
from jaxft.weights.hf.stop_tokens import stop_tokens
from jaxft.weights.peft import adapters


@dataclass(frozen=True)
class ServeFlags:
    """The command line's choices that differ from those of the weights; None for theirs.

    tools: the format of tool calls, None for that of the chat template.
    """

    dtype: str | None = None
    quant: QuantKind | None = None
    kv_cache: CacheFormat = "compute"
    prompt: int | None = None
    new: int | None = None
    tools: ToolFormat | None = None

    def __post_init__(self):
        for option, value in (("--max-prompt", self.prompt), ("--max-new", self.new)):
            if value is not None and value < 1:
                raise ValueError(f"{option} must be at least 1, got {value}")


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

    continues: whether requests may go on where an earlier one ended, see engine/scheduler.py.

    Raises ValueError for adapters that cannot share a program, and for sizes that the model does not have.
    """
    first = next(iter(named.values()))
    dtype, quant = common_dtype(named, flags.dtype), common_quant(named, flags.quant)
    mesh = sharding.make_mesh(sharding.MeshShape(), jax.devices()[:1])
    with jax.set_mesh(mesh):
        residual = common_residual(named, flags.dtype)
        model = pretrained.model_for(first.ref, dtype=jnp.dtype(dtype), residual=residual)
        params: Params = {"base": pretrained.load_frozen(first.ref, model, mesh, quant)}
        whole, own, numbers = _with_adapters(model, params["base"], named, mesh)
        models = _served_models(model, named, numbers, flags.tools)
        sizes = _sizes(model, flags, rows, max(len(m.stop) for m in models.values()))
        sizes = replace(sizes, continues=continues)
        params |= own
        return Served(compile_server(whole, sizes, params, mesh, flags.kv_cache), sizes, params, models)


def _with_adapters(
    model: Model, base: Params, named: dict[str, NamedWeights], mesh: Mesh
) -> tuple[Model, Params, dict[str, int]]:
    """Return the model with its adapters, their parameters, and the number of each name's adapter.

    An adapter that cannot be stacked is attached alone, if it is the only one.
    """
    if all(n.adapter is None for n in named.values()):
        return adapted(model, None), {}, dict.fromkeys(named, BASE)
    folders = {name: n.adapter for name, n in named.items() if n.adapter is not None}
    ref = next(iter(named.values())).ref
    loaded = read_adapters(folders, ref, model, base)
    if any(map(not_stackable, loaded.values())):
        ((name, folder),) = folders.items()
        params, settings = adapters.load_adapter(folder, model, mesh, ref)
        return adapted(model, settings), {"adapter": params}, {name: BASE}
    stack = stored_stack(stack_by_row(list(loaded.values())), model.dtype)
    stack = adapters.on_every_device(stack, None, mesh)
    numbers = {name: number for number, name in enumerate(loaded, 1)}
    return adapted_by_row(model), {"stack": stack}, {name: numbers.get(name, BASE) for name in named}


def _served_models(
    model: Model, named: dict[str, NamedWeights], numbers: dict[str, int], tools: ToolFormat | None
) -> dict[str, ServedModel]:
    tokenizers: dict[str, Any] = {}
    found = {}
    for name, number in numbers.items():
        weights = named[name]
        if weights.tokenizer not in tokenizers:
            tokenizers[weights.tokenizer] = pretrained.load_tokenizer(weights.tokenizer)
        tokenizer = tokenizers[weights.tokenizer]
        data = weights.record["data"] if weights.record else {}
        template = TemplateSettings(
            data.get("date", DATE), tuple(data.get("chat_template_kwargs", ())), data.get("system", TURN)
        )
        stop = stop_tokens(weights.ref, model, tokenizer)
        served = ServedModel(name, tokenizer, stop, model.config.vocab, number, template)
        plain = data.get("format") == PLAIN
        chat_template = template_of(tokenizer)
        of_tools = chat_template and (chat_template.tool_use or chat_template)
        own = template_tool_format(of_tools.source) if of_tools and tools is None else "none"
        found[name] = replace(served, plain=plain, tools=tools or own, decision=weights.decision)
    return found


def _sizes(model: Model, flags: ServeFlags, rows: int, stops: int) -> ServeSizes:
    limit = model.config.max_positions
    new = flags.new or min(512, max(limit // 2, 1), max(1, limit - (flags.prompt or 0)))
    prompt = flags.prompt or min(1024, limit - new)
    if prompt < 1 or prompt + new > limit:
        raise ValueError(
            f"--max-prompt {prompt} plus --max-new {new} exceeds the model's {limit} positions; lower one"
        )
    return ServeSizes(rows, prompt, new, max(stops, 1))
