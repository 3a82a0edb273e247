"""EVA (Paischer et al. 2024, arXiv:2410.07170): LoRA that starts from the inputs of its layers on the run's
rows, with ranks by explained variance.

The columns of `a` are the principal directions of a layer's inputs, `b` is zero: the model at step 0 is the
base. All singular values of all layers, as fractions of the variance of their layer's inputs, compete for the
ranks; their sum is that of the settings, and a module gets at most `eva_rho` times its own.

Arrays have that largest rank in all layers; unused columns are zero and stay zero (see nn/lora.py). The
adapter that is written has each module's rank, and modules that got none are left out, as in PEFT
(init_lora_weights="eva"). alpha / rank is that of the settings, as with PEFT's adjust_scaling_factors; with
rsLoRA, where PEFT does not keep it, alpha / sqrt(rank) is.

PEFT follows the principal components by an incremental, truncated SVD until they turn no further. Here the
whole covariance is summed up and decomposed: what the incremental SVD without truncation converges to.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from jaxft import tree
from jaxft.models.model import Model
from jaxft.nn.lora import EVA, FUSED_PARTS, Adapter, pairs_by_path
from jaxft.nn.lora_specs import PairRanks, most_components, pair_layouts
from jaxft.tree import Params
from jaxft.weights.peft_pairs import with_patterns

EXACT_INPUTS = 2048  # of a covariance that is decomposed as a whole; larger ones by Lanczos's method
SMALLEST_VARIANCE = 1e-30  # that is divided by


class Directions(NamedTuple):
    """Principal directions of a layer's inputs, the largest first.

    vectors: [I, C], orthonormal columns; of each the element of the largest magnitude is positive. explained:
    [C], fractions of the variance.
    """

    vectors: Float[np.ndarray, "I C"]
    explained: Float[np.ndarray, " C"]


def input_of(path: str, paths: Sequence[str]) -> str:
    """Return the first of `paths` that has the same input as the linear layer `path`: q, k and v have one, as
    have gate and up.
    """
    above, _, name = path.rpartition("/")
    for parts in FUSED_PARTS.values():
        if name in parts:
            return next(one for one in (f"{above}/{part}" for part in parts) if one in paths)
    return path


def principal_directions(moment: Float[np.ndarray, "I I"], count: int) -> Directions:
    """Return the `count` principal directions of inputs with this covariance, or a multiple of it.

    Raises ValueError if it is not finite.
    """
    import scipy.linalg  # not at the top: most runs do not need it
    import scipy.sparse.linalg

    wide = moment.astype(np.float64)
    if not np.isfinite(wide).all():
        raise ValueError(f"adapter.init={EVA}: a layer's inputs are not finite; use adapter.init=default")
    size = len(wide)
    if size <= EXACT_INPUTS or count > size // 4:
        values, vectors = scipy.linalg.eigh(wide, subset_by_index=[size - count, size - 1])
    else:
        values, vectors = scipy.sparse.linalg.eigsh(wide, count, v0=np.ones(size))
    order = np.argsort(-values, kind="stable")
    values, vectors = values[order], vectors[:, order]
    largest = vectors[np.argmax(np.abs(vectors), 0), np.arange(count)]
    explained = np.maximum(values, 0) / max(float(np.trace(wide)), SMALLEST_VARIANCE)
    return Directions((vectors * np.sign(largest)).astype(np.float32), explained)


def redistributed_ranks(
    layouts: Mapping[str, PairRanks], explained: Mapping[str, Sequence[Float[np.ndarray, " C"]]], rho: float
) -> dict[str, tuple[int, ...]]:
    """Return the rank of each layer of each path so that all together explain the most variance.

    layouts: ranks of the settings by path. explained: of each layer of each path that input_of names.
    """
    paths = list(layouts)
    slots: list[tuple[float, bool, int, int]] = []  # sorted as in PEFT: of equal ones the first path leads
    for number, path in enumerate(paths):
        source = input_of(path, paths)
        for layer, rank in enumerate(layouts[path].ranks):
            most = most_components(rank, rho, len(explained[source][layer]))
            slots += [(-float(x), source != path, layer, number) for x in explained[source][layer][:most]]
    budget = sum(sum(layout.ranks) for layout in layouts.values())
    ranks = {path: [0] * len(layout.ranks) for path, layout in layouts.items()}
    for _, _, layer, number in sorted(slots)[:budget]:
        ranks[paths[number]][layer] += 1
    return {path: tuple(of_layers) for path, of_layers in ranks.items()}


def first_a(
    directions: Mapping[str, Sequence[Directions]],
    ranks: Mapping[str, Sequence[int]],
    shapes: Mapping[str, tuple[int, ...]],
) -> dict[str, np.ndarray]:
    """Return `a` at step 0 by path, in the shapes [L, I, R] of `shapes`: as many directions as a layer has
    ranks, then zeros.
    """
    found = {}
    for path, of_layers in ranks.items():
        source, a = input_of(path, list(ranks)), np.zeros(shapes[path], np.float32)
        for layer, rank in enumerate(of_layers):
            a[layer, :, :rank] = directions[source][layer].vectors[:, :rank]
        found[path] = a
    return found


def written_adapter(adapter: Params, settings: Adapter, model: Model) -> tuple[Params, Adapter]:
    """Return a trained adapter with the ranks that EVA gave its modules, and the settings that declare it.

    Raises ValueError if no module has a rank.
    """
    declared = pair_layouts(model.specs.get("base", model.specs), settings, model.weight_names)
    nodes = pairs_by_path(adapter)
    used = jax.jit(lambda pairs: {path: jnp.sum(jnp.any(a != 0, -2), -1) for path, a in pairs.items()})
    counts = jax.device_get(used({path: nodes[path]["a"] for path in declared}))
    layouts: dict[str, PairRanks] = {}
    for path, found in counts.items():
        ranks = tuple(int(rank) for rank in np.ravel(found))
        times = [
            (new / old) ** (0.5 if settings.rslora else 1.0) if new else 0.0
            for new, old in zip(ranks, declared[path].ranks, strict=True)
        ]
        alphas = tuple(alpha * x for alpha, x in zip(declared[path].alphas, times, strict=True))
        if any(ranks):
            layouts[path] = PairRanks(ranks, alphas)
    out = {path: node for path, node in nodes.items() if path in layouts or path not in declared}
    for path, layout in layouts.items():
        out[path] = {**nodes[path], **_first_ranks(nodes[path]["a"], nodes[path]["b"], max(layout.ranks))}
    plain = replace(settings, init="default", eva_rho=Adapter.eva_rho, eva_tokens=Adapter.eva_tokens)
    return tree.nested(out), with_patterns(plain, layouts, model)


@partial(jax.jit, static_argnames="count")
def _first_ranks(a: jax.Array, b: jax.Array, count: int) -> dict[str, jax.Array]:
    """Return the first `count` columns of a and rows of b."""
    return {"a": a[..., :count], "b": b[..., :count, :]}
