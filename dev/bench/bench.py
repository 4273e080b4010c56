"""
loopmdm beside PyTorch: the same model, batches and threads, in turns, best of several. On a machine
that others use too, only the ratio within one run means something.

    make bench                                      everything on the CPU, an hour and more. Writes
                                                    dev/results/bench_cpu.csv
    .venv/bin/python dev/bench/bench.py             on the CPU: training of d6, V=4096, T=256, B=16,
                                                    S = 1 and 4
    .venv/bin/python dev/bench/bench.py matmul forward sample       parts of it
    python3 dev/bench/bench.py --device cuda --compile
                                                    on a GPU: build/loopmdm_cuda_bf16, and PyTorch
                                                    under autocast
    python3 dev/bench/bench.py --device cuda --model d12 --vocab 50257 --batch 8 --compile

train    a step: forward, backward, clipping and AdamW, with the LM head at masked positions, on
         random tokens. loopmdm is the program itself, which makes its batches. PyTorch's batches
         are made before.
forward  without gradients, the LM head at all positions.
sample   from nothing to text with the confidence sampler at temperature 1. PyTorch's sampler is
         made of whole-tensor operations.
matmul   each matrix product of the models by itself, beside torch.mm and the machine's FMA peak,
         which is measured here too.
memory   largest resident memory of a training process. What PyTorch needs without a model is given
         beside it.
scaling  how a training step's time grows with T, S, B and threads; only loopmdm.

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
IN_PROCESS = {"forward", "sample", "matmul"}  # they call functions of build/profile.so
# model, V, T, B: what make bench measures
SUITE = [("nano", 1024, 128, 32), ("d6", 4096, 256, 16), ("d12", 50257, 256, 2),
         ("d6", 4096, 1024, 4)]


def config_of(o, S):
    """The configuration that o describes, with S loops."""
    T, L, NH, C, a, b, _ = reference.PRESETS[o.model]
    return reference.make_config(o.seq_len or T, o.vocab, L, NH, C, a, b, S)


def shape_of(o, S):
    """The shape as a title."""
    return f"{o.model} V={o.vocab} T={config_of(o, S).max_seq_len} B={o.batch} S={S}"


def program_arguments(o, S, folder, steps):
    """The command line of a training of so many steps with S loops in each."""
    return [o.program, "train", "--data", os.path.join(folder, "data.bin"), "--vocab", str(o.vocab),
            "--model", o.model, "--seq-len", str(config_of(o, S).max_seq_len),
            "--batch", str(o.batch), "--max-loops", str(S), "--loop-dist", "fixed",
            "--accum", "1", "--ema", "0", "--steps", str(steps), "--threads", str(o.threads),
            "--out", os.path.join(folder, "run")]


def remove_run(folder):
    """Removes what the last training wrote."""
    subprocess.run(["rm", "-rf", os.path.join(folder, "run")], check=True)


def loopmdm_speed(o, S, folder):
    """Best tokens/s of o.steps steps. The first step touches the memory and does not count."""
    remove_run(folder)
    command = program_arguments(o, S, folder, o.steps + 1)
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    with open(os.path.join(folder, "run", "log.csv")) as log:
        return max(float(row["tokens_per_s"]) for row in list(csv.DictReader(log))[1:])


class Peer:
    """The PyTorch model on o.device. kind is eager or compile."""

    def __init__(self, o, S, kind, folder):
        self.o, self.S, self.config = o, S, config_of(o, S)
        c = self.config
        self.model = reference.LoopMDM(c, reference.init_parameters(c, 1)).to(o.device)
        self.optimizer = reference.make_optimizer(self.model, 1e-3, 0.1)
        self.loss = torch.compile(self.model.loss) if kind == "compile" else self.model.loss
        data = reference.data_open(os.path.join(folder, "data.bin"))
        self.batches = []
        for step in range(o.steps):
            targets = reference.data_batch(data, 1, step, 0, o.batch, c.max_seq_len)
            x, _, weights = reference.add_noise(c, targets, 1, step, 0, o.batch)
            arrays = x, targets, weights
            self.batches.append([torch.from_numpy(array).to(o.device) for array in arrays])

    def warm_up(self):
        """Compiles, and reserves memory."""
        for _ in range(2):
            self.speed()
        return self

    def speed(self):
        """Best tokens/s over o.steps steps."""
        best, cuda = 0.0, self.o.device == "cuda"
        for batch in self.batches:
            began = time.perf_counter()
            with torch.autocast(self.o.device, torch.bfloat16, enabled=cuda):
                loss = self.loss(*batch, self.S)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            loss.item()
            if cuda:
                torch.cuda.synchronize()
            tokens = self.o.batch * self.config.max_seq_len
            best = max(best, tokens / (time.perf_counter() - began))
        return best


@torch.no_grad()
def sample(model, B, T, S, steps):
    """The confidence sampler at temperature 1 as operations on whole tensors, as in LLaDA's
    generate()."""
    V = model.config.vocab_size
    x, sequences = torch.full((B, T), V), torch.arange(B)[:, None]
    for step in range(steps):
        masked = x == V
        h = model(x, S)[masked]
        p = torch.softmax(model.logits(h).double(), -1)
        token = torch.multinomial(p, 1)
        best, drawn = torch.full((B, T), -1.0, dtype=torch.float64), x.clone()
        best[masked], drawn[masked] = p.gather(1, token)[:, 0], token[:, 0]
        kept = best.topk(T * (step + 1) // steps - T * step // steps, 1).indices
        x[sequences, kept] = drawn[sequences, kept]


class Table:
    """Prints lines as they come, and keeps them for the CSV file: part, what was measured, unit,
    loopmdm, PyTorch eager, compile, ratio to the better."""

    def __init__(self, path):
        self.file = open(path, "w", newline="") if path else None
        self.csv = csv.writer(self.file, lineterminator="\n") if path else None
        self.row("part", "what", "unit", "loopmdm", "pytorch_eager", "pytorch_compile", "ratio")

    def row(self, *values):
        """A line of the CSV file."""
        if self.csv:
            self.csv.writerow(values)
            self.file.flush()

    def line(self, part, what, unit, ours, theirs, note=""):
        """theirs: [eager] or [eager, compile], higher is better; [] where there is none."""
        ratio = ours / max(theirs) if theirs else None
        print(f"{what:36} {ours:10.0f}" + "".join(f" {t:10.0f}" for t in theirs)
              + (f" {ratio:7.2f}" if theirs else "") + note, flush=True)
        numbers = [f"{t:.4g}" for t in theirs] + [""] * (2 - len(theirs))
        self.row(part, what, unit, f"{ours:.4g}", *numbers, f"{ratio:.3f}" if theirs else "")


def bench_train(o, table, folder):
    """Training steps, in tokens/s."""
    kinds = ["eager", "compile"] if o.compile else ["eager"]
    print(f"{'':36} {'loopmdm':>10}" + "".join(f" {kind:>10}" for kind in kinds)
          + f" {'ratio':>7}  GFLOP/s   (tokens/s of training)")
    for S in (int(s) for s in o.loops.split(",")):
        peers = [Peer(o, S, kind, folder).warm_up() for kind in kinds]
        ours, theirs = 0.0, [0.0] * len(peers)
        for _ in range(o.turns):
            ours = max(ours, loopmdm_speed(o, S, folder))
            theirs = [max(best, peer.speed()) for best, peer in zip(theirs, peers)]
        c = peers[0].config
        flops = reference.flops_per_token(c, c.max_seq_len, S, 0.5) * 1e-9
        table.line("train", shape_of(o, S), "tokens/s", ours, theirs, f" {ours * flops:8.0f}")
        del peers


def in_turns(turns, seconds, *sides):
    """The smallest result of each of the functions `sides`. They are called in turns: so many at
    least, and for so many seconds."""
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
    """The same shape on both sides. Returns PyTorch's model."""
    c = config_of(o, 1)
    lib.bench_open(c.max_seq_len, c.vocab_size, c.layers, c.heads, c.channels, c.loop_start,
                   c.loop_end, B)
    return reference.LoopMDM(c, reference.init_parameters(c, 1))


def bench_forward(o, table, lib):
    """Forward without gradients, in tokens/s."""
    print(f"{'':36} {'loopmdm':>10} {'eager':>10} {'ratio':>7}   (tokens/s of inference)")
    for B in (1, 16):
        model = open_both(o, B, lib)
        T = model.config.max_seq_len
        x = torch.randint(0, o.vocab, (B, T), generator=torch.Generator().manual_seed(1))
        for S in (1, 4):
            @torch.no_grad()
            def forward():
                model.logits(model(x, S).view(B * T, -1))
            sides = lambda: lib.bench_forward(S), seconds_of(forward)
            ours, theirs = in_turns(o.turns, 3, *sides)
            what = f"{o.model} V={o.vocab} T={T} B={B} S={S}"
            table.line("forward", what, "tokens/s", B * T / ours, [B * T / theirs])


def bench_sample(o, table, lib):
    """Sampling from nothing, in tokens/s."""
    steps = 16
    print(f"{'':36} {'loopmdm':>10} {'eager':>10} {'ratio':>7}   "
          f"(tokens/s of sampling in {steps} steps)")
    for B in (1, 16):
        model = open_both(o, B, lib)
        T = model.config.max_seq_len
        peer = seconds_of(lambda: sample(model, B, T, 4, steps))
        ours, theirs = in_turns(o.turns, 3, lambda: lib.bench_sample(4, steps), peer)
        what = f"{o.model} V={o.vocab} T={T} B={B} S=4"
        table.line("sample", what, "tokens/s", B * T / ours, [B * T / theirs])


def bench_matmul(o, table, lib):
    """Each matrix product of a training step, in GFLOP/s."""
    peak = max(lib.bench_peak(0.2) for _ in range(5)) * 1e-9
    table.line("matmul", "FMA peak", "GFLOP/s", peak, [])
    print(f"{'(M,C) x (C,OC)':36} {'loopmdm':>10} {'torch.mm':>10} {'ratio':>7}  of peak   "
          "(GFLOP/s)")
    shapes = {}  # in order, each once
    for name, V, T, B in SUITE:
        C = reference.PRESETS[name][3]
        layers = (B * T, C, 3 * C), (B * T, C, C), (B * T, C, 4 * C), (B * T, 4 * C, C)
        shapes.update(dict.fromkeys((*layers, (B * T // 2, C, V))))
    for M, K, N in shapes:
        inp, weight, out = (torch.randn(shape, generator=torch.Generator().manual_seed(1))
                            for shape in ((M, K), (N, K), (M, N)))
        pointers = [ctypes.c_void_p(t.data_ptr()) for t in (out, inp, weight)]
        calls = {"forward": lambda: torch.mm(inp, weight.t(), out=out),
                 "input's gradient": lambda: torch.mm(out, weight, out=inp),
                 "weight's gradient": lambda: torch.mm(out.t(), inp, out=weight)}
        for kind, (what, call) in enumerate(calls.items()):
            ours, theirs = in_turns(
                o.turns, 0.7, lambda: lib.bench_matmul(kind, *pointers, M, K, N), seconds_of(call))
            flops = 2e-9 * M * N * K
            table.line("matmul", f"({M},{K})x({K},{N}) {what}", "GFLOP/s", flops / ours,
                       [flops / theirs], f" {100 * flops / ours / peak:7.0f} %")


def peak_memory(arguments):
    """Largest resident memory of a process, in MiB, as Linux keeps it. getrusage() would count this
    process too, because the other one is forked from it."""
    process, peak = subprocess.Popen(arguments, stdout=subprocess.DEVNULL), 0
    while process.poll() is None:
        with open(f"/proc/{process.pid}/status") as status:
            lines = [line for line in status if line.startswith("VmHWM")]
        peak = max([peak] + [int(line.split()[1]) for line in lines])
        time.sleep(0.01)
    if process.returncode:
        sys.exit(f"{arguments[0]} ended with status {process.returncode}")
    return peak / 1024


def bench_memory(o, table, folder):
    """Largest resident memory of training processes, in MiB. The ratio is PyTorch's, with its own
    part, over loopmdm's."""
    print(f"{'':36} {'loopmdm':>10} {'recompute':>10} {'PyTorch':>10} {'of it torch':>11}   (MiB)")
    this = [sys.executable, os.path.abspath(__file__), "--model", o.model, "--vocab", str(o.vocab),
            "--batch", str(o.batch), "--threads", str(o.threads), "--seq-len", str(o.seq_len or 0)]
    no_model = "import torch; torch.mm(torch.ones(64, 64), torch.ones(64, 64))"
    torch_alone = peak_memory([sys.executable, "-c", no_model])
    for S in (1, 4, 8):
        command = program_arguments(o, S, folder, 2)
        remove_run(folder)
        ours = peak_memory(command)
        remove_run(folder)
        recompute = peak_memory(command + ["--recompute"])
        theirs = peak_memory(this + ["--peer", str(S), "--folder", folder])
        what = shape_of(o, S)
        print(f"{what:36} {ours:10.0f} {recompute:10.0f} {theirs:10.0f} {torch_alone:11.0f}",
              flush=True)
        for name, mine in (what, ours), (what + " --recompute", recompute):
            table.row("memory", name, "MiB", f"{mine:.0f}", f"{theirs:.0f}", "",
                      f"{theirs / mine:.3f}")
    table.row("memory", "PyTorch without a model", "MiB", "", f"{torch_alone:.0f}", "", "")


def bench_scaling(o, table, folder):
    """Milliseconds of a training step as one thing grows. Its FLOPs and its time are relative to
    the first."""
    grown = {"seq_len": (128, 256, 512, 1024, 2048), "S": (1, 2, 4, 8, 16), "batch": (1, 4, 16),
             "threads": range(1, o.threads + 1)}
    print(f"{'milliseconds of a step':36} {'loopmdm':>10}   FLOPs, relative; time, relative")
    for name, values in grown.items():
        first = None
        for value in values:
            changed, S, what = argparse.Namespace(**vars(o)), 1, f"{o.model} {name}={value}"
            if name == "S":
                S = value
            else:
                setattr(changed, name, value)
            if name == "seq_len":  # as many tokens in each step
                changed.batch = max(1, 4096 // value)
                what += f" batch={changed.batch}"
            c = config_of(changed, S)
            tokens = changed.batch * c.max_seq_len
            speed = max(loopmdm_speed(changed, S, folder) for _ in range(o.turns))
            took = tokens / speed * 1e3
            flops = reference.flops_per_token(c, c.max_seq_len, S, 0.5) * tokens
            first = first or (took, flops)
            table.line("scaling", what, "ms", took, [],
                       f"   {flops / first[1]:6.2f} {took / first[0]:6.2f}")


def build(o, parts):
    """Builds what these parts run. A program that the user names is taken as it is."""
    needed = ["build/profile.so"] if parts & IN_PROCESS else []
    if not o.program:
        o.program = "build/loopmdm_cuda_bf16" if o.device == "cuda" else "./loopmdm"
        built = o.device == "cuda" and os.path.exists(o.program)  # with options for this GPU
        if parts - IN_PROCESS and not built:
            needed.append(os.path.normpath(o.program))
    if needed and subprocess.run(["make", "-s", *needed]).returncode:
        sys.exit(f"bench.py: make {' '.join(needed)} failed")


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


def options():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("parts", nargs="*", help=f"of {', '.join(PARTS)} (default train)")
    add("--suite", action="store_true",
        help="train, forward, sample and memory for all of nano, d6, d12 and d6 with T=1024")
    add("--model", default="d6", choices=reference.PRESETS)
    add("--vocab", type=int, default=4096)
    add("--seq-len", type=int, default=0, help="positions (default: the preset's)")
    add("--batch", type=int, help="sequences (default 16 on the CPU, 64 on a GPU)")
    add("--loops", default="1,4", help="numbers of loops in training")
    add("--steps", type=int, help="steps in a turn (default 3 on the CPU, 20 on a GPU)")
    add("--turns", type=int, default=3, help="turns of each")
    add("--threads", type=int, default=os.cpu_count())
    add("--device", default="cpu", choices=("cpu", "cuda"))
    add("--program", help="default ./loopmdm, or build/loopmdm_cuda_bf16 with --device cuda")
    add("--compile", action="store_true", help="torch.compile as well as eager")
    add("--csv", help="file for all figures")
    add("--peer", type=int, help=argparse.SUPPRESS)  # memory: be the process that is measured
    add("--folder", help=argparse.SUPPRESS)
    o = parser.parse_args()
    if set(o.parts) - set(PARTS):
        parser.error(f"parts are {', '.join(PARTS)}")
    cuda = o.device == "cuda"
    o.batch, o.steps = o.batch or (64 if cuda else 16), o.steps or (20 if cuda else 3)
    return o


def main():
    o = options()
    torch.set_num_threads(o.threads)
    if o.peer:
        o.steps = 2
        Peer(o, o.peer, "eager", o.folder).speed()
        return
    parts = o.parts or ["train"]
    build(o, set(parts))
    lib = library(o) if IN_PROCESS & set(parts) else None
    where = f"{o.threads} threads, fp32"
    if o.device == "cuda":
        where = f"{torch.cuda.get_device_name()}, bf16"
    print(f"{where}, PyTorch {torch.__version__}; best of {o.turns} turns of {o.steps} steps")
    table = Table(o.csv)
    shapes = SUITE if o.suite else [(o.model, o.vocab, o.seq_len, o.batch)]
    run = {"train": bench_train, "memory": bench_memory, "scaling": bench_scaling,
           "forward": bench_forward, "sample": bench_sample, "matmul": bench_matmul}
    with tempfile.TemporaryDirectory() as folder:
        for part in parts:
            print()
            for model, V, T, B in shapes if part not in ("matmul", "scaling") else shapes[:1]:
                one = argparse.Namespace(**vars(o))
                if part != "scaling":
                    one.model, one.vocab, one.seq_len, one.batch = model, V, T, B
                write_data(os.path.join(folder, "data.bin"), one.vocab)
                run[part](one, table, lib if part in IN_PROCESS else folder)


if __name__ == "__main__":
    main()
