"""The state of one text: the prompt's keys and values, one's own, and the last hidden state.

Symbols: L layers, Hkv key heads, D head width, E hidden width, S prompt slots, C slots for what follows the prompt.

What all particles of a loop share has no particle axis under `vmap`: the prompt's cache, its length, and `cursor`, the
slot that is written next. What each particle has for itself has one: its keys and values, which of its slots count,
its position, its hidden state. `TextState.particle_axes` says which is which.

A slot and a position are two things. All particles write the same slot in the same step, so that a write is one slice
and not a scatter; a particle that waits leaves a slot unused (`valid` False), and its next token still gets the next
position.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

__all__ = ["TextState", "write_slot"]


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=[
        "prompt_keys",
        "prompt_values",
        "prompt_length",
        "keys",
        "values",
        "valid",
        "cursor",
        "position",
        "hidden",
    ],
    meta_fields=["context_length", "free", "used"],
)
@dataclasses.dataclass(frozen=True)
class TextState:
    """A text so far, ready for its next token.

    Attributes:
        prompt_keys: keys of the prompt, padded to S slots; shared by all particles.
        prompt_values: values of the prompt.
        prompt_length: number of prompt slots that count, at most S.
        keys: keys of the tokens after the prompt.
        values: values of the tokens after the prompt.
        valid: which of the C slots count.
        cursor: the slot that the next token is written to; the same for all particles of a loop.
        position: position of the next token in the text.
        hidden: last hidden state after the final norm; the head makes the next token's logits of it.
        context_length: largest number of positions of the model; static.
        free: how many slots are certainly free; static. Outside of loops `LanguageModel.extend` adds some when none is.
        used: inside a `ppl.scan`, how many slots this iteration has used so far; None outside; static.
    """

    prompt_keys: Float[Array, "L S Hkv D"]
    prompt_values: Float[Array, "L S Hkv D"]
    prompt_length: Int[Array, ""]
    keys: Float[Array, "L C Hkv D"]
    values: Float[Array, "L C Hkv D"]
    valid: Bool[Array, "C"]
    cursor: Int[Array, ""]
    position: Int[Array, ""]
    hidden: Float[Array, "E"]
    context_length: int = dataclasses.field(default=0)
    free: int = dataclasses.field(default=0)
    used: int | None = dataclasses.field(default=None)

    @property
    def slots(self) -> int:
        """Number of slots for tokens after the prompt, C."""
        return self.keys.shape[-3]

    @property
    def room_in_context(self) -> int:
        """How many more slots the model's context has room for; an upper bound where the prompt's length is traced."""
        prompt = 1 if isinstance(self.prompt_length, jax.core.Tracer) else int(self.prompt_length)
        return self.context_length - prompt - self.slots

    def scratch(self) -> "TextState":
        """Which leaves may hold anything once the text has ended.

        Returns:
            The same structure with a bool for each leaf: True for the caches and the cursor, which are only read
            through `valid` and by the next write; False for what a finished text must keep.
        """
        return self._structure(shared=False, caches=True, cursor=True, own=False)

    # What `ppl.scan` asks a node of its carry, see `ppl.control_flow.LoopCarry`.

    def enter_loop(self, slots: int) -> "TextState":
        """The state at the head of a loop, with room for all that its iterations will write.

        Args:
            slots: how many slots all iterations together use. Inside another loop the outer one has made room.
        """
        if self.used is not None:
            return dataclasses.replace(self, used=0)
        state = self.reserve(max(slots - self.free, 0))
        return dataclasses.replace(state, free=0, used=0)

    def end_iteration(self) -> tuple["TextState", int]:
        """The state as it enters the next iteration, and how many slots this one used."""
        return dataclasses.replace(self, used=0), self.used or 0

    def exit_loop(self, outer: "TextState", slots: int) -> "TextState":
        """The state after a loop that used `slots` slots and was entered with `outer`."""
        if outer.used is not None:
            return dataclasses.replace(self, used=outer.used + slots)
        return dataclasses.replace(self, free=max(outer.free - slots, 0), used=None)

    def particle_axes(self) -> "TextState":
        """The `in_axes` and `out_axes` of this state for a `vmap` over particles.

        Returns:
            The same structure with 0 for what each particle has for itself and None for what all share.
        """
        return self._structure(shared=None, caches=0, cursor=None, own=0)

    def reserve(self, slots: int) -> "TextState":
        """Add room for more tokens.

        Args:
            slots: number of slots to add, static, at least 0.

        Returns:
            The state with `slots` more unused slots at the end.

        Raises:
            ValueError: `slots` is negative, or prompt and slots together exceed the context of the model. Where the
                prompt's length is not known (while tracing), the slots alone are checked.
        """
        if slots < 0:
            raise ValueError(f"`slots` must be at least 0, got {slots}.")
        if slots > self.room_in_context:
            raise ValueError(
                f"the model's context holds {self.context_length} tokens, and {self.room_in_context} places are left; "
                f"{slots} more do not fit."
            )
        if slots == 0:
            return self

        def grow(cache: Array) -> Array:
            room = jnp.zeros((*cache.shape[:-3], slots, *cache.shape[-2:]), cache.dtype)
            return jnp.concatenate([cache, room], axis=-3)

        unused = jnp.zeros((*self.valid.shape[:-1], slots), bool)
        return dataclasses.replace(
            self,
            keys=grow(self.keys),
            values=grow(self.values),
            valid=jnp.concatenate([self.valid, unused], axis=-1),
            free=self.free + slots,
        )

    def _structure(self, *, shared, caches, cursor, own) -> "TextState":
        return TextState(
            prompt_keys=shared,
            prompt_values=shared,
            prompt_length=shared,
            keys=caches,
            values=caches,
            valid=own,
            cursor=cursor,
            position=own,
            hidden=own,
            context_length=self.context_length,
            free=self.free,
            used=self.used,
        )


@jax.custom_batching.custom_vmap
def write_slot(
    cache: Float[Array, "L C Hkv D"], entry: Float[Array, "Hkv D"], layer: Int[Array, ""], slot: Int[Array, ""]
) -> Float[Array, "L C Hkv D"]:
    """Write one layer's entry of one slot, in place where the compiler can.

    Args:
        cache: all layers' keys or values.
        entry: what to write.
        layer: which layer.
        slot: which slot; an index beyond the end writes the last one.

    Returns:
        The cache with the entry in place.

    Under `vmap` with a shared layer and slot this stays one slice update of the whole population. The batching rule of
    `lax.dynamic_update_slice` makes a scatter of it, whose bounds check reads the old entry, and XLA then copies the
    whole cache in every step.
    """
    return jax.lax.dynamic_update_slice(cache, entry[None, None], (layer, slot, 0, 0))


@write_slot.def_vmap
def _write_slot_batched(axis_size, in_batched, cache, entry, layer, slot):
    cache_batched, entry_batched, layer_batched, slot_batched = in_batched
    if not cache_batched:
        cache = jnp.broadcast_to(cache, (axis_size, *cache.shape))
    if not entry_batched:
        entry = jnp.broadcast_to(entry, (axis_size, *entry.shape))
    if layer_batched or slot_batched:
        layer = layer if layer_batched else jnp.full((axis_size,), layer)
        slot = slot if slot_batched else jnp.full((axis_size,), slot)
        return jax.vmap(
            lambda cache, entry, layer, slot: jax.lax.dynamic_update_slice(
                cache, entry[None, None], (layer, slot, 0, 0)
            )
        )(cache, entry, layer, slot), True
    return jax.lax.dynamic_update_slice(cache, entry[:, None, None], (0, layer, slot, 0, 0)), True
