#!/usr/bin/env python3
"""Writes README's settings table from `photon_grpc/options.py`; `--check` only says whether it is current.

The table stands between two marker comments, one section after the other.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import get_type_hints

from photon_grpc.options import Options, describe

README = Path(__file__).resolve().parent.parent / "README.md"
BEGIN = "<!-- settings -->"
END = "<!-- /settings -->"


def table() -> str:
    """All settings as one Markdown table, with the markers."""
    lines = [BEGIN, "", "| setting | default | meaning |", "|---|---|---|"]
    for section, section_type in get_type_hints(Options).items():
        for name, default, text in describe(section_type):
            lines.append(f"| `{section}.{name}` | {_spell(default)} | {text.replace('|', chr(92) + '|')} |")
    return "\n".join([*lines, "", END])


def _spell(default: object) -> str:
    if isinstance(default, bool):
        return f"`{str(default).lower()}`"
    return f"`{default}`" if default != "" else ""


def updated(text: str) -> str:
    """`text` with the table between its markers made current. Raises ValueError without the markers."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"README.md lacks {BEGIN} ... {END}")
    return before + table() + after


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 when the table is stale")
    arguments = parser.parse_args()
    text = README.read_text(encoding="utf-8")
    try:
        fresh = updated(text)
    except ValueError as error:
        print(f"settings_table: {error}", file=sys.stderr)
        return 1
    if arguments.check:
        if fresh != text:
            print("settings_table: README.md is stale; run tools/settings_table.py", file=sys.stderr)
        return int(fresh != text)
    README.write_text(fresh, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
