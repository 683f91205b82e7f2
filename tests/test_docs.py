"""What README and docs show, runs: the python blocks of a page are one program."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def program(page: Path) -> str:
    """The page's python blocks, each on the lines where the page has it."""
    inside, lines = False, []
    for line in page.read_text().splitlines():
        fence = line.strip().startswith("```")
        lines.append(line if inside and not fence else "")
        if fence:
            inside = not inside and line.strip() == "```python"
    return "\n".join(lines).rstrip() + "\n"


@pytest.mark.parametrize("page", [p for p in PAGES if program(p).strip()], ids=lambda p: p.name)
def test_the_code_of_a_page_runs(page, tmp_path):
    script = tmp_path / f"{page.stem}.py"
    script.write_text(program(page))
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MESHTAPE_")}
    run = subprocess.run([sys.executable, script.name], cwd=tmp_path, env=environment, capture_output=True,
                         text=True, timeout=110)
    assert run.returncode == 0, f"{page.relative_to(ROOT)}:\n{run.stderr}"


def test_the_list_of_functions_is_complete():
    from meshtape import contraction, creation, elementwise, manipulation, nn, random, reductions

    rooms = (creation, elementwise, reductions, manipulation, contraction, random, nn.functional)
    rows = [line for line in (ROOT / "docs/guide/ops.md").read_text().splitlines() if line.startswith("|")]
    listed = {name for row in rows for name in re.findall(r"`(\w+)`", row)}
    assert listed == {name for room in rooms for name in room.__all__}


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_inside_the_repository_lead_somewhere(page):
    text = page.read_text()
    targets = re.findall(r"\]\(([^)#]+)[^)]*\)", text) + re.findall(r'src="([^"]+)"', text)
    assert not [t for t in targets if "://" not in t and not (page.parent / t).exists()]
