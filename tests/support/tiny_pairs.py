"""Small preference rows, their sources, and a naive reader that turns batches back into pairs."""

import json

import jax
import numpy as np
from tiny_tokenizers import tiny

from jaxft.data.packing.pack import permutation
from jaxft.data.pairs import PairRows
from jaxft.data.row_settings import DATE

WORDS = ["the", "rank", "of", "a", "matrix", "is", "what", "model", "answers", "user", "1", "2", "3"]


def text(i, k, most=9):
    return " ".join(WORDS[j % len(WORDS)] for j in permutation(40, i, k)[: 1 + (7 * i + 3 * k) % most])


def make_rows(count):
    return [
        {
            "prompt": f"{i}: {text(i, 0)}",
            "chosen": f"{text(i, 1)} {i}",
            "rejected": f"{text(i, 2)} no",
            "margin": i / 8,
            "w": i % 3,
        }
        for i in range(count)
    ]


def unpaired(count):
    return [
        {"prompt": f"{i}: {text(i, 0)}", "completion": f"{text(i, 1)} {i}", "label": i % 3 > 0}
        for i in range(count)
    ]


def write(path, rows):
    path.write_text("\n".join(map(json.dumps, rows)))
    return str(path)


def source(folder, kind="llama3", shards=1, **options):
    options = {"batch": 4, "unpaired": True} | options
    return PairRows(str(folder / "r.jsonl"), **options).open(tiny(kind), shards, folder / "cache")


def flat(batch):
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), batch)


def seen(batch):
    """{pair: (weight, columns, ((prompt ids, targets, reference) or None of each kind))}, found by following
    attention alone.

    A token attends to the earlier tokens of its segment that are shared or of its branch. The target at a
    read position must be the next token of its sequence, at the next position.
    """
    batch, found = flat(batch), {}
    for r in range(len(batch.ids)):
        branches = batch.segments[r] * 0 if batch.branches is None else batch.branches[r]
        for slot, pair in enumerate(batch.index[r]):
            answers = [
                answer_of(batch, r, branches, slot * len(batch.kinds) + a) for a in range(len(batch.kinds))
            ]
            numbers = {name: float(column[r, slot]) for name, column in batch.columns.items()}
            assert batch.lengths[r, slot].tolist() == [len(a[1]) if a else 0 for a in answers]
            if pair >= 0:
                found[int(pair)] = (float(batch.pair_weights[r, slot]), numbers, tuple(answers))
            else:
                assert not any(answers) and batch.pair_weights[r, slot] == 0 and not any(numbers.values())
    return found


def answer_of(batch, r, branches, answer):
    at = np.flatnonzero(batch.responses[r] == answer)
    if not len(at):
        return None
    assert batch.offsets[r, at].tolist() == list(range(len(at)))
    read, targets = batch.read[r, at], batch.targets[r, at].tolist()
    segment = batch.segments[r, read[0]]
    last = (
        read[-1] + 1 if len(read) > 1 else None
    )  # position of the last target; unknown if it is the only one
    mine = {int(branches[i]) for i in read} | ({int(branches[last])} if last else set())
    assert segment > 0 and len(mine - {0}) <= 1
    inside = np.flatnonzero((batch.segments[r] == segment) & np.isin(branches, [0, *mine]))
    before = inside[inside <= read[0]]
    assert batch.positions[r, before].tolist() == list(range(len(before)))
    end = int(batch.last[r].ravel()[answer])  # position of the last target
    assert batch.ids[r, end] == targets[-1] and batch.segments[r, end] == segment and (end > read).all()
    assert batch.positions[r, end] == batch.positions[r, read[-1]] + 1 and branches[end] in (
        mine or {branches[end]}
    )
    for a, b, target in zip(read[1:], read[:-1], targets[:-1], strict=True):
        assert batch.ids[r, a] == target and batch.positions[r, a] == batch.positions[r, b] + 1
    reference = None if batch.reference is None else batch.reference[r, at].tolist()
    return batch.ids[r, before].tolist(), targets, reference


def epoch(s, number=0):
    parts = [seen(s.batch(number * s.info.steps_per_epoch + k)[0]) for k in range(s.info.steps_per_epoch)]
    return {pair: value for part in parts for pair, value in part.items()}


def trl(row, tokenizer, kinds=("chosen", "rejected")):
    """(prompt ids, answer ids ...) as TRL 1.16 splits a conversational row (dpo_trainer.py, tokenize_fn),
    written independently.
    """

    def ids(messages, **options):
        options |= {"tokenize": True, "return_dict": True, "date_string": DATE}
        return tokenizer.apply_chat_template(messages, **options)["input_ids"]

    question = [{"role": "user", "content": row["prompt"]}]
    whole = [ids([*question, {"role": "assistant", "content": row[kind]}]) for kind in kinds]
    prompt, count = ids(question, add_generation_prompt=True), 0
    while count < len(prompt) and all(count < len(w) and w[count] == prompt[count] for w in whole):
        count += 1
    return [prompt[:count], *(w[count:] for w in whole)]


def same(a, b):
    return all(np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))
