"""Model families, one file each, that build a Model (see model.py).

model.py: the Model type
dense.py: the model around the layers of dense decoder families, and parts of their layers
dense_config.py: config.json of dense decoder families, rope settings included
text_part.py: the text decoder of multimodal checkpoints: its config.json and tensor names
heads.py: scalar heads of reward models and critics
adapted.py: a model with its adapter attached, or with a teacher
flax_modules.py: a model as a module of `flax.nnx` or `flax.linen`
model_types.py: `model_type` of a config.json to a family, or to the parts that jaxft lacks for it
"""
