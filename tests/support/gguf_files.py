"""GGUF files of tiny torch models, written with the gguf package."""

import gguf as gguf_package
import numpy as np
from gguf import GGMLQuantizationType as Kind

from jaxft.weights.gguf.gguf_architectures import ARCHITECTURES, NAMES


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
    names = {value: key for key, value in NAMES.items()}
    modules = {value: key for key, value in ARCHITECTURES["llama"].modules.items()}
    for name, value in state.items():
        if name in names:
            yield names[name], value
            continue
        _, _, i, module = name.removesuffix(".weight").split(".", 3)
        short = modules[module]
        heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}.get(short)
        yield f"blk.{i}.{short}.weight", permute(value, heads) if heads else value


# Where the blocks of types that the gguf package does not quantise to have float16 scales (ggml-common.h).
SCALES = {
    Kind.Q2_K: (80, 82), Kind.Q3_K: (108,), Kind.Q4_K: (0, 2), Kind.Q5_K: (0, 2), Kind.Q6_K: (208,),
    Kind.IQ4_NL: (0,), Kind.IQ4_XS: (0,), Kind.IQ3_S: (0,), Kind.IQ2_XXS: (0,),
}  # fmt: skip


def blocks_of(value, kind, seed=0):
    """The bytes of a matrix in a type: quantised, or random blocks where nothing here quantises to it."""
    if kind not in SCALES:
        return gguf_package.quants.quantize(value, kind)
    block, size = gguf_package.GGML_QUANT_SIZES[kind]
    rng = np.random.default_rng([seed, *value.shape])
    raw = rng.integers(0, 256, (value.shape[0], value.shape[1] // block, size), dtype=np.uint8)
    for at in SCALES[kind]:
        scale = rng.uniform(-2e-4, 2e-4, (*raw.shape[:2], 1)).astype(np.float16)
        raw[..., at : at + 2] = scale.view(np.uint8)
    return raw.reshape(len(raw), -1)


def write_gguf(path, reference, kind=Kind.F32, architecture="llama", fields=(), extra=(), split=0):
    """A GGUF file of a torch Llama: norms as F32, matrices as `kind`, a type or a function of the name.

    fields: (method of the writer, arguments). extra: more tensors. split: tensors of a part, 0 for one file;
    returns the path of the first.
    """
    config = reference.config
    sizes = [
        ("add_block_count", config.num_hidden_layers),
        ("add_context_length", config.max_position_embeddings),
        ("add_embedding_length", config.hidden_size),
        ("add_feed_forward_length", config.intermediate_size),
        ("add_head_count", config.num_attention_heads),
        ("add_head_count_kv", config.num_key_value_heads),
        ("add_layer_norm_rms_eps", config.rms_norm_eps),
        ("add_rope_freq_base", config.rope_parameters["rope_theta"]),
        ("add_rope_dimension_count", config.head_dim),
    ]
    return write_file(path, architecture, [*sizes, *fields], [*gguf_tensors(reference), *extra], kind, split)


def write_file(path, architecture, fields, tensors, kind=Kind.F32, split=0):
    """A GGUF file of these metadata and (name, value) tensors; see write_gguf."""
    writer = gguf_package.GGUFWriter(path, architecture, split_max_tensors=split)
    for method, *values in fields:
        getattr(writer, method)(*values)
    for i, (name, value) in enumerate(tensors):
        stored = kind(name) if callable(kind) else kind
        if value.ndim != 2 or value.dtype != np.float32:
            writer.add_tensor(name, value)
            continue
        writer.add_tensor(name, blocks_of(value, stored, i), raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path if not split else sorted(path.parent.glob(f"{path.stem}-*-of-*.gguf"))[0]


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
