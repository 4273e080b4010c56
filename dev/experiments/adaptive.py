"""
6. Adaptive loops: a sequence stops when its state has settled. Does it do as well with fewer loops?

LoopMDM trained with up to 8 loops (loops.py), used with up to 12. A sequence stops when a loop
changes its state by less than tau. The experiment compares this with fixed numbers of loops.

dev/results has lines with the criterion "second" too: the second difference of the states. Commit
8d694dc repeats them.
"""
from common import (COLORS, MARKERS, SEEDS, TASKS, ask, chosen, each, nelbo, new_figure, numbers,
                    of_seeds, pick, print_table, save_csv, save_figure, solved, spread, table_of)
from loops import models

TAUS = (0.5, 0.3, 0.25, 0.2, 0.15, 0.12, 0.1, 0.08)
FIXED = (1, 2, 3, 4, 5, 6, 8, 10, 12)
TRAINED, MOST = 8, 12
SEQUENCES = 4096
BOARDS = "boards solved in 2 steps, %"
WAYS = {"fixed": "fixed number of loops", "change": "adaptive: change below tau"}


def measure(r):
    """Returns {(what, way): {tau or S: (mean loops, value)}}."""
    adaptive = ["--adaptive", numbers(TAUS), "--max-loops", MOST]
    table = table_of(ask(r, "eval", "--data", TASKS[r.task].held_out,
                         "--rows", pick(8, SEQUENCES), *adaptive))
    fixed = nelbo(r, FIXED, sequences=SEQUENCES)
    found = {
        ("NELBO", "change"): {tau: (loops, loss) for tau, loops, _, loss, *_ in table},
        ("NELBO", "fixed"): {S: (S, loss) for S, loss in fixed.items()},
    }
    if r.task == "sudoku":
        table = solved(r, "--steps", 2, *adaptive)
        found[BOARDS, "change"] = {tau: (loops, right) for tau, loops, _, _, right, *_ in table}
        table = solved(r, "--steps", 2, "--loops", numbers(FIXED))
        found[BOARDS, "fixed"] = {int(S): (S, right) for S, _, _, right, *_ in table}
    return found


def draw(task, results):
    """Draws each measure against the mean number of loops: fixed ones as lines, taus as points."""
    measures = sorted({what for what, _ in results[1]})
    figure, axes = new_figure(len(measures))
    for ax, what in zip(axes, measures):
        for i, (way, name) in enumerate(WAYS.items()):
            for seed in SEEDS:
                points = sorted(results[seed][what, way].values())
                ax.plot([x for x, _ in points], [y for _, y in points], color=COLORS[i],
                        marker=MARKERS[i], linestyle="-" if way == "fixed" else "none",
                        label=name if seed == 1 else None, alpha=0.8)
        unit = f", {TASKS[task].unit}" if what == "NELBO" else ""
        ax.set(xlabel="loops used, mean", ylabel=what + unit)
    axes[0].legend(fontsize=9)
    figure.suptitle(f"Adaptive loops, {task} (trained with 1 to {TRAINED}; each seed)")
    save_figure(figure, f"adaptive_{task}")


def experiment(task):
    runs = {seed: r for (_, seed), r in models(task, (TRAINED,)).items()}
    results = each("evaluating", measure, runs)
    save_csv(f"adaptive_{task}",
             ["measure", "criterion", "tau_or_loops", "seed", "mean_loops", "value"],
             [[what, way, key, seed, used, value]
              for seed, found in results.items() for (what, way), points in found.items()
              for key, (used, value) in points.items()], keep=("criterion", "second"))
    for (what, way), points in results[1].items():
        form = "{:.1f}" if "%" in what else "{:.4f}"
        table = []
        for key in points:
            used, values = zip(*(results[seed][what, way][key] for seed in SEEDS))
            table.append([f"{key:g}", spread(used, "{:.2f}"), spread(values, form)])
        print_table(f"{task}: {what}, {WAYS[way]}, {of_seeds()}",
                    ["S" if way == "fixed" else "tau", "loops used", what], table)
    draw(task, results)


if __name__ == "__main__":
    for task in chosen("sudoku", "tinystories"):
        experiment(task)
