import datetime

from google.protobuf import timestamp_pb2 as _timestamp_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class GetModelInfoRequest(_message.Message):
    __slots__ = ("model",)
    MODEL_FIELD_NUMBER: _ClassVar[int]
    model: str
    def __init__(self, model: _Optional[str] = ...) -> None: ...

class GetModelInfoResponse(_message.Message):
    __slots__ = ("model", "fingerprint", "max_context_tokens", "max_output_tokens", "capabilities")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    MAX_CONTEXT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    MAX_OUTPUT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    CAPABILITIES_FIELD_NUMBER: _ClassVar[int]
    model: str
    fingerprint: str
    max_context_tokens: int
    max_output_tokens: int
    capabilities: Capabilities
    def __init__(self, model: _Optional[str] = ..., fingerprint: _Optional[str] = ..., max_context_tokens: _Optional[int] = ..., max_output_tokens: _Optional[int] = ..., capabilities: _Optional[_Union[Capabilities, _Mapping]] = ...) -> None: ...

class Capabilities(_message.Message):
    __slots__ = ("text_input", "token_ids_input", "chat_input", "constraint_kinds", "max_top_logprobs", "max_prompt_top_logprobs", "max_n", "max_stop_strings", "priority", "cache_salt", "resume", "seeded_determinism", "max_batch_items")
    TEXT_INPUT_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_INPUT_FIELD_NUMBER: _ClassVar[int]
    CHAT_INPUT_FIELD_NUMBER: _ClassVar[int]
    CONSTRAINT_KINDS_FIELD_NUMBER: _ClassVar[int]
    MAX_TOP_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    MAX_PROMPT_TOP_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    MAX_N_FIELD_NUMBER: _ClassVar[int]
    MAX_STOP_STRINGS_FIELD_NUMBER: _ClassVar[int]
    PRIORITY_FIELD_NUMBER: _ClassVar[int]
    CACHE_SALT_FIELD_NUMBER: _ClassVar[int]
    RESUME_FIELD_NUMBER: _ClassVar[int]
    SEEDED_DETERMINISM_FIELD_NUMBER: _ClassVar[int]
    MAX_BATCH_ITEMS_FIELD_NUMBER: _ClassVar[int]
    text_input: bool
    token_ids_input: bool
    chat_input: bool
    constraint_kinds: _containers.RepeatedScalarFieldContainer[str]
    max_top_logprobs: int
    max_prompt_top_logprobs: int
    max_n: int
    max_stop_strings: int
    priority: bool
    cache_salt: bool
    resume: bool
    seeded_determinism: bool
    max_batch_items: int
    def __init__(self, text_input: _Optional[bool] = ..., token_ids_input: _Optional[bool] = ..., chat_input: _Optional[bool] = ..., constraint_kinds: _Optional[_Iterable[str]] = ..., max_top_logprobs: _Optional[int] = ..., max_prompt_top_logprobs: _Optional[int] = ..., max_n: _Optional[int] = ..., max_stop_strings: _Optional[int] = ..., priority: _Optional[bool] = ..., cache_salt: _Optional[bool] = ..., resume: _Optional[bool] = ..., seeded_determinism: _Optional[bool] = ..., max_batch_items: _Optional[int] = ...) -> None: ...

class GetServerInfoRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class GetServerInfoResponse(_message.Message):
    __slots__ = ("version", "instance_id", "schema_revision", "minimum_client_revision", "kv_block_tokens", "total_kv_blocks", "max_running_requests", "max_queued_requests", "start_time")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    INSTANCE_ID_FIELD_NUMBER: _ClassVar[int]
    SCHEMA_REVISION_FIELD_NUMBER: _ClassVar[int]
    MINIMUM_CLIENT_REVISION_FIELD_NUMBER: _ClassVar[int]
    KV_BLOCK_TOKENS_FIELD_NUMBER: _ClassVar[int]
    TOTAL_KV_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    MAX_RUNNING_REQUESTS_FIELD_NUMBER: _ClassVar[int]
    MAX_QUEUED_REQUESTS_FIELD_NUMBER: _ClassVar[int]
    START_TIME_FIELD_NUMBER: _ClassVar[int]
    version: str
    instance_id: str
    schema_revision: int
    minimum_client_revision: int
    kv_block_tokens: int
    total_kv_blocks: int
    max_running_requests: int
    max_queued_requests: int
    start_time: _timestamp_pb2.Timestamp
    def __init__(self, version: _Optional[str] = ..., instance_id: _Optional[str] = ..., schema_revision: _Optional[int] = ..., minimum_client_revision: _Optional[int] = ..., kv_block_tokens: _Optional[int] = ..., total_kv_blocks: _Optional[int] = ..., max_running_requests: _Optional[int] = ..., max_queued_requests: _Optional[int] = ..., start_time: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ...) -> None: ...
