"""LoRA and its relatives: pairs on kernels, magnitudes, and parameters that are trained in full.

full_modules.py: modules, biases and rows of tokens that an adapter trains in full in place of the base's
lora.py: adapter settings, attaching and merging; norms and factors of DoRA (forward pass: nn/matmul.py)
lora_rows.py: several adapters on one base, also of DoRA, the head and the embeddings: chosen by row, or of
    equal shapes
lora_specs.py: the parameters of an adapter from its settings
"""
