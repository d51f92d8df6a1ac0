"""What a rank records: ``rank.json``, which every rank writes into its own folder before its first shard, and never again."""

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
from actrec._selection.functions import WHATS
from actrec._selection.names import type_name
from actrec._selection.selection import Selection
from actrec._selection.treatment import Treatment
from actrec._text import function_name, own_version
from actrec.errors import ResumeError

from .format import DESCRIPTION, FORMAT, MAX_JSON, ROLES, VERSION, Defect, corrupt, need
from .forms import Maybe, checked
from .ledger import Heading
from .place import Place

T = TypeVar("T")

_LAYER: Final = {"name": str, "type": str, "transform": Maybe(str)}
#: Of what else layers may be listed, and the option that says so where they were not listed by role.
_BESIDES: Final[dict[Role, str]] = {"input": "inputs", "gradient": "grads"}
#: What is in the file, besides the version.
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
    """A layer that was chosen, and what of it is recorded."""

    name: str
    type: str
    transform: str | None = None
    role: Role = "output"
    reduction: str | None = None  #: what its values are reduced by, with arguments

    @classmethod
    def of(cls, name: str, kind: str, treatment: Treatment, role: Role) -> LayerInfo:
        """Return what is said of a layer that is treated so."""
        return cls(name, kind, function_name(treatment.transform), role, treatment.reduction)

    def node(self) -> dict[str, Any]:
        """As it stands in the file."""
        node = {key: getattr(self, key) for key in ("role", *_LAYER)}
        return node if self.reduction is None else {**node, "reduction": self.reduction}

    @property
    def shown(self) -> str:
        """What it is called in a message."""
        return self.name if self.role == "output" else f"{self.role} of {self.name}"


@dataclass(frozen=True, slots=True)
class Description:
    """What ``rank.json`` says."""

    model: str
    layers: tuple[LayerInfo, ...]
    names: dict[str, str] = field(default_factory=dict)  #: other names of layers
    dtype: str | None = None
    recording: str = field(default_factory=lambda: uuid.uuid4().hex)  #: the same for all ranks
    ranks: int = 1  #: of the run that wrote it
    began: int = field(default_factory=time.time_ns)  #: when that run began in this rank
    #: The queries for functions; what they have found is in the shards.
    functions: tuple[LayerInfo, ...] = ()

    @classmethod
    def of(cls, model: str, selection: Selection, dtype: torch.dtype | None) -> Description:
        """Return what is said of a model of this type, of which this is recorded."""
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

    def has(self, role: Role) -> bool:
        """Whether this is recorded of any layer."""
        return any(layer.role == role for layer in self.layers)

    def heading(self, rank: int) -> Heading:
        """Return what holds before the first shard."""
        return Heading(self.recording, rank, self.ranks, self.began, shard=-1, committed=0)

    def content(self) -> bytes:
        """Return it as JSON, readable for people too."""
        about = {
            "format": FORMAT,
            "version": VERSION,
            "recording": self.recording,
            "ranks": self.ranks,
            "began": self.began,
            "made_by": {"actrec": own_version(), "torch": torch.__version__},
            "model": self.model,
            "options": {
                **{option: self.has(role) for role, option in _BESIDES.items()},
                "dtype": self.dtype,
            },
            "layers": [layer.node() for layer in self.layers],
            "functions": [one.node() for one in self.functions],
            "names": {name: key for name, key in self.names.items() if name != key},
        }
        return json.dumps(about, indent=1).encode()

    def check_same(self, path: object, new: Description) -> None:
        """Raise ``ResumeError`` if ``new`` describes another recording than this one."""
        differences = [
            f"{what} {then!r} then, {now!r} now"
            for what, then, now in (
                ("the model was", self.model, new.model),
                *((f"{o} was", self.has(role), new.has(role)) for role, o in _BESIDES.items()),
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
    """Read ``rank.json`` of a rank's folder.

    Raises:
        CorruptRecordingError: it is damaged, or of another version of the format.
        FileNotFoundError: there is none.
    """
    return read_json(disk, DESCRIPTION, _parsed)


def read_json(place: Place, name: str, parsed: Callable[[Any], T]) -> T:
    """Read a file of JSON, and return what ``parsed`` makes of it.

    Raises:
        CorruptRecordingError: it is damaged; also if ``parsed`` raises ``Defect``.
        FileNotFoundError: there is none.
    """
    try:
        size = place.size(name)
        need(size, "it is empty, or no file")  # a pipe would be waited for
        need(size <= MAX_JSON, f"it has {size} bytes, and {MAX_JSON} is the limit")
        return parsed(_json(place.read(name, 0, size)))
    except Defect as defect:
        raise corrupt(place.shown(name), defect) from None


def _json(data: bytes) -> Any:
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        message = f"it is no JSON ({error})"
        raise Defect(message) from error


def _parsed(content: Any) -> Description:
    about = checked(content, {"format": str, "version": None}, "the file")
    need(about["format"] == FORMAT, "it does not describe a recording of actrec")
    need(
        about["version"] == VERSION,
        f"it is of version {str(about['version'])[:20]} of the format, and this actrec reads version {VERSION}",
    )
    about.setdefault("functions", [])  # which was not there from the first
    checked(about, _FORM, "the file")
    need(
        0 < about["ranks"] <= MAX_RANKS,
        f"it is of a run of {about['ranks']} ranks, and there are from 1 to {MAX_RANKS}",
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
    """The layers; where no role stands with them, they are outputs, and inputs and gradients too if the options say so."""
    for layer in listed:
        role = layer.get("role", "output")
        need(role in ROLES, f"a layer has the role {str(role)[:40]!r}, which there is not")
        reduction = checked(layer.get("reduction"), Maybe(str), "the reduction of a layer")
        yield LayerInfo(layer["name"], layer["type"], layer["transform"], role, reduction)
    for role, option in _BESIDES.items():
        if options[option]:
            without = (layer for layer in listed if "role" not in layer)
            yield from (LayerInfo(layer["name"], layer["type"], None, role) for layer in without)
