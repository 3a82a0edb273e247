"""Settings of chat templates, which every stage of a run shares."""

import json
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from jaxft.data.rows.columns import is_set_by_jaxft

DATE = "26 Jul 2024"  # Llama 3's default; a template that prints today's date would change tokens at midnight
SYSTEM = ("turn", "merge")  # the choices of data.system
TURN, MERGE = SYSTEM


@dataclass(frozen=True)
class TemplateSettings:
    """The settings in DataSettings that affect how a chat template renders a row. Meanings: see there.

    Raises ValueError for an argument that is not name=value, or that jaxft sets itself.
    """

    date: str = DATE
    chat_template_kwargs: tuple[str, ...] = ()
    system: str = TURN

    def __post_init__(self) -> None:
        if self.system not in SYSTEM:
            raise ValueError(f"data.system={self.system!r}; use one of {', '.join(SYSTEM)}")
        _ = self.arguments

    @cached_property
    def arguments(self) -> dict[str, Any]:
        """The template's arguments by name. Values are parsed as JSON; text that is not JSON is a string."""
        found: dict[str, Any] = {}
        for item in self.chat_template_kwargs:
            name, equals, text = (part.strip() for part in item.partition("="))
            if not (equals and text and name.isidentifier()):
                raise ValueError(
                    f"data.chat_template_kwargs: {item!r} is not of the form name=value, for example "
                    "enable_thinking=false"
                )
            if is_set_by_jaxft(name):
                raise ValueError(f"data.chat_template_kwargs: jaxft sets {name} itself; remove it")
            if name in found:
                raise ValueError(f"data.chat_template_kwargs: {name} is set twice; keep one")
            found[name] = _parsed(text)
        return found


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
