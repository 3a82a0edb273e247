"""Write a model with new tokens in its tokenizer, embedding table and head, and with a chat template.

The rows of new tokens start as a mean of other rows and have to be trained. Their ids are in the folder's
untrained_tokens.json, which recipes read to set adapter.trainable_token_indices; a run that would not train
them raises an error at its start.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from jaxft.annotations import PositiveInt, check_bounds
from jaxft.data.chat.template import template_of
from jaxft.distributed.disk import publish
from jaxft.models import model_types
from jaxft.models.model import Model
from jaxft.nn.adapters.lora import Adapter
from jaxft.weights import pretrained
from jaxft.weights.edit.merged_weights import LazyTensor, lazy_params
from jaxft.weights.hf import hf_read, hf_write, hub
from jaxft.weights.hf.complete_folders import (
    cache_folder,
    cached_folder,
    check_new_folder,
    files_sha256,
    folder_damage,
    new_folder,
)
from jaxft.weights.hf.hf_read import stop_tokens
from jaxft.weights.hf.safetensors import read_model_json, write_model_json
from jaxft.weights.param_loading import ParamReader, param_readers

UNTRAINED = "untrained_tokens.json"
TokenStart = Literal["pieces", "mean"]  # of a new token's row: the mean of its pieces' rows, or of all
TABLE_MULTIPLE = 64
VERSION = 1  # of the models in the cache; another one if a new token starts with another row


@dataclass(frozen=True)
class Extension:
    """The tokens and the template that are added to a model.

    tokens: new plain tokens. special_tokens: new tokens that decoding may skip. start: the initial row of a
    new token: "pieces" for the mean of the rows of the old tokens into which its text was split so far,
    "mean" for the mean of all old rows. multiple: a table that grows is padded to a multiple of this many
    rows. template: a name in TEMPLATES, whose special tokens are added if they are new, or a .jinja file.

    Raises ValueError if there is nothing to add, or for a token that is listed twice.
    """

    tokens: tuple[str, ...] = ()
    special_tokens: tuple[str, ...] = ()
    start: TokenStart = "pieces"
    multiple: PositiveInt = TABLE_MULTIPLE
    template: str | None = None

    def __post_init__(self) -> None:
        check_bounds(self)
        if not self.named and self.template is None:
            raise ValueError(
                "nothing to add; name new tokens (--tokens, add_tokens=) or a chat template (--template, "
                "chat_template=)"
            )
        twice = next((x for i, x in enumerate(self.named) if x in self.named[:i]), None)
        if twice is not None:
            raise ValueError(f"new tokens: {twice!r} is listed twice; list each token once")

    @property
    def named(self) -> tuple[str, ...]:
        """The tokens to add, without the chat template's special tokens."""
        return (*self.tokens, *self.special_tokens)


def extend_model(out: Path, ref: str, extension: Extension) -> list[str]:
    """Write the model `ref` with an extension to the folder `out`; return lines about the additions.

    Raises ValueError if `out` is not a new folder, for tokens that are empty, exist already or would still be
    split, and for a template that cannot render a conversation or does not end turns with a special token.
    """
    check_new_folder(out)
    model = pretrained.model_for(ref)
    readers = param_readers(pretrained.open_files(ref), model)
    known = pretrained.load_tokenizer(ref).get_vocab()
    larger, tokenizer, pieces = _extended_model(model, ref, extension)
    vocab = larger.config.vocab
    sources = {number: parts if extension.start == "pieces" else () for number, parts in pieces.items()}
    base = lazy_params({path: _in_own_dtype(reader, model) for path, reader in readers.items()})
    for path in ("embed", "head"):
        if path in base:
            base[path] = _extended(base[path], sources, vocab, is_head=path == "head")
    ids = _ids_by_token(tokenizer, pieces)
    with new_folder(out) as part:
        hf_write.save_folder(part, larger, base, tokenizer, hub.locate(ref))
        notes = _known_tokens_note(extension, known)
        mark_untrained(part, {**untrained_tokens(ref), **ids}, notes)
    lines = []
    if pieces:
        named = ", ".join(f"{token!r} ({number})" for token, number in ids.items())
        grown = f"the table grows from {model.config.vocab} to {vocab} rows"
        room = grown if vocab > model.config.vocab else f"the table had {vocab} rows already"
        lines.append(f"new tokens: {named}; {room}")
    lines += notes
    ends = stop_tokens(str(out), larger, tokenizer)
    lines.append(f"completions end at {', '.join(tokenizer.convert_ids_to_tokens(list(ends))) or 'nothing'}")
    return lines


def _extended_model(
    model: Model, ref: str, extension: Extension
) -> tuple[Model, Any, dict[int, tuple[int, ...]]]:
    """Return the model with a vocabulary for the new tokens, the extended tokenizer, and by id of each new
    token the ids into which its text was split before.
    """
    tokenizer, vocab = pretrained.load_tokenizer(ref), model.config.vocab
    pieces = add_tokens(tokenizer, extension)
    if pieces and max(pieces) >= vocab:
        vocab = -(-(max(pieces) + 1) // extension.multiple) * extension.multiple
    return model_types.with_vocab(model, vocab), tokenizer, pieces


def _ids_by_token(tokenizer: Any, numbers: Collection[int]) -> dict[str, int]:
    return {tokenizer.convert_ids_to_tokens(number): number for number in sorted(numbers)}


def _draft(folder: Path, ref: str, extension: Extension) -> str:
    """Write an extended model's configuration and tokenizer, no weights, below `folder`; return its path."""
    digest = hashlib.sha256(json.dumps([ref, repr(extension)]).encode()).hexdigest()[:16]
    out = folder / digest / "extended"
    if not out.is_dir():
        larger, tokenizer, pieces = _extended_model(pretrained.model_for(ref), ref, extension)
        out.mkdir(parents=True)
        located = hub.locate(ref, config_only=True)
        linked = not pieces and located.kind == "folder"
        save = hf_write.save_template if linked else hf_write.save_configs
        save(out, larger, tokenizer, located)
        mark_untrained(out, {**untrained_tokens(ref), **_ids_by_token(tokenizer, pieces)})
    return str(out)


def extended_ref(ref: str, extension: Extension | None, drafts: Path | None = None) -> tuple[str, list[str]]:
    """Return (path of the model `ref` with an extension, notes). The path is a folder in the cache, which is
    written if it is missing or damaged; a note reports damage. Without an extension, return (ref, []).

    drafts: None, or a folder in which only a configuration and a tokenizer are written, without weights and
    in place of the cache: for the plan of a run. Several processes may call this. If the extension adds no
    tokens, the result has links to the weights of `ref`, unless `ref` is a GGUF file; if `ref` has been
    moved, call this with its new path. Raises ValueError as extend_model does.
    """
    if extension is None:
        return ref, []
    if drafts is not None:
        return _draft(drafts, ref, extension), []
    located = hub.locate(ref)
    files = hub.files_of(located)
    names = [[path.name, known] for path, known in zip(files, files_sha256(files), strict=True)]
    parts = [VERSION, names, extension.tokens, extension.start, extension.multiple]
    if extension.special_tokens or extension.template is not None:
        named = None if extension.template is None else find_template(extension.template)
        parts += [extension.special_tokens, named and [named.source, named.tokens]]
    key = json.dumps(parts)
    digest = hashlib.sha256(key.encode()).hexdigest()[:16]
    base = Path((hub.hub_name(ref) or (str(located.path), None))[0]).name
    out = cache_folder() / hub.EXTENDED / f"{base}-{digest}"
    damage = folder_damage(out) if out.is_dir() else None
    if damage is not None or not out.is_dir():
        with cached_folder(out) as part:
            if not _link_model(part, ref, extension):
                extend_model(part, ref, extension)
    for file in files:
        if (out / file.name).is_symlink():
            _link(out / file.name, file)  # the model may have been moved
    replaced = f"the model with new tokens cannot be used: {damage}; it is written again"
    return str(out), [] if damage is None else [replaced]


def _link_model(out: Path, ref: str, extension: Extension) -> bool:
    """Write the model `ref` with another chat template to the new folder `out`, with links to its weights.

    Return whether it was written: False for GGUF files and for an extension that adds tokens.
    """
    located = hub.locate(ref)
    if extension.named or located.kind != "folder":
        return False
    known, model = pretrained.load_tokenizer(ref).get_vocab(), pretrained.model_for(ref)
    _, tokenizer, pieces = _extended_model(model, ref, extension)
    if pieces:
        return False
    weights = hf_read.weight_files(located.path)
    index = located.path / hf_read.WEIGHT_INDEX
    out.mkdir()
    for file in [*weights, *([index] if index.is_file() else [])]:
        _link(out / file.name, file)
    hf_write.save_template(out, model, tokenizer, located)
    mark_untrained(out, untrained_tokens(ref), _known_tokens_note(extension, known))
    return True


def _link(path: Path, file: Path) -> None:
    """Make `path` a link to `file`, or a copy of it where the file system has no links."""
    target = file.resolve()
    if path.is_symlink() and path.readlink() == target:
        return
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    part.unlink(missing_ok=True)
    try:
        part.symlink_to(target)
    except OSError:
        shutil.copyfile(target, part)
    publish(part, path)


def _known_tokens_note(extension: Extension, known: Mapping[str, int]) -> list[str]:
    """Return a line if the tokenizer had some of a named template's special tokens already, since a base
    model may not be trained on them. known: ids by token.
    """
    named = () if extension.template is None else find_template(extension.template).tokens
    ids = {token: known[token] for token in named if token in known}
    if not ids:
        return []
    return [
        f"{', '.join(map(repr, ids))} of the template were in the tokenizer already; if this model was "
        "never trained on them, as some base models, train their rows: adapter.trainable_token_indices="
        f"{','.join(map(str, ids.values()))}"
    ]


def add_tokens(tokenizer: Any, extension: Extension) -> dict[int, tuple[int, ...]]:
    """Add the tokens and the template of an extension to a tokenizer, in place. Return by id of each new
    token the ids into which its text was split before.

    Raises ValueError for tokens that are empty, exist already or would still be split, and for a template
    that cannot render a conversation or does not end turns with a special token.
    """
    from tokenizers import AddedToken

    named = None if extension.template is None else find_template(extension.template)
    known = tokenizer.get_vocab()
    for token in extension.named:
        if token in known:
            raise ValueError(f"new token {token!r} is a token already (id {known[token]}); leave it out")
        if not token.strip():
            raise ValueError(f"new token {token!r} is empty or white space; a token needs a text of its own")
    of_template = [] if named is None else [token for token in named.tokens if token not in known]
    of_template = [token for token in of_template if token not in extension.named]
    pieces = {
        token: tuple(tokenizer.encode(token, add_special_tokens=False))
        for token in (*extension.named, *of_template)
    }
    for token in pieces:
        special = token not in extension.tokens
        added = AddedToken(token, special=special, normalized=False)
        tokenizer.add_tokens([added], special_tokens=special)
    ids = dict(zip(pieces, tokenizer.convert_tokens_to_ids(list(pieces)), strict=True))
    added_texts = [str(token) for token in tokenizer.added_tokens_decoder.values()]
    for token, number in ids.items():
        encoded = tokenizer.encode(_text_with(token, added_texts), add_special_tokens=False)
        if encoded.count(number) != 1:
            raise ValueError(
                f"new token {token!r} would be split by the tokenizer even after it is added; choose another"
            )
    if named is not None:
        # llama.cpp would render another token as the BOS of a tokenizer that has none.
        source = named.source if tokenizer.bos_token else named.source.removeprefix(BOS)
        tokenizer.chat_template = source
        template = template_of(tokenizer)
        if template is not None and template.failure:
            reason = " ".join(template.failure.split())
            raise ValueError(
                f"chat template {extension.template}: it cannot render a question and a response: {reason}; "
                "correct it, or use another chat_template="
            )
        if template is None or not template.stop_tokens:
            raise ValueError(
                f"chat template {extension.template}: its assistant turns do not end with a special token, "
                "so completions would not end; add the token that it ends turns with as a special token"
            )
    return {ids[token]: parts for token, parts in pieces.items()}


def _text_with(token: str, added: Sequence[str]) -> str:
    """Return `token` between two characters with which it forms no other of the tokens `added`; the token
    alone if there are no such characters.
    """
    for before, after in (("a", "b"), ("1", "2"), (" ", " "), ("\n", "\n")):
        text = before + token + after
        if not any(other in text and other not in token for other in added):
            return text
    return token


def _in_own_dtype(reader: ParamReader, model: Model) -> ParamReader:
    """Return a reader in the dtype of the files, or in the compute dtype if they are quantised."""
    is_quantised = reader.tensors[0].name in reader.files.quantised
    return replace(reader, dtype=np.dtype(model.dtype)) if is_quantised else reader


def _extended(leaf: LazyTensor, sources: dict[int, tuple[int, ...]], vocab: int, is_head: bool) -> LazyTensor:
    """Return an embedding table [V, D], or a head [D, V], extended to `vocab` tokens.

    sources: by id of a new token, the ids whose mean row it gets; () for the mean of all rows, which padding
    gets too.
    """

    def make(_: tuple[int, ...]) -> np.ndarray:
        old = leaf.make(()).astype(np.float32)
        old = old.T if is_head else old
        mean = old.mean(0, dtype=np.float64)
        new = np.empty((vocab, old.shape[1]), np.float32)
        new[: len(old)], new[len(old) :] = old, mean
        for number, pieces in sources.items():
            new[number] = old[list(pieces)].mean(0, dtype=np.float64) if pieces else mean
        return (new.T if is_head else new).astype(leaf.dtype)

    width = leaf.shape[0] if is_head else leaf.shape[1]
    return LazyTensor((width, vocab) if is_head else (vocab, width), leaf.dtype, make)


def untrained_tokens(ref: str) -> dict[str, int]:
    """Return the ids of a model's new, untrained tokens by token; {} unless jaxft added tokens to it."""
    path = Path(ref) / UNTRAINED
    return read_model_json(path).get("tokens", {}) if path.is_file() else {}


def extension_notes(ref: str) -> list[str]:
    """Return lines for the start of a run about tokens that may be untrained; [] unless jaxft extended it."""
    path = Path(ref) / UNTRAINED
    return read_model_json(path).get("notes", []) if path.is_file() else []


def mark_untrained(folder: Path, ids: Mapping[str, int], notes: Sequence[str] = ()) -> None:
    """Write untrained_tokens.json to a model's folder. ids: ids, by token, of new tokens with untrained rows.
    notes: lines about tokens that may be untrained, for the start of runs.
    """
    if ids or notes:
        write_model_json(
            folder / UNTRAINED, {"tokens": dict(ids), **({"notes": list(notes)} if notes else {})}
        )


def with_new_tokens(adapter: Adapter, ref: str) -> Adapter:
    """Return adapter settings that train the rows of a model's new tokens too."""
    ids = tuple(untrained_tokens(ref).values())
    return replace(adapter, trainable_token_indices=ids) if ids else adapter


def check_new_tokens(ref: str, model: Model, adapter: Adapter | None, trainable: Collection[str]) -> None:
    """Raise ValueError if a run leaves rows of new tokens untrained, in the table or in the head.

    trainable: paths of the run's trainable parameters, such as adapter/embed/rows.
    """
    new = untrained_tokens(ref)
    if not new:
        return
    rows = adapter is not None and set(new.values()) <= set(adapter.trainable_token_indices)
    for path in ("embed", *(["head"] if model.generates else [])):
        tied = path == "head" and "head" not in model.specs
        ways = {f"base/{path}", f"adapter/{path}/weight", f"adapter/{path}/a"}
        ways |= {"base/embed"} if tied else set()
        by_rows = rows and f"adapter/{'embed' if tied else path}/rows" in trainable
        if not by_rows and not ways & set(trainable):
            ids = ",".join(map(str, new.values()))
            raise ValueError(
                f"{ref}: its new tokens {', '.join(new)} have untrained rows in the "
                f"{'head' if path == 'head' else 'embedding table'}, which this run does not train; set "
                f"adapter.trainable_token_indices={ids}, or adapter.modules_to_save=embed_tokens"
                f"{',lm_head' if model.generates else ''}"
            )


# ---- chat templates by name, for base models that come without one, and the tokens that they need


BOS = "{{ bos_token }}"  # at the start of a template


class NamedTemplate(NamedTuple):
    """A chat template of a model family, for base models that come without one.

    source: the Jinja template. tokens: the special tokens that it writes in addition to BOS and EOS, or () if
    they are not known.
    """

    source: str
    tokens: tuple[str, ...]


_CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
_QWEN = (
    "{% if tools %}"
    "{{ '<|im_start|>system\\n' }}"
    "{% if messages[0]['role'] == 'system' %}{{ messages[0]['content'] + '\\n\\n' }}{% endif %}"
    "{{ '# Tools\\n\\nYou may call one or more functions to assist with the user query.\\n\\n"
    "You are provided with function signatures within <tools></tools> XML tags:\\n<tools>' }}"
    "{% for tool in tools %}{{ '\\n' + (tool | tojson) }}{% endfor %}"
    "{{ '\\n</tools>\\n\\nFor each function call, return a json object with function name and arguments "
    "within <tool_call></tool_call> XML tags:\\n<tool_call>\\n"
    '{"name": <function-name>, "arguments": <args-json-object>}\\n</tool_call><|im_end|>\\n\' }}'
    "{% elif messages[0]['role'] == 'system' %}"
    "{{ '<|im_start|>system\\n' + messages[0]['content'] + '<|im_end|>\\n' }}"
    "{% endif %}"
    "{% for message in messages %}"
    "{% if message['role'] == 'tool' %}"
    "{{ '<|im_start|>user\\n<tool_response>\\n' + message['content'] + '\\n</tool_response><|im_end|>\\n' }}"
    "{% elif message['role'] != 'system' or not loop.first %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' }}"
    "{% if message['content'] %}{{ message['content'] }}{% endif %}"
    "{% for call in message['tool_calls'] or [] %}"
    "{% if call['function'] is defined %}{% set call = call['function'] %}{% endif %}"
    "{% if message['content'] or not loop.first %}{{ '\\n' }}{% endif %}"
    "{{ '<tool_call>\\n{\"name\": \"' + call['name'] + '\", \"arguments\": ' }}"
    "{% if call['arguments'] is string %}{{ call['arguments'] }}"
    "{% else %}{{ call['arguments'] | tojson }}{% endif %}"
    "{{ '}\\n</tool_call>' }}"
    "{% endfor %}"
    "{{ '<|im_end|>\\n' }}"
    "{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
_LLAMA3 = (
    BOS + "{% for message in messages %}"
    "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' "
    "+ message['content'] | trim + '<|eot_id|>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"
)
# The system message begins the first user turn, as in Gemma 3 and, in Mistral's models, up to v3.
_GEMMA = (
    BOS + "{% set first = namespace(system='') %}"
    "{% for message in messages %}"
    "{% if message['role'] == 'system' %}{% set first.system = message['content'] + '\\n\\n' %}"
    "{% elif message['role'] == 'assistant' %}"
    "{{ '<start_of_turn>model\\n' + message['content'] | trim + '<end_of_turn>\\n' }}"
    "{% else %}"
    "{{ '<start_of_turn>' + message['role'] + '\\n' + first.system + message['content'] | trim "
    "+ '<end_of_turn>\\n' }}"
    "{% set first.system = '' %}"
    "{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}"
)
_MISTRAL = (
    BOS + "{% set first = namespace(system='') %}"
    "{% for message in messages %}"
    "{% if message['role'] == 'system' %}{% set first.system = message['content'] + '\\n\\n' %}"
    "{% elif message['role'] == 'assistant' %}{{ ' ' + message['content'] | trim + eos_token }}"
    "{% elif message['role'] == 'user' %}"
    "{{ '[INST] ' + first.system + message['content'] + '[/INST]' }}"
    "{% set first.system = '' %}"
    "{% else %}{{ raise_exception('this template has no role ' + message['role']) }}"
    "{% endif %}"
    "{% endfor %}"
)
_PHI3 = (
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>\\n' + message['content'] + '<|end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"
)
_PHI4 = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '<|im_sep|>' + message['content'] + '<|im_end|>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant<|im_sep|>' }}{% endif %}"
)
_ZEPHYR = (
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>\\n' + message['content'] + eos_token + '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"
)
TEMPLATES = {
    "chatml": NamedTemplate(_CHATML, ("<|im_start|>", "<|im_end|>")),
    "qwen": NamedTemplate(_QWEN, ("<|im_start|>", "<|im_end|>")),
    "llama3": NamedTemplate(_LLAMA3, ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")),
    "gemma": NamedTemplate(_GEMMA, ("<start_of_turn>", "<end_of_turn>")),
    "mistral": NamedTemplate(_MISTRAL, ("[INST]", "[/INST]")),
    "phi3": NamedTemplate(_PHI3, ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>")),
    "phi4": NamedTemplate(_PHI4, ("<|im_start|>", "<|im_sep|>", "<|im_end|>")),
    "zephyr": NamedTemplate(_ZEPHYR, ()),
}


def find_template(name: str) -> NamedTemplate:
    """Return the chat template with this name, or in this .jinja file. Raises ValueError for an unknown name,
    FileNotFoundError for a missing file.
    """
    if name in TEMPLATES:
        return TEMPLATES[name]
    path, names = Path(name), ", ".join(TEMPLATES)
    if not path.suffix and not path.is_file():
        raise ValueError(f"no chat template is named {name!r}; use one of {names}, or a .jinja file")
    if not path.is_file():
        raise FileNotFoundError(f"{name}: no such file; use {names}, or a .jinja file")
    try:
        return NamedTemplate(path.read_text(encoding="utf-8"), ())
    except UnicodeDecodeError as error:
        raise ValueError(f"{name}: byte {error.start} is not UTF-8; save the template as UTF-8") from error
