"""A vision transformer with the attribute structure of torch.hub's DINOv2.

Attention is computed inline, as theirs is without xformers: `qkv`, a softmax of its own, `proj`. A
    list of images runs through the
blocks together (nested tensors). Blocks are in one list or, with `block_chunks`, in chunks padded
with `nn.Identity`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class Attention(nn.Module):
    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.scale = (dim // num_heads) ** -0.5
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        self.attn_drop = nn.Dropout(0.0)
        self.proj_drop = nn.Dropout(0.0)

    def forward(self, x: Tensor) -> Tensor:
        rows, tokens, width = x.shape
        q, k, v = self.qkv(x).reshape(rows, tokens, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        attn = self.attn_drop(((q * self.scale) @ k.transpose(-2, -1)).softmax(-1))
        return self.proj_drop(self.proj((attn @ v).transpose(1, 2).reshape(rows, tokens, width)))


class MemEffAttention(Attention):
    def forward(self, x: Tensor, attn_bias: Any = None) -> Tensor:
        assert attn_bias is None, "xFormers is required for using nested tensors"
        return super().forward(x)


class LayerScale(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class Mlp(nn.Module):
    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))


class NestedTensorBlock(nn.Module):
    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = MemEffAttention(dim, num_heads)
        self.ls1 = LayerScale(dim)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim, 2 * dim)
        self.ls2 = LayerScale(dim)

    def forward(self, x_or_x_list: Any) -> Any:
        if isinstance(x_or_x_list, list):
            return [self(x) for x in x_or_x_list]
        x = x_or_x_list + self.ls1(self.attn(self.norm1(x_or_x_list)))
        return x + self.ls2(self.mlp(self.norm2(x)))


class BlockChunk(nn.ModuleList):
    def forward(self, x: Any) -> Any:
        for block in self:
            x = block(x)
        return x


class PatchEmbed(nn.Module):
    def __init__(self, patch: int, dim: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, dim, patch, patch)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x).flatten(2).transpose(1, 2)


class DinoVisionTransformer(nn.Module):
    def __init__(
        self,
        img_size: int,
        patch_size: int,
        embed_dim: int,
        depth: int,
        num_heads: int,
        num_register_tokens: int = 0,
        block_chunks: int = 0,
    ) -> None:
        super().__init__()
        self.embed_dim = embed_dim
        self.num_features = embed_dim
        self.n_blocks = depth
        self.num_register_tokens = num_register_tokens
        self.chunked_blocks = block_chunks > 0
        self.patch_embed = PatchEmbed(patch_size, embed_dim)
        self.cls_token = nn.Parameter(0.02 * torch.randn(1, 1, embed_dim))
        self.pos_embed = nn.Parameter(
            0.02 * torch.randn(1, (img_size // patch_size) ** 2 + 1, embed_dim)
        )
        self.register_tokens = None
        if num_register_tokens:
            tokens = 0.02 * torch.randn(1, num_register_tokens, embed_dim)
            self.register_tokens = nn.Parameter(tokens)
        blocks = [NestedTensorBlock(embed_dim, num_heads) for _ in range(depth)]
        if block_chunks:
            size = depth // block_chunks
            self.blocks = nn.ModuleList(
                BlockChunk([nn.Identity()] * start + blocks[start : start + size])
                for start in range(0, depth, size)
            )
        else:
            self.blocks = nn.ModuleList(blocks)
        self.norm = nn.LayerNorm(embed_dim, eps=1e-6)
        self.head = nn.Identity()
        self.mask_token = nn.Parameter(torch.zeros(1, embed_dim))

    def prepare_tokens_with_masks(self, x: Tensor) -> Tensor:
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), self.patch_embed(x)], 1)
        x = x + self.pos_embed
        if self.register_tokens is None:
            return x
        return torch.cat([x[:, :1], self.register_tokens.expand(len(x), -1, -1), x[:, 1:]], 1)

    def forward_features(self, x: Any) -> Any:
        if isinstance(x, list):
            crops = [self.prepare_tokens_with_masks(crop) for crop in x]
            return [self._named(crop) for crop in self._through_blocks(crops)]
        return self._named(self._through_blocks(self.prepare_tokens_with_masks(x)))

    def _through_blocks(self, x: Any) -> Any:
        for block in self.blocks:
            x = block(x)
        return x

    def _named(self, x: Tensor) -> dict[str, Tensor]:
        normed = self.norm(x)
        first = self.num_register_tokens + 1
        return {
            "x_norm_clstoken": normed[:, 0],
            "x_norm_regtokens": normed[:, 1:first],
            "x_norm_patchtokens": normed[:, first:],
            "x_prenorm": x,
        }

    def forward(self, x: Any, is_training: bool = False) -> Any:
        features = self.forward_features(x)
        if is_training or isinstance(features, list):
            return features
        return self.head(features["x_norm_clstoken"])
