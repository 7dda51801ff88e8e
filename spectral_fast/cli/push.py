"""`push`: an adapter and its model card on the Hugging Face hub."""

from __future__ import annotations

import argparse
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
    group.add_argument(
        "--revision", metavar="BRANCH", help="branch to commit to; made if there is none (default: main)"
    )
    group.add_argument("--create_pr", action="store_true", help="propose the upload as a pull request")
    group.add_argument("--commit_message", help="message of the commit")
    return parser


def _run(args: argparse.Namespace) -> tuple[dict[str, Any], str]:
    from spectral_fast.publish.files import listing, size_text
    from spectral_fast.publish.upload import Publication

    if args.card is not None and args.results:
        raise UsageError("--results are for the card that is made; leave them out, or --card")
    found = Publication.of(
        args.lora_dir, args.repo_id, base_model=args.base_model, results=args.results, card=args.card
    )
    warn(found.warnings)
    url = None
    if not args.dry_run:
        url = found.send(
            private=args.private or None,
            revision=args.revision,
            commit_message=args.commit_message,
            create_pr=args.create_pr,
        )
    result = {
        "url": url,
        "repo_id": args.repo_id,
        "files": {content.name: content.size for content in found.contents},
        "left_out": found.left_out,
        "card": found.card,
        "warnings": found.warnings,
    }
    total = size_text(sum(content.size for content in found.contents))
    files = f"{len(found.contents)} files, {total}:\n{listing(found.contents, found.left_out)}"
    if url is None:
        return result, f"{found.card.rstrip()}\n\n--dry_run, nothing was published to {args.repo_id}: {files}"
    return result, f"published {files}\n-> {url}"
