"""The server's chat page in headless Chromium: it streams responses as Markdown without HTML of theirs, marks
truncated ones, regenerates them, shows errors, and fits a phone.

Needs Debian's package chromium, or another Chromium or Chrome in PATH.
"""

import json
import shutil
import subprocess
import threading

import pytest
from running_server import Running

from jaxft.serve import server

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None
)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: apt-get install chromium"),
]
EVIL = """# <b>Title</b>
<script>window.evil = 1</script> <img src=x onerror="window.evil = 2"> **<i>bold</i>** `<u>`
[a](javascript:window.evil=3) [b](https://x.org/"onmouseover="window.evil=4) [c](https://x.org)
- <svg onload=window.evil=5>
  1. two

| <a href=x> | b |
|---|---|
| 1 | <style>*{display:none}</style> |

> quoted
```py
<script>window.evil = 6</script>
"""
TAGS = "a blockquote br button code div em h1 li ol p pre span strong table td th tr ul"
CHECKS = """
addEventListener("load", async () => {
  const pause = (ms) => new Promise((done) => setTimeout(done, ms));
  while (!$("model").options.length) await pause(20);
  const found = { models: [...$("model").options].map((option) => option.value) };
  $("model").value = "terse"; $("temperature").value = "0"; $("tokens").value = "12";
  $("system").value = "be <b>brief</b>"; $("text").value = "what is <i>a rank</i>?";
  await send();
  found.turns = [...turns];
  found.notes = [...$("log").querySelectorAll(".note")].map((note) => note.textContent);
  [...$("log").querySelectorAll(".again")].at(-1).click();
  while (running) await pause(20);
  found.again = [...turns]; found.boxes = $("log").children.length;
  [...$("log").querySelectorAll("button")].find((button) => button.textContent === "Copy").click();
  await pause(200);
  const isCopied = (button) => button.textContent === "Copied";
  found.copied = [...$("log").querySelectorAll("button")].filter(isCopied).length;
  $("tokens").value = "9999"; $("text").value = "and then?";
  await send();
  const textOf = (box) => box.querySelector("span, .text").textContent;
  found.log = [...$("log").children].map((box) => [box.className, textOf(box)]);
  found.kept = turns.length;
  const box = show("response", "evil", "");
  markdown(EVIL, box);
  await pause(300);
  found.tags = [...new Set([...box.querySelectorAll("*")].map((one) => one.localName))].sort();
  found.links = [...box.querySelectorAll("a")].map((link) => link.getAttribute("href"));
  found.text = box.textContent; found.evil = window.evil ?? 0;
  found.wide = document.body.scrollWidth - innerWidth;
  $("clear").click();
  found.cleared = $("log").children.length;
  await fetch("/checked", { method: "POST", body: JSON.stringify(found) });
});
</script>""".replace("EVIL", json.dumps(EVIL).replace("</", "<\\/"))


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
        expected = client.chat.completions.create(**asked).choices[0]
    finally:
        running.close()
    found = json.loads(apps[0].found)
    assert found["models"] == ["base", "polite", "terse"]
    response = {"role": "assistant", "content": expected.message.content}
    assert found["turns"] == found["again"] == [messages[1], response] and found["boxes"] == 2
    assert found["log"][0] == ["user", "what is <i>a rank</i>?"]
    truncated = ["Truncated at 12 tokens (Tokens above)."]
    assert found["notes"] == (truncated if expected.finish_reason == "length" else [])
    assert found["log"][-1][0] == "error" and "9999" in found["log"][-1][1] and found["kept"] == 3
    assert found["copied"] == 1 and found["cleared"] == 0 and found["wide"] <= 0
    assert not [line for line in messages_shown if "400" not in line]
    # Markdown makes these elements and no other, and what looks like HTML is text
    tags = {*TAGS.split()}
    assert found["evil"] == 0 and {*found["tags"]} <= tags and "table" in found["tags"]
    assert found["links"] == ['https://x.org/"onmouseover="window.evil=4', "https://x.org"]
    for text in ("<script>window.evil = 1</script>", '<img src=x onerror="window.evil = 2">', "<i>bold</i>"):
        assert text in found["text"]
