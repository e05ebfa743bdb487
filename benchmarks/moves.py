"""Moving particles: only the dead against gathering all, and the memory that each takes.

python -m benchmarks.moves       a cache [30, 32, 64, 3, 64] (45 MiB), rows of 512, 16, 4 and 1 KiB
"""

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.timing import machine, report, side_by_side
from ppl.kernels.moves import gather, move, survivors_stay

SHAPES = {
    "32 particles, cache of 45 MiB, particles first": ((32, 30, 64, 3, 64), 0),
    "32 particles, cache of 45 MiB, layers first": ((30, 32, 64, 3, 64), 1),
    "128 particles, rows of 512 KiB": ((128, 1 << 17), 0),
    "128 particles, rows of 16 KiB": ((128, 1 << 12), 0),
    "1024 particles, rows of 4 KiB": ((1024, 1 << 10), 0),
    "1024 particles, rows of 1 KiB (both gather)": ((1024, 1 << 8), 0),
}
DEAD_SHARES = (0.0, 0.25, 0.5, 0.9)


def ancestors_of(n: int, dead_share: float) -> jax.Array:
    rng = np.random.default_rng(n)
    alive = rng.permutation(n)[: max(n - round(dead_share * n), 1)]
    ancestors = rng.permutation(np.concatenate([alive, rng.choice(alive, n - len(alive))]))
    return jnp.asarray(ancestors, jnp.int32)


def moves(repeats: int = 15) -> None:
    """Time both ways; the move includes putting the ancestors in its form."""
    only_dead = jax.jit(lambda x, a, axis: move(x, survivors_stay(a), axis), static_argnums=2, donate_argnums=0)
    everything = jax.jit(gather, static_argnums=2)
    for title, (shape, axis) in SHAPES.items():
        held = {"moved": jnp.ones(shape), "gathered": jnp.ones(shape)}
        for share in DEAD_SHARES:
            a = ancestors_of(shape[axis], share)

            def moved(_: int, a=a, axis=axis, held=held) -> jax.Array:
                held["moved"] = only_dead(held["moved"], a, axis)
                return held["moved"]

            def gathered(_: int, a=a, axis=axis, held=held) -> jax.Array:
                held["gathered"] = everything(held["gathered"], a, axis)
                return held["gathered"]

            report(f"{title}; {share:.0%} dead", side_by_side({"gather": gathered, "move": moved}, repeats))
        for name, way in (("gather", everything), ("move", only_dead)):
            used = way.lower(held["moved"], a, axis).compile().memory_analysis()
            fresh = used.temp_size_in_bytes + used.output_size_in_bytes - used.alias_size_in_bytes
            print(f"  {name}: {fresh / 2**20:.2f} MiB beside its input of {held['moved'].nbytes / 2**20:.2f} MiB")


if __name__ == "__main__":
    print(machine())
    moves()
