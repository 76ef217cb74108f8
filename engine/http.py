"""
Keys and passwords for HTTP requests: sent to the one server they are for, and shown and stored nowhere.

A login leaves the address before anything can print the address; `Login.hide` removes it from what the server says, and
`hide_logins` of configurator.py from what a message quotes of the user's.
"""
import os
import re
from urllib.parse import unquote, urlsplit

import requests
from requests.auth import AuthBase, _basic_auth_str

from configurator import UserError, expected

# A request that failed without an answer. requests lets some errors of urllib3 and of addresses through.
FAILURES = (requests.RequestException, requests.packages.urllib3.exceptions.HTTPError, ValueError)
SHORTEST_SECRET = 6      # "EMPTY", the key of local servers, may occur in any text


class Login(AuthBase):
    """
    The `auth` of requests to one server, named by a flag: the key in an environment variable, or else the
    USER:PASSWORD of its address. Servers that it redirects to receive nothing.
    """

    def __init__(self, flag: str, url: str, variable: str):
        try:
            parts = urlsplit(url)
            valid = parts.scheme in ("http", "https") and parts.hostname and (parts.port or True)
        except ValueError:
            valid = False
        if not valid:
            raise expected(flag, re.sub(".*@", "***@", url), "http(s)://HOST")
        host = parts.netloc.rpartition("@")[2].lower()
        self.address = f"{parts.scheme}://{host}{parts.path}".rstrip("/")
        self.key = read_key(variable)
        self.user, self.password = unquote(parts.username or ""), unquote(parts.password or "")

    def __call__(self, request: requests.PreparedRequest) -> requests.PreparedRequest:
        if request.url.startswith(self.address + "/"):
            if self.key:
                request.headers["Authorization"] = f"Bearer {self.key}"
            elif self.password:
                request.headers["Authorization"] = _basic_auth_str(self.user, self.password)
        return request

    def hide(self, text: str) -> str:
        """A server may quote what it was sent."""
        for secret in (self.key, self.password):
            if len(secret) >= SHORTEST_SECRET:
                text = text.replace(secret, "***")
        return text


def read_key(variable: str) -> str:
    """An environment variable as an HTTP header can carry it; empty if it is not set."""
    key = os.environ.get(variable, "").strip() if variable else ""
    if not (key.isascii() and key.isprintable()):
        raise UserError(f"{variable}: holds a line break or a character that is not ASCII, which no HTTP header can "
                        "carry; set it again, without quotes")
    return key


def proxies() -> str:
    """The proxy that the environment sets, as part of a message; its address may hold a password."""
    names = [name for name in os.environ if name.lower() in ("http_proxy", "https_proxy", "all_proxy")]
    return f" and the proxy of {', '.join(names)}" if names else ""
