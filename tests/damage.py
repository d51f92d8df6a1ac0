"""What the tests of damaged recordings share: files that somebody has changed, by accident or by design."""

from __future__ import annotations

import json
import os
import struct
import zlib
from typing import TYPE_CHECKING, Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from actrec import CorruptRecordingError, load
from actrec._values.spec import tensors

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


def rewrite(
    shard: Path, change: Callable[[dict[str, Any]], object], *, table: Any = None, data: Any = None
) -> None:
    """Change what a shard says, and sign it: this is no accident, but somebody who knows the format."""
    content = shard.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    about = json.loads(header["__metadata__"]["actrec"])
    changed = change(about)
    about = about if changed is None else changed
    header["__metadata__"]["actrec"] = json.dumps(about)
    if table is not None:
        header = table(header)
    sign(shard, json.dumps(header, separators=(",", ":")).encode(), content[8 + length :])


def sign(shard: Path, header: bytes, data: bytes) -> None:
    before, mark, rest = header.partition(b'"header_crc32":"')
    if mark:
        checksum = zlib.crc32(before + mark + b"00000000" + rest[8:])
        header = before + mark + f"{checksum:08x}".encode() + rest[8:]
    shard.write_bytes(struct.pack("<Q", len(header)) + header + data)


MUTATIONS = st.lists(
    st.one_of(
        st.tuples(st.just("flip"), st.integers(0, 10**9), st.integers(0, 7)),
        st.tuples(st.just("set"), st.integers(0, 10**9), st.integers(0, 255)),
        st.tuples(st.just("cut"), st.integers(0, 10**9), st.just(0)),
        st.tuples(st.just("drop"), st.integers(0, 10**9), st.integers(1, 64)),
        st.tuples(st.just("double"), st.integers(0, 10**9), st.integers(1, 64)),
        st.tuples(st.just("digit"), st.integers(0, 10**9), st.integers(0, 9)),
    ),
    min_size=1,
    max_size=4,
)


#: How many; "nox -s crash" asks for thousands, and for others each time.
MANY = int(os.environ.get("ACTREC_MUTATIONS", "120"))
many_mutations = settings(
    max_examples=MANY, deadline=None, derandomize=MANY == 120,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)  # fmt: skip


def mutated(content: bytes, mutations: list[tuple[str, int, int]], within: int) -> bytes:
    """The content with some bytes changed, most of them in its first part."""
    changed = bytearray(content)
    for kind, place, amount in mutations:
        if not changed:
            break
        at = place % min(len(changed), within)
        match kind:
            case "flip":
                changed[at] ^= 1 << amount
            case "set":
                changed[at] = amount
            case "cut":
                del changed[at:]
            case "drop":
                del changed[at : at + amount]
            case "double":
                changed[at:at] = changed[at : at + amount]
            case "digit":
                digits = [i for i, byte in enumerate(changed[:within]) if chr(byte).isdigit()]
                if digits:
                    changed[digits[place % len(digits)]] = ord(str(amount))
    return bytes(changed)


def use(path: Path) -> bool:
    """Do everything that can be done with a recording; whether it was found to be damaged."""
    try:
        acts = load(path)
        repr(acts)
        for recording in (acts, acts.inputs):
            for layer in recording.values():
                for value in layer:
                    for tensor in tensors(value):
                        tensor.numel() < 10**6 and tensor.clone()
    except CorruptRecordingError:
        return True
    except AttributeError as error:  # "inputs" may have become false
        assert "inputs were not recorded" in str(error)  # noqa: PT017
    return False
