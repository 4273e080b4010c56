"""
2. Where to loop: which two neighbouring layers of six gain most from being run several times, and is it better to loop over all?

LoopMDM with loops over layers 0-1, 1-2, .., 4-5 (S up to 4, nine passes in the mean), over all six (S up to 2, nine passes too), and an MDM (six),
all with the same training FLOPs and the task's learning rate.
"""
from common import COLORS, LOOPS, SEEDS, TASKS, TERA, chosen, each, finish, mean, nelbo, one_part, print_table, run, save_csv, spread, train

BUDGET, LAYERS = 12 * TERA, 6  # FLOP
PLACES = {f"{a}:{a + 2}": 4 for a in range(LAYERS - 1)} | {f"0:{LAYERS}": 2, "0:0": 1}  # --loop: S_max


def name_of(place):
    """The layers that are looped."""
    a, b = map(int, place.split(":"))
    return "none" if b == 0 else "all" if b - a == LAYERS else f"{a}, {b - 1}"


def experiment(task):
    runs = {(place, seed): run(task, BUDGET, seed, layers=LAYERS, loop=place, max_loops=most) for place, most in PLACES.items() for seed in SEEDS}
    train(runs.values())
    results = each("evaluating", nelbo, runs)
    save_csv(f"where_{task}", ["layers_looped", "seed", "flop", "steps", "loops", "nelbo"],
             [[name_of(place), seed, runs[place, seed].flops(), runs[place, seed].steps, S, loss] for (place, seed), losses in results.items() for S, loss in losses.items()])
    print_table(f"{task}: NELBO, {TASKS[task].unit}, {BUDGET / TERA:g} TFLOP each, mean (lowest to highest) of {len(SEEDS)} seeds", ["looped layers"] + [f"S={S}" for S in LOOPS],
                [[name_of(place)] + [spread(results[place, seed][S] for seed in SEEDS) if S in results[place, 1] else "" for S in LOOPS] for place in PLACES])

    ax = one_part()
    for i, (place, most) in enumerate(PLACES.items()):
        losses, color = [results[place, seed][most] for seed in SEEDS], COLORS[0 if place != "0:0" else 6]
        ax.plot([i] * len(losses), losses, "o", color=color)
        ax.plot([i - 0.25, i + 0.25], [mean(losses)] * 2, color=color, linewidth=2)
    ax.set_xticks(range(len(PLACES)), [name_of(place) for place in PLACES])
    ax.grid(axis="x", visible=False)
    finish(ax, f"where_{task}", xlabel=f"looped layers of 0 to {LAYERS - 1}", ylabel=f"NELBO, {TASKS[task].unit}", title=f"Where to loop, {task}: points are seeds, lines their mean")


if __name__ == "__main__":
    for task in chosen("sudoku"):
        experiment(task)
