"""
tools/download.py against a Hub of our own on 127.0.0.1, which lists in pages, redirects large files to a second port,
and can be told to misbehave. What arrives is compared with the bytes that the server holds.

    python -m pytest tests/robustness/test_download.py
"""
import errno
import hashlib
import json
import os
import random
import re
import runpy
import signal
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import unquote

import pytest

from configurator import Stopped, UserError
from conftest import as_variable
from tools import download

ROOT = Path(__file__).resolve().parents[2]
COMMAND = [sys.executable, "-u", "-m", "tools.download"]
TOKEN = "hf_secret"


def noise(size, seed=0):
    return hashlib.shake_256(b"%d" % seed).digest(size)


BIG = noise(1_000_000)
MODEL = {"config.json": b'{"model_type": "qwen2"}', "generation_config.json": b"{}", "tokenizer.json": b'{"a": 1}',
         "tokenizer_config.json": b"{}", "vocab.json": b"{}", "merges.txt": b"a b\n", "README.md": b"# hello",
         "model.safetensors.index.json": b"{}", "model-00001-of-00002.safetensors": BIG,
         "model-00002-of-00002.safetensors": noise(70_000, 2), "pytorch_model.bin": noise(50, 3), "tf_model.h5": b"h5",
         "flax_model.msgpack": b"flax", "onnx/model.onnx": b"onnx", "onnx/model.safetensors": b"not this"}
READ = {name for name in MODEL if "/" not in name and not name.endswith((".md", ".bin", ".h5", ".msgpack"))}

# ----------------------------------------------------------------------------------------------------------------------
# The Hub


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def do_GET(self):
        hub = self.server.hub
        path = unquote(self.path)
        log = hub.cdn_log if self.server is hub.cdn else hub.log
        log.append(SimpleNamespace(path=path, range=self.headers.get("Range"), auth=self.headers.get("Authorization"),
                                   coding=self.headers.get("Accept-Encoding")))
        if "/tree/" in path:
            return self.listing(hub, path)
        name = path.split("/resolve/main/")[-1].removeprefix("/blob/")
        if self.server is not hub.cdn and name in hub.redirected:
            return self.answer(302, b"", {"Location": f"http://127.0.0.1:{hub.cdn.server_port}/blob/{name}"})
        trouble = hub.trouble.pop(0) if hub.trouble else {}
        if trouble.get("lost"):                                   # not even a status line
            return self.lose()
        content, status, headers = trouble.get("content", hub.files.get(name)), trouble.get("status", 200), {}
        if content is None or status >= 400:
            return self.answer(status if status >= 400 else 404, b"<html>sorry</html>", trouble.get("headers", {}))
        start = int((self.headers.get("Range") or "bytes=0-").removeprefix("bytes=").removesuffix("-"))
        if start and not trouble.get("ignore_range"):
            status, headers["Content-Range"] = 206, f"bytes {start}-{len(content) - 1}/{len(content)}"
            content = content[start:]
        self.answer(status, content, headers | trouble.get("headers", {}), trouble.get("cut"), trouble.get("hold"))

    def listing(self, hub, path):
        if hub.expired and self.headers.get("Authorization"):
            return self.answer(401, f"not {self.headers['Authorization']}".encode(), {})
        if hub.raw_listing is not None:
            link = {"Link": f'<{hub.raw_next(path)}>; rel="next"'} if hub.raw_next else {}
            return self.answer(200, hub.raw_listing, {"Content-Type": "text/html", **link})
        start = int(path.partition("cursor=")[2] or 0)
        page = hub.entries()[start:start + 4]
        more = {}
        if start + 4 < len(hub.entries()):
            more["Link"] = f'<{hub.next_host}{path.partition("&")[0]}&cursor={start + 4}>; rel="next"'
        self.answer(200, json.dumps(page).encode(), {"Content-Type": "application/json", **more})

    def answer(self, status, body, headers, cut=None, hold=None):
        self.send_response(status)
        for key, value in {"Content-Type": "application/octet-stream", "Content-Length": len(body), **headers}.items():
            self.send_header(key, str(value))
        self.end_headers()
        if hold:                                                  # no more than that until the test opens the gate
            self.send(body[:hold])
            self.server.hub.gate.wait(30)
            body = body[hold:]
        self.send(body[:cut])
        if cut is not None:
            self.lose()

    def send(self, data):
        try:
            self.wfile.write(data)
        except OSError:                                           # a client that was killed
            self.close_connection = True

    def lose(self):
        self.wfile.flush()
        self.close_connection = True
        self.connection.shutdown(2)


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request, client_address):
        if not isinstance(sys.exc_info()[1], ConnectionError):    # a client that hangs up is our everyday
            super().handle_error(request, client_address)


class Hub:
    def __init__(self):
        self.files, self.lists, self.redirected = dict(MODEL), None, set()
        self.log, self.cdn_log, self.trouble, self.raw_listing, self.gate = [], [], [], None, threading.Event()
        self.raw_next, self.expired = None, False
        self.servers = [Server(("127.0.0.1", 0), Handler) for _ in range(2)]
        self.main, self.cdn = self.servers
        self.endpoint = self.next_host = f"http://127.0.0.1:{self.main.server_port}"
        for server in self.servers:
            server.hub = self
            threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()

    def entries(self):
        """The listing: LFS for weights, git blobs for the rest, and a folder among them."""
        entries = [{"type": "directory", "oid": "0" * 40, "size": 0, "path": "onnx"}]
        for name, content in (self.lists or self.files).items():
            blob = hashlib.sha1(b"blob " + str(len(content)).encode() + b"\0" + content).hexdigest()
            entry = {"type": "file", "oid": blob, "size": len(content), "path": name}
            if name.endswith((".safetensors", ".bin")):
                entry["lfs"] = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 134}
                entry["oid"] = "f" * 40                           # of the pointer, not of the content
            entries.append(entry)
        return entries

    def asked(self, log=None):
        """Files asked for, with their ranges, in order."""
        return [(request.path.split("/")[-1], request.range) for request in (self.log if log is None else log)
                if "/tree/" not in request.path]


@pytest.fixture
def hub(monkeypatch):
    monkeypatch.setattr(download, "PAUSES", [0] * 5)
    for name in [*os.environ]:                                    # whatever the caller's environment has
        if name.lower().startswith(("hf_", "huggingface")) or name.lower().endswith(("_proxy", "netrc")):
            monkeypatch.delenv(name)
    hub = Hub()
    monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
    yield hub
    hub.gate.set()
    for server in hub.servers:
        server.shutdown()
        server.server_close()


def only(hub, name="model.safetensors", content=BIG):
    """A repository of one file."""
    hub.files = {name: content}
    return name


def get(to, *more, repository="--model=me/model"):
    download.main([repository, f"--to={to}", *more])


def fails(to, *more, **repository):
    """The message of a download that fails, one line."""
    with pytest.raises(UserError) as error:
        get(to, *more, **repository)
    assert "\n" not in str(error.value)
    return str(error.value)


def held(folder):
    """{path below the folder: content} of all that is there."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}



# ----------------------------------------------------------------------------------------------------------------------
# What is fetched


def test_of_a_model_what_our_code_reads_arrives_byte_for_byte(hub, tmp_path, capsys):
    hub.redirected = {"model-00001-of-00002.safetensors"}
    get(tmp_path / "m")
    assert held(tmp_path / "m") == {name: MODEL[name] for name in READ}
    assert {name for name, _ in hub.asked()} == READ                     # nothing else was even asked for
    assert sum("/tree/" in request.path for request in hub.log) == 4     # 15 files and a folder, 4 a page
    assert hub.asked(hub.cdn_log) == [("model-00001-of-00002.safetensors", None)]
    assert {request.coding for request in hub.log + hub.cdn_log} == {"identity"}   # compressed, no size would be right

    hub.log.clear(), capsys.readouterr()
    get(tmp_path / "m")
    assert hub.asked() == []
    assert capsys.readouterr().out.count("already here") == len(READ)


def test_huggingface_hub_reads_the_same_listing(hub, monkeypatch):
    hub_client = pytest.importorskip("huggingface_hub")                  # comes with transformers
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)   # read from the environment at its import
    theirs = hub_client.HfApi(endpoint=hub.endpoint, token=False).list_repo_tree("me/model", recursive=True)
    theirs = {file.path: (file.size, file.lfs.sha256 if file.lfs else file.blob_id)
              for file in theirs if isinstance(file, hub_client.hf_api.RepoFile)}
    ours = download.Repository("me/model", hub.endpoint).files()
    assert {file.name: (file.size, file.hash) for file in ours} == theirs and len(theirs) == len(MODEL)


def test_pickles_only_where_there_are_no_safetensors(hub, tmp_path):
    hub.files = {"config.json": b"{}", "pytorch_model.bin": BIG, "tf_model.h5": b"no"}
    get(tmp_path)
    assert held(tmp_path) == {"config.json": b"{}", "pytorch_model.bin": BIG}


def test_files_of_a_data_set(hub, tmp_path):
    hub.files = {"a.json": b"[1]", "train_json/b#1 %.json": b"[2]", "images.zip": BIG}
    get(tmp_path, "--files=train_json/*,a.json", repository="--dataset=me/data")
    assert held(tmp_path) == {"a.json": b"[1]", "train_json/b#1 %.json": b"[2]"}
    assert hub.log[0].path == "/api/datasets/me/data/tree/main?recursive=true"
    assert [request.path for request in hub.log[1:]] == ["/datasets/me/data/resolve/main/a.json",
                                                         "/datasets/me/data/resolve/main/train_json/b#1 %.json"]
    line = fails(tmp_path, "--files=b.json", repository="--dataset=me/data")
    assert "nothing matches 'b.json'" in line and "images.zip" in line
    assert "--files" in fails(tmp_path, repository="--dataset=me/data")


def test_git_hashes_are_gits(tmp_path):
    for content, oid in [(b"", "e69de29bb2d1d6434b8b29ae775ad8c2e48c5391"),          # git hash-object
                         (b"hello\n", "ce013625030ba8dba906f756967f9e9ca394464a")]:
        (tmp_path / "f").write_bytes(content)
        assert download.is_complete(tmp_path / "f", download.File("f", len(content), False, oid))
        assert not download.is_complete(tmp_path / "f", download.File("f", len(content), False, oid[::-1]))


def test_an_empty_file_and_a_stale_one(hub, tmp_path, capsys):
    hub.files = {"config.json": b"{1}", "model.safetensors": b""}
    (tmp_path / "config.json").write_bytes(b"{0}")                       # same size, other content
    get(tmp_path)
    assert held(tmp_path) == hub.files
    assert "config.json: replaced" in capsys.readouterr().out


def test_the_token_goes_to_the_endpoint_alone(hub, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HF_TOKEN", TOKEN + "\n")
    hub.redirected = {"model-00001-of-00002.safetensors"}
    get(tmp_path / "a")
    assert {request.auth for request in hub.log} == {f"Bearer {TOKEN}"}
    assert [request.auth for request in hub.cdn_log] == [None]

    hub.next_host = f"http://127.0.0.1:{hub.cdn.server_port}"            # a Link header that leads elsewhere
    hub.cdn_log.clear()
    get(tmp_path / "b")
    assert len(hub.cdn_log) > 1 and {request.auth for request in hub.cdn_log} == {None}

    hub.trouble = [{"status": 403}]
    line, said = fails(tmp_path / "c"), capsys.readouterr()
    assert TOKEN not in line + said.out + said.err

# ----------------------------------------------------------------------------------------------------------------------
# When things go wrong on the way


def test_a_cut_connection_resumes(hub, tmp_path):
    name = only(hub)
    hub.redirected = {name}
    hub.trouble = [{"cut": 300_000}, {"lost": True}, {"cut": 300_000}]
    get(tmp_path)
    assert held(tmp_path) == hub.files
    starts = [int((ask or "bytes=0-")[6:-1]) for _, ask in hub.asked(hub.cdn_log)]
    assert starts[0] == 0 and 200_000 < starts[1] <= 300_000 and starts[2] == starts[1]
    assert starts[1] + 200_000 < starts[3] <= starts[1] + 300_000 and len(starts) == 4


def test_progress_makes_patience_new_and_no_progress_ends(hub, tmp_path):
    name = only(hub)
    hub.trouble = [{"cut": 0}, {"cut": 100_000}] * 9                     # more than five failures, but never in a row
    get(tmp_path)
    assert held(tmp_path) == hub.files
    (tmp_path / name).unlink()
    hub.trouble, hub.log[:] = [{"cut": 100_000, "ignore_range": True}] * 99, []
    assert "breaks off again and again" in fails(tmp_path)
    assert len(hub.asked()) == 1 + 1 + 5 and set(held(tmp_path)) == {name + ".part"}   # one got further, 5 pauses


@pytest.mark.parametrize("trouble", [
    {"ignore_range": True},                                              # 200 and everything
    {"headers": {"Content-Range": "bytes 7-999999/1000000"}},            # another piece than asked for
    {"headers": {"Content-Range": "bytes 500000-999999/7000000"}},       # a piece of another file
    {"status": 416},
])
def test_a_server_that_does_not_continue_starts_from_zero(hub, tmp_path, trouble):
    name = only(hub)
    (tmp_path / (name + ".part")).write_bytes(BIG[:500_000])
    hub.trouble = [trouble]
    get(tmp_path)
    assert held(tmp_path) == hub.files
    assert hub.asked()[0] == (name, "bytes=500000-") and len(hub.asked()) == 1 + ("ignore_range" not in trouble)


def test_a_part_of_another_version(hub, tmp_path):
    name = only(hub)
    part = tmp_path / (name + ".part")
    part.write_bytes(b"x" * 2_000_000)                                   # longer than the file: of no use
    get(tmp_path)
    assert held(tmp_path) == hub.files and hub.asked() == [(name, None)]
    (tmp_path / name).unlink()
    part.write_bytes(b"x" * 500_000)                                     # shorter: only the hash can tell
    assert "hash" in fails(tmp_path) and held(tmp_path) == {}
    get(tmp_path)
    assert held(tmp_path) == hub.files


def test_wrong_content_never_takes_the_name(hub, tmp_path):
    name = only(hub)
    (tmp_path / name).write_bytes(b"what was here before")
    hub.trouble = [{"content": BIG[:-1] + b"!"}]
    assert "deleted" in fails(tmp_path)
    assert held(tmp_path) == {name: b"what was here before"}


@pytest.mark.parametrize("trouble, word", [
    ({"content": BIG + b"!"}, "1000001 bytes where the listing promises 1000000"),
    ({"content": BIG[:-1]}, "999999 bytes"),
    ({"content": b"<html>log in</html>", "headers": {"Content-Type": "text/html"}}, "web page"),
    ({"content": BIG, "headers": {"Content-Type": "text/html"}}, "web page"),
])
def test_wrong_sizes_and_web_pages_are_not_files(hub, tmp_path, trouble, word):
    name = only(hub)
    (tmp_path / (name + ".part")).write_bytes(BIG[:500_000])
    hub.trouble = [trouble | {"ignore_range": True}]
    assert word in fails(tmp_path)
    assert held(tmp_path) == {name + ".part": BIG[:500_000]}             # and what an earlier run brought is kept
    (tmp_path / (name + ".part")).unlink()
    hub.trouble = [trouble]
    fails(tmp_path)
    assert b"".join(held(tmp_path).values()) == b""                      # an empty .part at most


def test_busy_servers_are_asked_again_with_growing_pauses(hub, tmp_path, monkeypatch):
    slept = []
    monkeypatch.setattr(download, "PAUSES", [1, 2, 4])
    monkeypatch.setattr(download.time, "sleep", slept.append)
    only(hub)
    hub.trouble = [{"status": 503, "headers": {"Retry-After": "0"}}, {"status": 429, "headers": {"Retry-After": "7"}},
                   {"status": 502, "headers": {"Retry-After": "Wed, 21 Oct 2015 07:28:00 GMT"}}]
    get(tmp_path)
    assert held(tmp_path) == hub.files and slept == [1, 7, 4]
    hub.trouble, slept[:] = [{"status": 503}] * 99, []
    line = fails(tmp_path / "new")
    assert slept == [1, 2, 4] and "status 503" in line and held(tmp_path / "new") != hub.files


@pytest.mark.parametrize("status, words", [(401, "gated.*HF_TOKEN"), (403, "accept"), (404, "name.*--dataset")])
def test_refusals_say_what_to_do(hub, tmp_path, status, words):
    name = only(hub)
    hub.trouble = [{"status": status}]
    assert re.search(f"status {status}; .*{words}", fails(tmp_path))
    assert len(hub.asked()) == 1 and name not in held(tmp_path)          # asking again would not help


def test_a_listing_that_is_none(hub, tmp_path):
    for listing in [b"<html/>", b'{"error": "no"}', b'[{"type": "file", "path": "x"}]', b"[1]", b'[{"type": "fi']:
        hub.raw_listing = listing
        assert "no complete listing" in fails(tmp_path)
    assert held(tmp_path) == {}


ENTRY = {"type": "file", "path": "config.json", "size": 2, "oid": "0" * 40}


@pytest.mark.parametrize("entry", [
    ENTRY | {"size": "abc"}, ENTRY | {"size": "2"}, ENTRY | {"size": float("nan")}, 
    ENTRY | {"size": float("inf")}, ENTRY | {"size": -1}, ENTRY | {"size": True}, ENTRY | {"size": 2.0}, ENTRY | {"size": None}, 
    ENTRY | {"oid": None}, ENTRY | {"oid": 7}, ENTRY | {"lfs": "x"},
    ENTRY | {"lfs": [1]}, ENTRY | {"lfs": {"size": "abc", "oid": "a"}}, 
    ENTRY | {"lfs": {"size": 1}}, ENTRY | {"path": []}, None, "file", [[]]])
def test_a_listing_of_wrong_entries(hub, tmp_path, entry):
    hub.raw_listing = json.dumps([entry]).encode()
    assert "no complete listing" in fails(tmp_path) and held(tmp_path) == {}


def test_listings_deep_long_and_no_text(hub, tmp_path, monkeypatch):
    monkeypatch.setattr(download, "PAGE", 150_000)
    for listing in [b"[" * 100_000, b'[{"type": "file", "size": ' + b"9" * 5000, b"\xff\xfe",
                    b"[" + b" " * 200_000 + b"]"]:
        hub.raw_listing = listing
        assert "no complete listing" in fails(tmp_path)
    monkeypatch.setattr(download, "PAGE_TIME", -1)                        # a server that sends a byte now and then
    hub.raw_listing = b"[]"
    assert "no complete listing" in fails(tmp_path)


@pytest.mark.parametrize("following", [
    lambda path: path,                                                    # the same page for ever
    lambda path: "/api/models/me/model/tree/main?recursive=true&cursor=1",   # from some page on
    lambda path: f"{path.partition('&')[0]}&cursor={int(path.partition('cursor=')[2] or 0) + 1}",   # always another
])
def test_a_listing_that_does_not_end(hub, tmp_path, monkeypatch, following):
    monkeypatch.setattr(download, "LISTING", 30)
    hub.raw_listing, hub.raw_next = json.dumps([ENTRY]).encode(), following
    assert "the listing does not end" in fails(tmp_path)
    assert len(hub.log) <= 30 and held(tmp_path) == {}


def test_edited_listings_give_files_or_one_line(hub, tmp_path):
    """600 mutations of a true listing, read by the code that reads a page."""
    draw, text = random.Random(0), json.dumps(hub.entries()).encode()
    pieces = [b"null", b"1e999", b"NaN", b"[]", b"{}", b'"', b"\\ud800", b"-1", b"true", b"\xff", b"9" * 400,
              b"../", b"\x00"]
    repository, ends = download.Repository("me/model", hub.endpoint), {"files": 0, "line": 0}

    class Page:                                                           # what `requests` would return
        links = {}

        def __init__(self, content):
            self.content = content

        def iter_content(self, size):
            yield self.content

        def __enter__(self):
            return self

        def __exit__(self, *error):
            pass

    for _ in range(600):
        content = bytearray(text)
        for _ in range(draw.randint(1, 3)):
            i = draw.randrange(len(content))
            j = min(len(content), i + draw.choice([0, 1, 1, 4, 30]))
            content[i:j] = draw.choice([draw.choice(pieces), bytes([draw.randrange(256)]), b""])
        repository.get = lambda url: Page(bytes(content))
        try:
            files = repository.files()
            [download.local_path(tmp_path, file.name) for file in files]
            download.choose(files, [])
            ends["files"] += 1
        except UserError as error:
            assert "\n" not in str(error)
            ends["line"] += 1
    assert min(ends.values()) > 20


@pytest.mark.parametrize("wait", ["100000000000", "9" * 400, "\u00b2", "-1", "1e9", "nan", "0x10", ""])
def test_a_server_that_asks_for_odd_pauses(hub, tmp_path, monkeypatch, wait):
    slept = []
    monkeypatch.setattr(download.time, "sleep", slept.append)
    only(hub)
    hub.trouble = [{"status": 503, "headers": {"Retry-After": wait.encode("latin-1").decode("latin-1")}}]
    if wait.startswith("1000"):
        assert "in 100,000,000,000 s as the server asks" in fails(tmp_path) and slept == []
    else:
        get(tmp_path)
        assert held(tmp_path) == hub.files and slept == [0]


# ----------------------------------------------------------------------------------------------------------------------
# Tokens, passwords, proxies


def test_an_expired_token_is_named(hub, tmp_path, monkeypatch):
    hub.expired = True
    get(tmp_path / "public")                                              # without a token the server does not mind
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    line = fails(tmp_path / "a")
    assert "status 401" in line and "HF_TOKEN, which may be expired" in line and "unset it" in line
    assert TOKEN not in line


@pytest.mark.parametrize("token", ["hf_a\nb", "hf_\u201cx\u201d", "hf_\u20ac", "hf_a\r\nX-Evil: 1", "hf_\udcff", "hf_\x7f"])
def test_a_token_that_no_header_can_carry(hub, tmp_path, monkeypatch, token):
    monkeypatch.setenv("HF_TOKEN", as_variable(token))
    line = fails(tmp_path)
    assert line.startswith("HF_TOKEN: ") and "hf_" not in line and hub.log == []


def test_a_password_in_the_endpoint_is_sent_and_not_shown(hub, tmp_path, capsys):
    endpoint = hub.endpoint.replace("http://", "http://me:Geheim%2F1@")
    get(tmp_path / "a", f"--endpoint={endpoint}/")
    assert {request.auth for request in hub.log} == {"Basic bWU6R2VoZWltLzE="}
    hub.expired = True
    line = fails(tmp_path / "b", f"--endpoint={endpoint}")
    hub.trouble, hub.expired = [{"status": 500}] * 9, False
    line += fails(tmp_path / "b", f"--endpoint={endpoint}") + str(held(tmp_path))
    for wrong in ["htp://me:Geheim@host", "me:Geheim@host", "http://me:Geheim@", "http://me:Geheim@[::1",
                  "http://me:Geheim@host:x"]:
        line += fails(tmp_path, f"--endpoint={wrong}")
    shown = capsys.readouterr()
    assert "Geheim" not in line + shown.out + shown.err and "--endpoint" in line


@pytest.mark.parametrize("proxy", [
    "nonsense://x", "http://", "http://[::1", "http://me:Geheim@127.0.0.1:1", "\u20ac", "http://127.0.0.1:99999"])
def test_a_proxy_that_cannot_work_is_named(hub, tmp_path, monkeypatch, proxy, capsys):
    monkeypatch.setenv("HTTP_PROXY", as_variable(proxy))
    monkeypatch.setenv("http_proxy", as_variable(proxy))
    line = fails(tmp_path)
    shown = capsys.readouterr()
    assert "the proxy of" in line and "http_proxy" in line and "Geheim" not in line + shown.out + shown.err


# ----------------------------------------------------------------------------------------------------------------------
# The command line


def test_user_mistakes_are_one_line(hub, tmp_path, monkeypatch):
    for argv, word in [([], "give --model=NAME"), (["--model=a/b"], "--to"), (["a/b", "--to=x"], "--key=value"),
                       (["--model=a/b", "--dataset=c/d", "--to=x"], "give"),
                       (["--model=../b", "--to=x"], "OWNER/NAME"), (["--model=a/b/c", "--to=x"], "OWNER/NAME"),
                       (["--x=x"], "--x"), (["--model=a/b", "--to=x", "--endpoint=hub"], "--endpoint"),
                       (["--manifest=d3d"], "d2d"),
                       (["--model=a/b", f"--to={tmp_path}", "--endpoint=http://127.0.0.1:1"], "no answer")]:
        monkeypatch.setattr(download, "PAUSES", [])
        with pytest.raises(UserError) as error:
            download.main(argv)
        assert word in str(error.value) and "\n" not in str(error.value), argv
    (tmp_path / "file").write_text("in the way")
    assert "cannot be written" in fails(tmp_path / "file")
    hub.files = {"config.json": b"{}"}
    assert "--files" in fails(tmp_path)                                  # a model without weights


def test_the_user_sees_one_line_and_exit_code_2():
    done = subprocess.run([*COMMAND, "--model=a/b"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == "error: give --model=NAME or --dataset=NAME, and --to=FOLDER; or --manifest=STAGE\n"

# ----------------------------------------------------------------------------------------------------------------------
# Nothing outside of the folder


@pytest.mark.parametrize("name", ["../evil", "/etc/x", "a/../../b", "C:\\x", "C:x", "a\\..\\b", "a//b", "a/", "./a", "",
                                  "a\nb", "..", "sub/C:/x", None, 7])
def test_strange_names_stop_everything(hub, tmp_path, name):
    hub.lists = {"config.json": b"{}", "model.safetensors": BIG, "zz": b"evil"}
    entries = hub.entries()
    entries[-1]["path"] = name
    hub.entries = lambda: entries
    (tmp_path / "deep").mkdir()
    assert "not a plain path" in fails(tmp_path / "deep" / "to")
    assert hub.asked() == [] and held(tmp_path) == {}


def test_links_that_lead_out_stop_everything(hub, tmp_path):
    outside, to = tmp_path / "outside", tmp_path / "to"
    outside.mkdir(), to.mkdir()
    (outside / "precious").write_bytes(b"x")
    hub.files = {"config.json": b"{}", "sub/model.safetensors": BIG}
    precious = outside / "precious"
    for link, target in [("sub", outside), ("config.json", precious), ("config.json.part", precious),
                         ("config.json.part", outside / "new")]:
        (to / link).symlink_to(target)
        assert "symbolic link" in fails(to, "--files=*")
        (to / link).unlink()
    assert hub.asked() == [] and held(outside) == {"precious": b"x"}
    (to / "real").mkdir()
    (to / "sub").symlink_to("real")                                      # a link that stays inside is fine
    (tmp_path / "way").symlink_to(to)                                    # and so is one on the way to the folder
    get(tmp_path / "way", "--files=*")
    assert (to / "real" / "model.safetensors").read_bytes() == BIG


@pytest.mark.parametrize("name", ["config.json", "config.json.part"])
@pytest.mark.parametrize("make", [
    os.mkfifo, os.mkdir, lambda path: os.symlink("/dev/zero", path), lambda path: os.symlink(path, path)])
def test_what_is_no_file_is_not_written_to(hub, tmp_path, name, make):
    make(tmp_path / name)
    line = fails(tmp_path)
    assert f"{tmp_path / name}" in line and ("no file" in line or "symbolic link" in line) and hub.asked() == []


# ----------------------------------------------------------------------------------------------------------------------
# The disk, kills, company


def test_ctrl_c_keeps_what_has_arrived(hub, tmp_path, monkeypatch):
    name, copy = only(hub), download.copy

    def interrupted(response, out, file, have):
        out.write(BIG[:300_000])
        raise KeyboardInterrupt

    monkeypatch.setattr(download, "copy", interrupted)
    with pytest.raises(Stopped, match="interrupted; what has arrived is kept in .*, the same command") as stopped:
        get(tmp_path)
    assert stopped.value.exit_code == 130
    monkeypatch.setattr(download, "copy", copy)
    get(tmp_path)
    assert held(tmp_path) == hub.files and hub.asked()[-1] == (name, "bytes=300000-")


@pytest.mark.parametrize("umask, mode", [(0o027, 0o640), (0o002, 0o664), (0o077, 0o600)])
def test_the_umask_decides_who_may_read(hub, tmp_path, umask, mode):
    before = os.umask(umask)
    try:
        get(tmp_path / "m")
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "m").iterdir()} == {mode}


def test_a_disk_without_room(hub, tmp_path, monkeypatch):
    name = only(hub)
    monkeypatch.setattr(download.shutil, "disk_usage", lambda path: SimpleNamespace(free=999_999))
    assert "needs 1 MB" in (line := fails(tmp_path)) and "make room" in line
    assert hub.asked() == []                                             # found out before the file was started
    (tmp_path / (name + ".part")).write_bytes(BIG[:1])
    get(tmp_path)
    assert held(tmp_path) == hub.files                                   # one byte less is needed


def test_a_disk_that_fills_up_on_the_way(hub, tmp_path, monkeypatch):
    name = only(hub)
    copy = download.copy

    class Full:
        def __init__(self, out):
            self.out = out

        def write(self, data):
            if os.fstat(self.out.fileno()).st_size > 400_000:
                raise OSError(errno.ENOSPC, "No space left on device")
            return self.out.write(data[:1000])                           # a write may also take less than it is given

    monkeypatch.setattr(download, "copy", lambda response, out, *rest: copy(response, Full(out), *rest))
    assert "No space left on device" in fails(tmp_path)
    kept = held(tmp_path)[name + ".part"]
    assert len(kept) > 400_000 and BIG.startswith(kept)
    monkeypatch.setattr(download, "copy", copy)
    get(tmp_path)
    assert held(tmp_path) == hub.files and hub.asked()[-1] == (name, f"bytes={len(kept)}-")


def start(hub, to):
    return subprocess.Popen([*COMMAND, "--model=me/model", f"--to={to}", f"--endpoint={hub.endpoint}"], cwd=ROOT,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def wait_for_bytes(part, size):
    for _ in range(3000):
        if part.exists() and part.stat().st_size >= size:
            return
        time.sleep(0.01)
    raise AssertionError("nothing happened for 30 seconds")


def test_sigkill_leaves_a_part_and_the_next_run_asks_for_the_rest(hub, tmp_path):
    name = only(hub)
    part = tmp_path / (name + ".part")
    hub.trouble = [{"hold": 400_000}]
    process = start(hub, tmp_path)
    wait_for_bytes(part, 300_000)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    had = part.stat().st_size
    assert held(tmp_path) == {part.name: BIG[:had]} and had <= 400_000   # and no half file under the real name

    process = start(hub, tmp_path)
    assert process.communicate()[0].count("downloaded") == 1 and process.returncode == 0
    assert held(tmp_path) == hub.files and hub.asked() == [(name, None), (name, f"bytes={had}-")]


def test_two_processes_fetch_once(hub, tmp_path):
    name = only(hub)
    hub.trouble = [{"hold": 400_000}]
    first = start(hub, tmp_path)
    wait_for_bytes(tmp_path / (name + ".part"), 300_000)
    second = start(hub, tmp_path)
    assert "waiting for another process" in second.stdout.readline()
    hub.gate.set()
    assert "downloaded" in first.communicate()[0] and "already here" in second.communicate()[0]
    assert held(tmp_path) == hub.files and hub.asked() == [(name, None)]


def test_the_one_who_waits_takes_over_from_the_killed(hub, tmp_path):
    name = only(hub)
    hub.trouble = [{"hold": 400_000}]
    first = start(hub, tmp_path)
    wait_for_bytes(tmp_path / (name + ".part"), 300_000)
    second = start(hub, tmp_path)
    assert "waiting for another process" in second.stdout.readline()
    first.kill()
    assert "downloaded" in second.communicate()[0] and held(tmp_path) == hub.files
    assert int(hub.asked()[1][1].removeprefix("bytes=").removesuffix("-")) >= 300_000
    first.communicate()


def test_the_progress_line():
    file = download.File("model.safetensors", 4_000_000_000, True, "")
    line = download.progress(file, have=1_000_000_000, new=500_000_000, seconds=10.0)
    assert line == "model.safetensors  1,000.0 of 4,000.0 MB  50.0 MB/s  0:01:00 left"
    download.progress(file, 0, 0, 0.0)                                   # no division by zero

# ----------------------------------------------------------------------------------------------------------------------
# The manifest

KEYS = {"stage": str, "name": str, "published": str, "file": str, "path": str, "rows": (int, type(None)),
        "rows_to": (int, type(None)), "license": (str, type(None)), "images": (str, type(None)),
        "images_from": (str, type(None)), "prepare": (str, type(None)), "source": str, "unclear": (str, type(None))}
TABLE_10 = {
    "align": "LLaVA-1.5-Pretrain",
    "d2d": "ALLaVA-Caption-4V, ShareGPT4V-PT, MIMIC-IT, LVIS, LRV, SViT",
    "d2s": "ShareGPT4V-100K, TextCaps, LLaVA-1.5-Instruct, GQA, VQAv2, OKVQA, Visual Genome, RefCOCO, AI2D, ScienceQA, "
           "DVQA, ChartQA, DocQA, OCRVQA, SynthDoG-EN, A-OKVQA, GeoQA+",
    "pd": "RLAIF-V",
}


def config_of(stage):
    return runpy.run_path(str(ROOT / "config" / f"{stage}.py"))


def test_every_entry_of_the_manifest():
    entries = download.read_manifest("all")
    for entry in entries:
        assert list(entry) == list(KEYS)
        for key, kind in KEYS.items():
            assert isinstance(entry[key], kind) and entry[key] != "", (entry["name"], key)
        assert re.fullmatch(r"[\w.-]+/[\w.-]+", entry["published"]) or entry["published"].startswith("https://")
        assert (entry["rows"] is None) == (entry["rows_to"] is None)
        assert entry["rows"] is None and entry["unclear"] or entry["rows"] > 0 and entry["rows"] % entry["rows_to"] == 0
        assert entry["license"] or entry["unclear"]                      # what is not known is said to be unknown
    assert len({(entry["stage"], entry["name"]) for entry in entries}) == len(entries)


def test_the_manifest_has_table_10_and_the_teacher():
    names = {}
    for entry in download.read_manifest("all"):
        names.setdefault(entry["stage"], set()).add(entry["name"])
    for stage, expected in TABLE_10.items():
        assert names[stage] == set(expected.split(", "))
    configs = {path.stem for path in (ROOT / "config").glob("*.py")}
    assert set(names) == configs - {"sft", "llavadi", "own"}             # which train on d2d's and d2s's files, or on others
    assert config_of("sft")["data"] == config_of("d2d")["data"]


def test_the_manifest_and_the_configs_name_the_same_files():
    for stage in ["align", "d2d", "d2s", "pd", "teacher_align", "teacher_sft"]:
        config, entries = config_of(stage), download.read_manifest(stage)
        assert {entry["path"] for entry in entries} == set(config["data"].split(","))
        assert all(entry["images"].startswith((config["image_dir"], "inside")) for entry in entries)


def test_rows_are_counted_as_json_counts_them(tmp_path):
    turns = [{"from": "human", "value": '"conversations": and "chosen" :\\'}, {"from": "gpt", "value": "conversations"}]
    nasty = {"id": '"conversations":', "conversations": turns}
    pair = {"question": "chosen", "chosen": "chosen", "rejected": '"chosen":'}
    for rows in [[], [nasty] * 7, [pair] * 5]:
        (tmp_path / "a.json").write_text(json.dumps(rows))
        (tmp_path / "b.json").write_text(json.dumps(rows, indent=2).replace('":', '" :'))
        (tmp_path / "c.jsonl").write_text("\n\n".join(json.dumps(row) for row in rows))
        assert [download.count_rows(tmp_path / name) for name in ["a.json", "b.json", "c.jsonl"]] == [len(rows)] * 3
    text = json.dumps([nasty, nasty])
    for cut in [1, 8, 16, 17, 40]:                                       # a block of 16 MiB ends in or soon after a key
        (tmp_path / "d.json").write_text(" " * ((1 << 24) - text.index('"conversations": [') - cut) + text)
        assert download.count_rows(tmp_path / "d.json") == 2


def test_the_dry_run_lines(tmp_path):
    paths = config_of("d2d")["data"].split(",")
    absent = download.check_manifest("d2d", ",".join(paths), tmp_path)
    assert [line.split(":")[0] for line in absent if not line.startswith(" ")] == paths
    assert sum("absent" in line for line in absent) == len(paths) and any("unclear" in line for line in absent)

    (tmp_path / paths[0]).parent.mkdir(parents=True)
    (tmp_path / paths[0]).write_text(json.dumps([{"conversations": []}] * 1234))
    line = download.check_manifest("d2d", f"{paths[0]}:0.5", tmp_path)[0]    # a weight is not part of the name
    assert "1,234 rows" in line and "ALLaVA-Caption-4V 468,670" in line and "absent" not in line
    last = download.check_manifest("d2d", paths[0], tmp_path)[-1]
    assert "not in data" in last and "SViT" in last and "ALLaVA" not in last

    assert "ALLaVA-Caption-4V" in download.check_manifest("sft", paths[0], tmp_path)[0]
    align = download.check_manifest("align", config_of("teacher_align")["data"], tmp_path)
    assert align[0].count("LLaVA-1.5-Pretrain") == 1 and "0.6M" in align[1]    # and not teacher_align's as well
    assert "not a file of the paper" in download.check_manifest("d2d", "data/tiny/train/d2d.json", tmp_path)[0]


def test_the_manifest_is_printed(capsys):
    download.main(["--manifest=d2d"])
    text = capsys.readouterr().out
    for entry in download.read_manifest("d2d"):
        for key in ("name", "published", "path", "license", "unclear"):
            assert (entry[key] or "") in text


@pytest.mark.parametrize("flag", ["--model=a/b", "--dataset=a/b", "--to=x", "--files=a", "--endpoint=http://h",
                                  "--revision=v1"])
def test_a_list_takes_no_settings_of_a_download(flag):
    with pytest.raises(UserError, match="belongs to a download, without --manifest; here it would be ignored"):
        download.main(["--manifest=d2d", flag])
