"""
Makes training data from TinyStories, or from any text: tokenizer.bin, train.bin, val.bin and
tokenizer.json.

A line <|endoftext|> separates two stories. Each story becomes the end-of-text token and then its
own tokens. The .bin files have the formats of llm.c (see README.md in this folder); tokenizer.json
is Hugging Face's format, for checks.
"""
import argparse
import http.client
import itertools
import os
import random
import struct
import sys
import tempfile
import urllib.request

import outputs

try:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
except ImportError:
    if __name__ != "__main__":
        raise
    sys.exit("tinystories.py: needs Hugging Face's tokenizers: pip install tokenizers")

EOT = "<|endoftext|>"
SPACE = " \t\n\v\f\r"       # as C's isspace()
MAX_VOCAB = 65535           # a token is a uint16, and MASK has the id after the last token
TOKENIZER_MAGIC, TOKENIZER_VERSION = 20240328, 2
SHARD_MAGIC, SHARD_VERSION = 20240520, 1
OUTPUTS = ("tokenizer.bin", "tokenizer.json", "train.bin", "val.bin")
CHUNK = 1000                # stories to encode at once: enough for all cores, and little memory
HUGGING_FACE = "https://huggingface.co"
TINYSTORIES_FILE = "TinyStoriesV2-GPT4-{}.txt"
TINYSTORIES = HUGGING_FACE + "/datasets/roneneldan/TinyStories/resolve/main/" + TINYSTORIES_FILE
GPT2 = HUGGING_FACE + "/openai-community/gpt2/resolve/main/{}"


def progress(text):
    """Rewrites the progress line, if standard error is a terminal."""
    if sys.stderr.isatty():
        print("\r\033[K" + text, end="", file=sys.stderr, flush=True)


def stories(path):
    """
    Yields the stories of a UTF-8 text file, without SPACE around them and without the empty ones.
    All line ends become \\n, and a byte order mark is dropped, as in `loopmdm tokenize`. Raises
    ValueError if the file is not UTF-8.
    """
    parts = []
    try:
        with open(path, encoding="utf-8-sig") as f:
            for line in itertools.chain(f, [EOT]):  # the end of the file ends the last story
                head, *tails = line.split(EOT)
                parts.append(head)
                for tail in tails:
                    story = "".join(parts).strip(SPACE)
                    parts = [tail]
                    if story:
                        yield story
    except UnicodeDecodeError as e:
        raise ValueError(f"{path}: not UTF-8: {e.reason}") from None


def stories_of(paths, seed=None):
    """
    Returns an iterator over the stories of some files, in an order that depends on them and on
    `seed`; without it in their own order, and without holding them in memory. Raises as stories().
    """
    in_order = itertools.chain.from_iterable(map(stories, paths))
    if seed is None:
        return in_order
    shuffled = list(in_order)
    random.Random(seed).shuffle(shuffled)
    return iter(shuffled)


def download(url, path):
    """
    Downloads url to path if there is no such file. An incomplete file never gets this name. Raises
    OSError.
    """
    if os.path.exists(path):
        return path
    part = path + ".part"
    try:
        with urllib.request.urlopen(url, timeout=60) as response, open(part, "wb") as f:
            size, done = int(response.headers.get("Content-Length") or 0), 0
            while block := response.read(1 << 20):
                f.write(block)
                done += len(block)
                progress(f"{os.path.basename(path)}: {done >> 20} of {size >> 20} MiB")
        if done < size:
            raise OSError(f"only {done} of {size} bytes came")
        os.replace(part, path)
    except (OSError, http.client.HTTPException) as e:
        raise OSError(f"cannot download {url}: {e}") from None
    finally:
        progress("")
        if os.path.exists(part):
            os.remove(part)
    return path


def byte_level(model, first=()):
    """
    Returns the tokenizer around a BPE model: the pre-tokenizers in `first`, then GPT-2's. Nothing
    else changes the text.
    """
    tokenizer = Tokenizer(model)
    gpt2 = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*first, gpt2])
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def train_bpe(texts, vocab, special=(EOT,), first=()):
    """
    Trains a byte-level BPE tokenizer of `vocab` tokens on an iterable of texts. The pre-tokenizers
    in `first` run before GPT-2's.

    Ids have the order that the C encoder needs: 256 bytes, the merges in the order of training,
    the special tokens. Raises ValueError if the texts have too few different pairs.
    """
    tokenizer = byte_level(models.BPE(), first)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab - len(special),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        max_token_length=255,  # tokenizer.bin has one byte for the length
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_special_tokens(list(special))  # the trainer would put them first
    size = tokenizer.get_vocab_size()
    if size < vocab:
        raise ValueError(f"the text is enough for a vocabulary of {size} only, not {vocab}")
    return tokenizer


def gpt2_bpe(vocab_path, merges_path):
    """
    Returns GPT-2's tokenizer, from its vocab.json and merges.txt. Raises OSError, or ValueError if
    the files are something else.
    """
    open(vocab_path).close()  # the error of the library would not name the file
    with open(merges_path, encoding="utf-8", errors="replace") as f:
        merges = ["".join(line.split()) for line in f if not line.startswith("#version")]
    files = f"{vocab_path}, {merges_path}"
    try:
        tokenizer = byte_level(models.BPE.from_file(vocab_path, merges_path))
    except Exception as e:  # the library raises nothing more precise
        raise ValueError(f"{files}: not a BPE vocabulary and its merges: {e}") from None
    if tokenizer.token_to_id(EOT) is None:
        raise ValueError(f"{vocab_path}: no {EOT} token")

    # The C encoder has no table of merges: it needs ids in the order of the merges.
    ids = range(256, tokenizer.get_vocab_size() - 1)
    if [tokenizer.id_to_token(i) for i in ids] != merges:
        raise ValueError(
            f"{vocab_path}: the ids are not in the order of the merges in {merges_path}")
    tokenizer.add_special_tokens([EOT])  # it keeps its id
    return tokenizer


def token_bytes(tokenizer):
    """
    Returns the bytes of each token of a byte-level tokenizer, as list[bytes] in the order of ids.

    GPT-2 writes bytes as printable characters: a printable Latin-1 byte is itself, the others are
    the characters from 256 on. Raises ValueError if the ids are not 0, 1, 2, ... or a token has
    another character.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in printable]
    byte_of = {chr(b): b for b in printable}
    byte_of |= {chr(256 + i): b for i, b in enumerate(others)}
    ids = {i: token for token, i in tokenizer.get_vocab().items()}
    special = tokenizer.get_added_tokens_decoder()
    try:
        return [
            ids[i].encode() if i in special else bytes(byte_of[c] for c in ids[i])
            for i in range(len(ids))
        ]
    except KeyError as e:
        raise ValueError(f"not a byte-level vocabulary: no {e}") from None


def write_tokenizer_bin(path, tokens, eot):
    """
    Writes tokenizer.bin. tokens: list[bytes]; eot: the id of end-of-text. Raises ValueError if a
    token has more than 255 bytes.
    """
    for i, token in enumerate(tokens):
        if len(token) > 255:
            raise ValueError(f"token {i} has {len(token)} bytes, over 255")
    with open(path, "wb") as f:
        header = [TOKENIZER_MAGIC, TOKENIZER_VERSION, len(tokens), eot]
        f.write(struct.pack("<256I", *header, *[0] * 252))
        for token in tokens:
            f.write(bytes([len(token)]) + token)


def write_shard(path, token_lists):
    """
    Writes lists of ids one after the other as a shard. Returns how many lists and how many tokens.

    Raises struct.error for an id outside 0..65535, and ValueError if there are more tokens than the
    header can count.
    """
    lists = tokens = 0
    with open(path, "wb") as f:
        f.write(bytes(1024))  # the header comes last: it holds the number of tokens
        for ids in token_lists:
            f.write(struct.pack(f"<{len(ids)}H", *ids))
            lists += 1
            tokens += len(ids)
        if tokens >= 1 << 31:
            raise ValueError(f"{tokens} tokens, over 2^31 - 1, are too many for one shard")
        f.seek(0)
        f.write(struct.pack("<3i", SHARD_MAGIC, SHARD_VERSION, tokens))
    return lists, tokens


def encode_shard(path, tokenizer, texts):
    """Writes a shard of an iterable of stories. Returns one line that describes it."""
    eot = tokenizer.token_to_id(EOT)
    size = done = 0

    def token_lists():
        nonlocal size, done
        texts_left = iter(texts)
        while chunk := list(itertools.islice(texts_left, CHUNK)):
            size += sum(len(text.encode()) for text in chunk)
            for encoding in tokenizer.encode_batch(chunk):
                yield [eot] + encoding.ids
            done += len(chunk)
            progress(f"{os.path.basename(path)}: {done} stories encoded")

    count, tokens = write_shard(path, token_lists())
    progress("")
    return (f"{count} stories, {tokens} tokens, {tokens / count:.1f} tokens per story, "
            f"{size / (tokens - count):.2f} bytes per token")


def sources(args):
    """
    Returns (files for training, files for validation, cut). It downloads them if necessary. If the
    same files serve both, the stories from number `cut` on are for validation.

    Raises OSError, or ValueError if there are too few stories.
    """
    if args.input:
        total = sum(1 for _ in stories_of(args.input))
        if total == 0:
            raise ValueError(f"{', '.join(args.input)}: no stories")
        if total == 1:
            raise ValueError(
                f"{', '.join(args.input)}: one story only: another is needed for validation")
        return args.input, args.input, max(1, total - max(1, round(total * args.val)))
    os.makedirs(args.out, exist_ok=True)
    paths = []
    for kind in ("train", "valid"):
        path = os.path.join(args.out, TINYSTORIES_FILE.format(kind))
        paths.append(download(TINYSTORIES.format(kind), path))
    for path in paths:
        if next(stories(path), None) is None:
            raise ValueError(f"{path}: no stories")
    return paths[:1], paths[1:], None


def check_outputs(args):
    """
    Raises ValueError if a file to write is a folder, or a file to read. --input must be no pipe: it
    is read several times.
    """
    for path in args.input:
        if os.path.exists(path) and not os.path.isfile(path):
            raise ValueError(f"--input: {path} is a folder, device or pipe; a file is needed")
    for path in (os.path.join(args.out, name) for name in OUTPUTS):
        if os.path.isdir(path):
            raise ValueError(f"--out: {path} is a folder; a file is to be written there")
        for read in filter(None, (*args.input, args.gpt2_vocab, args.gpt2_merges)):
            if os.path.realpath(read) == os.path.realpath(path):
                raise ValueError(
                    f"--out: {path} would overwrite what is read; choose another folder")


def make(args):
    """
    Makes all files in args.out. They get their names together, at the end. Raises OSError or
    ValueError.
    """
    check_outputs(args)
    train_paths, val_paths, cut = sources(args)
    os.makedirs(args.out, exist_ok=True)
    if args.vocab == "gpt2":
        vocab_file = os.path.join(args.out, "gpt2_vocab.json")
        merges_file = os.path.join(args.out, "gpt2_merges.txt")
        tokenizer = gpt2_bpe(args.gpt2_vocab or download(GPT2.format("vocab.json"), vocab_file),
                             args.gpt2_merges or download(GPT2.format("merges.txt"), merges_file))
    else:
        tokenizer = train_bpe(itertools.islice(stories_of(train_paths, args.shuffle), cut),
                              args.vocab)
    tokens, eot = token_bytes(tokenizer), tokenizer.token_to_id(EOT)
    if len(tokens) > MAX_VOCAB:
        raise ValueError(f"{args.gpt2_vocab}: {len(tokens)} tokens, over {MAX_VOCAB}")

    with tempfile.TemporaryDirectory(prefix=".tinystories-", dir=args.out) as folder:
        paths = {name: os.path.join(folder, name) for name in OUTPUTS}
        write_tokenizer_bin(paths["tokenizer.bin"], tokens, eot)
        with open(paths["tokenizer.json"], "w", encoding="utf-8") as f:
            f.write(tokenizer.to_str(pretty=True))
        training = itertools.islice(stories_of(train_paths, args.shuffle), cut)
        validation = itertools.islice(stories_of(val_paths, args.shuffle), cut, None)
        about = {
            "tokenizer.bin": f"{len(tokens)} tokens, end-of-text {eot}",
            "tokenizer.json": "the same, for Hugging Face",
            "train.bin": encode_shard(paths["train.bin"], tokenizer, training),
            "val.bin": encode_shard(paths["val.bin"], tokenizer, validation),
        }
        for name, path in paths.items():
            os.replace(path, os.path.join(args.out, name))
    for name, what in about.items():
        print(f"{os.path.join(args.out, name)}: {what}")


def vocabulary(text):
    """Reads the value of --vocab: a size, or "gpt2"."""
    if text == "gpt2":
        return text
    if not text.isdecimal() or not 257 <= int(text) <= MAX_VOCAB:
        raise argparse.ArgumentTypeError(f"must be gpt2 or 257..{MAX_VOCAB}, not {text}")
    return int(text)


def share(text):
    """Reads the value of --val: at least 0 and below 1."""
    value = float(text)
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 0 and below 1, not {text}")
    return value


def main():
    about = "Makes training data from TinyStories, or from any text."
    parser = argparse.ArgumentParser(prog="tinystories.py", description=about)
    add = parser.add_argument
    add("--input", metavar="FILE", nargs="+", default=[],
        help=f"UTF-8 text, one file or several; a line {EOT} separates two stories "
             "(default: TinyStories, downloaded to --out)")
    add("--shuffle", metavar="SEED", type=int,
        help="put the stories of --input in a random order first; they must fit into memory")
    add("--val", metavar="SHARE", type=share, default=0.05,
        help="share of the stories of --input for validation: the last ones, at least one story "
             "(default: %(default)s)")
    add("--vocab", metavar="N", type=vocabulary, default=4096,
        help=f"number of tokens of the vocabulary to train, 257..{MAX_VOCAB}, or gpt2 for GPT-2's "
             "own vocabulary (default: %(default)s)")
    add("--gpt2-vocab", metavar="FILE", help="GPT-2's vocab.json (default: downloaded to --out)")
    add("--gpt2-merges", metavar="FILE", help="GPT-2's merges.txt (default: downloaded to --out)")
    add("--out", metavar="DIR", default="data/tinystories",
        help="folder for the files (default: %(default)s)")
    args = parser.parse_args()
    if args.vocab != "gpt2" and (args.gpt2_vocab or args.gpt2_merges):
        parser.error("--gpt2-vocab and --gpt2-merges are for --vocab gpt2")
    if args.shuffle is not None and not args.input:
        parser.error("--shuffle is for --input")
    outputs.run(parser.prog, make, args)


if __name__ == "__main__":
    main()
