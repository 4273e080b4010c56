/*
Text, templates with blanks and Sudoku boards: to tokens, and back. Wrong input ends the program
with a line that names the option.

Included by dev/tools.c and dev/demo/web/web.c, after tokenizer.h. They have die(), allocate(),
min_int() and max_int().
*/
#include <ctype.h>

// The text of tokens (n): the first `shown` whole, then up to an end-of-text. MASK is shown as a
// blank. Sets bytes to its length, as it may hold zeros. The caller frees it.
static char *text_of(const Tokenizer *t, const int *tokens, int n, int shown, size_t *bytes) {
    char *text = (char *)allocate((size_t)n * max_int(t->longest, 3) + 1, 1, "text"), *s = text;
    for (int i = 0; i < n && (i < shown || tokens[i] != t->eot); i++) {
        int id = tokens[i], masked = id >= t->vocab_size, length = masked ? 3 : t->length[id];
        memcpy(s, masked ? " __" : (const char *)t->bytes[id], length);
        s += length;
    }
    *bytes = s - text;
    return text;
}

// The same, after a first end-of-text, with which each text begins. Without a tokenizer (NULL): the
// ids. The caller frees it.
static char *decode(const Tokenizer *t, const int *tokens, int T, int shown, size_t *bytes) {
    int begin = t && T > 0 && tokens[0] == t->eot;
    if (t) return text_of(t, tokens + begin, T - begin, shown - begin, bytes);
    char *text = (char *)allocate((size_t)T * 6 + 1, 1, "text"), *s = text; // ids up to 65535
    for (int i = 0; i < T; i++) s += sprintf(s, i ? " %d" : "%d", tokens[i]);
    *bytes = s - text;
    return text;
}

// The n bytes at s to tokens; without a tokenizer (NULL) they are ids below V. Returns how many.
static int encode_text(const Tokenizer *t, int *x, int V, const char *s, size_t n,
                       const char *option) {
    if (t) return (int)tokenizer_encode(t, x, s, n, option);
    const char *end = s + n;
    char *after;
    int count = 0;
    for (s += strspn(s, " \t\n"); s < end; s = after + strspn(after, " \t\n")) {
        long id = strtol(s, &after, 10);
        if (after == s || id < 0 || id >= V)
            die(USAGE, "%s: this model has no tokenizer, so it takes ids from 0 to %d, not '%.20s'",
                option, V - 1, s);
        x[count++] = (int)id;
    }
    return count;
}

// A template to tokens. A run of three or more underscores is blanks, one for every four begun; the
// space before it belongs to the blank. Returns how many tokens. mask: MASK's id, which is V.
static int encode_template(const Tokenizer *t, int *x, int mask, const char *s) {
    int n = 0;
    while (*s) {
        const char *end = strstr(s, "___");
        if (!end) end = s + strlen(s);
        int run = (int)strspn(end, "_"); // underscores, 0 at the end of the text
        int space = run && end > s && end[-1] == ' ';
        n += encode_text(t, x + n, mask, s, end - s - space, "--fill");
        for (int i = 0; i < run; i += 4) x[n++] = mask; // ____ is one token, _____ two
        s = end + run;
    }
    return n;
}

// A board to tokens: its digits and, for . and 0, MASK; spaces do not count. Returns how many.
static int encode_board(const Tokenizer *t, int *x, int most, int mask, const char *s) {
    int n = 0;
    for (; *s; s++) {
        if (isspace((unsigned char)*s)) continue;
        int id = *s == '.' || *s == '0' ? mask : t->byte_id[(unsigned char)*s]; // -1: no token
        if (id < 0) die(USAGE, "--puzzle: '%c' is not in the model's vocabulary", *s);
        if (n == most)
            die(USAGE, "--puzzle has more than the %d cells that the model takes", most);
        x[n++] = id;
    }
    return n;
}

// A board (side*side) as text: a grid with its boxes, or one line. The caller frees it.
static char *board_text(const Tokenizer *t, const int *x, int side, int grid, size_t *bytes) {
    int high = (int)sqrt(side), wide = side / high; // a box of a board of 6: 2 rows x 3 columns
    int cells = side * side, line = 2 * side - 1 + 2 * (side / wide - 1);
    char *text = (char *)allocate((size_t)cells * 8 + side * 64 + 1, 1, "the board"), *s = text;
    for (int i = 0; i < cells; i++) {
        int column = i % side, row = i / side;
        if (grid && column == 0 && row && row % high == 0) { // a line between boxes
            memset(s, '-', line);
            s += line;
            *s++ = '\n';
        }
        if (grid && column) s += sprintf(s, column % wide ? " " : " | ");
        int masked = x[i] >= t->vocab_size;
        const char *cell = masked ? "." : (const char *)t->bytes[x[i]];
        s += sprintf(s, "%.*s", masked ? 1 : min_int(t->length[x[i]], 4), cell);
        if (column == side - 1 && i + 1 < cells) *s++ = grid ? '\n' : ' ';
    }
    *s = 0;
    *bytes = s - text;
    return text;
}
