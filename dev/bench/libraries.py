"""
The GPU's matrix products and attention beside what PyTorch calls for the same: cuBLAS, and its
scaled_dot_product_attention. Reads the table that a program built for profiling prints
(make build/loopmdm_cuda_profile), on the machine that made it:

    build/loopmdm_cuda_profile train ... >LOG
    python3 dev/bench/libraries.py LOG --batch 16 --seq-len 1024 --heads 12 --channels 768

Prints a line for each kind of product: its microseconds here and in the library, and the ratio of
speeds, which is above 1 where loopmdm is faster. All is in bf16. It is not quite the same work:

- The library's product has no bias, GELU or residual, and stores bf16. loopmdm stores its logits,
  residuals and gradients of weights as float.
- loopmdm splits the long sums of its weights' gradients. The time of adding up the parts is not in
  their lines, but in the profile's line sum_parts.
- The number of rows is the mean of those in the profile, rounded to a multiple of 128.
- A weight with 50257 rows is bad for cuBLAS, as 50257 is odd. loopmdm pads the logits.

Attention's backward is all of the profile's attention_* but the forward.
"""
import argparse
import os
import re
import sys

import torch
import torch.nn.functional as F

sys.path.insert(0, os.path.join(os.path.dirname(__file__), "..", ".."))
from dev.data import outputs  # noqa: E402
from train_gpt2style import number  # noqa: E402

# name, OC, C, microseconds, TFLOP/s
PRODUCT = re.compile(r"(matmul.*?) \((\d+),(\d+)\) +\d+ +[\d.]+ +[\d.]+ % +([\d.]+) +([\d.]+)")
OTHER = re.compile(r"(attention_\w+) +(\d+) +([\d.]+) ")


def microseconds(run, repeats=10, turns=5):
    """Time of one call of run() on the GPU, best of so many turns of so many calls."""
    best = float("inf")
    run()
    for _ in range(turns):
        events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
        events[0].record()
        for _ in range(repeats):
            run()
        events[1].record()
        torch.cuda.synchronize()
        best = min(best, events[0].elapsed_time(events[1]) * 1e3 / repeats)
    return best


def random(*shape):
    return torch.randn(*shape, device="cuda", dtype=torch.bfloat16)


def library_product(kind, rows, OC, C):
    """Microseconds of a product with this number of rows and a weight (OC,C)."""
    inp, dout, weight = random(rows, C), random(rows, OC), random(OC, C)
    a, b = inp, weight.t()
    if "input's" in kind:
        a, b = dout, weight
    if "weight's" in kind:
        a, b = dout.t(), inp
    return microseconds(lambda: torch.mm(a, b))


def library_attention(o):
    """Microseconds of attention forward and of its backward."""
    qkv = random(o.batch, o.seq_len, 3, o.heads, o.channels // o.heads)
    q, k, v = [x.transpose(1, 2).requires_grad_() for x in qkv.unbind(2)]
    forward = microseconds(lambda: F.scaled_dot_product_attention(q, k, v))
    y = F.scaled_dot_product_attention(q, k, v)
    dy = torch.randn_like(y)
    backward = microseconds(lambda: torch.autograd.grad(y, (q, k, v), dy, retain_graph=True))
    return forward, backward


def row(what, here, library):
    print(f"{what:52} {here:9.1f} {library:9.1f} {library / here:7.2f}")


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("log", help="what the program printed")
    for name in ("batch", "seq-len", "heads", "channels"):
        parser.add_argument(f"--{name}", type=number(1), required=True)
    o = parser.parse_args()
    with open(o.log, errors="replace") as file:
        text = file.read()
    each = {name: 1e3 * float(ms) / int(count) for name, count, ms in OTHER.findall(text)}
    if "attention_forward" not in each:
        parser.error(f"{o.log} is no LOG: a program built for profiling prints one")
    if not torch.cuda.is_available():
        parser.error("PyTorch finds no GPU")

    print(f"{torch.cuda.get_device_name()}, PyTorch {torch.__version__}, us")
    print(f"{'':52} {'loopmdm':>9} {'library':>9} {'ratio':>7}")
    for kind, OC, C, us, tflops in PRODUCT.findall(text):
        rows = float(us) * float(tflops) * 1e6 / (2 * int(OC) * int(C))  # on average
        rows = 128 * max(1, round(rows / 128))  # as libraries like it
        took = library_product(kind, rows, int(OC), int(C))
        row(f"{kind} ({OC},{C}), {rows} rows", float(us), took)
    forward, backward = library_attention(o)
    row("attention, forward", each.pop("attention_forward"), forward)
    row("attention, backward", sum(each.values()), backward)


if __name__ == "__main__":
    outputs.run("libraries.py", main)
