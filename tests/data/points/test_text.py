"""Numbers in lines are read as they were written in any dialect; if they can be read in two ways, the user is asked."""

import gzip

import numpy as np
import pytest
from tests.point_files import POINTS, written

from slimray.data.points.files import read_cloud
from slimray.data.samples import BadSample


def assert_reads(data: bytes, points, *args, name: str = "a.txt", atol: float = 5.1e-4) -> None:
    cloud = read_cloud(name, data, *args)
    assert len(cloud) == len(points)
    assert np.allclose(cloud.coords + cloud.origin, points, atol=atol, rtol=1e-6)


@pytest.mark.parametrize("delimiter", [";", " ", "\t", "; ", " ; "])
@pytest.mark.parametrize("decimal", [",", "."])
def test_decimal_commas_and_points_are_told_apart(delimiter, decimal):
    assert_reads(written(POINTS, delimiter=delimiter, decimal=decimal), POINTS)


@pytest.mark.parametrize("delimiter", [",", ", ", " , "])
def test_commas_separate_numbers_with_points(delimiter):
    assert_reads(written(POINTS, delimiter=delimiter, decimal="."), POINTS)


def test_reported_decimal_commas_and_a_cloudcompare_header_read_right(shared):
    reported = shared / "data/reported"
    cloud = read_cloud("a.txt", (reported / "P4_decimal_comma/a.txt").read_bytes())
    assert len(cloud) == 2000
    assert np.allclose(cloud.coords[0], [2.739, -4.604, -9.181])
    cloud = read_cloud("a.pts", (reported / "P5_cloudcompare_header/a.pts").read_bytes())
    assert len(cloud) == 2000
    assert np.allclose(cloud.coords[0], [2.739234, -4.604266, -9.180530])
    first = [0.347869, 0.397238, 0.669004, 0.631397, 0.160469]
    names = ["intensity", "curvature", "illuminance_(pcv)", "volume_density_(r=0.01)", "roughness(0.01)"]
    assert np.allclose([cloud.features[name][0, 0] for name in names], first)
    assert np.allclose(cloud.features["normals"][0], [0.037367, 0.477730, 0.092304])
    assert np.allclose(cloud.features["colors"][0], [0.372633, 0.893248, 0.478006])


def test_three_places_behind_every_comma_are_a_question_that_names_the_choices():
    points = np.random.default_rng(0).uniform(1, 9, (50, 3))  # 1,234 is 1.234 or 1234
    with pytest.raises(BadSample, match=r"read in 2 ways: .* decimal=comma\) or .* decimal=point, ',' for thousands"):
        read_cloud("a.txt", written(points))
    assert_reads(written(points), points, ("decimal=comma",))
    assert_reads(written(points), np.round(points * 1000), ("x", "y", "z", "decimal=point"), atol=0.6)
    assert_reads(written(points, places=4), points)


@pytest.mark.parametrize(("decimal", "thousands"), [(".", ","), (",", ".")])
def test_marks_of_thousands_are_no_decimal_marks(decimal, thousands):
    points = np.random.default_rng(0).uniform(100, 1e6, (50, 3))
    assert_reads(written(points, 2, ";", decimal, thousands), points, atol=0.07)


def test_quoted_numbers_may_hold_the_delimiter():
    rows = "\n".join(",".join(f'"{value:,.2f}"' for value in row) for row in POINTS * 5000)
    assert_reads(f'"x","y","z"\n{rows}\n'.encode(), POINTS * 5000, atol=0.07)
    rows = "\n".join(",".join(f'"{value:.4f}"'.replace(".", ",") for value in row) for row in POINTS)
    assert_reads(f'"x","y","z"\n{rows}\n'.encode(), POINTS)


@pytest.mark.parametrize("points", [POINTS, POINTS * 30_000])
def test_commas_between_and_within_numbers_are_a_question(points):
    thousands = "," if np.abs(points).max() > 1000 else ""
    data = written(np.abs(points) + 1000, 2, ",", ".", thousands) if thousands else written(points, 3, ",", ",")
    with pytest.raises(BadSample, match=r"(6 columns, or 3 with|the number of columns changed)"):
        read_cloud("a.txt", data)


def test_whole_numbers_between_commas_are_columns():
    lines = "".join(f"{i},{i * 7 % 100},{i % 3},{i * 31 % 256},{i % 256},{i * 3 % 256}\n" for i in range(300))
    cloud = read_cloud("a.csv", lines.encode())
    assert cloud.coords[9].tolist() == [9, 63, 0]
    assert cloud.features["extra"].shape == (300, 3)


def test_an_empty_field_is_a_missing_number_and_shifts_nothing():
    data = b"x,y,z,intensity,label\n1,2,3,,1\n4,5,6,0.5,2\n7,,8,1,3\n1,1,1,1,1\n"
    cloud = read_cloud("a.csv", data, needs=("label",))
    assert cloud.coords.tolist() == [[1, 2, 3], [4, 5, 6], [1, 1, 1]]
    assert cloud.labels.tolist() == [1, 2, 1]
    assert np.isnan(cloud.features["intensity"][0])
    assert cloud.removed == {"x, y, z": 1}
    assert read_cloud("a.csv", data).removed == {"x, y, z": 1, "intensity": 1}
    for mark in (b";", b"\t"):
        other = read_cloud("a.csv", data.replace(b",", mark), needs=("label",))
        assert np.array_equal(other.coords, cloud.coords)
    assert read_cloud("a.csv", b"1,2,3,,1\n4,5,6,,2\n", ("x", "y", "z", "-", "label")).labels.tolist() == [1, 2]


def test_a_delimiter_at_the_end_of_every_line_is_no_column():
    assert set(read_cloud("a.csv", b"X;Y;Z;I;\n1;2;3;4;\n4;5;6;7;\n").features) == {"i"}
    assert read_cloud("a.csv", b"1;2;3;\n4;5;6;\n").coords.tolist() == [[1, 2, 3], [4, 5, 6]]


@pytest.mark.parametrize("word", ["NA", "n/a", "null", "-nan(ind)", "nan", "1.#QNAN", "inf"])
@pytest.mark.parametrize("mark", [" ", ",", ";"])
def test_words_for_missing_numbers_are_known(word, mark):
    data = f"1 2 3 {word}\n4 5 6 1\n7 8 9 2\n".replace(" ", mark).encode()
    cloud = read_cloud("a.txt", data, ("x", "y", "z", "intensity"))
    assert cloud.coords.tolist() == [[4, 5, 6], [7, 8, 9]]
    assert cloud.removed == {"intensity": 1}


@pytest.mark.parametrize(
    "data",
    [
        b"\xef\xbb\xbfX,Y,Z\r\n1.5,2,3\r\n4,5,6\r\n",
        b"X,Y,Z\r1.5,2,3\r4,5,6\r",
        "X;Y;Z\r\n1,5;2;3\r\n4;5;6\r\n".encode("utf-16"),
        "X;Y;Z\r\n1,5;2;3\r\n4;5;6\r\n".encode("utf-16-be").join([b"\xfe\xff", b""]),
        gzip.compress(b"1.5 2 3\n4 5 6\n", mtime=0),
        gzip.compress(b"1.5 2 3\n", mtime=0) + gzip.compress(b"4 5 6\n", mtime=0),
        b"// made by\n//X;Y;Z\n2\n1.5;2;3\n4;5;6\n",
        b'"Points:0","Points:1","Points:2"\n1.5,2,3\n4,5,6\n',
    ],
)
def test_line_ends_marks_of_encodings_and_gzip_do_not_matter(data):
    assert read_cloud("a.txt", data).coords.tolist() == [[1.5, 2, 3], [4, 5, 6]]


def test_words_are_refused_unless_their_column_is_left_out():
    data = b"x,y,z,name\n1,2,3,tree\n4,5,6,car\n"
    with pytest.raises(BadSample, match=r"'tree' at row 1, column 4, is not a number .*: skip the column with -"):
        read_cloud("a.csv", data)
    assert read_cloud("a.csv", data, ("x", "y", "z", "-")).coords.tolist() == [[1, 2, 3], [4, 5, 6]]


def test_a_header_that_does_not_fit_its_lines_is_refused_unless_the_user_names_the_columns():
    data = b"//X Y Z Scalar field\n2\n1 2 3 4\n4 5 6 4\n"
    with pytest.raises(BadSample, match="has 4 columns, but its header names 5: name the columns yourself"):
        read_cloud("a.txt", data)
    assert read_cloud("a.txt", data, ("x", "y", "z", "label")).labels.tolist() == [4, 4]
    assert read_cloud("a.csv", b"easting,northing,height\n1,2,3\n4,5,6\n", ("x", "y", "z")).coords.shape == (2, 3)


@pytest.mark.parametrize("data", [b"1,2 3\n4,5 6\n", b"1;2,3\n4;5,6\n7;8\n", b"1 2;3 4;5 6\n1 2;3 4;5 6\n"])
def test_mixed_delimiters_are_refused(data):
    with pytest.raises(BadSample, match=r"delimiter=|number of columns"):
        read_cloud("a.txt", data)


@pytest.mark.parametrize("entry", ["decimal=x", "delimiter=;", "label=", "label"])
def test_columns_that_cannot_be_meant_are_refused(entry):
    with pytest.raises(
        BadSample, match=r"the list of its columns is invalid: label|the list of its columns is invalid: de"
    ):
        read_cloud("a.txt", b"1 2 3 4\n4 5 6 7\n", ("x", "y", "z", "label", entry))


def test_comment_lines_cost_time_in_proportion():
    """A hundred thousand of them took minutes when each was sliced off the text."""
    assert len(read_cloud("a.txt", b"#\n" * 200_000 + b"1 2 3\n4 5 6\n")) == 2
