"""Settings of the command line on top of a benchmark's own, checked as the server checks them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields

from photon_grpc.options import Options

__all__ = ["with_assignments"]


def with_assignments(options: Options, assignments: Sequence[str]) -> Options:
    """`options` with each `section.key=value` put in its place. Raises ConfigError."""
    if not assignments:
        return options
    from photon_grpc.config import Override, load_options, parse_assignment

    own = [
        Override(f"{section.name}.{field.name}", getattr(part, field.name), "the benchmark")
        for section in fields(options)
        for part in (getattr(options, section.name),)
        for field in fields(part)
    ]
    return load_options(overrides=[*own, *map(parse_assignment, assignments)], require_model=False)
