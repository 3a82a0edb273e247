"""Model families, one file each, that build a Model (see model.py).

model.py: the Model type
unsupported.py: `model_type` to the parts that jaxft lacks for it
dense.py: the model around the layers of dense decoder families, and parts of their layers
dense_config.py: config.json of dense decoder families
rope_config.py: settings of rope in config.json
layer_types.py: layer types in config.json
text_part.py: the text decoder of multimodal checkpoints: its config.json and tensor names
heads.py: scalar heads of reward models and critics
teacher.py: a second, frozen model
adapted.py: a model with its adapter attached
flax_module.py: a model as a `flax.linen` module
nnx_module.py: a model as a `flax.nnx` module
model_types.py: `model_type` of a config.json to a family
"""
