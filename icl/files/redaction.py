"""Text without secrets: what `icl` writes or prints passes through here where an address or a command line may be part of it."""

import os
import re
from collections.abc import Iterator, Mapping

_SCHEME = r"[A-Za-z][\w+.-]{0,30}://"  # without a bound, a long word would take time that grows with its square
_CREDENTIALS = re.compile(rf"({_SCHEME})\S*@")
_SECRET_NAME = r"(?:\w*_)?(?:SECRET|SECRET_KEY|SECRET_ACCESS_KEY|TOKEN|PASSWORD|API_KEY)"
_SECRETS = re.compile(_SECRET_NAME)
_ASSIGNED = re.compile(r"\b(\w{1,64})=[^\s&\"']+")
"""A variable and its value, as `env` takes them in a command, or a server in an address."""
_LEAST = 6
"""Letters from which on a secret is looked for in text; a shorter one would take plain words with it."""


def redact(text: str, environment: Mapping[str, str] = os.environ) -> str:
    """Return a text without the credentials in its URLs, and without the values of secret variables, here or set in the text.

    Examples:
        >>> redact("no answer from https://me:word@host:9000/bucket")
        'no answer from https://host:9000/bucket'
    """
    text = re.sub(r"\S+", lambda word: _without_credentials(word[0]), text)
    text = _ASSIGNED.sub(lambda found: f"{found[1]}=***" if _SECRETS.fullmatch(found[1].upper()) else found[0], text)
    for secret in _secrets(environment):
        text = text.replace(secret, "***")
    return text


def _without_credentials(word: str) -> str:
    """Return a word without what stands between the scheme of an address and the last @."""
    at = word.rfind("@")
    scheme = re.compile(_SCHEME).search(word, 0, at) if at > 0 else None
    return word[: scheme.end()] + word[at + 1 :] if scheme else word


def _secrets(environment: Mapping[str, str]) -> Iterator[str]:
    """Yield every secret that the environment holds: values of secret variables, and passwords in addresses."""
    for name, value in environment.items():
        found = [value] if _SECRETS.fullmatch(name) else []
        credentials = [address[0].partition("://")[2].removesuffix("@") for address in _CREDENTIALS.finditer(value)]
        found += [one.partition(":")[2] for one in credentials]
        yield from (secret for secret in found if len(secret) >= _LEAST)
