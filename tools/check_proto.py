#!/usr/bin/env python3
"""Lints `proto/` and compares it with the contract as it was last accepted.

The rules are those of buf's STANDARD lint and WIRE_JSON breaking category that can occur here, written
over descriptors so that they run wherever grpcio-tools does; `proto/buf.yaml` asks buf for the same.
`proto/contract.json` holds the accepted contract. Anything in it must still be there, unchanged;
what is new enters it with `--accept`, in the change that adds it.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from google.protobuf import descriptor_pb2 as pb

ROOT = Path(__file__).resolve().parent.parent
PROTO = ROOT / "proto"
CONTRACT = PROTO / "contract.json"

_SNAKE = re.compile(r"[a-z][a-z0-9]*(_[a-z0-9]+)*")
_UPPER_SNAKE = re.compile(r"[A-Z][A-Z0-9]*(_[A-Z0-9]+)*")
_PASCAL = re.compile(r"[A-Z][A-Za-z0-9]*")
_FILE_OPTIONS = ("go_package", "java_package", "java_multiple_files", "csharp_namespace")

Contract = dict[str, dict[str, Any]]


class ProtoError(Exception):
    """protoc is missing or refused the sources."""


def compile_files(folder: Path = PROTO, below: str = "photon") -> pb.FileDescriptorSet:
    """Descriptors of every .proto file in `folder` below `below`, without their imports.

    Beside ours lies what is vendored, which is not ours to lint or to change. Raises ProtoError.
    """
    try:
        from grpc_tools import protoc
    except ImportError as error:
        raise ProtoError("grpcio-tools is not installed") from error
    names = sorted(str(path.relative_to(folder)) for path in (folder / below).rglob("*.proto"))
    with tempfile.TemporaryDirectory() as scratch:
        target = Path(scratch, "set.bin")
        known = Path(protoc.__file__).parent / "_proto"
        if (
            protoc.main(["protoc", f"-I{folder}", f"-I{known}", f"--descriptor_set_out={target}", *names])
            != 0
        ):
            raise ProtoError("protoc failed")
        return pb.FileDescriptorSet.FromString(target.read_bytes())


def _messages(
    prefix: str, messages: Iterable[pb.DescriptorProto]
) -> Iterator[tuple[str, pb.DescriptorProto]]:
    for message in messages:
        name = f"{prefix}.{message.name}"
        yield name, message
        yield from _messages(name, message.nested_type)


def _enums(file: pb.FileDescriptorProto) -> Iterator[tuple[str, pb.EnumDescriptorProto]]:
    for enum in file.enum_type:
        yield f"{file.package}.{enum.name}", enum
    for name, message in _messages(file.package, file.message_type):
        for enum in message.enum_type:
            yield f"{name}.{enum.name}", enum


def lint(files: pb.FileDescriptorSet) -> list[str]:
    """What breaks a rule, one line each, empty when all is well."""
    ours = {file.name for file in files.file}
    problems: list[str] = []
    used_messages: dict[str, str] = {}
    options: dict[tuple[str, str], Any] = {}
    for file in files.file:
        problems += _lint_file(file, ours)
        for option in _FILE_OPTIONS:
            value = getattr(file.options, option)
            if options.setdefault((file.package, option), value) != value:
                problems.append(f"{file.name}: {option} differs within {file.package}")
        for service in file.service:
            problems += _lint_service(file.package, service, used_messages)
        for name, message in _messages(file.package, file.message_type):
            if not message.options.map_entry:
                problems += _lint_message(name, message)
        for name, enum in _enums(file):
            problems += _lint_enum(name, enum)
    return problems


def _lint_file(file: pb.FileDescriptorProto, ours: set[str]) -> Iterator[str]:
    folder = str(Path(file.name).parent)
    if folder != file.package.replace(".", "/"):
        yield f"{file.name}: package {file.package!r} does not match its folder"
    if not re.search(r"\.v[1-9][0-9]*(alpha|beta)?[0-9]*$", file.package):
        yield f"{file.name}: package {file.package!r} has no version suffix"
    if file.syntax != "proto3":
        yield f"{file.name}: syntax is not proto3"
    if not _SNAKE.fullmatch(Path(file.name).stem):
        yield f"{file.name}: file name is not lower_snake_case"
    if file.public_dependency or file.weak_dependency:
        yield f"{file.name}: public and weak imports are not allowed"
    for dependency in file.dependency:
        if dependency in ours:
            yield f"{file.name}: imports {dependency}; files of one package stay self-contained"
    mentioned = file.__class__()
    mentioned.CopyFrom(file)
    del mentioned.dependency[:]
    text = str(mentioned)
    for dependency in file.dependency:
        package = str(Path(dependency).parent).replace("/", ".")
        stem = Path(dependency).stem.replace("_", "")
        if not re.search(rf'type_name: "\.{package}\.\w*{stem}\w*"', text, re.IGNORECASE):
            yield f"{file.name}: import {dependency} is not used"


def _lint_service(package: str, service: pb.ServiceDescriptorProto, used: dict[str, str]) -> Iterator[str]:
    name = f"{package}.{service.name}"
    if not service.name.endswith("Service") or not _PASCAL.fullmatch(service.name):
        yield f"{name}: a service is PascalCase and ends in Service"
    for method in service.method:
        path = f"{name}.{method.name}"
        if not _PASCAL.fullmatch(method.name):
            yield f"{path}: a method is PascalCase"
        for type_name, suffix in ((method.input_type, "Request"), (method.output_type, "Response")):
            expected = {
                f".{package}.{method.name}{suffix}",
                f".{package}.{service.name}{method.name}{suffix}",
            }
            if type_name not in expected:
                yield f"{path}: uses {type_name}, expected {method.name}{suffix}"
            if used.setdefault(type_name, path) != path:
                yield f"{path}: {type_name} is used by {used[type_name]} too"
        if method.input_type == method.output_type:
            yield f"{path}: request and response are one message"


def _lint_message(name: str, message: pb.DescriptorProto) -> Iterator[str]:
    if not _PASCAL.fullmatch(message.name):
        yield f"{name}: a message is PascalCase"
    for field in message.field:
        if not _SNAKE.fullmatch(field.name):
            yield f"{name}.{field.name}: a field is lower_snake_case"
    for oneof in message.oneof_decl:
        # A proto3 optional field lives in a oneof of its own, named with a leading underscore.
        if not _SNAKE.fullmatch(oneof.name.removeprefix("_")):
            yield f"{name}.{oneof.name}: a oneof is lower_snake_case"


def _lint_enum(name: str, enum: pb.EnumDescriptorProto) -> Iterator[str]:
    if not _PASCAL.fullmatch(enum.name):
        yield f"{name}: an enum is PascalCase"
    if enum.options.allow_alias:
        yield f"{name}: aliases are not allowed"
    prefix = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", enum.name).upper() + "_"
    zero = enum.value[0]
    if zero.number != 0 or zero.name != f"{prefix}UNSPECIFIED":
        yield f"{name}: the first value is {prefix}UNSPECIFIED = 0"
    for value in enum.value:
        if not value.name.startswith(prefix) or not _UPPER_SNAKE.fullmatch(value.name):
            yield f"{name}.{value.name}: a value is UPPER_SNAKE_CASE with prefix {prefix}"


def contract_of(files: pb.FileDescriptorSet) -> Contract:
    """Everything that the wire and JSON forms depend on, by full name."""
    contract: Contract = {}
    for file in files.file:
        for service in file.service:
            for method in service.method:
                contract[f"rpc {file.package}.{service.name}.{method.name}"] = {
                    "request": method.input_type,
                    "response": method.output_type,
                    "client_streaming": method.client_streaming,
                    "server_streaming": method.server_streaming,
                }
        for name, message in _messages(file.package, file.message_type):
            contract[f"message {name}"] = {"map_entry": message.options.map_entry}
            for field in message.field:
                contract[f"field {name}.{field.name}"] = _field(message, field)
        for name, enum in _enums(file):
            for value in enum.value:
                contract[f"enum value {name}.{value.name}"] = {"number": value.number}
    return contract


def _field(message: pb.DescriptorProto, field: pb.FieldDescriptorProto) -> dict[str, Any]:
    oneof = None
    if field.HasField("oneof_index") and not field.proto3_optional:
        oneof = message.oneof_decl[field.oneof_index].name
    return {
        "number": field.number,
        "type": pb.FieldDescriptorProto.Type.Name(field.type),
        "type_name": field.type_name,
        "label": pb.FieldDescriptorProto.Label.Name(field.label),
        "optional": field.proto3_optional,
        "oneof": oneof,
        "json_name": field.json_name,
        "packed": field.options.packed if field.options.HasField("packed") else None,
    }


def breaking(accepted: Contract, current: Contract) -> list[str]:
    """What of `accepted` is gone or changed in `current`."""
    problems = []
    for name, properties in accepted.items():
        if name not in current:
            problems.append(f"{name}: is gone")
        elif current[name] != properties:
            changed = sorted(key for key in properties if current[name].get(key) != properties[key])
            problems.append(f"{name}: changed {', '.join(changed)}")
    return problems


def render(contract: Contract) -> str:
    """JSON with one line per name, so that a change reads well in a diff."""
    lines = [
        f" {json.dumps(name)}: {json.dumps(contract[name], sort_keys=True)}" for name in sorted(contract)
    ]
    return "{\n" + ",\n".join(lines) + "\n}\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--accept", action="store_true", help="take additions into proto/contract.json")
    arguments = parser.parse_args()
    try:
        files = compile_files()
    except ProtoError as error:
        print(f"check_proto: {error}", file=sys.stderr)
        return 2
    current = contract_of(files)
    accepted: Contract = json.loads(CONTRACT.read_text(encoding="utf-8")) if CONTRACT.exists() else {}
    problems = lint(files) + breaking(accepted, current)
    if not problems and arguments.accept:
        CONTRACT.write_text(render(current), encoding="utf-8")
    elif not problems:
        problems += [
            f"{name}: is new; run tools/check_proto.py --accept" for name in current.keys() - accepted
        ]
    for problem in sorted(problems):
        print(f"check_proto: {problem}", file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
