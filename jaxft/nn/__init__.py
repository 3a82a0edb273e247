"""Building blocks of models: parameters, matmuls, attention, LoRA and quantised weights.

param.py: ParamSpec and what derives from it
contractions.py: contractions that accumulate in float32; CPUs without bfloat16 matmuls multiply in float32
matmul.py: matmuls over plain, quantised and LoRA weights, with their backward passes
lm_head.py: the head, also of some tokens alone
layers.py: embedding, norm, gated MLP
rope.py: rotary position embeddings of every kind
key_ranges.py: the keys that each query of packed rows attends to, as two ranges
attention.py: the reference implementation of attention, and the choice of a kernel from the mesh
flash_attention.py: blockwise attention by key ranges: in plain XLA, for every backend
pallas_attention.py: the same as Pallas kernels for NVIDIA GPUs
ring_attention.py: attention over `mesh.context` where heads do not divide: an early and a late part of each
    row per device, keys gathered or in a ring
splash_attention.py: Pallas's splash attention for TPUs, twice where responses share their prompt
lora.py: adapter settings, attaching and merging
lora_specs.py: the parameters of an adapter from its settings
lora_patterns.py: patterns that select some of a model's modules
tensor_names.py: names of tensors in files and of modules, from the families' templates
full_modules.py: modules, biases and rows of tokens that an adapter trains in full in place of the base's
dora.py: DoRA: norms of adapted weights, and the learned magnitudes
lora_rows.py: several adapters on one base, also of DoRA, the head and the embeddings: chosen by row, or of
    equal shapes
layer_inputs.py: inputs of linear layers, collected while a layer is traced
quant.py: quantised tensors, and the settings of a quantised base
quant_formats.py: int8, fp8, int4, nf4, fp4 and affine4: pack and unpack
fp8.py: matmuls with frozen FP8 weights: where they run, rounding of activations and cotangents
layer_attention.py: how each layer attends: rope, sliding window, soft cap
scan.py: stacks of layers: the scans over them, remat policies, how layers mix tokens
attention_mixer.py: attention over rows, in prefill, extending rows by given tokens, and decoding
cache.py: the cache of keys and values, with prompts once
cached_attention.py: attention to the cache
fused_update.py: layers that are updated inside the backward pass
"""
