"""
5. Few denoising steps: does looping help most where many tokens are filled in at once?

The models of flops.py, with equal training FLOPs. Sudoku: share of puzzles with 16 givens that are solved. Stories: share of templates all of whose blanks are
filled in right (dev/data/stories.c --templates: words that the story has told before), and the NELBO of free samples under a judge, a larger MDM trained on the
same stories with the task's learning rate. Templates and puzzles are filled in greedily, by confidence; free samples are drawn by the ancestral sampler at temperature 1, with one
seed. The judge alone does not see whether texts differ; dull ones are cheap.
"""
import functools
import os
import re

from common import CHOSEN, LINES, QUICK, SEEDS, TASKS, TERA, WORK, ask, each, label, line, log_axis, loopmdm, loops_of, mean, nelbo, numbers, plt, print_table, rows_of, run, save_csv, save_figure, spread, train
from flops import models

BOARD_STEPS, TEMPLATE_STEPS, FREE_STEPS = ((1, 2),) * 3 if QUICK else ((1, 2, 3, 5, 10, 20), (1, 2, 4, 8, 16), (4, 8, 16, 32, 96))
TEMPLATES, TEXTS = (4, 4) if QUICK else (500, 256)
JUDGE = run("stories", 40 * TERA, loop="0:0", layers=6, channels=128)


def boards(r):
    """{(S, steps): % solved}."""
    table = ask(r, "eval", "--sudoku", "--data", "build/puzzles.bin", "--rows", 20 if QUICK else 1000, "--batch", 100, "--loops", numbers(loops_of(r)), "--steps", numbers(BOARD_STEPS))
    return {(int(row[0]), int(row[1])): row[3] for row in rows_of(table)}


@functools.lru_cache(maxsize=None)
def cases():
    """(a file of templates, their answers): the first that are short enough for the model and whose blanks are one token each."""
    with open(TASKS["stories"].tokenizer, "rb") as file:
        data, tokens, at = file.read(), set(), 1024
    while at < len(data):
        tokens.add(data[at + 1: at + 1 + data[at]].decode("latin-1"))
        at += 1 + data[at]
    kept, room = [], TASKS["stories"].options["seq-len"] - 2  # for the end-of-text before and after
    answers = open("build/templates_answers.txt").read().split("\n<|endoftext|>\n")
    for template, answer in zip(open("build/templates.txt").read().splitlines(), answers):
        blanks = re.fullmatch("( ?[^ ]+?)".join(map(re.escape, re.split(" ?____", template))), answer).groups()
        if all(blank in tokens for blank in blanks) and int(loopmdm("tokenize", "--tokenizer", TASKS["stories"].tokenizer, "--text", answer).split("\n")[-2].split()[0]) <= room:
            kept.append((template, answer))
        if len(kept) == TEMPLATES:
            break
    path = os.path.join(WORK, "templates.txt")
    with open(path, "w") as file:
        file.writelines(template + "<|endoftext|>\n" for template, _ in kept)
    return path, [answer for _, answer in kept]


def templates(r):
    """{(S, steps): % filled in right}."""
    (path, answers), shares = cases(), {}
    for S in loops_of(r):
        for steps in TEMPLATE_STEPS:
            how = ["--loops", S, "--steps", steps, "--temperature", 0]
            texts = ask(r, "sample", "--fill-file", path, *how).rstrip("\n").split("\n\n")
            if len(texts) != len(answers):  # the model has written an empty line, which is between texts otherwise
                texts = [loopmdm("sample", "--model", r.folder, "--fill", template, *how).rstrip("\n") for template in open(path).read().splitlines()]
            shares[S, steps] = 100 * mean(text == answer for text, answer in zip(texts, answers))
    return shares


def free(r):
    """{(S, steps): NELBO of what the model writes, under the judge}."""
    losses = {}
    for S in loops_of(r):
        for steps in FREE_STEPS:
            texts = ask(r, "sample", "-n", TEXTS, "--loops", S, "--steps", steps, "--order", "random", "--seed", 7).rstrip("\n").split("\n\n")
            path = os.path.join(r.folder, f"texts_{S}_{steps}")
            with open(path + ".txt", "w", encoding="latin-1", newline="") as file:
                file.write("\n<|endoftext|>\n".join(texts))
            loopmdm("tokenize", "--tokenizer", TASKS["stories"].tokenizer, "--input", path + ".txt", "--output", path + ".bin")
            losses[S, steps] = nelbo(JUDGE, [1], data=path + ".bin", rows=2048)[1]
    return losses


def show(name, title, what, results, all_steps, reference=None):
    """CSV file, table and figure of {(model, seed): {(S, steps): value}}; reference: (what, value), a line in the figure."""
    save_csv(name, ["model", "seed", "loops", "steps", what], [[model, seed, S, steps, value] for (model, seed), values in results.items() for (S, steps), value in values.items()])
    values = {(model, S): {steps: [results[model, seed][S, steps] for seed in SEEDS] for steps in all_steps} for model, S in LINES}
    form = "{:.1f}" if "%" in what else "{:.3f}"
    print_table(f"{title}: {what}, by denoising steps; mean (lowest to highest) of {len(SEEDS)} seeds", ["model", *all_steps],
                [[label(model, S)] + [spread(values[model, S][steps], form) for steps in all_steps] for model, S in LINES])
    figure, ax = plt.subplots(figsize=(7, 4))
    for i, (model, S) in enumerate(LINES):
        line(ax, i, label(model, S), values[model, S])
    if reference:
        ax.axhline(reference[1], color="black", linestyle=":", linewidth=1, label=reference[0])
        print(f"{reference[0]}: {reference[1]:.4f}")
    log_axis(ax, all_steps)
    ax.set(xlabel="denoising steps", ylabel=what, title=title)
    ax.legend()
    save_figure(figure, name)


def solve():
    solvers = models("sudoku")
    show("few_steps_sudoku", "Sudoku 6x6, 16 givens, by confidence", "solved, %", dict(zip(solvers, each("solving", boards, solvers.values()))), BOARD_STEPS)


def write():
    writers = models("stories")
    train([JUDGE])
    cases()
    show("few_steps_templates", "Templates of stories, by confidence", "all blanks right, %", dict(zip(writers, each("filling in", templates, writers.values()))), TEMPLATE_STEPS)
    show("few_steps_free", "Stories from nothing, ancestral sampling", "NELBO under a judge, nats per token", dict(zip(writers, each("writing", free, writers.values()))), FREE_STEPS,
         ("held-out stories", nelbo(JUDGE)[1]))


if __name__ == "__main__":
    if "sudoku" in CHOSEN:
        solve()
    if "stories" in CHOSEN:
        write()
