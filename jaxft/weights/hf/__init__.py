"""Models in the layout of Hugging Face: safetensors, tokenizers, model cards.

card.py: model cards in folders of weights
hf.py: Hugging Face folders in
hf_write.py: Hugging Face folders out
safetensors.py: safetensors files
tokenizer_files.py: tokenizers of folders, in and out, for transformers 4 and 5
"""
