"""
loopmdm beside PyTorch: the same model, batches and threads, in turns, best of several. On a shared machine only the ratio within one run means something.

    make bench                                                      # everything on the CPU, into dev/results/bench_cpu.csv: an hour and more
    .venv/bin/python dev/bench/bench.py                             # on the CPU: training of d6, V=4096, T=256, B=16, S = 1 and 4
    .venv/bin/python dev/bench/bench.py matmul forward sample       # parts of it
    python3 dev/bench/bench.py --device cuda --compile              # on a GPU: build/loopmdm_cuda_bf16, PyTorch under autocast
    python3 dev/bench/bench.py --device cuda --model d12 --vocab 50257 --batch 8 --compile

train    a step: forward, backward, clipping and AdamW, with the LM head on masked rows, on random tokens. loopmdm is the program itself, with its making of batches; PyTorch's are made before.
forward  without gradients, the LM head on all rows.
sample   from nothing to text with the confidence sampler at temperature 1; PyTorch's as whole-tensor operations.
matmul   each matrix product of the models alone, beside torch.mm and the FMA peak of the machine, measured here too.
memory   largest resident memory of a training process; PyTorch's own, before there is a model, is given beside it.
scaling  how a training step's time grows with T, S, B and threads: loopmdm alone.
Prints tables, and adds lines to --csv.
"""
import argparse
import csv
import ctypes
import os
import subprocess
import sys
import tempfile
import time

import numpy as np
import torch

sys.path.insert(0, os.path.join(os.path.dirname(__file__), "..", ".."))
import train_gpt2style as reference  # noqa: E402

PARTS = ("train", "forward", "sample", "matmul", "memory", "scaling")
SUITE = [("nano", 1024, 128, 32), ("d6", 4096, 256, 16), ("d12", 50257, 256, 2), ("d6", 4096, 1024, 4)]  # model, V, T, B: what make bench measures


def config_of(o, S):
    """The configuration that o describes, with S loops."""
    T, L, NH, C, a, b, _ = reference.PRESETS[o.model]
    return reference.make_config(o.seq_len or T, o.vocab, L, NH, C, a, b, S)


def program_arguments(o, S, folder, steps):
    """The command line of a training of so many steps with S loops in each."""
    T = config_of(o, S).max_seq_len
    return [o.program, "train", "--data", os.path.join(folder, "data.bin"), "--vocab", str(o.vocab), "--model", o.model, "--seq-len", str(T), "--batch", str(o.batch),
            "--max-loops", str(S), "--loop-dist", "fixed", "--steps", str(steps), "--threads", str(o.threads), "--out", os.path.join(folder, "run")]


def loopmdm_speed(o, S, folder):
    """Best tokens/s over o.steps steps of the program; the first step, which touches the memory, does not count."""
    subprocess.run(["rm", "-rf", os.path.join(folder, "run")], check=True)
    subprocess.run(program_arguments(o, S, folder, o.steps + 1), check=True, stdout=subprocess.DEVNULL)
    return max(float(row["tokens_per_s"]) for row in list(csv.DictReader(open(os.path.join(folder, "run", "log.csv"))))[1:])


class Peer:
    """The PyTorch model on o.device; kind is eager or compile."""

    def __init__(self, o, S, kind, folder):
        self.o, self.S, self.config = o, S, config_of(o, S)
        self.model = reference.LoopMDM(self.config, reference.init_parameters(self.config, 1)).to(o.device)
        self.optimizer = reference.make_optimizer(self.model, 1e-3, 0.1)
        self.loss = torch.compile(self.model.loss) if kind == "compile" else self.model.loss
        shards, self.batches = reference.data_open(os.path.join(folder, "data.bin")), []
        for step in range(o.steps):
            targets = reference.data_batch(shards, 1, step, 0, o.batch, self.config.max_seq_len)
            x, _, weights = reference.add_noise(self.config, targets, 1, step, 0, o.batch)
            self.batches.append([torch.from_numpy(array).to(o.device) for array in (x, targets, weights)])

    def warm_up(self):
        """Compiles, and reserves memory."""
        for _ in range(2):
            self.speed()
        return self

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


@torch.no_grad()
def sample(model, B, T, S, steps):
    """The confidence sampler at temperature 1 as operations on whole tensors, in the manner of LLaDA's generate()."""
    V = model.config.vocab_size
    x, rows = torch.full((B, T), V), torch.arange(B)[:, None]
    for step in range(steps):
        masked = x == V
        h = model(x, S)[masked]
        p = torch.softmax(model.logits(h).double(), -1)
        token = torch.multinomial(p, 1)
        best, drawn = torch.full((B, T), -1.0, dtype=torch.float64), x.clone()
        best[masked], drawn[masked] = p.gather(1, token)[:, 0], token[:, 0]
        kept = best.topk(T * (step + 1) // steps - T * step // steps, 1).indices
        x[rows, kept] = drawn[rows, kept]


class Table:
    """Prints lines as they come, and keeps them for the CSV file: part, what was measured, unit, loopmdm, PyTorch eager, compile, ratio to the better."""

    def __init__(self, path):
        self.file = open(path, "w", newline="") if path else None
        self.csv = csv.writer(self.file, lineterminator="\n") if path else None
        if path:
            self.csv.writerow(["part", "what", "unit", "loopmdm", "pytorch_eager", "pytorch_compile", "ratio"])

    def line(self, part, what, unit, ours, theirs, note=""):
        """theirs: [eager] or [eager, compile], higher is better; [] where there is none (the peak, scaling)."""
        ratio = ours / max(theirs) if theirs else None
        print(f"{what:36} {ours:10.0f}" + "".join(f" {t:10.0f}" for t in theirs) + (f" {ratio:7.2f}" if theirs else "") + note, flush=True)
        if self.csv:
            self.csv.writerow([part, what, unit, f"{ours:.4g}"] + [f"{t:.4g}" for t in (list(theirs) + [None, None])[:2] if t is not None] + [""] * (2 - len(theirs)) + [f"{ratio:.3f}" if theirs else ""])
            self.file.flush()


def bench_train(o, table, folder):
    """Training steps, in tokens/s."""
    print(f"{'':36} {'loopmdm':>10} {'eager':>10}" + (f" {'compile':>10}" if o.compile else "") + f" {'ratio':>7}  GFLOP/s   (tokens/s of training)")
    for S in (int(s) for s in o.loops.split(",")):
        peers = [Peer(o, S, kind, folder).warm_up() for kind in (["eager", "compile"] if o.compile else ["eager"])]
        ours, theirs = 0.0, [0.0] * len(peers)
        for _ in range(o.turns):
            ours = max(ours, loopmdm_speed(o, S, folder))
            theirs = [max(best, peer.speed()) for best, peer in zip(theirs, peers)]
        c = peers[0].config
        flops = reference.flops_per_token(c, c.max_seq_len, S, 0.5, True) * 1e-9
        table.line("train", f"{o.model} V={o.vocab} T={c.max_seq_len} B={o.batch} S={S}", "tokens/s", ours, theirs, f" {ours * flops:8.0f}")
        del peers


def in_turns(turns, seconds, *sides):
    """The smallest result of each of the functions sides, called in turns: so many at least, and for so many seconds."""
    best, began, turn = [float("inf")] * len(sides), time.perf_counter(), 0
    while turn < turns or time.perf_counter() - began < seconds:
        best = [min(b, side()) for b, side in zip(best, sides)]
        turn += 1
    return best


def seconds_of(call):
    """call as a function that returns how long it takes."""
    def timed():
        began = time.perf_counter()
        call()
        return time.perf_counter() - began
    return timed


def open_both(o, B, lib):
    """The same shape on both sides: returns PyTorch's model."""
    c = config_of(o, 1)
    lib.bench_open(c.max_seq_len, c.vocab_size, c.layers, c.heads, c.channels, c.loop_start, c.loop_end, B)
    return reference.LoopMDM(c, reference.init_parameters(c, 1))


def bench_forward(o, table, lib):
    """Forward without gradients, in tokens/s."""
    print(f"{'':36} {'loopmdm':>10} {'eager':>10} {'ratio':>7}   (tokens/s of inference)")
    for B in (1, 16):
        model = open_both(o, B, lib)
        T = model.config.max_seq_len
        x = torch.randint(0, o.vocab, (B, T), generator=torch.Generator().manual_seed(1))
        for S in (1, 4):
            def forward():
                with torch.no_grad():
                    model.logits(model(x, S).view(B * T, -1))
            ours, theirs = in_turns(o.turns, 3, lambda: lib.bench_forward(S), seconds_of(forward))
            table.line("forward", f"{o.model} V={o.vocab} T={T} B={B} S={S}", "tokens/s", B * T / ours, [B * T / theirs])


def bench_sample(o, table, lib):
    """Sampling from nothing, in tokens/s."""
    steps = 16
    print(f"{'':36} {'loopmdm':>10} {'eager':>10} {'ratio':>7}   (tokens/s of sampling in {steps} steps)")
    for B in (1, 16):
        model = open_both(o, B, lib)
        T = model.config.max_seq_len
        ours, theirs = in_turns(o.turns, 3, lambda: lib.bench_sample(4, steps), seconds_of(lambda: sample(model, B, T, 4, steps)))
        table.line("sample", f"{o.model} V={o.vocab} T={T} B={B} S=4", "tokens/s", B * T / ours, [B * T / theirs])


def bench_matmul(o, table, lib):
    """Each matrix product of a training step, in GFLOP/s."""
    peak = max(lib.bench_peak(0.2) for _ in range(5)) * 1e-9
    table.line("matmul", "FMA peak", "GFLOP/s", peak, [])
    print(f"{'(M,C) x (C,OC)':36} {'loopmdm':>10} {'torch.mm':>10} {'ratio':>7}  of peak   (GFLOP/s)")
    seen = set()
    for name, V, T, B in SUITE:
        _, _, _, C, _, _, _ = reference.PRESETS[name]
        for M, K, N in ((B * T, C, 3 * C), (B * T, C, C), (B * T, C, 4 * C), (B * T, 4 * C, C), (B * T // 2, C, V)):
            if (M, K, N) in seen:
                continue
            seen.add((M, K, N))
            inp, weight, out = (torch.randn(shape, generator=torch.Generator().manual_seed(1)) for shape in ((M, K), (N, K), (M, N)))
            pointers = [ctypes.c_void_p(t.data_ptr()) for t in (out, inp, weight)]
            calls = (lambda: torch.mm(inp, weight.t(), out=out), lambda: torch.mm(out, weight, out=inp), lambda: torch.mm(out.t(), inp, out=weight))
            for kind, (what, call) in enumerate(zip(("forward", "input's gradient", "weight's gradient"), calls)):
                ours, theirs = in_turns(o.turns, 0.7, lambda: lib.bench_matmul(kind, *pointers, M, K, N), seconds_of(call))
                flops = 2e-9 * M * N * K
                table.line("matmul", f"({M},{K})x({K},{N}) {what}", "GFLOP/s", flops / ours, [flops / theirs], f" {100 * flops / ours / peak:7.0f} %")


def peak_memory(arguments):
    """Largest resident memory of a process, in MiB, as Linux keeps it: getrusage() would count this process, from which it was forked."""
    process, peak = subprocess.Popen(arguments, stdout=subprocess.DEVNULL), 0
    while process.poll() is None:
        with open(f"/proc/{process.pid}/status") as status:
            peak = max([peak] + [int(line.split()[1]) for line in status if line.startswith("VmHWM")])
        time.sleep(0.01)
    if process.returncode:
        sys.exit(f"{arguments[0]} ended with status {process.returncode}")
    return peak / 1024


def bench_memory(o, table, folder):
    """Largest resident memory of training processes, in MiB; the ratio is PyTorch's, with its own part, over loopmdm's."""
    print(f"{'':36} {'loopmdm':>10} {'recompute':>10} {'PyTorch':>10} {'of it torch':>11}   (MiB)")
    this = [sys.executable, os.path.abspath(__file__), "--model", o.model, "--vocab", str(o.vocab), "--batch", str(o.batch), "--threads", str(o.threads), "--seq-len", str(o.seq_len or 0)]
    torch_alone = peak_memory([sys.executable, "-c", "import torch; torch.mm(torch.ones(64, 64), torch.ones(64, 64))"])
    for S in (1, 4, 8):
        plain = program_arguments(o, S, folder, 2)
        subprocess.run(["rm", "-rf", os.path.join(folder, "run")], check=True)
        ours = peak_memory(plain)
        subprocess.run(["rm", "-rf", os.path.join(folder, "run")], check=True)
        recompute = peak_memory(plain + ["--recompute"])
        theirs = peak_memory(this + ["--peer", str(S), "--folder", folder])
        what = f"{o.model} V={o.vocab} T={config_of(o, S).max_seq_len} B={o.batch} S={S}"
        print(f"{what:36} {ours:10.0f} {recompute:10.0f} {theirs:10.0f} {torch_alone:11.0f}", flush=True)
        if table.csv:
            table.csv.writerow(["memory", what, "MiB", f"{ours:.0f}", f"{theirs:.0f}", "", f"{theirs / ours:.3f}"])
            table.csv.writerow(["memory", what + " --recompute", "MiB", f"{recompute:.0f}", f"{theirs:.0f}", "", f"{theirs / recompute:.3f}"])
    if table.csv:
        table.csv.writerow(["memory", "PyTorch without a model", "MiB", "", f"{torch_alone:.0f}", "", ""])


def bench_scaling(o, table, folder):
    """Milliseconds of a training step as one thing grows; its FLOPs and its time relative to the first."""
    def step_time(**changes):
        changed = argparse.Namespace(**{**vars(o), **{k: v for k, v in changes.items() if k != "S"}})
        speeds = [loopmdm_speed(changed, changes.get("S", 1), folder) for _ in range(o.turns)]
        return changed.batch * config_of(changed, 1).max_seq_len / max(speeds) * 1e3

    T = config_of(o, 1).max_seq_len
    print(f"{'milliseconds of a step':36} {'loopmdm':>10}   FLOPs, relative; time, relative")
    for name, values in (("seq_len", (128, 256, 512, 1024, 2048)), ("S", (1, 2, 4, 8, 16)), ("batch", (1, 4, 16)), ("threads", range(1, o.threads + 1))):
        first = None
        for value in values:
            changes = {name: value, **({"batch": max(1, 4096 // value)} if name == "seq_len" else {})}
            took = step_time(**changes)
            c = config_of(argparse.Namespace(**{**vars(o), **changes}), 1)
            flops = reference.flops_per_token(c, c.max_seq_len, changes.get("S", 1), 0.5, True) * c.max_seq_len * changes.get("batch", o.batch)
            first = first or (took, flops)
            table.line("scaling", f"{o.model} {name}={value}" + (f" batch={changes['batch']}" if name == "seq_len" else ""), "ms", took, [], f"   {flops / first[1]:6.2f} {took / first[0]:6.2f}")


def library(o):
    """build/profile.so with its functions declared."""
    lib = ctypes.CDLL(os.path.abspath("build/profile.so"))
    for name in ("bench_peak", "bench_matmul", "bench_forward", "bench_sample"):
        getattr(lib, name).restype = ctypes.c_double
    lib.bench_peak.argtypes = [ctypes.c_double]
    lib.bench_threads(o.threads)
    return lib


def write_data(path, vocab):
    """A shard of random tokens."""
    tokens = np.random.default_rng(0).integers(0, vocab, 200000)
    header = np.zeros(256, np.int32)
    header[:3] = [reference.SHARD_MAGIC, 1, len(tokens)]
    with open(path, "wb") as f:
        f.write(header.tobytes() + tokens.astype(np.uint16).tobytes())


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", help=f"of {', '.join(PARTS)} (default train)")
    parser.add_argument("--suite", action="store_true", help="train, forward, sample and memory for all of nano, d6, d12 and d6 with T=1024")
    parser.add_argument("--model", default="d6", choices=reference.PRESETS)
    parser.add_argument("--vocab", type=int, default=4096)
    parser.add_argument("--seq-len", type=int, default=0, help="positions (default: the preset's)")
    parser.add_argument("--batch", type=int, help="rows (default 16 on the CPU, 64 on a GPU)")
    parser.add_argument("--loops", default="1,4", help="numbers of loops in training")
    parser.add_argument("--steps", type=int, help="steps in a turn (default 3 on the CPU, 20 on a GPU)")
    parser.add_argument("--turns", type=int, default=3, help="turns of each")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--program", help="default ./loopmdm, or build/loopmdm_cuda_bf16 with --device cuda")
    parser.add_argument("--compile", action="store_true", help="torch.compile as well as eager")
    parser.add_argument("--csv", help="file for all figures")
    parser.add_argument("--peer", type=int, help=argparse.SUPPRESS)  # memory: be the process that is measured
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    o = parser.parse_args()
    cuda = o.device == "cuda"
    o.program = o.program or ("build/loopmdm_cuda_bf16" if cuda else "./loopmdm")
    o.batch, o.steps = o.batch or (64 if cuda else 16), o.steps or (20 if cuda else 3)
    torch.set_num_threads(o.threads)
    if o.peer:
        o.steps = 2
        Peer(o, o.peer, "eager", o.folder).speed()
        return
    if set(o.parts) - set(PARTS):
        parser.error(f"parts are {', '.join(PARTS)}")
    parts = o.parts or ["train"]
    lib = library(o) if set(parts) & {"forward", "sample", "matmul"} else None
    where = f"{torch.cuda.get_device_name()}, bf16" if cuda else f"{o.threads} threads, fp32"
    print(f"{where}, PyTorch {torch.__version__}; best of {o.turns} turns of {o.steps} steps")
    table = Table(o.csv)
    with tempfile.TemporaryDirectory() as folder:
        for part in parts:
            print()
            if part in ("matmul", "scaling"):
                write_data(os.path.join(folder, "data.bin"), o.vocab)
                bench_matmul(o, table, lib) if part == "matmul" else bench_scaling(o, table, folder)
                continue
            for name, V, T, B in SUITE if o.suite else [(o.model, o.vocab, o.seq_len, o.batch)]:
                one = argparse.Namespace(**{**vars(o), "model": name, "vocab": V, "seq_len": T, "batch": B})
                write_data(os.path.join(folder, "data.bin"), V)
                {"train": lambda: bench_train(one, table, folder), "forward": lambda: bench_forward(one, table, lib), "sample": lambda: bench_sample(one, table, lib),
                 "memory": lambda: bench_memory(one, table, folder)}[part]()


if __name__ == "__main__":
    main()
