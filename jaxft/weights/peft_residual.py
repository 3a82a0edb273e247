"""PiSSA and OLoRA adapters that PEFT has not converted to plain LoRA.

PEFT trains their pair A, B of a weight W on `W - s B0 A0`, with the first pair A0, B0 of W. save_pretrained
writes A and B alone, and from_pretrained computes A0 and B0 from the base again. jaxft leaves the base as it
is and reads `s (B A - B0 A0)`, one pair of twice the rank, as save_pretrained writes it with
path_initial_model_for_weight_conversion.

PEFT rounds `W - s B0 A0` to the dtype of the base, and its float32 SVD is inexact where the last singular
value of A0 B0 is close to the next one. The pair of twice the rank, from float64, has neither error.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from jaxft.distributed import processes
from jaxft.nn.lora import Adapter
from jaxft.weights import finite
from jaxft.weights.first_pairs import FirstPair, principal_pair, qr_pair
from jaxft.weights.model_files import ModelFiles
from jaxft.weights.peft_pairs import Pair
from jaxft.weights.peft_refusals import CONVERT
from jaxft.weights.tensors import Tensor

FIRST_PAIRS = {"pissa": principal_pair, "olora": qr_pair}


@dataclass(frozen=True)
class AdaptedWeight:
    """A weight of the base that an unconverted adapter changes.

    where: adapter_config.json. init: a key of FIRST_PAIRS. tensor: in the base's files. rank, scale: of the
    adapter's pair.
    """

    where: Path
    init: str
    tensor: Tensor
    rank: int
    scale: float


ReadFirstPair = Callable[[AdaptedWeight], FirstPair]  # (a0 [in, R], b0 [R, out])


def start_of_unconverted(config: Mapping[str, Any]) -> str | None:
    """Return the key of FIRST_PAIRS that an unconverted adapter's configuration has, None for others."""
    start = config.get("init_lora_weights")
    return start if isinstance(start, str) and start in FIRST_PAIRS else None


def first_pair_in(base: ModelFiles | None) -> ReadFirstPair:
    """Return a function that computes first pairs from the files of the base, as PEFT does in float32.

    It raises ValueError without a base, for a weight that the base lacks or stores quantised, and in runs of
    several processes, whose libraries may compute other signs.
    """

    def read(weight: AdaptedWeight) -> FirstPair:
        about, name = f"{weight.where}: init_lora_weights={weight.init!r}", weight.tensor.name
        if base is None or processes.is_multi_process():
            needs = "needs the base's weights" if base is None else "is read by one process only"
            raise ValueError(f"{about} {needs}: {CONVERT}")
        if name in base.quantised:
            method = base.quantised[name].method
            raise ValueError(
                f"{about}: {name} of the base in {base.where} is quantised ({method}); use the base in its "
                "own precision, which quant=nf4 (--quant nf4) quantises after reading"
            )
        if base.shapes.get(name) != weight.tensor.shape:
            raise ValueError(
                f"{about} needs the base's weights, but {base.where} has no tensor {name} of shape "
                f"{weight.tensor.shape}; is the adapter for another base model?"
            )
        with finite.errors_name(f"{base.where}: tensor {name}"):
            values = finite.require_finite(weight.tensor.read(base)).astype(np.float32)
        return FIRST_PAIRS[weight.init](values, weight.rank, weight.scale)

    return read


def no_first_pair(weight: AdaptedWeight) -> FirstPair:
    """Return a pair of zeros in place of the first one, which needs no base: for settings alone."""
    ins, outs = weight.tensor.values
    return np.zeros((ins, weight.rank), np.float32), np.zeros((weight.rank, outs), np.float32)


def on_unchanged_base(
    pairs: Sequence[Pair | None],
    tensors: Sequence[Tensor],
    adapter: tuple[Path, str, Adapter],
    first_pair: ReadFirstPair,
) -> list[Pair | None]:
    """Return the pairs of an unconverted adapter's kernel as `[a, a0] [b; -b0]`, of twice the rank and the
    same scale, in float32; those of the table, which PEFT initialises as LoRA's, as they are.

    adapter: the first fields of AdaptedWeight, and settings, which compute the scale.
    """
    where, init, settings = adapter
    if tensors[0].path == "embed":
        return list(pairs)
    out: list[Pair | None] = []
    for tensor, pair in zip(tensors, pairs, strict=True):
        if pair is None:
            out.append(None)
            continue
        scale = settings.scale_of(pair.rank, pair.alpha)
        a, b = pair.a.astype(np.float32), pair.b.astype(np.float32)
        a0, b0 = first_pair(AdaptedWeight(where, init, tensor, pair.rank, scale))
        alpha = pair.alpha * (2**0.5 if settings.rslora else 2)
        wide = np.concatenate([a, a0], 1), np.concatenate([b, -b0], 0)
        out.append(pair._replace(a=wide[0], b=wide[1], alpha=alpha))
    return out
