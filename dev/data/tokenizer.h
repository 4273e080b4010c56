/*
GPT-2's byte-level BPE, from llm.c's tokenizer.bin: uint32[256] header (magic, version, vocabulary size, id of the end-of-text token), then for
each token a byte with its length and its bytes. There is no merge table: ids are in the order in which merges were learned, so the pair to
merge next is the one whose union is the token of lowest id. Equal to Hugging Face's tokenizers (dev/test_python.py).

Included by loopmdm.c, which has die(), allocate() and map_file().
*/
#include "unicode.h" // which code points are letters, numbers, spaces: pre-tokenization asks

enum { MOST_SPECIAL = 256 };

typedef struct {
    const unsigned char *file;   // as it is on disk, mapped
    size_t file_size;
    int vocab_size, eot;
    const unsigned char **bytes; // (V) each token's bytes,
    int *length;                 // (V) and how many
    int *table, table_size;      // hash table from bytes to id, -1 where empty; a power of two
    int longest, byte_id[256];   // -1: this byte has no token
    int special[MOST_SPECIAL], num_special; // tokens whose own text stands for them: end-of-text, and those of the form <|...|>
} Tokenizer;

static uint32_t hash_bytes(const unsigned char *s, int n) { // FNV-1a
    uint32_t h = 2166136261u;
    for (int i = 0; i < n; i++) h = (h ^ s[i]) * 16777619u;
    return h;
}

// The token with these bytes, or -1
static int tokenizer_find(const Tokenizer *t, const unsigned char *s, int n) {
    if (n > t->longest) return -1;
    for (uint32_t i = hash_bytes(s, n);; i++) {
        int id = t->table[i & (t->table_size - 1)];
        if (id < 0 || (t->length[id] == n && !memcmp(t->bytes[id], s, n))) return id;
    }
}

static Tokenizer tokenizer_open(const char *path) {
    size_t size, at = HEADER_INTS * 4;
    const unsigned char *file = map_file(path, TOKENIZER_MAGIC, "tokenizer", &size);
    const uint32_t *header = (const uint32_t *)file;
    Tokenizer t;
    memset(&t, 0, sizeof t);
    t.file = file, t.file_size = size;
    if (header[1] < 1 || header[1] > 2) die(FAILED, "%s is a tokenizer of version %u; this program reads 1 and 2", path, header[1]);
    if (header[2] < 1 || header[2] > 65535) die(FAILED, "%s is damaged: a vocabulary of %u tokens", path, header[2]);
    t.vocab_size = (int)header[2];
    t.eot = header[1] == 1 ? 50256 : (int)header[3]; // version 1 is always GPT-2's
    if (t.eot < 0 || t.eot >= t.vocab_size) die(FAILED, "%s is damaged: its end-of-text token %d is not in its vocabulary", path, t.eot);
    for (t.table_size = 4; t.table_size < 4 * t.vocab_size; t.table_size *= 2) {}
    t.bytes = (const unsigned char **)allocate(t.vocab_size, sizeof *t.bytes, "the tokenizer");
    t.length = (int *)allocate(t.vocab_size, sizeof *t.length, "the tokenizer");
    t.table = (int *)allocate(t.table_size, sizeof *t.table, "the tokenizer");
    for (int i = 0; i < t.table_size; i++) t.table[i] = -1;
    for (int id = 0; id < t.vocab_size; id++) {
        if (at >= size || at + 1 + file[at] > size) die(FAILED, "%s is damaged: it ends at token %d of %d", path, id, t.vocab_size);
        t.length[id] = file[at];
        t.bytes[id] = file + at + 1;
        at += 1 + file[at];
        t.longest = max_int(t.longest, t.length[id]);
        int special = id == t.eot || (t.length[id] > 4 && !memcmp(t.bytes[id], "<|", 2) && !memcmp(t.bytes[id] + t.length[id] - 2, "|>", 2));
        if (special && t.length[id] && t.num_special == MOST_SPECIAL) die(FAILED, "%s has more than %d tokens of the form <|...|>", path, MOST_SPECIAL);
        if (special && t.length[id]) t.special[t.num_special++] = id;
        if (special || tokenizer_find(&t, t.bytes[id], t.length[id]) >= 0) continue; // text never merges into these
        uint32_t i = hash_bytes(t.bytes[id], t.length[id]) & (t.table_size - 1);
        while (t.table[i] >= 0) i = (i + 1) & (t.table_size - 1);
        t.table[i] = id;
    }
    if (at != size) die(FAILED, "%s is damaged: %zu bytes follow its last token", path, size - at);
    for (int b = 0; b < 256; b++) {
        unsigned char byte = (unsigned char)b;
        t.byte_id[b] = tokenizer_find(&t, &byte, 1);
    }
    return t;
}

enum { LETTER, NUMBER, SPACE, OTHER };

static int in_ranges(uint32_t c, const uint32_t (*range)[2], int n) {
    int low = 0;
    while (n > 0) { // binary search for the range that may hold c
        if (range[low + n / 2][1] < c) low += n / 2 + 1, n -= n / 2 + 1;
        else if (range[low + n / 2][0] > c) n /= 2;
        else return 1;
    }
    return 0;
}

// The class of the character at s (of n > 0 bytes) and its length; a byte that is no valid UTF-8 is a character of its own.
static int character_class(const unsigned char *s, int n, int *length) {
    uint32_t c = s[0];
    *length = 1;
    if (c >= 0x80) {
        int extra = c >= 0xf0 && c < 0xf5 ? 3 : c >= 0xe0 && c < 0xf0 ? 2 : c >= 0xc2 && c < 0xe0 ? 1 : 0;
        if (!extra || extra >= n) return OTHER;
        c &= 0x3f >> extra;
        for (int i = 1; i <= extra; i++) {
            if ((s[i] & 0xc0) != 0x80) return OTHER;
            c = c << 6 | (s[i] & 0x3f);
        }
        if ((extra == 2 && (c < 0x800 || (c >= 0xd800 && c < 0xe000))) || (extra == 3 && (c < 0x10000 || c > 0x10ffff))) return OTHER;
        *length = extra + 1;
    }
#define IN(ranges) in_ranges(c, ranges, (int)(sizeof(ranges) / sizeof(ranges[0])))
    return IN(unicode_letters) ? LETTER : IN(unicode_numbers) ? NUMBER : IN(unicode_spaces) ? SPACE : OTHER;
#undef IN
}

// Length in bytes of the first piece of text s, n > 0. No token reaches across pieces. GPT-2's pattern, first match wins:
//   's|'t|'re|'ve|'m|'ll|'d | ?letters | ?numbers | ?others | spaces before another space or the end | spaces
static int piece_length(const unsigned char *s, int n) {
    static const char *const contractions[] = {"'s", "'t", "'re", "'ve", "'m", "'ll", "'d"};
    for (int i = 0; i < 7; i++) {
        int k = (int)strlen(contractions[i]);
        if (k <= n && !memcmp(s, contractions[i], k)) return k;
    }
    int length, at = s[0] == ' ' && n > 1 ? 1 : 0, kind = character_class(s + at, n - at, &length);
    if (kind != SPACE) {
        while ((at += length) < n && character_class(s + at, n - at, &length) == kind) {}
        return at;
    }
    int last = 0;
    for (at = 0; at < n && character_class(s + at, n - at, &length) == SPACE; at += length) last = at;
    return at == n || last == 0 ? at : last; // the last space belongs to the word after it
}

// Encodes one piece s of n bytes by merging from single bytes upwards: ids (n at most) -> their count
static int encode_piece(const Tokenizer *t, int *ids, const unsigned char *s, int n, const char *source) {
    int *start = (int *)allocate(2 * (size_t)n + 2, sizeof(int), "encoding"), *pair = start + n + 1, count = n;
    for (int i = 0; i <= n; i++) start[i] = i;
    for (int i = 0; i < n; i++) {
        if (t->byte_id[s[i]] < 0) die(FAILED, "%s: the tokenizer has no token for the byte 0x%02x", source, s[i]);
        pair[i] = i + 1 < n ? tokenizer_find(t, s + i, 2) : -1; // the union of parts i and i+1
    }
    for (;;) {
        int lowest = INT_MAX, kept = 0;
        for (int i = 0; i < count; i++)
            if (pair[i] >= 0 && pair[i] < lowest) lowest = pair[i];
        if (lowest == INT_MAX) break;
        for (int i = 0; i < count; kept++) { // merge it everywhere, from left to right; -2: to be looked up again
            start[kept] = start[i];
            int merge = pair[i] == lowest;
            pair[kept] = merge ? -2 : pair[i];
            if (merge && kept) pair[kept - 1] = -2;
            i += merge ? 2 : 1;
        }
        start[kept] = n;
        count = kept;
        for (int i = 0; i < count; i++)
            if (pair[i] == -2) pair[i] = i + 1 < count ? tokenizer_find(t, s + start[i], start[i + 2] - start[i]) : -1;
    }
    for (int i = 0; i < count; i++) {
        int length = start[i + 1] - start[i];
        ids[i] = length == 1 ? t->byte_id[s[start[i]]] : tokenizer_find(t, s + start[i], length);
    }
    free(start);
    return count;
}

// Where the text of a token such as <|endoftext|>, <|...|>, next stands in s as such, from begin on, and that token; n if nowhere.
static size_t find_special(const Tokenizer *t, const char *s, size_t begin, size_t n, int *id) {
    for (; begin < n; begin++)
        for (int i = 0; i < t->num_special; i++) {
            size_t length = t->length[*id = t->special[i]];
            if (length <= n - begin && s[begin] == (char)t->bytes[*id][0] && !memcmp(s + begin, t->bytes[*id], length)) return begin;
        }
    return n;
}

// Text of n bytes (any bytes, less than 2 GiB) -> ids (n at most), and their count. See find_special().
// source names the text in the error message about a byte without a token.
static size_t tokenizer_encode(const Tokenizer *t, int *ids, const char *text, size_t n, const char *source) {
    const unsigned char *s = (const unsigned char *)text;
    size_t count = 0;
    for (size_t begin = 0; begin < n;) {
        int id = t->eot;
        size_t end = find_special(t, text, begin, n, &id);
        while (begin < end) {
            int length = piece_length(s + begin, (int)(end - begin));
            count += encode_piece(t, ids + count, s + begin, length, source);
            begin += length;
        }
        if (end < n) ids[count++] = id, begin += t->length[id];
    }
    return count;
}
