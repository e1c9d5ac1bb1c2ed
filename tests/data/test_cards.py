"""Cards and indexes: all shipped cards, all list formats with files named like the real ones, hostile lists, shards."""

import io
import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq
import pytest
import yaml
from PIL import Image

from slimray import storage
from slimray.data.bytes import read_sample, read_whole, write_shard
from slimray.data.cards import Card, load_card
from slimray.data.index import INDEX, fingerprint, index_table, notes_of
from slimray.data.lists import complete, read_split, unused_labels
from slimray.data.samples import BadSample
from slimray.data.video import moving_shapes
from slimray.data.video.clips import ClipRecipe, frame_indices, generators
from slimray.data.video.decoder import Decoder
from slimray.spec import UserError, parse
from slimray.storage import StorageError

ROOT = Path(__file__).resolve().parents[2]
DATASETS = ROOT / "datasets"
SHIPPED = sorted(path.stem for path in DATASETS.glob("*.yaml"))
DISK = pafs.LocalFileSystem()


def shipped(name: str) -> Card:
    return load_card(name, [DATASETS])


def custom(**fields) -> Card:
    return parse(Card, {"name": "mine", "layout": "list", "splits": {"train": "train.txt"}, **fields}, "mine.yaml")


def write(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(text.encode())


def picture(number: int) -> bytes:
    """A JPEG whose brightness encodes its number."""
    buffer = io.BytesIO()
    Image.fromarray(np.full((48, 64, 3), 5 * (number % 50), np.uint8)).save(buffer, "JPEG", quality=95)
    return buffer.getvalue()


def write_pictures(folder: Path, numbers, form: str = "img_{:05d}.jpg") -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for number in numbers:
        (folder / form.format(number)).write_bytes(picture(number))


def paths(table: pa.Table) -> list[str]:
    return table.column("path").to_pylist()


def labels(table: pa.Table) -> list[int]:
    return table.column("label").to_pylist()


# -------------------------------------------------------------------------------------------------- shipped cards


@pytest.mark.parametrize("name", SHIPPED)
def test_every_shipped_card_loads_and_says_what_it_is(name):
    card = shipped(name)
    header = (DATASETS / f"{name}.yaml").read_text().split("\nname:")[0]
    assert card.name == name
    assert card.source
    assert card.licence
    assert header.startswith("# yaml-language-server: $schema=card.schema.json\n")
    assert all(f"\n# {word}" in header for word in ("download:", "layout:", "licence:", "notes:"))


@pytest.mark.parametrize("name", SHIPPED)
def test_a_card_survives_being_embedded_in_a_job(name):
    card = shipped(name)
    plain = card.model_dump(mode="json", exclude_defaults=True)
    assert parse(Card, yaml.safe_load(yaml.safe_dump(plain)), name) == card
    assert parse(Card, json.loads(json.dumps(plain)), name) == card


def test_the_generated_card_knows_its_classes_and_their_mirror_images():
    card = shipped("moving_shapes")
    assert tuple(card.class_names()) == moving_shapes.CLASSES
    assert card.num_classes == 4
    rounds = moving_shapes.ROUNDS
    assert all(rounds[a] == -rounds[b] for a, b in card.flip_labels())
    assert sorted(one for pair in card.flip_labels() for one in pair) == [0, 1, 2, 3]


def test_every_field_of_a_card_is_documented():
    schema = Card.model_json_schema()
    assert all(field.get("description") for field in schema["properties"].values())


# ------------------------------------------------------------------------------------------------ finding a card


def test_a_card_is_found_by_name_path_and_uri_and_a_job_of_its_name_is_passed_over(tmp_path):
    write(
        tmp_path,
        {"jobs/my_clips.yaml": "kind: train\nname: my_clips\n", "jobs/broken.yaml": "a: [", "own.yaml": "x: 1"},
    )
    search = [tmp_path / "jobs", DATASETS]
    assert load_card("my_clips", search).layout == "list"
    assert load_card(str(DATASETS / "ucf101.yaml"), []).name == "ucf101"
    assert load_card(f"file://{DATASETS}/ucf101.yaml", []).name == "ucf101"
    assert load_card("../datasets/ucf101.yaml", [ROOT / "jobs"]).name == "ucf101"
    with pytest.raises(UserError, match="no dataset card 'ufc101', did you mean 'ucf101'"):
        load_card("ufc101", search)
    with pytest.raises(UserError, match=r"known: .*hmdb51, .*my_clips"):
        load_card("zzz", search)
    with pytest.raises(UserError, match="no such dataset card"):
        load_card("nowhere/ucf101.yaml", search)
    with pytest.raises(UserError, match=r"own.yaml: name: is required"):
        load_card(str(tmp_path / "own.yaml"), [])


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"layout": "lists"}, "layout: must be 'list'"),
        ({"splits": {}}, "splits: "),
        ({"splits": {"train": ["a*.txt", 1]}}, r"splits.train: must be one path for layout list"),
        ({"layout": "hmdb51"}, r"splits.train: must be \[pattern, mark\]"),
        ({"classes": ["a", "b", "a"]}, "classes: 'a' is empty or named twice"),
        ({"classes": ["a", "b"], "num_classes": 3}, "num_classes: 3, but classes names 2"),
        ({"flip": "labels"}, "flip_pairs: require flip: labels"),
        ({"flip_pairs": [[0, 1]]}, "flip_pairs: require flip: labels"),
        ({"flip": "labels", "flip_pairs": [[0, 1], [1, 2]]}, "flip_pairs: a class is in more than one pair"),
        ({"delimiter": ", "}, "delimiter: "),
        ({"licens": "MIT"}, "licens: unknown field, did you mean 'licence'"),
    ],
)
def test_a_wrong_card_is_refused_with_field_and_reason(fields, reason):
    with pytest.raises(UserError, match=f"mine.yaml: {reason}"):
        custom(**fields)


def test_flip_pairs_must_name_classes():
    card = custom(classes=["left", "right"], flip="labels", flip_pairs=[["left", "right"]])
    assert card.flip_labels() == ((0, 1),)
    with pytest.raises(UserError, match="flip_pairs: 'lift' is not a class, did you mean 'left'"):
        custom(classes=["left", "right"], flip="labels", flip_pairs=[["lift", "right"]]).flip_labels()
    with pytest.raises(UserError, match="flip_pairs: 2 is not a class"):
        custom(classes=["left", "right"], flip="labels", flip_pairs=[[0, 2]]).flip_labels()
    with pytest.raises(UserError, match="the number of 'Swiping Left' is not known without the dataset"):
        shipped("jester").flip_labels()


# ------------------------------------------------------------------------------------- the formats as distributed


def test_fight_surv_is_read_by_the_card_for_own_clips(shared):
    root = str(shared / "data/video/fight_surv")
    card = complete(shipped("my_clips"), root)
    train, val = read_split(card, "train", root), read_split(card, "val", root)
    assert card.class_names() == ["0", "1"]
    assert (train.num_rows, val.num_rows) == (155, 52)
    assert (sum(labels(train)), sum(labels(val))) == (82, 26)
    assert train.slice(0, 1).to_pylist() == [
        {"path": "fight/fi001.mp4", "label": 1}
        | {"frames": 0, "fps": 0, "width": 0, "height": 0, "shard": "", "row": -1, "offset": -1, "length": 0}
    ]
    row = train.slice(0, 1).to_pylist()[0]
    assert read_whole(DISK, root, row) == Path(root, "fight/fi001.mp4").read_bytes()


def test_jump_run_frames_are_read_and_decoded(shared):
    root = str(shared / "data/video/jump_run_frames")
    card = custom(
        splits={"all": "annotations.txt"},
        columns=["path", "first", "last", "label"],
        file="{path}/img_{00001..}.jpg",
        classes=["jumping", "running"],
    )
    table = read_split(card, "all", root)
    assert paths(table)[0] == "jumping/0001/img_{00001..00017}.jpg"
    assert table.column("frames").to_pylist() == [17, 18, 15, 15]
    assert labels(table) == [0, 0, 1, 1]
    with Decoder() as decoder:
        for row in table.to_pylist():
            assert decoder.probe(row["path"], read_whole(DISK, root, row)).frames == row["frames"]


def test_mmaction2_lists_are_read_once_their_repeated_lines_are_gone(shared, tmp_path):
    samples = shared / "data/video/mmaction2_samples/tests/data"
    shutil.copytree(samples / "imgs", tmp_path / "imgs")
    shutil.copy(samples / "test.mp4", tmp_path)
    videos = custom(splits={"test": "video_test_list.txt"})
    frames = custom(
        splits={"test": "rawframe_test_list.txt"}, columns=["path", "frames", "label"], file="{path}/img_{00001..}.jpg"
    )
    for card, name in ((videos, "video_test_list.txt"), (frames, "rawframe_test_list.txt")):
        text = (samples / "annotations" / name).read_text()
        write(tmp_path, {name: text})
        with pytest.raises(UserError, match=f"{name} line 2: .* is listed twice, first in .*{name} line 1"):
            read_split(card, "test", str(tmp_path))
        write(tmp_path, {name: text.split("\n")[0]})
    assert read_split(videos, "test", str(tmp_path)).to_pylist()[0]["path"] == "test.mp4"
    row = read_split(frames, "test", str(tmp_path)).to_pylist()[0]
    assert (row["path"], row["label"], row["frames"]) == ("imgs/img_{00001..00005}.jpg", 127, 5)
    assert complete(frames, str(tmp_path)).num_classes == 128
    with Decoder() as decoder:
        assert decoder.probe(row["path"], read_whole(DISK, str(tmp_path), row)).frames == 5


def test_the_kinetics_class_list_is_the_sorted_list_that_lists_give(shared):
    text = (shared / "data/video/mmaction2_samples/tools/data/kinetics/label_map_k400.txt").read_text()
    names = text.strip().split("\n")
    assert names == sorted(names)
    assert len(names) == shipped("kinetics400").num_classes


def test_kinetics_rows_become_file_names_and_sorted_classes(tmp_path):
    header = "label,youtube_id,time_start,time_end,split,is_cc\r\n"
    train = header + '"air drumming",_dbcJuKJQNs,40,50,train,0\r\nabseiling,-3B32lodo2M,59,1069,train,0\r\n'
    write(
        tmp_path,
        {"annotations/train.csv": train, "annotations/val.csv": header + "zumba,00000000007,0,10,validate,0\n"},
    )
    with pytest.raises(UserError, match="3 classes, but the card kinetics400 has num_classes: 400"):
        read_split(shipped("kinetics400"), "train", str(tmp_path))
    card = complete(shipped("kinetics400").model_copy(update={"num_classes": 0}), str(tmp_path))
    assert card.class_names() == ["abseiling", "air drumming", "zumba"]
    table = read_split(card, "train", str(tmp_path))
    assert paths(table) == ["train/_dbcJuKJQNs_000040_000050.mp4", "train/-3B32lodo2M_000059_001069.mp4"]
    assert labels(table) == [1, 0]
    assert paths(read_split(card, "val", str(tmp_path))) == ["val/00000000007_000000_000010.mp4"]


@pytest.mark.parametrize("name", ["something_v1", "jester"])
def test_frame_folders_with_names_after_a_semicolon(name, tmp_path):
    stem = {"something_v1": "something-something-v1", "jester": "jester-v1"}[name]
    folder = shipped(name).file.partition("/")[0]
    text = "100218;Swiping Right\n24413;Swiping Left\n"
    write(tmp_path, {f"{stem}-train.csv": text, f"{stem}-validation.csv": "7;Sliding a thing, which can't\n"})
    write_pictures(tmp_path / folder / "100218", range(1, 13), "{:05d}.jpg")
    card = shipped(name).model_copy(update={"num_classes": 0})
    table = read_split(card, "train", str(tmp_path))
    assert paths(table) == [f"{folder}/100218/{{00001..}}.jpg", f"{folder}/24413/{{00001..}}.jpg"]
    assert labels(table) == [2, 1]
    with Decoder() as decoder:
        row = table.to_pylist()[0]
        assert decoder.probe(row["path"], read_whole(DISK, str(tmp_path), row)).frames == 12


def test_jester_mirrors_what_its_names_say(tmp_path):
    names = [name for pair in shipped("jester").flip_pairs for name in pair]
    names += [f"gesture {i}" for i in range(27 - len(names))]
    write(tmp_path, {"jester-v1-train.csv": "\n".join(f"{i};{name}" for i, name in enumerate(names))})
    card = complete(shipped("jester"), str(tmp_path))
    found = card.class_names()
    assert {(found[a], found[b]) for a, b in card.flip_labels()} == set(card.flip_pairs)


def test_something_v2_templates_lose_their_brackets(tmp_path):
    classes = {f"class {i}": str(i) for i in range(172)} | {"Holding something": "172", "Folding something up": "173"}
    train = [
        {"id": "78687", "label": "holding a pen", "template": "Holding [something]", "placeholders": ["a pen"]},
        {"id": "42326", "label": "folding paper up", "template": "Folding [something] up", "placeholders": ["paper"]},
    ]
    write(tmp_path, {"labels/labels.json": json.dumps(classes), "labels/train.json": json.dumps(train)})
    card = complete(shipped("something_v2"), str(tmp_path))
    table = read_split(card, "train", str(tmp_path))
    assert paths(table) == [f"20bn-something-something-v2/{name}.webm" for name in ("78687", "42326")]
    assert labels(table) == [172, 173]
    assert card.flip_labels() == ((86, 87), (93, 94), (166, 167))
    for broken, reason in (
        ("[{]", "is not JSON"),
        ("{}", "must be a JSON list"),
        ('[{"id": "1"}]', "entry 1: must have"),
    ):
        write(tmp_path, {"labels/train.json": broken})
        with pytest.raises(UserError, match=f"train.json:? {reason}"):
            read_split(card, "train", str(tmp_path))


def test_ucf101_takes_the_class_from_the_folder_in_both_kinds_of_list(tmp_path):
    lists = tmp_path / "ucfTrainTestlist"
    numbered = [f"{i + 1} Class{i:03d}" for i in range(100)] + ["101 YoYo"]
    write(lists, {"classInd.txt": "\r\n".join(numbered) + "\r\n"})
    write(lists, {"trainlist01.txt": "YoYo/v_YoYo_g08_c01.avi 101\nClass000/v_Class000_g08_c01.avi 1\n"})
    write(lists, {"testlist01.txt": "Class000/v_Class000_g01_c01.avi\n"})
    card = complete(shipped("ucf101"), str(tmp_path))
    table = read_split(card, "train", str(tmp_path))
    assert labels(table) == [100, 0]
    assert paths(table)[0] == "UCF-101/YoYo/v_YoYo_g08_c01.avi"
    assert labels(read_split(card, "val", str(tmp_path))) == [0]


def test_hmdb51_lists_each_class_apart(tmp_path):
    lists = {
        "brush_hair_test_split1.txt": "April_09_brush_hair_u_nm_np1_ba_goo_0.avi 1 \n#15_x;_1.avi 2 \nb.avi 0 \n",
        "wave_test_split1.txt": "20060723_wave_f_cm_np1_ba_med_0.avi 1 \n",
        "wave_test_split2.txt": "20060723_wave_f_cm_np1_ba_med_0.avi 2 \n",
    }
    write(tmp_path / "testTrainMulti_7030_splits", lists)
    card = shipped("hmdb51").model_copy(update={"num_classes": 0})
    train, val = (read_split(card, split, str(tmp_path)) for split in ("train", "val"))
    assert paths(train) == [
        "hmdb51_org/brush_hair/April_09_brush_hair_u_nm_np1_ba_goo_0.avi",
        "hmdb51_org/wave/20060723_wave_f_cm_np1_ba_med_0.avi",
    ]
    assert (labels(train), labels(val)) == ([0, 1], [0])
    assert complete(card, str(tmp_path)).class_names() == ["brush_hair", "wave"]
    write(tmp_path / "testTrainMulti_7030_splits", {"wave_test_split1.txt": "a.avi 3\n"})
    with pytest.raises(UserError, match=r"wave_test_split1.txt line 1: must be a file and 0, 1 or 2"):
        read_split(card, "train", str(tmp_path))
    with pytest.raises(UserError, match=r"\*_test_split1.txt: no such lists \(split 'train' of hmdb51\)"):
        read_split(card, "train", str(tmp_path / "elsewhere"))


def test_a_folder_per_class_with_and_without_splits(tmp_path):
    files = ["train/run/a b.mp4", "train/run/.DS_Store", "train/jump/c.mp4", "val/run/d.mp4", "val/.git/x"]
    write(tmp_path, dict.fromkeys(files, "x"))
    card = complete(shipped("my_folders"), str(tmp_path))
    assert card.class_names() == ["jump", "run"]
    table = read_split(card, "train", str(tmp_path))
    assert list(zip(paths(table), labels(table), strict=True)) == [("train/jump/c.mp4", 0), ("train/run/a b.mp4", 1)]
    flat = shipped("my_folders").model_copy(update={"splits": {"train": "."}})
    assert paths(read_split(flat, "train", str(tmp_path / "train"))) == ["jump/c.mp4", "run/a b.mp4"]
    (tmp_path / "train/sit").mkdir()
    with pytest.raises(UserError, match="train/sit: holds no sample of class 'sit'"):
        read_split(card, "train", str(tmp_path))
    with pytest.raises(UserError, match=r"elsewhere/val: has no folders of classes \(split 'val' of my_folders\)"):
        read_split(card, "val", str(tmp_path / "elsewhere"))


def test_a_folder_per_class_may_hold_folders_of_pictures(tmp_path):
    write_pictures(tmp_path / "run/clip1", range(1, 4))
    card = custom(layout="folders", splits={"train": "."}, file="{path}/img_{00001..}.jpg")
    assert paths(read_split(card, "train", str(tmp_path))) == ["run/clip1/img_{00001..}.jpg"]


def test_a_prepared_dataset_is_read_by_its_own_card(tmp_path):
    card = shipped("moving_shapes").prepared(["train"], None)
    items = [
        {"path": f"clips/{i}.mp4", "label": i % 4, "frames": 16, "fps": 12.5, "width": 64, "height": 48}
        for i in range(8)
    ]
    table = index_table(items)
    pq.write_table(table, tmp_path / "train.parquet")
    (tmp_path / "card.yaml").write_text(yaml.safe_dump(card.model_dump(mode="json", exclude_defaults=True)))
    again = load_card(f"{tmp_path}/card.yaml", [])
    assert again == card
    assert again.class_names() == list(moving_shapes.CLASSES)
    assert len(again.flip_labels()) == 2
    read = read_split(again, "train", str(tmp_path))
    assert read.equals(table)
    assert read.schema == INDEX
    assert complete(again, str(tmp_path)) is again


def test_the_card_of_files_that_were_only_probed_says_where_they_lie(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path, {"clips/train.txt": "a.mp4 0\n"})
    card = complete(shipped("my_clips"), "clips")
    assert card.prepared(["train"], "clips").root == str(tmp_path / "clips")
    assert card.prepared(["train"], "s3://team/clips").root == "s3://team/clips"
    assert card.prepared(["train"], "clips").num_classes == 1


# -------------------------------------------------------------------------------------------------- hostile lists


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("a.mp4 0\nb.mp4\n", "line 2: 1 columns instead of 2"),
        ("a.mp4 0 7\n", "line 1: 3 columns instead of 2"),
        ("a.mp4 0\n\nb.mp4 2\n", "line 3: label 2 is not in 0 to 1, the classes of mine"),
        ("a.mp4 -1\n", "line 1: label -1 is not in 0 to 1"),
        ("a.mp4 99999999999999999999\n", "line 1: '99999999999999999999' is not a class"),
        ("a.mp4 jmup\n", "line 1: 'jmup' is not a class of mine, did you mean 'jump'"),
        ("a.mp4 0\nb.mp4 1\na.mp4 0\n", r"line 3: a.mp4 is listed twice, first in .*train.txt line 1"),
        ("a.mp4 0\n./a.mp4 0\n", "line 2: a.mp4 is listed twice"),
        ("../a.mp4 0\n", "line 1: '../a.mp4' must be a path relative to the root"),
        ("a/../../b.mp4 0\n", "line 1: .* must be a path relative to the root"),
        ("/etc/passwd 0\n", "line 1: '/etc/passwd' must be a path relative to the root"),
        ("s3://other/a.mp4 0\n", "line 1: 's3://other/a.mp4' must be a path relative"),
        ("a\0.mp4 0\n", "line 1: .* must be a path relative"),
        ("", "lists no samples for split 'train' of mine"),
        ("\n \n", "lists no samples for split 'train' of mine"),
    ],
)
def test_a_bad_list_is_refused_with_file_line_and_reason(text, reason, tmp_path):
    write(tmp_path, {"train.txt": text})
    with pytest.raises(UserError, match=reason) as caught:
        read_split(custom(classes=["run", "jump"]), "train", str(tmp_path))
    assert str(tmp_path / "train.txt") in str(caught.value)


def test_a_list_that_is_missing_or_no_text_or_asked_by_a_wrong_name_is_a_sentence(tmp_path):
    card = custom(classes=["run", "jump"])
    with pytest.raises(UserError, match=r"train.txt: no such file \(split 'train' of mine\): fix data.root or"):
        read_split(card, "train", str(tmp_path))
    (tmp_path / "train.txt").write_bytes(b"a.mp4 0\n\xff\xfe.mp4 1\n")
    with pytest.raises(UserError, match="is not UTF-8 text"):
        read_split(card, "train", str(tmp_path))
    with pytest.raises(UserError, match="mine: unknown split 'trian', did you mean 'train'"):
        read_split(card, "trian", str(tmp_path))
    with pytest.raises(UserError, match=r"'../train.txt' must be a path relative"):
        read_split(custom(splits={"train": "../train.txt"}, classes=["run"]), "train", str(tmp_path))
    with pytest.raises(UserError, match=r"moving_shapes: is generated: set data\.run"):
        read_split(shipped("moving_shapes"), "train", str(tmp_path))


def test_lists_of_other_systems_are_read_alike(tmp_path):
    write(tmp_path, {"train.txt": "\ufeffa.mp4 0\r\nb.mp4\t1\r\n\r\n"})
    assert labels(read_split(custom(), "train", str(tmp_path))) == [0, 1]
    write(tmp_path, {"train.txt": 'my clips/a.mp4, 1\n"b, c.mp4",0\n'})
    assert paths(read_split(custom(delimiter=","), "train", str(tmp_path))) == ["my clips/a.mp4", "b, c.mp4"]


def test_classes_without_a_list_are_counted_over_the_splits_that_are_there(tmp_path):
    card = custom(splits={"train": "train.txt", "val": "val.txt"})
    write(tmp_path, {"train.txt": "a.mp4 0\nb.mp4 3\n"})
    assert complete(card, str(tmp_path)).class_names() == ["0", "1", "2", "3"]
    write(tmp_path, {"val.txt": "c.mp4 run\n"})
    with pytest.raises(UserError, match=r"val.txt line 1: label 'run' is a name, but others are numbers"):
        complete(card, str(tmp_path))
    write(tmp_path, {"val.txt": "c.mp4 123456789\n"})
    with pytest.raises(UserError, match=r"val.txt line 1: label 123456789 is not a class number"):
        complete(card, str(tmp_path))
    with pytest.raises(UserError, match=r"train.txt: no such file"):
        complete(card, str(tmp_path / "elsewhere"))
    assert complete(card, None) is card


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("classes.txt", "run\njump high\n", ["run", "jump high"]),
        ("classes.txt", "0,run\n1,jump\n", ["run", "jump"]),
        ("classes.txt", "3 run\n1 jump\n", ["3 run", "1 jump"]),
        ("classes.json", '["run", "jump"]', ["run", "jump"]),
        ("classes.json", '{"jump": 1, "run": 0}', ["run", "jump"]),
    ],
)
def test_files_of_classes(name, text, expected, tmp_path):
    write(tmp_path, {name: text, "train.txt": "a.mp4 0\n"})
    assert complete(custom(classes=name), str(tmp_path)).class_names() == expected


@pytest.mark.parametrize(
    ("name", "text", "reason"),
    [
        ("classes.txt", "run\nrun\n", "classes.txt: classes: 'run' is empty or named twice"),
        (
            "classes.json",
            '{"jump": 2, "run": 0}',
            "must be a JSON list of names, or an object of names with numbers from 0",
        ),
        ("classes.json", "7", "must be a JSON list of names"),
        ("classes.json", "[" * 100_000, "is not JSON"),
    ],
)
def test_bad_files_of_classes(name, text, reason, tmp_path):
    write(tmp_path, {name: text})
    with pytest.raises(UserError, match=reason):
        complete(custom(classes=name), str(tmp_path))
    with pytest.raises(UserError, match=r"missing.txt: no such file \(the classes of mine\)"):
        complete(custom(classes="missing.txt"), str(tmp_path))


@pytest.mark.parametrize(
    ("line", "columns", "reason"),
    [
        ("clip 0 0", ["path", "frames", "label"], "pictures 1 to 0 are not a valid clip"),
        ("clip many 0", ["path", "frames", "label"], "frames must be a number"),
        ("clip 5000000 0", ["path", "frames", "label"], "pictures 1 to 5000000 are not a valid clip"),
        ("clip 9 3 0", ["path", "first", "last", "label"], "pictures 9 to 3 are not a valid clip"),
    ],
)
def test_impossible_numbers_of_pictures_are_refused(line, columns, reason, tmp_path):
    write(tmp_path, {"train.txt": line})
    with pytest.raises(UserError, match=f"line 1: {reason}"):
        read_split(custom(columns=columns, file="{path}/{00001..}.jpg"), "train", str(tmp_path))
    with pytest.raises(UserError, match="line 1: file: unknown column 'id'"):
        read_split(custom(columns=columns, file="{id}.mp4"), "train", str(tmp_path))


def test_a_damaged_index_is_refused(tmp_path):
    card = shipped("moving_shapes").prepared(["train"], None)
    file = tmp_path / "train.parquet"
    with pytest.raises(UserError, match=r"train.parquet: no such index \(split 'train' of moving_shapes\)"):
        read_split(card, "train", str(tmp_path))
    file.write_bytes(b"PAR1 no PAR1")
    with pytest.raises(UserError, match=r"is not an index .*: run prepare again"):
        read_split(card, "train", str(tmp_path))
    for rows, reason in [
        ([], "is empty or has gaps"),
        ([{"path": "a", "label": 0}, {"path": "a", "label": 1}], "lists a path twice"),
        ([{"path": "a", "label": 8}], "labels from 8 to 8, but moving_shapes has 4 classes"),
        ([{"path": "../a", "label": 0}], "must be a path relative to the root"),
        ([{"path": "a", "label": 0, "shard": "/etc/passwd", "row": 0}], "must be a path relative to the root"),
    ]:
        pq.write_table(index_table(rows), file)
        with pytest.raises(UserError, match=reason):
            read_split(card, "train", str(tmp_path))


# ------------------------------------------------------------------------------------------------- the fingerprint


def test_the_fingerprint_depends_on_content_alone():
    rows = [{"path": f"{i}.mp4", "label": i % 3} for i in range(20)]
    table = index_table(rows)
    pieces = pa.concat_tables([index_table([]), table.slice(0, 7), table.slice(7)])
    assert fingerprint(table) == fingerprint(pieces)
    assert fingerprint(table) == fingerprint(pa.concat_tables([index_table(rows[:1]), table]).slice(1))
    changed = [index_table(rows[::-1]), index_table(rows[:-1]), index_table([*rows[:-1], {**rows[-1], "label": 0}])]
    assert len({fingerprint(table), *map(fingerprint, changed)}) == 4
    assert fingerprint(index_table(rows[:2])) == "1276d706d16500c832799dd476b5414a61965061e4e669de2150c6726e567f30"


# --------------------------------------------------------------------------------------------------------- pictures


@pytest.fixture
def folder(tmp_path):
    """(root, row) of a sample of 30 pictures, with flow pictures beside them."""
    write_pictures(tmp_path / "clip", range(1, 31))
    write_pictures(tmp_path / "clip", range(1, 50), "x_{:05d}.jpg")
    write(tmp_path, {"train.txt": "clip 0\n"})
    table = read_split(custom(file="{path}/img_{00001..}.jpg"), "train", str(tmp_path))
    return str(tmp_path), table.to_pylist()[0]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"sampling": "dense"},
        {"mode": "val"},
        {"mode": "test", "num_clips": 2, "crops": 3},
        {"mode": "test", "sampling": "dense", "num_clips": 10},
        {"frame_order": "shuffled"},
    ],
)
def test_a_part_of_the_pictures_gives_the_clip_that_all_of_them_give(folder, options):
    root, row = folder
    recipe = ClipRecipe(num_segments=4, size=32, resize=36, **options)
    whole = read_whole(DISK, root, row)
    with Decoder() as decoder:
        for epoch in range(3):
            key = (0, epoch, 7)
            part = read_sample(DISK, root, row, recipe, key)
            a, b = (decoder.clip(row["path"], data, recipe, key)[0] for data in (part, whole))
            assert np.array_equal(a, b)
            drawn = len(set(frame_indices(recipe, 30, generators(key)[0]).tolist()))
            assert abs(len(part) / len(whole) - drawn / 30) < 0.1
            assert drawn < 30 or options.get("num_clips") == 10


def test_a_missing_picture_is_a_bad_sample_and_a_missing_folder_a_missing_file(folder):
    root, row = folder
    (Path(root) / "clip/img_00007.jpg").unlink()
    with pytest.raises(BadSample, match=r"frame 6 of 30 is missing \(img_00007.jpg\)"):
        read_whole(DISK, root, row)
    with pytest.raises(FileNotFoundError, match="elsewhere/clip"):
        read_whole(DISK, f"{root}/elsewhere", row)
    with pytest.raises(FileNotFoundError, match=r"/gone$"):
        read_whole(DISK, root, row | {"path": "gone/img_{00001..00030}.jpg"})
    (Path(root) / "empty").mkdir()
    for path in ("empty/img_{00001..}.jpg", "empty/{000..}.jpg"):
        with pytest.raises(BadSample, match="has no pictures"):
            read_whole(DISK, root, row | {"path": path})
    with pytest.raises(FileNotFoundError, match=r"/gone.mp4$"):
        read_sample(DISK, root, row | {"path": "gone.mp4"}, ClipRecipe(), (0, 0, 0))


def test_pictures_may_be_numbered_from_anywhere(tmp_path):
    write_pictures(tmp_path / "a", range(5), "{:03d}.jpg")
    write_pictures(tmp_path / "b", range(99_998, 100_003), "{:05d}.jpg")
    for path in ("a/{000..}.jpg", "a/{000..004}.jpg", "b/{99998..}.jpg", "b/{99998..100002}.jpg"):
        row = {"path": path, "label": 0, "frames": 0, "shard": "", "row": -1}
        with Decoder() as decoder:
            assert decoder.probe(path, read_whole(DISK, str(tmp_path), row)).frames == 5


# ---------------------------------------------------------------------------------------------------------- shards


class Counting(pafs.FileSystemHandler):
    """A disk that counts the bytes read from it, and fails the next `failures` times a file is opened."""

    def __init__(self):
        self.opened, self.bytes, self.failures = 0, 0, 0

    def open_input_file(self, path):
        self.opened += 1
        if self.failures:
            self.failures -= 1
            raise OSError("connection reset")
        return pa.PythonFile(_Counted(path, self), mode="r")

    def get_file_info(self, paths):
        return DISK.get_file_info(paths)

    def _no(self, *_):
        raise NotImplementedError

    get_type_name = get_file_info_selector = create_dir = delete_dir = delete_dir_contents = _no
    delete_root_dir_contents = delete_file = move = copy_file = open_input_stream = _no
    open_output_stream = open_append_stream = normalize_path = _no


class _Counted(io.FileIO):
    def __init__(self, path, counting):
        super().__init__(path)
        self.counting = counting

    def read(self, size=-1):
        data = super().read(size)
        self.counting.bytes += len(data)
        return data


@pytest.fixture
def shard(tmp_path):
    """(root, rows, clips) of a shard of twelve clips of 100 kB."""
    rng = np.random.default_rng(0)
    clips = [rng.bytes(100_000 + i) for i in range(12)]
    packed = [{"path": f"{i}.mp4", "label": i, "data": data} for i, data in enumerate(clips)]
    write_shard(DISK, f"{tmp_path}/shards/train-000000.parquet", packed)
    places = [{"path": f"{i}.mp4", "label": i, "shard": "shards/train-000000.parquet", "row": i} for i in range(12)]
    return str(tmp_path), index_table(places).to_pylist(), clips


@pytest.fixture(params=["footer", "place"])
def known(request, shard):
    """The same, with rows that do or do not know their offsets."""
    root, rows, clips = shard
    if request.param == "place":
        footer = pq.read_metadata(f"{root}/{rows[0]['shard']}")
        chunks = [footer.row_group(i).column(2) for i in range(12)]
        places = [{"offset": c.data_page_offset, "length": c.total_compressed_size} for c in chunks]
        rows = [row | place for row, place in zip(rows, places, strict=True)]
    return root, rows, clips


@pytest.fixture
def impatient(monkeypatch):
    """Disable waits between attempts."""
    monkeypatch.setattr(storage.time, "sleep", lambda _: None)


def test_a_clip_of_a_shard_is_one_range_read(shard):
    root, rows, clips = shard
    counting = Counting()
    fs = pafs.PyFileSystem(counting)
    for i in (5, 0, 11):
        assert read_sample(fs, root, rows[i], ClipRecipe(), (0, 0, i)) == clips[i]
        assert read_whole(fs, root, rows[i]) == clips[i]
    footer = 65_536
    assert counting.bytes < footer + 2 * sum(len(clips[i]) + 500 for i in (5, 0, 11))
    assert counting.opened == 7  # once for the footer


def test_a_clip_whose_place_the_index_knows_is_read_without_the_footer(tmp_path):
    rng = np.random.default_rng(0)
    clips = [rng.bytes(size) for size in (100_000, 0, 1, 63, 64, 200, 3_000_000)]
    packed = [{"path": f"{i}.mp4", "label": i, "data": data} for i, data in enumerate(clips)]
    places = write_shard(DISK, f"{tmp_path}/s.parquet", packed)
    rows = [
        {"path": f"{i}.mp4", "label": i, "shard": "s.parquet", "row": i, "offset": offset, "length": length}
        for i, (offset, length) in enumerate(places)
    ]
    counting = Counting()
    fs = pafs.PyFileSystem(counting)
    for row, clip in zip(index_table(rows).to_pylist(), clips, strict=True):
        assert read_whole(fs, str(tmp_path), row) == clip
    assert counting.opened == len(clips)
    assert counting.bytes < sum(len(clip) + 100 for clip in clips)
    for wrong in ({"offset": 0}, {"offset": rows[0]["offset"] + 1}, {"length": 50}, {"offset": 10**9}, {"length": 9}):
        assert read_whole(DISK, str(tmp_path), {**rows[0], **wrong}) == clips[0], "the footer tells it"


def test_a_shard_has_a_row_group_per_clip_and_a_small_footer(shard):
    root, rows, _ = shard
    footer = pq.read_metadata(f"{root}/{rows[0]['shard']}")
    assert footer.num_row_groups == footer.num_rows == 12
    assert footer.serialized_size < 12 * 300
    table = pq.read_table(f"{root}/{rows[0]['shard']}")
    assert table.column("path").to_pylist() == [row["path"] for row in rows]
    assert table.column("label").to_pylist() == list(range(12))
    assert [path.name for path in (Path(root) / "shards").iterdir()] == ["train-000000.parquet"]


def test_a_rewritten_shard_is_read_anew(known):
    root, rows, clips = known
    assert read_whole(DISK, root, rows[3]) == clips[3]
    packed = [{"path": f"{i}.mp4", "label": i, "data": bytes([i]) * (50 + 7 * i)} for i in range(12)]
    write_shard(DISK, f"{root}/{rows[0]['shard']}", packed)
    assert read_whole(DISK, root, rows[3]) == packed[3]["data"]


def test_shard_reads_are_retried_and_then_fail_in_one_sentence(known, monkeypatch):
    root, rows, clips = known
    monkeypatch.setenv(storage.PATIENCE, "2")
    counting = Counting()
    fs = pafs.PyFileSystem(counting)
    counting.failures = 1
    assert read_whole(fs, root, rows[0]) == clips[0]
    counting.failures = 99
    with pytest.raises(
        StorageError, match=r"train-000000.parquet: cannot read it after \d+ attempts? \(connection reset\)"
    ):
        read_whole(fs, root, rows[1])


def test_a_damaged_shard_is_a_storage_error_and_a_missing_one_a_missing_file(known, impatient):
    root, rows, clips = known
    with pytest.raises(StorageError, match="it holds 12 clips, but the index names number 12"):
        read_whole(DISK, root, rows[0] | {"row": 12, "offset": -1})
    with pytest.raises(FileNotFoundError, match=r"/shards/gone.parquet$"):
        read_whole(DISK, root, rows[0] | {"shard": "shards/gone.parquet"})
    file = Path(root) / rows[0]["shard"]
    data = bytearray(file.read_bytes())
    data[data.index(clips[4]) + 777] ^= 1
    file.write_bytes(data)
    with pytest.raises(StorageError, match=r"cannot read it after 4 attempts .*CRC"):
        read_whole(DISK, root, rows[4])
    assert read_whole(DISK, root, rows[5]) == clips[5]
    file.write_bytes(data[:500])
    with pytest.raises(StorageError, match="cannot read it after 4 attempts"):
        read_whole(DISK, root, rows[5])


def test_lists_pictures_and_shards_are_read_from_a_bucket(bucket):
    uri = bucket("clips")
    fs, root = storage.open_uri(uri)
    storage.write_atomic(fs, f"{root}/train.txt", b"a 0\nb 1\n")
    for number in range(1, 5):
        storage.write_atomic(fs, f"{root}/a/{number:05d}.jpg", picture(number))
    rows = read_split(custom(file="{path}/{00001..}.jpg"), "train", uri).to_pylist()
    with Decoder() as decoder:
        assert decoder.probe("a", read_whole(fs, root, rows[0])).frames == 4
    with pytest.raises(FileNotFoundError, match=r"clips/b$"):
        read_whole(fs, root, rows[1])
    storage.delete(fs, f"{root}/a/00002.jpg")
    with pytest.raises(BadSample, match="frame 1 of 4 is missing"):
        read_whole(fs, root, rows[0])
    packed = [{"path": str(i), "label": i, "data": bytes([i]) * 1000} for i in range(3)]
    write_shard(fs, f"{root}/shards/0.parquet", packed)
    for row in index_table(
        [{"path": str(i), "label": i, "shard": "shards/0.parquet", "row": i} for i in range(3)]
    ).to_pylist():
        assert read_whole(fs, root, row) == packed[row["row"]]["data"]
    with pytest.raises(FileNotFoundError, match=r"shards/1.parquet$"):
        read_whole(fs, root, row | {"shard": "shards/1.parquet"})


# ------------------------------------------------------------------------------------ lists and folders of strangers


def test_samples_in_nested_folders_belong_to_the_class_above(tmp_path):
    write(
        tmp_path,
        {"train/run/day1/a.mp4": "", "train/run/b.mp4": "", "train/jump/x/y/c.mp4": "", "train/jump/.x/d.mp4": ""},
    )
    table = read_split(custom(layout="folders", splits={"train": "train"}), "train", str(tmp_path))
    assert paths(table) == ["train/jump/x/y/c.mp4", "train/run/b.mp4", "train/run/day1/a.mp4"]
    assert labels(table) == [0, 1, 1]


def test_folders_of_pictures_may_lie_deeper(tmp_path):
    write(
        tmp_path, {f"train/{clip}/{n:05d}.jpg": "" for clip in ("run/day1/a", "run/day1/b", "jump/c") for n in (1, 2)}
    )
    card = custom(layout="folders", splits={"train": "train"}, file="{path}/{00001..}.jpg")
    table = read_split(card, "train", str(tmp_path))
    assert paths(table) == [f"train/{clip}/{{00001..}}.jpg" for clip in ("jump/c", "run/day1/a", "run/day1/b")]


def test_side_files_are_no_samples_and_are_counted(tmp_path):
    sides = ["train/run/Thumbs.db", "train/run/README.txt", "train/jump/labels.csv", "train/jump/sub/a.mp4.md5"]
    write(tmp_path, dict.fromkeys(["train/run/a.MP4", "train/run/b.avi", "train/jump/c.webm", *sides], ""))
    found = read_split(custom(layout="folders", splits={"train": "train"}), "train", str(tmp_path))
    assert paths(found) == ["train/jump/c.webm", "train/run/a.MP4", "train/run/b.avi"]
    (said,) = notes_of(found)
    some = "jump/labels.csv, jump/sub/a.mp4.md5, run/README.txt, ..."
    assert said == f"left out 4 files that are not clips, judging by their extension ({some})"
    matched = read_split(custom(layout="files", splits={"train": "train/{class}/*"}), "train", str(tmp_path))
    assert paths(matched) == paths(found)
    assert notes_of(matched)[0].startswith("left out 3 files that are not clips")


def test_files_without_a_known_ending_are_all_samples(tmp_path):
    write(tmp_path, {"train/run/a": "", "train/jump/b": ""})
    table = read_split(custom(layout="folders", splits={"train": "train"}), "train", str(tmp_path))
    assert (paths(table), notes_of(table)) == (["train/jump/b", "train/run/a"], [])


@pytest.mark.parametrize("columns", [["path", "label"], ["path", "label", "*"]])
def test_a_list_of_path_frames_and_label_is_not_taken_for_another(tmp_path, columns):
    write(tmp_path, {"train.txt": "a.mp4 120 0\nb.mp4 37 1\nc.mp4 300 0\n"})
    with pytest.raises(UserError, match=r"write columns: \[path, frames, label\]"):
        read_split(custom(columns=columns), "train", str(tmp_path))
    table = read_split(custom(columns=["path", "frames", "label"]), "train", str(tmp_path))
    assert (labels(table), table.column("frames").to_pylist()) == ([0, 1, 0], [120, 37, 300])
    write(tmp_path, {"train.txt": "a.mp4 1 9\nb.mp4 0 7\n"})
    assert labels(read_split(custom(columns=["path", "label", "*"]), "train", str(tmp_path))) == [1, 0]


def test_blanks_in_paths_are_part_of_them(tmp_path):
    write(tmp_path, {"train.txt": "my  first clip.mp4 1\nplain.mp4 0\nrun/a b/c.avi\t1\n"})
    table = read_split(custom(), "train", str(tmp_path))
    assert paths(table) == ["my  first clip.mp4", "plain.mp4", "run/a b/c.avi"]
    assert labels(table) == [1, 0, 1]
    write(tmp_path, {"train.txt": "frames of a 12 0\nb 30 1\n"})
    card = custom(columns=["path", "frames", "label"], file="{path}/{00001..}.jpg")
    table = read_split(card, "train", str(tmp_path))
    assert paths(table) == ["frames of a/{00001..00012}.jpg", "b/{00001..00030}.jpg"]


def test_a_leading_blank_is_part_of_a_name(tmp_path):
    write(tmp_path, {"train.csv": " a.mp4, 0\nb.mp4, 1\n"})
    table = read_split(custom(splits={"train": "train.csv"}, delimiter=","), "train", str(tmp_path))
    assert paths(table) == [" a.mp4", "b.mp4"]
    write(tmp_path, {"train.csv": "0, a.mp4\n1, b.mp4\n"})
    card = custom(splits={"train": "train.csv"}, delimiter=",", columns=["label", "path"])
    assert paths(read_split(card, "train", str(tmp_path))) == ["a.mp4", "b.mp4"]


def test_classes_without_a_sample_are_said(tmp_path):
    write(tmp_path, {"train.txt": "a.mp4 0\nb.mp4 7\nc.mp4 100\n"})
    card = complete(custom(), str(tmp_path))
    table = read_split(card, "train", str(tmp_path))
    assert unused_labels(card, [table]) == "no sample is of 98 of the 101 classes (1, 2, 3, 4, 5, ...)"
    write(tmp_path, {"train.txt": "a.mp4 0\nb.mp4 1\n"})
    card = complete(custom(), str(tmp_path))
    assert unused_labels(card, [read_split(card, "train", str(tmp_path))]) == ""
