"""Checks of algorithms, proposals and kernels, yours included.

| check | of | how | sees |
|---|---|---|---|
| `assert_properly_weighted(program, algorithm)` | weighted populations, proposals | every run, exact | any bias |
| `assert_unbiased_gradient(model, arguments, algorithm)` | derivatives of the evidence | every run, exact | any bias |
| `assert_invariant(program, kernel)` | kernels on traces | transition matrix, exact | any bias |
| `assert_joint(program, kernel)` | kernels, continuous sites too | z-scores | what its draws can see |

The exact checks run a small program in every way that it can go, and need no tolerance for chance: a proposal that
forgets a value, or an acceptance ratio that forgets a term, cannot pass.

A proposal of your own:

    @ppl.model
    def coin(y):
        fair = ppl.sample("fair", dist.Bernoulli(0.5), proposal=dist.Bernoulli(0.9))
        ppl.observe("y", dist.Bernoulli(jnp.where(fair == 1, 0.5, 0.8)), y)

    assert_properly_weighted(coin(1), SMC(num_particles=2))

A kernel of your own takes its choices from `ppl.chance`:

    @dataclasses.dataclass(frozen=True)
    class Flip(TraceKernel):                                # of ppl.inference.trace_kernel
        guarantee = "invariant"                             # which the check below is to show

        def bind(self, space):
            return FlipMoves(space)

    class FlipMoves(Moves):
        sites = ("fair",)

        def __init__(self, space):
            self.space = space

        def step(self, key, sites, memory):
            flipped = sites | {"fair": 1 - sites["fair"]}
            log_ratio = self.space.log_density(flipped) - self.space.log_density(sites)
            accepted = ppl.chance.accept(key, log_ratio)
            after = jax.tree.map(lambda a, b: jnp.where(accepted, a, b), flipped, sites)
            return after, memory, {"acceptance": jnp.exp(jnp.minimum(log_ratio, 0.0))}

    assert_invariant(coin(1), Flip(), irreducible=True)

What finite programs cannot show, such as a kernel with gradients, `assert_joint` checks on a program in which the data
is a sample site: `assert_joint(model, HMC(0.1), observed=["y"])`.

Beneath them: `enumerate_runs(function, *args)` runs any function of such choices in every way, for checks of your own.
"""

from ppl.testing.gradients import assert_unbiased_gradient as assert_unbiased_gradient
from ppl.testing.invariance import assert_invariant as assert_invariant
from ppl.testing.invariance import transition_matrix as transition_matrix
from ppl.testing.joint_distribution import assert_joint as assert_joint
from ppl.testing.proper_weighting import assert_properly_weighted as assert_properly_weighted
from ppl.testing.tape import enumerate_runs as enumerate_runs
from ppl.testing.tape import enumerating as enumerating
