"""Figures of a page, as data URIs. We accept a PNG file only if the whole file can be decoded."""

import base64
import io
from dataclasses import dataclass

from matplotlib.figure import Figure
from PIL import Image

from icl.config.validation import UserError
from icl.plotting.style import render_figure

MAX_PIXELS = 50_000_000
"""Largest number of pixels of a figure on the page. Figures from `icl` have at most five million."""


class PictureError(UserError, ValueError):
    """A figure that cannot be shown; the message says why."""


@dataclass(frozen=True, kw_only=True)
class Picture:
    """An image that is part of the page, so that the page needs no other file."""

    uri: str
    alt: str
    width: int
    height: int
    caption: str
    file: str = ""
    """Path of the file within the run's folder, if there is one."""


def embed(data: bytes, *, alt: str, caption: str, file: str = "") -> Picture:
    """Return a picture from the bytes of a PNG file.

    Raises:
        PictureError: If the bytes are not a PNG file, are cut short or damaged, or have too many pixels.
    """
    try:
        with Image.open(io.BytesIO(data), formats=["PNG"]) as image:
            width, height = image.size
            # Check the size before decoding, because a small file can claim to have any size.
            if width * height > MAX_PIXELS:
                raise PictureError(f"it has {width:,} x {height:,} pixels, more than the limit of {MAX_PIXELS:,}")
            image.load()
    except PictureError:
        raise
    except (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError):
        raise PictureError("it is damaged, cut short or not a PNG file") from None
    uri = "data:image/png;base64," + base64.b64encode(data).decode("ascii")
    return Picture(uri=uri, alt=alt, width=width, height=height, caption=caption, file=file)


def draw(figure: Figure, *, alt: str, caption: str) -> Picture:
    """Return a picture of a figure that is not saved in a file."""
    return embed(render_figure(figure), alt=alt, caption=caption)
