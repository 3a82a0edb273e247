"""Model families over dense.py: each file has a family's arithmetic, configuration and names of tensors.

gemma.py: Gemma 1, Gemma 2, Gemma 3, VaultGemma; the soft cap of final logits
llama.py: Llama 1 to 3.3, SmolLM2, and families with its layer: Mistral, Ministral, Seed-OSS, CWM, InternLM 3,
    IQuest-Coder, SmolLM3, Granite 3
olmo.py: OLMo 2, OLMo 3, EXAONE 4: norms after sublayers
phi3.py: Phi-3 to Phi-4-mini with fused projections
qwen.py: Qwen2, Qwen2.5, Qwen3
"""
