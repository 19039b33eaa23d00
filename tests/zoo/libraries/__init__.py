"""Small models of other libraries, by configuration alone: each a constructor and, for many, a call of the model.

A function NAME_models for each library NAME imports it and returns its models by name. `make test-libraries` installs
the libraries and compares the models.
"""

import torch

from . import diffusion, geometry, language, probability, speech, training, vision

if torch.version.cuda is None:
    # torchvision's wheel does not load its operators beside a torch without CUDA, and for want of these two cannot be
    # imported. No model here calls them.
    for _name in ("nms", "qnms"):
        torch.library.define(f"torchvision::{_name}", "(Tensor dets, Tensor scores, float threshold) -> Tensor")

LIBRARIES = {
    name.removesuffix("_models"): models
    for part in (diffusion, geometry, language, probability, speech, training, vision)
    for name, models in vars(part).items()
    if name.endswith("_models")
}

# What differs from torch for a reason, by library, model and mode.
_GENERATOR = "drawn in bf16 from a generator of the library's own: torch's numbers, which are others in bf16"
_NAMED = "the library draws and divides in bf16, which it names; fastinit divides in fp32"
_CONVERTED = "computed in fp32 and converted to bf16 by the library, which names them, and used further: rounded there"
_NO_FP64 = "the library itself refuses fp64"
KNOWN = {
    ("kornia", "MKDDescriptor", "bf16"): _CONVERTED,
    ("kornia", "SIFTDescriptor", "bf16"): _CONVERTED,
    ("peft", "LoRA, OLoRA", "fp64"): _NO_FP64,
    ("peft", "LoRA, PiSSA", "fp64"): _NO_FP64,
    ("peft", "RandLora", "device"): _NAMED,
    ("peft", "RandLora", "fp64"): _NAMED,
    ("peft", "RandLora, sparse", "bf16"): _GENERATOR,
    ("peft", "VeRA", "bf16"): _GENERATOR,
}
