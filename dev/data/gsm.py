"""
Makes a shard of sequences "question <|sep|> answer" from JSON lines such as GSM8K's, to fine-tune
on answers. It also trains a tokenizer, if asked.

Each line of the input is {"question": "...", "answer": "..."}. A sequence has exactly T tokens:
end-of-text, the tokens of question<|sep|>answer, then end-of-text up to T. Longer problems are left
out. `loopmdm tokenize --rows-of T` makes the same sequences from a text file in which
<|endoftext|> follows each problem.

GSM8K's calculator annotations, as in "48/2 = <<48/2=24>>24 clips", are removed: a model without a
calculator does not need them.
"""
import argparse
import functools
import itertools
import json
import os
import re
import struct
import sys

import outputs

try:
    import tinystories
    from tokenizers import Regex, pre_tokenizers
except ImportError:
    if __name__ != "__main__":
        raise
    sys.exit("gsm.py: needs Hugging Face's tokenizers: pip install tokenizers")

EOT, SEP = tinystories.EOT, "<|sep|>"
SPECIAL = re.compile(r"<\|[^|]+\|>")  # in text, what may be a special token
ANNOTATION = re.compile(r"<<[^<>]*>>")
SPLIT = pre_tokenizers.ByteLevel(add_prefix_space=False).pre_tokenize_str  # GPT-2's


def is_special(text):
    """
    Whether a token with this text is special: pre-tokenization would cut <|...|>, so no merge has
    made it. But a tokenizer may have learned <|=|>, which is one piece.
    """
    form = len(text) > 4 and text.startswith("<|") and text.endswith("|>")
    return form and len(SPLIT(text)) > 1


def clean(item, key, where):
    """
    Returns item[key] without annotations and without space around it. Raises ValueError if it is
    not such a text.
    """
    text = item.get(key)
    text = ANNOTATION.sub("", text).strip(tinystories.SPACE) if isinstance(text, str) else ""
    if not text:
        raise ValueError(f'{where}: no text in "{key}"')
    if re.search("[\ud800-\udfff]", text):
        raise ValueError(f'{where}: half a character, \\ud800 to \\udfff, in "{key}"')
    if special := next(filter(is_special, SPECIAL.findall(text)), None):
        raise ValueError(f'{where}: {special} in "{key}", where it would not be taken for text')
    return text


def problems(path):
    """
    Yields (question, answer) for each line of a JSON-lines file. Raises OSError or ValueError.
    """
    with open(path, "rb") as f:
        for number, line in enumerate(f, 1):
            where = f"{path}, line {number}"
            if not line.strip():
                continue
            try:
                item = json.loads(line.decode("utf-8-sig"))
            except (ValueError, RecursionError) as e:
                raise ValueError(f"{where}: not JSON in UTF-8: {e}") from None
            if not isinstance(item, dict):
                raise ValueError(f'{where}: not an object with "question" and "answer"')
            yield clean(item, "question", where), clean(item, "answer", where)


def read_tokenizer_bin(path):
    """
    Returns the tokens of a tokenizer.bin, as list[bytes], and the id of end-of-text. Raises
    OSError, or ValueError if the file is not a tokenizer.bin.
    """
    with open(path, "rb") as f:
        data = f.read()
    magic, version, vocab, eot = struct.unpack_from("<4I", data.ljust(16, b"\0"))
    if magic != tinystories.TOKENIZER_MAGIC or version not in (1, 2):
        raise ValueError(f"{path}: not a tokenizer.bin of version 1 or 2")
    tokens, at = [], 1024
    while at < len(data):
        tokens.append(data[at + 1: at + 1 + data[at]])
        at += 1 + data[at]
    eot = 50256 if version == 1 else eot  # version 1 is always GPT-2's
    if at != len(data) or len(tokens) != vocab or not eot < vocab <= tinystories.MAX_VOCAB:
        raise ValueError(f"{path}: damaged: it ought to have {vocab} tokens, "
                         f"one of them {eot}, for end-of-text")
    return tokens, eot


def train_tokenizer(path, vocab):
    """
    Trains a byte-level BPE vocabulary on a JSON-lines file; <|endoftext|> and <|sep|> come last.
    Returns what read_tokenizer_bin() returns. Raises OSError or ValueError.

    No token holds two digits; a token can be a space and a digit. So the training splits " 48" into
    " 4" and "8". The encoders do not split there, because they have only GPT-2's pre-tokenization,
    but the vocabulary has no token with which they could join the two.
    """
    texts = (text for problem in problems(path) for text in problem)
    single_digits = pre_tokenizers.Split(Regex(r" ?\d"), "isolated")
    tokenizer = tinystories.train_bpe(texts, vocab, (EOT, SEP), [single_digits])
    return tinystories.token_bytes(tokenizer), tokenizer.token_to_id(EOT)


def make_encoder(tokens, eot):
    """
    Returns the function text -> ids of dev/tokenizer/tokenizer.h. It raises ValueError for a byte
    that has no token.

    In each piece of GPT-2's pre-tokenization it merges the neighbours that together are the token
    of the lowest id, until no two neighbours are a token.
    """
    ids, special = {}, {}
    for i, token in enumerate(tokens):
        text = token.decode(errors="replace")
        if i == eot or is_special(text):
            special.setdefault(text, i)
        else:
            ids.setdefault(token, i)
    any_special = "|".join(map(re.escape, filter(None, special)))
    cut = re.compile(f"({any_special or '(?!)'})")  # (?!) never matches

    @functools.lru_cache(1 << 16)
    def encode_piece(piece):
        parts = [bytes([b]) for b in piece.encode()]
        if missing := [part for part in parts if part not in ids]:
            raise ValueError(f"the tokenizer has no token for the byte {missing[0][0]:#04x}")
        while len(parts) > 1:
            unions = [a + b for a, b in zip(parts, parts[1:])]
            lowest = min(unions, key=lambda union: ids.get(union, len(tokens)))
            if lowest not in ids:
                break
            merged = []
            for part in parts:  # everywhere, from left to right
                if merged and merged[-1] + part == lowest:
                    merged[-1] = lowest
                else:
                    merged.append(part)
            parts = merged
        return [ids[part] for part in parts]

    def encode(text):
        found = []
        for part in cut.split(text):
            if part and part in special:
                found.append(special[part])
            else:
                pieces = (part[begin:end] for _, (begin, end) in SPLIT(part))
                found += itertools.chain.from_iterable(map(encode_piece, pieces))
        return found

    return encode


def make(args):
    """
    Makes the shard, and the tokenizer if asked. They get their names together, at the end. Raises
    OSError or ValueError.
    """
    if args.train_tokenizer:
        tokens, eot = train_tokenizer(args.input, args.train_tokenizer)
    else:
        tokens, eot = read_tokenizer_bin(args.tokenizer)
    if SEP.encode() not in tokens:
        raise ValueError(
            f"{args.tokenizer} has no token {SEP}, to stand between question and answer: "
            "train one that has, with --train-tokenizer VOCAB and a new name for --tokenizer")
    sep = tokens.index(SEP.encode())
    encode = make_encoder(tokens, eot)
    lengths = []  # of all problems, before padding

    def sequences():
        for question, answer in problems(args.input):
            ids = [eot, *encode(question), sep, *encode(answer)]
            lengths.append(len(ids))
            if len(ids) <= args.rows_of:
                yield ids + [eot] * (args.rows_of - len(ids))
            if len(lengths) % 1000 == 0:
                tinystories.progress(f"{args.output}: {len(lengths)} problems encoded")

    paths = [args.tokenizer, args.output] if args.train_tokenizer else [args.output]
    with outputs.new_files(*paths) as parts:
        if args.train_tokenizer:
            tinystories.write_tokenizer_bin(parts[0], tokens, eot)
        try:
            count, _ = tinystories.write_shard(parts[-1], sequences())
        finally:
            tinystories.progress("")
        if not lengths:
            raise ValueError(f"{args.input}: no problems")
        if not count:
            raise ValueError(f"{args.input}: all {len(lengths)} rows are too long: "
                             f"from {min(lengths)} to {max(lengths)} tokens, "
                             f"--rows-of {args.rows_of}")

    if args.train_tokenizer:
        print(f"{args.tokenizer}: {len(tokens)} tokens, end-of-text {eot}, separator {sep}")
    lengths.sort()
    print(f"{args.output}: {count} rows of {args.rows_of} tokens; "
          f"{len(lengths) - count} of {len(lengths)} problems left out as too long "
          f"(before padding: mean {sum(lengths) / len(lengths):.1f}, "
          f"99 % at most {lengths[len(lengths) * 99 // 100]}, longest {lengths[-1]})")


def number(low, high):
    """Returns the type of an option whose value is a whole number from low to high."""
    def parse(text):
        if not (text.isascii() and text.isdecimal()) or not low <= int(text) <= high:
            raise argparse.ArgumentTypeError(
                f"must be a whole number from {low} to {high}, not {text}")
        return int(text)
    return parse


def main():
    about = "Makes a shard of questions and answers from JSON lines such as GSM8K's."
    parser = argparse.ArgumentParser(prog="gsm.py", description=about)
    add = parser.add_argument
    add("--input", metavar="FILE", required=True,
        help='JSON lines {"question": "...", "answer": "..."}')
    add("--output", metavar="FILE", required=True, help="the shard to write")
    add("--tokenizer", metavar="FILE", required=True,
        help=f"a tokenizer.bin with the tokens {EOT} and {SEP}")
    add("--rows-of", metavar="T", type=number(4, 1 << 20), required=True,
        help="tokens of each sequence: the sequence length of the model")
    add("--train-tokenizer", metavar="VOCAB", type=number(258, tinystories.MAX_VOCAB),
        help="train a tokenizer with this many tokens on --input and write it to --tokenizer")
    args = parser.parse_args()

    # The program writes NAME.tmp first, so that name must be free too.
    paths = {"--input": args.input, "--output": args.output, "--tokenizer": args.tokenizer}
    names = [*paths.values(), args.output + ".tmp", args.tokenizer + ".tmp"]
    if len({os.path.realpath(path) for path in names}) < len(names):
        parser.error(f"{', '.join(paths)} must be three different files, "
                     "none another's name with .tmp")
    outputs.run(parser.prog, make, args)


if __name__ == "__main__":
    main()
