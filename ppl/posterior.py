"""What an algorithm returns: weighted particles, the log-evidence, and how the run went.

With normalised weights W_n = exp(log_weights[n]), the posterior's answer to every question is

    E[f] is estimated by sum_n W_n f(value_n),    log Z by log_evidence,    ess = 1 / sum_n W_n^2.
"""

from __future__ import annotations

import dataclasses
import enum
import html
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ppl import genealogy
from ppl.diagnostics import summarize_chains
from ppl.display import html_table, text_table
from ppl.draws import as_key
from ppl.guarantees import has_evidence
from ppl.kernels.resampling import systematic
from ppl.kernels.weights import summarize
from ppl.runners import is_traced

__all__ = ["Outcome", "Posterior", "Status"]

_SHOWN = 8  # rows of a printed table


class Outcome(enum.IntEnum):
    """How a run ended."""

    OK = 0
    INVALID_WEIGHT = 1
    ALL_DIED = 2


_ONE_FOUNDER = (
    "warning: all living particles descend from one of the first. What was drawn before they parted is a single draw, "
    "whatever the ESS says. Use more particles, resample less, or rejuvenate."
)
_MESSAGES = {
    Outcome.OK: "ok",
    Outcome.INVALID_WEIGHT: "a living particle's log-weight became NaN or +inf",
    Outcome.ALL_DIED: "all particles died",
}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Status:
    """How a run ended, as arrays: readable under a user's own `jit` too.

    Attributes:
        code: an `Outcome`.
        step: the first iteration of the outermost loops, counted through, at which the weights showed it; -1 where it
        was
            outside of them.
    """

    code: Any
    step: Any

    @property
    def ok(self):
        """Whether the run ended well."""
        return self.code == Outcome.OK

    def __repr__(self) -> str:
        if is_traced(self.code):
            return "Status(traced)"
        if np.ndim(self.code):
            return f"Status(code={np.asarray(self.code)}, step={np.asarray(self.step)})"
        place = "" if self.ok or self.step < 0 else f" at step {int(self.step)}"
        return f"Status({_MESSAGES[Outcome(int(self.code))]}{place})"


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Posterior:
    """Weighted particles.

    Attributes:
        value: what the model returned, each array with a leading particle axis.
        sites: values of the kept sites, `[N, ...]`, loops' time axes after the particle axis.
        present: for each kept site a bool along its time axes, `[N, T]`: False where the particle was frozen.
        log_weights: normalised log-weights, `[N]`.
        log_evidence: the estimate of log Z in nats; NaN where the algorithm gives none.
        ess: effective sample size, in particles.
        diagnostics: per iteration of the outermost loops: `ess`, `resampled`, `ancestors` (`[T, N]`), `log_evidence`;
            where particles are moved, `moved`, and the rate of `acceptance`, which is 0 at iterations without moves;
            of chains `acceptance`, `[num_chains, num_samples]`.
        status: how the run ended.
        state: what continues the run, for algorithms that can be continued.
        guarantee: what the algorithm promises about its weights.
        algorithm: the algorithm as it prints.
        decode: turns the value into texts, where the program writes some.
        num_chains: how many chains the draws are of, which then stand chain by chain; 0 for a population.
    """

    value: Any
    sites: dict[str, Any]
    present: dict[str, Any]
    log_weights: Any
    log_evidence: Any
    ess: Any
    diagnostics: dict[str, Any]
    status: Status
    state: Any = None
    guarantee: str = dataclasses.field(default="", metadata={"static": True})
    algorithm: str = dataclasses.field(default="", metadata={"static": True})
    decode: Callable[[Any], list[str]] | None = dataclasses.field(default=None, metadata={"static": True})
    num_chains: int = dataclasses.field(default=0, metadata={"static": True})
    _error_before: Any = None  # of what this one was resampled from
    _lines_of: Any = None  # which of that one's particles these are

    @property
    def num_particles(self) -> int:
        """The number of particles, or of draws of a chain."""
        return self.log_weights.shape[-1]

    @property
    def weights(self):
        """Normalised weights, `[N]`."""
        return jnp.exp(self.log_weights)

    @property
    def log_evidence_error(self) -> Any:
        """The standard error of `log_evidence`, as far as this run tells; see `ppl.inference.variance`.

        NaN where there is no log-evidence, where all particles descend from one, where no genealogy was kept, and where
        the resampling scheme is the user's own and not declared.
        """
        if self._error_before is not None:
            return self._error_before
        if jnp.ndim(self.log_weights) > 1:  # several runs
            return jax.vmap(lambda posterior: posterior.log_evidence_error)(self)
        ancestors = self.diagnostics.get("ancestors")
        unknown = self.num_chains or self.guarantee == "assumed"  # nobody knows how the ancestors were drawn
        if unknown or ancestors is None or ancestors.shape[-1] != self.num_particles:
            return jnp.full_like(self.log_evidence, jnp.nan)
        resampled = self.diagnostics["resampled"]
        error = genealogy.log_evidence_error(self.log_weights, ancestors, resampled, self.independent_ancestors)
        return jnp.where(jnp.isnan(self.log_evidence), jnp.nan, error)

    @property
    def founders(self) -> Any:
        """How many of a population's first particles have living descendants, int32.

        At 1 all particles have one common past: whatever was drawn before they parted is a single draw, at any
        effective sample size. For chains it is the number of draws.
        """
        if jnp.ndim(self.log_weights) > 1:  # several runs
            return jax.vmap(lambda posterior: posterior.founders)(self)
        lines = jnp.arange(self.num_particles) if self._lines_of is None else self._lines_of
        ancestors = self.diagnostics.get("ancestors")
        if not self.num_chains and ancestors is not None and ancestors.ndim == 2:
            lines = genealogy.origins(ancestors)[lines]
        first = jnp.sort(jnp.where(self.log_weights > -jnp.inf, lines, -1))
        differs = jnp.concatenate([first[:1] >= 0, first[1:] != first[:-1]])
        return jnp.sum(differs, dtype=jnp.int32)

    @property
    def drawn_again(self) -> bool:
        """Whether these particles were drawn from those of a run, by `resample`."""
        return self._error_before is not None

    @property
    def independent_ancestors(self) -> bool:
        """Whether the algorithm, as it prints, draws ancestors independently of one another."""
        return "resampler='multinomial'" in self.algorithm

    @property
    def texts(self) -> list[str]:
        """The particles' texts.

        Raises:
            AttributeError: the program is not a text process; decode its tokens with `lm.decode`.
        """
        if self.decode is None:
            raise AttributeError(
                "this posterior's program is not a text process. Decode what your model returned: "
                "lm.decode(posterior.value[...])."
            )
        return self.decode(self.value)

    def expectation(self, fn: Callable[[Any], Any]) -> Any:
        """Return the weighted mean of `fn(value)`, with `fn` written for one particle and returning any pytree.

        Particles of weight zero do not count, whatever `fn` makes of them.
        """
        weights = self.weights

        def mean(leaf):
            shape = (-1,) + (1,) * (leaf.ndim - 1)
            w = weights.reshape(shape)
            return jnp.sum(jnp.where(w > 0, w * leaf, 0), axis=0)

        return jax.tree.map(mean, jax.vmap(fn)(self.value))

    def resample(self, seed: int = 0, n: int | None = None) -> Posterior:
        """Return `n` equally weighted particles, drawn by systematic resampling.

        Args:
            seed: an int, or a PRNG key.
            n: how many, as many as there are particles by default.
        """
        key = as_key(seed)
        n = self.num_particles if n is None else n
        ancestors = systematic(key, self.log_weights, n)
        value, sites, present = jax.tree.map(
            lambda a: jnp.asarray(a)[ancestors], (self.value, self.sites, self.present)
        )
        return dataclasses.replace(
            self,
            value=value,
            sites=sites,
            present=present,
            log_weights=jnp.full(n, -jnp.log(float(n))),
            ess=jnp.float32(n),
            num_chains=0,
            _error_before=self.log_evidence_error,
            _lines_of=ancestors if self._lines_of is None else self._lines_of[ancestors],
        )

    def to_arviz(self, observed: Mapping[str, Any] | None = None) -> Any:
        """Return the draws as ArviZ reads them, with their weights; see `ppl.export.to_arviz`."""
        from ppl.export import to_arviz

        return to_arviz(self, observed)

    def __repr__(self) -> str:
        if is_traced(self) or np.ndim(self.log_weights) != 1:
            return f"Posterior({self.algorithm}, sites={sorted(self.sites)})"
        return "\n".join([*self._lines(), text_table(self._rows())])

    def _repr_html_(self) -> str:
        if is_traced(self) or np.ndim(self.log_weights) != 1:
            return html.escape(repr(self))
        lines = "<br>".join(html.escape(line) for line in self._lines())
        return f"<p>{lines}</p>{html_table(self._rows())}"

    def _lines(self) -> list[str]:
        lines = [f"Posterior by {self.algorithm}, guarantee: {self.guarantee}"]
        if self.num_chains:
            lines.append(self._chain_line())
        else:
            error = float(self.log_evidence_error)
            spread = "" if np.isnan(error) else f" ± {error:.3f}"
            evidence = f"log-evidence {float(self.log_evidence):.3f}{spread}"
            founders = int(self.founders)
            lines.append(f"{evidence}   ESS {float(self.ess):.1f} of {self.num_particles}   founders {founders}")
            if founders == 1 < self.num_particles:
                lines.append(_ONE_FOUNDER)
        if len(self.diagnostics.get("ess", ())):
            ess, resampled = (np.asarray(self.diagnostics[name]) for name in ("ess", "resampled"))
            lines.append(f"{len(ess)} steps, resampled at {int(resampled.sum())}, smallest ESS {ess.min():.1f}")
        if not bool(self.status.ok):
            lines.append(f"status: {self.status!r}")
        return lines

    def _chain_line(self) -> str:
        noun = "chain" if self.num_chains == 1 else "chains"
        line = f"{self.num_chains} {noun} of {self.num_particles // self.num_chains} draws"
        line += f"   smallest bulk ESS {float(self.ess):.1f}"
        if "acceptance" in self.diagnostics:
            line += f"   acceptance {float(np.mean(self.diagnostics['acceptance'])):.3f}"
        return line

    def _rows(self) -> list[list[str]]:
        if self.decode is not None:
            return _text_rows(self.texts, np.asarray(self.weights))
        rows = [["site", "shape", "mean", "sd", "5%", "95%"]]
        weights = np.asarray(self.weights, np.float64)
        shown = dict(list(self.sites.items())[: _SHOWN * 2])
        for name, values in shown.items():
            rows.append([name, str(tuple(values.shape[1:])), *_summary(np.asarray(values), weights)])
        if self.num_chains:
            rows[0] += ["R-hat", "bulk ESS", "tail ESS"]
            figures = summarize_chains(shown, self.num_chains).values()
            for row, chain in zip(rows[1:], figures, strict=True):
                row += [f"{chain.rhat:.3f}", f"{chain.bulk_ess:.1f}", f"{chain.tail_ess:.1f}"]
        return rows


def _text_rows(texts: list[str], weights: np.ndarray) -> list[list[str]]:
    total: dict[str, float] = {}
    for text, weight in zip(texts, weights, strict=True):
        total[text] = total.get(text, 0.0) + float(weight)
    ranked = sorted(total.items(), key=lambda item: -item[1])
    rows = [["weight", "text"], *([f"{weight:.3f}", repr(text)] for text, weight in ranked[:_SHOWN])]
    if len(ranked) > _SHOWN:
        rest = sum(weight for _, weight in ranked[_SHOWN:])
        rows.append([f"{rest:.3f}", f"({len(ranked) - _SHOWN} more)"])
    return rows


def _summary(values: np.ndarray, weights: np.ndarray) -> list[str]:
    """Return weighted mean, sd and quantiles of a scalar site; of an array site the range of its entries' means."""
    flat = values.reshape(len(values), -1).astype(np.float64)
    alive = weights > 0
    flat, weights = flat[alive], weights[alive]
    if not flat.size:
        return ["", "", "", ""]
    mean = weights @ flat
    if flat.shape[1] > 1:
        return [f"{mean[0]:.4g} … {mean[-1]:.4g}", "", "", ""]
    sd = np.sqrt(max(float(weights @ (flat[:, 0] - mean[0]) ** 2), 0.0))
    order = np.argsort(flat[:, 0])
    cumulative = np.cumsum(weights[order])
    low, high = (flat[order[min(np.searchsorted(cumulative, q), len(order) - 1)], 0] for q in (0.05, 0.95))
    return [f"{mean[0]:.4g}", f"{sd:.4g}", f"{low:.4g}", f"{high:.4g}"]


def population_posterior(log_weights, log_mass, diagnostics: list[dict[str, Any]], **fields) -> Posterior:
    """Build the posterior of a population from unnormalised log-weights `[N]` and the log-mass taken out of them."""
    num = log_weights.shape[0]
    log_sum, ess, _ = summarize(log_weights)
    log_evidence = log_mass + log_sum - jnp.log(float(num))
    normalised = jnp.where(jnp.isneginf(log_weights), -jnp.inf, log_weights - log_sum)
    steps = _joined(diagnostics, num)
    status = _status(log_evidence, steps["log_evidence"])
    if not has_evidence(fields["guarantee"]):  # the weights follow no stated distribution
        log_evidence = jnp.full_like(log_evidence, jnp.nan)
        steps["log_evidence"] = jnp.full_like(steps["log_evidence"], jnp.nan)
    return Posterior(
        log_weights=normalised, log_evidence=log_evidence, ess=ess, diagnostics=steps, status=status, **fields
    )


def _joined(diagnostics: list[dict[str, Any]], num: int) -> dict[str, Any]:
    """Join the loops' diagnostics along the step axis."""
    none = {
        "ess": jnp.zeros(0), "resampled": jnp.zeros(0, bool), "log_evidence": jnp.zeros(0),
        "ancestors": jnp.zeros((0, num), jnp.int32),
    }  # fmt: skip
    if not diagnostics:
        return none
    names = [name for name in (*none, "temperature", "moved", "acceptance") if name in diagnostics[0]]
    return {name: jnp.concatenate([d[name] for d in diagnostics]) for name in names}


def _status(log_evidence, steps) -> Status:
    def first(bad):
        return jnp.where(jnp.any(bad), jnp.argmax(bad), -1) if bad.shape[0] else jnp.int32(-1)

    invalid = jnp.isnan(log_evidence) | jnp.isposinf(log_evidence)
    died = jnp.isneginf(log_evidence)
    code = jnp.where(invalid, Outcome.INVALID_WEIGHT, jnp.where(died, Outcome.ALL_DIED, Outcome.OK))
    bad_steps = jnp.where(invalid, jnp.isnan(steps) | jnp.isposinf(steps), jnp.isneginf(steps))
    return Status(code.astype(jnp.int32), jnp.where(code == Outcome.OK, -1, first(bad_steps)).astype(jnp.int32))
