"""Asking a model the questions of a rubric about a batch."""

from __future__ import annotations

import numpy as np

from models.multimodal import evenly_spaced
from models.viewer import ViewerRef, load_viewer
from stages.batch import Batch
from stages.rubric import Rubric


def ask(rubric: Rubric, model: ViewerRef, batch: Batch, num_frames: int) -> dict[str, np.ndarray]:
    """P(yes) for each question that is asked about such media, float32 [n]: of at most `num_frames` of the `frames`."""
    total = batch["frames"].shape[1]
    asked = [question for question in rubric.questions if question.asked(total)]
    questions = [[question.format(prompt, total) for question in asked] for prompt in batch["prompt"]]
    p_yes = load_viewer(model).p_yes(evenly_spaced(batch["frames"], num_frames), questions)
    return {question.name: p_yes[:, column] for column, question in enumerate(asked)}
