"""Random small feed-forward networks, for campaigns that compare a compacted network with the masked one.

``random_network`` composes a network from blocks. A ``State`` says what kind of tensor stands between two blocks; a
``Draw`` makes all choices; ``BLOCKS`` lists the blocks, each of which turns a tensor of one state into one of the state
``out``. ``describe`` prints a network with what its repr does not show: sharing, ties, zeros, frozen parameters.
"""

import math
import random
import re
from collections import defaultdict
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from pyro_bmrs import MultiplicativeNoise
from pyro_bmrs.structures.inputs import Inputs, call, output_tensors

MAPS = ("image", "signal")  # channels come before positions
ROWS = ("sequence", "vector")  # channels come last
ALL = MAPS + ROWS
DIMENSIONS = {"image": 4, "signal": 3, "sequence": 3, "vector": 2}

NOISE_TWICE = 0.1  # how often noise comes twice in a row
NOISE_REUSED = 0.08  # how often a noise module that stands elsewhere is used again
NOISE_ON_POSITIONS = 0.02  # how often noise multiplies positions instead of channels
DEEPEST = 2  # how many blocks may be nested


class State(NamedTuple):
    """What a tensor is: (B, C, H, W), (B, C, T), (B, T, D) or (B, D) as an image, a signal, a sequence or a vector."""

    kind: str
    width: int
    size: int = 1  # extent of each dimension of positions

    @property
    def rank(self):
        """How many dimensions are positions."""
        return DIMENSIONS[self.kind] - 2

    @property
    def dim(self):
        """The dimension of the channels."""
        return 2 if self.kind == "sequence" else 1

    @property
    def positions(self):
        """The dimensions of positions."""
        return tuple(dim for dim in range(1, DIMENSIONS[self.kind]) if dim != self.dim)

    @property
    def aligned(self):
        """The shape of a tensor with one number per channel that broadcasts with this one."""
        return (self.width, *(1,) * (self.rank if self.kind in MAPS else 0))

    @property
    def features(self):
        """How many numbers one example holds."""
        return self.width * self.size**self.rank

    def shape(self, batch=1):
        sizes = (self.size,) * self.rank
        return (batch, self.width, *sizes) if self.kind in MAPS else (batch, *sizes, self.width)

    def wide(self, width):
        return self._replace(width=width)


# --- Choices ----------------------------------------------------------------------------------------------------------


class Draw:
    """All random choices of one network. Numbers in tensors come from torch's generator, which the caller seeds."""

    def __init__(self, seed, noise):
        self.random = random.Random(seed)
        self.noise = noise
        self.density = self.random.uniform(0.3, 1.4)  # of the noise
        self.depth = 0
        self.pool = defaultdict(list)  # noise modules in the network, by their size and dimension

    def chance(self, probability):
        return self.random.random() < probability

    def pick(self, *options):
        return self.random.choice(options)

    def weighted(self, table):
        """Return a key of ``table``, whose values are relative frequencies."""
        return self.random.choices(list(table), list(table.values()))[0]

    def width(self, low=2, high=12):
        return 1 if self.chance(0.03) else self.random.randint(low, high)

    def divisor(self, number, least=1):
        return self.pick(*(each for each in range(least, number + 1) if number % each == 0))

    def parameter(self, *shape):
        """Return a parameter that a block owns: mostly random, sometimes zero or a small constant."""
        start = self.weighted({"random": 9, "zero": 0.5, "constant": 0.5})
        values = {"random": torch.randn(shape), "zero": torch.zeros(shape), "constant": torch.full(shape, 0.3)}
        return nn.Parameter(values[start])

    def block(self, state, keeps=False):
        """Return a random block for ``state``, one that ``keeps`` its kind and size if that is asked for."""
        table = {
            kind: kind.weight
            for kind in BLOCKS
            if state.kind in kind.takes
            and (kind.keeps or not keeps)
            and (self.depth < DEEPEST or not kind.nests)
            and kind.make.fits(state)
        }
        kind = self.weighted(table)
        self.depth += kind.nests
        block = kind.make(self, state)
        self.depth -= kind.nests
        return block

    def noises(self, state, rate=0.25):
        """Return a list of the noise modules at one place of a network: mostly none, sometimes one, rarely two."""
        if not (self.noise and self.chance(rate * self.density)):
            return []
        first = self.one_noise(state)
        if not self.chance(NOISE_TWICE):
            return [first]
        return [first, *self.pick(self.nothing, self.something)(state), self.one_noise(state)]

    def nothing(self, state):
        return []

    def something(self, state):
        """Return a list of a module that works element by element."""
        make = self.pick("activation", "dropout", "buffer")
        if make == "activation":
            return [activation(self, state)]
        return [nn.Dropout(0.2) if make == "dropout" else Buffer(self, state)]

    def one_noise(self, state):
        size, dim = state.width, state.dim
        if state.rank and self.chance(NOISE_ON_POSITIONS):
            size, dim = state.size, state.positions[0]
        if self.chance(0.3):
            dim -= DIMENSIONS[state.kind]
        known = self.pool[size, dim]
        if known and self.chance(NOISE_REUSED):
            return self.pick(*known)
        known.append(MultiplicativeNoise(size, dim=dim))
        return known[-1]

    def spot(self, state, rate=0.25):
        """Return the noise at one place as a module, an identity where there is none."""
        modules = self.noises(state, rate)
        if len(modules) < 2:
            return modules[0] if modules else nn.Identity()
        return nn.Sequential(*modules)


# --- Layers -----------------------------------------------------------------------------------------------------------


def of_rank(name, state):
    """Return torch's class of this name for the state's number of positions, such as ``nn.Conv2d``."""
    return getattr(nn, f"{name}{max(state.rank, 1)}d")


def layer(draw, state, width):
    """Return a layer from ``state`` to ``width`` channels that keeps the size."""
    bias = draw.chance(0.75)
    if state.kind in ROWS:
        return nn.Linear(state.width, width, bias=bias)
    kernel, dilation = draw.weighted({(1, 1): 3, (3, 1): 3, (3, 2): 0.5})
    groups = draw.divisor(math.gcd(state.width, width)) if draw.chance(0.2) else 1
    if draw.chance(0.05):
        return of_rank("ConvTranspose", state)(state.width, width, 3, padding=1, groups=groups, bias=bias)
    mode = draw.pick("replicate", "circular") if state.size > 2 and draw.chance(0.06) else "zeros"
    padding = dilation * (kernel // 2)
    return of_rank("Conv", state)(
        state.width, width, kernel, padding=padding, dilation=dilation, groups=groups, bias=bias, padding_mode=mode
    )


class ChannelNorm(nn.Module):
    """A layer norm over the channels of an image or a signal."""

    def __init__(self, width):
        super().__init__()
        self.norm = nn.LayerNorm(width)

    def forward(self, x):
        return self.norm(x.movedim(1, -1)).movedim(-1, 1)


class RowBatchNorm(nn.Module):
    """A batch norm over the last dimension of a sequence."""

    def __init__(self, width):
        super().__init__()
        self.norm = nn.BatchNorm1d(width)

    def forward(self, x):
        return self.norm(x.transpose(1, 2)).transpose(1, 2)


def norm(draw, state):
    """Return a norm that fits ``state``; where there are too few numbers to tell apart, it is a batch norm."""
    width, affine = state.width, draw.chance(0.9)
    groups = draw.divisor(width)
    batch, layered = of_rank("BatchNorm", state), width > 2
    if state.kind == "sequence":
        table = {"rows": 0.4, "layer": 3 * layered, "rms": 1.5 * layered}
    elif state.kind == "vector":
        table = {"batch": 4, "layer": 2 * layered, "rms": layered, "group": layered * (groups < width / 2)}
    else:
        table = {"batch": 6, "channel": layered, "group": 1.5 * (state.size > 1)}
        table |= {"instance": state.size > 1, "all": 0.3 * (state.size > 1)}
    choice = draw.weighted(table)
    made = {
        "batch": lambda: batch(width, affine=affine),
        "rows": lambda: RowBatchNorm(width),
        "channel": lambda: ChannelNorm(width),
        "layer": lambda: nn.LayerNorm(width, elementwise_affine=affine, bias=draw.chance(0.8)),
        "all": lambda: nn.LayerNorm(state.shape()[1:], elementwise_affine=affine),
        "rms": lambda: nn.RMSNorm(width, draw.pick(None, 1e-3, 1e-5), elementwise_affine=affine),
        "group": lambda: nn.GroupNorm(groups, width, affine=affine),
        "instance": lambda: of_rank("InstanceNorm", state)(width, affine=affine, track_running_stats=draw.chance(0.3)),
    }
    return made[choice]()


class Functional(nn.Module):
    """An activation by its function."""

    def __init__(self, name):
        super().__init__()
        self.name = name

    def forward(self, x):
        return getattr(F, self.name)(x)

    def extra_repr(self):
        return self.name


FUNCTIONS = ("relu", "gelu", "silu", "tanh", "sigmoid", "softplus", "leaky_relu", "elu", "hardswish", "relu6", "mish")
ACTIVATIONS = {
    nn.ReLU: 5,
    nn.GELU: 2,
    nn.SiLU: 2,
    nn.Tanh: 2,
    nn.Sigmoid: 1.5,
    nn.Softplus: 1,
    nn.LeakyReLU: 1,
    nn.ELU: 1,
    nn.PReLU: 1,
    nn.Hardswish: 0.7,
    nn.ReLU6: 0.7,
    Functional: 3,
}


def activation(draw, state, fresh=False):
    """Return an activation, which may work in place where its input is ``fresh``: nobody else needs that."""
    make = draw.weighted(ACTIVATIONS)
    if make is nn.ReLU:
        return nn.ReLU(inplace=fresh and draw.chance(0.5))
    if make is nn.PReLU:
        return nn.PReLU(state.width if state.kind != "sequence" and draw.chance(0.5) else 1)
    return Functional(draw.pick(*FUNCTIONS)) if make is Functional else make()


# A unit is a row of layers (L), norms (N) and activations (A).
UNITS = {"LA": 5, "LNA": 6, "L": 1.5, "NAL": 2, "NLA": 1, "ALN": 0.7, "LAN": 1, "LL": 0.5, "LAL": 2, "LNALN": 1}
ENDINGS = {"A": 4, "NA": 4, "N": 1, "": 1, "AN": 0.5, "NN": 0.1}
NOISE_BEHIND = {"L": 0.2, "N": 0.2, "A": 0.35}


def unit(draw, state, width=None, orders=UNITS, fresh=False):
    """Return a ``Sequential`` of one of the ``orders``, with noise here and there, and the state behind it."""
    order = draw.weighted(orders)
    modules = draw.noises(state, 0.08)
    for place, letter in enumerate(order):
        rest = order[place + 1 :]
        if letter == "L":
            end = draw.width() if width is None or "L" in rest else width
            modules.append(layer(draw, state, end))
            state = state.wide(end)
        else:
            modules.append(norm(draw, state) if letter == "N" else activation(draw, state, fresh))
        noises = draw.noises(state, NOISE_BEHIND[letter] * (0.3 if rest.startswith("N") else 1))
        modules += noises
        fresh = letter != "A" and len(noises) < 2
        if letter == "A" and draw.chance(0.04):
            modules.append(nn.Dropout(0.2))
    return nn.Sequential(*modules), state


def ending(draw, state):
    """Return what comes behind a layer."""
    return unit(draw, state, orders=ENDINGS, fresh=True)[0]


def branch(draw, state, width=None, orders=UNITS):
    """Return a ``Sequential`` to ``width`` channels (or any number) that keeps the size, and the state behind it."""
    modules = []
    if draw.depth < DEEPEST and draw.chance(0.3):
        modules.append(draw.block(state, keeps=True))
        state = modules[0].out
    last, state = unit(draw, state, width, orders)
    return nn.Sequential(*modules, *last), state


# --- Blocks -----------------------------------------------------------------------------------------------------------


class Block(nn.Module):
    """A piece of a network, drawn for inputs of a state; its outputs are of the state ``out``."""

    out: State

    @staticmethod
    def fits(state):
        """Return whether the block takes such inputs."""
        return True

    def extra_repr(self):
        shown = {
            name: value
            for name, value in vars(self).items()
            if name[0] != "_" and name != "training" and value is not None
        }
        if "out" in shown:
            shown["out"] = f"{shown['out'].kind} of {list(shown['out'].shape())[1:]}"
        return ", ".join(f"{name}={value}" for name, value in shown.items())


class Kind(NamedTuple):
    """A row of ``BLOCKS``."""

    make: type[Block]
    weight: float  # relative frequency
    takes: tuple[str, ...]  # kinds of states
    keeps: bool  # whether kind and size stay the same
    nests: bool  # whether it is made of branches, which may hold blocks


BLOCKS: list[Kind] = []


def block(weight, takes, keeps=True, nests=False):
    """Return a decorator that enters a class in ``BLOCKS``."""

    def enter(make):
        BLOCKS.append(Kind(make, weight, (takes,) if isinstance(takes, str) else takes, keeps, nests))
        return make

    return enter


@block(12, ALL)
class Plain(Block):
    def __init__(self, draw, state):
        super().__init__()
        self.layers, self.out = unit(draw, state)

    def forward(self, x):
        return self.layers(x)


@block(7, MAPS, keeps=False)
class Stride(Block):
    """A convolution that is strided or not padded."""

    fits = staticmethod(lambda state: state.size > 2)

    def __init__(self, draw, state):
        super().__init__()
        width = draw.width()
        kernel, stride, padding = draw.pick((3, 2, 1), (2, 2, 0), (3, 1, 0), (1, 2, 0), (3, 2, 0))
        groups = draw.divisor(math.gcd(state.width, width)) if draw.chance(0.2) else 1
        self.conv = of_rank("Conv", state)(
            state.width, width, kernel, stride, padding, groups=groups, bias=draw.chance(0.6)
        )
        self.out = State(state.kind, width, (state.size + 2 * padding - kernel) // stride + 1)
        self.after = ending(draw, self.out)

    def forward(self, x):
        return self.after(self.conv(x))


@block(2.5, MAPS, keeps=False)
class Transposed(Block):
    """A transposed convolution that doubles the size."""

    fits = staticmethod(lambda state: state.size <= 4)

    def __init__(self, draw, state):
        super().__init__()
        width = draw.width()
        kernel, padding = draw.pick((2, 0), (4, 1))
        groups = draw.divisor(math.gcd(state.width, width)) if draw.chance(0.3) else 1
        self.before = draw.spot(state, 0.15)
        self.conv = of_rank("ConvTranspose", state)(
            state.width, width, kernel, 2, padding, groups=groups, bias=draw.chance(0.7)
        )
        self.out = State(state.kind, width, 2 * state.size)
        self.after = ending(draw, self.out)

    def forward(self, x):
        return self.after(self.conv(self.before(x)))


@block(4, MAPS)
class Depthwise(Block):
    """A depthwise convolution, with one or two filters per channel, and a pointwise one."""

    def __init__(self, draw, state):
        super().__init__()
        hidden = state.wide(state.width * draw.pick(1, 1, 2))
        conv = of_rank("Conv", state)
        self.out = state.wide(draw.width())
        self.before = draw.spot(state, 0.15)
        self.depthwise = conv(state.width, hidden.width, 3, padding=1, groups=state.width, bias=draw.chance(0.5))
        self.between = ending(draw, hidden)
        self.pointwise = conv(hidden.width, self.out.width, 1, bias=draw.chance(0.5))
        self.after = ending(draw, self.out)

    def forward(self, x):
        x = self.between(self.depthwise(self.before(x)))
        return self.after(self.pointwise(x))


@block(6, MAPS, keeps=False)
class Pool(Block):
    fits = staticmethod(lambda state: state.size > 1)

    def __init__(self, draw, state):
        super().__init__()
        half = state.size // 2
        pool, size = draw.pick(
            (of_rank("MaxPool", state)(2), half),
            (of_rank("AvgPool", state)(2), half),
            (of_rank("MaxPool", state)(3, 2, 1), (state.size + 1) // 2),
            (of_rank("AdaptiveAvgPool", state)(2), 2),
            (of_rank("AdaptiveMaxPool", state)(1), 1),
            (of_rank("LPPool", state)(2, 2), half),
        )
        self.out = State(state.kind, state.width, size)
        self.layers = nn.Sequential(*draw.noises(state), pool, *draw.noises(self.out))

    def forward(self, x):
        return self.layers(x)


@block(1.5, MAPS, keeps=False)
class Upsample(Block):
    fits = staticmethod(lambda state: state.size <= 4)

    def __init__(self, draw, state):
        super().__init__()
        smooth = "bilinear" if state.kind == "image" else "linear"
        self.mode = draw.pick("nearest", smooth)
        self.noise = draw.spot(state)
        large = State(state.kind, state.width, 2 * state.size)
        self.layers, self.out = unit(draw, large)

    def forward(self, x):
        return self.layers(F.interpolate(self.noise(x), scale_factor=2, mode=self.mode))


@block(8, ALL, nests=True)
class Residual(Block):
    """A body and a shortcut, which is a projection where the widths differ."""

    def __init__(self, draw, state):
        super().__init__()
        width = state.width if draw.chance(0.65) else draw.width()
        self.add = draw.pick("plus", "plus", "in place", "function", "method")
        orders = {"NAL": 2, "LN": 1, "LNALN": 3, "L": 1} if self.add == "in place" else UNITS
        self.body, self.out = branch(draw, state, width, orders)
        self.shortcut = nn.Identity()
        if width != state.width or draw.chance(0.15):
            self.shortcut = nn.Sequential(layer(draw, state, width), *([norm(draw, self.out)] * draw.chance(0.4)))
        if draw.chance(0.12):
            self.shortcut = nn.Sequential(self.shortcut, *draw.noises(self.out, 1))
        self.after = nn.Sequential(*draw.noises(self.out, 0.15), *([activation(draw, self.out)] * draw.chance(0.5)))
        self.after.extend(draw.noises(self.out, 0.2))
        self.zero = draw.chance(0.1) and zero_last_norm(self.body)

    def forward(self, x):
        y, x = self.body(x), self.shortcut(x)
        if self.add == "in place":
            y += x
        elif self.add == "function":
            y = torch.add(y, x)
        elif self.add == "method":
            y = x.add(y)
        else:
            y = x + y
        return self.after(y)


@block(2.5, ALL, nests=True)
class PreActivation(Block):
    """A residual block whose norm and activation come before both of its branches."""

    def __init__(self, draw, state):
        super().__init__()
        self.out = state.wide(draw.width())
        self.before = nn.Sequential(norm(draw, state), activation(draw, state), *draw.noises(state, 0.3))
        self.body = branch(draw, state, self.out.width)[0]
        self.shortcut = layer(draw, state, self.out.width)
        self.noise = draw.spot(self.out)

    def forward(self, x):
        x = self.before(x)
        return self.noise(self.body(x) + self.shortcut(x))


@block(3, ALL, nests=True)
class Scaled(Block):
    """A residual block whose body is multiplied by a layer scale or by a scalar gain."""

    def __init__(self, draw, state):
        super().__init__()
        self.out = state
        self.body = branch(draw, state, state.width)[0]
        shape = draw.pick(state.aligned, state.aligned, (), (1,))
        self.scale = draw.parameter(*shape)
        self.noise = draw.spot(state, 0.15)

    def forward(self, x):
        return x + self.noise(self.scale * self.body(x))


@block(3, ALL, nests=True)
class Dense(Block):
    """Each layer's outputs are concatenated with its inputs."""

    def __init__(self, draw, state):
        super().__init__()
        self.dim = state.dim
        self.first = draw.chance(0.5)  # whether the inputs come first
        self.layers = nn.ModuleList()
        for _ in range(draw.pick(1, 2, 2, 3)):
            body, grown = branch(draw, state, draw.width(1, 4))
            self.layers.append(body)
            state = state.wide(state.width + grown.width)
        self.out = state
        self.noise = draw.spot(state)

    def forward(self, x):
        for each in self.layers:
            parts = [x, each(x)] if self.first else [each(x), x]
            x = torch.cat(parts, self.dim)
        return self.noise(x)


@block(3, ALL, nests=True)
class Inception(Block):
    """Branches side by side, concatenated; sometimes the inputs themselves are among them."""

    def __init__(self, draw, state):
        super().__init__()
        self.dim = state.dim
        made = [branch(draw, state, draw.width(1, 5)) for _ in range(draw.pick(2, 2, 3))]
        if draw.chance(0.2):
            made.insert(draw.pick(0, 1), (nn.Identity(), state))
        self.branches = nn.ModuleList([body for body, _ in made])
        self.out = state.wide(sum(each.width for _, each in made))
        self.after = ending(draw, self.out) if draw.chance(0.5) else draw.spot(self.out)

    def forward(self, x):
        return self.after(torch.cat([each(x) for each in self.branches], self.dim))


@block(3, ALL, nests=True)
class Split(Block):
    """Two parts of the channels go different ways and come together again."""

    fits = staticmethod(lambda state: state.width > 1)

    def __init__(self, draw, state):
        super().__init__()
        self.dim, self.way = state.dim, draw.pick("chunk", "split", "index", "narrow")
        self.cut = (state.width + 1) // 2 if self.way == "chunk" else draw.random.randint(1, state.width - 1)
        self.join = draw.pick("cat", "cat", "swapped", "sum")
        self.sizes = [self.cut, state.width - self.cut]
        self.left, left = branch(draw, state.wide(self.cut))
        self.right, right = branch(draw, state.wide(self.sizes[1]), left.width if self.join == "sum" else None)
        if self.join != "sum" and draw.chance(0.3):
            self.right, right = draw.spot(state.wide(self.sizes[1])), state.wide(self.sizes[1])
        self.out = left if self.join == "sum" else state.wide(left.width + right.width)

    def parts(self, x):
        if self.way == "chunk":
            return x.chunk(2, self.dim)
        if self.way == "split":
            return torch.split(x, self.sizes, self.dim)
        if self.way == "narrow":
            return x.narrow(self.dim, 0, self.cut), x.narrow(self.dim, self.cut, self.sizes[1])
        if self.dim == 1:
            return x[:, : self.cut], x[:, self.cut :]
        return x[..., : self.cut], x[..., self.cut :]

    def forward(self, x):
        left, right = self.parts(x)
        left, right = self.left(left), self.right(right)
        if self.join == "sum":
            return left + right
        return torch.cat([right, left] if self.join == "swapped" else [left, right], self.dim)


@block(3, ALL)
class Glu(Block):
    """A gated linear unit in several spellings."""

    def __init__(self, draw, state):
        super().__init__()
        self.out = state.wide(draw.width(1, 8))
        self.dim, self.way = state.dim, draw.pick("sigmoid", "silu", "gelu", "function", "module")
        double = state.wide(2 * self.out.width)
        self.fc = nn.Sequential(layer(draw, state, double.width), *draw.noises(double, 0.2))
        self.noise, self.after = draw.spot(self.out, 0.15), draw.spot(self.out)
        self.glu = nn.GLU(self.dim) if self.way == "module" else None

    def forward(self, x):
        x = self.fc(x)
        if self.way == "module":
            return self.after(self.glu(x))
        if self.way == "function":
            return self.after(F.glu(x, self.dim))
        value, gate = x.chunk(2, self.dim)
        return self.after(self.noise(value) * getattr(F, self.way)(gate))


@block(3, ALL, nests=True)
class Gate(Block):
    """A product of two branches."""

    def __init__(self, draw, state):
        super().__init__()
        self.left, self.out = branch(draw, state)
        self.right = branch(draw, state, self.out.width)[0]
        if state.width == self.out.width and draw.chance(0.3):
            self.left = nn.Identity()
        self.dim, self.way = state.dim, draw.pick("sigmoid", "tanh", "softplus", "silu", "softmax", "nothing")
        self.noise = draw.spot(self.out)

    def gate(self, x):
        if self.way == "nothing":
            return x
        return F.softmax(x, self.dim) if self.way == "softmax" else getattr(F, self.way)(x)

    def forward(self, x):
        return self.noise(self.left(x) * self.gate(self.right(x)))


@block(1.5, ALL, nests=True)
class Sum(Block):
    """A sum of three branches, one of them perhaps the input."""

    def __init__(self, draw, state):
        super().__init__()
        width = draw.width()
        self.way = draw.pick("plus", "stack", "sum", "weighted")
        self.branches = nn.ModuleList([branch(draw, state, width)[0] for _ in range(3)])
        self.out = state.wide(width)
        if state.width == width and draw.chance(0.8):
            self.branches[2] = draw.spot(state)
        self.weight = draw.parameter(3) if self.way == "weighted" else None
        self.after = ending(draw, self.out)

    def forward(self, x):
        a, b, c = (each(x) for each in self.branches)
        if self.way == "stack":
            return self.after(torch.stack([a, b, c]).mean(0))
        if self.way == "weighted":
            return self.after(self.weight[0] * a + self.weight[1] * b + self.weight[2] * c)
        return self.after(sum([a, b, c]) if self.way == "sum" else a + b - c)


@block(2.5, (*MAPS, "sequence"))
class SqueezeExcite(Block):
    """Channels are multiplied by gates that a small network makes from their means."""

    def __init__(self, draw, state):
        super().__init__()
        self.out = state
        self.positions, self.dim = state.positions, state.dim
        self.flat = state.kind == "sequence" or draw.chance(0.5)  # whether the gates are made by linear layers
        squeezed = State("vector", state.width) if self.flat else state._replace(size=1)
        hidden = squeezed.wide(draw.width(1, 4))
        self.before = draw.spot(state, 0.2)
        down, up = layer(draw, squeezed, hidden.width), layer(draw, hidden, state.width)
        self.gate = nn.Sequential(
            down, activation(draw, hidden, True), *draw.noises(hidden), up, *draw.noises(squeezed, 0.1)
        )
        self.gate.append(draw.pick(nn.Sigmoid, nn.Hardsigmoid, nn.Tanh)())
        self.gate.extend(draw.noises(squeezed, 0.15))
        self.noise = draw.spot(state, 0.2)

    def forward(self, x):
        x = self.before(x)
        gate = self.gate(x.mean(self.positions, keepdim=not self.flat))
        if self.flat:
            gate = gate.view(len(x), *(-1 if dim == self.dim else 1 for dim in range(1, x.dim())))
        return self.noise(x * gate)


@block(3, MAPS)
class Shuffle(Block):
    """A channel shuffle, mostly between two grouped convolutions."""

    fits = staticmethod(lambda state: state.width > 3)

    def __init__(self, draw, state):
        super().__init__()
        self.groups = draw.divisor(state.width, 2)
        self.module = nn.ChannelShuffle(self.groups) if draw.chance(0.3) else None
        conv = of_rank("Conv", state)
        self.out = state
        self.first = conv(state.width, state.width, 1, groups=self.groups)
        self.between = ending(draw, state)
        self.second = conv(state.width, state.width, 3, padding=1, groups=draw.pick(1, self.groups, state.width))
        self.after = ending(draw, state)

    def forward(self, x):
        x = self.between(self.first(x))
        if self.module is not None:
            return self.after(self.second(self.module(x)))
        x = x.view(len(x), self.groups, -1, *x.shape[2:]).transpose(1, 2).flatten(1, 2)
        return self.after(self.second(x))


@block(2, "image", keeps=False)
class PixelShuffle(Block):
    fits = staticmethod(lambda state: state.size <= 4)

    def __init__(self, draw, state):
        super().__init__()
        self.out = State("image", draw.width(1, 3), 2 * state.size)
        wide = state.wide(4 * self.out.width)
        self.fc = nn.Sequential(layer(draw, state, wide.width), *draw.noises(wide, 0.3))
        self.shuffle = nn.PixelShuffle(2)
        self.noise = draw.spot(self.out)

    def forward(self, x):
        return self.noise(self.shuffle(self.fc(x)))


@block(0.7, "image", keeps=False)
class PixelUnshuffle(Block):
    fits = staticmethod(lambda state: state.size % 2 == 0 and state.width <= 4)

    def __init__(self, draw, state):
        super().__init__()
        self.unshuffle = nn.PixelUnshuffle(2)
        self.out = State("image", 4 * state.width, state.size // 2)
        self.noise = draw.spot(self.out, 0.3)

    def forward(self, x):
        return self.noise(self.unshuffle(x))


@block(2, ALL)
class Slice(Block):
    """Some of the channels go no further."""

    fits = staticmethod(lambda state: state.width > 1)

    def __init__(self, draw, state):
        super().__init__()
        step = draw.pick(1, 1, 1, 2)
        start = draw.pick(0, 0, draw.random.randint(0, state.width - 1))
        stop = state.width if start or step == 2 else draw.random.randint(1, state.width - 1)
        self.dim, self.slice = state.dim, slice(start, stop, step)
        self.out = state.wide(len(range(start, stop, step)))
        self.before, self.noise = draw.spot(state, 0.3), draw.spot(self.out, 0.2)

    def forward(self, x):
        x = self.before(x)
        x = x[:, self.slice] if self.dim == 1 else x[..., self.slice]
        return self.noise(x)


@block(0.7, ALL)
class SliceAssign(Block):
    """Some of the channels of a copy are overwritten."""

    fits = staticmethod(lambda state: state.width > 1)

    def __init__(self, draw, state):
        super().__init__()
        self.out, self.dim = state, state.dim
        self.way, self.first = draw.pick("layer", "scale", "zero"), draw.random.randint(1, state.width - 1)
        self.fc = layer(draw, state, self.first) if self.way == "layer" else None
        self.before, self.noise = draw.spot(state), draw.spot(state)

    def forward(self, x):
        y = self.before(x).clone()
        part = (slice(None), slice(self.first)) if self.dim == 1 else (..., slice(self.first))
        if self.way == "layer":
            y[part] = self.fc(x)
        elif self.way == "scale":
            y[part] *= 0.5
        else:
            y[part] = 0.0
        return self.noise(y)


@block(2, ALL)
class Reorder(Block):
    """Channels or positions change places."""

    def __init__(self, draw, state):
        super().__init__()
        self.out, self.dim, self.positions = state, state.dim, state.positions
        ways = ["flip", "roll", "index", "index_select"]
        self.way = draw.pick(*ways, *(["mirror", "shift"] if state.rank else []), *(["turn"] * (state.rank == 2)))
        if "index" in self.way:
            self.register_buffer("order", torch.tensor(draw.random.sample(range(state.width), state.width)))
        self.before, self.after = draw.spot(state), draw.spot(state)

    def reorder(self, x):
        if self.way == "index":
            return x[:, self.order] if self.dim == 1 else x[..., self.order]
        if self.way == "index_select":
            return x.index_select(self.dim, self.order)
        if self.way == "turn":
            return x.permute(0, 1, 3, 2)
        if self.way in ("flip", "roll"):
            return x.flip(self.dim) if self.way == "flip" else torch.roll(x, 1, self.dim)
        return x.flip(self.positions) if self.way == "mirror" else torch.roll(x, 1, self.positions[-1])

    def forward(self, x):
        return self.after(self.reorder(self.before(x)))


@block(1, ALL)
class Repeat(Block):
    """Each channel comes twice, or once more for its other half."""

    fits = staticmethod(lambda state: state.width <= 6)

    def __init__(self, draw, state):
        super().__init__()
        self.dim, self.way = state.dim, draw.pick("cat", "interleave", "negative", "expand")
        self.out = state.wide(2 * state.width)
        self.before, self.after = draw.spot(state), draw.spot(self.out)

    def forward(self, x):
        x = self.before(x)
        if self.way == "interleave":
            x = x.repeat_interleave(2, self.dim)
        elif self.way == "expand":
            x = torch.stack([x, x], self.dim).flatten(self.dim, self.dim + 1)
        else:
            x = torch.cat([x, -x if self.way == "negative" else x], self.dim)
        return self.after(x)


@block(0.8, ALL)
class Pad(Block):
    """Constant channels come before and behind the others."""

    def __init__(self, draw, state):
        super().__init__()
        self.pad, self.value = [0, 0] * (state.rank if state.kind in MAPS else 0), draw.pick(0.0, 0.0, 0.5)
        extra = [draw.pick(0, 1, 2), draw.pick(1, 2)]
        self.pad += extra
        self.out = state.wide(state.width + sum(extra))
        self.before, self.after = draw.spot(state), draw.spot(self.out)

    def forward(self, x):
        return self.after(F.pad(self.before(x), self.pad, value=self.value))


@block(1, ALL)
class Maxout(Block):
    """The larger one of each two channels, which are neighbours or half the width apart."""

    def __init__(self, draw, state):
        super().__init__()
        self.out = state.wide(draw.width(1, 6))
        self.dim, self.apart = state.dim, draw.chance(0.5)
        wide = state.wide(2 * self.out.width)
        self.fc = nn.Sequential(layer(draw, state, wide.width), *draw.noises(wide, 0.2))
        self.noise = draw.spot(self.out)

    def forward(self, x):
        x = self.fc(x)
        if self.apart:
            return self.noise(torch.maximum(*x.chunk(2, self.dim)))
        return self.noise(x.unflatten(self.dim, (-1, 2)).amax(self.dim + 1))


@block(2, ALL)
class Twice(Block):
    """One layer is used twice, one after the other."""

    def __init__(self, draw, state):
        super().__init__()
        width = draw.width()
        self.out = state.wide(width)
        self.first = layer(draw, state, width)
        self.shared = nn.Sequential(*draw.noises(self.out), layer(draw, self.out, width), *draw.noises(self.out))
        self.act = nn.Sequential(activation(draw, self.out), *draw.noises(self.out))

    def forward(self, x):
        x = self.shared(self.first(x))
        return self.shared(self.act(x))


@block(1, ALL, nests=True)
class Siamese(Block):
    """One layer is used on the outputs of two branches."""

    def __init__(self, draw, state):
        super().__init__()
        self.left, middle = branch(draw, state)
        self.right = branch(draw, state, middle.width)[0]
        self.shared, self.out = unit(draw, middle)
        self.dim, self.way = state.dim, draw.pick("sum", "difference", "cat")
        if self.way == "cat":
            self.out = self.out.wide(2 * self.out.width)

    def forward(self, x):
        left, right = self.shared(self.left(x)), self.shared(self.right(x))
        if self.way == "cat":
            return torch.cat([left, right], self.dim)
        return left + right if self.way == "sum" else left - right


@block(2, ALL)
class SharedActivation(Block):
    """``act``, which may hold noise, stands at two places of the same width."""

    def __init__(self, draw, state):
        super().__init__()
        self.out = state.wide(draw.width())
        self.fc1, self.fc2 = layer(draw, state, self.out.width), layer(draw, self.out, self.out.width)
        self.act = nn.Sequential(activation(draw, self.out, True), *draw.noises(self.out, 0.7))
        self.norm = norm(draw, self.out) if draw.chance(0.3) else nn.Identity()
        self.fc3 = layer(draw, self.out, self.out.width) if draw.chance(0.5) else nn.Identity()

    def forward(self, x):
        x = self.act(self.fc1(x))
        return self.fc3(self.act(self.norm(self.fc2(x))))


@block(2, ALL)
class Tied(Block):
    """Two layers hold one weight: the same parameter, or its transpose in linear layers."""

    def __init__(self, draw, state):
        super().__init__()
        self.turned = state.kind in ROWS and draw.chance(0.5)
        hidden = state.wide(draw.width() if self.turned else state.width)
        make = nn.Linear if state.kind in ROWS else of_rank("Conv", state)
        kernel = [] if state.kind in ROWS else [1]
        self.out = state
        self.first = make(state.width, hidden.width, *kernel, bias=draw.chance(0.8))
        self.between = ending(draw, hidden)
        self.second = None
        if not self.turned:
            self.second = make(state.width, state.width, *kernel, bias=draw.chance(0.8))
            self.second.weight = self.first.weight
        self.noise = draw.spot(state)

    def forward(self, x):
        x = self.between(self.first(x))
        x = F.linear(x, self.first.weight.t()) if self.second is None else self.second(x)
        return self.noise(x)


@block(1, ALL)
class Borrowed(Block):
    """Functional layers take the parameters of a module, which is called itself or not."""

    def __init__(self, draw, state):
        super().__init__()
        self.out = state.wide(draw.width())
        self.a = nn.Linear(state.width, self.out.width)
        if state.kind in MAPS:
            self.a = of_rank("Conv", state)(state.width, self.out.width, 1)
        self.act = nn.Sequential(activation(draw, self.out), *draw.noises(self.out))
        self.called, self.biased = draw.chance(0.5), draw.chance(0.5)
        self.function = {"image": "conv2d", "signal": "conv1d"}.get(state.kind, "linear")

    def forward(self, x):
        y = self.act(getattr(F, self.function)(x, self.a.weight, self.a.bias if self.biased else None))
        return y + self.a(x) if self.called else y


@block(1.5, ALL)
class Keyword(Block):
    """Layers are called by keyword."""

    def __init__(self, draw, state):
        super().__init__()
        self.out = state.wide(draw.width())
        self.fc = layer(draw, state, self.out.width)
        self.norm = norm(draw, self.out)
        self.act = ending(draw, self.out)
        self.named = not isinstance(self.norm, ChannelNorm | RowBatchNorm | nn.RMSNorm)

    def forward(self, x):
        h = self.fc(input=x)
        h = self.norm(input=h) if self.named else self.norm(x=h)
        return self.act(input=h)


@block(1.5, ALL)
class Buffer(Block):
    """Channels or positions are multiplied by a buffer, parts of which may be zero."""

    def __init__(self, draw, state):
        super().__init__()
        self.out = state
        shape = draw.pick(state.aligned, state.aligned, state.shape()[1:], ())
        values = torch.randn(shape)
        if draw.chance(0.4):
            values = values * (torch.rand(shape) < 0.7)
        self.register_buffer("values", values, persistent=draw.chance(0.8))
        self.noise, self.plus = draw.spot(state), draw.chance(0.2)

    def forward(self, x):
        return self.noise(x + self.values if self.plus else x * self.values)


@block(1.5, ALL)
class Affine(Block):
    """Arithmetic with constants and with parameters of the block."""

    def __init__(self, draw, state):
        super().__init__()
        self.out = state
        self.way = draw.pick("constants", "parameters", "bias", "minus", "squared", "absolute")
        self.scale = draw.parameter(*state.aligned) if self.way == "parameters" else None
        self.shift = draw.parameter(*state.aligned) if self.way in ("parameters", "bias") else None
        self.before, self.after = draw.spot(state, 0.2), draw.spot(state, 0.2)

    def calculate(self, x):
        if self.way == "parameters":
            return torch.addcmul(self.shift, self.scale, x)
        if self.way == "bias":
            return x + self.shift
        if self.way == "squared":
            return x.square() * 0.3
        if self.way == "absolute":
            return x.abs()
        return 1 - x if self.way == "minus" else x * 0.5 + 0.1

    def forward(self, x):
        return self.after(self.calculate(self.before(x)))


@block(1.5, ALL)
class Statistics(Block):
    """Norms written by hand, most of which mix channels."""

    def __init__(self, draw, state):
        super().__init__()
        self.out, self.dim, self.positions = state, state.dim, state.positions
        ways = ["centre", "unit", "softmax", "mean square", "maximum", "cumulative"]
        self.way = draw.pick(*ways, *(["response", "spread"] if state.rank else []))
        self.before, self.after = draw.spot(state, 0.2), draw.spot(state)

    def over_channels(self, x):
        if self.way == "centre":
            return x - x.mean(self.dim, keepdim=True)
        if self.way == "unit":
            return F.normalize(x, dim=self.dim)
        if self.way == "softmax":
            return F.softmax(x, self.dim)
        if self.way == "maximum":
            return x / (1 + x.abs().amax(self.dim, keepdim=True))
        if self.way == "cumulative":
            return x.cumsum(self.dim)
        return x * torch.rsqrt(x.pow(2).mean(self.dim, keepdim=True) + 1e-3)

    def forward(self, x):
        x = self.before(x)
        if self.way == "response":  # each channel's share of all channels' norms, as in ConvNeXt's second version
            sizes = torch.linalg.vector_norm(x, dim=self.positions, keepdim=True)
            return self.after(x + x * sizes / (sizes.mean(self.dim, keepdim=True) + 1e-3))
        if self.way == "spread":
            return self.after(x - x.mean(self.positions, keepdim=True))
        return self.after(self.over_channels(x))


@block(1.5, ALL)
class Where(Block):
    """Operations that choose between values element by element."""

    def __init__(self, draw, state):
        super().__init__()
        self.a, self.out = unit(draw, state)
        self.b = layer(draw, state, self.out.width)
        self.a = nn.Sequential(self.a, *draw.noises(self.out))
        self.way = draw.pick("where", "fill", "mask", "clamp", "maximum", "zeros", "pattern")
        if self.way == "pattern":
            self.register_buffer("pattern", torch.rand(self.out.aligned) < 0.6)
        self.noise = draw.spot(self.out)

    def choose(self, a, b):
        if self.way == "fill":
            return a.masked_fill(b > 0, 0.5)
        if self.way == "mask":
            return a * (b > 0)
        if self.way == "clamp":
            return a.clamp(-0.5, 0.5) + b
        if self.way == "maximum":
            return torch.maximum(a, b)
        if self.way == "zeros":
            return torch.where(a > 0, b, torch.zeros_like(b))
        return torch.where(self.pattern if self.way == "pattern" else a > 0, a, b)

    def forward(self, x):
        return self.noise(self.choose(self.a(x), self.b(x)))


@block(1.5, ALL)
class Einsum(Block):
    """A parameter of the block and an einsum or a matrix product make a linear layer."""

    def __init__(self, draw, state):
        super().__init__()
        self.out = state.wide(draw.width())
        self.weight = nn.Parameter(torch.randn(self.out.width, state.width) / state.width**0.5)
        self.way = draw.pick("einsum", "matmul") if state.kind in ROWS else "einsum"
        positions = {"image": "hw", "signal": "t"}.get(state.kind, "")
        self.equation = f"bi{positions},oi->bo{positions}" if state.kind in MAPS else "...i,oi->...o"
        self.before, self.after = draw.spot(state, 0.15), ending(draw, self.out)

    def forward(self, x):
        x = self.before(x)
        x = x @ self.weight.T if self.way == "matmul" else torch.einsum(self.equation, x, self.weight)
        return self.after(x)


@block(1, ALL)
class Grouped(Block):
    """Groups of channels, of sizes written into the code, are normalised or share one linear layer."""

    fits = staticmethod(lambda state: state.width > 3)

    def __init__(self, draw, state):
        super().__init__()
        self.out, self.dim = state, state.dim
        self.groups = draw.divisor(state.width, 2)
        self.each = state.width // self.groups
        self.way = draw.pick("softmax", "centre", "linear", "swap")
        self.fc = nn.Linear(self.each, self.each) if self.way == "linear" else None
        self.before, self.after = draw.spot(state), draw.spot(state)

    def mix(self, x):
        if self.way == "softmax":
            return x.softmax(-1)
        if self.way == "centre":
            return x - x.mean(-1, keepdim=True)
        return self.fc(x) if self.way == "linear" else x.flip(-2)

    def forward(self, x):
        x = self.before(x).movedim(self.dim, -1)
        x = self.mix(x.reshape(*x.shape[:-1], self.groups, self.each)).flatten(-2)
        return self.after(x.movedim(-1, self.dim))


@block(1.5, ALL)
class Dead(Block):
    """Some layers are never called; the outputs of others are not used, or only multiplied by zero."""

    def __init__(self, draw, state):
        super().__init__()
        self.layers, self.out = unit(draw, state)
        self.way = draw.pick("unused", "unused", "discarded", "shape", "zero")
        noise, draw.noise = draw.noise, draw.noise and self.way != "unused"
        self.other = unit(draw, state, orders={"LA": 1, "LNA": 1, "L": 1})[0]
        draw.noise = noise

    def forward(self, x):
        y = self.layers(x)
        if self.way == "unused":
            return y
        other = self.other(x)
        if self.way == "zero":
            return y + 0 * other.sum()
        return y / len(other) if self.way == "shape" else y


@block(2, "image")
class ChannelsLast(Block):
    """Linear layers on the last dimension of a permuted image."""

    def __init__(self, draw, state):
        super().__init__()
        last = State("sequence", state.width)  # all but the last dimension are positions
        self.out = state.wide(draw.width())
        hidden, end = last.wide(draw.width()), last.wide(self.out.width)
        self.norm = norm(draw, last) if state.width > 1 and draw.chance(0.5) else nn.Identity()
        if isinstance(self.norm, RowBatchNorm):
            self.norm = nn.LayerNorm(state.width)
        self.fc1, self.act = nn.Linear(state.width, hidden.width), activation(draw, hidden, True)
        self.noise = MultiplicativeNoise(hidden.width, dim=-1) if draw.noise and draw.chance(0.4) else nn.Identity()
        self.fc2 = nn.Linear(hidden.width, end.width)

    def forward(self, x):
        x = self.norm(x.permute(0, 2, 3, 1))
        x = self.fc2(self.noise(self.act(self.fc1(x))))
        return x.permute(0, 3, 1, 2)


@block(3, MAPS, nests=True)
class UNet(Block):
    """A body on a coarser grid, and a skip connection around it."""

    fits = staticmethod(lambda state: state.size >= 4 and state.size % 2 == 0)

    def __init__(self, draw, state):
        super().__init__()
        coarse = state._replace(size=state.size // 2)
        self.pool = draw.pick(of_rank("MaxPool", state), of_rank("AvgPool", state))(2)
        self.body, inner = branch(draw, coarse)
        self.up = draw.pick(nn.Upsample(scale_factor=2), None)
        if self.up is None:
            self.up = of_rank("ConvTranspose", state)(inner.width, inner.width, 2, 2)
        self.skip = draw.spot(state)
        joined = state.wide(state.width + inner.width)
        self.fuse, self.out = unit(draw, joined, orders={"LA": 2, "LNA": 2, "L": 1})

    def forward(self, x):
        y = self.up(self.body(self.pool(x)))
        return self.fuse(torch.cat([self.skip(x), y], 1))


@block(1, "vector")
class Bilinear(Block):
    def __init__(self, draw, state):
        super().__init__()
        self.left, left = unit(draw, state)
        self.right, right = unit(draw, state)
        self.out = state.wide(draw.width(1, 6))
        self.bilinear = nn.Bilinear(left.width, right.width, self.out.width)
        self.noise = draw.spot(self.out)

    def forward(self, x):
        return self.noise(self.bilinear(self.left(x), self.right(x)))


# --- Blocks for sequences ---------------------------------------------------------------------------------------------


@block(2, "sequence")
class Position(Block):
    """A parameter for each position is added or concatenated."""

    def __init__(self, draw, state):
        super().__init__()
        self.cat, extra = draw.chance(0.25), draw.width(1, 3)
        self.positions = draw.parameter(1, state.size, extra if self.cat else state.width)
        self.out = state.wide(state.width + extra) if self.cat else state
        self.noise = draw.spot(self.out)

    def forward(self, x):
        if self.cat:
            return self.noise(torch.cat([x, self.positions.expand(len(x), -1, -1)], -1))
        return self.noise(x + self.positions)


class Attention(Block):
    """What spellings of self attention share: a norm before, noise on their way, perhaps a residual connection."""

    def __init__(self, draw, state):
        super().__init__()
        self.out = state
        self.norm = norm(draw, state) if draw.chance(0.4) else nn.Identity()
        self.residual = draw.chance(0.7)
        self.noise = draw.spot(state, 0.15)

    def forward(self, x):
        y = self.noise(self.attend(self.norm(x)))
        return x + y if self.residual else y


@block(4, "sequence")
class MultiHead(Attention):
    """``nn.MultiheadAttention``, with or without its weights as an output."""

    def __init__(self, draw, state):
        super().__init__(draw, state)
        heads, self.weights = draw.divisor(state.width), draw.chance(0.5)
        self.attention = nn.MultiheadAttention(
            state.width,
            heads,
            bias=draw.chance(0.8),
            batch_first=True,
            add_zero_attn=draw.chance(0.05),
            add_bias_kv=draw.chance(0.05),
        )
        self.keys = layer(draw, state, state.width) if draw.chance(0.2) else None

    def attend(self, x):
        keys = x if self.keys is None else self.keys(x)
        y, _ = self.attention(x, keys, keys, need_weights=self.weights)
        return y


@block(4, "sequence")
class Fused(Attention):
    """One layer makes queries, keys and values for ``scaled_dot_product_attention``."""

    def __init__(self, draw, state):
        super().__init__(draw, state)
        self.heads, self.each = draw.pick(1, 2, 2, 3), draw.pick(1, 2, 3, 4)
        self.way, self.causal = draw.pick("reshape", "chunk", "unflatten", "split"), draw.chance(0.3)
        inner = state.wide(self.heads * self.each)
        self.qkv = nn.Linear(state.width, 3 * inner.width, bias=draw.chance(0.7))
        self.between = draw.spot(inner)
        self.proj = nn.Linear(inner.width, state.width)

    def heads_of(self, x):
        batch, length, _ = x.shape
        if self.way == "reshape":
            return self.qkv(x).reshape(batch, length, 3, self.heads, self.each).permute(2, 0, 3, 1, 4)
        if self.way == "unflatten":
            return self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        x = self.qkv(x)
        parts = x.chunk(3, -1) if self.way == "chunk" else x.split(self.heads * self.each, -1)
        return [part.view(batch, length, self.heads, self.each).transpose(1, 2) for part in parts]

    def attend(self, x):
        q, k, v = self.heads_of(x)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        return self.proj(self.between(y.transpose(1, 2).flatten(2)))


@block(4, "sequence")
class Separate(Attention):
    """Layers of their own for queries, keys and values, a matrix product and a softmax; causal or not."""

    def __init__(self, draw, state):
        super().__init__(draw, state)
        self.heads, each = draw.pick(1, 2, 3), draw.pick(1, 2, 3)
        value = draw.pick(each, each, 2)
        self.q, self.k = (nn.Linear(state.width, self.heads * each, bias=draw.chance(0.7)) for _ in range(2))
        self.v = nn.Linear(state.width, self.heads * value, bias=draw.chance(0.7))
        self.on_values = draw.spot(state.wide(self.heads * value))
        self.on_heads = nn.Identity()
        if draw.noise and draw.chance(0.15):
            self.on_heads = MultiplicativeNoise(self.heads, dim=1)
        self.proj = nn.Linear(self.heads * value, state.width)
        self.causal = draw.chance(0.3)
        if self.causal:
            self.register_buffer("future", torch.ones(state.size, state.size, dtype=torch.bool).triu(1))

    def split(self, x):
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def attend(self, x):
        q, k, v = self.split(self.q(x)), self.split(self.k(x)), self.split(self.on_values(self.v(x)))
        scores = torch.matmul(q, k.transpose(-2, -1)) / q.shape[-1] ** 0.5
        if self.causal:
            scores = scores.masked_fill(self.future, -torch.inf)
        y = self.on_heads(torch.matmul(scores.softmax(-1), v))
        return self.proj(y.transpose(1, 2).flatten(2))


@block(2.5, "sequence")
class GroupedQuery(Attention):
    """Several heads of queries share a head of keys and values."""

    def __init__(self, draw, state):
        super().__init__(draw, state)
        self.shared, self.per, self.each = draw.pick(1, 2), draw.pick(2, 2, 3), draw.pick(1, 2, 3)
        self.way = draw.pick("interleave", "expand", "option")
        inner = state.wide(self.shared * self.per * self.each)
        self.q = nn.Linear(state.width, inner.width, bias=draw.chance(0.5))
        self.k, self.v = (nn.Linear(state.width, self.shared * self.each, bias=draw.chance(0.5)) for _ in range(2))
        self.between = draw.spot(inner)
        self.proj = nn.Linear(inner.width, state.width, bias=draw.chance(0.5))

    def split(self, x):
        return x.view(*x.shape[:2], -1, self.each).transpose(1, 2)

    def repeat(self, x):
        if self.way == "interleave":
            return x.repeat_interleave(self.per, 1)
        if self.way == "expand":
            return x[:, :, None].expand(-1, -1, self.per, -1, -1).flatten(1, 2)
        return x

    def attend(self, x):
        q, k, v = self.split(self.q(x)), self.repeat(self.split(self.k(x))), self.repeat(self.split(self.v(x)))
        y = F.scaled_dot_product_attention(q, k, v, enable_gqa=self.way == "option")
        return self.proj(self.between(y.transpose(1, 2).flatten(2)))


@block(3, "sequence")
class EncoderLayer(Block):
    """``nn.TransformerEncoderLayer``, with noise around it alone."""

    fits = staticmethod(lambda state: state.width > 1)

    def __init__(self, draw, state):
        super().__init__()
        self.out = state
        self.before, self.after = draw.spot(state, 0.15), draw.spot(state)
        self.layer = nn.TransformerEncoderLayer(
            state.width,
            draw.divisor(state.width),
            draw.width(),
            activation=draw.pick("relu", "gelu"),
            batch_first=True,
            norm_first=draw.chance(0.5),
        )

    def forward(self, x):
        return self.after(self.layer(self.before(x)))


@block(2, "sequence")
class Mixer(Block):
    """A small network on positions and one on channels, each with a residual connection."""

    def __init__(self, draw, state):
        super().__init__()
        self.out = state
        turned = State("sequence", state.size, state.width)
        self.norm1 = norm(draw, state) if draw.chance(0.6) else nn.Identity()
        self.positions = unit(draw, turned, state.size, {"LAL": 1})[0]
        self.channels = unit(draw, state, state.width, {"LAL": 1, "NLAL": 1})[0]
        self.noise = draw.spot(state)

    def forward(self, x):
        x = x + self.positions(self.norm1(x).transpose(1, 2)).transpose(1, 2)
        return self.noise(x + self.channels(x))


@block(1.5, "sequence")
class Recurrent(Block):
    def __init__(self, draw, state):
        super().__init__()
        hidden, both = draw.width(1, 5), draw.chance(0.3)
        make = draw.pick(nn.LSTM, nn.LSTM, nn.GRU, nn.RNN)
        self.before = draw.spot(state, 0.2)
        self.rnn = make(state.width, hidden, batch_first=True, bidirectional=both, num_layers=draw.pick(1, 1, 2))
        self.out = state.wide(hidden * (1 + both))
        self.noise = draw.spot(self.out)

    def forward(self, x):
        return self.noise(self.rnn(self.before(x))[0])


@block(1.5, "sequence")
class TimeConv(Block):
    """A convolution along a transposed sequence."""

    def __init__(self, draw, state):
        super().__init__()
        signal = State("signal", state.width, state.size)
        self.layers, end = unit(draw, signal)
        self.out = state.wide(end.width)

    def forward(self, x):
        return self.layers(x.transpose(1, 2)).transpose(1, 2)


# --- Blocks from one kind of state to another -------------------------------------------------------------------------


@block(3, (*MAPS, "sequence"), keeps=False)
class Flatten(Block):
    """All positions become features."""

    fits = staticmethod(lambda state: state.features <= 200)

    def __init__(self, draw, state):
        super().__init__()
        self.size, self.way = state.features, draw.pick("flatten", "module", "reshape", "fixed", "channels last")
        self.last = state.rank and state.kind in MAPS and self.way == "channels last"
        flat = State("vector", state.features)
        self.before, self.noise = draw.spot(state), draw.spot(flat)
        self.flatten = nn.Flatten() if self.way == "module" else None
        self.after, self.out = unit(draw, flat, orders={"LA": 5, "LNA": 1, "L": 2})

    def forward(self, x):
        x = self.before(x)
        if self.last:
            x = x.movedim(1, -1)
        if self.way == "fixed":
            x = x.reshape(-1, self.size)
        elif self.way == "reshape":
            x = x.reshape(x.shape[0], -1)
        else:
            x = self.flatten(x) if self.way == "module" else torch.flatten(x, 1)
        return self.after(self.noise(x))


@block(3, (*MAPS, "sequence"), keeps=False)
class Reduce(Block):
    """Positions are averaged, or the largest, the first or the last is taken."""

    def __init__(self, draw, state):
        super().__init__()
        self.positions = state.positions
        self.way = draw.pick("mean", "mean", "max", "sum", "weighted", *(["first", "last"] * (state.rank == 1)))
        self.out = State("vector", state.width)
        self.before, self.noise = draw.spot(state), draw.spot(self.out)
        self.score = layer(draw, state, 1) if self.way == "weighted" else None

    def reduce(self, x):
        if self.way == "weighted":
            weights = F.softmax(self.score(x).flatten(1), 1).view(len(x), *(x.shape[dim] for dim in self.positions))
            return (x * weights.unsqueeze(1 if 1 not in self.positions else -1)).sum(self.positions)
        if self.way in ("first", "last"):
            return x.select(self.positions[0], 0 if self.way == "first" else -1)
        if self.way == "max":
            return x.amax(self.positions)
        return x.mean(self.positions) if self.way == "mean" else x.sum(self.positions) / 4

    def forward(self, x):
        return self.noise(self.reduce(self.before(x)))


@block(1.5, MAPS, keeps=False)
class ToSequence(Block):
    """Pixels become a sequence, as in a vision transformer."""

    fits = staticmethod(lambda state: state.size**state.rank <= 25)

    def __init__(self, draw, state):
        super().__init__()
        self.before = draw.spot(state, 0.2)
        self.out = State("sequence", state.width, state.size**state.rank)
        self.noise = draw.spot(self.out, 0.2)

    def forward(self, x):
        return self.noise(self.before(x).flatten(2).transpose(1, 2))


@block(1, "sequence", keeps=False)
class ToSignal(Block):
    def __init__(self, draw, state):
        super().__init__()
        self.before = draw.spot(state, 0.2)
        self.out = State("signal", state.width, state.size)
        self.noise = draw.spot(self.out, 0.2)

    def forward(self, x):
        return self.noise(self.before(x).permute(0, 2, 1))


@block(1.5, "vector", keeps=False)
class Unflatten(Block):
    """A layer makes the features of an image or a sequence, whose shape is written into the code."""

    def __init__(self, draw, state):
        super().__init__()
        self.out = State(draw.pick("image", "sequence", "signal"), draw.width(1, 4), draw.pick(2, 3))
        self.shape = list(self.out.shape())[1:]
        flat = state.wide(self.out.features)
        self.fc = unit(draw, state, flat.width, {"L": 2, "LA": 1})[0]
        self.noise = draw.spot(self.out)

    def forward(self, x):
        return self.noise(self.fc(x).view(-1, *self.shape))


# --- Networks ---------------------------------------------------------------------------------------------------------


class Merge(Block):
    """Join a second input: as a sum, as more channels, or as a scale of channels."""

    def __init__(self, draw, state, other):
        super().__init__()
        self.dim, self.way, self.rank = state.dim, draw.pick("sum", "cat", "scale"), state.rank
        self.same = other.kind == state.kind
        if not self.same and self.way == "cat":
            self.way = "sum"
        self.out = state.wide(draw.width())
        self.main = nn.Sequential(layer(draw, state, self.out.width), *draw.noises(self.out))
        self.other = nn.Sequential(layer(draw, other, self.out.width), *draw.noises(other.wide(self.out.width)))
        self.noise = draw.spot(self.out)
        if self.way == "cat":
            self.other = draw.spot(other)
            self.out = state.wide(self.out.width + other.width)
            self.noise = draw.spot(self.out)

    def forward(self, x, other):
        x, other = self.main(x), self.other(other)
        if not self.same:  # a vector for all positions
            other = other.view(len(x), *(-1 if dim == self.dim else 1 for dim in range(1, x.dim())))
        if self.way == "cat":
            return self.noise(torch.cat([x, other], self.dim))
        return self.noise(x * (1 + other) if self.way == "scale" else x + other)


class Raw(Block):
    """Concatenate the network's own inputs, in their first state, before the head."""

    def __init__(self, draw, state, raw):
        super().__init__()
        self.flat = state.kind == "vector"
        self.dim = state.dim
        self.out = state.wide(state.width + (raw.features if self.flat else raw.width))
        self.noise = draw.spot(self.out, 0.3)

    def forward(self, x, raw):
        return self.noise(torch.cat([x, raw.flatten(1) if self.flat else raw], self.dim))


class Head(Block):
    """The outputs: one, or several as a tuple or a dictionary, of which one may be the features."""

    def __init__(self, draw, state, tied=None):
        super().__init__()
        outputs = state.wide(draw.pick(1, 2, 3, 4))
        self.way = draw.weighted({"one": 7, "tuple": 1, "dict": 1})
        hidden, last = nn.Sequential(), state
        if draw.chance(0.3):
            hidden, last = unit(draw, state, orders={"LA": 3, "LNA": 1})
        self.hidden, self.fc = hidden, layer(draw, last, outputs.width)
        if tied is not None:
            self.hidden, last = unit(draw, state, tied.embedding_dim, {"LA": 1, "L": 2, "LN": 1})
            self.fc = nn.Linear(last.width, tied.num_embeddings, bias=draw.chance(0.3))
            self.fc.weight = tied.weight
            outputs = state.wide(tied.num_embeddings)
        self.out = outputs
        self.before, self.noise = draw.spot(last, 0.15), draw.spot(outputs, 0.06)
        several = 0.7 * (outputs.width > 1)
        self.final = draw.weighted({"nothing": 8, "softmax": several, "log_softmax": several, "sigmoid": 0.7})
        self.aux = layer(draw, state, 2) if self.way != "one" and draw.chance(0.5) else None

    def finish(self, x):
        if self.final == "nothing":
            return x
        return torch.sigmoid(x) if self.final == "sigmoid" else getattr(F, self.final)(x, dim=self.out.dim)

    def forward(self, x):
        first = self.finish(self.noise(self.fc(self.before(self.hidden(x)))))
        if self.way == "one":
            return first
        second = x if self.aux is None else self.aux(x)
        return (first, second) if self.way == "tuple" else {"logits": first, "second": second}


class Network(nn.Module):
    """Blocks in a row, with an embedding before them, a second input and the raw inputs where these are asked for."""

    def __init__(self, blocks, head, embedding=None, merge=None, raw=None):
        super().__init__()
        self.embedding = embedding
        self.merge = merge
        self.blocks = nn.ModuleList(blocks)
        self.raw = raw
        self.head = head

    def forward(self, x, other=None):
        inputs = x
        if self.embedding is not None:
            x = self.embedding(x)
        if self.merge is not None:
            x = self.merge(x, other)
        for each in self.blocks:
            x = each(x)
        if self.raw is not None:
            x = self.raw(x, inputs)
        return self.head(x)


def first_state(draw):
    """Return the state of the network's inputs, and whether they are tokens, which an embedding turns into it."""
    kind = draw.weighted({"image": 5, "signal": 1.5, "sequence": 3, "vector": 3, "tokens": 1.5})
    if kind == "image":
        return State("image", draw.random.randint(1, 5), draw.pick(4, 4, 5, 6, 6, 8)), False
    if kind == "signal":
        return State("signal", draw.random.randint(1, 6), draw.pick(4, 5, 6, 8)), False
    if kind == "vector":
        return State("vector", draw.random.randint(2, 10)), False
    return State("sequence", draw.random.randint(2, 8), draw.random.randint(3, 6)), kind == "tokens"


def row(draw, state):
    """Return the network's blocks, and the state behind them."""
    blocks = draw.noises(state, 0.12)
    for _ in range(draw.weighted({1: 2, 2: 4, 3: 4, 4: 3, 5: 2, 6: 1})):
        blocks.append(draw.block(state))
        state = blocks[-1].out
    if state.kind != "vector" and draw.chance(0.6):
        blocks.append((Flatten if Flatten.fits(state) and draw.chance(0.5) else Reduce)(draw, state))
        state = blocks[-1].out
    return blocks, state


def assemble(draw, batch):
    """Return a network and its inputs."""
    start, tokens = first_state(draw)
    x = torch.randint(9, (batch, start.size)) if tokens else torch.randn(start.shape(batch))
    form = draw.weighted({"tensor": 8, "tuple": 1, "dict": 1})
    state, merge, embedding, raw, other = start, None, None, None, None
    if tokens:
        embedding = nn.Embedding(9, start.width)
    if form != "tensor" and draw.chance(0.7):
        second = draw.pick(State("vector", draw.width(1, 4)), start.wide(draw.width(1, 4)))
        other, merge = torch.randn(second.shape(batch)), Merge(draw, start, second)
        state = merge.out
    blocks, state = row(draw, state)
    if draw.noise and not any(isinstance(each, MultiplicativeNoise) for each in nn.ModuleList(blocks).modules()):
        blocks.append(draw.one_noise(state))
    fits_raw = (state.kind == "vector" and start.features <= 60) or state.wide(start.width) == start
    if not tokens and fits_raw and draw.chance(0.12):
        raw = Raw(draw, state, start)
        state = raw.out
    tied = tokens and state.kind == "sequence" and draw.chance(0.6)
    head = Head(draw, state, embedding if tied else None)
    plain = form == "tensor" and raw is None and draw.chance(0.4)
    if plain:
        net = nn.Sequential(*([embedding] if tokens else []), *blocks, head)
    else:
        net = Network(blocks, head, embedding, merge, raw)
    inputs = {"tensor": x, "tuple": (x,), "dict": {"x": x}}[form]
    if other is not None:
        inputs = (x, other) if form == "tuple" else {"x": x, "other": other}
    return net, inputs


# --- Parameters -------------------------------------------------------------------------------------------------------

NORMS = (_NormBase, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm)


def zero_last_norm(body):
    """Set the scale of the last norm of ``body`` to zero for good, and return whether there is one."""
    last = [each for each in body.modules() if isinstance(each, NORMS) and each.weight is not None][-1:]
    for each in last:
        each.start_at_zero = True
    return bool(last)


def randomise(draw, net):
    """Give the layers of a network parameters and statistics that are random, with exceptions here and there."""
    for module in net.modules():
        if isinstance(module, Block):
            continue  # its own parameters are random already
        for name, parameter in module.named_parameters(recurse=False):
            fill(draw, module, name, parameter)
            make_special(draw, name, parameter)
        if isinstance(module, _NormBase) and module.running_mean is not None:
            module.running_mean.normal_(0, 0.3)
            module.running_var.uniform_(0.5, 2)
        if getattr(module, "start_at_zero", False):
            module.weight.zero_()


def fill(draw, module, name, parameter):
    if isinstance(module, NORMS):
        parameter.normal_(float(name == "weight"), 0.3)
    elif isinstance(module, nn.PReLU):
        parameter.normal_(0.25, 0.1)
    elif isinstance(module, nn.Embedding):
        parameter.normal_()
    elif parameter.dim() > 1:
        parameter.normal_(0, draw.random.uniform(0.8, 1.4) / parameter[0].numel() ** 0.5)
    else:
        parameter.normal_(0, 0.3)


def make_special(draw, name, parameter):
    """Make a few parameters zero or constant, or zero for one channel."""
    if "bias" in name and draw.chance(0.05):
        parameter.zero_()
    elif draw.chance(0.01):
        parameter.fill_(0.3)
    elif draw.chance(0.01) and parameter.dim() == 1:
        parameter.zero_()
    elif draw.chance(0.04):
        parameter[draw.random.randrange(len(parameter))] = 0


def freeze(draw, net):
    """Freeze a few parameters, or all of one module."""
    for parameter in net.parameters():
        parameter.requires_grad_(not draw.chance(0.3))
    draw.pick(*net.children()).requires_grad_(False)


def varies(net, inputs):
    """Return whether each output depends on the inputs, as otherwise a comparison of two networks shows little."""
    outputs = output_tensors(call(net, inputs))
    return all((each.std(0) > 1e-3 * each.abs().amax()).any() for each in outputs)


def random_network(seed: int, noise: bool = False) -> tuple[nn.Module, Inputs]:
    """Return a random network in eval mode and inputs for it, the same ones for the same seed.

    Args:
        seed: Of everything that is random; torch's global generators stay as they are.
        noise: Whether to place at least one ``MultiplicativeNoise`` in the network.
    """
    draw = Draw(seed, noise)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.default_generator.manual_seed(seed)
        while True:
            draw.pool.clear()
            net, inputs = assemble(draw, batch=draw.pick(2, 3))
            randomise(draw, net.eval())
            if varies(net, inputs) or draw.chance(0.1):
                break
    if draw.chance(0.1):
        freeze(draw, net)
    return net, inputs


# --- Printing ---------------------------------------------------------------------------------------------------------


def describe(net: nn.Module) -> str:
    """Return a network's repr without attributes that are identities, and what that leaves out, a line each."""
    lines = [line for line in repr(net).split("\n") if not re.fullmatch(r" *\([a-z]\w*\): Identity\(\)", line)]
    for names in same(net.named_modules(remove_duplicate=False)):
        lines.append(f"one module: {' = '.join(names)}")
    named: list[tuple[str, Any]] = list(net.named_parameters(remove_duplicate=False))
    for names in same(named):
        lines.append(f"one parameter: {' = '.join(names)}")
    modules = dict(net.named_modules())
    for name, parameter in net.named_parameters():
        notes = notes_on(parameter)
        own = isinstance(modules[name.rpartition(".")[0]], Block)
        if own or notes:
            lines.append(f"{name} {list(parameter.shape)}: {', '.join([*notes, *['of a block'] * own])}")
    for name, buffer in net.named_buffers():
        if isinstance(modules[name.rpartition(".")[0]], Block):
            lines.append(f"buffer {name} {list(buffer.shape)}: {buffer.flatten()[:12].tolist()}")
        elif name.endswith("keep") and not buffer.all():
            lines.append(f"{name}: {buffer.int().tolist()}")
    return "\n".join(lines)


def same(named):
    """Return lists of the names of one thing, without those that only stand inside of another such thing."""
    names = defaultdict(list)
    for name, thing in named:
        names[id(thing)].append(name)
    repeated = [each for each in names.values() if len(each) > 1]
    inside = {each for group in repeated for each in group}
    return [group for group in repeated if not all(name.rpartition(".")[0] in inside for name in group)]


def notes_on(parameter):
    """Return what is special about a parameter."""
    if parameter.numel() == 1:
        return ["frozen"] * (not parameter.requires_grad) + [f"{parameter.item():.3g}"]
    zero = (parameter.flatten(1) if parameter.dim() > 1 else parameter.unsqueeze(-1)).eq(0).all(1)
    notes = ["frozen"] * (not parameter.requires_grad)
    if zero.all():
        notes.append("all zero")
    elif parameter.eq(parameter.flatten()[0]).all():
        notes.append(f"all {parameter.flatten()[0].item():.3g}")
    elif zero.any():
        notes.append(f"zero at {zero.nonzero().flatten().tolist()}")
    return notes
