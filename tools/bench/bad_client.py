"""A client that does not behave: `python -m tools.bench.bad_client ADDRESS NAME STREAMS READS TOKENS SEED`.

Opens some streams of TOKENS tokens, reads all of them or none (READS 0), and stays until it is killed by
whoever started it. Its calls are `NAME-0`, `NAME-1`, ... It prints a line once they are under way.
"""

from __future__ import annotations

import random
import sys
import threading
import time
from contextlib import suppress

import grpc

from photon_grpc.v1 import inference_pb2, inference_pb2_grpc

_STAY_S = 600.0


def main(address: str, name: str, num_streams: int, reads: bool, num_tokens: int, seed: int) -> None:
    pick = random.Random(seed)
    stub = inference_pb2_grpc.InferenceServiceStub(grpc.insecure_channel(address))
    calls = []
    for number in range(num_streams):
        spec = inference_pb2.GenerationSpec()
        spec.token_ids.ids.extend(pick.randrange(5, 95) for _ in range(pick.randrange(1, 90)))
        spec.stop.max_tokens, spec.stop.ignore_eos = num_tokens, True
        request = inference_pb2.StreamGenerateRequest(spec=spec)
        calls.append(stub.StreamGenerate(request, metadata=(("x-request-id", f"{name}-{number}"),)))
    if reads:
        for call in calls:
            threading.Thread(target=_read, args=(call,), daemon=True).start()
    print("under way", flush=True)
    time.sleep(_STAY_S)


def _read(call: grpc.Call) -> None:
    with suppress(grpc.RpcError):  # an end like any other: this client does not care
        for _ in call:
            pass


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4] == "1", int(sys.argv[5]), int(sys.argv[6]))
