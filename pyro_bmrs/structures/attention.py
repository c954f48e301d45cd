"""Multi-head attention that calls its output projection, and may have lost heads."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import dropout, linear, pad, scaled_dot_product_attention

__all__ = ["HeadwiseAttention"]


class HeadwiseAttention(nn.MultiheadAttention):
    """Compute what ``nn.MultiheadAttention`` does, with fewer heads than it began with if some have been removed.

    It calls ``out_proj`` as a module, so that hooks on it run, and never takes PyTorch's fast path, which skips
    submodules. With H heads left of ``head_dim`` D, ``in_proj_weight`` is of shape ``(3 * H * D, embed_dim)`` and
    ``out_proj.weight`` of shape ``(embed_dim, H * D)``. Arguments and returned values are those of the original, but
    weights of attention are averaged over, and masks of three dimensions are for, the heads that are left. A nested
    tensor is taken where ``nn.TransformerEncoder`` makes one of a padding mask: in self-attention without masks or
    weights.

    Example:
        >>> attention = nn.MultiheadAttention(8, 2, batch_first=True)
        >>> x = torch.randn(3, 5, 8)
        >>> expected = attention(x, x, x)[0]
        >>> HeadwiseAttention.adopt(attention)
        >>> torch.allclose(attention(x, x, x)[0], expected, atol=1e-6)
        True
        >>> attention.release()
        >>> type(attention) is nn.MultiheadAttention
        True
    """

    @classmethod
    def adopt(cls, attention: nn.MultiheadAttention) -> None:
        """Make an ``nn.MultiheadAttention`` one of this class, in place; nothing but its class changes.

        Raises:
            TypeError: If it is of another class.
        """
        if type(attention) is not nn.MultiheadAttention:
            raise TypeError(f"only nn.MultiheadAttention itself can be adopted, but got {type(attention).__name__}")
        attention.__class__ = cls

    def release(self) -> None:
        """Make it an ``nn.MultiheadAttention`` again, in place.

        Raises:
            ValueError: If it has lost heads, which that class cannot say.
        """
        if not self.is_whole:
            raise ValueError(f"{self.num_heads} heads of {self.head_dim} are left of a width of {self.embed_dim}")
        self.__class__ = nn.MultiheadAttention  # type: ignore[assignment]

    @property
    def is_whole(self) -> bool:
        """Whether all heads are left, and all of the width."""
        if not isinstance(self.out_proj, nn.Linear):
            return False
        packed = self.in_proj_weight is None or self.in_proj_weight.shape == (3 * self.embed_dim, self.embed_dim)
        return self.num_heads * self.head_dim == self.embed_dim == len(self.out_proj.weight) and packed

    @property
    def _qkv_same_embed_dim(self) -> bool:  # what PyTorch asks before it takes the fast path
        made = "in_proj_weight" in self._parameters  # the constructor reads it too
        return not made and self.__dict__["_qkv_same_embed_dim"]

    @_qkv_same_embed_dim.setter
    def _qkv_same_embed_dim(self, value: bool) -> None:
        self.__dict__["_qkv_same_embed_dim"] = value

    def _reset_parameters(self) -> None:
        kind, self.__class__ = type(self), nn.MultiheadAttention  # type: ignore[assignment]
        try:
            self._reset_parameters()
        finally:
            self.__class__ = kind

    def extra_repr(self) -> str:
        """Say how many heads are left, and how wide each is."""
        if self.is_whole:
            return ""
        return f"embed_dim={self.embed_dim}, num_heads={self.num_heads}, head_dim={self.head_dim}"

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        if query.is_nested or key.is_nested or value.is_nested:
            masked = key_padding_mask is not None or attn_mask is not None or is_causal
            if not (query is key is value and self.batch_first) or masked or need_weights:
                raise ValueError(
                    "nested tensors are supported in self-attention with batch_first=True and need_weights=False, "
                    "without masks; otherwise pad them and give a key_padding_mask"
                )
            return self._nested(query), None
        if is_causal and attn_mask is None:
            raise ValueError("is_causal=True is a hint about attn_mask, which has to be given too")
        batched = query.dim() == 3
        self._check(query, key, value, attn_mask, key_padding_mask)
        q, k, v = self._project(query, key, value)
        if not batched:
            q, k, v = (each.unsqueeze(0) for each in (q, k, v))
            key_padding_mask = None if key_padding_mask is None else key_padding_mask.unsqueeze(0)
        elif not self.batch_first:
            q, k, v = (each.transpose(0, 1) for each in (q, k, v))
        is_causal = is_causal and key_padding_mask is None and not need_weights  # a hint, otherwise of no use
        mask = None if is_causal else self._mask(q, attn_mask, key_padding_mask)
        k, v, mask = self._extended(k, v, mask)
        q, k, v = (each.unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for each in (q, k, v))
        attended, weights = self._attend(q, k, v, mask, need_weights, is_causal)
        output = self.out_proj(attended.transpose(1, 2).flatten(2))
        if weights is not None and average_attn_weights:
            weights = weights.mean(1)
        if not batched:
            return output.squeeze(0), None if weights is None else weights.squeeze(0)
        return output if self.batch_first else output.transpose(0, 1), weights

    def _nested(self, x: Tensor) -> Tensor:
        """Attend within each sequence of a nested tensor, of shape ``(batch, lengths, embed_dim)``."""
        lengths = [len(each) for each in x.unbind()]
        padded = x.to_padded_tensor(0.0)
        padding = torch.arange(padded.shape[1]) >= torch.tensor(lengths)[:, None]
        output = self.forward(padded, padded, padded, padding.to(x.device), need_weights=False)[0]
        return torch.nested.as_nested_tensor([each[:n] for each, n in zip(output, lengths, strict=True)])

    def _check(
        self, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, key_padding_mask: Tensor | None
    ) -> None:
        """Raise ValueError where shapes or types would be taken for something else, or broadcast."""
        if query.dim() not in (2, 3) or not query.dim() == key.dim() == value.dim():
            dims = query.dim(), key.dim(), value.dim()
            raise ValueError(f"query, key and value must all be of 2 or all of 3 dimensions, but got {dims}")
        b, t = (0, 1) if self.batch_first else (1, 0)
        batch = (query.shape[b],) if query.dim() == 3 else ()
        queries, keys = (query.shape[t], key.shape[t]) if batch else (query.shape[0], key.shape[0])
        if key.shape[:-1] != value.shape[:-1] or (batch and key.shape[b] != query.shape[b]):
            shapes = tuple(query.shape), tuple(key.shape), tuple(value.shape)
            raise ValueError(f"query, key and value are of shapes {shapes}, which do not fit each other")
        if attn_mask is not None:
            per_head = (batch[0] * self.num_heads if batch else self.num_heads, queries, keys)
            if attn_mask.shape != (per_head[1:] if attn_mask.dim() == 2 else per_head):
                raise ValueError(
                    f"attn_mask must be of shape {per_head[1:]}, or {per_head} for {self.num_heads} heads, "
                    f"but got {tuple(attn_mask.shape)}"
                )
        if key_padding_mask is not None and key_padding_mask.shape != (*batch, keys):
            raise ValueError(
                f"key_padding_mask must be of shape {(*batch, keys)}, but got {tuple(key_padding_mask.shape)}"
            )
        for mask in (attn_mask, key_padding_mask):
            if mask is not None and mask.dtype != torch.bool and not mask.is_floating_point():
                raise ValueError(f"masks must be bool or floating point, but got {mask.dtype}")

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> list[Tensor]:
        weight: Any = self.in_proj_weight
        bias: Any = self.in_proj_bias
        if weight is not None and query is key is value:
            return list(linear(query, weight, bias).chunk(3, -1))
        weights = [self.q_proj_weight, self.k_proj_weight, self.v_proj_weight] if weight is None else weight.chunk(3)
        biases = [None] * 3 if bias is None else bias.chunk(3)
        return [linear(*each) for each in zip((query, key, value), weights, biases, strict=True)]

    def _mask(self, q: Tensor, attn_mask: Tensor | None, key_padding_mask: Tensor | None) -> Tensor | None:
        """Return what is added to the scores, broadcastable to ``(batch, heads, queries, keys)``."""
        mask = None
        if attn_mask is not None:
            mask = _additive(attn_mask, q.dtype)
            if mask.dim() == 3:
                mask = mask.unflatten(0, (q.shape[0], -1))
        if key_padding_mask is not None:
            padding = _additive(key_padding_mask, q.dtype)[:, None, None, :]
            mask = padding if mask is None else mask + padding
        return mask

    def _extended(self, k: Tensor, v: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        """Add the learned key and value, and those of zeros, if the layer has them."""
        extra = 0
        if self.bias_k is not None and self.bias_v is not None:
            k = torch.cat([k, self.bias_k.expand(k.shape[0], -1, -1)], 1)
            v = torch.cat([v, self.bias_v.expand(v.shape[0], -1, -1)], 1)
            extra += 1
        if self.add_zero_attn:
            k, v = (torch.cat([each, torch.zeros_like(each[:, :1])], 1) for each in (k, v))
            extra += 1
        return k, v, None if mask is None else pad(mask, (0, extra))

    def _attend(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, need_weights: bool, is_causal: bool
    ) -> tuple[Tensor, Tensor | None]:
        rate = self.dropout if self.training else 0.0
        if not need_weights:
            return scaled_dot_product_attention(q, k, v, mask, rate, is_causal), None
        scores = (q * self.head_dim**-0.5) @ k.transpose(-2, -1)
        weights = (scores if mask is None else scores + mask).softmax(-1)
        weights = dropout(weights, rate) if rate else weights
        return weights @ v, weights


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a mask to add: bool ones become minus infinity where they are True."""
    if mask.dtype != torch.bool:
        return mask.to(dtype)
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(mask, float("-inf"))
