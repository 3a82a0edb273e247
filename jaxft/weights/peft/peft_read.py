"""Read LoRA adapters, and heads with them, in PEFT's layout: adapter_config.json and
adapter_model.safetensors.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from jaxft.distributed import processes
from jaxft.models.adapted import SCORE
from jaxft.models.model import Model
from jaxft.nn import tree
from jaxft.nn.adapters.lora import Adapter
from jaxft.nn.tensor_names import HEAD_MODULE, SCORE_MODULES, is_listed, is_saved
from jaxft.nn.tree import Params
from jaxft.weights.edit.calibrated_rounding import FIRST_PAIRS, FirstPair
from jaxft.weights.hf.hf_read import COMPARED_VALUES, EMBEDDING, HEAD
from jaxft.weights.hf.safetensors import SafetensorsFiles, open_safetensors, read_tensor
from jaxft.weights.peft.peft_config import (
    CONVERT,
    MERGE,
    PREFIX,
    check_plain_lora,
    check_targets,
    config_of_decoder,
    of_decoder,
    read_adapter_config,
    with_plain_names,
)
from jaxft.weights.peft.peft_tensors import (
    MAGNITUDE,
    ONLY_TOKEN_ROWS,
    ONLY_TOKENS,
    Pair,
    adaptable_tensors,
    adapter_of,
    pair_names,
    read_modules,
    read_pair,
    read_shaped,
    without_head,
)
from jaxft.weights.tensors import ModelFiles, Tensor, errors_name, require_finite

SCORE_TENSOR = f"{PREFIX}{SCORE.template}"  # of a sequence classification adapter, [1, D]
SEQ_CLS = "SEQ_CLS"
# Copies of the base's head and embedding that peft adds to an adapter on one of them.
HEAD_COPIES = (f"{PREFIX}lm_head.base_layer.weight", f"{PREFIX}lm_head.weight")
TABLE_COPIES = (f"{PREFIX}model.embed_tokens.weight", f"{PREFIX}model.embed_tokens.base_layer.weight")
BASE_COPIES = (*HEAD_COPIES, *TABLE_COPIES)
# Peft's type TRAINABLE_TOKENS writes this tensor for a tied head; it equals the rows of the table.
TIED_TOKEN_ROWS = f"{PREFIX}lm_head.{ONLY_TOKEN_ROWS}"
TABLE_TOKEN_ROWS = f"{PREFIX}model.embed_tokens.{ONLY_TOKEN_ROWS}"
TABLE_MODULE = EMBEDDING.removesuffix(".weight")
# An adapter with ensure_weight_tying lists the embeddings only; its files have the parameters twice. jaxft
# reads both, so that logits are PEFT's; a run that starts from the adapter trains them apart.
# Tensors of the head, the table's tensors that they equal, and whether one is the other transposed:
TIED_TENSORS = (
    ("weight", "weight", False),
    ("lora_A.weight", "lora_embedding_B", True),
    ("lora_B.weight", "lora_embedding_A", True),
)
ReadFirstPair = Callable[..., FirstPair]  # (where, init, tensor, rank, scale) -> a0 [in, R], b0 [R, out]


def read_adapter(folder: str | Path, model: Model, base: ModelFiles | None = None) -> tuple[Params, Adapter]:
    """Read an adapter folder; return its tree of NumPy arrays and its settings.

    Pairs are padded with zeros to the largest rank of a kernel's layers; a layer without a pair gets zeros.
    The copies of the base's weights that peft adds to an adapter on lm_head are not read; see
    check_base_copies. base: the files of the base, which only unconverted PiSSA and OLoRA adapters need.
    Raises ValueError for a configuration that check_plain_lora refuses, for tensors that do not fit this
    model, and for a reward model's adapter.
    """
    parts, settings = read_parts(folder, model, base)
    if "score" in parts:
        raise ValueError(
            f"{folder}: a reward model's adapter, which generates no text; `python scripts/score.py` scores "
            "texts with it. Use a language model's adapter to generate"
        )
    return parts["adapter"], settings


def read_parts(
    folder: str | Path, model: Model, base: ModelFiles | None = None
) -> tuple[dict[str, Params], Adapter]:
    """Read an adapter folder of a language model or of a sequence classifier with one label.

    Return ({"adapter"} or, for a classifier, {"adapter", "score" [D, 1]}, settings). Tensors for the language
    model head are left out if `model` has a scalar head in its place. base: as in read_adapter. Raises
    ValueError as read_adapter does, and if the scalar head is missing or has several labels.
    """
    return _read(Path(folder), model, partial(_first_pair, base))


def read_declared(folder: str | Path, model: Model) -> tuple[tuple[str, ...], Adapter]:
    """Check an adapter folder as read_parts does, without the base. Return (names of its parts, settings)."""
    parts, settings = _read(Path(folder), model, _no_first_pair)
    return tuple(parts), settings


def _read(folder: Path, model: Model, read_first: ReadFirstPair) -> tuple[dict[str, Params], Adapter]:
    config, where = read_adapter_config(folder), folder / "adapter_config.json"
    default, has_head = _read_settings(folder, config), _has_head(folder, config)
    table = adaptable_tensors(model)
    files, prefix = of_decoder(_open_stored(folder))
    config = config_of_decoder(config, prefix, [x.module for tensors in table.values() for x in tensors])
    if (vector := next((name for name in files.tensors if MAGNITUDE in name), None)) and not default.dora:
        raise ValueError(
            f"{files.where}: tensor {vector} belongs to DoRA, but adapter_config.json has use_dora=false; "
            "correct the one that is wrong"
        )
    if has_head or not model.generates:
        config, files = without_head(config, files)
    elif config.get("ensure_weight_tying") and "head" not in model.weight_names:
        config = _with_tied_head(config)
        _check_tied(files)
    pairs = {path: [read_pair(files, x, config) for x in tensors] for path, tensors in table.items()}
    pairs = {path: of_path for path, of_path in pairs.items() if any(of_path)}
    adapted = [x for path in pairs for x, pair in zip(table[path], pairs[path], strict=True) if pair]
    present = {tensor.module for tensor in adapted}
    used = {name for tensor in adapted for name in pair_names(tensor, default.dora)}
    if init := _start_of_unconverted(config):
        default = default.doubled
        if "head" in pairs and "head" not in model.weight_names:
            raise ValueError(
                f"{where}: init_lora_weights={init!r} with a LoRA pair of lm_head, which is tied to the "
                f"embeddings of this model: PEFT has changed both; {MERGE}"
            )
        pairs = {
            path: _on_unchanged_base(of_path, table[path], default, partial(read_first, where, init))
            for path, of_path in pairs.items()
        }
    nodes, settings = adapter_of(pairs, default, model)
    parts: dict[str, Params] = {}
    if has_head:
        of_head = "it is the head of a reward model, which has one label"
        parts["score"] = read_shaped(files, SCORE_TENSOR, (1, model.config.width), of_head).T
        used.add(SCORE_TENSOR)
    if "embed" in pairs and default.dora:
        raise ValueError(
            f"{where}: use_dora=true with a LoRA pair of embed_tokens is not supported; jaxft reads DoRA of "
            f"linear layers; {MERGE}"
        )
    others = read_modules(where, config, files, model, present)
    _check_all_used(files, used | others.used, {*pairs, *others.nodes})
    only_tokens = config.get("peft_type") == ONLY_TOKENS
    rest = [x.module for path in table if path not in others.nodes and not only_tokens for x in table[path]]
    check_targets(where, config, present, [x for x in rest if x not in present])
    parts = {"adapter": tree.nested(nodes | others.nodes), **parts}
    return parts, replace(settings, **others.settings)


def _with_tied_head(config: dict[str, Any]) -> dict[str, Any]:
    """Add lm_head to modules_to_save or to target_modules, whichever lists the embeddings."""
    saved, targets = config.get("modules_to_save") or [], config.get("target_modules") or []
    if isinstance(saved, list) and any(is_saved(str(name), TABLE_MODULE) for name in saved):
        return {**config, "modules_to_save": [*saved, HEAD_MODULE]}
    if isinstance(targets, list) and is_listed(targets, (TABLE_MODULE,), "target_modules"):
        return {**config, "target_modules": [*targets, HEAD_MODULE]}
    return config


def _check_tied(files: SafetensorsFiles) -> None:
    """Raise ValueError if an adapter that ties the head to the embeddings has different values for them."""
    for of_head, of_table, transposed in TIED_TENSORS:
        head, table = f"{PREFIX}{HEAD_MODULE}.{of_head}", f"{PREFIX}{TABLE_MODULE}.{of_table}"
        if head not in files.tensors or table not in files.tensors:
            continue
        value = read_tensor(files, table)
        if not np.array_equal(read_tensor(files, head), value.T if transposed else value):
            raise ValueError(
                f"{files.where}: tensor {head} is not {table}, but adapter_config.json has "
                "ensure_weight_tying=true; save the adapter with peft again, or set it to false and list "
                "lm_head"
            )


def has_language_head(folder: Path) -> bool:
    """Return whether an adapter trains the language model head: by a LoRA pair, in full or in token rows."""
    saved = read_adapter_config(folder).get("modules_to_save") or ()
    names = [name for name in _open_tensors(folder).tensors if name.startswith(f"{PREFIX}{HEAD_MODULE}.")]
    return any(name not in HEAD_COPIES or HEAD_MODULE in saved for name in names)


def has_base_copies(folder: Path) -> bool:
    """Return whether an adapter's files have copies of the base's head or embedding."""
    return any(name in _open_tensors(folder).tensors for name in BASE_COPIES)


def check_base_copies(folder: Path, base: ModelFiles) -> None:
    """Raise ValueError if the base's weights that peft saved in an adapter differ from this base's.

    peft saves copies of the head and the embedding with an adapter on lm_head, and replaces the base's
    weights by them. Copies may differ by rounding to one of the two dtypes. Not compared: quantised weights,
    modules_to_save, and the head of an unconverted PiSSA or OLoRA adapter, from which the first pair is
    subtracted.
    """
    files, config = _open_tensors(folder), read_adapter_config(folder)
    head = HEAD if HEAD in base.tensors else EMBEDDING
    if config.get("ensure_weight_tying") and head == EMBEDDING:
        config = _with_tied_head(config)
    saved = tuple(config.get("modules_to_save") or ())
    for copied in BASE_COPIES:
        name = head if copied in HEAD_COPIES else EMBEDDING
        if copied not in files.tensors or name not in base.tensors or base.tensors[name].quantised:
            continue
        if _start_of_unconverted(config) and copied in HEAD_COPIES:
            continue
        if saved and copied.removesuffix(".weight").endswith(saved):  # trained
            continue
        shape = files.tensors[copied].shape
        rows = max(1, COMPARED_VALUES // max(1, shape[-1])) if shape else 1
        if shape != base.tensors[name].shape or not all(
            _equal_rounded(read_tensor(files, copied, part), base.read(name, part))
            for part in ((slice(at, min(at + rows, shape[0])),) for at in range(0, shape[0], rows))
        ):
            module = copied.removeprefix(PREFIX).removesuffix(".weight").rpartition(".")[2]
            replaces = shape == base.tensors[name].shape and module != "base_layer"
            listed = f"list {module} in modules_to_save of adapter_config.json to use it, or " * replaces
            raise ValueError(
                f"{files.where}: tensor {copied} differs from {name} of the base in {base.where}: the "
                f"adapter was trained with other embeddings or a larger vocabulary; {listed}{MERGE}"
            )


def _equal_rounded(a: np.ndarray, b: np.ndarray) -> bool:
    return np.array_equal(a.astype(b.dtype), b) or np.array_equal(b.astype(a.dtype), a)


def _open_tensors(folder: Path) -> SafetensorsFiles:
    return of_decoder(_open_stored(folder))[0]


def _open_stored(folder: Path) -> SafetensorsFiles:
    path = folder / "adapter_model.safetensors"
    if not path.is_file():
        pickled = (folder / "adapter_model.bin").is_file()
        advice = "adapter_model.bin is a pickle and is not read; load it with peft and call save_pretrained"
        raise FileNotFoundError(
            f"{path}: no such file; {advice if pickled else 'download the adapter again'}"
        )
    return with_plain_names(open_safetensors(path, [path]))


def _check_all_used(files: SafetensorsFiles, used: set[str], targets: set[str]) -> None:
    extra = [name for name in files.tensors if name not in used and name not in BASE_COPIES]
    is_copied = {TIED_TOKEN_ROWS, TABLE_TOKEN_ROWS} <= files.tensors.keys()
    if is_copied and np.array_equal(
        read_tensor(files, TIED_TOKEN_ROWS), read_tensor(files, TABLE_TOKEN_ROWS)
    ):
        extra = [name for name in extra if name != TIED_TOKEN_ROWS]
    if extra:
        raise ValueError(
            f"{files.where}: tensor {files.tensors[extra[0]].name} is not part of a LoRA pair of this model, "
            "nor of its modules_to_save; use the base model of the adapter"
        )
    if not targets:
        raise ValueError(f"{files.where}: no LoRA pair of this model; use the base model of the adapter")


def _has_head(folder: Path, config: dict[str, Any]) -> bool:
    """Return whether an adapter has a scalar head. Raises ValueError for a task_type other than CAUSAL_LM,
    SEQ_CLS and null, for a classifier without the head "score", and for a language model with its head.
    """
    task, saved = config.get("task_type"), config.get("modules_to_save") or []
    if not isinstance(saved, list) or not all(isinstance(name, str) and name for name in saved):
        raise ValueError(
            f"{folder / 'adapter_config.json'}: modules_to_save={saved!r}; expected a list of names; "
            "correct it"
        )
    has_head = task == SEQ_CLS and "score" in saved
    if has_head or (task in ("CAUSAL_LM", None) and not set(saved) & set(SCORE_MODULES)):
        return has_head
    raise ValueError(
        f"{folder / 'adapter_config.json'}: task_type={task!r} with modules_to_save={saved!r} is not "
        "supported; jaxft reads LoRA with task_type='CAUSAL_LM', and reward models with task_type='SEQ_CLS' "
        f"and modules_to_save=['score']; {MERGE}"
    )


def _read_settings(folder: Path, config: dict[str, Any]) -> Adapter:
    where = folder / "adapter_config.json"
    check_plain_lora(where, config)
    if config.get("peft_type") == ONLY_TOKENS:
        return Adapter(targets=())
    rank: Any = config.get("r")
    alpha: Any = config.get("lora_alpha")
    dropout: Any = config.get("lora_dropout", 0.0)
    numbers = all(map(_is_finite, (alpha, dropout)))
    if type(rank) is not int or not 0 < rank < 2**16 or not numbers:
        raise ValueError(
            f"{where}: r={rank!r}, lora_alpha={alpha!r}, lora_dropout={dropout!r}; expected a whole number r "
            "from 1 to 65535 and finite numbers; correct them"
        )
    for key in ("rank_pattern", "alpha_pattern"):
        patterns = config.get(key) or {}
        if not isinstance(patterns, dict):
            kind = type(patterns).__name__
            raise ValueError(f"{where}: {key} has type {kind}, expected an object; correct it")
        for pattern, value in patterns.items():
            tree.regex(pattern, f"{where}: {key}")
            if not (
                0 < value < 2**16 if type(value) is int else key == "alpha_pattern" and _is_finite(value)
            ):
                raise ValueError(
                    f"{where}: {key} has the value {value!r} for {pattern!r}; expected a whole number from 1 "
                    f"to 65535{'' if key == 'rank_pattern' else ', or another finite number'}; correct it"
                )
    with errors_name(str(where)):
        plain = Adapter(rank, float(alpha), float(dropout))
        return replace(plain, rslora=bool(config.get("use_rslora")), dora=bool(config.get("use_dora")))


def _is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e38


# PiSSA and OLoRA adapters that PEFT has not converted to plain LoRA
#
# PEFT trains their pair A, B of a weight W on `W - s B0 A0`, with the first pair A0, B0 of W. save_pretrained
# writes A and B alone, and from_pretrained computes A0 and B0 from the base again. jaxft leaves the base
# unchanged and reads `s (B A - B0 A0)`, one pair of twice the rank, as save_pretrained writes it with
# path_initial_model_for_weight_conversion. PEFT rounds `W - s B0 A0` to the dtype of the base, and its
# float32 SVD is inexact where the last singular value of A0 B0 is close to the next one; the pair of twice
# the rank, from float64, has neither error.


def _start_of_unconverted(config: Mapping[str, Any]) -> str | None:
    """Return "pissa" or "olora" for an adapter that PEFT has not converted to plain LoRA, else None."""
    start = config.get("init_lora_weights")
    return start if isinstance(start, str) and start in FIRST_PAIRS else None


def _first_pair(
    base: ModelFiles | None, where: Path, init: str, tensor: Tensor, rank: int, scale: float
) -> FirstPair:
    """Compute from the base's files the first pair (a0, b0) of a weight, which an unconverted adapter lacks.

    where: adapter_config.json. init: a key of FIRST_PAIRS. rank, scale: of the adapter's pair. Raises
    ValueError without a base, for a weight that the base lacks or stores quantised, and in runs of several
    processes, whose libraries may compute different signs.
    """
    about, name = f"{where}: init_lora_weights={init!r}", tensor.name
    if base is None or processes.is_multi_process():
        needs = "needs the base's weights" if base is None else "is read by one process only"
        raise ValueError(f"{about} {needs}: {CONVERT}")
    stored = base.tensors.get(name)
    if stored is not None and stored.quantised is not None:
        raise ValueError(
            f"{about}: {name} of the base in {base.where} is quantised ({stored.quantised.method}); use the "
            "base in its own precision, which quant=nf4 (--quant nf4) quantises after reading"
        )
    if stored is None or stored.shape != tensor.shape:
        raise ValueError(
            f"{about} needs the base's weights, but {base.where} has no tensor {name} of shape "
            f"{tensor.shape}; use the base model of the adapter"
        )
    with errors_name(f"{base.where}: tensor {name}"):
        values = tensor.turned(require_finite(base.read(name)).astype(np.float32))
    return FIRST_PAIRS[init](values, rank, scale)


def _no_first_pair(where: Path, init: str, tensor: Tensor, rank: int, scale: float) -> FirstPair:
    """Return zeros where _first_pair needs a base: for callers that use only an adapter's settings."""
    ins, outs = tensor.values
    return np.zeros((ins, rank), np.float32), np.zeros((rank, outs), np.float32)


def _on_unchanged_base(
    pairs: Sequence[Pair | None],
    tensors: Sequence[Tensor],
    settings: Adapter,
    read_first: Callable[[Tensor, int, float], FirstPair],
) -> list[Pair | None]:
    """Convert a kernel's pairs of an unconverted adapter to pairs for the unchanged base: `[a, a0] [b; -b0]`,
    of twice the rank and the same scale, in float32.

    Pairs of the embedding table are returned unchanged, because PEFT initialises them as plain LoRA.
    settings: the adapter's. read_first(tensor, rank, scale): returns (a0, b0).
    """
    out = list(pairs)
    for i, (tensor, pair) in enumerate(zip(tensors, pairs, strict=True)):
        if pair is not None and tensor.path != "embed":
            scale = settings.scale_of(pair.rank, pair.alpha)
            a0, b0 = read_first(tensor, pair.rank, scale)
            a = np.concatenate([pair.a.astype(np.float32), a0], 1)
            b = np.concatenate([pair.b.astype(np.float32), -b0], 0)
            out[i] = pair._replace(a=a, b=b, alpha=pair.alpha * (2**0.5 if settings.rslora else 2))
    return out
