"""
1. Loss against training FLOPs: does LoopMDM learn more from the same computation?

Three models: an MDM; LoopMDM with the same parameters (loop 1:3, S drawn from 1 to 4); and a deeper
MDM whose training step costs as much as the mean step of LoopMDM. Each is trained with three
budgets of FLOPs, and each budget has its own schedule of the learning rate. The ratio of two
neighbouring budgets is the ratio of the costs of a step of LoopMDM and of the MDM. So LoopMDM takes
as many steps with one budget as the MDM with the budget below.

The highest learning rate of each model is the best of four: with the smallest budget, the first
seed, and other masks than those of the results. The NELBO of LoopMDM is the one with S=4, the most
loops in training.
"""
import math

from common import (LINES, MODELS, SEEDS, TASKS, TERA, best_rates, chosen, each, finish, label,
                    line, log_axis, mean, mean_flops, nelbo, new_figure, of_seeds, pick,
                    print_table, run, save_csv, spread, train)

RATES = pick((2e-3,), (1e-3, 2e-3, 4e-3, 8e-3))

# The largest budget in FLOP. With less than a third of it, a model of real text has hardly started
# to use its context.
LARGEST = {"sudoku": 12 * TERA, "stories": 36 * TERA, "tinystories": 34.68 * TERA}


def budgets_of(task):
    """Returns three budgets in FLOP, the smallest first."""
    step = round(mean_flops(run(task, 0)) / mean_flops(run(task, 0, **MODELS["MDM"])), 2)
    return [LARGEST[task] / step ** 2, LARGEST[task] / step, LARGEST[task]]


def tune(task):
    """Returns ({(model, learning rate): NELBO}, {model: the best rate})."""
    return best_rates(task, budgets_of(task)[0], MODELS, RATES)


def models(task):
    """Returns {(model, seed): run} of the largest budget, trained, for other experiments."""
    _, best = tune(task)
    runs = {(name, seed): run(task, budgets_of(task)[-1], seed, lr=best[name], **changes)
            for name, changes in MODELS.items() for seed in SEEDS}
    train(runs.values())
    return runs


def share_to_reach(budgets, losses, wanted):
    """
    Returns the share of the largest budget with which a model reaches the loss `wanted`. losses:
    one for each budget; between them it interpolates in log(FLOPs).
    """
    points = [(math.log(b / budgets[-1]), loss) for b, loss in zip(budgets, losses)]
    if points[0][1] <= wanted:
        return f"less than {math.exp(points[0][0]):.2f}"
    for (x0, y0), (x1, y1) in zip(points, points[1:]):
        if y1 <= wanted:
            return f"{math.exp(x0 + (x1 - x0) * (y0 - wanted) / (y0 - y1)):.2f}"
    return "more than 1.00"


def print_gains(task, budgets, values):
    """Prints how far LoopMDM and the deeper MDM are ahead of the MDM."""
    plain = values["MDM", 1]
    _, middle, largest = budgets

    def gain(theirs, ours):
        return spread(a - b for a, b in zip(theirs, ours))

    for name, S in (("LoopMDM", 4), ("deeper MDM", 1)):
        own = values[name, S]
        shares = [share_to_reach(budgets, [own[b][i] for b in budgets], mean(plain[largest]))
                  for i in range(len(SEEDS))]
        print(f"{task}, {label(name, S)}: NELBO lower than the MDM's "
              f"by {gain(plain[largest], own[largest])} at equal FLOPs, the largest budget; "
              f"by {gain(plain[middle], own[largest])} at equal steps, "
              f"{largest / TERA:g} TFLOP of its own; "
              f"reaches the mean of the MDM's last with {', '.join(shares)} of its FLOPs")


def draw(task, budgets, values):
    """Draws the NELBO against the budget; LoopMDM with S = 1 and 4."""
    _, (ax,) = new_figure()
    for i, (name, S) in enumerate(LINES):
        if S in (1, 4):
            line(ax, i, label(name, S), {b / TERA: values[name, S][b] for b in budgets})
    floor = TASKS[task].entropy
    if floor:
        ax.axhline(floor, color="black", linestyle=":", linewidth=1, label="entropy of the data")
    log_axis(ax, [b / TERA for b in budgets], "{:.1f}")
    low, high = ax.get_ylim()
    if high > 2 * low:
        ticks = (0.5, 0.6, 0.7, 0.8, 1, 1.2, 1.5, 2, 3, 4, 6)
        log_axis(ax, [tick for tick in ticks if low < tick < high], which="y")
    finish(ax, f"flops_{task}", xlabel="training, TFLOP", ylabel=f"NELBO, {TASKS[task].unit}",
           title=f"Loss against training FLOPs, {task}")


def experiment(task):
    budgets, (tuned, best) = budgets_of(task), tune(task)
    runs = {(name, budget, seed): run(task, budget, seed, lr=best[name], **changes)
            for name, changes in MODELS.items() for budget in budgets for seed in SEEDS}
    train(runs.values())
    results = each("evaluating", nelbo, runs)

    lines = [["learning rate", name, rate, budgets[0], "", 1, "", "", loss]
             for (name, rate), loss in tuned.items()]
    lines += [["budget", key[0], best[key[0]], key[1], runs[key].flops(), key[2], runs[key].steps,
               S, loss] for key, losses in results.items() for S, loss in losses.items()]
    save_csv(f"flops_{task}", ["part", "model", "highest_lr", "budget_flop", "flop", "seed",
                               "steps", "loops", "nelbo"], lines)

    values = {(name, S): {b: [results[name, b, seed][S] for seed in SEEDS] for b in budgets}
              for name, S in LINES}
    headings = [f"{b / TERA:.3g} TFLOP" for b in budgets]
    print_table(f"{task}: NELBO, {TASKS[task].unit}, by training FLOPs, {of_seeds()}",
                ["model", "highest learning rate", *headings],
                [[label(name, S), f"{best[name]:g}"] + [spread(values[name, S][b]) for b in budgets]
                 for name, S in LINES])
    floor = TASKS[task].entropy
    if floor:
        print_table(f"{task}: NELBO minus the entropy of the data, {floor:.4f}; "
                    f"mean of {len(SEEDS)} seeds", ["model", *headings],
                    [[label(name, S)] + [f"{mean(values[name, S][b]) - floor:.4f}" for b in budgets]
                     for name, S in LINES])
    print_gains(task, budgets, values)
    draw(task, budgets, values)


if __name__ == "__main__":
    for task in chosen("sudoku", "stories", "tinystories"):
        experiment(task)
