"""For the scripts: files to write that are complete or not there, and errors of one line."""
import contextlib
import os
import sys


@contextlib.contextmanager
def new_files(*paths):
    """
    Gives a list of names to write to, NAME.tmp for each path. At the end the files get their own
    names together, or after an error they are removed. Raises ValueError, or OSError with a name.
    """
    parts = [path + ".tmp" for path in paths]
    for path in (*paths, *parts):
        if not path:
            raise ValueError("a file to write needs a name")
        if os.path.islink(path) or (os.path.exists(path) and not os.path.isfile(path)):
            raise ValueError(f"{path} is a folder, device, pipe or link; choose another name")
    try:
        yield parts
        for path, part in zip(paths, parts):
            os.replace(part, path)
    except OSError as e:
        e.filename = e.filename or ", ".join(paths)  # a full disk has no name
        raise
    finally:
        for part in filter(os.path.exists, parts):
            os.remove(part)


def run(program, main, *args):
    """
    Calls main(*args). An OSError, a ValueError or Ctrl-C ends the program with one line on standard
    error and status 1.
    """
    try:
        main(*args)
    except (OSError, ValueError) as e:
        named = getattr(e, "filename", None)
        sys.exit(f"{program}: {named}: {e.strerror}" if named else f"{program}: {e}")
    except KeyboardInterrupt:
        sys.exit(f"\n{program}: interrupted")
