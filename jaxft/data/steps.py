"""Solutions in steps with a label for each: rows, their tokens and batches, for process reward models.

The tokens are as TRL's PRMTrainer makes them: BOS if the tokenizer has one, the prompt, and each step
followed by the separator, all tokenised apart from one another. The label of a step is read at its last
token, which is the separator's last.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, ClassVar

import numpy as np
from jaxtyping import Bool

from jaxft.annotations import one_of
from jaxft.batch import Tokens
from jaxft.data.chat.loss_mask import LOSS_ON
from jaxft.data.data_settings import DataSettings
from jaxft.data.packing.cache import ColumnTypes
from jaxft.data.packing.pack import RowPlan
from jaxft.data.packing.reader import CutRows, Reader, RowTask, TokenisedRow
from jaxft.data.packing.row_tasks import remedy_for_too_long, text_columns
from jaxft.data.packing.tokenised import LABELS, MASS, TOKEN_WEIGHTS, TokenisedRows, ragged
from jaxft.data.row_settings import RowSettings
from jaxft.data.rows import formats
from jaxft.data.rows.example import RESPONSE, ParsedRow, Solution
from jaxft.data.rows.invalid import InvalidRow, attempt
from jaxft.data.sft import PackedBatches, Rows
from jaxft.data.source import RowSource

TOO_LONG = ("truncate", "drop", "error")


def _extras(settings: RowSettings) -> ColumnTypes:
    return {**text_columns(settings), **ragged(LABELS, np.int32)}


def _tokenise(rows: Sequence[ParsedRow | InvalidRow], reader: Reader) -> CutRows:
    """Yield each solution as an example, [] if it is left out as too long."""
    tokenizer, settings = reader.tokenizer, reader.settings
    solutions = [row.examples[RESPONSE] for row in rows if isinstance(row, ParsedRow)]
    texts = [text for x in solutions if isinstance(x, Solution) for text in (x.prompt, *x.steps)]
    *each, separator = _ids_of([*texts, settings.separator], tokenizer)
    pieces = iter(each)
    for row in rows:
        if isinstance(row, InvalidRow):
            yield row
            continue
        solution: Any = row.examples[RESPONSE]
        prompt, *steps = [next(pieces) for _ in range(1 + len(solution.steps))]
        bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
        yield attempt(_example, solution, [*bos, *prompt], [[*step, *separator] for step in steps], settings)


def _ids_of(texts: list[str], tokenizer: Any) -> list[list[int]]:
    ids: list[list[int]] = tokenizer(texts, add_special_tokens=False, verbose=False).input_ids
    return ids


STEP_TASK = RowTask(formats.STEPS, 1, "max_length", _tokenise, _extras, checks=())


def _example(
    solution: Solution, prompt: list[int], steps: list[list[int]], settings: RowSettings
) -> list[TokenisedRow]:
    """Return a solution, [] if it is left out as too long."""
    if not all(steps):
        raise InvalidRow(
            solution.name,
            "step without tokens",
            f"step {next(i for i, step in enumerate(steps) if not step)} has no token; fill it, or set a "
            "data.separator",
        )
    last = len(prompt) + np.cumsum([len(step) for step in steps]) - 1
    ids = np.array([*prompt, *(token for step in steps for token in step)], np.int32)
    limit, whole = settings.max_length, len(ids) <= settings.max_length
    if not whole and settings.too_long == "error":
        raise ValueError(
            f"{solution.name}: {len(ids)} tokens are more than data.max_length={limit}; "
            f"{remedy_for_too_long('max_length')}, or truncate"
        )
    kept = last[last < limit]
    if not whole and (settings.too_long == "drop" or not len(kept)):
        return []
    if settings.last_step and len(kept) < len(steps):
        return []
    ids, at = ids[:limit], min(len(prompt), limit)
    learned = np.zeros(len(ids), bool)
    learned[kept] = True
    labels = np.array(solution.labels[: len(kept)], np.int32)
    weights = np.zeros(len(ids) * settings.last_step, np.float32)
    weights[-1:] = 1  # a solution ends with its last step
    mass = float(weights.sum()) if settings.last_step else float(len(kept))
    extras = {MASS: mass, TOKEN_WEIGHTS: weights, LABELS: labels}
    return [TokenisedRow(ids, learned, (at, len(ids) - at), not whole, len(steps), len(kept), extras)]


@dataclass(frozen=True)
class SolutionRows(Rows):
    """Prompts, the steps of a solution, and whether each is right: the data of process reward models.

    Rows are {"prompt", "completions": [steps], "labels": [true or false]}. separator: the text behind every
    step; \\n is a line break. last_step_only: train on the last step of each solution alone, and leave out
    solutions whose last step is behind max_length tokens; evaluation reads all steps. All solutions of one
    prompt stay on one side of the split. too_long: "truncate" leaves out the steps behind max_length tokens,
    "drop" the row, "error" stops. weighting: "token" gives every step of the optimizer batch the same weight,
    "sequence" every solution; a column `weight` multiplies them. Other fields: see Rows; loss_on and
    sample_by have no meaning here.
    """

    too_long: Annotated[str, one_of(TOO_LONG)] = "truncate"
    packing: bool = True
    separator: str = "\n"
    last_step_only: bool = False
    task: ClassVar[RowTask] = STEP_TASK

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.loss_on != LOSS_ON[1] or self.format not in ("auto", formats.STEPS):
            raise ValueError(
                "data.loss_on and data.format have no meaning for steps with labels, which are plain text; "
                "remove them"
            )

    @property
    def token_settings(self) -> RowSettings:
        """The settings that the tokens of a row depend on."""
        separator = self.separator.replace("\\n", "\n")
        return replace(super().token_settings, separator=separator, last_step=self.last_step_only)

    @property
    def batches(self) -> type[PackedBatches]:
        """The layout of the batches."""
        return StepBatches

    def held_out_mask(self, rows: TokenisedRows) -> Bool[np.ndarray, " rows"]:
        """Return the mask of the rows to hold out, by their prompt."""
        return DataSettings.held_out_mask(self, rows)

    def open(self, tokenizer: Any, shards: int = 1, cache: Path | None = None) -> RowSource[Tokens]:
        """Read, tokenise (or load from the cache) and plan the batches; see DataSettings.open."""
        source = super().open(tokenizer, shards, cache)
        stats = replace(source.info.stats, learned=_learned_line(source.split.rows, source.split.train))
        return replace(source, info=replace(source.info, learned_ends={}, stats=stats))


@dataclass(frozen=True)
class StepBatches(PackedBatches):
    """Solutions packed into rows; evaluation reads all steps."""

    def evaluation(self, plan: RowPlan) -> tuple[Tokens, ...]:
        """Return rows as batches of one microbatch, in which every step has the same weight."""
        rows = self.split.rows
        weights = replace(rows.extras[TOKEN_WEIGHTS], counts=np.zeros(len(rows), np.int32))
        extras = {**rows.extras, MASS: rows.targets.astype(np.float64), TOKEN_WEIGHTS: weights}
        every = replace(self.split, rows=replace(rows, extras=extras))
        return PackedBatches.evaluation(replace(self, split=every), plan)


def _learned_line(rows: TokenisedRows, train: np.ndarray) -> str:
    labels = rows.extras[LABELS]
    steps = int(labels.counts[train].sum())
    right = sum(int(labels[int(i)].sum()) for i in train)
    return f"{steps:,} steps with labels, {100 * right / max(1, steps):.0f} % of them right"
