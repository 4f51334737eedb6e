"""Images within larger files: zip members, tar members and Parquet rows, read by range; and what damage costs."""

import random
import struct
import zipfile

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines import storage
from pipelines.source_config import LlavaSource, ParquetSource, WebDatasetSource
from pipelines.sources import open_source
from pipelines.sources.files import FileSet, location, parse_location
from pipelines.sources.images import open_images
from pipelines.sources.zip_index import ZipIndex, read_member
from tests.helpers.corpora import conversation, write_files, write_parquet, write_tar, write_zip
from tests.helpers.images import encoded


def reasons(records) -> list[str | None]:
    return [record.problem and record.problem.reason for record in records]


class TestFileSet:
    @pytest.fixture
    def folder(self, tmp_path):
        return write_files(tmp_path, {f"{part}/s-{i:03}.tar": b"" for part in ("a", "b") for i in (8, 9, 10)})

    @pytest.mark.parametrize(
        ("pattern", "names"),
        [
            ("a/s-008.tar", ["s-008.tar"]),
            ("a/s-{008..010}.tar", ["s-008.tar", "s-009.tar", "s-010.tar"]),
            ("a/s-{010,008}.tar", ["s-010.tar", "s-008.tar"]),
            ("a/s-*.tar", ["s-008.tar", "s-009.tar", "s-010.tar"]),
            ("a/s-?10.tar", ["s-010.tar"]),
            ("{b,a}/s-{9..9}*.tar", None),
            ("{b,a}/s-009.tar", ["b/s-009.tar", "a/s-009.tar"]),
            ("*/s-*9.tar", ["a/s-009.tar", "b/s-009.tar"]),
            (["b/s-008.tar", "a/s-*0.tar"], ["b/s-008.tar", "a/s-010.tar"]),
        ],
    )
    def test_patterns(self, folder, pattern, names):
        patterns = [str(folder / one) for one in ([pattern] if isinstance(pattern, str) else pattern)]
        files = FileSet(patterns)
        if names is None:
            with pytest.raises(FileNotFoundError, match=r"there is no file .*s-9\*\.tar"):
                files.names()
            return
        assert files.names() == names
        assert all(storage.exists(files.path(name)) for name in names)

    def test_a_file_that_is_not_there_is_named(self, folder):
        with pytest.raises(FileNotFoundError, match=r"there is no file .*/a/s-011\.tar"):
            FileSet(str(folder / "a/s-{010..012}.tar")).names()

    def test_the_fingerprint_follows_the_files(self, folder):
        files = FileSet(str(folder / "a/*.tar"))
        before = files.fingerprint()
        assert files.fingerprint() == before
        (folder / "a/s-009.tar").write_bytes(b"longer")
        assert files.fingerprint() != before

    def test_a_client_whose_errors_are_its_own_gives_one_line_with_the_files(self, monkeypatch):
        class Unreachable(Exception):
            pass

        def open_fs(uri):
            raise Unreachable("Name or service\nnot known")

        monkeypatch.setattr(storage, "open_fs", open_fs)
        with pytest.raises(
            OSError, match=r"hf://datasets/org/name/\*\.parquet cannot be listed \(Unreachable: Name or"
        ):
            FileSet("hf://datasets/org/name/*.parquet").names()

    def test_locations(self):
        assert parse_location(location("a/b.tar", 512, 10, "k.0.jpg")) == ("a/b.tar", 512, 10, "k.0.jpg")
        with pytest.raises(ValueError, match="not a location"):
            parse_location("a.jpg")


class TestZip:
    @pytest.fixture
    def files(self):
        return {f"{i % 7:02}/{i:05}.png": encoded(i) for i in range(300)} | {"ü/空.png": encoded(7777)}

    @pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
    def test_every_member_is_found_and_read(self, tmp_path, files, compression):
        path = write_zip(tmp_path / "a.zip", files, compression)
        lister, worker = open_images(str(path)), open_images(str(path))
        assert {name: worker.read(lister.locate(name)) for name in files} == files
        assert lister.locate("00/none.png") is None
        assert lister.locate("ü/空.png").endswith("!ü/空.png")
        assert "_index" not in vars(worker)  # who only reads does without the directory

    def test_zip64_in_all_its_places(self, tmp_path, monkeypatch, files):
        monkeypatch.setattr(zipfile, "ZIP64_LIMIT", 10_000)  # as if every size and offset beyond were 4 GB
        monkeypatch.setattr(zipfile, "ZIP_FILECOUNT_LIMIT", 100)
        files = files | {"large.png": random.Random(0).randbytes(20_000)}
        path = write_zip(tmp_path / "a.zip", files)
        data = path.read_bytes()
        assert b"PK\x06\x06" in data  # the zip64 end record
        assert data.count(struct.pack("<L", 0xFFFFFFFF)) > 10
        images = open_images(str(path))
        assert {name: images.read(images.locate(name)) for name in files} == files

    def test_the_directory_in_pieces(self, tmp_path, monkeypatch, files):
        monkeypatch.setattr("pipelines.sources.zip_index._CHUNK", 37)
        path = write_zip(tmp_path / "a.zip", files)
        with pa.OSFile(str(path)) as file:
            assert len(ZipIndex(file)) == len(files)

    def test_a_comment_a_folder_and_a_name_twice(self, tmp_path):
        path = tmp_path / "a.zip"
        with zipfile.ZipFile(path, "w") as archive:
            archive.mkdir("folder")
            archive.writestr("folder/a", b"first")
            with pytest.warns(UserWarning, match="Duplicate name"):
                archive.writestr("folder/a", b"second")
            archive.comment = b"some words about it"
        images = open_images(str(path))
        assert images.read(images.locate("folder/a")) == b"second"
        assert images.locate("folder/") is None

    def test_damage(self, tmp_path):
        path = write_zip(tmp_path / "a.zip", {"a": b"x" * 500, "b": b"y" * 500}, zipfile.ZIP_DEFLATED)
        data = path.read_bytes()
        for broken, message in (
            (b"not a zip", "not a zip archive"),
            (data[:-10], "not a zip archive"),
            (data[20:], "lies outside the file|directory is damaged"),
            (data.replace(b"PK\x01\x02", b"PK\x00\x00"), "directory is damaged"),
        ):
            path.write_bytes(broken)
            with pytest.raises(ValueError, match=message):
                open_images(str(path)).locate("a")
        path.write_bytes(data)
        images = open_images(str(path))
        where = images.locate("a"), images.locate("b")
        for broken, message in (
            (data.replace(b"PK\x03\x04", b"PK\x00\x00"), "no member there"),
            (data[:30] + b"z" + data[31:], "another member there"),
            (data[:6] + b"\1" + data[7:], "encrypted or packed"),
            (data[:14] + b"\0\0\0\0" + data[18:], "checksum is wrong"),
            (data[:31] + b"\xff" + data[32:], "data is damaged"),
        ):
            path.write_bytes(broken)
            with pytest.raises(ValueError, match=message):
                open_images(str(path)).read(where[0])
        assert open_images(str(path)).read(where[1]) == b"y" * 500

    def test_a_member_that_unpacks_without_end(self, tmp_path):
        path = write_zip(tmp_path / "a.zip", {"a": bytes(1_000_000)}, zipfile.ZIP_DEFLATED)
        with pa.OSFile(str(path)) as file:
            offset, length, _ = ZipIndex(file).find("a")
            with pytest.raises(storage.TooLarge, match="more than 1000 bytes"):
                read_member(lambda at, size: file.read_at(size, at), offset, length, "a", 1000)

    def test_a_zip_made_on_a_mac(self, tmp_path):
        """Names in UTF-8 without the flag for it, decomposed, in one folder, with what macOS puts beside them."""
        name = "pics/u\u0308ber.png"
        files = {name: encoded(1), "pics/a.png": encoded(2), "__MACOSX/pics/._a.png": b"resource fork"}
        data = bytearray(write_zip(tmp_path / "a.zip", files).read_bytes())
        for mark, at in ((b"PK\x03\x04", 7), (b"PK\x01\x02", 9)):  # the flag's byte in local and central headers
            start = -1
            while (start := data.find(mark, start + 1)) >= 0:
                data[start + at] &= ~0x08
        (tmp_path / "a.zip").write_bytes(data)
        assert zipfile.ZipFile(tmp_path / "a.zip").namelist()[0] != name  # zipfile takes it for cp437
        images = open_images(str(tmp_path / "a.zip"))
        for wanted in (name, "pics/\u00fcber.png", "\u00fcber.png", "u\u0308ber.png"):
            assert images.read(images.locate(wanted)) == encoded(1)
        assert images.read(images.locate("a.png")) == images.read(images.locate("pics/a.png")) == encoded(2)
        assert images.locate("b.png") is None

    def test_a_folder_on_top_counts_only_where_all_is_in_it(self, tmp_path):
        path = write_zip(tmp_path / "a.zip", {"pics/a.png": encoded(1), "b.png": encoded(2)})
        images = open_images(str(path))
        assert images.locate("a.png") is None
        assert images.read(images.locate("b.png")) == encoded(2)

    def test_a_folder_whose_names_are_composed_otherwise(self, tmp_path):
        write_files(tmp_path, {"u\u0308.png": encoded(1), "\u00e9.png": encoded(2)})
        images = open_images(str(tmp_path))
        assert images.read("\u00fc.png") == images.read("u\u0308.png") == encoded(1)
        assert images.read("e\u0301.png") == encoded(2)
        with pytest.raises(FileNotFoundError):
            images.read("\u00e0.png")

    def test_llava_in_a_zip(self, tmp_path):
        entries = [
            {"id": str(i), "image": name, "conversations": conversation("<image>\nWhat?", "This.")}
            for i, name in enumerate(["00/a.png", "00/gone.png", "00/b.png"])
        ]
        write_files(tmp_path, {"a.json": entries})
        write_zip(tmp_path / "images.zip", {"00/a.png": encoded(1), "00/b.png": encoded(2)})
        config = {"type": "llava", "annotations": str(tmp_path / "a.json"), "images": str(tmp_path / "images.zip")}
        source = open_source(LlavaSource(**config))
        records = list(source.records())
        assert reasons(records) == [None, "image_missing", None]
        assert source.read_image(records[2].images[0]) == encoded(2)
        before = source.fingerprint()
        write_zip(tmp_path / "images.zip", {"00/a.png": encoded(1)})
        assert open_source(LlavaSource(**config)).fingerprint() != before
        (tmp_path / "images.zip").unlink()
        with pytest.raises(FileNotFoundError, match=r"there is no archive .*images\.zip"):
            list(open_source(LlavaSource(**config)).records())


def webdataset(*shards, **fields):
    fields = fields or {"conversation": "json.conversations"}
    return open_source(WebDatasetSource(type="webdataset", shards=[str(shard) for shard in shards], **fields))


def sample(key: str, number: int = 0) -> list[tuple]:
    text = {"conversations": conversation("<image>\nWhich?", f"Number {number}.")}
    return [(f"{key}.png", encoded(number)), (f"{key}.json", text)]


def _with_size(tar: bytes, header: int, size: bytes) -> bytes:
    """A tar in which one header has another size, and the checksum for it."""
    block = bytearray(tar[header : header + 512])
    block[124:136], block[148:156] = size, b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return tar[:header] + bytes(block) + tar[header + 512 :]


class TestWebDataset:
    def test_samples_and_their_images(self, tmp_path):
        write_tar(tmp_path / "s-0.tar", [*sample("d/one", 1), ("d/one.cls", b"3"), *sample("d/two.x"[:5], 2)])
        write_tar(tmp_path / "s-1.tar", sample("three", 3))
        source = webdataset(tmp_path / "s-{0..1}.tar")
        records = list(source.records())
        assert [record.id for record in records] == ["s-0/d/one", "s-0/d/two", "s-1/three"]
        assert [source.read_image(record.images[0]) for record in records] == [encoded(i) for i in (1, 2, 3)]
        assert records[2].turns[1].text == "Number 3."
        assert records[0].images[0].endswith("!one.png")

    def test_captions_questions_text_only_and_several_images(self, tmp_path):
        many = conversation("<image>" * 11, "Eleven.")
        tar = write_tar(
            tmp_path / "s.tar",
            [(f"many.{i}.png", encoded(i)) for i in sorted(range(11), key=str)]
            + [("many.json", {"conversations": many, "q": "How many?", "a": "Eleven.", "c": "Colours."})]
            + [("text.json", {"conversations": conversation("Hi", "Hello"), "q": "Hi", "a": "Ho", "c": "Nothing."})],
        )
        source = webdataset(tar, conversation="json.conversations", text_only=True)
        one, text = source.records()
        assert [source.read_image(place) for place in one.images] == [encoded(i) for i in range(11)]  # not 0, 1, 10, 2
        assert (text.images, text.turns[0].images) == ([], 0)
        one, text = webdataset(tar, question="json.q", answer="json.a", text_only=True).records()
        assert [turn.text for turn in one.turns] == ["How many?", "Eleven."]
        assert (one.turns[0].images, text.turns[0].images) == (11, 0)
        one, blind = webdataset(tar, caption="json.c", prompts=["Describe."]).records()
        assert [turn.text for turn in one.turns] == ["Describe.", "Colours."]
        assert blind.problem.reason == "image_missing"

    def test_a_bad_sample_costs_itself(self, tmp_path):
        data = encoded()
        members = [
            *sample("good-1", 1),
            ("no-text.png", data),
            ("no-key.png", data),
            ("no-key.json", {"other": 1}),
            ("broken.png", data),
            ("broken.json", b'{"conversations": ['),
            ("binary.png", data),
            ("binary.json", b"\xff\xfe\x00"),
            ("no-image.json", {"conversations": conversation("<image>\nWhat?", "This.")}),
            ("twice.png", data),
            *sample("twice"),
            ("README", b"belongs to no sample"),
            *sample("good-2", 2),
        ]
        records = list(webdataset(write_tar(tmp_path / "s.tar", members)).records())
        assert {record.id[2:]: record.problem and record.problem.reason for record in records} == {
            "good-1": None,
            "no-text": "malformed",
            "no-key": "malformed",
            "broken": "malformed",
            "binary": "malformed",
            "no-image": "image_missing",
            "twice": "malformed",
            "good-2": None,
        }
        details = {record.id[2:]: record.problem.detail for record in records if record.problem}
        assert details["no-text"] == "the sample has no file .json"
        assert details["no-key"] == "the file .json has no 'conversations'"
        assert details["twice"] == "the sample has two files .png"

    def test_a_damaged_shard_gives_what_lies_before_the_damage(self, tmp_path):
        members = [member for i in range(4) for member in sample(f"{i}", i)]
        data = write_tar(tmp_path / "s-0.tar", members).read_bytes()
        write_tar(tmp_path / "s-1.tar", sample("other"))
        third = data.index(b"2.png")
        header = bytearray(data)
        header[third + 130] ^= 0xFF
        damaged = {
            "header": (bytes(header), 2),
            "cut in an image": (data[: third + 512 + 10], 2),
            "cut in a header": (data[: third + 100], 2),
            "no end": (data[: data.rindex(b"}") + 1].ljust(-(-(data.rindex(b"}") + 1) // 512) * 512, b"\0"), 4),
            "absurd number": (_with_size(data, third, b"\x80" + b"\xff" * 11), 2),
            "not a tar": (b"something else" * 100, 0),
            "empty": (b"", 0),
        }
        for name, (content, good) in damaged.items():
            (tmp_path / "s-0.tar").write_bytes(content)
            records = list(webdataset(tmp_path / "s-{0..1}.tar").records())
            ids = [record.id for record in records if record.problem is None]
            assert ids == [*(f"s-0/{i}" for i in range(good)), "s-1/other"], name
            assert reasons(records).count("shard_damaged") == 1, name
        (tmp_path / "s-0.tar").write_bytes(data)
        assert reasons(webdataset(tmp_path / "s-0.tar").records()) == [None] * 4

    def test_the_share_that_is_lost_is_told_by_bytes(self, tmp_path):
        members = [member for i in range(10) for member in sample(f"{i}", i)]
        whole = write_tar(tmp_path / "s-0.tar", members).read_bytes()
        write_tar(tmp_path / "s-1.tar", members)
        (tmp_path / "s-0.tar").write_bytes(whole[: len(whole) * 3 // 10])
        (damaged,) = (r for r in webdataset(tmp_path / "s-{0..1}.tar").records() if r.problem and r.problem.lost)
        assert 0.33 < damaged.problem.lost / damaged.problem.of < 0.38  # 70% of one of two
        (alone,) = (r for r in webdataset(tmp_path / "s-0.tar").records() if r.problem and r.problem.lost)
        assert alone.problem.lost == alone.problem.of > 0  # how large it was nobody knows

    def test_a_field_that_no_sample_has_stops_with_those_that_they_have(self, tmp_path):
        write_tar(tmp_path / "s.tar", sample("one") + sample("two"))
        for limit in (None, 1):
            with pytest.raises(ValueError, match=r"no sample has a file \.txt; the samples have \.png, \.json"):
                list(webdataset(tmp_path / "s.tar", caption="txt", limit=limit).records())

    def test_a_caption_without_its_image(self, tmp_path):
        members = [("a.jpg", encoded(kind="JPEG")), ("a.txt", "A dog."), ("b.txt", "A cat."), ("c.txt", "A film.")]
        tar = write_tar(
            tmp_path / "s.tar", [*members, ("c.mp4", b"video"), ("d.txt", "Blurred."), ("d.heic", b"image")]
        )
        records = list(webdataset(tar, caption="txt").records())
        assert reasons(records) == [None, "image_missing", "image_missing", "image_missing"]
        details = [record.problem.detail for record in records[1:]]
        assert "(its files: .txt); text_only: true" in details[0]
        assert ".mp4, which is video" in details[1]
        assert ".heic, an image in a format that is not read" in details[2]
        wanted = list(webdataset(tar, caption="txt", text_only=True).records())
        assert [len(record.images) for record in wanted] == [1, 0, 0, 0]
        assert reasons(wanted) == [None] * 4

    def test_a_key_of_the_json_that_names_an_image_counts_where_there_is_none(self, tmp_path):
        text = {"conversations": conversation("What?", "This."), "image": "a.jpg"}
        (record,) = webdataset(write_tar(tmp_path / "s.tar", [("a.json", text)])).records()
        assert "the entry has image, which names an image" in record.problem.detail

    def test_a_mask_beside_an_image_is_none_of_the_sample(self, tmp_path):
        files = [("1.jpg", encoded(1)), ("1.mask.png", encoded(2)), ("1.txt", "A dog."), ("2.left.png", encoded(3))]
        one, two = webdataset(write_tar(tmp_path / "s.tar", [*files, ("2.txt", "Two.")]), caption="txt").records()
        assert [location.rpartition("!")[2] for location in one.images] == ["1.jpg"]
        assert "(its files: .left.png, .txt)" in two.problem.detail

    def test_a_text_that_is_nested_too_deeply_costs_its_sample(self, tmp_path):
        members = [*sample("a"), ("b.png", encoded()), ("b.json", "[" * 200_000), *sample("c")]
        records = list(webdataset(write_tar(tmp_path / "s.tar", members)).records())
        assert reasons(records) == [None, "malformed", None]
        assert "nested too deeply" in records[1].problem.detail

    def test_a_compressed_shard_is_refused(self, tmp_path):
        write_files(tmp_path, {"s.tar.gz": b""})
        with pytest.raises(ValueError, match=r"s\.tar\.gz is compressed.*unpack the shards"):
            list(webdataset(tmp_path / "s.tar.gz").records())


IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
MESSAGES = pa.list_(pa.struct([("from", pa.string()), ("value", pa.string())]))


def parquet(*files, **fields):
    return open_source(ParquetSource(type="parquet", files=[str(file) for file in files], **fields))


class TestParquet:
    def test_the_hugging_face_layout(self, tmp_path):
        texts = [conversation(f"<image>\nWhich is {i}?", f"Number {i}.") for i in range(10)]
        texts[6] = conversation("No image?", "None.")
        images = [{"bytes": encoded(i), "path": f"{i}.png"} for i in range(10)]
        images[6] = None
        schema = pa.schema([("image", IMAGE), ("conversations", MESSAGES)])
        for i in range(2):
            half = slice(5 * i, 5 * i + 5)
            columns = {"image": images[half], "conversations": texts[half]}
            write_parquet(tmp_path / f"data/train-{i:05}.parquet", columns, schema, rows=2)
        blind = parquet(tmp_path / "data/train-*.parquet", conversation="conversations")
        assert reasons(blind.records()) == [None] * 6 + ["image_missing"] + [None] * 3
        source = parquet(tmp_path / "data/train-*.parquet", conversation="conversations", text_only=True)
        records = list(source.records())
        assert reasons(records) == [None] * 10
        assert [len(record.images) for record in records] == [1] * 6 + [0] + [1] * 3
        assert records[7].id == "train-00001/1/0"
        assert records[7].turns[1].text == "Number 7."
        for order in (range(10), range(9, -1, -1)):
            for i in order:
                if i != 6:
                    assert source.read_image(records[i].images[0]) == encoded(i)

    @pytest.mark.parametrize("kind", [IMAGE, pa.binary()])
    def test_lists_of_images(self, tmp_path, kind):
        def stored(i):
            return encoded(i) if pa.types.is_binary(kind) else {"bytes": encoded(i), "path": None}

        schema = pa.schema([("images", pa.list_(kind)), ("texts", pa.string()), ("name", pa.int64())])
        pair = '[{"user": "<image><image> Which is older?", "assistant": "The second."}]'
        columns = {
            "images": [[stored(1), stored(2)], [], None, [stored(3)]],
            "texts": [pair, pair.replace("<image>", ""), pair.replace("<image>", ""), pair],
            "name": [7, 8, 9, 10],
        }
        write_parquet(tmp_path / "a.parquet", columns, schema)
        source = parquet(tmp_path / "a.parquet", image="images", conversation="texts", id="name")
        records = list(source.records())
        assert [record.id for record in records] == ["7", "8", "9", "10"]
        assert reasons(records) == [None, None, "image_missing", "placeholder_mismatch"]
        assert [source.read_image(place) for place in records[0].images] == [encoded(1), encoded(2)]

    def test_captions_questions_and_chat_messages(self, tmp_path):
        parts = [{"type": "image", "text": None}, {"type": "text", "text": "What?"}]
        answer = [{"type": "text", "text": "This."}]
        columns = {
            "image": [encoded(1)],
            "caption": ["A square."],
            "q": ["What?"],
            "a": ["A square."],
            "messages": [[{"role": "user", "content": parts}, {"role": "assistant", "content": answer}]],
        }
        write_parquet(tmp_path / "a.parquet", columns)
        for fields in ({"caption": "caption"}, {"question": "q", "answer": "a"}, {"conversation": "messages"}):
            (record,) = parquet(tmp_path / "a.parquet", **fields).records()
            assert record.problem is None
            assert record.turns[0].images == 1

    def test_bad_rows_cost_themselves(self, tmp_path):
        images = [{"bytes": encoded(), "path": "a.png"} for _ in range(6)]
        images[1] = {"bytes": None, "path": "elsewhere.png"}
        not_text = pa.array([b"\xff\xfe", b"good"], pa.binary()).view(pa.string())
        captions = pa.chunked_array([pa.array(["", "good", None, "good"], pa.string()), not_text])
        columns = {"image": pa.array(images, IMAGE), "caption": captions}
        pq.write_table(pa.table(columns), tmp_path / "a.parquet")
        source = parquet(tmp_path / "a.parquet", caption="caption")
        records = list(source.records())
        assert reasons(records) == [None, None, "malformed", None, "malformed", None]
        assert "not valid Unicode" in records[4].problem.detail
        with pytest.raises(FileNotFoundError, match="row 1 has a path and no bytes of image 0: embed the images"):
            source.read_image(records[1].images[0])
        assert source.read_image(records[5].images[0]) == encoded()

    def test_paths_without_bytes_and_text_for_images(self, tmp_path):
        write_parquet(tmp_path / "a.parquet", {"image": ["1.png"], "caption": ["a"]})
        with pytest.raises(ValueError, match=r"column image of a\.parquet holds text, expected encoded images"):
            list(parquet(tmp_path / "a.parquet", caption="caption").records())
        write_parquet(tmp_path / "b.parquet", {"image": [{"path": "1.png"}], "caption": ["a"]})
        with pytest.raises(ValueError, match=r"holds objects of path, expected encoded images"):
            list(parquet(tmp_path / "b.parquet", caption="caption").records())

    def test_a_caption_or_question_without_its_image(self, tmp_path):
        columns = {"image": [[encoded()], [], None], "caption": ["a", "b", "c"]}
        write_parquet(
            tmp_path / "a.parquet", columns, pa.schema([("image", pa.list_(pa.binary())), ("caption", "string")])
        )
        records = list(parquet(tmp_path / "a.parquet", caption="caption").records())
        assert reasons(records) == [None, "image_missing", "image_missing"]
        assert "column image is null; text_only: true" in records[2].problem.detail
        assert reasons(parquet(tmp_path / "a.parquet", caption="caption", text_only=True).records()) == [None] * 3
        assert reasons(parquet(tmp_path / "a.parquet", caption="caption", image=None).records()) == [None] * 3

    def test_several_captions_of_an_image_are_a_record_each(self, tmp_path):
        columns = {
            "image": [encoded(1), encoded(2)],
            "captions": [["A dog.", "A brown dog."], ["A cat."]],
            "id": ["d", "c"],
        }
        write_parquet(tmp_path / "a.parquet", columns)
        records = list(parquet(tmp_path / "a.parquet", caption="captions", id="id").records())
        assert [(record.id, record.turns[1].text) for record in records] == [
            ("d/1", "A dog."),
            ("d/2", "A brown dog."),
            ("c", "A cat."),
        ]
        assert [record.images for record in records[:2]] == [records[0].images] * 2
        assert [turn.images for turn in records[1].turns] == [1, 0]
        members = [("a.png", encoded(1)), ("a.json", {"captions": ["A dog.", "A brown dog."]})]
        one, two = webdataset(write_tar(tmp_path / "s.tar", members), caption="json.captions").records()
        assert (one.id, two.id, two.turns[1].text) == ("s/a/1", "s/a/2", "A brown dog.")

    def test_damaged_files(self, tmp_path):
        columns = {"image": [encoded(i) for i in range(8)], "caption": [f"Number {i}." for i in range(8)]}
        write_parquet(tmp_path / "a.parquet", columns)
        data = (tmp_path / "a.parquet").read_bytes()
        (tmp_path / "b.parquet").write_bytes(data[:-20])
        (tmp_path / "d.parquet").write_bytes(data.replace(b"caption", b"cap\xffion"))
        group = pq.ParquetFile(tmp_path / "a.parquet").metadata.row_group(0).column(1)
        start = group.dictionary_page_offset or group.data_page_offset
        (tmp_path / "c.parquet").write_bytes(data[:start] + b"\xff" * 40 + data[start + 40 :])
        records = list(parquet(tmp_path / "{a,b,c,d}.parquet", caption="caption").records())
        assert reasons(records) == [None] * 8 + ["shard_damaged"] * 2 + [None] * 4 + ["shard_damaged"]
        assert [record.id for record in records if record.problem] == [
            "b.parquet[damaged]",
            "c.parquet[row group 0 from row 0]",
            "d.parquet[damaged]",
        ]

    def test_a_column_that_is_not_there_is_named(self, tmp_path):
        write_parquet(tmp_path / "a.parquet", {"image": [encoded()], "text": ["a"]})
        with pytest.raises(ValueError, match=r"a\.parquet has no column 'caption', its columns are image, text"):
            list(parquet(tmp_path / "a.parquet", caption="caption").records())
