"""The server's chat page in headless Chromium: it streams responses, shows errors, and fits a phone.

Needs Debian's package chromium, or another Chromium or Chrome in PATH.
"""

import json
import shutil
import subprocess
import threading

import pytest
from running_server import Running

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
  await fetch("/checked", { method: "POST", body: JSON.stringify(found) });
});
</script>"""


class Checked:
    """The server's application, which also takes what the page found, at /checked."""

    def __init__(self, app):
        self.app, self.found, self.arrived = app, "", threading.Event()

    async def __call__(self, scope, receive, send):
        if scope.get("path") != "/checked":
            return await self.app(scope, receive, send)
        more = True
        while more:
            message = await receive()
            self.found += message.get("body", b"").decode()
            more = message.get("more_body", False)
        await send({"type": "http.response.start", "status": 204, "headers": []})
        await send({"type": "http.response.body"})
        self.arrived.set()


@pytest.mark.parametrize("width", [1200, 500])
def test_the_page_chats_with_the_chosen_model(tmp_path, monkeypatch, width):
    page = tmp_path / "page.html"
    page.write_text(server.PAGE.read_text().replace("</script>", CHECKS))
    monkeypatch.setattr(server, "PAGE", page)
    make_app, apps = server.make_app, []
    monkeypatch.setattr(server, "make_app", lambda *args: apps.append(Checked(make_app(*args))) or apps[0])
    running = Running()
    try:
        command = [
            CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}/profile",
            "--no-first-run", "--disable-background-networking", "--disable-component-update",
            f"--window-size={width},900", "--remote-debugging-port=0", "--enable-logging=stderr",
            f"http://127.0.0.1:{running.port}/",
        ]  # fmt: skip
        with (tmp_path / "log").open("w") as log, subprocess.Popen(command, stderr=log) as browser:
            arrived = apps[0].arrived.wait(120)
            browser.terminate()
        messages_shown = [line for line in (tmp_path / "log").read_text().splitlines() if "CONSOLE" in line]
        assert arrived, (tmp_path / "log").read_text()[-2000:]
        client = running.client()
        messages = [
            {"role": "system", "content": "be <b>brief</b>"},
            {"role": "user", "content": "what is <i>a rank</i>?"},
        ]
        asked = dict(model="terse", messages=messages, max_tokens=12, temperature=0)
        expected = client.chat.completions.create(**asked).choices[0].message.content
    finally:
        running.close()
    found = json.loads(apps[0].found)
    assert found["models"] == ["base", "polite", "terse"]
    assert found["log"][:2] == [["user", "what is <i>a rank</i>?"], ["response", expected]]
    assert found["log"][-1][0] == "error" and "9999" in found["log"][-1][1]
    assert found["tags"] == found["cleared"] == 0 and found["overflow"] <= 0
    assert not [line for line in messages_shown if "400" not in line]
