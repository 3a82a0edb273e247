"""Models for the server and the chat: one base with any number of adapters, from anywhere."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jaxft.data.chat.template import template_of
from jaxft.data.chat.template_settings import DATE, TURN, TemplateSettings
from jaxft.data.chat.tool_calls import ToolFormat, template_tool_format
from jaxft.data.rows.conversation import PLAIN
from jaxft.distributed import sharding
from jaxft.engine.programs import Engine
from jaxft.engine.scheduler import ServeSizes, compile_server
from jaxft.models.adapted import adapted, adapted_by_row
from jaxft.models.model import Model
from jaxft.nn.adapters.lora_rows import (
    BASE,
    check_stackable,
    in_dtype,
    not_stackable,
    of_equal_shapes,
    stack_by_row,
    stored_stack,
    with_gains,
)
from jaxft.nn.attention.cache import CacheFormat
from jaxft.nn.quant.quant import Quant, QuantKind, quant_setting
from jaxft.runs.named_weights import NamedWeights, named_weights
from jaxft.runs.store.store_copy import IN_STORE, local_folder
from jaxft.serve.served_model import ServedModel
from jaxft.tree import Params
from jaxft.weights import pretrained
from jaxft.weights.hf.stop_tokens import stop_tokens
from jaxft.weights.peft import adapters, peft


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


def named_models(
    runs: Sequence[str], model: str | None, folders: Sequence[str], default: str
) -> dict[str, NamedWeights]:
    """Resolve --run, --model and --adapter, each [NAME=]PATH, to weights by name: the base's own name last.

    Raises ValueError for a name that is given twice, and for weights on different bases.
    """
    found: dict[str, NamedWeights] = {}
    for kind, items in (("run", runs), ("adapter", folders)):
        for item in items:
            name, item_path = _split(item)
            is_run = kind == "run"
            path = local_folder(item_path) if is_run else Path(item_path)
            named = named_weights(path, None, None) if is_run else named_weights(None, model, path)
            name = name or _name_of(path)
            if name in found:
                raise ValueError(f"two models have the name {name!r}; name them: --{kind} NAME={path}")
            found[name] = named
    refs = {named.ref: name for name, named in found.items()}
    if model is not None and runs:
        raise ValueError("--run sets the base; omit --model")
    if len(refs) > 1:
        (one, first), (other, second) = list(refs.items())[:2]
        raise ValueError(
            f"{first} and {second} are on different bases ({one} and {other}); serve them separately, on two "
            "ports"
        )
    ref = next(iter(refs), model or default)
    if not all(named.adapter is None for named in found.values()):
        found.setdefault(_base_name(ref), NamedWeights(ref, None, None, []))
    return found or {_base_name(ref): NamedWeights(ref, None, None, [])}


def named_adapters(
    run: Path | None, model: str | None, items: Sequence[str], default: str
) -> dict[str, NamedWeights]:
    """Resolve --run, or --model with any number of --adapter [NAME=]FOLDER, to weights by the adapter's name.

    Without adapters, or with one that has no name, the name is "". Errors are those of named_models.
    """
    if len(items) > 1:
        found = named_models([], model, items, default)
        return {name: weights for name, weights in found.items() if weights.adapter is not None}
    name, folder = _split(items[0]) if items else ("", "")
    return {name: named_weights(run, model, Path(folder) if items else None, default)}


def _split(item: str) -> tuple[str, str]:
    name, equals, path = item.partition("=")
    if equals and name and path and not IN_STORE.match(item) and not Path(item).exists():
        return name, path
    return "", item


def _name_of(path: Path) -> str:
    """Return the name of a run or an adapter folder: `runs/sft/adapter` is sft."""
    own = path.resolve()
    while own.name in ("adapter", "model", "best") and own.parent.name:
        own = own.parent
    return own.name


def _base_name(ref: str) -> str:
    """Return a model's name: the last part of its path, its file or its repository."""
    last = ref.removeprefix("pypi:").rstrip("/").rpartition("/")[2]
    return last.removesuffix(".gguf") or ref


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


def common_dtype(named: dict[str, NamedWeights], dtype: str | None) -> str:
    """Return `dtype` or, if it is None, the compute dtype of the runs. Raises ValueError if they differ."""
    found = {n.record["model"]["dtype"]: name for name, n in named.items() if n.record}
    if dtype is None and len(found) > 1:
        raise ValueError(f"the runs {' and '.join(found.values())} have different dtypes; set --dtype")
    return dtype or next(iter(found), "bfloat16")


def common_residual(named: dict[str, NamedWeights], dtype: str | None) -> str | None:
    """Return the dtype of the residual stream of the runs; None is the model's default, also with a `dtype`
    of the command line. Raises ValueError if the runs differ.
    """
    found = {n.record["model"].get("residual"): name for name, n in named.items() if n.record and not dtype}
    if len(found) > 1:
        raise ValueError(
            f"the runs {' and '.join(found.values())} have residual streams of different dtypes; set "
            "--dtype, which computes all of them alike"
        )
    return next(iter(found), None)


def common_quant(named: dict[str, NamedWeights], kind: QuantKind | None) -> Quant | None:
    """Return how the base is quantised: as `kind` or the runs of the adapters say. Raises ValueError if they
    differ.
    """
    settings = {
        name: quant_setting(kind, n.record if n.adapter else None) for name, n in named.items() if n.adapter
    }
    if not settings:
        return quant_setting(kind, None)
    (first, quant), *others = settings.items()
    for name, other in others:
        if other != quant:
            raise ValueError(f"{first} and {name} have differently quantised bases; set --quant")
    return quant


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


def load_equal_adapters(
    folders: Mapping[str, Path], ref: str, model: Model, base: Params, mesh: Mesh
) -> dict[str, Params]:
    """Load adapters by name as trees of the same shapes, so that one program takes each. Arguments and
    errors: as in read_adapters.
    """
    loaded = read_adapters(folders, ref, model, base)
    equal = [in_dtype(one, model.dtype) for one in of_equal_shapes(list(loaded.values()))]
    return adapters.on_every_device(dict(zip(loaded, equal, strict=True)), None, mesh)


def read_adapters(folders: Mapping[str, Path], ref: str, model: Model, base: Params) -> dict[str, Params]:
    """Read adapters by name, those of DoRA with the gains of their outputs.

    base: the parameters of `ref`, as they are stored. Raises ValueError for an adapter that does not fit the
    base or, of several, that cannot share a program with others.
    """
    for folder in folders.values():
        pretrained.check_adapter_base(folder, ref)
    files = pretrained.open_files(ref)
    found = {name: peft.read_adapter(folder, model, files)[0] for name, folder in folders.items()}
    check_stackable(found)
    return {name: with_gains(base, one) for name, one in found.items()}


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
        found[name] = replace(served, plain=plain, tools=tools or own)
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
