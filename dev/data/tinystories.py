"""Makes training data from TinyStories, or from any text: tokenizer.bin, train.bin, val.bin and tokenizer.json.

Stories are separated by <|endoftext|>. The .bin files are llm.c's, little-endian:
    tokenizer.bin   uint32[256] header: 20240328, version 2, vocabulary V, end-of-text id; then each token: a length byte, its bytes
    train.bin, val.bin   int32[256] header: 20240520, version 1, number of tokens; then the tokens as uint16
Each story is the end-of-text token and then its own tokens. tokenizer.json is Hugging Face's format, for checks.
"""
import argparse
import http.client
import itertools
import os
import struct
import sys
import tempfile
import urllib.request

try:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
except ImportError:
    if __name__ != "__main__":
        raise
    sys.exit("tinystories.py: needs Hugging Face's tokenizers: pip install tokenizers")

EOT = "<|endoftext|>"
MAX_VOCAB = 65535           # tokens are uint16, and the program gives its mask the id after the last token
TOKENIZER_MAGIC, TOKENIZER_VERSION = 20240328, 2
SHARD_MAGIC, SHARD_VERSION = 20240520, 1
OUTPUTS = ("tokenizer.bin", "tokenizer.json", "train.bin", "val.bin")
CHUNK = 1000                # stories encoded at once: enough for all cores, little memory
TINYSTORIES = "https://huggingface.co/datasets/roneneldan/TinyStories/resolve/main/TinyStoriesV2-GPT4-{}.txt"
GPT2 = "https://huggingface.co/openai-community/gpt2/resolve/main/{}"


def progress(text):
    """Rewrites the progress line, on a terminal only."""
    if sys.stderr.isatty():
        print("\r\033[K" + text, end="", file=sys.stderr, flush=True)


def stories(path):
    """Yields the stories of a UTF-8 text file, stripped, without the empty ones; all line ends become \\n. Raises ValueError if not UTF-8."""
    parts = []
    try:
        with open(path, encoding="utf-8-sig") as f:
            for line in itertools.chain(f, [EOT]):      # the end of the file ends the last story
                head, *tails = line.split(EOT)
                parts.append(head)
                for tail in tails:
                    story = "".join(parts).strip()
                    parts = [tail]
                    if story:
                        yield story
    except UnicodeDecodeError as e:
        raise ValueError(f"{path}: not UTF-8: {e.reason}") from None


def download(url, path):
    """Downloads url to path, unless path is there already; a part of a file never gets the name. Raises OSError."""
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
    """The tokenizer around a BPE model: GPT-2's pre-tokenization, after any in `first`, nothing else done to the text."""
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*first, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def train_bpe(texts, vocab, special=(EOT,), first=()):
    """Trains a byte-level BPE tokenizer of `vocab` tokens on an iterable of texts; `first` is done before GPT-2's pre-tokenization.

    Ids are in the order of merging, as the C encoder needs: 256 bytes, then the merges as learned, then the special tokens.
    Raises ValueError if the texts hold too few different pairs for that many tokens.
    """
    tokenizer = byte_level(models.BPE(), first)
    trainer = trainers.BpeTrainer(vocab_size=vocab - len(special), initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
                                  max_token_length=255, show_progress=False)   # the length must fit in a byte
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_special_tokens(list(special)) # added last: the trainer would put them first
    if tokenizer.get_vocab_size() < vocab:
        raise ValueError(f"the text is enough for a vocabulary of {tokenizer.get_vocab_size()} only, not {vocab}")
    return tokenizer


def gpt2_bpe(vocab_path, merges_path):
    """GPT-2's tokenizer from its vocab.json and merges.txt. Raises OSError, or ValueError if they are not that."""
    open(vocab_path).close()                    # for a clear error: the library would not name the file
    with open(merges_path, encoding="utf-8", errors="replace") as f:
        merges = ["".join(line.split()) for line in f if not line.startswith("#version")]
    try:
        tokenizer = byte_level(models.BPE.from_file(vocab_path, merges_path))
    except Exception as e:                      # the library raises nothing more precise
        raise ValueError(f"{vocab_path}, {merges_path}: not a BPE vocabulary and its merges: {e}") from None
    if tokenizer.token_to_id(EOT) is None:
        raise ValueError(f"{vocab_path}: no {EOT} token")
    if [tokenizer.id_to_token(i) for i in range(256, tokenizer.get_vocab_size() - 1)] != merges:
        raise ValueError(f"{vocab_path}: the ids are not in the order of the merges in {merges_path}")
    tokenizer.add_special_tokens([EOT])         # it keeps its id
    return tokenizer


def token_bytes(tokenizer):
    """The bytes of each token of a byte-level tokenizer, as list[bytes] in the order of the ids.

    Undoes GPT-2's mapping of bytes to printable characters: a printable Latin-1 byte is itself, the others are 256 and up.
    Raises ValueError if the ids are not 0, 1, 2, ... or a token has other characters.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in printable]
    byte_of = {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}
    ids = {i: token for token, i in tokenizer.get_vocab().items()}
    special = tokenizer.get_added_tokens_decoder()
    try:
        return [ids[i].encode() if i in special else bytes(byte_of[c] for c in ids[i]) for i in range(len(ids))]
    except KeyError as e:
        raise ValueError(f"not a byte-level vocabulary: no {e}") from None


def write_tokenizer_bin(path, tokens, eot):
    """Writes tokenizer.bin: tokens is a list[bytes], eot the end-of-text id. Raises ValueError for a token over 255 bytes."""
    for i, token in enumerate(tokens):
        if len(token) > 255:
            raise ValueError(f"token {i} has {len(token)} bytes, over 255")
    with open(path, "wb") as f:
        f.write(struct.pack("<256I", TOKENIZER_MAGIC, TOKENIZER_VERSION, len(tokens), eot, *[0] * 252))
        for token in tokens:
            f.write(bytes([len(token)]) + token)


def write_shard(path, token_lists):
    """Writes a shard of the given lists of ids, one after the other; returns (lists, tokens), the numbers written.

    Raises struct.error for an id outside 0..65535, ValueError for more tokens than the header can count.
    """
    lists = tokens = 0
    with open(path, "wb") as f:
        f.write(bytes(1024))                    # the header waits for the count
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
    """Writes the shard of an iterable of stories; returns one line that says what is in it."""
    eot, size, done = tokenizer.token_to_id(EOT), 0, 0

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
    return f"{count} stories, {tokens} tokens, {tokens / count:.1f} tokens per story, {size / (tokens - count):.2f} bytes per token"


def sources(args):
    """The text files (training, validation, cut), downloaded if need be. With one file for both, validation starts at story `cut`.

    Raises OSError, or ValueError if there are too few stories.
    """
    if args.input:
        total = sum(1 for _ in stories(args.input))
        if total < 2:
            raise ValueError(f"{args.input}: " + ("one story only: another is needed for validation" if total else "no stories"))
        return args.input, args.input, max(1, total - max(1, round(total * args.val)))
    os.makedirs(args.out, exist_ok=True)
    paths = [download(TINYSTORIES.format(kind), os.path.join(args.out, f"TinyStoriesV2-GPT4-{kind}.txt")) for kind in ("train", "valid")]
    for path in paths:
        if next(stories(path), None) is None:
            raise ValueError(f"{path}: no stories")
    return *paths, None


def make(args):
    """Makes all files in args.out; they get their names at the end, together. Raises OSError or ValueError."""
    for path in (os.path.join(args.out, name) for name in OUTPUTS):
        if os.path.isdir(path):
            raise ValueError(f"--out: {path} is a folder; a file is to be written there")
        for read in filter(None, (args.input, args.gpt2_vocab, args.gpt2_merges)):
            if os.path.realpath(read) == os.path.realpath(path):
                raise ValueError(f"--out: {path} would overwrite what is read; choose another folder")
    train_path, val_path, cut = sources(args)
    os.makedirs(args.out, exist_ok=True)
    if args.vocab == "gpt2":
        tokenizer = gpt2_bpe(args.gpt2_vocab or download(GPT2.format("vocab.json"), os.path.join(args.out, "gpt2_vocab.json")),
                             args.gpt2_merges or download(GPT2.format("merges.txt"), os.path.join(args.out, "gpt2_merges.txt")))
    else:
        tokenizer = train_bpe(itertools.islice(stories(train_path), cut), args.vocab)
    tokens, eot = token_bytes(tokenizer), tokenizer.token_to_id(EOT)
    if len(tokens) > MAX_VOCAB:
        raise ValueError(f"{args.gpt2_vocab}: {len(tokens)} tokens, over {MAX_VOCAB}")

    with tempfile.TemporaryDirectory(prefix=".tinystories-", dir=args.out) as folder:
        paths = {name: os.path.join(folder, name) for name in OUTPUTS}
        write_tokenizer_bin(paths["tokenizer.bin"], tokens, eot)
        with open(paths["tokenizer.json"], "w", encoding="utf-8") as f:
            f.write(tokenizer.to_str(pretty=True))
        about = {"tokenizer.bin": f"{len(tokens)} tokens, end-of-text {eot}",
                 "tokenizer.json": "the same, for Hugging Face",
                 "train.bin": encode_shard(paths["train.bin"], tokenizer, itertools.islice(stories(train_path), cut)),
                 "val.bin": encode_shard(paths["val.bin"], tokenizer, itertools.islice(stories(val_path), cut, None))}
        for name, path in paths.items():
            os.replace(path, os.path.join(args.out, name))
    for name, what in about.items():
        print(f"{os.path.join(args.out, name)}: {what}")


def vocabulary(text):
    """The value of --vocab: a size, or "gpt2"."""
    if text == "gpt2":
        return text
    if not text.isdecimal() or not 257 <= int(text) <= MAX_VOCAB:
        raise argparse.ArgumentTypeError(f"must be gpt2 or 257..{MAX_VOCAB}, not {text}")
    return int(text)


def share(text):
    """The value of --val: 0 or more, below 1."""
    value = float(text)
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 0 and below 1, not {text}")
    return value


def run(program, make, args):
    """Calls make(args). An OSError or ValueError, or Ctrl-C, becomes one line on standard error that begins with the program's name, and status 1."""
    try:
        make(args)
    except (OSError, ValueError) as e:
        named = getattr(e, "filename", None)
        sys.exit(f"{program}: {named}: {e.strerror}" if named else f"{program}: {e}")
    except KeyboardInterrupt:
        sys.exit(f"\n{program}: interrupted")


def main():
    parser = argparse.ArgumentParser(prog="tinystories.py", description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--input", metavar="FILE", help=f"UTF-8 text, stories separated by lines {EOT} (default: TinyStories, downloaded to --out)")
    add("--val", metavar="SHARE", type=share, default=0.05,
        help="share of the stories of --input, the last ones, for validation, at least one (default: %(default)s)")
    add("--vocab", metavar="N", type=vocabulary, default=4096,
        help=f"tokens in the vocabulary to train, 257..{MAX_VOCAB}, or gpt2 for GPT-2's own (default: %(default)s)")
    add("--gpt2-vocab", metavar="FILE", help="GPT-2's vocab.json (default: downloaded to --out)")
    add("--gpt2-merges", metavar="FILE", help="GPT-2's merges.txt (default: downloaded to --out)")
    add("--out", metavar="DIR", default="data/tinystories", help="folder for the files (default: %(default)s)")
    args = parser.parse_args()
    if args.vocab != "gpt2" and (args.gpt2_vocab or args.gpt2_merges):
        parser.error("--gpt2-vocab and --gpt2-merges are for --vocab gpt2")
    run(parser.prog, make, args)


if __name__ == "__main__":
    main()
