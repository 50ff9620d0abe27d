"""Keywords that a class does not know: what the user reads instead of Python's own words."""

from __future__ import annotations

import difflib
import functools
import inspect
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

T = TypeVar("T")


def unknown_keyword(kind: str, name: str, known: Iterable[str]) -> str:
    """Plan has no field 'codek'. Did you mean 'codec'? It has: data, dispatcher, ..."""
    known = list(known)
    near = difflib.get_close_matches(name, known, n=1)
    hint = f"Did you mean {near[0]!r}? " if near else ""
    return f"{kind} has no field {name!r}. {hint}It has: {', '.join(known)}."


def names_nearest(cls: type[T]) -> type[T]:
    """Class decorator: an unknown keyword is a TypeError that names the nearest known one."""
    init: Callable[..., None] = vars(cls)["__init__"]
    known = [name for name in inspect.signature(init).parameters if name != "self"]

    @functools.wraps(init)
    def checked(self: T, *args: Any, **values: Any) -> None:
        for name in values:
            if name not in known:
                raise TypeError(unknown_keyword(cls.__name__, name, known))
        init(self, *args, **values)

    setattr(cls, "__init__", checked)  # noqa: B010 - assigned plainly, mypy refuses a method
    return cls
