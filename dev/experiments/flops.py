"""
1. Loss against training FLOPs: does LoopMDM learn more from the same computation?

Three models: an MDM, LoopMDM with the same parameters (loop 1:3, S drawn from 1 to 4), and a deeper MDM whose step costs as much as LoopMDM's mean step.
Each is trained with three budgets of FLOPs, each with a learning rate schedule of its own. From one to the next it is as much more as a
step of LoopMDM costs more than one of the MDM, so that LoopMDM takes as many steps with one budget as the MDM with the budget below. The highest learning
rate is chosen for each model from the same four, with the smallest budget and the first seed, by other masks than those of the results.
LoopMDM's NELBO is that with as many loops as in training at most, S=4.
"""
import math

from common import LINES, MODELS, QUICK, SEEDS, TASKS, TERA, chosen, each, finish, label, line, log_axis, mean, mean_flops, nelbo, one_part, print_table, run, save_csv, spread, train

RATES = (2e-3,) if QUICK else (1e-3, 2e-3, 4e-3, 8e-3)
LARGEST = {"sudoku": 12 * TERA, "stories": 36 * TERA, "tinystories": 34.68 * TERA}  # FLOP; with less than a third of the last, a model of real text has hardly begun to use its context


def budgets_of(task):
    """Three budgets in FLOP, the smallest first."""
    step = round(mean_flops(run(task, 0)) / mean_flops(run(task, 0, **MODELS["MDM"])), 2)
    return [LARGEST[task] / step ** 2, LARGEST[task] / step, LARGEST[task]]


def tune(task):
    """({(model, learning rate): NELBO}, {model: the best rate})."""
    runs = {(name, rate): run(task, budgets_of(task)[0], lr=rate, **changes) for name, changes in MODELS.items() for rate in RATES}
    train(runs.values())
    tuned = each("evaluating", lambda r: nelbo(r, seed=2)[r.max_loops], runs)
    return tuned, {name: min(RATES, key=lambda rate: tuned[name, rate]) for name in MODELS}


def models(task):
    """{(model, seed): run} of the largest budget, trained: what other experiments look at."""
    _, best = tune(task)
    runs = {(name, seed): run(task, budgets_of(task)[-1], seed, lr=best[name], **changes) for name, changes in MODELS.items() for seed in SEEDS}
    train(runs.values())
    return runs


def share_to_reach(budgets, losses, wanted):
    """The share of the largest budget with which these NELBOs, one for each budget, get to what is wanted; by interpolation in log(FLOPs)."""
    points = [(math.log(b / budgets[-1]), loss) for b, loss in zip(budgets, losses)]
    if points[0][1] <= wanted:
        return f"less than {math.exp(points[0][0]):.2f}"
    for (x0, y0), (x1, y1) in zip(points, points[1:]):
        if y1 <= wanted:
            return f"{math.exp(x0 + (x1 - x0) * (y0 - wanted) / (y0 - y1)):.2f}"
    return "more than 1.00"


def experiment(task):
    budgets, (tuned, best) = budgets_of(task), tune(task)
    runs = {(name, budget, seed): run(task, budget, seed, lr=best[name], **changes) for name, changes in MODELS.items() for budget in budgets for seed in SEEDS}
    train(runs.values())
    results = each("evaluating", nelbo, runs)
    rows = [["learning rate", name, rate, budgets[0], "", 1, "", "", loss] for (name, rate), loss in tuned.items()]
    rows += [["budget", key[0], best[key[0]], key[1], runs[key].flops(), key[2], runs[key].steps, S, loss] for key, losses in results.items() for S, loss in losses.items()]
    save_csv(f"flops_{task}", ["part", "model", "highest_lr", "budget_flop", "flop", "seed", "steps", "loops", "nelbo"], rows)

    print_table(f"{task}: NELBO by highest learning rate, {budgets[0] / TERA:.3g} TFLOP, seed 1", ["model"] + [f"{rate:g}" for rate in RATES],
                [[name] + [f"{tuned[name, rate]:.4f}" for rate in RATES] for name in MODELS])
    values = {(name, S): {b: [results[name, b, seed][S] for seed in SEEDS] for b in budgets} for name, S in LINES}
    print_table(f"{task}: NELBO, {TASKS[task].unit}, by training FLOPs, mean (lowest to highest) of {len(SEEDS)} seeds", ["model", "highest learning rate"] + [f"{b / TERA:.3g} TFLOP" for b in budgets],
                [[label(name, S), f"{best[name]:g}"] + [spread(values[name, S][b]) for b in budgets] for name, S in LINES])
    floor = TASKS[task].entropy
    if floor:
        print_table(f"{task}: what of it is above the data's entropy, {floor:.4f}; mean of {len(SEEDS)} seeds", ["model"] + [f"{b / TERA:.3g} TFLOP" for b in budgets],
                    [[label(name, S)] + [f"{mean(values[name, S][b]) - floor:.4f}" for b in budgets] for name, S in LINES])
    plain = values["MDM", 1]
    for name, S in (("LoopMDM", 4), ("deeper MDM", 1)):
        gains = [spread(theirs - ours for theirs, ours in zip(plain[b], values[name, S][c])) for b, c in ((budgets[-1], budgets[-1]), (budgets[1], budgets[2]))]
        shares = [share_to_reach(budgets, [values[name, S][b][i] for b in budgets], mean(plain[budgets[-1]])) for i in range(len(SEEDS))]
        print(f"{task}, {label(name, S)}: NELBO lower than the MDM's by {gains[0]} at equal FLOPs, the largest budget; by {gains[1]} at equal steps, {budgets[2] / TERA:g} TFLOP of its own; "
              f"reaches the mean of the MDM's last with {', '.join(shares)} of its FLOPs")

    ax = one_part()
    for i, (name, S) in enumerate(LINES):
        if S in (1, 4):
            line(ax, i, label(name, S), {b / TERA: values[name, S][b] for b in budgets})
    if floor:
        ax.axhline(floor, color="black", linestyle=":", linewidth=1, label="entropy of the data")
    log_axis(ax, [b / TERA for b in budgets], "{:.1f}")
    low, high = ax.get_ylim()
    if high > 2 * low:
        log_axis(ax, [tick for tick in (0.5, 0.6, 0.7, 0.8, 1, 1.2, 1.5, 2, 3, 4, 6) if low < tick < high], which="y")
    finish(ax, f"flops_{task}", xlabel="training, TFLOP", ylabel=f"NELBO, {TASKS[task].unit}", title=f"Loss against training FLOPs, {task}")


if __name__ == "__main__":
    for task in chosen("sudoku", "stories", "tinystories"):
        experiment(task)
