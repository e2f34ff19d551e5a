"""Torch only: convolutional, generative, equivariant and operator models of images, fields and points."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.case import Cases, image, normal, randint, randn

CASES = Cases()


def conv(n_in: int, n_out: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(n_in, n_out, 3, padding=1, bias=False), nn.BatchNorm2d(n_out), nn.ReLU(inplace=True)
    )


class UNet(nn.Module):
    """Skip concatenation between contracting and expanding paths."""

    def __init__(self, c: int):
        super().__init__()
        self.down = nn.ModuleList([conv(3, c), conv(c, 2 * c), conv(2 * c, 4 * c)])
        self.rise = nn.ModuleList(
            [nn.ConvTranspose2d(4 * c, 2 * c, 2, 2), nn.ConvTranspose2d(2 * c, c, 2, 2)]
        )
        self.up = nn.ModuleList([conv(4 * c, 2 * c), conv(2 * c, c)])
        self.head = nn.Conv2d(c, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        skips = []
        for i, block in enumerate(self.down):
            x = block(x if i == 0 else F.max_pool2d(x, 2))
            skips.append(x)
        for rise, block, skip in zip(self.rise, self.up, skips[-2::-1], strict=True):
            x = block(torch.cat([skip, rise(x)], 1))
        return self.head(x)


@CASES(image(16))
def unet(k: int) -> nn.Module:
    return UNet(8 * k)


class DiffusionUNet(nn.Module):
    """Time embedding into residual blocks with group norm, self-attention at the bottom; class labels."""

    def __init__(self, c: int):
        super().__init__()
        self.time = nn.Sequential(nn.Linear(10, 4 * c), nn.SiLU(), nn.Linear(4 * c, 4 * c))
        self.label = nn.Embedding(7, 4 * c)
        self.enter = nn.Conv2d(3, c, 3, padding=1)
        self.norm1, self.conv1 = nn.GroupNorm(4, c), nn.Conv2d(c, 2 * c, 3, padding=1)
        self.emb, self.norm2 = nn.Linear(4 * c, 4 * c), nn.GroupNorm(4, 2 * c)
        self.conv2, self.short = nn.Conv2d(2 * c, 2 * c, 3, padding=1), nn.Conv2d(c, 2 * c, 1)
        self.norm3, self.qkv, self.proj = (
            nn.GroupNorm(4, 2 * c),
            nn.Conv1d(2 * c, 6 * c, 1),
            nn.Conv1d(2 * c, 2 * c, 1),
        )
        self.up, self.out = nn.Conv2d(2 * c, c, 3, padding=1), nn.Conv2d(2 * c, 3, 3, padding=1)

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        angles = t[:, None] * torch.exp(-math.log(10000) * torch.arange(5) / 5)
        emb = self.time(torch.cat([angles.sin(), angles.cos()], -1)) + self.label(y)
        skip = x = self.enter(x)
        h = self.conv1(F.silu(self.norm1(x)))
        scale, shift = self.emb(F.silu(emb))[:, :, None, None].chunk(2, 1)
        h = self.norm2(h) * (1 + scale) + shift
        x = F.avg_pool2d(self.short(x) + self.conv2(F.silu(h)), 2)
        b, c, height, width = x.shape
        q, k, v = self.qkv(self.norm3(x).view(b, c, -1)).chunk(3, 1)
        a = torch.einsum("bct,bcs->bts", q * c**-0.25, k * c**-0.25).softmax(-1)
        x = x + self.proj(torch.einsum("bts,bcs->bct", a, v)).view(b, c, height, width)
        x = self.up(F.interpolate(x, scale_factor=2, mode="nearest"))
        return self.out(torch.cat([x, skip], 1))


@CASES(lambda: ((randn(2, 3, 8, 8), torch.tensor([3.0, 5.0]), torch.tensor([1, 2])), {}))
def diffusion_unet(k: int) -> nn.Module:
    return DiffusionUNet(8 * k)


@CASES(normal(2, 6))
def dcgan_generator(k: int) -> nn.Module:
    c = 8 * k
    return nn.Sequential(
        nn.Unflatten(1, (6, 1, 1)),
        nn.ConvTranspose2d(6, 4 * c, 4, 1, 0, bias=False),
        nn.BatchNorm2d(4 * c),
        nn.ReLU(True),
        nn.ConvTranspose2d(4 * c, c, 4, 2, 1, bias=False),
        nn.BatchNorm2d(c),
        nn.ReLU(True),
        nn.ConvTranspose2d(c, 3, 4, 2, 1),
        nn.Tanh(),
    )


class DenseGenerator(nn.Module):
    """Noise to a feature map by a linear layer and a view; style modulates convolutions."""

    def __init__(self, c: int):
        super().__init__()
        self.c = c
        self.mapping = nn.Sequential(nn.Linear(6, c), nn.LeakyReLU(0.2), nn.Linear(c, c))
        self.constant = nn.Parameter(torch.randn(1, c, 4, 4))
        self.seed = nn.Linear(6, c * 16)
        self.affine = nn.Linear(c, c)
        self.weight = nn.Parameter(torch.randn(2 * c, c, 3, 3))
        self.noise = nn.Parameter(torch.zeros(1))
        self.rgb = nn.Conv2d(2 * c, 3, 1)

    def forward(self, z: Tensor) -> Tensor:
        b = len(z)
        x = self.constant.repeat(b, 1, 1, 1) + self.seed(z).view(b, -1, 4, 4)
        style = self.affine(self.mapping(z)) + 1
        w = self.weight.unsqueeze(0) * style.view(b, 1, -1, 1, 1)
        w = w * torch.rsqrt(w.square().sum((2, 3, 4), keepdim=True) + 1e-8)
        x = F.conv2d(x.reshape(1, -1, 4, 4), w.flatten(0, 1), padding=1, groups=b).view(b, 2 * self.c, 4, 4)
        return self.rgb(F.leaky_relu(x + self.noise * torch.ones(1, 1, 4, 4), 0.2))


@CASES(normal(3, 6))
def style_generator(k: int) -> nn.Module:
    return DenseGenerator(8 * k)


class SuperResolution(nn.Module):
    """Residual channel attention and upscaling by pixel shuffle."""

    def __init__(self, c: int):
        super().__init__()
        self.enter = nn.Conv2d(3, c, 3, padding=1)
        self.body = nn.Sequential(nn.Conv2d(c, c, 3, padding=1), nn.PReLU(), nn.Conv2d(c, c, 3, padding=1))
        self.attend = nn.Sequential(
            nn.AdaptiveAvgPool2d(1), nn.Conv2d(c, c // 4, 1), nn.ReLU(), nn.Conv2d(c // 4, c, 1), nn.Sigmoid()
        )
        self.up = nn.Sequential(
            nn.Conv2d(c, 4 * c, 3, padding=1),
            nn.PixelShuffle(2),
            nn.Conv2d(c, 3 * 4, 3, padding=1),
            nn.PixelShuffle(2),
        )

    def forward(self, x: Tensor) -> Tensor:
        h = self.enter(x)
        y = self.body(h)
        return self.up(h + y * self.attend(y)) + F.interpolate(x, scale_factor=4, mode="bicubic")


@CASES(image(8))
def super_resolution(k: int) -> nn.Module:
    return SuperResolution(8 * k)


class VQVAE(nn.Module):
    """Nearest code of a codebook of fixed length; straight-through gradient."""

    def __init__(self, c: int, code: int, codes: int = 13):
        super().__init__()
        self.encoder = nn.Sequential(nn.Conv2d(3, c, 4, 2, 1), nn.ReLU(), nn.Conv2d(c, code, 1))
        self.codebook = nn.Embedding(codes, code)
        self.decoder = nn.Sequential(
            nn.Conv2d(code, c, 3, padding=1), nn.ReLU(), nn.ConvTranspose2d(c, 3, 4, 2, 1)
        )

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        z = self.encoder(x).permute(0, 2, 3, 1)
        flat = z.reshape(-1, z.shape[-1])
        table = self.codebook.weight
        distance = flat.pow(2).sum(1, keepdim=True) - 2 * flat @ table.t() + table.pow(2).sum(1)
        q = self.codebook(distance.argmin(1)).view(z.shape)
        loss = F.mse_loss(q.detach(), z) + F.mse_loss(q, z.detach())
        return self.decoder((z + (q - z).detach()).permute(0, 3, 1, 2)), loss


@CASES(image(8), ambiguous=r"encoder\.2\..*:0|codebook.weight:1|decoder\.0\.weight:1")
def vqvae(k: int) -> nn.Module:
    return VQVAE(8 * k, 4 * k)


class MAE(nn.Module):
    """Masked autoencoder: patches are kept by gather, mask tokens fill in, a narrower decoder."""

    def __init__(self, heads: int, head_dim: int = 8, patches: int = 16, pixels: int = 12):
        super().__init__()
        d, e = heads * head_dim, heads * head_dim // 2
        self.patch, self.cls = nn.Linear(pixels, d), nn.Parameter(torch.zeros(1, 1, d))
        self.register_buffer("pos", torch.randn(1, patches + 1, d))
        self.encoder = nn.TransformerEncoderLayer(d, heads, 2 * d, batch_first=True)
        self.bridge, self.mask = nn.Linear(d, e), nn.Parameter(torch.zeros(1, 1, e))
        self.decoder_pos = nn.Parameter(torch.randn(1, patches + 1, e))
        self.decoder = nn.TransformerEncoderLayer(e, heads, 2 * e, batch_first=True)
        self.head = nn.Linear(e, pixels)

    def forward(self, x: Tensor, noise: Tensor) -> Tensor:
        x = self.patch(x) + self.pos[:, 1:]
        b, n, d = x.shape
        order = noise.argsort(1)
        back = order.argsort(1)
        kept = order[:, : n // 4]
        x = torch.gather(x, 1, kept.unsqueeze(-1).expand(-1, -1, d))
        x = torch.cat([(self.cls + self.pos[:, :1]).expand(b, -1, -1), x], 1)
        y = self.bridge(self.encoder(x))
        masked = self.mask.repeat(b, n + 1 - y.shape[1], 1)
        full = torch.cat([y[:, 1:], masked], 1)
        full = torch.gather(full, 1, back.unsqueeze(-1).repeat(1, 1, full.shape[-1]))
        y = torch.cat([y[:, :1], full], 1) + self.decoder_pos
        return self.head(self.decoder(y))[:, 1:]


@CASES(lambda: ((randn(2, 16, 12), torch.rand(2, 16)), {}))
def mae(k: int) -> nn.Module:
    return MAE(2 * k)


class SEResNet(nn.Module):
    """Squeeze and excitation by linear layers, group norm, global pooling by mean."""

    def __init__(self, c: int):
        super().__init__()
        self.stem = nn.Conv2d(3, c, 3, 2, 1)
        self.conv1, self.norm1 = nn.Conv2d(c, 2 * c, 3, 2, 1), nn.GroupNorm(4, 2 * c)
        self.conv2, self.norm2 = nn.Conv2d(2 * c, 2 * c, 3, 1, 1), nn.GroupNorm(4, 2 * c)
        self.short = nn.Conv2d(c, 2 * c, 1, 2)
        self.squeeze, self.excite = nn.Linear(2 * c, c // 2), nn.Linear(c // 2, 2 * c)
        self.head = nn.Linear(2 * c, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x)))))
        s = torch.sigmoid(self.excite(F.relu(self.squeeze(y.mean((2, 3))))))
        x = F.relu(self.short(x) + y * s[:, :, None, None])
        return self.head(x.mean((-2, -1)))


@CASES(image(16))
def se_resnet(k: int) -> nn.Module:
    return SEResNet(8 * k)


class SpectralConv(nn.Module):
    """Complex weights on the lowest Fourier modes, whose number is fixed."""

    def __init__(self, c: int, modes: int = 3):
        super().__init__()
        self.modes = modes
        self.low = nn.Parameter(torch.randn(c, c, modes, modes, dtype=torch.cfloat) / c)
        self.high = nn.Parameter(torch.randn(c, c, modes, modes, dtype=torch.cfloat) / c)

    def forward(self, x: Tensor) -> Tensor:
        m, f = self.modes, torch.fft.rfft2(x)
        out = torch.zeros_like(f)
        out[:, :, :m, :m] = torch.einsum("bixy,ioxy->boxy", f[:, :, :m, :m], self.low)
        out[:, :, -m:, :m] = torch.einsum("bixy,ioxy->boxy", f[:, :, -m:, :m], self.high)
        return torch.fft.irfft2(out, s=x.shape[-2:])


class FNO(nn.Module):
    """Fourier neural operator on a grid, whose coordinates are extra channels."""

    def __init__(self, c: int):
        super().__init__()
        self.lift, self.project = (
            nn.Linear(3, c),
            nn.Sequential(nn.Linear(c, 4 * c), nn.GELU(), nn.Linear(4 * c, 1)),
        )
        self.spectral = nn.ModuleList(SpectralConv(c) for _ in range(2))
        self.local = nn.ModuleList(nn.Conv2d(c, c, 1) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        b, h, w, _ = x.shape
        ys, xs = torch.meshgrid(torch.linspace(0, 1, h), torch.linspace(0, 1, w), indexing="ij")
        grid = torch.stack([ys, xs], -1).expand(b, h, w, 2)
        v = self.lift(torch.cat([x, grid], -1)).permute(0, 3, 1, 2)
        for spectral, local in zip(self.spectral, self.local, strict=True):
            v = F.gelu(spectral(v) + local(v))
        return self.project(v.permute(0, 2, 3, 1))


@CASES(normal(2, 8, 8, 1))
def fno(k: int) -> nn.Module:
    return FNO(6 * k)


class Capsules(nn.Module):
    """Dynamic routing between capsules; capsule sizes and classes are fixed, their types grow."""

    def __init__(self, c: int, types: int, classes: int = 5):
        super().__init__()
        self.stem = nn.Conv2d(1, c, 5, 2)
        self.primary = nn.Conv2d(c, types * 4, 3, 2)
        self.weight = nn.Parameter(torch.randn(types, classes, 6, 4) * 0.1)

    def squash(self, s: Tensor) -> Tensor:
        n = s.pow(2).sum(-1, keepdim=True)
        return n / (1 + n) * s / (n + 1e-8).sqrt()

    def forward(self, x: Tensor) -> Tensor:
        u = self.primary(F.relu(self.stem(x)))
        u = self.squash(u.view(u.shape[0], -1, 4, *u.shape[2:]).mean((-2, -1)))
        votes = torch.einsum("bni,ncji->bncj", u, self.weight)
        logits = votes.new_zeros(votes.shape[:3])
        for _ in range(2):
            v = self.squash((logits.softmax(-1).unsqueeze(-1) * votes).sum(1))
            logits = logits + (votes * v.unsqueeze(1)).sum(-1)
        return v.norm(dim=-1)


@CASES(image(12, 1), ambiguous=r"^weight:2")  # the size of a class capsule
def capsules(k: int) -> nn.Module:
    return Capsules(8 * k, 4 * k)


class PointNet(nn.Module):
    """Shared MLP over points, a learned 3x3 alignment, global features concatenated back."""

    def __init__(self, c: int):
        super().__init__()
        self.align = nn.Sequential(
            nn.Conv1d(3, c, 1), nn.ReLU(), nn.AdaptiveMaxPool1d(1), nn.Flatten(), nn.Linear(c, 9)
        )
        self.local = nn.Sequential(nn.Conv1d(3, c, 1), nn.BatchNorm1d(c), nn.ReLU())
        self.wide = nn.Sequential(nn.Conv1d(c, 4 * c, 1), nn.BatchNorm1d(4 * c))
        self.head = nn.Sequential(nn.Conv1d(5 * c, 2 * c, 1), nn.ReLU(), nn.Conv1d(2 * c, 6, 1))

    def forward(self, x: Tensor) -> Tensor:
        matrix = self.align(x).view(-1, 3, 3) + torch.eye(3)
        x = torch.bmm(x.transpose(2, 1), matrix).transpose(2, 1)
        local = self.local(x)
        whole = self.wide(local).max(2, keepdim=True)[0].expand(-1, -1, x.shape[-1])
        return self.head(torch.cat([local, whole], 1))


@CASES(normal(2, 3, 10))
def pointnet(k: int) -> nn.Module:
    return PointNet(8 * k)


class SpatialTransformer(nn.Module):
    """Localization flattens channels with positions; an affine grid resamples; LeNet-like head."""

    def __init__(self, c: int):
        super().__init__()
        self.locate = nn.Sequential(
            nn.Conv2d(1, c, 7),
            nn.MaxPool2d(2, 2),
            nn.ReLU(True),
            nn.Conv2d(c, c, 5),
            nn.MaxPool2d(2, 2),
            nn.ReLU(True),
        )
        self.theta = nn.Sequential(nn.Linear(c * 9, 2 * c), nn.ReLU(True), nn.Linear(2 * c, 6))
        self.body = nn.Sequential(nn.Conv2d(1, c, 5), nn.MaxPool2d(2), nn.ReLU(), nn.Dropout2d(0.1))
        self.head = nn.Sequential(
            nn.Linear(c * 144, 5 * c), nn.ReLU(), nn.Linear(5 * c, 10), nn.LogSoftmax(-1)
        )
        self.c = c

    def forward(self, x: Tensor) -> Tensor:
        theta = self.theta(self.locate(x).view(-1, self.c * 9)).view(-1, 2, 3)
        x = F.grid_sample(x, F.affine_grid(theta, list(x.shape), align_corners=False), align_corners=False)
        return self.head(torch.flatten(self.body(x), 1))


@CASES(image(28, 1))
def spatial_transformer(k: int) -> nn.Module:
    return SpatialTransformer(4 * k)


class ShuffleUnit(nn.Module):
    """Split, depthwise, channel shuffle by view and transpose (three groups by literal)."""

    def __init__(self, c: int):
        super().__init__()
        self.stem = nn.Conv2d(3, 2 * c, 3, 2, 1)
        self.branch = nn.Sequential(
            nn.Conv2d(c, c, 1),
            nn.BatchNorm2d(c),
            nn.ReLU(),
            nn.Conv2d(c, c, 3, 1, 1, groups=c),
            nn.Conv2d(c, c, 1),
        )
        self.head = nn.Linear(2 * c, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        a, b = x.chunk(2, 1)
        x = torch.cat([a, self.branch(b)], 1)
        n, c, h, w = x.shape
        x = x.view(n, 2, c // 2, h, w).transpose(1, 2).contiguous().view(n, -1, h, w)
        return self.head(F.adaptive_avg_pool2d(x, 1).flatten(1))


@CASES(image(8))
def shuffle_unit(k: int) -> nn.Module:
    return ShuffleUnit(6 * k)


class Video3D(nn.Module):
    """Factored 3-D convolutions with instance norm."""

    def __init__(self, c: int):
        super().__init__()
        self.space, self.time = (
            nn.Conv3d(3, c, (1, 3, 3), padding=(0, 1, 1)),
            nn.Conv3d(c, 2 * c, (3, 1, 1), padding=(1, 0, 0)),
        )
        self.norm, self.pool = nn.InstanceNorm3d(2 * c, affine=True), nn.AvgPool3d((1, 2, 2))
        self.recur = nn.LSTM(2 * c, c, batch_first=True)
        self.head = nn.Linear(c, 6)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(F.relu(self.norm(self.time(F.relu(self.space(x))))))
        x = x.mean((-2, -1)).transpose(1, 2)
        return self.head(self.recur(x)[1][0][-1])


@CASES(normal(2, 3, 4, 8, 8))
def video(k: int) -> nn.Module:
    return Video3D(8 * k)


class Detector(nn.Module):
    """Feature pyramid with shared heads: boxes and classes for anchors of literal number."""

    def __init__(self, c: int, anchors: int = 3, classes: int = 4):
        super().__init__()
        self.classes = classes
        self.c1, self.c2 = nn.Conv2d(3, c, 3, 2, 1), nn.Conv2d(c, 2 * c, 3, 2, 1)
        self.l1, self.l2 = nn.Conv2d(c, c, 1), nn.Conv2d(2 * c, c, 1)
        self.smooth = nn.Conv2d(c, c, 3, padding=1)
        self.tower = nn.Sequential(nn.Conv2d(c, c, 3, padding=1), nn.GroupNorm(2, c), nn.ReLU())
        self.cls, self.box = (
            nn.Conv2d(c, anchors * classes, 3, padding=1),
            nn.Conv2d(c, anchors * 4, 3, padding=1),
        )
        self.scales = nn.ParameterList(nn.Parameter(torch.ones(())) for _ in range(2))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        c1 = F.relu(self.c1(x))
        c2 = F.relu(self.c2(c1))
        p2 = self.l2(c2)
        p1 = self.smooth(self.l1(c1) + F.interpolate(p2, size=c1.shape[-2:], mode="nearest"))
        scores, boxes = [], []
        for p, scale in zip((p1, p2), self.scales, strict=True):
            t = self.tower(p)
            scores.append(self.cls(t).permute(0, 2, 3, 1).reshape(len(x), -1, self.classes))
            boxes.append((self.box(t) * scale).permute(0, 2, 3, 1).reshape(len(x), -1, 4).exp())
        return torch.cat(scores, 1), torch.cat(boxes, 1)


@CASES(image(16))
def detector(k: int) -> nn.Module:
    return Detector(8 * k)


class MLPConvFlatten(nn.Module):
    """Channels flattened with positions and back, with a width of its own in between."""

    def __init__(self, c: int, hidden: int):
        super().__init__()
        self.c = c
        self.into, self.out = nn.Conv2d(1, c, 3, 2, 1), nn.ConvTranspose2d(c, 1, 4, 2, 1)
        self.squeeze, self.expand = nn.Linear(c * 16, hidden), nn.Linear(hidden, c * 16)
        self.label = nn.Embedding(10, hidden)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        h = self.squeeze(F.relu(self.into(x)).flatten(1)) * self.label(y)
        return self.out(F.relu(self.expand(F.relu(h))).reshape(-1, self.c, 4, 4))


@CASES(lambda: ((randn(2, 1, 8, 8), randint(10, 2)), {}))
def conditional_autoencoder(k: int) -> nn.Module:
    return MLPConvFlatten(6 * k, 10 * k)


class Involution(nn.Module):
    """A kernel made for every position, applied to unfolded patches; groups of literal number."""

    def __init__(self, c: int, groups: int = 2, kernel: int = 3):
        super().__init__()
        self.groups, self.kernel = groups, kernel
        self.stem, self.reduce = nn.Conv2d(3, c, 1), nn.Conv2d(c, c // 2, 1)
        self.span = nn.Conv2d(c // 2, groups * kernel * kernel, 1)
        self.head = nn.Conv2d(c, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        b, c, h, w = x.shape
        kernel = self.span(F.relu(self.reduce(x))).view(b, self.groups, 1, self.kernel**2, h, w)
        patches = F.unfold(x, self.kernel, padding=1).view(
            b, self.groups, c // self.groups, self.kernel**2, h, w
        )
        return self.head((kernel * patches).sum(3).view(b, c, h, w))


@CASES(image(8), ambiguous=r"span\.(weight|bias):0")  # more groups, or larger ones
def involution(k: int) -> nn.Module:
    return Involution(8 * k)


class CLIPLike(nn.Module):
    """Image and text towers meet in a space of their own."""

    def __init__(self, c: int, d: int, joint: int):
        super().__init__()
        self.image = nn.Sequential(nn.Conv2d(3, c, 4, 4), nn.GELU(), nn.Flatten(), nn.Linear(c * 16, d))
        self.words, self.text = nn.Embedding(50, d), nn.GRU(d, d, batch_first=True)
        self.image_proj, self.text_proj = nn.Linear(d, joint, bias=False), nn.Parameter(torch.randn(d, joint))
        self.scale = nn.Parameter(torch.tensor(1.0))

    def forward(self, pixels: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        a = self.image_proj(self.image(pixels))
        b = self.text(self.words(ids))[0][torch.arange(len(ids)), ids.argmax(-1)] @ self.text_proj
        a, b = (x / x.norm(dim=-1, keepdim=True) for x in (a, b))
        logits = self.scale.exp() * a @ b.t()
        return logits, logits.t()


@CASES(lambda: ((randn(3, 3, 16, 16), randint(50, 3, 6)), {}))
def clip_like(k: int) -> nn.Module:
    return CLIPLike(4 * k, 12 * k, 8 * k)
