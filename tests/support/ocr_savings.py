"""What the savings of the OCR stage skip, and that they change nothing."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from pipelines.stages.letterbox import Letterbox
from pipelines.stages.ocr import Ocr, crop, first_of_kind
from pipelines.video_tasks.analyse import analyse
from pipelines.video_tasks.messages import ClipBatch, PassJob


def savings(ocr: Ocr, paths: Iterable) -> tuple[int, int]:
    """Checks that skipping flat and repeated frames changes no clip's `ocr_area` by more than 0.002.

    Returns:
        pictures skipped, pictures in all.
    """
    skipped = compared = 0
    for path in paths:
        job = PassJob("v", str(path), "0", 0, stages={"letterbox": Letterbox}, positions=(0.1, 0.5, 0.9))
        for batch in (b for b in analyse(job) if isinstance(b, ClipBatch)):
            saving = ocr.run(batch.rows, batch.images)
            for row, clip, saved in zip(batch.rows, batch.images, saving):
                if not clip:
                    continue
                single = [ocr._detect({(0, i): crop(image, row)})[0, i][0] for i, image in enumerate(clip)]
                assert abs(float(np.mean(single)) - saved["ocr_area"]) <= 0.002, path
                kinds = first_of_kind([crop(image, row) for image in clip])
                skipped += len(clip) - len({k for k in kinds if k is not None})
                compared += len(clip)
    return skipped, compared
