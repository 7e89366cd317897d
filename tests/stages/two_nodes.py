"""A sampler group on a Ray cluster of two raylets with a CPU each, so that it must span both.

python -m tests.stages.two_nodes BATCH.pickle CHECKPOINT    # prints the nodes of the ranks and writes latents beside BATCH
"""

from __future__ import annotations

import json
import pickle
import sys
from pathlib import Path
from typing import Any

import numpy as np
import ray
from ray.cluster_utils import Cluster

from models.generator import GeneratorRef
from models.parallel.degrees import Degrees
from models.plan import SamplerPlan
from stages.group import InGroup
from stages.sample import SampleLatents

PLAN = SamplerPlan(num_inference_steps=2)


@ray.remote(num_cpus=1)
class Leader:
    """What an actor of the graph is to a group: the process of its rank 0."""

    def sample(self, folder: str, degrees: Degrees, batch: dict[str, np.ndarray]) -> tuple[np.ndarray, list[str]]:
        from ray.util import placement_group_table

        sample = SampleLatents((GeneratorRef(folder, parallel=degrees),), PLAN, len(batch["prompt"]))
        group = InGroup(sample, degrees.size, num_cpus=1)
        group.load()
        latents = group(batch)["latents"]
        (place,) = placement_group_table().values()
        return latents, [ray.get_runtime_context().get_node_id(), *place["bundles_to_node_id"].values()]


def main(path: Path, folder: str) -> None:
    batch: dict[str, Any] = pickle.loads(path.read_bytes())
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    cluster.add_node(num_cpus=1)
    ray.init(cluster.address, logging_level="ERROR", log_to_driver=False)
    latents, nodes = ray.get(Leader.remote().sample.remote(folder, Degrees(cfg=2), batch))
    np.save(path.with_suffix(".npy"), latents)
    print(json.dumps(nodes))
    ray.shutdown()
    cluster.shutdown()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
