"""A hook of mkdocs: links from a page to files outside `docs/`.

They lead to the repository where `repo_url` is set in mkdocs.yml; until then the file's path is shown instead. On a
code host, where the pages are read as they are, the same links work as relative ones.
"""

from __future__ import annotations

import posixpath
import re
from typing import Any


LINK = re.compile(r"(?<!!)\[([^\]]+)\]\(([^)\s#]+)(#[^)\s]*)?\)")


def outside(target: str, page: str) -> str | None:
    """The path in the repository of a relative link that leaves `docs/`, or `None`.

    Args:
        target (`str`): The link, without its anchor.
        page (`str`): The page's path below `docs/`.
    """
    if re.match(r"[a-z][a-z+.-]*:|/", target):
        return None
    path = posixpath.normpath(posixpath.join("docs", posixpath.dirname(page), target))
    return None if path.startswith("docs/") else path


def rewrite(markdown: str, page: str, repository: str | None) -> str:
    """The text of a page with its links to files outside `docs/` rewritten."""

    def replaced(match: re.Match[str]) -> str:
        path = outside(match[2], page)
        if path is None:
            return match[0]
        if repository:
            return f"[{match[1]}]({repository.rstrip('/')}/blob/main/{path}{match[3] or ''})"
        same = match[1].strip("`") == path
        return f"`{path}`" if same else f"{match[1]} (`{path}`)"

    return LINK.sub(replaced, markdown)


def on_page_markdown(markdown: str, *, page: Any, config: Any, **kwargs: Any) -> str:
    return rewrite(markdown, page.file.src_uri, config.repo_url)
