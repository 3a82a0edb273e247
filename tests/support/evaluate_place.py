"""A tiny model's folder with rows for `jaxft evaluate`, and its losses by transformers."""

import json

import tiny_llama

TEXTS = ["a rank is small", "why? because", "x" * 40, "12 red chairs", "the end of it"]
PAIRS = [
    ("one?", "yes it is", "no"),
    ("two?", "b", "a long answer"),
    ("three?", "aaaa", "bbbb"),
    ("four?", "zz", "qq"),
]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_evaluate_place(folder):
    """model/ and files of texts, rows and pairs; return the model by transformers."""
    model = tiny_llama.tiny_torch()
    tiny_llama.write_folder(folder / "model", model)
    write(folder / "texts.jsonl", [{"text": text} for text in TEXTS])
    write(folder / "rows.jsonl", [{"prompt": p, "completion": c} for p, c, _ in PAIRS])
    write(folder / "pairs.jsonl", [{"prompt": p, "chosen": c, "rejected": r} for p, c, r in PAIRS])
    return model


def bytes_of(text):
    return list(tiny_llama.tiny_tokenizer()(text, add_special_tokens=False).input_ids)


def torch_loss(model, ids, first):
    """(sum of the losses of the tokens from `first` on, their number) by transformers."""
    import torch

    tokens = torch.tensor([ids])
    labels = tokens.clone()
    labels[0, :first] = -100
    with torch.no_grad():
        return float(model(tokens, labels=labels).loss) * (len(ids) - first), len(ids) - first


def loss_of_texts(model):
    """The mean loss of TEXTS by transformers, with the end token that jaxft appends."""
    sums = [torch_loss(model, [*bytes_of(text), 257], 1) for text in TEXTS]  # the tokenizer adds no BOS
    total, count = map(sum, zip(*sums, strict=True))
    return total / count


def chat(prompt, response):
    """Token ids of the template of tiny_llama, and the number of those before the response."""
    before = [256, *bytes_of(prompt), 257]
    return [*before, 256, *bytes_of(response), 257], len(before)
