"""Building blocks of models: parameters, matmuls, attention, LoRA and quantised weights.

param.py: ParamSpec and what derives from it
contractions.py: contractions that accumulate in float32; CPUs without bfloat16 matmuls multiply in float32
matmul.py: matmuls over plain, quantised and LoRA weights, with their backward passes
lm_head.py: the head, also of some tokens alone
layers.py: embedding, norm, gated MLP
rope.py: rotary position embeddings of every kind
tensor_names.py: names of tensors in files and of modules, from the families' templates
layer_inputs.py: inputs of linear layers, collected while a layer is traced
fused_update.py: layers that are updated inside the backward pass
stack.py: stacks of layers: the scans over them, remat policies, how layers mix tokens
"""
