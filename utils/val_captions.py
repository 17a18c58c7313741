"""Captions during training: question files answered by the model as it is, scored with BLEU and CIDEr.

The published training does this for NWPU, Sydney and UCM after every epoch. Here the processes share the
questions, and a batch holds many. Protocol `raw` (see `utils.captioning`), figures times 100, as published.
"""

import logging
from dataclasses import replace
from pathlib import Path

from dataset.image import ImageProcessor
from dataset.text import Tokenizer, encode_prompt
from model.lisat import Lisat
from utils.answer_files import plan_batches
from utils.answering import Answerer, question_text
from utils.caption_files import Question, dataset_key, read_questions, some
from utils.captioning import score_captions
from utils.distributed import World
from utils.engine import Engine
from utils.io import is_there
from utils.predict_vqa import find_pictures
from utils.train_lisat_config import TrainLisatConfig

logger = logging.getLogger(__name__)


class CaptionValidation:
    """Figures `<name>_bleu1` .. `<name>_bleu4` and `<name>_cider` of every file of `--val_caption`.

    Raises:
        ValueError: a file that is not there or faulty, or pictures that are missing.
    """

    def __init__(self, config: TrainLisatConfig, tokenizer: Tokenizer, processor: ImageProcessor) -> None:
        self.config, self.tokenizer, self.processor = config, tokenizer, processor
        self.files: dict[str, tuple[list[Question], dict[str, Path]]] = {}
        for path in map(Path, config.caption_files()):
            name = dataset_key(path.stem)
            if name in self.files:
                raise ValueError(f"{path}: a second file of the name {name!r}")
            questions = read_questions(path, answers=True, images=True)
            questions = questions[: config.val_caption_limit or len(questions)]
            if config.conv_type == "plain":  # captions without questions
                questions = [replace(question, text="") for question in questions]
            pictures = find_pictures(questions, [path.parent, Path(config.dataset_dir)])
            missing = [image for image, place in pictures.items() if not is_there(place)]
            if missing:
                raise ValueError(
                    f"{path}: {len(missing)} of {len(pictures)} pictures are not there ({some(missing)}), "
                    f"neither below {path.parent} nor below {config.dataset_dir}"
                )
            self.files[name] = questions, pictures

    def __call__(self, engine: Engine) -> dict[str, float]:
        """The figures, equal in all processes."""
        return self.figures(engine.ds.module, engine.world)

    def figures(self, model: Lisat, world: World) -> dict[str, float]:
        """The figures of a model in evaluation mode."""
        found: dict[str, float] = {}
        for name, (questions, _) in self.files.items():
            texts = self.answers(name, model, world)
            references = {question.question_id: question.answers for question in questions}
            scores = score_captions(references, texts, "raw", ("bleu", "cider")).scores
            found |= {f"{name}_bleu{n}": 100 * scores[f"bleu_{n}"] for n in range(1, 5)}
            found[f"{name}_cider"] = 100 * scores["cider"]
            example = questions[0]
            logger.info("%s: %s -> %r", name, example.image, texts[example.question_id])
        return found

    def answers(self, name: str, model: Lisat, world: World) -> dict[int, str]:
        """Captions of a file by question id, made by all processes together."""
        questions, pictures = self.files[name]
        config = self.config
        answerer = Answerer(
            model, self.tokenizer, self.processor, config.conv_type, config.val_caption_tokens
        )
        tags = model.config.mm_use_im_start_end
        lengths = [
            len(encode_prompt(self.tokenizer, config.conv_type, [(question_text(q), None)], True, tags)[0])
            for q in questions
        ]
        batches = plan_batches([q.image for q in questions], lengths, config.val_caption_batch)
        mine: dict[int, str] = {}
        for batch in batches[world.rank :: world.size]:
            chosen = [questions[position] for position in batch]
            prepared = answerer.prepare(chosen, pictures)
            for reason in prepared.unreadable.values():
                logger.warning("%s: its caption counts as empty: %s", name, reason)
            texts = answerer.answer(prepared)
            mine |= {question.question_id: texts.get(row, "") for row, question in enumerate(chosen)}
        return {key: text for part in world.gather(mine) for key, text in part.items()}
