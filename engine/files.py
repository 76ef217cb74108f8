"""
Reading files that a user gave us, and writing files that survive a crash.

Reading: whatever is wrong with a file ends as one UserError that names it. Writing: a file gets its name only when it
is complete. It is written under a temporary name next to its place, flushed to the disk, and renamed, which happens
entirely or not at all; a reader never sees half a file, whenever the process or the machine dies. Folders: a program
writes only to folders that it made itself.
"""
import errno
import fcntl
import hashlib
import io
import json
import os
import re
import shutil
import sys
import tempfile
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, TextIO

from configurator import UserError, cut, expected, shorten, stand_in, user_file


# -----------------------------------------------------------------------------
# Reading

def read_text(path: str | Path, hint: str = "check the path") -> str:
    """A whole UTF-8 file, whatever the locale; a byte order mark at its start is dropped."""
    with user_file(path, hint=hint) as file:
        refuse_stand_in(path, file)
        try:
            return io.TextIOWrapper(file, encoding="utf-8-sig").read()
        except UnicodeDecodeError:
            raise UserError(f"{path}: is not UTF-8 text; replace the file") from None


def refuse_stand_in(path: str | Path, file: BinaryIO) -> None:
    """UserError if what takes the place of the real file has just been opened, such as a git-lfs pointer."""
    if found := stand_in(file.peek(100)):
        raise UserError(f"{path}: cannot be read ({found})")


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
def atomic(path: str | Path, size: int | None = None, note: str = "", unique: bool = False,
           flush: bool = True) -> Iterator[Path]:
    """Yield a temporary path next to `path`; when the block ends without an error, flush it and rename it to `path`.

    A full, read-only or failing disk ends as a UserError, with what was half written removed. `size`: bytes that will be
    written, if known: too little free space is then noticed beforehand. `note`: what the message adds. `unique`: a
    temporary name that no other process or user has, for a file that two machines may write at once, or in a folder of
    the user's. flush=False: for thousands of files that can be made again, where each flush takes milliseconds.
    """
    path = Path(path)
    if not path.name:                                                # "", ".", "/"
        raise UserError(f"{shorten(str(path))} names no file to write; give the name of one")
    tmp = path.with_name(f"{path.name[:50]}.{uuid.uuid4().hex}.tmp" if unique else f"{path.name}.tmp")   # 255 bytes at most
    with disk_errors(path, size, note):
        try:
            make_folder(path.parent)
            refuse_others(path)
            if size is not None and shutil.disk_usage(path.parent).free < size:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            yield tmp
            if flush:
                sync(tmp)
            os.replace(tmp, path)
            if flush:
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


def check_output(path: str | Path, others: list[tuple[str, str]]) -> None:
    """UserError unless a file can be written at `path`: to be asked before the work whose result it will hold.

    others: (name, path) of the other files of the same run; none of them may be `path`.
    """
    path = Path(path)
    refuse_inputs(path, others)
    with disk_errors(path):
        refuse_others(path)
        parent = next(folder for folder in path.absolute().parents if folder.exists())
        tempfile.TemporaryFile(dir=parent).close()                   # has no name, and leaves nothing


def refuse_others(path: Path) -> None:
    """UserError if there is a folder, a pipe, a device or a link to nothing at `path`, where a file is to be written."""
    if os.path.lexists(path) and not path.is_file():
        raise UserError(f"{path}: is there already, and is not a file; choose another name")


def sync(path: Path) -> None:
    """Flush a file, or the names in a folder, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


# -----------------------------------------------------------------------------
# Folders: who may write to one, and what one was made from

NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)      # what lockf says on a file system without them
MARK = "lock"    # the file that names a folder's owner, and whose lock keeps other processes out
LOCKS = {}       # folder -> its open lock files; closing one of them would release the lock


def check_owner(folder: str | Path, owner: str, inputs: dict[str, str | None] | None = None) -> None:
    """UserError unless the program `owner` may write to `folder`: it is absent or empty, or `owner` made it earlier.

    So a program never overwrites or removes a file that it did not write. inputs: {name: path} of what the same run
    reads; none of them may be the folder.
    """
    folder = Path(folder)
    with disk_errors(folder):
        nearest = next(filter(os.path.lexists, (folder, *folder.parents)), folder)
        if not nearest.is_dir():                                     # a file, or a link to nothing
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
        if not folder.exists():
            return
        refuse_inputs(folder, list((inputs or {}).items()))
        names = sorted(os.listdir(folder))
        found = read_text(folder / MARK).strip() if MARK in names else ""
    if found == owner or not found and names in ([], [MARK]):        # [MARK]: killed while it made the folder
        return
    made_by = f"was made by {cut(found)}" if found else f"holds files that {owner} did not write ({shorten(names)})"
    raise UserError(f"{folder}: {made_by}; choose another folder, a new or empty one")


def refuse_inputs(output: str | Path, inputs: list[tuple[str, str | None]]) -> None:
    """UserError if `output`, a file or folder, is one that the same run reads. inputs: (name, path) of each."""
    for name, path in inputs:
        if path and (os.path.realpath(path) == os.path.realpath(output)
                     or os.path.exists(path) and os.path.exists(output) and os.path.samefile(path, output)):
            raise UserError(f"{output}: is also the {name} of this run, and would be overwritten; choose another place for "
                            "the output")


def claim(folder: str | Path, owner: str, inputs: dict[str, str | None] | None = None, wait: bool = False) -> None:
    """Make `folder` the program's own, and keep other processes out until this one ends or calls `release`.

    wait: until another process has released it, instead of a UserError.
    """
    check_owner(folder, owner, inputs)
    path = Path(folder) / MARK
    file = lock(path, wait)
    LOCKS.setdefault(os.path.realpath(folder), []).append(file)
    with disk_errors(path):
        file.seek(0)
        if not file.read():
            file.write(f"{owner}\n")
            file.flush()
            os.fsync(file.fileno())
            sync(path.parent)


def lock(path: Path, wait: bool = False, place: str | Path = "") -> TextIO:
    """Lock a file, made if it is not there, until what is returned is closed or this process ends, however it ends.

    place: what the lock keeps for this process, as a message names it; empty: the folder. Opening and closing the file once
    more would release the lock. Some cluster file systems have no locks: there it says that nothing keeps a second run
    out, and goes on.
    """
    place = place or path.parent
    with disk_errors(path):
        make_folder(path.parent)
        file = open(path, "a+", encoding="utf-8", errors="replace")
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            if not wait:
                raise UserError(f"{place}: another run is writing there; wait for it, end it, or choose another "
                                "place") from None
            print(f"{place}: another run is writing there; waiting for it", file=sys.stderr)
            fcntl.lockf(file, fcntl.LOCK_EX)
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
            print(f"{place}: its file system has no locks ({error.strerror}), so nothing keeps a second run from writing "
                  "there; see to it that there is none", file=sys.stderr)
    return file


def release(folder: str | Path) -> None:
    for file in LOCKS.pop(os.path.realpath(folder), []):
        file.close()


def make_folder(folder: Path) -> None:
    """Make a folder and its parents, their names flushed to the disk."""
    if not folder.is_dir():
        make_folder(folder.parent)
        folder.mkdir(exist_ok=True)
        sync(folder.parent)


def digest_of_folder(folder: str | Path) -> str:
    """A digest of a checkpoint's content: its configs, tokenizer and weights, every byte of them (1.5 GB/s and core).

    Times and the folder's place do not matter, nor do other files in it.
    """
    try:
        paths = [path for path in sorted(Path(folder).iterdir()) if path.is_file() and
                 (path.name in ("config.json", "generation_config.json", "tokenizer.json")
                  or path.name.endswith((".safetensors", ".bin", ".index.json")))]
        with ThreadPoolExecutor() as pool:                           # hashing releases the GIL
            digests = pool.map(sha256_of_file, paths)
            content = [path.name.encode() + bytes.fromhex(digest) for path, digest in zip(paths, digests)]
    except OSError as error:
        raise UserError(f"{error.filename or folder}: cannot be read ({error.strerror}); check the path") from None
    return hashlib.sha256(b"".join(content)).hexdigest()


def sha256_of_file(path: str | Path) -> str:
    with user_file(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class DiskError(UserError):
    """A write that failed, and what to do about it."""

    def __init__(self, problem: str, note: str = ""):
        super().__init__(f"{problem}; {note}")
        self.problem = problem


@contextmanager
def disk_errors(path: Path, size: int | None = None, note: str = "") -> Iterator[None]:
    """Turn any error of the operating system while `path` is written into a UserError. The outermost note is shown.

    The block may print: an error of standard output is not blamed on `path`.
    """
    try:
        yield
    except DiskError as error:
        if not note:
            raise
        raise DiskError(error.problem, note) from None
    except (UserError, BrokenPipeError):                             # the reader of our output has left
        raise
    except Exception as error:
        reason = disk_error(error)
        if reason is None or output_fails():
            raise
        free = shutil.disk_usage(next(filter(os.path.isdir, path.parents), "/")).free
        needs = f"it needs {readable(size)}, " if size is not None else ""
        raise DiskError(f"{path}: cannot be written ({reason}); {needs}{readable(free)} are free there",
                        note or "make room, or choose another folder") from None


def output_fails() -> bool:
    """Whether what was printed cannot be written, since standard output is a file on a full disk."""
    try:
        print(end="", flush=True)                                    # what could not be written is tried again
    except OSError:
        return True
    return False


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
