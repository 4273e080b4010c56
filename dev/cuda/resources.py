"""
What loopmdm.cu's kernels need of a GPU, as the compiler says it, and how many of their threads an
SM can hold.

    python3 dev/cuda/resources.py           compiles loopmdm.cu for every architecture and both
                                            precisions: takes minutes
    python3 dev/cuda/resources.py LOG...    or reads what nvcc -Xptxas -v said, each LOG from one
                                            build; - is standard input

Prints Markdown: a table for each build and architecture. Registers, static shared memory and spills
are the compiler's. Threads and dynamic shared memory follow from the constants of loopmdm.cu, which
are repeated below. Blocks per SM and occupancy are computed. Nothing is measured.
"""
import argparse
import os
import re
import subprocess
import sys

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
SHARED = {"sm_80": 164, "sm_90": 228, "sm_100": 228}  # KiB of an SM
# Of an SM, in all three. Registers lie in 4 parts, one for every fourth warp.
REGISTERS, MAX_THREADS, MAX_BLOCKS = 65536, 2048, 32
RESERVED = 1024  # bytes of shared memory that the system takes for each block

# Lines of loopmdm.cu that the formulas below repeat. When one of them changes, the script says so
# and does not print what is no longer true.
SAYS = """
enum { WARP = 32, THREADS = 256 };
enum { PAD = 16 / sizeof(floatX) };
enum { TILE = 128, DEPTH = 32, STAGES = BF16 ? 3 : 2, TILE_SIZE = TILE * (DEPTH + PAD) };
enum { ATTN_ROWS = 64, ATTN_THREADS = 128, KEYS = 64 };
    return BF16 || D < 64 ? 64 : 32;
    return D <= 32 ? 64 : 32;
size_t shared = STAGES * 2 * TILE_SIZE * sizeof(floatX);
size_t shared = (ATTN_ROWS + 2 * KEYS) * (D + PAD) * sizeof(floatX);
size_t kv_shared = (2 * ATTN_ROWS + 4 * queries_at_a_time(D)) * row;
size_t q_shared = (2 * ATTN_ROWS + 4 * keys_at_a_time(D)) * row;
sequence_loss_kernel<<<m->B, WARP>>>
"""
WARP, THREADS, TILE, DEPTH, ATTN_ROWS, ATTN_THREADS, KEYS = 32, 256, 128, 32, 64, 128, 64
SIMPLE = """adamw add_parts attention_delta column_sums crossentropy encoder_forward gather_backward
    gather_forward layernorm_backward layernorm_forward masked_positions noise rope round sample
    squares state_change wpe_backward wte_backward""".split()


def launch(kernel, bf16):
    """Threads and bytes of dynamic shared memory of 'name' or 'name<arguments>'"""
    name, _, arguments = kernel.partition("<")
    size, stages = (2, 3) if bf16 else (4, 2)
    pad = 16 // size
    if name == "matmul":
        return THREADS, stages * 2 * TILE * (DEPTH + pad) * size
    if name.startswith("attention_") and arguments:
        D = int(re.match(r"\d+", arguments)[0])
        rows = ATTN_ROWS + 2 * KEYS
        if name == "attention_backward_kv":
            queries = 16 if D > 64 else 64 if bf16 or D < 64 else 32
            rows = 2 * ATTN_ROWS + 4 * queries
        elif name == "attention_backward_q":
            keys = 16 if D > 64 else 64 if D <= 32 else 32
            rows = 2 * ATTN_ROWS + 4 * keys
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
    for arch in sorted(kernels, key=lambda a: int(a[3:])):
        print(f"\n{'bf16' if bf16 else 'fp32'}, {arch}:\n")
        print("| kernel | threads | registers | shared memory, static + dynamic | spills "
              "| blocks per SM | occupancy | limit |\n|---|---:|---:|---:|---:|---:|---:|---|")
        others = []  # small kernels without a problem share a line
        by_name = sorted(kernels[arch], key=lambda k: re.sub(r"\d+", lambda n: n[0].zfill(3), k[0]))
        for name, registers, static, spilled in by_name:
            threads, dynamic = launch(name, bf16)
            blocks, limit = blocks_per_sm(arch, threads, registers, static + dynamic)
            occupancy = 100 * blocks * threads // MAX_THREADS
            if not everything and not spilled and not dynamic and occupancy >= 75:
                others.append((registers, occupancy))
                continue
            print(f"| {name} | {threads} | {registers} | {static} + {dynamic} | {spilled} "
                  f"| {blocks} | {occupancy} % | {limit} |")
        if others:
            print(f"| {len(others)} others | | at most {max(o[0] for o in others)} | | 0 | "
                  f"| at least {min(o[1] for o in others)} % | |")


def compile_log(nvcc, archs, bf16):
    command = [nvcc, "-O3", "-std=c++17", "-x", "cu", "-I.", f"-DBF16={bf16}",
               '-DBACKEND="loopmdm.cu"', "-Xptxas", "-v", "-c", "dev/tools.c", "-o", os.devnull]
    for arch in archs:
        command += ["-gencode", f"arch=compute_{arch[3:]},code={arch}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"resources.py: {' '.join(command)} failed:\n{done.stderr}")
    return done.stderr


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("logs", nargs="*", metavar="LOG",
                        help="what nvcc -Xptxas -v said; - is standard input")
    parser.add_argument("--arch", nargs="+", choices=SHARED, default=list(SHARED),
                        help="what to compile for")
    parser.add_argument("--nvcc", default="nvcc", help="the compiler")
    parser.add_argument("--all", action="store_true", help="the small kernels too, each in a line")
    args = parser.parse_args()

    with open(os.path.join(ROOT, "loopmdm.cu")) as f:
        source = f.read()
    for line in SAYS.strip().splitlines():
        if line.strip() not in source:
            sys.exit(f"resources.py: loopmdm.cu no longer says '{line.strip()}': change what "
                     "follows from it here")
    if not args.logs:
        for bf16 in 1, 0:
            print_tables(compile_log(args.nvcc, args.arch, bf16), args.all)
    for log in args.logs:
        with sys.stdin if log == "-" else open(log) as f:
            print_tables(f.read(), args.all)


main()
