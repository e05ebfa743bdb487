"""What was compiled is kept on disk: a new process reads what an earlier one has compiled.

JAX has such a cache, which is off until it is given a folder. Importing `ppl` gives it one, in the library's cache
folder (`$GENPPL_CACHE`, or `~/.cache/genppl`), unless JAX is configured already or `GENPPL_CACHE=off`. An entry's name
is a hash of the program, its compiler and its options, so that an update of either finds none. It says nothing of the
processor, whose instructions the entry uses: each kind of processor has a folder of its own.

Several processes may share the folder. An entry that cannot be read, or written, is a warning of JAX, and compiled.
"""

from __future__ import annotations

import hashlib
import os
import platform
import warnings
from pathlib import Path

import jax
from jax.experimental.compilation_cache.compilation_cache import reset_cache

__all__ = ["cache_folder", "keep_compiled"]

_OFF = "off"


def cache_folder() -> Path:
    """Return the library's folder for what was downloaded or computed and may be needed again; it may not exist."""
    given = os.environ.get("GENPPL_CACHE", "")
    return (Path.home() / ".cache" / "genppl" if given in ("", _OFF) else Path(given)).expanduser()


def keep_compiled() -> None:
    """Turn JAX's persistent compilation cache on, unless somebody has configured it; see above."""
    configured = jax.config.jax_compilation_cache_dir is not None or not jax.config.jax_enable_compilation_cache
    if configured or os.environ.get("GENPPL_CACHE") == _OFF:
        return
    folder = cache_folder() / "compiled" / _processor()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK):
            raise PermissionError(f"{folder} is read-only")
    except OSError as error:
        warnings.warn(
            f"compiled programs are not kept: {error}. Set GENPPL_CACHE to a folder that can be written, or to "
            f'"{_OFF}".',
            stacklevel=3,
        )
        return
    jax.config.update("jax_compilation_cache_dir", str(folder))
    # Small programs too: there are hundreds, which together take seconds.
    for name, least in (("min_compile_time_secs", 0.0), ("min_entry_size_bytes", -1)):
        if f"JAX_PERSISTENT_CACHE_{name.upper()}" not in os.environ:
            jax.config.update(f"jax_persistent_cache_{name}", least)
    reset_cache()  # JAX decides with the first program that it compiles, which may be before


def _processor() -> str:
    """Return a name for this kind of processor."""
    known = Path("/proc/cpuinfo")
    lines = known.read_text().splitlines() if known.exists() else []
    features = sorted({line for line in lines if line.startswith(("model name", "flags", "Features"))})
    text = "\n".join([platform.machine(), platform.processor(), *features])
    return hashlib.sha256(text.encode()).hexdigest()[:12]
