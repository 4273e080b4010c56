"""
Writes rows of a cellular automaton as a token shard: a problem whose length of inference is known.

The cells of a row stand on a ring and are 0 or 1. By rule 30 a cell of the next row is 1 if exactly
one of these is true: its left neighbour is 1; it or its right neighbour is 1. Nobody knows a way to
the k-th row that is much shorter than k rows, one after the other.

    python3 dev/data/rule30.py --count 100000 --seed 1 --output rows.bin --tokenizer rule30.tok
    python3 dev/data/rule30.py --count 1000 --seed 2 --test --output test.bin

A sequence is end-of-text, a first row, ">" and the rows that follow from it. First rows are drawn
from a seed. One of four is kept for --test, by its number, so no test begins as a training
sequence does.
"""
import argparse
import array
import os
import random
import struct
import sys

SHARD, TOKENIZER = (20240520, 1), (20240328, 2)  # what the two kinds of files begin with
TOKENS = (b".", b"0", b"1", b">", b"<|endoftext|>")
SEPARATOR, EOT = 3, 4


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


def first_rows(cells, count, seed, test):
    """Yields first rows, drawn from those for a test or from all others."""
    draw = random.Random(seed)
    while count:
        number = draw.getrandbits(cells)
        if (number % 4 == 0) == test:
            yield [number >> i & 1 for i in range(cells)]
            count -= 1


def write(path, header, content):
    """Writes a file with a header of 256 integers, complete or not at all."""
    with open(path + ".tmp", "wb") as file:
        file.write(struct.pack("<256i", *header, *[0] * (256 - len(header))))
        file.write(content)
    os.rename(path + ".tmp", path)


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cells", type=int, default=16, help="in a row, from 3 to 64 (16)")
    parser.add_argument("--rows", type=int, default=10, help="after the first (10)")
    parser.add_argument("--count", type=int, default=1000, help="sequences (1000)")
    parser.add_argument("--seed", type=int, default=1, help="which first rows (1)")
    parser.add_argument("--test", action="store_true", help="first rows of the test")
    parser.add_argument("--output", metavar="FILE", required=True, help="where the shard goes")
    parser.add_argument("--tokenizer", metavar="FILE", help="where the tokenizer goes")
    o = parser.parse_args()
    if not 3 <= o.cells <= 64 or o.rows < 1 or o.count < 1:
        parser.error("--cells needs 3 to 64, --rows and --count 1 or more")

    shard = array.array("H")
    for first in first_rows(o.cells, o.count, o.seed, o.test):
        shard.extend(sequence(first, o.rows))
    if sys.byteorder == "big":
        shard.byteswap()
    try:
        if o.tokenizer:
            write(o.tokenizer, (*TOKENIZER, len(TOKENS), EOT),
                  b"".join(bytes([len(token)]) + token for token in TOKENS))
        write(o.output, (*SHARD, len(shard)), shard.tobytes())
    except OSError as error:
        sys.exit(f"rule30.py: cannot write {error.filename}: {error.strerror}")


if __name__ == "__main__":
    main()
