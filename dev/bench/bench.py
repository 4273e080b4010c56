"""
Training speed of loopmdm beside PyTorch's: the same model, batches and threads, in turns, best of several.

    .venv/bin/python dev/bench/bench.py                                        # on the CPU: d6, V=4096, T=256, B=16, S = 1 and 4
    python3 dev/bench/bench.py --device cuda --compile                         # on a GPU: build/loopmdm_cuda_bf16, PyTorch under autocast
    python3 dev/bench/bench.py --device cuda --model d12 --vocab 50257 --batch 8 --compile

On a shared machine only the ratio within one run means something. A step is forward, backward, clipping and AdamW with
the LM head on masked rows, on random tokens; making batches counts for loopmdm and not for PyTorch. Prints a table.
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


def loopmdm_speed(o, S, folder):
    """Best tokens/s over o.steps steps of the program; the first step, which touches the memory, does not count."""
    out = os.path.join(folder, "run")
    subprocess.run(["rm", "-rf", out], check=True)
    subprocess.run([o.program, "train", "--data", os.path.join(folder, "data.bin"), "--vocab", str(o.vocab), "--model", o.model, "--batch", str(o.batch),
                    "--max-loops", str(S), "--loop-dist", "fixed", "--steps", str(o.steps + 1), "--threads", str(o.threads), "--out", out],
                   check=True, stdout=subprocess.DEVNULL)
    return max(float(row["tokens_per_s"]) for row in list(csv.DictReader(open(os.path.join(out, "log.csv"))))[1:])


class Peer:
    """The PyTorch model on o.device; kind is eager or compile."""

    def __init__(self, o, S, kind, folder):
        T, L, NH, C, a, b, _ = reference.PRESETS[o.model]
        self.o, self.S, self.config = o, S, reference.make_config(T, o.vocab, L, NH, C, a, b, S)
        self.model = reference.LoopMDM(self.config, reference.init_parameters(self.config, 1)).to(o.device)
        self.optimizer = reference.make_optimizer(self.model, 1e-3, 0.1)
        self.loss = torch.compile(self.model.loss) if kind == "compile" else self.model.loss
        shards, self.batches = reference.data_open(os.path.join(folder, "data.bin")), []
        for step in range(o.steps):
            targets = reference.data_batch(shards, 1, step, 0, o.batch, T)
            x, _, weights = reference.add_noise(self.config, targets, 1, step, 0, o.batch)
            self.batches.append([torch.from_numpy(array).to(o.device) for array in (x, targets, weights)])
        for _ in range(2):
            self.speed()  # compiles, and reserves memory

    def speed(self):
        """Best tokens/s over o.steps steps."""
        best = 0.0
        for batch in self.batches:
            began = time.perf_counter()
            with torch.autocast(self.o.device, torch.bfloat16, enabled=self.o.device == "cuda"):
                loss = self.loss(*batch, self.S)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            loss.item()
            if self.o.device == "cuda":
                torch.cuda.synchronize()
            best = max(best, self.o.batch * self.config.max_seq_len / (time.perf_counter() - began))
        return best


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="d6", choices=reference.PRESETS)
    parser.add_argument("--vocab", type=int, default=4096)
    parser.add_argument("--batch", type=int, help="rows (default 16 on the CPU, 64 on a GPU)")
    parser.add_argument("--loops", default="1,4", help="numbers of loops")
    parser.add_argument("--steps", type=int, help="steps in a turn (default 3 on the CPU, 20 on a GPU)")
    parser.add_argument("--turns", type=int, default=3, help="turns of each")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--program", help="default ./loopmdm, or build/loopmdm_cuda_bf16 with --device cuda")
    parser.add_argument("--compile", action="store_true", help="torch.compile as well as eager")
    o = parser.parse_args()
    cuda = o.device == "cuda"
    o.program = o.program or ("build/loopmdm_cuda_bf16" if cuda else "./loopmdm")
    o.batch, o.steps = o.batch or (64 if cuda else 16), o.steps or (20 if cuda else 3)
    torch.set_num_threads(o.threads)
    kinds = ["eager", "compile"] if o.compile else ["eager"]
    with tempfile.TemporaryDirectory() as folder:
        tokens = np.random.default_rng(0).integers(0, o.vocab, 200000).tolist()
        header = np.zeros(256, np.int32)
        header[:3] = [reference.SHARD_MAGIC, 1, len(tokens)]
        with open(os.path.join(folder, "data.bin"), "wb") as f:
            f.write(header.tobytes() + np.array(tokens, np.uint16).tobytes())
        where = f"{torch.cuda.get_device_name()}, bf16" if cuda else f"{o.threads} threads, fp32"
        print(f"{o.model}, V={o.vocab}, B={o.batch}, {where}, PyTorch {torch.__version__}; training, best of {o.turns} turns of {o.steps} steps")
        print("loops  loopmdm tokens/s  GFLOP/s" + "".join(f"  {'PyTorch ' + kind:>15} tokens/s  ratio" for kind in kinds))
        for S in (int(s) for s in o.loops.split(",")):
            peers = [Peer(o, S, kind, folder) for kind in kinds]
            ours, theirs = 0.0, [0.0] * len(kinds)
            for _ in range(o.turns):
                ours = max(ours, loopmdm_speed(o, S, folder))
                theirs = [max(best, peer.speed()) for best, peer in zip(theirs, peers)]
            flops = reference.flops_per_token(peers[0].config, peers[0].config.max_seq_len, S, 0.5, True) * 1e-9
            print(f"{S:5}  {ours:16.0f}  {ours * flops:7.0f}" + "".join(f"  {best:24.0f}  {ours / best:5.2f}" for best in theirs), flush=True)
            del peers


if __name__ == "__main__":
    main()
