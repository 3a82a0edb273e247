"""Model cards: a README.md next to written weights, with the metadata that the Hugging Face hub reads."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from jaxft.data.rows.dataset_rows import hub_dataset
from jaxft.data.rows.mixture import parse_sources
from jaxft.weights.gguf import gguf_file
from jaxft.weights.hf import hub

Relation = Literal["adapter", "finetune", "quantized"]  # to the base, in the hub's words
LICENSE_KEYS = ("license", "license_name", "license_link")
LICENSE_NAME = re.compile(r"[a-z0-9.-]{1,60}")  # as on the hub's list
USE_SECTION = "## Use"  # the heading of the section on how weights are loaded


@dataclass(frozen=True)
class Card:
    """The contents of the card of a folder of weights.

    base: the base model, as weights.hf.hub.locate takes it. relation: whether the weights are an adapter of
    the base, a finetuned base or a quantised one. library: the library that loads them, such as peft. data:
    the data.train of the run, None for untrained weights. scores: whether the model is a classifier that
    returns rewards. pad: padding token id with which a classifier's adapter is loaded. loads: whether
    transformers has a class for the model. multimodal: whether the weights are a multimodal model's, or an
    adapter for one. text_decoder: whether an adapter is only for a multimodal base's text decoder.
    """

    title: str
    base: str
    relation: Relation
    library: str
    description: str
    data: str | None = None
    scores: bool = False
    pad: int | None = None
    loads: bool = True
    multimodal: bool = False
    text_decoder: bool = False


TEXT_ONLY = "The base is multimodal. Only its text decoder was trained, on text; all else is the base's."
NO_CLASSIFIER = (
    "transformers has no sequence classifier of this model type. Compute rewards with jaxft: "
    "`jaxft score --run RUN --file PAIRS`."
)


def write_card(folder: Path, card: Card) -> None:
    """Write README.md into a folder of weights. A card that jaxft has not written is left as it is."""
    path = folder / "README.md"
    if path.exists() and "jaxft" not in str(_front_matter_of(path).get("tags")):
        return
    text = "\n".join(
        [front_matter(card), f"# {card.title}\n", card.description, "", f"{USE_SECTION}\n", *_usage(card)]
    )
    path.write_text(text, encoding="utf-8")


def front_matter(card: Card) -> str:
    """Return the metadata as YAML between two lines `---`: license, library_name, pipeline_tag and tags, and
    base_model and datasets if they are on the hub.
    """
    source = _source_metadata(card.base)
    named = hub.hub_name(card.base)
    base = named[0] if named else None
    if base is None and card.relation != "adapter":  # an adapter does not fit its base's base
        base = source.get("base_model")
    sources = parse_sources(card.data) if card.data else ()
    datasets = [name for source in sources if (name := hub_dataset(source.ref))]
    licence = {key: source[key] for key in LICENSE_KEYS if key in source}
    generation = "image-text-to-text" if card.multimodal else "text-generation"
    fields: dict[str, Any] = {
        "base_model": base,
        "base_model_relation": card.relation if base else None,
        "library_name": card.library,
        "license": "unknown",
        **licence,
        "pipeline_tag": "text-classification" if card.scores else generation,
        "tags": ["jaxft", *(["lora"] if card.relation == "adapter" else [])],
        "datasets": datasets or None,
    }
    return _as_yaml(fields)


def _as_yaml(fields: dict[str, Any]) -> str:
    """Return the fields that are not None as YAML between two lines `---`."""
    import huggingface_hub

    stated = {name: value for name, value in fields.items() if value is not None}
    return f"---\n{huggingface_hub.ModelCardData(**stated).to_yaml()}\n---"


def gguf_card(header: gguf_file.GgufHeader, title: str) -> str:
    """Return the card of a repository with a GGUF file, from the file's header."""
    stated, is_adapter = gguf_metadata(header), header.metadata.get("general.type") == "adapter"
    relation = "adapter" if is_adapter else "quantized"
    fields: dict[str, Any] = {
        "base_model": stated.get("base_model"),
        "base_model_relation": relation if "base_model" in stated else None,
        "library_name": "gguf",
        "license": stated.get("license", "unknown"),
        "pipeline_tag": "text-generation",
        "tags": ["gguf", *(["lora"] if is_adapter else [])],
    }
    what = "A LoRA adapter" if is_adapter else "A language model"
    options = "-m BASE.gguf --lora FILE.gguf" if is_adapter else "-m FILE.gguf"
    lines = [_as_yaml(fields), f"# {title}\n", f"{what} in the GGUF format.\n", f"{USE_SECTION}\n"]
    lines += [f"    llama-cli {options}", *([] if is_adapter else ["    jaxft generate --model FILE.gguf"])]
    return "\n".join(lines) + "\n"


def gguf_metadata(header: gguf_file.GgufHeader) -> dict[str, str]:
    """Return the license and the base_model on the hub, as far as the header of a GGUF file states them."""
    licence, url = (
        str(header.metadata.get(f"general.{key}", "")) for key in ("license", "base_model.0.repo_url")
    )
    named = re.fullmatch(r"https://huggingface\.co/([\w.-]{1,96}/[\w.-]{1,96})/?", url)
    return {
        **({"license": licence} if LICENSE_NAME.fullmatch(licence) else {}),
        **({"base_model": named[1]} if named else {}),
    }


def license_of(ref: str) -> str:
    """Return the license that the files of a model state, "" if they state none."""
    return str(_source_metadata(ref).get("license", ""))


def base_name(ref: str) -> str:
    """Return the name of a base model in a card: its name on the hub, or the last part of its path."""
    named = hub.hub_name(ref)
    return named[0] if named else Path(ref).name


def _source_metadata(ref: str) -> dict[str, Any]:
    """Return the license fields, and a base_model on the hub, that the base's own files state."""
    metadata: dict[str, Any] = {}
    try:
        located = hub.locate(ref, config_only=True)
        if located.kind == "gguf":
            metadata = {"license": gguf_file.read_gguf_header(located.path).metadata.get("general.license")}
        elif (located.path / "README.md").is_file():
            metadata = _front_matter_of(located.path / "README.md")
    except (OSError, ValueError):  # the base is gone by now; the card is written last
        return {}
    texts = {key: metadata[key] for key in LICENSE_KEYS if isinstance(metadata.get(key), str)}
    if not LICENSE_NAME.fullmatch(texts.get("license", "")):
        texts = {}
    base = metadata.get("base_model")
    base = base[0] if isinstance(base, list) and base else base
    is_name = isinstance(base, str) and re.fullmatch(r"[\w.-]{1,96}/[\w.-]{1,96}", base)
    return {**texts, **({"base_model": base} if is_name else {})}


def _front_matter_of(path: Path) -> dict[str, Any]:
    import huggingface_hub

    try:
        metadata = huggingface_hub.metadata_load(path)
    except Exception:  # a card by others; the parser of YAML raises many kinds
        return {}
    return metadata if isinstance(metadata, dict) else {}


def _usage(card: Card) -> list[str]:
    if card.library == "jaxft":
        return [
            "The quantised weights are in jaxft's own layout, which other libraries do not read:\n",
            "    jaxft generate --model FOLDER --quant checkpoint --prompt ...",
            "    jaxft train sft model=FOLDER quant=checkpoint\n",
        ]
    if not card.loads:
        return [f"{NO_CLASSIFIER}\n"]
    lines = [
        *(_text_base(card) if card.text_decoder else []),
        *([f"{TEXT_ONLY}\n"] if card.multimodal else []),
        "```python",
        *_python(card),
        "tokenizer = AutoTokenizer.from_pretrained(FOLDER)",
        "```\n",
    ]
    if card.scores:
        lines.append(
            "`logits[:, 0]` are rewards, read at the last token, which has to be the response's end token: "
            "leave out what a chat template adds after it.\n"
        )
    return lines


def _text_base(card: Card) -> list[str]:
    """Return lines that show how to write the text model to which a text decoder's adapter applies."""
    _, revision = hub.hub_name(card.base) or (None, None)
    ref = base_name(card.base) + (f"@{revision}" if revision else "")
    return [
        "The base is multimodal. The adapter is for its text decoder, which jaxft writes as a text model:\n",
        f"    python scripts/export.py --model {ref} --text-only --out BASE\n",
    ]


def _python(card: Card) -> list[str]:
    """Return the lines of Python that import the classes and load the model."""
    kind = "ImageTextToText" if card.multimodal else "SequenceClassification" if card.scores else "CausalLM"
    options = f", num_labels=1, pad_token_id={card.pad}" if card.scores and card.library == "peft" else ""
    auto, adapted = f"AutoModelFor{kind}", f"AutoPeftModelFor{kind}"
    if card.library == "transformers":
        return [
            f"from transformers import {auto}, AutoTokenizer\n",
            f"model = {auto}.from_pretrained(FOLDER)",
        ]
    if card.text_decoder or card.multimodal:
        return [
            "from peft import PeftModel",
            f"from transformers import {auto}, AutoTokenizer\n",
            f"base = {auto}.from_pretrained(BASE{options})",
            "model = PeftModel.from_pretrained(base, FOLDER)",
        ]
    return [
        f"from peft import {adapted}",
        "from transformers import AutoTokenizer\n",
        f"model = {adapted}.from_pretrained(FOLDER{options})",
    ]
