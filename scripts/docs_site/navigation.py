"""A hook of mkdocs: pages of a folder that the navigation does not list come at the end of the folder's section.

So a new guide, or the reference of a new command, is on the site without a change of mkdocs.yml.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any


# The sections by their titles, and the folders below `docs/` whose pages they have.
SECTIONS = {"Guides": "guides", "Command line": "cli"}


def on_config(config: Any) -> Any:
    listed = set(paths(config.nav))
    for section in config.nav:
        for title, pages in section.items() if isinstance(section, dict) else ():
            folder = Path(config.docs_dir, SECTIONS[title]) if title in SECTIONS else None
            for page in sorted(folder.glob("*.md")) if folder else ():
                path = page.relative_to(config.docs_dir).as_posix()
                if path not in listed:
                    pages.append(path)
    return config


def paths(entries: Any) -> Iterator[str]:
    """Every page that a navigation lists."""
    if isinstance(entries, str):
        yield entries
    elif isinstance(entries, dict):
        yield from paths(list(entries.values()))
    else:
        for entry in entries:
            yield from paths(entry)
