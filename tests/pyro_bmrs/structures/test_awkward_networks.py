"""Networks that pruning by a dependency graph got wrong: compacted equals masked, or refused before training."""

import copy
import math

import pyro.distributions as dist
import pytest
import torch
from torch import nn
from torch.nn.functional import glu, linear, scaled_dot_product_attention
from torch.nn.utils import prune
from torch.nn.utils import spectral_norm as old_spectral_norm
from torch.nn.utils.parametrizations import spectral_norm, weight_norm

import pyro_bmrs as bmrs
from pyro_bmrs.structures.refusal import removable_structures

EXACT = 1e-9
QUICK = {"criterion": None, "epochs": 1, "fine_tune_epochs": 0, "batch_size": 4, "progress": False, "seed": 0}


def inside(size, dim=1):
    return bmrs.MultiplicativeNoise(size, dim=dim)


def outside(*_):
    return nn.Identity()


class Net(nn.Module):
    """Layers by name."""

    def __init__(self, **layers):
        super().__init__()
        for name, layer in layers.items():
            setattr(self, name, layer)


class NoiseOnSum(Net):
    def __init__(self, noise):
        super().__init__(i=nn.Linear(6, 8), b=nn.Linear(8, 8), o=nn.Linear(8, 2), n=noise(8))

    def forward(self, x):
        h = torch.relu(self.i(x))
        return self.o(self.n(h + torch.relu(self.b(h))))


class Keeping(Net):
    """Keeps an activation on itself."""

    def __init__(self, noise):
        super().__init__(i=nn.Linear(6, 8), o=nn.Linear(8, 2), n=noise(8))
        self.kept, self.more = None, {}

    def forward(self, x):
        self.kept = torch.relu(self.i(x))
        self.more["last"] = [self.kept * 2]
        return self.o(self.n(self.kept))


class Chunked(Net):
    """Halves into two layers of different width."""

    def __init__(self, noise):
        super().__init__(i=nn.Linear(6, 8), a=nn.Linear(4, 3), b=nn.Linear(4, 5), o=nn.Linear(8, 2), n=noise(8))

    def forward(self, x):
        p, q = self.n(torch.relu(self.i(x))).chunk(2, 1)
        return self.o(torch.cat([self.a(p), self.b(q)], 1).tanh())


class RawInputFirst(Net):
    def __init__(self, noise):
        super().__init__(i=nn.Linear(6, 8), o=nn.Linear(14, 2), n=noise(8))

    def forward(self, x):
        return self.o(torch.cat([x, self.n(self.i(x).relu())], 1))


class TwoRawInputs(Net):
    def __init__(self, noise):
        super().__init__(i=nn.Linear(6, 8), j=nn.Linear(14, 5), o=nn.Linear(11, 2), n=noise(8), m=noise(5))

    def forward(self, x):
        h = self.j(torch.cat([x, self.n(self.i(x).relu())], 1))
        return self.o(torch.cat([x, self.m(h.relu())], 1))


class TwoConvolvedInputs(Net):
    def __init__(self, noise):
        layers = {"i": nn.Conv2d(2, 4, 3, padding=1), "j": nn.Conv2d(6, 5, 3, padding=1), "o": nn.Linear(7, 2)}
        super().__init__(**layers, n=noise(4), m=noise(5))

    def forward(self, x):
        h = self.j(torch.cat([x, self.n(self.i(x).relu())], 1))
        return self.o(torch.cat([x, self.m(h.relu())], 1).mean((2, 3)))


class Shuffled(Net):
    """Depth to space."""

    def __init__(self, noise):
        layers = {"i": nn.Conv2d(2, 8, 3, padding=1), "p": nn.PixelShuffle(2), "c": nn.Conv2d(2, 6, 3)}
        super().__init__(**layers, o=nn.Linear(6, 2), n=noise(8), m=noise(6))

    def forward(self, x):
        return self.o(self.m(self.c(self.p(self.n(self.i(x).relu()))).relu()).mean((2, 3)))


class ChannelShuffle(Net):
    """Of ShuffleNet: by view and transpose, or by chunk."""

    def __init__(self, noise, by="view"):
        layers = {"i": nn.Conv2d(2, 8, 3), "g": nn.Conv2d(8, 8, 3, groups=2), "o": nn.Linear(8, 2)}
        super().__init__(**layers, n=noise(8), m=noise(8))
        self.by = by

    def forward(self, x):
        h = self.n(self.i(x).relu())
        if self.by == "view":
            h = h.view(len(h), 2, 4, *h.shape[2:]).transpose(1, 2).reshape(h.shape)
        elif self.by == "chunk":
            a, b = h.chunk(2, 1)
            h = torch.cat([b, a], 1)
        else:
            h = nn.functional.channel_shuffle(h, 2)
        return self.o(self.m(self.g(h).relu()).mean((2, 3)))


class Gated(Net):
    def __init__(self, noise, before=True):
        super().__init__(i=nn.Linear(6, 16), o=nn.Linear(8, 2), n=noise(16 if before else 8))
        self.before = before

    def forward(self, x):
        h = self.i(x)
        return self.o(glu(self.n(h), 1) if self.before else self.n(glu(h, 1)))


class FusedAttention(Net):
    def __init__(self, noise, where="output"):
        layers = {"e": nn.Linear(3, 8), "qkv": nn.Linear(8, 24), "p": nn.Linear(8, 8), "o": nn.Linear(8, 2)}
        super().__init__(**layers, n=noise({"output": 8, "projection": 24, "heads": 2}[where], -1))
        self.where = where
        if where == "heads" and isinstance(self.n, bmrs.MultiplicativeNoise):
            self.n.dim = 1

    def forward(self, x):
        batch, length, _ = x.shape
        h = self.e(x)
        projected = self.qkv(h)
        if self.where == "projection":
            projected = self.n(projected)
        q, k, v = projected.view(batch, length, 3, 2, 4).permute(2, 0, 3, 1, 4)
        mixed = scaled_dot_product_attention(q, k, v)
        if self.where == "heads":
            mixed = self.n(mixed)
        mixed = mixed.transpose(1, 2).reshape(batch, length, 8)
        if self.where == "output":
            mixed = self.n(mixed)
        return self.o((h + self.p(mixed)).mean(1))


class ToImage(Net):
    """A vector viewed as an image of one or of several channels."""

    def __init__(self, noise, channels=2):
        layers = {"i": nn.Linear(6, 16 * channels), "c": nn.Conv2d(channels, 5, 3), "o": nn.Linear(5, 2)}
        super().__init__(**layers, n=noise(16 * channels), m=noise(5))
        self.channels = channels

    def forward(self, x):
        h = self.n(self.i(x).relu()).view(-1, self.channels, 4, 4)
        return self.o(self.m(self.c(h).relu()).mean((2, 3)))


class HardCoded(Net):
    def __init__(self, noise, form="flatten"):
        layers = {"c": nn.Conv2d(2, 8, 3), "f": nn.Linear(32, 6), "o": nn.Linear(6, 2)}
        super().__init__(**layers, n=noise(8), m=noise(6))
        self.form = form

    def forward(self, x):
        h = self.n(self.c(x).relu())
        if self.form == "flatten":
            h = h.view(-1, 8 * 2 * 2)
        elif self.form == "batch":
            h = h.reshape(x.shape[0], 32)
        else:
            h = h.view(-1, 8, 4).reshape(-1, 32)
        return self.o(self.m(self.f(h).relu()))


class Assigned(Net):
    def __init__(self, noise, half="first"):
        super().__init__(i=nn.Linear(6, 8), o=nn.Linear(8, 2), n=noise(8))
        self.half = half

    def forward(self, x):
        h = self.n(self.i(x).relu()).clone()
        if self.half == "first":
            h[:, :4] = 2 * h[:, 4:] + 1
        elif self.half == "input":
            h[:, :4] = x[:, :4]
        else:
            h[:, ::2] *= 2
        return self.o(h)


class Shared(Net):
    """One activation, with noise, in two places."""

    def __init__(self, noise):
        super().__init__(i=nn.Linear(6, 8), b=nn.Linear(8, 8), o=nn.Linear(8, 2))
        self.act = nn.Sequential(nn.ReLU(), noise(8))

    def forward(self, x):
        return self.o(self.act(self.b(self.act(self.i(x)))))


class TwoNames(Net):
    """One noise layer under two names, of which both are used, or one."""

    def __init__(self, noise, both=True):
        super().__init__(i=nn.Linear(6, 8), b=nn.Linear(8, 8), o=nn.Linear(8, 2), n=noise(8))
        self.again, self.both = self.n, both

    def forward(self, x):
        h = self.n(self.i(x).relu())
        h = self.b(h).relu()
        return self.o(self.again(h) if self.both else h)


class Tied(Net):
    """Two layers of one weight, used side by side, one after the other, or transposed."""

    def __init__(self, noise, how="series"):
        super().__init__(i=nn.Linear(6, 8), a=nn.Linear(8, 8), b=nn.Linear(8, 8), o=nn.Linear(8, 2), n=noise(8))
        self.how = how
        if how != "transposed":
            self.b.weight = self.a.weight
        else:
            self.b = nn.Linear(8, 6)
            self.b.weight = nn.Parameter(self.b.weight.t().contiguous())
            self.i.weight = self.b.weight
            self.b = nn.ParameterDict({"bias": nn.Parameter(torch.randn(6))})
            self.o = nn.Linear(6, 2)

    def forward(self, x):
        h = self.i(x).relu()
        if self.how == "series":
            return self.o(self.b(self.n(self.a(h).tanh())).tanh())
        if self.how == "parallel":
            return self.o((self.a(self.n(h)) + self.b(h).tanh()).relu())
        return self.o(linear(self.n(h), self.i.weight.t(), self.b["bias"]).tanh())


class TiedReaders(Net):
    """Two different inputs read by one weight, noise on one of them."""

    def __init__(self, noise):
        super().__init__(i=nn.Linear(6, 8), j=nn.Linear(6, 8), a=nn.Linear(8, 5), b=nn.Linear(8, 5), o=nn.Linear(10, 2))
        self.n = noise(8)
        self.b.weight = self.a.weight

    def forward(self, x):
        return self.o(torch.cat([self.a(self.n(self.i(x).relu())), self.b(self.j(x).relu())], 1).tanh())


class TiedEmbedding(Net):
    """A language model in small."""

    def __init__(self, noise):
        super().__init__(e=nn.Embedding(7, 8), f=nn.Linear(8, 8), n=noise(8, -1))
        self.o = nn.Linear(8, 7, bias=False)
        self.o.weight = self.e.weight

    def forward(self, tokens):
        h = self.e(tokens)
        return self.o((h + self.f(self.n(h.tanh())).relu()).mean(1))


class Encoder(Net):
    """PyTorch's fast path skips what stands inside of it in eval mode."""

    def __init__(self, noise, where="dropout", norm_first=False, batch_first=True):
        super().__init__(e=nn.Linear(3, 8), o=nn.Linear(8, 2))
        self.layer = nn.TransformerEncoderLayer(8, 2, 12, 0.0, batch_first=batch_first, norm_first=norm_first)
        self.batch_first = batch_first
        if where == "dropout":
            self.layer.dropout = noise(12, -1)
        elif where == "activation":
            self.layer.activation = nn.Sequential(nn.ReLU(), noise(12, -1))
        elif where == "stream":
            self.layer.dropout1 = noise(8, -1)
        else:
            self.layer.dropout2 = noise(8, -1)

    def forward(self, x):
        h = self.e(x)
        if not self.batch_first:
            return self.o(self.layer(h.transpose(0, 1)).mean(0))
        return self.o(self.layer(h).mean(1))


class Stack(Net):
    def __init__(self, noise):
        layer = nn.TransformerEncoderLayer(8, 2, 12, 0.0, batch_first=True)
        layer.dropout = noise(12, -1)
        super().__init__(e=nn.Linear(3, 8), layers=nn.TransformerEncoder(layer, 2), o=nn.Linear(8, 2))

    def forward(self, x):
        return self.o(self.layers(self.e(x)).mean(1))


class TwoOutputs(Net):
    def __init__(self, noise, form="tuple"):
        super().__init__(i=nn.Linear(6, 8), o=nn.Linear(8, 2), p=nn.Linear(8, 3), n=noise(8))
        self.form = form

    def forward(self, x):
        h = self.n(self.i(x).relu())
        both = self.o(h), self.p(h).tanh()
        return both if self.form == "tuple" else {"logits": both[0], "extra": [both[1], None, 3]}


def small(net):
    """Outputs of the order 1e-6."""
    with torch.no_grad():
        net[-1].weight.mul_(1e-6)
        net[-1].bias.mul_(1e-6)
    return net


def pruned(layer):
    prune.random_unstructured(layer, "weight", 0.3)
    return layer


def parametrised(make, place=0):
    """Return a maker of a network with one layer so changed."""

    def made(noise):
        layers = [nn.Linear(6, 8), nn.ReLU(), noise(8), nn.Linear(8, 7), nn.ReLU(), noise(7), nn.Linear(7, 2)]
        layers[place] = make(layers[place])
        return nn.Sequential(*layers)

    return made


def weight_normed(noise):
    return small(nn.Sequential(weight_norm(nn.Linear(6, 8)), noise(8), nn.Linear(8, 2)))


def old_weight_norm(layer):
    with pytest.warns(FutureWarning):
        return nn.utils.weight_norm(layer)


def series(noise):
    return nn.Sequential(nn.Linear(6, 4), noise(4), nn.ReLU(), noise(4), nn.Linear(4, 2))


def series_of_convolutions(noise):
    return nn.Sequential(
        nn.Conv2d(2, 4, 3), noise(4), nn.ReLU(), noise(4), nn.Conv2d(4, 5, 1), nn.Flatten(), nn.Linear(20, 2)
    )


def series_around_batch_norm(noise):
    head = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(5, 2)
    return nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.ReLU(), noise(4), nn.BatchNorm2d(4), noise(4), nn.ReLU(), nn.Conv2d(4, 5, 1), *head
    )


def series_around_convolution(noise):
    """A depthwise convolution, whose channels are those before it."""
    head = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(5, 2)
    return nn.Sequential(
        nn.Conv2d(2, 4, 3), noise(4), nn.Conv2d(4, 4, 2, groups=4), noise(4), nn.Tanh(), nn.Conv2d(4, 5, 1), *head
    )


def three_in_series(noise):
    return nn.Sequential(nn.Linear(6, 4), noise(4), noise(4), nn.Sigmoid(), noise(4), nn.Linear(4, 2))


def one_channel(noise):
    return nn.Sequential(
        nn.Conv2d(2, 1, 3, padding=1), noise(1), nn.ReLU(), nn.Conv2d(1, 4, 3), noise(4), nn.ReLU(), nn.Conv2d(4, 1, 1),
        noise(1), nn.Flatten(), nn.Linear(4, 2),
    )  # fmt: skip


def many(make, **options):
    """Return a maker of one form of a network."""
    return lambda noise: make(noise, **options)


VECTOR, IMAGE, SEQUENCE = (6,), (2, 4, 4), (5, 3)
# Network, and shape of an example.
CASES = {
    "noise on a sum": (NoiseOnSum, VECTOR),
    "small outputs": (weight_normed, VECTOR),
    "weight norm before": (parametrised(weight_norm), VECTOR),
    "weight norm between": (parametrised(weight_norm, 3), VECTOR),
    "weight norm behind": (parametrised(weight_norm, 6), VECTOR),
    "spectral norm before": (parametrised(spectral_norm), VECTOR),
    "spectral norm between": (parametrised(spectral_norm, 3), VECTOR),
    "old weight norm before": (parametrised(old_weight_norm), VECTOR),
    "old weight norm between": (parametrised(old_weight_norm, 3), VECTOR),
    "old spectral norm between": (parametrised(old_spectral_norm, 3), VECTOR),
    "masked weights before": (parametrised(pruned), VECTOR),
    "masked weights between": (parametrised(pruned, 3), VECTOR),
    "keeps its activation": (Keeping, VECTOR),
    "chunks": (Chunked, VECTOR),
    "raw input first": (RawInputFirst, VECTOR),
    "two raw inputs": (TwoRawInputs, VECTOR),
    "two convolved inputs": (TwoConvolvedInputs, IMAGE),
    "pixel shuffle": (Shuffled, IMAGE),
    "channel shuffle": (ChannelShuffle, (2, 6, 6)),
    "channel shuffle by chunk": (many(ChannelShuffle, by="chunk"), (2, 6, 6)),
    "channel shuffle of torch": (many(ChannelShuffle, by="torch"), (2, 6, 6)),
    "before a GLU": (Gated, VECTOR),
    "behind a GLU": (many(Gated, before=False), VECTOR),
    "fused qkv": (FusedAttention, SEQUENCE),
    "noise on qkv": (many(FusedAttention, where="projection"), SEQUENCE),
    "noise on heads": (many(FusedAttention, where="heads"), SEQUENCE),
    "view to an image": (ToImage, VECTOR),
    "view to one channel": (many(ToImage, channels=1), VECTOR),
    "hard-coded": (HardCoded, IMAGE),
    "hard-coded behind the batch": (many(HardCoded, form="batch"), IMAGE),
    "hard-coded channels": (many(HardCoded, form="channels"), IMAGE),
    "slice assigned": (Assigned, VECTOR),
    "slice of the input assigned": (many(Assigned, half="input"), VECTOR),
    "every second changed": (many(Assigned, half="even"), VECTOR),
    "activation used twice": (Shared, VECTOR),
    "two names": (TwoNames, VECTOR),
    "two names, one used": (many(TwoNames, both=False), VECTOR),
    "tied in series": (Tied, VECTOR),
    "tied in parallel": (many(Tied, how="parallel"), VECTOR),
    "tied transposed": (many(Tied, how="transposed"), VECTOR),
    "tied readers": (TiedReaders, VECTOR),
    "tied embedding": (TiedEmbedding, None),
    "series": (series, VECTOR),
    "series of convolutions": (series_of_convolutions, IMAGE),
    "series around batch norm": (series_around_batch_norm, IMAGE),
    "series around a convolution": (series_around_convolution, IMAGE),
    "three in series": (three_in_series, VECTOR),
    "encoder, dropout": (Encoder, SEQUENCE),
    "encoder, activation": (many(Encoder, where="activation"), SEQUENCE),
    "encoder, second stream": (many(Encoder, where="second stream"), SEQUENCE),
    "encoder, stream": (many(Encoder, where="stream"), SEQUENCE),
    "encoder, norm first": (many(Encoder, norm_first=True), SEQUENCE),
    "encoder, time first": (many(Encoder, batch_first=False), SEQUENCE),
    "stack of encoders": (Stack, SEQUENCE),
    "one channel": (one_channel, IMAGE),
}
# Refused with noise inside; all others are exact.
REFUSED = {
    "channel shuffle", "fused qkv", "noise on heads", "view to an image", "hard-coded", "hard-coded behind the batch",
    "hard-coded channels", "tied in series", "tied in parallel", "tied transposed", "series around batch norm",
}  # fmt: skip
# Without anything to attach noise to; all others offer something, and what they offer is exact.
NOTHING = {
    "spectral norm between", "old spectral norm between", "channel shuffle", "channel shuffle by chunk",
    "slice assigned", "slice of the input assigned", "every second changed", "tied transposed",
}  # fmt: skip


def inputs(shape, count=4, seed=1):
    generator = torch.Generator().manual_seed(seed)
    if shape is None:
        return torch.randint(7, (count, 5), generator=generator)
    return torch.randn(count, *shape, generator=generator, dtype=torch.float64)


def make(case, noise, seed=0):
    """Return a network in float64 whose batch norms have statistics of their own, and example inputs."""
    torch.manual_seed(seed)
    maker, shape = CASES[case]
    net = maker(noise).double()
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.5, 2)
            nn.init.normal_(module.bias)
    return net, inputs(shape)


def first(output):
    """Return the likelihood of what a network returns first."""
    return dist.Categorical(logits=leaves(output)[0])


def random_posterior(guide, seed=2):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        guide.loc.uniform_(-3, 0.0, generator=generator)
        guide.log_scale.normal_(-1, 0.5, generator=generator)


def model_of(net, likelihood=None):
    model = bmrs.NoisyNetwork(net, likelihood=likelihood)
    like = next(net.parameters())
    guide = bmrs.TruncatedLogNormalGuide(model).to(like.dtype)
    random_posterior(guide)
    return model, guide


def all_masks(sizes, count=3):
    """Iterate over random masks, and over some that empty each site."""
    generator = torch.Generator().manual_seed(3)

    def drawn(keep):
        return {site: torch.rand(size, generator=generator) < keep for site, size in sizes.items()}

    yield from (drawn(keep) for keep in (0.5, 0.8, 0.3)[:count])
    yield {site: torch.arange(size) < size // 2 for site, size in sizes.items()}
    for site, size in sizes.items():
        yield drawn(0.6) | {site: torch.zeros(size, dtype=torch.bool)}


def leaves(output):
    if isinstance(output, torch.Tensor):
        return [output]
    values = output.values() if isinstance(output, dict) else output if isinstance(output, tuple | list) else ()
    return [leaf for value in values for leaf in leaves(value)]


def error(found, expected):
    """Return the largest difference of outputs relative to their spread."""
    worst = 0.0
    for ours, theirs in zip(leaves(found), leaves(expected), strict=True):
        one, other = ours.detach().double(), theirs.detach().double()
        assert one.shape == other.shape
        spread = max(float(other.max() - other.min()), 1e-4 * float(other.abs().max()))
        off = float((one - other).abs().max())
        worst = max(worst, off / spread if off else 0.0)
        assert math.isfinite(off)
    return worst


def check_exact(model, guide, example, new, structures=None, tolerance=EXACT):
    """Check that compacted equals masked on new inputs, and that costs are those of the network really cut.

    Returns:
        The largest number of parameters removed.
    """
    structures = structures or getattr(model.net, "structures", None) or bmrs.find_structures(model.net, example)
    full, removed = bmrs.count_parameters(model.net), 0
    before = [layer.keep.clone() for layer in model.noise.values()]
    for masks in all_masks(model.sizes):
        cut = bmrs.compact(model, guide, masks, example, structures)
        with torch.no_grad():
            assert error(cut(new), bmrs.predict(model, guide, new, masks)) <= tolerance
        assert bmrs.count_parameters(model.net, structures, masks) == bmrs.count_parameters(cut)
        assert bmrs.count_flops(model.net, example, structures, masks) == bmrs.count_flops(cut, example)
        removed = max(removed, full - bmrs.count_parameters(cut))
    assert all(torch.equal(layer.keep, keep) for layer, keep in zip(model.noise.values(), before, strict=True))
    return removed


def fitted_or_refused(model, guide, x):
    """Fit for an epoch; return False if it was refused, with nothing trained, and a message that says it all."""
    before = copy.deepcopy({**model.state_dict(), **{f"guide {k}": v for k, v in guide.state_dict().items()}})
    random_state = torch.get_rng_state()
    try:
        bmrs.fit(model, guide, (x, torch.arange(len(x)) % 2), **QUICK, precision="64-true")
    except ValueError as refusal:
        check_refusal(model, str(refusal))
        after = {**model.state_dict(), **{f"guide {k}": v for k, v in guide.state_dict().items()}}
        assert all(torch.equal(after[name], value) for name, value in before.items())
        assert torch.equal(torch.get_rng_state(), random_state)
        return False
    return True


def check_refusal(model, message):
    assert any(f"'{site}'" in message for site in model.sizes), message
    assert "cannot be removed: " in message
    assert 'unremovable="mask"' in message
    assert "take this noise out" in message


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_noise_inside_is_exact_or_refused_before_training(case):
    net, x = make(case, inside)
    net(x)  # with gradients, as in somebody's training loop
    model, guide = model_of(net)
    accepted = fitted_or_refused(model, guide, x)
    if accepted:
        random_posterior(guide)
        removed = check_exact(model, guide, x, inputs(CASES[case][1], 7, seed=5))
        assert removed > 0
    assert accepted == (case not in REFUSED)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_noise_attached_is_exact_or_refused_before_training(case):
    net, x = make(case, outside)
    net(x)
    structures = bmrs.find_structures(net, x)
    assert all(reason for reason in structures.refused.values())
    if case in NOTHING:
        assert not structures
        with pytest.raises(ValueError, match="there are no structures to attach noise to"):
            bmrs.attach_noise(net, structures)
        return
    assert structures, structures.refused
    model, guide = model_of(bmrs.attach_noise(net, structures))
    assert fitted_or_refused(model, guide, x)
    random_posterior(guide)
    assert check_exact(model, guide, x, inputs(CASES[case][1], 7, seed=5)) > 0


@pytest.mark.slow
@pytest.mark.parametrize("case", sorted(REFUSED))
def test_what_is_refused_can_be_masked_if_the_user_says_so(case):
    net, x = make(case, inside)
    model, guide = model_of(net)
    y = torch.arange(len(x)) % 2
    bmrs.fit(model, guide, (x, y), **QUICK, precision="64-true", unremovable="mask")
    random_posterior(guide)
    structures = removable_structures(model.net, x, unremovable="mask")
    check_exact(model, guide, x, inputs(CASES[case][1], 7, seed=5), structures)


EXAMPLES = {
    "one row": lambda x: x[:1],
    "zeros": torch.zeros_like,
    "equal rows": lambda x: x[:1].expand(len(x), -1).clone(),
    "bytes": lambda x: (x.clamp(-1, 1) * 100 + 128).to(torch.uint8),
    "zero bytes": lambda x: torch.zeros_like(x, dtype=torch.uint8),
    "float32": lambda x: x.float(),
}


@pytest.mark.slow
@pytest.mark.parametrize("example", EXAMPLES)
@pytest.mark.parametrize("noise", [inside, outside])
def test_what_the_example_looks_like_does_not_matter(example, noise):
    net, x = make("noise on a sum", noise)
    example, new = EXAMPLES[example](x), inputs(VECTOR, 50, seed=5)
    if noise is outside:
        net = bmrs.attach_noise(net, bmrs.find_structures(net, example))
    model, guide = model_of(net)
    half = {site: torch.arange(8) < 4 for site in model.sizes}
    cut = bmrs.compact(model, guide, half, example)
    assert error(cut(new), bmrs.predict(model, guide, new, half)) <= EXACT
    assert check_exact(model, guide, example, new) > 0
    data = example if example.dtype == torch.uint8 else example.float()
    bmrs.fit(model.float(), guide.float(), (data.expand(4, -1).clone(), torch.arange(4) % 2), **QUICK)


@pytest.mark.parametrize("noise", [inside, outside])
@pytest.mark.parametrize("unit", [0, 5])
def test_a_unit_that_is_off_on_the_example_is_not_taken_for_a_constant(noise, unit):
    net, x = make("noise on a sum", noise)
    with torch.no_grad():
        net.i.bias[unit] = -net.i.weight[unit].abs().sum() * x.abs().max()
        net.b.bias[unit] = -50
    assert not net.i(x).relu()[:, unit].any()
    if noise is outside:
        net = bmrs.attach_noise(net, bmrs.find_structures(net, x))
    model, guide = model_of(net)
    new = 20 * inputs(VECTOR, 50, seed=5)
    assert check_exact(model, guide, x, new) > 0


@pytest.mark.parametrize("noise", [inside, outside])
def test_outputs_of_the_order_of_1e_6_are_held_to_their_own_spread(noise):
    net, x = make("small outputs", noise)
    if noise is outside:
        net = bmrs.attach_noise(net, bmrs.find_structures(net, x))
    model = bmrs.NoisyNetwork(net)
    guide = bmrs.TruncatedLogNormalGuide(model, init_loc=-3.0).double()
    assert check_exact(model, guide, x, inputs(VECTOR, 7, seed=5)) > 0


class Watch(bmrs.Callback):
    """Notes the masks at the end of every epoch."""

    def __init__(self, model):
        self.model, self.seen = model, []

    def on_epoch_end(self, record):
        self.seen.append((record["phase"], self.model.masks))


class FirstThird(bmrs.Criterion):
    def scores(self, context):
        return {site: 0.5 - (3 * torch.arange(size) >= size).double() for site, size in context.model.sizes.items()}


@pytest.mark.parametrize("case", ["activation used twice", "two names", "two names, one used"])
def test_masks_of_noise_used_twice_stay(case):
    net, x = make(case, inside)
    model, guide = model_of(net)
    assert len(model.sizes) == 1
    y = torch.arange(len(x)) % 2
    settings = {**QUICK, "criterion": FirstThird(), "epochs": 2, "fine_tune_epochs": 2, "precision": "64-true"}
    watch = Watch(model)
    result = bmrs.fit(model, guide, (x, y), (x, y), callbacks=[watch], **settings)
    (site, mask) = next(iter(result.masks.items()))
    assert mask.tolist() == [False] * 3 + [True] * 5
    for _ in range(2):
        bmrs.predict(model, guide, x)
        assert torch.equal(model.masks[site], mask)
    assert [phase for phase, _ in watch.seen] == ["noisy"] * 2 + ["fine-tune"] * 2
    assert all(torch.equal(masks[site], mask) for phase, masks in watch.seen if phase == "fine-tune")
    with torch.no_grad():  # the removed structures' weights count for nothing
        before = bmrs.predict(model, guide, x)
        net.i.weight[:3] += 1
        if case != "two names, one used":
            net.b.weight[:3] += 1
        assert torch.equal(bmrs.predict(model, guide, x), before)
    assert check_exact(model, guide, x, inputs(VECTOR, 7, seed=5)) > 0


def test_tied_weights_count_once():
    net, x = make("tied in parallel", outside)
    structures = bmrs.find_structures(net, x)
    assert bmrs.count_parameters(net) == 6 * 8 + 8 + 8 * 8 + 8 + 8 + 8 * 2 + 2
    everything = {f"{name}.theta": torch.ones(each.size, dtype=torch.bool) for name, each in structures.items()}
    # Removing nothing still parts the two layers, once noise is multiplied into one of them.
    cut = bmrs.compact(*model_of(bmrs.attach_noise(net, structures)), everything, x)
    assert bmrs.count_parameters(net, structures, everything) == bmrs.count_parameters(cut)


@pytest.mark.parametrize("case", ["tied in parallel", "tied readers"])
def test_noise_at_one_reader_of_a_tied_weight_does_not_scale_the_other(case):
    net, x = make(case, outside)
    structures = bmrs.find_structures(net, x).select(names="i")
    model, guide = model_of(bmrs.attach_noise(net, structures))
    new = inputs(VECTOR, 7, seed=5)
    everything = model.masks
    cut = bmrs.compact(model, guide, everything, x)
    assert error(cut(new), bmrs.predict(model, guide, new, everything)) <= EXACT
    assert model.net.net.a.weight is model.net.net.b.weight


SERIES = {
    "linear": (lambda n: nn.Sequential(nn.Linear(4, 2), n(2), nn.ReLU(), n(2), nn.Linear(2, 3)), (4,)),
    "sigmoid": (lambda n: nn.Sequential(nn.Linear(4, 2), n(2), nn.Sigmoid(), n(2), nn.Linear(2, 3)), (4,)),
    "convolution": (
        lambda n: nn.Sequential(
            nn.Conv2d(1, 2, 3), n(2), nn.ReLU(), n(2), nn.Conv2d(2, 3, 2), nn.AdaptiveAvgPool2d(1), nn.Flatten()
        ),
        (1, 5, 5),
    ),
    "convolution and batch norm": (
        lambda n: nn.Sequential(
            nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), n(2), nn.ReLU(), n(2), nn.Conv2d(2, 3, 2), nn.Flatten(),
            nn.Linear(12, 3),
        ),
        (1, 5, 5),
    ),
    "batch norm between": (
        lambda n: nn.Sequential(
            nn.Conv2d(1, 2, 3), n(2), nn.BatchNorm2d(2), n(2), nn.Conv2d(2, 3, 2), nn.Flatten(), nn.Linear(12, 3)
        ),
        (1, 5, 5),
    ),
    "layer between": (
        lambda n: nn.Sequential(nn.Linear(4, 2), n(2), nn.Linear(2, 2), n(2), nn.BatchNorm1d(2), nn.Linear(2, 3)),
        (4,),
    ),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", SERIES)
@pytest.mark.parametrize("keep", ["10 01", "01 10", "00 11", "11 00", "00 00"])
def test_complementary_masks_in_series(name, keep):
    maker, shape = SERIES[name]
    torch.manual_seed(0)
    net, x = maker(inside).double(), inputs(shape)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d | nn.BatchNorm1d):
            nn.init.normal_(module.bias)
            nn.init.normal_(module.running_mean)
    model, guide = model_of(net)
    structures = removable_structures(net, x, unremovable="mask")
    bits = [[bit == "1" for bit in each] for each in keep.split()]
    masks = {site: torch.tensor(each) for site, each in zip(model.sizes, bits, strict=True)}
    cut = bmrs.compact(model, guide, masks, x, structures)
    new = inputs(shape, 7, seed=5)
    assert error(cut(new), bmrs.predict(model, guide, new, masks)) <= EXACT
    assert all(dim > 0 for parameter in cut.parameters() for dim in parameter.shape)
    assert bmrs.count_parameters(net, structures, masks) == bmrs.count_parameters(cut)
    assert bmrs.count_flops(net, x, structures, masks) == bmrs.count_flops(cut, x)


@pytest.mark.parametrize("where", ["dropout", "activation", "stream", "second stream"])
@pytest.mark.parametrize("norm_first", [False, True])
def test_an_encoder_in_eval_mode_sees_noise_and_masks(where, norm_first):
    torch.manual_seed(0)
    net, x = Encoder(inside, where, norm_first).double().eval(), inputs(SEQUENCE)
    model, guide = model_of(net)
    (site, size) = next(iter(model.sizes.items()))
    nothing = {site: torch.zeros(size, dtype=torch.bool)}
    full, empty = bmrs.predict(model, guide, x), bmrs.predict(model, guide, x, nothing)
    assert error(empty, full) > 1e-2
    with torch.no_grad():
        guide.loc.sub_(1)
    assert error(bmrs.predict(model, guide, x), full) > 1e-4
    model.noise[site].remove(torch.arange(size) < size - 1)
    assert error(bmrs.predict(model, guide, x), full) > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("noise", [inside, outside])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", ["noise on a sum", "pixel shuffle", "encoder, dropout"])
def test_networks_of_other_precisions(case, dtype, noise):
    net, x = make(case, noise)
    net, x = net.to(dtype), x.to(dtype)
    if noise is outside:
        net = bmrs.attach_noise(net, bmrs.find_structures(net, x))
    model = bmrs.NoisyNetwork(net)
    guide = bmrs.TruncatedLogNormalGuide(model)
    if dtype == torch.float64:
        guide.double()
    y = torch.arange(len(x)) % 2
    bmrs.fit(model, guide, (x, y), (x, y), **QUICK | {"lr": 1e-4})
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    random_posterior(guide)
    tolerance = EXACT if dtype == torch.float64 else 20 * torch.finfo(dtype).eps
    new = inputs(CASES[case][1], 7, seed=5).to(dtype)
    assert check_exact(model, guide, x, new, tolerance=tolerance) > 0
    cut = bmrs.compact(model, guide, None, x)
    assert {parameter.dtype for parameter in cut.parameters()} == {dtype}


@pytest.mark.parametrize("noise", [inside, outside])
@pytest.mark.parametrize("form", ["tuple", "dict"])
def test_two_outputs(form, noise):
    torch.manual_seed(0)
    net, x = TwoOutputs(noise, form).double(), inputs(VECTOR)
    if noise is outside:
        structures = bmrs.find_structures(net, x)
        assert list(structures.refused) == ["o", "p"]
        net = bmrs.attach_noise(net, structures)
    model, guide = model_of(net, first)
    y = torch.arange(len(x)) % 2
    bmrs.fit(model, guide, (x, y), **QUICK, precision="64-true")
    random_posterior(guide)
    new = inputs(VECTOR, 7, seed=5)
    assert check_exact(model, guide, x, new) > 0
    parts, whole = bmrs.predict(model, guide, new, batch_size=2), bmrs.predict(model, guide, new)
    assert type(parts) is type(whole) is (tuple if form == "tuple" else dict)
    assert error(parts, whole) <= EXACT


def frozen_resnet(noise):
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), noise(4), nn.Conv2d(4, 5, 2), nn.BatchNorm2d(5), nn.ReLU(),
        noise(5), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(5, 2),
    ).double()  # fmt: skip
    nn.init.normal_(net[1].running_mean)
    net[1].eval().requires_grad_(False)
    return net


@pytest.mark.parametrize(
    ("noise", "compile"), [(inside, False), (outside, False), pytest.param(outside, True, marks=pytest.mark.exhaustive)]
)
def test_a_frozen_batch_norm_keeps_its_statistics(noise, compile):  # noqa: A002
    net, x = frozen_resnet(noise), inputs(IMAGE)
    before = copy.deepcopy(net.state_dict())
    if noise is outside:
        net = bmrs.attach_noise(net, bmrs.find_structures(net, x))
    model, guide = model_of(net)
    y = torch.arange(len(x)) % 2
    settings = {**QUICK, "epochs": 2, "fine_tune_epochs": 1, "precision": "64-true", "compile": compile}
    bmrs.fit(model, guide, (x, y), (x, y), **settings)
    plain = model.net.net if noise is outside else net
    moved = [name for name, tensor in plain.state_dict().items() if not torch.equal(tensor, before[name])]
    assert not any(name.startswith("1.") for name in moved)
    assert "5.running_mean" in moved
    assert bmrs.count_parameters(plain) == sum(parameter.numel() for parameter in plain.parameters())
    random_posterior(guide)
    assert check_exact(model, guide, x, inputs(IMAGE, 7, seed=5)) > 0


@pytest.mark.slow
@pytest.mark.parametrize("noise", [inside, outside])
@pytest.mark.parametrize("case", ["noise on a sum", "two names", "encoder, dropout", "one channel", "small outputs"])
def test_inside_autocast(case, noise):
    net, x = make(case, noise)
    net, x = net.float(), x.float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        if noise is outside:
            net = bmrs.attach_noise(net, bmrs.find_structures(net, x))
        model, guide = model_of(net)
        structures = removable_structures(model.net, x)
        cuts = [(masks, bmrs.compact(model, guide, masks, x, structures)) for masks in all_masks(model.sizes)]
        counts = [bmrs.count_parameters(model.net, structures, masks) for masks, _ in cuts]
        assert bmrs.predict(model, guide, x).dtype == torch.bfloat16
    assert counts == [bmrs.count_parameters(cut) for _, cut in cuts]
    new = inputs(CASES[case][1], 7, seed=5).float()
    for masks, cut in cuts:
        assert {parameter.dtype for parameter in cut.parameters()} == {torch.float32}
        assert error(cut(new), bmrs.predict(model, guide, new, masks)) <= 1e-5
