"""How a Ray cluster is addressed, who may use it, and what is made of its machines. None is started here."""

from __future__ import annotations

import socket
import subprocess
import sys
from importlib.util import find_spec

import pytest

from dylo_moe.cli import main
from dylo_moe.cluster import Slots, check_address, find_slots
from dylo_moe.errors import ClusterError, OptionError
from harness.specimens.tasks import TASKS, write_task_set

NOWHERE = "192.0.2.1"  # of the block that is for documentation


@pytest.fixture
def no_token(monkeypatch, tmp_path):
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    return monkeypatch


@pytest.mark.parametrize(
    ("machines", "slots"),
    [
        ([{"CPU": 8.0}], Slots(1, 8, 0)),
        ([{"CPU": 8.0}, {"CPU": 8.0}, {"memory": 1.0}], Slots(2, 8, 0)),
        ([{"CPU": 4.0}, {"CPU": 9.0}], Slots(3, 4, 0)),
        ([{"CPU": 64.0}, {"CPU": 8.0, "GPU": 2.0}, {"GPU": 1.0}], Slots(3, 0, 1)),
    ],
)
def test_a_worker_per_gpu_or_else_per_machine(machines, slots):
    assert find_slots(machines, "a:1") == slots
    assert slots.device == ("cuda" if slots.gpus else "cpu")


@pytest.mark.parametrize("machines", [[], [{"memory": 1.0}], [{"CPU": 0.5, "GPU": 0.0}]])
def test_cluster_with_nothing_to_work_with_is_refused(machines):
    with pytest.raises(ClusterError, match="no processor and no GPU"):
        find_slots(machines, "a:1")


@pytest.mark.parametrize("address", ["", "somewhere", "a:b", "a:99999999", "http://a:1", "ray://", "a:1/x", ":1"])
def test_what_is_no_address_is_refused(no_token, address):
    with pytest.raises(OptionError, match="HOST:PORT, ray://HOST:PORT, auto or local"):
        check_address(address)


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {"RAY_AUTH_MODE": "token"},
        {"RAY_AUTH_TOKEN": "abc"},
        {"RAY_AUTH_MODE": "disabled", "RAY_AUTH_TOKEN": "abc"},
        {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": "/nowhere"},
    ],
)
@pytest.mark.parametrize("address", [f"{NOWHERE}:6379", f"ray://{NOWHERE}:10001"])
def test_address_beyond_this_machine_needs_a_token(no_token, environment, address):
    for name, value in environment.items():
        no_token.setenv(name, value)
    with pytest.raises(OptionError, match=f"^{address}: .* set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN"):
        check_address(address)


@pytest.mark.parametrize("way", ["variable", "file", "default file"])
def test_with_a_token_the_address_is_tried(no_token, tmp_path, way, monkeypatch):
    no_token.setenv("RAY_AUTH_MODE", "token")
    (tmp_path / ".ray").mkdir()
    if way == "variable":
        no_token.setenv("RAY_AUTH_TOKEN", "abc")
    elif way == "file":
        (tmp_path / "token").write_text("abc")
        no_token.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "token"))
    else:
        (tmp_path / ".ray" / "auth_token").write_text("abc")
    monkeypatch.setattr("dylo_moe.cluster.CONNECT_SECONDS", 0.2)
    with pytest.raises(ClusterError, match="nothing answers there"):
        check_address(f"{NOWHERE}:6379")


def test_loopback_needs_no_token_but_something_that_listens(no_token):
    with socket.create_server(("127.0.0.2", 0)) as server:
        address = f"127.0.0.2:{server.getsockname()[1]}"
        check_address(address)
        check_address(f"ray://{address}")
    with pytest.raises(ClusterError, match="nothing answers there: Connection refused"):
        check_address(address)


def test_what_listens_on_127_0_0_1_only_is_not_what_ray_would_ask(no_token):
    ray = pytest.importorskip("ray.util", reason="Ray is not installed: pip install 'dylo-moe[ray]'")
    if ray.get_node_ip_address().startswith("127."):
        pytest.skip("this machine has no address but its loopback")
    with socket.create_server(("127.0.0.1", 0)) as server, pytest.raises(ClusterError, match="--node-ip-address=127.0.0.2"):
        check_address(f"127.0.0.1:{server.getsockname()[1]}")


def test_mistake_on_the_command_line_is_one_line(no_token, capsys, tmp_path):
    no_token.setenv("HUMANEVAL_OVERRIDE_PATH", str(write_task_set(tmp_path, "humaneval", TASKS[:1])))
    words = ["codegen", "--model", str(tmp_path), "--dataset", "humaneval", "--greedy", "--ray", f"{NOWHERE}:6379"]
    assert main(words) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and ("RAY_AUTH_MODE" in error or find_spec("ray") is None)
    assert main([*words, "--shard", "1/2"]) == 2
    assert "only one of them" in capsys.readouterr().err


WITHOUT_RAY = """
import sys
sys.modules["ray"] = None
from dylo_moe.cluster import connected
from dylo_moe.errors import OptionError
try:
    with connected("auto"): pass
except OptionError as error:
    print(error)
"""


def test_without_ray_the_extra_is_named():
    done = subprocess.run([sys.executable, "-c", WITHOUT_RAY], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout == "a Ray cluster needs Ray: pip install 'dylo-moe[ray]'\n"
