"""
Writes unicode.h: the letters, numbers and spaces of GPT-2's pre-tokenization regex, as ranges of
code points.

The classes come from the tokenizers library itself, so that the C encoder cuts text exactly where
Hugging Face does. It prints the number of ranges, and where they differ from Python's unicodedata,
which may know another version of Unicode.
"""
import argparse
import itertools
import os
import platform
import sys
import textwrap
import unicodedata

import tokenizers

sys.path.insert(0, os.path.join(os.path.dirname(__file__), "..", ".."))
from dev.data import outputs  # noqa: E402

SURROGATES = range(0xD800, 0xE000)  # no characters: they have no UTF-8 form
CODE_POINTS = [c for c in range(0x110000) if c not in SURROGATES]
BATCH = 1000                        # code points asked about at once

# A letter that is new in each version of Unicode.
FIRSTS = {"14.0": 0x10570, "15.0": 0x11F04, "15.1": 0x2EBF0, "16.0": 0x105C0, "17.0": 0x323B0,
          "18.0": 0x3D000}


def stays_with(neighbour):
    """The code points that the pre-tokenizer leaves in one piece with the character before them.

    For the neighbour "a" it asks with the text "aX\\naY\\n...". A newline starts a new piece, and
    so does the "a" after it. If the piece that starts at 3 i has two characters, character i
    stayed.
    """
    split = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False).pre_tokenize_str
    found = set()
    for at in range(0, len(CODE_POINTS), BATCH):
        batch = CODE_POINTS[at:at + BATCH]
        pieces = split("".join(neighbour + chr(c) + "\n" for c in batch))
        found.update(batch[start // 3] for _, (start, end) in pieces
                     if start % 3 == 0 and end == start + 2)
    return found


def classes():
    """The sets of code points (letters, numbers, spaces).

    A piece holds only one class, and spaces stay with none of the others.
    """
    letters, numbers, others = stays_with("a"), stays_with("1"), stays_with("!")
    if letters & numbers or letters & others or numbers & others:
        raise ValueError("the pre-tokenizer puts a code point in two classes")
    return letters, numbers, set(CODE_POINTS) - letters - numbers - others


def ranges(points):
    """The inclusive ranges [(first, last), ...], sorted, that hold exactly these code points."""
    result = []
    for _, run in itertools.groupby(enumerate(sorted(points)), lambda pair: pair[1] - pair[0]):
        run = [c for _, c in run]
        result.append((run[0], run[-1]))
    return result


def table(name, points):
    """The C source of one table: `static const uint32_t name[][2]`."""
    cells = ", ".join(f"{{0x{a:X},0x{b:X}}}" for a, b in ranges(points))
    body = textwrap.fill(cells, 100, initial_indent="    ", subsequent_indent="    ",
                         break_on_hyphens=False)
    return f"static const uint32_t {name}[][2] = {{\n{body}\n}};\n"


def python_classes():
    """What classes() should give, by Python's unicodedata: \\p{L}, \\p{N} and White_Space."""
    kinds = {c: unicodedata.category(chr(c))[0] for c in CODE_POINTS}  # of "Lu" the first letter
    letters, numbers, separators = ({c for c in CODE_POINTS if kinds[c] == kind} for kind in "LNZ")
    return letters, numbers, separators | set(map(ord, "\t\n\v\f\r\x85"))


def main():
    here = os.path.dirname(os.path.abspath(__file__))
    parser = argparse.ArgumentParser(
        description="Writes unicode.h: the letters, numbers and spaces of GPT-2's "
                    "pre-tokenization regex.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--out", default=os.path.join(here, "unicode.h"),
                        help="the header to write")
    args = parser.parse_args()
    found = classes()
    version = max((v for v, c in FIRSTS.items() if c in found[0]), default="before 14.0")
    names = ("unicode_letters", "unicode_numbers", "unicode_spaces")
    text = f"""\
// The Unicode classes of GPT-2's pre-tokenization: letters (\\p{{L}}), numbers (\\p{{N}}) and
// spaces (\\s), as sorted ranges {{first, last}} of code points, both included. Taken from the
// pre-tokenizer of Hugging Face tokenizers {tokenizers.__version__}, which knows Unicode {version}.
// Made by: python dev/tokenizer/unicode.py
#ifndef UNICODE_H
#define UNICODE_H

#include <stdint.h>

""" + "\n".join(map(table, names, found)) + "\n#endif\n"
    with outputs.new_files(args.out) as [part]:
        with open(part, "w", encoding="ascii", newline="\n") as f:
            f.write(text)
    print(f"{args.out}: tokenizers {tokenizers.__version__}, Unicode {version}; "
          f"Python {platform.python_version()} has Unicode {unicodedata.unidata_version}")
    for name, ours, python in zip(names, found, python_classes()):
        differ = ours ^ python

        # A newer Unicode explains all but those that this Python's Unicode has too.
        known = [c for c in differ if unicodedata.category(chr(c)) != "Cn"]
        print(f"{name}: {len(ours)} code points in {len(ranges(ours))} ranges; "
              f"{len(differ)} differ from Python's, {len(known)} of them assigned there"
              + "".join(f" U+{c:04X}" for c in sorted(known)))


if __name__ == "__main__":
    outputs.run("unicode.py", main)
