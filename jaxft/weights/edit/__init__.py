"""New weights from others: merge, combine, extract, extend.

combine.py: several adapters as one
extend.py: a model with new tokens or a chat template
extract.py: an adapter from the difference of two models
merge.py: merging an adapter
"""
