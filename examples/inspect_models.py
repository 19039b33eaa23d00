"""Models to look at before a run is started, without memory for them:

cd examples
python -m fastinit inspect inspect_models:llama --dtype bf16 --plot llama.png
"""

from torch import nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    ViTConfig,
    ViTForImageClassification,
)


def llama() -> nn.Module:
    return LlamaForCausalLM(LlamaConfig())  # 6.74B parameters


def vit() -> nn.Module:
    return ViTForImageClassification(ViTConfig())


def mamba() -> nn.Module:
    return MambaForCausalLM(MambaConfig())
