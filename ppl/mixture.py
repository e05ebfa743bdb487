"""Mixtures of processes: one of them is drawn, and generates.

    p(path) = sum_i w_i p_i(path)                                                                                  (1)

The index that is drawn at the start is summed out: what is kept of it is its law given the path so far,

    c_i(t) proportional to w_i p_i(path up to t),    p(x'|path) = sum_i c_i(t) p_i(x'|x)                            (2)

so that a mixture has densities, can be multiplied, raised to a power and tilted as any process can, and
`mixture ** b` is (1) to the power b, not a mixture of powers. All processes run side by side.

For diffusion models (2) is a mixture of Gaussians with one variance; its mean is a step along the superposed score
sum_i c_i s_i, and `law.superposed()` is the Gaussian with that mean: the OR of SuperDiff (arXiv 2412.17762) as a
proposal, `mixture.propose(lambda law, state: law.superposed())`.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist

from ppl.gaussian import Gaussian
from ppl.guarantees import promised
from ppl.process import Process
from ppl.products import product_law
from ppl.targets import Target

__all__ = ["Mixture", "MixtureOfSteps", "mixture"]


def mixture(*processes: Target, weights: Any = None) -> Mixture:
    """Return the mixture (1) of processes that unfold alike.

    Args:
        processes: at least one; the last positional argument may be the weights.
        weights: one for each process, positive; they are normalised. None for equal ones.

    Raises:
        TypeError: one of them is a target that is not a process: it has no normalised steps to be mixed.
        ValueError: they do not unfold alike, or weights do not fit.
    """
    if processes and weights is None and not isinstance(processes[-1], Target):
        *processes, weights = processes
    for process in processes:
        if not isinstance(process, Process):
            raise TypeError(f"ppl.mixture takes processes, got {process!r}; mix first, then raise, multiply or tilt.")
    if not processes:
        raise ValueError("ppl.mixture takes at least one process, got none.")
    first = processes[0].unfolds_like()
    for other in processes[1:]:
        if other.unfolds_like() != first:
            raise ValueError(
                f"{processes[0]!r} and {other!r} cannot be mixed: they unfold like {first} and {other.unfolds_like()}."
            )
    given = np.ones(len(processes)) if weights is None else np.asarray(weights, np.float64)
    if given.shape != (len(processes),) or not np.all(np.isfinite(given)) or not np.all(given > 0):
        raise ValueError(f"`weights` must be {len(processes)} positive numbers, got {weights!r}.")
    ends = type(processes[0]).ended is not Process.ended
    together = processes[0].aligned_with(processes)
    return (_EndingMixture if ends else Mixture)(tuple(together), given / given.sum())


class Mixture(Process):
    """A mixture of processes; see `mixture`."""

    def __init__(self, processes: tuple[Process, ...], weights: np.ndarray):
        self.processes, self.weights = processes, weights
        self.log_weights = jnp.asarray(np.log(weights), jnp.result_type(float))
        self.first = processes[0]
        self.num_steps = self.first.num_steps
        self.guarantee = promised(*processes)
        self.keeps_path, self.resamples_every_step = self.first.keeps_path, self.first.resamples_every_step

    def origin(self) -> Any:
        """Return the mixture of the starts' laws."""
        laws = [process.origin() for process in self.processes]
        return None if laws[0] is None else mixed(laws, self.log_weights)

    def start(self, *drawn) -> dict[str, Any]:
        """Return all processes' states, and the law of the index given what was drawn."""
        chances = self.log_weights
        if drawn:
            chances = _updated(chances, [process.origin() for process in self.processes], *drawn)
        return {"log_chances": chances, "states": [process.start(*drawn) for process in self.processes]}

    def forward(self, state, step) -> Any:
        """Return the law (2)."""
        return mixed(self._laws(state, step), state["log_chances"])

    def advance(self, state, drawn, step) -> dict[str, Any]:
        """Advance all processes by what was drawn, and learn which of them it came from."""
        pairs = zip(self.processes, state["states"], strict=True)
        return {
            "log_chances": _updated(state["log_chances"], self._laws(state, step), drawn),
            "states": [process.advance(before, drawn, step) for process, before in pairs],
        }

    def finish(self, state, path) -> Any:
        """Return the value."""
        return self.first.finish(state["states"][0], path)

    def running(self, state, path, step) -> Any:
        """Return the processes' running states, averaged by their chances where they hold real numbers."""
        pairs = zip(self.processes, state["states"], strict=True)
        chances = jnp.exp(state["log_chances"])

        def average(*leaves):
            if not jnp.issubdtype(jnp.asarray(leaves[0]).dtype, jnp.floating):
                return leaves[0]
            return sum(chance * leaf for chance, leaf in zip(chances, leaves, strict=True))

        return jax.tree.map(average, *(process.running(s, path, step) for process, s in pairs))

    @property
    def texts(self):
        """The function that reads values with a leading particle axis."""
        return self.first.texts

    @property
    def writes_text(self) -> bool:
        """Whether values can be read as texts."""
        return self.first.writes_text

    def unfolds_like(self) -> dict[str, Any]:
        """Return what must be equal in processes that are multiplied."""
        return self.first.unfolds_like()

    def bind(self, constraint, require_end: bool):
        """Return a constraint made for the values."""
        return self.first.bind(constraint, require_end)

    def delimit(self, delimiter):
        """Return what finds a delimiter."""
        return self.first.delimit(delimiter)

    def budget_after(self, step, require_end: bool):
        """Return how many more text tokens may follow."""
        return self.first.budget_after(step, require_end)

    def together(self, target) -> list[Process]:
        """Return the processes of a target as they unfold together."""
        return self.first.together(target)

    def aligned_with(self, processes) -> list[Process]:
        """Return processes with the same steps."""
        return self.first.aligned_with(processes)

    @property
    def steps(self) -> Any:
        """The processes' steps."""
        return self.first.steps

    def with_steps(self, steps) -> Mixture:
        """Return the mixture over other steps."""
        return type(self)(tuple(process.with_steps(steps) for process in self.processes), self.weights)

    def network_calls(self, corrected: bool = False) -> int | None:
        """Return the sum over the processes, which all run."""
        calls = [process.network_calls(corrected) for process in self.processes]
        return None if None in calls else sum(calls)

    def _laws(self, state, step) -> list[Any]:
        pairs = zip(self.processes, state["states"], strict=True)
        return [process.forward(before, step) for process, before in pairs]

    def __repr__(self) -> str:
        parts = ", ".join(f"{weight:.3g} {p!r}" for weight, p in zip(self.weights, self.processes, strict=True))
        return f"<Mixture of {parts}>"


class _EndingMixture(Mixture):
    """A mixture of processes that may end before their last step."""

    def ended(self, state):
        """Return whether the generation has ended: what was drawn says it, the same for all."""
        return self.first.ended(state["states"][0])


def mixed(laws: Sequence[Any], log_chances: Any) -> Any:
    """Return the mixture of laws of one type, with normalised log-probabilities `[len(laws)]`."""
    if all(isinstance(law, dist.CategoricalLogits | dist.CategoricalProbs) for law in laws):
        logits = jnp.stack([jax.nn.log_softmax(law.logits) for law in laws])
        return type(laws[0])(logits=jax.nn.logsumexp(logits + log_chances[:, None], axis=0))
    return MixtureOfSteps(laws, log_chances)


class MixtureOfSteps(dist.Distribution):
    """A mixture of laws of one step that are not categorical.

    Attributes:
        laws: distributions of one shape.
        log_chances: their normalised log-probabilities, `[len(laws)]`.
    """

    generality = 1

    def __init__(self, laws: Sequence[Any], log_chances: Any):
        self.laws, self.log_chances = list(laws), log_chances
        super().__init__(batch_shape=(), event_shape=self.laws[0].event_shape, validate_args=False)

    @property
    def support(self):
        """The support of the first law."""
        return self.laws[0].support

    def sample(self, key, sample_shape=()):
        """Draw which law, and from it: one draw of each is made."""
        key, *keys = jax.random.split(key, len(self.laws) + 1)
        draws = jnp.stack([law.sample(k, sample_shape) for law, k in zip(self.laws, keys, strict=True)])
        noise = jax.random.gumbel(key, (len(self.laws), *sample_shape))
        chances = self.log_chances.reshape(-1, *(1,) * len(sample_shape))
        chosen = jnp.argmax(chances + noise, axis=0)
        which = chosen.reshape(1, *sample_shape, *(1,) * len(self.event_shape))
        return jnp.take_along_axis(draws, which, axis=0)[0]

    def log_prob(self, value):
        """Return the log-density."""
        terms = jnp.stack([law.log_prob(value) for law in self.laws])
        return jax.nn.logsumexp(terms + self.log_chances.reshape(-1, *(1,) * (terms.ndim - 1)), axis=0)

    def superposed(self) -> Gaussian:
        """Return the Gaussian with the mixture's mean and the components' mean variance."""
        chances = jnp.exp(self.log_chances)
        loc = sum(c * law.loc for c, law in zip(chances, self.laws, strict=True))
        squared = sum(c * law.squared_scale for c, law in zip(chances, self.laws, strict=True))
        return Gaussian(loc, squared, self.laws[0].noising)

    def multiply(self, laws: Sequence[Any], powers: Sequence[Any], signs: Sequence[float]):
        """Return a proposal and its weight; see `ppl.products.Multipliable`.

        The proposal is the mixture, over the ways to choose a component i_j of each factor j, of the components'
        own product proposals, in proportion to prod_j c_(i_j)^(b_j) times their weight. It is locally optimal where
        all mixtures have the power 1, and reaches everything elsewhere.
        """
        choices = [law.laws if isinstance(law, MixtureOfSteps) else [law] for law in laws]
        chances = [law.log_chances if isinstance(law, MixtureOfSteps) else jnp.zeros(1) for law in laws]
        parts, logits = [], []
        for index in itertools.product(*(range(len(choice)) for choice in choices)):
            chosen = [choice[i] for choice, i in zip(choices, index, strict=True)]
            part, log_weight = product_law(chosen, powers, signs)
            weight = jnp.float32(0.0) if log_weight is None else log_weight(part.loc)
            parts.append(part)
            logits.append(weight + sum(b * c[i] for b, c, i in zip(powers, chances, index, strict=True)))
        proposal = MixtureOfSteps(parts, jax.nn.log_softmax(jnp.stack(logits)))
        noising = self.laws[0].noising

        def weigh(drawn):
            total = sum(power * law.log_prob(drawn) for power, law in zip(powers, laws, strict=True))
            if noising is not None:
                back = Gaussian(noising.rate * drawn, noising.variance)
                total = total + (1 - sum(powers[1:], powers[0])) * back.log_prob(noising.x)
            return total - proposal.log_prob(drawn)

        return proposal, weigh


def _updated(log_chances, laws, drawn):
    """Return the law of the index given one more draw."""
    terms = jnp.stack([law.log_prob(drawn) for law in laws])
    new = log_chances + terms
    return jnp.where(jnp.any(new > -jnp.inf), jax.nn.log_softmax(new), log_chances)
