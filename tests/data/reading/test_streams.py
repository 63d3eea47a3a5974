import bz2
import gzip
import lzma
from pathlib import Path

import pytest

from megatron_satformer.data.reading.streams import Stream, compression_of

zstandard = pytest.importorskip("zstandard")
pyarrow = pytest.importorskip("pyarrow")
TEXT = b"".join(b"%d some text\n" % number for number in range(50_000))


def through_arrow(name: str, text: bytes) -> bytes:
    sink = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(sink, name) as out:
        out.write(text)
    return bytes(sink.getvalue())


COMPRESS = {
    "gzip": gzip.compress,
    "bz2": bz2.compress,
    "xz": lzma.compress,
    "zstd": zstandard.compress,
    "lz4": lambda text: through_arrow("lz4", text),
    "brotli": lambda text: through_arrow("brotli", text),
}


def read_all(path: Path, name: str | None) -> bytes:
    out = b""
    with Stream(str(path), name) as stream:
        while block := stream.read(10_000):
            out += block
        assert stream.tell() == path.stat().st_size
    return out


@pytest.mark.parametrize("name", COMPRESS)
def test_all_parts_are_read_and_damage_is_named(name: str, tmp_path: Path) -> None:
    path = tmp_path / "file"
    one = COMPRESS[name](TEXT)
    assert compression_of(one) == (None if name == "brotli" else name)
    path.write_bytes(one)
    assert read_all(path, name) == TEXT
    path.write_bytes(one + COMPRESS[name](b"") + one)
    assert read_all(path, name) == TEXT * 2
    # Also a second part whose head is damaged, which Python's readers take for the end.
    for content in (one[:-1], one[: len(one) // 2], one + one[:-5], one + b"rubbish" + one[7:]):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="is damaged or cannot be read to its end") as error:
            read_all(path, name)
        assert str(path) in str(error.value)


@pytest.mark.parametrize("name", ["gzip", "xz"])
def test_padding_is_no_damage(name: str, tmp_path: Path) -> None:
    path = tmp_path / "file"
    one = COMPRESS[name](TEXT)
    path.write_bytes(one + bytes(512) + one + bytes(200_000))
    assert read_all(path, name) == TEXT * 2


def test_the_old_xz_format(tmp_path: Path) -> None:
    path = tmp_path / "file.lzma"
    path.write_bytes(lzma.compress(TEXT, lzma.FORMAT_ALONE))
    assert read_all(path, "xz") == TEXT
