"""An `embed` stage that says what it looked at. Workers import this module by name."""

from __future__ import annotations

import json
import os

from pipelines.stages.embed import Embed


class CountingEmbed(Embed):
    """Leaves a line for every clip: its id and how many of its pictures were embedded."""

    def run(self, rows, images):
        with open(os.path.join(os.environ["FAULTY_ATTEMPTS"], "embedded"), "a") as file:
            file.writelines(json.dumps([row["clip_id"], len(clip)]) + "\n" for row, clip in zip(rows, images))
        return super().run(rows, images)
