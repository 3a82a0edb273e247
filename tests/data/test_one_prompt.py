"""One row has one prompt: SFT, preferences, reward models, rollouts and generation start a response from
the same token ids.
"""

import importlib.util
import json
import sys
from argparse import Namespace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_tokenizers import tiny

from jaxft.data.chat import loss_mask
from jaxft.data.pairs import PairRows
from jaxft.data.prompts import Prompts, read_prompts
from jaxft.data.row_settings import DATE
from jaxft.data.rows.example import Chat, Completion
from jaxft.data.rows.format_choice import prompt_of
from jaxft.data.rows.row_files import Row
from jaxft.data.sft import Rows
from jaxft.rl.reward_models import with_response
from jaxft.runs.loaded_weights import prompt_settings, template_settings

SHOWS_ALL = (  # a template that renders the system message, tools, tool calls and an argument of its own
    "{% if mood is defined %}{{ '<|im_start|>mood\n' + mood + '<|im_end|>\n' }}{% endif %}"
    "{% if tools %}{{ '<|im_start|>tools\n' + (tools | tojson) + '<|im_end|>\n' }}{% endif %}"
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + (m.content or '') }}"
    "{% if m.tool_calls %}{{ m.tool_calls | tojson }}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}]
CALL = {
    "role": "assistant",
    "content": "",
    "tool_calls": [{"function": {"name": "add", "arguments": {"a": 1}}}],
}
WORDS = (
    st.text(st.sampled_from("abc what rank? 12\n\té 漢🙂"), min_size=1, max_size=20)
    .map(str.strip)
    .filter(bool)
)


@cache
def showing_all():
    tokenizer = tiny.__wrapped__("chatml")
    tokenizer.chat_template = SHOWS_ALL
    return tokenizer


@cache
def script(name):
    """A script as a module."""
    path, before = Path(__file__).resolve().parents[2] / "scripts" / f"{name}.py", list(sys.path)
    spec = importlib.util.spec_from_file_location(f"script_{name}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.path[:] = before
    return module


def turn(role, content):
    return {"role": role, "content": content}


def sharegpt(turns):
    return [{"from": m["role"], "value": m["content"]} for m in turns]


@st.composite
def conversations(draw):
    """Turns that end with the user's, some with a system message, some with a tool call and its result."""
    turns = [turn("system", draw(WORDS))] if draw(st.booleans()) else []
    for _ in range(draw(st.integers(0, 2))):
        turns += [turn("user", draw(WORDS)), turn("assistant", draw(WORDS))]
    turns.append(turn("user", draw(WORDS)))
    if draw(st.booleans()):
        turns += [CALL, turn("tool", draw(WORDS))]
        turns += [turn("assistant", draw(WORDS)), turn("user", draw(WORDS))] if draw(st.booleans()) else []
    return turns


@st.composite
def responses(draw, prompt):
    """A completion, a chosen and a rejected response, of different or the same kinds."""
    texts = [f"{letter}{draw(WORDS)}" for letter in "abc"]

    def one(text):
        last = turn("assistant", text)
        return draw(st.sampled_from([text, last, [last], *([[*prompt, last]] if prompt else [])]))

    return dict(zip(("completion", "chosen", "rejected"), map(one, texts), strict=True))


@st.composite
def rows(draw):
    """Rows that SFT, DPO and a rollout all take."""
    turns = draw(conversations())
    question, system = draw(WORDS), {"system": draw(WORDS)} if draw(st.booleans()) else {}
    extra = {"tools": draw(st.sampled_from([TOOLS, json.dumps(TOOLS)]))} if draw(st.booleans()) else {}
    extra |= {"chat_template_kwargs": {"mood": draw(WORDS)}} if draw(st.booleans()) else {}
    plain_turns = [m for m in turns if m["role"] in ("user", "assistant") and "tool_calls" not in m]
    kind = draw(st.integers(0, 5))
    if kind == 0:
        return {"prompt": question, **draw(responses(None)), **system, **extra}
    if kind == 1:
        own = {} if turns[0]["role"] == "system" else system
        return {"prompt": turns, **draw(responses(turns)), **own, **extra}
    if kind == 2:  # a string that whole conversations contain
        turns = [*turns, *([turn("user", question)] if turns[-1]["role"] != "user" else [])]
        whole = {c: [*turns, turn("assistant", c)] for c in ("completion", "chosen", "rejected")}
        return {"prompt": turns[-1]["content"], **whole, **extra}
    if kind == 3:
        names = {"user": "Human", "assistant": "Assistant"}
        said = "".join(f"\n\n{names[m['role']]}: {m['content']}" for m in plain_turns)
        texts = {c: f" {c}" for c in ("completion", "chosen", "rejected")}
        return {"prompt": said + "\n\nAssistant:", **texts, **system, **extra}
    if kind == 4:
        given = {"input": draw(WORDS)} if draw(st.booleans()) else {}
        given |= {"history": [["q", "a"]]} if draw(st.booleans()) else {}
        return {
            "instruction": question,
            "output": "a",
            "chosen": "b",
            "rejected": "c",
            **given,
            **system,
            **extra,
        }
    messages = [*turns, turn("assistant", "a")]
    if any("tool_calls" in m for m in turns) or draw(st.booleans()):
        return {"messages": messages, "label": draw(st.booleans()), **extra}
    return {"conversations": sharegpt(messages), "kto_tag": True, **extra}


def generated_ids(args, record, tokenizer):
    """Token ids of the prompts of generate.py. record: config.json of the run."""
    generate = script("generate")
    data = generate.prompt_options(args, record)
    prompts = [prompt for _, prompt in generate.prompts_of(args, data)]
    return list(loss_mask.example_prompt_ids(prompts, tokenizer, template_settings(data)))


def prompts_by_stage(folder, row, tokenizer, **options):
    """{stage: token ids of the row's prompt}."""
    path = folder / "rows.jsonl"
    path.write_text(json.dumps(row) + "\n")
    long = {"max_length": 4096, **options}
    sft = Rows("x", loss_on="completion", **long).reader(tokenizer, folder).read(str(path))
    dpo = PairRows("x", **long).reader(tokenizer, folder).read(str(path))
    rollouts = Prompts(str(path), max_prompt=4096, **options).reader(tokenizer, folder)
    rollout = read_prompts(str(path), rollouts).select([0])
    record = {"data": {"format": "auto", "date": DATE, **options}}
    args = Namespace(
        raw=False, prompt=[], file=str(path), columns=None, chat_template_kwargs=None, system=None
    )
    generated = generated_ids(args, record, tokenizer)
    judged = with_response(rollout.prompts[0], "so")
    ((whole, *_),) = loss_mask.tokenise_examples([judged], tokenizer, "all", rollout.template)
    (ids,) = rollout.ids
    return {
        "rollout": list(ids),
        "SFT": sft.ids[: np.asarray(sft.learned).argmax()].tolist(),
        "DPO": dpo.piece(0, 0).tolist(),
        "generation": generated[0],
        "reward model": whole[: len(ids)].tolist(),
    }


@pytest.mark.slow
@settings(max_examples=120, deadline=None)
@given(row=rows())
def test_a_row_has_one_prompt_at_every_stage(tmp_path_factory, row):
    found = prompts_by_stage(tmp_path_factory.mktemp("one"), row, showing_all())
    assert len(set(map(tuple, found.values()))) == 1, found
    text = showing_all().decode(found["SFT"])
    shown = [
        row.get("system"),
        row.get("chat_template_kwargs", {}).get("mood"),
        "add" if "tools" in row else None,
    ]
    assert all(part in text for part in shown if part) and text.endswith("<|im_start|>assistant\n")


@settings(max_examples=30, deadline=None)
@given(row=rows())
def test_template_settings_of_a_run_reach_every_stage_and_a_row_overrides_its_arguments(
    tmp_path_factory, row
):
    options = {"chat_template_kwargs": ("mood=calm",), "system": "merge"}
    found = prompts_by_stage(tmp_path_factory.mktemp("one"), row, showing_all(), **options)
    assert len(set(map(tuple, found.values()))) == 1, found
    text = showing_all().decode(found["SFT"])
    mood = row.get("chat_template_kwargs", {}).get("mood", "calm")
    assert text.startswith(f"<|im_start|>mood\n{mood}<|im_end|>\n")
    assert "<|im_start|>system" not in text and (row.get("system") or "") in text


@settings(max_examples=30, deadline=None)
@given(question=WORDS, system=st.none() | WORDS)
def test_without_a_template_an_instruction_has_one_prompt_too(tmp_path_factory, question, system):
    row = {"prompt": question, "completion": "a", "chosen": "b", "rejected": "c"}
    row |= {"system": system} if system else {}
    found = prompts_by_stage(tmp_path_factory.mktemp("one"), row, tiny("none"))
    assert len(set(map(tuple, found.values()))) == 1, found
    before = f"{system}\n\n" if system else ""
    expected = f"<s>{before}### Instruction:\n{question}\n\n### Response:\n"
    assert tiny("none").decode(found["DPO"]) == expected


@settings(max_examples=30, deadline=None)
@given(question=WORDS)
def test_plain_strings_have_one_prompt_too(tmp_path_factory, question):
    row = {"prompt": f"{question}\n", "completion": "a", "chosen": "b", "rejected": "c"}
    found = prompts_by_stage(tmp_path_factory.mktemp("one"), row, tiny("llama3"), format="plain")
    assert len(set(map(tuple, found.values()))) == 1, found
    assert tiny("llama3").decode(found["SFT"]) == f"<|begin_of_text|>{question}\n"


def test_score_reads_prompts_as_the_reward_model_was_trained():
    data = {"format": "plain", "date": "01 Jan 2025", "batch": 3}
    assert prompt_settings({"data": data}) == {"format": "plain", "date": "01 Jan 2025", "columns": ()}
    implicit = prompt_settings({"data": {**data, "format": "implicit"}})
    assert implicit == {"date": "01 Jan 2025", "columns": ()}
    assert prompt_settings(None) == {"columns": ()}
    recorded = {"chat_template_kwargs": ["mood=calm"], "system": "merge"}  # as config.json has them
    assert prompt_settings({"data": recorded}) == {
        "columns": (),
        "chat_template_kwargs": ("mood=calm",),
        "system": "merge",
    }


def generated(tmp_path, row, record, **options):
    """What generate.py makes of a row of --file, as text."""
    path = tmp_path / "g.jsonl"
    path.write_text(json.dumps(row))
    names = dict.fromkeys(("columns", "chat_template_kwargs", "system"))
    args = Namespace(raw=False, prompt=[], file=str(path), **{**names, **options})
    return showing_all().decode(generated_ids(args, record, showing_all())[0])


def test_generate_reads_columns_as_the_run_does_and_its_options_replace_those_of_the_run(tmp_path):
    data = {
        "date": DATE,
        "columns": ["prompt=question", "completion=reply"],
        "chat_template_kwargs": ["mood=a"],
    }
    row, record = {"question": "q", "other": "o", "system": "s"}, {"data": data}
    asked = "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n"
    system = "<|im_start|>system\ns<|im_end|>\n"
    assert generated(tmp_path, row, record) == f"<|im_start|>mood\na<|im_end|>\n{system}{asked}"
    assert generated(tmp_path, {"prompt": "q"}, {"data": data | {"chat_template_kwargs": []}}) == asked
    options = {"columns": "prompt=other", "chat_template_kwargs": "mood=b", "system": "merge"}
    merged = "<|im_start|>user\ns\n\no<|im_end|>\n<|im_start|>assistant\n"
    assert generated(tmp_path, row, record, **options) == f"<|im_start|>mood\nb<|im_end|>\n{merged}"
    assert generated(tmp_path, row, None, **options) == f"<|im_start|>mood\nb<|im_end|>\n{merged}"


Q, A = turn("user", "q"), turn("assistant", "a")
LONG = [turn("system", "s"), turn("user", "p"), A, Q]


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"prompt": "q", "system": "s"}, Chat("r", (turn("system", "s"), Q), 2, plain=True)),
        ({"prompt": LONG, "system": "s"}, Chat("r", tuple(LONG), 4)),
        ({"prompt": "q", "chosen": [*LONG, A], "rejected": [*LONG, Q]}, Chat("r", tuple(LONG), 4)),
        ({"chosen": [*LONG, A], "rejected": [*LONG, turn("assistant", "b")]}, Chat("r", tuple(LONG), 4)),
        ({"prompt": "\n\nHuman: q\n\nAssistant:", "system": "s"}, Chat("r", (turn("system", "s"), Q), 2)),
        (
            {"chosen": "\n\nHuman: q\n\nAssistant: a", "rejected": "\n\nHuman: q\n\nAssistant: b"},
            Chat("r", (Q,), 1),
        ),
        ({"messages": [*LONG, A], "prompt": "p"}, Chat("r", tuple(LONG), 4)),  # as SFT reads it
        ({"prompt": "q", "completion": ["x"]}, Chat("r", (Q,), 1, plain=True)),  # a reward's own column
        ({"messages": LONG, "prompt": None}, Chat("r", tuple(LONG), 4)),  # Arrow's null for a missing column
        ({"instruction": "q", "history": [["p", "a"]]}, Chat("r", (turn("user", "p"), A, Q), 3)),
    ],
)
def test_prompts_of_rollouts(fields, expected):
    assert prompt_of(Row("r", fields)) == expected


def test_prompts_of_a_chosen_column_and_of_plain_text():
    row = Row("r", {"prompt": "x", "messages": [Q, A], "chosen": "b", "rejected": "c"})
    assert prompt_of(row, "messages").messages == (Q,)
    assert prompt_of(row, "prompt").messages == (turn("user", "x"),)
    assert prompt_of(row, "plain") == Completion("r", "x", "")


@pytest.mark.parametrize(
    ("fields", "format", "error"),
    [
        (
            {"prompt": "x", "messages": [Q, A], "chosen": "b", "rejected": "c"},
            "auto",
            "r: 'messages' and 'prompt' with 'chosen', 'rejected' have different prompts; choose one with",
        ),
        (
            {"prompt": "q", "completion": [*LONG, A], "chosen": "a", "rejected": "b"},
            "auto",
            "different prompts",
        ),
        ({"prompt": [Q, A]}, "auto", "r: the prompt ends with an assistant turn"),
        ({"prompt": LONG, "system": "t"}, "auto", "column 'system' differs from the first message"),
        ({"prompt": "q", "system": "s"}, "plain", "column 'system' has no meaning in plain text"),
        ({"prompt": "q", "tools": TOOLS}, "plain", "column 'tools' has no meaning in plain text"),
        ({"prompt": [Q]}, "plain", "column 'prompt' must be a string, got list"),
        ({"messages": [Q]}, "prompt", "r: the columns messages include no prompt; add prompt, messages or"),
        (
            {"prompt": "q", "chat_template_kwargs": {"tokenize": True}},
            "auto",
            "column 'chat_template_kwargs' has tokenize, which jaxft or the tokenizer sets",
        ),
        ({"instruction": "q", "history": [["p"]]}, "auto", "column 'history' must be a list of"),
    ],
)
def test_a_row_without_one_prompt_is_one_line(fields, format, error):
    with pytest.raises(ValueError, match=error) as raised:
        prompt_of(Row("r", fields), format)
    assert "\n" not in str(raised.value)


def test_a_conversation_without_a_template_is_refused_by_rollouts_as_by_sft(tmp_path):
    path = tmp_path / "r.jsonl"
    path.write_text(json.dumps({"prompt": LONG}))
    with pytest.raises(ValueError, match="r.jsonl:1: a conversation needs a chat template"):
        read_prompts(str(path), Prompts(str(path)).reader(tiny("none"), tmp_path))
