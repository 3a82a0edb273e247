"""Write a model, with an adapter merged into it or not, as a GGUF file."""

from pathlib import Path

from jaxft.train.export import ExportSource, merged_base
from jaxft.weights import card, gguf_save, hub, pretrained, stop_tokens
from jaxft.weights.gguf_types import MIXTURES, mixture_named


def check_gguf_output(out: Path, ref: str) -> None:
    """Raise ValueError if a GGUF file cannot be written to `out`: a folder, another name than *.gguf, or the
    file of the model `ref`.
    """
    if out.suffix != ".gguf" or out.is_dir():
        raise ValueError(f"--out {out} is not the name of a GGUF file; choose NAME.gguf, or leave --gguf out")
    if out.exists() and out.resolve() == hub.locate(ref).path.resolve():
        raise ValueError(f"--out {out} is the file that is read; choose another name")


def export_gguf(out: Path, source: ExportSource, mixture: str) -> str:
    """Write a model to the file `out`, tensor by tensor; return a summary.

    mixture: a name of gguf_types.MIXTURES. Raises ValueError, and leaves no file, for a model that GGUF
    cannot express and for weights that are not finite.
    """
    mixture = mixture_named(mixture)
    check_gguf_output(out, source.ref)
    if not source.model.generates:
        raise ValueError(
            f"{source.ref}: a reward model cannot be written as GGUF; leave --gguf out for a folder"
        )
    ends = stop_tokens.stop_tokens(source.ref, source.model, source.tokenizer)
    options = gguf_save.GgufOptions(mixture, out.stem, ends, card.license_of(source.ref))
    out.parent.mkdir(parents=True, exist_ok=True)
    saved = gguf_save.save_gguf(out, source.model, merged_base(source), source.tokenizer, options)
    lines = [
        _summary(saved.counts, mixture, out),
        *saved.notes,
        *pretrained.file_notes(source.ref, source.model),
    ]
    return "; ".join(lines)


def _summary(counts: dict[str, int], mixture: str, out: Path) -> str:
    listed = ", ".join(f"{count} {kind}" for kind, count in sorted(counts.items()))
    size = out.stat().st_size / 2**30
    expected = {MIXTURES[mixture][1], "F32"}
    fallbacks = sum(count for kind, count in counts.items() if kind in ("Q5_0", "Q5_1", "F16"))
    note = ""
    if mixture.endswith(("_K", "_M", "_S")) and fallbacks and not counts.keys() <= expected:
        note = (
            f"; {fallbacks} tensors whose inputs are not a multiple of 256 have another type, as with "
            "llama.cpp"
        )
    return f"{size:.2f} GiB; tensors: {listed}{note}"
