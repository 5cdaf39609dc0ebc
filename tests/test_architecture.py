"""Imports flow one way. Each rule is shown to be able to fail on a tree that breaks it."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ORACLE_IMPORTS = {
    "numpy",
    "math",
    "fractions",
    "dataclasses",
    "collections",
    "collections.abc",
    "itertools",
    "typing",
    "__future__",
}
MAX_LINES = 400

# Each file of the judged imports only those before it.
JUDGED_ORDER = (
    "errors",
    "memory",
    "formats",
    "quantised",
    "config",
    "router",
    "gates",
    "spread",
    "sums",
    "plain",
    "gradients",
    "held",
    "threads",
    "mixture",
    "routed",
    "replaced",
    "feed_forward",
    "xlora_router",
    "routers",
    "siblings",
    "routable",
    "guard",
    "caches",
    "row_cache",
    "paired_cache",
    "pair_cost",
    "sampling",
    "guessable",
    "guesser",
    "guess",
    "guessing",
    "answering",
    "sight",
    "row_routes",
    "routing",
    "expert",
    "strategies",
    "saving",
    "model",
    "adapters",
    "repeated",
    "building",
    "loading",
    "atomic",
    "pages",
    "statistics",
    "identity",
    "stopping",
    "penalties",
    "batch",
    "batching",
    "completions",
    "prompts",
    "sandbox",
    "workplace",
    "worker",
    "artifact",
    "decoder",
    "opened",
    "tasks",
    "sanitizing",
    "journal_lines",
    "journal",
    "samples",
    "progress",
    "recording",
    "shards",
    "generating",
    "cluster",
    "cluster_worker",
    "crew",
    "spreading",
    "comparison",
    "bounded",
    "truth",
    "checking",
    "scoring",
    "results",
    "evaluation",
    "evalplus",
    "pruning",
    "merging",
    "expressing",
    "conversion",
    "inventory",
    "routes",
    "expertise",
    "benchmarks",
    "command_line",
    "benchmark",
    "routing_analysis",
    "expert_analysis",
    "cli",
)


def modules_of(root: Path, package: str) -> dict[str, Path]:
    """Dotted name -> file of every module of a package."""
    home = root / "src" / package if (root / "src" / package).is_dir() else root / package
    found = {}
    for path in sorted(home.rglob("*.py")):
        parts = [package, *path.relative_to(home).with_suffix("").parts]
        found[".".join(part for part in parts if part != "__init__")] = path
    return found


def imports_of(path: Path, module: str) -> set[str]:
    """Dotted names that a file imports at run time, wherever in the file; TYPE_CHECKING blocks do not run."""
    tree = ast.parse(path.read_text())
    type_only = {
        id(node)
        for block in ast.walk(tree)
        if isinstance(block, ast.If) and ast.unparse(block.test).endswith("TYPE_CHECKING")
        for statement in block.body
        for node in ast.walk(statement)
    }
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    names: set[str] = set()
    for node in ast.walk(tree):
        if id(node) in type_only:
            continue
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            prefix = package.rsplit(".", node.level - 1)[0] + "." if node.level else ""
            source = f"{prefix}{node.module or ''}".rstrip(".")
            names |= {f"{source}.{alias.name}" for alias in node.names}
    return names


def import_graph(root: Path, package: str) -> dict[str, set[str]]:
    """Module -> the modules that it names. `from package import module` names the module, not the package's __init__."""
    modules = modules_of(root, package)

    def homes(names: set[str]) -> set[str]:
        return {name if name in modules else name.rpartition(".")[0] for name in names} & set(modules)

    return {name: homes(imports_of(path, name)) - {name} for name, path in modules.items()}


def circles(graph: dict[str, set[str]]) -> list[str]:
    """Modules that reach themselves. A package's __init__ counts only for what imports it by name."""

    def reached(start: str) -> set[str]:
        seen: set[str] = set()
        todo = list(graph[start])
        while todo:
            name = todo.pop()
            if name not in seen:
                seen.add(name)
                todo += graph[name]
        return seen

    return sorted(name for name in graph if name in reached(name))


def upward_imports(root: Path) -> list[str]:
    """Imports of the judged against JUDGED_ORDER, and from any of its layers into what is built on top of them."""
    rank = {layer: position for position, layer in enumerate(JUDGED_ORDER)}
    found = []
    for module, targets in import_graph(root, "dylo_moe").items():
        for target in targets - {"dylo_moe"}:
            if module == "dylo_moe":
                continue
            here, there = module.split(".")[1], target.split(".")[1]
            if here in rank and rank[here] < rank.get(there, len(rank)):
                found.append(f"{module} imports {target}")
    return sorted(found)


def wrong_owners(root: Path) -> list[str]:
    """The judged knows no judge, the judge knows no tests, and the judge sees the judged only through its public names."""
    found = []
    public = {"dylo_moe", "dylo_moe.errors", "dylo_moe.evalplus"}
    judged = modules_of(root, "dylo_moe")
    for module, path in judged.items():
        outside = {name.split(".")[0] for name in imports_of(path, module)}
        found += [f"{module} imports {name}" for name in outside & {"harness", "fixtures", "tests"}]
    for module, path in modules_of(root, "harness").items():
        for name in imports_of(path, module):
            if name.split(".")[0] in {"fixtures", "tests"}:
                found.append(f"{module} imports {name}")
            home = name.rpartition(".")[0] if name not in public else name
            if name.startswith("dylo_moe.") and name not in public and (name in judged or home not in public):
                found.append(f"{module} imports {name}")
    return sorted(found)


def unordered_files(root: Path) -> list[str]:
    """Files of the judged that JUDGED_ORDER does not place; a *_worker.py is a program of its own."""
    layers = {name.split(".")[1] for name in modules_of(root, "dylo_moe") if "." in name}
    return sorted(name for name in layers if name not in JUDGED_ORDER and not name.endswith("_worker"))


def impure_oracles(root: Path) -> list[str]:
    found = []
    for module, path in modules_of(root, "harness").items():
        if module.startswith("harness.oracles"):
            for name in imports_of(path, module):
                home = name if name in ORACLE_IMPORTS else name.rpartition(".")[0]
                if home not in ORACLE_IMPORTS and not name.startswith("harness.oracles"):
                    found.append(f"{module} imports {name}")
    return sorted(found)


def long_files(root: Path) -> list[str]:
    paths = [p for package in ("dylo_moe", "harness", "fixtures") for p in modules_of(root, package).values()]
    return sorted(f"{p.relative_to(root)}: {n} lines" for p in paths if (n := len(p.read_text().splitlines())) > MAX_LINES)


@pytest.mark.parametrize("package", ["dylo_moe", "harness", "fixtures"])
def test_package_has_modules_and_no_import_circle(package):
    graph = import_graph(ROOT, package)
    assert len(graph) > 3
    assert circles(graph) == []


def test_judged_imports_only_downwards():
    assert upward_imports(ROOT) == []


def test_every_file_of_the_judged_has_its_place_in_the_order():
    assert unordered_files(ROOT) == []


def test_file_without_a_place_is_found(tmp_path):
    assert unordered_files(tree(tmp_path, {"src/dylo_moe/extra.py": "", "src/dylo_moe/errors.py": ""})) == ["extra"]


def test_judge_and_judged_keep_apart():
    assert wrong_owners(ROOT) == []


def test_oracles_import_numpy_and_the_standard_library_only():
    assert any(name.startswith("harness.oracles.") for name in modules_of(ROOT, "harness"))
    assert impure_oracles(ROOT) == []


def test_files_stay_short():
    assert long_files(ROOT) == []


def test_public_names_are_importable_and_nothing_else_is_public():
    import dylo_moe

    assert {name for name in dylo_moe.__all__ if getattr(dylo_moe, name) is None} == set()
    design = {
        *("detect_model_format", "load_checkpoint", "attach_router", "detach_router", "MoELoraConfig"),
        *("DyLoRA_MoE", "ExpertManager", "DynamicHybridRouter", "PeftMoEDecoder"),
    }
    assert design <= set(dylo_moe.__all__)


def tree(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def test_circle_is_found(tmp_path):
    root = tree(tmp_path, {"src/dylo_moe/a.py": "from dylo_moe import b", "src/dylo_moe/b.py": "def f():\n    import dylo_moe.a"})
    assert circles(import_graph(root, "dylo_moe")) == ["dylo_moe.a", "dylo_moe.b"]


def test_relative_import_is_seen(tmp_path):
    root = tree(tmp_path, {"src/dylo_moe/a.py": "from . import b", "src/dylo_moe/b.py": "from .a import x"})
    assert circles(import_graph(root, "dylo_moe")) == ["dylo_moe.a", "dylo_moe.b"]


def test_upward_import_is_found(tmp_path):
    root = tree(tmp_path, {"src/dylo_moe/router.py": "from dylo_moe.model import M", "src/dylo_moe/model.py": ""})
    assert upward_imports(root) == ["dylo_moe.router imports dylo_moe.model"]


def test_import_of_what_is_built_on_top_is_found(tmp_path):
    root = tree(tmp_path, {"src/dylo_moe/model.py": "import dylo_moe.decoder", "src/dylo_moe/decoder.py": ""})
    assert upward_imports(root) == ["dylo_moe.model imports dylo_moe.decoder"]


def test_type_checking_import_is_not_an_import(tmp_path):
    text = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from dylo_moe.model import M"
    root = tree(tmp_path, {"src/dylo_moe/router.py": text, "src/dylo_moe/model.py": ""})
    assert upward_imports(root) == []


@pytest.mark.parametrize(
    ("files", "line"),
    [
        ({"src/dylo_moe/a.py": "import harness.gate"}, "dylo_moe.a imports harness"),
        ({"harness/a.py": "from tests.x import y"}, "harness.a imports tests.x.y"),
        (
            {"src/dylo_moe/routed.py": "", "harness/a.py": "from dylo_moe.routed import RoutedLinear"},
            "harness.a imports dylo_moe.routed.RoutedLinear",
        ),
        ({"src/dylo_moe/routed.py": "", "harness/a.py": "from dylo_moe import routed"}, "harness.a imports dylo_moe.routed"),
    ],
)
def test_reach_past_the_public_names_is_found(tmp_path, files, line):
    assert line in wrong_owners(tree(tmp_path, files))


def test_public_imports_of_the_judge_are_allowed(tmp_path):
    lines = ("from dylo_moe import load_checkpoint", "from dylo_moe.errors import CheckpointError")
    text = "\n".join((*lines, "from dylo_moe.evalplus import evaluate"))
    root = tree(tmp_path, {"harness/a.py": text, "src/dylo_moe/errors.py": "", "src/dylo_moe/evalplus.py": ""})
    assert wrong_owners(root) == []


@pytest.mark.parametrize("text", ["import torch", "from peft import LoraConfig", "from dylo_moe import router"])
def test_impure_oracle_is_found(tmp_path, text):
    assert impure_oracles(tree(tmp_path, {"harness/oracles/a.py": text})) != []


def test_long_file_is_found(tmp_path):
    assert long_files(tree(tmp_path, {"harness/a.py": "x = 1\n" * (MAX_LINES + 1)})) == [f"harness/a.py: {MAX_LINES + 1} lines"]
