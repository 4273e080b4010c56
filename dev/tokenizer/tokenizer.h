/*
GPT-2's byte-level BPE, from llm.c's tokenizer.bin: uint32[256] header (magic, version, vocabulary
size, id of the end-of-text token), then for each token one byte with its length, and its bytes.
There is no table of merges. Ids are in the order in which merges were learned, so the pair to merge
next is the one whose union is the token of the lowest id. It gives the same ids as Hugging Face's
tokenizers (dev/test/test_python.py).

Included by dev/tools.c, which has die(), allocate() and map_file().
*/
#include "unicode.h" // which characters are letters, numbers, spaces

enum { TOKENIZER_MAGIC = 20240328, MOST_SPECIAL = 256 };

typedef struct {
    const unsigned char *file;   // as it is on disk, mapped
    size_t file_size;
    int vocab_size, eot;         // eot: the end-of-text token
    const unsigned char **bytes; // (V) each token's bytes,
    int *length;                 // (V) and how many
    int longest;                 // of these lengths
    int byte_id[256];            // the token of a single byte, -1: there is none
    int *table, table_size;      // hash table from bytes to id, -1 where empty; a power of two
    int special[MOST_SPECIAL];   // tokens that their own text stands for: end-of-text, and those
    int num_special;             // of the form <|...|>
} Tokenizer;

// ---- pre-tokenization: text is cut into pieces, and no token reaches across two of them ----

enum { LETTER, NUMBER, SPACE, OTHER };

static int in_ranges(uint32_t c, const uint32_t (*range)[2], int n) {
    int low = 0, high = n; // if a range holds c, it is one of low .. high-1
    while (low < high) {
        int middle = (low + high) / 2;
        if (range[middle][1] < c) low = middle + 1;
        else if (range[middle][0] > c) high = middle;
        else return 1;
    }
    return 0;
}

// How many bytes follow the first byte of a character in UTF-8: 1 to 3, or 0 if none begins so.
static int bytes_after(unsigned char first) {
    if (first >= 0xf0 && first < 0xf5) return 3;
    if (first >= 0xe0 && first < 0xf0) return 2;
    return first >= 0xc2 && first < 0xe0;
}

// The class of the character at s, which has n > 0 bytes, and the character's length in bytes. A
// byte that is not valid UTF-8 is a character.
static int character_class(const unsigned char *s, int n, int *length) {
    uint32_t c = s[0];
    *length = 1;
    if (c >= 0x80) {
        int extra = bytes_after(s[0]);
        if (!extra || extra >= n) return OTHER;
        c &= 0x3f >> extra;
        for (int i = 1; i <= extra; i++) {
            if ((s[i] & 0xc0) != 0x80) return OTHER;
            c = c << 6 | (s[i] & 0x3f);
        }
        // Too long for what it encodes, half of a UTF-16 pair, or beyond the last character.
        if (extra == 2 && (c < 0x800 || (c >= 0xd800 && c < 0xe000))) return OTHER;
        if (extra == 3 && (c < 0x10000 || c > 0x10ffff)) return OTHER;
        *length = extra + 1;
    }
    if (in_ranges(c, unicode_letters, COUNT(unicode_letters))) return LETTER;
    if (in_ranges(c, unicode_numbers, COUNT(unicode_numbers))) return NUMBER;
    return in_ranges(c, unicode_spaces, COUNT(unicode_spaces)) ? SPACE : OTHER;
}

// The length in bytes of the first piece of text s (n > 0 bytes). GPT-2's pattern; the first match
// wins: 's|'t|'re|'ve|'m|'ll|'d | ?letters | ?numbers | ?others | spaces before another space or
// the end | spaces
static int piece_length(const unsigned char *s, int n) {
    static const char *const contractions[] = {"'s", "'t", "'re", "'ve", "'m", "'ll", "'d"};
    for (int i = 0; i < COUNT(contractions); i++) {
        int k = (int)strlen(contractions[i]);
        if (k <= n && !memcmp(s, contractions[i], k)) return k;
    }

    // A word, number or signs, with one space before it.
    int length, at = s[0] == ' ' && n > 1;
    int kind = character_class(s + at, n - at, &length);
    if (kind != SPACE) {
        for (at += length; at < n; at += length)
            if (character_class(s + at, n - at, &length) != kind) break;
        return at;
    }

    // Spaces. The last of several belongs to the word after it.
    int last = 0;
    for (at = 0; at < n && character_class(s + at, n - at, &length) == SPACE; at += length)
        last = at;
    return at == n || last == 0 ? at : last;
}

// ---- the vocabulary ----

static uint32_t hash_bytes(const unsigned char *s, int n) { // FNV-1a
    uint32_t h = 2166136261u;
    for (int i = 0; i < n; i++) h = (h ^ s[i]) * 16777619u;
    return h;
}

// The token with these bytes, or -1.
static int tokenizer_find(const Tokenizer *t, const unsigned char *s, int n) {
    if (n > t->longest) return -1;
    for (uint32_t i = hash_bytes(s, n);; i++) {
        int id = t->table[i & (t->table_size - 1)];
        if (id < 0 || (t->length[id] == n && !memcmp(t->bytes[id], s, n))) return id;
    }
}

// Special tokens are end-of-text, and those of the form <|...|> that pre-tokenization would cut: no
// merge has made them. A tokenizer may well have learned <|=|>, which is three signs in one piece.
static int is_special(const Tokenizer *t, int id) {
    int n = t->length[id];
    const unsigned char *s = t->bytes[id];
    if (id == t->eot) return 1;
    return n > 4 && !memcmp(s, "<|", 2) && !memcmp(s + n - 2, "|>", 2) && piece_length(s, n) < n;
}

// Adds a token, whose bytes are known, to the special ones or to the hash table.
static void tokenizer_add(Tokenizer *t, int id, const char *path) {
    t->longest = max_int(t->longest, t->length[id]);
    if (is_special(t, id)) { // text never merges into it, so the table does not have it
        if (!t->length[id]) return;
        if (t->num_special == MOST_SPECIAL)
            die(FAILED, "%s has more than %d tokens of the form <|...|>", path, MOST_SPECIAL);
        t->special[t->num_special++] = id;
        return;
    }
    if (tokenizer_find(t, t->bytes[id], t->length[id]) >= 0) return;
    uint32_t i = hash_bytes(t->bytes[id], t->length[id]) & (t->table_size - 1);
    while (t->table[i] >= 0) i = (i + 1) & (t->table_size - 1);
    t->table[i] = id;
}

static Tokenizer tokenizer_open(const char *path) {
    size_t size, at = HEADER_INTS * 4;
    const int *header = map_file(path, TOKENIZER_MAGIC, 0, "tokenizer", &size), version = header[1];
    if (version < 1 || version > 2)
        die(FAILED, "%s is a tokenizer of version %d; this program reads 1 and 2", path, version);
    const unsigned char *file = (const unsigned char *)header;
    Tokenizer t;
    memset(&t, 0, sizeof t);
    t.file = file;
    t.file_size = size;
    t.vocab_size = header[2];
    t.eot = version == 1 ? 50256 : header[3]; // version 1 is always GPT-2's
    if (t.vocab_size < 1 || t.vocab_size > 65535)
        die(FAILED, "%s is damaged: a vocabulary of %u tokens", path, (unsigned)t.vocab_size);
    if (t.eot < 0 || t.eot >= t.vocab_size)
        die(FAILED, "%s is damaged: its end-of-text token %d is not in its vocabulary", path,
            t.eot);

    t.table_size = 4;
    while (t.table_size < 4 * t.vocab_size) t.table_size *= 2;
    t.bytes = (const unsigned char **)allocate(t.vocab_size, sizeof *t.bytes, "the tokenizer");
    t.length = (int *)allocate(t.vocab_size, sizeof *t.length, "the tokenizer");
    t.table = (int *)allocate(t.table_size, sizeof *t.table, "the tokenizer");
    for (int i = 0; i < t.table_size; i++) t.table[i] = -1;

    for (int id = 0; id < t.vocab_size; id++) {
        if (at >= size || at + 1 + file[at] > size)
            die(FAILED, "%s is damaged: it ends at token %d of %d", path, id, t.vocab_size);
        t.length[id] = file[at];
        t.bytes[id] = file + at + 1;
        at += 1 + file[at];
        tokenizer_add(&t, id, path);
    }
    if (at != size)
        die(FAILED, "%s is damaged: %zu bytes follow its last token", path, size - at);
    for (int b = 0; b < 256; b++) {
        unsigned char byte = (unsigned char)b;
        t.byte_id[b] = tokenizer_find(&t, &byte, 1);
    }
    return t;
}

// ---- encoding ----

// Encodes one piece s of n bytes: ids (at most n) -> their count. It begins with single bytes and
// merges neighbours, until no two of them are a token.
static int encode_piece(const Tokenizer *t, int *ids, const unsigned char *s, int n,
                        const char *source) {
    int *start = (int *)allocate(2 * (size_t)n + 2, sizeof(int), "encoding");
    int *pair = start + n + 1; // the token that is the union of parts i and i+1, or -1
    int count = n;
    for (int i = 0; i <= n; i++) start[i] = i;
    for (int i = 0; i < n; i++) {
        if (t->byte_id[s[i]] < 0)
            die(FAILED, "%s: the tokenizer has no token for the byte 0x%02x", source, s[i]);
        pair[i] = i + 1 < n ? tokenizer_find(t, s + i, 2) : -1;
    }
    for (;;) {
        int lowest = INT_MAX, kept = 0;
        for (int i = 0; i < count; i++)
            if (pair[i] >= 0 && pair[i] < lowest) lowest = pair[i];
        if (lowest == INT_MAX) break;

        // Merge this pair everywhere, from left to right. -2: the union is to be looked up again.
        for (int i = 0; i < count; kept++) {
            start[kept] = start[i];
            int merge = pair[i] == lowest;
            pair[kept] = merge ? -2 : pair[i];
            if (merge && kept) pair[kept - 1] = -2;
            i += merge ? 2 : 1;
        }
        start[kept] = n;
        count = kept;
        for (int i = 0; i < count; i++) {
            if (pair[i] != -2) continue;
            pair[i] = -1;
            if (i + 1 < count) pair[i] = tokenizer_find(t, s + start[i], start[i + 2] - start[i]);
        }
    }
    for (int i = 0; i < count; i++) {
        int length = start[i + 1] - start[i];
        ids[i] = length == 1 ? t->byte_id[s[start[i]]] : tokenizer_find(t, s + start[i], length);
    }
    free(start);
    return count;
}

// Where the text of a special token, such as <|endoftext|>, stands in s, from begin on, and which
// token it is. n if nowhere.
static size_t find_special(const Tokenizer *t, const char *s, size_t begin, size_t n, int *id) {
    for (; begin < n; begin++)
        for (int i = 0; i < t->num_special; i++) {
            *id = t->special[i];
            size_t length = t->length[*id];
            if (length > n - begin || s[begin] != (char)t->bytes[*id][0]) continue;
            if (!memcmp(s + begin, t->bytes[*id], length)) return begin;
        }
    return n;
}

// Text of n bytes (any bytes, less than 2 GiB) -> ids (at most n), and their count. source names
// the text in the error message about a byte without a token.
static size_t tokenizer_encode(const Tokenizer *t, int *ids, const char *text, size_t n,
                               const char *source) {
    const unsigned char *s = (const unsigned char *)text;
    size_t count = 0, begin = 0;
    while (begin < n) {
        int id = t->eot;
        size_t end = find_special(t, text, begin, n, &id);
        while (begin < end) {
            int length = piece_length(s + begin, (int)(end - begin));
            count += encode_piece(t, ids + count, s + begin, length, source);
            begin += length;
        }
        if (end == n) break;
        ids[count++] = id;
        begin += t->length[id];
    }
    return count;
}
