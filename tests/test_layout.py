"""Imports point one way, and only public JAX is used."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FORBIDDEN = {
    "kernels": ("ppl.inference", "ppl.models"),
    "ppl": ("ppl.inference", "ppl.models"),
    "models": ("ppl.inference",),
    "inference": ("ppl.models",),
}


def imports(path: Path) -> list[str]:
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            found += [node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)]
    return found


@pytest.mark.parametrize("folder", FORBIDDEN)
def test_imports_point_one_way(folder):
    files = sorted((ROOT / folder).rglob("*.py"))
    assert files
    for path in files:
        crossing = [name for name in imports(path) if name.startswith(FORBIDDEN[folder])]
        assert not crossing, f"{path.relative_to(ROOT)} imports {crossing}"


def test_kernels_import_nothing_of_the_language():
    for path in sorted((ROOT / "kernels").rglob("*.py")):
        foreign = [name for name in imports(path) if name.split(".")[0] == "ppl" and not name.startswith("ppl.kernels")]
        assert not foreign, f"{path.relative_to(ROOT)} imports {foreign}"


def test_no_private_jax_and_no_torch_in_the_library():
    for folder in FORBIDDEN:
        for path in sorted((ROOT / folder).rglob("*.py")):
            private = [name for name in imports(path) if name.startswith(("jax._src", "torch"))]
            assert not private, f"{path.relative_to(ROOT)} imports {private}"


def test_every_package_is_listed_for_the_wheel():
    listed = (ROOT / "pyproject.toml").read_text()
    for folder in FORBIDDEN:
        for init in (ROOT / folder).rglob("__init__.py"):
            parts = init.parent.relative_to(ROOT).parts
            name = ".".join(parts if parts[0] == "ppl" else ("ppl", *parts))
            assert f'"{name}"' in listed, f"{name} is missing in pyproject.toml"
