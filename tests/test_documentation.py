"""Every example in the README, in the plain pages and in docstrings runs; what they state agrees with the project.

The pages that are notebooks run when the documentation is built.
"""

from __future__ import annotations

import ast
import contextlib
import doctest
import importlib
import inspect
import io
import pkgutil
import re
import textwrap
import tomllib
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import pytest

import actrec

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
PAGES = [README, *(p for p in sorted((ROOT / "docs").rglob("*.md")) if "_build" not in p.parts)]

FENCE = re.compile(r"^```(\w+)\n(.*?)^```$", re.DOTALL | re.MULTILINE)


class Block(NamedTuple):
    line: int
    language: str
    text: str
    output: str | None = None  # of a Python block: what the block of text right below it says


def is_notebook(page: Path) -> bool:
    return page.read_text().startswith("---\njupytext:")


def is_recipe(page: Path) -> bool:
    """Whether a page needs other frameworks, and says so: tests/recipes runs it."""
    return "run by `nox -s recipes`" in page.read_text()


def blocks(page: Path, language: str) -> list[Block]:
    """The fenced blocks of a page that are in one language."""
    text = page.read_text()
    found = []
    for fence, after in pairwise([*FENCE.finditer(text), None]):
        output = None
        if after and after[1] == "text" and not text[fence.end() : after.start()].strip():
            output = after[2]
        found.append(Block(text.count("\n", 0, fence.start()) + 1, fence[1], fence[2], output))
    return [block for block in found if block.language == language]


def check_block(page: Path, index: int, folder: Path) -> None:
    """Run a Python block after those above it, in a folder, and compare what it prints with the text below it."""
    names: dict[str, object] = {}
    for block in blocks(page, "python")[: index + 1]:
        # Empty lines in front: a traceback shows the line of the page.
        code = compile("\n" * block.line + block.text, page, "exec")
        # What a page writes to a path of its own is not left in the tree.
        with contextlib.chdir(folder), contextlib.redirect_stdout(io.StringIO()) as printed:
            exec(code, names)  # noqa: S102  # code of this project's own pages
    assert block.output is None or printed.getvalue() == block.output


def docstrings(module: object) -> list[doctest.DocTest]:
    return [test for test in doctest.DocTestFinder().find(module) if test.examples]


def check_docstring(test: doctest.DocTest) -> None:
    report = io.StringIO()
    result = doctest.DocTestRunner(verbose=False).run(test, out=report.write, clear_globs=False)
    assert not result.failed, report.getvalue()


MODULES = [actrec] + [
    importlib.import_module(info.name) for info in pkgutil.walk_packages(actrec.__path__, "actrec.")
]
BLOCKS = [
    pytest.param(page, index, id=f"{page.relative_to(ROOT)}:{block.line}")
    for page in PAGES
    if not is_notebook(page) and not is_recipe(page)
    for index, block in enumerate(blocks(page, "python"))
]
DOCSTRINGS = [pytest.param(test, id=test.name) for module in MODULES for test in docstrings(module)]


# --- Examples --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("page", "index"), BLOCKS)
def test_the_example_on_the_page_runs_and_prints_what_it_says(tmp_path, page, index):
    check_block(page, index, tmp_path)


@pytest.mark.parametrize("test", DOCSTRINGS)
def test_the_example_in_the_docstring_shows_what_happens(test):
    check_docstring(test)


@pytest.mark.parametrize(
    ("example", "error"),
    [
        ("print(1)\n```\n\n```text\n2\n", AssertionError),
        ("print(missing)\n", NameError),
        ("import warnings\nwarnings.warn('old')\n", UserWarning),
        ("print(1)\n```\n\n```python\nprint(1\n", SyntaxError),
    ],
    ids=["wrong output", "error", "warning", "typo in a later block"],
)
def test_a_broken_example_on_a_page_is_noticed(tmp_path, example, error):
    page = tmp_path / "page.md"
    page.write_text(f"# A page\n\n```python\n{example}```\n")
    with pytest.raises(error):
        check_block(page, len(blocks(page, "python")) - 1, tmp_path)


@pytest.mark.parametrize(
    "example", ["1 + 1\n3", "missing", "import warnings; warnings.warn('old')"]
)
def test_a_broken_example_in_a_docstring_is_noticed(example):
    test = doctest.DocTestParser().get_doctest(f">>> {example}\n", {}, "broken", None, 0)
    with pytest.raises(AssertionError, match="Failed example"):
        check_docstring(test)


def test_a_block_sees_what_the_blocks_above_it_have_made(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(
        "```python\na = 1\n```\n\nThen\n\n```python\nprint(a)\n```\n\n```text\n1\n```\n"
    )
    check_block(page, 1, tmp_path)


def test_the_examples_are_found():
    assert len(BLOCKS) >= 2
    assert any(block.output for block in blocks(README, "python"))
    assert len(DOCSTRINGS) >= 12
    assert sum(map(is_notebook, PAGES)) >= 6
    assert {page.name for page in filter(is_recipe, PAGES)} == {
        "ray-data.md",
        "trainers.md",
        "vllm.md",
    }


@pytest.mark.parametrize("name", actrec.__all__)
def test_every_public_function_and_class_shows_an_example(name):
    public = getattr(actrec, name)
    if not (inspect.isclass(public) and issubclass(public, (Exception, Warning))):
        shown = doctest.DocTestFinder().find(public, name)
        assert any(test.examples for test in shown)
    assert inspect.getdoc(public)


def public_functions() -> dict[str, object]:
    """The functions that are exported, and the methods and properties of the classes that are."""
    # The package calls these, its users do not.
    internal = {
        *map("Layer.{}".format, ("keep", "drop", "settle")),
        *map("StoredRecording.{}".format, ("everything", "problems")),
    }
    found: dict[str, object] = {}
    modules = [actrec, actrec.store, importlib.import_module("actrec.data"), actrec.testing]
    for name, public in ((name, getattr(m, name)) for m in modules for name in m.__all__):
        if inspect.isfunction(public):
            found[name] = public
        elif inspect.isclass(public) and not issubclass(public, (Exception, Warning)):
            inherited = {key for base in public.__mro__[1:] for key in vars(base)}
            members = {key: m for key, m in vars(public).items() if not key.startswith("_")}
            members = {key: m for key, m in members.items() if m.__doc__ or key not in inherited}
            members = {key: m for key, m in members.items() if callable(m) or hasattr(m, "fget")}
            found |= {f"{name}.{key}": member for key, member in members.items()}
    return {name: member for name, member in found.items() if name not in internal}


PUBLIC = public_functions()


@pytest.mark.parametrize("name", PUBLIC)
def test_a_public_function_says_what_it_takes_returns_and_raises_after_an_example(name):
    is_property = isinstance(PUBLIC[name], property)
    public = PUBLIC[name].fget if is_property else PUBLIC[name]
    text = inspect.getdoc(public)
    signature = inspect.signature(public)
    code = ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(public))))
    sections = {
        "Args:": set(signature.parameters) - {"self"},
        "Returns:": not is_property and signature.return_annotation != "None",
        "Raises:": any(isinstance(node, ast.Raise) for node in ast.walk(code)),
    }
    wanted = [section for section, is_wanted in sections.items() if is_wanted]
    places = [text.find(f"\n{section}\n") for section in wanted]
    example = 0 if is_property else text.find(">>>")
    assert min([example, *places]) >= 0, wanted
    assert [example, *places] == sorted([example, *places])
    described = re.findall(r"^    \*?(\w+): ", text, re.MULTILINE)
    assert sections["Args:"] <= set(described)


# --- Facts that stand in two places ----------------------------------------------------------------


def commands(page: Path) -> list[str]:
    return [line for block in blocks(page, "sh") for line in block.text.splitlines()]


def nox_sessions() -> set[str]:
    functions = ast.parse((ROOT / "noxfile.py").read_text()).body
    return {f.name for f in functions if isinstance(f, ast.FunctionDef) and f.decorator_list}


def test_the_first_two_commands_are_the_demo_and_the_tests_as_ci_runs_them():
    demo, tests, *_ = commands(README)
    assert tests in map(str.strip, (ROOT / ".ci/run").read_text().splitlines())
    assert tests.endswith("nox -s tests")
    assert demo == tests.removesuffix("tests") + "demo"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_nox_session_that_a_page_names_exists(page):
    named = re.findall(r"nox -s ([\w-]+)", page.read_text())
    assert set(named) <= nox_sessions()


def test_the_contributing_page_names_every_nox_session_and_only_files_that_exist():
    text = (ROOT / "docs/contributing.md").read_text()
    assert set(re.findall(r"`nox -s ([\w-]+)", text)) == nox_sessions()
    named = re.findall(r"`((?:actrec|docs|tests)/[\w./-]+)`", text)
    assert [path for path in named if not (ROOT / path).exists()] == []
    assert len(named) >= 10


def test_the_readme_names_the_versions_that_the_package_requires():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    python = project["requires-python"].removeprefix(">=")
    torch = next(d for d in project["dependencies"] if d.startswith("torch")).removeprefix(
        "torch>="
    )
    assert f"Python {python} or newer and PyTorch {torch} or newer" in README.read_text()
    version = project["version"].rpartition(".")[0]
    assert f"Version {version} " in README.read_text()


def test_the_citation_names_the_version_and_the_licence_of_the_package():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    citation = (ROOT / "CITATION.cff").read_text()
    assert f"version: {project['version']}\n" in citation
    assert f"license: {project['license']}\n" in citation
