"""Objects that hold functions compiled for them: a pickle leaves these out, and they are made anew when it is read."""

from __future__ import annotations

import abc
import functools
from typing import Any

import jax

__all__ = ["Compiled"]


class Compiled(abc.ABC):
    """An object with jitted functions among its attributes, which `_compile` makes; weights are pickled as arrays."""

    @abc.abstractmethod
    def _compile(self) -> None:
        """Set the compiled functions; to be called at the end of `__init__`."""

    def __getstate__(self) -> dict[str, Any]:
        """Return what a pickle holds: no compiled functions, and nothing that is computed when it is asked for."""
        computed = functools.cached_property
        return {
            name: value
            for name, value in vars(self).items()
            if not isinstance(value, jax.stages.Wrapped) and not isinstance(getattr(type(self), name, None), computed)
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take what a pickle held."""
        vars(self).update(state)
        self._compile()
