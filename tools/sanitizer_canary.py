"""One launch with a planted error for each tool of compute-sanitizer: `sanitizer_canary.py racecheck`.

A tool that says nothing of it is blind here (another driver, a filter that fits no kernel), and its silence
about our kernels would mean nothing. The kernel's name is `planted`, filtered for as ours are.
"""

from __future__ import annotations

import sys

__all__ = ["SOURCES", "main"]

_BODIES = {
    # One element behind the allocation's end, which the driver makes 256 bytes at least.
    "memcheck": "data[1 << 20] = 1;",
    # Every thread reads its neighbour's word, with no barrier between.
    "racecheck": "__shared__ int words[64]; words[threadIdx.x] = data[0];"
    " data[threadIdx.x] = words[63 - threadIdx.x];",
    # A barrier of half a warp that one thread more comes to. (Threads that have left are waited for by none.)
    "synccheck": "unsigned mask = __ballot_sync(0xffffffffu, threadIdx.x % 32 < 16);"
    " if (threadIdx.x % 32 <= 16) { data[threadIdx.x] = 1; __syncwarp(mask); data[0] = data[threadIdx.x]; }",
    # The sum of memory that nobody wrote.
    "initcheck": "atomicAdd(data + 64, data[threadIdx.x]);",
}
SOURCES = {
    tool: f'extern "C" __global__ void planted(int* data) {{ {body} }}' for tool, body in _BODIES.items()
}


def main(arguments: list[str]) -> int:
    import cupy

    runtime = cupy.cuda.runtime
    (tool,) = arguments
    kernel = cupy.RawModule(code=SOURCES[tool]).get_function("planted")
    # Not from a pool, in which nothing is out of bounds.
    address = runtime.malloc(512)
    kernel((1,), (64,), (cupy.uint64(address),))
    # An error of the launch itself is not what is looked for: the tool stops what it found in memcheck.
    try:
        runtime.deviceSynchronize()
    except runtime.CUDARuntimeError as error:
        print(f"the launch ended with {error}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
