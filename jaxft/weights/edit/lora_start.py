"""Adapters that start from the base's weights: DoRA's magnitudes, and pairs that are subtracted from the
base.

PiSSA (Meng et al. 2024, arXiv:2404.02948) starts from the largest singular values of a weight W, OLoRA
(Büyükakyüz 2024, arXiv:2406.01775) from its QR decomposition. The base is stored as `W - s A B`, so that the
model is unchanged at step 0. A quantised base stores this residual quantised (QPiSSA). LoftQ (Li et al. 2023,
arXiv:2310.08659) alternates: quantise `W - s A B`, then set `s A B` to the largest singular values of W minus
the quantised weight. QERA (Zhang et al. 2025, arXiv:2410.06040) starts from the low-rank matrix that best
corrects the outputs of a base with calibrated rounding; it is computed when the base is calibrated
(weights/edit/calibrated_rounding.py).

A run stores its first pairs in `initial_adapter/` of its folder, and resumes with them. Critics and reward
models on its base see it with the pairs at step 0 (models/adapted.py). The exported adapter is for the
unchanged base: `s (A B - A0 B0)`, one pair of twice the rank, as peft's
path_initial_model_for_weight_conversion makes it.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxft.distributed import processes
from jaxft.models.adapted import HeadSettings
from jaxft.models.model import Model
from jaxft.nn import tree
from jaxft.nn.adapters import lora
from jaxft.nn.adapters.lora import INITIAL_ADAPTER, Adapter, join_adapters, map_kernels, pairs_by_path
from jaxft.nn.adapters.lora_specs import PairRanks, pair_layouts
from jaxft.nn.param_spec import Specs, spec_paths
from jaxft.nn.quant import QERA, dequantize, is_qtensor
from jaxft.nn.tensor_names import WeightNames
from jaxft.nn.tree import Params
from jaxft.weights import pretrained
from jaxft.weights.edit.calibrated_base import read_correction
from jaxft.weights.edit.calibrated_rounding import FIRST_PAIRS, FirstPair, principal_pair
from jaxft.weights.param_loading import shard_host_array, store_as
from jaxft.weights.peft import peft_read, peft_write
from jaxft.weights.peft.peft_tensors import Pair, adapter_of
from jaxft.weights.storage import StoredModel, leaf_shapes
from jaxft.weights.tensors import tensors_of

LOFTQ_ITERATIONS = 5  # of LoftQ, as in the paper

_Pairs = dict[str, list[Pair | None]]  # by path, of each module
_Weight = Float[np.ndarray, "I O"]
_Stored = Callable[[np.ndarray], np.ndarray]  # a weight as it is stored


class StartPairs(NamedTuple):
    """The two adapters of a run that starts from the base's weights. start: the adapter at step 0. without:
    the adapter that is subtracted from the stored base. They are the same, except for LoftQ and QERA.
    """

    start: Params
    without: Params


def start_pairs(ref: str, stored: StoredModel, settings: Adapter) -> StartPairs:
    """Compute the pairs at step 0 from the weights in the files of `ref`, on the host, layer by layer.

    stored: how the base is stored, for LoftQ's quantisation errors. Raises ValueError if settings.init does
    not support the ranks or the adapted layers (see check_ranks).
    """
    files, table = pretrained.open_files(ref), tensors_of(stored.model)
    base, pairs = spec_paths(stored.specs["base"]), (_Pairs(), _Pairs())  # start, without
    for path, layout in check_ranks(stored.specs["base"], settings, stored.model.weight_names).items():
        storage = stored.storage[f"base/{path}"]
        as_stored = partial(_as_stored, leaf_shapes(base[path], storage))
        for tensor, rank, alpha in zip(table[path], *layout, strict=True):
            computed: Any = (None, None)
            if rank and settings.init == QERA:
                computed = _correcting(storage.codes, tensor.name, settings.scale_of(rank, alpha))
            elif rank:
                weight, scale = tensor.read(files).astype(np.float32), settings.scale_of(rank, alpha)
                computed = _layer_pairs(settings.init, weight, rank, scale, as_stored)
            for of_paths, pair in zip(pairs, computed, strict=True):
                a, b = pair or (None, None)
                modules = of_paths.setdefault(path, [])
                modules.append(pair and Pair(np.asarray(a, np.float32), np.asarray(b, np.float32), alpha))
    return StartPairs(*(tree.nested(adapter_of(x, settings, stored.model)[0]) for x in pairs))


def check_ranks(base: Specs, settings: Adapter, names: WeightNames) -> dict[str, PairRanks]:
    """Return the ranks and alphas of the adapted layers by path, after checking that the initialisation
    settings.init supports them.

    Raises ValueError for a rank above the smaller side of a weight, for different ranks in the layers of a
    kernel, for adapted embeddings, and for an adapted head that is tied to them.
    """
    setting, specs = f"adapter.init={settings.init}", spec_paths(base)
    layouts = pair_layouts(base, settings, names)
    for path, (ranks, _) in layouts.items():
        if path not in specs or path == "embed":
            raise ValueError(
                f"{setting} cannot start a pair of {path}, since it is the embedding table or a head that is "
                "tied to it; leave embed_tokens and such a head out of adapter.targets"
            )
        values = min(specs[path].shape[-2:])
        if max(ranks) > values:
            raise ValueError(
                f"{setting} cannot start a pair of rank {max(ranks)} for {path}, whose smaller side is "
                f"{values}; lower adapter.rank, or leave {path} out of adapter.targets"
            )
        if len(set(ranks) - {0}) > 1:
            raise ValueError(
                f"{setting} needs one rank in all layers of {path}, got {sorted(set(ranks) - {0})}; change "
                "adapter.rank_pattern"
            )
    return layouts


def run_pairs(
    ref: str, stored: StoredModel, settings: Adapter, folder: Path | None, resumed: bool
) -> StartPairs:
    """Compute a run's pairs at step 0 and store them in its folder; a resumed run reads them from there.

    folder: the run's, None stores nothing. All processes call this and use the pairs that process 0 stored,
    because libraries of other hosts may round differently. Raises FileNotFoundError if a resumed run has no
    stored pairs.
    """
    model = stored.model
    folders = [] if folder is None else [folder / INITIAL_ADAPTER / name for name in ("without", "start")]
    if folder is None or not resumed:
        pairs = start_pairs(ref, stored, settings)
        plain = replace(settings, dropout=0.0)
        for out, adapter in zip(folders, reversed(pairs), strict=False):
            peft_write.save_adapter(out, adapter, plain, model, ref)
        if folder is None or not processes.is_multi_process():
            return pairs
    return StartPairs(*(peft_read.read_adapter(path, model)[0] for path in reversed(folders)))


def read_start(folder: Path, model: Model, settings: Adapter | None) -> Params | None:
    """Read the adapter at step 0 from a run's folder; None if settings.init leaves the base unchanged."""
    if settings is None or not settings.changes_base:
        return None
    return peft_read.read_adapter(folder / INITIAL_ADAPTER / "start", model)[0]


def place_pairs(pairs: Params, adapter: Params) -> Params:
    """Place pairs on the mesh with the shardings and dtypes of the leaves of `adapter`."""
    return jax.tree.map(
        lambda x, like: shard_host_array(np.asarray(x).astype(like.dtype), like.sharding), pairs, adapter
    )


def for_unchanged_base(adapter: Params, start: Params, settings: Adapter) -> tuple[Params, Adapter]:
    """Convert a trained adapter to (adapter of twice the rank, its settings) for the unchanged base: `[a, a0]
    [b; -b0]`. start: the pairs (a0, b0) that were subtracted from the stored base.
    """

    def without(adapter: Params, start: Params) -> Params:
        negative = tree.map_with_path(lambda path, x: -x if path.endswith("/b") else x, start)
        return join_adapters(adapter, negative)

    return jax.jit(without)(adapter, place_pairs(start, adapter)), settings.exported


def init_magnitudes(base: Params, adapter: Params, initial: Params | None = None) -> Params:
    """Return a DoRA adapter whose magnitudes are the norms of the adapted weights; 0 in layers without a
    pair.

    initial: for a critic's or reward model's adapter, the policy's pairs at step 0, which are part of the
    base that it sees. Norms are computed layer by layer.
    """

    def norms(weight: Array, pair: Params) -> Array:
        return lora.output_norms(weight, pair["a"], pair["b"], pair["scale"])

    def start(path: str, leaf: Array) -> Array:
        above, _, name = path.rpartition("/")
        if name != "magnitude":
            return leaf
        has_pair = jnp.any(nodes[above]["a"] != 0, (-2, -1))
        return jnp.where(has_pair[..., None], magnitudes[above], 0).astype(leaf.dtype)

    nodes, joined = pairs_by_path(adapter), pairs_by_path(join_adapters(adapter, initial))
    adapted = {path: joined[path] for path in nodes if "magnitude" in nodes[path]}
    magnitudes = map_kernels(norms, base, adapted)
    return tree.map_with_path(start, adapter)


def with_magnitudes(
    base: Params, others: dict[str, Params], settings: Mapping[str, HeadSettings]
) -> dict[str, Params]:
    """Return `others`, the parameters outside the base, with the magnitudes of fresh DoRA adapters set by
    init_magnitudes.

    settings: by name, of the policy ("adapter") and of critics and reward models. The weights that critics
    and reward models adapt include the initial adapter in `others`.
    """
    out = dict(others)
    for name, head in settings.items():
        if head.adapter is None or not head.adapter.dora or head.start is not None:
            continue
        adapter = others[name] if name == "adapter" else others[name]["adapter"]
        initial = None if name == "adapter" else others.get(INITIAL_ADAPTER)
        places = jax.tree.map(lambda x: x.sharding, adapter)
        started = jax.jit(init_magnitudes, out_shardings=places)(base, adapter, initial)
        out[name] = started if name == "adapter" else {**others[name], "adapter": started}
    return out


def _as_stored(like: object, weight: np.ndarray) -> np.ndarray:
    value = store_as(weight, like)
    return np.asarray(dequantize(value) if is_qtensor(value) else value).astype(np.float32)


def _layer_pairs(
    init: str, weight: _Weight, rank: int, scale: float, stored: _Stored
) -> tuple[FirstPair, FirstPair]:
    """Return a weight's pair (a, b) at step 0, and the pair that is subtracted from the stored base. weight:
    [in, out] of a layer. stored(weight): returns the weight as the stored base rounds it.
    """
    if init == "loftq":
        ins, outs = weight.shape
        without = np.zeros((ins, rank), np.float32), np.zeros((rank, outs), np.float32)
        pair = principal_pair(weight - stored(weight), rank, scale)
        for _ in range(LOFTQ_ITERATIONS - 1):
            without = pair
            pair = principal_pair(weight - stored(weight - scale * without[0] @ without[1]), rank, scale)
        return pair, without
    pair = FIRST_PAIRS[init](weight, rank, scale)
    return pair, pair


def _correcting(codes: str | None, name: str, scale: float) -> tuple[FirstPair, FirstPair]:
    """Return (pair at step 0, pair of zeros, since nothing is subtracted from the base) of a calibrated
    weight. `scale` times the product of the first is the weight's low-rank correction. codes: name of the
    calibrated codes, never None. name: the weight's Hugging Face name.
    """
    assert codes is not None  # adapter.init=qera needs quant.calibrate
    a, b = read_correction(codes, name)
    root = np.sqrt(np.float32(abs(scale)))
    return (a / root, b * np.copysign(np.float32(1), scale) / root), (np.zeros_like(a), np.zeros_like(b))
