"""Which random numbers a block's operations get: streams for recorded fills, torch's default generators for the rest.

While a block is active, torch's default generators are seeded from the block's key, and put back at its end. So
whatever torch draws in the block is decided by the key, and seeds and generator states that the code sets mean what
they mean in torch. A recorded fill takes the next ordinal as its stream. Once the code has set a seed, the stream is a
draw of torch's generator, and the key is 0: so such a seed decides alone. Where the code restores a state that it has
read in the block, the ordinals go on from where they were then.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable
from typing import ClassVar

import torch

from .. import native
from ..recipe import mix

_MASK = 2**64 - 1

# A change of turns is one step.
_lock = threading.RLock()


_States = list[tuple[torch.Generator, torch.Tensor]]


class Generator(native.Generator):
    """torch's default generators as one block has them; `native.turn` is the one whose state they have now."""

    # All that are entered, and torch's own state meanwhile.
    _active: ClassVar[list[Generator]] = []
    _outside: ClassVar[_States] = []

    def __init__(self, key: int) -> None:
        self._seed = mix(key, 0)
        self.streams = 0
        self._states: _States = []
        # What states that were read in the block stand for: how many streams were taken, and the state without a mark.
        self._read: dict[bytes, tuple[int, torch.Tensor]] = {}

    def enter(self) -> None:
        """Fork torch's generators, and seed them."""
        with _lock:
            states, owner = _states(), _turn()
            if not Generator._active:
                Generator._outside = states
            elif owner is not None:
                owner._states = states
            Generator._active.append(self)
            for generator, _ in states:
                generator.manual_seed(self._seed)
            native.give_turn(self)

    def leave(self, outer: Generator | None) -> None:
        """Put torch's generators back, or as the outer block has them; the last of several threads does the former."""
        with _lock:
            Generator._active.remove(self)
            if _turn() is self:
                native.give_turn(None)
            if outer is not None:
                outer.resume()
            elif not Generator._active:
                _restore(Generator._outside)
                Generator._outside = []

    def resume(self) -> None:
        """Have torch's generators in this block's state, after the turn of another thread's or coroutine's block."""
        if _turn() is not self:
            with _lock:
                owner = _turn()
                if owner is not self and self in Generator._active:
                    if owner is not None:
                        owner._states = _states()
                    # The turn comes last: native code of another thread looks at it without the lock.
                    _restore(self._states)
                    native.give_turn(self)

    def next_stream(self) -> tuple[int, int | None]:
        """The stream of a recorded fill, and its key if that is not the block's."""
        with _lock:
            self.resume()
            if torch.default_generator.initial_seed() == self._seed:
                self.streams += 1
                return self.streams - 1, None
            return int(_draw.random_(-(2**63), None).item()) & _MASK, 0

    def state_is_read(self, function: Callable[[], torch.Tensor]) -> torch.Tensor:
        """``torch.get_rng_state()``: a state that tells how many fills were recorded, for it may be restored."""
        with _lock:
            self.resume()
            state = function()
            if torch.default_generator.initial_seed() != self._seed:
                return state
            # Recorded fills draw nothing: without a mark, states before and after them would be the same.
            told = hashlib.blake2b(_bytes(state) + self.streams.to_bytes(8, "little"), digest_size=8)
            torch.default_generator.manual_seed(int.from_bytes(told.digest(), "little"))
            marked = function()
            torch.default_generator.set_state(state)
            self._read[_bytes(marked)] = (self.streams, state)
            return marked

    def state_was_set(self, state: torch.Tensor) -> None:
        """After ``torch.set_rng_state``: recorded fills go on where they were when that state was read."""
        known = self._read.get(_bytes(state))
        if known is not None:
            self.streams = known[0]
            torch.default_generator.set_state(known[1])


_draw = torch.empty((), dtype=torch.int64, device="cpu")


def _bytes(state: torch.Tensor) -> bytes:
    return bytes(state.tolist())


def _turn() -> Generator | None:
    generator: Generator | None = native.turn()
    return generator


def _states() -> _States:
    """torch's default generators with their states; a process that has not used CUDA has none there."""
    generators = [torch.default_generator]
    if torch.cuda.is_initialized():
        generators += torch.cuda.default_generators
    return [(generator, generator.get_state()) for generator in generators]


def _restore(states: _States) -> None:
    for generator, state in states:
        generator.set_state(state)
