"""It computes what torch's attention does, calls its output projection, and may have lost heads."""

import copy
import pickle

import pytest
import torch
from torch import nn

import pyro_bmrs as bmrs

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


def pair(**options):
    torch.manual_seed(0)
    theirs = nn.MultiheadAttention(8, 2, **options).double()
    for parameter in theirs.parameters():
        nn.init.normal_(parameter)
    ours = copy.deepcopy(theirs)
    bmrs.HeadwiseAttention.adopt(ours)
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


@pytest.mark.parametrize("need_weights", [True, False])
def test_fewer_heads_are_those_whose_outputs_count_for_nothing(need_weights):
    ours, theirs = pair(batch_first=True)
    x = inputs()[0]
    with torch.no_grad():
        theirs.out_proj.weight[:, :4] = 0  # the first of two heads
        rows = torch.cat([torch.arange(4, 8) + 8 * i for i in range(3)])
        ours.in_proj_weight.data, ours.in_proj_bias.data = ours.in_proj_weight[rows], ours.in_proj_bias[rows]
        ours.out_proj.weight.data = ours.out_proj.weight[:, 4:]
        ours.num_heads = 1
        found, expected = (net(x, x, x, need_weights=need_weights)[0] for net in (ours, theirs))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    assert not ours.is_whole
    with pytest.raises(ValueError, match="1 heads of 4 are left of a width of 8"):
        ours.release()
    again = pickle.loads(pickle.dumps(ours))
    torch.testing.assert_close(again(x, x, x)[0], found)


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
                bmrs.HeadwiseAttention.adopt(module)
        seen = []
        layer.self_attn.out_proj.register_forward_pre_hook(lambda *_: seen.append(1))
        torch.testing.assert_close(net(x), expected)
    assert seen == [1]


def test_adopting_changes_nothing_but_the_class():
    attention = nn.MultiheadAttention(8, 2)
    before, attributes = copy.deepcopy(attention.state_dict()), dict(vars(attention))
    bmrs.HeadwiseAttention.adopt(attention)
    twin = copy.deepcopy(attention)
    assert type(twin) is bmrs.HeadwiseAttention
    assert list(attention.state_dict()) == list(before)
    attention.release()
    assert type(attention) is nn.MultiheadAttention
    assert vars(attention) == attributes
    assert all(torch.equal(tensor, before[name]) for name, tensor in attention.state_dict().items())


def test_what_cannot_be_said_is_refused():
    attention = bmrs.HeadwiseAttention(8, 2)
    x = torch.randn(3, 8)
    with pytest.raises(ValueError, match="is_causal=True is a hint about attn_mask"):
        attention(x, x, x, is_causal=True)
    with pytest.raises(TypeError, match="but got Linear"):
        bmrs.HeadwiseAttention.adopt(nn.Linear(2, 2))
