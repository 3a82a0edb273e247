"""The files of a run, or of a folder of weights, that are pushed to the hub, and their model card."""

import json
import re
from dataclasses import dataclass, field
from pathlib import Path

from jaxft.data.rows.remote_files import without_secrets
from jaxft.runs.run_record import (
    CARD,
    check_results,
    earlier_end,
    finished_steps,
    read_saved_json,
    recorded_results,
)
from jaxft.weights.gguf.gguf_file import GgufHeader, part_files, read_gguf_header
from jaxft.weights.hf import hf_read, hub
from jaxft.weights.hf.hub_upload import FileContent, is_uploaded
from jaxft.weights.hf.model_card import USE_SECTION, gguf_card, gguf_metadata
from jaxft.weights.hf.safetensors import open_safetensors
from jaxft.weights.hf.tokenizer_files import TEMPLATES_FOLDER
from jaxft.weights.peft.peft_config import read_adapter_config

UNFINISHED = (".part", ".tmp", ".incomplete")  # ends of names of files that are being written
FRONT_MATTER = re.compile(r"\A---\n.*?\n---\n", re.DOTALL)


@dataclass(frozen=True)
class Push:
    """Files to be uploaded, by their name in the repository.

    what: kind of the files, for messages: "adapter", "model" or "GGUF file". notes: lines for the user.
    defaults: files that are added only where the repository has no file of that name.
    """

    what: str
    files: dict[str, FileContent]
    notes: list[str]
    defaults: dict[str, FileContent] = field(default_factory=dict)

    def sizes(self) -> dict[str, int]:
        """Return {name: size in bytes} of the files, sorted by name, without `defaults`."""
        sizes = {name: len(x) if isinstance(x, bytes) else x.stat().st_size for name, x in self.files.items()}
        return dict(sorted(sizes.items()))


def files_to_push(source: Path, repo: str, merged: Path | None = None) -> Push:
    """Return the files of a finished run's adapter or model, or of an exported folder or .gguf file.

    repo: org/name, which the model card names as the place to load from. merged: a folder with the merged
    weights of `source`, pushed instead of its own. Only weights, configurations, tokenizers, license and card
    are pushed: for a run, the files that its summary.json lists, its card, and the card's pictures. Raises
    FileNotFoundError or ValueError for a source that is incomplete or has no weights, or that has links in
    place of files.
    """
    if source.is_file():
        return _gguf(source, repo)
    if not source.is_dir():
        raise FileNotFoundError(f"{source}: no such file or folder; name a run, or a folder with weights")
    run = finished_run(source)
    if run is None:
        return _folder(merged or source, repo)
    push = _folder(merged or _weights_of(run), repo)
    card = _card_of_run(run, push.files.get(CARD), merged is not None)
    return Push(push.what, {**push.files, **card}, push.notes)


def finished_run(folder: Path) -> Path | None:
    """Return the folder of the run that `folder` belongs to, see run_of_weights; None for no run. Raises
    FileNotFoundError or ValueError for a run that is not finished, or was continued and is not finished
    again.
    """
    run = run_of_weights(folder)
    if run is None:
        return None
    if not (_weights_of(run).is_dir() and finished_steps(run)):
        raise FileNotFoundError(
            f"{run}: this run is not finished, so its weights are not complete; finish it with the command "
            "that started it"
        )
    line = earlier_end(run)
    if line:
        raise ValueError(f"{line}; finish the run with the command that continued it, then push again")
    return run


def _weights_of(run: Path) -> Path:
    """Return the folder of a run's weights, which exists if the run is finished."""
    return run / "adapter" if (run / "adapter").is_dir() else run / "model"


def run_of_weights(folder: Path) -> Path | None:
    """Return the run that `folder` is, or whose adapter/ or model/ it is; None for another folder.

    Raises ValueError for a sweep.
    """
    settings = read_saved_json(folder / "config.json") if (folder / "config.json").is_file() else {}
    members = settings.get("members")
    if isinstance(members, list) and members:
        raise ValueError(f"{folder} is a sweep; push one of its runs, such as {folder / str(members[0])}")
    if isinstance(settings.get("data"), dict) and "objective" in settings:
        return folder
    above = folder.resolve().parent
    is_result = folder.resolve().name in ("adapter", "model") and (above / "config.json").is_file()
    return run_of_weights(above) if is_result else None


def _folder(folder: Path, repo: str) -> Push:
    """Return the files to push from a folder of weights. repo: org/name."""
    check_results(folder)
    templates = folder / TEMPLATES_FOLDER
    inside = templates.iterdir() if templates.is_dir() else ()
    paths = [*(path for path in folder.iterdir() if path != templates), *inside]
    names = sorted(path.relative_to(folder).as_posix() for path in paths)
    unfinished = [name for name in names if name.endswith(UNFINISHED)]
    if unfinished:
        raise ValueError(f"{folder / unfinished[0]}: left by an unfinished export; export again")
    what = _complete(folder)
    recorded = recorded_results(folder)
    written = names if recorded is None else [CARD, *(p.relative_to(folder).as_posix() for p in recorded)]
    regular = {name: _regular(folder / name) for name in names if is_uploaded(name)}
    files: dict[str, FileContent] = {name: path for name, path in regular.items() if name in written}
    others = [name for name in names if name not in files]
    notes = [f"not uploaded: {', '.join(others)}"] if others else []
    if what == "GGUF file" and CARD not in files:
        header = read_gguf_header(next(folder / name for name in files if name.endswith(".gguf")))
        return Push(what, files, notes + _gguf_notes(header), _gguf_defaults(header, repo))
    if "tokenizer_config.json" not in files and what != "GGUF file":
        notes.append(f"warning: {folder} has no tokenizer; users of the model need its base's")
    if what == "adapter":
        notes += _base_notes(folder)
    if CARD in files:
        files[CARD] = _from_hub((folder / CARD).read_text("utf-8", errors="replace"), repo)
    else:
        notes.append(f"warning: {folder} has no model card, {CARD}")
    return Push(what, files, notes)


def _regular(path: Path) -> Path:
    """Return the path of a file. Raises ValueError for a link, which may lead out of the folder."""
    if path.is_symlink() or not path.is_file():
        raise ValueError(f"{path}: not a regular file; copy it into the folder")
    return path


def _complete(folder: Path) -> str:
    """Return the kind of `folder`: "adapter", "model" or "GGUF file". Raises FileNotFoundError or ValueError
    if files of it are missing or damaged.
    """
    ggufs = sorted(folder.glob("*.gguf"))
    if (folder / "adapter_config.json").is_file():
        read_adapter_config(folder)
        open_safetensors(folder, [folder / "adapter_model.safetensors"])
        return "adapter"
    if (folder / "config.json").is_file():
        open_safetensors(folder, hf_read.weight_files(folder))
        return "model"
    if not ggufs:
        raise FileNotFoundError(
            f"{folder}: no weights, neither adapter_config.json nor config.json nor a .gguf file; name a "
            "finished run, or a folder that an export wrote"
        )
    for path in ggufs:
        read_gguf_header(path)
    return "GGUF file"


def _gguf(path: Path, repo: str) -> Push:
    if path.suffix != ".gguf":
        raise ValueError(
            f"{path}: this file is not a model; name a run, a folder with weights or a .gguf file"
        )
    header = read_gguf_header(path)
    files: dict[str, FileContent] = {part.name: part for part in part_files(path)}
    return Push("GGUF file", files, _gguf_notes(header), _gguf_defaults(header, repo))


def _gguf_defaults(header: GgufHeader, repo: str) -> dict[str, FileContent]:
    return {CARD: gguf_card(header, repo.rpartition("/")[2]).encode()}


def _gguf_notes(header: GgufHeader) -> list[str]:
    notes = [f"a repository without {CARD} gets a short model card from the header of {header.path.name}"]
    if "license" not in gguf_metadata(header):
        notes.append(f"warning: {header.path.name} states no license; its model card says license: unknown")
    return notes


def _base_notes(folder: Path) -> list[str]:
    """Return one warning if an adapter's base is not on the hub, so that others cannot load it, else []."""
    base = str(read_adapter_config(folder).get("base_model_name_or_path") or "")
    if base and hub.hub_name(base) is not None and not Path(base).exists():
        return []
    return [
        f"warning: the base of this adapter, {base or 'which it does not name'}, is not on the hub, so "
        "others cannot load it; --merged pushes a whole model"
    ]


# Model cards


def _card_of_run(run: Path, weights_card: FileContent | None, is_merged: bool) -> dict[str, FileContent]:
    """Return a run's card with its pictures. Its metadata and its section on use are from the weights' card;
    {} if one of the cards lacks that section.

    is_merged: the weights were merged after the run, so that the card describes them too.
    """
    if not (run / CARD).is_file() or not isinstance(weights_card, bytes):
        return {}
    text = FRONT_MATTER.sub("", _regular(run / CARD).read_text("utf-8", errors="replace"))
    card_text = weights_card.decode()
    where, use, front = _section(text), _section(card_text), FRONT_MATTER.match(card_text)
    if where is None or use is None or front is None:  # written by hand, or by an older version
        return {}
    title, _, body = text[: where.start()].lstrip().partition("\n")
    if is_merged:
        description = card_text[front.end() : use.start()].strip().partition("\n")[2].strip()
        body = f"\n{description} The adapter:\n{body}"
    text = f"{front[0]}\n{title}\n{body}{use[0].rstrip()}\n\n{text[where.end() :]}"
    pictures = [name for name in re.findall(r"\]\(([\w.-]+\.png)\)", text) if (run / name).exists()]
    return {CARD: without_secrets(text).encode(), **{name: _regular(run / name) for name in pictures}}


def _section(text: str) -> re.Match[str] | None:
    """Return the regex match of the section on use in a model card's text, None without one."""
    return re.search(rf"^{USE_SECTION}\n.*?(?=^## |\Z)", text, re.MULTILINE | re.DOTALL)


def _from_hub(text: str, repo: str) -> FileContent:
    """Return the model card `text` with "from_pretrained(FOLDER" in its code replaced by the name `repo`."""
    return (
        text.replace("from_pretrained(FOLDER", f"from_pretrained({json.dumps(repo)}")
        .replace("from_pretrained(base, FOLDER", f"from_pretrained(base, {json.dumps(repo)}")
        .encode()
    )
