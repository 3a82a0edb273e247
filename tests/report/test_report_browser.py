"""A report in headless Chromium: its curves are drawn, zoom and show values, without a message on the console
and without a request.

Needs Debian's package chromium, or another Chromium or Chrome in PATH.
"""

import html
import http.server
import json
import re
import shutil
import subprocess
import threading

import pytest
from run_folders import write_run, write_sweep

from jaxft.report.document import write_report

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None
)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: apt-get install chromium"),
]
CHECKS = """<script>
addEventListener("load", async () => {
  const pause = (ms) => new Promise((done) => setTimeout(done, ms));
  while (!document.documentElement.dataset.drawn) await pause(20);
  const plots = [...document.querySelectorAll(".js-plotly-plot")];
  const lines = () => plots.map((plot) => plot.querySelectorAll(".scatterlayer .js-line").length);
  const found = { charts: plots.length, lines: lines(), overflow: document.body.scrollWidth - innerWidth };
  const text_of = (plot, name) => plot.querySelector(name).textContent;
  found.axes = plots.map((plot) => [text_of(plot, ".xtitle"), text_of(plot, ".ytitle")]);
  const buttons = [...document.querySelectorAll(".modebar-btn")];
  found.buttons = [...new Set(buttons.map((button) => button.dataset.title))];
  Plotly.Fx.hover(plots[0], { xval: 2 }, "xy");
  await pause(100);
  found.hover = plots[0].querySelector(".hoverlayer").textContent;
  await Plotly.relayout(plots[0], { "xaxis.range[0]": 2, "xaxis.range[1]": 4 });
  await pause(100);
  found.ranges = plots.map((plot) => plot._fullLayout.xaxis.range);
  const first = document.querySelector("#runs input");
  if (first) { first.click(); await pause(100); }
  found.hidden = lines();
  const text = () => getComputedStyle(plots[0].querySelector(".xtitle")).fill;
  const before = text();
  document.getElementById("theme").click();
  await pause(100);
  found.themes = [before, text()];
  dispatchEvent(new Event("beforeprint"));
  await pause(100);
  found.printed = plots.map((plot) => plot.querySelector(".main-svg").width.baseVal.value);
  found.requests = performance.getEntriesByType("resource").map((entry) => entry.name);
  document.documentElement.dataset.checked = JSON.stringify(found);
});
</script></body>"""


class Recorder(http.server.BaseHTTPRequestHandler):
    """A proxy that refuses every request and notes its address."""

    seen: list[str] = []

    def do_GET(self):
        self.seen.append(self.path)
        self.send_error(403)

    do_CONNECT = do_POST = do_HEAD = do_GET

    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def proxy():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Recorder)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def dom_of(page, folder, proxy, width=1400):
    """The page's DOM after its scripts, and the messages of Chromium."""
    command = [
        CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder}",
        "--no-first-run",
        "--disable-background-networking", "--disable-component-update", "--disable-sync",
        f"--proxy-server={proxy}", "--proxy-bypass-list=<-loopback>", f"--window-size={width},1200",
        "--virtual-time-budget=30000", "--enable-logging=stderr", "--dump-dom", page.as_uri(),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=180)
    return done.stdout, done.stderr


def browse(page, folder, proxy, width):
    """The page's DOM after its scripts, what they found, and the messages on the console."""
    dom, log = dom_of(page, folder, proxy, width)
    messages = [line for line in log.splitlines() if "CONSOLE" in line]
    found = re.search(r'data-checked="([^"]*)"', dom)
    assert found, (dom[:2000], log[-2000:])
    return dom, json.loads(html.unescape(found[1])), messages


def hosts_of_others():
    """The hosts of the addresses that the proxy has seen, but for those that Chromium asks by itself, at
    various times, for the time and for updates. The page would be stopped by its own policy, with a message.
    """
    hosts = {re.sub(r"^\w+://", "", address).partition("/")[0].partition(":")[0] for address in Recorder.seen}
    return {host for host in hosts if not host.endswith(".google.com")}


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """Folders of an SFT, a DPO and a PPO run and of a sweep."""
    folder = tmp_path_factory.mktemp("runs")
    runs = {kind: write_run(folder / kind, kind, 60) for kind in ("sft", "dpo", "ppo")}
    return {**runs, "sweep": write_sweep(folder / "sweep", 4, steps=60)}


@pytest.mark.parametrize(("name", "width"), [("sft", 1400), ("dpo", 500), ("ppo", 1400), ("sweep", 500)])
def test_curves_are_drawn_and_can_be_read_zoomed_and_printed(places, proxy, tmp_path, name, width):
    page = tmp_path / "report.html"
    write_report([places[name]], page)
    text = page.read_text()
    page.write_text(text.replace("</body>", CHECKS))
    Recorder.seen.clear()
    dom, found, messages = browse(page, tmp_path / "profile", proxy, width)
    assert not messages and not found["requests"]
    assert not hosts_of_others()
    assert found["charts"] >= {"sft": 8, "dpo": 12, "ppo": 13, "sweep": 8}[name]
    assert all(found["lines"]) and found["overflow"] <= 0
    assert all(x == "optimizer step" and len(y) > 3 for x, y in found["axes"])
    assert re.match(r"2.*\d", found["hover"]), found["hover"]
    assert len(found["buttons"]) == 4 and "Share chart..." not in found["buttons"]
    assert all(abs(a - 2) < 1e-6 and abs(b - 4) < 1e-6 for a, b in found["ranges"])
    assert sum(found["hidden"]) == sum(found["lines"]) * (0.75 if name == "sweep" else 1)
    assert found["themes"][0] != found["themes"][1]
    assert set(found["printed"]) == {330}
