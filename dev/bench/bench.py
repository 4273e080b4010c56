"""
Training speed of loopmdm beside PyTorch's: the same model, batches and threads, in turns, best of several.

    .venv/bin/python dev/bench/bench.py            # d6: V=4096, T=256, B=16, S = 1 and 4

These machines are shared, so only the ratio within one run means something. A step is forward, backward, clipping and AdamW with
the LM head on masked rows, on random tokens. Prints a table.
"""
import argparse
import csv
import os
import subprocess
import sys
import tempfile
import time

import numpy as np
import torch

sys.path.insert(0, os.path.join(os.path.dirname(__file__), "..", ".."))
import train_gpt2style as reference  # noqa: E402


def c_speed(o, S, folder):
    """Best tokens/s over o.steps steps of ./loopmdm; the first step, which touches the memory, does not count."""
    out = os.path.join(folder, "run")
    subprocess.run(["rm", "-rf", out], check=True)
    subprocess.run(["./loopmdm", "train", "--data", os.path.join(folder, "data.bin"), "--vocab", str(o.vocab), "--model", o.model, "--batch", str(o.batch),
                    "--max-loops", str(S), "--loop-dist", "fixed", "--steps", str(o.steps + 1), "--threads", str(o.threads), "--out", out],
                   check=True, stdout=subprocess.DEVNULL)
    return max(float(row["tokens_per_s"]) for row in list(csv.DictReader(open(os.path.join(out, "log.csv"))))[1:])


def torch_speed(o, S, folder, state):
    """Best tokens/s over o.steps steps of PyTorch, after one that does not count."""
    if S not in state:
        T, L, NH, C, a, b, _ = reference.PRESETS[o.model]
        c = reference.make_config(T, o.vocab, L, NH, C, a, b, S)
        model = reference.LoopMDM(c, reference.init_parameters(c, 1))
        state[S] = model, reference.make_optimizer(model, 1e-3, 0.1)
    model, optimizer = state[S]
    shards, best = reference.data_open(os.path.join(folder, "data.bin")), 0.0
    for step in range(o.steps + 1):
        began = time.perf_counter()
        reference.train_step(model, model.loss, optimizer, shards, 1, step, o.batch, 1, "fixed", 1e-3, 1.0)
        best = max(best, o.batch * model.config.max_seq_len / (time.perf_counter() - began)) if step else best
    return best


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="d6", choices=reference.PRESETS)
    parser.add_argument("--vocab", type=int, default=4096)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--loops", default="1,4", help="numbers of loops")
    parser.add_argument("--steps", type=int, default=3, help="steps in a turn")
    parser.add_argument("--turns", type=int, default=3, help="turns of each")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    o = parser.parse_args()
    torch.set_num_threads(o.threads)
    with tempfile.TemporaryDirectory() as folder:
        tokens = np.random.default_rng(0).integers(0, o.vocab, 200000).tolist()
        header = np.zeros(256, np.int32)
        header[:3] = [reference.SHARD_MAGIC, 1, len(tokens)]
        with open(os.path.join(folder, "data.bin"), "wb") as f:
            f.write(header.tobytes() + np.array(tokens, np.uint16).tobytes())
        state = {}
        print(f"{o.model}, V={o.vocab}, B={o.batch}, {o.threads} threads, PyTorch {torch.__version__} eager; training, best of {o.turns} turns of {o.steps} steps")
        print("loops  loopmdm tokens/s   GF/s  PyTorch tokens/s   GF/s  ratio")
        for S in (int(s) for s in o.loops.split(",")):
            ours = theirs = 0.0
            for _ in range(o.turns):
                ours, theirs = max(ours, c_speed(o, S, folder)), max(theirs, torch_speed(o, S, folder, state))
            c = state[S][0].config
            flops = reference.flops_per_token(c, c.max_seq_len, S, 0.5, True) * 1e-9
            print(f"{S:5}  {ours:16.0f}  {ours * flops:5.0f}  {theirs:16.0f}  {theirs * flops:5.0f}  {ours / theirs:5.2f}", flush=True)
            del state[S]


if __name__ == "__main__":
    main()
