"""
2. Where to loop: which two neighbouring layers of six gain most from a loop, and is a loop over all
layers better?

LoopMDM with a loop over layers 0-1, 1-2, .., 4-5 (S up to 4, on average nine passes), or over all
six layers (S up to 2, nine passes too), and an MDM (six passes). All have the same training FLOPs
and the task's learning rate.
"""
from common import (COLORS, LOOPS, SEEDS, TASKS, TERA, chosen, each, finish, mean, nelbo,
                    new_figure, of_seeds, print_table, run, save_csv, spread, train)

BUDGET, LAYERS = 12 * TERA, 6  # FLOP

# --loop: S_max
PLACES = {f"{a}:{a + 2}": 4 for a in range(LAYERS - 1)} | {f"0:{LAYERS}": 2, "0:0": 1}


def name_of(place):
    """Returns which layers are looped."""
    a, b = map(int, place.split(":"))
    if b == 0:
        return "none"
    return "all" if b - a == LAYERS else f"{a}, {b - 1}"


def draw(task, results):
    """Draws the NELBO of each place at its S_max: a point for each seed, and a line at the mean."""
    _, (ax,) = new_figure()
    for i, (place, most) in enumerate(PLACES.items()):
        losses = [results[place, seed][most] for seed in SEEDS]
        color = COLORS[6] if place == "0:0" else COLORS[0]
        ax.plot([i] * len(losses), losses, "o", color=color)
        ax.plot([i - 0.25, i + 0.25], [mean(losses)] * 2, color=color, linewidth=2)
    ax.set_xticks(range(len(PLACES)), [name_of(place) for place in PLACES])
    ax.grid(axis="x", visible=False)
    finish(ax, f"where_{task}", xlabel=f"looped layers of 0 to {LAYERS - 1}",
           ylabel=f"NELBO, {TASKS[task].unit}",
           title=f"Where to loop, {task}: points are seeds, lines their mean")


def experiment(task):
    runs = {(place, seed): run(task, BUDGET, seed, layers=LAYERS, loop=place, max_loops=most)
            for place, most in PLACES.items() for seed in SEEDS}
    train(runs.values())
    results = each("evaluating", nelbo, runs)
    save_csv(f"where_{task}", ["layers_looped", "seed", "flop", "steps", "loops", "nelbo"],
             [[name_of(place), seed, runs[place, seed].flops(), runs[place, seed].steps, S, loss]
              for (place, seed), losses in results.items() for S, loss in losses.items()])

    def cell(place, S):
        if S not in results[place, 1]:
            return ""
        return spread(results[place, seed][S] for seed in SEEDS)

    print_table(f"{task}: NELBO, {TASKS[task].unit}, {BUDGET / TERA:g} TFLOP each, {of_seeds()}",
                ["looped layers"] + [f"S={S}" for S in LOOPS],
                [[name_of(place)] + [cell(place, S) for S in LOOPS] for place in PLACES])
    draw(task, results)


if __name__ == "__main__":
    for task in chosen("sudoku"):
        experiment(task)
