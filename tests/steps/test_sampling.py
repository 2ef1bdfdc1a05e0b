"""How prompts are planned for the prefill: by the device that has them."""

import numpy as np

from easyrl.data.packing import Shape
from easyrl.steps.sampling import plan_prompts, prompt_shapes


def test_every_device_has_its_own_prompts_in_its_own_rows():
    width, shards = 300, 4
    lengths = np.array([300, 20, 0, 0, 100, 190, 299, 300])
    plans = plan_prompts(lengths, width, shards)
    found = np.zeros((shards, 2, width), int)
    for plan, shape in zip(plans, prompt_shapes(2, width), strict=True):
        G, R, S = plan.source_GRS.shape
        assert (shards * shape.rows, shape.length) == (R, S) and plan.count <= G
        assert (plan.source_GRS[plan.count :] == -1).all()
        for device, source in enumerate(np.split(plan.source_GRS, shards, axis=1)):
            np.add.at(found[device].reshape(-1), source[source >= 0], 1)
    np.testing.assert_array_equal(found.reshape(8, width), np.arange(width) < lengths[:, None])


def test_prompts_of_the_full_length_fill_whole_rows():
    """As much is computed as in a padded batch."""
    plans = plan_prompts(np.full(16, 128), 128, 2)
    assert prompt_shapes(8, 128)[0] == Shape(8, 128)
    assert [int(plan.count) for plan in plans] == [1, 0, 0, 0] and (plans[0].segment_ids_GRS == 1).all()


def test_groups_have_as_many_rows_as_are_asked_for():
    """Over all devices, whose share of them is the same."""
    plans = plan_prompts(np.full(16, 128), 128, 2, rows=4)
    assert int(plans[0].count) == 4 and plans[0].source_GRS.shape[1:] == (4, 128)
