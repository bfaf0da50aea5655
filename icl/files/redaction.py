"""Remove secrets from text. Before `icl` prints or saves text that may contain a URL or a command line, it calls `redact`."""

import os
import re
from collections.abc import Iterator, Mapping

# Without the bound of 30, the search time would grow with the square of a word's length.
_SCHEME = r"[A-Za-z][\w+.-]{0,30}://"
_CREDENTIALS = re.compile(rf"({_SCHEME})\S*@")
_SECRET_NAME = r"(?:\w*_)?(?:SECRET|SECRET_KEY|SECRET_ACCESS_KEY|TOKEN|PASSWORD|API_KEY)"
_SECRETS = re.compile(_SECRET_NAME)
# The two alternatives (a backslash with the next character, or any other character) never match the same text. So the search needs
# linear time.
_OPEN, _REST = r"(?P<quote>\\?[\"'])", r"(?:(?!(?P=quote))(?:\\.|[^\\\n]))*"
_VALUE = rf"(?:{_OPEN}{_REST}(?:(?P=quote))?|[^\s&\"']+)"
_QUOTED = re.compile(rf"(?P<start>{_OPEN}(?P<name>[\w-]{{1,64}})=){_REST}(?=(?P=quote))")
"""Pattern of a variable and its value that are in quotes together, such as 'HF_TOKEN=a b'."""
_ASSIGNED = re.compile(rf"(?P<start>(?<![\w-])(?P<name>[\w-]{{1,64}})=){_VALUE}")
"""Pattern of a variable or option and its value, as in an `env` command, in --api-key=VALUE, or in the query of a URL."""
_OPTION = re.compile(
    rf"(?P<start>(?<![\w-])--(?:[\w-]{{1,64}}\.){{0,8}}(?P<name>[\w-]{{1,64}})[ \t]{{1,9}})(?!-){_VALUE}"
)
"""Pattern of an option and its value in the next word, such as --token VALUE."""
_HUB_REVISION = re.compile(r"hf://[\w.-]+/[\w.-]+@[\w.%/-]")
"""Pattern of the address of a repository at a revision, such as hf://USER/REPO@v1. The part before the @ is not a credential."""
_LEAST = 6
"""Minimum length of a secret that is removed from text. Shorter secrets are kept, because they may occur inside ordinary words."""


def redact(text: str, environment: Mapping[str, str] = os.environ) -> str:
    """Return a string without the credentials in its URLs and without the values of secret variables.

    A variable is secret if its name is `SECRET`, `TOKEN`, `PASSWORD` or a similar word, or ends in such a word after an underscore.
    The variable may be set in the environment or in the string itself. The same holds for options such as `--api-key`.

    Examples:
        >>> redact("no answer from https://me:word@host:9000/bucket")
        'no answer from https://host:9000/bucket'
    """
    text = re.sub(r"\S+", lambda word: _without_credentials(word[0]), text)
    for pattern in (_QUOTED, _ASSIGNED, _OPTION):
        text = pattern.sub(_without_secret, text)
    for secret in _secrets(environment):
        text = text.replace(secret, "***")
    return text


def _without_secret(match: re.Match[str]) -> str:
    """Return a variable or option. If the variable or option is secret, stars replace its value."""
    name = match["name"].strip("-").upper().replace("-", "_")
    return f"{match['start']}***" if _SECRETS.fullmatch(name) else match[0]


def _without_credentials(word: str) -> str:
    """Return a word without the credentials between the scheme of a URL and the last @."""
    if word.count("@") == word.count("://") == 1 and _HUB_REVISION.search(word):
        return word
    at = word.rfind("@")
    scheme = re.compile(_SCHEME).search(word, 0, at) if at > 0 else None
    return word[: scheme.end()] + word[at + 1 :] if scheme else word


def _secrets(environment: Mapping[str, str]) -> Iterator[str]:
    """Yield every secret in the environment: the values of secret variables, and the passwords in URLs."""
    for name, value in environment.items():
        secrets = [value] if _SECRETS.fullmatch(name) else []
        credentials = [address[0].partition("://")[2].removesuffix("@") for address in _CREDENTIALS.finditer(value)]
        secrets += [user_and_password.partition(":")[2] for user_and_password in credentials]
        yield from (secret for secret in secrets if len(secret) >= _LEAST)
