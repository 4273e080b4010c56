"""
9. How loops are drawn in training: S uniform, or with probability ~ 1/FLOPs(S).

LoopMDM with S up to 4. Both ways have the same training FLOPs and the learning rate that flops.py
chose with S uniform.

dev/results has lines with time "bell" too: intermediate noise levels drawn more often. Commit
8d694dc repeats them; now t is always uniform.
"""
from common import (COLORS, LOOPS, SEEDS, TASKS, TERA, chosen, each, finish, mean, nelbo,
                    new_figure, of_seeds, print_table, run, save_csv, spread, train)
from flops import LARGEST, tune

WAYS = {"uniform": "S uniform", "flops": "S ~ 1/FLOPs"}


def draw(task, values):
    """Draws the NELBO with S = 1 and 4: a point for each seed, and a line at the mean."""
    _, (ax,) = new_figure()
    for i, way in enumerate(WAYS):
        for k, S in enumerate((1, 4)):
            x = i + 0.25 * (k - 0.5)
            ax.plot([x] * len(SEEDS), values[way][S], "os"[k], color=COLORS[k],
                    label=f"S={S}" if i == 0 else None)
            ax.plot([x - 0.1, x + 0.1], [mean(values[way][S])] * 2, color=COLORS[k], linewidth=2)
    ax.set_xticks(range(len(WAYS)), list(WAYS.values()))
    ax.grid(axis="x", visible=False)
    finish(ax, f"distributions_{task}", ylabel=f"NELBO, {TASKS[task].unit}",
           title=f"Loops in training, {task}: lines are means")


def experiment(task):
    rate = tune(task)[1]["LoopMDM"]
    runs = {(way, seed): run(task, LARGEST[task], seed, lr=rate,
                             **({} if way == "uniform" else {"loop_dist": way}))
            for way in WAYS for seed in SEEDS}
    train(runs.values())
    results = each("evaluating", nelbo, runs)
    save_csv(f"distributions_{task}",
             ["loop_dist", "time", "seed", "flop", "steps", "loops", "nelbo"],
             [[way, "uniform", seed, runs[way, seed].flops(), runs[way, seed].steps, S, loss]
              for (way, seed), losses in results.items() for S, loss in losses.items()],
             keep=("time", "bell"))
    values = {way: {S: [results[way, seed][S] for seed in SEEDS] for S in LOOPS} for way in WAYS}
    print_table(f"{task}: NELBO, {TASKS[task].unit}, {LARGEST[task] / TERA:g} TFLOP each, "
                f"{of_seeds()}", ["drawn in training"] + [f"S={S}" for S in LOOPS],
                [[name] + [spread(values[way][S]) for S in LOOPS] for way, name in WAYS.items()])
    draw(task, values)


if __name__ == "__main__":
    for task in chosen("sudoku", "tinystories"):
        experiment(task)
