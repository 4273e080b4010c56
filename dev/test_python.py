"""
The checks of loopmdm that need Python: its tokenizer against Hugging Face's, word problems and gsm.py, the committed reference files, Sudoku, checkpoints to and fro, and a
training run side by side with PyTorch. `make test` runs it, from the repository root. TINYSTORIES=FILE uses that text instead of the generated stories; where
gpt2_vocab.json and gpt2_merges.txt lie beside it, GPT-2's vocabulary is checked too. Ends with "N passed, N failed".
"""
import csv
import json
import os
import re
import shutil
import subprocess
import sys

import numpy as np
import torch
from tokenizers import Tokenizer

sys.path[:0] = [".", "dev/data"]
import gsm  # noqa: E402
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
    points = [c for c in (*range(1, 0x32400), *range(0xE0000, 0xE0200), 0xF0000, 0x10FFFF) if not 0xD800 <= c < 0xE000]
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
    taken = os.path.join(folder, "val.bin")
    before = open(taken, "rb").read()
    check(f"{name}: an output that is read, without one line and the old file",
          fails("--input val.bin", [sys.executable, "dev/data/tinystories.py", "--input", taken, "--out", folder, *options], "would overwrite") or open(taken, "rb").read() != before)
    return folder


def fails(name, command, said):
    """1 if the command succeeds, or says more or less than one line with these words."""
    done = subprocess.run(command, capture_output=True, text=True)
    right = done.returncode == 1 and done.stderr.count("\n") == 1 and said in done.stderr
    if not right:
        print(f"      {name}: status {done.returncode}: {done.stderr}")
    return not right


def decode_rows(path, tokens, T):
    """The texts of a shard's rows, where each is end-of-text, the text, and only end-of-text after it; None for other rows."""
    eot, texts = tokens.index(b"<|endoftext|>"), []
    for row in shard(path).reshape(-1, T):
        length = np.flatnonzero(np.append(row[1:], eot) == eot)[0]
        right = row[0] == eot and (row[1 + length:] == eot).all()
        texts.append(b"".join(tokens[i] for i in row[1: 1 + length]).decode() if right else None)
    return texts


def wrong_steps(answer, fewest=2, most=4):
    """Whether anything in a worked answer of arithmetic.c is wrong, the number of its steps too."""
    match = re.fullmatch(r"((?:\d+ [-+*/] \d+ = \d+ [a-z]+\. ?)+)\n#### (\d+)", answer)
    if not match:
        return True
    steps = [(int(a), op, int(b), int(c)) for a, op, b, c in re.findall(r"(\d+) (.) (\d+) = (\d+)", match[1])]
    right = all({"+": a + b == c, "-": a - b == c, "*": a * b == c, "/": c * b == a}[op] and 0 <= c <= 999 for a, op, b, c in steps)
    return not right or not fewest <= len(steps) <= most or steps[-1][3] != int(match[2])


def check_arithmetic():
    """The word problems of arithmetic.c, and arithmetic.tok."""
    program, n, T, tok = "build/arithmetic", 10000, 96, "dev/data/arithmetic.tok"
    text = run(program, "--seed", "2", "--count", str(n))
    problems = [p.strip().split("<|sep|>") for p in text.split("<|endoftext|>\n")[:-1]]
    again, more, other = (run(program, "--seed", seed, "--count", count) for seed, count in (("2", str(n)), ("2", str(n + 9)), ("3", str(n))))
    check("arithmetic: the same again, more at the end only, other with another seed", (again != text) + (not more.startswith(text)) + (other == text))
    for cc in filter(shutil.which, ("gcc", "clang")):
        compiled = os.path.join(OUT, "arithmetic_" + cc)
        run(cc, "-std=c11", "-O1", "-Wall", "-Wextra", "-Werror", "dev/data/arithmetic.c", "-o", compiled)
        check(f"arithmetic: the same from {cc}", float(run(compiled, "--seed", "2", "--count", str(n)) != text))
    check(f"arithmetic: {n} problems with wrong steps", sum(wrong_steps(answer) for _, answer in problems) + abs(len(problems) - n))
    for steps in range(1, 5):
        some = run(program, "--seed", "2", "--count", "500", "--steps", str(steps)).split("<|endoftext|>\n")[:-1]
        check(f"arithmetic: 500 problems of {steps} steps, that are wrong", sum(wrong_steps(problem.split("<|sep|>")[1].strip(), steps, steps) for problem in some) + abs(len(some) - 500))
    small = run(program, "--count", "500", "--largest", "20")
    check("arithmetic: 500 problems with numbers up to 20, largest number", max(map(int, re.findall(r"\d+", small))) - 20)
    check("arithmetic: those, wrong", sum(wrong_steps(problem.split("<|sep|>")[1].strip()) for problem in small.split("<|endoftext|>\n")[:-1]) + abs(small.count("####") - 500))
    check(f"arithmetic: of {n} problems, not distinct", n - len({question for question, _ in problems}), 10)
    known = {question for question, _ in problems}
    check("arithmetic: questions of one seed that another has too", sum(p.strip().split("<|sep|>")[0] in known for p in other.split("<|endoftext|>")), 10)
    words = set(re.findall("[A-Za-z]+", " ".join(question + answer for question, answer in problems)))
    check(f"arithmetic: {len(words)} words", len(words), 150)

    paths = {name: os.path.join(OUT, name) for name in ("problems.jsonl", "problems.txt", "problems.bin", "all.jsonl", "all.bin", "all.tok")}
    run(program, "--seed", "2", "--count", str(n), "--jsonl", "--output", paths["problems.jsonl"])
    items = [json.loads(line) for line in open(paths["problems.jsonl"])]
    check("arithmetic: problems that differ as text and as JSON", sum([i["question"], i["answer"]] != p for i, p in zip(items, problems)) + abs(len(items) - n))
    run(sys.executable, "dev/data/gsm.py", "--input", paths["problems.jsonl"], "--output", paths["problems.bin"], "--tokenizer", tok, "--rows-of", str(T))
    tokens, eot = gsm.read_tokenizer_bin(tok)
    encode = gsm.make_encoder(tokens, eot)
    fit = ["<|sep|>".join(p) for p in problems if sum(len(encode(part)) for part in p) + 2 <= T]
    check("arithmetic: problems that fit rows of 96, and come back from them: differ", float(decode_rows(paths["problems.bin"], tokens, T) != fit))
    check("arithmetic: share of problems too long for rows of 96", 1 - len(fit) / n, 0.01)
    check("arithmetic.tok: tokens with two digits", sum(bool(re.search(rb"\d.*\d", token)) for token in tokens))
    with open(paths["problems.txt"], "w") as f:
        f.write(text.replace("<|sep|>", "<|endoftext|>"))   # so that each part is encoded alone
    run("./loopmdm", "tokenize", "--tokenizer", tok, "--input", paths["problems.txt"], "--output", paths["all.bin"])
    want = [i for p in problems for part in p for i in (eot, *encode(part))]
    check(f"arithmetic: {len(want)} tokens, of gsm.py and of loopmdm tokenize: differ", float(shard(paths["all.bin"]).tolist() != want))
    with open(paths["problems.txt"], "w") as f:
        f.write(text)
    run("./loopmdm", "tokenize", "--tokenizer", tok, "--input", paths["problems.txt"], "--output", paths["all.bin"], "--rows-of", str(T))
    check("arithmetic: rows of gsm.py and of loopmdm tokenize --rows-of: differ", float(open(paths["all.bin"], "rb").read() != open(paths["problems.bin"], "rb").read()))
    run(program, "--seed", "1", "--count", "40000", "--jsonl", "--output", paths["all.jsonl"])
    run(sys.executable, "dev/data/gsm.py", "--input", paths["all.jsonl"], "--output", paths["all.bin"], "--rows-of", str(T),
        "--tokenizer", paths["all.tok"], "--train-tokenizer", str(len(tokens)))
    check("arithmetic.tok is what its command writes", float(open(tok, "rb").read() != open(paths["all.tok"], "rb").read()))


def check_templates():
    """stories.c --templates: each is its story, with words that were told before left out."""
    options = "--seed", "5", "--count", "1000"
    stories = run("build/stories", *options).split("\n<|endoftext|>\n")[:-1]
    templates = run("build/stories", *options, "--templates").splitlines()
    blanks = wrong = untold = 0
    for template, story in zip(templates, stories):
        match = re.fullmatch(r"(\w+|\n)".join(map(re.escape, template.split("____"))), story)
        for k in range(1, template.count("____") + 1) if match else ():
            before, word = story[:match.start(k)], match[k]
            blanks += 1
            untold += before.count("\n") if word == "\n" else not re.search(rf"\b{word}\b", before, re.IGNORECASE)
        wrong += not match
    check("stories: 1000 templates that are not their stories", wrong + abs(len(templates) - 1000) + abs(len(stories) - 1000))
    check(f"stories: of {blanks} blanks, not told before", untold if blanks > 5000 else 1)


def check_gsm():
    """gsm.py: GSM8K's format, awkward text, and what is wrong with the input."""
    folder, T = os.path.join(OUT, "gsm"), 128
    os.makedirs(folder)
    path, out, tok, bad = (os.path.join(folder, name) for name in ("input.jsonl", "rows.bin", "rows.tok", "bad.jsonl"))
    sold = {"question": " Natalia sold 48 clips in April, half as many in May. How many?\n", "answer": "In May 48/2 = <<48/2=24>>24 clips.\n"
            "In all 48+24 = <<48+24=72>>72.\n#### 72"}
    texts = [("Natalia sold 48 clips in April, half as many in May. How many?", "In May 48/2 = 24 clips.\nIn all 48+24 = 72.\n#### 72")]
    items = [sold, {"question": "7 " * 200, "answer": "too long"}]
    for awkward in AWKWARD:
        awkward = awkward.replace("<|endoftext|>", "")[:20]
        items.append({"question": awkward, "answer": f"{awkward} #### {len(awkward)}", "more": None})
        texts.append((awkward.strip(gsm.SPACE), f"{awkward} #### {len(awkward)}".strip(gsm.SPACE)))
    with open(path, "w", encoding="utf-8-sig", newline="") as f:
        f.write("\r\n\r\n".join(json.dumps(item, ensure_ascii=i % 2 == 0) for i, item in enumerate(items)))
    script = [sys.executable, "dev/data/gsm.py"]
    said = run(*script, "--input", path, "--output", out, "--tokenizer", tok, "--rows-of", str(T), "--train-tokenizer", "300")
    tokens, eot = gsm.read_tokenizer_bin(tok)
    encode = gsm.make_encoder(tokens, eot)
    fit = ["<|sep|>".join(p) for p in texts if sum(len(encode(part)) for part in p) + 2 <= T]
    check("gsm: rows are the texts without annotations, that differ", sum(a != b for a, b in zip(decode_rows(out, tokens, T), fit)))
    check("gsm: rows and problems left out, as counted", float(f"{len(fit)} rows of {T} tokens; {len(items) - len(fit)} of {len(items)} problems left" not in said))
    check("gsm: awkward texts that loopmdm encodes otherwise", sum(loopmdm_tokens(tok, t) != encode(t) for t in AWKWARD if "<|" not in t))
    longest = max(sum(len(encode(part)) for part in p) + 2 for p in texts)
    run(*script, "--input", path, "--output", out, "--tokenizer", tok, "--rows-of", str(longest))
    check("gsm: a row that is just as long as it may be is kept", abs(len(shard(out)) - longest * len(texts)))

    before = {name: open(os.path.join(folder, name), "rb").read() for name in os.listdir(folder)}
    good, wrong = json.dumps(sold).encode() + b"\n", 0
    for line, words in ((b'{"question": "a", "answer": ', "line 2: not JSON"), (b'{"question": "\xff", "answer": "b"}', "line 2: not JSON in UTF-8"),
                        (b"[1, 2]", "line 2: not an object"), (b'{"question": "a"}', 'line 2: no text in "answer"'),
                        (b'{"question": " ", "answer": "b"}', 'line 2: no text in "question"'), (b'{"question": 1, "answer": "b"}', 'no text in "question"'),
                        (b'{"question": "a<|sep|>", "answer": "b"}', "line 2: <|sep|>"), (b'{"question": "\\ud800", "answer": "b"}', "line 2: half a character"),
                        (b"[" * 100000, "line 2: not JSON")):
        with open(bad, "wb") as f:
            f.write(good + line + b"\n" + good)
        for train in ([], ["--train-tokenizer", "300"]):
            wrong += fails(line[:50], [*script, "--input", bad, "--output", out, "--tokenizer", tok, "--rows-of", str(T), *train], words)
    check("gsm: malformed lines not reported", wrong)
    with open(bad, "wb") as f:
        f.write(b"\n\n")
    wrong = 0
    for name, options, words in (
            ("no <|sep|>", {"--tokenizer": "dev/data/stories.tok"}, "has no token <|sep|>"), ("no input", {"--input": "none"}, "none: No such file"),
            ("no tokenizer", {"--tokenizer": "none"}, "none: No such file"), ("no tokenizer.bin", {"--tokenizer": "dev/data/README.md"}, "not a tokenizer.bin"),
            ("empty", {"--input": bad}, "no problems"), ("all too long", {"--rows-of": "4"}, "are too long"),
            ("too little text", {"--train-tokenizer": "5000"}, "enough for a vocabulary of"), ("a folder", {"--output": folder}, "is a folder"),
            ("no such folder", {"--output": "none/rows.bin"}, "none/rows.bin.tmp: No such file"),
            ("tokenizer a folder", {"--tokenizer": folder, "--train-tokenizer": "300"}, "is a folder")):
        options = {"--input": path, "--output": out, "--tokenizer": tok, "--rows-of": str(T), **options}
        wrong += fails(name, [*script, *(word for pair in options.items() for word in pair)], words)
    check("gsm: other errors not reported", wrong)
    os.remove(bad)
    after = {name: open(os.path.join(folder, name), "rb").read() for name in os.listdir(folder)}
    check("gsm: an error changes files, or leaves any", float(before != after))


def check_reference():
    """The committed reference files are what train_gpt2style.py writes."""
    for name, (shape, *rest) in reference.SMALL_CASES.items():
        path = os.path.join(OUT, name + ".bin")
        reference.dump(path, reference.make_config(*shape), *rest)
        a, b = (np.fromfile(p, np.uint8) for p in (path, os.path.join("dev/reference", name + ".bin")))
        check(f"{name}.bin: size", abs(len(a) - len(b)))
        x, y = (reference_floats(p) for p in (path, os.path.join("dev/reference", name + ".bin")))
        check(f"{name}.bin: numbers", max(float(np.abs(x[k] - y[k]).max() / max(1, np.abs(y[k]).max())) for k in x) if x.keys() == y.keys() else 1, 1e-5)


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


def same_unit(size):
    """For each cell of a Sudoku, the other cells in its row, column or box."""
    height, width = {4: (2, 2), 6: (2, 3), 9: (3, 3)}[size]
    units = [(("row", r), ("column", c), ("box", r // height, c // width)) for r in range(size) for c in range(size)]
    return [[j for j, other in enumerate(units) if j != i and any(u == v for u, v in zip(unit, other))] for i, unit in enumerate(units)]


def solutions(puzzle, size, peers, limit=2):
    """By brute force, at most `limit` of them: each blank in turn, each digit in turn."""
    if 0 not in puzzle:
        return [puzzle]
    cell, found = puzzle.index(0), []
    for digit in range(1, size + 1):
        if len(found) < limit and all(puzzle[j] != digit for j in peers[cell]):
            found += solutions(puzzle[:cell] + [digit] + puzzle[cell + 1:], size, peers, limit - len(found))
    return found


def check_sudoku():
    """Boards and puzzles of dev/data/sudoku.c, the errors it reports, and that loopmdm takes its files."""
    folder, program = os.path.join(OUT, "sudoku"), "build/sudoku"
    os.makedirs(folder)

    def path(name):
        return os.path.join(folder, name)

    def rows(name, size, count, *options):
        """What it writes, with `count` rows."""
        run(program, "--size", str(size), "--output", path(name), *options)
        header = np.fromfile(path(name), np.int32, 256)
        right = np.array_equal(header, [20240520, 1, count * size * size] + [0] * 253) and os.path.getsize(path(name)) == 1024 + 2 * header[2]
        return shard(path(name)).reshape(-1, size * size).tolist() if right else []

    peers = {size: same_unit(size) for size in (4, 6, 9)}
    for size in peers:
        boards = rows("boards.bin", size, 1000, "--count", "1000")
        wrong = sum(not all(1 <= v <= size and all(v != b[j] for j in peers[size][i]) for i, v in enumerate(b)) for b in boards)
        check(f"sudoku: 1000 boards of size {size}, that are wrong", wrong if len(boards) == 1000 else 1000)
        check(f"sudoku: the first 10 of 1000 boards of size {size} are not the 10 alone", rows("fewer.bin", size, 10, "--count", "10") != boards[:10])
        if size > 4:  # of size 4 there are only 288
            check(f"sudoku: 1000 boards of size {size}, that are the same with another seed",
                  sum(map(list.__eq__, boards, rows("other.bin", size, 1000, "--seed", "2"))))
    for size, givens, count in ((4, 4, 50), (6, 16, 50), (6, 10, 50), (9, 30, 10)):
        options = "--givens", str(givens), "--count", str(count), "--seed", "3"
        pairs = rows("puzzles.bin", size, 2 * count, *options)
        puzzles, answers = pairs[::2], pairs[1::2]
        check(f"sudoku: {count} puzzles of size {size}, without exactly {givens} givens", sum(sum(v > 0 for v in p) != givens for p in puzzles) if pairs else 1)
        check(f"sudoku: {count} puzzles of size {size}, not solved by their second row alone",
              sum(solutions(p, size, peers[size]) != [a] for p, a in zip(puzzles, answers)) if pairs else 1)
        check("sudoku: the same seed again, rows that differ", sum(map(list.__ne__, pairs, rows("again.bin", size, 2 * count, *options))))
        check("sudoku: another seed, puzzles that are the same", sum(map(list.__eq__, puzzles, rows("other.bin", size, 2 * count, *options[:-1], "4")[::2])))

    def fails(status, *options):
        """The files that are there after an error of this status and one line; None after anything else."""
        done = subprocess.run([program, *options], capture_output=True)
        said = done.stderr.decode(errors="replace")
        right = done.returncode == status and not done.stdout and re.fullmatch(r"sudoku: [^\n]+\n", said)
        return sorted(os.listdir(folder)) if right else print(options, done.returncode, said)

    out, before = path("new.bin"), sorted(os.listdir(folder))
    six = "--size", "6", "--output", out
    bad = [(), ("--size",), ("--size", "6"), ("--size", "5", "--output", out), ("--size", "06", "--output", out), ("--output", out), (*six, "--count"),
           (*six, "--count", "0"), (*six, "--count", "-1"), (*six, "--count", "1e3"), (*six, "--count", " 7"), (*six, "--count", "59652324"),
           (*six, "--count", "29826162", "--givens", "16"), (*six, "--count", "99999999999999999999"), (*six, "--givens", "0"), (*six, "--givens", "37"),
           (*six, "--seed", "18446744073709551616"), (*six, "--seed", ""), (*six, "--sead", "1"), (*six, "new.bin"), (*six, "--tokenizer", out),
           (*six, "--tokenizer", path("./new.bin")), (*six, "--tokenizer", path("../sudoku/new.bin")), (*six, "--tokenizer", out + ".tmp"),
           ("--size", "6", "--output", out + ".tmp", "--tokenizer", out), ("--size", "6", "--tokenizer", out, "--count", "5")]
    check(f"sudoku: {len(bad)} wrong command lines, without one line, status 2 and no file", sum(fails(2, *options) != before for options in bad))
    check("sudoku: no such puzzle or folder, without one line, status 1 and no file",
          (fails(1, *six, "--givens", "5", "--tokenizer", path("new.tok")) != before) + (fails(1, "--size", "6", "--output", path("no/new.bin")) != before))
    if os.path.exists("/dev/full"):
        old = open(path("boards.bin"), "rb").read()
        for name in ("--output", "--tokenizer"):
            if os.path.lexists(path("boards.bin.tmp")):
                os.remove(path("boards.bin.tmp"))
            os.symlink("/dev/full", path("boards.bin.tmp"))  # the file that it renames when complete: a disk that is full
            check(f"sudoku: disk full, {name}: without one line, status 1 and the old file",
                  fails(1, "--size", "9", name, path("boards.bin")) != before or os.path.islink(path("boards.bin")) or
                  open(path("boards.bin"), "rb").read() != old)
        check("sudoku: --output /dev/full, without one line and status 1", fails(1, "--size", "9", "--output", "/dev/full") != before)

    for size in peers:
        digits = "123456789"[:size]
        run(program, "--size", str(size), "--tokenizer", path("sudoku.tok"))
        check(f"sudoku: loopmdm reads the tokenizer of size {size}",
              loopmdm_tokens(path("sudoku.tok"), f".{digits}.<|endoftext|>") != [0, *range(1, size + 1), 0, size + 1])
    run("./loopmdm", "train", "--data", path("boards.bin"), "--tokenizer", path("sudoku.tok"), "--seq-len", "81", "--layers", "1", "--channels", "16",
        "--heads", "1", "--loop", "0:1", "--max-loops", "1", "--batch", "1", "--steps", "1", "--out", path("model"))
    check("sudoku: loopmdm trains on boards: steps", abs(column(path("model"), "step")[-1] - 1))


def column(folder, name):
    return [float(row[name]) for row in csv.DictReader(open(os.path.join(folder, "log.csv")))]


def check_training(data):
    """Checkpoints to and fro, and 200 steps in C and in PyTorch from the same seed."""
    model = ["--data", os.path.join(data, "train.bin"), "--tokenizer", os.path.join(data, "tokenizer.bin"), "--layers", "4", "--channels", "64",
             "--heads", "4", "--seq-len", "64", "--loop", "1:3", "--max-loops", "4", "--batch", "8", "--wte-lr", "0.3"]
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

    # everything else that training can do: averages, other lengths and noise levels; then its model learns from rows with a context
    more = ["--time", "bell", "--var-length", "0.3", "--ema", "0.9", "--loop-dist", "flops", "--accum", "2", "--steps", "30"]
    rows, tok = os.path.join(OUT, "problems.bin"), "dev/data/arithmetic.tok"
    answers = ["--data", rows, "--val-data", rows, "--val-rows", "32", "--tokenizer", tok, "--model", "d2", "--seq-len", "96", "--layers", "3", "--answers-after", "<|sep|>", "--batch", "4"]
    for name, base, options, tolerance in (("bell, lengths, average", model, more, 1e-4), ("answers", answers, ["--steps", "20"], 1e-4), ("answers from --init, with another loop", answers, ["--steps", "5", "--loop", "1:3"], 1e-4)):
        shutil.rmtree(c), shutil.rmtree(p)
        for folder, program in ((c, ["./loopmdm"]), (p, [sys.executable, "train_gpt2style.py"])):
            init = ["--init", os.path.join(OUT, "first")] if "init" in name else []
            run(*program, "train", *base, *options, *init, "--warmup", "5", "--out", folder)
        check(f"{name}: loss, largest difference", max(abs(a - b) for a, b in zip(column(c, "loss"), column(p, "loss"))), tolerance)
        for key, most in (("loops", 0), ("t", 0), ("flops", 1e3)):
            check(f"{name}: {key}, largest difference", max(abs(a - b) for a, b in zip(column(c, key), column(p, key))), most)
        if "average" in name:
            a, b = (reference.read_floats(os.path.join(f, "ema.bin"), reference.MODEL_MAGIC)[1] for f in (c, p))
            check(f"{name}: ema.bin, relative", float(np.linalg.norm(a - b) / np.linalg.norm(a)), 1e-4)
            check(f"{name}: the average is no copy", float(np.array_equal(a, reference.read_floats(os.path.join(c, "model.bin"), reference.MODEL_MAGIC)[1])))
        shutil.rmtree(os.path.join(OUT, "first"), ignore_errors=True)
        shutil.copytree(c, os.path.join(OUT, "first"))


def main():
    shutil.rmtree(OUT, ignore_errors=True)
    os.makedirs(OUT)
    text = os.environ.get("TINYSTORIES") or "build/stories_val.txt"
    data = check_tokenizer(text, "vocab 700", "--vocab", "700")
    beside = [os.path.join(os.path.dirname(text), f) for f in ("gpt2_vocab.json", "gpt2_merges.txt")]
    if all(os.path.exists(f) for f in beside):
        check_tokenizer(text, "gpt2", "--vocab", "gpt2", "--gpt2-vocab", beside[0], "--gpt2-merges", beside[1])
    check_templates()
    check_arithmetic()
    check_gsm()
    check_reference()
    check_sudoku()
    check_training(data)
    print(f"{passed} passed, {failed} failed")
    sys.exit(failed > 0)


if __name__ == "__main__":
    main()
