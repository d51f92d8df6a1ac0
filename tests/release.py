"""What a release has to be: ``python -m tests.release FOLDER`` checks the wheel and the sdist there, and writes the notes beside them.

``nox -s release`` builds them first, and installs the sdist. Each problem is a line, and makes it fail. What only the one who releases can
decide is a line too, and does not: an address that leads nowhere, a changelog that says *unreleased*.
"""

from __future__ import annotations

import re
import sys
import tarfile
import tomllib
import zipfile
from email.parser import Parser
from pathlib import Path

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
PLACEHOLDER = "https://example.org/"
IN_SDIST = (
    "CITATION.cff",
    "LICENSE",
    "PKG-INFO",
    "README.md",
    "noxfile.py",
    "pyproject.toml",
    "docs/llms.txt",
    "tests/__init__.py",
)


def notes(changelog: str, version: str) -> str:
    """Return what the changelog says of a version: its section, without the heading."""
    section = re.search(
        rf"^## {re.escape(version)}\b.*?\n(.*?)(?=^## |\Z)", changelog, re.DOTALL | re.MULTILINE
    )
    if not section:
        message = f"docs/changelog.md has no section '## {version}'"
        raise LookupError(message)
    return f"# actrec {version}\n\n{section[1].strip()}\n"


def problems(wheel: Path, sdist: Path) -> list[str]:
    """Return what is wrong with the files of a release."""
    with zipfile.ZipFile(wheel) as files:
        names = set(files.namelist())
        (metadata,) = (name for name in names if name.endswith(".dist-info/METADATA"))
        about = Parser().parsestr(files.read(metadata).decode())
    with tarfile.open(sdist) as files:
        packed = {name.partition("/")[2] for name in files.getnames()}
    modules = {
        p.relative_to(ROOT).as_posix()
        for p in (ROOT / "actrec").rglob("*")
        if p.is_file() and "__pycache__" not in p.parts
    }
    beside = {name for name in names if ".dist-info/" not in name}
    found = [f"the wheel lacks {name}" for name in sorted(modules - beside)]
    found += [
        f"the wheel has {name}, which is no file of actrec" for name in sorted(beside - modules)
    ]
    found += [f"the sdist lacks {name}" for name in sorted({*IN_SDIST, *modules} - packed)]
    if about["Version"] != PROJECT["version"]:
        found.append(
            f"the wheel is of version {about['Version']}, and pyproject.toml of {PROJECT['version']}"
        )
    text = about.get_payload()
    links = re.findall(r"\]\(([^)\s]+)\)", text)
    found += [
        f"the README of the package has the link {link}, which leads nowhere on an index"
        for link in links
        if not link.startswith("https://")
    ]
    if not links or not about.get_all("Project-URL"):
        found.append("the package has no README with links, or no addresses")
    return found


def to_decide(changelog: str) -> list[str]:
    """Return what is left to the one who releases."""
    found = []
    if any(url.startswith(PLACEHOLDER) for url in PROJECT["urls"].values()):
        found.append(
            f"[project.urls] and the links of the README begin with {PLACEHOLDER}: put the address of the repository in pyproject.toml"
        )
    if re.search(rf"^## {re.escape(PROJECT['version'])} .*unreleased", changelog, re.MULTILINE):
        found.append(
            f"docs/changelog.md says that {PROJECT['version']} is unreleased: put the day there, and tag the commit v{PROJECT['version']}"
        )
    return found


def main(folder: Path) -> int:
    """Check the files in the folder and write the notes; return how many problems there are."""
    (wheel,), (sdist,) = folder.glob("*.whl"), folder.glob("*.tar.gz")
    changelog = (ROOT / "docs" / "changelog.md").read_text()
    written = folder / "notes.md"
    written.write_text(notes(changelog, PROJECT["version"]))
    found = problems(wheel, sdist)
    lines = [
        *(f"problem: {one}" for one in found),
        *(f"before the upload: {one}" for one in to_decide(changelog)),
    ]
    sys.stdout.write("\n".join([*lines, f"{wheel}\n{sdist}\n{written}", ""]))
    return len(found)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
