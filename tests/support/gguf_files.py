"""GGUF files of tiny torch models, written with the gguf package."""

import gguf as gguf_package
from gguf import GGMLQuantizationType as Kind

from jaxft.weights import gguf


def permute(weight, heads):
    """llama.cpp's convert_hf_to_gguf.py, LlamaModel.permute."""
    return (
        weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:])
        .swapaxes(1, 2)
        .reshape(weight.shape)
    )


def gguf_tensors(reference):
    """The tensors of a torch Llama as llama.cpp names and orders them."""
    config = reference.config
    state = {k: v.detach().numpy() for k, v in reference.state_dict().items()}
    if config.tie_word_embeddings:
        del state["lm_head.weight"]
    names = {value: key for key, value in gguf.NAMES.items()}
    for name, value in state.items():
        if name in names:
            yield names[name], value
            continue
        _, _, i, module = name.removesuffix(".weight").split(".", 3)
        short = {v: k for k, v in gguf.BLOCK_NAMES.items()}[module]
        heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}.get(short)
        yield f"blk.{i}.{short}.weight", permute(value, heads) if heads else value


def write_gguf(path, reference, kind=Kind.F32, architecture="llama", fields=(), extra=()):
    """A GGUF file of a torch Llama: matrices as `kind`, norms as F32. fields: (method, arguments)."""
    config = reference.config
    writer = gguf_package.GGUFWriter(path, architecture)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(config.head_dim)
    for method, *values in fields:
        getattr(writer, method)(*values)
    for name, value in [*gguf_tensors(reference), *extra]:
        stored = kind if value.ndim == 2 else Kind.F32
        data = gguf_package.quants.quantize(value, stored)
        writer.add_tensor(name, data, raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def byte_level(fields, tokens, **kinds):
    """The tokenizer fields of a byte-level BPE vocabulary; kinds: token type of the named tokens."""
    types = [kinds.get(token, 1) for token in tokens]
    return [("add_tokenizer_model", "gpt2"), ("add_token_list", tokens), ("add_token_types", types), *fields]


def toy_vocabulary():
    from tokenizers import pre_tokenizers

    merges = ["l l", "Ġ h", "Ġh e", "1 2", "12 3", "Ġ Ġ", "Ċ Ċ"]
    specials = {"<|endoftext|>": 3, "<|begin|>": 3, "<|end|>": 3, "<think>": 4}
    tokens = (
        sorted(pre_tokenizers.ByteLevel.alphabet())
        + [m.replace(" ", "") for m in merges]
        + ["hell", *specials]
    )
    return merges, tokens, specials
