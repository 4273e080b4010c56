"""
13. When to stop: what shows best that a sequence needs no more loops?

LoopMDM of chains.py fills in problems of mixed difficulty in one denoising step, each blank with
its most probable token. A problem counts if all of it is right. A sequence stops when

    change      a loop changes its state by less than tau: --adaptive of the program
    prediction  its predictions are those of the loop before, k loops in a row
    entropy     the mean entropy of its predictions at the blanks is below tau

rule30: the last 1 to 10 rows are blank, each number as often. sudoku9: puzzles with 46, 36 and 30
givens. Each criterion is compared with a fixed number of loops by the passes through layers that
it takes: the last two criteria need the layers after the loop in each loop, not only in the last.
PyTorch computes all of it here, from the same states: the program has only the first criterion.
"""
import os
import sys

import numpy as np
import torch

from chains import CELLS, ROWS, models, puzzles
from common import (JOBS, SEEDS, TASKS, chosen, finish, line, mean, new_figure, of_seeds, pick,
                    print_table, save_csv, spread)

sys.path.insert(0, os.path.join(os.path.dirname(__file__), "..", ".."))
import train_gpt2style as reference  # noqa: E402

MOST = pick(3, 16)  # loops
TESTS = pick(9, 600)
TAUS = {"change": (0.5, 0.4, 0.3, 0.25, 0.2, 0.15, 0.1), "prediction": (1, 2, 3),
        "entropy": (0.1, 0.05, 0.02, 0.01, 0.005, 0.002)}
WAYS = {"fixed": "fixed number of loops", "change": "change of the state below tau",
        "prediction": "same predictions k times", "entropy": "entropy below tau"}
BATCH = 100


def sequences(path, T):
    """Returns a shard's sequences (n,T)."""
    return np.fromfile(path, np.uint16)[512:].astype(np.int64).reshape(-1, T)


def passes(c, way, loops):
    """Returns how often a layer runs in a forward of so many loops that ends by a criterion."""
    tail = c.layers - c.loop_end
    looked = loops if way in ("prediction", "entropy") else 1  # how often the tail runs
    return c.loop_start + loops * (c.loop_end - c.loop_start) + looked * tail


def problems(task, mask):
    """Returns (x (n,T) with MASK where tokens are asked for, the solutions (n,T))."""
    T = TASKS[task].options["seq-len"]
    if task == "rule30":
        wanted = sequences(TASKS[task].held_out, T)[:TESTS]
        blank_rows = np.arange(len(wanted)) % ROWS + 1
        x = np.where(np.arange(T) >= T - CELLS * blank_rows[:, None], mask, wanted)
        return x, wanted
    pairs = [sequences(puzzles()[f"{givens} givens"], T)[:2 * (TESTS // 3)]
             for givens in (46, 36, 30)]
    given, wanted = (np.concatenate([p[i::2] for p in pairs]) for i in (0, 1))
    return np.where(given == 0, mask, given), wanted


@torch.no_grad()
def look(model, x, wanted):
    """
    Returns what is known after each loop, as arrays (MOST, n): whether all is right, the change of
    the state, whether the predictions stayed the same, and the entropy.
    """
    c, layers, blank = model.config, model.layers(), x == model.config.vocab_size
    h = model.wte[x] + model.wpe[:x.shape[1]]
    for w in layers[:c.loop_start]:
        h = model.block(h, w)
    found, last = [], None
    for _ in range(MOST):
        before = h
        for w in layers[c.loop_start:c.loop_end]:
            h = model.block(h, w)
        change = ((h - before).norm(dim=-1) / h.norm(dim=-1)).mean(dim=1)
        tail = h
        for w in layers[c.loop_end:]:
            tail = model.block(tail, w)
        log_p = model.logits(tail).log_softmax(dim=-1)
        token = torch.where(blank, log_p.argmax(dim=-1), wanted)
        entropy = -(log_p.exp() * log_p).sum(dim=-1)
        entropy = (entropy * blank).sum(dim=1) / blank.sum(dim=1)
        same = (token == last).all(dim=1) if last is not None else torch.zeros(len(x))
        found.append([(token == wanted).all(dim=1), change, same, entropy])
        last = token
    return [np.array([part[i].numpy() for part in found]) for i in range(4)]


def stops(way, tau, change, same, entropy):
    """Returns after which loop each sequence stops (n), from 1."""
    if way == "change":
        ends = change < tau
    elif way == "entropy":
        ends = entropy < tau
    else:  # same[0] is false: there is no loop before the first
        ends = np.array([same[max(0, s - tau + 1):s + 1].all(axis=0) for s in range(MOST)])
    ends[-1] = True
    return ends.argmax(axis=0) + 1


def measure(r):
    """Returns {(way, tau or S): (mean loops, mean passes, % right)}."""
    model, _ = reference.model_load(r.folder)
    x, wanted = map(torch.from_numpy, problems(r.task, model.config.vocab_size))
    parts = [look(model, x[i:i + BATCH], wanted[i:i + BATCH]) for i in range(0, len(x), BATCH)]
    right, change, same, entropy = (np.concatenate(part, axis=1) for part in zip(*parts))
    found = {}
    for way, taus in {"fixed": range(1, MOST + 1), **TAUS}.items():
        for tau in taus:
            stop = (np.full(len(x), tau) if way == "fixed"
                    else stops(way, tau, change, same, entropy))
            share = right[stop - 1, range(len(stop))].mean()
            loops = float(stop.mean())
            found[way, tau] = loops, passes(model.config, way, loops), 100 * float(share)
    return found


def experiment(task):
    torch.set_num_threads(JOBS)
    runs, _ = models(task, ("LoopMDM",))
    results = {seed: measure(runs["LoopMDM", seed]) for seed in SEEDS}
    save_csv(f"stopping_{task}",
             ["criterion", "tau_or_loops", "seed", "mean_loops", "mean_passes", "right_%"],
             [[way, tau, seed, *values] for seed, found in results.items()
              for (way, tau), values in found.items()])
    table = []
    for way, tau in results[1]:
        columns = zip(*(results[seed][way, tau] for seed in SEEDS))
        table.append([WAYS[way], f"{tau:g}"] + [spread(column, form) for column, form
                                                in zip(columns, ("{:.2f}", "{:.2f}", "{:.1f}"))])
    print_table(f"{task}: right in one denoising step, %, mixed difficulty; {of_seeds()}",
                ["stops by", "tau, k or S", "loops", "passes through layers", "right, %"], table)

    _, (ax,) = new_figure()
    for i, (way, name) in enumerate(WAYS.items()):
        points = sorted((mean(results[seed][way, tau][1] for seed in SEEDS),
                         [results[seed][way, tau][2] for seed in SEEDS])
                        for kind, tau in results[1] if kind == way)
        line(ax, i, name, dict(points), "-" if way == "fixed" else ":")
    finish(ax, f"stopping_{task}", xlabel="passes through layers, mean",
           ylabel="problems right in one denoising step, %",
           title=f"When to stop looping, {task}, problems of mixed difficulty")


if __name__ == "__main__":
    for task in chosen("rule30", "sudoku9"):
        experiment(task)
