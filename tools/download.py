"""
Fetches weights and data from the Hugging Face Hub, or from any server that speaks its HTTP interface.

    python download.py Qwen/Qwen1.5-1.8B --to=weights/Qwen/Qwen1.5-1.8B
    python download.py --dataset=liuhaotian/LLaVA-Instruct-150K --files=llava_v1_5_mix665k.json --to=data/teacher
    python download.py --manifest=d2d          # what that stage trains on, where that is, and what is unclear about it

Fifteen gigabytes rarely arrive in one go. So a file grows as NAME.part beside its place and gets its name only when
size and hash are those of the repository's listing; whatever happens before, a kill included, leaves a .part that the
same command continues. HF_ENDPOINT (or --endpoint) names another server; HF_TOKEN is sent to that server and to
nobody else.

What we rely on, read off huggingface_hub 2.4 (list_repo_tree, RepoFile, _pagination, hf_hub_url):
    GET /api/models/REPO/tree/REVISION?recursive=true   [{"type", "path", "size", "oid", "lfs": {"oid", "size"}}, ...],
                                                        1,000 a page; the Link header has the next page
    GET /REPO/resolve/REVISION/PATH                     the file; a large one redirects to a storage host
For data sets the addresses begin with /api/datasets/REPO and /datasets/REPO.

Read top-down: 1. what is there, 2. from there to here, 3. the manifest, 4. the command line.
"""
import argparse
import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
import sys
import time
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from urllib.parse import quote, urljoin

import requests

from configurator import UserError

SETTINGS = ["config.json", "generation_config.json", "tokenizer*", "vocab.json", "merges.txt", "added_tokens.json",
            "special_tokens_map.json"]                              # small, and all that a model needs beside weights
SAFETENSORS = ["*.safetensors", "*.safetensors.index.json"]
PICKLES = ["pytorch_model*.bin", "pytorch_model*.bin.index.json"]   # CLIP-L/14-336 has no safetensors
PAUSES = [1, 2, 4, 8, 16]                                           # seconds after each failed attempt in a row
MANIFEST = Path(__file__).parent / "config" / "datasets.json"


@dataclass
class File:
    name: str       # path in the repository
    size: int       # bytes
    lfs: bool       # large files are kept in LFS, and known by another hash
    hash: str       # SHA-256 if lfs, else git's blob SHA-1

# ----------------------------------------------------------------------------------------------------------------------
# 1. What is there


class Repository:
    def __init__(self, name: str, endpoint: str, is_dataset: bool = False, revision: str = "main"):
        self.endpoint, self.revision = endpoint.rstrip("/"), quote(revision, safe="")
        self.page = f"{self.endpoint}/{'datasets/' if is_dataset else ''}{name}"
        self.api = f"{self.endpoint}/api/{'datasets' if is_dataset else 'models'}/{name}"
        self.session = requests.Session()
        self.session.headers["Accept-Encoding"] = "identity"      # sizes and ranges are about the file's own bytes
        self.session.auth = self.sign

    def sign(self, request):
        """The token is for the endpoint alone. On a redirect to another host, requests removes the header."""
        token = os.environ.get("HF_TOKEN", "").strip()
        if token and request.url.startswith(self.endpoint + "/"):
            request.headers["Authorization"] = f"Bearer {token}"
        return request

    def get(self, url: str, start: int = 0) -> requests.Response:
        """GET from byte `start` on, patient with lost connections, 429 and 5xx. The answer is a 200, 206 or 416."""
        for pause in [*PAUSES, None]:
            try:
                response = self.session.get(url, headers={"Range": f"bytes={start}-"} if start else {}, stream=True,
                                            timeout=(10, 60))     # seconds to connect, and of silence
            except requests.RequestException as error:            # its text may hold a signed address: the type will do
                problem, asked = f"no answer ({type(error).__name__}); check the network and --endpoint", ""
            else:
                status, asked = response.status_code, response.headers.get("Retry-After", "")
                if status in (200, 206, 416):
                    return response
                response.close()
                problem = f"status {status}; {self.advice(status)}"
                if status != 429 and status < 500:
                    break
            if pause is not None:
                pause = max(pause, int(asked) if asked.isdigit() else 0)
                print(f"{url}: {problem}; trying again in {pause} s", flush=True)
                time.sleep(pause)
        raise UserError(f"{url}: {problem}")

    def advice(self, status: int) -> str:
        return {
            401: f"check the name; if {self.page} is private or gated, accept its terms there and set HF_TOKEN",
            403: f"HF_TOKEN may not read this; accept the terms on {self.page} with that account, or use another token",
            404: "check the name and --revision; for a data set write --dataset=NAME",
        }.get(status, "if that lasts, run the same command again later")

    def files(self) -> list[File]:
        files, url = [], f"{self.api}/tree/{self.revision}?recursive=true"
        while url:
            try:
                with self.get(url) as response:
                    for entry in response.json():
                        if entry["type"] == "file":
                            lfs = entry.get("lfs")
                            size, oid = int((lfs or entry)["size"]), (lfs or entry)["oid"]
                            files.append(File(entry["path"], size, bool(lfs), oid))
            except (requests.RequestException, LookupError, TypeError, AttributeError) as error:
                raise UserError(f"{url}: no complete listing ({type(error).__name__}); check --endpoint, or run "
                                    "the same command again") from None
            url = urljoin(url, response.links["next"]["url"]) if "next" in response.links else None
        return files


def choose(files: list[File], patterns: list[str]) -> list[File]:
    """The files that the patterns match; without patterns, those of a model that our code reads."""
    def matching(patterns, files):
        return [file for file in files if any(fnmatch(file.name, pattern) for pattern in patterns)]

    for pattern in patterns:
        if not matching([pattern], files):
            names = ", ".join(file.name for file in files[:20])
            raise UserError(f"--files: nothing matches {pattern!r}; the first files there are {names}")
    if patterns:
        return matching(patterns, files)
    top = [file for file in files if "/" not in file.name]      # no onnx/, no original/
    weights = matching(SAFETENSORS, top) or matching(PICKLES, top)
    if not weights:
        raise UserError("found neither *.safetensors nor pytorch_model*.bin there; name what you want by --files")
    return matching(SETTINGS, top) + weights


def part_of(path: Path) -> Path:
    return path.with_name(path.name + ".part")


def place(folder: Path, name: str) -> Path:
    """Where a file of the listing goes: below the folder, or nowhere, for the listing is written by strangers."""
    parts = name.split("/") if isinstance(name, str) and name.isprintable() and "\\" not in name else [""]
    if any(part in ("", ".", "..") or re.match("[A-Za-z]:", part) for part in parts):
        raise UserError(f"the listing has a file {name!r}, not a plain path below --to; nothing was fetched")
    path = folder.joinpath(*parts)
    for target in [path, part_of(path)]:
        if not target.resolve().is_relative_to(folder.resolve()):
            raise UserError(f"{target}: a symbolic link leads out of {folder}; remove it (nothing was fetched)")
    return path

# ----------------------------------------------------------------------------------------------------------------------
# 2. From there to here


def is_complete(path: Path, file: File) -> bool:
    if not path.is_file() or path.stat().st_size != file.size:
        return False
    digest = hashlib.sha256() if file.lfs else hashlib.sha1(b"blob %d\0" % file.size)
    with open(path, "rb") as content:
        while block := content.read(1 << 20):
            digest.update(block)
    return digest.hexdigest() == file.hash


def fetch(repository: Repository, file: File, path: Path) -> None:
    """
    Bring one file to its place. While a .part grows it is locked, so that a second process waits and then finds the
    finished file. The lock is flock's: it ends with its process, and none is ever left over.
    """
    part, note = part_of(path), "already here, size and hash are right"
    try:
        while not is_complete(path, file):
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(part, "ab", buffering=0) as out:
                try:
                    fcntl.flock(out, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    print(f"{path}: waiting for another process that fetches it", flush=True)
                    fcntl.flock(out, fcntl.LOCK_EX)
                if not part.exists() or not os.path.samestat(os.fstat(out.fileno()), part.stat()):
                    continue                                      # meanwhile it was renamed or deleted: look again
                note = "replaced, it was not the repository's" if path.exists() else "fetched"
                receive(repository, file, out, path)
                if not is_complete(part, file):
                    part.unlink()
                    raise UserError(f"{path}: what came has not the hash of the listing; deleted, fetch it again")
                os.replace(part, path)
                break
        print(f"{path}: {note} ({file.size / 1e6:,.1f} MB)", flush=True)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise UserError(f"{path}: the disk is full; make room and run the same command, it continues") from None
        raise UserError(f"{path}: cannot be written ({error.strerror}); check --to") from None


def receive(repository: Repository, file: File, out, path: Path) -> None:
    """Append to the open .part until it has the file's size. Only attempts that bring nothing new count as failed."""
    url = f"{repository.page}/resolve/{repository.revision}/{quote(file.name)}"
    furthest, failed = -1, 0
    while True:
        have = os.fstat(out.fileno()).st_size
        if have > file.size:                                      # the beginning of another version
            out.truncate(have := 0)
        if have == file.size:
            return
        if have > furthest:
            furthest, failed = have, 0
        elif failed < len(PAUSES):
            time.sleep(PAUSES[failed])
            failed += 1
        else:
            raise UserError(f"{url}: breaks off again and again (at byte {furthest:,} of {file.size:,}); try later")
        free = shutil.disk_usage(path.parent).free
        if free < file.size - have:
            raise UserError(f"{path}: needs {(file.size - have) / 1e9:,.2f} GB, free are {free / 1e9:,.2f} GB; "
                                "make room or choose another --to")

        with repository.get(url, start=have) as response:
            if response.status_code == 200:                       # the whole file, whatever we asked for
                have = 0
            elif response.headers.get("Content-Range") != f"bytes {have}-{file.size - 1}/{file.size}":
                out.truncate(0)                                   # 416, or another piece: our beginning is not theirs
                continue
            check_answer(url, response, file.size - have)         # before a wrong answer costs us what we have
            out.truncate(have)
            try:
                copy(response, out, file, have)
            except requests.RequestException:
                pass                                              # go on from what has arrived


def check_answer(url, response, size):
    kind, length = response.headers.get("Content-Type", ""), response.headers.get("Content-Length", str(size))
    if "html" in kind:
        raise UserError(f"{url}: the answer is a web page ({kind}), not the file; check --endpoint, and whether "
                            "the network wants a login")
    if length != str(size):
        raise UserError(f"{url}: has {length} bytes where the listing promises {size}; has the repository changed? "
                            "run the same command again")


def copy(response, out, file, have):
    began, start, shown = time.monotonic(), have, 0.0
    for chunk in response.iter_content(1 << 16):
        chunk = memoryview(chunk)[:file.size - have]              # what is too much is not ours
        have += len(chunk)
        while chunk:
            chunk = chunk[out.write(chunk):]
        seconds = time.monotonic() - began
        if sys.stderr.isatty() and (seconds - shown > 0.5 or have == file.size):
            shown = seconds
            print(f"\r{progress(file, have, have - start, seconds)}\033[K", end="\n" if have == file.size else "",
                  file=sys.stderr, flush=True)
        if have == file.size:
            return


def progress(file: File, have: int, new: int, seconds: float) -> str:
    """File, MB, MB/s, time left; the speed is that of the `new` bytes, not of what an earlier run brought."""
    speed = max(new, 1) / max(seconds, 1e-3)
    left = int((file.size - have) / speed)
    return (f"{file.name}  {have / 1e6:,.1f} of {file.size / 1e6:,.1f} MB  {speed / 1e6:,.1f} MB/s  "
            f"{left // 3600}:{left // 60 % 60:02}:{left % 60:02} left")

# ----------------------------------------------------------------------------------------------------------------------
# 3. The manifest: config/datasets.json


def read_manifest(stage: str) -> list[dict]:
    entries = json.loads(MANIFEST.read_text(encoding="utf-8"))["datasets"]
    stages = list(dict.fromkeys(entry["stage"] for entry in entries))
    if stage not in [*stages, "all"]:
        raise UserError(f"--manifest: found {stage!r}, expected all or one of {', '.join(stages)}")
    return [entry for entry in entries if stage in (entry["stage"], "all")]


def count_rows(path: Path) -> int:
    """
    Rows of a .json or .jsonl file without parsing it: every row has one key "conversations", or "chosen" if it is a
    pair. No text can look like a key, for a quote in a JSON text is written with a backslash.
    """
    key, rows, tail = re.compile(rb'"(?:conversations|chosen)"\s*:'), 0, b""
    with open(path, "rb") as file:
        while block := file.read(1 << 24):
            block = tail + block
            ends = [match.end() for match in key.finditer(block)]
            rows += len(ends)
            tail = block[max(ends[-1] if ends else 0, len(block) - 64):]    # a key may lie across two blocks
    return rows


def check_manifest(stage: str, data: str, root: str | Path = ".") -> list[str]:
    """
    For a dry run: what is on disk of the files that a config's `data` names, beside what the manifest knows of them;
    and what it lists for the stage, but `data` does not name. Never fails for want of a file.
    """
    lines, entries = [], read_manifest("all")
    paths = [re.sub(r"(\.jsonl?):[^:]*$", r"\1", item.strip()) for item in data.split(",")]   # a weight may follow
    for path in paths:
        found, here = Path(root, path), [entry for entry in entries if entry["path"] == path]
        here = [entry for entry in here if entry["stage"] == stage] or here    # sft trains on files of other stages
        size = f"{found.stat().st_size / 1e6:,.1f} MB, {count_rows(found):,} rows" if found.is_file() else "absent"
        parts = ", ".join(f"{entry['name']} {rows_of(entry)}" for entry in here)
        if len(here) > 1 and None not in [entry["rows"] for entry in here]:
            parts += f", together {sum(entry['rows'] for entry in here):,}"
        lines.append(f"{path}: {size}; {'expected: ' + parts if here else 'not a file of the paper'}")
        for unclear in dict.fromkeys(entry["unclear"] for entry in here if entry["unclear"]):
            names = ", ".join(entry["name"] for entry in here if entry["unclear"] == unclear)
            lines.append(f"    unclear of {names}: {unclear}")
    others = [entry["name"] for entry in entries if entry["stage"] == stage and entry["path"] not in paths]
    if others:
        lines.append(f"in the paper's {stage} but not in data: {', '.join(others)}; see download.py --manifest={stage}")
    return lines


def rows_of(entry: dict) -> str:
    if entry["rows"] is None:
        return "(rows unknown)"
    return f"{'about ' if entry['rows_to'] > 1 else ''}{entry['rows']:,}"


def show_manifest(stage: str) -> None:
    for entry in read_manifest(stage):
        print(f"{entry['stage']}: {entry['name']}" + ("" if Path(entry["path"]).is_file() else "  (absent)"))
        for key in list(entry)[2:]:                               # after stage and name
            if entry[key] is not None and key != "rows_to":
                print(f"    {key:<12} {rows_of(entry) if key == 'rows' else entry[key]}")

# ----------------------------------------------------------------------------------------------------------------------
# 4. The command line


class Parser(argparse.ArgumentParser):
    def error(self, message):  # argparse would print its usage as well; we say one line like everywhere
        raise UserError(message)


def run(argv: list[str]) -> None:
    parser = Parser(prog="download.py", allow_abbrev=False, description=__doc__.strip().splitlines()[0])
    parser.add_argument("model", nargs="?", help="a model's name on the Hub, such as Qwen/Qwen1.5-1.8B")
    parser.add_argument("--dataset", help="a data set's name on the Hub")
    parser.add_argument("--files", default="", help="names or patterns, with commas; a model's default is what we read")
    parser.add_argument("--to", type=Path, help="the folder to put them into")
    parser.add_argument("--revision", default="main", help="a branch, a tag or a commit")
    parser.add_argument("--endpoint", default=os.environ.get("HF_ENDPOINT") or "https://huggingface.co")
    parser.add_argument("--manifest", help="only show what a stage trains on (all: every stage)")
    args = parser.parse_args(argv)

    if args.manifest:
        return show_manifest(args.manifest)
    name, patterns = args.model or args.dataset, [item.strip() for item in args.files.split(",") if item.strip()]
    if bool(args.model) == bool(args.dataset) or not args.to:
        raise UserError("give a model's name or --dataset=NAME, and --to=FOLDER; or --manifest=STAGE")
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) or ".." in name:
        raise UserError(f"found the name {name!r}, expected OWNER/NAME as on the Hub")
    if args.dataset and not patterns:
        raise UserError(f"--dataset={name}: say what of it by --files; --manifest=all names the files we use")
    if not re.match("https?://[^/]", args.endpoint):
        raise UserError(f"--endpoint: found {args.endpoint!r}, expected http(s)://HOST")

    repository = Repository(name, args.endpoint, bool(args.dataset), args.revision)
    listing = repository.files()
    places = {file.name: place(args.to, file.name) for file in listing}      # all of them, before anything is fetched
    for file in choose(listing, patterns):
        fetch(repository, file, places[file.name])


def main(argv: list[str] | None = None) -> int:
    try:
        run(sys.argv[1:] if argv is None else argv)
        return 0
    except UserError as error:
        print(f"download.py: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\ndownload.py: stopped; the same command continues", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
