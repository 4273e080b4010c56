"""Makes a shard of rows "question <|sep|> answer" from JSON lines such as GSM8K's, to fine-tune on answering; a tokenizer too, if asked.

Each line of the input is {"question": "...", "answer": "..."}. A row has exactly T tokens: end-of-text, the tokens of
question<|sep|>answer, then end-of-text up to T. Rows too long for T are left out. These are the rows that `loopmdm tokenize --rows-of T`
makes of a text file with the problems, each followed by <|endoftext|>; the shard is in llm.c's format, as tinystories.py's.

GSM8K's calculator annotations, as in "48/2 = <<48/2=24>>24 clips", are removed, as is usual for a model without a calculator.
"""
import argparse
import functools
import json
import os
import re
import struct
import sys

try:
    import tinystories
    from tokenizers import Regex, pre_tokenizers
except ImportError:
    if __name__ != "__main__":
        raise
    sys.exit("gsm.py: needs Hugging Face's tokenizers: pip install tokenizers")

EOT, SEP = tinystories.EOT, "<|sep|>"
SPECIAL = re.compile(r"<\|[^|]+\|>")            # the text of a token that stands for itself; no other token's text holds it
ANNOTATION = re.compile(r"<<[^<>]*>>")
SPACE = " \t\n\v\f\r"                           # as C's isspace()


def problems(path):
    """Yields (question, answer) for each line of a JSON-lines file, annotations removed, no space around. Raises OSError, or ValueError."""
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
            texts = []
            for key in ("question", "answer"):
                text = item.get(key)
                text = ANNOTATION.sub("", text).strip(SPACE) if isinstance(text, str) else ""
                if not text:
                    raise ValueError(f'{where}: no text in "{key}"')
                if re.search("[\ud800-\udfff]", text):
                    raise ValueError(f'{where}: half a character, \\ud800 to \\udfff, in "{key}"')
                if special := SPECIAL.search(text):
                    raise ValueError(f'{where}: {special[0]} in "{key}", where it would not be taken for text')
                texts.append(text)
            yield tuple(texts)


def read_tokenizer_bin(path):
    """The tokens of a tokenizer.bin, as list[bytes], and the end-of-text id. Raises OSError, or ValueError if it is no such file."""
    with open(path, "rb") as f:
        data = f.read()
    magic, version, vocab, eot = struct.unpack_from("<4I", data.ljust(16, b"\0"))
    if magic != tinystories.TOKENIZER_MAGIC or version not in (1, 2):
        raise ValueError(f"{path}: not a tokenizer.bin of version 1 or 2")
    tokens, at = [], 1024
    while at < len(data):
        tokens.append(data[at + 1: at + 1 + data[at]])
        at += 1 + data[at]
    eot = 50256 if version == 1 else eot        # version 1 is always GPT-2's
    if at != len(data) or len(tokens) != vocab or not eot < vocab <= tinystories.MAX_VOCAB:
        raise ValueError(f"{path}: damaged: it ought to have {vocab} tokens, one of them {eot}, for end-of-text")
    return tokens, eot


def train_tokenizer(path, vocab):
    """The same for a byte-level BPE vocabulary trained on a JSON-lines file, with <|endoftext|> and <|sep|> last. Raises OSError or ValueError.

    Digits stay apart: no token holds two of them; a space before the first may join it, as it joins a word. For this, training splits " 48"
    into " 4" and "8". The encoders, which have GPT-2's pre-tokenization only, do not split it, but find nothing more to merge there.
    """
    texts = (text for problem in problems(path) for text in problem)
    tokenizer = tinystories.train_bpe(texts, vocab, (EOT, SEP), [pre_tokenizers.Split(Regex(r" ?\d"), "isolated")])
    return tinystories.token_bytes(tokenizer), tokenizer.token_to_id(EOT)


def make_encoder(tokens, eot):
    """The function text -> ids of loopmdm.c, for text without special tokens; it raises ValueError for a byte without a token.

    In each piece of GPT-2's pre-tokenization the neighbours are merged whose union is the token of lowest id, as long as there are any.
    """
    ids = {}
    for i, token in enumerate(tokens):
        if i != eot and not SPECIAL.fullmatch(token.decode("latin-1")):
            ids.setdefault(token, i)
    split = pre_tokenizers.ByteLevel(add_prefix_space=False).pre_tokenize_str

    @functools.lru_cache(1 << 16)
    def encode_piece(piece):
        parts = [bytes([b]) for b in piece.encode()]
        if missing := [part for part in parts if part not in ids]:
            raise ValueError(f"the tokenizer has no token for the byte {missing[0][0]:#04x}")
        while len(parts) > 1:
            lowest = min((a + b for a, b in zip(parts, parts[1:])), key=lambda union: ids.get(union, len(tokens)))
            if lowest not in ids:
                break
            merged = []
            for part in parts:                  # everywhere, from left to right
                if merged and merged[-1] + part == lowest:
                    merged[-1] = lowest
                else:
                    merged.append(part)
            parts = merged
        return [ids[part] for part in parts]

    return lambda text: [i for _, (begin, end) in split(text) for i in encode_piece(text[begin:end])]


def make(args):
    """Makes the shard, and the tokenizer if asked; they get their names at the end, together. Raises OSError or ValueError."""
    if args.train_tokenizer:
        tokens, eot = train_tokenizer(args.input, args.train_tokenizer)
    else:
        tokens, eot = read_tokenizer_bin(args.tokenizer)
    if SEP.encode() not in tokens:
        raise ValueError(f"{args.tokenizer} has no token {SEP}, to stand between question and answer: "
                         "train one that has, with --train-tokenizer VOCAB and a new name for --tokenizer")
    sep, encode, lengths = tokens.index(SEP.encode()), make_encoder(tokens, eot), []

    def rows():
        for question, answer in problems(args.input):
            row = [eot, *encode(question), sep, *encode(answer)]
            lengths.append(len(row))
            if len(row) <= args.rows_of:
                yield row + [eot] * (args.rows_of - len(row))
            if len(lengths) % 1000 == 0:
                tinystories.progress(f"{args.output}: {len(lengths)} problems encoded")

    temporary = {path: path + ".tmp" for path in (args.tokenizer, args.output)[not args.train_tokenizer:]}
    for path in temporary:
        if os.path.exists(path) and not os.path.isfile(path):
            raise ValueError(f"{path} is a folder, device or pipe; choose another name")
    try:
        if args.train_tokenizer:
            tinystories.write_tokenizer_bin(temporary[args.tokenizer], tokens, eot)
        count, _ = tinystories.write_shard(temporary[args.output], rows())
        if not lengths:
            raise ValueError(f"{args.input}: no problems")
        if not count:
            raise ValueError(f"{args.input}: all {len(lengths)} rows are too long: from {min(lengths)} to {max(lengths)} tokens, --rows-of {args.rows_of}")
        for path, part in temporary.items():
            os.replace(part, path)
    finally:
        tinystories.progress("")
        for part in temporary.values():
            if os.path.exists(part):
                os.remove(part)
    if args.train_tokenizer:
        print(f"{args.tokenizer}: {len(tokens)} tokens, end-of-text {eot}, separator {sep}")
    lengths.sort()
    print(f"{args.output}: {count} rows of {args.rows_of} tokens; {len(lengths) - count} of {len(lengths)} problems left out as too long "
          f"(before padding: mean {sum(lengths) / len(lengths):.1f}, 99 % at most {lengths[len(lengths) * 99 // 100]}, longest {lengths[-1]})")


def number(low, high):
    """The type of an option that takes a whole number from low to high."""
    def parse(text):
        if not (text.isascii() and text.isdecimal()) or not low <= int(text) <= high:
            raise argparse.ArgumentTypeError(f"must be a whole number from {low} to {high}, not {text}")
        return int(text)
    return parse


def main():
    parser = argparse.ArgumentParser(prog="gsm.py", description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--input", metavar="FILE", required=True, help='JSON lines {"question": "...", "answer": "..."}')
    add("--output", metavar="FILE", required=True, help="the shard to write")
    add("--tokenizer", metavar="FILE", required=True, help=f"tokenizer.bin with the tokens {EOT} and {SEP}")
    add("--rows-of", metavar="T", type=number(4, 1 << 20), required=True, help="tokens in each row: the sequence length of the model")
    add("--train-tokenizer", metavar="VOCAB", type=number(258, tinystories.MAX_VOCAB),
        help="trains a tokenizer of so many tokens on --input, and writes it to --tokenizer")
    args = parser.parse_args()
    paths = {"--input": args.input, "--output": args.output, "--tokenizer": args.tokenizer}
    names = [*paths.values(), args.output + ".tmp", args.tokenizer + ".tmp"]    # .tmp: what is written first
    if len({os.path.realpath(path) for path in names}) < len(names):
        parser.error(f"{', '.join(paths)} must be three different files, none another's name with .tmp")
    tinystories.run(parser.prog, make, args)


if __name__ == "__main__":
    main()
