"""Small tables, for terminals and notebooks."""

from __future__ import annotations

import dataclasses
import html
from typing import Any

__all__ = ["brief", "html_table", "text_table"]


def text_table(rows: list[list[str]], width: int = 100) -> str:
    """Return rows of cells, the first one a heading, as aligned lines of at most `width` characters."""
    columns = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(size) for cell, size in zip(row, columns, strict=True)).rstrip() for row in rows]
    lines = [line if len(line) <= width else line[: width - 1] + "…" for line in lines]
    return "\n".join([lines[0], "-" * min(max(map(len, lines)), width), *lines[1:]])


def html_table(rows: list[list[str]]) -> str:
    """Return rows of cells, the first one a heading, as an HTML table."""
    head, *body = rows
    cells = "".join(f"<th style='text-align:left'>{html.escape(c)}</th>" for c in head)
    lines = "".join(
        "<tr>" + "".join(f"<td style='text-align:left'>{html.escape(c)}</td>" for c in row) + "</tr>" for row in body
    )
    return f"<table><thead><tr>{cells}</tr></thead><tbody>{lines}</tbody></table>"


def brief(value: Any) -> str:
    """Return a description as one would write it: settings that are what they are by default are left out."""
    if callable(value) and not dataclasses.is_dataclass(value):
        return getattr(value, "__name__", type(value).__name__)
    if isinstance(value, tuple):
        return f"({', '.join(map(brief, value))}{',' * (len(value) == 1)})"
    if not dataclasses.is_dataclass(value) or isinstance(value, type) or not value.__dataclass_params__.repr:
        return repr(value)
    shown = []
    for field in dataclasses.fields(value):
        given = getattr(value, field.name)
        if not field.repr or field.name.startswith("_"):
            continue
        if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            shown.append(brief(given))
        elif given is not field.default and given != field.default:
            shown.append(f"{field.name}={brief(given)}")
    return f"{type(value).__name__}({', '.join(shown)})"
