"""Files to bytes: decompressed, whole to the end, or an error that says they are damaged."""

import bz2
import lzma
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

# How a compressed file begins. Brotli has no mark of its own: the name alone tells it.
MAGIC = {
    "gzip": b"\x1f\x8b",
    "bz2": b"BZh",
    "xz": b"\xfd7zXZ\0",
    "zstd": b"(\xb5/\xfd",
    "lz4": b'\x04"M\x18',
}
_BLOCK = 1 << 17
# After these, zeros may fill up the last block.
_PADDED = ("gzip", "xz")


def compression_of(beginning: bytes) -> str | None:
    """Returns how a file that begins so is compressed, or None."""
    return next((name for name, magic in MAGIC.items() if beginning.startswith(magic)), None)


def import_or_explain(name: str, path: str) -> Any:
    """Imports what an input needs.

    Raises:
        ValueError: If the package is not installed.
    """
    try:
        return __import__(name, fromlist=["*"])
    except ImportError:
        raise ValueError(
            f"input ({path}) needs the package {name.partition('.')[0]}. Install it: "
            'pip install "megatron-satformer[data]".'
        ) from None


class Stream:
    """The uncompressed bytes of a file; closes it at the end of a `with`.

    Args:
        path: Of the file.
        compression: "gzip", "bz2", "xz", "zstd", "lz4", "brotli" or None.

    Raises:
        ValueError: If a package is missing.
    """

    def __init__(self, path: str, compression: str | None) -> None:
        self._path = path
        self._raw: IO[bytes] = Path(path).open("rb")  # noqa: SIM115 - closed on exit
        self._file: Any = self._raw
        self._errors: tuple[type[Exception], ...] = (OSError, EOFError, zlib.error, lzma.LZMAError)
        try:
            if compression == "zstd":
                zstandard = import_or_explain("zstandard", path)
                self._errors = (*self._errors, zstandard.ZstdError)
                # --long=31 files are allowed.
                context = zstandard.ZstdDecompressor(max_window_size=1 << 31)
                self._file = _Parts(self._raw, context.decompressobj, False)
            elif compression in ("lz4", "brotli"):
                arrow = import_or_explain("pyarrow", path)
                self._file = arrow.CompressedInputStream(self._raw, compression)
            elif compression is not None:
                self._file = _Parts(self._raw, _STARTS[compression], compression in _PADDED)
        except BaseException:
            self._raw.close()
            raise

    def read(self, size: int) -> bytes:
        """Returns some bytes, about `size` or more; none at the end.

        Raises:
            ValueError: If the file is damaged, or cut short.
        """
        try:
            return bytes(self._file.read(size))
        except self._errors as error:
            raise ValueError(
                f"input ({self._path}) is damaged or cannot be read to its end: {error}. "
                "Fetch it again."
            ) from None

    def tell(self) -> int:
        """Returns how many bytes of the file on disk are used up."""
        return self._raw.tell()

    def __enter__(self) -> "Stream":
        return self

    def __exit__(self, *_: object) -> None:
        self._raw.close()


_STARTS: dict[str, Callable[[], Any]] = {
    "gzip": lambda: zlib.decompressobj(wbits=31),
    "bz2": bz2.BZ2Decompressor,
    "xz": lzma.LZMADecompressor,
}


class _Parts:
    """Reads one or more compressed parts on end.

    The readers of Python and of zstandard take damage at the head of a second part for the end of
    the file, or do not notice that the last one is cut short.
    """

    def __init__(self, raw: IO[bytes], start: Callable[[], Any], padded: bool) -> None:
        self.raw, self.start, self.padded = raw, start, padded
        self.part, self.rest, self.begun = start(), b"", False

    def read(self, size: int) -> bytes:
        out: list[bytes] = []
        held = 0
        while held < size:
            block = self.rest or self.raw.read(_BLOCK)
            self.rest = b""
            if not block:
                if self.begun and not self.part.eof:
                    raise EOFError("its last part is cut short")
                break
            if self.part.eof:
                block = block.lstrip(b"\0") if self.padded else block
                if not block:
                    continue
                self.part = self.start()
            self.begun = True
            out.append(self.part.decompress(block))
            held += len(out[-1])
            self.rest = self.part.unused_data if self.part.eof else b""
        return b"".join(out)
