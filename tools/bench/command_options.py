"""Options that several commands share, and where they print."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

# A file or a pipe has no width of its own; the tables need this much to stay in one line.
console = Console(width=None if sys.stdout.isatty() else 230)

Model = Annotated[str, typer.Option("--model", help="Model folder; `demo` is the embedded model.")]
Dtype = Annotated[str, typer.Option("--dtype", help="auto, float32, bfloat16 or float16; both sides use it.")]
Threads = Annotated[int, typer.Option("--threads", min=0, help="torch threads; 0: torch's own choice.")]
PromptTokens = Annotated[int, typer.Option("--prompt-tokens", min=1)]
NewTokens = Annotated[int, typer.Option("--new-tokens", min=2)]
Repeat = Annotated[int, typer.Option("--repeat", min=1, help="Counted rounds of everything.")]
Seed = Annotated[int, typer.Option("--seed", min=0, help="Of prompts and arrivals.")]
Output = Annotated[Path, typer.Option("--output", help="Folder for JSON and plot.")]
Name = Annotated[str, typer.Option("--name", help="Stem of the files; empty: after what was run.")]
