"""Addresses without credentials, to be shown in errors, logs, messages and links."""

import re

_CREDENTIALS = re.compile(
    r"(?<=://)(?:"
    r"[^\s/?#]*@"  # USER:PASSWORD@
    # A password with /, ? or # in it, which should have been quoted as %2F. The lookahead leaves
    # HOST[:PORT]/… alone, where an @ belongs to the path.
    r"|(?![^\s/?#:]*(?::\d*)?[/?#])\S*@"
    r")"
)


def without_credentials(text: str) -> str:
    """Return a text with user and password removed from each address in it."""
    return _CREDENTIALS.sub("", text)
