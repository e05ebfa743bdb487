"""What can go wrong in a program or a run, in the words of the person who wrote the program.

Every message names the site or the argument, the line of the user's file, what was given and what to do. Errors of
a *program* are raised while it is staged, before anything runs; errors of a *run* carry the step at which the
particles went wrong.
"""

from __future__ import annotations

import linecache
import os
import sys
from types import FrameType

import flax
import jax
import numpyro

__all__ = [
    "AllParticlesDied",
    "BranchError",
    "DerivativeError",
    "DuplicateSite",
    "InvalidWeight",
    "MisplacedSite",
    "ProgramError",
    "SiteTypeError",
    "SiteValueError",
]

_HERE = os.path.dirname(os.path.abspath(__file__))
_LIBRARY_FOLDERS = tuple(
    folder + os.sep
    for folder in (
        _HERE,
        *(os.path.join(os.path.dirname(_HERE), sibling) for sibling in ("models", "inference", "kernels")),
        os.path.dirname(jax.__file__),
        os.path.dirname(numpyro.__file__),
        os.path.dirname(flax.__file__),
    )
)


class ProgramError(Exception):
    """A program that cannot be staged: the base of every error found before a run."""


class DuplicateSite(ProgramError, ValueError):
    """Two sites of one name."""


class MisplacedSite(ProgramError, ValueError):
    """A site where no interpreter can see it: outside a model, or inside a JAX transformation of the user's own."""


class BranchError(ProgramError, TypeError):
    """A Python branch, loop bound or conversion that needs the value of something known only when the program runs."""


class DerivativeError(ProgramError, TypeError):
    """A derivative that the library cannot give without bias: of a run, with respect to a value that it depends on."""


class SiteValueError(ProgramError, ValueError):
    """A site whose value has the wrong shape, or a set of values whose names do not fit the program."""


class SiteTypeError(ProgramError, TypeError):
    """A site that was given something of the wrong type."""


class InvalidWeight(FloatingPointError):
    """A living particle's log-weight became NaN or +inf."""


class AllParticlesDied(RuntimeError):
    """Every particle has weight zero."""


def user_frame() -> FrameType | None:
    """Return the innermost frame that belongs to neither this library, nor JAX, NumPyro or flax."""
    frame = sys._getframe(1)
    while frame is not None and _is_library(frame.f_code.co_filename):
        frame = frame.f_back
    return frame


def user_line() -> str:
    """Return `file:line` of the user's statement that is being executed."""
    return describe_frame(user_frame())


def describe_frame(frame: FrameType | None, line: int | None = None) -> str:
    """Return `file:line` for a frame, as it is printed in messages."""
    if frame is None:
        return "an unknown line"
    return f"{os.path.basename(frame.f_code.co_filename)}:{line or frame.f_lineno}"


def source_text(frame: FrameType, line: int) -> str:
    """Return the text of a source line, or an empty string where the source is not at hand."""
    return linecache.getline(frame.f_code.co_filename, line, frame.f_globals).strip()


def last_user_frame(error: BaseException) -> tuple[FrameType, int] | None:
    """Return the frame of the user's code nearest to where an exception was raised, with its line."""
    found = None
    traceback = error.__traceback__
    while traceback is not None:
        if not _is_library(traceback.tb_frame.f_code.co_filename):
            found = traceback.tb_frame, traceback.tb_lineno
        traceback = traceback.tb_next
    return found


def _is_library(filename: str) -> bool:
    return filename.startswith(_LIBRARY_FOLDERS) or filename.startswith("<frozen")
