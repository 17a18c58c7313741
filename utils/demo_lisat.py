"""One picture and one question -> text, score, presence and pictures of the mask (the logic of `demo.py`)."""

import logging
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal
from urllib.parse import urlparse

from utils.io import StrPath

if TYPE_CHECKING:
    import numpy as np

    from dataset.image import ImageProcessor
    from dataset.text import Tokenizer
    from model.lisat import Lisat
    from utils.geo import Georeference
    from utils.predict_lisat import Protocol

logger = logging.getLogger(__name__)

_MOST_BYTES = 512 * 1024 * 1024


@dataclass
class DemoConfig:
    """Ask a LISAT checkpoint about a picture; writes the mask and an overlay."""

    pretrained_model_path: str = ""
    """Checkpoint folder; empty: the one shipped in checkpoints/lisat_tiny."""
    vision_tower: str = ""
    """Tower folder or OpenCLIP file of a published checkpoint; empty: where the checkpoint says."""
    tower_activation: Literal["", "gelu", "quick_gelu"] = ""
    """Activation of a tower without config.json."""
    image: str = ""
    """Picture file, or an http(s) address (fetched only because it is given). Empty: asked for."""
    question: tuple[str, ...] = ()
    """One or more questions in quotes. Empty: asked for until an empty line."""
    vis_save_dir: str = "./demo_output"
    """Results go into a folder per picture below this one."""
    conv_type: str = ""
    """Prompt template; empty: the checkpoint's own (vicuna_v1 for one that does not say, as published)."""
    image_size: int = 0
    """Side of the SAM input; 0: what the checkpoint says."""
    bands: tuple[int, ...] = ()
    """GeoTIFF: red, green and blue as band numbers from 1; empty: as tagged, else the first three."""
    scaling: str = "auto"
    """GeoTIFF: numbers to 0..255 by auto, none, dtype, range:LO,HI or percentile:P,Q (utils/geo.py)."""
    model_max_length: int = 512
    """Longest answer in tokens."""
    score: Literal["foreground", "iou"] = "foreground"
    """Score of a mask: its mean foreground probability, or SAM's own estimate of its IoU."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Number format; auto: bf16 with an accelerator, fp32 without."""
    load_in_8bit: bool = False
    """Language model weights in 8 bits (bitsandbytes); whatever draws masks stays in --precision."""
    load_in_4bit: bool = False
    """Language model weights in 4 bits (NF4)."""
    device: str = "auto"
    """auto: an accelerator where there is one, else cpu."""

    def validate(self) -> list[str]:
        """One sentence per fault."""
        faults = []
        if self.model_max_length < 1:
            faults.append(f"--model_max_length is {self.model_max_length}; it must be at least 1")
        if self.image and not _is_address(self.image) and not Path(self.image).is_file():
            faults.append(f"--image {self.image}: there is no such file")
        if self.load_in_8bit and self.load_in_4bit:
            faults.append("--load_in_8bit and --load_in_4bit exclude each other")
        return faults


def run(config: DemoConfig, ask: Callable[[str], str] = input) -> Iterator[str]:
    """Answer the questions of the command line, or those `ask(prompt)` gives; yields texts to show."""
    from utils.evaluate_lisat import model_folder

    folder = model_folder(config.pretrained_model_path)  # before the slow imports
    from dataset.text import CONV
    from utils.distributed import choose_device
    from utils.geo import parse_scaling
    from utils.predict_lisat import Protocol, llm_weights, load_for_inference

    parse_scaling(config.scaling)
    if config.conv_type and config.conv_type not in CONV:
        raise ValueError(f"--conv_type {config.conv_type} is unknown; choose one of {', '.join(CONV)}")
    device = config.device if ":" in config.device else choose_device(config.device)
    model, tokenizer, processor = load_for_inference(
        folder,
        device,
        config.precision,
        config.image_size,
        llm_weights(config),
        vision_tower=config.vision_tower or None,
        tower_activation=config.tower_activation or None,
    )
    protocol = Protocol(
        "open",
        conv_type=config.conv_type or model.config.conv_type,
        max_new_tokens=config.model_max_length,
        score=config.score,
    )
    demo = Demo(model, tokenizer, processor, protocol, config.vis_save_dir, config.bands, config.scaling)
    if config.question and config.image:
        yield from (answer.text for answer in demo.answer(config.image, config.question))
        return
    demo.remember_pictures()
    for question, image in _dialogue(config, ask):
        try:
            yield from (answer.text for answer in demo.answer(image, [question]))
        except (ValueError, OSError) as error:
            yield f"{error}"


def _dialogue(config: DemoConfig, ask: Callable[[str], str]) -> Iterator[tuple[str, str]]:
    """(question, picture) pairs until an empty line or the end of the input."""
    questions = iter(config.question)
    while True:
        try:
            question = next(questions, None) if config.question else ask("Question (empty to end): ").strip()
            image = (config.image or ask("Picture (path or address): ").strip()) if question else ""
        except EOFError:
            return
        if not question or not image:
            return
        yield question, image


@dataclass
class Answer:
    """What the model said to one question, and the files that show it."""

    question: str
    words: str
    present: bool
    score: float | None
    area: float
    files: dict[str, Path]

    @property
    def text(self) -> str:
        """Lines for the terminal."""
        shown = self.words.replace("</s>", "").strip() or "(no words)"
        if self.present:
            found = f"found, score {self.score:.3f}, {self.area:.2%} of the picture"
        else:
            found = "nothing here"
        paths = ", ".join(str(path) for path in self.files.values())
        return f"Q: {self.question}\nA: {shown}\n   {found}\n   {paths}"


@dataclass
class Demo:
    """A loaded model that answers questions and writes pictures into `folder`/<picture's stem>/.

    `bands` and `scaling` say how GeoTIFFs are read (`utils.geo.read_geotiff`).
    """

    model: "Lisat"
    tokenizer: "Tokenizer"
    processor: "ImageProcessor"
    protocol: "Protocol"
    folder: StrPath
    bands: tuple[int, ...] = ()
    scaling: str = "auto"
    _written: Counter = field(default_factory=Counter)
    _prepare: Callable | None = None

    def remember_pictures(self) -> None:
        """Keep SAM's embeddings, so that later questions about a picture do not encode it again."""
        from utils.embedding_cache import EmbeddingCache

        self._prepare = EmbeddingCache(self.model.encode_images, "memory", "").replace

    def answer(self, image: str, questions: tuple[str, ...] | list[str]) -> list[Answer]:
        """Answer questions about one picture (a path or an http(s) address), which is encoded once.

        Writes per question seg_mask.jpg (mask x 100) and seg_rgb.jpg as published, seg_mask.png (0 / 255) and
        seg_overlay.png; from the second question on a picture the names carry a number (seg_mask_2.png).
        For a georeferenced picture also seg_mask.tif (0 / 1, in its system) and seg_mask.geojson (polygons in
        longitude and latitude, with question, answer and score).
        """
        import numpy as np

        from dataset.sample import Conversation, Sample
        from utils.predict_lisat import predict
        from utils.predictions import decode_mask

        rgb, place = read_picture(image, self.bands, self.scaling)
        none = np.zeros((0, *rgb.shape[:2]), dtype=np.uint8)
        asked = [Conversation([(question, None)], none, query=question) for question in questions]
        dataset = [Sample(image, rgb, asked)]
        parts = self.model, self.tokenizer, self.processor
        (_, _, records) = next(predict(*parts, dataset, self.protocol, prepare=self._prepare))
        answers = []
        for record in records:
            masks = [record["prediction"], *record.get("more_masks", ())]
            mask = np.logical_or.reduce([decode_mask(rle) for rle in masks])
            present = bool(record["pred_exists"] or mask.any())
            answer = Answer(record["query"], record["generated"], present, record["score"], mask.mean(), {})
            answer.files |= self._write(_stem(image), rgb, mask)
            if place is not None:
                answer.files |= _write_geo(answer, mask, place)
            answers.append(answer)
        return answers

    def _write(self, stem: str, rgb: "np.ndarray", mask: "np.ndarray") -> dict[str, Path]:
        from utils.visualize import overlay, published_overlay, write_image

        self._written[stem] += 1
        number = f"_{self._written[stem]}" if self._written[stem] > 1 else ""
        folder = Path(self.folder) / stem
        values = mask.astype("uint8")
        pictures = {
            f"seg_mask{number}.png": values * 255,
            f"seg_overlay{number}.png": overlay(rgb, mask),
            f"seg_mask{number}.jpg": values * 100,
            f"seg_rgb{number}.jpg": published_overlay(rgb, mask),
        }
        return {name: write_image(folder / name, picture) for name, picture in pictures.items()}


def _write_geo(answer: Answer, mask: "np.ndarray", place: "Georeference") -> dict[str, Path]:
    """The mask as GeoTIFF and GeoJSON beside its picture."""
    from utils.geo import mask_polygons, to_geometry, write_geojson, write_raster

    path = answer.files[next(iter(answer.files))]
    raster, vector = path.with_suffix(".tif"), path.with_suffix(".geojson")
    properties = {"question": answer.question, "answer": answer.words, "present": answer.present}
    properties |= {"score": answer.score, "pixels": int(mask.sum())}
    geometry = to_geometry(mask_polygons(mask), place)
    write_raster(raster, mask.astype("uint8"), place)
    write_geojson(vector, [{"type": "Feature", "properties": properties, "geometry": geometry}])
    return {file.name: file for file in (raster, vector)}


def read_picture(
    image: str, bands: tuple[int, ...] = (), scaling: str = "auto"
) -> tuple["np.ndarray", "Georeference | None"]:
    """uint8 (H, W, 3) RGB of a file or an http(s) address, and where it lies if it is a GeoTIFF that says so.

    Raises:
        ValueError: no such file or address, or what is there is no picture.
    """
    if not _is_address(image):
        return _load(image, bands, scaling)
    import tempfile

    try:
        with urllib.request.urlopen(image, timeout=30) as response:
            data = response.read(_MOST_BYTES + 1)
    except OSError as error:
        raise ValueError(f"{image} cannot be fetched: {error}") from error
    if len(data) > _MOST_BYTES:
        raise ValueError(f"{image} is larger than {_MOST_BYTES >> 20} MiB; fetch it and cut it into tiles")
    with tempfile.NamedTemporaryFile(suffix=Path(urlparse(image).path).suffix) as file:
        file.write(data)
        file.flush()
        try:
            return _load(file.name, bands, scaling)
        except ValueError as error:
            raise ValueError(f"{image}: what is there is no picture ({error})") from error


def _load(path: str, bands: tuple[int, ...], scaling: str) -> tuple["np.ndarray", "Georeference | None"]:
    from dataset.image import load_rgb
    from utils.geo import is_geotiff, read_geotiff

    if not is_geotiff(path):
        return load_rgb(path), None
    picture = read_geotiff(path, bands, scaling)
    logger.info("%s: %s", path, picture.rules)
    return picture.rgb, picture.place


def _is_address(image: str) -> bool:
    return urlparse(image).scheme in ("http", "https")


def _stem(image: str) -> str:
    return Path(urlparse(image).path if _is_address(image) else image).stem or "picture"
