"""Building blocks of models: parameters, matmuls, attention, LoRA and quantised weights.

tree.py: pytrees by path: masks over them, and the partition into trainable and frozen parameters
param_spec.py: ParamSpec, which declares a parameter: initial values, shapes, shardings, counts
matmul.py: contractions that accumulate in float32; matmuls over plain, quantised and LoRA weights, also in
    FP8; their backward passes, taps on their inputs
layers.py: embedding, norm, gated MLP, language model head
rope.py: rotary position embeddings of every kind
stack.py: stacks of layers: the scans over them, remat policies (gradient checkpointing), updates
    inside the backward pass
quant.py: quantised tensors, and the settings of a quantised base
quant_formats.py: int8, fp8, int4, nf4, fp4 and affine4: pack and unpack
tensor_names.py: names of tensors in files and of modules, and patterns that select modules
adapters/: LoRA and its relatives
attention/: kernels of attention, caches for decoding
"""
