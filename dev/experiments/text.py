"""
14. Text, again: what could make looping pay there?

TinyStories, in three shapes: text64 has 4 layers of 64 channels and is trained until more steps
change little; text4 has 4 of 256, and text12 12 of 128. The MDM is compared with a deeper model,
with a wide one that has the deeper one's parameters, and with looped ones. Those differ in the
loops that they learn: from 1, as in the paper; from half of the most; always the same number; and
in the number of looped layers.

All begin with visible tokens (see noise_warmup.py) and have the same training FLOPs, and each has
the best of some learning rates. One more MDM has only as many steps as the deeper one, and as two
looped layers with S from 1 to 4. It shows what these gain at equal steps, and what the steps are
worth that they cannot take. A looped model is used with the number of loops that is best under
other masks of the held-out text.
"""
import functools
import re

from common import (SEEDS, TASKS, TERA, TIMES, best_rates, chosen, each, finish, flops_by_loops,
                    loopmdm, loops_of, mean, mean_flops, nelbo, new_figure, of_seeds, pick, points,
                    print_table, run, save_csv, spread, tokens_of, train)

BUDGETS = {task: budget * TIMES * TERA
           for task, budget in {"text64": 72, "text4": 150, "text12": 150}.items()}  # FLOP
RATES = {task: pick((2e-3,), rates) for task, rates in {
    "text64": (1e-3, 2e-3, 4e-3), "text4": (5e-4, 1e-3, 2e-3, 4e-3),
    "text12": (5e-4, 1e-3, 2e-3, 4e-3)}.items()}
SEEDS = SEEDS[:2]
LOOPS = (1, 2, 3, 4, 6, 8, 12)
FEWER, DEEPER = "MDM, the deeper one's steps", "deeper MDM"
TOP, FIXED = {"loop_dist": "top"}, {"loop_dist": "fixed"}


def four_layers(wide):
    """Returns the models of 4 layers, and a wide one of so many channels."""
    return {"MDM": {"loop": "0:0"},
            DEEPER: {"loop": "0:0", "layers": 7},
            "wide MDM": {"loop": "0:0", "channels": pick(24, wide)},
            "two layers, S from 1 to 4": {"max_loops": 4},
            "two layers, S from 2 to 4": {"max_loops": 4, **TOP},
            "two layers, S = 3": {"max_loops": 3, **FIXED},
            "one layer, S from 3 to 6": {"loop": "1:2", "max_loops": 6, **TOP}}


MODELS = {
    "text64": four_layers(80),
    "text4": four_layers(336),
    "text12": {
        "MDM": {"loop": "0:0"},
        DEEPER: {"loop": "0:0", "layers": 15},
        "wide MDM": {"loop": "0:0", "channels": pick(24, 144)},
        "two layers, S from 1 to 4": {"max_loops": 4},
        "two layers, S from 1 to 12": {"max_loops": 12},
        "two layers, S from 2 to 4": {"max_loops": 4, **TOP},
        "two layers, S = 3": {"max_loops": 3, **FIXED}}}


@functools.lru_cache(maxsize=None)
def parameters(r):
    """Returns the number of a model's parameters."""
    o = r.options
    words = [word for name in ("layers", "channels", "heads", "seq-len", "loop")
             for word in (f"--{name}", o[name])]
    said = loopmdm("info", *words, "--vocab", len(tokens_of(TASKS[r.task].tokenizer)))
    return int(re.search(r"total +(\d+)", said)[1])


def experiment(task):
    _, best = best_rates(task, BUDGETS[task] / 4, MODELS[task], RATES[task], SEEDS)
    runs = {(name, seed): run(task, BUDGETS[task], seed, lr=best[name], **changes)
            for name, changes in MODELS[task].items() for seed in SEEDS}
    share = mean_flops(runs["MDM", 1]) / mean_flops(runs[DEEPER, 1])
    runs |= {(FEWER, seed): run(task, BUDGETS[task] * share, seed, lr=best["MDM"],
                                **MODELS[task]["MDM"]) for seed in SEEDS}
    train(runs.values())
    losses = each("evaluating", lambda r: nelbo(r, loops_of(r, LOOPS)), runs)
    others = each("evaluating", lambda r: nelbo(r, loops_of(r, LOOPS), seed=2), runs)
    save_csv(f"text_{task}", ["model", "seed", "highest_lr", "parameters", "flop", "steps", "loops",
                              "nelbo"],
             [[name, seed, r.options["lr"], parameters(r), r.flops(), r.steps, S, loss]
              for (name, seed), r in runs.items() for S, loss in losses[name, seed].items()])

    table, values = [], {}
    for name in [*MODELS[task], FEWER]:
        r = runs[name, 1]
        S = min(losses[name, 1], key=lambda S: mean(others[name, seed][S] for seed in SEEDS))
        values[name] = [losses[name, seed][S] for seed in SEEDS]
        read = r.steps * r.options["batch"] * r.options["seq-len"] / parameters(r)
        table.append([name, f"{r.options['lr']:g}", r.steps, f"{parameters(r) / 1e6:.2f} M",
                      f"{read:.2g}", S, f"{flops_by_loops(r)[S][0] / 1e9:.3g}",
                      spread(values[name])])
    print_table(f"{task}: NELBO, {TASKS[task].unit}, {BUDGETS[task] / TERA:g} TFLOP each but the "
                f"last, {of_seeds(SEEDS)}",
                ["model", "highest learning rate", "steps", "parameters", "tokens per parameter",
                 "used with S", "GFLOP per sequence", "NELBO"], table)
    looped = [name for name, changes in MODELS[task].items() if "max_loops" in changes]
    print_table(f"{task}: NELBO by loops", ["S", *looped],
                [[S] + [spread(losses[name, seed][S] for seed in SEEDS)
                        if S in losses[name, 1] else "" for name in looped] for S in LOOPS])
    _, (ax,) = new_figure()
    points(ax, values)
    finish(ax, f"text_{task}", xlabel=f"NELBO, {TASKS[task].unit}",
           title=f"TinyStories, {TASKS[task].options['layers']} layers of "
                 f"{TASKS[task].options['channels']} channels, equal FLOPs")


if __name__ == "__main__":
    for task in chosen("text64", "text4", "text12"):
        experiment(task)
