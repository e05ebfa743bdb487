"""One run of a program: `simulate` draws it, `log_density` scores it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from ppl import runners
from ppl.display import html_table, text_table
from ppl.draws import as_key
from ppl.interpret import Interpreter
from ppl.program import as_program, check_sites

__all__ = ["Trace", "log_density", "simulate"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Trace:
    """One run of a program.

    Attributes:
        sites: values of sample and deterministic sites by name; loops' time axes lead.
        present: for each site a bool for each entry along its time axes: False where a loop had stopped.
        value: what the model returned.
        log_density: joint log-density of the trace in nats, factors included.
    """

    sites: dict[str, Any]
    present: dict[str, Any]
    value: Any
    log_density: Any

    def _rows(self) -> list[list[str]]:
        rows = [["site", "shape", "value"]]
        for name, value in self.sites.items():
            array = np.asarray(value)
            shown = np.array2string(array, precision=3, threshold=6, edgeitems=2)
            rows.append([name, str(array.shape), shown.replace("\n", " ")])
        return rows

    def __repr__(self) -> str:
        if runners.is_traced(self):
            return f"Trace(sites={sorted(self.sites)}, traced)"
        return f"Trace  log-density {float(self.log_density):.3f}\n{text_table(self._rows())}"

    def _repr_html_(self) -> str:
        return f"<p><b>Trace</b>, log-density {float(self.log_density):.3f}</p>{html_table(self._rows())}"


def simulate(program, seed: int = 0) -> Trace:
    """Draw one trace of a program from its distributions; proposals play no part.

    Args:
        program: a program or a process. Conditioned sites hold their values.
        seed: an int, or a PRNG key.

    Returns:
        The trace, its log-density included.
    """
    staged = as_program(program).stage(keep_rules=False)
    key = as_key(seed)
    return runners.run(staged, "simulate", _simulate, key, differentiable=True)


def log_density(program, sites: Mapping[str, Any]) -> Float[Array, ""]:
    """Return the joint log-density of a full assignment, in nats.

    Args:
        program: a program or a process.
        sites: a value for every sample site that is not conditioned, `[T, ...]` inside loops. Entries of a loop's
            iterations after its `until` held are ignored. Deterministic sites are accepted and ignored.

    Returns:
        The sum of the sites' log-densities and the factors: a scalar. Works under `jax.jit`, `jax.grad`, `jax.vmap`.

    Raises:
        SiteValueError: names that are missing or unknown, or a value of another shape than its site.
        SiteTypeError: a value of another type than its site.
        HostError: a host function raised, or did not return log-weights.
    """
    program = as_program(program)
    differentiable = runners.is_traced((program.args, program.kwargs, program.conditions, dict(sites)))
    staged = program.stage(keep_rules=differentiable)
    given = check_sites(staged, sites, complete=True)
    staged = dataclasses.replace(staged, given={**staged.given, **given})
    return runners.run(staged, "log_density", _log_density, differentiable=True)


def _simulate(staged, inputs, given, key) -> Trace:
    outcome = Interpreter(weigh_draws=True, keep=frozenset(staged.sites)).run(staged.block, inputs, key, given)
    present = {
        name: jnp.ones(staged.sites[name].time_shape, bool)
        if mask is None
        else along_times(mask.array, staged.sites[name].time_shape, 0)
        for name, mask in outcome.present.items()
    }
    sites = {name: lane.array for name, lane in outcome.sites.items()}
    value = jax.tree.unflatten(staged.out_tree, [lane.array for lane in outcome.value])
    return Trace(sites, present, value, outcome.log_weights)


def _log_density(staged, inputs, given, key):
    del key
    interpreter = Interpreter(weigh_draws=True, early_exit=False)
    return interpreter.run(staged.block, inputs, None, given).log_weights


def along_times(mask, time_shape: tuple[int, ...], lead: int):
    """Repeat a mask along the time axes of inner loops in which nothing stops; `lead` axes stand before time."""
    missing = len(time_shape) + lead - jnp.ndim(mask)
    return jnp.broadcast_to(mask.reshape(mask.shape + (1,) * missing), (*mask.shape[:lead], *time_shape))
