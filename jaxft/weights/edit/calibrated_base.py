"""The calibrated base of a run: calibrate a model's quantised layers one by one, and cache their
codes, the rounded weights.

Memory contains the weights of one layer, and the activations between two layers, both of the exact and of the
quantised model. The weights of a layer are rounded in the order in which the layer uses them (q, k and v; o;
gate and up; down), each on inputs computed with the weights that are quantised already.

The folder in the cache is named by a hash of the model's files, the calibration rows and all settings that
the codes depend on. A run stores this name in its record, and every command that uses the run reads the same
codes.
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxft.batch import Tokens
from jaxft.models.model import Model
from jaxft.nn import tree
from jaxft.nn.matmul import outer, with_taps
from jaxft.nn.param_spec import ParamSpec, Specs, is_spec, lead_axes, spec_paths
from jaxft.nn.quant import Quant, dequantize, with_defaults
from jaxft.nn.stack import BlockLayer, LayerPlace, layer_places, run_layer
from jaxft.nn.tree import Params
from jaxft.weights.edit.calibrated_rounding import (
    InputMoments,
    compensated_weight,
    correction,
    inverse_factor,
    quantize_calibrated,
)
from jaxft.weights.hf import hub
from jaxft.weights.hf.complete_folders import (
    cache_folder,
    cached_folder,
    content_sha256,
    files_sha256,
    folder_damage,
)
from jaxft.weights.hf.safetensors import (
    TensorToWrite,
    open_safetensors,
    read_model_json,
    write_here,
    write_model_json,
)
from jaxft.weights.param_loading import ParamReader, read_values, read_whole
from jaxft.weights.quantised.quantised_checkpoints import OWN_ARRAYS, open_tensors, quantised_tensors
from jaxft.weights.storage import quantised_paths
from jaxft.weights.tensors import ModelFiles

BATCH_TOKENS = 2048  # that pass through a layer at once
VERSION = 1  # of the files; another one if the same settings lead to other codes
CALIBRATED = "calibrated"  # the folder in the cache
_SETTINGS = "calibration.json"
_SIDES = ("pair_a", "pair_b")  # the tensors of a low-rank correction
AGAIN = "Start the run's command again, which computes it, or set --quant (nf4 rounds to nearest)"


@dataclass(frozen=True)
class CalibratedLayer:
    """A calibrated layer, on the host.

    weights: quantised weights, QTensors [in, out], by Hugging Face name. pairs: low-rank corrections (a [in,
    R], b [R, out]) of some weights, by the same names; the weight plus `a b` approximates the original.
    """

    weights: dict[str, Any]
    pairs: dict[str, tuple[np.ndarray, np.ndarray]]


@dataclass(frozen=True)
class CalibrationRows:
    """N packed rows of T tokens for calibration, int32. segments: 0 at padding, 1, 2, ... in the examples of
    a row. positions: of the token in its example, from 0.
    """

    ids: Int[np.ndarray, "N T"]
    segments: Int[np.ndarray, "N T"]
    positions: Int[np.ndarray, "N T"]

    @property
    def tokens(self) -> int:
        """Number of tokens without padding."""
        return int((self.segments > 0).sum())

    @property
    def digest(self) -> str:
        """SHA-256 of all arrays, in hex."""
        arrays = (self.ids, self.segments, self.positions)
        return hashlib.sha256(b"".join(np.ascontiguousarray(x).tobytes() for x in arrays)).hexdigest()

    def batches(self) -> list[Tokens]:
        """Return the rows in batches of one shape, each of at most BATCH_TOKENS tokens, or of one longer row.
        The last batch is filled up with rows of padding.
        """
        count, length = self.ids.shape
        size = min(count, max(1, BATCH_TOKENS // length))

        def part(x: np.ndarray, at: int) -> np.ndarray:
            return np.pad(x[at : at + size], [(0, max(0, at + size - count)), (0, 0)])

        none = np.zeros((size, 1), np.int32)
        return [
            Tokens(
                part(self.ids, at), part(self.segments, at), part(self.positions, at), none, none,
                none.astype(np.float32),
            )
            for at in range(0, count, size)
        ]  # fmt: skip


@dataclass(frozen=True)
class _Programs:
    """The functions that run one layer, with its parameters `params`, its number `index` and activations h
    [B, T, D].

    forward(params, h, tokens, index) -> h after the layer. inputs(params, h, tokens, index, names) -> a dict
    from each weight name in `names` to the weight's inputs [B, T, I], which are 0 at padding. both(params, h,
    tokens, index, names) -> (h after the layer, inputs). groups(params, h, tokens, index) -> tuples of names
    of weights that have the same input, in the order in which the layer uses them.
    """

    forward: Callable[..., Array]
    inputs: Callable[..., dict[str, Array]]
    both: Callable[..., tuple[Array, dict[str, Array]]]
    groups: Callable[..., list[tuple[str, ...]]]


def _programs(layer: BlockLayer, paths: list[str]) -> _Programs:
    def forward(params: Params, h: Array, tokens: Tokens, index: Any) -> Array:
        return run_layer(layer, h, params, tokens, index)[0]

    def collected(params: Params, h: Array, tokens: Tokens, index: Any) -> tuple[Array, dict[str, Array]]:
        params, tapped = with_taps(params, paths)
        return forward(params, h, tokens, index), tapped.take()

    @partial(jax.jit, static_argnames="names")
    def both(
        params: Params, h: Array, tokens: Tokens, index: Any, names: tuple[str, ...]
    ) -> tuple[Array, dict[str, Array]]:
        h, taps = collected(params, h, tokens, index)
        used = (tokens.segments > 0)[..., None]
        return h, {name: jnp.where(used, taps[name], jnp.zeros((), taps[name].dtype)) for name in names}

    @partial(jax.jit, static_argnames="names")
    def inputs(
        params: Params, h: Array, tokens: Tokens, index: Any, names: tuple[str, ...]
    ) -> dict[str, Array]:
        return both(params, h, tokens, index, names)[1]

    def groups(params: Params, h: Array, tokens: Tokens, index: Any) -> list[tuple[str, ...]]:
        """Return groups of names of weights that have the same input, in the order of their use."""
        by_input = dict[int, tuple[str, ...]]()

        def trace(params: Params, h: Array) -> Array:
            for name, x in collected(params, h, tokens, index)[1].items():
                by_input[id(x)] = (*by_input.get(id(x), ()), name)
            return h

        jax.eval_shape(trace, params, h)
        return list(by_input.values())

    return _Programs(jax.jit(forward), inputs, both, groups)


@partial(jax.jit, donate_argnums=0)
def _add(moments: InputMoments, inputs: Float[Array, "B T I"], exact: Float[Array, "B T I"]) -> InputMoments:
    return InputMoments(
        moments.gram + outer(inputs, inputs, jnp.float32), moments.cross + outer(inputs, exact, jnp.float32)
    )


def calibrate_layers(
    model: Model,
    readers: Mapping[str, ParamReader],
    quant: Quant,
    rows: CalibrationRows,
    ranks: Mapping[str, tuple[int, ...]],
) -> Iterator[CalibratedLayer]:
    """Yield the calibrated weights of each layer of a model.

    readers: a reader of each base parameter, by path. ranks: by path of a parameter, the rank of the low-rank
    correction in each layer, 0 for none; corrections are applied before later layers are calibrated. Call it
    with a mesh of one device. Raises ValueError for a parameter with several kernels per layer, and for
    weights or inputs that are not finite.
    """
    specs, paths = spec_paths(model.specs), layer_paths(model.specs, quant)
    for path in paths:
        if lead_axes(specs[path]) != ("layers",):
            raise ValueError(
                f"quant.calibrate={quant.calibrate}: {path} has a kernel for each of its "
                f"{lead_axes(specs[path])[-1]}, which cannot be calibrated; leave it out of quant.targets"
            )
    batches, by_path = rows.batches(), dict[str, _Programs]()
    table = {"embed": jnp.asarray(read_whole(readers["embed"])).astype(model.dtype)}
    embed = jax.jit(model.embed)
    exact = [np.asarray(embed(table, batch.ids)) for batch in batches]
    del table
    coded = list(exact)
    groups = dict[str, list[tuple[str, ...]]]()
    for place in layer_places(model.stacks):
        within, number = f"{place.path}/", jnp.int32(place.index)
        if place.path not in by_path:
            inside = [path.removeprefix(within) for path in paths if path.startswith(within)]
            by_path[place.path] = _programs(place.layer, inside)
        programs = by_path[place.path]
        params = _layer_params(model, readers, place)
        if place.path not in groups:
            groups[place.path] = programs.groups(params, exact[0], batches[0], number)
        firsts = tuple(names[0] for names in groups[place.path])
        both = list(zip(exact, batches, strict=True))
        passed = [jax.device_get(programs.both(params, h, b, number, firsts)) for h, b in both]
        exact, theirs = [after for after, _ in passed], [inputs for _, inputs in passed]
        layer = CalibratedLayer({}, {})
        for names in groups[place.path]:
            size = tree.paths(params)[names[0]].shape[0]
            moments = InputMoments(*(jnp.zeros((size, size), jnp.float32) for _ in range(2)))
            for h, batch, y in zip(coded, batches, theirs, strict=True):
                x = programs.inputs(params, h, batch, number, names[:1])
                moments = _add(moments, x[names[0]], y[names[0]])
            factor = inverse_factor(moments.gram)
            for name in names:
                path = f"{place.path}/{name}"
                tensor = readers[path].tensors[place.index]
                hf_name, weight = tensor.name, read_values(readers[path], tensor).astype(np.float32)
                target = compensated_weight(jnp.asarray(weight), moments, factor)
                form = quant.kind, quant.block, quant.double
                try:
                    q = quantize_calibrated(np.asarray(target), moments.gram, *form, factor)
                except ValueError as error:
                    raise ValueError(f"{hf_name}: {error}") from error
                value = dequantize(replace(q, dtype=jnp.dtype(jnp.float32)))
                layer.weights[hf_name] = q
                if path in ranks and ranks[path][place.index]:
                    pair = correction(target - value, moments.gram, ranks[path][place.index])
                    value = value + jnp.asarray(pair[0] @ pair[1])
                    layer.pairs[hf_name] = pair
                params = _with_leaf(params, name, value.astype(model.dtype))
        both = list(zip(coded, batches, strict=True))
        coded = [np.asarray(programs.forward(params, h, b, number)) for h, b in both]
        yield layer


def layer_paths(specs: Specs, quant: Quant) -> list[str]:
    """Return the paths of the parameters to calibrate: those inside layers that `quant` quantises."""
    of_layers = {path for path, spec in spec_paths(specs).items() if "layers" in spec.axes}
    return [path for path in quantised_paths(specs, quant) if path in of_layers]


def _layer_params(model: Model, readers: Mapping[str, ParamReader], place: LayerPlace) -> Params:
    def leaf(path: str, spec: ParamSpec) -> Array:
        reader = readers[f"{place.path}/{path}"]
        values = [read_values(reader, tensor) for tensor in reader.tensors if tensor.index[0] == place.index]
        return jnp.asarray(np.stack(values).reshape(reader.shape[1:])).astype(model.dtype)

    return tree.map_with_path(leaf, place.specs(model.specs), is_leaf=is_spec)


def _with_leaf(params: Params, path: str, value: Array) -> Params:
    return tree.map_with_path(lambda leaf_path, x: value if leaf_path == path else x, params)


# Calibrated codes in the cache


def codes_name(ref: str, quant: Quant, rows: str, ranks: Mapping[str, Any]) -> str:
    """Return the name of the cache folder with the calibrated codes (rounded weights) of the model `ref`: the
    model's name, "-" and a hash. rows: CalibrationRows.digest. ranks: by path of a parameter, the rank of the
    low-rank correction in each layer.
    """
    format = quant.kind, *with_defaults(quant.kind, quant.block, quant.double)
    return hub.cache_name(ref, VERSION, [format, quant.targets, rows, dict(ranks)], digits=24)


def codes_folder(name: str) -> Path:
    """Return the path of the cache folder `name` with calibrated codes; it may not exist."""
    return cache_folder() / CALIBRATED / name


def codes_damage(name: str) -> str | None:
    """Return the damage to the cached codes `name`; None if they are complete or not in the cache."""
    folder = codes_folder(name)
    return folder_damage(folder) if folder.is_dir() else None


def confirm_codes(record: Mapping[str, Any]) -> bool:
    """Return whether the cached codes are the ones that a run used; True if the cache does not have them.
    record: the run's, {"codes": name of the cache folder, "sha256": codes_sha256 of the codes}.
    """
    name = str(record.get("codes"))
    return not codes_folder(name).is_dir() or codes_sha256(name) == record.get("sha256")


def write_codes(name: str, quant: Quant, layers: Callable[[], Iterable[CalibratedLayer]]) -> Iterator[int]:
    """Compute and write calibrated codes; after each layer, yield the number of layers written so far. If the
    cache has the codes undamaged, yield nothing.

    name: from codes_name. layers(): returns the calibrated layers, first to last. The folder appears in the
    cache only when it is complete, and replaces damaged codes. Raises OSError if the cache cannot be written.
    """
    out = codes_folder(name)
    if out.is_dir() and codes_damage(name) is None:
        return
    with cached_folder(out) as part:
        part.mkdir()
        for number, layer in enumerate(layers()):
            _write_layer(part / f"layer-{number:05}.safetensors", layer)
            yield number + 1
        block, double = with_defaults(quant.kind, quant.block, quant.double)
        write_model_json(part / _SETTINGS, {"kind": quant.kind, "block": block, "double": double})


def _write_layer(path: Path, layer: CalibratedLayer) -> None:
    tensors: list[TensorToWrite] = []
    for name, q in layer.weights.items():
        tensors += quantised_tensors(name, q, _returning(q), OWN_ARRAYS.name)
    for name, pair in layer.pairs.items():
        for side, x in zip(_SIDES, pair, strict=True):
            fetch = np.asarray(x, np.float32)
            tensors.append(TensorToWrite(f"{name}.{side}", fetch.dtype, fetch.shape, _returning(fetch)))
    write_here(path, tensors)


def _returning(x: Any) -> Callable[[], Any]:
    return lambda: x


def read_correction(name: str, weight: str) -> tuple[np.ndarray, np.ndarray]:
    """Read the low-rank correction (a [in, R], b [R, out]) of a rounded weight from the cached codes `name`.
    weight: the weight's Hugging Face name.
    """
    a, b = (open_codes(name).read(f"{weight}.{side}") for side in _SIDES)
    return a, b


def open_codes(name: str) -> ModelFiles:
    """Open the calibrated codes `name` in the cache, with weights by Hugging Face name. Each process verifies
    their hashes once.

    Raises FileNotFoundError if the cache does not have them, ValueError if they are damaged.
    """
    folder = codes_folder(name)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: the calibrated base of this run is not in the cache. {AGAIN}")
    files = [path.stat() for path in sorted(folder.iterdir())]
    return _open(folder, tuple((x.st_ino, x.st_size, x.st_mtime_ns) for x in files))


@cache
def _open(folder: Path, version: tuple[tuple[int, int, int], ...]) -> ModelFiles:
    damage = folder_damage(folder)
    if damage is not None:
        raise ValueError(f"the calibrated base of this run cannot be used: {damage}. {AGAIN}")
    files = open_safetensors(folder, sorted(folder.glob("layer-*.safetensors")))
    return open_tensors(files, {"quant_method": OWN_ARRAYS.name, **read_model_json(folder / _SETTINGS)})


def codes_sha256(name: str) -> str:
    """Return a hash of all bytes of the calibrated codes `name` in the cache."""
    files = sorted(codes_folder(name).glob("layer-*.safetensors"))
    return hashlib.sha256("".join(files_sha256(files, content_sha256)).encode()).hexdigest()
