"""A retry recomputes, and with a seed a real model gives it the same tokens, however it is called."""

from __future__ import annotations

from pathlib import Path

import grpc

from photon_grpc.v1 import inference_pb2 as pb
from photon_grpc.v1 import inference_pb2_grpc, model_pb2, model_pb2_grpc
from tests.support.server_process import server_process
from tests.support.tiny_model import tiny_model_folder

NUM_TOKENS = 24


def spec(seed: int) -> pb.GenerationSpec:
    made = pb.GenerationSpec(text="once upon a time")
    made.sampling.temperature, made.sampling.seed = 1.5, seed
    made.stop.max_tokens, made.stop.ignore_eos = NUM_TOKENS, True
    made.output.token_ids = True
    return made


def generated(stub: inference_pb2_grpc.InferenceServiceStub, seed: int) -> list[int]:
    response = stub.Generate(pb.GenerateRequest(request_id="mine", spec=spec(seed)), timeout=60)
    return list(response.completions[0].token_ids)


def test_a_seeded_retry_has_the_same_tokens(tmp_path: Path) -> None:
    folder = tiny_model_folder(tmp_path)
    with server_process(folder, tmp_path / "log") as server, grpc.insecure_channel(server.address) as channel:
        info = model_pb2_grpc.ModelServiceStub(channel).GetModelInfo(model_pb2.GetModelInfoRequest())
        assert info.capabilities.seeded_determinism
        stub = inference_pb2_grpc.InferenceServiceStub(channel)
        first = generated(stub, seed=11)
        assert len(first) == NUM_TOKENS
        assert generated(stub, seed=12) != first, "the seed decides, not the prompt alone"
        assert generated(stub, seed=11) == first

        # An attempt that is given up in its middle, and the retry right behind it.
        request = pb.StreamGenerateRequest(request_id="mine", spec=spec(11))
        given_up = stub.StreamGenerate(request, timeout=60)
        next(given_up)
        given_up.cancel()
        events = stub.StreamGenerate(request, timeout=60)
        assert [token for event in events for token in event.delta.token_ids] == first

        # In a batch among others, too.
        batch = pb.BatchGenerateRequest(request_id="mine", specs=[spec(11), spec(12), spec(11)])
        items = {item.item: item.response for item in stub.BatchGenerate(batch, timeout=60)}
        tokens = [list(items[index].completions[0].token_ids) for index in range(3)]
        assert tokens[0] == tokens[2] == first
        assert tokens[1] != first
