"""Generated code in fresh processes: what passes, what does not, where that differs from EvalPlus, and why."""

from __future__ import annotations

import json
import mmap
import os
from pathlib import Path

import pytest

from dylo_moe import results
from dylo_moe.errors import OptionError, ScoringError, TaskSetError
from dylo_moe.evalplus import evaluate
from dylo_moe.sandbox.stock import runs
from dylo_moe.scoring import Limits, Sample, Scorer, score
from dylo_moe.tasks import load_tasks
from dylo_moe.worker import Worker, WorkerGone
from harness.specimens.tasks import TASKS, write_records, write_task_set

MAP_NORESERVE = 0x4000  # Linux; not in the module mmap
QUICK = Limits(min_time_limit=1.0)
DATA = Path(os.environ.get("DYLO_MOE_SHARED_DATA", Path(__file__).resolve().parents[3] / "shared" / "data"))


def task(number, name, body, inputs, atol=0):
    """A task of one argument."""
    return {
        "task_id": f"HumanEval/{number}",
        "prompt": f"def {name}(x):\n",
        "entry_point": name,
        "canonical_solution": body,
        "contract": "",
        "base_input": inputs,
        "plus_input": inputs,
        "atol": atol,
    }


def task_set(monkeypatch, directory, *tasks):
    path = write_records(directory / "tasks.jsonl", tasks)
    monkeypatch.setenv("HUMANEVAL_OVERRIDE_PATH", str(path))
    return load_tasks("humaneval")


def statuses(tasks, *solutions, limits=QUICK):
    """(EvalPlus's, ours) for each solution of the first task, base tests; plus must agree where the inputs are the same."""
    task_id = next(iter(tasks.tasks))
    scores = score(tasks, [Sample(task_id, i, text) for i, text in enumerate(solutions)], limits)
    return [(s.parts["base"]["stock"], s.parts["base"]["ours"]) for s in scores]


@pytest.mark.parametrize("dataset", ["humaneval", "mbpp"])
def test_canonical_solutions_pass_and_wrong_ones_fail(monkeypatch, tmp_path, dataset):
    monkeypatch.setenv(f"{dataset.upper()}_OVERRIDE_PATH", str(write_task_set(tmp_path, dataset, TASKS[::3])))
    tasks = load_tasks(dataset)
    right = [Sample(t.task_id(dataset), 0, t.prompt(dataset) + t.completion(dataset)) for t in TASKS[::3]]
    wrong = [Sample(t.task_id(dataset), 1, t.prompt(dataset) + t.completion(dataset, t.wrong[0])) for t in TASKS[::3]]
    scores = score(tasks, [*wrong, *right], QUICK, parallel=2)
    assert [s.sample for s in scores] == [*wrong, *right]
    for which in ("stock", "ours"):
        assert [s.passed(which, ["base", "plus"]) for s in scores] == [False] * len(wrong) + [True] * len(right)


def test_what_fails_is_reported_with_its_input(monkeypatch, tmp_path):
    tasks = task_set(monkeypatch, tmp_path, task(0, "double", "    return 2 * x\n", [[1], [2], [3]]))
    samples = [Sample("HumanEval/0", 0, "def double(x):\n    return 2 if x == 1 else 0\n")]
    (first,) = score(tasks, samples, QUICK)
    (every,) = score(tasks, samples, Limits(test_details=True))
    assert first.parts["base"]["failed"] == [[2]]
    assert every.parts["base"]["failed"] == [[2], [3]]


def test_code_that_breaks_off_loops_or_kills_does_not_hurt_the_samples_after_it(monkeypatch, tmp_path):
    tasks = task_set(monkeypatch, tmp_path, task(0, "double", "    return 2 * x\n", [[1], [2]]))
    kill = "import importlib, os\nimportlib.reload(os)\nos.kill(os.getppid(), 9)\n"
    noise = "import os\ndef double(x):\n    os.write(1, b'{\"base\": 1}\\n')\n    return 2 * x\n"
    solutions = ["def double(", "def double(x):\n    while True: pass\n", kill, "raise SystemExit", noise]
    found = statuses(tasks, *solutions, "def double(x):\n    return x + x\n")
    assert found == [("fail", "fail"), ("fail", "timeout"), ("fail", "fail"), ("fail", "fail"), *[("pass", "pass")] * 2]


def test_sample_that_ran_out_of_time_is_measured_again_alone(monkeypatch, tmp_path):
    tasks = task_set(monkeypatch, tmp_path, task(0, "double", "    return 2 * x\n", [[1]]))
    marker = tmp_path / "was here"
    slow_once = (
        "import pathlib, time\ndef double(x):\n"
        f"    here = pathlib.Path({str(marker)!r})\n"
        "    if not here.exists():\n        here.touch()\n        time.sleep(9)\n    return 2 * x\n"
    )
    samples = [Sample("HumanEval/0", 0, slow_once), Sample("HumanEval/0", 1, "def double(x):\n    return 0\n")]
    with Scorer(tasks, Limits(base_only=True, min_time_limit=1.0), sandbox="none") as scorer:  # in one it could leave no mark
        slow, wrong = scorer.score(samples)
    assert slow.measured_alone and slow.passed("ours", ["base"])
    assert not wrong.measured_alone and not wrong.passed("ours", ["base"])


def test_inputs_that_take_long_come_to_evalplus_in_several_runs():
    assert runs([3, 3, 0, 1, 2, 9, 9]) == [slice(0, 1), slice(1, 4), slice(4, 5), slice(5, 6), slice(6, 7)]
    assert runs([0.1] * 40) == [slice(0, 40)] and runs([]) == [slice(0, 0)]


def test_tolerance_of_an_earlier_input_does_not_let_a_wrong_integer_pass(monkeypatch, tmp_path):
    body = "    return 1.5 if x == 0 else 10 ** 8\n"
    tasks = task_set(monkeypatch, tmp_path, task(0, "f", body, [[0], [1]]))
    wrong = "def f(x):\n    return 1.5 if x == 0 else 10 ** 8 + 1\n"
    close = "def f(x):\n    return 1.5 + 1e-8 if x == 0 else 10 ** 8\n"
    assert statuses(tasks, wrong, close, "def f(x):\n" + body) == [("pass", "fail"), ("pass", "pass"), ("pass", "pass")]


def test_nested_list_does_not_pass_for_a_flat_one(monkeypatch, tmp_path):
    tasks = task_set(monkeypatch, tmp_path, task(0, "f", "    return [x]\n", [[0.3]]))
    texts = ["[[x]]", "[x + 1e-9]", "(x,)", "[x + 1e-3]"]
    found = statuses(tasks, *(f"def f(x):\n    return {text}\n" for text in texts))
    assert found == [("pass", "fail"), ("pass", "pass"), ("fail", "fail"), ("fail", "fail")]


def test_given_tolerance_is_kept(monkeypatch, tmp_path):
    tasks = task_set(monkeypatch, tmp_path, task(0, "f", "    return x\n", [[0.5]], atol=0.01))
    assert statuses(tasks, *(f"def f(x):\n    return x + {d}\n" for d in (0.009, 0.02))) == [("pass",) * 2, ("fail",) * 2]


def test_find_zero_passes_when_it_finds_a_zero_though_evalplus_says_no(monkeypatch, tmp_path):
    if not (DATA / "HumanEvalPlus.jsonl.gz").is_file():
        pytest.skip(f"{DATA} has no HumanEvalPlus.jsonl.gz; set DYLO_MOE_SHARED_DATA")
    monkeypatch.setenv("HUMANEVAL_OVERRIDE_PATH", str(DATA / "HumanEvalPlus.jsonl.gz"))
    everything = load_tasks("humaneval")
    record = everything.tasks["HumanEval/32"]
    tasks = task_set(monkeypatch, tmp_path, record)
    canonical = record["prompt"] + record["canonical_solution"]
    nearly = canonical.replace("def find_zero(", "def _root(") + "\ndef find_zero(xs):\n    return _root(xs) + 0.01\n"
    assert statuses(tasks, canonical, nearly, "def find_zero(xs):\n    return 0.0\n", limits=Limits()) == [
        ("fail", "pass"),
        ("fail", "fail"),
        ("fail", "fail"),
    ]


def test_memory_of_the_calling_process_does_not_count(monkeypatch, tmp_path):
    """EvalPlus forks its checks, so 8 GiB that the caller has reserved are over their 4 GiB limit before they start."""
    tasks = task_set(monkeypatch, tmp_path, task(0, "f", "    return sum(range(x))\n", [[10]]))
    with mmap.mmap(-1, 8 * 2**30, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE):
        assert statuses(tasks, "def f(x):\n    return sum([0] * 1000) + sum(range(x))\n") == [("pass", "pass")]


def test_generated_code_sees_neither_secrets_nor_the_callers_directory(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_TOKEN", "secret")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    tasks = task_set(monkeypatch, tmp_path, task(0, "f", "    return False\n", [[0]]))
    assert Path("pyproject.toml").exists() and "secret" in str(os.environ)
    found = "'secret' in str(os.environ) or 'pyproject.toml' in os.listdir('.')"
    assert statuses(tasks, f"import os\ndef f(x):\n    return {found}\n") == [("pass", "pass")]


def test_canonical_solution_that_fails_is_an_error_that_names_the_task(monkeypatch, tmp_path):
    tasks = task_set(monkeypatch, tmp_path, task(7, "f", "    return 1 // 0\n", [[0]]))
    with pytest.raises(ScoringError, match="HumanEval/7.*ZeroDivisionError"):
        statuses(tasks, "def f(x):\n    return 0\n")


CHANCE = "    import random\n    return random.random()\n"


def test_no_score_without_canonical_solutions_that_pass(monkeypatch, tmp_path):
    tasks = task_set(
        monkeypatch,
        tmp_path,
        task(0, "f", "    return x\n", [[0]]),
        task(1, "f", CHANCE, [[0]]),
        task(2, "f", "    import socket\n    return socket.socket().fileno() > 0\n", [[0]]),
        task(3, "f", "    return {1: [x, 2.5, None, {x}]}\n", [[0]]),
    )
    with Scorer(tasks, QUICK) as scorer:
        scorer.calibrate(["HumanEval/0", "HumanEval/3"])
        with pytest.raises(ScoringError, match=r"no score, as 2 canonical .*: HumanEval/1 \(fail\), HumanEval/2 \(fail\)"):
            scorer.calibrate(tasks.tasks)


def test_result_names_the_sandbox_and_is_not_reused_where_a_stronger_one_is_wanted(monkeypatch, tmp_path):
    task_set(monkeypatch, tmp_path, task(0, "f", "    return x\n", [[1]]))
    path = write_samples(tmp_path / "s.jsonl", ("HumanEval/0", "def f(x):\n    return x\n"))
    free = evaluate("humaneval", samples=str(path), sandbox="none")
    held = evaluate("humaneval", samples=str(path))
    assert (free["sandbox"], free["pass@1"], held["pass@1"]) == ("none", 1.0, 1.0)
    assert "seccomp" in held["sandbox"] and held["binding"]["sandboxed"] and not free["binding"]["sandboxed"]
    assert evaluate("humaneval", samples=str(path))["date"] == held["date"]
    with pytest.raises(OptionError, match="sandbox 'docker'"):
        evaluate("humaneval", samples=str(path), sandbox="docker")


def test_samples_of_a_task_with_a_wrong_canonical_solution_are_not_scored(monkeypatch, tmp_path):
    task_set(monkeypatch, tmp_path, task(0, "f", CHANCE, [[1]]))
    path = write_samples(tmp_path / "s.jsonl", ("HumanEval/0", "def f(x):\n    return x\n"))
    with pytest.raises(ScoringError, match="no score"):
        evaluate("humaneval", samples=str(path))
    assert not results.result_path(path).exists()


def test_child_that_does_not_answer_is_killed_and_replaced():
    with Worker("dylo_moe.scoring_worker") as worker:
        loop = {**task(0, "f", "    while True: pass\n", [[0]])}
        with pytest.raises(WorkerGone, match="within 1 s") as gone:
            worker.ask({"dataset": "humaneval", "task": loop}, 1)
        assert gone.value.late
        right = task(0, "f", "    return x\n", [[0]])
        assert 0 < worker.ask({"dataset": "humaneval", "task": right}, 60)["seconds"] < 1


def summary(tasks, samples, limits=QUICK):
    bound = results.binding(tasks, samples, limits)
    return results.summarise(tasks, score(tasks, samples, limits), limits, bound)


def test_result_holds_both_scores_and_why_they_differ(monkeypatch, tmp_path):
    flat, other = task(0, "f", "    return [x]\n", [[0.3]]), task(1, "g", "    return x\n", [[1]])
    tasks = task_set(monkeypatch, tmp_path, flat, other)
    codes = [("HumanEval/0", 0, "def f(x):\n    return [[x]]\n"), ("HumanEval/1", 0, "def g(x):\n    return x\n")]
    result = summary(tasks, [Sample(*c) for c in codes])
    assert result["pass@1"] == result["plus"]["pass@1"] == result["base"]["pass@1"] == 0.5
    assert result["stock"] == {"base": {"pass@1": 1.0}, "plus": {"pass@1": 1.0}}
    assert [(d["task_id"], d["sample"], d["tests"], d["stock"], d["ours"]) for d in result["differences"]] == [
        ("HumanEval/0", 0, "base", "pass", "fail"),
        ("HumanEval/0", 0, "plus", "pass", "fail"),
    ]
    assert all("broadcasts" in d["reason"] for d in result["differences"])
    assert result["eval"]["HumanEval/1"][0]["plus_status"] == "pass"
    assert json.loads(json.dumps(result)) == result


def test_plus_counts_only_what_also_passes_the_base_tests(monkeypatch, tmp_path):
    record = {**task(0, "f", "    return x\n", [[1], [2]]), "plus_input": [[1]]}
    tasks = task_set(monkeypatch, tmp_path, record)
    result = summary(tasks, [Sample("HumanEval/0", 0, "def f(x):\n    return 1\n")])
    assert (result["base"], result["plus"]) == ({"pass@1": 0.0}, {"pass@1": 0.0})
    assert result["eval"]["HumanEval/0"][0]["plus_status"] == "pass"


def test_without_plus_tests_pass_at_1_is_that_of_the_base_tests(monkeypatch, tmp_path):
    tasks = task_set(monkeypatch, tmp_path, task(0, "f", "    return x\n", [[1]]))
    samples = [Sample("HumanEval/0", i, f"def f(x):\n    return {i}\n") for i in range(10)]
    result = summary(tasks, samples, Limits(base_only=True))
    assert result["plus"] is None and result["pass@1"] == pytest.approx(0.1) and result["pass@10"] == 1.0
    assert result["eval"]["HumanEval/0"][1]["plus_status"] is None


def write_samples(path, *pairs):
    path.write_text("".join(json.dumps({"task_id": t, "solution": s}) + "\n" for t, s in pairs))
    return path


def test_tasks_without_samples_are_named(monkeypatch, tmp_path):
    tasks = task_set(monkeypatch, tmp_path, *(task(i, "f", "    return x\n", [[1]]) for i in range(4)))
    path = write_samples(tmp_path / "s.jsonl", ("HumanEval/1", "a"), ("HumanEval/1", "b"), ("HumanEval/9", "c"))
    with pytest.raises(TaskSetError, match="3 of 4 tasks: HumanEval/0, HumanEval/2, HumanEval/3"):
        results.read_samples(path, tasks, tasks.ids())
    assert results.read_samples(path, tasks, tasks.ids((1, 2))) == [Sample("HumanEval/1", 0, "a"), Sample("HumanEval/1", 1, "b")]


def test_completions_and_directories_of_files_are_read_too(monkeypatch, tmp_path):
    tasks = task_set(monkeypatch, tmp_path, task(0, "f", "    return x\n", [[1]]))
    path = tmp_path / "s.jsonl"
    path.write_text(json.dumps({"task_id": "HumanEval/0", "completion": "    pass"}) + "\n\n")
    assert results.read_samples(path, tasks, ["HumanEval/0"])[0].solution == "def f(x):\n    pass"
    for name in ("10", "9"):
        (tmp_path / "d" / "HumanEval_0").mkdir(parents=True, exist_ok=True)
        (tmp_path / "d" / "HumanEval_0" / f"{name}.py").write_text(name)
    assert [s.solution for s in results.read_samples(tmp_path / "d", tasks, ["HumanEval/0"])] == ["9", "10"]


@pytest.mark.parametrize("line", ["{", "[]", '{"task_id": "HumanEval/0"}', '{"task_id": "HumanEval/0", "solution": 1}', "null"])
def test_line_that_is_no_sample_is_named_by_its_number(monkeypatch, tmp_path, line):
    tasks = task_set(monkeypatch, tmp_path, task(0, "f", "    return x\n", [[1]]))
    path = write_samples(tmp_path / "s.jsonl", ("HumanEval/0", "good"))
    assert len(results.read_samples(path, tasks, ["HumanEval/0"])) == 1
    path.write_text(path.read_text() + line + "\n")
    with pytest.raises(ValueError, match=r"s\.jsonl:2"):
        results.read_samples(path, tasks, ["HumanEval/0"])


@pytest.mark.parametrize("change", ["samples", "tasks", "limits"])
def test_stored_results_are_not_used_for_anything_else(monkeypatch, tmp_path, change):
    tasks = task_set(monkeypatch, tmp_path, task(0, "f", "    return x\n", [[1]]))
    samples = [Sample("HumanEval/0", 0, "a")]
    place = tmp_path / "s_eval_results.json"
    bound = results.binding(tasks, samples, QUICK)
    place.write_text(json.dumps({"binding": bound, "pass@1": 1.0}))
    assert results.stored(place, bound)["pass@1"] == 1.0
    if change == "samples":
        samples = [Sample("HumanEval/0", 0, "b")]
    elif change == "tasks":
        tasks = task_set(monkeypatch, tmp_path, task(0, "f", "    return x\n", [[2]]))
    limits = Limits(base_only=True) if change == "limits" else QUICK
    assert results.stored(place, results.binding(tasks, samples, limits)) is None


@pytest.mark.parametrize("content", ["", "[]", '{"binding": '])
def test_damaged_results_are_not_used(tmp_path, content):
    (tmp_path / "r.json").write_text(content)
    assert results.stored(tmp_path / "r.json", {}) is None


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"prompt": 3}, "prompt"),
        ({"base_input": [1]}, "base_input"),
        ({"base_input": []}, "base_input is empty, so that every solution would pass"),
        ({"atol": None}, "atol"),
        ({"atol": float("nan")}, "atol"),
        ({"task_id": "HumanEval-0"}, "task_id"),
        ({"task_id": "HumanEval/" + "9" * 5000}, "task_id"),
    ],
)
def test_unusable_task_is_named_by_line_and_field(monkeypatch, tmp_path, change, word):
    good = task(0, "f", "    return x\n", [[1]])
    assert len(task_set(monkeypatch, tmp_path, good).tasks) == 1
    with pytest.raises(TaskSetError, match=rf"tasks\.jsonl:2: {word}"):
        task_set(monkeypatch, tmp_path, good, {**good, "task_id": "HumanEval/1", **change})


def test_task_twice_and_cut_file_are_refused(monkeypatch, tmp_path):
    good = task(0, "f", "    return x\n", [[1]])
    with pytest.raises(TaskSetError, match="second time"):
        task_set(monkeypatch, tmp_path, good, good)
    path = write_records(tmp_path / "t.jsonl.gz", [good])
    monkeypatch.setenv("HUMANEVAL_OVERRIDE_PATH", str(path))
    assert len(load_tasks("humaneval").tasks) == 1
    path.write_bytes(path.read_bytes()[:-12])
    with pytest.raises(TaskSetError, match=r"t\.jsonl\.gz"):
        load_tasks("humaneval")
