"""Tasks of the common kinds, from loaders and from files; job files that need no Python."""

from __future__ import annotations

import json
import sys
import tomllib
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset
from typer.testing import CliRunner

import featherweight as fw
from featherweight.cli.app import app
from featherweight.errors import RecipeError, TaskError
from featherweight.task.images import ImageForm, classes, least_side
from featherweight.task.named import model_named

X, Y = torch.randn(20, 4, generator=torch.Generator().manual_seed(0)), torch.arange(20) % 3


# ---- from loaders
@pytest.mark.parametrize("loader", [
    DataLoader(TensorDataset(X, Y), batch_size=8), [(X[:8], Y[:8]), [X[8:], Y[8:]]],
    [{"x": X, "labels": Y}], lambda: iter([(X, Y)]), [(X[:, :2], X[:, 2:], Y)]])
def test_whatever_gives_inputs_and_targets_is_a_split(loader: Any) -> None:
    task = fw.Task.classification(loader, loader, test=loader)
    for split in ("train", "calibration", "validation", "test"):
        for _ in range(2):
            given = list(task.batches(split))
            assert torch.equal(torch.cat([target for _, target in given]), Y)
    first = next(task.batches("train"))[0]
    seen = [first] if isinstance(first, Tensor) else list(first.values()) if isinstance(first, dict) else list(first)
    assert torch.equal(torch.cat(seen, 1), X[:len(seen[0])])


def test_losses_and_scores_are_those_that_torch_has() -> None:
    logits, y = torch.randn(6, 3), torch.tensor([0, 1, 2, 0, 1, 2])

    def predict(x: Any) -> Any:
        return {"logits": logits}

    task = fw.Task.classification([(X[:6], y)], [(X[:6], y)], label_smoothing=0.1)
    assert task.loss is not None
    assert task.score is not None
    torch.testing.assert_close(task.loss({"logits": logits}, y),
                               functional.cross_entropy(logits, y, label_smoothing=0.1))
    assert task.score(predict, task.batches("validation")) == pytest.approx(
        100 * float((logits.argmax(1) == y).float().mean()))
    numbers = fw.Task.regression([(X, X[:, 0])], [(X, X[:, 0]), (X, X[:, 1])])
    assert numbers.loss is not None
    assert numbers.score is not None
    torch.testing.assert_close(numbers.loss(X[:, 1:2], X[:, 0]), (X[:, 1] - X[:, 0]).square().mean())
    wanted = np.concatenate([X[:, 0], X[:, 1]])
    given = np.concatenate([X[:, 2], X[:, 2]])
    assert numbers.score(lambda x: x[:, 2:3], numbers.batches("validation")) == pytest.approx(
        100 * (1 - ((wanted - given) ** 2).sum() / ((wanted - wanted.mean()) ** 2).sum()), rel=1e-5)
    tokens, scores = torch.tensor([[1, 2, 0, 1], [2, 2, 1, -100]]), torch.randn(2, 4, 3)
    text = fw.Task.language([(tokens, tokens)], [(tokens, tokens)])
    assert text.loss is not None
    assert text.score is not None
    pairs = [(scores[n, t], tokens[n, t + 1]) for n in range(2) for t in range(3) if tokens[n, t + 1] >= 0]
    torch.testing.assert_close(text.loss(scores, tokens), torch.stack(
        [functional.cross_entropy(s, y) for s, y in pairs]).mean())
    assert text.score(lambda x: scores, text.batches("validation")) == pytest.approx(
        100 * np.mean([int(s.argmax()) == int(y) for s, y in pairs]))
    maps = torch.randint(3, (2, 4, 4))
    pixels = fw.Task.segmentation([(maps, maps)], [(maps, maps)])
    assert pixels.score is not None
    assert pixels.score(lambda x: functional.one_hot(x, 3).permute(0, 3, 1, 2).float(), pixels.batches(
        "validation")) == 100


def test_what_is_no_batch_is_said() -> None:
    for given, message in (([{"x": X}], r"has 'x' and none of labels"), ([X], "is a Tensor; expected"),
                           (iter([(X, Y)]), "which can be gone through only once")):
        with pytest.raises(TaskError, match=message):
            next(fw.Task.classification(given).batches("train"))
    with pytest.raises(TaskError, match=r"classification\(k=3\)"):
        fw.Task.classification(k=3)


#: task -> a target of [2, 3] that is no class of three, and what is said
OUTSIDE: dict[str, tuple[fw.Task, int, str]] = {
    "top-1": (fw.Task.classification(), 9, "the target 9 lies outside 0..2; expected one of the network's 3 classes"),
    "top-5": (fw.Task.classification(k=5), -100, "the target -100 lies outside 0..2"),
    "mean IoU": (fw.Task.segmentation(), 3, r"the target 3 lies outside 0..2 and is not 255 \(ignored\)"),
    "right tokens": (fw.Task.language(), 3, r"the target 3 lies outside 0..2 and is not -100 \(ignored\)"),
}


@pytest.mark.parametrize("name", OUTSIDE)
def test_a_target_that_is_no_class_counts_as_nothing(name: str) -> None:
    task, target, message = OUTSIDE[name]
    logits, wanted = torch.randn(2, 3, 3), torch.tensor([[0, 1, 2], [0, 1, target]])
    assert task.score is not None
    assert task.score(lambda x: logits, [(X, wanted.clamp(0, 2))]) <= 100
    with pytest.raises(TaskError, match=message):
        task.score(lambda x: logits, [(X, wanted.clamp(0, 2)), (X, wanted)])


def test_targets_of_classes_in_a_regression_are_told() -> None:
    task = fw.Task.regression()
    assert task.score is not None
    with pytest.raises(TaskError, match=r"both must have one shape; where the targets are classes write "
                                        r"fw.Task.classification\(...\), and in a file words, or 0, 1, 2"):
        task.score(lambda x: torch.zeros(20, 3), [(X, Y + 1)])


# ---- from files
def drawn(folder: Path, each: int = 10, size: tuple[int, int] = (20, 16)) -> Path:
    for number, name in enumerate(("cat", "dog", "eel")):
        (folder / name).mkdir(parents=True, exist_ok=True)
        for k in range(each):
            Image.new("RGB", size, (20 * k, 100 * number, 0)).save(folder / name / f"{k}.png")
    return folder


def test_images_are_read_resized_cropped_and_normalized(tmp_path: Path) -> None:
    folder = drawn(tmp_path / "pets")
    assert classes(folder) == ["cat", "dog", "eel"]
    task = fw.task.images(folder, size=8, resize=8, mean=(0.5, 0.5, 0.5), std=(0.25, 0.5, 1.0), batch=4, seed=1)
    seen: dict[str, set[tuple[int, int]]] = {}
    for split in ("train", "validation", "test"):
        for x, y in task.batches(split):
            assert x.shape[1:] == (3, 8, 8)
            red, green = x[:, 0, 0, 0] * 0.25 + 0.5, x[:, 1, 0, 0] * 0.5 + 0.5
            assert torch.equal((green * 255 / 100).round().long(), y)
            seen.setdefault(split, set()).update(zip((red * 255 / 20).round().long().tolist(), y.tolist(), strict=True))
    assert [len(seen[s]) for s in ("train", "validation", "test")] == [24, 3, 3]
    assert len(set().union(*seen.values())) == 30
    again = fw.task.images(folder, size=8, batch=4, seed=1)
    assert [y.tolist() for _, y in again.batches("test")] == [y.tolist() for _, y in task.batches("test")]


def test_images_may_lie_in_folders_of_splits(tmp_path: Path) -> None:
    drawn(tmp_path / "train")
    drawn(tmp_path / "val", 2)
    task = fw.task.images(tmp_path, size=8, test=0.2)
    assert [sum(len(y) for _, y in task.batches(s)) for s in ("train", "validation", "test")] == [24, 6, 6]
    (tmp_path / "val/fox").mkdir()
    with pytest.raises(TaskError, match="'fox', which is no class of the training images: cat, dog, eel"):
        fw.task.images(tmp_path)
    with pytest.raises(TaskError, match="no such folder"):
        fw.task.images(tmp_path / "nothing")
    (tmp_path / "train/cat/0.png").write_bytes(b"nothing")
    with pytest.raises(TaskError, match="is no image that Pillow reads"):
        list(fw.task.images(tmp_path / "train", validation=0.1, test=0.1).batches("train"))


#: mode of Pillow's -> an image whose pixels are half of white, and the file's suffix
HALF = {"8 bits": (np.full((9, 9), 128, np.uint8), "png"), "16 bits": (np.full((9, 9), 32896, np.uint16), "png"),
        "16 bits of a TIFF": (np.full((9, 9), 32896, np.uint16), "tif"),
        "16 bits of a PGM": (np.full((9, 9), 32896, np.int32), "pgm")}


@pytest.mark.parametrize("name", HALF)
@pytest.mark.parametrize("mean", [(0.0,), (0.0, 0.0, 0.0)])
def test_grey_images_are_as_bright_in_16_bits(tmp_path: Path, name: str, mean: tuple[float, ...]) -> None:
    pixels, suffix = HALF[name]
    Image.fromarray(pixels).save(tmp_path / f"a.{suffix}")
    read = ImageForm(8, 8, mean, tuple(1.0 for _ in mean)).read(tmp_path / f"a.{suffix}")
    torch.testing.assert_close(read, torch.full((len(mean), 8, 8), 128 / 255))


def test_images_of_an_unknown_range_are_refused(tmp_path: Path) -> None:
    for dtype, message in ((np.float32, "holds floats"), (np.int32, "holds signed or 32-bit integers")):
        Image.fromarray(np.ones((9, 9), dtype)).save(tmp_path / "a.tif")
        with pytest.raises(TaskError, match=f"a.tif {message}, whose black and white are not known"):
            ImageForm(8, 8, (0.5,), (0.5,)).read(tmp_path / "a.tif")


#: what a folder holds -> what is said
FOLDERS: dict[str, tuple[tuple[str, ...], str]] = {
    "no train": (("val/a/1.png", "test/a/1.png"), "holds test and val, and no train; expected"),
    "an empty class": (("a/1.png", "b/"), "b holds no images; expected files of .jpg"),
    "a class of another suffix": (("train/a/1.png", "train/b/1.gif"), "b holds no images; expected files of .jpg"),
    "an empty split": (("train/a/1.png", "val/a/"), "val holds no images; expected files of"),
    "no classes": (("1.png",), "holds no images in folders of classes"),
}


@pytest.mark.parametrize("name", FOLDERS)
def test_folders_without_images_are_told(tmp_path: Path, name: str) -> None:
    held, message = FOLDERS[name]
    for path in held:
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        if path.endswith("/"):
            (tmp_path / path).mkdir(exist_ok=True)
        else:
            Image.new("L", (8, 8)).save(tmp_path / path)
    for asked in (fw.task.images, least_side):
        with pytest.raises(TaskError, match=message):
            asked(tmp_path)


def test_the_first_image_of_a_class_is_one(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a/1.png").write_bytes(b"nothing")
    with pytest.raises(TaskError, match=r"1.png is no image that Pillow reads"):
        least_side(tmp_path)


def test_mirrored_images_are_those_of_training_alone(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for k in range(20):
            pixels = np.zeros((8, 8, 3), np.uint8)
            pixels[:, :4] = 200
            Image.fromarray(pixels).save(tmp_path / name / f"{k}.png")
    task = fw.task.images(tmp_path, size=8, resize=8, batch=64)
    left = torch.cat([x[:, 0, 0, 0] > x[:, 0, 0, 7] for x, _ in task.batches("train")])
    assert 0 < int(left.sum()) < len(left)
    assert all(bool((x[:, 0, 0, 0] > x[:, 0, 0, 7]).all()) for s in ("calibration", "validation", "test")
               for x, _ in task.batches(s))


def test_arrays_are_scaled_as_the_training_split(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    x, y = generator.integers(0, 255, (40, 6, 6, 3), dtype=np.uint8), np.arange(40) % 4
    np.savez(tmp_path / "a.npz", x_train=x, y_train=y, x_test=x[:8], y_test=y[:8])
    task = fw.task.arrays(tmp_path / "a.npz", batch=100, validation=0.25)
    train, validation, test = (next(task.batches(s)) for s in ("calibration", "validation", "test"))
    assert [len(part[1]) for part in (train, validation, test)] == [30, 10, 8]
    torch.testing.assert_close(train[0].mean((0, 2, 3)), torch.zeros(3), atol=1e-5, rtol=0)
    torch.testing.assert_close(train[0].std((0, 2, 3), correction=0), torch.ones(3), atol=1e-5, rtol=0)
    scale = (test[0][0, :, 0, 0] - test[0][1, :, 0, 0]) / torch.from_numpy(x[0, 0, 0] / 255.0 - x[1, 0, 0] / 255.0)
    assert bool((scale > 0).all())
    np.savez(tmp_path / "b.npz", x=generator.normal(size=(30, 5)), y=generator.normal(size=30))
    assert fw.task.arrays(tmp_path / "b.npz").score_name == "R^2 %"
    np.savez(tmp_path / "c.npz", a=x)
    with pytest.raises(TaskError, match="has a; expected x and y, or x_train and y_train"):
        fw.task.arrays(tmp_path / "c.npz")


def test_arrays_are_scaled_by_all_training_samples(tmp_path: Path) -> None:
    x = np.repeat(np.arange(4.0), 300)[:, None] * np.ones((1, 2))    # sorted by class
    np.savez(tmp_path / "a.npz", x_train=x, y_train=x[:, 0].astype(int), x_val=x, y_val=x[:, 0].astype(int))
    given, _ = next(fw.task.arrays(tmp_path / "a.npz", batch=2000, test=0).batches("validation"))
    torch.testing.assert_close(given.double(), torch.from_numpy((x - x.mean(0)) / x.std(0)))
    given, _ = next(fw.task.arrays(tmp_path / "a.npz", batch=2000, mean=1.0, test=0).batches("validation"))
    torch.testing.assert_close(given.double(), torch.from_numpy((x - 1) / x.std(0)))


TWENTY, FEW = np.ones((20, 3)), np.arange(20) % 3
#: arrays of a file -> what is said
ARRAYS: dict[str, tuple[dict[str, Any], str]] = {
    "no targets of test": ({"x": TWENTY, "y": FEW, "x_test": TWENTY}, "has x_test alone; expected x_test and y_test"),
    "two trainings": ({"x": TWENTY, "y": FEW, "x_train": TWENTY, "y_train": FEW}, "x and x_train, which are both"),
    "complex": ({"x": TWENTY * 1j, "y": FEW}, r"x is complex128\[20, 3\]; expected real numbers .*x.real, x.imag"),
    "words": ({"x": TWENTY, "y": np.array(["a", "b"] * 10)}, r"y is <U1\[20\]; .* y=np.unique\(y, return_inverse=True"),
    "objects": ({"x": TWENTY, "y": FEW.astype(object)}, "y cannot be read: it is damaged, or holds Python objects"),
    "a number": ({"x": np.array(1.0), "y": FEW}, r"x is float64\[\]; expected real numbers \[n"),
    "too few targets": ({"x": TWENTY, "y": FEW[:9]}, "inputs of train have 20 samples and its targets 9"),
    "none": ({"x": TWENTY, "y": FEW, "x_test": TWENTY[:0], "y_test": FEW[:0]}, "inputs of test have 0 samples"),
}


@pytest.mark.parametrize("name", ARRAYS)
def test_arrays_that_are_no_samples_are_told(tmp_path: Path, name: str) -> None:
    held, message = ARRAYS[name]
    np.savez(tmp_path / "a.npz", allow_pickle=True, **held)
    with pytest.raises(TaskError, match=message):
        fw.task.arrays(tmp_path / "a.npz")


@pytest.mark.parametrize("dtype", ["u2", ">f4", "f2", "g", "?"])
def test_arrays_of_every_real_type_are_read(tmp_path: Path, dtype: str) -> None:
    np.savez(tmp_path / "a.npz", x=(np.arange(60).reshape(20, 3) % 2).astype(dtype), y=FEW.astype(dtype))
    assert next(fw.task.arrays(tmp_path / "a.npz").batches("train"))[0].dtype == torch.float32


def test_files_that_are_no_whole_npz_are_told(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    np.savez(path, x=TWENTY, y=FEW)
    whole = path.read_bytes()
    flipped = bytes(byte ^ (at == 200) for at, byte in enumerate(whole))
    np.save(tmp_path / "a.npy", TWENTY)
    torn = (b"garbage", whole[:300], b"", whole[:-60] + bytes(60), (tmp_path / "a.npy").read_bytes())
    for held, message in (*((one, "is no whole .npz file") for one in torn), (flipped, "x cannot be read")):
        path.write_bytes(held)
        with pytest.raises(TaskError, match=message):
            fw.task.arrays(path)


def rows(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def test_a_table_is_read_by_columns(tmp_path: Path) -> None:
    lines = [f"{k},{k % 3},{'' if k == 5 else k * k},{'high' if k > 20 else 'low'}" for k in range(40)]
    path = rows(tmp_path / "a.csv", "a,b,c,level\n" + "\n".join(lines))
    task = fw.task.table(path, "level", batch=100)
    x, y = next(task.batches("calibration"))
    assert x.shape == (32, 3)
    torch.testing.assert_close(x.mean(0), torch.zeros(3), atol=1e-4, rtol=0)
    assert set(y.tolist()) == {0, 1}
    with pytest.raises(TaskError, match="line 7 has nothing in 'c'"):
        fw.task.table(path, "c")
    assert fw.task.table(path, "a", columns=("b", "c")).score_name == "R^2 %"
    assert fw.task.table(path, "b", columns=("a",)).score_name == "top-1 %"
    for given, message in (({"target": "lvel"}, "did you mean 'level'"), ({"target": "a", "columns": ("level",)},
                                                                         "no numbers in a column 'level'")):
        with pytest.raises(TaskError, match=message):
            fw.task.table(path, **given)  # type: ignore[arg-type]
    with pytest.raises(TaskError, match=r"line 3 has not 2 cells"):
        fw.task.table(rows(tmp_path / "b.csv", "a,b\n1,2\n3\n"), "b")


def test_values_near_the_largest_float_are_scaled_too(tmp_path: Path) -> None:
    lines = "\n".join(f"{k}e36,{k}" for k in range(40))
    x, _ = next(fw.task.table(rows(tmp_path / "a.csv", "a,y\n" + lines), "y", batch=100).batches("train"))
    torch.testing.assert_close(x.std(0, correction=0), torch.ones(1))


#: name -> (the line of names, the cells of line 7, the target, what is said of them)
CELLS = {
    "NA in a target": ("a,b,y", "1,2,NA", "y", r"line 7 has 'NA' in 'y', a column of numbers; .* leave the row out"),
    "nan in a target": ("a,b,y", "1,2,nan", "y", "line 7 has 'nan' in 'y'"),
    "inf in a target": ("a,b,y", "1,2,-inf", "y", "line 7 has '-inf' in 'y'"),
    "NA in an input": ("a,b,y", "NA,2,3", "y", "line 7 has 'NA' in 'a', a column of numbers; .* or an empty cell"),
    "inf in an input": ("a,b,y", "1,inf,3", "y", "line 7 has 'inf' in 'b'"),
    "more than 32 bits hold": ("a,b,y", "1,1e39,3", "y", r"line 7 has '1e39' in 'b'.* up to 3.4e\+38"),
    "an underscore": ("a,b,y", "1_0,2,3", "y", "line 7 has '1_0' in 'a'"),
    "an empty target": ("a,b,y", "1,2,", "y", "line 7 has nothing in 'y'"),
    "a cell too many": ("a,b,y", "1,2,3,4", "y", "line 7 has not 3 cells, as the line of names has, but 4"),
    "lines within a cell": ("a,b,y", '1,"2\n",x\n1,2,nan', "y", "line 7 has 'x' in 'y'"),
    "a name twice": ("a,a,y", "1,2,3", "y", "has two columns 'a'"),
    "no such target": ("a,b,y", "1,2,3", "z", "has no column 'z'; known: a, b, y"),
}


@pytest.mark.parametrize("name", CELLS)
def test_a_cell_that_is_no_number_is_named(tmp_path: Path, name: str) -> None:
    names, cells, target, message = CELLS[name]
    lines = [f"{k},{k / 2},{k / 4}" for k in range(40)]
    lines[4:4] = ["", cells]
    with pytest.raises(TaskError, match=message):
        fw.task.table(rows(tmp_path / "a.csv", "\n".join([names, *lines])), target)


def test_blank_cells_and_columns_are_no_numbers(tmp_path: Path) -> None:
    lines = "\n".join(f"{k},{'' if k % 2 else ' nan'},{k % 7}x,{k / 3},," for k in range(40))
    path = rows(tmp_path / "a.csv", "\ufeffa,b,c,y,,\n" + lines)
    assert next(fw.task.table(path, "y").batches("train"))[0].shape[1] == 1
    assert next(fw.task.table(path, "y", columns=["a"]).batches("train"))[0].shape[1] == 1
    for columns in ("a", ["a", "y"]):
        with pytest.raises(TaskError, match=r"expected a list of names without the target: write columns=\['a'\]"):
            fw.task.table(path, "y", columns=columns)


#: bytes -> what is said
FILES = {"": "has no rows", "a,y\n": "has no rows", "a,y\n1,\u00e9": "is no text in UTF-8",
         f"a,y\n1,{'x' * 140_000}": "line 2 is no row of a CSV file: field larger than field limit"}


@pytest.mark.parametrize(("text", "message"), FILES.items(), ids=("empty", "names alone", "latin-1", "long"))
def test_files_that_are_no_csv_are_told(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes(text.encode("latin-1"))
    for asked in (lambda: fw.task.table(path, "y"), lambda: fw.task.texts(path, "y", text="a", tokenizer=spaced)):
        with pytest.raises(TaskError, match=message):
            asked()
    path.write_bytes(text.encode("utf-16"))
    with pytest.raises(TaskError, match="is no text in UTF-8"):
        fw.task.table(path, "y")


#: function of fw.task -> options that are none
OPTIONS: dict[str, list[dict[str, Any]]] = {
    "images": [{"size": "8"}, {"size": (8, 8)}, {"size": 0}, {"size": 8.5}, {"resize": 0}, {"mean": 0.5},
               {"mean": ["a"]}, {"std": [0.0]}, {"batch": 0}, {"validation": "0.1"}],
    "table": [{"batch": -1}, {"seed": "a"}, {"test": 1.0}, {"validation": float("nan")}],
    "texts": [{"length": 0}, {"batch": True}],
    "arrays": [{"mean": "0"}, {"std": -1}, {"std": [1, 0]}, {"batch": 2.0}, {"seed": None}],
}


@pytest.mark.parametrize("name", OPTIONS)
def test_options_are_refused_before_files_are_read(name: str) -> None:
    needed = {"images": {}, "arrays": {}, "table": {"target": "y"}, "texts": {"target": "y", "tokenizer": spaced}}[name]
    for given in OPTIONS[name]:
        option = next(iter(given))
        with pytest.raises(TaskError, match=rf"^fw.task.{name} was given {option}=.*expected .*, as in "
                                            rf"fw.task.{name}\({option}=.*\)$"):
            getattr(fw.task, name)("nothing", **needed, **given)


def test_means_are_one_or_one_a_channel(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", x=TWENTY, y=FEW)
    assert next(fw.task.arrays(tmp_path / "a.npz", mean=[0, 0, 0], std=2).batches("train"))[0].shape[1] == 3
    with pytest.raises(TaskError, match="given 2 numbers as mean; expected one, or one for each of the 3 channels"):
        fw.task.arrays(tmp_path / "a.npz", mean=[0, 0])


def spaced(texts: list[str], max_length: int, padding: Any, **options: Any) -> dict[str, Tensor]:
    cut = [[len(word) for word in one.split()][:max_length] for one in texts]
    longest = max_length if padding == "max_length" else max(map(len, cut))
    return {"input_ids": torch.tensor([one + [0] * (longest - len(one)) for one in cut])}


def test_texts_are_padded_to_a_length_or_to_the_longest(tmp_path: Path) -> None:
    path = rows(tmp_path / "a.csv", "text,liked\n" + "\n".join(
        f'"{"so " * (k % 4)}good, film",{"yes" if k % 2 else "no"}' for k in range(40)))
    for pad, lengths in (("length", {7}), ("longest", {2, 3, 4, 5})):
        task = fw.task.texts(path, "liked", tokenizer=spaced, length=7, pad=pad, batch=1)
        assert {x["input_ids"].shape[1] for x, _ in task.batches("train")} == lengths
    assert {int(y) for _, y in task.batches("train")} == {0, 1}
    with pytest.raises(TaskError, match="transformers has no tokenizer"):
        fw.task.texts(path, "liked", tokenizer=str(tmp_path / "none"))


# ---- without Python
class Small(nn.Module):
    def __init__(self, num_classes: int = 10) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3, 2), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.head = nn.Linear(8, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))  # type: ignore[no-any-return]


@pytest.fixture
def zoo(monkeypatch: pytest.MonkeyPatch) -> None:
    """A package of models as timm is one, which this environment may lack."""
    module = ModuleType("timm")

    def create_model(name: str, pretrained: bool, **arguments: Any) -> nn.Module:
        if name != "small":
            raise RuntimeError(f"Unknown model ({name})")
        return Small(**arguments)

    module.create_model = create_model  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "timm", module)


@pytest.mark.usefixtures("zoo")
def test_two_commands_lead_from_a_folder_of_images_to_a_deployed_file(tmp_path: Path,
                                                                     monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    drawn(Path("pets"))
    torch.manual_seed(0)
    torch.save(Small(3).state_dict(), "small.pth")
    run = CliRunner()
    made = run.invoke(app, ["init", "--model", "timm:small", "--weights", "small.pth", "--images", "pets"])
    assert made.exit_code == 0, made.output
    text = Path("job.toml").read_text()
    assert tomllib.loads(text)["model"] == {"name": "timm:small", "weights": "small.pth",
                                            "arguments": {"num_classes": 3}}
    commented = "\n".join(line.removeprefix("# ") if line.startswith(("# [[", "# kind", "# macs", "# size", "# mirror"))
                          else line for line in text.splitlines())
    assert len(tomllib.loads(commented)["steps"]) == 3  # what stands in comments is TOML as well
    assert tomllib.loads(text)["data"] == {"images": "pets", "size": 16, "resize": 16}, "images of 20 x 16 stay small"
    done = run.invoke(app, ["compress", "job.toml", "--set", "compress.seconds=0.05", "--json"])
    assert done.exit_code in (0, 1), done.output
    assert Path("out/model.onnx").stat().st_size < 20_000
    assert json.loads(Path("out/result.json").read_text())["trail"]
    again = fw.Job.from_toml(Path("out/recipe.toml"))
    assert again.task == fw.Job.from_toml(Path("job.toml")).task
    assert run.invoke(app, ["init", "--model", "timm:small", "--images", "pets"]).exit_code == 2  # job.toml is there


def test_init_takes_a_task_of_ones_own_and_says_what_nobody_answers(tmp_path: Path,
                                                                    monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run = CliRunner()
    Path("mine.py").write_text("def make(): ...\ndef task(): ...\n")
    for words, answers in ((["--model", "mine:make", "--task", "mine:task"], ""), ([], "mine:task\nmine:make\n")):
        made = run.invoke(app, ["init", *words], input=answers)
        assert made.exit_code == 0, made.output
        held = tomllib.loads(Path("job.toml").read_text())
        assert (held["model"]["factory"], held["task"]) == ("mine:make", {"factory": "mine:task"})
        assert "data" not in held
        assert fw.Job.from_toml(Path("job.toml")).recipe.steps
        Path("job.toml").unlink()
    silent = run.invoke(app, ["init", "--model", "mine:make"], input="")
    assert silent.exit_code == 2
    assert "there is nobody to ask for 'data'; write --model, and one of" in " ".join(silent.output.split())
    wrong = run.invoke(app, ["init", "--model", "mine:make", "--csv", "a.csv", "--target", "label"])
    assert wrong.exit_code == 2
    assert "no target named 'label'" in wrong.output
    both = run.invoke(app, ["init", "--model", "mine:make", "--task", "mine:task", "--images", "photos"])
    assert both.exit_code == 2
    assert "--images and --task" in both.output


#: flags of init -> what is said
MISSING = {"--model owned:none --images pets": "module 'owned' has no function 'none'",
           "--model nowhere:make --images pets": "there is no module 'nowhere'",
           "--model owned:make --task owned:none": "module 'owned' has no function 'none'",
           "--model timm:small --weights none.pth --images pets": "--weights none.pth: no such file",
           "--model none.fw --images pets": "--model none.fw: no such file",
           "--model owned:make --images torn": "no image that Pillow reads",
           "--model owned:make --csv empty.csv --label y": "has no rows",
           "--model owned:make --csv latin.csv --label y": "is no text in UTF-8",
           "--model owned:make --csv latin.csv --label y --text a --tokenizer owned": "is no text in UTF-8",
           "--model owned:make --npz empty.csv": "is no whole .npz file"}


@pytest.mark.parametrize("words", MISSING)
def test_init_writes_no_job_that_could_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: str) -> None:
    monkeypatch.chdir(tmp_path)
    Path("owned.py").write_text("def make(): ...\n")
    Path("empty.csv").write_bytes(b"")
    Path("latin.csv").write_bytes(b"a,y\n1,\xe9\n")
    drawn(Path("pets"), 4)
    drawn(Path("torn"), 4)
    Path("torn/cat/0.png").write_bytes(b"nothing")
    made = CliRunner().invoke(app, ["init", *words.split()])
    assert made.exit_code == 2, made.output
    assert made.stderr.count("error: ") == 1
    assert MISSING[words] in " ".join(made.output.split())
    assert not Path("job.toml").exists()


@pytest.mark.usefixtures("zoo")
def test_models_by_name_fail_in_words(tmp_path: Path) -> None:
    torch.save(Small(4).state_dict(), tmp_path / "four.pth")
    torch.save({"state_dict": {f"module.{k}": v for k, v in Small(3).state_dict().items()}}, tmp_path / "three.pth")
    (tmp_path / "torn.pth").write_bytes(b"PK nothing")
    torch.save(Small(3), tmp_path / "pickle.pth")
    made = model_named("timm:small", {"num_classes": 3}, "three.pth", str(tmp_path))
    assert made(torch.ones(1, 3, 8, 8)).numel() == 3
    for name, weights, message in (
            ("timm:large", None, r"timm gave no model 'large'.*Unknown model"),
            ("jax:small", None, "expected PACKAGE:NAME"),
            ("timm:small", "none.pth", "no such file"), ("timm:small", "four.pth", "do not fit the model"),
            ("timm:small", "torn.pth", "torch.save"), ("timm:small", "pickle.pth", "holds more than tensors")):
        with pytest.raises(RecipeError, match=message):
            model_named(name, {"num_classes": 3}, weights, str(tmp_path))


def test_a_job_names_data_of_one_kind() -> None:
    head = '[model]\nname = "timm:small"\n'
    for data, message in (('[data]\n', "names nothing; expected one of images, csv, npz"),
                          ('[data]\nimages = "a"\nnpz = "b"\n', "names images and npz"),
                          ('[data]\nimages = "a"\nsze = 3\n', "did you mean 'size'"),
                          ('[data]\ncsv = "a.csv"\n', "needs target; write target"),
                          ('[data]\ncsv = "a.csv"\ntext = "t"\ntarget = "y"\n', "needs tokenizer"),
                          ('[data]\nimages = "a"\n[task]\nfactory = "a:b"\n', "has both"), ("", "has no .task.")):
        with pytest.raises(RecipeError, match=message):
            fw.Job.from_toml(head + data)
    job = fw.Job.from_toml(head + '[data]\nimages = "pets"\nsize = 32\nmean = [0.5, 0.5, 0.5]\n')
    assert fw.Job.from_toml(job.to_toml() + "\n").to_toml() == job.to_toml()
