"""ModelService: what is served and what it accepts. Creates no engine work. Event loop only."""

from __future__ import annotations

from typing import Any

from google.protobuf.timestamp_pb2 import Timestamp

from photon_grpc import __version__
from photon_grpc.errors import ModelNotFoundError
from photon_grpc.frontend.base import FrontDoor
from photon_grpc.options import Options
from photon_grpc.server import convert
from photon_grpc.v1 import model_pb2

# Rises with each addition to proto/photon/v1; clients below the minimum cannot be served.
SCHEMA_REVISION = 3
MINIMUM_CLIENT_REVISION = 1


class ModelServicer:
    """The methods of photon.v1.ModelService. One instance is one engine lifetime."""

    def __init__(self, front_door: FrontDoor, options: Options, instance_id: str) -> None:
        self._front_door = front_door
        self._options = options
        self._instance_id = instance_id
        self._start_time = Timestamp()
        self._start_time.GetCurrentTime()

    async def GetModelInfo(
        self, message: model_pb2.GetModelInfoRequest, context: Any
    ) -> model_pb2.GetModelInfoResponse:
        model = self._front_door.model
        if message.model not in ("", model.name):
            raise ModelNotFoundError(message.model)
        return convert.encode_model_info(model, self._options.limits)

    async def GetServerInfo(
        self, message: model_pb2.GetServerInfoRequest, context: Any
    ) -> model_pb2.GetServerInfoResponse:
        """Figures of the KV pool stay absent until the engine has one."""
        stats = self._front_door.stats()
        has_pool = stats.kv_blocks_total > 0
        max_running = self._options.scheduler.max_num_seqs
        if has_pool and not max_running:
            max_running = self._front_door.model.max_num_seqs
        return model_pb2.GetServerInfoResponse(
            version=__version__,
            instance_id=self._instance_id,
            schema_revision=SCHEMA_REVISION,
            minimum_client_revision=MINIMUM_CLIENT_REVISION,
            kv_block_tokens=stats.block_size if has_pool else None,
            total_kv_blocks=stats.kv_blocks_total if has_pool else None,
            max_running_requests=max_running,
            max_queued_requests=self._options.limits.max_queued_requests,
            start_time=self._start_time,
        )
