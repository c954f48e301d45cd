"""Placeholder until the real one lands."""

from torch import nn


class HeadwiseAttention(nn.MultiheadAttention):
    is_whole = True

    @classmethod
    def adopt(cls, m):
        pass

    def release(self):
        pass
