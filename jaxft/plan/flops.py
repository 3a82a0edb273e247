"""Floating-point operations of a train step: of the model, and of the traced program."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from jaxft import tree
from jaxft.distributed import sharding
from jaxft.train import programs
from jaxft.train.settings import Run
from jaxft.tree import Batch

FP8 = (jnp.dtype(jnp.float8_e4m3fn), jnp.dtype(jnp.float8_e5m2))


@dataclass(frozen=True)
class Flops:
    """FLOPs and tokens of one train step, summed over all devices.

    tokens: tokens of the run's largest batch, with every row at the maximum length.
    slots: token slots of the program; more than `tokens` if the batch does not fill the sharded rows.
    model: FLOPs that the algorithm needs, which MFU counts: forward passes times 2 (frozen base) or 3
    (trained base), plus the forward pass of a live reference, for filled rows only.
    program: FLOPs of all matmuls that run, including recomputation and empty rows, which HFU counts.
    fp8: those of `program` in FP8.
    Attention kernels skip masked blocks and are not in the jaxpr. Both counts use the model's formula for
    them: causal attention over the full row.
    """

    tokens: int
    slots: int
    model: float
    program: float
    fp8: float = 0.0

    @property
    def empty_fraction(self) -> float:
        """The fraction of the token slots that are empty."""
        return 1 - self.tokens / self.slots


def flops(run: Run, p: programs.Programs, batch: Batch, traced: jax.stages.Traced) -> Flops:
    """Count the FLOPs of a train step traced for the batch [micro, rows, ...], inside its mesh context."""
    micro, count, length = batch.ids.shape
    slots, model = micro * count * length, p.partition.model
    rows = programs.step_rows(run.data, sharding.row_shards(p.mesh))
    filled = rows.filled / rows.slots
    microbatch = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), batch)
    params = tree.combine(p.state.trainable, p.frozen)
    forward = micro * matmul_flops(
        jax.make_jaxpr(lambda params, batch: p.objective(params, batch, None, p.state.aux)[0])(
            params, microbatch
        ).jaxpr
    )
    plain, attention = (
        model.forward_flops(slots, 0),
        model.forward_flops(slots, length) - model.forward_flops(slots, 0),
    )
    second, second_attention = 0.0, 0.0
    if model.teacher is not None:
        second = model.teacher.forward_flops(slots, 0, micro * count * batch.read.shape[-1])
        second_attention = model.teacher.forward_flops(slots, length) - model.teacher.forward_flops(slots, 0)
    forwards = max(1, round((forward - second) / plain))  # 2 with a live reference
    passes = forwards + (2 if any(jax.tree.leaves(p.partition.mask["base"])) else 1)
    useful = min(plain, (forward - second) / forwards) * passes + second  # less without a loss at some
    done = max(useful, matmul_flops(traced.jaxpr.jaxpr))
    all_attention = passes * attention + second_attention
    model_flops = useful + all_attention
    program_flops = done + all_attention * done / useful
    fp8 = matmul_flops(traced.jaxpr.jaxpr, is_fp8)
    return Flops(round(slots * filled), slots, model_flops * filled, program_flops, fp8)


def is_fp8(eqn: Any) -> bool:
    """Whether all operands of an equation are in FP8."""
    return all(jnp.dtype(x.aval.dtype) in FP8 for x in eqn.invars)


def _is_any(eqn: Any) -> bool:
    return True


def matmul_flops(jaxpr: Any, counts: Callable[[Any], bool] = _is_any) -> float:
    """Return the FLOPs of the matmuls in a jaxpr that `counts` selects, by their equation, on all devices.

    Scans count once per iteration, and a conditional as its most expensive branch. Kernels and while loops
    are skipped; in jaxft they contain only attention.
    """
    total = 0.0
    for eqn in jaxpr.eqns:
        name = eqn.primitive.name
        if name == "dot_general" and counts(eqn):
            (contracted, _), _ = eqn.params["dimension_numbers"]
            shape = eqn.invars[0].aval.shape
            total += 2.0 * math.prod(eqn.outvars[0].aval.shape) * math.prod(shape[i] for i in contracted)
        elif name == "cond":
            total += max(matmul_flops(branch.jaxpr, counts) for branch in eqn.params["branches"])
        elif name not in ("while", "pallas_call"):
            times = eqn.params["length"] if name == "scan" else 1
            times *= eqn.params["mesh"].size if name == "shard_map" else 1
            total += times * sum(matmul_flops(inner, counts) for inner in _inner_jaxprs(eqn.params))
    return total


def _inner_jaxprs(params: dict[str, Any]) -> Iterator[Any]:
    for value in params.values():
        for one in value if isinstance(value, tuple | list) else (value,):
            inner = getattr(one, "jaxpr", one)
            if hasattr(inner, "eqns"):
                yield inner
