"""
8. Prompts and answers: the share of word problems answered right, by an MDM and by LoopMDM with
equal training FLOPs.

The problems have one step and numbers up to 20 (dev/data/arithmetic.c --steps 1 --largest 20). As
in the paper, a model first learns the text: questions and answers are masked alike. Then it learns
to answer, as on GSM8K there: the question is given, the answer is masked. A problem is right if the
number after #### is right. The test has other problems than the training; the models answer
greedily, by confidence.
"""
from common import (LINES, MODELS, SEEDS, TASKS, TERA, ask, chosen, each, label, loops_of, nelbo,
                    numbers, of_seeds, pick, print_table, run, save_csv, show_by_steps, spread,
                    table_of, train)

READING, ANSWERING = 12 * TERA, 24 * TERA  # FLOP
STEPS = pick((1, 2), (1, 2, 4, 8, 16))
COMPARED = {name: MODELS[name] for name in ("MDM", "LoopMDM")}


def right(r):
    """Returns {(S, steps): % answered right}."""
    output = ask(r, "eval", "--data", TASKS[r.task].held_out,
                 "--answers-after", r.options["answers-after"], "--exact-match",
                 "--rows", pick(4, 1000), "--loops", numbers(loops_of(r)),
                 "--steps", numbers(STEPS))
    return {(int(S), int(steps)): share for S, steps, _, share, *_ in table_of(output)}


def experiment():
    read = {(name, seed): run("problems", READING, seed, **changes)
            for name, changes in COMPARED.items() for seed in SEEDS}
    train(read.values())
    runs = {(name, seed): run("answers", ANSWERING, seed, start=r, **MODELS[name])
            for (name, seed), r in read.items()}
    train(runs.values())
    losses = each("evaluating", nelbo, runs)
    save_csv("answers_nelbo", ["model", "seed", "flop", "steps_trained", "loops", "nelbo"],
             [[name, seed, runs[name, seed].flops(), runs[name, seed].steps, S, loss]
              for (name, seed), found in losses.items() for S, loss in found.items()])
    print_table(f"Word problems: NELBO, nats per token of the answer; {READING / TERA:g} and "
                f"{ANSWERING / TERA:g} TFLOP each, {of_seeds()}", ["model", "NELBO"],
                [[label(name, S), spread(losses[name, seed][S] for seed in SEEDS)]
                 for name, S in LINES if name in COMPARED])
    show_by_steps("answers", "Word problems of one step", "answered right, %", runs,
                  each("answering", right, runs))


if __name__ == "__main__":
    for _ in chosen("problems"):
        experiment()
