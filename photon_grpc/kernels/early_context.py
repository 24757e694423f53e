"""The device's context, begun while torch is still being imported.

The driver takes some hundred milliseconds to start up and to make a context, and needs no interpreter lock
for it; an import of torch takes longer, and needs little else. Imports no torch.
"""

from __future__ import annotations

import os
import threading
from importlib.util import find_spec
from typing import Any

import structlog

_log = structlog.get_logger(__name__)

# Of those that the process may see: torch's current device unless it is told otherwise.
_DEVICE = 0


def begin_context() -> threading.Thread | None:
    """Have a thread make the context that torch and the kernels will find; None without their packages.

    An installation that lacks them serves on the CPU and leaves the device alone. What fails in the thread
    fails again where it is used, which says so. Ends with the process.
    """
    if not _is_installed("cupy"):
        return None
    # What torch sets before it touches the driver.
    os.environ.setdefault("CUDA_MODULE_LOADING", "LAZY")
    try:
        from cuda.bindings import driver
    except ImportError:
        return None
    thread = threading.Thread(target=_begin, args=(driver,), name="photon-context", daemon=True)
    thread.start()
    return thread


def _is_installed(package: str) -> bool:
    return find_spec(package) is not None


def _begin(driver: Any) -> None:
    try:
        for call, argument in (
            (driver.cuInit, 0),
            (driver.cuDeviceGet, _DEVICE),
            # Never released: torch holds it for as long.
            (driver.cuDevicePrimaryCtxRetain, _DEVICE),
        ):
            result = call(argument)[0]
            if int(result) != 0:
                _log.debug("no early context", call=call.__name__, result=str(result))
                return
    except RuntimeError as error:
        # How the bindings say that there is no driver.
        _log.debug("no early context", reason=str(error))
