"""The whole service over the scripted runner: real listeners, admission, text and engine thread; no model."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import photon_grpc
from photon_grpc.engine.client import AsyncEngine
from photon_grpc.frontend.chat import ChatRenderer
from photon_grpc.frontend.generator import Generator
from photon_grpc.frontend.text_pool import TextPool
from photon_grpc.frontend.tokenizer import Tokenizer
from photon_grpc.options import Options
from photon_grpc.runner.scripted import ScriptedRunner
from photon_grpc.server.interceptors.call_record import CallObserver
from photon_grpc.telemetry.metrics import Metrics
from tests.support.builders import model_info
from tests.support.grpc_harness import Harness, quick_options, running_server
from tools.make_tiny_model import write_tokenizer

VOCAB_SIZE = 512


@asynccontextmanager
async def scripted_service(
    folder: Path,
    options: Options | None = None,
    *,
    step_s: float = 0.0,
    max_model_len: int = 4096,
    has_chat_template: bool = True,
    call_observers: Sequence[CallObserver] = (),
    **runner: Any,
) -> AsyncIterator[Harness]:
    """Serving, each step asleep for `step_s`. `folder` takes the tokenizer.

    `runner` is what else the ScriptedRunner is given: faults, by prompt length and output position, or lack
    of memory.
    """
    options = options or quick_options()
    model = model_info(vocab_size=VOCAB_SIZE, max_model_len=max_model_len)
    metrics = Metrics(photon_grpc.__version__)
    write_tokenizer(folder, VOCAB_SIZE, add_bos=False)
    if not has_chat_template:
        file = folder / "tokenizer_config.json"
        settings = json.loads(file.read_text(encoding="utf-8"))
        del settings["chat_template"]
        file.write_text(json.dumps(settings), encoding="utf-8")
    tokenizer = Tokenizer.load(folder)
    with TextPool(options.server.text_threads) as text_pool:
        engine = AsyncEngine(
            lambda progress: ScriptedRunner(model, step_s=step_s, check_cache=False, **runner),
            options.scheduler,
            options.cache,
            options.limits,
            on_step=metrics.observe_step,
            on_stopped=lambda error: None,
        )
        generator = Generator(engine, options.limits, text_pool, metrics=metrics, tenants=options.tenants)
        await engine.start()
        generator.activate(tokenizer, ChatRenderer(tokenizer))
        try:
            async with running_server(generator, options, call_observers) as harness:
                yield harness
        finally:
            await engine.stop()
