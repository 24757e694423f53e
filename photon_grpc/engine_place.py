"""Which model the engine of some settings runs, and where: its process is begun here, before all else.

What an engine loads takes longer than everything that is done beside it, so its process is spawned as soon as
the settings are known, and before what the server needs is even imported. Imports little itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from photon_grpc.engine.child import EngineSetup
from photon_grpc.engine.process import SpawnedChild, spawn_engine
from photon_grpc.engine_ahead import gpu_is_visible
from photon_grpc.errors import ConfigError, ModelLoadError
from photon_grpc.options import ModelOptions, Options
from photon_grpc.runner_factory import RunnerFactory

_DEMO_MODEL = Path(__file__).parent / "demo_model"


def model_folder(options: ModelOptions) -> Path:
    """The folder of the model that the options name. Raises ConfigError or ModelLoadError."""
    if not options.path:
        raise ConfigError("model.path is empty: name a model folder, or `demo`")
    folder = _DEMO_MODEL if options.path == "demo" else Path(options.path)
    if not folder.is_dir():
        raise ModelLoadError(f"{folder}: no such folder")
    return folder


def has_own_process(options: Options) -> bool:
    """Whether the engine gets a process of its own.

    On a GPU a step takes about a millisecond, and whoever waits for the interpreter lock in it holds up
    every stream. Found out without torch, which would take longer to import than everything else here.
    """
    match options.engine.process:
        case "own":
            return True
        case "shared":
            return False
        case _:
            may_use_gpu = options.model.backend == "auto" and gpu_is_visible()
            return options.model.backend == "cuda" or may_use_gpu


def engine_setup(options: Options) -> EngineSetup:
    """What the engine is made from. Raises ConfigError or ModelLoadError."""
    return EngineSetup(
        RunnerFactory(model_folder(options.model), options, has_own_process(options)),
        options.scheduler,
        options.cache,
        options.engine.step_timeout_s,
    )


@contextmanager
def early_engine(options: Options, ahead: SpawnedChild | None = None) -> Iterator[SpawnedChild | None]:
    """The engine's process, which loads already, for `app.run`; None where it is to be a thread.

    It is `ahead`, of `engine_ahead.begin`, where there is one. Ended when it was not taken over. Raises
    StartupError.
    """
    if not has_own_process(options):
        if ahead is not None:
            ahead.discard()
        yield None
        return
    child = spawn_engine(engine_setup(options), ahead)
    try:
        yield child
    finally:
        child.discard()
