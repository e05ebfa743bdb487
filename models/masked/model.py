"""`MaskedDiffusion`: a model of token sequences that are unmasked position by position.

    denoiser(tokens) -> logits [L, V],     mu_l(v | x) = softmax(logits_l)_v, the law of position l given what is seen

The mask's own token, where it belongs to the vocabulary, is never drawn.

Source: Sahoo et al. (2024), arXiv 2406.07524; Shi et al. (2024), arXiv 2406.04329; Nie et al. (2025), arXiv 2502.09992.
"""

from __future__ import annotations

import dataclasses
import functools
import numbers
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float, Int

from ppl.models.language.continuations import continuing
from ppl.models.language.reading import Reader
from ppl.models.masked.policies import Blocks, Policy, resolve
from ppl.models.masked.process import Unmasking
from ppl.models.masked.schedule import Remasking, plan

__all__ = ["MaskedDiffusion"]


class MaskedDiffusion:
    """A masked diffusion model.

    Attributes:
        length: L, how many tokens it generates.
        vocabulary_size: V, the number of columns of the logits.
        mask_token: what stands for a mask.
        tokenizer: a `transformers` tokenizer, or None.
        end_tokens: tokens that end a text.
    """

    def __init__(
        self,
        denoiser: Callable,
        length: int,
        vocabulary_size: int,
        mask_token: int | None = None,
        *,
        tokenizer: Any = None,
        end_tokens: Sequence[int] = (),
        conditions: Mapping[str, Any] | None = None,
    ):
        """Wrap a denoiser.

        Args:
            denoiser: maps one particle's tokens, int32 `[L]` with masks, and conditions by name to logits `[L, V]`: a
                function or a flax nnx module. The library vectorises it.
            length: how many tokens, at least 1.
            vocabulary_size: V, at least 1.
            mask_token: the mask's number, at least 0; None is V, one past the vocabulary.
            tokenizer: for models of text: what `decode` reads tokens with.
            end_tokens: for models of text: tokens that end a text.
            conditions: what `denoiser` is given by name, see `given`.

        Raises:
            ValueError: a number out of range.
            TypeError: `denoiser` cannot be called, or a number is none.
        """
        if not callable(denoiser):
            raise TypeError(f"`denoiser` must be a function or a module, got {type(denoiser).__name__}.")
        _require_whole("length", length, 1)
        _require_whole("vocabulary_size", vocabulary_size, 1)
        mask_token = vocabulary_size if mask_token is None else mask_token
        _require_whole("mask_token", mask_token, 0)
        if vocabulary_size == 1 and mask_token == 0:
            raise ValueError("`mask_token` is the only token of the vocabulary; nothing is left to draw.")
        outside = [token for token in end_tokens if not 0 <= token < vocabulary_size or token == mask_token]
        if outside:
            raise ValueError(f"`end_tokens` must be tokens in [0, {vocabulary_size}) and no mask, got {outside}.")
        self.denoiser, self.length, self.vocabulary_size, self.mask_token = (
            denoiser, int(length), int(vocabulary_size), int(mask_token),
        )  # fmt: skip
        self.tokenizer, self.end_tokens = tokenizer, tuple(end_tokens)
        self.conditions = dict(conditions or {})
        self._continues = False  # whether texts go on from a prompt

    @classmethod
    def load(cls, source: str | Path, *, length: int, dtype: Any = None) -> MaskedDiffusion:
        """Read a LLaDA checkpoint from disk or from the hub.

        Args:
            source: a hub id such as "GSAI-ML/LLaDA-8B-Instruct", or a folder with config, safetensors and tokenizer.
            length: how many tokens to generate.
            dtype: of the weights; None is float32 on CPU and bfloat16 on accelerators.

        Raises:
            FileNotFoundError: no such folder or hub repository, or one of a folder's files is missing.
            ValueError: a configuration or a tensor that is not supported, or a length beyond the model's context.
        """
        from ppl.models.masked.checkpoints import load_masked  # needs the decoder, other denoisers do not

        return load_masked(cls, source, length, dtype)

    def given(self, **conditions: Any) -> MaskedDiffusion:
        """Return the model with conditions bound: arrays that the denoiser takes by name."""
        return self._with(conditions=self.conditions | conditions)

    def after(self, prompt: str | Sequence[int]) -> MaskedDiffusion:
        """Return the model of what follows a prompt: the denoiser sees the prompt's tokens before its own.

        Args:
            prompt: tokens, or a text where the model has a tokenizer.

        Raises:
            ValueError: a text without a tokenizer, or tokens outside of the vocabulary.
        """
        return self._with(denoiser=_After(self.denoiser, _prompt_tokens(self, prompt)), continues=True)

    def log_probs(self, tokens: Int[Array, " L"]) -> Float[Array, "L V"]:
        """Return log mu(. | tokens) at every position, float32; those at unmasked positions mean nothing.

        Raises:
            ValueError: the denoiser's logits have another shape than `[L, V]`.
        """
        logits = jnp.asarray(self.denoiser(tokens, **self.conditions))
        if logits.shape != (self.length, self.vocabulary_size):
            raise ValueError(
                f"`denoiser` must return logits of shape ({self.length}, {self.vocabulary_size}), got {logits.shape}."
            )
        logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
        if self.mask_token < self.vocabulary_size:
            logits = logits.at[:, self.mask_token].set(-jnp.inf)
        return jax.nn.log_softmax(logits, axis=-1)

    def reverse(
        self,
        num_steps: int,
        policy: str | Policy = "random",
        *,
        schedule: str | Sequence[int] = "linear",
        remask: float | Remasking | None = None,
    ) -> Unmasking:
        """Return the process that generates.

        Args:
            num_steps: how many steps; each calls the denoiser once. With blocks a multiple of their number.
            policy: which positions a step unmasks: "random", "left_to_right", "most_confident", "least_entropy",
                "sampled_confidence" (heuristic), or a policy such as `MostConfident(0.1).blocks(32)`.
            schedule: how fast: "linear", "cosine", or how many positions each step of a block unmasks.
            remask: `Remasking`, or its cap: positions are masked again on the way. None masks none.

        Returns:
            A `ppl.Process` whose value is `{"tokens": int32[L]}`, and `"length"` where the model has a tokenizer.

        Raises:
            ValueError: settings that do not fit each other, or a denoiser whose logits have a wrong shape.
        """
        _require_whole("num_steps", num_steps, 1)
        policy = resolve(policy)
        remasking = Remasking(remask) if isinstance(remask, numbers.Real) else remask
        if remasking is not None and not isinstance(remasking, Remasking):
            raise TypeError(f"`remask` must be a number, a Remasking or None, got {remask!r}.")
        if remasking is not None and policy.looks:
            raise ValueError(
                f"`remask` needs a policy that sees only which positions are masked, got {policy!r}: the past of a "
                'finished text has no law otherwise. Accepted are "random" and "left_to_right", also in blocks.'
            )
        size = policy.size if isinstance(policy, Blocks) else None
        steps = plan(self.length, num_steps, schedule=schedule, block_size=size, remasking=remasking)
        jax.eval_shape(self.log_probs, jax.ShapeDtypeStruct((self.length,), jnp.int32))  # says now what is wrong
        named = schedule if isinstance(schedule, str) else tuple(schedule)
        return Unmasking(self, steps, policy=policy, schedule=named, remasking=remasking)

    def decode(self, tokens: ArrayLike) -> str:
        """Return the text of one sequence of tokens, up to the first end token; masks are left out."""
        return self.reader.text(tokens)

    def read(self, value: Mapping[str, ArrayLike]) -> list[str]:
        """Return the texts of values with a leading particle axis."""
        return self.reader(value)

    @functools.cached_property
    def reader(self) -> Reader:
        """What reads values with a leading particle axis; texts after a prompt go on from it."""
        tokenizer = continuing(self.tokenizer) if self._continues else self.tokenizer
        return Reader(tokenizer, self.end_tokens, (self.mask_token,))

    def __repr__(self) -> str:
        return f"MaskedDiffusion({self.length} tokens over {self.vocabulary_size}, mask {self.mask_token})"

    def _with(self, **changes: Any) -> MaskedDiffusion:
        settings = dict(denoiser=self.denoiser, conditions=self.conditions, continues=self._continues) | changes
        model = MaskedDiffusion(
            settings["denoiser"],
            self.length,
            self.vocabulary_size,
            self.mask_token,
            tokenizer=self.tokenizer,
            end_tokens=self.end_tokens,
            conditions=settings["conditions"],
        )
        model._continues = settings["continues"]
        return model


@dataclasses.dataclass(frozen=True, eq=False)
class _After:
    """A denoiser that sees a prompt before its own tokens."""

    denoiser: Callable
    prompt: np.ndarray

    def __call__(self, x, **conditions):
        return self.denoiser(jnp.concatenate([jnp.asarray(self.prompt), x]), **conditions)[self.prompt.size :]


def _prompt_tokens(model: MaskedDiffusion, prompt: str | Sequence[int]) -> np.ndarray:
    if isinstance(prompt, str):
        if model.tokenizer is None:
            raise ValueError("`prompt` is a text and the model has no tokenizer; give tokens.")
        prompt = model.tokenizer.encode(prompt)
    tokens = np.asarray(prompt, np.int32)
    outside = tokens[(tokens < 0) | (tokens >= model.vocabulary_size) | (tokens == model.mask_token)]
    if tokens.ndim != 1 or outside.size:
        raise ValueError(
            f"`prompt` must hold tokens in [0, {model.vocabulary_size}) and no mask, got {outside[:4].tolist()}."
        )
    return tokens


def _require_whole(name: str, value: Any, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"`{name}` must be a whole number, got {value!r} ({type(value).__name__}).")
    if value < least:
        raise ValueError(f"`{name}` must be at least {least}, got {value}.")
