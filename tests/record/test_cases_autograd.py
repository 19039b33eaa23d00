"""Autograd in a block: graphs, leaves and gradients are torch's own, whatever of it is still pending."""

import pytest
import torch
from cases import SOURCES, assert_as_torch, inside, operands, over_dtypes, over_sources
from models import DTYPES, built, plain, same_bits
from torch import nn
from torch.nn import functional as F

pytestmark = pytest.mark.filterwarnings("ignore")


def check_recorded(program, dtype, source):
    """Fail unless program(t) gives what torch gives in this dtype, from operands that are rounded to it."""
    shapes = []
    plain(lambda: program(lambda *shape: (shapes.append(shape), SOURCES["computed"](*shape))[1]), dtype)
    given = iter(operands(shapes, source))
    right = plain(lambda: program(lambda *shape: next(given).to(DTYPES[dtype])), dtype)
    assert_as_torch(inside(lambda: program(SOURCES[source]), dtype), right, dtype)


def _backward(value, *leaves):
    value.float().sum().backward()
    return [value, *(leaf.grad for leaf in leaves)]


def _with_buffer(p):
    module = nn.Module()
    module.register_buffer("scaled", p * 2)
    return module.scaled


def _layer(weight):
    layer = nn.Linear(3, 2, bias=False)
    layer.weight = nn.Parameter(weight)
    return layer


def _double(parameter):
    parameter.grad.mul_(2)


PROGRAMS = {
    "a square": lambda t: (lambda p: _backward((p**2).sum(), p))(nn.Parameter(t(3))),
    "a buffer of a parameter": lambda t: _with_buffer(nn.Parameter(t(3))),
    "weight_norm": lambda t: nn.utils.weight_norm(_layer(t(2, 3))).weight,
    "parametrized weight_norm": lambda t: nn.utils.parametrizations.weight_norm(_layer(t(2, 3))).weight,
    "a layer": lambda t: (lambda w, x: (lambda m: _backward(m(x), m.weight))(_layer(w)))(t(2, 3), t(4, 3)),
    "a graph of two": lambda t: (lambda p, q: _backward(p * q + p, p, q))(nn.Parameter(t(3)), nn.Parameter(t(3))),
    "an operand without gradient": lambda t: (lambda p: _backward(p * t(3), p))(nn.Parameter(t(3))),
    "a view of a parameter": lambda t: (lambda p: _backward(p[1:].view(-1) * 2, p))(nn.Parameter(t(3, 2))),
    "a transposed parameter": lambda t: (lambda p: _backward(p.t() @ p, p))(nn.Parameter(t(3, 2))),
    "torch.autograd.grad": lambda t: (lambda p: torch.autograd.grad((p * p).sum(), p))(nn.Parameter(t(3))),
    "a second derivative": lambda t: (
        lambda p: torch.autograd.grad(torch.autograd.grad((p**3).sum(), p, create_graph=True)[0].sum(), p)
    )(nn.Parameter(t(3))),
    "detached": lambda t: (nn.Parameter(t(3)) * 2).detach(),
    "without gradient": lambda t: torch.no_grad()(lambda p: p * 2)(nn.Parameter(t(3))),
    "in inference": lambda t: torch.inference_mode()(lambda p: (p * 2).tolist() and 1)(nn.Parameter(t(3))),
    "a requires_grad_ result": lambda t: (lambda x: _backward(x * x, x))(t(3).requires_grad_()),
    "in place on a result": lambda t: (lambda p: _backward((p * 2).mul_(3).add_(1), p))(nn.Parameter(t(3))),
    "a cat of parameters": lambda t: (lambda p, q: _backward(torch.cat([p, q]), p, q))(
        nn.Parameter(t(3)), nn.Parameter(t(2))
    ),
    "a penalty of a list": lambda t: (lambda ps: _backward(sum((p * p).sum() for p in ps), *ps))(
        [nn.Parameter(t(3)), nn.Parameter(t(2))]
    ),
    "an embedding": lambda t: (lambda p: _backward(F.embedding(torch.tensor([1, 1]), p), p))(nn.Parameter(t(3, 2))),
    "expanded": lambda t: (lambda p: _backward(p.expand(2, 3) * 2, p))(nn.Parameter(t(3))),
    "converted": lambda t: (lambda p: _backward(p.double() * 2, p))(nn.Parameter(t(3))),
    "cloned": lambda t: nn.Parameter(t(3)).clone(),
    "a hook": lambda t: (lambda p: (p.register_hook(lambda g: g * 2), _backward(p * 3, p))[1])(nn.Parameter(t(3))),
    "a hook after accumulation": lambda t: (
        lambda p: (p.register_post_accumulate_grad_hook(_double), _backward(p * 3, p))[1]
    )(nn.Parameter(t(3))),
    "a retained gradient": lambda t: (lambda y: (y.retain_grad(), _backward(y * 2, y))[1])(nn.Parameter(t(3)) * 1),
}


@pytest.mark.parametrize("name", PROGRAMS)
@over_dtypes
@over_sources
def test_a_graph_is_the_one_that_torch_records(name, dtype, source):
    check_recorded(PROGRAMS[name], dtype, source)


STEPS = {
    "narrow": lambda x: x.narrow(0, 0, 3),
    "view_as": lambda x: x.view_as(x),
    "in two steps": lambda x: x.unsqueeze(0)[0],
    "chunk": lambda x: x.chunk(2)[1],
    "as_strided": lambda x: x.as_strided((3,), (1,), 0),
    "product": lambda x: x * 2,
}


def _derivatives(p, first, second, hooks):
    view = first(p)
    last = second(view)
    if hooks:
        view.register_hook(lambda gradient: gradient * 3)
        last.retain_grad()
    y = (last * last * last).sum()
    gradients = torch.autograd.grad(y, [view, last, p], create_graph=True)
    again = [torch.autograd.grad(each.sum(), view, retain_graph=True)[0] for each in (gradients[0], gradients[2])]
    return [*gradients, *again, *_backward(y, p), *([last.grad] if hooks else [])]


@pytest.mark.parametrize("hooks", [False, True], ids=["plain", "hooks"])
@pytest.mark.parametrize("second", STEPS)
@pytest.mark.parametrize("first", STEPS)
def test_a_view_of_a_view_is_differentiated_by_every_step(first, second, hooks):
    def run(t):
        return _derivatives(nn.Parameter(t(12)), STEPS[first], STEPS[second], hooks)

    check_recorded(run, "fp32", "random")


def test_views_of_a_result_in_half_precision_are_differentiated_by_it():
    def run(t):
        made = nn.Parameter(t(12)) * 2
        return _derivatives(made, STEPS["narrow"], STEPS["view_as"], hooks=False)[:5]

    check_recorded(run, "bf16", "random")


LEAVES = {
    "tensor": lambda kind: torch.tensor([-2.0, 2.0], dtype=kind, requires_grad=True),
    "full": lambda kind: torch.full((2,), 3.0, dtype=kind, requires_grad=True),
    "ones": lambda kind: torch.ones(2, dtype=kind, requires_grad=True),
    "converted": lambda kind: torch.ones(2).to(kind or torch.get_default_dtype()).requires_grad_(),
    "computed": lambda kind: (torch.arange(1, 3, dtype=kind) / 4 + torch.zeros(2, dtype=kind)).requires_grad_(),
    "Parameter": lambda kind: nn.Parameter(torch.ones(2, dtype=kind)),
    "thawed": lambda kind: nn.Parameter(torch.full((2,), 3.0, dtype=kind), requires_grad=False).requires_grad_(True),
    "like": lambda kind: torch.ones_like(torch.empty(2, dtype=kind), requires_grad=True),
    "copied": lambda kind: torch.empty(2, dtype=kind).copy_(torch.tensor([1.0, 2.0])).requires_grad_(),
}
FUNCTIONS = {
    "leaky_relu": F.leaky_relu,
    "mul": lambda w: w * 2,
    "product": lambda w: w * w,
    "sin": torch.sin,
    "sum": lambda w: w.sum(),
    "outer": lambda w: torch.outer(w, w),
    "index": lambda w: w[1],
    "cat": lambda w: torch.cat([w, w]),
    "softmax": lambda w: F.softmax(w, 0),
    "float": lambda w: w.float() * 2,
    "where": lambda w: torch.where(w > 0, w, -w),
    "stack": lambda w: torch.stack([w, w * 2]).sum(0),
    "linear": lambda w: F.linear(w.view(1, 2), torch.ones(3, 2, dtype=w.dtype)),
    "type_as": lambda w: torch.ones(2).type_as(w) * w,
    "iteration": lambda w: sum(w),
}


@pytest.mark.parametrize("kind", [None, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("leaf", LEAVES)
@over_dtypes
def test_a_leaf_that_functions_use_gets_its_gradient(leaf, kind, dtype):
    def run():
        made = {name: LEAVES[leaf](kind) for name in FUNCTIONS}
        return {name: _backward(function(made[name]), made[name]) for name, function in FUNCTIONS.items()}

    assert_as_torch(inside(run, dtype), plain(run, dtype), "bf16" if kind else dtype)


class Penalized(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.w = nn.Parameter(torch.full((2,), 3.0, dtype=kind))
        self.head = nn.Parameter(torch.ones(2, dtype=torch.float32))

    def penalty(self):
        return (self.w * self.w).sum().float() + (self.head * 2).sum()


@pytest.mark.parametrize("kind", [None, torch.bfloat16], ids=str)
@over_dtypes
def test_a_penalty_reaches_weights_of_every_precision(kind, dtype):
    def run():
        model = Penalized(kind)
        model.penalty().backward()
        return model.w.grad, model.head.grad

    assert_as_torch(inside(run, dtype), plain(run, dtype), dtype)


def test_what_becomes_part_of_a_graph_has_the_node_that_torch_gives_it():
    def run():
        p, x, y = nn.Parameter(torch.ones(3)), torch.rand(3), torch.rand(3)
        x.mul_(p)
        made, _ = AddsInPlace.apply(y, p)
        return x.grad_fn.name(), made.grad_fn.name(), made is y

    assert inside(run, "fp32") == plain(run, "fp32") == ("MulBackward0", "AddsInPlaceBackward", True)


# Functions of autograd ------------------------------------------------------------------------------------------------


class AddsInPlace(torch.autograd.function.InplaceFunction):
    @staticmethod
    def forward(ctx, a, b):
        ctx.mark_dirty(a)
        return a.add_(b), b + 2

    @staticmethod
    def backward(ctx, g, h):
        return g, g + h


class SavesItsInput(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * 0.5

    @staticmethod
    def backward(ctx, g):
        return g * ctx.saved_tensors[0]


class SavesAConstant(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(torch.full_like(x, 4.0))
        return x.sin()

    @staticmethod
    def backward(ctx, g):
        return g * ctx.saved_tensors[0]


class SavesItsOutput(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        y = torch.full_like(x, 0.25)
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx, g):
        return g * ctx.saved_tensors[0]


class Straight(torch.autograd.Function):
    """Keeps a tensor as an attribute, in the newer style."""

    @staticmethod
    def forward(x, scale):
        return torch.ones_like(x) * scale, torch.zeros(2)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.kept = inputs[1] + torch.ones(2)
        ctx.mark_non_differentiable(output[1])

    @staticmethod
    def backward(ctx, g, _):
        return g * ctx.kept, None


class InPlace(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.mark_dirty(x)
        return x.fill_(2.0)

    @staticmethod
    def backward(ctx, g):
        return torch.full_like(g, 3.0)


OPERATIONS = {
    "saves its input": SavesItsInput.apply,
    "saves a constant": SavesAConstant.apply,
    "saves its output": SavesItsOutput.apply,
    "keeps a tensor": lambda x: Straight.apply(x, torch.full((2,), 2.0))[0],
    "writes in place": lambda x: InPlace.apply(x * 1),
    "both": lambda x: SavesItsInput.apply(x) + SavesAConstant.apply(x),
    "one of the other": lambda x: SavesAConstant.apply(SavesItsInput.apply(x)),
}


@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize("leaf", ["full", "Parameter", "computed", "tensor"])
@over_dtypes
def test_a_function_of_autograd_saves_written_tensors(name, leaf, dtype):
    def run():
        x = LEAVES[leaf](None)
        return _backward(OPERATIONS[name](x), x)

    def later():
        x = LEAVES[leaf](None)
        return x, OPERATIONS[name](x)

    right = plain(run, dtype)
    assert_as_torch(inside(run, dtype), right, dtype)
    x, y = inside(later, dtype)
    assert_as_torch(_backward(y, x), right, dtype)


@over_dtypes
def test_a_model_of_such_functions_is_trained_in_the_block(dtype):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.ones(2))

        def forward(self):
            return SavesAConstant.apply(self.w) + SavesItsInput.apply(self.w)

    def train():
        model = Model()
        model().sum().backward()
        return model.w.grad

    assert_as_torch(inside(train, dtype), plain(train, dtype), dtype)


@over_dtypes
def test_a_buffer_with_a_graph_is_written_to_again_after_it_became_real(dtype):
    def train():
        weight, output = nn.Parameter(torch.ones(2)), torch.zeros(4)
        output.index_copy_(0, torch.tensor([0, 1]), weight * 2)
        assert output.data_ptr()
        output.index_copy_(0, torch.tensor([2, 3]), weight * 3)
        output += output.detach().sum()
        output.pow(2).sum().backward()
        return output, weight.grad

    assert_as_torch(inside(train, dtype), plain(train, dtype), dtype)


# Gradients that are assigned ------------------------------------------------------------------------------------------

GRADIENTS = {
    "zeros": lambda p: torch.zeros(2),
    "zeros_like": lambda p: torch.zeros_like(p),
    "full": lambda p: torch.full((2,), 0.5),
    "empty, zeroed": lambda p: torch.empty_like(p).zero_(),
    "computed": lambda p: torch.arange(2) / 4 + torch.zeros(2),
    "none": lambda p: None,
}


@pytest.mark.parametrize("name", GRADIENTS)
@over_dtypes
def test_a_gradient_may_be_assigned_before_it_has_memory(name, dtype):
    def assign():
        p = nn.Parameter(torch.full((2,), 3.0))
        p.grad = GRADIENTS[name](p)
        return p

    def run():
        p = assign()
        return _backward(p * p, p)

    right = plain(run, dtype)
    assert_as_torch(inside(run, dtype), right, dtype)
    p = inside(assign, dtype)
    if p.grad is not None:
        assert type(p.grad) is torch.Tensor and p.grad.stride() == (1,)
    assert_as_torch(_backward(p * p, p), right, dtype)


@over_dtypes
def test_gradients_of_a_model_that_are_assigned_are_accumulated_after_the_block(dtype):
    def construct():
        layer = nn.Linear(2, 1)
        for p in layer.parameters():
            p.grad = torch.zeros_like(p)
        return layer

    layer = inside(construct, dtype)
    layer(torch.ones(1, 2, dtype=DTYPES[dtype])).sum().backward()
    assert layer.weight.grad.tolist() == [[1.0, 1.0]] and layer.weight.grad.stride() == (2, 1)
    assert same_bits(layer.weight.detach(), inside(lambda: nn.Linear(2, 1), dtype).weight.detach())


# Views that outlive the block -----------------------------------------------------------------------------------------


class Views(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4, 4))
        self.rows, self.turned = self.weight[:2], self.weight.t()
        self.row = self.rows[0]
        self.parts = self.weight.chunk(2)
        with torch.no_grad():
            self.quiet = self.weight[2:]
        self.register_buffer("table", torch.zeros(4))
        self.rest = self.table[1:]
        other = torch.ones(4)
        self.left = other[1:]
        other.data = torch.zeros(4)
        self.other = other


def _facts(model):
    views = {name: getattr(model, name) for name in ("rows", "turned", "row", "quiet", "rest", "left")}
    views |= {f"parts{number}": part for number, part in enumerate(model.parts)}
    bases = {id(tensor): name for name, tensor in (("weight", model.weight), ("table", model.table))}
    for name, view in views.items():
        assert not vars(view), name
        yield name, bases.get(id(view._base)), view.requires_grad, view.is_leaf, view.grad_fn is None, view.tolist()
    (model.rows.sum() + 2 * model.turned.sum() + model.row.sum() + 3 * model.parts[1].sum()).backward()
    yield model.weight.grad.tolist()
    model.table.add_(1)
    with torch.no_grad():
        model.weight.mul_(2)
    for name in ("rest", "rows", "turned"):
        yield name, views[name]._version, views[name].tolist()
    with pytest.raises(RuntimeError, match="a view of a leaf Variable that requires grad"):
        model.rows.add_(1)
    with pytest.raises(RuntimeError, match="A view was created in no_grad mode"):
        model.quiet.add_(1)


@over_dtypes
def test_views_that_a_module_keeps_are_torchs_views_of_its_tensors(dtype):
    assert list(_facts(built(Views, dtype))) == list(_facts(plain(Views, dtype)))


@pytest.mark.parametrize("name", ["div_", "__add__", "mul"])
def test_a_method_whose_argument_makes_its_tensor_real_goes_on_with_that(name):
    weight = inside(
        lambda: (lambda weight: getattr(weight, name)(weight.numpy().sum().item()))(torch.ones(3, 4)), "fp32"
    )
    assert torch.equal(weight, getattr(torch.ones(3, 4), name)(12.0))


@pytest.mark.parametrize("quietly", [False, True])
def test_a_model_is_run_under_autocast_in_the_block_and_after_it(quietly):
    def run():
        layer = nn.Linear(3, 2)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            if quietly:
                with torch.no_grad():
                    layer(torch.ones(1, 3))
            inside = layer(torch.ones(1, 3))
        if inside.requires_grad:
            inside.float().sum().backward()
        return layer, inside

    layer, result = built(run, "fp32")
    assert result.dtype == torch.bfloat16 and type(layer.weight) is nn.Parameter
    assert result.requires_grad == plain(run, "fp32")[1].requires_grad  # torch 2.6 remembers what it cast quietly
    if result.requires_grad:
        assert layer.weight.grad.tolist() == [[1.0] * 3] * 2
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(layer(torch.ones(1, 3)), result)


class _Doubles(nn.Module):
    def forward(self, x):
        return x * 2


@over_dtypes
def test_backward_hooks_of_a_module_that_is_called_with_pending_tensors_see_its_gradients(dtype):
    def run():
        seen, module, p = [], _Doubles(), nn.Parameter(torch.full((3,), 0.5))
        module.register_full_backward_hook(lambda _, inputs, outputs: seen.extend((*inputs, *outputs)))
        module.register_full_backward_pre_hook(lambda _, outputs: seen.extend(outputs))
        module(module(p * 3)).sum().backward()
        return [*seen, p.grad]

    assert_as_torch(inside(run, dtype), plain(run, dtype), dtype)


@pytest.mark.parametrize("optimizer", [torch.optim.Adam, torch.optim.SGD, torch.optim.Adagrad])
@pytest.mark.parametrize("foreach", [False, True], ids=["one by one", "lists"])
@over_dtypes
def test_an_optimizer_steps_in_the_block_as_it_does_in_torch(optimizer, foreach, dtype):
    def run():
        parameters = [nn.Parameter(torch.full(shape, 0.5)) for shape in ((2, 3), (4,))]
        steps = optimizer(parameters, lr=0.25, foreach=foreach)
        for _ in range(2):
            steps.zero_grad()
            sum((p * p).sum() for p in parameters).backward()
            steps.step()
        return parameters

    for ours, theirs in zip(inside(run, dtype), plain(run, dtype), strict=True):
        torch.testing.assert_close(ours, theirs)
