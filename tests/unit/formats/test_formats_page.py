"""docs/formats.md names every format that is read, and no other."""

from __future__ import annotations

import re
from pathlib import Path

from dylo_moe.formats import FORMATS

PAGE = Path(__file__).resolve().parents[3] / "docs" / "formats.md"


def test_the_page_has_one_row_for_each_format():
    rows = re.findall(r"^\| `([^`]+)` \|", PAGE.read_text(), flags=re.MULTILINE)
    assert sorted(rows) == sorted(FORMATS)
