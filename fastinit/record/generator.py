"""Which random numbers a block's operations get: streams for recorded fills, torch's default generators for the rest.

While a block is active, torch's default generators are seeded from the block's key, and put back at its end. So
whatever torch draws in the block is decided by the key, and seeds and generator states that the code sets mean what they
mean in torch. A recorded fill takes the next ordinal as its stream, as long as the code has not touched the generator.
Once it has set a seed, or has asked for a state that it may restore, the stream is a draw of that generator, and the key
is 0: so a seed that the code sets decides alone.
"""

from __future__ import annotations

import torch

from .. import native

_MASK = 2**64 - 1


class Generator(native.Generator):
    """torch's default generators as one block has them: those of the CPU and of the block's device.

    `native.turn` is the one whose state torch's generators have now: of several in threads or coroutines, that of the
    block that ran last.
    """

    def __init__(self, seed: int) -> None:
        self._seed = mix(seed, 0)
        self._key = seed
        self.streams = 0
        self._states: list[tuple[torch.Generator, torch.Tensor]] | None = None
        self._outside: list[tuple[torch.Generator, torch.Tensor]] = []
        self._previous: Generator | None = None

    def enter(self) -> None:
        """Fork torch's generators, and seed them."""
        self._previous = _turn()
        if self._previous is not None:
            self._previous._states = _states()
        self._outside = _states()
        for generator, _ in self._outside:
            generator.manual_seed(self._seed)
        native.give_turn(self)

    def leave(self) -> None:
        """Put torch's generators back."""
        if native.turn() is self:
            native.give_turn(self._previous)
            for generator, state in self._outside:
                generator.set_state(state)
        else:
            # Another block that was entered later is still active, and will put back what this one has forked.
            other = _turn()
            while other is not None and other._previous is not self:
                other = other._previous
            if other is not None:
                other._previous, other._outside = self._previous, self._outside

    def resume(self) -> None:
        """Have torch's generators in this block's state, after another block's turn."""
        if native.turn() is not self:
            _give_turn(self)

    def next_stream(self) -> tuple[int, int | None]:
        """The stream of a recorded fill, and its key if that is not the block's."""
        self.resume()
        if torch.default_generator.initial_seed() == self._seed:
            self.streams += 1
            return self.streams - 1, None
        return int(_draw.random_(-(2**63), None).item()) & _MASK, 0

    def before_state_is_read(self) -> None:
        """Let the generator's state say how many fills were recorded, since that state may be restored."""
        self.resume()
        if torch.default_generator.initial_seed() == self._seed:
            for generator, _ in self._outside:
                generator.manual_seed(mix(self._key, self.streams + 1))


_draw = torch.empty((), dtype=torch.int64, device="cpu")


def _turn() -> Generator | None:
    generator: Generator | None = native.turn()
    return generator


def _states() -> list[tuple[torch.Generator, torch.Tensor]]:
    """torch's default generators with their states; a process that has not used CUDA has none there."""
    generators = [torch.default_generator]
    if torch.cuda.is_initialized():
        generators += torch.cuda.default_generators
    return [(generator, generator.get_state()) for generator in generators]


def _give_turn(block: Generator) -> None:
    owner = _turn()
    if owner is None:
        return
    owner._states = _states()
    states, block._states = block._states, None
    native.give_turn(block)
    for generator, state in states or ():
        generator.set_state(state)


def mix(seed: int, ordinal: int) -> int:
    """A 64-bit seed from key and ordinal (the finaliser of SplitMix64)."""
    x = (seed + (ordinal + 1) * 0x9E3779B97F4A7C15) & _MASK
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & _MASK
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB & _MASK
    return x ^ (x >> 31)
