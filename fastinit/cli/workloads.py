"""What the benchmarks measure: distributions to fill tensors from, and models to create, each defined once."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import fastinit
from fastinit.recipe import Distribution

from .models import LLAMA_7B, Decoder, DecoderConfig, GPT2Medium


@dataclass(frozen=True, slots=True)
class Fill:
    """Values to fill a tensor with: as fastinit says it, as torch does, and how they should come out."""

    ours: Distribution
    torch: Callable[[Tensor], Any]
    mean: float
    std: float


def _truncated_std(bound: float) -> float:
    """Standard deviation of a standard normal distribution cut off at -bound and bound."""
    density = math.exp(-(bound**2) / 2) / math.sqrt(2 * math.pi)
    return math.sqrt(1 - 2 * bound * density / math.erf(bound / math.sqrt(2)))


STD = 0.02
FILLS = {
    "constant": Fill(fastinit.Constant(0.5), lambda tensor: tensor.fill_(0.5), 0.5, 0.0),
    "uniform": Fill(fastinit.Uniform(-1.0, 1.0), lambda tensor: tensor.uniform_(-1.0, 1.0), 0.0, 1 / math.sqrt(3)),
    "normal": Fill(fastinit.Normal(0.0, STD), lambda tensor: tensor.normal_(0.0, STD), 0.0, STD),
    "truncated normal": Fill(
        fastinit.TruncatedNormal(0.0, STD, -2 * STD, 2 * STD),
        lambda tensor: nn.init.trunc_normal_(tensor, 0.0, STD, -2 * STD, 2 * STD),
        0.0,
        STD * _truncated_std(2.0),
    ),
}
RANDOM = ("uniform", "normal", "truncated normal")

SMALL_FILLS, SMALL_ELEMENTS = 10_000, 4096
ROW_BYTES = 1024  # of a rectangle's rows


# Models


@dataclass(frozen=True, slots=True)
class TransformersModel:
    """A language model of transformers; called, it is created from its configuration, with options of `from_config`."""

    configure: Callable[[], Any]

    def __call__(self, **options: Any) -> nn.Module:
        from transformers import AutoModelForCausalLM

        # A new configuration each time: creation writes the dtype into it.
        model: nn.Module = AutoModelForCausalLM.from_config(self.configure(), **options)
        return model


def llama(config: DecoderConfig, library: str) -> Callable[[], nn.Module]:
    """Creates the model of that shape: "torch.nn" modules of this package, or those of "transformers"."""
    if library == "torch.nn":
        return lambda: Decoder(config)

    def configure() -> Any:
        from transformers import LlamaConfig

        return LlamaConfig(
            vocab_size=config.vocabulary,
            hidden_size=config.width,
            intermediate_size=config.hidden,
            num_hidden_layers=config.layers,
            num_attention_heads=config.heads,
            num_key_value_heads=config.key_value_heads,
        )

    return TransformersModel(configure)


def gpt2_medium(library: str, layers: int = 24, vocabulary: int = 50_257) -> Callable[[], nn.Module]:
    """The same for the shape of GPT-2 medium, or for less of it."""
    if library == "torch.nn":
        return lambda: GPT2Medium(layers, vocabulary)

    def configure() -> Any:
        from transformers import GPT2Config

        return GPT2Config(vocab_size=vocabulary, n_embd=1024, n_layer=layers, n_head=16)

    return TransformersModel(configure)


def linears(count: int) -> Callable[[], nn.Module]:
    """Many small modules, two tensors each, whose creation is Python's work."""
    return lambda: nn.ModuleList(nn.Linear(64, 64) for _ in range(count))


@dataclass(frozen=True, slots=True)
class Case:
    """A model to create in several of `ways.WAYS`.

    Args:
        name: what tables and plots call it.
        build: creates it.
        ways: names in `ways.WAYS`.
        cache: "cold" (torch's allocator holds nothing when creation starts), "warm" (it holds what an equal model just
            freed) or None, where there is no such cache.
        requires: package that the model comes from.
        part: creates a few of its layers, of so many parameters, for the way "naive", which is slow. None: all.
    """

    name: str
    build: Callable[[], nn.Module]
    ways: tuple[str, ...]
    cache: str | None = None
    requires: str | None = None
    part: Callable[[], nn.Module] | None = None
    part_parameters: int = 0

    def builder(self, way: str) -> Callable[[], nn.Module]:
        """What a way creates: the model, or the part of it that it has the time for."""
        return self.part if way == "naive" and self.part is not None else self.build


LIBRARIES = {"torch.nn": None, "transformers": "transformers"}
PEER_WAYS = {"torch.nn": ("fabric", "accelerate"), "transformers": ("fabric", "accelerate", "transformers")}


def module_cases(device: torch.device, quick: bool, peers: bool = False) -> list[Case]:
    """Many small modules; with `peers`, in more ways, and on a GPU also a model of 10,000 tensors."""
    cache = "warm" if device.type == "cuda" else None
    ways: tuple[str, ...] = ("fastinit", "torch", "torch fp32")
    if peers:
        ways = ("fastinit", "fastinit fp32", "torch", "torch fp32", "plain")
    counts = (50,) if quick else (2000, 5000) if peers and cache else (2000,)
    return [Case(f"{count:,} x Linear(64, 64)", linears(count), ways, cache) for count in counts]


def model_cases(device: torch.device, quick: bool, peers: bool = False) -> list[Case]:
    """Models as people create them; with `peers`, in more ways."""
    on_gpu = device.type == "cuda"
    cases = []
    gpt2_size = {"layers": 1, "vocabulary": 1000} if quick else {}
    shape = LLAMA_7B.with_layers(2) if quick else LLAMA_7B
    for cache in ("cold", "warm") if on_gpu else (None,):
        for library, requires in LIBRARIES.items():
            # The naive way hardly notices the cache: once is enough.
            ways: tuple[str, ...] = ("fastinit", "torch", *([] if cache == "warm" else ["naive"]))
            ways += PEER_WAYS[library] if peers else ()
            cases.append(
                Case(f"GPT-2 medium, {library}", gpt2_medium(library, **gpt2_size), ways, cache, requires=requires)
            )
            if on_gpu:
                part = shape.with_layers(1)
                cases.append(
                    Case(
                        f"Llama 7B, {library}",
                        llama(shape, library),
                        ways,
                        cache,
                        requires=requires,
                        part=llama(part, library),
                        part_parameters=part.parameters,
                    )
                )
    return cases


def growth_sizes(device: torch.device, quick: bool) -> tuple[float, ...]:
    """Numbers of parameters of models to create one after the other."""
    if quick:
        return 1e5, 1e6
    if device.type == "cuda":
        return 1e7, 3e7, 1e8, 3.5e8, 1.3e9, 3e9, 6.7e9, 13e9, 30e9
    return 1e7, 1e8, 1.3e9


NAIVE_GROWTH = 400_000_000  # parameters: what the naive way creates in a few seconds


def growth_case(parameters: float, device: torch.device) -> Case:
    config = DecoderConfig.of_size(int(parameters))
    ways: tuple[str, ...] = ("fastinit", "torch")
    if device.type == "cuda":
        ways += ("fabric", "accelerate")
    if config.parameters <= NAIVE_GROWTH:
        ways += ("naive",)
    return Case("Llama-shaped", llama(config, "torch.nn"), ways, "cold" if device.type == "cuda" else None)


RANKS = (1, 2, 4, 8)


def rows_of_rank_0(ranks: int) -> Callable[[str, tuple[int, ...]], tuple[slice, ...]]:
    """A window for `fastinit.materialize`: of every tensor, the rows that the first of so many ranks would hold."""

    def rows(_: str, shape: tuple[int, ...]) -> tuple[slice, ...]:
        return (slice(0, -(-shape[0] // ranks)), *(slice(None) for _ in shape[1:])) if shape else ()

    return rows
