"""
10. Copying: does a model of stories learn to repeat a name, a colour or a thing that was told
before?

The MDM of the largest budget of flops.py. In each held-out story one word is blank that stands at
least twice elsewhere in the story. The model fills it in, in one step. --model tests one model that
is trained already, with several numbers of loops. It also lets the model write, with several
samplers: are the stories right, and do all plots come?

dev/results has lines with wte_lr 0.1 too: embeddings that learn at a tenth of the rate. Commit
8d694dc repeats them; now they learn like all other parameters.
"""
import os
import random
import re
import shutil
from types import SimpleNamespace

from common import (COLORS, SEEDS, TASKS, TERA, WORK, chosen, each, finish, given, loopmdm, mean,
                    nelbo, new_figure, of_seeds, pick, print_table, save_csv, spread)
from few_steps import fill_in, fits, words_in_blanks, write_templates
from flops import LARGEST, models

BOYS, GIRLS = "Tom|Ben|Sam|Max|Tim|Jack", "Anna|Lily|Mia|Sue|Lucy|Kate"
KINDS = {  # the words of dev/data/stories.c
    "names": f"{BOYS}|{GIRLS}",
    "colours": "red|blue|green|yellow|pink|orange|black|white|brown|gray",
    "things": "ball|car|doll|boat|drum|train|cake|pie|apple|cookie|kite|hat|bag|balloon",
    "animals": "cat|dog|rabbit|mouse|bird|duck|goat|pig",
}
MEETING = "came by|was there too|with a friend|({0}) and ({0})|for ({0})".format(KINDS["names"])
PLOTS = (  # words that only the stories of one plot have
    "asked the", "came by|was there too", "broke", "color", "wind", "to rain|rain came", "hungry",
    "mud")
CASES = pick(2, 200)  # of each kind
SAMPLERS = {
    "margin, blocks of 8, temperature 0.7":
        ("--order", "margin", "--block", 8, "--temperature", 0.7),
    "confidence, blocks of 8, temperature 0.7": ("--block", 8, "--temperature", 0.7),
    "confidence, temperature 0.7": ("--temperature", 0.7),
    "left to right, temperature 1": ("--block", 1),
    "random, temperature 1": ("--order", "random")}


def stories_of(shard):
    """Returns the stories that a shard was made of."""
    with open(shard.replace(".bin", ".txt")) as file:
        return [story.strip("\n") for story in file.read().split("<|endoftext|>")]


def cases():
    """
    Returns {kind: (templates with a blank, the missing words, a file of the templates)}. A template
    is one line, so the end of a paragraph becomes a blank too.
    """
    stories = stories_of(TASKS["stories"].held_out)
    draw, found = random.Random(1), {}
    for kind, words in KINDS.items():
        templates, missing = [], []
        for story in stories:
            places = [place for place in re.finditer(rf" ({words})\b", story)
                      if len(re.findall(rf"\b{place[1]}\b", story)) > 2]
            if places and fits(story):
                place = draw.choice(places)
                template = story[:place.start()] + " ____" + story[place.end():]
                templates.append(template.replace("\n", "____"))
                missing.append(place[0])
            if len(templates) == CASES:
                break
        found[kind] = templates, missing, write_templates(f"copying_{kind}.txt", templates)
    return found


def words_right(r, found, S):
    """Returns {kind: % of the blanks of cases() filled in right in one step with S loops}."""
    shares = {}
    for kind, (templates, missing, path) in found.items():
        texts = fill_in(r, path, S, 1)
        shares[kind] = 100 * mean(word in words_in_blanks(template, text)
                                  for template, word, text in zip(templates, missing, texts))
    return shares


def words_of(words, story):
    """Returns which of the words, in any case, the story has, as a set of lower case."""
    return {word.lower() for word in re.findall(rf"\b(?:{words})\b", story, re.IGNORECASE)}


def who_is_clear(story):
    """
    Returns whether a story keeps who is in it. All stories of stories.c do: they are of a boy, of a
    girl, or of a boy and a girl who meet, and "he" and "she" are always clear.
    """
    boys, girls = words_of(BOYS, story), words_of(GIRLS, story)
    if len(boys) > 1 or len(girls) > 1:
        return False
    if boys and girls:
        return True
    others = words_of("she|her" if boys else "he|him|his", story)
    return not others and not re.search(rf"\b({MEETING})\b", story)


def triples(story):
    """Returns all three words in a row of a story. Punctuation marks and its two ends are words."""
    words = ["^", *re.findall(r"[\w']+|[^\w ]", story), "$"]
    return set(zip(words, words[1:], words[2:]))


def judged(model, sampler, known):
    """
    Lets the model write CASES stories, one token in a step. Returns % of stories that are clear, of
    those whose triples are all known, and of those with the most frequent plot (12.5 in the data).
    """
    texts = loopmdm("sample", "--model", model, "-n", CASES, "--steps", pick(16, 96), *sampler,
                    "--precision", given.precision)
    stories = texts.strip("\n").split("\n\n")
    clear = sum(map(who_is_clear, stories))
    worded = sum(triples(story) <= known for story in stories)
    plots = [sum(re.search(rf"\b({plot})\b", story) is not None for story in stories)
             for plot in PLOTS]
    return [100 * n / len(stories) for n in (clear, worded, max(plots))]


def test(model):
    """
    Prints what a model copies, and how good its own stories are. A copy of the model stands in the
    folder that keeps its answers.
    """
    r = SimpleNamespace(folder=os.path.join(WORK, "copying_model"))
    shutil.rmtree(r.folder, ignore_errors=True)
    shutil.copytree(model, r.folder)
    found = cases()
    shares = {S: words_right(r, found, S) for S in (1, 2, 4)}
    print_table(f"{model}: words copied right, %", ["S", *KINDS],
                [[S, *(f"{share:g}" for share in shares[S].values())] for S in shares])
    known = set().union(*map(triples, stories_of(TASKS["stories"].data)))
    results = each("writing", lambda sampler: judged(model, sampler, known), SAMPLERS)
    print_table(f"{model}: of {CASES} stories that it wrote, %",
                ["sampler", "clear who is who", "well worded", "most frequent plot"],
                [[name, *(f"{share:.1f}" for share in results[name])] for name in SAMPLERS])


def experiment():
    runs = {seed: r for (name, seed), r in models("stories").items() if name == "MDM"}
    found = cases()
    copied = each("filling in", lambda r: words_right(r, found, 1), runs)
    losses = each("evaluating", nelbo, runs)
    save_csv("copying", ["wte_lr", "seed", "nelbo", *(f"{kind}_right" for kind in KINDS)],
             [[1, seed, losses[seed][1], *copied[seed].values()] for seed in runs],
             keep=("wte_lr", "0.1"))
    print_table(f"stories: words copied right, %, and NELBO, {LARGEST['stories'] / TERA:g} TFLOP; "
                f"{of_seeds()}", [*KINDS, "NELBO"],
                [[spread((copied[seed][kind] for seed in SEEDS), "{:.0f}") for kind in KINDS]
                 + [spread(losses[seed][1] for seed in SEEDS)]])

    _, (ax,) = new_figure()
    for k, kind in enumerate(KINDS):
        shares = [copied[seed][kind] for seed in SEEDS]
        ax.bar(k, mean(shares), 0.5, color=COLORS[0])
        ax.plot([k] * len(SEEDS), shares, "k.")
    ax.set_xticks(range(len(KINDS)), list(KINDS))
    ax.grid(axis="x", visible=False)
    finish(ax, "copying", ylabel="blanks filled in right, %",
           title="Words that the story has elsewhere: points are seeds, bars their mean")


if __name__ == "__main__":
    for _ in chosen("stories"):
        test(given.model) if given.model else experiment()
