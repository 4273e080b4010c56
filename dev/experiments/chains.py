"""
12. Chains of conclusions: does looping pay where one conclusion waits for another?

rule30: the rows of a cellular automaton (dev/data/rule30.py). The first row is given. Each row
follows from the one before it, so the number of a row is the length of the inference.

problems: word problems of one, two and three calculations (dev/data/arithmetic.c --largest 20). The
question is given, the answer is learned and filled in. Right is the number after its last ####.

sudoku9: 9x9 boards (dev/data/sudoku.c) and puzzles.

All blanks are filled in greedily, by confidence.

The models are an MDM, LoopMDM with the same parameters (S drawn from 1 to 6; sudoku9: to 8), and a
deeper MDM whose training step costs as much as LoopMDM's mean step. All have the same training
FLOPs; what a denoising step costs differs, and the tables have it. The highest learning rate of
each is the best of four or five: with a quarter of the FLOPs (sudoku9: a twelfth), two seeds
(rule30: one), LoopMDM with its most loops, and other masks of the same held-out sequences.
"""
import array
import functools
import os
import subprocess

from common import (SEEDS, TASKS, TERA, TIMES, WORK, Failure, ask, best_rates, chosen, each,
                    flops_by_loops, given, label, line, log_axis, mean, nelbo, new_figure, numbers,
                    of_seeds, pick, print_table, run, save_csv, save_figure, spread, table_of,
                    train)

BUDGETS = {task: budget * TIMES * TERA
           for task, budget in {"rule30": 36, "problems": 72, "sudoku9": 360}.items()}
SHARES = {"rule30": 4, "problems": 4, "sudoku9": 12}  # the search has 1/SHARES of it for each model
MODELS = ("MDM", "deeper MDM", "LoopMDM")
DEEPER = {"rule30": 9, "problems": 9, "sudoku9": 10}  # layers
RATES = {task: pick((2e-3,), rates) for task, rates in {
    "rule30": (2e-3, 4e-3, 8e-3, 1.6e-2), "problems": (5e-4, 1e-3, 2e-3, 4e-3, 8e-3),
    "sudoku9": (1e-3, 2e-3, 4e-3, 8e-3)}.items()}
LOOPS = pick((1, 2), (1, 2, 4, 6, 8, 12, 24))
STEPS = pick((1, 2), (1, 2, 5, 10, 20))
CELLS, ROWS = 16, 10  # of rule30
CALCULATIONS = (1, 2, 3)  # of problems
TESTS = pick(2, 250)  # of rule30, and of each kind of problem and puzzle


def loops_of(r):
    """Returns the numbers of loops to use a model with."""
    return LOOPS if r.max_loops > 1 else (1,)


@functools.lru_cache(maxsize=None)
def puzzles():
    """Returns {kind of puzzles: a file of them, each with its solution}."""
    files = {f"{givens} givens": f"build/puzzles9_{givens}.bin" for givens in (46, 36, 30, 26)}
    for path in given.puzzles:
        name = os.path.splitext(os.path.basename(path))[0]
        files[name] = os.path.join(WORK, f"{name}.bin")
        made = subprocess.run(["build/sudoku", "--size", "9", "--from", path, "--count", "1000",
                               "--output", files[name]], stderr=subprocess.PIPE, text=True)
        if made.returncode:
            raise Failure(made.stderr.strip())
    return files


def models(task, names=MODELS):
    """Returns ({(model, seed): run}, {model: its learning rate}) of these models, trained."""
    seeds = SEEDS[:1 if task == "rule30" else 2]
    changes = {"MDM": {"loop": "0:0"}, "deeper MDM": {"loop": "0:0", "layers": DEEPER[task]},
               "LoopMDM": {}}
    _, best = best_rates(task, BUDGETS[task] / SHARES[task],
                         {name: changes[name] for name in names}, RATES[task], seeds)
    runs = {(name, seed): run(task, BUDGETS[task], seed, lr=best[name], **changes[name])
            for name in names for seed in SEEDS}
    train(runs.values())
    return runs, best


@functools.lru_cache(maxsize=None)
def automata():
    """Returns (what follows in each test of rule30, a file of templates that ask for it)."""
    with open(TASKS["rule30"].held_out, "rb") as file:
        file.seek(4 * 256)
        tokens = array.array("H", file.read())
    length, given_tokens = TASKS["rule30"].options["seq-len"], CELLS + 2
    texts = ["".join(".01>"[token] for token in tokens[i + 1:i + length])
             for i in range(0, TESTS * length, length)]
    path = os.path.join(WORK, "rule30.txt")
    with open(path, "w") as file:
        file.writelines(text[:given_tokens - 1] + "____" * (CELLS * ROWS) + "\n" for text in texts)
    return [text[given_tokens - 1:] for text in texts], path


def rows_right(r):
    """Returns {(a row or "all rows", S, steps): the share of tests where it is right}."""
    wanted, path = automata()
    shares = {}
    for S in loops_of(r):
        for steps in STEPS:
            output = ask(r, "sample", "--fill-file", path, "--loops", S, "--steps", steps,
                         "--temperature", 0)
            found = [text[CELLS + 1:] for text in output.rstrip("\n").split("\n\n")]
            for k in range(ROWS):
                row = slice(k * CELLS, (k + 1) * CELLS)
                shares[f"row {k + 1}", S, steps] = mean(
                    text[row] == right[row] for text, right in zip(found, wanted, strict=True))
            shares["all rows", S, steps] = mean(map(str.__eq__, found, wanted))
    return shares


def problems():
    """Returns {kind of problem: a file of them}."""
    return {f"{k} calculation{'s' * (k > 1)}": f"build/problems{k}_val.bin" for k in CALCULATIONS}


def solved(r):
    """Returns {(kind of puzzle or problem, S, steps): the share that is solved}."""
    kinds, *how = ((puzzles(), "--sudoku") if r.task == "sudoku9" else
                   (problems(), "--exact-match", "--answers-after", r.options["answers-after"]))
    shares = {}
    for kind, path in kinds.items():
        output = ask(r, "eval", *how, "--data", path, "--rows", TESTS, "--batch", 50,
                     "--loops", numbers(loops_of(r)), "--steps", numbers(STEPS))
        for S, steps, _, right, *_ in table_of(output):
            shares[kind, int(S), int(steps)] = right / 100
    return shares


def percent(values):
    """Returns shares as '%, mean (lowest to highest)'."""
    return spread([100 * value for value in values], "{:.1f}")


def show_table(runs, results, title, columns):
    """Prints a line for each model and number of loops. columns: {heading: (what, steps)}."""
    print_table(f"{title}; %, {of_seeds()}", ["model", "GFLOP per sequence and step", *columns],
                [[label(model, S), f"{flops_by_loops(runs[model, 1])[S][0] / 1e9:.3g}"]
                 + [percent(results[model, seed][what, S, steps] for seed in SEEDS)
                    for what, steps in columns.values()]
                 for model in MODELS for S in loops_of(runs[model, 1])])


def draw_models(ax, runs, results, points):
    """Draws a line for each model, LoopMDM with its most loops. points: {x: (what, steps)}."""
    for i, model in enumerate(MODELS):
        S = min(runs[model, 1].max_loops, LOOPS[-1])
        line(ax, i, label(model, S),
             {x: [100 * results[model, seed][what, S, steps] for seed in SEEDS]
              for x, (what, steps) in points.items()})
    ax.set_ylim(-3, 103)


def show_rule30(runs, results, left, right):
    """Prints the tables of rule30 and draws its figure."""
    rows = {k: (f"row {k}", 1) for k in range(1, ROWS + 1)}
    whole = {steps: ("all rows", steps) for steps in STEPS}
    show_table(runs, results, "rule30: rows right in one denoising step",
               {f"row {k}": at for k, at in rows.items()})
    show_table(runs, results, "rule30: all rows right",
               {f"steps {k}": at for k, at in whole.items()})
    draw_models(left, runs, results, rows)
    left.set(xlabel="row: conclusions one after the other", ylabel="right in one step, %",
             xticks=list(rows))
    left.legend(loc="lower left", fontsize=9)
    draw_models(right, runs, results, whole)
    log_axis(right, STEPS)
    right.set(xlabel="denoising steps", ylabel="all ten rows right, %")
    left.figure.suptitle("Rule 30: each row follows from the one before it")


def show_problems(runs, results, left, right):
    """Prints the tables of problems and draws its figure."""
    for kind in problems():
        show_table(runs, results, f"Word problems, {kind}: answered right",
                   {f"steps {steps}": (kind, steps) for steps in STEPS})
    draw_models(left, runs, results, {k: (kind, 1) for k, kind in zip(CALCULATIONS, problems())})
    left.set(xlabel="calculations in a problem", ylabel="answered right in one step, %",
             xticks=CALCULATIONS)
    left.legend()
    draw_models(right, runs, results, {steps: (kind, steps) for steps in STEPS})
    log_axis(right, STEPS)
    right.set(xlabel="denoising steps", ylabel=f"answered right, {kind}, %")
    left.figure.suptitle("Word problems")


def show_sudoku9(runs, results, left, right):
    """Prints the tables of sudoku9 and draws its figure."""
    for kind in puzzles():
        show_table(runs, results, f"9x9 Sudoku, {kind}: solved",
                   {f"steps {steps}": (kind, steps) for steps in STEPS})
    kind = "30 givens"
    draw_models(left, runs, results, {steps: (kind, steps) for steps in STEPS})
    log_axis(left, STEPS)
    left.set(xlabel="denoising steps", ylabel="solved, %")
    left.legend()
    for i, steps in enumerate(STEPS[::2]):
        line(right, i + 3, f"{steps} denoising step{'s' * (steps > 1)}",
             {S: [100 * results["LoopMDM", seed][kind, S, steps] for seed in SEEDS]
              for S in LOOPS})
    log_axis(right, LOOPS)
    right.set(xlabel="loops of LoopMDM", ylim=(-3, 103))
    right.legend()
    left.figure.suptitle(f"9x9 Sudoku with {kind}")


def experiment(task):
    prepare, measure, show = {"rule30": (automata, rows_right, show_rule30),
                              "problems": (problems, solved, show_problems),
                              "sudoku9": (puzzles, solved, show_sudoku9)}[task]
    runs, best = models(task)
    losses = each("evaluating", lambda r: nelbo(r, loops_of(r)), runs)
    prepare()  # once, before several threads ask for it
    results = each("solving", measure, runs)
    print_table(f"{task}: NELBO, {TASKS[task].unit}, {BUDGETS[task] / TERA:g} TFLOP each, "
                f"{of_seeds()}", ["model", "highest learning rate", "NELBO"],
                [[label(model, S), f"{best[model]:g}",
                  spread(losses[model, seed][S] for seed in SEEDS)]
                 for model in MODELS for S in loops_of(runs[model, 1])])

    found = {key: {("NELBO", S, ""): loss for S, loss in losses[key].items()} for key in runs}
    save_csv(f"chains_{task}", ["model", "seed", "highest_lr", "flop", "loops", "steps", "what",
                                "value"],
             [[model, seed, best[model], runs[model, seed].flops(), S, steps, what, value]
              for part in (found, results) for (model, seed), values in part.items()
              for (what, S, steps), value in values.items()])
    figure, axes = new_figure(2)
    show(runs, results, *axes)
    save_figure(figure, f"chains_{task}")


if __name__ == "__main__":
    for task in chosen("rule30", "problems", "sudoku9"):
        experiment(task)
