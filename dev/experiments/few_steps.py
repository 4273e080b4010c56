"""
5. Few denoising steps: does looping help most where many tokens are filled in at once?

The models of flops.py, with equal training FLOPs. Sudoku: share of puzzles with 10 givens that are solved. Stories: share of templates all of whose blanks are
filled in right, and of blanks (dev/data/stories.c --templates: words that the story has told before); and the NELBO of free samples under a judge, a larger MDM trained on the
same stories with the task's learning rate. Templates and puzzles are filled in greedily, by confidence; free samples are drawn by the ancestral sampler at temperature 1, with one
seed. The judge alone does not see whether a text goes anywhere: what repeats itself is cheap. So the entropy of each text's words stands beside it.
"""
import functools
import itertools
import math
import os
import re
from collections import Counter

from common import QUICK, TASKS, TERA, WORK, ask, chosen, each, loopmdm, loops_of, mean, nelbo, numbers, run, show_by_steps, solved, tokens_of, train
from flops import models

BOARD_STEPS, TEMPLATE_STEPS, FREE_STEPS = ((1, 2),) * 3 if QUICK else ((1, 2, 3, 5, 10, 20), (1, 2, 4, 8, 16), (4, 8, 16, 32, 96))
TEMPLATES, TEXTS = (4, 4) if QUICK else (500, 256)
JUDGE = run("stories", 40 * TERA, loop="0:0", layers=6, channels=128)


def boards(r):
    """{(S, steps): % solved}."""
    return {(int(row[0]), int(row[1])): row[3] for row in solved(r, "--loops", numbers(loops_of(r)), "--steps", numbers(BOARD_STEPS))}


def words_in_blanks(template, text):
    """What a text has in the blanks of its template; nothing if it is not of that template."""
    found = re.fullmatch("( ?[^ ]+?)".join(map(re.escape, re.split(" ?____", template))), text)
    return found.groups() if found else ()


def fits(story):
    """Whether a row has room for it and an end-of-text before and after."""
    return int(loopmdm("tokenize", "--tokenizer", TASKS["stories"].tokenizer, "--text", story).split("\n")[-2].split()[0]) <= TASKS["stories"].options["seq-len"] - 2


def write_templates(name, templates):
    """The path of a new file of them, as --fill-file takes it."""
    path = os.path.join(WORK, name)
    with open(path, "w") as file:
        file.writelines(template + "<|endoftext|>\n" for template in templates)
    return path


def fill_in(r, path, S, steps):
    """What a model makes of the templates of a file: for each the text, greedily."""
    how = ["--loops", S, "--steps", steps, "--temperature", 0]
    asked = open(path).read().splitlines()
    texts = ask(r, "sample", "--fill-file", path, *how).rstrip("\n").split("\n\n")
    if len(texts) != len(asked):  # the model has written an empty line, which is between texts otherwise
        texts = [loopmdm("sample", "--model", r.folder, "--fill", template, *how).rstrip("\n") for template in asked]
    return texts


@functools.lru_cache(maxsize=None)
def cases():
    """(templates, their answers, a file of the first): those that are short enough for the model and whose blanks are one token each."""
    tokens, kept = {token.decode("latin-1") for token in tokens_of(TASKS["stories"].tokenizer)}, []
    answers = open("build/templates_answers.txt").read().split("\n<|endoftext|>\n")
    for template, answer in zip(open("build/templates.txt").read().splitlines(), answers):
        if all(word in tokens for word in words_in_blanks(template, answer)) and fits(answer):
            kept.append((template, answer))
        if len(kept) == TEMPLATES:
            break
    asked, answers = zip(*kept)
    return asked, answers, write_templates("templates.txt", asked)


def templates(r):
    """{(S, steps): (% of templates all of whose blanks are right, % of blanks that are)}."""
    (asked, answers, path), shares = cases(), {}
    for S in loops_of(r):
        for steps in TEMPLATE_STEPS:
            texts = fill_in(r, path, S, steps)
            blanks = [word == right for template, text, answer in zip(asked, texts, answers)
                      for word, right in itertools.zip_longest(words_in_blanks(template, text), words_in_blanks(template, answer))]
            shares[S, steps] = 100 * mean(text == answer for text, answer in zip(texts, answers)), 100 * mean(blanks)
    return shares


def entropy(text):
    """Of the frequencies of its words, in nats: low where a text says the same again and again."""
    counts = Counter(text.split()).values()
    return -sum(n / sum(counts) * math.log(n / sum(counts)) for n in counts)


def free(r):
    """{(S, steps): (NELBO of what the model writes, under the judge; mean entropy of the texts)}."""
    found = {}
    for S in loops_of(r):
        for steps in FREE_STEPS:
            texts = ask(r, "sample", "-n", TEXTS, "--loops", S, "--steps", steps, "--order", "random", "--seed", 7).rstrip("\n").split("\n\n")
            path = os.path.join(r.folder, f"texts_{S}_{steps}")
            with open(path + ".txt", "w", encoding="latin-1", newline="") as file:
                file.write("\n<|endoftext|>\n".join(texts))
            loopmdm("tokenize", "--tokenizer", TASKS["stories"].tokenizer, "--rows-of", TASKS["stories"].options["seq-len"], "--input", path + ".txt", "--output", path + ".bin")
            found[S, steps] = nelbo(JUDGE, [1], data=path + ".bin", rows=2048)[1], mean(map(entropy, texts))
    return found


def solve():
    solvers = models("sudoku")
    show_by_steps("few_steps_sudoku", "Sudoku 6x6, 10 givens, by confidence", "solved, %", solvers, each("solving", boards, solvers))


def write():
    writers = models("stories")
    train([JUDGE])
    cases()
    filled = each("filling in", templates, writers)
    for k, (name, what) in enumerate((("few_steps_templates", "all blanks right, %"), ("few_steps_blanks", "blanks right, %"))):
        show_by_steps(name, "Templates of stories, by confidence", what, writers, {key: {at: found[k] for at, found in values.items()} for key, values in filled.items()})
    written, title = each("writing", free, writers), "Stories from nothing, ancestral sampling"
    real = [story.decode() for story in open(TASKS["stories"].held_out.replace(".bin", ".txt"), "rb").read().split(b"<|endoftext|>")]
    of_real = nelbo(JUDGE)[1], mean(map(entropy, filter(str.strip, real)))
    for k, (name, what) in enumerate((("few_steps_free", "NELBO under a judge, nats per token"), ("few_steps_entropy", "entropy of a text's words, nats"))):
        show_by_steps(name, title, what, writers, {key: {at: found[k] for at, found in values.items()} for key, values in written.items()}, ("held-out stories", of_real[k]))


if __name__ == "__main__":
    for task in chosen("sudoku", "stories"):
        {"sudoku": solve, "stories": write}[task]()
