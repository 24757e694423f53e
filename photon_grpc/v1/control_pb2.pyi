import datetime

from google.protobuf import duration_pb2 as _duration_pb2
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class AbortRequest(_message.Message):
    __slots__ = ("request_id", "all", "reason", "tenant")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    ALL_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    TENANT_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    all: AllRequests
    reason: str
    tenant: str
    def __init__(self, request_id: _Optional[str] = ..., all: _Optional[_Union[AllRequests, _Mapping]] = ..., reason: _Optional[str] = ..., tenant: _Optional[str] = ...) -> None: ...

class AllRequests(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class AbortResponse(_message.Message):
    __slots__ = ("outcome", "aborted")
    class Outcome(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
        __slots__ = ()
        OUTCOME_UNSPECIFIED: _ClassVar[AbortResponse.Outcome]
        OUTCOME_ABORTED: _ClassVar[AbortResponse.Outcome]
        OUTCOME_ALREADY_FINISHED: _ClassVar[AbortResponse.Outcome]
    OUTCOME_UNSPECIFIED: AbortResponse.Outcome
    OUTCOME_ABORTED: AbortResponse.Outcome
    OUTCOME_ALREADY_FINISHED: AbortResponse.Outcome
    OUTCOME_FIELD_NUMBER: _ClassVar[int]
    ABORTED_FIELD_NUMBER: _ClassVar[int]
    outcome: AbortResponse.Outcome
    aborted: int
    def __init__(self, outcome: _Optional[_Union[AbortResponse.Outcome, str]] = ..., aborted: _Optional[int] = ...) -> None: ...

class DrainRequest(_message.Message):
    __slots__ = ("grace", "undo")
    GRACE_FIELD_NUMBER: _ClassVar[int]
    UNDO_FIELD_NUMBER: _ClassVar[int]
    grace: _duration_pb2.Duration
    undo: bool
    def __init__(self, grace: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ..., undo: _Optional[bool] = ...) -> None: ...

class DrainResponse(_message.Message):
    __slots__ = ("in_flight",)
    IN_FLIGHT_FIELD_NUMBER: _ClassVar[int]
    in_flight: int
    def __init__(self, in_flight: _Optional[int] = ...) -> None: ...

class GetLoadRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class GetLoadResponse(_message.Message):
    __slots__ = ("running", "queued", "queued_uncached_tokens", "used_kv_blocks", "total_kv_blocks", "kv_utilization", "prefix_hit_rate", "output_tokens_per_second", "estimated_queue_wait")
    RUNNING_FIELD_NUMBER: _ClassVar[int]
    QUEUED_FIELD_NUMBER: _ClassVar[int]
    QUEUED_UNCACHED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    USED_KV_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    TOTAL_KV_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    KV_UTILIZATION_FIELD_NUMBER: _ClassVar[int]
    PREFIX_HIT_RATE_FIELD_NUMBER: _ClassVar[int]
    OUTPUT_TOKENS_PER_SECOND_FIELD_NUMBER: _ClassVar[int]
    ESTIMATED_QUEUE_WAIT_FIELD_NUMBER: _ClassVar[int]
    running: int
    queued: int
    queued_uncached_tokens: int
    used_kv_blocks: int
    total_kv_blocks: int
    kv_utilization: float
    prefix_hit_rate: float
    output_tokens_per_second: float
    estimated_queue_wait: _duration_pb2.Duration
    def __init__(self, running: _Optional[int] = ..., queued: _Optional[int] = ..., queued_uncached_tokens: _Optional[int] = ..., used_kv_blocks: _Optional[int] = ..., total_kv_blocks: _Optional[int] = ..., kv_utilization: _Optional[float] = ..., prefix_hit_rate: _Optional[float] = ..., output_tokens_per_second: _Optional[float] = ..., estimated_queue_wait: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ...) -> None: ...

class WatchStateRequest(_message.Message):
    __slots__ = ("load_interval",)
    LOAD_INTERVAL_FIELD_NUMBER: _ClassVar[int]
    load_interval: _duration_pb2.Duration
    def __init__(self, load_interval: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ...) -> None: ...

class WatchStateResponse(_message.Message):
    __slots__ = ("instance_id", "revision", "state", "detail", "load")
    class State(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
        __slots__ = ()
        STATE_UNSPECIFIED: _ClassVar[WatchStateResponse.State]
        STATE_STARTING: _ClassVar[WatchStateResponse.State]
        STATE_READY: _ClassVar[WatchStateResponse.State]
        STATE_DEGRADED: _ClassVar[WatchStateResponse.State]
        STATE_DRAINING: _ClassVar[WatchStateResponse.State]
        STATE_FAILED: _ClassVar[WatchStateResponse.State]
    STATE_UNSPECIFIED: WatchStateResponse.State
    STATE_STARTING: WatchStateResponse.State
    STATE_READY: WatchStateResponse.State
    STATE_DEGRADED: WatchStateResponse.State
    STATE_DRAINING: WatchStateResponse.State
    STATE_FAILED: WatchStateResponse.State
    INSTANCE_ID_FIELD_NUMBER: _ClassVar[int]
    REVISION_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    DETAIL_FIELD_NUMBER: _ClassVar[int]
    LOAD_FIELD_NUMBER: _ClassVar[int]
    instance_id: str
    revision: int
    state: WatchStateResponse.State
    detail: str
    load: GetLoadResponse
    def __init__(self, instance_id: _Optional[str] = ..., revision: _Optional[int] = ..., state: _Optional[_Union[WatchStateResponse.State, str]] = ..., detail: _Optional[str] = ..., load: _Optional[_Union[GetLoadResponse, _Mapping]] = ...) -> None: ...

class FlushCacheRequest(_message.Message):
    __slots__ = ("wait_idle",)
    WAIT_IDLE_FIELD_NUMBER: _ClassVar[int]
    wait_idle: bool
    def __init__(self, wait_idle: _Optional[bool] = ...) -> None: ...

class FlushCacheResponse(_message.Message):
    __slots__ = ("blocks_freed",)
    BLOCKS_FREED_FIELD_NUMBER: _ClassVar[int]
    blocks_freed: int
    def __init__(self, blocks_freed: _Optional[int] = ...) -> None: ...
