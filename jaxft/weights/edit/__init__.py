"""New weights made of others.

merged_weights.py: a base and an adapter, merged
combined_adapters.py: several adapters as one
extracted_adapter.py: an adapter from the difference of two models
extended_model.py: a model with new tokens or a chat template
"""
