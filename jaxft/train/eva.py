"""The start of an EVA adapter by statistics of its layers' inputs on the run's first batches."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float

from jaxft import tree
from jaxft.data.source import Source
from jaxft.distributed import processes, sharding, sync
from jaxft.models.model import Model
from jaxft.nn.layer_inputs import with_taps
from jaxft.nn.lora import EVA, Adapter, pairs_by_path
from jaxft.nn.lora_specs import most_components, pair_layouts
from jaxft.nn.matmul import outer
from jaxft.nn.quant import is_qtensor
from jaxft.tree import Batch, Params, struct
from jaxft.weights import eva, place
from jaxft.weights.tensors import layer_on_host

MOMENT_BYTES = 2**32  # of covariances on the device at once; those of a batch take as many

RowRange = tuple[int, int]  # the first row, and the one after the last


class FirstRows(NamedTuple):
    """The rows that an EVA adapter starts from.

    batches: returns batches [micro, rows, ...], the same in every call. report: called with lines for the
    user.
    """

    batches: Callable[[], Iterable[Batch]]
    report: Callable[[str], None]


@struct
class InputStatistics:
    """Mean [L, I] of the inputs of linear layers by path, and rows of the sum [L, I, I] of
    (x - mean) (x - mean)^T over `count` tokens.
    """

    count: Any
    means: dict[str, Any]
    moments: dict[str, Any]


def first_batches(source: Source[Any], tokens: int) -> Iterator[Batch]:
    """Yield the first batches of a run that together have at least this many tokens, or all of them; of a run
    that samples completions, their prompts.
    """
    step = 0
    while tokens > 0 and step < source.info.steps:
        batch = source.given(step)
        yield batch
        tokens, step = tokens - int(np.count_nonzero(batch.segments)), step + 1


def eva_adapter(
    model: Model, base: Params, adapter: Params, settings: Adapter, rows: FirstRows, mesh: Mesh
) -> Params:
    """Return a fresh adapter with the first `a` of EVA, sharded as its leaves are.

    model: over the whole tree. Every process calls it; process 0 decomposes, because other hosts' libraries
    may round otherwise. The rows pass through the model once for each MOMENT_BYTES of covariances, and the
    host stores those of one kernel. Raises ValueError for inputs that are not finite.
    """
    layouts = pair_layouts(model.specs["base"], settings, model.weight_names)
    paths = list(layouts)
    shapes = {path: tuple(pairs_by_path(adapter)[path]["a"].shape) for path in paths}
    counts = {source: 0 for source in dict.fromkeys(eva.input_of(path, paths) for path in paths)}
    for path, layout in layouts.items():
        source = eva.input_of(path, paths)
        most = most_components(max(layout.ranks), settings.eva_rho, shapes[path][-2])
        counts[source] = max(counts[source], most)
    directions: dict[str, list[eva.Directions]] = {}
    parts: dict[str, list[list[np.ndarray]]] = {}  # of the kernels whose covariances are not complete yet
    for group in _groups({source: shapes[source] for source in counts}):
        rows.report(f"adapter.init={EVA}: reading the inputs of {_names(group, shapes)}")
        found = input_statistics(model, base, group, rows.batches(), mesh)
        for source, (_, end) in group.items():
            moments = found.moments[source]
            own = [layer_on_host(moments, (i,)) for i in range(len(moments))]
            parts.setdefault(source, []).append(own)
            if end == shapes[source][-2]:
                complete = parts.pop(source)
                with processes.agreement():
                    if processes.is_first():
                        directions[source] = [
                            eva.principal_directions(np.concatenate(of_layer), counts[source])
                            for of_layer in zip(*complete, strict=True)
                        ]
    first = {path: np.zeros(shapes[path], np.float32) for path in paths}
    if processes.is_first():
        explained = {source: [one.explained for one in of_layers] for source, of_layers in directions.items()}
        ranks = eva.redistributed_ranks(layouts, explained, settings.eva_rho)
        rows.report(_summary(ranks, explained, int(found.count)))
        first = eva.first_a(directions, ranks, shapes)
    first = {path: sync.array_of_first(first[path]) for path in paths}

    def leaf(path: str, x: jax.Array) -> jax.Array:
        above, _, name = path.rpartition("/")
        if name != "a" or above not in first:
            return x
        return place.shard_host_array(first[above].astype(x.dtype), x.sharding)

    return tree.map_with_path(leaf, adapter)


def input_statistics(
    model: Model, base: Params, parts: Mapping[str, RowRange], batches: Iterable[Batch], mesh: Mesh
) -> InputStatistics:
    """Return statistics of the inputs of linear layers over all tokens but padding.

    model: over the whole tree. parts: which rows of the sums, by path. Each batch is centred on its own mean
    and merged with the earlier ones (Chan et al. 1979), so that a large mean costs no digits.
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

    found = jax.jit(empty, out_shardings=everywhere)()
    for batch in batches:
        for i in range(len(batch.ids)):
            part = jax.tree.map(lambda x, i=i: x[i : i + 1], batch)
            found = add(base, found, sharding.shard_batch(mesh, part))
    return found


def _add_batch(
    model: Model,
    dtype: Any,
    parts: Mapping[str, RowRange],
    base: Params,
    known: InputStatistics,
    batch: Batch,
) -> InputStatistics:
    """Merge the statistics of a microbatch [1, rows, ...] into `known`."""
    rows = jax.tree.map(lambda x: x[0], batch)
    counted = (rows.segments > 0).astype(dtype)
    count, one = jnp.sum(counted), jnp.ones((), dtype)
    tapped_base, tapped = with_taps(base, parts)

    def statistics(before: Any, after: Any) -> dict[str, Any]:
        return {path: _centred(x, counted, parts[path]) for path, x in tapped.take().items()}

    found = model.hidden({"base": tapped_base}, rows, observe=statistics)[1]
    totals, moments = ({path: pair[i] for path, pair in found.items()} for i in (0, 1))
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
    """Return the sum of inputs x over the counted tokens, and rows of that of (x - mean) (x - mean)^T."""
    weights = counted[..., None]
    wide = x.astype(counted.dtype) * weights
    total = jnp.sum(wide, (0, 1))
    mean = total / jnp.maximum(jnp.sum(counted), jnp.ones((), counted.dtype))
    used = ((wide - mean[None, None]) * weights).astype(x.dtype)
    return total, outer(used[..., slice(*part)], used, counted.dtype)


def _groups(shapes: dict[str, tuple[int, ...]]) -> list[dict[str, RowRange]]:
    """Return the rows of all covariances in groups that fit into MOMENT_BYTES. shapes: [L, I, R] by path."""
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
    """Return the paths of a group, with the range of inputs where it is not all of them."""
    sizes = {path: shapes[path][-2] for path in group}
    return ", ".join(
        path if (first, end) == (0, sizes[path]) else f"{path} ({first + 1} to {end} of {sizes[path]})"
        for path, (first, end) in group.items()
    )


def _summary(ranks: dict[str, tuple[int, ...]], explained: dict[str, list[np.ndarray]], tokens: int) -> str:
    """Return a line about the ranks and the variance that the first directions explain."""
    paths, found = list(ranks), [rank for of_layers in ranks.values() for rank in of_layers]
    parts = [
        float(np.sum(explained[eva.input_of(path, paths)][layer][:rank]))
        for path, of_layers in ranks.items()
        for layer, rank in enumerate(of_layers)
    ]
    return (
        f"adapter.init={EVA}: ranks from {min(found)} to {max(found)} by the inputs of {tokens:,} tokens, of "
        f"whose variance they explain {100 * sum(parts) / len(parts):.0f} % on average"
    )
