"""One run of pytest over the check files, on one bench, apart from whatever pytest configuration the user's directory has."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

from harness import outcome
from harness.bench import Bench
from harness.catalogue import PREFIX, Law
from harness.plugin import JudgePlugin

INI = f"[pytest]\npython_files = *.py\npython_functions = {PREFIX}*\npython_classes =\n"
# What the environment could otherwise slip in.
FOREIGN_SETTINGS = ("PYTEST_ADDOPTS", "PYTEST_PLUGINS", "PYTEST_DEBUG")


def run_checks(bench: Bench, laws: Sequence[Law], notify: Callable[[dict], None] = lambda result: None) -> list[dict]:
    """Runs the laws' checks on the bench; returns one result per law, as verdict.json has them.

    A law whose check never came to a result (its file cannot be imported, its fixture is unknown, it called pytest.skip) is an
    error that is the judge's own, with what pytest said as its message.
    """
    plugin = JudgePlugin(bench, {law.id for law in laws}, notify)
    with _isolated() as ini:
        files = sorted({str(law.file) for law in laws})
        try:
            code = pytest.main([*_options(ini), *files], plugins=[plugin])
        finally:
            _forget(files)
    if plugin.interrupted:  # pytest itself ends quietly at Ctrl-C
        raise KeyboardInterrupt
    done = {result["id"]: result for result in plugin.results}
    silent = "; ".join(plugin.judge_failures) or f"pytest ended with code {int(code)} and no result of this check"
    results = []
    for law in laws:
        if law.id not in done:
            done[law.id] = _no_result(law, silent)
            notify(done[law.id])
        results.append({**done[law.id], "statement": law.statement})
    return results


def _options(ini: Path) -> list[str]:
    return [
        # pytest names a module by its path below this and takes a module of that name that it finds: json.py would be json.
        f"--rootdir={ini.anchor}",
        "-c",
        str(ini),
        "--noconftest",
        "--import-mode=importlib",
        "--capture=sys",  # the progress display keeps the real stdout
        *(
            part
            for plugin in ("cacheprovider", "terminal", "junitxml", "warnings", "stepwise")
            for part in ("-p", f"no:{plugin}")
        ),
    ]


@contextmanager
def _isolated() -> Iterator[Path]:
    """A private pytest.ini, no plugins but pytest's own, no options from the environment."""
    before = dict(os.environ)
    with tempfile.TemporaryDirectory() as directory:
        ini = Path(directory) / "pytest.ini"
        ini.write_text(INI, encoding="utf-8")
        for name in FOREIGN_SETTINGS:
            os.environ.pop(name, None)
        os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
        try:
            yield ini
        finally:
            for name in (*FOREIGN_SETTINGS, "PYTEST_DISABLE_PLUGIN_AUTOLOAD"):
                if name in before:
                    os.environ[name] = before[name]
                else:
                    os.environ.pop(name, None)


def _forget(files: Sequence[str]) -> None:
    """Takes check files outside this package out of sys.modules, so that the next run reads them again."""
    for name, module in list(sys.modules.items()):
        if getattr(module, "__file__", None) in files and not name.startswith("harness."):
            del sys.modules[name]


def _no_result(law: Law, said: str) -> dict:
    return {
        "id": law.id,
        "outcome": outcome.ERROR,
        "statement": law.statement,
        "seconds": 0.0,
        "message": said,
        "blame": "judge",
        "evidence": {},
    }
