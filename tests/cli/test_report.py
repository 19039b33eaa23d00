"""What a report says of each tensor: what has written it, what that replaced, and what is worth a look."""

import json
import math
import os
import subprocess
import sys

import pytest
import torch
from torch import nn

import fastinit
from fastinit import Constant, FillReport, Normal, TruncatedNormal, Uniform


def written(report, name):
    (tensor,) = [each for each in report.tensors if each.name == name]
    return tensor


@pytest.mark.parametrize("options", [{}, {"empty": True}, {"shard": True}], ids=str)
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_each_tensor_has_its_name_shape_dtype_and_fills(dtype, options):
    with fastinit.on("cpu", dtype, seed=0, **options) as report:
        model = nn.Sequential(nn.Linear(4, 2), nn.Embedding(3, 4, padding_idx=0), nn.LayerNorm(4))
    assert [each.name for each in report.tensors] == [name for name, _ in model.named_parameters()]
    assert [each.shape for each in report.tensors] == [tuple(each.shape) for each in model.parameters()]
    assert {each.dtype for each in report.tensors} == {model[0].weight.dtype}
    weight, bias, embedding, scale, _ = report.tensors
    assert isinstance(weight.writes[0].distribution, Uniform) and weight.std == pytest.approx(1 / math.sqrt(12))
    assert (weight.source, weight.module, weight.writes[0].stream, bias.writes[0].stream) == ("random", nn.Linear, 0, 1)
    assert embedding.writes == (FillReport(Normal(0.0, 1.0), stream=2), FillReport(Constant(0.0), elements=4))
    assert (scale.source, scale.writes) == ("constant", (FillReport(Constant(1.0)),))
    assert all(each.replaced == () and each.is_parameter for each in report.tensors)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_what_is_overwritten_is_named_in_its_order(dtype):
    with fastinit.on("cpu", dtype, seed=0) as report:
        model = nn.Linear(2, 2)
        nn.init.normal_(model.weight, 0.0, 0.1)
        nn.init.trunc_normal_(model.weight, 0.0, 0.2)
    weight = written(report, "weight")
    assert weight.writes == (FillReport(TruncatedNormal(0.0, 0.2, -2.0, 2.0), stream=3),)
    first, second = weight.replaced
    assert isinstance(first.distribution, Uniform) and second == FillReport(Normal(0.0, 0.1), stream=2)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_steps_and_seeds_of_the_code_are_told(dtype):
    with fastinit.on("cpu", dtype, seed=0) as report, torch.no_grad():
        model = nn.Linear(2, 2)
        model.weight.normal_().mul_(0.5).clamp_(-1, 1)
        torch.manual_seed(7)
        model.bias.normal_()
    weight, bias = report.tensors
    assert weight.writes[0].steps == (("*", 0.5), ("clamp", -1.0, 1.0))
    assert str(weight.writes[0]) == "Normal(0, 1) * 0.5 clamp -1 1" and weight.std is None
    assert weight.writes[0].seed is None and bias.writes[0].seed is not None


def test_reading_changes_nothing_and_computing_says_so():
    outside = torch.ones(2)
    with fastinit.on("cpu", "bf16", seed=0) as report, torch.no_grad():
        model = nn.Module()
        model.read = nn.Parameter(torch.empty(3).uniform_())
        model.norm = nn.Parameter(model.read.norm())
        model.doubled = nn.Parameter(torch.empty(3).uniform_())
        model.doubled.sin_()
        model.register_buffer("table", torch.arange(3) / 2)
        model.copied = nn.Parameter(torch.empty(2))
        model.copied.copy_(outside)
    sources = {each.name: each.source for each in report.tensors}
    assert sources == {
        "read": "random",
        "norm": "computed",
        "doubled": "computed",
        "table": "computed",
        "copied": "copied",
    }
    assert isinstance(written(report, "doubled").writes[0].distribution, Uniform)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_what_becomes_real_in_the_block_is_remembered(dtype):
    with fastinit.on("cpu", dtype, seed=0) as report:
        model = nn.Module()
        model.first = nn.Linear(2, 2)
        assert model.first.weight.data_ptr()  # real from here on
        nn.init.normal_(model.first.weight)
        model.second = nn.Linear(2, 2)
        model.second.weight.data_ptr()
        with fastinit.on("cpu", "fp32"):  # all that is pending becomes real
            model.inner = nn.Linear(3, 3)
        with torch.no_grad():
            model.second.weight.sin_()
    first, second, inner = (written(report, f"{name}.weight") for name in ("first", "second", "inner"))
    assert isinstance(first.replaced[0].distribution, Uniform) and first.writes[0].distribution == Normal(0.0, 1.0)
    assert isinstance(second.writes[0].distribution, Uniform) and second.source == "computed"
    assert isinstance(inner.writes[0].distribution, Uniform) and inner.dtype is torch.float32
    assert isinstance(written(report, "first.bias").writes[0].distribution, Uniform)


def test_tied_tensors_are_listed_once_and_under_the_names_of_the_whole_model():
    with fastinit.on("cpu", seed=0) as report:
        model = nn.Sequential(nn.Embedding(4, 4), nn.Sequential(nn.Linear(4, 4, bias=False)))
        model[1][0].weight = model[0].weight
        model = nn.ModuleDict({"body": model})
    assert [each.name for each in report.tensors] == ["body.0.weight"]


def test_a_checkpoint_that_is_loaded_and_then_overwritten_is_found(tmp_path):
    torch.save(nn.Linear(2, 2).state_dict(), tmp_path / "linear.pt")
    with fastinit.on("cpu", "bf16", seed=0) as report:
        model = nn.Linear(2, 2)
        model.load_state_dict(torch.load(tmp_path / "linear.pt"))
        nn.init.zeros_(model.bias)
    weight, bias = report.tensors
    assert weight.source == "copied" and isinstance(weight.replaced[0].distribution, Uniform)
    assert bias.source == "constant"
    assert report.findings == ["copied from another tensor, a checkpoint's say, and then overwritten: bias"]


@pytest.mark.filterwarnings("ignore:fastinit")
def test_findings_name_what_is_never_initialized_done_twice_or_out_of_scale():
    with fastinit.on("cpu", seed=0) as report:
        layers = nn.ModuleList(nn.Linear(1024, 1024, bias=False) for _ in range(2))
        for each in layers:
            nn.init.normal_(each.weight)
        model = nn.Module()
        model.layers, model.raw = layers, nn.Parameter(torch.empty(2, 2))
        model.usual, model.words = nn.Linear(1024, 8), nn.Embedding(9, 1024)
    assert report.findings == [
        "never initialized: raw",
        "initialized twice, differently (Uniform, then Normal): layers.*.weight",
        "standard deviation 1, where fan-in and fan-out scaling give 0.0312 and 0.0312: layers.*.weight",
    ]


@pytest.mark.parametrize(
    "distribution",
    [Uniform(-1.0, 3.0), Normal(1.0, 0.3), TruncatedNormal(0.0, 1.0, -0.5, 2.0), TruncatedNormal(1.0, 2.0, 2.0, 9e9)],
    ids=str,
)
def test_expected_standard_deviations_are_those_of_samples(distribution):
    sampled = fastinit.fill_(torch.empty(1 << 20), distribution, seed=0).double().std().item()
    assert FillReport(distribution).std == pytest.approx(sampled, rel=3e-3)
    assert FillReport(distribution, (("*", -3.0), ("+", 1.0), ("/", 2.0))).std == pytest.approx(1.5 * sampled, rel=3e-3)


@pytest.mark.parametrize("rich", [True, False])
def test_the_table_has_a_row_for_each_kind_of_layer(rich, monkeypatch):
    if rich:
        pytest.importorskip("rich")
    else:
        monkeypatch.setitem(sys.modules, "rich.console", None)
    with fastinit.on("cpu", "bf16", seed=0) as report:
        model = nn.Sequential(nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16)), nn.LayerNorm(16))
        nn.init.normal_(model[0][1].weight, std=0.02)
    lines = [line.split() for line in report.table().splitlines()]
    assert lines[0] == ["tensor", "shape", "dtype", "written", "by", "replaced"]
    assert ["2", "x", "*.*.bias", "(16,)", "bfloat16", "Uniform(-0.25,", "0.25)"] in lines
    assert "*.*.weight (16, 16) bfloat16 Normal(0, 0.02) Uniform(-0.25, 0.25)".split() in lines
    assert lines[-1][:3] == ["-", "initialized", "twice,"]


def test_json_has_all_of_it():
    with fastinit.on("cpu", "bf16", seed=3) as report:
        model = nn.Linear(4, 4)
        nn.init.trunc_normal_(model.weight, a=-math.inf)
    told = json.loads(report.to_json(), parse_constant=pytest.fail)
    assert (told["device"], told["dtype"], told["seed"], told["parameters"]) == ("cpu", "bfloat16", 3, 20)
    weight, bias = told["tensors"]
    assert weight["name"] == "weight" and weight["shape"] == [4, 4] and weight["source"] == "random"
    assert weight["writes"][0]["parameters"] == [0.0, 1.0, "-inf", 2.0] and weight["writes"][0]["stream"] == 2
    assert bias["replaced"] == [] and told["findings"] == report.findings


def test_a_report_keeps_no_model_and_no_weak_references_to_tensors():
    with fastinit.on("cpu", seed=0) as report:
        model = nn.Linear(2, 2)
    torch.utils.swap_tensors(model.weight, nn.Parameter(torch.zeros(2, 2)))  # refuses what has weak references
    assert len(report.tensors) == 2
    del model
    assert report.tensors == []


def test_the_way_without_native_methods_tells_the_same():
    program = (
        "import torch, fastinit\n"
        "from fastinit.cli.models import Decoder, DecoderConfig\n"
        "with fastinit.on('cpu', 'bf16', seed=0) as report:\n"
        "    model = Decoder(DecoderConfig.of_size(100_000))\n"
        "    torch.nn.init.normal_(model.head.weight); torch.nn.init.zeros_(model.head.weight)\n"
        "for each in report.tensors: print(each)\n"
    )
    fast, slow = (
        subprocess.run(
            [sys.executable, "-c", program],
            env={**os.environ, "FASTINIT_FAST": flag},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for flag in ("1", "0")
    )
    assert fast == slow and "Normal" in fast


def test_a_loop_of_fills_is_not_remembered_without_end():
    with fastinit.on("cpu", seed=0) as report:
        model = nn.Linear(64, 64)
        for row in range(64):
            nn.init.normal_(model.weight[row], std=row + 1.0)
        for _ in range(1000):
            nn.init.normal_(model.bias)
    weight, bias = report.tensors
    assert len(weight.writes) <= 18 and weight.source == "computed"
    assert len(bias.replaced) <= 16


def test_parameters_of_lazy_modules_are_not_told_of_before_they_have_a_shape():
    with fastinit.on("cpu", "bf16", seed=0) as report:
        model = nn.Sequential(nn.Linear(4, 4), nn.LazyLinear(3))
    assert [each.name for each in report.tensors] == ["0.weight", "0.bias"]
    assert report.parameters == 20 and isinstance(model[1], nn.LazyLinear)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_block_around_a_block_reports_what_that_one_has_drawn(dtype):
    with fastinit.on("cpu", dtype, seed=0) as report:
        with fastinit.on("cpu", dtype, seed=1) as inner:
            model = nn.Sequential(nn.Linear(2, 2), nn.Embedding(4, 2, padding_idx=0))
        model = nn.Sequential(model)
    assert [each.source for each in report.tensors] == [each.source for each in inner.tensors] == ["random"] * 3
    assert [each.writes for each in report.tensors] == [each.writes for each in inner.tensors]
