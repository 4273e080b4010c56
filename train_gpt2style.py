"""
LoopMDM in PyTorch: the reference that loopmdm.c is checked against, to be read beside it: in the same order, mostly with the same names.

    .venv/bin/python train_gpt2style.py train --data train.bin --tokenizer tokenizer.bin --model nano --out run/
    .venv/bin/python train_gpt2style.py dump --out dev/reference

`train` takes the options of `loopmdm train` but --recompute and --loops (it validates at S = 1, 2, 4, .. and S_max) and, from the same seed, uses the same initial
parameters, batches, t, masks, loops and schedule; it reads and writes the same checkpoints and log.csv. `dump` writes the files that
test_loopmdm.c reads (dev/reference/README.md has their format). Letters in shapes: B rows, T positions, C channels, NH heads,
L layers, V tokens, S loops, R masked rows. Needs numpy and torch, nothing else.
"""
import argparse
import glob
import math
import os
import shutil
import sys
import time
import zlib
from dataclasses import astuple, dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F

# ----------------------------------------------------------------------------------------------------------------------
# 1. Configuration and parameters


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
    max_loops: int     # S_max


PRESETS = {"d2": (32, 2, 2, 32, 1, 2, 4), "nano": (128, 6, 4, 128, 1, 3, 4), "d6": (256, 6, 6, 288, 1, 3, 4), "d12": (1024, 12, 12, 768, 1, 3, 8)}


def make_config(T, V, L, NH, C, a, b, S):
    """A Config with the vocabulary padded: V+1 rounded up to a multiple of 64."""
    return Config(T, V, (V + 64) // 64 * 64, L, NH, C, a, b, S)


def num_passes(c, S):
    """Passes (applications of a layer) in a forward with S loops."""
    return c.loop_start + S * (c.loop_end - c.loop_start) + c.layers - c.loop_end


def layer_of_pass(c, S, p):
    """The layer whose weights pass p uses: the whole difference between LoopMDM and an ordinary MDM."""
    a, n = c.loop_start, c.loop_end - c.loop_start
    if p < a:
        return p                    # head
    if p < a + S * n:
        return a + (p - a) % n      # loop
    return p - (S - 1) * n          # tail


def flops_per_token(c, T, S, masked_share, training):
    """Floating point operations of the matrix products for one token, as loopmdm.c does them."""
    C, V, P = c.channels, c.vocab_size, num_passes(c, S)
    forward = P * (24.0 * C * C + 4.0 * T * C) + masked_share * 2 * V * C
    backward = P * (48.0 * C * C + 10.0 * T * C) + masked_share * 4 * V * C
    return forward + backward if training else forward


def tensor_shapes(c):
    """Name and shape of every parameter tensor, in the order in which checkpoints hold them. Matrices are (.., out, in)."""
    L, C = c.layers, c.channels
    return {
        "wte": (c.padded_vocab, C), "wpe": (c.max_seq_len, C),
        "ln1w": (L, C), "ln1b": (L, C), "qkvw": (L, 3 * C, C), "qkvb": (L, 3 * C), "attprojw": (L, C, C), "attprojb": (L, C),
        "ln2w": (L, C), "ln2b": (L, C), "fcw": (L, 4 * C, C), "fcb": (L, 4 * C), "fcprojw": (L, C, 4 * C), "fcprojb": (L, C),
        "lnfw": (C,), "lnfb": (C,),
    }


def is_matrix(name):
    """Matrices get weight decay; biases and LayerNorm's parameters do not."""
    return name in ("wte", "wpe", "qkvw", "attprojw", "fcw", "fcprojw")


# ----------------------------------------------------------------------------------------------------------------------
# 2. Randomness and noise: a hash of (seed, stream, step, index), the same as in loopmdm.c

STREAM_INIT, STREAM_BATCH, STREAM_TIME, STREAM_MASK, STREAM_LOOPS, STREAM_UNMASK, STREAM_TOKEN, STREAM_REMASK, STREAM_LENGTH = range(9)


def mix64(x):
    """The finalizer of SplitMix64 on an array of uint64; numpy's integers wrap around as C's do."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def random_bits(seed, stream, step, index):
    """uint64 array, of the shape of index."""
    h = np.asarray([seed], np.uint64)
    for word in (stream, step):
        h = mix64(h) + np.uint64(word)
    return mix64(mix64(h) + np.asarray(index).astype(np.uint64))


def random_uniform(seed, stream, step, index):
    """float64 array in [0, 1), of the shape of index."""
    return (random_bits(seed, stream, step, index) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def init_parameters(c, seed):
    """Initial parameters, bit for bit those of loopmdm.c: {name: float32 tensor}."""
    params = {}
    for i, (name, shape) in enumerate(tensor_shapes(c).items()):
        if name in ("ln1w", "ln2w", "lnfw"):
            params[name] = torch.ones(shape)
            continue
        std = {"wte": 2.0 / math.sqrt(c.channels), "wpe": 0.0, "qkvb": 1.0}.get(name, 0.8 / math.sqrt(c.channels) if is_matrix(name) else 0.0)
        values = std * math.sqrt(12.0) * (random_uniform(seed, STREAM_INIT, i, np.arange(math.prod(shape))) - 0.5)
        params[name] = torch.from_numpy(values.astype(np.float32).reshape(shape))
        if name == "wte":
            params[name][c.vocab_size + 1:] = 0  # padding rows
        if name == "qkvb":
            params[name][:, 2 * c.channels:] = 0  # q and k only: heads begin with a taste for certain distances
    return params


def bell_time(strat):
    """strat (B) float64 in [0,1) -> w in [0,1) with the distribution function F(w) = strat, and its density there, both float64.

    Three parts Beta(2,2), which is a bell around 1/2, and one part uniform, which keeps the density above zero and so the loss unbiased
    (in the spirit of arXiv 2605.13026). F is inverted by bisection, to the last bit: that is the same on every machine."""
    lo, hi = np.zeros_like(strat), np.ones_like(strat)
    for _ in range(53):
        mid = (lo + hi) / 2
        below = 0.25 * mid + 0.75 * (mid * mid * (3 - 2 * mid)) <= strat
        lo, hi = np.where(below, mid, lo), np.where(below, hi, mid)
    return lo, 0.25 + 4.5 * (lo * (1 - lo))


def add_noise(c, targets, seed, step, first_row, total_rows, time="uniform", given=None):
    """targets (B,T) int64 -> x (B,T) with MASK, t (B) float64, weights (B,T) float32: 1/(t q total_rows length) where masked, else 0.

    The weights make the loss the NELBO in nats per token (MDLM, arXiv 2406.07524); t is stratified over the rows (Kingma et al. 2021).
    q is the density of the time, uniform (1) or bell. given (B) is how many tokens of a row are context: they are never masked and
    do not count in its length (LLaDA's fine-tuning, arXiv 2502.09992)."""
    B, T = targets.shape
    given = np.zeros(B, np.int64) if given is None else given
    u = random_uniform(seed, STREAM_TIME, step, [0])
    strat = u + (first_row + np.arange(B)) / total_rows
    strat = strat - np.floor(strat)
    w, q = bell_time(strat) if time == "bell" else (strat, np.ones(B))
    t = 1e-3 + (1 - 1e-3) * w
    masked = random_uniform(seed, STREAM_MASK, step, first_row * T + np.arange(B * T).reshape(B, T)) < t[:, None]
    masked &= np.arange(T) >= given[:, None]
    x = np.where(masked, c.vocab_size, targets)
    weights = np.where(masked, 1 / (t * q * total_rows * (T - given))[:, None], 0).astype(np.float32)
    return x, t, weights


def context_lengths(targets, separator):
    """targets (B,T) -> (B): the tokens up to and including the first separator, a token's id, at position 1 or later; 0 if separator is -1.

    Ends the program if a row has no separator, or nothing after it."""
    if separator < 0:
        return np.zeros(len(targets), np.int64)
    found = targets[:, 1:] == separator
    if not found[:, :-1].any(1).all():
        sys.exit(f"--answers-after: a row has no token {separator}, or nothing after it: {targets[~found[:, :-1].any(1)][0].tolist()}")
    return found.argmax(1) + 2


def draw_length(T, share, seed, step):
    """The length of all rows of a step: T, or in this share of the steps uniform on 1 .. T (LLaDA, arXiv 2502.09992, does so in 1 %)."""
    if random_uniform(seed, STREAM_LENGTH, step, [0])[0] < share:
        return 1 + int(random_bits(seed, STREAM_LENGTH, step, [1])[0] % np.uint64(T))
    return T


def draw_loops(c, dist, seed, step):
    """S ~ p(S) on 1 .. S_max; dist is uniform, fixed or flops."""
    if dist == "fixed":
        return c.max_loops
    p = [1 / flops_per_token(c, c.max_seq_len, S, 0.5, True) if dist == "flops" else 1.0 for S in range(1, c.max_loops + 1)]
    u = random_uniform(seed, STREAM_LOOPS, step, [0])[0] * sum(p)
    total = 0.0
    for S in range(1, c.max_loops):
        total += p[S - 1]
        if u < total:
            return S
    return c.max_loops


# ----------------------------------------------------------------------------------------------------------------------
# 3. Model


class LoopMDM(torch.nn.Module):
    """Parameters are float32 tensors with the names and shapes of tensor_shapes()."""

    def __init__(self, c, params):
        super().__init__()
        self.config = c
        for name, value in params.items():
            self.register_parameter(name, torch.nn.Parameter(value.clone()))
        D = c.channels // c.heads
        angle = np.arange(c.max_seq_len)[:, None] * 10000 ** (-2.0 * np.arange(D // 2) / D)
        self.register_buffer("cosine", torch.from_numpy(np.cos(angle).astype(np.float32)))  # (T,D/2)
        self.register_buffer("sine", torch.from_numpy(np.sin(angle).astype(np.float32)))

    def rope(self, x):
        """x (B,NH,T,D): channels (i, i + D/2) turn by the angle t * 10000^(-2i/D)."""
        x0, x1 = x.chunk(2, dim=-1)
        cosine, sine = self.cosine[: x.shape[2]], self.sine[: x.shape[2]]
        return torch.cat((x0 * cosine - x1 * sine, x1 * cosine + x0 * sine), dim=-1)

    def block(self, h, l):
        """h (B,T,C) -> (B,T,C) through layer l."""
        B, T, C = h.shape
        ln1 = F.layer_norm(h, (C,), self.ln1w[l], self.ln1b[l])
        qkv = F.linear(ln1, self.qkvw[l], self.qkvb[l])
        q, k, v = qkv.view(B, T, 3, self.config.heads, -1).permute(2, 0, 3, 1, 4)  # each (B,NH,T,D)
        atty = F.scaled_dot_product_attention(self.rope(q), self.rope(k), v).transpose(1, 2).reshape(B, T, C)
        h = h + F.linear(atty, self.attprojw[l], self.attprojb[l])
        ln2 = F.layer_norm(h, (C,), self.ln2w[l], self.ln2b[l])
        fch = F.gelu(F.linear(ln2, self.fcw[l], self.fcb[l]), approximate="tanh")
        return h + F.linear(fch, self.fcprojw[l], self.fcprojb[l])

    def forward(self, x, S, states=None):
        """x (B,T) int64 -> the residual stream (B,T,C) after the last pass; appends the state after each loop to states."""
        c = self.config
        h = self.wte[x] + self.wpe[: x.shape[1]]
        for p in range(num_passes(c, S)):
            h = self.block(h, layer_of_pass(c, S, p))
            done, n = p + 1 - c.loop_start, c.loop_end - c.loop_start
            if states is not None and n and 0 < done <= S * n and done % n == 0:
                states.append(h)
        return h

    @torch.no_grad()
    def adaptive(self, x, max_loops, tau, criterion):
        """x (B,T) int64 -> the residual stream (B,T,C) after the last pass, each row (sequence) looping until it settles, max_loops times
        at most; how many loops each row used, (B) int64; and the distances d (max_loops,B) float32, infinite where there is none.

        h_s is a row's residual stream after loop s, and d_s the mean over positions of a relative length. It stops after loop s if,
        change:  d_s = mean |h_s - h_{s-1}| / |h_s|                is below tau;
        second:  d_s = mean |h_s - 2 h_{s-1} + h_{s-2}| / |h_s|    and d_{s-1} are both below tau, from s = 3 on: two hits, as one may be
                 a turn of the spiral on which states approach their limit (Pappone et al. 2025, arXiv 2509.23314)."""
        c, active = self.config, torch.arange(len(x))
        loops, distances = torch.full((len(x),), max_loops), torch.full((max_loops, len(x)), torch.inf)
        h = self.wte[x] + self.wpe[: x.shape[1]]
        for l in range(c.loop_start):
            h = self.block(h, l)
        for s in range(1, max_loops + 1 if c.loop_start < c.loop_end else 1):  # without a loop there is nothing to compare
            state = h[active]
            for l in range(c.loop_start, c.loop_end):
                state = self.block(state, l)
            if criterion == "change" or s > 1:
                move = state - h[active] if criterion == "change" else state - 2 * h[active] + before[active]
                distances[s - 1, active] = (move.norm(dim=-1) / state.norm(dim=-1)).mean(1)
            before, h = h, h.index_copy(0, active, state)
            loops[active] = s
            settled = distances[s - 1] < tau
            if criterion == "second":
                settled &= distances[s - 2] < tau
            active = active[~settled[active]]
            if len(active) == 0:
                break
        for l in range(c.loop_end, c.layers):
            h = self.block(h, l)
        return h, loops, distances

    def logits(self, rows):
        """rows (R,C) of the residual stream -> (R,V); MASK is no candidate."""
        return F.linear(F.layer_norm(rows, (rows.shape[-1],), self.lnfw, self.lnfb), self.wte[: self.config.vocab_size])

    def loss(self, x, targets, weights, S, tau=0.0, criterion="change"):
        """x, targets (B,T) int64, weights (B,T) -> sum of weights * cross entropy over masked positions: the NELBO.
        With tau > 0 rows stop by themselves, see adaptive(), after S loops at most; that has no gradient."""
        rows = weights.view(-1).nonzero().squeeze(1)
        h = self.adaptive(x, S, tau, criterion)[0] if tau > 0 else self(x, S)
        logits = self.logits(h.view(-1, self.config.channels)[rows])
        return (weights.view(-1)[rows] * F.cross_entropy(logits, targets.view(-1)[rows], reduction="none")).sum()


# ----------------------------------------------------------------------------------------------------------------------
# 4. Optimizer


def make_optimizer(model, lr, weight_decay, wte_lr=1.0):
    """AdamW with loopmdm's betas and epsilon; weight decay on matrices only. wte_lr: the embeddings' learning rate, as a share of lr."""
    groups = {}
    for name, p in model.named_parameters():
        groups.setdefault((wte_lr if name == "wte" else 1.0, weight_decay if is_matrix(name) else 0.0), []).append(p)
    groups = [{"params": params, "lr": lr * share, "share": share, "weight_decay": decay} for (share, decay), params in groups.items()]
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), eps=1e-8, fused=True)


def learning_rate(lr, floor, warmup, steps, step):
    """Linear warmup, then a cosine from lr down to floor * lr. step counts from 0."""
    if step < warmup:
        return lr * (step + 1) / warmup
    done = min(1, (step - warmup) / max(1, steps - warmup))
    return lr * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * done)))


@dataclass
class Draws:
    """How training draws rows and their noise."""
    time: str = "uniform"    # of the noise levels: uniform or bell
    fixed_rows: bool = False  # rows begin at multiples of T in the data; else anywhere
    separator: int = -1      # the token that ends each row's context, which is never masked; -1: there is none
    var_length: float = 0.0  # share of the steps whose rows are cut to a length drawn for that step


def train_step(model, loss_function, optimizer, shards, seed, step, batch, accum, dist, lr, clip, draws=Draws()):
    """One optimizer step; loss_function is model.loss, or that compiled.
    Returns loss, S, mean t, gradient norm, the number of masked tokens and the length of rows."""
    c = model.config
    S, T, rows = draw_loops(c, dist, seed, step), draw_length(c.max_seq_len, draws.var_length, seed, step), batch * accum
    loss = mean_t = masked = 0.0
    for first in range(0, rows, batch):
        targets = data_batch(shards, seed, step, first, batch, c.max_seq_len, c.max_seq_len if draws.fixed_rows else 1)
        targets = np.ascontiguousarray(targets[:, :T])
        x, t, weights = add_noise(c, targets, seed, step, first, rows, draws.time, context_lengths(targets, draws.separator))
        part = loss_function(torch.from_numpy(x), torch.from_numpy(targets), torch.from_numpy(weights), S)
        part.backward()
        loss, mean_t, masked = loss + part.item(), mean_t + t.sum() / rows, masked + (weights > 0).sum()
    # torch.nn.utils.clip_grad_norm_ sums in float32, which is off by 2e-4 for seven million parameters
    norm = math.sqrt(sum(torch.linalg.vector_norm(p.grad, dtype=torch.float64).item() ** 2 for p in model.parameters()))
    for p in model.parameters():
        p.grad *= min(1.0, clip / (norm + 1e-6))
    for group in optimizer.param_groups:
        group["lr"] = lr * group["share"]
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss, S, mean_t, norm, masked, T


@torch.no_grad()
def update_ema(ema, model, decay, step):
    """ema, a LoopMDM, moves towards model after step (from 1): the exponential moving average of the parameters over steps (Polyak and
    Juditsky 1992). Early steps keep less of it than decay, as in MDLM, or the random start would stay in it for long."""
    decay = float(np.float32(min(decay, (1 + step) / (10 + step))))
    for average, p in zip(ema.parameters(), model.parameters()):
        average.copy_(decay * average + (1 - decay) * p)


# ----------------------------------------------------------------------------------------------------------------------
# 5. Data and checkpoints

SHARD_MAGIC, MODEL_MAGIC, OPTIMIZER_MAGIC, DUMP_MAGIC = 20240520, 20260525, 20260526, 20260527


def data_open(pattern):
    """All shards that match: a list of uint16 arrays."""
    shards = []
    for path in sorted(glob.glob(pattern)):
        header = np.fromfile(path, np.int32, 256)
        if len(header) < 256 or header[0] != SHARD_MAGIC or header[1] != 1:
            sys.exit(f"{path} is not a token shard of version 1")
        if os.path.getsize(path) != 1024 + 2 * int(header[2]):
            sys.exit(f"{path} is damaged: its header says {header[2]} tokens, its size is {os.path.getsize(path)} bytes")
        shards.append(np.memmap(path, np.uint16, "r", 1024, (int(header[2]),)))
    if not shards:
        sys.exit(f"no data: no file matches {pattern}")
    return shards


def data_row(shards, index, T, stride):
    """Row number index of all rows of T tokens that begin at multiples of stride in one shard: (T) int64."""
    for s in shards:
        n = (len(s) - T) // stride + 1 if len(s) >= T else 0
        if index < n:
            return s[index * stride: index * stride + T].astype(np.int64)
        index -= n


def data_rows(shards, T, stride):
    """How many rows of T tokens begin at multiples of stride, each within one shard."""
    return sum((len(s) - T) // stride + 1 for s in shards if len(s) >= T)


def data_batch(shards, seed, step, first_row, B, T, stride=1):
    """Rows first_row .. first_row + B-1 of a training step, each beginning at a multiple of stride: (B,T) int64."""
    index = random_bits(seed, STREAM_BATCH, step, first_row + np.arange(B)) % np.uint64(data_rows(shards, T, stride))
    return np.stack([data_row(shards, int(i), T, stride) for i in index])


def token_id(path, text):
    """The id of the token that is exactly text in the tokenizer.bin at path; ends the program if there is none."""
    data, at = open(path, "rb").read(), 1024
    for i in range(np.frombuffer(data, np.uint32, 3)[2]):  # each token is a byte with its length, and its bytes
        if data[at + 1: at + 1 + data[at]] == text.encode():
            return i
        at += 1 + data[at]
    sys.exit(f"--answers-after: {path} has no token '{text}'")


def write_floats(path, header, parts):
    """Writes header (256) int32, with its CRC-32, and float32 arrays to path.tmp, which the caller renames to path."""
    header[12] = 0
    data = [np.ascontiguousarray(p, np.float32).tobytes() for p in parts]
    crc = zlib.crc32(header.tobytes())
    for d in data:
        crc = zlib.crc32(d, crc)
    header[12:13] = np.array([crc], np.uint32).view(np.int32)
    with open(path + ".tmp", "wb") as f:
        f.write(header.tobytes())
        f.writelines(data)
        f.flush()
        os.fsync(f.fileno())


def read_floats(path, magic):
    """Header (256) int32 and the rest of a checkpoint file as float32."""
    data = open(path, "rb").read()
    header, floats = np.frombuffer(data[:1024], np.int32).copy(), np.frombuffer(data[1024:], np.float32)
    if len(header) < 256 or header[0] != magic or header[1] != 1:
        sys.exit(f"{path} is not a checkpoint file of version 1")
    crc, header[12] = header[12:13].view(np.uint32)[0], 0
    if zlib.crc32(data[1024:], zlib.crc32(header.tobytes())) != crc:
        sys.exit(f"{path} is damaged: its checksum is wrong")
    return header, floats


def split_tensors(c, floats):
    """One flat float32 array -> {name: tensor}, in checkpoint order."""
    out, at = {}, 0
    for name, shape in tensor_shapes(c).items():
        n = math.prod(shape)
        out[name] = torch.from_numpy(floats[at: at + n].reshape(shape).copy())
        at += n
    return out


def checkpoint_save(model, optimizer, folder, step, rows, seed, flops, ema=None):
    """model.bin and optimizer.bin as loopmdm writes them: step done, rows in a step, seed, FLOPs spent so far; ema.bin if there is ema."""
    header = np.zeros(256, np.int32)
    header[:12] = [MODEL_MAGIC, 1, *astuple(model.config), step]
    params = [p.detach().numpy() for _, p in model.named_parameters()]
    path = os.path.join(folder, "model.bin")
    write_floats(path, header, params)
    state = np.zeros(256, np.int32)
    state[:3], state[11] = [OPTIMIZER_MAGIC, 1, rows], step
    state[4:6] = np.array([seed], np.uint64).view(np.int32)
    state[6:8] = np.array([flops], np.float64).view(np.int32)
    zero = {"exp_avg": torch.zeros(()), "exp_avg_sq": torch.zeros(())}
    moments = [optimizer.state.get(p, zero)[k].expand(p.shape).numpy() for k in ("exp_avg", "exp_avg_sq") for _, p in model.named_parameters()]
    path2 = os.path.join(folder, "optimizer.bin")
    write_floats(path2, state, moments)
    if ema:
        path3 = os.path.join(folder, "ema.bin")
        write_floats(path3, header, [p.detach().numpy() for p in ema.parameters()])
        os.replace(path3 + ".tmp", path3)
    os.replace(path2 + ".tmp", path2)
    os.replace(path + ".tmp", path)


def checkpoint_load(folder, name="model.bin"):
    """The model in folder, or with name ema.bin its moving average, and the step that it was saved at."""
    header, floats = read_floats(os.path.join(folder, name), MODEL_MAGIC)
    c = Config(*(int(v) for v in header[2:11]))
    return LoopMDM(c, split_tensors(c, floats)), int(header[11])


def checkpoint_resume(model, optimizer, folder):
    """Fills the optimizer's moments; returns the FLOPs spent so far, the rows in a step and the seed."""
    header, floats = read_floats(os.path.join(folder, "optimizer.bin"), OPTIMIZER_MAGIC)
    m, v = (split_tensors(model.config, half) for half in np.split(floats, 2))
    for name, p in model.named_parameters():
        optimizer.state[p] = {"step": torch.tensor(float(header[11])), "exp_avg": m[name], "exp_avg_sq": v[name]}
    return float(header[6:8].view(np.float64)[0]), int(header[2]), int(header[4:6].view(np.uint64)[0])


# ----------------------------------------------------------------------------------------------------------------------
# 6. Evaluation and sampler


@torch.no_grad()
def evaluate(model, shards, S, rows, B, seed, separator=-1, tau=0.0, criterion="change"):
    """NELBO in nats per token of rows spread over the data, of what follows the separator if there is one; t is uniform.
    With tau > 0 each row stops looping by itself: see LoopMDM.adaptive()."""
    c, T = model.config, model.config.max_seq_len
    available = data_rows(shards, T, T)
    stride, total = max(1, available // rows), 0.0
    for first in range(0, rows, B):
        targets = np.stack([data_row(shards, r * stride % available, T, T) for r in range(first, min(first + B, rows))])
        x, _, weights = add_noise(c, targets, seed, 0, first, rows, given=context_lengths(targets, separator))
        total += model.loss(torch.from_numpy(x), torch.from_numpy(targets), torch.from_numpy(weights), S, tau, criterion).item()
    return total


ORDERS = ["random", "confidence", "margin", "entropy", "threshold"]


@dataclass
class SampleOptions:
    """How sample() fills in blanks.

    random      the exact reverse process (MDLM's ancestral sampler, arXiv 2406.07524): which tokens are revealed is chance
    confidence  the tokens of highest probability first, an equal share in every step (LLaDA, arXiv 2502.09992)
    margin      where the two likeliest tokens are furthest apart in probability first (Kim et al. 2025, arXiv 2502.06768)
    entropy     where the distribution has the least entropy first (Dream, arXiv 2508.15487)
    threshold   all whose probability is above the threshold, or else the best, until none is left (Fast-dLLM, arXiv 2505.22618)
    """
    steps: int = 5           # of denoising; order threshold takes as many as it needs
    order: str = "confidence"
    temperature: float = 1.0  # 0 always takes the likeliest token
    top_k: int = 0           # draw among the k likeliest tokens (Fan et al. 2018, arXiv 1805.04833); 0: among all
    top_p: float = 1.0       # draw among the likeliest that together have this probability (Holtzman et al. 2020, arXiv 1904.09751)
    threshold: float = 0.9   # of order threshold
    block: int = 0           # positions in a block; blocks are filled from left to right (LLaDA, arXiv 2502.09992); 0: the row is one
    remask: float = 0.0      # chance that a filled blank becomes MASK again, in each step (ReMDM, arXiv 2503.00307)


def draw_token(logits, o, u):
    """logits (V) float64, u in [0,1) -> a token, by inverting the cumulative distribution of those that top-k and top-p keep."""
    if o.temperature == 0:
        return int(logits.argmax())
    w, kept = np.exp((logits - logits.max()) / o.temperature), np.ones(len(logits), bool)
    if o.top_k > 0:
        kept = logits >= np.sort(logits)[-min(o.top_k, len(logits))]
    if o.top_p < 1:
        falling = np.flatnonzero(kept)[np.argsort(-logits[kept], kind="stable")]
        cumulative = np.cumsum(w[falling])
        kept &= logits >= logits[falling[np.argmax(cumulative >= o.top_p * cumulative[-1])]]
    cumulative = np.cumsum(w * kept)
    return min(int(np.searchsorted(cumulative, u * cumulative[-1], side="right")), int(np.flatnonzero(kept)[-1]))


def token_score(logits, token, order):
    """logits (V) float64 -> how sure the model is of this position: in probability, or for entropy in nats."""
    log_p = logits - logits.max()
    log_p -= np.log(np.exp(log_p).sum())
    p = np.exp(log_p)
    if order == "margin":
        second, first = np.sort(p)[-2:]
        return first - second
    return (p * log_p).sum() if order == "entropy" else p[token]


def plan_step(row, mask, blank, o, step, unmask, remask):
    """What a row (T) does in a step: its candidates (T) bool, how many of them to commit (None: as many as pass the threshold), and the
    committed positions (T) bool that become MASK again.

    blank (T) bool: was MASK at the start; unmask, remask (T): uniform random numbers. The row's K blocks with blanks share the steps.
    Raises ValueError if there are fewer steps than blocks."""
    block, nothing = np.arange(len(row)) // (o.block or len(row)), np.zeros(len(row), bool)
    if o.order == "threshold":
        masked = row == mask
        return masked & (block == block[masked.argmax()]), None, nothing
    numbers = np.unique(block[blank])
    K = len(numbers)
    if K == 0:
        return nothing, 0, nothing
    if o.steps < K:
        raise ValueError(f"steps must be at least the number of blocks with blanks, {K}")
    k = next(k for k in range(K) if step < (k + 1) * o.steps // K)
    N, j = (k + 1) * o.steps // K - k * o.steps // K, step - k * o.steps // K  # this block's steps, and those of them done
    here = blank & (block == numbers[k])
    masked, committed = here & (row == mask), here & (row != mask)
    sigma = min(o.remask, (N - j - 1) / j) if j > 0 else 0.0  # ReMDM's cap schedule for alpha_t = j/N
    again = committed & (remask < sigma)
    if o.order == "random":
        candidates = masked & (unmask < (1 + sigma * j) / (N - j))
        return candidates, candidates.sum(), again
    quota = min(masked.sum(), here.sum() * (j + 1) // N - committed.sum() + again.sum())
    return masked if quota > 0 else nothing, quota, again


@torch.no_grad()
def sample(model, x, o, S, seed, first_row=0):
    """Fills in every MASK of x (B,T) int64, with SampleOptions o. Returns the tokens after each step: (steps,B,T) int64.
    Row b draws the random numbers of row first_row + b. No row depends on the others; those without candidates do not go through the model."""
    if o.order == "threshold" and o.remask > 0:
        raise ValueError("order threshold does not remask: it has no schedule")
    B, T = x.shape
    x, mask, trace = x.copy(), model.config.vocab_size, []
    blank, index = x == mask, first_row * T + np.arange(B * T).reshape(B, T)
    while (x == mask).any() if o.order == "threshold" else len(trace) < o.steps:
        step = len(trace)
        unmask, remask, u = (random_uniform(seed, stream, step, index) for stream in (STREAM_UNMASK, STREAM_REMASK, STREAM_TOKEN))
        candidates, quota, again = zip(*(plan_step(x[b], mask, blank[b], o, step, unmask[b], remask[b]) for b in range(B)))
        candidates, again = np.stack(candidates), np.stack(again)
        active = candidates.any(1)
        if active.any():
            logits = model.logits(model(torch.from_numpy(x[active]), S)[torch.from_numpy(candidates[active])]).double().numpy()
            row, position = candidates.nonzero()
            token = np.array([draw_token(l, o, v) for l, v in zip(logits, u[candidates])])
            score = np.array([token_score(l, t, o.order) for l, t in zip(logits, token)])
            for b in np.flatnonzero(active):
                mine = np.flatnonzero(row == b)
                n = max(1, (score[mine] > o.threshold).sum()) if o.order == "threshold" else quota[b]
                kept = mine[np.argsort(-score[mine], kind="stable")[:n]]  # ties: lowest position
                x[b, position[kept]] = token[kept]
        x[again] = mask
        trace.append(x.copy())
    return np.stack(trace)


# ----------------------------------------------------------------------------------------------------------------------
# 7. Reference dump


def write_dump(path, tensors):
    """tensors {name: array}; int32, float32 and float64 are types 1, 2 and 3. dev/reference/README.md has the format."""
    kinds = {"int32": 1, "float32": 2, "float64": 3}
    with open(path, "wb") as f:
        header = np.zeros(256, np.int32)
        header[:3] = [DUMP_MAGIC, 1, len(tensors)]
        f.write(header.tobytes())
        for name, a in tensors.items():
            assert len(name) < 32, f"{name} leaves no room for a zero byte"
            a = np.ascontiguousarray(a)
            a = a.astype(np.int32) if a.dtype.kind == "i" else a
            f.write(name.encode().ljust(32, b"\0") + np.array([kinds[a.dtype.name], a.ndim, *a.shape, *[1] * (4 - a.ndim)], np.int32).tobytes())
            f.write(a.tobytes())


class Shaken:
    """A model to sample from whose logits are off by up to size, as those of another implementation are, though by more. It keeps the
    hidden states that it has computed. seed is that of the errors."""

    def __init__(self, model, seed):
        self.config, self.model, self.seed, self.size, self.calls, self.known = model.config, model, seed, 0.0, 0, {}

    def __call__(self, x, S):
        key = x.numpy().tobytes()
        if key not in self.known:
            self.known[key] = self.model(x, S)
        return self.known[key]

    def logits(self, rows):
        logits, self.calls = self.model.logits(rows), self.calls + 1
        noise = 2 * random_uniform(self.seed, STREAM_INIT, self.calls, np.arange(logits.numel())) - 1
        return logits + self.size * torch.from_numpy(noise.reshape(logits.shape))


def sample_clearly(model, given, o, S, seed):
    """A trace of sample(), and its seed: the first from seed on at which every option makes a difference and errors of 1e-4 in the logits
    make none, so that no trace hangs on a near tie (of scores, at the threshold, at the edge of top-p, in a draw) that float32 decides by chance."""
    shaken = Shaken(model, seed)
    plain = [replace(o, **{name: getattr(SampleOptions, name)}) for name in ("order", "temperature", "top_k", "top_p", "block", "remask")]
    for s in range(seed, seed + 1000):
        shaken.size = 0.0
        trace = sample(shaken, given, o, S, s)
        if any(p != o and np.array_equal(sample(shaken, given, p, S, s), trace) for p in plain):
            continue
        shaken.size = 1e-4
        if all(np.array_equal(sample(shaken, given, o, S, s), trace) for _ in range(4)):
            return trace, s
    raise AssertionError(f"no seed gives a clear trace with {o}")


def choose_tau(model, x, max_loops, criterion):
    """A tau with which rows of x (B,T) stop after different numbers of loops: in the middle of the widest gap between the rows' distances
    where that is so. Without a loop there are no distances, no tau changes anything, and it is 1."""
    d = model.adaptive(x, max_loops, 0, criterion)[2].double().numpy()
    d = np.sort(d[np.isfinite(d)])
    gaps, middles = d[1:] / d[:-1], np.sqrt(d[1:] * d[:-1])
    for i in np.argsort(-gaps):
        if len(model.adaptive(x, max_loops, middles[i], criterion)[1].unique()) > 1:
            assert gaps[i] > 1.001, "float32 could decide otherwise"
            return middles[i]
    assert len(d) == 0, "no tau makes rows differ"
    return 1.0


def sampler_cases(c, T):
    """{name: SampleOptions} of the dump: each order, and each option. The models are untrained, so probabilities are about 1/V."""
    n, V = min(8, (T + 4) // 5), c.vocab_size
    cases = {
        "random": SampleOptions(6, "random"),
        "confidence": SampleOptions(5, "confidence", 0.7),
        "greedy": SampleOptions(5, "confidence", 0.0),
        "margin": SampleOptions(6, "margin", 0.7),
        "entropy": SampleOptions(6, "entropy"),
        "threshold": SampleOptions(5, "threshold", threshold=1 / V),
        "threshold_block": SampleOptions(5, "threshold", 0.5, threshold=1 / V, block=n),
        "block_random": SampleOptions(7, "random", block=n),
        "block_confidence": SampleOptions(6, "confidence", block=n),
        "remask": SampleOptions(6, "confidence", 0.7, remask=0.3),
        "remask_random": SampleOptions(6, "random", remask=0.5),
        "remask_block": SampleOptions(8, "margin", block=(T + 1) // 2, remask=1.0),
        "topk": SampleOptions(5, "random", top_k=V // 8),
        "topp": SampleOptions(5, "confidence", top_p=0.5),
        "topk_topp_block": SampleOptions(6, "entropy", 1.5, V // 4, 0.7, block=n),
    }
    return cases if V <= 1000 else {name: cases[name] for name in ("random", "confidence", "greedy")}  # the others would take minutes


def dump(path, c, seed, B, T, loops):
    """One case, all of the same parameters: forward and backward at each S of loops, NELBO, adaptive loops, noise of both kinds, samplers'
    traces and ten training steps, twice. Asserts that each feature makes a difference."""
    params = init_parameters(c, seed)
    for i, (name, value) in enumerate(params.items()):  # away from zero and one, so that every gradient is exercised
        jitter = random_uniform(seed, STREAM_INIT, 100 + i, np.arange(value.numel())) - 0.5
        params[name] = value + 0.2 * torch.from_numpy(jitter.astype(np.float32).reshape(value.shape))
    tokens = (random_bits(seed, STREAM_BATCH, 1000, np.arange(8 * c.max_seq_len)) % np.uint64(c.vocab_size)).astype(np.uint16)
    shards, model = [tokens], LoopMDM(c, params)
    targets = np.stack([data_row(shards, b, T, 1) for b in range(B)])
    x, t, weights = add_noise(c, targets, seed, 0, 0, B)
    initial = b"".join(v.numpy().tobytes() for v in init_parameters(c, seed).values())
    out = {"config": np.array(astuple(c)), "init_crc": np.array([zlib.crc32(initial)], np.uint32).view(np.int32), "seed": np.array([seed]), "loops": np.array(loops), "tokens": tokens.astype(np.int32),
           "targets": targets, "x": x, "t": t, "weights": weights}
    out.update((f"params/{name}", value.numpy()) for name, value in params.items())
    for S in loops:
        states, model_x = [], torch.from_numpy(x)
        model.zero_grad()
        h = model(model_x, S, states)
        out[f"hidden/{S}"] = h.detach().numpy()
        if states:
            out[f"states/{S}"] = torch.stack(states).detach().numpy()  # (S,B,T,C)
        out[f"logits/{S}"] = model.logits(h[torch.from_numpy(weights > 0)]).detach().numpy()  # (R,V)
        loss = model.loss(model_x, torch.from_numpy(targets), torch.from_numpy(weights), S)
        loss.backward()
        out[f"loss/{S}"] = np.array([loss.item()], np.float32)
        out.update((f"grad{S}/{name}", p.grad.numpy().copy()) for name, p in model.named_parameters())
    out["nelbo"] = np.array([evaluate(model, shards, S, 10, B, seed) for S in loops], np.float32)  # of 10 rows, noise from seed
    for name, criterion in (("change", "change"), ("second", "second"), ("zero", "change")):
        tau = 0.0 if name == "zero" else choose_tau(model, model_x, c.max_loops, criterion)
        h, used, _ = model.adaptive(model_x, c.max_loops, tau, criterion)
        out[f"adaptive_options/{name}"] = np.array([tau, criterion == "second", c.max_loops], np.float64)
        out[f"adaptive_loops/{name}"], out[f"adaptive_hidden/{name}"] = used.numpy(), h.numpy()
    assert (used == c.max_loops).all() and torch.allclose(h, model(model_x, c.max_loops), atol=1e-4), "tau = 0 never stops"
    stops_at_once = evaluate(model, shards, c.max_loops, 10, B, seed, tau=math.inf)
    assert abs(stops_at_once - out["nelbo"][0]) < 1e-4, "tau = infinity stops after the first loop"

    out["bell_x"], out["bell_t"], out["bell_weights"] = add_noise(c, targets, seed, 0, 0, B, "bell")
    answers, separator = targets.copy(), int(targets[0, 0])
    answers[np.arange(B), 1 + (T - 2) * np.arange(B) // B] = answers[:, -1] = separator  # the first from position 1 on counts
    given = context_lengths(answers, separator)
    assert given[0] == 2 and len(set(given)) > 1, "rows differ"
    out.update(answers_sep=np.array([separator]), answers_targets=answers, answers_given=given)
    out["answers_x"], _, out["answers_weights"] = add_noise(c, answers, seed, 0, 0, B, given=given)

    # blanks at the end, one more in each row, and two before them in all rows but the first; a fourth row has none
    begin = max(T // 2, T - 24)
    blank = np.arange(T) >= begin - np.arange(B)[:, None]
    blank[1:, begin // 2: begin // 2 + 2] = True
    blank[3:] = False
    given = np.where(blank, c.vocab_size, targets)
    out["sample_given"] = given
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # many forwards of a few rows: threads would wait more than work
    for name, o in sampler_cases(c, T).items():
        trace, s = sample_clearly(model, given, o, loops[-1], seed)
        out[f"sample_options/{name}"] = np.array([o.steps, ORDERS.index(o.order), *astuple(o)[2:], s], np.float64)
        out[f"sample/{name}"] = trace  # (steps done,B,T)
        assert (trace[-1] < c.vocab_size).all() and (trace[:, ~blank] == given[~blank]).all(), "all blanks are filled, and nothing else changes"
        assert (o.remask > 0) == ((trace[1:] == c.vocab_size) & (trace[:-1] < c.vocab_size)).any(), "masked again if and only if asked for"
        assert o.order != "threshold" or 1 < len(trace) < blank.sum(1).max(), "threshold commits more than one, and less than all"
    torch.set_num_threads(threads)

    optimizer, losses = make_optimizer(model, 1e-3, 0.1), []
    model.zero_grad()
    for step in range(10):
        losses.append(train_step(model, model.loss, optimizer, shards, seed, step, B, 2, "uniform", learning_rate(1e-3, 0.1, 3, 10, step), 1.0))
    out["train_loss"] = np.array([s[0] for s in losses], np.float32)
    out["train_loops"] = np.array([s[1] for s in losses])
    out["train_norm"] = np.array([s[3] for s in losses], np.float32)

    model, ema, losses = LoopMDM(c, params), LoopMDM(c, params), []  # the same again, with bell, var_length, EMA and slower embeddings
    optimizer, draws = make_optimizer(model, 1e-3, 0.1, 0.3), Draws("bell", var_length=0.5)
    for step in range(10):
        losses.append(train_step(model, model.loss, optimizer, shards, seed, step, B, 2, "uniform", learning_rate(1e-3, 0.1, 3, 10, step), 1.0, draws))
        update_ema(ema, model, 0.4, step + 1)
    for name, i, kind in (("loss", 0, np.float32), ("loops", 1, np.int32), ("norm", 3, np.float32), ("length", 5, np.int32)):
        out[f"train2_{name}"] = np.array([s[i] for s in losses], kind)
    lengths, norms = out["train2_length"], out["train2_norm"]
    assert lengths.min() < c.max_seq_len == lengths.max() and (norms > 0).all(), "both kinds of steps, each with masks"
    out["train2_ema"] = np.concatenate([p.detach().numpy().ravel() for p in ema.parameters()])  # in checkpoint order
    write_dump(path, out)
    print(f"{path}: {os.path.getsize(path) / 1024:.0f} KiB")


# name: T at most, V, L, NH, C, a, b, S_max; seed, B, T, loops. The small ones are in the repository.
SMALL_CASES = {
    "loop": ((20, 61, 4, 2, 16, 1, 3, 4), 1, 3, 20, [1, 3, 4]),      # head, loop and tail; T no multiple of a tile
    "a0": ((13, 40, 3, 1, 12, 0, 2, 4), 2, 2, 13, [1, 3, 4]),         # the loop comes first; one head
    "bL": ((9, 70, 3, 3, 18, 2, 3, 5), 3, 4, 7, [1, 3, 5]),           # the loop comes last; T below the maximum
    "noloop": ((17, 50, 2, 2, 16, 0, 0, 3), 4, 2, 17, [1, 3]),        # an ordinary MDM, whatever S is
}
LARGE_CASES = {
    "tiles": ((131, 517, 4, 3, 78, 1, 3, 6), 5, 3, 131, [1, 3, 6]),   # every dimension just past a tile
    "nano": ((128, 1024, 6, 4, 128, 1, 3, 8), 6, 4, 128, [1, 3, 8]),
    "d6": ((256, 4200, 6, 6, 288, 1, 3, 8), 7, 2, 256, [1, 3]),       # more tokens than one panel of the GEMM holds
}

# ----------------------------------------------------------------------------------------------------------------------
# 8. Command line


def train(o):
    """The train command, with parsed options; ends the program with one line if they or the files make no sense."""
    if o.tokenizer:
        o.vocab = int(np.fromfile(o.tokenizer, np.uint32, 3)[2])
    if not o.vocab:
        sys.exit("train needs --tokenizer, or --vocab for the number of tokens")
    T, L, NH, C, a, b, S = PRESETS[o.model]
    if o.loop:
        try:
            a, b = (int(v) for v in o.loop.split(":"))
        except ValueError:
            sys.exit(f"--loop takes two layers such as 1:3, not '{o.loop}'")
    c = make_config(o.seq_len or T, o.vocab, o.layers or L, o.heads or NH, o.channels or C, a, b, o.max_loops or S)
    if o.var_length > 0 and (o.fixed_rows or o.answers_after):
        sys.exit("--var-length excludes --fixed-rows and --answers-after")
    if o.answers_after and not o.tokenizer:
        sys.exit("--answers-after needs --tokenizer")
    separator = token_id(o.tokenizer, o.answers_after) if o.answers_after else -1
    draws = Draws(o.time, o.fixed_rows or separator >= 0, separator, o.var_length)
    shards, val, begin, flops, ema = data_open(o.data), data_open(o.val_data) if o.val_data else None, 0, 0.0, None
    os.makedirs(o.out, exist_ok=True)
    if o.resume:
        model, begin = checkpoint_load(o.out)
        if model.config != c:
            sys.exit(f"--resume: {o.out} holds a model of another shape: {model.config}")
        if o.ema:
            if not os.path.exists(os.path.join(o.out, "ema.bin")):
                sys.exit(f"--resume: {o.out} has no ema.bin: this run was begun without --ema")
            ema, saved = checkpoint_load(o.out, "ema.bin")
            if saved != begin:
                sys.exit(f"--resume: {o.out}/ema.bin is of step {saved}, the model beside it of step {begin}")
    else:
        if os.path.exists(os.path.join(o.out, "model.bin")):
            sys.exit(f"{o.out} already holds a model: continue it with --resume, or choose another --out")
        params = init_parameters(c, o.seed)
        if o.init:
            other = checkpoint_load(o.init, "ema.bin" if os.path.exists(os.path.join(o.init, "ema.bin")) else "model.bin")[0]
            if tensor_shapes(other.config) != tensor_shapes(c) or other.config.vocab_size != c.vocab_size:
                sys.exit(f"--init: {o.init} holds a model of another shape: {other.config}")
            params = {name: p.detach() for name, p in other.named_parameters()}
        model = LoopMDM(c, params)
        ema = LoopMDM(c, params) if o.ema else None
        if o.tokenizer:
            shutil.copyfile(o.tokenizer, os.path.join(o.out, "tokenizer.bin"))
    optimizer = make_optimizer(model, o.lr, o.weight_decay, o.wte_lr)
    if o.resume:
        flops, rows, seed = checkpoint_resume(model, optimizer, o.out)
        if (rows, seed) != (o.batch * o.accum, o.seed):
            sys.exit(f"--resume: this run was begun with --seed {seed} and --batch times --accum = {rows}")
    loss_function = torch.compile(model.loss) if o.compile else model.loss
    loops = sorted({min(2**i, c.max_loops) for i in range(11)})
    path = os.path.join(o.out, "log.csv")
    kept = [line for line in open(path).readlines()[1:] if int(line.split(",")[0]) <= begin] if o.resume and os.path.exists(path) else []
    log = open(path, "w")
    log.write("step,loops,t,loss,lr,grad_norm,tokens_per_s,flops" + "".join(f",val_nelbo_s{S}" for S in loops if val) + "\n" + "".join(kept))
    for step in range(begin, o.steps):
        began, rows = time.time(), o.batch * o.accum
        lr = learning_rate(o.lr, o.floor, o.warmup, o.steps, step)
        loss, S, t, norm, masked, T = train_step(model, loss_function, optimizer, shards, o.seed, step, o.batch, o.accum, o.loop_dist, lr,
                                                 o.clip, draws)
        if not (math.isfinite(loss) and math.isfinite(norm)):
            sys.exit(f"step {step + 1}: the loss is {loss} and its gradient {norm}")
        if ema:
            update_ema(ema, model, o.ema, step + 1)
        flops += flops_per_token(c, T, S, masked / (rows * T), True) * rows * T
        speed, last = rows * T / (time.time() - began), step + 1 == o.steps
        validates = val and ((step + 1) % o.val_every == 0 or last)
        nelbo = [f"{evaluate(model, val, s, o.val_rows, o.batch, o.seed, separator):.6f}" if validates else "" for s in loops if val]
        log.write(",".join([str(step + 1), str(S), f"{t:.6f}", f"{loss:.9g}", f"{lr:.9g}", f"{norm:.9g}", f"{speed:.0f}", f"{flops:.9g}", *nelbo]) + "\n")
        if validates or last or (step + 1) % max(1, o.steps // 50) == 0:
            print(f"step {step + 1}/{o.steps} | loss {loss:.4f} | loops {S} | norm {norm:.2f} | lr {lr:.2e} | {speed:.0f} tokens/s", flush=True)
        if validates:
            print("validation NELBO, nats per token:", "  ".join(f"S={s} {n}" for s, n in zip(loops, nelbo)), flush=True)
        if (step + 1) % o.save_every == 0 or last:
            log.flush()
            checkpoint_save(model, optimizer, o.out, step + 1, rows, o.seed, flops, ema)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    formatter = argparse.ArgumentDefaultsHelpFormatter
    p = commands.add_parser("train", help="train as loopmdm train does", formatter_class=formatter)
    p.add_argument("--data", required=True, help="token shards: a file or a pattern")
    p.add_argument("--val-data", help="held-out token shards")
    p.add_argument("--tokenizer", help="tokenizer.bin")
    p.add_argument("--out", required=True, help="where the model goes")
    p.add_argument("--model", default="nano", choices=PRESETS, help="preset; the next options change it")
    for name in ("vocab", "layers", "heads", "channels", "seq-len", "max-loops"):
        p.add_argument(f"--{name}", type=int, help="as in loopmdm train")
    p.add_argument("--loop", help="a:b: loop over layers a .. b-1")
    p.add_argument("--loop-dist", default="uniform", choices=["uniform", "fixed", "flops"], help="how a step's loops are drawn")
    for name, default in (("steps", 2000), ("batch", 16), ("accum", 1), ("warmup", 100), ("save-every", 500), ("val-every", 500), ("val-rows", 256), ("seed", 1)):
        p.add_argument(f"--{name}", type=int, default=default, help="as in loopmdm train")
    for name, default in (("lr", 2e-3), ("wte-lr", 1.0), ("floor", 0.1), ("weight-decay", 0.1), ("clip", 1.0), ("var-length", 0.0), ("ema", 0.0)):
        p.add_argument(f"--{name}", type=float, default=default, help="as in loopmdm train")
    p.add_argument("--time", default="uniform", choices=["uniform", "bell"], help="how noise levels are drawn")
    p.add_argument("--answers-after", help="a token's text: rows up to and with it are context; they begin at multiples of --seq-len")
    p.add_argument("--fixed-rows", action="store_true", help="rows begin at multiples of --seq-len in the data")
    p.add_argument("--init", help="folder of a model of the same tensors to begin with (of its average, if it has one); its loop may differ")
    p.add_argument("--resume", action="store_true", help="continue from the checkpoint in --out, also one that loopmdm wrote")
    p.add_argument("--compile", action="store_true", help="run through torch.compile")
    d = commands.add_parser("dump", help="write reference files for test_loopmdm.c", formatter_class=formatter)
    d.add_argument("--out", required=True, help="folder")
    d.add_argument("--large", action="store_true", help="the larger cases, which are not in the repository")
    for q in (p, d):
        q.add_argument("--threads", type=int, default=os.cpu_count(), help="threads for PyTorch")
    o = parser.parse_args()
    torch.set_num_threads(o.threads)
    if o.command == "train":
        return train(o)
    os.makedirs(o.out, exist_ok=True)
    for name, (shape, *rest) in (LARGE_CASES if o.large else SMALL_CASES).items():
        dump(os.path.join(o.out, name + ".bin"), make_config(*shape), *rest)


if __name__ == "__main__":
    main()
