"""Threads that share a heap, in a process of their own: the setting is for good."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys

import pytest

from photon_grpc.processes.heap import without_thread_caches

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


# Prints how many bytes malloc still counts as in use of seven blocks that were freed.
_FREES = """
import ctypes
from tests.support.heap_bytes import heap_bytes

libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
libc.free.argtypes = [ctypes.c_void_p]
before = heap_bytes()
blocks = [libc.malloc(ctypes.c_size_t(1000)) for _ in range(7)]
for block in blocks:
    libc.free(block)
print(heap_bytes() - before)
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="not glibc's malloc")
def test_threads_keep_nothing_that_they_freed_where_they_are_told_to() -> None:
    def kept(environment: dict[str, str]) -> int:
        command = [sys.executable, "-c", _FREES]
        found = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
        return int(found.stdout)

    plain = {name: value for name, value in os.environ.items() if name != "GLIBC_TUNABLES"}
    assert kept(plain) >= 7000
    assert kept(without_thread_caches(plain)) < 3500


def test_a_choice_of_the_environment_stays() -> None:
    name = "GLIBC_TUNABLES"
    assert without_thread_caches({"A": "b"}) == {"A": "b", name: "glibc.malloc.tcache_count=0"}
    both = without_thread_caches({name: "glibc.malloc.top_pad=0"})
    assert both == {name: "glibc.malloc.top_pad=0:glibc.malloc.tcache_count=0"}
    chosen = {name: "glibc.malloc.tcache_count=3"}
    assert without_thread_caches(chosen) == chosen
