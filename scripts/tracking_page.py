"""Writes the table of logged quantities into `docs/guides/tracking.md`.

python scripts/tracking_page.py
"""

from __future__ import annotations

import re
from pathlib import Path

from autolora_hf.files import write_atomically
from autolora_hf.training.logged import logged_table


PAGE = Path(__file__).parents[1] / "docs" / "guides" / "tracking.md"
# What stands between the two is written by this script.
BEGIN, END = "<!-- quantities: begin -->", "<!-- quantities: end -->"


def with_table(text: str) -> str:
    """The page with the table as it is now."""
    before, rest = text.split(BEGIN)
    return f"{before}{BEGIN}\n\n{logged_table()}\n\n{END}{rest.split(END)[1]}"


def main() -> None:
    write_atomically(PAGE, with_table(PAGE.read_text()).encode())
    print(f"Wrote {len(re.findall('^[|] `', PAGE.read_text(), re.MULTILINE))} quantities to {PAGE}")


if __name__ == "__main__":
    main()
