"""Elements of HTML that escape whatever is text. Only `Markup` goes in as it is, and only this module makes it."""

from __future__ import annotations

from collections.abc import Iterable
from html import escape

_VOID = {"input", "link", "meta"}


class Markup:
    """HTML that is safe to send."""

    __slots__ = ("text",)

    def __init__(self, text: str) -> None:
        self.text = text


def element(tag: str, *content: Markup | str | None, **attributes: str | bool | None) -> Markup:
    """An element. In attribute names `_` stands for `-`, one at the end for nothing; None and False leave one out."""
    written = "".join(_attribute(name, value) for name, value in attributes.items())
    inside = together(*content).text
    return Markup(f"<{tag}{written}>" if tag in _VOID else f"<{tag}{written}>{inside}</{tag}>")


def together(*content: Markup | str | None) -> Markup:
    """Texts, escaped, and elements, one after another."""
    return Markup("".join(_written(each) for each in content))


def joined(elements: Iterable[Markup]) -> Markup:
    """Elements one after another."""
    return together(*elements)


def document(title: str, body: Markup, *, style: str, script: str) -> str:
    """A whole page. `style` and `script` are our own and go in as they are."""
    head = together(
        element("meta", charset="utf-8"),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("meta", name="color-scheme", content="light dark"),
        element("link", rel="icon", href="data:,"),
        element("title", title),
        Markup(f"<style>{style}</style>"),
    )
    page = together(element("head", head), element("body", body, Markup(f"<script>{script}</script>")))
    return f"<!doctype html>{element('html', page, lang='en').text}"


def _written(content: Markup | str | None) -> str:
    if content is None:
        return ""
    return content.text if isinstance(content, Markup) else escape(content)


def _attribute(name: str, value: str | bool | None) -> str:
    name = name.rstrip("_").replace("_", "-")
    if value is None or value is False:
        return ""
    return f" {name}" if value is True else f' {name}="{escape(value)}"'
