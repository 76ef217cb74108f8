"""
A chat model behind an OpenAI-compatible endpoint: MMHal's judge, Object HalBench's object extraction.

Every reply is written to a file before the next request is sent, and a prompt with a reply in the file is never sent
again: an interrupted run continues, and no reply is paid for twice. Without an endpoint, replies can be written into
the file by hand.
"""
import os
import time
from pathlib import Path

import requests

from benchmarks.common import need
from configurator import Config, UserError
from engine.files import read_rows, write_lines
from engine.http import FAILURES, Login, proxies

RETRY_AFTER = (1, 2, 4, 8)            # seconds, for errors that may pass
TIMEOUT = 60


class ChatModel:
    def __init__(self, config: Config, path: Path, temperature: float):
        self.model, self.path, self.temperature = config.judge_model or None, path, temperature
        self.login = open_login(config)
        self.rows = []                # of the file, all but the empty ones that `write_pending` made
        self.replies = {}             # prompt -> (model, reply)
        for where, row in read_rows(path) if path.exists() else []:
            prompt = need(row, "prompt", str, where)
            if row != pending(prompt):
                self.rows.append(row)
            if row.get("reply") is not None and self.model in (None, row.get("model")):
                self.replies[prompt] = row.get("model"), need(row, "reply", str, where)

    def ask(self, prompt: str) -> str:
        if prompt not in self.replies:
            reply = self.send(prompt)
            self.replies[prompt] = self.model, reply
            self.rows.append({"model": self.model, "prompt": prompt, "reply": reply})
            write_lines(self.path, self.rows)
        return self.replies[prompt][1]

    def write_pending(self, prompts: list[str]) -> None:
        """Without an endpoint: the file with all replies so far, and an empty reply for each of these prompts."""
        write_lines(self.path, self.rows + [pending(prompt) for prompt in prompts])

    def send(self, prompt: str) -> str:
        url = self.login.address + "/chat/completions"
        body = {"model": self.model, "messages": [{"role": "user", "content": prompt}], "max_tokens": 512,
                "temperature": self.temperature}
        for pause in (*RETRY_AFTER, None):
            try:
                response = requests.post(url, json=body, auth=self.login, timeout=TIMEOUT)
            except requests.Timeout:
                problem = f"no reply within {TIMEOUT} s"
            except FAILURES as error:
                problem = f"no reply ({type(error).__name__}; check the address{proxies()})"
                if isinstance(error, ValueError):
                    break             # an address or a proxy that cannot work
            else:
                reply = completion(response)
                if reply is not None:
                    return self.login.hide(reply)
                body_text = self.login.hide(" ".join(response.text.split()))[:80]
                problem = f"HTTP {response.status_code} and no chat completion: {body_text!r}"
                if 400 <= response.status_code < 500 and response.status_code not in (408, 429):
                    break             # a wrong key or model name: retrying does not help
            if pause:
                time.sleep(pause)
        raise UserError(f"--judge_url: {url} gave {problem}; {len(self.replies)} replies are kept in {self.path}, "
                        "run the same command again to continue")


def open_login(config: Config) -> Login | None:
    """The endpoint's address and key, checked; None if there is no endpoint. Benchmarks check it when they are opened."""
    if config.judge_key_env and not os.environ.get(config.judge_key_env):
        raise UserError(f"--judge_key_env: the environment variable {config.judge_key_env} is not set")
    return Login("--judge_url", config.judge_url, config.judge_key_env) if config.judge_url else None


def pending(prompt: str) -> dict:
    return {"model": None, "prompt": prompt, "reply": None}


def completion(response: requests.Response) -> str | None:
    """The text of a chat completion; None if the response is anything else."""
    try:
        reply = response.json()["choices"][0]["message"]["content"]
    except (ValueError, LookupError, TypeError, RecursionError):
        return None
    if response.status_code != 200 or not isinstance(reply, str):
        return None
    return reply.encode(errors="replace").decode()                   # half a surrogate pair, which JSON can spell


def fill(template: str, values: list[str], where: str | Path) -> str:
    """Put the values into the template's {}, in order. Other braces, of the template or of a value, are text."""
    pieces = template.split("{}")
    if len(pieces) != len(values) + 1:
        raise UserError(f"{where}: has {len(pieces) - 1} places {{}}, expected {len(values)}")
    return "".join(piece + value for piece, value in zip(pieces, [*values, ""]))
