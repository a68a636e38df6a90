"""The same command on a cluster of two nodes, submitted by address: the same catalog."""

import numpy as np
import pytest
import ray

from catalogs.maintenance.validate import problems
from catalogs.tables.catalog import Catalog
from datakit import config
from pipelines.runs.ingest import ingest
from pipelines.settings import Settings
from support.compare_catalogs import differences
from support.drawn_videos import encode, shots

pytestmark = pytest.mark.slow


def test_two_nodes_give_the_catalog_of_one(tmp_path, footage, ray_cluster):
    folder = tmp_path / "in"
    folder.mkdir()
    for i in range(8):
        frames = [np.roll(f, j + 9 * i, 1) for j, f in enumerate(shots([50 + i, 60, 55], 240, 320))]
        encode(folder / f"v{i}.mp4", frames, 25, pix_fmt="yuv420p", options={"crf": "20", "preset": "ultrafast"})
    (folder / "broken.mp4").write_bytes(b"nothing" * 5000)
    sources = [str(folder), *map(str, footage.values())]
    settings = config.load(Settings, None, ["recipe=default"])

    one = ingest(sources, str(tmp_path / "one"), settings, ray_cluster.address)
    node = ray_cluster.add_node(num_cpus=2, object_store_memory=256 << 20)
    try:
        ray_cluster.wait_for_nodes()
        where = nodes_of_actors(
            ray_cluster, lambda: ingest(sources, str(tmp_path / "two"), settings, ray_cluster.address)
        )
    finally:
        ray_cluster.remove_node(node)
    assert len(where) == 2, "all actors ran on one node"
    first, second = Catalog(str(tmp_path / "one")), Catalog(str(tmp_path / "two"))
    assert differences(first, second) == [] and not list(problems(second))
    assert one.funnel.videos_quarantined == 1 and second.finished_clips().collect().height == one.funnel.clips > 20


def nodes_of_actors(cluster, work) -> set[str]:
    """Does the work; the nodes that its actors lived on."""
    before = set(actors(cluster))
    work()
    return {facts["Address"]["NodeID"] for key, facts in actors(cluster).items() if key not in before}


def actors(cluster) -> dict[str, dict]:
    ray.init(address=cluster.address, logging_level="ERROR", log_to_driver=False)
    try:
        return ray._private.state.actors()  # the public list needs Ray's dashboard
    finally:
        ray.shutdown()
