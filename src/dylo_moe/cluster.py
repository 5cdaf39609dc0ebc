"""A Ray cluster: how it is reached, who may reach it, and what it has to work with."""

from __future__ import annotations

import ipaddress
import logging
import os
import secrets
import socket
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any
from urllib.parse import urlsplit

from dylo_moe.errors import ClusterError, OptionError

CONNECT_SECONDS = 10.0
PROBE_SECONDS = 60.0
CLIENT_ATTEMPTS, CLIENT_PAUSE = 4, 1.0  # seconds
# Ray takes 127.0.0.1 for this machine's outer address, but leaves the rest of 127.0.0.0/8 alone; see docs/findings.md.
LOOPBACK = "127.0.0.2"
# The first question of a Ray client, alone: all of them take half a minute where the token is refused.
_PING = """
import sys
from ray._private.grpc_utils import init_grpc_channel
from ray.core.generated.ray_client_pb2 import ClusterInfoRequest, ClusterInfoType
from ray.core.generated.ray_client_pb2_grpc import RayletDriverStub
RayletDriverStub(init_grpc_channel(sys.argv[1])).ClusterInfo(ClusterInfoRequest(type=ClusterInfoType.PING), timeout=30)
"""
_FORMS = "HOST:PORT, ray://HOST:PORT, auto or local"
_TOKEN = "set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH, here and on every machine of the cluster"


@dataclass(frozen=True)
class Slots:
    """Where workers run. count: how many at once; cpus, gpus: what each of them gets; device: "cuda" or "cpu"."""

    count: int
    cpus: int
    gpus: int

    @property
    def device(self) -> str:
        return "cuda" if self.gpus else "cpu"


@contextmanager
def connected(address: str) -> Iterator[Slots]:
    """A connection to a cluster, closed at the end.

    Args:
        address: "host:port" from a machine of the cluster, "ray://host:port" from any other, "auto" for the cluster that
            RAY_ADDRESS names or that this machine belongs to, "local" for one of this machine alone, started now.

    Raises:
        OptionError: Ray is not installed; no such form of address; beyond this machine, no token here or none demanded there.
        ClusterError: no cluster answers there, or it has neither processors nor GPUs.
    """
    try:
        import ray
    except ImportError:
        raise OptionError("a Ray cluster needs Ray: pip install 'dylo-moe[ray]'") from None
    address = os.environ.get("RAY_ADDRESS", "auto") if address == "auto" else address
    check_address(address)
    if ray.is_initialized():
        raise OptionError(f"{address}: this process is connected to a Ray cluster already")
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if address == "local":
        options |= {"include_dashboard": False, "_node_ip_address": LOOPBACK}
    try:
        with warnings.catch_warnings(action="ignore"):  # of the Ray client, before it raises the same
            _initialise(ray, address, options)
    except (ConnectionError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
        raise ClusterError(f"{address}: no Ray cluster there, or one with another token than here: {error}") from None
    try:
        if address != "local":
            _require_demanded(address, ray.get_runtime_context().gcs_address)
        yield find_slots([node["Resources"] for node in ray.nodes() if node["Alive"]], address)
    finally:
        ray.shutdown()


def _initialise(ray: ModuleType, address: str, options: dict[str, Any]) -> None:
    """ray.init. For a client, Ray starts a server, and on a busy machine one that ends as it begins ("Initialization failure from
    server", with 2.60 at times: it forks while other threads are inside of gRPC): it is asked again."""
    for _ in range(CLIENT_ATTEMPTS - 1):
        try:
            ray.init(address=address, **options)
        except ConnectionAbortedError:
            time.sleep(CLIENT_PAUSE)
        else:
            return
    ray.init(address=address, **options)


def find_slots(machines: list[dict[str, float]], address: str) -> Slots:
    """One worker per GPU; where there is none, one per machine with all processors of the smallest.

    Args:
        machines: what each machine has, as Ray says it: {"CPU": 8.0, "GPU": 1.0}.

    Raises:
        ClusterError: nothing to work with.
    """
    gpus = sum(int(machine.get("GPU", 0)) for machine in machines)
    if gpus:
        return Slots(gpus, 0, 1)
    processors = [int(machine["CPU"]) for machine in machines if machine.get("CPU", 0) >= 1]
    if not processors:
        raise ClusterError(f"{address}: {len(machines)} machines, but no processor and no GPU that Ray may use")
    smallest = min(processors)
    return Slots(sum(count // smallest for count in processors), smallest, 0)


def check_address(address: str) -> None:
    """Whether something listens there, and whether it may be used.

    Raises:
        OptionError, ClusterError: as `connected`.
    """
    if address in ("auto", "local"):
        return
    parts = urlsplit(address if "://" in address else f"gcs://{address}")
    try:
        host, port = parts.hostname, parts.port
    except ValueError:
        host = port = None
    if not host or not port or parts.scheme not in ("ray", "gcs") or parts.path:
        raise OptionError(f"ray {address!r}, but should be {_FORMS}")
    _require_token(address, host)
    if parts.scheme == "gcs" and host in ("localhost", "127.0.0.1", "::1"):
        _check_outer(address, port)
    else:
        _check_answers(address, host, port)


def _require_token(address: str, host: str | None = None) -> None:
    if _is_loopback(address, host or address.rpartition(":")[0].strip("[]")):
        return
    paths = (os.environ.get("RAY_AUTH_TOKEN_PATH"), Path.home() / ".ray" / "auth_token")
    has_token = os.environ.get("RAY_AUTH_TOKEN") or any(path and Path(path).is_file() for path in paths)
    if os.environ.get("RAY_AUTH_MODE", "").lower() != "token" or not has_token:
        raise OptionError(f"{address}: whoever reaches a Ray cluster without a token runs code on it; {_TOKEN}")


def _require_demanded(address: str, gcs_address: str) -> None:
    """Ray takes a client that has a token also where none is demanded, and there it takes everybody."""
    if address == "auto":
        _require_token(gcs_address)
        address = gcs_address
    host = urlsplit(address if "://" in address else f"gcs://{address}").hostname
    asked = address if address.startswith("ray://") else gcs_address
    if not _is_loopback(address, host) and not refuses_unknown_token(asked):
        why = "this Ray cluster does not refuse a token that nobody gave it, so whoever reaches it runs code on it"
        raise OptionError(f"{address}: {why}; {_TOKEN}")


def refuses_unknown_token(address: str) -> bool:
    """Whether a cluster says no to a token that nobody has given it. False also where it says nothing.

    Args:
        address: "ray://host:port" of its server for clients, which may be all of it that can be reached; else "host:port".
    """
    environment = {name: value for name, value in os.environ.items() if name != "RAY_AUTH_TOKEN_PATH"}
    environment |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(16)}
    if address.startswith("ray://"):
        asking = ["-c", _PING, address.removeprefix("ray://")]
    else:
        asking = ["-m", "ray.scripts.scripts", "health-check", "--address", address]
    command = [sys.executable, *asking]
    try:
        done = subprocess.run(command, env=environment, capture_output=True, timeout=PROBE_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        return False
    return done.returncode != 0 and b"authentication token" in done.stderr.lower()


def _is_loopback(address: str, host: str) -> bool:
    try:
        found = socket.getaddrinfo(host, None)
    except OSError as error:
        raise ClusterError(f"{address}: {error.strerror}") from None
    return all(ipaddress.ip_address(entry[4][0]).is_loopback for entry in found)


def _check_outer(address: str, port: int) -> None:
    """Ray puts this machine's outer address for 127.0.0.1, and waits for minutes where nothing listens there."""
    import ray.util

    outer = ray.util.get_node_ip_address()
    try:
        _check_answers(address, outer, port)
    except ClusterError:
        advice = f"a cluster of this machine alone needs ray start --head --node-ip-address={LOOPBACK} and {LOOPBACK}:{port}"
        raise ClusterError(f"{address}: Ray asks {outer}:{port} for it, where nothing answers; {advice}, or local") from None


def _check_answers(address: str, host: str, port: int) -> None:
    try:
        socket.create_connection((host, port), timeout=CONNECT_SECONDS).close()
    except OSError as error:
        raise ClusterError(f"{address}: nothing answers there: {error.strerror or error}") from None
