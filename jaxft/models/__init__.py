"""Model families, one file each, that build a Model (see model.py).

model.py: the Model type
families.py: `model_type` of a config.json to a family
unsupported.py: `model_type` to the parts that jaxft lacks for it
dense.py: the model around the layers of dense decoder families, and parts of their layers
dense_config.py: config.json of dense decoder families
rope_config.py: settings of rope in config.json
layer_types.py: layer types in config.json
llama.py: Llama 1 to 3.3 and SmolLM2, their config.json and presets
mistral.py: Mistral, Ministral
qwen.py: Qwen2, Qwen2.5, Qwen3
olmo.py: OLMo 2, OLMo 3
granite.py: Granite 3
exaone.py: EXAONE 4
llama_relatives.py: Llama's layer under other names: Seed-OSS, CWM, InternLM 3, IQuest-Coder
gemma.py: Gemma 1, Gemma 2, VaultGemma, their config.json and presets
gemma3.py: Gemma 3
text_part.py: the text decoder of multimodal checkpoints: its config.json and tensor names
phi3.py: Phi-3 to Phi-4-mini with fused projections
smollm3.py: SmolLM3
heads.py: scalar heads of reward models and critics
teacher.py: a second, frozen model
adapted.py: a model with its adapter attached
flax_module.py: a model as a `flax.linen` module
nnx_module.py: a model as a `flax.nnx` module
"""
