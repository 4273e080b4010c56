"""
The checks of the page in dev/demo/web: loopmdm.wasm gives the tokens of ./loopmdm, and in a browser
the page does what it says. Without Chromium and its driver the second half is left out.

    .venv/bin/python dev/test/test_web.py [--screenshot FILE]

`make test` runs it in the root of the repository, with the models of dev/models.
"""
import argparse
import functools
import http.server
import re
import shutil
import struct
import sys
import threading
import time

import numpy as np
import torch
import torch.nn.functional as F
import wasmtime

import test_python as checks
from test_python import check, file_bytes, run_loopmdm

sys.path.insert(0, ".")
import train_gpt2style as reference  # noqa: E402

PAGE, MODELS = "dev/demo/web", "dev/models"
STORIES, SUDOKU = 0, 1
NAMES = ("stories", "sudoku")
ORDERS = ("random", "confidence", "margin", "entropy")
PUZZLE = "....8..6...367.4.86..1.3.57..8.5..311........5....29..3.4..7..................142"
SOLUTION = "741285369253679418689143257428956731197834625536712984314527896862491573975368142"
BLOCKS = (96, 24, 7)
SEEDS = range(1, 21)


class Program:
    """loopmdm.wasm with both models. Its functions are those of web.c."""

    def __init__(self):
        engine = wasmtime.Engine()
        self.store, linker = wasmtime.Store(engine), wasmtime.Linker(engine)
        self.steps, self.loops, self.passes, self.said = [], [], [], b""
        number = wasmtime.ValType.i32()

        def give(module, name, function, count, results=()):
            kind = wasmtime.FuncType([number] * count, results)
            linker.define_func(module, name, kind, function)

        give("page", "step", lambda k, x, g, p: self.steps.append(
            (k, self.ints(x), self.ints(g), self.floats(p))), 4)
        give("page", "loop", lambda k, g, p: self.loops.append((self.ints(g), self.floats(p))), 3)
        give("page", "attention", lambda k, layer, w: self.passes.append(
            (layer, self.floats(w))), 3)
        wasi = "wasi_snapshot_preview1"
        give(wasi, "fd_write", self.write, 4, [number])
        linker.define_func(wasi, "fd_seek", wasmtime.FuncType(
            [number, wasmtime.ValType.i64(), number, number], [number]), lambda *_: 0)
        give(wasi, "fd_fdstat_get", lambda *_: 0, 2, [number])
        give(wasi, "proc_exit", self.exit, 1)
        module = wasmtime.Module(engine, file_bytes(PAGE, "loopmdm.wasm"))
        self.exports = linker.instantiate(self.store, module).exports(self.store)
        self.call("_initialize")

    def call(self, name, *values):
        return self.exports[name](self.store, *values)

    def write(self, file, pieces, n, written):
        at = struct.unpack(f"<{2 * n}I", self.read(pieces, 8 * n))
        text = b"".join(self.read(*at[i:i + 2]) for i in range(0, 2 * n, 2))
        self.said += text
        self.put(written, struct.pack("<I", len(text)))
        return 0

    def exit(self, status):
        raise RuntimeError(self.said.decode().strip())

    def read(self, at, n):
        return bytes(self.exports["memory"].read(self.store, at, at + n))

    def put(self, at, data):
        self.exports["memory"].write(self.store, data, at)

    def ints(self, at):
        return np.frombuffer(self.read(at, 4 * self.T), np.int32)

    def floats(self, at):
        return np.frombuffer(self.read(at, 4 * self.T), np.float32)

    def text(self, text):
        data = text.encode() + b"\0"
        at = self.call("malloc", len(data))
        self.put(at, data)
        return at

    def open(self, name, model, tokenizer):
        for file, data in (("model.bin", model), ("tokenizer.bin", tokenizer)):
            self.put(self.call("web_file", self.text(f"{name}/{file}"), len(data)), data)
        return self.call("web_open", self.text(name))

    def encode(self, model, text):
        self.T = self.call("web_encode", model, self.text(text))
        return self.ints(self.call("web_tokens", self.T)).tolist()

    def set_tokens(self, tokens):
        self.T = len(tokens)
        self.put(self.call("web_tokens", self.T), struct.pack(f"<{self.T}i", *tokens))

    def sample(self, model, tokens, loops, steps, order, block, temperature, seed):
        self.steps = []
        self.set_tokens(tokens)
        self.call("web_sample", model, self.T, loops, steps, ORDERS.index(order),
                  block, float(temperature), float(seed))
        return self.steps[-1][1].tolist()

    def look(self, model, tokens, loops, query):
        self.loops, self.passes = [], []
        self.set_tokens(tokens)
        self.call("web_look", model, self.T, loops, query)


def tokens_of(name):
    """The bytes of each token of a model's vocabulary, and the id of end-of-text."""
    return checks.gsm.read_tokenizer_bin(f"{MODELS}/{name}/tokenizer.bin")


def story_text(tokens):
    """What ./loopmdm prints of the tokens of a story."""
    vocabulary, eot = tokens_of("stories")
    tokens = tokens[1:]
    end = tokens.index(eot) if eot in tokens else len(tokens)
    return b"".join(vocabulary[t] for t in tokens[:end]).decode()


def story_of_program(seed, order, block, prompt):
    return run_loopmdm("sample", "--model", f"{MODELS}/stories", "--prompt", prompt,
                       "--steps", "24", "--order", order, "--block", str(block), "--loops", "2",
                       "--temperature", "0.7", "--seed", str(seed))[:-1]


def board_tokens(mask):
    digits, _ = tokens_of("sudoku")
    return [mask if c == "." else digits.index(c.encode()) for c in PUZZLE]


def check_program():
    program = Program()
    files = [[file_bytes(MODELS, name, file) for file in ("model.bin", "tokenizer.bin")]
             for name in NAMES]
    check("both models open", [program.open(*pair) for pair in zip(NAMES, *zip(*files))] != [0, 1])

    # The sampler.
    wrong = 0
    T, mask = struct.unpack("<2i", files[STORIES][0][8:16])
    for seed in SEEDS:
        order, block = ORDERS[seed % len(ORDERS)], BLOCKS[seed % len(BLOCKS)]
        tokens = program.encode(STORIES, "Kate had")
        tokens += [mask] * (T - len(tokens))
        last = program.sample(STORIES, tokens, 2, 24, order, block, 0.7, seed)
        wrong += story_text(last) != story_of_program(seed, order, block, "Kate had")
    check(f"stories of {len(SEEDS)} seeds in four orders that differ from ./loopmdm's", wrong)
    for order in ORDERS:
        check_steps(program, order, tokens)
    tokens = program.encode(STORIES, "Kate had a small ____ to eat in the ____.")
    last = program.sample(STORIES, tokens, 2, 2, "confidence", T, 0, 1)
    check("a template keeps its words",
          any(a != b and a != mask for a, b in zip(tokens, last)) or mask in last)

    mask = struct.unpack("<2i", files[SUDOKU][0][8:16])[1]
    board = board_tokens(mask)
    digits, _ = tokens_of("sudoku")
    wrong = 0
    for loops in (1, 4, 8, 24):
        for steps in (1, 5):
            last = program.sample(SUDOKU, board, loops, steps, "confidence", 81, 0, 1)
            said = run_loopmdm("sample", "--model", f"{MODELS}/sudoku", "--puzzle", PUZZLE,
                               "--steps", str(steps), "--loops", str(loops), "--temperature", "0")
            wrong += b"".join(digits[t] for t in last).decode() != re.sub(r"\D", "", said)
    check("boards of 1 to 24 loops and 1 and 5 steps that differ from ./loopmdm's", wrong)
    check_look(program, board, mask)

    damaged = bytearray(files[STORIES][0])
    damaged[5000] ^= 1
    try:
        Program().open("stories", bytes(damaged), files[STORIES][1])
        said = "nothing"
    except Exception as error:  # a trap of wasmtime, with the exception of exit() inside
        said = str(error)
    check("a damaged model ends with the program's line", "checksum is wrong" not in said)


def check_steps(program, order, tokens):
    """What the page gets of each step of a greedy story is what PyTorch says of its blanks."""
    model, _ = reference.model_load(f"{MODELS}/stories")
    mask = model.config.vocab_size
    program.sample(STORIES, tokens, 2, 6, order, 40, 0, 1)
    before, differ, wrong = np.array(tokens), 0, 0.0
    for _, x, guess, p in program.steps:
        blank = before == mask
        known = np.flatnonzero(blank)
        with torch.no_grad():
            logits = model.logits(model(torch.from_numpy(before)[None], 2)[0, known])
        most, likeliest = logits.softmax(dim=-1).max(dim=-1)
        filled = x[known] != mask
        differ += (guess[known] != likeliest.numpy()).sum()
        differ += (x[known] != guess[known])[filled].sum()
        wrong = max(wrong, np.abs(p[known] - most.numpy()).max())
        before = x.copy()
    check(f"{order}: steps' guesses that differ from PyTorch's, or from their tokens", differ)
    check(f"{order}: probabilities", wrong, 1e-3)
    check(f"{order}: a blank is left", mask in before)


def check_look(program, board, mask):
    """web_look() beside PyTorch: guesses after each loop, attention of each pass."""
    model, _ = reference.model_load(f"{MODELS}/sudoku")
    c, query, loops = model.config, board.index(mask), 5
    program.look(SUDOKU, board, loops, query)
    check("look: a guess for each loop, attention for each pass",
          (len(program.loops), len(program.passes))
          != (loops, reference.num_passes(c, loops)))
    x = torch.tensor([board])
    blanks = (x[0] == mask).nonzero().squeeze(1)
    with torch.no_grad():
        wrong = 0
        for S, (guess, p) in enumerate(program.loops, 1):
            want = model.logits(model(x, S)[0, blanks]).softmax(dim=-1)
            wrong = max(wrong, np.abs(want.max(dim=-1)[0].numpy() - p[blanks]).max())
            check(f"look: guesses after loop {S}",
                  (want.argmax(dim=-1).numpy() != guess[blanks]).sum())
        check("look: their probabilities", wrong, 1e-3)

        h, layers, wrong = model.wte[x] + model.wpe[:x.shape[1]], model.layers(), 0
        for p, (layer, weight) in enumerate(program.passes):
            w = layers[reference.layer_of_pass(c, loops, p)]
            check(f"look: the layer of pass {p}", layer != reference.layer_of_pass(c, loops, p))
            qkv = F.linear(F.layer_norm(h, (c.channels,), w.ln1w, w.ln1b), w.qkvw, w.qkvb)
            q, k, _ = qkv.view(1, -1, 3, c.heads, c.channels // c.heads).permute(2, 0, 3, 1, 4)
            q, k = model.rope(q), model.rope(k)
            scores = q[0, :, query:query + 1] @ k[0].transpose(1, 2) / k.shape[-1] ** 0.5
            want = scores.softmax(dim=-1).mean(dim=0)[0].numpy()
            wrong = max(wrong, np.abs(want - weight).max())
            h = model.block(h, w)
        check("look: attention", wrong, 1e-4)


# ---- the page in a browser ----


class Files(http.server.SimpleHTTPRequestHandler):
    """Serves the page's folder and says nothing."""

    def log_message(self, *_):
        pass


def browser():
    """Returns a headless Chromium with its driver, or None if there is none."""
    program = shutil.which("chromium") or shutil.which("google-chrome")
    driver = shutil.which("chromedriver")
    if not program or not driver:
        return None
    from selenium import webdriver
    options = webdriver.ChromeOptions()
    options.binary_location = program
    for word in ("--headless=new", "--no-sandbox", "--window-size=900,1150",
                 "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"):
        options.add_argument(word)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    return webdriver.Chrome(options, webdriver.ChromeService(driver))


class Page:
    def __init__(self, driver, address):
        self.driver, began = driver, time.time()
        driver.get(address)
        check("page: it is ready", not self.comes(
            lambda: self.script("return document.body.dataset.ready")))
        self.ready = time.time() - began

    def script(self, text, *values):
        return self.driver.execute_script(text, *values)

    def comes(self, condition, seconds=30):
        """Whether a condition becomes true."""
        end = time.time() + seconds
        while not condition():
            if time.time() > end:
                return False
            time.sleep(0.02)
        return True

    def find(self, css):
        return self.driver.find_element("css selector", css)

    def set(self, name, value, event="input"):
        self.script("const e = document.getElementById(arguments[0]); e.value = arguments[1];"
                    "e.dispatchEvent(new Event(arguments[2], {bubbles: true}));",
                    name, value, event)

    def tokens(self, name, action):
        """Calls action(), and returns the tokens that come after it."""
        self.script("delete document.getElementById(arguments[0]).dataset.tokens", name)
        action()
        read = "return document.getElementById(arguments[0]).dataset.tokens"
        self.comes(lambda: self.script(read, name))
        return [int(word) for word in (self.script(read, name) or "").split()]


def check_play(page, view):
    """Play shows all steps, from 0 to the last, and ends."""
    button, seen = page.find(f"#{view}-play"), set()
    last = page.find(f"#{view}-step").get_attribute("max")
    button.click()

    def ends():
        seen.add(page.find(f"#{view}-step").get_property("value"))
        return button.text == "Play"

    ended = page.comes(ends)
    check(f"page: {view}: Play goes from 0 to {last} and ends",
          not ended or not {"0", last} <= seen | {page.find(f"#{view}-step").get_property("value")})


def check_page(driver, screenshot):
    server = http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), functools.partial(Files, directory=PAGE))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    page = Page(driver, f"http://127.0.0.1:{server.server_port}/index.html")
    print(f"      the first story and board stand there {page.ready:.1f} s after the request")

    # A story.
    if screenshot:
        page.set("story-step", 64)
        driver.save_screenshot(screenshot)
    write = page.find("#story-form button.main")
    wrong = 0
    for name, value in {"start": "Kate had", "steps": 24, "loops": 2, "temperature": 0.7}.items():
        page.set(f"story-{name}", value)
    for seed in SEEDS:
        page.set("story-seed", seed)
        page.set("story-order", ORDERS[seed % len(ORDERS)], "change")
        page.set("story-block", BLOCKS[seed % len(BLOCKS)])
        tokens = page.tokens("story-text", write.click)
        wrong += story_text(tokens) != story_of_program(seed, ORDERS[seed % len(ORDERS)],
                                                        BLOCKS[seed % len(BLOCKS)], "Kate had")
    check(f"page: stories of {len(SEEDS)} seeds that differ from ./loopmdm's", wrong)
    blanks = "return document.querySelectorAll('#story-text .blank').length"
    words = "return [...document.querySelectorAll('#story-text button')].map(e => e.textContent)"
    last = page.script(words)
    page.set("story-step", 0)
    check("page: at step 0 all but the prompt is blank",
          page.script(blanks) < 20 or page.script(words)[:2] != last[:2])
    page.set("story-step", page.find("#story-step").get_attribute("max"))
    check("page: at the last step nothing is blank", page.script(blanks))

    def click(i):
        driver.find_elements("css selector", "#story-text button")[i].click()

    click(5)
    check("page: a word that is clicked is blank", page.script(blanks) < 1)
    focused = "return document.activeElement.textContent"
    click(3)
    click(3)
    check("page: clicked again it is there again, and has the focus",
          page.script(words)[3] != last[3] or page.script(focused) != last[3])
    page.tokens("story-text", page.find("#story-again").click)
    check("page: blanks are filled in again", page.script(blanks))
    page.find("#story-again").click()
    check("page: without a blank a line says so", not page.comes(
        lambda: "no blank" in page.find("#status").text) or page.script(words) == [])
    check_play(page, "story")
    page.set("story-steps", 4)
    page.set("story-block", 7)
    write.click()
    check("page: too few steps for so many blocks: a line says so",
          not page.comes(lambda: "14 blocks" in page.find("#status").text))
    page.set("story-start", "x " * 300)
    write.click()
    check("page: a text that is too long: a line says so",
          not page.comes(lambda: "are possible" in page.find("#status").text))

    page.set("story-start", "One")
    silent = []
    for name, value, said in (
            ("steps", 0, "Denoising steps: give a whole number from 1 to 96."),
            ("loops", 25, "Loops: give a whole number from 1 to 24."),
            ("block", "", "Blocks of: give a whole number from 1 to 96."),
            ("temperature", -1, "Temperature: give a number from 0 to 2."),
            ("seed", 1.5, "Seed: give a whole number from 1 to 999999.")):
        before = page.find(f"#story-{name}").get_property("value")
        page.set(f"story-{name}", value)
        page.script("document.querySelector('details').open = false")
        write.click()
        if not page.comes(lambda: page.find("#status").text == said):
            silent.append(name)
        if page.script("return document.activeElement.id") != f"story-{name}":
            silent.append(f"focus of {name}")
        page.set(f"story-{name}", before)
    check(f"page: numbers that are not possible: a line says so {silent}", len(silent))

    # Keys: the tabs, then a board.
    tab = page.find("#tab-story")
    tab.click()
    tab.send_keys("\ue014")  # right
    check("page: the right arrow opens the next tab", not page.find("#sudoku").is_displayed())
    page.set("sudoku-puzzle", PUZZLE, "change")
    wrong = 0
    digits, _ = tokens_of("sudoku")
    for loops in (1, 6, 24):
        page.set("sudoku-loops", loops)
        tokens = page.tokens("sudoku-board", page.find("#sudoku-form button.main").click)
        said = run_loopmdm("sample", "--model", f"{MODELS}/sudoku", "--puzzle", PUZZLE, "--steps",
                           "5", "--loops", str(loops), "--temperature", "0")
        wrong += b"".join(digits[t] for t in tokens).decode() != re.sub(r"\D", "", said)
    check("page: boards of three numbers of loops that differ from ./loopmdm's", wrong)
    page.set("sudoku-step", 0)
    page.set("sudoku-loop", 1)
    check("page: a guess for each blank", not page.comes(lambda: page.script(
        "return document.querySelectorAll('#sudoku-board .guess').length") == PUZZLE.count(".")))
    guesses = page.script("return [...document.querySelectorAll('#sudoku-board button')]"
                          ".map(e => e.textContent).join('')")
    wrong = sum(a != b for a, b in zip(guesses, SOLUTION))
    check(f"page: of {wrong} wrong guesses after one loop each is red",
          wrong < 1 or page.find("#sudoku-count").text != f"{wrong} wrong digits"
          or wrong != page.script(
              "return document.querySelectorAll('#sudoku-board .wrong').length"))
    for position, digit in ((4, "9"), (40, "6")):
        page.find(f"#sudoku-board button[data-position='{position}']").click()
        driver.switch_to.active_element.send_keys(digit)
    check("page: digits are typed into the cells that were clicked", page.script(
        "return [4, 40].map(i => document.querySelector("
        "`#sudoku-board [data-position='${i}']`).textContent).join('')") != "96")
    driver.switch_to.active_element.send_keys("x")
    check("page: a letter in a cell: a line says what to type",
          not page.comes(lambda: "1 to 9" in page.find("#status").text))
    check("page: then there is no solution",
          not page.comes(lambda: "no solution" in page.find("#sudoku-count").text))
    page.set("sudoku-puzzle", PUZZLE, "change")
    for name, value in {"steps": 2, "loops": 2}.items():
        page.set(f"sudoku-{name}", value)
    page.tokens("sudoku-board", page.find("#sudoku-form button.main").click)
    check_play(page, "sudoku")
    page.find("#sudoku-clear").click()
    check("page: an empty board has more than one solution",
          not page.comes(lambda: "more than one" in page.find("#sudoku-count").text))

    # Attention, of both.
    page.set("sudoku-puzzle", PUZZLE, "change")
    groups = {"sudoku": "board", "story": "text"}
    for of, group in groups.items():
        page.find("#tab-attention").click()
        page.set("attention-of", of, "change")
        chosen = "selected" if of == "sudoku" else "pressed"
        count = (f"return document.querySelectorAll('#attention-{group} [aria-{chosen}=true]')"
                 ".length")
        check(f"page: attention of the {of} shows its query, and nothing else is shown",
              not page.comes(lambda: page.script(count) == 1) or [of] != [
                  name for name, other in groups.items()
                  if page.find(f"#attention-{other}").is_displayed()])

    # What a person needs who does not see the page, or has a phone.
    unnamed, wide = [], 0
    page.script("document.querySelector('details').open = true")
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", {
        "width": 390, "height": 800, "deviceScaleFactor": 1, "mobile": True})
    for tab in ("story", "sudoku", "attention"):
        page.find(f"#tab-{tab}").click()
        controls = driver.find_elements(
            "css selector", f"#{tab} :is(input, select, textarea), #{tab} form button")
        unnamed += [e.get_attribute("outerHTML") for e in controls if not e.accessible_name]
        wide += page.script(
            "return innerWidth !== 390 || document.documentElement.scrollWidth > 390")
        wide += page.script("""return [...document.querySelectorAll('.board .cell')].some(
            (e, i) => e.offsetParent && !(e.offsetWidth > 20 && e.offsetWidth < 50
                && Math.abs(e.offsetHeight - e.offsetWidth) < 3))""")
    check(f"page: controls without a name {unnamed}", len(unnamed))
    check("page: on a phone nothing is wider than the screen, and cells are small squares", wide)
    said = [line["message"] for line in driver.get_log("browser")]
    check(f"page: what the console says, of requests to other hosts too {said}", len(said))


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--screenshot", metavar="FILE", help="keep a picture of the first view")
    args = parser.parse_args()
    check_program()
    driver = browser()
    if driver:
        try:
            check_page(driver, args.screenshot)
        finally:
            driver.quit()
    else:
        print("no Chromium with its driver: the page was not looked at")
    print(f"{checks.passed} passed, {checks.failed} failed")
    sys.exit(checks.failed > 0)


if __name__ == "__main__":
    main()
