"""
The checks of loopmdm that need Python: the tokenizer against Hugging Face's, word problems and
gsm.py, Sudoku, the reference files, terminals, and train_gpt2style.py and ./loopmdm side by side.

`make test` runs it in the root of the repository. TINYSTORIES=FILE uses that text, not the
generated stories. If gpt2_vocab.json and gpt2_merges.txt lie beside it, GPT-2's vocabulary is
checked too. The last line is "N passed, N failed".
"""
import contextlib
import csv
import fcntl
import io
import json
import os
import pty
import random
import re
import resource
import shutil
import signal
import struct
import subprocess
import sys
import termios
from dataclasses import replace

import numpy as np
import pyte
import torch
from tokenizers import Tokenizer

sys.path[:0] = [".", "dev/data", "dev/reference"]
import dump  # noqa: E402
import gsm  # noqa: E402
import tinystories  # noqa: E402
import train_gpt2style as reference  # noqa: E402

OUT = "build/test/python"
PYTHON = sys.executable
EOT, SEP = "<|endoftext|>", "<|sep|>"
passed = failed = 0


def check(what, error, tolerance=0.0):
    """Prints one line. The error must not exceed the tolerance, and NaN does."""
    global passed, failed
    ok = error <= tolerance
    print(f"{'ok  ' if ok else 'FAIL'}  {what:<79} error {error:.1e}  tolerance {tolerance:.0e}",
          flush=True)
    passed += ok
    failed += not ok


def run(*command):
    """Runs a command, which must succeed, and returns what it writes to standard output."""
    done = subprocess.run(command, capture_output=True)
    if done.returncode:
        sys.exit(f"{' '.join(command)[:300]}\nfailed with status {done.returncode}: "
                 f"{done.stderr.decode()}\n{passed} passed, {failed + 1} failed")
    return done.stdout.decode(errors="replace")


def run_loopmdm(*command):
    return run("./loopmdm", *command)


def run_reference(*command):
    """train_gpt2style.py with these words, in this process: to start PyTorch takes seconds."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        reference.main(command)
    return said.getvalue()


def fails(name, command, said):
    """1 unless the command fails with one line that has these words."""
    done = subprocess.run(command, capture_output=True, text=True)
    right = done.returncode == 1 and done.stderr.count("\n") == 1 and said in done.stderr
    if not right:
        print(f"      {name}: status {done.returncode}: {done.stderr}")
    return not right


def file_bytes(*path):
    with open(os.path.join(*path), "rb") as f:
        return f.read()


def shard(path):
    return np.fromfile(path, np.uint16)[512:].astype(int)


# ---- The tokenizer -------------------------------------------------------------------------------

AWKWARD = [
    "Café naïve Ångström São Zoë — déjà vu…", "“Curly quotes,” she said, ‘and it’s fine’",
    "😀 😃👩‍👩‍👧‍👦 🇩🇪 ❤️ ok👍🏽", "tabs\there\t\tand\t there \t", "\n\n\nempty\n\nlines\n \n \n",
    " leading and trailing   ", "it's I'm we've they'll he'd don't 'S 'RE ''s '",
    "1 22 ½ ² Ⅷ ٣٤ १२ ⑨ 3rd", "日本語 한국어 中文。 العربية עברית ไทย हिन्दी",
    "a\u00a0b\u2003c\u3000d\u2028e\u0085f\u200bg", "e\u0301 combining \u0915\u094d\u0937",
    "\r\n\r\ncarriage\rreturns", f"{EOT}a{EOT}{EOT} b <|endoftext",
    "!!!??? ... --- ~~~ @#$%^&*()_+{}|:<>", "x" * 300 + " " * 50 + "y", "\x01\x02\x7f control",
]


def loopmdm_tokens(tokenizer, text):
    """The ids that `loopmdm tokenize --text` prints."""
    said = run_loopmdm("tokenize", "--tokenizer", tokenizer, "--text", text)
    return [int(i) for i in re.findall(r"^ *(\d+)  '", said, re.M)]


def every_character():
    """Texts with each code point after a letter, a digit, a space and itself; 4000 in a text."""
    points = [*range(1, 0x32400), *range(0xE0000, 0xE0200), 0xF0000, 0x10FFFF]
    points = [c for c in points if not 0xD800 <= c < 0xE000]  # UTF-8 has no surrogates
    for i in range(0, len(points), 4000):
        characters = map(chr, points[i: i + 4000])
        yield "".join(f"a{c} {c}{c}1{c}  {c}" for c in characters) + "end"


def check_tokenizer(text, name, *options):
    """
    loopmdm encodes as Hugging Face's tokenizers do: a whole file, awkward texts and every character
    of Unicode. Returns the folder with the tokenizer and the shards.
    """
    folder = os.path.join(OUT, name)
    make = [PYTHON, "dev/data/tinystories.py", "--out", folder, *options]
    tokenizer, encoded = (os.path.join(folder, f) for f in ("tokenizer.bin", "all.bin"))
    run(*make, "--input", text)
    theirs = Tokenizer.from_file(os.path.join(folder, "tokenizer.json"))

    def encode_file(path):
        run_loopmdm("tokenize", "--tokenizer", tokenizer, "--input", path, "--output", encoded)
        return shard(encoded)

    parts = [shard(os.path.join(folder, part)) for part in ("train.bin", "val.bin")]
    want = np.concatenate(parts)
    check(f"{name}: all {len(want)} tokens of {os.path.basename(text)}",
          not np.array_equal(encode_file(text), want))
    wrong = sum(loopmdm_tokens(tokenizer, t) != theirs.encode(t).ids for t in AWKWARD)
    check(f"{name}: {len(AWKWARD)} awkward texts, that differ", wrong)

    texts = list(every_character())
    path = os.path.join(folder, "characters.txt")
    with open(path, "w", encoding="utf-8", newline="") as f:
        f.write(EOT.join(texts))
    texts = [t.replace("\r", "\n") for t in texts]  # all line ends become \n
    want = [[theirs.token_to_id(EOT), *theirs.encode(t).ids] for t in texts]
    check(f"{name}: every character", encode_file(path).tolist() != sum(want, []))

    val = os.path.join(folder, "val.bin")
    before = file_bytes(val)
    wrong = fails("--input val.bin", [*make, "--input", val], "would overwrite")
    check(f"{name}: an output that is the input: one line, and the file stays",
          wrong or file_bytes(val) != before)
    return folder


def check_learned_signs():
    """
    A tokenizer may learn <|||> and <|=|> from text. Then they are no special tokens: loopmdm and
    gsm.py encode as Hugging Face does.
    """
    folder, draw = os.path.join(OUT, "signs"), random.Random(1)
    os.makedirs(folder)
    path, shard_path = os.path.join(folder, "text.txt"), os.path.join(folder, "text.bin")
    with open(path, "w") as f:
        f.write(EOT.join(f"x<|||>y<|=|>z <|=|> <|||>{'|' * (i % 5)}>" for i in range(500)))
    run(PYTHON, "dev/data/tinystories.py", "--input", path, "--vocab", "270", "--out", folder)
    tokenizer = os.path.join(folder, "tokenizer.bin")
    tokens, eot = gsm.read_tokenizer_bin(tokenizer)
    check("signs: <|||> and <|=|> are learned", not {b"<|||>", b"<|=|>"} <= set(tokens))

    parts = ["<|", "|>", "|||", "<|||>", "<|=|>", "=", " ", "a", "<", ">"]
    texts = ["x" + "".join(draw.choices(parts, k=draw.randint(1, 9))) + "z" for _ in range(300)]
    theirs = Tokenizer.from_file(os.path.join(folder, "tokenizer.json"))
    want = [theirs.encode(text).ids for text in texts]
    encode = gsm.make_encoder(tokens, eot)
    check("signs: gsm.py's encoder, texts that differ",
          sum(encode(text) != ids for text, ids in zip(texts, want)))
    with open(path, "w") as f:
        f.write(EOT.join(texts))
    run_loopmdm("tokenize", "--tokenizer", tokenizer, "--input", path, "--output", shard_path)
    check("signs: loopmdm's encoder",
          shard(shard_path).tolist() != sum(([eot, *ids] for ids in want), []))


def check_shuffle():
    """tinystories.py --shuffle: the stories of all files in an order that only the seed decides."""
    folder = os.path.join(OUT, "shuffle")
    os.makedirs(folder)
    files = [os.path.join(folder, name) for name in ("first.txt", "second.txt")]
    for i, path in enumerate(files):
        with open(path, "w") as f:
            f.write(EOT.join(f"story {j}" for j in range(50 * i, 50 * i + 50)))
    make = [PYTHON, "dev/data/tinystories.py", "--vocab", "260", "--val", "0.2", "--out", folder]

    def stories_with(*options):
        run(*make, "--input", *files, *options)
        tokens, eot = gsm.read_tokenizer_bin(os.path.join(folder, "tokenizer.bin"))
        parts = [shard(os.path.join(folder, part)) for part in ("train.bin", "val.bin")]
        return [b"".join(tokens[i] if i != eot else b"\0" for i in part).split(b"\0")[1:]
                for part in parts]

    all_of = [b"story %d" % j for j in range(100)]
    check("shuffle: without it, the order of the files",
          stories_with() != [all_of[:80], all_of[80:]])
    first, again, other = (stories_with("--shuffle", seed) for seed in "112")
    check("shuffle: each story once", sorted(sum(first, [])) != sorted(all_of))
    check("shuffle: the held-out stories are of both files",
          len(first[1]) != 20 or not 3 < sum(all_of.index(story) < 50 for story in first[1]) < 17)
    check("shuffle: only the seed decides", first != again or first == other)


def check_text_files(folder):
    """loopmdm tokenize and tinystories.py make the same tokens of texts from anywhere."""
    stories = ["\ufeffa byte order mark", "Windows\r\nlines\r\n\r\n", "old\rMac\r", "\r\r\n",
               "\u2003em space around\u2003", "\u00a0\u0085 more of it \u3000", "\x1cunits\x1f",
               " \t\n\v\f\r", "\u200b", "a \ufeff inside\r"]
    path = os.path.join(folder, "lines.txt")
    with open(path, "w", encoding="utf-8", newline="") as f:
        f.write(EOT.join(stories))
    mine, theirs = (os.path.join(folder, name) for name in ("lines.bin", "lines_too.bin"))
    run_loopmdm("tokenize", "--tokenizer", os.path.join(folder, "tokenizer.bin"), "--input", path,
                "--output", mine)
    tinystories.encode_shard(theirs, Tokenizer.from_file(os.path.join(folder, "tokenizer.json")),
                             tinystories.stories(path))
    check("texts from Windows, Unicode space: tokenize and tinystories.py",
          file_bytes(mine) != file_bytes(theirs))


# ---- Word problems and stories -------------------------------------------------------------------


def wrong_steps(answer, fewest=2, most=4):
    """Whether anything in a worked answer of arithmetic.c is wrong, its number of steps too."""
    match = re.fullmatch(r"((?:\d+ [-+*/] \d+ = \d+ [a-z]+\. ?)+)\n#### (\d+)", answer)
    if not match:
        return True
    steps = re.findall(r"(\d+) (.) (\d+) = (\d+)", match[1])
    for a, op, b, c in steps:
        a, b, c = int(a), int(b), int(c)
        equal = {"+": a + b == c, "-": a - b == c, "*": a * b == c, "/": c * b == a}
        if not equal[op] or not 0 <= c <= 999:
            return True
    return not fewest <= len(steps) <= most or int(steps[-1][3]) != int(match[2])


def split_problems(text):
    """The [question, answer] of each problem in a text."""
    return [p.strip().split(SEP) for p in text.split(f"{EOT}\n")[:-1]]


def decode_sequences(path, tokens, T):
    """
    The texts of a shard's sequences, each of which is end-of-text, the text, and end-of-text up to
    its end. None for other sequences.
    """
    eot, texts = tokens.index(EOT.encode()), []
    for ids in shard(path).reshape(-1, T):
        length = np.flatnonzero(np.append(ids[1:], eot) == eot)[0]
        right = ids[0] == eot and (ids[1 + length:] == eot).all()
        texts.append(b"".join(tokens[i] for i in ids[1: 1 + length]).decode() if right else None)
    return texts


def check_arithmetic():
    """The word problems of arithmetic.c, and arithmetic.tok."""
    program, n = "build/arithmetic", 10000
    text = run(program, "--seed", "2", "--count", str(n))
    problems = split_problems(text)
    more = run(program, "--seed", "2", "--count", str(n + 9))
    other = run(program, "--seed", "3", "--count", str(n))
    check("arithmetic: the same problems before more, others with another seed",
          (not more.startswith(text)) + (other == text))
    for cc in filter(shutil.which, ("gcc", "clang")):
        compiled = os.path.join(OUT, "arithmetic_" + cc)
        run(cc, "-std=c11", "-O1", "-Wall", "-Wextra", "-Werror", "dev/data/arithmetic.c", "-o",
            compiled)
        check(f"arithmetic: the same text from {cc}",
              run(compiled, "--seed", "2", "--count", str(n)) != text)

    wrong = sum(wrong_steps(answer) for _, answer in problems)
    check(f"arithmetic: {n} problems with wrong steps", wrong + abs(len(problems) - n))
    for steps in range(1, 5):
        some = split_problems(run(program, "--seed", "2", "--count", "500", "--steps", str(steps)))
        wrong = sum(wrong_steps(answer, steps, steps) for _, answer in some)
        check(f"arithmetic: 500 problems of {steps} steps, that are wrong",
              wrong + abs(len(some) - 500))
    small = run(program, "--count", "500", "--largest", "20")
    check("arithmetic: 500 problems with numbers up to 20, largest number",
          max(map(int, re.findall(r"\d+", small))) - 20)
    wrong = sum(wrong_steps(answer) for _, answer in split_problems(small))
    check("arithmetic: those, that are wrong", wrong + abs(small.count("####") - 500))

    questions = {question for question, _ in problems}
    check(f"arithmetic: of {n} problems, not distinct", n - len(questions), 10)
    check("arithmetic: questions of one seed that another has too",
          sum(question in questions for question, _ in split_problems(other)), 10)
    words = set(re.findall("[A-Za-z]+", " ".join(map("".join, problems))))
    check(f"arithmetic: {len(words)} words", len(words), 150)
    check_arithmetic_tokens(program, text, problems)


def check_arithmetic_tokens(program, text, problems):
    """The same problems as JSON and as sequences of 96 tokens, from gsm.py and from loopmdm."""
    T, tok, n = 96, "dev/data/arithmetic.tok", len(problems)
    names = ("problems.jsonl", "problems.txt", "problems.bin", "all.jsonl", "all.bin")
    as_json, as_text, sequences, all_json, encoded = (os.path.join(OUT, name) for name in names)
    run(program, "--seed", "2", "--count", str(n), "--jsonl", "--output", as_json)
    with open(as_json) as f:
        items = [json.loads(line) for line in f]
    wrong = sum([i["question"], i["answer"]] != p for i, p in zip(items, problems))
    check("arithmetic: problems that differ as text and as JSON", wrong + abs(len(items) - n))

    run(PYTHON, "dev/data/gsm.py", "--input", as_json, "--output", sequences, "--tokenizer", tok,
        "--rows-of", str(T))
    tokens, eot = gsm.read_tokenizer_bin(tok)
    encode = gsm.make_encoder(tokens, eot)
    ids = [[encode(part) for part in problem] for problem in problems]
    fit = [SEP.join(p) for p, i in zip(problems, ids) if sum(map(len, i)) + 2 <= T]
    check("arithmetic: problems that fit 96 tokens come back from a shard",
          decode_sequences(sequences, tokens, T) != fit)
    check("arithmetic: share of problems too long for 96 tokens", 1 - len(fit) / n, 0.01)
    check("arithmetic.tok: tokens with two digits",
          sum(bool(re.search(rb"\d.*\d", token)) for token in tokens))

    tokenize = ["./loopmdm", "tokenize", "--tokenizer", tok, "--input", as_text,
                "--output", encoded]
    with open(as_text, "w") as f:
        f.write(text.replace(SEP, EOT))  # so that loopmdm encodes each part by itself
    run(*tokenize)
    want = [i for problem in ids for part in problem for i in (eot, *part)]
    check(f"arithmetic: the same {len(want)} tokens from gsm.py and loopmdm tokenize",
          shard(encoded).tolist() != want)
    with open(as_text, "w") as f:
        f.write(text)
    run(*tokenize, "--rows-of", str(T))
    check("arithmetic: the same sequences from gsm.py and loopmdm tokenize --rows-of",
          file_bytes(encoded) != file_bytes(sequences))

    run(program, "--seed", "1", "--count", "40000", "--jsonl", "--output", all_json)
    trained = os.path.join(OUT, "all.tok")
    tinystories.write_tokenizer_bin(trained, *gsm.train_tokenizer(all_json, len(tokens)))
    check("arithmetic.tok: its command gives the same", file_bytes(tok) != file_bytes(trained))


def check_templates():
    """stories.c --templates: each is its story without some words, which were told before."""
    options = "--seed", "5", "--count", "1000"
    stories = run("build/stories", *options).split(f"\n{EOT}\n")[:-1]
    templates = run("build/stories", *options, "--templates").splitlines()
    blanks = wrong = untold = 0
    for template, story in zip(templates, stories):
        match = re.fullmatch(r"(\w+|\n)".join(map(re.escape, template.split("____"))), story)
        wrong += not match
        for k in range(1, template.count("____") + 1) if match else ():
            before, word = story[:match.start(k)], match[k]
            blanks += 1
            if word == "\n":
                untold += before.count("\n")
            else:
                untold += not re.search(rf"\b{word}\b", before, re.IGNORECASE)
    check("stories: 1000 templates that are not their stories",
          wrong + abs(len(templates) - 1000) + abs(len(stories) - 1000))
    check(f"stories: of {blanks} blanks, not told before", untold if blanks > 5000 else 1)


def check_gsm():
    """gsm.py: the format of GSM8K, awkward texts, and wrong input."""
    folder, T = os.path.join(OUT, "gsm"), 128
    os.makedirs(folder)
    names = ("input.jsonl", "rows.bin", "rows.tok", "bad.jsonl")
    path, out, tok, bad = (os.path.join(folder, name) for name in names)
    question = "Natalia sold 48 clips in April, half as many in May. How many?"
    sold = {"question": f" {question}\n",
            "answer": "In May 48/2 = <<48/2=24>>24 clips.\nIn all 48+24 = <<48+24=72>>72.\n#### 72"}
    texts = [(question, "In May 48/2 = 24 clips.\nIn all 48+24 = 72.\n#### 72")]
    items = [sold, {"question": "7 " * 200, "answer": "too long"}]
    for awkward in AWKWARD:
        awkward = awkward.replace(EOT, "")[:20]
        answer = f"{awkward} #### {len(awkward)}"
        items.append({"question": awkward, "answer": answer, "more": None})
        texts.append((awkward.strip(tinystories.SPACE), answer.strip(tinystories.SPACE)))
    lines = [json.dumps(item, ensure_ascii=i % 2 == 0) for i, item in enumerate(items)]
    with open(path, "w", encoding="utf-8-sig", newline="") as f:
        f.write("\r\n\r\n".join(lines))

    usual = {"--input": path, "--output": out, "--tokenizer": tok, "--rows-of": str(T)}

    def command(changes, *more):
        options = {**usual, **changes}
        return [PYTHON, "dev/data/gsm.py", *(w for pair in options.items() for w in pair), *more]

    said = run(*command({}, "--train-tokenizer", "300"))
    tokens, eot = gsm.read_tokenizer_bin(tok)
    encode = gsm.make_encoder(tokens, eot)
    lengths = [sum(len(encode(part)) for part in p) + 2 for p in texts]
    fit = [SEP.join(p) for p, length in zip(texts, lengths) if length <= T]
    check("gsm: sequences that are not the texts without annotations",
          sum(a != b for a, b in zip(decode_sequences(out, tokens, T), fit)))
    left_out = f"{len(items) - len(fit)} of {len(items)}"
    counted = re.search(rf": {len(fit)} \w+ of {T} tokens; {left_out} problems left out", said)
    check("gsm: the numbers of sequences and of problems left out", not counted)
    check("gsm: awkward texts that loopmdm encodes otherwise",
          sum(loopmdm_tokens(tok, t) != encode(t) for t in AWKWARD if "<|" not in t))
    longest = max(lengths)
    run(*command({"--rows-of": str(longest)}))
    check("gsm: a problem that is just as long as a sequence is kept",
          abs(len(shard(out)) - longest * len(texts)))

    before = {name: file_bytes(folder, name) for name in os.listdir(folder)}
    good, wrong = json.dumps(sold).encode() + b"\n", 0
    for line, words in (
            (b'{"question": "a", "answer": ', "line 2: not JSON"),
            (b'{"question": "\xff", "answer": "b"}', "line 2: not JSON in UTF-8"),
            (b"[1, 2]", "line 2: not an object"),
            (b'{"question": "a"}', 'line 2: no text in "answer"'),
            (b'{"question": " ", "answer": "b"}', 'line 2: no text in "question"'),
            (b'{"question": 1, "answer": "b"}', 'line 2: no text in "question"'),
            (b'{"question": "a<|sep|>", "answer": "b"}', "line 2: <|sep|>"),
            (b'{"question": "\\ud800", "answer": "b"}', "line 2: half a character"),
            (b"[" * 100000, "line 2: not JSON")):
        with open(bad, "wb") as f:
            f.write(good + line + b"\n" + good)
        for train in ([], ["--train-tokenizer", "300"]):
            wrong += fails(line[:50], command({"--input": bad}, *train), words)
    check("gsm: malformed lines not reported", wrong)
    with open(bad, "wb") as f:
        f.write(b"\n\n")
    wrong = 0
    for name, changes, words in (
            ("no separator", {"--tokenizer": "dev/data/stories.tok"}, "has no token <|sep|>"),
            ("no input", {"--input": "none"}, "none: No such file"),
            ("no tokenizer", {"--tokenizer": "none"}, "none: No such file"),
            ("no tokenizer.bin", {"--tokenizer": "dev/data/README.md"}, "not a tokenizer.bin"),
            ("empty", {"--input": bad}, "no problems"),
            ("all too long", {"--rows-of": "4"}, "are too long"),
            ("too little text", {"--train-tokenizer": "5000"}, "enough for a vocabulary of"),
            ("a folder", {"--output": folder}, "is a folder"),
            ("no such folder", {"--output": "none/rows.bin"}, "none/rows.bin.tmp: No such file"),
            ("tokenizer a folder", {"--tokenizer": folder, "--train-tokenizer": "300"},
             "is a folder")):
        wrong += fails(name, command(changes), words)
    check("gsm: other errors not reported", wrong)
    os.remove(bad)
    after = {name: file_bytes(folder, name) for name in os.listdir(folder)}
    check("gsm: an error leaves all files as they were", before != after)


# ---- Sudoku --------------------------------------------------------------------------------------


def same_unit(size):
    """For each cell of a Sudoku, the other cells in its row, column or box."""
    height, width = {4: (2, 2), 6: (2, 3), 9: (3, 3)}[size]
    cells = [(r, c, (r // height, c // width)) for r in range(size) for c in range(size)]
    return [[j for j, other in enumerate(cells)
             if other != cell and any(u == v for u, v in zip(cell, other))] for cell in cells]


def solutions(puzzle, size, peers, limit=2):
    """At most `limit` of them, by brute force: each blank in turn, each digit in turn."""
    if 0 not in puzzle:
        return [puzzle]
    cell, found = puzzle.index(0), []
    for digit in range(1, size + 1):
        if len(found) < limit and all(puzzle[j] != digit for j in peers[cell]):
            filled = puzzle[:cell] + [digit] + puzzle[cell + 1:]
            found += solutions(filled, size, peers, limit - len(found))
    return found


def check_sudoku():
    """Boards and puzzles of dev/data/sudoku.c, its errors, and that loopmdm takes its files."""
    folder, program = os.path.join(OUT, "sudoku"), "build/sudoku"
    os.makedirs(folder)

    def path(name):
        return os.path.join(folder, name)

    def boards_of(name, size, count, *options):
        """The boards that it writes, or none if the file is not a shard of `count` boards."""
        run(program, "--size", str(size), "--output", path(name), *options)
        header, n = np.fromfile(path(name), np.int32, 256), count * size * size
        right = np.array_equal(header, [20240520, 1, n] + [0] * 253)
        right = right and os.path.getsize(path(name)) == 1024 + 2 * n
        return shard(path(name)).reshape(-1, size * size).tolist() if right else []

    peers = {size: same_unit(size) for size in (4, 6, 9)}
    for size in peers:
        boards = boards_of("boards.bin", size, 1000, "--count", "1000")
        right = [all(1 <= v <= size and all(v != b[j] for j in peers[size][i])
                     for i, v in enumerate(b)) for b in boards]
        check(f"sudoku: 1000 boards of size {size}, that are wrong", 1000 - sum(right))
        check(f"sudoku: the first 10 of 1000 boards of size {size} are the same as 10 boards",
              boards_of("fewer.bin", size, 10, "--count", "10") != boards[:10])
        if size > 4:  # of size 4 there are only 288
            other = boards_of("other.bin", size, 1000, "--seed", "2")
            check(f"sudoku: 1000 boards of size {size}, that are the same with another seed",
                  sum(map(list.__eq__, boards, other)))
    for size, givens, count in ((4, 4, 50), (6, 16, 50), (6, 10, 50), (9, 30, 10)):
        options = "--givens", str(givens), "--count", str(count), "--seed"
        pairs = boards_of("puzzles.bin", size, 2 * count, *options, "3")
        puzzles, answers = pairs[::2], pairs[1::2]
        wrong = sum(sum(v > 0 for v in p) != givens for p in puzzles)
        check(f"sudoku: {count} puzzles of size {size}, without exactly {givens} givens",
              wrong if pairs else 1)
        wrong = sum(solutions(p, size, peers[size]) != [a] for p, a in zip(puzzles, answers))
        check(f"sudoku: {count} puzzles of size {size}, that have other solutions than their own",
              wrong if pairs else 1)
        again = boards_of("again.bin", size, 2 * count, *options, "3")
        check("sudoku: the same seed again, boards that differ",
              sum(map(list.__ne__, pairs, again)))
        other = boards_of("other.bin", size, 2 * count, *options, "4")
        check("sudoku: another seed, puzzles that are the same",
              sum(map(list.__eq__, puzzles, other[::2])))

    with open(path("pairs.csv"), "w") as file:
        file.write("puzzle,solution,nodes\n")
        for puzzle, answer in zip(puzzles, answers):
            texts = ("".join(".123456789"[v] for v in b) for b in (puzzle, answer))
            file.write(",".join(texts) + ",7\n")
    check("sudoku: 10 puzzles from a file, that differ",
          boards_of("from.bin", 9, 20, "--from", path("pairs.csv")) != pairs)
    check("sudoku: the first 3 puzzles of a file, that differ",
          boards_of("from.bin", 9, 6, "--from", path("pairs.csv"), "--count", "3") != pairs[:6])

    check_sudoku_errors(program, path)
    for size in peers:
        digits = "123456789"[:size]
        run(program, "--size", str(size), "--tokenizer", path("sudoku.tok"))
        ids = loopmdm_tokens(path("sudoku.tok"), f".{digits}.{EOT}")
        check(f"sudoku: loopmdm reads the tokenizer of size {size}",
              ids != [0, *range(1, size + 1), 0, size + 1])
    run_loopmdm("train", "--data", path("boards.bin"), "--tokenizer", path("sudoku.tok"),
                "--seq-len", "81", "--layers", "1", "--channels", "16", "--heads", "1",
                "--loop", "0:1", "--max-loops", "1", "--batch", "1", "--steps", "1",
                "--out", path("model"))
    check("sudoku: loopmdm trains on boards: steps", abs(column(path("model"), "step")[-1] - 1))


def check_sudoku_errors(program, path):
    """Wrong command lines and a full disk: one line each, and no file changes."""
    folder, out = path(""), path("new.bin")
    before = sorted(os.listdir(folder))

    def files_after(status, *options, before_it=None):
        """The files after an error with this status and one line; None after anything else."""
        done = subprocess.run([program, *options], capture_output=True, preexec_fn=before_it)
        said = done.stderr.decode(errors="replace")
        right = done.returncode == status and not done.stdout
        if right and re.fullmatch(r"sudoku: [^\n]+\n", said):
            return sorted(os.listdir(folder))
        print(options, done.returncode, said)

    six = "--size", "6", "--output", out
    bad = [
        (), ("--size",), ("--size", "6"), ("--size", "5", "--output", out),
        ("--size", "06", "--output", out), ("--output", out), (*six, "--count"),
        (*six, "--count", "0"), (*six, "--count", "-1"), (*six, "--count", "1e3"),
        (*six, "--count", " 7"), (*six, "--count", "59652324"),
        (*six, "--count", "29826162", "--givens", "16"), (*six, "--count", "99999999999999999999"),
        (*six, "--givens", "0"), (*six, "--givens", "37"), (*six, "--seed", "18446744073709551616"),
        (*six, "--seed", ""), (*six, "--sead", "1"), (*six, "new.bin"), (*six, "--tokenizer", out),
        (*six, "--tokenizer", path("./new.bin")), (*six, "--tokenizer", path("../sudoku/new.bin")),
        (*six, "--tokenizer", out + ".tmp"),
        ("--size", "6", "--output", out + ".tmp", "--tokenizer", out),
        ("--size", "6", "--tokenizer", out, "--count", "5"),
        (*six, "--from", "x", "--givens", "9"), (*six, "--from", "x", "--seed", "1"),
        ("--size", "6", "--tokenizer", out, "--from", "x"), (*six, "--from"),
    ]
    check(f"sudoku: of {len(bad)} wrong command lines, without one line, status 2 and no file",
          sum(files_after(2, *options) != before for options in bad))
    wrong = files_after(1, *six, "--givens", "5", "--tokenizer", path("new.tok")) != before
    wrong += files_after(1, "--size", "6", "--output", path("no/new.bin")) != before
    check("sudoku: no such puzzle or folder: one line, status 1 and no file", wrong)
    solution, other, bad_file = "1234341221434321", "4321214334121234", path("bad.csv")
    pair = f".{solution[1:]},{solution}\n"
    files = [
        "", "puzzle,solution\n", "puzzle\nsolution\n" + pair, pair[1:], pair.replace(",", ";"),
        pair[:-2] + "\n", pair[:-1] + "1\n", pair[:-1] + ".\n", pair[:-1] + " \n",
        pair.replace(",1", ",2"), "." * 17 + pair[16:], "2" + pair[1:], "5" + pair[1:],
        f"{'.' * 16},{'.' * 16}\n", f".{solution[1:]},.{solution[1:]}\n",
        f".{solution[1:]},{other}\n",
    ]
    wrong = 0
    for text in files:
        with open(bad_file, "w") as file:
            file.write(text)
        before = sorted(os.listdir(folder))
        wrong += files_after(1, "--size", "4", "--output", out, "--from", bad_file) != before
    wrong += files_after(1, "--size", "4", "--output", out, "--from", path("none")) != before
    check(f"sudoku: of {len(files) + 1} files that are no puzzles, without one line and status 1",
          wrong)
    with open(bad_file, "w", newline="") as file:
        file.write(f"{pair[:-1]}\r\n\n{pair[:-1]}")  # as on Windows; an empty line; no end
    run(program, "--size", "4", "--output", path("from.bin"), "--from", bad_file)
    check("sudoku: puzzles of a file with other line ends", len(shard(path("from.bin"))) != 64)
    wrong = sum(files_after(2, "--size", "4", "--output", name, "--from", bad_file) is None
                for name in (bad_file, path("./bad.csv")))
    os.rename(bad_file, out + ".tmp")
    wrong += files_after(2, "--size", "4", "--output", out, "--from", out + ".tmp") is None
    check("sudoku: --from is an output, without one line and status 2",
          wrong + (not os.path.exists(out + ".tmp")))
    with contextlib.suppress(FileNotFoundError):
        os.remove(out + ".tmp")
    before = sorted(os.listdir(folder))
    boards, old = path("boards.bin"), file_bytes(path("boards.bin"))
    for name in ("--output", "--tokenizer"):
        wrong = files_after(1, "--size", "9", name, boards, before_it=no_room) != before
        check(f"sudoku: no room, {name}: one line, status 1 and the old file",
              wrong or file_bytes(boards) != old)
    os.symlink(os.path.abspath(boards), out + ".tmp")
    run(program, "--size", "4", "--output", out)
    check("sudoku: a link named FILE.tmp is not followed",
          file_bytes(boards) != old or os.path.islink(out))
    os.remove(out)
    if os.path.exists("/dev/full"):
        check("sudoku: --output /dev/full: one line and status 1",
              files_after(1, "--size", "9", "--output", "/dev/full") != before)


def no_room():
    """A process that begins with this may not write more than 16 bytes into a file."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (16, 16))


def check_rule30():
    """Sequences of dev/data/rule30.py against the rule as a table, its errors and its tokenizer."""
    folder, program = os.path.join(OUT, "rule30"), "dev/data/rule30.py"
    os.makedirs(folder)
    out, tok = os.path.join(folder, "rows.bin"), os.path.join(folder, "rows.tok")

    def rows_of(*options):
        """The first rows, as numbers, and how many sequences are wrong."""
        run(sys.executable, program, "--count", "300", "--output", out, "--tokenizer", tok,
            *options)
        header = np.fromfile(out, np.int32, 256).tolist()
        wrong, first = int(header != [20240520, 1, 300 * 178] + [0] * 253), []
        for tokens in shard(out).reshape(-1, 2 + 16 * 11).tolist():
            cells = [token - 1 for token in tokens[1:17] + tokens[18:]]
            rows = [cells[i:i + 16] for i in range(0, len(cells), 16)]
            follows = all(rows[k + 1][i] == 30 >> (4 * row[i - 1] + 2 * row[i] + row[(i + 1) % 16])
                          & 1 for k, row in enumerate(rows[:-1]) for i in range(16))
            wrong += not follows or tokens[0] != 4 or tokens[17] != 3
            first.append(sum(cell << i for i, cell in enumerate(rows[0])))
        return first, wrong + (len(first) != 300)

    train, wrong = rows_of("--seed", "5")
    test, wrong_too = rows_of("--seed", "5", "--test")
    check("rule30: 600 sequences, that are wrong", wrong + wrong_too)
    other = rows_of("--seed", "6")[0]
    check("rule30: first rows of training that are in the test, too",
          len({*train, *other} & {*test}))
    check("rule30: first rows that come again with another seed",
          max(0, len({*train} & {*other}) - 9))  # of 49,000, two or three
    for name, numbers in (("training", train), ("test", test)):
        # Each cell is 1 in a half of the 300 first rows. Nine of them are the standard deviation.
        ones = [sum(n >> i & 1 for n in numbers) for i in range(16)]
        check(f"rule30: cells of the {name} that are not as often 0 as 1",
              sum(abs(one - 150) > 45 for one in ones))
    check("rule30: loopmdm reads the tokenizer",
          loopmdm_tokens(tok, f".01>{EOT}") != [0, 1, 2, 3, 4])
    before, new = sorted(os.listdir(folder)), out + "x"
    wrong = 0
    for status, *options in ((2, "--cells", "7"), (2, "--rows", "0"), (2, "--count", "-1"),
                             (2, "--count", "99999999"), (2, "--tokenizer", new),
                             (2, "--seed", "-1"), (2, "--output", ""), (1, "--output", folder),
                             (1, "--output", os.path.join(folder, "no", "rows.bin"))):
        done = subprocess.run([sys.executable, program, "--output", new, *options],
                              capture_output=True, text=True)
        said = done.stderr.splitlines() or [""]
        right = done.returncode == status and said[-1].startswith("rule30.py: ")
        wrong += not right or sorted(os.listdir(folder)) != before
    check("rule30: wrong command lines, without their status, a line, or with a file", wrong)


# ---- Reference files -----------------------------------------------------------------------------


def reference_tensors(path):
    """{name: float64 array} of a reference file."""
    data, at, out = file_bytes(path), 1024, {}
    for _ in range(np.frombuffer(data, np.int32, 3)[2]):
        name = data[at: at + 32].rstrip(b"\0").decode()
        kind, _, *sizes = np.frombuffer(data, np.int32, 6, at + 32).tolist()
        dtype = np.dtype({1: np.int32, 2: np.float32, 3: np.float64}[kind])
        count = int(np.prod(sizes))
        out[name] = np.frombuffer(data, dtype, count, at + 56).astype(np.float64)
        at += 56 + count * dtype.itemsize
    return out


def check_reference():
    """The reference files in the repository are what dump.py writes."""
    for name, (shape, *rest) in dump.SMALL_CASES.items():
        ours, theirs = os.path.join(OUT, name + ".bin"), f"dev/reference/{name}.bin"
        dump.dump(ours, reference.make_config(*shape), *rest)
        check(f"{name}.bin: size", abs(os.path.getsize(ours) - os.path.getsize(theirs)))
        x, y = reference_tensors(ours), reference_tensors(theirs)
        check(f"{name}.bin: names of tensors, that differ", len(x.keys() ^ y.keys()))
        errors = [np.abs(x[k] - y[k]).max() / max(1, np.abs(y[k]).max()) for k in x if k in y]
        check(f"{name}.bin: numbers", float(max(errors)), 1e-5)


# ---- Training, evaluation and samples, beside PyTorch --------------------------------------------


def column(folder, name):
    """A column of a training's log."""
    with open(os.path.join(folder, "log.csv")) as f:
        return [float(line[name]) for line in csv.DictReader(f)]


def largest(a, b):
    """The largest difference; infinite if the lists are not of the same length."""
    return max(map(abs, np.subtract(a, b))) if len(a) == len(b) > 0 else np.inf


def new_folder(*names):
    """Paths in OUT where there is nothing yet."""
    paths = [os.path.join(OUT, name) for name in names]
    for path in paths:
        shutil.rmtree(path, ignore_errors=True)
    return paths


def losses_printed(said):
    """(step, mean loss) of each line of progress."""
    return [(int(step), float(loss))
            for step, loss in re.findall(r"^step (\d+)/\d+ \| loss (\S+) ", said, re.M)]


def tensors_of(path, magic, version):
    """The parameters, moments and average in a checkpoint file, each as one array."""
    parts = reference.read_floats(path, magic, version)[2]
    return [np.concatenate([t.numpy().ravel() for t in part.values()]) for part in parts]


def check_model_file(what, folder):
    """model.bin has the average of the parameters if there is one, else the parameters."""
    state = tensors_of(os.path.join(folder, "state.bin"), reference.STATE_MAGIC, 3)
    model, = tensors_of(os.path.join(folder, "model.bin"), reference.MODEL_MAGIC, 1)
    averaged = len(state) == 4
    name = "average" if averaged else "parameters"
    check(f"{what}: model.bin has the {name}", not np.array_equal(model, state[-averaged]))
    if averaged:
        check(f"{what}: the average is no copy", np.array_equal(state[3], state[0]))
    return state


def check_checkpoints(model):
    """Each program writes the same files, and resumes from those that the other one wrote."""
    for what, options in (("", []), (", average", ["--ema", "0.9"])):
        c, p = new_folder("c", "pytorch")
        train = ["train", *model, *options, "--warmup", "3", "--noise-warmup", "8", "--steps"]
        run_loopmdm(*train, "5", "--out", c)
        os.makedirs(p)
        reference.checkpoint_save(p, reference.checkpoint_load(c))
        for name in ("state.bin", "model.bin"):
            check(f"{name}{what}: from C through PyTorch, the same bytes",
                  file_bytes(c, name) != file_bytes(p, name))
        check_model_file(f"C{what}", c)

        # c: C, C, PyTorch. p: C, PyTorch, C.
        shutil.copy(os.path.join(c, "log.csv"), p)
        run_loopmdm(*train, "10", "--out", c, "--resume")
        run_reference(*train, "10", "--out", p, "--resume")
        check_model_file(f"PyTorch{what}", p)
        run_reference(*train, "12", "--out", c, "--resume")
        run_loopmdm(*train, "12", "--out", p, "--resume")
        check(f"C, C, PyTorch beside C, PyTorch, C{what}: steps",
              largest(column(c, "step"), list(range(1, 13))))
        check(f"C, C, PyTorch beside C, PyTorch, C{what}: loss",
              largest(column(c, "loss"), column(p, "loss")), 1e-4)
        states = [check_model_file(f"{name}{what}, step 12", folder)
                  for name, folder in (("PyTorch", c), ("C", p))]
        check(f"C, C, PyTorch beside C, PyTorch, C{what}: state.bin, relative",
              max(relative(a, b) for a, b in zip(*states)), 1e-4)

        # A save that was interrupted leaves an old model.bin beside a new state.bin.
        for name, folder, program in (("C", c, run_loopmdm), ("PyTorch", p, run_reference)):
            before = file_bytes(folder, "model.bin")
            os.remove(os.path.join(folder, "model.bin"))
            program(*train, "12", "--out", folder, "--resume")
            check(f"{name}{what}: --resume writes model.bin from state.bin",
                  file_bytes(folder, "model.bin") != before)


def refused(said, *command):
    """1 unless train_gpt2style.py refuses these words with one line that has `said`."""
    try:
        run_reference(*command)
    except SystemExit as end:
        return said not in str(end.code) or "\n" in str(end.code)
    return 1


def check_temporary(path, other, command):
    """PyTorch writes FILE.tmp first. A link of this name is not followed, a folder is an error."""
    good, before = file_bytes(path), file_bytes(other)
    os.remove(path)
    os.symlink(other, path + ".tmp")
    run_reference(*command)
    check("PyTorch: a link named model.bin.tmp is not followed",
          file_bytes(path) != good or os.path.islink(path) or file_bytes(other) != before)

    os.remove(path)
    os.mkdir(path + ".tmp")
    check("PyTorch refuses: a folder named model.bin.tmp",
          refused("what was there stays", *command))
    os.rmdir(path + ".tmp")
    run_reference(*command)


def check_nothing_is_lost(data, model):
    """What training finds on disk stays, or is written again."""
    folder, = new_folder("c")
    train = ["train", *model, "--out", folder, "--steps"]
    run_loopmdm(*train, "3")
    model_path, state_path = (os.path.join(folder, name) for name in ("model.bin", "state.bin"))
    good, state = file_bytes(model_path), file_bytes(state_path)
    for what, bad in (("damaged", good[:5000] + b"?" + good[5001:]), ("empty", b"")):
        with open(model_path, "wb") as f:
            f.write(bad)
        run_loopmdm(*train, "3", "--resume")
        check(f"a {what} model.bin is written again from state.bin", file_bytes(model_path) != good)

    input_path = os.path.join(OUT, "inputs", "log.csv")
    os.makedirs(os.path.dirname(input_path))
    shutil.copy(model[1], input_path)
    check_temporary(model_path, os.path.abspath(input_path), [*train, "3", "--resume"])
    check("PyTorch: a model whose loss is not finite is not saved",
          refused("is not finite, so this is not saved", *train, "4", "--lr", "1e30", "--resume")
          or (file_bytes(model_path), file_bytes(state_path)) != (good, state))
    for what, said, words in (
            ("a model that is there", "is already there", [*train, "4"]),
            ("a finished training", "is at step 3, beyond --steps 2", [*train, "2", "--resume"]),
            ("other columns of log.csv", "has other columns",
             [*train, "4", "--resume", "--val-data", os.path.join(data, "val.bin")]),
            ("too many tokens", "impossible model: 70000 tokens",
             ["train", *model[:2], "--vocab", "70000", "--out", "no"]),
            ("no tokenizer", "is not a tokenizer.bin",
             ["train", *model[:2], "--tokenizer", model[1], "--out", "no"])):
        check(f"PyTorch refuses: {what}", refused(said, *words))
    check("PyTorch refuses: data that it would overwrite",
          refused("would overwrite", "train", "--data", input_path, *model[2:], "--out",
                  os.path.dirname(input_path)) or file_bytes(input_path) != file_bytes(model[1]))

    with open(input_path, "w") as f:
        f.write("notes\n")
    check("PyTorch refuses: a log.csv that is none", refused("is no log of a training", *train[:-3],
          "--out", os.path.dirname(input_path)) or file_bytes(input_path) != b"notes\n")

    with open(state_path, "wb") as f:
        f.write(state[:4] + struct.pack("i", 2) + state[8:])
    said = f"begin again with --init {folder}"
    check("state.bin of an older version: one line says what to do",
          fails("older", ["./loopmdm", *train, "4", "--resume"], said)
          or refused("of version 3", *train, "4", "--resume"))


def check_interrupted_at_the_end(data, model):
    """Ctrl-C during the last step: the training is done, and validated."""
    folder, = new_folder("c")
    process = subprocess.Popen(["./loopmdm", "train", *model, "--batch", "512", "--steps", "2",
                                "--val-data", os.path.join(data, "val.bin"), "--val-rows", "8",
                                "--out", folder], stdout=subprocess.PIPE, text=True)
    while "step 1/2" not in process.stdout.readline():
        pass
    process.send_signal(signal.SIGINT)
    said = process.communicate()[0]
    check("Ctrl-C during the last step: exit status 0, and a validation",
          process.returncode != 0 or "validation" not in said)
    with open(os.path.join(folder, "log.csv")) as log:
        check("Ctrl-C during the last step: the validation is in log.csv",
              not list(csv.DictReader(log))[-1]["val_nelbo_s4"])


def relative(a, b):
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


def check_side_by_side(name, model, options, first=None):
    """
    The same training in C and in PyTorch. first: a folder with a model to begin with. Returns both
    folders and what both printed.
    """
    c, p = new_folder("c", "pytorch")
    words = ["train", *model, *options]
    if first:
        said = [run_loopmdm(*words, "--out", c, "--init", first)]
        said.append(run_reference(*words, "--out", p, *begin_with(first, p, model, options)))
    else:
        said = [run_loopmdm(*words, "--out", c), run_reference(*words, "--out", p)]
    error = largest(column(c, "loss"), column(p, "loss"))
    check(f"{name}: loss, largest difference", error, 1e-3 if "200" in name else 1e-4)
    for key, tolerance in (("step", 0), ("loops", 0), ("t", 0), ("lr", 1e-12), ("flops", 1e3)):
        error = largest(column(c, key), column(p, key))
        check(f"{name}: {key}, largest difference", error, tolerance)
    return c, p, said


def begin_with(first, folder, model, options):
    """
    Writes the checkpoint of a training of no steps with the parameters in model.bin of `first`.
    PyTorch resumes it where loopmdm has --init. Returns the option for that.
    """
    words = [*model, *options]
    a, b = map(int, words[words.index("--loop") + 1].split(":"))
    other, _ = reference.model_load(first)
    model = reference.LoopMDM(replace(other.config, loop_start=a, loop_end=b),
                              dict(other.named_parameters()))
    optimizer = reference.make_optimizer(model, 0.0, 0.1)
    for p in model.parameters():
        optimizer.state[p] = {"exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
    os.makedirs(folder)
    batch = int(words[words.index("--batch") + 1])
    reference.checkpoint_save(folder, reference.Run(model, optimizer, None, 0, batch, 1, 0.0))
    return ["--resume"]


def check_training(data):
    """Checkpoints to and fro, and trainings side by side from the same seed."""
    model = ["--data", os.path.join(data, "train.bin"),
             "--tokenizer", os.path.join(data, "tokenizer.bin"), "--layers", "4",
             "--channels", "32", "--heads", "2", "--seq-len", "32", "--loop", "1:3",
             "--max-loops", "4", "--batch", "8"]
    check_checkpoints(model)
    check_nothing_is_lost(data, model)
    check_interrupted_at_the_end(data, model)

    val = os.path.join(data, "val.bin")
    options = ["--val-data", val, "--val-every", "100", "--val-rows", "64", "--steps", "200",
               "--warmup", "20"]
    c, p, said = check_side_by_side("200 steps", model, options)
    losses = column(c, "loss"), column(p, "loss")
    print("\n200 steps side by side   step   loss in C   loss in PyTorch")
    for step in (0, 19, 49, 99, 149, 199):
        print(f"{step + 1:>29}   {losses[0][step]:.6f}   {losses[1][step]:.6f}")
    print()
    for S in (1, 2, 4):
        with open(os.path.join(c, "log.csv")) as f, open(os.path.join(p, "log.csv")) as g:
            nelbo = [[float(line[f"val_nelbo_s{S}"] or 0) for line in csv.DictReader(log)]
                     for log in (f, g)]
        check(f"200 steps: validation NELBO, S={S}", largest(*nelbo), 1e-4)
        check(f"200 steps: two validations, S={S}", np.count_nonzero(nelbo[0]) != 2)
    lines = [losses_printed(text) for text in said]
    check("200 steps: lines are printed after steps 1, 10, 20, ..",
          [step for step, _ in lines[0]] != [1, *range(10, 201, 10)])
    check("200 steps: the same lines, mean loss",
          largest(np.ravel(lines[0]), np.ravel(lines[1])), 2e-3)
    want = [np.mean(losses[0][1:10]), np.mean(losses[0][190:])]
    check("200 steps: the printed loss is the mean since the line before",
          largest([lines[0][1][1], lines[0][-1][1]], want), 1e-4)
    check_eval_and_sample(c, data, val)

    # What else training can do. Then models learn from sequences with a context.
    check_side_by_side("average, flops", model, ["--ema", "0.9", "--loop-dist", "flops",
                                                 "--accum", "2", "--steps", "20", "--warmup", "5",
                                                 "--noise-warmup", "12"])
    states = [check_model_file(f"average, flops, {name}", os.path.join(OUT, name))
              for name in ("c", "pytorch")]
    check("average, flops: the average, relative", relative(states[0][3], states[1][3]), 1e-4)
    plain = ["0:0" if word == "1:3" else word for word in model]
    c, _, said = check_side_by_side("no loop", plain, ["--val-data", val, "--steps", "9"])
    check("no loop: every step has one, and one NELBO",
          "no loop," not in said[0] or max(column(c, "loops")) != 1 or "S=2" in said[0])
    problems = os.path.join(OUT, "problems.bin")
    answers = ["--data", problems, "--val-data", problems, "--val-rows", "32", "--batch", "4",
               "--tokenizer", "dev/data/arithmetic.tok", "--model", "d2", "--seq-len", "96",
               "--layers", "3", "--answers-after", SEP, "--warmup", "5"]
    c, _, _ = check_side_by_side("answers", answers, ["--steps", "20", "--ema", "0.5",
                                                     "--loop-dist", "top"])
    evaluate = ["eval", "--model", c, "--data", problems, "--rows", "32", "--loops", "1,4",
                "--answers-after", SEP]
    said = [run_loopmdm(*evaluate), run(PYTHON, "train_gpt2style.py", *evaluate)]
    check("answers: NELBO", largest(*map(nelbo_printed, said)), 2e-4)
    first, = new_folder("first")
    shutil.copytree(c, first)
    check_side_by_side("answers from --init, with another loop", answers,
                       ["--steps", "5", "--loop", "1:3"], first)


def nelbo_printed(said):
    """The NELBO of each number of loops in the table of the command eval."""
    return [float(nelbo) for nelbo in re.findall(r"^ *\d+ +\d+ +(\d+\.\d{4})", said, re.M)]


def check_eval_and_sample(folder, data, val):
    """The commands eval and sample of both programs on one model, and errors of PyTorch's."""
    command = ["eval", "--model", folder, "--data", val, "--rows", "50", "--loops", "1,3,4,9"]
    tables = nelbo_printed(run_loopmdm(*command)), nelbo_printed(run_reference(*command))
    check("eval: NELBO at 1, 3, 4 and 9 loops", largest(*tables), 2e-4)
    check("eval: rows of the table, missing", 4 - len(tables[0]))
    for options in (
            ["--steps", "8", "-n", "3"],
            ["--order", "random", "--steps", "20", "--loops", "6", "-n", "18", "--seed", "5"],
            ["--steps", "12", "--block", "8", "--temperature", "0", "--prompt", "Once upon a time"],
            ["--order", "margin", "--steps", "9", "--top-k", "20", "--length", "20", "-n", "2"],
            ["--order", "entropy", "--steps", "6", "--top-p", "0.8", "--prompt", "“Zoë, it's 7…”"],
            ["--order", "threshold", "--threshold", "0.3", "--block", "16", "-n", "2"]):
        command = ["sample", "--model", folder, *options]
        ours = run_loopmdm(*command)
        check(f"sample {' '.join(options[:6])}: the same {len(ours)} characters",
              len(ours) < 20 or ours != run_reference(*command))

    for words, error in (
            (["sample", "--model", folder, "--steps", "2", "--block", "4"], "needs one"),
            (["sample", "--model", folder, "--prompt", "long " * 40], "are possible"),
            (["eval", "--model", data, "--data", val], "No such file"),
            (["train", "--data", val, "--tokenizer", os.path.join(data, "tokenizer.bin"), "--out",
              folder], "is already there"),
            (["eval", "--model", folder, "--data", val[:-1]], "no file matches")):
        said = None
        try:
            run_reference(*words)
        except SystemExit as e:
            said = e.code
        check(f"PyTorch's {words[0]}, an error that says '{error}'",
              not isinstance(said, str) or error not in said or "\n" in said)
    path = os.path.join(folder, "state.bin")
    damaged = bytearray(file_bytes(path))
    damaged[5000] ^= 1
    with open(path, "wb") as f:
        f.write(damaged)
    try:
        said = reference.checkpoint_load(folder)
    except ValueError as e:
        said = e
    check("PyTorch notices that state.bin is damaged", "is damaged" not in str(said))


# ---- Terminals -----------------------------------------------------------------------------------


def on_terminal(columns, lines, *command):
    """What a command writes to a terminal of this size."""
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("4H", lines, columns, 0, 0))
    process = subprocess.Popen(command, stdout=slave, stderr=subprocess.DEVNULL,
                               env=os.environ | {"TERM": "xterm"})
    os.close(slave)
    written = b""
    with contextlib.suppress(OSError):  # Linux's way to say that the other side is closed
        while part := os.read(master, 65536):
            written += part
    os.close(master)
    process.wait()
    return written


def screen_after(columns, lines, written):
    """The lines of a terminal that has received these bytes."""
    screen = pyte.Screen(columns, lines)
    pyte.ByteStream(screen).feed(written)
    return screen.display


def check_watch():
    """
    --watch draws over its last drawing, whatever the text and the width: at the end a terminal
    shows what it would show without --watch.
    """
    folder = os.path.join(OUT, "watch")
    os.makedirs(folder)
    path, run_folder = os.path.join(folder, "data.bin"), os.path.join(folder, "run")
    words = ["\t", " ", "\n", "中", "文字", "😀", "é", "e\u0301", "❤\ufe0f", "word", " two words", EOT]
    tokens = [word.encode() for word in words[:-1]] + [b"\xff", EOT.encode()]
    tokenizer = os.path.join(folder, "tokenizer.bin")
    tinystories.write_tokenizer_bin(tokenizer, tokens, len(tokens) - 1)
    draw = random.Random(1)
    tinystories.write_shard(path, [[draw.randrange(len(tokens) - 1) for _ in range(2000)]])
    run_loopmdm("train", "--data", path, "--tokenizer", tokenizer, "--model", "d2", "--seq-len",
                "48", "--steps", "100", "--out", run_folder)
    sample = ["./loopmdm", "sample", "--model", run_folder, "--steps", "3", "--seed"]
    for columns, lines in ((80, 24), (20, 30), (20, 4), (8, 50), (2, 120), (1, 9)):
        wrong = 0
        for seed in "12":
            want = screen_after(columns, lines, on_terminal(columns, lines, *sample, seed))
            for more in ["--watch"], ["--watch", "--show-loops"]:
                written = on_terminal(columns, lines, *sample, seed, *more)
                wrong += screen_after(columns, lines, written) != want
        check(f"--watch leaves nothing behind on {columns} x {lines}", wrong)


def check_closed_terminal():
    """A terminal that is closed during training: SIGHUP, and no more output. It saves."""
    folder = os.path.join(OUT, "closed")
    train = ["./loopmdm", "train", "--data", os.path.join(OUT, "watch", "data.bin"), "--vocab",
             "12", "--model", "d2", "--steps", "100000", "--val-every", "1", "--val-rows", "1",
             "--val-data", os.path.join(OUT, "watch", "data.bin"), "--out", folder]
    child, master = pty.fork()
    if child == 0:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)  # nohup may have set it to be ignored
        os.execv(train[0], train)
    said = b""
    with contextlib.suppress(OSError):  # it has ended
        while b"step 1/" not in said:
            said += os.read(master, 65536)
    os.close(master)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    check("a closed terminal: exit status 129, from SIGHUP", status != 129)
    check("a closed terminal: the checkpoint is there",
          not os.path.exists(os.path.join(folder, "state.bin")))


def check_presets():
    """The presets are the same models, with the same recipes, in both programs."""
    for name, (T, L, NH, C, a, b, S) in reference.PRESETS.items():
        said = run_loopmdm("info", "--model", name)
        recipe = re.search("recipe: (.*)", said)[1].split()
        options = ["--batch", "--accum", "--steps", "--warmup", "--lr", "--ema"]
        found = [float(recipe[recipe.index(option) + 1]) for option in options]
        shape = f"{L} layers, {C} channels, {NH} heads, {T} positions, 4096 tokens, loop {a}:{b}"
        check(f"preset {name}: model", f"{shape} up to {S} times" not in said)
        check(f"preset {name}: recipe", found != list(map(float, reference.RECIPES[name])))


def check_threads():
    """
    loopmdm sees to it that waiting threads do not spin, and that each stays on a core if there is
    one for each, unless the user has chosen.
    """
    names = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY", "OMP_PROC_BIND", "OMP_NUM_THREADS", "OMP_PLACES",
             "GOMP_CPU_AFFINITY")
    clean = {name: value for name, value in os.environ.items() if name not in names}
    if (len(os.sched_getaffinity(0)) == 1
            or "built without OpenMP" in run_loopmdm("train", "--help")):
        return
    one = ["--threads", "1"]
    for chosen, more, want in (
            ({}, [], {"GOMP_SPINCOUNT=3000", "OMP_PROC_BIND=true"}),
            ({}, one, {"GOMP_SPINCOUNT=3000"}),
            ({"OMP_NUM_THREADS": "1"}, [], {"GOMP_SPINCOUNT=3000"}),
            ({"GOMP_SPINCOUNT": "7"}, [], {"GOMP_SPINCOUNT=7", "OMP_PROC_BIND=true"}),
            ({"OMP_WAIT_POLICY": "active", "OMP_PROC_BIND": "false"}, [],
             {"OMP_WAIT_POLICY=active", "OMP_PROC_BIND=false"})):
        command = ["./loopmdm", "train", "--data", os.path.join(OUT, "watch", "data.bin"),
                   "--vocab", "12", "--model", "d2", "--steps", "1000000", "--save-every",
                   "1000000", *more, "--out", os.path.join(OUT, "threads")]
        process = subprocess.Popen(command, env=clean | chosen, stdout=subprocess.PIPE)
        process.stdout.readline()
        found = file_bytes(f"/proc/{process.pid}/environ").decode().split("\0")
        process.kill()
        process.communicate()
        found = {word for word in found if word.startswith(names[:3])}
        check(f"threads: {chosen} {more}: {' '.join(sorted(want))}", found != want)


def check_wrong_cpu():
    """A program that was built for another CPU: SIGILL becomes one line."""
    command = ["./loopmdm", "train", "--data", os.path.join(OUT, "watch", "data.bin"), "--vocab",
               "12", "--model", "d2", "--steps", "1000000", "--out", os.path.join(OUT, "cpu")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process.stdout.readline()
    process.send_signal(signal.SIGILL)
    said = process.communicate()[1]
    check("an illegal instruction: one line, status 1", process.returncode != 1
          or said.count("\n") != 1 or "this CPU lacks an instruction" not in said)


# ---- Names and bytes -----------------------------------------------------------------------------


def check_names():
    """train_gpt2style.py finds the files that loopmdm finds: test_loopmdm.c has the same names."""
    folder = os.path.join(OUT, "names")
    counts = {"rows[1].bin": 1, "rows1.bin": 2, "v[1]/a.bin": 3, "v1/a.bin": 4}
    for name, n in counts.items():
        path = os.path.join(folder, name)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        tinystories.write_shard(path, [[0] * n])
    asked = {"rows[1].bin": 1, "rows?.bin": 2, "v[1]/a.bin": 3, "v[1]/*.bin": 3, "v?/a.bin": 4}
    for pattern, n in asked.items():
        shards = reference.data_open(os.path.join(folder, pattern)).shards
        check(f"train_gpt2style.py: --data '{pattern}'", [len(s) for s in shards] != [n])


def check_zero_bytes():
    """A text with zero bytes is written whole."""
    folder = os.path.join(OUT, "zero")
    os.makedirs(folder)
    path, tokenizer = os.path.join(folder, "data.bin"), os.path.join(folder, "tokenizer.bin")
    tinystories.write_tokenizer_bin(tokenizer, [b"a", b"\0b", EOT.encode()], 2)
    tinystories.write_shard(path, [[1] * 200])
    run_loopmdm("train", "--data", path, "--tokenizer", tokenizer, "--model", "d2", "--steps", "50",
                "--warmup", "1", "--lr", "0.01", "--out", os.path.join(folder, "run"))
    said = run_loopmdm("sample", "--model", os.path.join(folder, "run"), "--length", "6",
                       "--steps", "5", "--temperature", "0")
    check("zero bytes are written", said != "\0b" * 5 + "\n")


def main():
    shutil.rmtree(OUT, ignore_errors=True)
    os.makedirs(OUT)
    text = os.environ.get("TINYSTORIES") or "build/stories_val.txt"
    data = check_tokenizer(text, "vocab 700", "--vocab", "700")
    names = ("gpt2_vocab.json", "gpt2_merges.txt")
    beside = [os.path.join(os.path.dirname(text), name) for name in names]
    if all(map(os.path.exists, beside)):
        check_tokenizer(text, "gpt2", "--vocab", "gpt2", "--gpt2-vocab", beside[0],
                        "--gpt2-merges", beside[1])
    check_learned_signs()
    check_shuffle()
    check_text_files(data)
    check_watch()
    check_closed_terminal()
    check_threads()
    check_wrong_cpu()
    check_presets()
    check_names()
    check_zero_bytes()
    check_templates()
    check_arithmetic()
    check_gsm()
    check_reference()
    check_sudoku()
    check_rule30()
    check_training(data)
    print(f"{passed} passed, {failed} failed")
    sys.exit(failed > 0)


if __name__ == "__main__":
    main()
