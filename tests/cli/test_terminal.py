"""Text from files and rows cannot steer a terminal, and no message shows a password."""

import pytest

from jaxft.report.html_elements import escaped
from jaxft.runs import terminal
from jaxft.runs.terminal import printable_line, printable_message, printable_text


@pytest.mark.parametrize(
    "text", ["\x1b[31mred", "\x07", "a\rb", "\x9b2J", "\u202egnp", "\ud800", "\u2028", "\x00", "\x7f"]
)
def test_control_characters_are_not_printed(text):
    line, shown = printable_line(f"a {text} b"), printable_text(f"a\n\t{text} b")
    assert line.isprintable() and line.startswith("a ") and line.endswith(" b")
    assert all(c.isprintable() or c in "\n\t" for c in shown) and shown.startswith("a\n\t")


@pytest.mark.parametrize(
    "url",
    [
        "https://me:secret@host/x",
        "http://secret@host",
        "ftp://a:secret@b@host:80/x",
        "HTTPS://me:secret@host",
        "https://me@host/x.parquet?sig=secret",
    ],
)
def test_passwords_of_urls_are_not_printed(url):
    for show in (printable_line, printable_message, escaped):
        text = show(f"GET {url} failed")
        assert "secret" not in text and "***@" in text and text.startswith("GET ") and "host" in text
    assert "secret" not in (terminal.error_line(OSError(5, f"cannot reach {url}")) or "")


@pytest.mark.parametrize(
    "text", ["meta-llama/Llama-3.2-1B@main", "me@host", "https://huggingface.co/a/b@main", "a://b"]
)
def test_other_text_is_unchanged(text):
    assert printable_line(text) == printable_message(text) == printable_text(text) == text


def test_text_of_a_row_or_a_model_has_its_urls_as_they_are():
    text = "see https://en.wikipedia.org/wiki/Ring?x=1#History"
    assert printable_text(text) == text


def test_a_long_message_is_shortened():
    assert len(printable_line("x" * 10**6)) == 2000


@pytest.mark.parametrize(
    "error, line",
    [
        (FileNotFoundError(2, "No such file or directory", "a/b"), "a/b: No such file or directory"),
        (PermissionError(13, "Permission denied", b"a/b"), "b'a/b': Permission denied"),
        (ValueError("two\nlines"), "two lines"),
        (ValueError(""), "ValueError"),
        (KeyError("a bug"), None),
        (RuntimeError("a bug"), None),
    ],
)
def test_an_error_in_one_line(error, line):
    assert terminal.error_line(error) == line
