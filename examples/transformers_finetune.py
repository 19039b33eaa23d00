"""Transformers: fine-tuning of a pretrained model with a new head, its model loaded under fastinit.

    python examples/transformers_finetune.py              # a small model, on a GPU if there is one
    python examples/transformers_finetune.py --without    # the same script, before that line

What the checkpoint supplies is not initialized; the new head, which it lacks, is, as the library initializes it.
"""

import tempfile
import time
from contextlib import nullcontext

import torch
from common import config_of, learning_rate, parser

import fastinit

arguments = parser(__doc__)
arguments.add_argument("--without", action="store_true", help="load the model as it is done without fastinit")
arguments = arguments.parse_args()
size = config_of(arguments)

from transformers import (  # noqa: E402  (takes seconds, which --help need not)
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    Trainer,
    TrainingArguments,
    set_seed,
)

device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
config = LlamaConfig(
    vocab_size=size.vocabulary,
    hidden_size=size.width,
    intermediate_size=size.hidden,
    num_hidden_layers=size.layers,
    num_attention_heads=size.heads,
    num_key_value_heads=size.heads,
    num_labels=3,
    pad_token_id=0,
)
set_seed(0)
torch.zeros(1, device=device)  # a GPU's first use takes time of its own


def context():
    """The one line: around whatever creates or loads a model."""
    return nullcontext() if arguments.without else fastinit.on(device, "bf16")


def announce(what: str, model: torch.nn.Module, started: float) -> None:
    model.to(device)  # where it already is, unless --without
    if device.type == "cuda":
        torch.cuda.synchronize()
    seconds = time.perf_counter() - started
    print(f"{model.num_parameters():,} parameters {what} on {model.device} in {seconds:.3f} s", flush=True)


with tempfile.TemporaryDirectory() as folder:
    # A stand-in for a checkpoint that somebody has pretrained.
    started = time.perf_counter()
    with context():
        pretrained = LlamaForCausalLM._from_config(config, dtype=torch.bfloat16)
    announce("created", pretrained, started)
    pretrained.save_pretrained(folder)
    del pretrained

    started = time.perf_counter()
    with context():
        model = LlamaForSequenceClassification.from_pretrained(folder, num_labels=3, dtype=torch.bfloat16)
    announce("loaded", model, started)

    # Learn the labels of a few random texts by heart.
    generator = torch.Generator().manual_seed(0)
    texts = torch.randint(1, size.vocabulary, (4, 16), generator=generator)
    data = [{"input_ids": text, "labels": index % 3} for index, text in enumerate(texts)]
    trainer = Trainer(
        model,
        TrainingArguments(
            output_dir=folder,
            max_steps=5,
            per_device_train_batch_size=4,
            learning_rate=learning_rate(size),
            lr_scheduler_type="constant",
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=device.type == "cpu",
        ),
        train_dataset=data,
    )
    trainer.train()

losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
for step, loss in enumerate(losses):
    print(f"step {step + 1}: loss {loss:.4f}", flush=True)
if not losses[-1] < losses[0] < float("inf"):
    raise RuntimeError(f"the loss did not fall: {losses}")
