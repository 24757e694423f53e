"""Every error that photon_grpc raises on purpose.

The tree, with the gRPC status each branch ends in (`server/status.py` holds the one map):

    PhotonError
      RequestError              the caller's fault, never retried
        MalformedMessageError     INVALID_ARGUMENT
        InvalidRequestError       INVALID_ARGUMENT
        ContextLengthError        INVALID_ARGUMENT
        UnsupportedFeatureError   UNIMPLEMENTED
        ModelNotFoundError        NOT_FOUND
        RequestNotFoundError      NOT_FOUND
        DuplicateRequestError     ALREADY_EXISTS
      AccessError               the caller, whatever the request
        UnauthenticatedError      UNAUTHENTICATED
        ForbiddenError            PERMISSION_DENIED
      CapacityError
        OverloadedError           UNAVAILABLE
        DeadlineUnreachableError  UNAVAILABLE
        QuotaExceededError        RESOURCE_EXHAUSTED
        OutOfMemoryError          UNAVAILABLE
      LifecycleError
        EngineStartingError       UNAVAILABLE
        EngineDrainingError       UNAVAILABLE
        EngineDeadError           UNAVAILABLE
      DurationError
        QueueTimeoutError         DEADLINE_EXCEEDED
        FirstTokenTimeoutError    DEADLINE_EXCEEDED
        MaxDurationError          DEADLINE_EXCEEDED
        DeadlineTooShortError     DEADLINE_EXCEEDED
      StreamError
        SlowConsumerError         ABORTED
        OperatorAbortError        ABORTED
      StartupError              ends the process, never an RPC
        ConfigError
        ModelLoadError
        UnsupportedModelError
        BackendUnavailableError
        KernelCompileError
        ListenError
      InternalError             INTERNAL; fixed text for the client, detail in the log only
        RequestFaultError

Anything a client, a file or a device can cause is one of these. `ValueError` and `assert` mean a
bug of ours and are never mapped to a client's mistake.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class FieldViolation:
    """One field that broke a rule. `field` is the path in the proto message."""

    field: str
    description: str


class PhotonError(Exception):
    """Base of the tree. `message` is safe to show to a client; it never holds prompt text."""

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message

    def __reduce__(self) -> tuple[Any, ...]:
        # The constructors of the tree take other things than the message that `args` holds.
        return _restored, (type(self), self.args, self.__dict__)


def _restored(cls: type[PhotonError], args: tuple[Any, ...], state: Mapping[str, Any]) -> PhotonError:
    """An error as it was when it was pickled, made without its constructor."""
    error = cls.__new__(cls, *args)
    error.__dict__.update(state)
    return error


class RequestError(PhotonError):
    """The request itself is wrong; sending it again unchanged fails again."""

    def __init__(self, message: str, violations: Sequence[FieldViolation] = ()) -> None:
        super().__init__(message)
        self.violations = tuple(violations)


class MalformedMessageError(RequestError):
    """The bytes are no valid protobuf message of the method's type."""


class InvalidRequestError(RequestError):
    """Fields that are missing, out of range or at odds with one another."""

    def __init__(self, violations: Sequence[FieldViolation]) -> None:
        text = "; ".join(f"{v.field}: {v.description}" for v in violations)
        super().__init__(f"invalid request: {text}", violations)

    @classmethod
    def of(cls, field: str, description: str) -> InvalidRequestError:
        """The common case of a single violation."""
        return cls([FieldViolation(field, description)])

    @classmethod
    def ambiguous_id(cls) -> InvalidRequestError:
        """An operator named an id that live requests of several tenants have. Says nothing of whose."""
        return cls.of("tenant", "required: live requests of several tenants have this id")


class ContextLengthError(RequestError):
    """The prompt leaves no room for a single output token."""

    def __init__(self, field: str, num_tokens: int, limit: int) -> None:
        text = f"the prompt has {num_tokens} tokens, at most {limit} fit"
        super().__init__(text, [FieldViolation(field, text)])
        self.num_tokens = num_tokens
        self.limit = limit


class UnsupportedFeatureError(RequestError):
    """A field that the schema has and this server does not implement."""

    def __init__(self, field: str, description: str) -> None:
        super().__init__(f"{field}: {description}", [FieldViolation(field, description)])


class _NotFoundError(RequestError):
    resource_type: str

    def __init__(self, name: str) -> None:
        super().__init__(f"no such {self.resource_type}")
        self.name = name


class ModelNotFoundError(_NotFoundError):
    """The request names a model that this server does not serve."""

    resource_type = "model"


class RequestNotFoundError(_NotFoundError):
    """An operator named a request that is not live."""

    resource_type = "request"


class DuplicateRequestError(RequestError):
    """A live request already has this id."""

    resource_type = "request"

    def __init__(self, name: str) -> None:
        super().__init__("a live request has this request_id")
        self.name = name


class AccessError(PhotonError):
    """This caller may not make this call. Says nothing of whether what it names exists."""


class UnauthenticatedError(AccessError):
    """No credentials, or none that are known."""

    def __init__(self) -> None:
        super().__init__("a known bearer token or client certificate is required")


class ForbiddenError(AccessError):
    """The caller is known, and this is not for it: the method needs a role that it lacks, or it states
    what only others may."""

    def __init__(self, message: str = "the caller lacks the role for this method") -> None:
        super().__init__(message)


class CapacityError(PhotonError):
    """The server is fine and too busy. `retry_after_s` is when to come back."""

    def __init__(self, message: str, retry_after_s: float) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class OverloadedError(CapacityError):
    """The queue is full."""


class DeadlineUnreachableError(CapacityError):
    """The queue is too long for the request's clocks; another replica may make it."""

    def __init__(self, retry_after_s: float) -> None:
        super().__init__("the queue is too long for the request's deadline", retry_after_s)


class QuotaExceededError(CapacityError):
    """The tenant has used up what it may; infinite `retry_after_s`: no wait helps this request."""

    def __init__(self, limit: str, retry_after_s: float) -> None:
        super().__init__(f"the tenant's quota of {limit} is used up", retry_after_s)
        self.limit = limit


class OutOfMemoryError(CapacityError):
    """There is no memory for this request now; what is smaller, or comes later, may fit."""

    def __init__(self, retry_after_s: float = 1.0) -> None:
        super().__init__("the server has no memory for the request", retry_after_s)


class LifecycleError(PhotonError):
    """The server is not in a state to take requests; another replica may be."""


class EngineStartingError(LifecycleError):
    """The model is not ready yet."""

    def __init__(self) -> None:
        super().__init__("the server is starting")


class EngineDrainingError(LifecycleError):
    """The server is shutting down."""

    def __init__(self) -> None:
        super().__init__("the server is draining")


class EngineDeadError(LifecycleError):
    """The engine failed in a step; the process is about to exit."""

    def __init__(self) -> None:
        super().__init__("the engine has stopped")


class DurationError(PhotonError):
    """A clock of the request ran out."""


class QueueTimeoutError(DurationError):
    """Not started within `scheduling.queue_timeout`."""

    def __init__(self) -> None:
        super().__init__("the request was not started within its queue_timeout")


class FirstTokenTimeoutError(DurationError):
    """No token within `scheduling.first_token_budget`."""

    def __init__(self) -> None:
        super().__init__("no token came within the first_token_budget")


class MaxDurationError(DurationError):
    """Ran for as long as the server lets any request run, or past its deadline."""

    def __init__(self) -> None:
        super().__init__("the request reached its deadline or the server's maximum duration")


class DeadlineTooShortError(DurationError):
    """Even alone on the server the request would not have a token in time. `estimate_s` is what it takes."""

    def __init__(self, estimate_s: float) -> None:
        super().__init__("the deadline is shorter than the prompt takes on an idle server")
        self.estimate_s = estimate_s


class StreamError(PhotonError):
    """The stream was ended from outside the model."""


class SlowConsumerError(StreamError):
    """One write was pending for longer than the slow-consumer limit."""

    def __init__(self) -> None:
        super().__init__("the client read too slowly")


class OperatorAbortError(StreamError):
    """ControlService.Abort ended the request."""

    def __init__(self) -> None:
        super().__init__("the request was aborted by an operator")


class StartupError(PhotonError):
    """The process cannot start; the command line prints the message and exits with 2."""


class ConfigError(StartupError):
    """A setting is unknown, malformed or at odds with another."""


class ModelLoadError(StartupError):
    """A model folder is incomplete, damaged or hostile. The message names file and tensor."""


class UnsupportedModelError(StartupError):
    """config.json asks for an architecture or option that is not implemented."""


class BackendUnavailableError(StartupError):
    """The chosen backend lacks a library or a device. The message says which."""


class KernelCompileError(StartupError):
    """A CUDA kernel did not compile. The message ends with the compiler's log."""

    def __init__(self, source: str, arch: str, macros: Mapping[str, int | str], log: str) -> None:
        defined = "".join(f" -D{name}={value}" for name, value in sorted(macros.items()))
        super().__init__(f"{source} does not compile for {arch}{defined}:\n{log}")
        self.log = log


class ListenError(StartupError):
    """A listener's address cannot be bound. The message names the listener and the address."""


class InternalError(PhotonError):
    """Something that should not happen. The client gets fixed text and the request id."""

    def __init__(self, message: str = "internal error") -> None:
        super().__init__(message)


class RequestFaultError(InternalError):
    """The model's output for this one request was unusable (non-finite logits)."""

    def __init__(self) -> None:
        super().__init__("the model produced unusable output for this request")
