"""It computes what torch's attention does, calls its output projection, and may have lost heads."""

import copy
import pickle

import pytest
import torch
from torch import nn

from pyro_bmrs.structures.attention import HeadwiseAttention

OPTIONS = {
    "plain": {},
    "no bias": {"bias": False},
    "learned key": {"add_bias_kv": True},
    "zero key": {"add_zero_attn": True},
    "both keys": {"add_bias_kv": True, "add_zero_attn": True},
    "other widths": {"kdim": 5, "vdim": 7},
}
MASKS = ("none", "bool", "float", "per head", "padding", "causal", "both")


def inputs(kdim=8, vdim=8, batched=True, batch_first=True):
    torch.manual_seed(1)
    tensors = [torch.randn(3, n, d, dtype=torch.float64) for n, d in ((4, 8), (6, kdim), (6, vdim))]
    if not batched:
        return [each[0] for each in tensors]
    return tensors if batch_first else [each.transpose(0, 1) for each in tensors]


def mask_arguments(kind):
    square = torch.rand(4, 6) < 0.3
    square[:, 0] = False
    padding = torch.tensor([[False] * 6, [False] * 4 + [True] * 2, [False] * 5 + [True]])
    return {
        "none": {},
        "bool": {"attn_mask": square},
        "float": {"attn_mask": torch.randn(4, 6, dtype=torch.float64)},
        "per head": {"attn_mask": torch.randn(6, 4, 6, dtype=torch.float64)},
        "padding": {"key_padding_mask": padding},
        "causal": {"attn_mask": torch.ones(4, 6).triu(1).bool(), "is_causal": True},
        "both": {"attn_mask": square, "key_padding_mask": padding},
    }[kind]


def prune_first_head(attention, head_dim=4):
    """Take the first of two heads out, by hand."""

    def without(tensor, parts, dim=0):
        return torch.cat([part.narrow(dim, head_dim, head_dim) for part in tensor.detach().chunk(parts, dim)], dim)

    for name, parameter in attention.named_parameters(recurse=False):
        parts, dim = (3 if name.startswith("in_proj") else 1), (2 if name in ("bias_k", "bias_v") else 0)
        parameter.data = without(parameter, parts, dim)
    attention.out_proj.weight.data = without(attention.out_proj.weight, 1, 1)
    attention.num_heads = 1


def pair(**options):
    torch.manual_seed(0)
    theirs = nn.MultiheadAttention(8, 2, **options).double()
    for parameter in theirs.parameters():
        nn.init.normal_(parameter)
    ours = copy.deepcopy(theirs)
    HeadwiseAttention.adopt(ours)
    return ours, theirs


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("need_weights", [True, False])
def test_it_computes_the_same(options, kind, need_weights):
    ours, theirs = pair(**OPTIONS[options], batch_first=True)
    tensors = inputs(**({"kdim": 5, "vdim": 7} if options == "other widths" else {}))
    arguments = {"need_weights": need_weights, **mask_arguments(kind)}
    for found, expected in zip(ours(*tensors, **arguments), theirs(*tensors, **arguments), strict=True):
        assert (found is None) == (expected is None)
        if found is not None:
            torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("batched", [True, False])
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("average", [True, False])
def test_shapes_and_gradients_are_the_same(batched, batch_first, average):
    ours, theirs = pair(batch_first=batch_first)
    tensors = inputs(batched=batched, batch_first=batch_first)
    results = [net(*tensors, average_attn_weights=average) for net in (ours, theirs)]
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    for result in results:
        (result[0].sin().sum() + result[1].sum()).backward()
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, other.grad, rtol=1e-10, atol=1e-12)


def test_self_attention_is_the_same():
    ours, theirs = pair(batch_first=True)
    x = inputs()[0]
    torch.testing.assert_close(ours(x, x, x)[0], theirs(x, x, x)[0], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("kind", ["none", "bool", "causal", "padding"])
def test_self_attention_is_the_same_as_the_fast_path(training, need_weights, kind):
    ours, theirs = (net.train(training) for net in pair(batch_first=True))
    x = torch.randn(3, 6, 8, dtype=torch.float64)
    arguments = {"need_weights": need_weights, **mask_arguments(kind)}
    if "attn_mask" in arguments:
        arguments["attn_mask"] = torch.ones(6, 6).triu(1).bool()
    with torch.no_grad():
        for found, expected in zip(ours(x, x, x, **arguments), theirs(x, x, x, **arguments), strict=True):
            assert (found is None) == (expected is None)
            if found is not None:
                torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("need_weights", [True, False])
def test_fewer_heads_are_those_whose_outputs_count_for_nothing(options, need_weights):
    ours, theirs = pair(**OPTIONS[options], batch_first=True)
    tensors = inputs(**({"kdim": 5, "vdim": 7} if options == "other widths" else {}))
    with torch.no_grad():
        theirs.out_proj.weight[:, :4] = 0
        prune_first_head(ours)
        arguments = {"need_weights": need_weights, "average_attn_weights": False}
        (found, weights), (expected, all_weights) = (net(*tensors, **arguments) for net in (ours, theirs))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    if need_weights:
        torch.testing.assert_close(weights, all_weights[:, 1:], rtol=1e-12, atol=1e-12)
    assert "num_heads=1, head_dim=4" in repr(ours)
    assert not ours.is_whole
    with pytest.raises(ValueError, match="1 heads of 4 are left of a width of 8"):
        ours.release()
    for again in (pickle.loads(pickle.dumps(ours)), copy.deepcopy(ours)):
        torch.testing.assert_close(again(*tensors)[0], found)


@pytest.mark.parametrize("stack", [False, True])
def test_an_encoder_layer_runs_the_output_projection_even_without_gradients(stack):
    net = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    layer = net
    if stack:
        net = nn.TransformerEncoder(layer, 2)
        layer = net.layers[0]
    net = net.eval()
    x = torch.randn(2, 3, 8)
    with torch.no_grad():
        expected = net(x)
        for module in net.modules():
            if type(module) is nn.MultiheadAttention:
                HeadwiseAttention.adopt(module)
        seen = []
        layer.self_attn.out_proj.register_forward_pre_hook(lambda *_: seen.append(1))
        torch.testing.assert_close(net(x), expected)
    assert seen == [1]


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
@pytest.mark.parametrize("heads", [1, 2])
def test_an_encoder_that_makes_nested_tensors_of_padding_can_lose_heads(heads):
    net = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2).double().eval()
    x = torch.randn(3, 6, 8, dtype=torch.float64)
    padding = mask_arguments("padding")["key_padding_mask"]
    with torch.no_grad():
        if heads == 1:
            for layer in net.layers:
                layer.self_attn.out_proj.weight[:, :4] = 0
        expected = net(x, src_key_padding_mask=padding)
        for layer in net.layers:
            HeadwiseAttention.adopt(layer.self_attn)
            if heads == 1:
                prune_first_head(layer.self_attn)
        found = net(x, src_key_padding_mask=padding)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kwargs", [{}, {"kdim": 5}])
def test_one_made_directly_is_like_the_original(kwargs):
    made = []
    for kind in (HeadwiseAttention, nn.MultiheadAttention):
        torch.manual_seed(0)
        made.append(kind(8, 2, **kwargs))
    ours, theirs = made
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert all(map(torch.equal, ours.state_dict().values(), theirs.state_dict().values()))
    ours._reset_parameters()
    ours.release()
    assert vars(ours).keys() == vars(theirs).keys()
    assert ours._qkv_same_embed_dim == theirs._qkv_same_embed_dim


@pytest.mark.slow
@pytest.mark.parametrize("strict", [True, False])
def test_it_is_exported_for_any_batch_and_length(strict):
    ours = HeadwiseAttention(8, 2, add_bias_kv=True, add_zero_attn=True, batch_first=True).eval()

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = ours

        def forward(self, x, padding):
            return self.attention(x, x, x, key_padding_mask=padding)[0]

    sizes = {0: torch.export.Dim("batch", min=2, max=9), 1: torch.export.Dim("length", min=2, max=9)}
    example = torch.randn(3, 5, 8), torch.zeros(3, 5, dtype=torch.bool)
    exported = torch.export.export(Net(), example, dynamic_shapes=(sizes, sizes), strict=strict)
    other = torch.randn(4, 7, 8), torch.rand(4, 7) < 0.3
    torch.testing.assert_close(exported.module()(*other), Net()(*other))


@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
@pytest.mark.parametrize("need_weights", [True, False])
def test_it_runs_for_several_sets_of_parameters_at_once(need_weights):
    ours, _ = pair(add_bias_kv=True, batch_first=True)
    x = inputs()[0]
    stacked = {name: torch.stack([p.detach(), 2 * p.detach()]) for name, p in ours.named_parameters()}

    def run(parameters):
        return torch.func.functional_call(ours, parameters, (x, x, x), {"need_weights": need_weights})[0]

    each = torch.stack([run({name: p[i] for name, p in stacked.items()}) for i in range(2)])
    torch.testing.assert_close(torch.func.vmap(run)(stacked), each, rtol=1e-12, atol=1e-12)


def test_adopting_changes_nothing_but_the_class():
    attention = nn.MultiheadAttention(8, 2)
    before, attributes = copy.deepcopy(attention.state_dict()), dict(vars(attention))
    HeadwiseAttention.adopt(attention)
    twin = copy.deepcopy(attention)
    assert type(twin) is HeadwiseAttention
    assert list(attention.state_dict()) == list(before)
    attention.release()
    assert type(attention) is nn.MultiheadAttention
    assert vars(attention) == attributes
    assert all(torch.equal(tensor, before[name]) for name, tensor in attention.state_dict().items())


def test_what_cannot_be_said_is_refused():
    attention = HeadwiseAttention(8, 2)
    x = torch.randn(3, 8)
    with pytest.raises(ValueError, match="is_causal=True is a hint about attn_mask"):
        attention(x, x, x, is_causal=True)
    with pytest.raises(TypeError, match="but got Linear"):
        HeadwiseAttention.adopt(nn.Linear(2, 2))
    with pytest.raises(TypeError, match="but got HeadwiseAttention"):
        HeadwiseAttention.adopt(attention)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"attn_mask": torch.ones(5, 5, dtype=torch.int64)}, "masks must be bool or floating point"),
        ({"attn_mask": torch.zeros(1, 5)}, "attn_mask must be of shape"),
        ({"attn_mask": torch.zeros(3, 5, 5)}, "for 2 heads, but got"),
        ({"key_padding_mask": torch.zeros(1, 5)}, "key_padding_mask must be of shape"),
        ({"query": torch.zeros(1, 3, 5, 8)}, "all be of 2 or all of 3 dimensions"),
        ({"key": torch.zeros(3, 4, 8)}, "do not fit each other"),
    ],
)
def test_what_would_be_broadcast_is_refused(arguments, message):
    ours = HeadwiseAttention(8, 2, batch_first=True)
    x = torch.randn(3, 5, 8)
    with pytest.raises(ValueError, match=message):
        ours(**{"query": x, "key": x, "value": x, **arguments})
