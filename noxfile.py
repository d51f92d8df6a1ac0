"""Every check, one session each. ``nox -l`` lists them, ``nox`` runs what a change has to pass.

What the sessions install stands in pyproject.toml, in the dependency group of the same name.
"""

from __future__ import annotations

from pathlib import Path

import nox

PROJECT = nox.project.load_toml("pyproject.toml")
OFFLINE = {"HF_HUB_OFFLINE": "1"}  # models come out of packages, never from the network

# What the installed package has to do, far from the checkout.
SMOKE = """
from importlib.metadata import files
import torch
import actrec

assert "site-packages" in actrec.__file__, actrec.__file__
installed = {path.as_posix() for path in files("actrec")}
assert "actrec/py.typed" in installed, installed
folders = {path.partition("/")[0] for path in installed}
assert len(folders) == 2, f"more than the package and its metadata: {folders}"

model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.ReLU(inplace=True))
with actrec.record(model) as acts:
    output = model(torch.ones(5, 4))
assert torch.equal(acts["1"][0], output)
print(acts)
"""

nox.needs_version = ">=2025.2"
nox.options.sessions = ["tests", "lint", "types", "docs", "package"]
nox.options.reuse_existing_virtualenvs = True
nox.options.error_on_missing_interpreters = True
nox.options.error_on_external_run = True


def install(session: nox.Session, group: str, *more: str) -> None:
    """Install a dependency group, and with it, in one go, whatever else is named."""
    session.install(*nox.project.dependency_groups(PROJECT, group), *more)


@nox.session
def tests(session: nox.Session) -> None:
    """Run the tests with branch coverage; ``nox -s tests -- -k exact`` runs some, without."""
    install(session, "tests", "-e", ".")
    if session.posargs:
        session.run("pytest", *session.posargs, env=OFFLINE)
        return
    session.run("coverage", "run", "-m", "pytest", env=OFFLINE)
    session.run("coverage", "report")


@nox.session
def lint(session: nox.Session) -> None:
    """Check style and formatting."""
    install(session, "lint")
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")


@nox.session
def types(session: nox.Session) -> None:
    """Check the types, strictly; what a user's editor says of them, by another checker too."""
    install(session, "types", "-e", ".")
    session.run("mypy", *session.posargs)
    session.run("pyright")


@nox.session
def docs(session: nox.Session) -> None:
    """Build the documentation and execute its notebooks; a warning is an error."""
    install(session, "docs", "-e", ".")
    options = ["-W", "-n", "--keep-going", "-b", "html"]
    session.run("sphinx-build", *options, "docs", "docs/_build/html", *session.posargs, env=OFFLINE)


@nox.session
def demo(session: nox.Session) -> None:
    """Record a small network on real handwritten digits, and compare with the usual hook."""
    install(session, "demo", "-e", ".")
    session.run("python", "docs/examples/digits.py")


@nox.session
def demo_minilm(session: nox.Session) -> None:
    """Record every layer of a real pretrained transformer on forty sentences."""
    install(session, "demo-minilm", "-e", ".")
    session.run("python", "docs/examples/minilm.py", env=OFFLINE)


@nox.session
def browser(session: nox.Session) -> None:
    """Run the tutorial as a notebook, and look at it in Chromium, which has to be there."""
    install(session, "browser", "-e", ".")
    session.run("pytest", "tests/browser", *session.posargs, env=OFFLINE)


@nox.session
def recipes(session: nox.Session) -> None:
    """Run the how-to pages that need other frameworks: trainers, Ray Data."""
    install(session, "recipes", "-e", ".")
    session.run("pytest", "tests/recipes", *session.posargs, env=OFFLINE)


@nox.session
def bench(session: nox.Session) -> None:
    """Measure what recording costs, as ratios, and print the table."""
    install(session, "bench", "-e", ".")
    session.run("python", "tests/benchmarks/run.py", *session.posargs)


@nox.session
def peers(session: nox.Session) -> None:
    """Measure other libraries that record, which never become dependencies."""
    install(session, "peers", "-e", ".")
    session.run("python", "tests/benchmarks/peers.py", *session.posargs)


@nox.session
def crash(session: nox.Session) -> None:
    """Kill a recording two hundred times, cut its power and fail its disk at every call, and damage stored ones in thousands of ways."""
    install(session, "tests", "-e", ".")
    many = {"ACTREC_KILLS": "200", "ACTREC_MUTATIONS": "5000"}
    many |= {"ACTREC_CUTS": "100000", "ACTREC_FAULTS": "100000"}  # all that there are
    names = "after_a_kill or mutated or power_loss"
    files = ["test_store_resume.py", "test_store_reader.py", "test_power_loss.py"]
    files = [f"tests/{file}" for file in files]
    session.run("pytest", *files, "-k", names, *session.posargs, env=OFFLINE | many)


@nox.session
def versions(session: nox.Session) -> None:
    """Run the tests on another PyTorch, as ``nox -s versions -- 2.14.1``. Most are downloads of gigabytes."""
    if not session.posargs:
        session.error("which version? nox -s versions -- 2.14.1")
    version, *options = session.posargs
    install(session, "tests", "-e", ".")
    session.install(f"torch=={version}")
    session.run("pytest", *options, env=OFFLINE)


@nox.session(reuse_venv=False)
def package(session: nox.Session) -> None:
    """Build sdist and wheel, install the wheel, and use it from elsewhere."""
    install(session, "package")
    elsewhere = Path(session.create_tmp()).resolve()
    session.run("python", "-m", "build", "--outdir", str(elsewhere / "dist"))
    (wheel,) = (elsewhere / "dist").glob(f"*-{PROJECT['project']['version']}-*.whl")
    install(session, "torch", str(wheel))
    session.chdir(elsewhere)
    session.run("python", "-W", "error", "-c", SMOKE)
