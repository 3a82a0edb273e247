"""Model weights in and out of files.

pretrained.py: load a model, its base and its tokenizer from anywhere
tensors.py: the table of a model's tensors: which part of which parameter each of them is; these parts back on
    the host
param_loading.py: parameters, read part by part
storage.py: how each parameter is stored
init.py: adapters and heads, fresh or from folders
"""
