"""Every column of every table: type, unit, meaning, and the stage that fills it. Scores are declared by their stages.

Delta has no float16 and no large unsigned integers; vectors are lists of float32, hashes binary, ids
hex strings. Times are PTS integers in the stream's own `time_base`; seconds are derived from them. Bump
`VERSION` with any change here; a new score needs none, for catalogs take a column that they lack with the first write.
"""

from __future__ import annotations

from collections.abc import Iterable

import pyarrow as pa

from datakit.columns import Column
from datakit.scores import score_columns

VERSION = 5

S, I4, I8, F4, F8, B = pa.string(), pa.int32(), pa.int64(), pa.float32(), pa.float64(), pa.bool_()
TIME = pa.timestamp("us", "UTC")
URI = pa.struct([("uri", S), ("size", I8), ("etag", S)])
CUT = pa.struct([("frame", I8), ("pts", I8), ("score", F4)])
ERROR = pa.struct([("stage", S), ("kind", S), ("message", S)])
STAGE_VERSION = pa.struct([("stage", S), ("fingerprint", S)])
CHECKPOINT = pa.struct([("path", S), ("step", I8), ("created_at", TIME)])


VIDEOS = (
    Column("video_id", S, "", "content hash: size, first and last MiB, six samples between"),
    Column("uris", pa.list_(URI), "", "where it was seen, with size in bytes and etag (or modification time)"),
    Column("shard", S, "", "leading hex digits of video_id"),
    Column("status", S, "", "pending, ok, quarantined; clips of other than ok videos do not count"),
    Column("error_stage", S, "", "stage that failed"),
    Column("error_kind", S, "", "see datakit.errors.ErrorKind"),
    Column("error", S, "", "what happened"),
    Column("kind", S, "", "video or image (a video of one frame)"),
    Column("container", S, "", "FFmpeg demuxer"),
    Column("codec", S, "", "FFmpeg codec name"),
    Column("profile", S, "", "codec profile"),
    Column("pix_fmt", S, "", "FFmpeg pixel format"),
    Column("bit_depth", I4, "bits", "per sample"),
    Column("color_space", S, "", "matrix tag (null: untagged)"),
    Column("color_range", S, "", "tv or pc (null: untagged)"),
    Column("color_transfer", S, "", "transfer tag (null: untagged)"),
    Column("color_primaries", S, "", "primaries tag (null: untagged)"),
    Column("width", I4, "px", "for display: after rotation and pixel aspect"),
    Column("height", I4, "px", "for display: after rotation and pixel aspect"),
    Column("rotation", I4, "degrees", "counter-clockwise turn from stored to displayed picture"),
    Column("fps", F8, "frames/s", "average rate by the header, else by the frames (null for images)"),
    Column("vfr", B, "", "frame intervals differ by more than a tenth of their mean"),
    Column("time_base", S, "s", "num/den seconds per PTS unit"),
    Column("start_pts", I8, "pts", "of the first decoded frame"),
    Column("num_frames", I8, "frames", "decoded count"),
    Column("duration_s", F8, "s", "first frame to end of the last"),
    Column("bit_rate", I8, "bits/s", "of the video stream, else of the container"),
    Column("bits_per_pixel", F8, "bits", "bit_rate / (width · height · fps)"),
    Column("has_audio", B, "", "the container holds an audio stream"),
    Column("cuts", pa.list_(CUT), "", "first frame of every new shot, as the detector gave them", "shots"),
    Column("clip_count", I4, "clips", "candidate clips of this video"),
    Column("license", S, "", "from the input list"),
    Column("source_url", S, "", "from the input list"),
    Column("attribution", S, "", "from the input list"),
    Column("source_caption", S, "", "from the input list"),
    Column("extra", S, "", "further columns of the input list, as JSON"),
    Column("fingerprint", S, "", "of what decides which clips there are: shots settings and version"),
    Column("run_id", S, "", "run that finished the video (null: pending); its clips are the ones that count"),
    Column("finished_at", TIME, "UTC", "when"),
)

SCORES = score_columns()
"""What stages fill; see `pipelines.stages.base` for how one declares its columns."""

CLIPS = (
    Column("clip_id", S, "", "hash of video_id, stream, start_pts, end_pts"),
    Column("video_id", S, "", "the video it is a part of"),
    Column("shard", S, "", "of the video; the partition"),
    Column("stream", I4, "", "stream index in the container"),
    Column("start_pts", I8, "pts", "first frame"),
    Column("end_pts", I8, "pts", "end of the last frame (not part of the clip)"),
    Column("time_base", S, "s", "num/den seconds per PTS unit"),
    Column("start_s", F8, "s", "start, from the video's first frame"),
    Column("end_s", F8, "s", "end, from the video's first frame"),
    Column("start_frame", I8, "frame", "index of the first frame"),
    Column("end_frame", I8, "frame", "index after the last frame"),
    Column("num_frames", I8, "frames", "decoded count"),
    Column("fps", F8, "frames/s", "num_frames over the clip's duration (null for images)"),
    Column("width", I4, "px", "for display"),
    Column("height", I4, "px", "for display"),
    Column("aspect_ratio", F8, "", "height / width"),
    Column("resolution", I8, "px", "height · width"),
    Column(
        "path", S, "", "clip file relative to the catalog; null: a virtual clip, read from the source by span", "clips"
    ),
    Column("lost_start", I4, "frames", "of the span missing at the start of `path` (stream copy only)", "clips"),
    Column("lost_end", I4, "frames", "of the span missing at the end of `path` (stream copy only)", "clips"),
    *SCORES,
    Column("duplicate_group", S, "", "near-duplicates share it; a clip without any has its own", "dedup"),
    Column("duplicate_of", S, "", "clip_id of the better clip that this one repeats (null: none)", "dedup"),
    Column("duplicate_kind", S, "", "exact, perceptual or semantic: why duplicate_of", "dedup"),
    Column("duplicate_similarity", F4, "0..1", "of this clip and duplicate_of", "dedup"),
    Column("split", S, "", "train, val or test: by hash, fixed once; near-duplicates are on one side"),
    Column("stage_versions", pa.list_(STAGE_VERSION), "", "fingerprint of every stage that filled columns"),
    Column("errors", pa.list_(ERROR), "", "what failed on this clip; not empty: quarantined"),
    Column("run_id", S, "", "run that made the row; counts only while it equals the video's"),
)

DECISIONS = (
    Column("clip_id", S, "", "the clip", "decide"),
    Column("shard", S, "", "of the clip", "decide"),
    Column("status", S, "", "kept, rejected, pending, quarantined", "decide"),
    Column("reasons", pa.list_(S), "", "rules that reject it; rules it waits for; stages that failed", "decide"),
    Column("recipe", S, "", "name and hash of the rules", "decide"),
    Column("level", I4, "", "highest nested level whose rules it passes (0: not kept)", "decide"),
    Column("caption_id", S, "", "the caption that the recipe prefers (null: none yet)", "decide"),
)

CAPTIONS = (
    Column("caption_id", S, "", "hash of clip_id, style and model", "caption"),
    Column("clip_id", S, "", "the clip", "caption"),
    Column("shard", S, "", "of the clip; the partition", "caption"),
    Column("style", S, "", "short, dense, structured, camera, refined …: name of the prompt", "caption"),
    Column("model", S, "", "that wrote it", "caption"),
    Column("text", S, "", "the caption, repaired where that is safe (null: see error)", "caption"),
    Column("original", S, "", "what the model wrote, where `text` was repaired (null: the same)", "caption"),
    Column(
        "flags",
        pa.list_(S),
        "",
        "see pipelines.captioning.caption_quality: empty, truncated, refusal, repetition …",
        "caption",
    ),
    Column("backend", S, "", "vllm, openai or transformers", "caption"),
    Column("prompt_hash", S, "", "of the prompt file", "caption"),
    Column("input_tokens", I4, "tokens", "pictures included", "caption"),
    Column("output_tokens", I4, "tokens", "of the last answer", "caption"),
    Column("made_from", S, "", "caption_id of the caption that was rewritten (refine only)", "caption"),
    Column("error_kind", S, "", "why there is no text; see datakit.errors.ErrorKind", "caption"),
    Column("error", S, "", "what happened", "caption"),
    Column("fingerprint", S, "", "of prompt, model, frames and sampling: the same is not asked again", "caption"),
    Column("run_id", S, "", "run that wrote it", "caption"),
    Column("created_at", TIME, "UTC", "when", "caption"),
)

EMBEDDINGS = (
    Column("clip_id", S, "", "the clip", "embed"),
    Column("video_id", S, "", "its video", "embed"),
    Column("shard", S, "", "of the clip; the partition", "embed"),
    Column("model", S, "", "of the features, for example ViT-L-14/openai", "embed"),
    Column("weights_hash", S, "", "content of its weights", "embed"),
    Column(
        "vector", pa.list_(F4), "", "mean over frames of unit vectors, scaled to unit length (null: no frame)", "embed"
    ),
    Column("norm", F4, "0..1", "length of that mean before scaling: 1 when all frames look alike", "embed"),
    Column("frames", I4, "frames", "looked at", "embed"),
    Column("fingerprint", S, "", "of model, weights and frame positions", "embed"),
    Column("run_id", S, "", "of the clip's row; counts only while equal", "embed"),
)

MARKS = (
    Column("mark_id", S, "", "identity of the row; a clip's newest row counts", "browse"),
    Column("clip_id", S, "", "the clip", "browse"),
    Column("mark", S, "", "keep or reject (null: the recipe decides)", "browse"),
    Column("comment", S, "", "what somebody noted", "browse"),
    Column("author", S, "", "user@host", "browse"),
    Column("created_at", TIME, "UTC", "when", "browse"),
)

LATENTS = (
    Column("clip_id", S, "", "the clip", "encode"),
    Column("video_id", S, "", "its video", "encode"),
    Column("shard", S, "", "of the clip", "encode"),
    Column("stream", I4, "", "of the clip: stream index in the container", "encode"),
    Column("start_pts", I8, "pts", "of the clip: first frame", "encode"),
    Column("end_pts", I8, "pts", "of the clip: end of the last frame", "encode"),
    Column("geometry", S, "", "of the plan: hash of everything that decides the window's pixels", "encode"),
    Column("autoencoder", S, "", "hash of its kind, sizes and weights; partition", "encode"),
    Column("bucket", S, "", "height × width × frames; partition", "encode"),
    Column("first", I4, "frames", "index of the window's first frame inside the clip", "encode"),
    Column("frames", I4, "frames", "of the window", "encode"),
    Column("fps", F8, "frames/s", "of the window's frames (0: an image)", "encode"),
    Column("dtype", S, "", "of the numbers: bfloat16 or float32", "encode"),
    Column("shape", pa.list_(I4), "", "channels, time, height, width", "encode"),
    Column("mean", pa.binary(), "", "scaled mean: little-endian, C order (null: see error)", "encode"),
    Column("std", pa.binary(), "", "scaled spread (zeros where the autoencoder has none)", "encode"),
    Column("error_kind", S, "", "why there is no latent; see datakit.errors.ErrorKind", "encode"),
    Column("error", S, "", "what happened", "encode"),
    Column("run_id", S, "", "run that wrote it", "encode"),
    Column("created_at", TIME, "UTC", "when", "encode"),
)

LOSSES = (
    Column("clip_id", S, "", "the clip", "train"),
    Column("shard", S, "", "of the clip; the partition", "train"),
    Column("run_id", S, "", "training run", "train"),
    Column("bucket", S, "", "of the plan: height × width × frames", "train"),
    Column("noise_level", I4, "0..9", "tenth of the noise range", "train"),
    Column("excess", F8, "", "sum of loss minus the running mean of its noise level and bucket", "train"),
    Column("count", I8, "samples", "summed", "train"),
    Column("from_step", I8, "steps", "first step of the range that one commit covers", "train"),
    Column("to_step", I8, "steps", "step after the last", "train"),
)

SAMPLES = (
    Column(
        "sample_id",
        S,
        "",
        "hash of everything that decides its pixels: prompts, references, seed, number, options, weights",
        "sample",
    ),
    Column("status", S, "", "queued, encoded, denoised, done, failed", "sample"),
    Column("error_kind", S, "", "why it failed; see datakit.errors.ErrorKind", "sample"),
    Column("error", S, "", "what happened", "sample"),
    Column("name", S, "", "of its file, without suffix", "sample"),
    Column("path", S, "", "file or folder, relative to the catalog (null: not done)", "sample"),
    Column("video_id", S, "", "row of `videos` (null: not done, or not a video file)", "sample"),
    Column("clip_id", S, "", "row of `clips`", "sample"),
    Column("prompt", S, "", "as it was given", "sample"),
    Column("refined", S, "", "as a language model rewrote it (null: it did not)", "sample"),
    Column("text", S, "", "what the model was told, frame rate and motion score included", "sample"),
    Column("negative", S, "", "negative prompt; empty: none", "sample"),
    Column("motion", I4, "", "motion score told (null: none)", "sample"),
    Column(
        "mode", S, "", "t2v, i2v_head, i2v_tail, i2v_loop, v2v_head …; see trainer.diffusion.conditioning", "sample"
    ),
    Column("references", pa.list_(S), "", "pictures and videos that were given", "sample"),
    Column("source_clip", S, "", "clip_id whose caption and frames these are (null: none)", "sample"),
    Column("seed", I8, "", "of the run", "sample"),
    Column("number", I4, "", "of the samples of one prompt and seed", "sample"),
    Column("num_frames", I4, "frames", "of the video", "sample"),
    Column("height", I4, "px", "of the video", "sample"),
    Column("width", I4, "px", "of the video", "sample"),
    Column("fps", F8, "frames/s", "of the video", "sample"),
    Column("steps", I4, "steps", "of the schedule", "sample"),
    Column("guidance", F8, "", "scale on the text", "sample"),
    Column("image_guidance", F8, "", "scale on the references", "sample"),
    Column("options", S, "", "everything else that decides the result, JSON", "sample"),
    Column("checkpoint", S, "", "weights of the model, as they were named", "sample"),
    Column("checkpoint_hash", S, "", "of their content", "sample"),
    Column("encode_s", F8, "s", "its share of encoding text and references", "sample"),
    Column("denoise_s", F8, "s", "its share of its batch", "sample"),
    Column("decode_s", F8, "s", "decoding and writing", "sample"),
    Column("forwards", I4, "", "of the model, for this sample", "sample"),
    Column("run_id", S, "", "run that made it", "sample"),
    Column("created_at", TIME, "UTC", "when its row was entered", "sample"),
    Column("finished_at", TIME, "UTC", "when its file was written", "sample"),
)

TAGS = (
    Column("name", S, "", "of the snapshot", "tag"),
    Column("versions", S, "", "the version of every table, JSON", "tag"),
    Column("where", S, "", "condition of the selection (null: the snapshot alone)", "tag"),
    Column("columns", pa.list_(S), "", "of the selection", "tag"),
    Column("content_hash", S, "", "of the selection", "tag"),
    Column("note", S, "", "why", "tag"),
    Column("author", S, "", "user@host", "tag"),
    Column("created_at", TIME, "UTC", "when", "tag"),
)

FORGOTTEN = (
    Column("video_id", S, "", "video that was forgotten, or a span of it", "forget"),
    Column("stream", I4, "", "stream index (null: the whole video)", "forget"),
    Column("start_pts", I8, "pts", "start of the span", "forget"),
    Column("end_pts", I8, "pts", "end of the span", "forget"),
    Column("seen_by", pa.list_(S), "", "checkpoints trained on it, as far as runs recorded them", "forget"),
    Column("reason", S, "", "why", "forget"),
    Column("author", S, "", "user@host", "forget"),
    Column("created_at", TIME, "UTC", "when", "forget"),
)

RUNS = (
    Column("run_id", S, "", "identity of the run", "all"),
    Column("pipeline", S, "", "ingest, score, decide …", "all"),
    Column("author", S, "", "user@host", "all"),
    Column("status", S, "", "running, finished, stopped, failed", "all"),
    Column("started_at", TIME, "UTC", "when", "all"),
    Column("finished_at", TIME, "UTC", "when", "all"),
    Column("config", S, "", "resolved settings, JSON", "all"),
    Column("code_version", S, "", "datakit version", "all"),
    Column("counts", S, "", "the funnel at the end, JSON", "all"),
    Column("stage_cpu_s", S, "", "CPU seconds by stage, JSON", "all"),
    Column("wall_s", F8, "s", "from start to end", "all"),
    Column("cpu_hours", F8, "h", "of all stages", "all"),
    Column("gpu_hours", F8, "h", "of all stages (null: not measured)", "all"),
    Column("snapshot", S, "", "the version of every table at the end, JSON", "all"),
    Column("selection", S, "", "what it read: versions, where, columns, content hash, JSON (null: the newest)", "all"),
    Column("checkpoints", pa.list_(CHECKPOINT), "", "that it wrote, while they exist", "train"),
)

TABLES: dict[str, tuple[Column, ...]] = {
    "videos": VIDEOS,
    "clips": CLIPS,
    "decisions": DECISIONS,
    "captions": CAPTIONS,
    "embeddings": EMBEDDINGS,
    "marks": MARKS,
    "latents": LATENTS,
    "losses": LOSSES,
    "samples": SAMPLES,
    "runs": RUNS,
    "tags": TAGS,
    "forgotten": FORGOTTEN,
}
KEYS: dict[str, tuple[str, ...]] = {
    "videos": ("video_id",),
    "clips": ("clip_id", "run_id"),
    "decisions": ("clip_id",),
    "captions": ("caption_id",),
    "embeddings": ("clip_id", "model", "run_id"),
    "marks": ("mark_id",),
    "latents": ("geometry", "autoencoder"),
    "losses": ("clip_id", "run_id", "bucket", "noise_level", "from_step"),
    "samples": ("sample_id",),
    "runs": ("run_id",),
    "tags": ("name",),
    "forgotten": ("video_id", "stream", "start_pts", "end_pts"),
}
"""Columns that tell a table's rows apart. Of `clips` and `embeddings` those count whose run is the video's."""
PARTITIONED = {
    "clips": ["shard"],
    "captions": ["shard"],
    "embeddings": ["shard"],
    "losses": ["shard"],
    "latents": ["autoencoder", "bucket"],
}
RECORDS = ("runs", "tags", "forgotten")
"""Tables about the catalog itself: no snapshot holds them, nothing restores them."""

VIEW_FROM_VIDEOS = (
    "kind",
    "container",
    "codec",
    "profile",
    "pix_fmt",
    "bit_depth",
    "color_space",
    "color_range",
    "color_transfer",
    "color_primaries",
    "rotation",
    "vfr",
    "bit_rate",
    "bits_per_pixel",
    "has_audio",
    "license",
    "source_url",
    "attribution",
    "source_caption",
    "extra",
)
"""Columns of `videos` that the view `clips` carries too (where the names do not clash)."""

VIEW_ADDED = (
    Column("uri", S, "", "first known address of the video", "view"),
    Column("status", S, "", "of the clip: kept, rejected, pending, quarantined; a mark wins over the recipe", "decide"),
    Column("reasons", pa.list_(S), "", "see decisions; `mark`: rejected by a person", "decide"),
    Column("level", I4, "", "see decisions", "decide"),
    Column("caption", S, "", "the caption that the recipe prefers", "caption"),
    Column("caption_style", S, "", "its style", "caption"),
    Column("caption_model", S, "", "model that wrote it", "caption"),
    Column("caption_flags", pa.list_(S), "", "its flags", "caption"),
    Column("mark", S, "", "human decision: keep or reject", "browse"),
    Column("comment", S, "", "human note", "browse"),
    Column(
        "loss", F8, "", "training loss minus the mean of its noise level and bucket, over all samples drawn", "train"
    ),
)


def arrow_schema(table: str) -> pa.Schema:
    """The Arrow schema of a table."""
    return pa.schema([pa.field(c.name, c.arrow) for c in TABLES[table]])


def filler(column: str) -> str | None:
    """The stage that fills a column of the view, None when there is no such column."""
    for c in (*CLIPS, *VIEW_ADDED, *VIDEOS):
        if c.name == column:
            return c.filled_by
    return None


def missing_columns(table: str, present: Iterable[str]) -> list[str]:
    """Complaints about columns that a table should have and has not, each naming the stage to run."""
    have = set(present)
    return [f"{table}.{c.name} is missing (filled by: {c.filled_by})" for c in TABLES[table] if c.name not in have]
