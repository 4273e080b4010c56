"""
What the experiments share: tasks, models that are trained for a number of FLOPs, questions to the program, tables, figures.

./loopmdm does all training and evaluation, one thread for each model and as many models at a time as there are cores. A model's folder in
build/experiments is named after what makes it differ from its task's other models, so that experiments share models; what the program has answered
about it is kept there too. So an experiment that was interrupted goes on where it stopped, and one that is repeated only draws. A change of the program
itself is not noticed: remove build/experiments to begin anew.

With --quick everything is tiny, in build/experiments_quick: it shows that an experiment works, not what comes out.
"""
import argparse
import csv
import functools
import hashlib
import os
import re
import signal
import subprocess
import sys
import time
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass
from statistics import fmean as mean

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "../data"))
import gsm  # noqa: E402

parser = argparse.ArgumentParser(description=sys.modules["__main__"].__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--quick", action="store_true", help="tiny models for a few steps: does it work?")
parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(), help="models at a time, each with one thread (default: one for each core)")
parser.add_argument("--task", choices=("sudoku", "stories", "tinystories", "problems"), help="only this one, where an experiment has several")
given = parser.parse_args()
if given.jobs < 1:
    parser.error("--jobs needs 1 or more")
QUICK, JOBS = given.quick, given.jobs
WORK = "build/experiments_quick" if QUICK else "build/experiments"
RESULTS = WORK if QUICK else "dev/results"
SEEDS = (1,) if QUICK else (1, 2, 3)
TERA = 1e12


class Failure(Exception):
    """Ends the experiment with one line."""


def report(kind, error, trace):
    """Errors that a user can do something about are one line."""
    if issubclass(kind, (Failure, OSError)):
        print(f"{os.path.basename(sys.argv[0])}: {error}", file=sys.stderr)
    elif issubclass(kind, KeyboardInterrupt):
        print("stopped; the same command goes on from here", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, trace)


sys.excepthook = report
signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))

# ----------------------------------------------------------------------------------------------------------------------
# Tasks: data, and the options of train that all models of a task have in common


@dataclass(frozen=True)
class Task:
    """Token shards, and options of `loopmdm train` ("" is the value of one that takes none)."""
    data: str         # shard to train on
    held_out: str     # shard to evaluate on
    tokenizer: str
    rows: int         # of the held-out data in an evaluation; where there are fewer they come again with other masks
    options: dict     # shape, batch, optimizer; a run may change them
    unit: str = "nats per token"
    entropy: float = 0  # of the data, in that unit, where it is known: no NELBO can be lower


SMALL = {"layers": 4, "channels": 64, "heads": 4, "loop": "1:3", "max-loops": 4, "weight-decay": 0.01, "clip": 0.5}
PROBLEMS = {**SMALL, "seq-len": 72, "batch": 8}
TASKS = {
    # There are 28,200,960 boards of 6x6. 1 % of the held-out ones are among the 300,000 of training
    "sudoku": Task("build/sudoku_train.bin", "build/sudoku_val.bin", "build/sudoku_train.tok", 16384, {**SMALL, "fixed-rows": "", "seq-len": 36, "batch": 32, "lr": 2e-3}, "nats per cell", 17.15481 / 36),
    # A story a row; embeddings that learn slowly, which copying.py shows to be no better
    "stories": Task("build/stories_train.bin", "build/stories_val.bin", "dev/data/stories.tok", 4096, {**SMALL, "fixed-rows": "", "seq-len": 96, "batch": 8, "lr": 2e-3, "wte-lr": 0.1}),
    "tinystories": Task("build/tinystories/train.bin", "build/tinystories/val.bin", "build/tinystories/tokenizer.bin", 4096, {**SMALL, "seq-len": 64, "batch": 8, "lr": 2e-3}),
    "problems": Task("build/problems1_train.bin", "build/problems1_val.bin", "dev/data/arithmetic.tok", 4096, {**PROBLEMS, "fixed-rows": "", "lr": 2e-3}),
    "answers": Task("build/problems1_train.bin", "build/problems1_val.bin", "dev/data/arithmetic.tok", 4096, {**PROBLEMS, "answers-after": "<|sep|>", "lr": 2e-3}),
}


def chosen(*tasks):
    """Those of an experiment's tasks that --task leaves; without it all, real text only where it is at hand."""
    if given.task not in (None, *tasks):
        parser.error(f"--task: this experiment has {', '.join(tasks)}")
    ready = [task for task in tasks if task != "tinystories" or not QUICK and os.path.exists(TASKS[task].data)]
    if given.task and given.task not in ready:
        raise Failure(f"{given.task} needs {TASKS[given.task].data}, which make experiments TINYSTORIES=FILE writes; and it has no --quick")
    return [given.task] if given.task else ready


# The three models that most experiments compare: a mean step of the last two costs the same
MODELS = {"MDM": {"loop": "0:0"}, "deeper MDM": {"loop": "0:0", "layers": 7}, "LoopMDM": {}}
LOOPS = (1, 2, 4, 8)
LINES = [("MDM", 1), ("deeper MDM", 1)] + [("LoopMDM", S) for S in LOOPS]  # a model, used with so many loops


def label(name, S):
    """How tables and figures call one of LINES."""
    return f"{name}, S={S}" if name == "LoopMDM" else name


@functools.lru_cache(maxsize=None)
def tokens_of(tokenizer):
    """Its vocabulary, as list[bytes]."""
    return gsm.read_tokenizer_bin(tokenizer)[0]


@functools.lru_cache(maxsize=None)
def fingerprint(path):
    """A hash of a file that does not change while the experiment runs."""
    if not os.path.exists(path):
        raise Failure(f"there is no {path}; make experiments makes all that the experiments need")
    with open(path, "rb") as file:
        return hashlib.sha1(file.read()).hexdigest()[:12]


# ----------------------------------------------------------------------------------------------------------------------
# The program

children = set()  # processes that run now: they end with the experiment


def loopmdm(*arguments):
    """Runs the program with one thread; returns what it prints, each byte a character, as a model may write any bytes."""
    try:
        process = subprocess.Popen(["./loopmdm", *map(str, arguments)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env={**os.environ, "OMP_NUM_THREADS": "1"})
    except OSError as error:
        raise Failure(f"cannot run ./loopmdm: {error.strerror}; make experiments builds it") from None
    children.add(process)
    output, said = process.communicate()
    children.discard(process)
    if process.returncode:
        raise Failure(f"./loopmdm {' '.join(map(str, arguments))} ended with status {process.returncode}: {(said.decode('latin-1').strip() or 'no message').splitlines()[-1]}")
    return output.decode("latin-1")


def rows_of(output):
    """The lines of the program's tables, as lists of numbers: '+-' and '%' are left out."""
    return [[float(word) for word in line.replace("+-", "").replace("%", "").split()] for line in output.splitlines() if re.fullmatch(r"[\d\s.%+\-e]*\d[\d\s.%+\-e]*", line)]


def each(what, function, items, progress=None):
    """{key: function(item)} for a dictionary of items, as many at a time as JOBS, with a line that says how much is done (progress(): from 0 to 1) and the time left."""
    began, finished = time.time(), []
    if not items:
        return {}
    start = progress() if progress else 0

    def one(item):
        result = function(item)
        finished.append(item)
        return result

    with ThreadPoolExecutor(JOBS) as pool:
        futures = {key: pool.submit(one, item) for key, item in items.items()}
        pending = set(futures.values())
        try:
            while pending:
                done, pending = wait(pending, timeout=2 if sys.stdout.isatty() else 60, return_when=FIRST_EXCEPTION)
                for future in done:
                    future.result()
                share = progress() if progress else len(finished) / len(items)
                left = f", {(time.time() - began) * (1 - share) / (share - start) / 60:.0f} minutes left" if share > start else ""
                if pending:
                    print(f"{what}: {len(finished)} of {len(items)}, {100 * share:.0f} %{left}" + " " * 10, end="\r" if sys.stdout.isatty() else "\n", flush=True)
        except BaseException:  # Ctrl-C too: nothing new begins, and train saves when it is told to end
            pool.shutdown(wait=False, cancel_futures=True)
            for process in list(children):
                process.terminate()
            raise
    print(f"{what}: {len(items)} done in {time.time() - began:.0f} s" + " " * 30, flush=True)
    return {key: future.result() for key, future in futures.items()}


# ----------------------------------------------------------------------------------------------------------------------
# Models


@dataclass(frozen=True)
class Run:
    """A model of a task, with options that differ from the task's, trained for a budget of floating point operations."""
    task: str
    budget: float   # FLOP
    seed: int
    changes: tuple  # of (option, value)
    start: object = None  # the Run whose parameters it begins with

    @property
    def options(self):
        return {**TASKS[self.task].options, **dict(self.changes)}

    @property
    def folder(self):
        words = [os.path.basename(self.start.folder), "then"] if self.start else []
        words += [self.task] + [f"{name}={value}".replace(":", "-") for name, value in self.changes] + [f"{self.budget / TERA:g}T", f"seed={self.seed}"]
        return os.path.join(WORK, "_".join(words))

    @property
    def max_loops(self):
        """S_max; an ordinary MDM runs all its layers once."""
        return 1 if self.options["loop"] == "0:0" else self.options["max-loops"]

    @property
    def steps(self):
        """Optimizer steps for that budget, by the mean over p(S)."""
        steps = max(1, round(self.budget / (mean_flops(self) * self.options["batch"])))
        return min(steps, 6) if QUICK else steps

    def flops(self):
        """FLOP of the steps that log.csv has: exact for the loops that were drawn and the tokens that were masked."""
        try:
            with open(os.path.join(self.folder, "log.csv"), "rb") as log:
                log.seek(max(0, os.path.getsize(log.name) - 1000))
                return float(log.read().split(b"\n")[-2].split(b",")[7])
        except (OSError, IndexError, ValueError):
            if self.finished():
                raise Failure(f"{self.folder}/log.csv is not whole: remove {self.folder}, and it is trained again") from None
            return 0.0  # not begun yet

    def finished(self):
        return os.path.exists(os.path.join(self.folder, "done"))


def run(task, budget, seed=1, start=None, **changes):
    """A Run; options are written with _ for -."""
    base = TASKS[task].options
    changes = {name.replace("_", "-"): value for name, value in changes.items()}
    return Run(task, budget, seed, tuple(sorted((name, value) for name, value in changes.items() if base.get(name) != value)), start)


@functools.lru_cache(maxsize=None)
def flops_of_row(layers, heads, channels, T, loop, V):
    """{S: (FLOP of a forward pass over a row, all masked; FLOP of training on it, half masked)} for S from 1 to 24, as the program counts them."""
    table = loopmdm("flops", "--layers", layers, "--heads", heads, "--channels", channels, "--seq-len", T, "--loop", loop, "--max-loops", 24, "--vocab", V)
    return {int(row[0]): (row[2] * 1e6 * T, row[3] * 1e6 * T) for row in rows_of(table)}


def flops_by_loops(r):
    """flops_of_row() of a model."""
    o = r.options
    return flops_of_row(o["layers"], o["heads"], o["channels"], o["seq-len"], o["loop"], len(tokens_of(TASKS[r.task].tokenizer)))


def mean_flops(r):
    """FLOP of training on a row, half masked: the mean over p(S)."""
    costs = flops_by_loops(r)
    cost = [costs[S][1] for S in range(1, r.max_loops + 1)]
    weights = [1 / c for c in cost] if r.options.get("loop-dist") == "flops" else [1] * len(cost)
    return sum(w * c for w, c in zip(weights, cost)) / sum(weights)


def check_identity(r):
    """Notes in a model's folder all that makes it, or ends the experiment if there it says otherwise."""
    task, note = TASKS[r.task], os.path.join(r.folder, "made_of")
    made_of = "".join(f"{name} {value}\n" for name, value in sorted({**r.options, "max-loops": r.max_loops, "seed": r.seed, "steps": r.steps}.items()))
    made_of += "".join(f"{path} {fingerprint(path)}\n" for path in (task.data, task.tokenizer))
    os.makedirs(r.folder, exist_ok=True)
    if not os.path.exists(note):
        with open(note, "w") as file:
            file.write(made_of)
    elif open(note).read() != made_of:
        raise Failure(f"{r.folder} was begun with other options or data (compare {note}); remove it")


def train_one(r):
    """Trains it, or goes on with it."""
    task = TASKS[r.task]
    command = ["train", "--data", task.data, "--val-data", task.held_out, "--tokenizer", task.tokenizer, "--out", r.folder, "--steps", r.steps, "--seed", r.seed,
               "--warmup", max(1, r.steps // 20), "--val-every", max(1, r.steps // 10), "--val-rows", 16 if QUICK else 256, "--save-every", 500, "--threads", 1]
    for name, value in {**r.options, "max-loops": r.max_loops}.items():
        command += [f"--{name}"] + ([value] if value != "" else [])
    if os.path.exists(os.path.join(r.folder, "model.bin")):
        command.append("--resume")
    elif r.start:
        command += ["--init", r.start.folder]
    loopmdm(*command)
    open(os.path.join(r.folder, "done"), "w").close()


def train(runs):
    """Trains those that are not finished, the longest first."""
    for r in runs:
        check_identity(r)
    todo = {r: r for r in sorted(runs, key=lambda r: -r.budget) if not r.finished()}
    total = sum(r.budget for r in todo)
    each("training", train_one, todo, lambda: sum(r.budget if r.finished() else min(r.flops(), r.budget) for r in todo) / total)


def ask(r, *arguments, file=False):
    """
    What the program prints about a trained model, or with file=True what it writes into a file, the value of the last argument. Kept beside the model;
    what is kept but does not end with a line is not whole, and asked again.
    """
    words = [str(word) for word in arguments]
    key = hashlib.sha1(" ".join(words + [fingerprint(word) for word in words if os.path.isfile(word)]).encode()).hexdigest()[:12]
    kept = os.path.join(r.folder, f"{words[0]}_{key}")
    if not os.path.exists(kept) or not open(kept, "rb").read().endswith(b"\n"):
        new = f"{kept}.{os.getpid()}"
        output = loopmdm(words[0], "--model", r.folder, *words[1:], *([new] if file else []), "--threads", 1)
        if not file:
            with open(new, "w", encoding="latin-1", newline="") as answer:
                answer.write(output)
        os.rename(new, kept)
    with open(kept, encoding="latin-1", newline="") as answer:
        return answer.read()


def numbers(values):
    """As the program's options take a list."""
    return ",".join(map(str, values))


def loops_of(r):
    """With how many loops it is used: up to twice as many as in training."""
    return [S for S in LOOPS if S <= 2 * r.max_loops] if r.max_loops > 1 else [1]


def nelbo(r, loops=None, seed=1, data=None, rows=None):
    """{S: NELBO} of held-out data, or of others; the same rows and masks for all models of a task, others with another seed."""
    task = TASKS[r.task]
    fixed = ["--answers-after", r.options["answers-after"]] if "answers-after" in r.options else []
    table = ask(r, "eval", "--data", data or task.held_out, "--loops", numbers(loops or loops_of(r)), "--rows", 32 if QUICK else rows or task.rows, "--seed", seed, *fixed)
    return {int(row[0]): row[2] for row in rows_of(table)}


def solved(r, *how):
    """The program's table of how many Sudoku puzzles are solved, the most probable digits first."""
    return rows_of(ask(r, "eval", "--sudoku", "--data", "build/puzzles10.bin", "--rows", 20 if QUICK else 1000, "--batch", 100, *how))


# ----------------------------------------------------------------------------------------------------------------------
# Results: a CSV file, a table and a figure for each experiment

COLORS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"]  # Okabe and Ito: told apart by nearly everyone
MARKERS = "osD^vP*"
plt.rcParams.update({"font.size": 11, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.3, "legend.frameon": False, "lines.markersize": 5})


def save_csv(name, columns, rows):
    """dev/results/NAME.csv, complete or not at all."""
    os.makedirs(RESULTS, exist_ok=True)
    path = os.path.join(RESULTS, name + ".csv")
    with open(path + ".tmp", "w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([columns] + [[f"{x:.6g}" if isinstance(x, float) else x for x in row] for row in rows])
    os.rename(path + ".tmp", path)


def one_part():
    """The axes of a figure of one part."""
    return plt.subplots(figsize=(7, 4))[1]


def finish(ax, name, **labels):
    """Saves a figure of one part with these labels: xlabel, ylabel, title."""
    ax.set(**labels)
    if ax.get_legend_handles_labels()[1]:
        ax.legend()
    save_figure(ax.figure, name)


def save_figure(figure, name):
    """dev/results/NAME.png, as wide as README shows it; the same bytes from the same numbers."""
    figure.tight_layout()
    figure.savefig(os.path.join(RESULTS, name + ".png"), dpi=110, metadata={"Software": None})
    plt.close(figure)


def spread(values, form="{:.4f}"):
    """'mean (lowest to highest)' of the seeds."""
    values = list(values)
    return form.format(mean(values)) + (f" ({form.format(min(values))} to {form.format(max(values))})" if len(values) > 1 else "")


def line(ax, i, what, values, style="-"):
    """One line in color i: the mean over seeds, and a band from the lowest to the highest. values: {x: [value of each seed]}."""
    xs = list(values)
    ax.plot(xs, [mean(values[x]) for x in xs], color=COLORS[i], marker=MARKERS[i], linestyle=style, label=what)
    ax.fill_between(xs, [min(values[x]) for x in xs], [max(values[x]) for x in xs], color=COLORS[i], alpha=0.2, linewidth=0)


def show_by_steps(name, title, what, runs, results, reference=None):
    """
    CSV file, table and figure of what those of LINES that have runs do with each number of denoising steps, and with the FLOPs that sampling takes.

    runs: {(model, seed): Run}; results: {(model, seed): {(S, steps): value}}; what: the value, with its unit; reference: (what, value), a line in the figure.
    """
    all_steps = list(dict.fromkeys(steps for _, steps in results["MDM", 1]))
    lines = [(model, S) for model, S in LINES if (model, 1) in runs]
    gflop = {(model, S): flops_by_loops(runs[model, 1])[S][0] / 1e9 for model, S in lines}
    rows = [[model, seed, S, steps, steps * gflop[model, S], value] for (model, seed), found in results.items() for (S, steps), value in found.items()]
    save_csv(name, ["model", "seed", "loops", "steps", "gflop_per_row", what], rows + ([[reference[0], "", "", "", "", reference[1]]] if reference else []))
    values = {(model, S): {steps: [results[model, seed][S, steps] for seed in SEEDS] for steps in all_steps} for model, S in lines}
    form = "{:.1f}" if "%" in what else "{:.3f}"
    print_table(f"{title}: {what}, by denoising steps; mean (lowest to highest) of {len(SEEDS)} seeds", ["model", "GFLOP per row and step", *all_steps],
                [[label(*key), f"{gflop[key]:.3g}"] + [spread(values[key][steps], form) for steps in all_steps] for key in lines])
    figure, axes = plt.subplots(1, 2, figsize=(9, 4), sharey=True)
    for key in lines:
        i = LINES.index(key)
        line(axes[0], i, label(*key), values[key])
        line(axes[1], i, None, {steps * gflop[key]: values[key][steps] for steps in all_steps})
    if reference:
        for ax in axes:
            ax.axhline(reference[1], color="black", linestyle=":", linewidth=1, label=reference[0])
        print(f"{reference[0]}: {reference[1]:.4f}")
    log_axis(axes[0], all_steps)
    axes[0].set(xlabel="denoising steps", ylabel=what)
    axes[0].legend(fontsize=9)
    costs = [steps * cost for steps in all_steps for cost in gflop.values()]
    log_axis(axes[1], [tick for tick in (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30) if min(costs) < tick < max(costs)])
    axes[1].set(xlabel="sampling, GFLOP per row")
    figure.suptitle(title)
    save_figure(figure, name)


def log_axis(ax, ticks, form="{}", which="x"):
    """A logarithmic axis with these ticks alone."""
    ax.set(**{f"{which}scale": "log"})
    getattr(ax, f"set_{which}ticks")(list(ticks), [form.format(x) for x in ticks])
    ax.minorticks_off()


def print_table(title, columns, rows):
    """A table as README has it."""
    print(f"\n{title}\n")
    print("| " + " | ".join(map(str, columns)) + " |\n|" + "---|" * len(columns))
    for row in rows:
        print("| " + " | ".join(str(cell) for cell in row) + " |")
    print(flush=True)
