/*
 * arithmetic.c - writes word problems with worked answers, to fine-tune a tiny text model on.
 *
 *   cc -std=c11 -O2 -o arithmetic arithmetic.c
 *   ./arithmetic --count 20000 --output arithmetic.txt
 *
 * --help lists the options. Each problem is in the manner of GSM8K (Cobbe et al. 2021), but with
 * few words and small numbers:
 *
 *   Sue has 4 more eggs than Ben. Ben has 9 eggs. Then Sue buys 2 bags of 6 eggs. How many eggs
 *   does Sue have now?<|sep|>9 + 4 = 13 eggs. 2 * 6 = 12 eggs. 13 + 12 = 25 eggs.
 *   #### 25<|endoftext|>
 *
 * (there the question is one line). With --jsonl it is a line {"question": "...", "answer": "..."}.
 *
 * Problem i depends only on the seed and on i, so a larger --count only adds problems at the end.
 * With --output FILE the text goes to FILE.tmp, which is renamed when complete: FILE is never half
 * written. An error is one line on standard error; the exit status is then 2 if the command line
 * is wrong and 1 if the problems could not be written.
 *
 * How a problem is made. Two or three people have things: one has a number of them, each other
 * more, fewer, or some times as many as one of those before. These facts are told in any order, so
 * a comparison may come before what it compares with. Then things are bought, lost and given, and
 * then comes the question. Every number is kept with the two it was computed from, if it was not
 * told, and the worked steps are those the answer
 * needs, each after what it needs itself, the left number first, so that the question says their
 * order too. The rest of the story only distracts. A story is thrown away, and another made,
 * unless all divisions are exact, all numbers from 2 to 999 or --largest, the words not too many, and the steps
 * as many as were drawn for this problem: 2, 3 or 4, as often each, or as --steps says.
 */
#define PROGRAM "arithmetic"
#define OUTPUT "--output"
#include "generator.h" // errors, command line, files, random numbers

// ------------------------------------------------------------------------------------------------
// The words. "|" separates wordings, of which one is chosen. {a} and {b} are people, {n} and {k}
// numbers, {x} the things, {y} other things, {bag} and {bags} what they are packed in. No sentence
// begins with a number: a token of a digit with the space before it is then nearly always right.

static const char names[] = "Tom|Ann|Ben|Sue|Max|Mia|Sam|Kim|Leo|Eve";
static const char things[] = "pears|eggs|nuts|cards|pens|cups|books|shells|plums|balls";
static const char bags[] = "bag|box|tin";

typedef struct { char op; int low, high; const char *wordings; } Step; // n is from low to high

static const Step relations[] = { // what {a} has is what {b} has, op n
    {'+', 2, 40, "{a} has {n} more {x} than {b}.|{b} has {n} fewer {x} than {a}."},
    {'-', 2, 40, "{a} has {n} fewer {x} than {b}.|{b} has {n} more {x} than {a}."},
    {'*', 2, 2, "{a} has twice as many {x} as {b}.|{b} has half as many {x} as {a}."},
    {'*', 3, 5, "{a} has {n} times as many {x} as {b}."},
    {'/', 2, 2, "{a} has half as many {x} as {b}.|{b} has twice as many {x} as {a}."},
    {'/', 3, 5, "{b} has {n} times as many {x} as {a}."},
};

static const Step changes[] = { // what {a} has becomes that, op n
    {'+', 2, 40, "Then {a} buys {n} more {x}.|Then {a} finds {n} {x}.|{a} gets {n} {x} as a gift."},
    {'-', 2, 40, "Then {a} loses {n} {x}.|{a} sells {n} of the {x}.|Then {a} gives {n} {x} away."},
};

static const char pack[] = "Then {a} buys {n} {bags} of {k} {x}.|Then {a} gets {n} {bags} with {k} {x} in each.";
static const char daily[] = "{a} finds {k} {x} a day for {n} days.|For {n} days, {a} buys {k} {x} a day.";
static const char give[] = "Then {a} gives {n} {x} to {b}.|{b} gets {n} of the {x} {a} has.";
static const char give_half[] = "Then {a} gives half of the {x} to {b}.|{b} gets half of the {x} {a} has.";

static const Step questions[] = { // the answer is what {a} has, op n
    {'/', 2, 12, "{a} puts all the {x} in {n} {bags}, as many in each. How many {x} are in each {bag}?"},
    {'/', 2, 12, "{a} puts {n} {x} in each {bag}. How many {bags} does {a} need?"},
    {'/', 2, 12, "{a} shares the {x} equally among {n} friends. How many does each friend get?"},
    {'*', 2, 12, "{a} sells all the {x} for {n} coins each. How many coins does {a} get?"},
};

// ------------------------------------------------------------------------------------------------
// Making a problem

enum { MAX_WORDS = 59, MAX_PEOPLE = 3, MAX_NUMBERS = 32, MAX_SENTENCES = 8, MAX_TEXT = 200 };

typedef struct { int value, left, right; char op; const char *unit; } Number; // computed from two others, or told: op is 0

typedef struct { int about; char text[MAX_TEXT]; } Sentence; // about: who has what it tells, -1 if it does not matter

typedef struct {
    Random random;    // its key is this problem's
    int largest;      // no number may be more
    int valid;        // so far, all numbers have been possible
    Number numbers[MAX_NUMBERS];
    Sentence sentences[MAX_SENTENCES];
    int num_numbers, num_sentences, num_words, people, num_facts;
    int has[MAX_PEOPLE];   // which number of things each person has by now
    char name[MAX_PEOPLE][16], thing[16], other[16], bag[16], plural[16];
} Problem;

// A random number from low to high. Never call it twice among the arguments of one function: compilers differ in which comes first.
static int draw(Problem *p, int low, int high) { return low + random_below(&p->random, high - low + 1); }

// One of "a|b|c", chosen at random: its start and, in *length, its length
static const char *choose(Problem *p, const char *list, int *length) {
    int options = 1;
    for (const char *s = list; *s; s++) options += *s == '|';
    for (int skip = draw(p, 0, options - 1); skip > 0; list++) skip -= *list == '|';
    *length = (int)strcspn(list, "|");
    return list;
}

static void choose_word(Problem *p, char *word, const char *list) {
    int length;
    const char *start = choose(p, list, &length);
    snprintf(word, 16, "%.*s", length, start);
}

static int add_number(Problem *p, int value, int left, char op, int right, const char *unit) {
    if (p->num_numbers == MAX_NUMBERS) die(1, "a problem has too many numbers; make MAX_NUMBERS larger");
    if (value < 2 || value > p->largest) p->valid = 0;
    p->numbers[p->num_numbers] = (Number){value, left, right, op, unit};
    return p->num_numbers++;
}

static int told(Problem *p, int low, int high) { return add_number(p, draw(p, low, high < p->largest ? high : p->largest), 0, 0, 0, ""); }

static int compute(Problem *p, int left, char op, int right, const char *unit) {
    int a = p->numbers[left].value, b = p->numbers[right].value;
    if (op == '/' && (b < 1 || a % b)) p->valid = 0, b = 1;
    return add_number(p, op == '+' ? a + b : op == '-' ? a - b : op == '*' ? a * b : a / b, left, op, right, unit);
}

// Adds a sentence in one of the wordings, about people a and b and numbers n and k.
static void say(Problem *p, const char *wordings, int a, int b, int n, int k) {
    if (p->num_sentences == MAX_SENTENCES) die(1, "a problem has too many sentences; make MAX_SENTENCES larger");
    p->sentences[p->num_sentences].about = a;
    char *out = p->sentences[p->num_sentences++].text, number[2][16];
    int length;
    const char *s = choose(p, wordings, &length), *end = s + length;
    snprintf(number[0], sizeof number[0], "%d", p->numbers[n].value);
    snprintf(number[1], sizeof number[1], "%d", p->numbers[k].value);
    const char *const slots[][2] = {{"a", p->name[a]}, {"b", p->name[b]}, {"n", number[0]}, {"k", number[1]},
                                    {"x", p->thing}, {"y", p->other}, {"bag", p->bag}, {"bags", p->plural}};
    for (size_t at = 0; s < end; s++) {
        const char *word = s;
        length = 1;
        if (*s == '{') {
            size_t name = strcspn(++s, "}");
            int i = 0;
            while (strlen(slots[i][0]) != name || memcmp(slots[i][0], s, name)) i++;
            word = slots[i][1], length = (int)strlen(word), s += name;
        }
        if (at + (size_t)length >= MAX_TEXT) die(1, "a sentence is too long; make MAX_TEXT larger");
        memcpy(out + at, word, (size_t)length);
        at += (size_t)length;
        out[at] = 0;
        p->num_words += *word == ' ';
    }
    p->num_words++;
}

// Who has how many: one number is told, maybe as some bags full; the others are compared with it or with each other.
static void tell_facts(Problem *p) {
    if (draw(p, 0, 3)) {
        p->has[0] = told(p, 3, 60);
        say(p, "{a} has {n} {x}.|There are {n} {x} in the {bag} {a} has.", 0, 0, p->has[0], 0);
    } else {
        int n = told(p, 2, 9), k = told(p, 2, 12);
        p->has[0] = compute(p, n, '*', k, p->thing);
        say(p, "{a} has {n} {bags} of {k} {x}.|{a} has {n} {bags} with {k} {x} in each.", 0, 0, n, k);
    }
    for (int i = 1; i < p->people; i++) {
        const Step *r = &relations[draw(p, 0, COUNT(relations) - 1)];
        int other = draw(p, 0, i - 1), n = told(p, r->low, r->high);
        p->has[i] = compute(p, p->has[other], r->op, n, p->thing);
        say(p, r->wordings, i, other, n, 0);
    }
    if (p->people == 2 && draw(p, 0, 2) == 0) {
        int a = draw(p, 0, 1), n = told(p, 2, 60);
        say(p, "{a} has {n} {y}.|{a} also has {n} {y}.", a, 0, n, 0);
        p->sentences[p->num_sentences - 1].about = -1;
    }
    p->num_facts = p->num_sentences;
    for (int i = p->num_facts - 1; i > 0; i--) { // in any order
        int j = draw(p, 0, i);
        Sentence swap = p->sentences[i];
        p->sentences[i] = p->sentences[j], p->sentences[j] = swap;
    }
}

static void tell_event(Problem *p) {
    int a = draw(p, 0, p->people - 1), b = (a + draw(p, 1, p->people - 1)) % p->people, kind = draw(p, 0, 5);
    int n = kind == 4 ? told(p, 2, 2) : kind == 5 ? told(p, 2, 6) : told(p, 2, 40);
    if (kind < 2) { // more or fewer
        const Step *c = &changes[kind];
        p->has[a] = compute(p, p->has[a], c->op, n, p->thing);
        say(p, c->wordings, a, b, n, 0);
    } else if (kind < 4) { // a gift
        p->has[a] = compute(p, p->has[a], '-', n, p->thing);
        p->has[b] = compute(p, p->has[b], '+', n, p->thing);
        say(p, give, a, b, n, 0);
    } else if (kind == 4) { // half of them
        int half = compute(p, p->has[a], '/', n, p->thing);
        p->has[b] = compute(p, p->has[b], '+', half, p->thing);
        p->has[a] = half;
        say(p, give_half, a, b, n, 0);
    } else { // bags full, or some every day
        int k = told(p, 2, 12);
        p->has[a] = compute(p, p->has[a], '+', compute(p, n, '*', k, p->thing), p->thing);
        say(p, draw(p, 0, 1) ? pack : daily, a, b, n, k);
    }
}

// Asks, and returns the number that is the answer.
static int ask(Problem *p) {
    int a = draw(p, 0, p->people - 1), b = (a + draw(p, 1, p->people - 1)) % p->people;
    int kind = draw(p, 0, 11), n = 0, answer = p->has[a];
    if (kind < 3) {
        say(p, "How many {x} does {a} have now?|How many {x} does {a} have in the end?", a, b, n, 0);
    } else if (kind == 3) {
        answer = compute(p, p->has[a], '+', p->has[b], p->thing);
        say(p, "How many {x} do {a} and {b} have together?|How many {x} do {a} and {b} have in all?", a, b, n, 0);
    } else if (kind == 4) {
        for (int i = 0, first = 1; i < p->num_facts; i++) { // as the facts are told
            int who = p->sentences[i].about;
            if (who < 0) continue;
            answer = first ? p->has[who] : compute(p, answer, '+', p->has[who], p->thing);
            first = 0;
        }
        say(p, "How many {x} do they have together?|How many {x} are there in all?", a, b, n, 0);
    } else if (kind < 7) {
        answer = compute(p, p->has[a], '-', p->has[b], p->thing);
        say(p, "How many more {x} does {a} have than {b}?|How many fewer {x} does {b} have than {a}?", a, b, n, 0);
    } else {
        const Step *q = &questions[draw(p, 0, COUNT(questions) - 1)];
        n = told(p, q->low, q->high);
        answer = compute(p, answer, q->op, n, q == &questions[1] ? p->plural : q->op == '*' ? "coins" : p->thing);
        say(p, q->wordings, a, b, n, 0);
    }
    return answer;
}

// Appends a number to steps, after those it is computed from, unless it is told or there already; returns the new count.
static int work_out(const Problem *p, int number, int *steps, int count) {
    const Number *n = &p->numbers[number];
    for (int i = 0; i < count; i++)
        if (steps[i] == number) return count;
    if (!n->op) return count;
    count = work_out(p, n->left, steps, count);
    count = work_out(p, n->right, steps, count);
    steps[count] = number;
    return count + 1;
}

static void write_problem(FILE *out, uint64_t seed, uint64_t index, int only_steps, int largest, int jsonl) {
    Problem p = {.random = {hash(hash(0, seed), index), 0}, .largest = largest};
    int num_steps = only_steps ? only_steps : draw(&p, 2, 4), steps[MAX_NUMBERS], answer;
    do {
        p.num_numbers = p.num_sentences = p.num_words = 0;
        p.valid = 1;
        p.people = draw(&p, 2, 3);
        for (int i = 0, same; i < p.people; i++) {
            do {
                choose_word(&p, p.name[i], names);
                same = 0;
                for (int j = 0; j < i; j++) same |= !strcmp(p.name[i], p.name[j]);
            } while (same);
        }
        choose_word(&p, p.thing, things);
        do choose_word(&p, p.other, things); while (!strcmp(p.thing, p.other));
        choose_word(&p, p.bag, bags);
        snprintf(p.plural, sizeof p.plural, "%.12s%s", p.bag, strcmp(p.bag, "box") ? "s" : "es");
        tell_facts(&p);
        for (int events = draw(&p, 0, 4 - p.people); events > 0; events--) tell_event(&p);
        answer = ask(&p);
    } while (!p.valid || p.num_words + 6 * num_steps > MAX_WORDS || work_out(&p, answer, steps, 0) != num_steps);

    fputs(jsonl ? "{\"question\": \"" : "", out);
    for (int i = 0; i < p.num_sentences; i++) fprintf(out, "%s%s", i ? " " : "", p.sentences[i].text);
    fputs(jsonl ? "\", \"answer\": \"" : "<|sep|>", out);
    for (int i = 0; i < num_steps; i++) {
        const Number *n = &p.numbers[steps[i]];
        int left = p.numbers[n->left].value, right = p.numbers[n->right].value;
        fprintf(out, "%s%d %c %d = %d %s.", i ? " " : "", left, n->op, right, n->value, n->unit);
    }
    fprintf(out, jsonl ? "\\n#### %d\"}\n" : "\n#### %d<|endoftext|>\n", p.numbers[answer].value);
}

// ------------------------------------------------------------------------------------------------
// The command line

static const char usage[] =
    "usage: arithmetic [--seed N] [--count N] [--steps N] [--largest N] [--jsonl] [--output FILE]\n"
    "Writes word problems, each as question<|sep|>worked steps, a line #### answer, and <|endoftext|>.\n"
    "  --seed N       which problems to write, 0 to 2^64-1 (default 1)\n"
    "  --count N      how many, at least 1 (default 1000)\n"
    "  --steps N      only problems of N steps, 1 to 4 (default: of 2, 3 and 4)\n"
    "  --largest N    no number above N, 20 to 999 (default 999)\n"
    "  --jsonl        write lines {\"question\": \"...\", \"answer\": \"...\"} instead, as GSM8K's files\n"
    "  --output FILE  where to write them (default: standard output)\n"
    "  --help         show this text\n";

int main(int argc, char **argv) {
    uint64_t seed = 1, count = 1000;
    int steps = 0, largest = 999, jsonl = 0;
    static Output out;
    for (int i = 1; i < argc; i++) {
        if (!strcmp(argv[i], "--help")) {
            fputs(usage, stdout);
            finish(&(Output){.file = stdout});
            return 0;
        }
        if (!strcmp(argv[i], "--seed")) seed = whole_number("--seed", next_value(argv, &i), 0, UINT64_MAX);
        else if (!strcmp(argv[i], "--count")) count = whole_number("--count", next_value(argv, &i), 1, UINT64_MAX);
        else if (!strcmp(argv[i], "--output")) output_to(&out, next_value(argv, &i));
        else if (!strcmp(argv[i], "--steps")) steps = (int)whole_number("--steps", next_value(argv, &i), 1, 4);
        else if (!strcmp(argv[i], "--largest")) largest = (int)whole_number("--largest", next_value(argv, &i), 20, 999);
        else if (!strcmp(argv[i], "--jsonl")) jsonl = 1;
        else die(2, "unknown option '%s'; try --help", argv[i]);
    }

    start(&out);
    for (uint64_t i = 0; i < count && !ferror(out.file); i++) write_problem(out.file, seed, i, steps, largest, jsonl);
    finish(&out);
    commit(&out);
    return 0;
}
