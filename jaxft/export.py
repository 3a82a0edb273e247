"""A base as it was held, with an adapter merged into it or not, written as a Hugging Face folder in a float dtype or packed."""

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxft import calibrate, params, prepare, tree, weights
from jaxft.params import Model
from jaxft.quant import KEPT, QTensor, Quant, bits, quantize, usual
from jaxft.weights import hf, hub, packed
from jaxft.weights.merged import Lazy, Rounding, merged
from jaxft.weights.packed import expanded


def write(
    out: Path,
    ref: str,
    model: Model,
    tokenizer: Any,
    dtype: Any,
    adapter: Any = None,
    held: Quant | None = None,
    pack: Quant | None = None,
    seen: dict[str, Any] | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> str:
    """Write the model of `ref` to the folder `out`, tensor by tensor; returns what was lost, in words for the end of a line.

    adapter: its arrays, merged in float32 onto the base as `held` quantises it. dtype: of what is not packed. pack: quantise the
    written weights, each rounded once from float32. seen: what calibrate.moments found, for rounding that looks at it, which
    takes its time and tells `say` where it is.
    Raises ValueError where `out` is the folder that is read.
    """
    located = hub.locate(ref)
    if out.resolve() == located.path.resolve():
        raise ValueError(f"--out {out} is what is being read; choose another folder")
    tensors, cast, packing = weights.open_tensors(ref), Rounding(), Rounding()
    tensors = prepare.as_held(tensors, model, held, ref) if held else tensors
    base = merged(tensors, model, adapter, jnp.float32)
    form = packing_of(model, pack, packing, seen or {}, say) if pack else None
    is_packed = form.forms if form else {}

    def leaf(path: str, exact: Lazy) -> Lazy:
        return exact if path in is_packed else cast.to(exact, jnp.dtype(dtype))

    base = tree.map_with_path(leaf, base, is_leaf=lambda x: isinstance(x, Lazy))
    hf.save_folder(out, model, base, tokenizer, located, packing=form)
    words = [f"rounding changed the weights by {100 * cast.share:.3f} % (root mean square)"] if cast.share else []
    if form:
        sizes = {path: math.prod(q.shape) for path, q in form.forms.items()}
        each = sum(bits(q) * sizes[path] for path, q in form.forms.items()) / sum(sizes.values())
        change = f"packing changed them by {100 * packing.share:.2f} % (root mean square)"
        words.insert(0, f"{each:.3f} bits a packed parameter, {change}")
    return "; ".join(words)


def packing_of(
    model: Model, quant: Quant, lost: Rounding, seen: dict[str, Any], say: Callable[[str], None] = lambda line: None
) -> hf.Packing:
    """How hf.save_folder packs a model's weights as `quant` says; what that loses is added to `lost`. seen, say: see write."""
    if quant.kind == KEPT:
        raise ValueError("quant=kept names no form to write; use int8, int4, nf4, fp4 or affine4")
    block, double = usual(quant.kind, quant.block, quant.double)
    quant = replace(quant, block=block, double=double)
    specs = params.spec_paths(model.specs)
    forms = {path: packed.form_of(specs[path].shape[-2:], quant) for path in prepare.packed_paths(model.specs, quant)}  # type: ignore[arg-type]
    tables = [path for path in forms if not model.names[path][1]]
    if tables:
        raise ValueError(f"{', '.join(tables)} is a table, which is not written packed; leave it out of quant.targets")

    def pack(path: str, number: int | None, layer: np.ndarray) -> QTensor:
        how = quant.kind, block, double
        if path in seen and number == 0:
            say(f"rounding {path}")
        found = quantize(layer, *how) if path not in seen else calibrate.compensated(layer, seen[path][number], *how)
        lost.add(layer, expanded(found))
        return found

    matrices = {**{path: name for path, (name, matrix) in model.names.items() if matrix}, "head": hf.HEAD[0]}
    plain = {name.removesuffix(".weight").rpartition(".")[2] for path, name in matrices.items() if path not in forms}
    return hf.Packing(forms, pack, packed.settings(quant, packed.method_for(forms.values()), sorted(plain)))


def size(folder: Path) -> float:
    """GiB of the weights in a folder."""
    return sum(p.stat().st_size for p in folder.glob("*.safetensors")) / 2**30
