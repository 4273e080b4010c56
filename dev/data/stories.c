/*
 * stories.c - writes simple children's stories, to train a tiny text model on.
 *
 * A very small language model learns good English only if the English is very simple: few words,
 * short stories, clear cause and effect. This program makes any amount of such text without a
 * download. Early facts return later ("Tom had a red ball. ... There was the red ball!"), so
 * that a blanked-out word, the task of a masked diffusion model, often has just one right answer.
 *
 *   cc -std=c11 -O2 -o stories stories.c
 *   ./stories --count 20000 --output stories.txt
 *
 * --help lists the options. The text is plain ASCII. A story is two short paragraphs, one line
 * each, and then a line <|endoftext|>. Story i depends only on the seed and on i, so a larger
 * --count only adds stories at the end, and another --seed gives another corpus.
 *
 * With --templates each story becomes a task: a line in which a word chosen for this story is a
 * blank, ____, if it was told before, is one word and follows a space; the end of the first
 * paragraph is a blank too. The same seed without --templates gives the stories themselves, which
 * are the right answers.
 *
 * With --output FILE the text goes to FILE.tmp, which is renamed when complete: FILE is never half
 * written. An error is one line on standard error; the exit status is then 2 if the command line
 * is wrong and 1 if the text could not be written.
 *
 * How a story is made. A plot (see the table below) is a list of rows, used in order:
 *
 *   "thing = ball|car"     chooses a word for this story: {thing} is now, say, "car". A different
 *                          one is chosen too: {thing2} is "ball".
 *   "{He} ran.|{He} sat."  any other row is a sentence or two. "|" separates wordings; one is
 *                          chosen. A "\n" in front starts the second paragraph.
 *
 * Within a sentence:
 *
 *   {thing} {thing2}       the words chosen for this story
 *   {Thing}                with a capital letter
 *   {a thing}              with "a" or "an" before it, whichever is right
 *   [one|two|three]        one of these, chosen on the spot
 *
 * Some words are chosen for every story: those in `common`, and the cast. The hero is {name}, with
 * {he} {him} {his}; the friend, {name2} {he2} {him2} {his2}, is a girl if the hero is a boy and a
 * boy if she is a girl, so "he" and "she" are never in doubt. To add a plot, add it to the table.
 */
#define PROGRAM "stories"
#define OUTPUT "--output"
#include "generator.h" // errors, command line, files, random numbers

// ------------------------------------------------------------------------------------------------
// The stories. Keep the words few: each new one is one more for the model to learn.

static const struct { const char *slot, *boy, *girl; } cast[] = {
    {"name", "Tom|Ben|Sam|Max|Tim|Jack",
             "Anna|Lily|Mia|Sue|Lucy|Kate"},
    {"he", "he", "she"},
    {"him", "him", "her"},
    {"his", "his", "her"},
};

static const char *const common[] = {
    "look = red|blue|green|yellow|pink|orange", // a colour, unless the plot says
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
        "\"Thank you, {Parent}! I will not run in the {place} again,\" said {name}.|"
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

#define BLANK "____" // of one token, in loopmdm's templates

typedef struct { const char *text; size_t len; } Span; // a piece of a string in the tables above

typedef struct { Span name, word[2]; int told[2]; } Slot; // {name} stands for word[0], {name2} for word[1]; which were written already?

typedef struct {
    FILE *out;
    Random random;    // its key is this story's
    Slot slots[16];   // the cast, `common`, then what the plot chooses
    int num_slots;
    int templates;    // write a blank for what was told before
    char last;        // the last character written
} Story;

static Span span(const char *from, const char *to) { return (Span){ from, (size_t)(to - from) }; }

static Span whole(const char *text) { return (Span){ text, strlen(text) }; }

// Option k of "a|b|c"; its text is NULL if there are not so many. A "|" within [...] is not ours.
static Span option(Span list, int k) {
    const char *start = list.text, *end = list.text + list.len;
    int depth = 0;
    for (const char *p = start; p <= end; p++) {
        if (p == end || (*p == '|' && depth == 0)) {
            if (k-- == 0) return span(start, p);
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

// Chooses two different words for the slot of a row such as "thing = ball|car".
static void choose_slot(Story *s, const char *row, const char *equals) {
    Span list = whole(equals + strlen(" = "));
    int n = count_options(list), k = random_below(&s->random, n), k2 = (k + 1 + random_below(&s->random, n - 1)) % n;
    add_slot(s, span(row, equals), option(list, k), option(list, k2));
}

// Writes the word for what stands within {...}: "thing", "thing2", "Thing" or "a thing"; or a blank.
static void fill(Story *s, Span ask) {
    int article = ask.len > 2 && memcmp(ask.text, "a ", 2) == 0;
    if (article) ask = (Span){ ask.text + 2, ask.len - 2 };
    int second = ask.text[ask.len - 1] == '2';
    size_t len = ask.len - (size_t)second;
    for (int i = s->num_slots; i-- > 0;) { // backwards: a plot's list hides the one in `common`
        Slot *slot = &s->slots[i];
        Span word = slot->word[second];
        if (slot->name.len == len && slot->name.text[0] == tolower(ask.text[0]) &&
            memcmp(slot->name.text + 1, ask.text + 1, len - 1) == 0) {
            if (article) put(s, whole(strchr("aeiou", word.text[0]) ? "an " : "a "));
            if (s->templates && slot->told[second] && s->last == ' ' && !memchr(word.text, ' ', word.len)) {
                put(s, whole(BLANK));
                return;
            }
            char first = isupper(ask.text[0]) ? (char)toupper(word.text[0]) : word.text[0];
            put(s, (Span){ &first, 1 });
            put(s, (Span){ word.text + 1, word.len - 1 });
            slot->told[second] = 1;
            return;
        }
    }
    die(1, "a plot asks for {%.*s}, which nothing chooses", (int)ask.len, ask.text);
}

// Chooses one of the wordings and writes it, with each {...} filled in and each [...] expanded too.
static void expand(Story *s, Span wordings) {
    Span t = choose(s, wordings);
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
    int girl = random_below(&s.random, 2);
    for (int i = 0; i < COUNT(cast); i++) {
        Span boy_word = choose(&s, whole(cast[i].boy)), girl_word = choose(&s, whole(cast[i].girl));
        add_slot(&s, whole(cast[i].slot), girl ? girl_word : boy_word, girl ? boy_word : girl_word);
    }
    for (int i = 0; i < COUNT(common); i++) {
        choose_slot(&s, common[i], strstr(common[i], " = "));
    }
    const char *const *plot = plots[random_below(&s.random, COUNT(plots))];
    int sentences = 0;
    for (int i = 0; i < COUNT(plots[0]) && plot[i]; i++) {
        const char *row = plot[i], *equals = strstr(row, " = ");
        if (equals) {
            choose_slot(&s, row, equals);
        } else {
            int paragraph = *row == '\n';
            if (sentences++) put(&s, whole(!paragraph ? " " : templates ? BLANK : "\n"));
            expand(&s, whole(row + paragraph));
        }
    }
    fputs(templates ? "\n" : "\n<|endoftext|>\n", out);
}

// ------------------------------------------------------------------------------------------------
// The command line

static const char usage[] =
    "usage: stories [--seed N] [--count N] [--templates] [--output FILE]\n"
    "Writes simple children's stories, each followed by a line <|endoftext|>.\n"
    "  --seed N       which corpus to write, 0 to 2^64-1 (default 1)\n"
    "  --count N      how many stories, at least 1 (default 1000)\n"
    "  --templates    write each as a line in which what the story has told before is ____, to be\n"
    "                 filled in; the same seed without it gives the answers\n"
    "  --output FILE  where to write them (default: standard output)\n"
    "  --help         show this text\n";

int main(int argc, char **argv) {
    uint64_t seed = 1, count = 1000;
    int templates = 0;
    static Output out;
    for (int i = 1; i < argc; i++) {
        if (!strcmp(argv[i], "--help")) {
            fputs(usage, stdout);
            finish(&(Output){.file = stdout});
            return 0;
        }
        if (!strcmp(argv[i], "--seed")) seed = whole_number("--seed", next_value(argv, &i), 0, UINT64_MAX);
        else if (!strcmp(argv[i], "--count")) count = whole_number("--count", next_value(argv, &i), 1, UINT64_MAX);
        else if (!strcmp(argv[i], "--templates")) templates = 1;
        else if (!strcmp(argv[i], "--output")) output_to(&out, next_value(argv, &i));
        else die(2, "unknown option '%s'; try --help", argv[i]);
    }

    start(&out);
    for (uint64_t i = 0; i < count && !ferror(out.file); i++) write_story(out.file, seed, i, templates);
    finish(&out);
    commit(&out);
    return 0;
}
