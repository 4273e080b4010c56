/*
How sample shows what happens: --watch draws the text, or a Sudoku board, while it is denoised; --show-loops what the model would say after
each loop. Included by loopmdm.c, which has the model and decode().
*/

// A board (side*side) as text: a grid with its boxes, or one line
static char *board_text(const Tokenizer *t, const int *x, int side, int grid) {
    int high = (int)sqrt(side), wide = side / high; // boxes of 4: 2 x 2, 6: 2 rows x 3 columns, 9: 3 x 3
    char *text = (char *)allocate((size_t)side * side * 8 + side * 64 + 1, 1, "the board"), *s = text;
    for (int i = 0; i < side * side; i++) {
        int column = i % side, row = i / side;
        if (grid && column == 0 && row && row % high == 0) {
            for (int k = 0; k < 2 * side - 1 + 2 * (side / wide - 1); k++) *s++ = '-';
            *s++ = '\n';
        }
        if (grid && column) s += sprintf(s, column % wide ? " " : " | ");
        s += x[i] >= t->vocab_size ? sprintf(s, ".") : sprintf(s, "%.*s", min_int(t->length[x[i]], 4), (const char *)t->bytes[x[i]]);
        if (column == side - 1 && i + 1 < side * side) *s++ = grid ? '\n' : ' ';
    }
    *s = 0;
    return text;
}

// A board to tokens: the digits and, for . and 0, MASK; spaces do not count. Returns how many.
static int encode_board(const Tokenizer *t, int *x, int most, int mask, const char *s) {
    int n = 0;
    for (; *s; s++) {
        if (isspace((unsigned char)*s)) continue;
        int id = *s == '.' || *s == '0' ? mask : t->byte_id[(unsigned char)*s];
        if (id < 0) die(USAGE, "--puzzle: '%c' is not in the model's vocabulary", *s);
        if (n == most) die(USAGE, "--puzzle has more than the %d cells that the model takes", most);
        x[n++] = id;
    }
    return n;
}

typedef struct { const Tokenizer *tokenizer; Model *model; int lines, side, show_loops; } Watch; // lines drawn so far, to be drawn over; side of a board, or 0

// Draws the text in place on a terminal, wrapped at its width; elsewhere as one line that begins with label.
static void draw(Watch *w, const int *x, int T, const char *label) {
    int terminal = isatty(1);
    char *text = w->side ? board_text(w->tokenizer, x, w->side, terminal) : decode(w->tokenizer, x, T), *s = text;
    if (!terminal) {
        for (; *s; s++) *s = *s == '\n' ? ' ' : *s;
        printf("%s |%s%s\n", label, *text == ' ' ? "" : " ", text);
        free(text);
        return;
    }
    struct winsize size;
    int known = !ioctl(1, TIOCGWINSZ, &size) && size.ws_col > 8 && size.ws_row > 2;
    int width = known ? size.ws_col - 1 : 79, height = known ? size.ws_row - 1 : 23;
    if (w->lines) printf("\033[%dA", w->lines); // back up over the last drawing,
    printf("\r\033[J");                        // and clear it
    if (w->show_loops) printf("%s\n", label);
    for (w->lines = w->show_loops > 0; *s && w->lines < height; w->lines++) {
        int n = (int)strcspn(s, "\n"), columns = 0, cut = 0, space = 0;
        for (; cut < n && columns < width; cut++) { // continuation bytes of UTF-8 take no column
            columns += (s[cut + 1] & 0xc0) != 0x80;
            if (s[cut] == ' ') space = cut;
        }
        if (cut < n && space) cut = space;
        printf("%.*s\n", cut, s);
        s += cut + (s[cut] == '\n' || s[cut] == ' ');
    }
    fflush(stdout);
    free(text);
    struct timespec pause = {0, (w->show_loops ? 4 : 1) * 60000000L}; // long enough to be seen
    nanosleep(&pause, NULL);
}

// With show_loops: what all blanks of x (T) would be if they were filled in after loop 1, 2, .. : the tail takes the state as it then is.
static void draw_each_loop(Watch *w, const int *x, int T, int step) {
    Model *m = w->model;
    int mask = m->config.vocab_size, n = 0, id = 0;
    int *blanks = (int *)allocate(3 * (size_t)T, sizeof(int), "the blanks"), *token = blanks + T, *filled = token + T;
    double *score = (double *)allocate(T, sizeof(double), "the blanks");
    Draw greedy = {0, 0, 1, SCORE_PROBABILITY, 0};
    for (int t = 0; t < T; t++)
        if (x[t] == mask) blanks[n++] = t;
    for (int S = 1; n && S <= w->show_loops; S++) {
        char label[48];
        snprintf(label, sizeof label, "%3d, loop %2d", step, S);
        model_tokens(m, x, 1, T);
        model_forward(m, S);
        model_sample(m, token, score, blanks, n, &id, greedy, 0);
        memcpy(filled, x, T * sizeof(int));
        for (int r = 0; r < n; r++) filled[blanks[r]] = token[r];
        draw(w, filled, T, label);
    }
    free(blanks), free(score);
}

static void watch(const int *x, int T, int step, void *data) {
    Watch *w = (Watch *)data;
    char label[48];
    snprintf(label, sizeof label, w->show_loops ? "%3d         " : "%3d", step + 1);
    draw(w, x, T, label);
    if (w->show_loops) draw_each_loop(w, x, T, step + 1);
}
