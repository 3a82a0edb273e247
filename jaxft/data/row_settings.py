"""The settings that decide how a row of a dataset becomes token ids."""

from dataclasses import dataclass

from jaxft.data.chat.template_settings import DEFAULT_TEMPLATE_SETTINGS, TemplateSettings
from jaxft.data.rows.conversation import PLAIN
from jaxft.data.rows.row_text import DOCUMENT


@dataclass(frozen=True)
class RowSettings:
    """The settings that the tokens of a row depend on; they are part of the cache key.

    kinds: of the responses that are read. max_length: tokens of a prompt with a response, of a prompt alone
    where no response is read. extras: columns of numbers. loss_on, sample_by: see sft.Rows. weight_column:
    see pairs.PairRows. tools: JSON of name -> schemas of the tools that a row's prompt has, where the row's
    column "environment" is this name, or of "", every row; "" for those of the rows themselves. optional:
    whether a row without a prompt has an empty one, to which an environment adds. separator: see
    steps.SolutionRows. labels, question: see decision_rows.DecisionRows. Others: see DataSettings.
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
    labels: tuple[str, ...] = ()
    question: str | None = None

    @property
    def plain(self) -> bool:
        """Whether strings are plain text."""
        return self.format == PLAIN

    @property
    def numbers(self) -> tuple[str, ...]:
        """The columns of numbers that settings name."""
        return (*self.extras, *filter(None, (self.weight_column, self.order_by)))


DEFAULT_ROW_SETTINGS = RowSettings()
