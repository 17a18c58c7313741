"""Settings of the InstructSAM commands: one dataclass each. Nothing here imports anything heavy."""

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from utils.instructsam_propose_config import ProposerConfig

Setting = Literal["open_vocabulary", "open_ended", "open_subclass"]
ClassList = Literal["", "unseen_classes", "means_of_transport", "sports_field"]


@dataclass
class InputConfig:
    """Which pictures."""

    images: str = ""
    """Folder of pictures (sub-folders too) or one picture; GeoTIFF counts. No annotation file is needed."""
    dataset_name: str = ""
    """Instead of --images: name of a data set in --dataset_config."""
    dataset_config: str = "datasets/config.json"
    """File that says for each data set where annotations (COCO) and pictures are."""

    def validate(self) -> list[str]:
        """One sentence per fault."""
        if bool(self.images) == bool(self.dataset_name):
            return ["give either --images FOLDER or --dataset_name NAME"]
        if self.images and not Path(self.images).exists():
            return [f"--images {self.images}: there is no such folder or picture"]
        if self.dataset_name and not Path(self.dataset_config).is_file():
            return [f"--dataset_config {self.dataset_config}: there is no such file"]
        return []


@dataclass
class AskConfig:
    """How a language model is asked for counts, on a server or here."""

    setting: Literal["auto", "open_vocabulary", "open_ended", "open_subclass"] = "auto"
    """open_vocabulary: count the given classes; open_ended: whatever is there; open_subclass: the kinds of
    one parent class. auto: what --words and --parent say, else open_ended."""
    words: tuple[str, ...] = ()
    """Class names for open_vocabulary; empty: the classes of the data set."""
    parent: str = ""
    """Parent class for open_subclass, for example "means of transport"."""
    prompt_path: str = ""
    """Prompt file, sent unchanged; empty: our own for the setting (dataset/prompts/instructsam)."""
    base_url: str = ""
    """Address of an OpenAI-compatible server, for example http://localhost:8000/v1/"""
    model: str = "gpt-4o-2024-11-20"
    """Model name for the server."""
    api_key: str = ""
    """Only refused with advice: keys are read from the environment, see --api_key_env."""
    api_key_env: str = "OPENAI_API_KEY"
    """Environment variable that holds the key; unset: no key is sent."""
    pretrained_model_name_or_path: str = ""
    """Qwen2.5-VL folder (or a name in the hub's cache) to count on this machine instead of a server."""
    json_output: bool = False
    """Ask the server for JSON mode."""
    json_schema: bool = False
    """Ask the server for answers that follow the JSON schema of counts."""
    skip_existing: bool = False
    """Ask only for pictures without a count file: how a broken run goes on."""
    concurrency: int = 8
    """Requests under way at the same time."""
    retries: int = 6
    """Further tries after 429, 5xx, time-outs, broken connections and garbled answers."""
    first_wait: float = 1.0
    """Seconds before the first further try; doubled each time, with some chance."""
    timeout: float = 180.0
    """Seconds for one try."""
    connect_timeout: float = 15.0
    """Seconds for connecting."""
    most_wait: float = 600.0
    """Longest wait in seconds that a server may ask for."""
    second_try: int = 0
    """Ask again this often, with the fault named, after a reply that gives no counts."""
    repair_json: bool = False
    """Read replies with comments, trailing commas, single quotes or several objects, too."""
    published_parsing: bool = False
    """Accept values of any type, as the published program does."""
    published_request: bool = False
    """Send every file unchanged as image/png, as the published program does."""
    max_side: int = 0
    """Shrink larger pictures to this longer side before sending; 0: never."""
    max_tokens: int = 2000
    """Longest reply of the server in tokens."""
    temperature: float = 0.01
    """Temperature of the server, and of Qwen with --sample."""
    price_in: float = 0.0
    """Price of a million prompt tokens, for the cost report."""
    price_out: float = 0.0
    """Price of a million reply tokens."""
    max_new_tokens: int = 5000
    """Longest reply of the local model in tokens."""
    sample: bool = False
    """Local model: sample as published instead of taking the most likely token."""
    count_batch: int = 4
    """Local model: pictures at once."""
    allow_failures: bool = False
    """End with exit code 0 although pictures failed."""

    def validate(self) -> list[str]:
        """One sentence per fault."""
        faults = []
        if self.api_key:
            faults.append(
                "--api_key: a key on the command line can be read by every user of the machine; "
                f"put it into the environment (export {self.api_key_env}=...) and leave the flag out"
            )
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", self.api_key_env):
            faults.append("--api_key_env must be the name of an environment variable, not the key itself")
        if self.prompt_path and not Path(self.prompt_path).is_file():
            faults.append(f"--prompt_path {self.prompt_path}: there is no such file")
        if self.words and self.chosen_setting() != "open_vocabulary":
            faults.append("--words go with --setting open_vocabulary only")
        if self.setting == "open_subclass" and not self.parent and not self.prompt_path:
            faults.append('--setting open_subclass needs --parent, for example "sports field"')
        if self.json_output and self.json_schema:
            faults.append("--json_output and --json_schema exclude each other")
        for name in (
            "concurrency",
            "count_batch",
            "max_tokens",
            "max_new_tokens",
            "timeout",
            "connect_timeout",
        ):
            if getattr(self, name) <= 0:
                faults.append(f"--{name} is {getattr(self, name)}; it must be above 0")
        for name in (
            "retries",
            "first_wait",
            "second_try",
            "max_side",
            "price_in",
            "price_out",
            "temperature",
            "most_wait",
        ):
            if getattr(self, name) < 0:
                faults.append(f"--{name} is {getattr(self, name)}; it must not be negative")
        return faults

    def chosen_setting(self) -> Setting:
        """The setting, `auto` decided."""
        if self.setting != "auto":
            return self.setting
        return "open_vocabulary" if self.words else "open_subclass" if self.parent else "open_ended"


@dataclass
class DeviceConfig:
    """Where the networks run."""

    device: str = "auto"
    """auto: an accelerator where there is one, else cpu; or cuda:0, mps, cpu."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Number format of the proposer and of the local language model."""


@dataclass
class CountConfig(DeviceConfig, AskConfig, InputConfig):
    """Count objects in pictures with a vision-language model: one JSON file per picture."""

    save_dir: str = ""
    """Output folder; empty: ./object_counts/<data set>/<model>_<prompt>."""

    def validate(self) -> list[str]:
        """One sentence per fault."""
        return InputConfig.validate(self) + AskConfig.validate(self) + self._source_faults()

    def _source_faults(self) -> list[str]:
        if bool(self.base_url) == bool(self.pretrained_model_name_or_path):
            return ["give either --base_url (a server) or --pretrained_model_name_or_path (Qwen2.5-VL here)"]
        return []


@dataclass
class ProposeConfig(DeviceConfig, ProposerConfig, InputConfig):
    """Propose masks of everything in pictures: one file of boxes, scores and masks (COCO run lengths)."""

    rp_save_path: str = ""
    """Output file; empty: ./region_proposals/<data set>/<configuration or weights>.json."""

    def validate(self) -> list[str]:
        """One sentence per fault."""
        return InputConfig.validate(self) + ProposerConfig.validate(self)


@dataclass
class MatcherConfig:
    """How proposals get labels."""

    checkpoint_config: str = "checkpoints/config.yaml"
    """File that names the CLIP checkpoints."""
    clip_model: str = "georsclip"
    """Name in --checkpoint_config; tiny: small random weights, to try the commands."""
    crop_scale: float = 1.2
    """Side of the crop that CLIP sees, as a multiple of the box."""
    clip_batch: int = 200
    """Crops at once."""
    rp_thr: float = 0.0
    """Least score of a proposal."""
    most_overlap: float = 1.0
    """Largest share of a chosen mask that may lie inside another one: below 1, parts and wholes of an object
    are not both used. 1: no limit, as published."""
    assigned_score: bool = False
    """Write the similarity of the given label as the score, not the largest over all labels (published)."""

    def validate(self) -> list[str]:
        """One sentence per fault."""
        faults = []
        if self.clip_model != "tiny" and not Path(self.checkpoint_config).is_file():
            faults.append(f"--checkpoint_config {self.checkpoint_config}: there is no such file")
        for name in ("crop_scale", "clip_batch"):
            if getattr(self, name) <= 0:
                faults.append(f"--{name} is {getattr(self, name)}; it must be above 0")
        if not 0 <= self.most_overlap <= 1:
            faults.append(f"--most_overlap is {self.most_overlap}; it lies between 0 and 1")
        return faults


@dataclass
class MatchConfig(MatcherConfig, DeviceConfig, InputConfig):
    """Give labels to proposals so that the counts hold."""

    count_dir: str = ""
    """Folder of count files."""
    counts: str = ""
    """Instead of --count_dir: "ship=3,plane=2" for every picture, or a JSON file."""
    rp_path: str = ""
    """Proposal file."""
    setting: Setting = "open_ended"
    """open_vocabulary keeps the labels that are classes of the data set and writes category_id."""
    save_path: str = ""
    """Output file; empty: below ./results/<data set>/<setting>/coco_preds/ under the published name."""

    def validate(self) -> list[str]:
        """One sentence per fault."""
        faults = InputConfig.validate(self)
        if bool(self.count_dir) == bool(self.counts):
            faults.append("give either --count_dir FOLDER or --counts")
        if self.count_dir and not Path(self.count_dir).is_dir():
            faults.append(f"--count_dir {self.count_dir}: there is no such folder")
        if not Path(self.rp_path).is_file():
            faults.append(f"--rp_path {self.rp_path or '(not given)'}: there is no such file")
        return faults + MatcherConfig.validate(self)


@dataclass
class RunConfig(MatcherConfig, ProposerConfig, DeviceConfig, AskConfig, InputConfig):
    """From pictures and words to labelled masks: counts, proposals, predictions, overlays, COCO, GeoJSON.

    A run that was broken off goes on where it stopped.
    """

    out: str = "./outputs/instructsam"
    """Output folder."""
    counts: str = ""
    """Counts by hand instead of a language model: "ship=3,plane=2" for every picture, or a JSON file:
    {"ship": 3} or {"picture.png": {"ship": 3}, ...}."""
    draw: bool = True
    """Write a picture with masks, boxes and labels for every picture."""

    def validate(self) -> list[str]:
        """One sentence per fault."""
        faults = InputConfig.validate(self) + AskConfig.validate(self)
        sources = (self.counts, self.base_url, self.pretrained_model_name_or_path)
        if sum(map(bool, sources)) != 1:
            faults.append("counts come from one of --counts, --base_url, --pretrained_model_name_or_path")
        return faults + ProposerConfig.validate(self) + MatcherConfig.validate(self)


def api_key(variable: str) -> str:
    """The key in the environment, "" if unset; ValueError (without the key) if no header could hold it."""
    key = os.environ.get(variable, "").strip()
    if not all("!" <= letter <= "~" for letter in key):
        raise ValueError(f"the environment variable {variable} holds letters that no key has; set it again")
    return key
