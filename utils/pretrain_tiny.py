"""Making the two small bases of the tiny preset: what `scripts/pretrain_tiny_bases.py` runs."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal


@dataclass
class PretrainConfig:
    """Settings of the recipe."""

    part: Literal["llava", "sam"]
    """Which base to make."""
    out: str = "./checkpoints/lisat_tiny_base"
    """Folder that gets `llava/` and `sam.safetensors`."""
    scenes: int = 12000
    """Scenes to draw; each is seen in eight orientations."""
    tower_steps: int = 3000
    """Steps of the tower's own first stage."""
    cell_steps: int = 1400
    """Steps of the SAM encoder's own first stage."""
    seconds: float = 3600.0
    """Wall time of the main stage."""
    batch_size: int = 8
    """Scenes per step."""
    threads: int = 1
    """CPU threads."""
    seed: int = 0
    """Seed of the weights; the data use seed + 1 and on."""


def make_llava(config: PretrainConfig) -> None:
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


def make_sam(config: PretrainConfig) -> None:
    """A promptable SAM -> `out/sam.safetensors`."""
    import torch

    from dataset.image import ImageProcessor
    from dataset.synthetic_qa import ScenePool
    from model.export import save_sam
    from model.sam import build_sam
    from utils.pretrain_sam import CellTeacher, Words, train_cells, train_sam

    sam, processor = build_sam("sam_tiny"), ImageProcessor(sam_size=128, clip_size=128)
    words, teacher = Words(sam.config.prompt_embed_dim), CellTeacher(sam.config.prompt_embed_dim)
    pool, file = ScenePool(config.scenes, seed=config.seed + 1), Path(config.out) / "sam.safetensors"
    train_cells(sam, teacher, pool, processor, steps=config.cell_steps, seed=config.seed + 2)
    train_sam(
        sam,
        words,
        teacher,
        pool,
        processor,
        seconds=config.seconds,
        batch=config.batch_size,
        seed=config.seed + 3,
        on_save=lambda _: save_sam(sam, file, torch.float16),
    )
