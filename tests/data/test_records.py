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
    (tmp_path / "deep.pgm").write_bytes(b"P5 3 1 65535\n" + values.astype(">u2").tobytes())
    Image.fromarray(values.astype(np.int32)).save(tmp_path / "deep.tif")
    for name in ("deep.png", "deep.pgm", "deep.tif"):
        assert np.asarray(open_image(tmp_path / name))[0, :, 0].tolist() == [0, 1, 255], name


def test_floats_between_0_and_1_are_scaled(tmp_path):
    Image.fromarray(np.array([[0, 0.2, 1]], dtype=np.float32)).save(tmp_path / "a.tif")
    assert np.asarray(open_image(tmp_path / "a.tif"))[0, :, 0].tolist() == [0, 51, 255]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (np.array([[0, 65536]], dtype=np.int32), "pixels from 0 to 65536, expected 0 to 65535: save it with 8 bits a pixel"),
        (np.array([[-1, 5]], dtype=np.int32), "pixels from -1 to 5, expected 0 to 65535"),
        (np.array([[0, 255]], dtype=np.float32), "pixels from 0 to 255, expected 0 to 1: save it"),
        (np.array([[0, np.nan]], dtype=np.float32), "pixels from nan to nan, expected 0 to 1"),
    ],
)
def test_pixels_of_unknown_range_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        open_image(Image.fromarray(values))
