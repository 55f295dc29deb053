# SPDX-License-Identifier: Apache-2.0
"""HTML in which no text becomes markup: ``tag`` escapes all that is none already."""

from __future__ import annotations

import html
from collections.abc import Iterable


class Markup(str):
    """Text that is HTML already."""

    __slots__ = ()


def tag(name: str, /, *children: str, **attributes: object) -> Markup:
    inner = "".join(
        c if isinstance(c, Markup) else html.escape(c) for c in _shown(children)
    )
    return Markup(f"<{name}{_attributes(attributes)}>{inner}</{name}>")


def void(name: str, /, **attributes: object) -> Markup:
    return Markup(f"<{name}{_attributes(attributes)}/>")


def _attributes(given: dict[str, object]) -> str:
    found: list[str] = []
    for key, value in given.items():
        text = f"{value:.1f}" if isinstance(value, float) else str(value)
        if text:
            name = key.rstrip("_").replace("_", "-")
            found.append(f' {name}="{html.escape(text)}"')
    return "".join(found)


def _shown(texts: Iterable[str]) -> Iterable[str]:
    """Without characters that HTML forbids; what turns text round is shown as such."""
    for text in texts:
        if isinstance(text, Markup) or text.isprintable():
            yield text
        else:
            yield "".join(c if c.isprintable() or c == "\n" else "�" for c in text)
