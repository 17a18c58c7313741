"""LISAT_PRE as stages of training: align, instruct, merge, and the segmentation that starts from it."""

import json
import random
import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from dataset.registry import load_dataset
from dataset.synthetic import write_scenes
from dataset.synthetic_qa import write_conversations
from dataset.text import IGNORE_INDEX
from model.checkpoint import load_base, load_llava
from tests.model.checkpoint_tools import base_model, base_tokenizer, equal, write_bases
from tests.test_train_lisat import run, trained
from utils.checkpointing import read_state, resolve_checkpoint
from utils.config import ConfigError
from utils.merge_lisat import MergeConfig, merge
from utils.train_lisat_config import TrainLisatConfig
from utils.train_lisat_job import build_model, dry_run, open_setup, validation

TEXT_ONLY = {"conversations": [{"from": "human", "value": "Is a ship red?"}, {"from": "gpt", "value": "No."}]}


@pytest.fixture(scope="module")
def align(tmp_path_factory: pytest.TempPathFactory) -> TrainLisatConfig:
    """Settings of an alignment from a small random base; its data, and those of the other stages."""
    folder = tmp_path_factory.mktemp("pre")
    base, _ = write_bases(folder / "base")
    for number, split in enumerate(("train", "val")):
        place = folder / "data" / "synthetic" / split
        write_scenes(place, 6, number, questions=3, size=64)
        write_conversations(place, 6, number, questions=2, size=64)
    dialogues = folder / "data" / "synthetic" / "train" / "instructions.json"
    dialogues.write_text(json.dumps(json.loads(dialogues.read_text()) + [TEXT_ONLY] * 2))
    return TrainLisatConfig(
        stage="align",
        log_base_dir=str(folder / "runs"),
        exp_name="align",
        version=str(base),
        reinit_projector=True,
        dataset_dir=str(folder / "data"),
        dataset="vqa",
        vqa_data="synthetic/train/captions.json|synthetic/train/images",
        val_dataset="vqa:synthetic/val/captions.json|synthetic/val/images",
        val_batch_size=2,
        val_limit=5,
        gradient_checkpointing=False,
        model_max_length=400,
        precision="fp32",
        zero_stage=0,
        epochs=3,
        steps_per_epoch=0,
        batch_size=3,
        lr=2e-2,
        lr_schedule="constant",
        warmup_steps=0,
        workers=0,
        save_every_steps=1,
        eval_every_steps=1,
        print_freq=1,
        keep_last=1,
        device="cpu",
        tensorboard=False,
    )


@pytest.fixture(scope="module")
def aligned(align: TrainLisatConfig) -> TrainLisatConfig:
    assert run(align) == [0]
    return align


@pytest.fixture(scope="module")
def instruct(aligned: TrainLisatConfig) -> TrainLisatConfig:
    """Settings of an instruction tuning that starts from the aligned projector."""
    return replace(
        aligned,
        stage="instruct",
        exp_name="instruct",
        reinit_projector=False,
        projector=aligned.run_dir,
        vqa_data=aligned.vqa_data.replace("captions", "instructions"),
        val_dataset=aligned.val_dataset.replace("captions", "instructions"),
        lora_r=4,
        lora_alpha=8,
        lora_dropout=0.2,
        lora_target_modules="q_proj,v_proj,down_proj",
        group_by_length=True,
        lr_multipliers="mm_projector=0.1",
        batch_size=2,
    )


@pytest.fixture(scope="module")
def tuned(instruct: TrainLisatConfig) -> TrainLisatConfig:
    assert run(instruct) == [0]
    return instruct


def validations(config: TrainLisatConfig) -> list[dict[str, float]]:
    lines = (Path(config.run_dir) / "metrics.jsonl").read_text().splitlines()
    return [line for line in map(json.loads, lines) if line["split"] == "val"]


def merged(config: TrainLisatConfig, layout: str = "lisat") -> Path:
    folder = Path(config.run_dir) / f"merged_{layout}"
    return merge(MergeConfig(config.run_dir, str(folder), layout=layout))


def test_alignment_trains_the_projector_and_nothing_else(aligned: TrainLisatConfig) -> None:
    assert set(trained(aligned)) == {f"mm_projector.{i}.{p}" for i in (0, 2) for p in ("weight", "bias")}
    found = validations(aligned)
    assert len(found) == 6 and {line["n_rows"] for line in found} == {5.0}
    losses = {line["step"]: line["loss"] for line in found}
    assert losses[6] < losses[1]
    best = read_state(resolve_checkpoint(Path(aligned.run_dir) / "checkpoints" / "best"))
    assert best["best_score"] == min(losses.values()) == losses[best["step"]]
    model, config = load_llava(merged(aligned))
    base = base_model()
    assert equal(model.llm, base.llm) and equal(model.vision_tower, base.vision_tower)
    weights = {n: t for n, t in model.state_dict().items() if n.startswith("mm_projector.")}
    where = Path(aligned.run_dir) / "checkpoints" / "best"
    assert equal(weights, trained(replace(aligned, log_base_dir="", exp_name=str(where))))
    assert config.sam is None and not config.mm_use_im_start_end


def test_instruction_tuning_trains_lora_and_projector(tuned: TrainLisatConfig) -> None:
    state = trained(tuned)
    projector = {name for name in state if name.startswith("mm_projector.")}
    assert len(projector) == 4 and all(".lora_" in name for name in state.keys() - projector)
    model, _ = load_llava(merged(tuned))
    base, _ = load_llava(tuned.version, projector=tuned.projector)
    moved = {n for n, t in model.state_dict().items() if not torch.equal(t, base.state_dict()[n])}
    parts = ("mm_projector.", "q_proj.weight", "v_proj.weight", "down_proj.weight")
    assert all(any(part in name for part in parts) and "tower" not in name for name in moved)
    assert len(moved) == 4 + 2 * 3


def test_merged_base_starts_the_segmentation(tuned: TrainLisatConfig, tmp_path: Path) -> None:
    """Both layouts give the same model, and the LISAT to train differs from it by tokens and masks alone."""
    sam = Path(tuned.version).parent / "sam.safetensors"
    ours, published = (merged(tuned, layout) for layout in ("lisat", "published"))
    models = [load_llava(folder)[0] for folder in (ours, published)]
    assert equal(*models)
    assert json.loads((published / "config.json").read_text())["architectures"] == ["LlavaLlamaForCausalLM"]
    for folder in (ours, published):
        config = TrainLisatConfig(
            version=str(folder),
            vision_pretrained=str(sam),
            log_base_dir=str(tmp_path),
            exp_name=folder.name,
            dataset_dir=tuned.dataset_dir,
            dataset="synthetic|train",
            val_dataset="synthetic|val",
            templates="tiny",
            precision="fp32",
            zero_stage=0,
            epochs=1,
            steps_per_epoch=1,
            batch_size=2,
            workers=0,
            device="cpu",
            tensorboard=False,
        )
        facts = dry_run(config)
        assert facts["stage"] == "segmentation" and facts["seg_token_id"] == len(base_tokenizer())
        model, _ = load_base(folder, sam, tokenizer=base_tokenizer())
        rows = len(base_tokenizer())
        assert torch.equal(model.llm.lm_head.weight[:rows], models[0].llm.lm_head.weight)
        assert equal(model.mm_projector, models[0].mm_projector)
    assert run(config) == [0]
    assert read_state(resolve_checkpoint(config.run_dir))["step"] == 1


def test_killed_and_resumed_is_the_same_run(tuned: TrainLisatConfig) -> None:
    operations = int((Path(tuned.run_dir) / "operations.txt").read_text())
    config = replace(tuned, exp_name="killed", workers=1)
    deadly = random.Random(time.time_ns()).randint(1, operations)
    assert run(config, kill_at=deadly) == [-signal.SIGKILL], deadly
    assert run(config) == [0]
    for name, value in trained(tuned).items():
        assert torch.equal(trained(config)[name], value), name
    assert validations(config) == validations(tuned)


def test_validation_is_the_mean_over_tokens_on_any_number_of_processes(tuned: TrainLisatConfig) -> None:
    config = replace(tuned, exp_name="two", eval_only=True, resume=tuned.run_dir)
    assert run(config, ranks=2) == [0, 0]
    (two,), one = validations(config), validations(tuned)[-1]
    assert two.pop("split") == one.pop("split") and two == pytest.approx(one, rel=1e-6)
    model, _ = load_llava(merged(tuned))
    setup = open_setup(tuned.settled())
    best = int((Path(tuned.run_dir) / "checkpoints" / "best").read_text().partition("-")[2])
    total = correct = tokens = 0.0
    for index in range(len(setup.val_data)):
        batch = validation(setup).collate([setup.val_data[index]])
        assert batch["images"] is None
        with torch.no_grad():
            logits = model(**batch, token_figures=True)
        total += float(logits["loss"]) * float(logits["row_tokens"].sum())
        tokens += float(logits["row_tokens"].sum())
        correct += float(logits["row_correct"].sum())
    (line,) = (line for line in validations(tuned) if line["step"] == best)
    assert line["loss"] == pytest.approx(total / tokens, rel=1e-4)
    assert (line["n_tokens"], line["token_accuracy"]) == (tokens, pytest.approx(correct / tokens, abs=0.01))


def test_every_answer_of_a_dialogue_is_learnt(instruct: TrainLisatConfig) -> None:
    setup = open_setup(instruct.settled())
    data = load_dataset(f"vqa:{instruct.vqa_data}", instruct.dataset_dir)
    kinds = set()
    for index in range(len(data)):
        batch = setup.collate([setup.train_data.draw(index)])
        turns = data.draw(index).conversations[0].turns
        encode = setup.tokenizer.encode
        answers = [i for _, a in turns for i in [*encode(a, bos=False), setup.tokenizer.eos_token_id]]
        assert batch["labels"][0][batch["labels"][0] != IGNORE_INDEX].tolist() == answers
        kinds.add((len(turns) > 1, bool((batch["input_ids"] == -200).any())))
    assert {(True, True), (False, False)} <= kinds  # dialogues about pictures, and rows of text


def test_alignment_leaves_out_text_and_plain_shows_no_question(align: TrainLisatConfig) -> None:
    mixed = align.vqa_data.replace("captions", "instructions")
    setup = open_setup(replace(align, vqa_data=mixed, conv_type="plain").settled())
    assert len(setup.train_data) == 8
    prompts = set()
    for index in range(8):
        (conversation,) = setup.train_data.draw(index).conversations
        batch = setup.collate([setup.train_data.draw(index)])
        assert conversation.has_image and batch["conversation_list"] == [
            f"<image>{conversation.turns[0][1]}\n"
        ]
        prompts |= set(batch["conversation_list"])
    assert len(prompts) > 3


def test_projector_of_a_run_equals_its_merged_folder(
    instruct: TrainLisatConfig, aligned: TrainLisatConfig
) -> None:
    start = build_model(open_setup(instruct.settled()))
    again = build_model(open_setup(replace(instruct, projector="", version=str(merged(aligned))).settled()))
    assert equal(start, again)


def test_faults_of_the_stages(align: TrainLisatConfig) -> None:
    wrong = replace(
        align,
        new_rows_only=True,
        val_sampling="official",
        val_dataset=TrainLisatConfig.val_dataset,
        projector="nowhere.bin",
        cache_image_embeddings="memory",
    )
    faults = " ".join(wrong.validate())
    for part in ("--new_rows_only", "--val_sampling official", "held-out", "nowhere.bin", "--cache_image"):
        assert part in faults
    assert "reinit_projector" in " ".join(replace(align, stage="segmentation").validate())
    masks = replace(align, dataset="synthetic|train", val_dataset="synthetic|val", templates="tiny")
    with pytest.raises(ConfigError, match="val_dataset") as caught:
        open_setup(replace(masks, val_dataset="vqa:nowhere.json").settled())
    assert "nowhere.json" in str(caught.value)
    setup = open_setup(masks.settled())
    with pytest.raises(ValueError, match="do not suit this --stage"):
        setup.train_data.draw(0)
