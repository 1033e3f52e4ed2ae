"""What a training step sees of pictures: sizes, colours, augmentation, views, balance and pairs, each a function of its seeds."""

from __future__ import annotations

import pickle
import random
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from limbeck.data import views as views_module
from limbeck.data.images import Answers, ImageRecord, LabelledImages, load_images
from limbeck.data.records import open_image
from limbeck.data.views import PRESETS, Augment, ImageCollate, ImageDataset, Views, presentation, resized
from limbeck.engine.batches import StepSampler, evaluation_loader, training_loader
from limbeck.errors import BadInput

EVERYTHING = {"flip": True, "vertical_flip": True, "rotate": 15, "colour": 0.4, "blur": 0.5, "erase": 0.5}
CHANGES: list[dict[str, Any]] = [{"crop": [0.3, 0.8]}, {"pad": 3}, *({key: value} for key, value in EVERYTHING.items())]
MIXTURES = {"mixup": 1.0, "cutmix": 1.0}


def coloured(count: int, size: tuple[int, int] = (20, 16), mode: str = "RGB", classes: int = 2) -> LabelledImages:
    """Noise, so that every change shows; labels go round the classes."""
    rng = np.random.default_rng(0)
    shape = (size[1], size[0]) if mode == "L" else (size[1], size[0], 3)
    records = [
        ImageRecord(f"p{k}", Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8)), k % classes) for k in range(count)
    ]
    return LabelledImages(records, tuple(str(c) for c in range(classes)))


def batches(dataset: ImageDataset, augment: Augment | None = None, *, seed: int = 0, start: int = 0, stop: int = 4) -> list[Any]:
    """As the engine draws them, two samples a step."""
    sampler = StepSampler(len(dataset), 2, 2, seed=seed, rank=0, world=1, start=start, stop=stop)
    return list(training_loader(dataset, ImageCollate(augment), sampler, seed=seed, workers=0))


def refused(make: Any) -> str:
    with pytest.raises(BadInput) as raised:
        make()
    assert "\n" not in str(raised.value)
    return str(raised.value)


# Sizes and colours


def test_a_picture_is_its_pixels():
    images = load_images({"source": "digits", "shots": 1}, "train")
    dataset = ImageDataset(images)
    sample = dataset[3]
    assert dataset.shape == (1, 8, 8)
    assert torch.equal(sample["pixel_values"][0], torch.from_numpy(np.array(images.records[3].image)).float() / 255)
    assert (sample["id"], sample["index"], sample["labels"]) == (images.records[3].id, 3, images.records[3].label)
    assert dataset.labels.tolist() == [record.label for record in images.records]
    assert dataset.ids == [record.id for record in images.records]
    colour = ImageDataset(images, channels=3)[3]["pixel_values"]
    assert torch.equal(colour, sample["pixel_values"].expand(3, 8, 8))


def test_evaluation_resizes_the_shorter_side_and_cuts_out_the_middle():
    picture = Image.new("RGB", (90, 30), (255, 0, 0))
    picture.paste((0, 255, 0), (30, 0, 60, 30))
    dataset = ImageDataset(LabelledImages([ImageRecord("a", picture, 0)], ("x",)), size=10)
    middle = dataset[0]["pixel_values"]
    assert middle.shape == (3, 10, 10)
    assert torch.allclose(middle[:, :, 1:-1].mean((1, 2)), torch.tensor([0.0, 1.0, 0.0]), atol=0.02)
    assert resized(picture, 30).getcolors() == [(900, (0, 255, 0))]
    assert resized(Image.new("L", (7, 300)), 14).size == (14, 14)


def test_pictures_are_turned_upright_and_read_from_files(tmp_path):
    picture = Image.new("RGB", (8, 4), (255, 255, 255))
    picture.paste((0, 0, 0), (0, 0, 4, 4))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise
    picture.save(tmp_path / "a.png", exif=exif)
    dataset = ImageDataset(LabelledImages([ImageRecord("a", tmp_path / "a.png", 0)], ("x",)))
    assert dataset.shape == (3, 8, 4)
    assert dataset[0]["pixel_values"][0, :, 0].tolist() == [0.0] * 4 + [1.0] * 4


def test_grey_stays_grey_and_colour_may_be_dropped():
    grey = ImageDataset(coloured(2, mode="L"))
    assert grey[0]["pixel_values"].shape == (1, 16, 20)
    images = coloured(1)
    as_grey = ImageDataset(images, channels=1)[0]["pixel_values"]
    assert torch.equal(as_grey[0], torch.from_numpy(np.array(images.records[0].image.convert("L"))).float() / 255)


def test_what_cannot_be_shown_is_refused(tmp_path):
    images = coloured(2)
    other = ImageRecord("odd", Image.new("RGB", (9, 9)), 0)
    mixed = ImageDataset(LabelledImages([*images.records, other], images.classes))
    assert "picture 'odd' is 9x9 and the first one 20x16: set data.size" in refused(lambda: mixed[2])
    gone = LabelledImages([*images.records, ImageRecord("gone", tmp_path / "gone.png", 0)], images.classes)
    assert "picture 'gone' cannot be read: FileNotFoundError" in refused(lambda: ImageDataset(gone, size=8)[2])
    assert "no pictures" in refused(lambda: ImageDataset(LabelledImages([], ("a",))))


def test_a_cached_picture_is_decoded_once(tmp_path):
    file = tmp_path / "a.png"
    coloured(1).records[0].image.save(file)
    images = LabelledImages([ImageRecord("a", file, 0)], ("x",))
    dataset, plain = ImageDataset(images, size=8, cache=True), ImageDataset(images, size=8)
    before = dataset[0]["pixel_values"]
    assert torch.equal(before, plain[0]["pixel_values"])
    file.unlink()
    assert torch.equal(dataset[0]["pixel_values"], before)
    assert "cannot be read" in refused(lambda: plain[0])


def test_small_data_are_kept_in_memory_by_what_is_kept_of_a_picture(monkeypatch):
    monkeypatch.setattr(views_module, "CACHED_BYTES", 4 * 3 * 8 * 8)
    shown = {
        "resized": ImageDataset(coloured(4), size=8, cache=None),
        "one more": ImageDataset(coloured(5), size=8, cache=None),
        "whole": ImageDataset(coloured(4), size=8, train=True, augment=Augment(crop=(0.5, 1.0)), cache=None),
        "as they are": ImageDataset(coloured(4), cache=None),
        "asked for": ImageDataset(coloured(4), cache=True),
    }
    assert {name for name, dataset in shown.items() if dataset._cache is not None} == {"resized", "asked for"}


# Augmentation


@pytest.mark.parametrize(
    ("where", "change"),
    [*((where, change) for where in ("worker", "batch") for change in CHANGES), ("worker", MIXTURES)],
    ids=str,
)
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_every_change_is_a_function_of_seed_epoch_and_index(where, change, mode):
    if where == "batch":
        pytest.importorskip("kornia")
    augment = Augment(where=where, **change)
    dataset = ImageDataset(coloured(4, (12, 12), mode), size=12, train=True, augment=augment)
    plain = ImageDataset(coloured(4, (12, 12), mode), size=12)
    steps = batches(dataset, augment, stop=12)  # six epochs
    torch.manual_seed(7), random.seed(7), np.random.seed(7)
    for one, again in zip(steps[5:], batches(dataset, augment, start=5, stop=12), strict=True):
        assert one["ids"] == again["ids"]
        assert torch.equal(one["pixel_values"], again["pixel_values"])
    pixels = torch.stack([step["pixel_values"] for step in steps])
    assert pixels.min() >= 0 and pixels.max() <= 1
    seen_of = {
        name: {
            step["pixel_values"][k].numpy().tobytes() for step in steps for k, other in enumerate(step["ids"]) if other == name
        }
        for name in dataset.ids
    }
    assert max(len(seen) for seen in seen_of.values()) > 1
    other_seed = batches(dataset, augment, seed=1, stop=12)
    assert any(not torch.equal(a["pixel_values"], b["pixel_values"]) for a, b in zip(steps, other_seed, strict=True))
    assert any(
        not torch.equal(step["pixel_values"][k], plain[int(name[1:])]["pixel_values"])
        for step in steps
        for k, name in enumerate(step["ids"])
    )


def test_flips_and_padding_move_pixels_and_change_none():
    images = coloured(3, (8, 8), "L")
    for augment in (Augment(flip=True), Augment(vertical_flip=True)):
        for step in batches(ImageDataset(images, train=True, augment=augment)):
            for name, pixels in zip(step["ids"], step["pixel_values"], strict=True):
                plain = ImageDataset(images)[int(name[1:])]["pixel_values"]
                assert torch.equal(pixels, plain) or torch.equal(pixels, plain.flip(2 if augment.flip else 1))
    (step,) = batches(ImageDataset(images, train=True, augment=Augment(pad=2)), stop=1)
    plain = torch.nn.functional.pad(ImageDataset(images)[int(step["ids"][0][1:])]["pixel_values"], (2, 2, 2, 2))
    windows = plain.unfold(1, 8, 1).unfold(2, 8, 1)[0].reshape(-1, 8, 8)
    assert (windows == step["pixel_values"][0]).all((1, 2)).sum() == 1


def plain_pixels(count: int, classes: int = 2) -> LabelledImages:
    """Picture k is k / 255 everywhere, so that a mixture tells what it is made of."""
    records = [ImageRecord(f"p{k}", Image.new("L", (8, 8), k), k % classes) for k in range(count)]
    return LabelledImages(records, tuple(str(c) for c in range(classes)))


@pytest.mark.parametrize("kinds", [{"mixup": 1.0}, {"cutmix": 1.0}, {"mixup": 0.5, "cutmix": 2.0}], ids=str)
def test_a_mixture_is_two_pictures_and_their_labels_by_their_shares(kinds):
    images, augment = plain_pixels(40), Augment(**kinds)
    dataset = ImageDataset(images, train=True, augment=augment)
    seen, shares = Counter(), set()
    for batch in batches(dataset, augment, stop=60):
        assert batch["mixed_labels"].dtype == torch.int64 and batch["mixed_share"].dtype == torch.float32
        for k, own in enumerate(batch["index"].tolist()):
            pixels, share = batch["pixel_values"][k, 0] * 255, batch["mixed_share"][k].item()
            assert batch["labels"][k] == own % 2 and 0 <= share <= 1
            if (pixels.round() == own).all():
                continue  # mixed with itself, or hardly
            others = torch.arange(40)[torch.arange(40) % 2 == batch["mixed_labels"][k]]
            blends = ((1 - share) * own + share * others - pixels[0, 0]).abs().min() < 1e-3 and len(pixels.unique()) == 1
            foreign = (pixels.round() != own).float()
            rectangle = torch.equal(foreign, foreign.amax(1)[:, None] * foreign.amax(0))
            cut = (
                rectangle
                and foreign.mean().item() == pytest.approx(share, abs=1e-6)
                and set(pixels[foreign > 0].round().tolist()) <= set(others.tolist())
            )
            assert blends or cut
            seen["both" if blends and cut else "mixup" if blends else "cutmix"] += 1
            shares.add(round(share, 2))
    assert set(seen) - {"both"} == set(kinds) and len(shares) > 10
    plain = ImageDataset(images, augment=augment)[3]
    assert "mixed_share" not in plain and torch.equal(plain["pixel_values"] * 255, torch.full((1, 8, 8), 3.0))


def test_labelled_pictures_are_mixed_with_labelled_ones_as_balance_says():
    images = load_images({"source": "digits", "shots": 4, "unlabelled": True, "limit": 200}, "train")
    known = {record.id for record in images.labelled.records}
    dataset = ImageDataset(images, train=True, augment=Augment(mixup=1.0), cache=True)
    for index in range(len(dataset)):
        sample = dataset[index]
        assert (sample["labels"] == -100) == (sample["mixed_labels"] == -100) == (sample["id"] not in known)
    beside = ImageDataset(images.labelled, train=True, unlabelled=images.unlabelled, augment=Augment(mixup=1.0), cache=True)
    raw = ImageDataset(LabelledImages(images.unlabelled, images.classes), cache=True)
    assert not torch.equal(beside[0]["unlabelled"], raw[0]["pixel_values"]) and beside[0]["mixed_labels"] >= 0
    uneven = LabelledImages([r for r in plain_pixels(60).records if r.label == 0 or r.id == "p1"], ("0", "1"))
    even = ImageDataset(uneven, train=True, augment=Augment(mixup=1.0), balance="class", cache=True)
    assert 60 < sum(even[0]["mixed_labels"] for _ in range(200)) < 140


def test_mixtures_that_are_refused():
    with pytest.raises(ValueError, match="use where: worker"):
        Augment(where="batch", mixup=1.0)
    views = Views(global_size=8, local_size=4)
    assert "data.views shows crops of one" in refused(
        lambda: ImageDataset(coloured(4), size=8, train=True, augment=Augment(cutmix=1.0), views=views)
    )


def test_held_out_pictures_are_never_changed():
    pytest.importorskip("kornia")
    for where in ("worker", "batch"):
        augment = Augment(where=where, crop=(0.3, 0.5), **EVERYTHING)
        dataset = ImageDataset(coloured(3), size=8, augment=augment, views=Views(global_size=8, local_size=4), balance="class")
        plain = ImageDataset(coloured(3), size=8)
        (batch,) = evaluation_loader(dataset, ImageCollate(augment), 3)
        assert torch.equal(batch["pixel_values"], torch.stack([plain[k]["pixel_values"] for k in range(3)]))
        assert set(batch) == {"ids", "pixel_values", "labels", "index"}


def test_changes_in_the_batch_need_the_collation_to_know_them():
    pytest.importorskip("kornia")
    dataset = ImageDataset(coloured(2, (8, 8)), train=True, augment=Augment(where="batch", flip=True))
    assert "make `ImageCollate` with the same augment" in refused(lambda: ImageCollate()([dataset[0]]))
    before = torch.get_rng_state()
    ImageCollate(Augment(where="batch", rotate=5))([{**dataset[0], "augment_seed": 3}] * 2)
    sample_draws = torch.get_rng_state()
    torch.set_rng_state(before)
    dataset[0]
    assert torch.equal(torch.get_rng_state(), sample_draws)  # collation leaves the generator as it was


def test_making_a_dataset_draws_nothing():
    before = torch.get_rng_state()
    ImageDataset(
        coloured(2), size=8, train=True, augment=Augment(crop=(0.5, 1), **EVERYTHING), views=Views(global_size=8, local_size=4)
    )
    assert torch.equal(torch.get_rng_state(), before)


def test_datasets_and_collation_can_be_sent_to_workers():
    augment = Augment(crop=(0.5, 1.0), **EVERYTHING)
    dataset = ImageDataset(coloured(4), size=8, train=True, augment=augment, cache=True)
    here = batches(dataset, augment)
    there = batches(pickle.loads(pickle.dumps(dataset)), pickle.loads(pickle.dumps(ImageCollate(augment))).augment)
    assert all(torch.equal(a["pixel_values"], b["pixel_values"]) for a, b in zip(here, there, strict=True))


def test_settings_of_a_recipe():
    shown, rest = presentation({"source": "digits", "shots": 4, "size": 16, "augment": "light", "balance": "class"})
    assert rest == {"source": "digits", "shots": 4}
    assert (shown.size, shown.channels, shown.balance) == (16, None, "class")
    assert shown.augment == Augment(**PRESETS["light"]) and shown.augment.crop == (0.7, 1.0)
    assert "augment: there is no preset 'lite': did you mean 'light'?" in refused(lambda: presentation({"augment": "lite"}))
    assert "give crop or pad" in refused(lambda: presentation({"augment": {"crop": [0.5, 1], "pad": 2}}))
    assert "smallest, largest" in refused(lambda: presentation({"augment": {"crop": [1, 0.5]}}))
    assert "unknown key 'augment.flp'; did you mean 'flip'?" in refused(lambda: presentation({"augment": {"flp": True}}))
    assert "'views.local_size' is required" in refused(lambda: presentation({"views": {"global_size": 8}}))


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "kornia.augmentation", None)
    views_module._batch_changes.cache_clear()
    augment = Augment(where="batch", flip=True)
    assert "pip install kornia" in refused(lambda: ImageDataset(coloured(2), train=True, augment=augment))
    monkeypatch.setitem(__import__("sys").modules, "torchvision.transforms", None)
    views_module._changes.cache_clear()
    augment = Augment(flip=True)
    assert "pip install 'limbeck[vision]'" in refused(lambda: ImageDataset(coloured(2), train=True, augment=augment))


# Views


def test_views_are_crops_of_the_original_and_differ():
    picture = Image.fromarray(np.tile(np.arange(256, dtype=np.uint8), (256, 1)))  # grey grows to the right
    images = LabelledImages([ImageRecord("a", picture, 0)] * 2, ("x",))
    views = Views(global_size=16, local_size=8, local_count=3, global_scale=(0.9, 1.0), local_scale=(0.05, 0.1))
    dataset = ImageDataset(images, size=32, train=True, views=views)
    first, second = batches(dataset, stop=2)
    assert [tuple(view.shape) for view in first["views"]] == [(2, 1, 16, 16)] * 2 + [(2, 1, 8, 8)] * 3
    assert first["pixel_values"].shape == (2, 1, 32, 32)
    spans = [(view.amax((1, 2, 3)) - view.amin((1, 2, 3))).mean().item() for view in first["views"]]
    assert min(spans[:2]) > 0.7 and max(spans[2:]) < 0.5
    assert not torch.equal(first["views"][0], first["views"][1])
    assert not torch.equal(first["views"][0], second["views"][0])
    assert torch.equal(first["views"][4], batches(dataset, stop=1)[0]["views"][4])


def test_views_are_changed_too():
    pytest.importorskip("kornia")
    images = LabelledImages([ImageRecord("a", Image.new("RGB", (16, 16), (128, 64, 32)), 0)] * 2, ("x",))
    for where in ("worker", "batch"):
        augment = Augment(where=where, colour=0.5)
        dataset = ImageDataset(images, train=True, augment=augment, views=Views(global_size=8, local_size=4))
        (batch,) = batches(dataset, augment, stop=1)
        shades = {tuple(view[k, :, 0, 0].tolist()) for view in batch["views"] for k in range(2)}
        assert len(shades) == 12, where


# Balance, pairs and answers


def test_balance_draws_every_class_equally_often():
    images = coloured(50, (4, 4), classes=2)
    tail = LabelledImages([r for r in images.records if r.label == 0 or r.id in ("p1", "p3")], ("0", "1"))
    dataset = ImageDataset(tail, train=True, balance="class", cache=True)
    sampler = StepSampler(len(dataset), 27, 27, seed=0, rank=0, world=1, start=0, stop=40)
    drawn = list(training_loader(dataset, ImageCollate(), sampler, seed=0, workers=0))
    labels = torch.cat([batch["labels"] for batch in drawn])
    assert labels.float().mean() == pytest.approx(0.5, abs=0.06)
    assert {name for batch in drawn for name in batch["ids"]} == set(dataset.ids)
    assert all(torch.equal(dataset.labels[batch["index"]], batch["labels"]) for batch in drawn)
    again = list(training_loader(dataset, ImageCollate(), sampler, seed=0, workers=0))
    assert [batch["ids"] for batch in drawn] == [batch["ids"] for batch in again]
    assert [dataset[k]["index"] for k in range(27)] == list(range(27))
    unlabelled = LabelledImages([ImageRecord(r.id, r.image, -100) for r in tail.records], ())
    assert "needs labels" in refused(lambda: ImageDataset(unlabelled, train=True, balance="class"))


def test_each_unlabelled_picture_stands_beside_a_labelled_one():
    images = load_images({"source": "digits", "shots": 1, "unlabelled": True}, "train")
    dataset = ImageDataset(images.labelled, train=True, unlabelled=images.unlabelled, cache=True)
    assert len(dataset) == len(images.unlabelled)
    beside = []
    for epoch in range(2):
        samples = [dataset.draw(epoch, index) for index in range(95)]
        used = Counter(sample["index"] for sample in samples)
        assert set(used) == set(range(10)) and set(used.values()) == {9, 10}
        beside.append([sample["index"] for sample in samples])
        for sample, record in zip(samples, images.unlabelled, strict=False):
            pixels = torch.from_numpy(np.array(open_image(record.image).convert("L"))).float() / 255
            assert torch.equal(sample["unlabelled"][0], pixels)
            assert dataset.labels[sample["index"]] == sample["labels"]
    assert beside[0] != beside[1]
    other = ImageDataset(images.labelled, train=True, unlabelled=images.unlabelled, seed=1)
    assert [other.draw(0, k)["index"] for k in range(10)] != beside[0][:10]
    batch = ImageCollate()([dataset[0], dataset[1]])
    assert batch["unlabelled"].shape == batch["pixel_values"].shape == (2, 1, 8, 8)


def test_balanced_classes_beside_and_among_unlabelled_pictures():
    images = load_images({"source": "digits", "shots": 8, "unlabelled": True, "imbalance": 10}, "train")
    few = [record for record in images.labelled.records if record.label < 9 or record.id == images.labelled.records[-1].id]
    labelled = LabelledImages(few, images.classes)
    torch.manual_seed(0)
    beside = ImageDataset(labelled, train=True, unlabelled=images.unlabelled, balance="class", cache=True)
    drawn = Counter(beside.draw(0, index % len(beside))["labels"] for index in range(1000))
    assert set(drawn) == {record.label for record in few} and min(drawn.values()) > 60
    among = ImageDataset(LabelledImages([*few, *images.unlabelled], images.classes), train=True, balance="class", cache=True)
    assert len(among) == len(few) + len(images.unlabelled)
    place = len(few) + 3
    assert among.draw(0, place)["id"] == images.unlabelled[3].id and among.draw(0, place)["labels"] == -100
    assert {among.draw(0, 0)["labels"] for _ in range(200)} == set(drawn), "a labelled place shows any class"


def test_pairs_that_are_refused():
    images = coloured(4)
    free = [ImageRecord("u", images.records[0].image, -100)]
    assert "no unlabelled pictures" in refused(lambda: ImageDataset(images, train=True, unlabelled=[]))
    mixed = LabelledImages([*images.records, *free], images.classes)
    assert "pass `images.labelled`" in refused(lambda: ImageDataset(mixed, train=True, unlabelled=free))


def test_a_labelled_and_an_unlabelled_picture_may_share_an_id():
    one, two = coloured(2, (4, 4)).records
    dataset = ImageDataset(
        LabelledImages([one], ("0",)), train=True, unlabelled=[ImageRecord(one.id, two.image, -100)], cache=True
    )
    sample = dataset[0]
    assert not torch.equal(sample["pixel_values"], sample["unlabelled"])


def test_answers_stand_beside_their_pictures():
    images = coloured(3)
    answers = Answers(("a?", "b?"), {f"p{k}": (k / 4, 1.0) for k in range(3)})
    dataset = ImageDataset(images, size=8, train=True, answers=answers)
    batch = ImageCollate()([dataset[2], dataset[1]])
    assert batch["aspects"].tolist() == [[0.5, 1.0], [0.25, 1.0]]
    assert "aspects" not in ImageDataset(images, size=8, answers=answers)[0]
    assert "no answers for picture 'p0'" in refused(lambda: ImageDataset(images, train=True, answers=Answers(("a?",), {})))


def test_batches_have_what_a_step_reads():
    batch = ImageCollate()([ImageDataset(coloured(3), size=8)[k] for k in (2, 0)])
    assert batch["ids"] == ["p2", "p0"]
    assert batch["labels"].tolist() == [0, 0] and batch["labels"].dtype == torch.int64
    assert batch["index"].tolist() == [2, 0]
    assert batch["pixel_values"].dtype == torch.float32
