"""
Writes the reference files that test_loopmdm.c reads: small models, and all that PyTorch computes
with them. README.md beside this has the format and says what the tensors are.

    python dev/reference/dump.py --out dev/reference       writes the files in the repository again
    python dev/reference/dump.py --large --out FOLDER      larger models, 170 MB
"""
import argparse
import math
import os
import sys
import zlib
from dataclasses import astuple, replace
from types import SimpleNamespace

import numpy as np
import torch

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", ".."))
import train_gpt2style as R  # noqa: E402
from dev.data import outputs  # noqa: E402

DUMP_MAGIC = 20260527

# name: T at most, V, L, NH, C, a, b, S_max; then the seed, B, T and the loops
SMALL_CASES = {
    # Head, loop and tail; T is no multiple of a tile.
    "loop": ((20, 61, 4, 2, 16, 1, 3, 4), 1, 3, 20, [1, 3, 4]),
    # The loop comes first; there is one head.
    "a0": ((13, 40, 3, 1, 12, 0, 2, 4), 2, 2, 13, [1, 3, 4]),
    # The loop comes last; T is below the maximum.
    "bL": ((9, 70, 3, 3, 18, 2, 3, 5), 3, 4, 7, [1, 3, 5]),
    # An ordinary MDM, whatever S is.
    "noloop": ((17, 50, 2, 2, 16, 0, 0, 3), 4, 2, 17, [1, 3]),
}
LARGE_CASES = {
    # Every dimension is just past a tile.
    "tiles": ((131, 517, 4, 3, 78, 1, 3, 6), 5, 3, 131, [1, 3, 6]),
    "nano": ((128, 1024, 6, 4, 128, 1, 3, 8), 6, 4, 128, [1, 3, 8]),
    # There are more tokens than one panel of the matrix product holds. A shorter T: it takes long.
    "d6": ((256, 4200, 6, 6, 288, 1, 3, 8), 7, 2, 96, [1, 3]),
}


def write_dump(path, tensors):
    """Writes tensors, {name: array}. int32, float32 and float64 are types 1, 2 and 3."""
    kinds = {"int32": 1, "float32": 2, "float64": 3}
    with open(path, "wb") as f:
        header = np.zeros(256, np.int32)
        header[:3] = [DUMP_MAGIC, 1, len(tensors)]
        f.write(header.tobytes())
        for name, a in tensors.items():
            assert len(name) < 32, f"{name} leaves no room for a zero byte"
            a = np.ascontiguousarray(a)
            a = a.astype(np.int32) if a.dtype.kind == "i" else a
            sizes = [*a.shape, *[1] * (4 - a.ndim)]
            f.write(name.encode().ljust(32, b"\0"))
            f.write(np.array([kinds[a.dtype.name], a.ndim, *sizes], np.int32).tobytes())
            f.write(a.tobytes())


class Recorder(R.LoopMDM):
    """A model that keeps the residual stream after each pass of the last forward."""

    def forward(self, x, S):
        self.passes = []
        return super().forward(x, S)

    def block(self, h, w):
        self.passes.append(super().block(h, w))
        return self.passes[-1]

    def states(self):
        """The residual streams after each loop, (S,B,T,C), or None without a loop."""
        a, b, L = self.config.loop_start, self.config.loop_end, self.config.layers
        loop = self.passes[a: len(self.passes) - (L - b)]
        return torch.stack(loop[b - a - 1:: b - a]).detach() if b > a else None


@torch.no_grad()
def adaptive_forward(model, x, S, tau):
    """
    A forward in which a sequence of x (B,T) stops looping when a loop changes it by less than tau,
    after S loops at most. Returns the residual stream after the last pass (B,T,C), each sequence's
    loops (B), and the changes (S,B), infinite where there is none.

    h_s is the residual stream after loop s. Its change is the mean over a sequence's positions of
    |h_s - h_{s-1}| / |h_s| (LoopMDM, arXiv 2605.26106).
    """
    c, layers = model.config, model.layers()
    loops, changes = torch.full((len(x),), S), torch.full((S, len(x)), torch.inf)
    h = model.wte[x] + model.wpe[: x.shape[1]]
    for w in layers[: c.loop_start]:
        h = model.block(h, w)

    active = torch.arange(len(x))  # the sequences that still loop
    for s in range(1, S + 1 if c.loop_start < c.loop_end else 1):
        before = after = h[active]
        for w in layers[c.loop_start: c.loop_end]:
            after = model.block(after, w)
        changes[s - 1, active] = ((after - before).norm(dim=-1) / after.norm(dim=-1)).mean(1)
        h = h.index_copy(0, active, after)
        loops[active] = s
        active = active[changes[s - 1, active] >= tau]
        if len(active) == 0:
            break

    for w in layers[c.loop_end:]:
        h = model.block(h, w)
    return h, loops, changes


def choose_tau(model, x, S):
    """
    A tau with which sequences of x stop after different numbers of loops: the middle of the widest
    gap between changes where that is so. Without a loop no tau changes anything, and it is 1.
    """
    changes = adaptive_forward(model, x, S, 0)[2].double().numpy()
    changes = np.sort(changes[np.isfinite(changes)])
    gaps, middles = changes[1:] / changes[:-1], np.sqrt(changes[1:] * changes[:-1])
    for i in np.argsort(-gaps):
        if len(adaptive_forward(model, x, S, middles[i])[1].unique()) > 1:
            assert gaps[i] > 1.001, "float32 could decide otherwise"
            return middles[i]
    assert len(changes) == 0, "no tau makes sequences differ"
    return 1.0


class Shaken:
    """
    A model to sample from with errors of at most `size` in its logits, as another implementation
    has, though larger ones. It remembers the residual streams that it has computed.
    """

    def __init__(self, model, seed):
        self.config, self.wte = model.config, model.wte
        self.model, self.seed, self.size, self.calls, self.known = model, seed, 0.0, 0, {}

    def __call__(self, x, S):
        key = x.numpy().tobytes()
        if key not in self.known:
            self.known[key] = self.model(x, S)
        return self.known[key]

    def logits(self, h):
        logits, self.calls = self.model.logits(h), self.calls + 1
        index = np.arange(logits.numel())
        errors = 2 * R.random_uniform(self.seed, R.STREAM_INIT, self.calls, index) - 1
        return logits + self.size * torch.from_numpy(errors.reshape(logits.shape))


def sample_clearly(model, given, o, S, seed):
    """
    The tokens after each step of sample(), and its seed: the first from `seed` on at which every
    option makes a difference, and errors of 1e-4 in the logits make none. So no result depends on a
    near tie (of scores, at the threshold, at the edge of top-p, in a draw).
    """
    shaken = Shaken(model, seed)
    plain = R.SampleOptions()
    without = [replace(o, **{name: getattr(plain, name)})
               for name in ("order", "temperature", "top_k", "top_p", "block")]
    for s in range(seed, seed + 1000):
        shaken.size = 0.0
        trace = R.sample(shaken, given, o, S, s)
        if any(p != o and np.array_equal(R.sample(shaken, given, p, S, s), trace) for p in without):
            continue
        shaken.size = 1e-4
        if all(np.array_equal(R.sample(shaken, given, o, S, s), trace) for _ in range(4)):
            return trace[1:], s
    raise AssertionError(f"no seed gives a clear result with {o}")


def sampler_cases(c, T):
    """
    {name: SampleOptions}: each order and each option. The models are untrained, so probabilities
    are about 1/V.
    """
    n, V = min(8, (T + 4) // 5), c.vocab_size
    cases = {
        "random": R.SampleOptions(6, "random"),
        "confidence": R.SampleOptions(5, "confidence", 0.7),
        "greedy": R.SampleOptions(5, "confidence", 0.0),
        "margin": R.SampleOptions(6, "margin", 0.7),
        "entropy": R.SampleOptions(6, "entropy"),
        "threshold": R.SampleOptions(5, "threshold", threshold=1 / V),
        "threshold_block": R.SampleOptions(5, "threshold", 0.5, threshold=1 / V, block=n),
        "block_random": R.SampleOptions(7, "random", block=n),
        "block_confidence": R.SampleOptions(6, "confidence", block=n),
        "topk": R.SampleOptions(5, "random", top_k=V // 8),
        "topp": R.SampleOptions(5, "confidence", top_p=0.5),
        "topk_topp_block": R.SampleOptions(6, "entropy", 1.5, V // 4, 0.7, block=n),
    }
    few = cases if V <= 1000 else ("random", "confidence", "greedy")  # more would take minutes
    return {name: cases[name] for name in few}


def case_parameters(c, seed):
    """
    The initial parameters, moved away from zero and one, so that no gradient is trivial, and with
    branches that matter as much as in a trained model.
    """
    params = R.init_parameters(c, seed)
    for i, (name, value) in enumerate(params.items()):
        u = R.random_uniform(seed, R.STREAM_INIT, 100 + i, np.arange(value.numel())) - 0.5
        width = 4 / math.sqrt(c.channels) if name in ("attprojw", "fcprojw") else 0.2
        params[name] = value + width * torch.from_numpy(u.astype(np.float32).reshape(value.shape))
    return params


def dump_forward(out, model, x, targets, weights, loops):
    """Adds forward and backward for each number of loops."""
    tensors = [torch.from_numpy(a) for a in (x, targets, weights)]
    for S in loops:
        model.zero_grad()
        h = model(tensors[0], S)
        out[f"hidden/{S}"] = h.detach().numpy()
        states = model.states()
        if states is not None:
            out[f"states/{S}"] = states.numpy()
        out[f"logits/{S}"] = model.logits(h[tensors[2] > 0]).detach().numpy()
        loss = model.loss(*tensors, S)
        loss.backward()
        out[f"loss/{S}"] = np.array([loss.item()], np.float32)
        for name, p in model.named_parameters():
            out[f"grad{S}/{name}"] = p.grad.numpy().copy()


def dump_adaptive(out, model, x):
    """Adds adaptive loops: with a tau at which sequences differ, and with one that stops none."""
    S, x = model.config.max_loops, torch.from_numpy(x)
    for name, tau in (("change", choose_tau(model, x, S)), ("zero", 0.0)):
        h, used, _ = adaptive_forward(model, x, S, tau)
        out[f"adaptive_options/{name}"] = np.array([tau, S], np.float64)
        out[f"adaptive_loops/{name}"], out[f"adaptive_hidden/{name}"] = used.numpy(), h.numpy()
    assert (used == S).all() and torch.allclose(h, model(x, S), atol=1e-4), "tau = 0 never stops"
    h, used, _ = adaptive_forward(model, x, S, math.inf)
    assert torch.allclose(h, model(x, 1), atol=1e-4), "tau = infinity stops after the first loop"


def dump_answers(out, c, targets, seed):
    """Adds noise with contexts of different lengths."""
    B, T = targets.shape
    answers, separator = targets.copy(), int(targets[0, 0])
    # Of each sequence's separators, the first from position 1 on counts, never the last.
    answers[np.arange(B), 1 + (T - 2) * np.arange(B) // B] = separator
    answers[:, -1] = separator
    given = R.context_lengths(answers, separator)
    assert given[0] == 2 and len(set(given)) > 1, "sequences differ"
    x, _, weights = R.add_noise(c, answers, seed, 0, 0, B, given)
    out.update(answers_sep=np.array([separator]), answers_targets=answers, answers_given=given)
    out.update(answers_x=x, answers_weights=weights)


def dump_samples(out, model, targets, S, seed):
    """Adds the samplers."""
    (B, T), mask = targets.shape, model.config.vocab_size
    # Blanks at the end, one more in each sequence, and two before them in all sequences except the
    # first. A fourth sequence has none.
    begin = max(T // 2, T - 24)
    blank = np.arange(T) >= begin - np.arange(B)[:, None]
    blank[1:, begin // 2: begin // 2 + 2] = True
    blank[3:] = False
    given = np.where(blank, mask, targets)
    out["sample_given"] = given
    for name, o in sampler_cases(model.config, T).items():
        trace, s = sample_clearly(model, given, o, S, seed)
        out[f"sample_options/{name}"] = np.array(
            [o.steps, list(R.ORDERS).index(o.order), *astuple(o)[2:], s], np.float64)
        out[f"sample/{name}"] = trace
        assert (trace[-1] < mask).all(), "all blanks are filled"
        assert (trace[:, ~blank] == given[~blank]).all(), "nothing else changes"
        if o.order == "threshold":
            assert 1 < len(trace) < blank.sum(1).max(), "a step keeps more than one, not all"


def dump_training(out, model, data, seed, B):
    """Adds ten steps of the optimizer, and the average of the parameters over them."""
    optimizer = R.make_optimizer(model, 1e-3, 0.1)
    average = [p.detach().clone() for p in model.parameters()]
    o = SimpleNamespace(seed=seed, batch=B, accum=2, loop_dist="uniform", noise_warmup=0)
    steps = []
    model.zero_grad()
    for step in range(10):
        steps.append(R.train_gradient(model, data, o, step))
        R.update(model, optimizer, R.learning_rate(1e-3, 0.1, 3, 10, step), 1.0, steps[-1].norm)
        R.update_average(average, model, 0.4, step + 1)
    for prefix in ("train", "train2"):  # an average changes no step
        out[f"{prefix}_loss"] = np.array([g.loss for g in steps], np.float32)
        out[f"{prefix}_loops"] = np.array([g.S for g in steps])
        out[f"{prefix}_norm"] = np.array([g.norm for g in steps], np.float32)
    out["train2_ema"] = np.concatenate([a.numpy().ravel() for a in average])


def dump(path, c, seed, B, T, loops):
    """Writes one case. All its parts begin with the same parameters."""
    params = case_parameters(c, seed)
    model = Recorder(c, params)
    tokens = R.random_bits(seed, R.STREAM_BATCH, 1000, np.arange(8 * c.max_seq_len))
    tokens = (tokens % np.uint64(c.vocab_size)).astype(np.uint16)
    data = R.Data([tokens])
    targets = R.data_sequences(data, range(B), T, 1)
    x, t, weights = R.add_noise(c, targets, seed, 0, 0, B)

    initial = b"".join(v.numpy().tobytes() for v in R.init_parameters(c, seed).values())
    out = {"config": np.array(astuple(c)),
           "init_crc": np.array([zlib.crc32(initial)], np.uint32).view(np.int32),
           "seed": np.array([seed]), "loops": np.array(loops), "tokens": tokens.astype(np.int32),
           "targets": targets, "x": x, "t": t, "weights": weights}
    out.update((f"params/{name}", value.numpy()) for name, value in params.items())
    dump_forward(out, model, x, targets, weights, loops)
    nelbo = [R.evaluate(model, data, S, 10, B, seed) for S in loops]
    out["nelbo"] = np.array(nelbo, np.float32)
    dump_adaptive(out, model, x)
    dump_answers(out, c, targets, seed)
    dump_samples(out, model, targets, loops[-1], seed)
    dump_training(out, model, data, seed, B)  # last: it changes the parameters
    with outputs.new_files(path) as [part]:
        write_dump(part, out)


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True, help="folder")
    parser.add_argument("--large", action="store_true", help="the larger cases")
    o = parser.parse_args()
    if not o.out or os.path.isfile(o.out):
        parser.error("--out needs a folder")
    torch.set_num_threads(1)  # so that the bits do not depend on the number of cores
    os.makedirs(o.out, exist_ok=True)
    for name, (shape, *rest) in (LARGE_CASES if o.large else SMALL_CASES).items():
        path = os.path.join(o.out, name + ".bin")
        dump(path, R.make_config(*shape), *rest)
        print(f"{path}: {os.path.getsize(path) / 1024:.0f} KiB")


if __name__ == "__main__":
    outputs.run("dump.py", main)
