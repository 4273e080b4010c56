/*
 * arithmetic.c - writes word problems with worked answers, to fine-tune a tiny text model on.
 *
 *   cc -std=c11 -O2 -o arithmetic arithmetic.c
 *   ./arithmetic --count 20000 --output arithmetic.txt
 *
 * --help lists the options. The problems are like those of GSM8K (Cobbe et al. 2021), but with few
 * words and small numbers:
 *
 *   Sue has 4 more eggs than Ben. Ben has 9 eggs. Then Sue buys 2 bags of 6 eggs. How many eggs
 *   does Sue have now?<|sep|>9 + 4 = 13 eggs. 2 * 6 = 12 eggs. 13 + 12 = 25 eggs.
 *   #### 25<|endoftext|>
 *
 * (In the file the question is one line.) With --jsonl each problem is one line
 * {"question": "...", "answer": "..."}. Problem i depends only on the seed and on i, so a larger
 * --count only adds problems at the end.
 *
 * How a problem is made. Two or three people have things. The first fact tells one person's number.
 * Each other person has more, fewer, or some times as many as a person before. The program shuffles
 * these facts, so a comparison can come before what it compares with. Then people buy, lose or give
 * away things, and then comes the question.
 *
 * The program stores each number with the two numbers that it was computed from. So it can write
 * the worked steps that the answer needs: each step comes after the steps that it needs itself, the
 * left number first. The question determines the order of the steps. All other facts only distract.
 *
 * The program rejects a story and makes another one unless all divisions are exact, all numbers are
 * from 2 to --largest, the text is short enough, and the number of steps is the one that was drawn
 * for this problem: 2, 3 or 4, with equal probability, or --steps.
 */
#define PROGRAM "arithmetic"
#define OUTPUT "--output"
#include "generator.h" // errors, command line, files, random numbers

// ------------------------------------------------------------------------------------------------
// The words. "|" separates wordings; the program chooses one. {a} and {b} are people, {n} and {k}
// numbers, {x} the things, {y} other things, {bag} and {bags} what the things are packed in. No
// sentence begins with a number, so a number nearly always follows a space: its first digit and the
// space are one token.

static const char *const names[] = {
    "Tom", "Ann", "Ben", "Sue", "Max", "Mia", "Sam", "Kim", "Leo", "Eve",
};
static const char *const things[] = {
    "pears", "eggs", "nuts", "cards", "pens", "cups", "books", "shells", "plums", "balls",
};
static const char *const bags[][2] = { {"bag", "bags"}, {"box", "boxes"}, {"tin", "tins"} };

typedef struct { char op; int low, high; const char *wordings; } Step; // n is from low to high

static const Step relations[] = { // the number of {a} is the number of {b}, op n
    {'+', 2, 40, "{a} has {n} more {x} than {b}.|{b} has {n} fewer {x} than {a}."},
    {'-', 2, 40, "{a} has {n} fewer {x} than {b}.|{b} has {n} more {x} than {a}."},
    {'*', 2, 2, "{a} has twice as many {x} as {b}.|{b} has half as many {x} as {a}."},
    {'*', 3, 5, "{a} has {n} times as many {x} as {b}."},
    {'/', 2, 2, "{a} has half as many {x} as {b}.|{b} has twice as many {x} as {a}."},
    {'/', 3, 5, "{b} has {n} times as many {x} as {a}."},
};

static const Step changes[] = { // the number of {a} becomes: the number before, op n
    {'+', 2, 40, "Then {a} buys {n} more {x}.|Then {a} finds {n} {x}.|{a} gets {n} {x} as a gift."},
    {'-', 2, 40, "Then {a} loses {n} {x}.|{a} sells {n} of the {x}.|Then {a} gives {n} {x} away."},
};

static const char pack[] =
    "Then {a} buys {n} {bags} of {k} {x}.|Then {a} gets {n} {bags} with {k} {x} in each.";
static const char daily[] =
    "{a} finds {k} {x} a day for {n} days.|For {n} days, {a} buys {k} {x} a day.";
static const char give[] =
    "Then {a} gives {n} {x} to {b}.|{b} gets {n} of the {x} {a} has.";
static const char give_half[] =
    "Then {a} gives half of the {x} to {b}.|{b} gets half of the {x} {a} has.";

static const Step questions[] = { // the answer is the number of {a}, op n
    {'/', 2, 12, "{a} puts all the {x} in {n} {bags}, as many in each. "
                 "How many {x} are in each {bag}?"},
    {'/', 2, 12, "{a} puts {n} {x} in each {bag}. How many {bags} does {a} need?"},
    {'/', 2, 12, "{a} shares the {x} equally among {n} friends. How many does each friend get?"},
    {'*', 2, 12, "{a} sells all the {x} for {n} coins each. How many coins does {a} get?"},
};

// ------------------------------------------------------------------------------------------------
// Making a problem

enum { MAX_WORDS = 59, MAX_PEOPLE = 3, MAX_NUMBERS = 32, MAX_SENTENCES = 8 };

// A number of the story. It is numbers[left] op numbers[right], or the story tells it: op is 0.
typedef struct { int value, left, right; char op; const char *unit; } Number;

// A sentence: a wording, and what its slots stand for. Its text is made only if the story is kept.
typedef struct {
    const char *wording;
    int length;       // of the wording
    int a, b;         // people
    int n, k;         // numbers
    int about;        // the person whose number a fact tells, or -1
} Sentence;

typedef struct {
    Random random;    // its key belongs to this problem
    int largest;      // the largest number that is allowed
    int valid;        // 0 after an impossible number
    Number numbers[MAX_NUMBERS];
    Sentence sentences[MAX_SENTENCES];
    int num_numbers, num_sentences, people, num_facts;
    int has[MAX_PEOPLE];   // the index in numbers[] of what each person has now
    const char *name[MAX_PEOPLE], *thing, *other, *bag, *plural;
} Problem;

// Returns a random number from low to high. Never call it twice in the arguments of one function:
// the compiler decides which call comes first.
static int draw(Problem *p, int low, int high) {
    return low + random_below(&p->random, high - low + 1);
}

// Chooses one of "a|b|c". Returns where it starts and sets *length.
static const char *choose(Problem *p, const char *list, int *length) {
    int options = 1;
    for (const char *s = list; *s; s++) options += *s == '|';

    // Go behind the "|" number `skip`. Even one option costs a draw, so that the number of draws
    // does not depend on the list.
    for (int skip = draw(p, 0, options - 1); skip > 0; list++) skip -= *list == '|';
    *length = (int)strcspn(list, "|");
    return list;
}

static int add_number(Problem *p, int value, int left, char op, int right, const char *unit) {
    if (p->num_numbers == MAX_NUMBERS) {
        die(1, "a problem has too many numbers; make MAX_NUMBERS larger");
    }

    // 0 and 1 would make grammar and answers special ("1 eggs").
    if (value < 2 || value > p->largest) p->valid = 0;
    p->numbers[p->num_numbers] = (Number){value, left, right, op, unit};
    return p->num_numbers++;
}

// Adds a number that the story tells, from low to high. Returns its index.
static int told(Problem *p, int low, int high) {
    if (high > p->largest) high = p->largest;
    return add_number(p, draw(p, low, high), 0, 0, 0, "");
}

// Adds the number numbers[left] op numbers[right]. Returns its index.
static int compute(Problem *p, int left, char op, int right, const char *unit) {
    int a = p->numbers[left].value;
    int b = p->numbers[right].value;
    int value = 0;
    if (op == '+') value = a + b;
    if (op == '-') value = a - b;
    if (op == '*') value = a * b;
    if (op == '/') {
        int exact = b >= 1 && a % b == 0; // else the story is rejected, but it goes on until then
        if (!exact) p->valid = 0;
        value = exact ? a / b : a;
    }
    return add_number(p, value, left, op, right, unit);
}

// Adds a sentence in one of the wordings, about people a and b and numbers n and k.
static void say(Problem *p, const char *wordings, int a, int b, int n, int k) {
    if (p->num_sentences == MAX_SENTENCES) {
        die(1, "a problem has too many sentences; make MAX_SENTENCES larger");
    }
    int length;
    const char *wording = choose(p, wordings, &length);
    // The last field: a fact about a. tell_facts() overwrites it where the fact distracts only.
    p->sentences[p->num_sentences++] = (Sentence){wording, length, a, b, n, k, a};
}

// Says how many things each person has. The story tells the first number, or some bags full of
// things. Each other number is compared with one before.
static void tell_facts(Problem *p) {
    // In three of four stories the first number is told, in the fourth it takes a product.
    if (draw(p, 0, 3)) {
        p->has[0] = told(p, 3, 60);
        say(p, "{a} has {n} {x}.|There are {n} {x} in the {bag} {a} has.", 0, 0, p->has[0], 0);
    } else {
        int n = told(p, 2, 9);
        int k = told(p, 2, 12);
        p->has[0] = compute(p, n, '*', k, p->thing);
        say(p, "{a} has {n} {bags} of {k} {x}.|{a} has {n} {bags} with {k} {x} in each.",
            0, 0, n, k);
    }

    // Every other person is compared with one whose number is known already.
    for (int i = 1; i < p->people; i++) {
        const Step *r = &relations[draw(p, 0, COUNT(relations) - 1)];
        int other = draw(p, 0, i - 1);
        int n = told(p, r->low, r->high);
        p->has[i] = compute(p, p->has[other], r->op, n, p->thing);
        say(p, r->wordings, i, other, n, 0);
    }

    // Sometimes a fact about other things, which nobody needs.
    if (p->people == 2 && draw(p, 0, 2) == 0) {
        int a = draw(p, 0, 1);
        int n = told(p, 2, 60);
        say(p, "{a} has {n} {y}.|{a} also has {n} {y}.", a, 0, n, 0);
        p->sentences[p->num_sentences - 1].about = -1;
    }

    // Shuffle the facts (Fisher and Yates).
    p->num_facts = p->num_sentences;
    for (int i = p->num_facts - 1; i > 0; i--) {
        int j = draw(p, 0, i);
        Sentence swap = p->sentences[i];
        p->sentences[i] = p->sentences[j];
        p->sentences[j] = swap;
    }
}

// Draws two different people.
static void draw_people(Problem *p, int *a, int *b) {
    *a = draw(p, 0, p->people - 1);
    *b = (*a + draw(p, 1, p->people - 1)) % p->people;
}

// Something happens, and the numbers of one or two people change.
static void tell_event(Problem *p) {
    int a, b;
    draw_people(p, &a, &b);

    // Gifts have two numbers, so they come twice as often as the others.
    enum { MORE, FEWER, GIFT, GIFT_TOO, HALF, BAGS };
    int kind = draw(p, 0, 5);

    // The number that the sentence tells. "half" is the number 2, though the text has no digit.
    int high = 40;
    if (kind == HALF) high = 2;
    if (kind == BAGS) high = 6;
    int n = told(p, 2, high);

    if (kind == MORE || kind == FEWER) {
        const Step *c = &changes[kind];
        p->has[a] = compute(p, p->has[a], c->op, n, p->thing);
        say(p, c->wordings, a, b, n, 0);
    } else if (kind == HALF) {
        // The number given is computed once: both people's numbers use it.
        int half = compute(p, p->has[a], '/', n, p->thing);
        p->has[b] = compute(p, p->has[b], '+', half, p->thing);
        p->has[a] = half;
        say(p, give_half, a, b, n, 0);
    } else if (kind == BAGS) { // bags full, or some things every day
        int k = told(p, 2, 12);
        int product = compute(p, n, '*', k, p->thing);
        p->has[a] = compute(p, p->has[a], '+', product, p->thing);
        const char *wordings = draw(p, 0, 1) ? pack : daily;
        say(p, wordings, a, b, n, k);
    } else { // a gift
        p->has[a] = compute(p, p->has[a], '-', n, p->thing);
        p->has[b] = compute(p, p->has[b], '+', n, p->thing);
        say(p, give, a, b, n, 0);
    }
}

// Adds up what all people have, in the order of the facts. Returns the index of the sum.
static int sum_of_all(Problem *p) {
    int sum = -1; // none yet: the first number is not computed
    for (int i = 0; i < p->num_facts; i++) {
        int who = p->sentences[i].about;
        if (who < 0) continue;
        sum = sum < 0 ? p->has[who] : compute(p, sum, '+', p->has[who], p->thing);
    }
    return sum;
}

// Asks the question. Returns the index of the number that is the answer.
static int ask(Problem *p) {
    int a, b;
    draw_people(p, &a, &b);

    // Of 12 questions 3 ask for a's number, 1 for two people's sum, 1 for the sum of all, 2 for a
    // difference, and 5 for one more operation.
    int kind = draw(p, 0, 11);
    int answer = p->has[a];
    if (kind < 3) {
        say(p, "How many {x} does {a} have now?|How many {x} does {a} have in the end?",
            a, b, 0, 0);
    } else if (kind == 3) {
        answer = compute(p, p->has[a], '+', p->has[b], p->thing);
        say(p, "How many {x} do {a} and {b} have together?|"
               "How many {x} do {a} and {b} have in all?", a, b, 0, 0);
    } else if (kind == 4) {
        answer = sum_of_all(p);
        say(p, "How many {x} do they have together?|How many {x} are there in all?", a, b, 0, 0);
    } else if (kind < 7) {
        answer = compute(p, p->has[a], '-', p->has[b], p->thing);
        say(p, "How many more {x} does {a} have than {b}?|"
               "How many fewer {x} does {b} have than {a}?", a, b, 0, 0);
    } else {
        const Step *q = &questions[draw(p, 0, COUNT(questions) - 1)];
        int n = told(p, q->low, q->high);
        const char *unit = p->thing;
        if (q->op == '*') unit = "coins";
        if (q == &questions[1]) unit = p->plural; // it asks for the number of bags
        answer = compute(p, answer, q->op, n, unit);
        say(p, q->wordings, a, b, n, 0);
    }
    return answer;
}

// Appends to `steps` the computed numbers that `number` needs, then the number itself, without
// those that are there already. Returns the new count. A number that the story tells needs no step.
static int work_out(const Problem *p, int number, int *steps, int count) {
    const Number *n = &p->numbers[number];
    if (!n->op) return count;
    for (int i = 0; i < count; i++) {
        if (steps[i] == number) return count;
    }

    // First what it needs, the left number before the right one.
    count = work_out(p, n->left, steps, count);
    count = work_out(p, n->right, steps, count);
    steps[count] = number;
    return count + 1;
}

// Counts the words of all sentences. One word stands in the place of each slot, so a sentence has
// as many words as its wording.
static int count_words(const Problem *p) {
    int words = 0;
    for (int i = 0; i < p->num_sentences; i++) {
        const Sentence *s = &p->sentences[i];
        for (int c = 0; c < s->length; c++) words += s->wording[c] == ' ';
        words++;
    }
    return words;
}

// Draws the words of a story: different names, two different things, and what they are packed in.
static void choose_words(Problem *p) {
    p->people = draw(p, 2, 3);

    // A name or thing that is taken already is drawn again.
    for (int i = 0; i < p->people; i++) {
        int same;
        do {
            p->name[i] = names[draw(p, 0, COUNT(names) - 1)];
            same = 0;
            for (int j = 0; j < i; j++) same |= p->name[i] == p->name[j];
        } while (same);
    }
    p->thing = things[draw(p, 0, COUNT(things) - 1)];
    do {
        p->other = things[draw(p, 0, COUNT(things) - 1)];
    } while (p->other == p->thing);

    const char *const *bag = bags[draw(p, 0, COUNT(bags) - 1)];
    p->bag = bag[0];
    p->plural = bag[1];
}

// Writes the text of a sentence: its wording, with a word for each {slot}.
static void write_sentence(FILE *out, const Problem *p, const Sentence *s) {
    char n[16], k[16];
    snprintf(n, sizeof n, "%d", p->numbers[s->n].value);
    snprintf(k, sizeof k, "%d", p->numbers[s->k].value);
    const char *const slots[][2] = {
        {"a", p->name[s->a]}, {"b", p->name[s->b]}, {"n", n}, {"k", k},
        {"x", p->thing}, {"y", p->other}, {"bag", p->bag}, {"bags", p->plural},
    };
    for (const char *c = s->wording; c < s->wording + s->length; c++) {
        if (*c != '{') {
            putc(*c, out);
            continue;
        }

        // The text between "{" and "}" names the slot.
        const char *slot = c + 1;
        size_t length = strcspn(slot, "}");
        int i = 0;
        while (strlen(slots[i][0]) != length || memcmp(slots[i][0], slot, length)) i++;
        fputs(slots[i][1], out);
        c = slot + length; // the "}"
    }
}

static void write_problem(FILE *out, uint64_t seed, uint64_t index, int only_steps, int largest,
                          int jsonl) {
    Problem p = {.random = {hash(hash(0, seed), index), 0}, .largest = largest};
    int num_steps = only_steps ? only_steps : draw(&p, 2, 4);
    int steps[MAX_NUMBERS];
    int answer, suitable;

    // Make stories until one is suitable. The random numbers go on: each story is another one.
    do {
        p.num_numbers = 0;
        p.num_sentences = 0;
        p.valid = 1;
        choose_words(&p);
        tell_facts(&p);
        // At most two events with two people, one with three: else the story is too long.
        for (int events = draw(&p, 0, 4 - p.people); events > 0; events--) tell_event(&p);
        answer = ask(&p);
        // A worked step is about 6 words long.
        suitable = p.valid && count_words(&p) + 6 * num_steps <= MAX_WORDS &&
                   work_out(&p, answer, steps, 0) == num_steps;
    } while (!suitable);

    fputs(jsonl ? "{\"question\": \"" : "", out);
    for (int i = 0; i < p.num_sentences; i++) {
        if (i > 0) putc(' ', out);
        write_sentence(out, &p, &p.sentences[i]);
    }

    // The worked steps. The last one computes the answer.
    fputs(jsonl ? "\", \"answer\": \"" : "<|sep|>", out);
    for (int i = 0; i < num_steps; i++) {
        const Number *n = &p.numbers[steps[i]];
        int left = p.numbers[n->left].value;
        int right = p.numbers[n->right].value;
        if (i > 0) putc(' ', out);
        fprintf(out, "%d %c %d = %d %s.", left, n->op, right, n->value, n->unit);
    }
    fprintf(out, jsonl ? "\\n#### %d\"}\n" : "\n#### %d<|endoftext|>\n", p.numbers[answer].value);
}

// ------------------------------------------------------------------------------------------------
// The command line

static const char usage[] =
    "usage: arithmetic [--seed N] [--count N] [--steps N] [--largest N] [--jsonl] "
    "[--output FILE]\n"
    "Writes word problems: question<|sep|>worked steps, a line #### answer, and <|endoftext|>.\n"
    "  --seed N       which problems to write, 0 to 2^64-1 (default 1)\n"
    "  --count N      how many, at least 1 (default 1000)\n"
    "  --steps N      only problems of N steps, 1 to 4 (default: of 2, 3 and 4)\n"
    "  --largest N    no number above N, 20 to 999 (default 999)\n"
    "  --jsonl        write lines {\"question\": \"...\", \"answer\": \"...\"}, like GSM8K\n"
    "  --output FILE  where to write them (default: standard output)\n"
    "  --help         show this text\n";

int main(int argc, char **argv) {
    uint64_t seed = 1;
    uint64_t count = 1000;
    int steps = 0; // 0: 2, 3 or 4
    int largest = 999;
    int jsonl = 0;
    static Output out;
    for (int i = 1; i < argc; i++) {
        const char *name = argv[i];
        if (!strcmp(name, "--help")) {
            fputs(usage, stdout);
            finish(&(Output){.file = stdout});
            return 0;
        }
        if (!strcmp(name, "--jsonl")) {
            jsonl = 1;
        } else if (!strcmp(name, "--seed")) {
            seed = whole_number(name, next_value(argv, &i), 0, UINT64_MAX);
        } else if (!strcmp(name, "--count")) {
            count = whole_number(name, next_value(argv, &i), 1, UINT64_MAX);
        } else if (!strcmp(name, "--steps")) {
            steps = (int)whole_number(name, next_value(argv, &i), 1, 4);
        } else if (!strcmp(name, "--largest")) {
            largest = (int)whole_number(name, next_value(argv, &i), 20, 999);
        } else if (!strcmp(name, "--output")) {
            output_to(&out, next_value(argv, &i));
        } else {
            die(2, "unknown option '%s'; try --help", name);
        }
    }

    // A full disk stops the loop; finish() then reports it.
    start(&out);
    for (uint64_t i = 0; i < count && !ferror(out.file); i++) {
        write_problem(out.file, seed, i, steps, largest, jsonl);
    }
    finish(&out);
    commit(&out);
    return 0;
}
