"""
What loopmdm.cu's kernels need of a GPU, as the compiler says it, and how many of their threads an
SM can hold.

    python3 dev/cuda/resources.py           compiles loopmdm.cu for A100 and H100, and in fp32 for
                                            A100: takes minutes
    python3 dev/cuda/resources.py LOG...    or reads what nvcc -Xptxas -v said, each LOG from one
                                            build; - is standard input

Prints Markdown: a table for each build and architecture. Registers, static shared memory and spills
are the compiler's. Threads and dynamic shared memory follow from the constants of loopmdm.cu and
dev/hopper*.h, which are repeated below. Blocks per SM and occupancy are computed; a layer is as
wide as d12's. Nothing is measured.
"""
import argparse
import os
import re
import subprocess
import sys

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
sys.path.insert(0, ROOT)
from dev.data import outputs  # noqa: E402

SHARED = {"sm_80": 164, "sm_90": 228, "sm_90a": 228, "sm_100": 228}  # KiB of an SM
# Of an SM, in all of them. Registers lie in 4 parts, one for every fourth warp.
REGISTERS, MAX_THREADS, MAX_BLOCKS = 65536, 2048, 32
RESERVED = 1024  # bytes of shared memory that the system takes for each block

# Lines of loopmdm.cu and dev/hopper*.h that the formulas below repeat. When one of them changes,
# the script says so and does not print what is no longer true.
SAYS = """
enum { WARP = 32, THREADS = 256 };
enum { PAD = 16 / sizeof(floatX) };
enum { TILE = 128, DEPTH = 32, STAGES = BF16 ? 3 : 2, TILE_SIZE = TILE * (DEPTH + PAD) };
enum { ATTN_ROWS = 64, ATTN_THREADS = 128, KEYS = 64 };
    if (of_keys) return BF16 || D < 64 ? 64 : 32;
    return D <= 32 ? 64 : 32;
size_t shared = STAGES * 2 * TILE_SIZE * sizeof(floatX);
size_t shared = (ATTN_ROWS + 2 * KEYS) * (D + PAD) * sizeof(floatX);
size_t kv_shared = (2 * ATTN_ROWS + 4 * others_at_a_time(D, true)) * row;
size_t q_shared = (2 * ATTN_ROWS + 4 * others_at_a_time(D, false)) * row;
sequence_loss_kernel<<<m->B, WARP>>>
size_t shared = 2 * C * sizeof(float);
enum { GROUP = 4 * WARP, GROUPS = 2 };
enum { HOPPER_THREADS = (GROUPS + 1) * GROUP };
enum { SLICE = 64 };
enum { ROWS = 2 * 64 };
static constexpr int stages = COLS > 96 ? 5 : 6;
static constexpr int b_size = (COLS + SLICE - 1) / SLICE * SLICE * SLICE;
static constexpr int stage_size = ROWS * SLICE + b_size;
static constexpr int tile = (D + SLICE - 1) / SLICE * SLICE * SLICE;
static constexpr int stages = 4;
size_t shared = (2 * H::stages + GROUPS) * H::tile * sizeof(floatX);
size_t shared = 2 * (H::stages + GROUPS) * H::tile * sizeof(floatX);
"""
WARP, THREADS, TILE, DEPTH, ATTN_ROWS, ATTN_THREADS, KEYS = 32, 256, 128, 32, 64, 128, 64
HOPPER_THREADS, SLICE, WIDTH = 384, 64, 768
SIMPLE = """adamw attention_delta column_sums crossentropy encoder_forward gather_backward
    gather_forward layernorm_forward masked_positions noise rope round sample squares state_change
    sum_parts wpe_backward wte_backward""".split()


def launch(kernel, bf16):
    """Threads and bytes of dynamic shared memory of 'name' or 'name<arguments>'"""
    name, _, arguments = kernel.partition("<")
    size, stages = (2, 3) if bf16 else (4, 2)
    pad = 16 // size
    if name == "matmul":
        return THREADS, stages * 2 * TILE * (DEPTH + pad) * size
    if name == "matmul_hopper":
        columns = int(re.match(r"\d+", arguments)[0])
        stage = 128 * SLICE + -(-columns // SLICE) * SLICE * SLICE
        return HOPPER_THREADS, (5 if columns > 96 else 6) * stage * size
    if name in ("attention_forward_hopper", "attention_backward_hopper"):
        D = int(re.match(r"\d+", arguments)[0])
        tiles = 4 * 2 + 2 if name == "attention_forward_hopper" else 2 * (4 + 2)
        return HOPPER_THREADS, tiles * -(-D // SLICE) * SLICE * SLICE * size
    if name == "layernorm_backward":
        return THREADS, 2 * WIDTH * 4
    if name in ("attention_forward", "attention_backward"):
        D = int(re.match(r"\d+", arguments)[0])
        rows = ATTN_ROWS + 2 * KEYS
        if name == "attention_backward":
            wide = D <= 32 or "true" in arguments and (bf16 or D < 64)
            rows = 2 * ATTN_ROWS + 4 * (16 if D > 64 else 64 if wide else 32)
        return ATTN_THREADS, rows * (D + pad) * size
    if name == "sequence_loss":
        return WARP, 0
    if name in SIMPLE:
        return THREADS, 0
    sys.exit(f"resources.py: {kernel} is a kernel that the script does not know: add its threads "
             "and shared memory to launch()")


def blocks_per_sm(arch, threads, registers, shared):
    """How many blocks an SM can hold, and what sets the limit"""
    warps = threads // WARP
    by_warp = -(-registers * WARP // 256) * 256  # a warp gets registers in portions of 256
    limits = {
        "threads": MAX_THREADS // threads,
        "blocks": MAX_BLOCKS,
        "registers": REGISTERS // 4 // by_warp * 4 // warps,
        "shared memory": SHARED[arch] * 1024 // (-(-shared // 128) * 128 + RESERVED),
    }
    least = min(limits.values())
    return least, ", ".join(what for what, n in limits.items() if n == least)


def read_log(text):
    """{architecture: [(kernel, registers, static shared memory, bytes spilled)]}, and whether it is
    the bf16 build"""
    found = re.findall(r"Compiling entry function '(\S+)' for '(\S+)'.*?(\d+) bytes spill stores, "
                       r"(\d+) bytes spill loads.*?Used (\d+) registers([^\n]*)", text, re.S)
    if not found:
        sys.exit("resources.py: no kernels in this log: it must be what nvcc -Xptxas -v says")
    names = subprocess.run(["c++filt"], input="\n".join(f[0] for f in found), capture_output=True,
                           text=True, check=True).stdout.splitlines()
    kernels = {}
    for name, (_, arch, stores, loads, registers, rest) in zip(names, found):
        name = re.sub(r"^void |\(.*$", "", name).replace("_kernel", "").replace("> >", ">>")
        name = name.replace("__nv_bfloat16", "bf16")
        shared = re.search(r"(\d+) bytes smem", rest)
        row = (name, int(registers), int(shared[1]) if shared else 0, int(stores) + int(loads))
        if arch not in SHARED:
            sys.exit(f"resources.py: {arch} is not one of {', '.join(SHARED)}")
        if any(name == other[0] for other in kernels.setdefault(arch, [])):
            sys.exit(f"resources.py: {name} for {arch} is there twice: give one LOG for each build")
        kernels[arch].append(row)
    return kernels, "bfloat16" in text


def print_tables(text, everything):
    kernels, bf16 = read_log(text)
    for arch in sorted(kernels, key=lambda a: int(a[3:].rstrip("a"))):
        print(f"\n{'bf16' if bf16 else 'fp32'}, {arch}:\n")
        print("| kernel | threads | registers | shared memory, static + dynamic | spills "
              "| blocks per SM | occupancy | limit |\n|---|---:|---:|---:|---:|---:|---:|---|")
        others = []  # small kernels without a problem share a line
        by_name = sorted(kernels[arch], key=lambda k: re.sub(r"\d+", lambda n: n[0].zfill(3), k[0]))
        lines = {}  # kernels that differ in their last arguments only share one too
        for name, registers, static, spilled in by_name:
            threads, dynamic = launch(name, bf16)
            blocks, limit = blocks_per_sm(arch, threads, registers, static + dynamic)
            occupancy = 100 * blocks * threads // MAX_THREADS
            if not everything and not spilled and not dynamic and occupancy >= 75:
                others.append((registers, occupancy))
                continue
            if not everything:
                name = re.match(r"\w+(<\d+(, (true|false)>)?)?", name)[0].rstrip(">")
                name += ">" if "<" in name else ""
            line = name, threads, f"{static} + {dynamic}", spilled, blocks, occupancy
            lines.setdefault(line, []).append((registers, limit))
        for (name, threads, shared, spilled, blocks, occupancy), found in lines.items():
            least, (most, limit) = min(found)[0], max(found)
            registers = most if least == most else f"{least} to {most}"
            print(f"| {name} | {threads} | {registers} | {shared} | {spilled} "
                  f"| {blocks} | {occupancy} % | {limit} |")
        if others:
            print(f"| {len(others)} others | | at most {max(o[0] for o in others)} | | 0 | "
                  f"| at least {min(o[1] for o in others)} % | |")


def compile_log(nvcc, arch, bf16):
    command = [nvcc, "-O3", "-std=c++17", "-x", "cu", "-I.", "-default-stream=per-thread",
               f"-DBF16={bf16}", f"-DHOPPER={int(arch == 'sm_90a')}",
               '-DBACKEND="loopmdm.cu"', "-Xptxas", "-v", "-gencode",
               f"arch=compute_{arch[3:]},code={arch}", "-c", "dev/tools.c", "-o", os.devnull]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"resources.py: {' '.join(command)} failed:\n{done.stderr}")
    return done.stderr


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("logs", nargs="*", metavar="LOG",
                        help="what nvcc -Xptxas -v said; - is standard input")
    parser.add_argument("--arch", choices=SHARED, help="compile for this one, in bf16")
    parser.add_argument("--nvcc", default="nvcc", help="the compiler")
    parser.add_argument("--all", action="store_true", help="the small kernels too, each in a line")
    args = parser.parse_args()

    source = ""
    for name in "loopmdm.cu", "dev/hopper.h", "dev/hopper_attention.h":
        with open(os.path.join(ROOT, name)) as f:
            source += f.read()
    for line in SAYS.strip().splitlines():
        if line.strip() not in source:
            sys.exit(f"resources.py: the code no longer says '{line.strip()}': change what follows "
                     "from it here")
    builds = [(args.arch, 1)] if args.arch else [("sm_80", 1), ("sm_90a", 1), ("sm_80", 0)]
    for arch, bf16 in builds if not args.logs else []:
        print_tables(compile_log(args.nvcc, arch, bf16), args.all)
    for log in args.logs:
        with open(0 if log == "-" else log, errors="replace") as f:
            print_tables(f.read(), args.all)


outputs.run("resources.py", main)
