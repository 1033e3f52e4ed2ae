"""Pictures open the same wherever they are."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from limbeck.data.records import open_image

RED, BLUE = (200, 10, 10), (10, 10, 200)


@pytest.fixture
def red_over_blue() -> Image.Image:
    image = Image.new("RGB", (4, 8), RED)
    image.paste(BLUE, (0, 4, 4, 8))
    return image


def test_a_path_bytes_a_picture_and_a_function_give_the_same_pixels(tmp_path, red_over_blue):
    path = tmp_path / "a.png"
    red_over_blue.save(path)
    for source in (path, str(path), path.read_bytes(), red_over_blue, lambda: path):
        assert np.array_equal(np.asarray(open_image(source)), np.asarray(red_over_blue))


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK", "1"])
def test_every_mode_becomes_rgb(mode):
    assert open_image(Image.new(mode, (3, 3))).mode == "RGB"


def test_a_picture_is_turned_upright(red_over_blue):
    exif, file = Image.Exif(), io.BytesIO()
    exif[0x0112] = 3  # upside down
    red_over_blue.save(file, "PNG", exif=exif)
    assert open_image(file.getvalue()).getpixel((0, 0)) == BLUE


def test_sixteen_bits_of_grey_are_scaled_not_cut(tmp_path):
    values = np.array([[0, 257, 65535]], dtype=np.uint16)
    Image.fromarray(values).save(tmp_path / "deep.png")
    assert np.asarray(open_image(tmp_path / "deep.png"))[0, :, 0].tolist() == [0, 1, 255]
