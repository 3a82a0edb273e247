"""A LoRA adapter from the difference of two full models, matrix by matrix.

The pair of a matrix is the product of rank R that is nearest to `tuned - base` (Eckart & Young 1936), with
half of the singular values in each side. Memory holds two matrices and the adapter.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from jaxft import tree
from jaxft.models.model import Model
from jaxft.nn.adapters.lora import Adapter, pairs_by_path, target_paths
from jaxft.nn.adapters.lora_specs import adapter_specs
from jaxft.nn.param import path_hash
from jaxft.tree import Params
from jaxft.weights import pretrained
from jaxft.weights.hf import hf_read
from jaxft.weights.hf.hf_read import EMBEDDING, HEAD
from jaxft.weights.peft.peft_tensors import Pair, adapter_of, module_list
from jaxft.weights.tensors import ModelFiles, Tensor, TensorTable, stack, tensors_of

FULL_SVD = 1024  # inputs or outputs, up to which all singular values are computed
OVERSAMPLING = 16  # further directions of the randomised SVD
POWER_ITERATIONS = 6

_Matrix = Float[np.ndarray, "I O"]


@dataclass(frozen=True)
class Extraction:
    """The settings of an extraction. rank: of each pair. targets: as adapter.targets. save_others: store
    parameters that changed and have no pair in the adapter as well, as modules_to_save and biases.
    """

    rank: int
    targets: str | tuple[str, ...] = "all-linear"
    save_others: bool = False

    def __post_init__(self):
        if self.rank < 1:
            raise ValueError(f"--rank {self.rank}: must be at least 1")


class KindError(NamedTuple):
    """The change of a kind of matrix in all layers. change: its norm divided by the norm of the base. error:
    the norm of the part that the pairs lack, divided by the norm of the change.
    """

    path: str
    change: float
    error: float


class Extracted(NamedTuple):
    """An adapter; the errors of its kinds of matrices, last the total; lines about other parameters."""

    params: Params
    settings: Adapter
    errors: list[KindError]
    others: list[str]


def extract_adapter(
    base_ref: str, tuned_ref: str, model: Model, what: Extraction, progress: Callable[[str], None]
) -> Extracted:
    """Extract an adapter from two models of the same architecture. model: of the base, without a head of
    another kind.

    Raises ValueError for two models that differ in more than the values of their tensors, a rank above that
    of a matrix, and models without a difference.
    """
    table, paths = tensors_of(model, tied_head=True), target_paths(model.specs, what.targets)
    _check_rank(what.rank, {path: table[path] for path in paths})
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
        raise ValueError(f"{tuned.where}: its weights are those of {base.where}; there is nothing to extract")
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


def _check_rank(rank: int, table: TensorTable) -> None:
    for path, tensors in table.items():
        sides = tensors[0].values[-2:]
        if rank > min(sides):
            raise ValueError(
                f"--rank {rank}: {path} is a matrix of {sides[0]} x {sides[1]}, which has at most rank "
                f"{min(sides)}; lower it"
            )


def _check_same_shapes(base: ModelFiles, tuned: ModelFiles, model: Model) -> None:
    """Raise ValueError, naming the tensor, if the files of two models differ in a shape."""
    before, after = ({name: x.shape for name, x in files.tensors.items()} for files in (base, tuned))
    for tensors in tensors_of(model).values():
        for name in (tensor.name for tensor in tensors):
            if name == HEAD and name not in before | after:
                continue
            ours, theirs = (shapes.get(name, shapes.get(EMBEDDING)) for shapes in (before, after))
            if ours == theirs and (name in after or name == HEAD):
                continue
            advice = "is the model tuned from this base?"
            if name in (EMBEDDING, HEAD) and name in after:
                advice = (
                    "their vocabularies differ; add the tokens to the base with scripts/extend.py first, and "
                    "extract from that"
                )
            shape = after.get(name)
            got = "is missing" if shape is None else f"has shape {shape}"
            raise ValueError(
                f"{tuned.where}: tensor {name} {got}, and the base in {base.where} has {ours}: {advice}"
            )


def _check_same_settings(base_ref: str, tuned_ref: str, model: Model) -> None:
    """Raise ValueError if the configs of two models differ in a setting that no adapter carries, such as
    rope_theta, or if the tuned model has tensors that the base lacks. model: of the base.
    """
    pretrained.check_preset(base_ref, model.config)
    theirs = pretrained.model_for(tuned_ref)
    pretrained.check_preset(tuned_ref, theirs.config)
    ignored = (*pretrained.NOT_COMPUTED, "tied")  # an untied head is a parameter that changed
    differing = pretrained.config_differences(model.config, theirs.config, ignored)
    if differing:
        raise ValueError(
            f"{tuned_ref}: its settings are not those of the base {base_ref}, and an adapter changes only "
            f"weights: {'; '.join(differing)} (base and tuned); extract from a base with these settings"
        )
    hf_read.check_tensors(pretrained.open_files(tuned_ref), theirs)


def _matrices(
    tensors: Sequence[Tensor], base: ModelFiles, tuned: ModelFiles
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield the values of a parameter's tensors in both models, in float32, [in, out] of a kernel."""
    for tensor in tensors:
        values = []
        for files in (base, tuned):
            tied = tensor.name not in files.tensors  # then the head is the table
            stored = replace(tensor, name=EMBEDDING) if tied else tensor
            values.append(stored.read(files).astype(np.float32))
        yield values[0], values[1]


def _low_rank(matrix: _Matrix, rank: int, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Return a [in, R], b [R, out] with the product nearest to a matrix.

    Above FULL_SVD the SVD is the randomised one of Halko et al. 2011 (arXiv:0909.4061) with power iterations.
    name: for its random directions.
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
    """Return nodes of the changed parameters with the tuned model's values, and the settings with them."""
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
    """Return a line about the parameters without a pair that changed."""
    if not changed:
        return []
    named = ", ".join(f"{path} by {100 * change:.2g} %" for path, change in changed.items())
    end = (
        "are in the adapter in full" if saved else "are not in the adapter; --save-others stores them in full"
    )
    return [f"parameters without a pair changed ({named}) and {end}"]
