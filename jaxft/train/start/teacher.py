"""Find, check and load the teacher: a run's second, frozen model, for distillation or as a reference policy
with separate weights.

Its settings are models/adapted.py:Teacher.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax

from jaxft.models.adapted import TEACHER, Teacher
from jaxft.models.model import Model
from jaxft.nn import param_spec
from jaxft.nn.quant import Quant
from jaxft.nn.tree import Params
from jaxft.objectives.objective import Facts
from jaxft.runs import run_record
from jaxft.runs.loaded_weights import named_weights, source_options
from jaxft.train.settings import Run
from jaxft.train.trainable_params import Partition, trains_base
from jaxft.weights import pretrained
from jaxft.weights.hf import hub
from jaxft.weights.peft import adapter_folders
from jaxft.weights.peft.adapter_folders import adapter_folder
from jaxft.weights.storage import StoredModel, quantisation_summary


def find_teacher(
    ref: str, base: str, build: Callable[[str], Model], quant: Quant | None = None, shares: bool = True
) -> Teacher:
    """Return the settings of the second model that `ref` names.

    ref: a run, a PEFT folder, or a model: org/name[@revision], a folder, a .gguf file. base: the run's
    weights, which the second model shares if `shares` is True and `ref` is these weights or an adapter on
    them. build(weights) returns their Model. quant: how the weights are stored; ValueError if they are the
    run's. Raises ValueError or FileNotFoundError for a folder without weights.
    """
    named = named_weights(**source_options(ref))
    own_base, model = not shares or not _same_weights(named.ref, base), build(named.ref)
    teacher = Teacher(weights=named.ref, model=model, quant=quant) if own_base else Teacher()
    if quant and not own_base:
        text = f"{ref} shares the run's base and its storage; leave out reference_quant={quant.kind}"
        raise ValueError(text)
    if named.adapter is None:
        return teacher
    settings = adapter_folders.read_adapter_settings(str(named.adapter), model)
    return replace(teacher, start=str(named.adapter), adapter=replace(settings, dropout=0.0))


def _same_weights(one: str, other: str) -> bool:
    names = [hub.hub_name(ref) for ref in (one, other)]
    by_name = None not in names and names[0] == names[1]
    return one == other or by_name or hub.is_same_file(one, other)


def check_teacher(run: Run, parts: Partition, facts: Facts) -> None:
    """Raise ValueError for a teacher that the objective does not read, a missing one that it reads, or one
    that shares a base which the run changes.
    """
    teacher, is_read = run.teacher, facts.teacher or facts.reference == TEACHER
    if teacher is None:
        if is_read:
            raise ValueError(
                "this objective reads a second model, but run.teacher=none; set it in the recipe, for "
                "example Run(..., teacher=Teacher(weights=REF, model=model_for(REF)))"
            )
        return
    if not is_read:
        raise ValueError(
            f"run.teacher ({teacher.start or teacher.weights or run.weights!r}) is set, but this objective "
            "reads no second model; leave it out, or set "
            "preference(reference='teacher')"
        )
    if teacher.shares_base and trains_base(parts):
        raise ValueError(
            "the teacher shares the run's base, which is trained; load a second copy: set "
            f"teacher.weights={run.weights} and teacher.model"
        )
    if teacher.shares_base and teacher.adapter and run.adapter and run.adapter.changes_base:
        raise ValueError(
            f"adapter.init={run.adapter.init} changes the base that the teacher shares, but the teacher's "
            f"adapter {teacher.start} is for the unchanged base; use adapter.init=default"
        )
    longest = teacher.model.config.max_positions if teacher.model else run.data.max_length
    if run.data.max_length > longest:
        raise ValueError(
            f"data.max_length={run.data.max_length} is beyond the {longest} positions of the teacher "
            f"{teacher.weights}; lower it"
        )


def check_teacher_files(run: Run, tokenizer: Any, largest_id: int) -> None:
    """Check the files of the run's second model before they are loaded; do nothing for a run without one.

    Raises OSError or ValueError for weight files or an adapter that are missing or incomplete. Raises
    ValueError if its tokenizer has another id for a token of the run's `tokenizer`, or no embedding for
    `largest_id`, the largest token id of the rows.
    """
    teacher = run.teacher
    if teacher is None:
        return
    if teacher.weights is not None and teacher.model is not None:
        pretrained.open_params(teacher.weights, teacher.model)
        other = pretrained.load_tokenizer(teacher.weights).get_vocab()
        for token, number in sorted(tokenizer.get_vocab().items(), key=lambda item: item[1]):
            if other.get(token) != number:
                theirs = f"token {other[token]}" if token in other else "no token"
                raise ValueError(
                    f"the teacher {teacher.weights} has other tokens than {run.weights}: {token!r} is token "
                    f"{number} here and {theirs} there; use a teacher with the same tokenizer"
                )
        pretrained.check_token_id(teacher.weights, largest_id, teacher.model.config.vocab)
    if teacher.start is not None:
        pretrained.check_adapter_base(adapter_folder(teacher.start), teacher.weights or run.weights)


def teacher_fingerprints(teacher: Teacher | None) -> dict[str, str]:
    """Return hashes of the teacher's weights and of its adapter, by their names in config.json. Weights that
    it shares with the run have no hash here.
    """
    fingerprints: dict[str, str] = {}
    if teacher and teacher.weights is not None:
        fingerprints["teacher_fingerprint"] = run_record.weights_fingerprint(teacher.weights)
    if teacher and teacher.start is not None:
        run_record.check_results(adapter_folder(teacher.start))
        fingerprints["teacher_adapter_fingerprint"] = run_record.adapter_fingerprint(
            adapter_folder(teacher.start)
        )
    return fingerprints


def with_teacher_storage(parts: Partition, teacher: Teacher | None) -> Partition:
    """Return the partition with the storage of a teacher that has its own weights."""
    if teacher is None or teacher.model is None:
        return parts
    of_teacher = {f"{TEACHER}/{path}": storage for path, storage in _stored(teacher).storage.items()}
    return replace(parts, stored=replace(parts.stored, storage={**parts.storage, **of_teacher}))


def teacher_lines(run: Run, mesh: jax.sharding.Mesh) -> list[str]:
    """Return lines for the log about a run's second model; [] if it has none."""
    teacher = run.teacher
    if teacher is None:
        return []
    adapter = f" with the adapter {teacher.start}" if teacher.start else ""
    if teacher.weights is None or teacher.model is None:
        return [f"second model, frozen: the run's base{adapter or ' without an adapter, at no memory'}"]
    stored, count = _stored(teacher), param_spec.count_params(teacher.model.specs)
    text = f"second model, frozen: {teacher.weights}{adapter}, {count:,} parameters"
    quantised = quantisation_summary(stored, mesh)
    changes = pretrained.storage_changes(teacher.weights, stored)
    return [f"{text}; {quantised}" if quantised else text, *changes]


def load_teacher(teacher: Teacher, run: Run, mesh: jax.sharding.Mesh) -> Params:
    """Load a teacher's parameters onto the mesh: {"base", "adapter"}, without "base" if it shares the run's,
    without "adapter" if it has none. Raises MemoryError if the mesh has no room for them.
    """
    params: Params = {}
    if teacher.weights is not None and teacher.model is not None:
        try:
            params["base"] = pretrained.load_frozen(teacher.weights, teacher.model, mesh, teacher.quant)
        except (MemoryError, RuntimeError) as error:
            if not isinstance(error, MemoryError) and "RESOURCE_EXHAUSTED" not in str(error):
                raise
            raise MemoryError(
                f"the second model {teacher.weights} does not fit into the memory that the run's model "
                "leaves; quantise it by teacher.quant or reference_quant, or use more devices"
            ) from error
    if teacher.start is not None:
        ref, model = teacher.weights or run.weights, teacher.model or run.model
        params["adapter"], _ = adapter_folders.load_adapter(adapter_folder(teacher.start), model, mesh, ref)
    return params


def _stored(teacher: Teacher) -> StoredModel:
    assert teacher.model is not None
    return pretrained.frozen_model(teacher.model, teacher.quant, teacher.weights)
