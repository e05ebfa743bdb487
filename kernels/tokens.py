"""Drawing the next token of every row of logits, with its log-probability, in one sweep over the logits.

A row of logits l_1 .. l_V is cut into blocks of about 256 tokens. Each block keeps its largest logit and its sum
relative to that, so that nothing has to be known of the row before the sweep:

    (1)  m_b = max_{i in b} l_i,   s_b = sum_{i in b} exp((l_i - m_b) / T)
    (2)  M = max_b m_b,   mass_b = s_b exp((m_b - M) / T)
    (3)  log p_i = (l_i - M) / T - log sum_b mass_b;   for T = 1 the normaliser is M + log sum_b mass_b

T is a temperature. A draw inverts the cumulative distribution in two levels, with uniforms u_0 and u_1 on the multiples
of 2^-24 in [0, 1):

    (4)  block  b = first with  mass_1 + ... + mass_b > u_0 (mass_1 + ... + mass_B)
    (5)  token  i = first of b with  w_(first of b) + ... + w_i > u_1 (sum of w over b),   w_i = exp((l_i - m_b) / T)

Only the chosen block is read again. Two levels for two reasons. Speed: the Gumbel method draws a random number for
every token. And accuracy: one uniform decides with a step of 6e-8 whatever the token's probability, which at a
vocabulary of 262,144 is a 64th of a typical one; two decide with that step relative to a block.

Sums of float32 may fail to increase where a weight is added, or end below their own last entry; a block or token is
therefore taken only where its own weight is positive, and the last such one where rounding leaves none.

A token may be drawn from another law than the target, the proposal: other logits, a mask, a temperature. Its blocks are
summed beside the target's, and log p - log q is the importance weight of the draw.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Bool, Float, Int, Int32, PRNGKeyArray, UInt32

__all__ = ["TokenDraw", "invert_cdf", "sample_tokens", "token_log_prob"]

_BLOCK = 256
_WIDTHS = sorted(range(128, 513, 16), key=lambda width: abs(width - _BLOCK))


class TokenDraw(NamedTuple):
    """One token for each row of logits.

    Attributes:
        token: int32, shape (*batch,), in [0, V).
        log_prob: shape (*batch,), nats; log-probability of the token under ``softmax(logits)``, the target.
        log_proposal: shape (*batch,), nats; its log-probability under the law that it was drawn from. The log-weight
            of the draw is ``log_prob - log_proposal``.
        log_normalizer: shape (*batch,), nats; ``logsumexp(logits)``.
    """

    token: Int32[Array, "*batch"]
    log_prob: Float[Array, "*batch"]
    log_proposal: Float[Array, "*batch"]
    log_normalizer: Float[Array, "*batch"]


def sample_tokens(
    key: PRNGKeyArray | UInt32[Array, "2"],
    logits: Float[Array, "*batch V"],
    *,
    mask: Bool[ArrayLike, "*#batch V"] | None = None,
    temperature: Float[ArrayLike, "*#batch"] | float = 1.0,
    proposal_logits: Float[Array, "*#batch V"] | None = None,
) -> TokenDraw:
    """Draw one token for every row and say how probable it was.

    The target is ``softmax(logits)``. The token is drawn from ``softmax(where(mask, proposal_logits / temperature,
    -inf))``, which is the target itself unless one of the three is given.

    Args:
        key: random key, consumed once.
        logits: shape (*batch, V), unnormalised log-probabilities; -inf is probability zero. Any float type; sums and
            results are at least float32.
        mask: shape (V,) or (*batch, V); True where a token may be drawn.
        temperature: scalar or shape (*batch,), positive and finite; above 1 flattens the proposal.
        proposal_logits: shape (V,) or (*batch, V); the target's if not given.

    Returns:
        A `TokenDraw`. No token is drawn whose logit under the proposal is -inf. A row in which nothing can be drawn
        gives token 0 with `log_prob` -inf and `log_proposal` 0: a draw of weight zero. A row with a NaN or +inf, or
        whose traced temperature is not positive and finite, gives token 0 with NaN where that enters.

    Raises:
        ValueError: `logits` has no vocabulary, a shape does not fit it, or `temperature` is a number that is not
            positive and finite.
        TypeError: `mask` is not boolean.

    Example:
        >>> draw = sample_tokens(jax.random.key(0), jnp.array([[0.0, 0.0]]), mask=jnp.array([False, True]))
        >>> draw.token.tolist(), [round(float(x[0]), 4) for x in draw[1:]]
        ([1], [-0.6931, 0.0, 0.6931])
    """
    logits, mask, temperature = check_arguments(logits, mask, temperature)
    if proposal_logits is not None:
        proposal_logits = _fit(_as_logits(proposal_logits, "proposal_logits"), logits.shape, "proposal_logits")
    uniforms = draw_uniforms(key, logits.shape[:-1])
    return map_rows(_draw, (1, 1, 1, 0, 1), (uniforms, logits, mask, temperature, proposal_logits))


@jax.jit
def invert_cdf(logits: Float[Array, "*batch V"], uniforms: Float[Array, "*n_batch 2"]) -> Int32[Array, "*n_batch"]:
    """Find the tokens at which the two-level cumulative distribution passes the uniforms, (4) and (5).

    Args:
        logits: shape (*batch, V), unnormalised log-probabilities; -inf is probability zero.
        uniforms: shape (*n, *batch, 2), pairs in [0, 1), n of them for each row.

    Returns:
        Tokens of positive probability, shape (*n, *batch), int32; 0 if there is none, or if a logit is NaN or +inf.

    Raises:
        ValueError: the shapes are not these.
    """
    logits = _as_logits(logits, "logits")
    batch = logits.shape[:-1]
    leading = uniforms.ndim - 1 - len(batch)
    if leading < 0 or uniforms.shape[leading:] != (*batch, 2):
        raise ValueError(f"`uniforms` must have shape (*n, *{batch}, 2) as `logits`, got {uniforms.shape}.")
    invert = _invert_row
    for _ in batch:
        invert = jax.vmap(invert, in_axes=(0, leading), out_axes=leading)
    return invert(logits, uniforms)


@jax.jit
def token_log_prob(logits: Float[Array, "*batch V"], token: Int[Array, "*shape"]) -> Float[Array, "*shape"]:
    """Compute the log-probability of tokens under ``softmax(logits)``, (3).

    In one compiled program it shares its sweep over the logits with `invert_cdf` and `sample_tokens`.

    Args:
        logits: shape (*batch, V); -inf is probability zero.
        token: in [0, V), of a shape that broadcasts against `batch`.

    Returns:
        Natural logarithms, of the broadcast shape, at least float32; -inf for a token of probability zero, also if all
        tokens are, and NaN if a logit is NaN or +inf.
    """
    logits = _as_logits(logits, "logits")
    batch = logits.shape[:-1]
    normalize = _normalizer
    for _ in batch:
        normalize = jax.vmap(normalize)
    top, log_total = normalize(logits)
    shape = jnp.broadcast_shapes(token.shape, batch)
    index = jnp.broadcast_to(token, shape)[..., None].astype(jnp.int32)
    logits = jnp.broadcast_to(logits, (*shape, logits.shape[-1]))
    chosen = jnp.take_along_axis(logits, index, axis=-1)[..., 0]
    return _log_prob(chosen, jnp.broadcast_to(top, shape), jnp.broadcast_to(log_total, shape))


def check_arguments(
    logits: Float[Array, "*batch V"], mask: Bool[ArrayLike, "*#batch V"] | None, temperature: ArrayLike
) -> tuple[Array, Array | None, Array | None]:
    """Check what `sample_tokens` is given; a temperature of 1 becomes None."""
    logits = _as_logits(logits, "logits")
    if mask is not None:
        mask = jnp.asarray(mask)
        if mask.dtype != bool:
            raise TypeError(f"`mask` must be boolean, True where a token may be drawn; got {mask.dtype}.")
        mask = _fit(mask, logits.shape, "mask")
    return logits, mask, _as_temperature(temperature, logits.shape[:-1])


def draw_uniforms(key: PRNGKeyArray | UInt32[Array, "2"], batch: tuple[int, ...]) -> Float[Array, "*batch 2"]:
    """Draw every row's u_0 and u_1, on the multiples of 2^-24 in [0, 1)."""
    return (jax.random.bits(key, (*batch, 2), "uint32") >> 8).astype(jnp.float32) * 2.0**-24


def map_rows(function: Callable[..., Any], ranks: tuple[int, ...], arguments: tuple[Array | None, ...]) -> Any:
    """Map a function of one row's arguments, of these ranks, over the rows; what has that rank is shared by all."""
    batch = max(x.ndim - rank for x, rank in zip(arguments, ranks, strict=True) if x is not None)
    axes = [None if x is None or x.ndim == rank else 0 for x, rank in zip(arguments, ranks, strict=True)]
    for _ in range(batch):
        function = jax.vmap(function, axes)
    return function(*arguments)


class BlockSums(NamedTuple):
    """A row of logits, summed up by blocks.

    Attributes:
        reference: shape (B,), the largest logits m_b, 0 where that is not finite.
        mass: shape (B,), relative to the row's largest logit, (2).
        top: shape (), the row's largest logit M, 0 if that is not finite.
        log_total: shape (), log of the summed masses; -inf if nothing can be drawn, NaN if a logit is NaN or +inf.
    """

    reference: Float[Array, " B"]
    mass: Float[Array, " B"]
    top: Float[Array, ""]
    log_total: Float[Array, ""]


def sum_blocks(logits: Float[Array, " V"], temperature: Float[Array, ""] | None = None) -> tuple[Array, Array]:
    """Sum the weights of a row block by block, (1): all m_b and s_b, each of shape (B,)."""
    width = block_width(logits.shape[0])
    table = jnp.pad(logits, (0, -logits.shape[0] % width), constant_values=-jnp.inf).reshape(-1, width)
    return sum_table(table.astype(jnp.promote_types(table.dtype, jnp.float32)), temperature)


def sum_table(table: Float[Array, "B width"], temperature: Float[Array, ""] | None) -> tuple[Array, Array]:
    """Find the largest logit of every block, without derivatives, and the sum relative to it, (1)."""
    maximum = jax.lax.stop_gradient(jnp.max(table, axis=-1))
    reference = jnp.where(jnp.isfinite(maximum), maximum, 0)
    return maximum, jnp.sum(jnp.exp(_cool(table - reference[:, None], temperature)), axis=-1)


def join_blocks(
    maximum: Float[Array, " B"], sums: Float[Array, " B"], temperature: Float[Array, ""] | None = None
) -> BlockSums:
    """Bring the sums of all blocks to one scale, (2)."""
    reference = jnp.where(jnp.isfinite(maximum), maximum, 0)
    top = jnp.max(jnp.where(jnp.isfinite(maximum), maximum, -jnp.inf))
    top = jnp.where(jnp.isfinite(top), top, 0)
    mass = sums * jnp.exp(_cool(jnp.minimum(reference - top, 0), temperature))
    total = jnp.sum(mass)
    log_total = jnp.log(jnp.where(total > 0, total, 1))  # the gradient of log 0 would be NaN
    log_total = jnp.where(total == 0, -jnp.inf, jnp.where(total < jnp.inf, log_total, jnp.nan))
    return BlockSums(reference, mass, top, log_total)


def _normalizer(logits: Float[Array, " V"]) -> tuple[Float[Array, ""], Float[Array, ""]]:
    sums = join_blocks(*sum_blocks(logits))
    return sums.top, sums.log_total


def _log_prob(chosen: Array, top: Array, log_total: Array, temperature: Array | None = None) -> Array:
    """Log-probability of a token with logit `chosen`, (3); -inf where nothing can be drawn."""
    value = _cool(chosen - top, temperature) - log_total
    return jnp.where(log_total == -jnp.inf, -jnp.inf, value)


def block_width(size: int) -> int:
    """Choose the block's width so that it divides the vocabulary's size if it can: padding is a copy."""
    return next((width for width in _WIDTHS if size % width == 0), _BLOCK)


def _invert_row(logits: Float[Array, " V"], uniforms: Float[Array, "*n 2"]) -> Int32[Array, "*n"]:
    return _invert(join_blocks(*sum_blocks(logits)), logits, None, None, uniforms)


def _draw(
    uniforms: Float[Array, "2"],
    logits: Float[Array, " V"],
    mask: Bool[Array, " V"] | None,
    temperature: Float[Array, ""] | None,
    proposal_logits: Float[Array, " V"] | None,
) -> TokenDraw:
    """Draw the token of one row."""
    target = proposal = join_blocks(*sum_blocks(logits))
    source = logits if proposal_logits is None else proposal_logits
    if mask is not None or temperature is not None or proposal_logits is not None:
        allowed = source if mask is None else jnp.where(mask, source, -jnp.inf)
        proposal = join_blocks(*sum_blocks(allowed, temperature), temperature)
    return draw_from(target, proposal, uniforms, logits, mask, temperature, source)


def draw_from(
    target: BlockSums,
    proposal: BlockSums,
    uniforms: Float[Array, "2"],
    logits: Float[Array, " V"],
    mask: Bool[Array, " V"] | None,
    temperature: Float[Array, ""] | None,
    source: Float[Array, " V"],
) -> TokenDraw:
    """Draw the token of one row whose blocks are summed; `proposal` is `target` if both are one law."""
    token = _invert(proposal, source, mask, temperature, uniforms)
    log_prob = _log_prob(_take(logits, token).astype(target.top.dtype), target.top, target.log_total)
    log_proposal = log_prob
    if proposal is not target:
        chosen = _take(source, token).astype(proposal.top.dtype)
        log_proposal = _log_prob(chosen, proposal.top, proposal.log_total, temperature)
    nothing = proposal.log_total == -jnp.inf
    return TokenDraw(
        token,
        jnp.where(nothing, -jnp.inf, log_prob),
        jnp.where(nothing, 0, log_proposal),
        target.top + target.log_total,
    )


def _invert(
    sums: BlockSums,
    logits: Float[Array, " V"],
    mask: Bool[Array, " V"] | None,
    temperature: Float[Array, ""] | None,
    uniforms: Float[Array, "*n 2"],
) -> Int32[Array, "*n"]:
    """Find the blocks and tokens at which the cumulative sums pass the uniforms."""
    block = _first_beyond(sums.mass, uniforms[..., 0])  # (4)
    width = block_width(logits.shape[0])
    index = (block * width)[..., None] + jnp.arange(width, dtype=jnp.int32).reshape((1,) * block.ndim + (width,))
    inside = index < logits.shape[0]
    inside = inside if mask is None else inside & _take(mask, index)
    shifted = _take(logits, index).astype(sums.top.dtype) - _take(sums.reference, block)[..., None]
    weights = jnp.where(inside, jnp.exp(_cool(shifted, temperature)), 0)
    token = block * width + _first_beyond(weights, uniforms[..., 1])  # (5)
    return jnp.where(sums.log_total > -jnp.inf, token, 0)  # NaN is not greater


def _first_beyond(weights: Float[Array, "*#n K"], uniforms: Float[Array, "*n"]) -> Int32[Array, "*n"]:
    """Find the first index of positive weight whose cumulative weight exceeds ``uniform * total``."""
    cumulative = jnp.cumsum(weights, axis=-1)
    positive = weights > 0
    while positive.ndim <= uniforms.ndim:
        cumulative, positive = cumulative[None], positive[None]
    beyond = positive & (cumulative > uniforms[..., None] * cumulative[..., -1:])
    last = weights.shape[-1] - 1 - jnp.argmax(positive[..., ::-1], axis=-1)
    return jnp.where(jnp.any(beyond, axis=-1), jnp.argmax(beyond, axis=-1), last).astype(jnp.int32)


def _cool(values: Array, temperature: Float[Array, ""] | None) -> Array:
    return values if temperature is None else values / temperature


def _take(values: Array, index: Int32[Array, "*n"]) -> Array:
    return jnp.take(values, index, axis=0, mode="clip")


def _as_logits(logits: ArrayLike, name: str) -> Float[Array, "*batch V"]:
    logits = jnp.asarray(logits)
    if logits.ndim == 0 or logits.shape[-1] == 0 or not jnp.issubdtype(logits.dtype, jnp.floating):
        raise ValueError(f"`{name}` must be floats of shape (*batch, V) with V >= 1, got {logits.dtype}{logits.shape}.")
    return logits


def _fit(values: Array, shape: tuple[int, ...], name: str) -> Array:
    """Bring an argument to the shape of the logits; a row that is shared stays one row."""
    if values.shape == shape[-1:]:
        return values
    if values.ndim != len(shape) or values.shape[-1] != shape[-1] or not _broadcasts(values.shape, shape):
        raise ValueError(f"`{name}` must have shape {shape[-1:]} or {shape} as `logits`, got {values.shape}.")
    return jnp.broadcast_to(values, shape)


def _as_temperature(temperature: ArrayLike, batch: tuple[int, ...]) -> Array | None:
    """Bring the temperature to a scalar or one number a row; None stands for 1."""
    if isinstance(temperature, int | float):
        if not 0 < temperature < math.inf:
            raise ValueError(f"`temperature` must be positive and finite, got {temperature}. 1 changes nothing.")
        if temperature == 1:
            return None
    values = jnp.asarray(temperature, jnp.float32)
    if values.ndim and not (values.ndim == len(batch) and _broadcasts(values.shape, batch)):
        raise ValueError(f"`temperature` must be a scalar or have shape {batch} as the rows, got {values.shape}.")
    values = jnp.where((values > 0) & (values < jnp.inf), values, jnp.nan)
    return values if values.ndim == 0 else jnp.broadcast_to(values, batch)


def _broadcasts(shape: tuple[int, ...], to: tuple[int, ...]) -> bool:
    return all(a in (1, b) for a, b in zip(shape, to, strict=True))
