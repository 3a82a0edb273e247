"""The report of runs as one HTML page, without any other file and without requests to any network.

The curves are drawn by plotly.js from the package `plotly`. It is stored compressed, because it is larger
than the rest of the page.
"""

import base64
import gzip
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jaxft import __version__
from jaxft.distributed.disk import make_folder, write_durably
from jaxft.objectives.alarms import Entry
from jaxft.report import sections
from jaxft.report.charts import (
    COLOURS,
    STEP_CHARTS,
    X_AXIS,
    Chart,
    RunCurve,
    learning_kinds,
    make_charts,
    side_label,
    smoothing_factor,
)
from jaxft.report.html_elements import escaped
from jaxft.report.run_files import RunFiles, folders_of_runs, read_run
from jaxft.report.sections import reliability_section
from jaxft.runs.metrics_log import COMPLETIONS
from jaxft.runs.run_record import SUMMARY
from jaxft.runs.terminal import printable_message

# Nothing is loaded from anywhere, whatever the text of a run contains.
CONTENT_POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:"
)
CURVES_HTML = """<section id="curves"><h2>Curves</h2>
<form id="controls" hidden>
<fieldset id="runs"><legend>Runs</legend></fieldset>
<label><input id="by-noise" type="checkbox" checked> Smoothing by noise</label>
<label>or by <input id="smoothing" type="range" min="0" max="0.98" step="0.02" value="0"></label>
<label><input id="logarithmic" type="checkbox"> Logarithmic y axes</label>
</form>
<p class="note" id="curves-note">Drag over a chart to zoom into these steps in all charts; double-click to
zoom out. A curve is smoothed by its noise (exponential moving average); the faint line has its values.</p>
<noscript><p class="note">The curves need JavaScript. The folders of the runs have them as pictures too,
curves.png and training.png.</p></noscript>
<div id="charts"></div>
</section>"""


class PageSection(NamedTuple):
    """A section of the page. link: the text of the link to it. file: the run's file that it shows, for
    errors. write: a function that returns its HTML for the runs, "" to leave it out.
    """

    link: str
    file: str
    write: Callable[[Sequence[RunFiles]], str]


def curves_section(runs: Sequence[RunFiles]) -> str:
    """Return the HTML element in which page.js draws the curves."""
    return CURVES_HTML


SECTIONS = {
    "overview": PageSection("Overview", "config.json or parameters.json", sections.overview_section),
    "alarms": PageSection("Alarms", "summary.json or alarms.json", sections.alarms_section),
    "curves": PageSection("Curves", "metrics.jsonl", curves_section),
    "reliability": PageSection("Reliability", "held_out.jsonl", reliability_section),
    "settings": PageSection("Settings", "config.json", sections.settings_section),
    "samples": PageSection("Samples", SUMMARY, sections.samples_section),
    "completions": PageSection("Completions", COMPLETIONS, sections.rewards_section),
    "data": PageSection("Data", "data.json", sections.data_section),
    "parameters": PageSection("Parameters", "parameters.json", sections.parameters_section),
    "environment": PageSection("Environment", "env.json", sections.environment_section),
}


def shown_section(name: str, runs: Sequence[RunFiles]) -> str:
    """Return the HTML of the section `name`, a key of SECTIONS. Raises ValueError that names the run's file
    if its content is not as jaxft writes it.
    """
    try:
        return SECTIONS[name].write(runs)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        folders = ", ".join(str(run.folder) for run in runs)
        raise ValueError(
            f"{SECTIONS[name].file} in {folders}: not as jaxft writes it ({error}); restore the file, or "
            "remove it to leave it out of the report"
        ) from error


def write_report(paths: list[Path], out: Path, title: str = "") -> int:
    """Write the report of the runs in some folders to `out`; return its size in bytes.

    A sweep's folder stands for all of its members. Raises ValueError for a folder without a run's metrics.
    """
    runs = [read_run(name, folder) for name, folder in folders_of_runs(paths).items()]
    page = report_page(runs, title or ", ".join(path.resolve().name for path in paths)).encode()
    make_folder(out.parent)
    write_durably(out, page)
    return len(page)


def report_page(runs: Sequence[RunFiles], title: str) -> str:
    """Return the page with all sections of the runs."""
    shown = {name: text for name in SECTIONS if (text := shown_section(name, runs))}
    count = f"{len(runs)} runs" if len(runs) > 1 else "a run"
    curves = curves_json({run.name: run.entries for run in runs})
    scripts = f"""<script type="application/json" id="curves-data">{script_json(curves)}</script>
<script type="text/plain" id="plotly-gzip">{packed_plotly()}</script>
<script>{page_file("page.js")}</script>
"""
    titled = {SECTIONS[name].link: (name, text) for name, text in shown.items()}
    return html_page(title, f"Report of {count}, written by jaxft {__version__}", titled, scripts)


def html_page(title: str, note: str, shown: Mapping[str, tuple[str, str]], scripts: str = "") -> str:
    """Return a page. note: the line below its title. shown: text of a section's link -> (anchor, HTML).
    scripts: further elements; with them the page has a button for light or dark colours.
    """
    links = "".join(f'<a href="#{anchor}">{link}</a>' for link, (anchor, _) in shown.items())
    button = '<button id="theme" type="button">Light or dark</button>' if scripts else ""
    body = "\n".join(text for _, text in shown.values())
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{CONTENT_POLICY}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<link rel="icon" href="data:,">
<title>{escaped(title, 200)} - jaxft report</title>
<style>{page_file("page.css")}</style>
</head>
<body>
<header>
<h1>{escaped(title, 200)}</h1>
<p class="note">{escaped(note)}</p>
<nav>{links}{button}</nav>
</header>
<main>
{body}
</main>
{scripts}</body>
</html>
"""


def script_json(value: Any) -> str:
    """Return JSON that cannot end the script element it is in."""
    return json.dumps(value, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")


def page_file(name: str) -> str:
    """Return the text of a file in this folder, such as page.css."""
    return Path(__file__).with_name(name).read_text(encoding="utf-8")


def packed_plotly() -> str:
    """Return plotly.js as gzip in base64. Raises ValueError where the package plotly is not installed."""
    try:
        from plotly.offline import get_plotlyjs
    except ImportError as error:
        needed = f"a report's curves need the package plotly ({error}); run pip install plotly"
        raise ValueError(needed) from error
    return base64.b64encode(gzip.compress(get_plotlyjs().encode(), 9, mtime=0)).decode()


POINTS = 48_000  # of all curves together, some 800 kB
FEWEST, MOST = 40, 2000  # points of a curve
# For a dark background, in the order of COLOURS; distinguishable with any colour vision.
DARK_COLOURS = (
    "#4197ab", "#ff8138", "#28cb91", "#fb90e8", "#e0e277", "#91fbff", "#cc7afa", "#f0b6cd",
)  # fmt: skip


def curves_json(runs: Mapping[str, Sequence[Entry]]) -> dict[str, Any]:
    """Return all data that page.js draws: the runs' names, colours, and groups of charts with their curves.

    A curve with too many points for the page keeps the lowest and the highest value of each range of steps.
    """
    groups = {
        "Learning": make_charts(runs, learning_kinds(runs)),
        "Optimizer, speed and memory": make_charts(runs, STEP_CHARTS),
    }
    charts = [chart for group in groups.values() for chart in group]
    count = sum(len(curves) for chart in charts for curves in chart.curves.values())
    most = max(FEWEST, min(MOST, POINTS // max(1, count)))
    return {
        "runs": [printable_message(name) for name in runs],
        "x": X_AXIS,
        "palettes": {"light": COLOURS, "dark": DARK_COLOURS},
        "groups": [
            {"title": title, "charts": [chart_json(chart, most) for chart in charts]}
            for title, charts in groups.items()
            if charts
        ],
    }


def chart_json(chart: Chart, most: int) -> dict[str, Any]:
    """Return a chart with curves of at most `most` points."""
    numbered = enumerate(chart.curves.values())
    curves = [curve_json(number, curve, most) for number, group in numbered for curve in group]
    kind = chart.kind
    texts = {"title": kind.title, "unit": kind.unit, "about": kind.about}
    return {**{name: printable_message(text) for name, text in texts.items()}, "curves": curves}


def curve_json(run: int, curve: RunCurve, most: int) -> dict[str, Any]:
    """Return a curve as JSON. run: the index of its run. most: about how many points it may have."""
    x, y = thinned(curve.steps, curve.values, most)
    intervals = curve.intervals if len(x) == len(curve.intervals) else ()
    bars = [[float(f"{end:.4g}") for end in ends] if ends else None for ends in intervals]
    return {
        "run": run,
        "label": printable_message(curve.label),
        "rows": side_label(curve),
        "heldOut": curve.held_out,
        "bars": bars,
        "smoothing": round(smoothing_factor(curve), 3),
        "x": x,
        "y": [None if value is None else float(f"{value:.6g}") for value in y],
    }


def thinned(
    steps: Sequence[int], values: Sequence[float | None], most: int
) -> tuple[list[int], list[float | None]]:
    """Return the steps and values of about `most` points of a curve. The curve is split into equal parts, and
    each keeps its lowest point, its highest point and its first point that is not finite (None).
    """
    if len(steps) <= most:
        return list(steps), list(values)
    size = -(-2 * len(steps) // most)
    kept: list[int] = []
    for begin in range(0, len(steps), size):
        part = range(begin, min(begin + size, len(steps)))
        finite = [(value, i) for i in part if (value := values[i]) is not None]
        gap = [i for i in part if values[i] is None][:1]
        kept += sorted({*gap, *(i for _, i in (min(finite), max(finite)))}) if finite else gap
    return [steps[i] for i in kept], [values[i] for i in kept]
