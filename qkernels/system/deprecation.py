"""Former names of keyword arguments, which a function accepts for one more version."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import ParamSpec, TypeVar

_P = ParamSpec("_P")
_R = TypeVar("_R")


def renamed_keywords(**names: str) -> Callable[[Callable[_P, _R]], Callable[_P, _R]]:
    """A decorator: the function also accepts the keywords `names` (old=new), with a DeprecationWarning.

    >>> @renamed_keywords(colour="color")
    ... def paint(color: str) -> str:
    ...     return color
    >>> paint(colour="red")
    'red'

    Raises:
        TypeError: when the function is called with the old and the new name of one argument.
    """

    def decorate(function: Callable[_P, _R]) -> Callable[_P, _R]:
        @functools.wraps(function)
        def accepting(*args: _P.args, **kwargs: _P.kwargs) -> _R:
            for old in names.keys() & kwargs.keys():
                new = names[old]
                if new in kwargs:
                    raise TypeError(f"{old}= is the former name of {new}=: give only {new}")
                warnings.warn(
                    f"{old}= is called {new}= now, and the former name is accepted until qkernels 0.2",
                    DeprecationWarning,
                    stacklevel=2,
                )
                kwargs[new] = kwargs.pop(old)
            return function(*args, **kwargs)

        return accepting

    return decorate
