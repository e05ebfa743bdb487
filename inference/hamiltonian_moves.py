"""Hamiltonian moves of a program's continuous sites by NumPyro's implementations, HMC and NUTS.

On the vector z of `ppl.inference.unconstrained` with the potential U = -log p, a momentum r ~ N(0, M) and the energy

    H(z, r) = U(z) + r^T M^-1 r / 2                                                                               (1)

NumPyro integrates (1), accepts, and in warm-up adapts the step size by dual averaging and M by the windows of Stan.
What is added here: U is a program's, the other sites are given, and M is cut to the entries that are present,

    r_absent = 0,   r_present ~ N(0, ((M^-1)_present)^-1)                                                         (2)

so that (1) is the energy of the present ones alone: an absent entry has neither momentum nor force.

Sources: Neal (2011), "MCMC using Hamiltonian dynamics"; Hoffman and Gelman (2014), "The No-U-Turn sampler"; Phan,
Pradhan and Jankowiak (2019), arXiv 1912.11554.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.scipy.linalg import solve_triangular
from numpyro.infer.hmc import hmc
from numpyro.infer.util import ParamInfo

from ppl.inference.trace_kernel import Moves
from ppl.inference.unconstrained import UnconstrainedSites, require_tuning
from ppl.trace_space import TraceSpace

__all__ = ["HamiltonianMemory", "HamiltonianMoves"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class HamiltonianMemory:
    """What is known at a trace.

    Attributes:
        iteration: how many trajectories have been made.
        z: the chosen sites unconstrained, `[d]`.
        potential_energy: U(z) in nats.
        z_grad: its gradient, `[d]`.
        adapt_state: NumPyro's: step size, mass matrix, and what they are being estimated from.
        present: which entries count, by site; see `ppl.inference.presence`.
        num_warmup: how many trajectories tune.
    """

    iteration: Any
    z: Any
    potential_energy: Any
    z_grad: Any
    adapt_state: Any
    present: dict[str, Any]
    num_warmup: int = dataclasses.field(metadata={"static": True})


class HamiltonianMoves(Moves):
    """NumPyro's HMC or NUTS on a program's continuous sites."""

    def __init__(self, kernel: Any, space: TraceSpace, algo: str, repeats: int = 1, **options: Any):
        """Bind a kernel.

        Args:
            kernel: it has `sites`, `step_size` and `target_accept`.
            space: the program's traces.
            algo: "HMC" or "NUTS".
            repeats: how many trajectories a move has.
            options: further arguments of the `init_kernel` of `numpyro.infer.hmc.hmc`.
        """
        self.kernel, self.algo, self.repeats, self.options = kernel, algo, repeats, options
        self.target = UnconstrainedSites(kernel, space, kernel.sites)
        self.sites = self.target.names

    def init(self, key, sites, num_warmup):
        """Return the memory, untuned."""
        del key
        require_tuning(self.kernel, num_warmup)
        present = self.target.present(sites)
        z, potential_energy, z_grad = self._evaluate(sites, present)
        start, _ = self._numpyro(sites, ParamInfo(z, potential_energy, z_grad), num_warmup * self.repeats)
        adapt_state = start.adapt_state._replace(rng_key=None)  # it is for a search that is not asked for
        memory = HamiltonianMemory(
            start.i, z, potential_energy, z_grad, adapt_state, present, num_warmup * self.repeats
        )
        return jax.tree.map(lambda a: jnp.asarray(a, jnp.result_type(a)), memory)

    def refresh(self, key, sites, memory):
        """Return the memory with z, U and its gradient at the trace."""
        present = self.target.present(sites)
        z, potential_energy, z_grad = self._evaluate(sites, present)
        return dataclasses.replace(memory, z=z, potential_energy=potential_energy, z_grad=z_grad, present=present)

    def log_weight(self, memory):
        """Return -U(z); NaN where it is -inf too, for no trajectory leaves such a place."""
        return jnp.where(jnp.isfinite(memory.potential_energy), -memory.potential_energy, jnp.nan)

    def step(self, key, sites, memory):
        """Make the trajectories of one move."""
        place = ParamInfo(memory.z, memory.potential_energy, memory.z_grad)
        start, sample = self._numpyro(sites, place, memory.num_warmup)
        mask = self.target.mask(memory.present)
        state = start._replace(i=memory.iteration, adapt_state=memory.adapt_state)

        def trajectory(state, key):
            adapt_state = state.adapt_state
            if mask is not None:
                adapt_state = adapt_state._replace(mass_matrix_sqrt=_cut(adapt_state.inverse_mass_matrix, mask))
            state = sample(state._replace(adapt_state=adapt_state, rng_key=key))
            return state, (state.accept_prob, state.num_steps, state.diverging)

        if self.repeats == 1:
            state, figures = trajectory(state, key)
        else:
            state, figures = jax.lax.scan(trajectory, state, jax.random.split(key, self.repeats))
        acceptance, num_steps, diverging = figures
        memory = dataclasses.replace(
            memory,
            iteration=state.i,
            z=state.z,
            potential_energy=state.potential_energy,
            z_grad=state.z_grad,
            adapt_state=state.adapt_state,
        )
        info = {
            "acceptance": jnp.mean(acceptance).astype(jnp.float32),
            "num_leapfrog": jnp.sum(num_steps).astype(jnp.float32),
            "diverging": jnp.mean(diverging, dtype=jnp.float32),
        }
        return self.target.replaced(state.z, sites, memory.present), memory, info

    def _evaluate(self, sites, present):
        z = self.target.vector(sites, self.target.mask(present))
        return z, *jax.value_and_grad(self.target.potential(sites))(z)

    def _numpyro(self, sites, place: ParamInfo, num_warmup: int):
        """Return NumPyro's state at a place, untuned, and its function from a state to the next."""
        init, sample = hmc(self.target.potential(sites), algo=self.algo)
        state = init(
            place,
            num_warmup,
            step_size=1.0 if self.kernel.step_size is None else self.kernel.step_size,
            adapt_step_size=self.kernel.step_size is None,
            adapt_mass_matrix=self.kernel.step_size is None,
            target_accept_prob=self.kernel.target_accept,
            rng_key=jax.random.key(0),
            **self.options,
        )
        return state, sample


def _cut(inverse_mass, mask):
    """Return a square root of the covariance (2), zero where absent; `inverse_mass` is `[d]` or `[d, d]`."""
    if inverse_mass.ndim == 1:
        return jnp.where(mask, jax.lax.rsqrt(inverse_mass), 0.0)
    identity = jnp.identity(len(mask), dtype=inverse_mass.dtype)
    block = jnp.where(mask[:, None] & mask[None, :], inverse_mass, identity)
    root = solve_triangular(jnp.linalg.cholesky(block), identity, lower=True).T  # root root^T = block^-1
    return jnp.where(mask[:, None], root, 0.0)
