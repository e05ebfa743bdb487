"""Every notebook runs from top to bottom: with fewer steps and particles than the reader's, and some on
the first blocks of the network alone."""

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOKS = sorted((Path(__file__).parent.parent / "notebooks").glob("*.ipynb"))
LOADED = 'LanguageModel.load(cached if cached.exists() else "HuggingFaceTB/SmolLM2-135M-Instruct")'
SHALLOW = f"""{LOADED}
import dataclasses
from flax import nnx
decoder = lm.decoder
decoder.blocks = nnx.List(decoder.blocks[:2])
decoder.config = dataclasses.replace(decoder.config, num_layers=2)
lm = LanguageModel(decoder, lm.tokenizer, end_tokens=lm.end_tokens)
"""
SMALLER = {
    "02_controlled_text": {LOADED: SHALLOW},
    "03_diffusion_correctors": {
        "1200": "60",
        "num_steps=50)": "num_steps=10)",
        "num_steps=100)": "num_steps=20)",
        "reverse(100)": "reverse(20)",
        "(50, 200)": "(10, 20)",
        "few, 50)": "few, 10)",
        "plane, 50)": "plane, 10)",
        "eights, 50)": "eights, 10)",
        "SMC(128": "SMC(16",
        "SMC(512": "SMC(64",
        "SMC(1024": "SMC(64",
        "SMC(2048": "SMC(256",
        "smooth(8), 512)": "smooth(8), 64)",
    },
    "04_mcmc_and_particle_mcmc": {
        LOADED: SHALLOW,
        "num_runs=8": "num_runs=2",
        "num_runs=4": "num_runs=2",
        "500, num_warmup=100": "100, num_warmup=20",
        "1000, num_warmup=300": "100, num_warmup=20",
        "250, num_warmup=250": "50, num_warmup=50",
        "8, num_warmup=4, num_chains=8": "2, num_warmup=1, num_chains=4",
        "8, num_warmup=8, num_chains=8": "2, num_warmup=1, num_chains=4",
        "24, num_warmup=8": "4, num_warmup=1",
    },
}


@pytest.mark.slow
@pytest.mark.weights
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs(path, monkeypatch):
    monkeypatch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
    notebook = nbformat.read(path, as_version=4)
    for given, smaller in SMALLER.get(path.stem, {}).items():
        code = [cell for cell in notebook.cells if cell.cell_type == "code" and given in cell.source]
        assert code, f"{path.name} has no {given} in its code: say here what to run it with"
        for cell in code:
            cell.source = cell.source.replace(given, smaller)
    folder = {"metadata": {"path": str(path.parent)}}
    NotebookClient(notebook, timeout=900, kernel_name="python3", resources=folder).execute()
    pictures = [
        output for cell in notebook.cells for output in cell.get("outputs", []) if "image/png" in output.get("data", {})
    ]
    assert len(pictures) >= 4


def test_there_are_notebooks():
    assert NOTEBOOKS
