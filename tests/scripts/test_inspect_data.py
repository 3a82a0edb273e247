"""scripts/inspect_data.py shows exactly the trained tokens of any config, from any folder, and what is wrong
with invalid rows, or fails with one line.
"""

import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from tiny_tokenizers import tiny

from jaxft.data.inspection import token_pieces
from jaxft.runs.settings.config import load_config

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "inspect_data.py"
CONFIGS = sorted(
    path.name for path in (SCRIPT.parents[1] / "configs").glob("*.py") if path.stem != "pretrain"
)
ROWS = {  # one that fits the data of every config
    "rows": {"instruction": "why?", "response": "so"},
    "pairs": {"prompt": "why?", "chosen": "so", "rejected": "no"},
    "prompts": {"prompt": "why?", "answer": "so"},
    "steps": {"prompt": "why?", "completions": ["so"], "labels": [True]},
}
ASSISTANT = "?<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
SHOWN = {
    "rows": [ASSISTANT + "⟦so<|eot_id|>⟧"],
    "pairs": ["prompt: <|begin_of_text|>", ASSISTANT + "\n", " ⟦so<|eot_id|>⟧ ", " ⟦no<|eot_id|>⟧ "],
    "prompts": [ASSISTANT + "\n", "answer='so'"],
    "steps": ["?so⟦"],
}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inspect")
    tiny("llama3").save_pretrained(folder / "model")
    (folder / "model" / "config.json").write_text(json.dumps({"model_type": "llama"}))
    rows = [{"prompt": "what is a rank?", "completion": f" héllo 🙂 {i}"} for i in range(3)]
    (folder / "r.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / "bad.jsonl").write_text('{"prompt": "a", "completion": }')
    return folder


@pytest.fixture
def inspect(place, monkeypatch, capsys):
    """Run the script in this process, in a folder that is not the repository; what it prints."""
    for name, value in {"JAXFT_CACHE": str(place / "cache"), "COLUMNS": "200"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(place)

    def run(*args):
        monkeypatch.setattr(sys, "argv", [str(SCRIPT), *args])
        monkeypatch.setattr(sys, "path", list(sys.path))
        with pytest.raises(SystemExit) as stop:
            runpy.run_path(str(SCRIPT), run_name="__main__")
        out, err = capsys.readouterr()
        err = "".join(
            line for line in err.splitlines(True) if not line.startswith(("tokenising ", "reading "))
        )
        assert stop.value.code == 0 if not err else stop.value.code == 1 and not out, (out, err)
        return out or err

    return run


DATA = ("--model", "model", "max_length=32", "held_out=none", "format=plain")


def test_trained_tokens_are_in_brackets(inspect):
    shown = inspect("--data", "r.jsonl", "--rows", "2", *DATA)
    assert shown.count("⟦") == 2 and "<|begin_of_text|>what is a rank?⟦ héllo 🙂 " in shown
    assert "<|eot_id|>⟧" in shown and "r.jsonl:" in shown and "row length" in shown


def test_loss_on_all_trains_every_token(inspect):
    assert "<|begin_of_text|>⟦what is a rank? héllo 🙂 " in inspect("--data", "r.jsonl", *DATA, "loss_on=all")


def test_colours_on_a_terminal(inspect, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    shown = inspect("--data", "r.jsonl", *DATA)
    assert "\x1b[" in shown and "⟦" not in shown


def test_a_config_s_rows_are_printed_with_its_tokenizer(inspect):
    shown = inspect("--config", "configs/sft.py", "--rows", "1", "data.max_samples=20")
    assert shown.count("⟦") == 1 and "<|im_start|>assistant\n⟦" in shown


# The settings of a recipe for its own model or rows, undone for the tiny model and the rows here.
UNDONE = {
    "qwen3_8b_dpo.py": ["data.chat_template_kwargs="],
    "qwen25_1p5b_grpo.py": ["columns="],
}


@pytest.mark.quick_cases("sft.py", "dpo.py", "kto.py", "reward.py", "grpo.py", "qwen3_8b_dpo.py")
@pytest.mark.parametrize("name", CONFIGS)
def test_every_config_shows_its_rows_with_their_targets_in_brackets(inspect, place, name):
    unit = load_config(f"configs/{name}", ["data=r.jsonl"]).data.unit
    unit = "steps" if name == "process_reward.py" else unit
    rows = [json.dumps(ROWS[unit]).replace("why?", f"why {number}?") for number in range(8)]
    (place / f"{unit}.jsonl").write_text("\n".join(rows))
    shown = inspect(
        "--config",
        f"configs/{name}",
        "--model",
        "model",
        "--rows",
        "2",
        f"data={unit}.jsonl",
        *UNDONE.get(name, []),
    )
    assert all(text in shown for text in SHOWN[unit])
    assert (
        shown.count("⟦") == {"rows": 2, "pairs": 6 if name == "kto.py" else 4, "prompts": 0, "steps": 2}[unit]
    )
    assert shown.count(f"{unit}.jsonl:") == 2 and "no invalid rows" in shown and "lengths" in shown


def test_pretraining_shows_documents_by_their_files_and_learns_every_token(inspect, place):
    (place / "docs" / "more").mkdir(parents=True)
    for number in range(6):
        (place / "docs" / "more" / f"{number}.md").write_text(f"# Why {number}?\n\nso")
    args = ("--config", "configs/pretrain.py", "--model", "model", "--rows", "1")
    shown = inspect(*args, "data=docs", "max_length=512")
    assert re.search(r"\nmore/\d.md:1 and 4 after it: \d+ tokens", shown)
    assert shown.count("⟦") == 1 and shown.count("<|eot_id|># Why ") == 0 < shown.count("⟦# Why ")
    assert "5 examples in 1 rows of 512 tokens" in shown
    assert "format text requires; the row has prompt, completion" in inspect(*args, "data=r.jsonl")


def test_settings_may_follow_options(inspect, place):
    args = ("--config", "configs/sft.py", "--model", "model", "--rows", "1", "data=r.jsonl")
    shown = inspect(*args, "data.loss_on=all").partition("r.jsonl:")[2].partition("largest id")[0]
    assert "56 with loss" in shown
    again = inspect(*args[:4], "data.loss_on=all", *args[4:]).partition("r.jsonl:")[2]
    assert again.partition("largest id")[0] == shown


def test_single_responses_are_shown_by_their_label(inspect, place):
    rows = [{"prompt": f"why {i}?", "completion": "so", "label": i % 2 > 0} for i in range(8)]
    (place / "unpaired.jsonl").write_text("\n".join(map(json.dumps, rows)))
    shown = inspect("--config", "configs/kto.py", "--model", "model", "--rows", "8", "data=unpaired.jsonl")
    for label in ("chosen", "rejected"):
        assert re.search(rf"\n {label} +│ mismatched +\n[^\n]*\n ⟦so<\|eot_id\|>⟧ ", shown), label


def test_the_responses_of_a_pair_are_side_by_side(inspect, place):
    pair = {"prompt": "why?", "chosen": "so " * 9, "rejected": "no " * 9}
    (place / "long.jsonl").write_text(json.dumps(pair))
    args = ("--data", "long.jsonl", "--kind", "pairs", "--model", "model", "held_out=none", "batch=1")
    lines = inspect(*args).splitlines()
    assert any(re.fullmatch(r" chosen +│ rejected +", line) for line in lines)
    assert any(re.fullmatch(r" ⟦(so ?)+<\|eot_id\|>⟧ +│ ⟦(no ?)+<\|eot_id\|>⟧ +", line) for line in lines)


def test_repeated_rows_and_leaked_held_out_rows_are_counted_and_named(inspect, place):
    def row(prompt, response):
        return {"prompt": prompt, "completion": response}

    train = [row("a b", "c"), row("d e", "f"), row("a b", "c"), row("d e", "x"), row("d e", "f")]
    (place / "train.jsonl").write_text("\n".join(map(json.dumps, train)))
    held = [row("d e", "f"), row("a b", "y"), row("new", "z")]
    (place / "held.jsonl").write_text("\n".join(map(json.dumps, held)))
    args = ("--data", "train.jsonl", "--model", "model", "max_length=32", "batch=1", "format=plain")
    shown = inspect(*args, "held_out=held.jsonl")
    found = re.search(
        r"repeat another one: 2; the first is train.jsonl:(\d), equal to train.jsonl:(\d)\n", shown
    )
    assert {found[1], found[2]} in ({"1", "3"}, {"2", "5"})
    assert "training rows with the prompt of another one: 1; the first is train.jsonl:" in shown
    assert "training rows, so that their loss is too low: 1; the first is held.jsonl:1, equal" in shown
    assert "prompt of a training row: 1; the first is held.jsonl:2, as in train.jsonl:1" in shown
    (place / "train.jsonl").write_text("\n".join(map(json.dumps, train[:2])))
    assert "no row repeats another one" in inspect("--data", "train.jsonl", *DATA)


def test_every_row_of_a_mixture_is_compared_once_however_often_an_epoch_has_it(inspect, place):
    for name, count in (("often", 3), ("rare", 9)):
        rows = [json.dumps({"prompt": f"{name} {i}", "completion": f"so {i}"}) for i in range(count)]
        (place / f"{name}.jsonl").write_text("\n".join(rows))
    shown = inspect("--data", "often.jsonl:0.9,rare.jsonl:0.1", *DATA, "batch=2")
    assert "an epoch takes 11 rows from the 3 of often, 1 rows from the 9 of rare" in " ".join(shown.split())
    assert "no row repeats another one" in shown
    every = [arg for number in range(1, 10) for arg in ("--row", f"rare.jsonl:{number}")]
    assert inspect("--data", "often.jsonl:0.9,rare.jsonl:0.1", *every, *DATA).count("⟦") == 9


def test_a_split_row_is_one_row_and_its_name_shows_all_of_its_pieces(inspect, place):
    (place / "texts.jsonl").write_text("\n".join(json.dumps({"text": "ab" * n}) for n in (40, 41)))
    args = ("--data", "texts.jsonl", "too_long=split", *DATA)
    shown = inspect(*args, "--row", "texts.jsonl:1")
    assert "no row repeats another one" in shown  # though its pieces do
    assert shown.count("⟦") == 3 and "texts.jsonl:1: 32 tokens, 31 with loss, piece 2 of the row" in shown
    (place / "texts.jsonl").write_text("\n".join(json.dumps({"text": "ab" * 40}) for _ in range(2)))
    assert "repeat another one: 1; the first is texts.jsonl:2, equal to texts.jsonl:1" in inspect(*args)


def test_concatenated_documents_are_named_after_the_first(inspect, place):
    (place / "a, b.jsonl").write_text("\n".join(json.dumps({"text": "ab" * n}) for n in (2, 3, 4)))
    wrapped = ("too_long=split", "packing=wrapped", "batch=1")
    shown = inspect("--data", "a, b.jsonl", *DATA, *wrapped)
    assert re.search(r"\na, b.jsonl:\d and 2 after it: 24 tokens, 23 with loss, weight 1.0000 of", shown)
    assert re.search(r"\na, b.jsonl:\d: \d+ tokens", inspect("--data", "a, b.jsonl", *DATA))


@pytest.mark.parametrize("kind", ["rows", "pairs", "prompts"])
def test_control_characters_of_rows_do_not_reach_the_terminal(inspect, place, kind):
    evil = json.dumps(ROWS[kind]).replace("so", "\\u001b[31m\\u009b2Jred\\u202e")
    (place / "evil.jsonl").write_text("\n".join(evil.replace("why?", f"why {i}\\u001b?") for i in range(2)))
    kinds = ("--kind", {"rows": "sft"}.get(kind, kind))
    shown = inspect("--data", "evil.jsonl", *kinds, "--model", "model", "held_out=none", "batch=1")
    assert "red" in shown and "why" in shown and not set("\x1b\x9b\u202e") & set(shown)


def test_leaks_are_found_in_pairs_and_prompts_too(inspect, place):
    for kind, options in (("pairs", ("batch=1",)), ("prompts", ("batch=1", "max_prompt=64"))):
        for name, numbers in (("train", (1, 2, 1)), ("held", (2, 3))):
            rows = [json.dumps(ROWS[kind]).replace("why?", f"why {number}?") for number in numbers]
            (place / f"{name}_{kind}.jsonl").write_text("\n".join(rows))
        args = ("--data", f"train_{kind}.jsonl", "--kind", kind, "--model", "model", *options)
        shown = inspect(*args, f"held_out=held_{kind}.jsonl")
        assert f"1; the first is train_{kind}.jsonl:3, equal to train_{kind}.jsonl:1\n" in shown
        assert f"too low: 1; the first is held_{kind}.jsonl:1, equal to train_{kind}.jsonl:2" in shown


def test_lengths_are_those_of_each_part(inspect, place):
    (place / "lengths.jsonl").write_text(
        "\n".join(json.dumps({"prompt": "a" * n, "completion": "b" * 3}) for n in (1, 2, 3, 8))
    )
    shown = inspect("--data", "lengths.jsonl", *DATA)
    # tokens of a byte-level tokenizer: BOS, n bytes, 3 bytes and EOS
    for label, counts in (("all", (6, 7, 8, 13)), ("prompt", (2, 3, 4, 9)), ("with loss", (4, 4, 4, 4))):
        numbers = re.search(rf"^{label} +(.*)$", shown, re.MULTILINE)[1].split()
        assert [int(numbers[i]) for i in (0, 5)] == [min(counts), max(counts)], label
        assert float(numbers[6]) == pytest.approx(sum(counts) / 4, abs=0.51)


def test_facts_of_an_example_are_whole_on_a_narrow_terminal(inspect, monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    shown = inspect("--data", "r.jsonl", *DATA)
    assert re.search(r"\nr.jsonl:\d: \d+ tokens, \d+ with loss, weight 0\.3333 of the batch\n", shown)


def test_a_row_is_shown_by_its_name(inspect):
    shown = inspect("--data", "r.jsonl", "--row", "r.jsonl:2", *DATA)
    assert shown.count("⟦") == 1 and "r.jsonl:2: " in shown and "🙂 1" in shown
    for number in range(1, 4):  # held out or not
        assert f"🙂 {number - 1}" in inspect(
            "--data", "r.jsonl", "--row", f"r.jsonl:{number}", *DATA, "held_out=0.4"
        )
    assert "🙂 1" in inspect("--data", "r.jsonl", "--row", str(Path("r.jsonl").resolve()) + ":2", *DATA)
    missing = inspect("--data", "r.jsonl", "--row", "r.jsonl:9", *DATA)
    assert "--row r.jsonl:9: no dataset has a row of this name" in missing


def test_a_row_that_is_invalid_or_left_out_is_an_error_that_says_why(inspect, place):
    """Also one that is not the first of its reason."""
    long = {"prompt": "a", "completion": "so " * 200}
    rows = [{"prompt": "a", "completion": text} for text in ("so", "", "")] + [long]
    (place / "few.jsonl").write_text("\n".join([*map(json.dumps, rows), '{"prompt": "a", "completion": }']))

    def shown(number):
        options = ("max_length=64", "too_long=drop")
        return inspect("--data", "few.jsonl", "--row", f"few.jsonl:{number}", *DATA, *options)

    assert "--row few.jsonl:3: " in shown(3) and "is empty" in shown(3)
    assert "malformed JSON" in shown(5)
    assert re.search(r"--row few.jsonl:4: the row is valid, has 6\d\d tokens, and is left out", shown(4))


def test_invalid_rows_are_counted_with_the_first_and_what_drop_would_do(inspect, place):
    rows = [ROWS["pairs"], {**ROWS["pairs"], "rejected": "so"}, {**ROWS["pairs"], "chosen": ""}]
    rows += [{**ROWS["pairs"], "rejected": " "}, {**ROWS["pairs"], "chosen": " "}]
    (place / "bad_pairs.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n[]")
    args = ("--data", "bad_pairs.jsonl", "--kind", "pairs", "--model", "model", "held_out=none", "batch=1")
    for limit, setting in (("0.9", ""), ("0.5", " data.invalid_limit=0.84")):
        shown = inspect(*args, f"invalid_limit={limit}")
        setting = f"data.invalid=drop{setting}"
        first = f"5 of 6 rows are invalid (83.3%): a run ends at the first; set {setting}\n"
        assert shown.startswith(first) and f"to train without these rows, set {setting}\n" in shown
        for line in (
            "      2  empty column 'chosen': bad_pairs.jsonl:3: column 'chosen' is empty",
            "      1  empty column 'rejected': bad_pairs.jsonl:4:",
            "      1  identical responses: bad_pairs.jsonl:2: chosen and rejected are identical",
            "      1  not an object: bad_pairs.jsonl:6: the row is a list",
        ):
            assert line in shown
        assert shown.count("⟦") == 2


def test_the_proposed_limit_is_the_least_that_allows_the_invalid_rows_of_each_dataset(inspect, place):
    rows = [{"prompt": f"q {i}", "completion": "a"} for i in range(67)]
    bad = [{"prompt": f"p {i}", "completion": " "} for i in range(3)]
    (place / "limit.jsonl").write_text("\n".join(map(json.dumps, rows[:60])))
    (place / "limit_held.jsonl").write_text("\n".join(map(json.dumps, [*rows[60:], *bad])))
    shown = inspect("--data", "limit.jsonl", "--model", "model", "held_out=limit_held.jsonl", "batch=1")
    assert shown.startswith("3 of 70 rows are invalid (4.3%): a run ends at the first; set ")
    assert "set data.invalid=drop data.invalid_limit=0.3\n" in shown


def test_rows_to_leave_out_and_warnings_come_first_with_the_setting_that_leaves_them_out(inspect, place):
    rows = ["Question;Answer", "why 1;so", "why 1;so", "why 2;N/A", "why 3;", "why 4;yes", "why 5;no"]
    (place / "mess.csv").write_text("\n".join([*rows, *(f"more {i};so {i}" for i in range(6))]))
    args = ("--data", "mess.csv", "--model", "model", "held_out=none", "batch=1")
    shown = inspect(*args)
    order = [
        "1 of 12 rows are invalid (8.3%): a run ends at the first; set data.invalid=drop "
        "data.invalid_limit=0.09\n",
        "note: the columns of mess.csv are separated by semicolons\n",
        "note: mess.csv: columns are read by other names: Question as prompt, Answer as completion",
        "11 examples in ",
        "repeat another one: 1; the first is mess.csv:3",
        "responses that are placeholders, such as N/A: 1; the first is mess.csv:4\n",
        "set data.invalid=drop data.invalid_limit=0.09 data.drop=duplicates,placeholders\n",
        "lengths (no limit)",
        "largest id",
    ]
    places = [shown.find(text) for text in order]
    assert min(places) == places[0] == 0 and places == sorted(places)
    assert shown.count("11 examples") == shown.count("response tokens are learned") == 1
    settings = ("invalid=drop", "invalid_limit=0.09", "drop=duplicates,placeholders")
    again = inspect(*args, *settings)
    assert again.startswith("1 of 12 rows are invalid (8.3%): a run leaves them out\n")
    assert "to train without" not in again
    assert "9 examples in" in again and "data.drop: 1 duplicates and 1 placeholders as responses" in again


def test_tool_calls_that_the_template_drops_are_no_rows_to_leave_out(inspect, place):
    call = {"type": "function", "function": {"name": "f", "arguments": "{}"}}
    turns = [
        {"role": "user", "content": "why?"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
    ]
    good = [{"messages": [turns[0], {"role": "assistant", "content": "so"}]}] * 2
    (place / "calls.jsonl").write_text("\n".join(map(json.dumps, [{"messages": turns}, *good])))
    shown = inspect("--data", "calls.jsonl", "--model", "model", "held_out=none", "batch=1")
    assert shown.startswith(
        "1 of 3 rows are invalid (33.3%): a run ends at the first; set chat_template=qwen\n"
    )


@pytest.mark.parametrize("columns", [80, 120])
def test_lengths_and_their_histogram_fit_the_terminal(inspect, place, monkeypatch, columns):
    sizes = [1, 5, 40, 300, 900, 1700]
    rows = [{"prompt": "a " * n, "chosen": f"{n} " * n, "rejected": "b " * n} for n in sizes]
    (place / "long.jsonl").write_text("\n".join(map(json.dumps, rows)))
    monkeypatch.setenv("COLUMNS", str(columns))
    options = ("--rows", "0", "held_out=none", "batch=1", "max_length=8192")
    shown = inspect("--data", "long.jsonl", "--kind", "pairs", "--model", "model", *options)
    table = re.split("too long:|max_length ", shown[shown.index("lengths (no limit)") :])[0]
    part = table.rstrip().splitlines()
    assert max(map(len, part)) <= columns and "…" not in shown
    assert len(part) == (6 if columns == 80 else 5)  # only the longest label takes a second line
    bars = [line.rstrip()[-1] for line in part if line.startswith(("chosen", "rejected"))]
    assert set(bars) <= set("▁▂▃▄▅▆▇█") and len(bars) == 2  # the longest row ends each histogram


def test_tools_that_the_template_drops_are_a_warning(inspect, place):
    turns = [{"role": "user", "content": "why?"}, {"role": "assistant", "content": "so"}]
    tools = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
    (place / "tools.jsonl").write_text(json.dumps({"messages": turns, "tools": tools}))
    for kind in ("sft", "prompts"):
        shown = inspect(
            "--data", "tools.jsonl", "--kind", kind, "--model", "model", "held_out=none", "batch=1"
        )
        warning = "without the row's tools, so the model does not see them; set chat_template=qwen"
        assert warning in " ".join(shown.split())


@pytest.mark.parametrize(
    ("args", "error"),
    [
        (["--data", "bad.jsonl"], "bad.jsonl:1: malformed JSON"),
        (["--data", "none.jsonl"], "data 'none.jsonl' not found"),
        (["--data", "r.jsonl", "max_lenth=3"], "near: max_length"),
        (["--data", "r.jsonl", "max_length=x"], "max_length=x: expected int"),
        (["--data", "r.jsonl", "max_length=4"], "rows were dropped because they are longer than"),
    ],
)
def test_an_error_is_one_line_or_a_traceback_on_request(inspect, monkeypatch, args, error):
    printed = inspect(*args, "--model", "model")
    assert printed.startswith("error: ") and error in printed and printed.count("\n") == 1
    monkeypatch.setenv("JAXFT_TRACEBACK", "1")
    assert inspect(*args, "--model", "model").startswith("Traceback")


@pytest.mark.slow
def test_the_exit_code_reports_a_failure(place):
    command = [sys.executable, str(SCRIPT), "--data", "bad.jsonl", "--model", "model"]
    done = subprocess.run(
        command,
        cwd=place,
        capture_output=True,
        text=True,
        env=os.environ | {"JAXFT_CACHE": str(place / "cache")},
    )
    assert (
        done.returncode == 1
        and done.stderr.startswith("error: bad.jsonl: 1 of 1 rows are invalid, none is left")
        and "bad.jsonl:1: malformed JSON" in done.stderr
        and done.stderr.count("\n") == 1
    )


@pytest.mark.parametrize("kind", ["llama3", "chatml", "gemma"])
def test_tokens_are_shown_as_in_the_whole_text_at_a_cost_that_is_linear(kind):
    tokenizer = tiny(kind)
    text = "héllo wörld, 🙂🙃 naïve  café 你好 " * 40
    ids = np.array(tokenizer(text, add_special_tokens=False)["input_ids"])
    decoded = []

    class Counting:
        def decode(self, some, **options):
            decoded.append(len(some))
            return tokenizer.decode(some, **options)

    found = list(token_pieces(Counting(), ids, np.arange(len(ids))))
    assert "".join(piece for piece, _ in found) == tokenizer.decode(ids.tolist())
    assert found[-1][1] == len(ids) - 1 and len(found) > 500
    assert sum(decoded) < 200 * len(ids)
