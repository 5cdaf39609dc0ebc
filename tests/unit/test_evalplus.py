"""run_codegen and evaluate, end to end on tiny checkpoints; other backends stay EvalPlus's own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dylo_moe.errors import ArtifactError, OptionError, SampleFileError, TaskSetError, UnknownStrategy
from dylo_moe.evalplus import INSTRUCTION_PREFIX, RESPONSE_PREFIX, evaluate, make_model, run_codegen
from fixtures.loads import counted_loads
from harness.specimens import write_base, write_checkpoint
from harness.specimens.tasks import TASKS, write_task_set

FOUR = TASKS[:4]
MODEL_OPTIONS = {"backend": "peft_moe", "dtype": "float32", "max_new_tokens": 12}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_base(tmp_path_factory.mktemp("base"), "llama")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, base):
    return write_checkpoint(tmp_path_factory.mktemp("checkpoint"), base, num_experts=2)


@pytest.fixture
def tasks(monkeypatch, tmp_path):
    path = write_task_set(tmp_path / "tasks", "humaneval", FOUR)
    monkeypatch.setenv("HUMANEVAL_OVERRIDE_PATH", str(path))
    return path


@pytest.fixture
def generate(checkpoint, tasks, tmp_path):
    def run(**options):
        options = {"root": str(tmp_path / "out"), "temperature": 0.8, **MODEL_OPTIONS, **options}
        return Path(run_codegen(str(options.pop("model", checkpoint)), "humaneval", **options))

    return run


def rows(path):
    return [(row["task_id"], row["solution"]) for row in map(json.loads, path.read_text().splitlines())]


def raw(path):
    return rows(path.with_name(path.name.replace(".jsonl", ".raw.jsonl")))


def test_samples_are_what_the_decoder_writes_for_each_task(checkpoint, generate):
    path = generate(n_samples=2, bs=1)
    decoder = make_model(str(checkpoint), dataset="humaneval", temperature=0.8, **MODEL_OPTIONS)
    expected = []
    for task in FOUR:
        prompt = task.prompt("humaneval").strip() + "\n"
        expected += [(task.task_id("humaneval"), prompt + text) for text in decoder.codegen(prompt, num_samples=2)]
    assert raw(path) == expected
    assert [task for task, _ in rows(path)] == [task for task, _ in expected]


def test_sanitized_samples_are_those_of_evalplus(generate):
    from evalplus.sanitize import sanitize

    path = generate(greedy=True)
    names = {task.task_id("humaneval"): task.name for task in FOUR}
    assert rows(path) == [(task, sanitize(text, entrypoint=names[task])) for task, text in raw(path)]


def test_greedy_is_one_sample_except_for_round_robin(generate):
    assert len(rows(generate(greedy=True, n_samples=5, bs=4))) == 4
    path = generate(greedy=True, n_samples=3, routing_strategy="round_robin")
    found = raw(path)
    assert len(found) == 12
    assert found[0] == found[2] != found[1]


def test_temperature_zero_without_greedy_is_refused_before_anything_is_loaded(generate):
    with pytest.raises(OptionError, match="add greedy"):
        generate(temperature=0.0, model="nowhere")


def test_runs_of_two_strategies_in_one_directory_never_mix(generate):
    first = generate(greedy=True, routing_strategy="single:0")
    kept = first.read_bytes()
    second = generate(greedy=True, routing_strategy="single:1")
    assert first != second and first.parent == second.parent
    assert first.read_bytes() == kept
    assert raw(first) != raw(second)


def test_anything_that_changes_the_samples_changes_the_file(generate, tmp_path, base):
    other = write_checkpoint(tmp_path / "other", base, num_experts=2, seed=1)
    paths = {
        "plain": generate(),
        "temperature": generate(temperature=0.7),
        "tokens": generate(max_new_tokens=11),
        "seed": generate(seed=1),
        "checkpoint": generate(adapter_path=str(other)),
        "dtype": generate(dtype="bfloat16"),
        "base": generate(base_model=str(write_base(tmp_path / "base1", "llama", seed=1))),
    }
    assert len(set(paths.values())) == len(paths)
    assert generate(bs=3) == generate(base_model=str(base)) == paths["plain"]


def test_changed_weights_under_the_same_name_are_another_run(generate, tmp_path, base):
    place = tmp_path / "same"
    write_checkpoint(place, base, num_experts=2, seed=1)
    first = generate(model=place)
    write_checkpoint(place, base, num_experts=2, seed=2)
    second = generate(model=place)
    assert first != second and raw(first) != raw(second)


def test_more_samples_later_are_those_of_one_run(generate, tmp_path):
    first = generate(n_samples=1)
    assert len(rows(first)) == 4
    grown = generate(n_samples=3, bs=2)
    assert grown == first
    assert raw(grown) == raw(generate(n_samples=3, root=str(tmp_path / "at once")))
    assert len(rows(generate(n_samples=2))) == 8


def test_id_ranges_add_up_to_the_whole(generate, tmp_path):
    first = generate(id_range=[0, 1])
    assert [task for task, _ in rows(first)] == ["HumanEval/0"]
    assert generate(id_range=(1, 4)) == first
    assert rows(first) == rows(generate(root=str(tmp_path / "at once")))


def test_without_resume_the_file_is_written_anew(generate):
    path = generate(n_samples=2)
    assert generate(n_samples=1, resume=False) == path
    assert len(rows(path)) == 4


def test_model_is_not_loaded_when_nothing_is_left_to_generate(generate, monkeypatch):
    path = generate()
    loads = counted_loads(monkeypatch)
    assert (generate(), len(loads)) == (path, 0)
    assert (generate(n_samples=2), len(loads)) == (path, 1)


def test_chat_model_answers_in_a_code_block_with_evalplus_sentences(generate, tmp_path):
    chat = write_base(tmp_path / "chat", "llama", chat_template=True)
    path = generate(model=chat, greedy=True)
    assert not raw(path)[0][1].startswith(FOUR[0].prompt("humaneval"))
    options = json.loads(path.with_suffix(".json").read_text())["identity"]["options"]
    assert (options["instruction_prefix"], options["response_prefix"]) == (INSTRUCTION_PREFIX, RESPONSE_PREFIX)


def test_sentences_are_those_of_evalplus():
    import evalplus.codegen

    source = Path(evalplus.codegen.__file__).read_text()
    assert f'instruction_prefix = "{INSTRUCTION_PREFIX}"' in source
    assert f'response_prefix = "{RESPONSE_PREFIX}"' in source


RUN = """
import json, sys
from dylo_moe.evalplus import run_codegen
print(run_codegen(**json.loads(sys.argv[1])))
"""


def test_killed_run_continues_to_what_an_undisturbed_run_writes(generate, checkpoint, tmp_path):
    undisturbed = generate(n_samples=3, max_new_tokens=40, root=str(tmp_path / "undisturbed"))
    options = {"model": str(checkpoint), "dataset": "humaneval", "root": str(tmp_path / "out"), "temperature": 0.8}
    options |= {**MODEL_OPTIONS, "n_samples": 3, "max_new_tokens": 40, "bs": 2}  # so that samples come two at a time
    process = subprocess.Popen([sys.executable, "-c", RUN, json.dumps(options)], stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        journals = list((tmp_path / "out").glob("humaneval/*.journal"))
        if journals and journals[0].read_bytes().count(b"\n") >= 2:
            break
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    (journal,) = journals
    before = journal.read_bytes()
    assert 1 < before.count(b"\n") < 1 + 12
    assert not list((tmp_path / "out").glob("humaneval/*.jsonl"))
    resumed = generate(n_samples=3, max_new_tokens=40)
    assert resumed.name == undisturbed.name
    assert resumed.read_bytes() == undisturbed.read_bytes()
    assert raw(resumed) == raw(undisturbed)
    assert journal.read_bytes().startswith(before[: before.rindex(b"\n") + 1])


def test_torn_last_line_is_generated_again(generate):
    path = generate(n_samples=2)
    whole = path.read_bytes()
    journal = path.with_suffix(".journal")
    journal.write_bytes(journal.read_bytes()[:-20])
    assert generate(n_samples=2).read_bytes() == whole


def test_tasks_file_changed_later_in_the_process_is_seen(generate, monkeypatch, tmp_path):
    first = generate(greedy=True)
    monkeypatch.setenv("HUMANEVAL_OVERRIDE_PATH", str(write_task_set(tmp_path / "more", "humaneval", TASKS[:5])))
    second = generate(greedy=True)
    assert first != second
    assert (len(rows(first)), len(rows(second))) == (4, 5)


def canonical(path, tasks=FOUR, wrong=()):
    texts = [t.prompt("humaneval") + t.completion("humaneval", t.wrong[0] if i in wrong else None) for i, t in enumerate(tasks)]
    lines = [{"task_id": t.task_id("humaneval"), "solution": text} for t, text in zip(tasks, texts, strict=True)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(path)


def test_evaluate_returns_what_it_writes(tasks, tmp_path):
    samples = canonical(tmp_path / "s.jsonl", wrong=(1,))
    result = evaluate("humaneval", samples)
    assert result["pass@1"] == 0.75
    assert result["differences"] == []
    assert json.loads((tmp_path / "s_eval_results.json").read_text()) == result


def test_results_of_other_samples_are_not_reused(tasks, tmp_path):
    assert evaluate("humaneval", canonical(tmp_path / "s.jsonl"))["pass@1"] == 1.0
    assert evaluate("humaneval", canonical(tmp_path / "s.jsonl", wrong=range(4)))["pass@1"] == 0.0
    assert evaluate("humaneval", canonical(tmp_path / "s.jsonl"), base_only=True)["plus"] is None
    assert evaluate("humaneval", canonical(tmp_path / "s.jsonl"))["plus"] == {"pass@1": 1.0}


def test_stored_results_of_the_same_samples_are_reused_unless_told_otherwise(tasks, tmp_path):
    samples = canonical(tmp_path / "s.jsonl")
    evaluate("humaneval", samples)
    place = tmp_path / "s_eval_results.json"
    place.write_text(place.read_text().replace('"pass@1": 1.0', '"pass@1": 0.125'))
    assert evaluate("humaneval", samples)["pass@1"] == 0.125
    assert evaluate("humaneval", samples, i_just_wanna_run=True)["pass@1"] == 1.0


def test_part_of_the_tasks_is_scored_with_a_range_and_refused_without(tasks, tmp_path):
    samples = canonical(tmp_path / "s.jsonl", FOUR[1:3])
    assert evaluate("humaneval", samples, id_range=[1, 3])["tasks"] == 2
    with pytest.raises(TaskSetError, match="HumanEval/0, HumanEval/3"):
        evaluate("humaneval", samples)


def test_evaluate_generates_and_scores(checkpoint, tasks, tmp_path):
    options = {**MODEL_OPTIONS, "model": str(checkpoint), "root": str(tmp_path / "out"), "greedy": True, "id_range": [0, 2]}
    result = evaluate("humaneval", **options)
    assert result["samples"] == 2 and 0.0 <= result["pass@1"] <= 1.0
    assert len(list((tmp_path / "out" / "humaneval").glob("*_eval_results.json"))) == 1


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({}, "either samples"),
        ({"samples": "s.jsonl", "backend": "peft_moe", "model": "m"}, "either samples"),
        ({"backend": "peft_moe", "model": "m", "colour": "red"}, "colour"),
        ({"backend": "hf", "model": "m", "routing_strategy": "best"}, "backend is hf"),
        ({"samples": "s.jsonl", "id_range": [3, 1]}, "id_range"),
    ],
)
def test_contradicting_options_of_evaluate_are_named(tasks, options, word):
    with pytest.raises(OptionError, match=word):
        evaluate("humaneval", **options)


@pytest.mark.parametrize(
    ("options", "error", "word"),
    [
        ({"jsonl_fmt": False}, OptionError, "JSON lines"),
        ({"evalperf_type": "instruct"}, OptionError, "evalperf_type"),
        ({"n_samples": 0}, OptionError, "n_samples"),
        ({"id_range": [5, 9]}, TaskSetError, r"\[5, 9\)"),
        ({"id_range": [1]}, OptionError, "id_range"),
        ({"routing_strategy": "single:2"}, UnknownStrategy, "single:2"),
        ({"wandb_artifact": "a:b"}, ArtifactError, "entity/project/name:version"),
        ({"wandb_artifact": "a/b/c:v0", "adapter_path": "d"}, OptionError, "only one can be the checkpoint"),
        ({"backend": "hf", "seed": 3}, OptionError, "seed: options of the backend peft_moe"),
    ],
)
def test_impossible_options_of_run_codegen_are_named(generate, options, error, word):
    with pytest.raises(error, match=word):
        generate(**options)


def test_second_writer_is_refused(generate):
    from filelock import FileLock

    path = generate()
    with FileLock(path.with_suffix(".lock")), pytest.raises(SampleFileError, match="another process"):
        generate(n_samples=2)


def test_unknown_backend_is_what_evalplus_makes_of_it():
    assert make_model("m", "no such backend", "humaneval") is None


STOCK_BEFORE_AND_AFTER_US = """
import json, sys
from pathlib import Path
from evalplus.codegen import run_codegen
options = json.loads(sys.argv[1])
root = Path(options.pop("root"))
run_codegen(**options, root=str(root / "stock"))
assert not [name for name in sys.modules if name.startswith("dylo_moe")]
import dylo_moe.evalplus
from evalplus.provider.utility import EOS
before = list(EOS)
ours = dylo_moe.evalplus.make_model(options["model"], "peft_moe", "mbpp", dtype="float32", max_new_tokens=4)
ours.codegen("x", do_sample=False, num_samples=1)
assert EOS == before
dylo_moe.evalplus.run_codegen(**options, root=str(root / "after us"))
"""


def test_hf_backend_writes_the_same_with_and_without_us_and_we_write_the_same_as_it(base, tasks, tmp_path, generate):
    model = tmp_path / "model"
    write_base(model, "llama")
    configuration = json.loads((model / "generation_config.json").read_text())
    configuration["eos_token_id"] = list(range(0, 384, 9))  # keeps EvalPlus's 768 new tokens short
    (model / "generation_config.json").write_text(json.dumps(configuration))
    options = {"model": str(model), "dataset": "humaneval", "backend": "hf", "dtype": "float32", "greedy": True}
    command = [sys.executable, "-c", STOCK_BEFORE_AND_AFTER_US, json.dumps({**options, "root": str(tmp_path)})]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, env=dict(os.environ))
    assert done.returncode == 0, done.stderr[-2000:]
    places = {name: tmp_path / name for name in ("stock", "after us")}
    files = {n: {path.relative_to(place): path.read_bytes() for path in place.rglob("*.jsonl")} for n, place in places.items()}
    assert len(files["stock"]) == 2
    assert files["stock"] == files["after us"]
    # Its later prompts may be cut short by the stop criteria of earlier ones, so only the first text is comparable.
    (stock,) = (tmp_path / "stock").rglob("*.raw.jsonl")
    ours = generate(model=model, greedy=True, max_new_tokens=768)
    assert raw(ours)[0] == rows(stock)[0]
    assert len(raw(ours)[0][1]) > len(FOUR[0].prompt("humaneval"))
