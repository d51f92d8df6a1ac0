"""What to write instead of an attribute or an item that a recording, or a layer, does not have."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Final, TypeVar

from torch import Tensor, nn

from actrec._selection.globs import glob, is_glob
from actrec._selection.nearest import nearest
from actrec._selection.treatment import What
from actrec._text import count
from actrec._values.spec import flatten

K = TypeVar("K", bound=type)


def _by_word(table: dict[str, str]) -> dict[str, str]:
    """Return the table with a row for each word of the keys."""
    return {word: answer for words, answer in table.items() for word in words.split()}


#: What may be recorded besides outputs: the attributes of a recording.
_ATTRIBUTES: Final[Mapping[What, str]] = {"input": "inputs", "gradient": "grads"}
#: How to record it.
NOT_RECORDED: Final = {
    "inputs": "acts.inputs: inputs were not recorded. Record them: record(model, layers, inputs=True).",
    "grads": "acts.grads: gradients were not recorded. Record them: record(model, layers, grads=True).",
}

#: Names in other libraries, and what a recording has instead.
_OTHERWISE: Final = _by_word({
    "names layers layer_names": "list(acts)",
    "activations features outputs data tensors": "acts.values()",
    "to_dict as_dict dict concat concatenate": "acts.cat()",
    "summary describe statistics hist histogram histograms": "acts.stats()",
    "filter find subset": "acts.select('layer*')",
    "remove close detach_hooks remove_hooks": "nothing: the end of the with block removes the hooks",
    "to_pandas to_dataframe dataframe df": "pandas.DataFrame(acts.stats())",
    "shapes show print table info head": "acts, or print(acts)",
    "gradients gradient": "acts.grads",
    "memory size_bytes": "acts.nbytes",
    "num_calls calls lengths": "{{name: len(layer) for name, layer in acts.items()}}",
    "first_nan nans has_nan first_nonfinite": "acts.stats().first_nonfinite",
    "pop copy update": "dict(acts), a dict of the layers that you may change",
    "start stop hooks register attach": "with record(model) as acts: the hooks exist while the block runs",
    "html to_html dashboard": "acts.report('run.html')",
    "add unit pause clear": "it inside the block: with record(model, layers) as acts: ... acts.{name}(...)",
    "rows dataset Dataset": "actrec.data.rows(acts, name)",
    "loader dataloader DataLoader batches shuffle": "actrec.data.shuffled(acts, name, batch_size=64)",
    "compare": "actrec.compare(acts, others)",
    "load": "actrec.load(path)",
    "plot": "actrec.plot.distributions(acts)",
})  # fmt: skip

#: Names in other libraries, and the functions of actrec and of its modules.
_FUNCTIONS: Final = _by_word({
    "hist histogram histograms distribution": "actrec.plot.distributions(acts)",
    "heatmap image images imshow maps show": "actrec.plot.feature_maps(acts[name][0])",
    "cka heat correlation": "actrec.plot.similarity(acts)",
    "open read": "actrec.load(path)",
    "capture trace hook hooks watch extract": "with actrec.record(model, layers) as acts:",
})  # fmt: skip


#: Names that people try on a layer, and what a layer has instead.
_OF_LAYER: Final = _by_word({
    "output outputs value tensor tensors activations concat": "{place}.cat(), or {place}[0]",
    "input inputs": "acts.inputs[{name!r}], after record(model, layers, inputs=True)",
    "grad grads gradient gradients": "acts.grads[{name!r}], after record(model, layers, grads=True)",
    "stats summary describe hist histogram": "acts.select({name!r}).stats()",
    "to_numpy array": "{place}.cat().numpy()",
    "values list": "list({place}), or {place}.cat()",
    "append extend pop sort": "list({place}), a list of its calls that you may change",
    "report save": "acts.select({name!r}).{attribute}(path)",
    "plot": "actrec.plot.distributions(acts.select({name!r}))",
    "first": "{place}[0]",
    "last": "{place}[-1]",
    "calls": "len({place})",
})  # fmt: skip


def explained(why: Callable[[Any, str], str]) -> Callable[[K], K]:
    """Return a class decorator: a missing attribute raises an ``AttributeError`` with the message of ``why``."""

    def __getattr__(self: object, name: str) -> Any:  # noqa: N807  # it becomes that method
        if name.startswith("_"):  # Python and libraries probe for these
            message = f"{type(self).__name__!r} object has no attribute {name!r}"
            raise AttributeError(message)
        raise AttributeError(why(self, name))

    def with_it(kind: K) -> K:
        # Set here and not defined in the class, so that type checkers still report missing attributes.
        kind.__getattr__ = __getattr__  # type: ignore[attr-defined]
        return kind

    return with_it


# --- A layer -----------------------------------------------------------------------------------------


def no_attribute_of_layer(layer: Sequence[Any], name: str) -> str:
    """Return what to write for an attribute that tensors have, and a layer does not."""
    place = _place(layer)
    if name in _OF_LAYER:
        own = getattr(layer, "name", "...")
        return f"{place}.{name}: write {_OF_LAYER[name].format(place=place, name=own, attribute=name)}."
    access = _access(name)
    if access is None:
        return f"{place}.{name}: a layer has no such attribute. It is a list of calls: {place}.cat(), or {place}[0]."
    return f"{place}.{name}: {_instead(layer, place, access)}"


def no_index(layer: Sequence[Any], index: object) -> str:
    """Return what to write for an index that tensors take, and a layer does not."""
    place = _place(layer)
    return f"{place}[{_shown(index)}]: {_instead(layer, place, f'[{_shown(index)}]')}"


def no_call(layer: Sequence[Any], index: object) -> str:
    """Return the message for an index after the last call."""
    there = f"there {'is' if len(layer) == 1 else 'are'} {count(len(layer), 'call')}"
    return f"{_place(layer)}[{index}]: {there}"


def no_sum(layer: Sequence[Any]) -> str:
    """Return what to write for adding something to a layer that is not a list."""
    place = _place(layer)
    return f"{place} + ...: {_instead(layer, place, ' + ...')}"


def _place(layer: Sequence[Any]) -> str:
    """Return a layer as one writes it."""
    return f"acts[{getattr(layer, 'name', '...')!r}]"


def _instead(layer: Sequence[Any], place: str, access: str) -> str:
    calls = f"{place} is a list of {count(len(layer), 'call')}"
    if not len(layer):
        return f"{calls}: nothing was recorded of this layer."
    spec = flatten(layer[0])[1]
    if not spec.paths:
        return f"{calls}, and the first is not a tensor: {place}[0]."
    (path, _), *_ = spec.paths
    kind = f", each a {spec.kind}" if path else ""
    return f"{calls}{kind}: {place}.cat(){path}{access}, or {place}[0]{path}{access}."


def _access(name: str) -> str | None:
    """Return an attribute of a tensor as one writes it; ``None`` if tensors do not have it."""
    if not hasattr(Tensor, name):
        return None
    return f".{name}()" if callable(getattr(Tensor, name)) else f".{name}"


def _shown(index: object) -> str:
    """Return an index as one writes it."""
    if isinstance(index, tuple):
        return ", ".join(map(_shown, index))
    if isinstance(index, slice):
        ends = ["" if end is None else repr(end) for end in (index.start, index.stop)]
        return ":".join([*ends, *([repr(index.step)] if index.step is not None else [])])
    return "..." if index is ... else repr(index) if isinstance(index, (int, str)) else "index"


def no_name(module: str, name: str, names: Iterable[str]) -> AttributeError:
    """Return the error for a name that :mod:`actrec`, or a module of it, does not have, with what to write instead."""
    message = f"module {module!r} has no attribute {name!r}"
    return AttributeError(
        message if name.startswith("_") else message + _instead_of_name(name, names)
    )


def _instead_of_name(name: str, names: Iterable[str]) -> str:
    if name in _FUNCTIONS:
        return f". Write {_FUNCTIONS[name]}"
    if name in _OTHERWISE:
        return f". With a recording acts: {_OTHERWISE[name].format(name=name)}"
    if name in {"stats", "report", "select", "inputs", "grads", "cat", "stack"}:
        return f". It is part of a recording: acts.{name}"
    near = nearest(name, names)
    return (
        f". {near}" if near.startswith("Did") else ". Recordings are made by actrec.record(model)"
    )


# --- A recording -------------------------------------------------------------------------------------


def no_attribute_of_recording(recording: Mapping[str, Any], name: str) -> str:
    """Return the message for an attribute that a recording does not have: perhaps it is a layer, or tensors have it."""
    if name in NOT_RECORDED:
        return NOT_RECORDED[name]
    if name in recording:
        return f"acts.{name}: layers are items of a recording: acts[{name!r}]."
    if any(key.startswith(f"{name}.") for key in recording):
        return f"acts.{name}: layers are items of a recording, such as those in acts.select('{name}.**')."
    if name in _OTHERWISE:
        return f"acts.{name}: write {_OTHERWISE[name].format(name=name)}."
    first = next(iter(recording), "name")
    access = _access(name)
    if access is not None:
        return f"acts.{name}: acts maps names to layers, and a layer is a list of calls: acts[{first!r}].cat(){access}."
    return f"acts.{name}: a recording has no such attribute. Layers are items: acts[{first!r}]."


def no_layer(
    recording: Mapping[str, Any], beside: Mapping[What, Mapping[Any, Any]], name: object
) -> str:
    """Return the message for an item that is not the name of a layer.

    Args:
        recording: the recording.
        beside: those of inputs and of gradients, which may have the layer.
        name: the item.
    """
    if isinstance(name, (str, nn.Module)):
        return _no_layer_called(recording, beside, name)
    first = next(iter(recording), "name")
    if isinstance(name, tuple) and name and name[0] in recording and not isinstance(name[-1], str):
        rest = "".join(f"[{_shown(index)}]" for index in name[1:])
        return f"acts[{', '.join(map(_shown, name))}]: write one index after the other: acts[{name[0]!r}]{rest}."
    if isinstance(name, (int, slice)):
        return f"acts[{_shown(name)}]: layers have names: acts[{first!r}], or [*acts.values()][{_shown(name)}]."
    if isinstance(name, (Iterable, type, re.Pattern)) or callable(name):
        given = repr(name) if isinstance(name, (list, tuple, re.Pattern)) else "..."
        return f"acts[...]: expected the name of one layer. A recording of several layers is acts.select({given})."
    return f"acts[{name!r}]: expected the name of a layer, such as acts[{first!r}]."


def _no_layer_called(
    recording: Mapping[str, Any], beside: Mapping[What, Mapping[Any, Any]], name: str | nn.Module
) -> str:
    place = f"[{name!r}]" if isinstance(name, str) else "[...]"
    there = [f"acts.{_ATTRIBUTES[what]}{place}" for what, one in beside.items() if name in one]
    if there:
        return f"acts{place}: the outputs of that layer were not recorded; there is {' and '.join(there)}."
    if isinstance(name, nn.Module):
        return f"acts{place}: {no_module(name)}"
    return f"acts{place}: no layer of that name was recorded. {_other_name(recording, name)}"


def no_module(module: nn.Module) -> str:
    """Return the message for a module that is not in the recording."""
    return (
        f"this {type(module).__name__} was not recorded, or not by this recording: one that was loaded or copied has only "
        "the names of its layers."
    )


def _other_name(recording: Mapping[str, Any], name: str) -> str:
    matching = sum(map(bool, map(glob(name).fullmatch, recording))) if is_glob(name) else 0
    if matching:
        return f"A recording of the {count(matching, 'layer')} that match is acts.select({name!r})."
    if any(key.startswith(f"{name}.") for key in recording):
        return f"The layers that were recorded inside it are acts.select('{name}.**')."
    return nearest(name, recording)
