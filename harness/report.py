"""Reports from a verdict document alone: HTML (one file, opens offline), JUnit XML, Markdown, and what the terminal shows."""

from __future__ import annotations

import json
import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Mapping
from functools import cache
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from harness import outcome, pictures
from harness.verdict import one_line

MARKS = {
    outcome.PASS: "✓",
    outcome.FAIL: "✗",
    outcome.NOT_APPLICABLE: "–",
    outcome.VOID: "∅",
    outcome.INCONCLUSIVE: "?",
    outcome.ERROR: "!",
}
# XML 1.0 has no way to write these, escaped or not.
NOT_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
MARKDOWN_SPECIAL = re.compile(r"([\\`*_{}\[\]<>()#+!|~$@])")
SHOWN_PROBLEMS = 20
TOLERANCE_CAPTION = "A dot right of the line failed; a dot that moves right from release to release is numerics that loosen."
RATIO_CAPTION = "Ratios within this run: times from interleaved pairs on one thread, work and memory counted."
DRIFT_CAPTION = "Single-pass mixing against one pass per expert. In general they are different models; this is how different."


def html(verdict: Mapping) -> str:
    """One HTML file: no script, no external resource, everything from the verdict escaped."""
    shown = [
        ("Tolerance that each check needed", TOLERANCE_CAPTION, pictures.required_tolerances(verdict)),
        ("Speed, work and memory", RATIO_CAPTION, pictures.ratios(verdict)),
        ("Drift", DRIFT_CAPTION, pictures.drift(verdict)),
    ]
    template = environment(autoescape=True).get_template("report.html")
    drawn = [(title, caption, Markup(picture)) for title, caption, picture in shown if picture]
    return template.render(v=verdict, grid=grid(verdict), marks=MARKS, pictures=drawn)


def markdown(verdict: Mapping) -> str:
    """For a pull request: counts, problems, checkpoints, drift and ratios as tables."""
    template = environment(autoescape=False).get_template("report.md")
    return template.render(v=verdict, drift=_drift(verdict), ratios=_ratios(verdict))


def junit_xml(verdict: Mapping) -> str:
    """One test suite per checkpoint; void and inconclusive count as failures, and advisory checks as skipped."""
    root = ElementTree.Element("testsuites", name="validate_moe_modifications", time=str(verdict["seconds"]))
    suites = [(checkpoint["name"], checkpoint["checks"]) for checkpoint in verdict["checkpoints"]]
    for name, checks in [*suites, ("calibration", verdict["calibration"])]:
        suite = ElementTree.SubElement(root, "testsuite", name=_xml(name), tests=str(len(checks)))
        tags = [_junit_case(suite, check) for check in checks]
        for tag, attribute in (("failure", "failures"), ("error", "errors"), ("skipped", "skipped")):
            suite.set(attribute, str(tags.count(tag)))
    ElementTree.indent(root)
    return '<?xml version="1.0" encoding="utf-8"?>\n' + ElementTree.tostring(root, encoding="unicode") + "\n"


def text(verdict: Mapping, outputs: Mapping[str, Path]) -> str:
    """What the terminal shows at the end: verdict, counts, what failed and how to see it again, where the reports are."""
    counts = ", ".join(f"{count} {kind}" for kind, count in verdict["counts"].items() if count)
    lines = ["", f"{verdict['verdict'].upper()}  {counts}  ({verdict['seconds']:.0f} s)"]
    again = {(c["name"], check["id"]): check.get("reproduce") for c in verdict["checkpoints"] for check in c["checks"]}
    for problem in verdict["problems"][:SHOWN_PROBLEMS]:
        lines += [
            "",
            f"  {problem['kind']}: {problem['check']} on {one_line(problem['checkpoint']) or 'the judge'} ({problem['outcome']})",
        ]
        lines += [f"    {one_line(problem['message'])}"]
        command = again.get((problem["checkpoint"], problem["check"]))
        lines += [f"    again: {one_line(command)}"] if command else []
    hidden = len(verdict["problems"]) - SHOWN_PROBLEMS
    lines += ["", f"  and {hidden} more in the report"] if hidden > 0 else []
    lines += ["", *(f"{name.replace('_', ' '):<10} {path}" for name, path in outputs.items())]
    return "\n".join(lines)


def grid(verdict: Mapping) -> list[tuple[str, list[Mapping | None]]]:
    """Check id -> its result on every checkpoint, None where it was not run."""
    results = [{check["id"]: check for check in checkpoint["checks"]} for checkpoint in verdict["checkpoints"]]
    ids = dict.fromkeys(check for checkpoint in results for check in checkpoint)
    return [(check, [checkpoint.get(check) for checkpoint in results]) for check in ids]


def _junit_case(suite: ElementTree.Element, check: Mapping) -> str | None:
    module, _, name = check["id"].partition(".")
    case = ElementTree.SubElement(suite, "testcase", classname=_xml(module), name=_xml(name), time=str(check["seconds"]))
    if check["outcome"] == outcome.PASS:
        return None
    required = check.get("required", True)
    tag = {outcome.FAIL: "failure", outcome.ERROR: "error", outcome.NOT_APPLICABLE: "skipped"}.get(check["outcome"], "failure")
    tag = tag if required else "skipped"
    told = ElementTree.SubElement(case, tag, message=_xml(f"{check['outcome']}: {check['message']}"))
    told.text = _xml("\n".join(part for part in (check["statement"], check.get("traceback"), check.get("reproduce")) if part))
    return tag


@cache
def environment(*, autoescape: bool) -> Environment:
    """The templates, with the filters that they use."""
    loader = FileSystemLoader(Path(__file__).parent / "templates")
    made = Environment(loader=loader, autoescape=autoescape, undefined=StrictUndefined, trim_blocks=True)
    made.filters["css"] = lambda name: re.sub(r"[^a-z]+", "-", name)
    made.filters["md"] = _markdown
    made.filters["pretty"] = lambda value: json.dumps(value, indent=1, ensure_ascii=False)
    made.filters["count_of"] = lambda checkpoint, *kinds: sum(check["outcome"] in kinds for check in checkpoint["checks"])
    return made


def _markdown(value: object) -> str:
    """Text that Markdown shows as it is, on one line of a table; links, mentions and HTML included."""
    return MARKDOWN_SPECIAL.sub(r"\\\1", one_line(str(value))).replace("\\<", "&lt;").replace("\\@", "@&#8203;")


def _xml(value: str) -> str:
    return NOT_XML.sub("?", value)


def _drift(verdict: Mapping) -> list[tuple[str, str, str]]:
    return [(c["name"], kind, _number(value)) for c in verdict["checkpoints"] for kind, value in c["drift"].items()]


def _ratios(verdict: Mapping) -> list[tuple[str, str, str, str, str]]:
    rows = []
    for checkpoint in verdict["checkpoints"]:
        for check in checkpoint["checks"]:
            for name, found in check["evidence"].get("ratios", {}).items():
                bounds = f"{_number(found['low'])} to {_number(found['high'])}" if "low" in found else "counted"
                rows.append((checkpoint["name"], name, _number(found["ratio"]), bounds, _number(found.get("limit", ""))))
    return rows


def _number(value: object) -> str:
    return f"{value:.3g}" if isinstance(value, int | float) else str(value)
