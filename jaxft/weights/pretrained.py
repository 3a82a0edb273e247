"""Models in and out: from the hub, folders, GGUF files and packages; to Hugging Face folders and PEFT adapters."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from jaxft import tree
from jaxft.models.llama import llama
from jaxft.models.llama_config import PRESETS, from_hf
from jaxft.nn.param import Model, is_spec
from jaxft.weights import gguf, gguf_tokenizer, hf, hub, parameters
from jaxft.weights.safetensors import Tensors, read_json

MODELS = {"llama": (from_hf, llama)}


def read_config(located: hub.Located) -> dict[str, Any]:
    """The model's configuration as the dict of a config.json, from that file or from GGUF metadata."""
    if located.kind == "gguf":
        return gguf.read_config(gguf.read_header(located.path))
    return read_json(located.path / "config.json")


def model_for(ref: str, **options: Any) -> Model:
    """The Model that `ref` names; options go to the architecture (dtype, remat, attention).

    A ref among the presets touches neither disk nor network, a local one the network not, another one only the hub's
    config.json. Raises ValueError for an architecture that isn't implemented.
    """
    if ref in PRESETS and not Path(ref).is_dir():
        return llama(PRESETS[ref], **options)
    located = hub.locate(ref, config_only=True)
    try:
        config = read_config(located)
        kind = config.get("model_type")
        if kind not in MODELS:
            raise ValueError(f"model_type {kind!r} is not implemented; jaxft has {', '.join(MODELS)}")
        parse, build = MODELS[kind]
        parsed = parse(config)
    except ValueError as e:
        raise ValueError(str(e) if str(located.path) in str(e) else f"{located.path}: {e}") from e
    except (TypeError, KeyError, AttributeError, OverflowError) as e:
        raise ValueError(
            f"{located.path}: its configuration has a missing or malformed value ({hub.one_line(e)})"
        ) from e
    return build(parsed, **options)


def load_base(ref: str, model: Model, store: Callable[[str, Any], Any]) -> dict[str, Any]:
    """The base parameter tree of `ref`, one leaf at a time on the host: for a mesh see prepare.load_base.

    `store(path, leaf)` gets each leaf once, whole, its layers stacked, in the files' dtype, and returns what the tree keeps. So
    host memory stays about one leaf above the result. Raises ValueError where the files don't hold exactly the model's tensors.
    """
    found = open_leaves(ref, model)
    specs = model.specs.get("base", model.specs)
    return tree.map_with_path(
        lambda path, _: store(path, parameters.whole(found[path])), specs, is_leaf=is_spec
    )


def open_leaves(ref: str, model: Model) -> dict[str, parameters.Leaf]:
    """The base parameters in the files of `ref` by path, each read when and where it is asked for, names and shapes checked."""
    return parameters.leaves(open_tensors(ref), model)


def open_tensors(ref: str) -> Tensors:
    """The tensors of `ref` under their Hugging Face names, each read when it is asked for."""
    located = hub.locate(ref)
    return (
        gguf.open_file(gguf.read_header(located.path))
        if located.kind == "gguf"
        else hf.open_folder(located.path)
    )


def load_tokenizer(ref: str) -> Any:
    """The model's tokenizer, a transformers PreTrainedTokenizerFast. Code from the model's folder is never run."""
    located = hub.locate(ref, config_only=True)
    if located.kind == "gguf":
        return gguf_tokenizer.load_tokenizer(gguf.read_header(located.path))
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(
            str(located.path), trust_remote_code=False, local_files_only=True
        )
    except Exception as e:  # transformers and tokenizers raise many kinds here
        reason = hub.one_line(e)
        raise ValueError(
            f"{ref}: no tokenizer could be loaded from {located.path} ({reason}); it needs a tokenizer.json"
        ) from e
    if not tokenizer.is_fast:
        raise ValueError(
            f"{ref}: its tokenizer has no tokenizer.json (a fast tokenizer), which offsets and batches need"
        )
    return tokenizer
