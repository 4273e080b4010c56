"""
LoopMDM in PyTorch: the reference that loopmdm.c is checked against, to be read beside it. Same names, same order.

    python train_gpt2style.py train --data train.bin --tokenizer tokenizer.bin --model nano --out run/
    python train_gpt2style.py dump --out dev/reference

`train` takes the options of `loopmdm train` (and validates at S = 1, 2, 4, .. and S_max) and, from the same seed, uses the same initial parameters, batches, t, masks, loops and
schedule; it reads and writes the same checkpoints and log.csv. `dump` writes the files that test_loopmdm.c reads
(dev/reference/README.md has their format). Letters in shapes: B rows, T positions, C channels, NH heads, L layers, V tokens,
S loops, R masked rows. Needs numpy and torch, nothing else.
"""
import argparse
import glob
import math
import os
import shutil
import sys
import time
import zlib
from dataclasses import astuple, dataclass

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


PRESETS = {"d2": (32, 2, 2, 32, 1, 2, 4), "nano": (128, 6, 4, 128, 1, 3, 8), "d6": (256, 6, 6, 288, 1, 3, 8), "d12": (1024, 12, 12, 768, 1, 3, 8)}


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

STREAM_INIT, STREAM_BATCH, STREAM_TIME, STREAM_MASK, STREAM_LOOPS, STREAM_UNMASK, STREAM_TOKEN = range(7)


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
        std = {"wte": 0.02, "wpe": 0.0, "qkvb": 1.0}.get(name, 0.8 / math.sqrt(c.channels) if is_matrix(name) else 0.0)
        values = std * math.sqrt(12.0) * (random_uniform(seed, STREAM_INIT, i, np.arange(math.prod(shape))) - 0.5)
        params[name] = torch.from_numpy(values.astype(np.float32).reshape(shape))
        if name == "wte":
            params[name][c.vocab_size + 1:] = 0  # padding rows
        if name == "qkvb":
            params[name][:, 2 * c.channels:] = 0  # q and k only: heads begin with a taste for certain distances
    return params


def add_noise(c, targets, seed, step, first_row, total_rows):
    """targets (B,T) int64 -> x (B,T) with MASK, t (B) float64, weights (B,T) float32: 1/(t total_rows T) where masked, else 0."""
    B, T = targets.shape
    u = random_uniform(seed, STREAM_TIME, step, [0])
    strat = u + (first_row + np.arange(B)) / total_rows
    t = 1e-3 + (1 - 1e-3) * (strat - np.floor(strat))
    masked = random_uniform(seed, STREAM_MASK, step, first_row * T + np.arange(B * T).reshape(B, T)) < t[:, None]
    x = np.where(masked, c.vocab_size, targets)
    weights = np.where(masked, 1 / (t[:, None] * total_rows * T), 0).astype(np.float32)
    return x, t, weights


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

    def logits(self, rows):
        """rows (R,C) of the residual stream -> (R,V); MASK is no candidate."""
        return F.linear(F.layer_norm(rows, (rows.shape[-1],), self.lnfw, self.lnfb), self.wte[: self.config.vocab_size])

    def loss(self, x, targets, weights, S):
        """x, targets (B,T) int64, weights (B,T) -> sum of weights * cross entropy over masked positions: the NELBO."""
        rows = weights.view(-1).nonzero().squeeze(1)
        logits = self.logits(self(x, S).view(-1, self.config.channels)[rows])
        return (weights.view(-1)[rows] * F.cross_entropy(logits, targets.view(-1)[rows], reduction="none")).sum()


# ----------------------------------------------------------------------------------------------------------------------
# 4. Optimizer


def make_optimizer(model, lr, weight_decay):
    """AdamW with loopmdm's betas and epsilon; weight decay on matrices only."""
    decays = {True: [], False: []}
    for name, p in model.named_parameters():
        decays[is_matrix(name)].append(p)
    groups = [{"params": decays[True], "weight_decay": weight_decay}, {"params": decays[False], "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), eps=1e-8, fused=True)


def learning_rate(lr, floor, warmup, steps, step):
    """Linear warmup, then a cosine from lr down to floor * lr. step counts from 0."""
    if step < warmup:
        return lr * (step + 1) / warmup
    done = min(1, (step - warmup) / max(1, steps - warmup))
    return lr * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * done)))


def train_step(model, loss_function, optimizer, shards, seed, step, batch, accum, dist, lr, clip):
    """One optimizer step; loss_function is model.loss, or that compiled. Returns loss, S, mean t, gradient norm and the number of masked tokens."""
    c = model.config
    S, T, rows = draw_loops(c, dist, seed, step), c.max_seq_len, batch * accum
    loss = mean_t = masked = 0.0
    for first in range(0, rows, batch):
        targets = data_batch(shards, seed, step, first, batch, T)
        x, t, weights = add_noise(c, targets, seed, step, first, rows)
        part = loss_function(torch.from_numpy(x), torch.from_numpy(targets), torch.from_numpy(weights), S)
        part.backward()
        loss, mean_t, masked = loss + part.item(), mean_t + t.sum() / rows, masked + (weights > 0).sum()
    # torch.nn.utils.clip_grad_norm_ sums in float32, which is off by 2e-4 for seven million parameters
    norm = math.sqrt(sum(torch.linalg.vector_norm(p.grad, dtype=torch.float64).item() ** 2 for p in model.parameters()))
    for p in model.parameters():
        p.grad *= min(1.0, clip / (norm + 1e-6))
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss, S, mean_t, norm, masked


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


def data_batch(shards, seed, step, first_row, B, T):
    """Rows first_row .. first_row + B-1 of a training step: (B,T) int64."""
    index = random_bits(seed, STREAM_BATCH, step, first_row + np.arange(B)) % np.uint64(data_rows(shards, T, 1))
    return np.stack([data_row(shards, int(i), T, 1) for i in index])


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


def checkpoint_save(model, optimizer, folder, step, rows, seed, flops):
    """model.bin and optimizer.bin as loopmdm writes them: step done, rows in a step, seed, FLOPs spent so far."""
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
    os.replace(path2 + ".tmp", path2)
    os.replace(path + ".tmp", path)


def checkpoint_load(folder):
    """The model in folder and the step that it was saved at."""
    header, floats = read_floats(os.path.join(folder, "model.bin"), MODEL_MAGIC)
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
def evaluate(model, shards, S, rows, B, seed):
    """NELBO in nats per token of rows spread over the data."""
    c, T = model.config, model.config.max_seq_len
    available = data_rows(shards, T, T)
    stride, total = max(1, available // rows), 0.0
    for first in range(0, rows, B):
        targets = np.stack([data_row(shards, r * stride % available, T, T) for r in range(first, min(first + B, rows))])
        x, _, weights = add_noise(c, targets, seed, 0, first, rows)
        total += model.loss(torch.from_numpy(x), torch.from_numpy(targets), torch.from_numpy(weights), S).item()
    return total


def sample_token(logits, temperature, u):
    """logits (V) float64, u in [0,1) -> token by inverting the cumulative distribution, and its probability at temperature 1."""
    logits = logits - logits.max()
    chosen = int(logits.argmax())
    if temperature > 0:
        cumulative = np.cumsum(np.exp(logits / temperature))
        chosen = min(int(np.searchsorted(cumulative, u * cumulative[-1], side="right")), len(logits) - 1)
    return chosen, np.exp(logits[chosen]) / np.exp(logits).sum()


@torch.no_grad()
def sample(model, x, steps, S, order, temperature, seed, first_row=0):
    """Fills in every MASK of x (B,T) int64. Returns the tokens after each step: (steps,B,T)."""
    B, T = x.shape
    x, mask, trace = x.copy(), model.config.vocab_size, []
    blanks = (x == mask).sum(1)
    index = first_row * T + np.arange(B * T).reshape(B, T)
    for step in range(steps):
        quota = blanks * (step + 1) // steps - blanks * step // steps
        if order == "confidence":
            candidates = (x == mask) & (quota[:, None] > 0)
        else:
            candidates = (x == mask) & (random_uniform(seed, STREAM_UNMASK, step, index) < 1.0 / (steps - step))
        if candidates.any():
            logits = model.logits(model(torch.from_numpy(x), S)[torch.from_numpy(candidates)]).double().numpy()
            u = random_uniform(seed, STREAM_TOKEN, step, index)[candidates]
            picks = [sample_token(l, temperature, v) for l, v in zip(logits, u)]
            token, confidence = np.zeros_like(x), np.full(x.shape, -1.0)
            token[candidates], confidence[candidates] = [p[0] for p in picks], [p[1] for p in picks]
            if order == "confidence":
                for b in range(B):
                    kept = np.argsort(-confidence[b], kind="stable")[: quota[b]]
                    x[b, kept] = token[b, kept]
            else:
                x = np.where(candidates, token, x)
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
            a = np.ascontiguousarray(a)
            a = a.astype(np.int32) if a.dtype.kind == "i" else a
            f.write(name.encode().ljust(32, b"\0") + np.array([kinds[a.dtype.name], a.ndim, *a.shape, *[1] * (4 - a.ndim)], np.int32).tobytes())
            f.write(a.tobytes())


def dump(path, c, seed, B, T, loops):
    """One case: forward and backward at each S of loops, ten steps, NELBO and three samplers' traces, all of the same parameters."""
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
    given = np.full((B, T), c.vocab_size)
    given[:, : T // 4] = targets[:, : T // 4]
    out["sample_given"] = given
    for name, order, temperature in (("random", "random", 1.0), ("confidence", "confidence", 0.7), ("greedy", "confidence", 0.0)):
        out[f"sample_{name}"] = sample(model, given, 5, loops[-1], order, temperature, seed)  # (5,B,T)
    optimizer, losses = make_optimizer(model, 1e-3, 0.1), []
    model.zero_grad()
    for step in range(10):
        losses.append(train_step(model, model.loss, optimizer, shards, seed, step, B, 2, "uniform", learning_rate(1e-3, 0.1, 3, 10, step), 1.0))
    out["train_loss"] = np.array([s[0] for s in losses], np.float32)
    out["train_loops"] = np.array([s[1] for s in losses])
    out["train_norm"] = np.array([s[3] for s in losses], np.float32)
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
    shards, val, begin, flops = data_open(o.data), data_open(o.val_data) if o.val_data else None, 0, 0.0
    os.makedirs(o.out, exist_ok=True)
    if o.resume:
        model, begin = checkpoint_load(o.out)
        if model.config != c:
            sys.exit(f"--resume: {o.out} holds a model of another shape: {model.config}")
    else:
        if os.path.exists(os.path.join(o.out, "model.bin")):
            sys.exit(f"{o.out} already holds a model: continue it with --resume, or choose another --out")
        model = LoopMDM(c, init_parameters(c, o.seed))
        if o.tokenizer:
            shutil.copyfile(o.tokenizer, os.path.join(o.out, "tokenizer.bin"))
    optimizer = make_optimizer(model, o.lr, o.weight_decay)
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
        loss, S, t, norm, masked = train_step(model, loss_function, optimizer, shards, o.seed, step, o.batch, o.accum, o.loop_dist, lr, o.clip)
        if not (math.isfinite(loss) and math.isfinite(norm)):
            sys.exit(f"step {step + 1}: the loss is {loss} and its gradient {norm}")
        flops += flops_per_token(c, c.max_seq_len, S, masked / (rows * c.max_seq_len), True) * rows * c.max_seq_len
        speed, last = rows * c.max_seq_len / (time.time() - began), step + 1 == o.steps
        validates = val and ((step + 1) % o.val_every == 0 or last)
        nelbo = [f"{evaluate(model, val, s, o.val_rows, o.batch, o.seed):.6f}" if validates else "" for s in loops if val]
        log.write(",".join([str(step + 1), str(S), f"{t:.6f}", f"{loss:.9g}", f"{lr:.9g}", f"{norm:.9g}", f"{speed:.0f}", f"{flops:.9g}", *nelbo]) + "\n")
        if validates or last or (step + 1) % max(1, o.steps // 50) == 0:
            print(f"step {step + 1}/{o.steps} | loss {loss:.4f} | loops {S} | norm {norm:.2f} | lr {lr:.2e} | {speed:.0f} tokens/s", flush=True)
        if validates:
            print("validation NELBO, nats per token:", "  ".join(f"S={s} {n}" for s, n in zip(loops, nelbo)), flush=True)
        if (step + 1) % o.save_every == 0 or last:
            log.flush()
            checkpoint_save(model, optimizer, o.out, step + 1, rows, o.seed, flops)


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
    for name, default in (("lr", 2e-3), ("floor", 0.1), ("weight-decay", 0.1), ("clip", 1.0)):
        p.add_argument(f"--{name}", type=float, default=default, help="as in loopmdm train")
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
