"""What the stages with models cost, each number beside its baseline from the same run.

    .venv/bin/python scripts/bench_semantics.py [--tiny] [--repeats N] [--only PART …] [--architecture ARCH]

Weights are random: speed does not depend on them. Machines are shared and noisy: look at the ratios, whose two
sides take turns. On a machine with a GPU, `--only embed --architecture ViT-L-14` says what the embedding actor makes
of it and what it waits for; that part needs neither Ray nor a catalog.

Parts:
    embed      pictures per second through the embedding actor's process, against a bare open_clip loop on the same
    batches;
               then where the time goes: pipe, preprocessing, network
    caption    captions per second through an actor, against a bare vLLM loop over the same requests (a tiny VLM:
               what is measured is all that surrounds the model)
    dedup      100 000 made-up embeddings with known duplicates, and the growth from 10 000
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from datakit.atomic import atomic_path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
PARTS = ("embed", "caption", "dedup")
FRAME = (360, 640)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="small sizes, one repeat")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--architecture", default="ViT-B-32", help="of open_clip, for embed")
    parser.add_argument("--clips", type=int, help="for embed; default: 64, with --tiny 8, on a GPU 2048")
    parser.add_argument("--threads", type=int, default=1, help="of the language model, for caption")
    parser.add_argument("--part", help=argparse.SUPPRESS)  # run one measurement in a process of its own
    arguments = parser.parse_args()
    if arguments.part:
        json.dump(globals()[arguments.part](arguments), sys.stdout)
        return
    for part in arguments.only:
        {"embed": embed, "caption": caption, "dedup": dedup}[part](arguments)


def embed(arguments) -> None:
    """Each repeat measures both sides, one after the other; models are loaded once."""
    from datakit.process.child import Child
    from datakit.process.messages import ToolSpec

    weights = random_clip(arguments.architecture)
    gpu = has_gpu()
    precision = "fp16" if gpu else "fp32"
    threads = len(os.sched_getaffinity(0))
    clips = arguments.clips or (8 if arguments.tiny else 2048 if gpu else 64)
    rows, images = pictures_of(clips)
    # A call of the actor takes eight batches of eight clips (`runner.MOST_BATCHES`, `video_pass.CLIPS_PER_BATCH`).
    calls = [slice(start, start + 64) for start in range(0, clips, 64)]
    options = dict(model=arguments.architecture, weights=weights, precision=precision, threads=threads, batch=64)
    child = Child(ToolSpec("pipelines.stages.embed:Embed", options, None, 600.0, threads=threads))
    bare = BareClip(arguments.architecture, weights, precision, threads)
    count = sum(map(len, images))

    def through_actor() -> None:
        for part in calls:
            for item in child.stream((rows[part], images[part])):
                if getattr(item, "message", None):
                    sys.exit(item.message)

    def in_loop() -> None:
        for part in calls:
            flat = [picture for clip in images[part] for picture in clip]
            for start in range(0, len(flat), 64):
                bare(flat[start : start + 64])

    ours, theirs = in_turns([through_actor, in_loop], 1 if arguments.tiny else arguments.repeats)
    child.stop()
    where = "GPU" if gpu else f"{threads} CPU threads"
    print(
        f"\nembed: {arguments.architecture}, {precision}, {where}; {count} pictures of {FRAME[1]}x{FRAME[0]}, "
        f"batches of 64"
    )
    print(f"  through the actor's process   {count / ours:8.1f} pictures/s")
    print(f"  bare open_clip loop           {count / theirs:8.1f} pictures/s   ratio {theirs / ours:.2f}")
    starved_by(options, rows, images, calls, count)


def starved_by(options: dict, rows: list, images: list, calls: list, count: int) -> None:
    """Time per picture of each step by itself, in this process."""
    import pickle

    import torch

    from pipelines.stages.image_encoders import make_encoder

    encoder = make_encoder(**{k: options[k] for k in ("model", "weights", "precision", "threads", "batch")})
    flat = [picture for clip in images[calls[0]] for picture in clip][:64]
    device = encoder._device
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None

    def timed(action) -> float:
        action(), wait()
        started = time.perf_counter()
        for _ in range(3):
            action()
        wait()
        return (time.perf_counter() - started) / 3 / len(flat)

    stack = encoder._preprocess(flat, device)
    with torch.inference_mode():
        network = timed(lambda: encoder._model.encode_image(stack.to(encoder._dtype)))
    steps = {
        "pickle and unpickle (the pipe)": timed(lambda: pickle.loads(pickle.dumps((rows[:22], flat), protocol=5))),
        "preprocess (copy, resize, crop)": timed(lambda: encoder._preprocess(flat, device)),
        "network": network,
    }
    print("  step by itself, ms per picture: " + ", ".join(f"{name} {1000 * s:.3f}" for name, s in steps.items()))
    slowest = max(steps, key=steps.get)
    print(f"  most time goes to: {slowest} ({steps[slowest] / sum(steps.values()):.0%})")


class BareClip:
    """What a user would write: open_clip's own transform picture by picture, then the network."""

    def __init__(self, architecture: str, weights: str, precision: str, threads: int):
        import open_clip
        import torch

        torch.set_num_threads(threads)
        self.torch, self.device = torch, "cuda" if torch.cuda.is_available() else "cpu"
        self.model, _, self.transform = open_clip.create_model_and_transforms(
            architecture, pretrained=weights, precision=precision, device=self.device
        )
        self.model.eval()
        self.dtype = next(self.model.visual.parameters()).dtype

    def __call__(self, pictures: list[np.ndarray]) -> np.ndarray:
        from PIL import Image

        with self.torch.inference_mode():
            stack = self.torch.stack([self.transform(Image.fromarray(p)) for p in pictures]).to(self.device, self.dtype)
            return self.torch.nn.functional.normalize(self.model.encode_image(stack).float(), dim=-1).cpu().numpy()


def random_clip(architecture: str) -> str:
    """File of random weights, kept in the temporary folder."""
    path = Path(tempfile.gettempdir()) / f"datakit-random-{architecture}.pt"
    if not path.exists():
        import open_clip
        import torch

        with atomic_path(path) as aside:
            torch.save(open_clip.create_model(architecture).state_dict(), aside)
    return str(path)


def pictures_of(clips: int) -> tuple[list[dict], list[list[np.ndarray]]]:
    """Rows and three pictures each, smooth with some noise as frames are."""
    random = np.random.default_rng(0)
    rows = [{"clip_id": str(i), "width": FRAME[1], "height": FRAME[0], "crop_width": None} for i in range(clips)]
    base = np.kron(random.integers(30, 220, (9, 16, 3)), np.ones((40, 40, 1))).astype(np.uint8)
    distinct = [
        np.clip(np.roll(base, 13 * i, 1) + random.integers(-9, 9, base.shape), 0, 255).astype(np.uint8)
        for i in range(48)
    ]
    return rows, [[distinct[(3 * i + j) % 48] for j in range(3)] for i in range(clips)]


def caption(arguments) -> None:
    """Both sides in processes of their own (vLLM is loaded once in each); repeats inside."""
    from support.vlm import build_tiny_vlm

    folder = Path(tempfile.gettempdir()) / "datakit-tiny-vlm"
    if not (folder / "config.json").exists():
        build_tiny_vlm(folder)
    repeats = 1 if arguments.tiny else arguments.repeats
    count = 16 if arguments.tiny else 128
    ours, theirs = [], []
    for _ in range(repeats):
        for part, times in (("captions_through_actor", ours), ("captions_in_loop", theirs)):
            command = [
                sys.executable,
                __file__,
                "--part",
                part,
                "--threads",
                str(arguments.threads),
                *(["--tiny"] if arguments.tiny else []),
            ]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                sys.exit(done.stderr[-3000:])
            times.append(json.loads(done.stdout.strip().splitlines()[-1]))
    ours_s, theirs_s = (statistics.median(times) for times in (ours, theirs))
    print(
        f"\ncaption: tiny VLM in vLLM, {count} clips of 4 frames, 32 tokens, 8 requests at once, float32, "
        f"{arguments.threads} threads; start-up not counted"
    )
    print(f"  through an actor of a flow    {count / ours_s:8.1f} captions/s")
    print(f"  bare vLLM loop                {count / theirs_s:8.1f} captions/s   ratio {theirs_s / ours_s:.2f}")


def caption_settings(threads: int):
    from datakit import config
    from pipelines.settings import Settings

    return config.load(
        Settings,
        None,
        [
            "caption.backend=vllm",
            f"caption.model={Path(tempfile.gettempdir()) / 'datakit-tiny-vlm'}",
            "caption.dtype=float32",
            "caption.max_tokens=32",
            "caption.max_num_seqs=8",
            "caption.frames=4",
            "caption.side=128",
            "caption.styles=[short]",
            "caption.input=images",
            "caption.kv_cache_gb=0.125",
            "caption.max_model_len=2048",
            f"caption.threads={threads}",
            "caption.language=null",
        ],
    )


def caption_frames(arguments) -> list[list[np.ndarray]]:
    random = np.random.default_rng(1)
    count = 16 if arguments.tiny else 128
    return [[random.integers(0, 255, (72, 128, 3), dtype=np.uint8) for _ in range(4)] for _ in range(count)]


def captions_through_actor(arguments) -> float:
    """Seconds from the first request to the last answer, through the pool and the actor that a run uses."""
    import ray

    from datakit.process.messages import ToolSpec
    from pipelines.executor.actors import EngineWorker
    from pipelines.executor.flow_setup import slots_of
    from pipelines.executor.session import RaySession
    from pipelines.runs.caption import questions
    from pipelines.video_tasks.messages import CLIPS_A_BATCH

    settings = caption_settings(arguments.threads)
    section = settings.caption
    options = {**section.model_dump(), "name": "tiny"}
    spec = ToolSpec(
        "pipelines.captioning.captioner:Captioner",
        {
            "options": options,
            "questions": questions(settings, "caption"),
            "language": None,
            "as_video": False,
            "stall_s": 600.0,
        },
    )
    frames = caption_frames(arguments)
    rows = [
        {
            "clip_id": str(i),
            "styles": ["short"],
            "facts": {},
            "times": [0, 0.5, 1, 1.5],
            "duration_s": 2.0,
            "errors": [],
        }
        for i in range(len(frames))
    ]
    with RaySession("local"):
        actor = ray.remote(num_cpus=1, max_concurrency=slots_of(section))(EngineWorker).remote(spec)
        ray.get(actor.version.remote())
        ray.get(actor.process.remote([rows[:1]], ray.put(frames[:1])))  # warm
        started = time.perf_counter()
        waiting, left, answered = set(), [slice(i, i + CLIPS_A_BATCH) for i in range(0, len(frames), CLIPS_A_BATCH)], 0
        while left or waiting:
            while left and len(waiting) < slots_of(section):
                part = left.pop(0)
                waiting.add(actor.process.remote([rows[part]], ray.put(frames[part])))
            ready, _ = ray.wait(list(waiting), num_returns=1)
            for ref in ready:
                results = ray.get(ref)[0].results
                assert all(result["captions"][0]["output_tokens"] > 0 for result in results)
                waiting.discard(ref)
                answered += len(results)
        assert answered == len(frames)
        return time.perf_counter() - started


def captions_in_loop(arguments) -> float:
    """Seconds of `LLM.generate` over the same requests, all handed over at once."""
    os.environ |= {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "OMP_NUM_THREADS": str(arguments.threads),
        "VLLM_LOGGING_LEVEL": "ERROR",
    }
    from PIL import Image
    from transformers import AutoProcessor
    from vllm import LLM, SamplingParams

    from pipelines.runs.caption import questions

    settings = caption_settings(arguments.threads)
    prompt = questions(settings, "caption")["short"].prompt
    folder = settings.caption.model
    llm = LLM(
        model=folder,
        dtype="float32",
        enforce_eager=True,
        max_model_len=2048,
        max_num_seqs=8,
        kv_cache_memory_bytes=128 << 20,
        limit_mm_per_prompt={"image": 4, "video": 0},
        seed=0,
        mm_processor_cache_gb=0,
        disable_log_stats=True,
    )
    content = [*({"type": "image"} for _ in range(4)), {"type": "text", "text": prompt.render()}]
    messages = [
        *([{"role": "system", "content": prompt.system}] if prompt.system else []),
        {"role": "user", "content": content},
    ]
    text = AutoProcessor.from_pretrained(folder).apply_chat_template(
        messages, tokenize=False, add_generation_prompt=True
    )
    frames = caption_frames(arguments)
    asked = [{"prompt": text, "multi_modal_data": {"image": [Image.fromarray(f) for f in clip]}} for clip in frames]
    sampling = SamplingParams(temperature=0.0, max_tokens=32)
    llm.generate(asked[:1], sampling, use_tqdm=False)
    started = time.perf_counter()
    llm.generate(asked, sampling, use_tqdm=False)
    return time.perf_counter() - started


def dedup(arguments) -> None:
    """Each size in a process of its own, so that its peak of memory is its own."""
    sizes = (1_000, 5_000) if arguments.tiny else (10_000, 100_000)
    print(
        "\ndedup: unit vectors of length 768, a tenth of them near-copies (cosine 0.97) of others, threshold 0.9; "
        "one process"
    )
    before = None
    for size in sizes:
        done = subprocess.run(
            [sys.executable, __file__, "--part", "dedup_of", "--clips", str(size)], capture_output=True, text=True
        )
        if done.returncode:
            sys.exit(done.stderr[-3000:])
        seconds, recall, wrong, peak = json.loads(done.stdout.strip().splitlines()[-1])
        growth = (
            f"   {seconds / before[1]:.1f} times the time for {size / before[0]:.0f} times the clips" if before else ""
        )
        print(f"  {size:>7} clips {seconds:7.1f} s   recall {recall:.4f}, {wrong} wrong   peak {peak:.1f} GiB{growth}")
        before = size, seconds


def dedup_of(arguments) -> tuple[float, float, int, float]:
    from pipelines.duplicates.grouping import Clips, find_duplicates

    count, copies = arguments.clips, arguments.clips // 10
    random = np.random.default_rng(2)
    centres = random.standard_normal((200, 768)).astype(np.float32)  # clips of a catalog lie in heaps
    vectors = centres[random.integers(0, 200, count)] + 0.8 * random.standard_normal((count, 768)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    noise = random.standard_normal((copies, 768)).astype(np.float32)
    noise /= np.linalg.norm(noise, axis=1, keepdims=True)
    originals = np.arange(copies)
    vectors[count - copies :] = vectors[originals] + 0.25 * noise
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    started = time.perf_counter()
    found = find_duplicates(Clips(np.arange(count), embedded=np.arange(count), vectors=vectors), threshold=0.9)
    seconds = time.perf_counter() - started
    hits = int((found.of[count - copies :] == originals).sum())
    wrong = int((found.of >= 0).sum()) - hits
    peak_kb = next(
        int(line.split()[1]) for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")
    )
    return seconds, hits / copies, wrong, peak_kb / 2**20


def in_turns(actions: list, repeats: int) -> list[float]:
    """Median seconds of each, after one round that is not counted."""
    times: list[list[float]] = [[] for _ in actions]
    for number in range(repeats + 1):
        for action, mine in zip(actions, times):
            started = time.perf_counter()
            action()
            if number:
                mine.append(time.perf_counter() - started)
    return [statistics.median(mine) for mine in times]


def has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


if __name__ == "__main__":
    main()
