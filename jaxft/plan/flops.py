"""Floating point operations of a step: what the model needs, and what the program does, counted in what jax has traced."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import jax

from jaxft import tree
from jaxft.distributed import sharding
from jaxft.train import programs
from jaxft.train.settings import Run


@dataclass(frozen=True)
class Flops:
    """Of one step on all devices. tokens: of the run's largest batch, every row of it as long as the settings allow.

    places: tokens that the program works on, which are more where the batch doesn't fill the rows that the mesh cuts it into.
    model: forward passes times 2 (a frozen base) or 3 (a trained one), and a live reference's forward pass, of the batch's own
    rows; MFU counts these. program: every matrix product that runs, so recomputation and empty rows too; HFU counts these.
    Attention's products are in kernels that skip what isn't seen: its share of both is the model's own count, causal over the
    whole row.
    """

    tokens: int
    places: int
    model: float
    program: float

    @property
    def empty(self) -> float:
        """The share of the places that no row of the batch takes."""
        return 1 - self.tokens / self.places

    @property
    def recomputed(self) -> float:
        """What the program does a second time, and the little beside the model's products; not below 0."""
        return max(0.0, self.program - self.model)


def flops(run: Run, p: programs.Programs, batch: Any, traced: Any) -> Flops:
    """Counts of a train step, traced for the batch [micro, rows, ...], under its mesh."""
    micro, count, length = batch.ids.shape
    places, model = micro * count * length, p.partition.model
    rows = programs.step_rows(run.data, sharding.row_shards(p.mesh))
    filled = rows.filled / rows.slots
    one = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), batch)
    whole = tree.combine(p.state.trainable, p.frozen)
    forward = micro * products(
        jax.make_jaxpr(lambda whole, one: p.objective(whole, one, None, p.state.aux)[0])(whole, one).jaxpr
    )
    plain, attention = (
        model.forward_flops(places, 0),
        model.forward_flops(places, length) - model.forward_flops(places, 0),
    )
    forwards = max(1, round(forward / plain))  # 2 with a live reference
    passes = forwards + (2 if any(jax.tree.leaves(p.partition.mask["base"])) else 1)
    useful = min(plain, forward / forwards) * passes  # less where not every position has a loss
    done = max(useful, products(traced.jaxpr.jaxpr))
    needed, run_ = useful + passes * attention, done + passes * attention * done / useful
    return Flops(round(places * filled), places, needed * filled, run_)


def products(jaxpr: Any) -> float:
    """Operations of the matrix products in a jaxpr on all devices, loops of a known length multiplied, of branches the largest.

    Kernels and loops whose length depends on data are left out: here that is attention.
    """
    total = 0.0
    for eqn in jaxpr.eqns:
        name = eqn.primitive.name
        if name == "dot_general":
            (contracted, _), _ = eqn.params["dimension_numbers"]
            shape = eqn.invars[0].aval.shape
            total += 2.0 * math.prod(eqn.outvars[0].aval.shape) * math.prod(shape[i] for i in contracted)
        elif name == "cond":
            total += max(products(branch.jaxpr) for branch in eqn.params["branches"])
        elif name not in ("while", "pallas_call"):
            times = eqn.params["length"] if name == "scan" else 1
            times *= eqn.params["mesh"].size if name == "shard_map" else 1
            total += times * sum(products(inner) for inner in _inside(eqn.params))
    return total


def _inside(params: dict[str, Any]) -> Iterator[Any]:
    for value in params.values():
        for one in value if isinstance(value, tuple | list) else (value,):
            inner = getattr(one, "jaxpr", one)
            if hasattr(inner, "eqns"):
                yield inner
