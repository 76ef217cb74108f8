r"""
From files on disk to padded tensors: everything that happens before the model sees a batch.

A training row is a conversation about some images:

    {"id": "7", "image": "cat.jpg", "conversations": [
        {"from": "human", "value": "<image>\nWhat is on the mat?"},
        {"from": "gpt",   "value": "A cat."}]}

and it becomes one sequence of token ids with a mask of the same length (here per character, and with 3 image tokens):

    A chat between ... USER: <image><image><image>\nWhat is on the mat? ASSISTANT: A cat.<|endoftext|>
    00000000000000000000000000000000000000000000000000000000000000000000000000000011111111111111111111

The mask is the whole point. Only what the assistant says, and the token with which it stops, is ever learned or
distilled; system text, questions and image positions are context. A mask that is one token off is the classic
silent bug of this trade, so one function, `render`, owns it. See its work with `show(ids, mask, tokenizer)`.

Read top-down: 1. conversations to ids and mask, 2. images to pixels, 3. files to rows, 4. the index of a file,
5. rows to samples, 6. samples to batches, 7. the order of batches. B = batch, T = tokens, N = images of a batch,
S = image side in pixels.
"""
import array
import codecs
import hashlib
import io
import itertools
import json
import math
import os
import re
import signal
import sys
import time
import uuid
from collections.abc import Callable, Iterable, Iterator

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from tokenizers import Tokenizer
from torch.utils.data import DataLoader

from configurator import UserError, shorten



# --------------------------------------------------------------------------------------------------------------
# 1. Conversations to ids and mask

IMAGE = "<image>"  # where an image stands in the text; render repeats it once per patch, as Hugging Face does

# A template is five strings; {} takes the question or the answer. Learned is answer + end, and nothing else.
TEMPLATES = {
    # Vicuna's layout with Qwen's end token: what LLaVA-MoD trains with (its code calls it "qwen"). The prompt stops
    # right after "ASSISTANT:", and the space that follows belongs to the answer: BPE glues it to the first word.
    "vicuna": {
        "start": "A chat between a curious user and an artificial intelligence assistant. "
                 "The assistant gives helpful, detailed, and polite answers to the user's questions. ",
        "ask": "USER: {} ASSISTANT:",
        "answer": " {}",
        "end": "<|endoftext|>",
        "after": "",
    },
    # Qwen's own chat layout. The newline after <|im_end|> is typed by the template, never by the model.
    "chatml": {
        "start": "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n",
        "ask": "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n",
        "answer": "{}",
        "end": "<|im_end|>",
        "after": "\n",
    },
}


def render(conversations: list[dict], tokenizer: Tokenizer, template: str = "vicuna",
           image_tokens: int = 576) -> tuple[list[int], list[int]]:
    """
    A conversation -> (ids, mask), two lists of the same length; the mask is 1 on answers and their end tokens.

    We write the text turn by turn and note, character by character, which of it the assistant has to write itself.
    Then the whole text is tokenised once, so that the ids are what Hugging Face's processor gives for it, and a
    token is learned if its first character is. (Tokenising piece by piece is not the same where pieces fuse: a
    chatml answer that starts with a newline makes one token, "\\n\\n", with the newline of the template.)

    A conversation that ends with a question gives a generation prompt: it stops where the assistant is to speak.
    An empty answer is legal, and teaches the model to stop at once.
    """
    if template not in TEMPLATES:
        raise UserError(f"unknown template {template!r}, expected one of {', '.join(TEMPLATES)}")
    layout = TEMPLATES[template]
    check_turns(conversations)

    text, learned = layout["start"], bytearray(len(layout["start"]))  # one byte of learned per character of text
    for turn in conversations:
        value = turn["value"].replace(IMAGE, IMAGE * image_tokens)
        if turn["from"] == "human":
            pieces = [(layout["ask"].format(value), 0)]
        else:
            pieces = [(layout["answer"].format(value) + layout["end"], 1), (layout["after"], 0)]
        for piece, is_learned in pieces:
            text += piece
            learned += bytes([is_learned]) * len(piece)

    for token in [IMAGE, layout["end"]]:
        if token in text and tokenizer.token_to_id(token) is None:
            raise UserError(f"the tokenizer does not know {token}, which the {template} conversation needs; "
                            "take the tokenizer of a LLaVA checkpoint with that template")
    try:
        encoding = tokenizer.encode(text, add_special_tokens=False)
    except (TypeError, UnicodeEncodeError):  # half of a surrogate pair, which JSON can spell and UTF-8 cannot
        raise UserError("the text holds a lone surrogate (\\ud800 to \\udfff), not a character; remove it") from None
    return encoding.ids, [learned[start] for start, _ in encoding.offsets]


def check_turns(conversations):
    """Turns are {"from", "value"} and alternate, human first; images stand in what the human says."""
    if not isinstance(conversations, list) or not conversations:
        raise UserError(f"found {shorten(conversations)} as a conversation, expected a list of at least one turn")
    for i, turn in enumerate(conversations):
        expected = ["human", "gpt"][i % 2]
        if not isinstance(turn, dict) or not isinstance(turn.get("value"), str):
            raise UserError(f'turn {i} is {shorten(turn)}, expected {{"from": "{expected}", "value": "some text"}}')
        if turn.get("from") != expected:
            raise UserError(f"turn {i} is from {shorten(turn.get('from'))}, expected \"{expected}\": "
                            "turns alternate human, gpt, human, ...")
        if expected == "gpt" and IMAGE in turn["value"]:
            raise UserError(f"turn {i} is an answer and holds {IMAGE}; images can only stand in questions")


def show(ids: list[int], mask: list[int], tokenizer: Tokenizer) -> None:
    """Print a sample: what the model has to learn in green, a run of image tokens as <image>×576."""
    image_id = tokenizer.token_to_id(IMAGE)
    kinds = [(token == image_id, is_learned) for token, is_learned in zip(ids, mask)]
    for (is_image, is_learned), run in itertools.groupby(range(len(ids)), key=lambda t: kinds[t]):
        run = [ids[t] for t in run]
        text = f"{IMAGE}×{len(run)}" if is_image else tokenizer.decode(run, skip_special_tokens=False)
        print(f"\033[32m{text}\033[0m" if is_learned else text, end="")
    print()

# --------------------------------------------------------------------------------------------------------------
# 2. Images to pixels

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
PAD_COLOUR = tuple(int(255 * mean) for mean in CLIP_MEAN)  # (122, 116, 104), nearly 0 once normalised


def transform_image(image: Image.Image, size: int = 336, pad: bool = True) -> torch.Tensor:
    """
    A PIL image -> (3, size, size) float32, as CLIP was trained to see it.

    CLIP's own recipe scales the short edge to `size` and crops the middle, which loses the ends of a wide photo.
    LLaVA-1.5 pads to a square first (pad=True): smaller, but all there.
    """
    image = to_rgb(image)
    width, height = image.size
    if pad and width != height:
        side = max(width, height)
        square = Image.new("RGB", (side, side), PAD_COLOUR)
        square.paste(image, ((side - width) // 2, (side - height) // 2))
        image, width, height = square, side, side

    short = min(width, height)
    width, height = int(size * width / short), int(size * height / short)
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = (width - size) // 2, (height - size) // 2
    image = image.crop((left, top, left + size, top + size))

    pixels = np.array(image, dtype=np.float32) / 255  # (S, S, 3)
    pixels = (pixels - np.float32(CLIP_MEAN)) / np.float32(CLIP_STD)
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()  # (3, S, S)


def to_rgb(image):
    """Any PIL mode to RGB. What is transparent becomes white, as in transformers: the colour hidden there is junk."""
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def load_image(path: str) -> Image.Image:
    """Read and fully decode an image file, as RGB. EXIF rotation is ignored, as in the official code."""
    try:
        with Image.open(path) as image:
            return to_rgb(image)
    except FileNotFoundError:
        raise UserError(f"{path}: no such image file") from None
    except Exception as error:  # broken bytes make Pillow's decoders raise nearly anything: OSError, SyntaxError, ...
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise UserError(f"{path}: not a readable image ({reason}); replace the file") from None

# --------------------------------------------------------------------------------------------------------------
# 3. Files to rows


def parse_sources(text: str) -> list[tuple[str, float]]:
    """
    "a.json:0.5,b.jsonl" -> [("a.json", 0.5), ("b.jsonl", 1.0)]: files to mix, each with its weight (default 1).

    A file of weight w gives round(w * rows) of its rows to an epoch: below 1 a random subset, drawn anew each epoch;
    above 1 all rows floor(w) times, and a random subset once more.
    """
    sources = []
    for item in text.split(","):
        path, weight = item.strip(), 1.0
        if not path.endswith((".json", ".jsonl")):
            path, _, number = path.rpartition(":")
            try:
                weight = float(number)
            except ValueError:
                weight = math.nan
            if not path.endswith((".json", ".jsonl")) or not 0 < weight < math.inf:
                raise UserError(f"data: found {item!r}, expected FILE.json, FILE.jsonl or FILE.json:WEIGHT "
                                "with a weight above 0; separate several by commas")
        sources.append((path, weight))
    return sources


WINDOW = 1 << 20  # bytes of a file that are read at a time
LOOK_AHEAD = 16   # characters whose meaning can depend on what comes next, and more: 1.|5, -Infin|ity, \ud8|3d
SPACE = re.compile(r"[ \t\r\n]*")
DECODER = json.JSONDecoder()


def read_rows(path: str) -> Iterator[tuple[int, int, object]]:
    """
    Yield (byte offset, byte size, row) for each row of a .json file, which is one list, or of a .jsonl file, which has
    one row per line (blank lines do not count). Only a window of the file is in memory, however large it is.
    """
    try:
        with open(path, "rb") as file:
            if file.read(3) == codecs.BOM_UTF8:
                raise UserError(f"{path} line 1: malformed JSON, a byte order mark; save the file as UTF-8 without one")
            file.seek(0)
            yield from (read_lines if path.endswith(".jsonl") else read_list)(path, file)
    except OSError as error:
        raise unreadable(path, error) from None


def unreadable(path, error):
    return UserError(f"{path}: cannot be read ({error.strerror}); check the path")


def read_lines(path, file):
    offset = 0
    for number, line in enumerate(file):
        window = Window(path, io.BytesIO(line.rstrip(b"\r\n")), offset, number)
        if window.peek():
            row = window.take()
            if window.peek():
                window.fail("Extra data", window.at)
            yield row
        offset += len(line)


def read_list(path, file):
    window = Window(path, file)
    if window.peek() != "[":
        _, _, value = window.take()
        if not window.peek():
            raise UserError(f"{path}: found {shorten(value)}, expected a list of rows")
        window.fail("Extra data", window.at, hint="; one object per line? then name the file .jsonl")
    window.at += 1
    mark = window.peek()
    while mark != "]":
        yield window.take()
        mark = window.peek()
        if mark not in (",", "]"):
            window.fail("Expecting ',' delimiter", window.at)
        if mark == ",":
            window.at += 1
    window.at += 1
    if window.peek():
        window.fail("Extra data", window.at, hint="; one object per line? then name the file .jsonl")


class Window:
    """
    The part of a JSON file that we look at, and where in it we stand. It slides on and grows to the value being read.

    Its text is the file's bytes as Latin-1, one character per byte. Brackets, commas and quotes are ASCII, and no byte
    of a longer UTF-8 character is, so the decoder finds the same values, and every position is a byte offset.
    """

    def __init__(self, path, file, offset=0, line=0):
        self.path, self.file, self.text, self.at = path, file, "", 0
        self.offset, self.line, self.column = offset, line, 0  # of the window's first character in the file, from 0

    def more(self):
        """Read on; False at the end of the file."""
        data = self.file.read(max(WINDOW, len(self.text)))  # doubles, so that a long row is not decoded too often
        self.text += data.decode("latin-1")
        return bool(data)

    def peek(self):
        """Step over white space, to the next character; that is "" at the end of the file."""
        self.at = SPACE.match(self.text, self.at).end()
        while self.at == len(self.text) and self.more():
            self.at = SPACE.match(self.text, self.at).end()
        return self.text[self.at:self.at + 1]

    def take(self):
        """Step over the next value -> (its byte offset, its byte size, the value)."""
        self.peek()
        if self.at > WINDOW:  # slide
            self.line, self.column = self.place(self.at)
            self.offset, self.text, self.at = self.offset + self.at, self.text[self.at:], 0
        while True:
            try:
                _, end = DECODER.raw_decode(self.text, self.at)
                if end + LOOK_AHEAD > len(self.text) and self.more():
                    continue
                data = self.text[self.at:end].encode("latin-1")
                value = json.loads(data.decode())
                break
            except json.JSONDecodeError as error:  # wrong, or just not read to its end yet
                is_cut = error.pos + LOOK_AHEAD > len(self.text) or error.msg.startswith("Unterminated string")
                if not is_cut or not self.more():
                    self.fail(error.msg, error.pos)
            except UnicodeDecodeError as error:
                self.fail("bytes that are not UTF-8", self.at + error.start)
            except (ValueError, RecursionError) as error:  # a number of 5,000 digits, a million brackets
                self.fail(" ".join(str(error).split()), self.at)
        offset, self.at = self.offset + self.at, end
        return offset, len(data), value

    def place(self, at):
        """Line and column of a position, in characters of the file, from 0."""
        passed = self.text[:at]
        column = len(passed[passed.rfind("\n") + 1:].encode("latin-1").decode(errors="replace"))
        return self.line + passed.count("\n"), column + (0 if "\n" in passed else self.column)

    def fail(self, found, at, hint=""):
        line, column = self.place(at)
        raise UserError(f"{self.path} line {line + 1}: malformed JSON, {found} at column {column + 1}{hint}") from None

# --------------------------------------------------------------------------------------------------------------
# 4. The index of a file

# The columns of an index. A row is usable if max_length is at least `need`: then it keeps all its image tokens and
# something to learn (a pair: everything). need = 0: there is nothing to learn in it at any length.
COLUMNS = {"offset": np.int64, "size": np.int32,  # where the row's JSON stands in the file, in bytes
           "tokens": np.int32,  # of the whole row, image tokens included; for a pair, of its longer side
           "need": np.int32}
INDEX_VERSION = 1  # a new number makes all existing indexes be built again


def open_index(path: str, settings: dict, measure: Callable) -> tuple[dict, dict]:
    """
    A data file's index -> (its columns, what it says about the file: its size, time and SHA-256).

    Millions of rows are too many to tokenise at every start, and too many to hold in memory. So every row is checked
    and measured once, and what is needed to choose and find rows, 20 bytes of each, is kept beside the file as
    FILE.<8 hex digits>.index. The digits are a digest of what the numbers depend on: the tokenizer, the template, ...
    but not max_length, which is compared with `need`. When the data file has changed, its index is built again.
    """
    key = digest([INDEX_VERSION, settings])
    index = f"{path}.{key[:8]}.index"
    try:
        wanted = {"key": key, **stamp(path)}
    except OSError as error:
        raise unreadable(path, error) from None
    if os.path.exists(index):
        try:
            with safe_open(index, "np") as file:
                columns, about = {name: file.get_tensor(name) for name in COLUMNS}, file.metadata()
            if about.pop("seal") != seal(columns, about):
                raise ValueError("its checksum is wrong")
        except Exception as error:  # bytes that broke make safetensors raise nearly anything
            print(f"{index}: damaged ({' '.join(str(error).split())}); building it again", file=sys.stderr)
        else:
            if wanted.items() <= about.items():
                return columns, about
            print(f"{path}: changed since it was indexed; building its index again", file=sys.stderr)
    return build_index(path, index, wanted, measure)


def build_index(path, index, about, measure):
    temporary = f"{index}.{uuid.uuid4().hex}.tmp"  # unique, since two machines may build the same index at once
    try:
        open(temporary, "x").close()  # if this is impossible, say so now and not after the last row
        columns, about["sha256"] = measure_rows(path, measure)
        if not stamp(path).items() <= about.items():
            raise UserError(f"{path}: changed while it was being indexed; start again when it is complete")
        save_file(columns, temporary, {**about, "seal": seal(columns, about)})
        os.replace(temporary, index)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: no index can be written beside it ({getattr(error, 'strerror', error)}); "
                        "make the folder writable, or copy the file into one that is") from None
    finally:
        if os.path.exists(temporary):
            os.remove(temporary)
    return columns, about


def measure_rows(path, measure):
    columns = {name: array.array(np.dtype(dtype).char) for name, dtype in COLUMNS.items()}
    seen = set()  # image files known to exist
    size, began, told = os.path.getsize(path), time.time(), time.time()
    for number, (offset, length, raw) in enumerate(read_rows(path)):
        try:
            tokens, need = measure(raw, seen)
        except UserError as error:
            raise UserError(f"{name_row(path, number, raw)}: {error}") from None
        for column, value in zip(columns.values(), [offset, length, tokens, need]):
            column.append(value)
        if time.time() - told > 5:
            told = time.time()
            print(f"{path}: {number + 1:,} rows indexed, {(number + 1) / (told - began):,.0f} a second, "
                  f"{offset / size:.0%} of the file", file=sys.stderr)
    contents = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(WINDOW):
            contents.update(block)
    return {name: np.array(column, COLUMNS[name]) for name, column in columns.items()}, contents.hexdigest()


def name_row(path, number, raw):
    """FILE row N id ID, for messages. N counts from 0: json.load(file)[N]."""
    return f"{path} row {number}" + (f" id {shorten(raw.get('id', raw.get('idx')))}" if isinstance(raw, dict) else "")


def stamp(file):
    """What is different when a file (a path, or an open one's number) is no longer the same."""
    stat = os.stat(file)
    return {"size": str(stat.st_size), "mtime_ns": str(stat.st_mtime_ns)}


def digest(value):
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def seal(columns, about):
    """A checksum over everything in an index."""
    contents = [(str(column.dtype), hashlib.sha256(column.tobytes()).hexdigest()) for column in columns.values()]
    return digest([about, contents])

# --------------------------------------------------------------------------------------------------------------
# 5. Rows to samples


def image_names(value):
    """The row's "image": absent, one name, or a list of names -> a list of names."""
    names = [] if value is None else value if isinstance(value, list) else [value]
    for name in names:
        if not isinstance(name, str):
            raise UserError(f'"image" is {shorten(value)}, expected a file name or a list of file names')
    return names


class RowData(torch.utils.data.Dataset):
    """
    What both datasets share: open the index of every file, choose the rows that max_length leaves usable, and read
    those from their file one at a time, when they are asked for.

    An instruction row is one conversation, a preference row is two about the same images. A subclass says how to
    get them out of a raw row (`parse`), what a row needs of max_length (`need`), and what a sample is.

    A row that is *wrong* stops everything with a UserError that names it. A row that is right but unusable, too
    long or without anything to learn, is cut or dropped, and counted: print `notes`, one line for each such group.

    lengths      tokens of each row kept, image tokens included; for a pair, of its longer side
    sources      [(first row, last row + 1, weight)] of each file, for the Sampler
    fingerprint  the same for two datasets of the same files with the same rows kept and tokenised in the same way
    """

    def __init__(self, files: list[tuple[str, float]], image_dir: str, tokenizer: Tokenizer, template: str,
                 image_tokens: int, image_size: int, max_length: int):
        self.image_dir, self.tokenizer, self.template = image_dir, tokenizer, template
        self.image_tokens, self.image_size, self.max_length = image_tokens, image_size, max_length
        self.paths = [path for path, _ in files]
        settings = {"rows": type(self).__name__, "tokenizer": digest(tokenizer.to_str()),
                    "template": [template, TEMPLATES.get(template)], "image_tokens": image_tokens}
        here = {**settings, "image_dir": os.path.abspath(image_dir)}  # whose images are there; not part of the data
        indexes, self.abouts = zip(*[open_index(path, here, self.measure) for path in self.paths])
        self.fingerprint = digest([settings, max_length, [about["sha256"] for about in self.abouts]])

        rows = {name: np.concatenate([index[name] for index in indexes]) for name in COLUMNS}  # of all files in a row
        counts = [len(index["need"]) for index in indexes]
        rows["file"] = np.repeat(np.arange(len(files), dtype=np.int32), counts)
        rows["number"] = np.concatenate([np.arange(count, dtype=np.int32) for count in counts])

        silent, too_long = rows["need"] == 0, rows["need"] > max_length
        usable = ~(silent | too_long)
        cut = usable & (rows["tokens"] > max_length)
        self.notes = []
        if cut.any() or too_long.any():
            first = self.name(rows, np.argmax(too_long if too_long.any() else cut))
            self.notes.append(f"{(cut | too_long).sum():,} of {len(cut):,} rows are longer than "
                              f"max_length={max_length}: {cut.sum():,} cut, {too_long.sum():,} dropped since "
                              f"{self.why_dropped} (first: {first})")
        if silent.any():
            self.notes.append(f"{silent.sum():,} of {len(silent):,} rows have no answer to learn from and are dropped "
                              f"(first: {self.name(rows, np.argmax(silent))})")
        if not usable.any():
            found = "; ".join(self.notes) or "the files are empty"
            raise UserError(f"{', '.join(self.paths)}: no row left to train on: {found}")

        self.rows = {name: rows[name][usable] for name in ["file", "number", "offset", "size"]}
        self.lengths = np.minimum(rows["tokens"][usable], max_length, dtype=np.int32)
        stops = np.cumsum(np.bincount(self.rows["file"], minlength=len(files))).tolist()
        self.sources = [(start, stop, weight) for start, stop, (_, weight) in zip([0, *stops], stops, files)]

    def measure(self, raw, seen):
        """Check everything about a raw row -> its `tokens` and `need` in the index."""
        if not isinstance(raw, dict):
            raise UserError(f"found {shorten(raw)}, expected an object")
        names, sides = self.parse(raw)
        tokens, needs = zip(*[self.measure_side(side) for side in sides])
        self.check_images(names, sides[0], seen)
        return max(tokens), 0 if 0 in needs else max(needs if self.may_be_cut else tokens)

    def measure_side(self, conversation):
        """
        The same for one conversation. Special tokens part the text before BPE sees it, so it is enough to render one
        token per image, and to count in the others afterwards.
        """
        ids, mask = render(conversation, self.tokenizer, self.template, image_tokens=1)
        image_id = self.tokenizer.token_to_id(IMAGE)
        images = [position for position, token in enumerate(ids) if token == image_id]
        others = self.image_tokens - 1
        tokens = len(ids) + others * len(images)
        if 1 not in mask:
            return tokens, 0
        first = mask.index(1)  # learned token
        first += others * sum(position < first for position in images)
        last = images[-1] + others * len(images) if images else 0  # image token
        return tokens, max(first, last) + 1

    def check_images(self, names, conversation, seen):
        """As many <image> as images, and every file there. Whether it can be decoded shows when it is used."""
        holes = sum(turn["value"].count(IMAGE) for turn in conversation)
        if holes != len(names):
            raise UserError(f"{holes} {IMAGE} in the text but {len(names)} images in the row; "
                            f"each image needs its own {IMAGE}")
        for name in names:
            path = os.path.join(self.image_dir, name)
            if path not in seen and not os.path.isfile(path):
                raise UserError(f"image {path!r} does not exist; check image_dir and the name")
            seen.add(path)

    def read(self, rows, i):
        """A raw row from its file. Opening the file anew costs little, and works in any worker process."""
        file, offset, size = [int(rows[name][i]) for name in ["file", "offset", "size"]]
        path, about = self.paths[file], self.abouts[file]
        try:
            with open(path, "rb", buffering=0) as data:
                is_the_indexed = stamp(data.fileno()).items() <= about.items()
                text = os.pread(data.fileno(), size, offset)
        except OSError as error:
            raise unreadable(path, error) from None
        if not is_the_indexed:
            raise UserError(f"{path}: changed since it was indexed; start again")
        try:
            return json.loads(text.decode())
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path} bytes {offset} to {offset + size}: not the row that was indexed here, {error}; "
                            "delete the index and start again") from None

    def name(self, rows, i):
        return name_row(self.paths[rows["file"][i]], rows["number"][i], self.read(rows, i))

    def describe(self, row: int) -> str:
        """Where a row comes from, for messages."""
        return f"{self.paths[self.rows['file'][row]]} row {self.rows['number'][row]}"

    def __getitem__(self, row):
        names, sides = self.parse(self.read(self.rows, row))
        try:
            images = [load_image(os.path.join(self.image_dir, name)) for name in names]
        except UserError as error:
            raise UserError(f"{self.describe(row)}: {error}") from None
        sequences = [render(side, self.tokenizer, self.template, self.image_tokens) for side in sides]
        return self.sample(sequences, [transform_image(image, self.image_size) for image in images])

    def __len__(self):
        return len(self.lengths)


class InstructionData(RowData):
    """
    LLaVA's instruction rows: {"id", "image": name or [names], "conversations": [turns]}; "image" may be absent.

    A row longer than max_length is cut on the right, as long as it keeps all its image tokens and something to learn.
    """
    may_be_cut, why_dropped = True, "no answer is left, or not every image"

    def parse(self, raw):
        if "conversations" not in raw:
            raise UserError(f'no "conversations", found the keys {shorten(sorted(raw))}')
        return image_names(raw.get("image")), [raw["conversations"]]

    def sample(self, sequences, images):
        [(ids, mask)] = sequences
        return {"input_ids": ids[:self.max_length], "mask": mask[:self.max_length], "images": images}


class PreferenceData(RowData):
    """
    Two answers to one question: {"id", "image", "chosen": [turns], "rejected": [turns]}, or RLAIF-V's own columns,
    "question", "chosen" and "rejected" (plain strings) and "image" or "image_path", where we put the image first.

    A pair that does not fit max_length is dropped, never cut: the loss compares the summed log-probabilities of whole
    answers, and a cut answer is another answer.
    """
    may_be_cut, why_dropped = False, "a cut answer is another answer"

    def parse(self, raw):
        for key in ["chosen", "rejected"]:
            if key not in raw:
                raise UserError(f'no "{key}", found the keys {shorten(sorted(raw))}')
        chosen, rejected = raw["chosen"], raw["rejected"]
        if isinstance(chosen, str):  # RLAIF-V
            names = image_names(raw["image"] if "image" in raw else raw.get("image_path"))
            question = raw.get("question")
            if not isinstance(question, str):
                raise UserError(f'"question" is {shorten(question)}, expected a text, as "chosen" is one')
            ask = {"from": "human", "value": f"{IMAGE}\n" * len(names) + question}
            return names, [[ask, {"from": "gpt", "value": answer}] for answer in (chosen, rejected)]

        check_turns(chosen)
        check_turns(rejected)
        if [turn["value"] for turn in chosen[0::2]] != [turn["value"] for turn in rejected[0::2]]:
            raise UserError('the human turns of "chosen" and "rejected" differ; a pair answers one question twice')
        return image_names(raw.get("image")), [chosen, rejected]

    def sample(self, sequences, images):
        (chosen_ids, chosen_mask), (rejected_ids, rejected_mask) = sequences
        return {"chosen_ids": chosen_ids, "chosen_mask": chosen_mask,
                "rejected_ids": rejected_ids, "rejected_mask": rejected_mask, "images": images}

# --------------------------------------------------------------------------------------------------------------
# 6. Samples to batches


def collate(samples: list[dict], pad_token_id: int) -> dict:
    """
    B samples -> input_ids (B, T) long, mask (B, T) bool, pixel_values (N, 3, S, S), or None if no row has an image.

    Rows are padded on the right: positions need no correction then, and causal attention never looks at padding.
    The N images stand in reading order, row after row; the model deals them out to the image tokens in that order.
    """
    return {"input_ids": pad_right([sample["input_ids"] for sample in samples], pad_token_id),
            "mask": pad_right([sample["mask"] for sample in samples], 0).bool(),
            "pixel_values": stack_images(samples)}


def collate_pairs(samples: list[dict], pad_token_id: int) -> dict:
    """
    B pairs -> the same with 2B rows: first all chosen answers, then all rejected ones, so that one pass scores both.

    pixel_values holds the images of each pair once: the vision tower sees them once, and the caller repeats their
    features for the second half.
    """
    sides = [(sample, side) for side in ("chosen", "rejected") for sample in samples]
    return {"input_ids": pad_right([sample[f"{side}_ids"] for sample, side in sides], pad_token_id),
            "mask": pad_right([sample[f"{side}_mask"] for sample, side in sides], 0).bool(),
            "pixel_values": stack_images(samples)}


def pad_right(rows, value):
    out = torch.full((len(rows), max(map(len, rows))), value)  # (B, T)
    for i, row in enumerate(rows):
        out[i, :len(row)] = torch.tensor(row)
    return out


def stack_images(samples):
    images = [image for sample in samples for image in sample["images"]]
    return torch.stack(images) if images else None  # (N, 3, S, S)

# --------------------------------------------------------------------------------------------------------------
# 7. The order of batches


class Sampler:
    """
    Which rows form the global batch of step 0, 1, 2, ...: a pure function of (seed, step). So the position in the
    data is just the step, and a resumed run goes on with the very batch that the interrupted one would have had.

    An epoch draws its rows (see `parse_sources` for weights), shuffles them, and takes them 50 batches at a time:
    each such stretch is sorted by length and cut into batches, and then all batches of the epoch are shuffled. So
    rows of one batch are of similar length, which saves padding, while it stays random which rows meet. A batch has
    exactly batch_size rows; the few left over at the end of an epoch are dropped, other ones each time.
    """
    MEGABATCH = 50  # batches sorted together: more means less padding and less chance

    def __init__(self, lengths: np.ndarray, batch_size: int, seed: int = 0,
                 sources: list[tuple[int, int, float]] | None = None):
        for name, value, least in [("batch_size", batch_size, 1), ("seed", seed, 0)]:
            if value < least:
                raise UserError(f"{name}={value}, expected at least {least}")
        self.lengths, self.batch_size, self.seed = np.asarray(lengths), batch_size, seed
        self.sources = sources or [(0, len(lengths), 1.0)]
        rows_per_epoch = sum(round(weight * (stop - start)) for start, stop, weight in self.sources)
        self.steps_per_epoch = rows_per_epoch // batch_size
        if self.steps_per_epoch == 0:
            raise UserError(f"an epoch has {rows_per_epoch} rows, fewer than batch_size={batch_size}; "
                            "lower batch_size or give more data")
        self._epoch, self._batches = None, None  # the epoch worked out last

    def batch(self, step: int) -> list[int]:
        """The rows of global batch `step`, sorted by length."""
        epoch, position = divmod(step, self.steps_per_epoch)
        if epoch != self._epoch:
            self._epoch, self._batches = epoch, self.shuffle(epoch)
        return self._batches[position].tolist()

    def shuffle(self, epoch):
        """All batches of an epoch, (steps_per_epoch, batch_size) row numbers."""
        rng = np.random.default_rng([self.seed, epoch])
        rows = []
        for start, stop, weight in self.sources:
            left = round(weight * (stop - start))
            while left > 0:
                rows.append(start + rng.permutation(stop - start)[:left])
                left -= len(rows[-1])
        rows = rng.permutation(np.concatenate(rows))[:self.steps_per_epoch * self.batch_size]

        stretch = self.MEGABATCH * self.batch_size
        for i in range(0, len(rows), stretch):
            part = rows[i:i + stretch]
            rows[i:i + stretch] = part[np.argsort(self.lengths[part], kind="stable")]
        return rng.permutation(rows.reshape(self.steps_per_epoch, self.batch_size))

    def state_dict(self) -> dict:
        """What must be the same after a restart, for a step to mean the same rows."""
        return {"seed": self.seed, "rows": len(self.lengths), "batch_size": self.batch_size,
                "sources": [list(source) for source in self.sources]}

    def load_state_dict(self, state: dict) -> None:
        """Check that this is the sampler whose state was saved; there is nothing else to restore."""
        for key, now in self.state_dict().items():
            if state.get(key) != now:
                raise UserError(f"the interrupted run had {key}={state.get(key)}, this one has {key}={now}; "
                                "resume with the same data and settings, or start in a new out_dir")


def micro_batches(rows: list[int], micro_batch_size: int, rank: int = 0, world_size: int = 1) -> list[list[int]]:
    """
    This rank's share of a global batch, cut into passes of micro_batch_size rows.

    `rows` come sorted by length, and neighbouring cuts go to different ranks: in every pass the ranks have rows of
    about the same length, and none waits long for the others. 2 ranks with passes of 2 rows own 0 0 1 1 0 0 1 1.
    """
    if micro_batch_size < 1:
        raise UserError(f"micro_batch_size={micro_batch_size}, expected at least 1")
    at_once = micro_batch_size * world_size
    if len(rows) % at_once:
        raise UserError(f"batch_size={len(rows)} is not a multiple of micro_batch_size={micro_batch_size} x "
                        f"{world_size} ranks = {at_once}; try batch_size={math.ceil(len(rows) / at_once) * at_once}")
    starts = range(rank * micro_batch_size, len(rows), at_once)
    return [rows[start:start + micro_batch_size] for start in starts]


def batches(dataset: RowData, sampler: Sampler, micro_batch_size: int, rank: int, world_size: int,
            start_step: int, end_step: int, num_workers: int, collate_fn: Callable,
            pin_memory: bool = False) -> Iterator[list[dict]]:
    """
    Yield, for each step from start_step to end_step - 1, the list of this rank's collated micro-batches.
    """
    def wanted():
        for step in range(start_step, end_step):
            yield from micro_batches(sampler.batch(step), micro_batch_size, rank, world_size)

    step, passes = [], sampler.batch_size // (micro_batch_size * world_size)
    for micro_batch in prefetch(dataset, wanted(), collate_fn, num_workers, passes, pin_memory):
        step.append(micro_batch)
        if len(step) == passes:
            yield step
            step = []


def prefetch(dataset: RowData, groups: Iterable[list[int]], collate_fn: Callable, num_workers: int, ahead: int = 1,
             pin_memory: bool = False) -> Iterator[dict]:
    """
    Yield each group of rows, collated. With num_workers > 0 as many processes read rows and decode images, and are at
    least `ahead` batches ahead. With pin_memory, batches can be copied to a GPU while it computes (`non_blocking`).
    """
    # batch_size=None: `groups` already says which rows go together. The DataLoader draws a seed for its workers; it
    # gets a generator of its own for that, to leave the global random state as it was.
    loader = DataLoader(MicroBatches(dataset, collate_fn), sampler=groups, batch_size=None, collate_fn=as_it_is,
                        num_workers=num_workers, worker_init_fn=leave_signals_to_the_parent, pin_memory=pin_memory,
                        prefetch_factor=1 + math.ceil(ahead / num_workers) if num_workers else None,
                        generator=torch.Generator())
    try:
        for batch in loader:
            if isinstance(batch, UserError):
                raise batch
            yield batch
    except RuntimeError as error:
        if not str(error).startswith("DataLoader worker"):
            raise
        raise UserError(f"a process that reads the data died ({' '.join(str(error).split())}); "
                        "if the machine ran out of memory, lower num_workers") from None


def leave_signals_to_the_parent(worker):
    """
    Ctrl-C and a cluster's SIGTERM go to all processes of a run, and the training loop decides what they mean for it: it
    may want to finish a step. So a worker goes on, and after a SIGTERM it leaves a little later, without an error.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(20))
    signal.signal(signal.SIGALRM, lambda *_: os._exit(0))


class MicroBatches:
    """
    dataset[rows] -> those rows, collated. A UserError is handed over as a value: raised inside a worker process, it
    would reach the user wrapped in torch's traceback instead of as its one line.
    """

    def __init__(self, dataset, collate_fn):
        self.dataset, self.collate_fn = dataset, collate_fn

    def __getitem__(self, rows):
        try:
            return self.collate_fn([self.dataset[row] for row in rows])
        except UserError as error:
            return error


def as_it_is(micro_batch):
    return micro_batch
