"""Addresses as they may be shown: in errors, logs, messages and links."""

import re

_CREDENTIALS = re.compile(
    r"(?<=://)(?:"
    r"[^\s/?#]*@"  # USER:PASSWORD@
    r"|(?![^\s/?#:]*(?::\d*)?[/?#])\S*@"  # one with /, ? or # in it, which should have been %2F
    r")"
)


def without_credentials(text: str) -> str:
    """Return a text in which no address carries a user or password any more."""
    return _CREDENTIALS.sub("", text)
