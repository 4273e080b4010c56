"""
What the experiments share: tasks, models that are trained with a number of FLOPs, questions to the
program, tables and figures.

./loopmdm does all training and evaluation. Each model uses one thread, and as many models run at a
time as there are cores. A model's folder in build/experiments has a name made of what makes the
model differ from other models of its task, so experiments share models. The folder also keeps what
the program answered about the model. So an experiment that was interrupted continues where it
stopped, and one that is repeated only draws. A change of the program itself is not noticed: remove
build/experiments to start again.

With --quick everything is tiny and goes to build/experiments_quick. This shows that an experiment
works, not what it finds.
"""
import argparse
import csv
import functools
import hashlib
import math
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
from matplotlib.figure import Figure  # without pyplot: it starts faster

parser = argparse.ArgumentParser(description=sys.modules["__main__"].__doc__,
                                 formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--quick", action="store_true",
                    help="tiny models for two steps: does the experiment work?")
parser.add_argument("--jobs", type=int,
                    default=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity")
                    else os.cpu_count(),
                    help="models at a time, each with one thread (default: one for each core)")
parser.add_argument("--task",
                    choices=("sudoku", "stories", "tinystories", "nano", "rule30", "problems",
                             "sudoku9", "text64", "text4", "text12"),
                    help="only this task, if an experiment has several")
parser.add_argument("--puzzles", metavar="FILE", nargs="+", default=[],
                    help="9x9 Sudoku for chains.py: a puzzle, a comma and its solution a line")
parser.add_argument("--model", metavar="FOLDER",
                    help="for copying.py: only test this model of stories")
parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32",
                    help="of the program's matrix products (default: fp32); models and results "
                    "of bf16 have names of their own")
parser.add_argument("--program", metavar="FILE", default="./loopmdm",
                    help="a build of loopmdm (default: ./loopmdm); ./loopmdm_cuda for a GPU")
parser.add_argument("--times", type=int, default=1, metavar="N",
                    help="N times the FLOPs, for a GPU: sqrt(N) times the steps, of sqrt(N) times "
                    "the batch. N is a square; names end in xN")
given = parser.parse_args()
if given.jobs < 1:
    parser.error("--jobs needs 1 or more")
if given.times < 1 or math.isqrt(given.times) ** 2 != given.times:
    parser.error("--times needs a square: 1, 4, 9, 16, ..")
QUICK, JOBS, TIMES, WIDER = given.quick, given.jobs, given.times, math.isqrt(given.times)
if TIMES > 1 and os.path.basename(sys.argv[0]) not in ("chains.py", "stopping.py", "text.py"):
    parser.error("--times is for chains.py, stopping.py and text.py")
SUFFIX = "" if given.precision == "fp32" else "_" + given.precision
SUFFIX += os.path.basename(given.program).removeprefix("loopmdm")  # _cuda
SUFFIX += f"_x{TIMES}" if TIMES > 1 else ""
WORK = ("build/experiments_quick" if QUICK else "build/experiments") + SUFFIX
RESULTS = WORK if QUICK else "dev/results"
SEEDS = (1,) if QUICK else (1, 2, 3)
TERA = 1e12


class Failure(Exception):
    """Ends the experiment with one line."""


def report(kind, error, trace):
    """Prints one line, without a trace, for errors that a user can do something about."""
    if issubclass(kind, (Failure, OSError)):
        print(f"{os.path.basename(sys.argv[0])}: {error}", file=sys.stderr)
    elif issubclass(kind, KeyboardInterrupt):
        print("stopped; the same command goes on from here", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, trace)


sys.excepthook = report
signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))


def pick(quick, full):
    """Returns the value for --quick, or the one for the experiment itself."""
    return quick if QUICK else full


# --------------------------------------------------------------------------------------------------
# Tasks: data, and the options of train that all models of a task have in common


@dataclass(frozen=True)
class Task:
    """Token shards, and options of `loopmdm train` ("" is the value of an option without one)."""
    data: str         # shard to train on
    held_out: str     # shard to evaluate on
    tokenizer: str
    sequences: int    # in an evaluation; a short shard is read again, with other masks
    options: dict     # shape, batch, optimizer; a run may change them. NAME-share is the option
                      # NAME as a share of the steps
    unit: str = "nats per token"
    entropy: float = 0  # of the data in that unit, if known: no NELBO can be lower


def files_in(folder):
    """Returns the shards and the tokenizer that tinystories.py writes into a folder."""
    return folder + "/train.bin", folder + "/val.bin", folder + "/tokenizer.bin"


STORIES = ("build/stories_train.bin", "build/stories_val.bin", "dev/data/stories.tok")
PRESET_TEXT = pick(STORIES, files_in("build/tinystories4096"))
TEXT = pick(STORIES, files_in("build/tinystories1024"))
SMALL = {"layers": 4, "channels": pick(16, 64), "heads": 4, "loop": "1:3", "max-loops": 4,
         "lr": 2e-3, "batch": pick(4, 8)}
# At first some tokens stay visible, see noise_warmup.py.
LONGER = {**SMALL, "seq-len": 128, "batch": pick(4, 4 * WIDER), "warmup-share": 0.1,
          "noise-warmup-share": 0.5}
TASKS = {
    # There are 28,200,960 boards of 6x6. 1 % of the held-out boards are among the 300,000 of
    # training. Their entropy is log(28,200,960) for 36 cells.
    "sudoku": Task("build/sudoku_train.bin", "build/sudoku_val.bin", "build/sudoku_train.tok",
                   16384, {**SMALL, "fixed-rows": "", "seq-len": 36, "batch": pick(4, 32)},
                   "nats per cell", 17.15481 / 36),
    # One story is one sequence.
    "stories": Task(*STORIES, 4096, {**SMALL, "fixed-rows": "", "seq-len": 96}),
    "tinystories": Task(*files_in("build/tinystories512"), 4096, {**SMALL, "seq-len": 64}),
    # A preset. Its options are the ones that recipes.py begins with.
    "nano": Task(*PRESET_TEXT, 2048,
                 {"layers": 6, "heads": 4, "channels": pick(16, 128), "seq-len": 128,
                  "loop": "1:3", "max-loops": 4, "batch": 4, "lr": 2e-3, "warmup": 600}),
    # Problems that need many conclusions, one after the other.
    "rule30": Task("build/rule30_train.bin", "build/rule30_val.bin", "build/rule30_train.tok",
                   1024, {**SMALL, "answers-after": ">", "seq-len": 178, "max-loops": 6,
                          "batch": pick(4, 16 * WIDER)}, "nats per cell"),
    "problems": Task("build/problems_train.bin", "build/problems_val.bin",
                     "dev/data/arithmetic.tok", 3000,
                     {**SMALL, "answers-after": "<|sep|>", "seq-len": 96, "max-loops": 6,
                      "channels": pick(16, 128), "batch": pick(4, 16 * WIDER),
                      "warmup-share": 0.1}, "nats per token after the question"),
    "sudoku9": Task("build/sudoku9_train.bin", "build/sudoku9_val.bin", "build/sudoku9_train.tok",
                    1024, {**SMALL, "fixed-rows": "", "seq-len": 81, "layers": 3,
                           "channels": pick(16, 96), "max-loops": 8, "batch": pick(4, 32 * WIDER),
                           "warmup-share": 0.05, "ema": 0.999, "floor": 0.01}, "nats per cell"),
    # More text, in other shapes.
    "text64": Task(*TEXT, 2048, LONGER),
    "text4": Task(*TEXT, 2048, {**LONGER, "channels": pick(16, 256)}),
    "text12": Task(*TEXT, 2048, {**LONGER, "layers": 12, "channels": pick(16, 128)}),
}


def chosen(*tasks):
    """
    Returns the tasks of an experiment that --task allows. Without --task these are all; those of
    TinyStories only if its shards exist.
    """
    if given.task not in (None, *tasks):
        parser.error(f"--task: this experiment has {', '.join(tasks)}")
    text = pick(("tinystories",), ("tinystories", "nano", "text64", "text4", "text12"))
    ready = [task for task in tasks
             if task not in text or not QUICK and os.path.exists(TASKS[task].data)]
    if given.task and given.task not in ready:
        raise Failure(f"{given.task} needs {TASKS[given.task].data}, which "
                      "make experiments TINYSTORIES=FILES writes (tinystories has no --quick)")
    return [given.task] if given.task else ready


# The three models that most experiments compare. On average, a training step of the last two costs
# the same.
MODELS = {"MDM": {"loop": "0:0"}, "deeper MDM": {"loop": "0:0", "layers": 7}, "LoopMDM": {}}
LOOPS = (1, 2, 4, 8)

# A model, and the number of loops it is used with.
LINES = [("MDM", 1), ("deeper MDM", 1)] + [("LoopMDM", S) for S in LOOPS]


def label(name, S):
    """Returns the name of one of LINES in tables and figures."""
    return f"{name}, S={S}" if name == "LoopMDM" else name


@functools.lru_cache(maxsize=None)
def tokens_of(tokenizer):
    """Returns the vocabulary of a tokenizer.bin, as list[bytes]."""
    with open(tokenizer, "rb") as file:
        data = file.read()
    tokens, at = [], 1024  # after the header, each token is its length and its bytes
    while at < len(data):
        tokens.append(data[at + 1: at + 1 + data[at]])
        at += 1 + data[at]
    return tokens


@functools.lru_cache(maxsize=None)
def fingerprint(path):
    """Returns a hash of a file. The file must not change while the experiment runs."""
    if not os.path.exists(path):
        raise Failure(f"there is no {path}; make experiments makes all that the experiments need")
    with open(path, "rb") as file:
        return hashlib.sha1(file.read()).hexdigest()[:12]


# --------------------------------------------------------------------------------------------------
# The program

children = set()  # processes that run now: they end with the experiment
ending = False    # no new one may begin


def loopmdm(*arguments):
    """
    Runs the program with one thread. Returns what it prints, one character for each byte, because a
    model may write any bytes.
    """
    words = [str(word) for word in arguments]
    if ending:
        raise Failure("the experiment is ending")
    try:
        process = subprocess.Popen([given.program, *words], stdout=subprocess.PIPE,
                                   stderr=subprocess.PIPE,
                                   env={**os.environ, "OMP_NUM_THREADS": "1"})
    except OSError as error:
        raise Failure(f"cannot run {given.program}: {error.strerror}; make builds it") from None
    children.add(process)
    output, said = process.communicate()
    children.discard(process)
    if process.returncode:
        why = (said.decode("latin-1").strip() or "no message").splitlines()[-1]
        raise Failure(
            f"{given.program} {' '.join(words)} ended with status {process.returncode}: {why}")
    return output.decode("latin-1")


def table_of(output):
    """Returns the lines of the program's tables as lists of numbers, without '+-' and '%'."""
    lines = [line.replace("+-", "").replace("%", "") for line in output.splitlines()]
    return [[float(word) for word in line.split()] for line in lines
            if re.fullmatch(r"[\d\s.+\-e]*\d[\d\s.+\-e]*", line)]


def each(what, function, items, progress=None):
    """
    Returns {key: function(item)} for a dictionary of items. JOBS of them run at a time.

    It prints how much is done and how much time is left. progress() returns the part that is done,
    from 0 to 1; without it, the items are counted.
    """
    began, finished = time.time(), []
    if not items:
        return {}
    start = progress() if progress else 0

    def one(item):
        result = function(item)
        finished.append(item)
        return result

    def show():
        share = progress() if progress else len(finished) / len(items)
        left = ""
        if share > start:
            minutes = (time.time() - began) * (1 - share) / (share - start) / 60
            left = f", {minutes:.0f} minutes left"
        print(f"{what}: {len(finished)} of {len(items)}, {100 * share:.0f} %{left}" + " " * 10,
              end="\r" if sys.stdout.isatty() else "\n", flush=True)

    with ThreadPoolExecutor(JOBS) as pool:
        futures = {key: pool.submit(one, item) for key, item in items.items()}
        pending = set(futures.values())
        try:
            while pending:
                done, pending = wait(pending, timeout=2 if sys.stdout.isatty() else 60,
                                     return_when=FIRST_EXCEPTION)
                for future in done:
                    future.result()
                if pending:
                    show()
        except BaseException:  # Ctrl-C too: start nothing new; train saves when it is terminated
            global ending
            ending = True
            pool.shutdown(wait=False, cancel_futures=True)
            for process in list(children):
                process.terminate()
            raise
    print(f"{what}: {len(items)} done in {time.time() - began:.0f} s" + " " * 30, flush=True)
    return {key: future.result() for key, future in futures.items()}


# --------------------------------------------------------------------------------------------------
# Models


@dataclass(frozen=True)
class Run:
    """
    A model of a task, trained with a budget of floating point operations. `changes` are options
    that differ from the task's.
    """
    task: str
    budget: float   # FLOP
    seed: int
    changes: tuple  # of (option, value)

    @property
    def options(self):
        return {**TASKS[self.task].options, **dict(self.changes)}

    @property
    def folder(self):
        words = [self.task]
        words += [f"{name}={value}".replace(":", "-") for name, value in self.changes]
        words += [f"{self.budget / TERA:g}T", f"seed={self.seed}"]
        return os.path.join(WORK, "_".join(words))

    @property
    def max_loops(self):
        """S_max; an ordinary MDM runs all its layers once."""
        return 1 if self.options["loop"] == "0:0" else self.options["max-loops"]

    @property
    def training(self):
        """All options of train that say what is trained, and how."""
        options = {name.removesuffix("-share"):
                   round(value * self.steps) if name.endswith("-share") else value
                   for name, value in self.options.items()}
        return {**options, "max-loops": self.max_loops, "seed": self.seed, "steps": self.steps}

    @property
    def steps(self):
        """The number of optimizer steps for the budget, by the mean cost over p(S)."""
        steps = max(1, round(self.budget / (mean_flops(self) * self.options["batch"])))
        return min(steps, 2) if QUICK else steps

    def flops(self):
        """
        Returns the FLOP of the steps in log.csv. The program counts the loops that it drew and the
        tokens that it masked, so this is exact.
        """
        try:
            with open(os.path.join(self.folder, "log.csv"), "rb") as log:
                log.seek(max(0, os.path.getsize(log.name) - 1000))
                return float(log.read().split(b"\n")[-2].split(b",")[7])
        except (OSError, IndexError, ValueError):
            if self.finished():
                raise Failure(f"{self.folder}/log.csv is not whole: remove {self.folder}, "
                              "and it is trained again") from None
            return 0.0  # the training has not begun yet

    def finished(self):
        return os.path.exists(os.path.join(self.folder, "done"))


def run(task, budget, seed=1, **changes):
    """Returns a Run. Write options with _ in the place of -."""
    base = TASKS[task].options
    changes = {name.replace("_", "-"): value for name, value in changes.items()}
    different = {name: value for name, value in changes.items() if base.get(name) != value}
    return Run(task, budget, seed, tuple(sorted(different.items())))


@functools.lru_cache(maxsize=None)
def flops_of_sequence(layers, heads, channels, T, loop, V):
    """
    Returns {S: (forward, training)} for S from 1 to 24, as the program counts: the FLOP of a
    forward pass over a sequence that is all masked, and of a training step on one half masked.
    """
    output = loopmdm("flops", "--layers", layers, "--heads", heads, "--channels", channels,
                     "--seq-len", T, "--loop", loop, "--max-loops", 24, "--vocab", V)
    return {int(S): (forward * 1e6 * T, training * 1e6 * T)
            for S, _, forward, training, *_ in table_of(output)}


def flops_by_loops(r):
    """Returns flops_of_sequence() of a model."""
    o = r.options
    vocabulary = len(tokens_of(TASKS[r.task].tokenizer))
    return flops_of_sequence(o["layers"], o["heads"], o["channels"], o["seq-len"], o["loop"],
                             vocabulary)


def mean_flops(r):
    """Returns the FLOP of training on a sequence that is half masked: the mean over p(S)."""
    costs = flops_by_loops(r)
    how = r.options.get("loop-dist")
    fewest = {"fixed": r.max_loops, "top": (r.max_loops + 1) // 2}.get(how, 1)
    cost = [costs[S][1] for S in range(fewest, r.max_loops + 1)]
    weights = [1 / c for c in cost] if how == "flops" else [1] * len(cost)
    return sum(w * c for w, c in zip(weights, cost)) / sum(weights)


def check_identity(r):
    """
    Writes into a model's folder everything that determines the model. If the folder says something
    else already, the experiment ends.
    """
    task, note = TASKS[r.task], os.path.join(r.folder, "made_of")
    made_of = "".join(f"{name} {value}\n" for name, value in sorted(r.training.items()))
    made_of += "".join(f"{path} {fingerprint(path)}\n" for path in (task.data, task.tokenizer))
    os.makedirs(r.folder, exist_ok=True)
    if not os.path.exists(note):
        with open(note, "w") as file:
            file.write(made_of)
    elif open(note).read() != made_of:
        raise Failure(f"{r.folder} was begun with other options or data (compare {note}); "
                      "remove it")


def train_one(r):
    """Trains a model, or continues its training."""
    task = TASKS[r.task]
    command = ["train", "--data", task.data, "--val-data", task.held_out,
               "--tokenizer", task.tokenizer, "--out", r.folder,
               "--val-every", pick(r.steps, max(1, r.steps // 10)), "--val-rows", pick(4, 256),
               "--save-every", max(500, r.steps // 20),
               "--threads", 1, "--precision", given.precision]
    for name, value in r.training.items():
        command += [f"--{name}"] + ([value] if value != "" else [])
    if os.path.exists(os.path.join(r.folder, "state.bin")):
        command.append("--resume")
    loopmdm(*command)
    open(os.path.join(r.folder, "done"), "w").close()


def train(runs):
    """Trains the models that are not finished, the longest first."""
    for r in runs:
        check_identity(r)
    todo = {r: r for r in sorted(runs, key=lambda r: -r.budget) if not r.finished()}
    total = sum(r.budget for r in todo)

    def progress():
        spent = (r.budget if r.finished() else min(r.flops(), r.budget) for r in todo)
        return sum(spent) / total

    each("training", train_one, todo, progress)


def ask(r, *arguments, file=False):
    """
    Returns what the program prints about a trained model. With file=True the last argument is an
    option that takes a file, and it returns what the program writes there.

    The model's folder keeps the answer. An answer that does not end with a line end is incomplete,
    and the program is asked again.
    """
    words = [str(word) for word in arguments]
    files = [fingerprint(word) for word in words if os.path.isfile(word)]
    key = hashlib.sha1(" ".join(words + files).encode()).hexdigest()[:12]
    kept = os.path.join(r.folder, f"{words[0]}_{key}")
    if not os.path.exists(kept) or not open(kept, "rb").read().endswith(b"\n"):
        new = f"{kept}.{os.getpid()}"
        how = ["--threads", 1]
        if words[0] != "attention":  # it has no --precision
            how += ["--precision", given.precision]
        output = loopmdm(words[0], "--model", r.folder, *how, *words[1:], *([new] if file else []))
        if not file:
            with open(new, "w", encoding="latin-1", newline="") as answer:
                answer.write(output)
        os.rename(new, kept)
    with open(kept, encoding="latin-1", newline="") as answer:
        return answer.read()


def numbers(values):
    """Returns a list as the program's options take it: "1,2,4"."""
    return ",".join(map(str, values))


def loops_of(r, loops=LOOPS):
    """Returns the numbers of loops to use a model with: up to twice as many as in training."""
    return [S for S in loops if S <= 2 * r.max_loops] if r.max_loops > 1 else [1]


def nelbo(r, loops=None, seed=1, data=None, sequences=None):
    """
    Returns {S: NELBO} of held-out data, or of `data`. All models of a task see the same sequences
    and masks; another seed gives other masks.
    """
    task = TASKS[r.task]
    how = ["--loops", numbers(loops or loops_of(r)), "--seed", seed,
           "--rows", pick(8, sequences or task.sequences)]
    if "answers-after" in r.options:
        how += ["--answers-after", r.options["answers-after"]]
    table = table_of(ask(r, "eval", "--data", data or task.held_out, *how))
    return {int(S): loss for S, _, loss, *_ in table}


def best_rates(task, budget, models, rates, seeds=(1,)):
    """
    Trains models ({name: changes}) with each highest learning rate and each of some seeds, and
    prints a table. Returns ({(name, rate): NELBO with the most loops in training, other masks than
    those of results, mean of the seeds}, {name: the best rate}).
    """
    runs = {(name, rate, seed): run(task, budget, seed, lr=rate, **changes)
            for name, changes in models.items() for rate in rates for seed in seeds}
    train(runs.values())
    found = each("evaluating", lambda r: nelbo(r, [r.max_loops], seed=2)[r.max_loops], runs)
    tuned = {(name, rate): mean(found[name, rate, seed] for seed in seeds)
             for name in models for rate in rates}
    print_table(f"{task}: NELBO by highest learning rate, {budget / TERA:g} TFLOP, "
                f"{of_seeds(seeds)}", ["model"] + [f"{rate:g}" for rate in rates],
                [[name] + [spread(found[name, rate, seed] for seed in seeds) for rate in rates]
                 for name in models])
    best = {name: min(rates, key=lambda rate: tuned[name, rate]) for name in models}
    for name, rate in best.items():
        if len(rates) > 1 and rate in (min(rates), max(rates)):
            print(f"{name}: the best rate, {rate:g}, is the last that was tried\n")
    return tuned, best


def solved(r, *how):
    """Returns the program's table of solved Sudoku puzzles, the most probable digits first."""
    return table_of(ask(r, "eval", "--sudoku", "--data", "build/puzzles10.bin",
                        "--rows", pick(8, 1000), "--batch", pick(8, 100), *how))


# --------------------------------------------------------------------------------------------------
# Results: a CSV file, a table and a figure for each experiment

# The colours of Okabe and Ito: nearly everyone can tell them apart.
COLORS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"]
MARKERS = "osD^vP*"
matplotlib.rcParams.update({
    "font.size": 11, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True,
    "grid.alpha": 0.3, "legend.frameon": False, "lines.markersize": 5})


def save_csv(name, columns, lines, keep=None):
    """
    Writes dev/results/NAME.csv, complete or not at all.

    keep: (column, value). The lines of the present file with this value stay, at the end: the
    program had an option then that it no longer has.
    """
    os.makedirs(RESULTS, exist_ok=True)
    path = os.path.join(RESULTS, name + SUFFIX + ".csv")
    kept = []
    if keep and os.path.exists(path):
        with open(path, newline="") as file:
            kept = [line.values() for line in csv.DictReader(file) if line[keep[0]] == keep[1]]
    new = [[f"{x:.6g}" if isinstance(x, float) else x for x in line] for line in lines]
    with open(path + ".tmp", "w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([columns, *new, *kept])
    os.rename(path + ".tmp", path)


def new_figure(parts=1, sharey=False):
    """Returns a figure and the axes of its parts, which stand side by side."""
    figure = Figure(figsize=(7 if parts == 1 else 9, 4))
    return figure, figure.subplots(1, parts, squeeze=False, sharey=sharey)[0]


def save_figure(figure, name):
    """
    Writes dev/results/NAME.png, in the width that README shows. The same numbers give the same
    bytes.
    """
    if not QUICK:
        figure.tight_layout()
    path = os.path.join(RESULTS, name + SUFFIX + ".png")
    figure.savefig(path, dpi=pick(30, 110), metadata={"Software": None})


def finish(ax, name, **labels):
    """Adds labels (xlabel, ylabel, title) and a legend to a figure of one part, and saves it."""
    ax.set(**labels)
    if ax.get_legend_handles_labels()[1]:
        ax.legend()
    save_figure(ax.figure, name)


def spread(values, form="{:.4f}"):
    """Returns 'mean (lowest to highest)' of the values of the seeds."""
    values = list(values)
    text = form.format(mean(values))
    if len(values) > 1:
        text += f" ({form.format(min(values))} to {form.format(max(values))})"
    return text


def line(ax, i, what, values, style="-"):
    """
    Draws one line in colour i, the mean of the seeds, and a band from the lowest to the highest.
    values: {x: [value of each seed]}.
    """
    xs = list(values)
    ax.plot(xs, [mean(values[x]) for x in xs], color=COLORS[i], marker=MARKERS[i],
            linestyle=style, label=what)
    ax.fill_between(xs, [min(values[x]) for x in xs], [max(values[x]) for x in xs],
                    color=COLORS[i], alpha=0.2, linewidth=0)


def points(ax, values):
    """
    Draws one below the other what is compared: a point for each seed, and a line at the mean.
    values: {name: [value of each seed]}.
    """
    for i, found in enumerate(values.values()):
        ax.plot(found, [-i] * len(found), "o", color=COLORS[0])
        ax.plot([mean(found)] * 2, [-i - 0.25, -i + 0.25], color=COLORS[0], linewidth=2)
    ax.set_yticks([-i for i in range(len(values))], list(values))
    ax.grid(axis="y", visible=False)


def log_axis(ax, ticks, form="{}", which="x"):
    """Makes an axis logarithmic, with these ticks only."""
    ax.set(**{f"{which}scale": "log"})
    getattr(ax, f"set_{which}ticks")(list(ticks), [form.format(x) for x in ticks])
    ax.minorticks_off()


def print_table(title, columns, lines):
    """Prints a table in Markdown, as README has it."""
    print(f"\n{title}\n")
    print("| " + " | ".join(map(str, columns)) + " |\n|" + "---|" * len(columns))
    for cells in lines:
        print("| " + " | ".join(map(str, cells)) + " |")
    print(flush=True)


def of_seeds(seeds=SEEDS):
    """Returns how the titles of tables describe their numbers."""
    if len(seeds) == 1:
        return "one seed"
    return f"mean (lowest to highest) of {len(seeds)} seeds"


def show_by_steps(name, title, what, runs, results, reference=None):
    """
    Writes the CSV file, table and figure of a value by the number of denoising steps, and by the
    FLOPs of sampling.

    runs: {(model, seed): Run}; results: {(model, seed): {(S, steps): value}}; what: the value, with
    its unit; reference: (what, value), a horizontal line in the figure.
    """
    all_steps = list(dict.fromkeys(steps for _, steps in results["MDM", 1]))
    lines = [(model, S) for model, S in LINES if (model, 1) in runs]
    gflop = {(model, S): flops_by_loops(runs[model, 1])[S][0] / 1e9 for model, S in lines}

    data = [[model, seed, S, steps, steps * gflop[model, S], value]
            for (model, seed), found in results.items() for (S, steps), value in found.items()]
    if reference:
        data.append([reference[0], "", "", "", "", reference[1]])
    save_csv(name, ["model", "seed", "loops", "steps", "gflop_per_row", what], data)

    values = {(model, S): {steps: [results[model, seed][S, steps] for seed in SEEDS]
                           for steps in all_steps} for model, S in lines}
    form = "{:.1f}" if "%" in what else "{:.3f}"
    print_table(f"{title}: {what}, by denoising steps; {of_seeds()}",
                ["model", "GFLOP per sequence and step", *all_steps],
                [[label(*key), f"{gflop[key]:.3g}"]
                 + [spread(values[key][steps], form) for steps in all_steps] for key in lines])

    figure, axes = new_figure(2, sharey=True)
    for key in lines:
        i = LINES.index(key)
        line(axes[0], i, label(*key), values[key])
        line(axes[1], i, None,
             {steps * gflop[key]: values[key][steps] for steps in all_steps})
    if reference:
        for ax in axes:
            ax.axhline(reference[1], color="black", linestyle=":", linewidth=1, label=reference[0])
        print(f"{reference[0]}: {reference[1]:.4f}")
    log_axis(axes[0], all_steps)
    axes[0].set(xlabel="denoising steps", ylabel=what)
    axes[0].legend(fontsize=9)
    costs = [steps * cost for steps in all_steps for cost in gflop.values()]
    ticks = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30)
    log_axis(axes[1], [tick for tick in ticks if min(costs) < tick < max(costs)])
    axes[1].set(xlabel="sampling, GFLOP per sequence")
    figure.suptitle(title)
    save_figure(figure, name)
