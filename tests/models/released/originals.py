"""The networks of released weights, written from the papers with the parameter names of the released code."""

import math

import torch
from timm.layers.attention import Attention
from timm.layers.mlp import Mlp
from timm.layers.patch_embed import PatchEmbed
from torch import Tensor, nn
from torch.nn import functional as F

ROUNDING = 5e-6  # relative; float32 angles of t = 999 alone are off by 6e-5


def error(output: Tensor, exact: Tensor) -> float:
    return ((output - exact).square().mean() / exact.square().mean()).sqrt().item()


def drawn(net: nn.Module, seed: int = 0) -> nn.Module:
    """The network with every parameter drawn, so that no branch is closed."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in net.parameters():
            scale = parameter[0].numel() ** -0.5 if parameter.ndim > 1 else 0.3
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
    return net.eval()


def inputs(channels: int, side: int, classes: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(3, channels, side, side, generator=generator)
    return x, torch.tensor([0, 501, 999]), torch.tensor([0, classes - 1, 1])


def features(t: Tensor, width: int) -> Tensor:
    angles = t[:, None].double() / 10000 ** (torch.arange(width // 2).double() / (width // 2))
    return torch.cat([angles.cos(), angles.sin()], 1).float()


def mlp(*widths: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(widths[0], widths[1]), nn.SiLU(), nn.Linear(widths[1], widths[2]))


class TimmBlock(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attn = Attention(width, num_heads=heads, qkv_bias=True)
        self.mlp = Mlp(width, 4 * width, act_layer=lambda: nn.GELU(approximate="tanh"))  # type: ignore[arg-type]
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        b1, a1, g1, b2, a2, g2 = self.adaLN_modulation(c)[:, None].chunk(6, -1)
        norm = lambda x: F.layer_norm(x, x.shape[-1:], eps=1e-6)  # noqa: E731
        x = x + g1 * self.attn(norm(x) * (1 + a1) + b1)
        return x + g2 * self.mlp(norm(x) * (1 + a2) + b2)


class TimmDiT(nn.Module):
    """Figure 3 of the paper in timm's layers, with the parameter names of the released code."""

    def __init__(self, side: int, channels: int, classes: int, patch: int, width: int, depth: int, heads: int) -> None:
        super().__init__()
        self.patch, self.channels = patch, channels
        self.x_embedder = PatchEmbed(side, patch, channels, width, bias=True)
        self.t_embedder = nn.ModuleDict({"mlp": mlp(256, width, width)})
        self.y_embedder = nn.ModuleDict({"embedding_table": nn.Embedding(classes + 1, width)})
        self.pos_embed = nn.Parameter(torch.zeros(1, (side // patch) ** 2, width))
        self.blocks = nn.ModuleList(TimmBlock(width, heads) for _ in range(depth))
        final = {"linear": nn.Linear(width, patch**2 * 2 * channels)}
        modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))
        self.final_layer = nn.ModuleDict({**final, "adaLN_modulation": modulation})

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        c = self.t_embedder["mlp"](features(t, 256)) + self.y_embedder["embedding_table"](y)
        h = self.x_embedder(x) + self.pos_embed
        for block in self.blocks:
            h = block(h, c)
        shift, scale = self.final_layer["adaLN_modulation"](c)[:, None].chunk(2, -1)
        h = self.final_layer["linear"](F.layer_norm(h, h.shape[-1:], eps=1e-6) * (1 + scale) + shift)
        side = x.shape[-1] // self.patch
        cells = h.view(-1, side, side, self.patch, self.patch, 2 * self.channels)
        return torch.einsum("nhwpqc->nchpwq", cells).reshape(x.shape[0], 2 * self.channels, *x.shape[2:])


DIT_FIELDS = {"input_size": 8, "in_channels": 4, "num_classes": 5, "patch_size": 2, "hidden_size": 48, "depth": 2}
DIT_FIELDS |= {"num_heads": 3}


def dit() -> nn.Module:
    return drawn(TimmDiT(8, 4, 5, 2, 48, 2, 3))


class Unit(nn.Module):
    """A ResBlock or an attention block of guided-diffusion's U-Net, with its parameter names; `scale` 2 or 0.5
    resamples."""

    def __init__(self, channels: int, out: int, emb: int, scale: float = 1) -> None:
        super().__init__()
        self.scale = scale
        self.in_layers = nn.Sequential(nn.GroupNorm(32, channels), nn.SiLU(), nn.Conv2d(channels, out, 3, padding=1))
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(emb, 2 * out))
        last = nn.Conv2d(out, out, 3, padding=1)
        self.out_layers = nn.Sequential(nn.GroupNorm(32, out), nn.SiLU(), nn.Identity(), last)
        self.skip_connection = nn.Identity() if channels == out else nn.Conv2d(channels, out, 1)

    def resampled(self, x: Tensor) -> Tensor:
        if self.scale == 1:
            return x
        return F.avg_pool2d(x, 2) if self.scale < 1 else x.repeat_interleave(2, 2).repeat_interleave(2, 3)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        h = self.in_layers[2](self.resampled(self.in_layers[:2](x)))
        scale, shift = self.emb_layers(emb)[..., None, None].chunk(2, 1)
        h = self.out_layers[1:](self.out_layers[0](h) * (1 + scale) + shift)
        return self.skip_connection(self.resampled(x)) + h


class Attended(nn.Module):
    def __init__(self, channels: int, heads: int, new: bool) -> None:
        super().__init__()
        self.heads, self.new = heads, new
        self.norm = nn.GroupNorm(32, channels)
        self.qkv = nn.Conv1d(channels, 3 * channels, 1)
        self.proj_out = nn.Conv1d(channels, channels, 1)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        batch, channels, *sides = x.shape
        flat = x.reshape(batch, channels, -1)
        qkv = self.qkv(self.norm(flat))
        head = channels // self.heads
        outs = []
        for i in range(self.heads):
            # new: (q k v, head, channel); legacy: (head, q k v, channel)
            starts = [n * channels + i * head for n in range(3)] if self.new else [(3 * i + n) * head for n in range(3)]
            q, k, v = (qkv[:, start : start + head] for start in starts)
            weight = torch.softmax(torch.einsum("bcq,bck->bqk", q, k) / math.sqrt(head), -1)
            outs.append(torch.einsum("bqk,bck->bcq", weight, v))
        return x + self.proj_out(torch.cat(outs, 1)).reshape(batch, channels, *sides)


class GuidedUNet(nn.Module):
    """The U-Net of the paper's appendix with up and down ResBlocks, and guided-diffusion's parameter names."""

    def __init__(
        self, base: int, mult: list[float], depth: int, ds: list[int], heads: int, head: int, new: bool, classes: int
    ) -> None:
        super().__init__()
        emb = 4 * base
        self.base = base
        self.time_embed = mlp(base, emb, emb)
        if classes:
            self.label_emb = nn.Embedding(classes, emb)
        widths = [int(one * base) for one in mult]

        def attention(level: int) -> list[nn.Module]:
            width = widths[level]
            return [Attended(width, width // head if head > 0 else heads, new)] if 2**level in ds else []

        def middle(width: int) -> nn.Module:
            return Attended(width, width // head if head > 0 else heads, new)

        channels, skips = widths[0], [widths[0]]
        down: list[list[nn.Module]] = [[nn.Conv2d(3, channels, 3, padding=1)]]
        for level, width in enumerate(widths):
            for _ in range(depth):
                down.append([Unit(channels, width, emb), *attention(level)])
                channels = width
                skips.append(width)
            if level + 1 < len(widths):
                down.append([Unit(width, width, emb, 0.5)])
                skips.append(width)
        self.input_blocks = nn.ModuleList(nn.ModuleList(one) for one in down)
        self.middle_block = nn.ModuleList(
            [Unit(channels, channels, emb), middle(channels), Unit(channels, channels, emb)]
        )
        up: list[list[nn.Module]] = []
        for level in reversed(range(len(widths))):
            for i in range(depth + 1):
                up.append([Unit(channels + skips.pop(), widths[level], emb), *attention(level)])
                channels = widths[level]
                if level and i == depth:
                    up[-1].append(Unit(channels, channels, emb, 2))
        self.output_blocks = nn.ModuleList(nn.ModuleList(one) for one in up)
        self.out = nn.Sequential(nn.GroupNorm(32, channels), nn.SiLU(), nn.Conv2d(channels, 6, 3, padding=1))

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        emb = self.time_embed(features(t, self.base))
        if hasattr(self, "label_emb"):
            emb = emb + self.label_emb(y)
        skips: list[Tensor] = []
        for block in self.input_blocks:
            for layer in block:  # type: ignore[attr-defined]
                x = layer(x) if isinstance(layer, nn.Conv2d) else layer(x, emb)
            skips.append(x)
        for layer in self.middle_block:
            x = layer(x, emb)
        for block in self.output_blocks:
            x = torch.cat([x, skips.pop()], 1)
            for layer in block:  # type: ignore[attr-defined]
                x = layer(x, emb)
        return self.out(x)
