"""A run's folder `runs/<name>/`: its lock, its record of settings, and the rules for resuming it."""

import contextlib
import fcntl
import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, NamedTuple, TextIO

from jaxft.distributed.disk import fsync, make_folder, sync_tree, write_durably
from jaxft.runs.metrics_log import METRICS, json_value, read_entries
from jaxft.runs.settings.setting_values import absent_lines, describe, differences
from jaxft.runs.versions_and_devices import environment, environment_changes, versions
from jaxft.weights.edit import calibrated_base
from jaxft.weights.gguf.gguf_file import part_files
from jaxft.weights.hf import hf_read, hub
from jaxft.weights.hf.complete_folders import content_sha256, files_sha256, folder_damage

# Settings that may change when a run is resumed; any other change would make it a different run.
MAY_CHANGE = (
    "weights_path", "weights_revision", "loop", "data.epochs", "data.workers", "data.tokens",
    "trackers", "tracking", "samples", "scoring", "sampling", "general", "mesh", "hosts",
)  # fmt: skip
# Except these: scores of all checkpoints are compared, so they are of one metric on the same rows.
MUST_STAY = ("loop.best_metric", "loop.greater_is_better", "loop.eval_fraction")
HASH = "sha256:"
RUN_DTYPES = ("float32", "bfloat16", "float16", "float64")
RESULTS = ("adapter", "model", "best")  # folders of weights in a run's folder
CHECKPOINTS = "checkpoints"
FOLDERS = (*RESULTS, CHECKPOINTS, "tensorboard", "rollouts")
FILE_KINDS = (".json", ".jsonl", ".md", ".png")  # suffixes of files that a run writes into its folder
CARD, SUMMARY = "README.md", "summary.json"
PARAMETERS_JSON, DATA_JSON = "parameters.json", "data.json"  # for the report, see train/logs/logs.py
RECORD = (  # a finished run's files; metrics.jsonl ends with their digests, see metrics_log
    "config.json", "env.json", PARAMETERS_JSON, DATA_JSON, "held_out.jsonl", "completions.jsonl", SUMMARY,
)  # fmt: skip
CALIBRATED_JSON = "calibrated.json"  # the name and a hash of the codes of a calibrated base
NO_DEFAULTS: Mapping[str, Any] = MappingProxyType({})
NOT_COMPARED = (
    "command",  # the overrides; their result is in the other fields
    "chat_template",  # the fingerprint of the rows depends on it
)


# The folder and its files


def folder_of(root: Path, name: str) -> Path:
    """Return the folder of the run called `name`. Raises ValueError for a name that leads out of `root`."""
    parts = Path(name).parts
    if not parts or Path(name).is_absolute() or ".." in parts:
        raise ValueError(f"name={name!r} is not the name of a folder in {root}; use letters, digits, - and _")
    return root / name


@contextlib.contextmanager
def lock(folder: Path) -> Iterator[TextIO]:
    """Create a run's folder and lock it for the `with` block, which gets the open lock file. After the block,
    remove the folder if it has nothing but this file.

    Raises OSError if another process has the lock, and the error of check_paths.
    """
    path = folder / "lock"
    taken = f"{folder}: another process is running this run; wait for it, or choose another name=..."
    make_folder(folder)
    check_paths(folder)
    try:
        lock_file = path.open("a")
    except FileNotFoundError as error:  # another process has just removed the folder
        raise OSError(taken) from error
    with lock_file as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            is_ours = os.path.samestat(os.fstat(file.fileno()), path.stat())
        except (BlockingIOError, FileNotFoundError):
            is_ours = False
        if not is_ours:  # another process has it, or has just removed it
            raise OSError(taken)
        try:
            yield file
        finally:
            with contextlib.suppress(OSError):
                if [inner.name for inner in folder.iterdir()] == [path.name]:
                    path.unlink()
                    folder.rmdir()


def check_paths(folder: Path) -> None:
    """Raise ValueError for a path in a run's folder that the run could not write later: a pipe, socket or
    device, a file with the name of one of the run's folders, or a folder with the name of one of its files.
    """
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        must_be = "folder" if path.name in FOLDERS else "file"
        is_right = path.is_dir() if must_be == "folder" else path.is_file()
        is_profile = path.is_dir() and path.suffix not in FILE_KINDS and path.name != "lock"  # or the like
        if path.exists() and not (is_right or is_profile):
            kind = "file" if path.is_file() else "folder" if path.is_dir() else "pipe, socket or device"
            result = path.name if path.name in FOLDERS else "files"
            raise ValueError(
                f"{path}: a {kind} is in the way; the run writes its {result} here. Move it, or choose "
                "another name=..."
            )


def write_durable_json(path: Path, value: Any) -> None:
    """Write a JSON file atomically: a reader sees the old file or the new one, also after a power cut."""
    write_durably(path, durable_json(value))


def durable_json(value: Any) -> bytes:
    """Return the content of a JSON file of the run folder."""
    return (json.dumps(json_value(value), indent=2, allow_nan=False) + "\n").encode()


def read_saved_json(path: Path) -> dict[str, Any]:
    """Read a JSON object of the run folder. Raises ValueError that names a damaged file."""
    remedy = "restore it, or choose another name=..."
    if path.name == SUMMARY:
        remedy = "delete it and start the run's command again, which writes it from the last checkpoint"
    try:
        if path.exists() and not path.is_file():
            raise ValueError("it is not a regular file")
        value = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not valid JSON ({error}); {remedy}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path}: expected a JSON object, got {type(value).__name__}; {remedy}")
    return value


def part_of(record: Any, name: str) -> dict[str, Any]:
    """Return record[name] if it is a dict, else {}. record: parsed JSON of any type."""
    part = record.get(name) if isinstance(record, dict) else None
    return part if isinstance(part, dict) else {}


def write_record(
    folder: Path, record: dict[str, Any], step: int = 0, attention: str | None = None
) -> list[str]:
    """Write config.json, and add this start to env.json, where "earlier" has those before it, oldest first.

    record: the settings, for config.json. step: how many steps earlier starts have done. attention: the train
    step's attention kernel. Return a line for each version, flag, device or kernel that has changed.
    """
    write_durable_json(folder / "config.json", record)
    path, now = folder / "env.json", environment(step, attention)
    earlier, lines = list[Any](), list[str]()
    if path.exists():
        try:
            before = read_saved_json(path)
            lines = environment_changes(before, now)
            older = before.pop("earlier", [])
            earlier = [*(older if isinstance(older, list) else []), before]
        except ValueError as error:
            lines = [f"the versions of earlier starts are lost: {error}"]
    write_durable_json(path, {**now, "earlier": earlier})
    return lines


def read_record(folder: Path) -> dict[str, Any]:
    """Return the settings of a run from its config.json. Raises ValueError for a file that is not a run's."""
    path = folder / "config.json"
    record = read_saved_json(path)
    model, data = record.get("model"), record.get("data")
    if (
        not isinstance(record.get("weights"), str)
        or not (isinstance(model, dict) and model.get("dtype") in RUN_DTYPES)
        or not (isinstance(data, dict) and isinstance(data.get("date"), str))
        or not isinstance(record.get("quant"), dict | None)
        or not isinstance(record.get("weights_path"), str | None)
    ):
        raise ValueError(
            f"{path}: not the settings of a run (weights, model, data or quant are missing or of another "
            "type); restore the file"
        )
    return record


# Resuming


def finished_steps(folder: Path) -> int:
    """Return the number of steps of a finished run, 0 for a run that is not finished. Raises ValueError for a
    damaged summary.json.
    """
    path = folder / SUMMARY
    steps = read_saved_json(path).get("steps") if path.exists() else 0
    if type(steps) is not int or steps < 0:
        raise ValueError(
            f"{path}: steps is {steps!r}, not a number of steps; remove the file, and the run resumes from "
            "its last checkpoint"
        )
    return steps


def early_end(folder: Path, by: Literal["patience", "planned"]) -> int | None:
    """Return a number from summary.json about why a run ended early; None for a run that has not finished.

    by="patience": the value of loop.patience if this setting ended the run, else None. by="planned": the
    number of planned steps if a callback ended the run, else None.
    """
    path = folder / SUMMARY
    number = read_saved_json(path).get(by) if path.exists() else None
    return number if type(number) is int else None


def failed_members(folder: Path) -> list[str]:
    """Return the labels of a sweep's members that ended with non-finite steps or losses."""
    path = folder / SUMMARY
    return list(read_saved_json(path).get("failed", [])) if path.exists() else []


def changes_since_start(folder: Path, record: dict[str, Any], defaults: Mapping[str, Any]) -> list[str]:
    """Return the `permitted_changes` from the folder's config.json to `record`, [] without a config.json."""
    path = folder / "config.json"
    return permitted_changes(folder, read_saved_json(path), record, defaults) if path.exists() else []


def permitted_changes(
    folder: Path | str, old: dict[str, Any], new: dict[str, Any], defaults: Mapping[str, Any] = NO_DEFAULTS
) -> list[str]:
    """Return the differences between a run's original settings and today's, one line each.

    folder: where the original settings are, for errors. defaults: each setting's default by dotted name, see
    recorded_defaults; a run that began before a setting existed continues with its default. Raises ValueError
    that lists the differences which would change what the run computes.
    """
    lines, refused = setting_changes(old, new, defaults)
    if refused:
        raise ValueError(
            f"{folder}: cannot resume, these settings differ from the original run: {'; '.join(refused)}. "
            "Restore them, or choose another name=..."
        )
    return lines


def setting_changes(
    old: dict[str, Any], new: dict[str, Any], defaults: Mapping[str, Any] = NO_DEFAULTS
) -> tuple[list[str], list[str]]:
    """Return (all differences, those that would change what a run computes), see permitted_changes."""
    old, new = ({k: describe(v) for k, v in r.items() if k not in NOT_COMPARED} for r in (old, new))
    lines = differences(old, json.loads(json.dumps(new)))
    permitted = re.compile(rf"({'|'.join(map(re.escape, MAY_CHANGE))})[.:]")
    began_before = absent_lines(defaults)
    fixed = [line for line in lines if line.startswith(MUST_STAY)]
    changed = [line for line in lines if not permitted.match(line) or line in fixed]
    refused = [line for line in changed if line not in began_before]
    return lines, _explained(refused, new)


def _explained(lines: list[str], record: dict[str, Any]) -> list[str]:
    """Replace lines about fingerprints, hashes of files, by lines that name the changed files; leave out one
    if the setting that names the files is in `lines` too. lines: such as "data_fingerprint: 1a -> 2b".
    record: today's settings.
    """
    names, explained = [line.partition(":")[0] for line in lines], []
    for line, name in zip(lines, names, strict=True):
        part = name.removesuffix("_fingerprint")
        if part == name:
            explained.append(line)
        elif part not in names and not any(other.startswith(f"{part}.") for other in names):
            what = {
                "weights": f"the files of model={record.get('weights')}",
                "start": f"the files of start={record.get('start')}",
                "data": f"the rows of data={record.get('data', {}).get('train')}, or how they become tokens,",
            }.get(part, f"the files of the {part.replace('_', ' ')}")
            explained.append(f"{what} have changed since the run started")
    return explained


def process_independent(record: dict[str, Any]) -> dict[str, Any]:
    """Return the settings and library versions that every process of a run must agree on."""
    excluded = ("weights_path", "weights_revision", "hosts", *NOT_COMPARED)
    return {**{name: value for name, value in record.items() if name not in excluded}, **versions()}


# Results


def sync_results(folder: Path) -> None:
    """Wait until everything that a run has written into its folder at its end is on disk."""
    for path in folder.iterdir():
        if path.name in RESULTS or path.suffix in FILE_KINDS:
            sync_tree(path)
    fsync(folder)


def result_hashes(folder: Path) -> dict[str, str]:
    """Return {path relative to a run's folder: SHA-256 in hex} of the files in adapter/, model/ and best/.

    *.md files are left out, as a user may edit a model card. {} for a run without these folders.
    """
    paths = sorted(
        path
        for name in RESULTS
        for path in (folder / name).rglob("*")
        if path.is_file() and path.suffix != ".md"
    )
    names = [path.relative_to(folder).as_posix() for path in paths]
    return dict(zip(names, files_sha256(paths), strict=True))


def recorded_results(folder: Path) -> dict[Path, str] | None:
    """Return the SHA-256 of the files that a finished run wrote into `folder`, by path, from its
    summary.json.

    folder: a run's folder, or a result in it, such as adapter/. None for a run without recorded hashes and
    for other folders. Raises ValueError for a damaged summary.json.
    """
    inside, run = folder.resolve(), _run_of(folder)
    if run is None:
        return None
    recorded = read_saved_json(run / SUMMARY).get("files")
    if not isinstance(recorded, dict | None):
        raise ValueError(f"{run / SUMMARY}: files={recorded!r:.60} is not an object; restore the file")
    if recorded is None:
        return None
    paths = {run.resolve() / name: sha256 for name, sha256 in recorded.items()}
    return {folder / p.relative_to(inside): sha for p, sha in paths.items() if p.is_relative_to(inside)}


def _run_of(folder: Path) -> Path | None:
    """Return the folder of a finished run, RUN, if `folder` is RUN or a result in it, such as RUN/adapter.

    None for a run without summary.json, which has not finished, and for any other folder.
    """
    if (folder / SUMMARY).is_file():
        return folder
    inside = folder.resolve()
    above = [f for f in inside.parents[:2] if inside.relative_to(f).parts[0] in RESULTS]
    return next((f for f in above if (f / SUMMARY).is_file()), None)


def check_results(folder: Path) -> None:
    """Raise an error about the first file in changed_results: FileNotFoundError if it is missing, else
    ValueError.
    """
    again = "start the run's command again, which writes it from the last checkpoint"
    for changed in changed_results(folder):
        if changed.is_missing:
            raise FileNotFoundError(f"{changed.line}; restore it, or {again}")
        raise ValueError(
            f"{changed.line}. Restore it, or {again}, or copy the folder elsewhere and use it with --adapter "
            "or --model"
        )


class ChangedResult(NamedTuple):
    """A file of a run's results that is missing, or is not the one that the finished run wrote."""

    path: Path
    is_missing: bool

    @property
    def line(self) -> str:
        """The path and its problem, as a sentence for messages."""
        if self.is_missing:
            return f"{self.path}: no such file, and the finished run wrote it"
        return (
            f"{self.path}: the file has changed since the run was finished (its sha256 is not in {SUMMARY})"
        )


def changed_results(folder: Path) -> list[ChangedResult]:
    """Return the files in recorded_results(folder) that are missing or no longer have the recorded SHA-256.
    [] if nothing was recorded. The bytes on disk are hashed again.
    """
    recorded = recorded_results(folder) or {}
    present = [path for path in recorded if path.is_file()]
    changed = [ChangedResult(path, True) for path in recorded if path not in present]
    for path, sha256 in zip(present, files_sha256(present, content_sha256), strict=True):
        if sha256 != recorded[path]:
            changed.append(ChangedResult(path, False))
    return changed


def earlier_end(folder: Path) -> str | None:
    """Return a line if a finished run was continued and has not finished again, so that its weights are from
    the earlier end; else None. folder: see recorded_results; None for a folder that is not a run's.
    """
    run = _run_of(folder)
    entries = [] if run is None else read_entries(run / METRICS)
    if run is None or not entries:
        return None
    steps, reached = finished_steps(run), entries[-1]["step"]
    if not steps or reached <= steps:
        return None
    return (
        f"{run}: this run was continued after step {steps}, has reached step {reached}, and its weights are "
        f"from step {steps}"
    )


def earlier_end_notes(ref: str | Path) -> list[str]:
    """Return [a warning] if a finished run was continued and has not finished again, else []. Its weights are
    then older than its last logged step.

    ref: the value of --run, --adapter, start= or reward=; [] for any other path than a run's or one in a run.
    """
    line = earlier_end(Path(ref))
    return [f"warning: {line}; finish the run to update them"] if line else []


# Runs that this one continues


def prompt_differences(ref: str, record: dict[str, Any]) -> list[str]:
    """Return lines about how this run's prompts differ from the prompts that `ref` was trained on.

    ref: a run's folder, or adapter/ or model/ in it; [] for others, whose prompts are unknown. record: this
    run's settings with the fingerprint of its chat template.
    """
    old = next(filter(None, (_run_record(folder) for folder in (Path(ref), Path(ref).parent))), None)
    if old is None:
        return []
    was_plain, is_plain = (r["data"].get("format") == "plain" for r in (old, record))
    if was_plain != is_plain:
        names = ("plain text", "turns of a chat")
        was, now = names if was_plain else names[::-1]
        remedy = "plain" if was_plain else "auto"
        return [
            f"{ref} was trained on other prompts than this run's: prompts that are strings were {was} there "
            f"and are {now} here; data.format={remedy} continues with the same prompts"
        ]
    if is_plain:
        return []
    lines = []
    template = old.get("chat_template")
    if template is not None and template != record.get("chat_template"):
        lines.append(
            f"{ref} was trained with another chat template than this run's, so prompts differ; "
            "set chat_template= as in that run to continue with the same prompts"
        )
    for name in ("date", "chat_template_kwargs", "system"):
        values = (r["data"].get(name) for r in (old, record))
        was, now = (",".join(x) if isinstance(x, list | tuple) else x for x in values)
        if was is not None and was != now:
            lines.append(
                f"{ref} was trained with data.{name}={was}, and this run has {now or 'none'}; "
                f'"data.{name}={was}" continues with the same prompts'
            )
    return lines


def _run_record(folder: Path) -> dict[str, Any] | None:
    """Return a run's settings from its config.json, None for a folder that is not a run's."""
    path = folder / "config.json"
    content = read_saved_json(path) if path.is_file() else None
    is_run = isinstance(content, dict) and isinstance(content.get("data"), dict) and "objective" in content
    return content if is_run else None


# Weights


def trained_weights(folder: Path) -> tuple[str, Path | None, dict[str, Any]]:
    """Return (model, adapter folder, settings) of a run. With an adapter, model is the folder or name of its
    base; without one, the adapter folder is None and model is the run's folder model/.

    Raises FileNotFoundError for a folder that is not a run's or has no weights yet, and ValueError for
    weights that have changed since the run wrote or used them.
    """
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(
            f"{folder}: not a run's folder, it has no config.json; runs are in runs/<name>"
        )
    record = read_record(folder)
    adapter, model = folder / "adapter", folder / "model"
    if (adapter / "adapter_config.json").is_file():
        check_results(adapter)
        return _base_weights(folder, record), adapter, record
    if (model / "config.json").is_file():
        check_results(model)
        return str(model), None, record
    then = "finish the run with the command that started it"
    if (folder / SUMMARY).is_file():
        then = "the command that started the run writes them again from its last checkpoint"
    raise FileNotFoundError(f"{folder}: has neither adapter/ nor model/; {then}")


def _base_weights(folder: Path, record: dict[str, Any]) -> str:
    """Return the folder or name of a run's base model. Raises ValueError if its weights, or the quantised
    weights that the run calibrated and cached, have changed since the run was trained.
    """
    ref, path = record["weights"], record.get("weights_path")
    if path and not Path(ref).exists():
        ref = path
    recorded = str(record.get("weights_fingerprint", ""))
    # Older runs have recorded samples of the files, which cannot be compared.
    if recorded.startswith(HASH) and recorded != weights_fingerprint(ref):
        again = "start the run's command again, which writes them" if hub.is_extended(ref) else "restore them"
        raise ValueError(
            f"{folder}: the weights in {ref} have changed since this run was trained; {again}, or use --model"
        )
    if recorded.startswith(HASH) and hub.is_extended(ref):
        damage = folder_damage(Path(ref))
        if damage is not None:
            raise ValueError(
                f"{folder}: the model with new tokens cannot be used: {damage}. Start the run's command "
                "again, which writes it, or use --model"
            )
    calibrated = folder / CALIBRATED_JSON
    codes = read_saved_json(calibrated) if calibrated.is_file() else None
    if codes is not None and not calibrated_base.confirm_codes(codes):
        place = calibrated_base.codes_folder(str(codes.get("codes")))
        raise ValueError(
            f"{folder}: the calibrated base in the cache, {place}, has changed since this run was trained. "
            f"{calibrated_base.AGAIN}"
        )
    return ref


def weights_fingerprint(ref: str) -> str:
    """Return a hash of all bytes of a model's weight files. ref: the model's folder, name or .gguf file."""
    located = hub.locate(ref)
    files = part_files(located.path) if located.kind == "gguf" else hf_read.weight_files(located.path)
    lines = [f"{path.name} {known}\n" for path, known in zip(files, files_sha256(files), strict=True)]
    return HASH + hashlib.sha256("".join(lines).encode()).hexdigest()


def adapter_fingerprint(folder: Path) -> str:
    """Return a hash of an adapter's files. Raises FileNotFoundError if one is missing."""
    digest = hashlib.sha256()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        path = folder / name
        if not path.is_file():
            raise FileNotFoundError(
                f"{path}: no such file; expected a PEFT adapter's folder, or the folder of a run with one"
            )
        digest.update(path.read_bytes())
    return digest.hexdigest()[:32]
