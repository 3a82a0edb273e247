"""Rankings, comparisons of two responses and transcripts are read as pairs, rankings and conversations."""

import json

import numpy as np
import pytest
from parsed_rows import examples, pairs
from tiny_pairs import seen, source, write

from jaxft.data.pairs import PairRows
from jaxft.data.rows.row_files import Row

SYNTHETIC = ["d", "a", "c", "b", "e"]  # responses of a row in its order; "a" is the best
RANKS = [4, 1, 3, 2, 5]


def user(text):
    return [{"role": "user", "content": text}]


def read(fields, **settings):
    """The responses of a preference row by kind, and the numbers of data.extras and of rankings."""
    rows = PairRows("r", **settings)
    (found,) = pairs([Row("r:1", fields)], rows.token_settings)
    texts = {kind: chat.messages[-1]["content"] for kind, chat in found.examples.items()}
    assert all([*chat.messages[: chat.response]] == user("q") for chat in found.examples.values())
    return texts, dict(zip(rows.numbers, found.numbers, strict=True))


def objects(text, number, values):
    return [{text: x, number: value} for x, value in zip(SYNTHETIC, values, strict=True)]


SCORES = [-rank for rank in RANKS]
RANKINGS = {
    "nectar": {"prompt": "\n\nHuman: q\n\nAssistant: ", "answers": objects("answer", "rank", RANKS)},
    "ultrafeedback": {"instruction": "q", "completions": objects("response", "overall_score", SCORES)},
    "nemo": {
        "context": user("q"),
        "completions": [
            {"rank": rank, "completion": [{"role": "assistant", "content": text}]}
            for rank, text in zip(RANKS, SYNTHETIC, strict=True)
        ],
    },
    "ranks": {"prompt": "q", "responses": SYNTHETIC, "ranks": RANKS},
    "ratings": {"prompt": "q", "completions": SYNTHETIC, "ratings": list(map(str, SCORES))},
    "rewards": {"prompt": "q", "responses": SYNTHETIC, "rewards": SCORES},
    "rating": {"prompt": "q", "responses": SYNTHETIC, "rating": SCORES, "score": 3},
    "items with rewards": {"prompt": "q", "responses": objects("text", "reward", SCORES)},
    "messages with scores": {
        "prompt": "q",
        "responses": [{"role": "assistant", **x} for x in objects("content", "score", SCORES)],
    },
    "ultrafeedback without an overall score": {
        "instruction": "q",
        "completions": [
            {"overall_score": None, **x} for x in objects("response", "fine-grained_score", SCORES)
        ],
    },
    "stack-exchange-preferences": {
        "question": "q",
        "answers": [{"selected": False, **x} for x in objects("text", "pm_score", SCORES)],
    },
    "of a table": {"question": "q", "responses": json.dumps(SYNTHETIC), "scores": json.dumps(SCORES)},
}


@pytest.mark.parametrize("fields", RANKINGS.values(), ids=RANKINGS.keys())
def test_the_best_response_of_a_ranking_is_chosen_the_worst_rejected_and_the_others_are_in_order(fields):
    assert read(fields) == ({"chosen": "a", "rejected": "e"}, {})
    texts, ratings = read(fields, responses=5)
    assert texts == {"chosen": "a", "rejected": "e", "rank_2": "b", "rank_3": "c", "rank_4": "d"}
    kinds = ("chosen", "rejected", "rank_2", "rank_3", "rank_4")
    assert ratings == {f"score_{kind}": -place for kind, place in zip(kinds, (1, 5, 2, 3, 4), strict=True)}


@pytest.mark.parametrize("responses", [["x", "y"], [{"text": "x", "likes": 1}, {"text": "y", "likes": 2}]])
def test_responses_without_ratings_are_read_in_the_order_of_the_row_only_if_a_setting_says_so(responses):
    fields = {"prompt": "q", "responses": responses}
    with pytest.raises(
        ValueError, match=r"does not rate the responses in 'responses'; .*data\.best_first=true"
    ):
        read(fields)
    assert read(fields, best_first=True)[0] == {"chosen": "x", "rejected": "y"}
    rated = {**fields, "utility": [1, 2]}
    assert read(rated, columns=("ratings=utility",))[0] == {"chosen": "y", "rejected": "x"}
    assert read({**fields, "ratings": [1, 2]}, best_first=True)[0] == {"chosen": "y", "rejected": "x"}


def test_the_input_of_an_instruction_is_in_the_prompt_of_its_ranking():
    fields = {"instruction": "i", "input": "x", "system": "s", "responses": ["a", "b"], "ratings": [1, 2]}
    rows = PairRows("r")
    (found,) = pairs([Row("r:1", fields)], rows.token_settings)
    assert [m["content"] for m in found.examples["chosen"].messages] == ["s", "i\n\nx", "b"]


def test_of_a_longer_ranking_the_ends_and_even_distances_are_read_and_of_a_shorter_one_the_last_are_missing():
    fields = {"prompt": "q", "responses": [f"{i}" for i in range(9)]}
    assert read(fields, responses=5, best_first=True)[0] == {
        "chosen": "0", "rejected": "8", "rank_2": "2", "rank_3": "4", "rank_4": "6",
    }  # fmt: skip
    texts, ratings = read({"prompt": "q", "responses": ["x", "y", "z"]}, responses=5, best_first=True)
    assert texts == {"chosen": "x", "rejected": "z", "rank_2": "y"}
    assert ratings["score_rejected"] == -3 and ratings["score_rank_3"] == ratings["score_rank_4"] == 0


def test_responses_of_equal_ratings_stay_in_the_order_of_the_row():
    fields = {"prompt": "q", "responses": ["x", "y", "z", "w"], "ratings": [1, 5, 5, 1]}
    assert [*read(fields, responses=4)[0].values()] == ["y", "w", "z", "x"]


def test_pairs_in_a_ranking_have_their_ratings_or_their_ranks():
    pair = {"prompt": "q", "chosen": "x", "rejected": "y"}
    assert read(pair, responses=3)[1] == {"score_chosen": -1, "score_rejected": -2, "score_rank_2": 0}
    ranks = {"score_chosen": -1, "score_rejected": -3, "score_rank_2": -2}
    assert read({**pair, "rank_2": "z"}, responses=3)[1] == ranks
    rated = {**pair, "score_chosen": 8.5, "score_rejected": 3}
    with pytest.raises(ValueError, match="'score_rank_2' is missing, .* rate all responses or none"):
        read({**rated, "rank_2": "z"}, responses=3)
    assert read(rated, responses=3)[1] == {"score_chosen": 8.5, "score_rejected": 3, "score_rank_2": 0}
    assert read({**rated, "rank_2": "z", "score_rank_2": 4}, responses=3) == (
        {"chosen": "x", "rejected": "y", "rank_2": "z"},
        {"score_chosen": 8.5, "score_rejected": 3, "score_rank_2": 4},
    )


EXTRAS = ("score_chosen", "score_rejected")
TWO = {
    "helpsteer3": (
        {"context": user("q"), "response1": "x", "response2": "y"},
        {"overall_preference": -2},
        {"overall_preference": 3},
        ((2, 0), (3, 0)),
    ),
    "helpsteer2": (
        {"prompt": "q", "response_1": "x", "response_2": "y"},
        {"preference_strength": "-1"},
        {"preference_strength": 2},
        ((1, 0), (2, 0)),
    ),
    "saferlhf": (
        {"prompt": "q", "response_0": "x", "response_1": "y", "safer_response_id": 1},
        {"better_response_id": 0},
        {"better_response_id": 1},
        None,
    ),
    "shp": (
        {"history": "q", "human_ref_A": "x", "human_ref_B": "y", "score_A": 12, "score_B": 3},
        {"labels": 1},
        {"labels": 0, "score_A": 3, "score_B": 12},
        ((12, 3), (12, 3)),
    ),
    "openai": (
        {
            "input": {"messages": user("q"), "tools": [], "parallel_tool_calls": True},
            "preferred_output": [{"role": "assistant", "content": "x"}],
            "non_preferred_output": [{"role": "assistant", "content": "y"}],
        },
        {},
        None,
        None,
    ),
}


@pytest.mark.parametrize("name", TWO)
def test_of_two_responses_the_row_says_which_is_better_and_by_how_much(name):
    fields, first, second, scores = TWO[name]
    for row, better, index in ((first, "xy", 0), (second, "yx", 1)):
        if row is not None:
            extras = EXTRAS if scores else ()
            texts, numbers = read({**fields, **row}, extras=extras)
            assert texts == {"chosen": better[0], "rejected": better[1]}
            assert not scores or tuple(numbers.values()) == scores[index]


RESPONSES = {"prompt": "q", "responses": ["x", "y"]}
BAD = [
    ({**RESPONSES, "responses": ["x"]}, "column 'responses' has 1 responses; a ranking needs 2 or more"),
    ({**RESPONSES, "responses": []}, "column 'responses' has 0 responses; a ranking needs 2 or more"),
    ({**RESPONSES, "responses": "x"}, "column 'responses' is a string; use a list"),
    ({**RESPONSES, "responses": ["x", " "]}, r"responses\[1\] has no response; use a string, a list of"),
    ({**RESPONSES, "responses": ["x", {"rank": 2}, None]}, r"responses\[2\] has no response; use a string"),
    ({**RESPONSES, "ratings": [1, "good"]}, r"ratings\[1\] is 'good'; use a finite number"),
    ({**RESPONSES, "ratings": [True, 0]}, r"ratings\[0\] is True; use a finite number"),
    ({**RESPONSES, "ranks": [1, None]}, r"ranks\[1\] is None; use a finite number"),
    (
        {**RESPONSES, "ranks": [1, 2, 3]},
        "column 'ranks' has 3 entries and 'responses' 2 responses; use one for each response",
    ),
    ({**RESPONSES, "ratings": [3, 3]}, "all responses have the rating 3; remove the row"),
    (
        {"prompt": "q", "answers": [{"answer": "x", "rank": "1st"}, {"answer": "y", "rank": 2}]},
        r"answers\[0\]\.rank is '1st'; use a finite number",
    ),
    (
        {"prompt": "q", "answers": [{"answer": "x", "rank": 1}, {"answer": "y"}]},
        r"answers\[1\] has no rating, and others have one; rate all responses or none",
    ),
    ({"prompt": "q", "responses": ["x", "x"], "ratings": [1, 2]}, "chosen and rejected are identical"),
    (
        {**TWO["helpsteer3"][0], "overall_preference": 0},
        "column 'overall_preference' is 0: neither response is better; remove the row",
    ),
    (
        {**TWO["shp"][0], "labels": 0},
        r"column 'labels' is 0, and the other response has more votes \(12 against 3\); fix or remove",
    ),
    (
        {"context": "c", "question": "q", "answers": ["x", "y"], "scores": [1, 2]},
        "the row has 'question' and 'context'; choose the prompt with data.columns=prompt=question",
    ),
    (
        {**TWO["saferlhf"][0], "better_response_id": 2},
        "column 'better_response_id' is 2; use 0 if response_0 is better, 1 if response_1 is",
    ),
    ({**TWO["openai"][0], "input": "q"}, "column 'input' has no messages; use"),
    (
        {"prompt": "q", "response": "x", "helpfulness": 4, "correctness": 4, "coherence": 4},
        "the row rates a single response; for preferences join the rows of each prompt",
    ),
    (
        {"prompt": "q", "completions": ["x", "y"], "labels": [True, False]},
        "the row has the steps of one response, with labels; train a process reward model with the recipe",
    ),
]


@pytest.mark.parametrize(("fields", "error"), BAD)
def test_a_bad_ranking_or_comparison_is_one_line_that_names_the_row(fields, error):
    with pytest.raises(ValueError, match=error) as caught:
        read(fields)
    assert str(caught.value).startswith("r:1: ") and "\n" not in str(caught.value)


def test_a_transcript_of_glaive_is_a_conversation_with_tools_and_their_results():
    tools = [{"name": name, "parameters": {"type": "object"}} for name in ("weather", "time")]
    shown = "\n\n".join(json.dumps(tool, indent=4) for tool in tools)
    chat = (
        "USER: Weather {in} Ulm?\n\n\nASSISTANT: Let me see. <functioncall> "
        '{"name": "weather", "arguments": \'{"town": "Ulm", "note": "it\'s"}\'} <|endoftext|>\n\n\n'
        'FUNCTION RESPONSE: {"t": 20}\n\n\nASSISTANT: 20 degrees. <|endoftext|>\n\n\n'
    )
    system = "SYSTEM: You are a helpful assistant with access to the following functions. Use them -\n"
    (found,) = examples([Row("r:1", {"system": system + shown, "chat": chat})])
    call = {"type": "function", "function": {"name": "weather", "arguments": {"town": "Ulm", "note": "it's"}}}
    assert found.tools == tools and found.messages == (
        {"role": "user", "content": "Weather {in} Ulm?"},
        {"role": "assistant", "content": "Let me see.", "tool_calls": [call]},
        {"role": "tool", "content": '{"t": 20}'},
        {"role": "assistant", "content": "20 degrees."},
    )
    alone = {"system": "SYSTEM: You are helpful.", "chat": "USER: q\n\n\nASSISTANT: a <|endoftext|>"}
    (found,) = examples([Row("r:1", alone)])
    assert found.tools is None and [m["content"] for m in found.messages] == ["You are helpful.", "q", "a"]
    for bad in ("hello", "USER: q\n\n\nASSISTANT: <functioncall> weather"):
        with pytest.raises(
            ValueError, match=r"r:1: (column 'chat' does not begin|the function call 'weather')"
        ):
            examples([Row("r:1", {**alone, "chat": bad})])


def test_batches_have_the_responses_and_the_ratings_of_rankings(tmp_path):
    """Rankings of 2 to 5 responses, whose texts say their prompt and their place."""
    sizes = [2 + i % 4 for i in range(11)]
    rows = [
        {
            "prompt": f"{i}",
            "responses": [f"{i} is {j}" for j in range(n)],
            "ratings": [10 * i - j for j in range(n)],
        }
        for i, n in enumerate(sizes)
    ]
    write(tmp_path / "r.jsonl", rows)
    found = source(tmp_path, responses=4, held_out="none", third="mismatched", extras=("score_chosen",))
    batches = [found.batch(k)[0] for k in range(found.info.steps)]
    kinds = ("chosen", "rejected", "rank_2", "rank_3")
    assert batches[0].kinds == (*kinds, "mismatched")
    pairs_seen = {pair: value for batch in batches for pair, value in seen(batch).items()}
    assert pairs_seen.keys() == {*range(11)}
    places = {2: (0, 1, None, None), 3: (0, 2, 1, None), 4: (0, 3, 1, 2), 5: (0, 4, 1, 3)}
    for i, (_, numbers, answers) in pairs_seen.items():
        wanted = places[sizes[i]]
        assert [answer is None for answer in answers[:4]] == [place is None for place in wanted]
        expected = [0 if place is None else 10 * i - place for place in wanted]
        assert [numbers[f"score_{kind}"] for kind in kinds] == expected
        lengths = {tuple(answer[0]) for answer in answers if answer}
        assert len(lengths) == 1  # one prompt
    assert "11 rankings of 2 to 4 responses" in found.info.stats.summary
    notes = [line for line in found.info.warnings if "rankings" in line or "ranking" in line]
    assert len(notes) == 1 and "up to data.responses=4 responses of each ranking are read" in notes[0]
    pair = source(tmp_path, held_out="none")
    (note,) = (line for line in pair.info.warnings if "rankings" in line)
    assert "rankings are read as pairs, the best response against the worst" in note
    of_pairs = seen(pair.batch(0)[0])
    for i, (_, numbers, answers) in of_pairs.items():
        assert numbers == {} and [a[1] for a in answers] == [a[1] for a in pairs_seen[i][2][:2]]
    means = np.unique(batches[0].mean_lengths[..., 0])
    assert len(means) == 1


def test_a_note_counts_the_pairs_whose_chosen_response_has_the_lower_rating(tmp_path):
    rows = [
        {"prompt": f"{i}", "chosen": "x", "rejected": "y", "score_chosen": i, "score_rejected": 2}
        for i in range(5)
    ]
    write(tmp_path / "r.jsonl", rows)
    lines = source(tmp_path, held_out="none", extras=EXTRAS).info.warnings
    (note,) = (line for line in lines if "margin" in line)
    assert "2 of 5 pairs have a score_chosen below their score_rejected" in note and "r.jsonl:1" in note
    assert not any("margin" in line for line in source(tmp_path, held_out="none").info.warnings)


def test_data_responses_is_from_2_to_16():
    for number in (1, 17):
        with pytest.raises(ValueError, match=rf"data\.responses={number}.*from 2 to 16"):
            PairRows("r", responses=number)
