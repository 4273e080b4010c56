"""
loopmdm beside PyTorch: the same model, batches and threads, in turns, best of several. On a machine
that others use too, only the ratio within one run means something.

    make bench                                      everything on the CPU, an hour and more. Writes
                                                    dev/results/bench_cpu.csv
    make bench QUICK=1                              the main table: training of nano, d6 and d12
    .venv/bin/python dev/bench/bench.py             on the CPU: training of d6, V=4096, T=256, B=16,
                                                    S = 1 and 4
    .venv/bin/python dev/bench/bench.py matmul forward sample       parts of it
    python3 dev/bench/bench.py --device cuda        on a GPU: build/loopmdm_cuda_bf16, and PyTorch
                                                    under autocast
    python3 dev/bench/bench.py --device cuda --model d12 --vocab 50257 --batch 8
    python3 dev/bench/bench.py --device cuda --model nano --cuda-graphs

PyTorch is as a good user has it: in fp32, and in bf16 under autocast where the CPU has instructions
for it; eager, and compiled (the layer and the head, which takes seconds). On a GPU the compiled
layer can be a CUDA graph, which matters where a model is small. There are two ratios of the best of
loopmdm to the best of PyTorch: in fp32, and of all.

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

Prints tables, and writes lines into --csv: part, what, unit, by whom, value.
"""
import argparse
import csv
import ctypes
import functools
import os
import shutil
import subprocess
import sys
import tempfile
import time

import numpy as np
import torch

sys.path.insert(0, os.path.join(os.path.dirname(__file__), "..", ".."))
import train_gpt2style as reference  # noqa: E402
from dev.data import outputs  # noqa: E402

PARTS = ("train", "forward", "sample", "matmul", "memory", "scaling")
IN_PROCESS = {"forward", "sample", "matmul"}  # they call functions of build/profile.so
# model, V, T, B: what make bench measures
SUITE = [("nano", 1024, 128, 32), ("d6", 4096, 256, 16), ("d12", 50257, 256, 2)]


def config_of(o, S):
    """The configuration that o describes, with S loops."""
    T, L, NH, C, a, b, _ = reference.PRESETS[o.model]
    return reference.make_config(o.seq_len or T, o.vocab, L, NH, C, a, b, S)


def shape_of(o, S):
    """The shape as a title."""
    return f"{o.model} V={o.vocab} T={config_of(o, S).max_seq_len} B={o.batch} S={S}"


def precisions(o):
    """Those that are compared. On a CPU bf16 is one only where there are instructions for it."""
    if o.device == "cuda":
        return ["bf16"]
    with_bf16 = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return ["fp32", "bf16"] if with_bf16 else ["fp32"]


def program_arguments(o, S, folder, steps, precision):
    """The command line of a training of so many steps with S loops in each."""
    return [o.program, "train", "--data", os.path.join(folder, "data.bin"), "--vocab", str(o.vocab),
            "--model", o.model, "--seq-len", str(config_of(o, S).max_seq_len),
            "--batch", str(o.batch), "--max-loops", str(S), "--loop-dist", "fixed",
            "--accum", "1", "--ema", "0", "--steps", str(steps),
            *([] if o.device == "cuda" else ["--threads", str(o.threads)]),
            "--precision", precision, "--out", os.path.join(folder, "run")]


def remove_run(folder):
    """Removes what the last training wrote."""
    subprocess.run(["rm", "-rf", os.path.join(folder, "run")], check=True)


def loopmdm_seconds(o, S, folder, precision):
    """Seconds of the fastest of o.steps steps. The first, which touches the memory, is left out."""
    remove_run(folder)
    command = program_arguments(o, S, folder, o.steps + 1, precision)
    if subprocess.run(command, stdout=subprocess.DEVNULL).returncode:
        sys.exit(f"bench.py: {' '.join(command)} failed")
    with open(os.path.join(folder, "run", "log.csv")) as log:
        best = max(float(row["tokens_per_s"]) for row in list(csv.DictReader(log))[1:])
    return o.batch * config_of(o, S).max_seq_len / best


def peer_model(c, device, compiled, graphs=False):
    """The PyTorch model. graphs: the compiled layer is a CUDA graph."""
    model = reference.LoopMDM(c, reference.init_parameters(c, 1)).to(device)
    if compiled:
        model.block = torch.compile(model.block, dynamic=False,
                                    mode="reduce-overhead" if graphs else None)
        model.head = torch.compile(model.head, dynamic=True)  # masked positions vary in number
    return model


def autocast(device, precision):
    """Within it PyTorch has this precision."""
    return torch.autocast(device, torch.bfloat16, enabled=precision == "bf16")


class Peer:
    """PyTorch's training on o.device."""

    def __init__(self, o, S, folder, precision, compiled):
        self.o, self.S, self.precision, self.config = o, S, precision, config_of(o, S)
        c = self.config
        self.model = peer_model(c, o.device, compiled, o.cuda_graphs)
        self.optimizer = reference.make_optimizer(self.model, 1e-3, 0.1)
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
            self.seconds()
        return self

    def seconds(self):
        """Seconds of the fastest of o.steps steps."""
        best, cuda = float("inf"), self.o.device == "cuda"
        for batch in self.batches:
            began = time.perf_counter()
            with autocast(self.o.device, self.precision):
                loss = self.model.loss(*batch, self.S)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            loss.item()
            if cuda:
                torch.cuda.synchronize()
            best = min(best, time.perf_counter() - began)
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
    """Prints lines as they come, and writes them into a CSV file."""

    def __init__(self, path):
        self.file = open(path, "w", newline="") if path else None
        self.columns = None
        self.row("part", "what", "unit", "by", "value")

    def row(self, *values):
        """A line of the CSV file."""
        if self.file:
            csv.writer(self.file, lineterminator="\n").writerow(values)
            self.file.flush()

    def line(self, part, what, unit, values, note=""):
        """
        values: {by: number}, higher is better. by is "loopmdm fp32", or PyTorch's. The ratios are
        of the best in fp32 and of the best of all.
        """
        if self.columns != (part, *values):
            self.columns = part, *values
            columns = "".join(f" {by:>12}" for by in values)
            print(f"\n{part + ', ' + unit:36}{columns}  ratios")
        numbers = "".join(f" {value:12.0f}" for value in values.values())
        print(f"{what:36}{numbers}{ratios(values)}{note}", flush=True)
        for by, value in values.items():
            self.row(part, what, unit, by, f"{value:.4g}")


def ratios(values):
    """The best of loopmdm over the best of PyTorch, as text: in fp32, and with all precisions."""
    found = []
    for precision in ("fp32", ""):
        ours, theirs = ([value for by, value in values.items()
                         if by.startswith("loopmdm") == own and precision in by]
                        for own in (True, False))
        if ours and theirs:
            found.append(f"{max(ours) / max(theirs):7.2f}")
    return "".join(dict.fromkeys(found))


def in_turns(turns, seconds, sides):
    """
    {by: the smallest result} of functions {by: function}. They are called in turns: so many at
    least, and for so many seconds.
    """
    best, began, turn = dict.fromkeys(sides, float("inf")), time.perf_counter(), 0
    while turn < turns or time.perf_counter() - began < seconds:
        best = {by: min(best[by], side()) for by, side in sides.items()}
        turn += 1
    return best


def seconds_of(call):
    """call as a function that returns how long it takes."""
    def timed():
        began = time.perf_counter()
        call()
        return time.perf_counter() - began
    return timed


def speeds(work, took):
    """{by: seconds} -> {by: work per second}"""
    return {by: work / seconds for by, seconds in took.items()}


def kinds(o):
    """PyTorch's: {by: (precision, compiled)}."""
    return {f"{'compile' if compiled else 'eager'} {precision}": (precision, compiled)
            for precision in precisions(o) for compiled in (False, True)}


def bench_train(o, table, folder):
    """Training steps, in tokens/s."""
    for S in o.loops:
        sides = {f"loopmdm {p}": functools.partial(loopmdm_seconds, o, S, folder, p)
                 for p in precisions(o)}
        for by, kind in kinds(o).items():
            sides[by] = Peer(o, S, folder, *kind).warm_up().seconds
        c = config_of(o, S)
        values = speeds(o.batch * c.max_seq_len, in_turns(o.turns, 0, sides))
        flops = reference.flops_per_token(c, c.max_seq_len, S, 0.5) * 1e-9
        ours = max(value for by, value in values.items() if by.startswith("loopmdm"))
        table.line("train", shape_of(o, S), "tokens/s", values, f"  {ours * flops:.0f} GFLOP/s")


def of_library(lib, precision, call):
    """A function of build/profile.so as one that runs in this precision."""
    def timed():
        lib.bench_precision(precision == "bf16")
        return call()
    return timed


def both(o, B, lib, ours, theirs):
    """
    The sides of a comparison without gradients, {by: function that returns seconds}. ours() calls
    the library, which has the same shape; theirs(model) runs PyTorch.
    """
    c = config_of(o, 1)
    lib.bench_open(c.max_seq_len, c.vocab_size, c.layers, c.heads, c.channels, c.loop_start,
                   c.loop_end, B)
    sides = {f"loopmdm {p}": of_library(lib, p, ours) for p in precisions(o)}
    for by, (precision, compiled) in kinds(o).items():
        model = peer_model(c, "cpu", compiled)

        @torch.no_grad()
        def run(model=model, precision=precision):
            with autocast("cpu", precision):
                theirs(model)
        run()  # compiles
        sides[by] = seconds_of(run)
    return sides


def bench_forward(o, table, lib):
    """Forward without gradients, in tokens/s."""
    T = config_of(o, 1).max_seq_len
    for B in (1, 16):
        x = torch.randint(0, o.vocab, (B, T), generator=torch.Generator().manual_seed(1))
        for S in (1, 4):
            sides = both(o, B, lib, lambda: lib.bench_forward(S),
                         lambda model: model.logits(model(x, S).view(B * T, -1)))
            table.line("forward", f"{o.model} V={o.vocab} T={T} B={B} S={S}", "tokens/s",
                       speeds(B * T, in_turns(o.turns, 3, sides)))


def bench_sample(o, table, lib):
    """Sampling from nothing in 16 steps, in tokens/s."""
    T, steps = config_of(o, 1).max_seq_len, 16
    for B in (1, 16) if o.model != "d12" else (1,):  # 16 texts of d12 take an hour
        sides = both(o, B, lib, lambda: lib.bench_sample(4, steps),
                     lambda model: sample(model, B, T, 4, steps))
        table.line("sample", f"{o.model} V={o.vocab} T={T} B={B} S=4", "tokens/s",
                   speeds(B * T, in_turns(o.turns, 3, sides)))


def bench_matmul(o, table, lib):
    """Each matrix product of a training step, in GFLOP/s. PyTorch's bf16 has bf16 tensors."""
    peak = max(lib.bench_peak(0.2) for _ in range(5)) * 1e-9
    table.line("matmul", "FMA peak of fp32", "GFLOP/s", {"loopmdm fp32": peak})
    shapes = {}  # in order, each once
    for name, V, T, B in SUITE:
        C = reference.PRESETS[name][3]
        layers = (B * T, C, 3 * C), (B * T, C, C), (B * T, C, 4 * C), (B * T, 4 * C, C)
        shapes.update(dict.fromkeys((*layers, (B * T // 2, C, V))))
    for M, K, N in shapes:
        inp, weight, out = (torch.randn(shape, generator=torch.Generator().manual_seed(1))
                            for shape in ((M, K), (N, K), (M, N)))
        pointers = [ctypes.c_void_p(t.data_ptr()) for t in (out, inp, weight)]

        def products(i, w, o):
            """PyTorch's three products of a linear layer."""
            return [lambda: torch.mm(i, w.t(), out=o), lambda: torch.mm(o, w, out=i),
                    lambda: torch.mm(o.t(), i, out=w)]
        theirs = {"fp32": products(inp, weight, out),
                  "bf16": products(inp.bfloat16(), weight.bfloat16(), out.bfloat16())}
        for kind, what in enumerate(("forward", "input's gradient", "weight's gradient")):
            call = functools.partial(lib.bench_matmul, kind, *pointers, M, K, N)
            sides = {f"loopmdm {p}": of_library(lib, p, call) for p in precisions(o)}
            sides.update({f"mm {p}": seconds_of(theirs[p][kind]) for p in precisions(o)})
            values = speeds(2e-9 * M * N * K, in_turns(o.turns, 0.7, sides))
            table.line("matmul", f"({M},{K})x({K},{N}) {what}", "GFLOP/s", values,
                       f"  {100 * values['loopmdm fp32'] / peak:.0f} % of the peak")


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
    """Largest resident memory of training processes in fp32, in MiB. The ratio is loopmdm's over
    that of eager PyTorch with its own part, so lower is better."""
    this = [sys.executable, os.path.abspath(__file__), "--model", o.model, "--vocab", str(o.vocab),
            "--batch", str(o.batch), "--threads", str(o.threads),
            "--seq-len", str(config_of(o, 1).max_seq_len)]
    no_model = "import torch; torch.mm(torch.ones(64, 64), torch.ones(64, 64))"
    alone = peak_memory([sys.executable, "-c", no_model])
    for S in (1, 4, 8):
        command = program_arguments(o, S, folder, 2, "fp32")
        remove_run(folder)
        ours = peak_memory(command)
        remove_run(folder)
        recompute = peak_memory(command + ["--recompute"])
        theirs = peak_memory(this + ["--peer", str(S), "--folder", folder])
        for what, value in (("", ours), (" --recompute", recompute)):
            table.line("memory", shape_of(o, S) + what, "MiB",
                       {"loopmdm fp32": value, "eager fp32": theirs}, f"  {alone:.0f} torch alone")


def bench_scaling(o, table, folder):
    """Milliseconds of a training step as one thing grows. Its FLOPs and its time are relative to
    the first."""
    grown = {"seq_len": (128, 256, 512, 1024, 2048), "S": (1, 2, 4, 8, 16), "batch": (1, 4, 16),
             "threads": range(1, o.threads + 1)}
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
            took = min(loopmdm_seconds(changed, S, folder, "fp32") for _ in range(o.turns)) * 1e3
            flops = reference.flops_per_token(c, c.max_seq_len, S, 0.5) * changed.batch
            flops *= c.max_seq_len
            first = first or (took, flops)
            table.line("scaling", what, "ms", {"loopmdm fp32": took},
                       f"   {flops / first[1]:6.2f} FLOPs {took / first[0]:6.2f} time")


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
    add, number = parser.add_argument, reference.number
    add("parts", nargs="*", help=f"of {', '.join(PARTS)} (default train)")
    add("--suite", action="store_true",
        help="train, forward, sample and memory for nano, d6 and d12")
    add("--model", default="d6", choices=reference.PRESETS)
    add("--vocab", type=number(1, 65535), default=4096)
    add("--seq-len", type=number(1, 65536), help="positions (default: the preset's)")
    add("--batch", type=number(1, 65536), help="sequences (default 16 on the CPU, 64 on a GPU)")
    add("--loops", type=reference.loop_numbers, default="1,4", help="numbers of loops in training")
    add("--steps", type=number(1), help="steps in a turn (default 3 on the CPU, 20 on a GPU)")
    add("--turns", type=number(1), default=3, help="turns of each")
    add("--threads", type=number(1, 1024), default=os.cpu_count())
    add("--device", default="cpu", choices=("cpu", "cuda"))
    add("--program", help="default ./loopmdm, or build/loopmdm_cuda_bf16 with --device cuda")
    add("--cuda-graphs", action="store_true",
        help="train on a GPU: PyTorch's compiled layer is a CUDA graph (mode reduce-overhead)")
    add("--csv", help="file for all figures")
    add("--peer", type=int, help=argparse.SUPPRESS)  # memory: be the process that is measured
    add("--folder", help=argparse.SUPPRESS)
    o = parser.parse_args()
    if set(o.parts) - set(PARTS):
        parser.error(f"parts are {', '.join(PARTS)}")
    cuda = o.device == "cuda"
    if cuda and not torch.cuda.is_available():
        parser.error("--device cuda: PyTorch finds no GPU")
    if o.program is not None and not shutil.which(o.program):
        parser.error(f"--program: there is no program {o.program}")
    config_of(o, max(o.loops))  # raises ValueError
    o.batch, o.steps = o.batch or (64 if cuda else 16), o.steps or (20 if cuda else 3)
    return o


def main():
    o = options()
    torch.set_num_threads(o.threads)
    if o.peer:
        o.steps = 2
        Peer(o, o.peer, o.folder, "fp32", False).seconds()
        return
    parts = o.parts or ["train"]
    build(o, set(parts))
    lib = library(o) if IN_PROCESS & set(parts) else None
    table = Table(o.csv)
    where = torch.cuda.get_device_name() if o.device == "cuda" else f"{o.threads} threads"
    print(f"{where}, PyTorch {torch.__version__}; best of {o.turns} turns of {o.steps} steps")
    shapes = SUITE if o.suite else [(o.model, o.vocab, o.seq_len, o.batch)]
    run = {"train": bench_train, "memory": bench_memory, "scaling": bench_scaling,
           "forward": bench_forward, "sample": bench_sample, "matmul": bench_matmul}
    with tempfile.TemporaryDirectory() as folder:
        for part in parts:
            for model, V, T, B in shapes if part not in ("matmul", "scaling") else shapes[:1]:
                one = argparse.Namespace(**vars(o))
                if part != "scaling":
                    one.model, one.vocab, one.seq_len, one.batch = model, V, T, B
                write_data(os.path.join(folder, "data.bin"), one.vocab)
                run[part](one, table, lib if part in IN_PROCESS else folder)


if __name__ == "__main__":
    outputs.run("bench.py", main)
