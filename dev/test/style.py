"""
Measures how readable a C file is, and checks the limits that this project sets itself.

    python3 dev/test/style.py            loopmdm.c and loopmdm.cu, and the limits of all files
    python3 dev/test/style.py FILE...    the figures of these files side by side, without limits

What is counted, and how:

  lines, words            as wc counts them
  too wide                lines of more than 100 columns, and the columns of the widest line
  in bodies               lines of function bodies: those between the line of { and the line of }
  comments in bodies      how many of them hold only a comment, or a comment behind code. The limit
                          counts both
  blank in bodies         how many of them are empty
  ternaries               operators ?: in 1,000 lines of code (neither blank nor only a comment);
                          nested: one inside an operand of another
  statements              lines in a function with more than one statement: two ; outside of
                          parentheses, or two expressions with a comma between them.
                          "if (x) return;" and "for (...) y++;" are one statement
  behind a step           functions of this file that a training step uses, the roots included, and
                          how many of them stand on the longest chain of calls. Roots: see --roots
  compiles alone          whether cc -std=c11 -O3 -Wall -Wextra takes the file in an empty folder
                          without a warning
  options                 entries of the arrays whose names end with "options"; if there are none,
                          different strings "--name"
"""
import argparse
import bisect
import os
import re
import subprocess
import sys
import tempfile

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
WIDTH, MARKDOWN_WIDTH = 100, 120
CONTROL = {"if", "for", "while", "switch", "return", "sizeof", "do", "else"}


def blank_out(text):
    """The text with every comment and the inside of every string as spaces, and its comments.

    Each comment is (first line, last line), counted from 0. Lines keep their numbers and widths.
    """
    pattern = r"//(?:[^\n\\]|\\.|\\\n)*|/\*.*?\*/|\"(?:\\.|[^\"\\\n])*\"|'(?:\\.|[^'\\\n])+'"
    starts = [0] + [m.end() for m in re.finditer("\n", text)]
    comments = []

    def spaces(match):
        part = match[0]
        if part[0] == "/":
            first, last = match.start(), match.end() - 1
            comments.append((bisect.bisect(starts, first) - 1, bisect.bisect(starts, last) - 1))
            return re.sub(r"[^\n]", " ", part)
        return part[0] + " " * (len(part) - 2) + part[-1]

    return re.sub(pattern, spaces, text, flags=re.S), comments


def without_directives(code):
    """The code with preprocessor lines, and the lines that continue them, as spaces."""
    directive = r"^[ \t]*#(?:[^\n\\]|\\.|\\\n)*"
    return re.sub(directive, lambda m: re.sub(r"[^\n]", " ", m[0]), code, flags=re.M)


def function_name(head):
    """The name of the function that head defines, or None: head is the text in front of a {."""
    head = re.sub(r"__\w+__\s*\(", "(", head)  # __attribute__((...)), __launch_bounds__(...)
    if re.search(r"=\s*$", head) or not re.search(r"\)[\s\w]*(?::[^:].*)?$", head, re.S):
        return None
    depth, names = 0, []
    for i, c in enumerate(head):
        if c == "(" and depth == 0:
            name = re.search(r"(~?\w+)\s*$", head[:i])
            if name:
                names.append(name[1])
        depth += (c == "(") - (c == ")")
    constructor = re.search(r"\)\s*:[^:]", head)
    if not names or names[-1] in CONTROL:
        return None
    return names[0] if constructor else names[-1]


def functions_of(code):
    """(name, where { is, where its } is) of each function definition. code is without comments.

    Braces of struct, namespace and extern "C" are looked into: functions may stand in them.
    """
    found, stack, head = [], [], 0
    for m in re.finditer(r"[{};]", code):
        inside = any(kind for kind, _ in stack)
        if m[0] == "{":
            kind = None if inside else function_name(code[head:m.start()])
            stack.append((kind or inside, m.start()))
            if kind:
                found.append([kind, m.start(), None])
        elif m[0] == "}" and stack:
            kind, start = stack.pop()
            if found and found[-1][1] == start:
                found[-1][2] = m.start()
        if not inside or m[0] == "}":
            head = m.end()
    return [f for f in found if f[2] is not None]


def count_ternaries(code):
    """(how many there are, the places of the nested ones)"""
    total, nested = 0, []
    levels = [[False, False]]  # for each open parenthesis: was there a ? here, was one inside ( )
    for m in re.finditer(r"[?()\[\]{};,\n]", code):
        c = m[0]
        if c in "([":
            levels.append([False, False])
        elif c in ")]" and len(levels) > 1:
            own = levels.pop()
            levels[-1][1] |= own[0] or own[1]
        elif c in "{};":
            levels = [[False, False]]
        elif c == ",":
            levels[-1] = [False, False]
        elif c == "?":
            total += 1
            if levels[-1][1] or any(level[0] for level in levels):
                nested.append(m.start())
            levels[-1][0] = True
    return total, nested


def is_declaration(statement):
    """Whether it begins with a type: two words, or a word, stars and a word, then = [ ( , or ;"""
    if re.match(r"(?:struct|union|enum|static|const|alignas)\b", statement):
        return True
    return re.match(r"(?:(?:static|const|struct|unsigned|auto|volatile)\b\s*)*"
                    r"[A-Za-z_]\w*(?:<[^;=]*?>|::\w+)*(?:\s+const)?(?:\s+|\s*[*&]+\s*)[*&\s]*"
                    r"\w+\s*(?:\[[^;]*?\]\s*)*(?:[=,;({]|$)", statement) and not re.match(
                        r"(?:return|else|goto|case|delete|throw)\b", statement)


def without_control(statement):
    """The statement behind if (...), for (...), else, case x: and the like."""
    while True:
        m = re.match(r"\s*(?:else|do|default\s*:|case\b[^:?]*:)(?!\w)\s*", statement)
        if m:
            statement = statement[m.end():]
            continue
        m = re.match(r"\s*(?:if|for|while|switch|OMP)\s*(?:constexpr\s*)?\(", statement)
        if not m:
            return statement.strip()
        depth, i = 1, m.end()
        while depth and i < len(statement):
            depth += (statement[i] == "(") - (statement[i] == ")")
            i += 1
        statement = statement[i:]


def top_level(text, character):
    """Where the character stands in text outside of ( ), [ ], { } and a template's < >."""
    text = re.sub(r"<<<.*?>>>|(?<=\w)<[\w\s,*:+-]*>(?=\s*[({])", "", text, flags=re.S)
    depth, places = 0, []
    for i, c in enumerate(text):
        if c == character and depth == 0:
            places.append(i)
        depth += (c in "([{") - (c in ")]}")
    return places


def opens_list(before):
    """Whether a { behind this text begins a list of values or a type's members, not statements."""
    ends = (r"(=|,|\(|\{|\?|:|return|\w\]|\(\w[\w\s*]*(\[\w*\])?\)|"
            r"\b(struct|union|enum)(\s+\w+)?)$")
    return without_control(before) != "" and re.search(ends, before) is not None


def crowded_lines(code, functions):
    """The numbers of the lines, from 0, that hold more than one statement."""
    ends, crowded = {}, set()
    line_at = [m.start() for m in re.finditer("\n", code)]
    for _, first, last in functions:
        # lists: the open { of lists and types. depth: the open ( and [, at each open { of a body
        start, depth, lists = first + 1, [0], 0
        for m in re.finditer(r"[()\[\]{};]", code[first + 1:last]):
            i, c = first + 1 + m.start(), m[0]
            if c in "([":
                depth[-1] += 1
            elif c in ")]":
                depth[-1] -= 1
            elif c == "{":
                if lists or opens_list(code[start:i].strip()):
                    lists += 1
                else:
                    depth.append(0)
                    start = i + 1
            elif c == "}" and lists:
                lists -= 1
            elif c == "}":
                depth = depth[:-1] or [0]
                start = start if depth[-1] else i + 1
            elif depth[-1] == 0 and not lists:
                line = bisect.bisect_left(line_at, i)
                statement = without_control(code[start:i])
                ends[line] = ends.get(line, 0) + bool(statement)  # empty: the }; of a lambda
                if ends[line] > 1 or top_level(statement, ",") and not is_declaration(statement):
                    crowded.add(line)
                start = i + 1
    return crowded


def calls_behind(code, functions, roots):
    """(the functions that the roots use, the roots included; how many are on the longest chain)"""
    uses = {}
    names = {name for name, _, _ in functions}
    for name, first, last in functions:
        called = set(re.findall(r"(?<![.\w>])(\w+)\s*(?:<[^<>;()]*>)?(?:<<<[^;]*?>>>)?\s*\(",
                                code[first:last]))
        handed_on = set(re.findall(r"[(,]\s*(\w+)\s*(?=[,)])", code[first:last]))
        local = set(re.findall(r"[\w*]\s+\*?(\w+)\s*(?:=[^=]|\[|;|,)", code[first:last]))
        uses.setdefault(name, set()).update((called | handed_on - local) & names - {name})
    seen, depth = set(), {}

    def longest(name, above):
        seen.add(name)
        if name not in depth:
            below = [longest(n, above | {name}) for n in uses[name] if n not in above]
            depth[name] = 1 + max(below, default=0)
        return depth[name]

    return seen, max((longest(r, set()) for r in roots if r in uses), default=0)


def count_options(code):
    """How many entries the arrays of options have: braces inside of the array's own."""
    count = 0
    for m in re.finditer(r"options\s*\[\w*\]\s*=\s*\{", code):
        depth, i = 1, m.end()
        while depth and i < len(code):
            count += depth == 1 and code[i] == "{"
            depth += (code[i] == "{") - (code[i] == "}")
            i += 1
    return count


def compiles_alone(path):
    """'yes', 'no', or 'with warnings': the file in an empty folder."""
    with tempfile.TemporaryDirectory() as folder:
        name = os.path.join(folder, os.path.basename(path))
        with open(path, "rb") as source, open(name, "wb") as copy:
            copy.write(source.read())
        command = [os.environ.get("CC", "cc"), "-std=c11", "-O3", "-Wall", "-Wextra", name, "-o",
                   os.path.join(folder, "program"), "-lm"]
        try:
            done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
        except FileNotFoundError:
            return "no compiler"
        if done.returncode:
            return "no"
        return "with warnings" if done.stderr else "yes"


class Figures:
    """All that is counted of one C file."""

    def __init__(self, path, roots):
        with open(path, encoding="utf-8") as f:
            text = f.read()
        self.path, lines = path, text.splitlines()
        without_comments, comments = blank_out(text)
        code = without_directives(without_comments)
        code_lines = without_comments.splitlines()
        functions = functions_of(code)
        starts = [0] + [m.end() for m in re.finditer("\n", code)]

        def line_of(place):
            return bisect.bisect(starts, place) - 1

        self.lines, self.words = len(lines), len(text.split())
        widths = [len(line.expandtabs(4)) for line in lines]
        self.wide, self.widest = [i for i, w in enumerate(widths) if w > WIDTH], max(widths)
        bodies = set()
        for _, first, last in functions:
            bodies.update(range(line_of(first) + 1, line_of(last)))
        commented = {i for first, last in comments for i in range(first, last + 1)}
        commented = {i for i in commented & bodies if lines[i].strip()}
        self.bodies = max(1, len(bodies))
        self.only_comments = sum(not code_lines[i].strip() for i in commented)
        self.trailing_comments = len(commented) - self.only_comments
        self.blank = sum(not lines[i].strip() for i in bodies)
        self.ternaries, nested = count_ternaries(without_comments)
        self.nested = [line_of(place) for place in nested]
        self.crowded = sorted(crowded_lines(code, functions))
        self.functions, self.depth = calls_behind(code, functions, roots)
        self.alone = compiles_alone(path) if path.endswith(".c") else "-"
        self.code_lines = sum(1 for line in code_lines if line.strip())
        self.options = count_options(code) or len(set(re.findall(r'"--[a-z-]+"', text)))

    def rows(self):
        def share(n):
            return f"{100 * n / self.bodies:.1f} %"

        return [
            ("lines / words", f"{self.lines:,} / {self.words:,}"),
            (f"lines wider than {WIDTH} columns / widest", f"{len(self.wide)} / {self.widest}"),
            ("lines in function bodies", f"{self.bodies:,}"),
            ("of these: only a comment / behind code",
             f"{share(self.only_comments)} / {share(self.trailing_comments)}"),
            ("of these: blank", share(self.blank)),
            ("ternaries per 1,000 lines / nested ones",
             f"{1000 * self.ternaries / self.code_lines:.0f} / {len(self.nested)}"),
            ("lines with more than one statement", f"{len(self.crowded)}"),
            ("functions behind a training step, depth of calls",
             f"{len(self.functions)}, {self.depth}" if self.functions else "-"),
            ("compiles alone, without a warning", self.alone),
            ("options", f"{self.options}"),
        ]

    def limits(self):
        """(whether it is broken, what to say) of each limit."""
        def at(numbers):
            return ", ".join(str(n + 1) for n in numbers[:10]) + ", ..." * (len(numbers) > 10)

        comments = (self.only_comments + self.trailing_comments) / self.bodies
        return [
            (self.lines > 1500, f"{self.lines} lines, 1,500 at most"),
            (self.nested, f"nested ternaries in lines {at(self.nested)}"),
            (self.crowded, f"more than one statement in lines {at(self.crowded)}"),
            (comments < 0.1, f"{100 * comments:.1f} % of the lines in bodies have a comment, "
                             "10 % at least"),
            (not self.functions, "the training step's functions are not found: see --roots"),
            (len(self.functions) > 40, f"{len(self.functions)} functions behind a training step, "
                                       "40 at most"),
            (self.depth > 6, f"calls {self.depth} deep behind a training step, 6 at most"),
            (self.alone != "yes", "does not compile alone without a warning"),
        ]


def width_limit(path):
    """What to say of the lines that are too wide, or None."""
    markdown = path.endswith(".md")
    limit, wide, n = MARKDOWN_WIDTH if markdown else WIDTH, [], 0
    with open(path, encoding="utf-8") as f:
        for n, line in enumerate(f, 1):
            # A table's row cannot be broken. README.md has none so wide.
            table = markdown and path != "README.md" and line.lstrip().startswith("|")
            if len(line.rstrip("\n").expandtabs(4)) > limit and not table:
                wide.append(n)
    if path == "README.md" and n > 200:
        return f"{path}: {n} lines, 200 at most"
    if wide:
        first = ", ".join(map(str, wide[:5])) + (", ..." if len(wide) > 5 else "")
        return f"{path}: {len(wide)} lines wider than {limit} columns: {first}"
    return None


def project_files():
    """The text files of the project that people write."""
    endings = (".c", ".h", ".cu", ".py", ".sh", ".md", ".js", ".css", ".html")
    for folder, folders, names in os.walk("."):
        ignored = ("build", "data") if folder == "." else ()  # as in .gitignore
        folders[:] = sorted(d for d in folders if d[0] != "." and d not in ignored)
        for name in sorted(names):
            if name.endswith(endings) or name == "Makefile":
                yield os.path.relpath(os.path.join(folder, name))


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", metavar="FILE", help="C files instead of the project's")
    parser.add_argument("--roots", default="train_gradient,model_update", metavar="NAME,NAME",
                        help="functions that make a training step (%(default)s)")
    args = parser.parse_args()
    roots = args.roots.split(",")
    if not args.files:
        os.chdir(ROOT)
    columns = [Figures(path, roots) for path in args.files or ("loopmdm.c", "loopmdm.cu")]
    print(f"{'':50}" + "".join(f" {os.path.basename(c.path):>18}" for c in columns))
    for values in zip(*(c.rows() for c in columns)):
        print(f"{values[0][0]:50}" + "".join(f" {value:>18}" for _, value in values))
    if args.files:
        return
    checks = [(is_broken, f"loopmdm.c: {what}") for is_broken, what in columns[0].limits()]
    checks += [(what, what) for what in map(width_limit, project_files())]
    broken = [what for is_broken, what in checks if is_broken]
    print("\n" + "".join(f"FAIL  {what}\n" for what in broken), end="")
    print(f"{len(checks) - len(broken)} passed, {len(broken)} failed")
    sys.exit(1 if broken else 0)


main()
