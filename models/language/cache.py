"""The state of one text: the prompt's keys and values, one's own, and the last hidden state.

Symbols: L layers, Hkv key heads, D head width, E hidden width, S prompt slots, C slots for what follows the prompt.

What all particles of a loop share has no particle axis under `vmap`: the prompt's cache, its length, and `cursor`, the
slot that is written next. What each particle has for itself has one: its keys and values, which of its slots count,
its position, its hidden state. `TextState.particle_axes` says which is which.

A slot and a position are two things. All particles write the same slot in the same step, so that a write is one slice
and not a scatter; a particle that waits leaves a slot unused (`valid` False), and its next token still gets the next
position.

How many slots are certainly free is known while a program is staged (`Room.free`), so that no write falls outside:

    cursor <= C - free                                                                                             (1)

`extend` takes one free slot, and adds some where there is none. A state is a value: each branch of one has slots of its
own. In a loop of T iterations whose carry takes n slots in each, (1) holds for every iteration with the numbers of the
last: the carry enters with T n free slots, its iterations are traced with n, and it leaves with none of them. What an
iteration reads beside its carry, in branches that are dropped, is added in that iteration alone.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from ppl.control_flow import NoRoom

__all__ = ["Room", "TextState", "write_slot"]


@dataclasses.dataclass(frozen=True)
class Room:
    """What is known of a text's room while a program is staged.

    Attributes:
        free: how many slots are certainly free, (1).
        prompt: how many tokens the prompt has, where that is known. States are alike whatever it is.
    """

    free: int = 0
    prompt: int | None = dataclasses.field(default=None, compare=False)

    def __repr__(self) -> str:  # JAX prints it where a loop's carry changes its room
        return f"room for {self.free} more tokens: lm.extend takes one; ppl.scan makes room for its iterations"


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
    meta_fields=["context_length", "room"],
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
        room: what is known of the room for more tokens; static.
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
    room: Room = dataclasses.field(default=Room())

    @property
    def slots(self) -> int:
        """Number of slots for tokens after the prompt, C."""
        return self.keys.shape[-3]

    @property
    def free(self) -> int:
        """Number of slots that are certainly free."""
        return self.room.free

    @property
    def room_in_context(self) -> int:
        """How many more slots the model's context has room for; an upper bound where the prompt's length is unknown."""
        traced = isinstance(self.prompt_length, jax.core.Tracer)
        prompt = (self.room.prompt or 1) if traced else int(np.asarray(self.prompt_length).max())
        return self.context_length - prompt - self.slots

    def scratch(self) -> "TextState":
        """Which leaves may hold anything once the text has ended.

        Returns:
            The same structure with a bool for each leaf: True for the caches and the cursor, which are only read
            through `valid` and by the next write; False for what a finished text must keep.
        """
        return self._structure(shared=False, caches=True, cursor=True, own=False)

    # What `ppl.scan` asks a node of its carry, see `ppl.control_flow.LoopCarry`.

    def enter_loop(self, count: int, length: int) -> "TextState":
        """The state in every iteration of a loop, with room for all of them; see (1).

        Args:
            count: how many slots an iteration takes.
            length: how many iterations there are.

        Raises:
            NoRoom: the context of the model has too little.
        """
        missing = max(count * length - self.free, 0)
        if missing > self.room_in_context:
            raise NoRoom(
                f"ppl.scan of {length} iterations in each of which lm.extend reads {count} more: {self.full(missing)}"
            )
        # A loop of no iterations is traced as well.
        state = self.reserve(max(missing, count - self.free))
        return state._with_free(state.free - count * max(length - 1, 0))

    def end_iteration(self, entered: "TextState") -> tuple["TextState", int]:
        """The state as it enters the next iteration, and how many slots this one took.

        Args:
            entered: the state that entered the iteration. This one may be a branch of it, or of another: with more
                slots at its end, none of which is used by (1), or with fewer.
        """
        taken = (self.slots - self.free) - (entered.slots - entered.free)
        return self._resized(entered.slots)._with_free(entered.free), max(taken, 0)

    def exit_loop(self, count: int, length: int) -> "TextState":
        """The state after a loop of `length` iterations that took `count` slots each."""
        return self._with_free(self.free - count * min(length, 1))

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
                prompt's length is not known while tracing, the slots alone are checked.
        """
        if slots < 0:
            raise ValueError(f"`slots` must be at least 0, got {slots}.")
        if slots > self.room_in_context:
            raise NoRoom(self.full(slots))
        return self._resized(self.slots + slots)._with_free(self.free + slots)

    def full(self, slots: int) -> str:
        """What to say where `slots` more slots exceed the context."""
        return (
            f"the model's context holds {self.context_length} tokens, and {max(self.room_in_context, 0)} places are "
            f"left; {slots} more do not fit."
        )

    def _with_free(self, free: int) -> "TextState":
        return self if free == self.free else dataclasses.replace(self, room=dataclasses.replace(self.room, free=free))

    def _resized(self, slots: int) -> "TextState":
        """The state with unused slots added at the end, or taken away there."""
        if slots == self.slots:
            return self

        def resized(array: Array, axis: int) -> Array:
            added = slots - array.shape[axis]
            if added < 0:
                return jax.lax.slice_in_dim(array, 0, slots, axis=axis % array.ndim)
            shape = list(array.shape)
            shape[axis] = added
            return jnp.concatenate([array, jnp.zeros(shape, array.dtype)], axis=axis)

        return dataclasses.replace(
            self, keys=resized(self.keys, -3), values=resized(self.values, -3), valid=resized(self.valid, -1)
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
            room=self.room,
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
