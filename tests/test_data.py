"""Data and evaluation of 02_reflow.py: procedural shapes, image folders of every odd kind, Fréchet distances."""

import hashlib
import http.server
import math
import os
import threading
import time
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import load
from PIL import Image, PngImagePlugin
from scipy.linalg import sqrtm

m = load("02_reflow")


def some_run(data="shapes", **other):
    """A run with only what load_data and choose_features read."""
    config = dict(data=str(data), image_size=16, data_size=50, seed=0, download=False, data_dir="data", fid=True,
                  eval_size=20)
    inputs = {}
    return SimpleNamespace(config=SimpleNamespace(**config | other), rank=0, wait=lambda: None, inputs=inputs,
                           reads=inputs.__setitem__, device=torch.device("cpu"))


def picture(path, colour=(200, 30, 30), mode="RGB", size=(40, 24), **save):
    """Save a picture of one colour and return its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, colour).save(path, **save)
    return path


# ---- Shapes ----------------------------------------------------------------------------------------------------------


def test_shapes_have_the_promised_types_and_depend_on_the_seed_alone():
    state = torch.get_rng_state()
    images, labels = m.shapes(300, 16, seed=3)
    assert images.shape == (300, 3, 16, 16) and images.dtype == torch.uint8
    assert labels.shape == (300,) and labels.dtype == torch.int64
    assert set(labels.tolist()) == set(range(len(m.shape_captions())))
    again = m.shapes(300, 16, seed=3)
    assert torch.equal(images, again[0]) and torch.equal(labels, again[1])
    assert not torch.equal(images, m.shapes(300, 16, seed=4)[0])
    assert torch.equal(state, torch.get_rng_state())        # the global generator is left alone


def test_shape_i_does_not_depend_on_n():
    many, few = m.shapes(2500, 16), m.shapes(1030, 16)      # three chunks, two chunks
    assert torch.equal(many[0][:1030], few[0]) and torch.equal(many[1][:1030], few[1])
    assert torch.equal(many[0][:7], m.shapes(7, 16)[0])
    assert m.shapes(0, 16)[0].shape == (0, 3, 16, 16)


def test_every_caption_is_one_colour_shape_and_background():
    captions = m.shape_captions()
    assert len(captions) == len(set(captions)) == len(m.SHAPES) * len(m.COLOURS) * len(m.BACKGROUNDS) == 32
    assert captions[0] == "a red circle on a white background"
    assert captions[31] == "a yellow cross on a black background"


@pytest.fixture
def flat(monkeypatch):
    """shapes() without light and grain."""
    def flat(*arguments):
        with monkeypatch.context() as patch:
            patch.setattr(m, "pair_noise", lambda seed, index, shape: torch.zeros(len(index), *shape))
            return m.shapes(*arguments)
    return flat


FILLED = dict(circle=math.pi / 4, square=1, triangle=1 / 2, cross=1 - 0.65**2)      # share of the square around a shape


@pytest.mark.parametrize("size", [8, 16, 32, 64])
def test_captions_match_the_pixels(size, flat):
    """The colour named is at the shape's centre of mass; the frame is background; the area is that of the shape."""
    images, labels = flat(400, size, 1)
    frame = torch.ones(size, size, dtype=torch.bool)
    frame[1:-1, 1:-1] = False
    for image, label in zip(images, labels):
        _, colour, shape, _, _, background, _ = m.shape_captions()[label].split()
        ground = torch.tensor(m.BACKGROUNDS[background], dtype=torch.uint8)
        assert (image[:, frame] == ground[:, None]).all()               # the shape is wholly inside
        row, column = (image != ground[:, None, None]).any(0).nonzero().double().mean(0).round().long()
        if size > 8:                                                    # there the arms of a cross are a blend
            assert image[:, row, column].tolist() == list(m.COLOURS[colour])
        if size == 64:
            change = (image.double() - ground[:, None, None]).abs().sum(0)
            cover = change / change.max()
            share = cover.sum() / cover.sum(1).max() ** 2
            assert shape == min(FILLED, key=lambda name: abs(share - FILLED[name]))
        assert tuple(m.COLOURS[colour]) != tuple(m.BACKGROUNDS[background])


@pytest.mark.parametrize("size", [16, 32])
def test_light_and_grain_are_all_that_differs_from_flat_pictures(size, flat):
    """Each picture has a linear light of sigma 0.12 in both directions, equal in all colours, and grain of 0.04."""
    lit, plain = m.shapes(2000, size, 2), flat(2000, size, 2)
    assert torch.equal(lit[1], plain[1])
    ramp = torch.linspace(-1, 1, size, dtype=torch.float64)
    basis = torch.stack([torch.ones(size, size), ramp.expand(size, size), ramp[:, None].expand(size, size)], -1)
    middle = slice(size // 4, -size // 4)                   # less light there: hardly a pixel is out of range
    change = (m.to_floats(lit[0]) - m.to_floats(plain[0])).double()[:, :, middle, middle].flatten(2)
    basis = basis[middle, middle].reshape(-1, 3).double()
    fit = torch.linalg.lstsq(basis, change.mean(1).T).solution.T                    # (2000, 3): constant, across, down
    assert fit[:, 0].abs().max() < 0.04 and fit[:, 1:].mean(0).abs().max() < 5 * 0.12 / 2000**0.5
    assert fit[:, 1:].std(0).sub(0.12).abs().max() < 5 * 0.12 / 4000**0.5
    assert torch.corrcoef(fit[:, 1:].T)[0, 1].abs() < 5 / 2000**0.5
    grain = change - (fit @ basis.T)[:, None]
    assert grain.std() == pytest.approx(0.04, rel=0.03)
    assert torch.corrcoef(grain.transpose(0, 1).flatten(1)).fill_diagonal_(0).abs().max() < 0.05    # of three colours
    assert abs(torch.corrcoef(torch.stack([grain[1:].flatten(), grain[:-1].flatten()]))[0, 1]) < 0.05


def test_shapes_cover_the_area_that_geometry_says():
    """Anti-aliasing by signed distance conserves area: sum of coverage against the exact area, in square pixels."""
    pixel = torch.arange(64) + 0.5 - 32.3
    x, y = pixel[None, :], pixel[:, None]
    r = torch.tensor(20.0)
    areas = (0.5 - m.shape_distances(x, y, r)).clamp(0, 1).sum((1, 2))
    arm = 0.35 * 20
    exact = torch.tensor([math.pi * 400, 4 * 18**2, 40 * 40 / 2, 4 * (2 * 20 * arm - arm**2)])
    assert torch.allclose(areas, exact, rtol=0.02)


def test_all_combinations_occur_equally_often():
    counts = m.shapes(12000, 16)[1].bincount()
    kinds = len(m.shape_captions())
    assert len(counts) == kinds and (counts - 12000 / kinds).abs().max() < 5 * (12000 / kinds) ** 0.5


def test_load_data_gives_the_shapes_of_the_seed():
    images, labels, names = m.load_data(some_run("shapes", seed=5))
    expected = m.shapes(50, 16, 5)
    assert torch.equal(images, expected[0]) and torch.equal(labels, expected[1]) and names == m.shape_captions()


# ---- Reading labels off pictures -------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [16, 32, 64])
def test_true_pictures_are_read_without_a_mistake(size):
    images, labels = m.shapes(300, size, 5)
    assert torch.equal(m.read_labels(m.to_floats(images)), labels)


def test_a_picture_is_read_alike_in_any_batch():
    images = m.to_floats(m.shapes(40, 16, 6)[0])
    whole = m.read_labels(images)
    assert torch.equal(whole, torch.cat([m.read_labels(batch) for batch in images.split(7)]))
    assert whole.dtype == torch.int64 and whole.shape == (40,)


def noise_of(*shape):
    """Standard normal numbers, the same each time."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


NO_SHAPES = {
    "noise": lambda images: noise_of(*images.shape).clamp(-1, 1),
    "white": torch.ones_like,
    "black": lambda images: -torch.ones_like(images),
    "grey": torch.zeros_like,
    "colours": lambda images: noise_of(len(images), 3, 1, 1).clamp(-1, 1).expand_as(images),
    "light": lambda images: 0.8 + 0.3 * torch.linspace(-1, 1, 16).expand_as(images),
}


@pytest.mark.parametrize("how", NO_SHAPES)
def test_noise_and_flat_pictures_show_nothing(how):
    assert (m.read_labels(NO_SHAPES[how](m.to_floats(m.shapes(100, 16, 7)[0]))) == -1).all()


def test_a_blur_of_two_shapes_is_none():
    """The mean of pictures of other colours: none if the backgrounds differ; on one, hardly ever one of the two.

    Means of one colour on one background are left out: where one shape covers the other, they look like a soft shape.
    """
    images, labels = m.shapes(1200, 16, 7)
    one, two = m.to_floats(images).chunk(2)
    (a, b), read = labels.chunk(2), m.read_labels((one + two) / 2)
    colour, ground = a // 8 != b // 8, a % 2 != b % 2
    assert ground.sum() > 200 and (read[ground] == -1).all()
    here = colour & (a // 2 % 4 != b // 2 % 4) & ~ground
    assert here.sum() > 120 and (read[here] == -1).double().mean() > 0.9
    assert ((read == -1) | (read == a) | (read == b))[colour].all()


def test_a_blurred_picture_is_none():
    images = m.to_floats(m.shapes(100, 16, 7)[0])
    blurred = F.avg_pool2d(F.pad(images, (4, 4, 4, 4), mode="replicate"), 9, 1)
    assert (m.read_labels(blurred) == -1).double().mean() > 0.95


def test_a_little_noise_is_forgiven_and_much_is_not():
    images, labels = m.shapes(200, 16, 8)
    images = m.to_floats(images)
    noise = noise_of(*images.shape)
    assert (m.read_labels((images + 0.1 * noise).clamp(-1, 1)) == labels).double().mean() > 0.95
    assert (m.read_labels(images + 0.7 * noise) == -1).double().mean() > 0.95


@pytest.mark.parametrize("size", [16, 64])
@pytest.mark.parametrize("across, down", [(0.5, 0), (0, -0.5), (-0.4, 0.4)])
def test_light_is_subtracted(size, across, down):
    """A light as strong as four sigmas of the pictures' own does not matter; a light outside the range may."""
    images, labels = m.shapes(200, size, 9)
    ramp = torch.linspace(-1, 1, size)
    light = across * ramp + down * ramp[:, None]
    assert torch.equal(m.read_labels(m.to_floats(images) + light), labels)


ANOTHER = {"circle": "square", "square": "triangle", "triangle": "cross", "cross": "circle", "white": "black",
           "black": "white", "red": "blue", "blue": "yellow", "yellow": "green", "green": "red"}


def asked_for(n, size=16):
    """Pictures in [-1, 1], the i-th of label i mod 32."""
    images, labels = m.shapes(60 * n // 32 + 1000, size, 10)
    number = [(labels == label).nonzero()[:, 0] for label in range(32)]
    return m.to_floats(images[[number[i % 32][i // 32] for i in range(n)]])


@pytest.mark.parametrize("n", [32, 1010])
def test_accuracy_is_the_share_of_pictures_that_show_what_was_asked_for(n):
    images = asked_for(n)                                   # 1010: batches of 500, 500 and 10
    assert m.accuracy(images) == 1
    half = images.clone()
    half[::2] = images[1::2]                                # of the label that follows
    assert m.accuracy(half) == 0.5
    half[::2] = 0                                           # no shape
    assert m.accuracy(half) == 0.5
    half[5:] = 0
    assert m.accuracy(half) == 2 / n                        # numbers 1 and 3


@pytest.mark.parametrize("word", [1, 2, 5])
def test_another_colour_shape_or_background_is_wrong(word):
    captions = m.shape_captions()
    wrong = [" ".join(ANOTHER[w] if i == word else w for i, w in enumerate(caption.split())) for caption in captions]
    assert m.accuracy(asked_for(32)[[captions.index(caption) for caption in wrong]]) == 0


# ---- Image folders ---------------------------------------------------------------------------------------------------


def read(folder, size=16):
    """load_data of a folder, with every type checked."""
    images, labels, names = m.load_data(some_run(folder, image_size=size))
    assert images.dtype == torch.uint8 and images.shape == (len(labels), 3, size, size) and images.is_contiguous()
    assert labels.dtype == torch.int64 and names == sorted(names) and set(labels.tolist()) == set(range(len(names)))
    return images, labels, names


def decoded(path, size):
    """m.decode as whole numbers, with its type checked."""
    image = m.decode(path, size)
    assert image.dtype == torch.uint8 and image.shape == (3, size, size)
    return image.int().numpy()


def ramp16(path):
    """16-bit grey picture: left half a quarter of full scale, right half full scale."""
    array = np.full((16, 16), 65535, np.uint16)
    array[:, :8] = 64 * 257
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)
    return path


def test_colour_modes_arrive_as_rgb(tmp_path):
    red = (200, 30, 30)
    palette = Image.new("RGB", (20, 20), red).quantize(4)
    cases = {
        "plain": (picture(tmp_path / "plain.png", red), red),
        "bmp": (picture(tmp_path / "plain.bmp", red), red),
        "webp": (picture(tmp_path / "plain.webp", red, lossless=True), red),
        "grey": (picture(tmp_path / "grey.png", 77, "L"), (77, 77, 77)),
        "bilevel": (picture(tmp_path / "bilevel.png", 1, "1"), (255, 255, 255)),
        "cmyk": (picture(tmp_path / "cmyk.jpg", (0, 255, 255, 0), "CMYK"), (255, 0, 0)),
        "clear": (picture(tmp_path / "clear.png", (*red, 0), "RGBA"), (255, 255, 255)),
        "half": (picture(tmp_path / "half.png", (0, 0, 0, 128), "RGBA"), (127, 127, 127)),
        "grey alpha": (picture(tmp_path / "la.png", (0, 0), "LA"), (255, 255, 255)),
        "one pixel": (picture(tmp_path / "tiny.png", red, size=(1, 1)), red),
        "sliver": (picture(tmp_path / "sliver.png", red, size=(1, 500)), red),
    }
    palette.save(tmp_path / "palette.png")
    cases["palette"] = (tmp_path / "palette.png", red)
    palette.save(tmp_path / "holes.gif", transparency=palette.getpixel((0, 0)))
    cases["transparent palette"] = (tmp_path / "holes.gif", (255, 255, 255))
    for name, (path, colour) in cases.items():
        assert abs(decoded(path, 8) - np.reshape(colour, (3, 1, 1))).max() <= 2, name


def test_sixteen_bit_grey_keeps_its_range(tmp_path):
    for suffix in ("png", "tiff"):
        image = decoded(ramp16(tmp_path / f"deep.{suffix}"), 16)
        assert (image[:, :, :8] == 64).all() and (image[:, :, 8:] == 255).all()


RAMP = np.tile(np.linspace(0, 1, 64), (64, 1))
DEEP = {        # numbers a picture may hold, and the white that they are meant against; None: nobody knows
    "0..1 floats": (RAMP.astype(np.float32), 1), "dark floats": ((RAMP / 4).astype(np.float32), 1),
    "0..255 floats": ((RAMP * 255).astype(np.float32), 255), "whole numbers": ((RAMP * 255).astype(np.int32), 255),
    "large numbers": ((RAMP * 65535).astype(np.int32), 65535), "mask": ((RAMP > 0.5).astype(np.int32), 1),
    "dark 16 bits": ((RAMP * 200).astype(np.uint16), 65535), "negative": ((RAMP - 0.5).astype(np.float32), None),
    "nan": (np.full((64, 64), np.nan, np.float32), None), "very large": ((RAMP * 2**30).astype(np.int32), None),
    "radiance": ((RAMP * 3.7).astype(np.float32), None), "labels": ((RAMP * 20).astype(np.int32), None),
}


@pytest.mark.parametrize("kind", DEEP)
def test_deep_pictures_keep_their_brightness_or_are_skipped(tmp_path, kind):
    numbers, white = DEEP[kind]
    Image.fromarray(numbers).save(tmp_path / "deep.tiff")
    if white is None:
        assert m.decode(tmp_path / "deep.tiff", 64) is None
    else:
        assert abs(decoded(tmp_path / "deep.tiff", 64) - numbers / white * 255).max() <= 1


def test_the_16_bits_of_pgm_are_16_bits_though_dark(tmp_path):
    (tmp_path / "dark.pgm").write_bytes(b"P5 64 64 65535\n" + (RAMP * 20000).astype(">u2").tobytes())
    assert abs(decoded(tmp_path / "dark.pgm", 64) - RAMP * 20000 / 257).max() <= 1


def test_exif_orientation_is_obeyed(tmp_path):
    array = np.zeros((16, 16, 3), np.uint8)
    array[:8] = 255                                         # stored: white on top
    exif = Image.Exif()
    exif[0x0112] = 6                                        # to be shown turned by 90 degrees clockwise
    Image.fromarray(array).save(tmp_path / "turned.jpg", exif=exif, quality=100)
    image = decoded(tmp_path / "turned.jpg", 16)
    assert image[:, :, 9:].min() > 200 and image[:, :, :7].max() < 50       # shown: white on the right


def test_short_side_is_resized_and_the_centre_kept(tmp_path):
    array = np.zeros((20, 60, 3), np.uint8)
    array[:, 20:40, 1] = 255                                # the central square is green
    Image.fromarray(array).save(tmp_path / "wide.png")
    image = decoded(tmp_path / "wide.png", 10)
    assert (image[1, :, 1:-1] == 255).all() and (image[1] > 230).all() and (image[[0, 2]] == 0).all()
    same = np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8)
    Image.fromarray(same).save(tmp_path / "same.png")       # nothing to resize: not a bit changes
    assert (decoded(tmp_path / "same.png", 16) == same.transpose(2, 0, 1)).all()


def test_shrinking_averages_fine_detail(tmp_path):
    Image.fromarray(np.indices((256, 256)).sum(0).astype(np.uint8) % 2 * 255).save(tmp_path / "checks.png")
    assert abs(decoded(tmp_path / "checks.png", 16) - 127).max() < 8
    Image.open(tmp_path / "checks.png").resize((2048, 2048)).convert("RGB").save(tmp_path / "large.jpg")
    assert abs(decoded(tmp_path / "large.jpg", 16) - 127).max() < 20      # through the JPEG decoder's own shrinking


@pytest.fixture
def messy(tmp_path):
    """Two classes with good files, nested ones, odd names, and everything that is no image. Returns the folder."""
    folder = tmp_path / "my photos"
    for i in range(3):
        picture(folder / "zebra" / f"{i}.png", (10 * i, 0, 0))
    picture(folder / "äpfel 🍎" / "deep" / "er" / "grün.jpg", (0, 250, 0))
    good = picture(folder / "äpfel 🍎" / "noise.jpg")
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (90, 90, 3), np.uint8)).save(good)
    (folder / "zebra" / "cut.jpg").write_bytes(good.read_bytes()[:3000])
    (folder / "zebra" / "text.jpg").write_text("this is no photograph")
    (folder / "zebra" / "empty.png").touch()
    (folder / "zebra" / "notes.txt").write_text("hello")
    (folder / "zebra" / "gone.png").symlink_to(folder / "nowhere.png")
    picture(folder / ".thumbnails" / "x.png")
    (folder / "empty class").mkdir()
    picture(folder / "beside.png")
    return folder


def test_a_messy_folder_loads_what_it_can_and_names_the_rest(messy, capsys):
    images, labels, names = read(messy)
    assert names == ["zebra", "äpfel 🍎"] and sorted(labels.tolist()) == [0, 0, 0, 1, 1]
    assert sorted(images[labels == 0][:, 0, 0, 0].tolist()) == [0, 10, 20]
    (green,) = (i for i in range(5) if labels[i] == 1 and images[i, 1].float().mean() > 240)
    assert images[green, 0].float().mean() < 10                         # the one that lies deep
    out, err = capsys.readouterr()
    assert not err and out.count("\n") == 1 and "read 5 pictures; 2 classes: zebra 3, äpfel 🍎 2; skipped 6: " in out
    assert all(name in out for name in ("cut.jpg", "text.jpg", "empty.png", "notes.txt", "gone.png", "beside.png"))
    again = read(messy)
    assert torch.equal(images, again[0]) and torch.equal(labels, again[1]) and names == again[2]


def test_only_one_process_names_what_is_skipped(messy, capsys):
    run = some_run(messy)
    run.rank = 1
    assert len(m.load_data(run)[0]) == 5 and capsys.readouterr() == ("", "")


def test_a_class_without_a_readable_image_is_none(tmp_path):
    """Else reflow would make pairs of a class that no picture has taught."""
    for name in ("a", "c"):
        picture(tmp_path / "data" / name / "1.png")
    (tmp_path / "data" / "b").mkdir()
    (tmp_path / "data" / "b" / "1.png").write_text("broken")
    _, labels, names = read(tmp_path / "data")
    assert names == ["a", "c"] and labels.tolist() == [0, 1]


def test_of_a_clean_folder_nothing_was_skipped(tmp_path, capsys):
    for i in range(12):
        picture(tmp_path / "data" / f"class{i:02d}" / "1.png")
    read(tmp_path / "data")
    numbers = ", ".join(f"class{i:02d} 1" for i in range(9))
    assert capsys.readouterr() == (f"{tmp_path / 'data'}: read 12 pictures; 12 classes: {numbers}, ...\n", "")


@pytest.mark.parametrize("other", ["test", "val"])
@pytest.mark.parametrize("sub", ["cat", "dog/deep"])
def test_of_train_and_test_above_the_classes_train_is_read(tmp_path, capsys, other, sub):
    for split, colour in (("train", 10), (other, 250)):
        picture(tmp_path / split / "cat" / "1.png", (colour, 0, 0))
        picture(tmp_path / split / sub / "2.png", (colour, 0, 0))
    images, _, names = read(tmp_path)
    assert names == sorted({"cat", sub.split("/")[0]}) and (images[:, 0] == 10).all() and len(images) == 2
    assert f"skipped 1: {other}/\n" in capsys.readouterr().out


def test_train_beside_another_class_is_a_class(tmp_path):
    for name in ("train", "bus"):
        picture(tmp_path / name / "1.png")
    assert read(tmp_path)[2] == ["bus", "train"]


def test_the_list_of_pictures_is_noted_by_names_and_sizes(tmp_path):
    """A renamed class, another file or size changes it; another place or a note beside the pictures does not."""
    def noted(folder):
        run = some_run(folder)
        m.load_data(run)
        return run.inputs["pictures"]
    for name in ("a/1.png", "b/2.png"):
        picture(tmp_path / "one" / name)
    first = noted(tmp_path / "one")
    (tmp_path / "one" / "a" / "notes.txt").write_text("hello")
    (tmp_path / "one").rename(tmp_path / "moved")
    assert noted(tmp_path / "moved") == first
    for change in (lambda folder: (folder / "b").rename(folder / "c"), lambda folder: picture(folder / "a" / "3.png"),
                   lambda folder: picture(folder / "a" / "1.png", size=(300, 300))):
        change(tmp_path / "moved")
        assert noted(tmp_path / "moved") != first
        first = noted(tmp_path / "moved")


def test_images_without_sub_folders_are_one_class(tmp_path, monkeypatch):
    for i in range(3):
        picture(tmp_path / "flat" / f"{i}.png")
    picture(tmp_path / "beside" / "other.png")
    images, labels, names = read(tmp_path / "flat")
    assert len(images) == 3 and names == ["flat"]
    monkeypatch.chdir(tmp_path / "flat")
    assert read(".")[2] == ["flat"]                         # `.` has no name of its own


def test_links_to_a_folder_and_a_file_are_followed(tmp_path):
    for i in range(2):
        picture(tmp_path / "elsewhere" / f"{i}.png")
    picture(tmp_path / "data" / "b" / "0.png")
    (tmp_path / "data" / "a").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "data" / "b" / "1.png").symlink_to(tmp_path / "elsewhere" / "0.png")
    assert read(tmp_path / "data")[1].tolist() == [0, 0, 1, 1]


def test_a_pipe_is_not_waited_for(tmp_path):
    for i in range(2):
        picture(tmp_path / "data" / "a" / f"{i}.png")
    os.mkfifo(tmp_path / "data" / "a" / "pipe.png")
    (tmp_path / "data" / "a" / "round").symlink_to(tmp_path / "data")       # nor is this circle run forever
    assert len(read(tmp_path / "data")[0]) == 2


def test_names_that_are_not_unicode(tmp_path):
    folder = tmp_path / "data" / "a"
    for i in range(2):
        picture(folder / f"{i}.png")
    try:
        os.rename(folder / "1.png", os.fsencode(folder) + b"/caf\xe9.png")
        os.rename(folder, os.fsencode(tmp_path / "data") + b"/caf\xe9")
    except OSError:
        pytest.skip("this file system takes unicode names only")
    images, _, names = read(tmp_path / "data")
    assert len(images) == 2 and names == ["caf\ufffd"]


def test_pillows_guard_against_bombs_is_obeyed(tmp_path, monkeypatch, capsys):
    for name, side in (("a", 10), ("b", 10), ("bomb", 100)):
        picture(tmp_path / "data" / "a" / f"{name}.png", size=(side, side))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)    # an error is raised at twice this
    assert len(read(tmp_path / "data")[0]) == 2
    assert "bomb.png" in capsys.readouterr().out


def test_a_text_chunk_that_explodes_is_skipped(tmp_path):
    info = PngImagePlugin.PngInfo()
    info.add_text("comment", "x" * 70_000_000, zip=True)    # Pillow refuses texts above its limit when reading
    picture(tmp_path / "chunk.png", size=(2, 2), pnginfo=info)
    assert m.decode(tmp_path / "chunk.png", 8) is None


@pytest.mark.parametrize("make, words", [
    (lambda folder: None, "No such file or directory"),
    (lambda folder: folder.write_text("a file"), "Not a directory"),
    (lambda folder: folder.mkdir(), "0 readable images"),
    (lambda folder: (folder / "a").mkdir(parents=True), "0 readable images"),
    (lambda folder: [folder.mkdir(), (folder / "a").mkdir(), (folder / "a" / "x.jpg").touch()], "0 readable images"),
    (lambda folder: picture(folder / "a" / "x.png"), "1 readable image"),
], ids=["missing", "a file", "empty", "empty class", "no image", "one image"])
def test_a_bad_folder_is_one_line(tmp_path, make, words):
    make(tmp_path / "data")
    with pytest.raises((m.UserError, OSError), match=words) as error:
        read(tmp_path / "data")
    assert str(tmp_path / "data") in str(error.value) and "\n" not in str(error.value)


def test_two_thousand_photographs_are_read_in_seconds(tmp_path):
    """50,000 take at most a minute on two cores, that is 1.2 ms each; here with room for a busy machine."""
    folder = tmp_path / "data" / "a"
    picture(folder / "0.jpg", size=(32, 32))
    for i in range(1, 2000):
        os.link(folder / "0.jpg", folder / f"{i}.jpg")
    start = time.perf_counter()
    assert len(read(tmp_path / "data", 32)[0]) == 2000
    assert time.perf_counter() - start < 8


# ---- Pictures of chapter 5 -------------------------------------------------------------------------------------------


def test_chapter_5_reads_the_same_files(tmp_path, capsys):
    """Without an ending, transparent, in linked folders; what it cannot read it names."""
    chapter = load("05_text_to_image")
    picture(tmp_path / "real" / "1.png", (0, 0, 0, 0), "RGBA")
    picture(tmp_path / "real" / "deep" / "2.png", (0, 0, 0)).rename(tmp_path / "real" / "deep" / "2")
    picture(tmp_path / "elsewhere" / "3.jpg", (0, 0, 0))
    (tmp_path / "real" / "link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "real" / "broken.png").write_text("hello")
    rows = chapter.real_features(lambda images: images.mean((2, 3)), str(tmp_path / "real"), torch.device("cpu"))
    assert torch.equal(rows, torch.tensor([1.0, -1, -1])[:, None].expand(3, 3))
    out = capsys.readouterr().out
    assert "read 3 pictures; skipped 1: " in out and "broken.png" in out


def test_chapter_5_needs_no_place_to_write_where_it_is_started(tmp_path, monkeypatch):
    """What it downloads then goes where PyTorch keeps the like."""
    chapter = load("05_text_to_image")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(chapter, "download", lambda url, path, *optional: chapter.save_json(path, {}) or True)
    for writable, folder in ((False, "home/hub"), (True, "runs/cache")):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(chapter.os, "access", lambda path, mode: writable)
        path = chapter.fetch("owner/name", "unet/config.json")
        assert path.resolve() == tmp_path / folder / "owner--name" / "unet" / "config.json"


@pytest.mark.parametrize("flags, side", [([], 16), (["--preset", "gpu"], 64), (["--image-size", "32"], 32),
                                         (["--model", "model"], 24), (["--model", "model", "--image-size", "16"], 16)])
def test_chapter_5_draws_in_the_models_own_size(tmp_path, monkeypatch, flags, side):
    """Unless told otherwise; a tiny model has latents of 8 x 8."""
    chapter = load("05_text_to_image")
    config = chapter.parse_config(chapter.Config, [*flags, "--prompts", "prompts.txt", "--device", "cpu", "--no-compile",
                                                   "--lpips-net", "squeeze", "--lpips-weights", "random"])
    monkeypatch.chdir(tmp_path)
    (tmp_path / "prompts.txt").write_text("a cat\na $ dog\n")
    files = chapter.write_vocabulary(["a cat"], tmp_path)
    tokenizer = chapter.CLIPTokenizer(*files)
    configs = chapter.tiny_configs(chapter.Config(image_size=24), tokenizer.vocab)
    parts = {name: chapter.from_config(network, configs[name]) for name, network in chapter.NETWORKS.items()}
    chapter.save_pipeline(SimpleNamespace(folder=tmp_path, rank=0), "model",
                          chapter.Pipeline(tokenizer, **parts, configs=configs))
    seen = []
    monkeypatch.setattr(chapter, "students", lambda run, prompts, *rest: seen.append((run, prompts)))
    monkeypatch.setattr(chapter, "report", lambda *arguments: None)
    monkeypatch.setattr(chapter, "tiny_teacher", lambda run: chapter.Pipeline(tokenizer, **parts, configs=configs))
    chapter.main(config)
    (run, prompts), = seen
    assert config.image_size == side and prompts.pipe.shape == (4, side // 2, side // 2)       # the VAE halves once
    assert set(run.inputs) == ({"texts", "model_weights"} if config.model else {"texts"})


# ---- CIFAR-10 --------------------------------------------------------------------------------------------------------


def test_cifar10_is_not_downloaded_unasked(tmp_path):
    with pytest.raises(m.UserError, match="--download") as error:
        m.load_data(some_run("cifar10", data_dir=str(tmp_path / "nowhere")))
    assert str(tmp_path / "nowhere") in str(error.value)


def test_a_failing_cifar10_download_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(m.torchvision.datasets.CIFAR10, "url", "http://127.0.0.1:9/cifar.tar.gz")  # nobody listens
    with pytest.raises((m.UserError, OSError)) as error:
        m.load_data(some_run("cifar10", data_dir=str(tmp_path), download=True))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("download, rank, here, asked", [
    (True, 0, False, ["download", "wait", "read"]), (True, 1, False, ["wait", "read"]),
    (False, 0, False, ["wait", "read"]), (True, 0, True, ["wait", "read"])])
def test_one_process_fetches_cifar10_before_the_others_look(tmp_path, monkeypatch, download, rank, here, asked):
    """Into a folder of its own; it is moved to its place whole, and one that is there already stays."""
    place, calls = tmp_path / "cifar-10-batches-py", []
    fake = SimpleNamespace(data=np.zeros((4, 32, 32, 3), np.uint8), targets=[0, 1, 1, 0], classes=["a", "b"])

    def cifar(folder, download=False):
        calls.append("download" if download else "read")
        assert (folder == tmp_path) != download
        if download:
            assert (folder / "c.tar.gz").exists()           # an archive put there by hand is not fetched again
            (folder / place.name).mkdir()
            (folder / place.name / "mine").touch()
        return fake
    cifar.filename = "c.tar.gz"
    (tmp_path / cifar.filename).touch()
    if here:
        place.mkdir()
    monkeypatch.setattr(m.torchvision.datasets, "CIFAR10", cifar)
    run = some_run("cifar10", download=download, data_dir=str(tmp_path))
    run.rank, run.wait = rank, lambda: calls.append("wait")
    m.load_data(run)
    assert calls == asked and (place / "mine").exists() == ("download" in asked)


@pytest.mark.parametrize("size", [32, 16])
def test_cifar10_arrays_become_tensors(monkeypatch, size):
    data = np.random.default_rng(0).integers(0, 256, (6, 32, 32, 3), np.uint8)
    fake = SimpleNamespace(data=data, targets=[3, 1, 2, 0, 1, 1], classes=list("abcd"))
    monkeypatch.setattr(m.torchvision.datasets, "CIFAR10", lambda folder: fake)
    images, labels, names = m.load_data(some_run("cifar10", image_size=size))
    assert images.dtype == torch.uint8 and images.shape == (6, 3, size, size) and images.is_contiguous()
    assert labels.tolist() == fake.targets and labels.dtype == torch.int64 and names == fake.classes
    if size == 32:
        assert (images.permute(0, 2, 3, 1).numpy() == data).all()
    else:       # resizing keeps the mean and, with anti-aliasing, loses variance
        assert abs(images.float().mean() - data.mean()) < 2 and images.float().std() < 0.7 * data.std()


# ---- Fréchet distance ------------------------------------------------------------------------------------------------


def gaussian(n, mean, root, seed=0):
    """n draws of N(mean, root rootᵀ) whose sample mean and covariance are exactly that."""
    x = torch.randn(n, len(mean), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    x = x - x.mean(0)
    whiten = torch.linalg.inv(torch.linalg.cholesky(torch.cov(x.T)))
    return torch.as_tensor(mean, dtype=torch.float64) + x @ whiten.T @ torch.as_tensor(root, dtype=torch.float64).T


def test_frechet_distance_of_gaussians_in_closed_form():
    eye = torch.eye(3).double()
    a = gaussian(500, [0, 0, 0], eye)
    assert m.frechet_distance(a, gaussian(700, [1, -2, 2], eye, 1)) == pytest.approx(9, abs=1e-9)   # |difference|²
    scales = torch.tensor([1.0, 3.0, 0.5]).double()         # commuting: sum of (σa - σb)²
    assert m.frechet_distance(a, gaussian(500, [0, 0, 0], scales.diag(), 2)) == pytest.approx(4.25, abs=1e-9)
    turn = torch.linalg.qr(torch.randn(3, 3, generator=torch.Generator().manual_seed(5)).double())[0]
    turned = gaussian(500, [0, 1, 0], turn @ scales.diag() @ turn.T, 3)
    assert m.frechet_distance(a, turned) == pytest.approx(5.25, abs=1e-9)


@pytest.mark.parametrize("seed", range(4))
def test_frechet_distance_agrees_with_scipy(seed):
    generator = np.random.default_rng(seed)
    a, b = generator.normal(size=(200, 12)) @ generator.normal(size=(12, 12)), generator.normal(size=(90, 12)) + 0.3
    covariances = np.cov(a.T), np.cov(b.T)
    expected = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(sum(covariances))
    expected -= 2 * np.trace(sqrtm(covariances[0] @ covariances[1])).real
    assert m.frechet_distance(torch.tensor(a), torch.tensor(b)) == pytest.approx(expected, rel=1e-9)


def test_frechet_distance_invariances():
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(300, 8, generator=generator), 1.5 * torch.randn(200, 8, generator=generator) + 0.2
    turn = torch.linalg.qr(torch.randn(8, 8, generator=generator))[0]
    distance = m.frechet_distance(a, b)
    assert isinstance(distance, float) and distance > 0
    assert m.frechet_distance(a, a) == pytest.approx(0, abs=1e-9)
    assert m.frechet_distance(b, a) == pytest.approx(distance, rel=1e-9)
    assert m.frechet_distance(a[torch.randperm(300, generator=generator)], b) == pytest.approx(distance, rel=1e-6)
    assert m.frechet_distance(a @ turn + 5, b @ turn + 5) == pytest.approx(distance, rel=1e-4)     # float32 input
    assert m.frechet_distance(3 * a, 3 * b) == pytest.approx(9 * distance, rel=1e-5)


def test_frechet_distance_of_singular_covariances():
    """Fewer samples than features, and constant features: where (cov_a cov_b)^½ by sqrtm turns complex or nan."""
    a = torch.randn(20, 64, generator=torch.Generator().manual_seed(0))
    assert m.frechet_distance(a, a) == pytest.approx(0, abs=1e-6)
    assert m.frechet_distance(torch.zeros(5, 64), torch.ones(5, 64)) == pytest.approx(64)
    assert m.frechet_distance(a, a + 1) == pytest.approx(64, rel=1e-6)
    assert m.frechet_distance(a, a * float("nan")) == math.inf


def test_moments_are_mean_and_covariance():
    x = torch.randn(50, 6, generator=torch.Generator().manual_seed(0))
    mean, cov = m.moments(x)
    assert mean.dtype == cov.dtype == torch.float64
    assert torch.allclose(mean, x.double().mean(0)) and torch.allclose(cov, torch.cov(x.double().T))


# ---- Features --------------------------------------------------------------------------------------------------------


def test_random_features_are_the_same_whatever_was_drawn_before():
    images = m.shapes(5, 16)[0] / 127.5 - 1
    torch.manual_seed(1)
    first = m.RandomFeatures()(images)
    torch.manual_seed(2)
    state = torch.get_rng_state()
    assert torch.equal(first, m.RandomFeatures()(images)) and torch.equal(state, torch.get_rng_state())
    assert first.shape == (5, 96) and not list(m.RandomFeatures().parameters())
    assert torch.allclose(first[3:4], m.RandomFeatures()(images[3:4]), atol=1e-6)       # no image sees another
    copied = m.RandomFeatures(seed=9)
    copied.load_state_dict(m.RandomFeatures().state_dict())
    assert torch.equal(first, copied(images))


@pytest.mark.parametrize("size", [4, 8, 16, 32, 64, 128])
def test_random_features_take_any_power_of_two(size):
    images = torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(0)) * 2 - 1
    features = m.RandomFeatures()(images)
    assert features.shape == (2, 96) and features.isfinite().all()


def test_random_feature_distance_orders_what_the_eye_orders():
    images = m.shapes(3000, 16)[0] / 127.5 - 1
    train, other = images[:1500], images[1500:]
    blur = torch.nn.functional.avg_pool2d(torch.nn.functional.pad(other, (1, 1, 1, 1), mode="replicate"), 3, 1)
    noisy = (other + 0.5 * torch.randn(other.shape, generator=torch.Generator().manual_seed(0))).clamp(-1, 1)
    grey = train.mean(0).expand_as(other)
    extract = m.RandomFeatures()
    same, blurred, noise, mean = (m.frechet_distance(extract(train), extract(x)) for x in (other, blur, noisy, grey))
    assert 5 * same < blurred < noise < mean, (same, blurred, noise, mean)


class FakeInception(torch.nn.Module):
    """Called as the real file is; tells which bytes it was given."""

    def forward(self, images, return_features: bool = False):
        if images.dtype != torch.uint8:
            raise TypeError("bytes wanted")
        features = images.flatten(1).double()
        return features if return_features else features[:, :1]


NAME = "inception-2015-12-05.pt"


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """A folder with a TorchScript file that passes for the real one."""
    path = tmp_path / "origin" / NAME
    path.parent.mkdir()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")                     # newer torch would rather export than script
        torch.jit.script(FakeInception()).save(str(path))
    monkeypatch.setattr(m, "INCEPTION_SHA256", hashlib.sha256(path.read_bytes()).hexdigest())
    return path.parent


@pytest.fixture
def server(fake, monkeypatch):
    """A web server on this computer that has the file. Returns the list of requests."""
    requests = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args):
            super().__init__(*args, directory=str(fake))

        def log_message(self, *args):
            requests.append(self.path)

    web = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=web.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    monkeypatch.setattr(m, "INCEPTION_URL", f"http://127.0.0.1:{web.server_port}/{NAME}")
    yield requests
    web.shutdown()
    thread.join()
    web.server_close()


def features_in(folder, **other):
    """The Inception network that a run finds, or fetches, in this folder."""
    network, label = m.choose_features(some_run(data_dir=str(folder), **other))
    assert label.startswith("FID") and "20 samples" in label
    return network


def test_inception_gets_exact_bytes(fake):
    """Every byte survives the way to [-1, 1] and back."""
    images = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16).expand(2, 3, 16, 16)
    features = features_in(fake)(images / 127.5 - 1)
    assert features.dtype == torch.float32 and torch.equal(features, images.flatten(1).float())
    beyond = features_in(fake)(torch.tensor([-3.0, 3.0]).reshape(2, 1, 1, 1).expand(2, 3, 4, 4))
    assert beyond[0].unique().tolist() == [0] and beyond[1].unique().tolist() == [255]


def test_without_fid_the_features_are_called_random():
    network, label = m.choose_features(some_run(fid=False))
    assert isinstance(network, m.RandomFeatures) and "random features" in label and "FID" not in label


def test_a_wrong_hash_is_refused_before_loading(fake, monkeypatch):
    monkeypatch.setattr(m, "INCEPTION_SHA256", "0" * 64)
    monkeypatch.setattr(torch.jit, "load", lambda *args, **kwargs: pytest.fail("loaded an unknown program"))
    with pytest.raises(m.UserError, match="delete it") as error:
        features_in(fake)
    assert str(fake / NAME) in str(error.value) and "\n" not in str(error.value)


def test_the_hash_in_the_script_looks_like_one():
    assert len(m.INCEPTION_SHA256) == 64 and int(m.INCEPTION_SHA256, 16) and m.INCEPTION_URL.startswith("https://")


def test_a_missing_inception_file_is_one_line(tmp_path):
    with pytest.raises(m.UserError, match="--download") as error:
        features_in(tmp_path)
    assert str(tmp_path / NAME) in str(error.value) and "\n" not in str(error.value)


def test_download_happens_once_and_only_on_request(fake, server, tmp_path):
    with pytest.raises(m.UserError):
        features_in(tmp_path / "data")
    assert server == []
    for _ in range(2):
        extract = features_in(tmp_path / "data", download=True)
        assert extract(torch.zeros(2, 3, 4, 4)).shape == (2, 48)
    assert len(server) == 1
    assert [path.name for path in (tmp_path / "data").iterdir()] == [NAME]


def test_one_process_downloads_and_the_others_wait(fake, server, tmp_path):
    run = some_run(data_dir=str(tmp_path / "data"), download=True)
    run.rank = 1
    with pytest.raises(m.UserError, match="missing"):
        m.choose_features(run)
    run.wait = lambda: m.choose_features(some_run(data_dir=str(tmp_path / "data"), download=True))
    assert m.choose_features(run)[0](torch.zeros(2, 3, 4, 4)).shape == (2, 48) and len(server) == 1


def test_a_wrong_download_is_refused_before_loading(fake, server, tmp_path, monkeypatch):
    (fake / NAME).write_bytes(b"<html>please log in</html>")
    monkeypatch.setattr(torch.jit, "load", lambda *args, **kwargs: pytest.fail("loaded an unknown program"))
    for _ in range(2):
        with pytest.raises(m.UserError, match="delete it") as error:
            features_in(tmp_path / "data", download=True)
        assert str(tmp_path / "data" / NAME) in str(error.value)


@pytest.mark.parametrize("url", ["http://127.0.0.1:9/inception-2015-12-05.pt", None], ids=["no network", "not found"])
def test_a_failing_download_is_one_line_and_leaves_nothing(fake, server, tmp_path, monkeypatch, url):
    (fake / NAME).unlink()
    monkeypatch.setattr(m, "INCEPTION_URL", url or m.INCEPTION_URL)
    with pytest.raises(OSError) as error:                   # which launch() prints
        features_in(tmp_path / "data", download=True)
    assert "\n" not in str(error.value) and not list((tmp_path / "data").iterdir())
