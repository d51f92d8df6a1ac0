"""Every check, one session each. ``nox -l`` lists them, ``nox`` runs what a change has to pass.

What the sessions install stands in pyproject.toml, in the dependency group of the same name.
"""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

import nox

PROJECT = nox.project.load_toml("pyproject.toml")
OFFLINE = {"HF_HUB_OFFLINE": "1"}  # models come out of packages, never from the network

# A process for each core, with one thread for PyTorch; each collects all tests, so more than eight gain little.
EACH_CORE = ["--numprocesses=logical", "--maxprocesses=8", "--dist=worksteal"]

#: PyTorch alone takes more than a gigabyte: sessions whose packages go together share one environment.
SHARED = Path(".nox/shared").resolve()

#: Where the documentation is built.
PAGES = Path("docs/_build/html")

# What the installed package has to do, far from the checkout.
SMOKE = """
from importlib.metadata import files
import torch
import actrec

assert "site-packages" in actrec.__file__, actrec.__file__
installed = {path.as_posix() for path in files("actrec")}
assert "actrec/py.typed" in installed, installed
folders = {path.partition("/")[0] for path in installed if not path.startswith("..")}  # the command
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

# What pip takes on Linux unless it is told otherwise is PyTorch for NVIDIA GPUs.
SIZE = "PyTorch and the rest are about 0.3 GB to download, or 3 GB where pip takes PyTorch for NVIDIA GPUs"

in_shared = nox.session(venv_backend="none")


def bring(session: nox.Session, group: str) -> None:
    """Install a dependency group into the shared environment, and let the session run what is there."""
    programs = SHARED / ("Scripts" if os.name == "nt" else "bin")
    if not programs.exists():
        session.run(sys.executable, "-m", "virtualenv", "--quiet", str(SHARED))
    session.env.update(OFFLINE, PATH=f"{programs}{os.pathsep}{os.environ['PATH']}")
    run(session, "python", "-m", "pip", *packages(group), "-e", ".")


def run(session: nox.Session, program: str, *arguments: str, **env: str) -> None:
    """Run a program of the shared environment."""
    found = shutil.which(program, path=session.env["PATH"])
    session.run(found, *arguments, env=env)


def install(session: nox.Session, group: str, *more: str) -> None:
    """Install a dependency group, and what else is named, into an environment of the session's own."""
    session.run("python", "-m", "pip", *packages(group), *more)


def packages(group: str) -> list[str]:
    """Return how pip installs a group: Python compiles what is imported, and not all of PyTorch at once."""
    return ["install", "--no-compile", *nox.project.dependency_groups(PROJECT, group)]


def build_docs(session: nox.Session, *arguments: str) -> None:
    """Build the pages."""
    bring(session, "docs")
    options = ["-W", "-n", "--keep-going", "-b", "html", "-j", "auto"]
    run(session, "sphinx-build", *options, "docs", str(PAGES), *arguments, OMP_NUM_THREADS="1")


@in_shared
def tests(session: nox.Session) -> None:
    """Run the tests with branch coverage; ``nox -s tests -- -k exact`` runs some, without."""
    session.log(f"{SIZE}. The tests then take about ten minutes on an idle machine of two cores.")
    bring(session, "tests")
    # Everywhere the examples that CI has, and no deadlines for them: the processes slow each other down.
    options = ["--hypothesis-profile=ci", "--cov", "--cov-report=term-missing:skip-covered"]
    run(session, "pytest", *(session.posargs or EACH_CORE + options), OMP_NUM_THREADS="1")


@nox.session
def lint(session: nox.Session) -> None:
    """Check style and formatting."""
    install(session, "lint")
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")


@in_shared
def types(session: nox.Session) -> None:
    """Check the types, strictly; what a user's editor says of them, by another checker too."""
    bring(session, "types")
    run(session, "mypy", *session.posargs)
    run(session, "pyright")


@in_shared
def docs(session: nox.Session) -> None:
    """Build the documentation and execute its notebooks; a warning is an error."""
    build_docs(session, *session.posargs)


@in_shared
def demo(session: nox.Session) -> None:
    """Record a small network on real handwritten digits, and compare with the usual hook."""
    session.log(f"{SIZE}. The demo then takes half a minute on two cores.")
    bring(session, "demo")
    run(session, "python", "docs/examples/digits.py")


@in_shared
def demo_minilm(session: nox.Session) -> None:
    """Record every layer of a real pretrained transformer on forty sentences."""
    bring(session, "demo-minilm")
    run(session, "python", "docs/examples/minilm.py")


@in_shared
def browser(session: nox.Session) -> None:
    """Look at every page and view in Chromium, which has to be there: wide and narrow, light and dark. The pictures stay in tests/browser/pictures."""
    if not (PAGES / "index.html").exists():
        build_docs(session)
    bring(session, "browser")
    run(session, "pytest", "tests/browser", *session.posargs)


@in_shared
def recipes(session: nox.Session) -> None:
    """Run the how-to pages that need other frameworks: trainers, Ray Data."""
    bring(session, "recipes")
    run(session, "pytest", "tests/recipes", *session.posargs)


@in_shared
def sweeps(session: nox.Session) -> None:
    """Go through every operator and module of PyTorch, a hundred architectures, all benchmarks, and what takes many processes."""
    bring(session, "tests")
    options = session.posargs or [*EACH_CORE, "--hypothesis-profile=ci"]
    run(session, "pytest", "-m", "sweep", *options, OMP_NUM_THREADS="1", ACTREC_SWEEPS="whole")


@nox.session
def tracer(session: nox.Session) -> None:
    """Compare functions that are recorded with those that torchvision's feature extractor traces, in ten of its models."""
    install(session, "tracer", "-e", ".")
    session.run("pytest", "tests/tracer", *session.posargs)


@in_shared
def compiled(session: nox.Session) -> None:
    """Run the tests of recording on compiled models, and record what Inductor compiles. It needs a compiler of C++."""
    bring(session, "tests")
    names = ("laws", "inputs_and_gradients", "grads", "grads_to_path", "units", "nested", "passes")
    same = [f"tests/test_{name}.py" for name in names]
    run(session, "pytest", "-k", "compiled", *same, ACTREC_COMPILED="20", OMP_NUM_THREADS="1")
    run(session, "pytest", "tests/compiled", *session.posargs, OMP_NUM_THREADS="1")


@in_shared
def bench(session: nox.Session) -> None:
    """Measure what recording costs, as ratios, and print the table."""
    bring(session, "bench")
    run(session, "python", "tests/benchmarks/run.py", *session.posargs)


@nox.session
def peers(session: nox.Session) -> None:
    """Measure other libraries that record, which never become dependencies."""
    install(session, "peers", "-e", ".")
    session.run("python", "tests/benchmarks/peers.py", *session.posargs)


@in_shared
def crash(session: nox.Session) -> None:
    """Kill a recording two hundred times, cut its power and fail its disk at every call, and damage stored ones in thousands of ways."""
    bring(session, "tests")
    many = {"ACTREC_KILLS": "200", "ACTREC_MUTATIONS": "5000"}
    many |= {"ACTREC_CUTS": "100000", "ACTREC_FAULTS": "100000"}  # all that there are
    names = "after_a_kill or wherever_it_stops or and_kills or mutated or power_loss"
    files = ["test_store_resume.py", "test_store_reader.py", "test_power_loss.py"]
    files += ["test_units_resumed.py"]
    files = [f"tests/{file}" for file in files]
    run(session, "pytest", *files, "-k", names, *session.posargs, **many)


@nox.session
def versions(session: nox.Session) -> None:
    """Run the tests on another PyTorch, as ``nox -s versions -- 2.14.1``. Most are downloads of gigabytes."""
    if not session.posargs:
        session.error("which version? nox -s versions -- 2.14.1")
    version, *options = session.posargs
    install(session, "tests", "-e", ".")
    session.install(f"torch=={version}", silent=False)
    session.run("pytest", *options, env=OFFLINE | {"ACTREC_SWEEPS": "whole"})


@nox.session(reuse_venv=False)
def release(session: nox.Session) -> None:
    """Build sdist and wheel into ``dist``, check them, install from the sdist, and write the notes. It uploads nothing."""
    install(session, "release")
    dist = Path("dist").resolve()
    shutil.rmtree(dist, ignore_errors=True)
    session.run("python", "-m", "build", "--outdir", str(dist))
    session.run("python", "-m", "twine", "check", "--strict", *map(str, sorted(dist.iterdir())))
    session.run("python", "-m", "tests.release", str(dist))
    (sdist,) = dist.glob("*.tar.gz")
    install(session, "torch", str(sdist))
    session.chdir(session.create_tmp())
    session.run("python", "-W", "error", "-c", SMOKE)


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
