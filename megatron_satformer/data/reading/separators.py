r"""What stands between two documents of plain text, whether lines end in LF or CRLF."""

import re
import sys


def unescape_separator(separator: str | None) -> str | None:
    r"""Returns the separator with \n, \t, \r, \0 and \\ as the shell cannot write them."""
    if separator is None:
        return None
    marks = {"n": "\n", "t": "\t", "r": "\r", "0": "\0", "\\": "\\"}
    out, characters = [], iter(separator)
    for character in characters:
        if character == "\\":
            follower = next(characters, "")
            out.append(marks.get(follower, "\\" + follower))
        else:
            out.append(character)
    return "".join(out)


class Separator:
    r"""Cuts text where the separator is; a line end in it may be LF or CRLF in the text.

    Args:
        text: The separator; "" cuts nowhere.

    Attributes:
        longest: Bytes that it takes at most.
    """

    def __init__(self, text: str) -> None:
        self.text = text
        plain = text.replace("\r\n", "\n")
        self._mark = plain.encode("utf-8")
        # A CR before a leading line end is taken off the document: a pattern that begins with a
        # fixed byte is found several times as fast as one that begins with an optional one.
        parts = map(re.escape, self._mark.split(b"\n"))
        self._crlf = re.compile(rb"\r?\n".join(parts).removeprefix(rb"\r?"))
        self._leads = plain.startswith("\n")
        self.longest = len(self._mark) + plain.count("\n")
        self._whole: list[str] = []
        self._files = 0

    def cut(self, pending: bytearray, searched: int) -> list[bytes] | None:
        """Returns the documents, the last one unfinished; None if there is no separator.

        Args:
            pending: Text.
            searched: Bytes of it that no separator starts in.
        """
        if not self._mark:
            return None
        if b"\n" not in self._mark or pending.find(b"\r") < 0:
            found = pending.find(self._mark, searched) >= 0
            return bytes(pending).split(self._mark) if found else None
        if self._crlf.search(pending, searched) is None:
            return None
        documents = self._crlf.split(bytes(pending))
        if self._leads:
            documents[:-1] = [document.removesuffix(b"\r") for document in documents[:-1]]
        return documents

    def count(self, path: str, found: bool) -> None:
        """Takes note whether a file had a separator."""
        self._files += 1
        if not found and self._mark:
            self._whole.append(path)

    def report(self) -> None:
        """Warns of files that were read to their end without a separator."""
        if not self._whole:
            return
        where, more = self._whole[0], len(self._whole) - 1
        if more:
            where += f" and {more} more of {self._files} files of plain text"
        print(
            f"WARNING: document_separator ({self.text!r}) occurs nowhere in {where}, "
            f"{'each of them' if more else 'which is'} one document. Give what stands between "
            "documents there, or '' if each file is one.",
            file=sys.stderr,
        )
