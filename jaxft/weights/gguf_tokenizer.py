"""The tokenizer in a GGUF file's metadata: byte-level BPE, built with `tokenizers`.

transformers' AutoTokenizer(gguf_file=...) needs torch, and does not split digits as the published tokenizers
do.
"""

from typing import Any

from jaxft.weights.gguf_header import GgufHeader

# How text is split before merging, by tokenizer.ggml.pre. The pattern is from Llama 3's published
# tokenizer.json.
GPT2 = ("gpt-2", "default")
DIGITS = ("smollm", "starcoder", "refact")
LLAMA3 = ("llama-bpe", "llama3", "llama-v3")
LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CONTROL, USER_DEFINED = 3, 4  # llama.cpp's token types


def build_tokenizer(header: GgufHeader) -> Any:
    """Build a transformers PreTrainedTokenizerFast with the file's special tokens and chat template.

    Raises ValueError for a vocabulary that is not byte-level BPE or an unknown pre-tokenizer.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    metadata, required = header.metadata, header.required
    if required("tokenizer.ggml.model") != "gpt2":
        raise ValueError(
            f"{header.path}: its tokenizer is of type {required('tokenizer.ggml.model')!r}; only "
            "byte-level BPE ('gpt2') is "
            "read from GGUF. Use the model's Hugging Face folder"
        )
    pre, tokens = metadata.get("tokenizer.ggml.pre", "gpt-2"), required("tokenizer.ggml.tokens")
    vocab = {token: i for i, token in enumerate(tokens)}
    merges = [tuple(merge.split(" ")) for merge in required("tokenizer.ggml.merges")]
    if len(vocab) != len(tokens) or any(len(merge) != 2 for merge in merges):
        raise ValueError(f"{header.path}: its vocabulary repeats a token, or a merge is not a pair")
    try:
        tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, ignore_merges=pre in LLAMA3))
    except Exception as e:  # tokenizers raises plain Exception
        raise ValueError(f"{header.path}: its merges do not fit its vocabulary: {e}") from e
    tokenizer.pre_tokenizer = _pre_tokenizer(header, pre)
    tokenizer.decoder = decoders.ByteLevel()
    kinds = metadata.get("tokenizer.ggml.token_type") or []
    for token, kind in zip(tokens, kinds, strict=False):
        if kind in (CONTROL, USER_DEFINED):
            added = AddedToken(token, normalized=False, special=kind == CONTROL)
            (tokenizer.add_special_tokens if kind == CONTROL else tokenizer.add_tokens)([added])
    special = _special_tokens(header, tokens)
    tokenizer.post_processor = _post_processor(header, pre, special)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        chat_template=metadata.get("tokenizer.chat_template"),
        clean_up_tokenization_spaces=False,
        model_max_length=required("llama.context_length"),
        **special,
    )


def _pre_tokenizer(header: GgufHeader, pre: str) -> Any:
    from tokenizers import Regex, pre_tokenizers

    if pre in GPT2:
        return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    if pre in DIGITS:
        digits = pre_tokenizers.Digits(individual_digits=True)
        return pre_tokenizers.Sequence(
            [digits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)]
        )
    if pre in LLAMA3:
        split = pre_tokenizers.Split(Regex(LLAMA3_PATTERN), behavior="isolated")
        return pre_tokenizers.Sequence(
            [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
        )
    raise ValueError(
        f"{header.path}: pre-tokenizer {pre!r} is not known ({', '.join([*GPT2, *DIGITS, *LLAMA3])}); "
        "use the model's Hugging Face folder"
    )


def _special_tokens(header: GgufHeader, tokens: list[str]) -> dict[str, str]:
    special = {}
    for name, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        index = header.metadata.get(f"tokenizer.ggml.{key}_token_id")
        if index is not None:
            if not 0 <= index < len(tokens):
                raise ValueError(
                    f"{header.path}: {key}_token_id is {index}, the vocabulary has {len(tokens)} tokens"
                )
            special[f"{name}_token"] = tokens[index]
    return special


def _post_processor(header: GgufHeader, pre: str, special: dict[str, str]) -> Any:
    from tokenizers import processors

    bos = header.metadata.get("tokenizer.ggml.add_bos_token", pre in LLAMA3) and special.get("bos_token")
    eos = header.metadata.get("tokenizer.ggml.add_eos_token", False) and special.get("eos_token")
    if not bos and not eos:
        return processors.ByteLevel(trim_offsets=False)
    ids = {name: header.required("tokenizer.ggml.tokens").index(name) for name in {bos, eos} if name}
    single = " ".join(part for part in (bos, "$A", eos) if part)
    pair = " ".join(
        part
        for part in (bos, "$A", eos, f"{bos}:1" if bos else "", "$B:1", f"{eos}:1" if eos else "")
        if part
    )
    return processors.TemplateProcessing(single=single, pair=pair, special_tokens=list(ids.items()))
