"""/v1/decisions and /v1/rerank: answers are the probabilities of the model's own logits."""

import jax.numpy as jnp
import numpy as np
import pytest
import tiny_served as tiny
from running_server import Running

from jaxft.batch import Tokens
from jaxft.data.decisions import DecisionPrompts, parse
from jaxft.data.row_settings import RowSettings
from jaxft.data.rows.row_files import Row
from jaxft.serve.decisions_api import parse_decisions, parse_rerank, ranked
from jaxft.serve.openai_api import ApiError

INPUT = "The rank broke."  # texts are short: the tiny model reads 128 tokens, most of them bytes
PREDICATE = {
    "type": "predicate", "name": "damaged", "instructions": "Is it damaged?"
}  # fmt: skip
CHOICE = {
    "type": "choice",
    "name": "department",
    "instructions": "Which?",
    "choices": [{"value": "user"}, {"value": "model", "description": "rank"}],
}
SCORE = {
    "type": "score",
    "instructions": "How?",
    "levels": [{"label": "a"}, {"label": "b"}, {"label": "c"}],
}


@pytest.fixture(scope="module")
def running():
    found = Running()
    yield found
    found.close()
    assert not found.lines


def read_by_hand(question, choices):
    """(probabilities of A, B, ... among themselves, and among all tokens) after the prompt."""
    lines = "\n".join(f"choice#{letter} {text}" for letter, text in zip("ABCDEFGH", choices))
    messages = [{"role": "user", "content": f"{question}\n\nAnswer with one of these choices:\n{lines}"}]
    tok = tiny.TOKENIZER
    text = tok.apply_chat_template(messages, add_generation_prompt=True, tokenize=False) + "choice#"
    ids = np.asarray(tok(text, add_special_tokens=False).input_ids, np.int32)[None]
    one, none = np.ones_like(ids), np.zeros((1, 1), np.int32)
    at = np.arange(ids.size, dtype=np.int32)[None]
    h, _ = tiny.MODEL.hidden(tiny.base(), Tokens(*map(jnp.asarray, (ids, one, at, none, none, none))))
    logits = np.asarray(tiny.MODEL.logits(tiny.MODEL.head(tiny.base()), h)[0, -1], np.float64)
    p = np.exp(logits - logits.max())
    letters = [tok.encode(x, add_special_tokens=False)[0] for x in "ABCDEFGH"[: len(choices)]]
    return p[letters] / p[letters].sum(), p[letters] / p.sum()


def test_questions_of_every_type_are_answered_by_the_models_logits(running):
    body = {"model": "base", "input": INPUT, "questions": [PREDICATE, CHOICE, SCORE]}
    status, found, _ = running.send("POST", "/v1/decisions", body)
    assert status == 200 and found["model"] == "base"
    damaged, department, severity = found["answers"]
    p, _ = read_by_hand(f"{INPUT}\n\n{PREDICATE['instructions']}", ["yes", "no"])
    assert damaged == {"type": "predicate", "name": "damaged", "probability": pytest.approx(p[0], rel=1e-4)}
    p, whole = read_by_hand(f"{INPUT}\n\n{CHOICE['instructions']}", ["user", "model: rank"])
    assert department == {
        "type": "choice",
        "name": "department",
        "choice": ("user", "model")[p.argmax()],
        "probabilities": [
            {"value": "user", "probability": pytest.approx(p[0], rel=1e-4)},
            {"value": "model", "probability": pytest.approx(p[1], rel=1e-4)},
        ],
        "confidence": pytest.approx(whole.max(), rel=1e-3),
    }
    p, _ = read_by_hand(f"{INPUT}\n\n{SCORE['instructions']}", ["a", "b", "c"])
    assert severity["score"] == pytest.approx(p[1] + 2 * p[2], rel=1e-4) and severity["name"] is None
    assert [(x["value"], x["label"]) for x in severity["probabilities"]] == [
        (0, "a"), (1, "b"), (2, "c")
    ]  # fmt: skip
    usage = found["usage"]
    assert usage["output_tokens"] == 3 and usage["total_tokens"] == usage["input_tokens"] + 3
    running.idle()


def test_messages_are_read_as_their_text_and_every_choice_has_a_probability(running):
    parts = [{"role": "user", "content": [{"type": "input_text", "text": INPUT}], "type": "message"}]
    many = {**CHOICE, "choices": [{"value": value} for value in "wxyz"]}
    del many["name"]
    as_text = {"model": "polite", "input": INPUT, "questions": [many]}
    found = [running.send("POST", "/v1/decisions", x)[1] for x in (as_text, {**as_text, "input": parts})]
    assert found[0] == found[1] and found[0]["answers"][0]["name"] is None
    p = [x["probability"] for x in found[0]["answers"][0]["probabilities"]]
    assert len(p) == 4 and min(p) > 0 and sum(p) == pytest.approx(1)
    if hasattr(running.client(), "decisions"):  # openai from 3.26 on
        assert running.client().decisions.create(**as_text).answers[0].choice
    assert running.send("POST", "/v1/decisions", {**as_text, "model": "none"})[0] == 404
    long = running.send("POST", "/v1/decisions", {**as_text, "input": "word " * 500})
    assert long[0] == 400 and "--max-prompt" in long[1]["error"]["message"]
    assert long[1]["error"]["message"].startswith("questions[0]: ")


@pytest.mark.parametrize(
    "change, message",
    [
        ({"questions": [{"type": "choice"}]}, "instructions"),
        ({"input": None}, "input must be a string"),
        ({"input": [{"role": "assistant", "content": "x"}]}, "role user"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input_text"),
        ({"questions": []}, "1 to 64"),
        ({"questions": [{"type": "box"}]}, "type='box' is not possible; use predicate, choice, score"),
        ({"questions": [{"type": []}]}, "type=[] is not possible"),
        ({"questions": [{"instructions": "x"}]}, "type is missing; use predicate, choice, score"),
        ({"questions": ["abc"]}, "questions[0] must be an object, got 'abc'"),
        ({"questions": [{"type": "predicate"}]}, "instructions"),
        ({"questions": [{**PREDICATE, "choices": []}]}, "unknown field 'choices'"),
        ({"questions": [{**CHOICE, "choices": [{"value": "a"}]}]}, "2 to 26 choices"),
        ({"questions": [{**CHOICE, "choices": [{"value": str(i)} for i in range(27)]}]}, "2 to 26 choices"),
        ({"questions": [{**CHOICE, "choices": [{"value": "a"}, {"value": "a"}]}]}, "the value 'a'"),
        ({"questions": [{**CHOICE, "choices": ["a", "b"]}]}, "questions[0].choices[0]"),
        ({"questions": [{**SCORE, "levels": [{"label": str(i)} for i in range(11)]}]}, "at most 10 levels"),
        ({"stream": True}, "unknown field 'stream'"),
    ],
)
def test_a_wrong_request_is_refused_in_one_line(change, message):
    with pytest.raises(ApiError) as error:
        body = {"model": "base", "input": INPUT, "questions": [PREDICATE], **change}
        parse_decisions(body, DecisionPrompts())
    assert error.value.status == 400 and message in error.value.message and "\n" not in error.value.message


def test_vllms_documented_request_is_read_as_three_questions():
    # docs/serving/online_serving/decisions.md of vLLM
    found = parse_decisions(
        {
            "model": "Qwen/Qwen3-0.6B",
            "input": "The package arrived with a broken screen.",
            "questions": [
                {"type": "predicate", "name": "damaged",
                 "instructions": "Does the customer report a damaged item?"},
                {"type": "choice", "name": "department",
                 "instructions": "Which department should handle this complaint?",
                 "choices": [{"value": "returns"}, {"value": "billing"}]},
                {"type": "score", "instructions": "How severe is the damage?",
                 "levels": [{"label": "cosmetic"}, {"label": "broken"}]},
            ],
        },
        DecisionPrompts(),
    )  # fmt: skip
    assert [(x.type, x.name) for x in found] == [
        ("predicate", "damaged"), ("choice", "department"), ("score", None)
    ]  # fmt: skip
    assert found[1].decision.messages[-1]["content"] == (
        "The package arrived with a broken screen.\n\nWhich department should handle this complaint?\n\n"
        "Answer with one of these choices:\nchoice#A returns\nchoice#B billing"
    )


def test_a_classifier_is_asked_for_its_own_labels():
    known = DecisionPrompts(("bad", "good"), "Is it good?")
    own, other = parse_decisions(
        {"input": "x", "questions": [{"type": "choice", "name": "n"}, CHOICE]}, known
    )
    row = parse(Row("r:1", {"text": "x", "label": 0}), "label", RowSettings(**vars(known)))
    assert own.decision.messages == row.messages and own.decision.choices == row.choices
    assert [x.value for x in other.decision.choices] == ["user", "model"]


def test_documents_are_ranked_by_the_probability_of_yes(running):
    body = {"model": "base", "query": "rank", "documents": ["a", {"text": "b"}], "top_n": 1}
    with pytest.raises(ApiError, match="query"):
        parse_rerank({**body, "query": ""}, DecisionPrompts())
    wrong = ({"top_n": 0}, {"return_documents": "no"}, {"instruction": 3})
    for change in ({"documents": []}, {"documents": ["a", 3]}, {"top_n": "x"}, {"max": 3}, *wrong):
        with pytest.raises(ApiError, match=next(iter(change))):
            parse_rerank({**body, **change}, DecisionPrompts())
    found = parse_rerank(body, DecisionPrompts(question="Find it"))
    row = parse(
        Row("r", {"query": "rank", "document": "b", "label": 1}), "reranker", RowSettings(question="Find it")
    )
    assert found.decisions[1].messages == row.messages and found.decisions[1].answers == row.answers
    own = parse_rerank({**body, "instruction": "Look"}, DecisionPrompts(question="Find it"))
    row = parse(Row("r", {"query": "rank", "document": "b", "label": 1, "instruction": "Look"}), "reranker")
    assert own.decisions[1].messages == row.messages
    bare = parse_rerank({**body, "top_n": None, "return_documents": False}, DecisionPrompts())
    assert ranked("m", bare, [0.2, 0.7], 9)["results"] == [
        {"index": 1, "relevance_score": 0.7}, {"index": 0, "relevance_score": 0.2}
    ]  # fmt: skip
    answer = ranked("m", found, [0.2, 0.7], 9)
    assert answer["results"] == [{"index": 1, "document": {"text": "b"}, "relevance_score": 0.7}]
    assert answer["usage"] == {"prompt_tokens": 9, "total_tokens": 9}
    refused = running.send("POST", "/v1/rerank", body)  # its tokenizer has no token yes
    assert refused[0] == 400 and "one token" in refused[1]["error"]["message"]
