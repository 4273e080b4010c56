"""
3. How many loops: S_max in training, and S in use, also beyond S_max.

LoopMDM with S drawn from 1 to S_max = 2, 4, 8, 12. All have the same training FLOPs and the
learning rate that flops.py chose for S_max = 4. Each is evaluated with up to twice as many loops as
in training.
"""
from common import (COLORS, SEEDS, TASKS, TERA, chosen, each, finish, line, log_axis, mean, nelbo,
                    new_figure, of_seeds, print_table, run, save_csv, spread, train)
from flops import LARGEST, tune

MOST = (2, 4, 8, 12)
USED = (1, 2, 3, 4, 6, 8, 12, 16, 24)


def models(task, choices=MOST):
    """Returns {(S_max, seed): run} for each of the choices of S_max, trained."""
    rate = tune(task)[1]["LoopMDM"]
    runs = {(most, seed): run(task, LARGEST[task], seed, lr=rate, max_loops=most)
            for most in choices for seed in SEEDS}
    train(runs.values())
    return runs


def experiment(task):
    runs = models(task)
    results = each("evaluating",
                   lambda r: nelbo(r, [S for S in USED if S <= 2 * r.max_loops]), runs)
    save_csv(f"loops_{task}", ["max_loops", "seed", "flop", "steps", "loops", "nelbo"],
             [[most, seed, runs[most, seed].flops(), runs[most, seed].steps, S, loss]
              for (most, seed), losses in results.items() for S, loss in losses.items()])
    values = {most: {S: [results[most, seed][S] for seed in SEEDS] for S in results[most, 1]}
              for most in MOST}
    print_table(f"{task}: NELBO, {TASKS[task].unit}, by loops; "
                f"{LARGEST[task] / TERA:g} TFLOP each, {of_seeds()}",
                ["S"] + [f"S_max={most}" for most in MOST],
                [[S] + [spread(values[most][S]) if S in values[most] else "" for most in MOST]
                 for S in USED])

    _, (ax,) = new_figure()
    for i, most in enumerate(MOST):
        line(ax, i, f"trained with 1 to {most}", values[most])
        ax.plot(most, mean(values[most][most]), "o", color=COLORS[i], markersize=11,
                fillstyle="none")
    log_axis(ax, USED)
    finish(ax, f"loops_{task}",
           xlabel="loops S when used (circles: as many as in training at most)",
           ylabel=f"NELBO, {TASKS[task].unit}", title=f"Loops in training and in use, {task}")


if __name__ == "__main__":
    for task in chosen("sudoku", "tinystories"):
        experiment(task)
