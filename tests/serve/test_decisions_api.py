"""/v1/decisions: vLLM's documented request, answered with the probabilities of the model's own logits."""

import jax.numpy as jnp
import numpy as np
import pytest
import tiny_served as tiny
from running_server import Running

from jaxft.batch import Tokens
from jaxft.serve.decisions_api import parse_decisions
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


def test_vllms_documented_request_is_answered_by_the_models_logits(running):
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


@pytest.mark.parametrize(
    "change, message",
    [
        ({"input": None}, "input must be a string"),
        ({"input": [{"role": "assistant", "content": "x"}]}, "role user"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input_text"),
        ({"questions": []}, "1 to 64"),
        ({"questions": [{"type": "box"}]}, "predicate, choice, score"),
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
        parse_decisions({"model": "base", "input": INPUT, "questions": [PREDICATE], **change})
    assert error.value.status == 400 and message in error.value.message and "\n" not in error.value.message
