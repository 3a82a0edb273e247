"""GGUF files, read and written.

gguf_file.py: the file format: metadata, tensor table, split files
gguf_architectures.py: names and storage of tensors per architecture; metadata that llama.cpp reads
gguf_tensors.py: tensors under their Hugging Face names, quantised blocks as codes and scales
gguf_config.py: the configuration in metadata, read and written
gguf_rope.py: rope in metadata and tensors, read and written
gguf_tokenizer.py: the tokenizer in metadata, read and written
gguf_quantize.py: values to blocks, with scales fitted by least squares; mixtures such as Q4_K_M
gguf_write.py: write a model, or an adapter alone; check that llama.cpp computes it as jaxft does
"""
