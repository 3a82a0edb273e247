"""Settings of chat templates: arguments, thinking, system messages, and remedies for rejected rows."""

import json
import re
from pathlib import Path

import pytest
from chat_templates import TEMPLATES, TOOLS, stock_tokenizer
from parsed_rows import examples

from jaxft.data.chat import loss_mask
from jaxft.data.chat.template import settings_for
from jaxft.data.pairs import PairRows
from jaxft.data.prompts import Prompts, read_prompts
from jaxft.data.row_settings import TemplateSettings
from jaxft.data.rows.example import Chat
from jaxft.data.rows.row_files import Row
from jaxft.data.sft import Rows
from jaxft.rl.reward_models import with_response
from jaxft.runs.run_record import permitted_changes
from jaxft.runs.settings.setting_values import describe, parse_value
from jaxft.train.evaluate.scored_completions import make_last_turn

EOS = "<｜end▁of▁sentence｜>"
NO_THINKING = ("enable_thinking=false",)


def turn(role, content, **more):
    return {"role": role, "content": content, **more}


def call(**more):
    return turn("assistant", None, tool_calls=[{"function": {"name": "rank", "arguments": {}}, **more}])


S, Q, A = turn("system", "s"), turn("user", "q"), turn("assistant", "a")


def render(name, *messages, settings=None, loss_on="assistant", **more):
    template = loss_mask.template_of(stock_tokenizer(name), settings or TEMPLATES[name].settings)
    example = Chat("r:1", messages, len(messages) - 1, **more)
    rendered = loss_mask.render(example, template, loss_on)
    return rendered.text, [rendered.text[a:b] for a, b in rendered.learned]


@pytest.mark.parametrize("data", (Rows, PairRows, Prompts))
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"chat_template_kwargs": ("thinking",)}, "must be of the form name=value, for example"),
        ({"chat_template_kwargs": ("a b=1",)}, "enable_thinking=false, got 'a b=1'"),
        ({"chat_template_kwargs": ("a=1", "a=2")}, "data.chat_template_kwargs: a is set twice"),
        ({"chat_template_kwargs": ("tools=[]",)}, "jaxft sets tools itself"),
        ({"system": "user"}, "data.system='user'; use one of turn, merge"),
        ({"chat_template_kwargs": ("a=1",), "format": "plain"}, "data.format=plain renders no chat template"),
        ({"system": "merge", "format": "plain"}, "data.format=plain renders no chat template"),
    ],
)
def test_settings_that_cannot_be_are_one_line(data, options, message):
    with pytest.raises(ValueError, match=re.escape(message)) as raised:
        data("x", **options)
    assert "\n" not in str(raised.value)


def test_arguments_are_written_as_names_and_values_on_the_command_line():
    text = 'enable_thinking=False,mood=none,count=3,who=the cat,url=a=b,x={"k": 1}'
    arguments = TemplateSettings(chat_template_kwargs=parse_value(text, tuple[str, ...])).arguments
    assert arguments == {
        "enable_thinking": False, "mood": None, "count": 3, "who": "the cat", "url": "a=b", "x": {"k": 1},
    }  # fmt: skip


def test_an_argument_that_the_template_does_not_read_is_an_error_that_names_the_nearest():
    unread = TemplateSettings(chat_template_kwargs=("enable_thinkin=false",))
    with pytest.raises(ValueError, match="stock/qwen3 does not read 'enable_thinkin' .near: enable_thinking"):
        loss_mask.template_of(stock_tokenizer("qwen3"), unread)
    with pytest.raises(ValueError, match="does not read 'enable_thinking'"):
        loss_mask.template_of(stock_tokenizer("chatml"), TemplateSettings(chat_template_kwargs=NO_THINKING))


def test_another_models_template_gets_the_arguments_that_it_reads():
    run = TemplateSettings("01 Jan 2025", ("enable_thinking=false", "mode=x"), "merge")
    own = TemplateSettings("01 Jan 2025", ("enable_thinking=false",), "merge")
    assert settings_for(stock_tokenizer("qwen3"), run) == own
    prompt = Chat("r:1", (Q,), 1)
    judged = with_response(prompt, "so")
    ((ids, *_),) = loss_mask.tokenise_examples([judged], stock_tokenizer("qwen3"), loss_mask.NOTHING, own)
    assert stock_tokenizer("qwen3").decode(ids).endswith("<think>\n\n</think>\n\nso<|im_end|>\n")


@pytest.mark.parametrize("old", ({}, {"chat_template_kwargs": NO_THINKING}, {"system": "merge"}))
def test_a_resumed_run_keeps_its_template_settings(tmp_path, old):
    record, other = (
        {"data": describe(Rows("x", **options))} for options in (old, {"chat_template_kwargs": ("a=1",)})
    )
    assert permitted_changes(tmp_path, json.loads(json.dumps(record)), record) == []
    with pytest.raises(ValueError, match=r"data.chat_template_kwargs: \[.*\] -> \['a=1'\]"):
        permitted_changes(tmp_path, record, other)


def test_a_record_has_no_signature_of_a_url_and_every_text_of_a_prompt():
    url = "https://host/x.parquet?sig=SECRET"
    data = describe(Rows(f"my rows/a.jsonl:2,{url}", held_out=url, chat_template_kwargs=(f"link={url}",)))
    assert data["train"] == "my rows/a.jsonl:2,https://host/x.parquet?***"
    assert data["chat_template_kwargs"] == [f"link={url}"]
    others = {"line": (f"model={url} general={url}", f"data={url}"), url: Path("a")}
    assert "SECRET" not in str([data["held_out"], describe(others)])


def test_a_run_resumes_with_another_signature_of_its_url_and_not_with_another_path(tmp_path):
    old = {"data": {"train": "https://host/x.parquet?sig=1"}}  # of an earlier version, as it was given
    for train, changes in (("https://host/x.parquet?sig=2", 0), ("https://host/y.parquet?sig=1", 1)):
        record = {"data": {"train": describe(train)}}
        if not changes:
            assert permitted_changes(tmp_path, old, record) == []
            continue
        with pytest.raises(ValueError, match=r"data.train: .*x.parquet\?\*\*\*' -> .*y.parquet"):
            permitted_changes(tmp_path, old, record)


# ---- thinking: what is learned is what is rendered


def thinking(thought, answer, key):
    if key:
        return turn("assistant", answer, reasoning_content=thought)
    return turn("assistant", f"<think>\n{thought}\n</think>\n\n{answer}")


@pytest.mark.parametrize("key", (True, False))
def test_qwen3_learns_the_thinking_of_the_last_turn_and_cuts_that_of_earlier_ones(key):
    messages = (Q, thinking("why", "one", key), Q, thinking("how", "two", key))
    part = "the reasoning_content" if key else "the thinking block"
    hides = (
        "^r:1: the chat template of stock/qwen3 misrenders a turn that is trained on: "
        f"it does not show {part} of message 1"
    )
    with pytest.raises(ValueError, match=f"{hides}, .*data.loss_on=completion"):
        render("qwen3", *messages)
    text, learned = render("qwen3", *messages, loss_on="completion")
    assert learned == ["<think>\nhow\n</think>\n\ntwo<|im_end|>"]
    assert "<|im_start|>assistant\none<|im_end|>" in text and "why" not in text


def test_without_thinking_the_empty_block_is_part_of_the_prompt():
    off = TemplateSettings(chat_template_kwargs=NO_THINKING)
    assert render("qwen3", Q, A)[1] == ["<think>\n\n</think>\n\na<|im_end|>"]
    assert render("qwen3", Q, A, settings=off)[1] == ["a<|im_end|>"]
    assert render("qwen3", Q, A, arguments={"enable_thinking": False})[1] == ["a<|im_end|>"]
    on = {"enable_thinking": True}  # of a row, which overrides the run's
    assert render("qwen3", Q, A, settings=off, arguments=on)[1] == ["<think>\n\n</think>\n\na<|im_end|>"]
    assert render("qwen3", Q, A, Q, A, settings=off)[1] == ["a<|im_end|>"] * 2
    (prompt,) = loss_mask.example_prompt_ids([Chat("r:1", (Q,), 1)], stock_tokenizer("qwen3"), off)
    assert stock_tokenizer("qwen3").decode(prompt).endswith("assistant\n<think>\n\n</think>\n\n")


def test_a_samples_prompt_is_printed_as_the_question_alone():
    last_turn = make_last_turn(stock_tokenizer("qwen3"))
    for settings in (TemplateSettings(), TemplateSettings(chat_template_kwargs=NO_THINKING)):
        prompt = Chat("r:1", (Q, A, turn("user", "why?")), 3)
        (ids,) = loss_mask.example_prompt_ids([prompt], stock_tokenizer("qwen3"), settings)
        assert last_turn(stock_tokenizer("qwen3").decode(ids)) == "why?"
    assert last_turn("why?") is None


@pytest.mark.parametrize("name", ("deepseek-r1", "deepseek-r1-distill"))
def test_deepseek_r1_hides_the_thinking_of_every_turn(name):
    answer = turn("assistant", "<think>\nwhy\n</think>\n\none")
    with pytest.raises(ValueError, match=f"stock/{name} misrenders .* the thinking block of message 1"):
        render(name, Q, answer, loss_on="completion")
    text, learned = render(name, Q, answer, Q, A, loss_on="completion")
    assert learned == [f"a{EOS}"] and "why" not in text


def test_markers_that_enclose_the_header_of_a_turn_do_not_make_it_a_target():
    assert render("smollm3", Q, A, Q, A)[1] == ["a<|im_end|>"] * 2
    assert "<think>" in render("smollm3-no-thinking", Q, A)[0]
    assert render("smollm3-no-thinking", Q, A, Q, A)[1] == ["a<|im_end|>"] * 2


# ---- rows that a template rejects, and the remedy


@pytest.mark.parametrize(
    ("name", "messages", "message"),
    [
        ("gemma", (S, Q, A), "System role not supported; set data.system=merge, which prepends"),
        ("mistral", (S, Q, A), "only user, assistant and tool roles; set data.system=merge"),
        ("gemma3", (S, Q, Q, A), "must alternate .*; messages 1 and 2 are both user turns; join them"),
        ("mistral-nemo", (Q, A, A), "must alternate; messages 1 and 2 are both assistant turns; join them"),
        ("mistral-7b-v0.3", (A, Q, A), "must alternate; the conversation begins with an assistant turn"),
        ("mistral-nemo", (Q, call(id="call_1"), A), "length 9!; give every tool call an id of 9 letters"),
        ("mistral-small", (Q, call(), A), "length 9!; give every tool call an id of 9 letters and digits"),
        (
            "mistral-7b-v0.3",
            (Q, call(id="a" * 9), turn("tool", "3"), A),
            "length 9!; give every tool call an id of 9 letters and digits, and its result the same id",
        ),
    ],
)
def test_a_rejected_row_is_one_line_with_the_reason_and_the_remedy(name, messages, message):
    line = f"^r:1: the chat template of stock/{name} rejects the row: .*{message}"
    with pytest.raises(ValueError, match=line) as raised:
        render(name, *messages, tools=TOOLS if "tool_calls" in messages[1] else None)
    assert "\n" not in str(raised.value)


def test_ids_of_nine_characters_are_rendered_with_the_result():
    text, learned = render(
        "mistral-nemo", Q, call(id="Ab3" * 3), turn("tool", "3", tool_call_id="Ab3" * 3), A
    )
    assert learned == ['[TOOL_CALLS][{"name": "rank", "arguments": {}, "id": "Ab3Ab3Ab3"}]</s>', "a</s>"]
    assert '[TOOL_RESULTS]{"content": 3, "call_id": "Ab3Ab3Ab3"}[/TOOL_RESULTS]' in text


def test_a_calls_text_that_occurs_again_in_the_results_header_does_not_move_its_end():
    quoted = {"function": {"name": "rank", "arguments": {"of": 't"'}}, "id": "Ab3" * 3}
    calling, result = turn("assistant", None, tool_calls=[quoted]), turn("tool", "3", tool_call_id="Ab3" * 3)
    _, learned = render("mistral-nemo", Q, calling, result, A, turn("user", "why?"), A, tools=TOOLS)
    shown = '{"name": "rank", "arguments": {"of": "t\\""}, "id": "Ab3Ab3Ab3"}'
    assert learned == [f"[TOOL_CALLS][{shown}]</s>", "a</s>", "a</s>"]  # content" has t" too


def test_arguments_are_json_text_for_a_template_that_concatenates_them():
    function = {"name": "rank", "arguments": {"of": "é"}}
    row = {"messages": [Q, turn("assistant", None, tool_calls=[{"type": "function", "function": function}])]}
    (example,) = examples([Row("r:1", row)])
    template = loss_mask.template_of(stock_tokenizer("deepseek-r1"))
    rendered = loss_mask.render(example, template)
    assert rendered.text.endswith(
        'rank\n```json\n{"of": "é"}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>' + EOS
    )


def write(path, row):
    path.write_text(json.dumps(row) + "\n")
    return str(path)


def test_a_system_message_that_gemma_has_no_role_for_is_merged_at_every_stage(tmp_path):
    tokenizer = stock_tokenizer("gemma")
    pair = {"prompt": [S, Q], "completion": "a", "chosen": "a", "rejected": "b"}
    path = write(tmp_path / "r.jsonl", pair)
    asked = "<s><start_of_turn>user\ns\n\nq<end_of_turn>\n<start_of_turn>model\n"
    for kind in (Rows, PairRows, Prompts):
        with pytest.raises(ValueError, match="r.jsonl:1: .*stock/gemma rejects the .* set data.system=merge"):
            open_rows(kind(path, held_out=None, batch=1), tokenizer, tmp_path)
        merged = kind(path, held_out=None, batch=1, system="merge")
        assert asked in open_rows(merged, tokenizer, tmp_path)


def open_rows(data, tokenizer, cache):
    """The first row as text, as the start of a run prints it."""
    if isinstance(data, Prompts):
        return tokenizer.decode(read_prompts(data.train, data.reader(tokenizer, cache)).token_ids[0])
    return data.open(tokenizer, cache=cache).info.preview


@pytest.mark.parametrize("name", ("mistral-7b-v0.3", "mistral-nemo"))
def test_a_system_message_that_training_drops_is_a_warning_and_merging_it_is_the_remedy(name, tmp_path):
    rows = [{"messages": [Q, A]}, {"messages": [S, Q, A]}]
    (tmp_path / "r.jsonl").write_text("\n".join(map(json.dumps, rows)))
    data = Rows(str(tmp_path / "r.jsonl"), held_out=None)
    (warning,) = data.open(stock_tokenizer(name), cache=tmp_path).info.warnings
    assert warning.startswith(f"warning: r.jsonl:2: the chat template of stock/{name} ends a prompt with 's")
    assert warning.endswith("set data.system=merge: this template moves or drops the system message")
    merged = Rows(data.train, held_out=None, system="merge")
    source = merged.open(stock_tokenizer(name), cache=tmp_path)
    assert not source.info.warnings and "s\n\nq[/INST]" in stock_tokenizer(name).decode(
        source.batch(0)[0].ids[0, 0]
    )


@pytest.mark.parametrize("kind", (Rows, PairRows))
def test_a_message_that_the_template_drops_is_a_warning(kind, tmp_path):
    tokenizer = TEMPLATES["chatml"].tokenizer()
    shown = tokenizer.chat_template
    no_system = shown.replace("in messages", "in messages if m.role != 'system'")
    no_question = shown.replace("m['content']", "(m['content'] if m.role == 'assistant' else '...')")
    row = {"prompt": [Q], "completion": "a", "chosen": "a", "rejected": "b"}
    rows = [{"prompt": 7}, row, {**row, "system": "French", "chosen": "c"}]  # the first is invalid
    (tmp_path / "r.jsonl").write_text("\n".join(map(json.dumps, rows)))
    data = kind(str(tmp_path / "r.jsonl"), held_out=None, batch=1, invalid="drop", invalid_limit=0.5)
    for template, expected in (
        (shown, []),
        (no_system, ["r.jsonl:3: .* content of message 0, a system message, .*; set data.system=merge"]),
        (
            no_question,
            ["r.jsonl:2: .* message 0, a user message", "r.jsonl:3: .* 0, a system message, .*; use a"],
        ),
    ):
        tokenizer.chat_template = template
        warnings = data.open(tokenizer, cache=tmp_path).info.warnings
        assert len(warnings) == len(expected), warnings
        assert all(re.search(line, warning) for line, warning in zip(expected, warnings, strict=True))
