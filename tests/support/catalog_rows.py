"""Rows of hand-made catalogs."""

from datakit.identity import clip_id

V = "ab" + "0" * 30


def video(video_id=V, **columns) -> dict:
    return {
        "video_id": video_id,
        "shard": video_id[0],
        "status": "ok",
        "run_id": "r",
        "clip_count": 1,
        "uris": [{"uri": f"/v/{video_id}.mp4", "size": 1, "etag": "e"}],
        "kind": "video",
        "duration_s": 4.0,
        **columns,
    }


def clip(video_id=V, start=0, **columns) -> dict:
    return {
        "clip_id": clip_id(video_id, 0, start, start + 100),
        "video_id": video_id,
        "shard": video_id[0],
        "stream": 0,
        "run_id": "r",
        "start_pts": start,
        "end_pts": start + 100,
        "start_s": start / 50,
        "end_s": start / 50 + 2,
        "errors": [],
        "stage_versions": [],
        **columns,
    }
