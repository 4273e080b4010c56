"""
4. Where the gain is: the loss on masked tokens by noise level t, for each number of loops, and for
the MDM of the same training FLOPs.

The models are those of flops.py. The NELBO is the mean of this loss over t.
"""
import csv
import io

from common import (LINES, LOOPS, SEEDS, TASKS, ask, chosen, each, label, line, loops_of, mean,
                    new_figure, numbers, pick, print_table, save_csv, save_figure)
from flops import models

BUCKETS = 10


def by_t(r):
    """Returns {(S, bucket): nats per masked token}."""
    text = ask(r, "eval", "--data", TASKS[r.task].held_out, "--loops", numbers(loops_of(r)),
               "--rows", pick(32, 16384), "--buckets", BUCKETS, "--by-t", file=True)
    return {(int(cell["loops"]), round(float(cell["t_low"]) * BUCKETS)):
            float(cell["nats_per_masked_token"]) for cell in csv.DictReader(io.StringIO(text))}


def draw(task, results, buckets):
    """Draws what LoopMDM gains at each noise level, over one loop and over the MDM."""
    figure, axes = new_figure(2, sharey=True)
    comparisons = ((axes[0], ("LoopMDM", 1), "over one loop"),
                   (axes[1], ("MDM", 1), "over the MDM of equal training FLOPs"))
    for ax, (other, loops), title in comparisons:
        for S in LOOPS[1:]:
            gain = {(k + 0.5) / BUCKETS:
                    [results[other, seed][loops, k] - results["LoopMDM", seed][S, k]
                     for seed in SEEDS] for k in buckets}
            line(ax, LINES.index(("LoopMDM", S)), label("LoopMDM", S), gain)
        ax.axhline(0, color="black", linewidth=1)
        ax.set(xlim=(0, 1), xlabel="noise level t (share of masked tokens)", title=title)
    axes[0].set_ylabel("gain, nats per masked token")
    axes[0].legend()
    figure.suptitle(f"Gain of looping by noise level, {task}")
    save_figure(figure, f"noise_levels_{task}")


def experiment(task):
    results = each("evaluating", by_t, models(task))
    save_csv(f"noise_levels_{task}",
             ["model", "seed", "loops", "t_low", "t_high", "nats_per_masked_token"],
             [[name, seed, S, k / BUCKETS, (k + 1) / BUCKETS, loss]
              for (name, seed), losses in results.items() for (S, k), loss in losses.items()])
    buckets = [k for k in range(BUCKETS) if (1, k) in results["MDM", 1]]
    table = []
    for k in buckets:
        means = [mean(results[name, seed][S, k] for seed in SEEDS) for name, S in LINES]
        table.append([f"{k / BUCKETS:.1f} to {(k + 1) / BUCKETS:.1f}"]
                     + [f"{value:.4f}" for value in means])
    print_table(f"{task}: nats per masked token by noise level t, mean of {len(SEEDS)} seeds",
                ["t"] + [label(name, S) for name, S in LINES], table)
    draw(task, results, buckets)


if __name__ == "__main__":
    for task in chosen("sudoku", "stories", "tinystories"):
        experiment(task)
