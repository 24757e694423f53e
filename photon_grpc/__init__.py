"""photon_grpc: a gRPC inference microservice for large language models.

`LLM` and the types around it are the Python API; the service is started by `photon-grpc serve` or
`photon_grpc.app.run`. Names are loaded when first used, so that importing a client or the command line
does not wait for torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from photon_grpc.frontend.events import Completion, Delta, Finished, GenerationResult, Started, Summary
    from photon_grpc.llm import LLM, GenerationParams
    from photon_grpc.options import Options
    from photon_grpc.types import ChatInput, ChatMessage, FinishReason, Role

__version__ = "0.1.0"

__all__ = [
    "LLM",
    "ChatInput",
    "ChatMessage",
    "Completion",
    "Delta",
    "FinishReason",
    "Finished",
    "GenerationParams",
    "GenerationResult",
    "Options",
    "Role",
    "Started",
    "Summary",
    "__version__",
]

_HOME = {
    **dict.fromkeys(("LLM", "GenerationParams"), "photon_grpc.llm"),
    **dict.fromkeys(
        ("Completion", "Delta", "Finished", "GenerationResult", "Started", "Summary"),
        "photon_grpc.frontend.events",
    ),
    "Options": "photon_grpc.options",
    **dict.fromkeys(("ChatInput", "ChatMessage", "FinishReason", "Role"), "photon_grpc.types"),
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)
