"""
6. Adaptive loops: does a row that stops when its state settles do as well with fewer loops?

LoopMDM trained with up to 8 loops (loops.py), used with up to 12. A row stops when a loop changes its state by less than tau; or, by the second criterion,
when two loops move it by nearly the same step. Beside it, fixed numbers of loops.
"""
from common import COLORS, MARKERS, QUICK, SEEDS, TASKS, ask, chosen, each, nelbo, numbers, plt, print_table, rows_of, save_csv, save_figure, solved, spread
from loops import models

TAUS = {"change": (0.5, 0.3, 0.25, 0.2, 0.15, 0.12, 0.1, 0.08), "second": (0.3, 0.2, 0.1, 0.07, 0.05, 0.03, 0.02, 0.01)}
FIXED = (1, 2, 3, 4, 5, 6, 8, 10, 12)
TRAINED, MOST = 8, 12
BOARDS = "boards solved in 2 steps, %"
WAYS = {"fixed": "fixed number of loops", "change": "adaptive: change below tau", "second": "adaptive: second difference below tau"}


def measure(r):
    """{(what, way): {tau or S: (mean loops, value)}}."""
    found = {}
    for way, taus in TAUS.items():
        adaptive = ["--adaptive", numbers(taus), "--max-loops", MOST, "--criterion", way]
        found["NELBO", way] = {row[0]: (row[1], row[3]) for row in rows_of(ask(r, "eval", "--data", TASKS[r.task].held_out, "--rows", 32 if QUICK else 4096, *adaptive))}
        if r.task == "sudoku":
            found[BOARDS, way] = {row[0]: (row[1], row[4]) for row in solved(r, "--steps", 2, *adaptive)}
    found["NELBO", "fixed"] = {S: (S, loss) for S, loss in nelbo(r, FIXED, rows=4096).items()}
    if r.task == "sudoku":
        found[BOARDS, "fixed"] = {int(row[0]): (row[0], row[3]) for row in solved(r, "--steps", 2, "--loops", numbers(FIXED))}
    return found


def experiment(task):
    runs = {seed: r for (_, seed), r in models(task, (TRAINED,)).items()}
    results = each("evaluating", measure, runs)
    save_csv(f"adaptive_{task}", ["measure", "criterion", "tau_or_loops", "seed", "mean_loops", "value"],
             [[what, way, key, seed, used, value] for seed, found in results.items() for (what, way), points in found.items() for key, (used, value) in points.items()])
    for (what, way), points in results[1].items():
        print_table(f"{task}: {what}, {WAYS[way]}, mean (lowest to highest) of {len(SEEDS)} seeds", ["S" if way == "fixed" else "tau", "loops used", what],
                    [[f"{key:g}", spread((results[seed][what, way][key][0] for seed in SEEDS), "{:.2f}"), spread((results[seed][what, way][key][1] for seed in SEEDS), "{:.1f}" if "%" in what else "{:.4f}")] for key in points])

    measures = sorted({what for what, _ in results[1]})
    figure, axes = plt.subplots(1, len(measures), figsize=(7 if len(measures) == 1 else 9, 4), squeeze=False)
    for ax, what in zip(axes[0], measures):
        for i, (way, name) in enumerate(WAYS.items()):
            for seed in SEEDS:
                points = sorted(results[seed][what, way].values())
                ax.plot([x for x, _ in points], [y for _, y in points], color=COLORS[i], marker=MARKERS[i], linestyle="-" if way == "fixed" else "none", label=name if seed == 1 else None, alpha=0.8)
        ax.set(xlabel="loops used, mean", ylabel=what + (f", {TASKS[task].unit}" if what == "NELBO" else ""))
    axes[0][0].legend(fontsize=9)
    figure.suptitle(f"Adaptive loops, {task} (trained with 1 to {TRAINED}; each seed)")
    save_figure(figure, f"adaptive_{task}")


if __name__ == "__main__":
    for task in chosen("sudoku", "tinystories"):
        experiment(task)
