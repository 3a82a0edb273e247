"""PiSSA and OLoRA adapters that PEFT has not converted to plain LoRA.

PEFT trains their pair A, B of a weight W on `W - s B0 A0`, with the first pair A0, B0 of W. save_pretrained
writes A and B alone, and from_pretrained computes A0 and B0 from the base again. jaxft leaves the base as it
is and reads `s (B A - B0 A0)`, one pair of twice the rank, as save_pretrained writes it with
path_initial_model_for_weight_conversion.

PEFT rounds `W - s B0 A0` to the dtype of the base, and its float32 SVD is inexact where the last singular
value of A0 B0 is close to the next one. The pair of twice the rank, from float64, has neither error.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxft.distributed import processes
from jaxft.nn.adapters.lora import Adapter
from jaxft.weights.calibrate.calibrated_rounding import FIRST_PAIRS, FirstPair
from jaxft.weights.peft.peft_pairs import Pair
from jaxft.weights.peft.peft_refusals import CONVERT
from jaxft.weights.tensors import ModelFiles, Tensor, errors_name, require_finite

ReadFirstPair = Callable[..., FirstPair]  # (where, init, tensor, rank, scale) -> a0 [in, R], b0 [R, out]


def start_of_unconverted(config: Mapping[str, Any]) -> str | None:
    """Return the key of FIRST_PAIRS that an unconverted adapter's configuration has, None for others."""
    start = config.get("init_lora_weights")
    return start if isinstance(start, str) and start in FIRST_PAIRS else None


def first_pair(
    base: ModelFiles | None, where: Path, init: str, tensor: Tensor, rank: int, scale: float
) -> FirstPair:
    """Return the first pair of a weight that an unconverted adapter changes, computed from the files of the
    base as PEFT does in float32.

    where: adapter_config.json. init: a key of FIRST_PAIRS. rank, scale: of the adapter's pair. Raises
    ValueError without a base, for a weight that the base lacks or stores quantised, and in runs of several
    processes, whose libraries may compute other signs.
    """
    about, name = f"{where}: init_lora_weights={init!r}", tensor.name
    if base is None or processes.is_multi_process():
        needs = "needs the base's weights" if base is None else "is read by one process only"
        raise ValueError(f"{about} {needs}: {CONVERT}")
    stored = base.tensors.get(name)
    if stored is not None and stored.quantised is not None:
        raise ValueError(
            f"{about}: {name} of the base in {base.where} is quantised ({stored.quantised.method}); use the "
            "base in its own precision, which quant=nf4 (--quant nf4) quantises after reading"
        )
    if stored is None or stored.shape != tensor.shape:
        raise ValueError(
            f"{about} needs the base's weights, but {base.where} has no tensor {name} of shape "
            f"{tensor.shape}; is the adapter for another base model?"
        )
    with errors_name(f"{base.where}: tensor {name}"):
        values = tensor.turned(require_finite(base.read(name)).astype(np.float32))
    return FIRST_PAIRS[init](values, rank, scale)


def no_first_pair(where: Path, init: str, tensor: Tensor, rank: int, scale: float) -> FirstPair:
    """Return a pair of zeros in place of the first one, which needs no base: for settings alone."""
    ins, outs = tensor.values
    return np.zeros((ins, rank), np.float32), np.zeros((rank, outs), np.float32)


def on_unchanged_base(
    pairs: Sequence[Pair | None],
    tensors: Sequence[Tensor],
    settings: Adapter,
    read_first: Callable[[Tensor, int, float], FirstPair],
) -> list[Pair | None]:
    """Return the pairs of an unconverted adapter's kernel as `[a, a0] [b; -b0]`, of twice the rank and the
    same scale, in float32; those of the table, which PEFT initialises as LoRA's, as they are.

    settings: of the adapter, which compute the scale.
    """
    out = list(pairs)
    for i, (tensor, pair) in enumerate(zip(tensors, pairs, strict=True)):
        if pair is not None and tensor.path != "embed":
            scale = settings.scale_of(pair.rank, pair.alpha)
            a0, b0 = read_first(tensor, pair.rank, scale)
            a = np.concatenate([pair.a.astype(np.float32), a0], 1)
            b = np.concatenate([pair.b.astype(np.float32), -b0], 0)
            out[i] = pair._replace(a=a, b=b, alpha=pair.alpha * (2**0.5 if settings.rslora else 2))
    return out
