"""
A chat model behind an OpenAI-compatible endpoint: MMHal's judge, Object HalBench's object extraction.

Every reply is appended to a file before the next request is sent, and a prompt with a reply in the file is never sent
again: an interrupted run continues, and no reply is paid for twice. Without an endpoint, replies can be written into
the file by hand.
"""
import json
import os
import time
from pathlib import Path

import requests

from benchmarks.common import need
from configurator import Config, UserError
from engine.files import read_rows, write_lines

RETRY_AFTER = (1, 2, 4, 8)            # seconds, for errors that may pass
TIMEOUT = 60


class ChatModel:
    def __init__(self, config: Config, path: Path, temperature: float):
        self.url, self.model = config.judge_url, config.judge_model or None
        self.path, self.temperature = path, temperature
        self.headers = {}
        if config.judge_key_env:
            if not os.environ.get(config.judge_key_env):
                raise UserError(f"--judge_key_env: the environment variable {config.judge_key_env} is not set")
            self.headers["Authorization"] = f"Bearer {os.environ[config.judge_key_env]}"
        self.replies = {}             # prompt -> (model, reply)
        for where, row in read_rows(path) if path.exists() else []:
            prompt = need(row, "prompt", str, where)
            if row.get("reply") is not None and self.model in (None, row.get("model")):
                self.replies[prompt] = row.get("model"), need(row, "reply", str, where)

    def ask(self, prompt: str) -> str:
        if prompt not in self.replies:
            self.replies[prompt] = self.model, self.send(prompt)
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with open(self.path, "a", encoding="utf-8") as file:
                row = {"model": self.model, "prompt": prompt, "reply": self.replies[prompt][1]}
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
        return self.replies[prompt][1]

    def write_pending(self, prompts: list[str]) -> None:
        """Without an endpoint: the file with all replies so far, and an empty one for each of these prompts."""
        rows = [{"model": model, "prompt": prompt, "reply": reply} for prompt, (model, reply) in self.replies.items()]
        write_lines(self.path, rows + [{"model": None, "prompt": prompt, "reply": None} for prompt in prompts])

    def send(self, prompt: str) -> str:
        url = self.url.rstrip("/") + "/chat/completions"
        body = {"model": self.model, "messages": [{"role": "user", "content": prompt}], "max_tokens": 512,
                "temperature": self.temperature}
        for pause in (*RETRY_AFTER, None):
            try:
                response = requests.post(url, json=body, headers=self.headers, timeout=TIMEOUT)
            except requests.Timeout:
                problem = f"no reply within {TIMEOUT} s"
            except requests.RequestException as error:
                problem = f"no reply ({type(error).__name__})"
            else:
                reply = completion(response)
                if reply is not None:
                    return reply
                body_text = " ".join(response.text.split())[:80]
                problem = f"HTTP {response.status_code} and no chat completion: {body_text!r}"
                if 400 <= response.status_code < 500 and response.status_code not in (408, 429):
                    break             # a wrong key or model name: retrying does not help
            if pause:
                time.sleep(pause)
        raise UserError(f"--judge_url: {url} gave {problem}; {len(self.replies)} replies are kept in {self.path}, "
                        "run the same command again to continue")


def completion(response: requests.Response) -> str | None:
    """The text of a chat completion; None if the response is anything else."""
    try:
        reply = response.json()["choices"][0]["message"]["content"]
    except (ValueError, KeyError, IndexError, TypeError):
        return None
    return reply if response.status_code == 200 and isinstance(reply, str) else None
