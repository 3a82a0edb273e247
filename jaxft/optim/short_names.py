"""Short names of the optimizers and schedules that settings may name, such as `optim.optimizer=muon`."""

from collections.abc import Mapping
from typing import NamedTuple

OPTIMIZERS = {
    "adamw": "jaxft.optim.rules:adamw",
    "adamw_8bit": "jaxft.optim.low_precision:adamw_8bit",
    "adamw_bf16": "jaxft.optim.low_precision:adamw_bf16",
    "adafactor": "jaxft.optim.rules:adafactor",
    "lion": "optax:lion",
    "muon": "jaxft.optim.muon:muon",
    "schedule_free_adamw": "jaxft.optim.rules:schedule_free_adamw",
}
SCHEDULES = {
    "constant": "jaxft.optim.schedules:constant_schedule",
    "linear": "jaxft.optim.schedules:linear_schedule",
    "cosine": "jaxft.optim.schedules:cosine_schedule",
    "wsd": "jaxft.optim.schedules:wsd_schedule",
    "cosine_with_restarts": "jaxft.optim.schedules:cosine_with_restarts_schedule",
}


class ShortNames(NamedTuple):
    """Part of the annotation of a setting that is a function: (short name, package.module:name) pairs."""

    pairs: tuple[tuple[str, str], ...]

    @classmethod
    def of(cls, names: Mapping[str, str]) -> "ShortNames":
        """Return the pairs of a table."""
        return cls(tuple(names.items()))
