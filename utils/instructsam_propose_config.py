"""Settings of the mask proposer. Nothing here imports anything heavy."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal


@dataclass
class ProposerConfig:
    """Which network proposes masks, and how."""

    sam2_checkpoint: str = ""
    """SAM 2 weights: the original file (sam2_hiera_large.pt) or transformers' folder."""
    sam2_cfg: str = ""
    """Name of their configuration (sam2_hiera_l.yaml); empty: read off the weights. sam2_toy without
    weights is a small network with random ones, to try the commands."""
    sam_checkpoint: str = ""
    """Instead of SAM 2: SAM 1 weights (sam_vit_h_4b8939.pth, or a file of this project)."""
    multimask_output: bool = True
    """Three masks per point (part, object, group), as published; off: one."""
    max_masks: int = 200
    """Most proposals of a picture; the best by (predicted IoU + stability) / 2 stay."""
    min_mask_region_area: int = 0
    """Keep masks of more pixels than this."""
    hole_filling: Literal["enclosed", "legacy_corner", "keep"] = "enclosed"
    """enclosed: background that reaches no border is filled; legacy_corner: as published, background not
    connected to the top left pixel is (rivers and roads swallow one side); keep: nothing."""
    proposal_boxes: Literal["published", "exact"] = "published"
    """published: the generator's boxes, one pixel short; exact: taken from the final masks."""
    points_per_side: int = 24
    """Points of the grid along each side of a crop."""
    crop_n_layers: int = 1
    """Layers of crops besides the whole picture: 1 adds 2 x 2, 2 another 4 x 4."""
    crop_overlap_ratio: float = 512 / 1500
    """Overlap of crops as a share of the picture's shorter side."""
    crop_n_points_downscale_factor: int = 1
    """Points per side are divided by this from layer to layer."""
    pred_iou_thresh: float = 0.75
    """Keep masks whose predicted quality is above this; 0: all."""
    stability_score_thresh: float = 0.75
    """Keep masks that change this little with the threshold (1: not at all); 0: all."""
    box_nms_thresh: float = 0.5
    """Of two masks of a crop whose boxes overlap more than this, the better one stays."""
    crop_nms_thresh: float = 0.7
    """Of two masks of different crops whose boxes overlap more, the one of the smaller crop stays."""
    points_per_batch: int = 64
    """Points decoded at once: memory against speed, as the two below."""
    masks_per_chunk: int = 64
    """Masks at full size at once."""
    crops_per_batch: int = 0
    """Crops encoded at once; 0: all."""

    def validate(self) -> list[str]:
        """One sentence per fault."""
        faults = []
        if bool(self.sam_checkpoint) == bool(self.sam2_checkpoint or self.sam2_cfg):
            faults.append("give either --sam2_checkpoint (SAM 2) or --sam_checkpoint (SAM 1)")
        elif self.sam2_cfg and not self.sam2_checkpoint and self.sam2_cfg != "sam2_toy":
            faults.append("--sam2_cfg without --sam2_checkpoint: only sam2_toy exists without weights")
        for name in ("sam2_checkpoint", "sam_checkpoint"):
            value = getattr(self, name)
            if value and not Path(value).exists():
                faults.append(f"--{name} {value}: there is no such file")
        least = {"max_masks": 1, "min_mask_region_area": 0, "points_per_side": 1, "crop_n_layers": 0}
        least |= {"crop_n_points_downscale_factor": 1, "points_per_batch": 1, "masks_per_chunk": 1}
        for name, value in (least | {"crops_per_batch": 0}).items():
            if getattr(self, name) < value:
                faults.append(f"--{name} is {getattr(self, name)}; at least {value}")
        for name in ("pred_iou_thresh", "stability_score_thresh", "box_nms_thresh", "crop_nms_thresh"):
            if not 0 <= getattr(self, name) <= 1:
                faults.append(f"--{name} is {getattr(self, name)}; it lies between 0 and 1")
        if not 0 <= self.crop_overlap_ratio < 1:
            faults.append(f"--crop_overlap_ratio is {self.crop_overlap_ratio}; at least 0 and below 1")
        return faults

    def grid(self) -> Any:
        """The generator's `GridConfig` of these settings."""
        from dataclasses import fields

        from model.instructsam.automatic_masks import GridConfig

        names = {field.name for field in fields(self)} & {field.name for field in fields(GridConfig)}
        return GridConfig(**{name: getattr(self, name) for name in names})
