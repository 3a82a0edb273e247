"""Push a run's adapter or model, with its card, to the Hugging Face hub.

    python scripts/push.py runs/sft org/name                    # the adapter, to a private repository
    python scripts/push.py runs/sft org/name --merged           # base and adapter as one model
    python scripts/push.py merged org/name --public --revision v2 --message "beta=0.05"
    python scripts/push.py runs/sft org/name --dry-run          # lists files and sizes, sends nothing

SOURCE is a finished run, one in an object store too (s3://bucket/runs/sft), a folder that export.py,
quantize.py, combine.py or extract.py wrote, or a .gguf file. One commit has weights, configurations,
tokenizer, license and model card; never checkpoints, optimizer states or logs. A model or adapter replaces
the one in the branch: weights, configurations and tokenizer files that are not pushed are deleted, except
.gguf files. Pushing a .gguf file deletes only old files with parts of the same model. Deleted files are
listed. The token comes from HF_TOKEN or `hf auth login`; HF_ENDPOINT is the address of another hub.
"""

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any, get_args

sys.path[0] = str(Path(__file__).resolve().parents[1])


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    from jaxft.annotations import ComputeDtype
    from jaxft.cli.cli import CommandParser

    parser = CommandParser(__doc__)
    parser.add_argument("source", help="a run, a folder with weights, or a .gguf file")
    parser.add_argument("repo", help="org/name, the repository; it is created if it does not exist")
    parser.add_argument("--merged", action="store_true", help="push a run's adapter merged into its base")
    parser.add_argument(
        "--dtype", choices=get_args(ComputeDtype), help="of the weights of --merged (default bfloat16)"
    )
    parser.add_argument("--public", action="store_true", help="everyone may read it (default: private)")
    parser.add_argument("--revision", "--branch", default="main", help="the branch (default main)")
    parser.add_argument("--message", help="commit message (default: what was uploaded)")
    parser.add_argument("--dry-run", action="store_true", help="list files and sizes, and send nothing")
    return parser


def arguments() -> argparse.Namespace:
    """Parse and check the command line."""
    parser = make_parser()
    args = parser.parse_args()
    if args.dtype and not args.merged:
        parser.error("--dtype is for the weights of --merged; other weights are pushed as they are")
    from jaxft.runs.folder_copies import local_folder

    args.source = local_folder(args.source)
    return args


def adapter_to_merge(source: Path) -> Any:
    """Return the NamedWeights of a finished run, or of an adapter's folder. Raises ValueError for others."""
    from jaxft.runs.loaded_weights import named_weights
    from jaxft.train.export.push import finished_run

    run = finished_run(source)
    named = named_weights(run, None, None if run else source)
    if named.adapter is None:
        raise ValueError(f"{source}: a whole model, without an adapter to merge; leave --merged out")
    return named


def merge(named: Any, out: Path, dtype: str | None) -> None:
    """Write the model with the adapter merged into its base."""
    from jaxft.train.export import export

    for line in named.notes:
        print(line, file=sys.stderr)
    print(f"merging {named.adapter} into {named.ref}", file=sys.stderr, flush=True)
    summary = export.export_model(out, export.named_source(named), dtype)
    if summary:
        print(summary, file=sys.stderr, flush=True)


def decimal_size(count: float) -> str:
    """Return a number of bytes as text with a decimal unit, such as 98.2 MB."""
    units = ["bytes", "kB", "MB", "GB", "TB"]
    while count >= 1000 and len(units) > 1:
        count, units = count / 1000, units[1:]
    return f"{count:.4g} {units[0]}"


def print_deletions(files: dict[str, Any], target: Any) -> None:
    """Print the files that a push would delete from the branch, or a line if they are unknown. files: the
    files to push, by name in the repository. target: repository and branch.
    """
    from jaxft.runs.terminal import printable_line
    from jaxft.weights.hf.hub_upload import deletions

    stale = deletions(files, target)
    for name in stale or []:
        print(f"{'deleted':>12}  {printable_line(name)}")
    if stale is None:
        print("unknown without the hub and a token: the files of the branch that would be deleted")


def main() -> int:
    """Upload, and print the address and the commit."""
    args = arguments()
    from jaxft.distributed.disk import temporary_folder
    from jaxft.runs.terminal import printable_line
    from jaxft.train.export.push import files_to_push
    from jaxft.weights.hf.hub_upload import HubTarget, check_access, check_target, hub_endpoint, upload_files

    message = f"Upload {args.source.resolve().name} with jaxft" if args.message is None else args.message
    target = HubTarget(args.repo, args.revision, args.public, message)
    check_target(target)
    with temporary_folder(Path(tempfile.gettempdir()), "jaxft-push-") as folder:
        merged = folder / args.source.resolve().name if args.merged else None
        if merged is not None:
            named = adapter_to_merge(args.source)
            if not args.dry_run:
                check_access(target)  # before a merge, which takes hours for a large model
            merge(named, merged, args.dtype)
        push = files_to_push(args.source, args.repo, merged)
        for line in push.notes:
            print(printable_line(line), file=sys.stderr)
        total, visible = decimal_size(sum(push.sizes().values())), "public" if args.public else "private"
        where = printable_line(f"{hub_endpoint()}/{args.repo}")
        if args.dry_run:
            for name, size in push.sizes().items():
                print(f"{decimal_size(size):>12}  {printable_line(name)}")
            print_deletions(push.files, target)
            print(f"{push.what}, {total}, to {where} ({visible}, branch {args.revision}); nothing was sent")
            return 0
        done = upload_files(push.files, target, push.defaults)
    for line in [*(f"deleted from the branch: {name}" for name in done.deleted), *done.notes]:
        print(printable_line(line), file=sys.stderr)
    visible = "private" if done.private else "public"
    verb = "pushed" if done.new else "all files were there already:"
    print(f"{verb} {push.what}, {total}, to {printable_line(done.url)} ({visible})")
    print(printable_line(f"commit {done.commit}: {done.commit_url}"))
    return 0


if __name__ == "__main__":
    from jaxft.runs import terminal

    terminal.quiet()
    sys.exit(terminal.one_line_errors(main))
