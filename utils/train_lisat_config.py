"""Command line of LISAT training: the published flags, and ours (torch-free, so that `--help` is fast)."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from utils.engine_config import EngineConfig
from utils.hub import resolve

SAM_PLACEHOLDER = "PATH_TO_SAM_ViT-H"
FAMILIES = (
    "geo_reason_seg",
    "reason_seg",
    "sem_seg",
    "refer_seg",
    "neg_refer_seg",
    "correct_refer_seg",
    "vqa",
)
"""Names of the published data families; anything else in `--dataset` is a data set of dataset/registry.py."""


@dataclass
class TrainLisatConfig(EngineConfig):
    """Train LISAT: LoRA, the mask decoder, text_hidden_fcs and the vocabulary matrices.
    With --stage align and --stage instruct: LISAT_PRE, the captioning base."""

    exp_name: str = "LISAT"
    """Name of this run; its directory is log_base_dir/exp_name."""
    stage: Literal["segmentation", "align", "instruct"] = "segmentation"
    """segmentation: LISAT from LISAT_PRE. LISAT_PRE itself (no masks): align trains the projector alone on
    captions; instruct trains the projector and the language model (LoRA, or all of it with --lora_r 0)."""
    best_metric: str = ""
    """Validation figure that decides which checkpoint is the best: the largest, or the smallest of a loss.
    Empty: giou, or loss in the stages align and instruct."""

    version: str = "./LISAt_PRE-7b"
    """Base to start from: a LISAT_PRE folder, our base, or an earlier LISAT (align, instruct: or a Llama)."""
    vision_tower: str = ""
    """Tower folder or OpenCLIP file; empty = where the base says."""
    tower_activation: Literal["", "gelu", "quick_gelu"] = ""
    """Activation of a tower without config.json."""
    vision_pretrained: str = SAM_PLACEHOLDER
    """SAM's weights; not read if the base holds a trained SAM."""
    low_precision_pe: bool = False
    """SAM's positional codes in bf16 (fp16), as in the published runs, instead of fp32."""
    projector: str = ""
    """Trained projector to use instead of the base's: a run of --stage align, or LLaVA's mm_projector.bin."""
    projector_type: str = ""
    """Type of a fresh projector (linear, mlp2x_gelu, ...); empty = the base's, else mlp2x_gelu."""
    reinit_projector: bool = False
    """align, instruct: start the projector afresh."""
    reinit_seg_modules: bool = False
    """Start SAM and text_hidden_fcs afresh although the base has trained ones (the published behaviour)."""
    load_in_8bit: bool = False
    """Not available in training."""
    load_in_4bit: bool = False
    """Not available in training."""
    image_size: int = 0
    """Side of the SAM input in pixels; 0 = what the SAM weights say (1024 for ViT-H)."""
    model_max_length: int = 1024
    """Longest row in tokens, image tokens included."""
    out_dim: int = 0
    """Width of the mask prompts; 0 = SAM's prompt width (256 for ViT-H)."""
    conv_type: str = "llava_v1"
    """Conversation template."""
    use_mm_start_end: bool = True
    """Write the image as <im_start><image><im_end>."""
    gradient_checkpointing: bool = True
    """Recompute the language model's blocks in the backward pass (less memory, more time)."""

    dataset: str = "refer_seg||correct_refer_seg||vqa||neg_refer_seg"
    """Training data, joined by ||: published families, or NAME|SPLIT, generic:PATH, sem_seg_folder:PATH."""
    sample_rates: str = ""
    """Relative shares of the data sets, one per entry of --dataset ('9,3,3,1'); empty = equal shares."""
    skip_missing_data: bool = False
    """Leave out data sets that are not there (with a warning) instead of stopping."""
    dataset_dir: str = "./dataset"
    """Root of the data sets."""
    sem_seg_data: str = "ade20k||cocostuff||pascal_part||paco_lvis"
    """Data sets of the family sem_seg."""
    refer_seg_data: str = "refclef||refcoco||refcoco+||refcocog"
    """Data sets of the family refer_seg."""
    neg_refer_seg_data: str = "R-refcocog||R-refcoco||R-refcoco+"
    """Data sets of the family neg_refer_seg."""
    correct_refer_seg_data: str = "fprefcocog||fprefcoco||fprefcoco+"
    """Data sets of the family correct_refer_seg."""
    vqa_data: str = "llava_instruct_150k"
    """Data sets of the family vqa."""
    reason_seg_data: str = "ReasonSeg|train"
    """Data set of the family reason_seg."""
    geo_reason_seg_data: str = "GeoReasonSeg|train"
    """Data set of the family geo_reason_seg."""
    val_dataset: str = "GeoReasonSeg|val"
    """Data set of the validation during training."""
    val_sampling: Literal["every", "official"] = "every"
    """every: each picture once, questions fixed by its name; official: random pictures with replacement,
    random questions and answers, other ones each time, as published."""
    val_batch_size: int = 1
    """Images per process in validation."""
    val_limit: int = 0
    """Validate on the first so many images only; 0 = all."""
    num_classes_per_sample: int = 1
    """Questions per training image."""
    templates: str = "default"
    """Question and answer templates: default, tiny, or a file."""
    raster: Literal["official", "exact"] = "official"
    """How polygons of GRES-like files become masks."""
    confirm_absent: float = 0.0
    """Own annotations, semantic folders: share of absent things answered by [SEG] and an empty mask, instead
    of a denial."""
    respect_ignore: bool = False
    """Leave ignore regions of GRES-like files out of the losses; off: background, as published."""
    augment: float = 0.0
    """Semantic folders: smallest share of the sides kept by random crops, with turns and mirrors; 0 = off."""
    overlap: Literal["union", "sum"] = "union"
    """Overlapping parts of one outline in the REFER sets: 1, or their number (as published)."""
    sampling: Literal["seeded", "official"] = "seeded"
    """How to draw: ours, or the calls of the published loaders in their order."""
    data_index: str = "auto"
    """Where large data sets keep what was read, for fast starts: auto (beside the data), off, or a folder."""
    strict_data: bool = False
    """Stop at the first unusable data file instead of leaving it out."""
    cache_image_embeddings: str = ""
    """Keep SAM's image embeddings: 'memory', or a folder; empty = compute them in every step."""
    cache_precision: Literal["same", "bf16"] = "same"
    """Cached embeddings: as computed, or rounded to bf16 (half the space of fp32)."""
    cache_limit_gib: float = 0.0
    """Space for cached embeddings in GiB; the rest is computed. 0: 16 of memory, a folder without limit."""

    ce_loss_weight: float = 1.0
    """Weight of the language loss."""
    dice_loss_weight: float = 0.5
    """Weight of the dice loss of the masks."""
    bce_loss_weight: float = 2.0
    """Weight of the cross entropy of the masks."""
    lora_r: int = 8
    """LoRA rank; 0 = train the whole language model."""
    lora_alpha: float = 16
    """LoRA scale is lora_alpha / lora_r."""
    lora_dropout: float = 0.05
    """Dropout in front of LoRA."""
    lora_target_modules: str = "q_proj,v_proj"
    """Projections that get LoRA, joined by commas."""
    train_mask_decoder: bool = True
    """Train SAM's mask decoder."""
    new_rows_only: bool = False
    """Train only the added rows of the vocabulary matrices (far less memory; not the published training)."""
    new_rows_init: Literal["normal", "mean"] = "normal"
    """How added rows start: N(0, 0.02) as published, or the mean of the old ones."""
    also_train: str = ""
    """Parts of further parameter names to train, joined by commas ('mm_projector')."""
    text_fcs_scale: float = 1.0
    """Factor on the output of a fresh text_hidden_fcs (small models: 5 lets SAM hear the prompt at once)."""

    val_caption: str = ""
    """Caption files (JSON lines) to be answered and scored with BLEU and CIDEr after every validation, joined
    by ||; 'published': the three files below. Empty = none."""
    val_caption_limit: int = 0
    """The first so many questions of each file only; 0 = all."""
    val_caption_tokens: int = 128
    """Longest caption (the published training allows 1024)."""
    val_caption_batch: int = 16
    """Captions per process and call of the model."""
    vqa_eval_file_nwpu: str = "./dataset/vqa_caption/NWPU-Captions.jsonl"
    """A caption file of --val_caption published."""
    vqa_eval_file_sydney: str = "./dataset/vqa_caption/Sydney-Captions.jsonl"
    """A caption file of --val_caption published."""
    vqa_eval_file_ucm: str = "./dataset/vqa_caption/UCM-Captions.jsonl"
    """A caption file of --val_caption published."""

    def caption_files(self) -> list[str]:
        """The files of `--val_caption`."""
        if self.val_caption == "published":
            return [self.vqa_eval_file_nwpu, self.vqa_eval_file_sydney, self.vqa_eval_file_ucm]
        return [path.strip() for path in self.val_caption.split("||") if path.strip()]

    def settled(self) -> "TrainLisatConfig":
        """These settings with those filled in that depend on the stage."""
        metric = self.best_metric or ("giou" if self.stage == "segmentation" else "loss")
        return replace(self, best_metric=metric)

    def sources(self) -> list[tuple[str, str, float]]:
        """(entry of --dataset, data set it stands for, share) of every training data set.

        Raises:
            ValueError: number of rates and of data sets differ, or a rate cannot be read.
        """
        entries = [entry.strip() for entry in self.dataset.split("||") if entry.strip()]
        if not entries:
            raise ValueError("--dataset is empty; name at least one data set")
        try:
            rates = [float(rate) for rate in self.sample_rates.split(",")] if self.sample_rates else []
        except ValueError:
            raise ValueError(f"--sample_rates {self.sample_rates!r}: expected numbers and commas") from None
        if rates and len(rates) != len(entries):
            raise ValueError(
                f"--sample_rates has {len(rates)} value(s) for {len(entries)} data sets "
                f"({', '.join(entries)}); give one per data set"
            )
        if any(rate < 0 for rate in rates) or (rates and not sum(rates)):
            raise ValueError(f"--sample_rates {self.sample_rates!r}: shares must be positive")
        specs = [getattr(self, f"{entry}_data") if entry in FAMILIES else entry for entry in entries]
        return list(zip(entries, specs, rates or [1.0] * len(entries)))

    def validate(self) -> list[str]:
        """Faults that show before anything is loaded: of the values, and files that are not there."""
        faults = super().validate()
        try:
            self.sources()
        except ValueError as error:
            faults.append(str(error))
        if self.load_in_8bit or self.load_in_4bit:
            faults.append("--load_in_8bit, --load_in_4bit: not available in training; use --precision bf16")
        for name in ("val_batch_size", "val_caption_batch", "val_caption_tokens", "num_classes_per_sample"):
            if getattr(self, name) < 1:
                faults.append(f"--{name} must be at least 1, found {getattr(self, name)}")
        for name in ("image_size", "out_dim", "lora_r", "val_limit", "val_caption_limit"):
            if getattr(self, name) < 0:
                faults.append(f"--{name} must not be negative, found {getattr(self, name)}")
        for name in ("ce_loss_weight", "dice_loss_weight", "bce_loss_weight"):
            if getattr(self, name) < 0:
                faults.append(f"--{name} must not be negative, found {getattr(self, name)}")
        for name in ("augment", "confirm_absent"):
            if not 0 <= getattr(self, name) <= 1:
                faults.append(f"--{name} must lie between 0 and 1, found {getattr(self, name)}")
        faults += self._stage_faults()
        if self.augment and self.cache_image_embeddings:
            faults.append("--augment changes the pictures, so --cache_image_embeddings must be empty")
        if not 0 <= self.lora_dropout < 1:
            faults.append(f"--lora_dropout must be at least 0 and less than 1, found {self.lora_dropout}")
        if self.cache_limit_gib < 0:
            faults.append(f"--cache_limit_gib is {self.cache_limit_gib}; it must be 0 or more")
        if self.cache_image_embeddings and self.zero_stage == 3:
            faults.append("--cache_image_embeddings needs --zero_stage 0, 1 or 2 (3 splits SAM's weights)")
        if self.val_caption and self.zero_stage == 3:
            faults.append("--val_caption needs --zero_stage 0, 1 or 2 (3 splits the language model)")
        if self.val_caption and self.no_eval:
            faults.append("--val_caption belongs to the validation, which --no_eval switches off")
        return faults + self._missing_files()

    def _stage_faults(self) -> list[str]:
        """Settings that mean nothing in this stage."""
        faults = []
        if self.stage == "segmentation":
            if self.reinit_projector or self.projector_type:
                faults.append("--reinit_projector, --projector_type: the projector trains in --stage align")
            if self.low_precision_pe and self.precision == "fp32":
                faults.append("--low_precision_pe has no effect with --precision fp32; use bf16 or fp16")
            return faults
        for name in (
            "reinit_seg_modules",
            "new_rows_only",
            "cache_image_embeddings",
            "low_precision_pe",
            "respect_ignore",
        ):
            if getattr(self, name):
                faults.append(f"--{name} is for --stage segmentation, this is --stage {self.stage}")
        if self.val_sampling != "every":
            faults.append(f"--val_sampling {self.val_sampling} is for --stage segmentation")
        if self.val_dataset == TrainLisatConfig.val_dataset and not self.no_eval:
            faults.append(
                f"--val_dataset: --stage {self.stage} needs held-out answers in words, for example "
                "'vqa:FILE|PICTURES', or --no_eval"
            )
        return faults

    def _missing_files(self) -> list[str]:
        faults = []
        named = [("version", "base folder"), ("vision_tower", "vision tower"), ("projector", "projector")]
        if self.stage == "segmentation":
            named.append(("vision_pretrained", "SAM file"))
        for field, what in named:
            name = getattr(self, field)
            if name and name != SAM_PLACEHOLDER:
                try:
                    resolve(name, near=[] if field == "version" else [self.version], what=what)
                except ValueError as error:
                    faults.append(f"--{field}: {error}")
        if self.templates not in ("default", "tiny") and not Path(self.templates).is_file():
            faults.append(f"--templates {self.templates}: no such file, and neither default nor tiny")
        if not Path(self.dataset_dir).is_dir() and any(spec.find(":") < 0 for _, spec, _ in self._specs()):
            faults.append(f"--dataset_dir {self.dataset_dir}: no such folder")
        return faults

    def _specs(self) -> list[tuple[str, str, float]]:
        try:
            return replace(self, sample_rates="").sources()  # faults of the rates are told elsewhere
        except ValueError:
            return []
