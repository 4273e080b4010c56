/*
What loopmdm.c measures beside the method: loss by noise level, the residual stream by loop, attention between masked positions, puzzles
solved and questions answered. Included by loopmdm.c, which has everything that is used here.
*/

// The tokenizer of a trained model, if there is one.
static int find_tokenizer(Tokenizer *t, const Model *m, const char *folder) {
    char *path = join_path(folder, "tokenizer.bin");
    int found = opt_tokenizer || !access(path, F_OK);
    if (found) *t = model_tokenizer(m, folder);
    free(path);
    return found;
}

// Opens a CSV file beside its name, so that an old one stays until the new one is complete; csv_close() puts it in place.
static FILE *csv_open(const char *path, const char *columns) {
    struct stat info;
    if (!stat(path, &info) && !S_ISREG(info.st_mode)) die(FAILED, "cannot write %s: it is a folder, device or pipe", path);
    char *temporary = concat(path, ".tmp");
    FILE *file = fopen(temporary, "w");
    if (!file) die(FAILED, "cannot write %s: %s", path, strerror(errno));
    fprintf(file, "%s\n", columns);
    free(temporary);
    return file;
}

// Before anything is computed: can it be written, and without overwriting what is read?
static void csv_check(const char *option, const char *path) {
    for (int i = 0; i < NUM_MODEL_FILES; i++) keep_apart(option, path, "--model's", join_path(opt_model, model_files[i]));
    keep_apart_from_data(option, path, "--data", opt_data);
    if (opt_tokenizer) keep_apart(option, path, "--tokenizer", opt_tokenizer);
    fclose(csv_open(path, ""));
    unlink(concat(path, ".tmp"));
}

static void csv_close(FILE *file, const char *path) {
    int failed = ferror(file) | fflush(file), error = errno;
    if (fclose(file)) failed = 1, error = errno;
    if (!failed) failed = error = commit_file(path);
    if (failed) {
        unlink(concat(path, ".tmp"));
        die(FAILED, "cannot write %s: %s; what was there before is unchanged", path, strerror(error));
    }
}

// How many tokens a byte of text has, in the rows that evaluate() takes. End-of-text counts as the one byte that a file needs between texts; those
// that fill up a row after it are no text.
static double tokens_per_byte(const Data *d, const Tokenizer *t, int rows, int T) {
    int *tokens = (int *)allocate(T, sizeof(int), "a row");
    double count = 0, bytes = 0;
    for (int r = 0; r < rows; r++)
        for (int i = evaluation_row(d, tokens, r, rows, T); i < T; i++) {
            count++;
            if (tokens[i] != t->eot) bytes += t->length[tokens[i]];
            else if (i == 0 || tokens[i - 1] != t->eot) bytes++;
        }
    free(tokens);
    return count / bytes;
}

// Of eval and attention: --rows of T tokens, and --buckets
static void check_rows(int T) {
    if ((double)opt_rows * T > INT_MAX / 4) die(USAGE, "--rows %d are too many", opt_rows);
    if (opt_buckets > 1000) die(USAGE, "--buckets is %d; at most 1000", opt_buckets);
}

static int bucket_of(double t) { return min_int(opt_buckets - 1, (int)(t * opt_buckets)); }

// Cross entropy of masked tokens by noise level t, for each S: its mean over t is the NELBO.
static void eval_by_t(Model *m, const Data *d, const int *loops, int n, int time, int B) {
    int T = m->config.max_seq_len, *tokens = (int *)allocate(T, sizeof(int), "a row");
    double *nelbo = (double *)allocate(opt_rows, sizeof(double), "the rows"), *sums = (double *)allocate((size_t)(n + 1) * opt_buckets, sizeof(double), "the table");
    double *masked = sums + (size_t)n * opt_buckets;
    for (int i = 0; i < n; i++) {
        Loops l = {loops[i], 0, 0};
        evaluate(m, d, l, time, opt_rows, B, opt_seed, nelbo);
        for (int r = 0; r < opt_rows; r++) {
            Noise noise = {opt_seed, 0, 0, opt_rows, time};
            double density, t = noise_level(noise, r, &density);
            int given = evaluation_row(d, tokens, r, opt_rows, T);
            sums[i * opt_buckets + bucket_of(t)] += nelbo[r] * t * density * (T - given); // the row's cross entropies without their weight
            for (int k = given; i == 0 && k < T; k++) masked[bucket_of(t)] += becomes_mask(opt_seed, 0, (uint64_t)r * T + k, t);
        }
    }
    FILE *csv = csv_open(opt_by_t, "loops,t_low,t_high,masked_tokens,nats_per_masked_token");
    printf("\nnats per masked token\n        t");
    for (int i = 0; i < n; i++) printf("  %5s%-3d", "S=", loops[i]);
    printf("\n");
    for (int k = 0; k < opt_buckets; k++) {
        printf("%4.2f-%4.2f", k / (double)opt_buckets, (k + 1) / (double)opt_buckets);
        for (int i = 0; i < n; i++) {
            double loss = sums[i * opt_buckets + k] / masked[k];
            if (!masked[k]) { // no row has this noise level
                printf("         -");
                continue;
            }
            printf("  %8.4f", loss);
            fprintf(csv, "%d,%g,%g,%.0f,%.6f\n", loops[i], k / (double)opt_buckets, (k + 1) / (double)opt_buckets, masked[k], loss);
        }
        printf("\n");
    }
    csv_close(csv, opt_by_t);
    printf("written to %s\n", opt_by_t);
    free(tokens), free(nelbo), free(sums);
}

// The residual stream after each of S loops: its norm, and first and second difference relative to it; means over rows and positions.
// Loops have no normalization of their own: does the state grow?
static void eval_by_loop(Model *m, const Data *d, int S, int time, int B) {
    Config c = m->config;
    int T = c.max_seq_len, C = c.channels, a = c.loop_start, width = c.loop_end - a, *targets = (int *)allocate((size_t)B * T, sizeof(int), "a batch");
    int *given = (int *)allocate(B, sizeof(int), "a batch");
    size_t size = (size_t)B * T * C;
    float *states = (float *)allocate(3 * size, sizeof(float), "the states"), *h[3] = {states, states + size, states + 2 * size}; // h_s, h_s-1, h_s-2
    double *sums = (double *)allocate(3 * (size_t)(S + 1), sizeof(double), "the table");
    for (int first = 0; first < opt_rows; first += B) {
        int n = min_int(B, opt_rows - first);
        evaluation_batch(m, d, targets, given, first, n, opt_rows, time, opt_seed);
        model_embed(m, S);
        model_passes(m, 0, a);
        for (int s = 0; s <= S; s++) {
            if (s) model_passes(m, a + (s - 1) * width, a + s * width);
            float *last = h[2];
            h[2] = h[1], h[1] = h[0], h[0] = last;
            read_memory(h[0], pass_input(m, a + s * width), (size_t)n * T * C);
            for (size_t at = 0; at < (size_t)n * T * C; at += C) {
                double norm = 0, change = 0, second = 0;
                for (int k = 0; k < C; k++) {
                    double h0 = h[0][at + k], h1 = s > 0 ? h[1][at + k] : 0, h2 = s > 1 ? h[2][at + k] : 0;
                    norm += h0 * h0, change += (h0 - h1) * (h0 - h1), second += (h0 - 2 * h1 + h2) * (h0 - 2 * h1 + h2);
                }
                sums[3 * s] += sqrt(norm), sums[3 * s + 1] += sqrt(change / norm), sums[3 * s + 2] += sqrt(second / norm);
            }
        }
    }
    FILE *csv = csv_open(opt_by_loop, "loop,norm,change,second_difference");
    printf("\nafter loop      norm    change  second difference\n");
    for (int s = 0; s <= S; s++) {
        double positions = (double)opt_rows * T, *sum = sums + 3 * s;
        printf("%10d  %8.3f", s, sum[0] / positions);
        fprintf(csv, "%d,%.6f,", s, sum[0] / positions);
        if (s > 0) printf("  %8.4f", sum[1] / positions), fprintf(csv, "%.6f", sum[1] / positions);
        fputc(',', csv);
        if (s > 1) printf("  %17.4f", sum[2] / positions), fprintf(csv, "%.6f", sum[2] / positions);
        printf("\n"), fputc('\n', csv);
    }
    csv_close(csv, opt_by_loop);
    printf("written to %s\n", opt_by_loop);
    free(targets), free(given), free(states), free(sums);
}

// Where masked positions look. For a query at a masked position, the attention that it pays to masked keys, to the others, and what masked
// keys would get if attention were uniform: their share of the row. Means over masked queries, by pass, head and noise level.
typedef struct { double queries, to_masked, to_unmasked, uniform; } Attention;

static void attention(void) {
    Model m;
    if (!opt_model || !opt_data) die(USAGE, "attention needs --model and --data; see loopmdm attention --help");
    int step = checkpoint_build(&m, opt_model), S = m.config.max_loops, B = min_int(opt_batch, opt_rows);
    if (opt_loops) parse_list("loops", opt_loops, &S, 1);
    Config c = m.config;
    int T = c.max_seq_len, C = c.channels, NH = c.heads, D = C / NH, P = num_passes(c, S), V = c.vocab_size, n_buckets = opt_buckets;
    Tokenizer tokenizer;
    Data d = data_open(opt_data, V, T);
    fix_rows(&d, opt_data, find_tokenizer(&tokenizer, &m, opt_model) ? &tokenizer : NULL, T);
    check_rows(T);
    if (opt_csv) csv_check("--csv", opt_csv);
    model_reserve(&m, B, T, 1, 0, 0);
    checkpoint_load(&m, opt_model, !opt_raw);
    int *targets = (int *)allocate((size_t)B * T, sizeof(int), "a batch"), *given = (int *)allocate(B, sizeof(int), "a batch"), *x = (int *)allocate((size_t)B * T, sizeof(int), "a batch");
    float *qkv = (float *)allocate((size_t)3 * B * T * C, sizeof(float), "attention"), *lse = (float *)allocate((size_t)B * NH * T, sizeof(float), "attention");
    Attention *table = (Attention *)allocate((size_t)P * NH * n_buckets, sizeof(Attention), "the table");
    Attention *row = (Attention *)allocate((size_t)B * NH, sizeof(Attention), "the table");
    for (int first = 0; first < opt_rows; first += B) {
        int n = min_int(B, opt_rows - first);
        Noise noise = evaluation_batch(&m, &d, targets, given, first, n, opt_rows, TIME_UNIFORM, opt_seed);
        double density;
        for (int i = 0; i < n * T; i++) // as noise_forward() does it
            x[i] = i % T >= given[i / T] && becomes_mask(opt_seed, 0, (uint64_t)first * T + i, noise_level(noise, i / T, &density)) ? V : targets[i];
        model_embed(&m, S);
        for (int p = 0; p < P; p++) {
            model_passes(&m, p, p + 1);
            model_attention(&m, p, qkv, lse);
            OMP(omp parallel for)
            for (int bh = 0; bh < n * NH; bh++) {
                const float *q = qkv + (size_t)(bh / NH) * T * 3 * C + bh % NH * D, *k = q + C;
                const int *xb = x + bh / NH * T;
                Attention sum = {0, 0, 0, 0};
                double masked = 0;
                for (int i = 0; i < T; i++) masked += xb[i] == V;
                for (int i = 0; i < T; i++) {
                    if (xb[i] != V) continue;
                    for (int j = 0; j < T; j++) {
                        double score = 0;
                        for (int e = 0; e < D; e++) score += (double)q[(size_t)i * 3 * C + e] * k[(size_t)j * 3 * C + e];
                        *(xb[j] == V ? &sum.to_masked : &sum.to_unmasked) += exp(score / sqrt(D) - lse[(size_t)bh * T + i]);
                    }
                    sum.queries++, sum.uniform += masked / T;
                }
                row[bh] = sum;
            }
            for (int bh = 0; bh < n * NH; bh++) {
                if (!isfinite(row[bh].to_masked + row[bh].to_unmasked)) die(FAILED, "--model: the attention of %s is not finite: its training went wrong", opt_model);
                Attention *a = table + ((size_t)p * NH + bh % NH) * n_buckets + bucket_of(noise_level(noise, bh / NH, &density));
                a->queries += row[bh].queries, a->to_masked += row[bh].to_masked, a->to_unmasked += row[bh].to_unmasked, a->uniform += row[bh].uniform;
            }
        }
    }
    FILE *csv = opt_csv ? csv_open(opt_csv, "pass,layer,loop,head,t_low,t_high,queries,to_masked,to_unmasked,uniform") : NULL;
    printf("%s, step %d: share of attention that masked positions pay to masked ones, mean of %d heads, by noise level t\n\npass  layer  loop", opt_model, step, NH);
    for (int k = 0; k < n_buckets; k++) printf("  %4.2f-%4.2f", k / (double)n_buckets, (k + 1) / (double)n_buckets);
    for (int p = 0; p <= P; p++) { // the last line: if it were uniform
        int n = c.loop_end - c.loop_start, looped = p >= c.loop_start && p < c.loop_start + S * n, loop = looped ? (p - c.loop_start) / n + 1 : 0;
        if (p < P) printf("\n%4d  %5d  ", p, layer_of_pass(c, S, p));
        if (p < P && looped) printf("%4d", loop);
        else printf("%s", p < P ? "   -" : "\nuniform          ");
        for (int k = 0; k < n_buckets; k++) {
            double mean = 0, queries = 0;
            for (int h = 0; h < NH; h++) {
                Attention a = table[((size_t)min_int(p, P - 1) * NH + h) * n_buckets + k];
                queries += a.queries, mean += p < P ? a.to_masked : a.uniform;
                if (csv && p < P && a.queries > 0) fprintf(csv, "%d,%d,%d,%d,%g,%g,%.0f,%.6f,%.6f,%.6f\n", p, layer_of_pass(c, S, p), loop, h, k / (double)n_buckets, (k + 1) / (double)n_buckets,
                                          a.queries, a.to_masked / a.queries, a.to_unmasked / a.queries, a.uniform / a.queries);
            }
            if (queries > 0) printf("  %9.3f", mean / queries);
            else printf("          -");
        }
    }
    printf("\n");
    if (csv) csv_close(csv, opt_csv);
    free(targets), free(given), free(x), free(qkv), free(lse), free(table), free(row);
    model_free(&m);
}

// ---- puzzles solved, questions answered ----

// The number that an answer ends with: what follows its last ####, or else its last number (GSM8K's convention). NaN if it has none.
static double final_number(const int *tokens, int T, const Tokenizer *t) {
    char *text = (char *)allocate((size_t)T * (t->longest + 1) + 1, 1, "text");
    int n = 0;
    for (int i = 0; i < T && tokens[i] != t->eot && tokens[i] < t->vocab_size; i++) {
        memcpy(text + n, t->bytes[tokens[i]], t->length[tokens[i]]);
        n += t->length[tokens[i]];
    }
    char *s = text, *to, *next;
    double number = NAN;
    while ((next = strstr(s, "####"))) s = next + 4;
    for (to = next = s; *next; next++) // 1,234 is one number
        if (*next != ',') *to++ = *next;
    *to = 0;
    while (*s) {
        if (isdigit((unsigned char)*s)) {
            int negative = s > text && s[-1] == '-';
            for (number = 0; isdigit((unsigned char)*s); s++) number = 10 * number + (*s - '0');
            double place = 0.1;
            if (*s == '.') for (s++; isdigit((unsigned char)*s); s++, place /= 10) number += place * (*s - '0');
            if (negative) number = -number;
        } else s++;
    }
    free(text);
    return number;
}

// --sudoku: solves the puzzles in the data, rows of T tokens each followed by its solution; --exact-match: answers its questions and compares
// the final numbers. Prints the share that is right for each number of loops (or tau) and of denoising steps.
static void eval_solutions(Model *m, int step, const Data *d, const Tokenizer *t, Loops l, const int *loops, int num_loops, const double *taus, int num_taus, int B) {
    int T = m->config.max_seq_len, mask = m->config.vocab_size, steps[MOST_LOOPS], num_steps = parse_list("steps", opt_eval_steps, steps, MOST_LOOPS);
    int64_t available = data_rows(d, T, T) / (opt_sudoku ? 2 : 1);
    int n = available < opt_rows ? (int)available : opt_rows, *rows = (int *)allocate((size_t)n * T * 2, sizeof(int), "the rows"), *wanted = rows + (size_t)n * T;
    int *x = (int *)allocate((size_t)B * T, sizeof(int), "a batch"), blocks = 0;
    for (int r = 0; r < n; r++) {
        int *row = rows + (size_t)r * T, *solution = wanted + (size_t)r * T, differs = 0, blanks = 0;
        data_row(d, row, opt_sudoku ? 2 * (int64_t)r : r, T, T, T);
        data_row(d, solution, opt_sudoku ? 2 * (int64_t)r + 1 : r, T, T, T);
        for (int i = opt_sudoku ? 0 : data_given(d, row, T); i < T; i++) {
            int blank = !opt_sudoku || row[i] == t->byte_id[(unsigned char)'.'];
            if (blank) row[i] = mask, blanks++;
            else differs += row[i] != solution[i];
        }
        blocks = max_int(blocks, blocks_to_fill(row, T, mask, opt_block));
        if (opt_sudoku && (differs || !blanks)) die(FAILED, "%s: row %d is no puzzle with its solution after it", opt_data, 2 * r);
        int given = data_given(d, solution, T);
        if (opt_exact_match && isnan(final_number(solution + given, T - given, t))) die(FAILED, "%s: the answer in row %d has no number, which --exact-match compares", opt_data, r);
    }
    if (!n) die(FAILED, "%s has no puzzle with its solution after it", opt_data);
    if (sample_options(l, 1, 0).order == ORDER_THRESHOLD) num_steps = 1, steps[0] = 0; // as many as it takes
    else for (int k = 0; k < num_steps; k++) check_steps(steps[k], blocks);
    printf("%s, step %d: %d %s, order %s\n\n%s  loops  steps  forwards      right  GFLOP/row\n", opt_model, step, n, opt_sudoku ? "boards" : "questions", opt_order, opt_adaptive ? "   tau" : "");
    for (int i = 0; i < (opt_adaptive ? num_taus : num_loops); i++)
        for (int k = 0; k < num_steps; k++) {
            if (opt_adaptive) l.tau = taus[i];
            else l.S = loops[i];
            SampleOptions o = sample_options(l, steps[k], opt_eval_temperature);
            SampleReport report = {0, 0, 0, 0, NULL, NULL};
            int right = 0;
            for (int first = 0; first < n; first += B) {
                int now = min_int(B, n - first);
                memcpy(x, rows + (size_t)first * T, (size_t)now * T * sizeof(int));
                sample(m, x, now, T, o, first, &report, NULL, NULL);
                for (int b = 0; b < now; b++) {
                    const int *solution = wanted + (size_t)(first + b) * T;
                    if (opt_sudoku) right += !memcmp(x + b * T, solution, T * sizeof(int));
                    else {
                        int given = data_given(d, solution, T);
                        right += final_number(x + b * T + given, T - given, t) == final_number(solution + given, T - given, t);
                    }
                }
            }
            if (opt_adaptive) printf("%6g  ", l.tau);
            printf(opt_adaptive ? "%5.2f" : "%7.0f", report.loops / fmax(1, report.rows));
            printf("  %5d  %8.1f  %7.2f %%  %9.4f\n", steps[k], report.rows / n, 100.0 * right / n, report.flops * 1e-9 / n);
            fflush(stdout);
        }
    free(rows), free(x);
}
