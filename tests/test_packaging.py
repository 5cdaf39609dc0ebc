"""The wheel holds dylo_moe and harness and nothing else, and the tests run what it installed."""

from __future__ import annotations

import json
import tomllib
from importlib import metadata
from pathlib import Path

import pytest

import dylo_moe
import harness

ROOT = Path(__file__).resolve().parents[1]


def is_editable() -> bool:
    return (
        json.loads(metadata.distribution("dylo-moe").read_text("direct_url.json") or "{}")
        .get("dir_info", {})
        .get("editable", False)
    )


def test_installed_files_are_dylo_moe_and_harness_only():
    if is_editable():
        pytest.skip("dylo-moe is installed in editable mode: tox installs the wheel")
    tops = {file.parts[0] for file in metadata.files("dylo-moe") if file.parts[0] != ".."}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"dylo_moe", "harness"}


def test_tests_import_what_is_installed():
    if is_editable():
        pytest.skip("dylo-moe is installed in editable mode: tox installs the wheel")
    for package in (dylo_moe, harness):
        assert not Path(package.__file__).resolve().is_relative_to(ROOT / "src"), package.__file__
        assert "site-packages" in package.__file__, package.__file__


def test_versions_agree():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert dylo_moe.__version__ == project["version"] == metadata.version("dylo-moe")
    assert f"## {project['version']}" in (ROOT / "CHANGELOG.md").read_text()


def test_both_commands_are_installed():
    scripts = {point.name: point.value for point in metadata.distribution("dylo-moe").entry_points}
    assert scripts == {"validate_moe_modifications": "harness.cli:main", "dylo-moe": "dylo_moe.cli:main"}
