"""The contract: linted, unchanged where it was accepted, and generated code that follows it."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
from pathlib import Path
from types import ModuleType

import pytest
from google.protobuf import descriptor_pb2, descriptor_pool
from google.rpc import status_pb2

from photon_grpc.v1 import inference_pb2

ROOT = Path(__file__).resolve().parents[2]


def load_tool(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "tools" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


check_proto = load_tool("check_proto")
gen_proto = load_tool("gen_proto")


def changed(
    tmp_path: Path, old: str, new: str, file: str = "inference.proto"
) -> descriptor_pb2.FileDescriptorSet:
    """The contract's descriptors with one text change."""
    folder = tmp_path / "proto"
    shutil.copytree(ROOT / "proto", folder)
    path = folder / "photon" / "v1" / file
    text = path.read_text(encoding="utf-8")
    assert old in text
    path.write_text(text.replace(old, new), encoding="utf-8")
    files = check_proto.compile_files(folder)
    assert isinstance(files, descriptor_pb2.FileDescriptorSet)
    return files


def test_generated_code_is_current() -> None:
    assert gen_proto.stale() == []


def test_staleness_is_seen(tmp_path: Path) -> None:
    target = tmp_path / "v1"
    shutil.copytree(ROOT / "photon_grpc" / "v1", target, ignore=shutil.ignore_patterns("__pycache__"))
    (target / "inference_pb2.py").write_text("# older\n", encoding="utf-8")
    (target / "model_pb2.pyi").unlink()
    (target / "left_over_pb2.py").write_text("", encoding="utf-8")
    assert gen_proto.stale(target) == ["inference_pb2.py", "left_over_pb2.py", "model_pb2.pyi"]


def test_generated_code_runs_on_the_oldest_supported_runtime() -> None:
    """A generated module refuses a runtime older than its generator; pyproject promises these floors."""
    pyproject = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    floors = dict(re.findall(r'"(grpcio|protobuf)>=([0-9.]+)"', pyproject))
    generated = ROOT / "photon_grpc" / "v1"
    needs_grpc = re.search(r"GENERATED_VERSION = '([0-9.]+)'", (generated / "model_pb2_grpc.py").read_text())
    needs_protobuf = re.search(
        r"Protobuf Python Version: ([0-9.]+)", (generated / "model_pb2.py").read_text()
    )
    assert needs_grpc is not None
    assert needs_protobuf is not None
    assert floors == {"grpcio": needs_grpc.group(1), "protobuf": needs_protobuf.group(1)}


def test_what_is_vendored_is_what_python_has_from_its_distribution() -> None:
    """Other languages compile the file here, Python takes googleapis-common-protos: they must be one message,
    and registered once, whoever else in the process uses it."""
    (vendored,) = check_proto.compile_files(below="google").file
    distributed = descriptor_pb2.FileDescriptorProto.FromString(status_pb2.DESCRIPTOR.serialized_pb)
    assert (vendored.name, vendored.package) == (distributed.name, distributed.package)
    for message in (*vendored.message_type, *distributed.message_type):
        for field in message.field:
            field.ClearField("json_name")  # protoc says it to plugins alone
    assert list(vendored.message_type) == list(distributed.message_type)
    assert inference_pb2.BatchGenerateResponse().error.DESCRIPTOR is status_pb2.Status.DESCRIPTOR
    pool = descriptor_pool.Default()
    assert pool.FindMessageTypeByName("google.rpc.Status") is status_pb2.Status.DESCRIPTOR
    assert pool.FindFileContainingSymbol("google.rpc.Status").name == "google/rpc/status.proto"
    assert not list((ROOT / "photon_grpc").rglob("status_pb2*"))


def test_the_contract_is_linted() -> None:
    assert check_proto.lint(check_proto.compile_files()) == []


def test_the_contract_is_the_accepted_one() -> None:
    accepted = json.loads((ROOT / "proto" / "contract.json").read_text(encoding="utf-8"))
    assert check_proto.contract_of(check_proto.compile_files()) == accepted


@pytest.mark.parametrize(
    ("old", "new", "complaint"),
    [
        ("package photon.v1;", "package photon.v2;", "does not match its folder"),
        ("service InferenceService {", "service Inference {", "ends in Service"),
        ("rpc Tokenize(", "rpc tokenize(", "a method is PascalCase"),
        ("rpc Generate(GenerateRequest)", "rpc Generate(TokenizeRequest)", "expected GenerateRequest"),
        ("returns (TokenizeResponse)", "returns (DetokenizeResponse)", "is used by"),
        ("returns (GenerateResponse)", "returns (GenerateRequest)", "are one message"),
        ("message Choices {", "message choices {", "a message is PascalCase"),
        ("uint32 num_tokens = 5;", "uint32 numTokens = 5;", "a field is lower_snake_case"),
        ("oneof matched {", "oneof Matched {", "a oneof is lower_snake_case"),
        ("FINISH_REASON_UNSPECIFIED", "FINISH_REASON_NONE", "FINISH_REASON_UNSPECIFIED = 0"),
        ("ROLE_TOOL = 4;", "TOOL = 4;", "with prefix ROLE_"),
        ("ROLE_TOOL = 4;", "ROLE_TOOL = 4; ROLE_BOT = 4; option allow_alias = true;", "aliases"),
        ('import "google/protobuf/struct.proto";', 'import public "google/protobuf/struct.proto";', "public"),
        (
            'import "google/protobuf/struct.proto";',
            'import "google/protobuf/struct.proto"; import "google/protobuf/empty.proto";',
            "is not used",
        ),
        (
            'import "google/protobuf/struct.proto";',
            'import "google/protobuf/struct.proto"; import "photon/v1/model.proto";',
            "stay self-contained",
        ),
        ('java_package = "photon.v1"', 'java_package = "other"', "java_package differs"),
    ],
)
def test_lint_sees(tmp_path: Path, old: str, new: str, complaint: str) -> None:
    if new.startswith("message choices"):
        old, new = "Choices", "choices"
    problems = check_proto.lint(changed(tmp_path, old, new))
    assert any(complaint in problem for problem in problems), problems


@pytest.mark.parametrize(
    ("old", "new", "complaint"),
    [
        ("optional float top_p = 2;", "optional float top_p = 14;", "top_p: changed number"),
        ("optional float top_p = 2;", "optional double top_p = 2;", "top_p: changed type"),
        ("optional float top_p = 2;", "float top_p = 2;", "top_p: changed optional"),
        ("optional float top_p = 2;", "repeated float top_p = 2;", "top_p: changed label, optional"),
        ("optional float top_p = 2;", "", "top_p: is gone"),
        ("optional float top_p = 2;", "optional float nucleus = 2;", "top_p: is gone"),
        ("ChunkPolicy chunk_policy = 3;", "StopParams chunk_policy = 3;", "chunk_policy: changed type_name"),
        ("string adapter = 11;", 'string adapter = 11 [json_name = "lora"];', "adapter: changed json_name"),
        ("repeated uint32 ids = 1;", "repeated uint32 ids = 1 [packed = false];", "ids: changed packed"),
        ("string text = 2;\n    TokenIds", "TokenIds", "text: is gone"),
        ("ROLE_TOOL = 4;", "ROLE_TOOL = 5;", "ROLE_TOOL: changed number"),
        ("ROLE_TOOL = 4;", "", "ROLE_TOOL: is gone"),
        ("returns (stream Stream", "returns (Stream", "StreamGenerate: changed server_streaming"),
        ("google.rpc.Status error = 3;", "google.protobuf.Struct error = 3;", "error: changed type_name"),
        ("rpc Detokenize(DetokenizeRequest) returns (DetokenizeResponse);", "", "Detokenize: is gone"),
        ("oneof matched {", "oneof found {", "stop_string: changed oneof"),
    ],
)
def test_breaking_changes_are_seen(tmp_path: Path, old: str, new: str, complaint: str) -> None:
    accepted = json.loads((ROOT / "proto" / "contract.json").read_text(encoding="utf-8"))
    current = check_proto.contract_of(changed(tmp_path, old, new))
    problems = check_proto.breaking(accepted, current)
    assert any(complaint in problem for problem in problems), problems


def test_additions_are_not_breaking(tmp_path: Path) -> None:
    accepted = json.loads((ROOT / "proto" / "contract.json").read_text(encoding="utf-8"))
    files = changed(tmp_path, "string adapter = 11;", "string adapter = 11; optional bool extra = 16;")
    current = check_proto.contract_of(files)
    assert check_proto.breaking(accepted, current) == []
    assert current.keys() - accepted.keys() == {"field photon.v1.GenerationSpec.extra"}
