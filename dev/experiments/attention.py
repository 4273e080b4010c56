"""
7. Attention between masked positions: does it grow with the loops, and where does it stop growing?

LoopMDM trained with up to 8 loops (loops.py), run with 16. For the looped layers, the share of the attention of masked positions that goes to masked
ones, divided by the share that they would get if attention were uniform; where half of a row is masked (0.4 < t < 0.6).
"""
import csv
import io

from common import QUICK, SEEDS, TASKS, ask, chosen, each, finish, line, one_part, print_table, save_csv, spread
from loops import models

TRAINED, LOOPS = 8, 16


def by_pass(r):
    """{(layer, loop): attention to masked positions over the uniform share}, the mean over heads, for the looped layers."""
    table = csv.DictReader(io.StringIO(ask(r, "attention", "--data", TASKS[r.task].held_out, "--loops", LOOPS, "--buckets", 5, "--rows", 32 if QUICK else 1024, "--csv", file=True)))
    sums = {}
    for row in table:
        if row["loop"] != "0" and float(row["t_low"]) == 0.4:
            whole = sums.setdefault((int(row["layer"]), int(row["loop"])), [0.0, 0.0])
            whole[0] += float(row["to_masked"])
            whole[1] += float(row["uniform"])
    return {key: masked / uniform for key, (masked, uniform) in sums.items()}


def experiment(task):
    runs = {seed: r for (_, seed), r in models(task, (TRAINED,)).items()}
    results = each("measuring attention", by_pass, runs)
    save_csv(f"attention_{task}", ["layer", "loop", "seed", "to_masked_over_uniform"], [[layer, loop, seed, value] for seed, found in results.items() for (layer, loop), value in found.items()])
    layers = sorted({layer for layer, _ in results[1]})
    values = {layer: {s: [results[seed][layer, s] for seed in SEEDS] for s in range(1, LOOPS + 1)} for layer in layers}
    print_table(f"{task}: attention from masked to masked positions over the uniform share, 0.4 < t < 0.6, mean (lowest to highest) of {len(SEEDS)} seeds", ["loop"] + [f"layer {layer}" for layer in layers],
                [[s] + [spread(values[layer][s], "{:.3f}") for layer in layers] for s in (1, 2, 3, 4, 6, 8, 12, 16)])

    ax = one_part()
    for i, layer in enumerate(layers):
        line(ax, i, f"layer {layer}", values[layer])
    ax.axhline(1, color="black", linewidth=1)
    ax.axvline(TRAINED, color="black", linestyle=":", linewidth=1)
    finish(ax, f"attention_{task}", xlabel="loop (dotted: the most in training)", ylabel="attention to masked / uniform", title=f"Attention from masked to masked positions, {task}")


if __name__ == "__main__":
    for task in chosen("sudoku", "tinystories"):
        experiment(task)
