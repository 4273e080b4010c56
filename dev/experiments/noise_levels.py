"""
4. Where the gain is: the loss on masked tokens by noise level t, for each number of loops, and for the MDM of the same training FLOPs.

The models are those of flops.py. The NELBO is the mean over t of this loss.
"""
import csv
import io

from common import LINES, LOOPS, QUICK, SEEDS, TASKS, ask, chosen, each, label, line, loops_of, mean, numbers, plt, print_table, save_csv, save_figure
from flops import models

BUCKETS = 10


def by_t(r):
    """{(S, bucket): nats per masked token}."""
    table = csv.DictReader(io.StringIO(ask(r, "eval", "--data", TASKS[r.task].held_out, "--loops", numbers(loops_of(r)), "--rows", 64 if QUICK else 16384, "--buckets", BUCKETS, "--by-t", file=True)))
    return {(int(row["loops"]), round(float(row["t_low"]) * BUCKETS)): float(row["nats_per_masked_token"]) for row in table}


def experiment(task):
    runs = models(task)
    results = each("evaluating", by_t, runs)
    save_csv(f"noise_levels_{task}", ["model", "seed", "loops", "t_low", "t_high", "nats_per_masked_token"],
             [[name, seed, S, k / BUCKETS, (k + 1) / BUCKETS, loss] for (name, seed), losses in results.items() for (S, k), loss in losses.items()])
    buckets = [k for k in range(BUCKETS) if (1, k) in results["MDM", 1]]
    print_table(f"{task}: nats per masked token by noise level t, mean of {len(SEEDS)} seeds", ["t"] + [label(name, S) for name, S in LINES],
                [[f"{k / BUCKETS:.1f} to {(k + 1) / BUCKETS:.1f}"] + [f"{mean(results[name, seed][S, k] for seed in SEEDS):.4f}" for name, S in LINES] for k in buckets])

    figure, axes = plt.subplots(1, 2, figsize=(9, 4), sharey=True)
    for ax, over, title in ((axes[0], ("LoopMDM", 1), "over one loop"), (axes[1], ("MDM", 1), "over the MDM of equal training FLOPs")):
        for S in LOOPS[1:]:
            gain = {(k + 0.5) / BUCKETS: [results[over[0], seed][over[1], k] - results["LoopMDM", seed][S, k] for seed in SEEDS] for k in buckets}
            line(ax, LINES.index(("LoopMDM", S)), label("LoopMDM", S), gain)
        ax.axhline(0, color="black", linewidth=1)
        ax.set(xlim=(0, 1), xlabel="noise level t (share of masked tokens)", title=title)
    axes[0].set_ylabel("gain, nats per masked token")
    axes[0].legend()
    figure.suptitle(f"Gain of looping by noise level, {task}")
    save_figure(figure, f"noise_levels_{task}")


if __name__ == "__main__":
    for task in chosen("sudoku", "stories", "tinystories"):
        experiment(task)
