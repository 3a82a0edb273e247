"""Judges: orders, lengths, agreement, servers, files."""

import json
import math
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
from scripts_in_process import call

from jaxft.lab import judges, judging
from jaxft.lab.judging import Judged, Match, Verdicts


def judged(values, one=None, other=None, name="judge"):
    """A judge's values that are the same in both orders."""
    values = np.asarray(values, float)
    lengths = [np.full(len(values), 10.0) if x is None else np.asarray(x, float) for x in (one, other)]
    return Judged(name, Verdicts(values, values), *lengths)


@pytest.mark.parametrize(
    ("reply", "value"),
    [
        ("A is shorter, but B is right. [[B]]", 0.0),
        ("[[A]] seemed better at first; on reflection [[C]]", 0.5),
        ("My verdict is [[A>>B]]", 1.0),
        ("[[B>A]]", 0.0),
        ("[[A=B]]", 0.5),
        (" a. ", 1.0),
        ("**B**", 0.0),
        ("tie", 0.5),
        ("Both are fine, although B is longer.", math.nan),
        ("", math.nan),
    ],
)
def test_a_verdict_is_the_last_mark_of_a_reply(reply, value):
    assert judging.verdict(reply) == pytest.approx(value, nan_ok=True)


def test_a_judge_that_always_prefers_the_first_answer_finds_no_difference():
    matches = [Match(f"{i}", "q", "x", "y", {}) for i in range(6)]
    values = judging.values_of(["[[A]]"] * len(judging.in_both_orders(matches)), "biased")
    found = Judged("biased", values, np.ones(6), np.ones(6)).as_json()
    assert found["win_rate"] == 0.5 and found["ties"] == 6
    assert found["orders_disagree"] == 1.0 and found["first_shown_wins"] == 1.0


def test_answers_are_shown_in_both_orders():
    (first, second) = judging.in_both_orders([Match("1", "q", "mine", "theirs", {})])
    texts = [messages[-1]["content"] for messages in (first, second)]
    assert [text.index("mine") < text.index("theirs") for text in texts] == [True, False]


def test_a_judge_whose_replies_name_no_answer_is_refused():
    with pytest.raises(ValueError, match=r"judge tiny: 4 of 4 replies have no verdict"):
        judging.values_of(["I cannot say"] * 4, "tiny")
    values = judging.values_of(["[[A]]", "hm", "[[A]]", "[[B]]"], "some")  # one reply of four
    np.testing.assert_array_equal(Judged("j", values, np.ones(2), np.ones(2)).by_prompt, [np.nan, 1.0])


def test_a_judge_that_prefers_the_first_answer_and_has_a_verdict_in_one_order_only_finds_nothing():
    values = judging.values_of(["[[A]]", "hm"] * 20, "biased")
    found = Judged("biased", values, np.ones(20), np.ones(20))
    assert judging.verdict_lines(found, "a", "b") == ["biased: no prompt has a verdict"]


def test_a_preference_for_length_alone_is_no_win_at_equal_length():
    random = np.random.default_rng(0)
    d = random.normal(40, 60, 4000)
    likes_length = 1 / (1 + np.exp(-2.5 * np.tanh(d / d.std())))
    values = (random.random(4000) < likes_length).astype(float)
    rate, interval = judging.length_controlled(judged(values, d, 0 * d), resamples=50)
    assert values.mean() > 0.65 and interval.has(0.5) and abs(rate - 0.5) < 0.05
    better = (random.random(4000) < 1 / (1 + np.exp(-1 - 2.5 * np.tanh(d / d.std())))).astype(float)
    rate, _ = judging.length_controlled(judged(better, d, 0 * d), resamples=2)
    assert rate == pytest.approx(1 / (1 + math.exp(-1)), abs=0.05)  # the planted advantage


def test_equal_lengths_leave_the_win_rate_as_it_is():
    values = [1.0] * 30 + [0.0] * 10
    assert judging.length_controlled(judged(values), resamples=2)[0] == pytest.approx(0.75, abs=1e-3)


def test_a_few_prompts_that_are_all_won_are_no_result():
    """Three of three: p = 2 / 2^3. The interval of a win rate of 1 is not the point 1."""
    text = "\n".join(judging.verdict_lines(judged([1.0] * 3), "a", "b"))
    assert "a is better" not in text and "p = 0.25" in text and "would need about 6 prompts" in text
    assert "a is better" in "\n".join(judging.verdict_lines(judged([1.0] * 6), "a", "b"))
    low, high = judged([1.0] * 6).as_json()["win_rate_interval"]
    assert 0.5 < low < 0.9 and high == 1


def test_lengths_that_do_not_overlap_are_named():
    values = [1.0] * 9 + [0.0] * 3
    (*_, line) = judging.verdict_lines(judged(values, [20] * 12, range(12)), "a", "b")
    assert line == (
        "  the answers of a are never the shorter ones, so the win rate at equal length is an extrapolation"
    )
    assert "extrapolation" not in "".join(
        judging.verdict_lines(judged(values, [5] * 12, range(12)), "a", "b")
    )


def test_kappa_of_a_table_of_three_categories():
    """By hand: p_o = (88 + 40 + 12) / 200 = 0.70; margins 0.6, 0.3, 0.1 and 0.5, 0.3, 0.2 have p_e = 0.41."""
    table = {(1, 1): 88, (1, -1): 14, (1, 0): 18, (-1, 1): 10, (-1, -1): 40, (-1, 0): 10}
    table |= {(0, 1): 2, (0, -1): 6, (0, 0): 12}
    pairs = [kinds for kinds, count in table.items() for _ in range(count)]
    one, other = (judged([(kind + 1) / 2 for kind in kinds]) for kinds in zip(*pairs, strict=True))
    assert judging.kappa(one, other) == pytest.approx(0.29 / 0.59, abs=1e-12)
    assert math.isnan(judging.kappa(judged([1.0]), judged([math.nan])))


def test_a_result_says_who_is_better_or_how_many_prompts_it_would_take():
    assert "a is better" in "\n".join(judging.verdict_lines(judged([1.0] * 30 + [0.0] * 5), "a", "b"))
    assert "b is better" in "\n".join(judging.verdict_lines(judged([0.0] * 30 + [1.0] * 5), "a", "b"))
    unclear = "\n".join(judging.verdict_lines(judged([1.0] * 11 + [0.0] * 9), "a", "b"))
    assert "not distinguishable; a difference of this size would need about 8" in unclear
    assert judging.verdict_lines(judged([math.nan]), "a", "b") == ["judge: no prompt has a verdict"]


# Servers


class Server:
    """An OpenAI-compatible server that prefers the longer answer; `fails` statuses come first."""

    def __init__(self, fails=()):
        self.bodies, self.keys, self.fails = [], set(), list(fails)

    def reply(self, body):
        text = body["messages"][-1]["content"]
        a, b = (text.partition(f"<answer {x}>\n")[2].partition("\n</answer")[0] for x in "AB")
        return f"Longer is better. [[{'A' if len(a) > len(b) else 'B' if len(b) > len(a) else 'C'}]]"


@contextmanager
def running(server):
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            status = server.fails.pop(0) if server.fails else 200
            if status == 200:
                server.bodies.append(body)
                server.keys.add(self.headers.get("Authorization"))
            found = {"choices": [{"message": {"content": server.reply(body)}}]}
            data = json.dumps(found if status == 200 else {"error": "no"}).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *args):
            pass

    listening = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=listening.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{listening.server_port}/v1"
    finally:
        listening.shutdown()
        listening.server_close()
        thread.join()


MATCHES = [Match("1", "q", "a long answer", "short", {}), Match("2", "r", "x", "longer", {})]


def test_replies_of_a_server_are_asked_once_and_a_key_is_stored_nowhere(tmp_path, monkeypatch):
    monkeypatch.setenv(judges.KEY, "sk-secret")
    cache, server = tmp_path / "replies.jsonl", Server(fails=[429, 503])
    with running(server) as url:
        judge = judges.ServerJudge(url, "m", judges.Replies(cache=cache), pause=0.01)
        for _ in range(2):
            np.testing.assert_array_equal(judge.compare(MATCHES).first, [1.0, 0.0])
    assert len(server.bodies) == 4 and server.keys == {"Bearer sk-secret"}
    assert "secret" not in cache.read_text() and server.bodies[0]["temperature"] == 0
    with cache.open("a") as file:
        file.write('{"request": "half')  # a judgement that was killed
    assert len(judges.ReplyCache(cache).replies) == 4


def test_a_budget_is_checked_before_anything_is_asked(tmp_path):
    server = Server()
    with running(server) as url:
        cache = tmp_path / "replies.jsonl"
        judges.ServerJudge(url, "m", judges.Replies(cache=cache)).compare(MATCHES[:1])
        judge = judges.ServerJudge(url, "m", judges.Replies(budget=1, cache=cache))
        with pytest.raises(ValueError, match=r"--budget 1: 2 requests to m are needed \(2 are in"):
            judge.compare(MATCHES)
    assert len(server.bodies) == 2


def test_a_server_that_refuses_is_one_line():
    with (
        running(Server(fails=[401])) as url,
        pytest.raises(ValueError, match=r"/v1/chat/completions: error 401: .*no"),
    ):
        judges.ServerJudge(url, "m").compare(MATCHES)
    server = Server()
    server.reply = lambda body: "I like both"
    with running(server) as url, pytest.raises(ValueError, match="judge m: 4 of 4 replies have no verdict"):
        judges.ServerJudge(url, "m").compare(MATCHES)


# Files


def write(path, rows):
    text = json.dumps(rows) if path.suffix == ".json" else "".join(json.dumps(row) + "\n" for row in rows)
    path.write_text(text)
    return str(path)


def test_files_of_alpaca_eval_and_arena_hard_are_read(tmp_path):
    alpaca = write(tmp_path / "a.json", [{"instruction": "Hi?", "output": "Hello.", "generator": "m"}])
    assert list(judges.read_judged_prompts(alpaca).texts.values()) == ["Hi?"]
    assert list(judges.read_answers(alpaca).texts.values()) == ["Hello."]
    questions = write(
        tmp_path / "question.jsonl",
        [{"uid": "u1", "prompt": "One?"}, {"question_id": "q", "uid": "u2", "turns": [{"content": "Two?"}]}],
    )
    now = [{"role": "user", "content": "Two?"}, {"role": "assistant", "content": {"answer": "2"}}]
    answers = write(
        tmp_path / "model.jsonl",
        [{"uid": "u2", "messages": now}, {"uid": "u1", "choices": [{"turns": [{"content": "1"}]}]}],
    )
    prompts, found = judges.read_judged_prompts(questions), judges.read_answers(answers)
    assert prompts.texts == {"u1": "One?", "u2": "Two?"}
    (first, second) = judges.matches_of(prompts, found, found, (answers, answers))
    assert (first.one, second.one) == ("1", "2")  # by name, not by order


def test_reward_bench_rows_are_right_only_if_every_chosen_answer_wins(tmp_path):
    rows = [
        {"prompt": "p", "chosen": ["good"], "rejected": ["bad", "worse"], "subset": "Math"},
        {"prompt": "q", "chosen": ["good"], "rejected": ["better than good"], "subset": "Math"},
        {"prompt": "r", "chosen": ["good", "fine"], "rejected": ["bad"], "subset": "Ties"},
    ]
    read = judges.read_preferences(write(tmp_path / "bench.jsonl", rows))
    matches = judges.preference_matches(read)
    values = [1.0 if match.other in ("bad", "worse") else 0.0 for match in matches]
    assert judges.accuracy_by_subset(read, values) == {"Math": (1, 2), "Ties": (1, 1)}


@pytest.mark.parametrize(
    ("prompts", "answers", "line"),
    [
        ([{"prompt": "a"}, {"prompt": "b"}], [{"output": "x"}], "has 1 answers for 2 prompts"),
        ([{"id": 1, "prompt": "a"}], [{"id": 2, "output": "x"}], "1 of 1 prompts have no answer, such as 1"),
        ([{"id": 1, "prompt": "a"}, {"id": 1, "prompt": "b"}], [{"output": "x"}] * 2, "the same id '1' as"),
        ([{"text": "a"}], [{"output": "x"}], "no prompt in the columns prompt,"),
        ([{"prompt": "a"}], [{"output": 3}], "no text in the columns completion,"),
    ],
    ids=["fewer answers", "another name", "a name twice", "no prompt", "no answer"],
)
def test_files_that_do_not_belong_together_are_one_line(tmp_path, prompts, answers, line):
    files = write(tmp_path / "prompts.jsonl", prompts), write(tmp_path / "answers.jsonl", answers)
    with pytest.raises(ValueError, match=line):
        found = judges.read_answers(files[1])
        judges.matches_of(judges.read_judged_prompts(files[0]), found, found, (files[1], files[1]))


def test_the_command_judges_two_files_by_functions_and_a_server(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("JAXFT_CACHE", str(tmp_path / "cache"))
    write(tmp_path / "one.jsonl", [{"prompt": f"{i}?", "completion": "long enough"} for i in range(8)])
    write(
        tmp_path / "other.jsonl", [{"prompt": f"{i}?", "completion": "x" * (20 * (i > 5))} for i in range(8)]
    )
    (tmp_path / "mine.py").write_text("def brief(prompt, completion, row):\n    return -len(completion)\n")
    with running(Server()) as url:
        judged_by = ("--by", "mine.py:brief", "--by", f"{url}#m")
        code, out, _ = call(
            monkeypatch, capsys, "judge", "one.jsonl", "other.jsonl", *judged_by, "--out", "r.json"
        )
    assert code == 0
    assert "mine.py:brief: one wins 2, ties 0, loses 6 of 8 prompts against other" in out
    assert "m: one wins 6, ties 0, loses 2 of 8" in out and "agree with kappa -0.60" in out
    found = json.loads((tmp_path / "r.json").read_text(), parse_constant=pytest.fail)  # no NaN
    assert [judge["wins"] for judge in found["judges"]] == [2, 6] and len(found["values"]["m"]) == 8


def test_the_command_judges_judges_on_reward_bench_2_and_asks_a_server_once(tmp_path, monkeypatch, capsys):
    """Rows as in the released file; the longer answer is right in Factuality, and wrong in half of Focus."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("JAXFT_CACHE", str(tmp_path / "cache"))
    more = {"num_correct": 1, "num_incorrect": 3, "total_completions": 4, "models": ["m"] * 4}
    more |= {"additional_metadata": {"category": None}}
    answers = (["right answer"], ["a", "bb", "ccc"]), (["right answer"], ["a", "a longer answer", "c"])
    subsets = ("Factuality", 0), ("Factuality", 0), ("Focus", 0), ("Focus", 1)
    rows = [
        {
            "id": f"{n}",
            "prompt": f"{n}?",
            "chosen": answers[k][0],
            "rejected": answers[k][1],
            "subset": subset,
        }
        for n, (subset, k) in enumerate(subsets)
    ]
    file = write(tmp_path / "rb2.jsonl", [row | more for row in rows])
    server, outputs = Server(), []
    with running(server) as url:
        for budget in ("24", "1"):  # 4 rows of 3 matches in both orders; then all replies are in the cache
            argv = ("--preferences", file, "--by", f"{url}#m", "--budget", budget, "--out", "r.json")
            code, out, _ = call(monkeypatch, capsys, "judge", *argv)
            outputs.append(out)
            assert code == 0
        file = write(tmp_path / "rb3.jsonl", [rows[0] | more | {"prompt": "another?"}])
        code, _, error = call(
            monkeypatch, capsys, "judge", "--preferences", file, "--by", f"{url}#m", "--budget", "5"
        )
    assert code == 1 and "--budget 5: 6 requests to m are needed (0 are in the cache)" in error
    assert outputs[0] == outputs[1] and len(server.bodies) == 24
    assert "Factuality: 1.00 [" in outputs[0] and "Focus: 0.50 [" in outputs[0]
    assert json.loads((tmp_path / "r.json").read_text())["m"]["mean"] == 0.75


def test_the_command_compares_two_released_files_of_alpaca_eval(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text("def brief(prompt, completion, row):\n    return -len(completion)\n")

    def outputs(name, text):
        rows = [
            {"dataset": "helpful_base", "instruction": f"{i}?", "output": text, "generator": name}
            for i in range(6)
        ]
        return write(tmp_path / f"{name}.json", rows)

    files = outputs("short", "yes"), outputs("long", "yes, certainly")
    code, out, _ = call(monkeypatch, capsys, "judge", *files, "--by", "mine.py:brief")
    assert code == 0 and "short wins 6, ties 0, loses 0 of 6 prompts against long" in out


def test_answers_in_another_order_belong_to_the_prompts_that_their_rows_have(tmp_path):
    prompts = judges.read_judged_prompts(
        write(tmp_path / "p.json", [{"instruction": f"{i}?"} for i in "abc"])
    )

    def answers(order):
        file = write(tmp_path / f"{order}.json", [{"instruction": f"{i}?", "output": i} for i in order])
        return judges.read_answers(file), file

    (one, first), (other, second) = answers("abc"), answers("cab")
    assert [m.other for m in judges.matches_of(prompts, one, other, (first, second))] == ["a", "b", "c"]
    wrong, third = answers("cax")
    with pytest.raises(ValueError, match=r"cax.json: its prompts are not in the order .* of p.json:2"):
        judges.matches_of(prompts, one, wrong, (first, third))


def test_models_and_judges_of_the_same_name_are_told_apart(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for folder, sign in (("a", "-"), ("b", "")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "j.py").write_text(
            f"def f(prompt, completion, row):\n    return {sign}len(completion)\n"
        )
    for folder, text in (("a", "x"), ("b", "xx")):
        write(tmp_path / folder / "m1.5.jsonl", [{"prompt": f"{i}?", "completion": text} for i in range(6)])
    by = ("--by", "a/j.py:f", "--by", "b/j.py:f", "--out", "r.json")
    code, out, _ = call(monkeypatch, capsys, "judge", "a/m1.5.jsonl", "b/m1.5.jsonl", *by)
    assert (
        code == 0
        and "a/j.py:f: a/m1.5.jsonl wins 6, ties 0, loses 0 of 6 prompts against b/m1.5.jsonl" in out
    )
    assert {*json.loads((tmp_path / "r.json").read_text())["values"]} == {"a/j.py:f", "b/j.py:f"}


def test_a_judge_of_the_command_that_names_no_answer_is_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("JAXFT_CACHE", str(tmp_path / "cache"))
    file = write(tmp_path / "a.jsonl", [{"prompt": f"{i}?", "completion": "x"} for i in range(3)])
    server = Server()
    server.reply = lambda body: "Both are good."
    with running(server) as url:
        code, _, error = call(monkeypatch, capsys, "judge", file, file, "--by", f"{url}#m")
    assert code == 1 and error.count("\n") == 1
    assert "error: judge m: 6 of 6 replies have no verdict [[A]], [[B]] or [[C]], such as 'Both are" in error


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (("a.jsonl", "b.jsonl", "--by", "http://localhost/v1"), "expected http(s)://HOST/v1#MODEL"),
        (("a.jsonl", "--by", "exact"), "give two models or files of answers"),
        (("a.jsonl", "b.jsonl", "--by", "exact", "--preferences", "c"), "--preferences judges the judges"),
        (("a.jsonl", "b.jsonl", "--by", "exact", "--budget", "0"), "--budget: expected at least 1"),
        (("a.jsonl", "b.jsonl", "--by", "exact", "--by", "exact"), "--by exact is given twice"),
    ],
    ids=["no model", "one model", "preferences", "budget", "twice"],
)
def test_command_lines_that_cannot_be_judged_are_one_line(monkeypatch, capsys, options, line):
    code, _, err = call(monkeypatch, capsys, "judge", *options)
    assert code != 0 and line in err and err.count("\n") == 1
