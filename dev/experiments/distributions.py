"""
9. How loops and noise levels are drawn in training: S uniform or with probability ~ 1/FLOPs(S), t uniform or bell-shaped.

LoopMDM with S up to 4, all four ways with the same training FLOPs and the learning rate that flops.py chose with both uniform.
"""
from common import COLORS, LOOPS, SEEDS, TASKS, TERA, chosen, each, finish, mean, nelbo, one_part, print_table, run, save_csv, spread, train
from flops import LARGEST, tune

WAYS = {("uniform", "uniform"): "S uniform, t uniform", ("flops", "uniform"): "S ~ 1/FLOPs, t uniform", ("uniform", "bell"): "S uniform, t bell", ("flops", "bell"): "S ~ 1/FLOPs, t bell"}


def experiment(task):
    rate = tune(task)[1]["LoopMDM"]
    changes = {way: {name: value for name, value in zip(("loop_dist", "time"), way) if value != "uniform"} for way in WAYS}
    runs = {(way, seed): run(task, LARGEST[task], seed, lr=rate, **changes[way]) for way in WAYS for seed in SEEDS}
    train(runs.values())
    results = each("evaluating", nelbo, runs)
    save_csv(f"distributions_{task}", ["loop_dist", "time", "seed", "flop", "steps", "loops", "nelbo"],
             [[*way, seed, runs[way, seed].flops(), runs[way, seed].steps, S, loss] for (way, seed), losses in results.items() for S, loss in losses.items()])
    values = {way: {S: [results[way, seed][S] for seed in SEEDS] for S in LOOPS} for way in WAYS}
    print_table(f"{task}: NELBO, {TASKS[task].unit}, {LARGEST[task] / TERA:g} TFLOP each, mean (lowest to highest) of {len(SEEDS)} seeds", ["drawn in training"] + [f"S={S}" for S in LOOPS],
                [[label] + [spread(values[way][S]) for S in LOOPS] for way, label in WAYS.items()])

    ax = one_part()
    for i, (way, label) in enumerate(WAYS.items()):
        for k, S in enumerate((1, 4)):
            x = [i + 0.25 * (k - 0.5)] * len(SEEDS)
            ax.plot(x, values[way][S], "os"[k], color=COLORS[k], label=f"S={S}" if i == 0 else None)
            ax.plot([x[0] - 0.1, x[0] + 0.1], [mean(values[way][S])] * 2, color=COLORS[k], linewidth=2)
    ax.set_xticks(range(len(WAYS)), [label.replace(", ", "\n") for label in WAYS.values()])
    ax.grid(axis="x", visible=False)
    finish(ax, f"distributions_{task}", ylabel=f"NELBO, {TASKS[task].unit}", title=f"Loops and noise levels in training, {task}: lines are means")


if __name__ == "__main__":
    for task in chosen("sudoku", "tinystories"):
        experiment(task)
