"""
What README and docs say about files: line counts, commands, links and pictures. Run: python -m pytest tests/test_readme.py
"""
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
PROGRAMS = ["model.py", "data.py", "moe.py", "losses.py", "train.py", "evaluate.py", "configurator.py", "sample.py"]


def test_the_line_counts_of_the_reading_order_are_the_files():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    found = dict(re.findall(r"^ *(\w+\.py) +(\d+)  ", text, flags=re.M))
    assert list(found) == PROGRAMS
    for name, count in found.items():
        assert int(count) == len((ROOT / name).read_text(encoding="utf-8").splitlines()), name


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_links_and_pictures_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)", page.read_text(encoding="utf-8")):
        assert target.startswith("http") or (page.parent / target).exists(), target


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_commands_name_programs_and_configs_that_exist(page):
    text = page.read_text(encoding="utf-8")
    for module in re.findall(r"python -m ((?:tools|tiny)[\w.]*)", text):
        path = ROOT / module.replace(".", "/")
        assert path.with_suffix(".py").is_file() or (path / "__main__.py").is_file(), module
    for name in re.findall(r"\bconfig/[\w/]+\.py\b", text):
        assert (ROOT / name).is_file(), name
    for name in re.findall(r"(?:python|torchrun[^\n]*?) ([\w/]+\.py)\b", text):
        assert (ROOT / name).is_file(), name


def test_every_key_in_a_command_of_train_py_exists():
    import evaluate
    import train
    for page in PAGES:
        for line in re.findall(r"^.*?(?:train|evaluate)\.py .*$", page.read_text(encoding="utf-8"), flags=re.M):
            defaults = evaluate.DEFAULTS if "evaluate.py" in line else train.DEFAULTS
            keys = re.findall(r"--(\w+)(?==| |$)", re.split(r"(?:train|evaluate)\.py", line)[1])
            for key in keys:
                assert key in defaults or key in ("help",), f"{page.name}: {line}"
