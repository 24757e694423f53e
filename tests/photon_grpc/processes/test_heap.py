"""Threads that share a heap, in a process of their own: the setting is for good."""

from __future__ import annotations

import ctypes
import subprocess
import sys

import pytest

# Prints what share_one_heap said, and how many heaps there are once four threads have allocated at a time.
_PROGRAM = """
import ctypes, os, sys, tempfile, threading
from photon_grpc.processes.heap import share_one_heap

print(share_one_heap() if sys.argv[1] == "one" else "-")
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
libc.fdopen.restype = ctypes.c_void_p
together = threading.Barrier(4)

def allocate():
    together.wait()
    libc.malloc(ctypes.c_size_t(5000))
    together.wait()

threads = [threading.Thread(target=allocate) for _ in range(4)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
with tempfile.TemporaryFile() as file:
    stream = ctypes.c_void_p(libc.fdopen(os.dup(file.fileno()), b"w"))
    libc.malloc_info(0, stream)
    libc.fclose(stream)
    file.seek(0)
    print(file.read().count(b"<heap nr="))
"""


def run(how: str) -> list[str]:
    command = [sys.executable, "-c", _PROGRAM, how]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_info"), reason="not glibc's malloc")
def test_threads_share_one_heap_where_they_are_told_to() -> None:
    assert run("one") == ["True", "1"]
    _, num_heaps = run("many")
    assert int(num_heaps) > 1
