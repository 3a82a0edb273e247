"""What a run trains and what it keeps: specs, the trainable mask, weights on the mesh, and all of it as shapes only."""

import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxft import tree
from jaxft.distributed import sharding
from jaxft.models.heads import Scorer
from jaxft.nn import param
from jaxft.nn.lora import Adapter, adapted, adapter_specs, target_paths
from jaxft.nn.param import Model, ParamSpec
from jaxft.nn.quant import KEPT, QTensor, Quant, bits, dequantize, is_paired, quantize
from jaxft.weights import hf, peft, pretrained
from jaxft.weights import place as shards
from jaxft.weights.quant_layout import same_form
from jaxft.weights.safetensors import Index, Tensors


class Held(NamedTuple):
    """How a leaf is kept: its dtype; where it is packed the arguments of quant.quantize, or the form of a layer in the files."""

    dtype: Any
    pack: tuple[str, int | None, bool | None] | None = None
    form: QTensor | None = None

    @property
    def quantised(self) -> bool:
        """Whether it has fewer bits than its dtype."""
        return self.form is not None or self.pack is not None and self.pack[0] != "bits"


@dataclass(frozen=True)
class Trained:
    """A model over the whole tree {"base", "adapter", **model.beside}, which of its leaves are trained, and how each is kept.

    specs, mask: trees of the same structure. trainable_specs: None where a leaf is frozen. held: by path.
    """

    model: Model
    mask: Any
    trainable_specs: Any
    held: dict[str, Held]

    @property
    def specs(self) -> Any:
        """ParamSpecs of the whole tree."""
        return self.model.specs


def trained(
    model: Model,
    adapter: Adapter | None,
    pattern: str | tuple[str, ...] | None,
    quant: Quant | None = None,
    ref: str | None = None,
    dtype: Any = None,
) -> Trained:
    """Decide by path what is trained: the adapter's a and b, or without an adapter the base, and all that stands beside them; or
    what `pattern` matches, of several what any of them does.

    An adapter's `scale` is never trained. ref: where the weights come from, whose files' headers say what quant=kept is.
    dtype: of what is trained of the base, float32 or wider by default. Raises ValueError for a pattern that matches nothing,
    and where `quant` packs what is trained.
    """
    whole = adapted(model, adapter)
    paths = jax.tree.map(lambda _: 0, whole.specs, is_leaf=param.is_spec)
    wanted = (pattern,) if isinstance(pattern, str) else pattern or patterns(model, adapter)
    mask = jax.tree.map(lambda *hit: any(hit), *(tree.mask_by_path(paths, each) for each in wanted))
    mask = tree.map_with_path(lambda path, m: m and (in_base(path) or not path.endswith("/scale")), mask)
    if dtype is not None and not any(jax.tree.leaves(mask["base"])):
        name = jnp.dtype(dtype).name
        raise ValueError(
            f"run.params={name} is how trained weights of the base are held, and there are none; use float32"
        )
    if not any(jax.tree.leaves(mask)):
        raise ValueError(
            f"train={pattern!r} leaves nothing to train: an adapter's scale is fixed; name its a or b"
        )
    return _with_forms(whole, mask, quant, ref, dtype)


def patterns(
    model: Model, adapter: Adapter | None, own: str | None = None, beside: Mapping[str, Scorer] | None = None
) -> tuple[str, ...]:
    """Path patterns of what is trained. own: of the run's own parameters, None for the usual ones. beside: further models on the
    base, of which those that say so are trained."""
    beside = beside or {}
    mine = [re.escape(name) for name in model.beside if name not in beside]
    usual = ("adapter/.*" if adapter else "base/.*", *(f"{name}(/.*)?" for name in mine))
    return (
        *((own,) if own else usual),
        *(f"{re.escape(name)}/.*" for name, one in beside.items() if one.trained),
    )


def in_base(path: str) -> bool:
    """Whether a path of the whole tree is one of the base's weights."""
    return path.startswith("base/")


def _with_forms(whole: Model, mask: Any, quant: Quant | None, ref: str | None, dtype: Any = None) -> Trained:
    packed: list[str] = packed_paths(whole.specs["base"], quant) if quant else []
    kept = _kept(whole, packed, ref) if quant and quant.kind == KEPT else {}
    packed = list(kept) if quant and quant.kind == KEPT else packed
    is_trained = tree.paths(mask)
    clash = next((path for path in packed if is_trained[f"base/{path}"]), None)
    if quant and clash:
        raise ValueError(
            f"quant={quant.kind} freezes base/{clash}, which is to be trained; train an adapter, or set quant=none"
        )
    held = {}
    wide = max(whole.dtype, jnp.float32, key=lambda dtype: jnp.dtype(dtype).itemsize)
    for path, spec in param.spec_paths(whole.specs).items():
        if is_trained[path] or not in_base(path):
            held[path] = Held(wide if dtype is None or not in_base(path) else jnp.dtype(dtype))
        elif quant and path.removeprefix("base/") in packed:
            form = kept.get(path.removeprefix("base/"))
            held[path] = Held(whole.dtype, None if form else (quant.kind, quant.block, quant.double), form)
        else:
            as_bits = is_matrix(spec) and jnp.dtype(whole.dtype).itemsize == 2
            held[path] = Held(whole.dtype, ("bits", None, None) if as_bits else None)
    return Trained(whole, mask, jax.tree.map(lambda m, s: s if m else None, mask, whole.specs), held)


def _kept(model: Model, wanted: list[str], ref: str | None) -> dict[str, QTensor]:
    """The forms of those of the wanted parameters that the files of `ref` hold packed, from their headers."""
    if ref is None:
        raise ValueError("quant=kept holds the base as its files do, and no files are named")
    tensors = pretrained.open_tensors(ref)
    hf.check(tensors, model)
    forms = {path: hf.form_in(tensors, model, path) for path in wanted}
    found = {path: form for path, form in forms.items() if form is not None}
    if not found:
        why = next((f"; of {name}, {p.why}" for name, p in tensors.packed.items() if p.why), "")
        raise ValueError(
            f"{ref}: holds no weights packed as quant=kept would keep them{why}; use another quant, or none"
        )
    return found


def is_matrix(spec: ParamSpec) -> bool:
    """Two axes beside the stacked layers."""
    return len(spec.axes) - ("layers" in spec.axes) == 2


def packed_paths(base: Any, quant: Quant) -> list[str]:
    """Paths of the base's matrices that `quant.targets` selects. Raises ValueError if there is none."""
    if quant.targets == "all-linear":
        return target_paths(base, "all-linear")
    known = [path for path, spec in param.spec_paths(base).items() if is_matrix(spec)]
    wanted = tree.regex(quant.targets, "quant.targets")
    found = [path for path in known if wanted.fullmatch(path)]
    if not found:
        raise ValueError(
            f"quant.targets={quant.targets!r} matches no matrix; the paths are {', '.join(known)}"
        )
    return found


def make_keep(t: Trained) -> Callable[[str, QTensor], bool]:
    """`keep(path, form)`: whether what the files hold of a leaf, all of it in that form, is what the run holds."""

    def keep(path: str, form: QTensor) -> bool:
        held = t.held[f"base/{path}"]
        if not held.quantised:
            return False
        layer = jax.ShapeDtypeStruct(form.shape, held.dtype)
        return same_form(form, held.form or jax.eval_shape(lambda x: quantize(x, *(held.pack or ())), layer))

    return keep


def load_base(ref: str, t: Trained, mesh: Any, frozen_only: bool = False) -> Any:
    """The base of `ref` on the mesh as the run holds it; of each leaf a process reads what its devices hold.

    frozen_only: a restored run has its trained leaves already; None stands for them.
    """
    found, keep, mask = pretrained.open_leaves(ref, t.model), make_keep(t), tree.paths(t.mask)

    def load(path: str, spec: ParamSpec) -> Any:
        full, leaf = f"base/{path}", found[path]
        if frozen_only and mask[full]:
            return None
        like = as_shapes(spec, t.held[full])
        return shards.load(
            leaf, like, place(spec, like, mesh, full), leaf.form is not None and keep(path, leaf.form)
        )

    return tree.map_with_path(load, t.specs["base"], is_leaf=param.is_spec)


def changed_by_holding(ref: str, t: Trained) -> list[str]:
    """A line for each group of weights that the files hold packed and the run in another way, and why."""
    tensors, keep = pretrained.open_tensors(ref), make_keep(t)
    groups: dict[str, list[str]] = {}
    for path in param.spec_paths(t.model.specs["base"]):
        name = t.model.names[path][0].format(i=0)
        if name not in tensors.packed:
            continue
        form, p, held = hf.form_in(tensors, t.model, path), tensors.packed[name], t.held[f"base/{path}"]
        if form is not None and keep(path, form):
            how = f"kept as {p.method} holds them: {p.why}" if p.why else ""
        elif held.quantised and held.pack:
            how = f"packed by {p.method} and rounded again to {held.pack[0]}; quant=kept leaves them as they are"
        else:
            why = p.why or (
                "" if form is not None else "the layers are not packed alike, or not along their inputs"
            )
            how = f"packed by {p.method} and expanded to {jnp.dtype(held.dtype).name}{f' ({why})' if why else ''}"
        groups.setdefault(how, []).append(path)
    return [f"weights {how}: {', '.join(paths)}" for how, paths in groups.items() if how]


def place(spec: ParamSpec, leaf: Any, mesh: Any, path: str) -> Any:
    """The sharding of a parameter as it is held, an array or a QTensor; of a QTensor for each of its arrays."""
    whole = param.place(spec, mesh, path)
    if not isinstance(leaf, QTensor):
        return whole
    if leaf.block or is_paired(leaf.kind):
        block = leaf.block if leaf.block and leaf.index is None else 2
        whole = sharding.between_blocks(whole, spec.axes, spec.shape, block, path)
    scales = whole if leaf.index is None else sharding.uncut(whole, -2)  # any input may be of any block
    places = jax.tree.map(lambda x: sharding.fitted(scales, x.shape), leaf)
    return replace(places, codes=sharding.fitted(whole, leaf.codes.shape))


def as_held(tensors: Tensors, model: Model, quant: Quant, ref: str) -> Tensors:
    """A checkpoint's tensors, those of `ref`, with the numbers that a run computes with where it quantises them."""
    t = all_frozen(model, quant, ref)
    keep, known = make_keep(t), {}
    for path, spec in param.spec_paths(model.specs).items():
        name, transpose = model.names[path]
        form = hf.form_in(tensors, model, path)
        if t.held[f"base/{path}"].quantised:
            kept = form is not None and keep(path, form)
            like = as_shapes(spec, t.held[f"base/{path}"])
            known.update(
                {
                    name.format(i=i): (like, transpose, kept)
                    for i in range(spec.shape[0] if "{i}" in name else 1)
                }
            )

    def read(name: str, index: Index = ()) -> np.ndarray:
        if name not in known:
            return tensors.read(name, index)
        like, transpose, kept = known[name]
        value: Any = tensors.packed[name].read() if kept else tensors.read(name)
        packed: Any = (
            replace(value, dtype=like.dtype) if kept else shards.hold(value.T if transpose else value, like)
        )
        value = np.asarray(dequantize(packed))
        return (value.T if transpose else value)[index]

    return replace(tensors, read=read)


def all_frozen(model: Model, quant: Quant | None, ref: str, adapter: Adapter | None = None) -> Trained:
    """Everything held as inference holds it."""
    whole = adapted(model, adapter)
    return _with_forms(whole, jax.tree.map(lambda _: False, whole.specs, is_leaf=param.is_spec), quant, ref)


def load_frozen(ref: str, model: Model, mesh: Any, quant: Quant | None = None) -> Any:
    """The base tree of `ref` on the mesh with nothing trained, as inference holds it: in the compute dtype or packed."""
    return load_base(ref, all_frozen(model, quant, ref), mesh)


def load_adapter(folder: str | Path, model: Model, mesh: Any) -> tuple[Any, Adapter]:
    """A PEFT adapter folder on the mesh, and its settings. Raises ValueError for an adapter that doesn't fit the model."""
    loaded, settings = peft.load_adapter(folder, model)
    return _adapter_on(mesh, loaded, adapter_specs(model.specs, settings), model), settings


def _adapter_on(mesh: Any, loaded: Any, specs: Any, model: Model) -> Any:
    dtype = jnp.promote_types(model.dtype, jnp.float32)
    return jax.tree.map(
        lambda x, place: shards.cut(x.astype(dtype), place), loaded, param.shardings(specs, mesh)
    )


def only_pairs(t: Trained) -> bool:
    """Whether nothing but an adapter's a and b is trained, so that a fresh adapter is the base."""
    return not any(jax.tree.leaves(t.mask["base"]))


def adapter_settings(start: str, model: Model) -> Adapter:
    """The settings of the adapter in a PEFT folder, or in the folder of a run that wrote one."""
    return peft.load_parts(adapter_folder(start), model)[1]


def adapter_of(start: str | None, rank: int | None, model: Model) -> Adapter:
    """A fresh adapter's settings (rank 16 if None, alpha twice that), or those of the adapter that `start` names."""
    if start is None:
        return Adapter(rank=16 if rank is None else rank, alpha=2.0 * (16 if rank is None else rank))
    if rank is not None:
        raise ValueError(
            f"rank={rank} is a fresh adapter's, and the one in {start} has a rank of its own; leave one of them out"
        )
    return adapter_settings(start, model)


def reward_scorer(start: str, model: Model) -> Scorer:
    """A frozen reward model on the run's base, from a run's folder or a PEFT folder with a head.

    Where there is no such folder the settings are those that configs/reward.py gives one, as a plan needs no weights; a run that
    begins without it ends with one line.
    """
    there = Path(start).exists()
    return Scorer(
        adapter_settings(start, model) if there else adapter_of(None, None, model), start, trained=False
    )


def adapter_folder(start: str) -> Path:
    """The PEFT folder that `start` names: itself, or `adapter` below a run's folder."""
    inner = Path(start) / "adapter"
    return inner if inner.is_dir() else Path(start)


def started_elsewhere(start: str, identity: str, quant: Quant | None) -> list[str]:
    """A line for each way in which the base differs from the one that a run trained the adapter of `start` on.

    identity: folder.weights_fingerprint of this run's weights. Nothing is known of a folder that isn't a run's.
    """
    path = Path(start) / "config.json"
    if not path.is_file() or adapter_folder(start) == Path(start):
        return []
    record, lines = json.loads(path.read_text()), []
    if record.get("weights_fingerprint", identity) != identity:
        lines.append(
            f"the adapter in {start} was trained on {record['weights']}, whose weights are others than this run's"
        )
    before, now = (
        (settings or {}).get("kind", "none")
        for settings in (record.get("quant"), asdict(quant) if quant else None)
    )
    if before != now:
        lines.append(
            f"the adapter in {start} was trained on a base with quant={before}, and this run's has quant={now}"
        )
    return lines


def as_shapes(spec: ParamSpec, held: Held) -> Any:
    """A parameter as it is held, a ShapeDtypeStruct or a QTensor of them."""
    x, pack = jax.ShapeDtypeStruct(spec.shape, held.dtype), held.pack
    if held.form is not None:
        stacked = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct((*spec.shape[:-2], *x.shape), x.dtype), held.form
        )
        return replace(stacked, dtype=jnp.dtype(held.dtype))
    return x if pack is None else jax.eval_shape(lambda x: quantize(x, *pack), x)


def abstract_params(t: Trained, mesh: Any) -> Any:
    """The whole tree as ShapeDtypeStructs with shardings, as it will be held."""

    def leaf(path, spec):
        x = as_shapes(spec, t.held[path])
        places = place(spec, x, mesh, path)
        return jax.tree.map(
            lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), x, places
        )

    return tree.map_with_path(leaf, t.specs, is_leaf=param.is_spec)


def split(t: Trained, whole: Any) -> tuple[Any, Any]:
    """(trainable, frozen) of the whole tree; a packed leaf is frozen as one."""
    whole_leaf = lambda x: x is None or isinstance(x, QTensor)  # noqa: E731
    return (
        jax.tree.map(lambda x, m: x if m else None, whole, t.mask, is_leaf=whole_leaf),
        jax.tree.map(lambda x, m: None if m else x, whole, t.mask, is_leaf=whole_leaf),
    )


def quantised(t: Trained) -> str:
    """What part of the base is quantised and how, in words; empty where nothing is."""
    all_specs = param.spec_paths(t.specs)
    specs = {path: spec for path, spec in all_specs.items() if t.held[path].quantised}
    if not specs:
        return ""
    held = [as_shapes(spec, t.held[path]) for path, spec in specs.items()]
    sizes = [math.prod(q.shape) for q in held]
    each = sum(bits(q) * size for q, size in zip(held, sizes, strict=True)) / sum(sizes)
    base = sum(math.prod(spec.shape) for path, spec in all_specs.items() if in_base(path))
    return f"{100 * sum(sizes) / base:.0f} % of the base in {held[0].kind}, {each:.3f} bits a parameter"


def like_params(shapes: Any, trainable: Any, mesh: Any) -> Any:
    """Shardings for a tree that mirrors the parameters (optimizer state).

    A leaf that ends in a parameter's path, or is part of what does, and has its shape lies as the parameter does, any other one
    on every device.
    """
    known = {path: x for path, x in tree.paths(trainable).items()}

    def place(path, x):
        parts = path.split("/")
        for end in (len(parts), len(parts) - 1):
            for i in range(end):
                found = known.get("/".join(parts[i:end]))
                if found is not None and found.shape == x.shape:
                    return found.sharding
        return sharding.replicated(mesh)

    return tree.map_with_path(place, shapes)


def table(t: Trained, mesh: Any = None) -> str:
    """One line a parameter: path, shape, axes, how it is held, on a mesh how it is cut, trained or frozen; then the counts."""
    mask, rows = tree.paths(t.mask), []
    for path, spec in param.spec_paths(t.specs).items():
        held = t.held[path]
        x = as_shapes(spec, held)
        form = f"{x.kind} {bits(x):.3f} bits" if held.quantised else jnp.dtype(held.dtype).name
        cut = ""
        if mesh is not None and mesh.size > 1:
            places = place(spec, x, mesh, path)
            cut = f"{sharding.shown(places.codes if isinstance(x, QTensor) else places):20s} "
        sizes, axes = "x".join(map(str, spec.shape)), ",".join(spec.axes)
        rows.append(
            f"{path:32s} {sizes:>18s}  {axes:28s} {form:16s} {cut}{'trained' if mask[path] else 'frozen'}"
        )
    total, some = param.count(t.specs), param.count(t.trainable_specs)
    return "\n".join([*rows, f"{some:,} of {total:,} parameters are trained ({100 * some / total:.2f} %)"])
