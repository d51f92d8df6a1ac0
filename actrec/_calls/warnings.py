"""The warnings at the end of the block, with their likely causes.

They are about layers of which nothing was recorded, or not every call; about layers whose gradients cannot be
recorded; and about forwards that did not stop early.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from typing import Any, Final, TypeAlias

from torch import nn

from actrec._recordings.overflow import Overflows
from actrec._selection.selection import Choice
from actrec._selection.treatment import What
from actrec._text import count, folded, listed
from actrec._torch import DROPOUTS
from actrec._values.spec import tensors
from actrec.errors import (
    IncompleteLayerWarning,
    MissingGradientWarning,
    OverflowWarning,
    UnusedLayerWarning,
)

from .functions import Missing
from .own_calls import Unrecorded
from .session import Session
from .track import Track

_Tracks: TypeAlias = Mapping[str, tuple[Choice, Track]]

_NEVER_CALLED = (
    "it was never called. Usual causes: its .forward() or its weights are used directly (hooks run only when "
    "the module itself is called), the branch with it was not taken, or code of another kind ran in its place "
    "(a fused or exported version)"
)


_IN_A_BODY = (
    "it is called in the body of an operator that PyTorch compiles itself where gradients are enabled (torch.cond, scan, "
    "map, while_loop), and hooks do not run there. They do under torch.no_grad(), if torch._dynamo was imported before "
    "the block"
)
_IN_A_COMPILED_BODY = (
    "it is called in the body of an operator (torch.cond, scan, map, while_loop, nested_compile_region), and compiled code does "
    "not report values from there. Without compiled=True it is recorded, under torch.no_grad()"
)
_STANCE = (
    "torch.compiler.set_stance() was called inside the with block, so compiled code ran compiled from then on, "
    "without hooks. Call it before the block"
)

_NO_GRAPH = (
    "nothing that its calls returned requires grad. They ran under torch.no_grad() or inference_mode(), or neither the "
    "inputs nor any parameter up to there require grad (a frozen part)"
)
_REENTRANT = (
    "its calls ran inside reentrant activation checkpointing, which builds their graph only while backward() runs. Call "
    "backward() inside the with block, or checkpoint with use_reentrant=False"
)

_TOO_LATE = (
    "no backward() has reached it inside the with block. A recording to a path is complete when the block ends, so "
    "call backward() inside it"
)

_WRITTEN_VIEW = (
    "no gradient has arrived for {many} that it returned, and they are views. If the model writes such a view in place, compiled "
    "code does not report its gradient. Let the layer return a clone(), or record without compiled=True"
)


def warned_of(
    model: nn.Module, tracks: _Tracks, session: Session, missing: Missing
) -> Iterator[tuple[str, type[UserWarning]]]:
    """Yield the warnings about all that was asked for and is not in the recording, each kind once.

    ``missing`` has the functions that were not recorded.
    """
    came = any(track.grads is not None and track.grads.came for _, track in tracks.values())
    yield from _unused(model, tracks, session, missing)
    for kind, what, why in (
        (MissingGradientWarning, "no gradient can reach", _no_graph),
        *([(MissingGradientWarning, "gradients may be missing of", _written_view)] if came else []),
        (IncompleteLayerWarning, "calls are missing or may be wrong of", _incomplete),
    ):
        causes = {key: cause for key, one in tracks.items() if one[1].kept and (cause := why(*one))}
        if causes:
            yield _explained(what, causes, model, tracks), kind
    yield from _too_large(model, tracks)
    if session.stop is not None and session.stop.caught:
        forwards = "a forward" if session.stop.caught == 1 else f"{session.stop.caught} forwards"
        message = (
            f"record(stop_early=True): {forwards} of this {type(model).__name__} ran to the end, because the model caught the "
            'exception that ends them. Let it catch errors with "except Exception:", not with a bare "except:".'
        )
        yield message, UserWarning


def _unused(
    model: nn.Module, tracks: _Tracks, session: Session, missing: Missing
) -> Iterator[tuple[str, type[UserWarning]]]:
    """Warn once about all layers that have no recorded value."""
    unused = {
        key: (choice, track)
        for key, (choice, track) in tracks.items()
        if not track.kept and (track.called or track.error or not choice.is_function)
    }
    uncalled, is_called = missing
    if not (unused or uncalled):
        return
    there = {id(module) for module in model.modules()}
    shared = _shared(model)
    causes = {
        key: _cause(there, *item)
        for key, item in unused.items()
        if not _nobody_chose(there, shared, *item)
    }
    causes |= uncalled
    is_called |= any(sum(track.unrecorded.values()) for _, track in tracks.values())
    if session.passes.count or is_called:
        if not causes:
            return
        message = _explained("nothing was recorded of", causes, model, {*tracks, *uncalled})
    else:
        outside = ", except in acts.pause()" if session.was_paused else ""
        message = (
            f"record(): nothing was recorded, this {type(model).__name__} was not called inside the with block{outside}."
            f" {_why(session)}"
        )
    yield message, UnusedLayerWarning


def _shared(model: nn.Module) -> set[int]:
    """Return the parameters (ids) that several modules share."""
    many = Counter(
        id(one) for module in model.modules() for one in module.parameters(recurse=False)
    )
    return {identity for identity, owners in many.items() if owners > 1}


def _nobody_chose(
    there: Collection[int], shared: Collection[int], choice: Choice, track: Track
) -> bool:
    """Whether an uncalled layer is in the recording only because all leaves are, and has no weights of its own.

    It is not warned about (the table shows it). Examples are the dropout modules of an attention that computes dropout in a
    fused function, and an embedding whose weights other modules use.
    """
    is_bare = choice.by_default and all(id(one) in shared for one in choice.module.parameters())
    was_there = id(choice.module) in there and not (track.called or track.error is not None)
    return is_bare and was_there and _elsewhere(track) is None


def _why(session: Session) -> str:
    if session.stance.replaced:
        return f"The likely cause: {_STANCE}."
    return "Was its .forward() called, a copy of it, or a model made from it (exported, scripted)?"


def _too_large(model: nn.Module, tracks: _Tracks) -> Iterator[tuple[str, type[UserWarning]]]:
    """Warn once about values that do not fit into the dtype that they were cast to."""
    found = {
        what + repr(key): overflows
        for key, (_, track) in tracks.items()
        if track.capture.dtype is not None
        for what, overflows in _overflows(track)
    }
    if not found:
        return
    one = next(iter(found.values()))
    what = "the largest it can hold" if one.saturates else "infinite or NaN in the recording"
    lines = [f"  {name}: {count(each.total, 'value')}." for name, each in found.items()]
    if len(lines) > _MOST_LINES:
        lines[_MOST_LINES:] = [f"  and {len(lines) - _MOST_LINES} more layers."]
    message = (
        f"record(dtype={one.dtype}): finite values of this {type(model).__name__} are too large for it, and are {what}. "
        "torch.bfloat16 has the range of float32; without dtype values stay as they are."
    )
    yield "\n".join([message, *lines]), OverflowWarning


_MOST_LINES: Final = 8
_OF: Final[Mapping[What, str]] = {
    "output": "",
    "input": "the input of ",
    "gradient": "the gradient of ",
}


def _overflows(track: Track) -> Iterator[tuple[str, Overflows]]:
    for role, layer in track.layers.items():
        overflows = layer._overflows
        if overflows is not None and overflows.total:
            yield _OF[role], overflows


def _incomplete(choice: Choice, track: Track) -> str | None:
    since = track.session.replaced.get(id(choice.module))
    if since is not None:
        return (
            f"from pass {since} on another module was in its place, whose calls are not recorded. Change the model before "
            "the block, or open another block after that"
        )
    for where in (Unrecorded.BACKWARD, Unrecorded.TRANSFORMED) if track.unrecorded else ():
        if many := track.unrecorded[where]:
            return f"{count(many, 'call')} of it ran {where.value}"
    if track.overtaken:
        return (
            f"hooks were added to it in the middle of {count(track.overtaken, 'forward')}, and ran after those of actrec: "
            "what they changed in that call is not recorded. Add them between two forwards, or with prepend=True"
        )
    if track.placeholder is not None and not track.has_tensors:
        return (
            f"its recorded values have no tensor, but {track.placeholder!r}, in place of an object that actrec does not take "
            "apart. Let a transform return the tensors that you need"
        )
    return _in_a_body(track) if track.compiled else None


def _explained(what: str, causes: dict[str, str], model: nn.Module, tracks: Collection[str]) -> str:
    """Return the message: ``what`` is wrong with how many layers, and a line for each cause with its layers."""
    many = f"{len(causes)} of {count(len(tracks), 'layer')}"
    layers: dict[str, list[str]] = {}
    for key, cause in causes.items():
        layers.setdefault(cause, []).append(key)
    lines = [f"  {listed(folded(keys))}: {cause}." for cause, keys in layers.items()]
    return "\n".join([f"record(): {what} {many} of this {type(model).__name__}.", *lines])


def _no_graph(_: Choice, track: Track) -> str | None:
    grads = track.grads
    if grads is not None and not grads.watched:
        return _REENTRANT if grads.reentrant else _NO_GRAPH
    if grads is not None and grads.backwards is not None and not grads.came:
        return _TOO_LATE
    outputs: Any = track.outputs
    kept = outputs if isinstance(outputs, list) and not track.capture.detach else ()
    if kept and not any(t.requires_grad for value in kept for t in tensors(value)):
        return _NO_GRAPH
    return None


def _written_view(_: Choice, track: Track) -> str | None:
    if track.grads is None or not track.grads.views_waiting:
        return None
    return _WRITTEN_VIEW.format(many=count(track.grads.views_waiting, "tensor"))


def _not_kept(track: Track) -> str:
    if track.error is None:
        return (
            f"the transform returned None, which skips a call, for all of its {track.called} calls"
        )
    first_line = track.error.partition("\n")[0].rstrip(".")
    return f"recording it raised an error, which was caught ({first_line})"


def _cause(there: Collection[int], choice: Choice, track: Track) -> str:
    """Why nothing was recorded of a layer; ``there`` are the ids of the modules that the model has now."""
    if track.called or track.error is not None:
        return _not_kept(track)
    return _elsewhere(track) or _not_called(there, choice, track)


def _elsewhere(track: Track) -> str | None:
    """Return where all calls of a layer ran, if calls are not recorded there."""
    for where in Unrecorded:
        if track.unrecorded[where]:
            verb = "were made" if where is Unrecorded.TRACED else "ran"
            return (
                f"all of its {count(sum(track.unrecorded.values()), 'call')} {verb} {where.value}"
            )
    if track.compiled:
        return _in_a_body(track)
    return _STANCE if track.session.stance.replaced else None


def _in_a_body(track: Track) -> str:
    return _IN_A_COMPILED_BODY if track.session.stance.in_graph else _IN_A_BODY


def _not_called(there: Collection[int], choice: Choice, track: Track) -> str:
    """Why a layer was not called."""
    module = choice.module
    if id(module) not in there:
        return "another module was put in its place inside the with block; the hooked one was not called"
    if type(module).__call__ is not nn.Module.__call__:
        return (
            f"its class {type(module).__name__} defines __call__, and only the __call__ of torch.nn.Module runs hooks. "
            "Record modules inside it or around it"
        )
    if isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear):
        return "nn.MultiheadAttention uses its weights without calling it. Record the attention module instead"
    if isinstance(module, DROPOUTS):
        return f"{_NEVER_CALLED}; attention often computes dropout itself, fused (scaled_dot_product_attention) or with F.dropout"
    return f"{_NEVER_CALLED}, or {_IN_A_BODY}" if track.session.stance.made_way else _NEVER_CALLED
