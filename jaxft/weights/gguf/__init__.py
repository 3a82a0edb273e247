"""GGUF files, read and written.

gguf_tensors.py: GGUF files: tensors
gguf_architectures.py: names and storage of the tensors of each architecture in GGUF files
gguf_config.py: configuration in GGUF metadata
gguf_header.py: GGUF metadata and split files
gguf_llama_cpp.py: what llama.cpp reads of a GGUF file; check of written files
gguf_metadata.py: configuration as GGUF metadata
gguf_quantize.py: values to blocks, with scales fitted by least squares
gguf_rope.py: rope in GGUF metadata
gguf_save.py: a model, or an adapter alone, as a GGUF file
gguf_tokenizer.py: tokenizers in GGUF files
gguf_tokenizer_write.py: a tokenizer as GGUF metadata
gguf_write.py: tensors and metadata into a file
"""
