"""The one sample type: an image, the conversations held about it, and the masks they ask for."""

from dataclasses import dataclass, field

import numpy as np


@dataclass
class Conversation:
    """One question-answer exchange (or several turns) about one image; becomes one token row.

    `turns` holds (user text, assistant text) without image tags and role words; an assistant text of
    None leaves the prompt open for generation. `masks` is uint8 (K, H, W) with values 0, 1 and 255
    (255 = ignore), one mask per `[SEG]` in the assistant texts, in order. An open prompt may carry the
    ground truth of what it asks for in the same field.
    """

    turns: list[tuple[str, str | None]]
    masks: np.ndarray
    query: str = ""
    exists: bool = True
    kind: str = ""
    has_image: bool = True
    ref_id: int = -1
    sent_id: int = -1


@dataclass
class Sample:
    """One image with all conversations asked on it. `image` is uint8 (H, W, 3) RGB. `dropped` counts
    conversations that were left out before because they were too long."""

    image_path: str
    image: np.ndarray
    conversations: list[Conversation] = field(default_factory=list)
    dropped: int = 0
