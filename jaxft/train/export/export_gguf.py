"""Write a model, with an adapter merged into it or not, as a GGUF file."""

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxft.distributed.disk import publish
from jaxft.models.model import Model
from jaxft.nn.adapters import lora
from jaxft.nn.quant import CHECKPOINT
from jaxft.train.export.export import ExportSource, merged_base
from jaxft.weights import pretrained
from jaxft.weights.gguf import gguf_write
from jaxft.weights.gguf.gguf_file import GgufHeader, part_files, read_gguf_header
from jaxft.weights.gguf.gguf_quantize import MIXTURES, mixture_named
from jaxft.weights.hf import hf_read, model_card
from jaxft.weights.hub import hub
from jaxft.weights.hub.complete_folders import parents_of
from jaxft.weights.tensors import tensors_of

KEEP = "keep"


def check_gguf_output(out: Path, ref: str) -> None:
    """Raise ValueError if a GGUF file cannot be written to `out`: a folder, another name than *.gguf, the
    file of the model `ref`, or another file that exists.
    """
    if out.suffix != ".gguf" or out.is_dir():
        raise ValueError(f"--out {out} is not the name of a GGUF file; choose NAME.gguf, or leave --gguf out")
    if out.exists() and out.resolve() == hub.locate(ref).path.resolve():
        raise ValueError(f"--out {out} is the file that is read; choose another name")
    if out.exists():
        raise ValueError(f"--out {out} exists; choose another name")


def check_gguf(out: Path, ref: str, mixture: str, calibrated: bool) -> None:
    """Raise ValueError for an output or a mixture that export_gguf refuses, or that has no use for
    calibration rows.
    """
    check_gguf_output(out, ref)
    name = mixture if mixture.lower() == KEEP else mixture_named(mixture)
    if calibrated and name in ("F32", "F16", "BF16", "Q8_0"):
        raise ValueError(f"--calibrate has no effect on --gguf {name}; leave it out")


def export_gguf(
    out: Path, source: ExportSource, mixture: str, importances: Mapping[str, np.ndarray] | None = None
) -> str:
    """Write a model to the file `out`, tensor by tensor; return a summary.

    mixture: a name of gguf_types.MIXTURES, or "keep" for the types and metadata of the GGUF file that the
    model comes from, which is copied bit for bit without an adapter. Raises ValueError, and leaves no file,
    for a model that GGUF cannot express and for weights that are not finite.
    importances: mean squares of the inputs of weights by Hugging Face name (see importances_of).
    """
    header = _gguf_header(source.ref)
    keep = mixture.lower() == KEEP
    if keep and header is None:
        raise ValueError(f"--gguf {KEEP} is for a GGUF file as the model, which {source.ref} is not")
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
        mixture,
        out.stem,
        ends,
        model_card.license_of(source.ref),
        None if rounded and not keep else header,
        _changed(source, rounded),
        keep,
        dict(importances or {}),
    )
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
    """Return the mean squares of the inputs of weights by Hugging Face name, up to a factor for each weight.

    squares: by parameter path, [L, I], see calibrate.input_squares.
    """
    table = tensors_of(model)
    return {
        tensor.name: np.asarray(squares[path][tensor.index]) for path in squares for tensor in table[path]
    }


def export_gguf_adapter(out: Path, source: ExportSource, kind: str) -> str:
    """Write a source's adapter alone to the file `out`; return a summary. kind: F32, F16 or BF16."""
    check_gguf_output(out, source.ref)
    if source.adapter is None or not source.model.generates:
        what = "a reward model" if source.adapter else "a model without an adapter"
        raise ValueError(f"--adapter-only: {source.ref} is {what}; leave it out")
    header = _gguf_header(source.ref)
    architecture = header.architecture if header else None
    with parents_of(out):
        count = gguf_write.save_gguf_adapter(out, source.model, source.adapter, kind.upper(), architecture)
    return f"{count} adapted weights as {kind}, for the base {source.ref}"


def _gguf_header(ref: str) -> GgufHeader | None:
    """Return the header of a model that is a GGUF file, None for another."""
    located = hub.locate(ref)
    return read_gguf_header(located.path) if located.kind == "gguf" else None


def _ends_left_out(tokenizer: Any, ends: Sequence[int]) -> list[str]:
    """Return a note about end tokens that GGUF's three fields (eos, eot, eom) have no place for."""
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
    """Return the Hugging Face names of tensors whose values are not those of the source's files."""
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
    note = ""
    if mixture.endswith(("_K", "_M", "_S")) and fallbacks and not counts.keys() <= expected:
        note = (
            f"; {fallbacks} tensors whose inputs are not a multiple of 256 have another type, as with "
            "llama.cpp"
        )
    return f"{size:.2f} GiB; tensors: {listed}{note}"
