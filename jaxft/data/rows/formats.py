"""The formats of rows: one table of the columns of each, ROW_FORMATS, and how its rows are read.

`data.format=auto` uses the format whose columns are present, of those for the kind of data that a run reads.
configs/README.md has examples: Rows for SFT, Preferences, Rankings and ratings. `format="plain"` takes the
strings of formats that may be plain as text without a chat template. All formats but text may have the
columns "tools" (JSON schemas) and "chat_template_kwargs"; SFT rows also "weight" (see example.py); pairs
also "reference", a third response ("gold", data.third).

Which format a dataset has, and columns with other names: format_choice.py. Formats of single datasets and
rankings: published_formats.py. Decisions: decisions.py. Prompts without responses are read from the columns
of all formats: conversation.py.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from jaxft.data.decisions import DECISION, INDEX, LABEL, LETTER, RERANKER, VALUE, parse
from jaxft.data.row_settings import DEFAULT_ROW_SETTINGS, RowSettings
from jaxft.data.rows.columns import list_of, text_of
from jaxft.data.rows.conversation import (
    Columns,
    chat_of,
    chats_of,
    compared_chats,
    plain_texts,
    require_difference,
    response_index,
    split_row,
)
from jaxft.data.rows.example import RESPONSE, Example, Solution, Text, parse_number
from jaxft.data.rows.published_formats import (
    PROMPT,
    RANKED,
    RATINGS,
    from_better,
    from_glaive,
    from_openai,
    from_options,
    from_preference,
    from_ranking,
    from_texts,
    has_ratings,
    ranking_note,
    with_openai_prompt,
    with_ranked_prompt,
)
from jaxft.data.rows.row_files import Row

SFT, PAIRS, PROMPTS, DECISIONS, STEPS = "sft", "pairs", "prompts", "decisions", "steps"
RATED = "rated"  # the format of responses in a list
Parse = Callable[[Row, RowSettings], dict[str, Example]]
Rewrite = Callable[[Row, RowSettings], Row]
TEMPLATE_COLUMNS = ("tools", "chat_template_kwargs")  # columns that any conversation may have
CHAT_COLUMNS = ("system", *TEMPLATE_COLUMNS, "weight")
PAIR_COLUMNS = ("system", "reference", *TEMPLATE_COLUMNS)
_EARLIER = ("input", "history")  # further columns of an instruction
_ANSWER = ("response", "output")
_LABEL = ("label", "kto_tag")
# CSV files have strings alone, and pandas writes integers of a column with gaps as floats.
_LABELS = {"true": True, "1": True, "1.0": True, "false": False, "0": False, "0.0": False}


# ---- SFT


def _text(row: Row, settings: RowSettings) -> dict[str, Example]:
    return {RESPONSE: Text(row.name, text_of(row, "text"))}


def _conversation(row: Row, settings: RowSettings, column: str) -> dict[str, Example]:
    turns = split_row(row, column, {}).prompt
    return {RESPONSE: chat_of(row, turns, response_index(turns))}


def _completion(row: Row, settings: RowSettings) -> dict[str, Example]:
    columns = {RESPONSE: "completion"}
    return {**(plain_texts(row, columns) if settings.plain else _chats(row, "prompt", columns))}


def _instruction(row: Row, settings: RowSettings) -> dict[str, Example]:
    return {**_chats(row, "instruction", {RESPONSE: response_column(row)})}


def _chats(row: Row, prompt: str, columns: Columns) -> dict[str, Any]:
    return chats_of(row, split_row(row, prompt, columns))


def response_column(row: Row) -> str:
    """Return the column of the response to an instruction, response or output."""
    columns = [c for c in _ANSWER if c in row.fields]
    names = [c for c in columns if row.fields[c] is not None] or columns[:1]
    if len(names) > 1:
        problem = "the row has both 'response' and 'output'; choose one with data.columns=response=..."
        raise row.invalid("two response columns", problem)
    return names[0]


# ---- pairs


def _pair(row: Row, settings: RowSettings, prompt: str | None) -> dict[str, Example]:
    """Return the chosen and the rejected response, and of a ranking also the responses between these. prompt:
    the prompt's column, None if the prompt is the common beginning of the responses.
    """
    between = [kind for kind in settings.kinds if kind.startswith("rank_") and kind in row.fields]
    return _compared(row, settings, prompt, {kind: kind for kind in ("chosen", "rejected", *between)})


def _refused(row: Row, settings: RowSettings, reason: str, problem: str) -> dict[str, Example]:
    """Raise InvalidRow. It is the `parse` of a format that jaxft recognises and cannot read."""
    raise row.invalid(reason, problem)


def _labelled(
    row: Row, settings: RowSettings, prompt: str, response: str | None = None
) -> dict[str, Example]:
    """Return the response as chosen or rejected, as the row's label says. response: the response's column,
    None for the response to an instruction.
    """
    names = [name for name in _LABEL if name in row.fields]
    name = next((name for name in names if row.fields[name] not in (None, "")), names[0])
    kind = "chosen" if _label(row, name, row.fields[name]) else "rejected"
    return _compared(row, settings, prompt, {kind: response or response_column(row)})


def _has_label(row: Row) -> bool:
    return any(str(row.fields.get(name)).strip().lower() in _LABELS for name in _LABEL)


def _is_refused(row: Row) -> bool:
    return False


def _label(row: Row, where: str, value: Any) -> bool:
    label = _LABELS.get(str(value).strip().lower())
    if label is None:
        problem = f"{where} is {repr(value)[:40]}; use true or false (or 1 or 0)"
        raise row.invalid("label that is neither true nor false", problem)
    return label


def _compared(row: Row, settings: RowSettings, prompt: str | None, columns: Columns) -> dict[str, Example]:
    """Return the prompt with each response of settings.kinds. columns: the responses' columns by kind."""
    if "gold" in settings.kinds:
        if row.fields.get("reference") is None:
            raise row.invalid(
                "missing column 'reference'",
                f"no column 'reference', from which data.third=gold reads the third response; the "
                f"row has {', '.join(map(str, row.fields))}; add the column or set data.third=none",
            )
        columns = {**columns, "gold": "reference"}
    if settings.plain:
        texts = plain_texts(row, columns)
        require_difference(row, texts)
        return {**texts}
    chats = compared_chats(row, prompt, columns)
    return {kind: chats[kind] for kind in settings.kinds if kind in chats}


# ---- steps


def _steps(row: Row, settings: RowSettings) -> dict[str, Example]:
    """Return the steps of a solution with their labels."""
    steps, labels = list_of(row, "completions"), list_of(row, "labels")
    if not steps:
        raise row.invalid(
            "no steps", "'completions' is empty; add the steps of the solution, or remove the row"
        )
    if len(steps) != len(labels):
        raise row.invalid(
            "steps without labels",
            f"the row has {len(steps)} steps in 'completions' and {len(labels)} entries in 'labels'; use one "
            "label for each step",
        )
    named = {f"completions[{i}]": x for i, x in enumerate(steps)}
    texts = [text_of(Row(row.name, named), name) for name in named]
    right = tuple(_label(row, f"labels[{i}]", label) for i, label in enumerate(labels))
    return {RESPONSE: Solution(row.name, text_of(row, "prompt"), tuple(texts), right)}


# ---- decisions


def _decision(row: Row, settings: RowSettings, format: str, reading: str | None = None) -> dict[str, Example]:
    settings = settings if reading is None else replace(settings, reading=reading)
    return {RESPONSE: parse(row, format, settings)}


def _with_choices(row: Row) -> Row:
    """Return a row with its question and choices as one conversation, in the column `messages`."""
    fields = {**row.fields, "answer": None}
    asked = parse(Row(row.name, fields), DECISION, replace(DEFAULT_ROW_SETTINGS, unlabelled=True)).messages
    others = {name: x for name, x in row.fields.items() if name not in ("question", "context", "system")}
    return Row(row.name, {**others, "messages": [*asked]})


# ---- numbers


def _pair_weight(row: Row, settings: RowSettings) -> float:
    """Return the number in the column data.weight_column; 1 if that is None. Raises InvalidRow for a missing,
    negative or non-finite number, and for any other value.
    """
    column = settings.weight_column
    weight = 1.0 if column is None else number_of(row, column, "data.weight_column")
    if weight < 0:
        raise row.invalid("negative weight", f"the weight in column {column!r} is {weight:g}; use 0 or more")
    return weight


def _row_weight(row: Row, settings: RowSettings) -> float:
    """Return the number in the column `weight`, a factor of the row's loss weights; 1 if null or missing."""
    value = row.fields.get("weight")
    weight = 1.0 if value in (None, "") else parse_number(value)
    if weight is None or weight < 0:
        raise row.invalid(
            "weight that is no number",
            f"column 'weight' is {repr(value)[:40]}; use a finite number of at least 0, or rename the "
            "column if it is not a loss weight",
        )
    return weight


def own_columns(row: Row, settings: RowSettings) -> Row:
    """Return the row unchanged: the `rewrite` of formats that need none."""
    return row


def _fits_any_row(row: Row) -> bool:
    return True


def _no_note(settings: RowSettings) -> str:
    return ""


def number_of(row: Row, column: str, setting: str) -> float:
    """Return the finite number in a column that a setting names. Raises InvalidRow for anything else."""
    value = row.fields.get(column)
    if value is None:
        columns = ", ".join(map(str, row.fields))
        raise row.invalid(
            "missing number",
            f"no number in column {column!r}, which {setting} names; add it, or name one that the row has: "
            f"{columns}",
        )
    number = parse_number(value)
    if number is None:
        problem = f"column {column!r} ({setting}) is {repr(value)[:40]}; use a finite number"
        raise row.invalid("missing number", problem)
    return number


# ---- the table


@dataclass(frozen=True)
class RowFormat:
    """A format of rows. A new one is an entry in ROW_FORMATS and its `parse`.

    name: its value of data.format. task: the kind of data that reads it: SFT, PAIRS, DECISIONS or STEPS.
    required: its columns; each tuple lists the accepted names of one column. parse(row, settings): the prompt
    with each response, by kind. optional: columns that it may have. plain: whether its strings may be plain
    text. weight(row, settings): the weight of a row in the loss. rewrite(row, settings): the row in the
    columns of another format, before anything is read from it. note(settings): how the rows are read, for the
    start of a run. listed: whether errors name it; formats of a single dataset are not. labelled: whether its
    choices are the labels of all rows. answer: the column that rows may lack where they are only scored.
    fits(row): whether the values of a row with these columns fit too, for errors about rows of another task.
    prompt(row): the row with its prompt in a column of conversation.PROMPT_COLUMNS; None if it always has
    one.
    """

    name: str
    task: str
    required: tuple[tuple[str, ...], ...]
    parse: Parse
    optional: tuple[str, ...] = PAIR_COLUMNS
    plain: bool = False
    weight: Callable[[Row, RowSettings], float] = _pair_weight
    rewrite: Rewrite = own_columns
    note: Callable[[RowSettings], str] = _no_note
    listed: bool = True
    labelled: bool = False
    answer: str = ""
    fits: Callable[[Row], bool] = _fits_any_row
    prompt: Callable[[Row], Row] | None = None

    @property
    def columns(self) -> set[str]:
        """All columns that its rows may have."""
        return {*self.optional, *(column for names in self.required for column in names)}


def _sft(name: str, required: tuple[tuple[str, ...], ...], parse: Parse, *more: str) -> RowFormat:
    return RowFormat(name, SFT, required, parse, (*more, *CHAT_COLUMNS), weight=_row_weight)


def _pairs(
    name: str, required: tuple[tuple[str, ...], ...], rewrite: Rewrite, *more: str, **others: Any
) -> RowFormat:
    """Return a format of pairs or rankings whose rows are rewritten."""
    parse = partial(_pair, prompt="prompt")
    return RowFormat(name, PAIRS, required, parse, (*PAIR_COLUMNS, *more), rewrite=rewrite, **others)


def _decision_format(name: str, required: tuple[tuple[str, ...], ...], *more: str) -> RowFormat:
    optional, parse = ("system", "chat_template_kwargs", "weight", *more), partial(_decision, format=name)
    answer = required[-1][0] if required else ""
    return RowFormat(name, DECISIONS, required, parse, optional, weight=_row_weight, answer=answer)


def _labelled_texts(name: str, *columns: str) -> RowFormat:
    """Return a format of several texts with a label."""
    known, required = _decision_format(LABEL, ()), tuple((column,) for column in (*columns, "label"))
    rewrite = partial(from_texts, columns=columns)
    return replace(
        known, name=name, required=required, rewrite=rewrite, labelled=True, listed=False, answer="label"
    )


def _options(
    name: str,
    question: tuple[str, ...],
    options: tuple[str, ...],
    answer: str,
    reading: str | None,
    first: int = 0,
) -> RowFormat:
    """Return a format of questions with options. reading: how an answer names an option, None to decide it by
    all answers of the dataset. Others: see from_options.
    """
    required = tuple((column,) for column in (*question, *options, answer))
    rewrite = partial(from_options, question=question, options=options, answer=answer, first=first)
    parse, known = partial(_decision, format=DECISION, reading=reading), _decision_format(DECISION, ())

    def prompt(row: Row) -> Row:
        return _with_choices(rewrite(row, DEFAULT_ROW_SETTINGS))

    known = replace(known, parse=parse, rewrite=rewrite, prompt=prompt if options else None)
    return replace(known, name=name, required=required, listed=False, answer=answer)


_PROMPT, _MESSAGES, _TURNS, _INSTRUCTION = ("prompt",), ("messages",), ("conversations",), ("instruction",)
_COMPARED = (("chosen",), ("rejected",))
_RATED_ALONE = partial(
    _refused, reason="ratings of single responses",
    problem="the row rates a single response; for preferences join the rows of each prompt into "
    '{"prompt", "responses": [...], "ratings": [...]}',
)  # fmt: skip
_UNLABELLED = partial(
    _refused, reason="steps without labels",
    problem="the row has no column labels; give each step a label, true or false",
)  # fmt: skip
_STEPS = partial(
    _refused, reason="steps with labels",
    problem="the row has the steps of one response, with labels; train a process reward model with the "
    "recipe process_reward",
)  # fmt: skip
ROW_FORMATS = (
    RowFormat("text", SFT, (("text",),), _text, ("weight",), plain=True, weight=_row_weight),
    _sft("messages", (_MESSAGES,), partial(_conversation, column="messages")),
    replace(_sft("prompt-completion", (_PROMPT, ("completion",)), _completion), plain=True),
    _sft("instruction", (_INSTRUCTION, _ANSWER), _instruction, *_EARLIER),
    _sft("conversations", (_TURNS,), partial(_conversation, column="conversations")),
    replace(
        _sft("glaive", (("system",), ("chat",)), partial(_conversation, column="messages")),
        rewrite=from_glaive, prompt=from_glaive, listed=False,
    ),
    RowFormat("preference", PAIRS, (_PROMPT, *_COMPARED), partial(_pair, prompt="prompt"), plain=True),
    RowFormat("implicit", PAIRS, _COMPARED, partial(_pair, prompt=None)),
    RowFormat("ranking", PAIRS, (_TURNS, *_COMPARED), partial(_pair, prompt="conversations")),
    RowFormat(
        "instruction", PAIRS, (_INSTRUCTION, *_COMPARED), partial(_pair, prompt="instruction"),
        (*PAIR_COLUMNS, *_EARLIER),
    ),
    _pairs(RATED, (PROMPT, RANKED), from_ranking, *RATINGS, plain=True, note=ranking_note,
           fits=has_ratings, prompt=with_ranked_prompt),
    _pairs(
        "helpsteer3", (("context",), ("response1",), ("response2",), ("overall_preference",)),
        partial(from_preference, responses=("response1", "response2"), column="overall_preference"),
        prompt=with_ranked_prompt, listed=False,
    ),
    _pairs(
        "helpsteer2-preference", (_PROMPT, ("response_1",), ("response_2",), ("preference_strength",)),
        partial(from_preference, responses=("response_1", "response_2"), column="preference_strength"),
        listed=False,
    ),
    _pairs(
        "saferlhf", (_PROMPT, ("response_0",), ("response_1",), ("better_response_id",)),
        partial(from_better, responses=("response_0", "response_1"), column="better_response_id",
                better=("0", "1")),
        listed=False,
    ),
    _pairs(
        "shp", (("history",), ("human_ref_A",), ("human_ref_B",), ("labels",)),
        partial(from_better, responses=("human_ref_A", "human_ref_B"), column="labels", better=("1", "0")),
        "score_A", "score_B", prompt=with_ranked_prompt, listed=False,
    ),
    _pairs(
        "openai", (("input",), ("preferred_output",), ("non_preferred_output",)), from_openai,
        prompt=with_openai_prompt, listed=False,
    ),
    RowFormat("helpsteer", PAIRS, (_PROMPT, ("response",), ("helpfulness",), ("correctness",)), _RATED_ALONE,
              listed=False, fits=_is_refused),
    RowFormat("labelled-steps", PAIRS, (PROMPT, RANKED, ("labels",)), _STEPS, listed=False,
              fits=_is_refused),
    RowFormat(
        "unpaired", PAIRS, (_PROMPT, ("completion",), _LABEL),
        partial(_labelled, prompt="prompt", response="completion"), plain=True, fits=_has_label,
    ),
    RowFormat(
        "unpaired-messages", PAIRS, (_MESSAGES, _LABEL),
        partial(_labelled, prompt="messages", response="messages"), fits=_has_label,
    ),
    RowFormat(
        "unpaired-conversations", PAIRS, (_TURNS, _LABEL),
        partial(_labelled, prompt="conversations", response="conversations"), fits=_has_label,
    ),
    RowFormat(
        "unpaired-instruction", PAIRS, (_INSTRUCTION, _ANSWER, _LABEL),
        partial(_labelled, prompt="instruction"), (*PAIR_COLUMNS, *_EARLIER), fits=_has_label,
    ),
    RowFormat("steps", STEPS, (_PROMPT, ("completions",), ("labels",)), _steps, ("weight",),
              weight=_row_weight),
    RowFormat("unlabelled-steps", STEPS, (_PROMPT, ("completions",)), _UNLABELLED, listed=False),
    replace(
        _decision_format(DECISION, (("question", "messages"), ("choices",), ("answer",)), "context"),
        prompt=_with_choices,
    ),
    replace(_decision_format(LABEL, (("text",), ("label",))), labelled=True),
    _decision_format(RERANKER, (("query",), ("document",), ("label",)), "instruction"),
    _labelled_texts("nli", "premise", "hypothesis"),
    _labelled_texts("mrpc", "sentence1", "sentence2"),
    _labelled_texts("qnli", "question", "sentence"),
    _labelled_texts("qqp", "question1", "question2"),
    _options("boolq", ("passage", "question"), (), "answer", VALUE),
    _options("superglue-boolq", ("passage", "question"), (), "label", VALUE),
    _options("passage-options", ("passage", "question"), ("options",), "answer", None),
    _options("passage-choices", ("passage", "question"), ("choices",), "answer", None),
    _options("reclor", ("context", "question"), ("answers",), "label", INDEX),
    _options("quail", ("context", "question"), ("answers",), "correct_answer_id", INDEX),
    _options("race", ("article", "question"), ("options",), "answer", LETTER),
    _options("hellaswag", ("ctx",), ("endings",), "label", INDEX),
    _options("piqa", ("goal",), ("sol1", "sol2"), "label", INDEX),
    _options("medmcqa", ("question",), ("opa", "opb", "opc", "opd"), "cop", INDEX),
    _options("winogrande", ("sentence",), ("option1", "option2"), "answer", INDEX, first=1),
    _options(
        "social_iqa", ("context", "question"), ("answerA", "answerB", "answerC"), "label", INDEX, first=1
    ),
)  # fmt: skip
# Names of the rows of each task, for errors about rows that another task reads.
TASKS = {
    SFT: "SFT; train on them with the recipe sft",
    PAIRS: "preference pairs; train on pairs with the recipe dpo",
    STEPS: "steps with labels; train a process reward model with the recipe process_reward",
    DECISIONS: "decisions; train on them with the recipe decision",
}


def formats_of(task: str, numbers: tuple[str, ...] = (), unlabelled: bool = False) -> dict[str, RowFormat]:
    """Return the formats of a task by name. numbers: columns of numbers that rows of every format may also
    have. unlabelled: whether decisions may lack the column of their answer.
    """
    formats = [replace(f, optional=(*f.optional, *numbers)) for f in ROW_FORMATS if f.task == task]
    if unlabelled:
        formats = [
            replace(
                f, required=tuple(names for names in f.required if names != (f.answer,)),
                optional=(*f.optional, f.answer),
            )
            for f in formats
        ]  # fmt: skip
    return {f.name: f for f in formats}
