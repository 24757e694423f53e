"""photon_grpc: a gRPC inference microservice for large language models."""

from __future__ import annotations

__version__ = "0.1.0"

__all__ = ["__version__"]
