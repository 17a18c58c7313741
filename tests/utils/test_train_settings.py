"""What a trained model remembers of its training."""

from pathlib import Path

from dataset.synthetic import write_scenes
from tests.model.checkpoint_tools import write_bases
from utils.train_lisat_config import TrainLisatConfig
from utils.train_lisat_job import build_model, open_setup


def test_a_model_knows_how_it_was_asked(tmp_path: Path) -> None:
    base, sam = write_bases(tmp_path / "base")
    write_scenes(tmp_path / "data" / "synthetic" / "train", 1, 0, questions=1, size=64)
    config = TrainLisatConfig(
        version=str(base),
        vision_pretrained=str(sam),
        dataset_dir=str(tmp_path / "data"),
        dataset="synthetic|train",
        no_eval=True,
        templates="tiny",
        conv_type="vicuna_v1",
        precision="fp32",
    )
    model = build_model(open_setup(config))
    assert (model.config.templates, model.config.conv_type) == ("tiny", "vicuna_v1")
