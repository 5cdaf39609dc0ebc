"""The command: files that hold what the schema says, a page that a browser shows, hostile text as text, mistakes in one line."""

from __future__ import annotations

import json
from dataclasses import replace
from importlib.resources import files

import jsonschema
import numpy as np
import pytest
from transformers import AutoTokenizer

from dylo_moe import PeftMoEDecoder
from dylo_moe.routes.analysing import silently
from dylo_moe.routes.observing import observe
from dylo_moe.routes.texts import Text
from dylo_moe.routes.tokens import encode
from dylo_moe.routing_analysis import analyse_checkpoint, complete_texts, main
from harness.specimens import write_arrow_checkpoint, write_base, write_checkpoint
from harness.specimens.tasks import TASKS, write_task_set
from tests.browser import assert_readable, look

HOSTILE = "<script>alert(1)</script>"
SCHEMA = json.loads(files("dylo_moe.routes").joinpath("routing_analysis.schema.json").read_text())


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("command")
    base = write_base(root / "base", "llama")
    write_checkpoint(root / "hybrid", base, num_experts=4)
    write_arrow_checkpoint(root / "arrow", base, num_experts=3)
    write_checkpoint(root / "bag", base, num_experts=2, router=False)
    write_task_set(root, "humaneval", TASKS[:3])
    lines = [{"task_id": f"{HOSTILE} {n}", "text": f"{HOSTILE}\u202e\x00 \"'&amp;\n{n}", "completion": "<!--"} for n in range(14)]
    (root / "texts.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return root


@pytest.fixture
def humaneval(root, monkeypatch):
    monkeypatch.setenv("HUMANEVAL_OVERRIDE_PATH", str(root / "humaneval.jsonl"))


def run(capsys, *words):
    code = main([str(word) for word in words])
    return code, *capsys.readouterr()


def test_task_set_with_generated_answers_gives_all_files(root, humaneval, tmp_path, capsys):
    words = ("--dataset", "humaneval", "--max_samples", 2, "--generate", 3, "--output-dir", tmp_path / "out", "--bs", 1)
    code, out, _ = run(capsys, "--model", root / "arrow", "--dtype", "float32", *words)
    assert code == 0
    document = json.loads((tmp_path / "out" / "routing_analysis.json").read_text())
    jsonschema.validate(document, SCHEMA)
    assert [task["task"] for task in document["tasks"]] == ["HumanEval/0", "HumanEval/1"]
    assert document["completion_tokens"] > 0 and document["checkpoint"]["format"] == "peft-arrow"
    assert len(document["layers"]) == 8 and document["layers"][0]["layer"] == "model.layers.0.self_attn.q_proj"
    assert "3 experts; router gates on features layer, top_k 2" in out and "expert_" in out or "task_0" in out
    pictures = {"experts_by_task", "experts_by_position", "experts_by_layer", "load", "decisions"}
    assert {path.stem for path in (tmp_path / "out").glob("*.png")} == pictures
    assert all((tmp_path / "out" / f"{name}.png").read_bytes().startswith(b"\x89PNG") for name in pictures)
    seen = look(tmp_path / "out" / "routing_analysis.html", "figure img", ".tokens span", "table", ".chip")
    assert_readable(seen)
    assert seen.visible == {"figure img": 5, ".tokens span": document["tokens"], "table": 7, ".chip": 3}


def test_answers_are_written_together_and_are_those_written_alone_with_the_same_weights_of_every_token(root):
    options = {"dtype": "float32", "temperature": 0.0, "max_new_tokens": 6, "batch_size": None}
    decoder = PeftMoEDecoder(str(root / "hybrid"), "humaneval", **options)
    texts = [Text(name, "x = 1\n" * length) for name, length in (("a", 2), ("b", 9), ("a", 4), ("c", 2))]
    rows = []
    hook = decoder.model.causal_lm.lm_head.register_forward_hook(lambda module, inputs, output: rows.append(len(output)))
    together = complete_texts(decoder, texts, silently)
    hook.remove()
    assert max(rows) == 3, "one row for each prompt that is another one"
    alone = [replace(text, completion=decoder.codegen(text.prompt, do_sample=False, num_samples=1)[0]) for text in texts]
    assert together == alone and len({text.completion for text in alone}) == 3
    tokens = encode(decoder, together, ["a", "b", "c"]).tokens
    many, one = (dict(observe(decoder.model, tokens, texts_per_pass)) for texts_per_pass in (4, 1))
    for number, text in enumerate(tokens):
        assert len(one[number].weights) == len(text.ids) > text.prompt_length
        np.testing.assert_allclose(many[number].weights, one[number].weights, rtol=0, atol=2e-5)


def test_hostile_texts_and_names_are_shown_and_not_interpreted(root, tmp_path, capsys):
    code, out, _ = run(
        capsys,
        "--model",
        root / "hybrid",
        "--dtype",
        "float32",
        "--texts",
        root / "texts.jsonl",
        "--output-dir",
        tmp_path,
        "--show",
        1,
    )
    assert code == 0
    page = tmp_path / "routing_analysis.html"
    assert "<script" not in page.read_text() and "\x00" not in page.read_text() and "\u202e" not in page.read_text()
    seen = look(page, ".tokens span", ".tokens sup", ".tokens hr", "details", "script")
    assert_readable(seen)
    assert f"{HOSTILE} 13" in seen.text and "1 of 14 texts are shown" in seen.text
    assert "\\xe2" in seen.text.replace("\n", "") and "\\x00" in seen.text  # the parts of U+202E, which turns the text around
    document = json.loads((tmp_path / "routing_analysis.json").read_text())
    jsonschema.validate(document, SCHEMA)
    assert seen.visible[".tokens span"] == document["tasks"][0]["tokens"]
    assert seen.visible[".tokens hr"] == 1 and seen.visible[".tokens sup"] > 1 and seen.visible["details"] == 1


def test_samples_are_looked_at_and_json_goes_to_stdout_alone(root, humaneval, tmp_path, capsys):
    samples = tmp_path / "samples.jsonl"
    samples.write_text(json.dumps({"task_id": "HumanEval/1", "completion": "    return 1\n"}) + "\n")
    words = ("--dataset", "humaneval", "--samples", samples, "--output-dir", tmp_path / "out", "--json")
    code, out, err = run(capsys, "--model", root / "hybrid", "--dtype", "float32", *words)
    document = json.loads(out)
    assert code == 0 and document == json.loads((tmp_path / "out" / "routing_analysis.json").read_text())
    assert document["completion_tokens"] > 0 and document["texts"]["source"].endswith(f"with {samples}")
    assert "routing_analysis.html" in err


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (("--model", "{root}/bag", "--texts", "{root}/texts.jsonl"), "without a router"),
        (("--model", "{root}/hybrid", "--texts", "{root}/missing.txt"), "missing.txt"),
        (("--model", "{root}/nowhere", "--texts", "{root}/texts.jsonl"), "nowhere"),
        (("--texts", "{root}/texts.jsonl"), "--model or --wandb-artifact"),
        (("--model", "{root}/hybrid", "--texts", "{root}/texts.jsonl", "--bs", "0"), "--bs 0"),
        (("--model", "{root}/hybrid"), "--dataset --texts is required"),
    ],
)
def test_mistake_is_one_line_and_exit_code_2(root, words, line, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    try:
        code = main([word.format(root=root) for word in words])
    except SystemExit as left:
        code = left.code
    err = capsys.readouterr().err
    assert code == 2 and line in err and err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_tasks_are_asked_in_the_chat_template_and_lines_of_a_file_are_bare(humaneval, tmp_path):
    base = write_base(tmp_path / "base", "llama", chat_template=True)
    write_checkpoint(tmp_path / "checkpoint", base, num_experts=2)
    (tmp_path / "lines.txt").write_text("one line\n")
    options = {"model": str(tmp_path / "checkpoint"), "dtype": "float32", "max_samples": 1}
    tokenizer = AutoTokenizer.from_pretrained(base)
    lines = analyse_checkpoint({**options, "texts": str(tmp_path / "lines.txt")})
    assert lines.document["tokens"] == len(tokenizer("one line")["input_ids"])
    chat, bare = (analyse_checkpoint({**options, "dataset": "humaneval", "force_base_prompt": bare}) for bare in (False, True))
    assert bare.document["tokens"] == len(tokenizer(TASKS[0].prompt("humaneval"))["input_ids"])
    said = "".join(piece.text for piece in chat.shown[0].pieces)
    assert "self-contained·Python·script" in said and "self-contained" not in "".join(p.text for p in bare.shown[0].pieces)


def test_help_needs_no_torch():
    import subprocess
    import sys

    code = "import sys, dylo_moe.routing_analysis as r; assert not {'torch', 'matplotlib', 'jinja2', 'rich'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
