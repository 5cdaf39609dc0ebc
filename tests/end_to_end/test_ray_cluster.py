"""A Ray cluster of two machines, played by this one on its loopback: the samples are those of one process, whoever dies."""

from __future__ import annotations

import os
import secrets
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest

from dylo_moe import crew as crews
from dylo_moe import spreading
from dylo_moe.cluster import LOOPBACK, Slots, connected, refuses_unknown_token
from dylo_moe.crew import Crew, hired
from dylo_moe.errors import ClusterError
from dylo_moe.evalplus import plan_generation
from dylo_moe.spreading import generate_samples
from harness.specimens import write_base, write_checkpoint
from harness.specimens.tasks import TASKS, write_task_set

pytestmark = pytest.mark.skipif(find_spec("ray") is None, reason="Ray is not installed: pip install 'dylo-moe[ray]'")
STRATEGIES = ("router", "single:1", "round_robin")


@pytest.fixture(scope="module")
def environment():
    """Ray reads it when it is imported, which another test of this process may have done: it is told to read again."""
    from ray._private.authentication_test_utils import reset_auth_token_state

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_MODE", "token")
        patch.setenv("RAY_AUTH_TOKEN", "0123456789abcdef" * 2)
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("RAY_worker_niceness", "0")  # at Ray's 15 a test beside this one would leave its workers next to nothing
        patch.delenv("RAY_ADDRESS", raising=False)
        reset_auth_token_state()
        yield patch
    reset_auth_token_state()


@pytest.fixture(scope="module")
def clients():
    """The port of the server for clients."""
    with socket.create_server((LOOPBACK, 0)) as server:
        return server.getsockname()[1]


@pytest.fixture(scope="module")
def machines(environment, clients):
    """Two machines of one processor each, and the second one's handle."""
    from ray.cluster_utils import Cluster

    sizes = {"num_cpus": 1, "node_ip_address": LOOPBACK, "object_store_memory": 80 << 20}
    cluster = Cluster(True, head_node_args={**sizes, "include_dashboard": False, "ray_client_server_port": clients})
    yield cluster, cluster.add_node(**sizes)
    cluster.shutdown()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, environment):
    place = tmp_path_factory.mktemp("ray")
    base = write_base(place / "base", "llama")
    for dataset in ("humaneval", "mbpp"):
        environment.setenv(f"{dataset.upper()}_OVERRIDE_PATH", str(write_task_set(place / "tasks", dataset, TASKS[:6])))
    return write_checkpoint(place / "checkpoint", base, num_experts=2)


def planned(checkpoint, **options):
    options = {"model": str(checkpoint), "dataset": "humaneval", "temperature": 0.8, "dtype": "float32", **options}
    return plan_generation({"n_samples": 2, "max_new_tokens": 32, **options}, STRATEGIES)


def exports(place: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in place.iterdir() if ".json" in path.suffixes or ".jsonl" in path.suffixes}


def placed(crew):
    return [member for member in crew.members if member.host]


def test_machine_lost_in_the_middle_changes_nothing(machines, checkpoint, tmp_path):
    cluster, second = machines
    generate_samples(planned(checkpoint), tmp_path / "one")
    place = tmp_path / "cluster"
    generate_samples(planned(checkpoint, n_samples=1, id_range=[1, 3]), place)  # something is there already
    lost = []

    def lose() -> None:
        deadline = time.monotonic() + 240
        while time.monotonic() < deadline and not lost:
            lines = sum(path.read_bytes().count(b"\n") for path in place.glob("*.journal"))
            if lines > len(STRATEGIES) * 3:  # a worker has sent samples: the middle
                cluster.remove_node(second, allow_graceful=False)
                lost.append(lines)
            time.sleep(0.01)

    killer = threading.Thread(target=lose)
    killer.start()
    with hired(cluster.address) as crew:
        try:
            one_by_one = planned(checkpoint, bs=1, ray=crew.address)  # so that there is a middle
            files = generate_samples(one_by_one, place, crew=crew)
        finally:
            lost.append(None)
            killer.join()
        left = placed(crew)
        generate_samples(planned(checkpoint, dataset="mbpp", ray=crew.address), place, crew=crew)
        assert placed(crew) == left and len(left) == 1, "the one that was left has its model still"
    assert lost[0] is not None and lost[0] < len(STRATEGIES) * 13
    assert list(files) == list(STRATEGIES)
    generate_samples(planned(checkpoint, dataset="mbpp"), tmp_path / "one")
    assert exports(place) == exports(tmp_path / "one")
    assert len(exports(place)) == 2 * 3 * len(STRATEGIES)


def test_token_that_nobody_gave_the_cluster_is_refused_by_it(machines, clients, monkeypatch):
    addresses = (machines[0].address, f"ray://{LOOPBACK}:{clients}")
    with ThreadPoolExecutor() as pool:
        assert list(pool.map(refuses_unknown_token, addresses)) == [True, True]
        monkeypatch.setattr(secrets, "token_hex", lambda _: os.environ["RAY_AUTH_TOKEN"])
        assert list(pool.map(refuses_unknown_token, addresses)) == [False, False], "this one it takes"


def test_client_whose_server_ended_as_it_began_asks_once_more(machines, clients, monkeypatch):
    import ray

    real, refusals = ray.init, [ConnectionAbortedError("Initialization failure from server")]

    def unlucky(**options):
        if refusals:
            raise refusals.pop()
        return real(**options)

    monkeypatch.setattr(ray, "init", unlucky)
    with connected(f"ray://{LOOPBACK}:{clients}") as slots:
        assert slots.count


def test_client_does_not_wait_for_a_worker_that_finds_no_place(machines, checkpoint, clients, tmp_path, monkeypatch):
    monkeypatch.setattr(spreading, "START_SECONDS", 1.0)
    monkeypatch.setattr(crews, "ASK_SECONDS", 1.0)
    address = f"ray://{LOOPBACK}:{clients}"
    with connected(address) as slots, pytest.raises(ClusterError, match="no worker with 64 processors found a place"):
        assert slots in (Slots(1, 1, 0), Slots(2, 1, 0)), "one of two machines may be lost, and Ray may not know it yet"
        generate_samples(planned(checkpoint, ray=address), tmp_path, crew=Crew(replace(slots, cpus=64), address))
