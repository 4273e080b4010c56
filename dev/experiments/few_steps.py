"""
5. Few denoising steps: does looping help most where a step fills in many tokens at once?

The models are those of flops.py, with equal training FLOPs. There are three tests:

Sudoku: the share of puzzles with 10 givens that are solved, filled in greedily, by confidence.

Templates of stories (dev/data/stories.c --templates), filled in likewise: the share of templates
with all blanks right, and the share of blanks that are right.

Free samples of stories, by the ancestral sampler at temperature 1, with one seed: their NELBO under
a judge, a larger MDM trained on the same stories. A text that repeats itself has a low NELBO too,
so the experiment also shows the entropy of each text's words.
"""
import functools
import itertools
import math
import os
import re
from collections import Counter

from common import (TASKS, TERA, WORK, Failure, ask, chosen, each, loopmdm, loops_of, mean, nelbo,
                    numbers, pick, run, show_by_steps, solved, tokens_of, train)
from flops import models

BOARD_STEPS = pick((1, 2), (1, 2, 3, 5, 10, 20))
TEMPLATE_STEPS = pick((1, 2), (1, 2, 4, 8, 16))
FREE_STEPS = pick((1, 2), (4, 8, 16, 32, 96))
TEMPLATES, TEXTS = pick(2, 500), pick(2, 256)
SHORT = pick(["--length", 32], [])  # the long texts of a model without training do not fit again
JUDGE = run("stories", 40 * TERA, loop="0:0", layers=6, channels=pick(16, 128))
STORIES = TASKS["stories"]


def boards(r):
    """Returns {(S, steps): % solved}."""
    table = solved(r, "--loops", numbers(loops_of(r)), "--steps", numbers(BOARD_STEPS))
    return {(int(S), int(steps)): right for S, steps, _, right, *_ in table}


def words_in_blanks(template, text):
    """Returns what a text has in the blanks of its template; () if the rest of it differs."""
    parts = re.split(" ?____", template)
    found = re.fullmatch("( ?[^ ]+?)".join(map(re.escape, parts)), text)
    return found.groups() if found else ()


def fits(story):
    """Returns whether a sequence has room for the story and an end-of-text before and after it."""
    output = loopmdm("tokenize", "--tokenizer", STORIES.tokenizer, "--text", story)
    count = int(output.split("\n")[-2].split()[0])  # the last line is "78 tokens"
    return count <= STORIES.options["seq-len"] - 2


def write_templates(name, templates):
    """Writes a file of templates for --fill-file. Returns its path."""
    path = os.path.join(WORK, name)
    with open(path, "w") as file:
        file.writelines(template + "<|endoftext|>\n" for template in templates)
    return path


def fill_in(r, path, S, steps):
    """
    Returns the texts that a model makes, greedily, of the templates of a file, without the
    end-of-text that each line has.
    """
    how = ["--loops", S, "--steps", steps, "--temperature", 0]
    asked = open(path).read().splitlines()
    texts = ask(r, "sample", "--fill-file", path, *how).rstrip("\n").split("\n\n")
    if len(texts) != len(asked):
        # An empty line separates two texts, and here a text has one itself: ask one by one.
        texts = [loopmdm("sample", "--model", r.folder, "--fill", template, *how).rstrip("\n")
                 for template in asked]
    texts = [text.removesuffix("<|endoftext|>") for text in texts]
    if not any(words_in_blanks(template.removesuffix("<|endoftext|>"), text)
               for template, text in zip(asked, texts)):
        raise Failure(f"no text that {r.folder} made fits its template in {path}")
    return texts


@functools.lru_cache(maxsize=None)
def cases():
    """
    Returns (templates, their answers, a file of the templates): those that are short enough for the
    model and whose blanks are one token each.
    """
    tokens = {token.decode("latin-1") for token in tokens_of(STORIES.tokenizer)}
    templates = open("build/templates.txt").read().splitlines()
    answers = open("build/templates_answers.txt").read().split("\n<|endoftext|>\n")
    kept = []
    for template, answer in zip(templates, answers):
        words = words_in_blanks(template, answer)
        if all(word in tokens for word in words) and fits(answer):
            kept.append((template, answer))
        if len(kept) == TEMPLATES:
            break
    asked, answers = zip(*kept)
    return asked, answers, write_templates("templates.txt", asked)


def templates(r):
    """Returns {(S, steps): (% of templates with all blanks right, % of blanks right)}."""
    asked, answers, path = cases()
    shares = {}
    for S in loops_of(r):
        for steps in TEMPLATE_STEPS:
            texts = fill_in(r, path, S, steps)
            blanks = []
            for template, text, answer in zip(asked, texts, answers):
                pairs = itertools.zip_longest(words_in_blanks(template, text),
                                              words_in_blanks(template, answer))
                blanks += [word == right for word, right in pairs]
            whole = [text == answer for text, answer in zip(texts, answers)]
            shares[S, steps] = 100 * mean(whole), 100 * mean(blanks)
    return shares


def entropy(text):
    """
    Returns the entropy of the frequencies of a text's words, in nats. It is low where a text says
    the same again and again.
    """
    counts = Counter(text.split()).values()
    total = sum(counts)
    return -sum(n / total * math.log(n / total) for n in counts)


def free(r):
    """Returns {(S, steps): (NELBO under the judge of what the model writes, mean entropy)}."""
    found = {}
    for S in loops_of(r):
        for steps in FREE_STEPS:
            texts = ask(r, "sample", "-n", TEXTS, "--loops", S, "--steps", steps,
                        "--order", "random", "--seed", 7, *SHORT).rstrip("\n").split("\n\n")
            path = os.path.join(r.folder, f"texts_{S}_{steps}")
            with open(path + ".txt", "w", encoding="latin-1", newline="") as file:
                file.write("\n<|endoftext|>\n".join(texts))
            loopmdm("tokenize", "--tokenizer", STORIES.tokenizer,
                    "--rows-of", STORIES.options["seq-len"],
                    "--input", path + ".txt", "--output", path + ".bin")
            judged = nelbo(JUDGE, [1], data=path + ".bin", sequences=2048)[1]
            found[S, steps] = judged, mean(map(entropy, texts))
    return found


def show_part(k, name, title, what, runs, results, reference=None):
    """show_by_steps() for number k of the values of each result."""
    values = {key: {at: found[k] for at, found in by_steps.items()}
              for key, by_steps in results.items()}
    show_by_steps(name, title, what, runs, values, reference)


def solve():
    """Sudoku."""
    solvers = models("sudoku")
    show_by_steps("few_steps_sudoku", "Sudoku 6x6, 10 givens, by confidence", "solved, %", solvers,
                  each("solving", boards, solvers))


def write():
    """Stories: templates, then free samples."""
    writers = models("stories")
    train([JUDGE])
    cases()
    filled, title = each("filling in", templates, writers), "Templates of stories, by confidence"
    show_part(0, "few_steps_templates", title, "all blanks right, %", writers, filled)
    show_part(1, "few_steps_blanks", title, "blanks right, %", writers, filled)

    written, title = each("writing", free, writers), "Stories from nothing, ancestral sampling"
    held_out = open(STORIES.held_out.replace(".bin", ".txt")).read().split("<|endoftext|>")
    of_real = mean(map(entropy, filter(str.strip, held_out)))
    show_part(0, "few_steps_free", title, "NELBO under a judge, nats per token", writers, written,
              ("held-out stories", nelbo(JUDGE)[1]))
    show_part(1, "few_steps_entropy", title, "entropy of a text's words, nats", writers, written,
              ("held-out stories", of_real))


if __name__ == "__main__":
    for task in chosen("sudoku", "stories"):
        {"sudoku": solve, "stories": write}[task]()
