"""Qwen2 and Qwen2.5 (Llama's layer with q, k and v biases), and Qwen3 (with q and k norms per head)."""

from dataclasses import dataclass
from typing import Any

from jaxft.models.dense import (
    ATTENTION,
    QKV,
    DecoderSpec,
    Family,
    add_biases,
    llama_specs,
    one_stack,
    prenorm_layer,
)
from jaxft.models.dense_config import (
    FULL,
    SLIDING,
    ConfigFormat,
    WindowConfig,
    fields_from_hf,
    fields_to_hf,
    read_layer_types,
    typed_layers,
    window_from_hf,
)
from jaxft.nn.param_spec import ParamSpec, full
from jaxft.nn.rope import Rope


@dataclass(frozen=True)
class QwenConfig(WindowConfig):
    """Configuration of a Qwen2 or Qwen2.5 model: sizes, rope, sliding window and special tokens."""


@dataclass(frozen=True)
class Qwen3Config(QwenConfig):
    """Sizes of a Qwen3. attention_bias: whether all four projections of attention have biases."""

    attention_bias: bool = False


def _qwen2_decoder(config: QwenConfig) -> DecoderSpec:
    specs = llama_specs(config)
    add_biases(specs, QKV)
    attention = typed_layers(config, config.rope, config.rope)
    return one_stack(specs, prenorm_layer, attention)


def _qwen3_decoder(config: Qwen3Config) -> DecoderSpec:
    specs = llama_specs(config)
    norm = ParamSpec((config.layers, config.head_dim), ("layers", "norm"), full(1.0))
    specs["layers"]["attn"] |= {"q_norm": norm, "k_norm": norm}
    if config.attention_bias:
        add_biases(specs, ATTENTION)
    attention = typed_layers(config, config.rope, config.rope)
    return one_stack(specs, prenorm_layer, attention)


def _read(hf: dict[str, Any], form: ConfigFormat) -> dict[str, Any]:
    fields = fields_from_hf(hf, form)
    if not hf.get("use_sliding_window", False):
        if SLIDING in read_layer_types(hf, (FULL,) * fields["layers"]):
            raise ValueError(
                "config: layer_types has sliding_attention, but use_sliding_window is false"
                "; set it to true, or make every layer full_attention"
            )
        return fields
    window, first = window_from_hf({"sliding_window": 4096, **hf}), hf.get("max_window_layers", 28)
    if type(first) is not int:
        raise ValueError(f"config: max_window_layers must be a whole number, got {first!r:.60}")
    types = read_layer_types(
        hf, [SLIDING if window and i >= first else FULL for i in range(fields["layers"])]
    )
    return fields | ({"window": window, "layer_types": types} if SLIDING in types else {})


def _write(c: QwenConfig, form: ConfigFormat) -> dict[str, Any]:
    types = list(c.types)
    return fields_to_hf(c, form) | {
        "use_sliding_window": SLIDING in types,
        "sliding_window": c.window,
        "max_window_layers": types.index(SLIDING) if SLIDING in types else c.layers,
        "layer_types": types,
    }


_IM_END, _ENDOFTEXT = 151645, 151643


def _qwen25(size: str, **sizes: Any) -> dict[str, QwenConfig]:
    """Return presets of a Qwen2.5 base model and its instruction-tuned version."""
    common: dict[str, Any] = dict(
        vocab=152064, head_dim=128, rope=Rope(1e6), norm_eps=1e-6, max_positions=32768, bos=_ENDOFTEXT
    )
    c = common | sizes
    base = {
        "max_positions": 32768 if size in ("0.5B", "3B") else 131072,
        "norm_eps": 1e-5 if c["width"] >= 5120 else 1e-6,  # 14B and larger
        "eos": (_ENDOFTEXT,),
    }
    return {
        f"Qwen/Qwen2.5-{size}": QwenConfig(**(c | base)),
        f"Qwen/Qwen2.5-{size}-Instruct": QwenConfig(**c, eos=(_IM_END, _ENDOFTEXT)),
    }


def _qwen3(size: str, **sizes: Any) -> dict[str, Qwen3Config]:
    common: dict[str, Any] = dict(
        vocab=151936, head_dim=128, kv_heads=8, rope=Rope(1e6), norm_eps=1e-6, bos=_ENDOFTEXT
    )
    c = common | sizes
    return {
        f"Qwen/Qwen3-{size}": Qwen3Config(**c, max_positions=40960, eos=(_IM_END, _ENDOFTEXT)),
        f"Qwen/Qwen3-{size}-Base": Qwen3Config(**c, max_positions=32768, eos=(_ENDOFTEXT,)),
    }


_SMALL = {"vocab": 151936, "tied": True}
_QWEN2_PRESETS: dict[str, QwenConfig] = {
    **_qwen25("0.5B", width=896, layers=24, heads=14, kv_heads=2, mlp=4864, **_SMALL, head_dim=64),
    **_qwen25("1.5B", width=1536, layers=28, heads=12, kv_heads=2, mlp=8960, **_SMALL),
    **_qwen25("3B", width=2048, layers=36, heads=16, kv_heads=2, mlp=11008, **_SMALL),
    **_qwen25("7B", width=3584, layers=28, heads=28, kv_heads=4, mlp=18944),
    **_qwen25("14B", width=5120, layers=48, heads=40, kv_heads=8, mlp=13824),
    **_qwen25("32B", width=5120, layers=64, heads=40, kv_heads=8, mlp=27648),
    **_qwen25("72B", width=8192, layers=80, heads=64, kv_heads=8, mlp=29568),
}
_QWEN3_PRESETS: dict[str, Qwen3Config] = {
    **_qwen3("0.6B", width=1024, layers=28, heads=16, mlp=3072, tied=True),
    **_qwen3("1.7B", width=2048, layers=28, heads=16, mlp=6144, tied=True),
    **_qwen3("4B", width=2560, layers=36, heads=32, mlp=9728, tied=True),
    **_qwen3("8B", width=4096, layers=36, heads=32, mlp=12288),
    **_qwen3("14B", width=5120, layers=40, heads=40, mlp=17408),
    "Qwen/Qwen3-32B": Qwen3Config(
        vocab=151936, width=5120, layers=64, heads=64, kv_heads=8, head_dim=128, mlp=25600, rope=Rope(1e6),
        norm_eps=1e-6, max_positions=40960, bos=_ENDOFTEXT, eos=(_IM_END, _ENDOFTEXT),
    ),
}  # fmt: skip

_DEFAULTS = {"max_position_embeddings": 32768, "bos_token_id": None, "eos_token_id": None}
_QWEN2 = ConfigFormat("qwen2", "Qwen2ForCausalLM", defaults=_DEFAULTS)
_QWEN3 = ConfigFormat(
    "qwen3", "Qwen3ForCausalLM", defaults={**_DEFAULTS, "head_dim": 128}, more={"attention_bias": False}
)
QWEN2 = Family(QwenConfig, _QWEN2, _qwen2_decoder, _QWEN2_PRESETS, _read, _write)
QWEN3 = Family(Qwen3Config, _QWEN3, _qwen3_decoder, _QWEN3_PRESETS, _read, _write)
qwen3 = QWEN3.build
