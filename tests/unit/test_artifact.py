"""W&B artifacts by the real client, from a server on the loopback interface: right, or one line and nothing left."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch
from filelock import FileLock

from dylo_moe import PeftMoEDecoder, detect_model_format, download_artifact, load_checkpoint
from dylo_moe.artifact import checkpoint_in
from dylo_moe.artifact_worker import Refused, check_entries
from dylo_moe.errors import ArtifactError
from dylo_moe.evalplus import run_codegen
from fixtures.layouts import write_layout
from fixtures.wandb_server import KEY, WandbServer, directory_files, entry, manifest_digest
from harness.cli import main as judge
from harness.specimens import write_base, write_checkpoint
from harness.specimens.tasks import TASKS, write_task_set

ARTIFACT = "team/moe/run-output:v0"
SMALL = {"a.txt": b"hello" * 100, "b/c.txt": b"there" * 10}
BEFORE_FILES = [
    "Viewer",
    "GetDefaultEntity",
    "ServerFeaturesQuery",
    "ArtifactMembershipByName",
    "FetchArtifactManifest",
    "/manifest",
]


@pytest.fixture(autouse=True)
def surroundings(tmp_path, monkeypatch):
    """Empty home, working and temporary directories, and no settings of the user's; returns them."""
    for name in [name for name in os.environ if name.startswith("WANDB_") or name.lower().endswith("_proxy")]:
        monkeypatch.delenv(name)
    places = {name: tmp_path / name.lower() for name in ("HOME", "TMPDIR", "cwd")}
    for name, place in places.items():
        place.mkdir()
        monkeypatch.setenv(name, str(place))
    monkeypatch.chdir(places["cwd"])
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setenv("DYLO_MOE_CACHE", str(tmp_path / "cache"))
    return list(places.values())


@pytest.fixture
def serve(monkeypatch):
    """Starts a server with some files, whose address and key the environment then names."""
    servers = []

    def start(files):
        servers.append(WandbServer(files).__enter__())
        monkeypatch.setenv("WANDB_BASE_URL", servers[-1].url)
        monkeypatch.setenv("WANDB_API_KEY", KEY)
        return servers[-1]

    yield start
    for server in servers:
        server.__exit__()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    directory = tmp_path_factory.mktemp("specimen")
    return write_checkpoint(directory / "moe", write_base(directory / "base", "llama"), num_experts=2)


def kept(tmp_path):
    """The files in the cache, without the lock."""
    cache = tmp_path / "cache"
    return sorted(str(path.relative_to(cache)) for path in cache.rglob("*") if path.is_file() and path.name != ".lock")


def processes_below(directory):
    """Names of the processes that work below a directory."""
    return [p.info["name"] for p in psutil.process_iter(["name", "cwd"]) if str(directory) in str(p.info["cwd"])]


def wait_until(happened, seconds=60):
    deadline = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_downloaded_checkpoint_gives_the_same_logits(serve, checkpoint):
    server = serve(directory_files(checkpoint))
    place = download_artifact(ARTIFACT)
    assert directory_files(place) == directory_files(checkpoint)
    ids = torch.arange(12)[None]
    assert torch.equal(load_checkpoint(place)(ids).logits, load_checkpoint(checkpoint)(ids).logits)
    assert sorted(server.fetched()) == sorted(directory_files(checkpoint))


def test_download_asks_for_the_artifact_only_and_leaves_only_the_cache(serve, surroundings, tmp_path):
    server = serve(SMALL)
    download_artifact(ARTIFACT)
    assert server.asked[:-2] == [*BEFORE_FILES, "GetArtifactMembershipFileUrls"]
    assert [list(place.iterdir()) for place in surroundings] == [[], [], []]
    assert processes_below(tmp_path / "tmpdir") == []
    home = "artifacts/team/moe/run-output"
    assert kept(tmp_path) == [f"{home}/{server.digest}/{name}" for name in sorted(SMALL)]


def test_second_call_and_alias_verify_the_files_and_fetch_none(serve, tmp_path):
    server = serve(SMALL)
    first = download_artifact(ARTIFACT)
    server.asked.clear()
    assert download_artifact("team/moe/run-output:latest") == first
    assert server.asked == BEFORE_FILES
    (first / "a.txt").write_bytes(b"HELLO" * 100)
    with pytest.raises(ArtifactError, match=f"the copy in {re.escape(str(first))}: .*a.txt; delete it"):
        download_artifact(ARTIFACT)
    assert server.fetched() == []


def test_best_model_of_an_output_directory_is_the_checkpoint(serve, tmp_path):
    output = tmp_path / "output"
    write_layout(output, write_base(tmp_path / "base", "llama"), "D3b")
    serve(directory_files(output))
    place = download_artifact(ARTIFACT)
    assert place.name == "best_model" and directory_files(place.parent) == directory_files(output)
    assert detect_model_format(place) == "dylora-full-state"


def test_adapters_of_an_output_directory_are_no_bag_of_loras(tmp_path):
    base = write_base(tmp_path / "base", "llama")
    for step in ("best_model", "checkpoint-20"):
        write_layout(tmp_path / "output" / step, base, "peft-lora")
    assert detect_model_format(tmp_path / "output") == "lora-bag"
    assert checkpoint_in(tmp_path / "output") == tmp_path / "output" / "best_model"
    assert checkpoint_in(base) == base


def test_server_of_the_settings_file_key_of_the_netrc_file_and_root_are_used(serve, surroundings, monkeypatch, tmp_path):
    server = serve(SMALL)
    monkeypatch.delenv("WANDB_BASE_URL")
    monkeypatch.delenv("WANDB_API_KEY")
    settings = surroundings[0] / ".config" / "wandb" / "settings"
    settings.parent.mkdir(parents=True)
    settings.write_text(f"[default]\nbase_url = {server.url}\n")
    (surroundings[0] / ".netrc").write_text(f"machine {server.url[7:]}\n  login user\n  password {KEY}\n")
    place = download_artifact(ARTIFACT, tmp_path / "mine")
    assert place.is_relative_to(tmp_path / "mine") and directory_files(place) == SMALL


def set_to(**attributes):
    def plant(server):
        for name, value in attributes.items():
            setattr(server, name, value)

    return plant


def serves(name, data):
    return lambda server: server.served.update({name: data})


def lists(name, **fields):
    """Adds an entry to the manifest, whose digest stays right."""

    def plant(server):
        server.entries[name] = {**server.entries["a.txt"], **fields}
        server.served[name] = server.served["a.txt"]
        server.digest = manifest_digest(server.entries)

    return plant


def drops(name):
    return lambda server: server.served.pop(name)


FAULTS_BEFORE_FILES = {
    "server error for ever": (set_to(status=500), "does not answer, or only with errors; check WANDB_BASE_URL"),
    "too many requests": (set_to(status=429), "does not answer, or only with errors"),
    "swapped manifest": (
        lambda server: server.entries.update({"a.txt": entry(b"evil")}),
        "has the digest .*, not the artifact's",
    ),
    "no manifest": (set_to(entries=[1, 2]), "manifest cannot be read"),
    "reference": (lists("x", ref="file:///etc/passwd"), "'x' is a reference to 'file:///etc/passwd'"),
    "name above the artifact": (lists("../x"), r"file name '\.\./x', which is no place of its own"),
    "larger than the disk": (lists("x", size=10**17), "bytes, but the disk .* has room for"),
}
FAULTS_OF_FILES = {
    "missing file": (drops("a.txt"), "cannot be downloaded: 404"),
    "stall": (set_to(stalls=True), "no complete download within 8 s"),
    "connection cut": (set_to(cuts=True), "cannot be downloaded: .*IncompleteRead"),
    "truncated file": (serves("a.txt", b"hello"), "Digest mismatch for file: a.txt"),
    "other bytes": (serves("a.txt", b"HELLO" * 100), "Digest mismatch for file: a.txt"),
}


def refusal(name=ARTIFACT, **options):
    """The message of the refusal: one line, which names the artifact and does not hold the key."""
    with pytest.raises(ArtifactError) as caught:
        download_artifact(name, **options)
    message = str(caught.value)
    assert message.startswith(f"W&B artifact {name}: ") and "\n" not in message and KEY not in message
    return message


@pytest.mark.parametrize("fault", FAULTS_BEFORE_FILES)
def test_fault_is_named_before_any_file_is_fetched(serve, tmp_path, fault):
    plant, words = FAULTS_BEFORE_FILES[fault]
    server = serve(SMALL)
    plant(server)
    assert re.search(words, refusal(timeout=8 if server.status != 200 else 60))
    assert server.fetched() == [] and kept(tmp_path) == []


@pytest.mark.parametrize("name", ["/tmp/x", "../x", "a/../../x", "a//x", "./x", "x/", ".", "", "a\\x", "a.txt/x"])
def test_name_that_is_no_place_of_its_own_is_refused(name):
    good = {"a.txt": SimpleNamespace(ref=None), "b/c.txt": SimpleNamespace(ref=None)}
    check_entries(good)
    with pytest.raises(Refused, match="no place of its own"):
        check_entries({**good, name: SimpleNamespace(ref=None)})


@pytest.mark.parametrize("reference", ["file:///etc/passwd", "http://127.0.0.1/x", "s3://bucket/x", "wandb-artifact://0a/x"])
def test_reference_of_any_kind_is_refused(reference):
    with pytest.raises(Refused, match="is a reference to"):
        check_entries({"a.txt": SimpleNamespace(ref=None), "x": SimpleNamespace(ref=reference)})


def test_artifact_without_files_is_refused():
    with pytest.raises(Refused, match="holds no files"):
        check_entries({})


@pytest.mark.parametrize("fault", FAULTS_OF_FILES)
def test_fault_of_a_file_is_named_and_nothing_is_left(serve, surroundings, tmp_path, fault):
    plant, words = FAULTS_OF_FILES[fault]
    server = serve(SMALL)
    plant(server)
    assert re.search(words, refusal(timeout=8 if "8 s" in words else 60))
    assert "a.txt" in server.fetched() and kept(tmp_path) == []
    assert [list(place.iterdir()) for place in surroundings] == [[], [], []]


def test_disk_that_takes_no_more_is_named_and_nothing_is_left(serve, tmp_path, file_size_limit):
    serve({"a.bin": bytes(2**20)})
    with file_size_limit(2**17):
        assert re.search("the disk: File too large; set DYLO_MOE_CACHE", refusal())
    assert kept(tmp_path) == []


@pytest.mark.parametrize(
    ("name", "environment", "words"),
    [
        ("team/moe/run-output:v7", {}, "'run-output:v7' not found.*; check its name"),
        (ARTIFACT, {"WANDB_API_KEY": "y" * 40}, "not logged in; check WANDB_API_KEY"),
        (ARTIFACT, {"WANDB_API_KEY": ""}, "no W&B API key; set WANDB_API_KEY"),
        (ARTIFACT, {"WANDB_BASE_URL": "http://127.0.0.1:9"}, "127.0.0.1:9 does not answer"),
        (ARTIFACT, {"WANDB_BASE_URL": "nonsense"}, "valid URL.*; check WANDB_BASE_URL"),
    ],
)
def test_wrong_name_or_setting_is_named(serve, monkeypatch, tmp_path, name, environment, words):
    serve(SMALL)
    for variable, value in environment.items():
        monkeypatch.setenv(variable, value)
    message = refusal(name, timeout=8 if "does not answer" in words else 60)
    assert re.search(words, message) and "y" * 40 not in message
    assert kept(tmp_path) == []


@pytest.mark.parametrize(
    "name", ["", "c:v0", "b/c:v0", "a/b/c", "a/b/c/d:v0", "a/../c:v0", "a/b/.:v0", "a/b/c:", "a/b/c:v:0", "a//c:v0"]
)
def test_wrong_syntax_is_told_without_asking_anybody(name, tmp_path):
    assert "write entity/project/name:version" in refusal(name)
    assert not (tmp_path / "cache").exists()


def test_client_that_is_not_installed_is_named(serve, tmp_path, monkeypatch):
    server = serve(SMALL)
    blocker = tmp_path / "blocker"
    blocker.mkdir()
    (blocker / "sitecustomize.py").write_text("import sys\nsys.modules['wandb'] = None\n")
    monkeypatch.setenv("PYTHONPATH", str(blocker))
    assert refusal().endswith("the package wandb is not installed; pip install 'dylo-moe[wandb]'")
    assert server.asked == []


def test_cache_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    assert "Not a directory; set DYLO_MOE_CACHE" in refusal(root=tmp_path / "file")


def test_wait_for_another_process_ends_with_the_timeout(tmp_path):
    home = tmp_path / "cache/artifacts/team/moe/run-output"
    home.mkdir(parents=True)
    with FileLock(home / ".lock"):
        assert "another process has been downloading it for 0.2 s" in refusal(timeout=0.2)


def test_two_processes_download_an_artifact_once(serve):
    server = serve(SMALL)
    code = f"from dylo_moe import download_artifact; print(download_artifact({ARTIFACT!r}))"
    both = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) for _ in range(2)]
    places = {process.communicate(timeout=120)[0].strip() for process in both}
    assert len(places) == 1 and directory_files(Path(places.pop())) == SMALL
    assert sorted(server.fetched()) == sorted(SMALL)


def test_killed_download_ends_its_client_and_the_next_one_clears_it(serve, tmp_path):
    server = serve(SMALL)
    server.stalls = True
    code = f"from dylo_moe import download_artifact; download_artifact({ARTIFACT!r})"
    process = subprocess.Popen([sys.executable, "-c", code])
    wait_until(lambda: server.fetched())
    process.kill()
    process.wait()
    wait_until(lambda: not processes_below(tmp_path / "tmpdir"))
    server.stalls = False
    place = download_artifact(ARTIFACT)
    assert sorted(path.name for path in place.parent.iterdir()) == [".lock", server.digest]


def test_samples_of_an_artifact_are_those_of_its_directory(serve, checkpoint, tmp_path, monkeypatch):
    server = serve(directory_files(checkpoint))
    monkeypatch.setenv("HUMANEVAL_OVERRIDE_PATH", str(write_task_set(tmp_path, "humaneval", TASKS[:2])))
    options = {"root": "out", "greedy": True, "backend": "peft_moe", "dtype": "float32", "max_new_tokens": 8}
    first = run_codegen("label", "humaneval", adapter_path=str(checkpoint), **options)
    written = Path(first).read_bytes()
    assert run_codegen("label", "humaneval", wandb_artifact=ARTIFACT, **options) == first
    assert Path(first).read_bytes() == written and len(server.fetched()) == len(directory_files(checkpoint))
    assert str(tmp_path) not in Path(first).with_suffix(".json").read_text(), "wherever it was downloaded to"
    decoder = PeftMoEDecoder("label", "humaneval", wandb_artifact=ARTIFACT, temperature=0, dtype="float32")
    assert decoder.model.checkpoint.path.name == server.digest


def test_judge_takes_an_artifact_for_a_checkpoint(serve, checkpoint, capsys):
    server = serve(directory_files(checkpoint))
    assert judge(["--wandb-artifact", ARTIFACT, "--only", "formats.detected"]) == 0
    assert server.digest in Path("validation/verdict.json").read_text()
    assert judge(["--wandb-artifact", "a:b", "--only", "formats.detected"]) == 2
    assert "write entity/project/name:version" in capsys.readouterr().err
