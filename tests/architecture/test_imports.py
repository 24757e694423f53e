"""Which room may know which: every import of every file, against one table.

Imports inside functions and under TYPE_CHECKING count like any other: a name that is needed only for
an annotation is still knowledge of another room.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "photon_grpc"


@dataclass(frozen=True)
class Room:
    """What the files of a room may import. A name covers everything below it, `""` the package itself."""

    project: frozenset[str]
    third_party: frozenset[str]


def room(project: str, third_party: str = "") -> Room:
    return Room(frozenset(project.split()), frozenset(third_party.split()))


# Every room may also import itself and `options`.
ROOMS: dict[str, Room] = {
    "errors": room(""),
    "options": room(""),
    "types": room("errors"),
    "watched_file": room("errors", "structlog"),
    "config": room("errors", "pydantic pydantic_settings"),
    "scheduler": room("errors types"),
    "kernels": room("errors", "cupy cuda numpy torch structlog"),
    "ops": room("errors types", "torch"),
    "ops.cuda_ops": room("errors types kernels", "torch"),
    "models": room("ops errors types", "torch safetensors numpy"),
    "runner": room("scheduler.output models ops errors stages types", "torch numpy psutil structlog"),
    "runner.cuda_sampler": room(
        "kernels.best_token kernels.sampling kernels.sampling_state runner.philox runner.sampler "
        "scheduler.output types",
        "torch numpy",
    ),
    "runner.cuda_runner": room(
        "kernels.sampling kernels.step_inputs models ops runner scheduler.output types",
        "torch numpy structlog",
    ),
    "runner.device_batch": room("kernels.step_inputs ops.base runner scheduler.output", "torch numpy"),
    "runner.updates": room("kernels.apply_updates runner", "torch numpy"),
    "runner.cuda_backend": room("kernels models ops errors types", "torch structlog"),
    "stages": room(""),
    "turns": room(""),
    "processes": room("", "structlog"),
    "engine": room("scheduler runner.base processes turns errors types", "structlog"),
    "frontend": room(
        "engine.client engine.load engine.messages engine.validation telemetry errors types watched_file",
        "tokenizers transformers jinja2 structlog",
    ),
    "telemetry": room("errors types", "structlog opentelemetry prometheus_client"),
    "server": room(
        "__version__ frontend.base frontend.events engine.load engine.messages telemetry v1 errors types "
        "watched_file",
        "grpc grpc_health grpc_reflection grpc_status google structlog",
    ),
    "server.acceptors": room(
        "server.status server.tls processes turns telemetry.logging errors", "grpc structlog uvloop"
    ),
    "client": room("v1", "grpc grpc_health grpc_status google"),
    "bench": room("client"),
    "batch_file": room("client errors"),
    "app": room(
        "__version__ engine.client engine.host engine.messages engine.process engine.thread engine.watchdog "
        "engine_place errors frontend processes.collector processes.spawn server.server stages telemetry "
        "turns types",
        "structlog uvloop",
    ),
    "engine_place": room("engine.child engine.process engine_ahead errors runner_factory"),
    "engine_ahead": room("engine.child processes.spawn runner.factory"),
    "runner_factory": room(
        "engine.host kernels.early_context processes.collector runner.base runner.factory stages "
        "telemetry.logging"
    ),
    "llm": room("__version__ app engine.host errors frontend.base frontend.events telemetry types"),
    "offline": room("client frontend.events llm types"),
    "model_report": room("errors models runner types"),
    "cli": room(
        "__version__ app batch_file bench client config engine.process engine_place errors "
        "frontend.tokenizer model_report offline types telemetry.logging",
        "rich typer",
    ),
    "__main__": room("cli engine_ahead"),
    "__init__": room("frontend.events llm types"),
}

# Modules of the standard library that carry threads, clocks or chance, and who may have them. The
# scheduler is told the time and draws nothing, so that a run can be repeated.
GUARDED: dict[str, frozenset[str]] = {
    "threading": frozenset(
        {
            *(
                "engine.thread",
                "engine.watchdog",
                "engine_ahead",
                "frontend.text_pool",
                "kernels.early_context",
            ),
            *("telemetry", "llm"),
        }
    ),
    "asyncio": frozenset(
        {
            *("engine.client", "frontend", "processes.loop_channel", "server", "telemetry.loop_lag", "turns"),
            *("app", "cli", "client", "bench", "llm"),
        }
    ),
    "multiprocessing": frozenset(),
    "subprocess": frozenset({"processes.parent", "processes.spawn"}),
    "pickle": frozenset({"processes.channel"}),
    "ctypes": frozenset({"processes.child", "processes.heap"}),
}
SCHEDULER_NEVER = {"time", "random", "threading", "asyncio", "socket", "os", "secrets", "datetime"}

# Where an import may wait inside a function: a library that only one backend needs, a model class
# picked by name, and what would make `--help`, or a server whose engine is elsewhere, wait for torch.
DEFERRED = {
    "__main__",
    "app",
    "engine_ahead",
    "cli",
    "llm",
    "runner_factory",
    "frontend.tokenizer",
    "models.registry",
    "runner.backend",
    "kernels",
    "telemetry.otlp",
}


@dataclass(frozen=True)
class Import:
    module: str
    target: str
    line: int
    in_function: bool

    def __str__(self) -> str:
        return f"{self.module}:{self.line} imports {self.target}"


def imports_of(source: str, module: str) -> Iterator[Import]:
    """Every import of `source` as an absolute dotted target."""
    tree = ast.parse(source)
    deferred = {
        id(node)
        for function in ast.walk(tree)
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for node in ast.walk(function)
    }
    for node in ast.walk(tree):
        targets: list[str] = []
        if isinstance(node, ast.Import):
            targets = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}:{node.lineno}: relative imports hide which room is meant"
            assert node.module is not None
            package = ROOT.joinpath(*node.module.split("."))
            if node.module.startswith("photon_grpc") and package.is_dir():
                targets = [f"{node.module}.{alias.name}" for alias in node.names]
            else:
                targets = [node.module]
        else:
            continue
        for target in targets:
            yield Import(module, target, node.lineno, id(node) in deferred)


def modules() -> Iterator[tuple[str, Path]]:
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        if parts[0] == "v1":
            continue
        if len(parts) > 1 and parts[-1] == "__init__":
            parts = parts[:-1]
        yield ".".join(parts), path


def all_imports() -> list[Import]:
    return [found for module, path in modules() for found in imports_of(path.read_text(), module)]


def room_of(module: str) -> str:
    """The most specific row of the table that `module` falls under."""
    parts = module.split(".")
    for length in range(len(parts), 0, -1):
        name = ".".join(parts[:length])
        if name in ROOMS:
            return name
    pytest.fail(f"{module} is in no room of the table")


def covers(allowed: frozenset[str] | set[str], target: str) -> bool:
    return any(target == name or target.startswith(f"{name}.") for name in allowed)


def violations(found: list[Import]) -> list[str]:
    """Imports that the table does not allow."""
    wrong: list[str] = []
    for one in found:
        top, _, rest = one.target.partition(".")
        own = ROOMS[room_of(one.module)]
        home = one.module.split(".")[0]
        if top == "photon_grpc":
            allowed = own.project | {home, "options"}
            # `import photon_grpc` is for its version alone.
            target = rest or "__version__"
            if not covers(allowed, target):
                wrong.append(str(one))
        elif top in sys.stdlib_module_names:
            if top in GUARDED and not covers(GUARDED[top], one.module):
                wrong.append(str(one))
            if home == "scheduler" and top in SCHEDULER_NEVER:
                wrong.append(str(one))
        elif top not in own.third_party:
            wrong.append(str(one))
    return wrong


def test_every_import_is_allowed_by_the_table() -> None:
    assert violations(all_imports()) == []


def test_imports_wait_inside_functions_only_where_they_may() -> None:
    wrong = [str(one) for one in all_imports() if one.in_function and not covers(DEFERRED, one.module)]
    assert wrong == []


def test_only_kernels_touches_cuda_and_only_server_and_client_touch_grpc() -> None:
    for name, row in ROOMS.items():
        if row.third_party & {"cupy", "cuda"}:
            assert name == "kernels"
        if "grpc" in row.third_party:
            assert name in ("server", "server.acceptors", "client")
        if "torch" in row.third_party:
            assert name.split(".")[0] in ("kernels", "ops", "models", "runner")


def test_modules_named_in_strings_exist() -> None:
    """`import_module` hides its target from the syntax tree; only tables of literals may feed it."""
    users = {module for module, path in modules() if "import_module(" in path.read_text()}
    assert users <= {"__init__", "models.registry", "kernels.compiler"}
    assert not any("__import__" in path.read_text() for _, path in modules())


def test_the_table_names_rooms_that_exist() -> None:
    """A row for a room that is gone would allow what nobody looks at any more."""
    for name in ROOMS:
        path = PACKAGE / name.replace(".", "/")
        assert path.is_dir() or path.with_suffix(".py").is_file(), name


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("scheduler.scheduler", "import time"),
        ("scheduler.policy", "def f():\n    import random"),
        ("scheduler.scheduler", "from threading import Lock"),
        ("scheduler.scheduler", "import numpy"),
        ("scheduler.scheduler", "from photon_grpc.runner.base import Runner"),
        ("engine.core", "import torch"),
        ("engine.core", "import threading"),
        ("engine.thread", "import asyncio"),
        ("engine.process", "import pickle"),
        ("engine.process", "import threading"),
        ("engine.process", "import asyncio"),
        ("processes.parent", "import asyncio"),
        ("processes.parent", "from photon_grpc.engine.messages import Submit"),
        ("processes.loop_channel", "import pickle"),
        ("turns", "from photon_grpc.engine.client import RequestStream"),
        ("engine.child", "import torch"),
        ("engine.child", "import asyncio"),
        ("engine.client", "import grpc"),
        ("engine.validation", "from tokenizers import Tokenizer"),
        ("engine.client", "from photon_grpc.runner import model_runner"),
        ("engine.core", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import torch"),
        ("frontend.generator", "from photon_grpc import engine"),
        ("frontend.generator", "from photon_grpc.engine.core import EngineCore"),
        ("frontend.generator", "import grpc.aio"),
        ("frontend.generator", "import torch.nn"),
        ("server.inference", "from photon_grpc.scheduler.output import SchedulerStats"),
        ("server.inference", "import photon_grpc.config"),
        ("server.acceptors.acceptor", "from photon_grpc.frontend.base import FrontDoor"),
        ("server.acceptors.dispatcher", "import google.protobuf"),
        ("client", "from photon_grpc.errors import PhotonError"),
        ("runner.model_runner", "from photon_grpc.scheduler.scheduler import Scheduler"),
        ("runner.model_runner", "from photon_grpc.engine.messages import Submit"),
        ("ops.torch_ops", "from photon_grpc.kernels import rope"),
        ("ops.torch_ops", "import cupy"),
        ("models.llama", "from photon_grpc.scheduler.output import SchedulerOutput"),
        ("types", "import torch"),
        ("errors", "from photon_grpc.types import Usage"),
        ("models.loader", "import pickle"),
        ("runner.model_runner", "import subprocess"),
    ],
)
def test_the_check_finds_what_is_forbidden(module: str, source: str) -> None:
    assert violations(list(imports_of(source, module)))


def test_the_check_sees_what_is_deferred() -> None:
    (found,) = imports_of("async def f():\n    import time", "engine.core")
    assert found.in_function
