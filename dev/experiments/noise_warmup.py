"""
15. Visible tokens first: is text learned sooner if some tokens to predict are not masked at first?

With --noise-warmup the share of tokens to predict that stay visible falls from half to none over a
share of the steps; then it is none, as it always is without. nano is real text; stories is
generated text, with tests of copying (see copying.py) and a look at the vectors of names: how much
of one is its own? All models have the same FLOPs. The highest learning rate is the task's, 2e-3.
"""
import os

import numpy as np

from common import (SEEDS, TASKS, TERA, chosen, each, finish, label, line, nelbo, new_figure,
                    of_seeds, pick, print_table, run, save_csv, spread, tokens_of, train)
from copying import KINDS, cases, words_right

BUDGET = 24 * TERA  # FLOP
SEEDS = {"nano": SEEDS[:2], "stories": SEEDS}
SHARES = {"nano": pick((0, 0.5), (0, 0.25, 0.5, 0.75)), "stories": pick((0, 0.5), (0, 0.5, 0.75))}
LOOPS = {"MDM": 1, "LoopMDM": 2}  # that they are used with
MODELS = {"nano": {"MDM": {"loop": "0:0"}, "LoopMDM": {}}, "stories": {"MDM": {"loop": "0:0"}}}


def own_part(r):
    """
    Returns how much of a name's vector in wte is its own, not common to the six boys' names, or to
    the six girls': |vector - their mean| / |vector|, mean of the names. At random it is 0.91.
    """
    tokens = tokens_of(TASKS[r.task].tokenizer)
    with open(os.path.join(r.folder, "model.bin"), "rb") as file:
        parameters = np.frombuffer(file.read(), np.float32, offset=1024)
    C, names = r.options["channels"], KINDS["names"].split("|")
    vectors = np.stack([parameters[C * i: C * (i + 1)]
                        for i in (tokens.index(f" {name}".encode()) for name in names)])
    kinds = vectors.reshape(2, len(names) // 2, C)  # the boys come first
    own = np.linalg.norm(kinds - kinds.mean(1, keepdims=True), axis=2)
    return float(np.mean(own / np.linalg.norm(kinds, axis=2)))


def experiment(task):
    seeds, shares, models = SEEDS[task], SHARES[task], MODELS[task]
    runs = {(model, share, seed): run(task, BUDGET, seed, **models[model],
                                      **({"noise_warmup_share": share} if share else {}))
            for model in models for share in shares for seed in seeds}
    train(runs.values())
    loops = {r: LOOPS[model] for (model, _, _), r in runs.items()}
    results = each("evaluating", lambda r: {"NELBO": nelbo(r, [loops[r]])[loops[r]]}, runs)
    if task == "stories":
        found = cases()
        words = each("filling in", lambda r: words_right(r, found, loops[r]), runs)
        results = {key: results[key] | words[key] | {"names' own part": own_part(r)}
                   for key, r in runs.items()}

    save_csv(f"noise_warmup_{task}",
             ["model", "noise_warmup_share", "seed", "flop", "steps", "loops", "what", "value"],
             [[*key, r.flops(), r.steps, loops[r], what, value]
              for key, r in runs.items() for what, value in results[key].items()])
    columns = list(next(iter(results.values())))
    print_table(f"{task}: NELBO, {TASKS[task].unit}"
                f"{', and words copied right, %' if task == 'stories' else ''}; "
                f"{BUDGET / TERA:g} TFLOP each, {of_seeds(seeds)}",
                ["model", "some stay visible in", *columns],
                [[label(model, LOOPS[model]),
                  f"{share:.0%} of the steps" if share else "no step"]
                 + [spread((results[model, share, seed][what] for seed in seeds),
                           {"NELBO": "{:.4f}", "names' own part": "{:.2f}"}.get(what, "{:.0f}"))
                    for what in columns]
                 for model in models for share in shares])
    _, (ax,) = new_figure()
    for i, model in enumerate(models):
        line(ax, i, label(model, LOOPS[model]),
             {100 * share: [results[model, share, seed]["NELBO"] for seed in seeds]
              for share in shares})
    finish(ax, f"noise_warmup_{task}", xlabel="steps in which some tokens stay visible, %",
           ylabel=f"NELBO, {TASKS[task].unit}", title=f"Visible tokens first: {task}")


if __name__ == "__main__":
    for task in chosen("nano", "stories"):
        experiment(task)
