"""
Makes the moving picture of README.md: a story that appears out of masks, beside a Sudoku board
that the model fills in with a single denoising step, shown after each loop.

    .venv/bin/python dev/demo/demo.py

Everything in the picture is what ./loopmdm prints; README.md beside this file says which commands.
"""
import argparse
import math
import os
import re
import struct
import subprocess
import sys

import matplotlib
from PIL import Image, ImageColor, ImageDraw, ImageFont

sys.path.insert(0, os.path.join(os.path.dirname(__file__), "..", ".."))
from dev.data import outputs  # noqa: E402

# A puzzle that the model solves loop after loop. Another model may not: see find_puzzle.
PUZZLE = (".71..28.. 6.......1 3...1..65 ..43...1. ...1..5.4 "
          "8..2...96 123.4..7. ...9.31.. .9.8.....")
SIDE, BOX_ROWS, BOX_COLUMNS = 9, 3, 3
MOST_PUZZLES = 300
LOOPS = 8
STORY_STEPS = 48
MASK = "__"

# All lengths below are for a picture of 900 x 360. It is drawn SCALE times as large, so that it is
# sharp on screens with small pixels too.
SCALE = 2
WIDTH, HEIGHT = 900, 360
STORY_LEFT, STORY_TOP, STORY_WIDTH, LINE = 32, 106, 462, 30
BOARD_LEFT, BOARD_TOP, CELL = 526, 94, 24
BOARD_WIDTH = SIDE * CELL
SPARE_WIDTH = 26  # of a mask that turns into the end of the text
COUNTS_LEFT, COUNTS_RIGHT = BOARD_LEFT + BOARD_WIDTH + 16, 878
FOOTER = 336

FIRST_MS, STEP_MS, LAST_MS = 1200, 140, 3000
HIGHLIGHTED = 2  # frames for which a new word or digit is
MOST_BYTES = 400000

PAPER = "#fbfaf7"
GREY = "#dddbd4"
INK = "#22252a"
QUIET = "#6d7178"
FRESH = "#ffe38f"
RIGHT = "#2465c0"
WRONG = "#d1242f"
WRONG_CELL = "#fbdcda"
# Which text stands on what. The smooth edges of letters are mixtures of the two colours.
PAIRS = ((PAPER, INK), (PAPER, QUIET), (PAPER, RIGHT), (PAPER, WRONG), (FRESH, INK),
         (FRESH, RIGHT), (WRONG_CELL, WRONG))


def fail(message):
    sys.exit(f"demo.py: {message}")


def run(program, *arguments):
    """The lines that the program prints. Its output is no terminal, so --watch prints lines too."""
    try:
        result = subprocess.run([program, *arguments], stdout=subprocess.PIPE,
                                stderr=subprocess.PIPE, text=True)
    except OSError as error:
        fail(f"{program} does not run ({error.strerror}); make builds it, or name it by --program")
    if result.returncode:
        fail(f"{program} {arguments[0]}: {result.stderr.strip()}")
    return result.stdout.splitlines()


# ---------------------------------------------------------------------------------------------
# The story

def tokens_of(program, model, text):
    """The text of each token, as tokenize prints it: `   636  'Mia'`, a new line as '\\x0a'."""
    tokenizer = os.path.join(model, "tokenizer.bin")
    lines = run(program, "tokenize", "--tokenizer", tokenizer, "--text", text)
    tokens = [re.fullmatch(r"\s*\d+  '(.*)'", line) for line in lines]
    return [token.group(1).replace("\\x0a", "\n") for token in tokens if token]


def match(tokens, line):
    """Which tokens of the finished story a line of --watch shows, and how many masks follow them.

    tokens ["Mia", " ran", "."] and line "Mia __." give [True, False, True] and 0.
    None if the line is of other tokens.
    """
    shown = []
    for i, token in enumerate(tokens):
        # A new line of the story is a space in the line, and the line begins without a space.
        token = token.replace("\n", " ")
        mask = " " + MASK
        if i == 0:
            token, mask = token.lstrip(), MASK
        if line.startswith(mask):
            shown.append(False)
            line = line[len(mask):]
        elif line.startswith(token):
            shown.append(True)
            line = line[len(token):]
        else:
            return None
    # What is left must be masks.
    after = line.count(MASK)
    return (shown, after) if line == (" " + MASK) * after else None


def write_story(program, model, seed):
    """The tokens of a story, and for each step which are shown and how many masks follow."""
    lines = run(program, "sample", "--model", model, "--steps", str(STORY_STEPS),
                "--temperature", "0.7", "--seed", str(seed), "--watch")
    # One line for each step, " 12 | Mia __ to", then the finished story.
    steps = [re.fullmatch(r" *\d+ \| (.*)", line) for line in lines]
    steps = [step.group(1) for step in steps if step]
    story = "\n".join(lines[len(steps):])
    tokens = tokens_of(program, model, story)
    states = [match(tokens, step) for step in steps]
    if len(states) != STORY_STEPS or None in states:
        fail(f"the lines of --watch do not agree with the story of --seed {seed}; try another")
    return tokens, states


# ---------------------------------------------------------------------------------------------
# The Sudoku

def is_solution(board):
    """Does each digit stand once in each row, column and box?"""
    digits = set("123456789")
    for i in range(SIDE):
        # Box i begins here: boxes 0, 1 and 2 stand beside each other.
        top = i // (SIDE // BOX_COLUMNS) * BOX_ROWS
        left = i % (SIDE // BOX_COLUMNS) * BOX_COLUMNS
        row = [board[i * SIDE + k] for k in range(SIDE)]
        column = [board[k * SIDE + i] for k in range(SIDE)]
        box = [board[(top + k // BOX_COLUMNS) * SIDE + left + k % BOX_COLUMNS] for k in range(SIDE)]
        if not set(row) == set(column) == set(box) == digits:
            return False
    return True


def solve(program, model, puzzle):
    """The board after each loop, and how many of its digits are wrong. None if it is not solved."""
    lines = run(program, "sample", "--model", model, "--puzzle", puzzle, "--steps", "1",
                "--temperature", "0", "--loops", str(LOOPS), "--watch", "--show-loops")
    boards = []
    for line in lines:
        loop = re.fullmatch(r" *0, loop +\d+ \| ([1-9 ]+)", line)
        if loop:
            boards.append(loop.group(1).replace(" ", ""))
    if len(boards) != LOOPS:
        fail(f"--show-loops printed {len(boards)} boards, not {LOOPS}")
    puzzle = puzzle.replace(" ", "")
    solution = boards[-1]
    keeps_givens = all(given in (".", digit) for given, digit in zip(puzzle, solution))
    if not keeps_givens or not is_solution(solution):
        return None
    wrong = [sum(a != b for a, b in zip(board, solution)) for board in boards]
    return boards, wrong


def read_puzzles(path):
    """The puzzles of a shard: 256 int32 of header, then uint16 tokens, 0 is a blank."""
    try:
        with open(path, "rb") as file:
            data = file.read()[1024:]
    except OSError as error:
        fail(f"{path}: {error.strerror}; make build/puzzles9_30.bin, or use --puzzles")
    cells = struct.unpack(f"<{len(data) // 2}H", data)
    size = SIDE * SIDE
    if not cells or len(cells) % (2 * size) or max(cells) > SIDE:
        fail(f"{path} has no 9x9 puzzles with solutions")
    # Each puzzle is followed by its solution.
    starts = range(0, len(cells), 2 * size)
    return ["".join(".123456789"[c] for c in cells[start:start + size]) for start in starts]


def corrects(wrong):
    """Do the wrong digits never rise, and are there none after the last loop but one?"""
    return wrong == sorted(wrong, reverse=True) and wrong[-2] == 0


def find_puzzle(program, model, path):
    """PUZZLE, if the wrong digits fall to none, loop after loop.

    With another model they may not: then a puzzle whose wrong digits fall as often as possible.
    """
    solved = solve(program, model, PUZZLE)
    if solved and corrects(solved[1]) and solved[1][0] > 0:
        return PUZZLE.replace(" ", ""), *solved
    print("this model does not correct the picture's puzzle loop after loop: looking for another")
    best = None
    for puzzle in read_puzzles(path)[:MOST_PUZZLES]:
        solved = solve(program, model, puzzle)
        if not solved or not corrects(solved[1]):
            continue
        score = len(set(solved[1])), solved[1][0]
        if best is None or score > best[0]:
            best = score, puzzle, *solved
    if best is None:
        fail(f"no puzzle of {path} is solved loop after loop; train the model for longer")
    return best[1:]


# ---------------------------------------------------------------------------------------------
# Drawing

def font(name, size):
    path = os.path.join(matplotlib.get_data_path(), "fonts", "ttf", name + ".ttf")
    return ImageFont.truetype(path, round(size * SCALE))


class Picture:
    """An image with the lengths of a 900 x 360 one."""

    def __init__(self):
        self.image = Image.new("RGB", (WIDTH * SCALE, HEIGHT * SCALE), PAPER)
        self.draw = ImageDraw.Draw(self.image)
        # A thin edge, because the page around it may be white or nearly black.
        corner = self.image.width - 1, self.image.height - 1
        self.draw.rectangle((0, 0, *corner), outline=GREY, width=SCALE)

    def text(self, x, y, text, face, colour, anchor="ls"):
        """Writes a text that begins at x, on the line y (anchor "ms": its middle is at x)."""
        self.draw.text((x * SCALE, y * SCALE), text, colour, face, anchor)

    def box(self, x0, y0, x1, y1, colour, radius=0):
        """Fills what lies from x0 to x1 and from y0 to y1."""
        x0, y0, x1, y1 = (round(length * SCALE) for length in (x0, y0, x1, y1))
        # Pillow's corners belong to the box.
        self.draw.rounded_rectangle((x0, y0, x1 - 1, y1 - 1), radius * SCALE, colour)


HEADING = font("DejaVuSans-Bold", 16)
CAPTION = font("DejaVuSans", 13)
CAPTION_BOLD = font("DejaVuSans-Bold", 13)
STORY = font("DejaVuSerif", 17.5)
GIVEN = font("DejaVuSans-Bold", 14)
FILLED = font("DejaVuSans", 14)


def lay_out(tokens, spare):
    """Where each token of the finished story stands, masked or not: (text, x, y, width).

    After them stand `spare` masks without a text, which turn into the end of the text.
    """
    def width_of(text):
        return STORY.getlength(text) / SCALE

    space = width_of(" ")
    places = []
    x, y = 0, 0
    for i, token in enumerate(tokens):
        text = token.strip()
        if token.startswith("\n"):
            x, y = 0, y + LINE
        elif token.startswith(" "):
            # A word is its tokens up to the next space: it goes to the next line in one piece.
            word = text
            for more in tokens[i + 1:]:
                if more.startswith((" ", "\n")):
                    break
                word += more
            x += space
            if x + width_of(word) > STORY_WIDTH:
                x, y = 0, y + LINE
        places.append((text, STORY_LEFT + x, STORY_TOP + y, width_of(text)))
        x += width_of(text)

    for _ in range(spare):
        x += space
        if x + SPARE_WIDTH > STORY_WIDTH:
            x, y = 0, y + LINE
        places.append(("", STORY_LEFT + x, STORY_TOP + y, SPARE_WIDTH))
        x += SPARE_WIDTH
    return places


def draw_story(picture, tokens, places, state, before, step):
    """One step of the story. What is shown now and was not before is highlighted."""
    shown, after = state
    for i, (text, x, y, width) in enumerate(places[:len(tokens) + after]):
        if width == 0:
            continue  # a new line
        if i >= len(tokens) or not shown[i]:
            picture.box(x + 0.5, y - 14, x + width - 0.5, y + 4, GREY, 3)
            continue
        # Neighbours such as "pie" and "," touch, so a highlight hardly leaves the token's width.
        if not before[i]:
            picture.box(x - 0.5, y - 17, x + width + 0.5, y + 6.5, FRESH, 3)
        picture.text(x, y, text, STORY, INK)

    picture.text(STORY_LEFT, 36, "A story", HEADING, INK)
    picture.text(STORY_LEFT, 58, "written by filling in masks, a few at a time", CAPTION, QUIET)
    draw_progress(picture, STORY_LEFT, "step", step, STORY_STEPS)


def draw_progress(picture, x, name, done, total):
    """A bar and, beside it, its meaning: "loop 3 of 8"."""
    width = 120
    top, bottom = FOOTER - 7, FOOTER - 3
    picture.box(x, top, x + width, bottom, GREY)
    if done:
        picture.box(x, top, x + width * done / total, bottom, INK)
    picture.text(x + width + 14, FOOTER, f"{name} {done} of {total}", CAPTION, INK)


def draw_board(picture, puzzle, boards, wrong, loop, is_new):
    """The board after this loop; loop 0 is the puzzle. What a new loop changed is highlighted."""
    picture.text(BOARD_LEFT, 36, "A Sudoku, in one denoising step", HEADING, INK)
    picture.text(BOARD_LEFT, 58, "the same layers, run again:", CAPTION, QUIET)
    picture.text(BOARD_LEFT, 75, "each loop corrects the last", CAPTION, QUIET)

    solution = boards[-1]
    for i in range(SIDE * SIDE):
        x = BOARD_LEFT + i % SIDE * CELL
        y = BOARD_TOP + i // SIDE * CELL
        middle = x + CELL / 2, y + CELL / 2 + 5
        if puzzle[i] != ".":
            picture.text(*middle, puzzle[i], GIVEN, INK, "ms")
        elif loop == 0:
            # A blank is a mask, and looks like those of the story.
            picture.box(x + 5, y + 5, x + CELL - 5, y + CELL - 5, GREY, 2)
        else:
            digit = boards[loop - 1][i]
            is_wrong = digit != solution[i]
            changed = is_new and loop > 1 and digit != boards[loop - 2][i]
            if is_wrong or changed:
                picture.box(x, y, x + CELL, y + CELL, WRONG_CELL if is_wrong else FRESH)
            picture.text(*middle, digit, FILLED, WRONG if is_wrong else RIGHT, "ms")
    draw_lines(picture)

    # What the loops so far got wrong.
    for k in range(1, loop + 1):
        y = BOARD_TOP + (k - 0.5) * CELL + 5
        count = wrong[k - 1]
        face = CAPTION_BOLD if k == loop else CAPTION
        picture.text(COUNTS_LEFT, y, f"loop {k}", face, INK if k == loop else QUIET)
        picture.text(COUNTS_RIGHT, y, f"{count} wrong", face, WRONG if count else RIGHT, "rs")
    draw_progress(picture, BOARD_LEFT, "loop", loop, LOOPS)


def draw_lines(picture):
    """The lines of the board: thin ones between cells, then thick ones around the boxes."""
    for thick in (False, True):
        half = 1 if thick else 0.5
        colour = INK if thick else GREY
        for k in range(SIDE + 1):
            near, far = k * CELL - half, k * CELL + half
            if (k % BOX_COLUMNS == 0) == thick:
                picture.box(BOARD_LEFT + near, BOARD_TOP - half,
                            BOARD_LEFT + far, BOARD_TOP + BOARD_WIDTH + half, colour)
            if (k % BOX_ROWS == 0) == thick:
                picture.box(BOARD_LEFT - half, BOARD_TOP + near,
                            BOARD_LEFT + BOARD_WIDTH + half, BOARD_TOP + far, colour)


def draw_frames(story, sudoku):
    """All frames: the blank start, one for each step of the story, and the end to look at."""
    tokens, states = story
    puzzle, boards, wrong = sudoku
    # At the start all positions are masks, also those that will be end-of-text.
    spare = max(after for shown, after in states)
    places = lay_out(tokens, spare)
    # At the end the last words lose their highlight.
    states = [([False] * len(tokens), spare)] + states + [states[-1]] * HIGHLIGHTED
    frames = []
    for i, state in enumerate(states):
        step = min(i, STORY_STEPS)
        before = states[max(i - HIGHLIGHTED, 0)][0]
        # The loops share the time of the story: with 48 steps one begins with every sixth.
        loop = math.ceil(step * LOOPS / STORY_STEPS)
        loop_before = math.ceil(max(i - HIGHLIGHTED, 0) * LOOPS / STORY_STEPS)
        picture = Picture()
        draw_story(picture, tokens, places, state, before, step)
        draw_board(picture, puzzle, boards, wrong, loop, loop > loop_before)
        frames.append(picture.image)
    return frames


def make_palette():
    """An image whose palette has each pair of PAIRS, seven mixtures of the two, and grey."""
    colours = list(ImageColor.getrgb(GREY))
    for pair in PAIRS:
        back, front = (ImageColor.getrgb(colour) for colour in pair)
        for k in range(9):
            colours += [round(b + (f - b) * k / 8) for b, f in zip(back, front)]
    image = Image.new("P", (1, 1))
    image.putpalette(colours)
    return image


def save(frames, path):
    """Writes the GIF. All frames have one palette, so that each only needs to hold what changed."""
    palette = make_palette()
    frames = [frame.quantize(palette=palette, dither=Image.Dither.NONE) for frame in frames]
    times = [FIRST_MS] + [STEP_MS] * (len(frames) - 2) + [LAST_MS]
    with outputs.new_files(path) as [part]:
        frames[0].save(part, "GIF", save_all=True, append_images=frames[1:], duration=times,
                       loop=0, optimize=True)
    size = os.path.getsize(path)
    print(f"{path}: {len(frames)} frames, {sum(times) / 1000:.1f} s, {size} bytes")
    if size > MOST_BYTES:
        fail(f"{path} has more than {MOST_BYTES} bytes: draw fewer steps, or at a smaller SCALE")


def main():
    parser = argparse.ArgumentParser(
        description="Makes the moving picture of README.md from the output of loopmdm.")
    parser.add_argument("--program", default="./loopmdm", help="default: %(default)s")
    parser.add_argument("--stories", default="dev/models/stories", metavar="FOLDER",
                        help="model of stories (default: %(default)s)")
    parser.add_argument("--sudoku", default="dev/models/sudoku", metavar="FOLDER",
                        help="model of 9x9 boards (default: %(default)s)")
    parser.add_argument("--puzzles", default="build/puzzles9_30.bin", metavar="FILE",
                        help="where another puzzle is looked for, if this model does not solve the "
                             "picture's puzzle loop after loop (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=1, help="seed of the story (default: 1)")
    parser.add_argument("--out", default="dev/demo/demo.gif", metavar="FILE",
                        help="default: %(default)s")
    options = parser.parse_args()
    if not options.out.endswith(".gif"):
        parser.error("--out needs a name that ends in .gif")

    story = write_story(options.program, options.stories, options.seed)
    print("".join(story[0]))
    sudoku = find_puzzle(options.program, options.sudoku, options.puzzles)
    puzzle, boards, wrong = sudoku
    print("puzzle:", " ".join(puzzle[i:i + SIDE] for i in range(0, SIDE * SIDE, SIDE)))
    for loop, count in enumerate(wrong, 1):
        print(f"after loop {loop}: {count} wrong digit{'s' * (count != 1)}")
    save(draw_frames(story, sudoku), options.out)


if __name__ == "__main__":
    outputs.run("demo.py", main)
