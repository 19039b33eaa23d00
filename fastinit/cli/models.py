"""Plain torch.nn models for the demo and the benchmarks: ordinary model code that knows nothing of fastinit."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional


@dataclass(frozen=True, slots=True)
class DecoderConfig:
    """The shape of a `Decoder`.

    Args:
        vocabulary, width, layers, heads: sizes; `width` is a multiple of `heads`.
        hidden: width of the feed-forward layers.
        key_value_heads: heads of keys and values, each shared by equally many of queries; None: as many as `heads`.
    """

    vocabulary: int
    width: int
    layers: int
    heads: int
    hidden: int
    key_value_heads: int | None = None

    @property
    def key_value_width(self) -> int:
        return self.width // self.heads * (self.key_value_heads or self.heads)

    @property
    def parameters(self) -> int:
        attention = 2 * self.width * (self.width + self.key_value_width)
        layer = attention + 3 * self.width * self.hidden + 2 * self.width
        return 2 * self.vocabulary * self.width + self.layers * layer + self.width

    @classmethod
    def of_size(cls, parameters: int) -> DecoderConfig:
        """The config nearest to a number of parameters: 128 wide heads, feed-forward layers 8/3 as wide as the model,
        about as many layers as a 1.3B model has for its width."""
        vocabulary = 32_000 if parameters >= 200_000_000 else 1_000
        candidates = (
            cls(vocabulary, width, layers, max(width // 128, 1), -(-width * 8 // 3 // 128) * 128)
            for width in (64, *range(128, 16_384, 128))
            for layers in range(max(width * 24 // 2048, 1), width * 24 // 2048 + 4)
        )
        return min(candidates, key=lambda config: abs(config.parameters - parameters))

    def with_layers(self, layers: int) -> DecoderConfig:
        return replace(self, layers=layers)

    def at_most(self, parameters: float) -> DecoderConfig:
        """The same with fewer layers (one at least), so that it has no more than so many parameters."""
        smaller = (self.with_layers(layers) for layers in range(self.layers, 1, -1))
        return next((config for config in smaller if config.parameters <= parameters), self.with_layers(1))


LLAMA_7B = DecoderConfig(vocabulary=32_000, width=4096, layers=32, heads=32, hidden=11_008)
"""The shape of Llama 7B: 6.74B parameters in 291 tensors (Touvron et al. 2023, table 2)."""

LLAMA_70B = DecoderConfig(vocabulary=32_000, width=8192, layers=80, heads=64, hidden=28_672, key_value_heads=8)
"""The shape of Llama 2 70B: 68.98B parameters in 723 tensors (Touvron et al. 2023, "Llama 2")."""


class Decoder(nn.Module):
    """A decoder as Llama has it: rotary attention, SwiGLU, RMSNorm before each.

    Example:
        >>> Decoder(DecoderConfig.of_size(1_000_000))(torch.zeros(1, 8, dtype=torch.long)).shape
        torch.Size([1, 8, 1000])
    """

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.embedding = nn.Embedding(config.vocabulary, config.width)
        self.layers = nn.ModuleList(DecoderLayer(config) for _ in range(config.layers))
        self.norm = nn.RMSNorm(config.width)
        self.head = nn.Linear(config.width, config.vocabulary, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits (batch, length, vocabulary) of tokens (batch, length)."""
        x = self.embedding(tokens)
        for layer in self.layers:
            x = layer(x)
        logits: Tensor = self.head(self.norm(x))
        return logits


class DecoderLayer(nn.Module):
    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(config.width)
        self.attention = RotaryAttention(config.width, config.heads, config.key_value_width)
        self.hidden_norm = nn.RMSNorm(config.width)
        self.gate = nn.Linear(config.width, config.hidden, bias=False)
        self.up = nn.Linear(config.width, config.hidden, bias=False)
        self.down = nn.Linear(config.hidden, config.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x))
        hidden = self.hidden_norm(x)
        output: Tensor = x + self.down(functional.silu(self.gate(hidden)) * self.up(hidden))
        return output


class RotaryAttention(nn.Module):
    """Causal self-attention with rotary position embeddings (Su et al. 2021), frequencies kept in fp32.

    Keys and values have as many heads as fit into `key_value_width`. A rank of tensor parallelism has fewer of all.
    """

    frequencies: Tensor

    def __init__(self, width: int, heads: int, key_value_width: int) -> None:
        super().__init__()
        self.head_width = width // heads
        self.query = nn.Linear(width, width, bias=False)
        self.key = nn.Linear(width, key_value_width, bias=False)
        self.value = nn.Linear(width, key_value_width, bias=False)
        self.output = nn.Linear(width, width, bias=False)
        exponents = torch.arange(0, self.head_width, 2, dtype=torch.float32) / self.head_width
        self.register_buffer("frequencies", 10_000.0**-exponents, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = (
            projection(x).unflatten(-1, (-1, self.head_width)).transpose(1, 2)
            for projection in (self.query, self.key, self.value)
        )
        positions = torch.arange(x.shape[1], device=x.device, dtype=torch.float32)
        angles = torch.outer(positions, self.frequencies)
        query, key = (rotated(each, angles.cos(), angles.sin()) for each in (query, key))
        shared = key.shape[1] < query.shape[1]
        attended = functional.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=shared)
        output: Tensor = self.output(attended.transpose(1, 2).flatten(2))
        return output


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, first * sin + second * cos), dim=-1).to(x.dtype)


def training_step(model: nn.Module, vocabulary: int, device: torch.device) -> float:
    """One step of SGD on a few random tokens, and its loss.

    Raises:
        RuntimeError: the loss is not finite, or a parameter got no gradient.
    """
    # Few tokens: on CPUs without bf16 arithmetic a matrix product in bf16 is slow.
    tokens = torch.randint(vocabulary, (1, 5), generator=torch.Generator().manual_seed(0)).to(device)
    logits = model(tokens[:, :-1])
    loss = functional.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten())
    loss.backward()
    for name, parameter in model.named_parameters():
        if parameter.grad is None:
            raise RuntimeError(f"{name} got no gradient in the first training step")
    # foreach would hold an update of every parameter at once.
    torch.optim.SGD(model.parameters(), lr=1e-3, foreach=False).step()
    if not loss.isfinite():
        raise RuntimeError(f"the loss of the first training step is {loss.item()}")
    return loss.item()
