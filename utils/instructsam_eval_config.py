"""Settings of `instructsam.py evaluate`. Nothing here imports anything heavy."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from utils.instructsam_config import ClassList, DeviceConfig, Setting


@dataclass
class EvaluateConfig(DeviceConfig):
    """Score predictions (boxes, masks, counts), a folder of counts, or proposals against a COCO file.

    Whatever is named is scored: --predictions, --count_dir, --coco_pred_path, --mask_proposals. IoU is 0.5.
    """

    predictions: str = ""
    """Prediction file: F1, AP50 and, with --eval_mIoU, mIoU of boxes and masks."""
    count_dir: str = ""
    """Folder of count files: counting scores."""
    coco_pred_path: str = ""
    """Prediction file to take counts from (not used if --count_dir is given)."""
    mask_proposals: str = ""
    """Proposal file: recall of objects, whatever their class."""
    dataset_name: str = "dior_mini"
    """Name of a data set in --dataset_config."""
    dataset_config: str = "datasets/config.json"
    """File that says for each data set where annotations (COCO) and pictures are."""
    annotations: str = ""
    """COCO file; instead of --dataset_name."""
    setting: Setting = "open_ended"
    """open_vocabulary: labels are class names. Otherwise every label goes to the class whose words are most
    similar to it, or nowhere."""
    extra_classes: ClassList = ""
    """List of classes in --dataset_config that gets a mean of its own."""
    label_map: str = ""
    """JSON file label -> class name, instead of a CLIP."""
    map_model: str = "georsclip"
    """CLIP that compares labels with classes: a name in --checkpoint_config."""
    map_threshold: float = 0.95
    """Least similarity of label and class."""
    checkpoint_config: str = "checkpoints/config.yaml"
    """File that names the CLIP checkpoints."""
    score_threshold: float | None = None
    """Least score of a prediction that is counted (published: 0.01), or of a proposal (published: 0)."""
    eval_mIoU: bool = False
    """Also compute mIoU of the classes."""
    keep_scores: bool = False
    """AP ranks by the scores in the file; off (published): all scores count as 1."""
    score_sweeping: bool = False
    """Look for the score threshold with the best mF1 and score what it keeps."""
    sweep_step: float = 0.02
    """Distance of the thresholds (published: 0.02, too coarse for CLIP scores); 0: every score there is."""
    sweep_metric: Literal["bbox", "segm"] = "bbox"
    """What is best in the sweep: F1 of boxes (published) or of masks."""
    recall_of: Literal["bbox", "segm"] = "bbox"
    """Proposals are compared as boxes (published) or masks."""
    first_polygon_only: bool = False
    """Of an object of several polygons only the first counts (as in the published mask functions alone)."""
    out: str = ""
    """Folder for the results (JSON and Markdown); empty: ./results/<data set>/<setting>."""

    def validate(self) -> list[str]:
        """One sentence per fault."""
        faults = []
        files = ("predictions", "coco_pred_path", "mask_proposals", "label_map", "annotations")
        for name in files:
            value = getattr(self, name)
            if value and not Path(value).is_file():
                faults.append(f"--{name} {value}: there is no such file")
        if self.count_dir and not Path(self.count_dir).is_dir():
            faults.append(f"--count_dir {self.count_dir}: there is no such folder")
        if not any((self.predictions, self.count_dir, self.coco_pred_path, self.mask_proposals)):
            faults.append(
                "nothing to score: give --predictions, --count_dir, --coco_pred_path or --mask_proposals"
            )
        if not self.annotations and not Path(self.dataset_config).is_file():
            faults.append(
                f"--dataset_config {self.dataset_config}: there is no such file (or give --annotations)"
            )
        if self.annotations and self.extra_classes:
            faults.append("--extra_classes names a list in --dataset_config, so it needs --dataset_name")
        if not 0 <= self.sweep_step < 1:
            faults.append(f"--sweep_step is {self.sweep_step}; it must be from 0 (every score) to below 1")
        return faults
