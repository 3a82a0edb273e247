"""A base as it was held, with an adapter merged into it or not, written as a Hugging Face folder in a float dtype or packed."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxft import tree
from jaxft.distributed import sync
from jaxft.models.model import Model
from jaxft.nn import param
from jaxft.nn.quant import CHECKPOINT, QTensor, Quant, bits_per_param, quantize, with_defaults
from jaxft.train import partition
from jaxft.train.settings import Run
from jaxft.weights import gptq, hf, hub, peft, pretrained, quantised_write, storage
from jaxft.weights.hf import SCORE
from jaxft.weights.merge import Lazy, Rounding, folded, merged
from jaxft.weights.quantised import expanded, form_of


@dataclass(frozen=True)
class Whole:
    """A model to be written. ref: where its weights come from; adapter: arrays that are merged in float32 onto the base as `held`
    quantises it, None for the base alone. score: the scalar head [D, 1] of a scorer; without one that of the files."""

    ref: str
    model: Model
    tokenizer: Any
    adapter: Any = None
    held: Quant | None = None
    score: Any = None


@dataclass(frozen=True)
class Pack:
    """How the written weights are quantised, each rounded once from float32.

    seen: what calibrate.moments found, for rounding that looks at it, which takes its time and tells `say` where it is.
    """

    quant: Quant
    seen: dict[str, Any] = field(default_factory=dict)
    say: Callable[[str], None] = lambda line: None


def write(out: Path, whole: Whole, dtype: Any, pack: Pack | None = None) -> str:
    """Write a model to the folder `out`, tensor by tensor; returns what was lost, in words for the end of a line.

    dtype: of what is not packed. Raises ValueError where `out` is the folder that is read.
    """
    ref, model = whole.ref, whole.model
    located = hub.locate(ref)
    if out.resolve() == located.path.resolve():
        raise ValueError(f"--out {out} is what is being read; choose another folder")
    tensors, cast, packing = pretrained.open_tensors(ref), Rounding(), Rounding()
    tensors = pretrained.with_storage_rounding(tensors, model, whole.held, ref) if whole.held else tensors
    base = merged(tensors, model, whole.adapter, jnp.float32)
    if not model.generates:
        score = tensors.read(SCORE).T if whole.score is None else np.asarray(whole.score)
        base["score"] = Lazy(score.shape, np.dtype(np.float32), lambda _: score.astype(np.float32))
    form = packing_of(model, pack, packing) if pack else None
    is_packed = form.forms if form else {}

    def leaf(path: str, exact: Lazy) -> Lazy:
        return exact if path in is_packed else cast.to(exact, jnp.dtype(dtype))

    base = tree.map_with_path(leaf, base, is_leaf=lambda x: isinstance(x, Lazy))
    hf.save_folder(out, model, base, whole.tokenizer, located, packing=form)
    words = (
        [f"rounding changed the weights by {100 * cast.share:.3f} % (root mean square)"] if cast.share else []
    )
    if form:
        sizes = {path: math.prod(q.shape) for path, q in form.forms.items()}
        each = sum(bits_per_param(q) * sizes[path] for path, q in form.forms.items()) / sum(sizes.values())
        change = f"packing changed them by {100 * packing.share:.2f} % (root mean square)"
        words.insert(0, f"{each:.3f} bits a packed parameter, {change}")
    return "; ".join(words)


def packing_of(model: Model, how: Pack, lost: Rounding) -> hf.Packing:
    """What hf.save_folder is told of a model's weights that are packed; what that loses is added to `lost`."""
    quant, seen = how.quant, how.seen
    if quant.kind == CHECKPOINT:
        raise ValueError("quant=checkpoint names no form to write; use int8, int4, nf4, fp4 or affine4")
    block, double = with_defaults(quant.kind, quant.block, quant.double)
    quant = replace(quant, block=block, double=double)
    specs = param.spec_paths(model.specs)
    forms = {}
    for path in storage.quantised_paths(model.specs, quant):
        *_, size_in, size_out = specs[path].shape
        forms[path] = form_of((size_in, size_out), quant)
    tables = [path for path in forms if not model.weight_names[path][1]]
    if tables:
        raise ValueError(
            f"{', '.join(tables)} is a table, which is not written packed; leave it out of quant.targets"
        )

    def pack(path: str, number: int | None, layer: np.ndarray) -> QTensor:
        form = quant.kind, block, double
        if path in seen and number == 0:
            how.say(f"rounding {path}")
        found = gptq.compensated(layer, seen[path][number], *form) if path in seen else quantize(layer, *form)
        lost.add(layer, expanded(found))
        return found

    matrices = {
        **{path: name for path, (name, matrix) in model.weight_names.items() if matrix},
        "head": hf.HEAD[0],
    }
    plain = {
        name.removesuffix(".weight").rpartition(".")[2]
        for path, name in matrices.items()
        if path not in forms
    }
    return hf.Packing(
        forms,
        pack,
        quantised_write.settings(quant, quantised_write.method_for(forms.values()), sorted(plain)),
    )


def size(folder: Path) -> float:
    """GiB of the weights in a folder."""
    return sum(p.stat().st_size for p in folder.glob("*.safetensors")) / 2**30


def export_run(t: partition.Partition, params: Any, run: Run, tokenizer: Any, folder: Path) -> Path:
    """Write adapter/ (PEFT layout) if only an adapter was trained, else model/ (Hugging Face layout, merged).

    Every process calls it and gathers a layer at a time; process 0 writes.
    """
    if run.adapter and not any(jax.tree.leaves(t.mask["base"])):
        score = params.get("score")
        peft.save_adapter(folder / "adapter", params["adapter"], run.adapter, run.model, run.weights, score)
        tokenizer = tokenizer if score is None else hf.padded_apart(tokenizer)
        sync.by_first(sync.gathered, lambda: bool(tokenizer.save_pretrained(folder / "adapter")))
        return folder / "adapter"
    base = folded(params["base"], params.get("adapter"), run.model.dtype)
    base |= {"score": params["score"]} if "score" in params else {}
    hf.save_folder(folder / "model", run.model, base, tokenizer, run.weights)
    return folder / "model"
