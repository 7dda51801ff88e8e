"""`push`: an adapter and its model card on the Hugging Face hub."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path
from typing import Any

from spectral_fast.cli.common import add_command, warn
from spectral_fast.usage import UsageError


def add(commands: Any) -> argparse.ArgumentParser:
    """Add the command's parser."""
    parser = add_command(
        commands,
        "push",
        _run,
        "publish an adapter on the hub, with a model card",
        "Puts an adapter into a repository of the Hugging Face hub, with a model card that tells how it was made, with "
        "which figures, and how to load it, from the records and evaluations in its folder. The folder is not touched. "
        "--dry_run prints the card and the list of files, and needs no network.",
        examples=[
            "spectral-fast push --lora_dir ./edited --repo_id ORG/NAME --dry_run",
            "spectral-fast push --lora_dir ./edited --repo_id ORG/NAME --results ./sweep --private",
        ],
    )
    parser.add_argument("--lora_dir", required=True, type=Path, help="folder of the adapter; it is not touched")
    parser.add_argument("--repo_id", required=True, metavar="ORG/NAME", help="repository; made if there is none")
    parser.add_argument("--dry_run", action="store_true", help="print the card and the files; needs no network")
    group = parser.add_argument_group("card")
    group.add_argument("--base_model", help="its name on the hub, where adapter_config.json has another")
    group.add_argument(
        "--results",
        nargs="+",
        type=Path,
        default=[],
        metavar="DIR",
        help="more folders with results of eval, eval-humaneval or sweep",
    )
    group.add_argument("--card", type=Path, metavar="FILE", help="publish this as README.md, and make no card")
    group = parser.add_argument_group("repository")
    group.add_argument("--private", action="store_true", help="make a new repository private")
    group.add_argument("--create_pr", action="store_true", help="propose the upload as a pull request")
    group.add_argument("--commit_message", help="message of the commit")
    return parser


def _run(args: argparse.Namespace) -> tuple[dict[str, Any], str]:
    from spectral_fast.publish import push_to_hub

    if args.card is not None and args.results:
        raise UsageError("--results are for the card that is made; leave them out, or --card")
    done = push_to_hub(
        args.lora_dir,
        args.repo_id,
        base_model=args.base_model,
        results=args.results,
        card=args.card,
        private=args.private or None,
        commit_message=args.commit_message,
        create_pr=args.create_pr,
        dry_run=args.dry_run,
    )
    warn(done.warnings)
    width = max(map(len, done.files))
    lines = [f"{len(done.files)} files, {sum(done.files.values()):,} bytes:"]
    lines += [f"  {name:<{width}}  {size:>11,}" for name, size in done.files.items()]
    lines += [f"  not published: {', '.join(done.left_out)}"] if done.left_out else []
    files = "\n".join(lines)
    if done.url is None:
        text = f"{done.card.rstrip()}\n\n--dry_run, nothing was published to {args.repo_id}: {files}"
    else:
        text = f"published {files}\n-> {done.url}"
    return {"repo_id": args.repo_id, **asdict(done)}, text
