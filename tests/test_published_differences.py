"""The list of differences from the published programs names flags that exist."""

import re
from dataclasses import fields

from tests.conftest import REPO
from utils.eval_captioning import EvalCaptioningConfig
from utils.evaluate_lisat import EvalConfig
from utils.evaluate_predictions import ScoreConfig
from utils.train_lisat_config import TrainLisatConfig

PROGRAMS = {
    "train": TrainLisatConfig,
    "eval": EvalConfig,
    "score": ScoreConfig,
    "captions": EvalCaptioningConfig,
}


def test_flags_exist() -> None:
    text = (REPO / "docs" / "published_differences.md").read_text(encoding="utf-8")
    rows = [line for line in text.splitlines() if line.startswith("|") and "`--" in line.rpartition("| ")[2]]
    assert len(rows) > 10
    named = set()
    for row in rows:
        program = ""
        for word in re.findall(
            rf"\b({'|'.join(PROGRAMS)})\b|`--(?:no-)?([a-z_0-9]+)`", row.rpartition("| ")[2]
        ):
            program = word[0] or program
            if word[1]:
                assert word[1] in {field.name for field in fields(PROGRAMS[program])}, (program, word[1], row)
                named.add((program, word[1]))
    wanted = {"compat_unk_mask", "compat_leftpad_mask", "respect_ignore", "val_sampling", "low_precision_pe"}
    assert wanted <= {flag for _, flag in named}
    assert {("train", "low_precision_pe"), ("eval", "low_precision_pe")} <= named
