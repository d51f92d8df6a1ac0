"""Makes HTML of elements. Text is escaped only here, so that no text of a model or a user is ever interpreted as markup.

>>> tag("p", "1 < 2, ", tag("b", "said"), class_="note")
'<p class="note">1 &lt; 2, <b>said</b></p>'
"""

from __future__ import annotations

from html import escape
from typing import Final

#: Elements that have neither content nor an end tag.
_VOID: Final = frozenset({"br", "col", "img", "meta"})


class Html(str):
    """Markup. Any other text is escaped where it becomes part of an element."""

    __slots__ = ()


def escaped(text: str) -> Html:
    """Return text as markup; markup is returned unchanged."""
    return text if isinstance(text, Html) else Html(escape(text))


def together(*parts: str) -> Html:
    """Return texts and elements one after the other."""
    return Html("".join(map(escaped, parts)))


def tag(name: str, /, *inside: str, **attributes: object) -> Html:
    """Return an element.

    Args:
        name: the name of the element.
        inside: the texts and elements in it.
        attributes: by their names, with ``_`` for ``-`` and after Python keywords: ``class_``. ``None`` and false are left out.
    """
    said = name
    for key, value in attributes.items():
        if value is not None and value is not False:
            spelled = key.rstrip("_").replace("_", "-")
            said += f" {spelled}" if value is True else f' {spelled}="{escape(str(value))}"'
    end = "" if name in _VOID else f"{together(*inside)}</{name}>"
    return Html(f"<{said}>{end}")
