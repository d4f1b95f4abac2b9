"""Images: which files are opened, and the messages for those that cannot be used."""

import logging
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from kd_d2.data import CheckedMapper, read_image
from kd_d2.image_files import DataError, size_on_disk
from kd_d2.prediction import find_images

import numpy as np
import pytest
import torch
from detectron2.config import get_cfg
from detectron2.data import DatasetMapper
from helpers import ROOT
from PIL import Image, ImageFile, ImageOps

pytestmark = pytest.mark.unit

EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n%%EOF\n"


def _map(path: Path) -> dict:
    mapper = CheckedMapper(DatasetMapper(get_cfg(), is_train=False))
    return mapper({"file_name": str(path), "image_id": 1, "annotations": []})


def _gradient(path: Path) -> np.ndarray:
    pixels = np.stack([np.add.outer(np.arange(64), np.arange(96)).astype(np.uint8)] * 3, axis=-1)
    Image.fromarray(pixels).save(path, quality=95)
    return pixels


@pytest.mark.parametrize("form", ["JPEG", "PNG", "BMP", "WEBP", "TIFF", "GIF", "PPM"])
def test_formats_are_recognized_by_content(tmp_path: Path, form: str) -> None:
    """Check each supported format, in a file with an unrelated suffix."""
    Image.new("RGB", (40, 30), "white").save(tmp_path / "any.dat", form)
    assert (read_image(str(tmp_path / "any.dat"), "BGR") == 255).mean() == 1
    assert _map(tmp_path / "any.dat")["image"].shape == (3, 800, 1067)


@pytest.mark.parametrize("orientation", [3, 6])
@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tif"])
def test_the_exif_orientation_is_applied_once(tmp_path: Path, suffix: str, orientation: int) -> None:
    """Check pixels and size against Pillow's exif_transpose; Pillow itself turns a TIFF image when it loads it."""
    path = tmp_path / f"turned.{suffix}"
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(np.arange(40 * 30 * 3).reshape(30, 40, 3).astype(np.uint8)).save(path, exif=exif)
    with Image.open(path) as image:
        expected = ImageOps.exif_transpose(image).convert("RGB")
    cfg = get_cfg()
    cfg.merge_from_list(["INPUT.FORMAT", "RGB", "INPUT.MIN_SIZE_TEST", 0])
    mapped = CheckedMapper(DatasetMapper(cfg, is_train=False))({"file_name": str(path)})
    assert np.array_equal(read_image(str(path), "RGB"), expected)
    assert np.array_equal(mapped["image"].permute(1, 2, 0), expected)
    assert size_on_disk(str(path)) == expected.size == ((30, 40) if orientation == 6 else (40, 30))


def test_images_of_every_format_are_of_one_type(tmp_path: Path) -> None:
    """Check YUV, which Detectron2 converts to double precision, against the others, of 8 bits."""
    Image.new("RGB", (8, 4), (255, 0, 0)).save(tmp_path / "red.png")
    cfg = get_cfg()
    types = {}
    for name in ("RGB", "LAB", "YUV-BT.601"):
        cfg.merge_from_list(["INPUT.FORMAT", name, "INPUT.MIN_SIZE_TEST", 0])
        image = CheckedMapper(DatasetMapper(cfg, is_train=False))({"file_name": str(tmp_path / "red.png")})["image"]
        types[name] = image.dtype
    assert types == {"RGB": torch.uint8, "LAB": torch.uint8, "YUV-BT.601": torch.float32}
    assert image[0, 0, 0].item() == pytest.approx(0.299, rel=1e-4)


def test_transparency_is_ignored_without_a_warning(tmp_path: Path) -> None:
    """Check a palette of red, transparent, and blue, half transparent, in a process with Python's own filters."""
    image = Image.new("P", (2, 1))
    image.putpalette([255, 0, 0, 0, 0, 255])
    image.putpixel((1, 0), 1)
    image.save(tmp_path / "palette.png", transparency=bytes([0, 128]))
    assert read_image(str(tmp_path / "palette.png"), "RGB").tolist() == [[[255, 0, 0], [0, 0, 255]]]
    code = "import kd_d2; from PIL import Image; Image.open('palette.png').convert('RGB')"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    run = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, check=True)
    assert run.stderr == b""


@pytest.mark.parametrize("read", [_map, lambda path: find_images([str(path)])], ids=["dataset", "predict"])
def test_other_formats_are_never_opened(tmp_path: Path, read: Callable) -> None:
    """Check that PostScript, which Pillow passes to a program, is refused by content; the message lists the formats."""
    (tmp_path / "photo.jpg").write_bytes(EPS)
    assert Image.open(tmp_path / "photo.jpg").format == "EPS"
    with pytest.raises(Exception) as caught:
        read(tmp_path / "photo.jpg")
    assert str(caught.value).removeprefix("--images: ") == (
        f"The image {tmp_path / 'photo.jpg'} cannot be used: its format is none of JPEG, PNG, BMP, WEBP, TIFF, GIF, PPM."
    )


def test_a_truncated_jpeg_is_read_with_one_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Check that the first half matches the original, that there is one warning, and that Pillow's setting is kept."""
    path = tmp_path / "cut.jpg"
    pixels = _gradient(path)
    path.write_bytes(path.read_bytes()[:-200])
    with caplog.at_level(logging.WARNING, "kd_d2"):
        found = [read_image(str(path), "RGB"), read_image(str(path), "RGB")]
        assert _map(path)["image"].shape == (3, 800, 1200)
        assert find_images([str(path)]) == [str(path)]
    assert [record.getMessage() for record in caplog.records] == [
        f"The image {path} is truncated; the missing part is filled with gray."
    ]
    assert np.array_equal(*found)
    assert np.abs(found[0][:32].astype(int) - pixels[:32]).max() < 12
    assert not ImageFile.LOAD_TRUNCATED_IMAGES


def test_other_truncated_images_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "cut.png"
    _gradient(path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(DataError, match=rf"^The image {re.escape(str(path))} cannot be used: .*truncated[^.]*\.$"):
        read_image(str(path), "RGB")


@pytest.mark.parametrize("read", [_map, lambda path: read_image(str(path), "RGB")], ids=["dataset", "array"])
def test_damaged_pngs_are_refused(tmp_path: Path, read: Callable) -> None:
    """Check pixels of noise with a wrong byte in their middle; Detectron2 ignores the error while it reads EXIF data."""
    path = tmp_path / "damaged.png"
    Image.fromarray(np.random.RandomState(0).randint(0, 255, (200, 300, 3), np.uint8)).save(path)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 255
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"^The image \S+damaged\.png cannot be used: "):
        read(path)


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("gone", "The semantic segmentation LABELS cannot be used: No such file or directory."),
        ("cut", "The semantic segmentation LABELS cannot be used: image file is truncated"),
        ("other size", "The semantic segmentation LABELS has 8 x 4 pixels, but its image IMAGE has 96 x 64."),
        ("image", "The image IMAGE cannot be used: its format is none of JPEG, "),
        ("annotations", "The image IMAGE cannot be used: Mismatched image shape"),
        (None, ""),
    ],
)
def test_a_semantic_segmentation_that_cannot_be_used(tmp_path: Path, kind: str | None, expected: str) -> None:
    """Check that the file at fault is named, also beside a JPEG, which is read although it is truncated."""
    image, labels = tmp_path / "image.jpg", tmp_path / "labels.png"
    _gradient(image)
    random = np.random.RandomState(0).randint(0, 9, (64, 96)).astype(np.uint8)
    Image.fromarray(random).save(labels)
    entry = {"file_name": str(image), "sem_seg_file_name": str(labels)}
    if kind == "gone":
        labels.unlink()
    elif kind == "cut":
        labels.write_bytes(labels.read_bytes()[:-1000])
    elif kind in ("other size", "annotations"):
        Image.new("L", (8, 4)).save(labels)
    elif kind == "image":
        image.write_text("no image")
    if kind == "annotations":
        entry |= {"height": 4, "width": 8}
    mapper = CheckedMapper(DatasetMapper(get_cfg(), is_train=False))
    if kind is None:
        assert mapper(entry)["sem_seg"].shape == mapper(entry)["image"].shape[1:]
        return
    with pytest.raises(DataError) as caught:
        mapper(entry)
    assert str(caught.value).startswith(expected.replace("LABELS", str(labels)).replace("IMAGE", str(image)))


def test_images_that_are_too_large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Check Pillow's limit, twice MAX_IMAGE_PIXELS, with MAX_IMAGE_PIXELS set to 1000."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    Image.new("RGB", (50, 41)).save(tmp_path / "large.png")
    with pytest.raises(DataError) as caught:
        _map(tmp_path / "large.png")
    expected = f"The image {tmp_path / 'large.png'} cannot be used: it has more than 2000 pixels; downscale it."
    assert str(caught.value) == expected


@pytest.mark.parametrize(("suffix", "dtype"), [("png", np.uint16), ("tif", np.uint16), ("tif", np.float32)])
def test_images_of_more_than_8_bits(tmp_path: Path, suffix: str, dtype: type) -> None:
    """Check grayscale images, whose values Pillow cuts off at 255: a picture of 12 bits would be nearly white."""
    path = tmp_path / f"deep.{suffix}"
    Image.fromarray(np.arange(4096).reshape(64, 64).astype(dtype)).save(path)
    for read in (_map, lambda path: read_image(str(path), "RGB")):
        with pytest.raises(DataError, match=r"deep\.\w+ cannot be used: .*; convert it to 8 bits\.$"):
            read(path)


@pytest.mark.parametrize("size", [(1, 6000), (6000, 1)])
def test_images_that_are_too_narrow(tmp_path: Path, size: tuple[int, int]) -> None:
    """Check strips whose shorter side of 1333 / 6000 pixels is rounded to 0."""
    Image.new("RGB", size).save(tmp_path / "strip.png")
    with pytest.raises(
        DataError, match="it is so narrow that its shorter side would be less than one pixel after resizing"
    ):
        _map(tmp_path / "strip.png")


def test_entries_without_a_file(tmp_path: Path) -> None:
    """Check that a custom mapper may read from other sources."""
    assert CheckedMapper(lambda entry: entry["number"])({"number": 7}) == 7
