"""Model weights in and out of files.

pretrained.py: load a model, its base and its tokenizer from anywhere
tensors.py: tensors in a model's files, and the table of them by parameter; checks for NaN and infinity
param_loading.py: parameters, read part by part and loaded onto a mesh
storage.py: dtype, quantisation and shardings of each parameter in memory
initial_params.py: adapters and heads, fresh or from folders
hf/: Hugging Face's folders, written and read
peft/: adapters in PEFT's format
gguf/: llama.cpp's files
quantised/: checkpoints of GPTQ, AWQ, FP8 and other quantised formats
edit/: models merged, combined, or extended by tokens
"""
