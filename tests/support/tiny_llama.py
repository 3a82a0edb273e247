"""Tiny random Llamas by transformers, and the same in a Hugging Face folder, for the tests of weights."""

import json

import numpy as np

from jaxft.batch import Tokens

VOCAB, WIDTH, LAYERS = 320, 64, 3


def tiny_torch(seed=0, **changes):
    """A random transformers Llama whose logits differ from token to token."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    sizes = dict(
        vocab_size=VOCAB,
        hidden_size=WIDTH,
        intermediate_size=96,
        num_hidden_layers=LAYERS,
        max_position_embeddings=256,
    )
    heads = dict(num_attention_heads=4, num_key_value_heads=2, bos_token_id=256, eos_token_id=257)
    model = LlamaForCausalLM(LlamaConfig(**{**sizes, **heads, "initializer_range": 0.2, **changes})).eval()
    for name, p in model.named_parameters():
        if "norm" in name:
            torch.nn.init.uniform_(p, 0.5, 1.5)
    return model


def tiny_tokenizer():
    """Byte-level BPE without merges: 256 bytes and two special tokens."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken("<s>", normalized=False), AddedToken("</s>", normalized=False)])
    template = "{% for m in messages %}<s>{{ m['content'] }}</s>{% endfor %}"
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", chat_template=template
    )


def write_folder(folder, model, **save):
    """transformers' own save_pretrained, with a tokenizer."""
    model.save_pretrained(str(folder), **save)
    tiny_tokenizer().save_pretrained(str(folder))
    return folder


def edit_config(folder, drop=(), **changes):
    """Change config.json in place."""
    path = folder / "config.json"
    config = {k: v for k, v in json.loads(path.read_text()).items() if k not in drop}
    path.write_text(json.dumps({**config, **changes}))


def some_tokens(rows=2, time=12, vocab=VOCAB):
    """One full segment a row."""
    ids = np.random.default_rng(1).integers(0, vocab, (rows, time), dtype=np.int32)
    ones, positions = np.ones_like(ids), np.broadcast_to(np.arange(time, dtype=np.int32), ids.shape)
    return Tokens(
        ids=ids,
        segments=ones,
        positions=positions,
        read=positions,
        targets=ids,
        token_weights=ones.astype(np.float32),
    )


def our_logits(model, params, tokens):
    """Logits [B, T, V] of a jaxft model."""
    return np.asarray(model.logits(model.head(params), model.hidden(params, tokens)[0]))


def torch_logits(model, tokens):
    """Logits [B, T, V] of a transformers or peft model."""
    import torch

    with torch.no_grad():
        return model(torch.tensor(np.asarray(tokens.ids), dtype=torch.long)).logits.float().numpy()
