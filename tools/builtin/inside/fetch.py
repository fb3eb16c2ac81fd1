"""Get one page through the proxy that the environment names, as text."""

from __future__ import annotations

import json
import re
import sys
import urllib.error
import urllib.parse
import urllib.request
import zlib
from html.parser import HTMLParser
from typing import Any

TEXT = re.compile(r"text/|application/(.*\+)?(json|xml|yaml|javascript|ecmascript|x-ndjson|x-sh|sql|toml|x-www-form)")
HIDDEN = frozenset(("script", "style", "noscript", "template", "svg"))
BLOCKS = re.compile(
    r"(address|article|aside|blockquote|br|dd|div|dl|dt|figcaption|footer|form|h[1-6]|header|hr|li|main|nav|ol|p|pre|"
    r"section|table|tbody|tfoot|thead|tr|ul)"
)
HEADINGS = {"h1": "# ", "h2": "## ", "h3": "### ", "h4": "#### ", "h5": "##### ", "h6": "###### ", "li": "- "}


class Reader(HTMLParser):
    """The text that a person would see, with headings, list items and links marked."""

    def __init__(self, base: str) -> None:
        """``base`` is the page's address."""
        super().__init__(convert_charrefs=True)
        self.base = base
        self.title = ""
        self.parts: list[str] = []
        self._hidden: list[str] = []
        self._links: list[str | None] = []
        self._verbatim = self._in_title = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Begin an element."""
        if tag in HIDDEN:
            self._hidden.append(tag)
        self._in_title = tag == "title"
        if self._hidden:
            return
        if BLOCKS.fullmatch(tag):
            self.parts.append("\n" + HEADINGS.get(tag, ""))
        elif tag in ("td", "th"):
            self.parts.append("\t")
        elif tag == "a":
            self._open_link(dict(attrs).get("href"))
        self._verbatim = self._verbatim or tag == "pre"

    def _open_link(self, href: str | None) -> None:
        try:
            target = urllib.parse.urljoin(self.base, href) if href and not href.startswith("#") else None
        except ValueError:
            target = None
        self._links.append(target if target and target.startswith(("http:", "https:")) else None)
        if self._links[-1]:
            self.parts.append("[")

    def handle_endtag(self, tag: str) -> None:
        """End an element; elements that were left open inside of it end with it."""
        self._in_title = False
        if tag in self._hidden:
            del self._hidden[self._hidden.index(tag) :]
            return
        if self._hidden:
            return
        if tag == "a" and self._links:
            target = self._links.pop()
            self.parts.append(f"]({target})" if target else "")
        elif BLOCKS.fullmatch(tag):
            self.parts.append("\n")
        self._verbatim = self._verbatim and tag != "pre"

    def handle_data(self, data: str) -> None:
        """Take text."""
        if self._in_title:
            self.title += data
        elif self._verbatim:
            self.parts.append(data)
        elif not self._hidden:
            text = re.sub(r"\s+", " ", data)
            self.parts.append(text.lstrip() if self.parts and self.parts[-1].endswith("\n") else text)

    def text(self) -> str:
        """All of it, without needless white space."""
        text = re.sub(r"[ \t]+\n", "\n", "".join(self.parts))
        text = re.sub(r"\n{3,}", "\n\n", text).strip()
        title = " ".join(self.title.split())
        return f"{title}\n\n{text}" if title else text


def readable(text: str, base: str) -> str:
    """The text of an HTML page; the page itself if nothing can be made of it."""
    reader = Reader(base)
    try:
        reader.feed(text)
        reader.close()
    except (AssertionError, ValueError, RecursionError):
        return text
    return reader.text()


def unpacked(data: bytes, coding: str, limit: int) -> bytes:
    """A body as it was before it was compressed, at most ``limit`` bytes: we asked for none, but servers do it."""
    if coding not in ("gzip", "x-gzip", "deflate"):
        return data
    for bits in (zlib.MAX_WBITS | 32, -zlib.MAX_WBITS):
        try:
            return zlib.decompressobj(bits).decompress(data, limit)
        except zlib.error:
            continue
    return data


def fetch(url: str, limit: int, timeout: float) -> dict[str, Any]:
    """What came back."""
    headers = {"User-Agent": "Mozilla/5.0 (compatible; ridethrough)", "Accept": "text/*, */*;q=0.5"}
    request = urllib.request.Request(url, headers={**headers, "Accept-Encoding": "identity"})
    try:
        answer = urllib.request.urlopen(request, timeout=timeout)
    except urllib.error.HTTPError as error:
        if error.code in (301, 302, 303, 307, 308):  # to a file, or in a circle
            return {"error": str(error.reason)}
        answer = error
    with answer:
        data = answer.read(limit + 1)
        kind = (answer.headers.get_content_type() if answer.headers.get("Content-Type") else "").lower()
        more = len(data) > limit
        found: dict[str, Any] = {"status": answer.code, "url": answer.url, "type": kind, "more": more}
        found["size"] = answer.headers.get("Content-Length") or (None if more else len(data))
        found["refused"] = answer.headers.get("X-Squid-Error", "")
        data = unpacked(data[:limit], (answer.headers.get("Content-Encoding") or "").strip().lower(), limit)
        charset = answer.headers.get_content_charset() or declared(data)
    if not TEXT.match(kind) and (kind not in ("", "application/octet-stream") or b"\0" in data):
        return found
    found["text"] = decoded(data, charset)
    if kind in ("text/html", "application/xhtml+xml"):
        found["text"] = readable(found["text"], found["url"])
    return found


def declared(data: bytes) -> str:
    """The encoding that an HTML page says it has."""
    match = re.search(rb"<meta[^>]{0,200}charset=[\"']?([A-Za-z0-9_-]{1,40})", data[:2048])
    return match.group(1).decode() if match else "utf-8"


def decoded(data: bytes, charset: str) -> str:
    """Text, whatever the server says of it."""
    try:
        return data.decode(charset, "replace")
    except (LookupError, ValueError):
        return data.decode("utf-8", "replace")


def answer(given: dict[str, Any]) -> dict[str, Any]:
    """Fetch what ``given`` asks for, or say why not."""
    try:
        return fetch(given["url"], given["limit"], given["timeout"])
    except urllib.error.URLError as error:
        return {"error": str(error.reason)}
    except (OSError, ValueError, EOFError) as error:
        return {"error": str(error) or type(error).__name__}
    except Exception as error:  # http.client has its own
        return {"error": f"{type(error).__name__}: {error}"}


if __name__ == "__main__":
    sys.stdout.buffer.write(json.dumps(answer(json.load(sys.stdin)), ensure_ascii=False).encode("utf-8", "replace"))
