"""Options: documented, frozen, and the same in README."""

from __future__ import annotations

import dataclasses
import importlib.util
from pathlib import Path
from types import ModuleType
from typing import get_type_hints

import pytest

from photon_grpc.options import Options, ServerOptions, describe

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def settings_table() -> ModuleType:
    spec = importlib.util.spec_from_file_location("settings_table", ROOT / "tools" / "settings_table.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_readme_holds_the_current_table(settings_table: ModuleType) -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert settings_table.updated(text) == text, "run tools/settings_table.py"


def test_the_table_lists_every_field_once(settings_table: ModuleType) -> None:
    table = settings_table.table()
    for section, section_type in get_type_hints(Options).items():
        for name, _, text in describe(section_type):
            assert table.count(f"| `{section}.{name}` |") == 1
            assert text in table


def test_a_stale_table_is_noticed(settings_table: ModuleType) -> None:
    text = f"before\n{settings_table.BEGIN}\nold\n{settings_table.END}\nafter\n"
    fresh = settings_table.updated(text)
    assert fresh != text
    assert fresh.startswith("before\n")
    assert fresh.endswith("\nafter\n")
    with pytest.raises(ValueError, match="lacks"):
        settings_table.updated("no markers")


def test_descriptions_are_one_line_and_numbers_carry_their_unit() -> None:
    for section_type in get_type_hints(Options).values():
        hints = get_type_hints(section_type)
        for name, _, text in describe(section_type):
            assert text
            assert "\n" not in text
            if hints[name] is float:
                assert name.endswith(("_s", "_fraction", "_utilization")), name


def test_options_cannot_be_changed_once_made() -> None:
    options = ServerOptions()
    with pytest.raises(dataclasses.FrozenInstanceError):
        options.port = 1  # type: ignore[misc]
