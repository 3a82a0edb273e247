"""The second model of a run: a teacher, or a reference policy with weights of its own. It is never trained.

Its parameters are named "teacher" in the run's tree: {"base", "adapter"}, without "base" if it shares that of
the run. The run's base without an adapter has no parameters there and takes no memory. An objective reads it
as it reads the run's model, with the same parameters and log-probs of both in one pass over the heads:

    heads = [HeadInput(one, params, one.hidden(params, batch)[0]) for one in (model, model.teacher)]
    student, teacher = read_logps_of_heads(heads, (batch.read, batch.targets))
"""

from dataclasses import dataclass, replace

from jaxft.models.adapted import adapted
from jaxft.models.heads import TEACHER
from jaxft.models.model import Model
from jaxft.nn.adapters.lora import Adapter
from jaxft.nn.quant.quant import Quant


@dataclass(frozen=True)
class Teacher:
    """Settings of a second, frozen language model; by default it is the run's base without its adapter.

    start: a PEFT folder, or a run's, with an adapter that it has. adapter: the settings of that adapter.
    weights: where a base of its own comes from (see weights.hub); None shares the run's. model: the
    architecture of `weights`. quant: how these are stored; None for the compute dtype.

        Teacher()  # the base
        Teacher(weights="org/large", model=model_for("org/large"), quant=Quant("nf4"))
    """

    start: str | None = None
    adapter: Adapter | None = None
    weights: str | None = None
    model: Model | None = None
    quant: Quant | None = None

    def __post_init__(self) -> None:
        if (self.start is None) != (self.adapter is None):
            raise ValueError("teacher.start and teacher.adapter belong together; set both or neither")
        if (self.weights is None) != (self.model is None):
            raise ValueError("teacher.weights and teacher.model belong together; set both or neither")
        if self.quant and self.weights is None:
            raise ValueError(
                f"teacher.quant={self.quant.kind} needs teacher.weights: the run's base, which the teacher "
                "shares, is stored as quant says"
            )
        if self.quant and self.quant.calibrate:
            raise ValueError("teacher.quant.calibrate: only the run's own base is calibrated; leave it out")

    @property
    def shares_base(self) -> bool:
        """Whether its base is the run's."""
        return self.weights is None


def with_teacher(model: Model, teacher: Teacher | None) -> Model:
    """Return the model with a second one, whose parameters are named "teacher"; itself without a teacher."""
    if teacher is None:
        return model
    own = adapted(teacher.model or model, teacher.adapter)
    specs = {name: x for name, x in own.specs.items() if name == "adapter" or not teacher.shares_base}
    return replace(model, heads={**model.heads, TEACHER: specs}, teacher=own)
