"""Masked diffusion as a process: all positions masked at the start, tokens at all of them at the end."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import jax.numpy as jnp

from ppl.models.masked.policies import Blocks, Policy
from ppl.models.masked.schedule import Plan, Remasking
from ppl.models.masked.step import UnmaskingStep
from ppl.process import Process

if TYPE_CHECKING:
    from ppl.models.masked.model import MaskedDiffusion

__all__ = ["Unmasking"]


class Unmasking(Process):
    """A sequence that is unmasked in steps. Its value is `{"tokens": int32[L]}`, with `"length"` where it is text.

    The running state that twists see is `{"tokens", "masked"}`, with the mask's token where masked is True.
    """

    keeps_path = False

    def __init__(
        self,
        model: MaskedDiffusion,
        plan: Plan,
        *,
        policy: Policy,
        schedule: str | tuple[int, ...],
        remasking: Remasking | None,
    ):
        """Build the process; `MaskedDiffusion.reverse` does it from settings."""
        self.model, self.plan, self.policy = model, plan, policy
        self.schedule, self.remasking = schedule, remasking
        self.num_steps = len(plan.block)

    @property
    def guarantee(self) -> str:
        """What runs of this process can promise: "heuristic" where the policy looks at what was drawn."""
        return self.policy.guarantee

    def start(self) -> dict[str, Any]:
        """Return masks only."""
        tokens = jnp.full(self.model.length, self.model.mask_token, jnp.int32)
        return {"tokens": tokens} | ({"remasked": jnp.zeros(tokens.shape, bool)} if self.plan.remasks else {})

    def forward(self, state, step) -> UnmaskingStep:
        """Return the law of the next state."""
        return UnmaskingStep(
            state["tokens"],
            self.model.log_probs(state["tokens"]),
            mask_token=self.model.mask_token,
            policy=self.policy,
            plan=self.plan,
            step=step,
            remasked=state.get("remasked"),
        )

    def advance(self, state, drawn, step) -> dict[str, Any]:
        """Return what was drawn, and which positions it masked again."""
        del step
        mask = self.model.mask_token
        again = {"remasked": (state["tokens"] != mask) & (drawn == mask)} if self.plan.remasks else {}
        return {"tokens": drawn} | again

    def finish(self, state, path) -> dict[str, Any]:
        """Return the tokens; of text also how many come before an end token."""
        del path
        return {"tokens": state["tokens"]} | self._length(state["tokens"])

    def running(self, state, path, step) -> dict[str, Any]:
        """Return the tokens and which of them are masks."""
        del path, step
        tokens = state["tokens"]
        return {"tokens": tokens, "masked": tokens == self.model.mask_token} | self._length(tokens)

    @property
    def texts(self):
        """The function that reads values with a leading particle axis; of models without a tokenizer none."""
        return super().texts if self.model.tokenizer is None else self.model.reader

    @property
    def writes_text(self) -> bool:
        """Whether the model has a tokenizer."""
        return self.model.tokenizer is not None

    def unfolds_like(self) -> dict[str, Any]:
        """Return what must be equal in processes that are multiplied: all but the denoiser."""
        return {
            "process": "masked tokens",
            "vocabulary": f"{self.model.vocabulary_size} tokens, mask {self.model.mask_token}",
            "length": self.model.length,
            "steps": self.num_steps,
            "policy": self.policy,
            "schedule": self.schedule,
            "remask": self.remasking,
        }

    def network_calls(self, corrected: bool = False) -> int:
        """Return how often one particle calls the denoiser in a run."""
        del corrected
        return self.num_steps

    def bind(self, constraint: Any, require_end: bool) -> Any:
        """Refuse constraints.

        Raises:
            ValueError: always; constraints follow text from left to right.
        """
        raise ValueError(
            f"{self!r} cannot be constrained by {constraint!r}: constraints are followed from left to right, and "
            "positions are unmasked in any order. Tilt by a reward of the finished value instead."
        )

    def _length(self, tokens) -> dict[str, Any]:
        if self.model.tokenizer is None:
            return {}
        ends = jnp.isin(tokens, jnp.asarray(self.model.end_tokens, jnp.int32))
        return {"length": jnp.where(jnp.any(ends), jnp.argmax(ends), tokens.shape[0]).astype(jnp.int32)}

    def __repr__(self) -> str:
        blocks = f" in blocks of {self.policy.size}" if isinstance(self.policy, Blocks) else ""
        policy = self.policy.policy if isinstance(self.policy, Blocks) else self.policy
        return f"<Unmasking of {self.model.length} tokens in {self.num_steps} steps, {policy!r}{blocks}>"
