"""Lightning: an unchanged script creates its model through fastinit, for one added line.

    python examples/lightning_trainer.py              # a small model, on whatever Lightning finds
    python examples/lightning_trainer.py --without    # the same script, before that line

`trainer.init_module` comes in both of its forms: a new model, and one that a checkpoint fills.
"""

import tempfile
import time
from pathlib import Path

import lightning
import torch
from common import config_of, learning_rate, parser
from torch.nn import functional
from torch.utils.data import DataLoader

import fastinit.lightning
from fastinit.cli.models import Decoder, DecoderConfig

arguments = parser(__doc__)
arguments.add_argument("--without", action="store_true", help="leave the added line out")
arguments.add_argument("--precision", default="bf16-true", help="Lightning's; default: %(default)s")
arguments = arguments.parse_args()
config = config_of(arguments)

if not arguments.without:
    fastinit.lightning.enable()  # the added line


class Learner(lightning.LightningModule):
    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.model = Decoder(config)

    def training_step(self, tokens: torch.Tensor) -> torch.Tensor:
        logits = self.model(tokens[:, :-1])
        loss = functional.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten())
        print(f"step {self.global_step + 1}: loss {loss.item():.4f}", flush=True)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=learning_rate(config))


lightning.seed_everything(0)
trainer = lightning.Trainer(
    devices=1,
    precision=arguments.precision,
    max_steps=5,
    logger=False,
    enable_checkpointing=False,
    enable_model_summary=False,
    enable_progress_bar=False,
)


def announce(what: str, started: float) -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    print(f"{config.parameters:,} parameters {what} in {time.perf_counter() - started:.3f} s", flush=True)


torch.zeros(1, device=trainer.strategy.root_device)  # a GPU's first use takes time of its own
started = time.perf_counter()
with trainer.init_module():
    learner = Learner(config)
announce("created", started)

tokens = torch.randint(config.vocabulary, (2, 33), generator=torch.Generator().manual_seed(0))
trainer.fit(learner, DataLoader([*tokens] * 5, batch_size=2))  # a few random tokens, by heart

with tempfile.TemporaryDirectory() as folder:
    path = Path(folder) / "weights.ckpt"
    trainer.save_checkpoint(path, weights_only=True)

    started = time.perf_counter()
    with trainer.init_module(empty_init=True):
        loaded = Learner.load_from_checkpoint(path, config=config)
    announce("created from a checkpoint", started)

for one, other in zip(loaded.parameters(), learner.parameters(), strict=True):
    assert torch.equal(one.cpu(), other.cpu())
