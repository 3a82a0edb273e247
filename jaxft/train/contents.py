"""Parts of a run's report that are not in its settings: the parameter table and the data, as JSON."""

from typing import Any

from jaxft.data.inspection import Inspected, inspect_prompts, inspect_source
from jaxft.data.source import RowSource, Source
from jaxft.data.summary import data_summary
from jaxft.rl.rollout import PromptSource
from jaxft.runs.folder import DATA_JSON, PARAMETERS_JSON, write_durable_json
from jaxft.train.members import Job
from jaxft.train.partition import parameter_rows


def write_contents(job: Job, number: int, first: int) -> None:
    """Write parameters.json and data.json into the folder of a member, unless it resumes and has them.

    parameters.json: the rows of the parameter table. data.json: see data.summary. first: steps done before.
    """
    member = job.members[number]
    programs, paths = member.programs, [member.folder / name for name in (PARAMETERS_JSON, DATA_JSON)]
    if first and all(path.exists() for path in paths):
        return
    rows = [row._asdict() for row in parameter_rows(programs.partition, programs.mesh)]
    found = inspected(job.source_of(number))
    write_durable_json(paths[0], {"rows": rows})
    write_durable_json(paths[1], {} if found is None else data_summary(found, job.tokenizer))


def inspected(source: Source[Any]) -> Inspected | None:
    """Return the dataset of a run's source; None for a source that jaxft doesn't provide."""
    if isinstance(source, RowSource):
        return inspect_source(source)
    if isinstance(source, PromptSource):
        return inspect_prompts(source.data, source.train, source.eval_prompts)
    return None
