"""Every exit code comes out of a real run of the command; a user's mistake is one line; the user's pytest is kept out."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from harness.cli import main
from harness.specimens import write_base, write_checkpoint

PASSING = '''
def check_law(bench):
    """Something holds.

    Reason: because.
    Tolerance: exact.
    """
    bench.evidence(number=float("inf"))
'''


@pytest.fixture(scope="module")
def specimen(tmp_path_factory):
    directory = tmp_path_factory.mktemp("specimen")
    return write_checkpoint(directory / "moe", write_base(directory / "base", "llama"), num_experts=2)


@pytest.fixture
def command(specimen, tmp_path, monkeypatch, capsys):
    """Runs the command on one check file, in an empty directory; returns (exit code, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)

    def run(source, *arguments, checkpoint=specimen):
        checks = tmp_path / "laws"
        checks.mkdir(exist_ok=True)
        (checks / "mine.py").write_text(textwrap.dedent(source))
        code = main(["--checks", str(checks), "--subject", "naive-loop", "--checkpoint", str(checkpoint), *arguments])
        return code, *capsys.readouterr()

    return run


def result(tmp_path, place="validation/verdict.json"):
    return json.loads((tmp_path / place).read_text())["checkpoints"][0]["checks"][0]


def test_law_that_holds_exits_0_and_writes_verdict_and_report(command, tmp_path):
    code, out, err = command(PASSING)
    assert (code, err) == (0, "")
    assert "PASS" in out
    assert sorted(path.name for path in (tmp_path / "validation").iterdir()) == ["report.html", "verdict.json"]
    assert result(tmp_path)["evidence"] == {"number": "inf"}


def body(line):
    return f'import harness.compare, harness.outcome\ndef check_law(bench):\n    """S."""\n    {line}\n'


@pytest.mark.parametrize(
    ("line", "code", "outcome"),
    [
        ("harness.compare.assert_within(1.0, 2.0, 0.1, what='logits')", 1, "fail"),
        ("assert 1 == 2", 1, "fail"),
        ("bench.model(no_such_option=1)", 1, "error"),
        ("bench.model.no_such_method()", 1, "error"),
        ("harness.compare.assert_within(1.0, 1.0, 1.0, effect=2.0)", 4, "void"),
        ("raise harness.outcome.Inconclusive('noise')", 4, "inconclusive"),
        ("1 / 0", 3, "error"),
        ("import pytest; pytest.skip('quietly')", 3, "error"),
    ],
)
def test_outcome_and_exit_code(command, tmp_path, line, code, outcome):
    found, out, err = command(body(line))
    assert (found, result(tmp_path)["outcome"]) == (code, outcome), out + err
    if code:
        assert "mine.law" in out
        assert "--only mine.law" in out


def test_run_in_which_no_check_applied_is_undecided_and_says_so(command, tmp_path):
    found, out, _ = command(body("raise harness.outcome.NotApplicable('no router')"))
    assert (found, result(tmp_path)["outcome"]) == (4, "not applicable")
    assert "no check applied" in out


@pytest.mark.parametrize("source", ["import no_such_module\n" + PASSING, PASSING.replace("(bench)", "(bench, other)")])
def test_check_that_cannot_run_is_the_judges_failure_and_not_a_silence(command, tmp_path, source):
    assert command(source)[0] == 3
    assert "no_such_module" in result(tmp_path)["message"] or "other" in result(tmp_path)["message"]


def unusable(command, *arguments, checkpoint=None, source=PASSING):
    code, out, err = command(source, *arguments, **({"checkpoint": checkpoint} if checkpoint else {}))
    assert code == 2, out + err
    assert len(err.splitlines()) == 1, err
    assert "Traceback" not in out + err
    return err


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["--no-such-option"], "--no-such-option"),
        (["--devic", "cpu"], "--devic"),
        (["--device", "tpu"], "tpu"),
        (["--seed", "-1"], "--seed"),
        (["--only", "mine.lax"], "did you mean mine.law"),
        (["--explain", "mine.lax"], "did you mean mine.law"),
        (["--subject", "no-such-subject"], "naive-loop"),
        (["--expect-hash", "0" * 64], "hash"),
        (["--gate", "no-such-file.toml"], "no-such-file.toml"),
        (["--baseline", "no-such-file.json"], "no-such-file.json"),
        (["--update-baseline"], "not in a git repository"),
        (["--html", "/proc/no/report.html"], "--html"),
    ],
)
def test_mistake_on_the_command_line_is_one_line_and_exit_2(command, arguments, word):
    assert word in unusable(command, *arguments)


@pytest.mark.skipif("torch" in sys.modules and sys.modules["torch"].cuda.is_available(), reason="this machine has a CUDA device")
def test_cuda_without_a_device_is_one_line(command):
    assert "CUDA" in unusable(command, "--device", "cuda")


def test_missing_checkpoint_is_one_line(command, tmp_path):
    assert "no-such-directory" in unusable(command, checkpoint=tmp_path / "no-such-directory")


@pytest.mark.parametrize("subject", ["dylo-moe", "naive-loop"])
def test_damaged_checkpoint_is_one_line_naming_file_and_field(command, specimen, tmp_path, subject):
    broken = tmp_path / "broken"
    shutil.copytree(specimen, broken)
    config = json.loads((broken / "moe_config.json").read_text())
    (broken / "moe_config.json").write_text(json.dumps({**config, "num_experts": "two"}))
    error = unusable(command, "--subject", subject, checkpoint=broken)
    assert "moe_config.json" in error and "num_experts" in error


def test_output_inside_the_checkpoint_is_refused_and_nothing_is_written(command, specimen):
    assert "inside the checkpoint" in unusable(command, "--json", str(specimen / "v.json"))
    assert not (specimen / "v.json").exists()
    assert "inside the checkpoint" in unusable(command, "--keep", str(specimen / "kept"))
    assert not (specimen / "kept").exists()


@pytest.mark.parametrize("source", ["import sys\nsys.exit(0)", "1 / 0", "def (", "import sys\ndef make():\n    sys.exit(0)"])
def test_subject_that_cannot_be_made_is_one_line(command, tmp_path, monkeypatch, source):
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "broken_subject", raising=False)
    (tmp_path / "broken_subject.py").write_text(source)
    assert "broken_subject:make" in unusable(command, "--subject", "broken_subject:make")


LEAVING = """
import pathlib, sys
from harness.outcome import NotApplicable
class Leaving:
    name, calls = "leaving", 0
    def load(self, checkpoint, **options):
        self.calls += 1
        if self.calls > 1:  # not when it is loaded before judging
            {how}
        import torch
        return torch.nn.Linear(1, 1)
make = Leaving
"""


@pytest.mark.parametrize(
    ("how", "code", "told"),
    [
        ("sys.exit(0)", 1, "SystemExit: 0"),
        ("raise SystemExit", 1, "SystemExit"),
        ("raise KeyboardInterrupt", 130, "interrupted, no verdict"),
        ("raise NotApplicable('not mine')", 1, "excused itself"),
        ("file = pathlib.Path(checkpoint) / 'note.txt'; file.write_text('changed')", 4, "changed while they were judged"),
    ],
)
def test_subject_that_leaves_in_the_middle_does_not_pass(command, specimen, tmp_path, monkeypatch, how, code, told):
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "leaving_subject", raising=False)
    (tmp_path / "leaving_subject.py").write_text(LEAVING.replace("{how}", how))
    shutil.copytree(specimen, tmp_path / "copy")
    source = PASSING + "    bench.fresh_model()\n"
    found, out, err = command(source, "--subject", "leaving_subject:make", checkpoint=tmp_path / "copy")
    assert found == code, out + err
    assert told in out + err
    assert "Traceback" not in out + err


def test_judging_leaves_the_checkpoint_as_it_was(command, specimen):
    before = {path: path.stat().st_mtime_ns for path in specimen.rglob("*")}
    command(PASSING)
    assert {path: path.stat().st_mtime_ns for path in specimen.rglob("*")} == before


def test_expected_hash_is_accepted(command, tmp_path):
    command(PASSING)
    found = json.loads((tmp_path / "validation/verdict.json").read_text())["checkpoints"][0]["hash"]
    assert command(PASSING, "--expect-hash", found)[0] == 0


def test_every_output_is_written_where_it_is_asked(command, tmp_path):
    command(PASSING, "--json", "a/v.json", "--html", "a/r.html", "--junit-xml", "a/j.xml", "--markdown", "a/m.md")
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == ["j.xml", "m.md", "r.html", "v.json"]
    assert not (tmp_path / "validation").exists()


def test_only_takes_globs_and_lists(command, tmp_path):
    source = PASSING + PASSING.replace("check_law", "check_other") + PASSING.replace("check_law", "check_third")
    command(source, "--only", "mine.o*,mine.third")
    checks = json.loads((tmp_path / "validation/verdict.json").read_text())["checkpoints"][0]["checks"]
    assert [check["id"] for check in checks] == ["mine.other", "mine.third"]


def test_check_file_named_like_a_library_is_itself(command, tmp_path):
    (tmp_path / "laws").mkdir()
    (tmp_path / "laws" / "json.py").write_text(PASSING)
    assert command(PASSING, "--only", "json.law")[0] == 0


def test_list_and_explain_print_the_docstring(command):
    assert command(PASSING, "--list")[1].split() == ["mine.law", "Something", "holds."]
    out = command(PASSING, "--explain", "mine.law")[1]
    for told in ("Something holds.", "because.", "exact.", "required"):
        assert told in out


def test_full_disk_behind_stdout_is_one_line_and_no_verdict():
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-m", "harness.cli", "--list"]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 3
    assert done.stderr == "validate_moe_modifications: standard output: No space left on device, no verdict\n"


def test_explain_tells_the_thresholds_that_the_tolerance_names(command):
    out = command(PASSING.replace("exact", "time_band and nothing else"), "--explain", "mine.law")[1]
    assert "time_band = 0.25" in out
    assert "count_band" not in out


def test_baseline_that_was_better_makes_the_run_fail(command, tmp_path):
    assert command(PASSING, "--json", "before.json")[0] == 0
    assert command(PASSING, "--baseline", "before.json")[0] == 0
    worse = body("raise harness.outcome.NotApplicable('gone')")
    code, out, _ = command(worse, "--baseline", "before.json")
    assert code == 1
    assert "was pass in the baseline, is not applicable" in out


def test_update_baseline_writes_one_from_a_clean_tagged_tree(command, tmp_path):
    identity = ["-c", "user.name=t", "-c", "user.email=t@example.org", "-c", "commit.gpgsign=false", "-c", "tag.gpgsign=false"]
    (tmp_path / ".gitignore").write_text("*\n")
    for step in (["init", "-q"], ["commit", "-q", "--allow-empty", "-m", "one"], ["tag", "v1"]):
        subprocess.run(["git", *identity, *step], check=True, capture_output=True)
    assert command(PASSING, "--update-baseline", "base.json")[0] == 0
    written = json.loads((tmp_path / "base.json").read_text())
    assert written["commit"]["tag"] == "v1"


def test_users_pytest_settings_do_not_reach_the_judge(command, tmp_path, monkeypatch):
    (tmp_path / "pytest.ini").write_text("[pytest]\naddopts = --no-such-option\n")
    (tmp_path / "laws").mkdir()
    (tmp_path / "laws" / "conftest.py").write_text("raise SystemExit('conftest ran')\n")
    monkeypatch.setenv("PYTEST_ADDOPTS", "--collect-only")
    monkeypatch.setenv("PYTEST_PLUGINS", "no_such_plugin")
    assert command(PASSING)[0] == 0
    assert os.environ["PYTEST_ADDOPTS"] == "--collect-only"


def test_hostile_message_reaches_the_terminal_on_one_line_without_escapes(command):
    code, out, _ = command(body(r"raise AssertionError('\x1b[2J[bold]x[/nonsense]\n\nsecond')"), "--verbose")
    assert code == 1
    assert "\x1b" not in out
    assert "[bold]x[/nonsense] second" in out


def test_installed_command_exits_with_the_verdict_and_prints_no_traceback(tmp_path):
    program = Path(sys.executable).parent / "validate_moe_modifications"
    done = subprocess.run([program, "--checkpoint", "nowhere"], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    # Whatever imports PEFT on a CPU with AVX512-BF16 says so, where bitsandbytes is installed.
    (line,) = (line for line in done.stderr.splitlines() if "gemm_4bit_forward" not in line)
    assert line.startswith("validate_moe_modifications: ")
