/*
 * stories.c - writes simple children's stories, the training data for a tiny text model.
 *
 * A very small language model learns good English only if the English is very simple: few words,
 * short stories, clear cause and effect. This program writes any number of such stories without a
 * download. Facts from the beginning return later ("Tom had a red ball. ... There was the red
 * ball!"), so a masked word often has only one right answer.
 *
 *   cc -std=c11 -O2 -o stories stories.c
 *   ./stories --count 20000 --output stories.txt
 *
 * --help lists the options. The text is plain ASCII. A story is two short paragraphs, one line
 * each, and then a line <|endoftext|>. Story i depends only on the seed and on i: a larger --count
 * adds stories at the end, and another --seed gives other stories.
 *
 * With --templates each story becomes a task on one line. A word that was chosen for this story
 * becomes a blank, ____, if the story told it before, it is one word and it follows a space. The
 * end of the first paragraph becomes a blank too. The same seed without --templates gives the right
 * answers.
 *
 * How a story is made. A plot (see the table below) is a list of entries, used in order:
 *
 *   "thing = ball|car"     chooses a word for this story: {thing} is now, for example, "car". It
 *                          also chooses a different one: {thing2} is "ball".
 *   "{He} ran.|{He} sat."  any other entry is a sentence or two. "|" separates wordings; the
 *                          program chooses one. A "\n" in front starts the second paragraph.
 *
 * Within a sentence:
 *
 *   {thing} {thing2}       the words chosen for this story
 *   {Thing}                the word with a capital letter
 *   {a thing}              the word after the right article, "a" or "an"
 *   [one|two|three]        one of these, chosen here
 *
 * Every story has the words of `common` and of the cast. The hero is {name}, with {he} {him} {his};
 * the friend is {name2}, with {he2} {him2} {his2}. If one is a boy, the other is a girl, so "he"
 * and "she" are always clear. To add a plot, add it to the table.
 */
#define PROGRAM "stories"
#define OUTPUT "--output"
#include "generator.h" // errors, command line, files, random numbers

// ------------------------------------------------------------------------------------------------
// The stories. Use few different words: the model must learn each of them.

static const struct { const char *slot, *boy, *girl; } cast[] = {
    {"name", "Tom|Ben|Sam|Max|Tim|Jack",
             "Anna|Lily|Mia|Sue|Lucy|Kate"},
    {"he", "he", "she"},
    {"him", "him", "her"},
    {"his", "his", "her"},
};

static const char *const common[] = {
    "look = red|blue|green|yellow|pink|orange", // a colour; some plots choose another kind of look
    "pet = cat|dog|rabbit|mouse",
    "parent = mom|dad",
    "place = park|garden|woods|field",
    "spot = under the bed|behind the door|under the table|behind the chair|in the box",
};

static const char *const plots[][16] = {
    { // lost and found
        "thing = ball|car|doll|boat|drum|train",
        "{name} had {a look} {thing}[| and loved it very much| and played with it every day].",
        "[One day, |But one morning, ]{he} [could not find it|wanted to play, but it was gone].",
        "{He} [looked|went to look] {spot2}, but it was not there.|"
        "Was it {spot2}? No, it was not there.",
        "\n\"[Can you help me find|Where is] my {thing}?\" {he} asked the {pet}.",
        "The {pet} [ran to look {spot}|looked {spot} and jumped up and down].",
        "There was the {look} {thing}!|And there it was, the {look} {thing}!",
        "\"[Thank you|You are a good {pet}]!\" said {name}[| with a big smile].|"
        "{name} was so happy that {he} gave the {pet} a big hug.",
    },
    { // sharing
        "look = big|round|sweet|small",
        "thing = cake|pie|apple|cookie",
        "{name} [sat in|went to] the {place} with {a look} {thing}.|"
        "{name} had {a look} {thing} to eat in the {place}.",
        "[Then {name2} came by|{name2} was there too], but {he2} had [no food|nothing to eat].",
        "\n\"Do you want some of my {thing}?\" asked {name}.|"
        "\"[We can share|You can have some of] my {thing},\" said {name}.",
        "\"[Yes, please|Thank you]!\" said {name2}[| with a big smile].",
        "So {name} cut the {look} {thing} in two, and they ate it under a tree.|"
        "They sat under a tree and ate the {look} {thing}.",
        "It [was so good|is good to share]!|From that day, they were good friends.|"
        "It was fun to eat in the {place} with a friend.",
    },
    { // broken and mended
        "thing = car|boat|train|kite|doll",
        "place = kitchen|house|garden|yard",
        "[One day, |One morning, |]{name} ran in the {place} with {a look} {thing}.",
        "{He} ran too fast and fell, and the {thing} broke.|"
        "Then {he} fell down, and the {thing} broke in two.",
        "{name} [was very sad|sat down] and began to cry.|\"Oh no[|! My {thing}]!\" {he} said.",
        "\n\"[Do not be sad. We can fix it|I can help you fix it],\" said {his} {parent}.",
        "They worked [all morning|for a long time], "
        "and soon the {look} {thing} was [as good as new|not broken any more].",
        "\"Thank you! I will not run in the {place} again,\" said {name} to {his} {parent}.|"
        "{name} gave {his} {parent} a hug and did not run in the {place} again.",
    },
    { // a gift
        "thing = kite|hat|boat|doll|bag",
        "{name} wanted to make [a gift|something] for {name2}[|, a good friend].",
        "{name2} loved the color {look}.|The color {name2} loved best was {look}.",
        "So {name} [made|worked all morning to make] {a look} {thing} and put it in {a look2} box.",
        "\n\"This is for you,\" {he} said.|\"What is in the {look2} box?\" asked {name2}.",
        "{name2} opened [it|the {look2} box] and [saw|took out] the {look} {thing}.",
        "\"[It is {look}! I love it|Thank you! I love my {thing}]!\" {he2} said"
        "[| with a big smile| and gave {name} a hug].",
    },
    { // up in a tree
        "thing = kite|hat|balloon",
        "pet = bird|cat|mouse",
        "[One day, |One morning, |]{name} [played in|went to] the {place} with {a look} {thing}.",
        "[A big|But then the] wind came and took the {thing} up into a [big|tall] tree.",
        "{name} jumped and jumped, but {he} [was too small|could not get it down].",
        "\n\"[Can I help you?|I can get it for you!]\" said a little {pet}.",
        "Up went the {pet}, and down it came with the {look} {thing}.|"
        "The {pet} went up the tree and came [back|down] with the {look} {thing}.",
        "\"Thank you[|, little {pet}]!\" said {name}[|, and they played in the {place}].",
    },
    { // rain
        "thing = house|boat|train|car",
        "[One morning, |]{name} and {name2} [wanted|went out] to play in the {place}.",
        "But then [it began to rain|the rain came], and they [ran|had to go] home.",
        "\"Now we can not play,\" said {name2}.|{name2} looked at the rain and was sad.",
        "\n[Then|But] {name} [saw|found] a big {look} box.",
        "\"[We can make {a thing} out of it|Look, this can be {a thing}]!\" {he} said.",
        "[So they made|They worked, and soon they had] {a look} {thing}.",
        "When the sun came out, they took it to the {place}.|"
        "They were happy and played in it all day.",
    },
    { // a hungry animal
        "look = black|white|brown|gray",
        "pet = duck|bird|mouse|goat|pig",
        "thing = bread|corn|cake",
        "One [|cold ][day|morning], {name} [saw|found] {a look} {pet} in the {place}.",
        "It was [very|cold and] hungry and had nothing to eat.",
        "\"Do you want some {thing}?\" asked {name}.|\"You can have some {thing},\" said {name}.",
        "\"[Yes, please|Thank you]!\" said the {pet}.",
        "\n{name} ran home and came back with the {thing}.",
        "The {look} {pet} ate it all and was [not hungry any more|very happy|happy again].",
        "The next day, the {pet} came back to the {place} to play with {name}.|"
        "From that day, {name} and the {look} {pet} were [|good ]friends.",
    },
    { // mud
        "look = white|black|gray",
        "pet = dog|cat|rabbit|pig|goat|duck",
        "{name} had {a look} {pet}[| and loved it very much| and played with it every day].",
        "[One day after|After] the rain, they [played in|went to] the {place}.",
        "The {pet} [jumped|fell|ran] into the mud and was not {look} any more.",
        "\"Oh no!\" said {name}. \"[Now you|You] are all brown!\"",
        "\n{He} took [it|the {pet}] home, and {his} {parent} got [|some ][|warm ]water.",
        "[Soon|Then] it was {a look} {pet} again, and {name} was wet, too.",
        "But the {pet} looked at the {place} and wanted to go back!|"
        "\"[Stay out of|Do not play in] the mud!\" said {name}.",
    },
};

// ------------------------------------------------------------------------------------------------
// Making a story: choose words, fill them in

#define BLANK "____" // one blank token in a template of `loopmdm sample`

typedef struct { const char *text; size_t len; } Span; // a piece of a string in the tables above

// {name} stands for word[0], {name2} for word[1].
typedef struct {
    Span name, word[2];
    int told[2];      // 1 if the story has written this word already
} Slot;

typedef struct {
    FILE *out;
    Random random;    // its key belongs to this story
    Slot slots[16];   // the cast, then `common`, then what the plot chooses
    int num_slots;
    int templates;    // write a blank for a word that was told before
    char last;        // the last character written
} Story;

static Span span(const char *from, const char *to) { return (Span){ from, (size_t)(to - from) }; }

static Span whole(const char *text) { return (Span){ text, strlen(text) }; }

// Returns option k of "a|b|c", or a Span with text NULL if there are fewer options. A "|" inside
// [...] belongs to the inner list.
static Span option(Span list, int k) {
    const char *start = list.text; // of the present option
    const char *end = list.text + list.len;
    int depth = 0; // of brackets

    // p == end ends the last option, so the loop goes one step too far on purpose.
    for (const char *p = start; p <= end; p++) {
        if (p == end || (*p == '|' && depth == 0)) {
            if (k == 0) return span(start, p);
            k--;
            start = p + 1;
        } else {
            depth += (*p == '[') - (*p == ']');
        }
    }
    return (Span){ NULL, 0 };
}

static int count_options(Span list) {
    int n = 0;
    while (option(list, n).text) n++;
    return n;
}

static Span choose(Story *s, Span list) {
    return option(list, random_below(&s->random, count_options(list)));
}

static void add_slot(Story *s, Span name, Span word, Span word2) {
    if (s->num_slots == COUNT(s->slots)) die(1, "a plot has too many slots; make slots[] larger");
    s->slots[s->num_slots++] = (Slot){ name, { word, word2 }, { 0, 0 } };
}

static void put(Story *s, Span text) {
    if (text.len) s->last = text.text[text.len - 1];
    fwrite(text.text, 1, text.len, s->out);
}

// Chooses two different words for the slot of an entry such as "thing = ball|car".
static void choose_slot(Story *s, const char *entry, const char *equals) {
    Span list = whole(equals + strlen(" = "));
    int n = count_options(list);
    int k = random_below(&s->random, n);
    int k2 = (k + 1 + random_below(&s->random, n - 1)) % n; // any option except k

    add_slot(s, span(entry, equals), option(list, k), option(list, k2));
}

// Finds the slot for "thing", "thing2" or "Thing"; *second becomes 1 for "thing2". It searches
// backwards: a list of the plot hides the list of `common` with the same name.
static Slot *find_slot(Story *s, Span ask, int *second) {
    *second = ask.text[ask.len - 1] == '2';
    size_t len = ask.len - (size_t)*second; // without the 2

    for (int i = s->num_slots; i-- > 0;) {
        Span name = s->slots[i].name;
        // "Thing" asks for the slot "thing" too: only its first letter may be a capital.
        if (name.len == len && name.text[0] == tolower(ask.text[0]) &&
            memcmp(name.text + 1, ask.text + 1, len - 1) == 0) {
            return &s->slots[i];
        }
    }
    die(1, "a plot asks for {%.*s}, which nothing chooses", (int)ask.len, ask.text);
}

// Writes what {...} stands for, or a blank. `ask` is the text between the braces: "thing",
// "thing2", "Thing" or "a thing".
static void fill(Story *s, Span ask) {
    int article = ask.len > 2 && memcmp(ask.text, "a ", 2) == 0;
    if (article) ask = (Span){ ask.text + 2, ask.len - 2 };

    int second;
    Slot *slot = find_slot(s, ask, &second);
    Span word = slot->word[second];

    if (article) put(s, whole(strchr("aeiou", word.text[0]) ? "an " : "a "));

    // A token of the tokenizer is a word with the space before it, so a blank needs that space.
    int one_word = !memchr(word.text, ' ', word.len);
    if (s->templates && slot->told[second] && s->last == ' ' && one_word) {
        put(s, whole(BLANK));
        return;
    }

    // The words are lower-case, except the names. Only the first letter can change.
    char first = isupper(ask.text[0]) ? (char)toupper(word.text[0]) : word.text[0];
    put(s, (Span){ &first, 1 });
    put(s, (Span){ word.text + 1, word.len - 1 });
    slot->told[second] = 1;
}

// Chooses one of the wordings and writes it. {...} is filled in and [...] expanded in the same way.
static void expand(Story *s, Span wordings) {
    Span t = choose(s, wordings);

    // Braces and brackets are never nested in themselves, so the next "}" or "]" closes this one.
    for (const char *p = t.text, *close; p < t.text + t.len; p++) {
        if (*p == '{' && (close = strchr(p, '}'))) {
            fill(s, span(p + 1, close));
            p = close;
        } else if (*p == '[' && (close = strchr(p, ']'))) {
            expand(s, span(p + 1, close));
            p = close;
        } else {
            put(s, (Span){ p, 1 });
        }
    }
}

static void write_story(FILE *out, uint64_t seed, uint64_t index, int templates) {
    Story s = { .out = out, .random = { hash(hash(0, seed), index), 0 }, .templates = templates };

    // The words that every story has. If the hero is a girl, the friend is a boy. Both words are
    // drawn in both cases, so that the number of draws does not depend on `girl`.
    int girl = random_below(&s.random, 2);
    for (int i = 0; i < COUNT(cast); i++) {
        Span boy_word = choose(&s, whole(cast[i].boy));
        Span girl_word = choose(&s, whole(cast[i].girl));
        add_slot(&s, whole(cast[i].slot), girl ? girl_word : boy_word, girl ? boy_word : girl_word);
    }
    for (int i = 0; i < COUNT(common); i++) {
        choose_slot(&s, common[i], strstr(common[i], " = "));
    }

    // The entries of a plot. A shorter plot than the longest ends with NULL.
    const char *const *plot = plots[random_below(&s.random, COUNT(plots))];
    int sentences = 0;
    for (int i = 0; i < COUNT(plots[0]) && plot[i]; i++) {
        const char *entry = plot[i];
        const char *equals = strstr(entry, " = ");
        if (equals) {
            choose_slot(&s, entry, equals);
            continue;
        }

        // A sentence: a space or the end of the paragraph before it, then the text.
        int paragraph = *entry == '\n';
        if (paragraph) put(&s, whole(templates ? BLANK : "\n")); // never the first sentence
        else if (sentences > 0) put(&s, whole(" "));
        expand(&s, whole(entry + paragraph));
        sentences++;
    }
    fputs(templates ? "\n" : "\n<|endoftext|>\n", out);
}

// ------------------------------------------------------------------------------------------------
// The command line

static const char usage[] =
    "usage: stories [--seed N] [--count N] [--templates] [--output FILE]\n"
    "Writes simple children's stories. After each comes a line <|endoftext|>.\n"
    "  --seed N       which stories to write, 0 to 2^64-1 (default 1)\n"
    "  --count N      how many stories, at least 1 (default 1000)\n"
    "  --templates    write each story as one line; words that it told before are blanks, ____.\n"
    "                 The same seed without --templates gives the right answers\n"
    "  --output FILE  where to write them (default: standard output)\n"
    "  --help         show this text\n";

int main(int argc, char **argv) {
    uint64_t seed = 1;
    uint64_t count = 1000;
    int templates = 0;
    static Output out;
    for (int i = 1; i < argc; i++) {
        const char *name = argv[i];
        if (!strcmp(name, "--help")) {
            fputs(usage, stdout);
            finish(&(Output){.file = stdout});
            return 0;
        }
        if (!strcmp(name, "--templates")) {
            templates = 1;
        } else if (!strcmp(name, "--seed")) {
            seed = whole_number(name, next_value(argv, &i), 0, UINT64_MAX);
        } else if (!strcmp(name, "--count")) {
            count = whole_number(name, next_value(argv, &i), 1, UINT64_MAX);
        } else if (!strcmp(name, "--output")) {
            output_to(&out, next_value(argv, &i));
        } else {
            die(2, "unknown option '%s'; try --help", name);
        }
    }

    // A full disk stops the loop; finish() then reports it.
    start(&out);
    for (uint64_t i = 0; i < count && !ferror(out.file); i++) {
        write_story(out.file, seed, i, templates);
    }
    finish(&out);
    commit(&out);
    return 0;
}
