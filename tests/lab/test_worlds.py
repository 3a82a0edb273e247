"""Worlds: rows whose true reward, noise, bias and duplicates are as planted."""

import itertools
import json

import pytest

from jaxft.lab.worlds import TRUTH, Taste, World, WorldScore, features, proxy_reward, style_of, true_reward

ANSWERS = World(source="configs/data/calculator.jsonl", pairs=60, held_out=20)


def test_the_better_completion_is_chosen_without_noise():
    for world in (World(pairs=80), ANSWERS):
        for row in (*world.rows(), *world.held_out_rows()):
            margin = true_reward("", row["chosen"], row) - true_reward("", row["rejected"], row)
            assert margin == pytest.approx(row["true_margin"], abs=1e-6) and margin > 0


def test_the_planted_fraction_of_labels_is_flipped_and_nothing_else_changes():
    clean, noisy = World(pairs=100).rows(), World(pairs=100, noise=0.2).rows()
    assert sum(row["flipped"] for row in noisy) == 20
    for a, b in zip(clean, noisy, strict=True):
        assert b["true_margin"] == (-1 if b["flipped"] else 1) * a["true_margin"]
        assert {a["chosen"], a["rejected"]} == {b["chosen"], b["rejected"]} and a["prompt"] == b["prompt"]


def test_temperatures_change_labels_alone_and_no_difference_is_too_large():
    plain = World(pairs=60).rows()
    for temperature in (0.1, 1.0, 1e-4):
        for a, b in zip(plain, World(pairs=60, temperature=temperature).rows(), strict=True):
            assert {a["chosen"], a["rejected"]} == {b["chosen"], b["rejected"]} and a["prompt"] == b["prompt"]
    cold = World(pairs=60, temperature=1e-4).rows()
    assert [row["chosen"] for row in cold] == [row["chosen"] for row in plain]
    hot = World(pairs=60, temperature=1e4).rows()
    assert 15 <= sum(row["true_margin"] < 0 for row in hot) <= 45


def test_a_seed_decides_all_rows():
    assert World(seed=3).rows() == World(seed=3).rows() != World(seed=4).rows()


def test_held_out_prompts_are_others_and_have_true_labels():
    world = World(noise=0.4, length_bias=3.0, circle=2.0, temperature=2.0, pairs=150, held_out=40)
    held = world.held_out_rows()
    assert len(held) == 40 and all(row["true_margin"] > 0 for row in held)
    assert not {row["prompt"] for row in held} & {row["prompt"] for row in world.rows()}


def test_annotators_with_a_length_bias_choose_longer_completions():
    def longer(rows):
        more = [len(row["chosen"]) - len(row["rejected"]) for row in rows]
        return sum(x > 40 for x in more) / sum(abs(x) > 40 for x in more)

    fair, biased = World().rows(), World(length_bias=20.0).rows()
    assert longer(biased) == 1.0 and longer(fair) < 0.6
    row = biased[0]
    text = json.loads(row[TRUTH])["right"] + " " * 100
    assert proxy_reward("", text, row) - true_reward("", text, row) == pytest.approx(20.0)


def test_annotators_of_held_out_prompts_have_the_bias_and_their_labels_have_not():
    world = World(length_bias=7.0, pairs=20, held_out=10)
    for row, fair in zip(world.held_out_rows(), World(pairs=20, held_out=10).held_out_rows(), strict=True):
        assert (row["chosen"], row["rejected"]) == (fair["chosen"], fair["rejected"])
        text = json.loads(row[TRUTH])["right"] + "x" * 50
        scores = [WorldScore(world, fn)(row["prompt"], text, {}) for fn in (true_reward, proxy_reward)]
        assert scores[1] - scores[0] == pytest.approx(3.5)


def test_a_strong_circle_has_no_order_of_styles():
    wins = dict.fromkeys(itertools.permutations(range(3), 2), 0)
    for row in World(circle=50.0, pairs=300).rows():
        pair = style_of(row["chosen"]), style_of(row["rejected"])
        if pair[0] != pair[1]:
            wins[pair] += 1
    assert all(wins[i, (i + 2) % 3] > 0 == wins[i, (i + 1) % 3] for i in range(3))


def test_near_duplicates_repeat_a_row_in_other_words():
    rows = World(duplicates=0.25, pairs=80).rows()
    copies = [row for row in rows if row["duplicate_of"] >= 0]
    assert len(copies) == 20
    for row in copies:
        original = rows[row["duplicate_of"]]
        assert row["chosen"] == original["chosen"] and row["prompt"] != original["prompt"]
        assert original["prompt"][1:20].rstrip(".! ") in row["prompt"]


@pytest.mark.parametrize("duplicates, own", [(0.8, 10), (0.999, 1)])
def test_more_copies_than_originals_repeat_these_several_times(duplicates, own):
    rows = World(duplicates=duplicates, pairs=50).rows()
    assert len(rows) == 50 and sum(row["duplicate_of"] < 0 for row in rows) == own
    assert {row["duplicate_of"] for row in rows[own:]} == {*range(own)}


@pytest.mark.parametrize(
    "completion, facts, format",
    [
        ('{"a": 1, "b": "x"}', 1.0, 1.0),
        ('Here it is: {"a": 1, "b": "x"}', 1.0, 0.0),
        ('{"a": 1, "b": null}', 0.5, 1.0),
        ('{"a": 1, "b": "x", "c": 2}', 2 / 3, 1.0),
        ('{"a": 1, "b": "x"', 0.0, 0.0),
        ("", 0.0, 0.0),
    ],
)
def test_features_of_objects(completion, facts, format):
    found = features(completion, '{"a": 1, "b": "x"}')
    assert (found.facts, found.format) == (facts, format)


@pytest.mark.parametrize(
    "completion, facts, format",
    [("42", 1, 1), ("The answer is 42.", 1, 0), ("41", 0, 1), ("It is 142, I think", 0, 0)],
)
def test_features_of_answers(completion, facts, format):
    assert features(completion, "42")[:2] == (facts, format)


@pytest.mark.parametrize(
    "completion, right, facts, format",
    [
        ("The answer is New York.", "New York", 1, 0),
        ("Los Angeles", "New York", 0, 1),
        ("The answer is $42.", "$42", 1, 0),
        ("It is 42% of it", "42%", 1, 0),
        ("42.5", "42", 0, 1),
    ],
)
def test_answers_of_several_words_and_with_signs(completion, right, facts, format):
    assert features(completion, right)[:2] == (facts, format)


def test_objects_without_fields_or_too_deep_for_a_parser_have_features():
    assert features("{}", "{}").facts == 0.0
    assert features('{"a": ' * 20_000, '{"a": 1}').facts == 0.0


def test_the_reward_is_the_weighted_sum_of_the_features():
    world = World(taste=Taste(facts=3.0, format=0.5, length=-2.0), pairs=5)
    row = world.rows()[0]
    right = json.loads(row[TRUTH])["right"]
    assert true_reward("", right, row) == 3.5
    assert true_reward("", f"It is {right}{' ' * 44}", row) == pytest.approx(3.0 - 2.0 * 0.5)


def test_written_rows_are_the_rows(tmp_path):
    world = World(pairs=10, held_out=5)
    train, held = world.write(tmp_path / "world")
    assert [json.loads(line) for line in train.read_text().splitlines()] == world.rows()
    assert len(held.read_text().splitlines()) == 5


@pytest.mark.parametrize(
    "settings, text",
    [
        ({"noise": 0.6}, "world.noise=0.6; expected from 0 to 0.5"),
        ({"pairs": 1}, "world.pairs=1"),
        ({"duplicates": 1.0}, "world.duplicates=1.0; expected at least 0 and below 1"),
        ({"gap": 9.0, "pairs": 2}, "world.gap=9.0: in 10000 sampled pairs"),
        ({"taste": Taste(0.0, 0.0, 0.0)}, "raise a weight of world.taste"),
        ({"source": "none.jsonl"}, "world.source=none.jsonl: no such file"),
        ({"source": "configs/data/general.jsonl"}, "general.jsonl:1: a world needs rows with texts"),
        ({"source": "configs/data/calculator_held_out.jsonl", "held_out": 63}, "leaves fewer than 2"),
    ],
)
def test_a_wrong_world_is_one_line(settings, text):
    with pytest.raises((ValueError, FileNotFoundError)) as error:
        World(**settings).rows()
    assert text in str(error.value) and "\n" not in str(error.value)


def test_a_broken_line_of_the_source_is_named(tmp_path):
    path = tmp_path / "rows.jsonl"
    good = '{"prompt": "a", "answer": "1"}\n{"prompt": "b", "answer": "2"}\n'
    for broken, text in (
        ('["c"]', "rows.jsonl:3: "),
        ("", "rows.jsonl:2: "),
        ('{"prompt": "c"}', "a world needs"),
    ):
        path.write_text(good + broken + "\n" if broken else good.replace("\n", "\n\n"))
        with pytest.raises(ValueError, match=text):
            World(source=str(path), held_out=0).rows()


def test_rows_of_another_kind_have_no_true_reward():
    with pytest.raises(ValueError, match="the row has no column truth"):
        true_reward("", "x", {"prompt": "a"})


def test_a_score_function_finds_the_truth_by_the_prompt():
    world = World(pairs=5, held_out=10)
    row, score = world.held_out_rows()[3], WorldScore(world, true_reward)
    chat = f"<user>{row['prompt']}</user>"
    assert score(chat, row["chosen"], {}) == true_reward("", row["chosen"], row)
    assert score.__name__ == "true_reward"
    with pytest.raises(ValueError, match="no held-out prompt of the world is in 'else'"):
        score("else", "x", {})
