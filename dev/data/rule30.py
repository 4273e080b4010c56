"""
Writes rows of a cellular automaton as a token shard: a problem with a known length of inference.

The cells of a row stand on a ring and are 0 or 1. By rule 30 a cell of the next row is 1 if exactly
one of these is true: its left neighbour is 1; it or its right neighbour is 1. Nobody knows a much
shorter way to the k-th row than row after row.

    python dev/data/rule30.py --count 100000 --seed 1 --output rows.bin --tokenizer rule30.tok
    python dev/data/rule30.py --count 1000 --seed 2 --test --output test.bin

A sequence is end-of-text, a first row, ">" and the rows that follow from it. First rows are drawn
from a seed. A hash of the row decides whether it is for training or, one of four, for --test. So no
test begins as a training sequence does.
"""
import argparse
import hashlib
import os
import random
import sys

import outputs

try:
    import tinystories
except ImportError:
    if __name__ != "__main__":
        raise
    sys.exit("rule30.py: needs tinystories.py beside it, and that needs Hugging Face's tokenizers")

TOKENS = (b".", b"0", b"1", b">", tinystories.EOT.encode())
SEPARATOR, EOT = 3, 4
MOST_TOKENS = 2**31 - 1  # of a shard: its header has an int32


def next_row(row):
    """Returns the row after a row, a list of 0 and 1."""
    n = len(row)
    return [row[i - 1] ^ (row[i] | row[(i + 1) % n]) for i in range(n)]


def sequence(first, rows):
    """Returns the tokens of a first row and of so many rows after it."""
    tokens, row = [EOT, *(cell + 1 for cell in first), SEPARATOR], first
    for _ in range(rows):
        row = next_row(row)
        tokens += [cell + 1 for cell in row]
    return tokens


def is_test(number):
    """Returns whether the first row with this number is for tests."""
    return hashlib.blake2b(number.to_bytes(8, "little"), digest_size=1).digest()[0] % 4 == 0


def first_rows(cells, count, seed, test):
    """Yields first rows, drawn from those for a test or from all others."""
    draw = random.Random(seed)
    while count:
        number = draw.getrandbits(cells)
        if is_test(number) == test:
            yield [number >> i & 1 for i in range(cells)]
            count -= 1


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cells", type=int, default=16, help="in a row, from 8 to 64 (16)")
    parser.add_argument("--rows", type=int, default=10, help="after the first (10)")
    parser.add_argument("--count", type=int, default=1000, help="sequences (1000)")
    parser.add_argument("--seed", type=int, default=1, help="which first rows, from 0 (1)")
    parser.add_argument("--test", action="store_true", help="first rows of the test")
    parser.add_argument("--output", metavar="FILE", required=True, help="where the shard goes")
    parser.add_argument("--tokenizer", metavar="FILE", help="where the tokenizer goes")
    o = parser.parse_args()
    if not 8 <= o.cells <= 64 or o.rows < 1 or o.count < 1 or o.seed < 0:
        parser.error("--cells needs 8 to 64, --rows and --count 1 or more, --seed 0 or more")
    if o.count * (2 + o.cells * (1 + o.rows)) > MOST_TOKENS:
        parser.error(f"a shard has at most {MOST_TOKENS} tokens: give a lower --count")
    if "" in (o.output, o.tokenizer):
        parser.error("--output and --tokenizer need a name")
    paths = [o.output, o.tokenizer] if o.tokenizer else [o.output]
    names = [*paths, *(path + ".tmp" for path in paths)]  # .tmp is written first
    if len(set(map(os.path.realpath, names))) < len(names):
        parser.error("--output and --tokenizer must be different, also with .tmp added to one")

    rows = (sequence(first, o.rows) for first in first_rows(o.cells, o.count, o.seed, o.test))
    with outputs.new_files(*paths) as parts:
        tinystories.write_shard(parts[0], rows)
        if o.tokenizer:
            tinystories.write_tokenizer_bin(parts[1], TOKENS, EOT)


if __name__ == "__main__":
    outputs.run("rule30.py", main)
