"""The error tree: an error that crosses into another process is the same error there."""

from __future__ import annotations

import inspect
import pickle
from collections.abc import Iterator

import pytest

from photon_grpc import errors
from photon_grpc.errors import FieldViolation, PhotonError

# A value for every parameter that some constructor of the tree has.
ARGUMENTS: dict[str, object] = {
    "message": "what is wrong",
    "violations": [FieldViolation("spec.text", "is missing"), FieldViolation("spec.stop", "is too much")],
    "field": "spec.text",
    "description": "is not supported",
    "num_tokens": 9,
    "limit": 8,
    "name": "nobody",
    "retry_after_s": 1.5,
    "estimate_s": 0.5,
    "source": "rope.cu",
    "arch": "sm_90a",
    "macros": {"HEAD_DIM": 64},
    "log": "rope.cu(3): error",
}


def tree(root: type[PhotonError] = PhotonError) -> Iterator[type[PhotonError]]:
    yield root
    for child in root.__subclasses__():
        if child.__module__ == errors.__name__:
            yield from tree(child)


def example(cls: type[PhotonError]) -> PhotonError:
    names = inspect.signature(cls).parameters
    return cls(**{name: ARGUMENTS[name] for name in names})


# The one class that is never raised itself and lacks what its subclasses have.
CLASSES = [cls for cls in tree() if cls is not errors._NotFoundError]


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
@pytest.mark.parametrize("protocol", [2, 5])
def test_every_error_survives_pickling(cls: type[PhotonError], protocol: int) -> None:
    error = example(cls)
    copy = pickle.loads(pickle.dumps(error, protocol))
    assert type(copy) is cls
    assert str(copy) == str(error)
    assert copy.args == error.args
    assert vars(copy) == vars(error)
    assert copy.message == error.message


def test_the_arguments_are_those_of_the_tree() -> None:
    used = {name for cls in CLASSES for name in inspect.signature(cls).parameters}
    assert used == set(ARGUMENTS)
