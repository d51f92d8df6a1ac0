"""What every test shares: a fixed random seed, a guard that finds hooks left behind, and how it runs with compiled models."""

from __future__ import annotations

import gc
import os
import weakref
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn

from actrec._calls.hooks import Hook

if TYPE_CHECKING:
    from collections.abc import Iterator


def own_hooks(module: nn.Module) -> list[object]:
    """The hooks of actrec that are on ``module`` itself."""
    tables = (module._forward_hooks, module._forward_pre_hooks)
    return [hook for table in tables for hook in table.values() if isinstance(hook, Hook)]


@pytest.fixture(autouse=True, scope="session")
def _only_present_devices_are_seeded() -> Iterator[None]:
    """Make ``torch.manual_seed`` fast: for each device that is absent, it formats and keeps the traceback of every call."""
    with pytest.MonkeyPatch.context() as patch:
        for device in (torch.cuda, torch.xpu, torch.mtia):
            if not device.is_available() and hasattr(device, "manual_seed_all"):
                patch.setattr(device, "manual_seed_all", lambda _seed: None)
        yield


@pytest.fixture(autouse=True, scope="session")
def _what_was_imported_is_not_searched_for_garbage() -> Iterator[None]:
    """Make ``gc.collect()`` fast: a million objects of modules and of collected tests stay anyway."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _no_hook_stays_behind(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Watch every registration in this test; in the end none of actrec's hooks may be there."""
    hooked: list[weakref.ref[nn.Module]] = []

    def watch(name: str) -> None:
        register = getattr(nn.Module, name)

        def watched(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            hooked.append(weakref.ref(module))
            return register(module, *args, **kwargs)

        monkeypatch.setattr(nn.Module, name, watched)

    watch("register_forward_hook")
    watch("register_forward_pre_hook")
    yield
    left = {
        id(module): module for ref in hooked if (module := ref()) is not None and own_hooks(module)
    }
    assert not left, f"hooks of actrec were left behind on {list(left.values())[:3]}"


# --- The same tests with models that are compiled, and stay so -------------------------------------------


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run tests that are marked ``also_compiled`` both ways; where ``ACTREC_COMPILED`` is set, all that record."""
    asks_for = {mark.name for mark in metafunc.definition.iter_markers()}
    everywhere = "ACTREC_COMPILED" in os.environ and hasattr(metafunc.module, "record")
    if torch.__version__ < (2, 13):  # compiled=True needs it
        return
    if "also_compiled" in asks_for or (everywhere and "eager_only" not in asks_for):
        ignored = ["ignore::DeprecationWarning:torch", "ignore:The .grad attribute of a Tensor"]
        marks = [pytest.mark.filterwarnings(one) for one in ignored]  # of the compiler's own
        metafunc.fixturenames.append("stays")
        metafunc.parametrize("stays", ["eager", pytest.param("compiled", marks=marks)])


@pytest.fixture(autouse=True)
def _stays_compiled(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Iterator[None]:
    """Compile each model of such a test when it is recorded, with ``compiled=True``."""
    parameters = getattr(request.node, "callspec", None)
    if parameters is None or parameters.params.get("stays") != "compiled":
        yield
        return
    original, models = request.module.record, []

    def kept(model: Any, *args: Any, **options: Any) -> Any:
        if not isinstance(model, nn.Module) or {"compiled", "stop_early", "detach"} & {*options}:
            return original(model, *args, **options)
        block = original(model, *args, compiled=True, **options)
        if model._compiled_call_impl is None:
            model.compile(backend="aot_eager")
            models.append(model)
        return block

    original(nn.ReLU(), compiled=True)  # which tests itself, the first time
    torch._dynamo.reset()
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    monkeypatch.setattr(request.module, "record", kept)
    yield
    for model in models:
        model._compiled_call_impl = None
    if request.node.get_closest_marker("also_compiled"):
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > before
