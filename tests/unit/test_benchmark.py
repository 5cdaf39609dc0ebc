"""The command line of the benchmark: what it takes, what it refuses, in which order it runs what."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from dylo_moe import benchmark
from dylo_moe.benchmarks.running import plan_benchmarks, run_benchmarks
from dylo_moe.benchmarks.stock import generate_stock, stock_identity
from dylo_moe.errors import MissingFile, OptionError
from dylo_moe.evalplus import evaluate
from dylo_moe.tasks import load_tasks
from harness.specimens import write_base, write_checkpoint
from harness.specimens.tasks import TASKS, write_task_set

FOUR = TASKS[:4]


@pytest.fixture
def tasks(tmp_path, monkeypatch):
    for dataset in ("humaneval", "mbpp"):
        monkeypatch.setenv(f"{dataset.upper()}_OVERRIDE_PATH", str(write_task_set(tmp_path / dataset, dataset, FOUR)))


@pytest.mark.parametrize(
    ("options", "strategies"),
    [
        ({"model": "m"}, ("router",)),
        ({"trained_model": "m"}, ("base", "router")),
        ({"trained_model": "m", "routing_strategy": ["single:0", "base", "single:0"]}, ("base", "single:0")),
        ({"model": "m", "routing_strategy": ["best", "base"]}, ("best", "base")),
        ({"model": "m", "backend": "hf"}, ()),
    ],
)
def test_trained_model_is_compared_with_its_base_first_and_each_strategy_runs_once(tasks, options, strategies):
    assert plan_benchmarks(options).strategies == strategies


def test_max_samples_takes_the_first_tasks_of_each_benchmark_and_of_a_range(tasks):
    plan = plan_benchmarks({"model": "m", "benchmarks": ["mbpp", "humaneval", "mbpp"], "max_samples": 2})
    assert {name: list(part.tasks) for name, part in plan.task_sets.items()} == {
        "mbpp": ["Mbpp/1000", "Mbpp/1001"],
        "humaneval": ["HumanEval/0", "HumanEval/1"],
    }
    assert plan.task_sets["mbpp"].hash == load_tasks("mbpp").hash
    ranged = plan_benchmarks({"model": "m", "max_samples": 2, "id_range": [1, 4]})
    assert list(ranged.task_sets["humaneval"].tasks) == ["HumanEval/1", "HumanEval/2"]


@pytest.mark.parametrize(
    ("options", "found"),
    [
        ({}, (True, 0.0)),
        ({"temperature": 0.8}, (False, 0.8)),
        ({"greedy": True}, (True, 0.0)),
        ({"greedy": True, "temperature": 0.0}, (True, 0.0)),
    ],
)
def test_without_a_temperature_it_is_greedy(tasks, options, found):
    decoding = plan_benchmarks({"model": "m", **options}).decoding
    assert (decoding["greedy"], decoding["temperature"]) == found


def test_options_of_the_decoder_arrive_and_those_of_the_command_do_not(tasks):
    options = {"model": "m", "bs": 4, "dtype": "float32", "parallel": 3, "sandbox": "none", "base_only": True, "seed": 7}
    plan = plan_benchmarks({**options, "max_samples": 1, "output_dir": "there", "min_time_limit": 2.0})
    assert plan.decoding == {"bs": 4, "dtype": "float32", "seed": 7, "n_samples": 1, "temperature": 0.0, "greedy": True}
    assert plan.scoring == {"parallel": 3, "sandbox": "none"}
    assert (plan.limits.base_only, plan.limits.min_time_limit, str(plan.directory)) == (True, 2.0, "there")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--greedy"], "no model, but should be one of --model, --trained_model and --wandb_artifact"),
        (["--model", "m", "--trained_model", "t"], "--model and --trained_model"),
        (["--model", "nowhere"], "nowhere"),
        (["--model", "CHECKPOINT", "--routing_strategy", "single:9"], "single:0..single:1"),
        (["--model", "m", "--greedy", "--temperature", "0.5"], "one of them"),
        (["--model", "m", "--greedy=False"], "set a temperature above 0"),
        (["--model", "m", "--n_samples", "5"], "set a temperature"),
        (["--model", "m", "--n_samples", "0", "--temperature", "1"], "n_samples 0"),
        (["--model", "m", "--max_samples", "0"], "max_samples 0"),
        (["--model", "m", "--id_range", "7", "9"], "[7, 9)"),
        (["--model", "m", "--min_time_limit", "0"], "min_time_limit"),
        (["--model", "m", "--backend", "hf", "--routing_strategy", "router"], "routing_strategy"),
        (["--model", "BASE", "--backend", "hf", "--seed", "3"], "seed: options of the backend peft_moe"),
        (["--model", "CHECKPOINT", "--backend", "hf"], "checkpoint"),
        (["--wandb_artifact", "no artifact"], "no artifact"),
        (["--model", "CHECKPOINT", "--output_dir", "/dev/null/x"], "/dev/null"),
    ],
)
def test_mistake_is_one_line_and_exit_code_2(tasks, tmp_path, monkeypatch, capsys, words, said):
    monkeypatch.chdir(tmp_path)
    base = write_base(tmp_path / "base", "llama")
    write_checkpoint(tmp_path / "checkpoint", base, num_experts=2)
    places = {"CHECKPOINT": str(tmp_path / "checkpoint"), "BASE": str(base)}
    assert benchmark.main([places.get(word, word) for word in words]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert [line for line in lines if line.startswith("dylo_moe.benchmark: ")] == lines[-1:] and said in lines[-1]
    assert not list(tmp_path.rglob("benchmark.*"))


def test_machine_that_cannot_hold_generated_code_says_so_before_it_generates(tasks, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PATH", "")
    options = {"model": str(tmp_path / "nowhere"), "sandbox": "bwrap", "greedy": True}
    for run in (lambda: run_benchmarks(plan_benchmarks(options)), lambda: evaluate("humaneval", backend="peft_moe", **options)):
        with pytest.raises(MissingFile):
            run()
        warning = "Warning: what is not scored yet will have no score here: generated code cannot be held: no bubblewrap"
        assert capsys.readouterr().err.startswith(warning)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--benchmarks", "humanevalplus"], "--benchmarks"),
        (["--backend", "vllm"], "--backend"),
        (["--sandbox", "docker"], "--sandbox"),
        (["--max_samples", "few"], "--max-samples"),
        (["--no_wandb"], "--no-wandb"),
    ],
)
def test_wrong_option_is_one_line_and_exit_code_2(capsys, words, said):
    with pytest.raises(SystemExit) as stopped:
        benchmark.main(["--model", "m", *words])
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and error.count("\n") == 1 and said in error


def test_help_is_instant():
    code = (
        "import sys\nfrom dylo_moe.benchmark import main\ntry: main(['--help'])\nexcept SystemExit as end: code = end.code\n"
        "sys.exit(code or any(name in sys.modules for name in ('torch', 'numpy', 'scipy', 'evalplus', 'matplotlib')))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "--routing-strategy" in done.stdout and "--max-samples" in done.stdout


HF_TWICE = """
import json, sys
from pathlib import Path
from dylo_moe.benchmarks.stock import generate_stock
from dylo_moe.tasks import load_tasks
tasks = load_tasks("humaneval").part(["HumanEval/1", "HumanEval/2"])
decoding = {"greedy": True, "n_samples": 1, "temperature": 0.0, "dtype": "float32"}
for _ in range(2):
    path = generate_stock(sys.argv[1], tasks, decoding, Path(sys.argv[2]))
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(lines[0] + lines[1][:9])  # as a kill in the middle of the last line leaves it
    print("WROTE", path, *(json.loads(line)["task_id"] for line in lines))
"""


def test_samples_of_the_hf_backend_keep_to_their_model_and_options(tasks, tmp_path):
    """EvalPlus names its file by model, backend and temperature; here another dtype is another identity, a torn line no end."""
    base = write_base(tmp_path / "base", "llama")
    ends_at_once = {"eos_token_id": list(range(json.loads((base / "config.json").read_text())["vocab_size"]))}
    (base / "generation_config.json").write_text(json.dumps(ends_at_once))
    words = [sys.executable, "-c", HF_TWICE, str(base), str(tmp_path / "hf")]
    done = subprocess.run(words, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    found = [line.split()[1:] for line in done.stdout.splitlines() if line.startswith("WROTE")]
    assert [tasks for _, *tasks in found] == [["HumanEval/1", "HumanEval/2"]] * 2
    assert found[0][0] == found[1][0]
    model, options = str(base), {"greedy": True, "bs": 1}
    same, other = ({**options, **change} for change in ({"bs": 2, "resume": True}, {"dtype": "bfloat16"}))
    assert stock_identity(model, options) == stock_identity(model, same) != stock_identity(model, other)


def test_model_that_is_not_there_is_named_by_the_hf_backend(tasks, tmp_path):
    decoding = {"greedy": True, "n_samples": 1, "temperature": 0.0}
    with pytest.raises(OptionError, match="not-there"):
        generate_stock(str(tmp_path / "not-there"), load_tasks("humaneval"), decoding, tmp_path / "hf")
