"""
How should a model start, how deep should it be, how should the presets be trained, what could make
looping pay on text? Hundreds of small models, each with its own initial parameters and recipe,
trained on one H100 or H200 in minutes.

A group is models of one shape that are trained at the same time. Each tensor holds all of them, and
its first dimension is the model, so one kernel works for all. All models of a group have the same
numbers of loops, and those of one seed also the same sequences and masks: they differ only in what
is compared. The model is that of train_gpt2style.py; --check compares losses and gradients.

    make build/sudoku_train.bin build/sudoku_val.bin build/stories_train.bin build/stories_val.bin
    .venv/bin/python dev/data/tinystories.py --input FILE --vocab 4096 --out build/text
    for kind in train val; do cp build/text/$kind.bin build/tinystories_$kind.bin; done
    (text and small: the same with --vocab 1024, as build/tinystories1024_$kind.bin)
    python dev/experiments/starts.py GROUP ... --compile      trains; adds to dev/results/starts.csv
    python dev/experiments/starts.py --table                  prints what is in there
    python dev/experiments/starts.py --check

Several groups at a time, each in a process of its own, use a large GPU best. The groups small are
for a CPU: 5 to 8 minutes of one core each. It needs numpy and torch.
"""
import argparse
import csv
import math
import os
import random
import sys
import time
from collections import defaultdict
from dataclasses import dataclass, replace
from statistics import fmean as mean, mode

import numpy as np
import torch
import torch.nn.functional as F

sys.path.insert(0, os.path.join(os.path.dirname(__file__), "..", ".."))
import train_gpt2style as reference  # noqa: E402

SEEDS = (1, 2, 3)
SHARD_MAGIC = 20240520
STARTS = ("std", "scaled", "zero", "gains")
WAYS = {  # of looping
    "": "S drawn from 1 to max_loops",
    "top": "S drawn from max_loops / 2 to max_loops",
    "fixed": "always max_loops",
    "late": "one loop until half of the steps, then S drawn from 1 to max_loops",
    "inject": "each loop begins with the state plus a gain times the state before the first loop",
    "norm": "each loop begins with a LayerNorm",
    "gain": "a gain of each loop's own multiplies what the loop adds",
    "every": "the loss is the mean of the losses after each loop",
}


@dataclass(frozen=True)
class Recipe:
    """What a model of a group has of its own."""
    seed: int
    start: str             # of attproj and fcproj, one of STARTS: see initial()
    share: float           # of the learning rate, for attproj and fcproj
    lr: float
    warmup: float = 0.05   # share of the steps
    clip: float = 0.5
    beta2: float = 0.95
    decay: float = 0.01
    wte: float = 2.0       # standard deviation times sqrt(C)
    bias: float = 1.0      # standard deviation of the biases of q and k
    matrix: float = 0.8    # standard deviation times sqrt(C)
    floor: float = 0.1     # where the learning rate ends, as a share
    looped: float = 1.0    # share of the learning rate, for the looped layers


@dataclass(frozen=True)
class Group:
    """Models that are trained together."""
    task: str
    V: int
    T: int
    fixed: bool       # sequences begin at multiples of T
    layers: int
    heads: int
    channels: int
    loop: tuple
    max_loops: int
    batch: int
    steps: int
    recipes: tuple
    use: tuple = (1,)  # numbers of loops to evaluate with
    rows: int = 1024   # sequences in an evaluation
    way: str = ""      # of looping, one of WAYS
    noise: float = 0   # share of the steps in which some tokens to predict stay visible


def compare(rates, shares=(), share_rates=()):
    """Returns all starts with these rates; and zero with shares of other rates. All seeds."""
    kinds = [(start, 1.0, lr) for start in STARTS for lr in rates]
    kinds += [("zero", share, lr) for share in shares for lr in share_rates]
    return tuple(Recipe(seed, *kind) for kind in kinds for seed in SEEDS)


def vary(kinds, changes, lr, seeds=SEEDS, **same):
    """Returns recipes that differ from one of `kinds`, (start, share), in one of `changes`."""
    return tuple(Recipe(seed, *kind, lr, **{**same, **change}) for kind in kinds
                 for change in changes for seed in seeds)


SUDOKU = dict(task="sudoku", V=7, T=36, fixed=True, heads=4, channels=64, batch=32, rows=4096)
STORIES = dict(task="stories", V=703, T=96, fixed=True, heads=4, channels=64, batch=8)
TINY = dict(task="tinystories", V=4096, T=128, fixed=False, heads=4, channels=128, batch=32,
            rows=512)
MDM = dict(loop=(0, 0), max_loops=1)
LOOP4 = dict(loop=(1, 3), max_loops=4, use=(1, 2, 4, 8))
LOOP12 = dict(loop=(1, 3), max_loops=12, use=(1, 2, 6, 12, 24))
RATES4, RATES12 = (1e-3, 2e-3, 4e-3), (1e-3, 2e-3)
SHARES4, SHARES12 = (0.354, 0.177), (0.204, 0.102)  # 1/sqrt(2 L), and half of that
ZERO, GAINS = [("zero", 1.0)], [("gains", 1.0)]
CHANGES = (dict(bias=0.0), dict(wte=1.0), dict(wte=0.5), dict(clip=1.0), dict(clip=100.0),
           dict(warmup=0.01), dict(beta2=0.99), dict(decay=0.1), dict(matrix=0.4))
SLOW_CHANGES = (dict(bias=0.0), dict(wte=1.0), dict(wte=1.0, matrix=1.0), dict(clip=1.0),
                dict(warmup=0.1), dict(beta2=0.99), dict(decay=0.1))
NANO_CHANGES = (dict(), dict(decay=0.01), dict(beta2=0.99), dict(matrix=0.4), dict(wte=1.0),
                dict(warmup=0.1), dict(floor=0.0))
PAIR = dict(seeds=(1, 2), decay=0.1, clip=1.0)
TODAY = dict(decay=0.1, clip=1.0, warmup=0.1)  # as in the presets
D6 = dict(task="tinystories", V=4096, T=256, fixed=False, layers=6, heads=6, channels=288, **LOOP4)


def today(layers, rates, seeds=SEEDS, **changes):
    """Returns recipes of the program's own start, zero with the share 1/L."""
    kinds = [("zero", round(1 / layers, 3))]
    return tuple(r for lr in rates for r in vary(kinds, [changes], lr, seeds, **TODAY))


# What could make looping pay on text? In two sizes, for a GPU and for a CPU.
LOOPING = dict(task="tinystories1024", V=1024, T=128, fixed=False, heads=4, rows=1024, noise=0.5)
LARGE = dict(**LOOPING, channels=128, batch=32)
SMALL = dict(**LOOPING, channels=64, batch=4)


def ways(name, shape, layers, recipes, flop):
    """
    Returns {name_..: Group}: an MDM, a deeper one, and models with a loop 1:3 in the ways of WAYS,
    whose training takes so many FLOP. recipes(layers, **changes) returns those of a group.
    """
    def group(layers=layers, more=0.0, heads=1.0, loop=LOOP4, **other):
        """more: passes in a step beyond `layers`, on average; heads: how often the LM head runs."""
        C, T = shape["channels"], shape["T"]
        token = (layers + more) * (72 * C * C + 12 * T * C) + heads * 3 * C * shape["V"]
        return Group(**{**shape, **loop, "recipes": recipes(layers), **other}, layers=layers,
                     steps=round(flop / (token * shape["batch"] * T)))

    def looping(way="", more=3.0, **other):
        return group(more=more, loop={**LOOP4, "use": (1, 2, 3, 4, 8)}, way=way, **other)

    # With S from 1 to 4 two looped layers have 3 passes more. Of "every" a step has 2.5 tails and
    # heads.
    found = {"": group(loop=MDM), "_plain": group(loop=MDM, noise=0),
             "_deeper": group(layers + 3, loop=MDM), "_loop": looping(), "_top": looping("top", 4),
             "_fixed": looping("fixed", 4, max_loops=3), "_late": looping("late", 1.5),
             "_inject": looping("inject"), "_norm": looping("norm"), "_gain": looping("gain"),
             "_every": looping("every", 3 + 1.5 * (layers - 3), heads=2.5),
             "_slow": looping(recipes=recipes(layers, looped=0.5)),
             "_fast": looping(recipes=recipes(layers, looped=2.0))}
    return {name + of: group for of, group in found.items()}


GROUPS = {
    "sudoku4": Group(**SUDOKU, layers=4, **MDM, steps=5000, recipes=compare(RATES4)),
    "sudoku4_loop": Group(**SUDOKU, layers=4, **LOOP4, steps=3500,
                          recipes=compare(RATES4) + vary(ZERO + GAINS, CHANGES, 2e-3)),
    "stories4": Group(**STORIES, layers=4, **MDM, steps=4000, recipes=compare(RATES4)),
    "stories4_loop": Group(**STORIES, layers=4, **LOOP4, steps=4000,
                           recipes=compare(RATES4, SHARES4, RATES4)
                           + vary(ZERO + GAINS, CHANGES, 2e-3)
                           + vary([("zero", SHARES4[0])], SLOW_CHANGES, 2e-3)),
    "tiny4": Group(**TINY, layers=4, **MDM, steps=2500, recipes=compare(RATES4)),
    "tiny12": Group(**TINY, layers=12, **MDM, steps=2500,
                    recipes=compare(RATES4, SHARES12, RATES12)),
    "tiny12_loop": Group(**TINY, layers=12, **LOOP12, steps=1600,
                         recipes=compare(RATES12, SHARES12, RATES12)),
    "nano": Group(**{**TINY, "batch": 16}, layers=6, **LOOP4, steps=1600,
                  recipes=vary(GAINS, NANO_CHANGES, 4e-3, **PAIR)
                  + vary(GAINS, [{}], 8e-3, **PAIR) + vary(GAINS, [{}], 1.6e-2, **PAIR)
                  + vary(ZERO, [{}], 2e-3, **PAIR) + vary(ZERO, [{}], 4e-3, **PAIR)),
    # MDMs of three depths with 189 TFLOP each; with 74 TFLOP: --steps 2500, 975, 509
    "depth4": Group(**TINY, layers=4, **MDM, steps=6410, recipes=today(4, (4e-3, 8e-3))),
    "depth12": Group(**TINY, layers=12, **MDM, steps=2500, recipes=today(12, (2e-3, 4e-3))),
    "depth24": Group(**TINY, layers=24, **MDM, steps=1306, recipes=today(24, (2e-3, 4e-3))),
    # Recipes of the presets
    "nano8": Group(**{**TINY, "batch": 8}, layers=6, **LOOP4, steps=4000,
                   recipes=today(6, (1e-3, 1.4e-3, 2e-3, 2.8e-3, 4e-3))),
    "d6": Group(**D6, batch=16, steps=3000,
                recipes=today(6, (1e-3, 1.4e-3, 2e-3, 2.8e-3, 4e-3), (1, 2))
                + today(6, (2e-3,), (1, 2), warmup=0.05)),
    "d6_8": Group(**D6, batch=8, steps=6000, recipes=today(6, (1e-3, 2e-3), (1, 2))),
    "d6_32": Group(**D6, batch=32, steps=1500, recipes=today(6, (2e-3, 4e-3), (1, 2))),
    **ways("text", LARGE, 12, lambda L, **changes: today(L, RATES12, **changes), 400e12),
    **ways("small", SMALL, 4, lambda L, **changes: today(L, (2e-3,), (1, 2), **changes), 4e12),
}
BLOCK_TENSORS = ("ln1w", "ln1b", "qkvw", "qkvb", "attprojw", "attprojb", "ln2w", "ln2b",
                 "fcw", "fcb", "fcprojw", "fcprojb", "attgain", "fcgain")


# What a way of looping has of its own: in each loop for each channel.
WAY_TENSORS = {"inject": lambda g: {"inject": (g.channels,)},
               "norm": lambda g: {"loopnormw": (g.channels,), "loopnormb": (g.channels,)},
               "gain": lambda g: {"loopgain": (g.max_loops, g.channels)}}


def shapes(g):
    """Returns {name: shape} of one model's tensors; in a layer's, L is the first dimension."""
    L, C = g.layers, g.channels
    return {"wte": (g.V + 1, C), "wpe": (g.T, C), "lnfw": (C,), "lnfb": (C,),
            "ln1w": (L, C), "ln1b": (L, C), "qkvw": (L, 3 * C, C), "qkvb": (L, 3 * C),
            "attprojw": (L, C, C), "attprojb": (L, C), "ln2w": (L, C), "ln2b": (L, C),
            "fcw": (L, 4 * C, C), "fcb": (L, 4 * C), "fcprojw": (L, C, 4 * C), "fcprojb": (L, C),
            **WAY_TENSORS.get(g.way, lambda g: {})(g), "attgain": (L, C), "fcgain": (L, C)}


def initial(g, r):
    """
    Returns one model's parameters as a vector. The starts differ in what a branch first adds to
    the residual stream. std: attprojw and fcprojw are as wide as the other matrices; scaled: they
    are divided by sqrt(2 L), as in GPT-2; zero: they are zero; gains: a gain for each channel,
    trained from zero, multiplies what is added (in the other starts it is fixed at one).
    """
    # All starts of a seed draw the same numbers. u has the standard deviation 1/sqrt(C).
    generator, parts = torch.Generator().manual_seed(r.seed), []
    branch = {"zero": 0, "scaled": 1 / math.sqrt(2 * g.layers)}.get(r.start, 1)
    for name, shape in shapes(g).items():
        u = (torch.rand(shape, generator=generator) - 0.5) * math.sqrt(12 / g.channels)
        if name == "wte":
            x = r.wte * u
        elif name in ("qkvw", "fcw"):
            x = r.matrix * u
        elif name in ("attprojw", "fcprojw"):
            x = r.matrix * branch * u
        elif name == "qkvb":
            x = r.bias * math.sqrt(g.channels) * u
            x[:, 2 * g.channels:] = 0
        else:
            one = name in ("ln1w", "ln2w", "lnfw", "loopnormw", "loopgain")
            one = one or name in ("attgain", "fcgain") and r.start != "gains"
            x = torch.full(shape, float(one))
        parts.append(x.reshape(-1))
    return torch.cat(parts)


def read_shard(path, g):
    """Returns the tokens of a shard, int64."""
    header = np.fromfile(path, np.int32, 3)
    tokens = np.fromfile(path, np.uint16, offset=1024).astype(np.int64)
    if len(header) < 3 or header[0] != SHARD_MAGIC or len(tokens) < g.T or tokens.max() >= g.V:
        raise ValueError(f"{path} is no shard of {g.T} tokens and more, each below {g.V}")
    return tokens


def block(h, w, cosine, sine, B, heads, half):
    """h (M,B T,C) of M models through a layer; w: its tensors, each (M,..)."""
    (ln1w, ln1b, qkvw, qkvb, attprojw, attprojb, ln2w, ln2b, fcw, fcb, fcprojw, fcprojb,
     attgain, fcgain) = w
    M, N, C = h.shape
    T, D = N // B, C // heads
    x = F.layer_norm(h, (C,)) * ln1w[:, None] + ln1b[:, None]
    qkv = torch.bmm(x.to(half), qkvw.transpose(1, 2)) + qkvb[:, None]
    q, k, v = qkv.view(M * B, T, 3, heads, D).permute(2, 0, 3, 1, 4)

    def rope(x):
        x0, x1 = x.float().chunk(2, dim=-1)
        return torch.cat((x0 * cosine - x1 * sine, x1 * cosine + x0 * sine), dim=-1).to(half)

    y = F.scaled_dot_product_attention(rope(q), rope(k), v.to(half))
    y = y.transpose(1, 2).reshape(M, N, C)
    h = h + attgain[:, None] * (torch.bmm(y, attprojw.transpose(1, 2)) + attprojb[:, None])
    x = F.layer_norm(h, (C,)) * ln2w[:, None] + ln2b[:, None]
    x = torch.bmm(x.to(half), fcw.transpose(1, 2)) + fcb[:, None]
    x = F.gelu(x.float(), approximate="tanh").to(half)
    return h + fcgain[:, None] * (torch.bmm(x, fcprojw.transpose(1, 2)) + fcprojb[:, None])


def head(h, lnfw, lnfb, wte, targets, half):
    """The cross entropies (M,K) of rows h (M,K,C)."""
    x = F.layer_norm(h, h.shape[-1:]) * lnfw[:, None] + lnfb[:, None]
    logits = torch.bmm(x.to(half), wte[:, :-1].transpose(1, 2)).float()
    return torch.logsumexp(logits, -1) - logits.gather(2, targets[:, :, None]).squeeze(2)


def adamw(p, grad, m1, m2, lr, scale, beta2, correct1, correct2, decay, slow):
    """One step for all models. lr, scale, beta2, correct2 (M,1); decay, slow (M,total)."""
    grad = grad * scale
    m1.mul_(0.9).add_(0.1 * grad)
    m2.mul_(beta2).add_((1 - beta2) * grad * grad)
    p.mul_(1 - lr * slow * decay).sub_(lr * slow * correct1 * m1 / ((m2 * correct2).sqrt() + 1e-8))


class Models:
    """The models of a group."""

    def __init__(self, g, data, device, compiled):
        self.g, self.device, self.sizes = g, device, {n: math.prod(s) for n, s in shapes(g).items()}
        # Matrix products are in bfloat16 on a GPU, as in loopmdm.cu.
        self.half = torch.bfloat16 if device.type == "cuda" else torch.float32
        self.block, self.head, self.adamw = block, head, adamw
        if compiled:
            self.block, self.head, self.adamw = (
                torch.compile(f, dynamic=False) for f in (block, head, adamw))
        self.p = torch.stack([initial(g, r) for r in g.recipes]).to(device).requires_grad_()
        self.M = len(g.recipes)
        self.tokens, self.held = (
            torch.from_numpy(read_shard(os.path.join(data, f"{g.task}_{kind}.bin"), g)).to(device)
            for kind in ("train", "val"))
        D = g.channels // g.heads
        angle = np.arange(g.T)[:, None] * 10000 ** (-2.0 * np.arange(D // 2) / D)
        self.cosine, self.sine = (torch.from_numpy(f(angle).astype(np.float32)).to(device)
                                  for f in (np.cos, np.sin))
        # The head's rows: half of the positions, and 8 standard deviations more. So practically no
        # position to predict is ever left out.
        N = g.batch * g.T
        self.K = min(N, math.ceil(N / 2 + g.T / 2 + 8 * math.sqrt(N / 6)))

    def tensors(self):
        """Returns {name: tensor (M,..)}; of a layer's tensor, a list with one for each layer."""
        found = {}
        parts = self.p.split(list(self.sizes.values()), dim=1)
        for part, (name, shape) in zip(parts, shapes(self.g).items()):
            x = part.view(self.M, *shape)
            matrix = name in ("qkvw", "attprojw", "fcw", "fcprojw")
            x = x.to(self.half) if matrix else x
            found[name] = x.unbind(1) if name in BLOCK_TENSORS else x
        return found

    def through(self, h, layers):
        """h (M,B T,C) through some layers."""
        g = self.g
        for layer in layers:
            h = self.block(h, layer, self.cosine, self.sine, g.batch, g.heads, self.half)
        return h

    def loop(self, h, w, layers, S):
        """The states (M,B T,C) after each of S loops of layers. h: the one before the first."""
        g, start = self.g, h
        for s in range(S):
            if g.way == "inject":
                h = h + w["inject"][:, None] * start
            if g.way == "norm":
                h = F.layer_norm(h, h.shape[-1:]) * w["loopnormw"][:, None]
                h = h + w["loopnormb"][:, None]
            before, h = h, self.through(h, layers)
            if g.way == "gain":
                gain = w["loopgain"][:, min(s, g.max_loops - 1)]
                h = before + gain[:, None] * (h - before)
            yield h

    def losses(self, targets, masked, weights, which, S, every=False):
        """
        targets, masked, weights (U,B,T): one batch for each seed; which (M): each model's seed.
        Returns the NELBO estimates (M); with `every` their mean over what it is after each loop.
        """
        g, w, N = self.g, self.tensors(), self.g.batch * self.g.T
        targets, masked, weights = (x.reshape(-1, N) for x in (targets, masked, weights))
        x = torch.where(masked, g.V, targets)[which]
        rows = torch.arange(self.M, device=self.device)[:, None] * (g.V + 1)
        h = F.embedding(x + rows, w["wte"].reshape(-1, g.channels))
        h = (h.view(self.M, g.batch, g.T, -1) + w["wpe"][:, None]).view(self.M, N, -1)
        layers = list(zip(*(w[name] for name in BLOCK_TENSORS)))
        h = self.through(h, layers[:g.loop[0]])
        states = list(self.loop(h, w, layers[slice(*g.loop)], S))
        states = [self.through(h, layers[g.loop[1]:]) for h in states[0 if every else -1:]]

        # The positions to predict come first, then others, whose weight is zero.
        place = torch.argsort((weights == 0).int(), dim=1, stable=True)[:, :self.K]
        targets, weights = (x.gather(1, place)[which] for x in (targets, weights))
        wte, total = w["wte"].to(self.half), 0
        for h in states:
            h = h.gather(1, place[which][:, :, None].expand(-1, -1, g.channels))
            losses = self.head(h, w["lnfw"], w["lnfb"], wte, targets, self.half)
            total = total + (weights * losses).sum(1) / len(states)
        return total

    def noise(self, targets, generator, visible=0.0):
        """Noise as in train_gpt2style.add_noise(). targets (U,B,T) -> masked, weights (U,B,T)."""
        U, B, T = targets.shape
        u = torch.rand(U, 1, generator=generator, device=self.device)
        t = 1e-3 + (1 - 1e-3) * ((u + torch.arange(B, device=self.device) / B) % 1)
        u = torch.rand(U, B, T, generator=generator, device=self.device)
        t = t[:, :, None]
        return (u < t) & (u >= visible * t), (u < t) / (t * B * T)

    def evaluate(self, loops):
        """Returns {S: NELBO (M) of held-out sequences}; all models see the same ones."""
        # With gradients, which nobody uses: without them torch.compile would compile anew.
        g, found = self.g, {}
        available = len(self.held) // g.T
        which = torch.zeros(self.M, dtype=torch.long, device=self.device)
        for S in loops:
            generator = torch.Generator(self.device).manual_seed(1)
            found[S] = torch.zeros(self.M, device=self.device)
            for first in range(0, g.rows, g.batch):
                rows = torch.arange(first, first + g.batch, device=self.device)
                rows = rows * max(1, available // g.rows) % available
                places = rows[:, None] * g.T + torch.arange(g.T, device=self.device)
                targets = self.held[places][None]
                masked, weights = self.noise(targets, generator)
                found[S] += self.losses(targets, masked, weights, which, S).detach()
            found[S] = (found[S] * g.batch / g.rows).tolist()
        return found

    def train(self, steps, report):
        """Trains all models. Calls report(step) on the way and at the end."""
        g, device = self.g, self.device
        seeds = sorted({r.seed for r in g.recipes})
        which = torch.tensor([seeds.index(r.seed) for r in g.recipes], device=device)
        generator = torch.Generator(device).manual_seed(seeds[0])
        column = lambda name: torch.tensor([[getattr(r, name)] for r in g.recipes], device=device)
        lr, warmup, clip, beta2, floor = map(column, ("lr", "warmup", "clip", "beta2", "floor"))
        warmup = (warmup * steps).clamp(min=1)
        decays = torch.cat([torch.full((n,), float(name in ("wte", "wpe", "qkvw", "attprojw",
                                                            "fcw", "fcprojw")))
                            for name, n in self.sizes.items()]).to(device)
        decay = column("decay") * decays
        branch = torch.cat([torch.full((n,), "proj" in name) for name, n in self.sizes.items()])
        slow = torch.where(branch.to(device), column("share"), 1.0)
        looped = torch.cat([torch.arange(n) // (n // g.layers) if name in BLOCK_TENSORS
                            else torch.full((n,), -1) for name, n in self.sizes.items()])
        looped = (looped >= g.loop[0]) & (looped < g.loop[1])
        slow = torch.where(looped.to(device), slow * column("looped"), slow)
        fixed = torch.tensor([r.start != "gains" for r in g.recipes], device=device)
        gains = self.sizes["attgain"] * 2  # the last numbers of a model
        m1, m2 = torch.zeros_like(self.p), torch.zeros_like(self.p)
        loops, stride = random.Random(1), g.T if g.fixed else 1
        count = (len(self.tokens) - g.T) // stride + 1
        offsets = torch.arange(g.T, device=device)

        for step in range(1, steps + 1):
            begin = torch.randint(count, (len(seeds), g.batch, 1), generator=generator,
                                  device=device) * stride
            targets = self.tokens[begin + offsets]
            visible = reference.visible_share(g.noise * steps, step - 1)
            masked, weights = self.noise(targets, generator, visible)
            fewest = {"top": (g.max_loops + 1) // 2, "fixed": g.max_loops}.get(g.way, 1)
            S = loops.randint(fewest, g.max_loops)
            if g.way == "late" and step <= steps // 2:
                S = 1
            every = g.way == "every"
            self.losses(targets, masked, weights, which, S, every).sum().backward()
            with torch.no_grad():
                done = ((step - warmup) / (steps - warmup)).clamp(0, 1)
                rate = lr * (step / warmup).clamp(max=1)
                rate = rate * (floor + (1 - floor) * 0.5 * (1 + torch.cos(math.pi * done)))
                grad = self.p.grad
                grad[fixed, -gains:] = 0
                scale = (clip / (grad.norm(dim=1, keepdim=True) + 1e-6)).clamp(max=1)
                self.adamw(self.p.detach(), grad, m1, m2, rate, scale, beta2,
                           torch.tensor(1 / (1 - 0.9 ** step), device=device),
                           1 / (1 - beta2 ** step), decay, slow)
                self.p.grad = None
            if step in (20, steps // 2, steps):
                report(step)


def run(name, o):
    """Trains a group and adds its results to the CSV file."""
    g, device = GROUPS[name], torch.device(o.device)
    steps = o.steps or g.steps
    models = Models(g, o.data, device, o.compile)
    began = [time.time(), 0]

    def report(step):
        if device.type == "cuda":
            torch.cuda.synchronize()
        took = (time.time() - began[0]) / (step - began[1])
        print(f"{name}: step {step} of {steps}, {1e3 * took:.1f} ms a step, {models.M} models",
              flush=True)
        began[:] = [time.time(), step]

    models.train(steps, report)
    results, fields = models.evaluate(g.use), list(Recipe.__dataclass_fields__)
    new = not os.path.exists(o.out)
    with open(o.out, "a", newline="") as file:
        write = csv.writer(file, lineterminator="\n").writerow
        if new:
            write(["group", "steps", *fields, "loops", "nelbo"])
        for S, losses in results.items():
            for r, loss in zip(g.recipes, losses):
                write([name, steps, *(getattr(r, f) for f in fields), S, f"{loss:.5f}"])


def table(path):
    """
    Prints the results: the mean of the seeds, their lowest and highest, by loops in use.
    "different" is what a recipe has other than most of its group.
    """
    found = defaultdict(lambda: defaultdict(lambda: defaultdict(list)))
    names = [f for f in Recipe.__dataclass_fields__ if f != "seed"]
    lines = list(csv.DictReader(open(path)))
    if not lines or {"group", "steps", "loops", "nelbo", "seed", *names} - {*lines[0]}:
        raise ValueError(f"{path} has no results of this program")
    for line in lines:
        recipe = tuple(line[n] if n == "start" else float(line[n]) for n in names)
        group = found[f"{line['group']}, {line['steps']} steps"]
        group[recipe][int(line["loops"])].append(float(line["nelbo"]))
    for title, group in found.items():
        usual = [mode(values) for values in zip(*group)]
        loops = next(iter(group.values()))
        columns = ["start", "share", "rate", "different", *(f"S={S}" for S in loops)]
        print(f"\n{title}\n\n| " + " | ".join(columns) + " |\n|" + "---|" * len(columns))
        for (start, share, lr, *others), by_loops in group.items():
            different = ", ".join(f"{n} {x:g}" for n, x, y in zip(names[3:], others, usual[3:])
                                  if x != y)
            cells = (f"{mean(x):.3f} ({min(x):.3f} to {max(x):.3f})" for x in by_loops.values())
            print(f"| {start} | {share:g} | {lr:g} | {different} | " + " | ".join(cells) + " |")


def check():
    """Compares two models of a group with train_gpt2style.py: losses and gradients."""
    g = Group("check", 50, 16, True, 3, 2, 8, (1, 2), 3, 4, 1,
              (Recipe(1, "scaled", 1, 1e-3), Recipe(2, "std", 1, 1e-3)))
    rng = np.random.default_rng(1)
    os.makedirs("build", exist_ok=True)
    for kind in ("train", "val"):
        with open(f"build/check_{kind}.bin", "wb") as file:
            header = np.array([SHARD_MAGIC, 1, 4096] + [0] * 253, np.int32)
            tokens = rng.integers(0, 50, 4096).astype(np.uint16)
            file.write(header.tobytes() + tokens.tobytes())
    models = Models(g, "build", torch.device("cpu"), False)
    targets = models.tokens[:2 * 64].view(2, 4, 16)
    masked, weights = models.noise(targets, torch.Generator().manual_seed(1))
    which = torch.tensor([0, 1])
    losses = models.losses(targets, masked, weights, which, 3)
    losses.sum().backward()
    for i in range(2):
        c = reference.make_config(16, 50, 3, 2, 8, 1, 2, 3)
        parts = models.p.detach()[i].split(list(models.sizes.values()))
        params = {n: x.view(s) for (n, s), x in zip(shapes(g).items(), parts) if "gain" not in n}
        params["wte"] = torch.cat((params["wte"], torch.zeros(c.padded_vocab - 51, 8)))
        model = reference.LoopMDM(c, {n: params[n] for n in reference.tensor_shapes(c)})
        loss = model.loss(torch.where(masked, 50, targets)[i], targets[i], weights[i].float(), 3)
        loss.backward()
        grads = dict(zip(shapes(g), models.p.grad[i].split(list(models.sizes.values()))))
        worst = max((grads[n].view(-1) - p.grad.view(-1)[:grads[n].numel()]).abs().max().item()
                    for n, p in model.named_parameters())
        print(f"model {i}: loss differs by {abs(loss.item() - losses[i].item()):.1e}, "
              f"gradients by {worst:.1e}")
        if not abs(loss.item() - losses[i].item()) < 1e-5 or not worst < 1e-5:
            sys.exit("FAIL")

    # At the start some ways of looping change nothing. "every" is the mean of what it should be.
    def loss_of(way, S, **how):
        models = Models(replace(g, way=way), "build", torch.device("cpu"), False)
        return models.losses(targets, masked, weights, which, S, **how).detach()

    plain = {S: loss_of("", S) for S in (1, 2, 3)}
    for way, want in {"inject": plain[3], "gain": plain[3]}.items():
        if not (loss_of(way, 3) - want).abs().max() < 1e-5:
            sys.exit(f"FAIL {way}")
    if not (loss_of("every", 3, every=True) - sum(plain.values()) / 3).abs().max() < 1e-5:
        sys.exit("FAIL every")
    if not (loss_of("norm", 3) - plain[3]).abs().max() > 1e-3:
        sys.exit("FAIL norm")


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("groups", nargs="*", metavar="GROUP", help=", ".join(GROUPS))
    parser.add_argument("--check", action="store_true", help="compare with train_gpt2style.py")
    parser.add_argument("--table", action="store_true", help="print what was found")
    parser.add_argument("--data", default="build", help="folder of the token shards")
    parser.add_argument("--out", default="dev/results/starts.csv", help="results are added to it")
    devices = ["cuda", "cpu"] if torch.cuda.is_available() else ["cpu"]
    parser.add_argument("--device", choices=devices, default=devices[0])
    parser.add_argument("--steps", type=int, help="other than the group's")
    parser.add_argument("--compile", action="store_true", help="torch.compile: three times as fast")
    o = parser.parse_args()
    unknown = [name for name in o.groups if name not in GROUPS]
    if unknown or not (o.groups or o.check or o.table):
        parser.error(f"no group {unknown[0]}" if unknown else "GROUP, --check or --table")
    if o.steps is not None and o.steps < 1:
        parser.error("--steps needs 1 or more")
    if o.check:
        check()
    for name in o.groups:
        run(name, o)
    if o.table:
        table(o.out)


if __name__ == "__main__":
    try:
        main()
    except (OSError, ValueError) as error:
        sys.exit(f"starts.py: {error}")
