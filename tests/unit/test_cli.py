"""The command line: EvalPlus's option names in every spelling, one line for a mistake."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from dylo_moe import cli
from dylo_moe.command_line import hyphens
from harness.specimens import write_base, write_checkpoint
from harness.specimens.tasks import TASKS, write_task_set


@pytest.fixture
def checkpoint(tmp_path, monkeypatch):
    base = write_base(tmp_path / "base", "llama")
    monkeypatch.setenv("HUMANEVAL_OVERRIDE_PATH", str(write_task_set(tmp_path, "humaneval", TASKS[:3])))
    return write_checkpoint(tmp_path / "checkpoint", base, num_experts=2)


def parsed(*words):
    arguments = cli.build_parser().parse_args([hyphens(word) for word in words])
    return {name: value for name, value in vars(arguments).items() if value is not None}


@pytest.mark.parametrize(
    "words",
    [
        ["--n-samples", "3", "--greedy", "--id-range", "0", "5"],
        ["--n_samples", "3", "--greedy=True", "--id_range=[0,5]"],
        ["--n_samples=3", "--greedy", "true", "--id_range", "[0,", "5]"],
        ["--n-samples=3", "--id-range=(0,5)", "--greedy", "1"],
    ],
)
def test_options_may_be_spelled_as_evalplus_or_as_usual(words):
    found = parsed("codegen", "--model", "a_b", "--dataset", "humaneval", *words)
    assert found == {
        "command": "codegen",
        "model": "a_b",
        "dataset": "humaneval",
        "n_samples": 3,
        "greedy": True,
        "id_range": [0, 5],
    }


def test_flag_can_be_switched_off():
    assert parsed("codegen", "--model", "m", "--dataset", "mbpp", "--resume=False", "--greedy", "no") == {
        "command": "codegen",
        "model": "m",
        "dataset": "mbpp",
        "resume": False,
        "greedy": False,
    }


def test_every_option_is_one_of_the_function_it_goes_to():
    import inspect

    from dylo_moe.conversion import convert_checkpoint
    from dylo_moe.evalplus import evaluate, run_codegen

    generation = set(inspect.signature(run_codegen).parameters) - {"evalperf_type"}
    scoring = set(inspect.signature(evaluate).parameters) - {"model_options"}
    commands = next(a for a in cli.build_parser()._actions if a.dest == "command").choices
    options = {name: {a.dest for a in parser._actions} - {"help", "json"} for name, parser in commands.items()}
    converting = set(inspect.signature(convert_checkpoint).parameters) - {"source"} | {"checkpoint", "assume"}
    reading = {"checkpoint", "assume", "base_model", "expect_hash"}
    ours = {"codegen": generation, "evaluate": generation - {"shard"} | scoring, "merge": {"directories"}}
    ours |= {"inspect": reading, "convert": converting}
    assert {name: options[name] for name in ours} == ours


def test_command_offers_the_targets_that_there_are():
    from dylo_moe.conversion import TARGETS

    assert set(cli.TARGETS) == set(TARGETS)


def test_codegen_prints_the_path_of_the_samples_and_evaluate_the_result(checkpoint, tmp_path, capfd):
    words = ["--model", str(checkpoint), "--dataset", "humaneval", "--backend", "peft_moe", "--dtype", "float32"]
    words += ["--routing-strategy", "single:0", "--greedy", "--root", str(tmp_path / "out"), "--max-new-tokens", "4"]
    assert cli.main(["codegen", *words]) == 0
    (samples,) = capfd.readouterr().out.splitlines()
    assert len(open(samples).read().splitlines()) == 3
    assert cli.main(["evaluate", "--dataset", "humaneval", "--samples", samples, "--json"]) == 0
    result = json.loads(capfd.readouterr().out)
    assert result["samples"] == 3 and "eval" not in result
    assert cli.main(["evaluate", *words, "--json"]) == 0
    assert json.loads(capfd.readouterr().out) == result
    assert cli.main(["evaluate", *words]) == 0
    assert all(line.startswith("humaneval (") for line in capfd.readouterr().out.splitlines())


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["codegen", "--model", "nowhere", "--dataset", "humaneval", "--greedy"], "nowhere"),
        (["codegen", "--model", "CHECKPOINT", "--dataset", "humaneval"], "add greedy"),
        (["codegen", "--model", "CHECKPOINT", "--dataset", "humaneval", "--greedy", "--routing-strategy", "x"], "round_robin"),
        (["codegen", "--model", "CHECKPOINT", "--dataset", "humaneval", "--greedy", "--base-model", "/no/base"], "/no/base"),
        (["codegen", "--model", "CHECKPOINT", "--dataset", "humaneval", "--greedy", "--root", "/dev/null/x"], "/dev/null/x"),
        (["codegen", "--model", "CHECKPOINT", "--dataset", "humaneval", "--greedy", "--attn-implementation", "x"], "attn_impl"),
        (["codegen", "--model", "CHECKPOINT", "--dataset", "humaneval", "--greedy", "--device-map", "x"], "device_map"),
        (["evaluate", "--dataset", "humaneval"], "samples"),
        (["evaluate", "--dataset", "humaneval", "--samples", "/no/file.jsonl", "--greedy"], "samples, or a model"),
        (["evaluate", "--dataset", "humaneval", "--samples", "/no/file.jsonl"], "/no/file.jsonl"),
    ],
)
def test_mistake_is_one_line_and_exit_code_2(checkpoint, tmp_path, capsys, words, said):
    words = [str(checkpoint) if word == "CHECKPOINT" else word for word in words]
    root = [] if "--root" in words or words[0] == "evaluate" else ["--root", str(tmp_path / "out")]
    assert cli.main([*words, *root]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("dylo-moe: ")]
    assert len(lines) == 1 and said in lines[0]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["codegen", "--model", "m", "--dataset", "evalperf"], "--dataset"),
        (["codegen", "--model", "m", "--dataset", "mbpp", "--id-range", "3"], "two numbers"),
        (["codegen", "--model", "m", "--dataset", "mbpp", "--greedy=maybe"], "True or False"),
        (["codegen", "--model", "m", "--dataset", "mbpp", "--colour", "red"], "--colour"),
        (["codegen", "--dataset", "mbpp"], "--model"),
        ([], "command"),
    ],
)
def test_wrong_option_is_one_line_and_exit_code_2(capsys, words, said):
    with pytest.raises(SystemExit) as stopped:
        cli.main(words)
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and error.count("\n") == 1 and said in error


def test_help_imports_neither_torch_nor_evalplus():
    code = (
        "import sys\nfrom dylo_moe.cli import main\ntry: main(['codegen', '--help'])\nexcept SystemExit as end: code = end.code\n"
        "sys.exit(code or any(name in sys.modules for name in ('torch', 'transformers', 'evalplus')))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "--routing-strategy" in done.stdout


@pytest.mark.parametrize("option", [["--min-time-limit", "nan"], ["--gt-time-limit-factor", "-1"]])
def test_impossible_limit_is_one_line_and_exit_code_2(checkpoint, tmp_path, capsys, option):
    (tmp_path / "samples.jsonl").write_text("")
    assert cli.main(["evaluate", "--dataset", "humaneval", "--samples", str(tmp_path / "samples.jsonl"), *option]) == 2
    assert option[0][2:].replace("-", "_") in capsys.readouterr().err


@pytest.mark.parametrize(
    ("backend", "said"), [("hff", "backend 'hff', but should be one of peft_moe, vllm"), ("vllm", "install it, or use peft_moe")]
)
@pytest.mark.parametrize("command", ["codegen", "evaluate"])
def test_backend_that_is_not_here_is_one_line(command, backend, said, checkpoint, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "vllm", None)
    words = [command, "--model", str(checkpoint), "--dataset", "humaneval", "--greedy", "--backend", backend]
    assert cli.main(words) == 2
    assert said in capsys.readouterr().err.splitlines()[-1]
