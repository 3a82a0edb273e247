"""Files of rows that a run must refuse: (kind of rows, file name, content, words in the error)."""

import json

Q, A = {"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}
GOOD = {
    "sft": {"prompt": "a", "completion": "b"},
    "chat": {"messages": [Q, A]},
    "pairs": {"prompt": "a", "chosen": "b", "rejected": "c"},
    "labels": {"prompt": "a", "completion": "b", "label": True},
    "prompts": {"prompt": "a"},
}
LINE = "rows.jsonl:3"
SURROGATE, DEEP = "\ud800", "[" * 100_000 + "]" * 100_000
SYSTEM, CALL = {"role": "system", "content": "s"}, {"function": {"name": "f", "arguments": {}}}

# A file of good rows whose third line is this text.
TEXTS = [
    "{", "}", "[", "]", "null", "true", "1", "1.5", '"text"', "[]", "[1]", "{}", '{"prompt"}', '{"prompt": }',
    '{"prompt": "a" "completion": "b"}', "{'prompt': 'a', 'completion': 'b'}",
    '{"prompt": "a", "completion": "b"',
    '{"prompt": "a", "completion": "b"}}', '{"prompt": "a", "completion": "b"} x',
    '{"prompt": "a\x00b", "completion": "b"}',
    '{"prompt": "a", "completion": undefined}', "prompt,completion", "<rows/>", "---", "\x1b[31m", "\x00\x00",
    '{"prompt": ' + DEEP + "}", DEEP, '{"prompt": ' + "9" * 5000 + "}", '{"prompt": "a", "completion": "b",}',
    '{"prompt": "\\x41"}', '{"prompt": "\\ud8"}', '{"prompt": null, "completion": null}',
    '{"prompt": "", "completion": ""}',
]  # fmt: skip

# Rows by kind; the third row of a file of good ones.
VALUES = [None, "", " ", "\n\t", 0, 1.5, True, [], {}, [[]], [1], ["b"], {"role": "x"}, [None], SURROGATE]
COLUMNS = {"sft": ("completion",), "pairs": ("chosen", "rejected"), "labels": ("completion", "label"),
           "chat": ("messages",), "prompts": ("prompt",)}  # fmt: skip
ACCEPTED = [("labels", "label", True), ("labels", "label", 0)]
ROWS = [
    *(
        (kind, {**GOOD[kind], column: value})
        for kind, columns in COLUMNS.items()
        for column in columns
        for value in VALUES
        if (kind, column, value) not in ACCEPTED
    ),
    *((kind, {"other": "a"}) for kind in GOOD),
    *((kind, {**GOOD[kind], next(iter(GOOD[kind])): SURROGATE}) for kind in GOOD),
    ("pairs", {"prompt": "a", "chosen": "b", "rejected": "b"}), ("pairs", {"prompt": "a", "chosen": "b"}),
    ("labels", {**GOOD["labels"], "label": "yes"}), ("labels", {**GOOD["labels"], "label": 2}),
    ("labels", {**GOOD["labels"], "label": -1}), ("labels", {**GOOD["labels"], "label": 0.5}),
    *(
        ("chat", {"messages": turns})
        for turns in (
            [Q], [SYSTEM], [SYSTEM, Q], [Q, Q], [{"role": "user"}, A], [{"content": "x"}, A],
            [Q, {"role": "assistant"}],
            [Q, {**A, "content": ""}], [Q, {**A, "content": " \n"}], [Q, {**A, "content": 3}],
            [Q, {**A, "content": {"text": "y"}}],
            [Q, {**A, "content": [{"type": "image", "url": "x"}]}], [Q, {**A, "content": None}],
            [{**Q, "role": 1}, A],
            [{**Q, "role": None}, A], [Q, {**A, "content": SURROGATE}], [{**Q, "content": SURROGATE}, A],
            ["x", A], [Q, [A]],
            [Q, {**A, "tool_calls": "f"}], [Q, {**A, "tool_calls": [3]}], [Q, {**A, "tool_calls": [CALL]}],
            [Q, {**A, "weight": 0}], [Q, {**A, "train": False}], "[]", '[{"role": "user"}]',
        )
    ),
    ("prompts", {"prompt": [{"role": SURROGATE, "content": "x"}]}),
    ("chat", {"messages": [Q, A], "tools": 3}), ("chat", {"messages": [Q, A], "tools": {"name": "f"}}),
    ("chat", {"messages": [Q, A], "system": 3}), ("chat", {"messages": [Q, A], "system": ["s"]}),
]  # fmt: skip

# Whole files.
GOOD_LINES = "".join(json.dumps(GOOD["sft"]) + "\n" for _ in range(2))
FILES = [
    ("sft", "rows.jsonl", "", "rows.jsonl"), ("sft", "rows.jsonl", "\n\n\n", "rows.jsonl"),
    ("sft", "rows.jsonl", b"\xff\xfe{\x00", "rows.jsonl:1"),
    ("sft", "rows.jsonl", GOOD_LINES.encode("utf-16") + b"\x00", "rows.jsonl"),
    ("sft", "rows.jsonl", GOOD_LINES + "\n" + GOOD_LINES, "rows.jsonl:3"),
    ("sft", "rows.jsonl", b"\x1f\x8b\x08\x00", "rows.jsonl:1"),
    ("sft", "rows.json", "", "rows.json"), ("sft", "rows.json", "[]", "rows.json"),
    ("sft", "rows.json", "{", "rows.json"),
    ("sft", "rows.json", "[1, 2]", "rows.json:1"), ("sft", "rows.json", DEEP, "rows.json"),
    ("sft", "rows.json", "null", "rows.json"),
    ("sft", "rows.json", '{"a": ' + DEEP + "}", "rows.json"),
    ("sft", "rows.json", '[{"prompt": "a"', "rows.json"),
    ("sft", "rows.csv", "", "rows.csv"), ("sft", "rows.csv", "prompt,completion\n", "rows.csv"),
    ("sft", "rows.csv", "prompt,prompt\na,b\n", "rows.csv:1"),
    ("sft", "rows.csv", "prompt,completion\na\n", "rows.csv:2"),
    ("sft", "rows.csv", "prompt,completion\na,b,c\n", "rows.csv:2"),
    ("sft", "rows.csv", 'prompt,completion\n"a,b\n', "rows.csv"),
    ("sft", "rows.csv", b"prompt,completion\na,\xff\n", "rows.csv"),
    ("sft", "rows.csv", "prompt,completion\n,\n", "rows.csv:2"),
    ("sft", "rows.csv", "x;y\na;b\n", "rows.csv"),
    ("sft", "rows.parquet", "", "rows.parquet"), ("sft", "rows.parquet", "PAR1", "rows.parquet"),
    ("sft", "rows.parquet", b"PAR1" + bytes(64) + b"PAR1", "rows.parquet"),
    ("sft", "rows.txt", "", "rows.txt"),
    ("sft", "rows.jsonl.gz", b"\x1f\x8b\x08\x00", "rows.jsonl.gz"),
    ("sft", "rows", GOOD_LINES, "unknown file type"),
    ("sft", "rows.arrow", "ARROW1", "rows.arrow"), ("sft", "rows.pkl", b"\x80\x04.", "rows.pkl"),
]  # fmt: skip

# The ids of the cases that run by default, one of each kind of mistake; glob patterns.
QUICK_ROWS = (
    "sft {", "sft [1]", 'sft {"prompt": "a", "completion": "b"} x', "sft " + DEEP[:100] + "...",
    'sft {"prompt": "a", "completion": null}', 'pairs {"prompt": "a", "chosen": [], "rejected": "c"}',
    'pairs {"prompt": "a", "chosen": "b", "rejected": "b"}',
    'labels {"prompt": "a", "completion": "b", "label": 2}', 'prompts {"prompt": ""}',
    'pairs {"prompt": "*ud800", "chosen": "b", "rejected": "c"}', 'chat {"other": "a"}',
    'chat {"messages": "[]"}', 'rows.jsonl ', "rows.jsonl b'*xff*xfe*'", "rows.json {",
    "rows.csv prompt,completion*a,b,c*", "rows.csv prompt,prompt*", "rows.parquet PAR1", "rows.jsonl.gz *",
    "rows.pkl *",
)  # fmt: skip
