"""The parts of an adapter in PEFT's layout that vLLM, llama.cpp and MLX do not load, and what works instead.

Sources, as of September 2026:
- vLLM: vllm/lora/peft_helper.py (`_validate_features`, `validate_legal`), which raises for DoRA, biases and
  modules_to_save other than a classifier's head, and for ranks above --max-lora-rank, 16 by default. Versions
  that do not read rank_pattern and alpha_pattern there scale all modules by lora_alpha / r, without an error;
  those without --max-lora-trainable-tokens raise for rows of tokens.
- llama.cpp: convert_lora_to_gguf.py, `get_tensors` ("Not a lora_A or lora_B tensor") and `modify_tensors`
  (a tied head, issue 9065); it writes one lora_alpha and ignores use_rslora and alpha_pattern. The file that
  `jaxft export --gguf F16 --adapter-only` writes has the right scales.
- MLX: mlx_lm/tuner/utils.py, `load_adapters`, which reads adapters.safetensors in a format of its own
  (issue 1119).
"""

import shlex
from pathlib import Path

from jaxft.data.rows.shipped import script_command
from jaxft.nn.adapters.lora import Adapter
from jaxft.nn.tensor_names import SCORE_MODULES
from jaxft.weights.hub import hub

VLLM_RANK = 16  # the default of its --max-lora-rank


def loading_notes(settings: Adapter, tied: bool, folder: Path, ref: str) -> list[str]:
    """Return a line for each program that does not load an adapter as it is, with what works.

    tied: whether the base's head is tied to its embeddings. folder: of the adapter, for the command. ref: of
    the base.
    """
    export = _export(folder)
    merge = f"{export} --out merged"
    replaced = {
        "DoRA": settings.dora,
        "modules_to_save": bool(set(settings.modules_to_save) - set(SCORE_MODULES)),
        "biases": settings.bias != "none",
    }
    rows = {"trainable tokens": bool(settings.trainable_token_indices)}
    patterns = {
        "rank_pattern": bool(settings.rank_pattern),
        "alpha_pattern": bool(settings.alpha_pattern),
    }
    lines = []
    if hub.is_extended(ref) and hub.has_linked_weights(ref):
        lines.append(
            f"the adapter's base is in this machine's cache ({ref}); elsewhere use the merged model "
            f"({merge}), or name the model that it was made of as the base, whose weights are the same"
        )
    elif hub.is_extended(ref):
        lines.append(
            f"the adapter is for a base with new tokens that is only in this machine's cache ({ref}); "
            f"elsewhere use the merged model ({merge}), or copy that folder and name it as the base"
        )
    if refused := _named(replaced):
        lines.append(f"vLLM does not load {refused} of an adapter; serve the merged model: {merge}")
    elif named := _named(rows | patterns):
        lines.append(
            f"vLLM loads {named} in its latest versions only, and earlier ones may scale modules wrongly "
            f"without an error; with these serve the merged model ({merge}), or train one rank and alpha"
        )
    if not refused and settings.highest_rank > VLLM_RANK:
        lines.append(f"vLLM needs --max-lora-rank {settings.highest_rank} or more for this adapter")
    targets = [settings.targets] if isinstance(settings.targets, str) else settings.targets
    head = {"a pair of a tied head": tied and any("head" in one for one in targets)}
    scales = {"rsLoRA's scale": settings.rslora, "alpha_pattern": patterns["alpha_pattern"]}
    if refused := _named(replaced | rows | head):
        lines.append(f"llama.cpp does not load {refused} of an adapter; merge it: {merge}")
    elif ignored := _named(scales):
        lines.append(
            f"llama.cpp's convert_lora_to_gguf.py ignores {ignored}; write the adapter's file with "
            f"{export} --gguf F16 --adapter-only --out adapter.gguf"
        )
    return lines


def mlx_note(folder: Path) -> str:
    """Return the line about mlx-lm, which loads no adapter as it is."""
    return f"mlx-lm loads no adapters in PEFT's layout; use the merged model: {_export(folder)} --out merged"


def _export(folder: Path) -> str:
    return f"{script_command('export')} --adapter {shlex.quote(str(folder))}"


def _named(features: dict[str, bool]) -> str:
    return " and ".join(name for name, applies in features.items() if applies)
