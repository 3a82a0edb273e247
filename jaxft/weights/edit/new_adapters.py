"""New LoRA adapters: weighted combinations of several adapters, and the difference of two full models.

The formulas of combinations are PEFT's (`add_weighted_adapter`). Adapter k has the weight w_k, the scale s_k
and, in each module, the pair A_k B_k; c_k = w_k s_k:

- cat: `sum_k c_k A_k B_k`, exactly: the pairs side by side, with the sum of their ranks.
- svd: the same sum, reduced to a rank by its largest singular values.
- linear: `(sum_k sign(c_k) sqrt|c_k| A_k) (sum_k sqrt|c_k| B_k)`, which has cross terms.
- ties (Yadav et al. 2023, arXiv:2306.01708): keep the fraction `density` of each A_k and B_k with the largest
  magnitudes; of these, the values with the sign of their sum over k; then average the weighted values.
- dare_linear, dare_ties (Yu et al. 2024, arXiv:2311.03099): keep a random fraction `density` of the values,
  divided by density, instead of the largest; then proceed as linear, or as ties.

All methods but cat and svd combine A and B separately, so they need adapters of equal ranks.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Literal, NamedTuple

import numpy as np
from jaxtyping import Float

from jaxft.annotations import FiniteFloat, PositiveFraction, PositiveInt, Seed, check_bounds
from jaxft.models.model import Model
from jaxft.nn import tree
from jaxft.nn.adapters.lora import Adapter, pairs_by_path, target_paths
from jaxft.nn.adapters.lora_specs import adapter_specs, pair_layouts
from jaxft.nn.param_spec import path_hash
from jaxft.nn.tree import Params
from jaxft.weights import pretrained
from jaxft.weights.hf import hf_read
from jaxft.weights.hf.hf_read import EMBEDDING, HEAD
from jaxft.weights.peft.peft_tensors import Pair, adaptable_tensors, adapter_of, module_list
from jaxft.weights.tensors import ModelFiles, Tensor, stack, tensors_of

CombineMethod = Literal["linear", "cat", "svd", "ties", "dare_linear", "dare_ties"]
PRUNING = ("ties", "dare_linear", "dare_ties")
RANDOM = ("dare_linear", "dare_ties")
DEFAULT_DENSITY = 0.5
ROUNDING = 1e-6  # below this fraction of its terms' norm, a sum is rounding errors

_A = Float[np.ndarray, "_ _"]  # [I, R]; sizes differ between weights, ranks between adapters
_B = Float[np.ndarray, "_ _"]  # [R, O]


@dataclass(frozen=True)
class Combination:
    """Method and settings of a combination of adapters.

    weights: one for each adapter, of either sign. density: fraction of values that ties, dare_linear and
    dare_ties keep, None for 0.5. rank: rank of the result of svd, None for the largest rank of the adapters.
    seed: of the random choice of dare_linear and dare_ties, None for 0.
    """

    method: Annotated[CombineMethod, "--method"]
    weights: Annotated[tuple[FiniteFloat, ...], "--weights"]
    density: Annotated[PositiveFraction | None, "--density"] = None
    rank: Annotated[PositiveInt | None, "--rank"] = None
    seed: Annotated[Seed | None, "--seed"] = None

    def __post_init__(self):
        check_bounds(self)
        if not any(self.weights):
            raise ValueError(f"--weights {self.listed_weights}: expected numbers that are not all 0")
        for name, methods in (("density", PRUNING), ("rank", ("svd",)), ("seed", RANDOM)):
            value = getattr(self, name)
            if value is not None and self.method not in methods:
                raise ValueError(f"--{name} {value} needs --method {' or '.join(methods)}")

    @property
    def listed_weights(self) -> str:
        """The weights as on the command line, such as 1,-0.5."""
        return ",".join(f"{weight:g}" for weight in self.weights)


class NamedAdapter(NamedTuple):
    """An adapter to combine. name: its folder, for messages."""

    name: str
    params: Params
    settings: Adapter


class Combined(NamedTuple):
    """A combined adapter. dropped: for svd, the norm of the exact sum minus the result, divided by the norm
    of the sum, over all modules; 0 for other methods.
    """

    params: Params
    settings: Adapter
    dropped: float


class _Part(NamedTuple):
    """The pair of one adapter in a module. factor: the adapter's weight times its scale, c_k."""

    a: _A
    b: _B
    factor: float


@np.errstate(over="ignore", invalid="ignore")  # _square_norm refuses overflows
def combine_adapters(adapters: Sequence[NamedAdapter], model: Model, how: Combination) -> Combined:
    """Combine adapters on a model into one adapter. Its rank and alpha are the largest rank of any module.

    A module that some of the adapters lack is combined from the others. Raises ValueError for adapters that
    are not plain LoRA, for ranks that the method cannot combine, unless there is one weight for each adapter,
    and for a result that is 0 or has values too large for float32.
    """
    if len(adapters) < 2 or len(how.weights) != len(adapters):
        raise ValueError(
            f"--weights {how.listed_weights} for {len(adapters)} adapters; name at least two "
            "adapters and give one weight for each"
        )
    for adapter in adapters:
        _check_plain(adapter)
    specs = model.specs.get("base", model.specs)
    layouts = [pair_layouts(specs, x.settings, model.weight_names) for x in adapters]
    pairs = [pairs_by_path(x.params) for x in adapters]
    out: dict[str, list[tuple[_A, _B] | None]] = {}
    lost = total = size = terms = 0.0
    for path, tensors in adaptable_tensors(model).items():
        for number, tensor in enumerate(tensors if any(path in layout for layout in layouts) else ()):
            of_path = out.setdefault(path, [])
            parts = [
                _part(pair[path], tensor.index, layout[path].ranks[number], weight)
                for pair, layout, weight in zip(pairs, layouts, how.weights, strict=True)
                if path in layout and layout[path].ranks[number]
            ]
            if not parts:
                of_path.append(None)
                continue
            _check_ranks(tensor, parts, how)
            terms += sum(_square_norm(part.a, part.b, how, part.factor) for part in parts)
            if how.method != "svd":
                pair = _combined(parts, how, f"{path}/{number}")
            else:
                highest = max(x.settings.highest_rank for x in adapters)
                pair, squares = _reduced(parts, how.rank or highest)
                lost, total = lost + squares[0], total + squares[1]
            size += _square_norm(*pair, how)
            of_path.append(pair)
    if size <= ROUNDING**2 * terms:
        density = " or a higher --density" if how.method in PRUNING else ""
        raise ValueError(
            f"--method {how.method} --weights {how.listed_weights}: the combination of these adapters is 0, "
            f"up to rounding; choose other weights{density}"
        )
    return _as_adapter(out, adapters, model, math.sqrt(lost / total) if total else 0.0)


def _check_plain(adapter: NamedAdapter) -> None:
    settings = adapter.settings
    if settings.dora:
        raise ValueError(
            f"{adapter.name}: a DoRA adapter, whose learned norms have no weighted sum; merge it into the "
            "base with export and combine adapters on the merged model"
        )
    if settings.replaces_weights:
        what = "modules_to_save, biases or trainable tokens"
        raise ValueError(
            f"{adapter.name}: the adapter has {what}, for which no combination is defined; merge it into the "
            "base with export and combine adapters on the merged model"
        )


def _part(pair: Params, index: tuple[int, ...], rank: int, weight: float) -> _Part:
    """Return an adapter's pair of a module, without the zeros beyond its rank. index: on lead axes."""
    a, b, scale = (pair[name][index] for name in ("a", "b", "scale"))
    return _Part(a[:, :rank].astype(np.float32), b[:rank].astype(np.float32), weight * float(scale))


def _square_norm(a: _A, b: _B, how: Combination, factor: float = 1.0) -> float:
    """Return the squared Frobenius norm of `factor a b`. Raises ValueError if the norm overflows float32."""
    a, b = a.astype(np.float64), b.astype(np.float64)
    norm = abs(factor) * math.sqrt(max(float(((a.T @ a) * (b @ b.T)).sum()), 0.0))
    if not norm < np.finfo(np.float32).max:
        raise ValueError(
            f"--weights {how.listed_weights}: the combination has values that are too large for float32; "
            "use smaller weights"
        )
    return norm * norm


def _check_ranks(tensor: Tensor, parts: list[_Part], how: Combination) -> None:
    where, ends = tensor.module, tensor.values
    ranks = sorted({part.a.shape[1] for part in parts})
    if how.method not in ("cat", "svd") and len(ranks) > 1:
        raise ValueError(
            f"{where}: the adapters have the ranks {', '.join(map(str, ranks))}, and --method {how.method} "
            "needs equal ones; use --method svd or cat"
        )
    if how.rank is not None:
        _check_rank(how.rank, where, ends)


def _check_rank(rank: int, name: str, sides: tuple[int, ...]) -> None:
    if rank > min(sides):
        raise ValueError(
            f"--rank {rank}: {name} is a matrix of {sides[0]} x {sides[1]}, which has at most rank "
            f"{min(sides)}; use --rank {min(sides)} or less"
        )


def _reduced(parts: list[_Part], rank: int) -> tuple[tuple[_A, _B], tuple[float, float]]:
    """Return the pair (a, b) of at most rank `rank` whose product is nearest to the sum of `factor a b` over
    the parts, and (squared norm of their difference, squared norm of the sum). Two QR decompositions reduce
    the SVD to the size of the summed ranks.
    """
    a = np.concatenate([part.a * part.factor for part in parts], 1).astype(np.float64)
    b = np.concatenate([part.b for part in parts]).astype(np.float64)
    left, core_left = np.linalg.qr(a)
    right, core_right = np.linalg.qr(b.T)
    u, s, vt = np.linalg.svd(core_left @ core_right.T)
    kept = min(rank, len(s))
    root = np.sqrt(s[:kept])
    new_a, new_b = left @ (u[:, :kept] * root), (root[:, None] * vt[:kept]) @ right.T
    squares = s**2
    pair = new_a.astype(np.float32), new_b.astype(np.float32)
    return pair, (float(squares[kept:].sum()), float(squares.sum()))


def _combined(parts: list[_Part], how: Combination, name: str) -> tuple[_A, _B]:
    """Combine a module's pairs by a method other than svd. name: text that the random seed depends on."""
    if how.method == "cat":
        scaled = [part.a * np.float32(part.factor) for part in parts]
        return np.concatenate(scaled, 1), np.concatenate([part.b for part in parts])
    roots = np.array([math.sqrt(abs(part.factor)) for part in parts], np.float32)
    signs = np.array([1.0 if part.factor >= 0 else -1.0 for part in parts], np.float32)
    a = _merged(np.stack([part.a for part in parts]), roots * signs, how, f"{name}/a")
    return a, _merged(np.stack([part.b for part in parts]), roots, how, f"{name}/b")


def _merged(
    values: Float[np.ndarray, "K M N"], weights: Float[np.ndarray, " K"], how: Combination, name: str
) -> Float[np.ndarray, "M N"]:
    """Combine the A, or the B, of K pairs by linear, ties or DARE. name: text that the seed depends on."""
    density = DEFAULT_DENSITY if how.density is None else how.density
    if how.method == "ties":
        values = np.stack([_largest(x, density) for x in values])
    elif how.method in RANDOM:
        key = np.random.default_rng([how.seed or 0, path_hash(name)])
        values = values * (key.random(values.shape) < density) / np.float32(density)
    weighted = values * weights[:, None, None]
    if how.method in ("linear", "dare_linear"):
        return weighted.sum(0)
    elected = np.where(values.sum(0) >= 0, np.float32(1), np.float32(-1))
    agrees = np.sign(values) == elected
    return (weighted * agrees).sum(0) / np.maximum(agrees.sum(0), 1).astype(np.float32)


def _largest(values: Float[np.ndarray, "M N"], density: float) -> Float[np.ndarray, "M N"]:
    """Keep the int(density * size) values of largest magnitude; set the others to 0."""
    count = int(density * values.size)
    mask = np.zeros(values.size, bool)
    if count:
        mask[np.argpartition(-np.abs(values), count - 1, axis=None)[:count]] = True
    return values * mask.reshape(values.shape)


def _as_adapter(
    pairs: dict[str, list[tuple[_A, _B] | None]],
    adapters: Sequence[NamedAdapter],
    model: Model,
    dropped: float,
) -> Combined:
    """Return an adapter with these pairs, padded with zeros to one rank, because some programs load no
    adapters of several ranks. pairs: by parameter path, (a, b) of each module, None for a module without one.
    adapters: the sources, whose largest dropout the adapter gets, or 0 with a pair of the head. dropped: see
    Combined.
    """
    rank = max(pair[0].shape[1] for modules in pairs.values() for pair in modules if pair is not None)

    def padded(pair: tuple[_A, _B] | None) -> Pair | None:
        if pair is None:
            return None
        more = (0, rank - pair[0].shape[1])
        return Pair(np.pad(pair[0], ((0, 0), more)), np.pad(pair[1], (more, (0, 0))), float(rank))

    dropout = max(x.settings.dropout for x in adapters)
    plain = Adapter(rank, float(rank), dropout if "head" not in pairs else 0.0)
    nodes, settings = adapter_of({path: list(map(padded, x)) for path, x in pairs.items()}, plain, model)
    return Combined(tree.nested(nodes), settings, dropped)


# ---- the difference of two full models, matrix by matrix
#
# The pair of a matrix is the product of rank R that is nearest to `tuned - base` (Eckart & Young 1936), with
# half of the singular values in each side. Memory holds two matrices and the adapter.


FULL_SVD = 1024  # inputs or outputs, up to which all singular values are computed
OVERSAMPLING = 16  # further directions of the randomised SVD
POWER_ITERATIONS = 6

_Matrix = Float[np.ndarray, "I O"]


@dataclass(frozen=True)
class Extraction:
    """The settings of an extraction. rank: of each pair. targets: see nn.adapters.lora.Adapter. save_others:
    whether the adapter also stores, as modules_to_save and biases, changed parameters that have no pair.
    """

    rank: Annotated[PositiveInt, "--rank"]
    targets: str | tuple[str, ...] = "all-linear"
    save_others: bool = False

    def __post_init__(self):
        check_bounds(self)


class KindError(NamedTuple):
    """How much a parameter differs in base and tuned model, over all its layers, and how much its pairs miss.
    path: the parameter's path. change: norm of the difference divided by the norm of the base. error: norm of
    the difference minus the pairs' products, divided by the norm of the difference.
    """

    path: str
    change: float
    error: float


class Extracted(NamedTuple):
    """An extracted adapter. errors: one per parameter with pairs, then their total. others: lines for the
    user about parameters without a pair that changed.
    """

    params: Params
    settings: Adapter
    errors: list[KindError]
    others: list[str]


def extract_adapter(
    base_ref: str, tuned_ref: str, model: Model, what: Extraction, progress: Callable[[str], None]
) -> Extracted:
    """Extract an adapter from the difference of two models of the same architecture.

    model: the base's. progress(line): called with a line about each parameter that gets pairs. Raises
    ValueError if the models differ in more than the values of their tensors, if their weights are equal, and
    if the rank is larger than a side of a matrix.
    """
    table, paths = tensors_of(model, tied_head=True), target_paths(model.specs, what.targets)
    for path in paths:
        _check_rank(what.rank, path, table[path][0].values[-2:])
    base, tuned = pretrained.open_files(base_ref), pretrained.open_files(tuned_ref)
    _check_same_shapes(base, tuned, model)
    _check_same_settings(base_ref, tuned_ref, model)
    untied = HEAD in tuned.tensors and HEAD not in base.tensors
    if "head" not in (*model.specs, *paths) and not untied:
        del table["head"]
    if not any(
        not np.array_equal(before, after)
        for tensors in table.values()
        for before, after in _matrices(tensors, base, tuned)
    ):
        raise ValueError(
            f"{tuned.where} and {base.where} have the same weights: nothing to extract; name another model"
        )
    pairs: dict[str, list[Pair | None]] = {path: [] for path in paths}
    errors = dict[str, KindError]()
    total = np.zeros(3)  # squared norms of the base, of the change, of the part that the pairs lack
    for path in (*paths, *(path for path in table if path not in pairs)):
        if path in pairs:
            progress(f"{path}: {what.rank} singular values of each layer")
        sums = np.zeros(3)
        for number, (before, after) in enumerate(_matrices(table[path], base, tuned)):
            lost = change = after - before
            if path in pairs:
                a, b = _low_rank(change, what.rank, f"{path}/{number}")
                lost = change - a @ b
                pairs[path].append(Pair(a, b, float(what.rank)))
            sums += [_square(before), _square(change), _square(lost)]
        errors[path] = _kind_error(path, sums)
        total += sums if path in pairs else 0
    nodes, settings = adapter_of(pairs, Adapter(what.rank, float(what.rank)), model)
    changed = {path: x.change for path, x in errors.items() if path not in pairs and x.error}
    if what.save_others and changed:
        replaced, settings = _with_others(settings, changed, tuned, model)
        nodes |= replaced
    kinds = [*(errors[path] for path in paths), _kind_error("total", total)]
    return Extracted(tree.nested(nodes), settings, kinds, _lines(changed, what.save_others))


def _check_same_shapes(base: ModelFiles, tuned: ModelFiles, model: Model) -> None:
    """Raise ValueError, naming the tensor, if the tuned model lacks one of the base or has another shape."""
    before, after = ({name: x.shape for name, x in files.tensors.items()} for files in (base, tuned))
    for tensors in tensors_of(model).values():
        for name in (tensor.name for tensor in tensors):
            if name == HEAD and name not in before | after:
                continue
            ours, theirs = (shapes.get(name, shapes.get(EMBEDDING)) for shapes in (before, after))
            if ours == theirs and (name in after or name == HEAD):
                continue
            advice = "use the base that the model was tuned from"
            if name in (EMBEDDING, HEAD) and name in after:
                advice = (
                    "their vocabularies differ; add the tokens to the base with scripts/extend.py first, and "
                    "extract from that"
                )
            shape = after.get(name)
            got = "is missing" if shape is None else f"has shape {shape}"
            raise ValueError(
                f"{tuned.where}: tensor {name} {got}, but {ours} in the base {base.where}; {advice}"
            )


def _check_same_settings(base_ref: str, tuned_ref: str, model: Model) -> None:
    """Raise ValueError if configs differ in what no adapter stores, or tensors do not fit the config."""
    pretrained.check_preset(base_ref, model.config)
    theirs = pretrained.model_for(tuned_ref)
    pretrained.check_preset(tuned_ref, theirs.config)
    ignored = (*pretrained.NOT_COMPUTED, "tied")  # an untied head is a parameter that changed
    differing = pretrained.config_differences(model.config, theirs.config, ignored)
    if differing:
        raise ValueError(
            f"{tuned_ref}: its settings differ from the base {base_ref}, and an adapter changes only "
            f"weights: {'; '.join(differing)} (base and tuned); extract from a base with these settings"
        )
    hf_read.check_tensors(pretrained.open_files(tuned_ref), theirs)


def _matrices(
    tensors: Sequence[Tensor], base: ModelFiles, tuned: ModelFiles
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield (base, tuned) values of each of a parameter's tensors in float32, [in, out] for a kernel."""
    for tensor in tensors:
        values = []
        for files in (base, tuned):
            tied = tensor.name not in files.tensors  # then the head is the table
            stored = replace(tensor, name=EMBEDDING) if tied else tensor
            values.append(stored.read(files).astype(np.float32))
        yield values[0], values[1]


def _low_rank(matrix: _Matrix, rank: int, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Return a [in, R], b [R, out] whose product is the best approximation of a matrix with this rank.

    If both sides are larger than FULL_SVD, the SVD is randomised with power iterations (Halko et al. 2011,
    arXiv:0909.4061). name: text that the seed of its random directions depends on.
    """
    ins, outs = matrix.shape
    if min(ins, outs) <= FULL_SVD:
        u, s, vt = np.linalg.svd(matrix, full_matrices=False)
    else:
        directions = min(rank + OVERSAMPLING, ins, outs)
        start = np.random.default_rng(path_hash(name)).normal(size=(outs, directions))
        basis = np.linalg.qr(matrix @ start.astype(np.float32))[0]
        for _ in range(POWER_ITERATIONS):
            basis = np.linalg.qr(matrix @ np.linalg.qr(matrix.T @ basis)[0])[0]
        u, s, vt = np.linalg.svd(basis.T @ matrix, full_matrices=False)
        u = basis @ u
    root = np.sqrt(s[:rank])
    a, b = u[:, :rank] * root, root[:, None] * vt[:rank]
    return np.ascontiguousarray(a, np.float32), np.ascontiguousarray(b, np.float32)


def _square(x: np.ndarray) -> float:
    return float(np.square(x, dtype=np.float64).sum())


def _kind_error(path: str, squares: np.ndarray) -> KindError:
    base, change, lost = squares
    return KindError(
        path,
        math.sqrt(change / base) if base else math.inf if change else 0.0,
        math.sqrt(lost / change) if change else 0.0,
    )


def _with_others(
    settings: Adapter, changed: dict[str, float], tuned: ModelFiles, model: Model
) -> tuple[dict[str, dict[str, np.ndarray]], Adapter]:
    """Return (nodes {"weight"}, adapter settings) that store the parameters in `changed` in full."""
    modules = {path for path in changed if not path.endswith("_bias")}
    if "embed" in modules and "head" not in model.specs:
        modules.add("head")  # which follows the table in the tuned model
    biases = any(path.endswith("_bias") for path in changed)
    saved = tuple(module_list(modules, model))
    settings = replace(settings, modules_to_save=saved, bias="all" if biases else "none")
    nodes, table = {}, tensors_of(model, tied_head=True)
    for path, node in pairs_by_path(adapter_specs(model.specs, settings, model.weight_names)).items():
        if "weight" in node:
            values = [after for _, after in _matrices(table[path], tuned, tuned)]
            nodes[path] = {"weight": stack(table[path], values)}
    return nodes, settings


def _lines(changed: dict[str, float], saved: bool) -> list[str]:
    """Return a line about changed parameters without a pair, or []. changed: relative change by path."""
    if not changed:
        return []
    named = ", ".join(f"{path} by {100 * change:.2g} %" for path, change in changed.items())
    end = (
        "are in the adapter in full" if saved else "are not in the adapter; --save-others stores them in full"
    )
    return [f"parameters without a pair changed ({named}) and {end}"]
