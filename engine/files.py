"""
Reading files that a user gave us, and writing files that survive a crash.

Reading: whatever is wrong with a file ends as one UserError that names it. Writing: a file gets its name only when it is
complete. It is written under a temporary name next to its place, flushed to the disk, and renamed, which happens entirely
or not at all; a reader never sees half a file, whenever the process or the machine dies.
"""
import errno
import io
import json
import os
import re
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from configurator import UserError, expected, user_file


# -----------------------------------------------------------------------------
# Reading

def read_text(path: str | Path, hint: str = "check the path") -> str:
    """A whole UTF-8 file, whatever the locale; a byte order mark at its start is dropped."""
    with user_file(path, hint=hint) as file:
        try:
            return io.TextIOWrapper(file, encoding="utf-8-sig").read()
        except UnicodeDecodeError:
            raise UserError(f"{path}: is not UTF-8 text; replace the file") from None


def parse_json(text: str, where: str) -> object:
    """JSON from a user's file; `where` names file and line for the message."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        line = "" if " line " in where else f" line {error.lineno}"
        raise UserError(f"{where}{line}: malformed JSON, {error.msg} at column {error.colno}; correct or replace it") from None
    except (ValueError, RecursionError) as error:                    # a number of 5,000 digits, 100,000 brackets
        raise UserError(f"{where}: malformed JSON, {error}; correct or replace it") from None


def read_json(path: str | Path, kind: type = dict, hint: str = "check the path") -> dict | list:
    """A JSON file whose top level is an object (kind=dict) or a list (kind=list)."""
    content = parse_json(read_text(path, hint), str(path))
    if not isinstance(content, kind):
        raise expected(path, content, "a JSON object" if kind is dict else "a JSON list")
    return content


def read_rows(path: str | Path, hint: str = "check the path") -> list[tuple[str, object]]:
    """A JSON list or JSON Lines, told apart by the first character -> [("FILE row N" or "FILE line N", row)]."""
    text = read_text(path, hint)
    if text.lstrip().startswith("["):
        return [(f"{path} row {i}", row) for i, row in enumerate(parse_json(text, str(path)))]
    lines = [(f"{path} line {number}", line) for number, line in enumerate(text.split("\n"), start=1) if line.strip()]
    return [(where, parse_json(line, where)) for where, line in lines]


# -----------------------------------------------------------------------------
# Writing

@contextmanager
def atomic(path: str | Path, size: int | None = None, note: str = "", unique: bool = False) -> Iterator[Path]:
    """Yield a temporary path next to `path`; when the block ends without an error, flush it and rename it to `path`.

    A full, read-only or failing disk ends as a UserError, with what was half written removed. `size`: bytes that will be
    written, if known: too little free space is then noticed beforehand. `note`: what the message adds. `unique`: a
    temporary name that no other process uses, for a file that two machines may write at once.
    """
    path = Path(path)
    tmp = path.with_name(f"{path.name}.{uuid.uuid4().hex}.tmp" if unique else f"{path.name}.tmp")
    with disk_errors(path, size, note):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            if size is not None and shutil.disk_usage(path.parent).free < size:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            yield tmp
            sync(tmp)
            os.replace(tmp, path)
            sync(path.parent)
        finally:
            tmp.unlink(missing_ok=True)


def write_text(path: str | Path, text: str) -> None:
    with atomic(path) as tmp:
        tmp.write_text(text, encoding="utf-8", newline="")


def write_json(path: str | Path, content: object) -> None:
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def write_lines(path: str | Path, rows: list) -> None:
    """JSON Lines."""
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def sync(path: Path) -> None:
    """Flush a file, or the names in a folder, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


class DiskError(UserError):
    """A write that failed, and what to do about it."""

    def __init__(self, problem: str, note: str = ""):
        super().__init__(f"{problem}; {note}")
        self.problem = problem


@contextmanager
def disk_errors(path: Path, size: int | None = None, note: str = "") -> Iterator[None]:
    """Turn any error of the operating system while `path` is written into a UserError. The outermost note is shown."""
    try:
        yield
    except DiskError as error:
        if not note:
            raise
        raise DiskError(error.problem, note) from None
    except UserError:
        raise
    except Exception as error:
        reason = disk_error(error)
        if reason is None:
            raise
        free = shutil.disk_usage(next(folder for folder in path.parents if folder.is_dir())).free
        needs = f"it needs {readable(size)}, " if size is not None else ""
        raise DiskError(f"{path}: cannot be written ({reason}); {needs}{readable(free)} are free there",
                        note or "make room, or choose another folder") from None


def disk_error(error: BaseException | None) -> str | None:
    """The operating system's words behind an error, or None if it was something else.

    safetensors, tokenizers and torch wrap such errors in their own: "(os error 28)" in the text, or as the context.
    """
    while error is not None:
        if isinstance(error, OSError) and error.errno:
            return os.strerror(error.errno)
        number = re.search(r"\(os error (\d+)\)", str(error))
        if number:
            return os.strerror(int(number[1]))
        error = error.__context__
    return None


def readable(size: float) -> str:
    for unit in ("bytes", "kB", "MB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:,.1f} GB"
