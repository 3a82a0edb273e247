"""EVA (Paischer et al. 2024, arXiv:2410.07170): LoRA that starts from the inputs of its layers on the run's
rows, with ranks by explained variance.

The columns of `a` are the principal directions of a layer's inputs, `b` is zero: the model at step 0 is the
base. All singular values of all layers, as fractions of the variance of their layer's inputs, compete for the
ranks. The sum of the ranks stays as in the settings; a module gets at most `eva_rho` times its rank there.

Arrays have that largest rank in all layers; unused columns are zero and stay zero (see lora.py). The
adapter that is written has each module's rank, and modules that got none are left out, as in PEFT
(init_lora_weights="eva"). alpha / rank stays as in the settings, as with PEFT's adjust_scaling_factors; with
rsLoRA, alpha / sqrt(rank) does, unlike in PEFT.

PEFT follows the principal components by an incremental, truncated SVD until they turn no further. Here the
whole covariance is summed up and decomposed: what the incremental SVD without truncation converges to.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float

from jaxft.data.source import Source
from jaxft.distributed import processes, sharding, sync
from jaxft.distributed.sync import is_first
from jaxft.models.model import Model
from jaxft.nn import tree
from jaxft.nn.adapters.lora import EVA, FUSED_PARTS, Adapter, pairs_by_path
from jaxft.nn.adapters.lora_specs import PairRanks, most_components, pair_layouts
from jaxft.nn.matmul import outer, with_taps
from jaxft.nn.quant import is_qtensor
from jaxft.nn.tree import Batch, Params, struct
from jaxft.weights.param_loading import shard_host_array
from jaxft.weights.peft.peft_tensors import with_patterns
from jaxft.weights.tensors import layer_on_host

EXACT_INPUTS = 2048  # a covariance of at most so many inputs is decomposed in full, a larger one by Lanczos
SMALLEST_VARIANCE = 1e-30  # instead of a smaller divisor
MOMENT_BYTES = 2**32  # of covariances on the device at once; adding a batch takes as many again

RowRange = tuple[int, int]  # the first row, and the one after the last


class FirstRows(NamedTuple):
    """The rows whose activations initialise an EVA adapter.

    batches: returns batches [micro, rows, ...], the same in every call. report: called with lines for the
    user.
    """

    batches: Callable[[], Iterable[Batch]]
    report: Callable[[str], None]


@struct
class InputStatistics:
    """Means and second moments of the inputs x of linear layers over tokens, by path.

    count: number of tokens so far, a scalar array. means: {path: [L, I]}, for L layers with I inputs.
    moments: {path: sum over tokens of (x - mean) (x - mean)^T}, [L, I, I], or [L, N, I] with N of its rows.
    """

    count: Any
    means: dict[str, Any]
    moments: dict[str, Any]


def first_batches(source: Source[Any], tokens: int) -> Iterator[Batch]:
    """Yield the first batches of a run that together have at least `tokens` tokens, or all batches. For a
    run that samples completions, they are batches of prompts.
    """
    step = 0
    while tokens > 0 and step < source.info.steps:
        batch = source.given(step)
        yield batch
        tokens, step = tokens - int(np.count_nonzero(batch.segments)), step + 1


def eva_adapter(
    model: Model, base: Params, adapter: Params, settings: Adapter, rows: FirstRows, mesh: Mesh
) -> Params:
    """Return `adapter` with each `a` initialised by EVA, sharded as before.

    model: a model over {"base", "adapter"}. rows: the rows whose activations are measured. Every process
    calls it; process 0 alone computes the directions, because the libraries of other hosts may round
    otherwise. The rows pass through the model once for each MOMENT_BYTES bytes of covariances, and the host
    stores the covariances of one kernel. Raises ValueError for inputs that are not finite.
    """
    layouts = pair_layouts(model.specs["base"], settings, model.weight_names)
    paths = list(layouts)
    shapes = {path: tuple(pairs_by_path(adapter)[path]["a"].shape) for path in paths}
    counts = {source: 0 for source in dict.fromkeys(input_of(path, paths) for path in paths)}
    for path, layout in layouts.items():
        source = input_of(path, paths)
        most = most_components(max(layout.ranks), settings.eva_rho, shapes[path][-2])
        counts[source] = max(counts[source], most)
    directions: dict[str, list[Directions]] = {}
    parts: dict[str, list[list[np.ndarray]]] = {}  # of the kernels whose covariances are not complete yet
    for group in _groups({source: shapes[source] for source in counts}):
        rows.report(f"adapter.init={EVA}: reading the inputs of {_names(group, shapes)}")
        statistics = input_statistics(model, base, group, rows.batches(), mesh)
        for source, (_, end) in group.items():
            moments = statistics.moments[source]
            own = [layer_on_host(moments, (i,)) for i in range(len(moments))]
            parts.setdefault(source, []).append(own)
            if end == shapes[source][-2]:
                complete = parts.pop(source)
                with processes.agreement():
                    if is_first():
                        directions[source] = [
                            principal_directions(
                                np.concatenate(of_layer), counts[source], f"{source}, layer {i}"
                            )
                            for i, of_layer in enumerate(zip(*complete, strict=True))
                        ]
    first = {path: np.zeros(shapes[path], np.float32) for path in paths}
    if is_first():
        explained = {source: [one.explained for one in of_layers] for source, of_layers in directions.items()}
        ranks = redistributed_ranks(layouts, explained, settings.eva_rho)
        rows.report(_summary(ranks, explained, int(statistics.count)))
        first = first_a(directions, ranks, shapes)
    first = {path: sync.array_of_first(first[path]) for path in paths}

    def leaf(path: str, x: jax.Array) -> jax.Array:
        above, _, name = path.rpartition("/")
        if name != "a" or above not in first:
            return x
        return shard_host_array(first[above].astype(x.dtype), x.sharding)

    return tree.map_with_path(leaf, adapter)


def input_statistics(
    model: Model, base: Params, parts: Mapping[str, RowRange], batches: Iterable[Batch], mesh: Mesh
) -> InputStatistics:
    """Return statistics of the inputs of linear layers over all tokens but padding.

    model: a model over {"base", "adapter"}. parts: {path: (first row, end row) of the [I, I] sum to
    compute}. Each batch is centred on its own mean and merged with the earlier ones (Chan et al. 1979), so
    that a large mean costs no precision.
    """
    everywhere = sharding.replicated(mesh)
    leaves = tree.paths(base, is_qtensor)
    wide = np.promote_types(model.dtype, np.float32)
    own = partial(_add_batch, model, wide, parts)
    add = jax.jit(own, donate_argnums=1, out_shardings=everywhere)

    def empty() -> InputStatistics:
        means, moments = dict[str, Any](), dict[str, Any]()
        for path, (first, end) in parts.items():
            layers, inputs = leaves[path].shape[0], leaves[path].shape[-2]
            means[path] = jnp.zeros((layers, inputs), wide)
            moments[path] = jnp.zeros((layers, end - first, inputs), wide)
        return InputStatistics(jnp.zeros((), wide), means, moments)

    statistics = jax.jit(empty, out_shardings=everywhere)()
    for batch in batches:
        for i in range(len(batch.ids)):
            part = jax.tree.map(lambda x, i=i: x[i : i + 1], batch)
            statistics = add(base, statistics, sharding.shard_batch(mesh, part))
    return statistics


def _add_batch(
    model: Model,
    dtype: Any,
    parts: Mapping[str, RowRange],
    base: Params,
    known: InputStatistics,
    batch: Batch,
) -> InputStatistics:
    """Return `known`, the statistics so far, merged with the statistics of a microbatch [1, rows, ...]."""
    rows = jax.tree.map(lambda x: x[0], batch)
    counted = (rows.segments > 0).astype(dtype)
    count, one = jnp.sum(counted), jnp.ones((), dtype)
    tapped_base, tapped = with_taps(base, parts)

    def statistics(before: Any, after: Any) -> dict[str, Any]:
        return {path: _centred(x, counted, parts[path]) for path, x in tapped.take().items()}

    sums = model.hidden({"base": tapped_base}, rows, observe=statistics)[1]
    totals, moments = ({path: pair[i] for path, pair in sums.items()} for i in (0, 1))
    total = known.count + count
    share = count / jnp.maximum(total, one)
    steps = {path: totals[path] / jnp.maximum(count, one) - known.means[path] for path in totals}
    between = {
        path: jnp.einsum("li,lj->lij", step[:, slice(*parts[path])], step) for path, step in steps.items()
    }
    return InputStatistics(
        total,
        {path: known.means[path] + share * steps[path] for path in steps},
        {path: known.moments[path] + moments[path] + known.count * share * between[path] for path in steps},
    )


def _centred(
    x: Float[Array, "B T I"], counted: Float[Array, "B T"], part: RowRange
) -> tuple[Float[Array, " I"], Float[Array, "N I"]]:
    """Return (sum of inputs x over tokens, rows `part` of the sum of (x - mean) (x - mean)^T). counted: 1 for
    tokens that count, 0 for padding.
    """
    weights = counted[..., None]
    wide = x.astype(counted.dtype) * weights
    total = jnp.sum(wide, (0, 1))
    mean = total / jnp.maximum(jnp.sum(counted), jnp.ones((), counted.dtype))
    used = ((wide - mean[None, None]) * weights).astype(x.dtype)
    return total, outer(used[..., slice(*part)], used, counted.dtype)


def _groups(shapes: dict[str, tuple[int, ...]]) -> list[dict[str, RowRange]]:
    """Divide the rows of all covariances [I, I] into groups of at most MOMENT_BYTES; return for each group
    {path: (first row, end row)}. shapes: [L, I, R] of each `a` by path.
    """
    groups: list[dict[str, RowRange]] = []
    room = 0
    for path, (layers, inputs, _) in shapes.items():
        row = 4 * layers * inputs
        most = min(inputs, max(1, MOMENT_BYTES // row))
        for first in range(0, inputs, most):
            end = min(first + most, inputs)
            if not groups or row * (end - first) > room:
                groups.append({})
                room = MOMENT_BYTES
            groups[-1][path] = first, end
            room -= row * (end - first)
    return groups


def _names(group: dict[str, RowRange], shapes: dict[str, tuple[int, ...]]) -> str:
    """Return text with the paths of a group, each with its range of rows unless it has all rows."""
    sizes = {path: shapes[path][-2] for path in group}
    return ", ".join(
        path if (first, end) == (0, sizes[path]) else f"{path} ({first + 1} to {end} of {sizes[path]})"
        for path, (first, end) in group.items()
    )


def _summary(ranks: dict[str, tuple[int, ...]], explained: dict[str, list[np.ndarray]], tokens: int) -> str:
    """Return a line for the log: the ranks, and how much of the variance the first directions explain."""
    paths, all_ranks = list(ranks), [rank for of_layers in ranks.values() for rank in of_layers]
    parts = [
        float(np.sum(explained[input_of(path, paths)][layer][:rank]))
        for path, of_layers in ranks.items()
        for layer, rank in enumerate(of_layers)
    ]
    return (
        f"adapter.init={EVA}: ranks from {min(all_ranks)} to {max(all_ranks)} by the inputs of {tokens:,} "
        f"tokens, of whose variance they explain {100 * sum(parts) / len(parts):.0f} % on average"
    )


# From statistics to directions and ranks


class Directions(NamedTuple):
    """Principal directions of a layer's inputs, the largest first.

    vectors: [I, C], orthonormal columns; the element of the largest magnitude is positive in each. explained:
    [C], fractions of the variance.
    """

    vectors: Float[np.ndarray, "I C"]
    explained: Float[np.ndarray, " C"]


def input_of(path: str, paths: Sequence[str]) -> str:
    """Return the path under which the input of the linear layer `path` is stored: the first of the layers
    that share it and are in `paths`.

    q, k and v share an input; gate and up share another.
    """
    above, _, name = path.rpartition("/")
    for parts in FUSED_PARTS.values():
        if name in parts:
            return next(one for one in (f"{above}/{part}" for part in parts) if one in paths)
    return path


def principal_directions(moment: Float[np.ndarray, "I I"], count: int, place: str) -> Directions:
    """Return the `count` principal directions of inputs with this covariance, or a multiple of it.

    place: the layer, for the error. Raises ValueError if the covariance is not finite.
    """
    import scipy.linalg  # not at the top: most runs do not need it
    import scipy.sparse.linalg

    wide = moment.astype(np.float64)
    if not np.isfinite(wide).all():
        raise ValueError(
            f"adapter.init={EVA}: the inputs of {place} are not finite; use adapter.init=default"
        )
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

    layouts: ranks by path in the settings. explained: for each input (by the path that input_of returns),
    each layer's fractions of the variance, see Directions. rho: a layer gets at most rho times its rank in
    the settings.
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
    """Return `a` at step 0 by path, of the shapes [L, I, R] in `shapes`. The first columns of a layer, as
    many as its rank, are directions; the remaining columns are zeros.
    """
    a_by_path = {}
    for path, of_layers in ranks.items():
        source, a = input_of(path, list(ranks)), np.zeros(shapes[path], np.float32)
        for layer, rank in enumerate(of_layers):
            a[layer, :, :rank] = directions[source][layer].vectors[:, :rank]
        a_by_path[path] = a
    return a_by_path


def written_adapter(adapter: Params, settings: Adapter, model: Model) -> tuple[Params, Adapter]:
    """Return (the trained adapter without unused columns, settings with the rank that EVA gave each module).

    Raises ValueError if no module has a rank.
    """
    declared = pair_layouts(model.specs.get("base", model.specs), settings, model.weight_names)
    nodes = pairs_by_path(adapter)
    used = jax.jit(lambda pairs: {path: jnp.sum(jnp.any(a != 0, -2), -1) for path, a in pairs.items()})
    counts = jax.device_get(used({path: nodes[path]["a"] for path in declared}))
    layouts: dict[str, PairRanks] = {}
    for path, of_path in counts.items():
        ranks = tuple(int(rank) for rank in np.ravel(of_path))
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
    return {"a": a[..., :count], "b": b[..., :count, :]}
