"""
8. Prompts and answers: share of word problems answered right, MDM and LoopMDM with equal training FLOPs.

Problems of one step with numbers up to 20 (dev/data/arithmetic.c --steps 1 --largest 20). As in the paper a model first learns the text, here questions and answers masked alike, and then, as
GSM8K there, to answer: the question is context, the answer is masked. A problem is right if the number after #### is. Other problems than those of training, greedy, by confidence.
"""
from common import LINES, MODELS, QUICK, SEEDS, TASKS, TERA, ask, chosen, each, label, loops_of, nelbo, numbers, print_table, rows_of, run, save_csv, show_by_steps, spread, train

READING, ANSWERING = 12 * TERA, 24 * TERA  # FLOP
STEPS = (1, 2, 4, 8, 16)
COMPARED = {name: MODELS[name] for name in ("MDM", "LoopMDM")}


def right(r):
    """{(S, steps): % answered right}."""
    table = ask(r, "eval", "--data", TASKS[r.task].held_out, "--answers-after", r.options["answers-after"], "--exact-match", "--rows", 20 if QUICK else 1000, "--loops", numbers(loops_of(r)), "--steps", numbers(STEPS))
    return {(int(row[0]), int(row[1])): row[3] for row in rows_of(table)}


def experiment():
    read = {(name, seed): run("problems", READING, seed, **changes) for name, changes in COMPARED.items() for seed in SEEDS}
    train(read.values())
    runs = {(name, seed): run("answers", ANSWERING, seed, start=r, **MODELS[name]) for (name, seed), r in read.items()}
    train(runs.values())
    losses = each("evaluating", nelbo, runs)
    save_csv("answers_nelbo", ["model", "seed", "flop", "steps_trained", "loops", "nelbo"],
             [[name, seed, runs[name, seed].flops(), runs[name, seed].steps, S, loss] for (name, seed), found in losses.items() for S, loss in found.items()])
    print_table(f"Word problems: NELBO, nats per token of the answer; {READING / TERA:g} and {ANSWERING / TERA:g} TFLOP each, mean (lowest to highest) of {len(SEEDS)} seeds", ["model", "NELBO"],
                [[label(name, S), spread(losses[name, seed][S] for seed in SEEDS)] for name, S in LINES if name in COMPARED])
    show_by_steps("answers", "Word problems of one step", "answered right, %", runs, each("answering", right, runs))


if __name__ == "__main__":
    for _ in chosen("problems"):
        experiment()
