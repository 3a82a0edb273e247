"""Model families over dense.py: each file has a family's arithmetic, configuration and names of tensors.

exaone.py: EXAONE 4
gemma.py: Gemma 1, Gemma 2, Gemma 3, VaultGemma
granite.py: Granite 3
llama.py: Llama 1 to 3.3, SmolLM2, and its layer under other names: Seed-OSS, CWM, InternLM 3, IQuest-Coder
mistral.py: Mistral, Ministral
olmo.py: OLMo 2, OLMo 3
phi3.py: Phi-3 to Phi-4-mini with fused projections
qwen.py: Qwen2, Qwen2.5, Qwen3
smollm3.py: SmolLM3
"""
