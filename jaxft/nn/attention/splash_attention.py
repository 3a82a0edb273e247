"""Pallas's splash attention for TPUs by key ranges: packed rows, and responses that share their prompt.

Splash masks by one segment id per token. If responses share a prompt, a first call attends to the keys of
each response, and a second call, in which queries have the segment id of their prompt, to the keys of the
prompts. The outputs are merged by their log-sum-exps. The backward kernels of both calls take the merged
output and log-sum-exp; their gradients add up to the gradient of the merged output.

Splash does not scale scores, so queries must be scaled. The layers of a model scale them as part of rope,
before queries are rounded (`splash_of_scaled`); `splash` scales queries that are rounded already.
"""

import inspect
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from jaxft.nn.attention.flash_attention import KeyRanges, pad_queries, pad_time

# The parameters of splash attention's backward pass, a private function of jax.
BACKWARD = (
    "save_residuals", "mask_value", "is_mqa", "block_sizes", "residual_checkpoint_name", "mask_function",
    "attn_logits_soft_cap", "interpret", "res", "do",
)  # fmt: skip


@dataclass(frozen=True)
class _Settings:
    """The static arguments of the compiled kernels. heads: query heads. length: tokens of a row. interpret:
    run the kernels as JAX operations, on any device.
    """

    heads: int
    length: int
    softcap: float | None
    interpret: bool


def has_shared_prompts() -> bool:
    """Whether this version of jax has the backward kernels that shared prompts need."""
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as module

    backward = vars(module).get("_splash_attention_bwd")
    return backward is not None and tuple(inspect.signature(backward).parameters) == BACKWARD


def splash(
    q_BTHE: Float[Array, "B T H E"],
    k_BTKE: Float[Array, "B T K E"],
    v_BTKE: Float[Array, "B T K E"],
    ranges: KeyRanges,
    softcap: float | None = None,
    interpret: bool = False,
) -> Float[Array, "B T H E"]:
    """Splash attention with scores divided by sqrt(E), as in attention.dense; see splash_of_scaled.

    If E is not a power of 4, the scaled queries are rounded once more than in attention.dense; in bfloat16,
    the root mean square errors of gradients are then 2.0 to 2.3 times as large. interpret: run the kernel as
    JAX operations, on any device.
    """
    return splash_of_scaled(scaled(q_BTHE), k_BTKE, v_BTKE, ranges, softcap, interpret)


def splash_of_scaled(
    q_BTHE: Float[Array, "B T H E"],
    k_BTKE: Float[Array, "B T K E"],
    v_BTKE: Float[Array, "B T K E"],
    ranges: KeyRanges,
    softcap: float | None = None,
    interpret: bool = False,
) -> Float[Array, "B T H E"]:
    """Splash attention of queries that are already scaled: softmax(q k^T) v over visible keys.

    softcap: as in attention.dense. interpret: as in splash. Raises ValueError for sliding windows: splash
    needs a window of static size, and in a scan over layers it is a traced value.
    """
    if ranges.windowed:
        raise ValueError("splash attention does not support sliding windows: use attention=flash")
    T, H = q_BTHE.shape[1:3]
    ranges = pad_queries(ranges, -T % 128)
    q, k, v = (pad_time(x, -T % 128).swapaxes(1, 2) for x in (q_BTHE, k_BTKE, v_BTKE))
    settings = _Settings(H, q.shape[2], softcap, interpret)
    hidden = ranges.own_start, ranges.own_start  # padding sees padding
    if ranges.prompt_start is None:
        o = jax.vmap(_kernel(settings, False))(q, k, v, _segment_ids(hidden))
    else:
        prompt_token = (ranges.own_end > 0) & (ranges.prompt_end == 0)
        prompts = ranges.prompt_start, jnp.where(prompt_token, ranges.own_start, -1)
        o = _merged((q, k, v), (hidden, prompts), settings)
    return o.swapaxes(1, 2)[:, :T]


def scaled(q_BTHE: Float[Array, "B T H E"]) -> Float[Array, "B T H E"]:
    """Return q / sqrt(E), computed in float32 and rounded to q's dtype once.

    Computed in bfloat16, the factor 1 / sqrt(E) would be rounded too. If E is a power of 4, nothing is
    rounded.
    """
    return (q_BTHE.astype(jnp.float32) * q_BTHE.shape[3] ** -0.5).astype(q_BTHE.dtype)


def _segment_ids(ids: tuple[jax.Array, jax.Array]) -> Any:
    from jax.experimental.pallas.ops.tpu import splash_attention as kernels

    return kernels.SegmentIds(*ids)


def _kernel(settings: _Settings, save_residuals: bool) -> Any:
    from jax.experimental.pallas.ops.tpu import splash_attention as kernels

    T = settings.length
    size = next(n for n in (512, 384, 256, 128) if T % n == 0)
    names = ("q", "kv", "kv_compute", "q_dkv", "kv_dkv", "kv_dkv_compute", "q_dq", "kv_dq")
    sizes: dict[str, Any] = {f"block_{name}": size for name in names}
    return kernels.make_splash_mha_single_device(
        kernels.MultiHeadMask([kernels.CausalMask((T, T))] * settings.heads),
        block_sizes=kernels.BlockSizes(**sizes),
        save_residuals=save_residuals,
        residual_checkpoint_name=None if save_residuals else "attn_out",
        attn_logits_soft_cap=settings.softcap,
        interpret=settings.interpret,
    )


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def _merged(qkv, ids, settings):
    return _merged_forward(qkv, ids, settings)[0]


def _merged_forward(qkv, ids, settings):
    kernel = jax.vmap(_kernel(settings, True))
    (o_own, (lse_own,)), (o_prompt, (lse_prompt,)) = (kernel(*qkv, _segment_ids(item)) for item in ids)
    # without a prompt, lse_prompt is splash's mask value, and o_prompt any finite number
    lse = jnp.logaddexp(lse_own, lse_prompt)
    parts = ((o_own, lse_own), (o_prompt, lse_prompt))
    o = sum(x.astype(jnp.float32) * jnp.exp(part - lse)[..., None] for x, part in parts)
    o, lse = checkpoint_name(o.astype(o_own.dtype), "attn_out"), checkpoint_name(lse, "attn_lse")
    return o, (qkv, ids, o, lse)


def _merged_backward(settings, saved, do):
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as module

    qkv, ids, o, lse = saved
    kernel = _kernel(settings, True)
    infos, known = (kernel.dq_mask_info, kernel.dkv_mask_info), kernel.kwargs

    def backward(*arrays):
        q, k, v, segment_ids, o, lse, do = arrays
        given = {
            **{name: known[name] for name in BACKWARD if name in known},
            "res": (q, k, v, segment_ids, None, o, lse, *infos),
            "do": do,
        }
        return module._splash_attention_bwd(**given)[3:6]

    of_calls = [jax.vmap(backward)(*qkv, _segment_ids(item), o, lse, do) for item in ids]
    return tuple(x + y for x, y in zip(*of_calls, strict=True)), None


_merged.defvjp(_merged_forward, _merged_backward)
