"""The public names, all of them; and what importing them does not import."""

from __future__ import annotations

import importlib
import pkgutil
import subprocess
import sys
from importlib.metadata import PackageNotFoundError

import pytest

import actrec
from actrec import _text

NEVER_IMPORTED = {
    *("matplotlib", "safetensors", "sklearn", "transformers"),
    *("torch._dynamo", "torch.distributed.fsdp", "torch.distributed.tensor"),  # each takes seconds
}


def test_the_public_names_are_these():
    assert actrec.__all__ == [
        "ActrecError",
        "AlignmentError",
        "CaptureError",
        "Comparison",
        "CorruptRecordingError",
        "IncompleteLayerWarning",
        "JoinError",
        "Layer",
        "Layers",
        "MissingGradientWarning",
        "MissingUnitsError",
        "Opaque",
        "OptionError",
        "OverflowWarning",
        "ReadError",
        "Recorder",
        "Recording",
        "RecordingExistsError",
        "RecordingNotFoundError",
        "ResumeError",
        "ResumeWarning",
        "SelectionError",
        "Stats",
        "TransformError",
        "UnknownLayerError",
        "UnlockedWarning",
        "UnsupportedModelError",
        "UnusedLayerWarning",
        "WriteError",
        "attention",
        "compare",
        "layers",
        "load",
        "record",
        "save",
        "verify",
    ]


def test_everything_else_is_private():
    modules = {info.name for info in pkgutil.walk_packages(actrec.__path__)}
    assert {name for name in modules if not name.startswith("_")} == {
        "data",
        "errors",
        "plot",
        "reduce",
        "store",
        "testing",
    }
    lazy = ["__version__", "data", "errors", "plot", "reduce", "store", "testing"]
    assert dir(actrec) == sorted([*actrec.__all__, *lazy])
    assert all(hasattr(actrec, name) for name in dir(actrec))


def test_the_version_is_that_of_the_package(monkeypatch):
    monkeypatch.setattr(_text, "version", {"actrec": "1.2.3"}.__getitem__)
    assert actrec.__version__ == "1.2.3"

    def missing(name):
        raise PackageNotFoundError(name)

    monkeypatch.setattr(_text, "version", missing)
    assert actrec.__version__ == "unknown"


def test_what_is_not_there_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'actrec' has no attribute 'recrod'"):
        _ = actrec.recrod


def test_the_store_is_imported_when_it_is_first_asked_for():
    code = """
import sys, actrec
assert not any(name.startswith("actrec.store") for name in sys.modules)
assert actrec.store.load is actrec.load
from actrec import verify
assert verify is actrec.store.verify
"""
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("name", actrec.__all__)
def test_a_public_name_leads_to_the_object_of_that_name_in_its_own_module(name):
    public = getattr(actrec, name)
    assert public.__module__.partition(".")[0] == "actrec"
    home = importlib.import_module(public.__module__)
    assert getattr(home, name) is public


def test_the_errors_are_all_exported():
    assert set(actrec.errors.__all__) <= set(actrec.__all__)


# --- In a fresh interpreter ------------------------------------------------------------------------


def imported(code: str, *after: str) -> set[str]:
    """The modules that are imported by ``code``, beyond those imported by ``after``."""
    lines = [
        "import sys",
        *after,
        "before = set(sys.modules)",
        code,
        "print(*set(sys.modules) - before, sep='\\n')",
    ]
    command = [sys.executable, "-c", "\n".join(lines)]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    return set(result.stdout.split())


def foreign(modules: set[str]) -> set[str]:
    """Those that are neither actrec's own nor the standard library's."""
    own = {"actrec", *sys.stdlib_module_names}
    return {name for name in modules if name.partition(".")[0] not in own}


def test_actrec_imports_nothing_but_torch():
    modules = imported("import actrec", "import torch")
    assert "actrec" in modules
    assert not foreign(modules)


@pytest.mark.parametrize("code", ["import actrec", "from actrec import compare, load, record"])
def test_actrec_imports_no_optional_library_and_no_slow_part_of_torch(code):
    assert not NEVER_IMPORTED & imported(code, "import torch")


def test_an_import_would_be_noticed():
    names = {"pytest", "torch._dynamo"}
    assert names <= foreign(imported(f"import actrec, {', '.join(names)}", "import torch"))


def test_a_module_of_the_package_is_imported_when_it_is_first_asked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delattr(actrec, "data", raising=False)
    assert actrec.data is sys.modules["actrec.data"]
