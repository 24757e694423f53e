"""The image's recipe, read instruction by instruction: who runs, what is in it, where it writes."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import tomllib
from dataclasses import dataclass

import pytest

from photon_grpc.options import ServerOptions
from tests.support.deploy_settings import options_of
from tests.support.programs import ROOT

DOCKERFILE = ROOT / "deploy" / "Dockerfile"
CACHE = "/var/cache/photon"
UID = GID = 10001


@dataclass(frozen=True)
class Instruction:
    name: str
    text: str


def instructions() -> list[Instruction]:
    """In order; continuation lines joined, comments gone."""
    lines = [line for line in DOCKERFILE.read_text().splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n", "\n", "\n".join(lines))
    found: list[Instruction] = []
    for line in joined.splitlines():
        if match := re.match(r"([A-Z]+) (.+)", line):
            found.append(Instruction(match[1], match[2]))
        elif line.strip():
            last = found.pop()
            found.append(Instruction(last.name, f"{last.text}\n{line}"))
    return found


def stage(name: str) -> list[Instruction]:
    found: list[Instruction] = []
    current = ""
    for instruction in instructions():
        if instruction.name == "FROM":
            current = instruction.text.rpartition(" AS ")[2]
        elif current == name:
            found.append(instruction)
    assert found, f"no stage {name}"
    return found


def texts(stage_name: str, name: str) -> list[str]:
    return [instruction.text for instruction in stage(stage_name) if instruction.name == name]


def environment() -> dict[str, str]:
    return dict(word.split("=", 1) for text in texts("runtime", "ENV") for word in shlex.split(text))


def test_two_stages_and_the_last_one_runs() -> None:
    froms = [instruction.text for instruction in instructions() if instruction.name == "FROM"]
    assert [text.rpartition(" AS ")[2] for text in froms] == ["build", "runtime"]
    assert all(text.startswith("python:${PYTHON}-slim") for text in froms)


def test_it_runs_as_nobody_in_particular() -> None:
    assert texts("runtime", "USER") == [f"{UID}:{GID}"]
    (setup,) = texts("runtime", "RUN")
    assert f"useradd --uid {UID} --gid {GID}" in setup
    # Nothing runs after the switch that would need the rights again.
    names = [instruction.name for instruction in stage("runtime")]
    assert "RUN" not in names[names.index("USER") :]


def test_signals_reach_the_server() -> None:
    """tini forwards SIGTERM and reaps; a shell as first process would do neither."""
    (entrypoint,) = texts("runtime", "ENTRYPOINT")
    assert json.loads(entrypoint) == ["/usr/bin/tini", "--", "photon-grpc"]
    assert texts("runtime", "STOPSIGNAL") == ["SIGTERM"]
    (command,) = texts("runtime", "CMD")
    assert json.loads(command) == ["serve"]


def test_the_last_stage_takes_the_environment_and_nothing_else() -> None:
    assert texts("runtime", "COPY") == ["--from=build /usr/local/photon /usr/local/photon"]
    assert texts("runtime", "ADD") == []


def test_the_context_has_what_is_copied_and_no_more() -> None:
    lines = (DOCKERFILE.parent / "Dockerfile.dockerignore").read_text().splitlines()
    rules = [line for line in lines if line and not line.startswith("#")]
    assert rules[0] == "*", "everything is left out that is not named"
    named = {rule.removeprefix("!") for rule in rules[1:] if rule.startswith("!")}
    copied = {source for text in texts("build", "COPY") for source in text.split()[:-1]}
    assert named == copied
    assert all((ROOT / name).exists() for name in named)


def test_everything_that_is_written_lies_on_the_volume() -> None:
    (volume,) = texts("runtime", "VOLUME")
    assert json.loads(volume) == [CACHE]
    for name in ("XDG_CACHE_HOME", "CUPY_CACHE_DIR", "HF_HOME"):
        assert (environment()[name] + "/").startswith(CACHE + "/")
    assert environment()["HF_HUB_OFFLINE"] == "1"


def test_the_server_reads_its_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {name: value for name, value in environment().items() if name.startswith("PHOTON_")}
    read = options_of(settings, monkeypatch)
    assert read.server.host == ServerOptions().host, "off loopback is the decision of whoever deploys"
    (exposed,) = texts("runtime", "EXPOSE")
    assert exposed.split()[:2] == [str(read.server.port), str(read.server.probe_port)]
    (check,) = texts("runtime", "HEALTHCHECK")
    assert f"127.0.0.1:{read.server.port}" in check


def test_backends_are_the_extras_of_the_package() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    (torch, package) = texts("build", "RUN")[1:]
    (choice,) = re.findall(r"^ *([a-z0-9|]+)\) grep", torch, flags=re.MULTILINE)
    assert set(choice.split("|")) == set(extras) - {"dev", "otlp"}
    assert 'extra="[otlp,$BACKEND]"' in package


@pytest.mark.parametrize("stage_name", ["build", "runtime"])
def test_scripts_are_sound(stage_name: str) -> None:
    for text in texts(stage_name, "RUN"):
        script = re.sub(r"--mount=\S+", "", text)
        result = subprocess.run(["sh", "-n", "-c", script], capture_output=True, text=True, check=False)
        assert result.returncode == 0, result.stderr
