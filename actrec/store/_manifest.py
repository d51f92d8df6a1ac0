"""What a recording is of: ``actrec.json``, which the first rank writes, and ``rank.json`` of a rank that differs."""

from __future__ import annotations

import json
import time
import uuid
from dataclasses import dataclass, field, replace
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

import torch

from actrec.errors import ResumeError

from ._format import (
    END,
    FORMAT,
    MANIFEST,
    MAX_JSON,
    MAX_RANKS,
    OWN,
    VERSION,
    Defect,
    corrupt,
    integer,
    items,
    mapping,
    need,
    text,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from ._place import Place

__all__ = [
    "Ending",
    "LayerInfo",
    "Manifest",
    "described",
    "read_ending",
    "read_manifest",
    "read_own",
]


def described(transform: Callable[..., Any] | None) -> str | None:
    """How a transform is named in the manifest, so that a resumed run can be compared with the first."""
    if transform is None:
        return None
    return getattr(transform, "__qualname__", type(transform).__qualname__)


@dataclass(frozen=True, slots=True)
class LayerInfo:
    """A layer that was chosen."""

    name: str
    type: str
    transform: str | None = None


@dataclass(frozen=True, slots=True)
class Manifest:
    """What ``actrec.json`` says; or ``rank.json``, which says of one rank what is different there."""

    model: str
    layers: tuple[LayerInfo, ...]
    names: dict[str, str] = field(default_factory=dict)  # other names of layers
    inputs: bool = False
    dtype: str | None = None
    grads: bool = False
    recording: str = field(default_factory=lambda: uuid.uuid4().hex)
    run: str = field(default_factory=lambda: uuid.uuid4().hex)
    ranks: int = 1
    began: int = field(default_factory=time.time_ns)  # when the run did that has so many ranks

    def content(self) -> bytes:
        """``actrec.json``, readable for people too."""
        about = {
            "format": FORMAT,
            "version": VERSION,
            "recording": self.recording,
            "run": self.run,
            "made_by": {"actrec": _own_version(), "torch": torch.__version__},
            **self._description(),
        }
        return json.dumps(about, indent=1).encode()

    def own_content(self) -> bytes:
        """``rank.json``."""
        about = {"recording": self.recording, **self._description()}
        return json.dumps(about, indent=1).encode()

    def _description(self) -> dict[str, Any]:
        layers = [
            {"name": layer.name, "type": layer.type, "transform": layer.transform}
            for layer in self.layers
        ]
        return {
            "ranks": self.ranks,
            "began": self.began,
            "model": self.model,
            "options": {"inputs": self.inputs, "grads": self.grads, "dtype": self.dtype},
            "layers": layers,
            "names": {name: key for name, key in self.names.items() if name != key},
        }

    def check_same(self, path: object, new: Manifest) -> None:
        """Raise ``ResumeError`` if ``new`` describes another recording than this one."""
        differences = [
            f"{what} {then!r} then, {now!r} now"
            for what, then, now in (
                ("the model was", self.model, new.model),
                ("inputs was", self.inputs, new.inputs),
                ("dtype was", self.dtype, new.dtype),
                *self._layer_differences(new),
            )
            if then != now
        ]
        if differences:
            message = (
                f"record(into={str(path)!r}, resume=True): what is there was recorded otherwise: "
                f"{'; '.join(differences[:5])}. Record it as before, or into another path."
            )
            raise ResumeError(message)

    def _layer_differences(self, new: Manifest) -> list[tuple[str, Any, Any]]:
        then, now = ([layer.name for layer in one.layers] for one in (self, new))
        if then != now:
            missing = [name for name in then if name not in now]
            added = [name for name in now if name not in then]
            if not missing and not added:
                return [("the order of the layers was", then[:8], now[:8])]
            return [("the layers were", missing[:8] or "fewer", added[:8] or "fewer")]
        pairs = zip(self.layers, new.layers, strict=True)
        return [
            (f"the {what} of layer {a.name[:60]!r} was", getattr(a, what), getattr(b, what))
            for a, b in pairs
            for what in ("type", "transform")
        ]


def _own_version() -> str:
    try:
        return version("actrec")
    except PackageNotFoundError:  # pragma: no cover  # run from a folder, never installed
        return "unknown"


def read_manifest(disk: Place) -> Manifest:
    """Read ``actrec.json``, or raise ``CorruptRecordingError``; ``FileNotFoundError`` if there is none."""
    try:
        return _parsed(_json(disk, MANIFEST))
    except Defect as defect:
        raise corrupt(disk.shown(MANIFEST), defect) from None


def _json(disk: Place, name: str) -> Any:
    size = disk.size(name)
    need(size, "it is empty, or no file")  # a pipe would be waited for
    need(size <= MAX_JSON, f"it has {size} bytes, and {MAX_JSON} is the limit")
    try:
        return json.loads(disk.read(name, MAX_JSON))
    except (ValueError, RecursionError) as error:
        message = f"it is no JSON ({error})"
        raise Defect(message) from error


def read_own(disk: Place, names: Sequence[str], manifest: Manifest) -> Manifest | None:
    """Read ``rank.json`` of a rank, where ``names`` are; ``None`` if ``actrec.json`` says it all."""
    if OWN not in names:
        return None
    try:
        about = mapping(_json(disk, OWN), "the file", "recording")
        need(about["recording"] == manifest.recording, _FOREIGN)
        return replace(_description(about), recording=manifest.recording, run=manifest.run)
    except Defect as defect:
        raise corrupt(disk.shown(OWN), defect) from None


_FOREIGN = "it belongs to another recording"


def _parsed(content: Any) -> Manifest:
    about = mapping(content, "the file", "format", "version")
    need(about["format"] == FORMAT, "it does not describe a recording of actrec")
    need(
        about["version"] == VERSION,
        f"it is of version {str(about['version'])[:20]} of the format, and this actrec reads version {VERSION}",
    )
    about = mapping(about, "the file", "recording", "run")
    return replace(
        _description(about),
        recording=text(about["recording"], "the identity of the recording"),
        run=text(about["run"], "the identity of the run"),
    )


def _description(about: dict[str, Any]) -> Manifest:
    """What both files have."""
    about = mapping(about, "the file", "ranks", "began", "model", "options", "layers", "names")
    options = mapping(about["options"], "the options", "inputs", "grads", "dtype")
    layers = items(about["layers"], "the layers")
    ranks = integer(about["ranks"], "the number of ranks", MAX_RANKS)
    need(ranks > 0, "the number of ranks is 0")
    names = mapping(about["names"], "the names")
    return Manifest(
        text(about["model"], "the model"),
        tuple(_layer(layer) for layer in layers),
        {name: text(key, "a name") for name, key in names.items()},
        options["inputs"] is True,
        _optional(options["dtype"], "the dtype"),
        options["grads"] is True,
        ranks=ranks,
        began=integer(about["began"], "when it began"),
    )


def _layer(layer: Any) -> LayerInfo:
    layer = mapping(layer, "a layer", "name", "type", "transform")
    return LayerInfo(
        text(layer["name"], "the name of a layer"),
        text(layer["type"], "the type of a layer"),
        _optional(layer["transform"], "the transform of a layer"),
    )


def _optional(value: Any, what: str) -> str | None:
    return None if value is None else text(value, what)


# --- How a run ended ---------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Ending:
    """What a writer says when it ends, in ``end.json``."""

    recording: str
    passes: int
    shards: int
    error: str | None  # what the block was left by

    def content(self) -> bytes:
        """The file."""
        about = {
            "recording": self.recording,
            "passes": self.passes,
            "shards": self.shards,
            "error": self.error,
        }
        return json.dumps(about, indent=1).encode()


def read_ending(disk: Place, names: Sequence[str], recording: str) -> Ending | None:
    """How the writer of a folder, where ``names`` are, has ended; ``None`` if it did not say."""
    if END not in names:
        return None
    try:
        about = mapping(_json(disk, END), "the file", "recording", "passes", "shards", "error")
        need(about["recording"] == recording, _FOREIGN)
        return Ending(
            recording,
            integer(about["passes"], "the number of passes"),
            integer(about["shards"], "the number of shards"),
            _optional(about["error"], "the error"),
        )
    except FileNotFoundError:  # a run that is resumed has just removed it
        return None
    except Defect as defect:
        raise corrupt(disk.shown(END), defect) from None
