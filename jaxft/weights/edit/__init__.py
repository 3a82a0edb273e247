"""New weights from existing ones or from data: merge, extend, calibrate; adapters that start from the base.

merged_weights.py: a base and an adapter, merged
new_adapters.py: several adapters as one; an adapter from the difference of two models
extended_model.py: a model with new tokens or a chat template; chat templates by name for base models
calibrated_base.py: calibrate a model layer by layer; its codes in the cache
calibrated_rounding.py: round one weight by GPTQ, and codes and scales by coordinate descent; low-rank pairs
lora_start.py: PiSSA, OLoRA, LoftQ and QERA starts of adapters, and the base without these pairs; DoRA
"""
