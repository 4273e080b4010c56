"""
7. Attention between masked positions: does it grow with the loops, and where does it stop growing?

LoopMDM trained with up to 8 loops (loops.py), run with 16. The experiment measures, for the looped
layers, the share of the attention of masked positions that goes to masked positions. It divides
this by the share that uniform attention would give them. About half of each sequence is masked
(0.4 < t < 0.6).
"""
import csv
import io

from common import (SEEDS, TASKS, ask, chosen, each, finish, line, new_figure, of_seeds, pick,
                    print_table, save_csv, spread)
from loops import models

TRAINED, LOOPS = 8, 16


def by_pass(r):
    """
    Returns {(layer, loop): attention to masked positions over the uniform share}, the mean of the
    heads, for the looped layers.
    """
    text = ask(r, "attention", "--data", TASKS[r.task].held_out, "--loops", LOOPS, "--buckets", 5,
               "--rows", pick(16, 1024), "--csv", file=True)
    sums = {}
    for cell in csv.DictReader(io.StringIO(text)):
        if cell["loop"] != "0" and float(cell["t_low"]) == 0.4:
            both = sums.setdefault((int(cell["layer"]), int(cell["loop"])), [0.0, 0.0])
            both[0] += float(cell["to_masked"])
            both[1] += float(cell["uniform"])
    return {key: masked / uniform for key, (masked, uniform) in sums.items()}


def experiment(task):
    runs = {seed: r for (_, seed), r in models(task, (TRAINED,)).items()}
    results = each("measuring attention", by_pass, runs)
    save_csv(f"attention_{task}", ["layer", "loop", "seed", "to_masked_over_uniform"],
             [[layer, loop, seed, value]
              for seed, found in results.items() for (layer, loop), value in found.items()])
    layers = sorted({layer for layer, _ in results[1]})
    values = {layer: {s: [results[seed][layer, s] for seed in SEEDS] for s in range(1, LOOPS + 1)}
              for layer in layers}
    print_table(f"{task}: attention from masked to masked positions over the uniform share, "
                f"0.4 < t < 0.6, {of_seeds()}",
                ["loop"] + [f"layer {layer}" for layer in layers],
                [[s] + [spread(values[layer][s], "{:.3f}") for layer in layers]
                 for s in (1, 2, 3, 4, 6, 8, 12, 16)])

    _, (ax,) = new_figure()
    for i, layer in enumerate(layers):
        line(ax, i, f"layer {layer}", values[layer])
    ax.axhline(1, color="black", linewidth=1)
    ax.axvline(TRAINED, color="black", linestyle=":", linewidth=1)
    finish(ax, f"attention_{task}", xlabel="loop (dotted: the most in training)",
           ylabel="attention to masked / uniform",
           title=f"Attention from masked to masked positions, {task}")


if __name__ == "__main__":
    for task in chosen("sudoku", "tinystories"):
        experiment(task)
