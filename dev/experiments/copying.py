"""
10. Copying: does a model of stories learn to repeat a name, a colour or a thing that was told before, and how fast may its embeddings learn?

The MDM of flops.py's largest budget, and the same with embeddings that learn at the full rate, not at a tenth of it (--wte-lr). Of held-out stories one word is blank that
stands elsewhere in the story at least twice; it is filled in in one step.
"""
import random
import re

from common import COLORS, MODELS, QUICK, SEEDS, TASKS, TERA, chosen, each, finish, mean, nelbo, one_part, print_table, run, save_csv, spread, train
from few_steps import fill_in, fits, words_in_blanks, write_templates
from flops import LARGEST, tune

SHARES = (1, 0.1)
KINDS = {  # as in dev/data/stories.c
    "names": "Tom|Ben|Sam|Max|Tim|Jack|Anna|Lily|Mia|Sue|Lucy|Kate",
    "colours": "red|blue|green|yellow|pink|orange|black|white|brown|gray",
    "things": "ball|car|doll|boat|drum|train|cake|pie|apple|cookie|kite|hat|bag|balloon",
    "animals": "cat|dog|rabbit|mouse|bird|duck|goat|pig",
}
CASES = 4 if QUICK else 200  # of each kind


def cases():
    """{kind: (templates with a blank, the missing words, a file of the first)}. An end of paragraph is a blank too, as a template is a line."""
    stories = [story.strip("\n") for story in open(TASKS["stories"].held_out.replace(".bin", ".txt")).read().split("<|endoftext|>")]
    draw, found = random.Random(1), {}
    for kind, words in KINDS.items():
        chosen = []
        for story in stories:
            places = [place for place in re.finditer(rf" ({words})\b", story) if len(re.findall(rf"\b{place[1]}\b", story)) > 2]
            if places and fits(story):
                place = draw.choice(places)
                chosen.append(((story[:place.start()] + " ____" + story[place.end():]).replace("\n", "____"), place[0]))
            if len(chosen) == CASES:
                break
        templates, missing = zip(*chosen)
        found[kind] = templates, missing, write_templates(f"copying_{kind}.txt", templates)
    return found


def experiment():
    rate = tune("stories")[1]["MDM"]
    runs = {(share, seed): run("stories", LARGEST["stories"], seed, lr=rate, wte_lr=share, **MODELS["MDM"]) for share in SHARES for seed in SEEDS}
    train(runs.values())
    found = cases()

    def right(r):
        """{kind: % of the blanks filled in right}."""
        return {kind: 100 * mean(word in words_in_blanks(template, text) for template, word, text in zip(templates, missing, fill_in(r, path, 1, 1)))
                for kind, (templates, missing, path) in found.items()}

    copied, losses = each("filling in", right, runs), each("evaluating", nelbo, runs)
    save_csv("copying", ["wte_lr", "seed", "nelbo", *(f"{kind}_right" for kind in KINDS)], [[*key, losses[key][1], *copied[key].values()] for key in runs])
    print_table(f"stories: words copied right, %, and NELBO, by the embeddings' share of the learning rate, {LARGEST['stories'] / TERA:g} TFLOP; mean (lowest to highest) of {len(SEEDS)} seeds",
                ["share", *KINDS, "NELBO"],
                [[share] + [spread((copied[share, seed][kind] for seed in SEEDS), "{:.0f}") for kind in KINDS] + [spread(losses[share, seed][1] for seed in SEEDS)] for share in SHARES])

    ax = one_part()
    for i, share in enumerate(SHARES):
        for k, kind in enumerate(KINDS):
            ax.bar(k + (i - 0.5) * 0.36, mean(copied[share, seed][kind] for seed in SEEDS), 0.34, color=COLORS[i], label=f"embeddings' share of the learning rate: {share:g}" if k == 0 else None)
            ax.plot([k + (i - 0.5) * 0.36] * len(SEEDS), [copied[share, seed][kind] for seed in SEEDS], "k.")
    ax.set_xticks(range(len(KINDS)), list(KINDS))
    ax.grid(axis="x", visible=False)
    finish(ax, "copying", ylabel="blanks filled in right, %", title="Words that the story has elsewhere: points are seeds, bars their mean")


if __name__ == "__main__":
    for _ in chosen("stories"):
        experiment()
