"""Image files: formats that run programs, what is no regular file, damage of every format, sizes, modes, metadata."""

from __future__ import annotations

import io
import os
import random
import socket
import struct
import threading
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from ffvt.data.datasets import PictureFiles
from ffvt.data.headers import unreadable
from ffvt.data.images import load_image, read_image
from ffvt.data.layout_readers import Listing
from tests.hostile.case import Case

SIDE = 48
# format -> what Pillow needs to write it
FORMATS: dict[str, dict] = {
    "jpg": {"format": "JPEG"},
    "progressive.jpg": {"format": "JPEG", "progressive": True},
    "png": {"format": "PNG"},
    "palette.png": {"format": "PNG"},
    "webp": {"format": "WEBP"},
    "lossless.webp": {"format": "WEBP", "lossless": True},
    "bmp": {"format": "BMP"},
    "gif": {"format": "GIF"},
    "tif": {"format": "TIFF"},
    "lzw.tif": {"format": "TIFF", "compression": "tiff_lzw"},
    "jpeg.tif": {"format": "TIFF", "compression": "jpeg"},
    "avif": {"format": "AVIF"},
    "jp2": {"format": "JPEG2000"},
    "ppm": {"format": "PPM"},
}


def seed_image(kind: str = "png") -> bytes:
    """A small image that does not compress, as bytes of one format."""
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 3), np.uint8))
    file = io.BytesIO()
    (image.convert("P") if kind.startswith("palette") else image).save(file, **FORMATS[kind])
    return file.getvalue()


def cut(content: bytes) -> bytes:
    return content[: len(content) // 3]


def header_only(content: bytes) -> bytes:
    return content[:20]


def zeros_after_header(content: bytes) -> bytes:
    return content[:32] + bytes(len(content) - 32)


def refused(name: str, make: Callable[[Path], object], why: str = "") -> Case:
    """A file that must be refused by its name, by reading and by the check of headers or of the pixels."""

    def attempt(folder: Path) -> None:
        path = folder / f"victim-{name.split(', ')[0].replace(' ', '_')}"
        made = make(path)
        if isinstance(made, bytes):
            path.write_bytes(made)
        try:
            load_image(path, 16)
        except ValueError as error:
            if why not in str(error):
                raise AssertionError(f"does not say {why!r}: {error}") from error
            raise

    return Case("pictures", name, attempt, "victim", seconds=20)


def accepted(name: str, attempt: Callable[[Path], object]) -> Case:
    return Case("pictures", name, attempt, None, seconds=20)


def refusal(path: Path) -> str:
    """How a file is refused; "" where it is read."""
    try:
        load_image(path, 8)
    except ValueError as error:
        return str(error)
    return ""


def expect(found: torch.Tensor, colour: tuple[int, int, int]) -> None:
    difference = (found.float() - torch.tensor(colour, dtype=torch.float32)[:, None, None]).abs().max()
    assert difference <= 2, f"got {found[:, 0, 0].tolist()}, expected {colour}"


# What runs programs or is no photograph: refused by its format, whatever its name.


def postscript(_: Path) -> bytes:
    return b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n"


def postscript_with_ghostscript(folder: Path) -> None:
    """A program called gs on the PATH leaves a trace if it is started."""
    program = folder / "gs"
    program.write_text(f"#!/bin/sh\ntouch {folder.parent}/escaped.txt\nexit 1\n")
    program.chmod(0o755)
    earlier = os.environ["PATH"]
    os.environ["PATH"] = f"{folder}:{earlier}"
    try:
        (folder / "evil.jpg").write_bytes(postscript(folder))
        load_image(folder / "evil.jpg", 16)
    finally:
        os.environ["PATH"] = earlier


def pillows(format: str, mode: str = "RGB") -> Callable[[Path], None]:
    """An image in one of Pillow's other formats."""
    return lambda path: Image.new(mode, (16, 16)).save(path, format=format)


def wmf(_: Path) -> bytes:
    return b"\xd7\xcd\xc6\x9a\0\0" + struct.pack("<4hH", 0, 0, 10, 10, 96) + bytes(6) + b"\x01\0\t\0" + bytes(30)


def fits(_: Path) -> bytes:
    cards = [f"{name:8}= {value:>20}" for name, value in (("SIMPLE", "T"), ("BITPIX", "8"), ("NAXIS", "0"))]
    return "".join(card.ljust(80) for card in [*cards, "END"]).ljust(2880).encode()


# What is no regular file: refused without being opened.


def make_socket(path: Path) -> None:
    """Sockets have short names only, so it is made from its own folder."""
    earlier = os.getcwd()
    os.chdir(path.parent)
    try:
        with socket.socket(socket.AF_UNIX) as made:
            made.bind(path.name)
    finally:
        os.chdir(earlier)


def link_to(target: str) -> Callable[[Path], None]:
    return lambda path: path.symlink_to(target)


def pipe_that_is_written(folder: Path) -> None:
    """A pipe with an image in it is refused as well, and the writer is not kept waiting by us."""
    os.mkfifo(folder / "pipe.png")
    held = os.open(folder / "pipe.png", os.O_RDWR)
    try:
        os.write(held, seed_image())
        load_image(folder / "pipe.png", 16)
    finally:
        os.close(held)


def many_pipes_at_once(folder: Path) -> None:
    for number in range(20):
        os.mkfifo(folder / f"{number}.png")

    listing = Listing(["a"], [folder / f"{number}.png" for number in range(20)], [0] * 20)
    assert len(unreadable(PictureFiles(listing, 8))) == 20


# Sizes.


def png_of_size(width: int, height: int) -> bytes:
    """A PNG whose header declares a size, and whose pixels are none."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(b"")), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(_chunk(kind, content) for kind, content in chunks)


def _chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def text_bomb(_: Path) -> bytes:
    """A PNG with a compressed comment of 80 MB."""
    comment = _chunk(b"zTXt", b"Comment\0\0" + zlib.compress(bytes(80_000_000), 1))
    content = seed_image()
    return content[:33] + comment + content[33:]


def profile_bomb(folder: Path) -> None:
    """A PNG with a compressed colour profile of 80 MB: no more of it than is needed is unpacked."""
    profile = _chunk(b"iCCP", b"x\0\0" + zlib.compress(bytes(80_000_000), 1))
    content = seed_image()
    (folder / "profile.png").write_bytes(content[:33] + profile + content[33:])
    assert "profile.png" in (refusal(folder / "profile.png") or "profile.png")


def large_without_a_warning(folder: Path) -> None:
    """100 million pixels are read, and Pillow's warning with a line of its code is not shown."""
    Image.new("1", (20_000, 5_000)).save(folder / "large.png")
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)  # as importing the module does
        assert load_image(folder / "large.png", 16).shape == (3, 16, 16)
    assert not told


def extreme_shape(size: tuple[int, int], fit: str) -> Callable[[Path], None]:
    def attempt(folder: Path) -> None:
        Image.new("RGB", size, "red").save(folder / "strip.png")
        found = load_image(folder / "strip.png", 32, fit=fit)
        assert found.shape == (3, 32, 32)
        if fit != "pad":
            expect(found, (255, 0, 0))

    return attempt


# Modes and metadata: what is accepted must have the right colours.


def transparent(kind: str, mode: str, **options: object) -> Callable[[Path], None]:
    """Fully transparent black is white, in each format and mode."""

    def attempt(folder: Path) -> None:
        image = Image.new("RGBA", (16, 16), (0, 0, 0, 0))
        (image if mode == "RGBA" else image.convert(mode)).save(folder / f"alpha.{kind}", **options)
        expect(load_image(folder / f"alpha.{kind}", 8), (255, 255, 255))

    return attempt


def half_transparent_alike(folder: Path) -> None:
    image = Image.new("RGBA", (16, 16), (200, 0, 0, 128))
    image.save(folder / "a.png")
    image.save(folder / "a.webp", lossless=True)
    png, webp = (load_image(folder / name, 8) for name in ("a.png", "a.webp"))
    assert torch.equal(png, webp)
    expect(png, (227, 127, 127))


def transparent_colour(folder: Path) -> None:
    """A PNG without alpha, one of whose colours is declared transparent."""
    Image.new("RGB", (16, 16), (10, 20, 30)).save(folder / "key.png", transparency=(10, 20, 30))
    expect(load_image(folder / "key.png", 8), (255, 255, 255))


def transparent_palette(folder: Path) -> None:
    image = Image.new("P", (16, 16), 0)
    image.putpalette([0, 0, 0, 255, 0, 0])
    image.save(folder / "palette.png", transparency=bytes([0, 255]))
    expect(load_image(folder / "palette.png", 8), (255, 255, 255))


def of_mode(mode: str, colour: object, kind: str, expected: tuple[int, int, int]) -> Callable[[Path], None]:
    def attempt(folder: Path) -> None:
        Image.new(mode, (16, 16), colour).save(folder / f"mode.{kind}")
        expect(load_image(folder / f"mode.{kind}", 8), expected)

    return attempt


def integers(kind: str, dtype: type, value: int) -> Callable[[Path], object]:
    return lambda path: Image.fromarray(np.full((8, 8), value, dtype)).save(path, format=kind)


def turned(kind: str, number: int) -> Callable[[Path], None]:
    """EXIF's orientations: the red corner is upper left once the image is upright."""

    def attempt(folder: Path) -> None:
        upright = Image.new("RGB", (60, 40), "blue")
        upright.paste((255, 0, 0), (0, 0, 30, 20))
        back = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}.get(number)  # Pillow's transpositions that undo it
        stored = upright if back is None else upright.transpose(Image.Transpose(back))
        exif = Image.Exif()
        exif[0x0112] = number
        stored.save(folder / f"turned.{kind}", exif=exif, **({"lossless": True} if kind == "webp" else {}))
        image = read_image(folder / f"turned.{kind}")
        assert image.size == (60, 40), image.size
        red, _, blue = image.getpixel((5, 5))
        assert red > 200 > 60 > blue, image.getpixel((5, 5))
        if number > 4 and kind != "tif":
            assert read_image(folder / f"turned.{kind}", orient=False).size == (40, 60)

    return attempt


def exif_that_is(content: bytes) -> Callable[[Path], None]:
    """Damaged metadata do not cost an image whose pixels are whole."""

    def attempt(folder: Path) -> None:
        Image.new("RGB", (16, 16), "red").save(folder / "exif.jpg", exif=b"Exif\0\0" + content)
        expect(load_image(folder / "exif.jpg", 8), (254, 0, 0))

    return attempt


def entry(tag: int, kind: int, count: int, value: bytes) -> bytes:
    """EXIF data of one entry."""
    return b"II*\0\x08\0\0\0\x01\0" + struct.pack("<HHI4s", tag, kind, count, value) + bytes(4)


def wrong_suffix(folder: Path) -> None:
    (folder / "a.jpg").write_bytes(seed_image("png"))
    assert load_image(folder / "a.jpg", 16).shape == (3, 16, 16)


def animation(kind: str) -> Callable[[Path], None]:
    """Of an animation, the first picture."""

    def attempt(folder: Path) -> None:
        frames = [Image.new("RGB", (16, 16), colour) for colour in ("red", "blue", "lime")]
        frames[0].save(folder / f"moving.{kind}", save_all=True, append_images=frames[1:])
        expect(load_image(folder / f"moving.{kind}", 8), (255, 0, 0))

    return attempt


def while_files_are_short(folder: Path) -> None:
    """Too many open files are not taken for damage of an image."""
    import resource

    (folder / "a.png").write_bytes(seed_image())
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    highest = max(int(name) for name in os.listdir("/proc/self/fd"))
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(highest, soft), hard))
    held = []
    try:
        try:
            while True:
                held.append(os.open("/dev/null", os.O_RDONLY))
        except OSError:
            pass
        load_image(folder / "a.png", 16)
    except ValueError as error:
        raise AssertionError(f"was taken for damage: {error}") from error
    except OSError:
        return
    finally:
        for descriptor in held:
            os.close(descriptor)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    raise AssertionError("was read all the same")


def exchanged_for_a_pipe(folder: Path) -> None:
    """A file that becomes a pipe, and a file again, while it is read: no read hangs."""
    path, stop = folder / "a.png", threading.Event()

    def exchange() -> None:
        while not stop.is_set():
            (folder / "b").write_bytes(seed_image())
            os.replace(folder / "b", path)
            os.mkfifo(folder / "c")
            os.replace(folder / "c", path)

    path.write_bytes(seed_image())
    other = threading.Thread(target=exchange)
    other.start()
    try:
        for _ in range(200):
            refusal(path)
    finally:
        stop.set()
        other.join()


def mutated(kind: str) -> Callable[[Path], None]:
    """Three hundred changed copies: each is read, or refused in one bounded line."""

    def attempt(folder: Path) -> None:
        draw, content = random.Random(kind), seed_image(kind)
        path = folder / f"mutant.{kind}"
        for _ in range(300):
            mutant = bytearray(content)
            for _ in range(draw.randint(1, 8)):
                mutant[draw.randrange(min(len(mutant), draw.choice((40, 400, 1 << 30))))] = draw.randrange(256)
            if draw.random() < 0.3:
                del mutant[draw.randrange(len(mutant)) :]
            path.write_bytes(mutant)
            message = refusal(path)
            assert path.name in (message or path.name), message
            assert len(message) < 900, message
            assert not message or message.isprintable(), message

    return attempt


def strange_name(name: str | bytes, shown: str) -> Case:
    """The name of a file that cannot be read is shown escaped, in one line."""

    def attempt(folder: Path) -> None:
        path = folder / (os.fsdecode(name) if isinstance(name, bytes) else name)
        path.write_bytes(b"no image")
        load_image(path, 8)

    return Case("pictures", f"name {shown}", attempt, shown)


CASES = [
    refused("PostScript named .jpg", postscript, "it is none of JPEG"),
    Case("pictures", "PostScript with a gs on the PATH", postscript_with_ghostscript, "evil.jpg"),
    refused("PDF", pillows("PDF"), "it is none of"),
    refused("WMF", wmf, "it is none of"),
    refused("FITS", fits, "it is none of"),
    *(refused(format, pillows(format), "it is none of") for format in ("ICO", "PCX", "TGA", "DDS", "SGI", "IM")),
    refused("XBM", pillows("XBM", "1"), "it is none of"),
    refused("SVG", lambda _: b"<svg xmlns='http://www.w3.org/2000/svg'/>", "it is none of"),
    refused("HTML, a saved error page", lambda _: b"<!DOCTYPE html><html>404</html>", "it is none of"),
    refused("HEIC", lambda _: b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(100), "it is none of"),
    refused("pickle", lambda _: b"\x80\x04\x95", "it is none of"),
    refused("nothing, zero bytes", lambda _: b""),
    refused("blanks", lambda _: b" " * 4096),
    refused("zeros", lambda _: bytes(1 << 20)),
    refused("folder", lambda path: path.mkdir(), "is not a regular file"),
    refused("pipe", lambda path: os.mkfifo(path), "is not a regular file"),
    refused("socket", make_socket, "is not a regular file"),
    refused("link to zeros without end", link_to("/dev/zero"), "is not a regular file"),
    refused("link to the terminal", link_to("/dev/tty"), "is not a regular file"),
    refused("link to standard input", link_to("/dev/stdin")),
    Case("pictures", "link to nothing", lambda f: link_to("gone")(f / "a.png") or load_image(f / "a.png", 8), "a.png"),
    refused("link to itself", lambda path: path.symlink_to(path.name)),
    Case("pictures", "pipe with an image in it", pipe_that_is_written, "pipe.png"),
    accepted("twenty pipes, looked at by threads", many_pipes_at_once),
    accepted("file exchanged for a pipe and back", exchanged_for_a_pipe),
    accepted("too many open files", while_files_are_short),
    *(
        refused(f"{kind}, {damage.__name__}", lambda _, kind=kind, damage=damage: damage(seed_image(kind)))
        for kind in FORMATS
        for damage in (cut, header_only)
    ),
    *(
        refused(f"{kind}, zeros after the header", lambda _, kind=kind: zeros_after_header(seed_image(kind)))
        for kind in ("png", "tif", "lzw.tif", "avif", "jp2")
    ),
    *(Case("pictures", f"{kind}, three hundred mutants", mutated(kind), None, 120, slow=True) for kind in FORMATS),
    refused("PNG of 2^31 x 2^31", lambda _: png_of_size(2**31 - 1, 2**31 - 1)),
    refused("PNG of 0 x 0", lambda _: png_of_size(0, 0)),
    refused("PNG of 1 x 500,000,000", lambda _: png_of_size(1, 500_000_000), "exceeds limit"),
    refused("PNG without pixels", lambda _: png_of_size(100, 100)),
    refused("PNG with a comment of 80 MB", text_bomb),
    accepted("PNG with a colour profile of 80 MB", profile_bomb),
    Case("pictures", "100 million pixels, no warning", large_without_a_warning, None, slow=True),
    *(
        accepted(f"strip of {width} x {height}, {fit}", extreme_shape((width, height), fit))
        for width, height in ((5000, 1), (1, 5000), (1, 1))
        for fit in ("stretch", "crop", "pad")
    ),
    *(accepted(f"transparent {kind}", transparent(kind, "RGBA")) for kind in ("png", "tif", "gif", "avif", "jp2")),
    accepted("transparent grey png", transparent("png", "LA")),
    accepted("transparent webp", transparent("webp", "RGBA", lossless=True)),
    accepted("half transparent png and webp alike", half_transparent_alike),
    accepted("transparent colour of a PNG", transparent_colour),
    accepted("transparent palette", transparent_palette),
    accepted("bilevel", of_mode("1", 1, "png", (255, 255, 255))),
    accepted("CMYK jpg", of_mode("CMYK", (0, 255, 255, 0), "jpg", (254, 0, 0))),
    accepted("CMYK tif", of_mode("CMYK", (0, 255, 255, 0), "tif", (255, 0, 0))),
    accepted("16-bit PNG", of_mode("I;16", 32896, "png", (128, 128, 128))),
    accepted("16-bit tif", of_mode("I;16", 32896, "tif", (128, 128, 128))),
    accepted("16 bits in 32", of_mode("I", 32896, "tif", (128, 128, 128))),
    refused("float TIFF", integers("TIFF", np.float32, 1), "floating-point pixels"),
    refused("int32 TIFF, beyond 16 bits", integers("TIFF", np.int32, 70000), "got 70000..70000"),
    refused("int32 TIFF, negative", integers("TIFF", np.int32, -5), "got -5..-5"),
    *(accepted(f"jpg, EXIF orientation {number}", turned("jpg", number)) for number in range(1, 9)),
    *(accepted(f"{kind}, EXIF orientation 6", turned(kind, 6)) for kind in ("png", "webp", "tif", "avif")),
    *(
        accepted(f"EXIF {name}", exif_that_is(content))
        for name, content in (
            ("of nothing", b""),
            ("of noise", random.Random(1).randbytes(200)),
            ("that points outside", b"II*\0\xff\xff\xff\x7f"),
            ("that points at itself", entry(0x8769, 4, 1, b"\x08\0\0\0")),
            ("with orientation 99", entry(0x0112, 3, 1, b"c\0\0\0")),
            ("with orientation as text", entry(0x0112, 2, 4, b"six\0")),
        )
    ),
    accepted("PNG named .jpg", wrong_suffix),
    *(accepted(f"animated {kind}", animation(kind)) for kind in ("gif", "png", "tif")),
    strange_name("\x1b[2Jclear.png", "\\x1b[2Jclear.png"),
    strange_name("two\nlines.png", "two\\nlines.png"),
    strange_name(b"latin-\xe9.png", "latin-\\udce9.png"),
    strange_name("right\u202eleft.png", "\\u202e"),
    strange_name("n" * 240 + ".png", "n" * 240 + ".png"),
]
