"""Every architecture of the installed transformers, as a function that makes a small model of it.

The default configuration of each is made small by rules: two layers, a small vocabulary, few experts, and widths and
numbers of heads divided by one factor, so that what has to agree or divide still does. The factor is the first of
several with which torch alone builds a model of at most MOST parameters.
"""

from __future__ import annotations

import copy
import functools
import re
from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import nn
from transformers.models.auto import configuration_auto, modeling_auto

MOST = 32_000_000
FACTORS = (16, 8, 4, 2, 1)
LAYERS = 2

# Of several models of one configuration the first of these, which has the base model inside; otherwise any.
_HEADS = (
    *(
        "FOR_SPEECH_SEQ_2_SEQ",
        "FOR_SEQ_TO_SEQ_CAUSAL_LM",
        "FOR_CAUSAL_LM",
        "FOR_MULTIMODAL_LM",
        "FOR_IMAGE_TEXT_TO_TEXT",
    ),
    *("FOR_PRETRAINING", "FOR_MASKED_LM", "FOR_CTC", "FOR_IMAGE_CLASSIFICATION", "FOR_OBJECT_DETECTION"),
    *("FOR_UNIVERSAL_SEGMENTATION", "FOR_SEMANTIC_SEGMENTATION", "FOR_DEPTH_ESTIMATION", "FOR_AUDIO_CLASSIFICATION"),
)

_LAYERS = re.compile(
    r"^(num_(hidden_|encoder_|decoder_)?layers|(encoder|decoder|text|vision|e|d|n)_layers?|n_layer|num_(\w+_)?layers|"
    r"(?!num_feat_extract)\w*_layers|depth|num_blocks)$"
)
_HEAD_COUNTS = re.compile(r"(^|_)(n_heads?|num_heads?|heads|num_key_value_heads|kv_heads|attention_heads)$")
_WIDTHS = re.compile(
    r"(^|_)(hidden_sizes?|intermediate_sizes?|d_model|d_ff|n_embd|n_inner|dim|dims|embed_dims?|ffn_dim|feat_dim|"
    r"embedding_size|projection_dim|hidden_dim|inner_dim|width|channels|hidden_channels|conv_dim|ffn_size|lora_rank|"
    r"lru_width|mlp_dim|feature_size|encoder_hidden_size|decoder_hidden_size|out_hidden_size|out_channels)$"
)
_KEPT = re.compile(r"head_dim|head_size|in_channels|num_channels|input_channels|image|patch|kernel|rope|rotary|window")
_VOCABULARIES = re.compile(r"(^|_)vocab_size(_\w+)?$")
_EXPERTS = re.compile(r"^(n|num)_(\w+_)?experts$")


# What default configurations lack.
_MISSING = {
    "autoformer": {"prediction_length": 4},
    "esm": {"vocab_size": 33, "pad_token_id": 1},
    "hunyuan_v1_dense": {"head_dim": 64},
    "hunyuan_v1_moe": {"head_dim": 64},
    "informer": {"prediction_length": 4},
    "ministral": {"head_dim": 64},
    "nemotron": {"num_key_value_heads": 8},
    "time_series_transformer": {"prediction_length": 4},
}


class CannotBeShrunk(Exception):
    """No factor gives a model that torch alone can build, or none that is small."""


def architectures() -> list[str]:
    """The names of all configurations that have a model."""
    return sorted(name for name in configuration_auto.CONFIG_MAPPING_NAMES if _models(name))


@functools.cache
def _all_models() -> dict[str, dict[str, str]]:
    found: dict[str, dict[str, str]] = {}
    for mapping in sorted(vars(modeling_auto)):
        if mapping.startswith("MODEL_") and mapping.endswith("_MAPPING_NAMES"):
            for name, model in getattr(modeling_auto, mapping).items():
                task = mapping.removeprefix("MODEL_").removesuffix("_MAPPING_NAMES")
                found.setdefault(name, {})[task] = model if isinstance(model, str) else model[0]
    return found


def _models(name: str) -> dict[str, str]:
    return _all_models().get(name, {})


def constructor(name: str) -> tuple[str, Callable[[], nn.Module]]:
    """A model's name and a function that makes a small one, with a configuration of its own each time."""
    models = _models(name)
    preferred = [models[head] for head in _HEADS if head in models]
    reason = ""
    for model in list(dict.fromkeys([*preferred, *models.values()]))[:4]:
        for layers in (LAYERS, None):  # None: as many as there are, where each is described on its own
            for factor in FACTORS:
                try:
                    make = functools.partial(
                        _make, getattr(transformers, model), small_configuration(name, factor, layers)
                    )
                    parameters = _parameters(make)
                except Exception as error:  # anything may go wrong in so many models' code: the next attempt
                    problem = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
                else:
                    if parameters <= MOST:
                        return model, make
                    problem = f"{parameters / 1e6:.0f}M parameters at least"
                reason = reason or f"{model}: {problem}"
    raise CannotBeShrunk(reason)


def _make(cls: type[nn.Module], config: Any) -> nn.Module:
    return cls(copy.deepcopy(config))


def _parameters(make: Callable[[], nn.Module]) -> int:
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in make().parameters())


def small_configuration(name: str, factor: int, layers: int | None) -> Any:
    config = transformers.AutoConfig.for_model(name, **_MISSING.get(name, {}))
    return type(config).from_dict(_small(config.to_dict(), factor, layers))


def _small(values: dict[str, Any], factor: int, layers: int | None) -> dict[str, Any]:
    counts = set()
    if layers is not None:
        counts = {value for key, value in values.items() if _LAYERS.search(key) and _is_count(value) and value > layers}
    small = {}
    for key, value in values.items():
        if isinstance(value, dict) and all(isinstance(each, str) for each in value):
            value = _small(value, factor, layers)
        elif isinstance(value, list) and len(value) in counts and not _WIDTHS.search(key):
            value = _pick(value, layers)  # one entry a layer
        elif isinstance(value, list) and value and all(map(_is_count, value)):
            if key in ("depths", "num_layers", "layers") or key.endswith("_depths"):
                value = [min(each, layers or each) for each in value]
            elif _scales(key):
                value = [_divided(each, factor) for each in value]
        elif _is_count(value):
            if key.endswith(("_token_id", "_token_index")):
                value = value % 200
            elif _VOCABULARIES.search(key):
                value = min(value, 256)
            elif _EXPERTS.search(key):
                value = min(value, 8)
            elif _LAYERS.search(key):
                value = min(value, layers or value)
            elif _scales(key):
                value = _divided(value, factor)
        small[key] = value
    return small


def _pick(entries: list[Any], layers: int) -> list[Any]:
    """So many of the entries, of each kind that there is one if possible."""
    kinds = [entry for at, entry in enumerate(entries) if entry not in entries[:at]]
    return (kinds + entries)[:layers]


def _scales(key: str) -> bool:
    return bool(_HEAD_COUNTS.search(key) or (_WIDTHS.search(key) and not _KEPT.search(key)))


def _divided(value: int, factor: int) -> int:
    return value // factor if value % factor == 0 else value


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0
