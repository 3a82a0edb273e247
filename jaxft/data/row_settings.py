"""The settings that decide how a row of a dataset becomes token ids, and how chat templates render it."""

import json
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Any

from jaxft.annotations import check_bounds, one_of
from jaxft.data.rows.columns import is_set_by_jaxft
from jaxft.data.rows.conversation import PLAIN
from jaxft.data.rows.text_files import DOCUMENT

DATE = "26 Jul 2024"  # Llama 3's default; a template that prints today's date would change tokens at midnight
SYSTEM = ("turn", "merge")  # the choices of data.system
TURN, MERGE = SYSTEM


@dataclass(frozen=True)
class TemplateSettings:
    """The settings in DataSettings that affect how a chat template renders a row. They are explained there.

    Raises ValueError for an argument that is not name=value, or that jaxft sets itself.
    """

    date: str = DATE
    chat_template_kwargs: tuple[str, ...] = ()
    system: Annotated[str, one_of(SYSTEM)] = TURN

    def __post_init__(self) -> None:
        check_bounds(self, "data")
        _ = self.arguments

    @cached_property
    def arguments(self) -> dict[str, Any]:
        """The template's arguments by name. Values are parsed as JSON; text that is not JSON is a string."""
        arguments: dict[str, Any] = {}
        for item in self.chat_template_kwargs:
            name, equals, text = (part.strip() for part in item.partition("="))
            if not (equals and text and name.isidentifier()):
                raise ValueError(
                    "data.chat_template_kwargs must be of the form name=value, for example "
                    f"enable_thinking=false, got {item!r}"
                )
            if is_set_by_jaxft(name):
                raise ValueError(f"data.chat_template_kwargs: jaxft sets {name} itself; remove it")
            if name in arguments:
                raise ValueError(f"data.chat_template_kwargs: {name} is set twice; keep one")
            arguments[name] = _parsed(text)
        return arguments


def _parsed(text: str) -> Any:
    """Parse true, false, none (in any case) and JSON. Return other text unchanged."""
    words = {"true": True, "false": False, "none": None}
    if text.lower() in words:
        return words[text.lower()]
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


DEFAULT_TEMPLATE_SETTINGS = TemplateSettings()


@dataclass(frozen=True)
class RowSettings:
    """The settings that the tokens of a row depend on; they are part of the cache key.

    kinds: the responses that are read, such as "chosen" and "rejected". max_length: tokens of a prompt with a
    response, or of a prompt alone where no response is read. extras: columns of numbers that batches contain.
    loss_on, sample_by, too_long: see sft.Rows. weight_column: see pairs.PairRows. tools: JSON of
    {environment: schemas of its tools}, which replace the tools of rows whose column "environment" has this
    name (the name "" is any row); tools="" keeps the tools of the rows. optional: whether a row may lack a
    prompt; an environment then writes it. separator: see sft.SolutionRows; last_step: last_step_only there.
    best_first: see pairs.PairRows. labels, question, unlabelled: see decision_rows.DecisionRows. reading: how
    the answers of a dataset of decisions name a choice, see decisions.reading_of; None: each row decides.
    Others: see DataSettings.
    """

    kinds: tuple[str, ...] = ()
    columns: tuple[str, ...] = ()
    format: str = "auto"
    max_length: int = 1024
    too_long: str = "truncate"
    template: TemplateSettings = DEFAULT_TEMPLATE_SETTINGS
    order_by: str | None = None
    max_samples: int | None = None
    extras: tuple[str, ...] = ()
    weight_column: str | None = None
    loss_on: str = "completion"
    sample_by: str = DOCUMENT
    tools: str = ""
    optional: bool = False
    separator: str = "\n"
    last_step: bool = False
    labels: tuple[str, ...] = ()
    question: str | None = None
    best_first: bool = False
    unlabelled: bool = False
    reading: str | None = None

    @property
    def plain(self) -> bool:
        """Whether prompts and responses that are strings are plain text, not turns of a chat."""
        return self.format == PLAIN

    @property
    def numbers(self) -> tuple[str, ...]:
        """The columns of numbers that are read: extras, weight_column and order_by."""
        return (*self.extras, *filter(None, (self.weight_column, self.order_by)))


DEFAULT_ROW_SETTINGS = RowSettings()
