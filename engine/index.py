"""
Millions of rows on disk: data files, their index, and the datasets that read single rows from them.

A LLaVA data file is one JSON list, up to gigabytes of it: too much to tokenize at every start, and too much to keep in
memory as Python objects. So every row is checked and measured once, and 20 bytes per row are saved next to the file:

    scan_rows    a file -> each row, with its byte offset and size
    open_index   the saved numbers: offset, size, tokens and min_length of each row
    RowData      the rows that are usable at max_length; data[i] reads row i from its file and renders it

Indexing a .json file takes memory of about twice its size, once. Later runs start in seconds, and every worker process
can read any row without the rest of the file.
"""
import codecs
import hashlib
import json
import math
import os
import re
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer

from configurator import UserError, expected, shorten, user_file
from data import IMAGE, TEMPLATES, image_bytes, load_image, render, transform_image
from engine.files import atomic, refuse_stand_in, sha256_of_file
from engine.rows import parse_instruction, parse_pair


MAX_WEIGHT = 1000    # times that an epoch repeats a file


def parse_sources(text: str) -> list[tuple[str, float]]:
    """
    "a.json:0.5,b.jsonl" -> [("a.json", 0.5), ("b.jsonl", 1.0)]: files to mix, each with its weight (default 1).

    A file of weight w adds round(w * rows) of its rows to an epoch: below 1 a random subset, a new one each epoch;
    above 1 all rows floor(w) times and a random subset once more.
    """
    sources = []
    for item in text.split(","):
        path, weight = os.path.expanduser(item.strip()), 1.0
        if not path.endswith((".json", ".jsonl")):
            path, _, number = path.rpartition(":")
            try:
                weight = float(number)
            except ValueError:
                weight = math.nan
            if not path.endswith((".json", ".jsonl")) or not 0 < weight <= MAX_WEIGHT:
                raise UserError(f"data: found {item!r}, expected FILE.json, FILE.jsonl or FILE.json:WEIGHT "
                                f"with a weight above 0, at most {MAX_WEIGHT:,}; separate several by commas")
        sources.append((path, weight))
    return sources


# -----------------------------------------------------------------------------
# The JSON reader
#
# It works on the file's bytes as Latin-1 text, one character per byte, so that a position in the text is a byte offset.
# All of JSON's punctuation is ASCII, and no byte of a longer UTF-8 character is, so a row begins and ends at the same
# place as in the decoded text. Its own bytes are then decoded as UTF-8.

DECODER = json.JSONDecoder()
SPACE = re.compile(r"[ \t\r\n]*")


def scan_rows(path: str, lenient: bool = False) -> Iterator[tuple[int, int, object]]:
    """
    (byte offset, byte size, row) of each row of a .json file, which is one list and is read as a whole, or of a .jsonl
    file, which has one row per line. Blank lines, and a byte order mark at the start, do not count.

    lenient: a line of a .jsonl file that is no JSON is yielded as its UserError, and the next one is read.
    """
    with user_file(path) as file:
        refuse_stand_in(path, file)
        if file.read(3) != codecs.BOM_UTF8:
            file.seek(0)
        yield from read_lines(path, file, lenient) if path.endswith(".jsonl") else read_list(path, file)


def read_lines(path, file, lenient):
    offset = file.tell()
    for number, line in enumerate(file, start=1):
        text = line.decode("latin-1").rstrip(" \t\r\n")
        if text:
            try:
                start, end, row = parse_value(path, text, 0, number)
                if end < len(text):
                    raise malformed(path, text, skip_space(text, end), "Extra data", number)
            except UserError as error:
                if not lenient:
                    raise
                start, end, row = 0, len(text), error
            yield offset + start, end - start, row
        offset += len(line)


def read_list(path, file):
    offset = file.tell()
    text = file.read().decode("latin-1")
    at = skip_space(text, 0)
    if not text.startswith("[", at):
        found = text[at:at + 60].encode("latin-1").decode(errors="replace")
        raise expected(path, found, "a list of rows; if it has one object per line, name it .jsonl")
    at = skip_space(text, at + 1)
    mark = text[at:at + 1]
    while mark != "]":
        start, end, row = parse_value(path, text, at)
        yield offset + start, end - start, row
        at = skip_space(text, end)
        mark = text[at:at + 1]
        if mark == ",":
            comma, at = at, skip_space(text, at + 1)
            if text.startswith("]", at):
                raise malformed(path, text, comma, "Illegal trailing comma before end of array")
        elif mark != "]":
            raise malformed(path, text, at, "Expecting ',' delimiter")
    end = skip_space(text, at + 1)
    if end < len(text):
        raise malformed(path, text, end, "Extra data")


def parse_value(path, text, at, line=1):
    """The next JSON value in `text`, which begins at this line of the file -> (its start, its end, the value)."""
    start = skip_space(text, at)
    try:
        _, end = DECODER.raw_decode(text, start)
        return start, end, json.loads(text[start:end].encode("latin-1").decode())
    except json.JSONDecodeError as error:
        raise malformed(path, text, error.pos, error.msg, line) from None
    except UnicodeDecodeError as error:
        raise malformed(path, text, start + error.start, "bytes that are not UTF-8", line) from None
    except (ValueError, RecursionError) as error:  # a number of 5,000 digits, 100,000 brackets
        raise malformed(path, text, start, error, line) from None


def skip_space(text, at):
    return SPACE.match(text, at).end()


def malformed(path, text, at, problem, line=1):
    """The error at a position of `text`, which begins at this line of the file. Columns count characters, not bytes."""
    line += text.count("\n", 0, at)
    column = len(text[text.rfind("\n", 0, at) + 1:at].encode("latin-1").decode(errors="replace")) + 1
    return UserError(f"{path} line {line}: malformed JSON, {problem} at column {column}")


# -----------------------------------------------------------------------------
# The index of a file

# A row is usable if max_length is at least min_length: an instruction row then keeps all its image tokens and at least
# one supervised token, a pair everything. min_length = 0: no answer, so nothing is supervised at any length. WRONG: the
# row is wrong, and is left out (skip_bad_rows). EQUAL: a pair of two equal answers.
ROW = np.dtype([("offset", "<i8"), ("size", "<i4"),  # of the row's JSON in the file, in bytes
                ("tokens", "<i4"),  # of the whole row, image tokens included; for a pair, of its longer side
                ("min_length", "<i4")])
WRONG, EQUAL = -1, -2
INDEX_VERSION = 4  # raise it when these numbers are computed differently: all indexes are then built again


def open_index(path: str, settings: dict, measure_row: Callable, skip_bad_rows: bool = False) -> tuple[np.ndarray, dict]:
    """
    The index of a data file -> (its rows, what it says about the file: size, time, SHA-256, a digest of the sizes of its
    images, and its wrong rows).

    It is FILE.<8 hex digits>.index. The digits are a digest of `settings`, on which the numbers depend: tokenizer,
    template, ... (not max_length, which is compared with min_length). A changed data file is indexed again.
    """
    key = digest([INDEX_VERSION, settings])
    index = Path(f"{path}.{key[:8]}.index")
    with user_file(path) as file:
        about = {"cache_key": key, **mtime_size(file.fileno())}
    if os.path.exists(index):
        try:
            rows, saved = load_index(index)
        except Exception as error:  # damaged bytes can fail in any way
            print(f"{index}: damaged ({' '.join(str(error).split())}); building it again", file=sys.stderr)
        else:
            if about.items() <= saved.items() and (skip_bad_rows or not saved.get("wrong")):
                return rows, saved
            reason = "changed since it was indexed" if not about.items() <= saved.items() else "had wrong rows when it was indexed"
            print(f"{path}: {reason}; building its index again", file=sys.stderr)

    hint = "make the folder writable, or copy the data file into one that is"
    with atomic(index, note=hint, unique=True) as tmp:  # two machines may build the same index at once
        tmp.touch()  # where no index can be written, stop now and not after the last row
        wrong, images = [], {}
        rows = np.fromiter(measure_rows(path, measure_row, wrong, images), ROW)
        if wrong and not skip_bad_rows:
            raise UserError(told(path, wrong))
        if wrong:
            about["wrong"] = wrong
        about |= {"sha256": sha256_of_file(path), "images": digest(sorted(images.items()))}
        if not mtime_size(path).items() <= about.items():
            raise UserError(f"{path}: changed while it was being indexed; start again when it is complete")
        save_index(tmp, rows, about)
    return rows, about


def save_index(path, rows, about):
    """A line of JSON, then the rows as they are in memory."""
    about = {**about, "checksum": digest([about, hashlib.sha256(rows).hexdigest()])}
    path.write_bytes(json.dumps(about).encode() + b"\n" + rows.tobytes())


def load_index(path):
    with user_file(path) as file:
        line, _, body = file.read().partition(b"\n")
    about = json.loads(line)
    if about.pop("checksum") != digest([about, hashlib.sha256(body).hexdigest()]):
        raise ValueError("its checksum is wrong")
    return np.frombuffer(body, ROW), about


def measure_rows(path, measure_row, wrong, images):
    """Yield a ROW for each row of a data file, and report the progress every few seconds. Fills `wrong`, a list of the wrong
    rows, [number, what is wrong], and `images`, {name: size in bytes}."""
    file_size, start, reported = os.path.getsize(path), time.time(), time.time()
    for number, (offset, size, raw) in enumerate(scan_rows(path, lenient=True)):
        try:
            if isinstance(raw, UserError):                           # a line that is no JSON
                raise raw
            yield offset, size, *measure_row(raw, images)
        except UserError as error:
            wrong.append([number, str(error) if error is raw else f"{row_name(path, number, raw)}: {error}"])
            yield offset, size, 0, WRONG
        if time.time() - reported > 5:
            reported = time.time()
            print(f"{path}: {number + 1:,} rows indexed, {(number + 1) / (reported - start):,.0f} a second, "
                  f"{offset / file_size:.0%} of the file", file=sys.stderr)


def told(path, wrong):
    """All wrong rows of a file in one line."""
    (_, first), *others = wrong
    if not others:
        return first
    numbers = ", ".join(str(number) for number, _ in others[:5]) + ", ..." * (len(others) > 5)
    return f"{first} (python -m tools.check --data={path} lists all of them); {len(others):,} more rows are wrong: {numbers}"


def row_name(path, number, raw):
    """FILE row N id ID, for messages. N counts from 0: json.load(file)[N]."""
    return f"{path} row {number}" + (f" id {shorten(raw.get('id', raw.get('idx')))}" if isinstance(raw, dict) else "")


def mtime_size(file):
    """What tells a file (a path, or the number of an open one) from a later version of it."""
    stat = os.stat(file)
    return {"size": stat.st_size, "mtime_ns": stat.st_mtime_ns}


def digest(value):
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


# -----------------------------------------------------------------------------
# The datasets


class RowData(torch.utils.data.Dataset):
    """
    The usable rows of several files, read one at a time. Subclasses define the two row formats.

    A row that is wrong stops everything with a UserError that names it, or with skip_bad_rows is left out and listed in
    `wrong`, as {"file", "row", "error"}. A valid row that is too long or has no answer
    is cut or dropped, and counted in `notes`, one line per reason, to be printed.

    lengths      tokens of each row, image tokens included; for a pair, of its longer side
    sources      [(first row, last row + 1, weight)] of each file, for the Sampler
    fingerprint  equal for two datasets with the same file contents and images of the same sizes in bytes (when the file was
                 indexed: millions of images are not looked at again), the same rows kept, tokenized in the same way
    """
    parse: Callable    # a raw row -> (image names, conversations), from engine/rows.py
    can_be_cut: bool   # whether a row longer than max_length is cut; if not, it is dropped
    why_dropped: str

    def __init__(self, files: list[tuple[str, float]], image_dir: str, tokenizer: Tokenizer, template: str,
                 image_tokens: int, image_size: int, max_length: int, skip_bad_rows: bool = False):
        self.image_dir, self.tokenizer, self.template = image_dir, tokenizer, template
        self.image_tokens, self.image_size, self.max_length = image_tokens, image_size, max_length
        self.paths = [path for path, _ in files]
        settings = {"rows": type(self).__name__, "tokenizer": digest(tokenizer.to_str()),
                    "template": [template, TEMPLATES.get(template)], "image_tokens": image_tokens}
        # An index also says that the images exist, in one folder; the data is the same with its images in another.
        index_settings = {**settings, "image_dir": os.path.abspath(image_dir)}
        indexes, self.abouts = zip(*[open_index(path, index_settings, self.measure_row, skip_bad_rows) for path in self.paths])
        self.wrong = [{"file": path, "row": number, "error": error} for path, about in zip(self.paths, self.abouts)
                      for number, error in about.get("wrong", [])]
        left_out = [[i, number] for i, about in enumerate(self.abouts) for number, _ in about.get("wrong", [])]
        contents = [[about["sha256"], about["images"]] for about in self.abouts]
        self.fingerprint = digest([settings, max_length, contents, *[left_out] * bool(left_out)])

        self.index = np.concatenate(indexes)
        self.starts = np.cumsum([0, *map(len, indexes)])  # where each file begins in it
        self.kept = self.usable_rows()
        self.lengths = np.minimum(self.index["tokens"][self.kept], min(max_length, 2**31 - 1), dtype=np.int32)
        bounds = np.searchsorted(self.kept, self.starts).tolist()
        self.sources = [(start, stop, weight) for start, stop, (_, weight) in zip(bounds, bounds[1:], files)]

    def usable_rows(self):
        """The numbers of the rows that can be used at max_length; sets `notes`."""
        no_answer, too_long = self.index["min_length"] == 0, self.index["min_length"] > self.max_length
        equal = self.index["min_length"] == EQUAL
        usable = ~(no_answer | too_long | equal | (self.index["min_length"] == WRONG))
        cut = usable & (self.index["tokens"] > self.max_length)
        self.notes = []
        if self.wrong:
            self.notes.append(f"{len(self.wrong):,} of {len(cut):,} rows are wrong and left out, since skip_bad_rows is set "
                              f"(first: {self.wrong[0]['error']})")
        if cut.any() or too_long.any():
            first = self.name(np.argmax(too_long if too_long.any() else cut))
            self.notes.append(f"{(cut | too_long).sum():,} of {len(cut):,} rows are longer than "
                              f"max_length={self.max_length}: {cut.sum():,} cut, {too_long.sum():,} dropped since "
                              f"{self.why_dropped} (first: {first})")
        if no_answer.any():
            self.notes.append(f"{no_answer.sum():,} of {len(cut):,} rows have no answer to train on and are dropped "
                              f"(first: {self.name(np.argmax(no_answer))})")
        if equal.any():
            self.notes.append(f"{equal.sum():,} of {len(cut):,} pairs have two equal answers, which teach nothing, and are "
                              f"dropped (first: {self.name(np.argmax(equal))})")
        if not usable.any():
            reason = "; ".join(self.notes) or "the files are empty"
            raise UserError(f"{', '.join(self.paths)}: no row left to train on: {reason}")
        return np.flatnonzero(usable)

    def measure_row(self, raw, images):
        """Check everything about a raw row -> its `tokens` and `min_length` in the index."""
        names, conversations = self.parse(raw)
        tokens, min_lengths = zip(*[measure(conversation, self.tokenizer, self.template, self.image_tokens)
                                    for conversation in conversations])
        for name in names:  # whether an image can be decoded shows when it is read
            if name not in images:
                images[name] = image_bytes(os.path.join(self.image_dir, name))
        if 0 in min_lengths:
            return max(tokens), 0
        texts = [[turn["value"] for turn in conversation] for conversation in conversations]
        if len(texts) == 2 and texts[0] == texts[1]:
            return max(tokens), EQUAL
        return max(tokens), max(min_lengths if self.can_be_cut else tokens)

    def held_out(self, count: int) -> np.ndarray:
        """`count` rows to measure the loss on instead of training on them, (count,) row numbers in order.

        They follow from the content of the files alone: the same in every run, on every rank.
        """
        if count >= len(self):
            raise UserError(f"val_rows={count}, but there are only {len(self):,} rows in all; hold out fewer")
        draws = [np.random.default_rng(int(about["sha256"][:16], 16)).random(stop - start)
                 for about, start, stop in zip(self.abouts, self.starts, self.starts[1:])]
        return np.sort(np.concatenate(draws)[self.kept].argsort(kind="stable")[:count])

    def locate(self, row):
        """A row of the index -> (its file, its number in that file)."""
        file = int(np.searchsorted(self.starts, row, side="right")) - 1
        return file, row - self.starts[file]

    def read(self, row):
        """The raw row from its file. Opening the file each time is cheap, and works in any worker process."""
        file, _ = self.locate(row)
        path, offset, size = self.paths[file], int(self.index["offset"][row]), int(self.index["size"][row])
        with user_file(path) as data:
            is_unchanged = mtime_size(data.fileno()).items() <= self.abouts[file].items()
            text = os.pread(data.fileno(), size, offset)
        if not is_unchanged:
            raise UserError(f"{path}: changed since it was indexed; start again")
        try:
            return json.loads(text.decode())
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path} bytes {offset} to {offset + size}: not the row that was indexed, {error}; "
                            "delete the index and start again") from None

    def name(self, row):
        file, number = self.locate(row)
        return row_name(self.paths[file], number, self.read(row))

    def describe(self, i: int) -> str:
        """The file and row number behind data[i], for messages."""
        file, number = self.locate(self.kept[i])
        return f"{self.paths[file]} row {number}"

    def __getitem__(self, i):
        names, conversations = self.parse(self.read(self.kept[i]))
        try:
            images = [load_image(os.path.join(self.image_dir, name)) for name in names]
        except UserError as error:
            raise UserError(f"{self.describe(i)}: {error} (python -m tools.check --decode finds all such rows)") from None
        images = [transform_image(image, self.image_size) for image in images]
        sequences = [render(conversation, self.tokenizer, self.template, self.image_tokens)
                     for conversation in conversations]
        return self.sample(sequences, images)

    def __len__(self):
        return len(self.kept)


class InstructionData(RowData):
    """
    Instruction rows (`engine.rows.parse_instruction`).

    A row longer than max_length is cut on the right if it keeps all its image tokens and a supervised token.
    """
    parse = staticmethod(parse_instruction)
    can_be_cut, why_dropped = True, "no answer is left, or not every image"

    def sample(self, sequences, images):
        [(ids, mask)] = sequences
        return {"input_ids": ids[:self.max_length], "mask": mask[:self.max_length], "images": images}


class PreferenceData(RowData):
    """
    Preference rows (`engine.rows.parse_pair`).

    A pair that does not fit max_length is dropped, never cut: the loss compares the summed log-probabilities of whole
    answers, and a cut answer is a different answer.
    """
    parse = staticmethod(parse_pair)
    can_be_cut, why_dropped = False, "a cut answer is a different answer"

    def sample(self, sequences, images):
        (chosen_ids, chosen_mask), (rejected_ids, rejected_mask) = sequences
        return {"chosen_ids": chosen_ids, "chosen_mask": chosen_mask,
                "rejected_ids": rejected_ids, "rejected_mask": rejected_mask, "images": images}


def measure(conversation: list[dict], tokenizer: Tokenizer, template: str, image_tokens: int) -> tuple[int, int]:
    """
    A conversation -> (tokens, min_length), as in the index.

    Special tokens split the text before BPE sees it, so it is enough to render one token per image and to add the
    others afterwards.
    """
    ids, mask = render(conversation, tokenizer, template, image_tokens=1)
    image_id = tokenizer.token_to_id(IMAGE)
    images = [position for position, token in enumerate(ids) if token == image_id]
    others = image_tokens - 1  # of each image
    tokens = len(ids) + others * len(images)
    if 1 not in mask:
        return tokens, 0
    answer = mask.index(1)  # the first supervised position
    answer += others * sum(image < answer for image in images)
    last_image = images[-1] + others * len(images) if images else 0
    return tokens, max(answer, last_image) + 1
