"""
8. Prompts and answers: share of word problems answered right, MDM, deeper MDM and LoopMDM with equal training FLOPs.

Problems of one step (dev/data/arithmetic.c --steps 1), learned as GSM8K is in the paper: the question is context, the answer is masked. A problem is right if
the number after #### is. Other problems than those of training, greedy, by confidence.
"""
from common import LINES, MODELS, QUICK, SEEDS, TERA, ask, each, label, line, log_axis, loops_of, nelbo, numbers, plt, print_table, rows_of, run, save_csv, save_figure, spread, train

BUDGET, STEPS = 24 * TERA, (1, 2, 4, 8, 16)  # FLOP; denoising steps


def right(r):
    """{(S, steps): % answered right}."""
    table = ask(r, "eval", "--data", "build/problems1_val.bin", "--answers-after", "<|sep|>", "--exact-match", "--rows", 20 if QUICK else 1000, "--loops", numbers(loops_of(r)), "--steps", numbers(STEPS))
    return {(int(row[0]), int(row[1])): row[3] for row in rows_of(table)}


def experiment():
    runs = {(name, seed): run("problems", BUDGET, seed, **changes) for name, changes in MODELS.items() for seed in SEEDS}
    train(runs.values())
    results = dict(zip(runs, each("answering", right, runs.values())))
    losses = dict(zip(runs, each("evaluating", nelbo, runs.values())))
    save_csv("answers", ["model", "seed", "flop", "steps_trained", "loops", "steps", "right_percent", "nelbo"],
             [[name, seed, runs[name, seed].flops(), runs[name, seed].steps, S, steps, share, losses[name, seed][S]] for (name, seed), shares in results.items() for (S, steps), share in shares.items()])
    values = {(name, S): {steps: [results[name, seed][S, steps] for seed in SEEDS] for steps in STEPS} for name, S in LINES}
    print_table(f"Word problems: answered right, %, by denoising steps; {BUDGET / TERA:g} TFLOP each, mean (lowest to highest) of {len(SEEDS)} seeds", ["model", "NELBO", *STEPS],
                [[label(name, S), spread(losses[name, seed][S] for seed in SEEDS)] + [spread(values[name, S][steps], "{:.1f}") for steps in STEPS] for name, S in LINES])

    figure, ax = plt.subplots(figsize=(7, 4))
    for i, (name, S) in enumerate(LINES):
        line(ax, i, label(name, S), values[name, S])
    log_axis(ax, STEPS)
    ax.set(xlabel="denoising steps", ylabel="answered right, %", title="Word problems of one step")
    ax.legend()
    save_figure(figure, "answers")


if __name__ == "__main__":
    experiment()
