"""
5. Few denoising steps: does looping help most where many tokens are filled in at once?

The models of flops.py, with equal training FLOPs. Sudoku: share of puzzles with 10 givens that are solved. Stories: share of templates all of whose blanks are
filled in right (dev/data/stories.c --templates: words that the story has told before), and the NELBO of free samples under a judge, a larger MDM trained on the
same stories with the task's learning rate. Templates and puzzles are filled in greedily, by confidence; free samples are drawn by the ancestral sampler at temperature 1, with one
seed. The judge alone does not see whether a text goes anywhere: what repeats itself is cheap. So the entropy of each text's words stands beside it.
"""
import functools
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


@functools.lru_cache(maxsize=None)
def cases():
    """(a file of templates, their answers): the first that are short enough for the model and whose blanks are one token each."""
    tokens = {token.decode("latin-1") for token in tokens_of(TASKS["stories"].tokenizer)}
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
            loopmdm("tokenize", "--tokenizer", TASKS["stories"].tokenizer, "--input", path + ".txt", "--output", path + ".bin")
            found[S, steps] = nelbo(JUDGE, [1], data=path + ".bin", rows=2048)[1], mean(map(entropy, texts))
    return found


def solve():
    solvers = models("sudoku")
    show_by_steps("few_steps_sudoku", "Sudoku 6x6, 10 givens, by confidence", "solved, %", solvers, each("solving", boards, solvers))


def write():
    writers = models("stories")
    train([JUDGE])
    cases()
    show_by_steps("few_steps_templates", "Templates of stories, by confidence", "all blanks right, %", writers, each("filling in", templates, writers))
    written, title = each("writing", free, writers), "Stories from nothing, ancestral sampling"
    real = [story.decode() for story in open(TASKS["stories"].held_out.replace(".bin", ".txt"), "rb").read().split(b"<|endoftext|>")]
    of_real = nelbo(JUDGE)[1], mean(map(entropy, filter(str.strip, real)))
    for k, (name, what) in enumerate((("few_steps_free", "NELBO under a judge, nats per token"), ("few_steps_entropy", "entropy of a text's words, nats"))):
        show_by_steps(name, title, what, writers, {key: {at: found[k] for at, found in values.items()} for key, values in written.items()}, ("held-out stories", of_real[k]))


if __name__ == "__main__":
    for task in chosen("sudoku", "stories"):
        {"sudoku": solve, "stories": write}[task]()
