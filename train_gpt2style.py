"""
LoopMDM in PyTorch, on a CPU or a GPU: the reference that loopmdm.c is checked against.

    python train_gpt2style.py train --data train.bin --tokenizer tokenizer.bin --out run/
    python train_gpt2style.py eval --model run/ --data val.bin --loops 1,2,4
    python train_gpt2style.py sample --model run/ --prompt "Once upon a time"

Read it beside loopmdm.c: the order is the same, and so are most names. With the same seed both draw
the same initial parameters, batches, noise, loops and tokens. They read each other's checkpoints.

Letters in shapes: B sequences, T positions, C channels, NH heads, L layers, V tokens, S loops,
R masked positions. It needs numpy and torch; for text also Hugging Face's tokenizers. A function
raises ValueError, with one line that says what is wrong, if a file or an option makes no sense.
"""
import argparse
import filecmp
import glob
import itertools
import math
import os
import sys
import time
import zlib
from collections import namedtuple
from dataclasses import astuple, dataclass, make_dataclass

import numpy as np
import torch
import torch.nn.functional as F

# ---- 1. Configuration and parameters -------------------------------------------------------------

@dataclass
class Config:
    max_seq_len: int   # T at most
    vocab_size: int    # V real tokens; MASK has id V
    padded_vocab: int  # Vp = V+1 rounded up to a multiple of 64
    layers: int        # L
    heads: int         # NH
    channels: int      # C
    loop_start: int    # a: the loop is layers a .. b-1
    loop_end: int      # b
    max_loops: int     # S_max in training; inference may use more

PRESETS = {  # T, L, NH, C, a, b, S_max
    "d2": (32, 2, 2, 32, 1, 2, 4), "nano": (128, 6, 4, 128, 1, 3, 4),
    "d6": (256, 6, 6, 288, 1, 3, 4), "d12": (1024, 12, 12, 768, 1, 3, 12),
}
RECIPES = {  # batch, accum, steps, warmup, lr, ema: the options of train that a preset sets
    "d2": (16, 1, 2000, 200, 4e-3, 0.0), "nano": (8, 1, 4000, 300, 2e-3, 0.0),
    "d6": (16, 1, 8000, 800, 1.4e-3, 0.0), "d12": (8, 8, 1000000, 2500, 3e-4, 0.9999),
}

def make_config(T, V, L, NH, C, a, b, S):
    """A Config with the vocabulary padded."""
    for name, value, most in (("layers", L, 1024), ("heads", NH, C), ("channels", C, 65536),
                              ("positions", T, 65536), ("tokens", V, 65535), ("loops", S, 1024)):
        if not 1 <= value <= most:
            raise ValueError(f"impossible model: {value} {name}; there are 1 to {most}")
    if C % (2 * NH) or not 0 <= a <= b <= L:
        raise ValueError("channels / heads must be even, and a loop a:b has 0 <= a <= b <= layers")
    padded_vocab = (V + 64) // 64 * 64  # 63 -> 64, 64 -> 128: there is room for MASK
    return Config(T, V, padded_vocab, L, NH, C, a, b, S)

def num_passes(c, S):
    """The passes (applications of a layer) in a forward with S loops."""
    return c.loop_start + S * (c.loop_end - c.loop_start) + c.layers - c.loop_end

def layer_of_pass(c, S, p):
    """The layer whose weights pass p uses. This is the whole difference from an ordinary MDM."""
    a, n = c.loop_start, c.loop_end - c.loop_start
    if p < a:
        return p                # head
    if p < a + S * n:
        return a + (p - a) % n  # loop
    return p - (S - 1) * n      # tail

def flops_per_token(c, T, S, masked_share):
    """Floating point operations of the matrix products of a training step, for one token."""
    C, V, P = c.channels, c.vocab_size, num_passes(c, S)
    forward = P * (24.0 * C * C + 4.0 * T * C) + masked_share * 2 * V * C
    # Backward has two products where forward has one. Attention also repeats its scores.
    backward = P * (48.0 * C * C + 10.0 * T * C) + masked_share * 4 * V * C
    return forward + backward

def tensor_shapes(c):
    """{name: shape} of every parameter tensor, in checkpoint order. Matrices are (.., out, in)."""
    L, C = c.layers, c.channels
    return {
        "wte": (c.padded_vocab, C), "wpe": (c.max_seq_len, C),
        "ln1w": (L, C), "ln1b": (L, C), "qkvw": (L, 3 * C, C), "qkvb": (L, 3 * C),
        "attprojw": (L, C, C), "attprojb": (L, C), "ln2w": (L, C), "ln2b": (L, C),
        "fcw": (L, 4 * C, C), "fcb": (L, 4 * C), "fcprojw": (L, C, 4 * C), "fcprojb": (L, C),
        "lnfw": (C,), "lnfb": (C,),
    }

# ---- 2. Randomness and noise ---------------------------------------------------------------------

# Random numbers are a hash of (seed, stream, step, index), the same one as in loopmdm.c.
(STREAM_INIT, STREAM_BATCH, STREAM_TIME, STREAM_MASK,
 STREAM_LOOPS, STREAM_UNMASK, STREAM_TOKEN) = range(7)

def mix64(x):
    """SplitMix64's finalizer on an array of uint64. numpy's integers wrap around as C's do."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))

def random_bits(seed, stream, step, index):
    """Random uint64 in the shape of the array index."""
    h = np.asarray([seed], np.uint64)
    for word in (stream, step):
        h = mix64(h) + np.uint64(word)
    return mix64(mix64(h) + np.asarray(index).astype(np.uint64))

def random_uniform(seed, stream, step, index):
    """Random float64 in [0, 1), in the shape of the array index."""
    bits = random_bits(seed, stream, step, index) >> np.uint64(11)  # a float64 holds 53 bits
    return bits.astype(np.float64) * 2.0**-53

def init_parameters(c, seed):
    """{name: float32 tensor}: initial parameters, bit for bit those of loopmdm.c."""
    # attprojw and fcprojw start at zero: each layer begins as the identity.
    deviations = dict.fromkeys(("qkvw", "fcw"), 0.8 / math.sqrt(c.channels))
    deviations["wte"] = 2.0 / math.sqrt(c.channels)
    deviations["qkvb"] = 1.0  # each head begins with a preference for certain distances
    params = {}
    for i, (name, shape) in enumerate(tensor_shapes(c).items()):
        # Uniform numbers need no logarithm or cosine, so they are the same on every machine.
        u = random_uniform(seed, STREAM_INIT, i, np.arange(math.prod(shape))) - 0.5
        values = deviations.get(name, 0.0) * math.sqrt(12.0) * u  # the variance of u is 1/12
        params[name] = torch.from_numpy(values.astype(np.float32).reshape(shape))
        if name in ("ln1w", "ln2w", "lnfw"):
            params[name] = torch.ones(shape)
    params["wte"][c.vocab_size + 1:] = 0    # rows of padding
    params["qkvb"][:, 2 * c.channels:] = 0  # only q and k have positions
    return params

def add_noise(c, targets, seed, step, first, total, given=None, visible=0.0):
    """targets (B,T) int64, which are the sequences first, first+1, .. of `total` in a step, -> x, t
    and weights. A token is predicted with probability t (B), float64 in (0,1]. weights (B,T)
    float32 are 1/(t total length) where it is, else 0. In x (B,T) it is MASK then, except for the
    share `visible`. With visible=0 the weights make the loss the NELBO in nats per token (MDLM,
    arXiv 2406.07524). given (B): that many tokens of a sequence are context. They are never
    predicted, and do not count in its length (LLaDA, arXiv 2502.09992)."""
    B, T = targets.shape
    given = np.zeros(B, np.int64) if given is None else given

    # t is stratified (Kingma et al. 2021): a random offset, and the sequences at equal distances.
    u = random_uniform(seed, STREAM_TIME, step, [0]) + (first + np.arange(B)) / total
    t = 1e-3 + (1 - 1e-3) * (u - np.floor(u))
    index = first * T + np.arange(B * T).reshape(B, T)
    u = random_uniform(seed, STREAM_MASK, step, index)
    predicted = (u < t[:, None]) & (np.arange(T) >= given[:, None])
    x = np.where(predicted & (u >= visible * t[:, None]), c.vocab_size, targets)
    weights = np.where(predicted, 1 / (t * total * (T - given))[:, None], 0).astype(np.float32)
    return x, t, weights

def draw_loops(c, dist, seed, step):
    """The loops of a step: uniform on 1 .. S_max, fixed (S_max), top (uniform on S_max/2 .. S_max,
    S_max/2 rounded up) or flops (p ~ 1/FLOPs)."""
    if dist == "fixed":
        return c.max_loops
    loops = np.arange((c.max_loops + 1) // 2 if dist == "top" else 1, c.max_loops + 1)
    p = [1 / flops_per_token(c, c.max_seq_len, S, 0.5) if dist == "flops" else 1.0 for S in loops]
    below = np.cumsum(p)
    u = random_uniform(seed, STREAM_LOOPS, step, [0])[0] * below[-1]
    return int(loops[min(len(loops) - 1, np.searchsorted(below, u, side="right"))])

# ---- 3. Model ------------------------------------------------------------------------------------

# The tensors of one layer
Layer = namedtuple("Layer", "ln1w ln1b qkvw qkvb attprojw attprojb ln2w ln2b fcw fcb "
                            "fcprojw fcprojb")

class LoopMDM(torch.nn.Module):
    """The model. Its parameters have the names and shapes of tensor_shapes()."""

    def __init__(self, c, params):
        super().__init__()
        self.config = c
        for name, value in params.items():
            self.register_parameter(name, torch.nn.Parameter(value.clone()))
        D = c.channels // c.heads
        angle = np.arange(c.max_seq_len)[:, None] * 10000 ** (-2.0 * np.arange(D // 2) / D)
        self.register_buffer("cosine", torch.from_numpy(np.cos(angle).astype(np.float32)))  # T,D/2
        self.register_buffer("sine", torch.from_numpy(np.sin(angle).astype(np.float32)))

    def layers(self):
        """The parameters of the layers: a list of L Layers."""
        # unbind() once, for indexing is slow: the backward of w[i] fills a gradient of all layers.
        return [Layer(*w) for w in zip(*(getattr(self, name).unbind(0) for name in Layer._fields))]

    def rope(self, x):
        """x (B,NH,T,D): channels (i, i + D/2) turn by t 10000^(-2i/D) (RoPE, arXiv 2104.09864)."""
        x0, x1 = x.chunk(2, dim=-1)
        cosine, sine = self.cosine[: x.shape[2]], self.sine[: x.shape[2]]
        return torch.cat((x0 * cosine - x1 * sine, x1 * cosine + x0 * sine), dim=-1)

    def block(self, h, w):
        """h (B,T,C) -> (B,T,C) through the Layer w: GPT-2's, but attention sees all positions."""
        B, T, C = h.shape
        ln1 = F.layer_norm(h, (C,), w.ln1w, w.ln1b)
        qkv = F.linear(ln1, w.qkvw, w.qkvb)
        q, k, v = qkv.view(B, T, 3, self.config.heads, -1).permute(2, 0, 3, 1, 4)  # each B,NH,T,D
        atty = F.scaled_dot_product_attention(self.rope(q), self.rope(k), v)
        h = h + F.linear(atty.transpose(1, 2).reshape(B, T, C), w.attprojw, w.attprojb)
        ln2 = F.layer_norm(h, (C,), w.ln2w, w.ln2b)
        fch = F.gelu(F.linear(ln2, w.fcw, w.fcb), approximate="tanh")
        return h + F.linear(fch, w.fcprojw, w.fcprojb)

    def forward(self, x, S):
        """x (B,T) int64 -> the residual stream (B,T,C) after the last pass."""
        layers = self.layers()
        h = self.wte[x] + self.wpe[: x.shape[1]]
        for p in range(num_passes(self.config, S)):
            h = self.block(h, layers[layer_of_pass(self.config, S, p)])
        return h

    def logits(self, h):
        """h (R,C) of the residual stream -> (R,V). MASK is no candidate."""
        h = F.layer_norm(h, (h.shape[-1],), self.lnfw, self.lnfb)
        return F.linear(h, self.wte[: self.config.vocab_size])

    def head(self, h, targets, weights):
        """h (R,C), targets (R) int64, weights (R) -> the sum of weights * cross entropy"""
        return (weights * F.cross_entropy(self.logits(h), targets, reduction="none")).sum()

    def loss(self, x, targets, weights, S):
        """x, targets (B,T) int64, weights (B,T) -> the sum of weights * cross entropy, the NELBO"""
        # The head is the largest product of a small model, so it sees only positions to predict.
        rows = weights.view(-1).nonzero().squeeze(1)
        h = self(x, S).view(-1, self.config.channels)
        return self.head(h[rows], targets.view(-1)[rows], weights.view(-1)[rows])

# ---- 4. Optimizer --------------------------------------------------------------------------------

def make_optimizer(model, lr, weight_decay):
    """AdamW (arXiv 1711.05101) with loopmdm's betas, epsilon and shares of the learning rate."""
    # Only matrices decay: biases and LayerNorm's parameters are not what overfits. All L layers add
    # to one residual stream. What adds to it learns L times slower, or the sum would jump.
    matrices = ("wte", "wpe", "qkvw", "attprojw", "fcw", "fcprojw")
    branches = ("attprojw", "attprojb", "fcprojw", "fcprojb")
    groups = {}
    for name, p in model.named_parameters():
        share = 1 / model.config.layers if name in branches else 1.0
        decay = weight_decay if name in matrices else 0.0
        group = {"params": [], "lr": lr * share, "share": share, "weight_decay": decay}
        groups.setdefault((share, decay), group)["params"].append(p)
    return torch.optim.AdamW(groups.values(), betas=(0.9, 0.95), eps=1e-8, fused=True)

def learning_rate(lr, floor, warmup, steps, step):
    """Linear warmup, then a cosine from lr down to floor * lr. step counts from 0."""
    if step < warmup:
        return lr * (step + 1) / warmup
    done = min(1, (step - warmup) / max(1, steps - warmup))
    return lr * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * done)))

def visible_share(warmup, step):
    """The share of tokens to predict that stay visible, as one in ten does in BERT (arXiv
    1810.04805): over the first `warmup` steps it falls from a half to none."""
    return 0.5 * (1 - step / warmup) if step < warmup else 0.0

def update(model, optimizer, lr, clip, norm):
    """One step of the optimizer. Clips the gradients, whose norm is given, and clears them."""
    for p in model.parameters():
        p.grad *= min(1.0, clip / (norm + 1e-6))
    for group in optimizer.param_groups:
        group["lr"] = lr * group["share"]
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)

@torch.no_grad()
def update_average(average, model, decay, step):
    """average, a list of tensors, follows the model (Polyak and Juditsky 1992). step is from 1."""
    # The first averages keep less, as in MDLM, or the random start would stay in them for long.
    decay = float(np.float32(min(decay, (1 + step) / (10 + step))))
    for a, p in zip(average, model.parameters()):
        a.copy_(decay * a + (1 - decay) * p)

# ---- 5. Training step and NELBO ------------------------------------------------------------------

# What a step had: S loops, the mean noise level t, so many masked positions; its loss and norm
Gradient = namedtuple("Gradient", "S t masked loss norm")

def noisy_loss(model, data, targets, seed, step, first, total, S, visible=0.0):
    """The loss of targets (B,T) with noise, as add_noise() explains; also t and the weights."""
    given = context_lengths(targets, data.separator)
    x, t, weights = add_noise(model.config, targets, seed, step, first, total, given, visible)
    tensors = [torch.from_numpy(a).to(model.wte.device) for a in (x, targets, weights)]
    return model.loss(*tensors, S), t, weights

def train_gradient(model, data, o, step):
    """Adds the gradient of a step (from 0) to the parameters' .grad. Returns a Gradient. o has the
    seed, loop_dist (see draw_loops()), noise_warmup (see visible_share()), batch (sequences at a
    time) and accum (so many times)."""
    total, visible = o.batch * o.accum, visible_share(o.noise_warmup, step)
    S = draw_loops(model.config, o.loop_dist, o.seed, step)  # one S for all sequences
    mean_t = masked = loss = 0.0
    for first in range(0, total, o.batch):
        targets = data_batch(data, o.seed, step, first, o.batch, model.config.max_seq_len)
        part, t, weights = noisy_loss(model, data, targets, o.seed, step, first, total, S,
                                      visible)
        part.backward()
        mean_t += t.sum() / total
        masked += (weights > 0).sum()
        loss += part.item()
    # clip_grad_norm_() would sum in float32, which is off by 2e-4 for seven million parameters.
    norms = [torch.linalg.vector_norm(p.grad, dtype=torch.float64) for p in model.parameters()]
    return Gradient(S, mean_t, masked, loss, math.sqrt(sum(norm.item() ** 2 for norm in norms)))

@torch.no_grad()
def evaluate(model, data, S, sequences, B, seed):
    """The NELBO in nats per token of so many sequences spread over the data, B at a time, with S
    loops. The masks depend on the seed and the number of sequences only."""
    T, nelbo = model.config.max_seq_len, 0.0
    available = data_count(data, T, T)
    stride = max(1, available // sequences)
    for first in range(0, sequences, B):
        numbers = np.arange(first, min(first + B, sequences)) * stride % available
        targets = data_sequences(data, numbers, T, T)
        nelbo += noisy_loss(model, data, targets, seed, 0, first, sequences, S)[0].item()
    return nelbo

# ---- 6. Sampler ----------------------------------------------------------------------------------

ORDERS = {  # which masked positions are filled in first
    "random": "the exact reverse process: chance decides (MDLM, arXiv 2406.07524)",
    "confidence": "the highest probability, an equal share in each step (LLaDA, arXiv 2502.09992)",
    "margin": "where the two likeliest tokens differ most (arXiv 2502.06768)",
    "entropy": "where the distribution has the least entropy (Dream, arXiv 2508.15487)",
    "threshold": "all of a probability above the threshold, one at least (arXiv 2505.22618)",
}

@dataclass
class SampleOptions:
    """How sample() fills in masked positions."""
    steps: int = 32           # of denoising; order threshold takes as many as it needs
    order: str = "confidence"
    temperature: float = 1.0  # 0 always takes the likeliest token
    top_k: int = 0            # draw from the k likeliest tokens (arXiv 1805.04833); 0: from all
    top_p: float = 1.0        # from the likeliest that have this probability (arXiv 1904.09751)
    threshold: float = 0.9    # of order threshold
    block: int = 0            # positions in a block, filled from left to right; 0: all are one

def draw_tokens(logits, o, u):
    """logits (R,V) float64, u (R) in [0,1) -> tokens (R): the inverse of the cumulative
    distribution of those tokens that top-k and top-p keep."""
    if o.temperature == 0:
        return logits.argmax(1)
    w = np.exp((logits - logits.max(1, keepdims=True)) / o.temperature)
    if o.top_k > 0:
        least = np.sort(logits, 1)[:, -min(o.top_k, logits.shape[1])]
        w[logits < least[:, None]] = 0
    if o.top_p < 1:
        falling = np.argsort(-logits, 1, kind="stable")
        cumulative = np.cumsum(np.take_along_axis(w, falling, 1), 1)
        last = (cumulative >= o.top_p * cumulative[:, -1:]).argmax(1)
        w[logits < np.take_along_axis(logits, falling, 1)[np.arange(len(u)), last][:, None]] = 0
    cumulative = np.cumsum(w, 1)
    total = cumulative[:, -1:]
    below = np.minimum(u[:, None] * total, np.nextafter(total, 0))  # rounding may give the total
    return (cumulative <= below).sum(1)

def token_scores(logits, tokens, order):
    """logits (R,V) float64 -> (R), how sure the model is: in probability, for entropy in nats."""
    log_p = logits - logits.max(1, keepdims=True)
    log_p -= np.log(np.exp(log_p).sum(1, keepdims=True))
    p = np.exp(log_p)
    if order == "margin":
        second, first = np.sort(p, 1)[:, -2:].T
        return first - second
    if order == "entropy":
        return (p * log_p).sum(1)
    return p[np.arange(len(p)), tokens]

def plan_step(x, blank, mask, o, step, unmask):
    """What a sequence x (T) does in a step: which positions are candidates, (T) bool, and how many
    of them it keeps (0: as many as pass the threshold). blank (T) bool: was MASK at the start;
    unmask (T): uniform random numbers. The K blocks with blanks share the steps evenly."""
    masked = x == mask
    block = np.arange(len(x)) // (o.block or len(x))
    if o.order == "threshold":
        return masked & (block == block[masked.argmax()]), 0  # the first block with a MASK
    numbers = np.unique(block[blank])
    K = len(numbers)
    if o.steps < K:
        raise ValueError(f"--steps is {o.steps}: each of the {K} blocks to be filled in needs one")
    if K == 0:
        return masked, 0
    # Block k has steps k N / K .. (k+1) N / K - 1. Of K = 3 and N = 8: 0 1, 2 3 4, 5 6 7.
    k = ((step + 1) * K - 1) // o.steps
    begin, end = k * o.steps // K, (k + 1) * o.steps // K
    here = blank & (block == numbers[k])
    masked &= here
    if o.order == "random":
        # From t = 1 - j/N to s = 1 - (j+1)/N a MASK is revealed with (t - s) / t = 1 / (N - j).
        revealed = masked & (unmask < 1 / (end - step))
        return revealed, revealed.sum()
    filled = here.sum() * (step + 1 - begin) // (end - begin)  # so many are filled after this step
    keep = filled - (here.sum() - masked.sum())
    return masked & (keep > 0), keep

@torch.no_grad()
def sample(model, x, o, S, seed, first=0):
    """Fills in every MASK of x (B,T) int64 with S loops. Returns the tokens at the start and after
    each step, (steps+1,B,T) int64. Sequence b draws the random numbers of number first + b, so it
    does not depend on the others. Those without candidates do not go through the model."""
    B, T = x.shape
    x, mask, trace = x.copy(), model.config.vocab_size, [x]
    blank, index = x == mask, first * T + np.arange(B * T).reshape(B, T)
    while (x == mask).any() if o.order == "threshold" else len(trace) <= o.steps:
        step = len(trace) - 1
        unmask = random_uniform(seed, STREAM_UNMASK, step, index)
        u = random_uniform(seed, STREAM_TOKEN, step, index)
        plans = [plan_step(x[b], blank[b], mask, o, step, unmask[b]) for b in range(B)]
        candidates = np.stack([plan[0] for plan in plans])
        active = candidates.any(1)
        if active.any():
            h = model(torch.from_numpy(x[active]).to(model.wte.device), S)
            h = h[torch.from_numpy(candidates[active]).to(h.device)]
            logits = model.logits(h).double().cpu().numpy()
            token = draw_tokens(logits, o, u[candidates])
            score = token_scores(logits, token, o.order)
            if not np.isfinite(score).all():
                raise ValueError("a probability is not finite: the model's training went wrong")

            sequence, position = candidates.nonzero()
            for b in np.flatnonzero(active):
                mine = np.flatnonzero(sequence == b)
                keep = plans[b][1] or max(1, (score[mine] > o.threshold).sum())
                best = mine[np.argsort(-score[mine], kind="stable")[:keep]]  # ties: the first
                x[b, position[best]] = token[best]
        trace.append(x.copy())
    return np.stack(trace)

# ---- 7. Data and checkpoint ----------------------------------------------------------------------

SHARD_MAGIC, MODEL_MAGIC, STATE_MAGIC = 20240520, 20260525, 20260526

# Training sequences begin at multiples of stride. Their context ends at a separator (-1: none).
Data = namedtuple("Data", "shards stride separator", defaults=(1, -1))

def data_open(pattern):
    """The Data of all shards whose names match."""
    shards = []
    # A file or folder that exists is meant by its name, even if it has [1] in it.
    folder, name = os.path.split(pattern)
    if os.path.exists(pattern):
        pattern = glob.escape(pattern)
    elif os.path.exists(folder):
        pattern = os.path.join(glob.escape(folder), name)
    for path in sorted(glob.glob(pattern)):
        header = np.fromfile(path, np.int32, 256)
        if (len(header) < 256 or header[0] != SHARD_MAGIC or header[1] != 1
                or os.path.getsize(path) != 1024 + 2 * int(header[2])):
            raise ValueError(f"{path} is damaged, or no token shard of version 1")
        shards.append(np.memmap(path, np.uint16, "r", 1024, (int(header[2]),)))
    if not shards:
        raise ValueError(f"no data: no file matches {pattern}")
    return Data(shards)

def data_count(data, T, stride):
    """How many sequences of T tokens begin at multiples of stride, each within one shard."""
    count = sum((len(s) - T) // stride + 1 for s in data.shards if len(s) >= T)
    if count == 0:
        raise ValueError(f"the data are too short: no shard holds a sequence of {T} tokens")
    return count

def data_sequences(data, numbers, T, stride):
    """The sequences of these numbers (B): (B,T) int64."""
    sequences = []
    for i in map(int, numbers):
        for s in data.shards:
            count = max(0, (len(s) - T) // stride + 1)
            if i < count:
                sequences.append(s[i * stride: i * stride + T].astype(np.int64))
                break
            i -= count
    return np.stack(sequences)

def data_batch(data, seed, step, first, B, T):
    """Sequences first .. first+B-1 of a training step: (B,T) int64."""
    count = np.uint64(data_count(data, T, data.stride))
    numbers = random_bits(seed, STREAM_BATCH, step, first + np.arange(B)) % count
    return data_sequences(data, numbers, T, data.stride)

def context_lengths(targets, separator):
    """targets (B,T) -> (B): the tokens up to and with the first separator from position 1 on."""
    if separator < 0:
        return np.zeros(len(targets), np.int64)
    found = targets[:, 1:] == separator
    if not found[:, :-1].any(1).all():
        raise ValueError(f"a sequence has no token {separator}, or nothing after it")
    return found.argmax(1) + 2

# The 1024 bytes before the numbers in model.bin and state.bin. The CRC-32 is of the whole file with
# 0 in its place. From `sequences` on all is 0 in model.bin.
HEADER = np.dtype([("magic", "i4"), ("version", "i4"), ("config", "9i4"), ("step", "i4"),
                   ("crc", "u4"), ("sequences", "i4"), ("seed", "u8"), ("flops", "f8"),
                   ("has_average", "i4"), ("unused", "237i4")])

# A training, as state.bin holds it. average: a list of tensors, or None; step: of steps done
Run = make_dataclass("Run", "model optimizer average step sequences seed flops".split())

def write_floats(path, tensors, **fields):
    """Writes a header with these fields, and tensors as float32."""
    header = np.zeros((), HEADER)
    for name, value in fields.items():
        header[name] = value
    data = b"".join(t.detach().cpu().numpy().tobytes() for t in tensors)
    header["crc"] = zlib.crc32(data, zlib.crc32(header.tobytes()))
    write_file(path, header.tobytes() + data)

def write_file(path, data):
    """Writes a file whole or not at all: it gets its name when it is complete."""
    new = path + ".tmp"
    try:
        if os.path.lexists(new):  # of a run that was killed; a link is not followed
            os.unlink(new)
        with open(new, "xb") as f:
            f.write(data)
            f.flush()
            os.fsync(f.fileno())
        os.replace(new, path)
    except OSError as error:
        if os.path.isfile(new):
            os.unlink(new)
        raise ValueError(f"cannot write {path}: {error.strerror}; what was there stays") from None

def read_floats(path, magic, version):
    """The header, the Config and the tensors, a list of {name: tensor}, of such a file."""
    with open(path, "rb") as f:
        data = f.read()
    header = np.frombuffer(data.ljust(1024, b"\0"), HEADER, 1)[0].copy()
    if header["magic"] != magic or header["version"] != version:
        raise ValueError(f"{path} is no checkpoint of version {version}: its first numbers are "
                         f"{header['magic']} and {header['version']}, not {magic} and {version}")
    crc, header["crc"] = int(header["crc"]), 0
    if zlib.crc32(data[1024:], zlib.crc32(header.tobytes())) != crc:
        raise ValueError(f"{path} is damaged: its checksum is wrong")
    c = Config(*header["config"].tolist())
    shapes = tensor_shapes(c)
    sizes = [math.prod(shape) for shape in shapes.values()]
    floats = torch.from_numpy(np.frombuffer(data, np.float32, offset=1024).copy())
    return header, c, [{name: t.view(shapes[name]) for name, t in zip(shapes, part.split(sizes))}
                       for part in floats.split(sum(sizes))]

def checkpoint_save(folder, run):
    """Writes state.bin, from which training goes on, then model.bin, from which one samples."""
    params, average = list(run.model.parameters()), run.average or []
    moments = [run.optimizer.state[p][key] for key in ("exp_avg", "exp_avg_sq") for p in params]
    both = {"config": astuple(run.model.config), "step": run.step}
    write_floats(os.path.join(folder, "state.bin"), params + moments + average, magic=STATE_MAGIC,
                 version=3, **both, sequences=run.sequences, seed=run.seed, flops=run.flops,
                 has_average=bool(average))
    write_floats(os.path.join(folder, "model.bin"), average or params, magic=MODEL_MAGIC, version=1,
                 **both)

def checkpoint_load(folder, device="cpu", weight_decay=0.1):
    """The Run in state.bin."""
    header, c, parts = read_floats(os.path.join(folder, "state.bin"), STATE_MAGIC, 3)
    params, m, v, *average = ({n: t.to(device) for n, t in part.items()} for part in parts)
    model = LoopMDM(c, params).to(device)
    optimizer = make_optimizer(model, 0.0, weight_decay)
    for name, p in model.named_parameters():
        step = torch.tensor(float(header["step"]), device=device)
        optimizer.state[p] = {"step": step, "exp_avg": m[name], "exp_avg_sq": v[name]}
    average = list(average[0].values()) if average else None
    return Run(model, optimizer, average, *header[["step", "sequences", "seed", "flops"]].tolist())

def model_load(folder, device="cpu"):
    """The model in model.bin, and the step it was saved at."""
    header, c, parts = read_floats(os.path.join(folder, "model.bin"), MODEL_MAGIC, 1)
    return LoopMDM(c, parts[0]).to(device), int(header["step"])

def tokenizer_open(path):
    """The tokens (V bytes objects), the end-of-text id, and the function text -> ids."""
    sys.path.append(os.path.join(os.path.dirname(os.path.abspath(__file__)), "dev", "data"))
    import gsm  # needs Hugging Face's tokenizers, so only what needs text opens it
    tokens, eot = gsm.read_tokenizer_bin(path)
    return tokens, eot, gsm.make_encoder(tokens, eot)

# ---- 8. Command line -----------------------------------------------------------------------------

def open_data(pattern, tokenizer, o, c):
    """The Data for a model, with --fixed-rows and --answers-after."""
    data = data_open(pattern)
    if any(len(s) and s.max() >= c.vocab_size for s in data.shards):
        raise ValueError(f"{pattern}: a token is outside the vocabulary of {c.vocab_size}: was it "
                         "made with another tokenizer?")
    stride = c.max_seq_len if o.fixed_rows or o.answers_after else 1
    for s in data.shards:
        if len(s) % stride:
            raise ValueError(f"{pattern}: {len(s)} tokens are not rows of {stride}, the model's "
                             "--seq-len")
    separator = -1
    if o.answers_after:
        if not tokenizer:
            raise ValueError("--answers-after needs --tokenizer, to find that token")
        tokens = tokenizer_open(tokenizer)[0]
        if o.answers_after.encode() not in tokens:
            raise ValueError(f"--answers-after: '{o.answers_after}' is no token of {tokenizer}")
        separator = tokens.index(o.answers_after.encode())
    return data._replace(stride=stride, separator=separator)

def check_folder(o, inputs):
    """Raises if --out holds what must stay: a model without --resume, an input, other files."""
    for name in ("model.bin", "state.bin", "tokenizer.bin", "log.csv"):
        path = os.path.join(o.out, name)
        if not os.path.lexists(path):
            continue
        if os.path.islink(path) or not os.path.isfile(path):
            raise ValueError(f"{path} is a link, folder or device: choose another --out")
        if not o.resume and name in ("model.bin", "state.bin"):
            raise ValueError(f"{path} is already there: use --resume, or choose another --out")
        if name == "tokenizer.bin" and o.tokenizer and not filecmp.cmp(path, o.tokenizer, False):
            raise ValueError(f"--tokenizer is not {path}: give that one, or choose another --out")
        if any(os.path.samefile(path, s.filename) for data in inputs for s in data.shards):
            raise ValueError(f"--out: training would overwrite {path}, which is its data")

def train_begin(o, c):
    """A new Run or, with --resume, the one in --out."""
    if o.resume:
        run = checkpoint_load(o.out, o.device, o.weight_decay)
        begun = run.model.config, run.seed, run.sequences, run.average is not None
        if begun != (c, o.seed, o.batch * o.accum, o.ema > 0):
            raise ValueError("--resume: --out was begun with other options; model, --seed, --batch "
                             f"times --accum, and whether there is --ema: {begun}")
        if run.step > o.steps:
            raise ValueError(f"--resume: {o.out} is at step {run.step}, beyond --steps {o.steps}")
        checkpoint_save(o.out, run)  # model.bin may be of an earlier step
        return run
    os.makedirs(o.out, exist_ok=True)
    if o.tokenizer and not os.path.exists(os.path.join(o.out, "tokenizer.bin")):
        with open(o.tokenizer, "rb") as f:
            write_file(os.path.join(o.out, "tokenizer.bin"), f.read())
    model = LoopMDM(c, init_parameters(c, o.seed)).to(o.device)
    average = [p.detach().clone() for p in model.parameters()] if o.ema > 0 else None
    optimizer = make_optimizer(model, o.lr, o.weight_decay)
    return Run(model, optimizer, average, 0, o.batch * o.accum, o.seed, 0.0)

def vocabulary_size(path):
    """The number of tokens in a tokenizer.bin."""
    header = np.fromfile(path, np.uint32, 3)
    if len(header) < 3 or header[0] != 20240328:
        raise ValueError(f"{path} is not a tokenizer.bin")
    return int(header[2])

def log_open(path, step, loops):
    """log.csv, with its lines up to this step."""
    columns = "step,loops,t,loss,lr,grad_norm,tokens_per_s,flops"
    columns += "".join(f",val_nelbo_s{S}" for S in loops) + "\n"
    old = open(path).readlines() if os.path.exists(path) else [columns]
    if step and old[:1] != [columns]:
        raise ValueError(f"--resume: {path} has other columns: give --val-data and --loops as when "
                         "it was begun")
    if old and not old[0].startswith("step,loops,t"):
        raise ValueError(f"{path} is there, and is no log of a training: choose another --out")
    write_file(path, "".join([columns, *old[1: 1 + step]]).encode())
    return open(path, "a")

def train(o):
    """The command train: as `loopmdm train`, with the same files."""
    T, L, NH, C, a, b, S = PRESETS[o.model]
    a, b = o.loop or (a, b)
    for name, value in zip("batch accum steps warmup lr ema".split(), RECIPES[o.model]):
        value = min(value, o.steps // 4) if name == "warmup" else value  # --steps is already set
        setattr(o, name, value if getattr(o, name) is None else getattr(o, name))
    V = vocabulary_size(o.tokenizer) if o.tokenizer else o.vocab
    c = make_config(o.seq_len or T, V, o.layers or L, o.heads or NH, o.channels or C, a, b,
                    1 if a == b else o.max_loops or S)  # without a loop S changes nothing
    data = open_data(o.data, o.tokenizer, o, c)
    val = open_data(o.val_data, o.tokenizer, o, c) if o.val_data else None
    if o.loops and not val:
        raise ValueError("--loops has no effect without --val-data")
    loops = (o.loops or default_loops(c)) if val else []
    check_folder(o, [data, val] if val else [data])
    run = train_begin(o, c)
    log = log_open(os.path.join(o.out, "log.csv"), run.step, loops)

    tokens, begin, losses = run.sequences * c.max_seq_len, run.step, []
    while run.step < o.steps:
        began = time.time()
        lr = learning_rate(o.lr, o.floor, o.warmup, o.steps, run.step)
        g = train_gradient(run.model, data, o, run.step)
        run.step += 1
        if not (math.isfinite(g.loss) and math.isfinite(g.norm)):
            raise ValueError(f"step {run.step}: the loss is {g.loss}, the gradient's norm {g.norm}")
        update(run.model, run.optimizer, lr, o.clip, g.norm)
        if run.average:
            update_average(run.average, run.model, o.ema, run.step)
        run.flops += flops_per_token(c, c.max_seq_len, g.S, g.masked / tokens) * tokens
        losses.append(g.loss)
        speed = tokens / (time.time() - began)

        last, every = run.step == o.steps, min(200, max(1, o.steps // 20))
        validates = val and (run.step % o.val_every == 0 or last)
        if validates or last or run.step == begin + 1 or run.step % every == 0:
            # Noise levels make single losses noisy, so a line has the mean since the line before.
            print(f"step {run.step}/{o.steps} | loss {sum(losses) / len(losses):.4f} | loops {g.S} "
                  f"| norm {g.norm:.2f} | lr {lr:.2e} | {speed:.0f} tokens/s", flush=True)
            losses = []
        nelbo = [""] * len(loops)
        if validates:
            values = [evaluate(run.model, val, S, o.val_rows, o.batch, o.seed) for S in loops]
            print("validation NELBO, nats per token:",
                  " ".join(f" S={S} {n:.4f}" for S, n in zip(loops, values)), flush=True)
            nelbo = [f"{n:.6f}" for n in values]
        log.write(",".join([f"{run.step},{g.S},{g.t:.6f},{g.loss:.9g},{lr:.9g},{g.norm:.9g},"
                            f"{speed:.0f},{run.flops:.9g}", *nelbo]) + "\n")
        if run.step % o.save_every == 0 or last:
            log.flush()
            if not math.isfinite(evaluate(run.model, data, c.max_loops, o.batch, o.batch, o.seed)):
                raise ValueError(f"step {run.step}: the loss is not finite, so this is not saved; "
                                 "try a lower --lr")
            checkpoint_save(o.out, run)

def default_loops(c):
    """1, 2, 4, .. and S_max"""
    return sorted({min(2**i, c.max_loops) for i in range(11)})

def run_eval(o):
    """The command eval: prints the NELBO of held-out data for each number of loops."""
    model, step = model_load(o.model, o.device)
    c = model.config
    data = open_data(o.data, os.path.join(o.model, "tokenizer.bin"), o, c)
    print(f"NELBO of {o.rows} sequences at step {step}\n\nloops  passes  NELBO, nats/token")
    for S in o.loops or default_loops(c):
        nelbo = evaluate(model, data, S, o.rows, o.batch, o.seed)
        if not math.isfinite(nelbo):
            raise ValueError(f"--model: the loss of {o.model} is {nelbo} at {S} loops: its "
                             "training went wrong")
        print(f"{S:5}  {num_passes(c, S):6}    {nelbo:.4f}", flush=True)

def run_sample(o):
    """The command sample: writes -n texts."""
    model, _ = model_load(o.model, o.device)
    c, T = model.config, o.length or model.config.max_seq_len
    tokens, eot, encode = tokenizer_open(os.path.join(o.model, "tokenizer.bin"))
    begin = [eot, *encode(o.prompt)]  # every text begins after an end-of-text
    if T > c.max_seq_len:
        raise ValueError(f"--length is {T}; the model takes at most {c.max_seq_len} tokens")
    if len(begin) > T:
        raise ValueError(f"--prompt has {len(begin)} tokens with the end-of-text before it; {T} "
                         "are possible")
    x = np.array([begin + [c.vocab_size] * (T - len(begin))])
    for i in range(o.n):
        ids = sample(model, x, o, o.loops or c.max_loops, o.seed, i)[-1, 0, 1:].tolist()
        end = [*ids, eot].index(eot, len(begin) - 1)  # the first end-of-text after the prompt
        text = b"".join(tokens[token] for token in ids[:end])
        print("\n" * (i > 0) + text.decode(errors="replace"), flush=True)

def number(least, most=2**31 - 1, kind=int):
    """The type of an option that takes a number."""
    def convert(text):
        if not least <= kind(text) <= most:  # NaN too
            raise argparse.ArgumentTypeError(f"must be {least} to {most}, not {text}")
        return kind(text)
    convert.__name__ = "number"  # argparse's messages have it
    return convert

def not_empty(text):
    """The type of an option that takes text or a name."""
    if not text:
        raise argparse.ArgumentTypeError("is empty")
    return text

def loop_numbers(text):
    """The value of --loops: "1,2,4" -> [1, 2, 4]"""
    return [number(1, 100000)(word) for word in text.split(",")]

def two_layers(text):
    """The value of --loop: "1:3" -> [1, 3]"""
    layers = text.split(":")
    if len(layers) != 2 or not all(map(str.isdecimal, layers)):
        raise argparse.ArgumentTypeError(f"takes two layers such as 1:3, not {text}")
    return list(map(int, layers))

def main(words=None):
    parser = argparse.ArgumentParser(epilog="The options are loopmdm's. Its --help explains them.")
    commands = parser.add_subparsers(required=True)
    t, e, s = map(commands.add_parser, ("train", "eval", "sample"))
    text, real = {"type": not_empty}, {"type": number(0, 1e300, float)}
    whole, from_0, share = ({"type": number(*a)} for a in ((1,), (0,), (0, 1, float)))

    def add(parsers, kind, **defaults):  # the default ... is for what must be given
        for (name, default), p in itertools.product(defaults.items(), parsers):
            p.add_argument("-" * min(2, len(name)) + name.replace("_", "-"), default=default,
                           required=default is ..., **kind)

    add([e, s], text, model=...)
    add([t, e], text, data=..., answers_after=None)
    add([t], text, out=..., val_data=None)
    either = t.add_mutually_exclusive_group(required=True)
    add([either], text, tokenizer=None)
    add([either], whole, vocab=None)
    add([t], {"choices": PRESETS}, model="nano")
    add([t], {"choices": ["uniform", "fixed", "top", "flops"]}, loop_dist="uniform")
    add([t], whole, layers=None, heads=None, channels=None, seq_len=None, max_loops=None,
        batch=None, steps=None, accum=None, save_every=500, val_every=500, val_rows=256)
    add([t], from_0, warmup=None, noise_warmup=0)
    add([t], real, lr=None, weight_decay=0.1)
    add([t], share, floor=0.1)
    add([t], {"type": number(1e-9, 1e300, float)}, clip=1.0)
    add([t], {"type": number(0, 1 - 2**-53, float)}, ema=None)
    add([t], {"type": two_layers}, loop=None)
    add([t, e], {"type": loop_numbers}, loops=None)
    add([t], {"action": "store_true"}, resume=False)
    add([t, e], {"action": "store_true"}, fixed_rows=False)
    add([e], whole, rows=1024)
    add([e], whole, batch=16)
    add([s], {"type": str}, prompt="")
    add([s], {"choices": ORDERS}, order="confidence")
    add([s], whole, n=1, loops=None, length=None, steps=32, top_k=0, block=0)
    add([s], real, temperature=1.0)
    add([s], share, top_p=1.0, threshold=0.9)
    add([t, e, s], {"type": number(0, 2**64 - 1)}, seed=1)
    add([t, e, s], {"choices": ["cpu", "cuda"]}, device="cpu")
    for p, run in ((t, train), (e, run_eval), (s, run_sample)):
        p.set_defaults(run=run)
    o = parser.parse_args(words)
    try:
        if not sys.stdout:
            raise ValueError("standard output is closed")
        if o.device == "cuda" and not torch.cuda.is_available():
            raise ValueError("--device cuda: PyTorch finds no GPU")
        o.run(o)
    except (OSError, ValueError, MemoryError) as error:
        sys.exit(f"train_gpt2style.py: {error}")
    except KeyboardInterrupt:
        sys.exit(130)

if __name__ == "__main__":
    main()
