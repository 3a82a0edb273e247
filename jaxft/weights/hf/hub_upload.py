"""Upload model files to a repository on the Hugging Face hub, in one commit."""

import fnmatch
import importlib.util
import os
import sys
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jaxft.data.decisions import DECISION_FILE
from jaxft.distributed.exit import shorten_error
from jaxft.weights.edit.extended_model import UNTRAINED
from jaxft.weights.gguf.gguf_file import PART_NAME
from jaxft.weights.hf import tokenizer_files

WEIGHTS_OR_CONFIG = (
    "adapter_config.json", "adapter_model.safetensors", "config.json", "generation_config.json",
    "*.safetensors", "*.safetensors.index.json", "*.gguf", UNTRAINED, DECISION_FILE, *tokenizer_files.FILES,
)  # fmt: skip
UPLOADED = (*WEIGHTS_OR_CONFIG, "README.md", "LICENSE*", "NOTICE*", "*.png")  # other files stay here
MAIN = "main"  # the branch of a new repository
FileContent = Path | bytes  # a file, or the content of one


@dataclass(frozen=True)
class HubTarget:
    """The destination of an upload: a repository `org/name` and a branch, both created if they do not exist.

    public: whether anybody may read a new repository; an existing public one is written only with
    public=True. message: the commit message.
    """

    repo: str
    branch: str = MAIN
    public: bool = False
    message: str = "Upload with jaxft"


@dataclass(frozen=True)
class Uploaded:
    """The state of the repository after an upload. url: the address of the files. commit: hash of the
    branch's last commit. new: whether this upload made that commit; False if the branch had all files
    already. deleted: files of an earlier upload that this one removed. notes: lines for the user.
    """

    url: str
    commit: str
    commit_url: str
    new: bool
    private: bool
    deleted: list[str]
    notes: list[str]


def is_uploaded(name: str, patterns: Iterable[str] = UPLOADED) -> bool:
    """Return whether a file of a model's folder is uploaded: whether its name matches one of `patterns`."""
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def check_target(target: HubTarget) -> None:
    """Raise ValueError for a repository or branch that cannot be a name on the hub."""
    from huggingface_hub import errors, utils

    wrong = (
        f"{target.repo!r} is not a repository of the hub; use org/name or your user/name, of letters, "
        "digits, -, _ and . without -- and .."
    )
    try:
        utils.validate_repo_id(target.repo)
    except errors.HFValidationError as error:
        raise ValueError(wrong) from error
    if "/" not in target.repo:
        raise ValueError(wrong)
    odd = not target.branch or target.branch.startswith(("-", "/", "refs/")) or ".." in target.branch
    if odd or target.branch.endswith(("/", ".lock")) or any(c in " ~^:?*[\\" for c in target.branch):
        raise ValueError(f"--revision {target.branch!r} is not a name of a branch; use one such as v2")
    if not target.message.strip():
        raise ValueError("--message is empty; leave it out, or describe the upload")


def hub_endpoint() -> str:
    """Return the address of the hub: HF_ENDPOINT, or else huggingface.co."""
    return (os.environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")


def upload_files(
    files: Mapping[str, FileContent], target: HubTarget, defaults: Mapping[str, FileContent] | None = None
) -> Uploaded:
    """Upload files in one commit, which also deletes the repository's outdated files (see stale_files).

    files: by name in the repository. defaults: further files, uploaded unless the branch has a file of that
    name. The token is huggingface_hub's: HF_TOKEN, or the last login's. Raises ValueError without a token, or
    for an existing public repository unless target.public is set. Raises OSError if the upload fails; the
    branch then keeps its files.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    api, progress = _signed_in(target), _Progress()
    with _one_line(target, progress):
        private = _is_private(api, target)
        if private is None:
            private = not target.public
            api.create_repo(target.repo, private=private)
            progress.created.append("the repository")
        before = _open_branch(api, target, progress)
        there = api.list_repo_files(target.repo, revision=target.branch)
        added = {**{name: x for name, x in (defaults or {}).items() if name not in there}, **files}
        stale = stale_files(there, added)
        operations: list[Any] = [
            CommitOperationAdd(path_in_repo=name, path_or_fileobj=str(x) if isinstance(x, Path) else x)
            for name, x in added.items()
        ]
        operations += [CommitOperationDelete(path_in_repo=name) for name in stale]
        progress.committing = True
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            info = api.create_commit(
                target.repo,
                operations=operations,
                commit_message=target.message,
                revision=target.branch,
                parent_commit=before,  # so that a commit since then is an error
            )
    notes = [f"warning: {shorten_error(x.message)}" for x in caught if "README.md" in str(x.message)]
    if private and target.public:
        notes.append(f"{target.repo} was there before and stays private; its settings can change that")
    commit, place = str(info.oid), f"{hub_endpoint()}/{target.repo}"
    address, url = f"{place}/commit/{commit}", f"{place}/tree/{target.branch}"
    return Uploaded(url, commit, address, commit != before, private, stale, notes)


def check_access(target: HubTarget) -> None:
    """Raise what upload_files would raise for lack of access, without a change of the hub.

    Raises ValueError offline, without a token, for a token that may only read, and for an existing public
    repository without public=True; OSError if the hub cannot be reached or does not accept the token. Only
    the upload can find out whether the token may write to this repository.
    """
    api = _signed_in(target)
    with _one_line(target, _Progress()):
        _is_private(api, target)
    try:
        role = api.whoami()["auth"]["accessToken"]["role"]
    except Exception:  # a mirror without accounts; the upload reports what is wrong
        return
    if role == "read":
        raise ValueError("the token may only read; set HF_TOKEN to one that may write")


def deletions(files: Mapping[str, FileContent], target: HubTarget) -> list[str] | None:
    """Return the files that an upload would delete from the branch, [] if the repository does not exist yet;
    None if that cannot be known now: offline, without a token, or if the hub does not list the branch.
    """
    import huggingface_hub
    from huggingface_hub import constants, errors  # submodules are no attributes until they are imported

    token = huggingface_hub.get_token()
    if constants.HF_HUB_OFFLINE or not token:
        return None
    api = huggingface_hub.HfApi(endpoint=hub_endpoint(), token=token)
    try:
        try:
            there = api.list_repo_files(target.repo, revision=target.branch)
        except errors.RevisionNotFoundError:
            there = api.list_repo_files(target.repo)  # a new branch begins with the files of main
    except errors.RepositoryNotFoundError:
        return []
    except Exception:  # the hub's own, or of the HTTP library that this version of it uses
        return None
    return stale_files(there, files)


def stale_files(there: Iterable[str], files: Iterable[str]) -> list[str]:
    """Return the files of an earlier upload that a new upload deletes, because loaders would read them with
    the new files: an old shard, for example.

    there: names in the repository. files: the uploaded names. A model or adapter replaces weights,
    configurations and tokenizers in the repository's root, except GGUF files. A GGUF file replaces the file
    or parts of the same model name. All other files remain.
    """
    new = set(files)
    ggufs = {_gguf_model(name) for name in new if name.endswith(".gguf")}
    is_model = not new.isdisjoint(("config.json", "adapter_config.json"))
    return [
        name
        for name in there
        if "/" not in name.removeprefix(f"{tokenizer_files.TEMPLATES_FOLDER}/")
        and name not in new
        and (
            _gguf_model(name) in ggufs
            if name.endswith(".gguf")
            else is_model and is_uploaded(name, WEIGHTS_OR_CONFIG)
        )
    ]


def _gguf_model(name: str) -> str:
    """Return a GGUF file's name without .gguf, and without the part number of a split file."""
    part = PART_NAME.fullmatch(name)
    return part[1] if part else name.removesuffix(".gguf")


class _Public(ValueError):
    """Raised for an upload to an existing public repository without HubTarget.public."""


@dataclass
class _Progress:
    """The progress of an upload. created: such as "the repository". committing: the commit has started."""

    created: list[str] = field(default_factory=list)
    committing: bool = False

    def outcome(self, place: str) -> str:
        """Return the state of the repository after an error, for its message. place: its address."""
        if self.committing:
            return f"no commit to {place} was confirmed; the same command starts again"
        if self.created:
            created = " and ".join(self.created)
            return f"created at {place}: {created}; no file was uploaded, and the same command continues"
        return f"{place} was not changed"


@contextmanager
def _one_line(target: HubTarget, progress: _Progress) -> Iterator[None]:
    """Raise errors of huggingface_hub as one-line OSErrors that state what happened to the repository."""
    where = hub_endpoint()
    try:
        yield
    except _Public:
        raise
    except Exception as error:  # the hub's own, or of the HTTP library that this version of it uses
        is_value = isinstance(error, ValueError)
        reason = shorten_error(error) if is_value else _reason(error, where, progress.committing)
        raise OSError(f"{target.repo}: {reason}; {progress.outcome(f'{where}/{target.repo}')}") from error


def _signed_in(target: HubTarget) -> Any:
    """Return the hub's client with the user's token. Raises ValueError if offline or without one."""
    import huggingface_hub
    from huggingface_hub import constants, utils

    check_target(target)
    if constants.HF_HUB_OFFLINE:
        raise ValueError("HF_HUB_OFFLINE is set; unset it to upload")
    token = huggingface_hub.get_token()
    if not token:
        raise ValueError(
            "no token for the hub; set HF_TOKEN to one that may write, or log in with `hf auth login`"
        )
    utils.logging.set_verbosity_error()  # Uploaded has the lines for the user
    if not sys.stderr.isatty():
        utils.disable_progress_bars()
    return huggingface_hub.HfApi(endpoint=hub_endpoint(), token=token)


def _is_private(api: Any, target: HubTarget) -> bool | None:
    """Return whether the repository is private, None if there is none that the token may read. Raises _Public
    for a public one unless target.public is set.
    """
    from huggingface_hub import errors

    try:
        info = api.model_info(target.repo)
    except errors.RepositoryNotFoundError:
        return None
    if not (info.private or target.public):
        raise _Public(f"{target.repo} exists and is public; add --public to publish there")
    return bool(info.private)


def _open_branch(api: Any, target: HubTarget, progress: _Progress) -> str:
    """Create the branch from main if it does not exist. Return the hash of the branch's last commit."""
    from huggingface_hub import errors

    try:
        return str(api.model_info(target.repo, revision=target.branch).sha)
    except errors.RevisionNotFoundError:
        api.create_branch(target.repo, branch=target.branch, exist_ok=True)
        progress.created.append(f"the branch {target.branch}")
        return str(api.model_info(target.repo, revision=target.branch).sha)


def _reason(error: Exception, where: str, uploading: bool) -> str:
    """Return in one line why an upload failed and any known remedy. uploading: the commit had started."""
    from huggingface_hub import errors

    cause = error.__cause__ if isinstance(error, RuntimeError) and error.__cause__ else error
    response = cause.response if isinstance(cause, errors.HfHubHTTPError) else None
    status = None if response is None else response.status_code
    if status == 401:
        return f"{where} does not accept the token; set HF_TOKEN to a valid one or use `hf auth login`"
    if status == 403:
        return "the token may not write there; use one with write access, or a repository of your own"
    if status in (409, 412) and uploading:
        return "another change of the repository came first"
    if status == 409:
        return "it exists already, and this token may not read it; use a token that may, or another name"
    text = f"the upload to {where} failed: {shorten_error(cause).partition(' For more information')[0]}"
    uses_xet = importlib.util.find_spec("hf_xet") and not os.environ.get("HF_HUB_DISABLE_XET")
    if uploading and response is None and uses_xet:
        text += " (a hub without Xet storage needs HF_HUB_DISABLE_XET=1)"
    return text
