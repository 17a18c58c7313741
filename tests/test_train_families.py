"""The published mixes of data sets: they open, train an epoch, and resume with the same draws and weights."""

import json
import re
import signal
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from dataset.base import draw_record
from dataset.sample import Sample
from tests.conftest import REPO
from tests.dataset.miniature import write_all
from tests.model.checkpoint_tools import write_bases
from tests.tiny_lisat import QUICK
from tests.utils.toy_training import arm, finish, start
from utils.checkpointing import resolve_checkpoint
from utils.train_lisat_config import TrainLisatConfig

AERIAL = ("RRSIS-D|train", "RIS-LAD|train", "RefSegRS|train", "EarthReason|train")
SETS = {
    "sem_seg_data": "ade20k||cocostuff||pascal_part||paco_lvis||mapillary",
    "refer_seg_data": "refclef||refcoco||refcoco+||refcocog",
}


def published_mix(kind: str) -> tuple[str, str]:
    """Data sets and rates that train_lisat.sh hands on."""
    text = (REPO / "train_lisat.sh").read_text(encoding="utf-8")
    match = re.search(rf'^{kind}\)\n\s*data="(.+)"\n\s*rates="(.+)"$', text, flags=re.M)
    assert match is not None
    return match[1], match[2]


def train_recorded(config: TrainLisatConfig, kill_at: int | None = None) -> None:
    """Train; write down every draw with its key; die at that file operation of saving."""
    import utils.checkpointing as checkpointing
    from utils.sampling import DrawKey, KeyedDataset
    from utils.train_lisat_job import train

    torch.set_num_threads(1)
    done = arm(checkpointing, kill_at)
    whole = KeyedDataset.__getitem__
    file = Path(config.log_base_dir) / f"{config.exp_name}-{kill_at}.jsonl"
    file.parent.mkdir(exist_ok=True)

    def noted(self: KeyedDataset, key: DrawKey) -> Sample:
        sample = whole(self, key)
        with file.open("a") as out:
            out.write(json.dumps([list(key), draw_record(sample)]) + "\n")
        return sample

    KeyedDataset.__getitem__ = noted
    train(config)
    (Path(config.run_dir) / "operations.txt").write_text(str(len(done)))


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> TrainLisatConfig:
    folder = tmp_path_factory.mktemp("families")
    base, sam = write_bases(folder / "base")
    write_all(folder / "data")
    data, rates = published_mix("ReasonSeg")
    return TrainLisatConfig(
        log_base_dir=str(folder / "runs"),
        version=str(base),
        vision_pretrained=str(sam),
        dataset_dir=str(folder / "data"),
        dataset="||".join([data, *AERIAL]),
        sample_rates=",".join([rates, *["10"] * len(AERIAL)]),
        **SETS,
        val_dataset="GeoReasonSeg|val",
        num_classes_per_sample=2,
        epochs=1,
        steps_per_epoch=0,
        batch_size=3,
        save_every_steps=2,
        **QUICK,
    )


def draws(config: TrainLisatConfig, kill_at: int | None = None) -> list[tuple[tuple[int, ...], str]]:
    """(key, record) of every draw after those of the preflight, which looks at the first batch."""
    lines = (Path(config.log_base_dir) / f"{config.exp_name}-{kill_at}.jsonl").read_text().splitlines()
    pairs = [json.loads(line) for line in lines[config.batch_size :]]
    return [(tuple(key), json.dumps(record)) for key, record in pairs]


def trained(config: TrainLisatConfig) -> dict[str, torch.Tensor]:
    return load_file(resolve_checkpoint(config.run_dir) / "trainable.safetensors")


@pytest.mark.parametrize("kind", ["ReferSeg", "ReasonSeg"])
@pytest.mark.parametrize("sampling", ["seeded", "official"])
def test_published_mixes_open_and_draw(config: TrainLisatConfig, kind: str, sampling: str) -> None:
    """Every data set of the mix is drawn in its share."""
    from utils.train_lisat_job import open_setup

    data, rates = published_mix(kind)
    mix = replace(config, dataset=data, sample_rates=rates, sampling=sampling, num_classes_per_sample=3)
    hybrid = open_setup(mix).train_data.data
    names = [part.name for part in hybrid.parts]
    assert len(names) == len(data.split("||")) and {"vqa", "refer_seg"} & set(data.split("||"))
    folders: Counter[str] = Counter()
    for epoch in range(200 // len(hybrid)):
        for index in range(len(hybrid)):
            sample = hybrid.draw(index, epoch, seed=3)
            assert sample.conversations and len(sample.conversations) <= 3
            folders[str(Path(sample.image_path).relative_to(config.dataset_dir)).split("/")[0]] += 1
    assert {"refer_seg", "coco"} <= set(folders)
    again = [draw_record(hybrid.draw(index, 1, seed=3)) for index in range(len(hybrid))]
    assert again == [draw_record(hybrid.draw(index, 1, seed=3)) for index in range(len(hybrid))]


def test_an_epoch_over_every_family_resumes_exactly(config: TrainLisatConfig) -> None:
    """Killed while it saves and resumed, with a worker, a run draws and learns the same."""
    assert finish(start(config, 1, train_recorded)) == [0]
    straight = draws(config)
    assert len(straight) == len(dict(straight))
    folders = {Path(json.loads(record)["image"]).parent.name for _, record in straight}
    assert len(folders) >= 5, folders
    again = replace(config, exp_name="killed", workers=1)
    killed = int((Path(config.run_dir) / "operations.txt").read_text()) // 2
    assert finish(start(again, 1, train_recorded, kill_at=killed)) == [-signal.SIGKILL]
    assert finish(start(again, 1, train_recorded)) == [0]
    first, resumed = draws(again, killed), draws(again)
    assert 0 < len(resumed) < len(straight) and resumed == straight[-len(resumed) :]
    assert first == straight[: len(first)] and len(first) + len(resumed) >= len(straight)
    for name, value in trained(config).items():
        assert torch.equal(trained(again)[name], value), name
