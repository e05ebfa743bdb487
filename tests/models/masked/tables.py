"""Tiny masked diffusion models that can be enumerated, and their targets in NumPy."""

import itertools

import jax.numpy as jnp
import numpy as np

from ppl.models.masked import MaskedDiffusion


def states(length, size):
    """All states, masks included; the mask is token `size`."""
    return np.array(list(itertools.product(range(size + 1), repeat=length)), np.int32)


def sequences(length, size):
    return np.array(list(itertools.product(range(size), repeat=length)), np.int32)


def code(tokens, size):
    """The place of a state in `states`."""
    length = tokens.shape[-1]
    return tokens @ (size + 1) ** np.arange(length - 1, -1, -1, dtype=np.int32)


def conditionals(joint, length, size):
    """Every position's law given what is visible, `[states, L, V]`, of a joint law over `sequences`."""
    table = np.zeros(((size + 1) ** length, length, size))
    whole = sequences(length, size)
    for row, state in enumerate(states(length, size)):
        agrees = np.all((state == size) | (whole == state), axis=1) * joint
        agrees = agrees if agrees.sum() > 0 else np.ones(len(whole))
        for position in range(length):
            table[row, position] = np.bincount(whole[:, position], agrees, size) / agrees.sum()
    return table


def random_joint(seed, length, size, forbid=None, concentration=0.7):
    joint = np.random.default_rng(seed).dirichlet(np.ones(size**length) * concentration)
    if forbid is not None:
        joint[forbid] = 0
    return joint / joint.sum()


def random_table(seed, length, size):
    """A denoiser that is no conditional of anything."""
    return np.random.default_rng(seed).dirichlet(np.ones(size), ((size + 1) ** length, length))


def model(table, length, size, mask_token=None):
    """A model whose denoiser looks its law up, and whose table is kept for the checks."""
    with np.errstate(divide="ignore"):
        logits = jnp.asarray(np.log(table), jnp.float32)

    def denoiser(tokens):
        return logits[code(tokens, size)]

    made = MaskedDiffusion(denoiser, length, size, mask_token)
    made.table = table
    return made


def raised(table, powers):
    """prod_i mu_i^b_i of tables with a leading factor axis; 0 where a factor is 0."""
    table = np.asarray(table, np.float64)
    powers = np.asarray(powers, np.float64).reshape(-1, *[1] * (table.ndim - 1))
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(np.all(table > 0, axis=0), np.prod(np.where(table > 0, table, 1.0) ** powers, axis=0), 0.0)


def subsets(positions):
    positions = list(positions)
    return [set(c) for n in range(len(positions) + 1) for c in itertools.combinations(positions, n)]


class ExactTarget:
    """A target's transitions by its definition, in float64: sets by the policy, tokens by the product of denoisers."""

    def __init__(self, processes, powers, position_law):
        self.process, self.powers = processes[0], powers
        self.plan, self.model = processes[0].plan, processes[0].model
        self.size, self.length = self.model.vocabulary_size, self.model.length
        self.product = raised([p.model.table for p in processes], powers)
        self.position_law = position_law
        self.known = {}

    def transitions(self, step, state, remasked):
        """Return a list of (next state, next remasked, measure)."""
        plan = self.plan
        rates = tuple(float(row[step]) for row in (plan.remask, plan.unmask, plan.masked_after, plan.block))
        if (state, remasked, rates) not in self.known:
            self.known[state, remasked, rates] = list(self._transitions(state, remasked, *rates))
        return self.known[state, remasked, rates]

    def _transitions(self, state, remasked, sigma, probability, after, block):
        size, product = self.size, self.product[code(np.array(state), self.size)]
        z = product.sum(axis=-1)
        with np.errstate(divide="ignore", invalid="ignore"):
            law = product / z[:, None]
        past = np.prod([1 / z[at] if z[at] > 0 else 0.0 for at in remasked])
        positions = {at for at in range(self.length) if at // self.plan.block_size == block}
        masked = {at for at in positions if state[at] == size}
        for again in subsets(positions - masked):
            rho = sigma ** len(again) * (1 - sigma) ** (len(positions - masked) - len(again))
            if rho == 0:
                continue
            count = int(min(max(len(masked) - after + len(again), 0), len(masked)))
            for chosen in subsets(masked):
                pi = self.position_law(chosen, masked, count, probability, law)
                if pi == 0:
                    continue
                for tokens in itertools.product(range(size), repeat=len(chosen)):
                    new = [size if at in again else state[at] for at in range(self.length)]
                    measure = rho * pi * past
                    for at, token in zip(sorted(chosen), tokens, strict=True):
                        new[at] = token
                        measure *= product[at, token]
                    yield tuple(new), frozenset(again), measure

    def reached(self):
        """Return for each step a dict from (state, remasked) to its measure, and last the finished sequences'."""
        levels = [{((self.size,) * self.length, frozenset()): 1.0}]
        for step in range(len(self.plan.block)):
            after = {}
            for (state, remasked), mass in levels[-1].items():
                for new, again, measure in self.transitions(step, state, remasked):
                    after[new, again] = after.get((new, again), 0.0) + mass * measure
            levels.append(after)
        return levels

    def marginal(self):
        """Return the measure of each finished sequence."""
        out = np.zeros(self.size**self.length)
        for (state, _), mass in self.reached()[-1].items():
            out[int(np.array(state) @ self.size ** np.arange(self.length - 1, -1, -1))] += mass
        return out


# Position policies by their definitions: P(chosen | masked, count, probability, law).


def independent(chosen, masked, count, probability, law):
    return probability ** len(chosen) * (1 - probability) ** (len(masked) - len(chosen))


def uniform(chosen, masked, count, probability, law):
    sets = [s for s in subsets(masked) if len(s) == count]
    return (len(chosen) == count) / len(sets)


def left_to_right(chosen, masked, count, probability, law):
    return float(chosen == set(sorted(masked)[:count]))


def confidence(law):
    return np.log(law.max(axis=-1))


def negative_entropy(law):
    return np.sum(np.where(law > 0, law * np.log(np.where(law > 0, law, 1.0)), 0.0), axis=-1)


def best(score):
    def position_law(chosen, masked, count, probability, law):
        ranked = sorted(masked, key=lambda at: (-score(law)[at], at))
        return float(chosen == set(ranked[:count]))

    return position_law


def soft(score, temperature):
    def position_law(chosen, masked, count, probability, law):
        def weight(s):
            return np.exp(sum(score(law)[at] for at in s) / temperature)

        total = sum(weight(s) for s in subsets(masked) if len(s) == count)
        return (len(chosen) == count) * weight(chosen) / total

    return position_law
