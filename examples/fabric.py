"""Lightning Fabric: an unchanged script creates its model through fastinit, for one added line.

    python examples/fabric.py              # a small model, on whatever Fabric finds
    python examples/fabric.py --without    # the same script, before that line

With `fabric run --strategy fsdp --devices 2 ...` or any other strategy the line is the same.
"""

import time

import lightning
import torch
from common import config_of, learning_rate, parser
from torch.nn import functional

import fastinit.lightning
from fastinit.cli.models import Decoder

arguments = parser(__doc__)
arguments.add_argument("--without", action="store_true", help="leave the added line out")
arguments.add_argument("--precision", default="bf16-true", help="Fabric's; default: %(default)s")
arguments = arguments.parse_args()
config = config_of(arguments)

if not arguments.without:
    fastinit.lightning.enable()  # the added line

fabric = lightning.Fabric(devices=1, precision=arguments.precision)
fabric.launch()
fabric.seed_everything(0)
torch.zeros(1, device=fabric.device)  # a GPU's first use takes time of its own

started = time.perf_counter()
with fabric.init_module():
    model = Decoder(config)
if fabric.device.type == "cuda":
    torch.cuda.synchronize()
fabric.print(f"{config.parameters:,} parameters created on {fabric.device} in {time.perf_counter() - started:.3f} s")

model, optimizer = fabric.setup(model, torch.optim.AdamW(model.parameters(), lr=learning_rate(config)))

# Learn a few random tokens by heart.
tokens = fabric.to_device(torch.randint(config.vocabulary, (2, 33), generator=torch.Generator().manual_seed(0)))
losses = []
for step in range(5):
    logits = model(tokens[:, :-1])
    loss = functional.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten())
    fabric.backward(loss)
    optimizer.step()
    optimizer.zero_grad()
    losses.append(loss.item())
    fabric.print(f"step {step + 1}: loss {losses[-1]:.4f}", flush=True)
if not losses[-1] < losses[0] < float("inf"):
    raise RuntimeError(f"the loss did not fall: {losses}")
