"""Values of settings as text: in the syntax of overrides, and in the names of variants."""

import re
from typing import Any

# Texts that an override may hold without quotes; any other text could be read as a number, a list or an expression.
_PLAIN = re.compile(r"[A-Za-z_/][\w./-]*", re.ASCII)
_READ_OTHERWISE = ("null", "true", "false", "nan", "inf")


def literal(value: Any) -> str:
    """A value in the syntax of overrides. A text is quoted where needed, so that it is read as the same text."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return f"[{','.join(literal(item) for item in value)}]"
    if isinstance(value, dict):
        return f"{{{','.join(f'{literal(key)}:{literal(item)}' for key, item in value.items())}}}"
    if isinstance(value, int | float):
        return str(value)
    text = str(value)
    if _PLAIN.fullmatch(text) and text.lower() not in _READ_OTHERWISE:
        return text
    # A backslash escapes only before a quote; there each one is doubled.
    escaped = re.sub(r"(\\*)('|$)", lambda end: end[1] * 2 + ("\\'" if end[2] else ""), text)
    return f"'{escaped}'"


def word(value: Any) -> str:
    """A value as part of a name."""
    text = _text(value)
    return "".join(c if c.isalnum() or c in "._+" else "_" for c in text) or "none"


def _text(value: Any) -> str:
    if isinstance(value, list):
        lists = any(isinstance(item, list) for item in value)
        return ("_" if lists else "+").join(_text(item) for item in value)
    if isinstance(value, dict):
        return ".".join(str(item) if key == "kind" else f"{key}{_text(item)}" for key, item in value.items())
    return str(value)
