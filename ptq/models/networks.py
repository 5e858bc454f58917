"""Small networks of our own: CIFAR ResNet, compact transformers, the two embedded digit classifiers.

Shapes: images [images, channels, height, width]; tokens [images, tokens, width]; logits [images, classes].
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional


class SubsampleShortcut(nn.Module):
    """Shortcut without parameters: every second pixel, zeros for new channels on both sides (option A)."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.before = (out_channels - in_channels) // 2
        self.after = out_channels - in_channels - self.before

    def forward(self, x: Tensor) -> Tensor:
        return functional.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.before, self.after))


def projection_shortcut(in_channels: int, out_channels: int, stride: int) -> nn.Sequential:
    """Shortcut with a strided 1×1 convolution and BatchNorm (option B)."""
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, 1, stride=stride, bias=False), nn.BatchNorm2d(out_channels)
    )


class BasicBlock(nn.Module):
    """Two 3×3 convolutions with BatchNorm, added to the shortcut of their input."""

    def __init__(self, in_channels: int, out_channels: int, stride: int, shortcut: nn.Module) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.shortcut = shortcut

    def forward(self, x: Tensor) -> Tensor:
        y = functional.relu(self.bn1(self.conv1(x)))
        return functional.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


class CifarResNetModule(nn.Module):
    """ResNet for 32×32 images (He et al., 2015, section 4.2) with 6n + 2 layers and option A shortcuts."""

    def __init__(self, depth: int, num_classes: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        blocks = (depth - 2) // 6
        self.layer1 = self._stage(16, 16, blocks)
        self.layer2 = self._stage(16, 32, blocks)
        self.layer3 = self._stage(32, 64, blocks)
        self.linear = nn.Linear(64, num_classes)

    @staticmethod
    def _stage(in_channels: int, out_channels: int, blocks: int) -> nn.Sequential:
        widens = out_channels != in_channels
        first = BasicBlock(
            in_channels,
            out_channels,
            stride=2 if widens else 1,
            shortcut=SubsampleShortcut(in_channels, out_channels) if widens else nn.Identity(),
        )
        rest = [BasicBlock(out_channels, out_channels, 1, nn.Identity()) for _ in range(blocks - 1)]
        return nn.Sequential(first, *rest)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.relu(self.bn1(self.conv1(x)))  # [images, 16, 32, 32]
        x = self.layer3(self.layer2(self.layer1(x)))  # [images, 64, 8, 8]
        return self.linear(x.mean(dim=(2, 3)))


class DigitsResNetModule(nn.Module):
    """Residual network for 8×8 digits: stages of BasicBlocks, each after the first at half the size."""

    def __init__(self, widths: list[int], blocks: int, num_classes: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, widths[0], 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(widths[0])
        stages = []
        channels = widths[0]
        for width in widths:
            stages.append(self._stage(channels, width, blocks))
            channels = width
        self.stages = nn.Sequential(*stages)
        self.head = nn.Linear(channels, num_classes)

    @staticmethod
    def _stage(in_channels: int, out_channels: int, blocks: int) -> nn.Sequential:
        widens = out_channels != in_channels
        stride = 2 if widens else 1
        shortcut = projection_shortcut(in_channels, out_channels, stride) if widens else nn.Identity()
        rest = [BasicBlock(out_channels, out_channels, 1, nn.Identity()) for _ in range(blocks - 1)]
        return nn.Sequential(BasicBlock(in_channels, out_channels, stride, shortcut), *rest)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.relu(self.norm(self.stem(x)))  # [images, widths[0], 8, 8]
        x = self.stages(x)  # [images, widths[-1], h, w]
        return self.head(x.mean(dim=(2, 3)))


class Attention(nn.Module):
    """Multi-head self-attention with one packed query-key-value layer."""

    def __init__(self, width: int, heads: int, qkv_bias: bool) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=qkv_bias)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        images, tokens, width = x.shape
        qkv = self.qkv(x).reshape(images, tokens, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each [images, heads, tokens, width / heads]
        y = functional.scaled_dot_product_attention(q, k, v)
        return self.proj(y.transpose(1, 2).reshape(images, tokens, width))


class Mlp(nn.Module):
    """Two linear layers with a GELU between them."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(functional.gelu(self.fc1(x)))


class PreNormBlock(nn.Module):
    """Transformer block: each branch normalises its own input and is added to it."""

    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attn = Attention(width, heads, qkv_bias=True)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = Mlp(width, hidden)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class DigitsViTModule(nn.Module):
    """Vision transformer for 8×8 digits: patches, learned positions, pre-norm blocks, the tokens' mean."""

    def __init__(self, patch: int, width: int, depth: int, heads: int, hidden: int, num_classes: int) -> None:
        super().__init__()
        self.patch_embed = nn.Conv2d(1, width, patch, stride=patch)
        self.pos_embed = nn.Parameter(torch.zeros(1, (8 // patch) ** 2, width))
        self.blocks = nn.Sequential(*(PreNormBlock(width, heads, hidden) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch_embed(x).flatten(2).transpose(1, 2) + self.pos_embed  # [images, tokens, width]
        x = self.norm(self.blocks(x))
        return self.head(x.mean(dim=1))


class ReorderedBlock(nn.Module):
    """Transformer block of the original compact transformer, which normalises the attention branch's sum.

    x ← norm1(x + attention(pre_norm(x))), then x ← x + mlp(x).
    """

    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.pre_norm = nn.LayerNorm(width)
        self.self_attn = Attention(width, heads, qkv_bias=False)
        self.norm1 = nn.LayerNorm(width)
        self.linear1 = nn.Linear(width, hidden)
        self.linear2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm1(x + self.self_attn(self.pre_norm(x)))
        return x + self.linear2(functional.gelu(self.linear1(x)))


def pool_sequence(x: Tensor, attention_pool: nn.Linear) -> Tensor:
    """The tokens' mean, weighted by a softmax over tokens of `attention_pool`'s score; [images, width]."""
    weights = attention_pool(x).softmax(dim=1)  # [images, tokens, 1]
    return (weights * x).sum(dim=1)


class PreNormCompactTransformer(nn.Module):
    """Compact convolutional transformer with one tokenizer convolution and standard pre-norm blocks."""

    def __init__(self, width: int, depth: int, heads: int, hidden: int, num_classes: int) -> None:
        super().__init__()
        self.tokenizer = nn.Conv2d(3, width, 3, padding=1, bias=False)
        self.pos_embed = nn.Parameter(torch.zeros(1, 256, width))
        self.blocks = nn.Sequential(*(PreNormBlock(width, heads, hidden) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.attention_pool = nn.Linear(width, 1)
        self.head = nn.Linear(width, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.max_pool2d(
            functional.relu(self.tokenizer(x)), 3, stride=2, padding=1
        )  # [images, width, 16, 16]
        x = x.flatten(2).transpose(1, 2) + self.pos_embed  # [images, 256, width]
        return self.head(pool_sequence(self.norm(self.blocks(x)), self.attention_pool))


class ConvTokenizer(nn.Module):
    """Two steps of convolution, ReLU and max-pooling that turn a 32×32 image into 64 tokens."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv_layers = nn.Sequential(self._step(3, width // 2), self._step(width // 2, width))

    @staticmethod
    def _step(in_channels: int, out_channels: int) -> nn.Sequential:
        conv = nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=False)
        return nn.Sequential(conv, nn.ReLU(), nn.MaxPool2d(3, stride=2, padding=1))

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.conv_layers(x).flatten(2).transpose(1, 2)  # [images, 64, width]
        return tokens.contiguous()  # sums would keep the order, and each norm would copy


class SequencePoolClassifier(nn.Module):
    """Positions, reordered blocks, sequence pooling and classifier of the original compact transformer."""

    def __init__(self, width: int, depth: int, heads: int, hidden: int, num_classes: int) -> None:
        super().__init__()
        self.positional_emb = nn.Parameter(torch.zeros(1, 64, width))
        self.blocks = nn.ModuleList(ReorderedBlock(width, heads, hidden) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.attention_pool = nn.Linear(width, 1)
        self.fc = nn.Linear(width, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.positional_emb
        for block in self.blocks:
            x = block(x)
        return self.fc(pool_sequence(self.norm(x), self.attention_pool))


class ReorderedCompactTransformer(nn.Module):
    """Compact convolutional transformer with two tokenizer convolutions and reordered blocks."""

    def __init__(self, width: int, depth: int, heads: int, hidden: int, num_classes: int) -> None:
        super().__init__()
        self.tokenizer = ConvTokenizer(width)
        self.classifier = SequencePoolClassifier(width, depth, heads, hidden, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.tokenizer(x))
