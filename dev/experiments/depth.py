"""
12. Depth: does a deeper model learn more from the same computation, and from the same steps?

MDMs without loops, of 4 and 12 layers. Each is trained with two budgets of FLOPs, and each budget
has its own schedule of the learning rate. The ratio of the budgets is the ratio of the costs of a
step. So the deep model takes as many steps with the larger budget as the other with the smaller.

The highest learning rate of each model is the best of three: with the smaller budget, the first
seed, and other masks than those of the results.
"""
from common import (SEEDS, TASKS, TERA, chosen, each, finish, line, log_axis, mean_flops, nelbo,
                    new_figure, of_seeds, pick, print_table, run, save_csv, spread, train)

DEPTHS = (4, 12)
RATES = pick((2e-3,), (2e-3, 4e-3, 8e-3))
LARGEST = 36 * TERA  # FLOP


def model(task, layers, budget, seed, rate):
    """Returns the Run of an MDM."""
    return run(task, budget, seed, layers=layers, loop="0:0", lr=rate)


def experiment(task):
    shallow, deep = (mean_flops(model(task, layers, 0, 1, 0)) for layers in DEPTHS)
    budgets = [LARGEST * shallow / deep, LARGEST]
    runs = {(layers, rate): model(task, layers, budgets[0], 1, rate)
            for layers in DEPTHS for rate in RATES}
    train(runs.values())
    tuned = each("evaluating", lambda r: nelbo(r, seed=2)[1], runs)
    best = {layers: min(RATES, key=lambda rate: tuned[layers, rate]) for layers in DEPTHS}

    runs = {(layers, budget, seed): model(task, layers, budget, seed, best[layers])
            for budget in budgets for layers in DEPTHS for seed in SEEDS}
    train(runs.values())
    found = each("evaluating", lambda r: nelbo(r)[1], runs)
    lines = [["learning rate", layers, rate, budgets[0], 1, "", loss]
             for (layers, rate), loss in tuned.items()]
    lines += [["budget", key[0], best[key[0]], key[1], key[2], runs[key].steps, loss]
              for key, loss in found.items()]
    save_csv(f"depth_{task}",
             ["part", "layers", "highest_lr", "budget_flop", "seed", "steps", "nelbo"], lines)

    print_table(f"{task}: NELBO by highest learning rate, {budgets[0] / TERA:.3g} TFLOP, seed 1",
                ["layers"] + [f"{rate:g}" for rate in RATES],
                [[layers] + [f"{tuned[layers, rate]:.4f}" for rate in RATES] for layers in DEPTHS])
    values = {layers: {b: [found[layers, b, seed] for seed in SEEDS] for b in budgets}
              for layers in DEPTHS}
    print_table(f"{task}: NELBO, {TASKS[task].unit}, {of_seeds()}",
                ["layers", "highest learning rate", "TFLOP", "steps", "NELBO"],
                [[layers, f"{best[layers]:g}", f"{b / TERA:.3g}", runs[layers, b, 1].steps,
                  spread(values[layers][b])] for layers in DEPTHS for b in budgets])

    _, (ax,) = new_figure()
    for i, layers in enumerate(DEPTHS):
        line(ax, i, f"{layers} layers", {b / TERA: values[layers][b] for b in budgets})
    log_axis(ax, [b / TERA for b in budgets], "{:.1f}")
    finish(ax, f"depth_{task}", xlabel="training, TFLOP", ylabel=f"NELBO, {TASKS[task].unit}",
           title=f"Loss against training FLOPs by depth, {task}")


if __name__ == "__main__":
    for task in chosen(pick("stories", "tinystories")):
        experiment(task)
