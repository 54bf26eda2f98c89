"""`autolora push`."""

from __future__ import annotations

from pathlib import Path

from ..factory import load_autolora_model
from ..hub.model_card import CARD, write_model_card
from ..hub.push import push_folder
from ..saving import fetch
from .display import show_progress
from .parser import CommandParser
from .result import CommandResult


def build_parser() -> CommandParser:
    parser = CommandParser(
        prog="autolora push",
        description=(
            "Publishes a saved model, its card and its pictures on the Hugging Face Hub, in one commit. A push that "
            "was cut off can be repeated; what has arrived is not sent again."
        ),
    )
    parser.add_argument("folder", help="folder of a saved model")
    parser.add_argument("repository", help="'org/name', or 'name' in your own namespace; created if there is none")
    parser.add_argument("--private", action="store_true", default=None, help="make a new repository private")
    parser.add_argument("--revision", help="branch to push to; created if there is none (default: main)")
    parser.add_argument("--message", default="Upload robust model", help="message of the commit")
    parser.add_argument("--create-pr", action="store_true", help="open a pull request instead of committing")
    parser.add_argument("--license", help="licence of a model that has no card yet, for instance apache-2.0")
    parser.add_argument("--base-model", help="backbone of an adapter that has no card yet, if it is not found")
    parser.add_argument("--token", help="token with write permission; the one you are logged in with otherwise")
    return parser


def run(argv: list[str]) -> CommandResult:
    args = build_parser().parse_args(argv)

    show_progress()
    folder = Path(args.folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"There is no folder {args.folder!r}.")
    fetch(folder)
    if not (folder / CARD).is_file():
        model = load_autolora_model(folder, base_model=args.base_model)
        write_model_card(folder, model, license=args.license)
    pushed = push_folder(
        folder,
        args.repository,
        private=args.private,
        token=args.token,
        revision=args.revision,
        commit_message=args.message,
        create_pr=args.create_pr,
    )
    print(f"Published: {pushed.pr_url or pushed.commit_url}")
    name = pushed.repo_url.repo_id
    print(f'Load it with load_autolora_model("{name}"), check its figures with: autolora verify {name}')
    return CommandResult(
        {
            "repository": name,
            "commit": pushed.oid,
            "url": pushed.commit_url,
            "pull_request": pushed.pr_url,
            "files": {"folder": str(folder)},
        }
    )
