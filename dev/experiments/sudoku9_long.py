"""
12. Chains of conclusions, four times the FLOPs: 9x9 Sudoku with the recipe of dev/models.

A model takes an hour and a half of two cores. So `./loopmdm train` trains one at a time, as
dev/experiments/README.md says, into a folder of build/sudoku9_long that has its name and its seed:
MDM_1, deeper_MDM_1, LoopMDM_2. LoopMDM_1 is the model in dev/models. This program solves puzzles
with each model that is there, greedily, by confidence, and writes its lines into
dev/results/sudoku9_long.csv. The lines of other models stay there. The table and the figure show
all lines.
"""
import csv
import glob
import os
import shutil
from types import SimpleNamespace

from chains import puzzles
from common import (RESULTS, SUFFIX, WORK, ask, each, line, log_axis, nelbo, new_figure, numbers,
                    pick, print_table, save_csv, save_figure, spread, table_of)

FOLDER = os.path.join(pick(WORK, "build"), "sudoku9_long")
COLUMNS = ["model", "seed", "what", "loops", "steps", "gflop", "value"]
LOOPS = (1, 2, 4, 8, 12)
STEPS = (1, 2, 5, 10, 20)
ONE_CELL_AT_A_TIME = 81  # for models without loops: as many FLOPs as loops take
SHOWN = [("36 givens", 1), ("36 givens", 2), ("30 givens", 2), ("30 givens", 5), ("30 givens", 20),
         ("26 givens", 20), ("magictour_top1465", 20), ("forum_hardest_1905_11plus", 20)]


def measure(folder):
    """Returns the lines of the CSV file for a model."""
    name, seed = os.path.basename(folder).replace("_", " ").rsplit(" ", 1)
    looped = name.startswith("LoopMDM")
    loops = LOOPS if looped else LOOPS[:1]
    steps = STEPS if looped else (*STEPS, ONE_CELL_AT_A_TIME)
    model = SimpleNamespace(task="sudoku9", folder=folder, options={})
    losses = nelbo(model, loops, sequences=4096)
    lines = [[name, seed, "NELBO", S, "", "", loss] for S, loss in losses.items()]
    for kind, path in puzzles().items():
        tests = pick(2, 100 if "givens" in kind else 250)  # few of the hard ones are solved
        output = ask(model, "eval", "--sudoku", "--data", path, "--rows", tests, "--batch", 50,
                     "--loops", numbers(loops), "--steps", numbers(steps))
        lines += [[name, seed, kind, int(S), int(k), gflop, right]
                  for S, k, _, right, gflop in table_of(output)]
    return lines


def lines_of_others(names):
    """Returns the lines of the CSV file about models that are not in names."""
    path = os.path.join(RESULTS, f"sudoku9_long{SUFFIX}.csv")
    if not os.path.exists(path):
        return []
    with open(path, newline="") as file:
        lines = [[row[column] for column in COLUMNS] for row in csv.DictReader(file)]
    return [[name, seed, what, int(S), steps and int(steps), gflop and float(gflop), float(value)]
            for name, seed, what, S, steps, gflop, value in lines if (name, seed) not in names]


def by_model(lines):
    """Returns {(model, S): {(what, steps): [the value of each seed]}}."""
    found = {}
    for name, _, what, S, steps, _, value in lines:
        found.setdefault((name, S), {}).setdefault((what, steps), []).append(value)
    return found


def draw(ax, values, kind, title):
    """Draws the puzzles of a kind that are solved, by denoising steps."""
    for i, (name, S) in enumerate([("MDM", 1), ("deeper MDM", 1), ("LoopMDM", 8)]):
        found = values.get((name, S), {})
        points = {steps: found[kind, steps] for steps in STEPS if (kind, steps) in found}
        if points:
            line(ax, i, f"{name}, S={S}" if S > 1 else name, points)
    log_axis(ax, STEPS)
    ax.set(xlabel="denoising steps", title=title)


if __name__ == "__main__":
    os.makedirs(WORK, exist_ok=True)
    puzzles()  # once, before several threads ask for them
    shutil.copytree("dev/models/sudoku", os.path.join(FOLDER, "LoopMDM_1"), dirs_exist_ok=True)
    folders = {path: path for path in glob.glob(os.path.join(FOLDER, "*_[0-9]"))}
    measured = [row for rows in each("solving", measure, folders).values() for row in rows]
    names = {(name, seed) for name, seed, *_ in measured}
    lines = sorted(measured + lines_of_others(names), key=lambda row: row[:2])
    save_csv("sudoku9_long", COLUMNS, lines)

    values = by_model(lines)
    costs = {(name, S): f"{gflop:.3f}" for name, _, _, S, steps, gflop, _ in lines if steps == 1}
    print_table("9x9 Sudoku: NELBO in nats per cell, and solved, %, in so many denoising steps; "
                "mean (lowest to highest) of the seeds",
                ["model", "S", "GFLOP per step", "seeds", "NELBO",
                 *(f"{kind}, {steps}" for kind, steps in SHOWN)],
                [[*key, costs.get(key, ""), len(found["NELBO", ""]), spread(found["NELBO", ""])]
                 + [spread(found[at], "{:.1f}") if at in found else "" for at in SHOWN]
                 for key, found in values.items()])

    figure, axes = new_figure(2)
    draw(axes[0], values, "30 givens", "30 digits given")
    draw(axes[1], values, "magictour_top1465", "puzzles that are hard for people")
    axes[0].set(ylabel="solved, %", ylim=(-3, 103))
    axes[0].legend(loc="lower right")
    figure.suptitle("9x9 Sudoku, equal training FLOPs")
    save_figure(figure, "sudoku9_long")
