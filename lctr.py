"""LCTR: Local Continuity Transformer for weakly supervised object localisation (AAAI 2022).

The whole model, in the paper's order: tokens (Eq. 1), attention and RPAM (Eq. 4, Fig. 3), the
transformer, the cue digging module (Eq. 6), class scores (Eq. 2), patch relation map (Eq. 5) and
localisation map (Eq. 3). `python lctr.py [IMAGE] [--checkpoint FILE]` prints every step.

    symbol        in code          shape             meaning
    B, C, K       num_classes                        images, classes, requested classes
    H x W         img_size                           pixels of an image
    h x w         grid                               its patches; N = h * w, row-major
    P, D, L       patch_size, embed_dim, depth       side of a patch, width, blocks
    S, d          num_heads                          attention heads, each d = D / S wide
    X_l           x                (B, N+1, D)       tokens, the class token first
    A_l           attn             (B, S, N+1, N+1)  attention of block l
    M_l^c         cls_attn         (B, N+1)          its class row, mean over heads
    M_l^r         relation         (B, N)            all its rows, weighted by M_l^c
    M~_*^c        cls_map          (B, h, w)         mean of the M_l^c, patches alone
    M_*^r         relation_map     (B, h, w)         mean of the M_l^r (Eq. 5)
    X_L           features         (B, D, h, w)      patches after the last block and norm
    X~_L          cues             (B, D, h, w)      what is left where M~_*^c is erased
    S_g           scores           (B, G)            weights of the convolution kernels
    W_g^e         weight           (G, C, D, k, k)   G convolution kernels of k x k
    X_CDM         class_maps       (B, C, h, w)      Eq. 6; M_CDM at the K requested: (B, K, h, w)

The naive `rpam` and `dynamic_conv2d` below are the paper's definitions. The model calls their
twins in `kernels`, which compute the same, fused: Triton on CUDA, torch elsewhere.
"""

import math
import sys
from collections import OrderedDict
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import kernels
from support import walkthrough, weights
from support.common import minmax, one_of, pair

ARCHITECTURES = {"tiny": (192, 12, 3), "small": (384, 12, 6), "base": (768, 12, 12)}  # D, L, S
COUPLINGS = ("none", "cls", "relation", "cls-only", "relation-only")
HEADS = weights.HEADS  # prefixes of the parameters that are no backbone's
MODEL_FLAGS = (  # what a checkpoint's config says of its model
    "img_size", "patch_size", "embed_dim", "depth", "num_heads", "drop_path", "head", "num_kernels",
    "kernel_size", "scorer", "erase", "pool")


# ---------------------------------------------------------------- attention and RPAM

class AttentionMaps(NamedTuple):
    """What RPAM reads off one block's attention; None where it was not requested."""

    cls: Tensor  # M_l^c (B, N+1)
    relation: Tensor | None  # M_l^r (B, N)
    full: Tensor | None  # A_l (B, S, N+1, N+1)


def rpam(attn: Tensor) -> tuple[Tensor, Tensor]:
    """RPAM (Fig. 3), naively: A_l (B, S, N+1, N+1) -> M_l^c (B, N+1), M_l^r (B, N)."""
    mean = attn.mean(1)  # A'_l (B, N+1, N+1): over the heads
    cls_attn = mean[:, 0]  # M_l^c (B, N+1): how much the class token attends to each token
    patch_attn = mean[:, :, 1:]  # M_l^p (B, N+1, N): how much each token attends to each patch
    weighted = cls_attn[:, :, None] * patch_attn  # M_l^h (B, N+1, N): (B, N+1, 1) times row by row
    return cls_attn, weighted.mean(1)  # M_l^r (B, N): over all N+1 rows


class Attention(nn.Module):
    """Multi-head self-attention (Eq. 4) that returns its maps as data."""

    def __init__(self, embed_dim: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(embed_dim, 3 * embed_dim)
        self.proj = nn.Linear(embed_dim, embed_dim)

    def forward(self, x: Tensor, attention: str) -> tuple[Tensor, AttentionMaps]:
        """x (B, N+1, D) -> the same shape, and maps; attention: see forward_features."""
        qkv = self.qkv(x).unflatten(2, (3, self.num_heads, -1))  # (B, N+1, 3, S, d)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (B, S, N+1, d)
        if attention == "full":
            attn = (q @ k.mT / math.sqrt(q.shape[-1])).softmax(-1)  # Eq. 4: A_l (B, S, N+1, N+1)
            out = attn @ v  # (B, S, N+1, d)
            maps = AttentionMaps(*kernels.aggregate_attention(attn), attn)  # rpam(attn), fused
        else:  # the same without holding A_l: Eq. 4 and rpam(attn) in one pass
            out, cls_attn, relation = kernels.attention(q, k, v, relation=attention == "relation")
            maps = AttentionMaps(cls_attn, relation, None)
        return self.proj(out.transpose(1, 2).flatten(2)), maps  # (B, N+1, S, d) -> (B, N+1, D)


# ---------------------------------------------------------------- the transformer

class Block(nn.Module):
    """One pre-norm transformer block."""

    def __init__(self, embed_dim: int, num_heads: int, mlp_ratio: float):
        super().__init__()
        self.norm1 = nn.LayerNorm(embed_dim, eps=1e-6)
        self.attn = Attention(embed_dim, num_heads)
        self.norm2 = nn.LayerNorm(embed_dim, eps=1e-6)
        hidden = int(embed_dim * mlp_ratio)
        self.mlp = nn.Sequential(OrderedDict(  # of each token alone; the GELU is exact
            fc1=nn.Linear(embed_dim, hidden), gelu=nn.GELU(), fc2=nn.Linear(hidden, embed_dim)))

    def forward(self, x: Tensor, attention: str, keep: Tensor | None) -> tuple:
        """x (B, N+1, D) -> the same shape, and AttentionMaps; keep (B, 2): stochastic_depth's."""
        update, maps = self.attn(self.norm1(x), attention)
        x = x + (update if keep is None else keep[:, 0, None, None] * update)  # (B, 1, 1) times
        update = self.mlp(self.norm2(x))
        return x + (update if keep is None else keep[:, 1, None, None] * update), maps


class VisionTransformer(nn.Module):
    """A ViT / DeiT whose blocks return their attention maps. Parameters have timm's names.

    img_size: int or (height, width) in pixels, multiples of patch_size. drop_path: the rate of
    stochastic depth. Raises ValueError for sizes that do not divide.
    """

    def __init__(self, img_size: int | tuple[int, int] = 224, patch_size: int = 16,
                 embed_dim: int = 384, depth: int = 12, num_heads: int = 6,
                 mlp_ratio: float = 4.0, drop_path: float = 0.0):
        super().__init__()
        self.img_size = pair(img_size)
        if any(side % patch_size or side < 1 for side in self.img_size):
            raise ValueError(f"img_size: got {img_size}, need multiples of patch_size {patch_size}")
        if num_heads < 1 or embed_dim % num_heads:
            raise ValueError(f"num_heads: got {num_heads}, need a divisor of embed_dim {embed_dim}")
        self.grid = tuple(side // patch_size for side in self.img_size)  # (h, w)
        self.num_heads = num_heads
        self.patch_embed = nn.Sequential(OrderedDict(
            proj=nn.Conv2d(3, embed_dim, patch_size, stride=patch_size)))
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + math.prod(self.grid), embed_dim))
        self.blocks = nn.ModuleList(Block(embed_dim, num_heads, mlp_ratio) for _ in range(depth))
        self.norm = nn.LayerNorm(embed_dim, eps=1e-6)
        self.drop_path = drop_path
        for layer in self.modules():
            if isinstance(layer, nn.Linear):
                nn.init.trunc_normal_(layer.weight, std=0.02)
                nn.init.zeros_(layer.bias)
        nn.init.trunc_normal_(self.cls_token, std=0.02)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)

    def embed(self, images: Tensor) -> Tensor:
        """Eq. 1: images (B, 3, H, W) -> X_1 = [x_cls; F(x_p^1); ...; F(x_p^N)] + P (B, N+1, D)."""
        patches = self.patch_embed(images)  # F: each P x P patch projected linearly (B, D, h, w)
        patches = patches.flatten(2).mT  # (B, N, D)
        cls_token = self.cls_token.expand(patches.shape[0], -1, -1)  # (1, 1, D) -> (B, 1, D)
        return torch.cat([cls_token, patches], 1) + self.pos_embed

    def stochastic_depth(self, batch: int, noise: Tensor | None) -> Tensor | None:
        """What multiplies the two residual branches of each block (B, L, 2); None: nothing does.

        In training a branch of block l is left out (times 0) with probability p_l, which grows
        linearly from 0 in the first block to drop_path in the last. Where it stays it counts
        1 / (1 - p_l), so that its mean is what it is at inference. noise (B, L, 2): uniform in
        [0, 1), drawn here where None; a branch stays where its number is at least p_l.
        """
        if not self.training or self.drop_path == 0:
            return None
        depth, dtype, device = len(self.blocks), self.pos_embed.dtype, self.pos_embed.device
        rates = torch.linspace(0, self.drop_path, depth, dtype=dtype, device=device)[:, None]
        if noise is None:
            noise = torch.rand(batch, depth, 2, device=device)
        return (noise >= rates) / (1 - rates)  # (B, L, 2) against p_l (L, 1)

    def forward_features(
        self, images: Tensor, attention: str = "cls", depth_noise: Tensor | None = None
    ) -> tuple[Tensor, list[AttentionMaps]]:
        """ImageNet-normalised images (B, 3, H, W) -> tokens (B, N+1, D), maps of L blocks.

        The tokens are X_L with the class token, after the final norm. attention: "cls" gives M_l^c
        alone; "relation" M_l^c and M_l^r, at inference, A_l never held; "full" all three.
        depth_noise: see stochastic_depth. Raises ValueError for another size or attention.
        """
        if images.shape[1:] != (3, *self.img_size):
            need = f"(B, 3, {self.img_size[0]}, {self.img_size[1]})"
            raise ValueError(f"images: got shape {tuple(images.shape)}, need {need}")
        one_of("attention", attention, "cls", "relation", "full")
        x = self.embed(images)  # Eq. 1: X_1 (B, N+1, D)
        keep = self.stochastic_depth(x.shape[0], depth_noise)  # (B, L, 2) or None
        maps = []
        for i, block in enumerate(self.blocks):
            x, block_maps = block(x, attention, None if keep is None else keep[:, i])
            maps.append(block_maps)
        return self.norm(x), maps


# ---------------------------------------------------------------- the cue digging module

def dynamic_conv2d(features: Tensor, scores: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Eq. 6, naively: X_L (B, D, h, w), S_g (B, G), W_g^e (G, C, D, k, k) -> X_CDM (B, C, h, w).

    Each image is convolved with its own kernel. bias (C) is weighted by no score.
    """
    mixed = torch.einsum("bg,gcduv->bcduv", scores, weight)  # sum_g S_g W_g^e (B, C, D, k, k)
    padding = weight.shape[-1] // 2
    return torch.stack(
        [F.conv2d(image, kernel, bias, padding=padding) for image, kernel in zip(features, mixed)])


class CDM(nn.Module):
    """Cue digging module: a convolution whose kernel is a mixture of G, for each image its own.

    The mixture's weights are scores of the cues: what is left where the class token attends little.
    scorer (Table 5): which pool of the cues feeds which linear layer. "gap", "gmp": that pool
    alone; "shared": one layer on their sum; "separate", the paper's: a layer for each, added.
    erase: "raw" reverses M~_*^c as it is (about 1/N, so little is erased); "minmax" normalises it
    to [0, 1] first. pool: see LCTR.
    """

    def __init__(self, embed_dim: int, num_classes: int, num_kernels: int, kernel_size: int,
                 scorer: str, erase: str, pool: str):
        super().__init__()
        self.scorer, self.erase, self.pool = scorer, erase, pool
        self.conv = nn.Conv2d(embed_dim, embed_dim, 3, padding=1)
        if scorer != "gmp":
            self.score_avg = nn.Linear(embed_dim, num_kernels)
        if scorer in ("gmp", "separate"):
            self.score_max = nn.Linear(embed_dim, num_kernels)
        k = kernel_size
        self.weight = nn.Parameter(torch.empty(num_kernels, num_classes, embed_dim, k, k))  # W_g^e
        self.bias = nn.Parameter(torch.zeros(num_classes))
        self.last_scores = None  # (B, G), of the last batch in training, for its log
        # Scores start at .5 and learn slowly (train.py's GATE_RATE). AdamW moves every weight of a
        # score layer alike, and GMP is positive in all D channels: at the full rate all kernels
        # are turned off within ten steps, and a sigmoid at 0 passes no gradient back.
        for name, parameter in self.named_parameters():
            if name.startswith("score_") or name == "conv.bias":
                nn.init.zeros_(parameter)
        rows = self.weight.flatten(0, 1)  # (G*C, D, k, k), whose fan-in is D * k * k
        nn.init.kaiming_uniform_(rows, a=math.sqrt(5))

    def reverse(self, cls_map: Tensor) -> Tensor:
        """M~_*^c (B, h, w) -> 1 - M~_*^c (B, h, w), which erases what is attended to."""
        return 1 - (minmax(cls_map) if self.erase == "minmax" else cls_map)

    def cues(self, features: Tensor, cls_map: Tensor) -> Tensor:
        """X_L (B, D, h, w), M~_*^c (B, h, w) -> X~_L (B, D, h, w)."""
        erased = features * self.reverse(cls_map)[:, None]  # times (B, 1, h, w)
        return self.conv(erased.to(features.dtype))

    def scores(self, features: Tensor, cls_map: Tensor) -> Tensor:
        """X_L (B, D, h, w), M~_*^c (B, h, w) -> S_g (B, G) in (0, 1)."""
        cues = self.cues(features, cls_map)  # X~_L (B, D, h, w)
        gap, gmp = cues.mean((2, 3)), cues.amax((2, 3))  # (B, D)
        if self.scorer == "gap":
            logits = self.score_avg(gap)
        elif self.scorer == "gmp":
            logits = self.score_max(gmp)
        elif self.scorer == "shared":
            logits = self.score_avg(gap + gmp)
        else:
            logits = self.score_avg(gap) + self.score_max(gmp)
        scores = logits.sigmoid()
        if self.training:
            self.last_scores = scores.detach()
        return scores

    def logits(self, features: Tensor, scores: Tensor) -> Tensor:
        """The average of X_CDM over its positions (B, C), without X_CDM: both are linear."""
        return kernels.dynamic_conv_logits(features, scores, self.weight, self.bias, self.pool)

    def class_maps(self, features: Tensor, scores: Tensor, classes: Tensor | None = None) -> Tensor:
        """Eq. 6: X_CDM (B, C, h, w), or M_CDM (B, K, h, w) at the requested classes (B, K)."""
        if classes is None:  # dynamic_conv2d, fused
            return kernels.dynamic_conv2d(features, scores, self.weight, self.bias)
        return kernels.class_maps(features, scores, self.weight, self.bias, classes)

    def forward(self, features: Tensor, cls_map: Tensor) -> Tensor:
        """X_L (B, D, h, w), M~_*^c (B, h, w) -> X_CDM (B, C, h, w)."""
        return self.class_maps(features, self.scores(features, cls_map))


# ---------------------------------------------------------------- the localisation map

class Localization(NamedTuple):
    """What LCTR.localize returns; fuse() makes the localisation map of it."""

    logits: Tensor  # (B, C)
    classes: Tensor  # (B, K): the class ids that the maps belong to
    class_maps: Tensor | None  # M_CDM (B, K, h, w), before any ReLU; None on a "token" head
    cls_map: Tensor  # M~_*^c (B, h, w)
    relation_map: Tensor  # M_*^r (B, h, w)


def fuse(localization: Localization, coupling: str = "relation", relu: bool = True) -> Tensor:
    """Localisation maps (B, K, h, w) of the K classes, before resizing and thresholds.

    coupling: "relation" is ReLU(M_CDM) * M_*^r, Eq. 3; "cls" ReLU(M_CDM) * M~_*^c; "none"
    ReLU(M_CDM) alone. On a "cdm" head these are LCTR, CDM and its class map; on a "conv" head
    TS-CAM + RPAM, TS-CAM and CAM. "relation-only", "cls-only": that attention map alone, the same
    for every class. relu=False leaves the class map signed, as TS-CAM's own code does. Raises
    ValueError for another coupling, or where a "token" head has no class maps.
    """
    one_of("coupling", coupling, *COUPLINGS)
    attention_map = localization.cls_map if "cls" in coupling else localization.relation_map
    attention_map = attention_map[:, None]  # (B, 1, h, w)
    if coupling.endswith("-only"):
        return attention_map.expand(-1, localization.classes.shape[1], -1, -1)  # (B, K, h, w)
    if localization.class_maps is None:
        need = 'a "token" head has no class maps: need "cls-only" or "relation-only"'
        raise ValueError(f"coupling: got {coupling!r}, {need}")
    class_maps = localization.class_maps.relu() if relu else localization.class_maps  # (B, K, h, w)
    return class_maps if coupling == "none" else class_maps * attention_map  # Eq. 3: M^fuse


# ---------------------------------------------------------------- LCTR

def pooled_conv(conv: nn.Conv2d, features: Tensor, pool: str) -> Tensor:
    """The average of conv(features) over its positions (B, C), as CDM.logits: G = 1, S_g = 1."""
    score = features.new_ones(features.shape[0], 1)
    return kernels.dynamic_conv_logits(features, score, conv.weight[None], conv.bias, pool)


def conv_at(conv: nn.Conv2d, features: Tensor, classes: Tensor) -> Tensor:
    """conv(features) at each image's requested classes (B, K) alone -> (B, K, h, w)."""
    score = features.new_ones(features.shape[0], 1)
    return kernels.class_maps(features, score, conv.weight[None], conv.bias, classes)


def mean_over_blocks(maps: list[AttentionMaps], name: str) -> Tensor:
    """(1/L) sum_l M_l of Eq. 5: of M_l^c (B, N+1) for "cls", of M_l^r (B, N) for "relation"."""
    return torch.stack([getattr(block, name) for block in maps]).mean(0)


class LCTR(VisionTransformer):
    """A vision transformer with one of three heads; trained with image labels, it localises.

    head: "cdm" is LCTR; "conv" is the TS-CAM baseline, one static convolution; "token" is plain
    DeiT, a linear layer on the class token, without class maps. pool: "gap" is the paper's;
    "padded" averages class maps over 3 x 3 positions (zeros outside) first, as the authors' code
    does. num_kernels: Table 6; kernel_size, 1 or 3: Table 7; scorer, erase: see CDM.
    Raises ValueError for a choice that does not exist or sizes that do not divide.
    """

    def __init__(self, num_classes: int, img_size: int | tuple[int, int] = 224,
                 patch_size: int = 16, embed_dim: int = 384, depth: int = 12, num_heads: int = 6,
                 mlp_ratio: float = 4.0, drop_path: float = 0.0, head: str = "cdm",
                 num_kernels: int = 4, kernel_size: int = 3, scorer: str = "separate",
                 erase: str = "raw", pool: str = "gap"):
        one_of("head", head, "cdm", "conv", "token")
        one_of("kernel_size", kernel_size, 1, 3)
        one_of("scorer", scorer, "separate", "shared", "gap", "gmp")
        one_of("erase", erase, "raw", "minmax")
        one_of("pool", pool, "gap", "padded")
        super().__init__(img_size, patch_size, embed_dim, depth, num_heads, mlp_ratio, drop_path)
        self.head_type, self.pool = head, pool
        if head == "cdm":
            self.cdm = CDM(embed_dim, num_classes, num_kernels, kernel_size, scorer, erase, pool)
        elif head == "conv":
            self.head = nn.Conv2d(embed_dim, num_classes, kernel_size, padding=kernel_size // 2)
            nn.init.zeros_(self.head.bias)
        else:
            self.classifier = nn.Linear(embed_dim, num_classes)
            nn.init.trunc_normal_(self.classifier.weight, std=0.02)
            nn.init.zeros_(self.classifier.bias)

    def on_grid(self, patches: Tensor) -> Tensor:
        """(B, N) -> (B, h, w), the paper's Gamma; (B, N, D) -> (B, D, h, w). Both are views."""
        return (patches if patches.ndim == 2 else patches.mT).unflatten(-1, self.grid)

    def classify(self, tokens: Tensor, cls_map: Tensor) -> tuple[Tensor, Tensor | None]:
        """Tokens (B, N+1, D), M~_*^c (B, h, w) -> logits (B, C); of a "cdm" head S_g (B, G)."""
        if self.head_type == "token":
            return self.classifier(tokens[:, 0]), None  # (B, D) -> (B, C)
        features = self.on_grid(tokens[:, 1:])  # X_L (B, D, h, w)
        if self.head_type == "conv":
            return pooled_conv(self.head, features, self.pool), None
        scores = self.cdm.scores(features, cls_map)
        return self.cdm.logits(features, scores), scores

    def forward(self, images: Tensor, depth_noise: Tensor | None = None) -> Tensor:
        """Images (B, 3, H, W) -> logits (B, C), Eq. 2's. depth_noise: see stochastic_depth."""
        tokens, maps = self.forward_features(images, "cls", depth_noise)
        cls_map = self.on_grid(mean_over_blocks(maps, "cls")[:, 1:])  # M~_*^c (B, h, w)
        return self.classify(tokens, cls_map)[0]

    def class_maps(
        self, tokens: Tensor, scores: Tensor | None, classes: Tensor | None = None
    ) -> Tensor | None:
        """The head's maps at the requested classes (B, K) -> (B, K, h, w), or at all C."""
        if self.head_type == "token":
            return None
        features = self.on_grid(tokens[:, 1:])  # X_L (B, D, h, w)
        if self.head_type == "cdm":
            return self.cdm.class_maps(features, scores, classes)
        return self.head(features) if classes is None else conv_at(self.head, features, classes)

    @torch.no_grad()
    def localize(self, images: Tensor, classes: Tensor | str | None = None) -> Localization:
        """Images (B, 3, H, W) -> logits and the maps that localise (the paper's "During testing").

        classes: (B, K) ids of the classes whose maps are computed, -1 for the predicted class;
        None for the predicted class alone, K = 1; "all" for all C. Raises ValueError for others.
        """
        if isinstance(classes, Tensor):
            if classes.shape[:-1] != images.shape[:1]:
                need = f"({images.shape[0]}, K)"
                raise ValueError(f"classes: got shape {tuple(classes.shape)}, need {need}")
        elif classes not in (None, "all"):
            raise ValueError(f'classes: got {classes!r}, need class ids (B, K), None or "all"')
        tokens, maps = self.forward_features(images, "relation")
        cls_map = self.on_grid(mean_over_blocks(maps, "cls")[:, 1:])  # M~_*^c (B, h, w)
        relation_map = self.on_grid(mean_over_blocks(maps, "relation"))  # Eq. 5: M_*^r (B, h, w)
        logits, scores = self.classify(tokens, cls_map)
        predicted = logits.argmax(1, keepdim=True)  # (B, 1)
        if isinstance(classes, str):
            class_maps = self.class_maps(tokens, scores)  # (B, C, h, w)
            classes = torch.arange(logits.shape[1], device=logits.device).expand_as(logits)
        else:
            classes = predicted if classes is None else torch.where(classes < 0, predicted, classes)
            class_maps = self.class_maps(tokens, scores, classes)  # M_CDM (B, K, h, w)
        return Localization(logits, classes, class_maps, cls_map, relation_map)


# ---------------------------------------------------------------- weights: support/weights.py

def load_pretrained(model: VisionTransformer, path: str) -> weights.LoadReport:
    """Loads a backbone from a file of weights; heads stay new. Raises ValueError naming the file.

    path: a .safetensors or torch file of a timm ViT, DeiT, DINOv2, TS-CAM, the authors' LCTR or
    this project, or deit_tiny, deit_small, deit_base, which torch.hub downloads once.
    """
    update, report = weights.fit_backbone(
        weights.read_weights(path), model.state_dict(), model.grid, model.num_heads, path)
    model.load_state_dict(update, strict=False)
    return report


def load_checkpoint(path: str) -> tuple[LCTR, dict]:
    """The model of a checkpoint, in eval mode, and its dict. Raises ValueError naming the file.

    Besides train.py's it takes the state dicts of the authors' LCTR, TS-CAM and DeiT.
    """
    checkpoint = weights.read_checkpoint(path, MODEL_FLAGS)
    return weights.assemble(LCTR, checkpoint, MODEL_FLAGS, path).eval(), checkpoint


if __name__ == "__main__":
    walkthrough.main(sys.modules[__name__])  # prints every step of localize, or exports a backbone
