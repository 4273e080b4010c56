"""
11. Recipes: how should the preset nano be trained?

It is trained on TinyStories with 4096 tokens. One or two options differ from the recipe that the
search began with: the task's options in common.py. All trainings have the same FLOPs, so a smaller
batch takes more steps. (The groups nano8 and d6 of starts.py search on a GPU.)
"""
from common import (SEEDS, TASKS, TERA, chosen, each, finish, nelbo, new_figure, points,
                    print_table, run, save_csv, spread, train)

BUDGET = 24 * TERA  # FLOP
LOOPS = (1, 2, 4)

# The options that differ, and the number of seeds.
CHANGES = [({}, 2), ({"lr": 1.4e-3}, 2), ({"lr": 2.8e-3}, 2), ({"batch": 8, "warmup": 300}, 2),
           ({"batch": 2, "lr": 1.4e-3, "warmup": 1200}, 2), ({"ema": 0.999}, 1)]


def name_of(task, changes):
    """Returns the options as they are written on a command line; for no change, the recipe."""
    recipe = {name: TASKS[task].options[name] for name in ("batch", "lr", "warmup")}
    return " ".join(f"--{name} {value:g}" for name, value in (changes or recipe).items())


def draw(task, results):
    """Draws the NELBO with S=2."""
    _, (ax,) = new_figure()
    points(ax, {name: [nelbos[2] for nelbos in losses] for name, losses in results.items()})
    finish(ax, f"recipes_{task}", xlabel=f"NELBO with S=2, {TASKS[task].unit}",
           title=f"Recipes of {task}")


def experiment(task):
    runs = {(name_of(task, changes), seed): run(task, BUDGET, seed, **changes)
            for changes, seeds in CHANGES for seed in SEEDS[:seeds]}
    train(runs.values())
    found = each("evaluating", lambda r: nelbo(r, LOOPS), runs)
    save_csv(f"recipes_{task}", ["options", "seed", "flop", "steps", "loops", "nelbo"],
             [[name, seed, runs[name, seed].flops(), runs[name, seed].steps, S, loss]
              for (name, seed), losses in found.items() for S, loss in losses.items()])

    names = list(dict.fromkeys(name for name, _ in runs))
    results = {name: [losses for (other, _), losses in found.items() if other == name]
               for name in names}
    print_table(f"{task}: NELBO, {TASKS[task].unit}, {BUDGET / TERA:g} TFLOP each, "
                "mean (lowest to highest) of the seeds",
                ["options", "steps", "seeds"] + [f"S={S}" for S in LOOPS],
                [[f"`{name}`", runs[name, 1].steps, len(losses)]
                 + [spread(nelbos[S] for nelbos in losses) for S in LOOPS]
                 for name, losses in results.items()])
    draw(task, results)


if __name__ == "__main__":
    for task in chosen("nano"):
        experiment(task)
