"""The shipped proxy configurations, run by the real proxies on loopback with other ports."""

from __future__ import annotations

import asyncio
import re
import socket
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from tests.support.programs import ROOT, program

NGINX_CONFIG = ROOT / "deploy" / "nginx" / "nginx.conf"
ENVOY_CONFIG = ROOT / "deploy" / "envoy" / "envoy.yaml"
_START_S = 20.0


@dataclass(frozen=True)
class Upstream:
    """Where one server listens."""

    port: int
    probe_port: int


def free_port() -> int:
    """A port that nobody listens on now."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


def _substitute(text: str, pattern: str, replacement: str, count: int = 1) -> str:
    text, found = re.subn(pattern, replacement, text)
    assert found == count, f"{pattern!r} occurs {found} times in the configuration, not {count}"
    return text


def nginx_config(folder: Path, port: int, upstreams: Sequence[Upstream]) -> Path:
    """The shipped nginx.conf with the port, the servers and the paths of a test; all else as it is."""
    text = NGINX_CONFIG.read_text()
    text = _substitute(text, r"listen 50061 http2;", f"listen 127.0.0.1:{port} http2;")
    servers = " ".join(f"server 127.0.0.1:{one.port} max_fails=0;" for one in upstreams)
    text = _substitute(text, r"server photon-grpc:50051 max_fails=0;", servers)
    text = _substitute(text, r" /tmp/", f" {folder}/", count=6)
    text = _substitute(text, r"access_log /dev/stdout calls", f"access_log {folder}/calls.log calls")
    text = _substitute(text, r"error_log /dev/stderr warn", f"error_log {folder}/error.log warn")
    path = folder / "nginx.conf"
    path.write_text(text)
    return path


def envoy_config(folder: Path, port: int, upstreams: Sequence[Upstream]) -> Path:
    """The shipped envoy.yaml with the ports and the servers of a test; all else as it is."""
    config: dict[str, Any] = yaml.safe_load(ENVOY_CONFIG.read_text())
    del config["admin"]
    (listener,) = config["static_resources"]["listeners"]
    listener["address"]["socket_address"] = {"address": "127.0.0.1", "port_value": port}
    manager = listener["filter_chains"][0]["filters"][0]["typed_config"]
    (access_log,) = manager["access_log"]
    access_log["name"] = "envoy.access_loggers.file"
    access_log["typed_config"] |= {
        "@type": "type.googleapis.com/envoy.extensions.access_loggers.file.v3.FileAccessLog",
        "path": str(folder / "calls.log"),
    }
    (cluster,) = config["static_resources"]["clusters"]
    (endpoint,) = cluster["load_assignment"]["endpoints"][0]["lb_endpoints"]
    assert endpoint["endpoint"]["address"]["socket_address"] == {
        "address": "photon-grpc",
        "port_value": 50051,
    }
    cluster["load_assignment"]["endpoints"][0]["lb_endpoints"] = [
        {
            "endpoint": {
                "address": {"socket_address": {"address": "127.0.0.1", "port_value": one.port}},
                "health_check_config": {"port_value": one.probe_port},
            }
        }
        for one in upstreams
    ]
    path = folder / "envoy.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def nginx_command(config: Path) -> list[str]:
    """nginx in the foreground."""
    folder = config.parent
    return [program("nginx"), "-p", str(folder), "-e", str(folder / "error.log"), "-c", str(config)]


def envoy_command(config: Path) -> list[str]:
    """Envoy, from the wheel of the dev extra, without shared memory or a second thread."""
    envoy = Path(sys.executable).parent / "envoy"
    quiet = ["--log-level", "warning", "--disable-hot-restart", "--concurrency", "1"]
    return [str(envoy) if envoy.exists() else program("envoy"), "-c", str(config), *quiet]


@asynccontextmanager
async def running_proxy(name: str, folder: Path, upstreams: Sequence[Upstream]) -> AsyncIterator[int]:
    """The named proxy (nginx, envoy) in front of the servers; the port on which it listens."""
    port = free_port()
    if name == "nginx":
        command = [*nginx_command(nginx_config(folder, port, upstreams)), "-g", "daemon off;"]
    else:
        command = envoy_command(envoy_config(folder, port, upstreams))
    with (folder / "output").open("wb") as output:
        process = await asyncio.create_subprocess_exec(*command, stdout=output, stderr=output)
    try:
        await _wait_until_listening(process, port, folder)
        yield port
    finally:
        if process.returncode is None:
            process.terminate()
        await process.wait()


async def _wait_until_listening(process: asyncio.subprocess.Process, port: int, folder: Path) -> None:
    async with asyncio.timeout(_START_S):
        while process.returncode is None:
            try:
                _, writer = await asyncio.open_connection("127.0.0.1", port)
            except OSError:
                await asyncio.sleep(0.05)
                continue
            writer.close()
            await writer.wait_closed()
            return
    raise AssertionError(f"the proxy did not start: {(folder / 'output').read_text()[-4000:]}")
