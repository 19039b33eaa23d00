"""The same kind of model in more and more parameters, in bf16, from an empty allocator cache."""

import peers
import pytest
from bench_creation import in_turns, record_way

from fastinit.cli import text
from fastinit.cli.models import DecoderConfig

SIZES = {"cuda": (1e7, 1e8, 3.5e8, 1.3e9, 3e9, 6.7e9, 13e9, 30e9), "cpu": (1e7, 1e8, 1.3e9)}
WAYS = ("fastinit", "torch", "fabric", "accelerate", "naive")
NAIVE_MOST = 4e8  # parameters: seconds each


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("size", SIZES["cuda"])
def test_growth(figure, once, device, quick, size, way):
    if size not in SIZES[device.type] or (way == "naive" and size > NAIVE_MOST):
        pytest.skip("too large")
    if device.type == "cpu" and way in ("fabric", "accelerate"):
        pytest.skip("on the main device alone")
    with figure(f"{text.count(size)}, {device}", way) as record:
        record_way(record, once(models_in_turns, size, device, quick)[way])


def models_in_turns(size, device, quick):
    build = peers.llama(DecoderConfig.of_size(int(size / 1000 if quick else size)), "torch.nn")
    ways = [way for way in WAYS if device.type == "cuda" or way not in ("fabric", "accelerate")]
    if size > NAIVE_MOST:
        ways.remove("naive")
    return in_turns(dict.fromkeys(ways, build), device, rounds=0 if quick else 3)
