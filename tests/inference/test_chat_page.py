"""The server's chat page in headless Chromium: it streams answers, shows errors, and fits a phone.

Needs Debian's package chromium, or another Chromium or Chrome in PATH.
"""

import html
import json
import re
import shutil
import subprocess

import pytest

pytest.importorskip("openai")
from test_server import Running

from jaxft.inference import server

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None
)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: apt-get install chromium"),
]
CHECKS = """
addEventListener("load", async () => {
  const pause = (ms) => new Promise((done) => setTimeout(done, ms));
  while (!$("model").options.length) await pause(20);
  const found = { models: [...$("model").options].map((option) => option.value) };
  $("model").value = "terse"; $("temperature").value = "0"; $("tokens").value = "12";
  $("system").value = "be <b>brief</b>"; $("text").value = "what is <i>a rank</i>?";
  await send();
  $("tokens").value = "9999"; $("text").value = "and then?";
  await send();
  found.log = [...$("log").children].map((box) => [box.className, box.querySelector("span").textContent]);
  found.tags = $("log").querySelectorAll("i").length;
  found.overflow = document.body.scrollWidth - innerWidth;
  $("clear").click();
  found.cleared = $("log").children.length;
  document.documentElement.dataset.checked = JSON.stringify(found);
});
</script>"""


@pytest.mark.parametrize("width", [1200, 500])
def test_the_page_chats_with_the_chosen_model(tmp_path, monkeypatch, width):
    page = tmp_path / "page.html"
    page.write_text(server.PAGE.read_text().replace("</script>", CHECKS))
    monkeypatch.setattr(server, "PAGE", page)
    running = Running()
    try:
        command = [
            CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}/profile",
            "--no-first-run", "--disable-background-networking", "--disable-component-update",
            f"--window-size={width},900", "--virtual-time-budget=60000", "--enable-logging=stderr",
            "--dump-dom", f"http://127.0.0.1:{running.port}/",
        ]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, timeout=180)
        client = running.client()
        messages = [
            {"role": "system", "content": "be <b>brief</b>"},
            {"role": "user", "content": "what is <i>a rank</i>?"},
        ]
        asked = dict(model="terse", messages=messages, max_tokens=12, temperature=0)
        expected = client.chat.completions.create(**asked).choices[0].message.content
    finally:
        running.close()
    checked = re.search(r'data-checked="([^"]*)"', done.stdout)
    assert checked, (done.stdout[-2000:], done.stderr[-2000:])
    found = json.loads(html.unescape(checked[1]))
    assert found["models"] == ["base", "polite", "terse"]
    assert found["log"][:2] == [["user", "what is <i>a rank</i>?"], ["answer", expected]]
    assert found["log"][-1][0] == "error" and "9999" in found["log"][-1][1]
    assert found["tags"] == found["cleared"] == 0 and found["overflow"] <= 0
    assert not [line for line in done.stderr.splitlines() if "CONSOLE" in line and "400" not in line]
