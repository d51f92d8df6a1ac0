"""What is made of something else is current: the notebook, llms.txt, the pages about speed; and every link leads somewhere."""

from __future__ import annotations

import ast
import json
import re
import runpy
import tarfile
import tomllib
import zipfile
from importlib import import_module
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from tests import release
from tests.benchmarks import page

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def script(name):
    return runpy.run_path(str(DOCS / "examples" / f"{name}.py"))


def title(page):
    return re.search(r"^# (.+)$", page.read_text(), re.MULTILINE)[1]


# --- The tutorial as a notebook ----------------------------------------------------------------------


def test_the_notebook_is_the_tutorial():
    made = script("notebook")
    assert made["NOTEBOOK"].read_text() == made["notebook"](made["PAGE"].read_text()), (
        "run: python docs/examples/notebook.py"
    )


def test_the_cells_of_the_notebook_are_those_of_the_page_and_stand_alone():
    cells = json.loads((DOCS / "tutorial.ipynb").read_text())["cells"]
    code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    assert len(code) == (DOCS / "tutorial.md").read_text().count("```{code-cell}") > 15
    imported = set()
    for cell in code:
        for node in ast.walk(ast.parse(cell)):
            if isinstance(node, ast.Import):
                imported |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                imported.add(node.module)
    roots = {name.partition(".")[0] for name in imported}
    assert roots == {"actrec", "matplotlib", "sklearn", "tempfile", "torch"}


def test_options_of_cells_and_links_to_pages_are_left_out_of_a_notebook():
    made = script("notebook")["notebook"](
        "---\njupytext:\n---\n\n# A\n\n[B](b.md) and [C](https://c.org)\n\n"
        "```{code-cell} ipython3\n---\nmystnb:\n  x: 1\n---\nprint(1)\n```\n"
    )
    text, code = json.loads(made)["cells"]
    assert "".join(text["source"]) == "# A\n\nB and [C](https://c.org)"
    assert "".join(code["source"]) == "print(1)"


# --- Lists of pages ----------------------------------------------------------------------------------


def test_the_index_names_each_how_to_page_once_by_its_title_with_a_sentence():
    text = (DOCS / "how-to" / "index.md").read_text()
    listed = re.findall(r"^- \[(.+)\]\((\S+\.md)\): .{15,}\.$", text, re.MULTILINE)
    pages = {p.name: title(p) for p in (DOCS / "how-to").glob("*.md") if p.name != "index.md"}
    assert {name: said for said, name in listed} == pages
    assert len(listed) == len(pages)
    in_tree = [
        f"{line}.md"
        for line in re.findall(r"^[\w-]+$", text.split("```{toctree}", 1)[1], re.MULTILINE)
    ]
    assert [name for _, name in listed] == in_tree, "the sidebar has the order of the page"


def test_llms_txt_names_every_page_of_the_index_and_every_public_name_and_only_what_exists():
    text = (DOCS / "llms.txt").read_text()
    links = re.findall(r"\]\(([^)]+)\.html\)", text)
    assert [link for link in links if not (DOCS / f"{link}.md").exists()] == []
    how_to = {f"how-to/{p.stem}" for p in (DOCS / "how-to").glob("*.md") if p.name != "index.md"}
    assert how_to <= set(links), "run: python docs/examples/llms.py"
    for section in re.split(r"^## ", text, flags=re.MULTILINE):
        if section.startswith("actrec"):
            module = import_module(section.splitlines()[0])
            names = re.findall(r"^- `(\w+)`: .", section, re.MULTILINE)
            public = {name for name in module.__all__ if callable(getattr(module, name))}
            assert set(names) == public, "run: python docs/examples/llms.py"
            for owner, member in re.findall(r"^  - `(\w+)\.(\w+)", section, re.MULTILINE):
                assert hasattr(getattr(module, owner), member)
    assert "  - `Recording.stats()`: " in text


def test_llms_txt_says_of_a_name_what_its_docstring_says():
    sentence = script("llms")["_first_sentence"]
    assert sentence("Open ``a`` as\n:func:`b` does.\n\nMore.") == "Open `a` as `b` does."


@pytest.mark.parametrize(
    "word",
    [
        "NumPy",
        "pandas",
        "CSV",
        "histogram",
        "concatenate",
        "Jupyter",
        "Hugging Face",
        "last token",
        "mean pool",
        "probe",
        "PCA",
        "t-SNE",
        "cosine similarity",
        "save",
        "feature maps",
        "attention",
        "gradients",
        "progress bar",
        "half precision",
        "global average pooling",
    ],
)
def test_the_cookbook_has_what_people_search_for(word):
    assert word.lower() in (DOCS / "cookbook.md").read_text().lower()


# --- Speed -------------------------------------------------------------------------------------------


def test_the_pages_about_speed_are_made_of_what_was_measured():
    made = page.pages(page.load())
    assert {path for path, text in made.items() if path.read_text() != text} == set(), (
        "run: python -m tests.benchmarks.page"
    )
    rows = [line for line in made[DOCS / "benchmarks.md"].splitlines() if line.startswith("|")]
    assert len(rows) == 2 + 10
    log = made[DOCS / "why" / "log.md"]
    assert {"calls", "networks", "storing", "loading", "opening"} <= set(
        re.findall(r"^## (\w+)$", log, re.MULTILINE)
    )


def test_bars_beyond_the_end_of_the_chart_are_cut_there_and_say_their_number():
    drawn = page.chart([("a < b", page.Row.of("a", [5.0])), ("c", page.Row.of("c", [0.5]))])
    assert "a &lt; b" in drawn
    assert "5.00" in drawn
    assert max(float(x) for x in re.findall(r'<text x="([\d.]+)"', drawn)) < page.WIDTH


# --- Links on a package index ------------------------------------------------------------------------

LINK = re.compile(r"\]\(([^)\s]+)\)")


def readme_on_an_index():
    """The README as the package carries it, by the substitutions that pyproject.toml names."""
    settings = PROJECT["tool"]["hatch"]["metadata"]["hooks"]["fancy-pypi-readme"]
    text = (ROOT / "README.md").read_text()
    for one in settings["substitutions"]:
        wanted = one["replacement"].replace("$HFPR_VERSION", PROJECT["project"]["version"])
        text = re.sub(one["pattern"], wanted, text)
    return text


def test_links_of_the_readme_lead_to_files_of_the_tree():
    links = LINK.findall((ROOT / "README.md").read_text())
    assert len(links) >= 12
    assert [link for link in links if not (ROOT / link.partition("#")[0]).exists()] == []


def test_on_a_package_index_every_link_is_absolute_and_of_the_version():
    source = PROJECT["project"]["urls"]["Source"]
    links = LINK.findall(readme_on_an_index())
    assert len(links) == len(LINK.findall((ROOT / "README.md").read_text()))
    for link in links:
        parts = urlsplit(link)
        assert (parts.scheme, bool(parts.netloc)) == ("https", True)
        kind, version, path = link.removeprefix(f"{source}/").split("/", 2)
        assert kind == ("raw" if path.endswith(".png") else "blob")
        assert version == f"v{PROJECT['project']['version']}"
        assert (ROOT / path.partition("#")[0]).exists()


# --- What a package says of itself ---------------------------------------------------------------------


def test_the_package_has_addresses_keywords_and_policies():
    project = PROJECT["project"]
    assert {"Documentation", "Changelog", "Issues", "Source"} <= set(project["urls"])
    assert all(url.startswith(project["urls"]["Source"]) for url in project["urls"].values())
    assert len(project["keywords"]) >= 10
    stability = (DOCS / "stability.md").read_text()
    for heading in ("What is public", "Versions and deprecation", "Stored recordings", "Security"):
        assert f"## {heading}\n" in stability
    public = script("llms")["MODULES"]
    assert [name for name in public if f"`{name}`" not in stability and name != "actrec"] == []
    assert (ROOT / "CITATION.cff").exists()
    assert (DOCS / "contributing.md").exists()


# --- A release -----------------------------------------------------------------------------------------


def test_the_notes_of_a_release_are_its_section_of_the_changelog():
    changelog = (
        "# Changelog\n\n## 0.2.0 - today\n\n### Added\n\n- New.\n\n## 0.1.0 - before\n\n- Old.\n"
    )
    assert release.notes(changelog, "0.2.0") == "# actrec 0.2.0\n\n### Added\n\n- New.\n"
    assert release.notes(changelog, "0.1.0") == "# actrec 0.1.0\n\n- Old.\n"
    with pytest.raises(LookupError, match=r"no section '## 0\.2'"):
        release.notes(changelog.replace("0.2.0", "0.20"), "0.2")
    assert "record()" in release.notes(
        (DOCS / "changelog.md").read_text(), PROJECT["project"]["version"]
    )


def built(folder, *, without=(), more=(), readme="[docs](https://a.b/c)", version=None):
    """A wheel and an sdist with the files of the tree."""
    files = [
        p for p in (ROOT / "actrec").rglob("*") if p.is_file() and "__pycache__" not in p.parts
    ]
    names = {p.relative_to(ROOT).as_posix() for p in files} - set(without) | set(more)
    version = version or PROJECT["project"]["version"]
    wheel, sdist = folder / "a.whl", folder / "a.tar.gz"
    with zipfile.ZipFile(wheel, "w") as archive:
        for name in names:
            archive.writestr(name, "")
        about = f"Metadata-Version: 2.4\nVersion: {version}\nProject-URL: Source, https://a.b\n\n{readme}\n"
        archive.writestr("actrec.dist-info/METADATA", about)
    with tarfile.open(sdist, "w:gz") as archive:
        for name in {*release.IN_SDIST, *names}:
            archive.addfile(tarfile.TarInfo(f"actrec-{version}/{name}"))
    return release.problems(wheel, sdist)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({}, None),
        ({"without": ["actrec/py.typed"]}, "the wheel lacks actrec/py.typed"),
        ({"without": ["actrec/errors.py"]}, "the sdist lacks actrec/errors.py"),
        ({"more": ["tests/conftest.py"]}, "the wheel has tests/conftest.py"),
        ({"readme": "[docs](docs/tutorial.md)"}, "has the link docs/tutorial.md"),
        ({"readme": "nothing"}, "no README with links"),
        ({"version": "9.9.9"}, "is of version 9.9.9"),
    ],
)
def test_what_is_wrong_with_the_files_of_a_release_is_said(tmp_path, change, problem):
    found = built(tmp_path, **change)
    assert bool(found) == bool(problem)
    assert any((problem or "") in one for one in found) == bool(problem)


def test_a_release_says_what_is_left_to_decide():
    (address, day) = release.to_decide("## 0.1.0 - unreleased\n")
    assert "example.org" in address
    assert "unreleased" in day
    assert release.to_decide("## 0.1.0 - 2026-12-01\n") == [address]
