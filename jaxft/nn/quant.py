"""Quantised weights. A QTensor is a pytree node that scan, vmap and sharding may slice."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxft.annotations import PositiveInt, QuantKind, check_bounds
from jaxft.distributed import sharding
from jaxft.distributed.threads import map_in_threads
from jaxft.nn import quant_formats as qf
from jaxft.nn import tree
from jaxft.nn.quant_formats import FORMATS
from jaxft.nn.tree import static, struct

KINDS = tuple(FORMATS)
CHECKPOINT = "checkpoint"
QERA = "qera"
# Initialisations of an adapter (nn.adapters.lora.Adapter) that change the base at step 0, so that base and
# adapter together have its original weights, or approximate them (quantised).
RESIDUAL_INITS = ("pissa", "olora", "loftq", QERA)
HOST_CHUNK = 1 << 18  # elements that a thread quantises at a time


@dataclass(frozen=True)
class Quant:
    """Quantisation of the frozen base weights, as in QLoRA (Dettmers et al. 2023, arXiv:2305.14314).

    kind: int8 or fp8 (E4M3; both with a scale per output channel), int4, nf4, fp4 or affine4 (a scale, and
    for affine4 an offset, per `block` inputs), or checkpoint: as the files store it (bitsandbytes, GPTQ, AWQ,
    GGUF or scripts/quantize.py), without rounding again. block: the number of consecutive inputs that share a
    scale; none for the kind's usual one. double: quantise the scales of nf4 and fp4 to 8 bits too; none for
    the kind's usual value. targets: "all-linear" (every linear layer of the blocks) or a regular expression
    over parameter paths, which may match embed and head too; norms are never quantised. fp8_matmul: how fp8
    weights are multiplied (see nn.matmul). none: in FP8 on devices with FP8 matmuls; true: in FP8, emulated
    on other devices; false: dequantised first, on all devices.

    calibrate: round the layers' weights so that their outputs change least on some rows (see
    calibrated_base.py): "run" for the run's own training rows, or a file, a folder or a hub dataset.
    calibrate_tokens: how many tokens of these rows are used. codes: the file name of the calibrated weights
    in jaxft's cache; a run sets it, users do not.
    """

    kind: str = "nf4"
    block: PositiveInt | None = None
    double: bool | None = None
    targets: str = "all-linear"
    fp8_matmul: bool | None = None
    calibrate: str | None = None
    calibrate_tokens: PositiveInt = 16384
    codes: str | None = None

    def __post_init__(self) -> None:
        check_bounds(self, "quant")
        with_defaults(self.kind, self.block, self.double)
        if self.calibrate is not None and self.kind == CHECKPOINT:
            raise ValueError(
                f"quant.calibrate={self.calibrate} rounds weights, and quant=checkpoint stores them as the "
                "files do; set quant.calibrate=none, or another quant"
            )
        if self.codes is not None and self.calibrate is None:
            raise ValueError(
                f"quant.codes={self.codes} is set only by runs with quant.calibrate; leave it out"
            )
        if self.fp8_matmul is not None and self.kind not in ("fp8", CHECKPOINT):
            raise ValueError(
                f"quant.fp8_matmul={self.fp8_matmul} needs quant=fp8 or quant=checkpoint, got "
                f"quant={self.kind}; leave it out"
            )

    @classmethod
    def parse(cls, kind: QuantKind) -> "Quant | None":
        """Return the Quant of a kind, with the kind's usual block and double; None for "none"."""
        return None if kind == "none" else cls(kind)


def quant_setting(kind: QuantKind | None, record: dict[str, Any] | None) -> Quant | None:
    """Return the Quant of `kind`; with kind=None, the Quant in `record`, the dict of a run's config.json.

    With kind=None, return None if the record has no quantisation, or if its adapter.init is one of
    RESIDUAL_INITS: that run quantised a changed base, and its exported adapter is for the unquantised base.
    Raises ValueError for unknown settings in the record.
    """
    if kind is not None:
        return Quant.parse(kind)
    settings = (record or {}).get("quant")
    if ((record or {}).get("adapter") or {}).get("init") in RESIDUAL_INITS:
        return None
    if not settings:
        return None
    try:
        return Quant(**settings)
    except TypeError as e:
        raise ValueError(f"the run's config.json has unknown settings of quant ({e}); set --quant") from e


def with_defaults(kind: str, block: int | None, double: bool | None) -> tuple[int | None, bool]:
    """Return (block, double), with None replaced by the kind's usual value.

    Raises ValueError for an unknown kind, a block that is odd or below 2, and a block or double that the kind
    does not allow.
    """
    if kind == CHECKPOINT:
        if block is not None or double is not None:
            raise ValueError(
                "quant=checkpoint takes blocks and scales from the files; omit quant.block and quant.double"
            )
        return None, False
    if kind not in FORMATS:
        kinds = ", ".join((*KINDS, CHECKPOINT))
        raise ValueError(f"quant={kind}: this quantisation is not implemented; use one of {kinds}")
    format = FORMATS[kind]
    if format.block is None and block is not None:
        raise ValueError(f"quant.block={block}: {kind} has one scale per channel; set quant.block=none")
    if block is not None and (block < 2 or block % 2):
        raise ValueError(
            f"quant.block={block} must be even and at least 2, because two {kind} codes share a byte"
        )
    if double and format.double is None:
        raise ValueError(
            f"quant.double=true: the scales of {kind} cannot be quantised; use quant.double=false, or "
            "quant=nf4 or fp4"
        )
    return (format.block if block is None else block), bool(format.double if double is None else double)


@struct
class QTensor:
    """A frozen weight [..., I, O] that is dequantised where it is used.

    kind: "bits", or a name in quant_formats.FORMATS. "bits" is a 16-bit float stored as raw uint16, which
    costs nothing to convert; XLA's CPU compiler would convert a bfloat16 weight of all layers to float32 at
    once (measured: 3.8 GB for SmolLM2-135M). In the other kinds the I inputs form N blocks of `block` (the
    last may be shorter; None: one block), and the weight is `decode(code) * scale + offset`, computed in
    float32 and rounded to `dtype`.

    codes: uint16 for "bits"; int8 or, for fp8, uint8 (the bits of E4M3 numbers), [..., I, O]; for 4-bit kinds
    uint8 [..., I/2, O], two codes per byte, the first in the high bits.
    scale: [..., N, O], float, or uint8 if the scales are quantised. outer [..., S], mean [...]: what
    quant_formats.encode_scales returns with quantised scales. offset: [..., N, O], for affine4. index: int32
    [..., I], the block of each input, where a block's inputs are not consecutive (GPTQ's act-order).
    fp8_matmul: see Quant.
    """

    codes: Any
    kind: str = static()
    dtype: Any = static()
    block: int | None = static(default=None)
    scale: Any = None
    offset: Any = None
    outer: Any = None
    mean: Any = None
    index: Any = None
    fp8_matmul: bool | None = static(default=None)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the dequantised weight, derived from the codes so that it holds for slices too."""
        *lead, take_rows, outs = self.codes.shape
        return (*lead, take_rows * (2 if is_paired(self.kind) else 1), outs)


LIKE_WEIGHT = ("codes", "scale", "offset")  # arrays with the axes of the weight


def shardings_of(q: QTensor, whole: Any) -> QTensor:
    """Return q with a NamedSharding in place of each array, for a weight with the NamedSharding `whole`."""

    def place(name: str, x: Any) -> Any:
        if name not in LIKE_WEIGHT:
            return sharding.replicated(whole.mesh)
        *lead, ins, outs = x.shape
        any_block = q.index is not None and name != "codes"  # any input may be of any block
        return sharding.sharding_for_shape(whole, (*lead, 1 if any_block else ins, outs))

    return tree.map_with_path(place, q)


def is_paired(kind: str) -> bool:
    """Return whether a kind has 4-bit codes, of which two share a byte."""
    return kind in FORMATS and FORMATS[kind].bits == 4


def is_qtensor(x: Any) -> bool:
    """Whether a node is a QTensor: the `is_leaf` of tree functions over weights."""
    return isinstance(x, QTensor)


def bits_per_param(q: Any) -> float:
    """Return how many bits a weight (an array or a QTensor) stores per parameter, scales included."""
    count = np.prod(q.shape, dtype=np.int64)
    return 8 * sum(x.size * np.dtype(x.dtype).itemsize for x in jax.tree.leaves(q)) / max(1, int(count))


def quantize(
    weight: Any, kind: str, block: int | None = None, double: bool | None = None, scale: Any = None
) -> QTensor:
    """Quantise a weight [..., I, O]. A NumPy weight gives a QTensor of NumPy arrays, with the same bits as a
    jax array.

    kind: see QTensor. block, double: see Quant. scale: the scales to use; None computes them. If `weight` is
    a part of a larger weight, pass the result of `scales` for the larger one.
    Raises ValueError for an unknown kind or a dtype that it cannot store, for a weight without the two axes,
    for an odd I with 4-bit codes, and (outside jit) for NaN, infinities and magnitudes of 2^80 and above.

    >>> q = quantize(np.linspace(-1, 1, 128, dtype=np.float32).reshape(64, 2), "nf4")
    >>> q.codes.shape, q.codes.dtype, q.scale.shape
    ((32, 2), dtype('uint8'), (1, 2))
    >>> float(np.abs(np.asarray(dequantize(q)) - np.linspace(-1, 1, 128).reshape(64, 2)).max()) < 0.16
    True
    """
    if kind == "bits":
        if not jnp.issubdtype(weight.dtype, jnp.floating) or jnp.dtype(weight.dtype).itemsize != 2:
            raise ValueError(f"kind 'bits' stores 16-bit floats, got {weight.dtype}; cast the weight first")
        return QTensor(weight.view(np.uint16), "bits", jnp.dtype(weight.dtype))
    block, double = with_defaults(kind, block, double)
    if weight.ndim < 2 or not weight.size:
        raise ValueError(
            f"a weight of shape {weight.shape} cannot be quantised; pass one of shape [..., inputs, outputs]"
        )
    *lead, ins, outs = weight.shape
    if not jnp.issubdtype(weight.dtype, jnp.floating):
        raise ValueError(f"{kind} stores floats, got {weight.dtype}; cast the weight first")
    if is_paired(kind) and ins % 2:
        raise ValueError(
            f"two codes of {kind} share a byte along the input axis, whose size {ins} is odd; use int8"
        )
    qf.check_range(weight)
    packed, scale, offset = _encoded(weight, kind, block or ins, scale)
    scale, outer, mean = qf.encode_scales(scale) if double else (scale, None, None)
    return QTensor(packed, kind, jnp.dtype(weight.dtype), block, scale, offset, outer, mean)


def scales(weight: np.ndarray, kind: str, block: int | None = None) -> Float[np.ndarray, "*L N O"]:
    """Return the scales that `quantize` gives a weight [..., I, O], as floats."""
    qf.check_range(weight)
    block, step = with_defaults(kind, block, None)[0] or weight.shape[-2], _columns(weight)
    parts = (weight[..., at : at + step] for at in range(0, weight.shape[-1], step))

    def scale(part: np.ndarray) -> Any:
        return FORMATS[kind].scale(qf.to_blocks(qf.as_zero_or_normal(part), block))[0]

    return np.concatenate(map_in_threads(scale, parts), -1)[..., 0, :].astype(FORMATS[kind].scale_dtype)


def _columns(weight: Any) -> int:
    """Return how many output channels a host thread quantises at a time, so that they fit in its cache."""
    return max(1, HOST_CHUNK // math.prod(weight.shape[:-1]))


def _encoded(weight: Any, kind: str, block: int, scale: Any) -> tuple[Any, Any, Any]:
    """Return (packed codes, scales, offsets or None) of a weight. scale: its scales; None computes them."""
    *lead, ins, outs = weight.shape
    step = _columns(weight)
    if isinstance(weight, np.ndarray) and step < outs:
        cuts = [np.s_[..., at : at + step] for at in range(0, outs, step)]

        def encoded(cut: Any) -> Any:
            return _encoded(weight[cut], kind, block, None if scale is None else scale[cut])

        parts = map_in_threads(encoded, cuts)
        return jax.tree.map(lambda *some: np.concatenate(some, -1), *parts)
    format, blocks = FORMATS[kind], qf.to_blocks(qf.as_zero_or_normal(weight), block)
    scale, offset = format.scale(blocks) if scale is None else (scale[..., None, :].astype(np.float32), None)
    codes = format.nearest(blocks, scale, offset).reshape(*lead, -1, outs)[..., :ins, :]
    packed = qf.pack(codes) if is_paired(kind) else codes
    return packed, _stored_scale(scale, format), _stored_scale(offset, format)


def _stored_scale(x: Any, format: qf.Format) -> Any:
    return None if x is None else x[..., 0, :].astype(format.scale_dtype)


def dequantize(q: QTensor) -> Float[Array, "*L I O"]:
    """Return the weight as a plain array of dtype `q.dtype`."""
    if q.kind == "bits":
        return jax.lax.bitcast_convert_type(q.codes, q.dtype)
    return _decoded(q, qf.unpack(q.codes) if is_paired(q.kind) else q.codes, partial(_per_input, q))


def _per_input(q: QTensor, x: Array) -> Array:
    """Repeat the entries of x, one per block, for each input of the block: [..., N, O] to [..., I, O]."""
    if q.index is not None:
        return jnp.take_along_axis(x, q.index[..., None], axis=-2)
    (*lead, blocks, outs), ins = x.shape, q.shape[-2]
    block = q.block or ins
    wide = jnp.broadcast_to(x[..., None, :], (*lead, blocks, block, outs))
    return wide.reshape(*lead, blocks * block, outs)[..., :ins, :]


def grid(q: QTensor) -> tuple[Float[Array, "*L I O"], Float[Array, "*L I O"] | None]:
    """Return the scale and the offset (None without offsets) of every element of the weight, in float32."""
    scale = q.scale if q.outer is None else qf.decode_scales(q.scale, q.outer, q.mean)
    offset = None if q.offset is None else _per_input(q, q.offset.astype(jnp.float32))
    return _per_input(q, scale.astype(jnp.float32)), offset


def take_rows(q: QTensor, ids: Int[Array, "*N"]) -> Float[Array, "*N O"]:
    """Return `dequantize(q)[ids]` of a table [I, O]; only these rows are dequantised."""
    if q.kind == "bits":
        return jax.lax.bitcast_convert_type(jnp.take(q.codes, ids, axis=0), q.dtype)
    codes = jnp.take(q.codes, ids // 2 if is_paired(q.kind) else ids, axis=0)
    if is_paired(q.kind):
        codes = jnp.where((ids % 2 == 0)[..., None], codes >> jnp.uint8(4), codes & jnp.uint8(15))
    block = ids // (q.block or q.shape[-2]) if q.index is None else jnp.take(q.index, ids)
    return _decoded(q, codes, lambda x: jnp.take(x, block, axis=0))


def _decoded(q: QTensor, codes: Array, per_input: Callable[[Array], Array]) -> Array:
    """Return the dequantised weight of unpacked codes. per_input: repeats block entries to their shape."""
    scale = q.scale if q.outer is None else qf.decode_scales(q.scale, q.outer, q.mean)
    value = FORMATS[q.kind].decode(codes) * per_input(scale.astype(jnp.float32))
    if q.offset is not None:
        value = value + per_input(q.offset.astype(jnp.float32))
    return value.astype(q.dtype)
