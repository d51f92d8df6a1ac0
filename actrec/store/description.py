"""``rank.json``: what a rank records. Each rank writes it to its own folder once, before its first shard."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Final, TypeVar

import torch

from actrec._rank import MAX_RANKS
from actrec._recordings.layer import FUNCTION, Role
from actrec._selection.names import type_name
from actrec._selection.selection import Selection
from actrec._selection.treatment import WHATS, Treatment
from actrec._text import function_name, own_version
from actrec.errors import ResumeError

from .format import DESCRIPTION, FORMAT, MAX_JSON, ROLES, VERSION, Defect, corrupt, need
from .forms import Maybe, checked
from .ledger import Heading
from .place import Place

T = TypeVar("T")

_LAYER: Final = {"name": str, "type": str, "transform": Maybe(str)}
#: The other roles of layers, each with the option that implies it for layers that are listed without a role.
_BESIDES: Final[dict[Role, str]] = {"input": "inputs", "gradient": "grads"}
#: The form of the file, besides the version.
_FORM: Final = {
    "recording": str,
    "ranks": int,
    "began": int,
    "model": str,
    "options": {"inputs": bool, "grads": bool, "dtype": Maybe(str)},
    "layers": [_LAYER],
    "functions": [_LAYER],
    "names": {str: str},
}


@dataclass(frozen=True, slots=True)
class LayerInfo:
    """A chosen layer, and the role in which it is recorded."""

    name: str
    type: str
    transform: str | None = None
    role: Role = "output"
    reduction: str | None = None  #: the reduction of its values, with arguments

    @classmethod
    def of(cls, name: str, kind: str, treatment: Treatment, role: Role) -> LayerInfo:
        """Return the entry of a layer with this treatment."""
        return cls(name, kind, function_name(treatment.transform), role, treatment.reduction)

    def node(self) -> dict[str, Any]:
        """Return the entry as it is in the file."""
        node = {key: getattr(self, key) for key in ("role", *_LAYER)}
        return node if self.reduction is None else {**node, "reduction": self.reduction}

    @property
    def shown(self) -> str:
        """Its name in a message."""
        return self.name if self.role == "output" else f"{self.role} of {self.name}"


@dataclass(frozen=True, slots=True)
class Description:
    """The content of ``rank.json``."""

    model: str
    layers: tuple[LayerInfo, ...]
    names: dict[str, str] = field(default_factory=dict)  #: other names of layers
    dtype: str | None = None
    recording: str = field(default_factory=lambda: uuid.uuid4().hex)  #: the same for all ranks
    ranks: int = 1  #: of the run that wrote it
    began: int = field(default_factory=time.time_ns)  #: when that run began in this rank
    #: The queries for functions; the functions that they matched are in the shards.
    functions: tuple[LayerInfo, ...] = ()

    @classmethod
    def of(cls, model: str, selection: Selection, dtype: torch.dtype | None) -> Description:
        """Return the description of a selection of a model of this type."""
        layers = (
            LayerInfo.of(one.key, type_name(one.module), one.treatments[what], what)
            for what in WHATS
            for one in selection.of(what)
        )
        functions = (
            LayerInfo.of(one.query, FUNCTION, one.treatment, one.what)
            for one in selection.functions
        )
        return cls(
            model,
            tuple(layers),
            selection.aliases,
            dtype=None if dtype is None else str(dtype),
            functions=tuple(functions),
        )

    @property
    def options(self) -> dict[str, Any]:
        """The options of ``record()`` that say what the values are."""
        roles = {layer.role for layer in self.layers}
        besides = {option: role in roles for role, option in _BESIDES.items()}
        return {**besides, "dtype": self.dtype}

    def heading(self, rank: int) -> Heading:
        """Return the heading before the first shard."""
        return Heading(self.recording, rank, self.ranks, self.began, shard=-1, committed=0)

    def content(self) -> bytes:
        """Return it as JSON, indented for people."""
        about = {
            "format": FORMAT,
            "version": VERSION,
            "recording": self.recording,
            "ranks": self.ranks,
            "began": self.began,
            "made_by": {"actrec": own_version(), "torch": torch.__version__},
            "model": self.model,
            "options": self.options,
            "layers": [layer.node() for layer in self.layers],
            "functions": [one.node() for one in self.functions],
            "names": {name: key for name, key in self.names.items() if name != key},
        }
        return json.dumps(about, indent=1).encode()

    def check_same(self, path: object, new: Description) -> None:
        """Raise ``ResumeError`` if ``new`` describes another recording than this one."""
        compared = [("the model was", self.model, new.model)]
        compared += [
            (f"{name} was", self.options[name], new.options[name]) for name in self.options
        ]
        compared += self._layer_differences(new)
        differences = [
            f"{what} {then!r} then, {now!r} now" for what, then, now in compared if then != now
        ]
        if differences:
            message = (
                f"record(into={str(path)!r}, resume=True): the recording there was made differently: "
                f"{'; '.join(differences[:5])}. Record it as before, or into another path."
            )
            raise ResumeError(message)

    def _layer_differences(self, new: Description) -> list[tuple[str, Any, Any]]:
        chosen, others = (one.layers + one.functions for one in (self, new))
        then, now = ([layer.shown for layer in one] for one in (chosen, others))
        if then != now:
            missing = [name for name in then if name not in now]
            added = [name for name in now if name not in then]
            if not missing and not added:
                return [("the order of the layers was", then[:8], now[:8])]
            return [("the layers were", missing[:8] or "fewer", added[:8] or "fewer")]
        pairs = zip(chosen, others, strict=True)
        return [
            (f"the {what} of layer {a.shown[:60]!r} was", getattr(a, what), getattr(b, what))
            for a, b in pairs
            for what in ("type", "transform", "reduction")
        ]


# --- Reading -----------------------------------------------------------------------------------------


def read_description(disk: Place) -> Description:
    """Read ``rank.json`` of a rank's folder. Raises as ``read_json`` does."""
    return read_json(disk, DESCRIPTION, _parsed)


def read_json(place: Place, name: str, parsed: Callable[[Any], T]) -> T:
    """Read a JSON file, and return ``parsed`` of its content.

    Raises:
        CorruptRecordingError: the file is damaged; also if ``parsed`` raises ``Defect``.
        FileNotFoundError: there is no such file.
    """
    try:
        size = place.size(name)
        need(size, "it is empty, or not a file")  # reading a pipe would wait
        need(size <= MAX_JSON, f"it has {size} bytes, and {MAX_JSON} is the limit")
        return parsed(_json(place.read(name, 0, size)))
    except Defect as defect:
        raise corrupt(place.shown(name), defect) from None


def _json(data: bytes) -> Any:
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        message = f"it is not JSON ({error})"
        raise Defect(message) from error


def _parsed(content: Any) -> Description:
    about = checked(content, {"format": str, "version": None}, "the file")
    need(about["format"] == FORMAT, "it does not describe a recording of actrec")
    need(
        about["version"] == VERSION,
        f"it is of version {str(about['version'])[:20]} of the format, and this actrec reads version {VERSION}",
    )
    about.setdefault("functions", [])  # missing in the first files of this version
    checked(about, _FORM, "the file")
    need(
        0 < about["ranks"] <= MAX_RANKS,
        f"it is of a run of {about['ranks']} ranks, and a run has from 1 to {MAX_RANKS}",
    )
    return Description(
        about["model"],
        tuple(_layers(about["layers"], about["options"])),
        about["names"],
        about["options"]["dtype"],
        about["recording"],
        about["ranks"],
        about["began"],
        tuple(_layers(about["functions"], dict.fromkeys(_BESIDES.values(), False))),
    )


def _layers(listed: list[dict[str, Any]], options: dict[str, bool]) -> Iterator[LayerInfo]:
    """Yield the layers. Those without a role are outputs, and also inputs and gradients if the options say so."""
    for layer in listed:
        role = layer.get("role", "output")
        need(role in ROLES, f"a layer has the unknown role {str(role)[:40]!r}")
        reduction = checked(layer.get("reduction"), Maybe(str), "the reduction of a layer")
        yield LayerInfo(layer["name"], layer["type"], layer["transform"], role, reduction)
    for role, option in _BESIDES.items():
        if options[option]:
            without = (layer for layer in listed if "role" not in layer)
            yield from (LayerInfo(layer["name"], layer["type"], None, role) for layer in without)
