"""Make the small bases that the tiny preset starts from (the shipped ones under checkpoints/lisat_tiny_base).

Two runs that may go side by side, one core each:
    python scripts/pretrain_tiny_bases.py --part llava     tokenizer, then a tower and a Llama, no masks
    python scripts/pretrain_tiny_bases.py --part sam       a promptable SAM, no language
"""

import logging
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from utils.config import parse_config  # noqa: E402


@dataclass
class BaseConfig:
    """Settings of the recipe; the defaults made the shipped bases."""

    part: Literal["llava", "sam"]
    """Which base to make."""
    out: str = "./checkpoints/lisat_tiny_base"
    """Folder that gets `llava/` and `sam.safetensors`."""
    scenes: int = 12000
    """Scenes to draw; each is seen in eight orientations."""
    tower_steps: int = 2000
    """Steps of the tower's own first stage."""
    seconds: float = 2400.0
    """Wall time of the main stage."""
    batch_size: int = 8
    """Scenes per step."""
    threads: int = 1
    """CPU threads."""
    seed: int = 0
    """Seed of the weights; the data use seed + 1 and on."""


def make_llava(config: BaseConfig) -> None:
    """Tokenizer, tower, projector and Llama -> `out/llava`."""
    from dataclasses import replace

    import torch

    from dataset.image import ImageProcessor
    from dataset.synthetic_qa import ScenePool
    from dataset.text import IM_END, IM_START, Tokenizer
    from dataset.tiny_tokenizer import train_tokenizer
    from model.export import save_base
    from model.lisat import Lisat
    from model.presets import lisat_tiny
    from utils.pretrain_llava import PatchTeacher, SceneBatches, train_llava, train_tower

    folder = Path(config.out) / "llava"
    train_tokenizer(folder)
    tokenizer, processor = Tokenizer.from_pretrained(folder), ImageProcessor(sam_size=128, clip_size=128)
    tokenizer.add_tokens([IM_START, IM_END])
    model = Lisat(replace(lisat_tiny(len(tokenizer)), sam=None))
    teacher = PatchTeacher(model.config.vision["hidden_size"])
    pool = ScenePool(config.scenes, seed=config.seed + 1)
    patch = model.config.vision["patch_size"]
    batches = SceneBatches(pool, tokenizer, processor, patch, seed=config.seed + 2)
    train_tower(model.vision_tower, teacher, batches, config.tower_steps)

    def save(step: int) -> None:
        note = {"Recipe": f"`scripts/pretrain_tiny_bases.py --part llava`, {step} steps"}
        save_base(
            model, folder, tokenizer=tokenizer, processor=processor, dtype=torch.float16, extra_card=note
        )

    train_llava(model, teacher, batches, seconds=config.seconds, batch=config.batch_size, on_save=save)


def make_sam(config: BaseConfig) -> None:
    """A promptable SAM -> `out/sam.safetensors`."""
    import torch

    from dataset.image import ImageProcessor
    from dataset.synthetic_qa import ScenePool
    from model.export import save_sam
    from model.sam import build_sam
    from utils.pretrain_sam import Words, train_sam

    sam, processor = build_sam("sam_tiny"), ImageProcessor(sam_size=128, clip_size=128)
    words = Words(sam.config.prompt_embed_dim)
    file = Path(config.out) / "sam.safetensors"
    train_sam(
        sam,
        words,
        ScenePool(config.scenes, seed=config.seed + 1),
        processor,
        seconds=config.seconds,
        batch=config.batch_size,
        seed=config.seed + 3,
        on_save=lambda _: save_sam(sam, file, torch.float16),
    )


def main(argv: list[str] | None = None) -> None:
    """Make one base."""
    config = parse_config(BaseConfig, argv)
    import torch

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    torch.set_num_threads(config.threads)
    torch.manual_seed(config.seed)
    {"llava": make_llava, "sam": make_sam}[config.part](config)


if __name__ == "__main__":
    main()
