"""The schedule against its closed forms, without torch."""

from __future__ import annotations

import pytest

from models.parallel.schedule import Task, makespan, needs, slots, stage_layers, tasks


@pytest.mark.parametrize(("blocks", "stages"), [(5, 4), (33, 1), (33, 4), (33, 8), (64, 8), (129, 8)])
def test_the_makespan_is_that_of_the_closed_form(blocks: int, stages: int):
    assert makespan(blocks, 50, stages) == blocks * 50 + stages**2 - 1


@pytest.mark.parametrize(("blocks", "steps", "stages"), [(1, 1, 1), (1, 4, 3), (3, 2, 2), (7, 5, 4), (20, 6, 4)])
def test_every_task_runs_once_and_not_before_what_it_needs(blocks: int, steps: int, stages: int):
    order = list(tasks(blocks, steps))
    assert sorted(order) == [Task(block, step) for block in range(blocks) for step in range(steps)]
    when = slots(blocks, steps, stages)
    assert list(when) == order and len(set(when.values())) == len(order)
    for task in order:
        assert all(when[task] >= when[need] + stages for need in needs(task, blocks))


def test_videos_in_one_queue_fill_and_drain_it_once():
    length, steps, stages = 8, 6, 4
    apart, together = makespan(length, steps, stages), max(slots(3 * length, steps, stages, length).values()) + stages
    assert together == 3 * length * steps + stages**2 - 1 < 3 * apart
    assert needs(Task(length, 2), length) == (Task(length, 1),)  # the second video's first block has no context
    assert needs(Task(length + 1, 2), length) == (Task(length + 1, 1), Task(length, 2))


def test_the_newest_block_goes_first_and_its_context_is_one_step_cleaner():
    order = list(tasks(4, 3))
    assert order[3:6] == [Task(2, 0), Task(1, 1), Task(0, 2)]
    for task in order:
        if task.block and task.step + 1 < 3:
            context = [other for other in order[: order.index(task)] if other.block == task.block - 1]
            assert context[-1].step == task.step


def test_layers_are_shared_with_the_longer_stages_first():
    assert stage_layers(30, 8) == [*(range(4 * at, 4 * at + 4) for at in range(6)), range(24, 27), range(27, 30)]
    assert [len(layers) for layers in stage_layers(5, 5)] == [1] * 5
