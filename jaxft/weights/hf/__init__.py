"""Models in the layout of Hugging Face: safetensors, tokenizers, model cards.

hf_read.py: read folders; ids that end a completion
hf_write.py: write folders, also of multimodal models with a trained decoder
safetensors.py: safetensors files
tokenizer_files.py: tokenizers of folders, in and out, for transformers 4 and 5; limits on others' tokenizers
model_card.py: model cards in folders of weights
"""
