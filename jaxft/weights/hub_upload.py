"""Upload model files to a repository on the Hugging Face hub, in one commit."""

import fnmatch
import importlib.util
import os
import sys
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxft.weights import tokenizer_files
from jaxft.weights.extend import UNTRAINED
from jaxft.weights.hub import short_message

WEIGHTS_OR_CONFIG = (
    "adapter_config.json", "adapter_model.safetensors", "config.json", "generation_config.json",
    "*.safetensors", "*.safetensors.index.json", "*.gguf", UNTRAINED, *tokenizer_files.FILES,
)  # fmt: skip
UPLOADED = (*WEIGHTS_OR_CONFIG, "README.md", "LICENSE*", "NOTICE*", "*.png")  # other files stay here
MAIN = "main"  # the branch of a new repository
FileContent = Path | bytes  # a file, or what is written instead of one


@dataclass(frozen=True)
class HubTarget:
    """Where files go: the repository `org/name`, and a branch of it, both created if they do not exist.

    public: who may read a new repository; an existing public one is written only with public=True. message:
    of the commit.
    """

    repo: str
    branch: str = MAIN
    public: bool = False
    message: str = "Upload with jaxft"


@dataclass(frozen=True)
class Uploaded:
    """What is on the hub now. url: of the files. commit: its hash; new: whether this upload made it, False
    if all files were there already. notes: lines for the user.
    """

    url: str
    commit: str
    commit_url: str
    new: bool
    private: bool
    notes: list[str]


def is_uploaded(name: str, patterns: Iterable[str] = UPLOADED) -> bool:
    """Whether a file of a model's folder is one of those that are uploaded."""
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
        raise ValueError("--message is empty; leave it out, or say what is uploaded")


def hub_endpoint() -> str:
    """Return the address of the hub: HF_ENDPOINT, or else that of huggingface.co."""
    return (os.environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")


def upload_files(files: Mapping[str, FileContent], target: HubTarget) -> Uploaded:
    """Commit files to a repository; those of an earlier model in it that are not among them are deleted.

    files: by their name in the repository. The token is huggingface_hub's: HF_TOKEN, or that of the last
    login. Raises ValueError without a token and for a public repository that the target does not call public,
    and OSError for a failed upload, after which the branch is as it was.
    """
    import huggingface_hub

    check_target(target)
    if huggingface_hub.constants.HF_HUB_OFFLINE:
        raise ValueError("HF_HUB_OFFLINE is set; unset it to upload")
    token, where = huggingface_hub.get_token(), hub_endpoint()
    if not token:
        raise ValueError(
            "no token for the hub; set HF_TOKEN to one that may write, or log in with `hf auth login`"
        )
    if not sys.stderr.isatty():
        huggingface_hub.utils.disable_progress_bars()
    api = huggingface_hub.HfApi(endpoint=where, token=token)
    stage, uploading = f"{where}/{target.repo} was not changed", False
    try:
        private = _open_repository(api, target)
        if target.branch != MAIN:
            api.create_branch(target.repo, branch=target.branch, exist_ok=True)
        before = api.model_info(target.repo, revision=target.branch).sha
        there = api.list_repo_files(target.repo, revision=target.branch)
        stage = f"no commit to {where}/{target.repo} was confirmed; the same command starts again"
        uploading = True
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            info = api.create_commit(
                target.repo,
                operations=_operations(files, there),
                commit_message=target.message,
                revision=target.branch,
                parent_commit=before,  # another commit since then is an error of this one
            )
    except ValueError as error:
        if isinstance(error, _Public):
            raise
        raise OSError(f"{target.repo}: {short_message(error)}; {stage}") from error
    except Exception as error:  # the hub's own, or those of the HTTP library that this version of it uses
        raise OSError(f"{target.repo}: {_reason(error, where, uploading)}; {stage}") from error
    notes = [f"warning: {short_message(one.message)}" for one in caught if "README.md" in str(one.message)]
    if private and target.public:
        notes.append(f"{target.repo} was there before and stays private; its settings can change that")
    commit = str(info.oid)
    url = f"{where}/{target.repo}/tree/{target.branch}"
    return Uploaded(url, commit, f"{where}/{target.repo}/commit/{commit}", commit != before, private, notes)


class _Public(ValueError):
    """An upload to a repository that everyone may read, and that was not asked for."""


def _open_repository(api: Any, target: HubTarget) -> bool:
    """Create the repository if it does not exist. Return whether it is private."""
    from huggingface_hub import errors

    try:
        info = api.model_info(target.repo)
    except errors.RepositoryNotFoundError:
        api.create_repo(target.repo, private=not target.public)
        return not target.public
    if not (info.private or target.public):
        raise _Public(f"{target.repo} exists and is public; add --public to publish there")
    return bool(info.private)


def _operations(files: Mapping[str, FileContent], there: Iterable[str]) -> list[Any]:
    """Return the additions, and deletions of weights and configurations that are not among the files.

    A stale shard or index would be read with the new weights.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    stale = [
        name
        for name in there
        if "/" not in name and is_uploaded(name, WEIGHTS_OR_CONFIG) and name not in files
    ]
    added = [
        CommitOperationAdd(path_in_repo=name, path_or_fileobj=str(x) if isinstance(x, Path) else x)
        for name, x in files.items()
    ]
    return [*added, *(CommitOperationDelete(path_in_repo=name) for name in stale)]


def _reason(error: Exception, where: str, uploading: bool) -> str:
    """Return why the hub did not take an upload, with the remedy, as one line."""
    from huggingface_hub import errors

    cause = error.__cause__ if isinstance(error, RuntimeError) and error.__cause__ else error
    response = cause.response if isinstance(cause, errors.HfHubHTTPError) else None
    status = None if response is None else response.status_code
    if status == 401:
        return f"{where} does not accept the token; set HF_TOKEN to a valid one or use `hf auth login`"
    if status == 403:
        return "the token may not write there; use one with write access, or a repository of your own"
    if status in (409, 412):
        return "another change of the repository came first"
    text = f"the upload to {where} failed: {short_message(cause).partition(' For more information')[0]}"
    uses_xet = importlib.util.find_spec("hf_xet") and not os.environ.get("HF_HUB_DISABLE_XET")
    if uploading and response is None and uses_xet:
        text += " (a hub without Xet storage needs HF_HUB_DISABLE_XET=1)"
    return text
