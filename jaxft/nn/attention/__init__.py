"""Attention: kernels, the keys that a query sees, caches for decoding.

attention.py: the reference implementation of attention, and the choice of a kernel from the mesh
attention_mixer.py: attention over rows, in prefill, extending rows by given tokens, and decoding
kv_cache.py: the cache of keys and values, in which a prompt is stored once, and attention to it
flash_attention.py: the keys that each query of packed rows attends to, as two ranges; blockwise attention to
    these ranges in plain XLA, for every backend; the soft cap of scores
layer_attention.py: settings of each layer's attention: rope, sliding window, soft cap
pallas_attention.py: blockwise attention as Pallas kernels for NVIDIA GPUs
ring_attention.py: attention over `mesh.context` where heads do not divide: an early and a late part of each
    row per device, keys gathered or in a ring
splash_attention.py: Pallas's splash attention for TPUs; two calls where responses share their prompt
"""
