"""Score the completions of preference rows with a reward model.

    python scripts/score.py --run runs/reward --file pairs.jsonl
    python scripts/score.py --model FOLDER [--adapter FOLDER] --file pairs.jsonl --json

--model is the folder of a Hugging Face sequence classifier with one label or, with --adapter, a base model
(by default the one that the adapter was trained on). Rows have the formats of the recipe `reward`: prompt,
chosen and rejected; or of `kto`: prompt, completion and label, with one response each. It prints the
rewards of the responses of each row, then the accuracy over the pairs. Several adapters of one base,
--adapter NAME=FOLDER repeated, are compared by one program.

With a run of the recipe `process_reward` and its rows, prompt, completions and labels, it prints the
probability that each step is right, and the accuracy over the steps.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any, get_args

sys.path[0] = str(Path(__file__).resolve().parents[1])


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    from jaxft.annotations import ComputeDtype, QuantKind
    from jaxft.cli.cli import COUNT, CommandParser, add_adapters
    from jaxft.data.rows.invalid_rows import FEW, INVALID

    parser = CommandParser(__doc__)
    parser.add_argument("--run", help="a reward run's folder")
    parser.add_argument(
        "--model", help="a sequence classifier's folder or, with --adapter, its base, instead of --run"
    )
    add_adapters(parser)
    parser.add_argument("--file", required=True, help="preference rows")
    parser.add_argument(
        "--max-length", type=COUNT, default=1024, help="most tokens of prompt and completion (default 1024)"
    )
    parser.add_argument("--invalid", choices=INVALID, default=FEW, help="as data.invalid (default few)")
    parser.add_argument(
        "--columns", help="as data.columns, such as chosen=good,rejected=bad (default: the run's)"
    )
    parser.add_argument("--batch", type=COUNT, default=8, help="pairs in a batch (default 8)")
    parser.add_argument(
        "--dtype",
        choices=get_args(ComputeDtype),
        default="bfloat16",
        help="dtype of the computation (default bfloat16)",
    )
    parser.add_argument(
        "--quant", choices=get_args(QuantKind), help="quantise the base (default: as in the run, or none)"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object per pair")
    return parser


def arguments() -> argparse.Namespace:
    """Parse and check the command line."""
    parser = make_parser()
    args = parser.parse_args()
    if bool(args.run) == bool(args.model or args.adapter):
        parser.error("name the weights either by --run, or by --model, --adapter or both")
    return args


Scores = list[tuple[str, float | None, float | None]]
StepScores = list[tuple[str, list[float], list[bool]]]


def is_process_reward(args: argparse.Namespace) -> bool:
    """Whether --run is a process reward model, which scores the steps of a solution."""
    from jaxft.runs.folder_copies import local_folder
    from jaxft.runs.run_record import read_record

    if args.run is None:
        return False
    return "SolutionRows" in read_record(local_folder(args.run))["data"].get("type", "")


def step_scores(args: argparse.Namespace) -> StepScores:
    """Return (name of the row, probability that each step is right, labels of the steps) for each row."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from jaxft.data.sft import SolutionRows
    from jaxft.distributed import sharding
    from jaxft.objectives.reward_model import process_reward
    from jaxft.rl import reward_models
    from jaxft.runs import loaded_weights
    from jaxft.weights import pretrained

    named = loaded_weights.named_adapters(args.run, args.model, args.adapter, "")
    (weights,), mesh = named.values(), sharding.make_mesh(sharding.MeshShape())
    columns = () if args.columns is None else tuple(args.columns.split(","))
    trained_on = weights.record["data"] if weights.record else {}
    rows = SolutionRows(
        args.file, held_out=args.file, batch=args.batch, max_length=args.max_length, packing=False,
        invalid=args.invalid, columns=columns, separator=trained_on.get("separator", "\n"),
    )  # fmt: skip
    source = rows.open(pretrained.load_tokenizer(weights.tokenizer), sharding.row_shards(mesh))
    quant, dtype = loaded_weights.common_quant(named, args.quant), jnp.dtype(args.dtype)
    loaded = reward_models.load_reward_model(weights.ref, mesh, weights.adapter, quant, dtype)
    objective, layout, by_row = process_reward(loaded.model), source.layout, dict[int, Any]()
    forward = jax.jit(
        lambda params, batch: objective.forward(params, jax.tree.map(lambda x: x[0], batch), None, {}).score
    )
    with jax.set_mesh(mesh):
        for number, batch in enumerate(source.held_out):
            scores = jax.device_get(forward(loaded.params, sharding.shard_batch(mesh, batch)))
            members = layout.held_plan.slice(number * len(scores), (number + 1) * len(scores)).members
            for row, member in enumerate(members.tolist()):
                steps = np.flatnonzero(batch.token_weights[0, row] > 0)
                right = 1 / (1 + np.exp(-scores[row, steps].astype(np.float64)))
                by_row[member] = right.tolist(), (batch.targets[0, row, steps] > 0).tolist()
    names = source.split.rows.names
    return [(names[number], *by_row[number]) for number in sorted(by_row)]


def print_step_scores(scores: StepScores, as_json: bool) -> None:
    """Print the probabilities of each row's steps, and the accuracy over all steps."""
    from jaxft.objectives.intervals import wilson

    for name, right, labels in scores:
        if as_json:
            print(json.dumps({"row": name, "right": right, "labels": labels}))
        else:
            each = zip(right, labels, strict=True)
            print(name.ljust(16), "  ".join(f"{x:.2f} {'right' if y else 'wrong'}" for x, y in each))
    steps = [(x > 0.5) == y for _, right, labels in scores for x, y in zip(right, labels, strict=True)]
    accuracy = sum(steps) / max(1, len(steps))
    print(
        f"{sum(steps)} of {len(steps)} steps are judged as labelled ({accuracy:.2f} "
        f"{wilson(accuracy, len(steps)).text(2)})",
        file=sys.stderr,
    )


def rewards(args: argparse.Namespace) -> dict[str, Scores]:
    """Return adapter -> [(name of the row, reward of the chosen response, reward of the rejected one), ...];
    a reward is None if the row lacks this response.

    Raises ValueError for a reward that is not finite.
    """
    import jax
    import jax.numpy as jnp

    from jaxft.data.pairs import PairRows
    from jaxft.data.rows.invalid_rows import invalid_lines
    from jaxft.data.source import open_for
    from jaxft.distributed import sharding
    from jaxft.objectives.reward_model import reward
    from jaxft.rl import reward_models
    from jaxft.runs import loaded_weights
    from jaxft.runs.loaded_weights import prompt_settings
    from jaxft.weights import pretrained

    named = loaded_weights.named_adapters(args.run, args.model, args.adapter, "")
    for line in (line for weights in named.values() for line in weights.notes):
        print(line, file=sys.stderr)
    mesh = sharding.make_mesh(sharding.MeshShape())
    sizes = {"held_out": "none", "batch": args.batch, "max_length": args.max_length}
    ref, sources = next(iter(named.values())).ref, {}
    attention = pretrained.model_for(ref).attention
    for name, weights in named.items():
        settings = prompt_settings(weights.record, args.columns)
        rows = PairRows(args.file, invalid=args.invalid, unpaired=True, **sizes, **settings)
        tokenizer = pretrained.load_tokenizer(weights.tokenizer)
        sources[name] = open_for(attention, rows, tokenizer, sharding.row_shards(mesh))
    for line in invalid_lines(next(iter(sources.values())).info.stats.invalid):
        print(line, file=sys.stderr)
    quant, dtype = loaded_weights.common_quant(named, args.quant), jnp.dtype(args.dtype)
    folders = {name: weights.adapter for name, weights in named.items() if weights.adapter is not None}
    if folders:
        loaded = reward_models.load_reward_adapters(ref, mesh, folders, quant, dtype)
    else:
        loaded = dict.fromkeys(named, reward_models.load_reward_model(ref, mesh, None, quant, dtype))
    objective = reward(next(iter(loaded.values())).model)
    forward = jax.jit(
        lambda params, batch: objective.forward(params, jax.tree.map(lambda x: x[0], batch), None, {})
    )
    scores = {}
    for name, source in sources.items():
        pretrained.check_token_id(ref, source.info.stats.largest_id, loaded[name].model.config.vocab)
        with jax.set_mesh(mesh):
            scores[name] = scores_of(args.file, source, loaded[name], forward, mesh)
    return scores


def scores_of(file: str, source: Any, loaded: Any, forward: Any, mesh: Any) -> Scores:
    """Return the name and the rewards of each row. file: its name, for errors. source: batches of the rows.
    loaded: the reward model. forward: compiled function (params, batch) -> rewards.
    """
    import jax
    import numpy as np

    from jaxft.distributed import sharding
    from jaxft.rl import reward_models

    by_pair = dict[int, tuple[float | None, ...]]()
    for batch in source.cover(range(len(source.keys))):
        batch = batch if loaded.pad is None else reward_models.read_before_pad(batch, loaded.pad)
        outputs = jax.device_get(forward(loaded.params, sharding.shard_batch(mesh, batch)))
        for at, pair in np.ndenumerate(batch.index[0]):
            if pair >= 0:
                both = zip((outputs.chosen[at], outputs.rejected[at]), batch.lengths[0][at], strict=True)
                by_pair[int(pair)] = tuple(float(x) if length else None for x, length in both)
                if not all(x is None or np.isfinite(x) for x in by_pair[int(pair)]):
                    raise ValueError(
                        f"{file}: the rewards of row {pair + 1} are not finite: {by_pair[int(pair)]}; use "
                        "--dtype float32, or check the reward model"
                    )
    names = source.split.rows.names
    return [(names[number], chosen, rejected) for number, (chosen, rejected) in sorted(by_pair.items())]


def pairs_of(scores: Scores) -> list[tuple[float, float]]:
    """Return (reward of chosen, reward of rejected) for the rows that have both responses."""
    return [(a, b) for _, a, b in scores if a is not None and b is not None]


def row_line(name: str, chosen: float | None, rejected: float | None) -> str:
    """Return the rewards of a row's responses as a line."""
    shown = {"chosen": chosen, "rejected": rejected}
    parts = [name.ljust(16), *(f"{kind} {x:8.3f}" for kind, x in shown.items() if x is not None)]
    if chosen is not None and rejected is not None:
        parts.append("" if chosen > rejected else "wrong" if chosen < rejected else "tie")
    return "  ".join(parts)


def print_scores(scores: Scores, as_json: bool, adapter: str) -> None:
    """Print the rewards of each row, and the accuracy over pairs with its 95 % interval.

    adapter: its name, "" for a single one.
    """
    from jaxft.objectives.intervals import wilson

    by = {"adapter": adapter} if adapter else {}
    if adapter and not as_json:
        print(f"adapter {adapter}")
    for number, (name, chosen, rejected) in enumerate(scores):
        if as_json:
            print(json.dumps({"pair": number, "row": name, **by, "chosen": chosen, "rejected": rejected}))
        else:
            print(row_line(name, chosen, rejected))
    pairs = pairs_of(scores)
    if not pairs:
        return
    won, ties = sum(a > b for a, b in pairs), sum(a == b for a, b in pairs)
    accuracy, tied = (won + ties / 2) / len(pairs), f", {ties} ties count 1/2" if ties else ""
    shown = f"{accuracy:.2f} {wilson(accuracy, len(pairs)).text(2)}{tied}"
    print(
        f"{adapter + ': ' if adapter else ''}the chosen completion has the higher reward in {won} of "
        f"{len(pairs)} pairs ({shown if ties < len(pairs) else 'all are ties'})",
        file=sys.stderr,
    )


def comparison_lines(scores_of_runs: dict[str, Scores]) -> list[str]:
    """Return a sentence for each adapter: its accuracy minus the first adapter's, on the same pairs."""
    from jaxft.objectives.intervals import paired_fractions

    wins = {
        name: [1.0 if a > b else 0.5 if a == b else 0.0 for a, b in pairs_of(scores)]
        for name, scores in scores_of_runs.items()
    }
    (first, base), *others = wins.items()
    if not base:
        return []
    return [
        f"{name} against {first}: {paired_fractions(base, of_name).text('pairs')}" for name, of_name in others
    ]


def main() -> int:
    """Score and print."""
    args = arguments()
    if is_process_reward(args):
        print_step_scores(step_scores(args), args.json)
        return 0
    try:
        scores_of_runs = rewards(args)
    except ValueError as error:
        raise ValueError(str(error).replace("data.invalid=drop", "--invalid drop")) from error
    for name, scores in scores_of_runs.items():
        print_scores(scores, args.json, name if len(scores_of_runs) > 1 else "")
    for line in comparison_lines(scores_of_runs):
        print(line, file=sys.stderr)
    return 0


if __name__ == "__main__":
    from jaxft.runs import terminal

    terminal.quiet()
    sys.exit(terminal.one_line_errors(main))
