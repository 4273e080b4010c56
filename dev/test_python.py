"""
The checks of loopmdm that need Python: its tokenizer against Hugging Face's, checkpoints to and fro, and a training run side by side
with PyTorch. `make test` runs it, from the repository root. TINYSTORIES=FILE uses that text instead of the generated stories; where
gpt2_vocab.json and gpt2_merges.txt lie beside it, GPT-2's vocabulary is checked too. Ends with "N passed, N failed".
"""
import csv
import os
import re
import shutil
import subprocess
import sys

import numpy as np
import torch
from tokenizers import Tokenizer

sys.path.insert(0, ".")
import train_gpt2style as reference  # noqa: E402

OUT = "build/test/python"
passed = failed = 0


def check(what, error, tolerance=0.0):
    """One line: error must not exceed tolerance (NaN fails)."""
    global passed, failed
    ok = error <= tolerance
    print(f"{'ok  ' if ok else 'FAIL'}  {what:<79} error {error:.1e}  tolerance {tolerance:.0e}", flush=True)
    passed, failed = passed + ok, failed + (not ok)


def run(*command):
    """Runs a command, which must succeed, and returns what it wrote."""
    done = subprocess.run(command, capture_output=True)
    if done.returncode:
        sys.exit(f"{' '.join(command)[:300]}\nfailed with status {done.returncode}: {done.stderr.decode()}\n{passed} passed, {failed + 1} failed")
    return done.stdout.decode(errors="replace")


def loopmdm_tokens(tokenizer, text):
    """The ids of `loopmdm tokenize --text`."""
    return [int(i) for i in re.findall(r"^ *(\d+)  '", run("./loopmdm", "tokenize", "--tokenizer", tokenizer, "--text", text), re.M)]


def shard(path):
    return np.fromfile(path, np.uint16)[512:].astype(int)


AWKWARD = [
    "Café naïve Ångström São Zoë — déjà vu…", "“Curly quotes,” she said, ‘and it’s fine’", "😀 😃👩‍👩‍👧‍👦 🇩🇪 ❤️ ok👍🏽", "tabs\there\t\tand\t there \t",
    "\n\n\nempty\n\nlines\n \n \n", " leading and trailing   ", "it's I'm we've they'll he'd don't 'S 'RE ''s '", "1 22 ½ ² Ⅷ ٣٤ १२ ⑨ 3rd",
    "日本語 한국어 中文。 العربية עברית ไทย हिन्दी", "a\u00a0b\u2003c\u3000d\u2028e\u0085f\u200bg", "e\u0301 combining \u0915\u094d\u0937", "\r\n\r\ncarriage\rreturns",
    "<|endoftext|>a<|endoftext|><|endoftext|> b <|endoftext", "!!!??? ... --- ~~~ @#$%^&*()_+{}|:<>", "x" * 300 + " " * 50 + "y", "\x01\x02\x7f control",
]


def every_character():
    """Texts that hold each code point after a letter, a digit, a space and itself, 4000 code points a text."""
    points = [c for c in (*range(1, 0x32000), *range(0xE0000, 0xE0200), 0xF0000, 0x10FFFF) if not 0xD800 <= c < 0xE000]
    for i in range(0, len(points), 4000):
        yield "".join(f"a{chr(c)} {chr(c)}{chr(c)}1{chr(c)}  {chr(c)}" for c in points[i: i + 4000])


def check_tokenizer(text, name, *options):
    """loopmdm's encoding equals Hugging Face's: a whole file as shards, awkward text, and every character of Unicode."""
    folder = os.path.join(OUT, name)
    run(sys.executable, "dev/data/tinystories.py", "--input", text, "--out", folder, *options)
    tokenizer, theirs = os.path.join(folder, "tokenizer.bin"), Tokenizer.from_file(os.path.join(folder, "tokenizer.json"))
    run("./loopmdm", "tokenize", "--tokenizer", tokenizer, "--input", text, "--output", os.path.join(folder, "all.bin"))
    ours = shard(os.path.join(folder, "all.bin"))
    want = np.concatenate([shard(os.path.join(folder, part)) for part in ("train.bin", "val.bin")])
    check(f"{name}: all {len(want)} tokens of {os.path.basename(text)}", 0 if np.array_equal(ours, want) else 1)
    check(f"{name}: {len(AWKWARD)} awkward texts, that differ", sum(loopmdm_tokens(tokenizer, t) != theirs.encode(t).ids for t in AWKWARD))
    texts = list(every_character())
    check(f"{name}: every character, texts that differ", sum(loopmdm_tokens(tokenizer, t) != theirs.encode(t).ids for t in texts))
    return folder


def check_reference():
    """The committed reference files are what train_gpt2style.py writes."""
    for name, (shape, *rest) in reference.SMALL_CASES.items():
        path = os.path.join(OUT, name + ".bin")
        reference.dump(path, reference.make_config(*shape), *rest)
        a, b = (np.fromfile(p, np.uint8) for p in (path, os.path.join("dev/reference", name + ".bin")))
        check(f"{name}.bin: size", abs(len(a) - len(b)))
        x, y = (reference_floats(p) for p in (path, os.path.join("dev/reference", name + ".bin")))
        check(f"{name}.bin: numbers", max(float(np.abs(x[k] - y[k]).max()) for k in x) if x.keys() == y.keys() else 1, 1e-5)


def reference_floats(path):
    """{name: array} of a reference file."""
    data, at, out = open(path, "rb").read(), 1024, {}
    for _ in range(np.frombuffer(data, np.int32, 3)[2]):
        name = data[at: at + 32].rstrip(b"\0").decode()
        kind, _, *shape = (int(v) for v in np.frombuffer(data, np.int32, 6, at + 32))
        dtype = {1: np.int32, 2: np.float32, 3: np.float64}[kind]
        count = int(np.prod(shape))
        out[name] = np.frombuffer(data, dtype, count, at + 56).astype(np.float64)
        at += 56 + count * np.dtype(dtype).itemsize
    return out


def column(folder, name):
    return [float(row[name]) for row in csv.DictReader(open(os.path.join(folder, "log.csv")))]


def check_training(data):
    """Checkpoints to and fro, and 200 steps in C and in PyTorch from the same seed."""
    model = ["--data", os.path.join(data, "train.bin"), "--tokenizer", os.path.join(data, "tokenizer.bin"), "--layers", "4", "--channels", "64",
             "--heads", "4", "--seq-len", "64", "--loop", "1:3", "--max-loops", "4", "--batch", "8"]
    python = [sys.executable, "train_gpt2style.py", "train", *model]
    c, p, back = (os.path.join(OUT, f) for f in ("c", "pytorch", "back"))
    for folder in (c, p, back):
        shutil.rmtree(folder, ignore_errors=True)

    run("./loopmdm", "train", *model, "--out", c, "--steps", "5", "--warmup", "3")
    m, step = reference.checkpoint_load(c)
    optimizer = reference.make_optimizer(m, 1e-3, 0.1)
    flops, rows, seed = reference.checkpoint_resume(m, optimizer, c)
    os.makedirs(back)
    reference.checkpoint_save(m, optimizer, back, step, rows, seed, flops)
    for name in ("model.bin", "optimizer.bin"):
        check(f"{name}: C -> PyTorch -> C, bytes that differ", float((np.fromfile(f"{c}/{name}", np.uint8) != np.fromfile(f"{back}/{name}", np.uint8)).sum()))
    for folder, command in ((c, ["./loopmdm", "train", *model]), (back, python)):
        run(*command, "--out", folder, "--steps", "10", "--warmup", "3", "--resume")
    check("steps 6 to 10 resumed in C and in PyTorch: loss", max(abs(a - b) for a, b in zip(column(c, "loss")[-5:], column(back, "loss")[-5:])), 1e-4)
    run("./loopmdm", "train", *model, "--out", back, "--steps", "12", "--warmup", "3", "--resume")
    check("a checkpoint from PyTorch continues in C: steps", abs(column(back, "step")[-1] - 12))

    shutil.rmtree(c), shutil.rmtree(p, ignore_errors=True)
    val = ["--val-data", os.path.join(data, "val.bin"), "--val-every", "100", "--val-rows", "64", "--steps", "200"]
    run("./loopmdm", "train", *model, *val, "--out", c)
    run(*python, *val, "--out", p)
    losses = column(c, "loss"), column(p, "loss")
    print("\n200 steps side by side   step   loss in C   loss in PyTorch")
    for step in (0, 19, 49, 99, 149, 199):
        print(f"{step + 1:>29}   {losses[0][step]:.6f}   {losses[1][step]:.6f}")
    print()
    check("200 steps: loss, largest difference", max(abs(a - b) for a, b in zip(*losses)), 1e-3)
    for name, tolerance in (("step", 0), ("loops", 0), ("t", 0), ("lr", 1e-12), ("flops", 1e3)):
        check(f"200 steps: {name}, largest difference", max(abs(a - b) for a, b in zip(column(c, name), column(p, name))), tolerance)
    last = [[float(v) for k, v in list(csv.DictReader(open(os.path.join(f, "log.csv"))))[-1].items() if k.startswith("val")] for f in (c, p)]
    check("200 steps: validation NELBO at each S", max(abs(a - b) for a, b in zip(*last)), 1e-4)


def main():
    torch.set_num_threads(os.cpu_count())
    shutil.rmtree(OUT, ignore_errors=True)
    os.makedirs(OUT)
    text = os.environ.get("TINYSTORIES") or "build/stories_val.txt"
    data = check_tokenizer(text, "vocab 700", "--vocab", "700")
    beside = [os.path.join(os.path.dirname(text), f) for f in ("gpt2_vocab.json", "gpt2_merges.txt")]
    if all(os.path.exists(f) for f in beside):
        check_tokenizer(text, "gpt2", "--vocab", "gpt2", "--gpt2-vocab", beside[0], "--gpt2-merges", beside[1])
    check_reference()
    check_training(data)
    print(f"{passed} passed, {failed} failed")
    sys.exit(failed > 0)


if __name__ == "__main__":
    main()
