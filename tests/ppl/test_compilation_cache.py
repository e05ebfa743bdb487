"""Compiled programs are kept for other processes; each case is a process of its own: importing makes the cache."""

import json
import os
import subprocess
import sys

import pytest

RUN = """
import collections, json, warnings
import jax
{before}
with warnings.catch_warnings(record=True) as seen:
    warnings.simplefilter("always")
    import ppl
    import numpyro.distributions as dist
    from ppl.inference import SMC
    {after}

    events = collections.Counter()
    jax.monitoring.register_event_listener(lambda name, **_: events.update([name.rsplit("/", 1)[-1]]))

    @ppl.model
    def coin():
        z = ppl.sample("z", dist.Normal(0.0, 1.0))
        ppl.observe("y", dist.Normal(z, 1.0), 0.5)

    log_evidence = float(ppl.infer(coin(), SMC(8)).log_evidence)
print(json.dumps({{
    "hits": events["cache_hits"], "misses": events["cache_misses"], "log_evidence": log_evidence,
    "folder": jax.config.jax_compilation_cache_dir, "warnings": [str(w.message) for w in seen],
}}))
"""


def run(folder, before="", after=""):
    """What a new process says that runs a small program; its cache folder is `folder`."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("JAX_COMP", "JAX_PERS"))}
    done = subprocess.run(
        [sys.executable, "-c", RUN.format(before=before, after=after)],
        env=environment | {"GENPPL_CACHE": str(folder)},
        capture_output=True,
        text=True,
        check=True,
    )
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def filled(tmp_path_factory):
    """A folder, and what the process said that filled it."""
    folder = tmp_path_factory.mktemp("cache")
    return folder, run(folder)


def test_a_second_process_compiles_nothing(filled):
    folder, first = filled
    assert first["misses"] > 0 and first["folder"].startswith(str(folder / "compiled")) and not first["warnings"]
    # The second has compiled something before: JAX decides with the first program whether there is a cache.
    second = run(folder, before="jax.numpy.arange(3) + 1")
    assert second["misses"] == 0 and second["hits"] > 0
    assert second["log_evidence"] == first["log_evidence"]


def test_a_broken_entry_is_a_warning_and_compiled_anew(tmp_path):
    first = run(tmp_path)
    for entry in next((tmp_path / "compiled").iterdir()).iterdir():
        entry.write_bytes(entry.read_bytes()[:40])
    again = run(tmp_path)
    assert again["log_evidence"] == first["log_evidence"]
    assert any("persistent compilation cache" in message for message in again["warnings"])


def test_a_folder_that_cannot_be_written_is_a_warning(filled, tmp_path):
    taken = tmp_path / "file"
    taken.write_text("no folder")
    found = run(taken)
    assert found["folder"] is None and found["log_evidence"] == filled[1]["log_evidence"]
    (message,) = (message for message in found["warnings"] if "compiled programs are not kept" in message)
    assert str(taken) in message and "GENPPL_CACHE" in message


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_users_own_setting_stays(tmp_path, when):
    own = tmp_path / "own"
    found = run(tmp_path, **{when: f'jax.config.update("jax_compilation_cache_dir", {str(own)!r})'})
    assert found["folder"] == str(own)
    assert when == "after" or not (tmp_path / "compiled").exists()


def test_it_can_be_turned_off():
    found = run("off")
    assert found["folder"] is None and found["misses"] == found["hits"] == 0 and not found["warnings"]
