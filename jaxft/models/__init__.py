"""Model families, one file each, that build a Model (see model.py).

model.py: the Model type
dense.py: the model around the layers of dense decoder families, and parts of their layers
dense_config.py: config.json of dense decoder families, rope settings included
adapted.py: a model with its adapter attached, with scalar heads (reward models, critics), or with a teacher
flax_modules.py: a model as a module of `flax.nnx` or `flax.linen`
model_types.py: `model_type` of a config.json to a family, to the text decoder of a multimodal checkpoint, or
    to the parts that jaxft lacks
families/: the layers, configurations and tensor names of each family
"""
