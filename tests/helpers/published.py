"""Small sets in the layouts in which LLaVA's and other instruction sets are published, for tests."""

from pathlib import Path

from tests.helpers.corpora import conversation, write_files, write_zip
from tests.helpers.images import encoded


def write_llava_558k(root: Path, count: int = 6) -> None:
    """liuhaotian/LLaVA-Pretrain: one JSON list, and images.zip with folders of a thousand."""
    names = [f"{450 + i:05d}/{4_500_375 + 1000 * i:09d}" for i in range(count)]
    asked = ("What is shown?\n<image>", "<image>\nSay it shortly.")
    entries = [
        {
            "id": name.partition("/")[2],
            "image": f"{name}.jpg",
            "conversations": conversation(asked[i % 2], f"item {i}"),
        }
        for i, name in enumerate(names)
    ]
    write_files(root, {"LLaVA-Pretrain/blip_laion_cc_sbu_558k.json": entries})
    images = {f"{name}.jpg": encoded(i, "JPEG", (16, 12)) for i, name in enumerate(names)}
    write_zip(root / "LLaVA-Pretrain/images.zip", images)


def write_llava_665k(root: Path) -> None:
    """llava_v1_5_mix665k.json and the folders that it names. An id may come several times; ShareGPT has no images."""
    paths = {
        "000000033471": "coco/train2017/000000033471.jpg",
        "2354786": "gqa/images/2354786.jpg",
        "140031996": "ocr_vqa/images/140031996.jpg",
        "a3bbd4a1": "textvqa/train_images/a3bbd4a1.jpg",
        "VG_100K/2": "vg/VG_100K/2.jpg",
        "VG_100K_2/1592": "vg/VG_100K_2/1592.jpg",
    }
    turns = ("<image>\nWhat is it?\nAnswer with a word.", "Ball", "Which colour has it?", "Red")
    entries = [{"id": name, "image": path, "conversations": conversation(*turns)} for name, path in paths.items()]
    more = ("What would you do with it?\n<image>", "Throw it to a friend.")
    entries.insert(1, {"id": "000000033471", "image": paths["000000033471"], "conversations": conversation(*more)})
    chat = ("Write a list of fruit.", "Apple, pear, plum.", "In French?", "Pomme, poire, prune.")
    entries.append({"id": "wgByO4Y_0", "model": "", "conversations": conversation(*chat)})
    entries.append({"id": "wgByO4Y_33", "model": "", "conversations": conversation(*chat)[1:]})
    images = {path: encoded(i, "JPEG", (80, 64)) for i, path in enumerate(paths.values())}
    images["ocr_vqa/images/140031996.jpg"] = encoded(40, "GIF")  # some covers are GIF files that are called .jpg
    images["vg/VG_100K/2.jpg"] = images["vg/VG_100K/2.jpg"][:-20]
    write_files(root / "LLaVA-Instruct", {"llava_v1_5_mix665k.json": entries, **images})


def write_lvis_instruct4v(root: Path) -> None:
    """lvis_instruct4v_220k.json: questions and, under the same id, a description; images of COCO, also val2017."""
    paths = {"000000228836": "coco/train2017/000000228836.jpg", "000000391895": "coco/val2017/000000391895.jpg"}
    asked = ("How many cats are there?\n<image>", "Two.", "Do they sleep?", "One of them.")
    described = ("Describe everything in the image.\n<image>", "Two cats on a sofa, one asleep. " * 20)
    entries = [
        {"id": name, "image": path, "conversations": conversation(*turns)}
        for turns in (asked, described)
        for name, path in paths.items()
    ]
    write_files(root, {"LVIS-Instruct4V/lvis_instruct4v_220k.json": entries})
    write_files(root / "LLaVA-Instruct", {path: encoded(100 + i, "JPEG") for i, path in enumerate(paths.values())})


def write_lrv_instruct(root: Path) -> None:
    """Three lists of questions. Of the first two an id is a Visual Genome image's, of charts it is a file's name."""

    def question(image_id: str, number: int, **more) -> dict:
        return {"image_id": image_id, "question": f"Is there a dog {number}?", "answer": f"No dog {number}.", **more}

    lists = {
        "filter_cap1.json": [question("2392588", i, task="negative") for i in range(3)] + [question("2392589", 3)],
        "filter_cap_more1.json": [question("2392588", i, task="reasoning") for i in range(2, 6)],
        "chart_release_update.json": [question("chart_7.png", 7), question("chart_7.png", 8)],
    }
    images = {f"image/{name}.jpg": encoded(int(name) % 999, "JPEG") for name in ("2392588", "2392589")}
    write_files(root / "LRV-Instruct", {**lists, **images, "chart_image/chart_7.png": encoded(777)})
