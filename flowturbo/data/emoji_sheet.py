"""What lies beside the emoji data: a sheet of its pictures, and the notice of their licences."""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from .emoji_classes import KINDS, STYLES

_EACH, _COLUMNS = 4, 3
_GAP, _TEXT, _SPACE = 2, 16, 10
_COLOURS = 128


def sheet(pixels: np.ndarray, labels: np.ndarray) -> Image.Image:
    """Four pictures of each class, Noto's before Fluent's, below the name of their kind.

    pixels (N, size, size, 3) uint8, labels (N,). The picture has 128 colours, to be small.
    """
    size = pixels.shape[1]
    cell = size + _GAP
    block = (len(STYLES) * _EACH * cell + _SPACE, cell + _TEXT)
    rows = -(-len(KINDS) // _COLUMNS)
    picture = Image.new("RGB", (_COLUMNS * block[0] + _SPACE, rows * block[1] + _SPACE), "white")
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(size=12)
    for k, kind in enumerate(KINDS):
        x, y = k // rows * block[0] + _SPACE, k % rows * block[1] + _SPACE // 2
        draw.text((x, y), kind, fill="black", font=font)
        for style in range(len(STYLES)):
            of_class = pixels[labels == len(STYLES) * k + style]
            # Evenly over the class, and not its first one, which is often the plainest.
            chosen = of_class[(np.arange(_EACH) * 2 + 1) * len(of_class) // (2 * _EACH)]
            for i, image in enumerate(chosen):
                at = (x + (style * _EACH + i) * cell, y + _TEXT)
                picture.paste(Image.fromarray(image), at)
    return picture.quantize(_COLOURS, dither=Image.Dither.NONE)


NOTICE = """\
The emoji data set and the models that are trained on it

`flowturbo emoji` makes a data set of pictures from two sets of emoji. The pictures are put on
white, made square and resized. The same pictures are on the sheet in the documentation.

Noto Emoji, by Google and the authors of Noto Emoji
    https://github.com/googlefonts/noto-emoji
    from the package emoji-datasource-google 16.0.0, by Cal Henderson
    Apache License, Version 2.0: https://www.apache.org/licenses/LICENSE-2.0

Fluent Emoji, by Microsoft
    https://github.com/microsoft/fluentui-emoji
    from the package @lobehub/fluent-emoji-3d 1.1.0, by LobeHub
    MIT License:

    Copyright (c) Microsoft Corporation.

    Permission is hereby granted, free of charge, to any person obtaining a copy
    of this software and associated documentation files (the "Software"), to deal
    in the Software without restriction, including without limitation the rights
    to use, copy, modify, merge, publish, distribute, sublicense, and/or sell
    copies of the Software, and to permit persons to whom the Software is
    furnished to do so, subject to the following conditions:

    The above copyright notice and this permission notice shall be included in all
    copies or substantial portions of the Software.

    THE SOFTWARE IS PROVIDED "AS IS", WITHOUT WARRANTY OF ANY KIND, EXPRESS OR
    IMPLIED, INCLUDING BUT NOT LIMITED TO THE WARRANTIES OF MERCHANTABILITY,
    FITNESS FOR A PARTICULAR PURPOSE AND NONINFRINGEMENT. IN NO EVENT SHALL THE
    AUTHORS OR COPYRIGHT HOLDERS BE LIABLE FOR ANY CLAIM, DAMAGES OR OTHER
    LIABILITY, WHETHER IN AN ACTION OF CONTRACT, TORT OR OTHERWISE, ARISING FROM,
    OUT OF OR IN CONNECTION WITH THE SOFTWARE OR THE USE OR OTHER DEALINGS IN THE
    SOFTWARE.
"""
